"""The functions of the predecessors by their family names: thin forms of those of `api`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor

from .api import flash_sparse_attn_func, flash_sparse_attn_with_kvcache_func
from .validation import require_tensor

if TYPE_CHECKING:
    from .api import Output


def flash_dense_attn_func(query: Tensor, key: Tensor, value: Tensor, **options: Any) -> Output:
    """Attention with no sparsity of its own: `flash_sparse_attn_func` by its family name."""
    return flash_sparse_attn_func(query, key, value, **options)


def flash_gated_attn_func(
    query: Tensor, key: Tensor, value: Tensor, alpha: Tensor, delta: Tensor, **options: Any
) -> Output:
    """Gated attention (S3): scores gain softmax_scale * g(alpha_i * delta_j).

    Args:
        query, key, value: as in `flash_sparse_attn_func`.
        alpha: `[B, Sq, Hq]`, gate of the rows.
        delta: `[B, Sk, Hkv]`, gate of the keys.
        **options: the other keywords of `flash_sparse_attn_func`.
    """
    return flash_sparse_attn_func(query, key, value, gates=(alpha, delta), **options)


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
