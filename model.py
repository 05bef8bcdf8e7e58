"""
A Qwen3-style decoder whose feed-forward layer (FFN) is picked by a spec string.

The file has, in this order, the FFNs, the helpers that they share, the code that turns a spec such as
`sparseglu:k=0.5` into an FFN, the decoder, the checks of an FFN at a run's start, and code that is
there only for speed. To add an FFN, write a class and its line in `FFNS`.

Every FFN maps (..., d) -> (..., d) with hidden width h. Linear layers have no bias unless noted, GELU
is the exact one (erf). Where no other paper is named, the source is one of five by "Aardvark" (2025).
"""

from __future__ import annotations

import ast
import bisect
import contextlib
import copy
import ctypes
import functools
import hashlib
import inspect
import itertools
import math
import os
import random
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import NormalDist
from typing import Literal, get_origin, get_type_hints

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from configurator import UserError, parse_value, reason, suggest, user_error

Aux = Tensor | None  # an FFN's auxiliary loss, a scalar that is added to the training loss

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


class ReLU2(GELU):
    """down(ReLU(up x)^2), Primer (arXiv 2109.08668). slope=0.5 squares a leaky ReLU instead, as the
    modded-nanogpt speedruns do."""

    def __init__(self, d: int, h: int, *, slope: float = 0.0):
        super().__init__(d, h)
        self.slope = slope

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.leaky_relu(self.up_proj(x), self.slope).square())


class SwiGLU(nn.Module):
    """down(SiLU(gate x) * up x). GLU variants (arXiv 2002.05202); Qwen3's own FFN, the baseline."""

    def __init__(self, d: int, h: int):
        super().__init__()
        self.gate_proj = linear(d, h)
        self.up_proj = linear(d, h)
        self.down_proj = linear(h, d)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class GEGLU(SwiGLU):
    """down(GELU(gate x) * up x). GLU variants (arXiv 2002.05202)."""

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.gelu(self.gate_proj(x)) * self.up_proj(x))


class IsoGMLP(SwiGLU):
    """down(sigmoid(gate x) * up x). Dynamic GEGLU's paper only names it: our reading."""

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
        self.silu, self.gelu = SwiGLU(d, h // 2), GEGLU(d, h // 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.silu(x) + self.gelu(x)


# ------------------------------------------------------------------------------------------------
# The FFNs of the five papers, and Spark's


class DSG(SwiGLU):
    """
    Dynamic Sparse Gating: down(SiLU(gate x * g * m) * up x), g = sigmoid(W_g x + b_g), per neuron or one
    per token. The paper does not define m; we use Dynamic GEGLU's alpha. Both gates are soft and skip
    nothing, so with g per neuron DSG costs 4/3 of SwiGLU.
    """

    def __init__(
        self, d: int, h: int, *,
        g: Literal["neuron", "token"] = "neuron", m: Literal["norm", "none"] = "norm",
    ):  # fmt: skip
        super().__init__(d, h)
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


class ASG(SwiGLU):
    """
    Adaptive Sparse Gating: down(SiLU(gate x) * up x + z * (|z| > tau)), z = W_sparse x.

    tau = sigmoid(t), with one t (threshold=global) or one per neuron. threshold=fixed uses `tau` itself;
    threshold=input, the paper's future work, uses sigmoid(w x + b). With grad=hard no gradient reaches
    t, so tau stays 0.5. How much passes then depends on d and the initial weights (about 27% at d=512,
    3% at 128; the paper says 35%). grad=ste uses mask + p - p.detach(), p = sigmoid((|z| - tau) / 0.1).
    sparse=False leaves z out. ASG costs 4/3 of SwiGLU.
    """

    def __init__(
        self, d: int, h: int, *, threshold: Literal["global", "neuron", "fixed", "input"] = "global",
        tau: float = 0.1, sparse: bool = True, grad: Literal["hard", "ste"] = "hard",
    ):  # fmt: skip
        super().__init__(d, h)
        if tau != 0.1 and not (sparse and threshold == "fixed"):
            raise UserError(f"asg:tau={tau:g} is for threshold=fixed:sparse=True")
        self.sparse, self.grad, self.threshold, self.tau = sparse, grad, threshold, tau
        if not sparse:
            return
        self.sparse_proj = linear(d, h)
        if threshold in ("global", "neuron"):
            shape = (h,) if threshold == "neuron" else ()
            self.t = nn.Parameter(torch.zeros(shape), requires_grad=grad == "ste")
        if threshold == "input":
            if grad == "hard":
                raise UserError("asg:threshold=input needs grad=ste: no gradient reaches it otherwise")
            self.w = nn.Parameter(torch.zeros(d))
            self.b = nn.Parameter(torch.tensor(0.0))

    def mask(self, x: Tensor, z: Tensor) -> Tensor:
        """Return 1 where |z| is over the threshold. x: (..., d), z: (..., h) -> (..., h)"""
        with torch.autocast(z.device.type, enabled=False):
            if self.threshold == "input":
                tau = torch.sigmoid(upcast(x) @ self.w + self.b)[..., None]
            else:
                tau = self.tau if self.threshold == "fixed" else torch.sigmoid(self.t)
            excess = upcast(z).abs() - tau
            mask = above_zero(excess.detach())
            return mask if self.grad == "hard" else straight_through(mask, torch.sigmoid(excess / 0.1))

    def forward(self, x: Tensor) -> Tensor:
        hidden = F.silu(self.gate_proj(x)) * self.up_proj(x)
        if self.sparse:
            z = self.sparse_proj(x)
            hidden = hidden + z * self.mask(x, z)
        return self.down_proj(hidden)

    def active(self, x: Tensor) -> Tensor:
        return self.mask(x, self.sparse_proj(x)).float().mean() if self.sparse else x.new_zeros(())


def per_token(decode: Callable) -> Callable:
    """Turn a method that decodes one token, (d,) -> (d,), into one for all tokens of x (..., d). The
    method computes W @ x, not a Linear: compiled for a CPU this is a loop that reads gathered rows in
    place, which is faster than the BLAS call of a Linear."""

    def of_all(self, x: Tensor) -> Tensor:
        return torch.stack([decode(self, token) for token in x.reshape(-1, x.size(-1))]).view(x.shape)

    return of_all


class SparseGated(nn.Module):
    """
    Sparse Gated FFN: G * down(topk(GELU(W_k x)) * W_v x) + (1 - G) * x, G = sigmoid(LN(W_g x)).

    The round(k*h) largest keys are kept. All must be computed to know which, so even ideally the cost is
    (1 + 2k)/3 + d/(3h) of SwiGLU's, never the paper's 0.15. The residual is the FFN's normed input.
    split=False leaves W_v out, gate=False G and the residual. grad=ste: the gradient reaches all keys,
    as if none were cut. select=adaptive, the paper's future work, keeps the keys over one running
    threshold, which moves 5% in each training pass towards mean + std * Phi^-1(1 - k) of all its keys.
    """

    def __init__(
        self, d: int, h: int, *, k: float = 0.15, split: bool = True, gate: bool = True,
        grad: Literal["hard", "ste"] = "hard", select: Literal["topk", "adaptive"] = "topk",
    ):  # fmt: skip
        super().__init__()
        self.key_proj = linear(d, h)
        if split:
            self.value_proj = linear(d, h)
        self.down_proj = ColumnLinear(h, d)
        self.k = kept_units("sparsegated", k, h)
        self.split, self.gate, self.grad, self.select = split, gate, grad, select
        if gate:
            self.res_gate = linear(d, d)
            self.res_norm = nn.LayerNorm(d)
        if select == "adaptive":
            self.z = normal_quantile("sparsegated:select=adaptive", k)
            self.register_buffer("theta", torch.tensor(0.0))

    def mix(self, x: Tensor, y: Tensor) -> Tensor:
        if not self.gate:
            return y
        g = torch.sigmoid(self.res_norm(self.res_gate(x)))
        return g * y + (1 - g) * x

    def mask(self, key: Tensor) -> Tensor:
        if self.select == "topk":
            return top_k_mask(key, self.k)
        return over(upcast(key.detach()), self.theta)

    def forward(self, x: Tensor) -> Tensor:
        key = F.gelu(self.key_proj(x))
        kept = key * self.mask(key)
        if self.select == "adaptive" and self.training:
            std, mean = torch.std_mean(upcast(key.detach()))
            self.theta.lerp_(mean + std * self.z, 0.05)
        if self.grad == "ste":
            kept = straight_through(kept.detach(), key)
        return self.mix(x, self.down_proj(kept * self.value_proj(x) if self.split else kept))

    @per_token
    def decode(self, x: Tensor) -> Tensor:
        key = F.gelu(self.key_proj.weight @ x)
        if self.select == "topk":
            kept, units = key.topk(self.k, sorted=False)
        else:
            units = self.mask(key).nonzero()[:, 0]
            kept = key[units]
        if self.split:
            kept = kept * (self.value_proj.weight[units] @ x)
        return self.mix(x, self.down_proj.of_units(units, kept))

    def active(self, x: Tensor) -> Tensor:
        return self.mask(F.gelu(self.key_proj(x))).float().mean()

    def ideal_flops(self) -> int:
        d, h = self.key_proj.in_features, self.key_proj.out_features
        return 2 * (d * h + (1 + self.split) * d * self.k + self.gate * d * d)


class DynamicGEGLU(SwiGLU):
    """
    Dynamic GEGLU: down(alpha * GELU(gate x) * up x), alpha = sigmoid(s * ||LN(x)||_2 + b).

    Without LN's gain and bias ||LN(x)||_2 is sqrt(d) for every token, so affine=False makes alpha a
    constant. The paper announces, but does not show, norm=none and other start values of s and b.
    """

    def __init__(
        self, d: int, h: int, *, affine: bool = True, norm: Literal["layer", "none"] = "layer",
        s: float = 0.1, b: float = 0.0,
    ):  # fmt: skip
        super().__init__(d, h)
        if norm == "none" and not affine:
            raise UserError("dynamicgeglu:affine is of the norm that norm=none leaves out: drop one")
        self.norm = nn.LayerNorm(d, elementwise_affine=affine) if norm == "layer" else nn.Identity()
        self.s = nn.Parameter(torch.tensor(s))
        self.b = nn.Parameter(torch.tensor(b))

    def forward(self, x: Tensor) -> Tensor:
        alpha = norm_gate(x, self.norm, self.s, self.b)
        return self.down_proj(alpha * F.gelu(self.gate_proj(x)) * self.up_proj(x))


class SparseGLU(SwiGLU):
    """
    SparseGLU: down(SiLU(gate x) * up x * M), M = 1 on the round(k*h) largest scores of a predictor: two
    Linears with biases, p units and a ReLU between them, on the first r channels of x (r=0: all).

    With grad=hard no gradient reaches the predictor, so it is frozen: a random hash of x picks the
    neurons. grad=ste: M + q - q.detach(), q = sigmoid(score). grad=gate: M * q. select=stat keeps the
    scores over theta = mean + std * Phi^-1(1 - k), about k*h units. The paper's future work:
    select=soft, M = relu(score - theta); select=sparsemax, M = round(k*h) * sparsemax(score) (arXiv
    1602.02068); ramp=N, the share kept falls from 1 to k over N steps (arXiv 1710.01878).
    """

    def __init__(
        self, d: int, h: int, *, k: float = 0.25, r: int = 32, p: int = 64,
        grad: Literal["hard", "ste", "gate"] = "hard",
        select: Literal["topk", "stat", "soft", "sparsemax"] = "topk", ramp: int = 0,
    ):  # fmt: skip
        super().__init__(d, h)
        soft = select in ("soft", "sparsemax")
        if not 0 <= r <= d or p < 1 or ramp < 0:
            raise UserError(f"sparseglu needs 0 <= r <= {d}, p >= 1, ramp >= 0: r={r} p={p} ramp={ramp}")
        if soft and (grad != "hard" or ramp):
            raise UserError(f"sparseglu:select={select} has its own gradient: leave out grad and ramp")
        self.down_proj = ColumnLinear(h, d)
        self.predictor = nn.Sequential(nn.Linear(r or d, p), nn.ReLU(), nn.Linear(p, h))
        self.predictor.requires_grad_(soft or grad != "hard")
        self.share, self.r, self.grad, self.select, self.ramp = k, r or d, grad, select, ramp
        self.k = kept_units("sparseglu", k, h)
        limit = self.k  # how many units are kept, or the threshold in deviations from the mean
        if select in ("stat", "soft"):
            limit = normal_quantile(f"sparseglu:select={select}", k)
        self.limit = nn.Buffer(torch.tensor(float(limit))) if ramp else limit

    def set_progress(self, step: int, max_iters: int) -> None:
        if self.ramp > max_iters:
            raise UserError(f"ramp={self.ramp} is longer than the run of {max_iters} steps")
        if self.ramp:
            share = 1 - (1 - self.share) * (1 - max(0.0, 1 - step / self.ramp) ** 3)
            h = self.down_proj.in_features
            stat = NormalDist().inv_cdf(1 - share) if share < 1 else -math.inf
            self.limit.fill_(round(share * h) if self.select == "topk" else stat)

    def score(self, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            return self.predictor(upcast(x[..., : self.r]))

    def mask(self, score: Tensor) -> Tensor:
        if self.select == "soft":
            return F.relu(score - over_mean(score, self.limit))
        if self.select == "sparsemax":
            return self.k * sparsemax(score)
        if self.select == "topk":
            hard = top_k_mask(score, self.limit)
        else:
            hard = above_zero(score.detach() - over_mean(score.detach(), self.limit))
        if self.grad == "hard":
            return hard
        p = torch.sigmoid(score)
        return hard * p if self.grad == "gate" else straight_through(hard, p)

    def forward(self, x: Tensor) -> Tensor:
        mask = self.mask(self.score(x))
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x) * mask)

    @per_token
    def decode(self, x: Tensor) -> Tensor:
        first, _, second = self.predictor  # by W @ x: 0.1 ms of a compiled layer's 1.5, not 0.3
        with torch.autocast(x.device.type, enabled=False):
            inner = F.relu(first.weight @ upcast(x[: self.r]) + first.bias)
            score = second.weight @ inner + second.bias
        if self.select == "topk" and not self.ramp:
            units = score.topk(self.k, sorted=False).indices
            mask = torch.sigmoid(score[units]) if self.grad == "gate" else 1
        else:
            mask = self.mask(score)
            units = mask.nonzero()[:, 0]
            mask = mask[units]
        gate, up = (layer.weight[units] @ x for layer in (self.gate_proj, self.up_proj))
        return self.down_proj.of_units(units, F.silu(gate) * up * mask)

    def active(self, x: Tensor) -> Tensor:
        return (self.mask(self.score(x)) > 0).float().mean()

    def ideal_flops(self) -> int:
        predictor = sum(p.numel() for p in self.predictor.parameters() if p.ndim == 2)
        return 2 * (predictor + 3 * self.gate_proj.in_features * self.k)


