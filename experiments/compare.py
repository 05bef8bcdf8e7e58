"""
Is this FFN better than SwiGLU, by how much, how sure, and at what cost? Many runs of train.py, one
table and one plot.

    python experiments/compare.py config/tiny.py --ffn=geglu,sparseglu,sparseglu:grad=ste --seeds=5
    python experiments/compare.py --paper=asg config/tiny.py     # every row of that paper's table
    python experiments/compare.py --report out/*                 # only read finished runs

Any other flag and config file goes to train.py. Run s of every FFN has --seed=s and --data_seed=s,
so it sees the same tokens from the same shared weights as SwiGLU's run s: differences are paired.
The same command skips what is done and goes on with what was cut. SwiGLU is always among the rows.
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
import signal
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import mean, median, median_high, stdev

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import train
from configurator import UserError, configure, parse_value, run, suggest
from model import GPT, ffn_cost, parse_spec, sketch
from prepare_fineweb import cores


@dataclass
class Config:
    ffn: str = ""  # specs, comma-separated
    paper: str = ""  # rows of these papers' tables: dsg, asg, sparsegated, dynamicgeglu, sparseglu
    seeds: int = 3  # runs of each: seeds 0 to seeds - 1
    ffn_match: str = "hidden"  # hidden: SwiGLU's width; params: its parameters; both
    lr_sweep: str = ""  # learning rates for all alike, comma-separated; the best of each is shown
    name: str = ""  # runs go to out/{name}; empty: the paper's, else compare
    jobs: int = 1  # runs side by side
    detect: float = 0.01  # a difference in nats: how many seeds would show it?
    report: str = ""  # --report DIR...: read these finished runs, or folders of runs; run nothing
    out: str = ""  # folder for compare.md, .json, .png; empty: beside the runs


# Losses as the papers report them (all by "Aardvark", 2025, on FineWeb). Two baselines are stated,
# 4.9266 (Dynamic GEGLU) and 4.927; ASG's "no sparse pathway" is stated to equal SwiGLU. Strings:
# a difference has no more digits than its parts.
PAPERS = {
    "dsg": {"swiglu": "4.927", "dsg": "4.935"},
    "asg": {
        "swiglu": "4.927",
        "asg": "5.11",
        "asg:threshold=fixed:tau=0.1": "5.23",
        "asg:threshold=neuron": "5.18",
        "asg:sparse=False": "4.927",
        "multiscale": "4.792",
        "dualgated": "4.7926",
    },
    "sparsegated": {
        "swiglu": "4.927",
        "sparsegated": "5.0902",
        "sparsegated:split=False": "5.2341",
        "sparsegated:gate=False": "5.4123",
        "sparsegated:k=0.5": "5.0321",
    },
    "dynamicgeglu": {"swiglu": "4.9266", "dynamicgeglu": "4.9260", "isogmlp": "4.9480"},
    "sparseglu": {"swiglu": "4.927", "sparseglu": "5.0202", "geglu": "4.8734"},
}

# Flags that cannot change a loss, and those by which the runs of one comparison may differ.
NEUTRAL = set(
    "out_dir init_from prepare eval_only eval_interval log_interval save_interval wandb_project "
    "sample_tokens prompt temperature top_k".split()
)
VARIED = {"ffn", "ffn_match", "seed", "data_seed", "learning_rate", "min_lr"}


@functools.cache
def meaning(spec: str) -> str:
    """The same text for two specs that build the same FFN (defaults, order of options)."""
    cls, options = parse_spec(spec)
    return f"{cls.__name__} {sorted(((cls.__init__.__kwdefaults__ or {}) | options).items())}"


def reported(spec: str) -> tuple[str, str] | None:
    """The paper that reports on a spec and its difference to that paper's SwiGLU, e.g. +0.18."""
    for paper, losses in PAPERS.items():
        for other, loss in losses.items():
            if other != "swiglu" and meaning(other) == meaning(spec):
                digits = min(len(text.partition(".")[2]) for text in (loss, losses["swiglu"]))
                return paper, f"{float(loss) - float(losses['swiglu']):+.{digits}f}"
    return None


# ---- runs, planned and on disk ----------------------------------------------------------------


@dataclass
class Run:
    dir: str
    flags: dict  # of train.py, resolved
    made: dict  # the rest of config.json: device, versions
    rows: list[dict]  # of log.jsonl

    @property
    def val(self) -> list[dict]:
        return [row for row in self.rows if "val_loss" in row]

    @property
    def step(self) -> int:
        return self.rows[-1]["step"] if self.rows else 0

    @property
    def done(self) -> bool:
        return bool(self.val) and self.val[-1]["step"] == self.flags["max_iters"]

    @property
    def loss(self) -> float:
        """At the last step: no other checkpoint is ever picked."""
        return self.val[-1]["val_loss"]

    @property
    def speed(self) -> float | None:
        """Median tokens/s over the run."""
        return middle([row.get("tok_per_s") for row in self.rows])

    @property
    def seeds(self) -> tuple[int, int]:
        return self.flags["seed"], self.flags["data_seed"]

    @property
    def width(self) -> int:
        return train.model_config(self.flags).hidden

    @property
    def group(self) -> tuple[str, int]:
        """What runs of one row of the table share. Matched parameters can mean the same width."""
        return meaning(self.flags["ffn"]), self.width


