"""Kernels of decoding: attention of one split, the merge of splits, and the largest gates (V7).

Splits of the keys and their exact merge by lse are those of Flash-Decoding (Dao et al. 2023); the
softmax inside a split is online, as in the forward.
"""

import triton
import triton.language as tl

from .arguments import Bounds
from .decode_arguments import PLAIN_INTEGERS, Sizes, Terms
from .decode_tiles import (
    counted,
    find_keys,
    gate_floor,
    list_entries,
    load_gates,
    load_keys,
    load_rows,
    overlap,
    place,
    products,
    rows_of,
    share,
    tile_scores,
    tile_start,
    visible,
)
from .primitives import LN2, gate


@triton.jit
def store_split(o, lse, here, sizes, bounds, acc, total, peak, any_tile, DV: tl.constexpr,
                BLOCK_DV: tl.constexpr, FINAL: tl.constexpr):  # fmt: skip
    """O1 and O2 of a split: o `[B, Sq, Hq, splits, Dv]` and lse `[B, Hq, Sq, splits]`.

    With one split these are the outputs, FINAL: lse is then natural. Of a split without tiles only
    lse is written.
    """
    empty = total == 0.0
    acc = acc * (1.0 / tl.where(empty, 1.0, total))[:, None]
    lse_split = tl.where(empty, float("-inf"), peak + tl.log2(total))
    if FINAL:
        lse_split = lse_split * LN2
    row = rows_of(here, sizes, bounds) * sizes.splits + here.split
    tl.store(lse + row, lse_split, mask=here.exists)
    heads = sizes.heads_kv * sizes.group
    at = (tl.cast(here.b, tl.int64) * bounds.seqlen_q + here.i) * heads + here.h
    at = (at * sizes.splits + here.split) * DV
    columns = tl.arange(0, BLOCK_DV)
    written = DV if FINAL else tl.where(any_tile, DV, 0)
    keep = here.exists[:, None] & (columns < written)[None, :]
    pointers = o + at[:, None] + columns[None, :]
    tl.store(pointers, acc.to(o.dtype.element_ty), mask=keep)


@triton.jit(do_not_specialize=PLAIN_INTEGERS)
def attend_kernel(
    q, k, v, o, lse, highest, lengths, pages, listed, score,
    seqlen_q, seqlen_k, left, right, left_sinks, right_sinks,
    mask, start, end, blocks, bias, alpha, delta, gating,
    heads_kv, group, tiles_i, tiles_g, splits,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_I: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK_N: tl.constexpr, ACC: tl.constexpr,
    PRECISION: tl.constexpr, WIDE: tl.constexpr, FINAL: tl.constexpr, TMA: tl.constexpr,
    OVERLAP: tl.constexpr,
):  # fmt: skip
    """O1 of one split; k and v are both descriptors (TMA), or neither is.

    Grid: `decode_tiles.place`.
    """
    overlap(OVERLAP)
    bounds = Bounds(seqlen_q, seqlen_k, left, right, left_sinks, right_sinks)
    sizes = Sizes(heads_kv, group, tiles_i, tiles_g, splits)
    M: tl.constexpr = BLOCK_I * BLOCK_G
    here = place(sizes, bounds, lengths, BLOCK_I, BLOCK_G)
    mine = share(here, sizes, bounds, listed, BLOCK_N)
    q_tile = load_rows(q, here.b, here.h, here.i, here.exists, D, BLOCK_D)
    floor = None
    if highest is not None:
        floor = gate_floor(highest, here, sizes, bounds, gating, M, ACC)
    acc = tl.zeros([M, BLOCK_DV], ACC)
    total = tl.zeros([M], ACC)
    peak = tl.full([M], float("-inf"), ACC)

    # Only the tile that holds the length needs tests, so it has a loop of its own, where the copy
    # engine reads: pointers test all the same.
    whole_end = mine.first
    if TMA:
        last_end = tile_start(mine, mine.end - 1, BLOCK_N) + BLOCK_N
        cut = (mine.first < mine.end) & (last_end > here.length)
        whole_end = mine.end - cut.to(tl.int32)
    every = None
    if listed is not None and listed.tested:
        every = list_entries(here, listed, tl.arange(0, listed.tested))
    # What tables and lists say is asked for a tile ahead, so that it is there when it is needed.
    AHEAD: tl.constexpr = listed is not None or pages is not None
    found = find_keys(here, mine, listed, pages, mine.first, BLOCK_N, TMA)
    for CUT in tl.static_range(0 if TMA else 1, 2):
        for t in range(whole_end if CUT else mine.first, mine.end if CUT else whole_end):
            if AHEAD:
                at = found
                found = find_keys(here, mine, listed, pages, t + 1, BLOCK_N, TMA)
            else:
                at = find_keys(here, mine, listed, pages, t, BLOCK_N, TMA)
            k_tile = load_keys(k, here.n, at, D, BLOCK_D, BLOCK_N, False)
            v_tile = load_keys(v, here.n, at, DV, BLOCK_DV, BLOCK_N, CUT)
            # Keys are on their way meanwhile, whether they count or not.
            counts = counted(here, listed, every, at, t, BLOCK_N)
            x = products(q_tile, k_tile, PRECISION, WIDE, ACC)
            s = tile_scores(
                x, here, bounds, score,
                Terms(mask, start, end, blocks, bias, alpha, delta, gating),
                floor, at.j, counts, ACC, CUT == 0,
            )[0]  # fmt: skip
            higher = tl.maximum(peak, tl.max(s, 1))
            # A row that has seen nothing has no finite maximum.
            shift = tl.where(higher == float("-inf"), 0.0, higher)
            p = tl.exp2(s - shift[:, None])
            decay = tl.exp2(peak - shift)
            total = total * decay + tl.sum(p, 1)
            acc = acc * decay[:, None]
            acc = tl.dot(p.to(v_tile.dtype), v_tile, acc, input_precision=PRECISION, out_dtype=ACC)
            peak = higher
    any_tile = mine.first < mine.end
    store_split(o, lse, here, sizes, bounds, acc, total, peak, any_tile, DV, BLOCK_DV, FINAL)


