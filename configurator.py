"""
Config files and --key=value flags -> one typed dataclass.

    cfg, given = configure(Config, sys.argv[1:])

A command line is read from left to right and a later value wins:

    python train.py config/tiny.py --ffn=geglu --learning_rate 3e-4 --compile=False

`config/tiny.py` holds plain `name = literal` lines. It is parsed, never executed: nanoGPT's exec() of a
config file runs any code that is in it. A name that the dataclass does not have is an error.
"""

from __future__ import annotations

import ast
import contextlib
import dataclasses
import difflib
import inspect
import math
import os
import re
import signal
import sys
import time
import typing
from collections.abc import Callable, Collection, Iterator

T = typing.TypeVar("T")
PATIENCE = 10  # seconds for which a rank with an error waits for torchrun to end it


class UserError(ValueError):
    """An error that a user can cause. Its text is one line: what is wrong, then the cure."""


def reason(e: BaseException) -> str:
    """The first line of an exception's text, with the second if it ends in a colon; else its name."""
    lines = str(e).strip().splitlines() or [type(e).__name__]
    return " ".join(line.strip() for line in lines[: 2 if lines[0].endswith(":") else 1])[:200]


@contextlib.contextmanager
def user_error(what: str, cure: str, errors: type | tuple = Exception) -> Iterator[None]:
    """Turn an error of these types into a UserError: what went wrong, why, the cure."""
    try:
        yield
    except errors as e:
        raise UserError(f"{what} ({reason(e)}): {cure}") from None


def run(main: Callable[[], object]) -> None:
    """Call main(); a UserError becomes one line on stderr and exit code 1. Rank 0 prints it at once. The
    others wait for PATIENCE seconds: if all have the error, torchrun ends them meanwhile, and one that
    is alone with it prints it."""
    with contextlib.suppress(AttributeError):  # of a stdout that is no stream of bytes
        sys.stdout.reconfigure(errors="replace")  # a sample may have what a terminal cannot show
    try:
        main()
    except UserError as e:
        if os.environ.get("RANK", "0") != "0":
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            time.sleep(PATIENCE)
        sys.exit("error: " + " ".join(str(e).split()))
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:  # `python bench.py | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)


def print0(text: str) -> None:
    """Print on rank 0. A full disk or a terminal that was closed ends no run."""
    with contextlib.suppress(OSError):
        if os.environ.get("RANK", "0") == "0":
            print(text, flush=True)


def suggest(name: str, valid: Collection[str]) -> str:
    """The end of an error about an unknown name: the nearest valid one, and all of them."""
    near = difflib.get_close_matches(name, valid, n=1)
    return (f"did you mean {near[0]}? " if near else "") + f"valid: {', '.join(valid)}"


def configure(cls: type[T], argv: list[str], epilog: str = "") -> tuple[T, set[str]]:
    """Read argv (config file paths, --key=value, --key value, --flag) into the dataclass cls. Return the
    instance and the names that were given. Raises UserError; --help prints the fields and exits 0."""
    types = typing.get_type_hints(cls)
    sources: list[dict[str, object]] = [{}]  # config files, and the flags between them
    if "--help" in argv or "-h" in argv:
        print(usage(cls, epilog))
        sys.exit(0)
    rest = list(argv)
    while rest:
        arg = rest.pop(0)
        if not arg.startswith("-"):
            sources += [read_config_file(arg, types), {}]
            continue
        name, equals, text = arg[2:].partition("=")
        if not arg.startswith("--") or name not in types:
            raise UserError(f"unknown flag {arg!r}: {suggest(name, types)}")
        if not equals and types[name] is bool:
            text = rest.pop(0) if rest and rest[0].lower() in BOOLS else "true"
        elif not equals:
            if not rest or rest[0].startswith("--"):
                raise UserError(f"--{name} needs a value: --{name}=VALUE")
            text = rest.pop(0)
        sources[-1][name] = parse_value(f"--{name}", text, types[name])
    values, typed = {}, {name for source in sources[::2] for name in source}
    for source in sources:
        if "data_dir" in source and "prepare" in values.keys() - typed:
            values["prepare"] = ""  # a file's is not for another data_dir
        values.update(source)
    return cls(**values), set(values)


BOOLS = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}
KINDS = {bool: "True or False", int: "a whole number", float: "a number", str: "a string"}


