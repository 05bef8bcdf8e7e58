"""
A trained model for Hugging Face: weights, config, tokenizer, model card and, where it is needed, code.

    python experiments/export_hf.py out/RUN DIR

SwiGLU becomes transformers' Qwen3. Any other FFN takes along modeling_ffn.py and the run's model.py, and
opens with trust_remote_code=True. DIR appears once transformers has opened it and has computed our
logits. For scripts there is `load_run`.
"""

from __future__ import annotations

import copy
import hashlib
import importlib
import json
import re
import shlex
import sys
import tempfile
from base64 import b64encode
from dataclasses import asdict
from pathlib import Path
from types import ModuleType

import numpy as np
import tiktoken
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import model as model_file
import train
from configurator import UserError, reason, run
from model import GPT
from prepare_fineweb import load_encoding

ROOT = Path(__file__).resolve().parent.parent


def load_run(folder: str) -> tuple[GPT, tiktoken.Encoding]:
    """Return the trained model of a run, in evaluation mode on the CPU, and its encoding."""
    gpt, _, about = open_run(Path(folder), model_file)
    return gpt, load_encoding(about["data"]["encoding"])


@torch.no_grad()  # so that what is computed from weights, as by pruning, can be copied
def open_run(folder: Path, code: ModuleType) -> tuple[GPT, dict, dict]:
    """Return the model as `code`, a model.py, builds it, and what is in ckpt.pt and config.json. Raises
    UserError where one is missing, or the code of the FFN is not what it was."""
    checkpoint = train.load_checkpoint(str(folder / "ckpt.pt"))
    flags, weights = checkpoint["flags"], checkpoint["model"]
    try:
        about = json.loads((folder / "config.json").read_text("utf-8"))
        ffn_code, commit = about["ffn_code"], about["git_commit"]
    except (OSError, ValueError, KeyError) as e:
        raise UserError(f"{folder}/config.json does not say what made the run: {reason(e)}") from None
    if code.ffn_code(flags["ffn"]) != ffn_code:
        cure = f"bring it back, from git (commit {commit}) or a copy of the run's own model.py"
        raise UserError(f"the code of {flags['ffn']} is not what it was when {folder} was made: {cure}")
    options = {k: v for k, v in flags.items() if hasattr(code.GPTConfig, k)}
    gpt = code.GPT(code.GPTConfig(**options, vocab_size=len(weights["model.embed_tokens.weight"])))
    gpt.load_state_dict(weights)
    length = max(1, flags["max_iters"], flags["lr_decay_iters"])
    gpt.set_progress(min(checkpoint["step"], length - 1), length)  # as for the run's last evaluation
    return gpt.eval(), checkpoint, about


def config_and_code(gpt: GPT, code: Path | None, folder: Path) -> dict:
    """Return the config.json of a Qwen3ForCausalLM; its other values are Qwen3's defaults. Given a
    model.py, copy our code to folder, with imports made relative, and return what opens that."""
    c = gpt.config
    config = {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "vocab_size": c.vocab_size,  # rows of the embedding; the tokenizer's ids may end below
        "hidden_size": c.n_embd,
        "intermediate_size": c.hidden,
        "num_hidden_layers": c.n_layer,
        "num_attention_heads": c.n_head,
        "num_key_value_heads": c.n_kv_head,
        "head_dim": c.n_embd // c.n_head,  # Qwen3's default is 128
        "max_position_embeddings": c.block_size,
        "rope_theta": 1e6,  # transformers 4
        "rope_parameters": {"rope_theta": 1e6, "rope_type": "default"},  # transformers 5
        "tie_word_embeddings": c.tie_embeddings,
    }
    if code is None:
        return config
    # A name for each version of the code, because transformers may load a name only once.
    version = hashlib.sha256(code.read_bytes()).hexdigest()[:8]
    names = {name: f"{name}_{version}" for name in ("model", "configurator")}
    for path in (code, ROOT / "configurator.py", ROOT / "experiments" / "modeling_ffn.py"):
        text = path.read_text("utf-8")
        for other in re.findall(r"(?m)^ *(?:from|import) (\w+)", text):
            if ((ROOT / f"{other}.py").exists() or (ROOT / other).is_dir()) and other not in names:
                raise UserError(f"{path} imports {other}.py, which is not exported: copy it in")
        text = re.sub(r"(?m)^from (model|configurator)\b", lambda m: f"from .{names[m[1]]}", text)
        (folder / f"{names.get(path.stem, path.stem)}.py").write_text(text, "utf-8")
    gpt.generate(torch.zeros(1, 1, dtype=torch.long), 1)  # learns whether an FFN reads earlier tokens
    name, use_cache = "FFNForCausalLM", not gpt.mixes_tokens
    auto = {"AutoConfig": "modeling_ffn.FFNConfig", "AutoModelForCausalLM": f"modeling_ffn.{name}"}
    ours = {"architectures": [name], "model_type": "ffn", "auto_map": auto, "use_cache": use_cache}
    return config | ours | {"gpt": asdict(c)}


