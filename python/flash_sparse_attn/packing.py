"""Packed sequences (V6): where they start, and their tokens in and out of a padded batch.

`flash_sparse_attn_varlen_func` takes sequences end to end, `[T, H, D]`, with the boundaries between
them. Here they come from what models have: a padding mask, or position ids that restart at 0.

    packing = Packing.from_mask(attention_mask)                      # bool [B, S]
    q, k, v = (packing.pack(x) for x in (q, k, v))                   # [B, S, H, D] -> [T, H, D]
    o = flash_sparse_attn_varlen_func(q, k, v, *packing.boundaries, is_causal=True)
    o = packing.unpack(o)                                            # [T, H, D] -> [B, S, H, D]

How many tokens there are, how many sequences, and the length of the longest are facts of the
device that Python must know, so by default the host waits for each. Bounds given instead of them
make everything here capturable in a CUDA graph: see the constructors.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from .validation import message, require_tensor


@dataclass(frozen=True, eq=False)
class Packing:
    """Sequences end to end.

    Attributes:
        cu_seqlens: int32 `[sequences + 1]`, first token of every sequence, then the last one's end.
        max_seqlen: tokens of the longest sequence, at least.
        indices: int64 `[T]`, place b * S + s in the padded batch of every token, each place at most
            once; None where there is no padded batch.
        padded_shape: `(B, S)`; None likewise.
    """

    cu_seqlens: Tensor
    max_seqlen: int
    indices: Tensor | None = None
    padded_shape: tuple[int, int] | None = None

    @classmethod
    def from_mask(
        cls, mask: Tensor, *, tokens: int | None = None, max_seqlen: int | None = None
    ) -> Packing:
        """The tokens that a padding mask marks; row b of the batch is sequence b.

        Padding may stand left, right, or between tokens, which keep their order. A row without a
        token is an empty sequence.

        Args:
            mask: bool or int `[B, S]`, nonzero = a token.
            tokens: T, at least as many as are marked, at most B * S. Places that are not marked
                fill up the rest: they lie past the last boundary, so attention gives 0 there (O2)
                and passes no gradient on. Default: as many as are marked, which the host waits for.
            max_seqlen: at least the length of the longest sequence; S always is. Default: that
                length, which the host waits for.

        Raises:
            TypeError: `mask` is not a tensor, or a bound not an int (E1).
            ValueError: `mask` is not 2-D (E2), or a bound is out of range (E6).
        """
        _require_rank("mask", mask, 2)
        places = mask.numel()
        if tokens is not None:
            _require_count("tokens", tokens, places)
        marked = mask != 0
        lengths = marked.sum(1, dtype=torch.int32)
        cu_seqlens = F.pad(lengths.cumsum(0, dtype=torch.int32), (1, 0))
        if tokens is None:
            indices = marked.flatten().nonzero().flatten()
        else:
            indices = (~marked).flatten().to(torch.uint8).argsort(stable=True)[:tokens]
        longest = _longest(lengths, max_seqlen, mask.shape[1])
        return cls(cu_seqlens, longest, indices, tuple(mask.shape))

    @classmethod
    def from_position_ids(
        cls,
        position_ids: Tensor,
        *,
        sequences: int | None = None,
        max_seqlen: int | None = None,
    ) -> Packing:
        """Tokens that are packed already: a sequence starts at every position 0, and at token 0.

        Args:
            position_ids: int `[T]` or `[1, T]`.
            sequences: at least as many as there are, at most T; the rest are empty ones at the end.
                Default: as many as there are, which the host waits for.
            max_seqlen: at least the length of the longest sequence; T always is. Default: that
                length, which the host waits for.

        Raises:
            TypeError: `position_ids` is not an integer tensor, or a bound not an int (E1, E3).
            ValueError: a shape is neither (E2), or a bound is out of range (E6).
        """
        require_tensor("position_ids", position_ids)
        if position_ids.is_floating_point() or position_ids.dtype == torch.bool:
            words = "an integer dtype"
            raise TypeError(message("E3", "dtype of position_ids", position_ids.dtype, words))
        shape = tuple(position_ids.shape)
        if not (len(shape) == 1 or (len(shape) == 2 and shape[0] == 1)):
            raise ValueError(message("E2", "shape of position_ids", shape, "[T] or [1, T]"))
        count = position_ids.numel()
        if sequences is not None:
            _require_count("sequences", sequences, count)
        token = torch.arange(count, device=position_ids.device)
        starts = (position_ids.flatten() == 0) | (token == 0)
        if sequences is None:
            cu_seqlens = F.pad(starts.nonzero().flatten(), (0, 1), value=count).int()
        else:
            # Tokens that start nothing write the end, which is what stands there.
            place = torch.where(starts, starts.cumsum(0) - 1, sequences).clamp(max=sequences)
            ends = torch.full((sequences + 1,), count, device=token.device)
            first = torch.where(place < sequences, token, count)
            cu_seqlens = ends.scatter_(0, place, first).int()
        longest = _longest(cu_seqlens.diff(), max_seqlen, count)
        return cls(cu_seqlens, longest)

    @property
    def boundaries(self) -> tuple[Tensor, Tensor, int, int]:
        """The four arguments of `flash_sparse_attn_varlen_func` after value, for self-attention."""
        return self.cu_seqlens, self.cu_seqlens, self.max_seqlen, self.max_seqlen

    def pack(self, padded: Tensor) -> Tensor:
        """`[B, S, ...]` -> `[T, ...]`, differentiable.

        Raises:
            TypeError: not a tensor (E1).
            ValueError: the first dims are not B and S (E2), or there is no padded batch (E8).
        """
        batch, seqlen = self._padded()
        require_tensor("padded", padded)
        if padded.shape[:2] != (batch, seqlen):
            words = f"[{batch}, {seqlen}, ...]"
            raise ValueError(message("E2", "shape of padded", tuple(padded.shape), words))
        return gather_tokens(padded, self.indices)

    def unpack(self, packed: Tensor) -> Tensor:
        """`[T, ...]` -> `[B, S, ...]`, 0 at places that are not among the T, differentiable.

        Raises:
            TypeError: not a tensor (E1).
            ValueError: the first dim is not T (E2), or there is no padded batch (E8).
        """
        return scatter_tokens(packed, self.indices, *self._padded())

    def _padded(self) -> tuple[int, int]:
        if self.padded_shape is None:
            words = "a packing made from a mask"
            raise ValueError(message("E8", "packing", "one made from position ids", words))
        return self.padded_shape


def gather_tokens(padded: Tensor, indices: Tensor) -> Tensor:
    """Tokens of a padded batch `[B, S, ...]` at places b * S + s, int64 or int32 `[T]`: `[T, ...]`.

    Raises:
        TypeError: not tensors (E1).
        ValueError: `padded` has fewer than two dims (E2).
    """
    require_tensor("padded", padded)
    require_tensor("indices", indices)
    if padded.dim() < 2:
        raise ValueError(message("E2", "rank of padded", padded.dim(), "at least 2"))
    return padded.flatten(0, 1).index_select(0, indices)


def scatter_tokens(packed: Tensor, indices: Tensor, batch: int, seqlen: int) -> Tensor:
    """The inverse: `[T, ...]` to places b * S + s of `[batch, seqlen, ...]`, 0 elsewhere.

    Raises:
        TypeError: not tensors (E1).
        ValueError: `indices` is not `[T]` (E2).
    """
    require_tensor("packed", packed)
    require_tensor("indices", indices)
    if packed.dim() < 1 or indices.shape != packed.shape[:1]:
        words = tuple(packed.shape[:1]) or "[T], for packed [T, ...]"
        raise ValueError(message("E2", "shape of indices", tuple(indices.shape), words))
    padded = packed.new_zeros(batch * seqlen, *packed.shape[1:])
    return padded.index_copy(0, indices.long(), packed).unflatten(0, (batch, seqlen))


def _longest(lengths: Tensor, given: int | None, most: int) -> int:
    """The bound that was given, or the length that the host waits for."""
    if given is None:
        return int(lengths.max()) if lengths.numel() else 0
    _require_count("max_seqlen", given, None)
    return min(given, most)


def _require_rank(name: str, tensor: Tensor, rank: int) -> None:
    require_tensor(name, tensor)
    if tensor.dim() != rank:
        raise ValueError(message("E2", f"rank of {name}", tensor.dim(), rank))


def _require_count(name: str, value: object, most: int | None) -> None:
    """E1 and E6 for a bound."""
    words = "an int >= 0" if most is None else f"an int from 0 to {most}"
    if isinstance(value, bool) or not isinstance(value, (int, torch.SymInt)):
        raise TypeError(message("E1", name, repr(value), words))
    if value < 0 or (most is not None and value > most):
        raise ValueError(message("E6", name, value, words))
