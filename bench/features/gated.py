"""Gates (S3), and pruning by them (V7)."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from flash_sparse_attn import flash_sparse_attn_func, reference

from ..peers import Peer, Prepared
from .contenders import always, ours
from .question import FeatureCase, Normal, Question

QUANTITIES = ("forward", "backward")

PRUNED = (None, "runs", "iid")
RUN = 128
SHARE = 0.75
"""Share of the keys whose gate is closed."""

CLOSED = -30.0
"""delta of a closed key; that of an open one is normal, and alpha is uniform in [0.5, 1.5]."""


@dataclass(frozen=True, kw_only=True)
class Case(FeatureCase):
    """Self-attention with logsigmoid gates that are trained.

    Attributes:
        gated: whether there are gates.
        pruned: which keys are closed, `SHARE` of them: None, none; "runs", runs of `RUN` keys;
            "iid", keys one by one. Every key-value head has its own.
        gate_threshold: γ of V7, which hides closed keys from every row that sees an open one.
    """

    gated: bool = True
    pruned: str | None = None
    gate_threshold: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.pruned not in PRUNED:
            raise ValueError(f"pruned: got {self.pruned!r}, expected one of {PRUNED}")
        if self.gate_threshold and not self.gated:
            raise ValueError(f"gate_threshold: got {self.gate_threshold} without gates")

    @property
    def name(self) -> str:
        """One line that tells cases apart."""
        words = [f"B{self.batch} S{self.seqlen} {self.heads}"]
        words += ["causal"] if self.causal else []
        words += ["gates"] if self.gated else []
        words += [f"closed={self.pruned}"] if self.pruned else []
        words += [f"gate-threshold={self.gate_threshold:g}"] if self.gate_threshold else []
        return " ".join(words)

    @property
    def leaves(self) -> tuple[str, ...]:
        """Inputs whose gradients the backward computes."""
        return ("q", "k", "v", "gate_q", "gate_k") if self.gated else ("q", "k", "v")


@dataclass(frozen=True, eq=False, kw_only=True)
class Gates(Question):
    """`gate_q` `[B, S, Hq]` and `gate_k` `[B, S, Hkv]`, None without gates; `threshold`: γ."""

    gate_q: Tensor | None
    gate_k: Tensor | None
    threshold: float

    def terms(self, rows: Tensor, dtype: torch.dtype) -> dict[str, Any]:
        """V1, S3, V7."""
        terms: dict[str, Any] = super().terms(rows, dtype)
        if self.gate_q is not None:
            gates = {"gate_q": self.gate_q[:, rows].to(dtype), "gate_k": self.gate_k.to(dtype)}
            terms |= gates | {"gate_threshold": self.threshold}
        return terms

    @cached_property
    def pairs(self) -> int:
        """Visible pairs, V7 included."""
        return self.count(self._after_pruning if self.threshold else self.visibility)

    def _after_pruning(self, rows: Tensor) -> Tensor:
        # V7 does not look at the products, so q and k may be anything.
        q = self.q.new_zeros((self.q.shape[0], len(rows), self.q.shape[2], 1))
        k = self.k.new_zeros((*self.k.shape[:3], 1))
        terms = self.terms(rows, torch.float32) | {"softmax_scale": self.q.shape[3] ** -0.5}
        with torch.no_grad():
            return reference.final_probability(q.float(), k.float(), **terms)[1]


def build(case: Case, device: torch.device, requires_grad: bool) -> Gates:
    """Random tensors."""
    normal = Normal(case, device, requires_grad)
    tensors = normal.qkv(case.batch, case.seqlen, case.seqlen)
    gate_q = gate_k = None
    if case.gated:
        size = (case.batch, case.seqlen)
        gate_q = torch.rand((*size, case.heads_q), generator=normal.generator, device=device) + 0.5
        gate_k = normal(*size, case.heads_kv)
        if case.pruned:
            each = RUN if case.pruned == "runs" else 1
            runs = (case.batch, -(-case.seqlen // each), case.heads_kv)
            order = torch.rand(runs, generator=normal.generator, device=device).argsort(1)
            closed = order < SHARE * runs[1]
            closed = closed.repeat_interleave(each, 1)[:, : case.seqlen]
            gate_k = gate_k.masked_fill(closed, CLOSED)
        gate_q, gate_k = normal.leaf(gate_q.to(gate_k.dtype)), normal.leaf(gate_k)
    return Gates(
        **tensors,
        causal=case.causal,
        gate_q=gate_q,
        gate_k=gate_k,
        threshold=case.gate_threshold,
    )


def peers() -> tuple[Peer, ...]:
    """Ours, the same call without pruning, and without gates."""
    return ours(_ours, {"unpruned": (_unpruned, _only_of_pruned), "dense": (_dense, always)})


def _only_of_pruned(case: Case) -> str | None:
    return None if case.gate_threshold else "nothing is pruned"


def _ours(case: Case, inputs: Gates, backend: str) -> Prepared:
    gates = (inputs.gate_q, inputs.gate_k) if case.gated else None

    def forward() -> Tensor:
        return flash_sparse_attn_func(
            inputs.q,
            inputs.k,
            inputs.v,
            is_causal=inputs.causal,
            gates=gates,
            gate_threshold=inputs.threshold,
            backend=backend,
        )

    return Prepared(forward)


def _unpruned(case: Case, inputs: Gates, backend: str) -> Prepared:
    question = replace(case, gate_threshold=0.0), replace(inputs, threshold=0.0)
    return replace(_ours(*question, backend), answers=question)


def _dense(case: Case, inputs: Gates, backend: str) -> Prepared:
    question = (
        replace(case, gated=False, pruned=None, gate_threshold=0.0),
        replace(inputs, gate_q=None, gate_k=None, threshold=0.0),
    )
    return replace(_ours(*question, backend), answers=question)