class Spark(nn.Module):
    """
    Spark Transformer's FFN (arXiv 2506.06644): down(GELU(T(gate x[:r])) * up x[r:]), r=0 means d // 2.
    T(z) = max(z - theta, 0), theta = mean(z) + std(z) * Phi^-1(1 - k) over h, so about k*h units pass.
    A gradient flows through theta.
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
            return F.relu(upcast(z) - over_mean(upcast(z), self.z))

    def forward(self, x: Tensor) -> Tensor:
        gate = F.gelu(self.threshold(self.gate_proj(x[..., : self.r])))
        return self.down_proj(gate * self.up_proj(x[..., self.r :]))

    @per_token
    def decode(self, x: Tensor) -> Tensor:
        gate = self.threshold(self.gate_proj.weight @ x[: self.r])
        units = gate.nonzero()[:, 0]  # GELU(0) = 0
        up = self.up_proj.weight[units] @ x[self.r :]
        return self.down_proj.of_units(units, F.gelu(gate[units]) * up)

    def active(self, x: Tensor) -> Tensor:
        return (self.threshold(self.gate_proj(x[..., : self.r])) > 0).float().mean()

    def ideal_flops(self) -> int:
        d, h = self.down_proj.out_features, self.down_proj.in_features
        return 2 * (self.r * h + (d - self.r) * self.k + d * self.k)


# ------------------------------------------------------------------------------------------------
# Experts


class MoE(nn.Module):
    """
    shared(x) + sum_e 2 sigmoid(s_e) expert_e(x), s = router(x), over the k of n experts e with the
    largest sigmoid(s_e) + bias_e: token choice as in DeepSeek-V3 (arXiv 2412.19437).

    shared and the experts are ReLU2s, round(share*h) and (h - round(share*h)) / k wide. So each token
    uses h units, and no token is dropped. After each training pass bias_e moves by `speed` towards equal
    numbers of tokens. balance=loss leaves it at 0 and returns Switch's aux = 0.01 n sum_e f_e P_e (arXiv
    2101.03961): f_e is the share of all choices that fell on e, P_e the mean of softmax(s)_e.
    """

    def __init__(
        self, d: int, h: int, *, n: int = 8, k: int = 1, share: float = 0.5,
        balance: Literal["bias", "loss"] = "bias", speed: float = 1e-3,
    ):  # fmt: skip
        super().__init__()
        shared = round(share * h)
        if not 1 <= k <= n or n < 2 or not 0 <= share < 1:
            raise UserError(f"experts need 1 <= k <= n, n >= 2, 0 <= share < 1: {k=} {n=} {share=}")
        if shared >= h or (h - shared) % k:
            raise UserError(f"{h - shared} of h = {h} units do not split over k = {k} experts: change h")
        self.h, self.width, self.n, self.k = h, (h - shared) // k, n, k
        self.balance, self.speed = balance, speed
        self.shared = ReLU2(d, shared) if shared else None
        self.experts = nn.ModuleList(ReLU2(d, self.width) for _ in range(n))
        self.router = linear(d, n)
        self.register_buffer("bias", torch.zeros(n))

    def scores(self, x: Tensor) -> Tensor:
        """Return the scores (N, n) of the N tokens of x (..., d), in at least float32."""
        with torch.autocast(x.device.type, enabled=False):
            return F.linear(upcast(x.reshape(-1, x.size(-1))), upcast(self.router.weight))

    def route(self, s: Tensor) -> tuple[Tensor, Tensor, Aux, Tensor | list[int]]:
        """Assign tokens to experts by their scores s (N, n). Return, for rows in the experts' order,
        each row's token and gate, then the aux, then the number of rows of each expert. In training,
        also update what balances the experts."""
        choice = (torch.sigmoid(s) + self.bias).topk(self.k).indices  # (N, k)
        expert, order = choice.flatten().sort(stable=True)
        token, aux = order // self.k, None
        count = (expert[:, None] == torch.arange(self.n, device=s.device)).sum(0)
        if self.training:
            part = count.to(s.dtype) / count.sum()
            if self.balance == "loss":
                aux = 0.01 * self.n * (part * s.softmax(-1).mean(0)).sum()
            else:
                self.bias += self.speed * (1 / self.n - part).sign()
        return token, 2 * torch.sigmoid(s[token, expert]), aux, count

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        flat = x.reshape(-1, x.size(-1))
        token, gate, aux, count = self.route(self.scores(x))
        out = run_experts(self.experts, flat[token], count)
        out = (gate[:, None] * out).to(out.dtype)
        y = torch.zeros_like(flat, dtype=out.dtype).index_add(0, token, out).view(x.shape)
        if self.shared is not None:
            y = y + self.shared(x)
        return y if aux is None else (y, aux)

    def active(self, x: Tensor) -> Tensor:
        shared, one = self.h - self.k * self.width, self.width
        with evaluating(self):  # routing in training mode would update what balances the experts
            count = self.route(self.scores(x))[3]
        used = count.sum() * x.size(-1) / x.numel()  # experts for a token
        return (shared + used * one) / (shared + self.n * one)

    def flops(self) -> int:
        return 2 * self.router.in_features * (2 * self.h + self.n)  # of h units and the router


class ThresholdMoE(MoE):
    """
    MoE, but each expert chooses its tokens, those with s_e > cut_e: 2 sigmoid(s_e) expert_e(x).

    In training expert e computes the N k // n of N tokens with the largest s_e, of which only those over
    cut_e count. Then cut_e moves 5% towards the smallest s_e of the N k // n. In evaluation each token
    goes to all experts e with s_e > cut_e, whatever the other tokens are.
    """

    def __init__(self, d: int, h: int, *, n: int = 8, k: int = 1, share: float = 0.5):
        super().__init__(d, h, n=n, k=k, share=share)
        del self.bias
        self.register_buffer("cut", torch.zeros(n))

    def route(self, s: Tensor) -> tuple[Tensor, Tensor, None, Tensor | list[int]]:
        chosen = over(s.detach(), self.cut).bool()
        if not self.training:
            expert, token = chosen.t().nonzero(as_tuple=True)
            return token, 2 * torch.sigmoid(s[token, expert]), None, chosen.sum(0)
        room = s.size(0) * self.k // self.n
        taken, token = s.topk(room, dim=0)  # (room, n), the largest first
        if room:
            self.cut.lerp_(taken[-1].detach(), 0.05)
        gate = 2 * torch.sigmoid(taken.t().flatten()) * chosen.gather(0, token).t().flatten()
        return token.t().flatten(), gate, None, [room] * self.n


def run_experts(experts: nn.ModuleList, x: Tensor, count: Tensor | list[int]) -> Tensor:
    """Apply expert e to the next count[e] rows of x (M, d): (M, d). A CPU loops, as stacking weights is
    slow there. On a GPU a loop would wait for the counts, so ReLU2s in bfloat16 use one product: batched
    if the counts are equal (a list), otherwise grouped (from Hopper on this does not wait either). An
    expert without rows gets zeros as gradients (on Blackwell perhaps not: pytorch issue 172439)."""
    device = x.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
    relu2 = all(type(expert) is ReLU2 and expert.slope == 0 for expert in experts)
    # grouped_mm wants rows of 16 bytes.
    if on_cpu(x) or dtype != torch.bfloat16 or x.size(-1) % 8 or not relu2:
        known = isinstance(count, list)
        parts = x.split(count if known else count.tolist())
        if known or not on_cpu(x) or not torch.compiler.is_compiling() or not experts.training:
            return torch.cat([expert(part) for expert, part in zip(experts, parts)])
        # oneDNN takes about 1 ms to make a kernel for each new number of rows. Filled up with rows of
        # zeros to multiples of 8, these numbers are few.
        padded = [F.pad(part, (0, 0, 0, -part.size(0) % 8)) for part in parts]
        out = [expert(more) for expert, more in zip(experts, padded)]
        return torch.cat([y[: part.size(0)] for y, part in zip(out, parts)])
    up = torch.stack([expert.up_proj.weight for expert in experts]).to(dtype)
    down = torch.stack([expert.down_proj.weight for expert in experts]).to(dtype)
    if isinstance(count, list):
        hidden = F.relu(x.to(dtype).unflatten(0, (len(experts), count[0])) @ up.mT)
        return (hidden * hidden @ down.mT).flatten(0, 1)
    more = -up.size(1) % 8  # units whose weights are 0
    up, down = F.pad(up, (0, 0, 0, more)).mT, F.pad(down, (0, more)).mT
    ends = count.cumsum(0, dtype=torch.int32)
    hidden = F.relu(F.grouped_mm(x.to(dtype), up, offs=ends))
    # CUDA's autocast would compute square() in float32.
    return F.grouped_mm(hidden * hidden, down, offs=ends)


# ------------------------------------------------------------------------------------------------
# What they share


def linear(fan_in: int, fan_out: int) -> nn.Linear:
    """Return a bias-free Linear."""
    return nn.Linear(fan_in, fan_out, bias=False)


class ColumnLinear(nn.Linear):
    """A bias-free Linear whose weight has contiguous columns, because decode gathers columns."""

    def __init__(self, fan_in: int, fan_out: int):
        super().__init__(fan_in, fan_out, bias=False)
        self.weight = nn.Parameter(self.weight.detach().t().contiguous().t())

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight.t()  # unlike F.linear this gives the gradient the weight's layout

    def of_units(self, units: Tensor, hidden: Tensor) -> Tensor:
        """Return the output for hidden (n,) in the units (n,), 0 elsewhere. Reads only their columns."""
        weight = self.weight.t()
        hidden = hidden.to(weight.dtype)
        starts = torch.arange(0, units.size(0), 64, device=units.device)  # a bag is one thread's work
        return F.embedding_bag(units, weight, starts, mode="sum", per_sample_weights=hidden).sum(0)


def upcast(x: Tensor) -> Tensor:
    """Return x in at least float32, as norms, thresholds and predictors need it."""
    return x if x.dtype == torch.float64 else x.float()


def norm_gate(x: Tensor, norm: nn.Module, s: Tensor, b: Tensor) -> Tensor:
    """Return sigmoid(s * ||norm(x)||_2 + b), Dynamic GEGLU's alpha and DSG's m: (..., d) -> (..., 1)."""
    with torch.autocast(x.device.type, enabled=False):
        return torch.sigmoid(s * norm(upcast(x)).norm(dim=-1, keepdim=True) + b)


def straight_through(value: Tensor, to: Tensor) -> Tensor:
    """Return `value`, bit for bit, with the gradient of value + to."""
    return value + (to - to.detach())


def on_cpu(x: Tensor) -> bool:
    """Whether x is on a CPU, where the fast way to mask, decode and run experts is not a GPU's."""
    return x.device.type == "cpu"


