"""
Is this FFN better than SwiGLU, by how much, how sure, and at what price? This program makes many runs
of train.py and turns them into one table and one plot.

    python experiments/compare.py config/tiny.py --ffn=geglu,sparseglu,sparseglu:grad=ste --seeds=5
    python experiments/compare.py config/tiny.py --paper=asg --precision=0.01 --seeds=12
    python experiments/compare.py --report out/tiny                  # only read finished runs

All flags and config files of train.py are valid here too. Run s of every FFN has --seed=s and
--data_seed=s, so within a seed all FFNs see the same tokens and start from the same shared weights.
The same command skips the runs that are done and resumes those that were interrupted. --report takes
folders of runs, folders that hold such folders, and archives that --archive has written.
"""

from __future__ import annotations

import functools
import glob
import importlib.util
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

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import bench
import train
from configurator import UserError, configure, parse_value, run, suggest
from model import GPT, ffn_cost, parse_spec, sketch
from prepare_fineweb import cores


@dataclass
class Config(train.Config):
    ffn: str = ""  # specs of the FFNs to compare, comma-separated
    paper: str = ""  # all rows of these papers' tables: dsg, asg, sparsegated, dynamicgeglu, sparseglu
    baseline: str = "swiglu"  # spec of the FFN that all others are compared with
    ffn_match: str = "hidden"  # equal width; params or flops: as much as SwiGLU; both: hidden and params
    seeds: int = 3  # runs of each row: seeds 0 to seeds - 1; with --precision: at most
    precision: float = 0.0  # in nats: add seeds until no interval's half-width is larger; 0: all seeds
    horizons: bool = True  # price differences: run the baseline at 0.7 and 1.4 times the steps, time steps
    lr_sweep: str = ""  # learning rates to try for every row, comma-separated; the best is shown
    name: str = ""  # runs go to out/{name}; empty: the paper's name, else compare
    jobs: int = 1  # runs side by side
    launch: str = ""  # put before each run's command: "srun --gpus=8 --ntasks=1"; no GPUs: --device=cpu
    plan: bool = False  # only print the runs, the hours and the precision to expect
    noise: float = 0.01  # for --plan: standard deviation in nats of a run's loss beside row and seed
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
NEUTRAL = set(
    "out_dir init_from prepare eval_only eval_interval log_interval save_interval wandb_project "
    "sample_tokens prompt temperature top_k".split()
)
VARIED = {"ffn", "ffn_match", "seed", "data_seed", "learning_rate", "min_lr"}
SCHEDULE = ("max_iters", "lr_decay_iters", "warmup_iters")
HORIZONS = (0.7, 1.4)  # the baseline's further runs have this many times the steps
FEWEST_SEEDS = 3  # fewer have no verdict
LEAST_PRECISION = 1e-6  # in nats: rounding in float32 alone changes a loss by this much
NOT_FINITE = r"error: .*not finite"  # in what train.py prints when it ends for that reason


@functools.cache
def identity(spec: str) -> str:
    """The key in FFNS and all options: equal for two specs that build the same FFN."""
    cls, options = parse_spec(spec)
    defaults = getattr(cls.__init__, "__kwdefaults__", None) or {}
    return f"{spec.partition(':')[0]} {sorted((defaults | options).items())}"


# ---- runs on disk -----------------------------------------------------------------------------


class Run:
    """A run that is planned (flags only) or on disk, however far it came."""

    def __init__(self, folder: str, flags: dict, made: dict | None = None, rows: list[dict] = ()):
        self.dir, self.flags, self.made, self.rows = folder, flags, made or {}, rows
        self.seeds = flags["seed"], flags["data_seed"]
        self.row = identity(flags["ffn"]), train.model_config(flags).hidden  # of the table
        self.match = "hidden" if self.row[1] == flags["ffn_hidden"] else flags["ffn_match"]
        self.label = label(flags["ffn"], self.match)
        self.tokens = flags["max_iters"] * flags["batch_size"] * flags["block_size"]
        self.factor = 1  # its steps over the comparison's: one of HORIZONS, or 1
        self.val = [row for row in rows if math.isfinite(row.get("val_loss", math.nan))]
        self.done = bool(self.val) and self.val[-1]["step"] == flags["max_iters"]
        self.loss = self.val[-1]["val_loss"] if self.done else math.nan  # never an earlier, better one
        lost = bool(rows) and not math.isfinite(rows[-1].get("val_loss", 0))
        self.diverged = not self.done and (lost or bool(re.search(NOT_FINITE, printed(folder))))
        self.ended = self.done or self.diverged


def label(ffn: str, match: str) -> str:
    return ffn + ("" if match == "hidden" else f" ({match})")


def printed(folder: str) -> str:
    with suppress(OSError), open(os.path.join(folder, "train.txt"), errors="replace") as f:
        return f.read()
    return ""


def read_run(folder: str) -> Run | None:
    """The run in a folder; None where there is none."""
    try:
        with open(os.path.join(folder, "config.json"), encoding="utf-8") as f:
            made = json.load(f)
        flags = train.saved_flags(made.pop("flags"))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None
    rows, log = [], os.path.join(folder, "log.jsonl")
    with suppress(OSError), open(log, encoding="utf-8", errors="replace") as f:
        rows = [row for row in map(read_row, f) if row]
    return Run(folder, flags, made, rows)


def read_row(line: str) -> dict | None:
    """A row of log.jsonl; None for half a row, which a killed run left or a run is just writing."""
    with suppress(ValueError, KeyError, TypeError, OverflowError, RecursionError):
        row = json.loads(line)
        if all(math.isfinite(row[name]) for name in ("step", "tokens")):
            float(row.get("val_loss", 0)), float(row.get("train_loss", 0))  # are numbers
            return row
    return None


def read_times(folder: str) -> dict[str, dict]:
    """The step times that time_steps has written there."""
    with suppress(OSError, ValueError), open(os.path.join(folder, "step_times.json")) as f:
        return json.load(f)
    return {}


def find_runs(places: list[str]) -> tuple[list[Run], dict]:
    """The runs in folders (a run's own, or one that holds runs' folders) and archives, and the step
    times that were measured for them."""
    runs: dict[str, Run] = {}
    times: dict[str, dict] = {}
    for place in places:
        with tempfile.TemporaryDirectory() as unpacked:
            folder = place
            if os.path.isfile(place) and re.search(r"\.tar\.\w+$", place):
                folder = unpacked
                try:
                    with tarfile.open(place) as tar:
                        tar.extractall(folder, filter="data")
                        tar.fileobj.read()  # to the end of the file, with its checksum
                except Exception as e:  # each compression has errors of its own
                    cure = "is it cut? Copy it or check it out again"
                    raise UserError(f"{place} is no whole archive ({type(e).__name__}): {cure}") from None
            inner = sorted(glob.glob(os.path.join(glob.escape(folder), "*")))
            here = {os.path.realpath(f): r for f in [folder, *inner] if (r := read_run(f))}
            times |= read_times(os.path.join(folder, os.pardir)) | read_times(folder)
        for r in here.values():
            r.dir = place + r.dir.removeprefix(folder)
        if not here and not os.path.isfile(place):  # a shell's * also names tables and plots
            print(f"left out: {place} holds no run")
        runs |= here
    return list(runs.values()), times


