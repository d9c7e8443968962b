"""Calls of which only visibility matters, and their tiles by brute force over pairs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from flash_sparse_attn.reference.terms import Terms
from flash_sparse_attn.reference.visibility import visible_pairs
from torch import Tensor
from torch.nn import functional as F

from flash_sparse_attn.problem import AttentionOptions
from flash_sparse_attn.tensors import AttentionTensors
from flash_sparse_attn.validation import describe

from .calls import Draw


class Call:
    """A call of random q, k and v.

    Attributes:
        tensors, options, problem: of the call.
        visible: which pairs are visible, bool [B, Hq, Sq, Sk].
    """

    def __init__(
        self,
        seqlen_q: int,
        seqlen_k: int,
        batch: int = 1,
        heads: tuple[int, int] = (1, 1),
        tensors: Mapping[str, Tensor] | None = None,
        dim: int = 1,
        dtype: torch.dtype = torch.float32,
        **options: Any,
    ) -> None:
        tensors = dict(tensors or {})
        q, k, v = Draw.seeded(0).qkv(batch, seqlen_q, seqlen_k, heads, dim, dtype)
        self.tensors = AttentionTensors(q, k, v, **tensors)
        self.options = AttentionOptions(**options)
        self.problem = describe(self.tensors, self.options)
        options.pop("keys_per_row", None)
        window = options.pop("window_left", None), options.pop("window_right", None)
        visible = visible_pairs(q, k, Terms(window=window, **options, **tensors))
        self.visible = visible.expand(batch, heads[0], seqlen_q, seqlen_k)


def blocks(pairs: Tensor, rows: int, keys: int, fill: bool) -> Tensor:
    """[.., Sq, Sk] as [.., row blocks, key blocks, rows * keys], padded with `fill`."""
    seqlen_q, seqlen_k = pairs.shape[-2:]
    pairs = F.pad(pairs, (0, -seqlen_k % keys, 0, -seqlen_q % rows), value=fill)
    pairs = pairs.unflatten(-1, (-1, keys)).unflatten(-3, (-1, rows))
    return pairs.transpose(-3, -2).flatten(-2)


def tiles_with_something(pairs: Tensor, rows: int, keys: int) -> Tensor:
    """Tiles [.., row tiles, key tiles] that hold a visible pair."""
    return blocks(pairs, rows, keys, False).any(-1)


def tiles_with_everything(pairs: Tensor, rows: int, keys: int) -> Tensor:
    """Tiles that reach past neither length and hide nothing."""
    return blocks(pairs, rows, keys, False).all(-1)


def classes_of(pairs: Tensor, rows: int, keys: int) -> Tensor:
    """Class of each block by the pairs of it that exist."""
    some, every = blocks(pairs, rows, keys, False).any(-1), blocks(pairs, rows, keys, True).all(-1)
    return some.int() + (some & every)
