"""The contenders, one interface: a peer says why it cannot run a case, or prepares a call.

Every peer is given the same tensors, `[B, S, H, D]`; those that want heads first get transposed
views. A new peer is a module that defines one, and a line in `all_peers`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from ..cases import Case
from ..inputs import Inputs


@dataclass(frozen=True)
class Prepared:
    """A peer's call on a case.

    Attributes:
        forward: o `[B, S, Hq, D]` from the inputs, with an autograd graph if they require
            gradients and gradients are on.
        setup_ms: time of what is built once a mask and left out of the call, if anything is.
        notes: what a reader of the numbers must know.
    """

    forward: Callable[[], Tensor]
    setup_ms: float | None = None
    notes: tuple[str, ...] = ()


class Peer(Protocol):
    """One contender.

    Attributes:
        name: as in results.
        ours: whether it is this project's own.
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


def heads_first(x: Tensor) -> Tensor:
    """`[B, S, H, D]` -> `[B, H, S, D]`, or back: a view."""
    return x.transpose(1, 2)
