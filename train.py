"""
Train a Qwen3-style language model whose FFN is picked by a flag, on shards of tokens.

    python train.py config/smoke.py                                  # no GPU, two minutes
    torchrun --nproc_per_node=8 train.py --ffn=sparseglu             # the full run

Step n is the state after n updates. Neither batches nor initial matrices of equal name and shape depend
on the FFN: runs that differ in --ffn see the same tokens, on any number of GPUs, resumed or not.
"""

from __future__ import annotations

import functools
import gc
import io
import json
import math
import os
import platform
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from contextlib import nullcontext, suppress
from dataclasses import asdict, dataclass, field, fields
from datetime import timedelta
from typing import Literal, TextIO

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.elastic.multiprocessing.errors import record
from torch.nn.parallel import DistributedDataParallel as DDP

import model as model_file
import prepare_fineweb
from configurator import UserError, configure, print0, read_launcher, run, user_error
from model import FFNS, GPT, GPTConfig, check_ffns, compile_errors, compiled, evaluating, set_up
from model import code_hash, ffn_code, ffn_cost, has, is_expanded, is_matrix, is_residual, parse_spec
from prepare_fineweb import Data, has_shards, load_encoding, locate, lock_folder, open_data
from prepare_fineweb import read_windows, whole_file, window_counts

# ---- Flags --------------------------------------------------------------------------------------


def resumable(default: object, neutral: bool = False):
    """A flag that a resumed run may change. A neutral one cannot change a loss."""
    return field(default=default, metadata={"neutral": neutral})


neutral = functools.partial(resumable, neutral=True)


@dataclass
class Config:
    # where things are
    out_dir: str = neutral("")  # folder of the run; empty: out/{ffn}-s{seed}
    data_dir: str = resumable("data/fineweb")  # folder of token shards
    prepare: str = neutral("")  # arguments for prepare_fineweb.py, run when data_dir has no shards
    init_from: Literal["scratch", "resume", "auto"] = neutral("scratch")  # auto: resume if it can
    eval_only: bool = neutral(False)  # evaluate (and sample) once, then stop
    # how often, in steps
    eval_interval: int = neutral(50)  # between validations; also at step 0 and at the end
    val_tokens: int = resumable(10_485_760)  # tokens of validation; all of them if there are fewer
    log_interval: int = neutral(10)  # a line of progress and a row in log.jsonl
    save_interval: int = neutral(100)  # between checkpoints; also at the end
    # model: the papers' "134M"
    n_layer: int = 32  # layers
    n_head: int = 8  # attention heads
    n_kv_head: int = 8  # key-value heads; fewer than n_head: grouped-query attention
    n_embd: int = 512  # width
    block_size: int = 2048  # tokens per sequence
    ffn: str = "swiglu"  # the FFN and its options, e.g. sparseglu or asg:threshold=neuron
    ffn_hidden: int = 2048  # hidden width of the FFN
    ffn_match: Literal["hidden", "params", "flops"] = "hidden"  # keep ffn_hidden, or match SwiGLU's cost
    tie_embeddings: bool = True  # lm_head shares the embedding's weight
    ffn_init_std: float = 0.02  # standard deviation of the FFN's initial matrices but down_proj
    residual: Literal["float32", "bfloat16"] = "float32"  # residual stream under bfloat16 autocast
    # training: the Dynamic Sparse Gating paper's run
    max_iters: int = resumable(400)  # steps
    batch_size: int = 512  # sequences per step over all ranks
    micro_batch_size: int = resumable(16)  # sequences per device pass
    learning_rate: float = 6e-4  # peak
    min_lr: float = 6e-5  # at the end of the schedule
    warmup_iters: int = 40  # steps of linear warm-up
    lr_decay_iters: int = 0  # step at which the schedule ends; 0: max_iters
    schedule: Literal["cosine", "wsd"] = "cosine"  # wsd: constant, then linear over the last 20%
    weight_decay: float = 0.1  # matrices only
    beta1: float = 0.9  # AdamW
    beta2: float = 0.95  # AdamW
    grad_clip: float = 1.0  # largest norm of the gradient; 0: no clipping
    optimizer: Literal["adamw", "muon"] = "adamw"  # muon: for the layers' 2-D matrices, AdamW for others
    seed: int = 0  # of the initial weights
    data_seed: int = 0  # of the order of the data
    # machine
    device: str = resumable("auto")  # auto, cpu, cuda, cuda:1, mps
    dtype: Literal["auto", "float32", "bfloat16"] = resumable("auto")  # autocast type
    compile: bool = resumable(True)  # torch.compile; never on mps
    recompute: bool = resumable(False)  # if compiled: compute elementwise results again, to save memory
    # to watch it, and a sample at the end
    wandb_project: str = neutral("")  # also log to this Weights & Biases project
    sample_tokens: int = neutral(0)  # tokens of text to sample at the end
    prompt: str = neutral("")  # text to continue; empty: the start of a document
    temperature: float = neutral(0.8)  # of sampling; 0: always the likeliest token
    top_k: int = neutral(0)  # sample among the k likeliest tokens; 0: all


