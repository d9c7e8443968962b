"""Sequences of uneven lengths, packed end to end (V6), causal or with top-w keys a row (M5)."""

from __future__ import annotations

import importlib
import time
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask

from flash_sparse_attn import (
    IntervalMask,
    flash_sparse_attn_func,
    flash_sparse_attn_varlen_func,
)

from ..peers import Peer, Prepared
from ..peers.flash_attention_4 import MODULE as FLASH_ATTENTION_4
from ..timing import synchronize
from .contenders import Other, always, cuda_only, flex, ours
from .question import FeatureCase, Normal, Question

QUANTITIES = ("forward", "backward")
STEP = 128
"""The dense batched form has a length that tiles divide, if it is long enough."""


@dataclass(frozen=True, kw_only=True)
class Case(FeatureCase):
    """`seqlen` tokens in all; `batch` sequences of it each where `lengths` is empty.

    Attributes:
        lengths: tokens of every sequence, `seqlen` together; empty = the batched form.
        window_size: w, keys that a row keeps by float32 scores `[1, Hkv, tokens]`; None = all.
    """

    lengths: tuple[int, ...] = ()
    window_size: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.lengths and (sum(self.lengths), self.batch) != (self.seqlen, 1):
            raise ValueError(f"lengths: got {sum(self.lengths)} tokens, expected {self.seqlen}")
        if not self.causal:
            raise ValueError("causal: got false, expected true")

    @property
    def name(self) -> str:
        """One line that tells cases apart."""
        words = [f"B{self.batch} S{self.seqlen} {self.heads} causal"]
        if self.lengths:
            spread = f"{min(self.lengths)}..{max(self.lengths)}"
            words = [
                f"{len(self.lengths)} sequences of {spread} T{self.seqlen} {self.heads} causal"
            ]
        words += [f"topk({self.window_size})"] if self.window_size else []
        return " ".join(words)

    @property
    def pairs(self) -> int:
        """Causal pairs of a head; the mask hides some of them."""
        lengths = self.lengths or (self.seqlen,) * self.batch
        return sum(length * (length + 1) // 2 for length in lengths)

    @property
    def batched(self) -> Case:
        """Sequences of one length, about as many causal pairs and about as many tokens."""
        length = round(sum(n * n for n in self.lengths) / self.seqlen)
        if length > STEP:
            length = round(length / STEP) * STEP
        batch = max(1, round(2 * self.pairs / (length * (length + 1))))
        return replace(self, batch=batch, seqlen=length, lengths=())


@dataclass(frozen=True, eq=False, kw_only=True)
class Sequences(Question):
    """Packed sequences as a batch of one, `[1, T, H, D]`; or the batched form.

    Attributes:
        cu_seqlens: int32 `[sequences + 1]`; None of the batched form.
        scores: float32 `[B, Hkv, S]`; None without top-w.
        start, end: int32 `[B, Hkv, S]`, V4, rows counted inside the own sequence; as `scores`.
    """

    cu_seqlens: Tensor | None
    scores: Tensor | None
    start: Tensor | None
    end: Tensor | None

    def visibility(self, rows: Tensor) -> Tensor:
        """V1, V4 and V6."""
        seen, own = super().visibility(rows), rows
        if self.cu_seqlens is not None:
            documents = self.documents
            seen = seen & (documents[rows][:, None] == documents)
            own = rows - self.cu_seqlens[documents[rows]]
        if self.start is not None:
            i = own[:, None]
            seen = seen & (self.start[:, :, None] <= i) & (i < self.end[:, :, None])
        return seen

    @property
    def documents(self) -> Tensor:
        """int64 `[T]`: the sequence of every token."""
        tokens = torch.arange(self.q.shape[1], device=self.q.device)
        return torch.searchsorted(self.cu_seqlens[1:].long(), tokens, right=True)


def build(case: Case, device: torch.device, requires_grad: bool) -> Sequences:
    """Random tensors; intervals are selected sequence by sequence."""
    normal = Normal(case, device, requires_grad)
    cu_seqlens = scores = start = end = None
    if case.lengths:
        bounds = torch.tensor((0, *case.lengths), device=device).cumsum(0)
        cu_seqlens = bounds.int()
    if case.window_size is not None:
        scores = normal(case.batch, case.heads_kv, case.seqlen, dtype=torch.float32)
        of_each = scores.split(case.lengths or case.seqlen, dim=2)
        chosen = [IntervalMask.topk(x, case.window_size) for x in of_each]
        start = torch.cat([mask.start for mask in chosen], dim=2)
        end = torch.cat([mask.end for mask in chosen], dim=2)
    return Sequences(
        **normal.qkv(case.batch, case.seqlen, case.seqlen),
        causal=case.causal,
        cu_seqlens=cu_seqlens,
        scores=scores,
        start=start,
        end=end,
    )


def peers() -> tuple[Peer, ...]:
    """Ours, its batched form, FlashAttention-4's packed call, FlexAttention's documents."""
    return (
        *ours(_ours, {"batched": (_batched, always)}),
        Other("flash-attn-4", _flash_attention_4, _no_flash_attention_4),
        Other("flex", _flex, _no_flex),
    )


def _ours(case: Case, inputs: Sequences, backend: str) -> Prepared:
    cu_seqlens, longest = inputs.cu_seqlens, max(case.lengths)
    mask = None
    if inputs.scores is not None:
        mask = IntervalMask.topk(inputs.scores, case.window_size, cu_seqlens=cu_seqlens)

    def forward() -> Tensor:
        o = flash_sparse_attn_varlen_func(
            *(x.flatten(0, 1) for x in (inputs.q, inputs.k, inputs.v)),
            cu_seqlens,
            cu_seqlens,
            longest,
            longest,
            attn_mask=mask,
            is_causal=inputs.causal,
            backend=backend,
        )
        return o[None]

    return Prepared(forward)


def _batched(case: Case, inputs: Sequences, backend: str) -> Prepared:
    other = case.batched
    own = build(other, inputs.q.device, inputs.q.requires_grad)
    mask = None
    if own.scores is not None:
        mask = IntervalMask.topk(own.scores, other.window_size)

    def forward() -> Tensor:
        return flash_sparse_attn_func(
            own.q, own.k, own.v, attn_mask=mask, is_causal=own.causal, backend=backend
        )

    share = other.pairs / case.pairs
    note = f"{other.name}: {share:.4f} x the causal pairs of the packed form"
    return Prepared(forward, answers=(other, own), notes=(note,))


def _no_flash_attention_4(case: Case, device: torch.device) -> str | None:
    if case.window_size:
        return "takes no intervals"
    try:
        importlib.import_module(FLASH_ATTENTION_4)
    except ImportError as error:
        return f"not importable: {error}; install: pip install flash-attn-4"
    return cuda_only(device)


def _flash_attention_4(case: Case, inputs: Sequences) -> Prepared:
    attention = importlib.import_module(FLASH_ATTENTION_4).flash_attn_varlen_func
    longest = max(case.lengths)

    def forward() -> Tensor:
        answer = attention(
            *(x.flatten(0, 1) for x in (inputs.q, inputs.k, inputs.v)),
            cu_seqlens_q=inputs.cu_seqlens,
            cu_seqlens_k=inputs.cu_seqlens,
            max_seqlen_q=longest,
            max_seqlen_k=longest,
            causal=inputs.causal,
        )
        return (answer[0] if isinstance(answer, tuple) else answer)[None]

    return Prepared(forward)


def _no_flex(case: Case, device: torch.device) -> str | None:
    if case.window_size:
        return "compared on all keys of a sequence"
    return cuda_only(device)


def _flex(case: Case, inputs: Sequences) -> Prepared:
    documents, device = inputs.documents, inputs.q.device
    create = torch.compile(create_block_mask, dynamic=False)  # a mask of pairs would not fit

    def rule(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return (documents[i] == documents[j]) & (j <= i)

    for _ in range(2):  # the first compiles
        synchronize(device)
        start = time.perf_counter()
        block_mask = create(rule, None, None, case.seqlen, case.seqlen, device=device)
        synchronize(device)
        setup_ms = 1e3 * (time.perf_counter() - start)
    return flex(inputs, block_mask, setup_ms)