def parse_value(name: str, text: str, kind: type) -> object:
    """The text of one flag as a value of its field's type."""
    if choices := {str(choice): choice for choice in typing.get_args(kind)}:  # of a Literal
        if text not in choices:
            raise UserError(f"{name}={text[:60]}: {suggest(text, choices)}")
        return choices[text]
    try:
        if kind is bool:
            return BOOLS[text.lower()]
        value = kind(text)
    except (ValueError, KeyError):
        raise UserError(f"{name} takes {KINDS[kind]}, not {text[:60]!r}") from None
    if kind is not str and not abs(value) < (2**63 if kind is int else math.inf):  # or nan
        raise UserError(f"{name} takes {KINDS[kind]}, finite and within 64 bits, not {text[:60]!r}")
    return os.path.expanduser(value) if name.endswith("_dir") else value  # shells leave --x=~/y alone


def read_config_file(path: str, types: dict[str, type]) -> dict[str, object]:
    """The `name = literal` lines of a config file, each checked against its field's type."""
    try:
        with open(path, encoding="utf-8-sig") as f:
            source = f.read()
        tree = ast.parse(source)
    except OSError as e:
        cure = "flags start with --, anything else is a config file"
        raise UserError(f"cannot read config file {path!r} ({e.strerror}): {cure}") from None
    except SyntaxError as e:
        raise UserError(f"{path}:{e.lineno or 1}: not a `name = literal` line ({e.msg})") from None
    except (ValueError, RecursionError, MemoryError) as e:  # NUL bytes, not UTF-8, ((((...
        raise UserError(f"{path}: not a text of `name = literal` lines ({e})") from None
    values: dict[str, object] = {}
    for node in tree.body:
        match node:
            case ast.Expr(value=ast.Constant(value=str())):  # a docstring
                continue
            case ast.Assign(targets=[ast.Name(id=name)]):
                pass
            case _:
                raise UserError(f"{path}:{node.lineno}: only `name = literal` lines, no code")
        where = f"{path}:{node.lineno}: {name}"
        if name not in types:
            raise UserError(f"{where} is not a flag: {suggest(name, types)}")
        kind = types[name]
        try:
            text = str(value := ast.literal_eval(node.value))  # fails for over 4300 digits
        except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError):
            what = KINDS.get(kind, "a string")
            raise UserError(f"{where} takes {what}, as a literal within 64 bits") from None
        if kind in KINDS and type(value) is not kind and (type(value), kind) != (int, float):
            raise UserError(f"{where} takes {KINDS[kind]}, not {value!r:.60}")
        values[name] = parse_value(where, text, kind)
    return values


def read_launcher() -> tuple[int, int, int]:
    """(rank, number of ranks, rank on this machine) by a launcher's environment; else (0, 1, 0)."""
    if "RANK" not in os.environ:
        return 0, 1, 0
    try:
        rank, world, local_rank = (int(os.environ[n]) for n in ("RANK", "WORLD_SIZE", "LOCAL_RANK"))
        if not (0 <= rank < world and os.environ["MASTER_ADDR"] and int(os.environ["MASTER_PORT"])):
            raise ValueError(f"RANK={rank} of WORLD_SIZE={world}")
        return rank, world, local_rank
    except (KeyError, ValueError) as e:
        names = "RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT"
        raise UserError(f"launcher: {reason(e)}: use torchrun, set {names}, or unset RANK") from None


def usage(cls: type, epilog: str) -> str:
    """The --help text: the module's docstring, then each field with type, default and comment."""
    source = "".join(inspect.getsource(c) for c in cls.__mro__ if dataclasses.is_dataclass(c))
    lines = [inspect.getdoc(inspect.getmodule(cls)) or "", "", "flags:"]
    for field in dataclasses.fields(cls):
        found = re.search(rf"^    {field.name}:[^#\n]*#\s*(.*)$", source, re.M)
        kind = typing.get_type_hints(cls)[field.name]
        choices = "|".join(map(str, typing.get_args(kind)))  # of a Literal
        head = f"  --{field.name}={field.default!r} ({choices or kind.__name__})"
        lines.append(f"{head:<44} {found[1] if found else ''}".rstrip())
    return "\n".join([*lines, "", epilog] if epilog else lines)