def write_archive(path: str, runs: list[Run], times: dict[str, dict]) -> None:
    """Write what --report needs to make the table again, a few KB a run."""
    def anonymous(member: tarfile.TarInfo) -> tarfile.TarInfo:
        member.uid = member.gid = member.mtime = 0
        member.uname = member.gname = ""
        return member

    with tempfile.TemporaryDirectory() as folder, tarfile.open(path, "w:xz") as tar:
        Path(folder, "step_times.json").write_text(json.dumps(times, indent=1))
        tar.add(f"{folder}/step_times.json", "step_times.json", filter=anonymous)
        for r in runs:
            for name in ("config.json", "log.jsonl", *["train.txt"] * r.diverged):
                if os.path.exists(path := os.path.join(r.dir, name)):
                    tar.add(path, f"{os.path.basename(os.path.abspath(r.dir))}/{name}", filter=anonymous)


# ---- what to run ------------------------------------------------------------------------------


def differing(a: dict, b: dict) -> str | None:
    """The first flag, of those that can change a loss, in which two runs differ."""
    return next((name for name in a if name not in NEUTRAL and a[name] != b[name]), None)


def stretched(flags: dict, factor: float) -> dict:
    """The flags of the schedule at another number of steps."""
    return {name: round(factor * flags[name]) for name in SCHEDULE}


def plan(cfg: Config, base: train.Config) -> list[Run]:
    """Every run that the flags ask for, in the order of running: all rows of a seed before the next
    seed, so that a slow hour of the machine meets all of them."""
    specs = [cfg.baseline, *filter(None, cfg.ffn.split(","))]
    for paper in filter(None, cfg.paper.split(",")):
        if paper not in PAPERS:
            raise UserError(f"--paper={paper}: {suggest(paper, PAPERS)}")
        specs += PAPERS[paper]
    if len(specs) == 1:
        raise UserError("name the FFNs to compare: --ffn=geglu,asg or --paper=asg")
    if cfg.ffn_match not in ("hidden", "params", "flops", "both"):
        raise UserError(f"--ffn_match={cfg.ffn_match}: valid: hidden, params, flops, both")
    matches = ["hidden", "params"] if cfg.ffn_match == "both" else [cfg.ffn_match]
    sweep = [parse_value("--lr_sweep", text, float) for text in cfg.lr_sweep.split(",") if text]
    if sweep and min(base.learning_rate, *sweep) <= 0:  # min_lr is scaled by their ratio
        rates = f"--lr_sweep={cfg.lr_sweep} and --learning_rate={base.learning_rate}"
        raise UserError(f"{rates}: all must be above 0")
    runs: dict[tuple, Run] = {}
    for seed, rate, spec in itertools.product(range(cfg.seeds), sweep or [base.learning_rate], specs):
        flags = asdict(base) | {"ffn": spec, "seed": seed, "data_seed": seed, "init_from": "auto"}
        flags["lr_decay_iters"] = base.lr_decay_iters or base.max_iters
        if sweep:
            flags |= {"learning_rate": rate, "min_lr": base.min_lr * (rate / base.learning_rate)}
        lengths = [(match, 1) for match in matches]
        if identity(spec) == identity(cfg.baseline) and cfg.horizons and not sweep:
            lengths += [(matches[0], factor) for factor in HORIZONS]
        for match, factor in lengths:
            mine = flags | stretched(flags, factor) | {"ffn_match": match}
            r = Run("", mine)
            mine["ffn_match"] = r.match
            name = f"{spec.replace('/', '%2F')}-s{seed}" + (f"-{r.match}" if r.match != "hidden" else "")
            name += (f"-lr{rate:g}" if sweep else "") + (f"-x{factor}" if factor != 1 else "")
            r.dir = mine["out_dir"] = os.path.join("out", cfg.name or cfg.paper or "compare", name)
            train.model_config(mine).check()
            if mine["max_iters"]:  # a run of one step has no shorter one
                runs.setdefault((r.row, r.seeds, rate, mine["max_iters"]), r)
    return list(runs.values())


def print_plan(runs: list[Run], cfg: Config) -> None:
    """Print how many runs there are, how long they take by a few timed steps, and how precise the
    comparison will be if a run's loss has --noise."""
    from scipy import stats

    n_vocab = train.open_data(cfg.data_dir, cfg.block_size).n_vocab
    device, seconds = torch.device("cuda" if gpus(cfg) else "cpu"), {}
    for r in runs:
        if r.row not in seconds:
            r.made["vocab_size"] = math.ceil(n_vocab / 128) * 128
            seconds[r.row] = median(bench.measure({"step": step_of(r, device)}, 3, device)["step"])
    passes = cfg.batch_size / cfg.micro_batch_size / (cfg.jobs if cfg.launch else max(1, len(gpus(cfg))))
    hours = sum(seconds[r.row] * passes * r.flags["max_iters"] for r in runs) / 3600
    rows = len(seconds)
    print(f"{len(runs)} runs of {rows} rows, about {hours:.2g} hours besides compiling and evaluation.")
    print(f"If a run's loss has a noise of {cfg.noise:g} nats (--noise), beside row and seed:")
    print("\nseeds  half-width of all 95% intervals  a difference found 4 times in 5")
    for n in sorted({3, 5, 8, 12, 20, cfg.seeds} - {1, 2}) if rows > 1 else ():
        mask = np.ones((rows, n), bool).tobytes()
        df, error = design(mask, rows)[2], cfg.noise * math.sqrt(2 / n)
        edge = stats.t.isf(smallest_p(mask, rows)[DRAWS // 20] / 2, df)
        print(f"{n:5}  {edge * error:32.4f}  {(edge + stats.t.isf(0.2, df)) * error:31.4f}")


# ---- running it -------------------------------------------------------------------------------


def gpus(cfg: train.Config) -> list[str]:
    """GPUs to share out, as CUDA_VISIBLE_DEVICES names them; none if --device says where to run."""
    count = torch.cuda.device_count() if cfg.device in ("auto", "cuda") else 0
    names = os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(count)))
    return names.split(",")[:count]


