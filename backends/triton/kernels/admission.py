"""One token more for a cache of the w best keys (M5): one launch, a program a sequence and kv head.

`ranking` defines grades and ranks; the index in a rank is here a position. A program finds the
worst of the w ranks and puts the new key in its place, unless that is worse itself. Positions of a
head differ, so ranks do, and the slot is one.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .ranking import grade_of, rank_of

BEST: tl.constexpr = tl.constexpr(2**63 - 1)
"""A rank that no key has."""
LARGEST_CHUNK = 2048
"""Keys whose ranks a program holds at a time: 16 a thread."""
WARPS = 4


@triton.jit
def _worst(scores, position, window, CHUNK: tl.constexpr):
    """The lowest rank of scores[:window], and its slot."""
    lowest = tl.full([CHUNK], BEST, tl.int64)
    slots = tl.zeros([CHUNK], tl.int32)
    for at in range(0, window, CHUNK):
        i = at + tl.arange(0, CHUNK)
        inside = i < window
        grade = grade_of(tl.load(scores + i, mask=inside, other=0.0))
        rank = tl.where(inside, rank_of(grade, tl.load(position + i, mask=inside, other=0)), BEST)
        slots = tl.where(rank < lowest, i, slots)
        lowest = tl.minimum(rank, lowest)
    worst = tl.min(lowest, 0)
    return worst, tl.max(tl.where(lowest == worst, slots, 0), 0)


@triton.jit
def admit_kernel(
    key_cache, value_cache, score_cache, position, held, seqlen, key, key_batch_stride,
    key_head_stride, key_dim_stride, value, value_batch_stride, value_head_stride,
    value_dim_stride, scores, score_batch_stride, score_head_stride, keep, keep_batch_stride,
    batch, heads, window, head_dim, head_dim_v, BLOCK_DIM: tl.constexpr,
    BLOCK_DIM_V: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """Admit one token or reject it; grid batch * heads. The cache is contiguous."""
    plane = tl.program_id(0).to(tl.int64)
    b = plane // heads
    h = plane % heads
    used = tl.load(held + h * batch + b)
    now = tl.load(seqlen + h * batch + b)
    score = tl.load(scores + b * score_batch_stride + h * score_head_stride)
    # Nothing is loaded on a condition: all that may be wanted is asked for at once.
    d = tl.arange(0, BLOCK_DIM)
    e = tl.arange(0, BLOCK_DIM_V)
    key += b * key_batch_stride + h * key_head_stride
    value += b * value_batch_stride + h * value_head_stride
    k = tl.load(key + d.to(tl.int64) * key_dim_stride, mask=d < head_dim)
    v = tl.load(value + e.to(tl.int64) * value_dim_stride, mask=e < head_dim_v)

    score_cache += plane * window
    position += plane * window
    worst, slot = _worst(score_cache, position, window, CHUNK)
    free = used < window
    slot = tl.where(free, used, slot)
    enters = free | (rank_of(grade_of(score), now) > worst)
    if keep is not None:
        enters = enters & (tl.load(keep + b * keep_batch_stride) != 0)

    tl.debug_barrier()  # other threads still read what is overwritten
    row = (b * window + slot) * heads + h
    tl.store(score_cache + slot, score, mask=enters)
    tl.store(position + slot, now, mask=enters)
    tl.store(key_cache + row * head_dim + d, k, mask=enters & (d < head_dim))
    tl.store(value_cache + row * head_dim_v + e, v, mask=enters & (e < head_dim_v))
    tl.store(held + h * batch + b, used + (enters & free).to(tl.int32))
    tl.store(seqlen + h * batch + b, now + 1)


def admit(
    key_cache: Tensor,
    value_cache: Tensor,
    score_cache: Tensor,
    position: Tensor,
    held: Tensor,
    seqlen: Tensor,
    key: Tensor,
    value: Tensor,
    scores: Tensor,
    key_padding_mask: Tensor | None,
) -> None:
    """One token for every sequence, in place.

    Args:
        key_cache: `[B, w, Hkv, D]`, contiguous, as are all tensors of the cache.
        value_cache: `[B, w, Hkv, Dv]`.
        score_cache: float32 `[B, Hkv, w]`.
        position: int32 `[B, Hkv, w]`, no two of a head equal where the slot is used.
        held: int32 `[Hkv, B]`, slots used, the first ones.
        seqlen: int32 `[Hkv, B]`, position of the token.
        key: `[B, 1, Hkv, D]`, any strides.
        value: `[B, 1, Hkv, Dv]`, any strides.
        scores: float32 `[B, Hkv, 1]`, any strides.
        key_padding_mask: bool `[B, 1]`, any strides; True = takes part.
    """
    batch, window, heads, head_dim = key_cache.shape
    head_dim_v = value_cache.shape[3]
    if batch == 0:
        return
    keep, keep_stride = key_padding_mask, 0
    if keep is not None:
        keep_stride = keep.stride(0)
    strides = [(x.stride(0), x.stride(2), x.stride(3)) for x in (key, value)]
    admit_kernel[(batch * heads,)](
        key_cache, value_cache, score_cache, position, held, seqlen, key, *strides[0], value,
        *strides[1], scores, *scores.stride()[:2], keep, keep_stride, batch, heads, window,
        head_dim, head_dim_v, BLOCK_DIM=triton.next_power_of_2(head_dim),
        BLOCK_DIM_V=triton.next_power_of_2(head_dim_v),
        CHUNK=min(triton.next_power_of_2(window), LARGEST_CHUNK), num_warps=WARPS,
    )  # fmt: skip
