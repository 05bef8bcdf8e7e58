"""
Time whole training steps beside those of the trainers that people would use instead.

    python experiments/peers.py                                  # Hugging Face's Qwen3
    git clone https://github.com/karpathy/nanoGPT ../nanoGPT
    python experiments/peers.py --nanogpt=../nanoGPT             # and nanoGPT

All are compiled, of one shape, in one dtype, with fused AdamW and clipping. Each runs in a process of
its own, with its own loss and the memory allocator set as its trainer sets it. Hugging Face's model runs
twice: `hf` as people run it, where a compiled model builds its causal mask as a tensor, with which
attention takes a slower kernel (transformers issue 48925), and `hf-no-mask` with a mask of None, where
attention is causal by its flag, as ours is. nanoGPT's FFN is a GELU of width 4 n_embd, which has as many
parameters as a SwiGLU of 8/3 n_embd. The figures are those of `bench.py --mode=step`; `ours_faster` is
a system's time over ours.
"""

from __future__ import annotations

import functools
import gc
import importlib.util
import multiprocessing
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Literal

import torch
from torch import Tensor, nn

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import bench  # noqa: E402
import train  # noqa: E402
from configurator import UserError, configure, run, suggest  # noqa: E402
from model import GPT, GPTConfig  # noqa: E402


@dataclass
class Config:
    systems: str = "ours,hf-no-mask,hf"  # which to time, comma-separated
    nanogpt: str = ""  # folder of your clone of nanoGPT, which is then timed too
    n_layer: int = 6  # layers
    n_head: int = 6  # attention heads
    n_embd: int = 384  # width
    ffn_hidden: int = 1024  # hidden width of the FFN
    block_size: int = 256  # tokens per sequence
    micro_batch_size: int = 8  # sequences per step
    vocab_size: int = 50304  # token ids
    rounds: int = 15  # timed steps of each
    device: str = "auto"  # cpu, cuda, cuda:1; auto: cuda if there is one
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"  # auto: bfloat16 on cuda
    compile: bool = True  # torch.compile
    seed: int = 0  # of weights and tokens
    json: str = ""  # write the rows to this file


def hugging_face(
    cfg: Config, mask: dict | None = None
) -> tuple[nn.Module, Callable[[nn.Module, Tensor], Tensor]]:
    """transformers' Qwen3 of that shape, and its loss of a batch (B, T + 1)."""
    try:
        from transformers import Qwen3Config, Qwen3ForCausalLM
    except ImportError:
        cure = "pip install -r requirements-dev.txt, or --systems=ours"
        raise UserError(f"transformers is missing: {cure}") from None
    config = Qwen3Config(
        vocab_size=cfg.vocab_size,
        hidden_size=cfg.n_embd,
        intermediate_size=cfg.ffn_hidden,
        num_hidden_layers=cfg.n_layer,
        num_attention_heads=cfg.n_head,
        num_key_value_heads=cfg.n_head,
        head_dim=cfg.n_embd // cfg.n_head,
        max_position_embeddings=cfg.block_size,
        tie_word_embeddings=True,
        use_cache=False,
        attn_implementation="sdpa",
    )

    def loss(model: nn.Module, batch: Tensor) -> Tensor:
        x, y = batch[:, :-1], batch[:, 1:].contiguous()
        return model(input_ids=x, labels=x, shift_labels=y, attention_mask=mask).loss

    return Qwen3ForCausalLM(config), loss


