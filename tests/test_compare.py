"""
experiments/compare.py from outside. Real runs of train.py test what it starts, stops and resumes;
made-up logs test what it computes, and every figure is computed again here from those logs.
"""

from __future__ import annotations

import inspect
import json
import lzma
import math
import multiprocessing
import os
import re
import runpy
import shlex
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
from dataclasses import asdict
from pathlib import Path

import matplotlib
import numpy as np
import pytest
import torch
from scipy import stats
from trainer import FORK, PRELOADED, ROOT, TINY, call_here, enter, make_data, one_line, rows, wait_until

import configurator
import train
from configurator import UserError

sys.path.append(str(ROOT / "experiments"))
import block_analysis
import compare

SCRIPT = str(ROOT / "experiments" / "compare.py")
FORK.set_forkserver_preload([*PRELOADED, "scipy.stats", "matplotlib.pyplot"])


def _child(argv: list[str], cwd: str, out: str, err: str) -> None:
    enter(cwd, out, err)
    sys.argv = [SCRIPT, *argv]
    import bench

    bench.SWEEP = 1
    try:
        runpy.run_path(SCRIPT, run_name="__main__")
    finally:
        sys.stdout.flush()


def begin(cwd: Path, *argv: str) -> multiprocessing.Process:
    """Start compare.py, forked from a process that has PyTorch. Its output goes to call.out and .err."""
    for name in ("call.out", "call.err"):
        (cwd / name).unlink(missing_ok=True)
    args = (list(argv), str(cwd), str(cwd / "call.out"), str(cwd / "call.err"))
    process = FORK.Process(target=_child, args=args)
    process.start()
    return process


def call(cwd: Path, *argv: str) -> tuple[int, str, str]:
    """Run compare.py. Returns (exit code, stdout, stderr). A report is made in this process: it starts
    and sets up nothing."""
    if "--report" not in argv:
        process = begin(cwd, *argv)
        process.join(200)
        assert process.exitcode is not None, "still running"
        return process.exitcode, (cwd / "call.out").read_text(), (cwd / "call.err").read_text()
    with matplotlib.rc_context():
        return call_here(compare.main, cwd, [SCRIPT, *argv])


def works(cwd: Path, *argv: str) -> str:
    code, out, err = call(cwd, *argv)
    assert code == 0, out + err
    return out


def fails(cwd: Path, *argv: str, needles: tuple[str, ...]) -> str:
    code, _, err = call(cwd, *argv)
    return one_line(code, err, *needles)


# ---- real runs ----------------------------------------------------------------------------------


def write_config(cwd: Path, **values) -> None:
    make_data(cwd / "data")
    values = {**TINY, "data_dir": "data", "val_tokens": 256, "n_layer": 1, **values}
    (cwd / "c.py").write_text("".join(f"{k} = {v!r}\n" for k, v in values.items()))


def test_runs_skips_reports_a_failure_and_tries_it_again(tmp_path):
    """One of four runs fails. It is reported with the last line of its stderr, the others finish, and
    the same command later does only the missing run."""
    write_config(tmp_path, max_iters=6, eval_interval=3)
    out = tmp_path / "out" / "t"
    (out / "geglu-s1").mkdir(parents=True)
    (out / "geglu-s1" / "ckpt.pt").write_bytes(b"garbage")
    command = ["c.py", "--ffn=geglu", "--seeds=2", "--jobs=2", "--name=t", "--max_iters", "4"]
    command += ["--horizons=False"]
    code, printed, err = call(tmp_path, *command)
    assert code == 1
    assert "Traceback" not in err
    assert re.search(r"geglu-s1: FAILED: error: no checkpoint can be loaded from .*ckpt\.pt", printed)
    assert "4 runs: 0 done" in printed
    table = json.loads((out / "compare.json").read_text())
    assert [(row["ffn"], row["n"]) for row in table["rows"]] == [("swiglu", 2), ("geglu", 1)]
    assert table["rows"][1]["verdict"] == "too few seeds"
    assert table["rows"][1]["p"] is None

    made = ["swiglu-s0", "swiglu-s1", "geglu-s0"]
    for name in made:
        flags = json.loads((out / name / "config.json").read_text())["flags"]
        seed = int(name[-1])
        assert (flags["seed"], flags["data_seed"], flags["ffn"]) == (seed, seed, name[:-3])
        assert flags["max_iters"] == 4  # the flag, passed on, wins over the file
    stamps = {name: (out / name / "log.jsonl").stat().st_mtime_ns for name in made}
    (out / "geglu-s1" / "ckpt.pt").unlink()
    printed = works(tmp_path, *command)
    assert "4 runs: 3 done, 0 to go on with, 1 to start" in printed
    assert stamps == {name: (out / name / "log.jsonl").stat().st_mtime_ns for name in made}

    row = json.loads((out / "compare.json").read_text())["rows"][1]
    final = {(f, s): rows(out / f"{f}-s{s}", "val_loss")[4]["val_loss"]
             for f in ("swiglu", "geglu") for s in (0, 1)}  # fmt: skip
    differences = [final["geglu", s] - final["swiglu", s] for s in (0, 1)]
    assert row["difference"] == pytest.approx(np.mean(differences), abs=1e-12)
    assert row["n"] == 2
    assert (out / "compare.png").stat().st_size > 10_000
    assert (out / "compare.md").read_text() in printed

    # other flags under the same name would mix two comparisons
    fails(tmp_path, *command, "--learning_rate=1e-3", needles=("--learning_rate", "--name"))


def test_a_signal_stops_the_runs_and_the_same_command_goes_on(tmp_path):
    """After SIGINT to compare.py alone its run finishes the step and saves, no process stays and the
    exit code is 130. Then the run is resumed, and no step is logged twice or lost."""
    steps = 600
    write_config(tmp_path, max_iters=steps, eval_interval=1000, save_interval=10_000)
    command = ["nohup", sys.executable, SCRIPT, "c.py", "--ffn=swiglu", "--seeds=1", "--name=t"]
    command += ["--horizons=False"]
    run_dir = tmp_path / "out" / "t" / "swiglu-s0"
    with open(tmp_path / "printed", "w") as f:
        process = subprocess.Popen(command, cwd=tmp_path, stdout=f, stderr=f)
    try:
        log = run_dir / "log.jsonl"
        wait_until(lambda: log.exists() and log.read_text().count("\n") > 20, 150)
        status = Path(f"/proc/{process.pid}/status").read_text()
        assert int(re.search(r"SigIgn:\s*(\w+)", status)[1], 16) & 1  # SIGHUP, as nohup has it
        process.send_signal(signal.SIGINT)
        code = process.wait(100)
    finally:
        process.kill()
    assert code == 130, (tmp_path / "printed").read_text()
    assert "stopped with 0 of 1 runs done" in (tmp_path / "printed").read_text()
    assert (run_dir / "ckpt.pt").exists()
    cut = rows(run_dir)
    assert 20 <= max(cut) < steps
    time.sleep(0.3)
    assert rows(run_dir) == cut  # nothing is running any more
    assert "stopped at step" in (run_dir / "train.txt").read_text()

    assert "0 done, 1 to go on with, 0 to start" in works(tmp_path, *command[3:])
    whole = rows(run_dir)
    assert sorted(whole) == list(range(1, steps + 1))
    assert {step: whole[step] for step in cut} == cut


# On SIGTERM srun kills what it started at once; other signals it passes on.
SRUN = """
import signal, subprocess, sys
process = subprocess.Popen(sys.argv[1:])
signal.signal(signal.SIGTERM, lambda *_: process.kill())
signal.signal(signal.SIGUSR1, lambda *_: process.send_signal(signal.SIGUSR1))
sys.exit(process.wait())
"""


def test_a_signal_stops_runs_behind_a_launcher(tmp_path):
    """They finish the step and save, although srun kills what it started when it gets SIGTERM."""
    write_config(tmp_path, max_iters=5000, eval_interval=10_000, save_interval=10_000)
    (tmp_path / "srun.py").write_text(SRUN)
    command = ["c.py", "--ffn=swiglu", "--seeds=1", "--horizons=False", "--name=t"]
    run_dir = tmp_path / "out" / "t" / "swiglu-s0"
    process = begin(tmp_path, *command, f"--launch={shlex.quote(sys.executable)} srun.py")
    try:
        log = run_dir / "log.jsonl"
        wait_until(lambda: log.exists() and log.read_text().count("\n") > 5, 150)
        os.kill(process.pid, signal.SIGINT)
        process.join(100)
    finally:
        process.kill()
    assert process.exitcode == 130
    assert "stopped with 0 of 1 runs done" in (tmp_path / "call.out").read_text()
    assert (run_dir / "ckpt.pt").exists()
    assert "stopped at step" in (run_dir / "train.txt").read_text()


def test_a_launcher_precision_prices_and_runs_that_diverge(tmp_path):
    """Every run goes through the launcher, --precision adds seeds up to --seeds, step times are measured
    once, and a run that diverges is a result."""
    write_config(tmp_path, max_iters=4, eval_interval=4)
    (tmp_path / "launch.sh").write_text('echo "$@" >> launched; exec "$@"')
    command = ["c.py", "--ffn=geglu", "--name=a b", "--launch=sh launch.sh", "--jobs=2", "--seeds=1"]
    out = works(tmp_path, *command, "--precision=1e-6")
    assert len((tmp_path / "launched").read_text().splitlines()) == 4  # 2 rows, 2 horizons
    assert "1 seeds: half-widths up to" in out
    assert " degrees of freedom (asked: 1e-06, 20)" in out
    assert "timing steps of geglu" in out
    record = json.loads((tmp_path / "out" / "a b" / "compare.json").read_text())
    assert [h["tokens"] for h in record["exchange"]["horizons"]] == [384, 512, 768]
    assert 0.2 < record["rows"][1]["step_time_ratio"] < 5
    assert "--name=a b'" in record["command"]  # quoted, to be used again
    again = works(tmp_path, *command)
    assert "4 runs: 4 done" in again
    assert "timing" not in again

    command = ["c.py", "--ffn=swiglu", "--seeds=1", "--name=d", "--learning_rate=1e38"]
    assert "diverged in 1 of 1" in works(tmp_path, *command, "--horizons=False")
    assert "1 runs: 1 done" in works(tmp_path, *command, "--horizons=False")


def test_the_plan(tmp_path):
    """--plan prints runs, hours and the expected precision, and starts or writes nothing."""
    write_config(tmp_path, max_iters=10)
    out = works(tmp_path, "c.py", "--ffn=geglu", "--seeds=8", "--noise=0.02", "--plan")
    assert re.search(r"32 runs of 2 rows, about [\d.e-]+ hours", out)
    widths = {int(n): float(width) for n, width in re.findall(r"^ +(\d+) +([\d.]+) ", out, re.M)}
    assert widths[8] == pytest.approx(stats.t.ppf(0.975, 7) * 0.02 * math.sqrt(2 / 8), abs=1e-4)
    assert not (tmp_path / "out").exists()
    make = "prepare_fineweb.py --encoding=bytes --out_dir=none"
    missing = ("--data_dir=none", "--prepare=--encoding=bytes")
    fails(tmp_path, "c.py", "--ffn=geglu", *missing, "--plan", needles=("none has no shards yet", make))


