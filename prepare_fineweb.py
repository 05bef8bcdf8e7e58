"""
Text -> shards of uint16 tokens, in the format of llm.c and modded-nanogpt; shards -> batches.

    python prepare_fineweb.py                                   # FineWeb sample-10BT, streamed
    python prepare_fineweb.py --input='texts/*.parquet'         # or .jsonl, .txt, .py; also .gz, .zst
    python prepare_fineweb.py --input=stdlib --encoding=bytes   # offline: Python's own sources

A shard is 256 little-endian int32 of header (20240520, 1, number of tokens, zeros), then the
tokens. Every document is <|endoftext|> and then its ordinary encoding; documents run on across
shards. The stream's first val_tokens tokens are the validation shard, the rest training shards.

A run can be killed at any moment: the same command goes on from the last complete shard, to the same
bytes. It finds its place by parquet's footers (for all of FineWeb in hours), in jsonl by reading all.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import functools
import glob
import hashlib
import io
import itertools
import json
import multiprocessing
import os
import re
import shutil
import signal
import sys
import sysconfig
import threading
from collections import deque
from collections.abc import Iterator
from concurrent.futures.process import BrokenProcessPool, ProcessPoolExecutor
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, BinaryIO, NamedTuple, TextIO

import numpy as np

from configurator import UserError, configure, reason, run, suggest

if TYPE_CHECKING:
    import tiktoken

MAGIC, VERSION, HEADER_INTS = 20240520, 1, 256
HEADER_BYTES = 4 * HEADER_INTS
KINDS = {".parquet": "parquet", ".jsonl": "jsonl", ".json": "jsonl", ".txt": "text", ".py": "text"}
PRETOKENIZED = "kjj0/fineweb10B-gpt2"
GPT2 = {"encoding": "gpt2", "vocab_size": 50257, "eot": 50256}  # meta.json of ready-made shards
NOT_SUPPORTED = {errno.EINVAL, errno.ENOTSUP, errno.ENOLCK, errno.ENOSYS}  # to lock or sync a folder


@dataclass
class Config:
    input: str = ""  # glob of local parquet, jsonl, txt or py files (also .gz, .zst), or "stdlib"
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


# ---- text -> tokens ---------------------------------------------------------------------------


def load_encoding(name: str) -> tiktoken.Encoding:
    """Return the tiktoken encoding `name`; "bytes" is the 256 bytes and end-of-text = 256, made in
    memory. Raises UserError if it is unknown, cannot be had, or does not fit shards of uint16."""
    import tiktoken

    if name == "bytes":
        # The pattern takes up to 64 bytes: one at a time is slow, and so are merges in a long run.
        ranks = {bytes([i]): i for i in range(256)}
        return tiktoken.Encoding("bytes", pat_str=r"(?s:.{1,64})", mergeable_ranks=ranks,
                                 special_tokens={"<|endoftext|>": 256})  # fmt: skip
    known = ["bytes", *tiktoken.list_encoding_names()]
    if name not in known:
        raise UserError(f"unknown encoding {name!r}: {suggest(name, known)}")
    try:
        encoding = tiktoken.get_encoding(name)
    except (OSError, ValueError, AssertionError) as e:  # requests' errors are OSErrors
        cure = "set TIKTOKEN_CACHE_DIR to a folder that has it, or use --encoding=bytes"
        raise UserError(f"cannot download tokenizer {name!r} ({type(e).__name__}): {cure}") from None
    if encoding.n_vocab > 65_536:
        raise UserError(f"encoding {name!r} has more than 65,536 tokens, too many for uint16: use gpt2")
    return encoding


def encode(encoding: tiktoken.Encoding, text: str) -> np.ndarray:
    """Return the ordinary encoding of a text, (n,) uint32: "<|endoftext|>" in it is plain text."""
    try:
        return encoding.encode_to_numpy(text, allowed_special=set(), disallowed_special=())
    except UnicodeEncodeError:  # a lone surrogate becomes U+FFFD, as encode_ordinary has it
        return encode(encoding, text.encode("utf-16", "surrogatepass").decode("utf-16", "replace"))
    except ValueError as e:  # tiktoken's regex gives up on some 10^6 blanks before a word
        parts = re.findall(r"\s{1000}|(?:(?!\s{1000}).)+", text, re.DOTALL)
        if len(parts) == 1:
            raise UserError(f"cannot tokenize the document {text[:60]!r} ({e}): take it out") from None
        return np.concatenate([encode(encoding, part) for part in parts])


def start_worker(name: str) -> None:
    """Prepare a worker process: load the encoding, and end when the parent does, even by kill -9."""
    global worker_encoding
    parent = multiprocessing.parent_process()
    threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()
    worker_encoding = load_encoding(name)


def encode_batch(texts: list[str]) -> np.ndarray:
    """Return the tokens of these documents, (n,) uint16: each is end-of-text, then its encoding."""
    parts = [p for text in texts for p in ([worker_encoding.eot_token], encode(worker_encoding, text))]
    return np.concatenate(parts).astype(np.uint16)


def encode_in_order(pool, workers: int, texts: Iterator[str]) -> Iterator[np.ndarray]:
    """Yield the tokens of texts, some documents at a time and in order, few of them in flight."""

    def submit(batch: list[str]):
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])  # new workers never see a Ctrl-C
        future = pool.submit(encode_batch, batch)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGINT])
        return future

    futures = map(submit, iter(lambda: list(itertools.islice(texts, 16)), []))  # 16 documents each
    try:
        pending = deque(itertools.islice(futures, 4 * workers + 4))
        while pending:
            pending.extend(itertools.islice(futures, 1))
            yield pending.popleft().result()
    except BrokenProcessPool:
        raise UserError("a worker process died: run this again with fewer --workers") from None


# ---- sources ----------------------------------------------------------------------------------


def find_source(cfg: Config, meta: dict) -> list[str]:
    """Return the paths of the input's files, here or on the hub. Notes in meta what the input is, so
    that an interrupted run does not go on with another one; raises UserError if it would."""
    if not cfg.input:
        meta["revision"], paths = find_dataset(cfg, meta.get("revision") or cfg.revision or None)
        meta["source"] = f"{cfg.dataset} {cfg.name} {cfg.split} at {meta['revision']}"
        return paths
    paths = input_files(cfg.input)
    stdlib = f"the standard library of Python {sys.version.split()[0]}"
    meta["source"] = stdlib if cfg.input == "stdlib" else f"{cfg.input} ({len(paths)} files)"
    if not paths:
        raise UserError(f"--input={cfg.input!r} matches no file: quote it, write X/* for a folder X")
    for path in paths:  # all at once, and not after hours in the last file
        if path.endswith((".gz", ".zst")) and not os.path.getsize(path):
            raise UserError(f"cannot read {path} (it is empty): repair it or take it out")
        if kind_of(path) == "parquet":
            with open_input(path) as f:
                open_parquet(f, path, cfg.text_column)
    names_and_sizes = [(os.path.basename(path), os.path.getsize(path)) for path in paths]
    digest = hashlib.sha256(json.dumps(names_and_sizes).encode()).hexdigest()
    if meta.setdefault("input_digest", digest) != digest:
        raise UserError(f"the files of --input={cfg.input!r} are not those that {cfg.out_dir} was "
                        "begun with: put them back, or take another --out_dir")  # fmt: skip
    return paths


def find_dataset(cfg: Config, revision: str | None) -> tuple[str, list[str]]:
    """Return the commit that `revision` names in the hub's dataset, and the hf:// paths of its files.
    A run of days must not see a branch move, so it goes on with the commit that it began with."""
    import datasets
    from huggingface_hub import HfApi

    with reading(f"hf://datasets/{cfg.dataset}"):
        commit = HfApi().dataset_info(cfg.dataset, revision=revision, timeout=30).sha
        builder = datasets.load_dataset_builder(cfg.dataset, cfg.name or None, revision=commit)
    files = builder.config.data_files or {}
    if cfg.split not in files:
        raise UserError(f"{cfg.dataset} has no --split={cfg.split}: {suggest(cfg.split, list(files))}")
    return commit, list(files[cfg.split])


def input_files(pattern: str) -> list[str]:
    """The files of a glob, sorted; for "stdlib" Python's own sources, without packages and tests."""
    if pattern != "stdlib":
        pattern = os.path.expanduser(pattern)
        found = [pattern] if os.path.isfile(pattern) else glob.glob(pattern, recursive=True)
        return sorted({*filter(os.path.isfile, found)})
    skip = re.compile(r".*-packages|__pycache__|tests?|.*_tests?")
    paths = []
    for folder, folders, names in os.walk(sysconfig.get_path("stdlib")):
        folders[:] = [name for name in folders if not skip.fullmatch(name)]
        paths += [os.path.join(folder, name) for name in names if name.endswith(".py")]
    return sorted(paths, key=lambda path: path.split(os.sep))