def read_run(folder: str) -> Run | None:
    """A run's config.json and log.jsonl, however far it came; None where there is no run."""
    try:
        with open(os.path.join(folder, "config.json"), encoding="utf-8") as f:
            made = json.load(f)
        flags = train.saved_flags(made.pop("flags"))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None
    log, rows = os.path.join(folder, "log.jsonl"), []
    with suppress(OSError), open(log, encoding="utf-8", errors="replace") as f:
        rows = [row for row in map(read_row, f) if row]
    return Run(folder, flags, made, rows)


def read_row(line: str) -> dict | None:
    """One of log.jsonl; None for half of one, which a killed run left or a run is just writing, and
    for a loss that is not finite."""
    with suppress(ValueError, KeyError, TypeError, OverflowError, RecursionError):
        row = json.loads(line)
        losses = [row[name] for name in ("train_loss", "val_loss") if name in row]
        if all(map(math.isfinite, [row["step"], row["tokens"], *losses])):
            return row
    return None


def last_step(folder: str) -> int:
    """By the end of the log: while runs are on, nobody reads whole logs."""
    try:
        with open(os.path.join(folder, "log.jsonl"), "rb") as f:
            f.seek(max(0, os.fstat(f.fileno()).st_size - 4096))
            return int(re.findall(rb'"step": (\d+)', f.read())[-1])
    except (OSError, IndexError):
        return 0


def middle(values: list[float | None]) -> float | None:
    """The median of those that are there."""
    there = [value for value in values if value is not None]
    return median(there) if there else None


def spread(values: list[float]) -> float | None:
    return stdev(values) if len(values) > 1 else None


def differing(a: dict, b: dict) -> str | None:
    """The first flag, of those that matter, in which two runs differ."""
    return next((name for name in a if name not in NEUTRAL and a[name] != b[name]), None)


def plan(cfg: Config, base: train.Config) -> list[Run]:
    """Every run that the flags ask for, in the order of running: all FFNs of a seed before the next
    seed, so that a slow hour of the machine meets all of them."""
    specs = [spec for spec in cfg.ffn.split(",") if spec]
    for paper in filter(None, cfg.paper.split(",")):
        if paper not in PAPERS:
            raise UserError(f"--paper={paper}: {suggest(paper, PAPERS)}")
        specs += PAPERS[paper]
    if not specs:
        raise UserError("name the FFNs to compare with SwiGLU: --ffn=geglu,asg or --paper=asg")
    if cfg.ffn_match not in ("hidden", "params", "both"):
        raise UserError(f"--ffn_match={cfg.ffn_match}: valid: hidden, params, both")
    sweep = [parse_value("--lr_sweep", text, float) for text in cfg.lr_sweep.split(",") if text]
    if sweep and min(base.learning_rate, *sweep) <= 0:  # min_lr is scaled by their ratio
        rates = f"--lr_sweep={cfg.lr_sweep} and --learning_rate={base.learning_rate}"
        raise UserError(f"{rates}: all must be above 0")
    unique: dict[str, str] = {}
    for spec in ["swiglu", *specs]:
        unique.setdefault(meaning(spec), spec)
    rates = dict.fromkeys(sweep or [base.learning_rate])
    runs = []
    for seed, rate, spec in itertools.product(range(cfg.seeds), rates, unique.values()):
        flags = asdict(base) | {"ffn": spec, "seed": seed, "data_seed": seed, "init_from": "auto"}
        flags["lr_decay_iters"] = base.lr_decay_iters or base.max_iters
        if sweep:
            flags |= {"learning_rate": rate, "min_lr": base.min_lr * (rate / base.learning_rate)}
        matches = ["hidden", "params"] if cfg.ffn_match == "both" else [cfg.ffn_match]
        if "params" in matches:
            matched = train.model_config(flags | {"ffn_match": "params"}).hidden
            if spec == "swiglu" or matched == base.ffn_hidden:  # one and the same run
                matches = ["hidden"]
        for match in matches:
            name = f"{spec}-s{seed}" + ("-params" if match == "params" else "")
            name += f"-lr{rate:g}" if sweep else ""
            folder = os.path.join("out", cfg.name or cfg.paper or "compare", name)
            mine = flags | {"ffn_match": match, "out_dir": folder}
            train.model_config(mine).check()
            runs.append(Run(folder, mine, {}, []))
    return runs


def gpus(base: train.Config) -> list[str]:
    """GPUs to share out, as CUDA_VISIBLE_DEVICES names them; none if --device says where to run."""
    if base.device not in ("auto", "cuda"):
        return []
    count = torch.cuda.device_count()
    names = os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(count)))
    return names.split(",")[:count]


