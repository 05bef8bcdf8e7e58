"""train.py from outside: what it reads, computes, writes, continues and refuses."""

from __future__ import annotations

import copy
import dataclasses
import glob
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path
from textwrap import dedent
from typing import ClassVar

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from trainer import (
    BATCH,
    BLOCK,
    ROOT,
    SIZES,
    TINY,
    TORCHRUN,
    TRAIN,
    Run,
    assert_same_run,
    flags,
    load,
    losses,
    make_data,
    one_line,
    refused,
    rows,
    same_bits,
    start,
    start_ranks,
    tokens,
    train,
    train_ranks,
)

sys.path.insert(0, str(ROOT))

import model as model_file
import prepare_fineweb
import train as train_py
from model import FFNS, GPT, GPTConfig, make_ffn

SHARED = ROOT.parent / "shared"


def build(checkpoint: dict) -> GPT:
    """The model of a checkpoint, through model.py alone."""
    saved, names = checkpoint["flags"], {f.name for f in dataclasses.fields(GPTConfig)}
    shape = {name: saved[name] for name in names if name in saved}
    model = GPT(GPTConfig(**shape, vocab_size=384))
    model.load_state_dict(checkpoint["model"], strict=True)
    return model


def tiny(**more: object) -> GPT:
    """The model of a run with the flags TINY."""
    shape = {k: v for k, v in TINY.items() if hasattr(GPTConfig, k)}
    return GPT(GPTConfig(vocab_size=384, **shape | more))


def mean_loss(model: GPT, windows: np.ndarray) -> float:
    """In nats per token of windows (n, BLOCK + 1), by logits and float64."""
    with torch.no_grad():
        batch = torch.from_numpy(np.asarray(windows))
        logits = model(batch[:, :-1])[0].double()
        return float(F.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten()))


def program_with(code: str) -> str:
    """A train.py that knows one more FFN, `mine`: the class Mine of this code."""
    code = f"import runpy, sys\nsys.path.insert(0, {str(ROOT)!r})\nimport torch, model\n{dedent(code)}\n"
    return code + f"model.FFNS['mine'] = Mine\nrunpy.run_path({TRAIN!r}, run_name='__main__')"


MINE = "runpy.run_path('mine.py', run_name='__main__')"


def train_with(cwd: Path, code: str, *argv: str) -> Run:
    """A run to its end, good or bad, of a train.py with the class Mine of this code."""
    (cwd / "mine.py").write_text(program_with(code))
    return Run(cwd, list(argv), code=MINE).wait()


# ---- data ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("counts", [[7], [3, 0, 11, 1], [1, 1, 1], [40, 25]])
@pytest.mark.parametrize("data_seed", [0, 5])
def test_each_window_once_per_epoch(counts: list[int], data_seed: int):
    """An epoch is a permutation of the shards, then of the windows within each."""
    total, counts = sum(counts), np.array(counts)
    seen = train_py.locate(counts, np.arange(3 * total), data_seed)
    every = {(s, w) for s, n in enumerate(counts) for w in range(n)}
    epochs = [seen[e * total : (e + 1) * total] for e in range(3)]
    for epoch in epochs:
        assert len(epoch) == total
        assert set(epoch) == every
        order = [s for i, (s, _) in enumerate(epoch) if i == 0 or epoch[i - 1][0] != s]
        assert len(order) == len(set(order)), "a shard was left and entered again"
    if total > 10:
        assert epochs[0] != epochs[1] != epochs[2] != epochs[0]
        assert seen != train_py.locate(counts, np.arange(3 * total), data_seed + 1)
        within = [w for s, w in epochs[0] if s == 0]
        assert within != sorted(within)


def test_batches_do_not_depend_on_how_they_are_asked_for():
    """Sample g is the same whoever asks for it, alone or in a slice, in whatever order."""
    counts = np.array([13, 4, 0, 21])
    whole = train_py.locate(counts, np.arange(120), 3)
    pieces = [train_py.locate(counts, np.array([g]), 3)[0] for g in reversed(range(120))]
    assert whole == pieces[::-1]
    assert whole[30:50] == train_py.locate(counts, np.arange(30, 50), 3)


def test_order_is_the_same_on_every_version():
    """Written out, as a run that is resumed after an upgrade must see the batches it began with."""
    places = train_py.locate(np.array([4, 0, 3]), np.arange(14), 0)
    assert places == ORDER


ORDER = [
    (0, 0), (0, 2), (0, 1), (0, 3), (2, 0), (2, 2), (2, 1),
    (2, 0), (2, 2), (2, 1), (0, 3), (0, 0), (0, 1), (0, 2),
]  # fmt: skip


