"""Host side of the preparation: everything about a call but its operands, read once.

Nothing here reads device data.
"""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from flash_sparse_attn.packed_mask import with_dense_mask
from flash_sparse_attn.problem import WORD_BITS, AttentionProblem
from flash_sparse_attn.tensors import AttentionTensors

from . import arguments, blocks, compaction, gates, packing, tiles, tuning
from .arguments import (
    Bias,
    Gates,
    PackedMask,
    Ranges,
    Sequences,
    Slots,
    Terms,
    TileLists,
    broadcast_strides,
)
from .ranges import key_ranges_kernel
from .sequences import record
from .sizes import ceil_div, power_of_2
from .tuning import Tile

PACK_CHUNK = 256
"""Keys that one program packs."""
WORDS_CHUNK = 2048
"""Keys that one program reads of a mask in bits."""
LISTED = {"mask", "intervals", "block_map", "gate_threshold"}
"""Terms under which tiles are listed, as T1 has them too."""
LIST_CHUNK = 128
"""Tiles that one program classifies at a time."""


class _Intervals(NamedTuple):
    """V4 as given: start and end of one set of strides."""

    start: Tensor
    end: Tensor
    batch: int
    head: int
    key: int
    heads_per_head: int


class _KeyMask(NamedTuple):
    """V3 where it is the same for all rows, as given, one byte a key."""

    pointer: Tensor
    batch: int
    head: int
    key: int
    heads_per_head: int


def prepare(
    problem: AttentionProblem,
    tensors: AttentionTensors,
    direction: str,
    kept: Tensor | None = None,
) -> tuple[AttentionProblem, AttentionTensors, Terms, Slots | None]:
    """Read gates, bias, masks and intervals once (S3, S4, V3 to V5, V7), and gather the keys where
    that applies.

    Args:
        problem, tensors: of the call.
        direction: "forward" or "backward", for which segments have lengths of their own.
        kept: in the backward, the set that the forward kept (T1).

    Returns:
        The problem and the tensors that the kernels work on, every tensor `[B, S, H, D]`; the
        terms; and the slots of gathered keys.
    """
    if problem.mask is not None and problem.mask[2] == 1:
        problem, tensors = with_dense_mask(problem, tensors)
    if problem.block_map is not None and not blocks.fit(problem):
        problem, tensors = blocks.as_mask(problem, tensors)
    sequences = arguments.sequences(problem, tensors)
    if sequences is not None:
        q, k, v = map(arguments.batched, (tensors.q, tensors.k, tensors.v))
        tensors = replace(tensors, q=q, k=k, v=v)
    block = tuning.mask_block(problem)
    packed = problem.mask is not None and problem.mask[2] != 1
    pruned = problem.gate_threshold > 0
    listed = kept is not None or problem.terms() & LISTED
    compacted = compaction.applies(problem)
    gathers_bias = compacted and problem.bias is not None and problem.bias[2] == 1
    bias, shown = None, None
    if tensors.bias is not None and not gathers_bias:
        bias = _bias(problem, tensors.bias, sequences)
    if kept is not None:
        shown = blocks.of_kept(kept)
    elif problem.block_map is not None:
        shown = blocks.from_map(problem, tensors.block_map)
    ranges, live = key_ranges(problem, tensors, sequences, block) if listed else (None, None)
    # In float64 a change of base is as great an error as any other (N1).
    natural = problem.dtype.itemsize == 8
    score = arguments.score(problem, natural=natural)
    terms = Terms(
        arguments.bounds(problem),
        score,
        gates.gates(problem, tensors, score, sequences, block),
        bias,
        _pack_mask(problem, tensors.mask, block) if packed else None,
        shown,
        ranges,
        sequences,
        block,
    )
    if pruned:
        tile = tuning.tile("gate_floor", problem)
        found = gates.prune(problem, terms, list_tiles(problem, terms, None, tile), tile)
        terms = terms._replace(gates=found)
    if pruned and compacted:
        ranges, live = key_ranges(problem, tensors, None, block, found)
        terms = terms._replace(ranges=ranges)
    if not compacted:
        return problem, tensors, terms, None
    rows = tuning.segment_rows(problem, direction, compaction.keys_per_row(problem))
    return problem, *compaction.compact(problem, tensors, terms, live, rows)


def _bias(problem: AttentionProblem, bias: Tensor, sequences: Sequences | None) -> Bias:
    """S4: a bias of one dim becomes a record, which tiles read without tests."""
    _, heads, rows, keys = bias.shape
    heads_per_head = problem.heads_q // heads
    if rows != 1 and keys != 1:
        block = arguments.RECORD_BLOCK
        even = rows % block == 0 and keys % block == 0
        kind = (arguments.flag(True), arguments.flag(True), arguments.flag(even))
        return Bias(bias, *broadcast_strides(bias)[:2], *bias.stride()[2:], heads_per_head, *kind)
    on_rows = rows != 1
    made = record(problem, bias[..., 0] if on_rows else bias[:, :, 0], sequences, not on_rows)
    strides = (*broadcast_strides(made)[:2], int(on_rows), int(not on_rows))
    kind = (arguments.flag(on_rows), arguments.flag(not on_rows), arguments.flag(True))
    return Bias(made, *strides, heads_per_head, *kind)


