"""
Time FFNs, decoding, whole training steps and the loader. Compare ratios: each is of one run.

    python bench.py                                    # forward and backward of every FFN
    python bench.py --mode=decode --ffn=swiglu,sparseglu,spark
    python bench.py --mode=step --n_layer=32 --n_head=8 --n_embd=512 --ffn_hidden=2048

Contenders take turns, one call each a round, in reverse order every other round, so that all of them
share the machine's moods; before each call the caches are swept, as another layer's weights would
in a model. Times are medians over the rounds; ratios are medians of the rounds' own ratios. FLOPs are
of the forward pass; in mode step of forward and backward.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import itertools
import json
import os
import re
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

import prepare_fineweb
import train
from configurator import UserError, configure, run
from model import FFNS, GPT, GPTConfig, compiled, ffn_cost, has, has_onednn, make_ffn, parse_spec, set_up


@dataclass
class Config:
    mode: str = "ffn"  # ffn, decode, step or data
    ffn: str = ""  # specs, comma-separated; empty: every FFN (step: swiglu)
    d: int = 0  # width of the model; 0: 768 (decode: 1536)
    h: int = 0  # hidden width of the FFN; 0: 2048 (decode: 8960)
    tokens: int = 1024  # per call in mode ffn
    n_layer: int = 6  # mode step: layers
    n_head: int = 6  # attention heads
    n_kv_head: int = 0  # key-value heads; 0: n_head
    n_embd: int = 384  # width
    ffn_hidden: int = 1024  # hidden width of the FFN
    block_size: int = 256  # tokens per sequence
    micro_batch_size: int = 8  # sequences per step
    vocab_size: int = 50304  # token ids
    tie_embeddings: bool = True  # lm_head shares the embedding's weight
    optimizer: str = "adamw"  # adamw or muon
    recompute: bool = False  # as in train.py
    residual: str = "float32"  # as in train.py
    profile: str = ""  # mode step: write a torch.profiler trace into this folder
    rounds: int = 15  # timed calls of each contender
    device: str = "auto"  # cpu, cuda, cuda:1; auto: cuda if there is one
    dtype: str = "auto"  # float32 or bfloat16; auto: bfloat16 on cuda, else float32
    compile: bool = True  # torch.compile
    layers: int = 3  # mode decode: as many of each in a row, compiled as one; times are per layer
    seed: int = 0  # of weights and inputs
    json: str = ""  # write the rows to this file
    plot: str = ""  # mode ffn: draw measured and ideal cost over SwiGLU's to this .png


# ------------------------------------------------------------------------------------------------
# Mode ffn: forward and backward of one layer against its matrix products alone


def bench_ffn(cfg: Config, specs: list[str], device: torch.device, dtype: torch.dtype) -> dict:
    d, h, n = cfg.d or 768, cfg.h or 2048, cfg.tokens
    x = torch.randn(n, d).to(device, dtype).requires_grad_()
    dy = torch.randn(n, d).to(device, dtype)
    calls, layers, peaks, flops = {}, {}, {}, {}
    for spec in dict.fromkeys([*specs, "swiglu"]):  # swiglu is the yardstick, shown or not
        say(f"preparing {spec}")
        layer = layers[spec] = make_ffn(spec, d, h).to(device)
        forward = autocast(maybe_compile(layer, cfg, device), device, dtype)
        leaves = [x, *(p for p in layer.parameters() if p.requires_grad)]

        def backward(forward=forward, leaves=leaves):
            return torch.autograd.grad(forward(x), leaves, dy, allow_unused=True)

        calls[spec, "forward"] = functools.partial(forward, x)
        calls[spec, "both"] = backward
        calls[spec, "products"], flops[spec] = products(layer, n, cfg, device, dtype)
        backward()  # compiles
        peaks[spec] = peak_memory(backward, device)
    times = measure(calls, cfg.rounds, device)

    rows = []
    for spec in specs:
        cost, both = ffn_cost(layers[spec]), times[spec, "both"]
        seconds = statistics.median(both)
        rows.append({
            "ffn": spec,
            **cost,
            "forward_ms": 1e3 * statistics.median(times[spec, "forward"]),
            "both_ms": 1e3 * seconds,
            "products_ms": 1e3 * statistics.median(times[spec, "products"]),
            "tok_per_s": n / seconds,
            "tflops": flops[spec] / seconds / 1e12,
            "share": ratio(times[spec, "products"], both),
            "ratio": ratio(both, times["swiglu", "both"]),
            "spread": spread(both, times["swiglu", "both"]),
            "peak_mib": peaks[spec] / 2**20,
        })  # fmt: skip
    return {"d": d, "h": h, "tokens": n, "rows": rows}


def products(
    layer: nn.Module, n: int, cfg: Config, device: torch.device, dtype: torch.dtype
) -> tuple[Callable, int]:
    """The products of n tokens with each of the layer's matrices, forward and backward, by the layer's
    kernels and in the matrix's layout, and their FLOPs; of a frozen matrix the forward one alone."""
    # Where compiled products are another library's. Elsewhere it would add launches and nothing else.
    three = maybe_compile(products_of_one, cfg, device) if has_onednn(device) else products_of_one
    multiplied = {m.weight for m in layer.modules() if isinstance(m, nn.Linear)}
    looked_up = {m.weight for m in layer.modules() if isinstance(m, nn.Embedding)} - multiplied
    work, flops = [], 0
    # Matrices share their operands by width: one each would take 28 GB at train.py's default shape.
    operand = functools.cache(lambda size: torch.randn(n, size).to(device, dtype))
    for p in layer.parameters():
        if p.ndim >= 2 and p not in looked_up:
            w = p.detach().to(dtype).flatten(0, -2)
            work.append((operand(w.size(1)), w, operand(w.size(0)) if p.requires_grad else None))
            flops += 2 * n * w.numel() * (3 if p.requires_grad else 1)

    def call() -> None:
        for one in work:
            three(*one)

    return call, flops


