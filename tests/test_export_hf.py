"""
experiments/export_hf.py: what it writes is opened by transformers in a process that knows nothing of this
project, and computes what model.py computes.
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
BOTH = ["README.md", "config.json", "generation_config.json", "model.safetensors"]


def python(cwd: Path, *argv: str, **env: str) -> str:
    """Run Python in a new process without network, and return what it prints."""
    env = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(cwd / "no_hub")} | env
    done = subprocess.run([sys.executable, *argv], cwd=cwd, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


# Make a run of each FFN, and of some models that are not in model.py, with weights that no layer starts
# from; export each; keep our logits and our greedy text.
MAKE = '''
import json, sys
from dataclasses import asdict
from pathlib import Path
import torch
sys.path.insert(0, sys.argv[1])
import export_hf, train

TINY = {"n_layer": 2, "n_head": 4, "n_kv_head": 2, "n_embd": 32, "block_size": 32, "ffn_hidden": 64}
usual = Path(export_hf.model_file.__file__).read_text()
DATA = {"source": "test", "encoding": "bytes", "train_tokens": 1000}

def make(name, source=usual, **flags):
    run, flags = Path("runs", name), asdict(train.Config(**TINY | flags))
    run.mkdir(parents=True)
    (run / "model.py").write_text(source)
    code = export_hf.load_code(run / "model.py")
    fields = {k: v for k, v in flags.items() if hasattr(code.GPTConfig, k)}
    gpt, seed = code.GPT(code.GPTConfig(**fields, vocab_size=384)).eval(), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in gpt.parameters():
            p += 0.1 * torch.randn(p.shape, generator=seed)
    state = {"model": gpt.state_dict(), "optimizers": [], "step": 8, "flags": flags, "shards": {}}
    torch.save(state, run / "ckpt.pt")
    about = {"ffn_code": code.ffn_code(flags["ffn"]), "encoding": "bytes", "data": DATA}
    about |= {"world": 1, "git_commit": "abc", "flags": flags}
    (run / "config.json").write_text(json.dumps(about))
    said = export_hf.export(run, Path("hf", name))
    tokens = torch.randint(0, 257, (2, 20), generator=seed)
    with torch.no_grad():
        logits, text = gpt(tokens)[0], gpt.generate(tokens[:1], 12, temperature=0, n_vocab=257)
    torch.save({"tokens": tokens, "logits": logits, "text": text}, Path("hf", name, "ours.pt"))
    return said

Path("hf").mkdir()
for i, ffn in enumerate(export_hf.model_file.FFNS):
    said = make(f"{ffn}-{i % 2}", ffn=ffn, tie_embeddings=i % 2 == 0)
    assert ("as Qwen3" in said) == (ffn == "swiglu"), said

OWN = """
class Own(SwiGLU):
    def __init__(self, d: int, h: int):
        super().__init__(d, h)
        self.register_buffer("weights", torch.tensor([0.5, 0.25]), persistent=False)
        self.register_buffer("shift", torch.tensor([1]))
        self.half = torch.tensor(0.5)  # what a class keeps of tensors must be real numbers too
    def forward(self, x: Tensor) -> Tensor:
        earlier = F.pad(x, (0, 0, int(self.shift), 0))[:, :-1]
        return super().forward(self.weights[0] * x + self.weights[1] * earlier) * self.half
