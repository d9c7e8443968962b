"""The walls: what a fresh import may need, and which part of the tree may import which."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = "flash_sparse_attn"
FOLDERS = {
    "python/flash_sparse_attn": PACKAGE,
    "spec": f"{PACKAGE}.spec",
    "reference": f"{PACKAGE}.reference",
    "backends": f"{PACKAGE}.backends",
}
"""Folder -> the package that it is once installed."""

OPTIONAL = ("triton", "cutlass")
"""What only a backend may need."""


def in_fresh_process(code: str) -> None:
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert answer.returncode == 0, answer.stderr


def test_import_needs_torch_alone():
    in_fresh_process(
        f"""
import sys
for name in {OPTIONAL}:
    sys.modules[name] = None  # any import of it raises
import {PACKAGE}
from {PACKAGE} import registry
for name in registry.names():
    assert isinstance(registry.availability(name), list)
"""
    )


def test_missing_triton_is_a_reason_with_its_install_line():
    in_fresh_process(
        f"""
import sys
sys.modules["triton"] = None
from {PACKAGE} import registry
registry.build_options = lambda: dict.fromkeys(registry.names(), registry.BuildOption("ON", ()))
against = registry.availability("triton")
assert any("pip install" in reason for reason in against), against
"""
    )


def test_import_loads_no_backend():
    in_fresh_process(
        f"""
import sys
import {PACKAGE}
from {PACKAGE} import registry
modules = [f"{PACKAGE}.backends.{{name}}" for name in registry.names()]
loaded = [name for name in modules if name in sys.modules]
assert not loaded, loaded
"""
    )


def test_spec_loads_without_torch():
    in_fresh_process(
        f"""
import sys
sys.modules["torch"] = None
sys.path.insert(0, {str(ROOT)!r})
import spec
assert spec.__file__ == {str(ROOT / "spec" / "__init__.py")!r}
"""
    )


def module_name(path: Path) -> str:
    """The dotted name under which a file of the tree is installed."""
    for folder, package in FOLDERS.items():
        if path.is_relative_to(ROOT / folder):
            parts = path.relative_to(ROOT / folder).with_suffix("").parts
            return ".".join([package, *(part for part in parts if part != "__init__")])
    raise ValueError(f"{path} is in none of {list(FOLDERS)}")


def imported(source: str, package: str) -> Iterator[str]:
    """Absolute names of what `source`, a module inside `package`, imports at any depth.

    `from a import b` gives both `a` and `a.b`, as b may be a module.
    """
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parents = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*parents, base] if base else parents)
            yield base
            yield from (f"{base}.{alias.name}" for alias in node.names)


def imports_of(path: Path) -> set[str]:
    name = module_name(path)
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    return set(imported(path.read_text(encoding="utf-8"), package))


def within(name: str, package: str) -> bool:
    return name == package or name.startswith(f"{package}.")


def files(folder: str) -> list[Path]:
    found = sorted((ROOT / folder).rglob("*.py"))
    assert found, f"no Python file in {folder}"
    return found


def backend_names() -> list[str]:
    lines = (ROOT / "backends" / "order.txt").read_text(encoding="utf-8").splitlines()
    return [line for line in lines if line and not line.startswith("#")]


@pytest.mark.parametrize(
    ("source", "package", "expected"),
    [
        ("import a.b", "p", {"a.b"}),
        ("from ..cute import forward", "p.backends.cuda", {"p.backends.cute.forward"}),
        ("from .. import cute", "p.backends.cuda", {"p.backends.cute"}),
        ("from ...reference import attention", "p.backends.cuda", {"p.reference.attention"}),
        ("def f():\n    from . import x", "p", {"p.x"}),
    ],
)
def test_imports_are_resolved(source, package, expected):
    assert expected <= set(imported(source, package))


@pytest.mark.parametrize("backend", backend_names())
def test_backend_imports_no_other_backend_and_no_reference(backend):
    others = [f"{PACKAGE}.backends.{name}" for name in backend_names() if name != backend]
    walls = [*others, f"{PACKAGE}.reference", f"{PACKAGE}.reference_backend"]
    for path in files(f"backends/{backend}"):
        crossed = [name for name in imports_of(path) for wall in walls if within(name, wall)]
        assert not crossed, f"{path.relative_to(ROOT)} imports {crossed}"


def test_package_names_no_backend():
    """Backends are found through the registry, by name, when they are asked for."""
    for path in files("python/flash_sparse_attn"):
        crossed = [name for name in imports_of(path) if within(name, f"{PACKAGE}.backends")]
        assert not crossed, f"{path.relative_to(ROOT)} imports {crossed}"


@pytest.mark.parametrize(("folder", "beyond"), [("spec", set()), ("reference", {"torch"})])
def test_folder_imports_the_standard_library_itself_and(folder, beyond):
    allowed = set(sys.stdlib_module_names) | beyond
    for path in files(folder):
        outside = [
            name
            for name in imports_of(path)
            if name.partition(".")[0] not in allowed and not within(name, FOLDERS[folder])
        ]
        assert not outside, f"{path.relative_to(ROOT)} imports {outside}"
