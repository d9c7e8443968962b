"""How the selection M5 divides keys: sequences into segments, segments into blocks.

What the kernels keep of keys (grades, queues, contests) lies on an axis of blocks, plane after
plane, on which every segment starts on a whole block. In a batch all sequences are of one length
and have as many segments. Packed sequences (V6) start on the axis at block cu[b] // block + b, so
that no sum over sequences is needed to find them, and choose how long their segments are by their
own length: lengths are known on the device alone.
"""

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple

import triton
import triton.language as tl

from .sizes import ceil_div

ALIGNMENT = 16
"""Lengths of lists are multiples of this, which Triton notices: loads are wide."""


class Sizes(NamedTuple):
    """How work is divided; chunks and blocks are powers of two.

    Attributes:
        segment: keys of a segment, where neither w nor sqrt(S w) / 2 is more.
        segment_chunk: keys that a program of a segment reads at a time; divides segments.
        segment_warps: of such a program.
        block: keys between two cuts; divides `segment_chunk`.
        block_chunk: keys that a program of a block reads at a time.
        block_warps: of such a program.
    """

    segment: int = 4096
    segment_chunk: int = 2048
    segment_warps: int = 8
    block: int = 128
    block_chunk: int = 1024
    block_warps: int = 4


SIZES = Sizes()


class Plan(NamedTuple):
    """What the host knows of the division of a plane.

    Attributes:
        segment: keys of a segment; of packed sequences, the fewest.
        segments: how many there are; of packed sequences, at most.
        blocks: of the axis.
        candidates: places for the candidates of a segment.
        listed: places for all candidates.
        inherited: places for the keys that a segment inherits.
        inheriting: segments for which there are such places.
    """

    segment: int
    segments: int
    blocks: int
    candidates: int
    listed: int
    inherited: int
    inheriting: int


@functools.lru_cache(maxsize=1024)
def plan(seqlen_k: int, window: int, sizes: Sizes, sequences: int | None) -> Plan:
    """The division of planes of `seqlen_k` keys: one sequence each, or `sequences` packed ones."""
    segment = sizes.segment
    if window < seqlen_k:
        packed = sequences is not None
        least = window if packed else max(window, math.isqrt(seqlen_k * window) // 2)
        segment = max(segment, _round_up(least, sizes.segment_chunk))
    candidates = min(_round_up(window, ALIGNMENT), segment)
    inherited = _round_up(window, sizes.block) if segment < seqlen_k else 0
    if sequences is None:
        segments = inheriting = ceil_div(seqlen_k, segment)
        blocks = segments * (segment // sizes.block)
        listed = segments * candidates
    else:
        inheriting = seqlen_k // segment
        segments = inheriting + sequences
        blocks = seqlen_k // sizes.block + sequences
        listed = blocks * sizes.block
    return Plan(segment, segments, blocks, candidates, listed, inherited, inheriting)


def _round_up(length: int, unit: int) -> int:
    return ceil_div(length, unit) * unit


class Segment(NamedTuple):
    """In a kernel: a segment of a sequence, and where that lies which belongs to it.

    `number` and `count` are of its sequence, and so are positions.
    """

    seqlen_q: Any
    seqlen_k: Any
    token: Any
    """Index of the first key of the sequence among those of the plane."""
    number: Any
    count: Any
    """Segments of the sequence."""
    first: Any
    """Position of its first key."""
    places: Any
    """Places for its keys on the axis, a multiple of a block; 0 if there is no such segment."""
    last_places: Any
    """Those of the last segment of the sequence."""
    block: Any
    """Its first block on the axis."""
    candidates: Any
    """Offset of the candidates of the sequence, those of a segment after those of another."""
    arrivals: Any
    """Offset of its own keys in its queue; before them are those that it inherits."""


@triton.jit
def batched_segment(
    plane, number, segments, segment, candidates, inherited, seqlen_q, seqlen_k, BLOCK: tl.constexpr
):
    """A segment of the only sequence of a plane."""
    row = plane * segments + number
    return Segment(
        seqlen_q,
        seqlen_k,
        0,
        number,
        segments,
        number * segment,
        segment,
        segment,
        row * (segment // BLOCK),
        plane * segments * candidates,
        row * segment + (row + 1) * inherited,
    )


@triton.jit
def _nth(cu, sequences, n, unit):
    """(sequence, token, length, number): of the n-th unit of an axis on which packed sequence b
    starts at unit cu[b] // unit + b, its sequence, that one's first token and length, and the
    unit's number in there, which may be past its end.
    """
    sequence = 0
    end = sequences
    while end - sequence > 1:
        middle = (sequence + end) // 2
        past = tl.load(cu + middle) // unit + middle > n
        end = tl.where(past, middle, end)
        sequence = tl.where(past, sequence, middle)
    token = tl.load(cu + sequence)
    length = tl.load(cu + sequence + 1) - token
    return sequence, token, length, n - (token // unit + sequence)


@triton.jit
def packed_segment(
    cu, sequences, plane, n, segment, candidates, inherited, window, tokens,
    OF_BLOCKS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """(segment, block): the n-th segment of a plane of packed sequences or, with `OF_BLOCKS`, that
    of the n-th block of the axis, and the block's number in there.

    A segment has `segment` keys times the least power of two that makes sqrt(S w) / 2 or more.
    Candidates lie on the axis, which has room for them since no segment lists more keys than it
    has. Of `length` keys at most (length - 1) // segment segments inherit, so the places before
    those of sequence b number cu[b] // segment at most, and its own are counted from there.
    """
    unit = BLOCK if OF_BLOCKS else segment
    sequence, token, length, number = _nth(cu, sequences, n, unit)
    blocks = segment // BLOCK
    pairs = length.to(tl.int64) * window
    while 4 * (blocks * BLOCK).to(tl.int64) * (blocks * BLOCK) < pairs:
        blocks *= 2
    block = 0
    if OF_BLOCKS:
        block = number % blocks
        number = number // blocks
    keys = blocks * BLOCK
    count = tl.cdiv(length, keys)
    exists = (number >= 0) & (number < count)
    last_blocks = tl.cdiv(length, BLOCK) - (count - 1) * blocks
    place = plane * (tokens // BLOCK + sequences) + token // BLOCK + sequence
    own = place + number * blocks
    inheriting = plane * (tokens // segment) + token // segment + number
    found = Segment(
        length,
        length,
        token,
        number,
        count,
        number * keys,
        tl.where(exists, tl.where(number + 1 < count, blocks, last_blocks), 0) * BLOCK,
        last_blocks * BLOCK,
        own,
        place * BLOCK,
        own * BLOCK + inheriting * inherited,
    )
    return found, block
