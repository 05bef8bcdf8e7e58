"""
A trained SwiGLU model for Hugging Face: config.json, model.safetensors, and GPT-2's tokenizer.

    python experiments/export_hf.py out/RUN DIR
    AutoModelForCausalLM.from_pretrained(DIR)      # transformers >= 4.51, the same logits
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import train
from configurator import UserError, run
from model import ASG, SwiGLU, parse_spec

HUB_NAME = "openai-community/gpt2"


def check_ffn(spec: str) -> None:
    """Refuse an FFN that transformers' Qwen3 does not compute. The names of the weights are no
    guide: GEGLU's would load, and give other logits."""
    cls, options = parse_spec(spec)
    if cls is not SwiGLU and not (cls is ASG and options.get("sparse") is False):
        raise UserError(
            f"--ffn={spec} cannot be exported: the FFN of transformers' Qwen3 is SwiGLU and computes "
            "something else; use model.py's GPT to run this checkpoint"
        )


def find_encoding(data_dir: str, vocab_size: int) -> tuple[str, int] | None:
    """(encoding, end-of-text id) of the shards, by their meta.json; of shards that are gone or came
    without one, by the vocabulary's size, which has been rounded up to a multiple of 128."""
    try:
        with open(os.path.join(data_dir, "meta.json"), encoding="utf-8") as f:
            meta = json.load(f)
        return str(meta["encoding"]), int(meta["eot"])
    except (OSError, ValueError, KeyError, TypeError):
        return {384: ("bytes", 256), 50304: ("gpt2", 50256)}.get(vocab_size)


def hf_config(flags: dict, state: dict, eot: int | None) -> dict:
    """config.json of a Qwen3ForCausalLM. state: the weights, by name."""
    vocab_size, d = state["model.embed_tokens.weight"].shape
    return {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "vocab_size": vocab_size,  # rows of the embedding; the tokenizer's ids may end below
        "hidden_size": d,
        "intermediate_size": len(state["model.layers.0.mlp.gate_proj.weight"]),
        "num_hidden_layers": flags["n_layer"],
        "num_attention_heads": flags["n_head"],
        "num_key_value_heads": flags["n_kv_head"],
        "head_dim": d // flags["n_head"],  # Qwen3's default is 128
        "max_position_embeddings": flags["block_size"],
        "rope_theta": 1e6,  # transformers 4
        "rope_parameters": {"rope_theta": 1e6, "rope_type": "default"},  # transformers 5
        "rms_norm_eps": 1e-6,
        "hidden_act": "silu",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "tie_word_embeddings": flags["tie_embeddings"],
        "use_sliding_window": False,
        "bos_token_id": eot,  # every document starts with the end-of-text token
        "eos_token_id": eot,
        "dtype": "float32",
        "torch_dtype": "float32",
    }


def save_tokenizer(encoding: str, eot: int, block_size: int, folder: str) -> str:
    """Put tokenizer files into folder where there are any at hand. Returns what was done."""
    if encoding != "gpt2":
        return f"no tokenizer: the {encoding} encoding has none in Hugging Face's format"
    try:
        from tiktoken.load import read_file_cached
        from transformers import AutoTokenizer, GPT2TokenizerFast
    except ImportError as e:
        return f"no tokenizer: {e.name} is missing (pip install -r requirements-dev.txt)"
    try:
        tokenizer, source = AutoTokenizer.from_pretrained(HUB_NAME, local_files_only=True), "hub"
    except (OSError, ValueError):
        # tiktoken's own sources of "gpt2" are the two files from which it was first made
        from tokenizers import Tokenizer, decoders, models, pre_tokenizers

        url = "https://openaipublic.blob.core.windows.net/gpt-2/encodings/main/"
        try:
            vocab = json.loads(read_file_cached(url + "encoder.json"))
            merges = read_file_cached(url + "vocab.bpe").decode().splitlines()[1:]
        except (OSError, ValueError) as e:
            return (
                f"no tokenizer: GPT-2's files are not at hand ({type(e).__name__}): set "
                f"TIKTOKEN_CACHE_DIR to a folder that has them, or use {HUB_NAME}'s"
            )
        bpe = Tokenizer(models.BPE(vocab, [tuple(line.split()) for line in merges if line]))
        bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        bpe.decoder = decoders.ByteLevel()
        end = "<|endoftext|>"
        tokenizer = GPT2TokenizerFast(
            tokenizer_object=bpe, bos_token=end, eos_token=end, unk_token=end
        )
        source = "tiktoken's cache"
    tokenizer.model_max_length = block_size
    if tokenizer.eos_token_id != eot:
        return f"no tokenizer: GPT-2's in {source} ends texts with {tokenizer.eos_token_id}, not {eot}"
    tokenizer.save_pretrained(folder)
    return f"tokenizer: GPT-2's, from {source}"


def main() -> None:
    if len(sys.argv) != 3 or sys.argv[1].startswith("-"):
        if {"--help", "-h"} & set(sys.argv):
            sys.exit(print(__doc__.strip()))
        raise UserError("usage: python experiments/export_hf.py out/RUN DIR")
    source, target = sys.argv[1], os.path.normpath(sys.argv[2])
    try:
        from safetensors.torch import save_file
    except ImportError:
        raise UserError("safetensors is missing: pip install safetensors") from None
    path = os.path.join(source, "ckpt.pt")
    if not os.path.exists(path):
        raise UserError(f"no checkpoint {path}: name the folder of a run that has saved")
    checkpoint = train.load_checkpoint(path)
    flags, state = checkpoint["flags"], checkpoint["model"]
    check_ffn(flags["ffn"])
    if os.path.isfile(target) or (os.path.isdir(target) and os.listdir(target)):
        raise UserError(f"{target} is there already: name a new folder")
    if flags["tie_embeddings"]:
        del state["lm_head.weight"]  # Qwen3 ties it again; safetensors refuses shared memory
    state = {name: value.contiguous() for name, value in state.items()}
    found = find_encoding(flags["data_dir"], len(state["model.embed_tokens.weight"]))
    try:
        os.makedirs(os.path.dirname(os.path.abspath(target)), exist_ok=True)
        # beside the target, and renamed when whole
        with tempfile.TemporaryDirectory(dir=os.path.dirname(os.path.abspath(target))) as scratch:
            folder = os.path.join(scratch, "export")
            os.mkdir(folder)
            with open(os.path.join(folder, "config.json"), "w", encoding="utf-8") as f:
                json.dump(hf_config(flags, state, found and found[1]), f, indent=2)
            weights = os.path.join(folder, "model.safetensors")
            save_file(state, weights, metadata={"format": "pt"})
            shutil.copymode(os.path.join(folder, "config.json"), weights)  # was 0600
            note = "no tokenizer: the data's encoding is not known any more"
            if found:
                note = save_tokenizer(*found, flags["block_size"], folder)
            os.replace(folder, target)
    except OSError as e:
        raise UserError(f"cannot write {target} ({e.strerror}): name another folder") from None
    print(f"{target}: step {checkpoint['step']} of {source} for AutoModelForCausalLM")
    print(note)


if __name__ == "__main__":
    run(main)
