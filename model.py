"""
A Qwen3-style decoder whose feed-forward layer (FFN) is picked by a spec string.

In order: the FFNs, side by side, and the helpers they share; the lines that turn `sparseglu:k=0.5`
into one of them and say what it costs; the decoder around them; the loss. A new idea is a class
among the FFNs and a line in `FFNS`: training, bench, comparison and the generic tests pick it up.

Every FFN maps (..., d) -> (..., d) with hidden width h. Linear layers are bias-free unless noted,
GELU is the exact one (erf). Papers are the five by "Aardvark" (2025) where no other is named.
"""

from __future__ import annotations

import functools
import hashlib
import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass
from statistics import NormalDist
from typing import Literal, get_args, get_origin, get_type_hints

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from configurator import UserError, parse_value, suggest

# ------------------------------------------------------------------------------------------------
# Dense FFNs


class GELU(nn.Module):
    """down(GELU(up x)). GPT-2's FFN without biases, with the exact GELU; 2/3 of SwiGLU's parameters."""

    def __init__(self, d: int, h: int):
        super().__init__()
        self.up_proj = linear(d, h)
        self.down_proj = linear(h, d)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.gelu(self.up_proj(x)))


class ReLU2(nn.Module):
    """down(ReLU(up x)^2). Primer (arXiv 2109.08668)."""

    def __init__(self, d: int, h: int):
        super().__init__()
        self.up_proj = linear(d, h)
        self.down_proj = linear(h, d)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.relu(self.up_proj(x)).square())


class GEGLU(nn.Module):
    """down(GELU(gate x) * up x). GLU variants (arXiv 2002.05202)."""

    def __init__(self, d: int, h: int):
        super().__init__()
        self.gate_proj = linear(d, h)
        self.up_proj = linear(d, h)
        self.down_proj = linear(h, d)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.gelu(self.gate_proj(x)) * self.up_proj(x))


class SwiGLU(nn.Module):
    """down(SiLU(gate x) * up x). GLU variants (arXiv 2002.05202); Qwen3's own FFN, the baseline."""

    def __init__(self, d: int, h: int):
        super().__init__()
        self.gate_proj = linear(d, h)
        self.up_proj = linear(d, h)
        self.down_proj = linear(h, d)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class IsoGMLP(nn.Module):
    """down(sigmoid(gate x) * up x). Dynamic GEGLU names it and defines nothing: our reading."""

    def __init__(self, d: int, h: int):
        super().__init__()
        self.gate_proj = linear(d, h)
        self.up_proj = linear(d, h)
        self.down_proj = linear(h, d)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(torch.sigmoid(self.gate_proj(x)) * self.up_proj(x))


