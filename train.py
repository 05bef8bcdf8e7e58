"""
Train a Qwen3-style language model whose FFN is picked by a flag, on shards of tokens.

    python train.py config/smoke.py                                  # any machine, two minutes
    torchrun --nproc_per_node=8 train.py --ffn=sparseglu             # the full run

The file is one story from top to bottom: flags, data, schedule, optimizer, evaluation, checkpoint,
compiling, and main() with the loop. Step n is the state after n updates. Batches are a pure function
of (data_seed, step) and weights of (seed, name), so two runs that differ in --ffn see the same tokens
from the same start, on any number of GPUs, resumed or not.
"""

from __future__ import annotations

import ast
import ctypes
import functools
import glob
import hashlib
import inspect
import json
import math
import os
import platform
import re
import shlex
import signal
import subprocess
import sys
import textwrap
import time
import warnings
from collections.abc import Callable
from contextlib import nullcontext, suppress
from dataclasses import asdict, dataclass
from datetime import timedelta
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel as DDP

from configurator import UserError, configure, reason, run, suggest
from model import GPT, GPTConfig, ffn_cost, has, is_residual, parse_spec
from prepare_fineweb import HEADER_INTS, MAGIC, VERSION, load_encoding, whole_file

# ------------------------------------------------------------------------------------------------
# Flags


@dataclass
class Config:
    # where things are
    out_dir: str = ""  # folder of the run; empty: out/{ffn}-s{seed}
    data_dir: str = "data/fineweb"  # folder of token shards
    prepare: str = ""  # arguments for prepare_fineweb.py, run when data_dir has no shards
    init_from: str = "scratch"  # scratch, resume, or auto: resume if there is a checkpoint
    eval_only: bool = False  # evaluate (and sample) once, then stop
    # how often, in steps
    eval_interval: int = 50  # validation, besides step 0 and the end
    val_tokens: int = 10_485_760  # tokens of validation, or all that fit
    log_interval: int = 10  # a line of progress and a row in log.jsonl
    save_interval: int = 100  # a checkpoint, besides the end
    # model: the papers' "134M"
    n_layer: int = 32  # layers
    n_head: int = 8  # attention heads
    n_kv_head: int = 8  # key-value heads; fewer than n_head: grouped-query attention
    n_embd: int = 512  # width
    block_size: int = 2048  # tokens per sequence
    ffn: str = "swiglu"  # spec of the FFN, e.g. sparseglu or asg:threshold=neuron; see model.py
    ffn_hidden: int = 2048  # hidden width of the FFN
    ffn_match: str = "hidden"  # hidden: keep that width; params or flops: as much as SwiGLU there
    tie_embeddings: bool = True  # lm_head shares the embedding's weight
    # training: the Dynamic Sparse Gating paper's run
    max_iters: int = 400  # steps
    batch_size: int = 512  # sequences per step over all ranks
    micro_batch_size: int = 16  # sequences per device pass
    learning_rate: float = 6e-4  # at its highest
    min_lr: float = 6e-5  # at the end of the schedule
    warmup_iters: int = 40  # steps of linear warm-up
    lr_decay_iters: int = 0  # step at which the schedule ends; 0: max_iters
    schedule: str = "cosine"  # cosine, or wsd: constant, then linear over the last 20%
    weight_decay: float = 0.1  # matrices only
    beta1: float = 0.9  # AdamW
    beta2: float = 0.95  # AdamW
    grad_clip: float = 1.0  # largest norm of the gradient; 0: no clipping
    optimizer: str = "adamw"  # adamw, or muon for the matrices inside layers
    seed: int = 0  # of the initial weights
    data_seed: int = 0  # of the order of the data
    # machine
    device: str = "auto"  # auto, cpu, cuda, cuda:1, mps
    dtype: str = "auto"  # autocast type: auto, float32, bfloat16
    compile: bool = True  # torch.compile; never on mps
    # to watch it, and a sample at the end
    wandb_project: str = ""  # also log to this Weights & Biases project
    sample_tokens: int = 0  # tokens of text to sample at the end
    prompt: str = ""  # what the sample goes on from; empty: the start of a document
    temperature: float = 0.8  # of sampling; 0: always the likeliest token
    top_k: int = 0  # sample among the k likeliest tokens; 0: all


# What a resumed run may change; everything else makes it another run.
CHANGEABLE = set(
    "out_dir data_dir prepare init_from eval_only eval_interval val_tokens log_interval "
    "save_interval max_iters micro_batch_size device dtype compile wandb_project sample_tokens "
    "prompt temperature top_k".split()
)


