"""Mutants: the suite fails every wrong reference that it should."""

from __future__ import annotations

import sys
from types import ModuleType

import pytest
from flash_sparse_attn.spec import cases, tolerances

from flash_sparse_attn import registry

from ..conformance import compare
from ..conformance.test_cases import expected, run
from .mutant import Mutant
from .mutants import MUTANTS

PACKAGE = "flash_sparse_attn.reference"


def _modules() -> dict[str, ModuleType]:
    """The reference and its modules, these by their short names."""
    return {
        name.removeprefix(f"{PACKAGE}."): module
        for name, module in sys.modules.items()
        if name == PACKAGE or name.startswith(f"{PACKAGE}.")
    }


def _apply(mutant: Mutant, patch: pytest.MonkeyPatch) -> None:
    for target, change in mutant.changes.items():
        module, _, name = target.rpartition(":")
        modules = _modules()
        if "." in name:  # a method
            owner = getattr(modules[module], name.split(".")[0])
            method = name.split(".")[1]
            patch.setattr(owner, method, change(getattr(owner, method)))
            continue
        holders = [modules[module]] if module else list(modules.values())
        found = [holder for holder in holders if hasattr(holder, name)]
        holders = [x for x in found if not isinstance(getattr(x, name), ModuleType)]
        originals = {id(getattr(holder, name)) for holder in holders}
        assert len(originals) == 1, f"{target}: the reference has {len(originals)} of this name"
        wrong = change(getattr(holders[0], name))
        for holder in holders:
            patch.setattr(holder, name, wrong)


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name.replace(" ", "-"))
def test_mutant_is_killed(mutant: Mutant, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its case passes with the right reference and fails with the wrong one, by N1 alone."""
    case = cases()[mutant.case]
    want, floors = expected(case.id, "cpu"), tolerances()[case.dtype]

    def failures() -> list[str]:
        got, _ = run(case, want.inputs, registry.REFERENCE)
        return compare.failures(got, want.exact, want.eager, floors)

    assert failures() == []
    _apply(mutant, monkeypatch)
    assert failures() != []


def test_mutants_are_many_and_distinct() -> None:
    names = [mutant.name for mutant in MUTANTS]
    assert len(names) == len(set(names)) >= 25
