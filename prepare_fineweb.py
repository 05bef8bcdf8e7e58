"""
Text -> shards of uint16 tokens, in the format of llm.c and modded-nanogpt; shards -> batches.

    python prepare_fineweb.py                                   # FineWeb sample-10BT, streamed
    python prepare_fineweb.py --input='texts/*.parquet'         # jsonl(.gz, .zst), txt, py
    python prepare_fineweb.py --pretokenized=8                  # download ready-made GPT-2 shards
    python prepare_fineweb.py --input=stdlib --encoding=bytes   # offline: Python's own sources
    python prepare_fineweb.py --verify=data/fineweb             # re-read and check everything

A shard is 256 little-endian int32 of header (20240520, 1, number of tokens, zeros), then the
tokens. Every document is <|endoftext|> and then its ordinary encoding; documents run on across
shards. The stream's first val_tokens tokens are the validation shard, the rest training shards.

It can be killed at any moment: run the same command again and it goes on from the last complete
shard, to the same bytes. Neither interruptions nor the number of workers change the result.
"""

from __future__ import annotations

import contextlib
import functools
import glob
import hashlib
import importlib.util
import itertools
import json
import multiprocessing
import os
import re
import signal
import sys
import sysconfig
import tempfile
import threading
import time
from collections import deque
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, BinaryIO, NamedTuple

import numpy as np

from configurator import UserError, configure, run, suggest

if TYPE_CHECKING:
    import tiktoken

MAGIC, VERSION, HEADER_INTS = 20240520, 1, 256
HEADER_BYTES = 4 * HEADER_INTS
KINDS = {".parquet": "parquet", ".jsonl": "jsonl", ".jsonl.gz": "jsonl", ".jsonl.zst": "jsonl",
         ".txt": "text", ".py": "text"}  # fmt: skip
PRETOKENIZED = "kjj0/fineweb10B-gpt2"
DOWNLOAD_ATTEMPTS, RETRY_SECONDS = 5, 1.0  # without getting any further; doubled each time
EOT = "<|endoftext|>"
BATCH_CHARS = 1 << 18


@dataclass
class Config:
    input: str = ""  # glob of local parquet, jsonl(.gz, .zst), txt or py files, or "stdlib"
    dataset: str = "HuggingFaceFW/fineweb"  # what to stream from the Hugging Face hub if no input
    name: str = "sample-10BT"  # the dataset's configuration
    split: str = "train"  # the dataset's split
    revision: str = ""  # the dataset's branch, tag or commit (empty: main)
    text_column: str = "text"  # which column or JSON key holds the text
    out_dir: str = "data/fineweb"  # where the shards go
    encoding: str = "gpt2"  # gpt2, bytes, or another tiktoken encoding of at most 65,536 tokens
    shard_tokens: int = 100_000_000  # tokens in a training shard
    val_tokens: int = 0  # tokens in the validation shard (0: shard_tokens)
    max_tokens: int = 0  # stop after this many tokens, validation included (0: take all)
    workers: int = 0  # processes that tokenize (0: one per core)
    pretokenized: int = 0  # download this many ready-made training shards (and validation) instead
    verify: str = ""  # check this folder against its meta.json instead


# flags not compared when a run is taken up again: they do not change shards that it tokenizes
FREE_FLAGS = {"out_dir", "workers", "pretokenized", "verify"}


# ---- encodings --------------------------------------------------------------------------------


def load_encoding(name: str) -> tiktoken.Encoding:
    """The tiktoken encoding `name`; "bytes" is the 256 bytes and end-of-text = 256, made in memory.
    Raises UserError if it is unknown, cannot be had, or does not fit shards of uint16."""
    import tiktoken

    if name == "bytes":
        # Runs of up to 64 characters: fewer regex matches than one a character, and no run so
        # long that looking for merges in it costs. There are none: every byte is its own token.
        ranks = {bytes([i]): i for i in range(256)}
        return tiktoken.Encoding("bytes", pat_str=r"(?s:.{1,64})", mergeable_ranks=ranks,
                                 special_tokens={EOT: 256})  # fmt: skip
    if name not in tiktoken.list_encoding_names():
        known = ["bytes", *tiktoken.list_encoding_names()]
        raise UserError(f"unknown encoding {name!r}: {suggest(name, known)}")
    too_big = f"encoding {name!r} has more than 65,536 tokens, too many for uint16: use gpt2"
    if name.startswith(("cl100k", "o200k")):  # known without a download
        raise UserError(too_big)
    try:
        encoding = tiktoken.get_encoding(name)
    except (OSError, ValueError, AssertionError) as e:  # requests' errors are OSErrors
        raise UserError(
            f"cannot get the tokenizer {name!r} ({type(e).__name__}): connect to the internet "
            "once, or set TIKTOKEN_CACHE_DIR to a folder that has it, or use --encoding=bytes"
        ) from None
    if encoding.n_vocab > 65_536:
        raise UserError(too_big)
    if EOT not in encoding.special_tokens_set:
        raise UserError(f"encoding {name!r} has no {EOT} token to begin documents with: use gpt2")
    return encoding