def products_of_one(x: Tensor, w: Tensor, dy: Tensor | None) -> tuple[Tensor, ...]:
    """x: (n, fan_in), w: (fan_out, fan_in), dy: (n, fan_out) -> y, dx and dw, this in w's layout."""
    y = x @ w.t()
    if dy is None:
        return (y,)
    return y, dy @ w, dy.t() @ x if w.is_contiguous() else x.t() @ dy


# ------------------------------------------------------------------------------------------------
# Mode decode: one token, reading the weights of the selected neurons only


@torch.no_grad()
def bench_decode(cfg: Config, specs: list[str], device: torch.device, dtype: torch.dtype) -> dict:
    d, h = cfg.d or 1536, cfg.h or 8960
    x = torch.randn(1, d).to(device, dtype)
    # Where the number of selected neurons varies, it is a dynamic shape inside one graph.
    torch._dynamo.config.capture_dynamic_output_shape_ops = True
    # Kernels of microseconds need CUDA graphs to be seen behind the time of their launches.
    mode = "reduce-overhead" if device.type == "cuda" else "default"
    calls, layers = {}, {}
    for spec in dict.fromkeys([*specs, "swiglu"]):
        say(f"preparing {spec}")
        stack = nn.ModuleList(make_ffn(spec, d, h) for _ in range(cfg.layers)).to(device).eval()
        for name, part in stack.named_modules():
            if isinstance(part, nn.Linear) and "predictor" not in name:
                part.to(dtype)  # norms, scalars and predictors work in float32, as when training
        layers[spec] = stack[0]

        def token(x: Tensor, stack=stack) -> Tensor:
            for layer in stack:
                x = x + (layer.decode if has(layer, "decode") else layer)(x)
            return x

        one = autocast(maybe_compile(token, cfg, device, mode), device, dtype)
        calls[spec] = functools.partial(one, x)
        calls[spec]()
    times = measure(calls, cfg.rounds, device)

    rows, dense = [], ffn_cost(layers["swiglu"])["ideal_flops"]
    for spec in specs:
        cost, seconds = ffn_cost(layers[spec]), statistics.median(times[spec]) / cfg.layers
        # A weight is one multiply and one add. A predictor's are of float32.
        wide = sum(p.numel() for p in layers[spec].parameters() if p.ndim >= 2 and p.dtype != dtype)
        read = cost["ideal_flops"] // 2 * dtype.itemsize + wide * (4 - dtype.itemsize)
        rows.append({
            "ffn": spec,
            **cost,
            "path": "decode" if has(layers[spec], "decode") else "forward",
            "ms": 1e3 * seconds,
            "read_mib": read / 2**20,
            "gb_per_s": read / seconds / 1e9,
            "speedup": ratio(times["swiglu"], times[spec]),
            "spread": spread(times["swiglu"], times[spec]),
            "ideal": dense / cost["ideal_flops"],
        })  # fmt: skip
    return {"d": d, "h": h, "tokens": 1, "layers": cfg.layers, "rows": rows}


