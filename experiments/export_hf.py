"""
A trained model for Hugging Face: weights, config, tokenizer, model card and, where it is needed, code.

    python experiments/export_hf.py out/RUN DIR
    AutoModelForCausalLM.from_pretrained(DIR)                          # SwiGLU, as transformers' Qwen3
    AutoModelForCausalLM.from_pretrained(DIR, trust_remote_code=True)  # any other FFN

An FFN that Qwen3 does not have takes along modeling_ffn.py and the model.py that train.py has kept in
out/RUN; trust_remote_code lets transformers run them. DIR appears once transformers has opened it and
has computed the same logits. For a script or notebook there is `load_run`.
"""

from __future__ import annotations

import copy
import hashlib
import importlib.util
import json
import os
import re
import shlex
import shutil
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import model as model_file
import train
from configurator import UserError, reason, run
from model import GPT
from prepare_fineweb import load_encoding

# Of each encoding the end-of-text id and the number of ids; the embedding has more rows.
IDS = {"bytes": (256, 257), "gpt2": (50256, 50257)}


def load_run(folder: str) -> tuple[GPT, object]:
    """Return the trained model of a run's folder, on the CPU and in evaluation mode, and its tiktoken
    encoding. Raises UserError where it cannot be loaded or the code of its FFN has changed since."""
    gpt, _, about = open_run(folder, model_file)
    return gpt, load_encoding(about["encoding"])


def open_run(folder: str, code: ModuleType) -> tuple[GPT, dict, dict]:
    """Return the model as `code`, a model.py, builds it, and what is in ckpt.pt and config.json."""
    checkpoint = train.load_checkpoint(os.path.join(folder, "ckpt.pt"))
    flags, weights, path = checkpoint["flags"], checkpoint["model"], Path(folder, "config.json")
    try:
        about = json.loads(path.read_text("utf-8"))
        made_by, _ = about["ffn_code"], about["encoding"]
    except (OSError, ValueError, KeyError) as e:
        raise UserError(f"{path} does not say what made the run ({reason(e)}): train it anew") from None
    if code.ffn_code(flags["ffn"]) != made_by:
        raise UserError(
            f"the code of {flags['ffn']} is not what it was when {folder} was made: bring it back, from "
            f"git (commit {about.get('git_commit', 'unknown')}) or a copy of the run's own model.py"
        )
    options = {k: v for k, v in flags.items() if hasattr(code.GPTConfig, k)}
    try:
        gpt = code.GPT(code.GPTConfig(**options, vocab_size=len(weights["model.embed_tokens.weight"])))
        gpt.load_state_dict(weights)
    except (RuntimeError, KeyError) as e:
        raise UserError(f"{folder}: weights and code do not fit: {' '.join(str(e).split())[:300]}") from None
    return gpt.eval(), checkpoint, about


def load_code(path: Path) -> ModuleType:
    """Run the model.py that a run has kept, as this process's module `model`."""
    spec = importlib.util.spec_from_file_location("model", path)
    code = sys.modules["model"] = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(code)
    except FileNotFoundError:
        raise UserError(f"no {path}: the code that made the run is gone, and it is needed") from None
    except Exception as e:
        raise UserError(f"{path} does not run: {reason(e)}") from e
    return code


def qwen3_config(gpt: GPT, eot: int | None) -> dict:
    """Return the config.json of a Qwen3ForCausalLM. Its other values are Qwen3's defaults."""
    c = gpt.config
    return {
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
        "bos_token_id": eot,  # every document starts with the end-of-text token
        "eos_token_id": eot,
        "dtype": "float32",
    }


