"""configurator.py: good and bad lines, and random ones that must never run code or crash."""

# No `from __future__ import annotations` here: resolving string annotations would be an eval,
# and these tests watch that configure() evaluates nothing.
import encodings.utf_8_sig  # noqa: F401  (loaded on first use, which is no code of a config's)
import math
import os
import subprocess
import sys
import textwrap
import warnings
from dataclasses import dataclass
from pathlib import Path

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

import configurator
from configurator import UserError, configure, suggest

ROOT = Path(__file__).resolve().parent.parent


@dataclass
class Config:
    ffn: str = "swiglu"  # which FFN
    prompt: str = ""  # sample from this
    n_layer: int = 32  # layers
    max_iters: int = 400  # steps
    learning_rate: float = 6e-4  # peak
    compile: bool = True  # torch.compile
    eval_only: bool = False  # no training


FIELDS = {"ffn": str, "prompt": str, "n_layer": int, "max_iters": int}
FIELDS |= {"learning_rate": float, "compile": bool, "eval_only": bool}
DEFAULTS = vars(Config())


# -- command lines ---------------------------------------------------------------------------

GOOD_LINES = [
    ([], {}),
    (["--n_layer=4"], {"n_layer": 4}),
    (["--n_layer", "4"], {"n_layer": 4}),
    (["--n_layer=-4"], {"n_layer": -4}),
    (["--n_layer", "-4"], {"n_layer": -4}),
    (["--learning_rate=3e-4"], {"learning_rate": 3e-4}),
    (["--learning_rate", "-0.5"], {"learning_rate": -0.5}),
    (["--learning_rate=1"], {"learning_rate": 1.0}),
    (["--ffn=sparsegated:k=0.5:gate=False"], {"ffn": "sparsegated:k=0.5:gate=False"}),
    (["--ffn", "asg:threshold=neuron,swiglu"], {"ffn": "asg:threshold=neuron,swiglu"}),
    (["--ffn=1"], {"ffn": "1"}),
    (["--ffn=True"], {"ffn": "True"}),
    (["--ffn=None"], {"ffn": "None"}),
    (["--prompt="], {"prompt": ""}),
    (["--prompt", ""], {"prompt": ""}),
    (["--prompt=a = b --c"], {"prompt": "a = b --c"}),
    (["--prompt=--n_layer=4"], {"prompt": "--n_layer=4"}),
    (["--prompt", "-x"], {"prompt": "-x"}),
    (["--prompt='quoted'"], {"prompt": "'quoted'"}),
    (["--prompt=два\nlines"], {"prompt": "два\nlines"}),
    (["--compile=False"], {"compile": False}),
    (["--compile", "False"], {"compile": False}),
    (["--compile=false"], {"compile": False}),
    (["--compile=0"], {"compile": False}),
    (["--compile", "no"], {"compile": False}),
    (["--eval_only"], {"eval_only": True}),
    (["--eval_only=True"], {"eval_only": True}),
    (["--eval_only=1"], {"eval_only": True}),
    (["--eval_only", "--n_layer=2"], {"eval_only": True, "n_layer": 2}),
    (["--n_layer=2", "--eval_only"], {"eval_only": True, "n_layer": 2}),
    (["--n_layer=1", "--n_layer=2"], {"n_layer": 2}),
    (["--compile=False", "--compile"], {"compile": True}),
]


@pytest.mark.parametrize("argv, expected", GOOD_LINES, ids=lambda v: " ".join(v) or "none")
def test_good_command_lines(argv, expected):
    cfg, given_names = configure(Config, argv)
    assert vars(cfg) == DEFAULTS | expected
    assert all(type(getattr(cfg, name)) is kind for name, kind in FIELDS.items())
    assert given_names == set(expected)