# ------------------------------------------------------------------------------------------------
# Mode step: what train.py does once per step, by its own functions


def bench_step(cfg: Config, specs: list[str], device: torch.device, dtype: torch.dtype) -> dict:
    shape = {k: getattr(cfg, k) for k in SHAPE} | {"n_kv_head": cfg.n_kv_head or cfg.n_head}
    n = cfg.micro_batch_size * cfg.block_size
    peak = train.peak_flops(device) if dtype == torch.bfloat16 else None
    own = ("block_size", "micro_batch_size", "optimizer", "compile", "recompute")
    flags = train.Config(batch_size=cfg.micro_batch_size, **{k: getattr(cfg, k) for k in own})
    train.check_flags(flags, world=1)
    calls, models, peaks = {}, {}, {}
    for spec in specs:
        say(f"preparing {spec}")
        model = models[spec] = GPT(GPTConfig(ffn=spec, seed=cfg.seed, **shape)).to(device)
        calls[spec, "step"], optimizers = make_step(model, flags, device, dtype)
        calls[spec, "products"], _ = products(model, n, cfg, device, dtype)
        calls[spec, "step"]()  # the first one makes the optimizer's state
        peaks[spec] = peak_memory(calls[spec, "step"], device) + at_rest(model, optimizers)
        if cfg.profile:
            profile(calls[spec, "step"], Path(cfg.profile), spec, device)
    times = measure(calls, cfg.rounds, device)

    rows = []
    for spec in specs:
        seconds, flops = statistics.median(times[spec, "step"]), models[spec].flops_per_token()
        rows.append({
            "ffn": spec,
            "params": models[spec].param_counts()["total"],
            "flops": flops,
            "ms": 1e3 * seconds,
            "products_ms": 1e3 * statistics.median(times[spec, "products"]),
            "tok_per_s": n / seconds,
            "tflops": flops * n / seconds / 1e12,
            "mfu": flops * n / seconds / peak if peak else None,
            "over_products": ratio(times[spec, "step"], times[spec, "products"]),
            "spread": spread(times[spec, "step"], times[spec, "products"]),
            "peak_mib": peaks[spec] / 2**20,
        })  # fmt: skip
    return {**shape, "micro_batch_size": cfg.micro_batch_size, "rows": rows}


SHAPE = "n_layer n_head n_embd ffn_hidden block_size vocab_size tie_embeddings residual".split()


def make_step(
    model: GPT, flags: train.Config, device: torch.device, dtype: torch.dtype
) -> tuple[Callable[[], object], list[torch.optim.Optimizer]]:
    """One whole training step of `model` on random tokens (forward, backward, clip, update), and the
    optimizers whose states it fills."""
    size = (flags.micro_batch_size, flags.block_size + 1)
    batch = torch.randint(model.config.vocab_size, size).to(device)
    cast = functools.partial(torch.autocast, device.type, dtype, enabled=dtype != torch.float32)
    optimizers = train.make_optimizers(model, flags)
    with contextlib.redirect_stdout(sys.stderr):  # what it says is not part of the table
        ready = train.compile_and_check(model, optimizers, flags, cast)
    failed = torch.zeros((), device=device)
    step = functools.partial(train.train_step, ready, optimizers, [batch], flags, 0, failed, cast)
    return step, optimizers


