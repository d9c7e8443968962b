"""Trainable sparse attention: a query pays for the keys that matter.

The public surface is this module; `spec/attention.md` defines what the functions compute.
"""

from importlib.metadata import PackageNotFoundError, version

from .api import (
    flash_sparse_attn_func,
    flash_sparse_attn_func_auto,
    flash_sparse_attn_varlen_func,
    flash_sparse_attn_with_kvcache_func,
)
from .families import (
    flash_dense_attn_func,
    flash_dense_attn_with_kvcache_func,
    flash_gated_attn_func,
    flash_gated_attn_with_kvcache_func,
)
from .masks import BlockMap, IntervalMask
from .packed_mask import PackedMask
from .packing import Packing
from .registry import get_available_backends

try:
    __version__ = version("flash-sparse-attn")
except PackageNotFoundError:  # a source tree that was never installed
    __version__ = "0+unknown"

__all__ = [
    "BlockMap",
    "IntervalMask",
    "PackedMask",
    "Packing",
    "__version__",
    "flash_dense_attn_func",
    "flash_dense_attn_with_kvcache_func",
    "flash_gated_attn_func",
    "flash_gated_attn_with_kvcache_func",
    "flash_sparse_attn_func",
    "flash_sparse_attn_func_auto",
    "flash_sparse_attn_varlen_func",
    "flash_sparse_attn_with_kvcache_func",
    "get_available_backends",
]
