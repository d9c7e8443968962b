"""M5 on the GPU: the rows at which a key is among the w best, without a matrix of pairs.

`ranking` defines grades and cuts. As keys join, the cut between the w best and the others only
rises, so a key leaves in the block of keys at whose end it is below the cut for the first time.
Four launches, none of which waits for the host:

1. `grade_kernel` grades the keys, a segment a program, and lists the segment's *candidates*: its
   own w best, which hold every key of it that a later segment can meet.
2. `inherit_kernel` cuts the candidates of all earlier segments and writes the *sequence* of its
   segment, in order of position: the keys that it inherits, the w best so far, then those of its
   own that are not below the cut. The others never join.
3. `cut_kernel` cuts the sequence at the end of each block of the segment's own keys.
4. `leave_kernel` finds the row at which each key that leaves in a block does so. Only keys between
   the cuts at both ends of the block are compared with others.

Memory is O(S). Segments are of sqrt(S w) / 2 keys or more, so that all of them together cut 2 S
candidates at most. Time is O(S) if keys rarely join, as of random scores; O(S sqrt(S w)) if all do,
as of rising ones. Without causality segments share one cut, and two launches do.
"""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .ranking import (
    LOWEST,
    NO_CUT,
    WIDTH,
    append,
    chunk_indices,
    clear,
    count_earlier,
    find_cut,
    grade_of,
    index_of,
    load_grades,
    rank_of,
    total,
)
from .sizes import ceil_div

LOW_BITS = {torch.float16: 13, torch.bfloat16: 16, torch.float32: 0}
"""Low bits that are 0 in all grades of a dtype: those that float32 adds."""

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


@triton.jit
def _row(position, seqlen_q, seqlen_k):
    """The row whose aligned position it is, or the nearest of 0 to Sq."""
    return tl.minimum(tl.maximum(position - (seqlen_k - seqlen_q), 0), seqlen_q)


