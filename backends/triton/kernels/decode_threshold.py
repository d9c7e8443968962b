"""T1 in decoding, exact and complete, by two passes: all scores, which need K alone; then, with the
final lse and the number of visible keys of every row known, V of those blocks that are not dropped.

Scores are kept in between: 4 bytes for each pair, beside the 4 · D bytes that a key and its value
take for a whole group of query heads in 16 bits.
"""

import triton
import triton.language as tl

from flash_sparse_attn.problem import KEPT_BLOCK

from .arguments import Bounds
from .decode_arguments import PLAIN_INTEGERS, Sizes, Terms
from .decode_kernels import store_split
from .decode_tiles import (
    PARTS,
    Share,
    find_keys,
    gate_floor,
    load_keys,
    load_rows,
    overlap,
    part,
    place,
    products,
    rows_of,
    share,
    tile_scores,
)
from .primitives import KEPT_KEYS, KEPT_ROWS

WORD_KEYS = 32 * KEPT_BLOCK[1]
"""Keys of a word of the set kept."""


@triton.jit(do_not_specialize=PLAIN_INTEGERS)
def scores_kernel(
    q, k, pairs, lse, counts, highest, lengths, pages, score,
    seqlen_q, seqlen_k, left, right, left_sinks, right_sinks,
    mask, start, end, blocks, bias, alpha, delta, gating,
    heads_kv, group, tiles_i, tiles_g, splits,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_I: tl.constexpr, BLOCK_G: tl.constexpr,
    BLOCK_N: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr, WIDE: tl.constexpr,
    TMA: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """Scores `[B, Hq, Sq, Sk]` in base 2 of all keys up to each length; of every split the lse, in
    base 2, and the number of visible keys of each row, `[B, Hq, Sq, splits]`.
    """
    overlap(OVERLAP)
    bounds = Bounds(seqlen_q, seqlen_k, left, right, left_sinks, right_sinks)
    everything = Bounds(seqlen_q, seqlen_k, None, None, left_sinks, right_sinks)
    sizes = Sizes(heads_kv, group, tiles_i, tiles_g, splits)
    M: tl.constexpr = BLOCK_I * BLOCK_G
    here = place(sizes, bounds, lengths, BLOCK_I, BLOCK_G)
    mine = share(here, sizes, everything, None, BLOCK_N)
    q_tile = load_rows(q, here.b, here.h, here.i, here.exists, D, BLOCK_D)
    floor = None
    if highest is not None:
        floor = gate_floor(highest, here, sizes, bounds, gating, M, ACC)
    total = tl.zeros([M], ACC)
    count = tl.zeros([M], tl.int32)
    peak = tl.full([M], float("-inf"), ACC)
    row = rows_of(here, sizes, bounds)
    for t in range(mine.first, mine.end):
        at = find_keys(here, mine, None, pages, t, BLOCK_N, TMA)
        k_tile = load_keys(k, here.n, at, D, BLOCK_D, BLOCK_N, False)
        x = products(q_tile, k_tile, PRECISION, WIDE, ACC)
        s, keep = tile_scores(
            x, here, bounds, score,
            Terms(mask, start, end, blocks, bias, alpha, delta, gating),
            floor, at.j, at.inside, ACC, False,
        )  # fmt: skip
        count += tl.sum(keep.to(tl.int32), 1)
        higher = tl.maximum(peak, tl.max(s, 1))
        shift = tl.where(higher == float("-inf"), 0.0, higher)
        total = total * tl.exp2(peak - shift) + tl.sum(tl.exp2(s - shift[:, None]), 1)
        peak = higher
        there = here.exists[:, None] & at.inside[None, :]
        tl.store(pairs + row[:, None] * seqlen_k + at.j[None, :], s, mask=there)
    of_split = row * sizes.splits + here.split
    lse2 = tl.where(total == 0.0, float("-inf"), peak + tl.log2(total))
    tl.store(lse + of_split, lse2, mask=here.exists)
    tl.store(counts + of_split, count, mask=here.exists)


@triton.jit
def row_totals(lse, counts, here, sizes, bounds, M: tl.constexpr, ACC: tl.constexpr):
    """(lse in base 2, visible keys) of each row from those of its splits, both [M]."""
    row = rows_of(here, sizes, bounds) * sizes.splits
    peak = tl.full([M], float("-inf"), ACC)
    total = tl.zeros([M], ACC)
    count = tl.zeros([M, PARTS], tl.int32)
    for s in range(0, sizes.splits, PARTS):
        split = s + tl.arange(0, PARTS)
        there = here.exists[:, None] & (split < sizes.splits)[None, :]
        at = row[:, None] + split[None, :]
        count += tl.load(counts + at, mask=there, other=0)
        of_splits = tl.load(lse + at, mask=there, other=float("-inf"))
        higher = tl.maximum(peak, tl.max(of_splits, 1))
        shift = tl.where(higher == float("-inf"), 0.0, higher)
        total = total * tl.exp2(peak - shift) + tl.sum(tl.exp2(of_splits - shift[:, None]), 1)
        peak = higher
    return tl.where(total == 0.0, float("-inf"), peak + tl.log2(total)), tl.sum(count, 1)


@triton.jit(do_not_specialize=[*PLAIN_INTEGERS, "threshold", "words"])
def kept_kernel(
    pairs, v, o, lse, kept, score_lse, score_counts, lengths, pages, threshold, words,
    seqlen_q, seqlen_k, left, right, left_sinks, right_sinks,
    heads_kv, group, tiles_i, tiles_g, splits,
    DV: tl.constexpr, BLOCK_DV: tl.constexpr, TILES: tl.constexpr,
    BLOCK_I: tl.constexpr, BLOCK_G: tl.constexpr,
    BLOCK_N: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr, FINAL: tl.constexpr,
    TMA: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """O1 of one split over the blocks kept, and their bits. A split is a share of whole words, of
    TILES tiles each.
    """
    overlap(OVERLAP)
    bounds = Bounds(seqlen_q, seqlen_k, left, right, left_sinks, right_sinks)
    sizes = Sizes(heads_kv, group, tiles_i, tiles_g, splits)
    M: tl.constexpr = BLOCK_I * BLOCK_G
    # A tile holds whole blocks of rows, or the only one.
    ROWS: tl.constexpr = min(BLOCK_I, KEPT_ROWS)
    ROW_BLOCKS: tl.constexpr = BLOCK_I // ROWS
    KEY_BLOCKS: tl.constexpr = BLOCK_N // KEPT_KEYS
    here = place(sizes, bounds, lengths, BLOCK_I, BLOCK_G)
    words_used = tl.cdiv(here.length, TILES * BLOCK_N)
    first, end = part(words_used, here.split, sizes.splits)
    mine = Share(first * TILES, tl.minimum(end * TILES, tl.cdiv(here.length, BLOCK_N)), 0, 0)
    final, count = row_totals(score_lse, score_counts, here, sizes, bounds, M, ACC)
    final = tl.where(final == float("-inf"), 0.0, final)
    bound = threshold / tl.maximum(count, 1).to(ACC)
    row = rows_of(here, sizes, bounds)
    acc = tl.zeros([M, BLOCK_DV], ACC)
    total = tl.zeros([M], ACC)
    word = tl.zeros([ROW_BLOCKS, BLOCK_G], tl.int32)
    i = here.first_i + tl.arange(0, ROW_BLOCKS) * ROWS
    tile_g = tl.program_id(0) % tiles_g
    g = tile_g * BLOCK_G + tl.arange(0, BLOCK_G)
    heads = sizes.heads_kv * sizes.group
    h = tl.cast(here.b, tl.int64) * heads + here.n * sizes.group + g
    row_block = h[None, :] * tl.cdiv(bounds.seqlen_q, KEPT_ROWS) + (i // KEPT_ROWS)[:, None]
    in_word = (i < bounds.seqlen_q)[:, None] & (g < sizes.group)[None, :]
    for t in range(mine.first, mine.end):
        at = find_keys(here, mine, None, pages, t, BLOCK_N, TMA)
        there = here.exists[:, None] & at.inside[None, :]
        s = tl.load(
            pairs + row[:, None] * seqlen_k + at.j[None, :], mask=there, other=float("-inf")
        )
        p = tl.exp2(s - final[:, None])
        stays = ~(p < bound[:, None])  # so does NaN
        stays = tl.reshape(stays.to(tl.int32), [ROW_BLOCKS, ROWS, BLOCK_G, KEY_BLOCKS, KEPT_KEYS])
        stays = tl.max(tl.max(stays, 4), 1)  # [ROW_BLOCKS, BLOCK_G, KEY_BLOCKS]
        nth = t % TILES * KEY_BLOCKS + tl.arange(0, KEY_BLOCKS)
        word = word | tl.sum(stays << nth[None, None, :], 2)
        done = (t % TILES == TILES - 1) | (t == mine.end - 1)
        tl.store(kept + row_block * words + t // TILES, word, mask=in_word & done)
        word = tl.where(done, 0, word)
        if tl.max(tl.reshape(stays, [ROW_BLOCKS * BLOCK_G * KEY_BLOCKS]), 0) != 0:
            wide = tl.broadcast_to(
                stays[:, None, :, :, None], [ROW_BLOCKS, ROWS, BLOCK_G, KEY_BLOCKS, KEPT_KEYS]
            )
            p = tl.where(tl.reshape(wide, [M, BLOCK_N]) != 0, p, 0.0)
            total += tl.sum(p, 1)
            v_tile = load_keys(v, here.n, at, DV, BLOCK_DV, BLOCK_N, True)
            acc = tl.dot(p.to(v_tile.dtype), v_tile, acc, input_precision=PRECISION, out_dtype=ACC)
    any_tile = mine.first < mine.end
    store_split(o, lse, here, sizes, bounds, acc, total, final, any_tile, DV, BLOCK_DV, FINAL)
