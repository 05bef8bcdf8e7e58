"""bench.py, peers.py and gpu.sh from outside: what they print and write, never how fast it was."""

from __future__ import annotations

import functools
import json
import math
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from trainer import FORK, ROOT

import bench
import configurator
import model

CPU = torch.device("cpu")
# One round: a median of ratios is then the ratio of the medians, and one checks the other.
TINY = ["--rounds=1", "--compile=False", "--device=cpu"]
FFN = ["--n_embd=64", "--ffn_hidden=128", "--tokens=32"]
STEP = ["--n_layer=1", "--n_head=2", "--n_embd=32", "--ffn_hidden=64", "--block_size=16"]
STEP += ["--micro_batch_size=2", "--vocab_size=128"]


def call(script: str, *args: object, **env: str) -> subprocess.CompletedProcess:
    """Run a script with one thread: two tests at once on two cores would wait for each other's."""
    command = [sys.executable, str(ROOT / script), *map(str, args)]
    env = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""} | env
    return subprocess.run(command, capture_output=True, text=True, env=env, timeout=240)


@pytest.fixture(autouse=True)
def small_sweep(monkeypatch):
    """Caches are left as they are: no test looks at how fast it was."""
    monkeypatch.setattr(bench, "SWEEP", 1)


@pytest.fixture
def run_here(monkeypatch, tmp_path):
    """A function that runs bench.py in this process, which imports PyTorch only once and where a test
    can add FFNs, and returns its rows."""
    monkeypatch.setattr(bench, "set_up", lambda device: None)  # it would be for the whole process

    def run(*args: str) -> list[dict]:
        path = tmp_path / "rows.json"
        monkeypatch.setattr(sys, "argv", ["bench.py", *TINY, *args, f"--json={path}"])
        bench.main()
        return json.loads(path.read_text())["rows"]

    return run


def finite(row: dict) -> bool:
    return all(math.isfinite(v) for v in row.values() if isinstance(v, (int, float)))


def test_ffn_table(run_here, tmp_path, capsys):
    """Costs equal the formulas, fractions and ratios follow from the times, SwiGLU is 1.000 of itself;
    every FFN is there by default."""
    by_name = {row["ffn"]: row for row in run_here(*FFN)}
    result, text = json.loads((tmp_path / "rows.json").read_text()), capsys.readouterr().out
    d, h, n = 64, 128, 32
    assert (result["n_embd"], result["ffn_hidden"], result["tokens"]) == (d, h, n)
    assert list(by_name) == list(model.FFNS)
    swiglu, dsg, sparse = by_name["swiglu"], by_name["dsg"], by_name["sparseglu"]
    assert swiglu["params"] == 3 * d * h
    assert swiglu["flops"] == swiglu["ideal_flops"] == 6 * d * h
    assert dsg["flops"] == 8 * d * h
    predictor = 32 * 64 + 64 * h
    assert sparse["flops"] == 6 * d * h + 2 * predictor
    assert sparse["ideal_flops"] == 6 * d * h // 4 + 2 * predictor
    assert swiglu["over_swiglu"] == 1
    assert swiglu["spread"] == 0
    for row in by_name.values():
        assert finite(row)
        assert row["hidden"] == h
        assert row["forward_ms"] > 0
        assert math.isclose(row["matmul_fraction"], row["matmul_ms"] / row["both_ms"])
        assert math.isclose(row["over_swiglu"], row["both_ms"] / swiglu["both_ms"])
        assert math.isclose(row["tok_per_s"], n / row["both_ms"] * 1e3, rel_tol=1e-6)
        # The gradients of all weights that are trained, and of x, are alive at the end.
        assert row["peak_mib"] * 2**20 >= 4 * (n * d + 0.9 * 3 * d * h * (2 / 3))
        assert row["ffn"] in text
    executed = 3 * swiglu["flops"] * n  # a backward pass is two forward ones
    assert math.isclose(swiglu["tflops"], executed / swiglu["both_ms"] * 1e3 / 1e12, rel_tol=1e-6)


