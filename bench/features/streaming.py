"""Streaming: a token through a cache of w keys a head, at a cost that no context changes."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from flash_sparse_attn import flash_sparse_attn_with_kvcache_func
from flash_sparse_attn.modules import DynamicMaskCache

from ..peers import Peer, Prepared
from . import decode
from .contenders import always, ours
from .question import FeatureCase, Normal, Question

QUANTITIES = ("forward",)


@dataclass(frozen=True, kw_only=True)
class Case(FeatureCase):
    """The token after `seqlen` others of each of `batch` sequences.

    Attributes:
        window_size: w, keys held for every key-value head.
        short: `seqlen` of the baseline `-short`.
    """

    window_size: int
    short: int

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.window_size <= self.short <= self.seqlen:
            got = f"{self.window_size}, {self.short}, {self.seqlen}"
            raise ValueError(f"window_size, short, seqlen: got {got}, expected them in order")
        if not self.causal:
            raise ValueError("causal: got false, expected true: the new token is the last")

    @property
    def name(self) -> str:
        """One line that tells cases apart."""
        return f"B{self.batch} S{self.seqlen} {self.heads} topk({self.window_size})"

    @property
    def scores(self) -> int:
        """Those of the baseline `-full`."""
        return self.batch * self.heads_q * self.seqlen


@dataclass(frozen=True, eq=False, kw_only=True)
class Step(Question):
    """`k` and `v` `[B, w + 1, Hkv, D]`: of the tokens held, then of the new one.

    Attributes:
        scores: float32 `[B, Hkv, w + 1]`, the new token's the highest.
        position: int32 `[B, Hkv, w]`, the tokens that the keys held are of, in random order.
    """

    scores: Tensor
    position: Tensor

    def visibility(self, rows: Tensor) -> Tensor:
        """M5: all but the worst."""
        seen = torch.ones_like(self.scores, dtype=torch.bool)
        seen.scatter_(2, self.scores.argmin(2, keepdim=True), False)
        return seen[:, :, None].expand(-1, -1, len(rows), -1)

    def terms(self, rows: Tensor, dtype: torch.dtype) -> dict[str, Any]:
        """M5, and the scores as bias (S4)."""
        return super().terms(rows, dtype) | {"bias": self.scores[:, :, None].to(dtype)}

    @property
    def traffic(self) -> int:
        """Keys and values that the row sees, each read once."""
        return 2 * self.position.numel() * self.k.shape[3] * self.k.itemsize


def build(case: Case, device: torch.device, requires_grad: bool) -> Step:
    """Random tensors; a cache has no gradient."""
    normal = Normal(case, device, requires_grad=False)
    planes = case.batch, case.heads_kv
    tensors = normal.qkv(case.batch, 1, case.window_size + 1)
    scores = normal(*planes, case.window_size + 1, dtype=torch.float32)
    scores[..., -1] = scores.amax(2) + 1
    order = torch.rand((*planes, case.seqlen), generator=normal.generator, device=device)
    position = order.topk(case.window_size).indices.int()
    return Step(**tensors, causal=case.causal, scores=scores, position=position)


def cache_before(case: Case, step: Step) -> DynamicMaskCache:
    """The cache that the new token meets: full, as `seqlen` tokens have left it."""
    sizes = case.batch, case.window_size, case.heads_kv, case.head_dim
    cache = DynamicMaskCache(*sizes, device=step.k.device, dtype=step.k.dtype)
    cache.admit(step.k[:, :-1], step.v[:, :-1], step.scores[..., :-1])
    # The tokens held, taken at once; these two then say how many came in between.
    cache.position.copy_(step.position)
    cache._seqlen.fill_(case.seqlen)
    return cache


def peers() -> tuple[Peer, ...]:
    """Ours, after a short context too; plain decoding over all keys of the context."""
    return ours(_ours, {"short": (_short, _only_of_longer), "full": (_full, always)})


def _only_of_longer(case: Case) -> str | None:
    return None if case.seqlen > case.short else "the case's own context is as short"


def _ours(case: Case, step: Step, backend: str) -> Prepared:
    cache = cache_before(case, step)
    # Better than all held: every call admits it, also once the cache holds nothing else.
    new = step.q, step.k[:, -1:], step.v[:, -1:], step.scores[..., -1:]
    figures = _figures(*vars(cache).values())
    return Prepared(lambda: cache.attend(*new, backend=backend), figures=figures)


def _short(case: Case, step: Step, backend: str) -> Prepared:
    other = replace(case, seqlen=case.short)
    step = build(other, step.q.device, requires_grad=False)
    return replace(_ours(other, step, backend), answers=(other, step))


def _full(case: Case, step: Step, backend: str) -> Prepared:
    other = decode.Case(**{x.name: getattr(case, x.name) for x in fields(FeatureCase)})
    cache = decode.build(other, step.q.device, requires_grad=False)

    def forward() -> Tensor:
        return flash_sparse_attn_with_kvcache_func(
            cache.q, cache.k, cache.v, cache_seqlens=cache.lengths, backend=backend
        )

    return Prepared(forward, answers=(other, cache), figures=_figures(cache.k, cache.v))


def _figures(*held: Tensor) -> dict[str, float]:
    return {"cache (MiB)": sum(x.nbytes for x in held) / 2**20}
