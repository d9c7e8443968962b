"""M5 on the GPU: the rows at which a key is among the w best, without a matrix of pairs.

`ranking` defines grades and cuts, `segments` how keys are divided and where lists lie. As keys
join, the cut between the w best and the others only rises, so a key leaves in the block of keys at
whose end it is below the cut for the first time. Four launches, none of which waits for the host,
serve a batch and packed sequences:

1. `grade_kernel` grades the keys, a segment a program, and lists the segment's *candidates*: its
   own w best, which hold every key of it that a later segment can meet.
2. `inherit_kernel` cuts the candidates of all earlier segments and writes the *queue* of its
   segment, in order of position: the keys that it inherits, the w best so far, then those of its
   own that are not below the cut. The others never join.
3. `cut_kernel` cuts the queue at the end of each block of the segment's own keys.
4. `leave_kernel` finds the row at which each key that leaves in a block does so. Only keys between
   the cuts at both ends of the block are compared with others.

Memory is O(S); of packed sequences, O(T) and a block each. Segments are of sqrt(S w) / 2 keys or
more, so that all of them together cut 2 S candidates at most. Time is O(S) if keys rarely join, as
of random scores; O(S sqrt(S w)) if all do, as of rising ones. Without causality segments share one
cut, and two launches do.
"""

from __future__ import annotations

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
from .segments import SIZES, Sizes, batched_segment, packed_segment, plan

LOW_BITS = {torch.float16: 13, torch.bfloat16: 16, torch.float32: 0}
"""Low bits that are 0 in all grades of a dtype: those that float32 adds."""


@triton.jit
def _row(position, seqlen_q, seqlen_k):
    """The row whose aligned position it is, or the nearest of 0 to Sq."""
    return tl.minimum(tl.maximum(position - (seqlen_k - seqlen_q), 0), seqlen_q)


@triton.jit
def _segment(
    cu, sequences, plane, number, segments, segment, candidates, inherited, window, seqlen_q,
    seqlen_k, BLOCK: tl.constexpr,
):  # fmt: skip
    """The segment of that number of a plane."""
    if cu is None:
        own = batched_segment(
            plane, number, segments, segment, candidates, inherited, seqlen_q, seqlen_k, BLOCK
        )
    else:
        own, _block = packed_segment(
            cu, sequences, plane, number, segment, candidates, inherited, window, seqlen_k, False,
            BLOCK,
        )  # fmt: skip
    return own


