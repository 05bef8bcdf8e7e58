"""prepare_fineweb.py from outside: every byte of the shards against independent references."""

from __future__ import annotations

import errno
import gzip
import hashlib
import http.server
import io
import json
import multiprocessing
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import sysconfig
import threading
import time
from concurrent.futures import Future
from concurrent.futures.process import BrokenProcessPool, ProcessPoolExecutor
from pathlib import Path
from urllib.parse import unquote

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parent.parent
SHARED = ROOT.parent / "shared"
sys.path.insert(0, str(ROOT))

import prepare_fineweb  # noqa: E402
from configurator import UserError  # noqa: E402

# Everything that a text can be. JSON can carry lone surrogates, parquet cannot.
NASTY = [
    "plain words, and more of them", "", "x", " ", "\n\n\n", "a<|endoftext|>b", "<|endoftext|>",
    "lone \ud800 and \udfff", "a pair \ud83d\ude00 as two", "\U0001f600 é 日本語 \u2028 \x00 \x85",
    "carriage\r\nreturn\r", "2020-01-01", "  blanks   then\t\ttabs  ", "'s 've don't 12345", "",
    "word " * 300, "é" * 500, "\ufeffbom", "last",
]  # fmt: skip
DROP_SURROGATES = [t.encode("utf-16", "surrogatepass").decode("utf-16", "replace") for t in NASTY]


# ---- helpers ----------------------------------------------------------------------------------


def command(*flags: object) -> list[str]:
    return [sys.executable, str(ROOT / "prepare_fineweb.py"), *map(str, flags)]


def prep(*flags: object, env: dict | None = None, **kw):
    """Run the script in a process of its own."""
    env = {**os.environ, "PYTHONPATH": str(ROOT), **(env or {})}
    return subprocess.run(command(*flags), capture_output=True, text=True, env=env, timeout=120, **kw)


def fails(result: subprocess.CompletedProcess, *needles: str) -> None:
    """Exit code 1 and one line that says these things, no traceback."""
    assert result.returncode == 1, result.stdout + result.stderr
    lines = [re.split("\r", line)[-1] for line in result.stderr.splitlines()]
    errors = [line for line in lines if line.startswith("error: ")]
    assert len(errors) == 1, result.stderr
    assert lines[-1] == errors[0]
    assert "Traceback" not in result.stderr
    for needle in needles:
        assert needle in errors[0]


def works(result: subprocess.CompletedProcess) -> str:
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def in_process(monkeypatch, *flags: object) -> None:
    monkeypatch.setattr(sys, "argv", ["prepare_fineweb.py", *map(str, flags)])
    prepare_fineweb.main()


def shard_paths(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.bin"), key=lambda p: p.name.rsplit("_", 1)[1])


def files(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in folder.iterdir() if p.name != ".lock"}


def stream(folder: Path) -> list[int]:
    """All tokens of a folder, read by the format's definition and checked against meta.json."""
    tokens: list[int] = []
    meta = json.loads((folder / "meta.json").read_text())
    paths = shard_paths(folder)
    assert [s["name"] for s in meta["shards"]] == [p.name for p in paths]
    assert meta["complete"] is True
    for i, (path, entry) in enumerate(zip(paths, meta["shards"], strict=True)):
        assert path.name == f"fineweb_{'train' if i else 'val'}_{i:06d}.bin"
        data = path.read_bytes()
        header = [int.from_bytes(data[j : j + 4], "little") for j in range(0, 1024, 4)]
        count = (len(data) - 1024) // 2
        assert header == [20240520, 1, count] + [0] * 253
        here = [data[j] + 256 * data[j + 1] for j in range(1024, len(data), 2)]
        assert (entry["tokens"], entry["documents"]) == (count, here.count(meta["eot"]))
        assert entry["sha256"] == hashlib.sha256(data).hexdigest()
        tokens += here
    assert set(files(folder)) == {p.name for p in paths} | {"meta.json"}
    return tokens


def write_jsonl(path: Path, texts: list[str], key: str = "text") -> Path:
    """One object a line; other keys come, go and change type, and some lines are blank."""
    lines = [json.dumps({key: t, **({"extra": [i, {"a": i}, "s"][i % 3]} if i % 2 else {})}) + "\n"
             for i, t in enumerate(texts)]  # fmt: skip
    data = "\n".join(lines[:3]).encode() + "".join(lines[3:]).encode()
    opener = gzip.open if path.suffix == ".gz" else open
    if path.suffix == ".zst":
        data = pytest.importorskip("zstandard").ZstdCompressor().compress(data)
    with opener(path, "wb") as f:
        f.write(data)
    return path


def write_parquet(path: Path, texts: list[str], rows: int = 7, column: str = "text") -> Path:
    import pyarrow
    import pyarrow.parquet

    table = pyarrow.table({"id": list(range(len(texts))), column: texts})
    pyarrow.parquet.write_table(table, path, row_group_size=rows)
    return path


def bytes_stream(texts: list[str]) -> list[int]:
    """What the bytes encoding must give."""
    return [token for text in texts for token in (256, *text.encode())]


def llmc_files(documents: list[list[int]], shard_size: int) -> dict[str, bytes]:
    """
    The shards that llm.c's dev/data/fineweb.py writes for these tokenized documents, its loop kept
    (modded-nanogpt's is the same). It cannot carry a document over a whole shard.
    """
    out: dict[str, bytes] = {}

    def write_datafile(tokens: np.ndarray) -> None:
        header = np.zeros(256, dtype=np.int32)
        header[0], header[1], header[2] = 20240520, 1, len(tokens)
        split = "val" if len(out) == 0 else "train"
        name = f"fineweb_{split}_{len(out):06d}.bin"
        out[name] = header.tobytes() + np.array(tokens, dtype=np.uint16).tobytes()

    buffer, count = np.empty((shard_size,), dtype=np.uint16), 0
    for tokens in documents:
        if count + len(tokens) < shard_size:
            buffer[count : count + len(tokens)] = tokens
            count += len(tokens)
        else:
            remainder = shard_size - count
            buffer[count : count + remainder] = tokens[:remainder]
            write_datafile(buffer)
            buffer[0 : len(tokens) - remainder] = tokens[remainder:]
            count = len(tokens) - remainder
    if count != 0:
        write_datafile(buffer[:count])
    return out


@pytest.fixture
def gpt2(tmp_path, monkeypatch):
    """The real GPT-2 encoding, from a copy of the tokenizer files."""
    if not (SHARED / "tiktoken_cache").is_dir():
        pytest.skip("needs the GPT-2 tokenizer files of ../shared/tiktoken_cache")
    shutil.copytree(SHARED / "tiktoken_cache", tmp_path / "tiktoken")
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path / "tiktoken"))
    import tiktoken

    return tiktoken.get_encoding("gpt2")


def english(name: str) -> list[str]:
    path = SHARED / "data" / name
    if not path.is_file():
        pytest.skip(f"needs the text of ../shared/data/{name}")
    import pyarrow.parquet

    return pyarrow.parquet.read_table(path, columns=["text"])["text"].to_pylist()


