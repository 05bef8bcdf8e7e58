"""
The FFNs again, in float64 NumPy, one token at a time and from their formulas alone.

Nothing here comes from model.py, and nothing is shared between two variants but the scalar
functions: a mistake would have to be made twice to go unseen. `shapes` is the table of parameter
names and shapes, `buffers` that of what changes without a gradient, `ffn` the output for one token x
of shape (d,) in evaluation, `hidden` what enters down_proj, `training_pass` what a pass over tokens
X of shape (N, d) does where that differs.
"""

from __future__ import annotations

import math
from statistics import NormalDist

import numpy as np

Params = dict[str, np.ndarray]

# The options of each variant and their defaults.
DEFAULTS: dict[str, dict] = {
    "gelu": {},
    "relu2": {"slope": 0.0},
    "geglu": {},
    "swiglu": {},
    "isogmlp": {},
    "multiscale": {},
    "dualgated": {},
    "dsg": {"g": "neuron", "m": "norm"},
    "asg": {"threshold": "global", "tau": 0.1, "sparse": True, "grad": "hard"},
    "sparsegated": {"k": 0.15, "split": True, "gate": True, "grad": "hard", "select": "topk"},
    "dynamicgeglu": {"affine": True, "norm": "layer", "s": 0.1, "b": 0.0},
    "sparseglu": {"k": 0.25, "r": 32, "p": 64, "grad": "hard", "select": "topk", "ramp": 0},
    "spark": {"k": 0.08, "r": None},
    "moe": {"n": 8, "k": 1, "share": 0.5, "balance": "bias", "speed": 1e-3},
    "thresholdmoe": {"n": 8, "k": 1, "share": 0.5},
}


def sigmoid(z):
    return 1.0 / (1.0 + np.exp(-z))


def silu(z):
    return z * sigmoid(z)


def gelu(z):
    return 0.5 * z * (1.0 + np.vectorize(math.erf)(z / math.sqrt(2.0)))


def layer_norm(x, weight=None, bias=None, eps=1e-5):
    y = (x - x.mean()) / np.sqrt(((x - x.mean()) ** 2).mean() + eps)
    y = y if weight is None else y * weight
    return y if bias is None else y + bias


def top(scores: np.ndarray, k: float) -> np.ndarray:
    """The 0/1 mask of the round(k*h) largest scores (by value, the first of equal ones)."""
    mask = np.zeros_like(scores)
    mask[np.argsort(-scores, kind="stable")[: round(k * len(scores))]] = 1.0
    return mask


def stat_threshold(scores: np.ndarray, k: float) -> float:
    """The score that a share k of a normal distribution with these moments exceeds."""
    if k >= 1:
        return -math.inf
    return scores.mean() + scores.std(ddof=1) * NormalDist().inv_cdf(1.0 - k)


def options_of(name: str, options: dict) -> dict:
    """The defaults of a variant with the given options on top."""
    return {**DEFAULTS[name], **options}