@pytest.mark.parametrize("match", ["params", "flops"])
def test_widths_are_matched_as_in_training(match, run_here):
    """--ffn_match has train.py's meaning in every mode: experts can be timed at equal executed FLOPs."""
    for mode in (FFN, ["--mode=decode", *FFN, "--n_layer=1"], ["--mode=step", *STEP]):
        shape = {"n_embd": 32, "ffn_hidden": 64} if mode[-1] == STEP[-1] else {}
        shape = shape or {"n_embd": 64, "ffn_hidden": 128}
        (row,) = run_here(*mode, "--ffn=sparsegated", f"--ffn_match={match}")
        config = model.GPTConfig(ffn="sparsegated", ffn_match=match, **shape)
        assert row["hidden"] == config.hidden != shape["ffn_hidden"]


def test_an_ffn_that_mixes_tokens(run_here, monkeypatch):
    """It gets sequences in mode ffn, and mode decode refuses it by name instead of timing another
    function."""

    class Mixing(model.SwiGLU):
        def __init__(self, d: int, h: int):
            super().__init__(d, h)
            self.conv = torch.nn.Conv1d(d, d, 3, groups=d)

        def forward(self, x):
            # raises for anything but (B, T, d)
            past = torch.nn.functional.pad(x.transpose(1, 2), (2, 0))
            return super().forward(self.conv(past).transpose(1, 2))

    monkeypatch.setitem(model.FFNS, "mixing", Mixing)
    (row,) = run_here(*FFN, "--block_size=16", "--ffn=mixing")
    assert finite(row)
    with pytest.raises(configurator.UserError, match="mixing mixes tokens"):
        run_here("--mode=decode", *FFN, "--n_layer=1", "--ffn=gelu,mixing")


def test_an_ffn_with_an_auxiliary_loss(run_here, monkeypatch):
    """Modes ffn and decode take its output alone."""

    class WithAux(model.SwiGLU):
        def forward(self, x):
            return super().forward(x), x.square().mean()

    monkeypatch.setitem(model.FFNS, "with_aux", WithAux)
    for mode in ([], ["--mode=decode", "--n_layer=2"]):
        (row,) = run_here(*FFN, *mode, "--ffn=with_aux")
        assert finite(row)


def test_the_products_of_experts_are_those_executed():
    """An expert's matrices multiply the tokens that reach it, not all of them."""
    layer = model.MoE(16, 96, n=8, k=2, share=1 / 3)
    _, flops, forward = bench.products(layer, 40, bench.Config(compile=False), CPU, torch.float32)
    assert flops == 3 * forward == 3 * 40 * 2 * (16 * 8 + 2 * 16 * 32 * (1 + 2))


class Stacked(torch.nn.Module):
    """Eight experts in one tensor, of which one works for a token."""

    def __init__(self, d: int, h: int):
        super().__init__()
        self.k, self.experts = 0.125, torch.nn.Parameter(torch.randn(8, d, h))
        self.down_proj = torch.nn.Linear(h, d, bias=False)

    def flops(self) -> int:
        return 4 * self.experts[0].numel()

    def forward(self, x):
        return self.down_proj((x @ self.experts[0]).relu())


class Convolved(torch.nn.Module):
    def __init__(self, d: int, h: int):
        super().__init__()
        self.conv, self.down_proj = torch.nn.Conv1d(d, h, 3), torch.nn.Linear(h, d, bias=False)

    def forward(self, x):
        past = torch.nn.functional.pad(x.transpose(1, 2), (2, 0))
        return self.down_proj(self.conv(past).transpose(1, 2).relu())


class Bagged(torch.nn.Module):
    def __init__(self, d: int, h: int):
        super().__init__()
        self.bag, self.down_proj = torch.nn.EmbeddingBag(h, d), torch.nn.Linear(d, d, bias=False)

    def flops(self) -> int:
        return 2 * self.down_proj.weight.numel()

    def forward(self, x):
        B, T, d = x.shape  # raises for a single token without a sequence
        ids = x.flatten(0, 1).argsort(-1)[:, :4]
        return self.down_proj(x + self.bag(ids).view(B, T, d))


class Twice(torch.nn.Module):
    def __init__(self, d: int, h: int):
        super().__init__()
        self.up_proj, self.down_proj = (torch.nn.Linear(d, d, bias=False) for _ in range(2))
        self.again = self.up_proj

    def forward(self, x):
        return self.down_proj(self.again(self.up_proj(x).relu()))