@triton.jit(
    do_not_specialize=[
        "batch_stride", "head_stride", "key_stride", "keep_batch_stride", "keep_head_stride",
        "keep_key_stride", "heads", "planes", "segments", "window", "low_bits", "seqlen_q",
        "seqlen_k",
    ]
)  # fmt: skip
def grade_kernel(
    scores, batch_stride, head_stride, key_stride, keep, keep_batch_stride, keep_head_stride,
    keep_key_stride, heads, start, end, grades, candidate_grades, candidate_positions, planes,
    segments, segment, candidates, window, low_bits, seqlen_q, seqlen_k, LIST: tl.constexpr,
    CAUSAL: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """Grades and candidates of a segment; grid segments * planes.

    Gives every key its rows as if none ever left; without causality, none to those that are not
    among the best of their segment.
    """
    s = tl.program_id(0) // planes
    plane = (tl.program_id(0) % planes).to(tl.int64)
    first_key = s * segment
    scores += (plane // heads) * batch_stride + (plane % heads) * head_stride
    if keep is not None:
        keep += (plane // heads) * keep_batch_stride + (plane % heads) * keep_head_stride
    start += plane * seqlen_k
    end += plane * seqlen_k
    grades += (plane * segments + s) * segment
    last_row = _row(seqlen_k, seqlen_q, seqlen_k)
    for at in range(0, segment, CHUNK):
        i = at + chunk_indices(CHUNK)
        j = first_key + i
        exists = j < seqlen_k
        grade = grade_of(tl.load(scores + j.to(tl.int64) * key_stride, mask=exists, other=0.0))
        takes_part = exists
        if keep is not None:
            kept = tl.load(keep + j.to(tl.int64) * keep_key_stride, mask=exists, other=0)
            takes_part = exists & (kept != 0)
        tl.store(grades + i, tl.where(takes_part, grade, LOWEST))
        first_row = _row(j, seqlen_q, seqlen_k) if CAUSAL else tl.zeros_like(j)
        tl.store(start + j, first_row, mask=exists)
        tl.store(end + j, tl.where(takes_part, last_row, first_row), mask=exists)

    if LIST and (not CAUSAL or s + 1 < segments):
        candidate_grades += (plane * segments + s) * candidates
        candidate_positions += (plane * segments + s) * candidates
        tl.debug_barrier()  # grades are read, and rows written, that other threads wrote
        cut = find_cut(grades, 0, segment, window, low_bits, CHUNK)
        length = 0
        for at in range(0, segment, CHUNK):
            i = at + chunk_indices(CHUNK)
            j = first_key + i
            grade = tl.load(grades + i)
            best = rank_of(grade, i) >= cut
            length = append(candidate_grades, candidate_positions, length, grade, j, best)
            if not CAUSAL:
                tl.store(end + j, tl.zeros_like(j), mask=(j < seqlen_k) & ~best)
        clear(candidate_grades, length, candidates, CHUNK)


@triton.jit(do_not_specialize=["planes", "segments", "window", "low_bits", "seqlen_q", "seqlen_k"])
def inherit_kernel(
    end, grades, candidate_grades, candidate_positions, sequence_grades,
    sequence_positions, arrivals, planes, segments, segment, candidates, inherited, window,
    low_bits, seqlen_q, seqlen_k, CAUSAL: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The sequence of a segment; grid segments * planes.

    The first `inherited` places of it are for the keys that the segment inherits; the first segment
    leaves them as they are. `arrivals` counts the keys from there on, whose last block is whole.
    Keys that never join get no rows. Without causality there are no sequences: candidates of the
    segment that are not among the best of all get no rows.
    """
    s = segments - 1 - tl.program_id(0) // planes  # the longest first
    plane = (tl.program_id(0) % planes).to(tl.int64)
    end += plane * seqlen_k
    candidate_grades += plane * segments * candidates
    candidate_positions += plane * segments * candidates
    earlier = s * candidates
    if CAUSAL:
        cut = find_cut(candidate_grades, 0, earlier, window, low_bits, CHUNK)
        sequence_grades += (plane * segments + s) * (inherited + segment)
        sequence_positions += (plane * segments + s) * (inherited + segment)
        if s > 0:
            length = 0
            for at in range(0, earlier, CHUNK):
                i = at + chunk_indices(CHUNK)
                grade = tl.load(candidate_grades + i, mask=i < earlier, other=LOWEST)
                best = rank_of(grade, i) >= cut
                position = tl.load(candidate_positions + i, mask=best, other=0)
                length = append(sequence_grades, sequence_positions, length, grade, position, best)
            clear(sequence_grades, length, inherited, CHUNK)
        sequence_grades += inherited
        sequence_positions += inherited
        grades += (plane * segments + s) * segment
        length = 0
        for at in range(0, segment, CHUNK):
            i = at + chunk_indices(CHUNK)
            j = s * segment + i
            grade = tl.load(grades + i)
            joins = rank_of(grade, earlier + i) >= cut
            length = append(sequence_grades, sequence_positions, length, grade, j, joins)
            never = (grade > LOWEST) & ~joins
            tl.store(end + j, _row(j, seqlen_q, seqlen_k), mask=never)
        clear(sequence_grades, length, tl.cdiv(length, BLOCK) * BLOCK, CHUNK)
        tl.store(arrivals + plane * segments + s, length)
    else:
        cut = find_cut(candidate_grades, 0, segments * candidates, window, low_bits, CHUNK)
        for at in range(earlier, earlier + candidates, CHUNK):
            i = at + chunk_indices(CHUNK)
            own = i < earlier + candidates
            grade = tl.load(candidate_grades + i, mask=own, other=LOWEST)
            hidden = (grade > LOWEST) & (rank_of(grade, i) < cut)
            j = tl.load(candidate_positions + i, mask=hidden, other=0)
            tl.store(end + j, tl.zeros_like(j), mask=hidden)


@triton.jit
def _block(planes, segments, segment, BLOCK: tl.constexpr):
    """Plane, segment and block of a program of the grid blocks * segments * planes, those first
    whose sequences are the longest.
    """
    pid = tl.program_id(0)
    plane = (pid % planes).to(tl.int64)
    s = pid // planes % segments
    block = segment // BLOCK - 1 - pid // planes // segments
    return plane, s, block


@triton.jit(do_not_specialize=["planes", "segments", "window", "low_bits"])
def cut_kernel(
    sequence_grades, arrivals, cuts, planes, segments, segment, inherited, window, low_bits,
    BLOCK: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """The cut at the end of a block of arrivals."""
    plane, s, block = _block(planes, segments, segment, BLOCK)
    row = plane * segments + s
    if block * BLOCK < tl.load(arrivals + row):
        sequence_grades += row * (inherited + segment)
        begin = tl.where(s == 0, inherited, 0)
        end = inherited + (block + 1) * BLOCK
        cut = find_cut(sequence_grades, begin, end, window, low_bits, CHUNK)
        tl.store(cuts + row * (segment // BLOCK) + block, cut)


@triton.jit
def _meet(grades, begin, end, before, after, contest, CHUNK: tl.constexpr):
    """Write the ranks of grades[begin:end] that are between two cuts: how many those are, and how
    many reach the first.
    """
    between = 0
    reach = tl.zeros([CHUNK // WIDTH, WIDTH], tl.int32)
    for at in range(begin, end, CHUNK):
        rank = rank_of(load_grades(grades, at, end, CHUNK), at + chunk_indices(CHUNK))
        reaches = rank >= before
        leaves = reaches & (rank < after)
        earlier, count = count_earlier(leaves.to(tl.int32))
        tl.store((contest + between) + earlier, rank, mask=leaves)
        between += count
        reach += reaches.to(tl.int32)
    return between, total(reach)


@triton.jit
def _nth_better(contest, length, rank, n):
    """The n-th of the contest that is better than each rank; `NO_CUT` if there are fewer, or n is
    0.
    """
    count = tl.zeros(rank.shape, tl.int32)
    nth = tl.full(rank.shape, NO_CUT, tl.int64)
    for at in range(0, length):
        other = tl.load(contest + at)
        better = other > rank
        count += better.to(tl.int32)
        nth = tl.where(better & (count == n), other, nth)
    return nth


@triton.jit(do_not_specialize=["planes", "segments", "window", "seqlen_q", "seqlen_k"])
def leave_kernel(
    end, sequence_grades, sequence_positions, arrivals, cuts, contests, planes, segments, segment,
    inherited, window, seqlen_q, seqlen_k, BLOCK: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """The rows at which keys leave in a block of arrivals.

    Keys above the cut after the block are better than all that leave in it, those below the cut
    before it are worse. The *contest* is between the others: the earlier keys between the cuts, n
    of the m above the cut before, then the arrivals. Outside of it, m - n earlier keys are better
    than a leaving key; so that one leaves with the (w - m + n)-th better key of the contest.
    """
    plane, s, block = _block(planes, segments, segment, BLOCK)
    row = plane * segments + s
    if block * BLOCK < tl.load(arrivals + row):
        end += plane * seqlen_k
        sequence_grades += row * (inherited + segment)
        sequence_positions += row * (inherited + segment)
        cuts += row * (segment // BLOCK) + block
        contest = contests + (row * (segment // BLOCK) + block) * (2 * BLOCK)
        before = tl.load(cuts - 1, mask=block > 0, other=NO_CUT)
        after = tl.load(cuts)

        begin = tl.where(s == 0, inherited, 0)
        first = inherited + block * BLOCK
        i = first + tl.arange(0, BLOCK)
        arrival = rank_of(tl.load(sequence_grades + i), i)
        never = (arrival >= NO_CUT) & (arrival < before)
        position = tl.load(sequence_positions + i, mask=never, other=0)
        tl.store(end + position, _row(position, seqlen_q, seqlen_k), mask=never)

        if after > before:
            n, m = _meet(sequence_grades, begin, first, before, after, contest, CHUNK)
            tl.store(contest + n + tl.arange(0, BLOCK), arrival)
            tl.debug_barrier()  # other threads read the contest
            k = tl.arange(0, 2 * BLOCK)
            rank = tl.load(contest + k, mask=k < n + BLOCK, other=NO_CUT - 1)
            leaves = (rank >= before) & (rank < after)
            last = _nth_better(contest, n + BLOCK, rank, window - m + n)
            joined = tl.load(sequence_positions + index_of(rank), mask=leaves, other=0)
            known = leaves & (last > NO_CUT)
            left = tl.load(sequence_positions + index_of(last), mask=known, other=0)
            left = _row(tl.maximum(left, joined), seqlen_q, seqlen_k)
            tl.store(end + joined, left, mask=leaves)


def topk_intervals(
    scores: Tensor,
    seqlen_q: int,
    window_size: int,
    causal: bool,
    key_padding_mask: Tensor | None,
    sizes: Sizes = SIZES,
) -> tuple[Tensor, Tensor]:
    """(start, end) of M5, int32, of the shape to which scores and mask broadcast.

    end = start where no row sees the key.

    Args:
        scores: `[{B,1}, {H,1}, Sk]` of a dtype in `LOW_BITS`, any strides.
        seqlen_q: Sq.
        window_size: w >= 1.
        causal: row i chooses among the keys j <= p_i; otherwise among all.
        key_padding_mask: bool, broadcastable with `scores`, any strides; True = takes part.
        sizes: how work is divided.
    """
    keep, keep_strides = None, (0, 0, 0)
    if key_padding_mask is not None:
        scores, keep = torch.broadcast_tensors(scores, key_padding_mask)
        keep_strides = keep.stride()
    batch, heads, seqlen_k = scores.shape
    start, end = (scores.new_empty(scores.shape, dtype=torch.int32) for _ in range(2))
    if start.numel() == 0:
        return start, end

    planes = batch * heads
    window = min(window_size, seqlen_k)
    chooses = window < seqlen_k
    segment, segments, blocks, candidates, inherited = _plan(seqlen_k, window, sizes)
    low_bits = LOW_BITS[scores.dtype]

    def space(per_segment: int, dtype: torch.dtype = torch.int32) -> Tensor:
        return scores.new_empty(planes * segments * per_segment, dtype=dtype)

    listed = space(segment), space(candidates), space(candidates)
    grid = (planes * segments,)
    grade_kernel[grid](
        scores, *scores.stride(), keep, *keep_strides, heads, start, end, *listed, planes,
        segments, segment, candidates, window, low_bits, seqlen_q, seqlen_k,
        LIST=chooses and (segments > 1 or not causal), CAUSAL=causal, CHUNK=sizes.segment_chunk,
        num_warps=sizes.segment_warps,
    )  # fmt: skip
    if not chooses:
        return start, end
    sequence = space(inherited + segment), space(inherited + segment)
    arrivals = space(1)
    inherit_kernel[grid](
        end, *listed, *sequence, arrivals, planes, segments, segment, candidates, inherited,
        window, low_bits, seqlen_q, seqlen_k, CAUSAL=causal, CHUNK=sizes.segment_chunk,
        BLOCK=sizes.block, num_warps=sizes.segment_warps,
    )  # fmt: skip
    if not causal:
        return start, end
    cuts, contests = space(blocks, torch.int64), space(2 * segment, torch.int64)
    grid = (planes * segments * blocks,)
    cut_kernel[grid](
        sequence[0], arrivals, cuts, planes, segments, segment, inherited, window, low_bits,
        BLOCK=sizes.block, CHUNK=sizes.block_chunk, num_warps=sizes.block_warps,
    )  # fmt: skip
    leave_kernel[grid](
        end, *sequence, arrivals, cuts, contests, planes, segments, segment, inherited, window,
        seqlen_q, seqlen_k, BLOCK=sizes.block, CHUNK=sizes.block_chunk,
        num_warps=sizes.block_warps,
    )  # fmt: skip
    return start, end


class _Plan(NamedTuple):
    """Lengths, in keys unless said otherwise.

    Attributes:
        segment: of a segment.
        segments: how many.
        blocks: how many a segment has.
        candidates: places for the candidates of a segment.
        inherited: places for the keys that a segment inherits.
    """

    segment: int
    segments: int
    blocks: int
    candidates: int
    inherited: int


@functools.lru_cache(maxsize=1024)
def _plan(seqlen_k: int, window: int, sizes: Sizes) -> _Plan:
    segment = sizes.segment
    if window < seqlen_k:
        least = max(window, math.isqrt(seqlen_k * window) // 2)
        segment = max(segment, _round_up(least, sizes.segment_chunk))
    segments = ceil_div(seqlen_k, segment)
    inherited = _round_up(window, sizes.block) if segments > 1 else 0
    candidates = _round_up(min(window, segment), ALIGNMENT)
    return _Plan(segment, segments, segment // sizes.block, candidates, inherited)


def _round_up(length: int, unit: int) -> int:
    return ceil_div(length, unit) * unit