def some_texts(seed: int, n: int, longest: int) -> list[str]:
    rng = random.Random(seed)
    words = ["law", "é", "日本", "the", "\n", "of", "12", "<|endoftext|>", "\U0001f600", "un-"]
    sizes = [rng.choice([0, 1, 5, longest // 4, longest]) for _ in range(n)]
    return [" ".join(rng.choices(words, k=rng.randint(0, size))) for size in sizes]


# ---- exact ------------------------------------------------------------------------------------


@pytest.mark.parametrize("workers, shard_tokens, val_tokens", [(1, 97, 5), (3, 1000, 300)])
def test_nasty_documents_bytes(tmp_path, workers, shard_tokens, val_tokens):
    """Every kind of text, documents over many shards, any number of workers: exact bytes."""
    write_jsonl(tmp_path / "a.jsonl", NASTY[:9])
    write_jsonl(tmp_path / "b.jsonl", NASTY[9:])
    out = tmp_path / "out"
    works(prep(f"--input={tmp_path}/*.jsonl", "--encoding=bytes", f"--out_dir={out}",
               f"--workers={workers}", f"--shard_tokens={shard_tokens}",
               f"--val_tokens={val_tokens}"))  # fmt: skip
    assert stream(out) == bytes_stream(DROP_SURROGATES)
    counts = [s["tokens"] for s in json.loads((out / "meta.json").read_text())["shards"]]
    assert counts[0] == val_tokens
    assert set(counts[1:-1]) <= {shard_tokens}
    assert counts[-1] <= shard_tokens


def test_shards_of_a_few_tokens(tmp_path, monkeypatch):
    write_jsonl(tmp_path / "a.jsonl", ["", "a", "", "bcdefghijkl", "", ""])
    for size in (1, 2, 5):
        out = tmp_path / f"out{size}"
        in_process(monkeypatch, f"--input={tmp_path}/a.jsonl", "--encoding=bytes", "--workers=1",
                   f"--out_dir={out}", f"--shard_tokens={size}")  # fmt: skip
        assert stream(out) == bytes_stream(["", "a", "", "bcdefghijkl", "", ""])


def test_nasty_documents_gpt2(tmp_path, gpt2):
    """GPT-2: token for token [50256] + encode_ordinary, with every kind of text."""
    write_jsonl(tmp_path / "a.jsonl", NASTY)
    out = tmp_path / "out"
    works(prep(f"--input={tmp_path}/a.jsonl", f"--out_dir={out}", "--shard_tokens=100",
               "--val_tokens=30", "--workers=2"))  # fmt: skip
    expected = [token for text in NASTY for token in (50256, *gpt2.encode_ordinary(text))]
    assert stream(out) == expected
    meta = json.loads((out / "meta.json").read_text())
    assert (meta["vocab_size"], meta["eot"], meta["encoding"]) == (50257, 50256, "gpt2")


def test_same_files_as_llmc(tmp_path, monkeypatch):
    """Shards are byte for byte llm.c's, also where a document ends exactly with a shard."""
    texts = some_texts(0, 40, 60) + ["y" * 99, "z" * 399]
    documents = [bytes_stream([t]) for t in texts]
    total = sum(map(len, documents[:20]))
    write_parquet(tmp_path / "a.parquet", texts)
    for i, size in enumerate([total, 500, sum(map(len, documents))]):
        out = tmp_path / f"out{i}"
        expected = llmc_files(documents, size)
        flags = [f"--input={tmp_path}/a.parquet", "--encoding=bytes", f"--out_dir={out}",
                 f"--shard_tokens={size}", "--workers=1"]  # fmt: skip
        if len(expected) == 1:
            with pytest.raises(UserError, match=f"--val_tokens={size // 10} "):
                in_process(monkeypatch, *flags)
            continue
        in_process(monkeypatch, *flags)
        made = files(out)
        made.pop("meta.json")
        assert made == expected


def test_max_tokens_cuts_the_stream(tmp_path, monkeypatch):
    """max_tokens is the length of the whole stream, validation included."""
    texts = some_texts(1, 30, 50)
    write_parquet(tmp_path / "a.parquet", texts)
    for limit in (31, 60, 65):
        out = tmp_path / f"out{limit}"
        in_process(monkeypatch, f"--input={tmp_path}/a.parquet", "--encoding=bytes", "--workers=1",
                   "--shard_tokens=30", f"--max_tokens={limit}", f"--out_dir={out}")  # fmt: skip
        assert stream(out) == bytes_stream(texts)[:limit]


def test_sources(tmp_path, monkeypatch):
    """parquet, jsonl, jsonl.gz, jsonl.zst, txt and py give the same documents in sorted order."""
    texts = DROP_SURROGATES
    for i, part in enumerate((texts[:8], texts[8:])):
        write_parquet(tmp_path / f"{i}.parquet", part)
        for end in ("jsonl", "jsonl.gz", "jsonl.zst"):
            write_jsonl(tmp_path / f"{i}.{end}", part, key="body [x]" if end == "jsonl" else "text")
    for i, text in enumerate(texts):  # odd names too
        (tmp_path / f"{i:02d} [a]*.txt").write_bytes(text.encode())
        (tmp_path / f"{i:02d}.py").write_bytes(text.encode())
    for end in ("parquet", "jsonl", "jsonl.gz", "jsonl.zst", "txt", "py"):
        out = tmp_path / f"out_{end}"
        flags = ["--text_column=body [x]"] if end == "jsonl" else []
        in_process(monkeypatch, f"--input={tmp_path}/*.{end}", "--encoding=bytes", "--workers=1",
                   "--shard_tokens=1000", f"--out_dir={out}", *flags)  # fmt: skip
        # At the start of a file, U+FEFF is a byte-order mark.
        expected = [text.removeprefix("\ufeff") for text in texts] if end in ("txt", "py") else texts
        assert stream(out) == bytes_stream(expected), end


def test_a_pattern_that_finds_a_file_twice(tmp_path, monkeypatch):
    """It is read once, or its text would be in the training and in the validation shards."""
    (tmp_path / "in" / "a").mkdir(parents=True)
    write_jsonl(tmp_path / "in" / "a" / "a.jsonl", DROP_SURROGATES)
    in_process(monkeypatch, f"--input={tmp_path}/**/**/*.jsonl", "--encoding=bytes", "--workers=1",
               "--shard_tokens=1000", f"--out_dir={tmp_path / 'out'}")  # fmt: skip
    assert stream(tmp_path / "out") == bytes_stream(DROP_SURROGATES)


def test_odd_columns(tmp_path, monkeypatch):
    """A column of string_view, whose name is also that of a struct's field."""
    import pyarrow
    import pyarrow.parquet

    table = {"a": [{"b": "no"}] * len(DROP_SURROGATES)}
    table["a.b"] = pyarrow.array(DROP_SURROGATES, pyarrow.string_view())
    pyarrow.parquet.write_table(pyarrow.table(table), tmp_path / "x.parquet")
    in_process(monkeypatch, f"--input={tmp_path}/x.parquet", "--encoding=bytes", "--text_column=a.b",
               "--workers=1", "--shard_tokens=1000", f"--out_dir={tmp_path / 'out'}")  # fmt: skip
    assert stream(tmp_path / "out") == bytes_stream(DROP_SURROGATES)


def test_invalid_utf8_is_replaced_and_said(tmp_path, monkeypatch, capsys):
    """A file of another encoding is named. One that has U+FFFD of its own is in UTF-8."""
    (tmp_path / "a.txt").write_bytes(b"ab\xff\xfe\xc3(\r\n")
    (tmp_path / "b.txt").write_bytes("\ufffd".encode())
    out = tmp_path / "out"
    in_process(monkeypatch, f"--input={tmp_path}/*.txt", "--encoding=bytes", f"--out_dir={out}",
               "--shard_tokens=3", "--workers=1")  # fmt: skip
    assert stream(out) == bytes_stream([b"ab\xff\xfe\xc3(\r\n".decode("utf-8", "replace"), "\ufffd"])
    printed = capsys.readouterr().out
    assert f"{tmp_path}/a.txt is not UTF-8" in printed
    assert "b.txt is" not in printed
    # jsonl, once a file
    (tmp_path / "a.jsonl").write_bytes(2 * b'{"text": "gr\xf6\xe2\x82er"}\n')
    (tmp_path / "b.jsonl").write_text('{"text": "gr\\u00f6ßer \ufffd"}\n', encoding="utf-8")
    in_process(monkeypatch, f"--input={tmp_path}/*.jsonl", "--encoding=bytes", f"--out_dir={out}2",
               "--shard_tokens=3", "--workers=1")  # fmt: skip
    assert stream(Path(f"{out}2")) == bytes_stream([*2 * ["gr\ufffd\ufffder"], "größer \ufffd"])
    printed = capsys.readouterr().out
    assert printed.count(f"{tmp_path}/a.jsonl is not UTF-8") == 1
    assert "b.jsonl is" not in printed


def test_text_files_with_separators_are_said(tmp_path, monkeypatch, capsys):
    """TinyStories' files have <|endoftext|> between stories: a file is one document all the same."""
    (tmp_path / "a.txt").write_text("one<|endoftext|>two<|endoftext|>three")
    (tmp_path / "b::c.txt").write_text("four")  # no URL
    out = tmp_path / "out"
    in_process(monkeypatch, f"--input={tmp_path}/*.txt", "--encoding=bytes", f"--out_dir={out}",
               "--shard_tokens=20", "--workers=1")  # fmt: skip
    assert stream(out) == bytes_stream(["one<|endoftext|>two<|endoftext|>three", "four"])
    printed = capsys.readouterr().out
    assert f"2 <|endoftext|> in {tmp_path}/a.txt stay plain text" in printed
    assert "c.txt" not in printed.partition("complete")[0]


def test_a_file_is_read_by_its_name_before_it_is_a_pattern(tmp_path):
    """[1] in a name matches a 1 only as a pattern."""
    (tmp_path / "x[1]").mkdir()
    for name in ("b[1].txt", "b1.txt", "x[1]/a.txt"):
        (tmp_path / name).write_text(name)
    for name in ("b[1].txt", "x[1]/a.txt"):
        assert prepare_fineweb.input_files(f"{tmp_path}/{name}") == [f"{tmp_path}/{name}"]
    assert prepare_fineweb.input_files(f"{tmp_path}/b[12].txt") == [f"{tmp_path}/b1.txt"]


def test_a_finished_folder_is_not_that_of_other_texts(tmp_path, monkeypatch, capsys):
    """The same command with a file more is an error; with the texts gone, all is well."""
    (tmp_path / "a.txt").write_text("some words " * 9)
    flags = [f"--input={tmp_path}/*.txt", "--encoding=bytes", f"--out_dir={tmp_path}/out"]
    flags += ["--val_tokens=9", "--workers=1"]
    in_process(monkeypatch, *flags)
    in_process(monkeypatch, *flags)
    (tmp_path / "b.txt").write_text("more")
    with pytest.raises(UserError, match="are not those"):
        in_process(monkeypatch, *flags)
    for name in "ab":
        (tmp_path / f"{name}.txt").unlink()
    in_process(monkeypatch, *flags)
    assert capsys.readouterr().out.count("finished already") == 2


def test_compressed_jsonl_is_the_plain_one(tmp_path, monkeypatch):
    """The same shards from .jsonl, .jsonl.gz and .jsonl.zst, also of several members or frames, with a
    byte-order mark, invalid bytes, carriage returns, line separators and no newline at the end."""
    zstandard = pytest.importorskip("zstandard")
    data = b'\xef\xbb\xbf{"text": "a\xff\xc3("}\r\n\n' + '{"text": "b\u2028c\x85"}\n'.encode()
    data += b'{"text": "last"}'
    half = len(data) // 2
    (tmp_path / "a.jsonl").write_bytes(data)
    for end, compress in (("gz", gzip.compress), ("zst", zstandard.ZstdCompressor().compress)):
        (tmp_path / f"a.jsonl.{end}").write_bytes(compress(data[:half]) + compress(data[half:]))
    for end in ("jsonl", "jsonl.gz", "jsonl.zst"):
        out = tmp_path / f"out_{end}"
        in_process(monkeypatch, f"--input={tmp_path}/a.{end}", "--encoding=bytes", "--workers=1",
                   "--shard_tokens=9", f"--out_dir={out}")  # fmt: skip
        assert stream(out) == bytes_stream(["a\ufffd\ufffd(", "b\u2028c\x85", "last"]), end


def test_stdlib(tmp_path):
    """The smoke run's data: the library's own sources in order, no tests, no packages, no cache."""
    out, home = tmp_path / "out", tmp_path / "home"
    home.mkdir()
    env = {"HOME": str(home), "HF_HOME": str(home / "hf")}
    printed = works(prep("--input=stdlib", "--encoding=bytes", f"--out_dir={out}",
                         "--val_tokens=100000", "--shard_tokens=1000000", "--max_tokens=2500000",
                         env=env))  # fmt: skip
    tokens = stream(out)
    assert len(tokens) == 2_500_000
    root = Path(sysconfig.get_path("stdlib"))
    at = 0
    for path in prepare_fineweb.input_files("stdlib"):
        part = bytes_stream([path_text(Path(path))])[: len(tokens) - at]
        assert tokens[at : at + len(part)] == part, path
        at += len(part)
        assert not {"test", "tests", "site-packages"} & set(Path(path).relative_to(root).parts)
    assert at == len(tokens)
    assert "2,500,000 tokens, encoding bytes, from the standard library of Python" in printed
    assert not any(home.iterdir())  # nothing is cached behind the user's back


def path_text(path: Path) -> str:
    return path.read_bytes().decode("utf-8", "replace")


def test_fineweb_token_counts(tmp_path, monkeypatch, gpt2):
    """FineWeb's own token_count agrees in 291 of these 300 rows, as its README says."""
    texts = english("fineweb_head.parquet")
    import pyarrow.parquet

    column = pyarrow.parquet.read_table(SHARED / "data/fineweb_head.parquet")["token_count"]
    out = tmp_path / "out"
    in_process(monkeypatch, f"--input={SHARED}/data/fineweb_head.parquet", f"--out_dir={out}",
               "--shard_tokens=50000", "--workers=1")  # fmt: skip
    tokens = stream(out)
    starts = [i for i, t in enumerate(tokens) if t == 50256] + [len(tokens)]
    counts = [b - a - 1 for a, b in zip(starts, starts[1:], strict=False)]
    assert len(counts) == len(texts) == 300
    assert sum(a == b for a, b in zip(counts, column.to_pylist(), strict=True)) == 291
    assert gpt2.decode(tokens[1 : starts[1]]) == texts[0]


@pytest.mark.slow
def test_novels(tmp_path, gpt2):
    """Documents of 280,000 tokens over many shards, against encode_ordinary."""
    texts = english("english_novels.parquet")
    out = tmp_path / "out"
    works(prep(f"--input={SHARED}/data/english_novels.parquet", f"--out_dir={out}",
               "--shard_tokens=100000"))  # fmt: skip
    data = b"".join(path.read_bytes()[1024:] for path in shard_paths(out))
    expected = np.concatenate([[50256, *gpt2.encode_ordinary(text)] for text in texts])
    np.testing.assert_array_equal(np.frombuffer(data, "<u2"), expected)


# ---- encodings --------------------------------------------------------------------------------


def test_bytes_encoding_is_the_bytes_in_linear_time():
    """30 MB in one line: exact, and no slower per byte than a small text."""
    encoding = prepare_fineweb.load_encoding("bytes")
    assert (encoding.n_vocab, encoding.eot_token, encoding.name) == (257, 256, "bytes")
    text = ("x" * 91 + "é日 \U0001f600") * 300_000
    start = time.process_time()
    tokens = prepare_fineweb.encode(encoding, text)
    assert time.process_time() - start < 30
    assert tokens.astype(np.uint8).tobytes() == text.encode()
    assert encoding.decode_bytes(tokens[:200].tolist()) == text.encode()[:200]


@pytest.mark.parametrize("blank", [" ", "\n", " \u3000\t"])
def test_a_document_that_tiktoken_gives_up_on(blank: str):
    """Its regex fails on a million blanks before a word. No character of the document is lost, and the
    text around them has the tokens that it has elsewhere. The encoding has GPT-2's pattern."""
    import tiktoken

    ranks = {bytes([i]): i for i in range(256)} | {b"so": 256, b"som": 257, b"some": 258, b" x": 259}
    words = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"""
    encoding = tiktoken.Encoding("t", pat_str=words, mergeable_ranks=ranks, special_tokens={})
    text = "some some x" + blank * 1_000_000 + "y some"
    tokens = prepare_fineweb.encode(encoding, text).tolist()
    assert encoding.decode(tokens) == text
    assert tokens[:4] == encoding.encode("some some x")[:4]
    assert tokens[-2:] == encoding.encode("y some")[-2:]


@pytest.mark.parametrize("text", ["a" * 10**6, " " * 10**6, "0!" * 500_000, "日" * 10**6])
def test_pathological_documents_do_not_hang(gpt2, text):
    start = time.process_time()
    tokens = prepare_fineweb.encode(gpt2, text)
    assert time.process_time() - start < 20
    assert gpt2.decode(tokens.tolist()) == text


# ---- interruptions ----------------------------------------------------------------------------


def truncate(folder: Path, shards: int) -> None:
    """The folder as a kill right after this many shards would have left it."""
    meta = json.loads((folder / "meta.json").read_text())
    for entry in meta["shards"][shards:]:
        (folder / entry["name"]).unlink()
    meta |= {"shards": meta["shards"][:shards], "complete": False}
    (folder / "meta.json").write_text(json.dumps(meta))


@pytest.mark.parametrize("end", ["parquet", "jsonl.gz", "txt"])
def test_resume_at_any_shard(tmp_path, monkeypatch, end):
    """From every kind of boundary (within a document, a batch, a row group, a file): identical files."""
    monkeypatch.setattr(os, "fsync", lambda fd: None)  # half of the time, and nothing here cuts power
    texts = some_texts(2, 90, 40)
    for i in range(3):
        part = texts[30 * i : 30 * i + 30]
        if end == "txt":
            for j, text in enumerate(part):
                (tmp_path / f"{i}{j:02d}.txt").write_bytes(text.encode())
        else:
            (write_parquet if end == "parquet" else write_jsonl)(tmp_path / f"{i}.{end}", part)
    flags = [f"--input={tmp_path}/*.{end}", "--encoding=bytes", "--shard_tokens=97", "--workers=1"]
    whole = tmp_path / "whole"
    in_process(monkeypatch, *flags, f"--out_dir={whole}")
    assert stream(whole) == bytes_stream(texts)
    expected = files(whole)
    count = len(expected) - 1
    for k in sorted(random.Random(3).sample(range(count), 6)):
        out = tmp_path / f"from{k}"
        shutil.copytree(whole, out)
        truncate(out, k)
        in_process(monkeypatch, *flags, f"--out_dir={out}")
        assert files(out) == expected, k


def wait_for(condition, process: subprocess.Popen, what: str) -> None:
    for _ in range(6000):
        if condition() or process.poll() is not None:
            return
        time.sleep(0.01)
    raise AssertionError(what)


def kill_and_resume(tmp_path: Path, kills: int, seed: int) -> None:
    """Kill -9 at random moments, from before the first shard on, until a run gets through."""
    psutil = pytest.importorskip("psutil")
    texts = some_texts(seed, 400, 400)
    for i in range(2):
        write_parquet(tmp_path / f"{i}.parquet", texts[200 * i : 200 * i + 200])
    flags = [f"--input={tmp_path}/*.parquet", "--encoding=bytes", "--shard_tokens=1999",
             "--val_tokens=501", "--workers=2"]  # fmt: skip
    works(prep(*flags, f"--out_dir={tmp_path}/whole"))
    expected = files(tmp_path / "whole")
    out, rng = tmp_path / "out", random.Random(seed)
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    total, first = len(expected) - 1, None

    def shards() -> int:
        return len(list(out.glob("*.bin"))) if out.is_dir() else 0

    for number in range(kills):
        target = total * number // kills
        process = subprocess.Popen(command(*flags, f"--out_dir={out}"), env=env,
                                   stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)  # fmt: skip
        wait_for(lambda target=target: shards() > target, process, "no shards come")
        time.sleep(rng.random() * 0.03)
        children = psutil.Process(process.pid).children() if process.poll() is None else []
        process.send_signal(signal.SIGKILL)
        _, err = process.communicate()
        assert process.returncode in (-9, 0), err.decode()
        # whatever has a final name is complete, and is what it will be in the end
        for path in out.glob("*.bin"):
            assert path.read_bytes() == expected[path.name]
        meta = json.loads((out / "meta.json").read_text())
        assert shards() == total or not meta["complete"]
        if first is None and meta["shards"]:  # one that is not listed yet is made again
            first = (out / "fineweb_val_000000.bin").stat().st_ino
        _, alive = psutil.wait_procs(children, timeout=20)
        # In a container whose process 1 reaps nobody they stay as zombies.
        assert all(c.status() == psutil.STATUS_ZOMBIE for c in alive), "workers outlive a killed parent"
    works(prep(*flags, f"--out_dir={out}"))
    assert (out / "fineweb_val_000000.bin").stat().st_ino == first  # it went on, not anew
    left = {name: data for name, data in files(out).items() if not name.endswith(".tmp")}
    assert left == expected
    assert set(files(out)) == set(expected)
    assert "finished already" in works(prep(*flags, f"--out_dir={out}"))
    assert files(out) == expected


def test_kill_and_resume(tmp_path):
    """Kill -9, run again: identical files, nothing half-written under a final name."""
    kill_and_resume(tmp_path, kills=3, seed=4)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(5))
def test_kill_and_resume_often(tmp_path, seed):
    kill_and_resume(tmp_path, kills=8, seed=10 + seed)


def test_begun_folders(tmp_path, monkeypatch):
    """Other flags or inputs on a begun folder are refused by name; free flags are not."""
    write_parquet(tmp_path / "a.parquet", some_texts(5, 40, 40))
    write_parquet(tmp_path / "other.parquet", some_texts(5, 40, 40))
    out = tmp_path / "out"
    base = {"input": f"{tmp_path}/a.parquet", "encoding": "bytes", "shard_tokens": 97,
            "out_dir": out, "workers": 1}  # fmt: skip

    def go(**changes):
        return in_process(monkeypatch, *(f"--{k}={v}" for k, v in {**base, **changes}.items()))

    go()
    before = files(out)
    others = {"input": f"{tmp_path}/other.parquet", "encoding": "gpt2", "shard_tokens": 98,
              "val_tokens": 96, "max_tokens": 500, "text_column": "id"}  # fmt: skip
    for begun in ("finished", "unfinished"):
        for key, value in others.items():
            with pytest.raises(UserError, match=f"begun with --{key}="):
                go(**{key: value})
        assert files(out) == before, begun
        truncate(out, 3)
        before = files(out)
    with pytest.raises(UserError, match="begun with --input=.*, not :.*another --out_dir"):
        in_process(monkeypatch, "--pretokenized=1", f"--out_dir={out}")
    write_parquet(tmp_path / "a.parquet", some_texts(6, 41, 40))
    with pytest.raises(UserError, match="not those that"):
        go()
    write_parquet(tmp_path / "a.parquet", some_texts(5, 40, 40))
    go(workers=2, val_tokens=97)  # its default, spelt out
    assert stream(out) == bytes_stream(some_texts(5, 40, 40))

    # a shard that went missing or was cut is made again, with what follows
    before = files(out)
    os.truncate(out / "fineweb_train_000003.bin", 1100)
    go()
    assert files(out) == before

    # a folder without a meta.json is never written to
    (out / "meta.json").unlink()
    with pytest.raises(UserError, match=r"has shards but no meta\.json"):
        go()


def test_two_runs_at_once(tmp_path, monkeypatch):
    """The second waits, and goes on once the first has ended."""
    write_parquet(tmp_path / "a.parquet", some_texts(5, 40, 40))
    out = tmp_path / "out"
    flags = [f"--input={tmp_path}/a.parquet", "--encoding=bytes", "--shard_tokens=97",
             f"--out_dir={out}", "--workers=1"]  # fmt: skip
    command = [sys.executable, "-u", prepare_fineweb.__file__, *flags]
    with prepare_fineweb.lock_folder(str(out)):
        second = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert "another run writes" in second.stdout.readline()
        assert os.listdir(out) == [".lock"]
    second.communicate(timeout=60)
    assert second.returncode == 0
    assert stream(out) == bytes_stream(some_texts(5, 40, 40))


@pytest.mark.parametrize("number", [errno.EINVAL, errno.ENOTSUP, errno.ENOLCK, errno.ENOSYS, errno.EIO])
def test_a_file_system_without_locks_and_folder_sync(tmp_path, monkeypatch, capsys, number):
    """The run goes on and says so once; another error of the same calls still ends it."""
    write_parquet(tmp_path / "a.parquet", some_texts(5, 40, 40))
    real_sync = os.fsync

    def no_folder_sync(fd: int) -> None:
        if os.path.isdir(f"/proc/self/fd/{fd}"):
            raise OSError(number, os.strerror(number))
        real_sync(fd)

    def no_lock(f: object, how: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fsync", no_folder_sync)
    if number != errno.EIO:
        monkeypatch.setattr("fcntl.flock", no_lock)
    flags = [f"--input={tmp_path}/a.parquet", "--encoding=bytes", "--shard_tokens=97",
             f"--out_dir={tmp_path}/out", "--workers=1"]  # fmt: skip
    if number == errno.EIO:
        with pytest.raises(UserError, match="cannot use .*Input/output error"):
            in_process(monkeypatch, *flags)
        return
    in_process(monkeypatch, *flags)
    assert stream(tmp_path / "out") == bytes_stream(some_texts(5, 40, 40))
    assert capsys.readouterr().out.count("without locks") == 1


def test_no_space_left(tmp_path):
    """A write that fails: one line, no half shard, complete ones kept, and it goes on later."""
    texts = some_texts(7, 60, 200)
    write_parquet(tmp_path / "a.parquet", texts)
    out = tmp_path / "out"
    flags = [f"--input={tmp_path}/a.parquet", "--encoding=bytes", "--shard_tokens=9000",
             "--val_tokens=2000", f"--out_dir={out}", "--workers=1"]  # fmt: skip

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (16_000, 16_000))

    fails(prep(*flags, preexec_fn=limit), "fineweb_train_000001.bin", "make room")
    assert set(files(out)) == {"fineweb_val_000000.bin", "meta.json"}
    assert "going on after fineweb_val_000000.bin" in works(prep(*flags))
    assert stream(out) == bytes_stream(texts)


# ---- errors -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def inputs(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("inputs")
    write_parquet(folder / "good.parquet", some_texts(8, 20, 40))
    data = (folder / "good.parquet").read_bytes()
    (folder / "header.parquet").write_bytes(b"not parquet")
    (folder / "body.parquet").write_bytes(data[:4] + b"\xff" * 200 + data[204:])
    write_jsonl(folder / "good.jsonl", ["a", "b"])
    (folder / "bad.jsonl").write_text('{"text": "a"}\n{"text": "b"\n')
    (folder / "list.jsonl").write_text('["a"]\n')
    (folder / "number.jsonl").write_text('{"text": 5}\n')
    (folder / "struct.jsonl").write_text('{"text": {"a": 1}}\n')
    for name in ("cut.jsonl.gz", "cut.jsonl.zst"):
        data = write_jsonl(folder / name, some_texts(8, 200, 40)).read_bytes()
        (folder / name).write_bytes(data[: len(data) // 2])
        (folder / f"empty.{name[4:]}").write_bytes(b"")
    (folder / "typed").mkdir()
    write_parquet(folder / "typed" / "0.parquet", some_texts(8, 20, 40))
    for kind, texts in (("struct", [{"x": "a"}]), ("list", [["a"]]), ("null", [None])):
        write_parquet(folder / "typed" / f"{kind}.parquet", texts)
    (folder / "what.csv").write_text("text\n")
    ext = folder / "plugin" / "tiktoken_ext"
    ext.mkdir(parents=True)
    (ext / "huge.py").write_text(
        "def huge():\n    ranks = {bytes([i]): i for i in range(256)}\n"
        "    ranks |= {(b'%05x' % i): i for i in range(256, 65_600)}\n"
        "    return dict(name='huge', pat_str='.+', mergeable_ranks=ranks,\n"
        "                special_tokens={'<|endoftext|>': 65_600})\n"
        "ENCODING_CONSTRUCTORS = {'huge': huge}\n"
    )
    return folder


ERRORS = {
    "no match": (["--input={d}/*.nothing"], ["matches no file"]),
    "unknown kind": (["--input={d}/what.csv"], ["what.csv", ".parquet"]),
    "parquet column": (["--input={d}/good.parquet", "--text_column=txt"], ["'txt'", "mean text?"]),
    "struct": (["--input={d}/typed/[0s]*.parquet"], ["struct.parquet", "holds struct<x: string>"]),
    "list": (["--input={d}/typed/[0l]*.parquet"], ["list.parquet", "holds list<", "--text_column"]),
    "null type": (["--input={d}/typed/[0n]*.parquet"], ["null.parquet", "holds null"]),
    "json struct": (["--input={d}/struct.jsonl"], ["struct.jsonl", "holds dict", "--text_column"]),
    "jsonl column": (["--input={d}/good.jsonl", "--text_column=txt"], ["'txt'", "mean text?"]),
    "not text": (["--input={d}/good.parquet", "--text_column=id"], ["holds int", "--text_column"]),
    "number": (["--input={d}/number.jsonl"], ["holds int", "--text_column"]),
    "parquet header": (["--input={d}/header.parquet"], ["header.parquet"]),
    "parquet body": (["--input={d}/body.parquet"], ["body.parquet"]),
    "bad json": (["--input={d}/bad.jsonl"], ["bad.jsonl", "not a JSON object", "b"]),
    "json list": (["--input={d}/list.jsonl"], ["not a JSON object"]),
    "cut gzip": (["--input={d}/cut.jsonl.gz"], ["cut.jsonl.gz", "Truncated", "take it out"]),
    "cut zstd": (["--input={d}/cut.jsonl.zst"], ["cut.jsonl.zst", "Truncated"]),
    "empty gzip": (["--input={d}/[eg]*.jsonl*"], ["empty.jsonl.gz", "it is empty"]),
    "empty zstd": (["--input={d}/empty.jsonl.zst"], ["empty.jsonl.zst", "take it out"]),
    "typo": (["--encoding=gpt22"], ["mean gpt2?", "bytes"]),
    "plugin": (["--encoding=huge", "--input={d}/good.parquet"], ["65,536"]),
    "no tokenizer": (["--encoding=r50k_base", "--input={d}/good.parquet"], ["TIKTOKEN_CACHE_DIR"]),
    "no hub": ([], ["HuggingFaceFW/fineweb", "network"]),
    "too short": (["--input={d}/good.parquet", "--val_tokens=9999999"], ["--val_tokens="]),
    "max below val": (["--max_tokens=5", "--val_tokens=5"], ["--max_tokens"]),
    "negative": (["--max_tokens=-5"], ["--max_tokens"]),
    "zero shard": (["--shard_tokens=0"], ["--shard_tokens"]),
    "header limit": (["--shard_tokens=2147483648"], ["--shard_tokens"]),
    "both": (["--input={d}/good.parquet", "--dataset=x"], ["--dataset"]),
    "empty input": (["--input="], ["--input is empty"]),
    "empty verify": (["--verify="], ["--verify is empty"]),
    "verify and": (["--verify=x", "--input=stdlib"], ["--input"]),
    "pretokenized and": (["--pretokenized=2", "--encoding=bytes"], ["--encoding"]),
    "no folder": (["--verify=/nowhere/at/all"], ["/nowhere/at/all", "wrong"]),
    "out_dir is a file": (["--input=stdlib", "--out_dir={d}/good.jsonl"], ["--out_dir"]),
}


@pytest.mark.parametrize("case", ERRORS)
def test_errors(tmp_path, monkeypatch, inputs, case):
    """Each is one line that says what to do, exit code 1, and leaves no shard behind."""
    flags, needles = ERRORS[case]
    flags = [flag.format(d=inputs) for flag in flags]
    for name, value in (("encoding", "bytes"), ("out_dir", tmp_path / "out"), ("workers", 1)):
        special = case in ("verify and", "pretokenized and", "no folder")
        if not special and not any(flag.startswith(f"--{name}=") for flag in flags):
            flags.append(f"--{name}={value}")
    if case in ("no match", "parquet body", "no hub", "no tokenizer", "plugin"):
        check = errors_outside
    else:
        check = errors_inside
    check(tmp_path, monkeypatch, inputs, flags, needles)
    assert not list(tmp_path.glob("**/*.bin*"))


def errors_inside(tmp_path, monkeypatch, inputs, flags, needles) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError) as caught:
        in_process(monkeypatch, *flags)
    for needle in needles:
        assert needle in str(caught.value)


def errors_outside(tmp_path, monkeypatch, inputs, flags, needles) -> None:
    dead = "http://127.0.0.1:9"  # no one listens on the discard port
    env = {"TIKTOKEN_CACHE_DIR": str(tmp_path / "cache"), "HF_ENDPOINT": dead,
           "HTTPS_PROXY": dead, "HTTP_PROXY": dead, "HF_HOME": str(tmp_path / "hf"),
           "https_proxy": dead, "http_proxy": dead, "NO_PROXY": "", "no_proxy": "",
           "PYTHONPATH": f"{ROOT}{os.pathsep}{inputs / 'plugin'}"}  # fmt: skip
    fails(prep(*flags, env=env, cwd=tmp_path), *needles)


def test_too_short_can_be_put_right(tmp_path, monkeypatch):
    """The folder of a failed first try does not stand in the way of the right flags."""
    write_parquet(tmp_path / "a.parquet", some_texts(8, 20, 40))
    flags = [f"--input={tmp_path}/a.parquet", "--encoding=bytes", "--workers=1",
             f"--out_dir={tmp_path}/out"]  # fmt: skip
    length = len(bytes_stream(some_texts(8, 20, 40)))
    with pytest.raises(UserError, match=f"only {length:,} tokens"):
        in_process(monkeypatch, *flags, f"--val_tokens={length}")
    in_process(monkeypatch, *flags, f"--val_tokens={length - 1}")
    assert stream(tmp_path / "out") == bytes_stream(some_texts(8, 20, 40))


def test_what_has_no_shard_yet_can_be_begun_with_other_flags(tmp_path, monkeypatch):
    write_jsonl(tmp_path / "a.jsonl", ["some", "texts"])
    flags = [f"--input={tmp_path}/a.jsonl", "--encoding=bytes", "--workers=1", "--val_tokens=5",
             f"--out_dir={tmp_path}/out"]  # fmt: skip
    with pytest.raises(UserError, match="set --text_column"):
        in_process(monkeypatch, *flags, "--text_column=txt")
    in_process(monkeypatch, *flags)
    assert stream(tmp_path / "out") == bytes_stream(["some", "texts"])


@pytest.mark.parametrize("package, end", [("tiktoken", "txt"), ("tqdm", "txt"), ("pyarrow", "jsonl.gz"),
                                          ("datasets", "")])  # fmt: skip
def test_package_missing(tmp_path, monkeypatch, package, end):
    """One line names the package, and only what an input needs is needed."""
    (tmp_path / "a.txt").write_text("some text")
    write_jsonl(tmp_path / "a.jsonl.gz", ["some text"])
    monkeypatch.setitem(sys.modules, package, None)
    source = [f"--input={tmp_path}/a.{end}"] if end else []
    with pytest.raises(UserError, match=rf"{package} is missing: pip install -r requirements\.txt"):
        in_process(monkeypatch, *source, "--encoding=bytes", "--workers=1", f"--out_dir={tmp_path}/out")


def test_help_and_import():
    """--help prints each flag's comment; importing costs no heavy library."""
    text = works(prep("--help"))
    for name in prepare_fineweb.Config.__dataclass_fields__:
        line = next(line for line in text.splitlines() if line.startswith(f"  --{name}="))
        assert re.search(r"\((str|int)\)\s+\w", line), line
    code = "import sys, prepare_fineweb; print({'datasets', 'tiktoken', 'torch'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.strip() == "set()"


# ---- verify -----------------------------------------------------------------------------------


def test_verify(tmp_path, monkeypatch, capsys):
    """It finds each kind of damage and names the file; a sound folder passes."""
    write_parquet(tmp_path / "a.parquet", some_texts(9, 60, 40))
    good = tmp_path / "good"
    in_process(monkeypatch, f"--input={tmp_path}/a.parquet", "--encoding=bytes",
               "--shard_tokens=400", f"--out_dir={good}", "--workers=1")  # fmt: skip
    monkeypatch.setenv("HOME", str(tmp_path))
    assert "is complete" in works(prep("--verify=~/good"))
    name = "fineweb_train_000002.bin"

    def damaged(edit) -> str:
        out = tmp_path / "bad"
        shutil.rmtree(out, ignore_errors=True)
        shutil.copytree(good, out)
        data = bytearray((out / name).read_bytes())
        edit(out, data)
        if (out / name).exists():
            (out / name).write_bytes(data)
        capsys.readouterr()
        with pytest.raises(UserError, match="wrong in"):
            in_process(monkeypatch, f"--verify={out}")
        return capsys.readouterr().out

    def edit_meta(out: Path, **changes) -> None:
        meta = json.loads((out / "meta.json").read_text())
        meta["shards"][2] |= changes
        (out / "meta.json").write_text(json.dumps(meta))

    def put(data: bytearray, at: int, value: bytes) -> None:
        data[at : at + len(value)] = value

    assert f"{name}: sha256" in damaged(lambda out, d: put(d, 1500, b"\x01"))
    assert f"{name}: sha256" in damaged(lambda out, d: put(d, 900, b"\x01"))  # in the header
    found = damaged(lambda out, d: put(d, 1024 + 2 * 300, b"\x01\x01"))
    assert f"{name}: token 300 is id 257" in found
    assert f"{name}: not a token shard" in damaged(lambda out, d: put(d, 0, b"\x00"))
    fewer = damaged(lambda out, d: put(d, 8, (399).to_bytes(4, "little")))
    assert "header says 399 tokens, the file holds 400.0" in fewer
    assert "header says 400 tokens, the file holds 399.5" in damaged(lambda out, d: d.pop())
    assert f"{name}: not a token shard" in damaged(lambda out, d: d.clear())
    missing = damaged(lambda out, d: (out / name).unlink())
    assert f"lacks {name}, which meta.json lists" in missing
    assert len(missing.splitlines()) == 1  # not its tokens and documents besides
    stray = damaged(lambda out, d: (out / "fineweb_train_000099.bin").write_bytes(b""))
    assert "000099.bin: not a token shard" in stray
    extra = damaged(lambda out, d: small_shard(out / "fineweb_train_000099.bin"))
    assert "000099.bin: not the shard that meta.json lists" in extra
    for key, value in {"documents": 0, "sha256": "0"}.items():
        found = damaged(lambda out, d, k=key, v=value: edit_meta(out, **{k: v}))
        assert f"{name}: {key}" in found
    assert f"{name}: not the shard" in damaged(lambda out, d: edit_meta(out, tokens=399))
    assert "is not finished" in damaged(lambda out, d: (truncate(out, 2), (out / name).touch()))

    # without meta.json it is GPT-2's vocabulary, and the numbers must have no gap
    (good / "meta.json").unlink()
    works(prep("--verify", good))
    data = bytearray((good / name).read_bytes())
    data[1026:1028] = (50257).to_bytes(2, "little")
    (good / name).write_bytes(data)
    assert f"{name}: token 1 is id 50257" in prep("--verify", good).stdout
    (good / name).unlink()
    result = prep("--verify", good)
    assert "lacks train shard 2" in result.stdout
    assert result.returncode == 1


def small_shard(path: Path) -> None:
    header = np.array([20240520, 1, 5] + [0] * 253, dtype="<i4")
    path.write_bytes(header.tobytes() + np.array([256, 1, 2, 256, 3], dtype="<u2").tobytes())


def test_verify_names_and_gaps_without_meta(tmp_path):
    """A name without a number is named with its cure, a gap of any size is one line, at once; two whole
    sets are told."""
    for name in ("x_val_000000.bin", "x_train_abc.bin", "x_train_000003.bin", "x_train_9999999999.bin"):
        small_shard(tmp_path / name)
    result = prep("--verify", tmp_path)
    fails(result, "2 things are wrong")
    assert "x_train_abc.bin is not named *_train_000001.bin: rename it" in result.stdout
    assert "lacks train shard 4" in result.stdout
    (tmp_path / "x_train_9999999999.bin").unlink()
    (tmp_path / "x_train_abc.bin").rename(tmp_path / "y_train_000003.bin")
    assert "two sets, x_train and y_train" in prep("--verify", tmp_path).stdout
    result = prep("--verify", tmp_path / "x_val_000000.bin")
    fails(result, "things are wrong")
    assert "no train shards" in result.stdout


def test_llmc_tiny_shakespeare_names_the_pattern(tmp_path):
    """llm.c's tiny_shakespeare_train.bin has no number: the error says how a shard is named."""
    small_shard(tmp_path / "tiny_shakespeare_train.bin")
    small_shard(tmp_path / "tiny_shakespeare_val.bin")
    with pytest.raises(UserError, match=r"tiny_shakespeare_train\.bin.*\*_train_000001\.bin"):
        prepare_fineweb.open_data(str(tmp_path), 2)
    for split in ("train", "val"):
        (tmp_path / f"tiny_shakespeare_{split}.bin").rename(tmp_path / f"tiny_{split}_000000.bin")
    assert prepare_fineweb.open_data(str(tmp_path), 2).train[0].tokens == 5


META = {"encoding": "bytes", "vocab_size": 257, "complete": True,
        "shards": [{"name": "x_train_000000.bin", "tokens": 5},
                   {"name": "x_val_000000.bin", "tokens": 5}]}  # fmt: skip


@pytest.mark.parametrize(
    "text",
    ["[]", '"x"', "{}", "[" * 100_000, '{"shards": 5}', json.dumps(META | {"shards": [5]}),
     json.dumps(META | {"shards": [{"name": "x_train_000000.bin"}]}),
     json.dumps(META | {"flags": None}),
     json.dumps({k: v for k, v in META.items() if k != "vocab_size"} | {"complete": False}),
     json.dumps({k: v for k, v in META.items() if k != "complete"})],
    ids=["list", "string", "empty", "deep", "no list", "number", "no count", "no flags",
         "no vocabulary", "not said whether complete"],
)  # fmt: skip
def test_meta_that_is_none(tmp_path, monkeypatch, text):
    """A meta.json that is JSON and no meta.json: one line with the cure, whatever was asked."""
    small_shard(tmp_path / "x_train_000000.bin")
    (tmp_path / "meta.json").write_text(text)
    for flags in (["--verify", tmp_path], ["--pretokenized=1", f"--out_dir={tmp_path}"],
                  ["--input=stdlib", "--encoding=bytes", f"--out_dir={tmp_path}"]):  # fmt: skip
        with pytest.raises(UserError, match=r"cannot read .*meta\.json .*delete"):
            in_process(monkeypatch, *flags)


def test_meta_of_another_program(tmp_path, monkeypatch):
    """What training needs is enough to verify; to go on with it is refused."""
    for shard in META["shards"]:
        small_shard(tmp_path / shard["name"])
    (tmp_path / "meta.json").write_text(json.dumps(META))
    assert "2 shards" in works(prep("--verify", tmp_path))
    for flags in (["--pretokenized=1"], ["--input=stdlib", "--encoding=bytes"]):
        with pytest.raises(UserError, match="begun with --.*take another --out_dir"):
            in_process(monkeypatch, *flags, f"--out_dir={tmp_path}")


def test_max_tokens_of_a_run_that_goes_on(tmp_path, monkeypatch):
    """They are those of the whole stream, shards that were there already included."""
    texts = some_texts(1, 30, 50)
    write_parquet(tmp_path / "a.parquet", texts)
    flags = [f"--input={tmp_path}/a.parquet", "--encoding=bytes", "--workers=1", "--shard_tokens=30",
             "--max_tokens=100", f"--out_dir={tmp_path / 'out'}"]  # fmt: skip
    for _ in range(2):
        in_process(monkeypatch, *flags)
        assert stream(tmp_path / "out") == bytes_stream(texts)[:100]
        truncate(tmp_path / "out", 2)


@pytest.mark.parametrize("end", ["parquet", "jsonl"])
def test_a_text_that_is_null(tmp_path, monkeypatch, end):
    """It is an empty document."""
    (write_parquet if end == "parquet" else write_jsonl)(tmp_path / f"a.{end}", ["a", None, "bcdefgh"])
    flags = ["--encoding=bytes", "--workers=1", "--val_tokens=5", f"--out_dir={tmp_path / 'out'}"]
    in_process(monkeypatch, f"--input={tmp_path}/a.{end}", *flags)
    assert stream(tmp_path / "out") == bytes_stream(["a", "", "bcdefgh"])


def test_a_worker_that_dies_is_one_line():
    """The kernel's out-of-memory killer, as a rule."""

    class Pool:
        def submit(self, *_):
            future = Future()
            future.set_exception(BrokenProcessPool("a process died"))
            return future

    with pytest.raises(UserError, match="fewer --workers"):
        list(prepare_fineweb.encode_in_order(Pool(), 1, iter(["text"])))


def test_ctrl_c_while_preparing(tmp_path, monkeypatch):
    """One line with the cure. A terminal sends it to the workers too, which leave it to their parent."""

    def interrupted(*_):
        raise KeyboardInterrupt

    (tmp_path / "a.txt").write_text("text")
    monkeypatch.setattr(prepare_fineweb, "read_texts", interrupted)
    flags = [f"--input={tmp_path}/a.txt", "--encoding=bytes", f"--out_dir={tmp_path}/out"]
    with pytest.raises(UserError, match="stopped: run the same command again, it goes on from there"):
        in_process(monkeypatch, *flags)
    spawn = multiprocessing.get_context("spawn")
    ready = {"initializer": prepare_fineweb.start_worker, "initargs": ("bytes",)}
    with ProcessPoolExecutor(1, spawn, **ready) as pool:
        (tokens,) = prepare_fineweb.encode_in_order(pool, 1, iter(["a"]))
        assert tokens.tolist() == [256, 97]
        blocked = pool.submit(signal.pthread_sigmask, signal.SIG_BLOCK, []).result(60)
    assert signal.SIGINT in blocked  # from the start on, also while it imports
    assert signal.SIGINT not in signal.pthread_sigmask(signal.SIG_BLOCK, [])


def test_an_id_that_is_just_too_large(tmp_path):
    """Ids end below the vocabulary's size. This shard has the id 256."""
    small_shard(tmp_path / "x_train_000001.bin")
    shards = [prepare_fineweb.check_shard(str(tmp_path / "x_train_000001.bin"))]
    with pytest.raises(UserError, match="token id 256 is not below the encoding's 256"):
        prepare_fineweb.read_windows(shards, [(0, 0)], 4, 256)
    assert prepare_fineweb.read_windows(shards, [(0, 0)], 4, 257).tolist() == [[256, 1, 2, 256, 3]]


# ---- reading ----------------------------------------------------------------------------------


def test_a_batch_over_more_shards_than_files_may_be_open(tmp_path):
    """Each window is right and in its place, although the process may open only 8 files more."""
    shards, expected = [], []
    for i in range(200):
        header = np.array([20240520, 1, 9] + [0] * 253, dtype="<i4")
        ids = np.arange(i, i + 9, dtype="<u2")
        path = tmp_path / f"x_train_{i:06d}.bin"
        path.write_bytes(header.tobytes() + ids.tobytes())
        shards.append(prepare_fineweb.check_shard(str(path)))
        expected += [[i, i + 1, i + 2], [i + 4, i + 5, i + 6]]
    places = [(i, window) for i in range(200) for window in (0, 2)]
    mixed = random.Random(0).sample(range(400), 400)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = max(map(int, os.listdir("/dev/fd"))) + 8
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))
    try:
        batch = prepare_fineweb.read_windows(shards, [places[i] for i in mixed], 2, 257)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert batch.dtype == np.int64
    assert batch.tolist() == [expected[i] for i in mixed]


def test_a_link_to_shards_may_move_during_a_run(tmp_path):
    """The run goes on with the shards that it began with, and not with others in their place."""
    for name, first in (("v1", 0), ("v2", 100)):
        (tmp_path / name).mkdir()
        for index in (0, 1):
            prepare_fineweb.save_shard(str(tmp_path / name), index, np.arange(first, first + 9))
    link = tmp_path / "current"
    link.symlink_to("v1")
    data = prepare_fineweb.open_data(str(link), 4)
    link.unlink()
    link.symlink_to("v2")
    assert prepare_fineweb.read_windows(data.train, [(0, 1)], 4, 50257).tolist() == [[4, 5, 6, 7, 8]]


def test_what_a_folder_says_of_itself(tmp_path, monkeypatch):
    """open_data and has_shards: encoding, vocabulary and source of a finished folder, of an unfinished
    one, of one without a meta.json and of an empty one."""
    write_jsonl(tmp_path / "a.jsonl", ["some", "texts", "more", "and more"])
    out = tmp_path / "out"
    assert not prepare_fineweb.has_shards(str(out))
    in_process(monkeypatch, f"--input={tmp_path}/a.jsonl", "--encoding=bytes", "--workers=1",
               "--val_tokens=9", f"--out_dir={out}")  # fmt: skip
    data = prepare_fineweb.open_data(str(out), 4)
    assert (data.encoding, data.n_vocab) == ("bytes", 257)
    assert data.source == f"{tmp_path}/a.jsonl (1 files)"
    assert [shard.tokens for shard in data.train + data.val] == [16, 9]
    assert prepare_fineweb.has_shards(str(out))
    truncate(out, 1)
    assert not prepare_fineweb.has_shards(str(out))
    (out / "meta.json").unlink()
    assert not prepare_fineweb.has_shards(str(out))  # validation alone is no data to train on
    small_shard(out / "fineweb_train_000001.bin")
    assert prepare_fineweb.has_shards(str(out))
    data = prepare_fineweb.open_data(str(out), 4)
    assert (data.encoding, data.n_vocab, data.source) == ("gpt2", 50257, "")


# ---- the network ------------------------------------------------------------------------------


SHA = "0123456789abcdef0123456789abcdef01234567"


class Hub(http.server.BaseHTTPRequestHandler):
    """As much of the hub as streaming a dataset and downloading its files needs."""

    protocol_version = "HTTP/1.1"
    files: dict[str, bytes]  # path -> content
    cut: int  # drop the connection after this many bytes of a .bin file (0: never)
    stuck = False  # never get beyond `cut`
    log: list[str]

    def log_message(self, *args) -> None:
        pass

    def answer(self, code: int, body: bytes = b"", **headers: str) -> None:
        self.send_response(code)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "HEAD":
            return
        if self.path.endswith(".bin") and 0 < self.cut < len(body):
            self.wfile.write(body[: self.cut])
            self.close_connection = True
            self.connection.close()
            return
        self.wfile.write(body)

    def do_GET(self) -> None:
        path, have = unquote(self.path.split("?")[0]), self.files
        self.log.append(f"{self.command} {path} {self.headers.get('Range')}")
        if found := re.match(r"/api/datasets/[^/]+/[^/]+/tree/[^/]+/?(.*)", path):
            base = found[1] + "/" if found[1] else ""
            names = [name for name in have if name.startswith(base)]
            folders = {base + name[len(base) :].rsplit("/", i)[0] for name in names
                       for i in range(1, 1 + name[len(base) :].count("/"))}  # fmt: skip
            rows = [{"type": "directory", "oid": SHA, "size": 0, "path": f} for f in folders]
            rows += [{"type": "file", "oid": hashlib.sha1(have[n]).hexdigest(), "path": n,
                      "size": len(have[n])} for n in names]  # fmt: skip
            if "recursive=true" not in self.path.lower():
                rows = [row for row in rows if "/" not in row["path"][len(base) :]]
            return self.answer(200 if names else 404, json.dumps(rows).encode())
        if found := re.match(r"/api/datasets/([^/]+/[^/]+)(/revision/.*)?$", path):
            info = {"id": found[1], "sha": SHA, "siblings": [{"rfilename": name} for name in have]}
            return self.answer(200, json.dumps(info).encode())
        found = re.match(r"/datasets/[^/]+/[^/]+/resolve/[^/]+/(.*)", path)
        if not found or found[1] not in have:
            return self.answer(404, X_Error_Code="EntryNotFound")
        body = have[found[1]]
        headers = {"ETag": f'"{hashlib.sha1(body).hexdigest()}"', "X_Repo_Commit": SHA}
        part = re.match(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or "")
        if part:
            start, stop = int(part[1]), min(int(part[2] or len(body)), len(body) - 1) + 1
            if self.stuck and path.endswith(".bin"):
                stop = start
            headers["Content_Range"] = f"bytes {start}-{stop - 1}/{len(body)}"
            return self.answer(206, body[start:stop], **headers)
        self.answer(200, body, **headers)

    do_HEAD = do_GET


@pytest.fixture
def hub(tmp_path):
    """Start a hub on loopback: hub(files, cut=...) -> (its class, environment)."""
    servers = []

    def start(have: dict[str, bytes], **settings):
        handler = type("H", (Hub,), {"files": have, "cut": 0, "log": [], **settings})
        server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        servers.append(server)
        env = {"HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}", "NO_PROXY": "127.0.0.1",
               "no_proxy": "127.0.0.1", "HF_HOME": str(tmp_path / "hf")}  # fmt: skip
        return handler, env

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def parquet_bytes(texts: list[str]) -> bytes:
    import pyarrow
    import pyarrow.parquet

    buffer = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.table({"text": texts}), buffer, row_group_size=11)
    return buffer.getvalue()


