"""Results as Markdown tables."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from . import derived, kernels
from .derived import Line, Record

NONE = "–"
TIMES = "Median milliseconds (TFLOP/s on visible pairs), the fastest in bold; – = not timed."
BANDWIDTHS = "Median milliseconds (TB/s of keys and values), the fastest in bold; – = not timed."
FIGURES = {"speed": "× as fast", "time": "× the time", "rate": "× the rate", "us": "µs"}
BOTH_WAYS = ("forward", "backward")


def usual(result: dict[str, Any]) -> list[str]:
    """A table a quantity: cases down, contenders across, "ms (TFLOP/s)"."""
    records = derived.distinct(result)
    times = [t for record in records for r in record["rows"] for t in r["times"].values()]
    note = BANDWIDTHS if any("tb_s" in t for t in times) else TIMES
    return [*by_quantity(records, lambda record: record["name"]), note]


def feature(result: dict[str, Any]) -> list[str]:
    """Tables of a feature: what its suite asks for, then every contender's times."""
    records = derived.distinct(result)
    return [*_asked(records), *_figures(records), *usual(result)]


def by_quantity(records: list[Record], name: Callable[[Record], str]) -> list[str]:
    """Contenders that were timed on no case have no column, ours come first."""
    quantities = dict.fromkeys(q for record in records for r in record["rows"] for q in r["times"])
    parts = []
    for quantity in quantities:
        columns = _columns(records, quantity)
        rows = []
        for record in records:
            cells = {r["contender"]: _timed(r, quantity) for r in record["rows"]}
            best = _best(record, quantity)
            shown = [f"**{cells[c]}**" if c == best else cells.get(c, NONE) for c in columns]
            rows.append([name(record), *shown])
        parts.append(grid([quantity, *columns], rows))
    return parts


def dynamic(result: dict[str, Any]) -> list[str]:
    """Tables of the command `dynamic`: ours, ours against the others, where our time goes, and the
    others' own times.
    """
    records = derived.distinct(result)
    masked, dense = derived.masked(records), derived.dense(records)
    parts = []
    for contender in derived.contenders(masked, ours=True):
        parts += _of_ours(masked, contender)
        parts += _against(records, contender)
        parts += _kernels(masked, contender)
    others = derived.contenders(masked, ours=False)
    shared = [r for r in masked if any(derived.row(r, name) for name in others)]
    if others:
        parts.append(f"The masked question, {' and '.join(others)} beside ours:")
        parts += by_quantity(_without(shared, ("selection", "end to end")), _label)
        parts += _setup(shared, others)
    if dense:
        parts.append("Dense causal attention, which answers another question:")
        parts += by_quantity(dense, _label)
    parts.append(TIMES)
    return parts