def start(planned: Run, passed: list[str], base: train.Config, slot: int, jobs: int):
    """train.py on the share of the machine that a slot has: its GPUs (by torchrun, if several) or
    its cores. What it prints goes to train.txt in the run's folder."""
    devices = gpus(base)
    each = max(1, len(devices) // jobs)
    asked = os.environ.get("OMP_NUM_THREADS", "").partition(",")[0]  # "4,2": for nested levels
    threads = (int(asked) if asked.isdigit() else cores()) // (jobs * each)
    env = os.environ | {"OMP_NUM_THREADS": str(max(1, threads))}
    command = [sys.executable]
    if each > 1:
        command += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={each}"]
    if devices:
        mine = [devices[(slot * each + i) % len(devices)] for i in range(each)]
        env["CUDA_VISIBLE_DEVICES"] = ",".join(mine)
    command += [os.path.abspath(train.__file__), *passed]
    command += [f"--{name}={planned.flags[name]}" for name in sorted(VARIED | {"out_dir", "init_from"})]
    try:
        os.makedirs(planned.dir, exist_ok=True)
        with open(os.path.join(planned.dir, "train.txt"), "w", encoding="utf-8") as f:
            # a session of its own: a Ctrl-C reaches train.py once, through us, and not twice
            return subprocess.Popen(command, stdout=f, stderr=f, stdin=subprocess.DEVNULL, env=env,
                                    start_new_session=True)  # fmt: skip
    except OSError as e:
        cure = "make room, or another --name"
        raise UserError(f"cannot write to {planned.dir} ({e.strerror}): {cure}") from None


def why_failed(folder: str, code: int) -> str:
    """One line on a run that ended before its last step."""
    if code < 0:
        return f"killed by {signal.Signals(-code).name}"
    with open(os.path.join(folder, "train.txt"), encoding="utf-8", errors="replace") as f:
        lines = [line.strip() for line in f if line.strip()]
    # torchrun prints a page after the error
    return ([line for line in lines if line.startswith("error: ")] or lines or [f"exit {code}"])[-1]


def run_all(planned: list[Run], passed: list[str], cfg: Config, base: train.Config) -> int:
    """Run what is not done yet. Returns how many failed; exits with 130 when stopped by a signal."""
    from tqdm import tqdm

    waiting, cure = [], "choose another --name, or delete that folder"
    for p in planned:
        old = read_run(p.dir)
        if old and (name := differing(p.flags, old.flags)):
            was, wanted = old.flags[name], p.flags[name]
            raise UserError(f"{p.dir} was made with --{name}={was}, not {wanted}: {cure}")
        code = train.ffn_code(p.flags["ffn"])
        if old and (old.made.get("ffn_code") or code) != code:
            raise UserError(f"the class of {p.flags['ffn']} has changed since {p.dir} was made: {cure}")
        if not (old and old.done):
            waiting.append(p)
    steps = {p.dir: last_step(p.dir) for p in waiting}
    if not base.prepare and waiting:
        train.open_data(base.data_dir, base.block_size)  # one error now instead of one for each
    print(f"{len(planned)} runs: {len(planned) - len(waiting)} done, "
          f"{sum(s > 0 for s in steps.values())} to go on with, "
          f"{sum(s == 0 for s in steps.values())} to start", flush=True)  # fmt: skip

    signals: list[int] = []
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)  # SIGHUP: a terminal that closes
    usual = {n: signal.signal(n, lambda number, frame: signals.append(number)) for n in numbers}
    running: dict[int, tuple[Run, subprocess.Popen]] = {}
    todo, failed, passed_on = len(waiting), 0, 0
    total = sum(base.max_iters - s for s in steps.values())
    bar = tqdm(total=total, unit="step", disable=None, smoothing=0.02, dynamic_ncols=True)
    try:
        while running or (waiting and not signals):
            for slot in range(cfg.jobs):
                if slot not in running and waiting and not signals:
                    p = waiting.pop(0)
                    running[slot] = (p, start(p, passed, base, slot, cfg.jobs))
            time.sleep(0.3)
            if passed_on < len(signals):  # the first: finish the step, save; the second: end at once
                passed_on += 1
                for _, process in running.values():
                    process.send_signal(signal.SIGINT)
            for slot, (p, process) in list(running.items()):
                code, step = process.poll(), last_step(p.dir)
                bar.update(step - steps[p.dir])  # less than 0 where a run goes back to its checkpoint
                steps[p.dir] = step
                if code is None:
                    continue
                del running[slot]
                now = read_run(p.dir)
                place = f"[{todo - len(waiting) - len(running)}/{todo}] {p.dir}"
                if now and now.done:
                    bar.write(f"{place}: {now.loss:.4f}")
                elif not signals:
                    failed += 1
                    bar.write(f"{place} FAILED: {why_failed(p.dir, code)}")
                    bar.update(base.max_iters - steps[p.dir])
                sys.stdout.flush()
    finally:
        for _, process in running.values():  # none, unless something above went wrong
            process.send_signal(signal.SIGINT)
        for number, handler in usual.items():
            signal.signal(number, handler)
    bar.close()
    if signals:
        done = sum(r.done for r in map(read_run, (p.dir for p in planned)) if r)
        print(f"stopped with {done} of {len(planned)} runs done: the same command goes on from here")
        sys.exit(130)
    return failed


def find_runs(folders: list[str]) -> list[Run]:
    """The runs in folders: each a run's own, or one that holds runs' folders."""
    found: dict[str, Run] = {}
    for folder in folders:
        inner = sorted(glob.glob(os.path.join(glob.escape(folder), "*")))
        here = [r for r in map(read_run, [folder, *inner]) if r]
        if not here and not os.path.isfile(folder):  # a shell's * also names tables and plots
            print(f"left out: {folder} holds no run")
        found |= {os.path.realpath(r.dir): r for r in here}
    return list(found.values())