def above_zero(x: Tensor) -> Tensor:
    """Return a mask, 1 where x > 0, else 0. On a CPU it has x's type, because compiled code there writes
    bools slowly; elsewhere it is bool, a quarter of the bytes to keep for the backward pass."""
    return F.relu(x).sign() if on_cpu(x) else x > 0


# PyTorch frees an operator when another of its name is made. Every copy of this file that a process
# loads, such as an exported model's, therefore has names of its own.
OPS = next(n for i in itertools.count() if not hasattr(getattr(torch.ops, n := f"ffn{i}"), "over"))


@torch.library.custom_op(f"{OPS}::over", mutates_args=(), schema="(Tensor x, Tensor limit) -> Tensor")
def over(x: Tensor, limit: Tensor) -> Tensor:
    """Return above_zero(x - limit), for a limit that moves in the same pass. It is an operator, so that
    a compiled backward pass keeps the mask and does not compute it again from the moved limit."""
    return above_zero(x - limit)


over.register_fake(lambda x, limit: above_zero(x - limit))


def top_k_mask(score: Tensor, k: int | Tensor) -> Tensor:
    """Return a mask that is 1 on exactly k of the largest scores along the last dimension, whatever ties
    there are. k may be a tensor: a new value then needs no recompiling."""
    score = score.detach()
    if torch.compiler.is_compiling() and on_cpu(score) and score.dtype == torch.float32:
        return top_k_by_counting(score, k if isinstance(k, Tensor) else torch.full((), float(k)))
    mask = torch.zeros_like(score, dtype=score.dtype if on_cpu(score) else torch.bool)
    if isinstance(k, Tensor):
        first = torch.arange(score.size(-1), device=score.device) < k
        order = score.argsort(dim=-1, descending=True)
        return mask.scatter(-1, order, first.to(mask.dtype).expand_as(mask))
    return mask.scatter(-1, score.topk(k, sorted=False).indices, 1)