def start(p: Run, cfg: Config, slot: int) -> subprocess.Popen:
    """Start train.py on a slot's share of this machine: its GPUs (with torchrun, if several) or its
    cores. With --launch it has all of the machine that the launcher gives. It prints to train.txt."""
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
    command += [os.path.abspath(train.__file__), *(f"--{k}={v}" for k, v in p.flags.items())]
    try:
        os.makedirs(p.dir, exist_ok=True)
        with open(os.path.join(p.dir, "train.txt"), "w", encoding="utf-8") as f:
            # a session of its own: a Ctrl-C reaches train.py once, through us, and not twice
            return subprocess.Popen(command, stdout=f, stderr=f, stdin=subprocess.DEVNULL, env=env,
                                    start_new_session=True)  # fmt: skip
    except OSError as e:
        cure = "make room, or choose another --name"
        raise UserError(f"cannot write to {p.dir} ({e.strerror}): {cure}") from None


def why_failed(folder: str, code: int) -> str:
    """One line on a run that ended before its last step."""
    lines = [line.strip() for line in printed(folder).splitlines() if line.strip()]
    errors = [line for line in lines if "error: " in line]  # torchrun prints a page after it
    return f"killed by {signal.Signals(-code).name}" if code < 0 else (errors or lines or [f"exit {code}"])[-1]


def to_do(runs: list[Run], cfg: Config) -> list[Run]:
    """The runs that have not ended. Refuses folders that were made with other flags or another class."""
    waiting, cure = [], "choose another --name, or delete that folder"
    for p in runs:
        old, code = read_run(p.dir), train.ffn_code(p.flags["ffn"])
        if old and (name := differing(p.flags, old.flags)):
            was, wanted = old.flags[name], p.flags[name]
            raise UserError(f"{p.dir} was made with --{name}={was}, not {wanted}: {cure}")
        if old and (old.made.get("ffn_code") or code) != code:
            raise UserError(f"the class of {p.flags['ffn']} has changed since {p.dir} was made: {cure}")
        if not (old and old.ended):
            waiting.append(p)
    if not cfg.prepare and waiting:
        train.open_data(cfg.data_dir, cfg.block_size)  # one error now instead of one for each
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
                if now and now.done:
                    text = f"{now.loss:.4f}"
                else:
                    diverged = bool(now) and now.diverged
                    failed += not diverged
                    text = ("DIVERGED: " if diverged else "FAILED: ") + why_failed(p.dir, code)
                left = (time.monotonic() - began) / ended * (total - ended) / 60
                print(f"[{ended}/{total}] {p.dir}: {text} | {left:,.0f} minutes left", flush=True)
    except KeyboardInterrupt:
        print("stopping: each run finishes its step and saves", flush=True)
        for _, process in running.values():
            process.terminate()  # srun passes SIGTERM on at once, SIGINT only the second time
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
    """Run seed after seed, all rows of each, until every interval is as narrow as --precision asks.
    Returns the runs up to that seed, and how many failed."""
    for seeds in range(min(FEWEST_SEEDS, cfg.seeds), cfg.seeds + 1):
        chosen = [p for p in runs if p.seeds[0] < seeds]
        failed = run_all(chosen, cfg)
        found = [r for r in map(read_run, (p.dir for p in chosen)) if r]
        check_alike(found, cfg.baseline)
        results, noise = judge(group_runs(found, cfg.baseline))
        if failed or precise(results, noise, cfg.precision):
            break
    return chosen, failed


def precise(results: list[dict], noise: dict, precision: float) -> bool:
    """Whether no half-width is above precision. Only widths decide, never a difference or its p, and not
    before the noise is known from 10 degrees of freedom: stopping where a noise from fewer happens to
    be small makes up to twice as many errors as the 5% allowed."""
    widths = [r["high"] - r["difference"] for r in results if r["high"] is not None]
    print(f"half-widths up to {max(widths, default=0):.4g} nats at {noise['df']} degrees of freedom")
    return bool(widths) and max(widths) <= precision and noise["df"] >= 10


# ---- what may be compared ---------------------------------------------------------------------


def check_alike(runs: list[Run], baseline: str) -> None:
    """Refuse finished runs whose difference would not be the FFN's. Finds each run's factor."""
    def common(r: Run) -> dict:
        rate, least = r.flags["learning_rate"], r.flags["min_lr"]
        found = {name: value for name, value in r.flags.items() if name not in VARIED}
        found |= {"data_dir": r.made.get("data", r.flags["data_dir"]), "device": r.made.get("device")}
        return found | {"min_lr / learning_rate": f"{least / rate:.6g}" if rate else least}

    cure = "report only runs that differ in nothing but --ffn, --ffn_match and the seeds"
    done = [r for r in runs if r.ended]
    steps = median_high(r.flags["max_iters"] for r in done)
    first = next(r for r in done if r.flags["max_iters"] == steps)
    seen, codes, tried = {}, {}, {(r.row, r.flags["learning_rate"]) for r in runs}
    lengths = {stretched(first.flags, factor)["max_iters"]: factor for factor in HORIZONS}
    for r in done:
        if r.row[0] == identity(baseline) and r.flags["max_iters"] != steps:
            r.factor = lengths.get(r.flags["max_iters"], 1)
        expected, here = common(first) | stretched(first.flags, r.factor), common(r)
        if name := differing(expected, here):
            values = f"{expected[name]} and {here[name]}"
            raise UserError(f"{first.dir} and {r.dir} differ in --{name} ({values}): {cure}")
        key = (*r.row, r.flags["learning_rate"], r.seeds, r.factor)
        if key in seen:
            raise UserError(f"{seen[key]} and {r.dir} are the same run twice: leave one out")
        seen[key] = r.dir
        if code := r.made.get("ffn_code"):
            other = codes.setdefault(r.row[0], r)
            if code != other.made["ffn_code"]:
                changed = f"the class of {r.flags['ffn']} changed between {other.dir} and {r.dir}"
                raise UserError(f"{changed}: run the older one again")
    # A learning rate may differ where all rows tried it, whether or not they came to an end.
    for a, b in itertools.product({r.flags["learning_rate"]: r for r in done}.values(), done):
        if (b.row, a.flags["learning_rate"]) not in tried:
            raise UserError(f"{a.dir} and {b.dir} differ in --learning_rate, and {b.label} was not "
                            f"tried at {a.flags['learning_rate']:g}: {cure}, or sweep it")  # fmt: skip


def group_runs(runs: list[Run], baseline: str) -> list[list[Run]]:
    """The ended runs of each row at its best learning rate, without horizons. The first group is the
    baseline's: that FFN, at the width ffn_hidden if there are several; empty if it has no run."""
    rows: dict[tuple, dict[float, list[Run]]] = {}
    for r in runs:
        if r.ended and r.factor == 1:
            rows.setdefault(r.row, {}).setdefault(r.flags["learning_rate"], []).append(r)
    own = min((row for row in rows if row[0] == identity(baseline)), default=None,
              key=lambda row: row[1] != runs[0].flags["ffn_hidden"])  # fmt: skip

    def rank(group: list[Run]) -> tuple[int, float]:  # most seeds that came to the end, then the loss
        losses = [r.loss for r in group if r.done]
        return -len(losses), mean(losses or [0])

    best = {row: min(rates.values(), key=rank) for row, rates in rows.items()}
    return [best.pop(own, []), *best.values()]


