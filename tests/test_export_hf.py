"""
experiments/export_hf.py: what it writes is opened by transformers, in a process that knows nothing of
this project, and computes what model.py computes.
"""

from __future__ import annotations

import copy
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pytest
import tiktoken
import torch
from torch.nn.utils import prune
from trainer import ROOT, make_data, one_line, train

from configurator import UserError

CACHE = ROOT.parent / "shared" / "tiktoken_cache"
if CACHE.is_dir():
    os.environ["TIKTOKEN_CACHE_DIR"] = str(CACHE)


def python(cwd: Path, *argv: str) -> str:
    """Run Python in a new process without network, which must go well. Return what it prints."""
    env = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(cwd / "no_hub")}
    command = [sys.executable, *argv]
    done = subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


# Make a run of each FFN, and of some models that are not in model.py, with weights that no layer starts
# from; export each; keep our logits and our greedy text.
MAKE = '''
import functools, importlib.util, json, sys
from dataclasses import asdict
from pathlib import Path
import torch
sys.path.insert(0, sys.argv[1])
import export_hf, train

TINY = {"n_layer": 2, "n_head": 4, "n_kv_head": 2, "n_embd": 32, "block_size": 32, "ffn_hidden": 64}
usual = Path(export_hf.model_file.__file__).read_text()
DATA = {"source": "test", "encoding": "bytes", "train_tokens": 1000}

@functools.cache
def module_of(source):
    path = Path("code", f"{len(source)}.py")
    path.parent.mkdir(exist_ok=True)
    path.write_text(source)
    spec = importlib.util.spec_from_file_location("model", path)
    code = sys.modules["model"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(code)
    return code

def make(name, source=usual, **flags):
    run, flags = Path("runs", name), asdict(train.Config(**TINY | flags))
    run.mkdir(parents=True)
    (run / "model.py").write_text(source)
    code = sys.modules["model"] = module_of(source)
    fields = {k: v for k, v in flags.items() if hasattr(code.GPTConfig, k)}
    gpt = code.GPT(code.GPTConfig(**fields, vocab_size=384)).eval()
    seed = torch.Generator().manual_seed(0)
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
for ffn in export_hf.model_file.FFNS:
    for tied in (True, False) if ffn in ("swiglu", "moe") else (True,):
        said = make(f"{ffn}-{'tied' if tied else 'untied'}", ffn=ffn, tie_embeddings=tied)
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
        scale = F.linear(x.float(), self.up_proj.weight[:1])  # not in float64
        return super().forward(self.weights[0] * x + self.weights[1] * earlier) * self.half * scale
FFNS["own"] = Own
"""
make("own class that reads the token before", usual + OWN, ffn="own")
edited = usual.replace("F.silu(self.gate_proj(x))", "F.silu(1.01 * self.gate_proj(x))")
assert edited != usual
assert "trust_remote_code" in make("edited swiglu", edited, ffn="swiglu")
same = {"ffn": "asg:sparse=False", "ffn_match": "params", "ffn_hidden": 60}
assert "as Qwen3" in make("asg that is swiglu", **same)

NEARLY = """
class FarBack(SwiGLU):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x + F.pad(x, (0, 0, 100, 0))[:, : x.size(1)])
class Clamped(SwiGLU):
    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj((F.silu(self.gate_proj(x)) * self.up_proj(x)).clamp(-99, 99))
FFNS |= {"far_back": FarBack, "clamped": Clamped}
"""
for ffn in ("far_back", "clamped"):
    assert "trust_remote_code" in make(f"nearly swiglu, {ffn}", usual + NEARLY, ffn=ffn, block_size=160)

import tiktoken
ranks = {bytes([i]): i for i in range(256)} | {b"ab": 257}
eot = {"<|endoftext|>": 256}  # below an ordinary token, as in p50k_base
inside = tiktoken.Encoding("inside", pat_str=r"\\w+|.", mergeable_ranks=ranks, special_tokens=eot)
export_hf.load_encoding = lambda name: inside
assert "transformers would number inside otherwise" in make("eot inside", ffn="gelu")
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
    tokens, mask = ours["tokens"], torch.ones(2, 20)
    mask[1, 10:] = 0  # padding after a text
    with torch.no_grad():
        for name, out in {
            "logits": model(tokens).logits,
            "again": again(tokens).logits,
        }.items():
            found[name] = float((out - ours["logits"]).abs().max())
        for kind in (mask, mask.long(), mask.bool()):
            padded = model(tokens, attention_mask=kind).logits - ours["logits"]
            found[f"padded, {kind.dtype}"] = float(padded[mask.bool()].abs().max())
        how = {"logits_to_keep": 1, "position_ids": torch.arange(20)[None]}
        last = model(tokens, **how).logits - ours["logits"][:, -1:]
        found["last"] = float(last.abs().max())
        labels = tokens.clone()
        labels[:, :5] = -100
        right, target = ours["logits"][:, 4:-1].flatten(0, 1), tokens[:, 5:].flatten()
        loss = torch.nn.functional.cross_entropy(right, target)
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
        bad = {"long": (torch.zeros(1, 33, dtype=torch.long), None), "left": (tokens, mask.flip(1))}
        blocks = torch.block_diag(torch.ones(10, 10), torch.ones(10, 10))[None, None]  # two texts in one
        bad["packed"] = tokens, torch.zeros(1, 1, 20, 20).masked_fill(blocks.tril() == 0, -torch.inf)
        bad["flattened"] = tokens, None  # as DataCollatorWithFlattening marks several texts
        for name, (ids, padding) in bad.items():
            positions = torch.arange(10).repeat(2)[None] if name == "flattened" else None
            try:
                model(ids, attention_mask=padding, position_ids=positions)
            except ValueError as e:
                found[name] = str(e)
        # several tokens after a cache, and a beam search, which reorders it
        first = model(tokens[:, :8], use_cache=True)
        kept = first["cache" if "cache" in first else "past_key_values"]
        name = "cache" if "cache" in first else "past_key_values"
        second = model(tokens[:, 8:], **{name: kept}).logits
        found["continued"] = float((second - ours["logits"][:, 8:]).abs().max())
        how = {"max_new_tokens": 6, "num_beams": 3, "do_sample": False}
        beams = [model.generate(tokens[:1], use_cache=c, **how) for c in (True, False)]
        found["beams"] = bool((beams[0] == beams[1]).all())
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
        found["ids"] = tokenizer.encode("naïve <|endoftext|>\\n\\0")
        write = pipeline("text-generation", model=model, tokenizer=tokenizer)
        found["pipeline"] = write("Once", max_new_tokens=5, do_sample=False)[0]["generated_text"]
        expected = model.generate(torch.tensor([list(b"Once")]), max_new_tokens=5, do_sample=False)
        found["expected"] = tokenizer.decode(expected[0], skip_special_tokens=True)
    everything[folder.name] = found
Path("found.json").write_text(json.dumps(everything))
'''