def over_mean(score: Tensor, z: float | Tensor) -> Tensor:
    """Return mean + z * std along the last dimension: (..., h) -> (..., 1)."""
    std, mean = torch.std_mean(score, dim=-1, keepdim=True)
    return mean + z * std


def sparsemax(z: Tensor) -> Tensor:
    """Return the point of the probability simplex that is nearest to z, along the last dimension. It is
    relu(z - tau). Bisection finds which z are over tau, faster than a sort."""
    with torch.no_grad():
        tau = z.amax(-1, keepdim=True) - 1
        for i in range(1, 54 if z.dtype == torch.float64 else 25):
            tau = tau + 2**-i * (F.relu(z - tau - 2**-i).sum(-1, keepdim=True) >= 1)
        chosen = above_zero(z - tau - 2**-i)  # over the interval's upper end, so surely over tau
    # With a relu in place of the mask compiled code takes three times as long (experiments/LOG.md).
    return chosen * (z - ((z * chosen).sum(-1, keepdim=True) - 1) / chosen.sum(-1, keepdim=True))


def kept_units(name: str, k: float, h: int) -> int:
    """Return round(k*h), how many of h units are kept. Raises UserError where that is impossible."""
    if not 0 < k <= 1 or round(k * h) < 1:
        raise UserError(f"{name} keeps round(k*h) of {h} units: k={k} is not in (0, 1] or too small")
    return round(k * h)


def normal_quantile(name: str, k: float) -> float:
    """Return the number that a share k of a standard normal distribution exceeds."""
    if not 0 < k < 1:
        raise UserError(f"{name} puts its threshold at a normal quantile: 0 < k < 1, not k={k}")
    return NormalDist().inv_cdf(1 - k)


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
    "moe": MoE,
    "thresholdmoe": ThresholdMoE,
}

METHODS = {  # what a class may have besides forward, with the arguments it is called with
    "__init__": "self, d, h, *, option=default",
    "active": "self, x",
    "decode": "self, x",
    "flops": "self",
    "ideal_flops": "self",
    "init_weights": "self",
    "set_progress": "self, step, max_iters",
}


def has(ffn: nn.Module, method: str) -> bool:
    """Whether an FFN's class has the method (an attribute or submodule of that name does not count). A
    class with its own forward does not inherit active, decode and ideal_flops, which fit another."""
    for own in map(vars, type(ffn).__mro__):
        if method in own or ("forward" in own and method in ("active", "decode", "ideal_flops")):
            return method in own
    return False


def parse_spec(spec: str) -> tuple[type[nn.Module], dict[str, object]]:
    """Turn `name:option=value:...` into the class and its keyword arguments. Raises UserError."""
    name, *settings = spec.split(":")
    if name not in FFNS:
        raise UserError(f"unknown ffn {name!r}: is its line in FFNS? {suggest(name, FFNS)}")
    cls = FFNS[name]
    if not (isinstance(cls, type) and issubclass(cls, nn.Module)):
        raise UserError(f"{name} in FFNS is not a class: write one that extends nn.Module")
    params = inspect.signature(cls.__init__).parameters.values()
    with user_error(f"{name}: a type hint of __init__", "import what it names", NameError):
        hints = get_type_hints(cls.__init__)
    kinds = {p.name: hints.get(p.name, type(p.default)) for p in params if p.kind is p.KEYWORD_ONLY}
    options: dict[str, object] = {}
    for option, equals, text in (setting.partition("=") for setting in settings):
        if option not in kinds:
            cure = suggest(option, kinds) if kinds else "its __init__ has no arguments by name after a *"
            if option in [p.name for p in params][3:]:
                cure = "put * before it in __init__(self, d, h, *, ...)"
                cure += ", or _: KW_ONLY in a dataclass(eq=False)"
            raise UserError(f"{name} has no option {option!r}: {cure}")
        if option in options or not equals:
            raise UserError(f"{spec!r}: write each option once, as option=value")
        if kinds[option] not in (bool, int, float, str) and get_origin(kinds[option]) is not Literal:
            raise UserError(f"{name}:{option} is no bool, int, float, str or Literal by its type hint")
        options[option] = parse_value(f"{name}:{option}", text, kinds[option])
    for method, args in METHODS.items():
        given = options if method == "__init__" else {}
        with user_error(f"{name}.{method}", f"write def {method}({args})", (TypeError, ValueError)):
            if hasattr(cls, method):
                inspect.signature(getattr(cls, method)).bind(*args.split(", *")[0].split(", "), **given)
    return cls, options


def make_ffn(spec: str, d: int, h: int) -> nn.Module:
    """Build the FFN of a spec with PyTorch's own init. Raises UserError for a bad spec, for an h that
    does not divide as needed, for parameters that the optimizers cannot train and for buffers that no
    checkpoint can fill."""
    cls, options = parse_spec(spec)
    if d < 1 or h < 1:
        raise UserError(f"an FFN needs d >= 1 and h >= 1, not d={d} h={h}")
    with user_error(f"{spec} refuses d={d} h={h}", "change an option or these", AssertionError):
        ffn = cls(d, h, **options)
    memory: dict[tuple[int, int], str] = {}
    for name, p in ffn.named_parameters():
        if nn.parameter.is_lazy(p):
            raise UserError(f"{spec}: parameter {name} has no shape yet: give its module all its sizes")
        if p.dtype not in (torch.float32, torch.get_default_dtype()) and p.requires_grad:
            raise UserError(f"{spec}: parameter {name} is {p.dtype}: make it float32")
        if torch.empty_like(p).stride() != p.stride():  # fused AdamW would write into its other parts
            raise UserError(f"{spec}: parameter {name} is a part of a tensor: make it one by clone()")
        at = p.untyped_storage()._cdata, p.storage_offset()
        if p.requires_grad and memory.setdefault(at, name) != name:
            both = f"parameters {memory[at]} and {name} share their memory"
            raise UserError(f"{spec}: {both}: use one nn.Parameter, or clone() it")
    for name, b in ffn.state_dict().items():
        if isinstance(b, Tensor) and is_expanded(b):
            raise UserError(f"{spec}: buffer {name} is expanded and could not be loaded: clone() it")
    return ffn


def sketch(build: Callable[[], nn.Module]) -> nn.Module:
    """Build a module for its shapes alone, without moving PyTorch's random state. It is not built on the
    meta device, because a class may keep tensors in a cache that its later instances use."""
    with torch.random.fork_rng(devices=[]):
        return build()


def is_matrix(p: Tensor) -> bool:
    """Whether a parameter is a matrix, or several: more than one of its dimensions is not 1. Matrices
    are drawn at random, decayed and counted; a gain of shape (1, 1, d) is a vector."""
    return sum(size != 1 for size in p.shape) > 1


def is_expanded(t: Tensor) -> bool:
    """Whether elements of a tensor share their memory, so that nothing can be written into it."""
    strides = t.stride() if t.layout is torch.strided else t.shape
    return any(size > 1 and not stride for size, stride in zip(t.shape, strides))


def ffn_cost(ffn: nn.Module) -> dict[str, int]:
    """Return the number of parameters, `params`, and the FLOPs per token of the forward pass's matrix
    products: `flops` as executed, `ideal_flops` if what is zero was skipped. A matrix under two names
    counts twice; a class that uses its matrices in other ways has a flops()."""
    params = sum(p.numel() for p in ffn.parameters())
    uses = ffn.named_parameters(remove_duplicate=False)
    flops = ffn.flops() if has(ffn, "flops") else sum(2 * p.numel() for _, p in uses if is_matrix(p))
    ideal = ffn.ideal_flops() if has(ffn, "ideal_flops") else flops
    return {"params": params, "flops": int(flops), "ideal_flops": int(ideal)}