def save_tokenizer(encoding: tiktoken.Encoding, size: int, folder: Path) -> None:
    """Write an encoding as a tokenizer of transformers, for texts of at most `size` tokens."""
    from transformers import GPT2TokenizerFast
    from transformers.convert_slow_tokenizer import TikTokenConverter
    ranks, file = encoding._mergeable_ranks.items(), folder / "ranks.txt"
    file.write_bytes(b"".join(b64encode(token) + f" {rank}\n".encode() for token, rank in ranks))
    # The pattern of "bytes" takes any characters, in a syntax that tokenizers does not know.
    pattern = r"[\s\S]" if encoding.name == "bytes" else encoding._pat_str
    special = encoding._special_tokens
    bpe = TikTokenConverter(str(file), pattern=pattern, extra_special_tokens=special).converted()
    file.unlink()
    names = ("bos_token", "eos_token", "unk_token", "pad_token")
    how = dict.fromkeys(names, encoding.decode([encoding.eot_token]))
    GPT2TokenizerFast(tokenizer_object=bpe, model_max_length=size, **how).save_pretrained(folder)


def card(gpt: GPT, checkpoint: dict, about: dict, source: Path, own_code: bool) -> str:
    """Return a model card in the hub's format."""
    flags, step, data, n = checkpoint["flags"], checkpoint["step"], about["data"], gpt.param_counts()
    ffn, T, ranks = flags["ffn"], flags["block_size"], about["world"]
    log = [row for row in train.read_log(str(source / "log.jsonl")) if "val_loss" in row]
    log = [row for row in log if row["step"] <= step]  # a run that was killed is ahead of its checkpoint
    loss = "{val_loss:.4f} nats per token at step {step}".format(**log[-1]) if log else "unknown"
    given = [f"--{k}={v}" for k, v in flags.items() if v != getattr(train.Config, k)]
    launch = "python" if ranks == 1 else f"torchrun --nproc_per_node={ranks}"
    trust = ", trust_remote_code=True" if own_code else ""
    return f"""\
---
library_name: transformers
pipeline_tag: text-generation
tags: [feed-forward, {ffn.partition(":")[0]}]
---
# A language model with the FFN {ffn}

| | |
| --- | --- |
| FFN | `{ffn}`, hidden width {gpt.config.hidden} |
| parameters | {n["total"]:,}, of them {n["layers"]:,} in the matrices of the layers |
| data | {data["source"] or "unknown"}, encoding {data["encoding"]}, {data["train_tokens"]:,} tokens |
| training | {step} of {flags["max_iters"]} steps, {step * flags["batch_size"] * T:,} tokens |
| validation loss | {loss} |
| commit | {about["git_commit"]} |

    {launch} train.py {shlex.join(given)}

`AutoModelForCausalLM.from_pretrained(DIR{trust})` opens it. (trust_remote_code runs the Python files
of a folder: read them before.) A text has at most {T} tokens; documents began with `<|endoftext|>`.
"""