def at_rest(model: nn.Module, optimizers: list[torch.optim.Optimizer]) -> int:
    """Bytes of parameters and of the optimizers' states between two steps."""
    states = (state for optimizer in optimizers for state in optimizer.state.values())
    kept = [t for state in states for t in state.values() if isinstance(t, Tensor)]
    return sum(t.nbytes for t in [*model.parameters(), *kept])


def profile(step: Callable, folder: Path, spec: str, device: torch.device) -> None:
    """Write a trace (open it in ui.perfetto.dev) and print the ten most expensive operators."""
    folder.mkdir(parents=True, exist_ok=True)
    with torch.profiler.profile() as p:
        step()
    name = folder / (re.sub(r"[^\w.=-]+", "_", spec) + ".json")
    p.export_chrome_trace(str(name))
    key = "self_device_time_total" if device.type == "cuda" else "self_cpu_time_total"
    print(f"{spec}: {name}", p.key_averages().table(sort_by=key, row_limit=20), sep="\n")


# ------------------------------------------------------------------------------------------------
# Mode data: the loader against the step of config/smoke.py


def bench_data(cfg: Config, specs: list[str], device: torch.device, dtype: torch.dtype) -> dict:
    flags, _ = configure(train.Config, [str(Path(__file__).with_name("config") / "smoke.py")])
    B, T = flags.batch_size, flags.block_size
    generator = np.random.default_rng(cfg.seed)
    with tempfile.TemporaryDirectory() as folder:
        for name in ("val_000000", "train_000001", "train_000002"):
            tokens = generator.integers(256, size=4_000_000, dtype=np.uint16)
            header = np.zeros(256, "<i4")
            header[:3] = prepare_fineweb.MAGIC, prepare_fineweb.VERSION, len(tokens)
            Path(folder, f"bytes_{name}.bin").write_bytes(header.tobytes() + tokens.tobytes())
        data = prepare_fineweb.open_data(folder, T)
        counts, step = prepare_fineweb.window_counts(data.train, T), itertools.count()

        def load() -> Tensor:
            samples = np.arange(B) + B * next(step)
            places = prepare_fineweb.locate(counts, samples, flags.data_seed)
            return torch.from_numpy(prepare_fineweb.read_windows(data.train, places, T, data.n_vocab))

        model = GPT(train.model_config(vars(flags), vocab_size=384)).to(device)
        calls = {"load": load, "step": make_step(model, flags, device, dtype)[0]}
        times = measure(calls, cfg.rounds, device)
    seconds = statistics.median(times["load"])
    row = {
        "what": f"a batch of {B} x {T}",
        "ms": 1e3 * seconds,
        "tok_per_s": B * T / seconds,
        "step_ms": 1e3 * statistics.median(times["step"]),
        "of_step": ratio(times["load"], times["step"]),
        "spread": spread(times["load"], times["step"]),
    }
    return {"config": "config/smoke.py", "compile": flags.compile, "rows": [row]}


# ------------------------------------------------------------------------------------------------
# The clock and the scales


def measure(calls: dict, rounds: int, device: torch.device) -> dict[object, list[float]]:
    """Seconds of each call in each round, after two untimed calls of each."""
    sweep = torch.empty(2**26, device=device)  # 256 MiB, more than most caches
    for call in calls.values():
        call(), call()
    times = {name: [] for name in calls}
    gc.collect()
    gc.disable()
    for i in range(rounds):
        for name in list(calls)[:: -1 if i % 2 else 1]:
            sweep.zero_()
            times[name].append(timed(calls[name], device))
    gc.enable()
    return times


def timed(call: Callable, device: torch.device) -> float:
    if device.type != "cuda":
        start = time.perf_counter()
        call()
        return time.perf_counter() - start
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    call()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) / 1e3


