"""Never lose a run: bad data, hostile files, bad numbers, full disks, signals, kills.

All of them, with the minutes-long ones: python -m pytest tests/test_faults.py -m "slow or not slow"
"""

from __future__ import annotations

import glob
import json
import os
import pickle
import random
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from trainer import (
    BLOCK,
    ROOT,
    SIZES,
    TORCHRUN,
    TRAIN,
    Run,
    assert_same_run,
    doing,
    flags,
    free_port,
    load,
    losses,
    make_data,
    one_line,
    refused,
    rows,
    same_bits,
    shell,
    start,
    start_ranks,
    tokens,
    train,
    wait_until,
    workers,
    write_shard,
)

sys.path.insert(0, str(ROOT))

from train import read_log

LONG = {"out_dir": "o", "n_layer": 1, "max_iters": 100_000, "save_interval": 4}


def start_machines(*folders: Path, **values) -> list[Run]:
    """Ranks of machines that share no folder: one of each."""
    env = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "LOCAL_RANK": "0"}
    env["WORLD_SIZE"] = str(len(folders))
    values = {"micro_batch_size": 2, "out_dir": "o", **values}
    return [start(cwd, env={**env, "RANK": str(i)}, **values) for i, cwd in enumerate(folders)]


def intact(run_dir: Path) -> dict:
    """The checkpoint, whole and finite."""
    checkpoint = load(run_dir)
    values = [*checkpoint["model"].values()]
    for optimizer in checkpoint["optimizers"]:
        for state in optimizer["state"].values():
            values += [v for v in state.values() if isinstance(v, torch.Tensor)]
    # A run that is stopped before its first step saves too. Its optimizers have no state yet.
    assert (len(values) > len(checkpoint["model"])) == (checkpoint["step"] > 0)
    assert all(v.isfinite().all() for v in values)
    return checkpoint


# ---- data that are wrong from the start ---------------------------------------------------------

SHARD = "x_train_000003.bin"


def truncated(d: Path) -> None:
    os.truncate(d / SHARD, 1024 + 2 * 600)


def half_a_header(d: Path) -> None:
    os.truncate(d / SHARD, 513)


def empty(d: Path) -> None:
    (d / SHARD).write_bytes(b"")


def longer(d: Path) -> None:
    with open(d / SHARD, "ab") as f:
        f.write(b"\0\0")


def odd(d: Path) -> None:
    with open(d / SHARD, "ab") as f:
        f.write(b"\0")


def wrong_magic(d: Path) -> None:
    write_shard(d / SHARD, tokens(700, 2), magic=20240801)


def version_7(d: Path) -> None:
    write_shard(d / SHARD, tokens(700, 2), version=7)


def zero_tokens(d: Path) -> None:
    write_shard(d / SHARD, tokens(0, 2))


def negative_count(d: Path) -> None:
    write_shard(d / SHARD, tokens(700, 2), count=-700)


def directory(d: Path) -> None:
    (d / SHARD).unlink()
    (d / SHARD).mkdir()


def dangling_link(d: Path) -> None:
    (d / SHARD).unlink()
    (d / SHARD).symlink_to(d / "gone")


def missing_middle(d: Path) -> None:
    (d / SHARD).unlink()


def missing_middle_without_meta(d: Path) -> None:
    (d / SHARD).unlink()
    (d / "meta.json").unlink()


def missing_last(d: Path) -> None:
    (d / "x_train_000004.bin").unlink()


def other_encoding(d: Path) -> None:
    write_shard(d / SHARD, tokens(500, 9) + 40_000)


def two_sets_without_meta(d: Path) -> None:
    (d / "meta.json").unlink()
    write_shard(d / "y_train_000001.bin", tokens(500, 9) + 40_000)


def no_number(d: Path) -> None:
    (d / "meta.json").unlink()
    (d / SHARD).rename(d / "x_train_three.bin")


def no_val(d: Path) -> None:
    for path in d.glob("*_val_*"):
        path.unlink()


def short_val(d: Path) -> None:
    resize(d, {"x_val_000000.bin": BLOCK, "x_val_000001.bin": BLOCK})


def short_train(d: Path) -> None:
    resize(d, {name: BLOCK for name in SIZES if "train" in name})


def resize(d: Path, sizes: dict[str, int]) -> None:
    shutil.rmtree(d)
    make_data(d, SIZES | sizes)


def meta(text: str):
    def change(d: Path) -> None:
        (d / "meta.json").write_text(text)

    return change


def incomplete(d: Path) -> None:
    shutil.rmtree(d)
    make_data(d, complete=False)


