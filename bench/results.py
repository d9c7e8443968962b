"""Results as plain data: what a file holds, how it is written and read.

    {"schema", "command", "suite", "about", "settings", "environment", "readings_after",
     "cases": [{"name", "case", "asked": [asked], "pairs", "flops",
                "memory": {"inputs", "results"}, "rows": [row]}]}

`memory` is bytes: what a call is given, do included, and o with the gradients. `asked` is the
ratios that the case is there to show, the fields of `cases.Asked`. A row is a contender on a case,
whether it could run or not; see `Row`.
"""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

SCHEMA = 1

OK = "ok"
UNAVAILABLE = "unavailable"
UNSUPPORTED = "unsupported"
WRONG = "wrong"
FAILED = "failed"
STATUSES = (OK, UNAVAILABLE, UNSUPPORTED, WRONG, FAILED)
"""Timed; cannot run here or does not do such cases; its own answer E9; wrong result; raised."""

FOLDER = Path(__file__).with_name("results")


@dataclass
class Row:
    """One contender on one case.

    Attributes:
        contender: its name.
        ours: whether it is this project's own.
        question: what it answers, if another question than the case's: it is there to compare with.
        status: one of `STATUSES`.
        reason: why not every quantity was timed; None if all were.
        notes: what a reader of the numbers must know.
        errors: relative error of "o", "q", ... against the reference, on some rows; what else has
            a bound (`check.BOUNDS`).
        figures: what was measured of the call apart from `times`: its time without a graph, where
            those are of graphs; what its module measures.
        first_call_ms: wall time of the first call, compilation included.
        setup_ms: time of what is built once a mask, not in `times`.
        memory_setup: bytes of what was built once and stays.
        memory_call: peak bytes of a call (with its backward, if that is measured) above what was
            allocated before it; None off the GPU, as `memory_setup`.
        times: quantity -> {"median_ms", "q1_ms", "q3_ms", "repetitions", "tflops"}; "tflops" is
            None where there are no products to count; "tb_s" beside it where reading is the bound.
        kernels: quantity -> kernel -> {"us", "launches"}: microseconds on the device and launches
            in one call; empty where nothing was profiled.
    """

    contender: str
    ours: bool
    question: str = ""
    status: str = OK
    reason: str | None = None
    notes: list[str] = field(default_factory=list)
    errors: dict[str, float] = field(default_factory=dict)
    figures: dict[str, float] = field(default_factory=dict)
    first_call_ms: float | None = None
    setup_ms: float | None = None
    memory_setup: int | None = None
    memory_call: int | None = None
    times: dict[str, dict[str, float | None]] = field(default_factory=dict)
    kernels: dict[str, dict[str, dict[str, float]]] = field(default_factory=dict)

    def refuse(self, status: str, reason: str) -> None:
        """Say why it is not timed, or no further: what was timed before stays."""
        self.status, self.reason = status, reason

    def asdict(self) -> dict[str, Any]:
        """As it is written."""
        return asdict(self)


def path(out: Path, device_folder: str, *words: str) -> Path:
    """Where the result of a run is written; `words`: command, suite, and what else it is of."""
    return out / device_folder / f"{'-'.join(words)}.json"


def save(result: dict[str, Any], where: Path) -> None:
    """Write a result; a reader sees the old file or the new one, never a part."""
    where.parent.mkdir(parents=True, exist_ok=True)
    partial = where.with_suffix(".json.part")
    partial.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    os.replace(partial, where)


def load(where: Path) -> dict[str, Any]:
    """Read a result; what its rows were written without has its default.

    Raises:
        ValueError: it is of another schema.
    """
    result = json.loads(where.read_text(encoding="utf-8"))
    if result.get("schema") != SCHEMA:
        raise ValueError(f"schema of {where}: got {result.get('schema')}, expected {SCHEMA}")
    for record in result["cases"]:
        record.setdefault("asked", [])
        record["rows"] = [Row(**row).asdict() for row in record["rows"]]
    return result