def kind_of(path: str) -> str:
    """The kind of a file by its name: "parquet", "jsonl" or "text"."""
    if (extension := os.path.splitext(re.sub(r"\.(gz|zst)$", "", path))[1]) not in KINDS:
        raise UserError(f"cannot read {path}: its name must end in {', '.join(KINDS)} (or .gz, .zst)")
    return KINDS[extension]


@contextlib.contextmanager
def reading(what: str) -> Iterator[None]:
    """Turn whatever a library, the hub or the network raises into one line."""
    try:
        yield
    except (UserError, ImportError):
        raise
    except Exception as e:
        again = "check the name and the network, then run the same command again"
        cure = again if what.startswith("hf://") else "repair it or take it out"
        raise UserError(f"cannot read {what} ({type(e).__name__}: {reason(e)}): {cure}") from e


@contextlib.contextmanager
def open_input(path: str) -> Iterator[BinaryIO]:
    """Open a file, here or on the hub, to read its bytes; those of a .gz or .zst decompressed."""
    import fsspec

    with reading(path), fsspec.open(path, "rb") if "://" in path else open(path, "rb") as f:
        if path.endswith((".gz", ".zst")):
            import pyarrow  # its streams find a file that was cut, and read all frames of a .zst

            f = pyarrow.input_stream(f, compression="gzip" if path.endswith(".gz") else "zstd")
        yield f


