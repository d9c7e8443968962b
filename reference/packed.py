"""Rule V6, packed form: sequences end to end on one token axis, each an attention of its own."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from .backward import arguments, gradients, rounded
from .forward import attend
from .layout import compute_dtype
from .terms import Terms


def packed_terms(terms: Terms, dtype: torch.dtype) -> Terms:
    """Check E8, and widen the bias to `dtype` before it is cut: sequences may share it (G1)."""
    for name in ("mask", "block_map"):
        if getattr(terms, name) is not None:
            raise ValueError(f"{name}: got a tensor, expected None in the packed form [rule E8]")
    if terms.bias is None:
        return terms
    if terms.bias.shape[2] != 1:
        shape = tuple(terms.bias.shape)
        raise ValueError(f"bias: got {shape}, expected one row in the packed form [rule E8]")
    return replace(terms, bias=terms.bias.to(dtype))


def sequences(cu_seqlens_q: Tensor, cu_seqlens_k: Tensor) -> Iterator[tuple[slice, slice]]:
    """The rows and the keys of each sequence."""
    bounds_q, bounds_k = cu_seqlens_q.tolist(), cu_seqlens_k.tolist()
    for b in range(len(bounds_q) - 1):
        yield slice(bounds_q[b], bounds_q[b + 1]), slice(bounds_k[b], bounds_k[b + 1])


def key_slice(x: Tensor, keys: slice) -> Tensor:
    """The keys of a sequence in a term whose last dimension is all keys, or 1 for every key."""
    return x if x.shape[-1] == 1 else x[..., keys]


def sequence_terms(terms: Terms, rows: slice, keys: slice, kept: Tensor | None) -> Terms:
    """The terms of one sequence; rows of intervals are counted inside it already."""
    cuts = {
        "bias": lambda x: key_slice(x, keys),
        "interval_start": lambda x: x[..., keys],
        "interval_end": lambda x: x[..., keys],
        "gate_q": lambda x: x[None, rows],
        "gate_k": lambda x: x[None, keys],
    }
    given = {name: getattr(terms, name) for name in cuts}
    own = {name: cuts[name](x) for name, x in given.items() if x is not None}
    return replace(terms, kept=kept, **own)


def attention_packed(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    kept: Sequence[Tensor] | None = None,
    **terms: Any,
) -> tuple[Tensor, Tensor]:
    """V6: `attention` of every sequence of a packed batch.

    Args:
        q: [Tq, Hq, D].
        k: [Tk, Hkv, D].
        v: [Tk, Hkv, Dv].
        cu_seqlens_q: int32 [sequences + 1], boundaries of the rows, from 0; read on the host.
        cu_seqlens_k: int32 [sequences + 1], boundaries of the keys.
        kept: T1, per sequence the elements kept, bool [1, {Hq, Hkv, 1}, Sq, Sk].
        **terms: as for `attention`, but bias [1, {Hq, Hkv, 1}, 1, {Tk, 1}], intervals
            [1, {Hkv, 1}, Tk] with rows counted inside the sequence, gate_q [Tq, Hq],
            gate_k [Tk, Hkv], and neither mask nor block_map.

    Returns:
        o [Tq, Hq, Dv] and lse [Hq, Tq]. Rows past the last boundary are empty (O2).

    Raises:
        ValueError: a term that the packed form does not have (E8), and as `attention`.
    """
    dtype = compute_dtype(q.dtype)
    terms = packed_terms(Terms(**terms), dtype)
    parts_o, parts_lse = [], []
    for b, (rows, keys) in enumerate(sequences(cu_seqlens_q, cu_seqlens_k)):
        own = sequence_terms(terms, rows, keys, None if kept is None else kept[b])
        o, lse = attend(q[None, rows], k[None, keys], v[None, keys], own)
        parts_o.append(o[0])
        parts_lse.append(lse[0])
    rest = q.shape[0] - sum(part.shape[0] for part in parts_o)
    parts_o.append(q.new_zeros(rest, q.shape[1], v.shape[2]))
    empty = torch.full((q.shape[1], rest), -math.inf, dtype=dtype, device=q.device)
    return torch.cat(parts_o), torch.cat([*parts_lse, empty], 1)


@torch.no_grad()
def attention_packed_backward(
    do: Tensor | None,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    kept: Sequence[Tensor] | None = None,
    **terms: Any,
) -> dict[str, Tensor]:
    """Gradients of `attention_packed`, in closed form (G1).

    Args:
        do: [Tq, Hq, Dv], or None for 0.
        dlse: [Hq, Tq], or None for 0.
        q, k, v, cu_seqlens_q, cu_seqlens_k, kept, **terms: as for `attention_packed`.

    Returns:
        As `attention_backward`; tokens in no sequence have gradient 0.

    Raises:
        ValueError: as `attention_packed`.
    """
    given = arguments(q, k, v, Terms(**terms))
    dtype = compute_dtype(q.dtype)
    terms = packed_terms(Terms(**terms), dtype)
    total = {name: torch.zeros_like(x, dtype=dtype) for name, x in given.items()}
    for b, (rows, keys) in enumerate(sequences(cu_seqlens_q, cu_seqlens_k)):
        own = sequence_terms(terms, rows, keys, None if kept is None else kept[b])
        part = gradients(
            None if do is None else do[None, rows],
            None if dlse is None else dlse[None, :, rows],
            q[None, rows],
            k[None, keys],
            v[None, keys],
            own,
        )
        for name, grad in part.items():
            if name == "bias":
                key_slice(total[name], keys).add_(grad)
            else:
                total[name][rows if name in ("q", "gate_q") else keys] += grad[0]
    return rounded(total, given)
