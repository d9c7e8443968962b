"""Precision, head broadcasting and its transpose: the conventions every rule shares."""

from __future__ import annotations

import torch
from torch import Tensor


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """S1: the dtype of scores, softmax and sums, the argument's own but at least float32."""
    return dtype if dtype in (torch.float64, torch.float32) else torch.float32


def heads_first(x: Tensor, dtype: torch.dtype) -> Tensor:
    """[B, S, H, ...] to [B, H, S, ...] in `dtype`."""
    return x.transpose(1, 2).to(dtype)


def to_query_heads(x: Tensor, heads_q: int) -> Tensor:
    """Repeat a head dimension (dim 1) of Hkv to Hq, query head h taking h // G; 1 and Hq stay."""
    if x.shape[1] in (1, heads_q):
        return x
    group = heads_q // x.shape[1]
    shared = x.unsqueeze(2).expand(*x.shape[:2], group, *x.shape[2:])
    return shared.flatten(1, 2)


def from_query_heads(x: Tensor, heads: int) -> Tensor:
    """Transpose of `to_query_heads`: sum the query heads that share each of `heads` heads."""
    return x.unflatten(1, (heads, x.shape[1] // heads)).sum(2)


def reduce_to(grad: Tensor, shape: torch.Size) -> Tensor:
    """Sum `grad` [B, Hq, Sq, Sk] over the dimensions in which `shape` was broadcast to it."""
    grad = from_query_heads(grad, shape[1])
    broadcast = [d for d in (0, 2, 3) if shape[d] == 1 and grad.shape[d] != 1]
    return grad.sum(broadcast, keepdim=True) if broadcast else grad
