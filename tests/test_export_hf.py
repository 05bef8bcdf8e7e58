"""
experiments/export_hf.py: what it writes is loaded by transformers alone, and gives model.py's logits.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from test_compare import call
from trainer import ROOT, make_data, one_line, train

SCRIPT = str(ROOT / "experiments" / "export_hf.py")
CACHE = ROOT.parent / "shared" / "tiktoken_cache"


def export(cwd: Path, *argv: str, **env: str) -> subprocess.CompletedProcess:
    env = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(cwd / "no_hub")} | env
    command = [sys.executable, SCRIPT, *argv]
    return subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, timeout=200)


def our_logits(run_dir: Path, tokens: torch.Tensor) -> torch.Tensor:
    """By model.py, from the checkpoint."""
    from model import GPT, GPTConfig

    checkpoint = torch.load(run_dir / "ckpt.pt", weights_only=True)
    flags = {k: v for k, v in checkpoint["flags"].items() if hasattr(GPTConfig, k)}
    vocab_size = len(checkpoint["model"]["model.embed_tokens.weight"])
    model = GPT(GPTConfig(**flags, vocab_size=vocab_size))
    model.load_state_dict(checkpoint["model"])
    with torch.no_grad():
        return model(tokens)[0]


CASES = {
    "tied": {"n_head": 2, "n_kv_head": 2},
    "untied, grouped-query": {"n_head": 4, "n_kv_head": 2, "tie_embeddings": False},
    # computes SwiGLU under another name; here also of another width than ffn_hidden
    "asg:sparse=False": {"ffn": "asg:sparse=False", "ffn_hidden": 60, "ffn_match": "params"},
}


@pytest.mark.parametrize("case", CASES)
def test_logits_equal_transformers(tmp_path, case):
    """AutoModelForCausalLM.from_pretrained(DIR) computes what model.py computes, after training has
    moved norms and scales from where both start."""
    from transformers import AutoModelForCausalLM

    make_data(tmp_path / "data")
    train(tmp_path, data_dir="data", out_dir="run", max_iters=8, learning_rate=3e-2, **CASES[case])
    done = export(tmp_path, "run", "hf/model")
    assert done.returncode == 0, done.stderr
    assert "step 8" in done.stdout
    assert "no tokenizer" in done.stdout
    assert "bytes" in done.stdout
    folder = tmp_path / "hf" / "model"
    assert sorted(os.listdir(folder.parent)) == ["model"]
    assert sorted(os.listdir(folder)) == ["config.json", "model.safetensors"]

    model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(info[k] for k in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    assert type(model).__name__ == "Qwen3ForCausalLM"
    assert all(p.dtype == torch.float32 for p in model.parameters())
    tokens = torch.randint(0, 257, (2, 32), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        theirs = model.eval()(tokens).logits
    ours = our_logits(tmp_path / "run", tokens)
    assert ours.std() > 0.1  # or anything would be near
    torch.testing.assert_close(theirs, ours, rtol=0, atol=1e-4)

    tied = CASES[case].get("tie_embeddings", True)
    same = model.lm_head.weight.data_ptr() == model.model.embed_tokens.weight.data_ptr()
    assert same == tied
    assert model.generation_config.eos_token_id == model.config.eos_token_id == 256
    assert model.config.max_position_embeddings == 32


def test_refusals_leave_nothing(tmp_path):
    """Another FFN, no run, a folder in use, a file in the way: one line, exit 1, nothing written.
    GEGLU is the trap: its weights have SwiGLU's names and would load."""
    make_data(tmp_path / "data")
    for name, ffn in (("run", "geglu"), ("good", "swiglu")):
        train(tmp_path, data_dir="data", out_dir=name, max_iters=1, ffn=ffn)
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "precious").write_text("mine")
    (tmp_path / "file").write_text("mine")
    before = sorted(p for p in tmp_path.rglob("*"))
    for argv, needles in [
        (["run", "new"], ["geglu", "SwiGLU"]),
        (["nowhere", "new"], ["nowhere", "no checkpoint"]),
        (["good", "used"], ["used", "new folder"]),
        (["good", "file"], ["file", "new folder"]),
        (["good", "file/below"], ["cannot write"]),
        (["good"], ["usage"]),
    ]:
        code, _, err = call(tmp_path, *argv, script=SCRIPT)
        one_line(code, err, *needles)
        assert sorted(p for p in tmp_path.rglob("*")) == before, argv


def test_gpt2_tokenizer_goes_along(tmp_path):
    """With the gpt2 encoding: AutoTokenizer.from_pretrained(DIR) gives tiktoken's ids and its text
    back, and the end-of-text id of the model's config."""
    if not CACHE.is_dir():
        pytest.skip("needs GPT-2's tokenizer: ../shared/tiktoken_cache is not there")
    os.environ["TIKTOKEN_CACHE_DIR"] = str(CACHE)
    import tiktoken
    from transformers import AutoTokenizer

    make_data(tmp_path / "data", encoding="gpt2", vocab_size=50257, eot=50256)
    train(tmp_path, data_dir="data", out_dir="run", max_iters=1, n_embd=16, n_layer=1)
    done = export(tmp_path, "run", "hf", TIKTOKEN_CACHE_DIR=str(CACHE))
    assert done.returncode == 0, done.stderr
    assert "tokenizer: GPT-2's" in done.stdout
    ours, theirs = tiktoken.get_encoding("gpt2"), AutoTokenizer.from_pretrained(tmp_path / "hf")
    text = "Hello, world!  It's 12345 — naïve 日本語 🙂\n\n\tdef f(x):\n    return x  # don't"
    assert theirs.encode(text) == ours.encode(text)
    assert theirs.decode(ours.encode(text)) == text
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert theirs.eos_token_id == config["eos_token_id"] == 50256
    assert theirs.encode("a<|endoftext|>b") == [64, 50256, 65]
    assert config["vocab_size"] == 50304

    # no cache and no network: the model is exported, and a line says what lacks
    closed = {"TIKTOKEN_CACHE_DIR": str(tmp_path / "empty"), "https_proxy": "http://127.0.0.1:9"}
    done = export(tmp_path, "run", "hf2", **closed)
    assert done.returncode == 0, done.stderr
    assert "no tokenizer" in done.stdout
    assert sorted(os.listdir(tmp_path / "hf2")) == ["config.json", "model.safetensors"]
