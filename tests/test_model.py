"""
model.py compared with independent computations: NumPy references (reference.py), Hugging Face's
Qwen3, PyTorch's own cross-entropy, gradients by hand, brute force.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import hashlib
import importlib
import inspect
import itertools
import json
import math
import os
import random
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Literal, get_args, get_type_hints

import numpy as np
import pytest
import reference as ref
import torch
import torch.nn.functional as F
from torch import nn

import model as model_module
from configurator import UserError
from model import FFNS, GPT, GPTConfig, check_ffns, ffn_cost, make_ffn, match_hidden

torch.set_num_threads(1)  # everything here is small, and pytest has a worker per core
ROOT = Path(__file__).resolve().parent.parent
NAMES = list(ref.DEFAULTS)  # those with a reference; FFNS may have more
CPU = torch.device("cpu")
HAS_MKL = torch.backends.mkl.is_available() and torch.backends.mkldnn.is_available()
needs_compiler = pytest.mark.skipif(
    not (shutil.which("g++") or shutil.which("c++")), reason="no C++ compiler"
)
D, H = 40, 48  # no special relation between them; d >= 32 for sparseglu's default r


def product(**choices) -> list[dict]:
    """All combinations of the given options."""
    return [dict(zip(choices, row, strict=True)) for row in itertools.product(*choices.values())]


HARD_STE = ("hard", "ste")
CASES: list[tuple[str, dict]] = [(name, {}) for name in NAMES]
CASES += [("dsg", {"m": "none"}), ("dsg", {"g": "token"}), ("dsg", {"g": "token", "m": "none"})]
CASES += [("asg", {"grad": "ste"}), *(("asg", {"threshold": "neuron", "grad": g}) for g in HARD_STE)]
CASES += [("asg", {"threshold": "fixed", "tau": 0.9}), ("asg", {"threshold": "fixed", "grad": "ste"})]
CASES += [("asg", {"threshold": "input", "grad": "ste"}), ("relu2", {"slope": 0.5})]
CASES += [("asg", {"sparse": False, "threshold": "neuron"})]
CASES += [
    ("sparsegated", {"k": 0.6, **o})
    for o in product(split=(True, False), gate=(True, False), grad=HARD_STE)
]
CASES += [("sparsegated", {"select": "adaptive", **o}) for o in ({}, {"k": 0.6, "grad": "ste"})]
CASES += [("dynamicgeglu", o) for o in ({"affine": False}, {"norm": "none"}, {"s": 0.5, "b": -1.5})]
CASES += [("sparseglu", o) for o in product(grad=("ste", "gate"), select=("topk", "stat"))]
CASES += [("sparseglu", {"r": 5, "p": 3}), ("sparseglu", {"r": 40, "k": 1.0}), ("sparseglu", {"r": 0})]
CASES += [("sparseglu", {"select": select, "k": 0.7}) for select in ("topk", "stat", "sparsemax")]
CASES += [("sparseglu", o) for o in ({"select": "soft"}, {"ramp": 9}, {"ramp": 9, "grad": "gate"})]
CASES += [("sparseglu", {"ramp": 9, "select": "stat"}), ("sparseglu", {"select": "stat"})]
CASES += [("moe", {"n": 4, "share": 0.25}), ("moe", {"n": 4, "k": 2, "share": 0.0})]
CASES += [("moe", {"balance": "loss"}), ("thresholdmoe", {"n": 4, "k": 2, "share": 0.25})]
CASES += [("spark", {"r": 7}), ("spark", {"k": 0.6, "r": 33})]
DECODES = [(n, o) for n, o in CASES if n in ("sparsegated", "sparseglu", "spark")]


def spec_of(name: str, options: dict) -> str:
    return ":".join([name, *(f"{key}={value}" for key, value in options.items())])


def case_ids(case) -> str:
    return spec_of(*case) if isinstance(case, tuple) else repr(case)


all_cases = pytest.mark.parametrize("case", CASES, ids=case_ids)
all_names = pytest.mark.parametrize("name", NAMES)
every_ffn = pytest.mark.parametrize("name", list(FFNS))


def build(name: str, options: dict, d=D, h=H, dtype=torch.float64, seed=0):
    """An FFN in evaluation mode with random parameters and buffers, and their values as NumPy arrays."""
    params = ref.draw(name, d, h, seed=seed, **options)
    ffn = make_ffn(spec_of(name, options), d, h).double()
    ffn.load_state_dict({key: torch.as_tensor(value) for key, value in params.items()})
    return ffn.to(dtype).eval(), params


def inputs(*shape: int, seed=1, dtype=torch.float64) -> torch.Tensor:
    x = np.random.default_rng(seed).standard_normal(shape)
    return torch.from_numpy(x).to(dtype)


def expected(name: str, options: dict, params: ref.Params, x: torch.Tensor) -> np.ndarray:
    """The reference, one token at a time."""
    tokens = x.double().numpy().reshape(-1, x.size(-1))
    return np.stack([ref.ffn(name, params, t, **options) for t in tokens]).reshape(x.shape)


def error(got: torch.Tensor, want: np.ndarray | torch.Tensor) -> float:
    """The largest difference, relative to the largest value wanted."""
    got = got.detach().double()
    want = torch.as_tensor(want).detach().double()
    assert got.shape == want.shape
    return ((got - want).abs().max() / want.abs().max().clamp(min=1e-30)).item()


def hidden_units(ffn: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """The input of down_proj for one token x (d,), as the gradient of output 0 by row 0 of down_proj.
    sparsegated needs gate=False, so that down_proj alone gives its output."""
    (grad,) = torch.autograd.grad(ffn(x[None, None])[0, 0, 0], ffn.down_proj.weight)
    return grad[0]


# -- any FFN, yours too: what a class and its line in FFNS must pass -----------------------------


def any_ffn(name: str, d=D, h=H) -> nn.Module:
    """An FFN in evaluation mode whose parameters differ from their initial values."""
    torch.manual_seed(0)
    return stir(make_ffn(name, d, h)).eval()


@every_ffn
def test_any_ffn_keeps_the_shape(name):
    ffn = any_ffn(name)
    for shape in ((2, 7, D), (1, 1, D)):
        y, _ = model_module.split_aux(ffn(inputs(*shape, dtype=torch.float32)))
        assert y.shape == shape
        assert y.dtype == torch.float32
        assert torch.isfinite(y).all()


@every_ffn
def test_any_ffn_under_autocast(name):
    """Forward and backward work under bfloat16 autocast, with float32 and bfloat16 inputs."""
    ffn = any_ffn(name, 64, 64).train()
    x = inputs(2, 9, 64, dtype=torch.float32).bfloat16()
    for given in (x, x.float()):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y, _ = model_module.split_aux(ffn(given))
        assert y.shape == x.shape
        y.float().sum().backward()
        assert all(torch.isfinite(p.grad).all() for p in ffn.parameters() if p.grad is not None)


@every_ffn
def test_any_ffn_is_causal(name):
    """A token changes its own and the later logits, but no earlier ones. Neither the length nor the
    rest of the batch matters, and the check at a run's start accepts the FFN."""
    gpt = stir(GPT(small(ffn=name))).eval()
    idx = tokens(2, 20)
    changed = idx.clone()
    changed[:, 13] = (changed[:, 13] + 1) % 101
    with torch.no_grad():
        a, b = gpt(idx)[0], gpt(changed)[0]
    torch.testing.assert_close(a[:, :13], b[:, :13], rtol=0, atol=1e-5)
    assert all((a[:, t] - b[:, t]).abs().max() > 1e-3 for t in range(13, 20))
    with torch.no_grad():
        torch.testing.assert_close(gpt(idx[:1, :9])[0], a[:1, :9], rtol=0, atol=1e-5)
    check_ffns(gpt)


@every_ffn
def test_any_ffn_is_trained(name):
    """Every parameter gets a gradient or is frozen; the costs are positive whole numbers."""
    gpt = GPT(small(ffn=name))
    aux, loss = gpt(tokens(2, 20), tokens(2, 20, seed=1), with_aux=True)
    (loss if aux is None else loss + aux).backward()
    for n, p in gpt.named_parameters():
        assert (p.grad is not None) == p.requires_grad, n
    assert all(p.requires_grad for n, p in gpt.named_parameters() if ".mlp." not in n)
    assert all(type(n) is int and n > 0 for n in ffn_cost(gpt.model.layers[0].mlp).values())


@every_ffn
def test_any_ffn_decodes_as_forward(name):
    ffn = any_ffn(name)
    if hasattr(type(ffn), "decode"):
        assert_decodes(ffn, D, 3e-6, torch.float32)
        assert_decodes(ffn.double(), D, 1e-12, torch.float64)


@every_ffn
def test_any_ffn_generates_alike_with_a_cache_and_without(name):
    gpt = stir(GPT(small(ffn=name, block_size=16, tie_embeddings=False)))
    cached = gpt.generate(tokens(2, 5), 20, temperature=0.0)
    assert torch.equal(cached, gpt.generate(tokens(2, 5), 20, temperature=0.0, use_cache=False))


@every_ffn
def test_any_ffn_has_a_share_of_active_units(name):
    """To ask for it changes nothing, in training mode too."""
    ffn = any_ffn(name)
    if hasattr(type(ffn), "active"):
        ffn.train()
        before = digest(ffn)
        with torch.no_grad():
            assert 0 <= torch.as_tensor(ffn.active(inputs(2, 7, D, dtype=torch.float32))).mean() <= 1
        assert digest(ffn) == before
        assert ffn.training


@pytest.mark.timeout(900)  # half a minute of work, but compilers suffer on a busy machine
def test_any_ffn_compiled_is_eager():
    """Traced and differentiated by torch.compile in one graph, every FFN keeps its outputs and
    gradients, whatever the gradient of its mask is."""
    specs = [f"{name}:n=2" if name in ("moe", "thresholdmoe") else name for name in FFNS]
    specs += ["asg:grad=ste:threshold=neuron", "sparsegated:grad=ste"]
    specs += ["sparseglu:select=stat:grad=ste", "sparseglu:grad=gate"]
    assert_compiled_is_eager([any_ffn(spec) for spec in specs], backend="aot_eager")


# -- the FFNs against the references -----------------------------------------------------------


def test_every_reference_has_its_ffn():
    assert set(NAMES) <= set(FFNS)


@all_cases
def test_ffn_equals_the_reference(case):
    """With random parameters they agree to 1e-11 in float64 and to 1e-5 in float32."""
    ffn, params = build(*case)
    x = inputs(2, 7, D)
    want = expected(*case, params, x)
    got = ffn(x)
    assert got.dtype == torch.float64
    assert error(got, want) < 1e-11
    got = ffn.float()(x.float())
    assert got.dtype == torch.float32
    assert error(got, want) < 1e-5


@all_names
def test_ffn_equals_the_reference_at_other_sizes(name):
    """They agree for h < d and h > d, inputs far from unit scale and any number of leading dims."""
    for d, h, scale in ((64, 16, 3.0), (36, 200, 0.2)):
        ffn, params = build(name, {}, d, h, seed=d)
        for x in (inputs(5, d) * scale, inputs(2, 1, 3, d) * scale):
            assert error(ffn(x), expected(name, {}, params, x)) < 1e-11


@all_cases
def test_parameter_names_and_shapes(case):
    """They are those of the reference's table. An option removes a parameter that it makes useless."""
    name, options = case
    for d, h in ((D, H), (64, 16)):
        ffn = make_ffn(spec_of(name, options), d, h)
        want = ref.shapes(name, d, h, **options)
        assert {n: tuple(p.shape) for n, p in ffn.named_parameters()} == want
        want |= ref.buffers(name, **options)  # no other ones: they would enter checkpoints
        assert {n: tuple(p.shape) for n, p in ffn.state_dict().items()} == want


@all_cases
def test_what_is_trained_and_what_is_frozen(case):
    """Hard masks pass no gradient to asg's t and sparseglu's predictor, so these are frozen."""
    name, options = case
    ffn, _ = build(name, options)
    ffn(inputs(20, 7, D)).square().sum().backward()
    o = ref.options_of(name, options)
    frozen = set()
    if name == "asg" and o["grad"] == "hard" and o["sparse"]:
        frozen = {"t"} if o["threshold"] != "fixed" else set()
    if name == "sparseglu" and o["grad"] == "hard" and o["select"] in ("topk", "stat"):
        frozen = {n for n, _ in ffn.named_parameters() if n.startswith("predictor.")}
    assert {n for n, p in ffn.named_parameters() if not p.requires_grad} == frozen
    for n, p in ffn.named_parameters():
        unused = "experts." in n  # perhaps no token chose this expert
        assert n in frozen or (p.grad is not None and (unused or p.grad.abs().sum() > 0)), n


def test_scalars_and_own_init():
    """make_ffn sets s=0.1, b=0, t=0, scale=1 and draws matrices as nn.Linear does."""
    for spec in ("dsg", "dynamicgeglu"):
        ffn = make_ffn(spec, D, H)
        assert (round(ffn.s.item(), 7), ffn.b.item()) == (0.1, 0.0)
        assert ffn.norm.weight.eq(1).all()
        assert ffn.norm.bias.eq(0).all()
    assert make_ffn("asg", D, H).t.item() == 0
    assert make_ffn("asg:threshold=neuron", D, H).t.eq(0).all()
    assert make_ffn("multiscale", D, H).scale.eq(1).all()
    for name in NAMES:
        torch.manual_seed(0)
        bound = 1 / math.sqrt(256)
        weight = make_ffn(name, 256, 64).state_dict()
        first = next(v for k, v in weight.items() if k.endswith("up_proj.weight") or "key" in k)
        if name != "spark":  # its up_proj sees d - r inputs
            assert 0.98 * bound < first.abs().max() <= bound


# -- identities ------------------------------------------------------------------------------

IDENTITIES = [
    ("sparseglu:k=1", "swiglu", {}),
    ("asg", "swiglu", {"sparse_proj.weight": 0}),
    ("dsg", "swiglu", {"sparse_gate.weight": 0, "sparse_gate.bias": 200, "b": 200}),
    ("dynamicgeglu:affine=False", "geglu", {"s": 0.3, "b": -1.1}),
    ("sparsegated:k=1", "geglu", {"res_norm.weight": 0, "res_norm.bias": 200}),
]


@pytest.mark.parametrize("spec, other, values", IDENTITIES)
def test_what_selects_all_and_opens_its_gates_is_a_gated_linear_unit(spec, other, values):
    """dynamicgeglu without the norm's gain and bias is GEGLU times a constant, because ||LN(x)|| is then
    sqrt(d) for every token (up to LN's eps, which large inputs make small)."""
    torch.manual_seed(0)
    a, b = make_ffn(spec, D, H).double(), make_ffn(other, D, H).double()
    renamed = {"key_proj.weight": "gate_proj.weight", "value_proj.weight": "up_proj.weight"}
    source = {renamed.get(n, n): p for n, p in a.state_dict().items()}
    b.load_state_dict({n: source[n] for n in b.state_dict()})
    for n, value in values.items():
        nn.init.constant_(a.get_parameter(n), value)
    scale = 1 / (1 + math.exp(1.1 - 0.3 * math.sqrt(D))) if "affine" in spec else 1
    x = inputs(3, 5, D) * 1e4
    torch.testing.assert_close(a(x), scale * b(x), rtol=1e-10, atol=0)


OTHER = {"k": 0.5, "r": 8, "p": 16, "ramp": 10, "slope": 0.5, "tau": 0.3, "s": 0.3, "b": 0.2, "n": 4,
         "share": 0.25, "speed": 0.1}  # fmt: skip
IDLE = [{"sparse", "threshold"}, {"sparse", "grad"}, {"balance", "speed"}]


@pytest.mark.parametrize("name", NAMES)
def test_no_option_is_without_effect(name):
    """A row of a table whose option did nothing, as asg:tau=0.3 without threshold=fixed, would say that
    it does not matter. Each option, also beside each other one, does something or is refused, or it is
    plain that it does nothing (IDLE)."""

    def behaviour(*options: str) -> list | None:
        try:
            ffn = stir(make_ffn(":".join([name, *options]), D, H)).train()
        except UserError:
            return None
        if hasattr(ffn, "set_progress"):
            ffn.set_progress(1, 100)
        x = inputs(2, 16, D, dtype=torch.float32).requires_grad_()
        y, aux = model_module.split_aux(ffn(x))
        assert y.isfinite().all()
        y.mul(inputs(2, 16, D, seed=2)).sum().add(0 if aux is None else aux).backward()
        values = [y, x.grad, *(p.grad for p in ffn.parameters()), *ffn.buffers()]
        return [None if v is None else v.tolist() for v in values]

    signature, others = inspect.signature(FFNS[name].__init__), []
    for option, hint in get_type_hints(FFNS[name].__init__).items():
        if signature.parameters[option].kind is inspect.Parameter.KEYWORD_ONLY:
            default = signature.parameters[option].default
            values = get_args(hint) or ([not default] if hint is bool else [OTHER[option]])
            values = [2 if type(default) is int and option == "k" else value for value in values]
            others += [(option, f"{option}={value}") for value in values if value != default]
    alone = {text: behaviour(text) for _, text in others}
    for option, text in others:
        assert alone[text] != behaviour(), text
        for other, more in others:
            if other == option or {other, option} in IDLE:
                continue
            if (both := behaviour(text, more)) is not None:
                assert both not in (alone[text], alone[more]), (text, more)


@pytest.mark.parametrize(
    "spec",
    [
        "asg",
        "asg:threshold=neuron",
        "asg:threshold=fixed",
        "sparsegated",
        "sparsegated:split=False",
        "sparseglu",
        "sparseglu:select=stat",
    ],
)
def test_ste_leaves_the_forward_value_bit_for_bit(spec):
    """M + p - p.detach() is not M in floating point unless p - p is taken first."""
    torch.manual_seed(0)
    hard, ste = make_ffn(f"{spec}:grad=hard", D, H), make_ffn(f"{spec}:grad=ste", D, H)
    ste.load_state_dict(hard.state_dict())
    x = inputs(20, 20, D, dtype=torch.float32) * 3
    assert torch.equal(hard(x), ste(x))
    ste.eval()
    assert torch.equal(hard(x), ste(x))


# -- how many units, and which -----------------------------------------------------------------

COUNTS = [(50, 0.15), (64, 0.01), (7, 0.5), (48, 1.0)]  # 8, 1, 4 and all units


def set_scores(ffn: nn.Module, scores: torch.Tensor) -> None:
    """Make sparseglu's scores these, whatever x."""
    with torch.no_grad():
        ffn.predictor[2].weight.zero_()
        ffn.predictor[2].bias.copy_(scores)