# Unicode's White_Space, which is what \s means to tiktoken's regex (and not to Python's)
SPACE = r"[\t-\r \x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000]"
LONG_SPACE = re.compile(rf"{SPACE}{{999,}}(?={SPACE}[^{SPACE[1:]})")


def encode(encoding: tiktoken.Encoding, text: str) -> np.ndarray:
    """The ordinary encoding of one text, (n,) uint16: "<|endoftext|>" in it is plain text."""
    try:
        ids = encoding.encode_to_numpy(text, allowed_special=set(), disallowed_special=())
        return ids.astype(np.uint16)
    except UnicodeEncodeError:  # a lone surrogate becomes U+FFFD, as encode_ordinary has it
        return encode(encoding, text.encode("utf-16", "surrogatepass").decode("utf-16", "replace"))
    except ValueError:
        # tiktoken's regex gives up on some 10^5 blanks before a word. GPT-2's pattern cuts such a
        # run before its last blank, so the text can be cut there first without any difference.
        cuts = [0, *(m.end() for m in LONG_SPACE.finditer(text)), len(text)]
        if len(cuts) == 2:
            raise
        pieces = itertools.pairwise(cuts)
        return np.concatenate([encode(encoding, text[a:b]) for a, b in pieces])


# ---- workers ----------------------------------------------------------------------------------


def start_worker(name: str) -> None:
    """Run once in each worker process: load the encoding, and never outlive the parent."""
    global worker_encoding
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's business
    threading.Thread(target=exit_with_parent, daemon=True).start()
    worker_encoding = load_encoding(name)


def exit_with_parent() -> None:
    multiprocessing.parent_process().join()  # returns when the parent is gone, kill -9 included
    os._exit(1)


def encode_batch(texts: list[str]) -> np.ndarray:
    """Documents -> one (n,) uint16 array: each is end-of-text, then its encoding."""
    eot = np.array([worker_encoding.eot_token], dtype=np.uint16)
    parts = []
    for text in texts:
        try:
            parts += eot, encode(worker_encoding, text)
        except Exception as e:
            raise UserError(
                f"cannot tokenize the document that begins {text[:60]!r} ({e}): take it out"
            ) from None
    return np.concatenate(parts)


def encode_in_order(
    pool: ProcessPoolExecutor, workers: int, batches: Iterator[tuple[dict, list[str]]]
) -> Iterator[tuple[dict, np.ndarray]]:
    """(position, texts) -> (position, tokens), in order, with a bounded number in flight."""
    futures = ((position, pool.submit(encode_batch, texts)) for position, texts in batches)
    try:
        pending = deque(itertools.islice(futures, 2 * workers + 2))
        while pending:
            pending.extend(itertools.islice(futures, 1))
            position, future = pending.popleft()
            yield position, future.result()
    except BrokenProcessPool:
        raise UserError(
            "a worker process died (out of memory?): run the same command again, it goes on from "
            "the last complete shard; fewer --workers need less memory"
        ) from None


# ---- sources ----------------------------------------------------------------------------------


def find_files(cfg: Config) -> tuple[str, list[str]]:
    """The kind ("parquet", "jsonl", "text") and the sorted paths of the local input files."""
    if cfg.input == "stdlib":
        return "text", stdlib_files()
    found = glob.glob(os.path.expanduser(cfg.input), recursive=True)
    paths = sorted(filter(os.path.isfile, found))
    if not paths:
        raise UserError(f"--input={cfg.input!r} matches no file: quote the glob, check the path")
    kinds = {}
    for path in paths:
        extension = next((e for e in KINDS if path.endswith(e)), None)
        if extension is None:
            raise UserError(f"cannot tell what {path} is: --input takes {', '.join(KINDS)}")
        if extension == ".jsonl.zst" and not importlib.util.find_spec("zstandard"):
            raise UserError(f"{path} needs the zstandard package: pip install zstandard")
        kinds[KINDS[extension]] = path
    if len(kinds) > 1:
        raise UserError(f"--input mixes {' and '.join(kinds.values())}: take one kind at a time")
    return kinds.popitem()[0], paths


def stdlib_files() -> list[str]:
    """The sources of the running Python's standard library, without packages and tests, sorted."""
    skip = re.compile(r".*-packages|__pycache__|tests?|.*_tests?")
    paths = []
    for folder, folders, names in os.walk(sysconfig.get_path("stdlib")):
        folders[:] = [name for name in folders if not skip.fullmatch(name)]
        paths += [os.path.join(folder, name) for name in names if name.endswith(".py")]
    return sorted(paths, key=lambda path: path.split(os.sep))


