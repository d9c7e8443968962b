"""Layers built on the public functions: `DynamicMaskAttention` with its config and its cache."""

from ..streaming import DynamicMaskCache
from .dynamic_mask_attention import DynamicMaskAttention, DynamicMaskAttentionConfig

__all__ = ["DynamicMaskAttention", "DynamicMaskAttentionConfig", "DynamicMaskCache"]