def ffn_code(spec: str) -> str:
    """Return a hash of an FFN's code. Runs of one spec with different hashes may differ in their FFN."""
    return code_hash(parse_spec(spec)[0].__mro__)


def code_hash(roots: Iterable[type | Callable]) -> str:
    """Return a hash of the code of classes and functions and of all that they use in their modules, but
    not through FFNS. Comments and docstrings do not count. A user's files of helpers count whole, and so
    does the module of a class made in a function. The hash is empty where there is no source."""
    code: set[str] = set()
    for root in roots:
        file = Path(getattr(sys.modules.get(root.__module__), "__file__", None) or "")
        library = root.__module__.partition(".")[0] in {"torch", *sys.stdlib_module_names}
        if library or file.suffix != ".py":
            continue
        module, used, names = statements(file.read_bytes()), set(), {root.__qualname__}
        while new := {text for text, bound in module if bound & names} - used:
            used |= new
            names |= {*re.findall(r"\bid='(\w+)'", "".join(new))} - {"FFNS"}
        code |= with_helpers(used or {"".join(text for text, _ in module)}, file.parent)
    return hashlib.sha256("\n".join(sorted(code)).encode()).hexdigest()[:16] if code else ""


OURS = ("bench", "configurator", "model", "prepare_fineweb", "train")  # not a user's own files


def with_helpers(code: set[str], folder: Path) -> set[str]:
    """Return this code and that of the files below folder that it imports, directly or not. A file is
    one of these if each part of its path occurs in an import, whatever the import's form."""
    imports = re.findall(r"(?:module|alias\(name)='([\w.]+)'", "".join(code))
    words, paths = {"__init__", *".".join(imports).split(".")}, [folder]
    for path in paths:  # which grows meanwhile
        paths += [p for p in path.glob("*") if p.stem in words]
    files = {p for p in paths if p.suffix == ".py"} - {folder / f"{name}.py" for name in OURS}
    more = code.copy()
    for file in files:
        with contextlib.suppress(SyntaxError, ValueError):  # what Python cannot read, no code imports
            more.add("".join(text for text, _ in statements(file.read_bytes())))
    return with_helpers(more, folder) if more > code else code


@functools.cache
def statements(source: bytes) -> list[tuple[str, set[str]]]:
    """Return the code of each top-level statement of a module, without docstrings, and the names that it
    defines, imports, assigns to or changes. An import of several names is one statement for each."""
    tree, found = ast.parse(source), []
    for node in ast.walk(tree):
        if (node is tree or hasattr(node, "decorator_list")) and ast.get_docstring(node) is not None:
            node.body = node.body[1:]
    for statement in tree.body:
        parts = [statement]
        if isinstance(statement, (ast.Import, ast.ImportFrom)):
            parts = [type(statement)(**vars(statement) | {"names": [name]}) for name in statement.names]
        for part in parts:
            names: set[str] = set()
            for node in [part] if hasattr(part, "decorator_list") else ast.walk(part):
                if isinstance(getattr(node, "ctx", None), ast.Store):  # x = ..., x[0] = ..., x.y = ...
                    names |= {n.id for n in ast.walk(node) if isinstance(n, ast.Name)}
                elif isinstance(name := getattr(node, "asname", None) or getattr(node, "name", ""), str):
                    names.add(name.partition(".")[0])
            # Python's versions differ in which empty fields they show.
            text = re.sub(r"(, )?\w+=(None|\[\]|Load\(\))", "", ast.dump(part))
            found.append((text.replace("(, ", "("), names))
    return found


@functools.cache
def match_hidden(spec: str, d: int, hidden: int, by: str = "params") -> int:
    """
    Return the width, a multiple of 8, at which the FFN's parameters (by="params") or executed FLOPs
    (by="flops") come closest to SwiGLU's at `hidden`; among equals, the one nearest to hidden. It is
    found by bisection, which assumes that the cost rises with the width. Widths that the class refuses
    are skipped. The result is cached by name: call cache_clear() after changing a class.
    """

    @functools.cache
    def cost(h: int) -> tuple[float, int]:
        """Return the cost of the first width from h on that the class accepts, and that width."""
        for width in range(h, h + 1024, 8):
            with contextlib.suppress(UserError):
                return ffn_cost(sketch(functools.partial(make_ffn, spec, d, width)))[by], width
        return math.inf, h

    target, high = ffn_cost(sketch(lambda: make_ffn("swiglu", d, hidden)))[by], 16
    while cost(high)[0] < target and high < 64 * hidden:
        high *= 2
    widths = range(high // 2, high + 8, 8)
    i = bisect.bisect_left(widths, target, key=lambda h: cost(h)[0])
    near = map(cost, [*widths[max(i - 1, 0) : i + 1], math.ceil(hidden / 8) * 8])
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
    ffn_init_std: float = 0.02  # standard deviation of the FFN's initial matrices, but not of down_proj
    residual: str = "float32"  # or bfloat16: type of the residual stream under autocast to bfloat16

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
        if not 0 < self.ffn_init_std < math.inf:
            raise UserError(f"ffn_init_std must be above 0, not {self.ffn_init_std}")
        if self.residual not in ("float32", "bfloat16"):
            raise UserError(f"residual is float32 or bfloat16, not {self.residual!r}")
        if self.ffn_match not in ("hidden", "params", "flops"):
            raise UserError(f"ffn_match is hidden, params or flops, not {self.ffn_match!r}")
        sketch(lambda: make_ffn(self.ffn, self.n_embd, self.hidden))


class RMSNorm(nn.RMSNorm):
    """RMSNorm with eps 1e-6, computed in at least float32: (..., d) -> (..., d)."""

    def __init__(self, d: int):
        super().__init__(d, eps=1e-6)

    def forward(self, x: Tensor) -> Tensor:
        y = F.rms_norm(upcast(x), self.normalized_shape, upcast(self.weight), self.eps)
        return y.to(torch.promote_types(x.dtype, self.weight.dtype))


class Attention(nn.Module):
    """Causal grouped-query attention with RMSNorm on q and k per head and rotary positions."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        d, self.head_dim = config.n_embd, config.n_embd // config.n_head
        self.gqa = config.n_kv_head < config.n_head
        self.q_proj = linear(d, d)
        self.k_proj = linear(d, config.n_kv_head * self.head_dim)
        self.v_proj = linear(d, config.n_kv_head * self.head_dim)
        self.o_proj = linear(d, d)
        self.q_norm = RMSNorm(self.head_dim)
        self.k_norm = RMSNorm(self.head_dim)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, cache: list[Tensor] | None) -> Tensor:
        B, T, C = x.shape
        q, k, v = (f(x).view(B, T, -1, self.head_dim) for f in (self.q_proj, self.k_proj, self.v_proj))
        v = v.transpose(1, 2)
        q = rotate(self.q_norm(q), cos, sin).to(v.dtype).transpose(1, 2)  # (B, heads, T, hd)
        k = rotate(self.k_norm(k), cos, sin).to(v.dtype).transpose(1, 2)
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
        self.input_layernorm = RMSNorm(config.n_embd)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = RMSNorm(config.n_embd)
        self.mlp = make_ffn(config.ffn, config.n_embd, config.hidden)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, cache: list | None) -> tuple[Tensor, Aux]:
        """Return x (B, T, d) with attention and FFN added, and the FFN's aux or None."""
        x = x + self.self_attn(self.input_layernorm(x), cos, sin, cache).to(x.dtype)
        # A GPU takes longer to gather a few rows than to read them all (experiments/LOG.md).
        gathers = cache is not None and x.size(1) == 1 and on_cpu(x) and has(self.mlp, "decode")
        mlp = self.mlp.decode if gathers else self.mlp
        y, aux = split_aux(mlp(self.post_attention_layernorm(x)))
        return x + y.to(x.dtype), aux


def split_aux(y: Tensor | tuple[Tensor, Aux]) -> tuple[Tensor, Aux]:
    """Split what an FFN returns, y or (y, aux), into y and aux, a scalar or None."""
    y, aux = y if isinstance(y, tuple) and len(y) == 2 else (y, None)
    if not isinstance(y, Tensor) or not (aux is None or (isinstance(aux, Tensor) and not aux.ndim)):
        raise UserError("an FFN returns y or (y, aux), y a tensor and aux a tensor without dimensions")
    return y, aux


class Decoder(nn.Module):
    def __init__(self, config: GPTConfig):
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.n_embd)
        self.residual = getattr(torch, config.residual)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.norm = RMSNorm(config.n_embd)
        head_dim = config.n_embd // config.n_head
        frequency = 1e6 ** (-torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim)
        angle = torch.arange(config.block_size)[:, None, None] * frequency  # (T, 1, head_dim/2)
        self.register_buffer("cos", angle.cos(), persistent=False)
        self.register_buffer("sin", angle.sin(), persistent=False)

    def forward(self, idx: Tensor, caches: list | None = None, start: int = 0) -> tuple[Tensor, Aux]:
        """Return the hidden states (B, T, d) of tokens idx (B, T) at positions from start on, and the
        sum of the layers' aux or None. caches: a list per layer."""
        cos, sin = (table[start : start + idx.size(1)] for table in (self.cos, self.sin))
        x = self.embed_tokens(idx)  # (B, T, d)
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(self.residual)  # each layer adds to x in x's type
        total = None
        for layer, cache in zip(self.layers, caches or [None] * len(self.layers)):
            x, aux = layer(x, cos, sin, cache)
            if aux is not None:
                total = upcast(aux) if total is None else total + upcast(aux)
        return self.norm(x), total