def text_bytes(cfg: Config, kind: str, paths: list[str]) -> int:
    """About how many bytes of text the files hold, for the time left. Checks parquet headers."""
    if kind != "parquet":
        return sum(os.path.getsize(p) * (3 if p.endswith((".gz", ".zst")) else 1) for p in paths)
    from pyarrow import parquet

    total = 0
    for path in paths:
        with reading(path):
            meta = parquet.read_metadata(path)
        names = meta.schema.names
        if cfg.text_column not in names:
            raise no_column(cfg.text_column, path, names)
        column = names.index(cfg.text_column)
        for group in map(meta.row_group, range(meta.num_row_groups)):
            total += group.column(column).total_uncompressed_size
    return total


@contextlib.contextmanager
def reading(what: str) -> Iterator[None]:
    """One line for whatever datasets, pyarrow, a decompressor, the hub or the network raise."""
    try:
        yield
    except (UserError, ImportError):
        raise
    except Exception as e:
        reason = f"{type(e).__name__}: {str(e).strip()}".splitlines()[0]
        cure = "check the input and the network, then run the same command again: it goes on"
        raise UserError(f"cannot read {what} ({reason[:300]}): {cure}") from e


def no_column(name: str, where: str, names: list[str]) -> UserError:
    return UserError(f"{where} has no column {name!r}: set --text_column; {suggest(name, names)}")


def find_source(cfg: Config, meta: dict) -> tuple[str, list[str], int]:
    """Find the input: its kind, its local files and about how many tokens it holds (0: unknown).
    Notes in meta what it is, so that a run is never taken up again with another input."""
    if not cfg.input:
        if not meta.get("revision"):  # a run of days must not see a branch or tag move
            from huggingface_hub import HfApi

            with reading(f"the dataset {cfg.dataset}"):
                info = HfApi().dataset_info(cfg.dataset, revision=cfg.revision or None, timeout=30)
                meta["revision"] = info.sha
        meta["source"] = f"{cfg.dataset} {cfg.name} {cfg.split} at {meta['revision']}"
        billions = re.search(r"(\d+)BT", cfg.name)  # sample-10BT holds about 10 billion tokens
        return "hub", [], int(billions[1]) * 10**9 if billions else 0
    kind, paths = find_files(cfg)
    size = text_bytes(cfg, kind, paths)
    names_and_sizes = [(os.path.basename(p), os.path.getsize(p)) for p in paths]
    digest = hashlib.sha256(json.dumps(names_and_sizes).encode()).hexdigest()
    if meta.setdefault("input_digest", digest) != digest:
        raise UserError(f"the files of --input={cfg.input!r} are not those that {cfg.out_dir} was "
                        "begun with: put them back, or take another --out_dir")  # fmt: skip
    python = f"the standard library of Python {sys.version.split()[0]}"
    meta["source"] = python if cfg.input == "stdlib" else f"{cfg.input} ({len(paths)} files)"
    return kind, paths, int(size / (1 if cfg.encoding == "bytes" else 4.5))


def go_on(stream, meta: dict) -> dict:
    """Move the stream to where meta's shards end, and return the position of the first document to
    take, the last one begun: {"state": the stream's state, "documents": how many to skip from it}."""
    import datasets

    # a state spares reading all that comes before, but only its own version can tell it
    resume = meta.get("resume", {"shards": -1})
    state = resume["shards"] == len(meta["shards"]) and resume["position"]["state"]
    if state and state["version"] == datasets.__version__:
        stream.load_state_dict(state["stream"])
        return resume["position"]
    begun = sum(shard["documents"] for shard in meta["shards"])
    return {"state": None, "documents": max(begun - 1, 0)}


def open_stream(cfg: Config, kind: str, paths: list[str], revision: str | None, cache_dir: str):
    """A streaming dataset: rows of the hub's dataset or of the files, or lines of jsonl files."""
    import datasets

    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)  # errors are ours to tell
    datasets.config.HF_UPDATE_DOWNLOAD_COUNTS = False  # would stall without a network
    datasets.config.HF_DATASETS_CACHE = cache_dir  # it leaves lock files even when it streams
    datasets.config.TORCH_AVAILABLE = False  # would import torch, for seconds and for nothing
    load = functools.partial(datasets.load_dataset, streaming=True)
    if kind == "hub":
        return load(cfg.dataset, cfg.name or None, split=cfg.split, revision=revision)
    if kind == "text":
        return datasets.IterableDataset.from_generator(read_files, gen_kwargs={"paths": paths})
    files = {"data_files": [glob.escape(os.path.abspath(path)) for path in paths], "split": "train"}
    if kind == "parquet":  # few rows at a time: a novel is a megabyte
        return load(kind, columns=[cfg.text_column], batch_size=64, **files)
    # jsonl is read as lines and parsed here. The json builder of `datasets` guesses types (a text
    # like a date becomes one), drops lone surrogates, wants the same keys in every file, and on an
    # error it reads the whole file anew, whose first documents would come twice.
    return load("text", encoding="utf-8-sig", encoding_errors="replace", **files)