def test_the_products_of_classes_of_ones_own(run_here, monkeypatch):
    """Their TFLOP/s are those of their flops(). The time of their products is n/a where bench.py does
    not know these, and else that of what a class multiplies: no rows that are looked up, a matrix as
    often as it is used, a convolution as one matrix."""
    d, h, n, cfg = 64, 128, 32, bench.Config(compile=False)
    classes = {"stacked": Stacked, "convolved": Convolved, "bagged": Bagged, "twice": Twice}
    for name, cls in classes.items():
        monkeypatch.setitem(model.FFNS, name, cls)
    want = {"stacked": 4 * d * h, "convolved": 8 * d * h, "bagged": 2 * d * d, "twice": 6 * d * d}
    for row in run_here(*FFN, f"--ffn={','.join(classes)}"):
        name, executed = row["ffn"], 3 * n * want[row["ffn"]]
        assert row["flops"] == want[name]
        assert math.isclose(row["tflops"], executed / row["both_ms"] * 1e3 / 1e12, rel_tol=1e-6)
        assert (row["matmul_ms"] is None) == (row["matmul_fraction"] is None) == (name == "stacked")
        forward = bench.products(classes[name](d, h), n, cfg, CPU, torch.float32)[2]
        assert (forward == n * want[name]) == (name != "stacked")
    layer, kept = Convolved(d, h), []
    make = functools.partial(bench.products, layer, n, cfg, CPU, torch.float32)
    assert bench.peak_memory(lambda: kept.append(make()), CPU) == 4 * n * (3 * d + h + d)
    for row in run_here("--mode=decode", *FFN, "--n_layer=1", "--ffn=bagged,twice"):
        assert row["read_mib"] == row["flops"] / 2 * 4 / 2**20


def test_products_that_only_the_class_knows(run_here, monkeypatch):
    """A parameter of three dimensions may be experts or splines: no time of its products is shown."""
    monkeypatch.setitem(model.FFNS, "stacked", Stacked)
    (row,) = run_here("--mode=step", *STEP, "--ffn=stacked")
    assert row["matmul_ms"] is row["matmul_fraction"] is None
    assert row["tflops"] > 0


def test_running_thresholds_have_settled_before_decoding(run_here, monkeypatch):
    """At their start they let half of all experts or keys through, but are priced as a few."""
    made, make = {}, bench.make_ffn
    monkeypatch.setattr(bench, "make_ffn", lambda spec, d, h: made.setdefault(spec, make(spec, d, h)))
    run_here("--mode=decode", *FFN, "--n_layer=1", "--ffn=thresholdmoe,sparsegated:select=adaptive")
    x = torch.randn(200, 64)
    assert 0.05 < made["sparsegated:select=adaptive"].active(x) < 0.3  # k = 0.15
    experts = made["thresholdmoe"]
    assert 0.5 < experts.route(experts.scores(x))[3].sum() / 200 < 2


def test_products_share_their_operands():
    """A deep model's products allocate inputs by width, not for each matrix: at train.py's default shape
    that is 3.6 GB instead of 28."""
    cpu, cfg, n = torch.device("cpu"), bench.Config(compile=False), 100
    layers = torch.nn.ModuleList(model.SwiGLU(64, 128) for _ in range(8))
    kept = []

    def make() -> None:
        kept.append(bench.products(layers, n, cfg, cpu, torch.float32))

    assert bench.peak_memory(make, cpu) == 4 * n * (64 + 128)


def test_peak_memory_of_known_tensors():
    """What was alive at the worst moment: not what is left at the end, not the sum of all."""

    def call():
        a = torch.zeros(1_000_000)
        b = a + 1
        del a
        return b + 1, torch.zeros(500_000)

    assert bench.peak_memory(call, torch.device("cpu")) == 4 * 2_500_000


def test_decode_table(run_here, tmp_path):
    """Sparse FFNs decode, dense ones go forward; bytes and the ideal follow from the formulas."""
    args = ["--mode=decode", "--n_embd=64", "--ffn_hidden=256", "--n_layer=2"]
    by_name = {row["ffn"]: row for row in run_here(*args, "--ffn=sparseglu,gelu,spark")}
    result = json.loads((tmp_path / "rows.json").read_text())
    assert list(by_name) == ["sparseglu", "gelu", "spark"]
    assert result["n_layer"] == 2
    assert by_name["gelu"]["path"] == "forward"
    assert by_name["spark"]["path"] == "decode"
    assert math.isclose(by_name["gelu"]["ideal_speedup"], 1.5)
    ideal = 2 * (32 * 64 + 64 * 256 + 3 * 64 * 64)
    assert by_name["sparseglu"]["ideal_flops"] == ideal
    assert math.isclose(by_name["sparseglu"]["read_mib"], ideal / 2 * 4 / 2**20)
    for row in by_name.values():
        assert finite(row)
        assert row["ms"] > 0
    faster = by_name["gelu"]["ms"] / by_name["spark"]["ms"]
    assert math.isclose(by_name["spark"]["speedup"] / by_name["gelu"]["speedup"], faster)


