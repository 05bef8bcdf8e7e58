"""
Is this FFN better than SwiGLU, by how much, how sure, and at what price? This program makes many runs
of train.py and turns them into one table and one plot.

    python experiments/compare.py config/tiny.py --ffn=geglu,sparseglu,sparseglu:grad=ste --seeds=5
    python experiments/compare.py config/tiny.py --paper=asg --precision=0.01 --seeds=12
    python experiments/compare.py --report out/tiny                  # only read finished runs

All flags and config files of train.py are valid here too, except eval_only, and except seed, data_seed,
init_from and out_dir, which this program sets. Run s of every FFN has --seed=s and --data_seed=s, so
within a seed all FFNs see the same tokens and start from the same shared weights. The same command skips
the runs that are done and resumes the others. The table has only this command's runs; `--report DIR`
makes one of all runs there. --report reads folders of runs, their parents, and archives (--archive).
"""

from __future__ import annotations

import functools
import glob
import io
import itertools
import json
import math
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
from contextlib import suppress
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from statistics import mean, median, median_high, stdev
from typing import Literal

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import bench
import train
from configurator import UserError, configure, parse_value, run, suggest, user_error
from model import GPT, ffn_code, ffn_cost, parse_spec, set_up, sketch
from prepare_fineweb import cores, has_shards, open_data

try:
    import block_analysis as blocks
    from rendering import big, markdown, plot
except ImportError as e:
    sys.exit(f"error: {e.name} is missing: pip install -r requirements-dev.txt")


@dataclass
class Config(train.Config):
    ffn: str = ""  # specs of the FFNs to compare, comma-separated
    paper: str = ""  # all rows of these papers' tables: dsg, asg, sparsegated, dynamicgeglu, sparseglu
    baseline: str = "swiglu"  # spec of the FFN that all others are compared with
    ffn_match: Literal["hidden", "params", "flops", "both"] = "hidden"  # both: hidden and params
    seeds: int = 3  # seeds 0 to seeds - 1 for each row; --precision may stop earlier
    precision: float = 0.0  # add seeds until all intervals are at most +- this (nats), df >= 20; 0: off
    horizons: bool = True  # time steps; if no sweep, also train the baseline for 0.7 and 1.4 max_iters
    lr_sweep: str = ""  # learning rates to try for every row, comma-separated; the best is shown
    init_sweep: str = ""  # values of --ffn_init_std to try for every row, likewise
    name: str = ""  # runs go to out/{name}; empty: the paper's name, else compare
    jobs: int = 1  # runs side by side
    launch: str = ""  # put before each run's command, "srun --gpus=8 --ntasks=1"; no GPUs: --device=cpu
    plan: bool = False  # only print the runs, the hours and the precision to expect
    noise: float = 0.01  # for --plan: standard deviation in nats that FFN and seed do not explain
    report: str = ""  # --report DIR_OR_ARCHIVE...: read these finished runs, start none
    out: str = ""  # folder for compare.md, .json and .png; empty: beside the runs
    archive: str = ""  # also write the runs' config.json and log.jsonl into this .tar.xz


# Losses minus SwiGLU's as the papers report them (all by "Aardvark", 2025, on FineWeb). They are strings
# because each has the digits that the paper gives. asg:sparse=False is stated to equal SwiGLU.
PAPERS = {
    "dsg": {"dsg": "+0.008"},
    "asg": {"asg": "+0.18", "asg:threshold=fixed:tau=0.1": "+0.30", "asg:threshold=neuron": "+0.25",
            "asg:sparse=False": "+0.000", "multiscale": "-0.135", "dualgated": "-0.134"},
    "sparsegated": {"sparsegated": "+0.163", "sparsegated:split=False": "+0.307",
                    "sparsegated:gate=False": "+0.485", "sparsegated:k=0.5": "+0.105"},
    "dynamicgeglu": {"dynamicgeglu": "-0.0006", "isogmlp": "+0.0214"},
    "sparseglu": {"sparseglu": "+0.093", "geglu": "-0.054"},
}  # fmt: skip

# Flags that cannot change a loss, and flags by which the runs of one comparison may differ.
NEUTRAL = {flag.name for flag in fields(train.Config) if flag.metadata.get("neutral")}
TUNED = ("learning_rate", "ffn_init_std")  # a row shows its best of those that every row has tried
VARIED = {"ffn", "ffn_match", "seed", "data_seed", "min_lr", *TUNED}
DEFAULTS = asdict(train.Config())
ARCHIVE = r"\.(tar(\.\w+)?|t[gx]z)$"
HORIZONS = (0.7, 1.4)  # the baseline's further runs have this many times the steps


@functools.cache
def identity(spec: str) -> str:
    """A spec's key in FFNS and all its options: equal for two specs that build the same FFN."""
    cls, options = parse_spec(spec)
    defaults = getattr(cls.__init__, "__kwdefaults__", None) or {}
    return f"{spec.partition(':')[0]} {sorted((defaults | options).items())}"


# ---- runs on disk -----------------------------------------------------------------------------