def read_files(paths: list[str]) -> Iterator[dict]:
    """One file, one document, to the byte: carriage returns stay, invalid UTF-8 is replaced."""
    for path in paths:
        with open(path, "rb") as f:
            yield {"text": f.read().decode("utf-8", "replace")}


def read_texts(cfg: Config, kind: str, rows: Iterator[dict], where: str) -> Iterator[str]:
    """The text of each row; a null is an empty document, and a blank line of jsonl is none."""
    with reading(where):
        for row in rows:
            if kind == "jsonl":
                if not row["text"].strip():
                    continue
                row = parse_line(row["text"], where)
            if cfg.text_column not in row:
                raise no_column(cfg.text_column, f"a row of {where}", list(row))
            text = row[cfg.text_column]
            if text is not None and not isinstance(text, str):
                what = f"column {cfg.text_column!r} of {where} holds {type(text).__name__}"
                raise UserError(f"{what}, not text: set --text_column; columns: {', '.join(row)}")
            yield text or ""


def parse_line(line: str, where: str) -> dict:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as e:
        raise UserError(f"{where}: not JSON ({e}): repair the line {line[:60]!r}") from None
    if not isinstance(row, dict):
        raise UserError(f"{where}: not a JSON object: repair the line {line[:60]!r}")
    return row


def make_batches(texts: Iterator[str], stream, position: dict) -> Iterator[tuple[dict, list[str]]]:
    """Group the stream's texts, the first of which is at position, into batches of about BATCH_CHARS,
    each with the position of its first text."""
    import datasets

    batch: list[str] = []
    size = 0
    for text in itertools.islice(texts, position["documents"], None):
        batch.append(text)
        size += len(text) + 100
        if size >= BATCH_CHARS:
            yield position, batch
            state = {"version": datasets.__version__, "stream": stream.state_dict()}
            position, batch, size = {"state": state, "documents": 0}, [], 0
    if batch:
        yield position, batch


# ---- files ------------------------------------------------------------------------------------


@contextlib.contextmanager
def whole_file(path: str) -> Iterator[BinaryIO]:
    """A file to write, which has its name only when it is complete and on disk. OSError names it."""
    try:
        with open(path + ".tmp", "wb") as f:
            yield f
            f.flush()
            os.fsync(f.fileno())
        os.replace(path + ".tmp", path)
        folder = os.open(os.path.dirname(path) or ".", os.O_RDONLY)  # the new name, too
        os.fsync(folder)
        os.close(folder)
    except OSError as e:
        raise OSError(e.errno, e.strerror, path) from None
    finally:
        with contextlib.suppress(OSError):
            os.remove(path + ".tmp")


def save_meta(out_dir: str, meta: dict) -> None:
    with whole_file(os.path.join(out_dir, "meta.json")) as f:
        f.write((json.dumps(meta, indent=1) + "\n").encode())


def load_meta(folder: str) -> dict | None:
    """Return the meta.json of a folder, or None if it has none. The keys that only this program needs
    may be missing. Raises UserError if the file cannot be read or is no meta.json."""
    path = os.path.join(folder, "meta.json")
    try:
        with open(path, encoding="utf-8") as f:
            meta = json.load(f)
        meta |= {"eot": -1, "source": "", "flags": {}} | meta
        lacks = {"encoding", "vocab_size", "complete", "shards"} - meta.keys()
        if lacks or any({"name", "tokens"} - shard.keys() for shard in meta["shards"]):
            raise ValueError("it lacks what every meta.json says")
        if not isinstance(meta["flags"], dict):
            raise ValueError(f"flags {meta['flags']}")
        # A folder that was only begun has no vocabulary yet.
        if not (meta["complete"] is False or 1 <= meta["vocab_size"] <= 2**16):
            raise ValueError(f"vocab_size {meta['vocab_size']}")
        return meta
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError, TypeError, AttributeError, RecursionError) as e:
        cure = "delete the folder and run prepare_fineweb.py again"
        raise UserError(f"cannot read {path} ({e}): {cure}") from None


def shard_name(index: int) -> str:
    return f"fineweb_{'train' if index else 'val'}_{index:06d}.bin"


def save_shard(out_dir: str, index: int, tokens: np.ndarray) -> dict:
    """Write tokens (n,) uint16 as shard `index`; returns its name, token count and sha256."""
    header = np.zeros(HEADER_INTS, dtype="<i4")
    header[:3] = MAGIC, VERSION, len(tokens)
    digest = hashlib.sha256()
    with whole_file(os.path.join(out_dir, shard_name(index))) as f:
        for part in (header, tokens.astype("<u2", copy=False)):
            f.write(part.data)
            digest.update(part.data)
    return {"name": shard_name(index), "tokens": len(tokens), "sha256": digest.hexdigest()}


# ---- the run ----------------------------------------------------------------------------------