@torch.no_grad()
def difference(gpt: GPT, folder: Path, dtype: torch.dtype = torch.float64) -> float:
    """Open an export with transformers and return how far its logits are from ours, as a share of the
    largest. In float64, because a rounding error can decide which units a sparse FFN keeps."""
    from transformers import AutoModelForCausalLM
    how = {"trust_remote_code": True, "ignore_mismatched_sizes": True}
    theirs = AutoModelForCausalLM.from_pretrained(folder, **how).to(dtype)
    # Any tokens, and as many as the check at a run's start: an FFN may differ late in a text or rarely.
    tokens = np.random.default_rng(0).integers(0, gpt.config.vocab_size, min(512, gpt.config.block_size))
    ours, off, tokens = copy.deepcopy(gpt).to(dtype), 0, torch.from_numpy(tokens)
    for scale in (1, 8, 8):  # Near zero GEGLU, whose weights have the same names, is close to SwiGLU.
        for p in (p for x in [*ours.model.layers, *theirs.model.layers] for p in x.mlp.parameters()):
            p.mul_(scale)
        try:
            a, b = ours(tokens[None])[0], theirs(tokens[None]).logits
        except RuntimeError:  # an FFN that computes in float32 only
            return difference(gpt, folder, torch.float32) if dtype == torch.float64 else float("nan")
        off += float((a - b).abs().max() / a.abs().max())
    return off


def export(source: Path, target: Path) -> str:
    """Write the model of the run in the folder source to the new folder target. Return what was done."""
    from safetensors.torch import save
    if not (source / "model.py").exists():
        raise UserError(f"no {source}/model.py: an export needs the code that made the run")
    sys.path.insert(0, str(source))
    del sys.modules["model"]
    gpt, checkpoint, about = open_run(source, importlib.import_module("model"))
    try:
        encoding = load_encoding(about["data"]["encoding"])
        ids = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), encoding.eot_token)
        padding = range(encoding.n_vocab, gpt.config.vocab_size)  # rows that are no token's
        ids["suppress_tokens"], note = list(padding), f"tokenizer: {encoding.name}"
        if encoding.eot_token != encoding.n_vocab - 1:  # p50k_base
            encoding, note = None, f"no tokenizer: transformers would number {encoding.name} otherwise"
    except UserError as e:
        encoding, ids, note = None, {}, f"no tokenizer and no token that ends a text: {e}"
    with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
        for own_code in (False, True):  # as Qwen3, if that computes the same
            folder = Path(scratch, "with_code" if own_code else "qwen3")
            folder.mkdir()
            config = config_and_code(gpt, source / "model.py" if own_code else None, folder)
            # Our code finds the tables of positions in the file too.
            state = gpt.state_dict() | (dict(gpt.named_buffers()) if own_code else {})
            if gpt.config.tie_embeddings:
                del state["lm_head.weight"]  # transformers ties it again
            state = {name: x.clone(memory_format=torch.contiguous_format) for name, x in state.items()}
            (folder / "model.safetensors").write_bytes(save(state, metadata={"format": "pt"}))
            (folder / "config.json").write_text(json.dumps(config, indent=2))
            ids["use_cache"] = config.get("use_cache", True)
            (folder / "generation_config.json").write_text(json.dumps(ids, indent=2))
            if (off := difference(gpt, folder)) < 1e-5:
                break
        else:
            raise UserError(f"{source} cannot be exported: transformers' logits are off by {off:.1e}")
        if encoding:
            save_tokenizer(encoding, gpt.config.block_size, folder)
        (folder / "README.md").write_text(card(gpt, checkpoint, about, source, own_code), "utf-8")
        folder.replace(target)  # now that it is whole
    how = "with its code: trust_remote_code=True" if own_code else "as Qwen3"
    return f"{target}: step {checkpoint['step']} of {source}, {how}\n{note}"


def main() -> None:
    if {"--help", "-h"} & set(sys.argv):
        sys.exit(print(__doc__.strip()))
    if len(sys.argv) != 3 or sys.argv[1].startswith("-"):
        raise UserError("usage: python experiments/export_hf.py out/RUN DIR")
    target = Path(sys.argv[2]).absolute()
    if target.is_file() or (target.is_dir() and any(target.iterdir())):
        raise UserError(f"{target} is there already: name a new folder")
    sys.dont_write_bytecode = True  # beside the run's model.py
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        import transformers
        transformers.logging.set_verbosity_error()
        transformers.logging.disable_progress_bar()
        print(export(Path(sys.argv[1]), target))
    except ImportError as e:
        raise UserError(f"{e.name} is missing: pip install -r requirements-dev.txt") from None
    except OSError as e:
        raise UserError(f"cannot write {target} ({reason(e)}): name another folder") from None


if __name__ == "__main__":
    run(main)