def add_code(config: dict, gpt: GPT, code: Path, folder: Path) -> dict:
    """Copy our code to folder, its imports made relative, and return config with what opens it."""
    # A name for each version of the code, because transformers may load a name only once.
    version = hashlib.sha256(code.read_bytes()).hexdigest()[:8]
    names = {name: f"{name}_{version}" for name in ("model", "configurator")}
    sources = {"model": code, "configurator": ROOT / "configurator.py"}
    for name, source in {**sources, "modeling_ffn": ROOT / "experiments/modeling_ffn.py"}.items():
        text = source.read_text("utf-8")
        for other in re.findall(r"^ *(?:from|import) (\w+)", text, re.M):
            if (ROOT / f"{other}.py").exists() and other not in names:
                raise UserError(f"{source} imports {other}.py, which is not exported: copy it in")
        text = re.sub(r"^from (model|configurator)\b", lambda m: f"from .{names[m[1]]}", text, flags=re.M)
        (folder / f"{names.get(name, name)}.py").write_text(text, "utf-8")
    gpt.generate(torch.zeros(1, 1, dtype=torch.long), 1)  # learns whether an FFN reads earlier tokens
    auto = {"AutoConfig": "FFNConfig", "AutoModelForCausalLM": "FFNForCausalLM"}
    config |= {"architectures": ["FFNForCausalLM"], "model_type": "ffn", "use_cache": not gpt.mixes_tokens}
    return config | {"gpt": asdict(gpt.config), "auto_map": {k: f"modeling_ffn.{auto[k]}" for k in auto}}


def save_weights(gpt: GPT, buffers: bool, folder: Path) -> None:
    """Write model.safetensors: the state dict and, with `buffers`, the buffers that it leaves out."""
    from safetensors.torch import save_file

    state = gpt.state_dict() | (dict(gpt.named_buffers()) if buffers else {})
    if gpt.config.tie_embeddings:
        del state["lm_head.weight"]  # transformers ties it again
    odd = [name for name, value in state.items() if not isinstance(value, Tensor)]
    if odd:
        raise UserError(f"{odd[0]} is not a tensor and cannot be exported: keep it in a buffer")
    # Each tensor in memory of its own, as safetensors wants it.
    state = {name: x.clone(memory_format=torch.contiguous_format) for name, x in state.items()}
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    shutil.copymode(folder / "config.json", folder / "model.safetensors")  # was 0600


def save_tokenizer(encoding: str, block_size: int, folder: Path) -> str:
    """Put the encoding's tokenizer into folder if it can be had. Return what was done."""
    from tiktoken.load import read_file_cached
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import GPT2TokenizerFast

    end = "<|endoftext|>"
    if encoding == "bytes":
        # GPT-2 writes a printable byte as itself, and the n-th of the others as chr(256 + n).
        letters = sorted(pre_tokenizers.ByteLevel.alphabet())
        printable = [ord(c) for c in letters if ord(c) < 256]
        others = [byte for byte in range(256) if byte not in printable]
        vocab, merges = dict(zip([*letters, end], [*printable, *others, 256])), []
    elif encoding == "gpt2":
        # tiktoken makes "gpt2" from these two files.
        url = "https://openaipublic.blob.core.windows.net/gpt-2/encodings/main/"
        try:
            vocab = json.loads(read_file_cached(url + "encoder.json"))
            merges = read_file_cached(url + "vocab.bpe").decode().splitlines()[1:]
        except (OSError, ValueError) as e:
            cure = "set TIKTOKEN_CACHE_DIR to a folder that has them, or use openai-community/gpt2's"
            return f"no tokenizer: GPT-2's files are not at hand ({type(e).__name__}): {cure}"
    else:
        return f"no tokenizer: the {encoding} encoding has none in Hugging Face's format"
    bpe = Tokenizer(models.BPE(vocab, [tuple(line.split()) for line in merges if line]))
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    special = dict.fromkeys(("bos_token", "eos_token", "unk_token"), end)
    GPT2TokenizerFast(tokenizer_object=bpe, model_max_length=block_size, **special).save_pretrained(folder)
    return f"tokenizer: {encoding}"


def card(gpt: GPT, checkpoint: dict, about: dict, log: list[dict], own_code: bool) -> str:
    """Return a model card in the hub's format."""
    flags, data, n = checkpoint["flags"], about["data"], gpt.param_counts()
    step, (ffn, T) = checkpoint["step"], (flags["ffn"], flags["block_size"])
    losses = [f"{row['val_loss']:.4f} nats per token at step {row['step']}" for row in log]
    defaults, world = asdict(train.Config()), about["world"]
    launch = ["python"] if world == 1 else ["torchrun", f"--nproc_per_node={world}"]
    given = [f"--{k}={v}" for k, v in flags.items() if v != defaults[k]]
    trust = "with `trust_remote_code=True`, which runs the Python files of this folder: read them before"
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
| data | {data["source"] or "unknown source"}, encoding {data["encoding"]}, {data["train_tokens"]:,} tokens |
| training | {step:,} of {flags["max_iters"]:,} steps, {step * flags["batch_size"] * T:,} tokens |
| validation loss | {losses[-1] if losses else "unknown"} |
| commit | {about["git_commit"]} |

    {shlex.join([*launch, "train.py", *given])}