def check_flags(cfg: Config, world: int) -> None:
    """Raise UserError for what cannot work, before data are read or a model is built."""
    sizes = "eval_interval log_interval save_interval batch_size micro_batch_size block_size".split()
    least = dict.fromkeys(sizes, 1) | {"val_tokens": cfg.block_size}
    for name, value in vars(cfg).items():
        if isinstance(value, (int, float)) and value < least.get(name, 0):
            raise UserError(f"--{name}={value} must be at least {least.get(name, 0)}")
    for name, limit in {"beta1": 1, "beta2": 1, "seed": 2**32, "data_seed": 2**32}.items():
        if getattr(cfg, name) >= limit:
            raise UserError(f"--{name}={getattr(cfg, name)} must be below {limit}")
    if 0 < cfg.learning_rate < cfg.min_lr:
        raise UserError(f"--min_lr={cfg.min_lr} is above --learning_rate={cfg.learning_rate}: lower it")
    parse_spec(cfg.ffn)
    per_pass = world * cfg.micro_batch_size
    if cfg.batch_size % per_pass and not cfg.eval_only:
        near = max(1, cfg.batch_size // per_pass) * per_pass
        parts = f"ranks x micro_batch_size = {world} x {cfg.micro_batch_size}: try --batch_size={near}"
        raise UserError(f"--batch_size={cfg.batch_size} is not a multiple of {parts}")


def saved_flags(saved: dict) -> dict:
    """The flags of a checkpoint or config.json, checked as if typed. Newer flags get their defaults."""
    return asdict(configure(Config, [f"--{name}={value}" for name, value in saved.items()])[0])


def model_config(flags: dict, **more: int) -> GPTConfig:
    """The model's part of the flags."""
    return GPTConfig(**{k: v for k, v in flags.items() if hasattr(GPTConfig, k)}, **more)


def pick_device(name: str, local_rank: int) -> torch.device:
    """The device of this rank. Raises UserError if there is no such device."""
    n_cuda, mps = torch.cuda.device_count(), torch.backends.mps.is_available()
    if name == "auto":
        name = "cuda" if n_cuda else "mps" if mps and "RANK" not in os.environ else "cpu"
    if not re.fullmatch(r"cpu|mps|cuda(:\d+)?", name):
        raise UserError(f"--device={name} is unknown: auto, cpu, cuda, cuda:N or mps")
    # Attention and norms on MPS were silently wrong (pytorch issues 195910, 181133, 183825).
    old = tuple(map(int, torch.__version__.split(".")[:2])) < (2, 13)
    if name == "mps" and (old or not mps or "RANK" in os.environ):
        raise UserError("MPS needs Apple silicon, torch 2.13 or newer, a single rank: use --device=cpu")
    if not name.startswith("cuda"):
        return torch.device(name)
    index = local_rank if "RANK" in os.environ else int(name[5:] or 0)
    if index >= n_cuda:
        cure = "start fewer processes on a machine, let each see all of its GPUs, or use --device=cpu"
        raise UserError(f"--device={name} needs GPU {index}, and this process sees {n_cuda}: {cure}")
    torch.cuda.set_device(index)
    return torch.device("cuda", index)


def use_bfloat16(dtype: str, device: torch.device) -> bool:
    """Whether to autocast to bfloat16; a GPU that has none uses float32, as the printed device says."""
    if device.type != "cuda":
        return dtype == "bfloat16"
    return dtype != "float32" and torch.cuda.get_device_capability(device)[0] >= 8


# ---- Schedule and optimizer ---------------------------------------------------------------------


def schedule(step: int, cfg: Config) -> float:
    """The learning rate of the update from step to step + 1, as a fraction of the highest."""
    if step < cfg.warmup_iters:
        return (step + 1) / (cfg.warmup_iters + 1)
    least = cfg.min_lr / cfg.learning_rate if cfg.learning_rate else 0.0
    if step >= cfg.lr_decay_iters:
        return least
    if cfg.schedule == "wsd":
        left = min(1.0, (cfg.lr_decay_iters - step) / (0.2 * cfg.lr_decay_iters))
    else:
        done = (step - cfg.warmup_iters) / (cfg.lr_decay_iters - cfg.warmup_iters)
        left = 0.5 * (1 + math.cos(math.pi * done))
    return least + left * (1 - least)


def make_optimizers(model: GPT, cfg: Config) -> list[torch.optim.Optimizer]:
    """Fused AdamW; with --optimizer=muon the two-dimensional matrices inside layers go to Muon. Weight
    decay is for matrices only. Each group keeps its own `initial_lr`, which the schedule multiplies."""
    params = {name: p for name, p in model.named_parameters() if p.requires_grad}
    inside = [name for name, p in params.items() if "layers." in name and p.ndim == 2 and is_matrix(p)]
    muon = [params.pop(name) for name in inside] if cfg.optimizer == "muon" else []
    groups = [
        {"params": [p for p in params.values() if is_matrix(p)], "weight_decay": cfg.weight_decay},
        {"params": [p for p in params.values() if not is_matrix(p)], "weight_decay": 0.0},
    ]
    lr, betas = cfg.learning_rate, (cfg.beta1, cfg.beta2)
    optimizers: list[torch.optim.Optimizer] = [torch.optim.AdamW(groups, lr, betas, fused=True)]
    if muon:  # match_rms_adamw: so that AdamW's learning rate suits it
        optimizers.append(torch.optim.Muon(muon, lr, cfg.weight_decay, adjust_lr_fn="match_rms_adamw"))
    return optimizers


# ---- One step -----------------------------------------------------------------------------------


def inputs_and_targets(batch: Tensor) -> tuple[Tensor, Tensor]:
    """Split (B, T + 1) into inputs and targets (B, T): copies, so that their strides never change."""
    return tuple(t.clone(memory_format=torch.contiguous_format) for t in (batch[:, :-1], batch[:, 1:]))


def train_step(
    model: nn.Module, optimizers: list[torch.optim.Optimizer], batches: list[Tensor], cfg: Config,
    step: int, failed: Tensor, autocast: Callable = nullcontext,
) -> tuple[Tensor, Tensor | None, Tensor]:  # fmt: skip
    """One update of model (DDP, compiled or plain) on this rank's batches, (micro, T + 1) each. Returns
    scalars on the device: the loss, the FFNs' auxiliary loss (means over all ranks; None if there is
    none), the gradient's norm before clipping. `failed` gets the first step where one is not finite."""
    total = torch.zeros(2, device=failed.device)  # the loss and the auxiliary loss
    for i, batch in enumerate(batches):
        if isinstance(model, DDP):
            model.require_backward_grad_sync = i == len(batches) - 1
        with autocast():
            aux, loss = model(*inputs_and_targets(batch), with_aux=True)
        both = torch.stack((loss, torch.zeros_like(loss) if aux is None else aux)) / len(batches)
        both.sum().backward()
        total += both.detach()
    optimized = {p for optimizer in optimizers for g in optimizer.param_groups for p in g["params"]}
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if missing := [name for name, p in trained.items() if p.grad is None or p not in optimized]:
        name = re.sub(r"^module\.|_orig_mod\.", "", missing[0])
        cure = "use it in each forward, if only on no tokens, or freeze it with requires_grad_(False)"
        raise UserError(f"step {step + 1}: {name} received no gradient or was frozen at first: {cure}")
    if isinstance(model, DDP):
        dist.all_reduce(total)
        total /= dist.get_world_size()
    norm = nn.utils.clip_grad_norm_(trained.values(), cfg.grad_clip or math.inf)
    finite = torch.isfinite(total.sum() + norm)
    failed.copy_(torch.where((failed == 0) & ~finite, step + 1, failed))
    torch.manual_seed(cfg.seed * 2**20 + step)  # what an optimizer draws is the same on all ranks
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = group.setdefault("initial_lr", group["lr"]) * schedule(step, cfg)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return total[0], None if aux is None else total[1], norm


# Dense bfloat16 TFLOP/s from the data sheets. The first match wins; $ excludes laptop cards.
PEAK_TFLOPS = {"B200": 2250, "H200 NVL": 835, "H200": 989, "H100 PCIe": 756, "H100 NVL": 835}
PEAK_TFLOPS |= {"H100": 989, "A100": 312, "L40S": 362, "L4": 121, "RTX 4090$": 165, "RTX 3090$": 71}


def peak_flops(device: torch.device) -> float | None:
    """Peak bfloat16 FLOP/s of a device, for MFU; None if unknown."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    known = (1e12 * f for key, f in PEAK_TFLOPS.items() if re.search(rf"\b{key}(?!\w)", name))
    return next(known, None) if "MIG" not in name else None  # a part of a GPU


# ---- Evaluation ---------------------------------------------------------------------------------


def any_rank(flag: bool) -> bool:
    """Whether the flag is true on any rank. Every rank calls it."""
    word = torch.tensor(int(flag))  # on the CPU, so that no GPU is waited for
    if dist.is_initialized():
        dist.all_reduce(word, dist.ReduceOp.MAX)
    return bool(word)


@torch.no_grad()
def evaluate(
    model: nn.Module, data: Data, cfg: Config, device: torch.device, autocast: Callable, signals: list
) -> float | None:
    """Mean loss in nats per token over the first val_tokens // block_size windows, in order, split
    over all ranks; it does not depend on how many there are. None if a signal came: stop and save."""
    T, micro = cfg.block_size, cfg.micro_batch_size
    rank, world, _ = read_launcher()
    places = [(s, i) for s, n in enumerate(window_counts(data.val, T)) for i in range(n)]
    places, losses = places[: cfg.val_tokens // T], []
    for first in range(0, len(places), world * micro):
        if any_rank(bool(signals)):
            return None
        mine = places[first + rank * micro :][:micro]
        # Padding rows, not counted, give all batches the one shape that torch.compile has seen.
        batch = torch.full((micro, T + 1), -100)
        batch[: len(mine)] = torch.from_numpy(read_windows(data.val, mine, T, data.n_vocab))
        x, y = inputs_and_targets(to_device(batch, device))
        with autocast():
            losses.append((len(mine), model(x.clamp(min=0), y)[1]))
    total = sum(n * loss.cpu().double() for n, loss in losses)
    if dist.is_initialized():
        dist.all_reduce(total)
    return float(total) / len(places)


def to_device(batch: Tensor, device: torch.device) -> Tensor:
    """Copy a batch to the device without waiting, from pinned memory if the device is a GPU."""
    return (batch.pin_memory() if device.type == "cuda" else batch).to(device, non_blocking=True)


@torch.no_grad()
def active_fraction(model: GPT, data: Data, device: torch.device, autocast: Callable) -> float | None:
    """The share of units that sparse FFNs use on the first validation window; None if all are dense."""
    sparse = [layer.mlp for layer in model.model.layers if has(layer.mlp, "active")]
    if not sparse:
        return None
    active: list[Tensor] = []
    hooks = [f.register_forward_pre_hook(lambda f, x: active.append(f.active(x[0]))) for f in sparse]
    T = model.config.block_size
    first = next(s for s, count in enumerate(window_counts(data.val, T)) if count)
    tokens = torch.from_numpy(read_windows(data.val, [(first, 0)], T, data.n_vocab))
    with autocast():
        model.model(tokens[:, :-1].to(device))
    for hook in hooks:
        hook.remove()
    return float(torch.stack([torch.as_tensor(a).float().mean() for a in active]).mean())


def sample(model: GPT, cfg: Config, data: Data, device: torch.device, autocast: Callable) -> str:
    """Text that goes on from --prompt, and the speed; or why there is none."""
    try:
        encoding = load_encoding(data.encoding)
    except (UserError, ImportError) as e:
        return f"no sample: {e}"
    idx = torch.tensor([[encoding.eot_token, *encoding.encode_ordinary(cfg.prompt)]], device=device)
    torch.manual_seed(cfg.seed)
    n, start = cfg.sample_tokens, time.perf_counter()
    with autocast():
        out = model.generate(idx, n, cfg.temperature, cfg.top_k, n_vocab=data.n_vocab)
    text = encoding.decode(out[0, 1:].tolist())
    return f"sample ({n} tokens, {n / (time.perf_counter() - start):,.0f} tokens/s):\n{text}"


# ---- Checkpoint and log -------------------------------------------------------------------------


def load_checkpoint(path: str) -> dict:
    """The checkpoint in a file, loaded without running code. Raises UserError if it is none of ours."""
    cure = "check --out_dir, or start anew with --init_from=scratch"
    with user_error(f"no checkpoint can be loaded from {path}", cure), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about a file that is no zip archive
        saved = torch.load(path, map_location="cpu", weights_only=True)
        if type(step := saved["step"]) is not int or step < 0 or "model" not in saved:
            raise ValueError("not a checkpoint of train.py")
        return saved | {"flags": saved_flags(saved["flags"]), "shards": dict(saved["shards"])}


def restore(model: GPT, optimizers: list, checkpoint: dict, path: str, code: dict[str, str]) -> None:
    """Load a checkpoint. Raises UserError if it does not fit; warns if other code saved it."""
    for key, what in {"ffn_code": model.config.ffn, "trainer_code": "the trainer"}.items():
        if checkpoint.get("code", code)[key] != code[key]:
            print0(f"warning: the code of {what} is not what it was when {path} was saved")
    cure = "give the data that the run had, or start anew with another --out_dir"
    with user_error(f"{path} does not fit this model and data", cure):
        model.load_state_dict(checkpoint["model"])
        for optimizer, state in zip(optimizers, checkpoint["optimizers"], strict=True):
            optimizer.load_state_dict(state)
            if optimizer.defaults.get("fused"):  # then AdamW would write beyond a smaller tensor
                for p, tensors in optimizer.state.items():
                    if any(t.ndim and t.shape != p.shape for t in tensors.values()):
                        raise ValueError("an optimizer state of another shape")


def check_model(model: GPT, optimizers: list, autocast: Callable, length: int, training: bool) -> None:
    """Raise UserError for a model that would train and be wrong: an FFN that sees the future at the last
    or first step, a parameter in no optimizer or in several, a checkpoint that could never be loaded."""
    moves = any(has(m, "set_progress") for m in model.model.layers.modules())
    for step in (length - 1, 0) if moves else (0,):
        with evaluating(model):  # which undoes what set_progress writes into buffers
            model.set_progress(step, length)
            check_ffns(model, autocast, training)
    optimized = [id(p) for o in optimizers for group in o.param_groups for p in group["params"]]
    for name, p in model.named_parameters():
        if p.requires_grad and (n := optimized.count(id(p))) != 1:
            raise UserError(f"{name} is in {n} optimizers, not in one: see make_optimizers")
    for name, value in model.state_dict().items():
        if not isinstance(value, Tensor):
            raise UserError(f"{name} is not a tensor: let get_extra_state return one, or use buffers")
    with user_error("an optimizer's settings could be saved and not loaded", "use Python's own numbers"):
        torch.save([o.state_dict()["param_groups"] for o in optimizers], file := io.BytesIO())
        torch.load(io.BytesIO(file.getvalue()), weights_only=True)


# How a row of log.jsonl is printed: these of its numbers, in this order.
SHOWN = {"val_loss": "val  {:.4f}", "active": "active {:.1%}", "train_loss": "loss {:.4f}",
         "aux_loss": "aux {:.4f}", "lr": "lr {:.2e}", "grad_norm": "norm {:6.2f}",
         "step_ms": "{:8.1f} ms", "tok_per_s": "{:>9,.0f} tok/s", "mfu": "mfu {:.1%}"}  # fmt: skip


def report(row: dict, cfg: Config, wandb) -> None:
    """On rank 0 print a row and, in training, send it to log.jsonl and wandb. A full disk only warns."""
    shown = [form.format(row[key]) for key, form in SHOWN.items() if row.get(key) is not None]
    if row.get("step_ms"):
        left = (cfg.max_iters - row["step"]) * row["step_ms"] / 1000
        shown.append(f"eta {timedelta(seconds=min(round(left), 10**10))}")
    print0(" | ".join([f"step {row['step']:>6}/{cfg.max_iters}", *shown]))
    if read_launcher()[0] != 0 or cfg.eval_only:
        return
    path = os.path.join(cfg.out_dir, "log.jsonl")
    try:
        with open(path, "a", encoding="utf-8") as f:
            f.write(json.dumps(row) + "\n")
    except OSError as e:
        print0(f"warning: cannot write {path} ({e.strerror}): going on without this row")
    if wandb:
        wandb.log({k: v for k, v in row.items() if k != "step"}, step=row["step"])


def read_log(path: str) -> list[dict]:
    """The rows of log.jsonl, without what a killed run left half written; none if there is no log."""
    rows = []
    with suppress(FileNotFoundError), open(path, encoding="utf-8", errors="replace") as f:
        for line in f:
            with suppress(ValueError, KeyError, TypeError, RecursionError):
                row = json.loads(line[max(0, line.rfind('{"step": ')) :])  # a cut one may be before it
                rows += [row] if type(row["step"]) is int else []
    return rows


def about(cfg: Config, data: Data, model: GPT, device: torch.device, world: int) -> dict:
    """What config.json says besides flags and hashes of code: versions, the FFN's cost, the data."""
    git = ["git", "-C", os.path.dirname(os.path.abspath(__file__)), "describe", "--always", "--dirty"]
    commit = shutil.which("git") and subprocess.run(git, capture_output=True, text=True).stdout.strip()
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor()
    tokens = {f"{k}_tokens": sum(s.tokens for s in getattr(data, k)) for k in ("train", "val")}
    costs, n = [ffn_cost(layer.mlp) for layer in model.model.layers], model.config.n_layer
    return {
        "run_id": os.urandom(4).hex(), "git_commit": commit or "unknown", "data_digest": data.digest,
        "data": {"dir": cfg.data_dir, "encoding": data.encoding, "source": data.source, **tokens},
        "hidden": model.config.hidden, "ffn_cost": {k: sum(c[k] for c in costs) / n for k in costs[0]},
        "total_params": model.param_counts()["total"], "vocab_size": model.config.vocab_size,
        "world": world, "device": f"{device.type} {name}".strip(), "dtype": cfg.dtype,
        "python": platform.python_version(), "torch": torch.__version__, "numpy": np.__version__,
    }  # fmt: skip


def claim_out_dir(cfg: Config, made_with: dict, resumed_step: int) -> TextIO:
    """Make the run's folder, or fail now. Returns its lock, held while open. From scratch (step -1) an
    earlier run becomes *.prev, unless only the *.prev has a checkpoint. A resumed run cuts the log."""
    path = functools.partial(os.path.join, cfg.out_dir)
    with user_error(f"cannot write to --out_dir={cfg.out_dir}", "name another", OSError):
        there = {*os.listdir(cfg.out_dir)} if os.path.isdir(cfg.out_dir) else set()
        trainer = "train.py" in there and "config.json" not in there
        if trainer or (there & {"model.py", "config.json"} and not there & {".lock", "ckpt.pt"}):
            raise UserError(f"--out_dir={cfg.out_dir} holds a trainer or another model: name another")
        lock = lock_folder(cfg.out_dir)
        log, kept = read_log(path("log.jsonl")), os.path.exists(path("ckpt.pt.prev"))
        if resumed_step >= 0:
            with suppress(OSError, ValueError, KeyError), open(path("config.json")) as f:
                began = json.load(f)
                if began["ffn_code"] != made_with["ffn_code"]:
                    print0(f"warning: the code of {cfg.ffn} is not what it was when this run began")
                # These keep their first values: so compare.py can refuse a run whose code has changed.
                stays = ("run_id", "ffn_code", "hidden", "ffn_cost", "total_params")
                made_with |= {key: began[key] for key in stays if key in began}
                for key in ("trainer_code", "torch", "device", "dtype"):  # both, where they differ
                    both = dict.fromkeys([*(began.get(key) or "").split(", "), made_with[key]])
                    made_with[key] = ", ".join(filter(None, both))
        elif os.path.exists(path("ckpt.pt")) or (any(row["step"] for row in log) and not kept):
            print0(f"note: {cfg.out_dir} keeps its earlier run as *.prev, in place of any older *.prev")
            for name in ("config.json", "model.py", "log.jsonl", "ckpt.pt"):
                with suppress(FileNotFoundError):
                    os.replace(path(name), path(name + ".prev"))
        with whole_file(path("log.jsonl")) as f:
            f.writelines(f"{json.dumps(row)}\n".encode() for row in log if row["step"] <= resumed_step)
        with whole_file(path("config.json")) as f:
            f.write(json.dumps({"flags": asdict(cfg), **made_with}, indent=2).encode())
        if resumed_step < 0:
            shutil.copyfile(model_file.__file__, path("model.py"))  # so that another can repeat the run
        return lock


def init_wandb(cfg: Config, run_id: str):
    """A Weights & Biases run named after out_dir; a resumed run goes on with its own."""
    who = {"name": os.path.basename(os.path.normpath(cfg.out_dir)), "id": run_id, "resume": "allow"}
    with user_error(f"--wandb_project={cfg.wandb_project}", "pip install wandb, then wandb login"):
        import wandb
        return wandb.init(project=cfg.wandb_project, config=asdict(cfg), dir=cfg.out_dir, **who)


# ---- The run ------------------------------------------------------------------------------------


def resolve_flags(argv: list[str], world: int) -> tuple[Config, dict | None]:
    """The run's flags and the checkpoint to go on from, if any. Flags that are not given come from the
    checkpoint; a given one that would make another run is refused."""
    cfg, given = configure(Config, argv, epilog="FFNs: " + ", ".join(FFNS))
    out_dir = cfg.out_dir or f"out/{cfg.ffn}-s{cfg.seed}"
    path, checkpoint = os.path.join(out_dir, "ckpt.pt"), None
    if cfg.init_from == "resume" or (cfg.init_from == "auto" and os.path.exists(path)):
        checkpoint = load_checkpoint(path)
        flags, saved = asdict(cfg), checkpoint["flags"]
        allowed = {f.name for f in fields(Config) if f.metadata or (cfg.eval_only and f.name == "seed")}
        flags["lr_decay_iters"] = cfg.lr_decay_iters or saved["lr_decay_iters"]  # 0: max_iters, as then
        for name in sorted(given - allowed):
            if flags[name] != saved[name] and (not cfg.eval_only or hasattr(GPTConfig, name)):
                cure = "leave it out to go on, or name another --out_dir"
                raise UserError(f"--{name}={flags[name]}, the checkpoint has {saved[name]}: {cure}")
        saved |= {"prepare": ""} if "data_dir" in given else {}  # it was for the saved data_dir
        cfg = Config(**saved | {name: flags[name] for name in given & allowed})
    check_flags(cfg, world)
    cfg.out_dir, cfg.lr_decay_iters = out_dir, cfg.lr_decay_iters or cfg.max_iters
    return cfg, checkpoint


def describe(model: GPT, cfg: Config, data: Data, world: int) -> str:
    """The derived arithmetic of the run, and what a reader should know of its FFN."""
    n, ffn, flops = model.param_counts(), model.model.layers[0].mlp, model.flops_per_token()
    cost, per_step = ffn_cost(ffn), cfg.batch_size * cfg.block_size
    h, share = model.config.hidden, cost["params"] / (3 * cfg.n_embd * cfg.ffn_hidden)
    passes, tokens = cfg.batch_size // (world * cfg.micro_batch_size), cfg.max_iters * per_step
    epochs = cfg.max_iters * cfg.batch_size / window_counts(data.train, cfg.block_size).sum()
    text = f"""\
data    {cfg.data_dir}: {data.source or "source unknown"}, encoding {data.encoding}
data    {sum(s.tokens for s in data.train):,} training tokens, {epochs:.2f} epochs in this run
data    {sum(s.tokens for s in data.val):,} validation tokens
model   {n["layers"]:,} parameters in the layers' matrices, {n["total"]:,} in all
ffn     {cfg.ffn}, hidden {h}: {cost["params"]:,} parameters a layer, {share:.4f} of SwiGLU's
flops   {cost["flops"]:,} a token in an FFN, forward, as executed; {cost["ideal_flops"]:,} ideal
flops   {flops:,} a token to train, {flops * tokens:.3g} in all
run     {cfg.max_iters} steps x {per_step:,} = {tokens:,} tokens, {tokens / n["layers"]:.2f} a parameter
step    {world} ranks x {passes} passes x {cfg.micro_batch_size} sequences x {cfg.block_size} tokens"""
    if frozen := [name for name, p in model.named_parameters() if not p.requires_grad]:
        text += f"\nnote    {len(frozen)} parameters have no gradient by design, e.g. {frozen[0]}"
    if names := model.overwritten:
        text += f"\nnote    {len(names)} start values were redrawn, as {names[0]}: use init_weights"
    if not (has(ffn, "init_weights") or any(is_residual(name) for name, _ in ffn.named_parameters())):
        text += "\nnote    no matrix of the FFN is named down_proj: none is scaled for the depth"
    if not cfg.warmup_iters < cfg.lr_decay_iters >= cfg.max_iters:
        text += f"\nwarning: the schedule warms up to step {cfg.warmup_iters} and ends at step "
        text += f"{cfg.lr_decay_iters} of {cfg.max_iters}: another schedule needs a new run"
    return text


def connect(device: torch.device, step: int, shards: dict) -> None:
    """Join the other ranks. Raises UserError if they start from different steps or shards."""
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    wait = timedelta(minutes=10)
    # torchrun's store outlives restarted ranks, and the prefix keeps them from reading the dead ones'
    # addresses (pytorch issue 135712). Several nodes may count restarts differently: no prefix there.
    store, rank, world = next(dist.rendezvous("env://", timeout=wait))
    if os.environ.get("GROUP_WORLD_SIZE", "1") == "1":
        store = dist.PrefixStore(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"), store)
    cure = "between machines set GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME to their network, e.g. eth0"
    with user_error("the ranks cannot reach each other", cure, RuntimeError):
        dist.init_process_group(backend, store=store, rank=rank, world_size=world, timeout=wait)
    found: list = [None] * world
    dist.all_gather_object(found, (step, shards))
    if any(other != found[0] for other in found):
        wrong = f"the ranks have different shards or checkpoints (of steps {[f[0] for f in found]})"
        raise UserError(f"{wrong}: all machines need one --out_dir and the same shards in --data_dir")


def catch_signals() -> list[tuple[int, float]]:
    """Return a list that gets the number and time of each signal to stop. A second one ends the process;
    under a launcher only after 5 seconds, because there one Ctrl-C arrives twice."""
    came: list[tuple[int, float]] = []

    def on_signal(number: int, frame: object) -> None:
        times = [t for n, t in came if signal.SIGHUP not in (n, number)]  # it comes several times
        if times and ("RANK" not in os.environ or time.monotonic() - times[0] > 5):
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        came.append((number, time.monotonic()))

    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP):
        if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:  # nohup ignores it
            signal.signal(number, on_signal)
    return came


def find_data(cfg: Config, local_rank: int, checkpoint: dict | None) -> tuple[Data, dict]:
    """The checked shards, and their names, sizes, encoding and digest. Where there are none, local
    rank 0 runs prepare_fineweb.py with the arguments of --prepare, and the others wait."""
    while local_rank and cfg.prepare and not has_shards(cfg.data_dir):
        time.sleep(0.5)  # the launcher ends this rank if rank 0 fails
    if cfg.prepare and not has_shards(cfg.data_dir):
        with user_error(f"--prepare={cfg.prepare}", "change it", (OSError, ValueError)):  # an open quote
            command = [sys.executable, prepare_fineweb.__file__, *shlex.split(cfg.prepare)]
            failed = subprocess.run([*command, f"--out_dir={cfg.data_dir}"]).returncode
        if failed or not has_shards(cfg.data_dir):
            raise UserError(f"--prepare={cfg.prepare} made no shards in {cfg.data_dir}, see above")
    data = open_data(cfg.data_dir, cfg.block_size)
    shards = {k: [[os.path.basename(p), n] for p, n in getattr(data, k)] for k in ("train", "val")}
    shards |= {"encoding": data.encoding, "digest": data.digest}
    saved = shards | checkpoint["shards"] if checkpoint else shards
    if saved["encoding"] != data.encoding or (saved != shards and not cfg.eval_only):
        raise UserError(f"{cfg.data_dir} has other shards than the checkpoint's run: restore them")
    if (n := window_counts(data.train, cfg.block_size).sum()) < cfg.batch_size and not cfg.eval_only:
        few = f"{n:,} windows of {cfg.block_size} tokens, fewer than one batch of {cfg.batch_size}"
        raise UserError(f"{cfg.data_dir} has {few}: lower --batch_size or prepare more data")
    return data, shards


def main() -> None:
    rank, world, local_rank = read_launcher()
    ddp = "RANK" in os.environ
    cfg, checkpoint = resolve_flags(sys.argv[1:], world)
    # Hashed now, because model.py may be edited while data are prepared.
    code = {"ffn_code": ffn_code(cfg.ffn), "trainer_code": code_hash([GPT, main, locate, read_windows])}
    ckpt_path, log_path = (os.path.join(cfg.out_dir, name) for name in ("ckpt.pt", "log.jsonl"))
    training, step = not cfg.eval_only, checkpoint["step"] if checkpoint else 0
    resumed = training and checkpoint is not None
    saved_step = step if resumed else -1
    # A run that was stopped while it evaluated has already saved. It evaluates when it is resumed.
    evaluated = resumed and any("val_loss" in row for row in read_log(log_path) if row["step"] == step)
    if evaluated and step >= cfg.max_iters:
        return print0(f"finished: {ckpt_path} is at step {step} of {cfg.max_iters}; see --eval_only")

    # -- device, data, model, optimizer
    device = pick_device(cfg.device, local_rank)
    set_up(device)
    bf16 = use_bfloat16(cfg.dtype, device)
    autocast = functools.partial(torch.autocast, device.type, dtype=torch.bfloat16, enabled=bf16)
    data, shards = find_data(cfg, local_rank, checkpoint)
    counts = window_counts(data.train, cfg.block_size)
    raw_model = GPT(model_config(vars(cfg), vocab_size=math.ceil(data.n_vocab / 128) * 128)).to(device)
    compile = cfg.compile and training and device.type != "mps"  # compiling is a prototype there
    if rank == 0 and training:
        made_with = about(cfg, data, raw_model, device, world) | code
        lock = claim_out_dir(cfg, made_with, saved_step)  # noqa: F841  held until the process ends
    wandb = init_wandb(cfg, made_with["run_id"]) if training and cfg.wandb_project and not rank else None
    if ddp:
        connect(device, step, shards)
    optimizers = make_optimizers(raw_model, cfg)
    if checkpoint:
        restore(raw_model, optimizers, checkpoint, ckpt_path, code)
    checkpoint = None  # its memory is free again
    length = max(1, cfg.max_iters, cfg.lr_decay_iters)  # of the run or its schedule, which may end later
    check_model(raw_model, optimizers, autocast, length, training)
    peak = peak_flops(device) if bf16 else None
    flops, per_step = raw_model.flops_per_token(), cfg.batch_size * cfg.block_size
    known = f"{peak / 1e12:.0f} TFLOP/s each" if peak else "n/a"
    signals = catch_signals()  # from the run's description on, Ctrl-C ends it cleanly
    print0(f"device  {device} x {world}, {'bfloat16' if bf16 else 'float32'}, peak {known}")
    print0(describe(raw_model, cfg, data, world) + (f"\nresumed at step {step}" if resumed else ""))
    fast_model = compiled(raw_model, device, recompute=cfg.recompute) if compile else raw_model
    model = fast_model  # evaluation uses fast_model: inside DDP its graph would be cut into pieces
    if ddp and training:
        warnings.filterwarnings("ignore", ".*broadcast_buffers")  # torch 2.11 lacks what replaces it
        model = DDP(fast_model, broadcast_buffers=False, gradient_as_bucket_view=True)
    failed = torch.zeros((), device=device)  # the first step whose loss or gradient was not finite

    def check_finite(weights: bool = False) -> None:
        """Raise UserError if a number went bad. This waits for the device."""
        bad = f"step {int(failed)}: loss or gradient" if failed else ""
        if weights and not torch.stack([p.isfinite().all() for p in raw_model.parameters()]).all():
            bad = bad or f"step {step}: a weight"
        if bad:
            kept = f"the last good checkpoint is {ckpt_path} at step {saved_step}"
            kept = "no checkpoint was saved yet" if saved_step < 0 else kept
            raise UserError(f"{bad} is not finite; {kept}: lower --learning_rate or look at the FFN")

    def save() -> None:
        """Replace the checkpoint. There is a whole one at every moment."""
        nonlocal saved_step
        check_finite(weights=True)
        if rank == 0:
            state = {"model": raw_model.state_dict(), "optimizers": [o.state_dict() for o in optimizers]}
            state |= {"step": step, "flags": asdict(cfg), "shards": shards, "code": code}
            kept = "there is none yet" if saved_step < 0 else "the last one is intact"
            what = f"cannot save {ckpt_path} at step {step}"
            cure = f"{kept}: make room, then go on with --init_from=auto"
            with user_error(what, cure, (OSError, RuntimeError)), whole_file(ckpt_path) as f:
                torch.save(state, f)  # which turns a full disk into a RuntimeError
        saved_step = step

    # -- the loop. Its clock leaves out the first step (it compiles), evaluation and saving
    first, mark, window_steps = True, time.perf_counter(), 0
    with compile_errors(signals):
        while True:
            stopped = any_rank(bool(signals))
            last = stopped or step >= cfg.max_iters or not training
            save_now = training and step != saved_step and (last or step % cfg.save_interval == 0 < step)
            evaluate_now = not (evaluated or stopped) and (last or step % cfg.eval_interval == 0)
            if save_now or evaluate_now:
                check_finite()  # waits for the device, which belongs to the steps' time
                paused = time.perf_counter()
                if save_now:  # first, as a signal may not leave the time for both
                    save()
                if evaluate_now:
                    with evaluating(raw_model):
                        raw_model.set_progress(min(step, length - 1), length)
                        torch.manual_seed(cfg.seed)  # for an FFN that draws noise in evaluation too
                        val_loss = evaluate(fast_model, data, cfg, device, autocast, signals)
                        active = active_fraction(raw_model, data, device, autocast)
                    if val_loss is None:  # a signal came: save and stop
                        continue
                    row = {"step": step, "tokens": step * per_step, "val_loss": val_loss}
                    row |= {} if active is None else {"active": active}
                    report(row, cfg, wandb)
                mark += time.perf_counter() - paused
            if last:
                break

            samples = np.arange(step * cfg.batch_size, (step + 1) * cfg.batch_size)
            places = locate(counts, samples.reshape(world, -1)[rank], cfg.data_seed)
            batch = torch.from_numpy(read_windows(data.train, places, cfg.block_size, data.n_vocab))
            batches = to_device(batch, device).split(cfg.micro_batch_size)
            raw_model.set_progress(min(step, length - 1), length)
            # For an FFN that draws noise: other noise each step and rank, the same when resumed.
            torch.manual_seed((cfg.seed * 2**20 + step) * 2**10 + rank)
            loss, aux, norm = train_step(model, optimizers, batches, cfg, step, failed, autocast)
            # A running threshold or an expert's bias follows this rank's tokens: take the ranks' mean.
            if ddp:
                for b in raw_model.model.layers.buffers():
                    if b.is_floating_point() and not is_expanded(b):
                        total = b.contiguous()  # NCCL takes no other
                        dist.all_reduce(total)
                        b.copy_(total / world)
            step, window_steps, evaluated = step + 1, window_steps + 1, False
            if first or step % cfg.log_interval == 0:
                check_finite()
                seconds = time.perf_counter() - mark
                row = {"step": step, "tokens": step * per_step, "train_loss": float(loss)}
                row |= {} if aux is None else {"aux_loss": float(aux)}
                row |= {"lr": cfg.learning_rate * schedule(step - 1, cfg), "grad_norm": float(norm)}
                speed = per_step * window_steps / seconds
                mfu = flops * speed / (peak * world) if peak else None
                clock = {"step_ms": 1000 * seconds / window_steps, "tok_per_s": speed, "mfu": mfu}
                row |= dict.fromkeys(clock) if first else clock
                report(row, cfg, wandb)
                if first:
                    print0(f"first   {seconds:.1f} s{' with compiling' if compile else ''}, not counted")
                # Python's garbage collector can take half a second: from now on it runs here alone.
                gc.disable()
                gc.collect()
                gc.freeze()
                first, window_steps, mark = False, 0, time.perf_counter()

    # -- the end
    out = shlex.quote(cfg.out_dir)
    if stopped:
        how = f", saved {ckpt_path}\ngo on with: the same command and --init_from=resume --out_dir={out}"
        print0(f"stopped at step {step} of {cfg.max_iters}{how if training else ''}")
    else:
        print0(f"\nvalidation loss  {val_loss:.4f} nats per token at step {step or '0 (untrained)'}")
        if training:
            print0(f"checkpoint       {ckpt_path}")
            print0(f"plot             python experiments/compare.py --report {out}")
        if cfg.sample_tokens and rank == 0:
            raw_model.set_progress(min(step, length - 1), length)  # again, as the evaluation undid it
            print0("\n" + sample(raw_model.eval(), cfg, data, device, autocast))
    if wandb:
        wandb.finish()
    if ddp:
        # The models hold the process group. If they are the last to free it, it can deadlock.
        del model, fast_model
        dist.destroy_process_group()


if __name__ == "__main__":
    run(record(main))