# (arguments, what the one line must say)
BAD_LINES = [
    (["--n_layers=4"], ["--n_layers=4", "did you mean n_layer?"]),
    (["--learning-rate=1"], ["did you mean learning_rate?"]),
    (["--fnn", "swiglu"], ["did you mean ffn?"]),
    (["--zzzzzz=4"], ["--zzzzzz", *FIELDS]),
    (["--"], ["unknown flag", *FIELDS]),
    (["--=4"], ["unknown flag"]),
    (["-"], ["unknown flag"]),
    (["-n_layer=4"], ["unknown flag", "-n_layer"]),
    (["--N_LAYER=4"], ["unknown flag"]),
    (["--__class__=int"], ["unknown flag"]),
    (["--__init__", "1"], ["unknown flag"]),
    (["--n_layer"], ["--n_layer", "needs a value"]),
    (["--n_layer", "--ffn=geglu"], ["--n_layer", "needs a value"]),
    (["--n_layer=4.0"], ["--n_layer", "whole number", "4.0"]),
    (["--n_layer=1e3"], ["--n_layer", "whole number", "1e3"]),
    (["--n_layer=four"], ["--n_layer", "whole number", "four"]),
    (["--n_layer="], ["--n_layer", "whole number"]),
    (["--n_layer=True"], ["--n_layer", "whole number"]),
    (["--n_layer=2**3"], ["--n_layer", "whole number"]),
    (["--n_layer=9223372036854775808"], ["--n_layer", "64 bits"]),
    (["--n_layer=" + "9" * 5000], ["--n_layer", "whole number"]),
    (["--learning_rate=fast"], ["--learning_rate", "number", "fast"]),
    (["--learning_rate=nan"], ["--learning_rate", "finite", "nan"]),
    (["--learning_rate=-inf"], ["--learning_rate", "finite", "-inf"]),
    (["--learning_rate=1e999"], ["--learning_rate", "finite", "1e999"]),
    (["--compile=maybe"], ["--compile", "True or False", "maybe"]),
    (["--compile="], ["--compile", "True or False"]),
    (["--compile=2"], ["--compile", "True or False"]),
    (["--compile", "maybe"], ["'maybe'", "config file"]),
    (["swiglu"], ["'swiglu'", "config file", "--"]),
    (["n_layer=4"], ["'n_layer=4'", "--"]),
    ([""], ["config file"]),
    (["no\0pe"], ["name = literal"]),
    (["--n_layer=4", "nowhere/tiny.py"], ["'nowhere/tiny.py'", "No such file"]),
]


@pytest.mark.parametrize("argv, says", BAD_LINES, ids=lambda v: " ".join(v)[:40] or "none")
def test_bad_command_lines(argv, says):
    with pytest.raises(UserError) as e:
        configure(Config, argv)
    text = str(e.value)
    assert all(word in text for word in says), text
    assert "\n" not in text
    assert len(text) < 500


def test_a_directory_is_no_config_file(tmp_path):
    with pytest.raises(UserError, match="cannot read config file"):
        configure(Config, [str(tmp_path)])


# -- config files ----------------------------------------------------------------------------

GOOD_FILES = [
    ("", {}),
    ("# only a comment\n", {}),
    ('"""A docstring\nof two lines."""\nn_layer = 4\n', {"n_layer": 4}),
    ("n_layer = 4  # layers\nffn = 'geglu'\n", {"n_layer": 4, "ffn": "geglu"}),
    ("n_layer = -4", {"n_layer": -4}),
    ("n_layer = 1_000", {"n_layer": 1000}),
    ("learning_rate = 1", {"learning_rate": 1.0}),
    ("learning_rate = 10" + "0" * 29, {"learning_rate": 1e30}),
    ("learning_rate = -3e-4", {"learning_rate": -3e-4}),
    ("compile = False\neval_only = True", {"compile": False, "eval_only": True}),
    ("n_layer = 4; ffn = 'relu2'", {"n_layer": 4, "ffn": "relu2"}),
    ("prompt = 'a' \\\n  'b'", {"prompt": "ab"}),
    ("prompt = ('a'\n  'b')", {"prompt": "ab"}),
    ('prompt = """two\nlines"""', {"prompt": "two\nlines"}),
    ("prompt = '__import__(\"os\").abort()'", {"prompt": '__import__("os").abort()'}),
    ("n_layer = 4\nn_layer = 5", {"n_layer": 5}),
    ("n_layer = 4\r\nmax_iters = 5\r\n", {"n_layer": 4, "max_iters": 5}),
    ("\ufeffn_layer = 4\n", {"n_layer": 4}),
]


