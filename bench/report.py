"""Results as text: what a run prints, and the README's tables.

A block of the README between `<!-- bench: FILE FILE ... -->` and `<!-- /bench -->` is generated
from the named results, paths without ".json" below `bench/results`.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from . import features, kernels, results, tables
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
    worst = max(row.errors.values(), default=None)
    words = ["not checked" if worst is None else f"checked, error {worst:.1e}"]
    words.append(f"first call {row.first_call_ms / 1e3:.2f} s")
    if row.setup_ms is not None:
        words.append(f"setup {row.setup_ms:.3g} ms")
    if row.memory_call is not None:
        words.append(f"+{(row.memory_call + (row.memory_setup or 0)) / 2**20:.0f} MiB")
    lines = [f"  {row.contender:<24} {', '.join(words)}"]
    lines += [f"  {'':<24} - {note}"[:LINE] for note in row.notes]
    return "\n".join(lines)


def refusal(row: Row) -> str:
    """Why a contender is not timed, or no further."""
    return f"  {row.contender:<24} {row.status}: {row.reason}"[:LINE]


def timed(row: Row, quantity: str) -> str:
    """A contender's time of one quantity."""
    times = row.times[quantity]
    spread = f"[{times['q1_ms']:.4g}, {times['q3_ms']:.4g}]"
    rate = "" if times["tflops"] is None else f"{times['tflops']:>8.1f} TFLOP/s"
    if "tb_s" in times:
        rate = f"{times['tb_s']:>8.3f} TB/s"
    return (
        f"  {row.contender:<24} {quantity:<17}{times['median_ms']:>10.4f} ms {spread:<20} "
        f"n={times['repetitions']:<4}{rate}"
    )


def profiled(row: dict[str, Any], quantity: str) -> str:
    """Where the device's time of one call goes, a line a kernel."""
    total = sum(entry["us"] for entry in row["kernels"][quantity].values())
    lines = [f"  {row['contender']:<24} {quantity:<17}{total:>10.1f} us on the device"]
    lines += [
        f"    {entry['us']:>10.1f} us {entry['launches']:>4g} x {kernels.kind(name):<12}{name}"
        for name, entry in row["kernels"][quantity].items()
    ]
    return "\n".join(line[:LINE] for line in lines)


def table(result: dict[str, Any]) -> str:
    """A result in Markdown: its tables, and under them why contenders that tried were not timed."""
    scores = result["settings"].get("scores")
    words = [f"**{result['command']}, {result['suite']}.** {result['about']}"]
    words += [f"Key scores of {scores['file']}, {scores['shape']}."] if scores else []
    parts = [f"{' '.join(words)} {where(result)}."]
    if result["command"] == "dynamic":
        parts += tables.dynamic(result)
    else:
        parts += (tables.feature if result["command"] in features.MODULES else tables.usual)(result)
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
