"""The tensors of a case, which pairs they make visible, and what that costs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from flash_sparse_attn import IntervalMask
from flash_sparse_attn.utils.mask import create_mask

from .cases import Case
from .features.question import FeatureCase

ROWS_AT_ONCE = 1024
"""Rows whose visibility is held as bools at a time."""

BACKWARD_FACTOR = 2.5
"""Five matrix products against two."""


@dataclass(frozen=True, eq=False)
class Inputs:
    """What every contender is given. Layout `[B, S, H, D]`, contiguous, normal values.

    Attributes:
        q, k, v, do: `[B, S, Hq, D]`, `[B, S, Hkv, D]` twice, `[B, S, Hq, D]`.
        causal: V1, on top of the mask.
        mask: bool `[1, {Hkv,1}, {S,1}, S]`, None if there is none or it is given as intervals.
        intervals: the mask as V4, for the form "intervals".
        scores: `[1, {Hkv,1}, S]`, what "keys" and "topk" choose by.
        bias: `[1, {Hkv,1}, {S,1}, S]`.
        visible: int64 `[{Hkv,1}, S]`, number of keys that each row sees.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    do: Tensor
    causal: bool
    mask: Tensor | None
    intervals: IntervalMask | None
    scores: Tensor | None
    bias: Tensor | None
    visible: Tensor

    @property
    def pairs(self) -> int:
        """Visible pairs over all batches and query heads."""
        heads = self.q.shape[2] // self.visible.shape[0]
        return int(self.visible.sum()) * self.q.shape[0] * heads

    @property
    def nbytes(self) -> int:
        """Bytes of what an attention call is given, do included."""
        given = [self.q, self.k, self.v, self.do, self.mask, self.bias]
        if self.intervals is not None:
            given += [self.intervals.start, self.intervals.end]
        return sum(x.nbytes for x in given if x is not None)

    def nbytes_of_results(self, names: tuple[str, ...]) -> int:
        """Bytes of o and of the gradients of the named inputs."""
        return self.do.nbytes + sum(x.nbytes for x in self.leaves(names))

    def leaves(self, names: tuple[str, ...]) -> tuple[Tensor, ...]:
        """The named inputs, for `torch.autograd.grad`."""
        return tuple(getattr(self, name) for name in names)

    def visibility(self, rows: Tensor) -> Tensor:
        """Bool `[1, {Hkv,1}, rows, S]`: the V rules of the case for the given rows."""
        return visibility(rows, self.q.shape[1], self.causal, self.mask, self.intervals)

    @property
    def seeing(self) -> Tensor:
        """Bool `[S]`: rows that see a key in every head."""
        return (self.visible > 0).all(0)

    @property
    def traffic(self) -> None:
        """Products bound these calls, not the bytes that they read."""

    def terms(self, rows: Tensor, dtype: torch.dtype) -> dict[str, Any]:
        """Keywords of the reference for the given rows, floating tensors in `dtype`."""
        terms = {"mask": self.visibility(rows)}
        if self.bias is not None:
            bias = self.bias if self.bias.shape[2] == 1 else self.bias[:, :, rows]
            terms["bias"] = bias.to(dtype)
        return terms


