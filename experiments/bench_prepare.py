"""
Tokens per second of prepare_fineweb.py against llm.c's recipe, on the same file and cores.

    TIKTOKEN_CACHE_DIR=... python experiments/bench_prepare.py --input=some.parquet

llm.c's recipe (dev/data/fineweb.py, the same loop in modded-nanogpt): a multiprocessing pool,
encode_ordinary into a Python list, imap(chunksize=16). It reads its documents through `datasets`
as it does there, and every run of either is a process of its own that writes its shards. The
clock runs from the first document to the last shard on disk, so that neither is charged for
imports and start-up; "whole run" charges both for everything. Runs alternate; medians are
reported, with the least and the most. CPU seconds (of all processes, between the same two moments)
are the steadier figure on a machine that others use too.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from configurator import UserError, configure, run  # noqa: E402


@dataclass
class Config:
    input: str = ""  # a parquet file with a column "text"
    encoding: str = "gpt2"  # the encoding
    rounds: int = 7  # runs of each
    workers: int = 0  # processes that tokenize (0: one per core)
    shard_tokens: int = 1_000_000  # tokens in a shard
    recipe: str = ""  # run one recipe (llmc or ours) once and print its times: used by itself


# ---- llm.c's recipe ----------------------------------------------------------------------------


def start_llmc(name: str) -> None:
    global enc
    import prepare_fineweb

    enc = prepare_fineweb.load_encoding(name)


def tokenize(doc: dict) -> np.ndarray:
    tokens = [enc.eot_token]
    tokens.extend(enc.encode_ordinary(doc["text"]))
    tokens_np = np.array(tokens)
    assert ((0 <= tokens_np) & (tokens_np < 2**16)).all(), "too large for uint16"  # noqa: SIM300
    return tokens_np.astype(np.uint16)


def write_datafile(filename: str, tokens: np.ndarray) -> None:
    header = np.zeros(256, dtype=np.int32)
    header[0], header[1], header[2] = 20240520, 1, len(tokens)
    with open(filename, "wb") as f:
        f.write(header.tobytes())
        f.write(tokens.astype(np.uint16).tobytes())


def llmc(cfg: Config, out: str) -> None:
    import multiprocessing

    import datasets

    stream = datasets.load_dataset("parquet", data_files=[cfg.input], split="train", streaming=True)
    buffer, count, index = np.empty((cfg.shard_tokens,), dtype=np.uint16), 0, 0
    with multiprocessing.Pool(cfg.workers, start_llmc, (cfg.encoding,)) as pool:
        pool.map(tokenize, [{"text": ""}] * 100)  # all workers are up
        start, cpu = time.perf_counter(), -cpu_seconds()
        for tokens in pool.imap(tokenize, stream, chunksize=16):
            if count + len(tokens) < cfg.shard_tokens:
                buffer[count : count + len(tokens)] = tokens
                count += len(tokens)
            else:
                remainder = cfg.shard_tokens - count
                buffer[count:] = tokens[:remainder]
                write_datafile(name(out, index), buffer)
                index += 1
                count = len(tokens) - remainder
                buffer[:count] = tokens[remainder:]
        if count:
            write_datafile(name(out, index), buffer[:count])
        cpu += cpu_seconds()
    print("seconds", time.perf_counter() - start, cpu)


def cpu_seconds() -> float:
    """CPU time that this process and its living children have had."""
    import psutil

    me = psutil.Process()
    times = [process.cpu_times() for process in (me, *me.children(recursive=True))]
    return sum(t.user + t.system for t in times)


def name(out: str, index: int) -> str:
    return f"{out}/fineweb_{'train' if index else 'val'}_{index:06d}.bin"


# ---- ours --------------------------------------------------------------------------------------


def ours(cfg: Config, out: str) -> None:
    import prepare_fineweb

    # the clock starts when the documents do, with all workers up
    encode_in_order = prepare_fineweb.encode_in_order

    def timed(pool, workers, batches):
        nonlocal start, cpu
        for future in [pool.submit(prepare_fineweb.encode_batch, [""]) for _ in range(100)]:
            future.result()
        start, cpu = time.perf_counter(), -cpu_seconds()
        yield from encode_in_order(pool, workers, batches)
        cpu += cpu_seconds()  # while the workers live: all but writing the last shard

    start = cpu = 0.0
    prepare_fineweb.encode_in_order = timed
    sys.argv[1:] = [f"--input={cfg.input}", f"--encoding={cfg.encoding}", f"--out_dir={out}",
                    f"--shard_tokens={cfg.shard_tokens}", f"--workers={cfg.workers}"]  # fmt: skip
    prepare_fineweb.main()
    print("seconds", time.perf_counter() - start, cpu)


# ---- side by side ------------------------------------------------------------------------------


def once(cfg: Config, recipe: str, out: str) -> tuple[float, float, float]:
    """(seconds of the work, its CPU seconds, seconds of the whole process)"""
    flags = [f"--input={cfg.input}", f"--encoding={cfg.encoding}", f"--workers={cfg.workers}",
             f"--shard_tokens={cfg.shard_tokens}"]  # fmt: skip
    env = os.environ | {"OUT": out}
    start = time.perf_counter()
    done = subprocess.run([sys.executable, __file__, f"--recipe={recipe}", *flags], env=env,
                          capture_output=True, text=True)  # fmt: skip
    whole = time.perf_counter() - start
    if done.returncode:
        raise UserError(f"{recipe} failed: {done.stderr[-500:]}")
    work, cpu = map(float, done.stdout.split("seconds ")[1].split())
    return work, cpu, whole


def main() -> None:
    cfg, _ = configure(Config, sys.argv[1:])
    if not os.path.isfile(cfg.input):
        raise UserError("--input must be a parquet file with a column named text")
    import prepare_fineweb

    cfg.workers = cfg.workers or prepare_fineweb.cores()
    if cfg.recipe:
        return {"llmc": llmc, "ours": ours}[cfg.recipe](cfg, os.environ["OUT"])
    times: dict[str, list[tuple[float, float, float]]] = {"llmc": [], "ours": []}
    print(f"load average before: {os.getloadavg()[0]:.2f}, {cfg.workers} workers")
    for i in range(cfg.rounds + 1):  # the first round warms the page cache and is not counted
        shards = []
        for recipe in ("llmc", "ours") if i % 2 else ("ours", "llmc"):
            with tempfile.TemporaryDirectory() as out:
                seconds = once(cfg, recipe, out)
                shards.append({p.name: p.read_bytes() for p in Path(out).glob("*.bin")})
            if i:
                times[recipe].append(seconds)
        if shards[0] != shards[1]:
            raise UserError("the two recipes' shards differ")
    tokens = sum(len(data) - 1024 for data in shards[0].values()) // 2
    print(f"{tokens:,} tokens, {len(shards[0])} identical shards, {cfg.rounds} rounds")
    print(f"{'':<6}{'median tok/s':>14}{'least':>12}{'most':>12}{'CPU s':>9}{'whole run s':>13}")
    for recipe, runs in times.items():
        rates = sorted(tokens / work for work, _, _ in runs)
        cpu, whole = (statistics.median(run[i] for run in runs) for i in (1, 2))
        print(f"{recipe:<6}{statistics.median(rates):>14,.0f}{rates[0]:>12,.0f}{rates[-1]:>12,.0f}"
              f"{cpu:>9.2f}{whole:>13.2f}")  # fmt: skip
    for i, what in enumerate(("tokens per second", "tokens per CPU second")):
        ratios = [a[i] / b[i] for a, b in zip(times["llmc"], times["ours"], strict=True)]
        print(f"{what}, ours over llm.c's, round by round: median {statistics.median(ratios):.3f}, "
              f"from {min(ratios):.3f} to {max(ratios):.3f}")  # fmt: skip
    print(json.dumps({"tokens": tokens, "workers": cfg.workers, "times": times}))


if __name__ == "__main__":
    run(main)