class MultiScale(nn.Module):
    """sum_i scale_i * branch_i(x), SwiGLUs of width h/2, h/4, h/4. ASG only names it: our reading."""

    def __init__(self, d: int, h: int):
        super().__init__()
        if h % 4:
            raise UserError(f"multiscale splits h into h/2, h/4, h/4: {h} is not a multiple of 4")
        self.branches = nn.ModuleList(SwiGLU(d, width) for width in (h // 2, h // 4, h // 4))
        self.scale = nn.Parameter(torch.ones(3))

    def forward(self, x: Tensor) -> Tensor:
        return sum(scale * branch(x) for scale, branch in zip(self.scale, self.branches))


class DualGated(nn.Module):
    """SwiGLU(x) + GEGLU(x), each of width h/2. ASG only names it: our reading."""

    def __init__(self, d: int, h: int):
        super().__init__()
        if h % 2:
            raise UserError(f"dualgated splits h into two halves: {h} is odd")
        self.silu = SwiGLU(d, h // 2)
        self.gelu = GEGLU(d, h // 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.silu(x) + self.gelu(x)


# ------------------------------------------------------------------------------------------------
# The five systems, and Spark


class DSG(nn.Module):
    """
    Dynamic Sparse Gating: down(SiLU(gate x * g * m) * up x).

    g = sigmoid(W_g x + b_g), per neuron or one per token; m = sigmoid(s * ||LN(x)||_2 + b), which
    the paper leaves undefined and we take from Dynamic GEGLU. Both gates are soft: nothing is
    skipped, so with g per neuron it costs 4/3 of SwiGLU.
    """

    def __init__(
        self,
        d: int,
        h: int,
        *,
        g: Literal["neuron", "token"] = "neuron",
        m: Literal["norm", "none"] = "norm",
    ):
        super().__init__()
        self.gate_proj = linear(d, h)
        self.up_proj = linear(d, h)
        self.down_proj = linear(h, d)
        self.sparse_gate = nn.Linear(d, h if g == "neuron" else 1)
        self.m = m
        if m == "norm":
            self.norm = nn.LayerNorm(d)
            self.s = nn.Parameter(torch.tensor(0.1))
            self.b = nn.Parameter(torch.tensor(0.0))

    def forward(self, x: Tensor) -> Tensor:
        gate = self.gate_proj(x) * torch.sigmoid(self.sparse_gate(x))
        if self.m == "norm":
            gate = gate * norm_gate(x, self.norm, self.s, self.b)
        return self.down_proj(F.silu(gate) * self.up_proj(x))


class ASG(nn.Module):
    """
    Adaptive Sparse Gating: down(SiLU(gate x) * up x + z * (|z| > tau)), z = W_sparse x.

    tau = sigmoid(t) with one t, one per neuron, or a fixed tau. With grad=hard no gradient reaches
    t, so it is frozen at tau = 0.5 and d alone decides how much passes (at init about 27% at d=512,
    3% at 128; the paper reports 35%). grad=ste passes one: mask + p - p.detach() with
    p = sigmoid((|z| - tau) / 0.1). The added pathway is dense in both its products: 4/3 of SwiGLU.
    """

    def __init__(
        self,
        d: int,
        h: int,
        *,
        threshold: Literal["global", "neuron", "fixed"] = "global",
        tau: float = 0.1,  # the threshold, where it is fixed
        sparse: bool = True,
        grad: Literal["hard", "ste"] = "hard",
    ):
        super().__init__()
        self.gate_proj = linear(d, h)
        self.up_proj = linear(d, h)
        self.down_proj = linear(h, d)
        self.sparse, self.grad, self.tau = sparse, grad, tau
        self.t = None
        if sparse:
            self.sparse_proj = linear(d, h)
            if threshold != "fixed":
                shape = (h,) if threshold == "neuron" else ()
                self.t = nn.Parameter(torch.zeros(shape), requires_grad=grad == "ste")

    def mask(self, z: Tensor) -> Tensor:
        """z: (..., h) -> (..., h), 1 where |z| is over the threshold."""
        with torch.autocast(z.device.type, enabled=False):
            over = widen(z).abs() - (self.tau if self.t is None else torch.sigmoid(self.t))
            mask = above_zero(over.detach())
            return mask if self.grad == "hard" else pass_gradient(mask, torch.sigmoid(over / 0.1))

    def forward(self, x: Tensor) -> Tensor:
        hidden = F.silu(self.gate_proj(x)) * self.up_proj(x)
        if self.sparse:
            z = self.sparse_proj(x)
            hidden = hidden + z * self.mask(z)
        return self.down_proj(hidden)

    def active(self, x: Tensor) -> Tensor:
        """The share of the sparse pathway's units that pass the threshold (0 without one)."""
        return self.mask(self.sparse_proj(x)).float().mean() if self.sparse else x.new_zeros(())


class SparseGated(nn.Module):
    """
    Sparse Gated FFN: G * down(topk(GELU(W_k x)) * W_v x) + (1 - G) * x, G = sigmoid(LN(W_g x)).

    Of the keys only the round(k*h) largest are kept. Every key must be computed to know which, so
    even ideally the cost is (1 + 2k)/3 + d/(3h) of SwiGLU's, never the paper's 0.15. The residual
    is x as the FFN gets it, normed. grad=ste: the gradient of the keys passes as if none was cut.
    """

    def __init__(
        self,
        d: int,
        h: int,
        *,
        k: float = 0.15,
        split: bool = True,
        gate: bool = True,
        grad: Literal["hard", "ste"] = "hard",
    ):
        super().__init__()
        self.key_proj = linear(d, h)
        if split:
            self.value_proj = linear(d, h)
        self.down_proj = ColumnLinear(h, d)
        self.k = kept_units("sparsegated", k, h)
        self.split, self.gate, self.grad = split, gate, grad
        if gate:
            self.res_gate = linear(d, d)
            self.res_norm = nn.LayerNorm(d)

    def mix(self, x: Tensor, y: Tensor) -> Tensor:
        if not self.gate:
            return y
        g = torch.sigmoid(self.res_norm(self.res_gate(x)))
        return g * y + (1 - g) * x

    def forward(self, x: Tensor) -> Tensor:
        key = F.gelu(self.key_proj(x))
        kept = key * top_k_mask(key, self.k)
        if self.grad == "ste":
            kept = pass_gradient(kept.detach(), key)
        return self.mix(x, self.down_proj(kept * self.value_proj(x) if self.split else kept))

    def decode(self, x: Tensor) -> Tensor:
        return self.mix(x, per_token(self.decode_one, x))

    def decode_one(self, x: Tensor) -> Tensor:
        key = F.gelu(matvec(self.key_proj.weight, x))
        units = key.topk(self.k, sorted=False).indices
        kept = key[units]
        if self.split:
            kept = kept * rows(self.value_proj, units, x)
        return down_rows(self, units, kept)

    def active(self, x: Tensor) -> Tensor:
        return top_k_mask(self.key_proj(x), self.k).float().mean()

    def active_flops(self) -> int:
        d, h = self.key_proj.in_features, self.key_proj.out_features
        return 2 * (d * h + (1 + self.split) * d * self.k + self.gate * d * d)


class DynamicGEGLU(nn.Module):
    """
    Dynamic GEGLU: down(alpha * GELU(gate x) * up x), alpha = sigmoid(s * ||LN(x)||_2 + b).

    ||LN(x)||_2 is sqrt(d) for every token but for LN's gain and bias, so with affine=False alpha is
    a constant and this is GEGLU, scaled.
    """

    def __init__(self, d: int, h: int, *, affine: bool = True):
        super().__init__()
        self.gate_proj = linear(d, h)
        self.up_proj = linear(d, h)
        self.down_proj = linear(h, d)
        self.norm = nn.LayerNorm(d, elementwise_affine=affine)
        self.s = nn.Parameter(torch.tensor(0.1))
        self.b = nn.Parameter(torch.tensor(0.0))

    def forward(self, x: Tensor) -> Tensor:
        alpha = norm_gate(x, self.norm, self.s, self.b)
        return self.down_proj(alpha * F.gelu(self.gate_proj(x)) * self.up_proj(x))


class SparseGLU(nn.Module):
    """
    SparseGLU: down(SiLU(gate x) * up x * M), M = 1 on the round(k*h) largest scores of a predictor
    that sees the first r channels of x (two Linears with biases, p wide between them).

    With grad=hard no gradient reaches the predictor, so it is frozen: a random hash of x picks the
    neurons. grad=ste: M + p - p.detach(), p = sigmoid(score). grad=gate: M * p.
    select=stat takes the scores over mean + std * Phi^-1(1 - k): about k*h units, no sort.
    """

    def __init__(
        self,
        d: int,
        h: int,
        *,
        k: float = 0.25,
        r: int = 32,
        p: int = 64,
        grad: Literal["hard", "ste", "gate"] = "hard",
        select: Literal["topk", "stat"] = "topk",
    ):
        super().__init__()
        if not 1 <= r <= d or p < 1:
            raise UserError(f"sparseglu needs 1 <= r <= d = {d} and p >= 1, not r={r} p={p}")
        self.gate_proj = linear(d, h)
        self.up_proj = linear(d, h)
        self.down_proj = ColumnLinear(h, d)
        self.predictor = nn.Sequential(nn.Linear(r, p), nn.ReLU(), nn.Linear(p, h))
        self.predictor.requires_grad_(grad != "hard")
        self.k, self.r, self.grad = kept_units("sparseglu", k, h), r, grad
        self.z = normal_quantile("sparseglu:select=stat", k) if select == "stat" else None

    def score(self, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            return self.predictor(widen(x[..., : self.r]))

    def mask(self, score: Tensor) -> Tensor:
        hard = top_k_mask(score, self.k) if self.z is None else over_mean_mask(score, self.z)
        if self.grad == "hard":
            return hard
        p = torch.sigmoid(score)
        return hard * p if self.grad == "gate" else pass_gradient(hard, p)

    def forward(self, x: Tensor) -> Tensor:
        mask = self.mask(self.score(x))
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x) * mask)

    def decode(self, x: Tensor) -> Tensor:
        return per_token(self.decode_one, x)

    def decode_one(self, x: Tensor) -> Tensor:
        first, _, second = self.predictor  # by matvec: 0.1 ms of a compiled layer's 1.5, not 0.3
        with torch.autocast(x.device.type, enabled=False):
            inner = F.relu(matvec(first.weight, widen(x[: self.r])) + first.bias)
            score = matvec(second.weight, inner) + second.bias
        if self.z is None:
            units = score.topk(self.k, sorted=False).indices
        else:
            units = over_mean_mask(score, self.z).nonzero().squeeze(-1)
        hidden = F.silu(rows(self.gate_proj, units, x)) * rows(self.up_proj, units, x)
        if self.grad == "gate":
            hidden = hidden * torch.sigmoid(score[units])
        return down_rows(self, units, hidden)

    def active(self, x: Tensor) -> Tensor:
        return (self.mask(self.score(x)) > 0).float().mean()

    def active_flops(self) -> int:
        predictor = sum(p.numel() for p in self.predictor.parameters() if p.ndim == 2)
        return 2 * (predictor + 3 * self.gate_proj.in_features * self.k)


class Spark(nn.Module):
    """
    Spark Transformer's FFN (arXiv 2506.06644): down(GELU(T(gate x[:r])) * up x[r:]).

    T(z) = max(z - theta, 0), theta = mean(z) + std(z) * Phi^-1(1 - k) over h: about k*h units pass,
    and the gate itself is the predictor. theta stays in the graph. r=0 means d // 2.
    """

    def __init__(self, d: int, h: int, *, k: float = 0.08, r: int = 0):
        super().__init__()
        self.r = r or d // 2
        if not 1 <= self.r < d:
            raise UserError(f"spark needs 1 <= r < d = {d}, not r={r}")
        self.gate_proj = linear(self.r, h)
        self.up_proj = linear(d - self.r, h)
        self.down_proj = ColumnLinear(h, d)
        self.k, self.z = kept_units("spark", k, h), normal_quantile("spark", k)

    def threshold(self, z: Tensor) -> Tensor:
        with torch.autocast(z.device.type, enabled=False):
            std, mean = torch.std_mean(widen(z), dim=-1, keepdim=True)
            return F.relu(widen(z) - (mean + std * self.z))

    def forward(self, x: Tensor) -> Tensor:
        gate = F.gelu(self.threshold(self.gate_proj(x[..., : self.r])))
        return self.down_proj(gate * self.up_proj(x[..., self.r :]))

    def decode(self, x: Tensor) -> Tensor:
        return per_token(self.decode_one, x)

    def decode_one(self, x: Tensor) -> Tensor:
        gate = self.threshold(matvec(self.gate_proj.weight, x[: self.r]))
        units = gate.nonzero().squeeze(-1)
        return down_rows(self, units, F.gelu(gate[units]) * rows(self.up_proj, units, x[self.r :]))

    def active(self, x: Tensor) -> Tensor:
        return (self.threshold(self.gate_proj(x[..., : self.r])) > 0).float().mean()

    def active_flops(self) -> int:
        d, h = self.down_proj.out_features, self.down_proj.in_features
        return 2 * (self.r * h + (d - self.r) * self.k + d * self.k)


# ------------------------------------------------------------------------------------------------
# What they share


def linear(fan_in: int, fan_out: int) -> nn.Linear:
    """A bias-free Linear."""
    return nn.Linear(fan_in, fan_out, bias=False)


class ColumnLinear(nn.Linear):
    """A bias-free Linear whose weight is laid out so that a column is contiguous in memory: decode
    gathers columns of `down`. Shape, name and values are those of any other Linear."""

    def __init__(self, fan_in: int, fan_out: int):
        super().__init__(fan_in, fan_out, bias=False)
        self.weight = nn.Parameter(self.weight.detach().t().contiguous().t())

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight.t()  # and so the gradient has the weight's layout


def widen(x: Tensor) -> Tensor:
    """At least float32: for norms, thresholds and predictors."""
    return x if x.dtype == torch.float64 else x.float()


def norm_gate(x: Tensor, norm: nn.Module, s: Tensor, b: Tensor) -> Tensor:
    """sigmoid(s * ||norm(x)||_2 + b): (..., d) -> (..., 1). Dynamic GEGLU's alpha, DSG's m."""
    with torch.autocast(x.device.type, enabled=False):
        return torch.sigmoid(s * norm(widen(x)).norm(dim=-1, keepdim=True) + b)


def pass_gradient(value: Tensor, to: Tensor) -> Tensor:
    """Straight-through: the forward value of `value`, bit for bit, and the gradient of both."""
    return value + (to - to.detach())


def mask_dtype(x: Tensor) -> torch.dtype:
    """Of a mask over x, which the backward pass reads again: bool, a quarter of the bytes. On a CPU x's
    own: compiled code there takes longer to write a bool than for all else between two products."""
    return x.dtype if x.device.type == "cpu" else torch.bool


def above_zero(x: Tensor) -> Tensor:
    """1 where x > 0, else 0."""
    return x > 0 if mask_dtype(x) == torch.bool else F.relu(x).sign()


def top_k_mask(score: Tensor, k: int) -> Tensor:
    """1 on exactly k of the largest along the last dim (by index: a tie never adds one), else 0."""
    score = score.detach()
    if torch.compiler.is_compiling() and score.device.type == "cpu" and score.dtype == torch.float32:
        return top_k_by_counting(score, k)
    mask = torch.zeros_like(score, dtype=mask_dtype(score))
    return mask.scatter(-1, score.topk(k, sorted=False).indices, 1)


@torch.library.custom_op("ffn::top_k", mutates_args=(), schema="(Tensor score, int k) -> Tensor")
def top_k_by_counting(score: Tensor, k: int) -> Tensor:
    """top_k_mask for float32 on a CPU, in a quarter of the time. As an operator it is compiled once for
    a shape, not once for each layer."""
    mask, found = compiled_count()(score, torch.tensor(k))  # for an int it would compile anew
    others = found != k  # ties with the k-th largest
    mask[others] = top_k_mask(score[others], k)
    return mask


top_k_by_counting.register_fake(lambda score, k: torch.empty_like(score))


@functools.cache
def compiled_count() -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]:
    return torch.compile(at_least_kth, dynamic=False)  # not above: importing it takes seconds


def at_least_kth(score: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
    """1 where a score reaches the k-th largest, and how many do."""

    def as_float(order: Tensor) -> Tensor:  # whole numbers in the order of the floats of their bits
        bits = order.int()
        return torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits).view(torch.float32)

    # Bit by bit: the largest number that at least k scores reach.
    order = torch.full_like(score[..., :1], -(2**31), dtype=torch.int64)
    for bit in range(31, -1, -1):
        reached = (score >= as_float(order + 2**bit)).float().sum(-1, keepdim=True)
        order = order + 2**bit * (reached >= k)
    mask = (score >= as_float(order)).float()
    return mask, mask.sum(-1)


def over_mean_mask(score: Tensor, z: float) -> Tensor:
    """1 where score > mean + z * std along the last dim, else 0."""
    std, mean = torch.std_mean(score.detach(), dim=-1, keepdim=True)
    return above_zero(score.detach() - (mean + z * std))


def kept_units(name: str, k: float, h: int) -> int:
    if not 0 < k <= 1 or round(k * h) < 1:
        raise UserError(f"{name} keeps round(k*h) of {h} units: k={k} is not in (0, 1] or too small")
    return round(k * h)


def normal_quantile(name: str, k: float) -> float:
    if not 0 < k < 1:
        raise UserError(f"{name} puts its threshold at a normal quantile: 0 < k < 1, not k={k}")
    return NormalDist().inv_cdf(1 - k)


def per_token(decode_one: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """decode_one: (d,) -> (d,), applied to each token of x (..., d)."""
    return torch.stack([decode_one(token) for token in x.reshape(-1, x.size(-1))]).view(x.shape)


def matvec(weight: Tensor, x: Tensor) -> Tensor:
    """weight @ x for one token. Compiled, the sum becomes a loop that reads gathered rows in place
    and, on a CPU, a dense matrix faster than BLAS does; eager, it would write a copy of either."""
    return (weight * x).sum(-1) if torch.compiler.is_compiling() else F.linear(x, weight)


def rows(layer: nn.Linear, units: Tensor, x: Tensor) -> Tensor:
    """layer(x)[units], reading those rows only. x: (fan_in,), units: (n,) -> (n,)"""
    return matvec(layer.weight[units], x)


def down_rows(ffn: nn.Module, units: Tensor, hidden: Tensor) -> Tensor:
    """sum_i hidden_i * (column units_i of down_proj), reading those only. (n,), (n,) -> (d,)"""
    weight = ffn.down_proj.weight.t()  # (h, d), contiguous: see ColumnLinear
    scale = hidden.to(weight.dtype)
    starts = torch.arange(0, units.size(0), 64, device=units.device)  # a bag is one thread's work
    return F.embedding_bag(units, weight, starts, mode="sum", per_sample_weights=scale).sum(0)


# ------------------------------------------------------------------------------------------------
# From a spec to an FFN, and its cost

FFNS: dict[str, type[nn.Module]] = {
    "gelu": GELU,
    "relu2": ReLU2,
    "geglu": GEGLU,
    "swiglu": SwiGLU,
    "isogmlp": IsoGMLP,
    "multiscale": MultiScale,
    "dualgated": DualGated,
    "dsg": DSG,
    "asg": ASG,
    "sparsegated": SparseGated,
    "dynamicgeglu": DynamicGEGLU,
    "sparseglu": SparseGLU,
    "spark": Spark,
}


def parse_spec(spec: str) -> tuple[type[nn.Module], dict[str, object]]:
    """`name:option=value:...` -> its class and keyword arguments. Raises UserError."""
    name, *settings = spec.split(":")
    if name not in FFNS:
        raise UserError(f"unknown ffn {name!r}: {suggest(name, FFNS)}")
    init = FFNS[name].__init__
    keywords = [p for p in inspect.signature(init).parameters.values() if p.kind is p.KEYWORD_ONLY]
    hints = get_type_hints(init)
    kinds = {p.name: hints.get(p.name, type(p.default)) for p in keywords}
    options: dict[str, object] = {}
    for setting in settings:
        option, equals, text = setting.partition("=")
        if option not in kinds:
            known = suggest(option, kinds) if kinds else "it has none"
            raise UserError(f"{name} has no option {option!r}: {known}")
        if option in options or not equals:
            raise UserError(f"{spec!r}: write each option once, as option=value")
        if get_origin(kinds[option]) is Literal:
            choices = {str(choice): choice for choice in get_args(kinds[option])}
            if text not in choices:
                raise UserError(f"{name}:{option} cannot be {text!r}: {suggest(text, choices)}")
            options[option] = choices[text]
        elif kinds[option] in (bool, int, float, str):
            options[option] = parse_value(f"{name}:{option}", text, kinds[option])
        else:
            raise UserError(f"{name}:{option} is no bool, int, float, str or Literal by its type hint")
    for p in keywords:
        if p.default is p.empty and p.name not in options:
            raise UserError(f"{name} needs its option {p.name}: write {name}:{p.name}=VALUE")
    return FFNS[name], options


def make_ffn(spec: str, d: int, h: int) -> nn.Module:
    """The FFN of a spec, (..., d) -> (..., d) with hidden width h, PyTorch's own init. Raises
    UserError for an unknown name, option or value and for an h that does not divide as needed."""
    cls, options = parse_spec(spec)
    if d < 1 or h < 1:
        raise UserError(f"an FFN needs d >= 1 and h >= 1, not d={d} h={h}")
    return cls(d, h, **options)


def sketch(build: Callable[[], nn.Module]) -> nn.Module:
    """A module for its shapes alone: without memory, or with, where its class needs real numbers."""
    try:
        with torch.device("meta"):
            return build()
    except UserError:
        raise
    except Exception:  # whatever a class may do to a tensor that has no data
        return build()


def ffn_cost(ffn: nn.Module) -> dict[str, int]:
    """Parameters, and FLOPs per token of the forward pass's matrix products: `flops` as executed,
    `active_flops` as an ideal implementation would need that skips what is zero. A matrix that is used
    under two names is two products; a class whose products are others says so in `flops`."""
    params = sum(p.numel() for p in ffn.parameters())
    uses = ffn.named_parameters(remove_duplicate=False)
    flops = ffn.flops() if has(ffn, "flops") else sum(2 * p.numel() for _, p in uses if p.ndim >= 2)
    active = ffn.active_flops() if has(ffn, "active_flops") else flops
    return {"params": params, "flops": int(flops), "active_flops": int(active)}


def has(ffn: nn.Module, method: str) -> bool:
    """Whether its class has the method; an attribute or a submodule of that name is something else."""
    return hasattr(type(ffn), method)


@functools.cache
def match_hidden(spec: str, d: int, hidden: int, by: str = "params") -> int:
    """Return the width, a multiple of 8, at which the FFN's parameters (by="params") or executed FLOPs
    (by="flops") come closest to SwiGLU's at `hidden`; among equals, the one nearest to hidden.

    A bisection, then the two neighbours. Widths that the class refuses are skipped. The cost is taken
    to rise with the width: where it falls in places, the result is near one crossing of SwiGLU's; where
    it is constant, the result is hidden. The result is remembered by name: cache_clear() after changing
    a class."""

    @functools.cache
    def first_from(h: int) -> tuple[float, int]:
        """The cost of the first width from h on that the class accepts, and that width."""
        for width in range(h, h + 1024, 8):
            try:
                return ffn_cost(sketch(lambda width=width: make_ffn(spec, d, width)))[by], width
            except UserError:
                continue
        return math.inf, h

    target = ffn_cost(sketch(lambda: make_ffn("swiglu", d, hidden)))[by]
    low, high = 0, 8
    while first_from(high)[0] < target and high < 64 * hidden:
        low, high = high, 2 * high
    while high - low > 8:
        middle = (low + high) // 16 * 8
        low, high = (middle, high) if first_from(middle)[0] < target else (low, middle)
    near = [first_from(h) for h in (max(low, 8), high, math.ceil(hidden / 8) * 8)]
    return min(near, key=lambda found: (abs(found[0] - target), abs(found[1] - hidden)))[1]


# ------------------------------------------------------------------------------------------------
# The decoder. Modules carry the names of Hugging Face's Qwen3.


@dataclass
class GPTConfig:
    block_size: int = 2048
    vocab_size: int = 50304
    n_layer: int = 32
    n_head: int = 8
    n_kv_head: int = 8
    n_embd: int = 512
    ffn: str = "swiglu"
    ffn_hidden: int = 2048
    ffn_match: str = "hidden"  # or the width that matches SwiGLU's params or flops at ffn_hidden
    tie_embeddings: bool = True
    seed: int = 0

    @property
    def hidden(self) -> int:
        """The FFN's actual width, after ffn_match."""
        if self.ffn_match == "hidden":
            return self.ffn_hidden
        return match_hidden(self.ffn, self.n_embd, self.ffn_hidden, self.ffn_match)

    def check(self) -> None:
        """Raise UserError for a shape that cannot be built."""
        for name, value in vars(self).items():
            if type(value) is int and value < 1 and name != "seed":
                raise UserError(f"{name} must be at least 1, not {value}")
        if self.n_embd % (2 * self.n_head):
            raise UserError(f"n_embd={self.n_embd} is not a multiple of 2 * n_head = {2 * self.n_head}")
        if self.n_head % self.n_kv_head:
            raise UserError(f"n_head={self.n_head} is not a multiple of n_kv_head={self.n_kv_head}")
        if self.ffn_match not in ("hidden", "params", "flops"):
            raise UserError(f"ffn_match is hidden, params or flops, not {self.ffn_match!r}")
        sketch(lambda: make_ffn(self.ffn, self.n_embd, self.hidden))


class Attention(nn.Module):
    """Causal grouped-query attention, RMSNorm on q and k per head, rotary positions."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        d, self.head_dim = config.n_embd, config.n_embd // config.n_head
        self.gqa = config.n_kv_head < config.n_head
        self.q_proj = linear(d, d)
        self.k_proj = linear(d, config.n_kv_head * self.head_dim)
        self.v_proj = linear(d, config.n_kv_head * self.head_dim)
        self.o_proj = linear(d, d)
        self.q_norm = nn.RMSNorm(self.head_dim, eps=1e-6)
        self.k_norm = nn.RMSNorm(self.head_dim, eps=1e-6)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, cache: list[Tensor] | None) -> Tensor:
        B, T, C = x.shape
        q = self.q_proj(x).view(B, T, -1, self.head_dim)
        k = self.k_proj(x).view(B, T, -1, self.head_dim)
        v = self.v_proj(x).view(B, T, -1, self.head_dim).transpose(1, 2)
        q = rotate(self.q_norm(widen(q)), cos, sin).to(v.dtype).transpose(1, 2)  # (B, heads, T, hd)
        k = rotate(self.k_norm(widen(k)), cos, sin).to(v.dtype).transpose(1, 2)
        if cache is not None:  # [k, v] of the tokens so far; empty before the first
            if cache:
                k, v = torch.cat((cache[0], k), 2), torch.cat((cache[1], v), 2)
            cache[:] = k, v
        # With a cache, T is the whole prompt or one token, and one token may see all the others.
        y = F.scaled_dot_product_attention(q, k, v, is_causal=T > 1, enable_gqa=self.gqa)
        return self.o_proj(y.transpose(1, 2).reshape(B, T, C))


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding, half-split as in Hugging Face. x: (B, T, n, head_dim), cos: (T, 1, half)"""
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)


class Block(nn.Module):
    def __init__(self, config: GPTConfig):
        super().__init__()
        self.input_layernorm = nn.RMSNorm(config.n_embd, eps=1e-6)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = nn.RMSNorm(config.n_embd, eps=1e-6)
        self.mlp = make_ffn(config.ffn, config.n_embd, config.hidden)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, cache: list[Tensor] | None) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), cos, sin, cache)
        one_token = cache is not None and x.size(1) == 1 and has(self.mlp, "decode")
        return x + (self.mlp.decode if one_token else self.mlp)(self.post_attention_layernorm(x))