def nanogpt(cfg: Config) -> tuple[nn.Module, Callable[[nn.Module, Tensor], Tensor]]:
    """nanoGPT's own model from the clone, and its loss of a batch (B, T + 1)."""
    path = Path(cfg.nanogpt, "model.py")
    if not path.is_file():
        raise UserError(f"--nanogpt={cfg.nanogpt} has no model.py: give the folder of your clone")
    spec = importlib.util.spec_from_file_location("nanogpt_model", path)
    module = sys.modules["nanogpt_model"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    shape = {k: getattr(cfg, k) for k in ("block_size", "vocab_size", "n_layer", "n_head", "n_embd")}
    model = module.GPT(module.GPTConfig(**shape, dropout=0.0, bias=False))
    return model, lambda model, batch: model(batch[:, :-1], batch[:, 1:].contiguous())[1]


def peer_step(
    model: nn.Module, loss: Callable, cfg: Config, device: torch.device, dtype: torch.dtype
) -> tuple[Callable[[], object], list[torch.optim.Optimizer]]:
    """A step as a careful user would write it (forward, backward, clip, AdamW), and its optimizer."""
    size = (cfg.micro_batch_size, cfg.block_size + 1)
    cast = functools.partial(torch.autocast, device.type, dtype, enabled=dtype != torch.float32)
    params = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in params if p.ndim >= 2], "weight_decay": 0.1},
        {"params": [p for p in params if p.ndim < 2], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=6e-4, betas=(0.9, 0.95), fused=True)
    ready = torch.compile(model, dynamic=False) if cfg.compile else model

    def step() -> None:
        batch = torch.randint(cfg.vocab_size, size, device=device)
        with cast():
            value = loss(ready, batch)
        value.backward()
        nn.utils.clip_grad_norm_(params, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step, [optimizer]


def our_step(cfg: Config, device: torch.device, dtype: torch.dtype) -> tuple[nn.Module, dict, list]:
    """Our model, its step by train.py's own functions and the step's matrix products, its optimizers."""
    bench.set_up(device)
    model = GPT(bench.same_names(GPTConfig, cfg, n_kv_head=cfg.n_head)).to(device)
    step, optimizers = bench.make_step(model, bench.same_names(train.Config, cfg), device, dtype)
    matmul, *_ = bench.products(model, cfg.micro_batch_size * cfg.block_size, cfg, device, dtype)
    return model, {"ours": step, "matmul": matmul}, optimizers


PEERS = {
    "nanogpt": nanogpt,
    "hf": hugging_face,
    # Without a mask, which it would build as a tensor. Attention is causal without it too.
    "hf-no-mask": functools.partial(hugging_face, mask={"full_attention": None}),
}


def contend(cfg: Config, system: str, pipe) -> None:
    """A contender's process: it sends its parameters and peak memory, then runs what it is told."""
    try:
        device, dtype = bench.pick_device(cfg)
        torch.manual_seed(cfg.seed)
        if device.type == "cuda":
            torch.set_float32_matmul_precision("high")  # as train.py sets it
        if system == "ours":
            model, calls, optimizers = our_step(cfg, device, dtype)
        else:
            model, loss = PEERS[system](cfg)
            model = model.to(device)
            step, optimizers = peer_step(model, loss, cfg, device, dtype)
            calls = {system: step}
        with bench.compile_errors():
            calls[system]()
        peak = bench.peak_memory(calls[system], device) + bench.at_rest(model, optimizers)
        pipe.send((sum(p.numel() for p in model.parameters()), peak))
        gc.disable()
        while True:
            name = pipe.recv()
            calls[name]()
            if device.type == "cuda":
                torch.cuda.synchronize()
            pipe.send(name)
    except UserError as e:
        pipe.send(e)
    except (EOFError, KeyboardInterrupt):  # the table is printed, or nobody waits for it
        pass


def take_turns(cfg: Config, systems: list[str], about: dict) -> dict[str, list[float]]:
    """Start each system in a process of its own and time their steps in turn. Return the seconds of each
    round by system, beside ours of its matrix products. Put (parameters, peak memory) in `about`."""
    spawn, pipes, processes = multiprocessing.get_context("spawn"), {}, []
    for system in systems:
        bench.progress(f"preparing {system}")
        pipes[system], other = spawn.Pipe()
        processes.append(spawn.Process(target=contend, args=(cfg, system, other), daemon=True))
        processes[-1].start()
        other.close()

    def told(pipe, name: str) -> Callable[[], None]:
        return lambda: (pipe.send(name), pipe.recv())

    try:
        for system in systems:
            try:
                about[system] = pipes[system].recv()
            except EOFError:
                raise UserError(f"{system} ended before its first step, see above") from None
            if isinstance(about[system], UserError):
                raise about[system]
        calls = {system: told(pipes[system], system) for system in systems}
        if "ours" in systems:
            calls["matmul"] = told(pipes["ours"], "matmul")
        return bench.measure(calls, cfg.rounds, torch.device("cpu"))  # by this process's clock
    finally:
        for pipe, process in zip(pipes.values(), processes):
            pipe.close()  # which ends it
            process.join(timeout=20)  # or it would be killed, and print a warning after our error


def main() -> None:
    cfg, _ = configure(Config, sys.argv[1:])
    for name, value in vars(cfg).items():
        if type(value) is int and value < (0 if name == "seed" else 1):
            raise UserError(f"--{name}={value} is too small")
    wanted = {*cfg.systems.split(","), *["nanogpt"] * bool(cfg.nanogpt)}
    for name in wanted - {*PEERS, "ours"}:
        raise UserError(f"--systems={cfg.systems}: {suggest(name, [*PEERS, 'ours'])}")
    if "nanogpt" in wanted and not cfg.nanogpt:
        raise UserError("--systems has nanogpt: give the folder of your clone with --nanogpt=DIR")
    systems = [system for system in [*PEERS, "ours"] if system in wanted]  # what may be missing is first
    train.check_flags(bench.same_names(train.Config, cfg, batch_size=cfg.micro_batch_size), world=1)
    device, dtype = bench.pick_device(cfg)
    # Side by side on a CPU, whose speed changes from minute to minute; one after the other on a GPU, so
    # that each has all of the memory.
    together = [systems] if device.type == "cpu" else [[system] for system in systems]
    times, about = {}, {}
    for group in together:
        times |= take_turns(cfg, group, about)

    rows, n = [], cfg.micro_batch_size * cfg.block_size
    for system in reversed(systems):
        seconds = median(times[system])
        params, peak = about[system]
        row = {"system": system, "params": params, "ms": 1e3 * seconds, "tok_per_s": n / seconds}
        row["peak_mib"] = peak / 2**20
        if "ours" in times and len(systems) > 1:
            row["matmul_fraction"] = bench.ratio(times["matmul"], times[system])
            row["ours_faster"] = bench.ratio(times[system], times["ours"])
            row["spread"] = bench.spread(times[system], times["ours"])
        rows.append(row)
    bench.report(cfg, device, dtype, rows)


if __name__ == "__main__":
    run(main)