def prepare(cfg: Config, meta: dict) -> None:
    """Tokenize the input into cfg.out_dir, going on where an earlier run was interrupted."""
    encoding = load_encoding(cfg.encoding)
    kind, paths, estimate = find_source(cfg, meta)
    meta |= {"vocab_size": encoding.n_vocab, "eot": encoding.eot_token}
    eot = encoding.eot_token
    lengths = np.zeros(encoding.n_vocab, dtype=np.int64)  # bytes of text in each token
    for piece in encoding.token_byte_values():
        lengths[encoding.encode_single_token(piece)] = len(piece)
    shards = meta["shards"]
    done = sum(shard["tokens"] for shard in shards)
    limit = cfg.max_tokens or sys.maxsize
    if shards:
        print(f"going on after {shards[-1]['name']}: {done:,} tokens are done")

    workers = cfg.workers or cores()
    # spawn on every platform: the same everywhere, and no lock or thread is inherited by a fork
    context = multiprocessing.get_context("spawn")
    with (
        ProcessPoolExecutor(workers, context, start_worker, (cfg.encoding,)) as pool,
        tempfile.TemporaryDirectory() as cache_dir,
        progress(done, cfg.max_tokens or estimate) as bar,
    ):
        for _ in range(workers):  # they start while this process imports datasets
            pool.submit(encode_batch, [""])
        with reading(meta["source"]):
            stream = open_stream(cfg, kind, paths, meta.get("revision"), cache_dir)
            position = go_on(stream, meta)
        save_meta(cfg.out_dir, meta)
        texts = read_texts(cfg, kind, iter(stream), meta["source"])
        batches = make_batches(texts, stream, position)

        # the first document is the last one begun: `at` of its tokens are in the shards already
        at = shards[-1]["cut"] if shards else 0
        shard = np.empty(max(cfg.val_tokens, cfg.shard_tokens), dtype=np.uint16)
        filled = documents = size = 0

        def finish_shard(cut: int) -> None:
            nonlocal filled, documents, size
            entry = save_shard(cfg.out_dir, len(shards), shard[:filled])
            shards.append(entry | {"documents": documents, "bytes": size, "cut": cut})
            filled = documents = size = 0

        for position, tokens in encode_in_order(pool, workers, batches):
            starts = np.flatnonzero(tokens == eot)  # ordinary encodings never hold this token
            while at < len(tokens) and done < limit:
                capacity = cfg.shard_tokens if shards else cfg.val_tokens
                n = min(len(tokens) - at, capacity - filled, limit - done)
                piece = tokens[at : at + n]
                shard[filled : filled + n] = piece
                filled, at, done = filled + n, at + n, done + n
                documents += int((piece == eot).sum())
                size += int(lengths[piece].sum())
                bar.update(n)
                if filled == capacity:
                    last = int(np.searchsorted(starts, at)) - 1  # the last document begun
                    finish_shard(cut=int(at - starts[last]))
                    first = {"documents": position["documents"] + last}
                    meta["resume"] = {"shards": len(shards), "position": position | first}
                    save_meta(cfg.out_dir, meta)
            at = 0
            if done == limit:
                break
        if filled:
            finish_shard(cut=0)
    if len(shards) < 2:
        for name in [*(shard["name"] for shard in shards), "meta.json"]:
            os.remove(os.path.join(cfg.out_dir, name))
        raise UserError(
            f"the input has only {done:,} tokens and --val_tokens={cfg.val_tokens} leaves no "
            f"training shard: set --val_tokens={max(1, done // 10)} or give more text"
        )
    meta.pop("resume", None)


def begin(cfg: Config) -> dict:
    """meta.json of cfg.out_dir without shards that are missing or cut, or a new one. Raises UserError
    for flags other than those that its shards were made with, and for shards of another run."""
    flags = {key: value for key, value in asdict(cfg).items() if key not in FREE_FLAGS}
    if cfg.pretokenized:
        flags = {"pretokenized": cfg.pretokenized}
    meta = load_meta(cfg.out_dir)
    there = [name for split in ("val", "train") for name in shard_names(cfg.out_dir, split)]
    if meta is None and there:
        raise UserError(f"{cfg.out_dir} has shards but no meta.json: take another --out_dir")
    shards = meta["shards"] if meta else []
    known = {shard["name"] for shard in shards} | {shard_name(len(shards))}
    if strange := [name for name in there if name not in known]:
        raise UserError(f"{cfg.out_dir}/{strange[0]} is not of this run: move it away")
    if not shards:  # perhaps a first try failed, and its flags are to be put right
        return {"encoding": cfg.encoding, "vocab_size": 0, "eot": 0, "source": "", "shards": [],
                "complete": False, "flags": flags}  # fmt: skip
    if flags.keys() != meta["flags"].keys():
        how = "--pretokenized" if cfg.pretokenized else "such flags"
        raise UserError(f"{cfg.out_dir} was not begun with {how}: take another --out_dir")
    for key, value in flags.items():
        old = meta["flags"][key]
        if old != value and not (key == "pretokenized" and old < value):  # more is welcome
            raise UserError(f"{cfg.out_dir} was begun with --{key}={old}, not --{key}={value}: "
                            "give the same flags, or another --out_dir")  # fmt: skip
    meta["complete"] &= meta["flags"] == flags
    meta["flags"] = flags
    listed = {shard["name"]: shard["tokens"] for shard in shards}
    for i, shard in enumerate(shards):
        try:
            check_shard(os.path.join(cfg.out_dir, shard["name"]), listed)
        except UserError as e:
            print(f"{e}: this run makes it and what follows again")
            for later in shards[i:]:
                with contextlib.suppress(FileNotFoundError):
                    os.remove(os.path.join(cfg.out_dir, later["name"]))
            meta["shards"], meta["complete"] = shards[:i], False
            break
    return meta