def test_every_ffn_opens_and_computes_what_ours_does(tmp_path):
    """Each row of FFNS, two of them untied too, with grouped-query attention, as it is and saved once
    more; a class of the reader's own, and a SwiGLU that was edited and so is not Qwen3's. One test of
    all, because starting transformers takes longer than most of them."""
    from model import FFNS

    (tmp_path / "make.py").write_text(MAKE)
    (tmp_path / "open.py").write_text(OPEN)
    python(tmp_path, "make.py", str(ROOT / "experiments"))
    (tmp_path / "runs").rename(tmp_path / "moved")
    python(tmp_path, "-I", "open.py")
    opened = json.loads((tmp_path / "found.json").read_text())
    names = {"swiglu-untied", "moe-untied"} | {f"{ffn}-tied" for ffn in FFNS}
    own = {"own class that reads the token before", "edited swiglu"}
    own |= {"nearly swiglu, far_back", "nearly swiglu, clamped", "eot inside"}
    assert opened.keys() == names | own | {"asg that is swiglu"}
    for name, found in opened.items():
        is_qwen3 = name.startswith(("swiglu", "asg that"))
        assert found["class"] == ("Qwen3ForCausalLM" if is_qwen3 else "FFNForCausalLM"), name
        assert found["problems"] == 0, name
        assert found["tied"] == (not name.endswith("-untied")), name
        assert found["spread"] > 0.5  # or anything would be near
        padded = [what for what in found if what.startswith("padded")]
        assert len(padded) == 3
        for what in ("logits", *padded, "again", "last", "loss"):
            assert found[what] <= 1e-5, (name, what, found)
        assert found["bfloat16"] < 0.1 * found["spread"], (name, found)
        # Our greedy text, with a cache and without. One that an FFN cannot use is refused, and not used
        # by default.
        assert found["cache None"] is found["cache False"] is True, (name, found)
        if name.startswith("own class") or "far_back" in name:
            assert "use_cache=False" in found["cache True"]
        else:
            assert found["cache True"] is True, (name, found)

    # A text longer than the model's, padding before a text, several texts in a row; several tokens after
    # a cache; beams; the pipeline, with the tokenizer that went along.
    (found,) = (found for name, found in opened.items() if name.startswith("relu2"))
    assert "33 tokens" in found["long"]
    assert "padding" in found["left"]
    assert "padding" in found["packed"]
    assert "share a row" in found["flattened"]
    assert found["continued"] <= 1e-5
    assert found["beams"]
    assert found["ids"] == [*"naïve ".encode(), 256, 10, 0]
    assert found["pipeline"] == found["expected"]
    assert found["pipeline"].startswith("Once")


