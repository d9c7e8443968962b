"""The softmax threshold (T1): its cost where nothing can be dropped, what it saves elsewhere."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from flash_sparse_attn import BlockMap, flash_sparse_attn_func, reference

from ..peers import Peer, Prepared
from .contenders import always, ours
from .question import FeatureCase, Normal, Question

QUANTITIES = ("forward", "backward")

SEGMENTS_SEEN = 5
"""Segments that a row attends to, its own included, besides the sinks."""

SINKS = 128
GAP = 14.0
"""What a score loses outside of a row's segments; normal scores spread by less than 1 around it."""

GROUPS = 8
"""Groups of rows on which the droppable share is computed, and the lost mass."""


@dataclass(frozen=True, kw_only=True)
class Case(FeatureCase):
    """Self-attention with a threshold.

    Attributes:
        threshold: a of T1.
        structured: whether scores depend on places. Every head cuts the tokens into D / 4 segments
            of one length, from an offset of its own. A row scores its own segment, the
            `SEGMENTS_SEEN` - 1 before and the first `SINKS` tokens as normal inputs do, all else
            lower by `GAP`. Otherwise q and k are normal and nothing can be dropped.
    """

    threshold: float
    structured: bool = False

    @property
    def name(self) -> str:
        """One line that tells cases apart."""
        words = [f"B{self.batch} S{self.seqlen} {self.heads}"]
        words += ["causal"] if self.causal else []
        words += [f"threshold={self.threshold:g}"] if self.threshold else []
        words += ["structured"] if self.structured else []
        return " ".join(words)


@dataclass(frozen=True, eq=False, kw_only=True)
class Kept(Question):
    """The function computed: `kept` is its set of blocks, None before one is known."""

    kept: BlockMap | None

    def terms(self, rows: Tensor, dtype: torch.dtype) -> dict[str, Tensor]:
        """V1, and T1 replayed."""
        terms = super().terms(rows, dtype)
        return terms if self.kept is None else terms | {"kept": self.elements(rows)}

    def elements(self, rows: Tensor) -> Tensor:
        """Bool `[B, Hq, rows, Sk]`: what is kept."""
        of_rows, of_keys = self.kept.block_size
        blocks = self.kept.active[:, :, rows // of_rows]
        return blocks.repeat_interleave(of_keys, 3)[..., : self.k.shape[1]]


def build(case: Case, device: torch.device, requires_grad: bool) -> Kept:
    """Random tensors, with structure if the case has it."""
    normal = Normal(case, device, requires_grad=False)
    tensors = normal.qkv(case.batch, case.seqlen, case.seqlen)
    if case.structured:
        _structure(case, tensors["q"], tensors["k"])
    for name in case.leaves:
        tensors[name].requires_grad_(requires_grad)
    return Kept(**tensors, causal=case.causal, kept=None)


def peers() -> tuple[Peer, ...]:
    """Ours, and the same call without a threshold."""
    return ours(_ours, {"dense": (_dense, always)})


def _structure(case: Case, q: Tensor, k: Tensor) -> None:
    """Write codes of segments into the first dims of q and k, which are one-hot in k."""
    segments = case.head_dim // 4
    length = math.ceil(case.seqlen / segments)
    code = math.sqrt(GAP) * case.head_dim**0.25  # squared, and scaled by c, it is the gap
    tokens = torch.arange(case.seqlen, device=q.device)
    places = torch.arange(segments, device=q.device)
    for head in range(case.heads_kv):
        offset = 37 * head % length
        segment = ((tokens + offset) // length % segments)[:, None]
        group = case.heads_q // case.heads_kv
        rows = slice(head * group, (head + 1) * group)
        k[:, :, head, :segments] = (code * (places == segment)).to(k.dtype)
        k[:, :, head, segments] = (code * (tokens < SINKS)).to(k.dtype)
        back = (segment - places) % segments
        seen = (code * (back < SEGMENTS_SEEN)).to(q.dtype)
        q[:, :, rows, :segments] = seen[:, None]
        q[:, :, rows, segments] = code


def _ours(case: Case, inputs: Kept, backend: str) -> Prepared:
    def attend(**wanted: bool) -> Tensor | tuple[Tensor, BlockMap]:
        return flash_sparse_attn_func(
            inputs.q,
            inputs.k,
            inputs.v,
            is_causal=inputs.causal,
            softmax_threshold=case.threshold,
            backend=backend,
            **wanted,
        )

    with torch.no_grad():
        _, kept = attend(return_kept=True)
        own = replace(inputs, kept=kept)
        mass, droppable = _sampled(case, own)
    figures = {"dropped": _dropped(own), "droppable": droppable}
    return Prepared(attend, answers=(case, own), errors={"mass": mass}, figures=figures)


def _dense(case: Case, inputs: Kept, backend: str) -> Prepared:
    def forward() -> Tensor:
        return flash_sparse_attn_func(
            inputs.q, inputs.k, inputs.v, is_causal=inputs.causal, backend=backend
        )

    return Prepared(forward, answers=(replace(case, threshold=0.0), inputs))


def _dropped(inputs: Kept) -> float:
    """Share of the blocks with a visible pair that are dropped."""
    of_rows, of_keys = inputs.kept.block_size
    kept = inputs.kept.active
    seen = torch.ones_like(kept[0, 0])
    if inputs.causal:
        last = torch.arange(kept.shape[2], device=kept.device) * of_rows + of_rows - 1
        last = last.clamp(max=inputs.q.shape[1] - 1)
        seen = torch.arange(kept.shape[3], device=kept.device) * of_keys <= last[:, None]
    return float((~kept & seen).sum() / (seen.sum() * kept.shape[0] * kept.shape[1]))


def _sampled(case: Case, inputs: Kept) -> tuple[float, float]:
    """Of groups of rows: the largest mass that a row lost, in units of a; and the share of blocks
    with a visible pair that T1 lets be dropped.
    """
    of_rows, of_keys = inputs.kept.block_size
    groups = inputs.q.shape[1] // of_rows
    chosen = torch.linspace(0, groups - 1, min(GROUPS, groups), device=inputs.q.device).long()
    mass, spare, seen = 0.0, 0, 0
    for group in chosen.unique().tolist():
        rows = torch.arange(of_rows, device=inputs.q.device) + group * of_rows
        q, mask = inputs.q[:, rows].float(), inputs.visibility(rows)
        p, visible = reference.final_probability(q, inputs.k.float(), mask=mask)
        lost = torch.where(inputs.elements(rows), 0, p).sum(3)
        mass = max(mass, float(lost.max()) / case.threshold)
        blocks = (of_rows, of_keys)
        empty = reference.droppable(p, visible, 0.0, blocks)  # without a visible pair
        spare += int((reference.droppable(p, visible, case.threshold, blocks) & ~empty).sum())
        seen += int((~empty).sum())
    return mass, spare / seen
