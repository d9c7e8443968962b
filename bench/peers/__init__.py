"""The contenders, one interface: a peer says why it cannot run a case, or prepares a call.

Every peer is given the same tensors, `[B, S, H, D]`; those that want heads first get transposed
views. A new peer is a module that defines one, and a line in `all_peers`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import KW_ONLY, dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from ..cases import Case
from ..inputs import Inputs


@dataclass(frozen=True)
class Prepared:
    """A peer's calls on a case, at least one.

    Attributes:
        forward: o `[B, S, Hq, D]` from the inputs, with an autograd graph if they require
            gradients and gradients are on.
        selection: the choice of keys from `inputs.scores`.
        selected_forward: o from the scores: selection, then forward.
        setup_ms: time of what is built once a mask and left out of the call, if anything is.
        notes: what a reader of the numbers must know.
        answers: `(case, inputs)` of the question that `forward` answers, if it is another than that
            of the case: it is checked against that one, and its rate counts that one's pairs.
        checked: whether `forward` is attention; a yardstick's is not.
        errors: errors that were found in preparing, by name (`check.bound`).
        figures: measured in preparing, for the row.
    """

    forward: Callable[[], Tensor] | None = None
    _: KW_ONLY
    selection: Callable[[], object] | None = None
    selected_forward: Callable[[], Tensor] | None = None
    setup_ms: float | None = None
    notes: tuple[str, ...] = ()
    answers: tuple[Any, Any] | None = None
    checked: bool = True
    errors: dict[str, float] = field(default_factory=dict)
    figures: dict[str, float] = field(default_factory=dict)

    def offers(self, quantity: str) -> bool:
        """Whether it has the call that the quantity is about."""
        calls = {"selection": self.selection, "end to end": self.selected_forward}
        return calls.get(quantity, self.forward) is not None


class Peer(Protocol):
    """One contender.

    Attributes:
        name: as in results.
        ours: whether it is this project's own.

    One with an attribute `question` answers another question than the case's, unless it is "".
    """

    name: str
    ours: bool

    def unavailable(self, case: Case, device: torch.device) -> str | None:
        """Why it does not take part in the case; None = it does."""

    def prepare(self, case: Case, inputs: Inputs) -> Prepared:
        """Build what is built once. May raise; what it raises becomes the row's reason."""


def all_peers() -> tuple[Peer, ...]:
    """Every contender, ours first."""
    from . import flash_attention_4, flex, ours, sdpa

    return (*ours.peers(), *sdpa.PEERS, flex.PEER, flash_attention_4.PEER)


def selectors() -> tuple[Peer, ...]:
    """Contenders that only choose keys."""
    from . import torch_topk

    return (torch_topk.PEER,)


def heads_first(x: Tensor) -> Tensor:
    """`[B, S, H, D]` -> `[B, H, S, D]`, or back: a view."""
    return x.transpose(1, 2)