class Run:
    """A run that is planned (flags only) or on disk, however far it came."""

    def __init__(self, folder: str, flags: dict, made: dict | None = None, rows: list[dict] = ()):
        self.dir, self.made, self.rows = folder, made or {}, rows
        self.flags = flags | {"data_dir": os.path.normpath(flags["data_dir"])}  # x/ is x
        self.seeds = flags["seed"], flags["data_seed"]
        self.row = identity(flags["ffn"]), self.made.get("hidden") or train.model_config(flags).hidden
        self.match = "hidden" if self.row[1] == flags["ffn_hidden"] else flags["ffn_match"]
        self.label = flags["ffn"] + ("" if self.match == "hidden" else f" ({self.match})")
        self.tuned = tuple(flags[name] for name in TUNED)
        self.tokens = flags["max_iters"] * flags["batch_size"] * flags["block_size"]
        self.factor = 1  # its steps over the comparison's: one of HORIZONS, or 1
        self.val = [row for row in rows if math.isfinite(row.get("val_loss", math.nan))]
        self.done = bool(self.val) and self.val[-1]["step"] == flags["max_iters"] > 0
        self.loss = self.val[-1]["val_loss"] if self.done else math.nan  # the last one, not the best
        lost = bool(rows) and not math.isfinite(rows[-1].get("val_loss", 0))
        said = bool(made) and re.search("error: .*not finite", printed(folder))
        self.diverged = not self.done and bool(lost or said)
        self.ended = self.done or self.diverged

    def too_early(self) -> str:
        """Why its last loss cannot be judged yet; empty if it can."""
        cfg = train.Config(**self.flags)
        if cfg.max_iters <= cfg.warmup_iters:
            return "ended in warm-up"
        return "learning rate not down" if train.schedule(cfg.max_iters - 1, cfg) > 0.5 else ""


def printed(folder: str) -> str:
    with suppress(OSError):
        return Path(folder, "train.txt").read_text(errors="replace")
    return ""


def read_run(folder: str) -> Run | None:
    """The run in a folder; None where there is none. Rows of its log that are damaged are skipped."""
    try:
        with open(os.path.join(folder, "config.json"), encoding="utf-8") as f:
            made = json.load(f)
        flags = train.saved_flags(made.pop("flags"))
        log = train.read_log(os.path.join(folder, "log.jsonl"))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None
    rows = [r for r in log if {type(r.get(k, 0)) for k in ("val_loss", "train_loss")} <= {int, float}]
    return Run(folder, flags, made, [r for r in rows if type(r.get("tokens")) is int])


def read_times(folder: str) -> dict[str, dict]:
    """The step times that time_steps has written there."""
    with suppress(OSError, ValueError), open(os.path.join(folder, "step_times.json")) as f:
        return found if isinstance(found := json.load(f), dict) else {}
    return {}


def find_runs(places: list[str]) -> tuple[list[Run], dict]:
    """The runs in folders (a run's, or a parent of runs') and archives, and their step times."""
    runs, times = {}, {}
    for place in places:
        with tempfile.TemporaryDirectory() as unpacked:
            folder = place
            if os.path.isfile(place) and re.search(ARCHIVE, place):
                folder = unpacked
                try:
                    with tarfile.open(place) as tar:
                        tar.extraction_filter = getattr(tarfile, "data_filter", None)  # from 3.11.4
                        inside = r"(?!/)(?!(.*/)?\.\.(/|$))"  # the folder, whatever the archive says
                        files = [m for m in tar if m.isfile() and re.match(inside, m.name)]
                        tar.extractall(folder, files)
                        tar.fileobj.read()  # to the end of the file, with its checksum
                except Exception as e:  # each compression has errors of its own
                    why = f"{place} is not a whole archive ({type(e).__name__})"
                    raise UserError(f"{why}: copy it or check it out again") from None
            inner = sorted(glob.glob(os.path.join(glob.escape(folder), "*")))
            here = {os.path.realpath(f): r for f in [folder, *inner] if (r := read_run(f))}
            lost = [f for f in inner if os.path.realpath(f) not in here]
            lost = [f for f in lost if os.path.exists(os.path.join(f, "config.json"))]
            own = ({} if folder == unpacked else read_times(f"{folder}/..")) | read_times(folder)
        if any(times.get(key, step) != step for key, step in own.items()):
            print(f"{place} has step times that differ from those before it: its own are used")
        times |= own
        for r in here.values():
            r.dir = os.path.normpath(place + r.dir.removeprefix(folder))
        for f in lost:
            print(f"left out: {place}{f.removeprefix(folder)} has a config.json that cannot be read")
        if not here and (folder == unpacked or not os.path.isfile(place)):  # a shell's * names plots too
            print(f"left out: {place} holds no run")
        runs |= here
    return list(runs.values()), times


def write_archive(path: str, runs: list[Run], times: dict[str, dict]) -> None:
    """Write what --report needs to make the table again, a few KB a run."""
    folders = [os.path.basename(r.dir) for r in runs]
    if len({*folders}) < len(folders):  # runs of several folders
        folders = [f"{i}-{folder}" for i, folder in enumerate(folders)]
    os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
    with tarfile.open(f"{path}.tmp", "w:xz") as tar:
        for r, folder in zip(runs, folders):
            said = ["train.txt"] if r.diverged and printed(r.dir) else []
            for file in ("config.json", "log.jsonl", *said):
                tar.add(os.path.join(r.dir, file), os.path.join(folder, file))
        text, member = json.dumps(times, indent=1).encode(), tarfile.TarInfo("step_times.json")
        member.size = len(text)
        tar.addfile(member, io.BytesIO(text))
    os.replace(f"{path}.tmp", path)


# ---- what to run ------------------------------------------------------------------------------