def grid(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """One table, numbers to the right."""
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _asked(records: list[Record]) -> list[str]:
    """A line for each figure asked of a contender of ours."""
    head = ["asked", "quantity", "contender", "ms", "against", "ms", "figure", "", "bound"]
    rows = []
    for record in records:
        for asked in record["asked"]:
            for line in record["rows"]:
                if not line["ours"] or line["question"] or asked["quantity"] not in line["times"]:
                    continue
                other = derived.compared(record, line, asked)
                value = derived.shown(line, other, asked)
                rows.append([
                    record["name"], asked["quantity"], line["contender"],
                    _timed(line, asked["quantity"]), other["contender"] if other else NONE,
                    _timed(other, asked["quantity"]) if other else NONE,
                    FIGURES[asked["figure"]], _kept(value, asked), _bound(asked),
                ])  # fmt: skip
    note = (
        "In bold what keeps its bound. speed: their time over ours; time: ours over theirs; rate: "
        "our rate over theirs, TB/s of keys and values where these are counted, else TFLOP/s."
    )
    return [grid(head, rows), note] if rows else []


def _figures(records: list[Record]) -> list[str]:
    """What else was measured of our calls."""
    lines = [
        f"- {line['contender']}, {record['name']}: "
        + ", ".join(f"{name} {value:.3g}" for name, value in line["figures"].items())
        for record in records
        for line in record["rows"]
        if line["figures"]
    ]
    return ["\n".join(lines)] if lines else []


def _kept(value: float | None, asked: dict[str, Any]) -> str:
    shown = _number(value)
    return f"**{shown}**" if value is not None and derived.met(value, asked) else shown


def _bound(asked: dict[str, Any]) -> str:
    if asked["least"] is not None:
        return f"≥ {asked['least']:g}"
    return NONE if asked["most"] is None else f"≤ {asked['most']:g}"


def _of_ours(records: list[Record], contender: str) -> list[str]:
    head = [
        contender, "selection", "torch.topk", "forward", "backward", "end to end", "µs a token",
        "memory",
    ]  # fmt: skip
    rows = []
    for record in records:
        line = derived.row(record, contender)
        if line is None:
            continue
        topk = derived.milliseconds(derived.row(record, "torch-topk"), "selection")
        memory = derived.ratio(derived.beyond(record, line), derived.own(record))
        end_to_end = derived.milliseconds(line, "end to end")
        rows.append([
            _label(record), _timed(line, "selection"), _number(topk), _timed(line, "forward"),
            _timed(line, "backward"), _number(end_to_end),
            _number(derived.per_token(record, line)), _number(memory, ".2f"),
        ])  # fmt: skip
    note = (
        "µs a token: of forward and backward, selection apart. memory: peak bytes of forward and "
        "backward beyond inputs, o and gradients, over the bytes of these. torch.topk chooses for "
        "the last row only."
    )
    return [grid(head, rows), note]


def _against(records: list[Record], contender: str) -> list[str]:
    """Ratios, "forward / backward"."""
    dense = derived.contenders(derived.dense(records), ours=False)
    masked = derived.contenders(derived.masked(records), ours=False)
    head = [contender, "rate over own dense", "× own dense"]
    head += [f"× {name}" for name in [*dense, *masked]]
    rows = []
    for record in derived.masked(records):
        line, twin = derived.row(record, contender), derived.twin(records, record)
        if line is None:
            continue
        own = derived.row(twin, contender)
        faster = [own, *(derived.row(twin, name) for name in dense)]
        faster += [derived.row(record, name) for name in masked]
        cells = [_ratios(derived.rate, line, own, ".2f")]
        cells += [_ratios(derived.milliseconds, other, line) for other in faster]
        if any(cell != NONE for cell in cells):
            rows.append([_label(record), *cells])
    if not rows:
        return []
    note = (
        "forward / backward. rate over own dense: TFLOP/s on visible pairs over the backend's own "
        "TFLOP/s on dense causal attention of the same sizes; × = how many times as fast in wall "
        f"time, {'dense' if dense else 'own dense'} attention seeing all causal pairs."
    )
    return [grid(head, rows), note]


def _kernels(records: list[Record], contender: str) -> list[str]:
    """Milliseconds, "forward / backward"."""
    head = ["where the time goes", "wall", *kernels.KINDS, "idle", "attention kernels' TFLOP/s"]
    rows = []
    for record in records:
        line = derived.row(record, contender)
        spent = [derived.spent(line, quantity) if line else None for quantity in BOTH_WAYS]
        if spent == [None, None]:
            continue
        rates = [
            derived.ratio(record["flops"][quantity] / 1e9, kinds and kinds[kernels.ATTENTION])
            for quantity, kinds in zip(BOTH_WAYS, spent, strict=True)
        ]
        columns = [[kinds and kinds[name] for kinds in spent] for name in (*kernels.KINDS, "idle")]
        wall = [derived.milliseconds(line, quantity) for quantity in BOTH_WAYS]
        cells = [_both(values) for values in (wall, *columns)]
        rows.append([_label(record), *cells, _both(rates, ".0f")])
    note = (
        "forward / backward: milliseconds on the device by kind of kernel; idle: the rest of the "
        "wall time."
    )
    return [grid(head, rows), note] if rows else []


def _setup(records: list[Record], others: list[str]) -> list[str]:
    """What the others build once a mask, outside of their times."""
    built = [
        f"{name} {_label(record)}: {line['setup_ms']:.3g} ms"
        for record in records
        for name in others
        if (line := derived.row(record, name)) and line["setup_ms"] is not None
    ]
    return [f"Built once a mask, not in these times: {'; '.join(built)}."] if built else []


def _without(records: list[Record], quantities: tuple[str, ...]) -> list[Record]:
    def cut(line: Line) -> Line:
        return line | {"times": {q: t for q, t in line["times"].items() if q not in quantities}}

    return [record | {"rows": [cut(line) for line in record["rows"]]} for record in records]


def _columns(records: list[Record], quantity: str) -> list[str]:
    rows = [r for record in records for r in record["rows"] if quantity in r["times"]]
    return list(dict.fromkeys(r["contender"] for r in sorted(rows, key=lambda r: not r["ours"])))


def _best(record: Record, quantity: str) -> str | None:
    timed = [r for r in record["rows"] if quantity in r["times"] and not r["question"]]
    fastest = min(timed, key=lambda r: r["times"][quantity]["median_ms"], default=None)
    return fastest and fastest["contender"]


def _label(record: Record) -> str:
    return derived.label(record["case"])


def _timed(line: Line, quantity: str) -> str:
    if quantity not in line["times"]:
        return NONE
    times = line["times"][quantity]
    rate = "" if times["tflops"] is None else f" ({times['tflops']:.3g})"
    if "tb_s" in times:
        rate = f" ({times['tb_s']:.3g} TB/s)"
    return f"{times['median_ms']:.3g}{rate}"


def _number(value: float | None, form: str = ".3g") -> str:
    return NONE if value is None else f"{value:{form}}"


def _both(values: Sequence[float | None], form: str = ".3g") -> str:
    """Of forward and backward, in that order."""
    known = any(value is not None for value in values)
    return " / ".join(_number(value, form) for value in values) if known else NONE


def _ratios(
    figure: Callable[[Line | None, str], float | None],
    above: Line | None,
    below: Line | None,
    form: str = ".3g",
) -> str:
    """Of a figure of two rows."""
    quotients = [derived.ratio(figure(above, q), figure(below, q)) for q in BOTH_WAYS]
    return _both(quotients, form)
