"""Every rule on keys (V1, V2, V4, V6 and key masks) as one run of rows per key."""

import triton
import triton.language as tl

from .arguments import Bounds
from .primitives import ALWAYS, KEPT_ROWS, NEVER, bound_range
from .sequences import place_tile


@triton.jit
def store_extrema(extrema, block, first, last):
    """Least and greatest first and last row of a block of keys, for `classify`."""
    entry = extrema + block * 4
    tl.store(entry, tl.min(first, axis=0))
    tl.store(entry + 1, tl.max(first, axis=0))
    tl.store(entry + 2, tl.min(last, axis=0))
    tl.store(entry + 3, tl.max(last, axis=0))


@triton.jit(do_not_specialize=[*Bounds._fields, "row_blocks", "heads", "heads_per_list"])
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
    delta,
    reach,
    row_blocks,
    sequences,
    heads,
    heads_per_list,
    blocks,
    SUB: tl.constexpr,
    RECORD: tl.constexpr,
):
    """Rows that see each of SUB keys, of those that exist, their extrema, and how many of the keys
    any row sees; grid batch * heads * blocks.

    A hidden key starts never and has ended before it starts. So has, where `gates.gate_reach` is
    given, one that V7 drops from every row.
    """
    block = tl.program_id(0) % blocks
    plane = tl.program_id(0) // blocks
    b = plane // heads
    h = (plane % heads) * heads_per_list
    record = block * SUB // RECORD
    place, n_q, n_k, tile, _exists = place_tile(
        seqlen_q, seqlen_k, sequences, record, blocks, RECORD, True
    )
    bounds = Bounds(
        n_q, n_k, left, right, tl.minimum(left_sinks, n_k), tl.minimum(right_sinks, n_k)
    )
    j = tile * RECORD + block * SUB % RECORD + tl.arange(0, SUB)
    exists = j < bounds.seqlen_k
    first, last = bound_range(j, bounds)
    if intervals is not None:  # V4
        at = (
            tl.cast(b, tl.int64) * intervals.batch
            + tl.cast(h // intervals.heads_per_head, tl.int64) * intervals.head
            + (place.key + j).to(tl.int64) * intervals.key
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
    at = (tl.cast(plane, tl.int64) * blocks + block) * SUB + tl.arange(0, SUB)
    if reach is not None:  # V7
        value = tl.load(delta + at)
        entry = tl.cast(plane, tl.int64) * row_blocks + tl.maximum(first, 0) // KEPT_ROWS
        up = tl.load(reach + entry * 2, mask=shown, other=float("inf"))
        down = tl.load(reach + entry * 2 + 1, mask=shown, other=float("-inf"))
        shown = shown & ((value >= up) | (value <= down) | (value != value))
    first = tl.where(shown, tl.maximum(first, 0), NEVER)
    last = tl.where(shown, tl.minimum(last, bounds.seqlen_q - 1), ALWAYS)
    tl.store(first_row + at, first)
    tl.store(last_row + at, last)
    store_extrema(extrema, tl.cast(plane, tl.int64) * blocks + block, first, last)
    tl.store(live + tl.program_id(0), tl.sum(shown.to(tl.int32), 0))