def differing(a: dict, b: dict) -> str | None:
    """The first flag, of those that can change a loss, in which two runs differ."""
    return next((name for name in a if name not in NEUTRAL and a[name] != b[name]), None)


def stretched(flags: dict, factor: float) -> dict:
    """The flags of the schedule at another number of steps."""
    names = ("max_iters", "lr_decay_iters", "warmup_iters")
    return {name: round(factor * flags[name]) for name in names}


def plan(cfg: Config, base: train.Config) -> list[Run]:
    """Every run that the flags ask for, in order: all rows of a seed before those of the next seed."""
    specs = [cfg.baseline, *filter(None, cfg.ffn.split(","))]
    for paper in filter(None, cfg.paper.split(",")):
        if paper not in PAPERS:
            raise UserError(f"--paper={paper}: {suggest(paper, PAPERS)}")
        specs += PAPERS[paper]
    if len(specs) == 1:
        raise UserError("name the FFNs to compare: --ffn=geglu,asg or --paper=asg")
    matches = ["hidden", "params"] if cfg.ffn_match == "both" else [cfg.ffn_match]
    rates = [parse_value("--lr_sweep", text, float) for text in cfg.lr_sweep.split(",") if text]
    stds = [parse_value("--init_sweep", text, float) for text in cfg.init_sweep.split(",") if text]
    if rates and min(base.learning_rate, *rates) <= 0:  # min_lr is scaled by their ratio
        raise UserError("--lr_sweep and --learning_rate: all rates must be above 0")
    runs: dict[tuple, Run] = {}
    tuned = itertools.product(rates or [base.learning_rate], stds or [base.ffn_init_std])
    for seed, (rate, std), spec in itertools.product(range(cfg.seeds), tuned, specs):
        flags = asdict(base) | {"ffn": spec, "seed": seed, "data_seed": seed, "init_from": "auto"}
        flags["lr_decay_iters"] = base.lr_decay_iters or base.max_iters
        least = base.min_lr * (rate / base.learning_rate if rates else 1)
        flags |= {"learning_rate": rate, "min_lr": least, "ffn_init_std": std}
        lengths = [(match, 1) for match in matches]
        if identity(spec) == identity(cfg.baseline) and cfg.horizons and not rates and not stds:
            lengths += [(matches[0], factor) for factor in HORIZONS]
        for match, factor in lengths:
            r = Run("", flags | stretched(flags, factor) | {"ffn_match": match})
            r.flags["ffn_match"] = r.match
            name = f"{spec.replace('/', '%2F')}-s{seed}" + (f"-{r.match}" if r.match != "hidden" else "")
            name += (f"-lr{rate:g}" if rates else "") + (f"-std{std:g}" if stds else "")
            name += f"-x{factor}" if factor != 1 else ""
            r.dir = r.flags["out_dir"] = os.path.join("out", cfg.name or cfg.paper or "compare", name)
            train.model_config(r.flags).check()
            runs.setdefault((r.row, r.seeds, r.tuned, r.flags["max_iters"]), r)
    return list(runs.values())


def print_plan(runs: list[Run], cfg: Config) -> None:
    """Print the runs, the hours (from a few timed steps), and the precision to expect with --noise."""
    if cfg.prepare and not has_shards(cfg.data_dir):
        make = f"python prepare_fineweb.py {cfg.prepare} --out_dir={cfg.data_dir}"
        raise UserError(f"{cfg.data_dir} has no shards yet: make them with {make}")
    n_vocab = open_data(cfg.data_dir, cfg.block_size).n_vocab
    device, seconds, n = train.pick_device(cfg.device, 0), {}, len(gpus(cfg))
    each = 1 if cfg.launch else max(1, n // cfg.jobs)  # GPUs of a run
    beside = cfg.jobs if cfg.launch else max(1, min(n, cfg.jobs))  # runs at a time
    for r in runs:
        if r.row not in seconds:
            r.made |= {"vocab_size": math.ceil(n_vocab / 128) * 128, "world": each}
            step = step_of(r, device, passes_of(r))
            seconds[r.row] = median(bench.measure({"step": step}, 3, device)["step"])
    hours = sum(seconds[r.row] * r.flags["max_iters"] for r in runs) / beside / 3600
    print(f"{len(runs)} runs of {len(seconds)} rows, about {hours:.2g} hours"
          f"{' with one device a run' if cfg.launch else ''}, besides compiling and evaluation.\n"
          f"If FFN and seed leave a noise of {cfg.noise:g} nats (--noise) in a run's loss:")  # fmt: skip
    print("\nseeds  half-width of all 95% intervals  a difference found 4 times in 5")
    for seeds in sorted({3, 5, 8, 12, 20, cfg.seeds} - {1, 2}) if len(seconds) > 1 else ():
        width, found = blocks.expected_precision(len(seconds), seeds, cfg.noise)
        print(f"{seeds:5}  {width:32.4f}  {found:31.4f}")


# ---- running it -------------------------------------------------------------------------------


def gpus(cfg: train.Config) -> list[str]:
    """GPUs to share out, as CUDA_VISIBLE_DEVICES names them; none if --device says where to run."""
    count = torch.cuda.device_count() if cfg.device in ("auto", "cuda") else 0
    names = os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(count)))
    return names.split(",")[:count]


