"""Builds the package from a copy of the tree, without a front end and without network."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from shutil import copy2, copytree, ignore_patterns

import pytest

ROOT = Path(__file__).resolve().parents[2]
SITE_PACKAGES = sysconfig.get_path("purelib")


@dataclass(frozen=True)
class Build:
    """What one build said and, if it succeeded, the folder into which its wheel was unpacked."""

    status: int
    output: str
    folder: Path

    def files(self) -> set[str]:
        """Paths of the wheel's files."""
        found = (path for path in self.folder.rglob("*") if path.is_file())
        return {path.relative_to(self.folder).as_posix() for path in found}

    def python(self, *arguments: str) -> str:
        """Run Python with this build before, and no editable install beside, what is installed."""
        environment = os.environ | {"PYTHONPATH": f"{self.folder}{os.pathsep}{SITE_PACKAGES}"}
        # -S: no .pth file is read, so that the tree under test is out of reach.
        command = [sys.executable, "-S", *arguments]
        answer = subprocess.run(
            command, cwd=self.folder, env=environment, capture_output=True, text=True
        )
        assert answer.returncode == 0, answer.stderr
        return answer.stdout


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A copy of what a build reads, with CUDA sources planted beside Python files."""
    target = tmp_path / "tree"
    target.mkdir()
    for name in ("pyproject.toml", "CMakeLists.txt", "LICENSE", "README.md"):
        copy2(ROOT / name, target)
    for name in ("cmake", "python", "spec", "reference", "backends"):
        copytree(ROOT / name, target / name, ignore=ignore_patterns("__pycache__"))
    for name in ("src/forward.cu", "include/fsa/tile.cuh", "binding.cpp"):
        planted = target / "backends" / "cute" / name
        planted.parent.mkdir(parents=True, exist_ok=True)
        planted.write_text("// planted\n")
    return target


@pytest.fixture
def build(tree: Path, tmp_path: Path) -> Callable[..., Build]:
    """Returns `build(hook="build_wheel", **options)`: calls a PEP 517 or PEP 660 hook on the tree.

    `options` are CMake definitions, as `pip install -C cmake.define.NAME=VALUE` gives them.
    """

    def run(hook: str = "build_wheel", **options: str) -> Build:
        out, folder = tmp_path / "out", tmp_path / "unpacked"
        settings = {f"cmake.define.{name}": value for name, value in options.items()}
        code = (
            "from scikit_build_core import build\n"
            f"build.{hook}({str(out)!r}, config_settings={settings!r})\n"
        )
        out.mkdir()
        command = [sys.executable, "-c", code]
        answer = subprocess.run(command, cwd=tree, capture_output=True, text=True)
        for wheel in out.glob("*.whl"):
            zipfile.ZipFile(wheel).extractall(folder)
        return Build(answer.returncode, answer.stdout + answer.stderr, folder)

    return run
