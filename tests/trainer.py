"""
Runs the real train.py from outside: shards by an independent writer, processes, readers of results.

A process that imports PyTorch first costs seconds, and these tests need hundreds. So `start` forks
them from one that has imported it and nothing else (multiprocessing's fork server); each is still
a process of its own, with its own arguments, environment, output files, signals and exit code.
`shell` starts a plain one.
"""

from __future__ import annotations

import contextlib
import faulthandler
import gc
import io
import json
import multiprocessing
import os
import resource
import runpy
import signal
import socket
import subprocess
import sys
import textwrap
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
TRAIN = str(ROOT / "train.py")
BLOCK, BATCH = 32, 4

TINY = {
    "n_layer": 2, "n_head": 2, "n_kv_head": 1, "n_embd": 32, "block_size": BLOCK, "ffn_hidden": 64,
    "batch_size": BATCH, "micro_batch_size": BATCH, "max_iters": 40, "learning_rate": 1e-2,
    "warmup_iters": 5, "compile": False, "device": "cpu", "log_interval": 1,
    "data_dir": "data",
}  # fmt: skip


# ---- shards -------------------------------------------------------------------------------------


def write_shard(path: Path, tokens: np.ndarray, magic=20240520, version=1, count=None) -> None:
    """256 little-endian int32, then uint16."""
    header = np.zeros(256, "<i4")
    header[:3] = magic, version, len(tokens) if count is None else count
    path.write_bytes(header.tobytes() + np.asarray(tokens).astype("<u2").tobytes())


def tokens(n: int, seed: int) -> np.ndarray:
    """Ids below 257, the small ones more often, so that there is something to learn."""
    return (np.random.default_rng(seed).random(n) ** 2 * 257).astype(np.int64)


# Training: 93 windows of 32 tokens, none, 21, exactly 1. Validation: 25 and 12.
SIZES = {
    "x_train_000001.bin": 3000, "x_train_000002.bin": 20, "x_train_000003.bin": 700,
    "x_train_000004.bin": 33, "x_val_000000.bin": 801, "x_val_000001.bin": 400,
}  # fmt: skip


def make_data(folder: Path, sizes: dict[str, int] = SIZES, **meta) -> Path:
    folder.mkdir(parents=True)
    for i, (name, n) in enumerate(sizes.items()):
        write_shard(folder / name, tokens(n, i))
    shards = [{"name": name, "tokens": n} for name, n in sizes.items()]
    about = {"encoding": "bytes", "vocab_size": 257, "eot": 256, "source": "test"}
    about |= {"complete": True, "flags": {}, "shards": shards, **meta}
    (folder / "meta.json").write_text(json.dumps(about))
    return folder


# ---- processes ----------------------------------------------------------------------------------

FORK = multiprocessing.get_context("forkserver")
PRELOADED = ["torch", "torch._dynamo", "torch._inductor.compile_fx", "numpy"]
PRELOADED += ["torch.distributed.elastic.multiprocessing"]
FORK.set_forkserver_preload(PRELOADED)


def enter(cwd: str, out: str, err: str) -> None:
    """In a forked process: its folder and the files that take its output. What PyTorch has made at
    import is frozen, because each gc.collect of a run would walk through all of it."""
    gc.freeze()
    for fd, path in ((1, out), (2, err)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644), fd)
    sys.stdout = open(1, "w", closefd=False)  # noqa: SIM115
    sys.stderr = open(2, "w", closefd=False, buffering=1)  # noqa: SIM115
    os.chdir(cwd)


def _child(
    argv: list[str], env: dict, cwd: str, out: str, err: str, file_limit: int, code: str
) -> None:
    enter(cwd, out, err)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    faulthandler.register(signal.SIGUSR1)  # where it hangs, when it hangs
    os.environ.update(env)
    if file_limit:
        resource.setrlimit(resource.RLIMIT_FSIZE, (file_limit, file_limit))
    sys.argv = [TRAIN, *argv]
    sys.path.insert(0, str(ROOT))
    import configurator

    configurator.PATIENCE = 0.5  # no torchrun ends these ranks
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    try:
        exec(code) if code else runpy.run_path(TRAIN, run_name="__main__")
    except KeyboardInterrupt:  # only from an import: main turns it into 130 itself
        sys.exit(130)
    finally:
        sys.stdout.flush()