def start(p: Run, cfg: Config, slot: int) -> subprocess.Popen:
    """Start train.py on a slot's share of this machine: its GPUs (with torchrun, if several) or its
    cores. With --launch it uses all that the launcher gives it. It prints to train.txt."""
    command, env = [*shlex.split(cfg.launch), sys.executable], dict(os.environ)
    devices = gpus(cfg)
    each = max(1, len(devices) // cfg.jobs)
    if cfg.launch:
        each = "gpu" if cfg.device in ("auto", "cuda") else 1
    else:
        asked = env.get("OMP_NUM_THREADS", "").partition(",")[0]  # "4,2": for nested levels
        threads = (int(asked) if asked.isdigit() else cores()) // (cfg.jobs * each)
        env["OMP_NUM_THREADS"] = str(max(1, threads))
        if devices:
            mine = [devices[(slot * each + i) % len(devices)] for i in range(each)]
            env["CUDA_VISIBLE_DEVICES"] = ",".join(mine)
    if each != 1:
        command += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={each}"]
        command += ["--signals-to-handle=SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1"]
    command += [os.path.abspath(train.__file__), *(f"--{k}={v}" for k, v in p.flags.items())]
    try:
        os.makedirs(p.dir, exist_ok=True)
        with open(os.path.join(p.dir, "train.txt"), "w", encoding="utf-8") as f:
            # a session of its own: a Ctrl-C reaches train.py once, through us, and not twice
            return subprocess.Popen(command, stdout=f, stderr=f, stdin=subprocess.DEVNULL, env=env,
                                    start_new_session=True)  # fmt: skip
    except OSError as e:
        raise UserError(f"cannot write to {p.dir} ({e.strerror}): choose another --name") from None


def why_failed(folder: str, code: int) -> str:
    """One line on a run that ended too early: its own error, not the page that torchrun adds."""
    lines = [line.strip() for line in printed(folder).splitlines() if line.strip()]
    lines = [line for line in lines if "error: " in line] or lines or [f"exit {code}"]
    return f"killed by {signal.Signals(-code).name}" if code < 0 else lines[-1]


def to_do(runs: list[Run], cfg: Config) -> list[Run]:
    """The runs that have not ended. Refuses folders made with other flags, class or data."""
    found, data = {p: old for p in runs if (old := read_run(p.dir))}, None
    waiting = [p for p in runs if not (p in found and found[p].ended)]
    cure = "choose another --name, or delete that folder"
    if waiting and (has_shards(cfg.data_dir) or not cfg.prepare):
        data = open_data(cfg.data_dir, cfg.block_size)  # one error now instead of one for each
    for p, old in found.items():
        if name := differing(p.flags, old.flags):
            raise UserError(f"{p.dir} has --{name}={old.flags[name]}, not {p.flags[name]}: {cure}")
        if old.made.get("ffn_code") not in (None, "", ffn_code(p.flags["ffn"])):
            raise UserError(f"the class of {p.flags['ffn']} has changed since {p.dir} was made: {cure}")
        if data and old.made.get("data_digest", data.digest) != data.digest:
            raise UserError(f"{cfg.data_dir} has changed since {p.dir} was made: {cure}")
    begun = sum(os.path.exists(os.path.join(p.dir, "ckpt.pt")) for p in waiting)
    print(f"{len(runs)} runs: {len(runs) - len(waiting)} done, {begun} to go on with, "
          f"{len(waiting) - begun} to start", flush=True)  # fmt: skip
    return waiting


def run_all(runs: list[Run], cfg: Config) -> int:
    """Run what has not ended yet, --jobs side by side. Returns how many failed. A signal makes each run
    finish its step and save; a second one ends them at once."""
    waiting, running, failed, ended = to_do(runs, cfg), {}, 0, 0
    total, began = len(waiting), time.monotonic()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):  # SIGHUP: a terminal that closes
        if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:  # nohup ignores it
            signal.signal(number, signal.default_int_handler)
    try:
        while waiting or running:
            for slot in set(range(cfg.jobs)) - set(running):
                if waiting:
                    p = waiting.pop(0)
                    running[slot] = p, start(p, cfg, slot)
            time.sleep(0.3)
            for slot, (p, process) in list(running.items()):
                if (code := process.poll()) is None:
                    continue
                del running[slot]
                ended += 1
                now = read_run(p.dir)
                text = f"{now.loss:.4f}" if now and now.done else why_failed(p.dir, code)
                if not (now and now.done):
                    text = ("DIVERGED: " if now and now.diverged else "FAILED: ") + text
                failed += not (now and now.ended)
                left = (time.monotonic() - began) / ended * (total - ended) / 60
                print(f"[{ended}/{total}] {p.dir}: {text} | {left:,.0f} minutes left", flush=True)
    except KeyboardInterrupt:
        print("stopping: each run finishes its step and saves", flush=True)
        for _, process in running.values():
            # On SIGTERM srun kills what it started, and SIGUSR1 it passes on.
            process.send_signal(signal.SIGUSR1 if cfg.launch else signal.SIGTERM)
        for _, process in running.values():
            process.wait()
        done = sum(r.ended for r in map(read_run, (p.dir for p in runs)) if r)
        print(f"stopped with {done} of {len(runs)} runs done: the same command goes on from here")
        sys.exit(130)
    finally:
        for _, process in running.values():
            if process.poll() is None:
                process.terminate()
    return failed


