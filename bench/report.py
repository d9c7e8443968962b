"""Results as text: what a run prints, and the README's tables.

A block of the README between `<!-- bench: FILE FILE ... -->` and `<!-- /bench -->` is generated
from the named results, paths without ".json" below `bench/results`.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from . import results
from .results import Row

LINE = 160
"""Characters of a reason or note that a run prints; its result holds all."""

BLOCK = re.compile(r"(<!-- bench: (?P<files>[^>]*?) -->\n)(?P<body>.*?)(<!-- /bench -->)", re.S)


def header(result: dict[str, Any]) -> str:
    """The first lines of a run."""
    settings = result["settings"]
    return (
        f"{result['command']} {result['suite']}: {result['about']}\n{where(result)}\n"
        f"{settings['seconds']:g} s for each contender and quantity"
        f"{', CUDA-graph replays' if settings['graph'] else ''}; "
        "TFLOP/s on visible pairs, backward counted 2.5 x forward"
    )


def where(result: dict[str, Any]) -> str:
    """Device, versions, commit and date of a result in one line."""
    found = result["environment"]
    words = [found["device"], f"torch {found['torch']}"]
    words += [f"{name} {v}" for name, v in found["packages"].items() if v]
    if found["gpu"]:
        words.append(f"driver {found['gpu'].get('driver_version', 'unknown')}")
    dirty = " with changes" if found["dirty"] else ""
    words += [f"commit {(found['commit'] or 'unknown')[:12]}{dirty}", found["date"][:10]]
    return ", ".join(words)


def heading(record: dict[str, Any]) -> str:
    """A case's name, as a run prints it before anybody is prepared."""
    pairs = "" if record["pairs"] is None else f"   {record['pairs']:.4g} visible pairs"
    return f"\n{record['name']}{pairs}"


def admitted(row: Row) -> str:
    """What became of a contender before timing: its check, or why it does not take part."""
    if row.status != results.OK:
        return refusal(row)
    words = [f"checked, error {max(row.errors.values()):.1e}"]
    words.append(f"first call {row.first_call_ms / 1e3:.2f} s")
    if row.setup_ms is not None:
        words.append(f"setup {row.setup_ms:.3g} ms")
    if row.memory_call is not None:
        words.append(f"+{(row.memory_call + (row.memory_setup or 0)) / 2**20:.0f} MiB")
    lines = [f"  {row.contender:<15}{', '.join(words)}"]
    lines += [f"  {'':<15}- {note}"[:LINE] for note in row.notes]
    return "\n".join(lines)


def refusal(row: Row) -> str:
    """Why a contender is not timed, or no further."""
    return f"  {row.contender:<15}{row.status}: {row.reason}"[:LINE]


def timed(row: Row, quantity: str) -> str:
    """A contender's time of one quantity."""
    times = row.times[quantity]
    spread = f"[{times['q1_ms']:.4g}, {times['q3_ms']:.4g}]"
    return (
        f"  {row.contender:<15}{quantity:<17}{times['median_ms']:>10.4f} ms {spread:<20} "
        f"n={times['repetitions']:<4}{times['tflops']:>8.1f} TFLOP/s"
    )


def table(result: dict[str, Any]) -> str:
    """A result in Markdown: cases down, contenders across, "ms (TFLOP/s)".

    Contenders that were timed on no case have no column. Under the table stands why contenders
    that tried were not timed.
    """
    quantities = list(
        dict.fromkeys(
            q for record in result["cases"] for row in record["rows"] for q in row["times"]
        )
    )
    parts = [f"**{result['command']}, {result['suite']}.** {result['about']} {where(result)}."]
    for quantity in quantities:
        columns = _columns(result, quantity)
        lines = [f"| {quantity} | {' | '.join(columns)} |", "| --- |" + " ---: |" * len(columns)]
        for name, record in {record["name"]: record for record in result["cases"]}.items():
            cells = {row["contender"]: _cell(row, quantity) for row in record["rows"]}
            best = _best(record, quantity)
            shown = [f"**{cells[c]}**" if c == best else cells[c] for c in columns]
            lines.append(f"| {name} | {' | '.join(shown)} |")
        parts.append("\n".join(lines))
    parts.append(
        "Median milliseconds (TFLOP/s on visible pairs), the fastest in bold; – = not timed."
    )
    tried = [
        f"- {row['contender']}, {record['name']}: {row['status']}: {row['reason']}"
        for record in result["cases"]
        for row in record["rows"]
        if row["status"] not in (results.OK, results.UNAVAILABLE)
    ]
    return "\n\n".join([*parts, "\n".join(tried)]).rstrip()


def refresh(text: str, folder: Path = results.FOLDER) -> str:
    """The text with every block generated anew.

    Raises:
        ValueError: the text has no block, or a result that it names does not exist.
    """
    if not BLOCK.search(text):
        raise ValueError("no block `<!-- bench: FILE ... -->` ... `<!-- /bench -->` in the text")

    def block(match: re.Match[str]) -> str:
        files = [folder / f"{name}.json" for name in match["files"].split()]
        missing = [str(file) for file in files if not file.is_file()]
        if missing:
            raise ValueError(f"results named by a block do not exist: {missing}")
        tables = "\n\n".join(table(results.load(file)) for file in files)
        return f"{match[1]}\n{tables}\n\n{match[4]}"

    return BLOCK.sub(block, text)


def _columns(result: dict[str, Any], quantity: str) -> list[str]:
    rows = [row for record in result["cases"] for row in record["rows"] if quantity in row["times"]]
    return list(
        dict.fromkeys(row["contender"] for row in sorted(rows, key=lambda r: not r["ours"]))
    )


def _best(record: dict[str, Any], quantity: str) -> str | None:
    timed = [row for row in record["rows"] if quantity in row["times"]]
    fastest = min(timed, key=lambda row: row["times"][quantity]["median_ms"], default=None)
    return fastest and fastest["contender"]


def _cell(row: dict[str, Any], quantity: str) -> str:
    if quantity not in row["times"]:
        return "–"
    times = row["times"][quantity]
    return f"{times['median_ms']:.3g} ({times['tflops']:.3g})"