@pytest.mark.parametrize("text, expected", GOOD_FILES, ids=lambda v: repr(v)[:40])
def test_good_config_files(tmp_path, text, expected):
    path = tmp_path / "c.py"
    path.write_bytes(text.encode())
    cfg, given_names = configure(Config, [str(path)])
    assert vars(cfg) == DEFAULTS | expected
    assert all(type(getattr(cfg, name)) is kind for name, kind in FIELDS.items())
    assert given_names == set(expected)


# (text, line number in the message, what else it must say)
BAD_FILES = [
    ("n_layers = 4", 1, ["n_layers", "did you mean n_layer?"]),
    ("n_layer = 4\n\nlr = 4", 3, ["lr", *FIELDS]),
    ("n_layer = 4.0", 1, ["n_layer", "whole number", "4.0"]),
    ("n_layer = '4'", 1, ["n_layer", "whole number"]),
    ("n_layer = True", 1, ["n_layer", "whole number", "True"]),
    ("n_layer = None", 1, ["n_layer", "whole number"]),
    ("n_layer = 2**3", 1, ["n_layer", "literal"]),
    ("n_layer = 9223372036854775808", 1, ["n_layer", "64 bits"]),
    ("n_layer = 1j", 1, ["n_layer", "whole number"]),
    ("n_layer = 3 + 1j", 1, ["n_layer", "whole number"]),
    ("learning_rate = '1'", 1, ["learning_rate", "number"]),
    ("learning_rate = True", 1, ["learning_rate", "number"]),
    ("learning_rate = 1e999", 1, ["learning_rate", "finite"]),
    ("learning_rate = 1" + "0" * 400, 1, ["learning_rate", "number"]),
    ("learning_rate = float('nan')", 1, ["learning_rate", "literal"]),
    ("compile = 1", 1, ["compile", "True or False"]),
    ("compile = 'False'", 1, ["compile", "True or False"]),
    ("ffn = swiglu", 1, ["ffn", "literal"]),
    ("ffn = b'swiglu'", 1, ["ffn", "string"]),
    ("ffn = ['swiglu', 'geglu']", 1, ["ffn", "string"]),
    ("ffn = f'{1}'", 1, ["ffn", "literal"]),
    ("ffn = {[]}", 1, ["ffn", "literal"]),
    ("ffn = n_layer", 1, ["ffn", "literal"]),
    ("ffn = 'a' + 'b'", 1, ["ffn", "literal"]),
    ("ffn = 'a' if 1 else 'b'", 1, ["ffn", "literal"]),
    ("ffn = (lambda: 'a')()", 1, ["ffn", "literal"]),
    ("ffn = (x := 'a')", 1, ["ffn", "literal"]),
    ("n_layer: int = 4", 1, ["no code"]),
    ("n_layer += 4", 1, ["no code"]),
    ("n_layer = max_iters = 4", 1, ["no code"]),
    ("n_layer, max_iters = 4, 5", 1, ["no code"]),
    ("os.environ = 4", 1, ["no code"]),
    ("ffn['a'] = 4", 1, ["no code"]),
    ("n_layer = 4\nimport os", 2, ["no code"]),
    ("from os import *", 1, ["no code"]),
    ("print('hello')", 1, ["no code"]),
    ("if True:\n    n_layer = 4", 1, ["no code"]),
    ("def f(): pass", 1, ["no code"]),
    ("@print\nclass A: pass", None, ["no code"]),
    ("del n_layer", 1, ["no code"]),
    ("assert 0", 1, ["no code"]),
    ("42", 1, ["no code"]),
    ("f'{print(1)}'", 1, ["no code"]),
    ("n_layer 4", 1, ["name = literal"]),
    ("n_layer = ", 1, ["name = literal"]),
    ("\n\nn_layer = (4", 3, ["name = literal"]),
    ("--n_layer=4", 1, []),
    ("n_layer = 4\0", None, ["name = literal"]),
    ("__builtins__ = 4", 1, ["__builtins__"]),
    # Python's own limits: each of these once was, or could be, a traceback
    ("n_layer = " + "[" * 190 + "]" * 190, 1, ["n_layer", "whole number"]),
    ("n_layer = " + "(" * 5000, None, []),
    ("n_layer = " + "-" * 900 + "1", None, []),
    ("n_layer = " + "-" * 100000 + "1", None, []),
    ("n_layer = " + "1+" * 50000 + "1", None, []),
    ("n_layer = x" + ".x" * 50000, None, []),
    ("ffn = 0x" + "f" * 9000, 1, ["ffn", "string"]),
    ("n_layer = 0x" + "f" * 9000, 1, ["n_layer", "64 bits"]),
    ("learning_rate = 0x" + "f" * 9000, 1, ["learning_rate", "number"]),
    ("n_layer = " + "9" * 9000, None, []),
]


