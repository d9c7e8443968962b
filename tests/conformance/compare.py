"""N1: is a result as near to float64 as twice the textbook computation and a floor allow."""

from __future__ import annotations

import torch
from torch import Tensor

Results = dict[str, Tensor]


def failures(got: Results, exact: Results, eager: Results, floors: dict[str, float]) -> list[str]:
    """Every way in which `got` breaks N1; empty = it does not.

    Args:
        got: what a backend computed, by quantity.
        exact: x64.
        eager: x_eager.
        floors: the floor of each quantity, in units of max(1, largest |x64|).
    """
    if got.keys() != exact.keys():
        return [f"quantities: got {sorted(got)}, expected {sorted(exact)}"]
    found = []
    for name, x64 in exact.items():
        found += [
            f"{name}: {text}" for text in _failures(got[name], x64, eager[name], floors[name])
        ]
    return found


def _failures(x: Tensor, x64: Tensor, eager: Tensor, floor: float) -> list[str]:
    if x.shape != x64.shape:
        return [f"got shape {tuple(x.shape)}, expected {tuple(x64.shape)}"]
    x, eager = x.double(), eager.double()
    special = ~x64.isfinite()
    wrong = ~_same(x, x64) & (special | ~x.isfinite())
    if wrong.any():
        place = tuple(wrong.nonzero()[0].tolist())
        return [
            f"{int(wrong.sum())} of {x.numel()} elements are inf or nan where they should not be, "
            f"or are not where they should; first {place}: got {x[place]}, expected {x64[place]}"
        ]
    if (special & ~_same(eager, x64)).any() or (~special & ~eager.isfinite()).any():
        return ["the textbook computation is itself not finite where it should be: a bad case"]
    unit = max(1.0, _largest(x64, torch.zeros_like(x64), special))
    error, allowed = _largest(x, x64, special), 2 * _largest(eager, x64, special) + floor * unit
    if error <= allowed:
        return []
    distance = (x - x64).masked_fill(special, 0).abs()
    place = tuple(int(n) for n in torch.unravel_index(distance.argmax(), distance.shape))
    return [f"error {error:.3e} > {allowed:.3e} at {place}: got {x[place]}, expected {x64[place]}"]


def _same(x: Tensor, y: Tensor) -> Tensor:
    return (x == y) | (x.isnan() & y.isnan())


def _largest(x: Tensor, y: Tensor, special: Tensor) -> float:
    distance = (x - y).masked_fill(special, 0).abs()
    return float(distance.max()) if distance.numel() else 0.0