def test_the_command_of_a_card_starts_as_many_ranks(tmp_path, monkeypatch):
    """As the run had: torchrun's, if several."""
    monkeypatch.syspath_prepend(str(ROOT / "experiments"))
    import export_hf
    from model import GPT, GPTConfig
    from train import Config

    gpt = GPT(GPTConfig(8, 384, 1, 2, 2, 16, ffn_hidden=16))
    data = {"source": "", "encoding": "bytes", "train_tokens": 9}
    saved = {"flags": asdict(Config(max_iters=5)), "step": 5}
    for world, launch in ((1, "python train.py"), (8, "torchrun --nproc_per_node=8 train.py")):
        about = {"data": data, "world": world, "git_commit": "abc"}
        assert f"    {launch} --max_iters=5\n" in export_hf.card(gpt, saved, about, tmp_path, False)


def test_a_loaded_model_is_told_of_its_progress(tmp_path, monkeypatch):
    """As for the last evaluation: an FFN may keep it in a Python number, which no checkpoint has."""
    monkeypatch.syspath_prepend(str(ROOT / "experiments"))
    import export_hf

    import model
    import train as train_py

    class Mine(model.SwiGLU):
        def set_progress(self, step: int, max_iters: int) -> None:
            self.told = step, max_iters

    monkeypatch.setitem(model.FFNS, "mine", Mine)
    shape = {"n_layer": 1, "n_head": 2, "n_kv_head": 2, "n_embd": 16, "block_size": 8, "ffn_hidden": 16}
    gpt = model.GPT(model.GPTConfig(**shape, vocab_size=384, ffn="mine"))
    about = {"ffn_code": model.ffn_code("mine"), "git_commit": "abc"}
    (tmp_path / "config.json").write_text(json.dumps(about))
    for step, told in ((3, (3, 5)), (5, (4, 5))):
        flags = asdict(train_py.Config(**shape, ffn="mine", max_iters=5, lr_decay_iters=4))
        saved = {"model": gpt.state_dict(), "optimizers": [], "step": step, "flags": flags, "shards": {}}
        torch.save(saved, tmp_path / "ckpt.pt")
        assert export_hf.open_run(tmp_path, model)[0].model.layers[0].mlp.told == told


