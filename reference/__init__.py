"""The operator in plain PyTorch: one small function a rule of `spec/attention.md`.

It imports nothing but torch, runs on any device in any float dtype, costs O(Sq Sk) memory, and is
differentiated by autograd. `attention_backward` is the same gradient in closed form.
"""

from .backward import attention_backward
from .cached import attention_cached
from .forward import attention
from .packed import attention_packed, attention_packed_backward
from .selection import (
    causal_intervals,
    document_intervals,
    intersect,
    key_intervals,
    topk_intervals,
    window_intervals,
)
from .terms import Terms
from .threshold import check_kept, droppable, expand_kept, final_probability

__all__ = [
    "Terms",
    "attention",
    "attention_backward",
    "attention_cached",
    "attention_packed",
    "attention_packed_backward",
    "causal_intervals",
    "check_kept",
    "document_intervals",
    "droppable",
    "expand_kept",
    "final_probability",
    "intersect",
    "key_intervals",
    "topk_intervals",
    "window_intervals",
]