def test_an_error_that_all_runs_would_make_comes_before_any_starts(tmp_path, monkeypatch):
    """Such are typos in flags, specs and papers, missing data, and flags that compare.py sets itself.
    One is tested from outside, the rest in this process."""
    write_config(tmp_path, max_iters=2)
    monkeypatch.chdir(tmp_path)
    fails(tmp_path, "c.py", "--ffn=gegluu", needles=("did you mean geglu",))
    for argv, needles in [
        (["c.py", "--ffn=geglu", "--learnin_rate=1"], ("did you mean learning_rate",)),
        (["c.py", "--ffn=geglu", "--sedes=3"], ("did you mean seeds",)),
        (["c.py", "--ffn=geglu", "--max_iters=x"], ("--max_iters", "whole number")),
        (["c.py", "--ffn=asg:thresh=neuron"], ("did you mean threshold",)),
        (["c.py", "--paper=asgg"], ("did you mean asg",)),
        (["c.py"], ("--ffn", "--paper")),
        (["c.py", "--ffn=geglu", "--seed=3"], ("--seed ", "--seeds")),
        (["c.py", "--ffn=geglu", "--out_dir=mine"], ("--out_dir ", "--name")),
        (["c.py", "--ffn=geglu", "--init_from=resume"], ("--init_from ",)),
        (["c.py", "--ffn=geglu", "--seeds=0"], ("--seeds=0",)),
        (["c.py", "--ffn=geglu", "--max_iters=0"], ("--max_iters=0",)),
        (["c.py", "--ffn=geglu", "--lr_sweep=1e-3,fast"], ("--lr_sweep",)),
        (["c.py", "--ffn=geglu", "--lr_sweep=1e-3,nan"], ("--lr_sweep",)),
        (["c.py", "--ffn=geglu", "--lr_sweep=1e-3", "--learning_rate=0"], ("--learning_rate",)),
        (["c.py", "--ffn=geglu", "--init_sweep=0.02,wide"], ("--init_sweep",)),
        (["c.py", "--ffn=geglu", "--init_sweep=0.02,-1"], ("ffn_init_std must be above 0",)),
        (["c.py", "--ffn=geglu", "--ffn_match=wide"], ("--ffn_match=wide",)),
        (["c.py", "--ffn=geglu", "--batch_size=5"], ("--batch_size=5",)),
        (["c.py", "--ffn=geglu", "--data_dir=nowhere"], ("nowhere",)),
        (["nofile.py", "--ffn=geglu"], ("nofile.py",)),
        (["c.py", "--ffn=geglu", "--baseline=swigluu"], ("did you mean swiglu",)),
        (["c.py", "--ffn=geglu", "--precision=1e-9"], ("--precision=1e-09", "1e-06")),
        (["c.py", "--ffn=geglu", "--launch=no-such-launcher -n 1"], ("no-such-launcher",)),
        (["c.py", "--ffn=geglu", "--launch=srun '"], ("--launch", "check its quotes")),
        (["c.py", "--ffn=geglu", "--launch= "], ("no such program",)),
        (["c.py", "--ffn=gegluu", """--launch=sh -c "it's" """], ("did you mean geglu",)),
        (["c.py", "--ffn=geglu", "--archive=x.zip"], ("--archive=x.zip", ".tar.xz")),
        (["--report", "nowhere"], ("no finished run",)),
        (["--report"], ("--report has no folder",)),
        (["--report", "nowhere", "--seeds=2"], ("--seeds",)),
        (["c.py", "--report", "nowhere"], ("--max_iters",)),
    ]:
        monkeypatch.setattr(sys, "argv", ["compare.py", *argv])
        with pytest.raises(SystemExit) as stop:
            configurator.run(compare.main)
        one_line(1, str(stop.value.code), *needles)
        assert not (tmp_path / "out").exists(), argv


def planned(monkeypatch, tmp_path: Path, *argv: str) -> dict[str, dict[str, str]]:
    """The runs that a command line would start: {folder: flags}."""
    monkeypatch.chdir(tmp_path)

    # A train.txt in the current folder, a corpus perhaps, is not a run's.
    monkeypatch.setattr(compare, "printed", lambda folder: pytest.fail(f"read {folder}/train.txt"))
    cfg, base, _ = compare.read_command(["--horizons=False", *argv])
    return {run.dir.removeprefix("out/"): run.flags for run in compare.plan(cfg, base)}


def test_numbers_of_three_digits(monkeypatch):
    """A number that rounding carries to the next unit is written in that unit."""
    texts = {0: "0.00", 7: "7.00", 999: "999", 999.7: "1.00K", 1000: "1.00K", 999_499: "999K",
             999_700: "1.00M", 12_345_678: "12.3M", 2.5e12: "2.50T"}  # fmt: skip
    assert {x: compare.big(x) for x in texts} == texts
    assert compare.big(1500, 1000) == "1.50K (1.50x)"