class Decoder(nn.Module):
    def __init__(self, config: GPTConfig):
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.n_embd)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.norm = nn.RMSNorm(config.n_embd, eps=1e-6)
        head_dim = config.n_embd // config.n_head
        frequency = 1e6 ** (-torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim)
        angle = torch.arange(config.block_size)[:, None, None] * frequency  # (T, 1, head_dim/2)
        self.register_buffer("cos", angle.cos(), persistent=False)
        self.register_buffer("sin", angle.sin(), persistent=False)

    def forward(self, idx: Tensor, caches: list | None = None, start: int = 0) -> Tensor:
        """idx: (B, T) at positions start, start + 1, ... -> (B, T, d). caches: a list per layer."""
        cos, sin = (table[start : start + idx.size(1)] for table in (self.cos, self.sin))
        x = self.embed_tokens(idx)  # (B, T, d)
        for layer, cache in zip(self.layers, caches or [None] * len(self.layers)):
            x = layer(x, cos, sin, cache)
        return self.norm(x)


def is_residual(name: str) -> bool:
    """Whether a parameter of this name writes to the residual stream."""
    return name.removesuffix(".weight").rpartition(".")[2] in ("o_proj", "down_proj")


class GPT(nn.Module):
    """Qwen3-style decoder. Weights are initialized float32 on the CPU, the same bits for the same
    (seed, parameter name, shape, n_layer) whatever the FFN and the state of PyTorch's generator."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        config.check()
        self.config = config
        with torch.random.fork_rng(devices=[]):  # for what an FFN of yours may draw by itself
            torch.default_generator.manual_seed(config.seed)
            self.model = Decoder(config)
            self.lm_head = linear(config.n_embd, config.vocab_size)
            if config.tie_embeddings:
                self.lm_head.weight = self.model.embed_tokens.weight
            self.init_weights()

    @torch.no_grad()
    def init_weights(self) -> None:
        """Matrices N(0, 0.02), those that write to the residual stream scaled by 1/sqrt(2 n_layer),
        biases 0; gains and an FFN's scalars stay as their modules set them. An FFN that wants it
        otherwise has an init_weights of its own, which is called after this."""
        for name, p in self.named_parameters():  # a tied weight comes once, as embed_tokens
            if name.endswith(".bias"):
                p.zero_()
            elif p.ndim >= 2 and p.is_floating_point():
                std = 0.02 / math.sqrt(2 * self.config.n_layer) if is_residual(name) else 0.02
                seed = hashlib.sha256(f"{self.config.seed}:{name}".encode()).digest()[:8]
                generator = torch.Generator().manual_seed(int.from_bytes(seed, "little"))
                p.copy_(torch.empty(p.shape).normal_(0, std, generator=generator))
        for i, layer in enumerate(self.model.layers):
            if has(layer.mlp, "init_weights"):
                torch.default_generator.manual_seed(self.config.seed * 2**20 + i)
                layer.mlp.init_weights()

    def forward(self, idx: Tensor, targets: Tensor | None = None) -> tuple[Tensor | None, Tensor | None]:
        """
        idx: (B, T) token ids, T <= block_size. Without targets: ((B, T, vocab) logits, None).
        With targets (B, T): (None, mean cross-entropy in nats over the targets that are not -100).
        """
        if idx.size(1) > self.config.block_size:
            raise UserError(f"{idx.size(1)} tokens are more than block_size={self.config.block_size}")
        x = self.model(idx)
        if targets is None:
            return self.lm_head(x), None
        return None, linear_cross_entropy(x.flatten(0, 1), self.lm_head.weight, targets.flatten())

    # Not by cuDNN, PyTorch's choice on an H100: it would plan anew, for tens of ms, at each length.
    @sdpa_kernel([SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH])
    @torch.no_grad()
    def generate(
        self,
        idx: Tensor,
        max_new_tokens: int,
        temperature: float = 1.0,
        top_k: int = 0,
        use_cache: bool = True,
        n_vocab: int = 0,
    ) -> Tensor:
        """
        Append max_new_tokens to idx (B, T), T >= 1. temperature 0 is greedy; top_k 0 keeps all ids;
        ids from n_vocab on (the vocabulary's padding) are never drawn. Sampling uses PyTorch's
        global generator. The context is block_size at most: when full, its older half is dropped.
        """
        size = self.config.block_size
        start, caches = max(0, idx.size(1) - size), None
        for _ in range(max_new_tokens):
            if idx.size(1) - start > size:
                start, caches = idx.size(1) - max(1, size // 2), None
            if caches is None or not use_cache:  # all of the context
                caches = [[] for _ in self.model.layers]
                x = self.model(idx[:, start:], caches if use_cache else None)
            else:  # the newest token
                x = self.model(idx[:, -1:], caches, start=idx.size(1) - 1 - start)
            logits = self.lm_head(x[:, -1]).float()
            if n_vocab:
                logits[:, n_vocab:] = -math.inf
            logits = logits - logits.amax(-1, keepdim=True)  # a tiny temperature would make infinities
            if top_k:
                kth = logits.topk(min(top_k, logits.size(-1))).values[:, -1:]
                logits = logits.masked_fill(logits < kth, -math.inf)
            if temperature > 0:
                new = torch.multinomial(F.softmax(logits / temperature, dim=-1), 1)
            else:
                new = logits.argmax(-1, keepdim=True)
            idx = torch.cat((idx, new), dim=1)
        return idx

    def param_counts(self) -> dict[str, int]:
        """`layers`: in matrices of the layers (the papers' "134M"); `matrices`: these and lm_head;
        `total`: every parameter, a tied one once."""
        layers = sum(p.numel() for p in self.model.layers.parameters() if p.ndim >= 2)
        return {
            "layers": layers,
            "matrices": layers + self.lm_head.weight.numel(),
            "total": sum(p.numel() for p in self.parameters()),
        }

    def flops_per_token(self) -> int:
        """Of a training step, forward and backward: 6 per matrix parameter, and causal attention
        counted once (nanoGPT's 12 counts the masked half too)."""
        c = self.config
        return 6 * self.param_counts()["matrices"] + 6 * c.n_layer * c.n_embd * c.block_size


# ------------------------------------------------------------------------------------------------
# The loss, without ever holding the logits of all tokens


# Of float32 logits. Each chunk reads all of the weight and adds to all of its gradient: fewer are
# faster, and at these sizes the whole step is within a few percent of one chunk's.
LOSS_CHUNK_BYTES = {"cpu": 2**27, "gpu": 2**30}


def linear_cross_entropy(x: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """
    Mean of F.cross_entropy(x @ weight.T, targets, ignore_index=-100); 0 where all are ignored.

    x: (N, d), weight: (V, d), targets: (N,). The logits of 16k tokens and a vocabulary of 50k take
    3.3 GB, their gradient as much again. This makes both a chunk at a time, and the gradients of x
    and weight in the forward pass while the chunk is there (the trick of Liger and of Cut CE).
    """
    if torch.is_autocast_enabled(x.device.type):
        dtype = torch.get_autocast_dtype(x.device.type)
        x, weight = x.to(dtype), weight.to(dtype)
    if torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad):
        return LinearCrossEntropy.apply(x, weight, targets)
    return sum(loss for _, loss, _ in loss_chunks(x, weight, targets)) / n_targets(targets)


def n_targets(targets: Tensor) -> Tensor:
    return (targets != -100).sum().clamp(min=1)


def loss_chunks(x: Tensor, weight: Tensor, targets: Tensor):
    """Yield (slice of tokens, their summed loss, log-probabilities (n, V), float32 or wider) in turn."""
    limit = LOSS_CHUNK_BYTES["cpu" if x.device.type == "cpu" else "gpu"]
    chunks = math.ceil(4 * x.size(0) * weight.size(0) / limit)
    chunk = math.ceil(x.size(0) / chunks)  # of equal size, so that they share kernels
    for i in range(0, x.size(0), chunk):
        part = slice(i, i + chunk)
        log_p = F.log_softmax(widen(x[part] @ weight.t()), dim=-1)
        yield part, F.nll_loss(log_p, targets[part], reduction="sum"), log_p


class LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        n = n_targets(targets)
        total, grad_x, grad_w = 0, [], 0
        for part, loss, log_p in loss_chunks(x, weight, targets):
            total = total + loss
            valid = (targets[part] != -100)[:, None].to(log_p.dtype)
            # d loss / d logits = softmax - onehot, 0 for an ignored token
            hot = torch.arange(weight.size(0), device=x.device) == targets[part][:, None]
            grad = ((log_p.exp() - hot.to(log_p.dtype)) * (valid / n)).to(x.dtype)
            grad_x.append(grad @ weight)
            # (d, V) and not (V, d): to transpose x is cheap. A sum of chunks in bfloat16 would drift.
            grad_w = grad_w + widen(x[part].t() @ grad)
        ctx.save_for_backward(torch.cat(grad_x), grad_w.t().to(weight.dtype).contiguous())
        return total / n

    @staticmethod
    def backward(ctx, grad: Tensor):
        grad_x, grad_w = ctx.saved_tensors
        return grad_x * grad.to(grad_x.dtype), grad_w * grad.to(grad_w.dtype), None