def ratio(a: list[float], b: list[float]) -> float:
    return statistics.median(x / y for x, y in zip(a, b))


def spread(a: list[float], b: list[float]) -> float:
    """Half the distance between the quartiles of the rounds' ratios: the noise of `ratio`."""
    if len(a) < 2:
        return 0.0
    low, _, high = statistics.quantiles((x / y for x, y in zip(a, b)), n=4, method="inclusive")
    return (high - low) / 2


def peak_memory(call: Callable, device: torch.device) -> int:
    """Bytes of tensors alive at the worst moment of the call, beyond those alive before it."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    # The CPU's allocator keeps no statistics, but the profiler logs each of its calls.
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # not its notes about itself
    with torch.profiler.profile(profile_memory=True) as profile:
        call()
    with tempfile.TemporaryDirectory() as folder:
        profile.export_chrome_trace(f"{folder}/trace.json")
        events = json.loads(Path(folder, "trace.json").read_text())["traceEvents"]
    alive = peak = 0
    for event in events:
        if event["name"] == "[memory]":
            alive += event["args"]["Bytes"]
            peak = max(peak, alive)
    return peak


# ------------------------------------------------------------------------------------------------
# Small helpers, tables, files


def maybe_compile(f: Callable, cfg: Config, device: torch.device, mode: str = "default") -> Callable:
    return compiled(f, device, mode) if cfg.compile else f


def autocast(f: Callable, device: torch.device, dtype: torch.dtype) -> Callable:
    return f if dtype == torch.float32 else torch.autocast(device.type, dtype)(f)


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


COLUMNS = {  # key of a row -> heading, format
    "what": ("what", "s"),
    "ffn": ("ffn", "s"),
    "path": ("path", "s"),
    "params": ("params", ",d"),
    "flops": ("FLOPs/token", ",d"),
    "ideal_flops": ("active", ",d"),
    "forward_ms": ("fwd ms", ".2f"),
    "both_ms": ("fwd+bwd ms", ".2f"),
    "ms": ("ms", ".3f"),
    "read_mib": ("read MiB", ".1f"),
    "gb_per_s": ("GB/s", ".1f"),
    "tok_per_s": ("tokens/s", ",.0f"),
    "tflops": ("TFLOP/s", ".3f"),
    "mfu": ("MFU", ".1%"),
    "products_ms": ("products ms", ".2f"),
    "over_products": ("x products", ".3f"),
    "step_ms": ("step ms", ".2f"),
    "of_step": ("of step", ".2%"),
    "ours_faster": ("ours faster", ".2f"),
    "share": ("share of ceiling", ".3f"),
    "ratio": ("x swiglu", ".3f"),
    "speedup": ("speedup", ".2f"),
    "spread": ("+-", ".3f"),
    "ideal": ("ideal", ".2f"),
    "peak_mib": ("peak MiB", ",.1f"),
}


def table(rows: list[dict]) -> str:
    keys = [key for key in COLUMNS if any(key in row for row in rows)]
    lines = [[COLUMNS[key][0] for key in keys]]
    for row in rows:
        lines.append(["n/a" if row[k] is None else format(row[k], COLUMNS[k][1]) for k in keys])
    widths = [max(map(len, column)) for column in zip(*lines)]
    text = []
    for first, *rest in lines:
        cells = [first.ljust(widths[0]), *(c.rjust(w) for c, w in zip(rest, widths[1:]))]
        text.append("  ".join(cells))
    return "\n".join([text[0], "-" * len(text[0]), *text[1:]])


def report(result: dict, path: str) -> None:
    """Print the table below what it was measured with; the same as JSON, if there is a path."""
    print(", ".join(f"{k} {v}" for k, v in result.items() if k != "rows"))
    print(table(result["rows"]))
    if path:
        Path(path).write_text(json.dumps(result, indent=1) + "\n")


def plot(result: dict, path: str) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = sorted(result["rows"], key=lambda row: row["ratio"])
    dense = ffn_cost(make_ffn("swiglu", result["d"], result["h"]))["flops"]
    fig, ax = plt.subplots(figsize=(7, 0.6 + 0.34 * len(rows)), layout="constrained")
    ax.barh([row["ffn"] for row in rows], [row["ratio"] for row in rows], color="0.75")
    for key, marker, label in (("flops", "|", "FLOPs, forward"), ("ideal_flops", "x", "ideal")):
        ax.scatter([row[key] / dense for row in rows], range(len(rows)),
                   marker=marker, s=60, color="k", label=label, zorder=3)  # fmt: skip
    ax.axvline(1, color="k", lw=0.6)
    where = f"{result['d']} x {result['h']}, {result['device']}, {result['dtype']}"
    ax.set_xlabel(f"over SwiGLU's; bar: time of forward and backward ({where})")
    ax.legend(frameon=False)
    fig.savefig(path, dpi=150)


def pick_device(cfg: Config) -> tuple[torch.device, torch.dtype, str]:
    """The device, the dtype of the products, the device's name. Raises UserError."""
    name = cfg.device
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if not re.fullmatch(r"cpu|cuda(:\d+)?", name):
        raise UserError(f"--device is auto, cpu or cuda, not {name!r}")
    if name != "cpu" and int(name[5:] or 0) >= torch.cuda.device_count():
        raise UserError(f"--device={name}, but this machine or build of torch has no such GPU")
    device = torch.device(name if name == "cpu" else f"cuda:{name[5:] or 0}")
    dtypes = {"float32": torch.float32, "bfloat16": torch.bfloat16}
    wanted = cfg.dtype
    if wanted == "auto":
        wanted = "bfloat16" if device.type == "cuda" else "float32"
    if wanted not in dtypes:
        raise UserError(f"--dtype is auto, float32 or bfloat16, not {wanted!r}")
    if device.type == "cuda":
        torch.cuda.set_device(device)
        return device, dtypes[wanted], torch.cuda.get_device_name(device)
    return device, dtypes[wanted], f"CPU, {torch.get_num_threads()} threads"


