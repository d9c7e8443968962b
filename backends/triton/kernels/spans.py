"""The tiles that a program visits, as attention kernels walk them: runs worked out from bounds
alone (V1, V2, V6) or from the ranges of slots, or what `tiles` has listed.
"""

import triton
import triton.language as tl

from .primitives import uniform


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
    place,
    h,
    tile_k,
    start_q,
    seqlen_q,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    SUB: tl.constexpr,
):
    """Query tiles of one tile of slots, as `query_tile_span`: those between the first row that sees
    one of its keys and the last. Its segment starts at row `start_q`.
    """
    end_q = tl.minimum(start_q + slots.rows, seqlen_q)
    at = (
        ranges.extrema
        + tl.cast(place.batch, tl.int64) * ranges.extrema_batch
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
def scheduled(lists, heads, group, tiles, LAST_FIRST: tl.constexpr):
    """(h, nth): the head and the tile row, of all, of this program, of a grid tile rows * heads;
    `tiles` counts those of a batch element or, packed, all. For tiles of keys heads are those of
    keys, and a group is one.

    Heads vary fastest, so that a group shares its keys in cache, and all heads what they read
    beside keys. Where neighbouring rows ask for other keys, one group after the other does all its
    rows, as the keys of few heads stay in cache and those of all do not. LAST_FIRST, the last tiles
    of a batch element come first, as they are the longest under V1.
    """
    GROUPS_LAST: tl.constexpr = lists is not None and lists.apart
    if GROUPS_LAST:
        rows = tl.num_programs(0) // heads
        h = tl.program_id(0) // (rows * group) * group + tl.program_id(0) % group
        nth = tl.program_id(0) // group % rows
    else:
        h = tl.program_id(0) % heads
        nth = tl.program_id(0) // heads
    if LAST_FIRST:
        nth = nth // tiles * tiles + (tiles - 1 - nth % tiles)
    return h, nth


@triton.jit
def key_tiles(bounds, lists, place, h, tile_q, own, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """(tiles, full, partial): the key tiles that a query tile visits, for `nth_tile`, and how
    many there are of each class. `own` is the tile's number among the rows of `lists`.
    """
    if lists is None:
        tiles = key_tile_span(bounds, tile_q * BLOCK_M, BLOCK_M, BLOCK_N)
        sinks, low, full_low, full_high, high = tiles
        n_full = full_high - full_low
        n_partial = sinks + (full_low - low) + (high - full_high)
    else:
        tiles, n_full, n_partial = listed_tiles(lists, place, h, own)
    return tiles, n_full, n_partial


@triton.jit
def listed_tiles(lists, place, h, own):
    """As `key_tiles`, of a tile row of `lists`."""
    listed = (
        tl.cast(place.batch, tl.int64) * lists.batch
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
        n_full = tl.load(lists.counts + listed * 3)
        n_partial = tl.load(lists.counts + listed * 3 + 1)
    return tiles, n_full, n_partial


@triton.jit
def heads_that_drop(lists, place, h, own, HEADS: tl.constexpr):
    """How many of HEADS heads, from h on, miss blocks in a tile row of `lists` (T1)."""
    row = tl.cast(place.batch, tl.int64) * lists.batch + own
    found = 0
    for g in tl.static_range(HEADS):
        head = (h + g) // lists.heads_per_head * lists.head
        found += tl.load(lists.counts + (row + head) * 3 + 2)
    return found


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
def visited_tile(tiles, lists, t, n_full):
    """Number of the t-th tile that is visited, full or partial, of those that `key_tiles` gives."""
    if lists is not None:
        tile_k = tl.load(tiles + tl.where(t < n_full, t, lists.length - 1 + n_full - t))
    else:
        sinks, low, _full_low, _full_high, _high = tiles
        tile_k = tl.where(t < sinks, t, low + t - sinks)
    return tile_k


@triton.jit
def following_tile(tiles, lists, t, n_tiles, PARTIAL: tl.constexpr):
    """The tile after the t-th of n_tiles, the last for the last.

    Loops over lists ask for it one iteration ahead, so that no copy waits for its tile's number.
    """
    return uniform(nth_tile(tiles, lists, tl.minimum(t + 1, n_tiles - 1), PARTIAL))


@triton.jit
def nth_of_span(tiles, t):
    """(number, partial): the t-th tile of a span, and whether it is not full."""
    _sinks, low, full_low, full_high, _high = tiles
    return low + t, (low + t < full_low) | (low + t >= full_high)
