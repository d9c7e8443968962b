"""Visibility rules V1 to V5 and V7, one function each, and their conjunction.

Each returns a bool tensor, True where row i sees key j, that broadcasts to [B, H, Sq, Sk]. V6
(packed sequences, cache lengths, pages, key lists) cuts its input into sequences and asks these.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from .layout import compute_dtype, to_query_heads
from .score import gate_term
from .terms import Terms


def indices(seqlen_q: int, seqlen_k: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Rows i [Sq, 1], keys j [1, Sk] and the aligned positions p_i = i + Sk - Sq [Sq, 1]."""
    i = torch.arange(seqlen_q, device=device).unsqueeze(1)
    j = torch.arange(seqlen_k, device=device).unsqueeze(0)
    return i, j, i + seqlen_k - seqlen_q


def causal(p: Tensor, j: Tensor) -> Tensor:
    """V1: j <= p_i."""
    return j <= p


def window(p: Tensor, j: Tensor, bounds: tuple[int | None, int | None], sinks: int) -> Tensor:
    """V2: p_i - left <= j <= p_i + right, from which the first `sinks` keys are exempt."""
    left, right = bounds
    inside = torch.ones_like(j <= p)
    if left is not None:
        inside = inside & (j >= p - left)
    if right is not None:
        inside = inside & (j <= p + right)
    return inside | (j < sinks)


def intervals(start: Tensor, end: Tensor, seqlen_q: int) -> Tensor:
    """V4: start_j <= i < end_j."""
    i = torch.arange(seqlen_q, device=start.device).unsqueeze(1)
    return (start.unsqueeze(2) <= i) & (i < end.unsqueeze(2))


def blocks(block_map: Tensor, block_size: tuple[int, int], seqlen_q: int, seqlen_k: int) -> Tensor:
    """V5: block_map[i // bq, j // bk]."""
    i, j, _ = indices(seqlen_q, seqlen_k, block_map.device)
    return block_map[:, :, i // block_size[0], j // block_size[1]]


def gate_threshold(gate: Tensor, visible: Tensor, threshold: float) -> Tensor:
    """V7: c g_ij >= mu_i + ln gamma, mu_i the largest of the row's `visible`; NaN drops nothing."""
    seen = torch.where(visible, gate, -math.inf)
    # The padding column lets the maximum exist when Sk is 0.
    largest = F.pad(seen, (0, 1), value=-math.inf).amax(3, keepdim=True)
    return ~(gate < largest + math.log(threshold))


@torch.no_grad()
def visible_pairs(q: Tensor, k: Tensor, terms: Terms) -> Tensor:
    """The conjunction of all V rules, then of the kept set of T1: bool [B, Hq, Sq, Sk].

    q [B, Sq, Hq, D], k [B, Sk, Hkv, D].
    """
    batch, seqlen_q, heads_q, head_dim = q.shape
    seqlen_k = k.shape[1]
    _, j, p = indices(seqlen_q, seqlen_k, q.device)

    shape = (batch, heads_q, seqlen_q, seqlen_k)
    visible = torch.ones(shape, dtype=torch.bool, device=q.device)
    if terms.causal:
        visible = visible & causal(p, j)
    if tuple(terms.window) != (None, None):
        visible = visible & window(p, j, terms.window, terms.sinks)
    if terms.mask is not None:  # V3
        visible = visible & to_query_heads(terms.mask, heads_q)
    if terms.interval_start is not None:
        seen = intervals(terms.interval_start, terms.interval_end, seqlen_q)
        visible = visible & to_query_heads(seen, heads_q)
    if terms.block_map is not None:
        seen = blocks(terms.block_map, terms.block_size, seqlen_q, seqlen_k)
        visible = visible & to_query_heads(seen, heads_q)
    if terms.gate_threshold > 0:
        gate = gate_term(terms, terms.scale(head_dim), visible, compute_dtype(q.dtype))
        visible = visible & gate_threshold(gate, visible, terms.gate_threshold)
    if terms.kept is not None:  # T1
        visible = visible & to_query_heads(terms.kept, heads_q)
    return visible
