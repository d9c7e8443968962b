"""This project: a peer for each backend, and the reference for problems that it can hold."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from flash_sparse_attn import IntervalMask, flash_sparse_attn_func, registry

from ..cases import Case
from ..inputs import Inputs
from . import Prepared

REFERENCE_PAIRS = 2**24
"""Scores that the reference, which stores them several times, is given at most."""


@dataclass(frozen=True)
class Ours:
    """One backend; the mask goes in as it is, so what a backend makes of it is timed."""

    backend: str
    ours: bool = True

    @property
    def name(self) -> str:
        """As in results."""
        return f"fsa-{self.backend}"

    def unavailable(self, case: Case, device: torch.device) -> str | None:
        """The backend's own reasons; of the reference, its memory."""
        return unavailable(self.backend, case.batch * case.heads_q * case.seqlen**2)

    def prepare(self, case: Case, inputs: Inputs) -> Prepared:
        """The public calls."""

        def attend(mask: Tensor | IntervalMask | None) -> Tensor:
            return flash_sparse_attn_func(
                inputs.q,
                inputs.k,
                inputs.v,
                attn_mask=mask,
                attn_bias=inputs.bias,
                is_causal=inputs.causal,
                backend=self.backend,
            )

        def select() -> IntervalMask:
            return IntervalMask.topk(inputs.scores, case.window_size)

        mask = inputs.mask if inputs.intervals is None else inputs.intervals
        return Prepared(
            forward=lambda: attend(mask),
            selection=select if case.selects else None,
            selected_forward=(lambda: attend(select())) if case.selects else None,
        )


def unavailable(backend: str, scores: int) -> str | None:
    """The backend's own reasons; of the reference, the memory of so many scores."""
    reasons = registry.availability(backend)
    if reasons:
        return "; ".join(reasons)
    if backend == registry.REFERENCE and scores > REFERENCE_PAIRS:
        return f"stores all scores: {scores} of them, at most {REFERENCE_PAIRS}"
    return None


def peers() -> tuple[Ours, ...]:
    """All backends in order of preference, then the reference."""
    return tuple(Ours(name) for name in (*registry.names(), registry.REFERENCE))