def common(r: Run) -> dict:
    """What all runs of a table have in common. A sweep scales min_lr with the learning rate."""
    rate, least = r.flags["learning_rate"], r.flags["min_lr"]
    found = {name: value for name, value in r.flags.items() if name not in VARIED}
    return found | {"min_lr": f"{least / rate:.6g}" if rate else least, "device": r.made.get("device")}


def check_alike(runs: list[Run]) -> None:
    """Refuse finished runs whose difference would not be the FFN's."""
    cure = "report only runs that differ in nothing but --ffn, --ffn_match and the seeds"
    done = [r for r in runs if r.done]
    first, expected, seen, codes = done[0], common(done[0]), {}, {}
    for r in done:
        name = differing(expected, common(r))
        if name == "min_lr" and first.flags[name] == r.flags[name]:
            name = "learning_rate"
        if name:
            a, b = ((x.made if name == "device" else x.flags).get(name) for x in (first, r))
            raise UserError(f"{first.dir} and {r.dir} differ in --{name} ({a} and {b}): {cure}")
        key = (*r.group, r.flags["learning_rate"], r.seeds)
        if key in seen:
            raise UserError(f"{seen[key]} and {r.dir} are the same run twice: leave one out")
        seen[key] = r.dir
        if code := r.made.get("ffn_code"):
            other = codes.setdefault(r.group, r)
            if code != other.made["ffn_code"]:
                changed = f"the class of {label(r.flags)} changed between {other.dir} and {r.dir}"
                raise UserError(f"{changed}: run the older one again")
    # A learning rate may differ where all were tried for all. A run that failed was tried.
    tried = {(r.group, r.flags["learning_rate"]) for r in runs}
    rates = {r.flags["learning_rate"]: r for r in done}
    groups = {r.group: r for r in done}
    for (rate, a), (group, b) in itertools.product(rates.items(), groups.items()):
        if (group, rate) not in tried:
            raise UserError(f"{a.dir} and {b.dir} differ in --learning_rate, and {label(b.flags)} was "
                            f"not tried at {rate:g}: {cure}, or sweep it for all")  # fmt: skip


# ---- statistics -------------------------------------------------------------------------------


def paired_test(differences: list[float]) -> tuple[float, float, float]:
    """(low, high, p): 95% confidence interval of the mean and two-sided p-value of a paired t-test.
    No spread at all (the same FFN, written twice) is p = 1 at 0 and p = 0 elsewhere."""
    from scipy import stats

    if len(set(differences)) == 1:
        return differences[0], differences[0], float(differences[0] == 0)
    test = stats.ttest_1samp(differences, 0)
    low, high = test.confidence_interval(0.95)
    return float(low), float(high), float(test.pvalue)


def holm(p: list[float]) -> list[float]:
    """Holm's correction: sorted p-values times m, m - 1, ..., never falling, at most 1."""
    corrected, highest = [0.0] * len(p), 0.0
    for rank, i in enumerate(sorted(range(len(p)), key=p.__getitem__)):
        highest = corrected[i] = max(highest, min(1.0, (len(p) - rank) * p[i]))
    return corrected


MOST_SEEDS = 1000


def seeds_needed(noise: float, difference: float) -> int | None:
    """Seeds for which a paired two-sided t-test at 5% finds a true difference with power 0.8, if
    single differences have this standard deviation. None: more than MOST_SEEDS."""
    from scipy import stats

    if noise == 0:
        return 2
    n = np.arange(2, MOST_SEEDS + 1)
    edge, shift = stats.t.ppf(0.975, n - 1), difference / noise * np.sqrt(n)
    power = stats.nct.sf(edge, n - 1, shift) + stats.nct.cdf(-edge, n - 1, shift)
    enough = np.flatnonzero(power >= 0.8)
    return int(n[enough[0]]) if len(enough) else None


# ---- the table --------------------------------------------------------------------------------


def label(flags: dict) -> str:
    """Of train.py's flags, or of a row."""
    match = flags.get("ffn_match", flags.get("match"))
    return flags["ffn"] + (" (params)" if match == "params" else "")


def best_rate(runs: list[Run]) -> list[Run]:
    """Those of one learning rate: the lowest mean loss among rates where the most seeds finished."""
    rates: dict[float, list[Run]] = {}
    for r in runs:
        rates.setdefault(r.flags["learning_rate"], []).append(r)
    most = max(map(len, rates.values()))
    full = [runs for runs in rates.values() if len(runs) == most]
    return min(full, key=lambda runs: mean(r.loss for r in runs))


