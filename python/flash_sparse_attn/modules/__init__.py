"""Layers built on the public functions: `DynamicMaskAttention` with its config and its cache."""

from .dynamic_mask_attention import (
    DynamicMaskAttention,
    DynamicMaskAttentionConfig,
    DynamicMaskCache,
)

__all__ = ["DynamicMaskAttention", "DynamicMaskAttentionConfig", "DynamicMaskCache"]
