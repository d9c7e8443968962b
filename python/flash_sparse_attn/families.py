"""The cache functions of the predecessors by their family names, with their 3-D query.

The one row of a query may be given without its dim, as query `[B, Hq, D]`; then o is
`[B, Hq, Dv]` and lse `[B, Hq]`. All else is `flash_sparse_attn_with_kvcache_func`.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from . import api
from .masks import BlockMap
from .validation import message, require_tensor

__all__ = [
    "flash_dense_attn_with_kvcache_func",
    "flash_gated_attn_with_kvcache_func",
    "flash_sparse_attn_with_kvcache_func",
]

Output = Tensor | tuple[Tensor | BlockMap, ...]


def flash_sparse_attn_with_kvcache_func(
    query: Tensor, key_cache: Tensor, value_cache: Tensor, **options: Any
) -> Output:
    """Attention over a key-value cache (V6), of one row where query has no dim of rows.

    Args:
        query: `[B, Sq, Hq, D]`, or `[B, Hq, D]` for one row.
        key_cache, value_cache: as in `api.flash_sparse_attn_with_kvcache_func`.
        **options: its keywords. Masks, bias and gates keep their dim of rows, of size 1.

    Returns:
        As that function; with a 3-D query o `[B, Hq, Dv]` and lse `[B, Hq]`. The `BlockMap` of
        `return_kept` keeps its dim of blocks of rows.

    Raises:
        TypeError: query is no tensor (E1).
        ValueError: query has neither 3 nor 4 dims (E2).
        TypeError, ValueError, NotImplementedError, ImportError: as that function.
    """
    require_tensor("query", query)
    if query.dim() not in (3, 4):
        got = f"{query.dim()} (shape {tuple(query.shape)})"
        raise ValueError(message("E2", "rank of query", got, "3 or 4"))
    call = api.flash_sparse_attn_with_kvcache_func
    if query.dim() == 4:
        return call(query, key_cache, value_cache, **options)
    found = call(query.unsqueeze(1), key_cache, value_cache, **options)
    if isinstance(found, Tensor):
        return found.squeeze(1)
    o, *rest = found
    if options.get("return_lse", False):
        rest[0] = rest[0].squeeze(2)
    return (o.squeeze(1), *rest)


def flash_dense_attn_with_kvcache_func(
    query: Tensor, key_cache: Tensor, value_cache: Tensor, **options: Any
) -> Output:
    """Attention over a cache with no sparsity of its own, by its family name.

    Args:
        query, key_cache, value_cache, **options: as in `flash_sparse_attn_with_kvcache_func`.
    """
    return flash_sparse_attn_with_kvcache_func(query, key_cache, value_cache, **options)


def flash_gated_attn_with_kvcache_func(
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    alpha: Tensor,
    delta: Tensor,
    **options: Any,
) -> Output:
    """Gated attention over a cache (S3): scores gain softmax_scale * g(alpha_i * delta_j).

    Args:
        query, key_cache, value_cache, **options: as in `flash_sparse_attn_with_kvcache_func`.
        alpha: `[B, Sq, Hq]`, gate of the rows; with a 3-D query `[B, Hq]`.
        delta: `[B, logical keys, Hkv]`, gate of the keys.

    Raises:
        TypeError: alpha is no tensor (E1).
        TypeError, ValueError, NotImplementedError, ImportError: as that function.
    """
    require_tensor("query", query)
    require_tensor("alpha", alpha)
    if query.dim() == 3 and alpha.dim() == 2:
        alpha = alpha.unsqueeze(1)
    return flash_sparse_attn_with_kvcache_func(
        query, key_cache, value_cache, gates=(alpha, delta), **options
    )