def check_flags(cfg: Config, world: int) -> None:
    """Refuse what cannot work before anything is read or allocated."""
    choices = {
        "init_from": ["scratch", "resume", "auto"],
        "schedule": ["cosine", "wsd"],
        "optimizer": ["adamw", "muon"],
        "dtype": ["auto", "float32", "bfloat16"],
    }
    for name, valid in choices.items():
        if getattr(cfg, name) not in valid:
            raise UserError(f"--{name}={getattr(cfg, name)}: {suggest(getattr(cfg, name), valid)}")
    least = {"eval_interval": 1, "log_interval": 1, "save_interval": 1, "batch_size": 1}
    least |= {"micro_batch_size": 1, "block_size": 1, "val_tokens": cfg.block_size}
    for name, value in vars(cfg).items():
        if isinstance(value, (int, float)) and value < least.get(name, 0):
            raise UserError(f"--{name}={value} must be at least {least.get(name, 0)}")
    for name in ("beta1", "beta2"):
        if getattr(cfg, name) >= 1:
            raise UserError(f"--{name}={getattr(cfg, name)} must be below 1")
    if max(cfg.seed, cfg.data_seed) >= 2**32:
        raise UserError("--seed and --data_seed must be below 2**32")
    parse_spec(cfg.ffn)
    per_pass = world * cfg.micro_batch_size
    if cfg.batch_size % per_pass and not cfg.eval_only:
        near = max(1, cfg.batch_size // per_pass) * per_pass
        raise UserError(
            f"--batch_size={cfg.batch_size} is not a multiple of ranks x micro_batch_size = {world} x "
            f"{cfg.micro_batch_size}: try --batch_size={near} or another --micro_batch_size"
        )


def saved_flags(saved: dict) -> dict:
    """Checked flags of a checkpoint or config.json; the default where it is older than a flag."""
    flags = asdict(Config(**saved))
    for name, value in flags.items():
        if type(value) is not type(getattr(Config, name)):
            raise ValueError(f"its flag {name} is {value!r}")
    return flags


def model_config(flags: dict, **more: int) -> GPTConfig:
    """The model's part of the flags."""
    return GPTConfig(**{k: v for k, v in flags.items() if hasattr(GPTConfig, k)}, **more)


def pick_device(cfg: Config, local_rank: int, local_world: int) -> torch.device:
    """The device of this rank. Raises UserError if there is no such device."""
    n_cuda, mps = torch.cuda.device_count(), torch.backends.mps.is_available()
    # Before 2.13 MPS is wrong and does not say so: attention in bfloat16 sees the future, without a
    # gradient it mixes the batch's rows, a norm's backward pass is off (pytorch 195910, 181133, 183825).
    old = tuple(map(int, torch.__version__.split(".")[:2])) < (2, 13)
    name = cfg.device
    if name == "auto":
        name = "cuda" if n_cuda else "mps" if mps and not old else "cpu"
        if name == "cpu" and mps:
            say(f"device  not mps, which torch {torch.__version__} computes wrong numbers on")
    if not re.fullmatch(r"cpu|mps|cuda(:\d+)?", name):
        raise UserError(f"--device={name} is unknown: auto, cpu, cuda, cuda:N or mps")
    if name == "mps" and not mps:
        raise UserError("--device=mps needs macOS on Apple silicon: try --device=auto")
    if name == "mps" and old:
        raise UserError(
            f"--device=mps computes wrong numbers with torch {torch.__version__}: pip install "
            "'torch>=2.13,<2.14', or --device=cpu"
        )
    if name.startswith("cuda"):
        index = int(name[5:] or 0) if local_world == 1 else local_rank
        if index >= n_cuda:
            raise UserError(
                f"--device={cfg.device} with {local_world} ranks here, and {n_cuda} CUDA GPUs: "
                "lower --nproc_per_node or use --device=cpu"
            )
        torch.cuda.set_device(index)
        return torch.device("cuda", index)
    return torch.device(name)


def use_bfloat16(cfg: Config, device: torch.device) -> bool:
    """Whether to autocast to bfloat16; a GPU that has none uses float32, and the run says so."""
    if device.type != "cuda" or cfg.dtype == "float32":
        return cfg.dtype == "bfloat16"
    if torch.cuda.get_device_capability(device)[0] >= 8:
        return True
    say(f"{torch.cuda.get_device_name(device)} has no bfloat16: float32 instead")
    return False


# ------------------------------------------------------------------------------------------------
# Data: shards -> windows -> batches

HEADER_BYTES = 4 * HEADER_INTS


class Shard(NamedTuple):
    path: str
    tokens: int


class Data(NamedTuple):
    train: list[Shard]
    val: list[Shard]
    encoding: str
    n_vocab: int  # of the encoding: ids are below it


def open_data(data_dir: str, block_size: int) -> Data:
    """Find and check every shard of a folder: name, header, size, numbering, meta.json."""
    make = f"make it with: python prepare_fineweb.py --out_dir={data_dir}"
    meta_path = os.path.join(data_dir, "meta.json")
    meta = {"encoding": "gpt2", "vocab_size": 50257, "complete": True}  # of public shards
    listed = None
    try:
        if os.path.exists(meta_path):
            with open(meta_path, encoding="utf-8") as f:
                meta = json.load(f)
            listed = {shard["name"]: shard["tokens"] for shard in meta["shards"]}
        encoding, n_vocab, complete = str(meta["encoding"]), int(meta["vocab_size"]), meta["complete"]
        if not 1 <= n_vocab <= 2**16:
            raise ValueError(f"vocab_size {n_vocab}")
    except (OSError, ValueError, KeyError, TypeError) as e:
        raise UserError(f"{meta_path} cannot be read ({e!r}): {make}") from None
    if not complete:
        raise UserError(f"{data_dir} is not finished: run its prepare_fineweb.py line again")
    splits = {}
    for split in ("train", "val"):
        paths = sorted(glob.glob(os.path.join(glob.escape(data_dir), f"*_{split}_*.bin")))
        if not paths:
            raise UserError(f"no {split} shards in {data_dir}: {make}")
        shards = [check_shard(path, listed) for path in paths]
        sets = sorted({re.sub(r"\d+\.bin$", "", os.path.basename(path)) for path in paths})
        if len(sets) > 1:
            raise UserError(f"{data_dir} has shards of two sets, {sets[0]} and {sets[1]}: move one away")
        numbers = [int(re.findall(r"\d+", path)[-1]) for path in paths]
        for before, after in zip(numbers, numbers[1:]):
            if after != before + 1:
                raise UserError(f"{data_dir} lacks {split} shard {before + 1}: {make}")
        for name in sorted(set(listed or ()) - {os.path.basename(path) for path in paths}):
            if f"_{split}_" in name:
                raise UserError(f"{data_dir} lacks {name}, which meta.json lists: {make}")
        if sum((shard.tokens - 1) // block_size for shard in shards) < 1:
            raise UserError(
                f"the {split} shards of {data_dir} have no window of block_size + 1 = "
                f"{block_size + 1} tokens: lower --block_size or prepare more data"
            )
        splits[split] = shards
    return Data(splits["train"], splits["val"], encoding, n_vocab)


def check_shard(path: str, listed: dict[str, int] | None) -> Shard:
    """Read a shard's header and hold it against its size on disk and meta.json."""
    again = "delete it and run prepare_fineweb.py again"
    try:
        size, header = os.path.getsize(path), np.fromfile(path, "<i4", HEADER_BYTES // 4)
    except OSError as e:
        raise UserError(f"{path}: cannot be read ({e.strerror}): {again}") from None
    if header.size < 256 or header[0] != MAGIC:
        raise UserError(f"{path}: not a token shard (magic number {MAGIC} missing): {again}")
    if header[1] != VERSION:
        raise UserError(
            f"{path}: shard version {header[1]}, not {VERSION} (7 is Llama 3's 32-bit tokens): {again}"
        )
    tokens = int(header[2])
    if tokens < 1 or size != HEADER_BYTES + 2 * tokens:
        raise UserError(
            f"{path}: header says {tokens:,} tokens, the file holds "
            f"{(size - HEADER_BYTES) / 2:,.1f}: {again}"
        )
    name = os.path.basename(path)
    if not re.search(r"_\d+\.bin$", name):
        raise UserError(f"{path}: a shard's name ends in its number, e.g. _000001.bin: rename it")
    if listed is not None and listed.get(name) != tokens:
        raise UserError(f"{path}: not the shard that meta.json lists (another encoding?): {again}")
    return Shard(path, tokens)


@functools.lru_cache(maxsize=32)
def permutation(n: int, *seed: int) -> np.ndarray:
    """Of range(n). RandomState: its stream is frozen, the newer Generator's is not."""
    return np.random.RandomState(seed).permutation(n)


def window_counts(shards: list[Shard], block_size: int) -> np.ndarray:
    """Windows of each shard: window i is tokens [i * block_size, (i + 1) * block_size]."""
    return np.array([(shard.tokens - 1) // block_size for shard in shards])


def locate(counts: np.ndarray, samples: np.ndarray, data_seed: int) -> list[tuple[int, int]]:
    """The (shard, window) of each training sample: sample g is window g mod W of epoch g // W, an
    epoch being a permutation of the shards, then of the windows within each."""
    found = []
    for g in samples.tolist():
        epoch, w = divmod(g, int(counts.sum()))
        order = permutation(len(counts), data_seed, epoch)
        ends = counts[order].cumsum()
        place = int(ends.searchsorted(w, side="right"))
        shard = int(order[place])
        windows = permutation(int(counts[shard]), data_seed, epoch, shard)
        found.append((shard, int(windows[w - (ends[place] - counts[shard])])))
    return found


def read_windows(
    shards: list[Shard], places: list[tuple[int, int]], block_size: int, n_vocab: int
) -> Tensor:
    """(n, block_size + 1) int64 tokens, checked. pread, as a shard that shrinks under a memory map
    kills the process. Raises UserError naming the shard."""
    batch = np.empty((len(places), block_size + 1), np.int64)
    files: dict[int, int] = {}
    try:
        for row, (s, window) in enumerate(places):
            if s not in files:
                files[s] = os.open(shards[s].path, os.O_RDONLY)
            size = 2 * (block_size + 1)
            raw = os.pread(files[s], size, HEADER_BYTES + 2 * block_size * window)
            if len(raw) < size:
                raise UserError(f"{shards[s].path} shrank during the run: restore it, then resume")
            batch[row] = np.frombuffer(raw, "<u2")
            if batch[row].max() >= n_vocab:
                raise UserError(
                    f"{shards[s].path}: token id {batch[row].max()} in window {window}, but the "
                    f"encoding has ids below {n_vocab}: prepare this shard again"
                )
    except OSError as e:
        raise UserError(
            f"{shards[s].path}: cannot be read ({e.strerror}): restore it, then resume"
        ) from None
    finally:
        for fd in files.values():
            os.close(fd)
    return torch.from_numpy(batch)


def prepare_data(cfg: Config, local_rank: int) -> None:
    """Run prepare_fineweb.py if data_dir has no finished shards; the other local ranks wait for it."""
    from filelock import FileLock  # torch depends on it

    def ready() -> bool:
        try:
            with open(os.path.join(cfg.data_dir, "meta.json"), encoding="utf-8") as f:
                return bool(json.load(f)["complete"])
        except (OSError, ValueError, KeyError, TypeError):
            return bool(glob.glob(os.path.join(glob.escape(cfg.data_dir), "*_train_*.bin")))

    while local_rank and not ready():
        time.sleep(0.5)  # ends at the latest when rank 0 does: torchrun ends all with one
    if ready():
        return
    script = os.path.join(os.path.dirname(os.path.abspath(__file__)), "prepare_fineweb.py")
    try:
        command = [sys.executable, script, *shlex.split(cfg.prepare), f"--out_dir={cfg.data_dir}"]
        os.makedirs(os.path.dirname(os.path.abspath(cfg.data_dir)), exist_ok=True)
        with FileLock(os.path.abspath(cfg.data_dir) + ".lock"):
            failed = not ready() and subprocess.run(command).returncode
    except (OSError, ValueError) as e:
        raise UserError(f"--prepare={cfg.prepare} for {cfg.data_dir}: {reason(e)}") from None
    if failed:
        raise UserError("preparing the data failed, see above")
    if not ready():
        raise UserError(f"--prepare={cfg.prepare} made no shards in {cfg.data_dir}: see its --help")


# ------------------------------------------------------------------------------------------------
# Schedule, optimizer, one step


def learning_rate(step: int, cfg: Config) -> float:
    """Of the update that leads from step to step + 1."""
    if step < cfg.warmup_iters:
        return cfg.learning_rate * (step + 1) / (cfg.warmup_iters + 1)
    if step >= cfg.lr_decay_iters:
        return cfg.min_lr
    if cfg.schedule == "wsd":
        left = min(1.0, (cfg.lr_decay_iters - step) / (0.2 * cfg.lr_decay_iters))
    else:
        done = (step - cfg.warmup_iters) / (cfg.lr_decay_iters - cfg.warmup_iters)
        left = 0.5 * (1 + math.cos(math.pi * done))
    return cfg.min_lr + left * (cfg.learning_rate - cfg.min_lr)


def make_optimizers(model: GPT, cfg: Config) -> list[torch.optim.Optimizer]:
    """Fused AdamW; with --optimizer=muon the matrices inside layers go to Muon. Weight decay is for
    matrices only."""
    params = {name: p for name, p in model.named_parameters() if p.requires_grad}
    muon = [
        name
        for name, p in params.items()
        if cfg.optimizer == "muon" and name.startswith("model.layers.") and p.ndim == 2
    ]
    rest = [p for name, p in params.items() if name not in muon]
    groups = [
        {"params": [p for p in rest if p.ndim >= 2], "weight_decay": cfg.weight_decay},
        {"params": [p for p in rest if p.ndim < 2], "weight_decay": 0.0},
    ]
    betas = (cfg.beta1, cfg.beta2)
    optimizers = [torch.optim.AdamW(groups, lr=cfg.learning_rate, betas=betas, fused=True)]
    if muon:
        optimizers.append(
            torch.optim.Muon(
                [params[name] for name in muon],
                lr=cfg.learning_rate,
                weight_decay=cfg.weight_decay,
                adjust_lr_fn="match_rms_adamw",
            )
        )
    return optimizers


def check_gradients(model: GPT, optimizers: list[torch.optim.Optimizer]) -> list[str]:
    """After a backward pass: every trainable parameter has a gradient and is in an optimizer, else
    UserError by name. Returns the names of the frozen ones."""
    optimized = {id(p) for o in optimizers for group in o.param_groups for p in group["params"]}
    for name, p in model.named_parameters():
        if p.requires_grad and (p.grad is None or id(p) not in optimized):
            why = "receives no gradient" if p.grad is None else "is in no optimizer"
            raise UserError(f"{name} {why}: use it in forward, or freeze it with requires_grad_(False)")
    return [name for name, p in model.named_parameters() if not p.requires_grad]


def set_up_cpu() -> None:
    """The same bits in every run, and no time lost in page faults. Without the first, compiled code adds
    up the gradient of an embedding in the order in which its threads come by. And glibc maps each tensor
    over 32 MB anew, and the kernel pages it in 4 KB at a time: a tenth or more of a step with a large
    vocabulary (experiments/LOG.md)."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # with NaN, which takes time
    if sys.platform == "linux":
        mallopt = getattr(ctypes.CDLL(None), "mallopt", lambda *_: 0)  # musl has none
        mallopt(-4, 0)  # M_MMAP_MAX: map nothing
        mallopt(-1, -1)  # M_TRIM_THRESHOLD: give nothing back


# Where fused AdamW heeds grad_scale and found_inf; on MPS it ignored both (pytorch pull request 186360).
CLIPS_AND_SKIPS = ("cpu", "cuda")


def inputs_and_targets(batch: Tensor) -> tuple[Tensor, Tensor]:
    """(B, T + 1) -> (B, T) twice. Copies: torch.compile would compile anew for other strides, and for
    contiguous() a slice of one row is contiguous already."""
    x, y = batch[:, :-1], batch[:, 1:]
    return tuple(t.clone(memory_format=torch.contiguous_format) for t in (x, y))


def train_step(
    model: nn.Module,
    optimizers: list[torch.optim.Optimizer],
    batches: list[Tensor],
    cfg: Config,
    step: int,
    failed: Tensor,
    autocast=nullcontext,
) -> tuple[Tensor, Tensor]:
    """
    One update of model (DDP, compiled or plain) on this rank's batches, (micro, T + 1) each.

    Returns loss (mean over all ranks) and gradient norm before clipping, scalars on the device.
    `failed` holds the first step whose loss or gradient was not finite (0: none), is updated in
    place, and from then on no weight moves. Nothing here waits for the device, but for Muon and MPS.
    """
    total = torch.zeros((), device=failed.device)
    for i, batch in enumerate(batches):
        if isinstance(model, DDP):
            model.require_backward_grad_sync = i == len(batches) - 1
        with autocast():
            _, loss = model(*inputs_and_targets(batch))
        loss = loss / len(batches)
        loss.backward()
        total += loss.detach()
    params = [p for o in optimizers for group in o.param_groups for p in group["params"]]
    if any(p.grad is None for p in params):
        name = next(n for n, p in model.named_parameters() if p.requires_grad and p.grad is None)
        name = re.sub(r"^module\.|_orig_mod\.", "", name)
        raise UserError(
            f"step {step + 1}: {name} received no gradient: keep it in the graph in every pass"
        )
    if isinstance(model, DDP):
        dist.all_reduce(total)
        total /= dist.get_world_size()

    lr = learning_rate(step, cfg)
    norm = nn.utils.get_total_norm([p.grad for p in params])
    finite = torch.isfinite(total) & torch.isfinite(norm)
    failed.copy_(torch.where((failed == 0) & ~finite, step + 1, failed))
    divisor = (norm / cfg.grad_clip).clamp(min=1) if cfg.grad_clip else torch.ones_like(norm)
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = lr
        if optimizer.defaults.get("fused") and failed.device.type in CLIPS_AND_SKIPS:
            optimizer.grad_scale, optimizer.found_inf = divisor, (failed > 0).float()
            optimizer.step()
        elif not failed:  # waits for the device
            grads = [p.grad for group in optimizer.param_groups for p in group["params"]]
            torch._foreach_div_(grads, divisor)
            optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return total, norm


# Dense bfloat16 FLOP/s by the vendors' data sheets. What is not here prints n/a, not an A100's.
PEAK_FLOPS = {
    "B200": 2250e12,
    "H200 NVL": 835e12,
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
    "L4": 121e12,
    "RTX 4090$": 165e12,  # not the laptop's
    "RTX 3090$": 71e12,
}


def peak_flops(device: torch.device) -> float | None:
    """Peak bfloat16 FLOP/s of a device, for MFU; None if unknown."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    known = (f for key, f in PEAK_FLOPS.items() if re.search(rf"\b{key}(?!\w)", name))
    return next(known, None) if "MIG" not in name else None  # a part of a GPU


# ------------------------------------------------------------------------------------------------
# Evaluation


@torch.no_grad()
def evaluate(model: nn.Module, data: Data, cfg: Config, device: torch.device, autocast) -> float:
    """Mean loss in nats per token over the first val_tokens // block_size windows, in order, split
    over all ranks: the same number whatever the layout."""
    T, micro = cfg.block_size, cfg.micro_batch_size
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    counts = window_counts(data.val, T)
    places = [(s, i) for s, count in enumerate(counts) for i in range(count)]
    places = places[: cfg.val_tokens // T]
    losses, weights = [torch.zeros((), device=device)], [0]  # a rank may get no batch at all
    error = ""
    for first in range(rank * micro, len(places), world * micro):
        try:
            tokens = read_windows(data.val, places[first : first + micro], T, data.n_vocab)
        except UserError as e:
            error = str(e)
            break
        # One shape for all batches, so that torch.compile sees one: rows of padding, not counted.
        batch = torch.full((micro, T + 1), -100)
        batch[: len(tokens)] = tokens
        x, y = inputs_and_targets(batch.to(device))
        with autocast():
            losses.append(model(x.clamp(min=0), y)[1])
        weights.append(len(tokens) * T)
    agree(error)
    weight = torch.tensor(weights, dtype=torch.float64)
    total = (torch.stack(losses).cpu().double() * weight).sum()
    sums = torch.stack((total, weight.sum()))
    if dist.is_initialized():
        dist.all_reduce(sums)
    return float(sums[0] / sums[1])


def agree(error: str, stop: bool = False) -> bool:
    """Whether any rank was told to stop. Every rank calls it; if any has an error, all raise the first
    one as a UserError."""
    word = torch.tensor(2 if error else int(stop))
    errors = [error]
    if dist.is_initialized():
        dist.all_reduce(word, dist.ReduceOp.MAX)
        if word == 2:
            errors *= dist.get_world_size()
            dist.all_gather_object(errors, error)
    if word == 2:
        raise UserError(next(e for e in errors if e))
    return bool(word)


@torch.no_grad()
def active_fraction(model: GPT, data: Data, device: torch.device, autocast) -> float | None:
    """Share of hidden units that a sparse FFN uses, over all layers, on the first validation
    window; None for a dense FFN."""
    active: list[Tensor] = []

    def note(ffn: nn.Module, args: tuple) -> None:
        active.append(torch.as_tensor(ffn.active(args[0]), dtype=torch.float32).mean())

    sparse = [layer.mlp for layer in model.model.layers if has(layer.mlp, "active")]
    hooks = [ffn.register_forward_pre_hook(note) for ffn in sparse]
    if not hooks:
        return None
    counts = window_counts(data.val, model.config.block_size)
    first = next(s for s, count in enumerate(counts) if count)
    tokens = read_windows(data.val, [(first, 0)], model.config.block_size, data.n_vocab)
    with autocast():
        model.model(tokens[:, :-1].to(device))
    for hook in hooks:
        hook.remove()
    return float(torch.stack(active).mean())


def sample(model: GPT, cfg: Config, data: Data, device: torch.device, autocast) -> str:
    """Text that goes on from --prompt, and the speed; or why there is none."""
    try:
        encoding = load_encoding(data.encoding)
    except (UserError, ImportError) as e:
        return f"no sample: {e}"
    idx = [encoding.eot_token, *encoding.encode_ordinary(cfg.prompt)]
    torch.manual_seed(cfg.seed)
    start = time.perf_counter()
    with autocast():
        out = model.generate(
            torch.tensor([idx], device=device),
            cfg.sample_tokens,
            temperature=cfg.temperature,
            top_k=cfg.top_k,
            n_vocab=data.n_vocab,
        )
    text = encoding.decode(out[0, 1:].tolist())
    speed = cfg.sample_tokens / (time.perf_counter() - start)
    return f"sample ({cfg.sample_tokens} tokens, {speed:,.0f} tokens/s):\n{text}"


# ------------------------------------------------------------------------------------------------
# Checkpoint and log


def save_checkpoint(path: str, checkpoint: dict) -> None:
    """Replace the checkpoint at path: there is a whole one at every moment."""
    try:
        with whole_file(path) as f:
            torch.save(checkpoint, f)
    except (OSError, RuntimeError) as e:  # torch.save turns a full disk into a RuntimeError
        kept = "the last one is intact" if os.path.exists(path) else "there is none yet"
        raise UserError(
            f"cannot save {path} at step {checkpoint['step']} ({reason(e)}); {kept}: "
            "make room, then go on with --init_from=auto"
        ) from None


def load_checkpoint(path: str) -> dict:
    """Raises UserError for a file that is not a checkpoint of this program. Runs no code in it."""
    try:
        with warnings.catch_warnings():  # about a file that is no zip archive
            warnings.simplefilter("ignore")
            checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        keys = {"model", "optimizers", "step", "flags", "shards"}
        if not isinstance(checkpoint, dict) or not keys <= checkpoint.keys():
            raise ValueError("not a checkpoint of train.py")
        checkpoint["flags"] = saved_flags(checkpoint["flags"])
        if type(checkpoint["step"]) is not int or checkpoint["step"] < 0:
            raise ValueError(f"its step is {checkpoint['step']!r}")
        return checkpoint
    except FileNotFoundError:
        raise UserError(f"no checkpoint {path}: check --out_dir, or --init_from=scratch") from None
    except Exception as e:  # whatever a damaged or hostile file makes torch.load raise
        raise UserError(
            f"{path} cannot be loaded ({reason(e)}): --init_from=scratch starts anew"
        ) from None


def resume_flags(cfg: Config, given: set[str], saved: dict) -> Config:
    """Flags not given come from the checkpoint; a given one that would make another run is refused."""
    if not cfg.lr_decay_iters:  # the same command again, where it was given as 0
        given = given - {"lr_decay_iters"}
    for name in sorted(given - CHANGEABLE):
        if getattr(cfg, name) != saved[name]:
            raise UserError(
                f"--{name}={getattr(cfg, name)} differs from the checkpoint's {saved[name]}: leave it "
                "out to go on, or start another run with another --out_dir"
            )
    return Config(**{**saved, **{name: getattr(cfg, name) for name in given & CHANGEABLE}})


def say(text: str) -> None:
    """Print, on rank 0. A full disk or a reader that has gone ends the messages, not the run."""
    if os.environ.get("RANK", "0") == "0":
        try:
            print(text, flush=True)
        except OSError:
            sys.stdout = open(os.devnull, "w")  # noqa: SIM115


def write_row(path: str, row: dict, warned: list[str]) -> None:
    """Append to log.jsonl. A full disk is a warning, once, and leaves no half a row."""
    line = (json.dumps(row) + "\n").encode()
    try:
        with open(path, "ab", buffering=0) as f:
            size = f.tell()
            try:
                while line:
                    line = line[f.write(line) :]
            except OSError:
                with suppress(OSError):  # what is no file cannot be cut
                    f.truncate(size)
                raise
    except OSError as e:
        if not warned:
            say(f"warning: cannot write {path} ({e.strerror}): going on without")
        warned.append(path)


def cut_log(path: str, step: int) -> None:
    """Drop the rows after a step: the resumed run writes them again."""
    kept = []
    if os.path.exists(path):
        with open(path, encoding="utf-8", errors="replace") as f:
            for line in f:
                try:
                    if json.loads(line)["step"] <= step:
                        kept.append(line)
                except (ValueError, KeyError, TypeError):
                    continue  # half a row of a run that was killed
    with open(path + ".tmp", "w", encoding="utf-8") as f:
        f.writelines(kept)
    os.replace(path + ".tmp", path)


def versions(device: torch.device) -> dict[str, str]:
    """What a run was made with, for config.json."""
    here = os.path.dirname(os.path.abspath(__file__))
    command = ["git", "-C", here, "describe", "--always", "--dirty", "--abbrev=40"]
    try:
        git = subprocess.run(command, capture_output=True, text=True).stdout.strip()
    except OSError:
        git = ""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor()
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": np.__version__,
        "git_commit": git or "unknown",
        "device": f"{device.type} {name}".strip(),
    }


def ffn_code(spec: str) -> str:
    """A hash of an FFN's class, but for comments, docstrings and layout: where it differs, runs of one
    name are not of one function. Empty where Python does not have the source."""
    code, outside = "", ("torch", "builtins", "abc", "typing")
    for cls in parse_spec(spec)[0].__mro__:
        if cls.__module__.partition(".")[0] in outside:
            continue
        try:
            tree = ast.parse(textwrap.dedent(inspect.getsource(cls)))
        except (OSError, TypeError, SyntaxError):
            return ""
        for node in ast.walk(tree):
            if isinstance(node, (ast.ClassDef, ast.FunctionDef)) and ast.get_docstring(node) is not None:
                node.body = node.body[1:] or [ast.Pass()]
        code += ast.unparse(tree)
    return hashlib.sha256(code.encode()).hexdigest()[:16]


# ------------------------------------------------------------------------------------------------
# Compiling


@torch.library.custom_op(
    "ffn::product", mutates_args=(), schema="(Tensor a, Tensor b, Tensor? c=None) -> Tensor"
)
def onednn_product(a: Tensor, b: Tensor, c: Tensor | None = None) -> Tensor:
    """a @ b + c, float32 on a CPU, by oneDNN. a: (m, k), b: (k, n), c: (n,) or None."""
    if not a.numel() or not b.numel():  # which oneDNN refuses
        return a @ b if c is None else torch.addmm(c, a, b)
    c = None if c is None else c.contiguous()  # of c it would not look at the strides
    # Where neither a tensor nor its transpose is contiguous, oneDNN takes a thousand times longer.
    a, b = (x if x.is_contiguous() or x.t().is_contiguous() else x.contiguous() for x in (a, b))
    return torch.ops.mkldnn._linear_pointwise(a, b.t(), c, "none", [], "")


onednn_product.register_fake(lambda a, b, c=None: a.new_empty(a.size(0), b.size(1)))


def has_onednn(device: torch.device) -> bool:
    """Whether compiled float32 matrix products go to oneDNN: on a CPU where MKL would get them."""
    here = torch.backends.mkl.is_available() and torch.backends.mkldnn.is_available()
    return device.type == "cpu" and here


def compiled(f: Callable, device: torch.device, mode: str = "default") -> Callable:
    """torch.compile for one shape; `mode` is for GPUs. On a CPU float32 products go to oneDNN: MKL
    gives CPUs other than Intel's its slow kernels, half as fast where there is AVX-512
    (experiments/LOG.md)."""
    from torch._functorch import config as functorch
    from torch._inductor import config as inductor

    # PyTorch traces anew at every start what has an autograd.Function (our loss) or an autocast inside,
    # though both are in its cache's key. Allowed, a second start of 32 layers takes 5 s instead of 17.
    functorch.autograd_cache_allow_custom_autograd_functions = True
    for name in ("_enter_autocast", "_exit_autocast"):
        inductor.unsafe_marked_cacheable_functions[f"torch.amp.autocast_mode.{name}"] = "1"
    if not has_onednn(device):
        return torch.compile(f, mode=mode, dynamic=False)
    from torch._inductor.custom_graph_pass import CustomGraphPass, get_hash_for_files

    class ToOneDNN(CustomGraphPass):
        def __call__(self, graph: torch.fx.Graph) -> None:
            aten = torch.ops.aten
            for node in graph.nodes:
                if node.target not in (aten.mm.default, aten.addmm.default) or node.kwargs:
                    continue
                *bias, a, b = node.args
                out = node.meta["val"]
                fits = all(c.meta["val"].shape == out.shape[1:] for c in bias)
                if out.dtype == torch.float32 and fits:
                    node.target = torch.ops.ffn.product.default
                    node.args = (a, b, *bias)
                    # Of another layout oneDNN would make a copy, and slowly.
                    strides = [a.meta["val"].contiguous(), *(x.meta["val"] for x in (b, *bias))]
                    node.meta["eager_input_vals"] = (tuple(strides), {})

        def uuid(self) -> bytes:
            return get_hash_for_files((__file__,))

    return torch.compile(f, dynamic=False, options={"post_grad_custom_pre_pass": ToOneDNN()})


def compile_and_check(model: GPT, optimizers: list, cfg: Config, autocast) -> nn.Module:
    """One pass forward and backward that changes nothing: compiles, and shows that every parameter
    gets a gradient. Where torch.compile cannot work, says so and goes on without."""
    device = model.lm_head.weight.device
    shape, vocab_size = (cfg.micro_batch_size, cfg.block_size), model.config.vocab_size
    tokens = torch.arange(math.prod(shape), device=device).remainder(vocab_size).view(shape)
    targets = tokens.clone()  # one tensor for both is what the compiled graph would insist on

    def not_trained() -> dict[str, Tensor]:
        frozen = {name: p for name, p in model.named_parameters() if not p.requires_grad}
        return dict(model.named_buffers()) | frozen

    before = {name: t.detach().clone() for name, t in not_trained().items()}

    def one_pass(model: nn.Module) -> nn.Module:
        with autocast():
            model(tokens, targets)[1].backward()
        return model

    start, ready = time.perf_counter(), None
    if cfg.compile and device.type == "mps":
        say("compile off: torch.compile is a prototype on MPS")
    elif cfg.compile:
        try:
            ready = one_pass(compiled(model, device))
            say(f"compile {time.perf_counter() - start:.1f} s")
        except torch.OutOfMemoryError:
            raise
        except Exception as e:  # no C++ compiler, a GPU too old, an FFN that cannot be traced
            say(f"compile off: torch.compile does not work here ({reason(e)})")
            model.zero_grad(set_to_none=True)
    if ready is None:
        ready = one_pass(model)
    frozen = check_gradients(model, optimizers)
    if frozen:
        say(f"frozen  {len(frozen)} parameters get no gradient by design, e.g. {frozen[0]}")
    model.zero_grad(set_to_none=True)
    for name, t in not_trained().items():
        if name in before and not torch.equal(t, before[name]):  # an expanded one can be read only
            t.detach().copy_(before[name])
    return ready


# ------------------------------------------------------------------------------------------------
# Before the loop


def claim_out_dir(cfg: Config, made_with: dict, resumed_step: int | None) -> None:
    """Make the run's folder and config.json, or fail now and not at the first save. A run from
    scratch renames what an earlier one left to *.prev; a resumed one cuts the log at its step."""
    import fcntl  # not on Windows

    path = functools.partial(os.path.join, cfg.out_dir)
    try:
        os.makedirs(cfg.out_dir, exist_ok=True)
        folder = os.open(cfg.out_dir, os.O_RDONLY)  # open, and so locked, until the process ends
        try:
            fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"another run writes to --out_dir={cfg.out_dir}: name another") from None
        except OSError:
            pass  # a file system that cannot
        if resumed_step is None:
            left = [n for n in ("log.jsonl", "ckpt.pt", "config.json") if os.path.exists(path(n))]
            if left != ["config.json"]:  # alone, it is of a start that failed
                for name in left:
                    os.replace(path(name), path(name + ".prev"))
        else:
            cut_log(path("log.jsonl"), resumed_step)
            try:
                with open(path("config.json"), encoding="utf-8") as f:
                    began_with = json.load(f)["ffn_code"]
            except (OSError, ValueError, KeyError, TypeError):
                began_with = ""
            if began_with and began_with != made_with["ffn_code"]:
                say(f"warning: the class of {cfg.ffn} is not what it was when this run began")
            made_with["ffn_code"] = began_with  # so that compare.py refuses it too
        with open(path("config.json.tmp"), "w", encoding="utf-8") as f:
            json.dump({"flags": asdict(cfg), **made_with}, f, indent=2)
        os.replace(path("config.json.tmp"), path("config.json"))
    except OSError as e:
        why = f"cannot write to --out_dir={cfg.out_dir} ({e.strerror}): name another"
        raise UserError(why) from None


def describe(model: GPT, cfg: Config, data: Data, world: int, peak: float | None) -> str:
    """The derived arithmetic of the run."""
    n, cost = model.param_counts(), ffn_cost(model.model.layers[0].mlp)
    hidden = model.config.hidden
    passes = cfg.batch_size // (world * cfg.micro_batch_size)
    per_step = cfg.batch_size * cfg.block_size
    tokens, train_tokens = cfg.max_iters * per_step, sum(shard.tokens for shard in data.train)
    epochs = cfg.max_iters * cfg.batch_size / window_counts(data.train, cfg.block_size).sum()
    flops = model.flops_per_token()
    lines = [
        f"model   {n['layers']:,} parameters in the layers' matrices, {n['total']:,} in all",
        f"ffn     {cfg.ffn}, hidden {hidden}: {cost['params']:,} parameters, FLOPs/token forward "
        f"{cost['flops']:,} executed, {cost['active_flops']:,} active (ideal)",
        f"step    {world} ranks x {passes} passes x {cfg.micro_batch_size} sequences x "
        f"{cfg.block_size} tokens = {per_step:,} tokens",
        f"run     {cfg.max_iters} steps x {per_step:,} = {tokens:,} tokens = {epochs:.2f} epochs of "
        f"{train_tokens:,}, {tokens / n['layers']:.2f} per parameter in the layers' matrices",
        f"flops   6 x {n['matrices']:,} + 6 x {cfg.n_layer} x {cfg.n_embd} x {cfg.block_size} = "
        f"{flops:,} per token, {flops * tokens:.3g} in all, peak "
        + (f"{peak / 1e12:.0f} TFLOP/s per device" if peak else "n/a"),
    ]
    ffn = model.model.layers[0].mlp
    if not (has(ffn, "init_weights") or any(map(is_residual, dict(ffn.named_parameters())))):
        lines.insert(2, "init    no matrix of the FFN is named down_proj: none is scaled for the depth")
    if cfg.ffn_match == "params":
        target = 3 * cfg.n_embd * cfg.ffn_hidden
        over = cost["params"] - target
        lines.insert(2, f"match   {cost['params']:,} - SwiGLU's {target:,} = {over:+,} parameters")
    return "\n".join(lines)


def start_wandb(cfg: Config):
    """A Weights & Biases run named after out_dir."""
    try:
        import wandb
    except ImportError:
        raise UserError("--wandb_project needs: pip install wandb") from None
    name = os.path.basename(os.path.normpath(cfg.out_dir))
    try:
        return wandb.init(project=cfg.wandb_project, name=name, config=asdict(cfg), dir=cfg.out_dir)
    except Exception as e:  # no login, no network, no such project
        raise UserError(f"--wandb_project={cfg.wandb_project}: {reason(e)}") from None


def connect(device: torch.device, step: int, shards: dict) -> None:
    """Join the other ranks; a UserError where they start from another step or other shards."""
    # NCCL carries the gradients of GPUs, gloo all that is on the CPU; every wait has an end.
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    wait = timedelta(minutes=10)
    # torchrun's store outlives the ranks, and ranks that it starts again must not read the dead
    # ones' addresses (pytorch issue 135712). Several nodes may count the restarts differently.
    store, rank, world = next(dist.rendezvous("env://", timeout=wait))
    if os.environ.get("GROUP_WORLD_SIZE", "1") == "1":
        store = dist.PrefixStore(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"), store)
    dist.init_process_group(backend, store=store, rank=rank, world_size=world, timeout=wait)
    found = [(step, shards)] * world
    dist.all_gather_object(found, (step, shards))
    if any(other != found[0] for other in found):
        raise UserError(
            f"the ranks found different shards or checkpoints (of steps {[f[0] for f in found]}): "
            "--out_dir must be one folder that all machines share, --data_dir have the same shards"
        )


def restore(model: GPT, optimizers: list, checkpoint: dict, path: str) -> None:
    """Load a checkpoint's weights and optimizer states; a UserError where they do not fit."""
    try:
        model.load_state_dict(checkpoint["model"])
        for optimizer, state in zip(optimizers, checkpoint["optimizers"], strict=True):
            optimizer.load_state_dict(state)
            # Fused AdamW takes shapes on trust, and would write beyond a smaller tensor.
            for p in (p for group in optimizer.param_groups for p in group["params"]):
                own = optimizer.state.get(p, {})
                shapes = {value.shape for name, value in own.items() if name != "step"}
                if checkpoint["step"] and shapes != {p.shape}:
                    raise ValueError("an optimizer state of another shape")
    except Exception as e:  # another vocabulary, or whatever is in a file made elsewhere
        why = " ".join(str(e).split())[:300]
        raise UserError(f"{path} does not fit this model and data ({why})") from None


def catch_signals(ddp: bool) -> list[float]:
    """The times of SIGTERM and SIGINT, a list that grows. A second one ends the process at once, under
    torchrun if it comes 5 seconds later or more."""
    times: list[float] = []

    def on_signal(number: int, frame: object) -> None:
        # Under torchrun one Ctrl-C comes twice, from the terminal and from torchrun: count it once.
        if times and (not ddp or time.monotonic() - times[0] > 5):
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        times.append(time.monotonic())

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, on_signal)
    return times


# ------------------------------------------------------------------------------------------------
# The run


def main() -> None:
    cfg, given = configure(Config, sys.argv[1:])
    ddp = "RANK" in os.environ  # started by torchrun
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    local_rank = int(os.environ.get("LOCAL_RANK", 0))

    # -- flags, the given ones and the checkpoint's
    out_dir = cfg.out_dir or f"out/{cfg.ffn}-s{cfg.seed}"
    ckpt_path, log_path = os.path.join(out_dir, "ckpt.pt"), os.path.join(out_dir, "log.jsonl")
    checkpoint, step = None, 0
    if cfg.init_from == "resume" or (cfg.init_from == "auto" and os.path.exists(ckpt_path)):
        checkpoint = load_checkpoint(ckpt_path)
        step = checkpoint["step"]
        cfg = resume_flags(cfg, given & CHANGEABLE if cfg.eval_only else given, checkpoint["flags"])
    check_flags(cfg, world)
    if checkpoint and step >= cfg.max_iters and not cfg.eval_only:
        say(f"finished: {ckpt_path} is at step {step} of {cfg.max_iters}")
        return
    cfg.out_dir, cfg.lr_decay_iters = out_dir, cfg.lr_decay_iters or cfg.max_iters
    device = pick_device(cfg, local_rank, int(os.environ.get("LOCAL_WORLD_SIZE", 1)))
    if device.type == "cpu":
        set_up_cpu()
    bf16 = use_bfloat16(cfg, device)
    autocast = functools.partial(torch.autocast, device.type, dtype=torch.bfloat16, enabled=bf16)

    # -- data
    if cfg.prepare:
        prepare_data(cfg, local_rank)
    data = open_data(cfg.data_dir, cfg.block_size)
    found = {"train": data.train, "val": data.val}
    shards = {split: [[os.path.basename(s.path), s.tokens] for s in found[split]] for split in found}
    if checkpoint and checkpoint["shards"] != shards and not cfg.eval_only:
        raise UserError(f"{cfg.data_dir} has other shards than the checkpoint's run: restore them")
    counts = window_counts(data.train, cfg.block_size)
    if counts.sum() < cfg.batch_size and not cfg.eval_only:
        raise UserError(
            f"{cfg.data_dir} has {counts.sum():,} windows of {cfg.block_size} tokens, fewer than one "
            f"batch of {cfg.batch_size}: lower --batch_size or prepare more data"
        )

    # -- model and optimizer
    config = model_config(vars(cfg), vocab_size=math.ceil(data.n_vocab / 128) * 128)
    config.check()
    if rank == 0 and not cfg.eval_only:
        made_with = {"encoding": data.encoding, "vocab_size": config.vocab_size, "world": world}
        made_with |= versions(device) | {"ffn_code": ffn_code(cfg.ffn)}
        claim_out_dir(cfg, made_with, step if checkpoint else None)
    if ddp:
        connect(device, step, shards)
    raw = GPT(config).to(device)
    optimizers = make_optimizers(raw, cfg)
    if checkpoint:
        restore(raw, optimizers, checkpoint, ckpt_path)
    checkpoint_step = step if checkpoint else None
    checkpoint = None  # its memory is free again
    peak = peak_flops(device) if bf16 else None
    flops, per_step = raw.flops_per_token(), cfg.batch_size * cfg.block_size
    say(f"device  {device} x {world}, {'bfloat16' if bf16 else 'float32'}")
    say(describe(raw, cfg, data, world, peak))

    signals = catch_signals(ddp)

    # -- how to log and save
    wandb = start_wandb(cfg) if cfg.wandb_project and rank == 0 and not cfg.eval_only else None
    warned: list[str] = []
    failed = torch.zeros((), device=device)  # first step whose loss or gradient was not finite

    def log(row: dict) -> None:
        if rank == 0 and not cfg.eval_only:
            write_row(log_path, row, warned)
            if wandb:
                wandb.log({k: v for k, v in row.items() if k != "step"}, step=row["step"])

    def not_finite(what: str) -> UserError:
        kept = "no checkpoint was saved yet"
        if checkpoint_step is not None:
            kept = f"the last good checkpoint is {ckpt_path} at step {checkpoint_step}"
        return UserError(f"{what}; {kept}: lower --learning_rate or look at the FFN")

    def check_finite() -> None:
        """Waits for the device."""
        if failed:
            what = "loss or gradient is not finite, the weights were not changed"
            raise not_finite(f"step {int(failed)}: {what}")

    def save() -> None:
        nonlocal checkpoint_step
        if not all(p.isfinite().all() for p in raw.parameters()):  # a learning rate beyond float32
            raise not_finite(f"step {step}: a weight is not finite")
        state = {"model": raw.state_dict(), "optimizers": [o.state_dict() for o in optimizers]}
        state |= {"step": step, "flags": asdict(cfg), "shards": shards}
        if rank == 0:
            save_checkpoint(ckpt_path, state)
        checkpoint_step = step

    # -- the loop. Its clock stands still while evaluating, saving and compiling.
    first_step, val_loss, stopped = step, math.nan, False
    total_time = window_time = window_steps = 0
    bold, plain = ("\033[1m", "\033[0m") if sys.stdout.isatty() else ("", "")
    try:
        model = raw
        if not cfg.eval_only:
            model = compile_and_check(raw, optimizers, cfg, autocast)
            if ddp:
                # Deprecated in torch 2.13; its successor is not in 2.11.
                warnings.filterwarnings("ignore", ".*broadcast_buffers")
                model = DDP(model, broadcast_buffers=False, gradient_as_bucket_view=True)
        mark = time.perf_counter()
        while True:
            last = step >= cfg.max_iters or cfg.eval_only
            fresh = step != checkpoint_step  # a resumed run did these before it stopped
            evaluate_now = last or (fresh and step % cfg.eval_interval == 0)
            save_now = last or (step > 0 and step % cfg.save_interval == 0)
            save_now = save_now and fresh and not cfg.eval_only
            if evaluate_now or save_now:
                check_finite()
                window_time += time.perf_counter() - mark
                if evaluate_now:
                    raw.eval()
                    val_loss = evaluate(model, data, cfg, device, autocast)
                    active = active_fraction(raw, data, device, autocast)
                    row = {"step": step, "tokens": step * per_step, "val_loss": val_loss}
                    log(row if active is None else row | {"active": active})
                    note = "" if active is None else f" | active {active:.1%}"
                    say(f"{bold}step {step:>6}/{cfg.max_iters} | val  {val_loss:.4f}{note}{plain}")
                    raw.train()
                if save_now:
                    save()
                mark = time.perf_counter()
            if last:
                break

            share = cfg.batch_size // world
            first = step * cfg.batch_size + rank * share
            error = ""
            try:
                places = locate(counts, np.arange(first, first + share), cfg.data_seed)
                batch = read_windows(data.train, places, cfg.block_size, data.n_vocab)
            except UserError as e:
                error = str(e)
            if agree(error, stop=bool(signals)):
                check_finite()
                if fresh:
                    save()
                stopped = True
                break

            if device.type == "cuda":
                batch = batch.pin_memory()
            batches = batch.to(device, non_blocking=True).split(cfg.micro_batch_size)
            # For an FFN that draws noise: other noise each step and rank, the same when resumed.
            torch.manual_seed((cfg.seed * 2**20 + step) * 2**10 + rank)
            loss, norm = train_step(model, optimizers, batches, cfg, step, failed, autocast)
            step, window_steps = step + 1, window_steps + 1
            if step % cfg.log_interval == 0 or step == first_step + 1:
                check_finite()
                window_time += time.perf_counter() - mark
                mark = time.perf_counter()
                speed, ms = per_step * window_steps / window_time, 1000 * window_time / window_steps
                mfu = flops * speed / (peak * world) if peak else None
                row = {"step": step, "tokens": step * per_step, "train_loss": float(loss)}
                row |= {"lr": learning_rate(step - 1, cfg), "grad_norm": float(norm)}
                row |= {"step_ms": ms, "tok_per_s": speed, "mfu": mfu}
                log(row)
                eta = timedelta(seconds=round((cfg.max_iters - step) * ms / 1000))
                say(
                    f"step {step:>6}/{cfg.max_iters} | loss {row['train_loss']:.4f} | lr {row['lr']:.2e}"
                    f" | norm {row['grad_norm']:6.2f} | {ms:8.1f} ms | {speed:>9,.0f} tok/s"
                    f" | mfu {f'{mfu:.1%}' if mfu else 'n/a'} | eta {eta}"
                )
                total_time, window_time, window_steps = total_time + window_time, 0, 0
    except torch.OutOfMemoryError:
        raise UserError(f"out of memory after step {step}: halve --micro_batch_size") from None
    except RuntimeError as e:
        if "finished reduction in the prior iteration" in str(e):  # by DDP, of the last micro-batch
            raise UserError(
                f"step {step}: a parameter received no gradient on some rank: keep it in the graph in "
                "every pass"
            ) from None
        if not ddp or not re.search("(?i)gloo|nccl|connection|peer|timed out|timeout", str(e)):
            raise
        raise UserError(
            f"another rank is gone, nothing was saved after step {step} ({reason(e)}): go on from the "
            "last checkpoint with --init_from=auto"
        ) from None

    # -- the end
    total_time += window_time
    if stopped:
        say(f"stopped at step {step} of {cfg.max_iters}, saved {ckpt_path}")
        say(f"go on with: the same command and --init_from=resume --out_dir={out_dir}")
    else:
        say(f"\nvalidation loss  {val_loss:.4f} nats per token at step {step}")
        if step > first_step:
            speed = (step - first_step) * per_step / total_time
            say(f"speed            {speed:,.0f} tokens/s over {step - first_step} steps")
            say(f"log              {log_path}")
            say(f"checkpoint       {ckpt_path}")
            say(f"plot             python experiments/compare.py --report {out_dir}")
        if cfg.sample_tokens and rank == 0:
            raw.eval()
            say("\n" + sample(raw, cfg, data, device, autocast))
    if wandb:
        wandb.finish()
    if ddp:
        del model  # held last by the model, the process group can deadlock on Python's lock
        dist.destroy_process_group()


if __name__ == "__main__":
    run(main)