ONE_FOLDER = (b"---\nconfigs:\n- config_name: sample-10BT\n  data_files:\n  - split: train\n"
              b"    path: s/*\n---\n")  # fmt: skip


def test_the_commit_that_is_asked_for(tmp_path, hub):
    """--revision is what a new run asks the hub for. One that goes on asks for the commit that it began
    with, wherever the branch is by now."""
    texts = some_texts(11, 40, 40)
    handler, env = hub({"README.md": ONE_FOLDER, "s/0.parquet": parquet_bytes(texts)})
    out = tmp_path / "out"
    flags = ["--encoding=bytes", "--shard_tokens=97", "--workers=1", "--revision=v1", f"--out_dir={out}"]
    for revision in ("v1", SHA):
        handler.log.clear()
        works(prep(*flags, env=env))
        assert stream(out) == bytes_stream(texts)
        log = " ".join(handler.log)
        asked = re.findall(r"GET /api/datasets/HuggingFaceFW/fineweb(?:/revision)?(\S*) ", log)
        assert asked[0] == f"/{revision}"
        truncate(out, 2)


def test_a_split_that_is_not_there(tmp_path, hub):
    _, env = hub({"README.md": ONE_FOLDER, "s/0.parquet": parquet_bytes(["a"])})
    done = prep("--encoding=bytes", "--split=trian", f"--out_dir={tmp_path / 'out'}", env=env)
    assert done.returncode == 1
    assert "--split=trian: did you mean train?" in done.stderr.splitlines()[-1]