`AutoModelForCausalLM.from_pretrained` opens this folder{", " + trust if own_code else ""}. Texts have at
most {T} tokens. In training each document began with `<|endoftext|>`.
"""


@torch.no_grad()
def difference(gpt: GPT, folder: Path) -> str:
    """Open an export with transformers and return how its logits differ from ours, "" if they do not.
    In float64, because a rounding error can decide which units a sparse FFN keeps."""
    from transformers import AutoModelForCausalLM

    tokens = torch.randint(gpt.config.vocab_size, (2, min(64, gpt.config.block_size)))
    try:
        theirs = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).double()
        gpt = copy.deepcopy(gpt).double()
        for scale in (1, 8):  # Near zero GEGLU, whose weights have the same names, is close to SwiGLU.
            for layer in [*gpt.model.layers, *theirs.model.layers]:
                for p in layer.mlp.parameters():
                    p.mul_(scale)
            ours = gpt(tokens)[0]
            off = float((theirs(tokens).logits - ours).abs().max() / ours.abs().max())
            if not off < 1e-5:
                return f"its logits are off by {off:.1e} of the largest"
    except Exception as e:
        return f"transformers cannot open it: {reason(e)}"
    return ""


def export(source: Path, target: Path) -> str:
    """Write the model of the run in the folder source to the new folder target. Return what was done."""
    code = source / "model.py"
    gpt, checkpoint, about = open_run(str(source), load_code(code))
    eot, n_vocab = IDS.get(about["encoding"], (None, gpt.config.vocab_size))
    log = [row for row in train.read_log(str(source / "log.jsonl")) if "val_loss" in row]
    shapes = [{name: w.shape for name, w in layer.mlp.state_dict().items()} for layer in gpt.model.layers]
    swiglu = model_file.SwiGLU(gpt.config.n_embd, gpt.config.hidden).state_dict()
    as_qwen3 = all(found == {name: w.shape for name, w in swiglu.items()} for found in shapes)
    # The folder gets its name when it is whole.
    with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
        for own_code in (False, True) if as_qwen3 else (True,):
            folder = Path(scratch, f"own_code_{own_code}")
            folder.mkdir()
            config = qwen3_config(gpt, eot)
            config = add_code(config, gpt, code, folder) if own_code else config
            ids = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), eot)
            ids["suppress_tokens"] = list(range(n_vocab, gpt.config.vocab_size))
            ids["use_cache"] = config.get("use_cache", True)
            (folder / "config.json").write_text(json.dumps(config, indent=2))
            (folder / "generation_config.json").write_text(json.dumps(ids, indent=2))
            save_weights(gpt, own_code, folder)
            wrong = difference(gpt, folder)
            if not wrong:
                break
        else:
            raise UserError(f"{source} cannot be exported: {wrong}")
        (folder / "README.md").write_text(card(gpt, checkpoint, about, log, own_code), "utf-8")
        note = save_tokenizer(about["encoding"], gpt.config.block_size, folder)
        os.replace(folder, target)
    how = "with its own code, for trust_remote_code=True" if own_code else "as Qwen3"
    return f"{target}: step {checkpoint['step']} of {source}, {how}\n{note}"


def main() -> None:
    if {"--help", "-h"} & set(sys.argv):
        sys.exit(print(__doc__.strip()))
    if len(sys.argv) != 3 or sys.argv[1].startswith("-"):
        raise UserError("usage: python experiments/export_hf.py out/RUN DIR")
    target = Path(os.path.abspath(sys.argv[2]))
    if target.is_file() or (target.is_dir() and any(target.iterdir())):
        raise UserError(f"{target} is there already: name a new folder")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        import safetensors  # noqa: F401
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