def test_decode_on_a_gpu_is_refused():
    """There every FFN decodes by forward, so that the table would compare nothing."""
    with pytest.raises(configurator.UserError, match="use --device=cpu"):
        bench.bench_decode(bench.Config(), ["spark"], torch.device("meta"), torch.float32)


def test_a_step_of_several_passes():
    """Each pass is a forward and a backward one, and there is one update."""
    gpt, calls = model.GPT(model.GPTConfig(8, 128, 1, 1, 1, 8, ffn_hidden=8)), []
    gpt.register_forward_hook(lambda *_: calls.append(gpt.lm_head.weight.clone()))
    flags = bench.train.Config(block_size=8, micro_batch_size=2, compile=False)
    step, _ = bench.make_step(gpt, flags, CPU, torch.float32, passes=3)
    step()
    assert len(calls) == 3
    assert all(torch.equal(weight, calls[0]) for weight in calls)
    assert not torch.equal(gpt.lm_head.weight, calls[0])


def test_mps_is_not_timed():
    """Its work would still be in the queue when the clock is read. compare.py times by make_step."""
    gpt = model.GPT(model.GPTConfig(8, 128, 1, 1, 1, 8, ffn_hidden=8))
    with pytest.raises(configurator.UserError, match="mps cannot be timed"):
        bench.make_step(gpt, bench.train.Config(), torch.device("mps"), torch.float32)


def test_decode_in_bfloat16(run_here):
    """Every FFN has its matrices in it, but for the predictor, which works in float32 by design."""
    args = ["--mode=decode", "--n_embd=64", "--ffn_hidden=256", "--n_layer=1", "--dtype=bfloat16"]
    by_name = {row["ffn"]: row for row in run_here(*args)}
    assert list(by_name) == list(model.FFNS)
    for name in ("swiglu", "sparsegated", "sparseglu", "spark"):
        predictor = 32 * 64 + 64 * 256 if name == "sparseglu" else 0
        assert by_name[name]["read_mib"] == (by_name[name]["ideal_flops"] + 2 * predictor) / 2**20, name


def test_step_table_and_profile(run_here, tmp_path, capsys):
    """A step's FLOPs by the formula, memory not below weights and optimizer state, no MFU on a CPU, the
    attention kernel that ran, and the operators that took the most time."""
    row = run_here("--mode=step", *STEP, "--profile", "--ffn=geglu,spark:k=0.1")[0]
    result, text = json.loads((tmp_path / "rows.json").read_text()), capsys.readouterr().out
    assert row["ffn"] == "geglu"
    matrices = 4 * 32 * 32 + 3 * 32 * 64 + 128 * 32
    assert row["flops"] == 6 * matrices + 6 * 32 * 16
    assert row["params"] == matrices + 3 * 32 + 2 * 16  # norms: three of 32, q and k of 16
    assert row["mfu"] is None
    assert "n/a" in text
    assert row["peak_mib"] * 2**20 >= 12 * row["params"]
    assert math.isclose(row["tok_per_s"], 32 / row["ms"] * 1e3, rel_tol=1e-6)
    assert math.isclose(row["matmul_fraction"], row["matmul_ms"] / row["ms"])
    assert row["attention"] == "flash"
    assert result["n_kv_head"] == 2
    assert text.count("Self CPU time total") == 2
    assert text.count("aten::mm") >= 2


def test_where_compiling_fails_nothing_is_reported(monkeypatch, run_here, tmp_path, capsys):
    """One line with the reason and the cure, and no figures of eager code under the name of compiled
    ones."""

    def backend(graph, inputs):
        raise RuntimeError("no compiler")

    monkeypatch.setattr(bench, "compiled", lambda f, *_, **more: torch.compile(f, backend=backend))
    for mode in (["--mode=step", *STEP], FFN, ["--mode=decode", *FFN]):
        with pytest.raises(configurator.UserError, match=r"work here \(no compiler\): --compile=False$"):
            run_here(*mode, "--compile=True", "--ffn=swiglu")
    assert capsys.readouterr().out == ""
    assert not (tmp_path / "rows.json").exists()