def vocabulary(size: object):
    def change(d: Path) -> None:
        shutil.rmtree(d)
        make_data(d, vocab_size=size)

    return change


CURE = "prepare_fineweb.py"
BAD_DATA = {
    "truncated": (truncated, [SHARD, "700", "600", CURE]),
    "half a header": (half_a_header, [SHARD, CURE]),
    "empty file": (empty, [SHARD, CURE]),
    "longer than its header says": (longer, [SHARD, "700", "701", CURE]),
    "one byte longer": (odd, [SHARD, CURE]),
    "wrong magic": (wrong_magic, [SHARD, "20240520", CURE]),
    "version 7": (version_7, [SHARD, "version 7", CURE]),
    "zero tokens": (zero_tokens, [SHARD, CURE]),
    "negative count": (negative_count, [SHARD, CURE]),
    "directory in place of a file": (directory, [SHARD, CURE]),
    "dangling link": (dangling_link, [SHARD, CURE]),
    "missing middle shard": (missing_middle, ["train", "3", CURE]),
    "missing middle shard, no meta.json": (missing_middle_without_meta, ["train shard 3", "copy it"]),
    "missing last shard": (missing_last, ["x_train_000004.bin", CURE]),
    "shard of another encoding": (other_encoding, [SHARD, CURE]),
    "two sets in one folder": (two_sets_without_meta, ["x_train", "y_train", "move"]),
    "name without a number": (no_number, ["x_train_three.bin", "rename"]),
    "no validation shard": (no_val, ["val", "data", CURE]),
    "too few tokens for validation": (short_val, ["val", "33", "--block_size"]),
    "too few tokens for one window": (short_train, ["train", "33", "--block_size"]),
    "meta.json is not JSON": (meta("{"), ["meta.json", CURE]),
    "meta.json is a list": (meta("[1]"), ["meta.json", CURE]),
    "meta.json is empty": (meta("{}"), ["meta.json", CURE]),
    "meta.json not finished": (incomplete, ["data", CURE]),
    "vocabulary of zero": (vocabulary(0), ["meta.json", "vocab"]),
    "vocabulary beyond uint16": (vocabulary(10**9), ["meta.json", "vocab"]),
    "vocabulary is text": (vocabulary("many"), ["meta.json"]),
}


@pytest.mark.parametrize("case", BAD_DATA)
def test_bad_data(here: Path, case: str):
    """Each refused before the first step, in one line that names the file and the cure."""
    change, needles = BAD_DATA[case]
    change(here / "data")
    refused(here, flags(out_dir="o"), *needles)
    if case in ("truncated", "dangling link", "meta.json is not JSON"):
        start(here, out_dir="o").fails(*needles)
    assert not (here / "o").exists()


# ---- data that go wrong during the run ----------------------------------------------------------


def shrink(d: Path) -> None:
    for path in d.glob("*_train_*"):
        os.truncate(path, 1024 + 10)


def vanish(d: Path) -> None:
    for path in d.glob("*_train_*"):
        path.unlink()


def beyond_vocabulary(d: Path) -> None:
    for name in SIZES:
        if "train" in name:
            write_shard(d / "new", tokens(SIZES[name], 0) % 2 + 257)
            os.replace(d / "new", d / name)  # at once: no step sees half of it


def vanish_val(d: Path) -> None:
    (d / "x_val_000001.bin").unlink()


MIDWAY = {
    "shrinks": (shrink, ["x_train_", "shrank"]),
    "vanishes": (vanish, ["x_train_", "No such file"]),
    "ids over the vocabulary": (beyond_vocabulary, ["x_train_", "25", "257"]),
    "validation shard vanishes": (vanish_val, ["x_val_000001.bin", "No such file"]),
}


@pytest.mark.parametrize("case", MIDWAY)
def test_data_that_go_wrong_during_the_run(here: Path, case: str):
    """An error that names the shard before the batch is used; the checkpoint is intact, and the run
    goes on when the shard is back, with the bits of an undisturbed one."""
    change, needles = MIDWAY[case]
    shutil.copytree(here / "data", here / "good")
    run = start(here, **LONG, eval_interval=8)
    run.wait_for("step      9/")
    change(here / "data")
    run.fails(*needles)
    step = intact(here / "o")["step"]
    assert step >= 4
    if case in ("shrinks", "validation shard vanishes"):
        shutil.rmtree(here / "data")
        (here / "good").rename(here / "data")
        again = {**LONG, "max_iters": step + 9, "lr_decay_iters": 100_000}
        train(here, init_from="auto", **again)
        train(here, **{**again, "out_dir": "straight"})
        assert_same_run(here / "o", here / "straight")


