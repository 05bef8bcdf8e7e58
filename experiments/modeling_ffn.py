"""
A model of this project for transformers. export_hf.py puts this file beside the model.py of the run, and
AutoModelForCausalLM.from_pretrained(DIR, trust_remote_code=True) opens them. It is for evaluation and
sampling, with a cache of keys and values or without: an FFN's auxiliary loss is left out. Weights stay
float32, as in training; from_pretrained(dtype=torch.bfloat16) is autocast to that type.
"""

import torch
from torch import Tensor
from transformers import DynamicCache, GenerationMixin, PreTrainedModel, Qwen3Config
from transformers.modeling_outputs import CausalLMOutputWithPast

from configurator import UserError
from model import GPT, GPTConfig

# The name of the cache among the outputs, which changed within transformers 5.
CACHE = "cache" if "cache" in CausalLMOutputWithPast.__dataclass_fields__ else "past_key_values"


class FFNConfig(Qwen3Config):
    """Qwen3's config, and in `gpt` the fields of model.py's GPTConfig."""

    model_type = "ffn"


class FFNForCausalLM(PreTrainedModel, GenerationMixin):
    config_class = FFNConfig
    base_model_prefix = "model"
    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012

    def __init__(self, config: FFNConfig):
        super().__init__(config)
        with torch.device("cpu"):  # and not without memory, as transformers would: not every FFN can
            gpt = GPT(GPTConfig(**config.gpt))
        self.model, self.lm_head = gpt.model, gpt.lm_head
        for module in self.modules():  # each buffer becomes part of the file
            for name, buffer in module.named_buffers(recurse=False):
                module.register_buffer(name, buffer)
        self.autocast_dtype = config.dtype or torch.float32
        self._keep_in_fp32_modules_strict = set(self.state_dict())
        self.post_init()

    def _init_weights(self, module: torch.nn.Module) -> None:
        """Do nothing, because GPT has set the weights."""

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, cache: DynamicCache | None = None,
        past_key_values: DynamicCache | None = None, use_cache: bool | None = None,
        labels: Tensor | None = None, logits_to_keep: int = 0, **kwargs: object,
    ) -> CausalLMOutputWithPast:  # fmt: skip
        """Return the logits (B, T, vocab) of input_ids (B, T), which come after the tokens in the cache,
        or of the last logits_to_keep of them; with labels (B, T) the loss too."""
        cache = past_key_values if cache is None else cache
        if cache is None and use_cache:
            cache = DynamicCache(config=self.config)
        if cache is not None and not self.config.use_cache:
            raise UserError("this FFN reads earlier tokens, which a cache does not hold: use_cache=False")
        if attention_mask is not None and (attention_mask.diff(dim=-1) > 0).any():
            raise UserError("a text cannot have padding before it: pad on the right, or give one text")
        start = 0 if cache is None else cache.get_seq_length()
        size, limit = start + input_ids.size(1), self.config.max_position_embeddings
        if size > limit:
            raise UserError(f"{size} tokens are more than the {limit} that the model was trained for")
        # The model takes a whole text or, after what is in the cache, one token at a time.
        dtype = self.autocast_dtype
        with torch.autocast(input_ids.device.type, dtype, enabled=dtype.itemsize == 2):
            hidden = [self.step(ids, cache) for ids in input_ids.split(1 if start else limit, dim=1)]
            logits = self.lm_head(torch.cat(hidden, dim=1)[:, -logits_to_keep:])
        loss = None if labels is None else self.loss_function(logits, labels, logits.size(-1), **kwargs)
        return CausalLMOutputWithPast(loss=loss, logits=logits, **{CACHE: cache})

    def step(self, ids: Tensor, cache: DynamicCache | None) -> Tensor:
        """Return the hidden states (B, T, d) of ids (B, T); keys and values are added to the cache."""
        if cache is None:
            return self.model(ids)[0]
        start = cache.get_seq_length()
        caches = [[x.keys, x.values] for x in cache.layers] if start else [[] for _ in self.model.layers]
        hidden, _ = self.model(ids, caches, start)
        for i, (keys, values) in enumerate(caches):
            cache.update(keys[:, :, start:], values[:, :, start:], i)
        return hidden