def cores() -> int:
    """The cores this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def progress(done: int, total: int, unit: str = "tok"):
    """A bar with tokens, tokens/s and time left; in a log file one line a minute at most."""
    from tqdm import tqdm

    interval = 0.5 if sys.stderr.isatty() else 60
    return tqdm(total=total or None, initial=done, unit=unit, unit_scale=True,
                mininterval=interval, maxinterval=interval, dynamic_ncols=True)  # fmt: skip


def print_table(out_dir: str, meta: dict) -> None:
    shards = meta["shards"]
    total = {key: sum(s.get(key) or 0 for s in shards) for key in ("documents", "tokens", "bytes")}
    lines = [f"{'shard':<26}{'documents':>12}{'tokens':>16}{'bytes/token':>13}"]
    for s in [*shards, {"name": f"{len(shards)} shards", **total}]:
        ratio = f"{s['bytes'] / s['tokens']:.3f}" if s.get("bytes") else "n/a"
        lines.append(f"{s['name']:<26}{s['documents']:>12,}{s['tokens']:>16,}{ratio:>13}")
    print("\n".join(lines if len(lines) <= 14 else [*lines[:11], "...", *lines[-2:]]))
    print(f"{out_dir} is complete: {meta['source']}, encoding {meta['encoding']}")


# ---- ready-made shards -----------------------------------------------------------------------


def download(cfg: Config, meta: dict) -> None:
    """Get the ready-made validation shard and training shards 1 to cfg.pretokenized."""
    from huggingface_hub import hf_hub_url

    meta |= {"encoding": "gpt2", "vocab_size": 50257, "eot": 50256, "source": PRETOKENIZED}
    for i in range(len(meta["shards"]), cfg.pretokenized + 1):
        name = shard_name(i)
        with whole_file(os.path.join(cfg.out_dir, name)) as f:
            fetch(hf_hub_url(PRETOKENIZED, name, repo_type="dataset"), f)
            f.flush()
            try:
                check_shard(f.name)
                found = scan_shard(f.name, meta["vocab_size"], meta["eot"])
            except UserError as e:
                raise UserError(f"{name} arrived damaged ({e}): run this again") from None
        # bytes of text per token would need the tokenizer, which shards do not
        meta["shards"].append({"name": name, **found, "bytes": None})
        save_meta(cfg.out_dir, meta)


def fetch(url: str, f: BinaryIO) -> None:
    """Download url into f, going on where a connection broke. hf_hub_download would try for ever where
    a server breaks off and cannot go on: any byte that comes resets its count. Here only getting
    further than ever before does."""
    import requests

    failures = furthest = 0
    with progress(0, 0, "B") as bar:
        while True:
            headers = {"Accept-Encoding": "identity"}  # or Range would count compressed bytes
            headers |= {"Range": f"bytes={f.tell()}-"} if f.tell() else {}
            try:
                with requests.get(url, headers=headers, stream=True, timeout=30) as response:
                    if response.status_code in (401, 403, 404):
                        raise UserError(f"the hub has no {url}: lower --pretokenized")
                    response.raise_for_status()
                    if response.status_code != 206:  # not the rest, but all of it
                        f.seek(0)
                        f.truncate()
                        bar.total = int(response.headers.get("Content-Length", 0)) or None
                    for chunk in response.iter_content(1 << 16):
                        f.write(chunk)
                        bar.update(f.tell() - bar.n)
                    if f.tell() < (bar.total or 0):
                        raise requests.ConnectionError(f"only {f.tell():,} of {bar.total:,} bytes")
                    return
            except requests.RequestException as e:
                failures = 1 if f.tell() > furthest else failures + 1
                furthest = max(furthest, f.tell())
                if failures == DOWNLOAD_ATTEMPTS:
                    raise UserError(f"cannot download {url} ({type(e).__name__}: {str(e)[:200]}): "
                                    "check the network, then run this again") from None  # fmt: skip
                time.sleep(RETRY_SECONDS * 2 ** (failures - 1))


# ---- shards -> batches ------------------------------------------------------------------------


class Shard(NamedTuple):
    path: str
    tokens: int


class Data(NamedTuple):
    train: list[Shard]
    val: list[Shard]
    encoding: str
    n_vocab: int  # of the encoding: token ids are below it
    source: str  # where the text comes from; empty if no meta.json says it


def shard_names(folder: str, split: str) -> list[str]:
    """The sorted names of a folder's shards of one split, "train" or "val"."""
    return sorted(glob.glob(f"*_{split}_*.bin", root_dir=folder))


