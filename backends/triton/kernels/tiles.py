"""Preparation: which tiles hold nothing, something or everything visible.

Two modes. With bounds alone (V1, V2, V6) the tiles of a row are a few ranges that the attention
kernels work out for themselves (`key_tile_span`, `query_tile_span`). With a mask or intervals (V3,
V4) three small kernels run first, without synchronisation: `pack_mask` reads the mask once,
`summarise_intervals` reads start and end once, and `list_tiles` writes, for every tile row, the
tiles to visit: full ones from the front of the list, partial ones from its back.
"""

import triton
import triton.language as tl

from .arguments import Bounds
from .primitives import ALWAYS, NEVER

EMPTY: tl.constexpr = tl.constexpr(0)
PARTIAL: tl.constexpr = tl.constexpr(1)
FULL: tl.constexpr = tl.constexpr(2)


@triton.jit
def key_tile_span(bounds, start_q, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Key tiles of one query tile under bounds alone: (sinks, low, full_low, full_high, high).

    Partial tiles are [0, sinks), [low, full_low) and [full_high, high); full tiles are [full_low,
    full_high).
    """
    offset = bounds.seqlen_k - bounds.seqlen_q
    end_q = tl.minimum(start_q + BLOCK_M, bounds.seqlen_q)
    sinks = 0
    low = 0
    full_low = 0
    high = tl.cdiv(bounds.seqlen_k, BLOCK_N)
    full_high = bounds.seqlen_k // BLOCK_N
    if bounds.left is not None:  # V2
        sinks = tl.cdiv(bounds.left_sinks, BLOCK_N)
        low = tl.maximum(start_q + offset - bounds.left, 0) // BLOCK_N
        full_low = tl.cdiv(tl.maximum(end_q - 1 + offset - bounds.left, 0), BLOCK_N)
    if bounds.right is not None:  # V1, V2
        sinks = tl.maximum(sinks, tl.cdiv(bounds.right_sinks, BLOCK_N))
        high = tl.minimum(high, tl.cdiv(tl.maximum(end_q + offset + bounds.right, 0), BLOCK_N))
        full_high = tl.minimum(
            full_high, tl.maximum(start_q + 1 + offset + bounds.right, 0) // BLOCK_N
        )
        if bounds.left is not None:
            sinks = tl.where(bounds.right_sinks > 0, sinks, tl.minimum(sinks, high))
    low = tl.maximum(low, sinks)
    high = tl.maximum(high, low)
    full_low = tl.minimum(tl.maximum(full_low, low), high)
    full_high = tl.maximum(tl.minimum(full_high, high), full_low)
    return sinks, low, full_low, full_high, high


@triton.jit
def query_tile_span(bounds, start_k, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Query tiles of one key tile under bounds alone: (low, full_low, full_high, high).

    Partial tiles are [low, full_low) and [full_high, high); full tiles are [full_low, full_high).
    """
    offset = bounds.seqlen_k - bounds.seqlen_q
    end_k = tl.minimum(start_k + BLOCK_N, bounds.seqlen_k)
    low = 0
    full_low = 0
    high = tl.cdiv(bounds.seqlen_q, BLOCK_M)
    full_high = bounds.seqlen_q // BLOCK_M
    if bounds.right is not None:  # V1, V2
        first = start_k - offset - bounds.right
        low = tl.where(start_k < bounds.right_sinks, 0, tl.maximum(first, 0) // BLOCK_M)
        full_first = end_k - 1 - offset - bounds.right
        full_low = tl.where(
            end_k <= bounds.right_sinks, 0, tl.cdiv(tl.maximum(full_first, 0), BLOCK_M)
        )
    if bounds.left is not None:  # V2
        end = end_k - offset + bounds.left
        high = tl.where(
            start_k < bounds.left_sinks,
            high,
            tl.minimum(high, tl.cdiv(tl.maximum(end, 0), BLOCK_M)),
        )
        full_end = tl.maximum(start_k, bounds.left_sinks) + 1 - offset + bounds.left
        full_high = tl.where(
            end_k <= bounds.left_sinks,
            full_high,
            tl.minimum(full_high, tl.maximum(full_end, 0) // BLOCK_M),
        )
    high = tl.maximum(high, low)
    full_low = tl.minimum(tl.maximum(full_low, low), high)
    full_high = tl.maximum(tl.minimum(full_high, high), full_low)
    return low, full_low, full_high, high


@triton.jit
def classify(
    tile_q,
    tile_k,
    b,
    h,
    bounds,
    mask,
    intervals,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    SUB: tl.constexpr,
):
    """(some, all): whether a tile may hold a visible element, and whether every element of it
    exists and is visible.

    Tile numbers may be tensors. `some` is a bound: a tile in which rules empty each other out only
    together is visited and found empty.
    """
    offset = bounds.seqlen_k - bounds.seqlen_q
    start_q = tile_q * BLOCK_M
    start_k = tile_k * BLOCK_N
    last_q = tl.minimum(start_q + BLOCK_M, bounds.seqlen_q) - 1
    last_k = tl.minimum(start_k + BLOCK_N, bounds.seqlen_k) - 1
    some = (start_q < bounds.seqlen_q) & (start_k < bounds.seqlen_k)
    all_ = (start_q + BLOCK_M <= bounds.seqlen_q) & (start_k + BLOCK_N <= bounds.seqlen_k)
    if bounds.right is not None:  # V1, V2
        some = some & ((start_k - offset - bounds.right <= last_q) | (start_k < bounds.right_sinks))
        all_ = all_ & ((last_k - offset - bounds.right <= start_q) | (last_k < bounds.right_sinks))
    if bounds.left is not None:  # V2
        some = some & ((last_k - offset + bounds.left >= start_q) | (start_k < bounds.left_sinks))
        nearest = tl.maximum(start_k, bounds.left_sinks)
        all_ = all_ & ((nearest - offset + bounds.left >= last_q) | (last_k < bounds.left_sinks))
    if intervals is not None:  # V4
        at = (
            tl.cast(b, tl.int64) * intervals.summary_batch
            + tl.cast(h // intervals.heads_per_head, tl.int64) * intervals.summary_head
        )
        inside = tile_k < tl.cdiv(bounds.seqlen_k, BLOCK_N)
        overlaps = tile_k < 0
        for part in tl.static_range((BLOCK_N + SUB - 1) // SUB):
            block = start_k // SUB + part
            present = inside & (block * SUB < bounds.seqlen_k)
            entry = intervals.summary + at + block * 4
            overlaps = overlaps | (
                (tl.load(entry, mask=present, other=NEVER) <= last_q)
                & (tl.load(entry + 3, mask=present, other=ALWAYS) > start_q)
            )
            all_ = all_ & (tl.load(entry + 1, mask=present, other=NEVER) <= start_q)
            all_ = all_ & (tl.load(entry + 2, mask=present, other=ALWAYS) > last_q)
        some = some & overlaps
    if mask is not None:  # V3
        at = (
            tl.cast(b, tl.int64) * mask.class_batch
            + tl.cast(h // mask.heads_per_head, tl.int64) * mask.class_head
        )
        any_ = tile_k < 0
        for part_q in tl.static_range((BLOCK_M + SUB - 1) // SUB if mask.has_rows else 1):
            for part_k in tl.static_range((BLOCK_N + SUB - 1) // SUB):
                row = start_q // SUB + part_q
                column = start_k // SUB + part_k
                present = (row * SUB < bounds.seqlen_q) & (column * SUB < bounds.seqlen_k)
                entry = (
                    mask.classes
                    + at
                    + tl.cast(row, tl.int64) * mask.class_row
                    + column * mask.class_column
                )
                kind = tl.load(entry, mask=present, other=FULL)
                any_ = any_ | (present & (kind != EMPTY))
                all_ = all_ & (kind == FULL)
        some = some & any_
    return some, all_ & some


@triton.jit(do_not_specialize=["seqlen_q", "seqlen_k", "heads"])
def pack_mask_kernel(
    source,
    source_batch,
    source_head,
    source_row,
    source_key,
    words,
    classes,
    seqlen_q,
    seqlen_k,
    heads,
    SUB: tl.constexpr,
    CHUNK: tl.constexpr,
    ONE_KEY: tl.constexpr,
):
    """Bits and block classes of one [SUB, CHUNK] piece of a boolean mask; grid batch * heads * row
    blocks * chunks.

    With ONE_KEY the mask has one column, which stands for every key: a word is all ones or all
    zeros.
    """
    chunks = tl.cdiv(seqlen_k, CHUNK)
    row_blocks = tl.cdiv(seqlen_q, SUB)
    chunk = tl.program_id(0) % chunks
    row_block = tl.program_id(0) // chunks % row_blocks
    plane = tl.program_id(0) // (chunks * row_blocks)
    b = plane // heads
    h = plane % heads
    rows = row_block * SUB + tl.arange(0, SUB)
    keys = chunk * CHUNK + tl.arange(0, CHUNK)
    exists = (rows < seqlen_q)[:, None] & (keys < seqlen_k)[None, :]
    base = source + tl.cast(b, tl.int64) * source_batch + tl.cast(h, tl.int64) * source_head
    at = rows.to(tl.int64)[:, None] * source_row + keys.to(tl.int64)[None, :] * source_key
    value = tl.load(base + at, mask=exists, other=0).to(tl.int32) != 0

    bits = tl.reshape(value.to(tl.int32), [SUB, CHUNK // 32, 32]) << tl.arange(0, 32)[None, None, :]
    packed = tl.sum(bits, axis=2)
    if ONE_KEY:
        packed = -packed
    n_words = tl.cdiv(seqlen_k, 32)
    plane = plane.to(tl.int64)
    word = chunk * (CHUNK // 32) + tl.arange(0, CHUNK // 32)
    target = words + (plane * seqlen_q + rows[:, None]) * n_words + word[None, :]
    tl.store(target, packed, mask=(rows < seqlen_q)[:, None] & (word < n_words)[None, :])

    some = tl.max(tl.max(tl.reshape(value.to(tl.int32), [SUB, CHUNK // SUB, SUB]), axis=2), axis=0)
    whole = (value | ~exists).to(tl.int32)
    every = tl.min(tl.min(tl.reshape(whole, [SUB, CHUNK // SUB, SUB]), axis=2), axis=0)
    n_columns = tl.cdiv(seqlen_k, SUB)
    column = chunk * (CHUNK // SUB) + tl.arange(0, CHUNK // SUB)
    entry = classes + (plane * tl.cdiv(seqlen_q, SUB) + row_block) * n_columns + column
    tl.store(entry, (some + some * every).to(tl.int8), mask=column < n_columns)


@triton.jit(do_not_specialize=["seqlen_k", "heads"])
def summarise_intervals_kernel(
    start, end, batch, head, key, summary, seqlen_k, heads, SUB: tl.constexpr
):
    """Least and greatest start and end of one block of SUB keys.

    Grid batch * heads * blocks. A hidden key starts never and ends at once.
    """
    blocks = tl.cdiv(seqlen_k, SUB)
    block = tl.program_id(0) % blocks
    plane = tl.program_id(0) // blocks
    keys = block * SUB + tl.arange(0, SUB)
    exists = keys < seqlen_k
    at = (
        tl.cast(plane // heads, tl.int64) * batch
        + tl.cast(plane % heads, tl.int64) * head
        + keys.to(tl.int64) * key
    )
    first = tl.load(start + at, mask=exists, other=0)
    stop = tl.load(end + at, mask=exists, other=0)
    shown = exists & (first < stop)
    entry = summary + (tl.cast(plane, tl.int64) * blocks + block) * 4
    tl.store(entry, tl.min(tl.where(shown, first, NEVER), axis=0))
    tl.store(entry + 1, tl.max(tl.where(exists, tl.where(shown, first, NEVER), ALWAYS), axis=0))
    tl.store(entry + 2, tl.min(tl.where(exists, tl.where(shown, stop, ALWAYS), NEVER), axis=0))
    tl.store(entry + 3, tl.max(tl.where(shown, stop, ALWAYS), axis=0))


@triton.jit(do_not_specialize=[*Bounds._fields, "heads", "heads_per_list"])
def list_tiles_kernel(
    index,
    counts,
    seqlen_q,
    seqlen_k,
    left,
    right,
    left_sinks,
    right_sinks,
    mask,
    intervals,
    heads,
    heads_per_list,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    SUB: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """The list of one query tile's key tiles or, transposed, of one key tile's query tiles.

    Grid batch * list heads * tile rows.
    """
    bounds = Bounds(seqlen_q, seqlen_k, left, right, left_sinks, right_sinks)
    tiles_q = tl.cdiv(bounds.seqlen_q, BLOCK_M)
    tiles_k = tl.cdiv(bounds.seqlen_k, BLOCK_N)
    if TRANSPOSED:
        n_own = tiles_k
        n_other = tiles_q
    else:
        n_own = tiles_q
        n_other = tiles_k
    own = tl.program_id(0) % n_own
    plane = tl.program_id(0) // n_own
    b = plane // heads
    h = (plane % heads) * heads_per_list
    list_at = tl.program_id(0).to(tl.int64)
    row = index + list_at * n_other
    n_full = 0
    n_partial = 0
    for first in range(0, n_other, CHUNK):
        other = first + tl.arange(0, CHUNK)
        if TRANSPOSED:
            some, whole = classify(other, own, b, h, bounds, mask, intervals, BLOCK_M, BLOCK_N, SUB)
        else:
            some, whole = classify(own, other, b, h, bounds, mask, intervals, BLOCK_M, BLOCK_N, SUB)
        full = (whole & (other < n_other)).to(tl.int32)
        partial = (some & (other < n_other)).to(tl.int32) - full
        tl.store(row + n_full + tl.cumsum(full, 0) - full, other, mask=full != 0)
        tl.store(row + n_other - (n_partial + tl.cumsum(partial, 0)), other, mask=partial != 0)
        n_full += tl.sum(full, axis=0)
        n_partial += tl.sum(partial, axis=0)
    tl.store(counts + list_at * 2, n_full)
    tl.store(counts + list_at * 2 + 1, n_partial)