def test_where_compiling_fails_peers_reports_nothing(tmp_path):
    """Without a C++ compiler, in the process of each peer."""
    env = {"CXX": "/nowhere/c++", "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache")}
    path = tmp_path / "rows.json"
    args = ["--systems=ours", "--rounds=1", "--device=cpu", *STEP, f"--json={path}"]
    done = call("experiments/peers.py", *args, **env)
    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr.splitlines()[-1].startswith("error: torch.compile does not work here (")
    assert done.stderr.splitlines()[-1].endswith("): --compile=False")
    assert "Traceback" not in done.stderr
    assert not path.exists()


@pytest.mark.parametrize("tied", [True, False])
def test_the_floor_of_a_step_is_its_products(tied):
    """6 FLOPs per token and number in a matrix: an embedding of its own is looked up, not multiplied."""
    gpt = model.GPT(model.GPTConfig(16, 128, 1, 2, 2, 32, ffn_hidden=64, tie_embeddings=tied))
    _, flops, _ = bench.products(gpt, 10, bench.Config(compile=False), CPU, torch.float32)
    attention = 6 * 32 * 16
    assert flops == 10 * (gpt.flops_per_token() - attention)


def test_the_seed_is_that_of_the_inputs(monkeypatch, run_here):
    """Of every mode: the tokens of a step are the same ones for the same --seed."""
    drawn, draw, runs = [], torch.randint, []
    monkeypatch.setattr(torch, "randint", lambda *a, **k: drawn.append(draw(*a, **k)) or drawn[-1])
    for seed in (5, 5, 6):
        drawn.clear()
        run_here("--mode=step", *STEP, f"--seed={seed}")
        runs.append(torch.stack(drawn))
    assert torch.equal(runs[0], runs[1])
    assert not torch.equal(runs[0], runs[2])


def test_the_machine_is_set_up_as_for_training(monkeypatch, run_here):
    """By train.py's own function: what is timed has its precision, its allocator and its determinism."""
    devices = []
    monkeypatch.setattr(bench, "set_up", devices.append)
    run_here("--mode=decode", "--ffn=swiglu", "--n_layer=1", *FFN)
    assert [device.type for device in devices] == ["cpu"]


@pytest.mark.parametrize(
    "args, word",
    [
        (["--mode=fnn"], "fnn"),
        (["--ffn=swigul"], "swiglu"),
        (["--ffn=swiglu,"], "unknown ffn"),
        (["--ffn=sparseglu:k=2"], "k=2"),
        (["--rounds=0"], "rounds"),
        (["--n_embd=-1"], "n_embd=-1"),
        (["--n_embd=30", "--ffn=sparseglu"], "r=32"),
        (["--tokens=300"], "--tokens=300 is not a multiple of --block_size=256"),
        (["--ffn_match=parms"], "did you mean params"),
        (["--device=tpu"], "tpu"),
        (["--device=cuda:7"], "cuda:7"),
        (["--dtype=float16"], "float16"),
        (["--json=no/such/folder/x.json"], "no/such/folder"),
        (["--json=."], "--json=. cannot be written"),
        (["--profile"], "--profile"),
        (["--mode=step", "--n_head=5"], "n_head"),
        (["--mode=step", "--optimizer=sgd"], "sgd"),
        (["--token=3"], "tokens"),
    ],
)
def test_errors_are_one_line(args, word, monkeypatch, capsys):
    """A mistake costs the user one line that names it, before any table. In this process, as
    importing torch fifteen times takes a minute."""
    monkeypatch.setattr(sys, "argv", ["bench.py", "--rounds=1", "--compile=False", *args])
    with pytest.raises(SystemExit) as stop:
        configurator.run(bench.main)
    assert capsys.readouterr().out == ""
    assert stop.value.code.startswith("error: ")
    assert word in stop.value.code
    assert "\n" not in stop.value.code


def test_the_backward_pass_of_an_auxiliary_loss_is_timed(run_here, monkeypatch):
    calls = []

    class WithAux(model.SwiGLU):
        def forward(self, x):
            aux = x.square().mean()
            aux.register_hook(lambda g: calls.append(1)) if aux.requires_grad else None
            return super().forward(x), aux

    monkeypatch.setitem(model.FFNS, "with_aux", WithAux)
    run_here(*FFN, "--ffn=with_aux")
    assert calls