def _pack_mask(problem: AttentionProblem, mask: Tensor, block: int) -> PackedMask:
    """Bits and block classes of a mask, boolean `[{B,1}, {Hq,Hkv,1}, Sq, {Sk,1}]` or in bits.

    A key dim of size 1 becomes one word, which every key reads. Contiguous bits that fill
    whole tiles are read where they are.
    """
    batch, heads, rows, keys = problem.mask
    n_rows = arguments.padded(rows)
    n_words = 1 if keys == 1 else arguments.padded(keys) // WORD_BITS
    pieces, keys_a_piece = _pieces(problem, mask)
    whole = keys_a_piece == WORD_BITS and (n_rows, n_words * WORD_BITS) == (rows, keys)
    words = mask
    if not (whole and mask.is_contiguous()):
        words = mask.new_empty((batch, heads, n_rows, n_words), dtype=torch.int32)
    n_columns = ceil_div(n_words * WORD_BITS, block)
    classes = mask.new_empty((batch, heads, n_rows // block, n_columns), dtype=torch.int8)
    chunk = WORDS_CHUNK if keys_a_piece == WORD_BITS else PACK_CHUNK
    grid = (batch * heads * (n_rows // block) * ceil_div(n_words * WORD_BITS, chunk),)
    packing.pack_mask_kernel[grid](
        pieces,
        *pieces.stride(),
        words,
        classes,
        rows,
        keys,
        n_rows,
        n_words,
        heads,
        SUB=block,
        CHUNK=chunk,
        KEYS=keys_a_piece,
        ONE_KEY=keys == 1,
        COPIED=words is not mask,
    )
    strides = [*broadcast_strides(words)[:2], n_words, int(keys > 1)]
    class_strides = [*broadcast_strides(classes)[:2], n_columns, int(keys > 1)]
    return PackedMask(words, *strides, problem.heads_q // heads, classes, *class_strides)


def _pieces(problem: AttentionProblem, mask: Tensor) -> tuple[Tensor, int]:
    """A mask in bits in pieces of `WORD_BITS` keys; the bytes of another in pieces of four keys
    where its layout allows it, or of one.
    """
    if problem.mask_keys is not None:
        return mask, WORD_BITS
    dense = mask.stride(3) == 1 and mask.shape[3] % 4 == 0 and mask.storage_offset() % 4 == 0
    if dense and all(stride % 4 == 0 for stride in mask.stride()[:3]):
        return mask.view(torch.int32), 4
    return mask.view(torch.int8), 1


def key_ranges(
    problem: AttentionProblem,
    tensors: AttentionTensors,
    sequences: Sequences | None,
    block: int,
    pruning: Gates | None = None,
) -> tuple[Ranges, Tensor]:
    """V1, V2, V4, V6 and a key mask as one run of rows per key, an empty one where `pruning` (V7)
    drops the key from all of them; and, int32 `[.., blocks]`, how many keys of each block any row
    sees.
    """
    sizes = [(1, 1)]
    delta = reach = None
    if pruning is not None:
        sizes.append((problem.batch, problem.heads_kv))
        delta, reach = pruning.delta, gates.gate_reach(problem, pruning)
    intervals: _Intervals | None = None
    keys: _KeyMask | None = None
    if problem.intervals is not None:
        start, end = tensors.interval_start, tensors.interval_end
        if start.stride() != end.stride():
            start, end = start.contiguous(), end.contiguous()
        sizes.append(problem.intervals)
        strides = (*broadcast_strides(start)[:2], start.stride(2))
        intervals = _Intervals(start, end, *strides, problem.heads_q // start.shape[1])
    if problem.mask is not None and problem.mask[2] == 1:
        mask = tensors.mask.view(torch.int8)
        sizes.append(problem.mask[:2])
        batch, head, _, key = broadcast_strides(mask)
        keys = _KeyMask(mask, batch, head, key, problem.heads_q // mask.shape[1])
    batch, heads = _broadcast(sizes)
    device = tensors.q.device
    length = arguments.record_length(problem, problem.seqlen_k)
    first, last = (
        torch.empty((batch, heads, length), dtype=torch.int32, device=device) for _ in range(2)
    )
    n_blocks = length // block
    extrema = torch.empty((batch, heads, n_blocks, 4), dtype=torch.int32, device=device)
    live = torch.empty((batch, heads, n_blocks), dtype=torch.int32, device=device)
    heads_per_head = problem.heads_q // heads
    key_ranges_kernel[(batch * heads * n_blocks,)](
        first,
        last,
        extrema,
        live,
        *arguments.bounds(problem),
        intervals,
        keys,
        delta,
        reach,
        0 if reach is None else reach.shape[2],
        sequences,
        heads,
        heads_per_head,
        n_blocks,
        SUB=block,
        RECORD=arguments.RECORD_BLOCK,
    )
    strides = (*broadcast_strides(first)[:2], heads_per_head)
    bits_suffice = problem.mask is not None and problem.mask[2] != 1 and problem.mask[3] > 1
    ruled = problem.causal or problem.window != (None, None) or problem.intervals is not None
    binding = arguments.flag(ruled or not bits_suffice)
    extrema_strides = broadcast_strides(extrema)[:2]
    return Ranges(first, last, *strides, extrema, *extrema_strides, binding), live


def list_tiles(
    problem: AttentionProblem,
    terms: Terms,
    slots: Slots | None,
    tile: Tile,
    *,
    transposed: bool = False,
) -> TileLists | None:
    """The tiles to visit for each query tile, or (transposed) for each key tile.

    None where kernels work them out from bounds alone or, transposed, from the ranges of slots.
    """
    pruning = terms.gates if terms.gates is not None and terms.gates.pruned.value else None
    if terms.ranges is None or (transposed and slots is not None and pruning is None):
        return None
    sizes = [terms.ranges.first.shape[:2]]
    if terms.mask is not None:
        sizes.append(terms.mask.words.shape[:2])
    if terms.blocks is not None:
        sizes.append(terms.blocks.words.shape[:2])
    if pruning is not None:
        sizes.append(pruning.alpha.shape[:2])
    batch, heads = _broadcast(sizes)
    longest_q, longest_k = terms.bounds.seqlen_q, terms.bounds.seqlen_k
    if terms.sequences is not None:
        longest_q, longest_k = problem.max_seqlen_q, problem.max_seqlen_k
    own = arguments.rows_of_tiles(problem, terms.bounds.seqlen_q, tile.block_m)
    # Never 0: loops ask for a first tile, whatever follows.
    other = max(1, ceil_div(longest_k, tile.block_n))
    if transposed:
        own = arguments.rows_of_tiles(problem, terms.bounds.seqlen_k, tile.block_n)
        other = max(1, ceil_div(longest_q, tile.block_m))
    strides = (0 if batch == 1 else heads * own, 0 if heads == 1 else own)
    heads_per_list = problem.heads_q // heads
    shape = {"BLOCK_M": tile.block_m, "BLOCK_N": tile.block_n, "SUB": terms.block}
    if slots is not None and compaction.spans(problem, slots):
        index = terms.ranges.first.new_empty(batch * heads * own * 4)
        tiles.span_tiles_kernel[(batch * heads * own,)](
            index,
            *terms.bounds,
            terms.ranges,
            terms.sequences,
            heads,
            heads_per_list,
            own,
            slots.rows,
            slots.capacity,
            TILES=power_of_2(slots.capacity // tile.block_n),
            **shape,
        )
        kind = (arguments.flag(True), arguments.flag(False))
        return TileLists(index, index, 4, *strides, heads_per_list, *kind)
    n = batch * heads * own
    made = terms.ranges.first.new_empty(n * (other + 3))
    index, counts = made[: n * other], made[n * other :]
    tiles.list_tiles_kernel[(n,)](
        index,
        counts,
        *terms.bounds,
        pruning,
        terms.mask,
        terms.blocks,
        terms.ranges,
        terms.sequences,
        heads,
        heads_per_list,
        own,
        other,
        TRANSPOSED=transposed,
        CHUNK=LIST_CHUNK,
        **shape,
    )
    # Bits of a mask (V3) are read anew for every head, and better together.
    apart = problem.block_map is not None and terms.mask is None
    kind = (arguments.flag(False), arguments.flag(apart))
    return TileLists(index, counts, other, *strides, heads_per_list, *kind)


def launches(problem: AttentionProblem, terms: Terms) -> list[tuple[Terms, bool | None]]:
    """(terms, DROPS) of each launch of an attention kernel.

    Where nothing but T1 asks for lists, the rows of tiles from which it drops nothing are left to a
    launch that works their tiles out from bounds: DROPS says which rows are those of a launch, None
    that all are.
    """
    if problem.softmax_threshold == 0 or problem.terms() & LISTED:
        return [(terms, None)]
    return [(terms._replace(blocks=None, ranges=None), False), (terms, True)]


def _broadcast(sizes: list[tuple[int, ...]]) -> list[int]:
    """Sizes to which all of `sizes` broadcast: 1 gives way, to 0 too."""
    return [min(column) if 0 in column else max(column) for column in zip(*sizes, strict=True)]
