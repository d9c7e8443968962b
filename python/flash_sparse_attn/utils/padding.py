"""Between a padded batch `[B, S, ...]` and its packed form `[T, ...]` (V6).

The published names, arguments and returns, on top of `packing`. Gradients pass from packed to
padded tokens and back. The number of tokens and `max_seqlen` are known to Python, so on a GPU
packing waits for the device; `packing.Packing` can do without.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..packing import Packing, gather_tokens, scatter_tokens
from ..validation import message, require_tensor


def index_first_axis(tensor: Tensor, indices: Tensor) -> Tensor:
    """Tokens of a padded batch by their place in it.

    Args:
        tensor: `[B, S, ...]`.
        indices: int64 or int32 `[T]`, places b * S + s.

    Returns:
        `[T, ...]`.

    Raises:
        TypeError: not tensors (E1).
        ValueError: `tensor` has fewer than two dims (E2).
    """
    _require_rank("tensor", tensor, least=2)
    return gather_tokens(tensor, indices)


def unpad_input(
    hidden_states: Tensor, attention_mask: Tensor, unused_mask: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor, int, Tensor]:
    """Pack the tokens that a mask marks.

    Args:
        hidden_states: `[B, S, ...]`.
        attention_mask: bool or int `[B, S]`, nonzero = a token.
        unused_mask: bool or int `[B, S]`, nonzero = a place that is packed too, but is no token.

    Returns:
        hidden_states: `[T, ...]`, T = places that either mask marks.
        indices: int64 `[T]`, their places b * S + s.
        cu_seqlens: int32 `[B + 1]`, boundaries of the packed sequences.
        max_seqlen: the longest packed sequence.
        seqused: int32 `[B]`, tokens of each sequence, places of `unused_mask` not counted.

    Raises:
        TypeError: not tensors (E1).
        ValueError: a mask is not `[B, S]` (E2).
    """
    _require_rank("hidden_states", hidden_states, least=2)
    _require_mask("attention_mask", attention_mask, hidden_states)
    packed = tokens = attention_mask != 0
    if unused_mask is not None:
        _require_mask("unused_mask", unused_mask, hidden_states)
        packed = tokens | (unused_mask != 0)
    indices, cu_seqlens, max_seqlen = get_unpad_data(packed)
    seqused = tokens.sum(1, dtype=torch.int32)
    return index_first_axis(hidden_states, indices), indices, cu_seqlens, max_seqlen, seqused


def pad_input(hidden_states: Tensor, indices: Tensor, batch: int, seqlen: int) -> Tensor:
    """The inverse of `unpad_input`: packed tokens to their places, 0 elsewhere.

    Args:
        hidden_states: `[T, ...]`.
        indices: int64 or int32 `[T]`, places b * S + s, each at most once.
        batch: B.
        seqlen: S.

    Returns:
        `[B, S, ...]`.

    Raises:
        TypeError: not tensors (E1).
        ValueError: `indices` is not `[T]` (E2).
    """
    _require_rank("hidden_states", hidden_states, least=1)
    return scatter_tokens(hidden_states, indices, batch, seqlen)


def get_unpad_data(attention_mask: Tensor) -> tuple[Tensor, Tensor, int]:
    """Where the tokens of a padded batch are.

    Args:
        attention_mask: bool or int `[B, S]`, nonzero = a token.

    Returns:
        indices: int64 `[T]`, places b * S + s of the tokens.
        cu_seqlens: int32 `[B + 1]`, boundaries of the packed sequences.
        max_seqlen: the longest sequence.

    Raises:
        TypeError: not a tensor (E1).
        ValueError: not 2-D (E2).
    """
    _require_rank("attention_mask", attention_mask, least=2, most=2)
    packing = Packing.from_mask(attention_mask)
    return packing.indices, packing.cu_seqlens, packing.max_seqlen


def _require_rank(name: str, tensor: Tensor, least: int, most: int | None = None) -> None:
    require_tensor(name, tensor)
    if tensor.dim() < least or (most is not None and tensor.dim() > most):
        expected = f"{least}" if most == least else f"at least {least}"
        raise ValueError(message("E2", f"rank of {name}", tensor.dim(), expected))


def _require_mask(name: str, mask: Tensor, hidden_states: Tensor) -> None:
    require_tensor(name, mask)
    if mask.shape != hidden_states.shape[:2]:
        expected = tuple(hidden_states.shape[:2])
        raise ValueError(message("E2", f"shape of {name}", tuple(mask.shape), expected))
