"""Preparation: which tiles hold nothing, something or everything visible.

Two modes. With bounds alone (V1, V2, V6) the tiles of a row are a few ranges that the attention
kernels work out for themselves (`key_tile_span`, `query_tile_span`). With a mask or intervals (V3,
V4) small kernels run first, without synchronisation: `key_ranges` turns every rule on keys into one
run of rows per key, `pack_mask` reads a mask that depends on the row once, and `list_tiles` writes,
for every tile row, the tiles to visit: full ones from the front of the list, partial ones from its
back.
"""

import triton
import triton.language as tl

from .arguments import Bounds
from .primitives import ALWAYS, NEVER, bound_range

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
def key_tiles(bounds, lists, b, h, tile_q, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """(tiles, full, partial): the key tiles that a query tile visits, for `nth_key_tile`, and how
    many there are of each class.
    """
    if lists is None:
        tiles = key_tile_span(bounds, tile_q * BLOCK_M, BLOCK_M, BLOCK_N)
        sinks, low, full_low, full_high, high = tiles
        n_full = full_high - full_low
        n_partial = sinks + (full_low - low) + (high - full_high)
    else:
        n_tiles = tl.cdiv(bounds.seqlen_k, BLOCK_N)
        index, n_full, n_partial = tile_list(lists, b, h, tile_q, n_tiles)
        tiles = (index, n_tiles)
    return tiles, n_full, n_partial


@triton.jit
def nth_key_tile(tiles, lists, t, PARTIAL: tl.constexpr):
    """Number of the t-th full or partial tile among `key_tiles`."""
    if lists is not None:
        index, n_tiles = tiles
        tile_k = tl.load(index + (n_tiles - 1 - t if PARTIAL else t))
    else:
        sinks, low, full_low, full_high, _high = tiles
        if PARTIAL:
            tile_k = tl.where(t < sinks, t, low + t - sinks)
            tile_k = tl.where(tile_k < full_low, tile_k, tile_k + (full_high - full_low))
        else:
            tile_k = full_low + t
    return tile_k


@triton.jit
def tile_list(lists, b, h, own, n_other):
    """(index, full, partial): a tile row's list and how many tiles of each class it holds."""
    listed = (
        tl.cast(b, tl.int64) * lists.batch
        + tl.cast(h // lists.heads_per_head, tl.int64) * lists.head
        + own
    )
    counts = lists.counts + listed * 2
    return lists.index + listed * n_other, tl.load(counts), tl.load(counts + 1)


@triton.jit
def classify(
    tile_q,
    tile_k,
    b,
    h,
    bounds,
    mask,
    ranges,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    SUB: tl.constexpr,
):
    """(some, all): whether a tile may hold a visible element, and whether every element of it
    exists and is visible.

    Tile numbers may be tensors. `some` is a bound: a tile in which rules empty each other out only
    together is visited and found empty.
    """
    start_q = tile_q * BLOCK_M
    start_k = tile_k * BLOCK_N
    last_q = tl.minimum(start_q + BLOCK_M, bounds.seqlen_q) - 1
    some = (start_q < bounds.seqlen_q) & (start_k < bounds.seqlen_k)
    all_ = (start_q + BLOCK_M <= bounds.seqlen_q) & (start_k + BLOCK_N <= bounds.seqlen_k)
    at = (
        tl.cast(b, tl.int64) * ranges.extrema_batch
        + tl.cast(h // ranges.heads_per_head, tl.int64) * ranges.extrema_head
    )
    exists = tile_k < tl.cdiv(bounds.seqlen_k, BLOCK_N)
    overlaps = tile_k < 0
    for part in tl.static_range((BLOCK_N + SUB - 1) // SUB):
        block = start_k // SUB + part
        present = exists & (block * SUB < bounds.seqlen_k)
        entry = ranges.extrema + at + block * 4
        overlaps = overlaps | (
            (tl.load(entry, mask=present, other=NEVER) <= last_q)
            & (tl.load(entry + 3, mask=present, other=ALWAYS) >= start_q)
        )
        all_ = all_ & (tl.load(entry + 1, mask=present, other=NEVER) <= start_q)
        all_ = all_ & (tl.load(entry + 2, mask=present, other=ALWAYS) >= last_q)
    some = some & overlaps
    if mask is not None:  # V3
        at = (
            tl.cast(b, tl.int64) * mask.class_batch
            + tl.cast(h // mask.heads_per_head, tl.int64) * mask.class_head
        )
        any_ = tile_k < 0
        for part_q in tl.static_range((BLOCK_M + SUB - 1) // SUB):
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


@triton.jit(do_not_specialize=["heads"])
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
    n_rows,
    n_words,
    heads,
    SUB: tl.constexpr,
    CHUNK: tl.constexpr,
    KEYS: tl.constexpr,
    ONE_KEY: tl.constexpr,
):
    """Bits and block classes of one [SUB, CHUNK] piece of a boolean mask, read KEYS (1 or 4) bytes
    at a time; strides count such pieces.

    Grid batch * heads * row blocks * chunks, over rows padded to n_rows and keys to 32 * n_words:
    bits of what does not exist are 0. With ONE_KEY the mask has one column, which stands for every
    key: a word is all ones or all zeros.
    """
    chunks = tl.cdiv(n_words * 32, CHUNK)
    row_blocks = n_rows // SUB
    chunk = tl.program_id(0) % chunks
    row_block = tl.program_id(0) // chunks % row_blocks
    plane = tl.program_id(0) // (chunks * row_blocks)
    b = plane // heads
    h = plane % heads
    rows = row_block * SUB + tl.arange(0, SUB)
    piece = chunk * (CHUNK // KEYS) + tl.arange(0, CHUNK // KEYS)
    exists = (rows < seqlen_q)[:, None] & (piece * KEYS < seqlen_k)[None, :]
    base = source + tl.cast(b, tl.int64) * source_batch + tl.cast(h, tl.int64) * source_head
    at = rows.to(tl.int64)[:, None] * source_row + piece.to(tl.int64)[None, :] * source_key
    value = tl.load(base + at, mask=exists, other=0)
    if KEYS == 4:  # the product moves the low bit of byte i to bit 28 + i
        value = (value * 0x10204080) >> 28 & 15
    bits = tl.reshape(value.to(tl.int32), [SUB, CHUNK // 32, 32 // KEYS])
    packed = tl.sum(bits << (tl.arange(0, 32 // KEYS) * KEYS)[None, None, :], axis=2)
    if ONE_KEY:
        packed = -packed
    plane = plane.to(tl.int64)
    word = chunk * (CHUNK // 32) + tl.arange(0, CHUNK // 32)
    target = words + (plane * n_rows + rows[:, None]) * n_words + word[None, :]
    tl.store(target, packed, mask=(word < n_words)[None, :])

    # A block holds 2 words a row: whether any bit is set, and whether all bits that exist are.
    missing = tl.where((rows < seqlen_q)[:, None], _missing_bits(word, seqlen_k), -1)
    some = tl.max(tl.reshape((packed != 0).to(tl.int32), [SUB, CHUNK // SUB, SUB // 32]), axis=2)
    whole = ((packed | missing) == -1).to(tl.int32)
    every = tl.min(tl.reshape(whole, [SUB, CHUNK // SUB, SUB // 32]), axis=2)
    some = tl.max(some, axis=0)
    every = tl.min(every, axis=0)
    n_columns = tl.cdiv(n_words * 32, SUB)
    column = chunk * (CHUNK // SUB) + tl.arange(0, CHUNK // SUB)
    entry = classes + (plane * row_blocks + row_block) * n_columns + column
    tl.store(entry, (some + some * every).to(tl.int8), mask=column < n_columns)


@triton.jit
def _missing_bits(word, seqlen_k):
    """[1, words]: the bits of each word whose keys are not below seqlen_k."""
    left = tl.minimum(tl.maximum(seqlen_k - word * 32, 0), 32)
    present = tl.where(left == 32, -1, (1 << tl.minimum(left, 31)) - 1)
    return (~present)[None, :]


@triton.jit
def store_extrema(extrema, block, first, last):
    """Least and greatest first and last row of a block of keys, for `classify`."""
    entry = extrema + block * 4
    tl.store(entry, tl.min(first, axis=0))
    tl.store(entry + 1, tl.max(first, axis=0))
    tl.store(entry + 2, tl.min(last, axis=0))
    tl.store(entry + 3, tl.max(last, axis=0))


@triton.jit(do_not_specialize=[*Bounds._fields, "heads", "heads_per_list"])
def key_ranges_kernel(
    first_row,
    last_row,
    extrema,
    seqlen_q,
    seqlen_k,
    left,
    right,
    left_sinks,
    right_sinks,
    intervals,
    keys,
    heads,
    heads_per_list,
    blocks,
    SUB: tl.constexpr,
):
    """Rows that see each of SUB keys, and their extrema; grid batch * heads * blocks.

    A hidden key starts never and has ended before it starts.
    """
    bounds = Bounds(seqlen_q, seqlen_k, left, right, left_sinks, right_sinks)
    block = tl.program_id(0) % blocks
    plane = tl.program_id(0) // blocks
    b = plane // heads
    h = (plane % heads) * heads_per_list
    j = block * SUB + tl.arange(0, SUB)
    exists = j < seqlen_k
    first, last = bound_range(j, bounds)
    if intervals is not None:  # V4
        at = (
            tl.cast(b, tl.int64) * intervals.batch
            + tl.cast(h // intervals.heads_per_head, tl.int64) * intervals.head
            + j.to(tl.int64) * intervals.key
        )
        first = tl.maximum(first, tl.load(intervals.start + at, mask=exists, other=0))
        end = tl.load(intervals.end + at, mask=exists, other=0)
        # end - 1 would wrap at the least integer; no row exists below 0, so 0 says the same
        last = tl.minimum(last, tl.maximum(end, 0) - 1)
    if keys is not None:  # V3, one row for all
        at = (
            tl.cast(b, tl.int64) * keys.batch
            + tl.cast(h // keys.heads_per_head, tl.int64) * keys.head
            + j.to(tl.int64) * keys.key
        )
        exists = exists & (tl.load(keys.pointer + at, mask=exists, other=0) != 0)
    shown = exists & (first <= last)
    first = tl.where(shown, first, NEVER)
    last = tl.where(shown, last, ALWAYS)
    at = (tl.cast(plane, tl.int64) * blocks + block) * SUB + tl.arange(0, SUB)
    tl.store(first_row + at, first)
    tl.store(last_row + at, last)
    store_extrema(extrema, tl.cast(plane, tl.int64) * blocks + block, first, last)


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
    ranges,
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
            some, whole = classify(other, own, b, h, bounds, mask, ranges, BLOCK_M, BLOCK_N, SUB)
        else:
            some, whole = classify(own, other, b, h, bounds, mask, ranges, BLOCK_M, BLOCK_N, SUB)
        full = (whole & (other < n_other)).to(tl.int32)
        partial = (some & (other < n_other)).to(tl.int32) - full
        tl.store(row + n_full + tl.cumsum(full, 0) - full, other, mask=full != 0)
        tl.store(row + n_other - (n_partial + tl.cumsum(partial, 0)), other, mask=partial != 0)
        n_full += tl.sum(full, axis=0)
        n_partial += tl.sum(partial, axis=0)
    tl.store(counts + list_at * 2, n_full)
    tl.store(counts + list_at * 2 + 1, n_partial)