@triton.jit(
    do_not_specialize=[
        "batch_stride", "head_stride", "key_stride", "keep_batch_stride", "keep_head_stride",
        "keep_key_stride", "heads", "sequences", "planes", "segments", "window", "low_bits",
        "seqlen_q", "seqlen_k",
    ]
)  # fmt: skip
def grade_kernel(
    scores, batch_stride, head_stride, key_stride, keep, keep_batch_stride, keep_head_stride,
    keep_key_stride, heads, start, end, grades, candidate_grades, candidate_positions, cu,
    sequences, planes, segments, segment, candidates, window, low_bits, seqlen_q, seqlen_k,
    LIST: tl.constexpr, CAUSAL: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Grades and candidates of a segment; grid segments * planes.

    Gives every key its rows as if none ever left; without causality, none to those that are not
    among the best of their segment.
    """
    plane = (tl.program_id(0) % planes).to(tl.int64)
    own = _segment(
        cu, sequences, plane, tl.program_id(0) // planes, segments, segment, candidates, 0, window,
        seqlen_q, seqlen_k, BLOCK,
    )  # fmt: skip
    if own.places == 0:
        return
    scores += (plane // heads) * batch_stride + (plane % heads) * head_stride
    scores += own.token * key_stride
    if keep is not None:
        keep += (plane // heads) * keep_batch_stride + (plane % heads) * keep_head_stride
        keep += own.token * keep_key_stride
    start += plane * seqlen_k + own.token
    end += plane * seqlen_k + own.token
    grades += own.block * BLOCK
    last_row = _row(own.seqlen_k, own.seqlen_q, own.seqlen_k)
    for at in range(0, own.places, CHUNK):
        i = at + chunk_indices(CHUNK)
        j = own.first + i
        exists = j < own.seqlen_k
        grade = grade_of(tl.load(scores + j.to(tl.int64) * key_stride, mask=exists, other=0.0))
        takes_part = exists
        if keep is not None:
            kept = tl.load(keep + j.to(tl.int64) * keep_key_stride, mask=exists, other=0)
            takes_part = exists & (kept != 0)
        tl.store(grades + i, tl.where(takes_part, grade, LOWEST), mask=i < own.places)
        first_row = _row(j, own.seqlen_q, own.seqlen_k) if CAUSAL else tl.zeros_like(j)
        tl.store(start + j, first_row, mask=exists)
        tl.store(end + j, tl.where(takes_part, last_row, first_row), mask=exists)

    if LIST and (not CAUSAL or own.number + 1 < own.count):
        candidate_grades += own.candidates + own.number * candidates
        candidate_positions += own.candidates + own.number * candidates
        tl.debug_barrier()  # grades are read, and rows written, that other threads wrote
        cut = find_cut(grades, 0, own.places, window, low_bits, CHUNK)
        length = 0
        for at in range(0, own.places, CHUNK):
            i = at + chunk_indices(CHUNK)
            j = own.first + i
            grade = tl.load(grades + i, mask=i < own.places, other=LOWEST)
            best = rank_of(grade, i) >= cut
            length = append(candidate_grades, candidate_positions, length, grade, j, best)
            if not CAUSAL:
                tl.store(end + j, tl.zeros_like(j), mask=(j < own.seqlen_k) & ~best)
        clear(candidate_grades, length, tl.minimum(candidates, own.places), CHUNK)


@triton.jit(
    do_not_specialize=[
        "sequences", "planes", "segments", "window", "low_bits", "seqlen_q", "seqlen_k",
    ]
)  # fmt: skip
def inherit_kernel(
    end, grades, candidate_grades, candidate_positions, queue_grades, queue_positions, arrivals,
    cu, sequences, planes, segments, segment, candidates, inherited, window, low_bits, seqlen_q,
    seqlen_k, CAUSAL: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The queue of a segment; grid segments * planes.

    It has `inherited` places for the keys that the segment inherits, of which the first segment
    of a sequence makes no use. `arrivals` counts the keys behind them, whose last block is whole.
    Keys that never join get no rows. Without causality there are no queues: candidates of the
    segment that are not among the best of all get no rows.
    """
    plane = (tl.program_id(0) % planes).to(tl.int64)
    nth = segments - 1 - tl.program_id(0) // planes  # in a batch the longest first
    own = _segment(
        cu, sequences, plane, nth, segments, segment, candidates, inherited, window, seqlen_q,
        seqlen_k, BLOCK,
    )  # fmt: skip
    if own.places == 0:
        return
    end += plane * seqlen_k + own.token
    candidate_grades += own.candidates
    candidate_positions += own.candidates
    earlier = own.number * candidates
    if CAUSAL:
        cut = find_cut(candidate_grades, 0, earlier, window, low_bits, CHUNK)
        queue_grades += own.arrivals
        queue_positions += own.arrivals
        if own.number > 0:
            inherited_grades = queue_grades - inherited
            inherited_positions = queue_positions - inherited
            length = 0
            for at in range(0, earlier, CHUNK):
                i = at + chunk_indices(CHUNK)
                grade = tl.load(candidate_grades + i, mask=i < earlier, other=LOWEST)
                best = rank_of(grade, i) >= cut
                position = tl.load(candidate_positions + i, mask=best, other=0)
                length = append(
                    inherited_grades, inherited_positions, length, grade, position, best
                )
            clear(inherited_grades, length, inherited, CHUNK)
        grades += own.block * BLOCK
        length = 0
        for at in range(0, own.places, CHUNK):
            i = at + chunk_indices(CHUNK)
            j = own.first + i
            grade = tl.load(grades + i, mask=i < own.places, other=LOWEST)
            joins = rank_of(grade, earlier + i) >= cut
            length = append(queue_grades, queue_positions, length, grade, j, joins)
            never = (grade > LOWEST) & ~joins
            tl.store(end + j, _row(j, own.seqlen_q, own.seqlen_k), mask=never)
        clear(queue_grades, length, tl.cdiv(length, BLOCK) * BLOCK, CHUNK)
        tl.store(arrivals + own.block, length)
    else:
        listed = (own.count - 1) * candidates + tl.minimum(candidates, own.last_places)
        cut = find_cut(candidate_grades, 0, listed, window, low_bits, CHUNK)
        behind = tl.minimum(earlier + candidates, listed)
        for at in range(earlier, behind, CHUNK):
            i = at + chunk_indices(CHUNK)
            grade = tl.load(candidate_grades + i, mask=i < behind, other=LOWEST)
            hidden = (grade > LOWEST) & (rank_of(grade, i) < cut)
            j = tl.load(candidate_positions + i, mask=hidden, other=0)
            tl.store(end + j, tl.zeros_like(j), mask=hidden)


@triton.jit
def _block(
    cu, sequences, planes, segments, segment, inherited, window, seqlen_q, seqlen_k,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Plane, segment and number in it of the block of a program of the grid blocks * planes; in a
    batch those first whose queues are the longest.
    """
    pid = tl.program_id(0)
    plane = (pid % planes).to(tl.int64)
    if cu is None:
        own = batched_segment(
            plane, pid // planes % segments, segments, segment, 0, inherited, seqlen_q, seqlen_k,
            BLOCK,
        )  # fmt: skip
        block = segment // BLOCK - 1 - pid // planes // segments
    else:
        own, block = packed_segment(
            cu, sequences, plane, pid // planes, segment, 0, inherited, window, seqlen_k, True,
            BLOCK,
        )  # fmt: skip
    return plane, own, block


@triton.jit(do_not_specialize=["sequences", "planes", "segments", "window", "low_bits", "seqlen_k"])
def cut_kernel(
    queue_grades, arrivals, cuts, cu, sequences, planes, segments, segment, inherited, window,
    low_bits, seqlen_k, BLOCK: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """The cut at the end of a block of arrivals."""
    _plane, own, block = _block(
        cu, sequences, planes, segments, segment, inherited, window, seqlen_k, seqlen_k, BLOCK
    )
    if own.places == 0:
        return
    if block * BLOCK < tl.load(arrivals + own.block):
        queue_grades += own.arrivals - inherited
        begin = tl.where(own.number == 0, inherited, 0)
        end = inherited + (block + 1) * BLOCK
        cut = find_cut(queue_grades, begin, end, window, low_bits, CHUNK)
        tl.store(cuts + own.block + block, cut)


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


@triton.jit(do_not_specialize=["sequences", "planes", "segments", "window", "seqlen_q", "seqlen_k"])
def leave_kernel(
    end, queue_grades, queue_positions, arrivals, cuts, contests, cu, sequences, planes, segments,
    segment, inherited, window, seqlen_q, seqlen_k, BLOCK: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """The rows at which keys leave in a block of arrivals.

    Keys above the cut after the block are better than all that leave in it, those below the cut
    before it are worse. The *contest* is between the others: the earlier keys between the cuts, n
    of the m above the cut before, then the arrivals. Outside of it, m - n earlier keys are better
    than a leaving key; so that one leaves with the (w - m + n)-th better key of the contest.
    """
    plane, own, block = _block(
        cu, sequences, planes, segments, segment, inherited, window, seqlen_q, seqlen_k, BLOCK
    )
    if own.places == 0:
        return
    if block * BLOCK < tl.load(arrivals + own.block):
        end += plane * seqlen_k + own.token
        queue_grades += own.arrivals - inherited
        queue_positions += own.arrivals - inherited
        cuts += own.block + block
        contest = contests + (own.block + block) * (2 * BLOCK)
        before = tl.load(cuts - 1, mask=block > 0, other=NO_CUT)
        after = tl.load(cuts)

        begin = tl.where(own.number == 0, inherited, 0)
        first = inherited + block * BLOCK
        i = first + tl.arange(0, BLOCK)
        arrival = rank_of(tl.load(queue_grades + i), i)
        never = (arrival >= NO_CUT) & (arrival < before)
        position = tl.load(queue_positions + i, mask=never, other=0)
        tl.store(end + position, _row(position, own.seqlen_q, own.seqlen_k), mask=never)

        if after > before:
            n, m = _meet(queue_grades, begin, first, before, after, contest, CHUNK)
            tl.store(contest + n + tl.arange(0, BLOCK), arrival)
            tl.debug_barrier()  # other threads read the contest
            k = tl.arange(0, 2 * BLOCK)
            rank = tl.load(contest + k, mask=k < n + BLOCK, other=NO_CUT - 1)
            leaves = (rank >= before) & (rank < after)
            last = _nth_better(contest, n + BLOCK, rank, window - m + n)
            joined = tl.load(queue_positions + index_of(rank), mask=leaves, other=0)
            known = leaves & (last > NO_CUT)
            left = tl.load(queue_positions + index_of(last), mask=known, other=0)
            left = _row(tl.maximum(left, joined), own.seqlen_q, own.seqlen_k)
            tl.store(end + joined, left, mask=leaves)


def topk_intervals(
    scores: Tensor,
    seqlen_q: int,
    window_size: int,
    causal: bool,
    key_padding_mask: Tensor | None,
    cu_seqlens: Tensor | None = None,
    sizes: Sizes = SIZES,
) -> tuple[Tensor, Tensor]:
    """(start, end) of M5, int32, of the shape to which scores and mask broadcast.

    end = start where no row sees the key.

    Args:
        scores: `[{B,1}, {H,1}, Sk]` of a dtype in `LOW_BITS`, any strides; of packed sequences,
            `[1, {H,1}, T]`.
        seqlen_q: Sq; means nothing of packed sequences.
        window_size: w >= 1.
        causal: row i chooses among the keys j <= p_i; otherwise among all.
        key_padding_mask: bool, broadcastable with `scores`, any strides; True = takes part.
        cu_seqlens: int32 `[sequences + 1]`, contiguous, boundaries of packed sequences.
        sizes: how work is divided.
    """
    keep, keep_strides = None, (0, 0, 0)
    if key_padding_mask is not None:
        scores, keep = torch.broadcast_tensors(scores, key_padding_mask)
        keep_strides = keep.stride()
    batch, heads, seqlen_k = scores.shape
    sequences = None if cu_seqlens is None else cu_seqlens.shape[0] - 1
    # Keys of no sequence are met by no program.
    make = scores.new_empty if sequences is None else scores.new_zeros
    start, end = (make(scores.shape, dtype=torch.int32) for _ in range(2))
    if start.numel() == 0 or sequences == 0:
        return start, end

    planes = batch * heads
    window = min(window_size, seqlen_k)
    chooses = window < seqlen_k
    own = plan(seqlen_k, window, sizes, sequences)
    packed = cu_seqlens, sequences or 0
    low_bits = LOW_BITS[scores.dtype]

    def space(per_plane: int, dtype: torch.dtype = torch.int32) -> Tensor:
        return scores.new_empty(planes * per_plane, dtype=dtype)

    keys = own.blocks * sizes.block
    listed = space(keys), space(own.listed), space(own.listed)
    grid = (planes * own.segments,)
    grade_kernel[grid](
        scores, *scores.stride(), keep, *keep_strides, heads, start, end, *listed, *packed, planes,
        own.segments, own.segment, own.candidates, window, low_bits, seqlen_q, seqlen_k,
        LIST=chooses and (own.inherited > 0 or not causal), CAUSAL=causal,
        CHUNK=sizes.segment_chunk, BLOCK=sizes.block, num_warps=sizes.segment_warps,
    )  # fmt: skip
    if not chooses:
        return start, end
    queued = keys + own.inheriting * own.inherited
    queue, arrivals = (space(queued), space(queued)), space(own.blocks)
    inherit_kernel[grid](
        end, *listed, *queue, arrivals, *packed, planes, own.segments, own.segment, own.candidates,
        own.inherited, window, low_bits, seqlen_q, seqlen_k, CAUSAL=causal,
        CHUNK=sizes.segment_chunk, BLOCK=sizes.block, num_warps=sizes.segment_warps,
    )  # fmt: skip
    if not causal:
        return start, end
    cuts, contests = space(own.blocks, torch.int64), space(2 * keys, torch.int64)
    grid = (planes * own.blocks,)
    cut_kernel[grid](
        queue[0], arrivals, cuts, *packed, planes, own.segments, own.segment, own.inherited,
        window, low_bits, seqlen_k, BLOCK=sizes.block, CHUNK=sizes.block_chunk,
        num_warps=sizes.block_warps,
    )  # fmt: skip
    leave_kernel[grid](
        end, *queue, arrivals, cuts, contests, *packed, planes, own.segments, own.segment,
        own.inherited, window, seqlen_q, seqlen_k, BLOCK=sizes.block, CHUNK=sizes.block_chunk,
        num_warps=sizes.block_warps,
    )  # fmt: skip
    return start, end