@pytest.mark.parametrize("text, line, says", BAD_FILES, ids=lambda v: repr(v)[:40])
def test_bad_config_files(tmp_path, text, line, says):
    path = tmp_path / "c.py"
    path.write_bytes(text.encode())
    with pytest.raises(UserError) as e:
        configure(Config, [str(path)])
    message = str(e.value)
    assert str(path) in message
    assert line is None or f"{path}:{line}:" in message
    assert all(word in message for word in says), message
    assert len(message) < len(str(path)) + 500


@pytest.mark.parametrize("data", [b"\xff\xfe\x00", b"n_layer = 4 # \xe9", bytes(range(256))])
def test_config_files_that_are_not_text(tmp_path, data):
    path = tmp_path / "c.py"
    path.write_bytes(data)
    with pytest.raises(UserError, match=str(path)):
        configure(Config, [str(path)])


def test_files_and_flags_are_read_from_left_to_right(tmp_path):
    """A later value wins, whichever of the two it comes from; names given twice count once."""
    a, b = tmp_path / "a.py", tmp_path / "b.py"
    a.write_text("n_layer = 1\nmax_iters = 1\nffn = 'relu2'")
    b.write_text("max_iters = 2")
    cfg, names = configure(Config, ["--n_layer=9", str(a), "--eval_only", str(b), "--ffn=geglu"])
    assert (cfg.n_layer, cfg.max_iters, cfg.ffn, cfg.eval_only) == (1, 2, "geglu", True)
    assert names == {"n_layer", "max_iters", "ffn", "eval_only"}
    cfg, _ = configure(Config, [str(a), "--n_layer=9"])
    assert cfg.n_layer == 9


def test_what_prepares_data_is_for_the_folder_beside_it(tmp_path):
    """Another folder, of another file or on the command line, is not filled with what it makes: a typing
    error must not train on other data."""

    @dataclass
    class WithData(Config):
        data_dir: str = "data"
        prepare: str = ""

    a, b = tmp_path / "a.py", tmp_path / "b.py"
    a.write_text("data_dir = 'made'\nprepare = '--input=stdlib'")
    b.write_text("data_dir = 'mine'")
    for argv, prepare in [
        ([str(a)], "--input=stdlib"),
        ([str(a), "--n_layer=9"], "--input=stdlib"),
        ([str(a), str(b)], ""),
        ([str(b), str(a)], "--input=stdlib"),
        ([str(a), "--data_dir=mine"], ""),
        ([str(a), "--prepare=x", "--data_dir=mine"], "x"),
        ([str(b), "--prepare", "x"], "x"),
        (["--prepare=x", str(a)], "--input=stdlib"),
        (["--prepare=x", str(b)], "x"),
    ]:
        assert configure(WithData, argv)[0].prepare == prepare, argv
    assert configure(WithData, ["--data_dir=mine"])[1] == {"data_dir"}