@pytest.mark.parametrize("ranks, micro", [(1, 4), (2, 1)])
def test_losses_are_those_of_the_batches_in_the_design(here: Path, ranks: int, micro: int):
    """With a learning rate of 0 every step shows the loss of the initial weights on its batch: step
    s is samples 4s .. 4s+3 and window i is tokens [iB, iB + B], here across an epoch's end."""
    values = {"learning_rate": 0, "min_lr": 0, "max_iters": 32, "eval_interval": 99}
    train_ranks(here, ranks, out_dir="o", micro_batch_size=micro, data_seed=2, **values)
    model = build(load(here / "o"))
    names = sorted(name for name in SIZES if "train" in name)
    stream = [tokens(SIZES[name], list(SIZES).index(name)) for name in names]
    counts = np.array([(SIZES[name] - 1) // BLOCK for name in names])
    assert counts.tolist() == [93, 0, 21, 1]
    assert counts.sum() < 32 * BATCH
    for step, loss in losses(here / "o").items():
        places = train_py.locate(counts, np.arange((step - 1) * BATCH, step * BATCH), 2)
        batch = np.stack([stream[s][w * BLOCK : w * BLOCK + BLOCK + 1] for s, w in places])
        assert loss == pytest.approx(mean_loss(model, batch), abs=2e-6)


@pytest.mark.parametrize(
    "val_tokens, windows, ranks, micro", [(29 * BLOCK + 5, 29, 1, 4), (10**7, 37, 2, 2)]
)
def test_validation_loss(here: Path, val_tokens: int, windows: int, ranks: int, micro: int):
    """The mean over the first val_tokens // B windows, across two shards, with a padded last batch,
    whatever the layout; and so again by --eval_only, which leaves the run's files alone."""
    train_ranks(here, ranks, out_dir="o", micro_batch_size=micro, val_tokens=val_tokens, max_iters=3)
    model = build(load(here / "o"))
    names = [name for name in SIZES if "val" in name]
    stream = [tokens(SIZES[name], list(SIZES).index(name)) for name in names]
    every = [a[i : i + BLOCK + 1] for a in stream for i in range(0, len(a) - BLOCK, BLOCK)]
    assert len(every) == 37
    expected = mean_loss(model, np.stack(every[:windows]))
    assert losses(here / "o", "val_loss")[3] == pytest.approx(expected, abs=2e-6)

    if ranks == 1:
        before = {p.name: p.read_bytes() for p in (here / "o").iterdir()}
        # 3 sequences a pass do not divide the batch of 4, which matters to training only
        only = {"out_dir": "o", "val_tokens": val_tokens, "micro_batch_size": 3}
        run = train(here, "--eval_only", init_from="resume", **only, learning_rate=9, batch_size=1)
        assert f"{expected:.4f}" in run.out
        other = {"init_from": "resume", "out_dir": "o", "block_size": 16}  # which would be ignored
        refused(here, flags("--eval_only", **other), "--block_size=16", "the checkpoint has 32")
        assert "at step 0 (untrained)" in train(here, "--eval_only", out_dir="o").out
        assert {p.name: p.read_bytes() for p in (here / "o").iterdir()} == before


@pytest.mark.parametrize("ffn", ["dsg", "asg", "sparseglu"])
def test_two_ranks_train_as_one_process(here: Path, ffn: str):
    """Same losses over 20 steps and same validation loss, of an FFN with norms and scalars, with a
    frozen scalar and with a frozen module."""
    values = {"ffn": ffn, "n_layer": 1, "max_iters": 20, "eval_interval": 10, "learning_rate": 3e-3}
    one = start(here, out_dir="one", **values)
    two = start_ranks(here, 2, out_dir="two", micro_batch_size=1, **values)
    for run in (one, *two):
        run.works()
    for key in ("train_loss", "val_loss"):
        a, b = losses(here / "one", key), losses(here / "two", key)
        assert a.keys() == b.keys()
        assert len(a) == (20 if key == "train_loss" else 3)
        assert max(abs(a[step] - b[step]) for step in a) < 1e-5, (a, b)
    assert losses(here / "one")[20] < losses(here / "one")[1] - 0.1


def test_two_compiled_ranks_train_as_one_process(here: Path):
    """The README's main command, on CPUs: DDP around the compiled model, accumulation and evaluation
    included, has the losses of one plain process."""
    values = {"n_layer": 1, "max_iters": 6, "eval_interval": 3, "micro_batch_size": 1}
    train(here, out_dir="one", **values)
    command = [*TORCHRUN, TRAIN, *flags(out_dir="two", compile=True, **values)]
    two = subprocess.run(command, cwd=here, capture_output=True, text=True)
    assert two.returncode == 0, two.stderr
    assert "with compiling" in two.stdout
    for key in ("train_loss", "val_loss"):
        assert losses(here / "two", key) == pytest.approx(losses(here / "one", key), abs=1e-5)


ASSIGNS = """
    class Mine(model.SwiGLU):
        def __init__(self, d, h):
            super().__init__(d, h)
            self.register_buffer("theta", torch.tensor(0.0))
            self.register_buffer("turned", torch.ones(3, 2).t())
            self.register_buffer("expanded", torch.ones(1).expand(d), persistent=False)
            self.register_buffer("passes", torch.zeros(()))
            self.register_buffer("key", torch.tensor(2**40 + 1))
        def forward(self, x):
            if self.training:
                self.passes += 1
                self.theta = 0.5 * self.theta + x.detach().mean()
                self.turned.mul_(0.5).add_(x.detach().mean())
            return super().forward(x) + self.theta * self.expanded + self.turned.sum()
    import torch.distributed as dist
    real = dist.all_reduce
    def as_nccl(tensor, *more):
        assert tensor.is_contiguous()
        return real(tensor, *more)
    dist.all_reduce = as_nccl
"""


@pytest.mark.parametrize("ffn", ["moe", "mine"])
def test_ranks_share_what_an_ffn_remembers_of_its_tokens(here: Path, ffn: str):
    """Two ranks see different tokens. The validation loss that they log together is the one that a
    single process finds with the checkpoint of rank 0, and resumed ranks repeat the run to the bit. An
    FFN may change a buffer in place, or assign a new tensor. One that counts passes keeps a rank's
    number, and what is no float is left alone. NCCL takes contiguous tensors only."""
    (here / "mine.py").write_text(program_with(ASSIGNS))
    values = {"ffn": ffn, "micro_batch_size": 1, "max_iters": 12, "eval_interval": 4, "val_tokens": 960}
    values["code"] = MINE
    run = train_ranks(here, 2, out_dir="two", **values)
    assert json.loads((here / "two" / "config.json").read_text())["world"] == 2
    assert "step    2 ranks x 2 passes x 1 sequences x 32 tokens" in run.out
    alone = train(here, "--eval_only", init_from="resume", out_dir="two", code=values["code"])
    logged = losses(here / "two", "val_loss")[12]
    assert f"validation loss  {logged:.4f}" in alone.out
    kept = {name: b for name, b in load(here / "two")["model"].items() if ".mlp." in name}
    ends = ("bias", "theta", "turned")
    remembered = {name: b for name, b in kept.items() if name.endswith(ends)}
    assert remembered
    assert all(b.count_nonzero() for b in remembered.values())
    if ffn == "mine":  # two passes of a rank in each step
        assert (kept["model.layers.0.mlp.passes"], kept["model.layers.0.mlp.key"]) == (24, 2**40 + 1)
    for end in (5, 12):
        parts = {**values, "max_iters": end, "lr_decay_iters": 12, "init_from": "auto"}
        train_ranks(here, 2, out_dir="parts", **parts)
    assert_same_run(here / "two", here / "parts")
    assert losses(here / "parts", "val_loss").keys() == {0, 4, 5, 8, 12}


def test_mfu_is_that_of_all_devices(here):
    """With a peak that is made up: a CPU's is not known."""
    source = Path(TRAIN).read_text()
    none = '    if device.type != "cuda":\n        return None\n'
    assert source.count(none) == 1
    (here / "mine.py").write_text(source.replace(none, "    return 1e12\n"))
    values = {"out_dir": "o", "max_iters": 3, "dtype": "bfloat16", "micro_batch_size": 2}
    train_ranks(here, 2, code=MINE, **values)
    flops, row = tiny().flops_per_token(), rows(here / "o")[3]
    assert row["mfu"] == pytest.approx(flops * row["tok_per_s"] / (2 * 1e12))


# ---- resuming -----------------------------------------------------------------------------------

RESUMED = {
    "accumulated": {"micro_batch_size": 1, "ffn": "spark", "tie_embeddings": False, "grad_clip": 0},
    "in three parts": {"parts": (7, 20), "ffn": "asg", "dtype": "bfloat16"},
    "muon": {"optimizer": "muon", "ffn": "sparseglu:grad=ste", "schedule": "wsd"},
}


@pytest.mark.parametrize("case", RESUMED)
def test_resumed_run_has_the_same_bits(here: Path, case: str):
    """40 steps straight, 20 + 20 and 7 + 13 + 20: weights, optimizer state and losses; the flags that
    are not given come from the checkpoint, and evaluating and saving at other steps changes nothing."""
    values = {"lr_decay_iters": 40, "n_layer": 1, **RESUMED[case]}
    first, *parts = *values.pop("parts", (20,)), 40
    train(here, out_dir="a", eval_interval=7, save_interval=9, **values)
    train(here, out_dir="b", max_iters=first, eval_interval=50, **values)
    again = ["--data_dir=data", "--out_dir=b", "--init_from=resume"]
    for end in parts:
        resume(here, *again, f"--max_iters={end}", "--eval_interval=10", "--save_interval=6")
    assert_same_run(here / "a", here / "b")


def resume(cwd: Path, *argv: str):
    """A run with these flags only."""
    return Run(cwd, list(argv)).works()


def test_resuming_with_another_layout_goes_on_with_the_same_batches(here: Path):
    """Other ranks, another micro_batch_size: losses within 1e-4. A size of 3 divides this run's
    batch of 6 but not the default one."""
    values = {"lr_decay_iters": 30, "n_layer": 1, "batch_size": 6, "learning_rate": 3e-3}
    train(here, out_dir="a", micro_batch_size=6, max_iters=30, **values)
    train(here, out_dir="b", micro_batch_size=6, max_iters=15, **values)
    shutil.copytree(here / "b", here / "c")
    again = ["--data_dir=data", "--init_from=resume", "--max_iters=30"]
    resume(here, *again, "--out_dir=b", "--micro_batch_size=3", "--val_tokens=64")
    train_ranks(here, 2, out_dir="c", init_from="resume", micro_batch_size=1, max_iters=30, **values)
    a = losses(here / "a")
    for other in ("b", "c"):
        b = losses(here / other)
        assert a.keys() == b.keys() == set(range(1, 31))
        assert max(abs(a[step] - b[step]) for step in a) < 1e-4


@pytest.mark.timeout(600)
@pytest.mark.parametrize("compile", [True, False])
def test_run_on_two_threads_resumes_with_the_same_bits(here: Path, compile: bool):
    """Threads must not add up the gradient of an embedding in the order in which they come by; all
    other tests run on one. torch.compile's wrapper leaves no names in the checkpoint, and changes no
    loss by much."""
    env = {"OMP_NUM_THREADS": "2"}
    values = {"n_layer": 1, "n_embd": 64, "batch_size": 64, "micro_batch_size": 64, "eval_interval": 100}
    values |= {"ffn": "swiglu" if compile else "sparseglu:grad=ste", "lr_decay_iters": 30}
    for out_dir, steps, how in (("a", 30, "scratch"), ("b", 15, "scratch"), ("b", 30, "resume")):
        goal = {"out_dir": out_dir, "max_iters": steps, "init_from": how}
        run = start(here, compile=compile, env=env, **goal, **values).wait(300).works()
    assert_same_run(here / "a", here / "b")
    if compile:
        assert "with compiling, not counted" in run.out
        train(here, out_dir="c", max_iters=20, **values)
        a, c = losses(here / "a"), losses(here / "c")
        assert max(abs(a[step] - c[step]) for step in c) < 1e-4
        assert load(here / "a")["model"].keys() == load(here / "c")["model"].keys()


def test_where_compiling_fails_the_run_says_so_and_ends(here: Path):
    """It never goes on in eager mode by itself: a table that says `compile` must mean it."""
    code = """
        import torch._dynamo
        class Mine(model.SwiGLU):
            def forward(self, x):
                torch._dynamo.graph_break() if torch.compiler.is_compiling() else None
                return super().forward(x)
    """
    done = train_with(here, code, *flags(out_dir="o", ffn="mine", compile=True))
    done.fails("torch.compile", "--compile=False")
    assert not (here / "o" / "ckpt.pt").exists()
    # A terminal's Ctrl-C ends the C++ compiler too, which is not torch.compile's fault.
    interrupt = """
        import os, signal
        real = torch.compile
        def interrupted(f, **options):
            f = real(f, **options)
            return lambda *args, **more: (os.kill(os.getpid(), signal.SIGINT), f(*args, **more))[1]
        torch.compile = interrupted
    """
    done = train_with(here, code + interrupt, *flags(out_dir="p", ffn="mine", compile=True))
    done.fails("stopped while compiling: run the same command again")
    # A Python number that changes each step is compiled anew each time, until PyTorch gives up.
    code = """
        class Mine(model.SwiGLU):
            t = 1.0
            def set_progress(self, step, max_iters):
                self.t = 1.0 + step / max_iters
            def forward(self, x):
                return self.t * super().forward(x)
        import torch._dynamo
        torch._dynamo.config.recompile_limit = 2
        real = torch.compile
        torch.compile = lambda f, options, **more: real(f, backend="eager", **more)
    """
    done = train_with(here, code, *flags(out_dir="q", ffn="mine", n_layer=1, compile=True))
    assert done.code == 1
    assert "compiled anew again and again: keep what changes in a buffer" in done.err.splitlines()[-1]
    assert "mlp'].t == " in done.err  # PyTorch's own warning names the number


# What makes the host wait for a GPU: a value that it asks for, or a shape that depends on values.
WAITS = "_local_scalar_dense item equal is_nonzero nonzero masked_select unique_dim _unique2".split()


@pytest.mark.parametrize("ffn", FFNS)
def test_a_step_asks_for_no_value(ffn: str):
    """Nothing in a step waits for the device, whatever the numbers: all that it dispatches is watched,
    here on a CPU."""

    class Watch(TorchDispatchMode):
        seen: ClassVar[list[str]] = []

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            self.seen.append(func.overloadpacket.__name__)
            if self.seen[-1] in ("index", "index_put_") and any(
                x is not None and x.dtype == torch.bool for x in args[1]
            ):
                self.seen.append("nonzero")  # which a boolean mask is on a GPU
            return func(*args, **(kwargs or {}))

    model = tiny(ffn=ffn)
    batches = [torch.randint(257, (2, BLOCK + 1)) for _ in range(2)]
    for optimizer in ("adamw", "muon"):
        cfg = train_py.Config(lr_decay_iters=9, optimizer=optimizer)
        optimizers = train_py.make_optimizers(model, cfg)
        with Watch() as watch:
            for step in range(2):
                train_py.train_step(model, optimizers, batches, cfg, step, torch.zeros(()))
        assert "_fused_adamw_" in watch.seen
        assert not set(WAITS) & set(watch.seen)
        watch.seen.clear()


# What a resumed run may change, by the design: all else is data, model, optimizer or schedule.
MAY_CHANGE = set(
    "out_dir data_dir prepare init_from eval_only eval_interval val_tokens log_interval save_interval "
    "max_iters micro_batch_size device dtype compile recompute wandb_project sample_tokens prompt "
    "temperature top_k".split()
)
OTHER = {
    "ffn": "geglu", "ffn_match": "params", "schedule": "wsd", "optimizer": "muon", "beta1": 0.5,
    "beta2": 0.5, "batch_size": 8, "block_size": 16, "residual": "bfloat16", "tie_embeddings": False,
    "ffn_init_std": 0.05,
}  # fmt: skip


def test_flags_that_make_another_run_are_refused_on_resume(here: Path):
    """Each by its name; the same command again is not refused, and auto on a finished run does
    nothing at all."""
    given = {"out_dir": "o", "lr_decay_iters": 2, "max_iters": 2}
    train(here, **given)
    before = {p.name: p.read_bytes() for p in (here / "o").iterdir()}
    names = {f.name for f in dataclasses.fields(train_py.Config)} - MAY_CHANGE
    assert names >= {"n_layer", "seed", "data_seed", "weight_decay", "min_lr", "lr_decay_iters"}
    saved = load(here / "o")["flags"]
    for name in sorted(names):
        other = OTHER[name] if name in OTHER else saved[name] * 2 + 1
        argv = flags(init_from="resume", **{**given, "max_iters": 4, name: other})
        refused(here, argv, f"--{name}=", "checkpoint")
    run = train(here, init_from="auto", **given)
    assert "finished" in run.out
    assert {p.name: p.read_bytes() for p in (here / "o").iterdir()} == before


def test_a_checkpoint_older_than_a_flag(here: Path):
    """What it does not have is the default; the same given again is no other run."""
    train(here, out_dir="o", max_iters=2, lr_decay_iters=4)
    checkpoint = load(here / "o")
    del checkpoint["flags"]["beta2"], checkpoint["flags"]["prompt"]
    torch.save(checkpoint, here / "o" / "ckpt.pt")
    start(here, out_dir="o", max_iters=4, init_from="resume", beta2=0.5).fails("--beta2=0.5", "0.95")
    train(here, out_dir="o", max_iters=4, init_from="resume", beta2=0.95)
    assert load(here / "o")["flags"]["beta2"] == 0.95


def test_same_command_with_auto_goes_on(here: Path):
    """Zero as lr_decay_iters means max_iters, then as now: the flag given again is no other run."""
    given = {"out_dir": "o", "lr_decay_iters": 0, "max_iters": 6, "save_interval": 2}
    train(here, **given)
    checkpoint = load(here / "o")
    train(here, **{**given, "out_dir": "half", "max_iters": 4, "lr_decay_iters": 6})
    train(here, init_from="auto", **{**given, "out_dir": "half"})
    assert same_bits(load(here / "half")["model"], checkpoint["model"])


def test_scratch_keeps_what_an_earlier_run_left(here: Path):
    """Files of a run that another one overwrites become *.prev."""
    train(here, out_dir="o", max_iters=2)
    before = {p.name: p.read_bytes() for p in (here / "o").iterdir() if p.name != ".lock"}
    assert before.keys() == {"config.json", "log.jsonl", "ckpt.pt", "model.py"}
    said = train(here, out_dir="o", max_iters=3, seed=1).out
    assert "o keeps its earlier run as *.prev, in place of any older *.prev\n" in said
    for name, content in before.items():
        assert (here / "o" / f"{name}.prev").read_bytes() == content
        assert (here / "o" / name).read_bytes() != content or name == "model.py"


def test_a_run_cannot_lie_in_the_trainers_folder(here: Path):
    """From scratch it would rename the trainer's own model.py."""
    for name in ("train.py", "model.py"):
        (here / name).write_bytes((ROOT / name).read_bytes())
    refused(here, flags(out_dir="."), "--out_dir=. holds a trainer", "name another")
    assert not {"config.json", "log.jsonl", "model.py.prev"} & set(os.listdir(here))
    for beside in ("ckpt.pt", "log.jsonl"):
        (here / beside).write_text("")
        refused(here, flags(out_dir="."), "--out_dir=. holds a trainer", "name another")
    for name in ("model.py", "config.json"):  # of somebody's model, or of one exported to transformers
        (here / "other").mkdir(exist_ok=True)
        (here / "other" / name).write_text("theirs")
        refused(here, flags(out_dir="other"), "--out_dir=other holds", "name another")
        assert (here / "other" / name).read_text() == "theirs"


def test_prev_is_one_run(here: Path):
    """A run that saved nothing replaces no file of an earlier one that did; alone, its log is kept."""
    train(here, out_dir="o", max_iters=2)
    for out, seed in (("o", 0), ("p", 1)):
        unsaved = start(here, out_dir=out, max_iters=100_000, seed=1, save_interval=100_000)
        unsaved.wait_for("step      4/")  # the log has step 3
        unsaved.kill(signal.SIGKILL)
        unsaved.wait()
        train(here, out_dir=out, max_iters=2, seed=2)
        assert json.loads((here / out / "config.json.prev").read_text())["flags"]["seed"] == seed
        steps = [row["step"] for row in train_py.read_log(str(here / out / "log.jsonl.prev"))]
        assert (max(steps) > 2, (here / out / "ckpt.pt.prev").exists()) == (out == "p", out == "o")


# ---- what a run writes --------------------------------------------------------------------------


def rate(step: int, schedule: str) -> float:
    """Of the update from step to step + 1, of a run with lr 0.01, min_lr 0.001, warmup 4, decay 20."""
    if step < 4:
        return 0.01 * (step + 1) / 5
    if step >= 20:
        return 0.001
    if schedule == "wsd":  # the last 20%: steps 16 to 20
        return 0.01 if step < 16 else 0.001 + 0.009 * (20 - step) / 4
    return 0.001 + 0.009 * (1 + math.cos(math.pi * (step - 4) / 16)) / 2


@pytest.mark.parametrize("schedule", ["cosine", "wsd"])
def test_files_of_a_run(here: Path, schedule: str):
    """log.jsonl, config.json and ckpt.pt as the design has them."""
    values = {"learning_rate": 0.01, "min_lr": 0.001, "warmup_iters": 4, "lr_decay_iters": 20}
    values |= {"max_iters": 24, "ffn": "asg", "schedule": schedule, "eval_interval": 10}
    run = train(here, **values)
    out = here / "out" / "asg-s0"
    assert set(glob.glob("*", root_dir=out)) == {"config.json", "log.jsonl", "ckpt.pt", "model.py"}
    assert (out / "model.py").read_bytes() == (ROOT / "model.py").read_bytes()

    log = rows(out)
    assert list(log) == list(range(1, 25))
    fields = {"step", "tokens", "train_loss", "lr", "grad_norm", "step_ms", "tok_per_s", "mfu"}
    for step, row in log.items():
        assert row.keys() == fields
        assert row["tokens"] == step * BATCH * BLOCK
        assert row["lr"] == pytest.approx(rate(step - 1, schedule), rel=1e-12)
        if step == 1:  # it compiles and is not counted
            assert row["tok_per_s"] is row["step_ms"] is None
        else:
            assert row["tok_per_s"] * row["step_ms"] / 1000 == pytest.approx(BATCH * BLOCK)
        assert row["mfu"] is None
        assert 0 < row["grad_norm"] < 100
    evaluated = rows(out, "val_loss")
    assert list(evaluated) == [0, 10, 20, 24]
    for step, row in evaluated.items():
        assert row.keys() == {"step", "tokens", "val_loss", "active"}
        assert row["tokens"] == step * BATCH * BLOCK
        assert 0 <= row["active"] < 1
    assert evaluated[0]["val_loss"] == pytest.approx(math.log(384), abs=0.1)
    assert evaluated[24]["val_loss"] < evaluated[0]["val_loss"] - 0.2
    assert f"{evaluated[24]['val_loss']:.4f}" in run.out

    config = json.loads((out / "config.json").read_text())
    assert config.keys() >= {"flags", "torch", "python", "numpy", "device", "git_commit"}
    assert config["torch"] == torch.__version__
    counts = {"train_tokens": 3753, "val_tokens": 1201}
    assert config["data"] == {"dir": "data", "encoding": "bytes", "source": "test", **counts}
    weights = load(out)["model"]
    inside = sum(p.numel() for name, p in weights.items() if name.startswith("model.layers.0.mlp."))
    assert config["hidden"] == 64
    flops = 2 * 4 * 32 * 64
    assert config["ffn_cost"] == {"params": inside, "flops": flops, "ideal_flops": flops}
    assert config["total_params"] == sum(p.numel() for p in weights.values()) - 384 * 32  # tied
    checkpoint = load(out)
    assert checkpoint.keys() == {"model", "optimizers", "step", "flags", "shards", "code"}
    assert checkpoint["code"] == {key: config[key] for key in ("ffn_code", "trainer_code")}
    assert checkpoint["step"] == 24
    assert checkpoint["flags"] == config["flags"]
    assert config["flags"].items() >= values.items()
    assert config["flags"].keys() == {f.name for f in dataclasses.fields(train_py.Config)}
    splits = ("train", "val")
    shards = {split: [[name, n] for name, n in SIZES.items() if split in name] for split in splits}
    known = {"encoding": "bytes", "digest": config["data_digest"]}
    assert checkpoint["shards"] == shards | known
    assert checkpoint["model"].keys() == GPT(build(checkpoint).config).state_dict().keys()
    assert {t.dtype for t in checkpoint["model"].values()} == {torch.float32}


def test_a_row_after_one_that_was_cut_is_read(tmp_path: Path):
    """A disk that was full for a while leaves half a row, and the next one behind it."""
    rows = [json.dumps({"step": step, "val_loss": 2.0}) for step in range(3)]
    (tmp_path / "log.jsonl").write_text(f"{rows[0]}\n{rows[1][:12]}{rows[2]}\n")
    assert [row["step"] for row in train_py.read_log(str(tmp_path / "log.jsonl"))] == [0, 2]


def wandb_history(path: Path) -> list[dict]:
    """The logged rows of a .wandb file: protobuf records in LevelDB's log format (blocks of 32 KiB;
    each piece has a checksum, a length and a kind: 1 whole, 2 first, 3 middle, 4 last)."""
    from wandb.proto.wandb_internal_pb2 import Record

    raw, at, record, found = path.read_bytes(), 7, b"", []  # after ":W&B" and a version
    while at + 7 <= len(raw):
        left = 2**15 - at % 2**15
        size, kind = int.from_bytes(raw[at + 4 : at + 6], "little"), raw[at + 6]
        if left < 7 or kind == 0:  # padding to the end of the block
            at += left
            continue
        record, at = record + raw[at + 7 : at + 7 + size], at + 7 + size
        if kind in (1, 4):
            items = Record.FromString(record).history.item
            row = {item.key or item.nested_key[0]: json.loads(item.value_json) for item in items}
            record, found = b"", found + [row] * bool(row)
    return found


def test_wandb_says_the_same_as_the_log(here: Path):
    """--wandb_project, offline: what Weights & Biases keeps of each step is what log.jsonl has, and a
    resumed run goes on in the run of the same id."""
    pytest.importorskip("wandb")
    env = {"WANDB_MODE": "offline", "WANDB_SILENT": "true"}
    values = {"out_dir": "o", "ffn": "asg", "lr_decay_iters": 6, "wandb_project": "p", "env": env}
    train(here, max_iters=4, eval_interval=3, **values)
    train(here, max_iters=6, eval_interval=3, init_from="resume", **values)
    paths = sorted((here / "o").glob("wandb/offline-run-*/*.wandb"))
    assert len(paths) == 2
    assert len({path.name for path in paths}) == 1, "the resumed run has another id"
    kept = [row for path in paths for row in wandb_history(path)]
    steps: dict[int, dict] = {}
    for line in (here / "o" / "log.jsonl").read_text().splitlines():
        row = json.loads(line)
        steps.setdefault(row.pop("step"), {}).update(row)
    assert [row["_step"] for row in kept] == list(steps) == list(range(7))
    for row, expected in zip(kept, steps.values()):
        assert {k: v for k, v in row.items() if k[0] != "_"} == expected


@pytest.mark.parametrize("what, says", [("raise ImportError", "pip install wandb"),
    ("def init(**_): raise RuntimeError('No API key')", "No API key")])  # fmt: skip
def test_wandb_that_is_missing(here: Path, what: str, says: str):
    """An optional import, and one that may have no login: one line with the cure."""
    (here / "hidden").mkdir()
    (here / "hidden" / "wandb.py").write_text(what)
    code = f"sys.path.insert(0, 'hidden')\nrunpy.run_path({TRAIN!r}, run_name='__main__')"
    start(here, out_dir="o", max_iters=2, wandb_project="p", code=code).fails(says)


def test_a_run_in_two_precisions_says_so(here: Path):
    """compare.py refuses it beside runs in one of them."""
    for dtype, steps in (("float32", 2), ("bfloat16", 4)):
        train(here, out_dir="o", max_iters=steps, lr_decay_iters=4, dtype=dtype, init_from="auto")
    assert json.loads((here / "o" / "config.json").read_text())["dtype"] == "float32, bfloat16"


def test_code_that_is_edited_while_data_are_prepared(here: Path):
    """config.json has the hash of the code that ran, wherever the trainer is started."""
    for path in (*ROOT.glob("*.py"), ROOT / "config"):
        (here / path.name).symlink_to(path)
    (here / "model.py").unlink()
    (here / "model.py").write_text((ROOT / "model.py").read_text())
    edit = "p = 'model.py'; s = open(p).read(); open(p, 'w').write(s.replace('F.silu(', 'F.gelu('))"
    code = f"""
        sys.path.insert(0, "")
        import prepare_fineweb
        def edited(*args, real=prepare_fineweb.open_data):
            {edit}
            return real(*args)
        prepare_fineweb.open_data = edited
        runpy.run_path('train.py', run_name='__main__')
    """
    train(here, out_dir="b", max_iters=1, code=dedent(code))
    assert "F.gelu(self.gate_proj(x)) * self.up_proj" in (here / "model.py").read_text()
    config = json.loads((here / "b" / "config.json").read_text())
    assert config["ffn_code"] == model_file.ffn_code("swiglu")


def test_what_is_printed_before_the_first_step(here: Path):
    """The derived arithmetic, checked by hand: 2 layers of width 32 with one key-value head of two,
    SwiGLU of 64, vocabulary 257 -> 384."""
    run = train(here, out_dir="o", max_iters=3, micro_batch_size=2)
    attention, ffn, norms = 32 * 32 * 2 + 32 * 16 * 2, 3 * 32 * 64, 2 * 32 + 2 * 16
    layers, total = 2 * (attention + ffn), 2 * (attention + ffn + norms) + 32 + 384 * 32
    flops = 6 * (layers + 384 * 32) + 6 * 2 * 32 * BLOCK
    head = run.out.split("step      0")[0]
    for text in (f"{layers:,}", f"{total:,}", f"{flops:,}", "3 steps x 128 = 384 tokens", "n/a"):
        assert text in head
    assert f"{flops * 384:.3g} in all" in head
    assert f"384 tokens, {384 / layers:.2f} a parameter" in head
    assert "hidden 64: 6,144 parameters a layer, 1.0000 of SwiGLU's" in head
    # ASG has four matrices: 48 units have 3 x 64 x 32 parameters, and its threshold is one more.
    data, cfg = train_py.open_data(str(here / "data"), BLOCK), train_py.Config(n_embd=32, ffn_hidden=64)
    said = train_py.describe(tiny(ffn="asg", ffn_match="params"), cfg, data, 1)
    assert "hidden 48: 6,145 parameters a layer, 1.0002 of SwiGLU's" in said
    assert "0.10 epochs" in head  # 12 windows of 115
    assert "3,753 training tokens" in head
    assert "data: test, encoding bytes" in head


def test_one_shape_for_the_compiler():
    """Whatever the micro-batch: of one sequence too, whose slice counts as contiguous but has the
    strides of a longer one, all that a model sees has the strides of the pass before the first step."""
    strides = set()

    class Spy(torch.nn.Module):
        def __init__(self, raw: GPT):
            super().__init__()
            self.raw = raw

        def forward(self, idx, targets, with_aux):
            strides.add((idx.stride(), targets.stride()))
            return self.raw(idx, targets, with_aux)

    raw = GPT(GPTConfig(8, 384, 1, 2, 2, 16, ffn_hidden=16))
    cfg = train_py.Config(micro_batch_size=1, block_size=8, lr_decay_iters=9)
    optimizers = train_py.make_optimizers(raw, cfg)
    batches = torch.randint(257, (2, 9)).split(1)
    train_py.train_step(Spy(raw), optimizers, batches, cfg, 0, torch.zeros(()))
    assert strides == {((8, 1), (8, 1))}


def test_evaluating_and_sampling_are_not_training(here: Path):
    """An FFN with dropout drops in training steps only: not while evaluating, measuring `active` or
    sampling, and again after each of them."""
    code = """
        class Mine(model.SparseGLU):
            def forward(self, x):
                if len(x) > 1:  # and not the check before the first step, which wants gradients
                    assert self.training == torch.is_grad_enabled()
                elif not torch.is_grad_enabled():
                    assert not self.training
                return super().forward(x)
            decode = forward
    """
    argv = flags("--sample_tokens=4", out_dir="o", ffn="mine", max_iters=4, eval_interval=2)
    done = train_with(here, code, *argv)
    done.works()
    assert "sample (4 tokens" in done.out


def test_active_is_that_of_the_first_validation_window(tmp_path: Path):
    """Which is in the first shard that has one, not in the largest."""
    sizes = {"x_train_000001.bin": 99, "x_val_000000.bin": 9, "x_val_000001.bin": 50}
    folder = make_data(tmp_path / "data", {**sizes, "x_val_000002.bin": 500})
    data = train_py.open_data(str(folder), BLOCK)
    model = tiny(ffn="sparseglu")
    seen = []
    model.model.embed_tokens.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    assert train_py.active_fraction(model, data, torch.device("cpu"), nullcontext) == pytest.approx(0.25)
    assert np.array_equal(seen[0][0].numpy(), tokens(50, 2)[:BLOCK])


def test_log_interval_and_the_mean_of_the_step(here: Path):
    """train_loss is the step's own, not the last micro batch's nor a mean since the last row."""
    train(here, out_dir="a", max_iters=9, micro_batch_size=1)
    train(here, out_dir="b", max_iters=9, micro_batch_size=1, log_interval=4)
    a, b = losses(here / "a"), losses(here / "b")
    assert list(b) == [1, 4, 8]
    assert all(a[step] == b[step] for step in b)


def test_data_are_made_when_there_are_none(here: Path):
    """--prepare runs prepare_fineweb.py once, also with 2 ranks, and not at all the second time;
    then a sample is printed, in the encoding of the shards."""
    (here / "text.txt").write_text("All work and no play makes Jack a dull boy.\n" * 200)
    arguments = "--input=text.txt --encoding=bytes --val_tokens=2000"
    values = {"data_dir": "made/here", "prepare": arguments, "max_iters": 2, "micro_batch_size": 1}
    first = train_ranks(here, 2, out_dir="a", sample_tokens=9, prompt="All", **values)
    made = {p: p.stat().st_mtime_ns for p in (here / "made" / "here").iterdir()}
    assert json.loads((here / "made/here/meta.json").read_text())["encoding"] == "bytes"
    train(here, out_dir="b", **{**values, "micro_batch_size": 2})
    assert {p: p.stat().st_mtime_ns for p in (here / "made" / "here").iterdir()} == made
    assert "sample (9 tokens" in first.out
    # Another sample of the same weights is another seed's.
    again = {"init_from": "resume", "out_dir": "a", "sample_tokens": 9}
    texts = [train(here, "--eval_only", seed=seed, **again).out for seed in (0, 1, 1)]
    found = [re.split(r"\nsample .*:\n", text.split("validation loss")[1]) for text in texts]
    (loss, zero), *ones = found
    assert ones == [[loss, ones[0][1]]] * 2
    assert ones[0][1] != zero
    a, b = losses(here / "a"), losses(here / "b")
    assert max(abs(a[step] - b[step]) for step in a) < 1e-5


def test_preparing_that_makes_nothing_is_told(here: Path):
    """Arguments with which prepare_fineweb.py ends well and leaves no shards, and a folder that cannot
    be made."""
    for prepare in ("--help", "--verify=data", "--out_dir=elsewhere --verify=data"):
        run = start(here, data_dir="none", prepare=prepare, out_dir="o")
        run.fails("--prepare", "made no shards in none")
    (here / "file").touch()
    run = start(here, data_dir="file/below", prepare="--input=stdlib", out_dir="o").wait()
    assert (run.code, run.err.count("\n"), "Traceback" in run.err) == (1, 2, False)
    assert "error: cannot use file/below" in run.err  # by prepare_fineweb.py
    refused(here, flags(data_dir="none", prepare="--input='a", out_dir="o"), "--prepare", "quot")
    assert not (here / "o").exists()


def test_failed_starts_leave_the_run_before_them(here: Path):
    """A start that stops before its first step, twice: the good run's three files are still one set."""
    train(here, out_dir="o", max_iters=2, ffn="asg")
    good = {name: (here / "o" / name).read_bytes() for name in ("config.json", "log.jsonl", "ckpt.pt")}
    code = """
        class Mine(model.SwiGLU):
            def __init__(self, d, h):
                super().__init__(d, h)
                self.w = torch.nn.Parameter(torch.ones(()))
    """
    for _ in range(2):
        done = train_with(here, code, *flags(out_dir="o", max_iters=2, ffn="mine"))
        done.fails("mlp.w received no gradient")
    assert {name: (here / "o" / f"{name}.prev").read_bytes() for name in good} == good
    train(here, out_dir="o", max_iters=2)
    assert list(losses(here / "o", "val_loss")) == [0, 2]  # without the rows of the failed starts


def test_buffers_are_those_of_the_steps(here: Path):
    """An FFN with running means, a buffer and a frozen parameter: the pass before the first step, which
    compiles and checks, leaves no trace in them, so that a resumed run has the same bits. `active`
    may be a plain number."""
    code = """
        class Mine(model.SwiGLU):
            def __init__(self, d, h):
                super().__init__(d, h)
                self.register_buffer("mean", torch.zeros(d))
                self.register_buffer("one", torch.ones(1).expand(d), persistent=False)
                self.square = torch.nn.Parameter(torch.zeros(d), requires_grad=False)
            def active(self, x):
                return self.mean.numel() / 64
            def forward(self, x):
                if not hasattr(self, "late"):
                    self.register_buffer("late", x.detach().mean(), persistent=False)
                if self.training:
                    self.mean.lerp_(x.detach().mean((0, 1)), 0.1)
                    self.square.lerp_(x.detach().square().mean((0, 1)), 0.1)
                return super().forward(x - self.mean + self.square)
    """
    for out, steps, init in (("a", 8, "scratch"), ("b", 3, "scratch"), ("b", 8, "resume")):
        argv = flags(out_dir=out, max_iters=steps, lr_decay_iters=8, ffn="mine", init_from=init)
        done = train_with(here, code, *argv)
        done.works()
    for name in ("mean", "square"):
        assert load(here / "a")["model"][f"model.layers.0.mlp.{name}"].any()
    assert_same_run(here / "a", here / "b")
    assert {row["active"] for row in rows(here / "a", "val_loss").values()} == {0.5}


# As of experts without a token: in these calls while training, on these ranks.
LEFT_OUT = """
    import os
    class Mine(model.SwiGLU):
        def __init__(self, d, h):
            super().__init__(d, h)
            self.extra, self.calls = torch.nn.Linear(d, d), torch.nn.Buffer(torch.tensor(0))
        def forward(self, x):
            self.calls += self.training
            skip = int(self.calls) in {calls} and os.environ.get("RANK", "0") in {ranks!r}
            return super().forward(x) + (0 if skip else self.extra(x))
"""


def test_a_gradient_that_is_missing_in_a_later_step(here: Path):
    """The step, the parameter and the cure, in one line."""
    code = LEFT_OUT.format(calls="(3,)", ranks="0")
    argv = flags(out_dir="o", max_iters=9, ffn="mine", n_layer=1)
    done = train_with(here, code, *argv)
    done.fails("step 3: model.layers.0.mlp.extra.weight", "each forward")


def test_the_future_is_seen_at_the_first_and_the_last_step(here: Path):
    """Of an FFN that changes with the run's progress: else it would train, and could not be resumed."""
    for early, late in ((0, 1), (1, 0)):
        code = f"""
            class Mine(model.SwiGLU):
                def __init__(self, d, h):
                    super().__init__(d, h)
                    self.share = torch.nn.Buffer(torch.zeros(()))
                def set_progress(self, step, max_iters):
                    self.share.fill_({late} if step == max_iters - 1 else {early})
                def forward(self, x):
                    return super().forward(x + self.share * x.roll(-1, 1))
        """
        done = train_with(here, code, *flags(out_dir="o", max_iters=4, ffn="mine", n_layer=1))
        done.fails("layers.0.mlp sees the future")


def test_noise_is_the_same_when_it_is_repeated(here: Path):
    """Of an FFN that draws numbers in evaluation too: the same flags give the same losses, and the same
    weights the same validation loss at each step."""
    code = """
        class Mine(model.SwiGLU):
            def forward(self, x):
                return super().forward(x) * (1 + torch.rand_like(x))
    """
    for out in ("a", "b"):
        train_with(here, code, *flags(out_dir=out, max_iters=4, ffn="mine", eval_interval=2)).works()
    assert losses(here / "a", "val_loss") == losses(here / "b", "val_loss")
    still = {"learning_rate": 0, "min_lr": 0, "max_iters": 2, "eval_interval": 1}
    train_with(here, code, *flags(out_dir="c", ffn="mine", **still)).works()
    assert len(set(losses(here / "c", "val_loss").values())) == 1


def test_what_an_ffn_is_told_of_the_progress(here: Path):
    """The same whether a run stops early and is resumed or not, with the same random numbers. An
    evaluation at step n knows of step n, and no step is told that is not before max_iters."""
    code = """
        class Mine(model.SwiGLU):
            def __init__(self, d, h):
                super().__init__(d, h)
                self.done, self.noise = torch.nn.Buffer(torch.tensor(-1.0)), 0.0
            def set_progress(self, step, max_iters):
                self.done.copy_((torch.arange(max_iters) / max_iters)[step])
                self.noise = torch.rand(())
            def forward(self, x):
                return super().forward(x) * (1 + self.done + self.noise * self.training)
            def active(self, x):
                return self.done
    """
    values = {"ffn": "mine", "n_layer": 1, "lr_decay_iters": 6, "eval_interval": 3, "val_tokens": 64}
    train_with(here, code, *flags(out_dir="a", max_iters=6, **values)).works()
    train_with(here, code, *flags(out_dir="b", max_iters=3, **values)).works()
    train_with(here, code, *flags(out_dir="b", max_iters=6, init_from="resume", **values)).works()
    assert_same_run(here / "a", here / "b")
    for folder in ("a", "b"):
        assert losses(here / folder, "active") == pytest.approx({0: 0, 3: 1 / 2, 6: 5 / 6})
    assert losses(here / "a", "val_loss") == losses(here / "b", "val_loss")
    train_with(here, code, *flags(out_dir="c", max_iters=8, **values)).works()
    assert losses(here / "c", "active") == pytest.approx({0: 0, 3: 3 / 8, 6: 6 / 8, 8: 7 / 8})


def test_what_set_progress_draws_and_writes(here: Path):
    """A mask that it draws is the same on all ranks and when resumed, and an average that it moves does
    not move in evaluations: how often a run evaluates changes nothing."""
    code = """
        class Mine(model.SwiGLU):
            def __init__(self, d, h):
                super().__init__(d, h)
                for name in ("size", "mean", "mask"):
                    self.register_buffer(name, torch.ones(h))
            def set_progress(self, step, max_iters):
                self.mean = self.mean.lerp(self.size, 0.1)
                if step % 3 == 0:
                    self.mask.copy_(torch.rand(self.mask.shape) < 0.5)
            def forward(self, x):
                z = self.gate_proj(x) * self.up_proj(x)
                if self.training:
                    self.size.copy_(z.detach().abs().mean((0, 1)))
                return self.down_proj(z * self.mask / (0.1 + self.mean))
    """
    values = {"ffn": "mine", "n_layer": 1, "lr_decay_iters": 6, "val_tokens": 64}
    train_with(here, code, *flags(out_dir="a", max_iters=6, eval_interval=1, **values)).works()
    train_with(here, code, *flags(out_dir="b", max_iters=4, eval_interval=9, **values)).works()
    resume = {"max_iters": 6, "init_from": "resume", "eval_interval": 9}
    train_with(here, code, *flags(out_dir="b", **resume, **values)).works()
    first, second = load(here / "a")["model"], load(here / "b")["model"]
    assert all(torch.equal(first[name], second[name]) for name in first)
    mask = "model.layers.0.mlp.mask"
    assert losses(here / "a", "val_loss")[6] == losses(here / "b", "val_loss")[6]
    (here / "mine.py").write_text(program_with(dedent(code)))
    for rank in start_ranks(here, 2, out_dir="c", max_iters=6, code=MINE, micro_batch_size=2, **values):
        rank.works()
    assert torch.equal(load(here / "c")["model"][mask], first[mask])


def test_a_parameter_that_is_unfrozen_too_late(here: Path):
    """No optimizer would train it, and its gradient would add up and count in the clipping."""
    code = """
        class Mine(model.SwiGLU):
            def __init__(self, d, h):
                super().__init__(d, h)
                self.up_proj.requires_grad_(False)
            def set_progress(self, step, max_iters):
                self.up_proj.requires_grad_(step >= 2)
    """
    done = train_with(here, code, *flags(out_dir="o", max_iters=9, ffn="mine", n_layer=1))
    done.fails("step 3: model.layers.0.mlp.up_proj.weight", "frozen at first")


def test_a_gradient_that_is_missing_with_two_ranks(here: Path):
    """On one rank: it names the step and the parameter, and no rank goes on. The file that torchrun
    reads for its summary, the last thing that it prints, has the cause too."""
    code = "import os\nos.environ['TORCHELASTIC_ERROR_FILE'] = 'error' + os.environ['RANK']\n"
    (here / "mine.py").write_text(program_with(code + dedent(LEFT_OUT.format(calls="(3,)", ranks="1"))))
    values = {"ffn": "mine", "max_iters": 9, "n_layer": 1, "micro_batch_size": 2, "save_interval": 1}
    ranks = start_ranks(here, 2, out_dir="o", code=MINE, **values)
    cause = "step 3: model.layers.0.mlp.extra.weight received no gradient"
    ranks[1].fails(f"error: {cause}")
    assert cause in (here / "error1").read_text()
    assert ranks[0].wait().code == 1
    assert load(here / "o")["step"] == 2


def test_other_weights_are_named_on_resume(here: Path):
    """Of a class that has changed since: what it lacks, and a warning where the code is there to see."""
    code = """
        class Mine(model.SwiGLU):
            def __init__(self, d, h):
                super().__init__(d, h)
                self.gain = torch.nn.Parameter(torch.ones(d))
            def forward(self, x):
                return super().forward(x) * self.gain
        model.FFNS["swiglu"] = Mine
    """
    train(here, out_dir="p", max_iters=2, lr_decay_iters=6)
    shutil.copytree(here / "p", here / "o")
    argv = flags(out_dir="o", max_iters=4, lr_decay_iters=6, init_from="resume")
    train_with(here, code, *argv).fails("Missing key", "mlp.gain")

    path = here / "p" / "config.json"
    made = json.loads(path.read_text())
    assert "warning" not in train(here, out_dir="p", max_iters=3, init_from="resume").out
    checkpoint = load(here / "p")
    checkpoint["code"] = dict.fromkeys(checkpoint["code"], "0" * 16)
    torch.save(checkpoint, here / "p" / "ckpt.pt")
    old = {"ffn_code": "0" * 16, "hidden": 7, "trainer_code": "1" * 16, "torch": made["torch"]}
    old |= {"ffn_cost": {"params": 1, "flops": 2, "ideal_flops": 3}, "total_params": 4}
    path.write_text(json.dumps(made | old))
    (here / "p" / "model.py").write_text("as it was when the run began")
    for more in ({"eval_only": True}, {"max_iters": 4}):
        out = train(here, out_dir="p", init_from="resume", **more).out
        assert "the code of swiglu is not what it was" in out
        assert "the code of the trainer is not what it was" in out
    checkpoint = load(here / "p")
    del checkpoint["code"]  # of an older version, where config.json alone says it
    torch.save(checkpoint, here / "p" / "ckpt.pt")
    out = train(here, out_dir="p", init_from="resume", max_iters=5).out
    assert "the code of swiglu is not what it was when this run began" in out
    resumed = json.loads(path.read_text())
    assert all(resumed[key] == old[key] for key in ("ffn_code", "hidden", "ffn_cost", "total_params"))
    assert (here / "p" / "model.py").read_text() == "as it was when the run began"
    assert resumed["trainer_code"] == "1" * 16 + ", " + made["trainer_code"]  # of both its parts
    assert resumed["torch"] == made["torch"]


def test_two_runs_in_one_folder(here: Path):
    """The second is refused in one line, and the first goes on undisturbed; once that has ended, or was
    killed, the folder is free."""
    long = {"out_dir": "o", "max_iters": 10**6, "eval_interval": 10**6}
    first = start(here, save_interval=100, **long)
    first.wait_for("step    101/")
    start(here, out_dir="o", max_iters=3).fails("--out_dir=o", "another run")
    start(here, init_from="auto", **long).fails("--out_dir=o", "another run")
    first.process.kill()
    steps = [row["step"] for row in train_py.read_log(str(here / "o/log.jsonl")) if row["step"]]
    assert steps == list(range(1, len(steps) + 1))
    first.process.join()
    train(here, out_dir="o", max_iters=3)


def test_a_terminal_that_is_not_utf8(here: Path):
    """A sample of bytes may have any character: it is shown as far as it can be."""
    code = "sys.stdout = open(1, 'w', encoding='ascii', closefd=False)\n"
    code += f"runpy.run_path({TRAIN!r}, run_name='__main__')"
    values = {"max_iters": 1, "sample_tokens": 60, "temperature": 2, "code": code}
    assert "sample (60 tokens" in train(here, out_dir="o", **values).out


def test_public_shards_without_meta_are_gpt2(here: Path):
    """Vocabulary 50,257, rounded up to 50,304."""
    (here / "data" / "meta.json").unlink()
    run = train(here, out_dir="o", max_iters=1, n_layer=1, val_tokens=BLOCK)
    assert load(here / "o")["model"]["lm_head.weight"].shape == (50304, 32)
    assert losses(here / "o", "val_loss")[0] == pytest.approx(math.log(50304), abs=0.1)
    assert "error" not in run.err


def test_resuming_on_other_data_of_the_same_size_is_refused(here: Path):
    """Shards prepared again from another text may have the names and counts of those before: what tells
    is meta.json's sha256. A run may be evaluated on other data, but not in another encoding, whose ids
    are other words. A checkpoint from before the digest was kept goes on."""
    path = here / "data" / "meta.json"
    meta = json.loads(path.read_text())

    def rewrite(digest: str, **more: object) -> None:
        shards = [shard | {"sha256": digest} for shard in meta["shards"]]
        path.write_text(json.dumps(meta | {"shards": shards, **more}))

    rewrite("a")
    train(here, out_dir="o", max_iters=2, lr_decay_iters=4)
    again = ["--data_dir=data", "--init_from=resume", "--out_dir=o", "--max_iters=4"]
    rewrite("b")
    refused(here, again, "data has other shards")
    assert "validation loss" in resume(here, *again, "--eval_only").out
    rewrite("a", encoding="other")
    refused(here, again, "data has other shards")
    refused(here, [*again, "--eval_only"], "data has other shards")
    rewrite("a")
    checkpoint = load(here / "o")
    for key in ("digest", "encoding"):
        del checkpoint["shards"][key]
    torch.save(checkpoint, here / "o" / "ckpt.pt")
    resume(here, *again)
    assert max(losses(here / "o")) == 4


def test_config_json_tells_versions_of_the_trainer_apart(here: Path, monkeypatch):
    """Its hash changes with train.py, the decoder and the reader of shards, but not with a comment or a
    new FFN."""
    train(here, out_dir="o", max_iters=0)
    expected = json.loads((here / "o" / "config.json").read_text())["trainer_code"]
    for old, new, same in [
        ("", "", True),
        ("# -- the loop.", "# -- a loop.", True),
        ("class GELU(", "class New(nn.Module):\n    pass\n\n\nclass GELU(", True),
        ('    "gelu": GELU,\n', '    "gelu": GELU,\n    "gelu2": GELU,\n', True),
        ('group["lr"]) * schedule', 'group["lr"]) * 0.9 * schedule', False),
        ("b * cos + a * sin", "b * cos - a * sin", False),
        ("permutation(len(counts), data_seed", "permutation(len(counts), 1", False),
    ]:
        changed = 0
        for module in (train_py, prepare_fineweb, model_file):
            source = (ROOT / f"{module.__name__}.py").read_text()
            changed += source.count(old) if old else 1
            (here / f"{module.__name__}.py").write_text(source.replace(old, new))
            monkeypatch.setattr(module, "__file__", str(here / f"{module.__name__}.py"))
        assert changed == (1 if old else 3)
        roots = [GPT, train_py.main, prepare_fineweb.locate, prepare_fineweb.read_windows]
        assert (model_file.code_hash(roots) == expected) is same, new


@pytest.mark.skipif(
    not (SHARED / "data" / "fineweb_head.parquet").exists(),
    reason="needs ../shared/data/fineweb_head.parquet, a piece of FineWeb",
)
def test_real_text(tmp_path: Path):
    """FineWeb, GPT-2 tokens, a short run through --prepare."""
    path = SHARED / "data" / "fineweb_head.parquet"
    values = {"data_dir": "real", "max_iters": 30, "n_layer": 1, "val_tokens": 640}
    values["prepare"] = f"--input={path} --val_tokens=20000 --workers=1"
    env = {"TIKTOKEN_CACHE_DIR": str(SHARED / "tiktoken_cache")}
    train(tmp_path, out_dir="o", env=env, **values)
    meta = json.loads((tmp_path / "real" / "meta.json").read_text())
    assert (meta["encoding"], meta["vocab_size"], meta["eot"]) == ("gpt2", 50257, 50256)
    val = losses(tmp_path / "o", "val_loss")
    assert val[0] == pytest.approx(math.log(50304), abs=0.1)
    assert val[30] < val[0] - 1


# ---- what a launcher says -------------------------------------------------------------------------

LAUNCHED = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "MASTER_ADDR": "x", "MASTER_PORT": "1"}


def test_the_launcher_is_read_in_one_place(monkeypatch):
    """Without RANK there is one rank, whatever a container sets; with it all variables count or one
    line says what is missing: no half of a batch, no eight ranks on one GPU."""
    for name in LAUNCHED:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert train_py.read_launcher() == (0, 1, 0)
    for name, value in LAUNCHED.items():
        monkeypatch.setenv(name, value)
    assert train_py.read_launcher() == (1, 2, 1)
    for name in ("WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        with monkeypatch.context() as patch:
            patch.delenv(name)
            with pytest.raises(train_py.UserError, match=name):
                train_py.read_launcher()
    for name, value in (("RANK", "2"), ("RANK", "one"), ("WORLD_SIZE", "0"), ("MASTER_PORT", "")):
        with monkeypatch.context() as patch:
            patch.setenv(name, value)
            with pytest.raises(train_py.UserError, match="launcher"):
                train_py.read_launcher()


def test_a_recipes_data_stay_in_its_own_folder(here: Path):
    """A folder that is named on the command line is not filled with what a config file's `prepare`
    makes: a typing error must not train on other data."""
    (here / "c.py").write_text("data_dir = 'made'\nprepare = '--input=stdlib --encoding=bytes'\n")
    argv = ["c.py", *flags(out_dir="o", data_dir="typo")]
    refused(here, argv, "no train shards in typo", "prepare_fineweb.py")
    prepare = "--input=stdlib --encoding=bytes"
    train(here, out_dir="o", max_iters=2, lr_decay_iters=4, prepare=prepare)
    argv = ["--out_dir=o", "--init_from=resume", "--max_iters=4", "--data_dir=typo"]
    refused(here, argv, "no train shards in typo", "prepare_fineweb.py")
    assert not (here / "typo").exists()


def test_what_is_said_on_resume(here: Path):
    """The step, and that a schedule which has ended leaves the rate at its minimum. A run that warms up
    to its last step, or beyond, is told at once: it never has the rate that was asked for."""
    train(here, out_dir="o", max_iters=4)
    run = train(here, out_dir="o", init_from="resume", max_iters=6)
    assert "resumed at step 4" in run.out
    assert "warning: the schedule warms up to step 5 and ends at step 4 of 6" in run.out
    train(here, out_dir="p", max_iters=4, lr_decay_iters=6)
    assert "warning" not in train(here, out_dir="p", init_from="resume", max_iters=6).out
    data = train_py.open_data(str(here / "data"), BLOCK)
    for steps in (4, 6):
        cfg = train_py.Config(max_iters=4, lr_decay_iters=4, warmup_iters=steps)
        said = train_py.describe(tiny(), cfg, data, 1)
        assert f"warning: the schedule warms up to step {steps} and ends at step 4 of 4" in said


def test_added_optimizers(here: Path):
    """One whose state has other shapes than its parameters is resumed. One that shares parameters with
    another would see no gradient: refused, as are parameters that none has."""

    def run(line: str, **values) -> Run:
        source, end = Path(TRAIN).read_text(), "    return optimizers\n"
        assert source.count(end) == 1
        (here / "mine.py").write_text(source.replace(end, f"    {line}\n{end}"))
        argv = flags(out_dir="o", n_layer=1, **values)
        return Run(here, argv, code=MINE).wait()

    factored = "optimizers = [torch.optim.Adafactor([p for g in groups for p in g['params']], lr)]"
    run(factored, max_iters=2, lr_decay_iters=4).works()
    more = {"lr_decay_iters": 4, "init_from": "resume"}
    assert "resumed at step 2" in run(factored, max_iters=4, **more).works().out
    run("optimizers += [torch.optim.SGD(groups[0]['params'])]").fails("2 optimizers, not in one")
    run("del optimizers[0].param_groups[0]").fails("in 0 optimizers, not in one")
    numpys = "optimizers[0].param_groups[0]['lr'] = lr * np.sqrt(0.5)"
    run(numpys, max_iters=1).fails("could be saved and not loaded", "Python's own numbers")


def test_an_ffn_whose_checkpoint_could_not_be_loaded_is_refused(here: Path):
    """State that weights_only would refuse, in a class of the reader's: before the first step."""
    code = """
        import numpy as np
        class Mine(model.SwiGLU):
            def get_extra_state(self):
                return np.zeros(3)
            def set_extra_state(self, state):
                pass
    """
    train_with(here, code, *flags(out_dir="o", ffn="mine")).fails("mlp._extra_state", "get_extra_state")


def test_a_group_keeps_its_own_learning_rate():
    """Of a hacker's group with another `lr`: the schedule multiplies it, and does not replace it."""
    model = tiny()
    cfg = train_py.Config(lr_decay_iters=100, learning_rate=1e-3, warmup_iters=3)
    optimizers = train_py.make_optimizers(model, cfg)
    optimizers[0].param_groups[1].update(lr=5e-3, initial_lr=5e-3)
    batch = torch.randint(257, (2, BLOCK + 1))
    train_py.train_step(model, optimizers, [batch], cfg, 0, torch.zeros(()))
    assert [group["lr"] for group in optimizers[0].param_groups] == [2.5e-4, 1.25e-3]


def tiny_model_and_batches(ffn: str) -> tuple[GPT, list[torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    model = GPT(GPTConfig(8, 384, 1, 2, 2, 16, ffn=ffn, ffn_hidden=64))
    return model, [torch.randint(257, (2, 9), generator=generator) for _ in range(2)]


def gradients(model: GPT, batches: list[torch.Tensor]) -> dict[str, np.ndarray]:
    """Of the mean over the batches, in float64."""
    copied = copy.deepcopy(model).double()
    sum(copied(b[:, :-1], b[:, 1:])[1] for b in batches).backward()
    return {name: (p.grad / len(batches)).numpy() for name, p in copied.named_parameters()}


def test_steps_are_adamw_by_hand():
    """Four steps in NumPy: the mean gradient of two passes, clipped by its norm over all parameters, two
    moments without bias, decay of matrices and not of vectors, the scheduled rate."""
    model, batches = tiny_model_and_batches("dsg")
    cfg = train_py.Config(learning_rate=1e-2, min_lr=1e-3, warmup_iters=2, lr_decay_iters=4,
                          weight_decay=0.5, beta1=0.8, beta2=0.9, grad_clip=0.5)  # fmt: skip
    optimizers = train_py.make_optimizers(model, cfg)
    want = {name: p.detach().double().numpy().copy() for name, p in model.named_parameters()}
    one, two = ({name: np.zeros_like(p) for name, p in want.items()} for _ in range(2))
    rates = [1e-2 / 3, 1e-2 * 2 / 3, 1e-2, 1e-3 + 9e-3 * 0.5]
    for step, rate in enumerate(rates):
        grads = gradients(model, batches)
        norm = math.sqrt(sum((g**2).sum() for g in grads.values()))
        assert norm > 0.6  # or it would not be clipped
        for name, g in grads.items():
            g = g * 0.5 / norm
            one[name] = 0.8 * one[name] + 0.2 * g
            two[name] = 0.9 * two[name] + 0.1 * g**2
            update = one[name] / (1 - 0.8 ** (step + 1))
            update /= np.sqrt(two[name] / (1 - 0.9 ** (step + 1))) + 1e-8
            decay = 1 - rate * 0.5 * (want[name].ndim == 2)
            want[name] = decay * want[name] - rate * update
        found = train_py.train_step(model, optimizers, batches, cfg, step, torch.zeros(()))
        assert float(found[2]) == pytest.approx(norm, rel=1e-5)
        for name, p in model.named_parameters():
            np.testing.assert_allclose(p.detach().numpy(), want[name], rtol=0, atol=2e-5, err_msg=name)
            p.data.copy_(torch.as_tensor(want[name]))  # so that rounding does not add up


def test_a_step_of_muon():
    """Matrices inside layers decay and then move by an orthogonal matrix of which the numbers are 0.2
    times the rate, as AdamW's updates are; the embedding and the vectors are AdamW's."""
    model, batches = tiny_model_and_batches("swiglu")
    cfg = train_py.Config(learning_rate=1e-2, min_lr=1e-2, warmup_iters=0, lr_decay_iters=9,
                          weight_decay=20.0, grad_clip=0.0, optimizer="muon")  # fmt: skip
    optimizers = train_py.make_optimizers(model, cfg)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    train_py.train_step(model, optimizers, batches, cfg, 0, torch.zeros(()))
    for name, p in model.named_parameters():
        moved = (p.detach() - before[name] * (1 - 1e-2 * 20 * (p.ndim == 2))) / 1e-2
        if "layers" in name and p.ndim == 2:
            assert moved.square().mean().sqrt().item() == pytest.approx(0.2, rel=0.2), name
            singular = torch.linalg.svdvals(moved)
            assert singular.median() > 0.5 * singular.max(), name
        else:  # AdamW's first update is the gradient's sign
            seen = moved[moved.abs() > 0.5]
            assert len(seen)
            assert (seen.abs() - 1).abs().max() < 0.1, name


def test_noise_is_other_noise_each_step_and_rank_and_seed(here: Path):
    """What FFNs draw in training: two ranks that drew the same would halve the noise's variety."""
    code = """
        import os
        class Mine(model.SwiGLU):
            def forward(self, x):
                if self.training and len(x) > 1:  # and not the checks before the first step
                    run = next(flag for flag in sys.argv if flag.startswith("--out_dir="))
                    with open(f"{run[10:]}-drew-{os.environ.get('RANK', 0)}", "a") as f:
                        f.write(f"{torch.rand(()).item()}\\n")
                return super().forward(x)
    """
    (here / "mine.py").write_text(program_with(code))
    values = {"ffn": "mine", "n_layer": 1, "max_iters": 3, "micro_batch_size": 2, "eval_interval": 9}
    values["code"] = MINE
    train_ranks(here, 2, out_dir="two", **values)
    train(here, out_dir="one", batch_size=2, seed=1, **values)
    drawn = [(here / f"{name}-drew-{rank}").read_text().split() for name, rank in
             (("two", 0), ("two", 1), ("one", 0))]  # fmt: skip
    assert [len(numbers) for numbers in drawn] == [3, 3, 3]
    assert len({number for numbers in drawn for number in numbers}) == 9


def test_the_clock_counts_training_steps_alone(here: Path):
    """Neither a slow validation is in step_ms nor is it divided by more steps than were made."""
    code = """
        import time
        now = [0.0]
        time.perf_counter = lambda: now[0]
        class Mine(model.SwiGLU):
            def forward(self, x):
                now[0] += 0.05 if self.training else 1.0
                return super().forward(x)
            def active(self, x):
                return x.new_zeros(())
    """
    values = {"ffn": "mine", "n_layer": 1, "max_iters": 6, "log_interval": 3, "eval_interval": 2}
    values |= {"val_tokens": BLOCK}
    train_with(here, code, *flags(out_dir="o", **values)).works()
    found = rows(here / "o")
    assert found[1]["step_ms"] is None
    assert [found[step]["step_ms"] for step in (3, 6)] == pytest.approx([50, 50])


def test_samples_and_rows_are_as_asked(here: Path, capsys):
    """A sample takes prompt, temperature, top_k and vocabulary; a row shows the time that is left."""

    class Fake:
        def generate(self, idx, n, temperature, top_k, n_vocab):
            assert (n, temperature, top_k, n_vocab) == (5, 0.3, 7, 257)
            return torch.cat((idx, idx), 1)

    data = train_py.open_data(str(here / "data"), BLOCK)
    cfg = train_py.Config(sample_tokens=5, temperature=0.3, top_k=7, prompt="ab", max_iters=70)
    cfg.eval_only = True  # so that nothing is written
    text = train_py.sample(Fake(), cfg, data, torch.device("cpu"), nullcontext)
    assert text.split("\n", 1)[1].startswith("ab")
    train_py.report({"step": 10, "train_loss": 2.0, "step_ms": 1000.0}, cfg, None)
    assert "eta 0:01:00" in capsys.readouterr().out


def test_a_run_that_ends_when_it_is_stopped(here: Path, capsys):
    """Its number of steps is larger than any clock or any array's number can hold."""
    data = train_py.open_data(str(here / "data"), BLOCK)
    cfg = train_py.Config(max_iters=10**18, eval_only=True)
    assert "epochs" in train_py.describe(tiny(), cfg, data, 1)
    train_py.report({"step": 10, "train_loss": 2.0, "step_ms": 1000.0}, cfg, None)
    assert "days" in capsys.readouterr().out


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_all_passes_are_in_the_type_asked_for(here: Path, dtype: str):
    """Training, evaluation and the share of active units."""
    code = """
        class Mine(model.SwiGLU):
            def note(self, what, x):
                with open("seen", "a") as f:
                    print(what, self.training, len(x), torch.is_autocast_enabled("cpu"), file=f)
            def forward(self, x):
                self.note("forward", x)
                return super().forward(x)
            def active(self, x):
                self.note("active", x)
                return x.new_zeros(())
    """
    asked = {"dtype": dtype, "max_iters": 1, "n_layer": 1}
    train_with(here, code, *flags(out_dir="o", ffn="mine", **asked)).works()
    seen = {tuple(line.split()) for line in (here / "seen").read_text().splitlines()}
    on = str(dtype == "bfloat16")
    for one in (("forward", "True", "4"), ("forward", "False", "4"), ("active", "False", "1")):
        assert {line[3] for line in seen if line[:3] == one} == {on}, one


def test_recompute_reaches_the_compiler(here: Path):
    code = """
        class Mine(model.SwiGLU):
            pass
        def spy(f, device, recompute=False):
            print("recompute is", recompute)
            return f
        model.compiled = spy
    """
    for asked in (True, False):
        out = f"{asked}"
        argv = flags(out_dir=out, ffn="mine", max_iters=1, compile=True, recompute=asked)
        assert f"recompute is {asked}" in train_with(here, code, *argv).works().out


def test_active_is_the_mean_of_all_layers(here: Path, monkeypatch):
    data = train_py.open_data(str(here / "data"), BLOCK)
    model = GPT(GPTConfig(BLOCK, 384, 3, 2, 2, 32, ffn="asg", ffn_hidden=64))
    asg = type(model.model.layers[0].mlp)
    monkeypatch.setattr(asg, "active", lambda self, x: torch.tensor(self.share))
    for layer, share in zip(model.model.layers, (0.1, 0.2, 0.6)):
        layer.mlp.share = share
    found = train_py.active_fraction(model, data, torch.device("cpu"), nullcontext)
    assert found == pytest.approx(0.3)


def test_shards_of_an_encoding_that_nobody_knows(here):
    """A run on them ends well: it has no sample and says why."""
    path = here / "data" / "meta.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"encoding": "mine"}))
    run = train(here, out_dir="o", max_iters=1, sample_tokens=5)
    assert "no sample: unknown encoding 'mine'" in run.out


def test_the_first_step_that_went_bad_is_named():
    """Not the last one before somebody looked."""
    model, failed = tiny(), torch.zeros(())
    cfg, batch = train_py.Config(lr_decay_iters=9), torch.randint(257, (2, BLOCK + 1))
    optimizers = train_py.make_optimizers(model, cfg)
    for step in range(5):
        if step == 2:
            model.model.norm.weight.data.fill_(float("nan"))
        train_py.train_step(model, optimizers, [batch], cfg, step, failed)
    assert failed == 3


def test_notes_before_the_first_step(here: Path):
    """What a new class may not expect: frozen parameters, redrawn start values, no down_proj."""
    notes = ("no gradient by design, e.g.", "start values were redrawn", "is named down_proj")
    code = """
        class Mine(torch.nn.Module):
            def __init__(self, d, h):
                super().__init__()
                self.up, self.down = model.linear(d, h), model.linear(h, d)
                torch.nn.init.zeros_(self.down.weight)
                self.frozen = torch.nn.Parameter(torch.ones(d), requires_grad=False)
            def forward(self, x):
                return self.down(torch.relu(self.up(x))) * self.frozen
    """
    done = train_with(here, code, *flags(out_dir="o", ffn="mine", max_iters=1)).works()
    assert all(note in done.out for note in notes)
    data = train_py.open_data(str(here / "data"), BLOCK)
    plain = train_py.describe(tiny(), train_py.Config(), data, 1)
    assert not any(note in plain for note in notes)


def test_what_an_optimizer_draws_is_the_same_on_all_ranks():
    """A rank's seed is its own, for its FFNs; optimizers that add noise would drift apart by it. Each
    step has noise of its own."""

    class Noisy(torch.optim.SGD):
        def step(self):
            for p in self.param_groups[0]["params"]:
                p.data += torch.randn_like(p)

    ends, batch = [], torch.randint(257, (2, BLOCK + 1))
    for rank, step in ((0, 0), (1, 0), (1, 1)):
        model = tiny()
        torch.manual_seed(rank)
        cfg = train_py.Config(lr_decay_iters=100)
        train_py.train_step(model, [Noisy(model.parameters())], [batch], cfg, step, torch.zeros(()))
        ends.append(model.lm_head.weight.detach())
    assert torch.equal(*ends[:2])
    assert not torch.equal(*ends[1:])


def test_the_cost_in_config_is_the_mean_of_the_layers(here: Path):
    """A table multiplies it by their number, and they may differ."""
    model = tiny()
    model.model.layers[1].mlp = make_ffn("swiglu", TINY["n_embd"], 4 * TINY["ffn_hidden"])
    data = train_py.open_data(str(here / "data"), BLOCK)
    cost = train_py.about(train_py.Config(), data, model, torch.device("cpu"), 1)["ffn_cost"]
    assert cost["flops"] == 2.5 * 6 * TINY["n_embd"] * TINY["ffn_hidden"]


def test_the_weight_of_an_auxiliary_loss(here: Path):
    """It is added as it is returned, averaged like the loss: the same run whatever the micro-batches
    and ranks; train_loss and val_loss leave it out, and its rows say it."""
    code = """
        class Mine(model.SwiGLU):
            def forward(self, x):
                y = super().forward(x)
                return y, 0.1 * y.square().mean()
    """
    for out, extra in (("a", []), ("b", ["--micro_batch_size=1"])):
        argv = [*flags(out_dir=out, ffn="mine", max_iters=6), *extra]
        done = train_with(here, code, *argv)
        done.works()
    a, b = rows(here / "a"), rows(here / "b")
    for key in ("train_loss", "aux_loss"):
        assert max(abs(a[step][key] - b[step][key]) for step in a) < 1e-5
    assert all(row["aux_loss"] > 0 for row in a.values())
    assert all("aux_loss" not in row for row in rows(here / "a", "val_loss").values())
    values = {"out_dir": "c", "ffn": "mine", "max_iters": 6, "micro_batch_size": 2}
    train_ranks(here, 2, code=MINE, **values)
    c = rows(here / "c")
    assert max(abs(a[step]["aux_loss"] - c[step]["aux_loss"]) for step in a) < 1e-5


# ---- flags that cannot work ---------------------------------------------------------------------

BAD_FLAGS = [
    ({"n_head": 3}, ["n_embd=32", "n_head"]),
    ({"n_head": 4, "n_kv_head": 3}, ["n_head=4", "n_kv_head=3"]),
    ({"n_head": 0}, ["n_head"]),
    ({"n_kv_head": 0}, ["n_kv_head"]),
    ({"n_layer": 0}, ["n_layer"]),
    ({"n_embd": 0}, ["n_embd"]),
    ({"ffn_hidden": 0}, ["ffn_hidden"]),
    ({"block_size": 0}, ["block_size"]),
    ({"block_size": -1}, ["block_size"]),
    ({"block_size": 5000, "val_tokens": 5000}, ["block_size", "5001"]),
    ({"batch_size": 6}, ["batch_size=6", "micro_batch_size", "try"]),
    ({"batch_size": 0}, ["batch_size"]),
    ({"micro_batch_size": 0}, ["micro_batch_size"]),
    ({"batch_size": 116, "micro_batch_size": 1}, ["115 windows", "--batch_size"]),
    ({"device": "tpu"}, ["device", "tpu"]),
    ({"device": "cuda:99"}, ["cuda:99"]),
    ({"device": "cpu:1"}, ["cpu:1"]),
    ({"dtype": "float16"}, ["dtype", "float16", "bfloat16"]),
    ({"optimizer": "adam"}, ["optimizer", "adamw"]),
    ({"schedule": "linear"}, ["schedule", "cosine"]),
    ({"init_from": "resumed"}, ["init_from", "resume"]),
    ({"init_from": "resume"}, ["no checkpoint", "ckpt.pt"]),
    ({"ffn": "swigul"}, ["swigul", "swiglu"]),
    ({"ffn": "sparseglu:k=2"}, ["k"]),
    ({"ffn": "sparseglu:kk=0.5"}, ["kk"]),
    ({"ffn": "sparseglu:grad=soft"}, ["soft", "hard"]),
    ({"ffn": ""}, ["ffn"]),
    ({"ffn": "multiscale", "ffn_hidden": 30}, ["30"]),
    ({"ffn_match": "size"}, ["ffn_match", "size"]),
    ({"val_tokens": 31}, ["val_tokens=31"]),
    ({"eval_interval": 0}, ["eval_interval"]),
    ({"save_interval": 0}, ["save_interval"]),
    ({"log_interval": 0}, ["log_interval"]),
    ({"max_iters": -1}, ["max_iters"]),
    ({"learning_rate": -1e-3}, ["learning_rate"]),
    ({"learning_rate": 1e-4, "min_lr": 1e-3}, ["--min_lr=0.001", "--learning_rate=0.0001"]),
    ({"learning_rate": "nan"}, ["learning_rate"]),
    ({"beta2": 1.0}, ["beta2"]),
    ({"beta1": 1.0}, ["beta1"]),
    ({"seed": -1}, ["seed"]),
    ({"data_seed": 2**40}, ["seed"]),
    ({"data_dir": "nowhere"}, ["nowhere", "python prepare_fineweb.py"]),
    ({"lr": 1}, ["--lr"]),
    ({"out_dir": "data/meta.json"}, ["--out_dir"]),
    ({"out_dir": "data/meta.json/below"}, ["--out_dir"]),
    ({"out_dir": "/proc/nothing/o"}, ["--out_dir"]),
]


@pytest.mark.parametrize("values, needles", BAD_FLAGS, ids=[str(values) for values, _ in BAD_FLAGS])
def test_bad_flags(here: Path, values: dict, needles: list[str]):
    """Each is refused in one line, before anything is written, with what to change."""
    argv = flags(**{"out_dir": "o", **values})
    refused(here, argv, *needles)
    if values.keys() & {"lr", "ffn_match", "data_dir"}:
        Run(here, argv).fails(*needles)
    assert not (here / "o").exists()


def test_bad_layouts(here: Path):
    """What cannot work with 2 ranks is said once, by rank 0."""
    code = f"configurator.PATIENCE = 1000\nrunpy.run_path({TRAIN!r}, run_name='__main__')"
    ranks = start_ranks(here, 2, out_dir="o", micro_batch_size=4, code=code)
    ranks[0].fails("--batch_size=4", "2 x 4", "--batch_size=8")
    ranks[1].process.kill()
    assert ranks[1].err == ""


def test_which_device_is_taken(monkeypatch):
    """As on machines with other devices than this one: their counts and names are made up, what
    train.py makes of them is not."""
    set_to = []
    monkeypatch.setattr(torch.cuda, "set_device", set_to.append)
    for n_cuda, mps, name, local_rank, device in [
        (0, False, "auto", None, "cpu"),
        (0, True, "auto", None, "mps"),
        (1, False, "auto", None, "cuda:0"),
        (1, True, "cpu", None, "cpu"),
        (4, False, "cuda:2", None, "cuda:2"),
        (8, False, "auto", 5, "cuda:5"),
        (8, False, "auto", 8, "needs GPU 8, and this process sees 8"),
        (2, False, "cuda:2", None, "--device=cuda:2 needs GPU 2, and this process sees 2"),
        (1, False, "mps", None, "needs Apple silicon"),
        (0, True, "auto", None, "mps"),
        (0, True, "auto", 0, "cpu"),  # nothing connects ranks on MPS
        (0, True, "mps", 0, "a single rank"),
        (0, "old", "auto", None, "torch 2.13"),
        (0, "old", "mps", None, "torch 2.13"),
    ]:
        monkeypatch.setattr(torch, "__version__", "2.12.1+cpu" if mps == "old" else "2.13.0+cpu")
        monkeypatch.setattr(torch.cuda, "device_count", lambda n=n_cuda: n)
        monkeypatch.setattr(torch.backends.mps, "is_available", lambda mps=mps: bool(mps))
        monkeypatch.delenv("RANK", raising=False)
        if local_rank is not None:
            monkeypatch.setenv("RANK", "0")
        try:
            found = str(train_py.pick_device(name, local_rank or 0))
        except train_py.UserError as e:
            found = str(e)
        assert device in found
    assert set_to == [0, 2, 5]
    monkeypatch.delenv("RANK", raising=False)

    names = {"NVIDIA A100-SXM4-80GB": (8, 0), "Tesla T4": (7, 5), "NVIDIA GeForce RTX 4090": (8, 9)}
    names |= {"NVIDIA H100 80GB HBM3": (9, 0), "NVIDIA H100 PCIe": (9, 0), "NVIDIA L4": (8, 9)}
    names |= {"NVIDIA H200": (9, 0), "NVIDIA H200 NVL": (9, 0)}
    names |= {"NVIDIA GeForce RTX 4090 Laptop GPU": (8, 9), "NVIDIA H100 80GB HBM3 MIG 1g.10gb": (9, 0)}
    peaks = []
    for name, capability in names.items():
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda _, name=name: name)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _, c=capability: c)
        cuda = torch.device("cuda", 0)
        assert train_py.use_bfloat16("auto", cuda) == (name != "Tesla T4")
        assert not train_py.use_bfloat16("float32", cuda)
        peaks.append(train_py.peak_flops(cuda))
    assert peaks == [312e12, None, 165e12, 989e12, 756e12, 121e12, 989e12, 835e12, None, None]
    for device in ("cpu", "mps"):
        assert not train_py.use_bfloat16("auto", torch.device(device))
        assert train_py.use_bfloat16("bfloat16", torch.device(device))


def test_no_steps_at_all(here: Path):
    """--max_iters=0 is a run that has ended: evaluated and saved."""
    train(here, out_dir="o", max_iters=0)
    assert load(here / "o")["step"] == 0
    assert list(losses(here / "o", "val_loss")) == [0]


def test_files_of_flags_and_help(here: Path):
    """A config file, flags after it, --help with each field's comment and with the FFNs."""
    (here / "c.py").write_text("\n".join(f"{k} = {v!r}" for k, v in TINY.items()))
    run = resume(here, "c.py", "--max_iters", "2", "--out_dir=o", "--compile=False")
    assert load(here / "o")["flags"]["max_iters"] == 2
    assert "step      2/2" in run.out
    text = resume(here, "--help").out
    assert all(name in text.split("FFNs:")[1] for name in FFNS)
    for field in dataclasses.fields(train_py.Config):
        assert re.search(rf"^  --{field.name}=.* \([\w|]+\) +\w", text, re.M), field.name


def test_compiling_that_is_turned_off_from_outside_is_refused(here: Path):
    """PyTorch would run in eager mode, and config.json would say that it compiled."""
    run = start(here, out_dir="o", max_iters=1, compile=True, env={"TORCHDYNAMO_DISABLE": "1"})
    run.fails("TORCHDYNAMO_DISABLE", "--compile=False")
    command = [sys.executable, TRAIN, *flags(out_dir="o", max_iters=1, compile=True)]
    env = os.environ | {"TORCH_COMPILE_DISABLE": "1"}  # PyTorch reads it at its import
    done = subprocess.run(command, cwd=here, env=env, capture_output=True, text=True, timeout=200)
    one_line(done.returncode, done.stderr, "TORCH_COMPILE_DISABLE", "--compile=False")
