"""What is called, and timed, for each quantity."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext

import torch
from torch import Tensor

from . import features, timing
from .cases import Case
from .features.question import FeatureCase, Question
from .inputs import Inputs
from .peers import Prepared

QUANTITIES = {
    "forward": ("forward",),
    "backward": ("backward", "forward+backward"),
    "dynamic": ("selection", "forward", "backward", "end to end"),
    **{command: features.of(command).QUANTITIES for command in features.MODULES},
}
"""What each command times. "backward" is the backward alone, through a retained graph; "end to end"
is selection, forward and backward.
"""

PROFILED = {"dynamic": ("selection", "forward", "backward")}
"""Of which quantities a command has our kernels profiled."""


def results(
    forward: Callable[[], Tensor],
    case: Case | FeatureCase,
    inputs: Inputs | Question,
    do: Tensor,
    backward: bool,
) -> dict[str, Tensor]:
    """One call: o and, with `backward`, the gradient of each leaf."""
    with torch.set_grad_enabled(backward):
        o = forward()
    if not backward:
        return {"o": o}
    return {"o": o} | dict(zip(case.leaves, _differentiate(o, case, inputs, do), strict=True))


def of(
    quantity: str, ready: Prepared, case: Case | FeatureCase, inputs: Inputs | Question, graph: bool
) -> timing.Call:
    """What is timed for a quantity that `ready` offers; `graph`: a replay of it."""
    call = _eager(quantity, ready, case, inputs, graph)
    return timing.captured(call) if graph else call


def _eager(
    quantity: str, ready: Prepared, case: Case | FeatureCase, inputs: Inputs | Question, graph: bool
) -> timing.Call:
    if quantity == "selection":
        return ready.selection
    forward = ready.selected_forward if quantity == "end to end" else ready.forward
    if quantity == "forward":

        def forward_only() -> Tensor:
            with torch.no_grad():
                return forward()

        return forward_only
    if quantity == "backward":
        # A captured backward runs where its forward ran.
        with timing.side_stream() if graph else nullcontext():
            o = forward()
        return lambda: _differentiate(o, case, inputs, inputs.do)
    return lambda: _differentiate(forward(), case, inputs, inputs.do)


def _differentiate(
    o: Tensor, case: Case | FeatureCase, inputs: Inputs | Question, do: Tensor
) -> tuple[Tensor, ...]:
    """Gradients of the leaves; the graph stays, for the next repetition."""
    return torch.autograd.grad(o, inputs.leaves(case.leaves), do, retain_graph=True)
