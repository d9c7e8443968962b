"""Plots of results: bars of TFLOP/s by case, lines of milliseconds over what a suite sweeps."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import plot_dynamic
from .report import where

if TYPE_CHECKING:
    from matplotlib.axes import Axes

PANEL = (7.0, 4.2)
"""Inches of one panel."""

LABELS = {
    "seqlen": "sequence length S",
    "window_size": "keys kept, w",
    "seqlen_q": "new rows, Sq",
}


def draw(result: dict[str, Any], target: Path) -> list[Path]:
    """Write a PNG: a column a quantity; a row of lines a sweep, a row of bars for cases of none.

    Of the command `dynamic` a PNG for each configuration of heads, see `plot_dynamic`.

    Returns:
        The files written.

    Raises:
        ModuleNotFoundError: matplotlib is not installed (extra "bench").
        ValueError: nothing was timed.
    """
    import matplotlib

    matplotlib.use("agg")
    from matplotlib.figure import Figure

    caption = f"{result['suite']}: {result['about']}\n{where(result)}"
    if result["command"] == "dynamic":
        return plot_dynamic.draw(result, target, caption)
    quantities = list(
        dict.fromkeys(
            q for record in result["cases"] for row in record["rows"] for q in row["times"]
        )
    )
    if not quantities:
        raise ValueError(f"{result['command']} {result['suite']}: nothing was timed")
    sweeps = list(dict.fromkeys(record["case"]["sweep"] for record in result["cases"]))
    size = (PANEL[0] * len(quantities), PANEL[1] * len(sweeps))
    figure = Figure(figsize=size, layout="constrained")
    panels = figure.subplots(len(sweeps), len(quantities), squeeze=False)
    for row, sweep in enumerate(sweeps):
        records = [record for record in result["cases"] if record["case"]["sweep"] == sweep]
        for column, quantity in enumerate(quantities):
            axes = panels[row][column]
            axes.set_title(quantity)
            if sweep is None:
                _bars(axes, records, quantity)
                axes.tick_params(labelleft=column == 0)
            else:
                _lines(axes, records, quantity, sweep)
            if axes.get_legend_handles_labels()[0]:
                axes.legend(fontsize="small")
    figure.suptitle(caption, fontsize="small")
    figure.savefig(target, dpi=150)
    return [target]


def _contenders(records: list[dict[str, Any]], quantity: str) -> list[str]:
    rows = (row for record in records for row in record["rows"])
    return list(dict.fromkeys(row["contender"] for row in rows if quantity in row["times"]))


def _value(record: dict[str, Any], contender: str, quantity: str, field: str) -> float | None:
    for row in record["rows"]:
        if row["contender"] == contender and quantity in row["times"]:
            return row["times"][quantity][field]
    return None


def _bars(axes: Axes, records: list[dict[str, Any]], quantity: str) -> None:
    contenders = _contenders(records, quantity)
    counted = [t for r in records for row in r["rows"] for t in row["times"].values()]
    rate, label = "tflops", "TFLOP/s on visible pairs"
    if any("tb_s" in times for times in counted):
        rate, label = "tb_s", "TB/s of keys and values"
    height = 0.8 / max(len(contenders), 1)
    for index, contender in enumerate(contenders):
        values = [_value(record, contender, quantity, rate) or 0.0 for record in records]
        places = [place + index * height for place in range(len(records))]
        axes.barh(places, values, height, label=contender)
    middle = (len(contenders) - 1) * height / 2
    axes.set_yticks([place + middle for place in range(len(records))])
    axes.set_yticklabels([record["name"] for record in records], fontsize="x-small")
    axes.invert_yaxis()
    axes.set_xlabel(label)


def _lines(axes: Axes, records: list[dict[str, Any]], quantity: str, sweep: str) -> None:
    for contender in _contenders(records, quantity):
        points = [
            (record["case"][sweep], value)
            for record in records
            if (value := _value(record, contender, quantity, "median_ms")) is not None
        ]
        axes.plot(*zip(*sorted(points), strict=True), marker="o", markersize=3, label=contender)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xlabel(LABELS.get(sweep, sweep))
    axes.set_ylabel("median ms")
    axes.grid(True, which="both", alpha=0.2)
