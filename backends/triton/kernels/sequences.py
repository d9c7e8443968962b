"""Where tiles lie: of sequences in a batch, or packed end to end (V6)."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from flash_sparse_attn.problem import AttentionProblem

from . import arguments
from .arguments import RECORD_BLOCK, Place, Sequences
from .primitives import KEPT_ROWS, store_rows, uniform
from .sizes import ceil_div

_RECORD: tl.constexpr = tl.constexpr(RECORD_BLOCK)


@triton.jit
def _extent(sequences, sequence):
    """(row, key, seqlen_q, seqlen_k): where a sequence starts, and its lengths."""
    row = uniform(tl.load(sequences.cu_q + sequence))
    key = uniform(tl.load(sequences.cu_k + sequence))
    seqlen_q = uniform(tl.load(sequences.cu_q + sequence + 1)) - row
    seqlen_k = uniform(tl.load(sequences.cu_k + sequence + 1)) - key
    return row, key, seqlen_q, seqlen_k


@triton.jit
def _place(sequence, row, key):
    return Place(
        0,
        row,
        key,
        (row // _RECORD + sequence) * _RECORD,
        (key // _RECORD + sequence) * _RECORD,
        row // KEPT_ROWS + sequence,
    )


@triton.jit
def place_sequence(sequences, sequence):
    """(place, seqlen_q, seqlen_k) of a packed sequence."""
    row, key, seqlen_q, seqlen_k = _extent(sequences, sequence)
    return _place(sequence, row, key), seqlen_q, seqlen_k


@triton.jit
def sequence_of(place):
    """Number of the packed sequence that lies there; 0 in a batch."""
    return place.row_record // _RECORD - place.row // _RECORD


@triton.jit
def place_tile(
    seqlen_q, seqlen_k, sequences, nth, tiles, BLOCK: tl.constexpr, OF_KEYS: tl.constexpr
):
    """(place, seqlen_q, seqlen_k, tile, exists): where the nth tile of all rows or keys lies, the
    lengths of its sequence, its number in there, and whether it holds any. Where keys are gathered,
    those of rows are all slots.

    `tiles` counts those of one batch element; it means nothing when packed.
    """
    if sequences is None:
        place = Place(nth // tiles, 0, 0, 0, 0, 0)
        tile = nth % tiles
        exists = True
    else:
        if sequences.placed:
            entry = sequences.places + nth * 8
            sequence = uniform(tl.load(entry))
            tile = uniform(tl.load(entry + 1))
            row = uniform(tl.load(entry + 2))
            key = uniform(tl.load(entry + 3))
            n_q = uniform(tl.load(entry + 4))
            n_k = uniform(tl.load(entry + 5))
        else:
            sequence, tile, row, key, n_q, n_k = _search(sequences, nth, BLOCK, OF_KEYS)
        place = _place(sequence, row, key)
        seqlen_q = n_q
        exists = tile * BLOCK < (n_k if OF_KEYS else n_q)
        if sequences.gathered and not OF_KEYS:
            place = Place(0, row, 0, place.row_record, 0, place.row_block)
        else:
            seqlen_k = n_k
    return place, seqlen_q, seqlen_k, tile, exists


@triton.jit
def _search(sequences, nth, BLOCK: tl.constexpr, OF_KEYS: tl.constexpr):
    """The sequence that owns the nth tile, the tile's number in it, and what `Place` holds."""
    b = tl.arange(0, sequences.largest)
    cu = sequences.cu_k if OF_KEYS else sequences.cu_q
    present = b < sequences.count
    first = tl.load(cu + b, mask=present, other=0) // BLOCK + b
    sequence = uniform(tl.sum((present & (first <= nth)).to(tl.int32), 0) - 1)
    row, key, seqlen_q, seqlen_k = _extent(sequences, sequence)
    tile = nth - ((key if OF_KEYS else row) // BLOCK + sequence)
    return sequence, tile, row, key, seqlen_q, seqlen_k


@triton.jit
def place_tiles_kernel(places, sequences, BLOCK: tl.constexpr, OF_KEYS: tl.constexpr):
    """Write down what every tile's programs would search for; grid tiles."""
    nth = tl.program_id(0)
    sequence, tile, row, key, seqlen_q, seqlen_k = _search(sequences, nth, BLOCK, OF_KEYS)
    entry = places + nth * 8
    tl.store(entry, sequence)
    tl.store(entry + 1, tile)
    tl.store(entry + 2, row)
    tl.store(entry + 3, key)
    tl.store(entry + 4, seqlen_q)
    tl.store(entry + 5, seqlen_k)


def placed(sequences: Sequences | None, tiles: int, size: int, of_keys: bool) -> Sequences | None:
    """The sequences with the places of their `tiles` tiles of `size` rows or keys written down, as
    pays where every head asks.
    """
    if sequences is None:
        return None
    places = sequences.cu_q.new_empty((tiles, 8))
    place_tiles_kernel[(tiles,)](places, sequences, BLOCK=size, OF_KEYS=of_keys, num_warps=1)
    return sequences._replace(places=places, placed=arguments.flag(True))


@triton.jit(do_not_specialize=["length", "heads"])
def record_kernel(
    x,
    batch,
    head,
    step,
    record,
    length,
    heads,
    blocks,
    sequences,
    FACTOR: tl.constexpr,
    OF_KEYS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One block of a record; grid batch * heads * blocks. What does not exist becomes 0."""
    block = tl.program_id(0) % blocks
    plane = tl.program_id(0) // blocks
    b = plane // heads
    place, seqlen_q, seqlen_k, block, _exists = place_tile(
        length, length, sequences, block, blocks, BLOCK, OF_KEYS
    )
    at = block * BLOCK + tl.arange(0, BLOCK)
    first = place.key if OF_KEYS else place.row
    limit = seqlen_k if OF_KEYS else seqlen_q
    base = x + tl.cast(b, tl.int64) * batch + tl.cast(plane % heads, tl.int64) * head
    value = tl.load(base + (first + at).to(tl.int64) * step, mask=at < limit, other=0.0)
    target = record + tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    tl.store(target, value.to(record.dtype.element_ty) * FACTOR)


def record(
    problem: AttentionProblem,
    x: Tensor,
    sequences: Sequences | None,
    of_keys: bool,
    factor: float = 1.0,
) -> Tensor:
    """factor * x `[B, H, S]`, any strides, as a record in the dtype of lse: `[B, H, padded]`,
    contiguous.

    A last dim of size 1 stands for every row or key.
    """
    total = problem.seqlen_k if of_keys else problem.seqlen_q
    length = arguments.record_length(problem, total)
    made = x.new_empty((*x.shape[:2], length), dtype=arguments.sum_dtype(problem))
    blocks = length // RECORD_BLOCK
    step = 0 if x.shape[2] == 1 else x.stride(2)
    record_kernel[(x.shape[0] * x.shape[1] * blocks,)](
        x,
        x.stride(0),
        x.stride(1),
        step,
        made,
        total,
        x.shape[1],
        blocks,
        sequences,
        FACTOR=factor,
        OF_KEYS=of_keys,
        BLOCK=RECORD_BLOCK,
    )
    return made


@triton.jit(do_not_specialize=["total", "heads"])
def clear_rest_kernel(
    x,
    vector,
    value,
    cu,
    count,
    total,
    heads,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Rows past the last sequence: 0 in x `[1, T, H, D]`, `value` in the vector `[H, T]`; grid
    blocks * heads.
    """
    block = tl.program_id(0) // heads
    h = tl.program_id(0) % heads
    end = tl.load(cu + count)
    if (block + 1) * BLOCK <= end:
        return
    rows = block * BLOCK + tl.arange(0, BLOCK)
    rest = (rows >= end) & (rows < total)
    if x is not None:
        store_rows(x, 0, h, rows, rest, tl.zeros([BLOCK, BLOCK_D], tl.float32), D, BLOCK_D)
    if vector is not None:
        filled = tl.full([BLOCK], value, tl.float32)
        tl.store(vector + tl.cast(h, tl.int64) * total + rows, filled, mask=rest)


def clear_rest(
    sequences: Sequences | None,
    of_keys: bool,
    x: Tensor | None,
    vector: Tensor | None = None,
    value: float = 0.0,
) -> None:
    """Tokens of no sequence: 0 in x `[1, T, H, D]`, `value` in the vector `[1, H, T]`.

    Nothing is launched where there are no packed sequences.
    """
    if sequences is None:
        return
    total, heads = x.shape[1:3] if x is not None else vector.shape[2:0:-1]
    head_dim = 1 if x is None else x.shape[3]
    clear_rest_kernel[(ceil_div(total, RECORD_BLOCK) * heads,)](
        None if x is None else arguments.operand(x),
        vector,
        value,
        sequences.cu_k if of_keys else sequences.cu_q,
        sequences.count,
        total,
        heads,
        D=head_dim,
        BLOCK_D=arguments.block_width(head_dim),
        BLOCK=RECORD_BLOCK,
    )