def test_weights_that_are_computed_from_others_can_be_copied(tmp_path, monkeypatch):
    """By pruning, say: the export compares a copy of the model with what it wrote."""
    monkeypatch.syspath_prepend(str(ROOT / "experiments"))
    import export_hf

    import model
    import train as train_py

    class Mine(model.SwiGLU):
        def __init__(self, d: int, h: int) -> None:
            super().__init__(d, h)
            prune.l1_unstructured(self.up_proj, "weight", 0.5)

    monkeypatch.setitem(model.FFNS, "mine", Mine)
    shape = {"n_layer": 1, "n_head": 2, "n_kv_head": 2, "n_embd": 16, "block_size": 8, "ffn_hidden": 16}
    gpt = model.GPT(model.GPTConfig(**shape, vocab_size=384, ffn="mine"))
    about = {"ffn_code": model.ffn_code("mine"), "git_commit": "abc"}
    (tmp_path / "config.json").write_text(json.dumps(about))
    flags = asdict(train_py.Config(**shape, ffn="mine"))
    saved = {"model": gpt.state_dict(), "optimizers": [], "step": 1, "flags": flags, "shards": {}}
    torch.save(saved, tmp_path / "ckpt.pt")
    copy.deepcopy(export_hf.open_run(tmp_path, model)[0])


# Each command line of export_hf.py in a process of its own, forked from one that has imported the rest.
CALLS = """
import json, os, sys
from safetensors import torch
from transformers import AutoModelForCausalLM, GPT2TokenizerFast, Qwen3ForCausalLM
sys.path.insert(0, sys.argv[1])
import export_hf
for i, (argv, env) in enumerate(json.loads(sys.argv[2])):
    if not os.fork():
        for number, name in ((1, "stdout"), (2, "stderr")):
            os.dup2(os.open(f"{i}.{name}", os.O_WRONLY | os.O_CREAT), number)
        os.environ.update(env)
        sys.argv = ["export_hf.py", *argv]
        sys.exit(export_hf.run(export_hf.main))
    print(os.waitstatus_to_exitcode(os.wait()[1]), flush=True)
"""


def calls(cwd: Path, *commands: list[str], **env: str) -> list[tuple[int, str, str]]:
    """The exit code, stdout and stderr of each command line, run in cwd."""
    argv = json.dumps([(command, env if command[-1] == "offline" else {}) for command in commands])
    codes = python(cwd, "-c", CALLS, str(ROOT / "experiments"), argv).split()
    assert len(codes) == len(commands)
    return [
        (int(code), *((cwd / f"{i}.{name}").read_text() for name in ("stdout", "stderr")))
        for i, code in enumerate(codes)
    ]


DSG = {"ffn": "dsg", "ffn_hidden": 60, "ffn_match": "params", "n_head": 4, "tie_embeddings": False}
REFUSED = [
    (["nowhere", "new"], ["nowhere"]),
    (["bare", "new"], ["no bare/model.py"]),
    (["older", "new"], ["older/config.json", "ffn_code"]),
    (["changed", "new"], ["the code of dsg", "commit"]),
    (["a run", "used"], ["used", "new folder"]),
    (["a run", "file"], ["file", "new folder"]),
    (["a run", "file/below"], ["cannot write"]),
    (["a run"], ["usage"]),
]


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> tuple[Path, list[tuple[int, str, str]]]:
    """Real runs of train.py, exported; and what cannot be exported."""
    cwd = tmp_path_factory.mktemp("trained")
    make_data(cwd / "data")
    train(cwd, data_dir="data", out_dir="a run", max_iters=8, learning_rate=3e-2, **DSG)
    make_data(cwd / "words", encoding="gpt2", vocab_size=50257, eot=50256)
    small = {"n_embd": 16, "n_layer": 1, "learning_rate": 3e-2}
    train(cwd, data_dir="words", out_dir="gpt2", max_iters=8, **small)
    for name in ("bare", "older", "changed"):
        shutil.copytree(cwd / "a run", cwd / name)
    with open(cwd / "a run" / "log.jsonl", "a") as f:  # of a run that was killed before it saved again
        f.write('{"step": 9, "tokens": 1, "val_loss": 0.5}\n')
    (cwd / "bare" / "model.py").unlink()
    (cwd / "older" / "config.json").write_text("{}")
    # A helper of the class: its own text is as it was.
    source = (ROOT / "model.py").read_text()
    changed = source.replace("torch.sigmoid(s * norm(", "torch.sigmoid(2 * s * norm(")
    assert changed != source
    (cwd / "changed" / "model.py").write_text(changed)
    (cwd / "used").mkdir()
    (cwd / "used" / "precious").write_text("mine")
    (cwd / "file").write_text("mine")
    before = {path.relative_to(cwd) for path in cwd.rglob("*")}
    commands = [["a run", "hf/dsg"], ["gpt2", "hf/gpt2"], ["gpt2", "offline"]]
    closed = {"TIKTOKEN_CACHE_DIR": str(cwd / "empty"), "https_proxy": "http://127.0.0.1:9"}
    done = calls(cwd, *commands, *(argv for argv, _ in REFUSED), **closed)
    (cwd / "before").write_text("\n".join(sorted(map(str, before))))
    return cwd, done


