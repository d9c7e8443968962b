"""The project's sessions: lint, tests, equivalence, compile, bench.

    nox -s NAME [-- ARGUMENTS]           or, without nox,
    python noxfile.py NAME [ARGUMENTS]

Both run a session in the present interpreter, with the torch that is there; a session installs
and fetches nothing. What it needs and does not find it names, with the line that installs it.
`nox -l` and `python noxfile.py` list the sessions.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import util
from pathlib import Path

ROOT = Path(__file__).resolve().parent

Commands = list[list[str]]
Plan = Callable[[Sequence[str]], Commands]

PYTEST = [sys.executable, "-m", "pytest"]
TEST_EXTRA = 'pip install -e ".[test]"'
LINT_GROUP = "pip install --group lint"
BENCH_EXTRA = 'pip install -e ".[bench]"'

# Parallelism comes from test processes, so each gets one core.
ENVIRONMENT = {"OMP_NUM_THREADS": "1"}


@dataclass(frozen=True)
class Session:
    """A session: from the caller's arguments to the commands to run, and what they need.

    Attributes:
        plan: the function that gives the commands; its name and docstring are the session's.
        modules: what the present interpreter must be able to import.
        install: the line that installs it.
    """

    plan: Plan
    modules: tuple[str, ...]
    install: str


SESSIONS: dict[str, Session] = {}


def session(*modules: str, install: str) -> Callable[[Plan], Plan]:
    """Register the decorated plan as a session."""

    def register(plan: Plan) -> Plan:
        SESSIONS[plan.__name__] = Session(plan, modules, install)
        return plan

    return register


@session("ruff", "clang_format", install=LINT_GROUP)
def lint(arguments: Sequence[str]) -> Commands:
    """Check format and style of every Python, C and CUDA file; `--fix` repairs what it can."""
    fix = "--fix" in arguments
    ruff = [sys.executable, "-m", "ruff"]
    commands = [
        [*ruff, "format", *([] if fix else ["--check"]), "."],
        [*ruff, "check", *(["--fix"] if fix else []), "."],
    ]
    sources = c_sources()
    if sources:
        mode = ["-i"] if fix else ["--dry-run", "--Werror"]
        clang_format = [sys.executable, "-c", "import clang_format as c; c.clang_format()"]
        commands.append([*clang_format, *mode, *sources])
    return commands


@session("torch", "flash_sparse_attn", "pytest", "xdist", "hypothesis", install=TEST_EXTRA)
def tests(arguments: Sequence[str]) -> Commands:
    """Run the tests, one process a core; arguments go to pytest."""
    # Idle workers take tests from busy ones: files of interpreted tests take minutes each.
    return [[*PYTEST, "-n", str(os.cpu_count() or 1), "--dist", "worksteal", *arguments]]


@session("torch", "flash_sparse_attn", "pytest", install=TEST_EXTRA)
def equivalence(arguments: Sequence[str]) -> Commands:
    """Cross-validate the backends, case by case, forward and backward; ends in a count for each.

    All backends, or those given as `--backend NAME` (cuda, cute, triton, reference; repeatable).
    Fails if a backend that was asked for ran nothing. Other arguments go to pytest.
    """
    return [[*PYTEST, "tests/conformance", *arguments]]


@session("torch", "flash_sparse_attn", "pytest", "triton", install=TEST_EXTRA)
def compile(arguments: Sequence[str]) -> Commands:
    """Compile the backends' kernels for every GPU they are for; none need be present."""
    return [[*PYTEST, "tests/backends", "-m", "compile", *arguments]]


@session("torch", "flash_sparse_attn", install=BENCH_EXTRA)
def bench(arguments: Sequence[str]) -> Commands:
    """Run the benchmarks: `forward` or `backward`, or what else `python -m bench` takes."""
    return [[sys.executable, "-m", "bench", *arguments]]


def c_sources() -> list[str]:
    """Every C, C++ and CUDA file that git tracks or would track."""
    patterns = [f"*.{suffix}" for suffix in ("c", "cc", "cpp", "cu", "cuh", "h", "hpp")]
    listing = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "--", *patterns]
    answer = subprocess.run(listing, cwd=ROOT, capture_output=True, text=True, check=True)
    return [path for path in answer.stdout.splitlines() if (ROOT / path).exists()]


def run(name: str, arguments: Sequence[str]) -> int:
    """Run all of a session's commands; returns the exit status of the first that failed, or 0."""
    chosen = SESSIONS[name]
    missing = [module for module in chosen.modules if util.find_spec(module) is None]
    if missing:
        print(f"{name}: {sys.executable} lacks {', '.join(missing)}: {chosen.install}")
        return 1
    failed = 0
    for command in chosen.plan(arguments):
        print("$", *command, flush=True)
        status = subprocess.run(command, cwd=ROOT, env=os.environ | ENVIRONMENT).returncode
        failed = failed or status
    return failed


def main(arguments: Sequence[str]) -> int:
    """Run the session named first; without a name, list them."""
    if not arguments or arguments[0] not in SESSIONS:
        print(__doc__)
        for name, listed in SESSIONS.items():
            print(f"  {name:<12} {listed.plan.__doc__.splitlines()[0]}")
        return int(bool(arguments))
    return run(arguments[0], arguments[1:])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

if util.find_spec("nox"):
    import nox

    def _register(name: str) -> None:
        def through_nox(session: nox.Session) -> None:
            if run(name, session.posargs):
                session.error(f"{name} failed")

        through_nox.__doc__ = SESSIONS[name].plan.__doc__
        nox.session(through_nox, name=name, venv_backend="none")

    for _name in SESSIONS:
        _register(_name)
