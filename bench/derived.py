"""Figures that join rows of a result: ours against others; of `dynamic`, against dense
attention, by token, of memory.

A record is a case's entry of a result, a row a contender's entry of a record (`results`).
"""

from __future__ import annotations

import re
from typing import Any

from . import kernels

Record = dict[str, Any]
Line = dict[str, Any]
"""A row."""

SIZES = ("batch", "seqlen", "heads_q", "heads_kv", "head_dim", "dtype", "causal")


def heads(case: dict[str, Any]) -> str:
    """ "H32/8 D128"."""
    shared = f"/{case['heads_kv']}" if case["heads_kv"] != case["heads_q"] else ""
    return f"H{case['heads_q']}{shared} D{case['head_dim']}"


def label(case: dict[str, Any]) -> str:
    """A case in the words in which those of one suite differ."""
    words = [heads(case), f"S {case['seqlen']}"]
    if case["mask"]:
        words.append(f"w {case['window_size']}")
    if case["mask"] == "keys":
        words.append("key mask")
    if case["bias"]:
        words.append("bias with gradient" if case["bias_grad"] else "bias")
    return ", ".join(words)


def distinct(result: dict[str, Any]) -> list[Record]:
    """The records, those in which two sweeps cross once."""
    return list({record["name"]: record for record in result["cases"]}.values())


def row(record: Record | None, contender: str) -> Line | None:
    """The contender's row, if anything was timed."""
    rows = record["rows"] if record else ()
    return next((r for r in rows if r["contender"] == contender and r["times"]), None)


def milliseconds(line: Line | None, quantity: str) -> float | None:
    """Median of a quantity, if it was timed."""
    return line["times"][quantity]["median_ms"] if line and quantity in line["times"] else None


def rate(line: Line | None, quantity: str) -> float | None:
    """TFLOP/s of a quantity on the pairs that its own case makes visible."""
    return line["times"][quantity]["tflops"] if line and quantity in line["times"] else None


def ratio(a: float | None, b: float | None) -> float | None:
    """a / b where both are known."""
    return a / b if a is not None and b else None


def bandwidth(line: Line | None, quantity: str) -> float | None:
    """TB/s of keys and values, where these are what is counted."""
    return line["times"][quantity].get("tb_s") if line and quantity in line["times"] else None


def compared(record: Record, line: Line, asked: dict[str, Any]) -> Line | None:
    """The row of `record` that a row of ours is compared with (`cases.Asked`), if it was timed."""
    quantity, against = asked["quantity"], asked["against"]
    if against.startswith("own-"):
        return row(record, line["contender"] + against.removeprefix("own"))
    timed = [r for r in record["rows"] if quantity in r["times"]]
    found = [r for r in timed if against and re.fullmatch(against, r["contender"])]
    return min(found, key=lambda r: milliseconds(r, quantity), default=None)


def shown(line: Line | None, other: Line | None, asked: dict[str, Any]) -> float | None:
    """The figure that is asked for, of a row of ours against another."""
    quantity, figure = asked["quantity"], asked["figure"]
    own, theirs = (milliseconds(x, quantity) for x in (line, other))
    if figure == "us":
        return None if own is None else 1e3 * own
    if figure == "speed":
        return ratio(theirs, own)
    if figure == "time":
        return ratio(own, theirs)
    counted = rate if bandwidth(line, quantity) is None else bandwidth
    return ratio(counted(line, quantity), counted(other, quantity))


def met(value: float, asked: dict[str, Any]) -> bool:
    """Whether a figure keeps its bound; one without a bound keeps none."""
    if asked["least"] is not None:
        return value >= asked["least"]
    return asked["most"] is not None and value <= asked["most"]


def contenders(records: list[Record], ours: bool) -> list[str]:
    """Names of those that were timed at attention, ours or the others."""
    rows = [r for record in records for r in record["rows"] if "forward" in r["times"]]
    return list(dict.fromkeys(r["contender"] for r in rows if r["ours"] == ours))


def masked(records: list[Record]) -> list[Record]:
    """Those with a mask."""
    return [record for record in records if record["case"]["mask"]]


def dense(records: list[Record]) -> list[Record]:
    """Those without."""
    return [record for record in records if not record["case"]["mask"]]


def twin(records: list[Record], record: Record) -> Record | None:
    """Dense attention of the same sizes, which sees all causal pairs."""
    sizes = [record["case"][name] for name in SIZES]
    found = (r for r in dense(records) if [r["case"][name] for name in SIZES] == sizes)
    return next((r for r in found if not r["case"]["bias"]), None)


def both_ways(line: Line | None) -> float | None:
    """Milliseconds of forward and backward, selection apart."""
    there, back = (milliseconds(line, quantity) for quantity in ("forward", "backward"))
    return None if there is None or back is None else there + back


def per_token(record: Record, line: Line | None) -> float | None:
    """Microseconds of forward and backward a token."""
    tokens = record["case"]["batch"] * record["case"]["seqlen"]
    total = both_ways(line)
    return None if total is None else 1e3 * total / tokens


def beyond(record: Record, line: Line | None) -> int | None:
    """Peak bytes of forward and backward that are neither inputs, nor o, nor gradients."""
    if line is None or line["memory_call"] is None:
        return None
    return line["memory_call"] - record["memory"]["results"]


def own(record: Record) -> int:
    """Bytes of inputs, o and gradients."""
    return record["memory"]["inputs"] + record["memory"]["results"]


def spent(line: Line, quantity: str) -> dict[str, float] | None:
    """Milliseconds of a call by kind of kernel, and "idle", the rest of its median; None where it
    was not profiled.
    """
    table = line["kernels"].get(quantity)
    if not table:
        return None
    found = {kind: us / 1e3 for kind, us in kernels.by_kind(table).items()}
    total = milliseconds(line, quantity)
    return found | {"idle": max(0.0, total - sum(found.values()))}