def run_to_precision(runs: list[Run], cfg: Config) -> tuple[list[Run], int]:
    """Run all. With --precision, run seed after seed, all rows of each, until it is reached. Returns the
    runs up to that seed, and how many failed."""
    fewest = min(blocks.FEWEST_SEEDS, cfg.seeds) if cfg.precision else cfg.seeds
    for seeds in range(fewest, cfg.seeds + 1):
        chosen = [p for p in runs if p.seeds[0] < seeds]
        failed = run_all(chosen, cfg)
        found = [r for r in map(read_run, (p.dir for p in chosen)) if r and r.ended]
        if failed or not cfg.precision:
            break
        check_alike(found, cfg.baseline)
        results, noise = judge(group_runs(found, cfg.baseline))
        width = f"half-widths up to {blocks.widest(results):.4g}, {noise['df']} degrees of freedom"
        print(f"{seeds} seeds: {width} (asked: {cfg.precision:g}, {blocks.FEWEST_DF})", flush=True)
        if blocks.precise(results, noise, cfg.precision):
            break
    return chosen, failed


def passes_of(r: Run) -> int:
    """The number of passes over which a rank accumulates the gradients of a step."""
    per_pass = r.made.get("world", 1) * r.flags["micro_batch_size"]
    return max(1, r.flags["batch_size"] // per_pass)


def step_of(r: Run, device: torch.device, passes: int):
    """A call that makes one whole training step of a run's model, on random tokens."""
    flags = train.Config(**r.flags)
    model = GPT(train.model_config(r.flags, vocab_size=r.made["vocab_size"])).to(device)
    set_up(device)
    torch._dynamo.config.recompile_limit = 1000  # all models share their code
    dtype = torch.bfloat16 if train.use_bfloat16(flags.dtype, device) else torch.float32
    return bench.make_step(model, flags, device, dtype, passes)[0]


def timed_as(r: Run, base: Run) -> str:
    """The key of a row's step time: both classes and widths, the device, flags that are not defaults."""
    ffns = " / ".join(f"{x.row[0]} {x.row[1]} {x.made.get('ffn_code', '')}" for x in (r, base))
    flags = [f"{k}={v}" for k, v in base.flags.items() if k not in NEUTRAL | VARIED and v != DEFAULTS[k]]
    if (passes := passes_of(base)) > 1:
        flags.append(f"passes={passes}")
    return " ".join([ffns, base.made.get("device", ""), *flags])


def time_steps(groups: list[list[Run]], times: dict[str, dict], folder: str) -> None:
    """Time whole steps of each row in turn with the baseline's. Adds new ones to times and its file."""
    base = groups[0][0]
    for r in (group[0] for group in groups[1:]):
        if (key := timed_as(r, base)) in times:
            continue
        print(f"timing steps of {r.label}", flush=True)
        try:
            kind, asked = re.match(r"\w+", base.made["device"])[0], base.flags["device"]
            device = train.pick_device(asked if asked.startswith(kind) else kind, 0)
            if device.type == "cuda" and torch.cuda.get_device_name() not in base.made["device"]:
                raise UserError(f"this is no {base.made['device']}: run the same command on one")
            calls = {k: step_of(x, device, passes_of(base)) for k, x in (("own", r), ("base", base))}
            own, theirs = bench.measure(calls, blocks.ROUNDS, device).values()
        except (UserError, RuntimeError, AssertionError) as e:  # no memory, no such device here
            print(f"no step time of {r.label}: {' '.join(str(e).split())[:200]}")
            continue
        of_median = 1.25 * stdev(math.log(a / b) for a, b in zip(own, theirs)) / math.sqrt(blocks.ROUNDS)
        times[key] = {"ratio": bench.ratio(own, theirs), "std_error": of_median}
        Path(folder, "step_times.json").write_text(json.dumps(times, indent=1))


# ---- what may be compared ---------------------------------------------------------------------


def check_alike(runs: list[Run], baseline: str) -> None:
    """Refuse finished runs that differ in more than the FFN. Sets each run's factor."""

    def common(r: Run) -> dict:
        rate, least = r.flags["learning_rate"], r.flags["min_lr"]
        found = {name: value for name, value in r.flags.items() if name not in VARIED}
        data = r.made.get("data", {})  # its folder counts only where nothing says what is in it
        found |= {"data_dir": data | {"dir": data.get("source") or r.flags["data_dir"]}}
        found |= {"device": r.made.get("device"), "dtype": r.made.get("dtype", r.flags["dtype"])}
        return found | {"min_lr / learning_rate": f"{least / rate:.6g}" if rate else least}

    cure = "report only runs that differ in nothing but --ffn, --ffn_match and the seeds"
    done = [r for r in runs if r.ended]
    steps = median_high(r.flags["max_iters"] for r in done)
    first = next(r for r in done if r.flags["max_iters"] == steps)
    seen, firsts, tried = {}, {}, {(r.row, r.tuned) for r in runs}
    lengths = {stretched(first.flags, factor)["max_iters"]: factor for factor in HORIZONS}
    whole = {r.row for r in done if r.flags["max_iters"] == steps}
    for r in done:
        # A run of another length, whose row also has this one, is a horizon and not in the table.
        if (r.row[0] == identity(baseline) or r.row in whole) and r.flags["max_iters"] != steps:
            r.factor = lengths.get(r.flags["max_iters"], 1)
        expected, here = common(first) | stretched(first.flags, r.factor), common(r)
        if name := differing(expected, here):
            differ = f"{first.dir} and {r.dir} differ in --{name}"
            raise UserError(f"{differ} ({expected[name]} and {here[name]}): {cure}")
        twin = seen.setdefault((*r.row, r.tuned, r.seeds, r.factor), r)
        if twin is not r:
            raise UserError(f"{twin.dir} and {r.dir} are the same run twice: leave one out")
        classes = f"the class of {r.flags['ffn']}", r.row[0], "ffn_code"
        for what, which, key in (classes, ("the data", "", "data_digest")):
            old = firsts.setdefault((which, key), r) if r.made.get(key) else r
            if old.made.get(key) != r.made.get(key):
                raise UserError(f"{what} changed between {old.dir} and {r.dir}: run the older one again")
    # TUNED may differ where all rows tried the values, whether or not these runs ended.
    for a, b in itertools.product({r.tuned: r for r in done}.values(), done):
        if (b.row, a.tuned) not in tried:
            values = " ".join(f"--{name}={value:g}" for name, value in zip(TUNED, a.tuned))
            raise UserError(f"{a.dir} has {values}, which no run of {b.label} has: {cure}, or sweep")


def group_runs(runs: list[Run], baseline: str) -> list[list[Run]]:
    """The ended runs of each row at its best TUNED values, without horizons; the baseline's first, or []
    if it has none. Only values with ended runs of every row count. The best have the fewest diverged
    runs and, among those, the lowest loss in the seeds that all of them have."""
    rows: dict[tuple, dict[tuple, list[Run]]] = {}
    for r in runs:
        if r.ended and r.factor == 1:
            rows.setdefault(r.row, {}).setdefault(r.tuned, []).append(r)
    ended = set.intersection(*map(set, rows.values()))
    if not ended:
        raise UserError(f"no --{' and --'.join(TUNED)} with ended runs of every row: finish the sweep")

    def best_of(groups: list[list[Run]]) -> list[Run]:
        fewest = min(sum(r.diverged for r in group) for group in groups)
        groups = [group for group in groups if sum(r.diverged for r in group) == fewest]
        done = [{r.seeds for r in group if r.done} for group in groups]
        shared = set.intersection(*done)
        if all(done) and not shared:
            raise UserError(f"no seed of {groups[0][0].label} has all its {', '.join(TUNED)}: run one")
        return min(groups, key=lambda g: (sum(r.loss for r in g if r.seeds in shared), -len(g)))

    best = {row: best_of([tuned[v] for v in tuned if v in ended]) for row, tuned in rows.items()}
    base = min((row for row in rows if row[0] == identity(baseline)), default=None,
               key=lambda row: row[1] != runs[0].flags["ffn_hidden"])  # fmt: skip
    return [best.pop(base, []), *best.values()]


def judge(groups: list[list[Run]]) -> tuple[list[dict], dict]:
    """What analyse finds for each group."""
    seeds = sorted({r.seeds for group in groups for r in group})
    losses = [{r.seeds: r.loss for r in group} for group in groups]
    return blocks.analyse(np.array([[row.get(seed, np.nan) for seed in seeds] for row in losses]))


# ---- the table --------------------------------------------------------------------------------


def summarize(runs: list[Run], groups: list[list[Run]], times: dict[str, dict], baseline: str) -> dict:
    """compare.json's baseline, noise, exchange rate and rows, the baseline's first."""
    results, noise = judge(groups)
    # The baseline's runs of all lengths, at the values that the table shows.
    of_base = [r for r in runs for b in groups[0][:1] if (r.row, r.tuned) == (b.row, b.tuned)]
    exchange = blocks.exchange_rate([(r.tokens, r.seeds, r.loss) for r in of_base if r.done])
    doubt = "the baseline diverged" if any(r.diverged for r in groups[0]) else ""
    known = PAPERS if identity(baseline) == identity("swiglu") else {}  # they are minus SwiGLU's
    papers = {identity(spec): text for paper in known.values() for spec, text in paper.items()}
    lengths = [h["tokens"] / groups[0][0].tokens for h in exchange["horizons"]] if exchange else [1]
    rows, least, most = [], min(lengths), max(lengths)
    for group, result in [(g, r) for g, r in zip(groups, results) if g]:
        first, done, is_base = group[0], [r for r in group if r.done], group is groups[0]
        result = dict.fromkeys(result) if is_base else result
        made = first.made
        if not {"ffn_cost", "total_params"} <= made.keys():  # of an older version
            config = train.model_config(first.flags, vocab_size=made["vocab_size"])
            model = sketch(lambda config=config: GPT(config))
            counts = {"total_params": model.param_counts()["total"]}
            made = {"ffn_cost": ffn_cost(model.model.layers[0].mlp), **counts, **made}
        cost = {k: v * first.flags["n_layer"] for k, v in made["ffn_cost"].items()}
        active = [a for r in done if math.isfinite(a := r.val[-1].get("active", math.nan))]
        step = times.get(timed_as(first, groups[0][0])) if groups[0] and not is_base else None
        row = {"ffn": first.flags["ffn"], "match": first.match, "hidden": first.row[1],
               "label": first.label, **dict(zip(TUNED, first.tuned)), "baseline": is_base,
               **cost, "total_params": made["total_params"], "n": len(done),
               "diverged": len(group) - len(done), "active": mean(active) if active else None,
               "val_loss": mean(r.loss for r in done) if done else None,
               "std": stdev(r.loss for r in done) if len(done) > 1 else None, **result}  # fmt: skip
        lost = any(r.diverged for r in [*group, *of_base])  # then the runs left are the lucky ones
        row["step_time_ratio"] = step["ratio"] if step else None
        row |= blocks.price(result, None if lost else exchange, step)
        row["extrapolated"] = bool(row["tokens_ratio"] and not least <= 1 / row["tokens_ratio"] <= most)
        row["paper"] = papers.get(first.row[0]) if first.match == "hidden" and not is_base else None
        row["verdict"] = blocks.verdict(row, sum(r.done for r in groups[0]), doubt or first.too_early())
        judged = row["verdict"] in ("better", "worse", "no difference shown", "identical")
        row["wins"] = judged and (row["time_high"] or 1) < 1
        row["runs"] = [{"dir": r.dir, "seed": r.flags["seed"], "data_seed": r.flags["data_seed"],
                        "val_loss": r.loss if r.done else None} for r in group]  # fmt: skip
        rows.append(row)
    ended = [{r.tuned for r in runs if r.row == g[0].row and r.factor == 1} for g in groups if g]
    tried = {name: sorted(set(x)) for name, x in zip(TUNED, zip(*set.intersection(*ended)))}
    return {"baseline": baseline, "noise": noise, "exchange": exchange, "tried": tried, "rows": rows}


def notes_on(record: dict, runs: list[Run]) -> list[str]:
    """What a reader must know to read the table."""
    rows, noise, exchange = record["rows"], record["noise"], record["exchange"]
    first, *more = [r for r in runs if r.ended and r.factor == 1]
    flags, made, data = first.flags, first.made, first.made.get("data", {})
    defaults = DEFAULTS | {"lr_decay_iters": flags["max_iters"]}
    common = {k: v for k, v in flags.items() if all(r.flags[k] == v for r in more)}
    given = [f"--{k}={v}" for k, v in common.items() if k not in NEUTRAL and v != defaults[k]]
    about = [f"{v:,} {k}" if type(v) is int else v for k, v in data.items()] or [flags["data_dir"]]
    by = {f"torch {r.made.get('torch')}, commit {r.made.get('git_commit')}" for r in runs if r.ended}
    notes = [
        f"Each run has {flags['max_iters']} steps of {first.tokens // flags['max_iters']:,} tokens, "
        f"{first.tokens:,} in all. Flags besides the defaults: `{shlex.join(given) or 'none'}`.",
        f"The data: {', '.join(str(x) for x in about if x)}.",
        f"The runs were made on {made.get('device')} with {'; '.join(sorted(by))}.",
        "The validation loss is in nats per token at the last step: mean ± standard deviation over n "
        "seeds. FLOPs are of all FFNs' forward passes; the ideal ones skip what is zero.",
    ]
    if any(row["low"] is not None for row in rows):
        pooled = "A run's noise is {std:.2g} nats ({df} degrees of freedom). " if noise["std"] else ""
        notes.append(
            "The difference is to the baseline, by least squares of loss = row + seed over all runs. "
            f"{pooled.format(**noise)}The 95% intervals hold for all rows together (Dunnett's single "
            'step), and p is adjusted alike. "No difference shown" does not mean that there is none.'
        )
    if own := {row["label"]: row["own_noise"] for row in rows if row["own_noise"] is not None}:
        which = ", ".join(own) if noise["std"] else "the baseline"
        notes.append(f"The noise of {which} differs from the others' (F-test, p < 0.01). Rows judged by "
                     "it, or by the others' if that is larger, in nats a run: "
                     f"{', '.join(f'{label} {std:.2g}' for label, std in own.items())}.")  # fmt: skip
    if exchange:
        points = [f"{h['val_loss']:.4f} at {big(h['tokens'])} tokens ({h['off_line']:+.4f} off the line)"
                  for h in exchange["horizons"]]  # fmt: skip
        notes.append(f"Per unit of log(tokens) the baseline's loss changes by {exchange['slope']:.4f} ± "
                     f"{exchange['std_error']:.4f} (standard error), in the seeds with several lengths: "
                     f"{', '.join(points)}. No price where runs diverged or the loss might not fall.")
    if any(row["tokens_ratio"] for row in rows):
        notes.append(
            "Tokens to its loss: how many times the baseline's tokens a row needs for the baseline's "
            "loss by that line. Time to its loss: that times the step time over the baseline's. With ~ "
            "the line is extrapolated beyond the lengths measured, and the interval does not know that "
            "it may bend. A row wins where its whole interval of time lies below 1."
        )
    for name, values in record["tried"].items():
        if len(values) > 1:
            notes.append(f"Of --{name}, {values} were tried for every row; these losses chose its best.")
    codes = [(r.made.get("trainer_code") or "").split(", ") for r in runs if r.ended]
    if len({*itertools.chain(*codes)} - {""}) > 1:
        notes.append("Warning: train.py, the decoder or the reader of shards changed meanwhile.")
    if len(worlds := sorted({r.made["world"] for r in runs if r.ended and "world" in r.made})) > 1:
        notes.append(f"Warning: the runs had {worlds} ranks, and experts follow their rank's tokens.")
    line = [(row["label"], *(row[name] for name in TUNED)) for row in rows if row["baseline"]]
    if other := sorted({r.label for r in runs if r.factor != 1 and (r.label, *r.tuned) not in line}):
        notes.append(f"Left out, of another length and not used for the line: {', '.join(other)}.")
    if left_out := [f"{r.dir} (step {len(r.rows) and r.rows[-1]['step']})" for r in runs if not r.ended]:
        notes.append(f"Not finished and left out: {', '.join(left_out)}.")
    return [*notes, f"Command: `{record['command']}`"]


# ---- all of it --------------------------------------------------------------------------------


def read_command(argv: list[str]) -> tuple[Config, train.Config, list[str]]:
    """The flags, those of train.py alone, and the folders and archives to report on."""
    argv, places = list(argv), []
    if "--report" in argv:  # folders follow, up to the next flag
        at = argv.index("--report") + 1
        places = list(itertools.takewhile(lambda arg: not arg.startswith("-"), argv[at:]))
        argv[at - 1 : at + len(places)] = [f"--report={' '.join(places)}"]
    cfg, given = configure(Config, argv)
    if "report" in given:
        places = places or [cfg.report]
        if not cfg.report:
            raise UserError("--report has no folder: name those of the runs")
        if extra := sorted(given - {"report", "out", "archive", "baseline", "name"}):
            raise UserError(f"--report runs nothing: leave out --{' --'.join(extra)}")
    typed = {arg[2:].partition("=")[0] for arg in argv if arg.startswith("--")}
    if set_here := {"seed", "data_seed", "eval_only"} & given | {"init_from", "out_dir"} & typed:
        raise UserError(f"--{min(set_here)} cannot be given here: see --seeds, --name and --report")
    # Rounding in float32 alone changes a loss by 1e-6 nats.
    for name, least in {"max_iters": 1, "seeds": 1, "jobs": 1, "noise": 1e-6, "precision": 1e-6}.items():
        value = getattr(cfg, name)
        if value < least and not (name == "precision" and value == 0):
            raise UserError(f"--{name}={value} must be at least {least}")
    with user_error(f"--launch={cfg.launch}", "check its quotes", ValueError):
        launcher = shlex.split(cfg.launch)
    if cfg.launch and not (launcher and shutil.which(launcher[0])):
        raise UserError(f"--launch={cfg.launch}: there is no such program here: check its name")
    if cfg.archive and not cfg.archive.endswith(".tar.xz"):
        raise UserError(f"--archive={cfg.archive} must end in .tar.xz")
    if cfg.archive and (packed := [p for p in places if re.search(ARCHIVE, p)]):
        raise UserError(f"--archive takes folders of runs, and {packed[0]} is none: unpack it first")
    flags = {f.name: getattr(cfg, f.name) for f in fields(train.Config)}
    return cfg, train.Config(**flags | {"ffn": cfg.baseline, "ffn_match": "hidden"}), places


def check_overwrite(folder: str, runs: list[Run]) -> None:
    """Refuse to replace a table of runs that are not among these."""
    try:
        record = json.loads(Path(folder, "compare.json").read_text())
        listed = {os.path.basename(r["dir"]) for row in record["rows"] for r in row["runs"]}
    except (OSError, ValueError, KeyError, TypeError):
        return
    if lost := listed - {os.path.basename(os.path.abspath(r.dir)) for r in runs}:
        raise UserError(f"{folder}/compare.md has other runs too, e.g. {min(lost)}: name another --out")


def main() -> None:
    cfg, base, places = read_command(sys.argv[1:])
    failed = 0
    if places:
        runs, step_times = find_runs(places)
        folder = os.path.commonpath([os.path.abspath(r.dir) for r in runs] or ["/"])
        while not os.path.isdir(folder):  # of runs in an archive: the folder that it lies in
            folder = os.path.dirname(folder)
        folder = os.path.relpath(folder)
    else:
        train.check_flags(base, 1 if cfg.launch else max(1, len(gpus(base)) // cfg.jobs))
        chosen = plan(cfg, base)
        folder = os.path.dirname(chosen[0].dir)
        if cfg.plan:
            return print_plan(chosen, cfg)
        chosen, failed = run_to_precision(chosen, cfg)
        runs, step_times = [r for r in map(read_run, (p.dir for p in chosen)) if r], read_times(folder)
    if not (ended := [r for r in runs if r.ended]):
        raise UserError(f"no finished run among {len(runs)}: name folders of runs, or run them first")
    check_alike(runs, cfg.baseline)
    if places and not cfg.out:
        check_overwrite(folder, ended)
    groups = group_runs(ended, cfg.baseline)
    if groups[0] and cfg.horizons and not places:
        time_steps(groups, step_times, folder)
    record = {"title": cfg.name or cfg.paper or os.path.basename(os.path.abspath(folder))}
    record |= {"command": shlex.join(["python", "experiments/compare.py", *sys.argv[1:]])}
    record |= summarize(ended, groups, step_times, cfg.baseline)
    record["notes"] = notes_on(record, runs)
    flags = {k: v for k, v in ended[0].flags.items() if k not in NEUTRAL | VARIED}
    record |= {"flags": flags, "made": ended[0].made}
    path = os.path.join(cfg.out or folder, "compare")
    try:
        os.makedirs(cfg.out or folder, exist_ok=True)
        Path(f"{path}.md").write_text(markdown(record), encoding="utf-8")
        Path(f"{path}.json").write_text(json.dumps(record, indent=1, allow_nan=False))
        plot(record, groups, f"{path}.png")
        if cfg.archive:
            write_archive(cfg.archive, ended, step_times)
    except OSError as e:
        raise UserError(f"cannot write {e.filename or path} ({e.strerror}): try another --out") from None
    print(f"{markdown(record)}\nwrote {path}.md, {path}.json, {path}.png {cfg.archive}")
    if failed:
        sys.exit(f"error: {failed} runs failed, see above and their train.txt")


if __name__ == "__main__":
    run(main)