def read_texts(paths: list[str], column: str, skip: int) -> Iterator[str]:
    """Yield the texts of all documents in these files but the first `skip`. A row of parquet is one (if
    null, an empty one), so is a line of jsonl that is not blank, and so is a whole text file."""
    for path in paths:
        with open_input(path) as f:
            if kind_of(path) == "parquet":
                file, first = open_parquet(f, path, column), 0
                n = file.num_row_groups
                while first < n and skip >= (rows := file.metadata.row_group(first).num_rows):
                    first, skip = first + 1, skip - rows  # without reading them
                batches = file.iter_batches(64, list(range(first, n)), [column])  # 64: a row may be 1 MB
                texts = (text for batch in batches for text in batch.column(column).to_pylist())
            elif kind_of(path) == "jsonl":
                texts = json_texts(f, path, column)
            else:
                raw = f.read()
                texts = [raw.decode("utf-8-sig", "replace")]  # carriage returns stay
                if "\ufffd" in texts[0] and "\ufffd".encode() not in raw:
                    print(f"warning: {path} is not UTF-8: its other bytes become U+FFFD", flush=True)
                if n := texts[0].count("<|endoftext|>"):
                    print(f"warning: {n} <|endoftext|> in {path} stay plain text: use jsonl", flush=True)
            for text in texts:
                if skip:
                    skip -= 1
                else:
                    yield text or ""


def open_parquet(f: BinaryIO, path: str, column: str):
    """Return a pyarrow ParquetFile. Raises UserError if its column does not hold text."""
    from pyarrow import parquet

    file = parquet.ParquetFile(f)
    schema = file.schema_arrow
    kind = str(schema.field(column).type) if column in schema.names else ""
    if not re.fullmatch(r"(large_)?string(_view)?|dictionary<values=(large_)?string,.*", kind):
        raise no_text(column, path, schema.names, kind)
    return file


def no_text(column: str, path: str, names: list[str], kind: str) -> UserError:
    what = f"holds {kind}, not text" if kind else "is missing"
    return UserError(f"column {column!r} of {path} {what}: set --text_column; {suggest(column, names)}")


def json_texts(f: BinaryIO, path: str, column: str) -> Iterator[str | None]:
    """Yield the text of each line of jsonl, without a byte-order mark."""
    lines, print_once = io.TextIOWrapper(f, "utf-8-sig", "surrogateescape", "\n"), functools.cache(print)
    for line in filter(str.strip, lines):
        if re.search("[\udc80-\udcff]", line):  # bytes that are not UTF-8
            line = line.encode(errors="surrogateescape").decode(errors="replace")
            print_once(f"warning: {path} is not UTF-8: its other bytes become U+FFFD", flush=True)
        try:
            row = json.loads(line)
            if not isinstance(row, dict):
                raise ValueError(f"a {type(row).__name__}")
        except (ValueError, RecursionError) as e:
            raise UserError(f"{path}: not a JSON object ({e}): put blanks over {line[:60]!r}") from None
        kind = type(row[column]).__name__ if column in row else ""
        if kind not in ("str", "NoneType"):
            raise no_text(column, path, list(row), kind)
        yield row[column]


