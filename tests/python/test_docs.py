"""The documentation: its code runs, its tables and commands are those of the tree."""

from __future__ import annotations

import ast
import importlib.util
import inspect
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

import flash_sparse_attn
from flash_sparse_attn import IntervalMask, compat
from flash_sparse_attn.utils import mask, padding

ROOT = Path(__file__).resolve().parents[2]
READMES = ("README.md", "README_zh.md")
PAGES = (*READMES, "docs/api.md", "docs/masks.md", "docs/modules.md")
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}


def read(page: str) -> str:
    return (ROOT / page).read_text(encoding="utf-8")


def blocks(page: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", read(page), re.S | re.M)


def statements(code: str) -> list[str]:
    """What code does, however it is laid out: every statement but imports and strings."""
    skipped = (ast.Import, ast.ImportFrom)
    body = [x for x in ast.parse(code).body if not isinstance(x, skipped)]
    return [ast.dump(x) for x in body if not isinstance(getattr(x, "value", None), ast.Constant)]


def support_table() -> ModuleType:
    path = ROOT / "docs" / "support_table.py"
    specification = importlib.util.spec_from_file_location("support_table", path)
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


# --- code


@pytest.mark.parametrize("page", [page for page in PAGES if page != "README_zh.md"])
def test_the_python_of_a_page_runs_on_a_cpu(page: str, tmp_path: Path) -> None:
    script = tmp_path / "page.py"
    script.write_text("\n".join(blocks(page, "python")), encoding="utf-8")
    answer = subprocess.run(
        [sys.executable, script], capture_output=True, text=True, env=ENVIRONMENT, timeout=300
    )
    assert answer.returncode == 0, answer.stderr


def test_both_readmes_have_the_same_code() -> None:
    english, chinese = ([blocks(page, x) for x in ("python", "bash")] for page in READMES)
    assert english == chinese
    assert len(english[0]) == 2


def test_the_example_is_the_quick_start() -> None:
    code = "".join(blocks("README.md", "python"))
    example = statements(read("examples/quick_start.py"))
    assert example[: len(statements(code))] == statements(code)
    assert all("'print'" in extra for extra in example[len(statements(code)) :])


def test_the_example_runs() -> None:
    answer = subprocess.run(
        [sys.executable, ROOT / "examples" / "quick_start.py"],
        capture_output=True, text=True, env=ENVIRONMENT, timeout=300,
    )  # fmt: skip
    assert answer.returncode == 0, answer.stderr
    assert "out (1, 256, 2, 64) torch.bfloat16 on cpu" in answer.stdout


@pytest.mark.parametrize("readme", READMES)
def test_the_two_commands_are_those_that_contributors_read(readme: str) -> None:
    commands = [line for block in blocks(readme, "bash") for line in block.splitlines()]
    assert len(commands) == 2
    contributing = "\n".join(blocks("CONTRIBUTING.md", "bash"))
    for command in commands:
        assert command in contributing.splitlines()


# --- tables


def test_the_support_tables_are_those_of_the_capability_tables() -> None:
    assert support_table().main(["--check"]) == 0


def test_a_stale_support_table_is_found(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    module = support_table()
    (tmp_path / "backends").symlink_to(ROOT / "backends")
    for readme in READMES:
        (tmp_path / readme).write_text(read(readme), encoding="utf-8")
    monkeypatch.setattr(module, "ROOT", tmp_path)
    stale = tmp_path / "README_zh.md"
    stale.write_text(stale.read_text("utf-8").replace("✓", "–", 1), encoding="utf-8")
    assert module.main(["--check"]) == 1
    assert module.main([]) == 0
    assert stale.read_text("utf-8") == read("README_zh.md")
    assert module.main(["--check"]) == 0
    with pytest.raises(ValueError, match="0 marked places"):
        module.refresh("no table", 0)


def test_every_field_of_a_capability_table_has_a_row() -> None:
    """A backend that serves one thing more shows it."""
    module = support_table()
    nothing = module.Capability((), (), (), 0, False, (), 0, 0, False)
    everything = module.REFERENCE
    for row, cell in module.CELLS.items():
        assert cell(nothing) == module.NO, row
        assert cell(everything) != module.NO, row
    for form in everything.forms[1:]:
        alone = module.Capability((form,), (), (), 0, False, (), 0, 0, False)
        assert any(cell(alone) == module.YES for cell in module.CELLS.values()), form
    for term in everything.terms:
        without = tuple(x for x in everything.terms if x != term)
        fewer = module.Capability((), without, (), 0, False, (), 0, 0, False)
        full = module.Capability((), everything.terms, (), 0, False, (), 0, 0, False)
        assert any(cell(fewer) != cell(full) for cell in module.CELLS.values()), term


def test_the_reference_column_has_every_term_that_a_problem_can_have() -> None:
    from flash_sparse_attn.problem import AttentionProblem, Form

    module = support_table()
    source = inspect.getsource(AttentionProblem.terms)
    assert set(re.findall(r'^\s+"(\w+)":', source, re.M)) == set(module.REFERENCE.terms)
    assert {str(form) for form in Form} == set(module.REFERENCE.forms)


# --- names


def rendered(name: str, function: Callable) -> str:
    """A signature as the reference prints it, in one line and without types."""
    parameters = [
        p.replace(annotation=inspect.Parameter.empty, default=str(p.default))
        if isinstance(p.default, str)
        else p.replace(annotation=inspect.Parameter.empty)
        for p in inspect.signature(function).parameters.values()
    ]
    return f"{name}{inspect.Signature(parameters)}"


def one_line(text: str) -> str:
    return re.sub(r"\s+", " ", text)


PUBLIC = [name for name in flash_sparse_attn.__all__ if not name.startswith("__")]
ORDERS = [("create_mask", mask._with_sizes), ("create_mask", mask._without_sizes)]
CONSTRUCTORS = [
    (f"IntervalMask.{name}", getattr(IntervalMask, name))
    for name in ("causal", "window", "documents", "keys", "topk")
]
PADDING = [
    (name, getattr(padding, name))
    for name in ("unpad_input", "pad_input", "get_unpad_data", "index_first_axis")
]
AUTO = [("flash_dmattn_func_auto", compat.flash_dmattn_func_auto)]


@pytest.mark.parametrize("name", PUBLIC)
def test_every_public_name_has_a_section_with_its_signature(name: str) -> None:
    sections = re.split(r"^### ", read("docs/api.md"), flags=re.M)
    (section,) = (x for x in sections if x.startswith(f"`{name}`\n"))
    assert rendered(name, getattr(flash_sparse_attn, name)) in one_line(section)


@pytest.mark.parametrize(("name", "function"), [*ORDERS, *CONSTRUCTORS, *PADDING, *AUTO])
def test_other_signatures_are_those_of_the_code(name: str, function: Callable) -> None:
    assert rendered(name, function) in one_line(read("docs/api.md"))


def test_every_argument_of_the_main_function_is_explained() -> None:
    section = read("docs/api.md").split("### `flash_sparse_attn_func`")[1].split("\n### ")[0]
    explained = re.findall(r"^\| `(\w+)` \|", section, re.M)
    assert explained == list(inspect.signature(flash_sparse_attn.flash_sparse_attn_func).parameters)


# --- links


@pytest.mark.parametrize("page", [*PAGES, "CONTRIBUTING.md", "backends/README.md"])
def test_links_lead_somewhere(page: str) -> None:
    links = re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", read(page))
    for link in links:
        if not link.startswith("https://"):
            assert ((ROOT / page).parent / link).exists(), link


@pytest.mark.parametrize("page", PAGES)
def test_cited_rules_exist(page: str) -> None:
    defined = set(re.findall(r"^\*\*([A-Z]\d) ", read("spec/attention.md"), re.M))
    cited = set(re.findall(r"\b([SVMOGTNE]\d)\b", re.sub(r"```.*?```", "", read(page), flags=re.S)))
    assert cited
    assert cited <= defined
