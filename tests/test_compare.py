"""
experiments/compare.py from outside: real runs of train.py for what it starts, stops and resumes;
made-up logs for what it computes, with every figure computed again here from those logs.
"""

from __future__ import annotations

import inspect
import json
import math
import os
import re
import runpy
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
from scipy import stats
from trainer import FORK, ROOT, TINY, make_data, one_line, rows, wait_until

import train
from configurator import UserError

SCRIPT = str(ROOT / "experiments" / "compare.py")
FORK.set_forkserver_preload(["torch", "torch._dynamo", "numpy", "scipy.stats", "matplotlib.pyplot"])


def _child(script: str, argv: list[str], cwd: str, out: str, err: str) -> None:
    for fd, path in ((1, out), (2, err)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644), fd)
    sys.stdout = open(1, "w", closefd=False)  # noqa: SIM115
    sys.stderr = open(2, "w", closefd=False, buffering=1)  # noqa: SIM115
    os.chdir(cwd)
    sys.argv = [script, *argv]
    try:
        runpy.run_path(script, run_name="__main__")
    finally:
        sys.stdout.flush()


def call(cwd: Path, *argv: str, script: str = SCRIPT) -> tuple[int, str, str]:
    """A script in a process of its own, forked from one that has imported PyTorch: its exit code,
    stdout and stderr."""
    out, err = cwd / "call.out", cwd / "call.err"
    process = FORK.Process(target=_child, args=(script, list(argv), str(cwd), str(out), str(err)))
    process.start()
    process.join(200)
    assert process.exitcode is not None, "still running"
    texts = out.read_text(), err.read_text()
    out.unlink()
    err.unlink()
    return process.exitcode, *texts


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
    """Two FFNs, two seeds, two side by side, and one run that cannot work: it is reported with the
    last line of its stderr, the rest is done, and the same command later does only what lacks."""
    write_config(tmp_path, max_iters=6, eval_interval=3)
    out = tmp_path / "out" / "t"
    (out / "geglu-s1").mkdir(parents=True)
    (out / "geglu-s1" / "ckpt.pt").write_bytes(b"garbage")
    command = ["c.py", "--ffn=geglu", "--seeds=2", "--jobs=2", "--name=t", "--max_iters", "4"]
    code, printed, err = call(tmp_path, *command)
    assert code == 1
    assert "Traceback" not in err
    assert re.search(r"geglu-s1 FAILED: error: .*ckpt\.pt cannot be loaded", printed)
    assert "4 runs: 0 done" in printed
    table = json.loads((out / "compare.json").read_text())
    assert [(row["ffn"], row["n"]) for row in table["rows"]] == [("swiglu", 2), ("geglu", 1)]
    assert table["rows"][1]["verdict"] == "one seed: no verdict"
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
    assert row["n"] == row["pairs"] == 2
    assert (out / "compare.png").stat().st_size > 10_000
    assert (out / "compare.md").read_text() in printed

    # other flags under the same name would mix two comparisons
    fails(tmp_path, *command, "--learning_rate=1e-3", needles=("--learning_rate", "--name"))


def test_a_signal_stops_the_runs_and_the_same_command_goes_on(tmp_path):
    """SIGINT to compare.py alone: its run finishes the step and saves, no process stays, exit code
    130; then the cut run is resumed and no step is logged twice or lost."""
    steps = 600
    write_config(tmp_path, max_iters=steps, eval_interval=1000, save_interval=10_000)
    command = [sys.executable, SCRIPT, "c.py", "--ffn=swiglu", "--seeds=1", "--name=t"]
    run_dir = tmp_path / "out" / "t" / "swiglu-s0"
    with open(tmp_path / "printed", "w") as f:
        process = subprocess.Popen(command, cwd=tmp_path, stdout=f, stderr=f)
    try:
        log = run_dir / "log.jsonl"
        wait_until(lambda: log.exists() and log.read_text().count("\n") > 20, 150)
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

    assert "0 done, 1 to go on with, 0 to start" in works(tmp_path, *command[2:])
    whole = rows(run_dir)
    assert sorted(whole) == list(range(1, steps + 1))
    assert {step: whole[step] for step in cut} == cut