def build(
    case: Case, device: torch.device, requires_grad: bool, scores: Tensor | None = None
) -> Inputs:
    """Random inputs of a case; `requires_grad` for those in `case.leaves`.

    Args:
        case: the case.
        device: where they are made.
        requires_grad: whether gradients are wanted.
        scores: float32 `[1, Hkv, S]` for a case that is `per_head`; None = normal ones.
    """
    generator = torch.Generator(device).manual_seed(case.seed)
    dtype = getattr(torch, case.dtype)

    def normal(*shape: int, name: str = "", dtype: torch.dtype = dtype) -> Tensor:
        tensor = torch.randn(shape, generator=generator, device=device, dtype=dtype)
        return tensor.requires_grad_(requires_grad and name in case.leaves)

    batch, length, dim = case.batch, case.seqlen, case.head_dim
    bias = None
    if case.per_head:
        if scores is None:
            scores = normal(1, case.heads_kv, length, dtype=torch.float32)
        scores = scores.to(device)
        if case.bias:
            bias = scores.unsqueeze(2).requires_grad_(requires_grad and "bias" in case.leaves)
    else:
        if case.bias:
            rows = {"key": 1, "pair": length}[case.bias]
            bias = normal(1, 1, rows, length, name="bias")
        scores = bias.detach()[:, :, 0] if case.bias == "key" else normal(1, 1, length)
    mask, intervals = _mask(case, scores, generator)
    return Inputs(
        q=normal(batch, length, case.heads_q, dim, name="q"),
        k=normal(batch, length, case.heads_kv, dim, name="k"),
        v=normal(batch, length, case.heads_kv, dim, name="v"),
        do=normal(batch, length, case.heads_q, dim),
        causal=case.causal,
        mask=mask,
        intervals=intervals,
        scores=scores if case.mask in ("keys", "topk") else None,
        bias=bias,
        visible=_visible(case, mask, device),
    )


def visibility(
    rows: Tensor, length: int, causal: bool, mask: Tensor | None, intervals: IntervalMask | None
) -> Tensor:
    """Bool `[1, {Hkv,1}, rows, length]` (V1, V3, V4), for Sq = Sk = `length`."""
    i, j = rows[:, None], torch.arange(length, device=rows.device)
    seen = (j <= i) if causal else rows.new_ones((len(rows), length), dtype=torch.bool)
    seen = seen[None, None]
    if mask is not None:
        seen = seen & (mask if mask.shape[2] == 1 else mask[:, :, rows])
    if intervals is not None:
        seen = seen & (intervals.start[:, :, None] <= i) & (i < intervals.end[:, :, None])
    return seen


def flops(case: Case | FeatureCase, pairs: int) -> dict[str, float]:
    """Floating-point operations on visible pairs, by quantity timed.

    Forward: two products, 2 D operations each a pair. Causal counts exactly the visible pairs,
    S (S + 1) / 2 a head. Backward: 2.5 times the forward. A selection has none.
    """
    forward = 4.0 * case.head_dim * pairs
    return {
        "forward": forward,
        "backward": BACKWARD_FACTOR * forward,
        "forward+backward": (1 + BACKWARD_FACTOR) * forward,
        "end to end": (1 + BACKWARD_FACTOR) * forward,
    }


def _mask(
    case: Case, scores: Tensor, generator: torch.Generator
) -> tuple[Tensor | None, IntervalMask | None]:
    """`(mask, intervals)` of a case; `scores` `[1, {Hkv,1}, S]`."""
    length, width = case.seqlen, case.window_size
    if case.mask == "keys":
        return create_mask(scores[:, :, None], length, window_size=width), None
    if case.mask == "random":
        empty = torch.empty((1, 1, length, length), dtype=torch.bool, device=scores.device)
        return empty.bernoulli_(case.density, generator=generator), None
    if case.mask == "topk":
        intervals = IntervalMask.topk(scores, width)
        if case.mask_form == "intervals":
            return None, intervals
        dense = [
            visibility(rows, length, False, None, intervals)
            for rows in torch.arange(length, device=scores.device).split(ROWS_AT_ONCE)
        ]
        return torch.cat(dense, dim=2), None
    return None, None


def _visible(case: Case, mask: Tensor | None, device: torch.device) -> Tensor:
    """`Inputs.visible`, in closed form wherever the mask does not give pairs at random."""
    length = case.seqlen
    rows = torch.arange(length, device=device)[None]
    if case.mask == "random":
        chunks = rows[0].split(ROWS_AT_ONCE)
        counts = [visibility(chunk, length, case.causal, mask, None).sum(3) for chunk in chunks]
        return torch.cat(counts, dim=2)[0]
    if case.mask == "topk":
        return (rows + 1).clamp(max=case.window_size)
    if case.mask == "keys":
        kept = mask[0, :, 0].long()
        return kept.cumsum(1) if case.causal else kept.sum(1, keepdim=True).expand(-1, length)
    return rows + 1 if case.causal else torch.full_like(rows, length)
