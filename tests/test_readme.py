"""The README's commands work as written: each `sh` block is run here, in order, in a copy of the
project, unless it says that it needs GPUs or network. The first two are what .ci/run runs."""

import os
import re
import shutil
import subprocess
import sys

import pytest
from conftest import ROOT

README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```$", README, re.M | re.S)
SHELL = [text for language, text in BLOCKS if language == "sh"]
PYTHON = [text for language, text in BLOCKS if language == "python"]
SMALLER = {"max_tokens=8000000": "max_tokens=400000", "\nval_tokens = 65536": "\nval_tokens = 4096"}
SMALLER |= {"n_layer = 4": "n_layer = 1", "\nbatch_size = 16": "\nbatch_size = 4"}
SMALLER |= {"micro_batch_size = 16": "micro_batch_size = 4", "sample_tokens = 200": "sample_tokens = 20"}
# Appended to the commands with the first text, where a later flag wins: smaller runs of the same code.
APPENDED = {"python bench.py": "--n_embd=64 --ffn_hidden=128", "--eval_only": "--sample_tokens=20"}
COPIED = ["*.py", "config", "experiments/*.py", "README.md"]


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    """A copy of the project with the README's own FFN added as the README says, and with a smaller first
    run: .ci/run runs the recipe as it is."""
    copy = tmp_path_factory.mktemp("project")
    for pattern in COPIED:
        for path in ROOT.glob(pattern):
            target = copy / path.relative_to(ROOT)
            target.parent.mkdir(exist_ok=True)
            shutil.copytree(path, target) if path.is_dir() else shutil.copy(path, target)
    model = (copy / "model.py").read_text()
    cls, line, _ = PYTHON
    assert model.count("class SparseGLU") == 1
    assert model.count('    "swiglu": SwiGLU,\n') == 1
    model = model.replace("class SparseGLU", cls + "\n\nclass SparseGLU")
    model = model.replace('    "swiglu": SwiGLU,\n', '    "swiglu": SwiGLU,\n' + line)
    (copy / "model.py").write_text(model)
    recipe = (copy / "config" / "smoke.py").read_text()
    for old, new in SMALLER.items():
        assert recipe.count(old) == 1
        recipe = recipe.replace(old, new)
    (copy / "config" / "smoke.py").write_text(recipe)
    return copy


def test_the_two_commands_come_first_and_ci_finds_them():
    commands = [line for line in README.splitlines() if re.match(r"pip install .* && python ", line)]
    assert [text.strip() for text in SHELL[:2]] == commands[:2]
    assert "requirements.txt && python train.py config/smoke.py" in commands[0]
    assert "requirements-dev.txt && python -m pytest" in commands[1]


def test_the_example_is_about_fifteen_lines():
    assert len(PYTHON[0].splitlines()) <= 15


@pytest.mark.timeout(900)
def test_every_other_command_runs(project):
    """In one test, as later commands use what earlier ones made."""
    path = os.pathsep.join([os.path.dirname(sys.executable), os.environ["PATH"]])
    ran = 0
    for block in SHELL[2:]:
        needs = re.match(r"# needs (.*)", block)
        if needs:
            assert needs[1] in ("GPUs", "network")
            continue
        for text, flags in APPENDED.items():
            block = re.sub(f"(.*{text}.*)", rf"\1 {flags}", block)
        done = subprocess.run(
            ["bash", "-euo", "pipefail", "-c", block],
            cwd=project,
            env={**os.environ, "PATH": path},
            capture_output=True,
            text=True,
            timeout=600,
        )
        assert done.returncode == 0, f"{block}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}"
        assert "Traceback" not in done.stderr
        ran += 1
    assert ran >= 5
    log = (project / "out/slope/log.jsonl").read_text()
    assert '"val_loss"' in log
    code = PYTHON[2] + "assert logits.shape == (1, 7, 384)\n"
    done = subprocess.run([sys.executable, "-c", code], cwd=project, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("import ")