def test_an_error_that_all_runs_would_make_comes_before_any_starts(tmp_path):
    """Typos in flags, specs and papers, missing data, flags that compare.py sets itself."""
    write_config(tmp_path, max_iters=2)
    for argv, needles in [
        (["c.py", "--ffn=geglu", "--learnin_rate=1"], ("did you mean learning_rate",)),
        (["c.py", "--ffn=geglu", "--sedes=3"], ("did you mean seeds",)),
        (["c.py", "--ffn=geglu", "--max_iters=x"], ("--max_iters", "whole number")),
        (["c.py", "--ffn=gegluu"], ("did you mean geglu",)),
        (["c.py", "--ffn=asg:thresh=neuron"], ("did you mean threshold",)),
        (["c.py", "--paper=asgg"], ("did you mean asg",)),
        (["c.py"], ("--ffn", "--paper")),
        (["c.py", "--ffn=geglu", "--seed=3"], ("--seed ", "--seeds")),
        (["c.py", "--ffn=geglu", "--seeds=0"], ("--seeds=0",)),
        (["c.py", "--ffn=geglu", "--lr_sweep=1e-3,fast"], ("--lr_sweep",)),
        (["c.py", "--ffn=geglu", "--lr_sweep=1e-3,nan"], ("--lr_sweep",)),
        (["c.py", "--ffn=geglu", "--lr_sweep=1e-3", "--learning_rate=0"], ("--learning_rate",)),
        (["c.py", "--ffn=geglu", "--ffn_match=wide"], ("--ffn_match=wide",)),
        (["c.py", "--ffn=geglu", "--batch_size=5"], ("--batch_size=5",)),
        (["c.py", "--ffn=geglu", "--data_dir=nowhere"], ("nowhere",)),
        (["nofile.py", "--ffn=geglu"], ("nofile.py",)),
        (["--report", "nowhere"], ("no finished run",)),
        (["c.py", "--report", "nowhere"], ("c.py",)),
    ]:
        fails(tmp_path, *argv, needles=needles)
        assert not (tmp_path / "out").exists(), argv


def planned(monkeypatch, tmp_path: Path, *argv: str) -> dict[str, dict[str, str]]:
    """The runs that a command line would start: {folder: flags}."""
    monkeypatch.syspath_prepend(str(ROOT / "experiments"))
    monkeypatch.chdir(tmp_path)
    import compare

    mine, passed, _ = compare.split(list(argv))
    cfg, _ = compare.configure(compare.Config, mine)
    base, _ = compare.configure(train.Config, passed)
    return {run.dir.removeprefix("out/"): run.flags for run in compare.plan(cfg, base)}


def test_numbers_of_three_digits(monkeypatch):
    """Where rounding carries a number to the next unit, it has that unit's name."""
    monkeypatch.syspath_prepend(str(ROOT / "experiments"))
    import compare

    texts = {0: "0.00", 7: "7.00", 999: "999", 999.7: "1.00K", 1000: "1.00K", 999_499: "999K",
             999_700: "1.00M", 12_345_678: "12.3M", 2.5e12: "2.50T"}  # fmt: skip
    assert {x: compare.big(x) for x in texts} == texts
    assert compare.big(1500, 1000) == "1.50K (1.50x)"