# ---- statistics: loss = row + seed + noise ----------------------------------------------------

DRAWS = 200_000
ODD_NOISE = 0.01  # p of the F-test below which a row is judged by its own noise
ROUNDING = 1e-9  # nats: smaller deviations are none


@functools.lru_cache(maxsize=2000)
def design(mask: bytes, rows: int) -> tuple[np.ndarray, np.ndarray, int]:
    """Least squares for the n runs that exist. mask: (rows, seeds) booleans, as bytes.

    Returns (residuals, contrasts, degrees of freedom): residuals @ losses are the residuals, (n, n);
    contrasts @ losses are the rows' differences to row 0, (rows, n), nan where no chain of shared
    seeds links a row to row 0."""
    exists = np.frombuffer(mask, bool).reshape(rows, -1)
    i, j = exists.nonzero()
    x = np.hstack([np.eye(rows)[i], np.eye(exists.shape[1])[j]])  # (n, rows + seeds)
    inverse = np.linalg.pinv(x)
    contrasts = inverse[:rows] - inverse[0]
    wanted = np.eye(x.shape[1])[:rows] - np.eye(x.shape[1])[0]
    contrasts[~np.isclose(contrasts @ x, wanted).all(1)] = np.nan
    return np.eye(len(i)) - x @ inverse, contrasts, len(i) - int(np.linalg.matrix_rank(x))


def fit(table: np.ndarray) -> tuple[np.ndarray, np.ndarray, float, int]:
    """table: (rows, seeds) losses, nan where there is no run. Returns the differences to row 0, their
    standard errors for noise of deviation 1, the residuals' sum of squares and degrees of freedom."""
    exists = np.isfinite(table)
    residuals, contrasts, df = design(exists.tobytes(), len(table))
    losses = table[exists] - table[exists][:1]  # centred: sums lose no digits
    squares = ((residuals @ losses) ** 2).sum()
    return contrasts @ losses, np.linalg.norm(contrasts, axis=1), float(squares), df


def rows_of_own_noise(table: np.ndarray) -> list[int]:
    """The rows whose noise differs from that of all others by an F-test. The most different one is
    taken out before the others are tested again. All rows, if row 0 is one of them."""
    from scipy import stats

    kept = list(range(len(table)))
    while True:
        _, _, squares, df = fit(table[kept])
        found = [(1.0, -1)]
        for row in kept if len(kept) > 2 else ():
            # What a row adds to the sum of squares is independent of the sum without the row.
            _, _, rest, rest_df = fit(table[[other for other in kept if other != row]])
            if min(rest_df, df - rest_df) > 0:
                own = (squares - rest) / (df - rest_df) + ROUNDING**2
                ratio = own / (rest / rest_df + ROUNDING**2)
                below = stats.f.cdf(ratio, df - rest_df, rest_df)
                found.append((2 * min(below, 1 - below), row))
        p, row = min(found)
        if p >= ODD_NOISE:
            return [row for row in range(len(table)) if row not in kept]
        if row == 0:
            return list(range(len(table)))
        kept.remove(row)


@functools.lru_cache(maxsize=200)
def smallest_p(mask: bytes, rows: int, own: int = 0) -> np.ndarray:
    """How small the smallest of all rows' p is where no row differs from row 0: 0 and 200,000 sorted
    draws. This is Dunnett's single step: the rows' t share row 0 and the noise deviation. `own` further
    rows are judged by their own noise."""
    from scipy import stats

    _, contrasts, df = design(mask, rows)
    tested = contrasts[1:][np.isfinite(contrasts[1:]).all(1)] if df > 0 else contrasts[:0]
    if len(tested) + own < 2:
        return np.linspace(0, 1, DRAWS + 1)
    rng = np.random.RandomState(0)  # its stream is frozen, the newer Generator's is not
    smallest = rng.random_sample((DRAWS, own)).min(1, initial=1)
    if len(tested):
        unit = tested / np.linalg.norm(tested, axis=1, keepdims=True)
        largest = np.abs(rng.multivariate_normal(np.zeros(len(unit)), unit @ unit.T, DRAWS)).max(1)
        t = largest / np.sqrt(rng.chisquare(df, DRAWS) / df)
        smallest = np.minimum(smallest, 2 * stats.t.sf(t, df))
    return np.concatenate([[0], np.sort(smallest)])


