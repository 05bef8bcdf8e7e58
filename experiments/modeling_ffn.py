"""
A model of this project for transformers. export_hf.py puts this file beside the model.py of the run. It
is for evaluation and sampling, with or without a cache: an FFN's auxiliary loss is left out. Weights
stay float32, as in training; from_pretrained(dtype=torch.bfloat16) is autocast to that type.
"""

import torch
from torch import Tensor
from transformers import DynamicCache, GenerationMixin, PreTrainedModel, Qwen3Config
from transformers.modeling_outputs import CausalLMOutputWithPast

from configurator import UserError
from model import GPT, GPTConfig


class FFNConfig(Qwen3Config):
    model_type = "ffn"  # Qwen3's config, and in `gpt` the fields of model.py's GPTConfig


class FFNForCausalLM(PreTrainedModel, GenerationMixin):
    config_class = FFNConfig
    base_model_prefix = "model"
    _keep_in_fp32_modules_strict = ["model", "lm_head"]  # noqa: RUF012
    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012

    def __init__(self, config: FFNConfig):
        super().__init__(config)
        with torch.device("cpu"):  # not transformers' meta device: not every FFN can be built there
            gpt = GPT(GPTConfig(**config.gpt))
        self.model, self.lm_head = gpt.model, gpt.lm_head
        for module in self.modules():  # each buffer becomes part of the file
            for name, buffer in module.named_buffers(recurse=False):
                module.register_buffer(name, buffer)
        self.autocast_dtype = config.dtype or torch.float32
        self.post_init()

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, cache: DynamicCache | None = None,
        past_key_values: DynamicCache | None = None, use_cache: bool | None = None,
        labels: Tensor | None = None, logits_to_keep: int = 0, **kwargs: object,
    ) -> CausalLMOutputWithPast:  # fmt: skip
        """Return the logits (B, T, vocab) of input_ids (B, T), which come after the tokens in the cache,
        or of the last logits_to_keep of them; with labels (B, T) the loss too."""
        cache = past_key_values if cache is None else cache
        cache = DynamicCache(config=self.config) if cache is None and use_cache else cache
        if cache is not None and not self.config.use_cache:
            raise UserError("this FFN reads earlier tokens, which no cache holds: use_cache=False")
        if attention_mask is not None and (attention_mask.float().diff(dim=-1) > 0).any():
            raise UserError("a text cannot have padding before it: pad on the right, or give one text")
        positions = kwargs.get("position_ids")
        if attention_mask is None and positions is not None and (positions.diff(dim=-1) != 1).any():
            raise UserError("several texts cannot share a row: give each a row of its own")
        start = 0 if cache is None else cache.get_seq_length()
        size, limit = start + input_ids.size(1), self.config.max_position_embeddings
        if size > limit:
            raise UserError(f"{size} tokens are more than the {limit} that the model was trained for")
        hidden, dtype = [], self.autocast_dtype
        with torch.autocast(input_ids.device.type, dtype, enabled=dtype.itemsize == 2):
            # The model takes a whole text or, after what is in the cache, one token at a time.
            for ids in input_ids.split(1 if start else limit, dim=1):
                caches = [[] for _ in self.model.layers] if cache is not None else None
                if start:
                    caches = [[layer.keys, layer.values] for layer in cache.layers]
                hidden.append(self.model(ids, caches, start)[0])
                for i, (keys, values) in enumerate(caches or []):
                    cache.update(keys[:, :, start:], values[:, :, start:], i)
                start += ids.size(1)
            logits = self.lm_head(torch.cat(hidden, dim=1)[:, -logits_to_keep:])
        loss = None if labels is None else self.loss_function(logits, labels, logits.size(-1), **kwargs)
        return CausalLMOutputWithPast(loss, logits, cache)  # by place: the name differs by version
