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
from .primitives import ALWAYS, KEPT_KEYS, KEPT_ROWS, NEVER
from .sequences import place_tile, sequence_of
from .slots import segment_of_row


@triton.jit
def classify(
    tile_q,
    tile_k,
    place,
    h,
    bounds,
    mask,
    ranges,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    SUB: tl.constexpr,
):
    """(some, all): whether a tile may hold a visible element, and whether every element of it
    exists and is visible, by all rules but V5, V7 and T1.

    Tile numbers may be tensors. `some` is a bound: a tile in which rules empty each other out only
    together is visited and found empty.
    """
    start_q = tile_q * BLOCK_M
    start_k = tile_k * BLOCK_N
    last_q = tl.minimum(start_q + BLOCK_M, bounds.seqlen_q) - 1
    some = (start_q < bounds.seqlen_q) & (start_k < bounds.seqlen_k)
    all_ = (start_q + BLOCK_M <= bounds.seqlen_q) & (start_k + BLOCK_N <= bounds.seqlen_k)
    at = (
        tl.cast(place.batch, tl.int64) * ranges.extrema_batch
        + tl.cast(h // ranges.heads_per_head, tl.int64) * ranges.extrema_head
        + place.key_record // SUB * 4
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
            tl.cast(place.batch, tl.int64) * mask.class_batch
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
def block_classes(
    tile_q,
    tile_k,
    place,
    h,
    bounds,
    blocks,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """(some, all) by V5 and T1 alone, of rows that exist. Tile numbers may be tensors."""
    start_q = tile_q * BLOCK_M
    start_k = tile_k * BLOCK_N
    at = (
        blocks.words
        + tl.cast(place.batch, tl.int64) * blocks.batch
        + tl.cast(h // blocks.heads_per_head, tl.int64) * blocks.head
        + start_k // (32 * KEPT_KEYS)
    )
    every: tl.constexpr = (tl.constexpr(1) << BLOCK_N // KEPT_KEYS) - 1
    some = tile_k < 0
    all_ = tile_k >= 0
    for part in tl.static_range(BLOCK_M // KEPT_ROWS):
        row = start_q // KEPT_ROWS + part
        present = (row * KEPT_ROWS < bounds.seqlen_q) & (start_k < bounds.seqlen_k)
        entry = at + (place.row_block + row).to(tl.int64) * blocks.row
        bits = tl.load(entry, mask=present, other=0) >> (start_k // KEPT_KEYS % 32) & every
        some = some | (bits != 0)
        all_ = all_ & ((bits == every) | ~present)
    return some, all_


@triton.jit
def gate_classes(
    tile_q,
    tile_k,
    place,
    h,
    bounds,
    gates,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    SUB: tl.constexpr,
):
    """(some, all) by V7 alone. Tile numbers may be tensors."""
    at = (
        gates.extrema
        + tl.cast(place.batch, tl.int64) * gates.extrema_batch
        + h // gates.heads_per_delta * gates.extrema_head
        + place.key_record // SUB * 2
    )
    low = float("inf")
    high = float("-inf")
    dirty = tile_k < 0
    for part in tl.static_range((BLOCK_N + SUB - 1) // SUB):
        block = tile_k * BLOCK_N // SUB + part
        present = block * SUB < bounds.seqlen_k
        least = tl.load(at + block * 2, mask=present, other=float("inf"))
        greatest = tl.load(at + block * 2 + 1, mask=present, other=float("-inf"))
        dirty = dirty | (least != least)
        low = tl.minimum(least, low)
        high = tl.maximum(greatest, high)
    record = tl.cast(place.batch, tl.int64) * gates.alpha_batch + h * gates.alpha_head
    at = gates.limits + (record + place.row_record) // KEPT_ROWS * 4
    some = dirty
    every = ~dirty
    for part in tl.static_range(BLOCK_M // KEPT_ROWS):
        row = tile_q * (BLOCK_M // KEPT_ROWS) + part
        present = row * KEPT_ROWS < bounds.seqlen_q
        some_up = tl.load(at + row * 4, mask=present, other=float("inf"))
        some_down = tl.load(at + row * 4 + 1, mask=present, other=float("-inf"))
        all_up = tl.load(at + row * 4 + 2, mask=present, other=float("-inf"))
        all_down = tl.load(at + row * 4 + 3, mask=present, other=float("inf"))
        some = some | (high >= some_up) | (low <= some_down)
        every = every & (low >= all_up) & (high <= all_down)
    return some, every


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
    gates,
    mask,
    blocks,
    ranges,
    sequences,
    heads,
    heads_per_list,
    n_own,
    length,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    SUB: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """The list of one query tile's key tiles or, transposed, of one key tile's query tiles, and
    whether blocks are missing there (V5, T1).

    Grid batch * list heads * `n_own` tile rows; a list has room for `length` tiles.
    """
    own = tl.program_id(0) % n_own
    plane = tl.program_id(0) // n_own
    h = (plane % heads) * heads_per_list
    nth = plane // heads * n_own + own
    place, n_q, n_k, own, exists = place_tile(
        seqlen_q, seqlen_k, sequences, nth, n_own, BLOCK_N if TRANSPOSED else BLOCK_M, TRANSPOSED
    )
    bounds = Bounds(
        n_q, n_k, left, right, tl.minimum(left_sinks, n_k), tl.minimum(right_sinks, n_k)
    )
    if not exists:
        return
    n_other = tl.cdiv(bounds.seqlen_k, BLOCK_N)
    if TRANSPOSED:
        n_other = tl.cdiv(bounds.seqlen_q, BLOCK_M)
    n_other = tl.minimum(n_other, length)  # a sequence longer than it was said to be
    list_at = tl.program_id(0).to(tl.int64)
    row = index + list_at * length
    n_full = 0
    n_partial = 0
    missing = 0
    for first in range(0, n_other, CHUNK):
        other = first + tl.arange(0, CHUNK)
        tile_q = other if TRANSPOSED else own
        tile_k = own if TRANSPOSED else other
        some, whole = classify(
            tile_q, tile_k, place, h, bounds, mask, ranges, BLOCK_M, BLOCK_N, SUB
        )
        if blocks is not None:
            any_, all_ = block_classes(tile_q, tile_k, place, h, bounds, blocks, BLOCK_M, BLOCK_N)
            missing |= tl.max((some & ~all_ & (other < n_other)).to(tl.int32), 0)
            some = some & any_
            whole = whole & all_
        if gates is not None:
            any_, all_ = gate_classes(
                tile_q, tile_k, place, h, bounds, gates, BLOCK_M, BLOCK_N, SUB
            )
            some = some & any_
            whole = whole & all_
        full = (whole & (other < n_other)).to(tl.int32)
        partial = (some & (other < n_other)).to(tl.int32) - full
        tl.store(row + n_full + tl.cumsum(full, 0) - full, other, mask=full != 0)
        tl.store(row + length - (n_partial + tl.cumsum(partial, 0)), other, mask=partial != 0)
        n_full += tl.sum(full, axis=0)
        n_partial += tl.sum(partial, axis=0)
    tl.store(counts + list_at * 3, n_full)
    tl.store(counts + list_at * 3 + 1, n_partial)
    tl.store(counts + list_at * 3 + 2, missing)


@triton.jit(
    do_not_specialize=[*Bounds._fields, "heads", "heads_per_list", "n_own", "rows", "capacity"]
)
def span_tiles_kernel(
    index,
    seqlen_q,
    seqlen_k,
    left,
    right,
    left_sinks,
    right_sinks,
    ranges,
    sequences,
    heads,
    heads_per_list,
    n_own,
    rows,
    capacity,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    SUB: tl.constexpr,
    TILES: tl.constexpr,
):
    """The span of one query tile among the tiles of its segment's slots, of which there are TILES
    at most; grid batch * list heads * `n_own` query tiles.

    Full are those of the first run of full tiles.
    """
    own = tl.program_id(0) % n_own
    plane = tl.program_id(0) // n_own
    h = (plane % heads) * heads_per_list
    nth = plane // heads * n_own + own
    place, n_q, n_k, tile_q, exists = place_tile(
        seqlen_q, seqlen_k, sequences, nth, n_own, BLOCK_M, False
    )
    if not exists:
        return
    bounds = Bounds(n_q, n_k, left, right, left_sinks, right_sinks)
    segment = segment_of_row(sequences, sequence_of(place), tile_q * BLOCK_M, rows, capacity)
    start = segment.slot // BLOCK_N
    nth = tl.arange(0, TILES)
    some, whole = classify(
        tile_q, start + nth, place, h, bounds, None, ranges, BLOCK_M, BLOCK_N, SUB
    )
    some = some & (nth < segment.capacity // BLOCK_N)
    whole = whole & (nth < segment.capacity // BLOCK_N)
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