def test_ratios_and_spreads():
    """The median of the rounds' own ratios, and half the distance between their quartiles."""
    a, b = [2.0, 9.0, 3.0], [1.0, 3.0, 3.0]
    assert bench.ratio(a, b) == 2
    assert bench.spread([1.0, 2.0, 3.0, 4.0, 5.0], [1.0] * 5) == 1


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("mode", ["step", "ffn"])
def test_what_is_timed_has_the_type_asked_for(monkeypatch, run_here, mode, dtype):
    seen = set()

    class Mine(model.SwiGLU):
        def forward(self, x):
            seen.add(torch.is_autocast_enabled("cpu"))
            return super().forward(x)

    monkeypatch.setitem(model.FFNS, "mine", Mine)
    run_here(*(STEP if mode == "step" else FFN), f"--mode={mode}", f"--dtype={dtype}", "--ffn=mine")
    assert seen == {dtype == "bfloat16"}


def test_contenders_take_turns():
    """After two untimed calls each, in reverse order every other round."""
    order = []
    calls = {name: functools.partial(order.append, name) for name in "abc"}
    times = bench.measure(calls, 3, CPU)
    assert "".join(order) == "aabbcc" + "abc" + "cba" + "abc"
    assert {name: len(rounds) for name, rounds in times.items()} == dict.fromkeys("abc", 3)


@pytest.mark.parametrize("mode", ["ffn", "decode"])
def test_each_round_has_other_inputs(monkeypatch, run_here, mode):
    """Which units and experts are in use depends on them, and compiled code may be slower for numbers of
    tokens that it has not met."""
    seen = []

    class Mine(model.SwiGLU):
        def forward(self, x):
            seen.append(x.detach().sum().item())
            return super().forward(x)

    monkeypatch.setitem(model.FFNS, "mine", Mine)
    args = FFN if mode == "ffn" else ["--n_embd=64", "--ffn_hidden=256", "--n_layer=1"]
    run_here(*args, f"--mode={mode}", "--ffn=mine", "--rounds=5", "--compile=False")
    each = seen[-5:] if mode == "decode" else seen[-10::2]  # in mode ffn forward, and both
    assert len(set(each)) == 5


def test_each_step_has_other_tokens(monkeypatch):
    """Though train_step itself sets the seed of PyTorch's random numbers."""
    seen, train_step = [], bench.train.train_step

    def record(model, optimizers, batches, *rest):
        seen.extend(batches)
        return train_step(model, optimizers, batches, *rest)

    monkeypatch.setattr(bench.train, "train_step", record)
    gpt = model.GPT(model.GPTConfig(8, 128, 1, 1, 1, 8, ffn_hidden=8))
    flags = bench.train.Config(block_size=8, micro_batch_size=2, compile=False)
    step, _ = bench.make_step(gpt, flags, CPU, torch.float32, passes=2)
    step(), step(), step()
    assert len({tuple(batch.flatten().tolist()) for batch in seen}) == 6


def test_figures_of_calls_of_one_second(monkeypatch, run_here):
    """Times are a layer's in mode decode, rates a step's in mode step."""
    monkeypatch.setattr(bench, "measure", lambda calls, *rest: {key: [1.0] for key in calls})
    (row,) = run_here(*FFN, "--mode=decode", "--n_layer=4", "--ffn=swiglu")
    assert row["ms"] == 250
    assert row["gb_per_s"] == pytest.approx(4 * row["read_mib"] * 2**20 / 1e9)
    (row,) = run_here(*STEP, "--mode=step", "--compile=False")
    tokens = row["tok_per_s"]
    assert row["ms"] == 1000
    assert row["tflops"] == pytest.approx(row["flops"] * tokens / 1e12)
    (row,) = run_here(*FFN, "--ffn=relu2")
    assert row["tok_per_s"] == 32
    assert row["tflops"] == pytest.approx(3 * 32 * row["flops"] / 1e12)
    assert (row["over_swiglu"], row["matmul_fraction"]) == (1, 1)


@pytest.fixture
def peers(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "experiments"))
    import peers

    return peers


