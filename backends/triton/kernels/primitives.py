"""Device functions that every kernel of this backend is built from.

Index space: i counts query rows, j counts keys, both inside one sequence. Scores live in base 2: s2
= s * log2(e), so that exp(s - lse) = exp2(s2 - lse2).

Every visibility rule but a two-dimensional mask gives a key one run of rows, first_j <= i <= last_j
(V1, V2, V4, V6 and a mask that is the same for all rows); `row_range` computes it once per key, and
an element of a tile costs two comparisons whatever the number of rules.
"""

import triton
import triton.language as tl

NEVER: tl.constexpr = tl.constexpr(2**31 - 1)
ALWAYS: tl.constexpr = tl.constexpr(-(2**31))
LN2: tl.constexpr = tl.constexpr(0.6931471805599453)
LOG2E: tl.constexpr = tl.constexpr(1.4426950408889634)


@triton.jit
def tile_pointers(x, b, h, start, ROWS: tl.constexpr, BLOCK_D: tl.constexpr):
    """Pointers to x[b, start + r, h, c] of a `[B, S, H, D]` operand, [ROWS, BLOCK_D].

    64-bit, as B * S * H * D may exceed 2^31.
    """
    base = (
        x.pointer
        + tl.cast(b, tl.int64) * x.batch
        + tl.cast(h, tl.int64) * x.head
        + tl.cast(start, tl.int64) * x.row
    )
    rows = tl.arange(0, ROWS)
    columns = tl.arange(0, BLOCK_D)
    if x.wide:
        rows = rows.to(tl.int64)
        columns = columns.to(tl.int64)
    return base + (rows[:, None] * x.row + columns[None, :] * x.column)


@triton.jit
def load_tile(
    x,
    b,
    h,
    start,
    limit,
    ROWS: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    RAGGED: tl.constexpr,
):
    """Rows start .. start + ROWS of x[b, :, h, :], [ROWS, BLOCK_D].

    Columns from D on read as 0, and so do rows from `limit` on if RAGGED; without RAGGED the caller
    knows that all rows exist. An operand that is a tensor descriptor over [B, H, S, D] is read by
    the copy engine (TMA), which fills with 0 by itself.
    """
    if isinstance(x, tl.core.tensor_descriptor_base):
        tile = tl.reshape(x.load([b, h, start, 0]), [ROWS, BLOCK_D])
    else:
        pointers = tile_pointers(x, b, h, start, ROWS, BLOCK_D)
        if RAGGED or D != BLOCK_D:
            keep = (tl.arange(0, BLOCK_D) < D)[None, :]
            if RAGGED:
                keep = keep & (start + tl.arange(0, ROWS) < limit)[:, None]
            tile = tl.load(pointers, mask=keep, other=0.0)
        else:
            tile = tl.load(pointers)
    return tile


@triton.jit
def store_tile(
    x, b, h, start, limit, value, ROWS: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr
):
    """Write the rows below `limit` and the columns below D of a [ROWS, BLOCK_D] tile."""
    keep = (start + tl.arange(0, ROWS) < limit)[:, None] & (tl.arange(0, BLOCK_D) < D)[None, :]
    tl.store(
        tile_pointers(x, b, h, start, ROWS, BLOCK_D),
        value.to(x.pointer.dtype.element_ty),
        mask=keep,
    )


@triton.jit
def capped(x, score):
    """tanh(r / t) of S2 for raw products x = <q, k>, through exp2: exact to a few ulp of 1 and free
    of overflow.
    """
    return 1.0 - 2.0 / (1.0 + tl.exp2(x * score.inner))