MODES = {"ffn": bench_ffn, "decode": bench_decode, "step": bench_step, "data": bench_data}


def main() -> None:
    cfg, _ = configure(Config, sys.argv[1:])
    if cfg.mode not in MODES:
        raise UserError(f"--mode is {', '.join(MODES)}, not {cfg.mode!r}")
    for name, value in vars(cfg).items():
        least = 0 if name in ("d", "h", "n_kv_head", "seed") else 1
        if type(value) is int and value < least:
            raise UserError(f"--{name}={value} must be at least {least}")
    if cfg.profile and cfg.mode != "step":
        raise UserError("--profile traces --mode=step only")
    if cfg.plot and cfg.mode != "ffn":
        raise UserError("--plot draws the table of --mode=ffn only")
    specs = cfg.ffn.split(",") if cfg.ffn else ["swiglu"] if cfg.mode == "step" else list(FFNS)
    for spec in specs:
        parse_spec(spec)
    for path in filter(None, (cfg.json, cfg.plot)):
        if not Path(path).resolve().parent.is_dir():
            raise UserError(f"cannot write {path}: its folder does not exist")
        if Path(path).is_dir():
            raise UserError(f"cannot write {path}: it is a folder")
    if cfg.plot and Path(cfg.plot).suffix != ".png":
        raise UserError(f"--plot={cfg.plot} must end in .png")
    device, dtype, name = pick_device(cfg)
    set_up(device)
    torch._dynamo.config.recompile_limit = 64  # specs of one class share its code
    torch.manual_seed(cfg.seed)

    result = {"mode": cfg.mode, "device": name, "dtype": str(dtype)[6:], "torch": torch.__version__}
    result |= {"compile": cfg.compile, "rounds": cfg.rounds}
    result |= MODES[cfg.mode](cfg, specs, device, dtype)
    report(result, cfg.json)
    if cfg.plot:
        plot(result, cfg.plot)


if __name__ == "__main__":
    run(main)