@pytest.mark.parametrize("h, k", COUNTS)
def test_exactly_k_units_are_kept(h, k):
    """Ties never add a unit, whether all scores or keys are equal or only those around the k-th."""
    keep, units, x = round(k * h), torch.arange(h), inputs(D)
    glu, _ = build("sparseglu", {"k": k}, D, h)
    gated, _ = build("sparsegated", {"k": k, "gate": False}, D, h)
    for group in (0 * units, units % 3, (units >= keep // 2).long()):
        scores = group - 3.7
        set_scores(glu, scores)
        with torch.no_grad():
            gated.key_proj.weight.copy_(inputs(3, D, seed=9)[group] / math.sqrt(D))
        for ffn, score in ((glu, scores), (gated, F.gelu(gated.key_proj(x)).detach())):
            kept = hidden_units(ffn, x) != 0
            assert kept.sum() == keep
            assert keep == h or score[kept].min() >= score[~kept].max()


@pytest.mark.parametrize("name", ["sparseglu", "sparsegated", "spark", "asg"])
def test_active_is_the_share_of_units_in_use(name):
    cases = [o for n, o in CASES if n == name and o.get("sparse", True)]
    for options in cases:
        ffn, params = build(name, options)
        x = inputs(4, 6, D)
        got = ffn.active(x)
        assert got.shape == ()
        assert got.is_floating_point()
        o = ref.options_of(name, options)
        used = []
        for t in x.numpy().reshape(-1, D):
            if name == "asg":
                if o["threshold"] == "input":
                    tau = ref.sigmoid(params["w"] @ t + params["b"])
                else:
                    tau = o["tau"] if o["threshold"] == "fixed" else ref.sigmoid(params["t"])
                used.append(np.abs(params["sparse_proj.weight"] @ t) > tau)
            else:
                used.append(ref.hidden(name, params, t, **options) != 0)
        assert got.item() == pytest.approx(np.mean(used), abs=1e-6), options


@pytest.mark.parametrize("d, share", [(512, 0.27), (768, 0.37), (128, 0.03)])
def test_how_much_asg_passes_at_init_depends_on_d_alone(d, share):
    """The paper says 35%. With t = 0 and weights from N(0, 0.02) the share depends on d, not on h."""
    for h in (64, 512):
        config = GPTConfig(n_layer=1, n_head=2, n_kv_head=2, n_embd=d, vocab_size=8, block_size=8)
        config.ffn, config.ffn_hidden = "asg", h
        x = inputs(500, d, dtype=torch.float32)
        x = x / x.square().mean(-1, keepdim=True).sqrt()
        got = GPT(config).model.layers[0].mlp.active(x).item()
        assert got == pytest.approx(share, abs=0.01)
        assert got == pytest.approx(math.erfc(0.5 / (0.02 * math.sqrt(2 * d))), abs=0.006)


# -- what changes in training ------------------------------------------------------------------------


ADAPTING = [("moe", o) for o in product(n=(4,), k=(1, 2), balance=("bias", "loss"), speed=(0.05,))]
ADAPTING += [("thresholdmoe", o) for o in ({}, {"n": 4, "k": 2}, {"n": 3, "share": 0.25})]
ADAPTING += [("sparsegated", o) for o in product(select=("adaptive",), grad=HARD_STE)]


def buffers_of(ffn: nn.Module) -> dict[str, torch.Tensor]:
    return {n: b.detach().clone() for n, b in ffn.named_buffers()}


@pytest.mark.parametrize("case", ADAPTING, ids=case_ids)
def test_training_passes_equal_the_reference(case):
    """Outputs, buffers and aux agree over three passes in a row; evaluation changes no buffer."""
    name, options = case
    ffn, params = build(*case)
    ffn.train()
    for seed in range(3):
        x = inputs(2, 13, D, seed=seed)
        want, after, aux = ref.training_pass(name, params, x.numpy().reshape(-1, D), **options)
        got, got_aux = model_module.split_aux(ffn(x))
        assert error(got.reshape(-1, D), want) < 1e-11
        assert (got_aux is None) == (aux is None)
        assert aux is None or got_aux.item() == pytest.approx(aux, rel=1e-9)
        for key, value in after.items():
            assert error(buffers_of(ffn)[key], value) < 1e-11, key
            assert options.get("balance") == "loss" or not np.array_equal(params[key], value)
            params[key] = value
    ffn.eval()
    before = buffers_of(ffn)
    got = ffn(inputs(2, 7, D))
    assert error(got, expected(name, options, params, inputs(2, 7, D))) < 1e-11
    assert all(torch.equal(before[n], b) for n, b in ffn.named_buffers())


@pytest.mark.parametrize("name", ["moe:n=3", "moe:n=3:balance=loss", "moe:n=4:k=2", "thresholdmoe"])
def test_an_expert_without_tokens_gets_a_gradient_of_zeros(name):
    """The other experts and the router get nonzero ones, in training and in evaluation."""
    for training in (True, False):
        ffn = any_ffn(name).train(training)
        with torch.no_grad():
            for buffer in ffn.buffers():
                buffer.fill_(-0.1)
                buffer[2] = 1e9 if name == "thresholdmoe" else -1e9
        y, aux = model_module.split_aux(ffn(inputs(9, 20, D, dtype=torch.float32)))
        (y.square().sum() + (0 if aux is None else aux)).backward()
        for n, p in ffn.named_parameters():
            assert p.grad is not None, n
            assert (p.grad.abs().sum() > 0) != n.startswith("experts.2."), n


def test_tokens_are_balanced_by_the_bias():
    """Experts that start with unequal numbers of tokens end with similar ones."""
    torch.manual_seed(0)
    ffn = stir(make_ffn("moe:n=4:speed=0.005", D, H))
    ffn.router.weight.data[1] += 0.1
    x = inputs(500, D, dtype=torch.float32) + 0.3

    def counts() -> torch.Tensor:
        with torch.no_grad():
            s = F.linear(x, ffn.router.weight)
            return torch.bincount((torch.sigmoid(s) + ffn.bias).argmax(-1), minlength=4)

    assert counts().max() > 250
    for _ in range(300):
        ffn(x)
    assert counts().max() < 150
    assert counts().min() > 100


def used_experts(ffn, x):
    return ffn.route(ffn.scores(x))[3].sum() * x.size(-1) / x.numel()


def test_thresholds_come_to_let_k_experts_through():
    """In evaluation the mean number of experts per token is near k, and it varies by token."""
    for spec, k in (("thresholdmoe", 1), ("thresholdmoe:n=4:k=2", 2)):
        ffn = any_ffn(spec).train()
        for seed in range(150):
            ffn(inputs(400, D, seed=seed, dtype=torch.float32))
        ffn.eval()
        x = inputs(2, 1000, D, seed=999, dtype=torch.float32)
        with torch.no_grad():
            used = used_experts(ffn, x).item()
            each = {used_experts(ffn, t).item() for t in x[0, :50]}
            active = ffn.active(x).item()
        assert used == pytest.approx(k, rel=0.15)
        assert len(each) > 1
        n = len(ffn.experts)
        assert active == pytest.approx((24 + used * 24 / k) / (24 + n * 24 / k), rel=1e-5)
    ffn = any_ffn("moe:n=4:k=2:share=0.25")
    assert used_experts(ffn, x) == 2
    assert ffn.active(x).item() == pytest.approx((12 + 2 * 18) / (12 + 4 * 18))


@pytest.mark.parametrize("spec", ["moe", "moe:k=2:share=0", "thresholdmoe"])
@pytest.mark.parametrize("training", [True, False])
def test_experts_of_a_gpu_give_the_same(spec, training, monkeypatch):
    """On a GPU one grouped product in bfloat16 replaces the loop, which stays in float32; for equal
    numbers of rows a batched one, which waits for no counts on older cards either. Outputs and gradients
    agree. Expert 2 gets no token, and no width is a multiple of 8 units, as the product's
    rows must be."""

    def results(bf16: bool) -> list[torch.Tensor]:
        ffn = any_ffn(spec, 64, 70).train(training)
        with torch.no_grad():
            for buffer in ffn.buffers():
                buffer[2] = 1e9 if spec == "thresholdmoe" else -1e9
        x = inputs(2, 9, 64, dtype=torch.float32).requires_grad_()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=bf16):
            y = ffn(x)
        dy = inputs(2, 9, 64, seed=2, dtype=torch.float32).to(y.dtype)
        return [y, *torch.autograd.grad(y, [x, *ffn.parameters()], dy)]

    here, here_bf16 = results(False), results(True)
    monkeypatch.setattr(model_module, "on_cpu", lambda x: False)
    with torch.profiler.profile() as profile:
        there, there_bf16 = results(False), results(True)
    called = {event.key for event in profile.key_averages()}
    assert ("aten::_grouped_mm" in called) != (spec == "thresholdmoe" and training)
    for a, b in zip(there, here, strict=True):
        assert error(a, b) < 1e-5
    for a, b, exact in zip(there_bf16, here_bf16, here, strict=True):
        assert a.dtype == b.dtype
        assert error(a, b) < 0.03
        assert error(a, exact) < 0.1


@pytest.mark.parametrize("expert", ["gelu", "swiglu", "relu2:slope=0.5"])
def test_experts_of_another_kind_are_themselves_on_a_gpu(expert, monkeypatch):
    """The grouped product computes ReLU2s alone: a subclass with other experts has them computed one by
    one, and not as ReLU2s."""

    class Mine(FFNS["moe"]):
        def __init__(self, d, h):
            super().__init__(d, h)
            self.experts = nn.ModuleList(make_ffn(expert, d, self.width) for _ in range(self.n))

    monkeypatch.setitem(FFNS, "mine", Mine)
    ffn, x = any_ffn("mine", 64, 64), inputs(2, 9, 64, dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16), torch.no_grad():
        here = ffn(x)
        monkeypatch.setattr(model_module, "on_cpu", lambda x: False)
        assert error(ffn(x), here) < 0.01


@pytest.mark.parametrize(
    "spec, name", [("moe", "router.weight"), ("sparseglu:grad=ste", "predictor.0.weight")]
)
def test_what_is_float32_on_purpose_is_so_in_a_compiled_backward_pass(spec, name):
    """Under bfloat16 autocast the gradients of a router and a predictor are those of eager code. PyTorch
    would compute them in autocast's type, which their forward pass has turned off."""

    def gradient(call) -> torch.Tensor:
        x = inputs(2, 10, D, dtype=torch.float32)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y = call(x)
        return torch.autograd.grad(y.float().pow(2).sum(), dict(ffn.named_parameters())[name])[0]

    ffn = any_ffn(spec)
    with torch.no_grad():
        for p in ffn.parameters():
            p.mul_(3)  # so that the gradient is not small
    eager = gradient(ffn)
    model_module.compiled(ffn, CPU)  # which sets how the backward pass is traced
    compiled = gradient(torch.compile(ffn, backend="aot_eager", dynamic=False))
    assert not torch.equal(compiled, compiled.bfloat16().float())
    assert error(compiled, eager) < 1e-5


@pytest.mark.parametrize(
    "spec, backend",
    [
        ("moe:n=2", "aot_eager"),
        ("moe:n=3:k=2:share=0.25:balance=loss", "aot_eager"),
        ("thresholdmoe:n=2", "aot_eager"),
        ("sparsegated:select=adaptive", "aot_eager_decomp_partition"),
    ],
)
def test_a_compiled_training_pass_is_eager_whatever_the_counts(spec, backend):
    """One graph serves all numbers of tokens per expert. Outputs, gradients and buffers equal the eager
    ones. (The backward pass must not read a buffer that the forward pass has updated.)"""
    from torch._dynamo.utils import counters

    torch.compiler.reset()
    counters.clear()
    eager = any_ffn(spec).train()
    ffn = copy.deepcopy(eager)
    ready = torch.compile(ffn, backend=backend, dynamic=False, fullgraph=True)
    assert_training_passes_are_equal(ready, ffn, eager, [inputs(2, 48, D, seed=i) for i in range(3)])
    assert counters["stats"]["unique_graphs"] == 1


def assert_training_passes_are_equal(ready, ffn: nn.Module, eager: nn.Module, xs) -> None:
    """ready is ffn, compiled; eager has ffn's parameters and buffers."""
    for x in xs:
        results = []
        for call, layer in ((ready, ffn), (eager, eager)):
            x = x.float().detach().requires_grad_()
            y, aux = model_module.split_aux(call(x))
            layer.zero_grad()
            (y.square().sum() + (0 if aux is None else aux)).backward()
            aux = torch.zeros(()) if aux is None else aux
            results.append([y, aux, x.grad, *(p.grad for p in layer.parameters()), *layer.buffers()])
        for got, want in zip(*results, strict=True):
            assert error(got, want) < 1e-4


# -- the ramp of the share kept ------------------------------------------------------------------------


@pytest.mark.parametrize("select", ["topk", "stat"])
def test_the_share_kept_falls_along_the_ramp(select):
    """It follows Zhu and Gupta's cubic from 1 at step 0 to k from step `ramp` on; decode agrees."""
    ffn, _ = build("sparseglu", {"ramp": 10, "select": select}, D, 400)
    plain = make_ffn(f"sparseglu:select={select}", D, 400).double()
    plain.load_state_dict({n: v for n, v in ffn.state_dict().items() if n != "limit"})
    x = inputs(30, D)
    for step in (0, 1, 5, 8, 10, 25):
        ffn.set_progress(step, 25)
        share = ref.ramped(step, 10, 0.25)
        with torch.no_grad():
            active = ffn.active(x).item()
            if select == "topk":
                assert round(active * 400, 2) == round(share * 400)
            else:
                assert active == pytest.approx(share, abs=0.05)
            assert error(ffn.decode(x[:3]), ffn(x[:3])) < 1e-12
            assert torch.equal(ffn(x), plain(x)) == (step >= 10)
    with pytest.raises(UserError, match="ramp=10 is longer than the run of 9 steps"):
        ffn.set_progress(0, 9)
    plain.set_progress(0, 9)
    assert make_ffn("sparseglu:ramp=10", D, 400).active(x.float()) == 0.25  # as at a run's end


def test_the_ramp_reaches_the_layers_and_compiles_nothing_anew():
    """Only the values of tensors change, so one graph serves all steps."""
    from torch._dynamo.testing import CompileCounter

    gpt = stir(GPT(small(ffn="sparseglu:ramp=3:grad=ste", ffn_hidden=H)))
    torch.compiler.reset()
    counter = CompileCounter()
    run, losses = torch.compile(gpt, backend=counter, dynamic=False, fullgraph=True), set()
    for step in range(5):
        gpt.set_progress(step, 5)
        assert all(layer.mlp.limit == round(ref.ramped(step, 3, 0.25) * H) for layer in gpt.model.layers)
        loss = gpt(tokens(2, 10), tokens(2, 10, seed=1))[1].item()
        assert run(tokens(2, 10), tokens(2, 10, seed=1))[1].item() == pytest.approx(loss, rel=1e-5)
        losses.add(loss)
    assert counter.frame_count == 1
    assert len(losses) == 4  # of steps 0, 1 and 2, and of all from step 3 on
    GPT(small()).set_progress(1, 2)  # SwiGLU has no set_progress
    with pytest.raises(UserError, match=r"model.layers.0.mlp.set_progress \(ramp=3 is longer"):
        gpt.set_progress(0, 2)


# -- in a lower precision ------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_predictor_stays_out_of_autocast(dtype):
    """bfloat16 scores would pick other units than float32 ones."""
    torch.manual_seed(0)
    ffn = make_ffn("sparseglu", 64, 512)
    with torch.no_grad():
        ffn.predictor[2].weight.mul_(0.01)
        ffn.predictor[2].bias.fill_(8.0)  # where bfloat16 has steps of 1/32
    for x in inputs(8, 64, dtype=dtype):
        want = hidden_units(ffn, x.float()) != 0
        with torch.autocast("cpu", dtype=torch.bfloat16):
            got = hidden_units(ffn, x) != 0
        assert torch.equal(got, want)


@pytest.mark.parametrize("threshold", ["global", "neuron"])
def test_asg_threshold_stays_out_of_autocast(threshold):
    """tau = 0.4999 is 0.5 in bfloat16, and |z| = 0.5 would not pass."""
    ffn = make_ffn(f"asg:threshold={threshold}", 32, 64)
    with torch.no_grad():
        ffn.sparse_proj.weight.zero_()
        ffn.sparse_proj.weight[:, 0] = 0.5
        ffn.t.fill_(math.log(0.4999 / 0.5001))
        x = torch.ones(1, 1, 32)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert ffn.active(x) == 1
        ffn.t.fill_(math.log(0.5001 / 0.4999))
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert ffn.active(x) == 0


def test_asg_passes_what_is_over_the_threshold_and_not_what_equals_it():
    """tau = sigmoid(0) is exactly 0.5, and so are these z."""
    for spec in ("asg", "asg:threshold=neuron", "asg:threshold=fixed:tau=0.5", "asg:grad=ste"):
        ffn = make_ffn(spec, 32, 64)
        with torch.no_grad():
            ffn.sparse_proj.weight.zero_()
            ffn.sparse_proj.weight[:, 0] = torch.tensor([0.5, -0.5]).repeat(32)
            assert ffn.active(torch.ones(1, 1, 32)) == 0
            assert ffn.active(torch.full((1, 1, 32), 1.001)) == 1


@pytest.mark.parametrize("name", ["dsg", "dynamicgeglu"])
def test_norm2_stays_out_of_autocast(name):
    """With s = 50 the rounding of a bfloat16 norm (steps of 0.125 at 22) would flip the gate."""
    ffn, _ = build(name, {}, 512, 64, dtype=torch.float32)
    x = inputs(1, 40, 512, dtype=torch.float32).bfloat16().float()
    with torch.no_grad():
        ffn.s.fill_(50.0)
        ffn.b.copy_(-50 * ffn.norm(x).norm(dim=-1).median())
        want = ffn(x)
        for given in (x, x.bfloat16()):
            with torch.autocast("cpu", dtype=torch.bfloat16):
                got = ffn(given)
            assert error(got, want) < 0.03


# -- gradients -----------------------------------------------------------------------------------

SMOOTH = [(n, o) for n, o in CASES if o.get("grad") != "ste" and o.get("r") in (None, 7, 33, 40)]
# One case of each class of experts is enough: the others run the same code with more parameters.
SMOOTH = [(n, o) for n, o in SMOOTH if "moe" not in n or o.get("n") == 4]


@pytest.mark.parametrize("case", SMOOTH, ids=case_ids)
def test_gradients_by_finite_differences(case):
    """The gradients of x and every trained parameter agree in float64; no input is near a tie."""
    name, options = case
    d, h = 6, 8
    options = dict(options)
    if "moe" in name:
        d, options = 3, options | {"n": 3}
    if name == "sparseglu":
        options |= {"r": 5, "p": 4}
    if name == "spark":
        options |= {"r": {None: 3, 7: 2, 33: 5}[options.get("r")]}
    ffn, _ = build(name, options, d, h)
    params = {n: p.detach().requires_grad_() for n, p in ffn.named_parameters() if p.requires_grad}
    x = inputs(2, d).requires_grad_()

    def output(x, *values):
        return torch.func.functional_call(ffn, dict(zip(params, values, strict=True)), (x,))

    assert torch.autograd.gradcheck(output, (x, *params.values()), eps=1e-6, atol=1e-7)


def add(grads: dict, name: str, value) -> None:
    grads[name] = grads.get(name, 0.0) + value


def silu_slope(z):
    s = ref.sigmoid(z)
    return s * (1 + z * (1 - s))


def gelu_slope(z):
    return ref.gelu(z) / z + z * np.exp(-(z**2) / 2) / math.sqrt(2 * math.pi)


def sparseglu_ste(p, x, c, o, grads):
    """hidden = SiLU(g) * u * (M + q - const), q = sigmoid(score): dM/dscore = q (1 - q)."""
    r = o["r"]
    g, u = p["gate_proj.weight"] @ x, p["up_proj.weight"] @ x
    z = p["predictor.0.weight"] @ x[:r] + p["predictor.0.bias"]
    a = np.maximum(z, 0)
    q = ref.sigmoid(p["predictor.2.weight"] @ a + p["predictor.2.bias"])
    mask = ref.selected(p, x, o["k"], r, o["select"])
    dh = p["down_proj.weight"].T @ c
    dg, du = dh * u * mask * silu_slope(g), dh * ref.silu(g) * mask
    ds = dh * ref.silu(g) * u * q * (1 - q)
    dz = (p["predictor.2.weight"].T @ ds) * (z > 0)
    add(grads, "down_proj.weight", np.outer(c, ref.silu(g) * u * mask))
    add(grads, "gate_proj.weight", np.outer(dg, x))
    add(grads, "up_proj.weight", np.outer(du, x))
    add(grads, "predictor.2.weight", np.outer(ds, a))
    add(grads, "predictor.2.bias", ds)
    add(grads, "predictor.0.weight", np.outer(dz, x[:r]))
    add(grads, "predictor.0.bias", dz)
    dx = p["gate_proj.weight"].T @ dg + p["up_proj.weight"].T @ du
    dx[:r] += p["predictor.0.weight"].T @ dz
    return dx


def asg_ste(p, x, c, o, grads):
    """hidden = SiLU(g) * u + z * (M + q - const), q = sigmoid((|z| - tau) / 0.1)."""
    g, u, z = (p[f"{n}_proj.weight"] @ x for n in ("gate", "up", "sparse"))
    if o["threshold"] == "input":
        tau = ref.sigmoid(p["w"] @ x + p["b"])
    else:
        tau = o["tau"] if o["threshold"] == "fixed" else ref.sigmoid(p["t"])
    q = ref.sigmoid((np.abs(z) - tau) / 0.1)
    slope = q * (1 - q) / 0.1
    mask = np.abs(z) > tau
    dh = p["down_proj.weight"].T @ c
    dg, du = dh * u * silu_slope(g), dh * ref.silu(g)
    dz = dh * (mask + z * slope * np.sign(z))
    add(grads, "down_proj.weight", np.outer(c, ref.silu(g) * u + z * mask))
    add(grads, "gate_proj.weight", np.outer(dg, x))
    add(grads, "up_proj.weight", np.outer(du, x))
    add(grads, "sparse_proj.weight", np.outer(dz, x))
    pairs = (("gate", dg), ("up", du), ("sparse", dz))
    dx = sum(p[f"{n}_proj.weight"].T @ dn for n, dn in pairs)
    dt = -dh * z * slope * tau * (1 - tau)
    if o["threshold"] == "input":
        add(grads, "w", dt.sum() * x)
        add(grads, "b", dt.sum())
        dx = dx + dt.sum() * p["w"]
    elif o["threshold"] != "fixed":
        add(grads, "t", dt if o["threshold"] == "neuron" else dt.sum())
    return dx


def sparsegated_ste(p, x, c, o, grads):
    """hidden = topk(K) * V. Backward takes no notice of the cut: dK = dhidden * V for all keys."""
    z = p["key_proj.weight"] @ x
    key = ref.gelu(z)
    kept = key * ref.top(key, o["k"])
    value = p["value_proj.weight"] @ x if o["split"] else np.ones_like(z)
    dh = p["down_proj.weight"].T @ c
    dz = dh * value * gelu_slope(z)
    add(grads, "down_proj.weight", np.outer(c, kept * value))
    add(grads, "key_proj.weight", np.outer(dz, x))
    dx = p["key_proj.weight"].T @ dz
    if o["split"]:
        add(grads, "value_proj.weight", np.outer(dh * kept, x))
        dx += p["value_proj.weight"].T @ (dh * kept)
    return dx


BY_HAND = [
    (sparseglu_ste, ("sparseglu", {"grad": "ste", "r": 5, "p": 7})),
    (sparseglu_ste, ("sparseglu", {"grad": "ste", "r": 5, "p": 7, "select": "stat"})),
    (asg_ste, ("asg", {"grad": "ste"})),
    (asg_ste, ("asg", {"grad": "ste", "threshold": "neuron"})),
    (asg_ste, ("asg", {"grad": "ste", "threshold": "fixed", "tau": 0.7})),
    (asg_ste, ("asg", {"grad": "ste", "threshold": "input"})),
    (sparsegated_ste, ("sparsegated", {"grad": "ste", "gate": False, "k": 0.3})),
    (sparsegated_ste, ("sparsegated", {"grad": "ste", "gate": False, "split": False})),
]


@pytest.mark.parametrize("by_hand, case", BY_HAND, ids=lambda v: getattr(v, "__name__", None))
def test_straight_through_gradients_by_hand(by_hand, case):
    name, options = case
    ffn, params = build(name, options)
    o = ref.options_of(name, options)
    x, c = inputs(6, D).requires_grad_(), inputs(6, D, seed=2)
    (ffn(x) * c).sum().backward()
    grads: dict = {}
    rows = zip(x.detach().numpy(), c.numpy(), strict=True)
    dx = np.stack([by_hand(params, xi, ci, o, grads) for xi, ci in rows])
    assert error(x.grad, dx) < 1e-11
    assert set(grads) == set(params)
    for n, p in ffn.named_parameters():
        assert error(p.grad, grads[n]) < 1e-11, n


def test_gate_by_hand_is_the_ste_gradient_at_the_kept_units_only():
    """In sparseglu the scores of cut units get no gradient with grad=gate, and one with grad=ste."""
    for grad, reach in (("gate", "kept"), ("ste", "all")):
        ffn, params = build("sparseglu", {"grad": grad})
        x = inputs(D)
        ffn(x[None, None]).sum().backward()
        kept = torch.from_numpy(ref.selected(params, x.numpy(), 0.25, 32, "topk")) > 0
        has = ffn.predictor[2].bias.grad != 0
        assert torch.equal(has, kept if reach == "kept" else torch.ones_like(kept))


# -- decode --------------------------------------------------------------------------------------


def test_which_ffns_decode():
    have = {n for n in NAMES if hasattr(make_ffn(n, D, H), "decode")}
    assert have == {"sparsegated", "sparseglu", "spark"}


@torch.no_grad()
def assert_decodes(ffn: nn.Module, d: int, tol: float, dtype) -> None:
    for shape in ((1, 1, d), (4, 1, d), (1, 3, d)):
        x = inputs(*shape, seed=shape[0], dtype=dtype)
        want, got = ffn(x), ffn.decode(x)
        assert got.dtype == want.dtype
        scale = want.abs().max().clamp(min=1e-30)
        assert got.shape == want.shape
        assert ((got - want).abs().max() / scale).item() < tol


@pytest.mark.parametrize("case", DECODES, ids=case_ids)
def test_decode_is_forward(case):
    """They agree for one and a few tokens, and after each way of changing the weights."""
    # sparsemax's threshold is a small difference of sums, which forward and decode round differently.
    tol = 1e-5 if case[1].get("select") == "sparsemax" else 3e-6
    ffn, _ = build(*case)
    assert_decodes(ffn, D, 1e-12, torch.float64)
    other, params = build(*case, dtype=torch.float32, seed=5)
    ffn = ffn.float()
    assert_decodes(ffn, D, tol, torch.float32)
    ffn.load_state_dict(other.state_dict())
    assert_decodes(ffn, D, tol, torch.float32)
    x = inputs(1, 1, D, dtype=torch.float32)
    with torch.no_grad():
        assert error(ffn.decode(x), expected(*case, params, x)) < 1e-5  # the new weights
        for p in ffn.parameters():
            p.add_(0.3 * torch.sin(torch.arange(p.numel())).view(p.shape))
    assert_decodes(ffn, D, tol, torch.float32)
    optimizer = torch.optim.AdamW([p for p in ffn.parameters() if p.requires_grad], lr=0.1)
    ffn(inputs(2, 3, D, dtype=torch.float32)).sum().backward()
    optimizer.step()
    assert_decodes(ffn, D, tol, torch.float32)
    # assign=True takes over row-major tensors as they are
    plain = {n: v.clone(memory_format=torch.contiguous_format) for n, v in ffn.state_dict().items()}
    ffn.load_state_dict(plain, assign=True)
    assert_decodes(ffn, D, tol, torch.float32)
    assert_decodes(copy.deepcopy(ffn), D, tol, torch.float32)


@pytest.mark.parametrize("h", [16, 48, 100, 1000])
@pytest.mark.parametrize("grad", ["hard", "gate"])
def test_decode_when_a_threshold_selects_none_or_all(h, grad):
    """A threshold selects a number of units that varies by token, which can be none or all."""
    for dtype in (torch.float32, torch.float64):
        # sparseglu: equal scores are never over their own mean
        ffn, _ = build("sparseglu", {"select": "stat", "grad": grad, "k": 0.3}, D, h, dtype)
        for value in (0.0, 0.1, -3.3, 7.7):
            set_scores(ffn, torch.full((h,), value, dtype=dtype))
            assert_decodes(ffn, D, 3e-6, dtype)
        # half of the scores far over the mean, and all but one
        for few in (h // 2, 1):
            set_scores(ffn, (torch.arange(h) >= few).to(dtype))
            assert_decodes(ffn, D, 3e-6, dtype)
        # spark: zero gate weights select no unit, a quantile below every gate selects all
        ffn, _ = build("spark", {"k": 0.3}, D, h, dtype)
        nn.init.zeros_(ffn.gate_proj.weight)
        x = inputs(1, 3, D, dtype=dtype)
        assert ffn.active(x) == 0
        assert ffn.decode(x).abs().max() == 0
        assert_decodes(ffn, D, 3e-6, dtype)
        ffn, _ = build("spark", {"k": 1 - 1e-9}, D, h, dtype)
        assert ffn.active(x) == 1
        assert_decodes(ffn, D, 3e-6, dtype)


def test_equal_scores_select_nothing_with_a_threshold():
    """A score must exceed the threshold: here all scores, their mean and their deviation are 0."""
    ffn, _ = build("sparseglu", {"select": "stat"})
    set_scores(ffn, torch.zeros(H))
    assert ffn(inputs(1, 3, D)).abs().max() == 0
    assert ffn.active(inputs(1, 3, D)) == 0


def test_what_is_inherited_does_not_count_beside_another_forward(monkeypatch):
    """decode would sample from the parent class's function, active and ideal_flops describe it. A decode
    of the class's own is used, and one that it inherits together with forward."""

    class Geglu(FFNS["sparseglu"]):
        def forward(self, x):
            mask = self.mask(self.score(x))
            return self.down_proj(F.gelu(self.gate_proj(x)) * self.up_proj(x) * mask)

    class Own(Geglu):
        def decode(self, x):
            return self(x)

    class Same(FFNS["sparseglu"]):
        def mask(self, score):
            return super().mask(-score)

    for cls, want in ((Geglu, False), (Own, True), (Same, True), (FFNS["swiglu"], False), (Odd, False)):
        monkeypatch.setitem(FFNS, "mine", cls)
        ffn = make_ffn("mine:n=1" if cls is Odd else "mine", D, H)
        assert model_module.has(ffn, "decode") == want, cls
    monkeypatch.setitem(FFNS, "mine", Geglu)
    gpt = stir(GPT(small(ffn="mine")))
    ffn = gpt.model.layers[0].mlp
    assert not model_module.has(ffn, "active")
    assert ffn_cost(ffn)["ideal_flops"] == ffn_cost(ffn)["flops"]
    monkeypatch.setattr(FFNS["sparseglu"], "decode", None)
    assert gpt.generate(tokens(1, 3), 5).shape == (1, 8)


@pytest.mark.parametrize("case", DECODES, ids=case_ids)
def test_decode_with_tied_scores(case):
    """Forward and decode break a tie the same way."""
    name, options = case
    ffn, _ = build(name, options, dtype=torch.float32)
    with torch.no_grad():
        if name == "sparseglu":
            set_scores(ffn, (torch.arange(H) % 2).float())
        else:
            layer = ffn.key_proj if name == "sparsegated" else ffn.gate_proj
            layer.weight.copy_(layer.weight[torch.arange(H) % 2])
    assert_decodes(ffn, D, 3e-6, torch.float32)


# -- compiled ------------------------------------------------------------------------------------


def outputs_and_gradients(ffns: nn.ModuleList, compiler) -> tuple[torch.Tensor, dict]:
    def outputs(x):
        return torch.stack([model_module.split_aux(ffn(x))[0] for ffn in ffns])

    x = inputs(2, 10, D, dtype=torch.float32).requires_grad_()
    y = compiler(outputs)(x)
    ffns.zero_grad()
    (y * inputs(*y.shape, seed=3, dtype=torch.float32)).sum().backward()
    grads = {n: p.grad.clone() for n, p in ffns.named_parameters() if p.grad is not None}
    return y.detach(), grads | {"x": x.grad}


def assert_compiled_is_eager(ffns: list[nn.Module], **how) -> None:
    """Outputs and gradients agree in float32, and the graph has no breaks."""
    torch.compiler.reset()
    ffns = nn.ModuleList(ffns)
    eager, eager_grads = outputs_and_gradients(ffns, lambda f: f)
    compiled, compiled_grads = outputs_and_gradients(
        ffns, lambda f: torch.compile(f, dynamic=False, fullgraph=True, **how)
    )
    for ffn, a, b in zip(ffns, eager, compiled, strict=True):
        assert error(b, a) < 1e-5, ffn
    assert compiled_grads.keys() == eager_grads.keys()
    for n, g in eager_grads.items():
        assert error(compiled_grads[n], g) < 2e-5, n


@needs_compiler
@pytest.mark.timeout(900)
def test_compiled_is_eager():
    """Inductor's generated code agrees with eager too. Only two FFNs are compiled, because each takes
    the C++ compiler many seconds."""
    cases = [("spark", {}), ("sparseglu", {"grad": "ste"})]
    assert_compiled_is_eager([build(*case, dtype=torch.float32)[0] for case in cases])


@needs_compiler
def test_a_second_copy_of_the_file_leaves_the_operators_of_the_first(tmp_path, monkeypatch):
    """An exported model may be opened beside this one. An operator of the same name would replace the
    first copy's, which would then call the other's code or freed memory."""
    path = tmp_path / "copied.py"
    edited = "    return torch.zeros_like(score)\n    mask, found = compiled_count()"
    path.write_text(Path(model_module.__file__).read_text().replace(edited.partition("\n")[2], edited))
    monkeypatch.syspath_prepend(tmp_path)
    copied = importlib.import_module("copied")
    torch.compiler.reset()
    for module, kept in [(model_module, 7), (copied, 0), (model_module, 7)]:
        select = torch.compile(module.top_k_mask, backend="eager", fullgraph=True)
        assert select(inputs(2, 10, H, dtype=torch.float32), 7).sum() == 20 * kept


@needs_compiler
@pytest.mark.timeout(900)
def test_compiled_selection_is_exact():
    """Compiled for a CPU, top-k counts instead of sorting. It must keep exactly k units and drop none
    that is larger than a kept one, whatever the size and sign of the scores."""
    score = np.random.default_rng(0).standard_normal((20, H)).astype(np.float32)
    score[:10] = score[:10].round()  # ties
    score[10] = 0
    score[11] = [-0.0, 0.0] * (H // 2)
    score[12:14] *= 1e-41  # subnormal
    score[14:16] *= 1e37
    score[16] = -3e38
    score[17:] = [[-1], [1], [-2]] * np.abs(score[17:])
    score[4, 5:45] = -np.inf  # as masked_fill leaves them
    score[5, 7:9] = np.inf
    torch.compiler.reset()
    ks = [1, 17, H]
    select = torch.compile(
        lambda x: [model_module.top_k_mask(x, k) for k in ks], dynamic=False, fullgraph=True
    )
    batch = torch.from_numpy(score).view(2, 10, H)  # a shape that is compiled for other tests too
    for k, mask in zip(ks, select(batch), strict=True):
        mask = mask.view(20, H)
        kept = mask.numpy() == 1
        assert ((mask.numpy() == 0) | kept).all()
        assert (kept.sum(-1) == k).all(), k
        least = np.where(kept, score, np.inf).min(-1)
        assert (least >= np.where(kept, -np.inf, score).max(-1)).all(), k


@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=needs_compiler)])
def test_sparsemax_is_the_nearest_point_of_the_simplex(compiled):
    """Nothing is negative, each row sums to 1, and one threshold is subtracted from all that is kept:
    for scores that spread much or little, equal ones, far from 0, and a single one."""
    f = torch.compile(model_module.sparsemax, dynamic=False) if compiled else model_module.sparsemax
    rng = np.random.default_rng(0)
    rows = [rng.normal(0, 10.0**e, (4, 40)) for e in (-4, -2, -1, 0, 1, 3)]
    rows += [np.zeros((1, 40)), np.repeat(rng.normal(0, 0.1, (4, 8)), 5, 1)]
    rows.append(rng.normal(500, 1, (4, 40)))
    z = np.concatenate(rows)
    y = f(torch.from_numpy(z).float()).numpy()
    assert (y >= 0).all()
    np.testing.assert_allclose(y.sum(-1), 1, atol=2e-4)  # near 500, a float32 ends at 3e-5
    expected = np.array([ref.sparsemax(row) for row in z.astype(np.float32).astype(np.float64)])
    np.testing.assert_allclose(y, expected, atol=1e-4)
    assert model_module.sparsemax(torch.tensor([[-7.0]])).tolist() == [[1.0]]