def flags(*given: str, **values: object) -> list[str]:
    return [f"--{k}={v}" for k, v in {**TINY, **values}.items()] + list(given)


class Run:
    """A train.py, or code that starts it, that is running, or has run."""

    count = 0

    def __init__(
        self, cwd: Path, argv: list[str], env=None, file_limit: int = 0, stdout=None, code: str = ""
    ):
        Run.count += 1
        self.out_path = Path(stdout or cwd / f"{Run.count}.out")
        self.err_path = cwd / f"{Run.count}.err"
        args = (argv, env or {}, str(cwd), str(self.out_path), str(self.err_path), file_limit, code)
        self.process = FORK.Process(target=_child, args=args)
        self.process.start()
        self.pid = self.process.pid

    @property
    def out(self) -> str:
        return self.out_path.read_text() if self.out_path.exists() else ""

    @property
    def err(self) -> str:
        return self.err_path.read_text() if self.err_path.exists() else ""

    def wait(self, timeout: float = 100) -> Run:
        self.process.join(timeout)
        if self.process.is_alive():
            self.kill(signal.SIGUSR1)
            time.sleep(1)
            self.process.kill()
            raise AssertionError(f"still running after {timeout} s\n{self.out}\n{self.err}")
        self.code = self.process.exitcode
        return self

    def wait_for(self, text: str, timeout: float = 60) -> None:
        """Until the run has printed this."""
        wait_until(lambda: text in self.out, timeout, lambda: f"{text!r} in {self.out} {self.err}")

    def kill(self, number: int) -> None:
        os.kill(self.pid, number)

    def works(self) -> Run:
        self.wait()
        assert self.code == 0, f"exit code {self.code}\n{self.out}\n{self.err}"
        return self

    def fails(self, *needles: str) -> str:
        """Exit code 1 and one line on stderr that says these things."""
        self.wait()
        return one_line(self.code, self.err, *needles)


def one_line(code: int, err: str, *needles: str) -> str:
    assert code == 1, f"exit code {code}\n{err}"
    assert "Traceback" not in err, err
    lines = err.splitlines()
    assert len(lines) == 1, err
    assert lines[0].startswith("error: "), err
    for needle in needles:
        assert needle in lines[0], f"{needle!r} not in {lines[0]}"
    return lines[0]


def call_here(main: Callable, cwd: Path, argv: list[str]) -> tuple[int, str, str]:
    """Run a script's main in this process. Returns (exit code, stdout, stderr)."""
    import configurator

    out, err, code = io.StringIO(), io.StringIO(), 0
    with (
        pytest.MonkeyPatch.context() as patch,
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
    ):
        patch.chdir(cwd)
        patch.setattr(sys, "argv", argv)
        try:
            configurator.run(main)
        except SystemExit as e:
            code = e.code or 0
            if isinstance(code, str):  # Python prints it and exits with 1
                print(code, file=err)
                code = 1
    return code, out.getvalue(), err.getvalue()


def refused(cwd: Path, argv: list[str], *needles: str) -> str:
    """As `Run(cwd, argv).fails(*needles)`, but in this process, in which nothing is changed: a run that
    is not refused ends where it would begin to catch signals, before its first step."""
    import train as train_py

    def begins():
        raise AssertionError("the run was not refused")

    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings(record=True) as warned:
        patch.setattr(train_py, "set_up", lambda device: None)
        patch.setattr(train_py, "catch_signals", begins)
        code, _, err = call_here(train_py.main, cwd, [TRAIN, *argv])
    assert not warned, [str(w.message) for w in warned]
    return one_line(code, err, *needles)


def start(
    cwd: Path, *given: str, env=None, file_limit: int = 0, stdout=None, code: str = "", **values
) -> Run:
    return Run(cwd, flags(*given, **values), env, file_limit, stdout, code)


