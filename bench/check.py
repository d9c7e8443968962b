"""A sanity check before a contender is timed: its results against the reference, on some rows.

The reference takes O(S²) memory, so it computes a few rows only. `do` is 0 outside these rows;
then dk, dv and the bias's gradient come from them alone and are compared in full, and dq must be 0
elsewhere. A selection of keys costs the reference little and is compared in full.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from flash_sparse_attn import IntervalMask, reference

from .cases import Case
from .features.question import FeatureCase, Question
from .inputs import Inputs

ROWS = 16
TOLERANCE = {"float32": 1e-3, "float16": 1e-2, "bfloat16": 2e-2}
"""Largest ‖x − reference‖ / ‖reference‖: a contender may use TF32, or round P, dS and db once."""

BOUNDS = {"selection": 0.0, "mass": 1.0}
"""Of what is not compared by its norm: share of keys selected otherwise; mass lost under T1, in
units of a.
"""


@dataclass(frozen=True, eq=False)
class Expected:
    """What the reference says about some rows.

    Attributes:
        rows: int64 `[n]`, rows that see at least one key.
        do: `[B, S, Hq, D]`, 0 outside `rows`.
        values: "o" and each of the case's leaves -> tensor; those with a row dim hold `rows` only.
        selection: `(start, end)` of every key, for a case that selects.
    """

    rows: Tensor
    do: Tensor
    values: dict[str, Tensor]
    selection: tuple[Tensor, Tensor] | None


def expect(case: Case | FeatureCase, inputs: Inputs | Question, backward: bool) -> Expected:
    """Ask the reference, in float32 (float64 for float32 inputs)."""
    wide = torch.float64 if case.dtype == "float32" else torch.float32
    rows = _rows(inputs.seeing)
    with torch.no_grad():
        arguments = inputs.q[:, rows], inputs.k, inputs.v
        terms = inputs.terms(rows, wide) | {"softmax_scale": case.head_dim**-0.5}
        values = {"o": _forward(arguments, terms, wide)}
        do = torch.zeros_like(inputs.do)
        do[:, rows] = inputs.do[:, rows]
        if backward:
            upstream = inputs.do[:, rows].to(wide)
            arguments = [x.to(wide) for x in arguments]
            gradients = reference.attention_backward(upstream, None, *arguments, **terms)
            values |= {name: gradients[name] for name in case.leaves}
        selection = None
        if case.selects:
            selection = reference.topk_intervals(inputs.scores, case.seqlen, case.window_size)
    return Expected(rows, do, values, selection)


def errors(expected: Expected, got: dict[str, Tensor]) -> dict[str, float]:
    """Relative error ‖x − reference‖ / ‖reference‖ of each value; NaN where x is not finite.

    Args:
        expected: the reference's answer.
        got: "o" and gradients of all rows, for the upstream gradient `expected.do`.
    """
    return {
        name: _error(name, got[name], want, expected.rows) for name, want in expected.values.items()
    }


def selection_error(expected: Expected, mask: IntervalMask) -> float:
    """Share of the keys whose rows are others than the reference's."""
    start, end = expected.selection
    hidden = (mask.end <= mask.start) & (end <= start)
    same = (mask.start == start) & (mask.end == end)
    return float((~(hidden | same)).double().mean())


def wrong(case: Case | FeatureCase, found: dict[str, float]) -> str | None:
    """Why results with these errors must not be timed, if there is a reason."""
    bounds = {name: BOUNDS.get(name, TOLERANCE[case.dtype]) for name in found}
    bad = [
        f"{_title(name)} is off by {error:.2g} (bound {bounds[name]:g})"
        for name, error in found.items()
        if not error <= bounds[name]
    ]
    return f"relative: {', '.join(bad)}" if bad else None


def _forward(arguments: tuple[Tensor, ...], terms: dict[str, Any], wide: torch.dtype) -> Tensor:
    """o, a sequence at a time: a batch of caches would not fit in the wider dtype."""

    def own(x: Any, b: int) -> Any:
        return x[b : b + 1] if isinstance(x, Tensor) and x.shape[0] > 1 else x

    of_each = [
        reference.attention(
            *(own(x, b).to(wide) for x in arguments),
            **{name: own(term, b) for name, term in terms.items()},
        )[0]
        for b in range(len(arguments[0]))
    ]
    return torch.cat(of_each)


def _rows(seeing: Tensor) -> Tensor:
    """First, last, and evenly spread rows among those that see a key in every head."""
    seeing = seeing.nonzero()[:, 0]
    if not len(seeing):
        raise ValueError("the case has no row that sees a key")
    return seeing[torch.linspace(0, len(seeing) - 1, ROWS, device=seeing.device).long()].unique()


def _error(name: str, got: Tensor, want: Tensor, rows: Tensor) -> float:
    dim = {"o": 1, "q": 1, "gate_q": 1}.get(
        name, 2 if name == "bias" and want.shape[2] == len(rows) else None
    )
    got = got.detach()
    rest = got.new_zeros(())
    if dim is not None:
        if name != "o":  # a row whose do is 0 has no gradient
            rest = got.index_fill(dim, rows, 0)
        got = got.index_select(dim, rows)
    norm = torch.linalg.vector_norm
    off = torch.hypot(norm(got.to(want.dtype) - want), norm(rest, dtype=want.dtype))
    return float(off / norm(want))


def _title(name: str) -> str:
    titles = {"o": "o", "bias": "db", "selection": "the selection", "mass": "the lost mass"}
    titles |= {"gate_q": "dα", "gate_k": "dδ"}
    return titles.get(name, f"d{name}")