@all_cases
def test_masks_of_a_gpu_give_the_same(case, monkeypatch):
    """Masks are bool on a GPU and float on a CPU; outputs, gradients and active shares are the same."""

    def results(ffn: nn.Module) -> list[torch.Tensor]:
        x = inputs(2, 7, D).requires_grad_()
        leaves = [x, *(p for p in ffn.parameters() if p.requires_grad)]
        with torch.no_grad():
            active = ffn.active(x) if hasattr(ffn, "active") else x.sum()
        y = ffn(x)
        return [active, y, *torch.autograd.grad(y, leaves, inputs(2, 7, D, seed=2))]

    asked: list[torch.dtype] = []
    ffn, _ = build(*case)
    here = results(ffn)
    monkeypatch.setattr(model_module, "on_cpu", lambda x: bool(asked.append(x.dtype)))
    for there, want in zip(results(ffn), here, strict=True):
        assert torch.equal(there.double(), want)
    masked = case[0] in ("asg", "sparsegated", "sparseglu", "moe", "thresholdmoe")
    hard = case[1].get("sparse", True) and case[1].get("select") != "soft"
    assert bool(asked) == (masked and hard)


def test_masks_of_a_gpu_are_bool(monkeypatch):
    """The backward pass then keeps a quarter of the bytes of float32 masks."""
    monkeypatch.setattr(model_module, "on_cpu", lambda x: False)
    score = inputs(3, 20)
    for mask in (model_module.top_k_mask(score, 5), model_module.above_zero(score)):
        assert mask.dtype == torch.bool


def test_only_a_cpu_decodes_token_by_token(monkeypatch):
    """A GPU, which was slower at gathering a few rows than at reading all, generates by forward."""
    gpt, calls = stir(GPT(small(ffn="sparseglu"))), []
    decode = type(gpt.model.layers[0].mlp).decode
    monkeypatch.setattr(
        type(gpt.model.layers[0].mlp), "decode", lambda self, x: calls.append(x) or decode(self, x)
    )
    here = gpt.generate(tokens(1, 3), 5, temperature=0.0)
    assert len(calls) == 4 * gpt.config.n_layer  # the first token comes from the prompt's pass
    monkeypatch.setattr(model_module, "on_cpu", lambda x: False)
    assert torch.equal(gpt.generate(tokens(1, 3), 5, temperature=0.0), here)
    assert len(calls) == 4 * gpt.config.n_layer


MORE_SPECS = ["moe:k=2:balance=loss", "sparseglu:select=stat", "sparseglu:select=sparsemax"]
MORE_SPECS += ["sparseglu:select=soft", "sparseglu:ramp=10", "sparsegated:select=adaptive"]


@pytest.mark.skipif(not torch.backends.cuda.is_built(), reason="needs a CUDA build, though no GPU")
@pytest.mark.parametrize(
    "spec, training",
    [*((s, True) for s in [*NAMES, *MORE_SPECS]), *((s, False) for s in ("moe", "thresholdmoe"))],
)
def test_every_ffn_fits_cuda_autocast_and_one_graph(spec, training):
    """Autocast makes other results float32 on CUDA than on a CPU, powers for example, and a grouped
    product of experts then refused its operands. What CUDA alone runs must be traced whole, too.
    PyTorch propagates types and traces without a GPU."""
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.fx.experimental.symbolic_shapes import ShapeEnv

    torch.compiler.reset()
    with FakeTensorMode(shape_env=ShapeEnv()):
        with torch.device("cuda"):
            ffn = make_ffn(spec, 64, 72).train(training)
            x = torch.randn(2, 16, 64)
        traced = torch.compile(ffn, backend="eager", dynamic=False, fullgraph=True)
        torch.set_autocast_enabled("cuda", True)  # torch.autocast would want a GPU
        torch.set_autocast_dtype("cuda", torch.bfloat16)
        try:
            for run in (ffn, traced):
                y = model_module.split_aux(run(x))[0]
                assert y.device.type == "cuda"
                assert y.shape == x.shape
        finally:
            torch.set_autocast_enabled("cuda", False)