def has_shards(data_dir: str) -> bool:
    """Whether a folder can be trained on: prepare_fineweb.py has finished it, or it has training
    shards without a meta.json."""
    meta = load_meta(data_dir)
    return bool(meta["complete"] if meta else shard_names(data_dir, "train"))


def check_shard(path: str, listed: dict[str, int] | None = None) -> Shard:
    """Check a shard's header against the file's size and, where there is a meta.json, against
    `listed`, its token counts by name. Raises UserError naming the shard and the cure."""
    again = "delete it and run prepare_fineweb.py again"
    try:
        size, header = os.path.getsize(path), np.fromfile(path, "<i4", HEADER_INTS)
    except OSError as e:
        raise UserError(f"{path}: cannot be read ({e.strerror}): {again}") from None
    if len(header) < HEADER_INTS or header[0] != MAGIC:
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
    if listed is not None and listed.get(os.path.basename(path)) != tokens:
        raise UserError(f"{path}: not the shard that meta.json lists (another encoding?): {again}")
    return Shard(path, tokens)


def find_shards(folder: str) -> tuple[dict, dict[str, list[Shard]], list[str]]:
    """Check the shards of a folder without reading their tokens. Returns meta.json (what is true of
    GPT-2's public shards if there is none), the sound shards of each split, and what is wrong."""
    make = f"make it with: python prepare_fineweb.py --out_dir={folder}"
    meta, listed, wrong = load_meta(folder), None, []
    if meta:
        listed = {shard["name"]: shard["tokens"] for shard in meta["shards"]}
    else:
        meta = {"encoding": "gpt2", "vocab_size": 50257, "eot": 50256, "source": "", "complete": True}
    if not meta["complete"]:
        wrong.append(f"{folder} is not finished: run its prepare_fineweb.py line again")
    splits: dict[str, list[Shard]] = {"train": [], "val": []}
    for split, shards in splits.items():
        names = shard_names(folder, split)
        if not names:
            others = sorted(glob.glob(f"*{split}*.bin", root_dir=folder))
            cure = f"rename {others[0]}, shards are named *_{split}_000001.bin" if others else make
            wrong.append(f"no {split} shards in {folder}: {cure}")
        for name in names:
            try:
                shards.append(check_shard(os.path.join(folder, name), listed))
            except UserError as e:
                wrong.append(str(e))
        if listed is not None:
            gone = [name for name in listed if f"_{split}_" in name and name not in names]
            wrong += [f"{folder} lacks {name}, which meta.json lists: {make}" for name in gone]
            continue
        numbered = [name for name in names if re.search(r"_\d+\.bin$", name)]
        cure = "a shard's name ends in its number, e.g. _000001.bin: rename it"
        wrong += [f"{os.path.join(folder, name)}: {cure}" for name in names if name not in numbered]
        sets = sorted({name.rsplit("_", 1)[0] for name in numbered})
        if len(sets) > 1:
            wrong.append(f"{folder} has shards of two sets, {sets[0]}_ and {sets[1]}_: move one away")
            continue
        numbers = sorted(int(name[:-4].rsplit("_", 1)[1]) for name in numbered)
        for before, after in itertools.pairwise(numbers):
            if after != before + 1:
                wrong.append(f"{folder} lacks {split} shard {before + 1}: {make}")
    return meta, splits, wrong


def open_data(data_dir: str, block_size: int) -> Data:
    """Find and check the shards of a folder. Raises UserError naming the first that is wrong."""
    meta, splits, wrong = find_shards(data_dir)
    if wrong:
        raise UserError(wrong[0])
    for split, shards in splits.items():
        if window_counts(shards, block_size).sum() < 1:
            raise UserError(
                f"the {split} shards of {data_dir} have no window of block_size + 1 = "
                f"{block_size + 1} tokens: lower --block_size or prepare more data"
            )
    return Data(splits["train"], splits["val"], meta["encoding"], meta["vocab_size"], meta["source"])


