"""What a mutant of the reference is."""

from __future__ import annotations

from dataclasses import dataclass

from .changes import Change


@dataclass(frozen=True)
class Mutant:
    """A wrong reference, and a case that tells it from the right one.

    Attributes:
        name: what is wrong.
        changes: function -> change.
        case: id of the case that kills it.
    """

    name: str
    changes: dict[str, Change]
    case: str
