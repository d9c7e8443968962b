"""Device functions of decoding: which keys a program reads, and what their scores are.

A program has BLOCK_I rows of BLOCK_G query heads of a group as the rows of its tile, (i, g) with g
fastest, and a share of the keys. Keys come in tiles of BLOCK_N, in their own order, or as a list
names them.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from .primitives import LOG2E, scores

PARTS: tl.constexpr = tl.constexpr(16)
"""Splits whose numbers are reduced at a time."""


class Place(NamedTuple):
    """What a program works on."""

    b: Any
    n: Any
    """Its key-value head."""
    split: Any
    length: Any
    """Keys of the sequence."""
    i: Any
    """Rows of the tile, [M]."""
    h: Any
    """Their query heads, [M]."""
    exists: Any
    """Whether they are rows at all, [M]."""
    first_i: Any
    end_i: Any


class Share(NamedTuple):
    """Tiles `first` to `end` of those that a sequence visits: tile t is t, from `near` on
    t + `gap`.
    """

    first: Any
    end: Any
    near: Any
    gap: Any


class Keys(NamedTuple):
    """A tile of keys."""

    j: Any
    inside: Any
    """Whether they are keys of the sequence, [BLOCK_N]."""
    slab: Any
    """Where they are in the cache: which sequence or page, and which row of it."""
    row: Any


@triton.jit
def place(sizes, bounds, lengths, BLOCK_I: tl.constexpr, BLOCK_G: tl.constexpr):
    """The place of this program: row tiles fastest, then heads, as they read neighbouring memory;
    then splits, then sequences.
    """
    pid = tl.program_id(0)
    tile_g = pid % sizes.tiles_g
    pid = pid // sizes.tiles_g
    tile_i = pid % sizes.tiles_i
    pid = pid // sizes.tiles_i
    n = pid % sizes.heads_kv
    pid = pid // sizes.heads_kv
    split = pid % sizes.splits
    b = pid // sizes.splits
    length = bounds.seqlen_k
    if lengths is not None:
        length = tl.load(lengths.pointer + tl.cast(b, tl.int64) * lengths.stride)
    m = tl.arange(0, BLOCK_I * BLOCK_G)
    i = tile_i * BLOCK_I + m // BLOCK_G
    g = tile_g * BLOCK_G + m % BLOCK_G
    exists = (i < bounds.seqlen_q) & (g < sizes.group)
    end_i = tl.minimum(tile_i * BLOCK_I + BLOCK_I, bounds.seqlen_q)
    return Place(b, n, split, length, i, n * sizes.group + g, exists, tile_i * BLOCK_I, end_i)


@triton.jit
def overlap(OVERLAP: tl.constexpr):
    """With OVERLAP, kernels of a call are launched before the one before them has ended: a program
    lets the next kernel come, and waits here until what the kernel before wrote can be read.
    """
    if OVERLAP:
        gdc_launch_dependents()
        gdc_wait()


@triton.jit
def part(count, split, splits):
    """The first and the end of an even share of `count` things."""
    least = count // splits
    more = count % splits
    first = split * least + tl.minimum(split, more)
    return first, first + least + tl.where(split < more, 1, 0)


@triton.jit
def share(place, sizes, bounds, listed, BLOCK_N: tl.constexpr):
    """The tiles of this program's split: an even share of those with keys that any of its rows sees
    by V1, V2 and V6.
    """
    near = 0
    gap = 0
    if listed is not None:
        tiles = tl.cdiv(listed.count, BLOCK_N)
    else:
        high = place.length
        first = 0
        offset = place.length - bounds.seqlen_q
        if bounds.right is not None:
            high = tl.minimum(high, tl.maximum(place.end_i + offset + bounds.right, 0))
            high = tl.maximum(high, tl.minimum(place.length, bounds.right_sinks))
        if bounds.left is not None:
            first = tl.maximum(place.first_i + offset - bounds.left, 0) // BLOCK_N
            near = tl.minimum(tl.cdiv(bounds.left_sinks, BLOCK_N), first)
            near = tl.minimum(near, tl.cdiv(high, BLOCK_N))
            gap = first - near
        tiles = near + tl.maximum(tl.cdiv(high, BLOCK_N) - first, 0)
    start, end = part(tiles, place.split, sizes.splits)
    return Share(start, end, near, gap)


@triton.jit
def tile_start(share, t, BLOCK_N: tl.constexpr):
    """First key of the t-th tile, without lists."""
    return (t + tl.where(t >= share.near, share.gap, 0)) * BLOCK_N


@triton.jit
def list_entries(place, listed, position):
    """The entries of the list at these positions, -1 past its end."""
    at = (
        listed.pointer
        + tl.cast(place.b, tl.int64) * listed.batch
        + tl.cast(place.n, tl.int64) * listed.head
    )
    return tl.load(
        at + position.to(tl.int64) * listed.column, mask=position < listed.count, other=-1
    )


@triton.jit
def counted(place, listed, every, keys, t, BLOCK_N: tl.constexpr):
    """Which keys of the t-th tile count (V6), [BLOCK_N]: of equal ones the first that is listed.

    `every` is the whole list, where keys may stand in it twice.
    """
    counts = keys.inside
    if listed is not None and listed.tested:
        position = t * BLOCK_N + tl.arange(0, BLOCK_N)
        before = tl.arange(0, listed.tested)[None, :] < position[:, None]
        again = (every[None, :] == keys.j[:, None]) & before
        counts = counts & (tl.max(again.to(tl.int32), 1) == 0)
    return counts


@triton.jit
def find_keys(place, share, listed, pages, t, BLOCK_N: tl.constexpr, TMA: tl.constexpr):
    """The keys of the t-th tile. With TMA, slab and row are those of the first.

    Page entries of what is no key are not read, nor what they would lead to.
    """
    if listed is not None:
        start = 0
        j = list_entries(place, listed, t * BLOCK_N + tl.arange(0, BLOCK_N))
        inside = (j >= 0) & (j < place.length)
    else:
        start = tile_start(share, t, BLOCK_N)
        j = start + tl.arange(0, BLOCK_N)
        inside = j < place.length
    slab = place.b
    row = j
    there = inside
    if TMA:
        row = start
        there = start < place.length
    if pages is not None:
        entry = pages.pointer + tl.cast(place.b, tl.int64) * pages.batch
        column = tl.cast(row // pages.size, tl.int64) * pages.column
        slab = tl.load(entry + column, mask=there, other=0)
        row = row % pages.size
    return Keys(j, inside, slab, row)


@triton.jit
def load_rows(x, slab, head, row, inside, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """x[slab, row, head, :], [rows, BLOCK_D], by pointers; 0 where not `inside`, and from D on."""
    columns = tl.arange(0, BLOCK_D)
    at = tl.cast(slab, tl.int64) * x.batch + tl.cast(head, tl.int64) * x.head
    at = x.pointer + (at + tl.cast(row, tl.int64) * x.row)
    keep = inside[:, None]
    if D != BLOCK_D:
        keep = keep & (columns < D)[None, :]
    return tl.load(at[:, None] + columns.to(tl.int64)[None, :] * x.column, mask=keep, other=0.0)


@triton.jit
def load_keys(
    x, head, keys, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr,
    CLEAR: tl.constexpr,
):  # fmt: skip
    """Keys of the cache x, [BLOCK_N, BLOCK_D]: by the copy engine where x is a descriptor.

    The copy engine also reads what lies past the length; with CLEAR that becomes 0 (N2).
    """
    if isinstance(x, tl.core.tensor_descriptor_base):
        tile = tl.reshape(x.load([keys.slab, head, keys.row, 0]), [BLOCK_N, BLOCK_D])
        if CLEAR:
            tile = tl.where(keys.inside[:, None], tile, 0.0)
    else:
        tile = load_rows(x, keys.slab, head, keys.row, keys.inside, D, BLOCK_D)
    return tile


@triton.jit
def load_term(x, place, row, key, inside):
    """A term at rows and keys of a tile, in its broadcast shape; what is not there reads as 0."""
    at = x.pointer + tl.cast(place.b, tl.int64) * x.batch
    if x.has_rows:
        head = tl.cast(place.h // x.heads_per_head, tl.int64)
        at = at + (head * x.head + tl.cast(row, tl.int64) * x.row)[:, None]
    else:
        at = at + tl.cast(place.n, tl.int64) * x.head
    if x.has_keys:
        at = at + (tl.cast(key, tl.int64) * x.key)[None, :]
    if x.has_rows and x.has_keys:
        value = tl.load(at, mask=place.exists[:, None] & inside[None, :], other=0)
    elif x.has_rows:
        value = tl.load(at, mask=place.exists[:, None], other=0)
    elif x.has_keys:
        value = tl.load(at, mask=inside[None, :], other=0)
    else:
        value = tl.load(at)
    return value


@triton.jit
def load_gates(alpha, delta, place, j, inside, ACC: tl.constexpr):
    """(alpha in base 2, delta) of S3, as `primitives.scores` and `primitives.gate` take them."""
    of_rows = load_term(alpha, place, place.i, j, inside).to(ACC) * LOG2E
    return of_rows, load_term(delta, place, place.i, j, inside).to(ACC)


@triton.jit
def visible(place, bounds, terms, j, inside):
    """Which elements of a tile are visible but for V7, [M, BLOCK_N]."""
    keep = place.exists[:, None] & inside[None, :]
    p = place.i + (place.length - bounds.seqlen_q)
    if bounds.right is not None:  # V1, V2
        near = j[None, :] <= (p + bounds.right)[:, None]
        keep = keep & (near | (j < bounds.right_sinks)[None, :])
    if bounds.left is not None:  # V2
        near = j[None, :] >= (p - bounds.left)[:, None]
        keep = keep & (near | (j < bounds.left_sinks)[None, :])
    if terms.mask is not None:  # V3
        keep = keep & (load_term(terms.mask, place, place.i, j, inside) != 0)
    if terms.start is not None:  # V4
        start = load_term(terms.start, place, place.i, j, inside)
        end = load_term(terms.end, place, place.i, j, inside)
        keep = keep & (start <= place.i[:, None]) & (place.i[:, None] < end)
    if terms.blocks is not None:  # V5
        row = place.i // terms.blocks.rows
        block = load_term(terms.blocks, place, row, j // terms.blocks.keys, inside)
        keep = keep & (block != 0)
    return keep


@triton.jit
def products(q_tile, k_tile, PRECISION: tl.constexpr, WIDE: tl.constexpr, ACC: tl.constexpr):
    """<q_i, k_j> of a tile (S1).

    With WIDE, those of float32 are summed in float64: a sum whose first terms are large loses a
    rounding of theirs with every later one, and decoding waits for memory anyway.
    """
    if WIDE and q_tile.dtype == tl.float32:
        wide = tl.trans(k_tile.to(tl.float64))
        x = tl.dot(q_tile.to(tl.float64), wide, out_dtype=tl.float64).to(ACC)
    else:
        x = tl.dot(q_tile, tl.trans(k_tile), input_precision=PRECISION, out_dtype=ACC)
    return x


@triton.jit
def tile_scores(
    x, place, bounds, score, terms, floor, j, inside, ACC: tl.constexpr, WHOLE: tl.constexpr
):
    """(s, keep) of a tile from raw products x: scores in base 2, -inf where hidden (N2), and which
    elements are visible.

    WHOLE says that all keys of the tile exist; then a call without terms hides nothing.
    """
    alpha = None
    delta = None
    bias = None
    if terms.alpha is not None:
        alpha, delta = load_gates(terms.alpha, terms.delta, place, j, inside, ACC)
    if terms.bias is not None:
        bias = load_term(terms.bias, place, place.i, j, inside)
    s, _, gated, _ = scores(x, score, terms.gating, alpha, delta, bias)
    BOUNDED: tl.constexpr = bounds.right is not None or bounds.left is not None
    MASKED: tl.constexpr = terms.mask is not None or terms.start is not None
    HIDES: tl.constexpr = BOUNDED or MASKED or terms.blocks is not None or floor is not None
    keep = visible(place, bounds, terms, j, inside)
    if floor is not None:  # V7; NaN drops nothing
        keep = keep & ~(gated < floor[:, None])
    if HIDES or not WHOLE:
        s = tl.where(keep, s, float("-inf"))
    return s, keep


@triton.jit
def rows_of(place, sizes, bounds):
    """Where the numbers of the rows of a tile stand in `[B, Hq, Sq]`."""
    heads = sizes.heads_kv * sizes.group
    return (tl.cast(place.b, tl.int64) * heads + place.h) * bounds.seqlen_q + place.i


@triton.jit
def gate_floor(highest, place, sizes, bounds, gating, M: tl.constexpr, ACC: tl.constexpr):
    """V7: the least gate that each row keeps, from its largest in every split, [M]."""
    row = rows_of(place, sizes, bounds) * sizes.splits
    of_parts = tl.full([M, PARTS], float("-inf"), ACC)  # one reduction, after the loop
    for s in range(0, sizes.splits, PARTS):
        split = s + tl.arange(0, PARTS)
        there = place.exists[:, None] & (split < sizes.splits)[None, :]
        at = highest + row[:, None] + split[None, :]
        of_parts = tl.maximum(of_parts, tl.load(at, mask=there, other=float("-inf")))
    top = tl.max(of_parts, 1)
    # The largest itself must stay, though it is evaluated anew.
    return top + gating.reach - gating.slack * tl.maximum(tl.abs(top), 1.0)
