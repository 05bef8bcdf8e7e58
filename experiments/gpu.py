"""
The parts of gpu.sh that are Python. It calls each by its name. This one is useful by hand too:

    python experiments/gpu.py report RESULTS     # write RESULTS/report.md from RESULTS/results.jsonl
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import sysconfig
from pathlib import Path
from statistics import median

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

# ---- Ceilings: what the card does at best, and where the default step's time may go ----------------


def facts(name: str, path: str) -> None:
    """Time the kernels that the default model's step is made of, and write the rows to `path`."""
    import torch
    import torch.nn.functional as F
    from torch.nn.attention import SDPBackend, sdpa_kernel

    import bench
    import model

    device = torch.device(name)
    cuda = device.type == "cuda"
    N, d, h, V, big = (32768, 512, 2048, 50304, 8192) if cuda else (64, 32, 64, 384, 64)
    bf16 = {"device": device, "dtype": torch.bfloat16}
    rows = []

    def note(what: str, call, flops: int = 0, size: int = 0) -> None:
        ms = 1e3 * median(bench.measure({"call": call}, 9 if cuda else 1, device)["call"])
        rows.append({"what": what, "ms": ms, "tflops": flops / ms / 1e9 if flops else None})
        rows[-1]["tb_per_s"] = size / ms / 1e9 if size else None

    a = torch.randn(big * big * 8, **bf16)
    note("copy", lambda: a.clone(), size=4 * a.numel())
    x, w = torch.randn(2, big, big, **bf16)
    note(f"product of {big}^3", lambda: x @ w, 2 * big**3)
    shapes = {"q, k, v or o": (d, d), "q, k and v in one": (d, 3 * d), "gate or up": (d, h)}
    shapes |= {"gate and up in one": (d, 2 * h), "down": (h, d), "lm_head of N/8 tokens": (d, V)}
    for what, (i, o) in shapes.items():
        n = N // 8 if o == V else N
        x, w, dy = torch.randn(n, i, **bf16), torch.randn(o, i, **bf16), torch.randn(n, o, **bf16)
        note(f"{what}: forward", lambda x=x, w=w: x @ w.t(), 2 * n * i * o)
        note(f"{what}: dx", lambda dy=dy, w=w: dy @ w, 2 * n * i * o)
        note(f"{what}: dw", lambda dy=dy, x=x: dy.t() @ x, 2 * n * i * o)

    B, T = (16, 2048) if cuda else (2, 32)
    q, k, v = torch.randn(3, B, T, 8, 64, **bf16).transpose(2, 3).requires_grad_().unbind(0)
    do = torch.randn(B, 8, T, 64, **bf16)
    flops = 2 * 2 * B * 8 * T * T * 64 // 2
    kernels = ["flash_attention", "cudnn_attention", "efficient_attention"] if cuda else []
    for kernel in ["default", *kernels]:

        def attend(kernel=kernel):
            if kernel == "default":
                return F.scaled_dot_product_attention(q, k, v, is_causal=True)
            with sdpa_kernel(getattr(SDPBackend, kernel.upper())):
                return F.scaled_dot_product_attention(q, k, v, is_causal=True)

        def both(attend=attend):
            return torch.autograd.grad(attend(), (q, k, v), do)

        try:
            note(f"{kernel}: forward", attend, flops)
            note(f"{kernel}: both", both, 7 * flops // 2)
        except RuntimeError as e:
            print(f"{kernel}: {str(e)[:200]}")
    node = F.scaled_dot_product_attention(q, k, v, is_causal=True).grad_fn

    score, units = torch.randn(N, h, device=device), torch.tensor(h // 4, device=device)
    options = {"dynamic": False, "backend": "inductor" if cuda else "aot_eager"}
    counting = torch.compile(model.at_least_kth, **options)
    over_mean = torch.compile(lambda score, z: score > model.over_mean(score, z), **options)
    note("topk and scatter", lambda: model.top_k_mask(score, h // 4))
    note("topk by counting, compiled", lambda: counting(score, units))
    note("mask over mean + z std, compiled", lambda: over_mean(score, 0.67))
    x, w = (torch.randn(n, d, **bf16).requires_grad_() for n in (N, V))
    y = torch.randint(V, (N,), device=device)
    ours = torch.compile(model.linear_cross_entropy, **options)
    plain = torch.compile(lambda x, w, y: F.cross_entropy((x @ w.t()).float(), y), **options)
    for loss, call in {"our loss": ours, "plain loss": plain}.items():
        gradients = lambda call=call: torch.autograd.grad(call(x, w, y), (x, w))  # noqa: E731
        note(f"{loss}: both", gradients, 6 * N * d * V)

    found = {"device": torch.cuda.get_device_name() if cuda else "cpu", "torch": torch.__version__}
    found |= {"cuda": torch.version.cuda, "cudnn": torch.backends.cudnn.version()}
    found["attention"] = type(node).__name__
    print(", ".join(f"{key} {value}" for key, value in found.items()))
    print(bench.table(rows))
    Path(path).write_text(json.dumps({**found, "rows": rows}))


# ---- Checks: are the numbers right on this device ---------------------------------------------------


def checks(name: str) -> None:
    """Hold every FFN compiled against eager by outputs and gradients, and bfloat16 against float32; then
    two layers of a model. Print the relative differences; fail if one is more than rounding."""
    import copy

    import torch

    from model import FFNS, GPT, GPTConfig, make_ffn

    cuda = name == "cuda"
    d, h, B, T = (512, 2048, 8, 2048) if cuda else (64, 128, 2, 64)  # some kernels need many rows
    options = {"dynamic": False, "backend": "inductor" if cuda else "aot_eager"}
    specs = [*FFNS, "sparseglu:select=stat", "sparseglu:grad=gate"]
    specs += ["asg:grad=ste", "sparsegated:grad=ste"]
    bad = []

    def difference(a, b) -> float:
        return float(((a - b).norm() / b.norm()).detach())

    def outputs(layer, options, x, dy) -> list:
        layer = copy.deepcopy(layer)  # whose buffers the pass before has not moved
        y = (torch.compile(layer, **options) if options else layer)(x)
        leaves = [x, *(p for p in layer.parameters() if p.requires_grad)]
        return [y, *torch.autograd.grad(y, leaves, dy.to(y.dtype))]

    for spec in specs if cuda else ["swiglu", "sparseglu", "moe"]:
        torch.manual_seed(0)
        torch._dynamo.reset()
        layer = make_ffn(spec, d, h).to(name)
        x, dy = torch.randn(2, B, T, d, device=name)
        x.requires_grad_()
        eager, compiled = outputs(layer, None, x, dy), outputs(layer, options, x, dy)
        worst = {"compiled": max(map(difference, compiled, eager))}
        with torch.autocast(name, torch.bfloat16):
            worst["bfloat16"] = difference(layer(x), eager[0])
        print(spec, {k: f"{v:.1e}" for k, v in worst.items()})
        # Rounding may swap two units at the edge of a top-k; a wrong formula is off by far more.
        bad += [(spec, k, v) for k, v in worst.items() if not v < (0.1 if k == "bfloat16" else 1e-2)]
    for spec, residual in ("dsg", "float32"), ("dsg", "bfloat16"), ("moe", "float32"):
        torch._dynamo.reset()
        model = GPT(GPTConfig(T, 512, 2, 2, 1, d, spec, h, residual=residual)).to(name)
        idx = torch.randint(512, (B, T), device=name)
        gradients, start = [], copy.deepcopy(model.state_dict())
        for call in (model, torch.compile(model, **options)):
            for bf16 in (False, True):
                model.load_state_dict(start)
                with torch.autocast(name, torch.bfloat16, enabled=bf16):
                    loss = call(idx, idx)[1]
                gradients.append(torch.autograd.grad(loss, list(model.parameters())))
        worst = {
            "compiled": max(map(difference, gradients[2], gradients[0])),
            "compiled, bfloat16": max(map(difference, gradients[3], gradients[1])),
        }
        print(f"{spec}, 2 layers, residual {residual}", {k: f"{v:.1e}" for k, v in worst.items()})
        bad += [(spec, k, v) for k, v in worst.items() if not v < (0.1 if "bf" in k else 1e-2)]
    if bad:
        sys.exit(f"error: off by more than rounding: {bad}")


def shards(folder: str) -> None:
    """Write shards of the bytes of Python's own library, without tiktoken or a network."""
    import numpy as np

    files = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    text = np.frombuffer(b"\0".join(f.read_bytes() for f in files), np.uint8).astype("<u2")
    text = np.tile(text, 1 + 9_000_000 // len(text))
    Path(folder).mkdir(exist_ok=True)
    meta = {"encoding": "bytes", "vocab_size": 257, "complete": True, "shards": []}
    for name, tokens in ("bytes_val_000000", text[:600_000]), ("bytes_train_000001", text[600_000:]):
        header = np.zeros(256, "<i4")
        header[:3] = 20240520, 1, len(tokens)
        Path(folder, f"{name}.bin").write_bytes(header.tobytes() + tokens.tobytes())
        meta["shards"].append({"name": f"{name}.bin", "tokens": len(tokens)})
    Path(folder, "meta.json").write_text(json.dumps(meta))


def resume(work: str, *flags: str) -> None:
    """Train 20 steps straight, and 10 that are resumed for 10 more. Fail if the validation losses at the
    end differ by over 0.1%: on a GPU the sums of a step may be added up in another order."""
    runs = {"straight": ["--max_iters=20"], "begun": ["--max_iters=10"], "resumed": ["--max_iters=20"]}
    losses = {}
    for name, more in runs.items():
        folder = f"{work}/{'straight' if name == 'straight' else 'resumed'}"
        more += [f"--out_dir={folder}", f"--init_from={'resume' if name == 'resumed' else 'scratch'}"]
        if subprocess.run([sys.executable, "train.py", *flags, *more]).returncode:
            sys.exit(f"error: the run {name} failed")
        losses[name] = run_row(folder)["val_loss"]
    if abs(losses["straight"] - losses["resumed"]) > 1e-3 * losses["straight"]:
        sys.exit(f"error: the resumed run ends elsewhere: {losses}")


# ---- What was found -----------------------------------------------------------------------------------


def run_row(folder: str) -> dict:
    """The last validation loss of a run, and the median of its speeds after the first steps."""
    log = [json.loads(line) for line in Path(folder, "log.jsonl").read_text().splitlines()]
    speeds = [row["tok_per_s"] for row in log if row.get("tok_per_s")]
    return {"val_loss": [row["val_loss"] for row in log if "val_loss" in row][-1],
            "tok_per_s": median(speeds[1:] or speeds)}  # fmt: skip


def record(results: str, name: str, code: str, seconds: str, work: str, *command: str) -> None:
    """Add a line to results.jsonl: how a step of gpu.sh ended, and the rows that it measured."""
    line = {"name": name, "ok": code == "0", "seconds": int(seconds), "command": " ".join(command)}
    folders = [arg.partition("=")[2] for arg in command if arg.startswith("--out_dir=")]
    measured = Path(work, "json")
    if not line["ok"]:
        said = Path(work, "err").read_text().split("\n")
        line |= {"exit": int(code), "error": next((s for s in reversed(said) if s.strip()), "")[:300]}
    elif measured.exists():
        line |= json.loads(measured.read_text())
    elif folders:
        line["rows"] = [run_row(folders[-1])]
    print(f"({seconds} s)" if line["ok"] else f"FAILED after {seconds} s, exit code {code}")
    path = Path(results, "results.jsonl")
    before = path.read_text() if path.exists() else ""
    with open(path, "a") as f:  # the script may have been cut within the line before
        f.write("\n" * (before[-1:] not in ("", "\n")) + json.dumps(line) + "\n")
        os.fsync(f.fileno())


def report(results: str) -> None:
    """Write report.md: a table of all rows that have the same columns, and what failed."""
    import bench

    found, tables, device = {}, {}, {}
    for line in Path(results, "results.jsonl").read_text().splitlines():
        try:
            one = json.loads(line)
        except ValueError:  # cut while it was written
            continue
        found[one["name"]] = one
    for name, one in found.items():
        device = device or {k: one[k] for k in ("device", "torch", "cudnn") if k in one}
        for row in one.get("rows", []):
            tables.setdefault(tuple(row), []).append({"step": name, **row})
    text = "# " + ", ".join(f"{k} {v}" for k, v in device.items()) + "\n\n"
    for rows in tables.values():
        text += f"```text\n{bench.table(rows)}\n```\n\n"
    for name, one in found.items():
        text += f"- {name}: " + (f"{one['seconds']} s\n" if one["ok"] else f"failed: {one['error']}\n")
    Path(results, "report.md").write_text(text)


if __name__ == "__main__":
    steps = {f.__name__: f for f in (facts, checks, shards, resume, record, report)}
    steps[sys.argv[1]](*sys.argv[2:])