def test_what_is_planned(monkeypatch, tmp_path):
    """Which runs a command means: SwiGLU always, once; the widths of --ffn_match; a sweep for all
    alike with min_lr in proportion; each row of a paper's table."""
    write_config(tmp_path, max_iters=4, min_lr=1e-3)
    runs = planned(monkeypatch, tmp_path, "c.py", "--ffn=asg,geglu", "--ffn_match=both", "--seeds=2")
    # GEGLU of SwiGLU's parameters is GEGLU of SwiGLU's width: one run, not two
    names = ["swiglu-s0", "asg-s0", "asg-s0-params", "geglu-s0"]
    assert list(runs) == [f"compare/{n.replace('s0', s)}" for s in ("s0", "s1") for n in names]
    assert runs["compare/asg-s1-params"]["ffn_match"] == "params"
    assert runs["compare/asg-s1"]["ffn_match"] == "hidden"

    runs = planned(monkeypatch, tmp_path, "c.py", "--ffn=asg", "--ffn_match=params", "--seeds=1")
    assert list(runs) == ["compare/swiglu-s0", "compare/asg-s0-params"]

    # one FFN however it is written
    runs = planned(monkeypatch, tmp_path, "c.py", "--ffn=sparseglu:p=64,swiglu,sparseglu", "--seeds=1")
    assert list(runs) == ["compare/swiglu-s0", "compare/sparseglu:p=64-s0"]

    argv = ["c.py", "--ffn=geglu", "--seeds=1", "--lr_sweep=3e-3,1e-2,0.003", "--name=n"]
    runs = planned(monkeypatch, tmp_path, *argv)
    assert list(runs) == ["n/swiglu-s0-lr0.003", "n/geglu-s0-lr0.003",
                          "n/swiglu-s0-lr0.01", "n/geglu-s0-lr0.01"]  # fmt: skip
    assert [run["learning_rate"] for run in runs.values()] == [3e-3, 3e-3, 1e-2, 1e-2]
    assert [run["min_lr"] for run in runs.values()] == pytest.approx([3e-4, 3e-4, 1e-3, 1e-3])

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
    """Threads divided by --jobs; several GPUs: torchrun on all, or each job on its share."""
    monkeypatch.syspath_prepend(str(ROOT / "experiments"))
    monkeypatch.chdir(tmp_path)
    import compare

    started = []
    monkeypatch.setattr(compare.subprocess, "Popen", lambda c, env, **kw: started.append((c, env)))
    monkeypatch.setenv("OMP_NUM_THREADS", "8")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    base = train.Config()
    run = compare.Run("run", asdict(base), {}, [])

    def commands(gpus: int, jobs: int) -> list[tuple[bool, str, str | None]]:
        monkeypatch.setattr(compare.torch.cuda, "device_count", lambda: gpus)
        started.clear()
        for slot in range(jobs):
            compare.start(run, [], base, slot, jobs)
        return [(f"--nproc_per_node={gpus // jobs}" in command, env["OMP_NUM_THREADS"],
                 env.get("CUDA_VISIBLE_DEVICES")) for command, env in started]  # fmt: skip

    assert commands(gpus=0, jobs=1) == [(False, "8", None)]
    assert commands(gpus=0, jobs=4) == [(False, "2", None)] * 4
    assert commands(gpus=1, jobs=1) == [(False, "8", "0")]
    assert commands(gpus=4, jobs=1) == [(True, "2", "0,1,2,3")]
    assert commands(gpus=4, jobs=2) == [(True, "2", "0,1"), (True, "2", "2,3")]
    assert [c[2] for c in commands(gpus=2, jobs=3)] == ["0", "1", "0"]
    monkeypatch.setenv("OMP_NUM_THREADS", "6,2")  # OpenMP's way to say it for nested levels
    assert commands(gpus=0, jobs=2) == [(False, "3", None)] * 2
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5,7")
    assert [c[2] for c in commands(gpus=2, jobs=2)] == ["5", "7"]


def test_waiting_reads_no_logs(monkeypatch, tmp_path):
    """However long a run takes, its log is read before it starts and after it has ended."""
    monkeypatch.syspath_prepend(str(ROOT / "experiments"))
    monkeypatch.chdir(tmp_path)
    import compare

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
    cfg, base = compare.Config(ffn="swiglu", seeds=1), train.Config(max_iters=4, prepare="x")
    assert compare.run_all(compare.plan(cfg, base), [], cfg, base) == 0
    assert len(read) == 2


@pytest.mark.slow
def test_torchrun_on_two_ranks(tmp_path):
    """The command for several GPUs works: here with two pretended GPUs and two real CPU ranks."""
    write_config(tmp_path, max_iters=3, device="auto", micro_batch_size=2)
    code = (f"import sys, runpy, torch; torch.cuda.device_count = lambda: 2; sys.argv[0] = {SCRIPT!r}; "
            f"runpy.run_path({SCRIPT!r}, run_name='__main__')")  # fmt: skip
    command = [sys.executable, "-c", code, "c.py", "--ffn=swiglu", "--seeds=1", "--name=t"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=250)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "device  cpu x 2" in (tmp_path / "out" / "t" / "swiglu-s0" / "train.txt").read_text()


# ---- made-up runs -------------------------------------------------------------------------------