def summarize(runs: list[Run], detect: float) -> tuple[list[dict], list[list[Run]]]:
    """The rows of the table, SwiGLU first, and the runs behind each."""
    grouped: dict[tuple, list[Run]] = {}
    for r in runs:
        grouped.setdefault(r.group, []).append(r)
    own = meaning("swiglu"), runs[0].flags["ffn_hidden"]
    groups = [best_rate(grouped[g]) for g in sorted(grouped, key=lambda g: g != own)]
    base = {r.seeds: r for r in groups[0]} if own in grouped else {}
    rows = []
    for group in groups:
        flags, baseline, losses = group[0].flags, group[0].group == own, [r.loss for r in group]
        model = sketch(lambda f=flags: GPT(train.model_config(f, vocab_size=runs[0].made["vocab_size"])))
        ffn = {k: v * flags["n_layer"] for k, v in ffn_cost(model.model.layers[0].mlp).items()}
        active = [r.val[-1]["active"] for r in group if "active" in r.val[-1]]
        pairs = [(r, base[r.seeds]) for r in group if r.seeds in base and not baseline]
        differences = [a.loss - b.loss for a, b in pairs]
        low, high, p = paired_test(differences) if len(pairs) > 1 else (None, None, None)
        noise = spread(differences)
        match = "hidden" if group[0].width == flags["ffn_hidden"] else "params"
        paper, reports = (match == "hidden" and reported(flags["ffn"])) or (None, None)
        rows.append({
            "ffn": flags["ffn"],
            "hidden": group[0].width,
            "match": match,
            "learning_rate": flags["learning_rate"],
            "baseline": baseline,
            "ffn_params": ffn["params"],
            "total_params": model.param_counts()["total"],
            "ffn_flops_per_token": ffn["flops"],
            "ffn_active_flops_per_token": ffn["ideal_flops"],
            "train_flops_per_token": model.flops_per_token(),
            "active": mean(active) if active else None,
            "tok_per_s": middle([r.speed for r in group]),
            "speed_vs_swiglu": middle([a.speed and b.speed and a.speed / b.speed for a, b in pairs]),
            "n": len(group),
            "val_loss": mean(losses),
            "std": spread(losses),
            "pairs": len(pairs),
            "difference": mean(differences) if pairs else None,
            "difference_std": noise,
            "low": low,
            "high": high,
            "p": p,
            "p_holm": None,  # below, when all p are there
            "seeds_needed": None if noise is None else seeds_needed(noise, detect),
            "paper": paper,
            "paper_difference": reports and float(reports),
            "runs": [{"dir": r.dir, "seed": r.flags["seed"], "data_seed": r.flags["data_seed"],
                      "val_loss": r.loss, "tok_per_s": r.speed} for r in group],
        })  # fmt: skip
    tested = [row for row in rows if row["p"] is not None]
    for row, p in zip(tested, holm([row["p"] for row in tested])):
        row["p_holm"] = p
    for row in rows:
        row["verdict"] = verdict(row)
    return rows, groups


def verdict(row: dict) -> str:
    if row["baseline"]:
        return "the baseline"
    if row["p_holm"] is not None:
        if row["p_holm"] >= 0.05:
            return "no difference shown"
        return "better" if row["difference"] < 0 else "worse"
    return "one seed: no verdict" if row["pairs"] else "no SwiGLU run to compare with"


def big(x: float, of: float | None = None) -> str:
    """12345678 -> 12.3M, and how many times `of` that is."""
    rounded = float(f"{x:.3g}")
    unit = (len(str(int(rounded))) - 1) // 3
    text = f"{rounded / 1000**unit:#.3g}".rstrip(".") + " KMGT"[unit].strip()
    return text + (f" ({x / of:.2f}x)" if of else "")


def signed(x: float | None) -> str:
    """+0.0123, and no -0.0000."""
    return "" if x is None else f"{x if abs(x) >= 0.00005 else 0.0:+.4f}"


def markdown(rows: list[dict], notes: list[str], title: str, detect: float) -> str:
    """The table, aligned, and what its columns mean."""
    base = rows[0] if rows[0]["baseline"] else {}
    flops = base.get("ffn_flops_per_token")
    swept = len({row["learning_rate"] for row in rows}) > 1
    lines = []
    for row in rows:
        deviation = "" if row["std"] is None else f" ± {row['std']:.4f}"
        interval = "" if row["low"] is None else f" [{signed(row['low'])}, {signed(row['high'])}]"
        needed = row["seeds_needed"] or (row["p"] is not None and f"> {MOST_SEEDS}")
        speed = "" if row["tok_per_s"] is None else big(row["tok_per_s"])
        speed += f" ({row['speed_vs_swiglu']:.2f}x)" if row["speed_vs_swiglu"] else ""
        lines.append({
            "FFN": f"`{row['ffn']}`",
            "width": f"{row['hidden']}" + (" (params)" if row["match"] == "params" else ""),
            **({"learning rate": f"{row['learning_rate']:g}"} if swept else {}),
            "FFN parameters": big(row["ffn_params"], base.get("ffn_params")),
            "all": big(row["total_params"]),
            "FFN FLOPs/token": big(row["ffn_flops_per_token"], flops),
            "active": big(row["ffn_active_flops_per_token"], flops),
            "units": "" if row["active"] is None else f"{row['active']:.1%}",
            "tokens/s": speed,
            "val loss": f"{row['val_loss']:.4f}{deviation}",
            "n": str(row["n"]),
            "difference [95% CI]": signed(row["difference"]) + interval,
            "p (Holm)": "" if row["p_holm"] is None else f"{row['p_holm']:.2g}",
            "paper": reported(row["ffn"])[1] if row["paper"] else "",
            "verdict": row["verdict"],
            f"seeds for {detect:g}": str(needed or ""),
        })  # fmt: skip
    cells = [lines[0].keys(), *(line.values() for line in lines)]
    widths = [max(map(len, column)) for column in zip(*cells)]
    cells.insert(1, ["-" * width for width in widths])
    table = ["| " + " | ".join(c.ljust(w) for c, w in zip(line, widths)) + " |" for line in cells]
    return "\n".join([f"# {title}", "", *table, "", *(f"- {note}" for note in notes), ""])