def test_a_trained_run_and_its_card(trained):
    """What train.py has left can be exported: norms that training has moved, another width by ffn_match,
    the log. The card says what the run was and by which command."""
    from huggingface_hub import ModelCard

    cwd, done = trained
    assert done[0][0] == 0, done[0][2]
    assert "step 8" in done[0][1]
    folder, run = cwd / "hf" / "dsg", cwd / "a run"
    code = sorted(path.name.partition("_")[0] for path in folder.glob("*.py"))
    assert code == ["configurator", "model", "modeling"]
    card = ModelCard.load(folder / "README.md")
    assert card.data.library_name == "transformers"
    assert card.data.pipeline_tag == "text-generation"
    log = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    loss = next(row["val_loss"] for row in reversed(log) if "val_loss" in row and row["step"] == 8)
    about = json.loads((run / "config.json").read_text())
    n_tokens = about["data"]["train_tokens"]
    needles = ["`dsg`", "8 of 8 steps", "1,024 tokens", f"{loss:.4f} nats", about["git_commit"]]
    needles += [f"test, encoding bytes, {n_tokens:,} tokens", "trust_remote_code=True"]
    for needle in needles:
        assert needle in card.text, needle
    command = next(line.strip() for line in card.text.splitlines() if "train.py" in line)
    assert command.startswith("python train.py '--out_dir=a run'")
    assert set(shlex.split(command)[2:]) >= {f"--{name}={about['flags'][name]}" for name in DSG}


def test_a_run_in_a_script(trained):
    """load_run gives logits, the same as the export's, and text. Where the FFN's code is not the run's,
    one line says so."""
    from experiments.export_hf import load_run
    from transformers import AutoModelForCausalLM

    cwd, _ = trained
    ours, encoding = load_run(f"{cwd}/a run")
    text = ours.generate(torch.tensor([[encoding.eot_token]]), 20, temperature=0)
    written = encoding.decode(text[0].tolist())
    assert written.startswith("<|endoftext|>")
    assert len(written) > 20
    theirs = AutoModelForCausalLM.from_pretrained(cwd / "hf" / "dsg", trust_remote_code=True)
    tokens = torch.tensor([[256, *b"Once"]])
    with torch.no_grad():
        logits = ours(tokens)[0]
        assert logits.std() > 0.1  # or anything would be near
        torch.testing.assert_close(theirs(tokens).logits, logits, rtol=0, atol=1e-5)
    about = json.loads((cwd / "changed" / "config.json").read_text())
    (cwd / "changed" / "config.json").write_text(json.dumps(about | {"ffn_code": "0" * 16}))
    with pytest.raises(UserError, match="the code of dsg is not what it was"):
        load_run(f"{cwd}/changed")


