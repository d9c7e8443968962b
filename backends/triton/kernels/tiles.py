"""Which tiles hold nothing, something or everything visible.

Three modes. With bounds alone (V1, V2, V6) the tiles of a row are a few ranges that the attention
kernels work out for themselves (`key_tile_span`, `query_tile_span`). With a mask or intervals (V3,
V4) small kernels run first, without synchronisation: `key_ranges` turns every rule on keys into one
run of rows per key. Over gathered keys the tiles of a row are then one span, which `span_tiles`
writes, and those of a tile of keys follow from its ranges (`slot_tile_span`). In general
`list_tiles` writes, for every tile row, the tiles to visit: full ones from the front of the list,
partial ones from its back.
"""

import triton
import triton.language as tl

from .arguments import Bounds
from .packing import EMPTY, FULL
from .primitives import ALWAYS, NEVER, bound_range


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
def slot_tile_span(
    slots,
    ranges,
    b,
    h,
    tile_k,
    seqlen_q,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    SUB: tl.constexpr,
):
    """Query tiles of one tile of slots, as `query_tile_span`: those between the first row that sees
    one of its keys and the last.
    """
    start_q = tile_k * BLOCK_N // slots.capacity * slots.rows
    end_q = tl.minimum(start_q + slots.rows, seqlen_q)
    at = (
        ranges.extrema
        + tl.cast(b, tl.int64) * ranges.extrema_batch
        + tl.cast(h // ranges.heads_per_head, tl.int64) * ranges.extrema_head
        + tile_k * BLOCK_N // SUB * 4
    )
    first = end_q
    full_first = start_q
    full_end = end_q
    end = start_q
    for part in tl.static_range((BLOCK_N + SUB - 1) // SUB):
        first = tl.minimum(first, tl.load(at + part * 4))
        full_first = tl.maximum(full_first, tl.load(at + part * 4 + 1))
        # in the segment before 1 is added: the greatest integer has no successor
        last = tl.maximum(tl.load(at + part * 4 + 2), start_q - 1)
        full_end = tl.minimum(full_end, tl.minimum(last, end_q - 1) + 1)
        end = tl.maximum(end, tl.minimum(tl.load(at + part * 4 + 3), end_q - 1) + 1)
    low = tl.maximum(first, start_q) // BLOCK_M
    high = tl.maximum(tl.cdiv(end, BLOCK_M), low)
    full_low = tl.minimum(tl.cdiv(tl.minimum(full_first, end_q), BLOCK_M), high)
    full_high = tl.maximum(full_end // BLOCK_M, full_low)
    return low, full_low, full_high, high


@triton.jit
def key_tiles(bounds, lists, b, h, tile_q, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """(tiles, full, partial): the key tiles that a query tile visits, for `nth_tile`, and how
    many there are of each class.
    """
    if lists is None:
        tiles = key_tile_span(bounds, tile_q * BLOCK_M, BLOCK_M, BLOCK_N)
        sinks, low, full_low, full_high, high = tiles
        n_full = full_high - full_low
        n_partial = sinks + (full_low - low) + (high - full_high)
    else:
        tiles, n_full, n_partial = listed_tiles(lists, b, h, tile_q)
    return tiles, n_full, n_partial


@triton.jit
def listed_tiles(lists, b, h, own):
    """As `key_tiles`, of a tile row of `lists`."""
    listed = (
        tl.cast(b, tl.int64) * lists.batch
        + tl.cast(h // lists.heads_per_head, tl.int64) * lists.head
        + own
    )
    index = lists.index + listed * lists.length
    if lists.spans:
        low = tl.load(index)
        full_low = tl.load(index + 1)
        full_high = tl.load(index + 2)
        high = tl.load(index + 3)
        tiles = (0, low, full_low, full_high, high)
        n_full = full_high - full_low
        n_partial = (full_low - low) + (high - full_high)
    else:
        tiles = index
        n_full = tl.load(lists.counts + listed * 2)
        n_partial = tl.load(lists.counts + listed * 2 + 1)
    return tiles, n_full, n_partial


@triton.jit
def nth_tile(tiles, lists, t, PARTIAL: tl.constexpr):
    """Number of the t-th full or partial tile, of those that `key_tiles` or a span gives."""
    LISTED: tl.constexpr = lists is not None and not lists.spans
    if LISTED:
        tile_k = tl.load(tiles + (lists.length - 1 - t if PARTIAL else t))
    else:
        sinks, low, full_low, full_high, _high = tiles
        if PARTIAL:
            tile_k = tl.where(t < sinks, t, low + t - sinks)
            tile_k = tl.where(tile_k < full_low, tile_k, tile_k + (full_high - full_low))
        else:
            tile_k = full_low + t
    return tile_k


@triton.jit
def nth_of_span(tiles, t):
    """(number, partial): the t-th tile of a span, and whether it is not full."""
    _sinks, low, full_low, full_high, _high = tiles
    return low + t, (low + t < full_low) | (low + t >= full_high)


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
    live,
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
    """Rows that see each of SUB keys, their extrema, and how many of the keys any row sees; grid
    batch * heads * blocks.

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
    shown = exists & (first <= last) & (first < bounds.seqlen_q) & (last >= 0)
    first = tl.where(shown, first, NEVER)
    last = tl.where(shown, last, ALWAYS)
    at = (tl.cast(plane, tl.int64) * blocks + block) * SUB + tl.arange(0, SUB)
    tl.store(first_row + at, first)
    tl.store(last_row + at, last)
    store_extrema(extrema, tl.cast(plane, tl.int64) * blocks + block, first, last)
    tl.store(live + tl.program_id(0), tl.sum(shown.to(tl.int32), 0))


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


@triton.jit(do_not_specialize=[*Bounds._fields, "heads", "heads_per_list", "rows", "tiles"])
def span_tiles_kernel(
    index,
    seqlen_q,
    seqlen_k,
    left,
    right,
    left_sinks,
    right_sinks,
    ranges,
    heads,
    heads_per_list,
    rows,
    tiles,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    SUB: tl.constexpr,
    TILES: tl.constexpr,
):
    """The span of one query tile among the `tiles` tiles of its segment's slots, of which there are
    TILES at most; grid batch * list heads * query tiles.

    Full are those of the first run of full tiles.
    """
    bounds = Bounds(seqlen_q, seqlen_k, left, right, left_sinks, right_sinks)
    tiles_q = tl.cdiv(bounds.seqlen_q, BLOCK_M)
    tile_q = tl.program_id(0) % tiles_q
    plane = tl.program_id(0) // tiles_q
    b = plane // heads
    h = (plane % heads) * heads_per_list
    start = tile_q * BLOCK_M // rows * tiles
    nth = tl.arange(0, TILES)
    some, whole = classify(tile_q, start + nth, b, h, bounds, None, ranges, BLOCK_M, BLOCK_N, SUB)
    some = some & (nth < tiles)
    whole = whole & (nth < tiles)
    low = tl.min(tl.where(some, nth, TILES), 0)
    high = tl.max(tl.where(some, nth + 1, 0), 0)
    low = tl.minimum(low, high)
    full_low = tl.minimum(tl.min(tl.where(whole, nth, TILES), 0), high)
    full_high = tl.minimum(tl.min(tl.where(whole | (nth < full_low), TILES, nth), 0), high)
    entry = index + tl.program_id(0).to(tl.int64) * 4
    tl.store(entry, start + low)
    tl.store(entry + 1, start + full_low)
    tl.store(entry + 2, start + full_high)
    tl.store(entry + 3, start + high)
