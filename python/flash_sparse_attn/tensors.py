"""The tensor arguments of one attention call, in the form every backend reads them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import NamedTuple

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class AttentionTensors:
    """Tensors of a validated call; shapes as in `spec/attention.md`, B Sq Sk Hq Hkv D Dv.

    Attributes:
        q: `[B, Sq, Hq, D]`, packed `[Tq, Hq, D]`.
        k: `[B, Sk, Hkv, D]`, packed `[Tk, Hkv, D]`, paged `[pages, page, Hkv, D]`.
        v: as k, last dim Dv.
        mask: bool, 4-D broadcast (V3); or its bits, int32 words of 32 keys, where the option
            `mask_keys` says so.
        bias: dtype of q or float32, 4-D broadcast (S4).
        interval_start: int32 `[{B,1}, {Hkv,1}, Sk]` (V4).
        interval_end: int32, as `interval_start`.
        block_map: bool `[{B,1}, {Hq,Hkv,1}, row blocks, key blocks]` (V5).
        gate_q: `[B, Sq, Hq]` (S3).
        gate_k: `[B, Sk, Hkv]` (S3).
        cu_seqlens_q: int32 `[sequences + 1]` (V6, packed).
        cu_seqlens_k: int32 `[sequences + 1]` (V6, packed).
        cache_seqlens: int32 `[B]` (V6, cache).
        page_table: int32 `[B, pages per sequence]` (V6, cache).
        key_indices: int32 `[B, Hkv, n]`, -1 padded (V6, cache).
    """

    q: Tensor
    k: Tensor
    v: Tensor
    mask: Tensor | None = None
    bias: Tensor | None = None
    interval_start: Tensor | None = None
    interval_end: Tensor | None = None
    block_map: Tensor | None = None
    gate_q: Tensor | None = None
    gate_k: Tensor | None = None
    cu_seqlens_q: Tensor | None = None
    cu_seqlens_k: Tensor | None = None
    cache_seqlens: Tensor | None = None
    page_table: Tensor | None = None
    key_indices: Tensor | None = None

    def present(self) -> Iterator[tuple[str, Tensor]]:
        """Yield `(name, tensor)` for every tensor that was given."""
        for name in TENSOR_NAMES:
            tensor = getattr(self, name)
            if tensor is not None:
                yield name, tensor


class Layout(NamedTuple):
    """All that a call is checked by of a tensor, and hashable where no size is symbolic."""

    shape: torch.Size
    dtype: torch.dtype
    device: torch.device

    @classmethod
    def of(cls, tensor: Tensor) -> Layout:
        """That of a tensor."""
        return cls(tensor.shape, tensor.dtype, tensor.device)

    def dim(self) -> int:
        """Number of dims, as a tensor tells it."""
        return len(self.shape)


TENSOR_NAMES = tuple(field.name for field in fields(AttentionTensors))
"""Field names, in the order in which the operators take them."""

DIFFERENTIABLE = ("q", "k", "v", "bias", "gate_q", "gate_k")
"""Tensors that can require a gradient (G1), in the order in which gradients are returned."""
