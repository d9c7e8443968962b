"""The documented commands: sessions without nox, and that CI runs what the README says."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
NAMES = ("lint", "tests", "equivalence", "compile", "bench")

# Runs noxfile.py as a script in an interpreter in which the named modules are missing.
WITHOUT = """
import runpy, sys
for name in {missing!r}:
    sys.modules[name] = None
sys.argv = ["noxfile.py", *{arguments!r}]
runpy.run_path({noxfile!r}, run_name="__main__")
"""


def without(missing: list[str], *arguments: str) -> subprocess.CompletedProcess[str]:
    code = WITHOUT.format(missing=missing, arguments=arguments, noxfile=str(ROOT / "noxfile.py"))
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)


def test_sessions_are_listed_with_what_they_do_without_nox():
    answer = without(["nox"])
    assert answer.returncode == 0, answer.stderr
    listed = dict(line.split(maxsplit=1) for line in answer.stdout.splitlines()[-len(NAMES) :])
    assert tuple(listed) == NAMES


def test_session_runs_without_nox():
    answer = without(["nox"], "equivalence", "--version")
    assert answer.returncode == 0, answer.stderr
    assert "pytest tests/conformance --version" in answer.stdout


@pytest.mark.parametrize(
    ("name", "module", "line"),
    [
        ("lint", "ruff", "pip install --group lint"),
        ("tests", "xdist", 'pip install -e ".[test]"'),
        ("equivalence", "pytest", 'pip install -e ".[test]"'),
        ("compile", "triton", 'pip install -e ".[test]"'),
        ("bench", "torch", 'pip install -e ".[bench]"'),
    ],
)
def test_session_names_what_is_missing_and_the_line_that_installs_it(name, module, line):
    answer = without(["nox", module], name)
    assert answer.returncode == 1
    assert f"lacks {module}: {line}" in answer.stdout


def test_unknown_session_fails():
    assert without(["nox"], "test").returncode == 1


@pytest.mark.parametrize("readme", ["README.md", "README_zh.md"])
def test_ci_runs_the_second_command_of_the_readme(readme):
    command = (ROOT / ".ci" / "run").read_text(encoding="utf-8").splitlines()[-1]
    assert command.startswith("pip install")
    assert command in (ROOT / readme).read_text(encoding="utf-8").splitlines()