# ---- files ------------------------------------------------------------------------------------


@contextlib.contextmanager
def whole_file(path: str) -> Iterator[BinaryIO]:
    """Open a file to write, which has its name only when it is complete and on disk."""
    try:
        with open(path + ".tmp", "wb") as f:
            yield f
            f.flush()
            os.fsync(f.fileno())
        os.replace(path + ".tmp", path)
        folder = os.open(os.path.dirname(path) or ".", os.O_RDONLY)  # the new name, too
        try:
            os.fsync(folder)
        except OSError as e:
            if e.errno not in NOT_SUPPORTED:
                raise
        finally:
            os.close(folder)
    except OSError as e:
        raise OSError(e.errno, e.strerror, path) from None
    finally:
        with contextlib.suppress(OSError):
            os.remove(path + ".tmp")


def lock_folder(folder: str, wait: bool = False) -> TextIO:
    """Make the folder and lock it, until the returned file is closed, against a second run that writes
    there. Where another has it, wait or raise UserError."""
    os.makedirs(folder, exist_ok=True)
    f = open(os.path.join(folder, ".lock"), "w")  # noqa: SIM115
    try:
        fcntl.flock(f, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        if not wait:
            raise UserError(f"another run writes to --out_dir={folder}: name another") from None
        print(f"another run writes to {folder}: waiting for it", flush=True)
        fcntl.flock(f, fcntl.LOCK_EX)
    except OSError as e:
        if e.errno not in NOT_SUPPORTED:
            raise
        print(f"{folder} is on a file system without locks: let only one run write there")
    return f


def save_meta(out_dir: str, meta: dict) -> None:
    with whole_file(os.path.join(out_dir, "meta.json")) as f:
        f.write((json.dumps(meta, indent=1, sort_keys=True) + "\n").encode())


def load_meta(folder: str) -> dict | None:
    """Return the meta.json of a folder, or None if it has none. Keys that only this program needs may
    be missing. Raises UserError if the file cannot be read or lacks what training needs."""
    path = os.path.join(folder, "meta.json")
    try:
        with open(path, encoding="utf-8") as f:
            meta = {"eot": -1, "source": "", "flags": {}} | json.load(f)
        valid = all({"name", "tokens"} <= shard.keys() for shard in meta["shards"])
        valid &= isinstance(meta["encoding"], str) and isinstance(meta["flags"], dict)
        if not valid or "complete" not in meta or not 1 <= meta["vocab_size"] <= 2**16:
            raise ValueError("its shards, encoding, flags or vocab_size are wrong")
        return meta
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as e:
        raise UserError(f"cannot read {path} ({e!r}): delete it, run prepare_fineweb.py again") from None


def shard_name(index: int) -> str:
    return f"fineweb_{'train' if index else 'val'}_{index:06d}.bin"


def save_shard(out_dir: str, index: int, tokens: np.ndarray) -> dict:
    """Write tokens (n,) uint16 as shard `index`. Returns its name, token count and sha256."""
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
    from tqdm import tqdm

    encoding, paths = load_encoding(cfg.encoding), find_source(cfg, meta)
    meta |= {"vocab_size": encoding.n_vocab, "eot": encoding.eot_token}
    save_meta(cfg.out_dir, meta)
    # The shards may end inside a document: go on after its first `cut` tokens.
    shards = meta["shards"]
    done, begun = (sum(shard[key] for shard in shards) for key in ("tokens", "documents"))
    cut = skip = shards[-1]["cut"] if shards else 0
    if shards:
        print(f"going on after {shards[-1]['name']}: {done:,} tokens are done")
    buffer, filled = np.empty(max(cfg.val_tokens, cfg.shard_tokens), dtype=np.uint16), 0

    def finish_shard() -> None:
        nonlocal filled, cut
        tokens = buffer[:filled]
        starts = np.flatnonzero(tokens == encoding.eot_token)  # a text never holds this token
        cut = filled - int(starts[-1]) if len(starts) else cut + filled
        shards.append(save_shard(cfg.out_dir, len(shards), tokens))
        shards[-1] |= {"documents": len(starts), "cut": cut}
        save_meta(cfg.out_dir, meta)
        filled = 0

    workers, limit = cfg.workers or cores(), cfg.max_tokens or sys.maxsize
    interval = 0.5 if sys.stderr.isatty() else 60  # seconds; a log file gets a line a minute
    total = cfg.max_tokens or (None if cfg.input or cfg.name != "sample-10BT" else 10**10)
    bar = tqdm(total=total, initial=done, unit="tok", unit_scale=True, mininterval=interval,
               maxinterval=interval, dynamic_ncols=True)  # fmt: skip
    context = multiprocessing.get_context("spawn")  # a fork would inherit locks and threads
    with ProcessPoolExecutor(workers, context, start_worker, (cfg.encoding,)) as pool, bar:
        texts = read_texts(paths, cfg.text_column, max(begun - 1, 0))
        for tokens in encode_in_order(pool, workers, texts):
            tokens, skip = tokens[skip : skip + limit - done], 0
            done += len(tokens)
            bar.update(len(tokens))
            while len(tokens):
                capacity = cfg.shard_tokens if shards else cfg.val_tokens
                piece = tokens[: capacity - filled]
                buffer[filled : filled + len(piece)] = piece
                filled, tokens = filled + len(piece), tokens[len(piece) :]
                if filled == capacity:
                    finish_shard()
            if done == limit:
                break
        if filled:
            finish_shard()
    if len(shards) < 2:
        for name in [*(shard["name"] for shard in shards), "meta.json"]:
            os.remove(os.path.join(cfg.out_dir, name))
        cure = f"set --val_tokens={max(1, done // 10)} or give more text"
        raise UserError(f"the input has only {done:,} tokens, all of them for validation: {cure}")


def begin(cfg: Config) -> dict:
    """Return a new meta.json, or that of cfg.out_dir without the shards from the first missing or cut
    one on. Raises UserError for shards of another run, and for other flags that would change them."""
    flags = {k: v for k, v in asdict(cfg).items() if k not in ("out_dir", "workers", "verify")}
    meta = load_meta(cfg.out_dir)
    if meta is None and glob.glob("*.bin", root_dir=cfg.out_dir):
        raise UserError(f"{cfg.out_dir} has shards but no meta.json: take another --out_dir")
    listed = {shard["name"]: shard["tokens"] for shard in meta["shards"]} if meta else {}
    if not listed:  # perhaps a first try failed, and its flags are to be put right
        return {"encoding": cfg.encoding, "shards": [], "complete": False, "flags": flags}
    old, meta["flags"] = meta["flags"], flags
    for key, value in flags.items():
        if key == "pretokenized" and 0 < old.get(key, 0) < value:
            meta["complete"] = False  # more of the ready-made shards are welcome
        elif key not in old or old[key] != value:
            raise UserError(f"{cfg.out_dir} was begun with --{key}={old.get(key)}, not {value}: give "
                            "the same flags, or take another --out_dir")  # fmt: skip
    for i, name in enumerate(listed):
        try:
            check_shard(os.path.join(cfg.out_dir, name), listed)
        except UserError as e:
            print(f"{str(e).rpartition(': ')[0]}: this run makes it and what follows again")
            return meta | {"shards": meta["shards"][:i], "complete": False}
    return meta


def cores() -> int:
    """The cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def print_summary(out_dir: str, meta: dict) -> None:
    documents, tokens = (sum(shard[key] for shard in meta["shards"]) for key in ("documents", "tokens"))
    print(f"{out_dir} is complete: {len(meta['shards'])} shards, {documents:,} documents, {tokens:,} "
          f"tokens, encoding {meta['encoding']}, from {meta['source'] or 'elsewhere'}")  # fmt: skip


def download(cfg: Config, meta: dict) -> None:
    """Get the ready-made validation shard and training shards 1 to cfg.pretokenized. What has arrived
    of a shard stays in a folder of its own, so that a download goes on where it broke off."""
    from huggingface_hub import hf_hub_download

    meta |= GPT2 | {"source": PRETOKENIZED}
    folder = os.path.join(cfg.out_dir, ".download")
    for i in range(len(meta["shards"]), cfg.pretokenized + 1):
        name = shard_name(i)
        with reading(f"hf://datasets/{PRETOKENIZED}/{name}"):
            path = hf_hub_download(PRETOKENIZED, name, repo_type="dataset", local_dir=folder)
        check_shard(path)
        meta["shards"].append({"name": name, **scan_shard(path, meta["vocab_size"], meta["eot"])})
        with open(path, "rb") as source, whole_file(os.path.join(cfg.out_dir, name)) as f:
            shutil.copyfileobj(source, f)
        os.remove(path)
        save_meta(cfg.out_dir, meta)
    shutil.rmtree(folder, ignore_errors=True)


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
    digest: str  # of the encoding and of the shards' entries in meta.json, sha256 included


def shard_names(folder: str, split: str) -> list[str]:
    """The sorted names of a folder's shards of one split, "train" or "val"."""
    names = glob.glob(f"*_{split}_*.bin", root_dir=folder)
    return sorted(name for name in names if re.search(r"_\d+\.bin$", name))


def has_shards(data_dir: str) -> bool:
    """Whether a folder has training shards, and prepare_fineweb.py is not still making them."""
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
        raise UserError(f"{path}: shard version {header[1]}, not {VERSION}: {again}")
    tokens, there = int(header[2]), (size - HEADER_BYTES) / 2
    if tokens < 1 or tokens != there:
        raise UserError(f"{path}: header says {tokens:,} tokens, the file holds {there:,.1f}: {again}")
    if listed is not None and listed.get(os.path.basename(path)) != tokens:
        raise UserError(f"{path}: not the shard that meta.json lists (another encoding?): {again}")
    return Shard(path, tokens)


def find_shards(folder: str) -> tuple[dict, dict[str, list[Shard]], list[str]]:
    """Check the shards of a folder without reading their tokens. Returns meta.json (GPT-2's if there is
    none), the sound shards of "train" and "val" by real paths, and a line for each wrong thing."""
    again = "run the prepare_fineweb.py command that made it again"
    meta, wrong, real = load_meta(folder), [], os.path.realpath(folder)
    listed = {shard["name"]: shard["tokens"] for shard in meta["shards"]} if meta else None
    meta = meta or GPT2 | {"source": "", "shards": [], "complete": True}
    if not meta["complete"]:
        wrong.append(f"{folder} is not finished: {again}")
    splits: dict[str, list[Shard]] = {"train": [], "val": []}
    for split, shards in splits.items():
        names = shard_names(folder, split)
        for name in names:
            try:
                shards.append(check_shard(os.path.join(real, name), listed))
            except UserError as e:
                wrong.append(str(e))
        others = sorted({*glob.glob(f"*_{split}[._]*bin", root_dir=folder)} - {*names})
        wrong += [f"{folder}/{name} is not named *_{split}_000001.bin: rename it" for name in others]
        if not names and not others:
            wrong.append(f"no {split} shards in {folder}: python prepare_fineweb.py --out_dir={folder}")
        gone = [name for name in listed or () if f"_{split}_" in name and name not in names]
        wrong += [f"{folder} lacks {name}, which meta.json lists: {again}" for name in gone]
        if len(sets := sorted({name.rsplit("_", 1)[0] for name in names})) > 1:
            wrong.append(f"{folder} has shards of two sets, {' and '.join(sets)}: move one away")
        numbers = sorted(int(re.findall(r"\d+", name)[-1]) for name in names)
        gaps = [a + 1 for a, b in itertools.pairwise(numbers) if b > a + 1 and not gone]
        wrong += [f"{folder} lacks {split} shard {number}: copy it there" for number in gaps]
    return meta, splits, wrong


def open_data(data_dir: str, block_size: int) -> Data:
    """Find and check the shards of a folder. Raises UserError naming the first that is wrong."""
    meta, splits, wrong = find_shards(data_dir)
    if wrong:
        raise UserError(wrong[0])
    for split, shards in splits.items():
        if window_counts(shards, block_size).sum() < 1:
            raise UserError(f"no {split} shard of {data_dir} has block_size + 1 = {block_size + 1} "
                            "tokens: lower --block_size or prepare more data")  # fmt: skip
    digest = hashlib.sha256(json.dumps([meta["encoding"], meta["shards"]]).encode()).hexdigest()
    return Data(*splits.values(), meta["encoding"], meta["vocab_size"], meta["source"], digest[:16])


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


def read_windows(shards: list[Shard], places: list, block_size: int, n_vocab: int) -> np.ndarray:
    """Read the windows at `places`, pairs of a shard's and a window's index, as (n, block_size + 1)
    int64 tokens. Raises UserError naming a shard that cannot be read or has an id of n_vocab or more.
    It uses pread because a shard that shrinks under a memory map kills the process."""
    batch = np.empty((len(places), block_size + 1), np.int64)
    by_shard = sorted(range(len(places)), key=lambda row: places[row])
    for s, rows in itertools.groupby(by_shard, key=lambda row: places[row][0]):
        path = shards[s].path
        try:
            with open(path, "rb") as f:  # one at a time: a batch may come from thousands of shards
                for row in rows:
                    start = HEADER_BYTES + 2 * block_size * places[row][1]
                    raw = os.pread(f.fileno(), 2 * (block_size + 1), start)
                    if len(raw) < 2 * (block_size + 1):
                        raise UserError(f"{path} shrank during the run: restore it, then resume")
                    batch[row] = np.frombuffer(raw, "<u2")
        except OSError as e:
            raise UserError(f"{path}: cannot be read ({e.strerror}): restore it, then resume") from None
    for row in np.flatnonzero(batch.max(axis=1) >= n_vocab):
        path, found = shards[places[row][0]].path, f"token id {batch[row].max()}"
        raise UserError(f"{path}: {found} is not below the encoding's {n_vocab}: prepare it again")
    return batch


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
                what = f"token {tokens + bad[0]:,} is id {ids[bad[0]]}, the vocabulary has {n_vocab:,}"
                raise UserError(f"{path}: {what}: delete it and run prepare_fineweb.py again")
            tokens += len(ids)
            documents += int((ids == eot).sum())
    return {"tokens": tokens, "documents": documents, "sha256": digest.hexdigest()}


def verify(folder: str) -> None:
    """Re-read every shard and check it against meta.json. Prints a line for each thing that is wrong
    and then raises UserError."""
    meta, splits, wrong = find_shards(folder)
    entries = {entry["name"]: entry for entry in meta["shards"]}
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
    print_summary(folder, meta | {"shards": list(entries.values())})


def main() -> None:
    cfg, given = configure(Config, sys.argv[1:])
    clashes = {mode: given - {mode, "out_dir"} for mode in ("verify", "pretokenized")}
    clashes["input"] = given & {"dataset", "name", "split", "revision"}
    for mode, clash in clashes.items():
        if mode in given and getattr(cfg, mode) == "":  # an unset $FILES, say: not all of FineWeb
            raise UserError(f"--{mode} is empty: give it a value, or leave it out")
        if getattr(cfg, mode) and clash:
            raise UserError(f"--{mode} does not go with --{min(clash)}: leave one of them out")
    if cfg.verify:
        return verify(os.path.expanduser(cfg.verify))
    cfg.val_tokens = cfg.val_tokens or cfg.shard_tokens
    limits = dict.fromkeys(("shard_tokens", "val_tokens"), range(1, 2**31))  # a header has int32
    limits |= dict.fromkeys(("max_tokens", "workers", "pretokenized"), range(2**63))
    for name, limit in limits.items():
        if getattr(cfg, name) not in limit:
            raise UserError(f"--{name} must be at least {limit.start} and below {limit.stop:,}")
    if 0 < cfg.max_tokens <= cfg.val_tokens:
        raise UserError("--max_tokens leaves nothing to train on after --val_tokens: raise it")
    try:
        with lock_folder(cfg.out_dir, wait=True):
            meta = begin(cfg)
            if meta["complete"]:
                if cfg.input and input_files(cfg.input):  # which may be gone by now
                    find_source(cfg, meta)
                return print(f"{cfg.out_dir} is finished already, nothing to do")
            (download if cfg.pretokenized else prepare)(cfg, meta)
            meta["complete"] = True
            save_meta(cfg.out_dir, meta)
            print_summary(cfg.out_dir, meta)
    except ImportError as e:
        raise UserError(f"{e.name} is missing: pip install -r requirements.txt") from None
    except KeyboardInterrupt:
        raise UserError("stopped: run the same command again, it goes on from there") from None
    except OSError as e:
        raise UserError(f"cannot use {cfg.out_dir} ({e}): make room or take another --out_dir") from None


if __name__ == "__main__":
    run(main)
