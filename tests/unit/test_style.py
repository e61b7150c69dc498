"""What a checker can say about the sources: Python by ruff, the page's modules and their tests by Node.js."""

import shutil
import subprocess
import sys

import pytest
from membrane.tools import ROOT
from membrane.tools.run.programs import node_js

SCRIPTS = [*sorted((ROOT / "web" / "js").rglob("*.js")), *sorted((ROOT / "tests" / "browser").glob("*.mjs"))]


@pytest.mark.parametrize("command", ["check", "format --check"])
def test_ruff_finds_nothing(command):
    ruff = [sys.executable, "-m", "ruff", *command.split(), "--no-cache", "."]
    found = subprocess.run(ruff, cwd=ROOT, capture_output=True, text=True)
    assert found.returncode == 0, found.stdout + found.stderr


def test_all_scripts_are_found():
    assert {path.name for path in SCRIPTS} >= {"membrane.js", "stack_document.js", "scenarios.mjs"}


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_scripts_are_modules_that_parse(path, tmp_path):
    module = tmp_path / f"{path.stem}.mjs"  # the name by which every Node.js takes it for a module
    shutil.copy2(path, module)
    found = subprocess.run([node_js(), "--check", module], capture_output=True, text=True)
    assert found.returncode == 0, found.stderr
