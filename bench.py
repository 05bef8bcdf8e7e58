"""
Time FFNs, the decoding of one token, and whole training steps.

    python bench.py                                        # forward and backward of every FFN
    python bench.py --mode=decode --ffn=swiglu,sparseglu,spark      # on a CPU
    python bench.py --mode=step --n_layer=32 --n_head=8 --n_embd=512 --ffn_hidden=2048

All contenders of a run take turns, in reverse order every other round, so that a slow spell hits all.
Each round has new inputs, because other tokens choose other units and experts. Before each call the
caches are overwritten, as other layers would do. A time is the median over the rounds, a ratio the
median of the rounds' own ratios, and `spread` half the distance between their quartiles. Compare ratios
only within a run. FLOPs are those of a token's forward pass, in mode step those of its training.
"""

from __future__ import annotations

import functools
import gc
import itertools
import json
import math
import os
import re
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn

import train
from configurator import UserError, configure, run, user_error
from model import FFNS, GPT, GPTConfig, MoE, compile_errors, compiled, ffn_cost, has, influences
from model import is_matrix, make_ffn, set_up, split_aux

progress = functools.partial(print, file=sys.stderr, flush=True)  # so that stdout has the table alone
SWEEP = 2**26  # float32 numbers: 256 MiB, more than most caches, are written before each timed call


@dataclass
class Config:
    mode: Literal["ffn", "decode", "step"] = "ffn"  # what is timed
    ffn: str = ""  # specs, comma-separated; empty: every FFN (mode step: swiglu)
    n_layer: int = 0  # mode step: layers; 0: 6. Mode decode: FFNs in a row, timed together; 0: 3
    n_head: int = 6  # attention heads
    n_kv_head: int = 0  # key-value heads; 0: n_head
    n_embd: int = 0  # width of the model; 0: 384 (mode ffn: 768, mode decode: 1536)
    block_size: int = 256  # tokens per sequence
    ffn_hidden: int = 0  # hidden width of the FFN; 0: 1024 (mode ffn: 2048, mode decode: 8960)
    ffn_match: Literal["hidden", "params", "flops"] = "hidden"  # keep ffn_hidden, or match SwiGLU's cost
    vocab_size: int = 50304  # token ids
    micro_batch_size: int = 8  # mode step: sequences per step
    tokens: int = 4096  # mode ffn: tokens per call (as config/tiny.py), in sequences of block_size
    optimizer: Literal["adamw", "muon"] = "adamw"  # muon for the matrices inside layers
    recompute: bool = False  # if compiled: compute elementwise results again, which saves memory
    residual: Literal["float32", "bfloat16"] = "float32"  # residual stream, where dtype is bfloat16
    profile: bool = False  # mode step: also print which operators take the most time
    rounds: int = 15  # timed calls of each contender
    device: str = "auto"  # auto, cpu, cuda, cuda:1
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"  # auto: bfloat16 on cuda, else float32
    compile: bool = True  # torch.compile
    seed: int = 0  # of weights and inputs
    json: str = ""  # write the rows to this file


# ---- Mode ffn: forward and backward of one layer, beside its matrix products alone -------------


