"""Plots of `dynamic`, a PNG for each configuration of heads: time, time a token and peak memory
against S, and time against w.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import derived
from .derived import Record

if TYPE_CHECKING:
    from matplotlib.axes import Axes

PANEL = (6.4, 4.4)
"""Inches of one of the two by two panels."""

DENSE_PEERS = ("flash-attn-4", "sdpa-cudnn", "sdpa-flash")
"""Whose dense attention is drawn: the first of them that was timed."""

STYLES = {"forward": "--", "backward": "-", "end to end": "-."}
OURS, MASKED, DENSE, OWN_DENSE = "tab:blue", "tab:green", "tab:red", "tab:gray"
GIBIBYTE = 2**30

Points = list[tuple[int, float]]


def draw(result: dict[str, Any], target: Path, caption: str) -> list[Path]:
    """Write the PNGs beside `target`, the heads in their names; returns their paths.

    Raises:
        ModuleNotFoundError: matplotlib is not installed (extra "bench").
        ValueError: no case with a mask was timed by a contender of ours.
    """
    from matplotlib.figure import Figure

    records = derived.distinct(result)
    written = []
    for heads in dict.fromkeys(derived.heads(record["case"]) for record in records):
        own = [record for record in records if derived.heads(record["case"]) == heads]
        ours = next(iter(derived.contenders(_topk(own), ours=True)), None)
        if ours is None:
            continue
        figure = Figure(figsize=(2 * PANEL[0], 2 * PANEL[1]), layout="constrained")
        panels = figure.subplots(2, 2).flat
        for panel, axes in zip((_time, _token, _memory, _width), panels, strict=True):
            panel(axes, own, ours)
            axes.grid(True, which="both", alpha=0.2)
            if axes.get_legend_handles_labels()[0]:
                axes.legend(fontsize="x-small", handlelength=3.5)
        figure.suptitle(f"{heads}: {caption}", fontsize="small")
        words = heads.lower().replace("/", "-").replace(" ", "-")
        path = target.with_stem(f"{target.stem}-{words}")
        figure.savefig(path, dpi=150)
        written.append(path)
    if not written:
        raise ValueError(f"{result['command']} {result['suite']}: no masked case of ours was timed")
    return written


def _time(axes: Axes, records: list[Record], ours: str) -> None:
    sweep = _over_length(records)
    dense = derived.dense(records)
    own = {q: _points(sweep, ours, "seqlen", q) for q in STYLES}
    for quantity, points in own.items():
        _line(axes, points, f"{ours}, {quantity}", OURS, STYLES[quantity])
    for quantity in ("forward", "backward"):
        for name in derived.contenders(sweep, ours=False):
            points = _points(sweep, name, "seqlen", quantity)
            _line(axes, points, f"{name}, {quantity}", MASKED, STYLES[quantity])
        for name in _dense_peers(dense):
            points = _points(dense, name, "seqlen", quantity)
            _line(axes, points, f"{name} dense, {quantity}", DENSE, STYLES[quantity])
    _guide(axes, own["end to end"], "proportional to S")
    _log(axes, "sequence length S", "milliseconds")
    axes.set_title(f"time, w {_main_width(records)}")


def _token(axes: Axes, records: list[Record], ours: str) -> None:
    sweep, dense = _over_length(records), derived.dense(records)
    lines = [(sweep, ours, ours, OURS), (dense, ours, f"{ours} dense", OWN_DENSE)]
    lines += [(dense, name, f"{name} dense", DENSE) for name in _dense_peers(dense)]
    lines += [(sweep, name, name, MASKED) for name in derived.contenders(sweep, ours=False)]
    for group, name, text, colour in lines:
        points = [
            (record["case"]["seqlen"], value)
            for record in group
            if (value := derived.per_token(record, derived.row(record, name))) is not None
        ]
        _line(axes, sorted(points), text, colour, "-")
    _log(axes, "sequence length S", "µs a token")
    axes.set_title("forward and backward, a token")


def _memory(axes: Axes, records: list[Record], ours: str) -> None:
    """A block mask that stays belongs to what its contender needs."""
    sweep, dense = _over_length(records), derived.dense(records)
    lines = [(sweep, ours, ours, OURS)]
    lines += [(dense, name, f"{name} dense", DENSE) for name in _dense_peers(dense)]
    lines += [(sweep, name, name, MASKED) for name in derived.contenders(sweep, ours=False)]
    for group, name, text, colour in lines:
        points = [
            (record["case"]["seqlen"], (value + (line["memory_setup"] or 0)) / GIBIBYTE)
            for record in group
            if (line := derived.row(record, name)) is not None
            and (value := derived.beyond(record, line)) is not None
        ]
        _line(axes, sorted(points), text, colour, "-")
    size = [(record["case"]["seqlen"], derived.own(record) / GIBIBYTE) for record in sweep]
    axes.plot(*zip(*sorted(size), strict=True), ":", color="black", label="inputs, o, gradients")
    _log(axes, "sequence length S", "GiB")
    axes.set_title("peak memory beyond inputs, o and gradients")


def _width(axes: Axes, records: list[Record], ours: str) -> None:
    sweep = [r for r in _plain(records) if r["case"]["seqlen"] == _main_length(records)]
    for quantity, style in STYLES.items():
        points = _points(sweep, ours, "window_size", quantity)
        _line(axes, points, f"{ours}, {quantity}", OURS, style)
    _guide(axes, _points(sweep, ours, "window_size", "end to end"), "proportional to w")
    _log(axes, "keys kept, w", "milliseconds")
    axes.set_title(f"time, S {_main_length(records)}")


def _topk(records: list[Record]) -> list[Record]:
    return [record for record in records if record["case"]["mask"] == "topk"]


def _plain(records: list[Record]) -> list[Record]:
    """Top-w without a bias; with one if there are no others."""
    found = [record for record in _topk(records) if not record["case"]["bias"]]
    return found or _topk(records)


def _over_length(records: list[Record]) -> list[Record]:
    return [r for r in _plain(records) if r["case"]["window_size"] == _main_width(records)]


def _main_width(records: list[Record]) -> int:
    """The w that was run at most lengths."""
    return _most_frequent(records, "window_size")


def _main_length(records: list[Record]) -> int:
    """The S that was run at most widths."""
    return _most_frequent(records, "seqlen")


def _most_frequent(records: list[Record], field: str) -> int:
    values = [record["case"][field] for record in _plain(records)]
    return max(values, key=values.count)


def _dense_peers(dense: list[Record]) -> list[str]:
    """At most one."""
    timed = derived.contenders(dense, ours=False)
    return [name for name in DENSE_PEERS if name in timed][:1]


def _points(records: list[Record], contender: str, over: str, quantity: str) -> Points:
    found = [
        (record["case"][over], value)
        for record in records
        if (value := derived.milliseconds(derived.row(record, contender), quantity)) is not None
    ]
    return sorted(found)


def _line(axes: Axes, points: Points, text: str, colour: str, style: str) -> None:
    if points:
        axes.plot(
            *zip(*points, strict=True), style, marker="o", markersize=3, color=colour, label=text
        )


def _guide(axes: Axes, points: Points, text: str) -> None:
    """A line of slope 1 through the last point."""
    if points:
        last, value = points[-1]
        guide = [(x, value * x / last) for x, _ in points]
        axes.plot(*zip(*guide, strict=True), ":", color="black", alpha=0.6, label=text)


def _log(axes: Axes, x: str, y: str) -> None:
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xlabel(x)
    axes.set_ylabel(y)