@functools.lru_cache(maxsize=32)
def permutation(n: int, *seed: int) -> np.ndarray:
    """A seeded permutation of range(n). RandomState's stream is frozen, unlike the newer Generator's."""
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
) -> np.ndarray:
    """Read the windows at `places`, (shard, window) pairs, and check their token ids: (n, block_size +
    1) int64. Raises UserError naming the shard. A read at an offset is used, as a shard that shrinks
    under a memory map would kill the process."""
    batch = np.empty((len(places), block_size + 1), np.int64)
    by_shard = sorted(range(len(places)), key=lambda row: places[row])
    for s, rows in itertools.groupby(by_shard, key=lambda row: places[row][0]):
        path = shards[s].path
        try:
            with open(path, "rb") as f:  # one shard open at a time: a batch may need thousands
                for row in rows:
                    window = places[row][1]
                    size, offset = 2 * (block_size + 1), HEADER_BYTES + 2 * block_size * window
                    raw = os.pread(f.fileno(), size, offset)
                    if len(raw) < size:
                        raise UserError(f"{path} shrank during the run: restore it, then resume")
                    batch[row] = np.frombuffer(raw, "<u2")
                    if (largest := batch[row].max()) >= n_vocab:
                        raise UserError(
                            f"{path}: token id {largest} in window {window}, but the encoding has ids "
                            f"below {n_vocab}: prepare this shard again"
                        )
        except OSError as e:
            raise UserError(
                f"{path}: cannot be read ({e.strerror}): restore it, then resume"
            ) from None
    return batch


# ---- checking ---------------------------------------------------------------------------------


def scan_shard(path: str, n_vocab: int, eot: int) -> dict:
    """Read a shard whole and return its "tokens", "documents" (how many tokens are eot) and "sha256".
    Raises UserError for the first token id that is not below n_vocab."""
    tokens = documents = 0
    with open(path, "rb") as f:
        digest = hashlib.sha256(f.read(HEADER_BYTES))
        while data := f.read(1 << 22):
            digest.update(data)
            ids = np.frombuffer(data, "<u2")
            if len(bad := np.flatnonzero(ids >= n_vocab)):
                where = f"{path}: token {tokens + bad[0]:,} is id {ids[bad[0]]}"
                raise UserError(f"{where}, the vocabulary has {n_vocab:,}: prepare it again")
            tokens += len(ids)
            documents += int((ids == eot).sum())
    return {"tokens": tokens, "documents": documents, "sha256": digest.hexdigest()}


def verify(folder: str) -> None:
    """Re-read every shard and check it against meta.json. Prints a line for each thing that is wrong
    and then raises UserError."""
    meta, splits, wrong = find_shards(folder)
    entries = {entry["name"]: entry for entry in meta.get("shards", [])}
    for shard in splits["val"] + splits["train"]:
        name = os.path.basename(shard.path)
        entry = entries.setdefault(name, {"name": name})
        try:
            for key, value in scan_shard(shard.path, meta["vocab_size"], meta["eot"]).items():
                if entry.setdefault(key, value) != value:
                    wrong.append(f"{shard.path}: {key} {value}, but meta.json says {entry[key]}")
        except (UserError, OSError) as e:
            wrong.append(str(e))
    if wrong:
        print("\n".join(wrong))
        raise UserError(f"{len(wrong)} things are wrong in {folder}, listed above")
    print_table(folder, meta | {"shards": list(entries.values())})


def main() -> None:
    cfg, given = configure(Config, sys.argv[1:])
    hub_only = {"dataset", "name", "split", "revision"}
    others = {mode: given - {mode, "out_dir"} for mode in ("verify", "pretokenized")}
    for mode, clash in {**others, "input": given & hub_only}.items():
        if getattr(cfg, mode) and clash:
            raise UserError(f"--{mode} does not go with --{min(clash)}: leave one of them out")
    if cfg.verify:
        return verify(cfg.verify)
    cfg.val_tokens = cfg.val_tokens or cfg.shard_tokens
    for name in ("shard_tokens", "val_tokens"):
        if not 1 <= getattr(cfg, name) < 2**31:
            raise UserError(f"--{name} must be from 1 to 2,147,483,647, the header's limit")
    for name in ("max_tokens", "workers", "pretokenized"):
        if getattr(cfg, name) < 0:
            raise UserError(f"--{name} must not be negative")
    if 0 < cfg.max_tokens <= cfg.val_tokens:
        raise UserError(f"--max_tokens={cfg.max_tokens} leaves nothing to train on after "
                        f"--val_tokens={cfg.val_tokens}: raise one or lower the other")  # fmt: skip
    try:
        import filelock

        os.makedirs(cfg.out_dir, exist_ok=True)
        with filelock.FileLock(os.path.join(cfg.out_dir, ".lock"), timeout=0):
            meta = begin(cfg)
            if meta["complete"]:
                return print(f"{cfg.out_dir} is finished already, nothing to do")
            (download if cfg.pretokenized else prepare)(cfg, meta)
            meta["complete"] = True
            save_meta(cfg.out_dir, meta)
            print_table(cfg.out_dir, meta)
    except ImportError as e:
        raise UserError(f"{e.name} is missing: pip install -r requirements.txt") from None
    except filelock.Timeout:
        raise UserError(f"another run is writing to {cfg.out_dir}: wait for it") from None
    except KeyboardInterrupt:
        raise UserError("stopped: run the same command again, it goes on from there") from None
    except OSError as e:
        raise UserError(f"cannot use {cfg.out_dir} ({e}): make room, then run the same command again, "
                        "or take another --out_dir") from None  # fmt: skip


if __name__ == "__main__":
    run(main)
