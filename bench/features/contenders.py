"""Contenders of the features: ours, its baselines, and what the peers have in common."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch._dynamo
import torch._functorch.config
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from flash_sparse_attn import registry

from ..peers import Peer, Prepared, heads_first
from ..peers import ours as batched
from .question import FeatureCase, Question

Prepare = Callable[[Any, Any, str], Prepared]
"""`(case, question, backend)` -> what is timed."""


@dataclass(frozen=True)
class Ours:
    """A backend of this project, by the public functions.

    Attributes:
        backend: its name.
        build: what prepares its call.
        question: of a baseline, the question that it answers; "" = the case's.
        missing: why a baseline has no meaning beside a case; None = it has.
    """

    backend: str
    build: Prepare
    question: str = ""
    missing: Callable[[Any], str | None] = lambda case: None
    ours: bool = True

    @property
    def name(self) -> str:
        """As in results."""
        return f"fsa-{self.backend}" + (f"-{self.question}" if self.question else "")

    def unavailable(self, case: FeatureCase, device: torch.device) -> str | None:
        """The backend's own reasons; of the reference, its memory."""
        return self.missing(case) or batched.unavailable(self.backend, case.scores)

    def prepare(self, case: FeatureCase, inputs: Question) -> Prepared:
        """The public calls."""
        return self.build(case, inputs, self.backend)


@dataclass(frozen=True)
class Other:
    """Another project's call.

    Attributes:
        name: as in results.
        build: `(case, question)` -> what is timed.
        missing: `(case, device)` -> why it takes no part; None = it does.
        question: the question that it answers; "" = the case's.
    """

    name: str
    build: Callable[[Any, Any], Prepared]
    missing: Callable[[Any, torch.device], str | None]
    question: str = ""
    ours: bool = False

    def unavailable(self, case: FeatureCase, device: torch.device) -> str | None:
        """Whatever stands against it."""
        return self.missing(case, device)

    def prepare(self, case: FeatureCase, inputs: Question) -> Prepared:
        """Its call."""
        return self.build(case, inputs)


Baselines = dict[str, tuple[Prepare, Callable[[Any], str | None]]]
"""Question -> what prepares it, and why it has no meaning beside a case."""


def ours(build: Prepare, baselines: Baselines | None = None) -> tuple[Peer, ...]:
    """Every backend of ours and the reference, each followed by its baselines."""
    return tuple(
        contender
        for backend in (*registry.names(), registry.REFERENCE)
        for contender in (
            Ours(backend, build),
            *(Ours(backend, *parts) for parts in _parts(baselines or {})),
        )
    )


def always(case: FeatureCase) -> None:
    """Of a baseline that has a meaning beside every case."""


def cuda_only(device: torch.device) -> str | None:
    """Why a peer whose kernels exist on CUDA devices only takes no part."""
    return None if device.type == "cuda" else f"needs a CUDA device, tensors are on {device.type}"


def flex(question: Question, block_mask: BlockMask, setup_ms: float, **options: Any) -> Prepared:
    """Compiled FlexAttention, compiled afresh so that no limit on recompilation is met."""
    torch._dynamo.reset()
    # The timed backward retains its graph, which donated buffers forbid.
    torch._functorch.config.donated_buffer = False
    compiled = torch.compile(flex_attention, dynamic=False, fullgraph=True)
    grouped = question.q.shape[2] != question.k.shape[2]

    def forward() -> Tensor:
        q, k, v = (heads_first(x) for x in (question.q, question.k, question.v))
        o = compiled(q, k, v, block_mask=block_mask, enable_gqa=grouped, **options)
        return heads_first(o)

    notes = ("the block mask is built outside of the timing",)
    return Prepared(forward, setup_ms=setup_ms, notes=notes)


def _parts(baselines: Baselines) -> list[tuple[Prepare, str, Callable[[Any], str | None]]]:
    return [(build, question, missing) for question, (build, missing) in baselines.items()]
