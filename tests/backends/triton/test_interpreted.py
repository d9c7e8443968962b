"""Runs `interpreted/` with Triton's interpreter, one process a file.

Triton reads `TRITON_INTERPRET` when it is imported and is then of that mind for good, so it gets
processes of its own. `TRITON_INTERPRET=1 pytest tests/backends/triton/interpreted` does the same by
hand.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="Triton's interpreter is part of Triton")

ROOT = Path(__file__).resolve().parents[3]
FOLDER = Path(__file__).resolve().parent / "interpreted"
FILES = sorted(FOLDER.glob("test_*.py"))
ENVIRONMENT = {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
FLAGS = ["-q", "--tb=short", "--no-header", "-W", "ignore", "-p", "no:cacheprovider"]


@pytest.mark.slow
@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem.removeprefix("test_"))
def test_interpreted(file):
    # What pytest hands to its own child processes would make the inner run a worker of the outer.
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_")}
    answer = subprocess.run(
        [sys.executable, "-m", "pytest", str(file), *FLAGS],
        cwd=ROOT,
        env=environment | ENVIRONMENT,
        capture_output=True,
        text=True,
    )
    if answer.returncode != 0:
        pytest.fail(answer.stdout[-20000:] + answer.stderr[-5000:], pytrace=False)
    assert re.search(r"\d+ passed", answer.stdout), answer.stdout
    assert "skipped" not in answer.stdout, answer.stdout