def test_peers(peers, monkeypatch, tmp_path):
    """Hugging Face and nanoGPT (here a stand-in with its interface) beside ours, of one size. Their
    processes are forked from one that has PyTorch."""
    pytest.importorskip("transformers")
    monkeypatch.setattr(peers.multiprocessing, "get_context", lambda how: FORK)
    (tmp_path / "model.py").write_text(
        "from dataclasses import dataclass\n"
        "import torch.nn as nn\n"
        "import torch.nn.functional as F\n"
        "@dataclass\n"
        "class GPTConfig:\n"
        "    block_size: int\n    vocab_size: int\n    n_layer: int\n    n_head: int\n"
        "    n_embd: int\n    dropout: float\n    bias: bool\n"
        "class GPT(nn.Module):\n"
        "    def __init__(self, c):\n"
        "        super().__init__()\n"
        "        self.a = nn.Embedding(c.vocab_size, c.n_embd)\n"
        "        self.b = nn.Linear(c.n_embd, c.vocab_size, bias=c.bias)\n"
        "    def forward(self, idx, targets):\n"
        "        y = self.b(self.a(idx))\n"
        "        return y, F.cross_entropy(y.view(-1, y.size(-1)), targets.view(-1))\n"
    )
    args = [*TINY, *STEP, f"--nanogpt={tmp_path}", "--systems=ours,hf", f"--json={tmp_path}/p.json"]
    monkeypatch.setattr(sys, "argv", ["peers.py", *args])
    peers.main()
    by_name = {row["system"]: row for row in json.loads((tmp_path / "p.json").read_text())["rows"]}
    assert list(by_name) == ["ours", "hf", "nanogpt"]
    assert by_name["ours"]["params"] == by_name["hf"]["params"]
    assert by_name["ours"]["ours_faster"] == 1
    for row in by_name.values():
        assert math.isclose(row["ours_faster"], row["ms"] / by_name["ours"]["ms"])
        assert row["peak_mib"] * 2**20 >= 12 * row["params"]


def test_hugging_face_without_its_mask_is_the_same_model(peers):
    """Its logits are equal with and without a mask: causal attention does not need one."""
    pytest.importorskip("transformers")
    shape = {"n_layer": 2, "n_head": 2, "n_embd": 32, "ffn_hidden": 64, "block_size": 16}
    cfg = peers.Config(vocab_size=128, micro_batch_size=2, **shape)
    model, loss = peers.hugging_face(cfg)
    _, loss_without_mask = peers.PEERS["hf-no-mask"](cfg)
    batch = torch.randint(128, (2, 17))
    x = batch[:, :-1]
    with torch.no_grad():
        plain = model(input_ids=x).logits
        without_mask = model(input_ids=x, attention_mask={"full_attention": None}).logits
        assert torch.equal(plain, without_mask)
        changed = model(input_ids=torch.cat([x[:, :-1], x[:, -1:] ^ 1], 1)).logits
        assert torch.equal(plain[:, :-1], changed[:, :-1])  # so that neither sees the future
        assert loss(model, batch) == loss_without_mask(model, batch)


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_memory_at_rest_is_that_of_parameters_and_states(name):
    """Muon keeps one moment of a matrix, AdamW two; a frozen parameter has none."""
    gpt = model.GPT(model.GPTConfig(8, 128, 1, 2, 2, 32, "sparseglu", 64))
    flags = bench.train.Config(block_size=8, micro_batch_size=1, optimizer=name, compile=False)
    step, optimizers = bench.make_step(gpt, flags, CPU, torch.float32)
    step()
    trained = {n: p for n, p in gpt.named_parameters() if p.requires_grad}
    inside = [p for n, p in trained.items() if ".layers." in n and p.ndim == 2]
    moments = sum(p.nbytes for p in trained.values()) * 2
    counts = 4 * len(trained)  # AdamW's steps, float32
    muon = sum(p.nbytes + 4 for p in inside) * (name == "muon")
    weights = sum(p.nbytes for p in gpt.parameters())
    assert bench.at_rest(gpt, optimizers) == weights + moments + counts - muon


@pytest.mark.parametrize(
    "flag, word",
    [("--dtype=bf16", "bfloat16"), ("--systems=nanogpt", "--nanogpt=DIR"), ("--systems=gpt", "valid")],
)
def test_peers_bad_flags(peers, monkeypatch, flag: str, word: str):
    """One line, and nothing is timed in another dtype or with our own model as a peer."""
    monkeypatch.setattr(sys, "argv", ["peers.py", flag, "--device=cpu"])
    with pytest.raises(configurator.UserError, match=word):
        peers.main()


def test_peers_needs_a_clone(peers):
    with pytest.raises(configurator.UserError, match="--nanogpt=/nowhere has no model.py"):
        peers.nanogpt(peers.Config(nanogpt="/nowhere"))