FFNS["own"] = Own
"""
make("own class that reads the token before", usual + OWN, ffn="own")
edited = usual.replace("F.silu(self.gate_proj(x))", "F.silu(1.01 * self.gate_proj(x))")
assert edited != usual
assert "own code" in make("edited swiglu", edited, ffn="swiglu")
assert "as Qwen3" in make("asg that is swiglu", ffn="asg:sparse=False", ffn_match="params", ffn_hidden=60)
'''

# Open them all in one process, as a stranger's would.
OPEN = '''
import json, sys, warnings
from pathlib import Path
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline, logging

assert not any(name in sys.modules for name in ("model", "train", "configurator"))
logging.disable_progress_bar()
everything = {}
for folder in sorted(Path("hf").iterdir()):
    ours = torch.load(folder / "ours.pt")
    load = lambda folder, **how: AutoModelForCausalLM.from_pretrained(
        folder, trust_remote_code=(folder / "modeling_ffn.py").exists(), output_loading_info=True, **how
    )
    model, info = load(folder)
    found = {"class": type(model).__name__, "problems": sum(map(len, info.values()))}
    found["tied"] = model.lm_head.weight is model.model.embed_tokens.weight
    model.save_pretrained(f"again/{folder.name}")
    again, _ = load(Path("again", folder.name))
    tokens, right = ours["tokens"], torch.ones(2, 20)
    right[1, 10:] = 0  # padding after a text
    with torch.no_grad():
        for name, out in {
            "logits": model(tokens).logits,
            "again": again(tokens).logits,
        }.items():
            found[name] = float((out - ours["logits"]).abs().max())
        padded = model(tokens, attention_mask=right).logits - ours["logits"]
        found["padded"] = float(padded[right.bool()].abs().max())
        found["last"] = float((model(tokens, logits_to_keep=1).logits - ours["logits"][:, -1:]).abs().max())
        labels = tokens.clone()
        labels[:, :5] = -100
        loss = torch.nn.functional.cross_entropy(ours["logits"][:, 4:-1].flatten(0, 1), tokens[:, 5:].flatten())
        found["loss"] = float((model(tokens, labels=labels).loss - loss).abs())
        half, _ = load(folder, dtype=torch.bfloat16)
        found["bfloat16"] = float((half(tokens).logits.float() - ours["logits"]).abs().mean())
    found["spread"] = float(ours["logits"].std())
    end = [*ours["text"][0].tolist()[20:], 256].index(256) + 20
    for use_cache in (None, True, False):
        how = {} if use_cache is None else {"use_cache": use_cache}
        try:
            text = model.generate(tokens[:1], max_new_tokens=12, do_sample=False, **how)[0].tolist()
        except ValueError as e:
            found[f"cache {use_cache}"] = str(e)
        else:
            found[f"cache {use_cache}"] = text[:end] == ours["text"][0].tolist()[:end]
    if folder.name.startswith("relu2"):
        bad = {"long": (torch.zeros(1, 33, dtype=torch.long), None), "left": (tokens, right.flip(1))}
        for name, (ids, mask) in bad.items():
            try:
                model(ids, attention_mask=mask)
            except ValueError as e:
                found[name] = str(e)
        # several tokens after a cache, and a beam search, which reorders it
        first = model(tokens[:, :8], use_cache=True)
        kept = first["cache" if "cache" in first else "past_key_values"]
        name = "cache" if "cache" in first else "past_key_values"
        second = model(tokens[:, 8:], **{name: kept}).logits
        found["continued"] = float((second - ours["logits"][:, 8:]).abs().max())
        beams = [model.generate(tokens[:1], max_new_tokens=6, num_beams=3, do_sample=False, use_cache=c) for c in (True, False)]
        found["beams"] = bool((beams[0] == beams[1]).all())
        tokenizer = AutoTokenizer.from_pretrained(folder)
        found["ids"] = tokenizer.encode("naïve <|endoftext|>\\n\\0")
        write = pipeline("text-generation", model=model, tokenizer=tokenizer)
        found["pipeline"] = write("Once", max_new_tokens=5, do_sample=False)[0]["generated_text"]
        expected = model.generate(torch.tensor([list(b"Once")]), max_new_tokens=5, do_sample=False)
        found["expected"] = tokenizer.decode(expected[0], skip_special_tokens=True)
    everything[folder.name] = found
Path("found.json").write_text(json.dumps(everything))
'''


@pytest.fixture(scope="module")
def opened(tmp_path_factory) -> dict[str, dict]:
    """What a stranger's process finds in an export of each FFN, by name of the model."""
    cwd = tmp_path_factory.mktemp("exports")
    (cwd / "make.py").write_text(MAKE)
    (cwd / "open.py").write_text(OPEN)
    python(cwd, "make.py", str(ROOT / "experiments"))
    (cwd / "runs").rename(cwd / "moved")
    python(cwd, "-I", "open.py")
    return json.loads((cwd / "found.json").read_text())


def test_every_ffn_opens_with_our_logits(opened):
    """Each row of FFNS, tied and untied in turn, with grouped-query attention, as it is and saved once
    more; a class of the reader's own, and a SwiGLU that was edited and so is not Qwen3's."""
    from model import FFNS

    names = {f"{ffn}-{i % 2}" for i, ffn in enumerate(FFNS)}
    own = {"own class that reads the token before", "edited swiglu"}
    assert opened.keys() == names | own | {"asg that is swiglu"}
    for name, found in opened.items():
        is_qwen3 = name.startswith(("swiglu", "asg that"))
        assert found["class"] == ("Qwen3ForCausalLM" if is_qwen3 else "FFNForCausalLM"), name
        assert found["problems"] == 0, name
        assert found["tied"] == (not name.endswith("-1")), name
        assert found["spread"] > 0.5  # or anything would be near
        for what in ("logits", "padded", "again", "last", "loss"):
            assert found[what] <= 1e-5, (name, what, found)
        assert found["bfloat16"] < 0.1 * found["spread"], (name, found)


def test_generate_gives_our_greedy_text(opened):
    """With a cache and without; one that an FFN cannot use is refused, and not used by default."""
    for name, found in opened.items():
        assert found["cache None"] is found["cache False"] is True, (name, found)
        if name.startswith("own class"):
            assert "use_cache=False" in found["cache True"]
        else:
            assert found["cache True"] is True, (name, found)


def test_the_wrapper_refuses_or_computes(opened):
    """A text longer than the model's, padding before a text; several tokens after a cache; beams; the
    pipeline, with the tokenizer that went along."""
    found = next(found for name, found in opened.items() if name.startswith("relu2"))
    assert "33 tokens" in found["long"]
    assert "padding" in found["left"]
    assert found["continued"] <= 1e-5
    assert found["beams"]
    assert found["ids"] == [*"naïve ".encode(), 256, 10, 0]
    assert found["pipeline"] == found["expected"]
    assert found["pipeline"].startswith("Once")