def bench_ffn(cfg: Config, specs: list[str], device: torch.device, dtype: torch.dtype) -> list[dict]:
    n, T = cfg.tokens, min(cfg.block_size, cfg.tokens)
    if n % T:
        raise UserError(f"--tokens={n} is not a multiple of --block_size={T}")
    x = torch.randn(n // T, T, cfg.n_embd).to(device, dtype).requires_grad_()
    dy = torch.randn(n // T, T, cfg.n_embd).to(device, dtype)
    calls, layers, peaks, flops, forward = {}, {}, {}, {}, {}
    for spec in dict.fromkeys([*specs, "swiglu"]):  # swiglu is the yardstick, whether it is shown or not
        progress(f"preparing {spec}")
        layer = layers[spec] = make_ffn(spec, cfg.n_embd, hidden(cfg, spec)).to(device)
        ready = prepared(layer, cfg, device, dtype)
        leaves = [x, *(p for p in layer.parameters() if p.requires_grad)]

        def both(ready=ready, leaves=leaves):
            y, aux = split_aux(ready(x))
            outputs = [y] if aux is None or not aux.requires_grad else [y, aux]
            return torch.autograd.grad(outputs, leaves, [dy, None][: len(outputs)], allow_unused=True)

        calls[spec, "forward"] = functools.partial(ready, x)
        calls[spec, "both"] = both
        calls[spec, "matmul"], flops[spec], forward[spec] = products(layer, n, cfg, device, dtype)
        both()  # compiles
        peaks[spec] = peak_memory(both, device)
    times = measure(calls, cfg.rounds, device, x)
    rows, yardstick = [], times["swiglu", "both"]
    for spec in specs:
        both, matmul, cost = times[spec, "both"], times[spec, "matmul"], ffn_cost(layers[spec])
        known = math.isclose(forward[spec], n * cost["flops"], rel_tol=0.1)  # all its products found
        executed = flops[spec] if known else 3 * n * cost["flops"]
        rows.append({
            "ffn": spec, "hidden": hidden(cfg, spec), **cost,
            "forward_ms": 1e3 * median(times[spec, "forward"]), "both_ms": 1e3 * median(both),
            "tok_per_s": n / median(both), "tflops": executed / median(both) / 1e12,
            "matmul_ms": 1e3 * median(matmul) if known else None,
            "matmul_fraction": ratio(matmul, both) if known else None,
            "over_swiglu": ratio(both, yardstick), "spread": spread(both, yardstick),
            "peak_mib": peaks[spec] / 2**20,
        })  # fmt: skip
    return rows


def products(
    layer: nn.Module, n: int, cfg: Config, device: torch.device, dtype: torch.dtype
) -> tuple[Callable, int, int]:
    """Return a function that multiplies n tokens with each of the layer's matrices as a Linear does,
    forward and backward, its FLOPs, and those of the forward products. A frozen matrix has only these;
    the matrices of an expert multiply only the tokens that reach it."""
    # Compiled, a CPU with AVX-512 uses another library. On a GPU compiling would only add launches.
    multiply = prepared(products_of_one, cfg, device) if device.type == "cpu" else products_of_one
    routed = [m for m in layer.modules() if isinstance(m, MoE)]
    tokens = {p: n * m.k // len(m.experts) for m in routed for p in m.experts.parameters()}
    modules = [m for _, m in layer.named_modules(remove_duplicate=False)]
    modules = [m for m in modules if not isinstance(m, (nn.Embedding, nn.EmbeddingBag))]  # looked up
    matrices = [(m, p) for m in modules for p in m.parameters(recurse=False) if is_matrix(p)]
    work, flops, forward = [], 0, 0

    def call() -> None:
        for one in work:
            multiply(*one)

    # Matrices of one shape share operands: separate ones would take 28 GB at train.py's defaults.
    operand = functools.cache(lambda *shape: torch.randn(shape).to(device, dtype))
    for module, p in matrices:
        w, rows = p.detach().to(dtype), tokens.get(p, n)
        w = w.flatten(1) if isinstance(module, nn.Conv1d) else w
        if w.ndim > 2:  # only the class knows what this multiplies
            return call, 0, 0
        dy = operand(rows, w.size(0)) if p.requires_grad else None
        work.append((operand(rows, w.size(1)), w, dy))
        forward += 2 * rows * w.numel()
        flops += 2 * rows * w.numel() * (3 if p.requires_grad else 1)
    return call, flops, forward


def products_of_one(x: Tensor, w: Tensor, dy: Tensor | None) -> tuple[Tensor, ...]:
    """x: (n, fan_in), w: (fan_out, fan_in), dy: (n, fan_out) -> y, dx and dw, this in w's layout."""
    y = x @ w.t()
    if dy is None:
        return (y,)
    return y, dy @ w, dy.t() @ x if w.is_contiguous() else x.t() @ dy


# ---- Mode decode: one token, for which a sparse FFN reads few of its weights -----------------------


@torch.no_grad()
def bench_decode(cfg: Config, specs: list[str], device: torch.device, dtype: torch.dtype) -> list[dict]:
    if device.type != "cpu":
        raise UserError("--mode=decode is for a CPU, as a GPU decodes by forward: use --device=cpu")
    x = torch.randn(1, 1, cfg.n_embd).to(device, dtype)
    calls, layers = {}, {}
    for spec in dict.fromkeys([*specs, "swiglu"]):
        progress(f"preparing {spec}")
        ffns = (make_ffn(spec, cfg.n_embd, hidden(cfg, spec)) for _ in range(cfg.n_layer))
        stack = nn.ModuleList(ffns).to(device).eval()
        if influences(stack[0], torch.empty(1, 2, cfg.n_embd, device=device))[1]:
            raise UserError(f"{spec} mixes tokens, one alone does not decode: leave it out of --ffn")
        for layer in stack.train() if list(stack.buffers()) else ():  # running thresholds settle
            for _ in range(100):
                layer(torch.randn(1, 32, cfg.n_embd))
        stack.eval()
        for name, part in stack.named_modules():
            if isinstance(part, nn.Linear) and "predictor" not in name:
                part.to(dtype)  # norms, scalars and predictors work in float32, as in training
        layers[spec] = stack[0]

        def token(x: Tensor, stack=stack) -> Tensor:
            for layer in stack:
                x = x + split_aux((layer.decode if has(layer, "decode") else layer)(x))[0]
            return x

        calls[spec] = functools.partial(prepared(token, cfg, device, dtype), x)
        calls[spec]()
    times = measure(calls, cfg.rounds, device, x)
    rows, yardstick, dense = [], times["swiglu"], ffn_cost(layers["swiglu"])["ideal_flops"]
    for spec in specs:
        cost, seconds = ffn_cost(layers[spec]), median(times[spec]) / cfg.n_layer
        # Each weight that is read is one multiplication and one addition. A predictor's are float32.
        wide = sum(p.numel() for p in layers[spec].parameters() if p.ndim >= 2 and p.dtype != dtype)
        path = "decode" if has(layers[spec], "decode") else "forward"
        flops = cost["ideal_flops" if path == "decode" else "flops"]
        read = flops // 2 * dtype.itemsize + wide * (4 - dtype.itemsize)
        rows.append({
            "ffn": spec, "path": path, "hidden": hidden(cfg, spec), **cost,
            "ms": 1e3 * seconds, "read_mib": read / 2**20, "gb_per_s": read / seconds / 1e9,
            "speedup": ratio(yardstick, times[spec]), "spread": spread(yardstick, times[spec]),
            "ideal_speedup": dense / flops if flops else None,
        })  # fmt: skip
    return rows


# ---- Mode step: a training step by train.py's own functions ------------------------------------


def bench_step(cfg: Config, specs: list[str], device: torch.device, dtype: torch.dtype) -> list[dict]:
    n = cfg.micro_batch_size * cfg.block_size
    peak = train.peak_flops(device) if dtype == torch.bfloat16 else None
    calls, models, peaks, attention, known = {}, {}, {}, {}, {}
    for spec in specs:
        progress(f"preparing {spec}")
        model = models[spec] = GPT(same_names(GPTConfig, cfg, ffn=spec)).to(device)
        step, optimizers = make_step(model, same_names(train.Config, cfg), device, dtype)
        step()  # compiles, and makes the optimizers' states
        peaks[spec] = peak_memory(step, device) + at_rest(model, optimizers)
        attention[spec] = profile(step, cfg.profile, device)
        calls[spec, "step"] = step
        calls[spec, "matmul"], known[spec], _ = products(model, n, cfg, device, dtype)
    rows, times = [], measure(calls, cfg.rounds, device)
    for spec in specs:
        step, matmul = times[spec, "step"], times[spec, "matmul"]
        seconds, flops = median(step), models[spec].flops_per_token()
        rows.append({
            "ffn": spec, "hidden": hidden(cfg, spec),
            "params": models[spec].param_counts()["total"], "flops": flops,
            "ms": 1e3 * seconds, "tok_per_s": n / seconds, "tflops": flops * n / seconds / 1e12,
            "mfu": flops * n / seconds / peak if peak else None,
            "matmul_ms": 1e3 * median(matmul) if known[spec] else None,
            "matmul_fraction": ratio(matmul, step) if known[spec] else None,
            "spread": spread(matmul, step), "peak_mib": peaks[spec] / 2**20,
            "attention": attention[spec],
        })  # fmt: skip
    return rows


def make_step(
    model: GPT, flags: train.Config, device: torch.device, dtype: torch.dtype, passes: int = 1
) -> tuple[Callable[[], object], list[torch.optim.Optimizer]]:
    """Return a function and the optimizers that it uses. It does one training step of `model` by
    train.py's train_step, in `passes` passes over new random tokens. Its first call compiles."""
    check_clock(device)
    size = (flags.micro_batch_size, flags.block_size + 1)
    cast = functools.partial(torch.autocast, device.type, dtype, enabled=dtype != torch.float32)
    optimizers, failed = train.make_optimizers(model, flags), torch.zeros((), device=device)
    ready = compiled(model, device, recompute=flags.recompute) if flags.compile else model
    rng = torch.Generator(device).manual_seed(flags.seed)  # train_step sets the seed of PyTorch's own
    draw = functools.partial(torch.randint, model.config.vocab_size, size, generator=rng, device=device)
    step = functools.partial(train.train_step, ready, optimizers)
    return (lambda: step([draw() for _ in range(passes)], flags, 0, failed, cast)), optimizers


def at_rest(model: nn.Module, optimizers: list[torch.optim.Optimizer]) -> int:
    """Bytes of parameters and of the optimizers' states between two steps."""
    states = [v for o in optimizers for state in o.state.values() for v in state.values()]
    return sum(t.nbytes for t in [*model.parameters(), *states] if isinstance(t, Tensor))


def profile(step: Callable, show: bool, device: torch.device) -> str:
    """Run a step under the profiler and return the name of the attention kernel that ran. With
    `show`, print the operators that take the most time."""
    with torch.profiler.profile() as p:
        step()
    operators = p.key_averages()
    if show:
        key = "self_device_time_total" if device.type == "cuda" else "self_cpu_time_total"
        print(operators.table(sort_by=key, row_limit=24, max_name_column_width=80))
    names = " ".join(operator.key for operator in operators)
    return " ".join(sorted(set(re.findall(r"aten::_scaled_dot_product_(\w+?)_attention", names))))


# ---- The clock and the scales ------------------------------------------------------------------


def measure(calls: dict, rounds: int, device: torch.device, x: Tensor | None = None) -> dict:
    """Seconds of each call in each round, after two untimed calls of each. x is new in each round."""
    sweep = torch.empty(SWEEP, device=device)
    for call in calls.values():
        call(), call()
    times = {name: [] for name in calls}
    gc.collect()
    gc.disable()
    for i in range(rounds):
        if x is not None:
            x.detach().normal_()
        for name in list(calls)[:: -1 if i % 2 else 1]:
            for _ in range(1 if device.type == "cpu" else 32):  # a GPU is busy while its call is queued
                sweep.zero_()
            times[name].append(timed(calls[name], device))
    gc.enable()
    return times


def timed(call: Callable, device: torch.device) -> float:
    """Seconds of one call, on a GPU by the GPU's own clock."""
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
    """The median over the rounds of a / b."""
    return median(x / y for x, y in zip(a, b))


def spread(a: list[float], b: list[float]) -> float:
    """Half the distance between the quartiles of the rounds' a / b: the noise of `ratio`."""
    return float(np.ptp(np.percentile([x / y for x, y in zip(a, b)], (25, 75)))) / 2


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
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # it would print notes about itself
    with torch.profiler.profile(profile_memory=True) as p:
        call()
    events = [event for event in p.profiler.kineto_results.events() if event.name() == "[memory]"]
    events.sort(key=lambda event: event.start_ns())
    return max(itertools.accumulate(event.nbytes() for event in events), default=0)


# ---- Small helpers, the table, the flags -------------------------------------------------------


def same_names(cls: type, cfg: object, **more: object):
    """cls, which is train.Config or GPTConfig, with the values of the flags that have the same names."""
    return cls(**{k: v for k, v in vars(cfg).items() if hasattr(cls, k)} | more)


def hidden(cfg: Config, spec: str) -> int:
    """The hidden width of a spec's FFN after --ffn_match."""
    return same_names(GPTConfig, cfg, ffn=spec).hidden


def prepared(f: Callable, cfg: Config, device, dtype=torch.float32) -> Callable:
    """f compiled, if --compile, and under autocast to dtype, if that is not float32."""
    f = compiled(f, device) if cfg.compile else f
    return f if dtype == torch.float32 else torch.autocast(device.type, dtype)(f)


def table(rows: list[dict]) -> str:
    """The rows as a text table, below a line of column names."""

    def text(value: object) -> str:
        if isinstance(value, float):
            return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
        return f"{value:,d}" if isinstance(value, int) else "n/a" if value is None else value

    lines = [list(rows[0]), *([text(value) for value in row.values()] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*lines)]
    return "\n".join("  ".join(map(str.rjust, line, widths)) for line in lines)


def report(cfg: Config, device: torch.device, dtype: torch.dtype, rows: list[dict]) -> None:
    """Print the rows below what they depend on: flags, device and versions. Write it all to --json."""
    result = {**vars(cfg), "device": f"CPU, {torch.get_num_threads()} threads", "dtype": str(dtype)[6:]}
    if device.type == "cuda":
        result["device"] = torch.cuda.get_device_name(device)
    result |= {"torch": torch.__version__, "cudnn": torch.backends.cudnn.version()}
    print(", ".join(f"{k} {v}" for k, v in result.items() if v not in ("", None)))
    print(table(rows))
    if cfg.json:
        with user_error(f"cannot write --json={cfg.json}", "name another file", OSError):
            Path(cfg.json).write_text(json.dumps({**result, "rows": rows}, indent=1) + "\n")


def check_clock(device: torch.device) -> None:
    """Raise UserError for a device whose work cannot be timed."""
    if device.type == "mps":
        raise UserError("--device=mps cannot be timed: use --device=cpu")


def pick_device(cfg: Config) -> tuple[torch.device, torch.dtype]:
    """The device, made the current one, and the dtype of the matrix products. Raises UserError."""
    name = "cpu" if cfg.device == "auto" and not torch.cuda.is_available() else cfg.device
    device = train.pick_device(name, 0)
    check_clock(device)
    return device, torch.bfloat16 if train.use_bfloat16(cfg.dtype, device) else torch.float32


MODES = {  # mode -> its function, and n_embd, ffn_hidden and n_layer where they are 0
    "ffn": (bench_ffn, 768, 2048, 1),
    "decode": (bench_decode, 1536, 8960, 3),
    "step": (bench_step, 384, 1024, 6),
}


def main() -> None:
    cfg, _ = configure(Config, sys.argv[1:])
    bench, *sizes = MODES[cfg.mode]
    for name, size in zip(("n_embd", "ffn_hidden", "n_layer", "n_kv_head"), (*sizes, cfg.n_head)):
        setattr(cfg, name, getattr(cfg, name) or size)
    for name, value in vars(cfg).items():
        if type(value) is int and value < (0 if name == "seed" else 1):
            raise UserError(f"--{name}={value} is too small")
    if cfg.profile and cfg.mode != "step":
        raise UserError("--profile is for --mode=step")
    if cfg.json and (Path(cfg.json).is_dir() or not Path(cfg.json).resolve().parent.is_dir()):
        raise UserError(f"--json={cfg.json} cannot be written: give a file in a folder that exists")
    specs = cfg.ffn.split(",") if cfg.ffn else ["swiglu"] if cfg.mode == "step" else list(FFNS)
    for spec in specs:
        train.check_flags(same_names(train.Config, cfg, ffn=spec, batch_size=cfg.micro_batch_size), 1)
    device, dtype = pick_device(cfg)
    set_up(device)
    torch._dynamo.config.recompile_limit = 64  # specs of one class share its code
    torch.manual_seed(cfg.seed)
    with compile_errors():
        rows = bench(cfg, specs, device, dtype)
    report(cfg, device, dtype, rows)


if __name__ == "__main__":
    run(main)