def test_a_value_that_equals_the_default_still_counts_as_given():
    """Resuming compares the flags that were given; a default spelled out is one of them."""
    assert configure(Config, ["--n_layer=32"])[1] == {"n_layer"}


def test_the_home_folder(tmp_path, monkeypatch):
    """A shell leaves the ~ of --out_dir=~/x as it is, and a folder named ~ is a trap. Other strings may
    begin with one."""

    @dataclass
    class Folders:
        out_dir: str = ""
        prompt: str = ""

    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "c.py").write_text("out_dir = '~/x'\nprompt = '~/x'\n")
    for argv in (["--out_dir=~/x", "--prompt=~/x"], [str(tmp_path / "c.py")]):
        cfg, _ = configure(Folders, argv)
        assert (cfg.out_dir, cfg.prompt) == (f"{tmp_path}/x", "~/x")


def test_calls_are_independent():
    """Nothing leaks from one call into the class or into the next call, argv stays as it was."""
    argv = ["--n_layer", "4"]
    configure(Config, argv)
    assert argv == ["--n_layer", "4"]
    assert configure(Config, [])[0] == Config()


def test_suggest_lists_everything_and_guesses_only_what_is_near():
    assert suggest("swiglo", ["geglu", "swiglu"]) == "did you mean swiglu? valid: geglu, swiglu"
    assert suggest("zzz", ["geglu", "swiglu"]) == "valid: geglu, swiglu"


# -- as a program ----------------------------------------------------------------------------

SCRIPT = '''
"""A program with three flags."""

import sys
from dataclasses import dataclass

from configurator import UserError, configure, run


@dataclass
class Config:
    ffn: str = "swiglu"  # which FFN, as name:option=value
    n_layer: int = 32  # layers
    learning_rate: float = 6e-4  # peak learning rate
    compile: bool = True


def main():
    cfg, given = configure(Config, sys.argv[1:])
    if cfg.n_layer < 0:
        raise UserError("n_layer must not be\\n  negative: use --n_layer=1")
    for _ in range(cfg.n_layer):
        print(cfg, sorted(given))


run(main)
'''


def program(tmp_path, *argv, **env):
    script = tmp_path / "program.py"
    script.write_text(SCRIPT)
    return subprocess.run(
        [sys.executable, str(script), *argv],
        capture_output=True,
        text=True,
        timeout=60,
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT)} | env,
    )


def test_help_prints_every_flag_with_type_default_and_comment(tmp_path):
    done = program(tmp_path, "--n_layer=4", "--help")
    assert done.returncode == 0
    assert done.stderr == ""
    out = [" ".join(line.split()) for line in done.stdout.splitlines()]
    assert "A program with three flags." in out
    assert "--ffn='swiglu' (str) which FFN, as name:option=value" in out
    assert "--n_layer=32 (int) layers" in out
    assert "--learning_rate=0.0006 (float) peak learning rate" in out
    assert "--compile=True (bool)" in out
    assert program(tmp_path, "-h").stdout == done.stdout


def test_a_good_line_runs(tmp_path):
    (tmp_path / "c.py").write_text("n_layer = 1\ncompile = False\n")
    done = program(tmp_path, "c.py", "--learning_rate", "1")
    expected = "Config(ffn='swiglu', n_layer=1, learning_rate=1.0, compile=False)"
    assert done.stdout == f"{expected} ['compile', 'learning_rate', 'n_layer']\n"
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("argv", [["--n_layer=-1"], ["--layers=4"], ["no\nfile"], ["--n_layer=x"]])
def test_a_bad_line_is_one_line_and_exit_code_1(tmp_path, argv):
    done = program(tmp_path, *argv)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1