def command() -> str:
    """This one, as a reader types it: without the place of the project on this machine."""
    return shlex.join(["python", "experiments/compare.py", *sys.argv[1:]])


def explain(rows: list[dict], runs: list[Run], left_out: list[str], cfg: Config) -> list[str]:
    """What a reader must know to read the table, in words."""
    flags, made = runs[0].flags, runs[0].made
    per_step = flags["batch_size"] * flags["block_size"]
    defaults = asdict(train.Config(lr_decay_iters=flags["max_iters"]))
    rates = sorted({r.flags["learning_rate"] for r in runs})
    hidden = NEUTRAL | VARIED - ({"learning_rate", "min_lr"} if len(rates) == 1 else set())
    other = [f"--{k}={flags[k]}" for k in flags if k not in hidden and flags[k] != defaults[k]]
    commits = sorted({str(r.made.get("git_commit")) for r in runs})
    tested = sum(row["p_holm"] is not None for row in rows)
    notes = [
        (True, f"{flags['max_iters']} steps x {per_step:,} tokens = {flags['max_iters'] * per_step:,} "
         f"tokens a run. Flags besides defaults: `{' '.join(other) or 'none'}`"),
        (True, f"Run on {made.get('device')} with torch {made.get('torch')}, commit "
         f"{', '.join(commits)}."),
        (True, "val loss: nats per token at the last step (no better checkpoint is picked), mean ± "
         "standard deviation over n seeds. FLOPs are of all FFNs' matrix products, forward: executed, "
         "and `active`, what an ideal implementation that skips zeros would need. units: the share "
         "of hidden units that is not zero (asg: of its sparse pathway), by the last evaluation."),
        (True, "tokens/s: median over a run's log, ratio to SwiGLU's run of the same seed. Runs side by "
         "side, or anything else on the machine, disturb it; bench.py times with care."),
        (tested,
         "difference: to SwiGLU, paired by seed: same tokens, same shared initial weights; below "
         "0 is better. 95% confidence interval and p by a two-sided paired t-test; p is "
         f"Holm-corrected over the {tested} tested rows, the interval is not. Verdict: corrected "
         "p < 0.05. `no difference shown` does not mean that there is none."),
        (tested, f"seeds for {cfg.detect:g}: how many a true difference of {cfg.detect:g} nats would "
         "need, at this row's measured noise, to be found with power 0.8 (paired t-test at 5%, "
         "uncorrected). From few seeds the noise is itself a rough guess."),
        (any(row["paper"] for row in rows),
         'paper: what the paper by "Aardvark" (2025) that proposes or tabulates the FFN reports, '
         "minus its SwiGLU (4.927; Dynamic GEGLU's 4.9266), on FineWeb at its own scale, without "
         "a test. asg:sparse=False is stated there to equal SwiGLU."),
        (any(row["match"] == "params" for row in rows),
         "(params): as wide as makes the FFN's parameters match SwiGLU's; compared with the same "
         "SwiGLU runs. An FFN whose matching width is ffn_hidden itself has one row."),
        (len(rates) > 1,
         f"Learning rates {', '.join(f'{rate:g}' for rate in rates)} were tried for every row, "
         "min_lr in proportion; each row shows its best by mean val loss. Picking on the same "
         "losses flatters all rows a little."),
        (left_out, "Not finished, left out: " + ", ".join(left_out)),
        (not cfg.report, f"Command: `{command()}`"),
        (cfg.jobs > 1, f"{cfg.jobs} runs side by side."),
    ]  # fmt: skip
    return [text for applies, text in notes if applies]


# ---- the plot ---------------------------------------------------------------------------------

# readable in black and white: each colour has its own marker
STYLES = [("#000000", "o"), ("#d55e00", "s"), ("#0072b2", "^"), ("#009e73", "D"),
          ("#cc79a7", "v"), ("#7f6000", "P"), ("#56b4e9", "X"), ("#555555", "*")]  # fmt: skip


def curve(group: list[Run], minus: list[Run] | None = None):
    """(tokens, losses (seeds, points)) at the evaluations that all seeds share; minus the losses of
    other runs, seed by seed."""
    curves = [{row["tokens"]: row["val_loss"] for row in r.val} for r in group]
    if minus is not None:
        other = {r.seeds: {row["tokens"]: row["val_loss"] for row in r.val} for r in minus}
        both = [(c, other[r.seeds]) for c, r in zip(curves, group) if r.seeds in other]
        curves = [{t: c[t] - o[t] for t in c if t in o} for c, o in both]
    tokens = sorted(set.intersection(*map(set, curves)))
    return np.array(tokens), np.array([[c[t] for t in tokens] for c in curves])