def test_what_is_planned(monkeypatch, tmp_path):
    """SwiGLU is planned always and once, --ffn_match gives the widths, a sweep has the same rates for
    all with min_lr in proportion, and --paper gives each row of that paper's table."""
    write_config(tmp_path, max_iters=4, min_lr=1e-3)
    runs = planned(monkeypatch, tmp_path, "c.py", "--ffn=asg,geglu", "--ffn_match=both", "--seeds=2")
    # GEGLU has SwiGLU's parameters at SwiGLU's width: one run, not two
    names = ["swiglu-s0", "asg-s0", "asg-s0-params", "geglu-s0"]
    assert list(runs) == [f"compare/{n.replace('s0', s)}" for s in ("s0", "s1") for n in names]
    assert runs["compare/asg-s1-params"]["ffn_match"] == "params"
    assert runs["compare/asg-s1"]["ffn_match"] == "hidden"

    runs = planned(monkeypatch, tmp_path, "c.py", "--ffn=asg", "--ffn_match=params", "--seeds=1")
    assert list(runs) == ["compare/swiglu-s0", "compare/asg-s0-params"]

    # two spellings of one FFN are one run
    runs = planned(monkeypatch, tmp_path, "c.py", "--ffn=sparseglu:p=64,swiglu,sparseglu", "--seeds=1")
    assert list(runs) == ["compare/swiglu-s0", "compare/sparseglu:p=64-s0"]

    argv = ["c.py", "--ffn=geglu", "--seeds=1", "--lr_sweep=3e-3,1e-2,0.003", "--name=n"]
    runs = planned(monkeypatch, tmp_path, *argv)
    assert list(runs) == ["n/swiglu-s0-lr0.003", "n/geglu-s0-lr0.003",
                          "n/swiglu-s0-lr0.01", "n/geglu-s0-lr0.01"]  # fmt: skip
    assert [run["learning_rate"] for run in runs.values()] == [3e-3, 3e-3, 1e-2, 1e-2]
    assert [run["min_lr"] for run in runs.values()] == pytest.approx([3e-4, 3e-4, 1e-3, 1e-3])

    argv = ["c.py", "--ffn=geglu", "--seeds=1", "--init_sweep=0.02,0.06", "--lr_sweep=1e-3", "--name=n"]
    runs = planned(monkeypatch, tmp_path, *argv)
    names = [f"n/{spec}-s0-lr0.001-std{std}" for std in (0.02, 0.06) for spec in ("swiglu", "geglu")]
    assert list(runs) == names
    assert [run["ffn_init_std"] for run in runs.values()] == [0.02, 0.02, 0.06, 0.06]

    # SwiGLU's other lengths have its whole schedule, and a sweep has none.
    steps = ["--max_iters=100", "--warmup_iters=10", "--horizons=True"]
    runs = planned(monkeypatch, tmp_path, "c.py", "--ffn=geglu", "--seeds=1", *steps)
    names = ("ffn", "max_iters", "lr_decay_iters", "warmup_iters")
    schedules = {tuple(run[name] for name in names) for run in runs.values()}
    lengths = [("swiglu", n, n, n // 10) for n in (100, 70, 140)]
    assert schedules == {*lengths, ("geglu", 100, 100, 10)}
    for sweep in ("--init_sweep=0.02,0.06", "--lr_sweep=1e-3,3e-3"):
        runs = planned(monkeypatch, tmp_path, "c.py", "--ffn=geglu", "--seeds=1", *steps, sweep)
        assert {run["max_iters"] for run in runs.values()} == {100}

    runs = planned(monkeypatch, tmp_path, "c.py", "--ffn=asg", "--seeds=1", "--learning_rate=0")
    assert [run["learning_rate"] for run in runs.values()] == [0, 0]

    specs = {
        "asg": ["asg", "asg:threshold=fixed:tau=0.1", "asg:threshold=neuron", "asg:sparse=False",
                "multiscale", "dualgated"],
        "sparsegated": ["sparsegated", "sparsegated:split=False", "sparsegated:gate=False",
                        "sparsegated:k=0.5"],
        "dynamicgeglu": ["dynamicgeglu", "isogmlp"],
        "sparseglu": ["sparseglu", "geglu"],
        "dsg": ["dsg"],
    }  # fmt: skip
    for paper, expected in specs.items():
        runs = planned(monkeypatch, tmp_path, f"--paper={paper}", "c.py", "--seeds=1")
        assert [run["ffn"] for run in runs.values()] == ["swiglu", *expected]


def test_the_machine_is_shared_out(monkeypatch, tmp_path):
    """--jobs divides the threads and the GPUs; a job with several GPUs runs by torchrun."""
    monkeypatch.chdir(tmp_path)

    started = []
    monkeypatch.setattr(compare.subprocess, "Popen", lambda c, env, **kw: started.append((c, env)))
    monkeypatch.setenv("OMP_NUM_THREADS", "8")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    run = compare.Run("run", asdict(train.Config()))

    def commands(gpus: int, jobs: int) -> list[tuple[bool, str, str | None]]:
        monkeypatch.setattr(compare.torch.cuda, "device_count", lambda: gpus)
        started.clear()
        for slot in range(jobs):
            compare.start(run, compare.Config(jobs=jobs), slot)
        return [(f"--nproc_per_node={gpus // jobs}" in command, env["OMP_NUM_THREADS"],
                 env.get("CUDA_VISIBLE_DEVICES")) for command, env in started]  # fmt: skip

    assert commands(gpus=0, jobs=1) == [(False, "8", None)]
    assert commands(gpus=0, jobs=4) == [(False, "2", None)] * 4
    assert commands(gpus=1, jobs=1) == [(False, "8", "0")]
    assert commands(gpus=4, jobs=1) == [(True, "2", "0,1,2,3")]
    assert commands(gpus=4, jobs=2) == [(True, "2", "0,1"), (True, "2", "2,3")]
    assert [c[2] for c in commands(gpus=2, jobs=3)] == ["0", "1", "0"]
    compare.start(run, compare.Config(launch="env", jobs=2), 0)  # the launcher gives a whole machine
    assert "--nproc_per_node=gpu" in started[-1][0]
    (passed_on,) = (word for word in started[-1][0] if word.startswith("--signals-to-handle="))
    assert "SIGUSR1" in passed_on
    compare.start(run, compare.Config(launch="env", device="cpu"), 0)
    assert not any("nproc" in word for word in started[-1][0])
    monkeypatch.setenv("OMP_NUM_THREADS", "6,2")  # OpenMP's syntax for nested levels
    assert commands(gpus=0, jobs=2) == [(False, "3", None)] * 2
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5,7")
    assert [c[2] for c in commands(gpus=2, jobs=2)] == ["5", "7"]


def test_a_run_that_was_killed_and_an_error_between_runs(tmp_path, monkeypatch):
    """The signal is named. An error of ours ends the runs that go on."""
    assert compare.why_failed(str(tmp_path), -9) == "killed by SIGKILL"
    ended = []

    class Process:
        def poll(self):
            return None

        def terminate(self):
            ended.append(1)

    def start(planned, cfg, slot):
        if slot:
            raise UserError("no space")
        return Process()

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(compare, "start", start)
    cfg = compare.Config(ffn="geglu", seeds=1, horizons=False, prepare="x", jobs=2)
    with pytest.raises(UserError, match="no space"):
        compare.run_all(compare.plan(cfg, train.Config(max_iters=4)), cfg)
    assert ended == [1]


def test_waiting_reads_no_logs(monkeypatch, tmp_path):
    """However long a run takes, its log is read only before it starts and after it has ended."""
    monkeypatch.chdir(tmp_path)

    read, polls = [], iter([None] * 50 + [0])

    class Process:
        def poll(self):
            return next(polls)

    def start(planned, *rest):
        make_run(Path(planned.dir), [6, 3, 2], **dict(planned.flags, out_dir=planned.dir))
        return Process()

    read_run = compare.read_run
    monkeypatch.setattr(compare, "read_run", lambda folder: read.append(folder) or read_run(folder))
    monkeypatch.setattr(compare, "start", start)
    monkeypatch.setattr(compare.time, "sleep", lambda seconds: None)
    cfg = compare.Config(ffn="swiglu", seeds=1, horizons=False, prepare="x")
    assert compare.run_all(compare.plan(cfg, train.Config(max_iters=4)), cfg) == 0
    assert len(read) == 2


@pytest.mark.slow
def test_torchrun_on_two_ranks(tmp_path):
    """The command for several GPUs works: here with two pretended GPUs and two real CPU ranks."""
    write_config(tmp_path, max_iters=3, device="auto", micro_batch_size=2)
    code = (f"import sys, runpy, torch; torch.cuda.device_count = lambda: 2; sys.argv[0] = {SCRIPT!r}; "
            f"runpy.run_path({SCRIPT!r}, run_name='__main__')")  # fmt: skip
    command = [sys.executable, "-c", code, "c.py", "--ffn=swiglu", "--seeds=1", "--name=t"]
    command += ["--horizons=False"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=250)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "device  cpu x 2" in (tmp_path / "out" / "t" / "swiglu-s0" / "train.txt").read_text()


# ---- made-up runs -------------------------------------------------------------------------------


def make_run(folder: Path, losses: list[float], active=None, lr=1e-5, **flags) -> None:
    """Write a finished run, by default of 4 steps, with val losses at its first, middle, last step. A
    folder's name of FFN-sSEED gives these, and a learning rate its min_lr."""
    folder.mkdir(parents=True)
    if named := re.match(r"(.*)-s(\d+)", folder.name):
        flags = {"ffn": named[1], "seed": int(named[2]), "data_seed": int(named[2])} | flags
    end = flags.setdefault("max_iters", 4)
    if "learning_rate" in flags:
        flags.setdefault("min_lr", flags["learning_rate"] / 10)
    flags = {"lr_decay_iters": end, "batch_size": 2, "block_size": 8, "n_layer": 2, "warmup_iters": 0,
             "n_head": 2, "n_kv_head": 1, "n_embd": 128, "ffn_hidden": 256, **flags}  # fmt: skip
    resolved = asdict(train.Config(**{"out_dir": str(folder), **flags}))
    made = {"flags": resolved, "torch": "2", "device": "cpu", "git_commit": "abc", "vocab_size": 384}
    (folder / "config.json").write_text(json.dumps(made))
    log = []
    for step, loss in zip((0, end // 2, end), losses):
        if step:
            log.append({"step": step, "tokens": 16 * step, "train_loss": loss, "lr": lr})
        row = {"step": step, "tokens": 16 * step, "val_loss": loss}
        log.append(row if active is None else row | {"active": active})
    (folder / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in log))


def make_runs(folder: Path, effects: dict[str, float], seeds: int, noise: float = 0.004, **flags):
    """Write runs with final losses seed + effect + noise. Returns {spec: losses by seed}."""
    rng = np.random.default_rng(0)
    shared, final = rng.normal(0, 0.05, seeds), {}
    for spec, effect in effects.items():
        final[spec] = 2 + shared + effect + rng.normal(0, noise, seeds)
        for s, loss in enumerate(final[spec].tolist()):
            # an earlier loss is lower, and must not be picked
            make_run(folder / f"{spec}-s{s}", [6.0, loss - 0.5, loss], **flags)
    return final


def report(cwd: Path, *argv: str) -> tuple[dict[str, dict], str]:
    """compare.json's rows by spec (and the width's match), and what was printed."""
    out = works(cwd, *argv, "--out=report", "--report", *sorted(map(str, cwd.glob("out/*"))))
    found = json.loads((cwd / "report" / "compare.json").read_text())["rows"]
    return {row["ffn"] + " " + row["match"]: row for row in found}, out


def test_rows_that_are_equal_to_each_other_count_once():
    """A copy of a row, perhaps with other seeds, narrows no interval, and is judged as its original."""
    table = np.random.default_rng(0).normal(0, 0.01, (3, 4))
    alone, noise = compare.blocks.analyse(table)
    whole, late = table[1].copy(), table[1].copy()
    table[1, 3] = late[0] = np.nan
    found, found_noise = compare.blocks.analyse(np.vstack([table, whole, late]))
    assert found_noise == noise
    assert found == [*alone, alone[1], alone[1]]
    assert found[1] is not found[3]


def test_runs_of_no_step_and_rows_without_a_loss_have_no_difference(tmp_path):
    make_run(tmp_path / "zero", [6], max_iters=0)
    fails(tmp_path, "--report", "zero", needles=("no finished run",))
    assert all(row["difference"] is None for row in compare.blocks.analyse(np.full((2, 2), np.nan))[0])
    for spec in ("swiglu", "geglu"):
        for s in (0, 1):
            make_run(tmp_path / "out" / f"{spec}-s{s}", [6, 3, math.nan])
    found, out = report(tmp_path)
    assert found["geglu hidden"]["difference"] is None
    assert found["geglu hidden"]["verdict"] == "diverged in 2 of 2"
    assert "+0.0000" not in out


def test_width_and_cost_are_those_of_the_run_and_not_of_todays_class(tmp_path):
    """config.json has them; of runs that older versions made they are worked out anew."""
    for spec in ("swiglu", "asg"):
        for s in range(3):
            folder = tmp_path / "out" / f"{spec}-s{s}"
            make_run(folder, [6, 3, 2 + 0.1 * s], ffn_match="flops")
            made = json.loads((folder / "config.json").read_text())
            cost = {"params": 5, "flops": 7, "ideal_flops": 3}
            if spec == "asg":
                made |= {"hidden": 40, "ffn_cost": cost, "total_params": 99}
                (folder / "config.json").write_text(json.dumps(made))
    found, _ = report(tmp_path)
    row = found["asg flops"]
    names = ("hidden", "params", "flops", "ideal_flops", "total_params")
    assert [row[name] for name in names] == [40, 10, 14, 6, 99]


def test_one_row_is_the_paired_t_test(tmp_path):
    """Difference, interval and p of one FFN equal scipy's for the losses in the logs, and a seed that
    the baseline lacks changes none of them."""
    final = make_runs(tmp_path / "out", {"swiglu": 0, "geglu": -0.004}, seeds=5)
    make_run(tmp_path / "out" / "extra", [6, 3, 2.5], ffn="geglu", seed=9, data_seed=9)
    found, _ = report(tmp_path)
    assert list(found) == ["swiglu hidden", "geglu hidden"]
    test = stats.ttest_rel(final["geglu"], final["swiglu"])
    interval = test.confidence_interval(0.95)
    row = found["geglu hidden"]
    assert row["n"] == 6
    assert row["difference"] == pytest.approx((final["geglu"] - final["swiglu"]).mean(), abs=1e-12)
    assert row["p"] == pytest.approx(test.pvalue, rel=1e-9)
    assert (row["low"], row["high"]) == pytest.approx((interval.low, interval.high), rel=1e-9)
    assert found["swiglu hidden"]["val_loss"] == pytest.approx(final["swiglu"].mean(), abs=1e-12)
    assert found["swiglu hidden"]["std"] == pytest.approx(final["swiglu"].std(ddof=1), rel=1e-9)


def test_many_rows_agree_with_scipy():
    """With many seeds, which have no effect of their own here, p and intervals are close to Dunnett's.
    The critical value is that of scipy's multivariate t."""
    table = np.random.default_rng(5).normal(0, 1, (5, 120)) + np.array([[0, 0.1, 0.25, 0.3, -0.05]]).T
    found, noise = block_analysis.analyse(table)
    expected = stats.dunnett(*table[1:], control=table[0], rng=np.random.default_rng(0))
    interval = expected.confidence_interval(0.95)
    assert noise["df"] == 4 * 119
    assert [row["p"] for row in found[1:]] == pytest.approx(expected.pvalue, abs=0.02)
    assert [row["low"] for row in found[1:]] == pytest.approx(interval.low, abs=0.03)

    mask = np.ones((5, 4), bool)
    mask[3, 2:] = mask[1, 0] = False
    _, contrasts, df = block_analysis.design(mask.tobytes(), 5)
    unit = contrasts[1:] / np.linalg.norm(contrasts[1:], axis=1, keepdims=True)
    least = block_analysis.smallest_p(mask.tobytes(), 5)[block_analysis.DRAWS // 20]
    edge = np.full(4, stats.t.isf(least / 2, df))
    law = stats.multivariate_t(np.zeros(4), unit @ unit.T, df, seed=0)
    assert law.cdf(edge, lower_limit=-edge, maxpts=200_000) == pytest.approx(0.95, abs=0.003)


def committed_table() -> tuple[list[dict], np.ndarray]:
    """The rows and the losses (rows, seeds) of the committed comparison."""
    path = ROOT / "experiments" / "results" / "webtext" / "compare.json"
    found = json.loads(path.read_text())["rows"]
    table = np.full((len(found), 5), np.nan)
    for row, losses in zip(found, table):
        for r in row["runs"]:
            losses[r["seed"]] = r["val_loss"]
    return found, table


def test_the_committed_losses():
    """Of 22 rows with 89 losses eight are worse than SwiGLU, and asg:sparse=False equals it. The row
    asg:threshold=neuron, which equals asg, adds nothing to the noise."""
    found, table = committed_table()
    results, noise = block_analysis.analyse(table)
    assert noise == {"std": pytest.approx(0.0224, abs=5e-5), "df": 58}
    clear = {f"{row['ffn']} {row['match']}": round(result["difference"], 4)
             for row, result in zip(found, results)
             if result["low"] is not None and not result["low"] <= 0 <= result["high"]}  # fmt: skip
    assert clear == {
        "sparsegated:split=False hidden": 0.0769, "dsg params": 0.0641, "dsg hidden": 0.0464,
        "sparsegated:k=0.5 hidden": 0.0664, "sparseglu params": 0.0504, "sparsegated hidden": 0.0492,
        "sparsegated params": 0.0482, "isogmlp hidden": 0.0519,
    }  # fmt: skip
    assert [row["ffn"] for row, result in zip(found, results) if result["equal"]] == ["asg:sparse=False"]
    for result in results[1:]:  # interval and p never disagree
        assert (result["p"] < 0.05) == (not result["low"] <= 0 <= result["high"])


@pytest.mark.parametrize(
    "archives, given",
    [
        (["equal_flops/runs"], []),
        (["equal_flops/runs", "start_values/runs"], []),
        (["equal_flops/runs", "start_values/runs", "against_relu2/runs"], ["--baseline=relu2"]),
        (["longer/runs", "longer/horizons"], []),
        (["longer/runs", "longer/against_relu2/horizons"], ["--baseline=relu2"]),
        (["longer/alpha/runs", "longer/alpha/horizons"], ["--baseline=geglu"]),
    ],
)
def test_committed_archives_give_their_table(tmp_path, archives, given):
    """Anyone can make the tables in experiments/results again from the logs that are kept beside
    them, on any CPU: the draws of the intervals are the same."""
    results = ROOT / "experiments" / "results"
    paths = [f"{results / name}.tar.xz" for name in archives]
    works(tmp_path, "--out=again", *given, "--report", *paths)
    folders = tmp_path / "again", (results / archives[-1]).parent
    texts = [(folder / "compare.md").read_text() for folder in folders]
    again, before = (re.findall(r"^\|.*", text, re.M) for text in texts)
    assert again == before
    made, kept = (json.loads((folder / "compare.json").read_text()) for folder in folders)
    assert len(made["rows"]) == len(kept["rows"]) > 1
    for a, b in zip(made["rows"], kept["rows"]):
        for key in set(b) - {"runs"}:
            same = pytest.approx(b[key], abs=1e-9) if isinstance(b[key], float) else b[key]
            assert a[key] == same, (a["ffn"], key)


def test_the_readmes_table_has_the_figures_of_the_committed_tables():
    tables = []
    for folder in ("start_values", "longer"):
        text = (ROOT / "experiments" / "results" / folder / "compare.json").read_text()
        rows = json.loads(text)["rows"]
        tables.append({row["ffn"]: f"{row['difference'] or 0:+.3f}" for row in rows})
    readme = (ROOT / "README.md").read_text()
    shown = re.findall(r"^\| ([^|]+) \| ([+-]\S+) \| ([+-]\S+) \|", readme, re.M)
    assert len(shown) == len(tables[0]) - 1 == len(tables[1]) - 1 == 14
    for label, *figures in shown:
        name = re.sub("experts, |,.*|[ `]", "", label.lower().replace("²", "2"))
        assert figures == [table[name] for table in tables], label


def test_an_archive_writes_into_its_folder_only(tmp_path, monkeypatch):
    """Whatever it says, and with a Python whose tarfile does not check that (Debian 12 has 3.11.2)."""
    folder = ROOT / "experiments" / "results" / "equal_flops"
    if sys.version_info < (3, 12):  # later ones always have it, and use it themselves
        monkeypatch.delattr(tarfile, "data_filter", raising=False)
    runs, times = compare.find_runs([str(folder / "runs.tar.xz")])
    assert len(runs) > 10
    assert times
    with tarfile.open(tmp_path / "evil.tar.xz", "w:xz") as tar:
        for name in ("../evil", "a/../../evil", f"{tmp_path}/evil", ".../fine", "..a/fine"):
            tar.addfile(tarfile.TarInfo(name))
        link = tarfile.TarInfo("link")
        link.type, link.linkname = tarfile.SYMTYPE, str(tmp_path / "evil")
        tar.addfile(link)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    assert compare.find_runs([str(tmp_path / "evil.tar.xz")]) == ([], {})
    assert [p.name for p in tmp_path.iterdir()] == ["evil.tar.xz"]


def errors(mask: np.ndarray, tables: int, seed: int) -> float:
    """The share of tables without a true difference in which some row is found to differ."""
    rng, wrong = np.random.default_rng(seed), 0
    for _ in range(tables):
        table = rng.normal(0, 0.02, mask.shape) + rng.normal(0, 0.1, mask.shape[1])
        table[~mask] = np.nan
        wrong += any(row["p"] < 0.05 for row in block_analysis.analyse(table)[0][1:])
    return wrong / tables


def test_the_family_wise_error():
    """It is 5% over all rows together, with and without missing runs."""
    mask = np.ones((5, 4), bool)
    assert abs(errors(mask, 2000, seed=1) - 0.05) <= 0.015
    mask[1, 0] = mask[2, 3] = mask[4, 3] = False
    assert abs(errors(mask, 2000, seed=2) - 0.05) <= 0.015


@pytest.mark.slow
def test_power():
    """With the committed table's rows, seeds and differences, 7 of 17 true differences are found where
    paired tests with Holm's correction found 2."""
    _, table = committed_table()
    effects = np.array([row["difference"] or 0 for row in block_analysis.analyse(table)[0]])
    kept = [i for i in range(len(table)) if i == 0 or effects[i] != 0]
    table, effects = table[kept], np.where(abs(effects[kept]) > 0.01, effects[kept], 0)
    true = effects != 0
    assert true.sum() == 17
    rng, by_block, by_pairs, wrong = np.random.default_rng(3), 0, 0, 0
    for _ in range(200):
        losses = rng.normal(0, 0.022, table.shape) + effects[:, None] + rng.normal(0, 0.02, 5)
        losses[np.isnan(table)] = np.nan
        p = np.array([1.0] + [row["p"] for row in block_analysis.analyse(losses)[0][1:]])
        by_block += (p[true] < 0.05).sum()
        wrong += (p[~true] < 0.05).any()
        paired = stats.ttest_1samp(losses[1:] - losses[0], 0, axis=1, nan_policy="omit").pvalue
        order = np.argsort(paired)
        fails_at = [*(paired[order] * np.arange(len(order), 0, -1) >= 0.05), True].index(True)
        by_pairs += true[1:][order[:fails_at]].sum()
    assert by_block / 200 > 6.5
    assert by_pairs / 200 < 2.5
    assert wrong / 200 <= 0.05


def test_stopping_by_width_keeps_the_error_rate():
    """Seeds are added until the interval is narrow. With one row the noise is least known."""
    rng, wrong, used = np.random.default_rng(4), 0, set()
    for _ in range(1000):
        losses = rng.normal(0, 1, (2, 40)) + rng.normal(0, 1, 40)
        for seeds in range(3, 41):
            results, noise = block_analysis.analyse(losses[:, :seeds])
            if block_analysis.precise(results, noise, 0.6):
                break
        used.add(seeds)
        assert seeds == 40 or results[1]["high"] - results[1]["difference"] <= 0.6
        wrong += results[1]["p"] < 0.05
    assert abs(wrong / 1000 - 0.05) <= 0.015
    assert len(used) > 3
    assert min(used) > 20  # degrees of freedom + 1


def test_missing_runs_and_rows_of_another_noise():
    """A row that shares no seed with any other has no difference; a row linked through others has one.
    A noisy row is judged by its own pairs and does not widen the others' intervals."""
    rng = np.random.default_rng(1)
    table = rng.normal(0, 0.01, (5, 8)) + rng.normal(0, 0.3, 8)
    table[1] += 0.1
    table[0, 4:6] = table[1, :4] = np.nan  # half of row 1's seeds have no baseline
    table[:, 7] = table[4, :7] = np.nan
    table[4, 7] = 2.0
    found, _ = block_analysis.analyse(table)
    assert found[4]["difference"] is None
    assert found[1]["low"] < 0.1 < found[1]["high"]
    assert found[1]["p"] < 0.001

    table = rng.normal(0, 0.01, (5, 6)) + rng.normal(0, 0.3, 6)
    quiet = block_analysis.analyse(table[[0, 1, 2, 3]])
    table[4] = table[0] + rng.normal(0.2, 0.4, 6)
    found, noise = block_analysis.analyse(table)
    assert noise == quiet[1]
    assert [row["own_noise"] is not None for row in found] == [False] * 4 + [True]
    pairs = stats.ttest_rel(table[4], table[0])
    assert found[4]["difference"] == pytest.approx((table[4] - table[0]).mean())
    assert 1 < found[4]["p"] / pairs.pvalue < 4.1  # adjusted for at most four rows
    # A row of little noise has the others': an interval from its own few differences is too narrow.
    rng = np.random.default_rng(3)
    still = rng.normal(0, np.array([[0.01]] * 7 + [[0.0005]]), (8, 6)) + rng.normal(0, 0.3, 6)
    found, _ = block_analysis.analyse(still)
    assert [row["own_noise"] is not None for row in found] == [False] * 7 + [True]
    widths = [row["high"] - row["difference"] for row in found[1:]]
    assert widths == pytest.approx([widths[0]] * 7)
    table[0] += rng.normal(0, 5, 6)  # a noisy baseline: all rows by their own pairs
    found, noise = block_analysis.analyse(table)
    assert all(row["own_noise"] for row in found[1:])
    assert noise == {"std": None, "df": 5}
    many = np.hstack([table, rng.normal(0, 0.01, (5, 15))])  # enough pairs end a search for precision
    many[0, 6:] += rng.normal(0, 5, 15)
    assert block_analysis.precise(*block_analysis.analyse(many), precision=100)


def test_verdicts(tmp_path):
    """A row is better, worse or neither. There is no such verdict with too few seeds, a learning rate
    that has not come down, or diverged runs, which are always named."""
    out = tmp_path / "out"
    make_runs(out, {"swiglu": 0, "geglu": -0.05, "asg": 0.05, "gelu": 0.001, "dsg": 0.05}, seeds=4)
    for s in (0, 1):
        make_run(out / f"relu2-s{s}", [6, 3, 1.5 + 0.01 * s])
    (out / "dsg-s1" / "log.jsonl").write_text("")
    (out / "dsg-s1" / "train.txt").write_text("x\nerror: step 3: loss or gradient is not finite\ny\n")
    make_run(out / "geglu-s9", [6, 3])  # lost its node, say
    (out / "geglu-s9" / "train.txt").write_text("srun: error: retrying indefinitely\n")
    for s in range(3):
        make_run(out / f"spark-s{s}", [6, math.nan])
    found, printed = report(tmp_path, "--archive=a.tar.xz")
    verdicts = {name.split()[0]: row["verdict"] for name, row in found.items()}
    assert verdicts == {
        "swiglu": "the baseline", "geglu": "better", "asg": "worse", "gelu": "no difference shown",
        "relu2": "too few seeds", "dsg": "diverged in 1 of 4", "spark": "diverged in 3 of 3",
    }  # fmt: skip
    assert "diverged in 3 of 3" in printed
    assert found["spark hidden"]["val_loss"] is None
    works(tmp_path, "--report", "a.tar.xz", "--out=again")
    again = json.loads((tmp_path / "again" / "compare.json").read_text())["rows"]
    assert [row["verdict"] for row in again] == list(verdicts.values())

    # another baseline
    works(tmp_path, "--report", "out", "--out=other", "--baseline=geglu")
    record = json.loads((tmp_path / "other" / "compare.json").read_text())
    assert record["baseline"] == record["rows"][0]["ffn"] == "geglu"
    assert {r["ffn"]: r["verdict"] for r in record["rows"]}["swiglu"] == "worse"

    # However seldom the log has a row: "wsd" comes down in the last fifth, after the last of them.
    wsd = {"schedule": "wsd", "max_iters": 40, "lr": 6e-4}
    for name, more in {
        "early": {"warmup_iters": 4}, "high": {"lr_decay_iters": 100}, "low": wsd,
    }.items():  # fmt: skip
        for spec, s in [(spec, s) for spec in ("swiglu", "geglu") for s in range(3)]:
            loss = 2 + 0.001 * s * s + 0.1 * (spec == "geglu") + 0.0001 * s * (spec == "geglu")
            folder = tmp_path / name / f"{spec}-s{s}"
            make_run(folder, [6, 3, loss], **more)
        works(tmp_path, "--report", name)
        row = json.loads((tmp_path / name / "compare.json").read_text())["rows"][1]
        assert row["low"] > 0
        says = {"early": "ended in warm-up", "high": "learning rate not down", "low": "worse"}
        assert row["verdict"] == says[name]


def make_priced(out: Path, effect: float, step: float) -> None:
    """A comparison whose baseline falls by 0.5 nats per unit of log(tokens)."""
    make_runs(out, {"swiglu": 0, "relu2": effect}, seeds=4, noise=0.001)
    rng = np.random.default_rng(7)
    for s in range(4):
        main = json.loads((out / f"swiglu-s{s}" / "log.jsonl").read_text().splitlines()[-1])["val_loss"]
        for end in (3, 6):
            loss = main - 0.5 * math.log(end / 4) + float(rng.normal(0, 0.001))
            make_run(out / f"swiglu-s{s}-{end}", [6, 4, loss], max_iters=end)
    relu2, swiglu = (compare.read_run(str(out / name)) for name in ("relu2-s0", "swiglu-s0"))
    times = {compare.timed_as(relu2, swiglu): {"ratio": step, "std_error": 0.01}}
    (out / "step_times.json").write_text(json.dumps(times))


def test_the_price_of_a_difference(tmp_path, monkeypatch):
    """SwiGLU's own line in log(tokens) gives the tokens and time to reach its loss, and who wins. The
    archive gives the same table, and horizons of another shape are refused by name."""
    monkeypatch.chdir(tmp_path)
    make_priced(tmp_path / "out", 0.1, 0.7)
    works(tmp_path, "--report", "out", "--archive=runs.tar.xz", "--out=first")
    record = json.loads((tmp_path / "first" / "compare.json").read_text())
    assert record["exchange"]["slope"] == pytest.approx(-0.5, abs=0.01)
    assert [h["tokens"] for h in record["exchange"]["horizons"]] == [48, 64, 96]
    row = record["rows"][1]
    slope = record["exchange"]["slope"]
    assert row["tokens_ratio"] == pytest.approx(math.exp(row["difference"] / -slope))
    assert row["tokens_ratio"] == pytest.approx(math.exp(0.2), rel=0.01)
    assert row["time_ratio"] == pytest.approx(0.7 * row["tokens_ratio"])
    assert row["tokens_low"] < row["tokens_ratio"] < row["tokens_high"]
    assert row["time_low"] < row["time_ratio"] < row["time_high"] < 1
    assert (row["verdict"], row["wins"], row["step_time_ratio"]) == ("worse", True, 0.7)
    assert "~" not in (tmp_path / "first" / "compare.md").read_text().partition("\n- ")[0]
    assert (tmp_path / "first" / "compare.png").stat().st_size > 10_000

    # 1.8 and 1.4 times SwiGLU's tokens: SwiGLU was run at no 1 / 1.4 of its steps, but at 0.75.
    for effect, ratio in ((0.3, "1.8"), (0.168, "1.4")):
        make_priced(tmp_path / ratio, effect, 1)
        assert re.search(rf"\| ~{ratio}\d* \[.*\| ~{ratio}", works(tmp_path, "--report", ratio))
    Path("1.8", "step_times.json").unlink()  # what is not known has no mark
    assert re.search(r"\| ~1\.8\d* \[[^|]*\|$", works(tmp_path, "--report", "1.8"), re.M)
    # Folders of runs, one by one, have the step times that lie beside them.
    folders = sorted(f"out/{path.name}" for path in (tmp_path / "out").glob("*-s*"))
    works(tmp_path, "--report", *folders, "--out=alone")
    assert json.loads((tmp_path / "alone" / "compare.json").read_text())["rows"][1] == row

    works(tmp_path, "--report", "runs.tar.xz", "--out=second")
    second = json.loads((tmp_path / "second" / "compare.json").read_text())
    for row in (*record["rows"], *second["rows"]):
        del row["runs"]
    assert record["rows"] == second["rows"]
    whole = (tmp_path / "runs.tar.xz").read_bytes()
    for size in (0, 20, 200, len(whole) // 2, len(whole) - 1):
        (tmp_path / "cut.tar.xz").write_bytes(whole[:size])
        fails(tmp_path, "--report", "cut.tar.xz", "--out=third", needles=("cut.tar.xz", "check it out"))
    assert not (tmp_path / "third").exists()

    works(tmp_path, "--report", "out", "--baseline=relu2", "--out=other")
    other = json.loads((tmp_path / "other" / "compare.json").read_text())
    assert "of another length and not used for the line: swiglu." in other["notes"][-2]
    assert other["exchange"] is None  # the horizons are SwiGLU's, and no line of ReLU2's
    assert [(row["ffn"], row["n"]) for row in other["rows"]] == [("relu2", 4), ("swiglu", 4)]
    assert other["rows"][1]["difference"] == pytest.approx(-record["rows"][1]["difference"])

    # Where runs diverged, of a row or of the baseline, the lucky ones that are left have no price, and
    # no verdict, unless the run that diverged is one of another length.
    verdicts = {
        "relu2-s3": ["the baseline", "diverged in 1 of 4"],
        "swiglu-s3": ["diverged in 1 of 4", "the baseline diverged"],
        "swiglu-s3-6": ["the baseline", "worse"],
    }
    for name, says in verdicts.items():
        shutil.copytree("out", name)
        shutil.rmtree(Path(name, name))
        make_run(Path(name, name), [6, 4, math.nan], max_iters=6 if name.endswith("-6") else 4)
        works(tmp_path, "--report", name)
        lucky = json.loads(Path(name, "compare.json").read_text())["rows"]
        assert [row["verdict"] for row in lucky] == says
        assert "No price where runs diverged" in Path(name, "compare.md").read_text()
        assert lucky[1]["difference"] == pytest.approx(0.1, abs=0.01)
        assert not lucky[1]["wins"]
        assert lucky[1]["tokens_ratio"] is lucky[1]["time_ratio"] is None

    # runs at a learning rate that is not the table's are no points of its line
    for spec, s in [(spec, s) for spec in ("swiglu", "relu2") for s in range(4)]:
        make_run(tmp_path / "slow" / f"{spec}-s{s}", [6, 4, 3 + 0.1 * s], learning_rate=3e-4)
    works(tmp_path, "--report", "out", "slow", "--out=swept")
    swept = json.loads((tmp_path / "swept" / "compare.json").read_text())
    assert swept["exchange"] == record["exchange"]
    # Nor are horizons points of a line at another rate, where the baseline is better; a note says so.
    for spec, s in [(spec, s) for spec in ("swiglu", "relu2") for s in range(4)]:
        make_run(tmp_path / "fast" / f"{spec}-s{s}", [6, 4, 1 + 0.1 * s], learning_rate=3e-4)
    printed = works(tmp_path, "--report", "out", "fast", "--out=swept")
    assert json.loads((tmp_path / "swept" / "compare.json").read_text())["exchange"] is None
    assert "of another length and not used for the line: swiglu." in printed

    make_run(tmp_path / "out" / "wide", [6, 4, 2], seed=9, data_seed=9, max_iters=3, n_embd=64)
    fails(tmp_path, "--report", "out", "--out=third", needles=("--n_embd", "wide"))
    wide, relu2, swiglu = (compare.read_run(f"out/{name}") for name in ("wide", "relu2-s0", "swiglu-s0"))
    wide.row = swiglu.row
    assert compare.timed_as(relu2, wide) != compare.timed_as(relu2, swiglu)
    key = compare.timed_as(relu2, swiglu)
    del swiglu.flags["residual"]  # as in a run made before train.py had the flag
    assert compare.timed_as(relu2, swiglu) == key
    relu2.made["ffn_code"] = "another"
    assert compare.timed_as(relu2, swiglu) != key
    del relu2.made["ffn_code"]
    swiglu.made["device"] = "cpu of another kind"
    assert compare.timed_as(relu2, swiglu) != key


def test_steps_are_timed_with_all_their_passes(tmp_path, monkeypatch):
    """Two ranks with passes of 2 sequences make a batch of 8 in two passes and one update. A time of
    another number of passes is another one: an FFN of many parameters pays for each update."""
    asked = []
    monkeypatch.setattr(compare.bench, "SWEEP", 1)
    monkeypatch.setattr(compare, "set_up", lambda device: None)  # which later tests would keep
    step = lambda model, flags, device, dtype, passes: (lambda: asked.append(passes), None)  # noqa: E731
    monkeypatch.setattr(compare.bench, "make_step", step)
    runs, times = [], {}
    for ffn in ("swiglu", "relu2"):
        make_run(tmp_path / ffn, [6, 4, 3], ffn=ffn, batch_size=8, micro_batch_size=2)
        runs.append(compare.read_run(str(tmp_path / ffn)))
        runs[-1].made["world"] = 2
    compare.time_steps([[run] for run in runs], times, str(tmp_path))
    assert set(asked) == {2}
    (key,) = times
    for run in runs:
        run.made["world"] = 4
    assert compare.timed_as(*runs[::-1]) != key


def test_steps_are_timed_on_the_device_of_the_runs(tmp_path, monkeypatch):
    """GPU 0 may be busy where --device=cuda:1 was asked for."""
    asked, cpu = [], torch.device("cpu")
    monkeypatch.setattr(compare.bench, "SWEEP", 1)
    monkeypatch.setattr(compare.train, "pick_device", lambda *which: asked.append(which) or cpu)
    monkeypatch.setattr(compare, "step_of", lambda *which: lambda: None)
    for device in ("cuda:1", "auto"):
        runs = []
        for ffn in ("swiglu", "relu2"):
            make_run(tmp_path / device / ffn, [6, 4, 3], ffn=ffn)
            runs.append(compare.read_run(str(tmp_path / device / ffn)))
            runs[-1].made["device"], runs[-1].flags["device"] = "cuda NVIDIA H100", device
        compare.time_steps([[run] for run in runs], {}, str(tmp_path))
    assert asked == [("cuda:1", 0), ("cuda", 0)]


def test_step_times_are_the_rows_over_the_baselines(tmp_path, monkeypatch):
    """The ratio is the median of the rounds' own, and its error that of a median."""
    ratios = np.linspace(1.9, 2.3, 15)
    monkeypatch.setattr(compare, "step_of", lambda *which: None)
    took = {"own": (3 * ratios).tolist(), "base": [3.0] * 15}
    monkeypatch.setattr(compare.bench, "measure", lambda calls, *rest: {k: took[k] for k in calls})
    times, runs = {}, []
    for ffn in ("swiglu", "relu2"):
        make_run(tmp_path / ffn, [6, 4, 3], ffn=ffn)
        runs.append(compare.read_run(str(tmp_path / ffn)))
    compare.time_steps([[run] for run in runs], times, str(tmp_path))
    (found,) = times.values()
    assert found["ratio"] == pytest.approx(2.1)
    # The median of n normal numbers has sqrt(pi / 2) = 1.25 times the error of their mean.
    want = math.sqrt(math.pi / 2) * np.log(ratios).std(ddof=1) / math.sqrt(15)
    assert found["std_error"] == pytest.approx(want, rel=0.01)


def test_what_a_plan_says(tmp_path, monkeypatch, capsys):
    """Hours of runs side by side: where a launcher spreads them, and on a CPU, which they share. The
    half-width is that of the intervals, and the power that of the test."""
    make_data(tmp_path / "data")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(compare, "step_of", lambda *which: None)
    monkeypatch.setattr(compare.bench, "measure", lambda *which: {"step": [36.0, 30.0, 99.0]})
    base = train.Config(max_iters=100, lr_decay_iters=100, data_dir="data", block_size=8)
    for launch, hours in (("", 6), ("env", 3)):
        cfg = compare.Config(ffn="geglu", horizons=False, data_dir="data", block_size=8, jobs=2)
        cfg.launch, cfg.device = launch, "cpu"
        compare.print_plan(compare.plan(cfg, base), cfg)
        assert f"6 runs of 2 rows, about {hours} hours" in capsys.readouterr().out
    width, found = block_analysis.expected_precision(2, 5, 0.01)
    assert width == pytest.approx(stats.t.isf(0.025, 4) * 0.01 * math.sqrt(2 / 5))
    pairs = np.random.default_rng(0).normal(found, 0.01 * math.sqrt(2), (20_000, 5))
    t = pairs.mean(1) / pairs.std(1, ddof=1) * math.sqrt(5)
    assert (t > stats.t.isf(0.025, 4)).mean() == pytest.approx(0.8, abs=0.05)
    table = np.random.default_rng(0).normal(2, 0.01, (6, 5))
    results, noise = block_analysis.analyse(table)
    width, _ = block_analysis.expected_precision(6, 5, noise["std"])
    assert block_analysis.widest(results) == pytest.approx(width)


def test_precision_stops_when_it_is_reached(tmp_path, monkeypatch):
    """After five seeds of eight here, as fewer do not tell the noise of five rows; at a width that is
    not reached all are run."""
    monkeypatch.chdir(tmp_path)
    rng, made = np.random.default_rng(0), []

    def run_all(runs, cfg) -> int:
        made.append(len(runs))
        for run in runs:
            if not Path(run.dir).exists():
                flags = {k: v for k, v in run.flags.items() if k != "out_dir"}
                make_run(Path(run.dir), [6, 3, float(2 + rng.normal(0, 0.01))], **flags)
        return 0

    monkeypatch.setattr(compare, "run_all", run_all)
    base = train.Config(max_iters=4, lr_decay_iters=4, n_embd=32, n_head=2, n_kv_head=2, ffn_hidden=64)
    ffns = "geglu,relu2,gelu,dsg,asg"
    for name, precision, seeds in (("wide", 0.1, 5), ("narrow", 1e-5, 8)):
        made.clear()
        cfg = compare.Config(ffn=ffns, seeds=8, precision=precision, horizons=False, name=name)
        chosen, failed = compare.run_to_precision(compare.plan(cfg, base), cfg)
        assert (len(chosen), failed) == (6 * seeds, 0)
        assert made == [6 * n for n in range(3, seeds + 1)]


def test_no_precision_is_reached_while_a_row_has_no_interval():
    """Such as one that is judged by its own noise and has one pair with the baseline."""
    told = {"difference": 0.1, "low": 0.09, "high": 0.11}
    rows = [{"difference": None, "low": None, "high": None}, told]
    assert block_analysis.precise(rows, {"df": 24}, 0.02)
    rows.append({"difference": 0.2, "low": None, "high": None})
    assert not block_analysis.precise(rows, {"df": 24}, 0.02)


def test_seeds_of_one_length_say_nothing_of_the_line():
    """A line with a level for each seed goes through them, whatever its slope."""
    bend = {7: 0, 10: 0.02, 14: 0}
    runs = [(n, s, 2 - 0.3 * math.log(n) + 0.1 * s + bend[n]) for n in bend for s in (0, 1)]
    alone = block_analysis.exchange_rate(runs)
    off = [h["off_line"] for h in alone["horizons"]]
    assert off[1] > 0.01
    assert sum(off) == pytest.approx(0)  # as residuals are
    assert block_analysis.exchange_rate([*runs, *((10, s, 1.0) for s in range(2, 9))]) == alone
    assert block_analysis.exchange_rate([(10, s, 1.0) for s in range(9)]) is None


def test_intervals_of_prices():
    """They hold the true ratio in 95% of cases, whether the difference, the slope (of 5 degrees of
    freedom) or the step time decides its error. The interval of tokens excludes 1 exactly where that of
    the difference excludes 0."""
    rng, n = np.random.default_rng(0), 4000
    for d_error, slope_error, step_error in [(0.01, 0.01, 0.03), (0.001, 0.03, 0.001), (0.001, 0, 0.05)]:
        held = {"tokens": 0, "time": 0}
        for _ in range(n):
            d, slope = rng.normal(0.1, d_error), rng.normal(-0.3, slope_error)
            half = stats.t.isf(0.025, 60) * d_error * math.sqrt(rng.chisquare(60) / 60)
            row = {"difference": d, "low": d - half, "high": d + half, "level": 0.05}
            exchange = {"slope": slope, "df": 5}
            exchange["std_error"] = slope_error * math.sqrt(rng.chisquare(5) / 5)
            time = {"ratio": math.exp(rng.normal(0.1, step_error))}
            time["std_error"] = step_error * math.sqrt(rng.chisquare(14) / 14)
            found = block_analysis.price(row, exchange, time)
            assert (row["low"] <= 0 <= row["high"]) == (found["tokens_low"] <= 1 <= found["tokens_high"])
            truth = {"tokens": math.exp(0.1 / 0.3), "time": math.exp(0.1 / 0.3 + 0.1)}
            for name, value in truth.items():
                held[name] += found[f"{name}_low"] <= value <= found[f"{name}_high"]
        assert held["tokens"] / n == pytest.approx(0.95, abs=0.015)
        assert held["time"] / n == pytest.approx(0.95, abs=0.02)
    flat = block_analysis.price(row, {"slope": -0.05, "std_error": 0.05, "df": 5}, time)  # perhaps flat
    assert set(flat.values()) == {None}


def test_two_classes_of_one_name(monkeypatch, tmp_path):
    """An FFN is identified by its key in FFNS and its options, not by its class's name. A slash
    in an option makes no subfolder."""
    import model

    class SwiGLU(model.SwiGLU):
        def __init__(self, d: int, h: int, *, path: str = ""):
            super().__init__(d, h)

    for name in ("one", "two"):
        monkeypatch.setitem(model.FFNS, name, SwiGLU)
    runs = planned(monkeypatch, tmp_path, "--ffn=one,two,two:path=a/b", "--seeds=1")
    assert [r["ffn"] for r in runs.values()] == ["swiglu", "one", "two", "two:path=a/b"]
    assert all(name.count("/") == 1 for name in runs)


def test_a_table_of_other_runs_is_not_overwritten(tmp_path):
    make_runs(tmp_path / "out", {"swiglu": 0, "geglu": 0.01}, seeds=3)
    works(tmp_path, "--report", "out")
    before = (tmp_path / "out" / "compare.md").read_bytes()
    fails(tmp_path, "--report", "out/swiglu-s0", "out/geglu-s0", needles=("other runs", "--out"))
    assert (tmp_path / "out" / "compare.md").read_bytes() == before
    make_run(tmp_path / "out" / "geglu-s3", [6, 3, 2])
    works(tmp_path, "--report", "out")  # the same runs and one more


def test_costs_papers_and_words(tmp_path):
    """Parameters and FLOPs equal those by hand, the papers' differences and active shares are shown, the
    same FFN under another name is identical, and one seed gives no verdict."""
    data = tmp_path / "out"
    for s in range(2):
        for spec, loss, active in [
            ("swiglu", 2.0, None), ("asg", 2.1, 0.27), ("asg:sparse=False", 2.0, 0.0),
            ("sparsegated:k=0.5", 2.2, 0.5), ("dynamicgeglu", 2.1, None), ("spark", 2.2, 0.08),
        ]:  # fmt: skip
            make_run(data / f"{spec}-s{s}", [6, 3, loss + 0.01 * s], active=active)
        width = 192  # 4 matrices of this width equal 3 of 256
        make_run(data / f"asg-s{s}-params", [6, 3, 2.05 + 0.01 * s], ffn_match="params")
    make_run(data / "geglu-s0", [6, 3, 2.01])
    found, out = report(tmp_path)
    d, h, layers, vocab = 128, 256, 2, 384
    swiglu, asg = found["swiglu hidden"], found["asg hidden"]
    assert swiglu["params"] == layers * 3 * d * h
    norms = layers * (2 * d + 2 * 64) + d
    attention = layers * (2 * d * d + 2 * d * 64)
    assert swiglu["total_params"] == vocab * d + attention + layers * 3 * d * h + norms
    assert swiglu["flops"] == swiglu["ideal_flops"] == layers * 6 * d * h
    assert asg["params"] == layers * (4 * d * h + 1)
    assert asg["flops"] == layers * 8 * d * h
    sparse = found["sparsegated:k=0.5 hidden"]
    assert sparse["ideal_flops"] == layers * 2 * (d * h + 2 * d * h // 2 + d * d)
    assert (asg["active"], swiglu["active"]) == (0.27, None)
    matched = found["asg params"]
    assert matched["hidden"] == width
    assert matched["difference"] == pytest.approx(0.05)  # to the same SwiGLU runs

    other, _ = report(tmp_path, "--baseline=geglu")  # the papers' differences are SwiGLU's
    assert not any(row["paper"] for row in other.values())
    stated = {spec: row["paper"] for spec, row in found.items()}
    assert stated == {
        "swiglu hidden": None, "asg hidden": "+0.18", "asg:sparse=False hidden": "+0.000",
        "asg params": None, "sparsegated:k=0.5 hidden": "+0.105", "dynamicgeglu hidden": "-0.0006",
        "spark hidden": None, "geglu hidden": "-0.054",
    }  # fmt: skip
    assert "+0.18 " in out
    same = found["asg:sparse=False hidden"]
    assert (same["difference"], same["p"], same["verdict"]) == (0, 1, "identical")
    assert found["geglu hidden"]["verdict"] == found["asg hidden"]["verdict"] == "too few seeds"


@pytest.mark.parametrize(
    "flag, value",
    [("max_iters", 8), ("block_size", 16), ("ffn_hidden", 128), ("min_lr", 1e-5), ("n_layer", 3),
     ("beta2", 0.9),
     ("data_dir", "other"), ("optimizer", "muon"), ("dtype", "bfloat16")],
)  # fmt: skip
def test_report_refuses_runs_that_differ_in_more_than_the_ffn(tmp_path, flag, value):
    """The flag is named, and no table is written."""
    make_run(tmp_path / "out" / "a", [6, 3, 2], ffn="swiglu")
    folder = tmp_path / "out" / "b"
    make_run(folder, [6, 3, 2], ffn="geglu", **{flag: value})
    fails(tmp_path, "--report", "out/a", "out/b", needles=("--", f"{flag} ", "out/a", "out/b"))
    assert not list(tmp_path.rglob("compare.*"))


def test_report_refuses_runs_of_two_devices_and_judges_none_of_two_baselines(tmp_path):
    """A GPU rounds in its own way; and a verdict wants three runs of the baseline too."""
    for spec, s in [("swiglu", 0), ("swiglu", 1), *(("geglu", s) for s in range(4))]:
        last = 2 + 0.1 * s + 0.001 * s * s * (spec == "geglu")
        make_run(tmp_path / "out" / f"{spec}-s{s}", [6, 3, last])
    works(tmp_path, "--report", "out", "--out=one")
    record = json.loads((tmp_path / "one" / "compare.json").read_text())
    assert record["rows"][1]["verdict"] == "too few seeds"
    path = tmp_path / "out" / "geglu-s3" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"device": "cuda NVIDIA H100"}))
    fails(tmp_path, "--report", "out", "--out=two", needles=("--device", "cuda NVIDIA H100", "geglu-s3"))


def test_a_picture_has_the_smallest_value_on_top():
    """Filled are the marks of which the interval is clear of the mark, if there is a verdict."""
    from matplotlib.figure import Figure

    import rendering

    values = {"high": (3, 2.9, 3.2, "worse"), "low": (-1, -2, -0.5, "better")}
    values |= {"near": (1, -1, 2, "no difference shown"), "few": (2, 1.5, 2.5, "too few seeds")}
    rows = [dict(zip((*rendering.DIFFERENCE, "verdict"), found), label=label, extrapolated=False)
            for label, found in values.items()]  # fmt: skip
    ax = Figure().subplots()
    rendering.plot_intervals(ax, rows, rendering.DIFFERENCE, 0, "title", "x")
    assert [text.get_text() for text in ax.get_yticklabels()] == ["low", "near", "few", "high"]
    assert ax.get_ylim()[0] > 3 > 0 > ax.get_ylim()[1]  # downwards
    marks = [container.lines[0] for container in ax.containers]
    assert [mark.get_xdata()[0] for mark in marks] == [-1, 1, 2, 3]
    assert [mark.get_markerfacecolor() for mark in marks] == ["black", "white", "white", "black"]


def test_report_leaves_out_the_unfinished_and_refuses_doubles(tmp_path):
    """A cut run is named and enters no figure, whatever its flags. The same run from two folders would
    count twice."""
    make_runs(tmp_path / "out", {"swiglu": 0, "geglu": 0.01}, seeds=3)
    make_run(tmp_path / "out" / "cut", [6, 3], ffn="gelu", batch_size=4)
    (tmp_path / "out" / "empty").mkdir()
    found, out = report(tmp_path)
    assert set(found) == {"swiglu hidden", "geglu hidden"}
    for name in ("cut", "empty"):
        assert re.search(rf"left out: .*{name}", out)
    assert "out/cut (step 2)" in (tmp_path / "report" / "compare.md").read_text()
    # the folder that holds the runs gives the same
    works(tmp_path, "--report", "out", "--out=again")
    again = json.loads((tmp_path / "again" / "compare.json").read_text())["rows"]
    assert [row["val_loss"] for row in again] == [row["val_loss"] for row in found.values()]

    make_run(tmp_path / "elsewhere" / "x", [6, 3, 2], ffn="geglu", seed=1, data_seed=1)
    fails(tmp_path, "--report", "out", "elsewhere", needles=("same run twice", "x"))


def test_a_sweep_shows_the_best_rate_of_each(tmp_path):
    """The best is by the mean over seeds, for SwiGLU too. A rate at which a seed diverged cannot win,
    and a rate tried for one FFN only is refused."""
    losses = {("swiglu", 1e-3): [2.0, 2.2], ("swiglu", 2e-3): [1.9, 2.1],
              ("geglu", 1e-3): [1.95, 2.16], ("geglu", 2e-3): [1.5]}  # fmt: skip
    for (spec, rate), values in losses.items():
        for s in (0, 1):
            last = values[s : s + 1] or [math.nan]  # it diverged
            make_run(tmp_path / "out" / f"{spec}-s{s}-lr{rate}", [6, 3, *last], learning_rate=rate)
    found, out = report(tmp_path)
    rates = {spec: row["learning_rate"] for spec, row in found.items()}
    assert rates == {"swiglu hidden": 2e-3, "geglu hidden": 1e-3}
    assert found["geglu hidden"]["difference"] == pytest.approx(0.055)
    assert "Of --learning_rate, [0.001, 0.002] were tried for every row" in out

    for folder in list((tmp_path / "out").glob("geglu-*-lr0.002")):
        folder.rename(tmp_path / folder.name)
    fails(tmp_path, "--report", "out", needles=("--learning_rate", "geglu"))


def test_a_rate_at_which_all_diverge_decides_nothing(tmp_path):
    """The best of the other rates is shown, whether a rate lost all seeds or all but one."""
    for folder, lost in (("all", 4), ("three", 3)):
        for spec, losses in (("swiglu", [2.5, 2.0, 1.9]), ("geglu", [2.3, 2.1, 2.2])):
            for s in range(4):
                for rate, loss in zip((1e-4, 1e-3, 1e-1), losses):
                    diverged = spec == "swiglu" and rate == 1e-1 and s < lost
                    last = math.nan if diverged else loss + 0.01 * s
                    make_run(
                        tmp_path / folder / f"{spec}-s{s}-lr{rate}", [6, 3, last], learning_rate=rate
                    )
        works(tmp_path, f"--out={folder}-table", "--report", folder)
        found = json.loads((tmp_path / f"{folder}-table" / "compare.json").read_text())["rows"]
        assert [row["learning_rate"] for row in found] == [1e-3, 1e-3]
        assert found[1]["difference"] == pytest.approx(0.1)


def test_a_value_that_diverged_has_no_say_in_which_seeds_count(tmp_path):
    """Its one whole seed need not be among those of the best value."""
    for spec in ("swiglu", "geglu"):
        for rate, seeds in ((1e-3, range(3)), (1e-1, range(4))):
            for s in seeds:
                last = 2.0 + 0.01 * s if rate == 1e-3 or s == 3 else math.nan
                make_run(tmp_path / "out" / f"{spec}-s{s}-lr{rate}", [6, 3, last], learning_rate=rate)
    found, _ = report(tmp_path)
    assert {row["learning_rate"] for row in found.values()} == {1e-3}


def test_a_sweep_that_is_not_finished(tmp_path):
    """A value that one row has not finished is no row's best; where none is left, there is no table."""
    for s in range(3):
        for spec, rate, *last in [("swiglu", 1e-3, 2.0), ("swiglu", 2e-3),
                                  ("geglu", 1e-3, 2.05), ("geglu", 2e-3, 1.8)]:  # fmt: skip
            make_run(tmp_path / "out" / f"{spec}-s{s}-lr{rate}", [6, 3, *last], learning_rate=rate)
    found, out = report(tmp_path)
    assert {row["learning_rate"] for row in found.values()} == {1e-3}
    assert found["geglu hidden"]["difference"] == pytest.approx(0.05)
    assert "were tried for every row" not in out
    assert re.search("Not finished and left out: .*swiglu-s0-lr0.002", out)
    for s in range(3):
        log = tmp_path / "out" / f"geglu-s{s}-lr0.001" / "log.jsonl"
        log.write_text(log.read_text().rsplit("{", 1)[0])
    fails(tmp_path, "--report", "out", needles=("finish the sweep", "learning_rate"))


def test_a_sweep_of_start_values_shows_the_best_of_each(tmp_path):
    """Alone and with learning rates, of which every pair must have been tried for every row."""
    losses = {("swiglu", 0.02): 2.0, ("swiglu", 0.06): 1.9, ("geglu", 0.02): 1.95, ("geglu", 0.06): 1.97}
    for (spec, std), loss in losses.items():
        for s in range(3):
            make_run(
                tmp_path / "out" / f"{spec}-s{s}-std{std}", [6, 3, loss + 0.1 * s * s], ffn_init_std=std
            )
    found, out = report(tmp_path)
    stds = {spec: row["ffn_init_std"] for spec, row in found.items()}
    assert stds == {"swiglu hidden": 0.06, "geglu hidden": 0.02}
    assert found["geglu hidden"]["difference"] == pytest.approx(0.05)
    assert "Of --ffn_init_std, [0.02, 0.06] were tried for every row" in out
    assert re.search(r"`geglu`.*\| 0\.02 ", out)
    make_run(tmp_path / "out" / "cut", [6, 3], ffn_init_std=0.5)  # not ended
    for s in range(3):
        make_run(tmp_path / "out" / f"geglu-s{s}-std0.1", [6, 3, 1.5], ffn_init_std=0.1)
        make_run(tmp_path / "out" / f"swiglu-s{s}-std0.1", [6, 3, 1.6 + 0.1 * s], ffn_init_std=0.1)
    assert "[0.02, 0.06, 0.1] were tried" in (out := report(tmp_path)[1])
    assert len(re.findall(r"\| 0\.1 ", out)) == 2  # shown though all rows chose it
    assert "--ffn_init_std=" not in out.partition("Command")[0]  # no flag that all runs have
    make_run(tmp_path / "out" / "x", [6, 3, 1.8], ffn_init_std=0.1, learning_rate=2e-3)
    fails(tmp_path, "--report", "out", needles=("--ffn_init_std", "geglu"))


def test_the_best_start_value_is_the_one_of_the_lower_loss_in_the_seeds_of_both(tmp_path):
    """More seeds at one of them, or easier ones, do not make it the best."""
    for spec, gain in (("swiglu", 0.0), ("geglu", 0.05)):
        for s in range(6):  # the last three are easier
            last = 2 - 0.5 * (s > 2) - gain
            make_run(tmp_path / "out" / f"{spec}-s{s}-narrow", [6, 3, last], ffn_init_std=0.02)
        for s in range(3):
            make_run(tmp_path / "out" / f"{spec}-s{s}-wide", [6, 3, 1.9 + 0.001 * s], ffn_init_std=0.06)
    found, _ = report(tmp_path)
    assert {row["ffn_init_std"] for row in found.values()} == {0.06}
    assert {row["n"] for row in found.values()} == {3}


def test_start_values_that_share_no_seed_have_no_best(tmp_path):
    """Which seeds they had would decide, and not which is better."""
    for spec in ("swiglu", "geglu"):
        for s in range(7):
            loss, std = (1.7, 0.02) if s < 4 else (1.6, 0.06)
            make_run(tmp_path / "out" / f"{spec}-s{s}", [6, 3, loss], ffn_init_std=std)
    fails(tmp_path, "--report", "out", needles=("no seed of", "ffn_init_std", "run one"))


def test_report_without_a_learning_rate(tmp_path):
    """Runs with learning_rate=0 have no ratio to divide by, but still need the same min_lr."""
    for spec in ("swiglu", "geglu"):
        make_run(tmp_path / "out" / spec, [6, 6, 6], ffn=spec, learning_rate=0.0)
    found, _ = report(tmp_path)
    assert found["geglu hidden"]["difference"] == 0
    make_run(tmp_path / "out" / "other", [6, 6, 6], ffn="asg", learning_rate=0.0, min_lr=1e-5)
    fails(tmp_path, "--report", "out", needles=("--min_lr", "other"))


def test_report_of_many_runs_is_linear(tmp_path, monkeypatch):
    """For 100 runs of two FFNs, each FFN's matched width is searched once, in about a hundred trials."""
    import model

    asked = []
    make_ffn = model.make_ffn
    monkeypatch.setattr(model, "make_ffn", lambda *a: asked.append(a) or make_ffn(*a))
    for s in range(50):
        for spec in ("asg", "dsg"):
            make_run(tmp_path / f"{spec}-s{s}", [6, 3, 2], ffn_match="params", ffn_hidden=264)
    runs, _ = compare.find_runs([str(tmp_path), str(tmp_path)])  # given twice, taken once
    assert len(runs) == 100
    compare.check_alike(runs, "swiglu")
    assert len(asked) <= 200


def test_an_archive_keeps_runs_and_times_of_equal_names(tmp_path):
    """Two folders of a sweep by hand have runs of the same names, and step times of their own."""
    for rate, loss in ((1e-3, 2.0), (3e-3, 2.3)):
        folder = tmp_path / f"lr{rate}"
        for spec, s in [(spec, s) for spec in ("swiglu", "geglu") for s in range(3)]:
            last = loss + 0.1 * s + 0.001 * s * (spec == "geglu")
            make_run(folder / f"{spec}-s{s}", [6, 3, last], learning_rate=rate)
        (folder / "step_times.json").write_text(json.dumps({str(rate): {"ratio": 1, "std_error": 0}}))
    works(tmp_path, "--report", "lr0.001", "lr0.003", "--out=first", "--archive=a.tar.xz")
    packed = (tmp_path / "a.tar.xz").read_bytes()
    fails(tmp_path, "--report", "a.tar.xz", "--archive=a.tar.xz", needles=("a.tar.xz", "unpack it"))
    works(tmp_path, "--report", *map(str, (tmp_path / "lr0.001").iterdir()), "--out=third",
          "--archive=b.tar.xz")  # fmt: skip
    assert (tmp_path / "a.tar.xz").read_bytes() == packed
    works(tmp_path, "--report", "a.tar.xz", "--out=second")
    texts = [(tmp_path / name / "compare.json").read_text() for name in ("first", "second")]
    first, second = map(json.loads, texts)
    assert [row["val_loss"] for row in second["rows"]] == [row["val_loss"] for row in first["rows"]]
    assert second["rows"][0]["val_loss"] == pytest.approx(2.1)
    with tarfile.open(tmp_path / "a.tar.xz") as tar:
        assert json.load(tar.extractfile("step_times.json")).keys() == {"0.001", "0.003"}
        assert len([name for name in tar.getnames() if name.endswith("log.jsonl")]) == 12
    (tmp_path / "a.tgz").touch()
    fails(tmp_path, "--report", "a.tgz", "--archive=b.tar.xz", needles=("a.tgz", "unpack it"))


def test_step_times_that_differ_are_not_replaced_without_a_word(tmp_path):
    """Archives of two machines may time the same steps: the last one's are shown, and it says so."""
    for name, ratio in (("a", 1.0), ("b", 1.3), ("c", 1.3)):
        make_run(tmp_path / name / "swiglu-s0", [6, 3, 2], seed=ord(name), data_seed=ord(name))
        times = {"geglu / swiglu": {"ratio": ratio, "std_error": 0.01}}
        (tmp_path / name / "step_times.json").write_text(json.dumps(times))
    said = works(tmp_path, "--out=x", "--report", "a", "b", "c")
    assert said.count("has step times that differ") == 1
    assert "b has step times that differ" in said


def test_an_archives_names_are_all_different(tmp_path):
    """What tells two runs of one name apart must not be the name of a third."""
    folders = [*(f"a/run{i}" for i in range(3)), *(f"b/run{i}" for i in range(3))]
    folders += [f"c/{name}" for name in ("run0-1", "run1-4", "run2-7", "3-run0", "4-run1")]
    for i, folder in enumerate(folders):
        make_run(tmp_path / folder, [6, 3, 2], ffn="swiglu", seed=i, data_seed=i)
    runs, times = compare.find_runs([str(tmp_path / name) for name in "abc"])
    compare.write_archive(str(tmp_path / "new" / "all.tar.xz"), runs, times)
    packed, _ = compare.find_runs([str(tmp_path / "new" / "all.tar.xz")])
    assert sorted(r.flags["seed"] for r in packed) == list(range(len(folders)))


@pytest.mark.parametrize("runs", [1, 4])
@pytest.mark.parametrize("name", ["a.tar.xz", "a.tar"])
def test_the_table_of_an_archive_lies_beside_it(tmp_path, runs, name):
    """Also where the archive is in the current folder, and where it has one run, which has the archive's
    name as its parent. It may be one that was decompressed."""
    make_runs(tmp_path / "out", dict.fromkeys(["swiglu", "geglu"][: (runs + 1) // 2], 0), runs // 2 or 1)
    works(tmp_path, "--report", "out", "--archive=a.tar.xz")
    packed = (tmp_path / "a.tar.xz").read_bytes()
    (tmp_path / "here").mkdir()
    (tmp_path / "here" / name).write_bytes(packed if name.endswith("xz") else lzma.decompress(packed))
    works(tmp_path / "here", "--report", name)
    found = json.loads((tmp_path / "here" / "compare.json").read_text())
    assert sum(len(row["runs"]) for row in found["rows"]) == runs


def test_data_and_trainers_that_changed_between_runs_of_one_name(tmp_path, monkeypatch):
    """Losses on other data are refused, before and after the runs; another trainer is a warning."""
    monkeypatch.chdir(tmp_path)
    make_data(tmp_path / "data")
    cfg = compare.Config(ffn="geglu", seeds=3, horizons=False, data_dir="data", block_size=8)
    size = {"n_layer": 1, "n_head": 2, "n_kv_head": 2, "n_embd": 32, "ffn_hidden": 64}
    base = train.Config(max_iters=4, lr_decay_iters=4, data_dir="data", block_size=8, **size)
    planned = compare.plan(cfg, base)
    digest = compare.open_data("data", 8).digest

    def made(run, **more: str) -> None:
        shutil.rmtree(run.dir, ignore_errors=True)
        make_run(Path(run.dir), [6, 3, 2], **{k: v for k, v in run.flags.items() if k != "out_dir"})
        path = Path(run.dir, "config.json")
        path.write_text(json.dumps(json.loads(path.read_text()) | more))

    for run in planned[:-1]:
        made(run, data_digest=digest, trainer_code="a")
    made(planned[0])  # by a version that noted neither
    assert compare.to_do(planned, cfg) == planned[-1:]
    assert "Warning" not in works(tmp_path, "--report", "out/compare", "--out=one")
    made(planned[1], data_digest=digest, trainer_code="b")
    assert compare.to_do(planned, cfg) == planned[-1:]
    assert "Warning: train.py, the decoder" in works(tmp_path, "--report", "out/compare", "--out=two")
    # Another spelling of the folder's name, or a copy elsewhere, is the same data.
    for run, folder in ((planned[0], "data"), (planned[1], "/copy/of/data/")):
        path = Path(run.dir, "config.json")
        config = json.loads(path.read_text()) | {"data": {"dir": folder, "source": "texts", "tokens": 9}}
        path.write_text(json.dumps(config | {"flags": config["flags"] | {"data_dir": folder}}))
    compare.check_alike(compare.find_runs([r.dir for r in planned[:2]])[0], "swiglu")
    made(planned[1], data_digest=digest)
    moved = compare.plan(cfg, train.Config(**asdict(base) | {"data_dir": "./data/"}))
    assert len(compare.to_do(moved, cfg)) == 1
    made(planned[1], data_digest="another")
    with pytest.raises(UserError, match="data has changed since .*s0 was made: choose another --name"):
        compare.to_do(planned, cfg)
    with pytest.raises(UserError, match="the data changed between .* and .*: run the older one again"):
        compare.check_alike(compare.find_runs(["out/compare"])[0], "swiglu")


def test_a_class_that_changed_between_runs_of_one_name(tmp_path, monkeypatch):
    """Its old losses are neither shown as new ones nor paired with them. A comment is no change."""
    monkeypatch.chdir(tmp_path)

    import model

    def written(body: str) -> str:
        """The code of a class as it would be in model.py."""
        (tmp_path / "mine.py").write_text(f"from model import SwiGLU\nclass Mine(SwiGLU):\n{body}\n")
        sys.modules.pop("mine", None)
        monkeypatch.syspath_prepend(str(tmp_path))
        monkeypatch.setitem(model.FFNS, "mine", __import__("mine").Mine)
        inspect.linecache.clearcache()
        return train.ffn_code("mine")

    first = written("    scale = 1")
    assert written("    'About it.'\n    # a thought\n    scale = (1)") == first
    assert written("    scale = 2") != first

    def made(run, code: str) -> None:
        make_run(Path(run.dir), [6, 3, 2], **{k: v for k, v in run.flags.items() if k != "out_dir"})
        path = Path(run.dir, "config.json")
        path.write_text(json.dumps(json.loads(path.read_text()) | {"ffn_code": code}))

    cfg = compare.Config(ffn="mine", seeds=2, horizons=False, prepare="x")
    planned = compare.plan(cfg, train.Config(max_iters=4))
    for run in planned:
        made(run, train.ffn_code(run.flags["ffn"]))
    assert compare.run_all(planned, cfg) == 0
    compare.check_alike(compare.find_runs(["out/compare"])[0], "swiglu")
    shutil.rmtree(planned[3].dir)
    made(planned[3], first)
    with pytest.raises(UserError, match="class of mine has changed since .*mine-s1"):
        compare.run_all(planned, cfg)
    with pytest.raises(UserError, match="class of mine changed between .*mine-s"):
        compare.check_alike(compare.find_runs(["out/compare"])[0], "swiglu")
    path = Path(planned[1].dir, "config.json")
    old = json.loads(path.read_text())
    del old["ffn_code"]  # as in a version that did not record it
    path.write_text(json.dumps(old))
    for order in (1, -1):
        compare.check_alike(compare.find_runs([run.dir for run in planned][::order])[0], "swiglu")


def test_report_reads_odd_files(tmp_path):
    """Lines that are half written, not UTF-8 or no row, and folders without a run, are left out."""
    make_runs(tmp_path / "out", {"swiglu": 0, "geglu": 0.01}, seeds=2)
    expected, _ = report(tmp_path)
    log = tmp_path / "out" / "geglu-s1" / "log.jsonl"
    first, *others = log.read_text().splitlines(keepends=True)
    odd = ['{"step": %s, "tokens": 1}\n' % ("9" * 400), "[" * 100_000 + "\n", '{"step": 1, "tok\n',
           "5\n", "[1]\n", "{}\n", '{"step": "x", "tokens": 1, "val_loss": 1}\n',
           '{"step": 1, "tokens": 1, "val_loss": null}\n', "\n"]  # fmt: skip
    log.write_bytes("".join([first, *odd]).encode() + b"\xff\xfe\n" + "".join(others).encode())
    with open(log, "a") as f:
        f.write('{"step": 4, "tok')
    for name, config in {"list": "[]", "text": "\xff", "deep": "[" * 100_000, "old": "{}",
                         "kind": json.dumps({"flags": {"ffn_hidden": "wide"}})}.items():  # fmt: skip
        (tmp_path / "out" / name).mkdir()
        (tmp_path / "out" / name / "config.json").write_text(config, encoding="latin-1")
    (tmp_path / "out" / "file").write_text("not a folder")
    found, out = report(tmp_path)
    assert found == expected
    bad = ("list", "text", "deep", "old", "kind")
    for name in bad:
        assert re.search(rf"left out: .*{name} holds no run", out)
    # From the folder that holds them, and from archives, too; not every file there is a run's.
    (tmp_path / "out" / "step_times.json").write_text("[1]")
    out = works(tmp_path, "--report", "out", "--out=again")
    assert [line for line in out.splitlines() if line.startswith("left out")] == [
        f"left out: out/{name} has a config.json that cannot be read" for name in sorted(bad)]
    for end in ("tar.gz", "tgz"):
        with tarfile.open(tmp_path / f"deep.{end}", "w:gz") as tar:
            tar.add(tmp_path / "out" / "geglu-s0", "a/b/c/geglu-s0")
        assert f"left out: deep.{end} holds no run" in works(
            tmp_path, "--report", "out/swiglu-s0", "out/geglu-s0", f"deep.{end}", "--out=again")
    for folder in ("out/file", "report/compare.md"):
        fails(tmp_path, "--report", "out", f"--out={folder}", needles=("cannot write", "--out"))


def test_curves_are_means_over_the_seeds_that_all_rows_have(tmp_path):
    """SwiGLU has two seeds more, and its curve is still beside the other's, which has seed 0."""
    from rendering import plot_losses
    from matplotlib.figure import Figure

    for spec, seeds in (("swiglu", 3), ("geglu", 1)):
        for s in range(seeds):
            losses = [6, 3 + s, 2 + s + 0.01 * (spec == "geglu")]
            make_run(tmp_path / f"{spec}-s{s}", losses)
    runs, _ = compare.find_runs([str(tmp_path)])
    groups = compare.group_runs(runs, "swiglu")
    ax = Figure().subplots()
    plot_losses(ax, compare.summarize(runs, groups, {}, "swiglu")["rows"], groups)
    assert [line.get_ydata()[-1] for line in ax.lines] == [2, 2.01]


def test_active_shares_that_are_no_numbers_and_runs_of_other_ranks(tmp_path):
    """A share of nan, from 0 / 0, is left out and loses no table. A table of runs on one rank and on
    four says so: experts are balanced by a rank's own tokens."""
    make_runs(tmp_path / "out", {"swiglu": 0, "asg": 0.1}, seeds=3)
    for s in range(3):
        log = tmp_path / "out" / f"asg-s{s}" / "log.jsonl"
        log.write_text(log.read_text().replace('"val_loss"', '"active": NaN, "val_loss"'))
        config = tmp_path / "out" / f"asg-s{s}" / "config.json"
        config.write_text(json.dumps(json.loads(config.read_text()) | {"world": 1 + 3 * (s == 1)}))
    rows, out = report(tmp_path)
    assert rows["asg hidden"]["active"] is None
    assert "Warning: the runs had [1, 4] ranks" in out


def test_one_run_and_many_rows_are_plotted(tmp_path):
    """--report of a single run, which train.py's summary offers, puts its table and plot into the run's
    folder. Many rows also fit one figure."""
    # the plot leaves out a loss that was not finite
    make_run(tmp_path / "out" / "only", [6, math.inf, 2], ffn="asg", active=0.3, learning_rate=0.003)
    out = works(tmp_path, "--report", "out/only")
    assert "no run of the baseline with one of its seeds" in out
    assert "--learning_rate=0.003" in out  # what the runs were made with
    record = json.loads((tmp_path / "out" / "only" / "compare.json").read_text())
    assert record["command"] == "python experiments/compare.py --report out/only"
    for name in ("compare.md", "compare.json", "compare.png"):
        assert (tmp_path / "out" / "only" / name).stat().st_size > 200

    from model import FFNS

    many = "many $\\a$"  # the title is the folder's name, not a formula
    make_runs(tmp_path / many, dict.fromkeys(FFNS, 0.0), seeds=2)
    works(tmp_path, "--report", many)
    assert (tmp_path / many / "compare.png").read_bytes()[:4] == b"\x89PNG"
    assert not list(tmp_path.rglob("*curves*"))