def is_residual(name: str) -> bool:
    """Whether a parameter of this name writes to the residual stream."""
    return name.removesuffix(".weight").rpartition(".")[2] in ("o_proj", "down_proj")


class NaNForEmpty(TorchDispatchMode):
    """Lets torch.empty return NaN inside a with block, so that values that are never set are seen."""

    def __torch_dispatch__(self, f, types, args=(), kwargs=None):
        out = f(*args, **(kwargs or {}))
        return out.fill_(math.nan) if "empty" in f.name() and out.is_floating_point() else out


class GPT(nn.Module):
    """
    Qwen3-style decoder. Its initial weights are float32 on the CPU. Matrices have the same bits for the
    same seed, name, shape, n_layer and ffn_init_std. `overwritten` names the parameters to which an FFN
    gave values that are not random and that init_weights changed; `mixes_tokens` is whether an FFN reads
    earlier tokens, None if not known.
    """

    def __init__(self, config: GPTConfig):
        super().__init__()
        config.check()
        self.config = config
        self.mixes_tokens: bool | None = None
        with torch.random.fork_rng(devices=[]):  # for what an FFN may draw by itself
            torch.default_generator.manual_seed(config.seed)
            with NaNForEmpty():
                self.model = Decoder(config)
            self.lm_head = linear(config.n_embd, config.vocab_size)
            if config.tie_embeddings:
                self.lm_head.weight = self.model.embed_tokens.weight
            self.init_weights()
        for name, p in self.named_parameters():
            if not p.is_meta and p.isnan().any():
                raise UserError(f"{name} was never set: give it values in __init__ or init_weights")

    @torch.no_grad()
    def init_weights(self) -> None:
        """Draw matrices from N(0, 0.02), those that write to the residual stream scaled by
        1/sqrt(2 n_layer) and others of an FFN from N(0, ffn_init_std), and set biases to 0. Vectors and
        scalars stay as they are. An init_weights of an FFN's own is called last."""
        c, drawn = self.config, {}
        twins = dict(make_ffn(c.ffn, c.n_embd, c.hidden).named_parameters())  # with other random numbers
        for name, p in self.named_parameters():  # a tied weight comes once, as embed_tokens
            twin = twins.get(name.partition(".mlp.")[2], p)
            fixed = twin is not p and not p.is_meta and torch.equal(p, twin)
            if name.endswith(".bias"):
                p.zero_()
            elif is_matrix(p) and p.is_floating_point():
                std = c.ffn_init_std if ".mlp." in name else 0.02
                std = 0.02 / math.sqrt(2 * c.n_layer) if is_residual(name) else std
                seed = hashlib.sha256(f"{c.seed}:{name}".encode()).digest()[:8]
                generator = torch.Generator().manual_seed(int.from_bytes(seed, "little"))
                p.copy_(torch.empty(p.shape).normal_(0, std, generator=generator))
            if fixed and not torch.equal(p, twin):
                drawn[name] = p.clone()
        for i, layer in enumerate(self.model.layers):
            if has(layer.mlp, "init_weights"):
                torch.default_generator.manual_seed(c.seed * 2**20 + i)
                layer.mlp.init_weights()  # the class has the last word
        self.overwritten = [n for n, p in drawn.items() if torch.equal(p, self.get_parameter(n))]

    def forward(self, idx: Tensor, targets: Tensor | None = None, with_aux: bool = False) -> tuple:
        """Return (logits (B, T, vocab), None) for token ids (B, T). With targets (B, T) return (None,
        loss), the mean cross-entropy in nats where targets are not -100; with_aux, (aux, loss), aux the
        sum of the FFNs' or None."""
        if idx.size(1) > self.config.block_size:
            raise UserError(f"{idx.size(1)} tokens are more than block_size={self.config.block_size}")
        x, aux = self.model(idx)
        if targets is None:
            return self.lm_head(x), None
        loss = linear_cross_entropy(x.flatten(0, 1), self.lm_head.weight, targets.flatten())
        return (aux if with_aux else None), loss

    def set_progress(self, step: int, max_iters: int) -> None:
        """Tell each FFN, and each module inside one, the step, 0 to max_iters - 1, outside of compiled
        code. What they draw with torch depends on the step and the seed alone."""
        modules = [(i, m) for i, layer in enumerate(self.model.layers) for m in layer.mlp.modules()]
        told = [(i, m) for i, m in modules if has(m, "set_progress")]
        if not told:
            return
        device = self.lm_head.weight.device
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            torch.manual_seed(-1 - self.config.seed * 2**20 - step)  # no other seed is negative
            for i, module in told:
                with user_error(f"model.layers.{i}.mlp.set_progress", "look at its options or class"):
                    module.set_progress(step, max_iters)

    # Without cuDNN, PyTorch's choice on an H100: it plans for tens of ms for each new length.
    @sdpa_kernel([SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH])
    @torch.no_grad()
    def generate(
        self, idx: Tensor, max_new_tokens: int, temperature: float = 1.0, top_k: int = 0,
        use_cache: bool = True, n_vocab: int = 0,
    ) -> Tensor:  # fmt: skip
        """Append max_new_tokens to idx (B, T), T >= 1, in evaluation mode. temperature 0 is greedy;
        top_k 0 keeps all; ids from n_vocab on, the vocabulary's padding, are never drawn. A full context
        drops its older half. Where an FFN reads earlier tokens, no cache is used."""
        size = self.config.block_size
        start = read = max(0, idx.size(1) - size)  # the context's first token, and the first to read
        with evaluating(self):
            if self.mixes_tokens is None:
                x = self.lm_head.weight.new_empty(1, min(size, 512), self.config.n_embd)
                self.mixes_tokens = any(influences(layer.mlp, x)[1] for layer in self.model.layers)
            use_cache = use_cache and not self.mixes_tokens
            for _ in range(max_new_tokens):
                if idx.size(1) - start > size:
                    start = read = idx.size(1) - max(1, size // 2)
                if read == start:
                    caches = [[] for _ in self.model.layers] if use_cache else None
                x, _ = self.model(idx[:, read:], caches, read - start)
                read = idx.size(1) if use_cache else start
                logits = self.lm_head(x[:, -1]).float()
                if n_vocab:
                    logits[:, n_vocab:] = -math.inf
                if top_k:
                    kth = logits.topk(min(top_k, logits.size(-1))).values[:, -1:]
                    logits = logits.masked_fill(logits < kth, -math.inf)
                if temperature > 0:
                    new = torch.multinomial(F.softmax(logits / max(temperature, 1e-30), dim=-1), 1)
                else:
                    new = logits.argmax(-1, keepdim=True)
                idx = torch.cat((idx, new), dim=1)
        return idx

    def param_counts(self) -> dict[str, int]:
        """Count parameters. `layers`: in matrices of the layers (the papers' "134M"); `total`: all, a
        tied one once."""
        layers = sum(p.numel() for p in self.model.layers.parameters() if is_matrix(p))
        return {"layers": layers, "total": sum(p.numel() for p in self.parameters())}

    def flops_per_token(self) -> int:
        """Return the FLOPs of a training step per token, three times those of the forward pass. The
        masked half of attention is not counted (nanoGPT's 12 counts it)."""
        c = self.config
        parts = [self.lm_head, *(part for layer in self.model.layers for part in layer.children())]
        products = sum(ffn_cost(part)["flops"] for part in parts if not isinstance(part, nn.Embedding))
        return 3 * (products + 2 * c.n_layer * c.n_embd * c.block_size)


# ------------------------------------------------------------------------------------------------
# What an FFN does with the tokens of a sequence


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Put a model into evaluation mode inside a with block. Its buffers, which set_progress may change
    there, are put back at the end."""
    with contextlib.ExitStack() as restore:
        restore.callback(model.train, model.training)
        for module in model.modules():
            restore.callback(module._buffers.update, dict(module._buffers))
        for b in model.buffers():
            if not is_expanded(b):
                restore.callback(b.detach().copy_, b.detach().clone())
        model.eval()
        yield


@torch.no_grad()
def influences(ffn: nn.Module, x: Tensor, noise: float = 0.02) -> tuple[bool, bool]:
    """Whether, for inputs like x (1, T, d), an FFN's outputs depend on later tokens or on another
    sequence of the batch, and whether a token by itself gives another output than in its sequence. Noise
    is added to the parameters, so that zeros hide nothing, unless the outputs are not finite with it."""
    half, devices = x.size(1) // 2, [x.device] if x.is_cuda else []

    def run(*batch: Tensor) -> Tensor:
        torch.manual_seed(1)  # for an FFN that draws numbers
        return split_aux(torch.func.functional_call(ffn, params, (torch.cat(batch),)))[0]

    restore, rng = contextlib.ExitStack(), torch.random.fork_rng(devices)
    with restore, rng, torch.autocast(x.device.type, enabled=False):
        # TF32 may round products of few rows and of many differently.
        restore.callback(torch.set_float32_matmul_precision, torch.get_float32_matmul_precision())
        torch.set_float32_matmul_precision("highest")
        torch.manual_seed(0)
        params = {name: p for name, p in ffn.named_parameters() if p.is_floating_point()}
        params = {name: p + noise * torch.randn_like(p) for name, p in params.items()}
        a, b = torch.randn_like(x), torch.randn_like(x)
        y = run(a, a, a)[1]
        close, leaks = 1e-4 * y.abs().max(), False
        for cut in (half, max(0, half - 1)):  # one may be a border of chunks of tokens that are mixed
            changed = run(b, torch.cat((a[:, :cut], b[:, cut:]), 1), b)[1]
            leaks |= bool(((changed - y)[:cut].abs() > close).any())
        try:
            alone = run(a.transpose(0, 1)).view_as(y)
        except Exception:  # it takes texts of one length only
            alone = torch.full_like(y, math.inf)
    if noise and not y.isfinite().all():
        return influences(ffn, x, 0.0)
    # Few may differ: a token's row in a product changes its rounding, and so the units kept.
    differ = ((alone - y).abs() > close).any(-1).float().mean()
    return leaks, bool(differ > 0.01)


@torch.no_grad()
def check_ffns(model: GPT, autocast: Callable = contextlib.nullcontext, training: bool = True) -> None:
    """
    Run each FFN on block_size tokens in evaluation mode, and set model.mixes_tokens. Raises UserError
    for an output of another shape or of no floating-point type, a weight that is no parameter, a
    parameter that changes and an output that depends on later tokens (of the first 512). For training,
    check_training checks the first FFN too.
    """
    model.mixes_tokens, c, generator = False, model.config, torch.Generator().manual_seed(0)
    x = torch.randn(1, c.block_size, c.n_embd, generator=generator).to(model.lm_head.weight)
    with evaluating(model), contextlib.ExitStack() as restore:
        for p in model.parameters():  # frozen, so that what needs a gradient is no parameter
            restore.callback(p.requires_grad_, p.requires_grad)
            p.requires_grad_(False)
        for i, layer in enumerate(model.model.layers):
            name, saved = f"model.layers.{i}.mlp", copy.deepcopy(layer.mlp.state_dict())
            with autocast(), torch.enable_grad():
                y, aux = split_aux(layer.mlp(x))
            if y.requires_grad or (aux is not None and aux.requires_grad):
                cure = "make it an nn.Parameter, and a list of modules an nn.ModuleList"
                raise UserError(f"{name} uses a weight that is no parameter: {cure}")
            if y.shape != x.shape or not y.is_floating_point():
                raise UserError(f"{name} returns {y.dtype} {tuple(y.shape)} for {tuple(x.shape)}")
            leaks, mixes = influences(layer.mlp, x[:, :512])
            if leaks:
                what = "its output at a token depends on later tokens, other sequences or earlier calls"
                raise UserError(f"{name} sees the future: {what}")
            for n, p in layer.mlp.named_parameters():
                if n in saved and not torch.equal(p, saved[n]):
                    raise UserError(f"{name}.{n} changes in evaluation: change it only if self.training")
            layer.mlp.load_state_dict(saved)  # buffers too are as they were
            model.mixes_tokens |= mixes
    if training:
        check_training(model.model.layers[0].mlp, c.ffn, x, autocast)


@torch.no_grad()
def check_training(ffn: nn.Module, spec: str, x: Tensor, autocast: Callable) -> None:
    """Run a copy of an FFN twice on x (1, T, d) in training mode. Raises UserError for FLOPs far from
    those stated, and for state that changes but is not saved. (A GPU's sums may differ in rounding, so
    only whole numbers are compared there.)"""
    # The old weight_norm keeps a tensor that can be copied only since it was computed without gradients.
    with user_error(f"{spec} cannot be copied", "keep no file, lock or Python module in an attribute"):
        ffn = copy.deepcopy(ffn).train()
    saved, tensors, states = copy.deepcopy(ffn.state_dict()), [], []
    kinds = (bool, int, float) if on_cpu(x) else (bool, int)
    for _ in range(2):
        counter, rng = FlopCounterMode(display=False), torch.random.fork_rng([x.device] * x.is_cuda)
        # Its hooks on modules refuse an FFN that takes a gradient in its forward pass.
        counter.mod_tracker.__enter__ = counter.mod_tracker.__exit__ = lambda *_: None
        with autocast(), torch.enable_grad(), rng, counter:
            torch.manual_seed(0)  # for an FFN that draws numbers
            y, aux = split_aux(ffn(x.clone()))
        ffn.load_state_dict(saved)  # as if resumed
        # What Python keeps: tensors, numbers, and the states of random numbers that are not torch's.
        kept = [i for module in ffn.modules() for i in [*vars(module).items(), *module._buffers.items()]]
        held = [value for _, value in kept if type(value) is Tensor and value.layout is torch.strided]
        tensors.append([t.detach().nan_to_num() for t in (y, aux, *held) if t is not None])
        numbers = sorted((key, repr(value)) for key, value in kept if type(value) in kinds)
        states.append((numbers, random.getstate(), str(np.random.get_state())))
    if states[0] != states[1] or (on_cpu(x) and not all(map(torch.equal, *tensors))):
        cure = "keep it in a buffer that is saved (set_progress may write a step count), draw with torch"
        raise UserError(f"{spec} changes something in training that is not saved: {cure}")
    counted, said = counter.get_total_flops() / x.size(1), ffn_cost(ffn)["flops"]
    if counted > 1.2 * said or (0 < counted < said / 2 and not has(ffn, "flops")):
        wrong = f"{spec}: {counted:,.0f} FLOPs a token were counted in matrix products, not {said:,}"
        raise UserError(f"{wrong}: give the class a method flops(self) that returns them")


# ------------------------------------------------------------------------------------------------
# Speed. Skip this section on a first reading: it computes the same numbers faster.


def set_up(device: torch.device) -> None:
    """Prepare this process for training on a device."""
    cure = "set TORCHINDUCTOR_CACHE_DIR to a folder that can be written"
    with user_error("PyTorch cannot make its cache folder", cure, OSError):
        import torch._dynamo  # which optimizers import too
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")  # TF32 for what is float32 on purpose
    if device.type != "cpu":
        return
    # Without this, compiled code sums an embedding's gradient in the order in which threads finish.
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # it would take time
    if sys.platform == "linux":
        # glibc maps each tensor over 32 MB anew, which takes a tenth or more of a step with a large
        # vocabulary (experiments/LOG.md). So it keeps freed memory.
        mallopt = getattr(ctypes.CDLL(None), "mallopt", lambda *_: 0)  # musl has none
        mallopt(-4, 0)  # M_MMAP_MAX: map nothing
        mallopt(-1, -1)  # M_TRIM_THRESHOLD: give nothing back


def compiled(f: Callable, device: torch.device, recompute: bool = False) -> Callable:
    """Return torch.compile(f) for inputs of one shape. With `recompute` the backward pass computes
    elementwise results again. A PyTorch without one of the private settings takes more time or memory,
    or rounds some gradients more coarsely under autocast."""
    from torch._functorch import config as functorch
    from torch._inductor import config as inductor

    autocast = [f"torch.amp.autocast_mode.{name}_autocast" for name in ("_enter", "_exit")]
    for config, name, value in [
        # Without these two, a graph with an autograd.Function (our loss) or an autocast in it is traced
        # again at each start, though PyTorch's cache could hold it: 32 layers take 17 s, not 5. (Under
        # DDP, which cuts the graph into pieces, it still is.)
        (functorch, "autograd_cache_allow_custom_autograd_functions", True),
        (inductor, "unsafe_marked_cacheable_functions", dict.fromkeys(autocast, "1")),
        # Off, as in eager mode: the backward pass of what is float32 on purpose stays float32.
        (functorch, "backward_pass_autocast", "off"),
        (functorch, "ban_recompute_materialized_backward", not recompute),
    ]:
        if hasattr(config, name):
            setattr(config, name, value)
        elif recompute and name.startswith("ban_recompute"):
            raise UserError(f"torch {torch.__version__} cannot recompute: --recompute=False")
    if on := [n for n in ("TORCHDYNAMO_DISABLE", "TORCH_COMPILE_DISABLE") if os.environ.get(n) == "1"]:
        raise UserError(f"{on[0]}=1 turns torch.compile off: unset it, or use --compile=False")
    onednn = onednn_pass() if device.type == "cpu" else None
    options = {"post_grad_custom_pre_pass": onednn} if onednn else None
    # fullgraph: what cannot be compiled is an error, and does not run in eager mode unnoticed. It also
    # allows dynamic shapes, such as the numbers of experts' rows.
    return torch.compile(f, dynamic=False, fullgraph=True, options=options)


@contextlib.contextmanager
def compile_errors(signals: Sequence = ()) -> Iterator[None]:
    """Turn what torch.compile raises, as a rule at the first call, into a UserError with the cure.
    Ctrl-C in a terminal ends the C++ compiler too: where `signals` has one, the error says so."""
    try:
        yield
    except Exception as e:
        dynamo = torch._dynamo.exc
        cause = getattr(e, "inner_exception", e)
        if isinstance(cause, torch.OutOfMemoryError):
            raise cause from None
        if isinstance(e, dynamo.FailOnRecompileLimitHit):
            cure = "keep what changes in a buffer (set_progress may write it), or use --compile=False"
            raise UserError(f"the model is compiled anew again and again: {cure}") from e
        if not isinstance(e, dynamo.TorchDynamoException):
            raise
        if signals:
            raise UserError("stopped while compiling: run the same command again") from e
        raise UserError(f"torch.compile does not work here ({reason(cause)}): --compile=False") from e


@torch.library.custom_op(
    f"{OPS}::product", mutates_args=(), schema="(Tensor a, Tensor b, Tensor? c=None) -> Tensor"
)
def onednn_product(a: Tensor, b: Tensor, c: Tensor | None = None) -> Tensor:
    """Return a @ b + c, float32 on a CPU, by oneDNN. a: (m, k), b: (k, n), c: (n,) or None."""
    if not a.numel() or not b.numel():  # oneDNN refuses these
        return a @ b if c is None else torch.addmm(c, a, b)
    c = None if c is None else c.contiguous()  # oneDNN ignores the strides of c
    # Where neither a tensor nor its transpose is contiguous, oneDNN takes a thousand times longer.
    a, b = (x if x.is_contiguous() or x.t().is_contiguous() else x.contiguous() for x in (a, b))
    return torch.ops.mkldnn._linear_pointwise(a, b.t(), c, "none", [], "")


onednn_product.register_fake(lambda a, b, c=None: a.new_empty(a.size(0), b.size(1)))


@functools.cache
def onednn_pass():
    """Return the pass over a compiled graph that replaces float32 products by onednn_product: all of
    them on a CPU with AVX-512, because MKL is slow on AMD's, and elsewhere those of one row
    (experiments/LOG.md). None without MKL or oneDNN, or without a private name that the pass needs."""
    if not (torch.backends.mkl.is_available() and torch.backends.mkldnn.is_available()):
        return None
    try:
        from torch._inductor import config
        from torch._inductor.custom_graph_pass import CustomGraphPass, get_hash_for_files

        _ = config.post_grad_custom_pre_pass, torch.ops.mkldnn._linear_pointwise
    except (ImportError, AttributeError):
        return None

    class ToOneDNN(CustomGraphPass):
        def __call__(self, graph: torch.fx.Graph) -> None:
            aten, avx512 = torch.ops.aten, torch.backends.cpu.get_cpu_capability() == "AVX512"
            for node in graph.nodes:
                if node.target not in (aten.mm.default, aten.addmm.default) or node.kwargs:
                    continue
                *bias, a, b = node.args
                out, first, *rest = (x.meta["val"] for x in (node, a, b, *bias))
                wanted = avx512 or (type(out.size(0)) is int and out.size(0) == 1)  # an int is static
                fits = out.dtype == torch.float32 and all(c.shape == out.shape[1:] for c in rest[1:])
                if wanted and fits:
                    node.target, node.args = getattr(torch.ops, OPS).product.default, (a, b, *bias)
                    # The compiler must write `a` contiguous: oneDNN would copy it, and slowly.
                    node.meta["eager_input_vals"] = ((first.contiguous(), *rest), {})

        def uuid(self) -> bytes:
            return get_hash_for_files((__file__,), torch.backends.cpu.get_cpu_capability())

    return ToOneDNN()


@torch.library.custom_op(f"{OPS}::top_k", mutates_args=(), schema="(Tensor score, Tensor k) -> Tensor")
def top_k_by_counting(score: Tensor, k: Tensor) -> Tensor:
    """Return top_k_mask(score, k) for float32 on a CPU, in a quarter of the time. It is an operator, so
    that it is compiled once for a shape and not once for each layer."""
    mask, found = compiled_count()(score, k)
    others = found != k  # where other scores equal the k-th largest
    mask[others] = top_k_mask(score[others], k)
    return mask


top_k_by_counting.register_fake(lambda score, k: torch.empty_like(score))


def at_least_kth(score: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
    """Return a mask (..., h), 1 where a score (..., h) reaches the k-th largest, and its sums (...)."""
    order = score.view(torch.int32)  # a float's bits, as a whole number, have the float's order,
    order = torch.where(order < 0, order ^ 0x7FFFFFFF, order)  # with those of negative ones flipped
    # Find, bit by bit, the largest number that at least k scores reach.
    least = torch.where((order >= 0).float().sum(-1, keepdim=True) >= k, 0, -(2**31)).int()
    for bit in range(30, -1, -1):
        reached = (order >= least + 2**bit).float().sum(-1, keepdim=True)
        least = least + 2**bit * (reached >= k).int()
    mask = (order >= least).float()
    return mask, mask.sum(-1)


# Cached, and not compiled at import, which would take seconds.
compiled_count = functools.cache(lambda: torch.compile(at_least_kth, dynamic=False))


# Bytes of one chunk's float32 logits. Fewer chunks are faster, as each reads all of the weight; at these
# sizes a step is within a few percent of one chunk's.
LOSS_CHUNK_BYTES = {"cpu": 2**27, "gpu": 2**30}


def linear_cross_entropy(x: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """
    Return the mean of F.cross_entropy(x @ weight.T, targets, ignore_index=-100), 0 if all are ignored.

    x: (N, d), weight: (V, d), targets: (N,). The logits of 16k tokens and a vocabulary of 50k take
    3.3 GB, and their gradient as much. So this makes both for a chunk of tokens at a time, and computes
    the gradients of x and weight in the forward pass, as Liger and Cut Cross-Entropy do.
    """
    if torch.is_autocast_enabled(x.device.type):
        dtype = torch.get_autocast_dtype(x.device.type)
        x, weight = x.to(dtype), weight.to(dtype)
    n = (targets != -100).sum().clamp(min=1)
    if torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad):
        return LinearCrossEntropy.apply(x, weight, targets, n)
    return sum(loss for _, loss, _ in loss_chunks(x, weight, targets)) / n


def loss_chunks(x: Tensor, weight: Tensor, targets: Tensor) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """For each chunk of n tokens yield its slice, summed loss and log-probabilities (n, V)."""
    limit = LOSS_CHUNK_BYTES["cpu" if on_cpu(x) else "gpu"]
    chunks = math.ceil(4 * x.size(0) * weight.size(0) / limit)
    # A power of two makes chunks of one size, which share compiled kernels and fill a GPU's tiles.
    size = math.ceil(x.size(0) / 2 ** (chunks - 1).bit_length())
    for i in range(0, x.size(0), size):
        part = slice(i, i + size)
        log_p = F.log_softmax(upcast(x[part] @ weight.t()), dim=-1)
        yield part, F.nll_loss(log_p, targets[part], reduction="sum"), log_p


class LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, targets: Tensor, n: Tensor) -> Tensor:
        total, grad_x, grad_w = 0, [], 0
        for part, loss, log_p in loss_chunks(x, weight, targets):
            total = total + loss
            # The gradient of the logits is softmax - onehot, and 0 for an ignored token.
            counted = (targets[part] != -100)[:, None].to(log_p.dtype)
            onehot = torch.arange(weight.size(0), device=x.device) == targets[part][:, None]
            grad = ((log_p.exp() - onehot.to(log_p.dtype)) * (counted / n)).to(x.dtype)
            grad_x.append(grad @ weight)
            # As (d, V) and not (V, d), since transposing x is cheap. A sum in bfloat16 would drift.
            grad_w = grad_w + upcast(x[part].t() @ grad)
        ctx.save_for_backward(torch.cat(grad_x), grad_w.t().to(weight.dtype).contiguous())
        return total / n

    @staticmethod
    def backward(ctx, grad: Tensor):
        grad_x, grad_w = ctx.saved_tensors
        return grad_x * grad.to(grad_x.dtype), grad_w * grad.to(grad_w.dtype), None, None