def draw_curve(ax, tokens, losses, style: int = 0, label: str | None = None) -> None:
    """The mean over seeds, and a band from the lowest to the highest."""
    from matplotlib.ticker import EngFormatter

    color, marker = STYLES[style]
    ax.plot(tokens, losses.mean(0), color=color, marker=marker, markersize=4,
            markevery=(0.02 * style, 0.15), linewidth=1.3, label=label)  # fmt: skip
    ax.fill_between(tokens, losses.min(0), losses.max(0), color=color, alpha=0.2, linewidth=0)
    ax.xaxis.set_major_formatter(EngFormatter(sep=""))


def plot_losses(ax, rows: list[dict], groups: list[list[Run]]) -> None:
    """Loss against tokens, of at most 8 rows: the first and the best. Without the first quarter of the
    runs: a cliff that would flatten all the rest."""
    if len(groups) == len(groups[0]) == 1:
        shown = [row for row in groups[0][0].rows if "train_loss" in row]
        shown = shown[len(shown) // 4 :]
        ax.plot([row["tokens"] for row in shown], [row["train_loss"] for row in shown],
                color="#999999", linewidth=0.9, label="training batch")  # fmt: skip
    best = sorted(range(1, len(rows)), key=lambda i: rows[i]["val_loss"])
    for style, i in enumerate([0, *best][: len(STYLES)]):
        tokens, losses = curve(groups[i])
        late = tokens >= tokens[-1] / 4
        draw_curve(ax, tokens[late], losses[:, late], style, label(rows[i]))
    best_of = f" (best of {len(rows)})" if len(rows) > len(STYLES) else ""
    ax.set_title(f"Validation loss{best_of} after a quarter of the run\n(band: lowest to highest seed)")
    ax.set_xlabel("training tokens")
    ax.set_ylabel("nats per token")
    ax.legend()


def view_limit(rows: list[dict]) -> float:
    """How far the axis of differences goes: over all intervals, unless a few would flatten the
    others."""
    ends = [max(abs(row[k] or row["difference"]) for k in ("low", "high")) for row in rows]
    return min(1.1 * max(ends), 3 * median_high(ends)) or 1e-4


def plot_differences(ax, rows: list[dict]) -> None:
    """A row each: final difference to SwiGLU and its interval; filled where there is a verdict."""
    limit = view_limit(rows)
    ax.axvline(0, color="black", linewidth=0.8)
    for y, row in enumerate(rows):
        x, high = row["difference"], row["high"]
        fill = "black" if row["verdict"] in ("better", "worse") else "white"
        ax.errorbar(x, y, xerr=None if high is None else high - x, fmt="ok", markerfacecolor=fill)
        if abs(x) > limit:
            ax.plot(math.copysign(limit, x), y, ">k" if x > 0 else "<k", clip_on=False)
    ax.set_xlim(-limit, limit)
    ax.set_yticks(range(len(rows)), [label(row) for row in rows])
    ax.set_title("Final loss minus SwiGLU's, 95% CI\n(filled: better or worse, Holm p < 0.05)")
    ax.set_xlabel("nats per token: better < 0 < worse")


def plot_cost(ax, rows: list[dict], base: dict) -> None:
    """A row each: FLOPs and measured time of training on a token, over SwiGLU's."""
    flops = [row["train_flops_per_token"] / base["train_flops_per_token"] for row in rows]
    time = [1 / row["speed_vs_swiglu"] if row["speed_vs_swiglu"] else math.nan for row in rows]
    y = np.arange(len(rows))
    ax.axvline(1, color="black", linewidth=0.8)
    ax.plot(flops, y - 0.16, "sk")
    ax.plot(time, y + 0.16, "ok", markerfacecolor="white")
    ax.set_yticks(y, [f"{signed(row['difference'])}  n={row['pairs']}" for row in rows])
    ax.set_title("Cost of training on a token\n(square: FLOPs, circle: measured time)")
    ax.set_xlabel("over SwiGLU's")


def plot(rows: list[dict], groups: list[list[Run]], path: str, title: str) -> list[str]:
    """Draw path.png, and path_curves.png where one panel cannot hold all rows. Returns both names."""
    import matplotlib
    from matplotlib.figure import Figure

    matplotlib.rcParams.update({"font.size": 8.5, "axes.grid": True, "grid.alpha": 0.3})
    matplotlib.rcParams["text.parse_math"] = False  # a folder's name may hold $
    compared = sorted((row for row in rows if row["pairs"]), key=lambda row: row["difference"])
    height = max(4.4, 1.9 + 0.27 * len(compared))
    widths = [5, 4.5, 3] if compared else [5]
    figure = Figure(figsize=(15 if compared else 7, height), layout="constrained")
    axes = figure.subplots(1, len(widths), squeeze=False, width_ratios=widths)[0]
    plot_losses(axes[0], rows, groups)
    if compared:
        plot_differences(axes[1], compared)
        plot_cost(axes[2], compared, rows[0])
        for ax in axes[1:]:
            ax.set_ylim(len(compared) - 0.4, -0.6)  # the best on top
    figure.suptitle(title)
    figure.savefig(f"{path}.png", dpi=120)
    if not compared or len(rows) <= len(STYLES):
        return [f"{path}.png"]

    # one small panel each: the difference to SwiGLU along the run
    lines = math.ceil(len(compared) / 4)
    figure = Figure(figsize=(14, 0.8 + 2.1 * lines), layout="constrained")
    axes = figure.subplots(lines, 4, sharex=True, sharey=True)
    for ax, row in zip(axes.flat, compared):
        draw_curve(ax, *curve(groups[rows.index(row)], minus=groups[0]))
        ax.axhline(0, color="black", linewidth=0.8, linestyle="--")
        ax.set_title(label(row))
    limit = view_limit(compared)
    axes[0, 0].set_ylim(-limit, limit)
    for ax in axes.flat[len(compared) :]:
        ax.axis("off")
    figure.supxlabel("training tokens")
    figure.supylabel("loss minus SwiGLU's, nats per token")
    figure.suptitle(f"{title}: along the run; band: lowest to highest seed")
    figure.savefig(f"{path}_curves.png", dpi=110)
    return [f"{path}.png", f"{path}_curves.png"]


# ---- all of it --------------------------------------------------------------------------------


def publish(runs: list[Run], cfg: Config, folder: str, left_out: list[str]) -> None:
    """Write compare.md, compare.json and compare.png into folder, and print the table."""
    rows, groups = summarize(runs, cfg.detect)
    title = cfg.name or cfg.paper or os.path.basename(os.path.abspath(folder))
    notes = explain(rows, runs, left_out, cfg)
    text, path = markdown(rows, notes, title, cfg.detect), os.path.join(folder, "compare")
    flags = {k: v for k, v in runs[0].flags.items() if k not in NEUTRAL | VARIED}
    record = {"title": title, "command": command(), "detect": cfg.detect, "rows": rows,
              "notes": notes, "flags": flags, "made": runs[0].made}  # fmt: skip
    try:
        os.makedirs(folder, exist_ok=True)
        with open(f"{path}.md", "w", encoding="utf-8") as f:
            f.write(text)
        with open(f"{path}.json", "w", encoding="utf-8") as f:
            json.dump(record, f, indent=1, allow_nan=False)
        images = plot(rows, groups, path, title)
    except OSError as e:
        raise UserError(f"cannot write to {folder} ({e.strerror}): name another with --out") from None
    print(text)
    print("wrote", ", ".join([f"{path}.md", f"{path}.json", *images]))


def split(argv: list[str]) -> tuple[list[str], list[str], list[str] | None]:
    """argv -> flags of this program, arguments of train.py, folders after --report (or None)."""
    own = Config.__dataclass_fields__
    known = own | train.Config.__dataclass_fields__
    mine, passed, folders, rest = [], [], None, list(argv)
    while rest:
        arg = rest.pop(0)
        name, equals, value = arg[2:].partition("=")
        if not arg.startswith("-"):
            (passed if folders is None else folders).append(arg)
        elif name not in known:
            raise UserError(f"unknown flag {arg!r}: {suggest(name, known)}")
        elif name == "report":
            folders = [*(folders or []), *([value] if equals else [])]
            mine.append("--report=yes")
        elif name in own:
            mine.append(arg)
            if not equals:
                mine += rest[:1]
                rest = rest[1:]
        else:
            passed.append(arg)
    return mine, passed, folders


def main() -> None:
    if {"--help", "-h"} & set(sys.argv):
        configure(Config, ["--help"])
    mine, passed, folders = split(sys.argv[1:])
    cfg, _ = configure(Config, mine)
    for package in ("matplotlib", "scipy", "tqdm"):  # now, and not after hours of runs
        if not importlib.util.find_spec(package):
            raise UserError(f"{package} is missing: pip install -r requirements-dev.txt")
    for name in ("seeds", "jobs", "detect"):
        if getattr(cfg, name) <= 0:
            raise UserError(f"--{name}={getattr(cfg, name)} must be above 0")

    failed = 0
    if folders is not None:
        if passed or not folders:
            raise UserError(f"--report takes folders of runs and runs nothing: {passed or 'no folder'}")
        runs = find_runs(folders)
        above_all = os.path.commonpath([os.path.abspath(r.dir) for r in runs] or [os.getcwd()])
        folder = cfg.out or os.path.relpath(above_all)
    else:
        base, given = configure(train.Config, passed)
        if set_here := {"seed", "data_seed"} & given:
            raise UserError(f"--{min(set_here)} is set by compare.py, run by run: use --seeds=N")
        if base.eval_only:
            raise UserError("--eval_only trains nothing: leave it out, or use --report")
        train.check_flags(base, max(1, len(gpus(base)) // cfg.jobs))
        planned = plan(cfg, base)
        failed = run_all(planned, passed, cfg, base)
        runs = [r for r in map(read_run, (p.dir for p in planned)) if r]
        folder = cfg.out or os.path.dirname(planned[0].dir)
    done, left_out = [r for r in runs if r.done], [r for r in runs if not r.done]
    for r in left_out:
        print(f"left out: {r.dir} is at step {r.step} of {r.flags['max_iters']}")
    if not done:
        raise UserError("no finished run: " + ("see above" if runs or failed else "name their folders"))
    check_alike(runs)
    publish(done, cfg, folder, [r.dir for r in left_out])
    if failed:
        sys.exit(f"error: {failed} runs failed, see above and their train.txt")


if __name__ == "__main__":
    run(main)