PRODUCTS = {  # of a (6, 40), b (40, 24), c (24,)
    "plain": lambda a, b, c: a @ b,
    "with a bias": lambda a, b, c: torch.addmm(c, a, b),
    "with one number as bias": lambda a, b, c: torch.addmm(c[:1], a, b),
    "with a matrix as bias": lambda a, b, c: torch.addmm(c.repeat(6, 1), a, b),
    "with a column as bias": lambda a, b, c: torch.addmm(b[:24, 3], a, b),
    "with one number repeated as bias": lambda a, b, c: torch.addmm(c[3:4].expand(24), a, b),
    "scaled": lambda a, b, c: torch.addmm(c, a, b, alpha=2, beta=0.5),
    "a linear layer of three dimensions": lambda a, b, c: F.linear(a.view(2, 3, 40), b.t(), c),
    "transposed": lambda a, b, c: b.t() @ a.t(),
    "a slice": lambda a, b, c: a[:, 3:33] @ b[3:33],
    "every other column": lambda a, b, c: a[:, ::2] @ b[::2],
    "one row, repeated": lambda a, b, c: a[:1].expand(6, 40) @ b,
    "one row": lambda a, b, c: a[:1] @ b,
    "one column": lambda a, b, c: a @ b[:, :1],
    "an outer product": lambda a, b, c: a[:, :1] @ b[:1],
    "no rows": lambda a, b, c: torch.addmm(c, a[:0], b),
    "nothing to sum": lambda a, b, c: a[:, :0] @ b[:0],
}


@needs_compiler
@pytest.mark.timeout(900)
@pytest.mark.parametrize("cpu", ["AVX512", "AVX2"])
def test_compiled_products_are_right(cpu, monkeypatch):
    """On a CPU with AVX-512 compiled matrix products go to oneDNN, which refuses or miscomputes some
    shapes. Forward and backward must agree with float64, and oneDNN must really be called. With AVX2 it
    would take a fifth longer than MKL, but for the products of one row."""
    few = {name: PRODUCTS[name] for name in ("plain", "with a bias", "one row")}
    chosen = PRODUCTS if cpu == "AVX512" else few
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: cpu)
    torch.compiler.reset()  # or the first CPU's graph would be the second's
    rng = np.random.default_rng(0)
    leaves = [rng.standard_normal(shape) for shape in ((6, 40), (40, 24), (24,))]
    ones = [torch.tensor(x, dtype=torch.float32, requires_grad=True) for x in leaves]
    wide = [torch.tensor(x, dtype=torch.float64, requires_grad=True) for x in leaves]

    def products(a, b, c):
        return [f(a, b, c) for f in chosen.values()]

    with torch.profiler.profile() as profile:
        got = model_module.compiled(products, CPU)(*ones)
    called = {event.key: event.count for event in profile.key_averages()}
    calls = called.get("mkldnn::_linear_pointwise", 0)
    assert calls == 0 if not HAS_MKL else calls > 8 if cpu == "AVX512" else calls == 1
    for name, y, z in zip(chosen, got, products(*wide), strict=True):
        assert y.shape == z.shape
        assert torch.allclose(y.double(), z, rtol=1e-5, atol=1e-5), name
    sum(y.square().sum() for y in got).backward()
    sum(z.square().sum() for z in products(*wide)).backward()
    for p, q in zip(ones, wide):
        assert torch.allclose(p.grad.double(), q.grad, rtol=1e-5, atol=1e-3)


@needs_compiler
@pytest.mark.timeout(900)
def test_compiled_experts_are_right_and_need_few_kernels(monkeypatch):
    """oneDNN makes a kernel for each new shape of a product. The numbers of tokens of the experts change
    with each batch, so rows come in eights."""
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
    eager = any_ffn("moe:n=2:share=0", 16, 64).train()
    moe = copy.deepcopy(eager)
    ready, xs = model_module.compiled(moe, CPU), [inputs(1, 104, 16, seed=i) for i in range(8)]
    with torch.profiler.profile(record_shapes=True) as profile:
        assert_training_passes_are_equal(ready, moe, eager, xs)
    if model_module.onednn_pass() is None:
        return  # products go to another library here
    events = [e for e in profile.events() if e.name == "mkldnn::_linear_pointwise"]
    sizes = {size for e in events for shape in e.input_shapes[:2] for size in shape} - {2}  # n
    assert len(sizes) > 4
    assert {size % 8 for size in sizes} == {0}


@needs_compiler
@pytest.mark.timeout(900)
def test_a_model_is_compiled_once_and_its_step_copies_no_operand(monkeypatch):
    """Another run takes the traced model from PyTorch's cache, autograd.Function and inner autocast
    included, with equal bits. A class of the same name with other code is compiled anew.

    oneDNN copies a first operand that is not contiguous, on one core, so the compiler must write it
    contiguous. The gradient of lm_head must not be copied into another layout either."""
    from torch._dynamo.utils import counters

    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
    original = FFNS["dynamicgeglu"]

    def scaled(factor: float) -> type[nn.Module]:
        class Mine(original):
            def forward(self, x):
                return factor * super().forward(x)

        return Mine

    def ready(f) -> Callable:
        torch._dynamo.reset()
        counters.clear()
        return model_module.compiled(f, CPU)

    def found() -> dict:
        return {name: n for name, n in counters["aot_autograd"].items() if "autograd_cache" in name}

    factor = 1 + int.from_bytes(os.urandom(3), "little") / 2**26  # so that no cache has this model yet
    monkeypatch.setitem(FFNS, "dynamicgeglu", scaled(factor))
    idx, targets = torch.arange(64).view(2, 2, 16)
    results, missed = [], {"autograd_cache_miss": 1, "autograd_cache_saved": 1}
    for want in (missed, {"autograd_cache_hit": 1}):
        gpt = GPT(GPTConfig(16, 128, 1, 2, 2, 32, "dynamicgeglu", 64))
        run = ready(gpt)
        loss = run(idx, targets)[1]
        loss.backward()
        results.append([loss.detach(), *(p.grad.clone() for p in gpt.parameters())])
        assert found() == want
    assert all(map(torch.equal, *results))
    assert torch.allclose(loss, gpt(idx, targets)[1])
    if model_module.onednn_pass():  # else products go to another library
        with torch.profiler.profile(record_shapes=True) as profile:
            run(idx, targets)[1].backward()
        calls = {event.name for event in profile.events()}
        copied = [event.input_shapes for event in profile.events() if event.name == "aten::copy_"]
        assert "mkldnn::_linear_pointwise" in calls
        assert [shapes for shapes in copied if len(shapes[0]) == 2] == []
    outputs, x = [], inputs(2, 16, 32, dtype=torch.float32)
    for times in (1, 2):
        monkeypatch.setitem(FFNS, "dynamicgeglu", scaled(times * factor))
        with torch.no_grad():
            outputs.append(ready(any_ffn("dynamicgeglu", 32, 64))(x))
        assert found() == missed
    assert error(outputs[1], 2 * outputs[0]) < 1e-6


@needs_compiler
@pytest.mark.timeout(900)
def test_compiling_without_private_names(monkeypatch):
    """Where PyTorch lacks a private name that `compiled` uses, its own products give the same results.
    recompute, which needs such a name, is refused."""
    import torch._dynamo
    import torch._functorch.config as functorch
    import torch._inductor.config as inductor

    class Lacks:
        """A settings module without the names that `compiled` sets; an empty one if config is None."""

        def __init__(self, config=None):
            self.config = config

        def __getattr__(self, name):
            ours = "capture_|unsafe_marked|autograd_cache_allow|backward_pass|ban_recompute|post_grad"
            if re.match(ours, name):
                raise AttributeError(name)
            return getattr(self.config, name)

    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
    model_module.compiled(torch.sin, CPU)  # imports all that it takes
    a, b, c = torch.randn(6, 40), torch.randn(40, 24), torch.randn(24)
    try:
        for lacks in ("pass", "operator", "settings"):
            torch.compiler.reset()
            model_module.onednn_pass.cache_clear()
            with monkeypatch.context() as patch:
                if lacks == "pass":
                    patch.setitem(sys.modules, "torch._inductor.custom_graph_pass", None)
                if lacks == "operator":
                    patch.setattr(torch.ops, "mkldnn", Lacks())
                if lacks == "settings":
                    for package in (torch._dynamo, torch._functorch, torch._inductor):
                        patch.setattr(package, "config", Lacks(package.config))
                    with pytest.raises(UserError, match="--recompute=False"):
                        model_module.compiled(torch.addmm, CPU, recompute=True)
                assert model_module.onednn_pass() is None, lacks
                ready = model_module.compiled(torch.addmm, CPU)
            with torch.profiler.profile() as profile:
                torch.testing.assert_close(ready(c, a, b), torch.addmm(c, a, b))
            assert "mkldnn::_linear_pointwise" not in {event.key for event in profile.key_averages()}
    finally:
        model_module.onednn_pass.cache_clear()
    assert (model_module.onednn_pass() is not None) == HAS_MKL
    assert functorch.ban_recompute_materialized_backward
    assert inductor.unsafe_marked_cacheable_functions


@needs_compiler
@pytest.mark.timeout(900)
def test_recomputing_changes_no_gradient_and_keeps_less():
    """A layer keeps fewer bytes for its backward pass; outputs and gradients are equal."""
    import torch._functorch.config as functorch

    kept, results = {}, {}
    before = functorch.ban_recompute_materialized_backward
    try:
        for recompute in (False, True):
            torch.compiler.reset()
            ffn = any_ffn("dynamicgeglu")
            model_module.compiled(ffn, CPU, recompute=recompute)  # which tells what splits the graph
            ready = torch.compile(ffn, backend="aot_eager_decomp_partition", dynamic=False)
            seen: dict[int, int] = {}

            def pack(t, seen=seen):
                seen[t.data_ptr()] = t.nbytes
                return t

            with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
                y = ready(inputs(4, 48, D, dtype=torch.float32).requires_grad_())
            y.square().sum().backward()
            kept[recompute] = sum(seen.values())
            results[recompute] = [y.detach(), *(p.grad for p in ffn.parameters())]
    finally:
        functorch.ban_recompute_materialized_backward = before
    assert kept[True] < 0.9 * kept[False]
    for got, want in zip(results[True], results[False], strict=True):
        assert error(got, want) < 1e-5


def test_what_compiling_raises_becomes_one_line(monkeypatch):
    """A broken backend and a missing C++ compiler give one line; other errors pass unchanged."""

    def broken(graph, inputs):
        raise RuntimeError("not here\nand not there")

    torch.compiler.reset()
    with pytest.raises(UserError) as e, model_module.compile_errors():
        torch.compile(torch.sin, backend=broken)(torch.ones(3))
    assert str(e.value) == "torch.compile does not work here (not here): --compile=False"

    import torch._inductor.config as inductor
    from torch._inductor.utils import fresh_cache

    torch.compiler.reset()
    # Not by monkeypatch, which would hide the setting from the tests that follow.
    missing = inductor.patch({"cpp.cxx": (None, "no-such-compiler")})
    with missing, fresh_cache(), pytest.raises(UserError) as e, model_module.compile_errors():
        model_module.compiled(lambda x: x.sin().cos(), CPU)(torch.ones(3))
    assert "C++ compiler" in str(e.value)
    assert "--compile=False" in str(e.value)
    assert "\n" not in str(e.value)

    class Backend:
        def __call__(self, graph, inputs):
            raise torch.OutOfMemoryError("full")

    torch.compiler.reset()
    with pytest.raises(torch.OutOfMemoryError), model_module.compile_errors():
        torch.compile(torch.sin, backend=Backend())(torch.ones(3))
    for other in (torch.OutOfMemoryError("full"), UserError("x"), RuntimeError("y")):
        with pytest.raises(type(other)) as e, model_module.compile_errors():
            raise other
        assert e.value is other


# -- specs ---------------------------------------------------------------------------------------

BAD_SPECS = [  # (spec, d, h, what the one line must say)
    ("swiglo", 64, 64, ["swiglo", "did you mean swiglu?", "is its line in FFNS?", *NAMES]),
    ("", 64, 64, NAMES),
    ("SwiGLU", 64, 64, ["SwiGLU", *NAMES]),
    ("swiglu ", 64, 64, NAMES),
    ("__init__", 64, 64, NAMES),
    ("asg:treshold=neuron", 64, 64, ["did you mean threshold?", "sparse", "grad", "tau"]),
    ("asg:threshold=neurons", 64, 64, ["did you mean neuron?", "global", "fixed"]),
    ("asg:threshold=", 64, 64, ["global", "neuron", "fixed"]),
    ("asg:grad=gate", 64, 64, ["hard", "ste"]),
    ("asg:sparse=maybe", 64, 64, ["sparse", "True or False", "maybe"]),
    ("sparsegated:k=many", 64, 64, ["k", "number", "many"]),
    ("sparsegated:k=nan", 64, 64, ["k", "nan"]),
    ("sparsegated:gate", 64, 64, ["gate", "option=value"]),
    ("sparseglu:grad=soft", 64, 64, ["hard", "ste", "gate"]),
    ("sparseglu:select=top", 64, 64, ["did you mean topk?", "stat"]),
    ("sparseglu:r=1.5", 64, 64, ["r", "whole number"]),
    ("sparseglu:k=0.5:k=0.5", 64, 64, ["once"]),
    ("sparseglu:k=0.5:", 64, 64, ["select"]),
    ("sparseglu:d=3", 64, 64, ["option 'd'", "select"]),
    ("sparseglu:self=3", 64, 64, ["option 'self'"]),
    ("dsg:g=layer", 64, 64, ["neuron", "token"]),
    ("dsg:m=None", 64, 64, ["norm", "none"]),
    ("swiglu:k=1", 64, 64, ["swiglu", "'k'"]),
    ("multiscale", 64, 66, ["66", "4"]),
    ("dualgated", 64, 65, ["65"]),
    ("sparsegated:k=0", 64, 64, ["k"]),
    ("sparsegated:k=1.01", 64, 64, ["k"]),
    ("sparseglu:k=-0.5", 64, 64, ["k"]),
    ("sparseglu:k=2", 64, 64, ["k"]),
    ("sparseglu:k=0.001", 64, 64, ["k"]),
    ("sparseglu", 16, 64, ["r", "32", "16"]),
    ("sparseglu:r=-1", 64, 64, ["r"]),
    ("sparseglu:r=65", 64, 64, ["r"]),
    ("sparseglu:ramp=-1", 64, 64, ["ramp"]),
    ("sparseglu:select=soft:ramp=5", 64, 64, ["leave out"]),
    ("sparseglu:select=soft:k=1", 64, 64, ["k"]),
    ("sparseglu:select=sparsemax:grad=ste", 64, 64, ["leave out grad"]),
    ("sparsegated:select=adaptive:k=1", 64, 64, ["k"]),
    ("asg:threshold=input", 64, 64, ["grad=ste"]),
    ("moe:n=1", 64, 64, ["n >= 2"]),
    ("moe:k=9", 64, 64, ["k <= n"]),
    ("moe:k=0", 64, 64, ["1 <= k"]),
    ("moe:share=1", 64, 64, ["share"]),
    ("moe:share=-0.1", 64, 64, ["share"]),
    ("moe:k=3", 64, 64, ["32", "k = 3"]),
    ("thresholdmoe:k=5", 64, 64, ["32", "k = 5"]),
    ("moe:share=0.999", 64, 64, ["0 of h = 64"]),
    ("thresholdmoe:speed=1", 64, 64, ["option 'speed'"]),
    ("sparseglu:p=0", 64, 64, ["p"]),
    ("spark:k=1", 64, 64, ["k"]),
    ("spark:k=0", 64, 64, ["k"]),
    ("spark:r=64", 64, 64, ["r"]),
    ("spark:r=-1", 64, 64, ["r"]),
    ("swiglu", 0, 64, ["d"]),
    ("swiglu", 64, 0, ["h"]),
    ("swiglu,geglu", 64, 64, NAMES),
]


@pytest.mark.parametrize("spec, d, h, says", BAD_SPECS)
def test_a_bad_spec_is_one_line_with_the_cure(spec, d, h, says):
    with pytest.raises(UserError) as e:
        make_ffn(spec, d, h)
    text = str(e.value)
    assert "\n" not in text
    assert all(word in text for word in says), text


def test_a_new_idea_is_a_class_and_a_line(monkeypatch):
    """Spec, options, cost, match, init, training and generation need nothing more."""

    class Mine(nn.Module):
        def __init__(self, d: int, h: int, *, power: int = 2, flat: bool = False):
            super().__init__()
            self.up_proj = nn.Linear(d, h, bias=False)
            self.down_proj = nn.Linear(h, d, bias=False)
            self.gain = nn.Parameter(torch.full((h,), 0.5))
            self.power, self.flat = power, flat

        def forward(self, x):
            return self.down_proj(F.relu(self.up_proj(x)) ** self.power * self.gain)

    monkeypatch.setitem(FFNS, "mine", Mine)
    ffn = make_ffn("mine:power=3:flat=True", 16, 32)
    assert (ffn.power, ffn.flat) == (3, True)
    cost = {"params": 2 * 16 * 32 + 32, "flops": 4 * 16 * 32, "ideal_flops": 4 * 16 * 32}
    assert ffn_cost(ffn) == cost
    assert match_hidden("mine", 64, 128) == 192
    with pytest.raises(UserError, match="did you mean mine"):
        make_ffn("mime", 16, 32)
    gpt = GPT(small(ffn="mine"))
    assert gpt.model.layers[0].mlp.gain.eq(0.5).all()  # its own values stay
    assert torch.equal(gpt.model.embed_tokens.weight, GPT(small()).model.embed_tokens.weight)
    gpt(tokens(2, 9), tokens(2, 9))[1].backward()
    assert all(p.grad is not None for p in gpt.parameters())
    assert gpt.generate(tokens(1, 3), 4).shape == (1, 7)


class Odd(nn.Module):
    """A legitimate class with what no FFN of model.py has: untyped, required and Literal options, its
    own constants, attributes named like optional methods."""

    def __init__(
        self, d: int, h: int, *, n: int, rate=0.5, size: Literal[8, 16] = 8, any: object = None
    ):
        super().__init__()
        self.up_proj = nn.Linear(d, h)
        self.down_proj = nn.Linear(h, d, bias=False)
        self.order = nn.Parameter(torch.randperm(h), requires_grad=False)
        self.decode = nn.Linear(d, d)
        self.active = self.ideal_flops = self.flops = 3
        self.options = (n, rate, size)
        torch.ones(3).sum().item()  # the meta device cannot do this
        torch.rand(n)
        self.init_weights()

    def init_weights(self) -> None:
        nn.init.constant_(self.up_proj.bias, -2.0)
        nn.init.uniform_(self.up_proj.weight)

    def forward(self, x):
        return self.decode(self.down_proj(self.up_proj(x)[..., self.order]))