def test_an_error_of_one_rank_is_told(here: Path):
    """Bad data that only the other rank reads, here in validation: that rank names the shard, and no
    other rank goes on."""
    bad = tokens(SIZES["x_val_000000.bin"], 4)
    bad[BLOCK + 5] = 300  # in window 1, which rank 1 reads
    write_shard(here / "data" / "x_val_000000.bin", bad)
    ranks = start_ranks(here, 2, **LONG, micro_batch_size=1)
    ranks[1].fails("x_val_000000.bin: token id 300")
    assert ranks[0].wait().code == 1


def test_an_error_of_one_machine_is_told(here: Path):
    """Before the ranks have met, too: rank 0 knows nothing of it, so the rank says it itself."""
    (here / "two" / "data").mkdir(parents=True)
    ranks = start_machines(here, here / "two")
    try:
        ranks[1].fails("no train shards in data", "prepare_fineweb.py")
    finally:
        ranks[0].process.kill()  # waits for the other one, till torchrun ends it


# ---- checkpoints --------------------------------------------------------------------------------


class Payload:
    def __reduce__(self):
        return os.system, ("touch pwned",)


def hostile_model(c: dict, path: Path) -> None:
    torch.save({**c, "model": Payload()}, path)


def hostile_flags(c: dict, path: Path) -> None:
    torch.save({**c, "flags": {**c["flags"], "ffn": Payload()}}, path)


def plain_pickle(c: dict, path: Path) -> None:
    path.write_bytes(pickle.dumps(Payload()))


def old_format(c: dict, path: Path) -> None:
    torch.save({**c, "step": Payload()}, path, _use_new_zipfile_serialization=False)