@triton.jit
def load_bias(bias, b, h, i, j, bounds, RAGGED: tl.constexpr):
    """s2 of the bias (S4) at rows i and keys j, in their broadcast shape.

    Only the dims that the bias has are read.
    """
    pointers = (
        bias.pointer
        + tl.cast(b, tl.int64) * bias.batch
        + tl.cast(h // bias.heads_per_head, tl.int64) * bias.head
    )
    if bias.has_rows and bias.has_keys:
        pointers = pointers + i.to(tl.int64) * bias.row + j.to(tl.int64) * bias.key
        keep = (i < bounds.seqlen_q) & (j < bounds.seqlen_k)
    elif bias.has_keys:
        pointers = pointers + j.to(tl.int64) * bias.key
        keep = j < bounds.seqlen_k
    else:
        pointers = pointers + i.to(tl.int64) * bias.row
        keep = i < bounds.seqlen_q
    if RAGGED or bias.has_rows:
        value = tl.load(pointers, mask=keep, other=0.0)
    else:
        value = tl.load(pointers)
    return value.to(tl.float32) * LOG2E


@triton.jit
def mask_base(mask, b, h):
    """Pointer to the packed words of V3 for one batch element and query head."""
    return (
        mask.words
        + tl.cast(b, tl.int64) * mask.batch
        + tl.cast(h // mask.heads_per_head, tl.int64) * mask.head
    )


@triton.jit
def row_range(j, b, h, bounds, mask, intervals):
    """First and last row that sees each key j under every rule that is not two-dimensional.

    First > last hides the key.
    """
    offset = bounds.seqlen_k - bounds.seqlen_q
    first = tl.full(j.shape, ALWAYS, tl.int32)
    last = tl.full(j.shape, NEVER, tl.int32)
    if bounds.right is not None:  # V1, V2
        first = tl.where(j < bounds.right_sinks, ALWAYS, j - offset - bounds.right)
    if bounds.left is not None:  # V2
        last = tl.where(j < bounds.left_sinks, NEVER, j - offset + bounds.left)
    exists = j < bounds.seqlen_k
    if intervals is not None:  # V4
        at = (
            tl.cast(b, tl.int64) * intervals.batch
            + tl.cast(h // intervals.heads_per_head, tl.int64) * intervals.head
        )
        at = at + j.to(tl.int64) * intervals.key
        first = tl.maximum(first, tl.load(intervals.start + at, mask=exists, other=0))
        end = tl.load(intervals.end + at, mask=exists, other=0)
        # end - 1 would wrap at the least integer; no row exists below 0, so 0 says the same
        last = tl.minimum(last, tl.maximum(end, 0) - 1)
    if mask is not None and not mask.has_rows:  # V3, one row for all
        word = tl.load(mask_base(mask, b, h) + j // 32 * mask.word, mask=exists, other=0)
        exists = exists & (((word >> (j % 32)) & 1) != 0)
    return tl.where(exists, first, NEVER), last


@triton.jit
def mask_bits(
    mask,
    base,
    start_q,
    start_k,
    bounds,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    TRANSPOSED: tl.constexpr,
):
    """V3 for one tile from words of 32 keys: [BLOCK_M, BLOCK_N], or its transpose.

    One word is loaded for 32 keys of a row; the words are then spread over the elements by
    reshaping, which is free in registers.
    """
    rows = start_q + tl.arange(0, BLOCK_M)
    columns = start_k // 32 + tl.arange(0, BLOCK_N // 32)
    if TRANSPOSED:
        pointers = base + rows.to(tl.int64)[None, :] * mask.row + columns[:, None] * mask.word
        keep = (rows < bounds.seqlen_q)[None, :] & (columns * 32 < bounds.seqlen_k)[:, None]
        words = tl.load(pointers, mask=keep, other=0)
        spread = words[:, None, :] >> tl.arange(0, 32)[None, :, None]
        bits = tl.reshape((spread & 1) != 0, [BLOCK_N, BLOCK_M])
    else:
        pointers = base + rows.to(tl.int64)[:, None] * mask.row + columns[None, :] * mask.word
        keep = (rows < bounds.seqlen_q)[:, None] & (columns * 32 < bounds.seqlen_k)[None, :]
        words = tl.load(pointers, mask=keep, other=0)
        spread = words[:, :, None] >> tl.arange(0, 32)[None, None, :]
        bits = tl.reshape((spread & 1) != 0, [BLOCK_M, BLOCK_N])
    return bits


@triton.jit
def visible(
    b,
    h,
    start_q,
    start_k,
    bounds,
    mask,
    intervals,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    TRANSPOSED: tl.constexpr,
):
    """Which elements of a tile are visible: [BLOCK_M, BLOCK_N], or its transpose."""
    i = start_q + tl.arange(0, BLOCK_M)
    first, last = row_range(start_k + tl.arange(0, BLOCK_N), b, h, bounds, mask, intervals)
    if TRANSPOSED:
        keep = (first[:, None] <= i[None, :]) & (i[None, :] <= last[:, None])
    else:
        keep = (first[None, :] <= i[:, None]) & (i[:, None] <= last[None, :])
    if mask is not None and mask.has_rows:
        keep = keep & mask_bits(
            mask, mask_base(mask, b, h), start_q, start_k, bounds, BLOCK_M, BLOCK_N, TRANSPOSED
        )
    return keep


@triton.jit
def scores(x, b, h, i, j, score, bias, bounds, RAGGED: tl.constexpr):
    """(s2, slope) of S1, S2 and S4 for raw products x: slope is that of S2, which G1 needs.

    i and j are in their broadcast shapes.
    """
    slope = 1.0
    if score.inner is not None:
        u = capped(x, score)
        s2 = u * score.outer
        slope = 1.0 - u * u
    else:
        s2 = x * score.outer
    if bias is not None:
        s2 = s2 + load_bias(bias, b, h, i, j, bounds, RAGGED)
    return s2, slope