def shapes(name: str, d: int, h: int, **options) -> dict[str, tuple[int, ...]]:
    """Parameter names and shapes of one variant."""
    o = options_of(name, options)
    out = {"up_proj.weight": (h, d), "down_proj.weight": (d, h)}
    if name in ("gelu", "relu2"):
        return out
    if name == "multiscale":
        table: dict[str, tuple[int, ...]] = {"scale": (3,)}
        for i, w in enumerate((h // 2, h // 4, h // 4)):
            table |= {f"branches.{i}.{k}": v for k, v in shapes("swiglu", d, w).items()}
        return table
    if name == "dualgated":
        pairs = (("silu", "swiglu"), ("gelu", "geglu"))
        return {f"{a}.{k}": v for a, b in pairs for k, v in shapes(b, d, h // 2).items()}
    if name == "sparsegated":
        table = {"key_proj.weight": (h, d), "down_proj.weight": (d, h)}
        if o["split"]:
            table["value_proj.weight"] = (h, d)
        if o["gate"]:
            table["res_gate.weight"] = (d, d)
            table |= {"res_norm.weight": (d,), "res_norm.bias": (d,)}
        return table
    if name == "spark":
        r = o["r"] or d // 2
        return out | {"gate_proj.weight": (h, r), "up_proj.weight": (h, d - r)}
    if name in ("moe", "thresholdmoe"):
        table = {"router.weight": (o["n"], d)}
        shared = round(o["share"] * h)
        widths = {f"experts.{e}.": (h - shared) // o["k"] for e in range(o["n"])}
        for prefix, width in {"shared.": shared, **widths}.items():
            if width:
                table |= {f"{prefix}{k}": v for k, v in shapes("relu2", d, width).items()}
        return table

    out["gate_proj.weight"] = (h, d)
    if name == "dsg":
        width = h if o["g"] == "neuron" else 1
        out |= {"sparse_gate.weight": (width, d), "sparse_gate.bias": (width,)}
        if o["m"] == "norm":
            out |= {"norm.weight": (d,), "norm.bias": (d,), "s": (), "b": ()}
    if name == "asg" and o["sparse"]:
        out["sparse_proj.weight"] = (h, d)
        learned = {"global": {"t": ()}, "neuron": {"t": (h,)}, "input": {"w": (d,), "b": ()}}
        out |= learned.get(o["threshold"], {})
    if name == "dynamicgeglu":
        out |= {"s": (), "b": ()}
        if o["affine"] and o["norm"] == "layer":
            out |= {"norm.weight": (d,), "norm.bias": (d,)}
    if name == "sparseglu":
        out |= {"predictor.0.weight": (o["p"], o["r"] or d), "predictor.0.bias": (o["p"],)}
        out |= {"predictor.2.weight": (h, o["p"]), "predictor.2.bias": (h,)}
    return out


def buffers(name: str, **options) -> dict[str, tuple[int, ...]]:
    """Buffer names and shapes of one variant."""
    o = options_of(name, options)
    if name == "moe":
        return {"bias": (o["n"],)}
    if name == "thresholdmoe":
        return {"cut": (o["n"],)}
    if name == "sparseglu" and o["ramp"]:
        return {"limit": ()}
    if name == "sparsegated" and o["select"] == "adaptive":
        return {"theta": ()}
    return {}


def draw(name: str, d: int, h: int, seed: int = 0, **options) -> Params:
    """Random parameters and buffers, none at its initial value (norm gains, s, b, t, scale too)."""
    rng = np.random.default_rng(seed)
    params = {}
    table = {**shapes(name, d, h, **options), **buffers(name, **options)}
    for key, shape in sorted(table.items()):
        value = rng.standard_normal(shape)
        if len(shape) == 2:
            value = value * 1.3 / math.sqrt(shape[1])
        elif key.endswith("norm.weight") or key == "scale":
            value = 1.0 + 0.4 * value
        elif key in ("s", "b"):
            value = 0.2 * value + {"s": 0.13, "b": -0.4}[key]
        elif key in ("w", "bias", "cut", "theta"):
            value = 0.2 * value
        elif key == "limit":  # 0.6 of the units: how many, or by which quantile
            topk = options_of(name, options)["select"] == "topk"
            value = round(0.6 * h) if topk else NormalDist().inv_cdf(1 - 0.6)
        params[key] = np.asarray(value, dtype=np.float64)
    return params


def within(prefix: str, p: Params) -> Params:
    """The parameters of one branch, by their names inside it."""
    return {name[len(prefix) :]: value for name, value in p.items() if name.startswith(prefix)}


def score(p: Params, x: np.ndarray, r: int) -> np.ndarray:
    """sparseglu's predictor on the first r inputs, on all of them for r = 0."""
    z = np.maximum(p["predictor.0.weight"] @ x[: r or len(x)] + p["predictor.0.bias"], 0.0)
    return p["predictor.2.weight"] @ z + p["predictor.2.bias"]


def sparsemax(z: np.ndarray) -> np.ndarray:
    """Martins and Astudillo (2016), algorithm 1."""
    falling = np.sort(z)[::-1]
    sums = np.cumsum(falling)
    size = max(j for j in range(1, len(z) + 1) if 1 + j * falling[j - 1] > sums[j - 1])
    return np.maximum(z - (sums[size - 1] - 1) / size, 0.0)


def ramped(step: int, ramp: int, k: float) -> float:
    """The share of units kept at a step: all of them at first, k from step `ramp` on. Zhu and Gupta
    (2017) let the sparsity grow from 0 to 1 - k as one minus the cube of what is left of the ramp."""
    left = max(0.0, 1 - step / ramp)
    return 1 - (1 - k) * (1 - left**3)


def selected(p: Params, x: np.ndarray, k: float, r: int, select: str) -> np.ndarray:
    """sparseglu's mask."""
    scores, k = score(p, x, r), 0.6 if "limit" in p else k
    if select == "topk":
        return top(scores, k)
    if select == "soft":
        return np.maximum(scores - stat_threshold(scores, k), 0.0)
    if select == "sparsemax":
        return round(k * len(scores)) * sparsemax(scores)
    return (scores > stat_threshold(scores, k)).astype(np.float64)


def hidden(name: str, p: Params, x: np.ndarray, /, **options) -> np.ndarray:
    """The vector (h,) that down_proj is applied to (not for multiscale and dualgated)."""
    o = options_of(name, options)
    if name == "gelu":
        return gelu(p["up_proj.weight"] @ x)
    if name == "relu2":
        z = p["up_proj.weight"] @ x
        return np.where(z > 0, z, o["slope"] * z) ** 2
    if name == "sparsegated":
        key = gelu(p["key_proj.weight"] @ x)
        key = key * (top(key, o["k"]) if o["select"] == "topk" else key > p["theta"])
        return key * (p["value_proj.weight"] @ x) if o["split"] else key
    if name == "spark":
        r = o["r"] or len(x) // 2
        z = p["gate_proj.weight"] @ x[:r]
        z = np.maximum(z - stat_threshold(z, o["k"]), 0.0)
        return gelu(z) * (p["up_proj.weight"] @ x[r:])

    gate, up = p["gate_proj.weight"] @ x, p["up_proj.weight"] @ x
    if name == "geglu":
        return gelu(gate) * up
    if name == "swiglu":
        return silu(gate) * up
    if name == "isogmlp":
        return sigmoid(gate) * up
    if name == "dsg":
        g = sigmoid(p["sparse_gate.weight"] @ x + p["sparse_gate.bias"])
        m = 1.0
        if o["m"] == "norm":
            normed = layer_norm(x, p["norm.weight"], p["norm.bias"])
            m = sigmoid(p["s"] * math.sqrt((normed**2).sum()) + p["b"])
        return silu(gate * g * m) * up
    if name == "asg":
        if not o["sparse"]:
            return silu(gate) * up
        z = p["sparse_proj.weight"] @ x
        if o["threshold"] == "input":
            tau = sigmoid(p["w"] @ x + p["b"])
        else:
            tau = o["tau"] if o["threshold"] == "fixed" else sigmoid(p["t"])
        return silu(gate) * up + z * (np.abs(z) > tau)
    if name == "dynamicgeglu":
        normed = x
        if o["norm"] == "layer":
            normed = layer_norm(x, p.get("norm.weight"), p.get("norm.bias"))
        alpha = sigmoid(p["s"] * math.sqrt((normed**2).sum()) + p["b"])
        return alpha * gelu(gate) * up
    if name == "sparseglu":
        mask = selected(p, x, o["k"], o["r"], o["select"])
        if o["grad"] == "gate":
            mask = mask * sigmoid(score(p, x, o["r"]))
        return silu(gate) * up * mask
    raise KeyError(name)


def ffn(name: str, p: Params, x: np.ndarray, /, **options) -> np.ndarray:
    """The output (d,) for one token x (d,)."""
    o = options_of(name, options)
    if name == "multiscale":
        part = [within(f"branches.{i}.", p) for i in range(3)]
        return sum(scale * ffn("swiglu", q, x) for scale, q in zip(p["scale"], part, strict=True))
    if name == "dualgated":
        return ffn("swiglu", within("silu.", p), x) + ffn("geglu", within("gelu.", p), x)
    if name in ("moe", "thresholdmoe"):
        s = p["router.weight"] @ x
        if name == "moe":
            used = np.argsort(-(sigmoid(s) + p["bias"]), kind="stable")[: o["k"]]
        else:
            used = np.flatnonzero(s > p["cut"])
        return mixture(p, x, used)
    out = p["down_proj.weight"] @ hidden(name, p, x, **options)
    if name == "sparsegated" and o["gate"]:
        g = sigmoid(layer_norm(p["res_gate.weight"] @ x, p["res_norm.weight"], p["res_norm.bias"]))
        return g * out + (1.0 - g) * x
    return out


def mixture(p: Params, x: np.ndarray, used) -> np.ndarray:
    """The shared expert and the used ones, each gated by twice the sigmoid of its score."""
    out = ffn("relu2", within("shared.", p), x) if "shared.up_proj.weight" in p else np.zeros_like(x)
    for e in used:
        gate = 2 * sigmoid(p["router.weight"][e] @ x)
        out = out + gate * ffn("relu2", within(f"experts.{e}.", p), x)
    return out


def training_pass(
    name: str, p: Params, X: np.ndarray, /, **options
) -> tuple[np.ndarray, Params, float | None]:
    """The outputs (N, d) for the tokens X (N, d) of a pass, the buffers after it, and aux."""
    o = options_of(name, options)
    if name == "sparsegated":  # the threshold moves after its use
        keys = gelu(X @ p["key_proj.weight"].T).flatten()
        target = keys.mean() + keys.std(ddof=1) * NormalDist().inv_cdf(1 - o["k"])
        outputs = np.stack([ffn(name, p, x, **options) for x in X])
        return outputs, {"theta": p["theta"] + 0.05 * (target - p["theta"])}, None
    scores = X @ p["router.weight"].T
    if name == "moe":
        best = np.argsort(-(sigmoid(scores) + p["bias"]), axis=1, kind="stable")[:, : o["k"]]
        count = np.bincount(best.flatten(), minlength=o["n"])
        outputs = np.stack([mixture(p, x, used) for x, used in zip(X, best, strict=True)])
        if o["balance"] == "bias":
            return outputs, {"bias": p["bias"] + o["speed"] * np.sign(count.mean() - count)}, None
        chance = np.exp(scores) / np.exp(scores).sum(1, keepdims=True)
        aux = 0.01 * o["n"] * (count / count.sum() * chance.mean(0)).sum()
        return outputs, {"bias": p["bias"]}, aux
    room = len(X) * o["k"] // o["n"]
    used, cut = [[] for _ in X], p["cut"].copy()
    for e in range(o["n"]):
        taken = np.argsort(-scores[:, e], kind="stable")[:room]
        for token in taken:
            if scores[token, e] > p["cut"][e]:
                used[token].append(e)
        if room:
            cut[e] += 0.05 * (scores[taken[-1], e] - cut[e])
    outputs = np.stack([mixture(p, x, u) for x, u in zip(X, used, strict=True)])
    return outputs, {"cut": cut}, None