def cut(c: dict, path: Path) -> None:
    os.truncate(path, path.stat().st_size * 2 // 3)


def emptied(c: dict, path: Path) -> None:
    os.truncate(path, 0)


def text(c: dict, path: Path) -> None:
    path.write_text("not a checkpoint")


def folder(c: dict, path: Path) -> None:
    path.unlink()
    path.mkdir()


def a_list(c: dict, path: Path) -> None:
    torch.save([1, 2], path)


def saves(**changes):
    def change(c: dict, path: Path) -> None:
        torch.save({**c, **{key: f(c[key]) for key, f in changes.items()}}, path)

    return change


def other_flags(**values):
    return saves(flags=lambda flags: {**flags, **values})


def wider(model: dict) -> dict:
    return {name: torch.cat([t, t]) for name, t in model.items()}


def other_state(optimizers: list) -> list:
    for state in optimizers[0]["state"].values():
        state["exp_avg"] = torch.zeros(7, 7)
    return optimizers


BAD_CHECKPOINTS = {
    "pickle payload as weights": hostile_model,
    "pickle payload as a flag": hostile_flags,
    "a plain pickle": plain_pickle,
    "payload in the old format": old_format,
    "truncated": cut,
    "empty": emptied,
    "text": text,
    "a directory": folder,
    "a list": a_list,
    "weights of another shape": saves(model=wider),
    "a weight missing": saves(model=lambda m: dict(list(m.items())[1:])),
    "a weight too many": saves(model=lambda m: {**m, "extra": torch.zeros(1)}),
    "weights are no dictionary": saves(model=lambda m: 7),
    "flags of another shape": other_flags(n_embd=64),
    "an unknown flag": other_flags(colour="red"),
    "a flag of another type": other_flags(n_layer="many"),
    "a choice that there is not": other_flags(schedule="linear"),
    "flags are text": saves(flags=lambda f: "flags"),
    "no optimizer": saves(optimizers=lambda o: []),
    "optimizer of another shape": saves(optimizers=other_state),
    "optimizer is text": saves(optimizers=lambda o: ["adamw"]),
    "step is text": saves(step=lambda s: "four"),
    "step is negative": saves(step=lambda s: -4),
}


def test_hostile_and_damaged_checkpoints(here: Path):
    """Each is refused in one line that names the file; nothing in it runs; it is left as it is, and
    --init_from=auto does not take it for no checkpoint."""
    train(here, out_dir="o", n_layer=1, max_iters=4)
    for i, (case, change) in enumerate(BAD_CHECKPOINTS.items()):
        print(case)  # which one fails
        shutil.copytree(here / "o", here / f"{i}")
        change(load(here / "o"), here / f"{i}" / "ckpt.pt")
        argv = [f"--init_from={'auto' if i % 2 else 'resume'}", f"--out_dir={i}", "--max_iters=6"]
        if case in ("pickle payload as weights", "text", "optimizer of another shape"):
            Run(here, argv).fails("ckpt.pt")
        refused(here, argv, "ckpt.pt")
        assert (here / f"{i}" / "ckpt.pt").exists()
    assert not (here / "pwned").exists()


def test_ranks_that_cannot_reach_each_other(here: Path):
    """As where each machine's name means itself to it: gloo's error becomes one line with the cure."""
    code = """
        import torch.distributed as dist
        def refused(*args, **more):
            raise RuntimeError("Gloo connectFullMesh failed with: Connection refused")
        dist.init_process_group = refused
    """
    code = f"{textwrap.dedent(code)}runpy.run_path({TRAIN!r}, run_name='__main__')"
    (run,) = start_machines(here, code=code)
    run.fails("connectFullMesh", "GLOO_SOCKET_IFNAME")


def test_ranks_with_different_checkpoints(here: Path):
    """Two machines whose out_dir is not shared: refused, not trained from two different steps."""
    train(here, out_dir="o", n_layer=1, max_iters=2, lr_decay_iters=9)
    shutil.copytree(here, here / "one")
    torch.save({**load(here / "o"), "step": 4}, here / "one" / "o" / "ckpt.pt")
    for rank in start_machines(here, here / "one", n_layer=1, max_iters=9, init_from="auto"):
        rank.fails("checkpoint", "--out_dir")
    assert load(here / "o")["step"] == 2


def test_ranks_with_different_shards(here: Path):
    """Two machines of which one has other data: refused, not trained on either."""
    make_data(here / "other" / "data", {**SIZES, "x_train_000003.bin": 701})
    for rank in start_machines(here, here / "other"):
        rank.fails("different shards", "--data_dir")
    assert not (here / "o" / "ckpt.pt").exists()


# ---- numbers ------------------------------------------------------------------------------------


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_non_finite(here: Path, optimizer: str):
    """The update is never saved; the step and the last good checkpoint are named; exit code 1. The
    checkpoint is that of a run which stops a step earlier, and a resumed run stops as well."""
    values = {"learning_rate": 1e30, "warmup_iters": 0, "lr_decay_iters": 50, "n_layer": 1}
    values |= {"optimizer": optimizer, "save_interval": 1, "eval_interval": 99, "grad_clip": 0}
    run = start(here, out_dir="o", **values)
    good = run.wait().err.split("at step ")[1].split(":")[0]
    line = run.fails("not finite", "o/ckpt.pt", f"at step {good}")
    assert f"step {int(good) + 1}:" in line
    assert intact(here / "o")["step"] == int(good)
    if int(good):
        train(here, **{**values, "out_dir": "short", "max_iters": int(good), "eval_interval": 1000})
        for key in ("model", "optimizers"):
            assert same_bits(load(here / "o")[key], load(here / "short")[key])
    again = start(here, out_dir="o", init_from="auto", **{**values, "log_interval": 7})
    again.fails(f"step {int(good) + 1}:", "not finite", "o/ckpt.pt")
    assert load(here / "o")["step"] == int(good)
    text = (here / "o" / "log.jsonl").read_text()
    assert "NaN" not in text
    assert "Infinity" not in text


def test_infinite_weights_are_not_saved(here: Path):
    """A learning rate beyond float32 makes them from a finite gradient, which no loss shows yet."""
    values = {"learning_rate": 1e39, "warmup_iters": 0, "n_layer": 1, "save_interval": 1}
    start(here, out_dir="o", **values).fails("step 1: a weight is not finite", "no checkpoint")
    assert not (here / "o" / "ckpt.pt").exists()


def test_non_finite_with_two_ranks(here: Path):
    """As above; nothing was saved yet, and the failed update is not saved either."""
    values = {"learning_rate": 1e30, "warmup_iters": 0, "n_layer": 1, "micro_batch_size": 1}
    ranks = start_ranks(here, 2, out_dir="o", log_interval=5, **values)
    ranks[0].fails("not finite", "no checkpoint")
    assert ranks[1].wait(60).code == 1
    assert not (here / "o" / "ckpt.pt").exists()


# ---- disks --------------------------------------------------------------------------------------


def test_no_space_for_the_log(here: Path):
    """Warnings; the run goes on to the same weights, and a row that is half written is skipped."""
    train(here, out_dir="a", n_layer=1, max_iters=12)
    train(here, out_dir="o", n_layer=1, max_iters=2, lr_decay_iters=12)
    log = here / "o" / "log.jsonl"
    log.write_text(log.read_text() + json.dumps({"step": 0, "pad": "x" * 2_000_000}) + "\n")
    limit = log.stat().st_size + 700
    values = {"out_dir": "o", "n_layer": 1, "max_iters": 12, "init_from": "resume"}
    run = start(here, file_limit=limit, **values).works()
    assert "warning: cannot write o/log.jsonl" in run.out
    assert same_bits(load(here / "a")["model"], load(here / "o")["model"])
    steps = [row["step"] for row in read_log(str(log)) if "train_loss" in row]
    assert 3 in steps
    assert 12 not in steps


def test_a_log_that_is_lost_is_a_warning(here: Path):
    """A folder where log.jsonl was, during the run; and bytes that are no text, before it."""
    lost = "if n == 3:\n    os.unlink('o/log.jsonl')\n    os.mkdir('o/log.jsonl')"
    run = start(here, **{**LONG, "max_iters": 9}, code=doing(lost))
    assert "warning: cannot write" in run.works().out
    assert load(here / "o")["step"] == 9
    train(here, out_dir="p", max_iters=2, lr_decay_iters=4)
    log = here / "p" / "log.jsonl"
    log.write_bytes(b"\xff\xfe\n" + log.read_bytes() + b'{"step": \xff')
    train(here, out_dir="p", init_from="resume", max_iters=4)
    assert list(losses(here / "p")) == [1, 2, 3, 4]


def test_no_space_for_the_checkpoint(here: Path):
    """Exit code 1, the last good checkpoint kept and nothing half-written beside it; with room
    again the run goes on to the bits of an undisturbed one."""
    values = {"out_dir": "o", "n_layer": 1, "lr_decay_iters": 12, "save_interval": 5}
    start(here, file_limit=100_000, **values).fails("cannot save", "at step 5", "none yet")
    assert set(glob.glob("*", root_dir=here / "o")) == {"config.json", "log.jsonl", "model.py"}

    train(here, **{**values, "max_iters": 4})
    before = (here / "o" / "ckpt.pt").read_bytes()
    run = start(here, file_limit=100_000, init_from="auto", **{**values, "max_iters": 12})
    run.fails("cannot save", "o/ckpt.pt", "at step 5", "intact")
    assert (here / "o" / "ckpt.pt").read_bytes() == before
    assert not list(here.glob("o/*.tmp"))
    train(here, init_from="auto", **{**values, "max_iters": 12})
    train(here, **{**values, "out_dir": "a", "max_iters": 12})
    assert_same_run(here / "o", here / "a")


# ---- signals ------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_one_signal_saves_and_stops(here: Path, number: int):
    """The step in flight finishes, a checkpoint is saved, exit code 0, a line says how to resume;
    the resumed run has the bits of an undisturbed one."""
    long = {**LONG, "save_interval": 1000, "lr_decay_iters": 100_000}
    run = start(here, **long)
    run.wait_for("step      5/")
    run.kill(number)
    run.works()
    step = intact(here / "o")["step"]
    assert step >= 5
    assert f"step {step}" in run.out
    assert "--init_from=resume --out_dir=o" in run.out
    if number == signal.SIGTERM:
        train(here, init_from="resume", **{**long, "max_iters": step + 9})
        train(here, **{**long, "out_dir": "straight", "max_iters": step + 9})
        assert_same_run(here / "o", here / "straight")


def test_a_signal_during_validation_saves_and_stops(here: Path):
    """A validation of minutes is not waited for: what was trained is saved first, and the resumed run
    evaluates where it was stopped, at the end of the run too."""
    values = {"out_dir": "o", "lr_decay_iters": 3, "micro_batch_size": 1, "init_from": "auto"}
    train(here, max_iters=2, **values)
    # The resumed run reads a batch for its step, then those of the last validation.
    code = doing("if n == 3: os.kill(os.getpid(), signal.SIGTERM)", "prepare_fineweb.read_windows")
    assert "stopped at step 3" in start(here, max_iters=3, code=code, **values).works().out
    assert intact(here / "o")["step"] == 3
    assert 3 not in losses(here / "o", "val_loss")
    train(here, max_iters=3, **values)
    assert 3 in losses(here / "o", "val_loss")


def test_a_cache_folder_that_cannot_be_made(here: Path):
    """PyTorch makes it when its optimizers are imported, with --compile=False too."""
    env = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": "/proc/nowhere"}
    argv = [sys.executable, TRAIN, *flags(out_dir="o", max_iters=2)]
    done = subprocess.run(argv, cwd=here, capture_output=True, text=True, env=env)
    one_line(done.returncode, done.stderr, "/proc/nowhere", "TORCHINDUCTOR_CACHE_DIR")


MOMENTS = [  # and how a run ends that is told to stop there: until the model is checked, by the signal
    ("configurator.read_launcher", signal.SIGTERM, -signal.SIGTERM),
    ("prepare_fineweb.open_data", signal.SIGINT, 130),
    ("prepare_fineweb.lock_folder", signal.SIGTERM, -signal.SIGTERM),
    ("prepare_fineweb.whole_file", signal.SIGINT, 130),
    ("model.check_ffns", signal.SIGTERM, -signal.SIGTERM),
    ("prepare_fineweb.read_windows", signal.SIGINT, 0),
    ("prepare_fineweb.locate", signal.SIGTERM, 0),
]


@pytest.mark.parametrize("place, number, ends", MOMENTS)
def test_a_signal_at_each_moment_of_the_start(here: Path, place: str, number: int, ends: int):
    """Until the model is checked a signal ends the process, with its usual code and without a word. From
    then on the run saves, and what it leaves can be gone on from."""
    code = doing(f"if n == 1: os.kill(os.getpid(), {int(number)})", place)
    run = start(here, **{**LONG, "max_iters": 50}, code=code).wait()
    assert (run.code, run.err) == (ends, "")
    if not ends:
        assert intact(here / "o")["step"] <= 1


def test_a_signal_before_the_first_step(here: Path):
    """During the first validation: the run saves step 0, and goes on from it with the bits of a straight
    run."""
    code = doing("if n == 1: os.kill(os.getpid(), signal.SIGTERM)", "prepare_fineweb.read_windows")
    run = start(here, out_dir="o", code=code).works()
    assert "stopped at step 0 of" in run.out
    assert intact(here / "o")["step"] == 0
    train(here, out_dir="o", init_from="auto")
    train(here, out_dir="straight")
    assert_same_run(here / "o", here / "straight")


def test_a_second_signal_stops_at_once(here: Path):
    """The step is not waited for, and nothing is saved."""
    twice = "os.kill(os.getpid(), signal.SIGTERM)\n" * 2 + "sys.exit('it went on')"
    run = start(here, **LONG, code=doing(twice))
    assert run.wait().code == -signal.SIGTERM, run.err
    assert not (here / "o" / "ckpt.pt").exists()


def test_a_terminal_that_closes(here: Path):
    """It sends SIGHUP, perhaps several times and then SIGTERM, and takes no more output: the run saves.
    Under nohup it goes on, whoever reads what it prints."""
    for start_with, end in (("SIG_DFL", 3), ("SIG_IGN", 9)):
        code = f"import os, signal\nsignal.signal(signal.SIGHUP, signal.{start_with})\n"
        lost = "if n == 3:\n    os.dup2(os.open('/dev/full', os.O_WRONLY), 1)\n"
        lost += "    [os.kill(os.getpid(), signal.SIGHUP) for _ in range(3)]\n"
        lost += "    os.kill(os.getpid(), signal.SIGTERM)" * (start_with == "SIG_DFL")
        code += doing(lost) + "sys.stdout = open(os.devnull, 'w')"  # which Python flushes at its end
        start(here, **LONG | {"out_dir": f"o{end}", "max_iters": 9}, code=code).works()
        assert intact(here / f"o{end}")["step"] == end


def test_a_signal_that_comes_twice_under_a_launcher_is_one(here: Path):
    """Ctrl-C in a terminal reaches a rank directly and through torchrun, a moment later."""
    twice = "for sent in (signal.SIGINT, signal.SIGTERM) if n == 6 else (): os.kill(os.getpid(), sent)"
    (run,) = start_ranks(here, 1, **{**LONG, "save_interval": 1000}, code=doing(twice))
    run.works()
    assert intact(here / "o")["step"] == 6


def test_a_signal_to_one_rank_stops_all_at_one_step(here: Path):
    """Both ranks exit 0 with one checkpoint, which a straight run of as many steps has as well."""
    long = {**LONG, "save_interval": 1000, "lr_decay_iters": 100_000, "micro_batch_size": 1}
    ranks = start_ranks(here, 2, **long)
    ranks[0].wait_for("step      5/")
    ranks[1].kill(signal.SIGTERM)
    for run in ranks:
        run.works()
    step = intact(here / "o")["step"]
    assert f"stopped at step {step}" in ranks[0].out
    for run in start_ranks(here, 2, **{**long, "out_dir": "straight", "max_iters": step}):
        run.works()
    assert_same_run(here / "o", here / "straight")


def test_a_signal_to_one_rank_during_validation(here: Path):
    """All ranks stop: none waits for the others' losses."""
    code = "if n == 3 and os.environ['RANK'] == '1': os.kill(os.getpid(), signal.SIGTERM)"
    code = doing(code, "prepare_fineweb.read_windows")
    values = {"out_dir": "o", "max_iters": 3, "eval_interval": 1000, "micro_batch_size": 1}
    ranks = start_ranks(here, 2, code=code, **values)
    try:
        for run in ranks:
            assert run.wait(30).code == 0, run.err
    finally:
        for run in ranks:
            run.process.kill()
    assert "stopped at step 0" in ranks[0].out
    assert not losses(here / "o", "val_loss")


def test_a_rank_that_dies_ends_the_other(here: Path):
    """kill -9 of either rank: the other one exits 1 by itself and saves nothing."""
    for dead in (0, 1):
        ranks = start_ranks(here, 2, **{**LONG, "out_dir": f"{dead}"}, micro_batch_size=1)
        wait_until((here / f"{dead}" / "ckpt.pt").exists, 60)
        ranks[dead].kill(signal.SIGKILL)
        assert ranks[1 - dead].wait().code == 1
        assert intact(here / f"{dead}")["step"] % 4 == 0


def test_restarted_ranks_do_not_meet_the_dead(here: Path):
    """torchrun's agent keeps its store when it starts the ranks again, and with it the addresses of
    the dead ones: read again, they hang one restart in six. So a restart uses keys of its own."""
    store = torch.distributed.TCPStore("127.0.0.1", 0, 2, True, wait_for_workers=False)
    env = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port), "WORLD_SIZE": "2"}
    env |= {"TORCHELASTIC_USE_AGENT_STORE": "True", "LOCAL_WORLD_SIZE": "2"}
    values = {"n_layer": 1, "out_dir": "o", "micro_batch_size": 2, "init_from": "auto"}
    keys = [store.num_keys()]
    for attempt in range(2):
        env["TORCHELASTIC_RESTART_COUNT"] = str(attempt)
        ranks = [{**env, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(2)]
        values["max_iters"] = 3 + attempt
        for run in [start(here, env=mine, **values) for mine in ranks]:
            run.works()
        keys.append(store.num_keys())
    assert keys[2] > keys[1] > keys[0], keys
    assert load(here / "o")["step"] == 4


def torchrun(cwd: Path, *agent: str, **values) -> subprocess.Popen:
    return shell(cwd, *TORCHRUN, *agent, TRAIN, *flags(micro_batch_size=2, **values))


def end(process: subprocess.Popen) -> None:
    """Of an agent and, should there be any, its ranks."""
    for pid in [process.pid, *workers(process.pid)]:
        if process.poll() is None or pid != process.pid:
            os.kill(pid, signal.SIGKILL)
    process.wait(10)


def test_torchrun_signals_and_a_killed_rank(here: Path):
    """The real torchrun. SIGTERM to its agent: the ranks save one step and exit; the agent's own
    code is not 0. Gone on from there, kill -9 of a rank: the job ends within 60 s with a code that
    is not 0, and the checkpoint is intact."""
    agent = torchrun(here, init_from="auto", **LONG)
    try:
        wait_until((here / "o" / "ckpt.pt").exists, 120, (here / "shell.err").read_text)
        agent.terminate()
        assert agent.wait(60) != 0
        out = (here / "shell.out").read_text()
        step = intact(here / "o")["step"]
        assert f"stopped at step {step}" in out

        agent = torchrun(here, init_from="auto", **LONG)
        wait_until(lambda: load(here / "o")["step"] > step, 120, (here / "shell.err").read_text)
        os.kill(workers(agent.pid)[1], signal.SIGKILL)
        assert agent.wait(60) != 0
        assert intact(here / "o")["step"] % 4 == 0
    finally:
        end(agent)


# ---- minutes ------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_thirty_kills(here: Path):
    """kill -9 at 30 random moments of a run that saves every 3 steps, a third of them while a save
    is under way: there is a whole checkpoint each time, --init_from=auto goes on from it, and the
    weights at the end are those of an undisturbed run."""
    rng = random.Random(0)
    values = {"n_layer": 2, "lr_decay_iters": 1500, "save_interval": 3, "eval_interval": 50}
    kills, during_save, steps = 0, 0, []
    slow = doing("time.sleep(0.01)", "os.fsync")  # or a fast disk has saved before the kill
    while kills < 30:
        run = start(here, out_dir="o", init_from="auto", max_iters=100_000, code=slow, **values)
        tmp, moment = here / "o" / "ckpt.pt.tmp", rng.random()
        if kills % 3 == 0:
            tmp.unlink(missing_ok=True)
            while not tmp.exists() and run.process.is_alive():
                time.sleep(0.0002)
            time.sleep(moment * 0.004)
        elif kills % 3 == 1:
            time.sleep(3 * moment)
        else:
            wait_until(lambda r=run: "step" in r.out or not r.process.is_alive(), 60)
            time.sleep(moment / 2)
        run.kill(signal.SIGKILL)
        assert run.wait().code == -signal.SIGKILL
        kills += 1
        during_save += tmp.exists()
        if (here / "o" / "ckpt.pt").exists():
            steps.append(intact(here / "o")["step"])
            assert steps[-1] % 3 == 0
    assert steps == sorted(steps), "a checkpoint was lost"
    values["max_iters"] = steps[-1] + 20
    train(here, out_dir="o", init_from="auto", **values)
    train(here, **{**values, "out_dir": "straight", "save_interval": 100_000})
    assert_same_run(here / "o", here / "straight")
    assert losses(here / "o") == losses(here / "straight")
    print(f"\n30 kills, {during_save} during a save, {len(set(steps))} different checkpoints")
    assert during_save >= 3


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_torchrun_restarts_and_finishes_by_itself(here: Path):
    """--max-restarts=1 with --init_from=auto: a rank is killed, the run ends as an undisturbed one."""
    values = {**LONG, "max_iters": 300}
    agent = torchrun(here, "--max-restarts=1", init_from="auto", **values)
    try:
        wait_until((here / "o" / "ckpt.pt").exists, 120, (here / "shell.err").read_text)
        os.kill(workers(agent.pid)[1], signal.SIGKILL)
        assert agent.wait(240) == 0, (here / "shell.err").read_text()
        for run in start_ranks(here, 2, **{**values, "out_dir": "straight", "micro_batch_size": 2}):
            run.works()
        assert_same_run(here / "o", here / "straight")
    finally:
        end(agent)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_two_agents(here: Path):
    """Two machines, here two torchrun agents with a c10d rendezvous on loopback: the losses of one
    process."""
    port, values = free_port(), {"max_iters": 20, "n_layer": 1, "learning_rate": 3e-3}
    agents = []
    try:
        for node in range(2):
            cwd = here / f"node{node}"
            cwd.mkdir()
            agents.append(
                shell(
                    cwd, sys.executable, "-m", "torch.distributed.run", "--nnodes=2",
                    "--nproc_per_node=1", "--rdzv_backend=c10d", "--rdzv_id=test",
                    f"--rdzv_endpoint=127.0.0.1:{port}", "--local_addr=127.0.0.1", TRAIN,
                    *flags(**values, out_dir=here / "two", data_dir=here / "data", micro_batch_size=2),
                )
            )  # fmt: skip
        for node, agent in enumerate(agents):
            assert agent.wait(240) == 0, (here / f"node{node}" / "shell.err").read_text()
    finally:
        for agent in agents:
            end(agent)
    train(here, out_dir="one", **values)
    for key in ("train_loss", "val_loss"):
        one, two = losses(here / "one", key), losses(here / "two", key)
        assert one.keys() == two.keys()
        assert max(abs(one[step] - two[step]) for step in one) < 1e-5


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_soak(here: Path):
    """2,000 steps, 70 epochs: resident memory, open files and step time are flat."""
    values = {"out_dir": "o", "n_layer": 1, "max_iters": 2000, "save_interval": 50}
    run = start(here, **values, eval_interval=50)
    seen: list[tuple[int, int, int]] = []  # step, resident kB, open files
    while run.process.is_alive():
        try:
            status = Path(f"/proc/{run.pid}/status").read_text()
            rss = int(status.split("VmRSS:")[1].split()[0])
            files = len(os.listdir(f"/proc/{run.pid}/fd"))
            step = int(run.out.rsplit("\nstep", 1)[1].split("/")[0])
        except (OSError, IndexError, ValueError):
            continue
        finally:
            time.sleep(0.05)
        seen.append((step, rss, files))
    run.works()
    ms = np.array([row["step_ms"] for row in rows(here / "o").values()])
    early, late = [[s for s in seen if a <= s[0] < b] for a, b in ((200, 600), (1600, 2000))]
    rss = [np.median([s[1] for s in part]) / 1024 for part in (early, late)]
    files = [max(s[2] for s in part) for part in (early, late)]
    times = [float(np.median(part)) for part in (ms[200:600], ms[1600:2000])]
    print(f"\nsteps 200-600 and 1600-2000: resident {rss} MiB, open files {files}, step {times} ms")
    assert rss[1] < rss[0] + 8
    assert files[1] <= files[0] + 1
    assert times[1] < 1.5 * times[0]