def doing(what: str, at: str = "prepare_fineweb.locate") -> str:
    """Code for `start`: train.py, which does this at the start of each call of that function, the n-th
    time. (It calls locate before each step and read_windows for each batch.)"""
    return f"""
import os, runpy, sys, configurator, model, prepare_fineweb

def first(*args, plain={at}, calls=[], **more):
    calls.append(1)
    n = len(calls)
{textwrap.indent(what, "    ")}
    return plain(*args, **more)

{at} = first
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def train(cwd: Path, *given: str, **values) -> Run:
    """A tiny run to its end, which must be a good one."""
    return start(cwd, *given, **values).works()


PORTS = iter(range(20_000 + 500 * int(os.environ.get("PYTEST_XDIST_WORKER", "gw0")[2:]), 2**15))


def free_port() -> int:
    """One that neither another pytest worker nor the kernel, which starts above, gives to anyone."""
    for port in PORTS:
        with socket.socket() as s, contextlib.suppress(OSError):
            s.bind(("", port))
            return port
    raise AssertionError("no port is free")


def start_ranks(cwd: Path, world: int, *given: str, **values) -> list[Run]:
    """What torchrun does, without its own seconds: the environment that it gives to each rank."""
    env = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": str(world)}
    env |= {"LOCAL_WORLD_SIZE": str(world)}
    ranks = [{**env, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(world)]
    return [start(cwd, *given, env=env, **values) for env in ranks]


def train_ranks(cwd: Path, world: int, *given: str, **values) -> Run:
    """Rank 0, when all have ended well."""
    ranks = start_ranks(cwd, world, *given, **values)
    for run in ranks:
        run.works()
    return ranks[0]


TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]


def shell(cwd: Path, *command: str, **options) -> subprocess.Popen:
    """A plain process in a session of its own, its output in shell.out and shell.err."""
    with open(cwd / "shell.out", "wb") as out, open(cwd / "shell.err", "wb") as err:
        return subprocess.Popen(
            command, cwd=cwd, stdout=out, stderr=err, start_new_session=True, **options
        )


def workers(agent: int) -> list[int]:
    """Process ids of the ranks that a torchrun agent has started, by rank."""
    found = {}
    for path in Path("/proc").glob("[0-9]*"):
        try:
            parent = int((path / "stat").read_text().rsplit(")", 1)[1].split()[1])
            env = dict(e.partition("=")[::2] for e in (path / "environ").read_text().split("\0"))
        except (OSError, IndexError, ValueError):
            continue
        if parent == agent and "RANK" in env:
            found[int(env["RANK"])] = int(path.name)
    return [found[rank] for rank in sorted(found)]


def wait_until(done, timeout: float, what=lambda: "") -> None:
    end = time.monotonic() + timeout
    while not done():
        assert time.monotonic() < end, f"waited {timeout} s in vain for {what()}"
        time.sleep(0.05)


# ---- results ------------------------------------------------------------------------------------


def rows(run_dir: Path, key: str = "train_loss") -> dict[int, dict]:
    """The rows of log.jsonl that have this key, by step; each step once."""
    found = [json.loads(line) for line in (run_dir / "log.jsonl").read_text().splitlines()]
    found = [row for row in found if key in row]
    by_step = {row["step"]: row for row in found}
    assert len(by_step) == len(found), "a step was logged twice"
    return by_step


def losses(run_dir: Path, key: str = "train_loss") -> dict[int, float]:
    return {step: row[key] for step, row in rows(run_dir, key).items()}


def load(run_dir: Path) -> dict:
    return torch.load(run_dir / "ckpt.pt", map_location="cpu", weights_only=True)


def same_bits(a: object, b: object) -> bool:
    """Equal, tensors to the bit, whatever the nesting."""
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same_bits(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same_bits, a, b))
    return type(a) is type(b) and a == b


def assert_same_run(a: Path, b: Path) -> None:
    """Weights, optimizer state, step and training losses of two runs, bit for bit."""
    one, two = load(a), load(b)
    for key in ("step", "model", "optimizers", "shards"):
        assert same_bits(one[key], two[key]), f"{key} differs"
    first, second = losses(a), losses(b)
    common = first.keys() & second.keys()
    assert max(first) in common
    assert {step: first[step] for step in common} == {step: second[step] for step in common}