def test_swiglu_is_qwen3_with_gpt2s_tokenizer(trained):
    """AutoModelForCausalLM needs no code of ours, and AutoTokenizer gives tiktoken's ids and its text
    back."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    if not CACHE.is_dir():
        pytest.skip("needs GPT-2's tokenizer: ../shared/tiktoken_cache is not there")
    cwd, done = trained
    assert done[1][0] == 0, done[1][2]
    assert "tokenizer: gpt2" in done[1][1]
    folder = cwd / "hf" / "gpt2"
    model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert type(model).__name__ == "Qwen3ForCausalLM"
    assert not any(info.values()), info
    assert not list(folder.glob("*.py"))
    assert model.config.vocab_size == 50304
    assert model.config.max_position_embeddings == 32
    ours, theirs = tiktoken.get_encoding("gpt2"), AutoTokenizer.from_pretrained(folder)
    text = "Hello, world!  It's 12345 — naïve 日本語 🙂\n\n\tdef f(x):\n    return x  # don't"
    assert theirs.encode(text) == ours.encode(text)
    assert theirs.decode(ours.encode(text)) == text
    assert theirs.eos_token_id == model.generation_config.eos_token_id == 50256
    assert theirs.encode("a<|endoftext|>b") == [64, 50256, 65]


def test_refusals_leave_nothing(trained):
    """No run, code that is gone or changed, a folder in use, a file in the way: one line, exit code 1,
    nothing written. Without a tokenizer the model is exported, and a line says what lacks."""
    cwd, done = trained
    assert done[2][0] == 0, done[2][2]
    assert "no tokenizer" in done[2][1]
    files = ["README.md", "config.json", "generation_config.json", "model.safetensors"]
    assert sorted(os.listdir(cwd / "offline")) == files
    for (argv, needles), (code, _, err) in zip(REFUSED, done[3:], strict=True):
        assert one_line(code, err, *needles), argv
    before = set((cwd / "before").read_text().splitlines())
    after = {str(path.relative_to(cwd)) for path in cwd.rglob("*")}
    mine = re.compile(r"hf|offline|no_hub|before$|\d+\.std|task|tiny|scores")
    assert {name for name in after - before if not mine.match(name)} == set()
    assert before <= after


TASK = """
task: tiny
dataset_path: json
dataset_kwargs: {data_files: {test: tiny.jsonl}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: "{{choices}}"
doc_to_target: label
metric_list: [{metric: acc}]
"""


def test_lm_evaluation_harness(trained):
    """The accuracy on a small task is what our logits give. requirements-dev.txt leaves lm-eval out,
    because it and accelerate take more than a minute to install."""
    pytest.importorskip("lm_eval")
    pytest.importorskip("accelerate")
    from transformers import AutoModelForCausalLM

    cwd, folder = trained[0], trained[0] / "hf" / "dsg"
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    choices, rows, right = [" one", " twice"], [], 0
    for i in range(8):
        question, scores = f"{i} times", []
        for choice in choices:
            ids = torch.tensor([[*(question + choice).encode()]])
            with torch.no_grad():
                log_p = model(ids).logits[0, :-1].log_softmax(-1)
            scores.append(log_p.gather(-1, ids[0, 1:, None])[-len(choice) :].sum())
        best = int(scores[1] > scores[0])
        label = best if i % 4 else 1 - best  # so that six of eight are right
        right += label == best
        rows.append({"question": question, "choices": choices, "label": label})
    (cwd / "task").mkdir()
    (cwd / "task" / "tiny.yaml").write_text(TASK)
    (cwd / "tiny.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    command = ["-m", "lm_eval", "--model=hf", "--tasks=tiny", "--include_path=task", "--device=cpu"]
    options = f"--model_args=pretrained={folder},trust_remote_code=True"
    python(cwd, *command, options, "--batch_size=4", "--output_path=scores")
    [path] = (cwd / "scores").rglob("results*.json")
    assert json.loads(path.read_text())["results"]["tiny"]["acc,none"] == right / 8 == 0.75