def make_run(folder: Path, losses: list[float], speed: float = 1000.0, active=None, **flags) -> None:
    """A finished run of 4 steps: its val losses at steps 0, 2 and 4."""
    folder.mkdir(parents=True)
    flags = {"max_iters": 4, "lr_decay_iters": 4, "batch_size": 2, "block_size": 8, "n_layer": 2,
             "n_head": 2, "n_kv_head": 1, "n_embd": 128, "ffn_hidden": 256, **flags}  # fmt: skip
    resolved = asdict(train.Config(**{"out_dir": str(folder), **flags}))
    made = {"flags": resolved, "torch": "2", "device": "cpu", "git_commit": "abc", "vocab_size": 384}
    (folder / "config.json").write_text(json.dumps(made))
    log = []
    for step, loss in zip((0, 2, 4), losses):
        if step:  # one slow step, which a median must not see
            log += [{"step": s, "tokens": 16 * s, "train_loss": loss, "tok_per_s": v}
                    for s, v in ((step - 1, speed), (step, speed if step > 2 else 1.0))]  # fmt: skip
        row = {"step": step, "tokens": 16 * step, "val_loss": loss}
        log.append(row if active is None else row | {"active": active})
    (folder / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in log))


def make_runs(folder: Path, effects: dict[str, float], seeds: int, noise: float = 0.004, **flags):
    """Runs whose final losses are seed + effect + noise. {spec: final losses by seed}."""
    rng = np.random.default_rng(0)
    shared, final = rng.normal(0, 0.05, seeds), {}
    for spec, effect in effects.items():
        final[spec] = 2 + shared + effect + rng.normal(0, noise, seeds)
        for s, loss in enumerate(final[spec].tolist()):
            # an earlier, better checkpoint, which nobody may pick
            make_run(folder / f"{spec}-s{s}", [6.0, loss - 0.5, loss], ffn=spec, seed=s, data_seed=s,
                     speed=1000 if spec == "swiglu" else 800, **flags)  # fmt: skip
    return final


def report(cwd: Path, *argv: str) -> tuple[dict[str, dict], str]:
    """compare.json's rows by spec (and the width's match), and what was printed."""
    out = works(cwd, *argv, "--out=report", "--report", *sorted(map(str, cwd.glob("out/*"))))
    found = json.loads((cwd / "report" / "compare.json").read_text())["rows"]
    return {row["ffn"] + " " + row["match"]: row for row in found}, out


def test_statistics_against_scipy_and_simulation(tmp_path):
    """Difference, interval, p, Holm's correction, verdict and seeds needed, each computed another
    way from the losses that went into the logs."""
    effects = {"swiglu": 0, "geglu": -0.03, "asg": 0.05, "gelu": 0.001, "dsg": 0.006}
    final = make_runs(tmp_path / "out", effects, seeds=5)
    found, out = report(tmp_path, "--detect=0.006")
    assert next(iter(found)) == "swiglu hidden"
    p = {}
    for spec, losses in final.items():
        row = found[f"{spec} hidden"]
        assert row["n"] == 5
        assert row["val_loss"] == pytest.approx(losses.mean(), abs=1e-12)
        assert row["std"] == pytest.approx(losses.std(ddof=1), rel=1e-9)
        if spec == "swiglu":
            assert row["difference"] is None
            assert row["verdict"] == "the baseline"
            continue
        test = stats.ttest_rel(losses, final["swiglu"])
        interval = test.confidence_interval(0.95)
        assert row["difference"] == pytest.approx((losses - final["swiglu"]).mean(), abs=1e-12)
        assert row["p"] == pytest.approx(test.pvalue, rel=1e-6)
        assert (row["low"], row["high"]) == pytest.approx((interval.low, interval.high), abs=1e-9)
        assert row["speed_vs_swiglu"] == pytest.approx(0.8)
        p[spec] = test.pvalue
    # Holm, by its definition: reject in rising order while p <= alpha / (number left); the corrected
    # p is the lowest alpha at which a hypothesis is rejected
    ordered = sorted(p, key=p.get)
    for i, spec in enumerate(ordered):
        lowest = max(min(1, (len(p) - j) * p[ordered[j]]) for j in range(i + 1))
        assert found[f"{spec} hidden"]["p_holm"] == pytest.approx(lowest, rel=1e-6)
    verdicts = {spec: found[f"{spec} hidden"]["verdict"] for spec in p}
    assert verdicts == {"geglu": "better", "asg": "worse", "gelu": "no difference shown",
                        "dsg": verdicts["dsg"]}  # fmt: skip
    # dsg is there for Holm: significant alone, perhaps not among four
    row = found["dsg hidden"]
    assert (row["p_holm"] < 0.05) == (verdicts["dsg"] == "worse")
    for spec in p:
        assert re.search(rf"`{spec}` .*{verdicts[spec]}", out)

    # seeds needed: simulate experiments of that many seeds, and of one less
    row, rng = found["geglu hidden"], np.random.default_rng(1)
    spread = (final["geglu"] - final["swiglu"]).std(ddof=1)
    n = row["seeds_needed"]
    assert n > 3

    def power(n: int) -> float:
        sample = rng.normal(0.006, spread, (20_000, n))
        return (stats.ttest_1samp(sample, 0, axis=1).pvalue < 0.05).mean()

    assert power(n) > 0.79
    assert power(n - 1) < 0.81


