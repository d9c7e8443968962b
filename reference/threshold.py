"""Rule T1: which blocks of keys may be dropped, and whether those that were dropped might be.

A set of blocks is a bool map [B, H, ceil(Sq / rows), ceil(Sk / keys)] with a block size
(rows, keys), as in V5. What remains after the drop is the kept set, which `attention` replays from
its elements (`kept=`).
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from .forward import read, softmax
from .score import score
from .terms import Terms
from .visibility import blocks, visible_pairs


@torch.no_grad()
def final_probability(q: Tensor, k: Tensor, **terms: Any) -> tuple[Tensor, Tensor]:
    """P of the full softmax and the visible pairs, both [B, Hq, Sq, Sk]; `kept` has no say.

    q, k, **terms: as for `attention`.
    """
    terms = replace(Terms(**terms), kept=None)
    with torch.autocast(q.device.type, enabled=False):
        visible = visible_pairs(q, k, terms)
        qh, kh, _ = read(q, k, k, visible)
        p, _ = softmax(score(qh, kh, terms, visible), visible)
    return p, visible


def droppable_elements(probability: Tensor, visible: Tensor, threshold: float) -> Tensor:
    """T1: visible and P_ij < a / n_i, n_i the visible keys of the row: bool [B, Hq, Sq, Sk]."""
    count = visible.sum(3, keepdim=True)
    return visible & (probability < threshold / count)


def droppable(
    probability: Tensor, visible: Tensor, threshold: float, block_size: tuple[int, int]
) -> Tensor:
    """T1: the blocks whose every visible element is droppable, a bool map with the heads of P.

    A block in which nothing is visible is droppable. For row groups that span the query heads of a
    kv head, reduce the map with `all` over them.
    """
    spare = ~visible | droppable_elements(probability, visible, threshold)
    (rows, keys), (seqlen_q, seqlen_k) = block_size, spare.shape[2:]
    spare = F.pad(spare, (0, -seqlen_k % keys, 0, -seqlen_q % rows), value=True)
    return spare.unflatten(3, (-1, keys)).unflatten(2, (-1, rows)).all(5).all(3)


def expand_kept(kept: Tensor, block_size: tuple[int, int], seqlen_q: int, seqlen_k: int) -> Tensor:
    """The elements of a map of kept blocks: bool [B, H, Sq, Sk], the `kept` of `attention`."""
    return blocks(kept, block_size, seqlen_q, seqlen_k)


def check_kept(
    kept: Tensor, probability: Tensor, visible: Tensor, threshold: float, rtol: float = 0.0
) -> Tensor:
    """T1: the rows of which every dropped element was droppable: bool [B, Hq, Sq].

    kept: elements, broadcastable to P. rtol widens the threshold by the relative error of the
    probabilities that the implementation compared.
    """
    allowed = droppable_elements(probability, visible, threshold * (1 + rtol))
    dropped = visible & ~kept
    return (~dropped | allowed).all(3)