def analyse(table: np.ndarray) -> tuple[list[dict], dict]:
    """table: (rows, seeds) losses, nan where there is no run; row 0 is the baseline.

    Returns, for each row, its difference to row 0, simultaneous 95% interval and adjusted p (None where
    they cannot be told), `edge` (half-width over standard error), whether it is equal to row 0 in every
    seed and, where its noise differs from the others', its own; and the noise: std, df."""
    from scipy import stats

    pairs = [(row - table[0])[np.isfinite(row - table[0])] for row in table]
    equal = [i > 0 and len(d) > 0 and not d.any() for i, d in enumerate(pairs)]
    different = [i for i in range(len(table)) if not equal[i]]
    odd = {different[i] for i in rows_of_own_noise(table[different])} - {0}
    pooled = [i for i in different if i not in odd]
    differences, errors, squares, df = fit(table[pooled])
    std = math.sqrt(squares / df + ROUNDING**2) if df else None
    draws = smallest_p(np.isfinite(table[pooled]).tobytes(), len(pooled), len(odd))
    results = []
    for i, d in enumerate(pairs):
        result = dict.fromkeys(("difference", "low", "high", "p", "edge", "own_noise")) | {"equal": equal[i]}
        results.append(result)
        error, freedom = None, df
        if equal[i]:
            result |= {"difference": 0.0, "low": 0.0, "high": 0.0, "p": 1.0, "edge": 2.0}
        elif i in odd and len(d):
            result["difference"] = float(d.mean())
            if len(d) > 1:
                error, freedom = float(d.std(ddof=1)) / math.sqrt(len(d)), len(d) - 1
                result["own_noise"] = error * math.sqrt(len(d) / 2)  # of one run
        elif i in pooled and i and np.isfinite(differences[pooled.index(i)]):
            result["difference"] = float(differences[pooled.index(i)])
            error = std and std * errors[pooled.index(i)]
        if error:
            # The level at which one row must be tested so that all together err at 5%.
            edge = float(stats.t.isf(draws[DRAWS // 20] / 2, freedom))
            p = 2 * stats.t.sf(abs(result["difference"]) / error, freedom)
            result |= {"low": float(result["difference"] - edge * error), "edge": edge}
            result |= {"high": float(result["difference"] + edge * error)}
            result["p"] = float(np.interp(p, draws, np.linspace(0, 1, DRAWS + 1)))
    return results, {"std": std, "df": df}


def judge(groups: list[list[Run]]) -> tuple[list[dict], dict]:
    """What analyse finds for each group."""
    seeds = sorted({r.seeds for group in groups for r in group})
    table = np.full((len(groups), len(seeds)), np.nan)
    for i, group in enumerate(groups):
        for r in group:
            table[i, seeds.index(r.seeds)] = r.loss
    return analyse(table)


# ---- the price of a difference, in tokens and in time -----------------------------------------

ROUNDS = 15  # timed steps of each


def step_of(r: Run, device: torch.device):
    """A call that makes one whole training step of a run's model, on random tokens."""
    flags = train.Config(**r.flags)
    model = GPT(train.model_config(r.flags, vocab_size=r.made["vocab_size"])).to(device)
    if device.type == "cpu":
        train.set_up_cpu()
    torch._dynamo.config.recompile_limit = 1000  # all models share their code
    bf16 = flags.dtype == "bfloat16" or (flags.dtype == "auto" and device.type == "cuda")
    return bench.make_step(model, flags, device, torch.bfloat16 if bf16 else torch.float32)[0]


def timed_as(r: Run, base: Run) -> str:
    """The key of a row's step time: these two classes at these widths."""
    return " / ".join(f"{x.row[0]} {x.row[1]} {x.made.get('ffn_code', '')}" for x in (r, base))


def time_steps(groups: list[list[Run]], times: dict[str, dict], folder: str) -> None:
    """Time whole training steps of each row in turn with the baseline's. What is new goes into times
    and into step_times.json in folder."""
    base = groups[0][0]
    new = {timed_as(group[0], base): group[0] for group in groups[1:]}
    new = {key: r for key, r in new.items() if key not in times}
    kind = str(base.made.get("device")).partition(" ")[0]
    if kind not in ("cpu", "cuda") or (kind == "cuda" and not torch.cuda.is_available()):
        print(f"no step times: the runs were made on {base.made.get('device')}, which is not here")
        return
    device = torch.device(kind)
    theirs = step_of(base, device) if new else None
    for key, r in new.items():
        print(f"timing steps of {r.label}", flush=True)
        try:
            found = bench.measure({"own": step_of(r, device), "base": theirs}, ROUNDS, device)
        except (UserError, RuntimeError) as e:  # of memory, say: the runs are worth a table without
            print(f"no step time of {r.label}: {' '.join(str(e).split())[:200]}")
            continue
        logs = [math.log(a / b) for a, b in zip(found["own"], found["base"])]
        times[key] = {"ratio": bench.ratio(found["own"], found["base"]),
                      "std_error": 1.25 * stdev(logs) / math.sqrt(ROUNDS)}  # of a median  # fmt: skip
        Path(folder, "step_times.json").write_text(json.dumps(times, indent=1))


def exchange_rate(runs: list[Run]) -> dict | None:
    """The baseline's loss as a line in log(tokens) with a level for each seed, by least squares over its
    runs at all horizons. None where they do not tell a slope."""
    seeds, horizons = sorted({r.seeds for r in runs}), sorted({r.tokens for r in runs})
    x = np.array([[*(r.seeds == seed for seed in seeds), math.log(r.tokens)] for r in runs])
    y, df = np.array([r.loss for r in runs]), len(runs) - len(seeds) - 1
    if df < 1 or np.linalg.matrix_rank(x) < len(seeds) + 1:
        return None
    line = np.linalg.lstsq(x, y, rcond=None)[0]
    off = y - x @ line
    variance = off @ off / df * np.linalg.inv(x.T @ x)[-1, -1]
    points = []
    for tokens in horizons:
        here = [i for i, r in enumerate(runs) if r.tokens == tokens]
        points.append({"tokens": tokens, "n": len(here), "val_loss": float(y[here].mean()),
                       "off_line": float(off[here].mean())})  # fmt: skip
    return {"slope": float(line[-1]), "std_error": math.sqrt(variance), "horizons": points}


def price(row: dict, exchange: dict | None, step: dict | None) -> dict:
    """How many times the baseline's tokens, and its time, a row needs to reach the baseline's loss:
    exp(difference / -slope), and that times the step time. The interval is Fieller's, which lies on one
    side of 1 exactly where the difference's lies on one side of 0."""
    keys = [f"{what}_{end}" for what in ("tokens", "time") for end in ENDS]
    found = dict.fromkeys(keys)
    if exchange is None or row["low"] is None:
        return found
    d, half, fall = row["difference"], row["high"] - row["difference"], -exchange["slope"]
    unsure = row["edge"] * exchange["std_error"]
    scale = fall**2 - unsure**2
    if fall <= 0 or scale <= 0:  # the loss does not surely fall with more tokens
        return found
    root = math.sqrt(half**2 * scale + (unsure * d) ** 2)
    middle, low, high = d / fall, (d * fall - root) / scale, (d * fall + root) / scale
    logs = [middle, low, high]
    if step:  # the two errors are independent: the squared distances to the ends add up
        center, own = middle + math.log(step["ratio"]), row["edge"] * step["std_error"]
        logs += [center, center - math.hypot(middle - low, own), center + math.hypot(high - middle, own)]
    return found | {key: math.exp(min(x, 700)) for key, x in zip(keys, logs)}


# ---- the table --------------------------------------------------------------------------------

ENDS = ("ratio", "low", "high")


def summarize(runs: list[Run], times: dict[str, dict], baseline: str) -> dict:
    """compare.json's rows, the baseline first, its noise and its exchange rate."""
    groups = group_runs(runs, baseline)
    results, noise = judge(groups)
    exchange, rows = None, []
    if groups[0]:
        exchange = exchange_rate([r for r in runs if r.done and r.row == groups[0][0].row])
    for group, result in zip(groups, results):
        if not group:
            continue
        first, done, is_base = group[0], [r for r in group if r.done], group is groups[0]
        config = train.model_config(first.flags, vocab_size=first.made["vocab_size"])
        model = sketch(lambda config=config: GPT(config))
        cost = {k: v * config.n_layer for k, v in ffn_cost(model.model.layers[0].mlp).items()}
        active = [r.val[-1]["active"] for r in done if "active" in r.val[-1]]
        papers = {identity(spec): text for paper in PAPERS.values() for spec, text in paper.items()}
        step = times.get(timed_as(first, groups[0][0])) if groups[0] and not is_base else None
        row = {
            "ffn": first.flags["ffn"],
            "hidden": first.row[1],
            "match": first.match,
            "learning_rate": first.flags["learning_rate"],
            "baseline": is_base,
            "params": cost["params"],
            "total_params": model.param_counts()["total"],
            "flops": cost["flops"],
            "ideal_flops": cost["active_flops"],
            "train_flops_per_token": model.flops_per_token(),
            "active": mean(active) if active else None,
            "n": len(done),
            "diverged": len(group) - len(done),
            "val_loss": mean(r.loss for r in done) if done else None,
            "std": stdev(r.loss for r in done) if len(done) > 1 else None,
            **(dict.fromkeys(result) if is_base else result),
            "step_time_ratio": step and step["ratio"],
            **price(dict.fromkeys(result) if is_base else result, exchange, step),
            "paper": papers.get(first.row[0]) if first.match == "hidden" else None,
            "runs": [{"dir": r.dir, "seed": r.flags["seed"], "data_seed": r.flags["data_seed"],
                      "val_loss": r.loss if r.done else None} for r in group],
        }  # fmt: skip
        row["verdict"] = verdict(row, first, len([r for r in groups[0] if r.done]))
        row["wins"] = row["verdict"] in JUDGED and (row["time_high"] or 1) < 1
        rows.append(row)
    return {"baseline": baseline, "noise": noise, "exchange": exchange, "rows": rows}


JUDGED = ("better", "worse", "no difference shown", "identical")


def verdict(row: dict, first: Run, baseline_runs: int) -> str:
    """What the interval says, or why it says nothing."""
    rates = [r["lr"] for r in first.rows if "lr" in r]
    if row["diverged"]:
        return f"diverged in {row['diverged']} of {row['n'] + row['diverged']}"
    if row["baseline"]:
        return "the baseline"
    if row["difference"] is None:
        return "no run of the baseline to compare with"
    if row["equal"]:
        return "identical"
    if row["low"] is None or min(row["n"], baseline_runs) < FEWEST_SEEDS:
        return "too few seeds"
    if first.flags["max_iters"] <= first.flags["warmup_iters"]:
        return "ended in warm-up"
    if rates and rates[-1] > first.flags["learning_rate"] / 2:
        return "learning rate not down"
    if row["low"] <= 0 <= row["high"]:
        return "no difference shown"
    return "better" if row["difference"] < 0 else "worse"


def big(x: float, of: float | None = None) -> str:
    """12345678 -> 12.3M, and how many times `of` that is."""
    rounded = float(f"{x:.3g}")
    unit = (len(str(int(rounded))) - 1) // 3
    text = f"{rounded / 1000**unit:#.3g}".rstrip(".") + " KMGT"[unit].strip()
    return text + (f" ({x / of:.2f}x)" if of else "")


def signed(x: float) -> str:
    """+0.0123, and no -0.0000."""
    return f"{x if abs(x) >= 0.00005 else 0.0:+.4f}"


def times_as_much(x: float) -> str:
    return f"{x:.2f}x" if x < 100 else "over 100x"


def interval(row: dict, keys: list[str], show) -> str:
    """A value and its interval, as far as they are known."""
    value, low, high = (row[key] for key in keys)
    return ("" if value is None else show(value)) + ("" if low is None else f" [{show(low)}, {show(high)}]")


def markdown(record: dict) -> str:
    """The table, aligned and without empty columns, and the notes below it."""
    rows, lines = record["rows"], []
    base = rows[0] if rows[0]["baseline"] else {}
    swept = len({row["learning_rate"] for row in rows}) > 1
    for row in rows:
        deviation = "" if row["std"] is None else f" ± {row['std']:.4f}"
        lines.append({
            "FFN": f"`{row['ffn']}`",
            "width": label(str(row["hidden"]), row["match"]),
            "learning rate": f"{row['learning_rate']:g}" if swept else "",
            "FFN parameters": big(row["params"], base.get("params")),
            "all": big(row["total_params"]),
            "FFN FLOPs/token": big(row["flops"], base.get("flops")),
            "ideal FLOPs": big(row["ideal_flops"], base.get("flops")),
            "active units": "" if row["active"] is None else f"{row['active']:.1%}",
            "val loss": "" if row["val_loss"] is None else f"{row['val_loss']:.4f}{deviation}",
            "n": str(row["n"]),
            "difference [95% CI]": interval(row, ["difference", "low", "high"], signed),
            "p": "" if row["p"] is None else f"{row['p']:.2g}" if row["p"] > 1e-4 else "< 1e-4",
            "verdict": row["verdict"],
            "step time": "" if row["step_time_ratio"] is None else times_as_much(row["step_time_ratio"]),
            "tokens to its loss": interval(row, [f"tokens_{end}" for end in ENDS], times_as_much),
            "time to its loss": interval(row, [f"time_{end}" for end in ENDS], times_as_much)
            + (" wins" if row["wins"] else ""),
            "paper": row["paper"] or "",
        })  # fmt: skip
    columns = [[name, *(line[name] for line in lines)] for name in lines[0]]
    columns = [column for column in columns if any(column[1:])]
    widths = [max(map(len, column)) for column in columns]
    cells = [*zip(*columns)]
    cells.insert(1, ["-" * width for width in widths])
    table = ["| " + " | ".join(c.ljust(w) for c, w in zip(line, widths)) + " |" for line in cells]
    return "\n".join([f"# {record['title']}", "", *table, "", *(f"- {n}" for n in record["notes"]), ""])


def notes_on(record: dict, runs: list[Run], left_out: list[str]) -> list[str]:
    """What a reader must know to read the table."""
    rows, noise, exchange = record["rows"], record["noise"], record["exchange"]
    first = next(r for r in runs if r.factor == 1)
    flags, made, data = first.flags, first.made, first.made.get("data", {})
    defaults = asdict(train.Config(lr_decay_iters=flags["max_iters"]))
    rates = sorted({r.flags["learning_rate"] for r in runs})
    hidden = NEUTRAL | VARIED - ({"learning_rate", "min_lr"} if len(rates) == 1 else set())
    given = [f"--{k}={flags[k]}" for k in flags if k not in hidden and flags[k] != defaults[k]]
    about = [data.get("dir", flags["data_dir"]), data.get("encoding", made.get("encoding")),
             data.get("source"), *(f"{data[name]:,} {name}" for name in data if name.endswith("_tokens"))]  # fmt: skip
    commits = ", ".join(sorted({str(r.made.get("git_commit")) for r in runs}))
    notes = [
        f"Each run has {flags['max_iters']} steps of {first.tokens // flags['max_iters']:,} tokens, "
        f"{first.tokens:,} in all. Flags besides the defaults: `{shlex.join(given) or 'none'}`.",
        f"The data: {', '.join(str(x) for x in about if x)}.",
        f"The runs were made on {made.get('device')} with torch {made.get('torch')}, commit {commits}.",
        "The validation loss is in nats per token at the last step: mean ± standard deviation over n "
        "seeds. FLOPs are of all FFNs' forward passes; the ideal ones skip what is zero.",
    ]
    if any(row["low"] is not None for row in rows) and noise["std"] is not None:
        notes.append(f"The difference to {record['baseline']} is fitted by least squares of loss = row + "
                     f"seed over all runs. A run's noise is {noise['std']:.2g} nats ({noise['df']} degrees of "
                     "freedom). The 95% intervals hold for all rows together (Dunnett's single step); p is "
                     'adjusted alike. "No difference shown" does not mean that there is none.')  # fmt: skip
    notes += [f"The noise of {label(row['ffn'], row['match'])} differs from the others' (F-test, p < "
              f"{ODD_NOISE}): it is judged by its own, {row['own_noise']:.2g} nats."
              for row in rows if row["own_noise"] is not None]  # fmt: skip
    if any(row["diverged"] for row in rows):
        notes.append("A run has diverged if its loss or gradient was not finite at its end.")
    if exchange:
        points = [f"{big(h['tokens'])} tokens {h['val_loss']:.4f} (n = {h['n']}, {signed(h['off_line'])} off "
                  "the line)" for h in exchange["horizons"]]  # fmt: skip
        notes.append(f"Per unit of log(tokens) the baseline's loss changes by {exchange['slope']:.4f} ± "
                     f"{exchange['std_error']:.4f} (standard error): {', '.join(points)}.")  # fmt: skip
    if any(row["tokens_ratio"] for row in rows):
        notes.append("Tokens to its loss: how many times the baseline's tokens the row needs to reach the "
                     "baseline's loss, by that line, which outside 0.7 to 1.4 is extrapolated. Time to its "
                     "loss: that times the step time over the baseline's. A row wins where all of the "
                     "interval of its time lies below 1.")  # fmt: skip
    notes += [f"({match}): the width at which the FFN's {what} come closest to SwiGLU's."
              for match, what in (("params", "parameters"), ("flops", "executed FLOPs"))
              if any(row["match"] == match for row in rows)]  # fmt: skip
    if any(row["paper"] for row in rows):
        notes.append('Paper: the difference to SwiGLU in the paper by "Aardvark" (2025) that reports it, on '
                     "FineWeb at its own scale, without a test.")  # fmt: skip
    if len(rates) > 1:
        notes.append(f"Learning rates {', '.join(f'{rate:g}' for rate in rates)} were tried for every row, "
                     "with min_lr in proportion; each row shows its best.")  # fmt: skip
    if left_out:
        notes.append(f"Not finished and left out: {', '.join(left_out)}.")
    return [*notes, f"Command: `{record['command']}`"]


# ---- the plot ---------------------------------------------------------------------------------

# readable in black and white: each colour has its own marker
STYLES = [("#000000", "o"), ("#d55e00", "s"), ("#0072b2", "^"), ("#009e73", "D"),
          ("#cc79a7", "v"), ("#7f6000", "P"), ("#56b4e9", "X"), ("#555555", "*")]  # fmt: skip


def plot_losses(ax, rows: list[dict], groups: list[list[Run]]) -> None:
    """Loss against tokens of the baseline and the best rows: mean and range over the seeds. The first
    quarter of the runs is left out: it would flatten all the rest."""
    from matplotlib.ticker import EngFormatter

    if len(groups) == len(groups[0]) == 1:
        shown = [r for r in groups[0][0].rows if math.isfinite(r.get("train_loss", math.nan))]
        ax.plot(*zip(*((r["tokens"], r["train_loss"]) for r in shown[len(shown) // 4 :])),
                color="#999999", linewidth=0.9, label="training batch")  # fmt: skip
    drawn = [i for i, row in enumerate(rows) if row["n"]]
    best = sorted(drawn[1:], key=lambda i: rows[i]["val_loss"])
    for (color, marker), i in zip(STYLES, [*drawn[:1], *best]):
        curves = [{row["tokens"]: row["val_loss"] for row in r.val} for r in groups[i] if r.done]
        tokens = sorted(set.intersection(*map(set, curves)))
        tokens = [t for t in tokens if t >= tokens[-1] / 4]
        losses = np.array([[c[t] for t in tokens] for c in curves])  # (seeds, points)
        ax.plot(tokens, losses.mean(0), color=color, marker=marker, markersize=4, linewidth=1.3,
                markevery=max(1, len(tokens) // 6), label=label(rows[i]["ffn"], rows[i]["match"]))  # fmt: skip
        ax.fill_between(tokens, losses.min(0), losses.max(0), color=color, alpha=0.2, linewidth=0)
    ax.xaxis.set_major_formatter(EngFormatter(sep=""))
    ax.set_title("Validation loss after a quarter of the run\n(band: lowest to highest seed)")
    ax.set_xlabel("training tokens")
    ax.set_ylabel("nats per token")
    if drawn:
        ax.legend()


def plot_intervals(ax, rows: list[dict], keys: list[str], mark: float, title: str, below: str) -> None:
    """A line for each row, the smallest value on top: the value and its interval, filled where the
    difference has a verdict. What is far beyond most of the others is cut at the axis's end."""
    rows = sorted((row for row in rows if row[keys[0]] is not None), key=lambda row: row[keys[0]])
    points = [[row[keys[0]] if row[key] is None else row[key] for key in keys] for row in rows]
    reach = [max(abs(x - mark) for x in point) for point in points]
    limit = min(1.1 * max(reach), 3 * median_high(reach)) or 1e-4
    ax.axvline(mark, color="black", linewidth=0.8)
    for y, (x, low, high) in enumerate(points):
        fill = "black" if rows[y]["verdict"] in ("better", "worse") else "white"
        ax.errorbar(x, y, xerr=[[x - low], [high - x]], fmt="ok", markerfacecolor=fill)
        if abs(x - mark) > limit:
            ax.plot(mark + math.copysign(limit, x - mark), y, ">k" if x > mark else "<k", clip_on=False)
    ax.set_xlim(mark - limit, mark + limit)
    ax.set_ylim(len(rows) - 0.4, -0.6)
    ax.set_yticks(range(len(rows)), [label(row["ffn"], row["match"]) for row in rows])
    ax.set_title(f"{title}\n(95% intervals; filled: better or worse)")
    ax.set_xlabel(below)


def plot(record: dict, groups: list[list[Run]], path: str) -> None:
    """Draw the loss curves, the differences and, where it is known, the time to the baseline's loss."""
    import matplotlib
    from matplotlib.figure import Figure

    matplotlib.rcParams.update({"font.size": 8.5, "axes.grid": True, "grid.alpha": 0.3})
    matplotlib.rcParams["text.parse_math"] = False  # a folder's name may hold $
    rows, base = record["rows"], record["baseline"]
    compared = [row for row in rows if row["difference"] is not None]
    panels = 1 + bool(compared) + any(row["time_ratio"] for row in rows)
    figure = Figure(figsize=(2 + 4.5 * panels, max(4.4, 1.9 + 0.27 * len(compared))), layout="constrained")
    axes = figure.subplots(1, panels, squeeze=False)[0]
    plot_losses(axes[0], rows, [group for group in groups if group])
    if panels > 1:
        plot_intervals(axes[1], compared, ["difference", "low", "high"], 0, f"Final loss minus {base}'s",
                       "nats per token: better < 0 < worse")  # fmt: skip
    if panels > 2:
        plot_intervals(axes[2], compared, [f"time_{end}" for end in ENDS], 1, f"Time to {base}'s final loss",
                       f"over {base}'s time: faster < 1 < slower")  # fmt: skip
    figure.suptitle(record["title"])
    figure.savefig(path, dpi=120)


# ---- all of it --------------------------------------------------------------------------------


def check_overwrite(folder: str, runs: list[Run]) -> None:
    """Refuse to replace a table of runs that are not among these."""
    try:
        record = json.loads(Path(folder, "compare.json").read_text())
        listed = [os.path.basename(r["dir"]) for row in record["rows"] for r in row["runs"]]
    except (OSError, ValueError, KeyError, TypeError):
        return
    if lost := set(listed) - {os.path.basename(os.path.abspath(r.dir)) for r in runs}:
        raise UserError(f"{folder}/compare.md has other runs too, e.g. {min(lost)}: choose a folder with --out")


def read_command(argv: list[str]) -> tuple[Config, train.Config, list[str]]:
    """The flags, those of train.py alone, and the folders and archives to report on. Raises UserError."""
    argv, places = list(argv), []
    if "--report" in argv:  # folders follow, up to the next flag
        at = argv.index("--report") + 1
        places = list(itertools.takewhile(lambda arg: not arg.startswith("-"), argv[at:]))
        argv[at - 1 : at + len(places)] = [f"--report={' '.join(places)}"]
    cfg, given = configure(Config, argv)
    if "report" in given:
        places = places or [cfg.report]
        extra = given - {"report", "out", "archive", "baseline", "name"}
        if extra or not cfg.report:
            named = " ".join(f"--{name}" for name in sorted(extra)) or "no folder"
            raise UserError(f"--report takes folders of runs and runs nothing: {named} is not for it")
    if set_here := {"seed", "data_seed"} & given:
        raise UserError(f"--{min(set_here)} is set by compare.py, run by run: use --seeds=N")
    if cfg.eval_only:
        raise UserError("--eval_only trains nothing: leave it out, or use --report")
    for name in ("seeds", "jobs", "noise"):
        if getattr(cfg, name) <= 0:
            raise UserError(f"--{name}={getattr(cfg, name)} must be above 0")
    if cfg.precision and cfg.precision < LEAST_PRECISION:
        raise UserError(f"--precision={cfg.precision:g} is below what rounding allows: try 0.01")
    try:
        launcher = shlex.split(cfg.launch)[:1]
    except ValueError as e:  # an open quote
        raise UserError(f"--launch={cfg.launch}: {e}") from None
    if launcher and not shutil.which(launcher[0]):
        raise UserError(f"--launch: there is no program {launcher[0]!r} here: check its name")
    if cfg.archive and not cfg.archive.endswith(".tar.xz"):
        raise UserError(f"--archive={cfg.archive} must end in .tar.xz")
    parse_spec(cfg.baseline)
    flags = {f.name: getattr(cfg, f.name) for f in fields(train.Config)}
    return cfg, train.Config(**flags | {"ffn": cfg.baseline, "ffn_match": "hidden"}), places


def main() -> None:
    cfg, base, places = read_command(sys.argv[1:])
    for package in ("matplotlib", "scipy"):  # now, and not after hours of runs
        if not importlib.util.find_spec(package):
            raise UserError(f"{package} is missing: pip install -r requirements-dev.txt")
    failed = 0
    if places:
        runs, step_times = find_runs(places)
        folder = os.path.relpath(os.path.commonpath([os.path.abspath(r.dir) for r in runs] or ["/"]))
        folder = os.path.dirname(folder) if os.path.isfile(folder) else folder
    else:
        train.check_flags(base, 1 if cfg.launch else max(1, len(gpus(base)) // cfg.jobs))
        chosen = plan(cfg, base)
        folder = os.path.dirname(chosen[0].dir)
        if cfg.plan:
            return print_plan(chosen, cfg)
        if cfg.precision:
            chosen, failed = run_to_precision(chosen, cfg)
        else:
            failed = run_all(chosen, cfg)
        runs, step_times = [r for r in map(read_run, (p.dir for p in chosen)) if r], read_times(folder)
    ended, left_out = [r for r in runs if r.ended], [r for r in runs if not r.ended]
    for r in left_out:
        print(f"left out: {r.dir} has not reached step {r.flags['max_iters']}")
    if not ended:
        raise UserError("no finished run: " + ("see above" if runs or failed else "name their folders"))
    check_alike(runs, cfg.baseline)
    groups = group_runs(ended, cfg.baseline)
    if groups[0] and cfg.horizons and not places:
        time_steps(groups, step_times, folder)
    record = {"title": cfg.name or cfg.paper or os.path.basename(os.path.abspath(folder))}
    record |= {"command": shlex.join(["python", "experiments/compare.py", *sys.argv[1:]])}
    record |= summarize(ended, step_times, cfg.baseline)
    record["notes"] = notes_on(record, ended, [r.dir for r in left_out])
    record |= {"flags": {k: v for k, v in ended[0].flags.items() if k not in NEUTRAL | VARIED}}
    record |= {"made": ended[0].made}
    if places and not cfg.out:
        check_overwrite(folder, ended)
    folder = cfg.out or folder
    path = os.path.join(folder, "compare")
    try:
        os.makedirs(folder, exist_ok=True)
        Path(f"{path}.md").write_text(markdown(record), encoding="utf-8")
        Path(f"{path}.json").write_text(json.dumps(record, indent=1, allow_nan=False))
        plot(record, groups, f"{path}.png")
        if cfg.archive:
            write_archive(cfg.archive, ended, step_times)
    except OSError as e:
        where = e.filename or folder
        raise UserError(f"cannot write to {where} ({e.strerror}): choose another with --out") from None
    print(markdown(record))
    print(f"wrote {path}.md, {path}.json, {path}.png", *([cfg.archive] if cfg.archive else []))
    if failed:
        sys.exit(f"error: {failed} runs failed, see above and their train.txt")


if __name__ == "__main__":
    run(main)