@triton.jit(do_not_specialize=["rows", "heads", "seqlen_q", "splits"])
def merge_kernel(
    parts, part_lse, o, lse, rows, heads, seqlen_q, splits, DV: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_S: tl.constexpr, MOST_SPLITS: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """o = sum_s 2^(lse_s - lse) o_s over the splits of one row, in their order; grid rows * column
    tiles of BLOCK_C.
    """
    row = tl.program_id(0) % rows  # (b, i, h), as o has them
    c = tl.program_id(0) // rows * BLOCK_C + tl.arange(0, BLOCK_C)
    h = row % heads
    i = row // heads % seqlen_q
    b = row // heads // seqlen_q
    at = (tl.cast(b, tl.int64) * heads + h) * seqlen_q + i
    every = tl.arange(0, MOST_SPLITS)
    overlap(OVERLAP)
    of_splits = tl.load(part_lse + at * splits + every, mask=every < splits, other=float("-inf"))
    peak = tl.max(of_splits, 0)
    shift = tl.where(peak == float("-inf"), 0.0, peak)
    total = tl.sum(tl.exp2(of_splits - shift), 0)
    empty = total == 0.0  # O2
    acc = tl.zeros([BLOCK_C], total.dtype)
    for s in range(0, splits, BLOCK_S):
        split = s + tl.arange(0, BLOCK_S)
        there = split < splits
        lse_s = tl.load(part_lse + at * splits + split, mask=there, other=float("-inf"))
        from_split = (tl.cast(row, tl.int64) * splits + split) * DV
        # Read whether it was written or not, so as not to wait for lse.
        o_s = tl.load(
            parts + from_split[:, None] + c[None, :],
            mask=there[:, None] & (c < DV)[None, :], other=0.0,
        )  # fmt: skip
        o_s = tl.where((lse_s == float("-inf"))[:, None], 0.0, o_s)
        acc += tl.sum(o_s * tl.exp2(lse_s - shift)[:, None], 0)
    acc = acc / tl.where(empty, 1.0, total)
    tl.store(o + tl.cast(row, tl.int64) * DV + c, acc.to(o.dtype.element_ty), mask=c < DV)
    total_lse = tl.where(empty, float("-inf"), (peak + tl.log2(total)) * LN2)
    tl.store(lse + at, total_lse, mask=tl.program_id(0) < rows)


@triton.jit(do_not_specialize=PLAIN_INTEGERS)
def highest_gates_kernel(
    highest, lengths, listed,
    seqlen_q, seqlen_k, left, right, left_sinks, right_sinks,
    mask, start, end, blocks, bias, alpha, delta, gating,
    heads_kv, group, tiles_i, tiles_g, splits,
    BLOCK_I: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK_N: tl.constexpr, ACC: tl.constexpr,
    OVERLAP: tl.constexpr,
):  # fmt: skip
    """V7: the largest c g_ij of each row over the visible keys of a split, in base 2,
    `[B, Hq, Sq, splits]`. Reads no keys but their gates.
    """
    overlap(OVERLAP)
    bounds = Bounds(seqlen_q, seqlen_k, left, right, left_sinks, right_sinks)
    sizes = Sizes(heads_kv, group, tiles_i, tiles_g, splits)
    here = place(sizes, bounds, lengths, BLOCK_I, BLOCK_G)
    mine = share(here, sizes, bounds, listed, BLOCK_N)
    top = tl.full([BLOCK_I * BLOCK_G], float("-inf"), ACC)
    for t in range(mine.first, mine.end):
        at = find_keys(here, mine, listed, None, t, BLOCK_N, False)
        a, d = load_gates(alpha, delta, here, at.j, at.inside, ACC)
        gated = gate(gating, a * d)[0]
        keep = visible(
            here, bounds, Terms(mask, start, end, blocks, bias, alpha, delta, gating),
            at.j, at.inside,
        )  # fmt: skip
        seen = tl.where(keep, gated, float("-inf"))
        top = tl.maximum(top, tl.max(seen, 1))
    row = rows_of(here, sizes, bounds) * sizes.splits + here.split
    tl.store(highest + row, top, mask=here.exists)