def test_gpu_script_without_a_gpu(tmp_path):
    """It says so in one line, before it does anything. The script asks PyTorch, here a stand-in."""
    (tmp_path / "torch.py").write_text("class cuda:\n    is_available = lambda: False\n")
    env = os.environ | {"PYTHONPATH": str(tmp_path), "PYTHON": sys.executable}
    done = subprocess.run(
        ["bash", str(ROOT / "experiments" / "gpu.sh")], capture_output=True, text=True, env=env
    )
    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr.startswith("error: ")
    assert len(done.stderr.splitlines()) == 1


@pytest.fixture
def gpu_script(tmp_path):
    """A function that starts gpu.sh's dry run in a copy of the project; the folder of its results."""
    for file in [*ROOT.glob("*.py"), *ROOT.glob("experiments/*.*"), *ROOT.glob("config/*.py")]:
        path = tmp_path / file.relative_to(ROOT)
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(file.read_bytes())
    results = tmp_path / "results"

    def start(*args: str, **env: str) -> subprocess.Popen:
        env = os.environ | {"DEVICE": "cpu", "PYTHON": sys.executable, "RESULTS": str(results)} | env
        command = ["bash", str(tmp_path / "experiments" / "gpu.sh"), *args]
        options = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "start_new_session": True}
        return subprocess.Popen(command, text=True, env=env, **options)

    return start, results


def lines_of(results: Path) -> list[dict]:
    return [json.loads(line) for line in (results / "results.jsonl").read_text().splitlines()]


def test_gpu_script_goes_on_after_it_was_cut(gpu_script):
    """Killed in its second step, it has written the first; the same command does the rest, and only
    that, although a line of results was cut too."""
    start, results = gpu_script
    steps = ["2", "step8-both", "step8-recompute"]
    run = start(*steps)
    for line in run.stdout:
        if line.startswith("== step8-recompute"):
            break
    os.killpg(run.pid, signal.SIGKILL)
    run.wait()
    (first,) = lines_of(results)
    assert first["name"] == "step8-both"
    assert first["rows"][0]["ffn"] == "swiglu"
    with open(results / "results.jsonl", "a") as f:
        f.write('{"name": "step8-recompute", "ok": tr')
    said = start(*steps).communicate(timeout=240)[0]
    assert [line.split(":")[0] for line in said.splitlines() if line.startswith("== ")] == [
        "== step8-recompute"
    ]
    kept, cut, line = (results / "results.jsonl").read_text().splitlines()
    assert json.loads(kept) == first
    assert cut.endswith('"ok": tr')
    second = json.loads(line)
    assert (second["name"], second["ok"], second["recompute"]) == ("step8-recompute", True, True)
    report = (results / "report.md").read_text()
    assert all(f"- {name}: " in report for name in steps[1:])
    assert report.count("swiglu") == 2
    assert sorted(path.name for path in results.iterdir()) == ["log.txt", "report.md", "results.jsonl"]


def test_gpu_script_records_what_failed(gpu_script, tmp_path):
    """A step that failed, here for want of time, is named and not taken for done."""
    start, results = gpu_script
    slow = tmp_path / "slow"
    slow.write_text(f'[ "$1" = bench.py ] && exec sleep 60\nexec "{sys.executable}" "$@"\n')
    run = start("2", "step32", LIMIT="2", PYTHON=f"sh {slow}")
    assert "FAILED after " in run.communicate(timeout=60)[0]
    again = start("2", "step32", LIMIT="0").communicate(timeout=60)[0]
    assert again == "== step32: no time is left\n"
    (line,) = lines_of(results)
    assert (line["name"], line["ok"], line["exit"]) == ("step32", False, 124)
    assert "- step32: failed: " in (results / "report.md").read_text()


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_gpu_script_measures_all(gpu_script):
    """The dry run of both parts: every step that a CPU can do succeeds."""
    start, results = gpu_script
    start(LIMIT="600").communicate(timeout=1200)
    lines = {line["name"]: line for line in lines_of(results)}
    assert len(lines) == 17
    assert [name for name, line in lines.items() if not line["ok"]] == []
    assert lines["ffn-flops"]["rows"][2]["ffn"] == "moe"
    assert lines["peers-hf"]["rows"][0]["system"] == "hf"
    assert lines["smoke"]["rows"][0]["tok_per_s"] > 0
    assert lines["facts"]["attention"]
