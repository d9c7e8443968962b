"""Structured masks M1 to M5: constructors of intervals, pure functions without a host sync.

Each returns (start, end), int32: row i sees key j where start_j <= i < end_j (V4). Rows are counted
from 0 and row i is aligned to position p_i = i + Sk - Sq.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

Intervals = tuple[Tensor, Tensor]


def to_rows(start: Tensor, end: Tensor, seqlen_q: int, seqlen_k: int) -> Intervals:
    """Intervals of rows from intervals of positions, start <= p_i < end."""
    offset = seqlen_k - seqlen_q
    start, end = ((x - offset).clamp(0, seqlen_q).to(torch.int32) for x in (start, end))
    return start, end


def causal_intervals(
    seqlen_q: int, seqlen_k: int, device: torch.device | str | None = None
) -> Intervals:
    """M1: j <= p_i. int32 [1, 1, Sk]."""
    return window_intervals(seqlen_q, seqlen_k, None, 0, device=device)


def window_intervals(
    seqlen_q: int,
    seqlen_k: int,
    left: int | None,
    right: int | None,
    sinks: int = 0,
    device: torch.device | str | None = None,
) -> Intervals:
    """M2: p_i - left <= j <= p_i + right or j < sinks; None is unbounded. int32 [1, 1, Sk]."""
    j = torch.arange(seqlen_k, device=device).view(1, 1, seqlen_k)
    first, last = min(0, seqlen_k - seqlen_q), seqlen_k  # the positions are first <= p_i < last
    start = torch.full_like(j, first) if right is None else j - right
    end = torch.full_like(j, last) if left is None else j + left + 1
    start, end = torch.where(j < sinks, first, start), torch.where(j < sinks, last, end)
    return to_rows(start, end, seqlen_q, seqlen_k)


def document_intervals(cu_seqlens: Tensor, seqlen: int) -> Intervals:
    """M3: rows and keys of one document see each other; Sq = Sk = seqlen. int32 [1, 1, S].

    cu_seqlens int [documents + 1] rises from 0 to `seqlen`.
    """
    j = torch.arange(seqlen, device=cu_seqlens.device)
    bounds = cu_seqlens.to(j.dtype)
    document = torch.searchsorted(bounds[1:].contiguous(), j, right=True)
    start, end = bounds[document].view(1, 1, -1), bounds[document + 1].view(1, 1, -1)
    return to_rows(start, end, seqlen, seqlen)


def key_intervals(keep: Tensor, seqlen_q: int) -> Intervals:
    """M4: the same keys for every row. keep bool [..., Sk]; int32 of the same shape."""
    end = torch.where(keep, seqlen_q, 0).to(torch.int32)
    return torch.zeros_like(end), end


def intersect(a: Intervals, b: Intervals) -> Intervals:
    """The rows that see the key in both: the later start, the earlier end."""
    return torch.maximum(a[0], b[0]), torch.minimum(a[1], b[1])


def rank_order(scores: Tensor, key_padding_mask: Tensor | None = None) -> Tensor:
    """M5: positions [..., Sk] of the keys, best first.

    Higher scores first, NaN after -inf; of equal scores the more recent key; padded keys last.
    """
    nan = scores.isnan()
    group = nan.to(torch.int8)
    if key_padding_mask is not None:
        group = group.masked_fill(~key_padding_mask, 2)
    value = torch.where(nan | (scores == 0), 0, scores)  # a radix sort may tell -0 from 0
    # Two stable sorts, the last criterion first, of the keys from the most recent to the oldest.
    order = value.flip(-1).argsort(dim=-1, descending=True, stable=True)
    by_group = group.flip(-1).gather(-1, order).argsort(dim=-1, stable=True)
    return scores.shape[-1] - 1 - order.gather(-1, by_group)


def prefix_quantile(sequence: Tensor, n: int | Tensor) -> Tensor:
    """The n-th smallest (n >= 1) of sequence[..., :r], for every r at once.

    `sequence` [..., S] holds a permutation of 0 .. S - 1, n is one for all r or [S], one for each;
    entries r < n of the result mean nothing.
    A wavelet matrix: from the highest bit to the lowest, each level splits the sequence stably by
    one bit, and every query follows the side that holds its answer. O(S log S) time, O(S) memory.
    """
    length = sequence.shape[-1]
    index = torch.arange(length, device=sequence.device).expand_as(sequence)
    low, high = torch.zeros_like(sequence), index
    remaining = torch.zeros_like(sequence) + (n - 1)
    quantile = torch.zeros_like(sequence)
    for bit in reversed(range(max(length - 1, 0).bit_length())):
        one = (sequence >> bit) & 1
        zeros_before = F.pad((1 - one).cumsum(-1), (1, 0))
        before, zeros = zeros_before[..., :-1], zeros_before[..., -1:]
        low_zeros, high_zeros = zeros_before.gather(-1, low), zeros_before.gather(-1, high)

        smaller = high_zeros - low_zeros
        up = remaining >= smaller
        quantile = quantile + (up.to(quantile.dtype) << bit)
        remaining = torch.where(up, remaining - smaller, remaining)
        low = torch.where(up, zeros + low - low_zeros, low_zeros)
        high = torch.where(up, zeros + high - high_zeros, high_zeros)

        target = torch.where(one == 1, zeros + index - before, before)
        sequence = torch.empty_like(sequence).scatter_(-1, target, sequence)
    return quantile


def topk_intervals(
    scores: Tensor,
    seqlen_q: int,
    window_size: int,
    causal: bool = True,
    key_padding_mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> Intervals:
    """M5: every row keeps the `window_size` best of the keys that it can see.

    With causality keys only join as rows go on, so a key once evicted never returns: key j joins at
    position j and leaves at the `window_size`-th smallest position among the keys better than it.

    Args:
        scores: floating [..., Sk], the same for every row. Equal scores prefer the more recent key;
            NaN is worst.
        seqlen_q: Sq; means nothing with `cu_seqlens`.
        window_size: w; w >= Sk keeps every key.
        causal: row i chooses among the keys j <= p_i; otherwise among all keys.
        key_padding_mask: bool, broadcastable with `scores`; a key that is False takes no part: no
            row sees it and it displaces no other.
        cu_seqlens: int [sequences + 1], boundaries of packed sequences (V6). Every one chooses by
            itself, and its rows, as many as keys, are counted inside it.

    Returns:
        (start, end), int32, of the broadcast shape; end = start where no row sees the key, 0 of
        keys in no sequence. Exact; O(S log S) time and O(S) memory.

    Raises:
        ValueError: window_size < 1 (E6).
    """
    if window_size < 1:
        raise ValueError(f"window_size: got {window_size}, expected an int >= 1 [rule E6]")
    scores = scores.detach()
    if key_padding_mask is not None:
        scores, key_padding_mask = torch.broadcast_tensors(scores, key_padding_mask)
    seqlen_k = scores.shape[-1]
    rank = torch.arange(seqlen_k, device=scores.device)

    order, first, last = rank_order(scores, key_padding_mask), 0, seqlen_k
    if cu_seqlens is not None:
        # Sequence by sequence, each has ranks of the same numbers as its positions, and those
        # before it have lower ones: the n-th smallest of its own is the (first + n)-th so far.
        sequence, first, last = _sequences(cu_seqlens, rank)
        order = order.gather(-1, sequence[order].argsort(dim=-1, stable=True))
    best = (rank < first + window_size).expand_as(order)
    if causal:
        joins = order
        leaves = torch.where(best, last, prefix_quantile(order, first + window_size))
        leaves = torch.maximum(leaves, joins)  # w better keys may be there already
    else:
        joins = first if cu_seqlens is not None else min(0, seqlen_k - seqlen_q)
        joins = torch.zeros_like(order) + joins
        leaves = torch.where(best, last, joins)
    joins, leaves = (torch.empty_like(order).scatter_(-1, order, x) for x in (joins, leaves))
    if key_padding_mask is not None:
        leaves = torch.where(key_padding_mask, leaves, joins)
    if cu_seqlens is None:
        return to_rows(joins, leaves, seqlen_q, seqlen_k)
    inside = (sequence > 0) & (sequence < cu_seqlens.shape[0])
    joins, leaves = (torch.where(inside, x - first, 0).to(torch.int32) for x in (joins, leaves))
    return joins, leaves


def _sequences(cu_seqlens: Tensor, position: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """V6: (sequence, first, last) of each position: the number of its sequence, counted from 1, and
    the positions of that one's first token and behind its last. What lies before the first boundary
    has number 0, what lies behind the last the number of boundaries.
    """
    bounds = cu_seqlens.to(position.dtype)
    sequence = torch.searchsorted(bounds, position, right=True)
    first, last = F.pad(bounds, (1, 0)), F.pad(bounds, (0, 1), value=position.shape[0])
    return sequence, first[sequence], last[sequence]