def test_holm_can_take_a_verdict_away(tmp_path):
    """A difference that is significant alone and not among many: no difference shown."""
    effects = {"swiglu": 0, "geglu": 0.0055, "gelu": 0, "relu2": 0, "isogmlp": 0, "dualgated": 0}
    make_runs(tmp_path / "out", effects, seeds=4)
    found, _ = report(tmp_path)
    taken = [row for row in found.values() if row["p"] and row["p"] < 0.05 <= row["p_holm"]]
    assert taken, {k: (row["p"], row["p_holm"]) for k, row in found.items()}
    assert all(row["verdict"] == "no difference shown" for row in taken)


def test_costs_papers_and_words(tmp_path):
    """Parameters and FLOPs by hand, the papers' differences, the active share, the same FFN under
    another name, and no verdict from one seed."""
    data = tmp_path / "out"
    for s in range(2):
        for spec, loss, active in [
            ("swiglu", 2.0, None), ("asg", 2.1, 0.27), ("asg:sparse=False", 2.0, 0.0),
            ("sparsegated:k=0.5", 2.2, 0.5), ("dynamicgeglu", 2.1, None), ("spark", 2.2, 0.08),
        ]:  # fmt: skip
            make_run(data / f"{spec}-s{s}", [6, 3, loss + 0.01 * s], ffn=spec, active=active, seed=s,
                     data_seed=s)  # fmt: skip
        width = 192  # 4 matrices of it are 3 of 256
        make_run(data / f"asg-s{s}-params", [6, 3, 2.05 + 0.01 * s], ffn="asg", ffn_match="params",
                 seed=s, data_seed=s)  # fmt: skip
    make_run(data / "geglu-s0", [6, 3, 2.0], ffn="geglu")
    found, out = report(tmp_path)
    d, h, layers, vocab = 128, 256, 2, 384
    swiglu, asg = found["swiglu hidden"], found["asg hidden"]
    assert swiglu["ffn_params"] == layers * 3 * d * h
    norms = layers * (2 * d + 2 * 64) + d
    attention = layers * (2 * d * d + 2 * d * 64)
    assert swiglu["total_params"] == vocab * d + attention + layers * 3 * d * h + norms
    assert swiglu["ffn_flops_per_token"] == swiglu["ffn_active_flops_per_token"] == layers * 6 * d * h
    assert asg["ffn_params"] == layers * (4 * d * h + 1)
    assert asg["ffn_flops_per_token"] == layers * 8 * d * h
    sparse = found["sparsegated:k=0.5 hidden"]
    assert sparse["ffn_active_flops_per_token"] == layers * 2 * (d * h + 2 * d * h // 2 + d * d)
    assert (asg["active"], swiglu["active"]) == (0.27, None)
    matched = found["asg params"]
    assert matched["hidden"] == width
    assert matched["difference"] == pytest.approx(0.05)  # to the same SwiGLU runs

    stated = {spec: row["paper_difference"] for spec, row in found.items()}
    assert stated == {
        "swiglu hidden": None, "asg hidden": 0.18, "asg:sparse=False hidden": 0.0, "asg params": None,
        "sparsegated:k=0.5 hidden": 0.105, "dynamicgeglu hidden": -0.0006, "spark hidden": None,
        "geglu hidden": -0.054,
    }  # fmt: skip
    assert "+0.18 " in out
    same = found["asg:sparse=False hidden"]
    assert (same["difference"], same["p"], same["verdict"]) == (0, 1, "no difference shown")
    assert found["geglu hidden"]["verdict"] == "one seed: no verdict"
    assert found["geglu hidden"]["pairs"] == 1


@pytest.mark.parametrize(
    "flag, value",
    [("max_iters", 8), ("block_size", 16), ("ffn_hidden", 128), ("min_lr", 1e-5), ("beta2", 0.9),
     ("data_dir", "other"), ("learning_rate", 1e-3), ("optimizer", "muon"), ("dtype", "bfloat16")],
)  # fmt: skip
def test_report_refuses_runs_that_differ_in_more_than_the_ffn(tmp_path, flag, value):
    """The flag is named, and no table is written."""
    make_run(tmp_path / "out" / "a", [6, 3, 2], ffn="swiglu")
    folder = tmp_path / "out" / "b"
    make_run(folder, [6, 3, 2], ffn="geglu", **{flag: value})
    if flag == "max_iters":
        log = (folder / "log.jsonl").read_text().replace('"step": 4', '"step": 8')
        (folder / "log.jsonl").write_text(log)
    fails(tmp_path, "--report", "out/a", "out/b", needles=(f"--{flag} ", "out/a", "out/b"))
    assert not list(tmp_path.rglob("compare.*"))


def test_report_leaves_out_the_unfinished_and_refuses_doubles(tmp_path):
    """A cut run is named and has no part in any figure, whatever its flags; so is one whose last
    loss is not a number. The same run from two folders would count twice."""
    make_runs(tmp_path / "out", {"swiglu": 0, "geglu": 0.01}, seeds=3)
    make_run(tmp_path / "out" / "cut", [6, 3], ffn="gelu", batch_size=4)
    make_run(tmp_path / "out" / "lost", [6, 3, math.nan], ffn="relu2")
    (tmp_path / "out" / "empty").mkdir()
    found, out = report(tmp_path)
    assert set(found) == {"swiglu hidden", "geglu hidden"}
    for name in ("cut", "lost", "empty"):
        assert re.search(rf"left out: .*{name}", out)
    # by the folder that holds them, the same
    works(tmp_path, "--report", "out", "--out=again")
    again = json.loads((tmp_path / "again" / "compare.json").read_text())["rows"]
    assert [row["val_loss"] for row in again] == [row["val_loss"] for row in found.values()]

    make_run(tmp_path / "elsewhere" / "x", [6, 3, 2], ffn="geglu", seed=1, data_seed=1)
    fails(tmp_path, "--report", "out", "elsewhere", needles=("same run twice", "x"))


def test_a_sweep_shows_the_best_rate_of_each(tmp_path):
    """By the mean over seeds, for SwiGLU too; a rate at which a seed diverged cannot win; a rate
    tried for one FFN only is refused."""
    losses = {("swiglu", 1e-3): [2.0, 2.2], ("swiglu", 2e-3): [1.9, 2.1],
              ("geglu", 1e-3): [1.95, 2.16], ("geglu", 2e-3): [1.5]}  # fmt: skip
    for (spec, rate), values in losses.items():
        for s in (0, 1):
            last = values[s : s + 1]  # none: it diverged
            make_run(tmp_path / "out" / f"{spec}-s{s}-lr{rate}", [6, 3, *last], ffn=spec, seed=s,
                     data_seed=s, learning_rate=rate, min_lr=rate / 10)  # fmt: skip
    found, out = report(tmp_path)
    rates = {spec: row["learning_rate"] for spec, row in found.items()}
    assert rates == {"swiglu hidden": 2e-3, "geglu hidden": 1e-3}
    assert found["geglu hidden"]["difference"] == pytest.approx(0.055)
    assert "Learning rates 0.001, 0.002 were tried for every row" in out

    for folder in list((tmp_path / "out").glob("geglu-*-lr0.002")):
        folder.rename(tmp_path / folder.name)
    fails(tmp_path, "--report", "out", needles=("--learning_rate", "geglu"))


def test_report_without_a_learning_rate(tmp_path):
    """A control that learns nothing: no ratio to divide by, and min_lr still has to be the same."""
    for spec in ("swiglu", "geglu"):
        make_run(tmp_path / "out" / spec, [6, 6, 6], ffn=spec, learning_rate=0.0, min_lr=0.0)
    found, _ = report(tmp_path)
    assert found["geglu hidden"]["difference"] == 0
    make_run(tmp_path / "out" / "other", [6, 6, 6], ffn="asg", learning_rate=0.0, min_lr=1e-5)
    fails(tmp_path, "--report", "out", needles=("--min_lr ", "other"))


def test_report_of_many_runs_is_linear(tmp_path, monkeypatch):
    """100 runs of matched width: each of the two FFNs' width is found once, by some hundred trials."""
    monkeypatch.syspath_prepend(str(ROOT / "experiments"))
    import compare

    import model

    asked = []
    make_ffn = model.make_ffn
    monkeypatch.setattr(model, "make_ffn", lambda *a: asked.append(a) or make_ffn(*a))
    for s in range(50):
        for spec in ("asg", "dsg"):
            make_run(tmp_path / f"{spec}-s{s}", [6, 3, 2], ffn=spec, ffn_match="params", seed=s,
                     ffn_hidden=264)  # fmt: skip
    runs = compare.find_runs([str(tmp_path), str(tmp_path)])  # given twice, taken once
    assert len(runs) == 100
    compare.check_alike(runs)
    assert len(asked) <= 200


def test_a_class_that_changed_between_runs_of_one_name(tmp_path, monkeypatch):
    """Its old numbers are not shown as new ones, nor paired with them; a comment is no change."""
    monkeypatch.syspath_prepend(str(ROOT / "experiments"))
    monkeypatch.chdir(tmp_path)
    import compare

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

    cfg, base = compare.Config(ffn="mine", seeds=2), train.Config(max_iters=4, prepare="x")
    planned = compare.plan(cfg, base)
    for run in planned:
        made(run, train.ffn_code(run.flags["ffn"]))
    assert compare.run_all(planned, [], cfg, base) == 0
    compare.check_alike(compare.find_runs(["out/compare"]))
    shutil.rmtree(planned[3].dir)
    made(planned[3], first)
    with pytest.raises(UserError, match="class of mine has changed since .*mine-s1"):
        compare.run_all(planned, [], cfg, base)
    with pytest.raises(UserError, match="class of mine changed between .*mine-s"):
        compare.check_alike(compare.find_runs(["out/compare"]))
    path = Path(planned[1].dir, "config.json")
    old = json.loads(path.read_text())
    del old["ffn_code"]  # of a version that did not note the class
    path.write_text(json.dumps(old))
    for order in (1, -1):
        compare.check_alike(compare.find_runs([run.dir for run in planned][::order]))


def test_report_reads_odd_files(tmp_path):
    """What is half written, not UTF-8, not a row or not a run has no part and is no traceback."""
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
    for name in ("list", "text", "deep", "old", "kind"):
        assert re.search(rf"left out: .*{name} holds no run", out)
    for folder in ("out/file", "report/compare.md"):
        fails(tmp_path, "--report", "out", f"--out={folder}", needles=("cannot write", "--out"))


def test_one_run_and_many_rows_are_plotted(tmp_path):
    """What train.py's summary offers: --report of one single run, its table and plot in its own
    folder. And 12 rows get the second figure."""
    # a loss that was not finite for a while has no place in a plot
    make_run(tmp_path / "out" / "only", [6, math.inf, 2], ffn="asg", active=0.3, learning_rate=0.003)
    out = works(tmp_path, "--report", "out/only")
    assert "no SwiGLU run to compare with" in out
    assert "--learning_rate=0.003" in out  # what the runs were made with
    record = json.loads((tmp_path / "out" / "only" / "compare.json").read_text())
    assert record["command"] == "python experiments/compare.py --report out/only"
    for name in ("compare.md", "compare.json", "compare.png"):
        assert (tmp_path / "out" / "only" / name).stat().st_size > 200

    from model import FFNS

    many = "many $\\a$"  # no formula, but the folder's name, as the title
    make_runs(tmp_path / many, dict.fromkeys(FFNS, 0.0), seeds=2)
    works(tmp_path, "--report", many)
    for name in ("compare.png", "compare_curves.png"):
        assert (tmp_path / many / name).read_bytes()[:4] == b"\x89PNG"