def test_odd_classes(monkeypatch):
    """Their options are read, and their own init_weights runs last and draws from the seed."""
    monkeypatch.setitem(FFNS, "odd", Odd)
    assert make_ffn("odd:n=2:rate=0.25:size=16", 16, 32).options == (2, 0.25, 16)
    for spec, says in {
        "odd": "missing a required.* 'n'", "odd:n=1:size=9": "valid: 8, 16",
        "odd:n=1:any=2": "type hint", "odd:n=1:rate=x": "a number",
    }.items():  # fmt: skip
        with pytest.raises(UserError, match=says):
            make_ffn(spec, 16, 32)
    config = small(ffn="odd:n=1", ffn_match="params")
    torch.manual_seed(1)
    a = GPT(config)
    torch.manual_seed(2)
    b = GPT(config)
    for x, y in zip(a.parameters(), b.parameters(), strict=True):
        assert torch.equal(x, y)
    other = GPT(dataclasses.replace(config, ffn="odd:n=7", n_layer=3)).model.layers
    first, second = (layer.mlp.up_proj.weight for layer in a.model.layers)
    assert torch.equal(other[1].mlp.up_proj.weight, second)  # whatever else was drawn
    assert not torch.equal(first, second)
    mlp = a.model.layers[0].mlp
    assert mlp.up_proj.bias.eq(-2).all()
    assert mlp.up_proj.weight.min() >= 0
    assert mlp.order.sort().values.equal(torch.arange(config.hidden))
    assert 0.01 < mlp.down_proj.weight.std() < 0.02
    assert ffn_cost(mlp)["flops"] == 2 * (2 * 32 * config.hidden + 32 * 32)
    assert a.generate(tokens(1, 3), 4).shape == (1, 7)  # by forward: decode is a layer here


