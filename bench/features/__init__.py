"""What is benchmarked beyond dense and masked attention, a module a feature.

A feature is a command. Its module has the same four names:

    Case                                    a dataclass, a `FeatureCase`: the data of its suites
    QUANTITIES                              what is timed
    build(case, device, requires_grad)      the `Question` that a case asks
    peers()                                 the contenders, ours first

A contender may answer another question than the case's, to be compared with: a baseline. Then what
it prepares says which (`Prepared.answers`), and that is what it is checked against.
"""

from __future__ import annotations

import importlib
from types import ModuleType

MODULES = {
    "decode": "decode",
    "varlen": "packed",
    "threshold": "threshold",
    "gated": "gated",
    "block": "block",
    "streaming": "streaming",
}
"""Command -> module."""


def of(command: str) -> ModuleType | None:
    """The feature behind a command; None if the command is not about one."""
    if command not in MODULES:
        return None
    return importlib.import_module(f"{__name__}.{MODULES[command]}")