def test_a_closed_pipe_is_no_traceback(tmp_path):
    """`python bench.py | head -1` ends quietly."""
    (tmp_path / "program.py").write_text(SCRIPT)
    line = f"'{sys.executable}' program.py --n_layer=100000 | head -1"
    done = subprocess.run(
        line,
        shell=True,
        capture_output=True,
        text=True,
        timeout=60,
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    assert (done.stdout.count("\n"), done.stderr) == (1, "")


def test_rank_0_prints_first(monkeypatch):
    """All ranks see the same bad flag; one line is enough, and it comes from rank 0. The others wait
    to be ended by torchrun, and print if they are not: an error of theirs alone must not be lost."""
    naps, signals = [], []
    monkeypatch.setattr(configurator.time, "sleep", naps.append)
    monkeypatch.setattr(configurator.signal, "signal", lambda *args: signals.append(args))

    def main():
        raise UserError("a bad flag")

    monkeypatch.setenv("RANK", "0")
    with pytest.raises(SystemExit, match="error: a bad flag"):
        configurator.run(main)
    assert not naps
    monkeypatch.setenv("RANK", "3")
    with pytest.raises(SystemExit, match="error: a bad flag"):
        configurator.run(main)
    assert naps[0] >= 5
    # main() may have left a handler that waits for the end of a step
    assert signals == [(configurator.signal.SIGTERM, configurator.signal.SIG_DFL)]


def test_an_interrupt_is_no_traceback():
    with pytest.raises(SystemExit) as e:
        configurator.run(lambda: (_ for _ in ()).throw(KeyboardInterrupt))
    assert e.value.code == 130


def test_other_exceptions_keep_their_traceback(monkeypatch):
    """A bug is not a user's error: run() must not swallow it."""
    with pytest.raises(ZeroDivisionError):
        configurator.run(lambda: 1 // 0)


# -- nothing is ever executed ----------------------------------------------------------------

watching: list[str] | None = None  # while a list: the audit events of running code, as text
RUNS_CODE = ("exec", "os.", "subprocess.", "pty.", "ctypes.", "socket.", "shutil.", "import")


def hook(event: str, args: tuple) -> None:
    if watching is not None and (
        event.startswith(RUNS_CODE) or (event == "open" and args[1] not in (None, "r", "rb"))
    ):
        watching.append(f"{event} {args!r:.200}")


sys.addaudithook(hook)  # never removed (Python has no way), but deaf unless `watching`


def watched(argv: list[str]):
    """configure(Config, argv) or the UserError it raised; no code may run meanwhile."""
    global watching
    watching = []
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # "\d" in a config file
            return configure(Config, argv)
    except UserError as e:
        return e
    finally:
        events, watching = watching, None
        assert events == []


def test_the_watch_sees_code_that_runs(tmp_path):
    """Against a test that can only pass: eval, exec, a shell and a file written are all seen."""
    global watching
    seen = []
    for act in (
        lambda: eval("1 + 1"),
        lambda: exec("x = 1"),
        lambda: os.system("true"),
        lambda: open(tmp_path / "x", "w").close(),
    ):
        watching = []
        act()
        watching, events = None, watching
        seen.append(len(events) > 0)
    assert all(seen)


def payloads(mark: Path) -> list[str]:
    shell = f"touch {mark}"
    return [
        f'__import__("os").system("{shell}")',
        f"exec('import os; os.system(\"{shell}\")')",
        f'eval(\'__import__("os").system("{shell}")\')',
        f"open({str(mark)!r}, 'w').close()",
        f"[c for c in ().__class__.__base__.__subclasses__()] or open({str(mark)!r}, 'w')",
        f"(lambda: open({str(mark)!r}, 'w'))()",
        f"f'{{open({str(mark)!r}, \"w\")}}'",
        f"$({shell})",
        f"`{shell}`",
        f"'; {shell}; '",
        f"!{shell}",
        f'!!python/object/apply:os.system ["{shell}"]',
        "cos\nsystem\n(S'" + shell + "'\ntR.",
    ]


FORMS = [  # where a payload may hide in a config file
    "{}",
    "n_layer = {}",
    "ffn = {}",
    "compile = {}",
    "n_layer: {} = 1",
    "ffn = [{}]",
    "ffn = {{{}: 1}}",
    "ffn = 'a' + {}",
    "ffn = -{}",
    "ffn = f'{{{}}}'",
    "@{}\nclass A: pass",
    "def f(a={}): pass",
    "class A:\n    x = {}",
    "assert {}",
    "for i in {}: pass",
    "n_layer = 1; {}",
    '"""{}"""',
    "# coding: unicode_escape\n# \\u000a{}",
    "if True:\n    {}",
]


def test_payloads_never_run(tmp_path):
    """Code in values, in names, in files and in file names is refused or kept as text."""
    mark = tmp_path / "mark"
    config = tmp_path / "c.py"
    for payload in payloads(mark):
        for line in (
            [payload],
            [f"--{payload}"],
            *([f"--{name}={payload}"] for name in FIELDS),
            *([f"--{name}", payload] for name in FIELDS),
        ):
            result = watched(line)
            kept = line[0].startswith(("--ffn", "--prompt"))
            assert kept != isinstance(result, UserError), line
            assert not kept or payload in vars(result[0]).values()
        for form in FORMS:
            config.write_text(form.format(payload))
            watched([str(config)])
    assert not mark.exists()


def test_a_payload_in_a_file_is_refused_by_a_program(tmp_path):
    """The same once from outside, in a process of its own and with no watch."""
    mark = tmp_path / "mark"
    lines = f"""\
        import os
        n_layer = 1
        ffn = __import__("os").system("touch {mark}")
        os.system("touch {mark}")
    """
    (tmp_path / "c.py").write_text(textwrap.dedent(lines))
    (tmp_path / "d.py").write_text(f'ffn = __import__("os").system("touch {mark}")\n')
    for argv in (["c.py"], ["d.py"], [f"--n_layer=__import__('os').system('touch {mark}')"]):
        done = program(tmp_path, *argv)
        assert (done.returncode, done.stdout, done.stderr.count("\n")) == (1, "", 1)
    assert not mark.exists()


# -- random lines and files ------------------------------------------------------------------

every_character = st.characters(exclude_categories=())  # lone surrogates too, as in sys.argv
texts = st.text(every_character, max_size=20)
names = st.one_of(
    st.sampled_from([*FIELDS]),
    st.sampled_from([*FIELDS]).map(lambda n: n[:-1]),
    st.sampled_from(["help", "h", "", "__class__", "__dict__", "-", "n-layer"]),
    st.text(max_size=8),
)
numbers = st.one_of(
    st.integers().map(str),
    st.floats().map(str),
    st.sampled_from(["1e999", "0x10", "1_0", "٣", "--1", "1" * 4301, "1" * 400, "nan", " 1 ", "½"]),
)
MARK = ROOT / "tests" / "executed-by-a-config"  # what the random payloads would create
planted = st.sampled_from(payloads(MARK))
values = st.one_of(st.sampled_from(["True", "false", "0", "", "no", "None"]), numbers, texts, planted)
flags = st.one_of(
    st.builds("--{}={}".format, names, values),
    st.builds("--{}".format, names),
    values,
    st.sampled_from(["-", "--", "--=", "-=", "---n_layer=1", "\0", ".", "/", "~"]),
)

literals = st.recursive(
    st.one_of(
        st.one_of(st.integers(), st.floats(), st.booleans(), st.none()).map(repr),
        st.one_of(st.text(max_size=8), st.binary(max_size=8), st.complex_numbers()).map(repr),
        st.integers(1, 5000).map(lambda n: "0x" + "f" * n),
        st.integers(1, 250).map(lambda n: "[" * n + "]" * n),
    ),
    lambda inner: st.one_of(
        st.builds("({}, {})".format, inner, inner),
        st.builds("[{}]".format, inner),
        st.builds("{{{}: {}}}".format, inner, inner),
        st.builds("{{{}}}".format, inner),
        st.builds("-{}".format, inner),
        st.builds("{} + {}".format, inner, inner),
        st.builds("print({})".format, inner),
        st.builds("f'{{{}}}'".format, inner),
        st.builds("lambda: {}".format, inner),
    ),
    max_leaves=4,
)
rows = st.one_of(
    st.builds("{} = {}".format, names, st.one_of(literals, values, planted)),
    st.builds("{}{} = {}".format, st.sampled_from([" ", "\t", "\f", "\ufeff"]), names, literals),
    st.builds("{}: {} = {}".format, names, names, literals),
    planted,
    texts,
    st.builds("{}{}".format, st.sampled_from(["if 1:", "#", '"""', "x = (", "\\", "match 1:"]), texts),
)
files = st.one_of(
    st.lists(rows, max_size=4).map("\n".join).map(lambda t: t.encode("utf-8", "surrogatepass")),
    st.binary(max_size=60),
)


def check_outcome(result) -> None:
    """Success with values of the declared types, or one UserError with something to say."""
    if isinstance(result, UserError):
        assert str(result).strip()
        str(result).encode("utf-8", "backslashreplace")  # what stderr does
        return
    cfg, given_names = result
    assert given_names <= set(FIELDS)
    for name, kind in FIELDS.items():
        value = getattr(cfg, name)
        assert type(value) is kind
        assert kind is str or math.isfinite(value)
        assert name in given_names or value == DEFAULTS[name]
    repr(cfg)  # a giant integer cannot be printed


fuzz = settings(
    max_examples=500,
    derandomize=True,  # the same lines in every run
    database=None,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)


@fuzz
@example(["--n_layer", "-h"])
@example(["--prompt", "\udcff"])
@given(argv=st.lists(flags, max_size=5))
def test_random_command_lines(argv):
    """500 random lines: success, a UserError, or --help; nothing else, and nothing runs."""
    if "--help" in argv or "-h" in argv:
        with pytest.raises(SystemExit) as e:
            configure(Config, argv)
        assert e.value.code == 0
        return
    check_outcome(watched(argv))
    assert not MARK.exists()


@fuzz
@given(data=files)
def test_random_config_files(tmp_path, data):
    """500 random files, near-valid and binary: as above."""
    path = tmp_path / "c.py"
    path.write_bytes(data)
    check_outcome(watched([str(path)]))
    assert not MARK.exists()


typed = st.one_of(
    st.tuples(st.sampled_from(["ffn", "prompt"]), st.text(max_size=12)),
    st.tuples(st.sampled_from(["n_layer", "max_iters"]), st.integers(1 - 2**63, 2**63 - 1)),
    st.tuples(
        st.just("learning_rate"),
        st.one_of(st.floats(allow_nan=False, allow_infinity=False), st.integers(-(10**30), 10**30)),
    ),
    st.tuples(st.sampled_from(["compile", "eval_only"]), st.booleans()),
)
styles = st.sampled_from(["--name=value", "--name value", "file"])


@settings(fuzz, max_examples=300)
@given(steps=st.lists(st.tuples(typed, styles), max_size=6))
def test_random_valid_settings_arrive_exactly(tmp_path, steps):
    """What is written is what is read, to the last bit, and the last one wins."""
    argv, expected = [], dict(DEFAULTS)
    for i, ((name, value), style) in enumerate(steps):
        if style == "file":
            path = tmp_path / f"{i}.py"
            path.write_bytes(f"{name} = {value!r}\n".encode())
            argv.append(str(path))
        elif style == "--name=value" or str(value).startswith("--") or str(value) == "-h":
            argv.append(f"--{name}={value}")
        else:
            argv += [f"--{name}", str(value)]
        expected[name] = FIELDS[name](value)
    cfg, given_names = watched(argv)
    assert vars(cfg) == expected
    assert all(type(getattr(cfg, name)) is kind for name, kind in FIELDS.items())
    assert given_names == {name for (name, _), _ in steps}