@pytest.mark.parametrize(
    "size, spec, best",
    [  # parameters of h for d = 64; SwiGLU of 256 has 49,152
        (lambda d, h: h * (h // 16), "bent", 888),  # 48,840, and 49,776 at 896
        (lambda d, h: d * h * h // 64, "square", 224),  # 50,176, and 46,656 at 216
        (lambda d, h: 50_000, "constant", 256),
        (lambda d, h: 3 * d * h, "by 64", 256),
        (lambda d, h: 3 * d * h, "by 72", 288),  # 55,296, and 41,472 at 216
        (lambda d, h: 16 * (h + d), "thin", 3008),  # beyond 8 times SwiGLU's
    ],
)
def test_matching_what_is_no_line(monkeypatch, size, spec, best):
    """The closest multiple of 8 is found if parameters are not linear in h, or if some h are refused."""

    class Mine(nn.Module):
        def __init__(self, d: int, h: int):
            super().__init__()
            if spec.startswith("by") and h % int(spec[3:]):
                raise UserError(f"not {h}")
            self.w = nn.Parameter(torch.empty(size(d, h)))

    monkeypatch.setitem(FFNS, spec, Mine)
    match_hidden.cache_clear()
    assert match_hidden(spec, 64, 256) == best


# -- the hash of an FFN's code ---------------------------------------------------------------------

IDEA = '''
import math
import torch
from torch import nn
from model import FFNS, SwiGLU, linear

POWER = 2
TABLE = {}
TABLE["a"] = 3

def act(x):
    """Squared."""
    return base(x) ** POWER

def base(x):
    return torch.relu(x)  # a comment

def decorate(cls):
    return cls

class Base(nn.Module):
    def __init__(self, d, h):
        super().__init__()
        self.up_proj, self.down_proj = linear(d, h), linear(h, d)

@decorate
class Mine(Base):
    def forward(self, x):
        return self.down_proj(act(self.up_proj(x))) * TABLE["a"]

def factory(f):
    class Made(Base):
        def forward(self, x):
            return self.down_proj(f(self.up_proj(x)))

    return Made

class Other(SwiGLU):
    pass

FFNS["mine"] = Mine
FFNS["other"] = Other
FFNS["made"] = factory(act)
FFNS["typed"] = type("Typed", (Other,), {})
'''


def hashes(folder: Path, ffns=FFNS, **sources: str) -> dict[str, str]:
    """Write these sources into the folder, then return each FFN's ffn_code, which reads them anew."""
    for name, text in sources.items():
        (folder / f"{name}.py").write_text(text)
    return {ffn: model_module.ffn_code(ffn) for ffn in ffns}


def test_the_hash_sees_what_a_class_refers_to(tmp_path, monkeypatch):
    """The hash covers what a class calls, inherits or reads in its module, directly or not, but no
    comments, docstrings, layout or other FFNs. A class made by a function depends on all its module."""
    hashes(tmp_path, idea=IDEA)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    ffns = ["gelu", "mine", "other", "made", "typed"]
    for name in ffns[1:]:
        monkeypatch.setitem(FFNS, name, None)  # and so it is gone afterwards
    monkeypatch.setitem(sys.modules, "idea", None)
    del sys.modules["idea"]
    importlib.import_module("idea")
    was = hashes(tmp_path, ffns)
    assert len(set(was.values())) == len(was)
    assert all(len(code) == 16 for code in was.values())
    assert was["mine"] == "d2ae198c80506822"  # with Python 3.10 to 3.14
    mine, made = {"mine", "made", "typed"}, {"made", "typed"}
    for old, new, changed in [
        ("return torch.relu(x)", "return torch.tanh(x)", mine),
        ("POWER = 2", "POWER = 3", mine),
        ('TABLE["a"] = 3', 'TABLE["a"] = 4', mine),
        ("linear(h, d)", "linear(h, d).float()", mine),
        ("    return cls", "    return Base", mine),
        ("    pass", "    forward = None", {"other", *made}),
        ("factory(act)", "factory(base)", made),
        ("  # a comment", "", set()),
        ("Squared.", "The square.", set()),
        ("import math\n", "\n\nimport math\n", set()),
        ("import nn\n", "import fx, nn\n", made),
        ("import FFNS, SwiGLU, linear", "import FFNS, SwiGLU, linear, has", made),
        ("import FFNS, SwiGLU, linear", "import FFNS, SwiGLU, has as linear", mine),
    ]:
        assert IDEA.count(old) == 1
        now = hashes(tmp_path, ffns, idea=IDEA.replace(old, new))
        assert {name for name in was if was[name] != now[name]} == changed, old


def test_an_edit_of_model_py_changes_the_hash_of_what_it_concerns(tmp_path, monkeypatch):
    """It may be a helper, a base class or a kernel. A new class and its line change no other hash."""
    source = (ROOT / "model.py").read_text()
    monkeypatch.setattr(model_module, "__file__", str(tmp_path / "model.py"))
    was = hashes(tmp_path, model=source)
    edits = {
        "F.silu(self.gate_proj(x)) * self.up_proj(x))": "self.up_proj(x))",
        "norm(upcast(x)).norm(dim=-1": "norm(upcast(x)).norm(p=1, dim=-1",
        "mask[others] = ": "mask[~others] = ",
    }
    for some, (old, new) in zip(["multiscale", "dsg", "sparsegated"], edits.items(), strict=True):
        assert old in source
        now = hashes(tmp_path, [some, "gelu"], model=source.replace(old, new))
        assert was[some] != now[some]
        assert was["gelu"] == now["gelu"]
    new = source.replace("class GELU(", "class New(nn.Module):\n    pass\n\n\nclass GELU(")
    new = new.replace('    "gelu": GELU,\n', '    "gelu": GELU,\n    "new": New,\n')
    assert hashes(tmp_path, model=new) == was


# -- costs ---------------------------------------------------------------------------------------


def test_costs_of_what_is_used_twice_or_in_part(monkeypatch):
    """A tied weight counts as two products; a class with other products states their FLOPs itself."""

    class Mine(model_module.SwiGLU):
        def __init__(self, d: int, h: int):
            super().__init__(d, h)
            self.up_proj.weight = self.gate_proj.weight

    class Part(model_module.SwiGLU):
        def flops(self):
            return 2.0 * self.gate_proj.in_features * 3

        def ideal_flops(self):
            return 2.5 * 4

    monkeypatch.setitem(FFNS, "tied", Mine)
    monkeypatch.setitem(FFNS, "part", Part)
    want = {"params": 2 * 16 * 32, "flops": 6 * 16 * 32, "ideal_flops": 6 * 16 * 32}
    assert ffn_cost(make_ffn("tied", 16, 32)) == want
    cost = ffn_cost(make_ffn("part", 16, 32))
    assert (cost["flops"], cost["ideal_flops"]) == (96, 10)
    assert all(type(value) is int for value in cost.values())


def cost_by_hand(name: str, d: int, h: int, **options) -> tuple[int, int]:
    """(FLOPs executed, FLOPs ideally needed) per token: 2 per weight of each matrix product."""
    o = ref.options_of(name, options)
    dh = 2 * d * h
    if name in ("gelu", "relu2"):
        return 2 * dh, 2 * dh
    if name == "dsg":
        full = 3 * dh + (dh if o["g"] == "neuron" else 0)  # a product with one vector is not counted
        return full, full
    if name == "asg":
        return (4 * dh, 4 * dh) if o["sparse"] else (3 * dh, 3 * dh)
    if name == "sparsegated":
        keep, res = 2 * d * round(o["k"] * h), 2 * d * d * o["gate"]
        return (2 + o["split"]) * dh + res, dh + (1 + o["split"]) * keep + res
    if name == "sparseglu":
        predictor = 2 * ((o["r"] or d) * o["p"] + o["p"] * h)
        return 3 * dh + predictor, 3 * 2 * d * round(o["k"] * h) + predictor
    if name in ("moe", "thresholdmoe"):
        full = 2 * dh + 2 * d * o["n"]  # h units of ReLU2, and the router
        return full, full
    if name == "spark":
        r, keep = o["r"] or d // 2, round(o["k"] * h)
        return 2 * dh, 2 * r * h + 2 * (d - r) * keep + 2 * d * keep
    return 3 * dh, 3 * dh


def test_stacked_weights_cost_what_their_products_do(monkeypatch):
    """Experts in one parameter (n, d, h / n) have as many FLOPs, in the FFN and in a training step, as
    the same experts in matrices, and they count as parameters of the layers' matrices."""

    class Experts(nn.Module):
        def __init__(self, d: int, h: int):
            super().__init__()
            self.up = nn.Parameter(torch.randn(4, d, h // 4))
            self.down_proj = nn.Parameter(torch.randn(4, h // 4, d))

        def forward(self, x):
            hidden = torch.relu(torch.einsum("...d,ndh->...nh", x, self.up))
            return torch.einsum("...nh,nhd->...d", hidden, self.down_proj)

    monkeypatch.setitem(FFNS, "experts", Experts)
    assert ffn_cost(make_ffn("experts", 32, 64)) == ffn_cost(make_ffn("relu2", 32, 64))
    one, two = GPT(small(ffn="experts")), GPT(small(ffn="relu2"))
    assert one.param_counts() == two.param_counts()
    assert one.flops_per_token() == two.flops_per_token()
    mlp = one.model.layers[0].mlp
    assert mlp.up.std().item() == pytest.approx(0.02, rel=0.1)
    assert mlp.down_proj.std().item() == pytest.approx(0.02 / math.sqrt(2 * 2), rel=0.1)


@all_cases
def test_costs_by_hand(case):
    name, options = case
    for d, h in ((D, H), (64, 256)):
        cost = ffn_cost(make_ffn(spec_of(name, options), d, h))
        params = sum(math.prod(s) for s in ref.shapes(name, d, h, **options).values())
        flops, active = cost_by_hand(name, d, h, **options)
        assert cost == {"params": params, "flops": flops, "ideal_flops": active}
        assert all(type(v) is int for v in cost.values())


MATCHES = [*NAMES, "dsg:g=token", "asg:sparse=False", "sparsegated:split=False:k=0.5"]
MATCHES += ["sparsegated:gate=False", "dsg:m=none", "sparseglu:p=8", "spark:r=8"]


@pytest.mark.parametrize("spec", MATCHES)
def test_match_hidden_by_brute_force(spec):
    """The width is the multiple of 8 that comes closest to SwiGLU's parameters or FLOPs."""
    for d, hidden in ((64, 256), (96, 100)):
        with torch.device("meta"):
            target = ffn_cost(make_ffn("swiglu", d, hidden))
            costs = {h: ffn_cost(make_ffn(spec, d, h)) for h in range(8, 2 * hidden, 8)}
        for by in ("params", "flops"):
            off = {h: abs(cost[by] - target[by]) for h, cost in costs.items()}
            assert off[match_hidden(spec, d, hidden, by)] == min(off.values())
    assert match_hidden("swiglu", 64, 256) == 256


def test_a_model_matched_by_parameters_or_flops():
    for spec, match in itertools.product(("gelu", "asg", "sparseglu"), ("params", "flops")):
        gpt = GPT(small(ffn=spec, ffn_match=match))
        width = gpt.model.layers[1].mlp.up_proj.weight.size(0)
        assert width == match_hidden(spec, 32, 64, match) != 64
        assert GPT(small(ffn=spec)).model.layers[1].mlp.up_proj.weight.size(0) == 64


# -- the decoder ---------------------------------------------------------------------------------


def small(**changes) -> GPTConfig:
    shape = {"block_size": 48, "vocab_size": 101, "n_layer": 2, "n_head": 4, "n_kv_head": 2}
    return GPTConfig(**(shape | {"n_embd": 32, "ffn_hidden": 64} | changes))


def tokens(*shape: int, seed=0, vocab=101) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(seed).integers(0, vocab, shape))


@torch.no_grad()
def stir(gpt: nn.Module, seed=0) -> nn.Module:
    """Weights large enough that attention, gains and positions all show in the logits (at init
    attention is nearly uniform and a wrong rotary base would pass)."""
    rng = np.random.default_rng(seed)
    for _, p in sorted(gpt.named_parameters()):
        noise = torch.from_numpy(rng.standard_normal(p.shape)).to(p.dtype)
        if p.ndim >= 2:
            p.copy_(noise / math.sqrt(p.size(-1)))
        else:
            p.add_(0.4 * noise)
    return gpt


def sizes(config: GPTConfig) -> tuple[int, int, int]:
    """Parameters (in the layers' matrices, in the layers, in all), counted here, not by the model."""
    with torch.device("meta"):
        gpt = GPT(config)
    layers = dict(gpt.model.layers.named_parameters())
    matrices = sum(p.numel() for p in layers.values() if p.ndim == 2)
    total = {id(p): p.numel() for p in gpt.parameters()}
    return matrices, sum(p.numel() for p in layers.values()), sum(total.values())


def test_the_default_is_the_papers_134m_and_half_the_ffn_its_83m():
    assert sizes(GPTConfig()) == (134_217_728, 134_254_592, 160_010_752)
    assert 134_254_592 + 512 == 134_255_104  # with the final norm
    assert 20 * 134_217_728 == 640 * 2**22
    assert sizes(GPTConfig(ffn_hidden=1024))[0] == 83_886_080
    with torch.device("meta"):
        counts = GPT(GPTConfig()).param_counts()
    assert (counts["layers"], counts["total"]) == (134_217_728, 160_010_752)
    untied = sizes(GPTConfig(tie_embeddings=False))
    assert untied[2] == 160_010_752 + 50304 * 512


@pytest.mark.parametrize(
    "changes, says",
    [
        ({"n_head": 3}, "n_head"),
        ({"n_head": 32}, "n_embd"),  # a head of one channel cannot be rotated
        ({"n_kv_head": 3}, "n_kv_head"),
        ({"n_layer": 0}, "n_layer"),
        ({"vocab_size": 0}, "vocab_size"),
        ({"ffn": "swiglo"}, "did you mean swiglu"),
        ({"ffn": "multiscale", "ffn_hidden": 63}, "63"),
        ({"ffn_match": "wide"}, "ffn_match"),
    ],
)
def test_impossible_shapes_are_refused(changes, says):
    with pytest.raises(UserError, match=says):
        GPT(small(**changes))


def hugging_face(tie: bool, n_kv_head: int):
    transformers = pytest.importorskip("transformers")
    config = transformers.Qwen3Config(
        vocab_size=101,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=n_kv_head,
        head_dim=8,
        rms_norm_eps=1e-6,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6},
        max_position_embeddings=48,
        tie_word_embeddings=tie,
        attention_bias=False,
    )
    torch.manual_seed(0)
    return transformers.Qwen3ForCausalLM(config).eval()


@pytest.mark.parametrize("tie, n_kv_head", [(True, 4), (False, 2), (True, 1)])
def test_hugging_face_qwen3_gives_the_same_logits(tie, n_kv_head):
    """The state dict loads strictly in both directions, and the logits agree within 1e-4."""
    idx = tokens(2, 48)
    config = small(tie_embeddings=tie, n_kv_head=n_kv_head)
    ours, theirs = stir(GPT(config)), hugging_face(tie, n_kv_head)
    theirs.load_state_dict(ours.state_dict(), strict=True)
    with torch.no_grad():
        a, b = ours(idx)[0], theirs(idx).logits
    assert b.abs().max() > 1
    assert (a - b).abs().max() < 1e-4

    theirs, ours = stir(hugging_face(tie, n_kv_head), seed=7), GPT(config)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    with torch.no_grad():
        c, d = ours(idx)[0], theirs(idx).logits
    assert (c - d).abs().max() < 1e-4
    assert (c - a).abs().max() > 0.1  # these are other weights


def test_forward_returns_logits_or_loss():
    gpt = GPT(small())
    logits, loss = gpt(tokens(2, 9))
    assert logits.shape == (2, 9, 101)
    assert loss is None
    loss = gpt(tokens(2, 9), tokens(2, 9, seed=1))[1]
    assert loss.shape == ()
    assert loss.item() == pytest.approx(math.log(101), abs=0.1)


# -- the type of the residual stream ---------------------------------------------------------------


def streams(gpt: GPT, idx: torch.Tensor) -> set[torch.dtype]:
    """The dtypes of the residual stream between layers."""
    seen = set()
    hooks = [
        layer.register_forward_hook(lambda _, args, y: seen.update((args[0].dtype, y[0].dtype)))
        for layer in gpt.model.layers
    ]
    gpt(idx, idx)
    for hook in hooks:
        hook.remove()
    return seen


@every_ffn
def test_the_residual_stream_of_any_ffn_has_the_type_asked_for(name):
    """It is bfloat16 only if asked for and under autocast, whatever type an FFN returns."""
    for residual in ("float32", "bfloat16"):
        gpt = GPT(small(ffn=name, residual=residual))
        assert streams(gpt, tokens(2, 9)) == {torch.float32}
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert streams(gpt, tokens(2, 9)) == {getattr(torch, residual)}


def test_a_bfloat16_residual_changes_nothing_without_autocast():
    a, b = stir(GPT(small())), stir(GPT(small(residual="bfloat16")))
    idx = tokens(3, 40)
    assert torch.equal(a(idx)[0], b(idx)[0])
    for gpt in (a, b):
        gpt(idx, tokens(3, 40, seed=1))[1].backward()
    for p, q in zip(a.parameters(), b.parameters(), strict=True):
        assert torch.equal(p.grad, q.grad)


def test_losses_and_gradients_under_autocast_are_close():
    """With autocast the loss is within 1% of float32's. With a bfloat16 residual the gradients are at
    most twice as far from float32's as with autocast alone."""
    idx, targets = tokens(4, 48), tokens(4, 48, seed=1)
    gpt = stir(GPT(small()))
    exact = gpt(idx, targets)[1]
    exact.backward()
    want = torch.cat([p.grad.flatten() for p in gpt.parameters()])
    off = {}
    for residual in ("float32", "bfloat16"):
        gpt = stir(GPT(small(residual=residual)))
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = gpt(idx, targets)[1]
        assert loss.dtype == torch.float32
        assert loss.item() == pytest.approx(exact.item(), rel=0.01)
        loss.backward()
        assert all(p.grad.dtype == torch.float32 for p in gpt.parameters())
        got = torch.cat([p.grad.flatten() for p in gpt.parameters()])
        off[residual] = ((got - want).norm() / want.norm()).item()
    assert off["float32"] < off["bfloat16"] < min(0.05, 2 * off["float32"])


def test_norms_are_computed_in_float32(recwarn):
    """This includes norms of a bfloat16 residual, with and without autocast; nothing warns."""
    norm = model_module.RMSNorm(512)
    with torch.no_grad():
        norm.weight.add_(torch.randn(512, generator=torch.Generator().manual_seed(0)) / 3)
    x = inputs(9, 512, dtype=torch.float32).bfloat16()
    scale = (x.double().square().mean(-1, keepdim=True) + 1e-6).sqrt()
    want = x.double() / scale * norm.weight.double()
    for enabled in (False, True):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            y = norm(x)
        assert y.dtype == torch.float32
        assert error(y, want) < 1e-6
    with torch.autocast("cpu", dtype=torch.bfloat16):
        GPT(small(residual="bfloat16"))(tokens(2, 9), tokens(2, 9))[1].backward()
    assert [str(w.message) for w in recwarn] == []
    assert norm.double()(x.double()).dtype == torch.float64
    assert norm.bfloat16()(x).dtype == torch.bfloat16


# -- loss ----------------------------------------------------------------------------------------


def plain_loss(gpt, idx, targets):
    return F.cross_entropy(gpt(idx)[0].flatten(0, 1), targets.flatten(), ignore_index=-100)


@pytest.mark.parametrize("tie", [True, False])
@pytest.mark.parametrize(
    "vocab, shape", [(101, (3, 17)), (50257, (1, 1))], ids=lambda v: str(v)
)
def test_loss_and_gradients_equal_cross_entropy(tie, vocab, shape, monkeypatch):
    """Several targets make several chunks of uneven size, and some targets are ignored. The loss is
    scaled and two backward passes are summed, as with gradient accumulation."""
    monkeypatch.setitem(model_module.LOSS_CHUNK_BYTES, "cpu", 4 * vocab * 10)
    size = {"n_embd": 8, "n_head": 2, "n_kv_head": 1, "n_layer": 1, "block_size": 256}
    gpt = stir(GPT(small(vocab_size=vocab, tie_embeddings=tie, **size)))
    idx, targets = tokens(*shape, vocab=vocab), tokens(*shape, seed=1, vocab=vocab)
    if targets.numel() > 9:
        targets[0, 3:9] = -100
        targets[:, -1] = -100
    plain = plain_loss(gpt, idx, targets)
    (0.37 * plain).backward()
    want = {n: p.grad.clone() for n, p in gpt.named_parameters()}
    gpt.zero_grad()
    loss = gpt(idx, targets)[1]
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(plain.item(), rel=1e-6)
    with torch.no_grad():
        assert gpt(idx, targets)[1].item() == pytest.approx(plain.item(), rel=1e-6)
    (0.12 * loss).backward()
    (0.25 * gpt(idx, targets)[1]).backward()
    assert {n for n, p in gpt.named_parameters() if p.grad is not None} == set(want)
    for n, p in gpt.named_parameters():
        assert error(p.grad, want[n]) < 2e-5, n


def test_loss_gradients_in_float64():
    """They agree within 1e-11, so no constant of the backward pass is rounded to float32."""
    gpt = stir(GPT(small())).double()
    idx, targets = tokens(3, 11), tokens(3, 11, seed=1)
    targets[1, 2:5] = -100
    plain_loss(gpt, idx, targets).backward()
    want = {n: p.grad.clone() for n, p in gpt.named_parameters()}
    gpt.zero_grad()
    gpt(idx, targets)[1].backward()
    for n, p in gpt.named_parameters():
        assert error(p.grad, want[n]) < 1e-11, n


def test_a_batch_without_targets_costs_nothing_and_is_finite():
    """The padded last batch of an evaluation may be all -100 on a rank."""
    gpt = GPT(small())
    targets = torch.full((2, 9), -100)
    loss = gpt(tokens(2, 9), targets)[1]
    assert loss.item() == 0
    loss.backward()
    assert all(p.grad is None or p.grad.abs().max() == 0 for p in gpt.parameters())
    with torch.no_grad():
        assert gpt(tokens(2, 9), targets)[1].item() == 0


def test_the_weights_gradient_is_summed_in_float32(monkeypatch):
    """A sum of a thousand chunks in bfloat16 would drift: it ends where a chunk no longer counts."""
    monkeypatch.setitem(model_module.LOSS_CHUNK_BYTES, "cpu", 4 * 8 * 4)
    x, weight = inputs(4096, 8).abs(), inputs(8, 8, seed=2)
    targets = torch.zeros(4096, dtype=torch.long)
    want = weight.clone().requires_grad_()
    F.cross_entropy(x @ want.T, targets).backward()
    got = weight.bfloat16().requires_grad_()
    model_module.linear_cross_entropy(x.bfloat16(), got, targets).backward()
    assert error(got.grad, want.grad) < 0.01


# -- an auxiliary loss, and the progress of the run ------------------------------------------------


class WithAux(FFNS["swiglu"]):
    """SwiGLU with a penalty on its output."""

    def forward(self, x):
        y = super().forward(x)
        return y, y.square().mean()


def test_aux_is_the_sum_over_the_layers_and_apart_from_the_loss(monkeypatch):
    monkeypatch.setitem(FFNS, "aux", WithAux)
    gpt, plain = stir(GPT(small(ffn="aux"))), stir(GPT(small()))
    idx, targets = tokens(2, 9), tokens(2, 9, seed=1)
    seen = []
    for layer in gpt.model.layers:
        layer.mlp.register_forward_hook(lambda _, args, y: seen.append(y[0].square().mean()))
    aux, loss = gpt(idx, targets, with_aux=True)
    assert aux.shape == ()
    assert aux.item() == pytest.approx(sum(seen).item(), rel=1e-6)
    assert torch.equal(loss, plain(idx, targets)[1])
    assert plain(idx, targets, with_aux=True)[0] is None
    first, second = gpt(idx, targets)
    assert first is None
    assert torch.equal(second, loss)
    assert torch.equal(gpt(idx)[0], plain(idx)[0])
    down = gpt.model.layers[0].mlp.down_proj.weight
    (aux_grad,) = torch.autograd.grad(aux, down, retain_graph=True)
    (grad,) = torch.autograd.grad(loss, down)
    assert aux_grad.abs().sum() > 0
    assert not torch.allclose(aux_grad, grad)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert gpt(idx, targets, with_aux=True)[0].dtype == torch.float32
    check_ffns(gpt)
    want = gpt.generate(tokens(1, 3), 9, temperature=0.0)
    assert torch.equal(want, plain.generate(tokens(1, 3), 9, temperature=0.0))


def test_an_aux_that_is_no_scalar_is_one_line(monkeypatch):
    """In compiled code, too."""
    for bad in (lambda y: y.mean(-1), lambda y: 0.5, lambda y: y.mean()[None], lambda y: "x"):

        def forward(self, x, bad=bad):
            return x, bad(x)

        monkeypatch.setitem(FFNS, "bad", with_method(forward=forward))
        torch.compiler.reset()
        split = torch.compile(lambda y, bad=bad: model_module.split_aux((y, bad(y))), backend="eager")
        for run, given in ((GPT(small(ffn="bad")), tokens(2, 9)), (split, torch.ones(2, 9, D))):
            with pytest.raises(UserError, match="aux a tensor without dimensions") as e:
                run(given)
            assert "\n" not in str(e.value)


def test_a_set_progress_that_fails_is_one_line(monkeypatch):
    fails = with_method(set_progress=lambda self, step, max_iters: step / 0)
    monkeypatch.setitem(FFNS, "fails", fails)
    with pytest.raises(UserError, match=r"model.layers.0.mlp.set_progress \(division by zero\)"):
        GPT(small(ffn="fails")).set_progress(1, 2)


# -- what an FFN does with the tokens of a sequence -----------------------------------------------


def swiglu_on(change, zero=False):
    """A SwiGLU whose input or output is changed; with `zero` its output starts as zero."""

    class Changed(FFNS["swiglu"]):
        def forward(self, x):
            return change(super().forward, x)

    if zero:
        Changed.init_weights = lambda self: nn.init.zeros_(self.down_proj.weight)
    return Changed


class ConvGLU(FFNS["swiglu"]):
    """SwiGLU after a causal convolution over the tokens, which starts as the identity."""

    def __init__(self, d: int, h: int, *, back: int = 3):
        super().__init__(d, h)
        self.back = back
        self.conv = nn.Conv1d(d, d, back + 1, groups=d, bias=False)

    def init_weights(self) -> None:
        nn.init.zeros_(self.conv.weight)
        self.conv.weight[:, :, -1] = 1

    def forward(self, x):
        return super().forward(self.conv(F.pad(x.transpose(1, 2), (self.back, 0))).transpose(1, 2))


def norm_over_tokens(f, x):
    return f((x - x.mean(1, keepdim=True)) / x.std(1, keepdim=True))


@pytest.mark.parametrize("zero", [False, True])
@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize(
    "change",
    [
        lambda f, x: f(x + x.flip(1)),
        lambda f, x: f(x) + 0.1 * f(x).mean(1, keepdim=True),
        lambda f, x: f(x) + torch.cat((x[:, 1:], x[:, :1]), 1),
        norm_over_tokens,
        lambda f, x: (f(x.cumsum(1).flip(1)), x.mean()),
        lambda f, x: f(x.unflatten(1, (-1, 2)).flip(2).flatten(1, 2)),  # borders at all even tokens
        lambda f, x: f(x + x.unflatten(1, (2, -1)).mean(2).repeat_interleave(x.size(1) // 2, 1)),
        lambda f, x: f(x + x.mean(0, keepdim=True)),  # of the batch
    ],
)
def test_an_ffn_that_sees_the_future_is_named(monkeypatch, change, bf16, zero):
    """It is named also if its output starts as zero, or if only the second layer does it."""
    monkeypatch.setitem(FFNS, "mine", swiglu_on(change, zero))
    autocast = functools.partial(torch.autocast, "cpu", dtype=torch.bfloat16, enabled=bf16)
    gpt = GPT(small(ffn="mine"))
    with pytest.raises(UserError, match=r"model\.layers\.0\.mlp sees the future") as e:
        check_ffns(gpt, autocast)
    assert "\n" not in str(e.value)
    assert gpt.training
    gpt.model.layers[0].mlp = make_ffn("geglu", 32, 64)
    with pytest.raises(UserError, match=r"model\.layers\.1\.mlp sees the future"):
        check_ffns(gpt, autocast)


@pytest.mark.parametrize(
    "change, says",
    [
        (lambda f, x: f(x).mean(-1, keepdim=True), r"\(1, 48, 1\)"),
        (lambda f, x: f(x).mean(1, keepdim=True), r"\(1, 1, 32\)"),
        (lambda f, x: f(x)[..., :31], r"\(1, 48, 31\)"),
        (lambda f, x: f(x)[0], r"\(48, 32\)"),
        (lambda f, x: (f(x) > 0).long(), "int64"),
        (lambda f, x: None, "an FFN returns y"),
        (lambda f, x: (f(x), None, None), "an FFN returns y"),
    ],
)
def test_an_output_unlike_the_input_is_named(monkeypatch, change, says):
    monkeypatch.setitem(FFNS, "mine", swiglu_on(change))
    gpt = GPT(small(ffn="mine"))
    with pytest.raises(UserError, match=says) as e:
        check_ffns(gpt)
    assert "\n" not in str(e.value)
    assert not any(layer.mlp._forward_hooks for layer in gpt.model.layers)


@pytest.mark.parametrize("block_size", [1, 2, 48])
def test_checking_leaves_no_traces(block_size):
    """Random state, mode and weights stay the same, also for sequences of one token."""
    gpt = GPT(small(ffn="dsg", block_size=block_size))
    before, torch_state = digest(gpt), torch.get_rng_state()
    check_ffns(gpt)
    assert gpt.mixes_tokens is False
    assert torch.equal(torch.get_rng_state(), torch_state)
    assert digest(gpt) == before
    assert gpt.training


def test_a_future_that_is_far_is_seen(monkeypatch):
    """A hundred tokens ahead; and a sequence that is too long is refused by both of its numbers."""
    ahead = lambda f, x: f(x + F.pad(x, (0, 0, 0, 100))[:, 100:])  # noqa: E731
    monkeypatch.setitem(FFNS, "mine", swiglu_on(ahead))
    gpt = GPT(small(ffn="mine", block_size=256, n_layer=1))
    with pytest.raises(UserError, match="sees the future"):
        check_ffns(gpt)
    with pytest.raises(UserError, match="257 tokens are more than block_size=256"):
        gpt(tokens(1, 257))


def test_other_sequences_before_and_the_number_of_tokens_are_seen(monkeypatch):
    """A row of the batch may read the one before it, and an output may depend on how long a text is."""
    previous = lambda f, x: f(x + F.pad(x, (0, 0, 0, 0, 1, 0))[:-1])  # noqa: E731
    monkeypatch.setitem(FFNS, "mine", swiglu_on(previous))
    with pytest.raises(UserError, match="other sequences"):
        check_ffns(GPT(small(ffn="mine")))
    monkeypatch.setitem(FFNS, "mine", swiglu_on(lambda f, x: f(x) * math.log(x.size(1) + 1)))
    gpt = GPT(small(ffn="mine"))
    check_ffns(gpt)
    assert gpt.mixes_tokens is True
    gain = torch.ones(gpt.config.block_size, 1)  # an FFN may take texts of one length only
    monkeypatch.setitem(FFNS, "mine", swiglu_on(lambda f, x: f(gain * x)))
    gpt = GPT(small(ffn="mine"))
    check_ffns(gpt)
    assert gpt.mixes_tokens is True


def test_noise_is_not_the_future(monkeypatch):
    """An FFN that draws new random numbers at each call, in evaluation too, passes the check."""
    monkeypatch.setitem(FFNS, "mine", swiglu_on(lambda f, x: f(x) * torch.rand_like(x)))
    gpt = GPT(small(ffn="mine"))
    check_ffns(gpt)


def test_the_future_is_seen_where_noise_in_the_parameters_makes_nan(monkeypatch):
    class Mine(FFNS["swiglu"]):
        def __init__(self, d, h):
            super().__init__(d, h)
            self.eps = nn.Parameter(torch.full((d,), 1e-3))

        def forward(self, x):
            return super().forward(x + x.mean(1, keepdim=True) * self.eps.sqrt())

    monkeypatch.setitem(FFNS, "mine", Mine)
    with pytest.raises(UserError, match="sees the future"):
        check_ffns(GPT(small(ffn="mine")))


@pytest.mark.parametrize("spec", FFNS)
def test_ours_depend_on_no_other_token(spec):
    """Nor on a position or another sequence: so they generate with a cache."""
    ffn = make_ffn(spec, D, H).eval()
    assert model_module.influences(ffn, torch.empty(1, 256, D)) == (False, False)


def test_an_ffn_that_depends_on_the_position_generates_right(monkeypatch):
    """Without a cache, which would give it position 0 for every new token."""

    def forward(f, x):
        return f(x) * torch.linspace(1, 4, 16)[: x.size(1), None]

    monkeypatch.setitem(FFNS, "mine", swiglu_on(forward))
    gpt = GPT(small(ffn="mine", block_size=16, tie_embeddings=False))
    check_ffns(gpt)
    assert gpt.mixes_tokens is True
    stir(gpt)
    idx = tokens(2, 3)
    right = gpt.generate(idx, 9, temperature=0, use_cache=False)
    assert torch.equal(gpt.generate(idx, 9, temperature=0), right)
    gpt.mixes_tokens = False  # what the check is for: with a cache the text is another
    assert not torch.equal(gpt.generate(idx, 9, temperature=0), right)


@pytest.mark.parametrize("used", ["layer in a list", "tensor", "in aux"])
def test_weights_that_are_no_parameters_are_named(monkeypatch, used):
    """They would never be trained or saved: layers in a list, a tensor that only asks for a gradient,
    also where only the auxiliary loss uses it."""

    class Mine(FFNS["swiglu"]):
        def __init__(self, d, h):
            super().__init__(d, h)
            self.extra = [torch.nn.Linear(d, d)]
            self.scale = torch.ones(d, requires_grad=True)

        def forward(self, x):
            if used == "in aux":
                y = super().forward(x)
                return y, (y * self.scale).mean()
            return super().forward(x * self.scale if used == "tensor" else self.extra[0](x))

    monkeypatch.setitem(FFNS, "mine", Mine)
    with pytest.raises(UserError, match=r"layers\.0\.mlp uses a weight that is no parameter:"):
        check_ffns(GPT(small(ffn="mine")))


class Projected(FFNS["swiglu"]):
    """SwiGLU of a fixed random projection."""

    def __init__(self, d, h):
        super().__init__(d, h)
        self.register_buffer("project", torch.randn(d, d) / d**0.5)

    def forward(self, x):
        return super().forward(x @ self.project @ self.project.T)


class Thrice(FFNS["gelu"]):
    """A layer that is applied three times."""

    def forward(self, x):
        return super().forward(super().forward(super().forward(x)))


class SwiGLUExperts(FFNS["moe"]):
    """Experts of three matrices, with the flops() of those of two."""

    def __init__(self, d, h):
        super().__init__(d, h)
        self.experts = nn.ModuleList(make_ffn("swiglu", d, self.width) for _ in range(self.n))


@pytest.mark.parametrize("cls", [Projected, Thrice, SwiGLUExperts])
def test_an_ffn_that_executes_more_than_it_says_is_named(monkeypatch, cls):
    """Else a comparison at equal FLOPs gives it more than the baseline has. A flops() is the cure."""
    monkeypatch.setitem(FFNS, "mine", cls)
    gpt = GPT(small(ffn="mine"))
    with pytest.raises(UserError, match=r"mine: [\d,]+ FLOPs a token.*counted.*not") as e:
        check_ffns(gpt)
    counted = int(re.search(r"mine: ([\d,]+)", str(e.value))[1].replace(",", ""))
    said = {Projected: 2 * 32 * 32 + 3 * 32 * 64, Thrice: 3 * 2 * 32 * 64}
    said |= {SwiGLUExperts: 2 * 32 * 32 + 3 * 32 * 32 + 32 * 8}
    assert counted == 2 * said[cls]
    monkeypatch.setattr(cls, "flops", lambda self: counted, raising=False)
    check_ffns(gpt)


def test_an_ffn_that_executes_a_part_of_its_matrices_says_so(monkeypatch):
    """As experts in a loop do; --ffn_match=flops would make them a fraction as wide."""

    class Mine(nn.Module):
        def __init__(self, d, h):
            super().__init__()
            self.experts = nn.ModuleList(make_ffn("swiglu", d, h) for _ in range(4))
            self.router = nn.Linear(d, 4, bias=False)

        def forward(self, x):
            flat, y = x.flatten(0, -2), torch.zeros_like(x).flatten(0, -2)
            gate, chosen = self.router(flat).softmax(-1).max(-1)
            for i, expert in enumerate(self.experts):
                rows = (chosen == i).nonzero().squeeze(-1)
                y = y.index_add(0, rows, gate[rows, None] * expert(flat[rows]))
            return y.view_as(x)

    monkeypatch.setitem(FFNS, "mine", Mine)
    with pytest.raises(UserError, match=r"mine: 12,544 FLOPs .* counted .* not 49,408: give"):
        check_ffns(GPT(small(ffn="mine")))
    Mine.flops = lambda self: 12544
    check_ffns(GPT(small(ffn="mine")))


def test_state_that_training_changes_is_saved(monkeypatch):
    """Where it is not, a resumed run would begin with another one: a buffer left out of checkpoints, a
    tensor or a number of Python. The check leaves all as it was, and takes a constant and dropout."""

    class Mine(FFNS["swiglu"]):
        persistent, moves = True, True

        def __init__(self, d, h):
            super().__init__(d, h)
            self.register_buffer("mean", torch.zeros(d), persistent=self.persistent)

        def forward(self, x):
            if self.training and self.moves:
                self.mean.lerp_(x.detach().mean((0, 1)), 0.1)
            return super().forward(x - self.mean)

    monkeypatch.setitem(FFNS, "mine", Mine)
    for Mine.persistent, Mine.moves in ((True, True), (False, False)):
        gpt = GPT(small(ffn="mine"))
        check_ffns(gpt)
        assert not gpt.model.layers[0].mlp.mean.any()
    Mine.moves = True
    with pytest.raises(UserError, match="mine changes something in training that is not saved: keep"):
        check_ffns(GPT(small(ffn="mine")))

    class Averages(FFNS["swiglu"]):
        mean = torch.zeros(32)

        def forward(self, x):
            if self.training:
                self.mean = self.mean.lerp(x.detach().mean((0, 1)), 0.1)
            return super().forward(x - self.mean)

    class Counts(FFNS["swiglu"]):
        calls = 0

        def forward(self, x):
            self.calls += self.training
            return super().forward(x) * (1 + self.calls)

    class Late(Counts):
        def forward(self, x):
            self.calls += self.training
            return FFNS["swiglu"].forward(self, x) * (0.5 if self.calls == 3 else 1)

    class Anneals(FFNS["swiglu"]):
        tau = 1.0

        def forward(self, x):
            self.tau *= 0.9
            y = super().forward(x)
            return model_module.straight_through(y, torch.sigmoid(y / self.tau))

    class InAux(Averages):
        def forward(self, x):
            super().forward(x)
            return FFNS["swiglu"].forward(self, x), self.mean.sum()

    class InEvaluation(Averages):
        def forward(self, x):
            super().forward(x)
            return FFNS["swiglu"].forward(self, x if self.training else x - self.mean)

    class InEvaluationOnly(Mine):
        persistent = False

        def forward(self, x):
            super().forward(x)
            return FFNS["swiglu"].forward(self, x if self.training else x - self.mean)

    class Drops(FFNS["swiglu"]):
        def forward(self, x):
            return super().forward(x) * (self.draw() >= 0)

    class DropsPython(Drops):
        draw = staticmethod(random.random)

    class DropsNumpy(Drops):
        draw = staticmethod(np.random.random)

    seen = [Averages, Counts, Late, Anneals, InAux, InEvaluation, InEvaluationOnly]
    for cls in (*seen, DropsPython, DropsNumpy):
        monkeypatch.setitem(FFNS, "mine", cls)
        with pytest.raises(UserError, match="mine changes something in training that is not saved"):
            check_ffns(GPT(small(ffn="mine")))

    class Rolls(FFNS["swiglu"]):  # a tensor whose sum stays
        order = torch.arange(4)

        def forward(self, x):
            self.order = self.order.roll(1)
            return super().forward(x)

    monkeypatch.setitem(FFNS, "mine", Rolls)
    with pytest.raises(UserError, match="mine changes something in training that is not saved"):
        check_ffns(GPT(small(ffn="mine")))
    monkeypatch.setitem(FFNS, "mine", swiglu_on(lambda f, x: F.dropout(f(x), 0.5)))
    check_ffns(GPT(small(ffn="mine")))

    class Sparse(FFNS["swiglu"]):
        def __init__(self, d, h):
            super().__init__(d, h)
            self.register_buffer("links", torch.eye(d).to_sparse(), persistent=False)

        def forward(self, x):
            return super().forward(torch.sparse.mm(self.links, x.flatten(0, -2).t()).t().view_as(x))

    monkeypatch.setitem(FFNS, "mine", Sparse)
    check_ffns(GPT(small(ffn="mine")))

    class Looks(FFNS["swiglu"]):
        best = float("nan")

        def __init__(self, d, h):
            super().__init__(d, h)
            self.register_buffer("share", torch.full((h,), torch.nan))

        def forward(self, x):
            self.last, self.length, self.seen, self.best = x.detach(), x.size(1), True, self.best
            self.share.fill_(0.5)
            return super().forward(x.mul_(2))

    class Extra(Counts):
        def get_extra_state(self):
            return self.calls

        def set_extra_state(self, state):
            self.calls = state

    for cls in (Looks, Extra):
        monkeypatch.setitem(FFNS, "mine", cls)
        gpt = GPT(small(ffn="mine"))
        check_ffns(gpt)
        assert gpt.model.layers[0].mlp.state_dict().get("share", torch.tensor(torch.nan)).isnan().all()
    monkeypatch.setitem(FFNS, "mine", Averages)
    check_ffns(GPT(small(ffn="mine")), training=False)  # as with --eval_only


def test_weights_that_change_in_evaluation_are_named(monkeypatch):
    """As of a class that takes its start values from its first input, which the check would give it."""

    class Mine(FFNS["swiglu"]):
        def __init__(self, d, h):
            super().__init__(d, h)
            self.loc = nn.Parameter(torch.zeros(d))
            self.register_buffer("ready", torch.tensor(False))

        def forward(self, x):
            if not self.ready and (self.training or self.always):
                self.loc.data.copy_(x.detach().mean((0, 1)))
                self.ready.fill_(True)
            return super().forward(x - self.loc)

    monkeypatch.setitem(FFNS, "mine", Mine)
    Mine.always = True
    with pytest.raises(UserError, match=r"layers\.0\.mlp\.\w+ changes in evaluation"):
        check_ffns(GPT(small(ffn="mine")))
    Mine.always = False
    check_ffns(GPT(small(ffn="mine")))


def test_values_that_are_never_set_are_named(monkeypatch):
    """torch.empty is not the same twice. Of matrices and biases it is fine: they are drawn."""

    class Mine(FFNS["swiglu"]):
        def __init__(self, d, h):
            super().__init__(d, h)
            self.matrix = nn.Parameter(torch.empty(d, h))
            self.inner = nn.ParameterDict({"bias": torch.empty(h)})
            self.gate_up_proj_bias = nn.Parameter(torch.empty(h))

    monkeypatch.setitem(FFNS, "mine", Mine)
    before = torch.get_deterministic_debug_mode()
    with pytest.raises(UserError, match=r"layers\.0\.mlp\.gate_up_proj_bias was never set: give"):
        GPT(small(ffn="mine"))
    assert torch.get_deterministic_debug_mode() == before
    Mine.init_weights = lambda self: nn.init.zeros_(self.gate_up_proj_bias)
    assert GPT(small(ffn="mine")).model.layers[0].mlp.matrix.isfinite().all()


def test_two_parameters_over_one_memory_are_refused(monkeypatch):
    """An optimizer would step it twice. One parameter under two names is fine."""

    class Mine(FFNS["swiglu"]):
        def __init__(self, d, h):
            super().__init__(d, h)
            up = self.up_proj.weight
            self.down_proj.weight = up if d == h else nn.Parameter(up.t())

    monkeypatch.setitem(FFNS, "mine", Mine)
    make_ffn("mine", 8, 8)
    with pytest.raises(UserError, match=r"up_proj\.weight and down_proj\.weight share.*clone"):
        make_ffn("mine", 8, 16)

    class Parts(FFNS["swiglu"]):
        def __init__(self, d, h):
            super().__init__(d, h)
            parts = nn.init.orthogonal_(torch.empty(2 * h, d)).split(h)  # of one memory, but apart
            self.gate_proj.weight, self.up_proj.weight = map(nn.Parameter, parts)

    monkeypatch.setitem(FFNS, "mine", Parts)
    make_ffn("mine", 8, 16)


def test_a_width_that_a_class_asserts_against_is_one_line(monkeypatch):
    """And is skipped in the search for a width."""

    class Mine(FFNS["swiglu"]):
        def __init__(self, d, h):
            assert h % 48 == 0, "three heads"
            super().__init__(d, h)

    monkeypatch.setitem(FFNS, "mine", Mine)
    with pytest.raises(UserError, match=r"mine refuses d=32 h=64 \(three heads\)"):
        make_ffn("mine", 32, 64)
    match_hidden.cache_clear()
    assert match_hidden("mine", 32, 100) == 96


def test_an_ffn_that_looks_far_back_generates_right(monkeypatch):
    """Unchecked models, of exports and load_run, look as far as the check at a run's start."""

    def forward(f, x):
        return f(x + F.pad(x, (0, 0, 100, 0))[:, : x.size(1)])

    monkeypatch.setitem(FFNS, "mine", swiglu_on(forward))
    gpt = stir(GPT(small(ffn="mine", block_size=128, n_layer=1)))
    idx = tokens(1, 110)
    right = gpt.generate(idx, 8, temperature=0, use_cache=False)
    assert torch.equal(gpt.generate(idx, 8, temperature=0), right)
    assert gpt.mixes_tokens is True


@pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated")
@pytest.mark.parametrize("hack", ["index", "weight_norm"])
def test_what_a_fork_does_to_its_ffns_passes_the_checks(monkeypatch, hack):
    """Layers that know their number by an attribute, tensors that Python cannot copy."""

    class Mine(FFNS["swiglu"]):
        def __init__(self, d, h):
            super().__init__(d, h)
            if hack == "weight_norm":
                torch.nn.utils.weight_norm(self.up_proj)

        def forward(self, x):
            return super().forward(x) / (1 + self.index if hack == "index" else 1)

    monkeypatch.setitem(FFNS, "mine", Mine)
    gpt = GPT(small(ffn="mine"))
    for i, layer in enumerate(gpt.model.layers):
        layer.mlp.index = i
    check_ffns(gpt)
    assert gpt.training


def test_a_gradient_inside_forward_passes_the_checks(monkeypatch):
    """As FFNs that learn in their forward pass take it. The FLOPs that it costs are counted."""

    class Mine(FFNS["swiglu"]):
        def forward(self, x):
            with torch.enable_grad():
                z = x.detach().requires_grad_()
                (step,) = torch.autograd.grad(self.up_proj(z).square().sum(), z)
            return super().forward(x - step)

        def flops(self):
            return 2 * (3 + 2) * self.up_proj.weight.numel()

    monkeypatch.setitem(FFNS, "mine", Mine)
    check_ffns(GPT(small(ffn="mine")))
    del Mine.flops
    with pytest.raises(UserError, match="FLOPs a token were counted"):
        check_ffns(GPT(small(ffn="mine")))


def test_an_ffn_that_cannot_be_copied_is_one_line(monkeypatch):
    class Mine(FFNS["swiglu"]):
        functional = None

        def __init__(self, d, h):
            super().__init__(d, h)
            self.functional = F

    monkeypatch.setitem(FFNS, "mine", Mine)
    with pytest.raises(UserError, match=r"mine cannot be copied \(cannot pickle .*: keep no file"):
        check_ffns(GPT(small(ffn="mine")))


def test_an_ffn_inside_another_is_told_of_the_progress(monkeypatch):
    class Mine(torch.nn.Module):
        def __init__(self, d, h):
            super().__init__()
            self.inner = make_ffn("sparseglu:ramp=3:k=0.1:r=0", d, h)
            self.forward = self.inner.forward

    monkeypatch.setitem(FFNS, "mine", Mine)
    gpt = GPT(small(ffn="mine"))
    for step in (0, 3):
        gpt.set_progress(step, 3)
        share = 0.1 if step else 1
        assert gpt.model.layers[0].mlp.inner.limit == round(share * gpt.config.ffn_hidden)


def test_the_causality_check_multiplies_exactly(monkeypatch):
    """A GPU's TF32, which train.py turns on, may round a few rows and many in different ways, and so
    show an influence that is not there. Afterwards it is on again."""
    found, forward, ffn = [], model_module.SwiGLU.forward, make_ffn("swiglu", D, H)

    def spy(self, x):
        found.append(torch.get_float32_matmul_precision())
        return forward(self, x)

    monkeypatch.setattr(model_module.SwiGLU, "forward", spy)
    torch.set_float32_matmul_precision("high")
    try:
        assert model_module.influences(ffn, inputs(1, 8, D).float()) == (False, False)
        assert torch.get_float32_matmul_precision() == "high"
    finally:
        torch.set_float32_matmul_precision("highest")
    assert set(found) == {"highest"}


@pytest.mark.parametrize("checked", [True, False])
@pytest.mark.parametrize("layer", [0, 1])
def test_one_layer_that_reads_earlier_tokens_is_enough(checked, layer):
    """To generate without a cache, whichever layer it is."""
    gpt = stir(GPT(small(block_size=16, tie_embeddings=False)))
    gpt.model.layers[layer].mlp = stir(ConvGLU(32, 64))
    if checked:
        check_ffns(gpt)
    idx = tokens(2, 5)
    right = gpt.generate(idx, 8, temperature=0.0, use_cache=False)
    assert torch.equal(gpt.generate(idx, 8, temperature=0.0), right)
    assert gpt.mixes_tokens is True


@pytest.mark.parametrize("checked", [True, False])
def test_an_ffn_that_reads_earlier_tokens_is_legal_and_generates_right(monkeypatch, checked):
    """It generates without a cache, which would give it only the newest token, even if it was never
    checked or starts as the identity, which hides that it reads earlier tokens."""
    monkeypatch.setitem(FFNS, "conv", ConvGLU)
    gpt = GPT(small(ffn="conv", block_size=16, tie_embeddings=False))
    if checked:
        check_ffns(gpt)
        assert gpt.mixes_tokens is True
    else:
        gpt.generate(tokens(2, 5), 1)
    stir(gpt)
    idx = tokens(2, 5)
    want = idx
    for _ in range(8):
        with torch.no_grad():
            want = torch.cat((want, gpt(want)[0][:, -1:].argmax(-1)), 1)
    assert torch.equal(gpt.generate(idx, 8, temperature=0.0), want)


def test_generate_is_in_evaluation_mode(monkeypatch):
    """Afterwards the mode is as before, also after an error."""
    modes = []

    def note(f, x):
        modes.append(gpt.training)
        if len(modes) == 9:
            raise ArithmeticError
        return f(x)

    monkeypatch.setitem(FFNS, "mine", swiglu_on(note))
    gpt = GPT(small(ffn="mine", n_layer=1))
    gpt.mixes_tokens = False
    gpt.generate(tokens(1, 3), 8)
    assert modes == [False] * 8
    assert gpt.training
    with pytest.raises(ArithmeticError):
        gpt.generate(tokens(1, 3), 1)
    assert gpt.training


# -- vectors and matrices --------------------------------------------------------------------------


def test_vectors_of_any_shape_stay_as_they_are_and_are_no_matrices(monkeypatch):
    """A gain of shape (1, 1, d) is a vector: it keeps its values and adds no FLOPs."""

    class Gains(FFNS["swiglu"]):
        def __init__(self, d: int, h: int):
            super().__init__(d, h)
            self.gain = nn.Parameter(torch.full((1, 1, d), 0.7))
            self.column = nn.Parameter(torch.arange(1.0, d + 1)[:, None])
            self.one = nn.Parameter(torch.ones(1, 1))

        def forward(self, x):
            return super().forward(x * self.gain * self.column.T * self.one)

    monkeypatch.setitem(FFNS, "gains", Gains)
    gpt, plain = GPT(small(ffn="gains")), GPT(small())
    mlp = gpt.model.layers[1].mlp
    assert mlp.gain.eq(0.7).all()
    assert torch.equal(mlp.column.flatten(), torch.arange(1.0, 33))
    assert mlp.one.item() == 1
    assert gpt.overwritten == []
    assert gpt.param_counts()["layers"] == plain.param_counts()["layers"]
    assert gpt.flops_per_token() == plain.flops_per_token()
    assert ffn_cost(mlp)["flops"] == ffn_cost(plain.model.layers[0].mlp)["flops"]
    shapes = [((5, 4), True), ((5, 1), False), ((1, 1, 5), False), ((2, 1, 5), True), ((), False)]
    assert all(model_module.is_matrix(torch.empty(shape)) == want for shape, want in shapes)


def test_what_was_set_on_purpose_and_drawn_anew_is_listed(monkeypatch):
    """Matrices and biases whose values are not random are listed, but those that init_weights sets."""

    class Constants(FFNS["swiglu"]):
        def __init__(self, d: int, h: int):
            super().__init__(d, h)
            nn.init.zeros_(self.down_proj.weight)
            self.gains = nn.Parameter(torch.ones(4, d))  # one for each of four experts
            self.shift = nn.Linear(d, d)
            nn.init.constant_(self.shift.bias, -2.0)
            self.zero = nn.Linear(d, d)
            nn.init.zeros_(self.zero.bias)
            self.bias = nn.Parameter(torch.tensor(1.0))
            self.conv = nn.Conv1d(d, d, 4, groups=d)
            nn.init.dirac_(self.conv.weight, groups=d)
            self.one = nn.Linear(d, 1)
            nn.init.ones_(self.one.bias)
            self.shared = shared

    shared = nn.Linear(4, 4)
    monkeypatch.setitem(FFNS, "constants", Constants)
    names = ["bias", "gains", "down_proj.weight", "shift.bias", "conv.weight", "one.bias"]
    for own in (set(), {"gains"}):
        want = [f"model.layers.{i}.mlp.{name}" for i in range(2) for name in names if name not in own]
        assert sorted(GPT(small(ffn="constants")).overwritten) == sorted(want)
        Constants.init_weights = lambda self: nn.init.ones_(self.gains)
    for spec in {*FFNS, "dsg:g=token", "asg:threshold=neuron"} - {"constants"}:
        assert GPT(small(ffn=spec)).overwritten == [], spec


def test_the_flops_of_a_class_are_those_of_the_model(monkeypatch):
    """An FFN that executes a quarter of its products says so once, in flops()."""

    class Quarter(FFNS["swiglu"]):
        def flops(self) -> int:
            return 2 * 3 * 32 * 64 // 4

    monkeypatch.setitem(FFNS, "quarter", Quarter)
    quarter, plain = GPT(small(ffn="quarter")), GPT(small())
    assert quarter.param_counts() == plain.param_counts()
    saved = plain.flops_per_token() - quarter.flops_per_token()
    assert saved == 3 * 2 * (3 * 2 * 32 * 64) * 3 // 4


@pytest.mark.timeout(600)
def test_the_example_of_the_readme_passes_the_tests_of_any_ffn(tmp_path):
    """The class and its line in FFNS are added as a reader would, in a copy of the project. The tests of
    the existing FFNs must pass too."""
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.S)
    cls = next(block for block in blocks if block.startswith("class "))
    line = next(block for block in blocks if re.match(r' +"\w+": \w+,', block))
    name = line.split('"')[1]
    for path in [*ROOT.glob("*.py"), *ROOT.glob("tests/*.py"), ROOT / "pyproject.toml"]:
        target = tmp_path / path.relative_to(ROOT)
        target.parent.mkdir(exist_ok=True)
        shutil.copy(path, target)
    source = (ROOT / "model.py").read_text()
    source = source.replace("class GELU(", cls + "\n\nclass GELU(")
    source = source.replace('    "gelu": GELU,\n', '    "gelu": GELU,\n' + line)
    (tmp_path / "model.py").write_text(source)
    which = f"any_ffn and {name} or test_every_reference or test_which or test_what_was_set"
    run = [sys.executable, "-m", "pytest", "-n0", "-k", which, "tests/test_model.py"]
    out = subprocess.run(run, cwd=tmp_path, capture_output=True, text=True, timeout=500)
    assert out.returncode == 0, out.stdout
    assert int(re.search(r"(\d+) passed", out.stdout)[1]) >= 11, out.stdout


def test_the_hash_sees_helpers_in_other_files_and_the_helpers_of_helpers(tmp_path, monkeypatch):
    """However a file is reached: a module beside the class's, one of a package, with or without an
    __init__.py, a relative import, an import in a method or one in a helper. The hash does not see what
    the class does not refer to, nor the files of this project."""
    files = {
        "beside.py": "base = abs", "model.py": "",
        "pack/__init__.py": "from .deep import y", "pack/ops.py": "from . import near\nact = abs",
        "pack/near.py": "", "pack/deep.py": "y = 1", "bare/act.py": "z = 1", "late.py": "import later",
        "later.py": "", "other.py": "", "pack/other.py": "",
    }  # fmt: skip
    (tmp_path / "near.py").write_text("%pylab is no Python")  # nothing imports it
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    (tmp_path / "with_package.py").write_text("""
from torch import nn
import beside, model
from pack.ops import act
import bare.act as helper

class Mine(nn.Module):
    def __init__(self, d, h):
        import late
        super().__init__()

    def forward(self, x):
        return act(beside.base(model.upcast(x))) * helper.z
""")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(FFNS, "mine", importlib.import_module("with_package").Mine)
    was = model_module.ffn_code("mine")
    for name, text in files.items():
        (tmp_path / name).write_text(text + "\nx = 1")
        now = model_module.ffn_code("mine")
        assert (now == was) == name.endswith(("other.py", "model.py")), name
        was = now


# -- classes that cannot be used: one line -----------------------------------------------------------


class Positional(nn.Module):
    def __init__(self, d: int, h: int, k: float = 0.5):
        super().__init__()


class Needs(nn.Module):
    def __init__(self, d: int, h: int, k: float):
        super().__init__()


class OneArgument(nn.Module):
    def __init__(self, config):
        super().__init__()


@dataclasses.dataclass(eq=False)
class Fields(nn.Module):
    d: int
    h: int
    k: float = 0.5

    def __post_init__(self):
        super().__init__()


def unknown_hint(self, d: int, h: int, *, sizes: Sequence = ()):  # noqa: F821
    """As where a name is imported under TYPE_CHECKING only."""


def with_method(**methods):
    return type("Mine", (FFNS["swiglu"],), methods)


def with_parameter(p: torch.Tensor):
    class Mine(FFNS["swiglu"]):
        def __init__(self, d: int, h: int):
            super().__init__(d, h)
            self.p = nn.Parameter(p)

    return Mine


def with_buffer(b: torch.Tensor):
    class Mine(FFNS["swiglu"]):
        def __init__(self, d: int, h: int):
            super().__init__(d, h)
            self.register_buffer("b", b)

    return Mine


@pytest.mark.parametrize(
    "cls, spec, says",
    [
        (Positional, "mine:k=0.2", "put * before it"),
        (Fields, "mine:k=0.2", "KW_ONLY"),
        (Needs, "mine", "def __init__(self, d, h, *, option=default)"),
        (OneArgument, "mine", "def __init__(self, d, h, *, option=default)"),
        (with_method(__init__=unknown_hint), "mine", "a type hint of __init__ (name 'Sequence' is not"),
        (lambda d, h: make_ffn("swiglu", d, h), "mine", "not a class"),
        (functools.partial(FFNS["sparseglu"], k=0.5), "mine", "not a class"),
        (make_ffn("swiglu", 8, 8), "mine", "not a class"),
        (None, "mine", "not a class"),
        (with_method(flops=property(lambda self: 3)), "mine", "def flops(self)"),
        (with_method(flops=3), "mine", "def flops(self)"),
        (with_method(active=lambda self: 0.5), "mine", "def active(self, x)"),
        (with_method(decode=lambda self, x, cache: x), "mine", "def decode(self, x)"),
        (with_method(set_progress=lambda self, step: None), "mine", "def set_progress(self, step, max_"),
        (with_parameter(torch.ones(4, dtype=torch.complex64)), "mine", "p is torch.complex64"),
        (with_parameter(torch.ones(4, dtype=torch.float64)), "mine", "p is torch.float64"),
        (with_parameter(torch.ones(4, dtype=torch.bfloat16)), "mine", "p is torch.bfloat16"),
        (with_parameter(torch.ones(4, 8)[:, :4]), "mine", "p is a part of a tensor"),
        (with_parameter(torch.ones(4, 1).expand(4, 4)), "mine", "p is a part of a tensor"),
        (with_buffer(torch.ones(1).expand(4)), "mine", "buffer b is expanded"),
    ],
)
def test_a_class_that_cannot_be_used_is_one_line(monkeypatch, cls, spec, says):
    monkeypatch.setitem(FFNS, "mine", cls)
    with pytest.raises(UserError) as e:
        GPT(small(ffn=spec))
    assert says in str(e.value)
    assert "mine" in str(e.value)
    assert "\n" not in str(e.value)


def test_methods_with_more_that_is_optional_are_fine(monkeypatch):
    mine = with_method(
        active=torch.no_grad()(lambda self, x, detail=False: x.new_ones(())),
        decode=lambda self, *args: self.forward(*args),
        ideal_flops=lambda self, /: 3,
    )
    monkeypatch.setitem(FFNS, "mine", mine)
    assert ffn_cost(make_ffn("mine", 8, 8))["ideal_flops"] == 3


@functools.lru_cache
def hadamard(n: int) -> torch.Tensor:
    """A constant that a class keeps for all of its layers."""
    return torch.tensor([[(-1.0) ** bin(i & j).count("1") for i in range(n)] for j in range(n)])


def test_building_for_shapes_leaves_no_traces(monkeypatch):
    """A tensor that a class caches has data, even if checking, matching or counting built it first."""

    class Mine(FFNS["swiglu"]):
        def __init__(self, d: int, h: int):
            super().__init__(d, h)
            self.register_buffer("mix", hadamard(d) / d**0.5)

        def forward(self, x):
            return super().forward(x @ self.mix)

    hadamard.cache_clear()
    monkeypatch.setitem(FFNS, "mine", Mine)
    torch.manual_seed(1)
    state = torch.get_rng_state()
    gpt = GPT(small(ffn="mine", ffn_match="params"))
    assert torch.equal(torch.get_rng_state(), state)
    assert hadamard(32).device == CPU
    gpt(tokens(2, 9), tokens(2, 9))[1].backward()
    copy.deepcopy(gpt).to(torch.float64)(tokens(2, 9))


# -- initial weights -----------------------------------------------------------------------------


@all_names
def test_initial_values(name):
    """Matrices are N(0, 0.02), residual writers scaled by 1/sqrt(2 n_layer); biases are 0, gains 1."""
    config = small(ffn=name, n_layer=3, n_embd=64, ffn_hidden=128, vocab_size=500)
    draws = set()
    for n, p in GPT(config).named_parameters():
        assert p.dtype == torch.float32
        assert p.device.type == "cpu"
        if p.ndim == 2:
            std = 0.02 / math.sqrt(6) if n.endswith(("o_proj.weight", "down_proj.weight")) else 0.02
            slack = 5 * std / math.sqrt(2 * p.numel())
            assert p.std().item() == pytest.approx(std, abs=slack), n
            assert abs(p.mean().item()) < 5 * std / math.sqrt(p.numel()), n
            assert p.abs().max() > 2.5 * std, n  # normal, not uniform
            draws.add(p.detach()[0, :8].mul(0.02 / std).round(decimals=6).numpy().tobytes())
        elif n.endswith(".bias") or n.endswith((".b", ".t")):
            assert p.eq(0).all(), n
        elif n.endswith(".s"):
            assert p.item() == pytest.approx(0.1), n
        else:
            assert p.eq(1).all(), n  # norm gains, multiscale's scale
    matrices = sum(p.ndim == 2 for p in GPT(config).parameters())
    assert len(draws) == matrices  # no two parameters share their numbers


@all_names
def test_ffn_init_std_scales_the_inner_matrices_of_ffns_and_nothing_else(name):
    """The same draws, times a constant; attention, embeddings and residual writers are as they were."""
    usual = GPT(small(ffn=name)).state_dict()
    wide = GPT(small(ffn=name, ffn_init_std=0.05)).state_dict()
    scaled = set()
    for key, value in usual.items():
        inner = ".mlp." in key and "down_proj" not in key and sum(size > 1 for size in value.shape) > 1
        scaled |= {key} if inner else set()
        torch.testing.assert_close(wide[key], (2.5 if inner else 1) * value, rtol=1e-6, atol=0, msg=key)
    assert scaled
    for bad in (0.0, -0.02, math.nan, math.inf):
        with pytest.raises(UserError, match="ffn_init_std must be above 0"):
            GPT(small(ffn=name, ffn_init_std=bad))


def test_only_what_is_called_so_starts_smaller(monkeypatch):
    """down_proj does, whatever its parent is called; updown_proj and two_proj do not."""

    class Named(nn.Module):
        def __init__(self, d, h):
            super().__init__()
            for name in ("up_proj", "updown_proj", "two_proj"):
                self.add_module(name, nn.Linear(d, h, bias=False))
            self.last = nn.ModuleDict({"down_proj": nn.Linear(h, d, bias=False)})

        def forward(self, x):
            hidden = self.up_proj(x) + self.updown_proj(x) + self.two_proj(x)
            return self.last["down_proj"](hidden)

    monkeypatch.setitem(FFNS, "named", Named)
    mlp = GPT(small(ffn="named", n_layer=8, n_embd=64, ffn_hidden=128)).model.layers[0].mlp
    stds = {name: p.std().item() for name, p in mlp.named_parameters()}
    want = dict.fromkeys(stds, 0.02) | {"last.down_proj.weight": 0.005}
    assert stds == pytest.approx(want, rel=0.1)


def test_shared_weights_are_the_same_bits_in_every_variant():
    """Equal name and shape, equal bits: a comparison starts all variants from the same point."""
    base = dict(GPT(small()).named_parameters())
    specs = [*NAMES, "asg:threshold=neuron:grad=ste", "dsg:g=token", "sparseglu:select=stat:k=0.5"]
    for spec in specs:
        gpt = dict(GPT(small(ffn=spec)).named_parameters())
        shared = [n for n in gpt if n in base and gpt[n].shape == base[n].shape]
        assert {n for n in base if ".mlp." not in n} <= set(shared)
        assert all(torch.equal(gpt[n], base[n]) for n in shared), spec
        mlp = [n for n in shared if n.startswith("model.layers.0.mlp.")]
        few = {"multiscale": 0, "dualgated": 0, "sparsegated": 1, "spark": 1, "gelu": 2, "relu2": 2}
        few |= {"moe": 0, "thresholdmoe": 0}
        assert len(mlp) == few.get(spec, 3)
    # two variants also share weights that the baseline lacks
    a, b = (dict(GPT(small(ffn=s)).named_parameters()) for s in ("sparseglu", "sparseglu:k=0.5"))
    assert all(torch.equal(a[n], b[n]) for n in a)
    # with more layers the first ones keep their weights, except the scale of residual writers
    deep = dict(GPT(small(n_layer=4)).named_parameters())
    assert all(torch.equal(deep[n], base[n]) for n in base if "o_proj" not in n and "down" not in n)


def test_seed_and_nothing_else_decides_the_weights():
    a = GPT(small(seed=3)).state_dict()
    torch.manual_seed(99)
    torch.rand(7)
    np.random.seed(5)
    b = GPT(small(seed=3)).state_dict()
    assert all(torch.equal(a[n], b[n]) for n in a)
    c = GPT(small(seed=4)).state_dict()
    assert all(not torch.equal(a[n], c[n]) for n in a if a[n].ndim == 2)


def test_tied_and_untied_embeddings_start_equal():
    tied, untied = GPT(small()), GPT(small(tie_embeddings=False))
    assert tied.lm_head.weight is tied.model.embed_tokens.weight
    assert untied.lm_head.weight is not untied.model.embed_tokens.weight
    assert torch.equal(tied.model.embed_tokens.weight, untied.model.embed_tokens.weight)
    assert not torch.equal(untied.lm_head.weight, untied.model.embed_tokens.weight)


@pytest.mark.parametrize("name", ["swiglu", "dsg", "sparseglu"])
def test_building_a_model_leaves_random_states_alone(name):
    torch.manual_seed(1)
    before = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    GPT(small(ffn=name))
    assert torch.equal(torch.get_rng_state(), before[0])
    assert random.getstate() == before[1]
    assert np.random.get_state()[1].tolist() == before[2]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_building_a_model_leaves_the_gpus_random_state_alone():
    torch.cuda.manual_seed(1)
    before = torch.cuda.get_rng_state()
    GPT(small())
    assert torch.equal(torch.cuda.get_rng_state(), before)


def digest(gpt: nn.Module) -> str:
    whole = hashlib.sha256()
    for _, p in sorted(gpt.state_dict().items()):
        whole.update(p.numpy().tobytes())
    return whole.hexdigest()


def test_another_process_gives_the_same_weights_and_importing_does_nothing(tmp_path):
    """Seeds use no hash(); importing the files sets no global, loads nothing heavy, writes no file."""
    code = """
import json, sys, torch
from hashlib import sha256
state = torch.get_rng_state()
import bench, configurator, model, prepare_fineweb, train
assert torch.equal(torch.get_rng_state(), state)
config = model.GPTConfig(48, 101, 2, 4, 2, 32, "sparseglu", 64, seed=11)
whole = sha256()
for _, p in sorted(model.GPT(config).state_dict().items()):
    whole.update(p.numpy().tobytes())
heavy = [m for m in ("tiktoken", "datasets", "transformers", "matplotlib", "wandb", "pandas")
         if m in sys.modules]
print(json.dumps([whole.hexdigest(), str(torch.get_default_dtype()),
                  torch.cuda.is_initialized(), torch.get_float32_matmul_precision(), heavy]))
"""
    env = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONHASHSEED": "123"}
    env["PYTHONDONTWRITEBYTECODE"] = "1"
    run = [sys.executable, "-c", code]
    out = subprocess.run(run, capture_output=True, text=True, cwd=tmp_path, env=env, timeout=120)
    assert out.returncode == 0, out.stderr
    want = digest(GPT(small(ffn="sparseglu", seed=11)))
    assert json.loads(out.stdout) == [want, "torch.float32", False, "highest", []]
    assert not any(tmp_path.iterdir())


# -- generate ------------------------------------------------------------------------------------

GENERATE = [("swiglu", 1), ("swiglu", 16), ("swiglu", 40), ("sparseglu:k=0.3", 16), ("spark", 1)]
GENERATE += [("sparseglu:select=stat:grad=gate", 16), ("sparsegated", 40)]


@pytest.mark.parametrize("spec, prompt", GENERATE)
def test_greedy_takes_the_largest_logit_with_a_cache_and_without(spec, prompt):
    """It holds past block_size = 16 and for a longer prompt."""
    gpt = stir(GPT(small(ffn=spec, block_size=16, tie_embeddings=False)))
    idx = tokens(2, prompt)
    cached = gpt.generate(idx, 20, temperature=0.0)
    assert cached.shape == (2, prompt + 20)
    assert torch.equal(cached[:, :prompt], idx)
    with torch.no_grad():
        assert torch.equal(cached[:, prompt], gpt(idx[:, -16:])[0][:, -1].argmax(-1))
    assert torch.equal(cached, gpt.generate(idx, 20, temperature=0.0, use_cache=False))
    assert torch.equal(cached, gpt.generate(idx, 20, temperature=1.0, top_k=1))
    assert len(set(cached[:, prompt:].flatten().tolist())) > 2  # it does not repeat one token


@pytest.mark.parametrize("spec, dtype", [("sparseglu", torch.float64), ("swiglu", torch.bfloat16)])
def test_a_model_of_another_dtype_generates(spec, dtype):
    """Unasked, and after the check that train.py makes."""
    gpt = stir(GPT(small(ffn=spec))).to(dtype)
    assert gpt.generate(tokens(1, 3), 4, temperature=0.0).shape == (1, 7)
    check_ffns(gpt)


def test_generating_past_block_size_still_reads_the_recent_tokens():
    """A change near the end of a long prompt changes what follows, one beyond block_size does not."""
    gpt = stir(GPT(small(block_size=16)))
    idx = tokens(1, 40)
    recent, old = idx.clone(), idx.clone()
    recent[0, -2] = (recent[0, -2] + 1) % 101
    old[0, 3] = (old[0, 3] + 1) % 101
    base = gpt.generate(idx, 20, temperature=0.0)[0, 40:]
    assert not torch.equal(gpt.generate(recent, 20, temperature=0.0)[0, 40:], base)
    assert torch.equal(gpt.generate(old, 20, temperature=0.0)[0, 40:], base)


def test_sampling_is_reproducible_by_seed():
    gpt = stir(GPT(small(block_size=16)))
    runs = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        runs.append(gpt.generate(tokens(2, 5), 30, temperature=1.3, top_k=20))
    assert torch.equal(runs[0], runs[1])
    assert not torch.equal(runs[0], runs[2])


@pytest.mark.parametrize("n_vocab", [0, 50])
def test_a_tiny_temperature_is_greedy(n_vocab):
    """It holds where an excluded id has the largest logit."""
    gpt = stir(GPT(small(tie_embeddings=False)))
    idx = tokens(8, 5)
    colder, cold, greedy = (gpt.generate(idx, 9, t, n_vocab=n_vocab) for t in (1e-50, 1e-40, 0.0))
    assert torch.equal(cold, greedy)
    assert torch.equal(colder, greedy)


@pytest.mark.parametrize("temperature, top_k, n_vocab", [(1.0, 0, 0), (2.5, 0, 90), (0.7, 5, 0)])
def test_sampling_follows_the_softmax(temperature, top_k, n_vocab):
    """4,000 draws of the next token agree with the softmax computed by NumPy."""
    gpt = stir(GPT(small()))
    n = 4000
    torch.manual_seed(0)
    idx = tokens(1, 6)
    drawn = gpt.generate(idx.expand(n, -1), 1, temperature, top_k, n_vocab=n_vocab)[:, -1]
    with torch.no_grad():
        z = gpt(idx)[0][0, -1].double().numpy()
    if n_vocab:
        z[n_vocab:] = -np.inf
    if top_k:
        z[z < np.sort(z)[-top_k]] = -np.inf
    p = np.exp((z - z.max()) / temperature)
    p /= p.sum()
    share = np.bincount(drawn.numpy(), minlength=101) / n
    assert (share[p == 0] == 0).all()
    assert (np.abs(share - p) < 5 * np.sqrt(p * (1 - p) / n) + 1e-9 + 2 / n).all()


def test_generating_leaves_cudnn_attention_out(monkeypatch):
    """cuDNN plans anew at each cache length, which takes longer than a token; training may use it."""
    seen = []
    attention = F.scaled_dot_product_attention

    def watched(*args, **kwargs):
        seen.append(torch.backends.cuda.cudnn_sdp_enabled())
        return attention(*args, **kwargs)

    monkeypatch.setattr(F, "scaled_dot_product_attention", watched)
    gpt = GPT(small())
    gpt.generate(tokens(1, 3), 3)
    assert set(seen) == {False}
    seen.clear()
    gpt(tokens(1, 3))
    assert set(seen) == {True}


def test_generate_does_not_train_and_needs_no_gradient():
    gpt = GPT(small())
    gpt.generate(tokens(1, 3), 3)
    assert all(p.grad is None for p in gpt.parameters())
    assert gpt.training
    assert gpt.generate(tokens(1, 3), 0).shape == (1, 3)


# -- FLOPs of the model --------------------------------------------------------------------------


def test_flops_per_token_by_hand():
    """6 x parameters in matrices, lm_head included, + 6 x n_layer x n_embd x T."""
    for tie in (True, False):
        config = small(tie_embeddings=tie)
        attention = 2 * 32 * 32 + 2 * 32 * 16
        matrices = 2 * (attention + 3 * 32 * 64) + 101 * 32
        assert GPT(config).flops_per_token() == 6 * matrices + 6 * 2 * 32 * 48


def test_a_second_ffn_in_a_block_is_counted():
    """What a fork adds to a layer costs FLOPs."""
    gpt = GPT(small())
    once = gpt.flops_per_token()
    for layer in gpt.model.layers:
        layer.mlp2, layer.values = make_ffn("gelu", 32, 64), nn.Embedding(101, 32)
    assert gpt.flops_per_token() - once == 6 * 2 * (2 * 32 * 64)