def test_streaming_from_the_hub(tmp_path, hub):
    """FineWeb's layout, streamed, pinned to a commit, interrupted and taken up again."""
    texts = some_texts(11, 600, 60)
    texts[20] = random.Random(0).randbytes(50_000).hex()  # more than is read with a footer
    readme = (b"---\nconfigs:\n- config_name: default\n  data_files:\n  - split: train\n"
              b"    path: data/*/*\n- config_name: sample-10BT\n  data_files:\n"
              b"  - split: train\n    path: sample/10BT/*\n---\n")  # fmt: skip
    have = {"README.md": readme, "data/CC-1/0.parquet": parquet_bytes(["other"] * 5)}
    have |= {f"sample/10BT/{i:03d}.parquet": parquet_bytes(part)
             for i, part in enumerate((texts[:50], texts[50:100], texts[100:]))}  # fmt: skip
    handler, env = hub(have)
    out = tmp_path / "out"
    flags = ["--encoding=bytes", "--shard_tokens=3000", f"--out_dir={out}", "--workers=1"]
    works(prep(*flags, env=env))
    assert stream(out) == bytes_stream(texts)
    expected = files(out)
    meta = json.loads(expected["meta.json"])
    assert meta["revision"] == SHA
    # killed in the last file
    shutil.rmtree(out)
    code = f"""
import os, signal, prepare_fineweb as p

def save(out_dir, meta, plain=p.save_meta):
    plain(out_dir, meta)
    if len(meta["shards"]) == {len(bytes_stream(texts[:100])) // 3000 + 3}:
        os.kill(os.getpid(), signal.SIGKILL)

p.save_meta = save
p.run(p.main)
"""
    env = {**os.environ, **env, "PYTHONPATH": str(ROOT)}
    killed = subprocess.run([sys.executable, "-c", code, *flags], env=env, capture_output=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert not json.loads((out / "meta.json").read_text())["complete"]
    handler.log.clear()
    works(prep(*flags, env=env))
    assert files(out) == expected
    asked = [line for line in handler.log if "GET" in line and "000.parquet" in line]
    ranges = [re.search(r"bytes=(\d+)-(\d+)", line) for line in asked]
    first = min((int(found[1]) for found in ranges), default=0)
    assert first > 0, asked  # its footer, and not its text again
    flags = ["--encoding=bytes", "--workers=1"]
    for wrong, needle in (("--name=sample-9BT", "sample-9BT"), ("--text_column=txt", "mean text?")):
        fails(prep(wrong, *flags, f"--out_dir={tmp_path}/{needle}", env=env), needle)


def ready_made(n: int, last: int = 700_000) -> dict[str, bytes]:
    """A validation shard and n training shards; the last one has `last` tokens."""
    rng = np.random.default_rng(0)
    have = {}
    for i in range(n + 1):
        header = np.zeros(256, dtype="<i4")
        header[:3] = 20240520, 1, last if i == n else 9_000 + i
        ids = rng.integers(0, 50257, header[2]).astype("<u2")
        name = f"fineweb_{'train' if i else 'val'}_{i:06d}.bin"
        have[name] = header.tobytes() + ids.tobytes()
    return have


def only_shards(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.glob("*.bin")}


def test_pretokenized(tmp_path, hub):
    """A download that breaks off in a file goes on from there, in the next run, too; more shards can be
    added later."""
    have = ready_made(2, last=13_000_000)
    handler, env = hub(have, cut=15_000_000, stuck=True)
    out = tmp_path / "out"
    fails(prep("--pretokenized=2", f"--out_dir={out}", env=env), "fineweb_train_000002.bin", "network")
    assert sorted(only_shards(out)) == sorted(have)[:1] + sorted(have)[2:]  # all but the last
    handler.stuck = False
    handler.log.clear()
    works(prep("--pretokenized=2", f"--out_dir={out}", env=env))
    starts = [int(re.search(r"bytes=(\d+)", line)[1]) for line in handler.log if "bytes=" in line]
    assert min(starts) >= 10_000_000
    assert only_shards(out) == have
    assert {path.name for path in out.iterdir()} == {*have, "meta.json", ".lock"}
    works(prep("--verify", out))

    handler.cut = 0
    handler.files.update(ready_made(3))
    handler.log.clear()
    works(prep("--pretokenized=3", f"--out_dir={out}", env=env))
    asked = {line.split()[1][-10:] for line in handler.log if "resolve" in line}
    assert asked == {"000003.bin"}
    assert "finished already" in works(prep("--pretokenized=3", f"--out_dir={out}", env=env))
    meta = json.loads((out / "meta.json").read_text())
    assert (meta["complete"], meta["vocab_size"], meta["eot"]) == (True, 50257, 50256)
    made = only_shards(out)
    assert [s["sha256"] for s in meta["shards"]] == [
        hashlib.sha256(made[s["name"]]).hexdigest() for s in meta["shards"]
    ]
    fails(prep("--pretokenized=5", f"--out_dir={out}", env=env), "000004.bin", "check the name")
    assert only_shards(out) == made


@pytest.mark.parametrize("how", ["id", "magic", "size"])
def test_pretokenized_that_cannot_be_had(tmp_path, hub, how):
    """A clear error, nothing half-written under a final name, sound shards kept."""
    have = ready_made(1)
    name = "fineweb_train_000001.bin"
    data = bytearray(have[name])
    if how == "id":
        data[5000:5002] = b"\xff\xff"
    if how == "magic":
        data[0] = 0
    if how == "size":
        del data[-2:]
    have[name] = bytes(data)
    handler, env = hub(have)
    out = tmp_path / "out"
    fails(prep("--pretokenized=1", f"--out_dir={out}", env=env), name, "delete it and run")
    assert only_shards(out) == {"fineweb_val_000000.bin": have["fineweb_val_000000.bin"]}
    if how == "size":  # it is right the next time
        handler.files[name] = bytes(data) + b"\0\0"
        (out / ".download" / name).unlink()
        works(prep("--pretokenized=1", f"--out_dir={out}", env=env))
        assert only_shards(out) == handler.files


# ---- large inputs -----------------------------------------------------------------------------


@pytest.mark.slow
def test_memory_does_not_grow_with_the_input(tmp_path):
    """Four times the text, the same peak (parent and workers) to 15%. With 20 MB of text the queues are
    not always full yet, so there are 40 at least."""
    texts = english("fineweb_legal.parquet")
    psutil = pytest.importorskip("psutil")
    peaks = []
    for copies in (2, 8):
        for i in range(copies):
            write_parquet(tmp_path / f"{copies}-{i}.parquet", texts, rows=500)
        flags = [f"--input={tmp_path}/{copies}-*.parquet", "--encoding=bytes", "--workers=2",
                 "--shard_tokens=2000000", f"--out_dir={tmp_path}/{copies}"]  # fmt: skip
        process = psutil.Popen(command(*flags), stderr=subprocess.DEVNULL)
        peak: dict[int, int] = {}
        while process.poll() is None:
            if not list(tmp_path.glob(f"{copies}/*.bin")):
                time.sleep(0.01)
                continue  # a child just forked still looks as large as its parent
            for p in (process, *process.children()):
                try:
                    peak[p.pid] = max(peak.get(p.pid, 0), p.memory_info().rss)
                except psutil.Error:
                    continue
            time.sleep(0.01)
        assert process.returncode == 0
        peaks.append((peak.pop(process.pid), max(peak.values())))
    print(peaks)
    for small, large in zip(*peaks, strict=True):
        assert large < 1.15 * small
