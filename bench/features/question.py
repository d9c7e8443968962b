"""Sizes and tensors that the features share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..cases import DTYPES

SCORES_AT_ONCE = 2**28
"""Pairs whose visibility is held at a time."""


@dataclass(frozen=True, kw_only=True)
class FeatureCase:
    """One problem: B, Sk = S, Hq, Hkv, D, of a dtype; a feature adds what it is about.

    Attributes:
        batch, seqlen, heads_q, heads_kv, head_dim: sizes.
        dtype: "float32", "float16" or "bfloat16".
        causal: V1.
        sweep: the field that varies along a line of a plot, if any.
        seed: of the random inputs.

    Raises:
        ValueError: a field has no meaning, or none beside the others.
    """

    selects: ClassVar[bool] = False
    leaves: ClassVar[tuple[str, ...]] = ("q", "k", "v")

    seqlen: int
    heads_q: int
    heads_kv: int
    head_dim: int
    batch: int = 1
    dtype: str = "bfloat16"
    causal: bool = True
    sweep: str | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise ValueError(f"dtype: got {self.dtype!r}, expected one of {tuple(DTYPES)}")

    @property
    def heads(self) -> str:
        """ "H32/8 D128 bf16"."""
        shared = f"/{self.heads_kv}" if self.heads_kv != self.heads_q else ""
        return f"H{self.heads_q}{shared} D{self.head_dim} {DTYPES[self.dtype]}"

    @property
    def scores(self) -> int:
        """Scores of all pairs, visible or not: what the reference stores."""
        return self.batch * self.heads_q * self.seqlen**2

    def asdict(self) -> dict[str, Any]:
        """The fields, as they are written to a result."""
        return asdict(self)


@dataclass(frozen=True, eq=False, kw_only=True)
class Question:
    """Tensors, layout `[B, S, H, D]`, and which pairs of them are visible: here V1 alone.

    Attributes:
        q, k, v, do: `[B, Sq, Hq, D]`, `[B, Sk, Hkv, D]` twice, `[B, Sq, Hq, D]`.
        causal: V1.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    do: Tensor
    causal: bool

    def visibility(self, rows: Tensor) -> Tensor:
        """Bool `[{B,1}, {Hq,Hkv,1}, rows, Sk]`: the V rules but V7 for the given rows."""
        seqlen_q, seqlen_k = self.q.shape[1], self.k.shape[1]
        j = torch.arange(seqlen_k, device=rows.device)
        p = (rows + seqlen_k - seqlen_q)[:, None]
        seen = j <= p if self.causal else rows.new_ones((len(rows), seqlen_k), dtype=torch.bool)
        return seen[None, None]

    def terms(self, rows: Tensor, dtype: torch.dtype) -> dict[str, Any]:
        """Keywords of the reference for the given rows, floating tensors in `dtype`."""
        return {"mask": self.visibility(rows)}

    @property
    def seeing(self) -> Tensor:
        """Bool `[Sq]`: rows that see a key in every head."""
        return torch.ones(self.q.shape[1], dtype=torch.bool, device=self.q.device)

    @cached_property
    def pairs(self) -> int:
        """Visible pairs over all batches and query heads."""
        return self.count(self.visibility)

    @property
    def traffic(self) -> int | None:
        """Bytes of keys and values that a call must read, where that is what bounds it."""
        return None

    @property
    def nbytes(self) -> int:
        """Bytes of what an attention call is given, do included."""
        return sum(x.nbytes for x in vars(self).values() if isinstance(x, Tensor))

    def nbytes_of_results(self, names: tuple[str, ...]) -> int:
        """Bytes of o and of the gradients of the named inputs."""
        return self.do.nbytes + sum(x.nbytes for x in self.leaves(names))

    def leaves(self, names: tuple[str, ...]) -> tuple[Tensor, ...]:
        """The named inputs, for `torch.autograd.grad`."""
        return tuple(getattr(self, name) for name in names)

    def count(self, visibility: Callable[[Tensor], Tensor]) -> int:
        """True elements of `visibility` over all rows, batches and query heads."""
        batch, seqlen_q, heads_q = self.q.shape[:3]
        shape = visibility(torch.zeros(1, dtype=torch.int64, device=self.q.device)).shape
        each = max(1, SCORES_AT_ONCE // (shape[0] * shape[1] * self.k.shape[1]))
        chunks = torch.arange(seqlen_q, device=self.q.device).split(each)
        seen = sum(int(visibility(rows).sum()) for rows in chunks)
        return seen * (batch // shape[0]) * (heads_q // shape[1])


class Normal:
    """Normal tensors of a case, one after the other from its seed."""

    def __init__(self, case: FeatureCase, device: torch.device, requires_grad: bool) -> None:
        self.case, self.device, self.requires_grad = case, device, requires_grad
        self.generator = torch.Generator(device).manual_seed(case.seed)

    def __call__(self, *shape: int, leaf: bool = False, dtype: torch.dtype | None = None) -> Tensor:
        dtype = dtype or getattr(torch, self.case.dtype)
        x = torch.randn(shape, generator=self.generator, device=self.device, dtype=dtype)
        return self.leaf(x) if leaf else x

    def leaf(self, x: Tensor) -> Tensor:
        """The tensor as one whose gradient is wanted."""
        return x.requires_grad_(self.requires_grad)

    def qkv(self, batch: int, seqlen_q: int, seqlen_k: int) -> dict[str, Tensor]:
        """`q`, `k`, `v` and `do`."""
        case = self.case
        rows = (batch, seqlen_q, case.heads_q, case.head_dim)
        keys = (batch, seqlen_k, case.heads_kv, case.head_dim)
        return {
            "q": self(*rows, leaf=True),
            "k": self(*keys, leaf=True),
            "v": self(*keys, leaf=True),
            "do": self(*rows),
        }
