"""Which keys the rows of a segment see, and in which order: the first step of compaction.

First come the keys that only leave inside the segment, by their last row; then those that stay or
enter, in their own order, which is that of their first rows for every mask that the project makes.
A query tile needs an end of the first and a beginning of the second: one span of slots.

How many keys a segment sees must be bounded without looking at the data. `keys_per_row` bounds it:
n rows see at most keys_per_row + n - 1 keys. Without it there is one segment, and all its keys keep
their order.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from flash_sparse_attn.problem import AttentionProblem

from . import arguments, tuning
from .arguments import Sequences, Slots, Terms
from .primitives import ALWAYS, NEVER
from .sequences import place_tile, sequence_of
from .slots import longest, place_segment, segment_count, slot_count

LIVE_CHUNK = 1024
"""Keys from which one program takes those that any row sees."""
ENTRIES = 1024
"""Entries of a record that a program sums up, or compares, at a time."""
CHUNK = 2048
"""Live keys that a segment looks at at a time."""
SORT_CHUNK = 256
"""Leaving keys that it puts into order at a time."""
SEGMENT_WARPS = 8
BUCKETS = 16
"""Into how many buckets leaving keys are put by their last row."""


@triton.jit(do_not_specialize=["seqlen_q", "seqlen_k", "length", "chunks"])
def live_keys_kernel(
    key,
    key_first,
    key_last,
    count,
    chunk_record,
    first,
    last,
    live,
    sequences,
    seqlen_q,
    seqlen_k,
    length,
    chunks,
    SUB: tl.constexpr,
    CHUNK: tl.constexpr,
    ENTRIES: tl.constexpr,
):
    """The keys of a chunk that any row sees, with their rows, behind those of all chunks of its
    sequence before it; of each chunk its start and end among them, its least first and greatest
    last row; grid planes * chunks.
    """
    nth = tl.program_id(0) % chunks
    plane = (tl.program_id(0) // chunks).to(tl.int64)
    place, _n_q, n_k, chunk, exists = place_tile(
        seqlen_q, seqlen_k, sequences, nth, chunks, CHUNK, True
    )
    if nth == 0:
        sequence_count = 1 if sequences is None else sequences.count
        tl.store(count + tl.num_programs(0) // chunks * sequence_count + plane, 0)
    if not (exists | (chunk == 0)):
        return
    record = plane * length + place.key_record
    before = 0
    for start in range(0, chunk * (CHUNK // SUB), ENTRIES):
        block = start + tl.arange(0, ENTRIES)
        earlier = block < chunk * (CHUNK // SUB)
        before += tl.sum(tl.load(live + record // SUB + block, mask=earlier, other=0), 0)
    j = chunk * CHUNK + tl.arange(0, CHUNK)
    enters = tl.load(first + record + j, mask=j < n_k, other=NEVER)
    leaves = tl.load(last + record + j, mask=j < n_k, other=ALWAYS)
    kept = (enters != NEVER).to(tl.int32)
    at = before + tl.cumsum(kept, 0) - kept
    tl.store(key + record + at, j, mask=kept != 0)
    tl.store(key_first + record + at, enters, mask=kept != 0)
    tl.store(key_last + record + at, leaves, mask=kept != 0)
    end = before + tl.sum(kept, 0)
    entry = chunk_record + tl.program_id(0).to(tl.int64) * 4
    tl.store(entry, before)
    tl.store(entry + 1, end)
    tl.store(entry + 2, tl.min(enters, 0))
    tl.store(entry + 3, tl.max(leaves, 0))
    if (chunk + 1) * CHUNK >= n_k:
        tl.store(live_count_of(count, sequences, plane, place), end)


@triton.jit
def live_count_of(live_count, sequences, plane, place):
    """Where the number of live keys of a sequence stands."""
    sequence_count = 1 if sequences is None else sequences.count
    return live_count + plane * sequence_count + sequence_of(place)


@triton.jit(
    do_not_specialize=[
        "seqlen_q",
        "seqlen_k",
        "length",
        "chunks",
        "segments",
        "rows",
        "capacity",
        "total",
    ]
)
def segment_keys_kernel(
    key,
    count,
    unsorted,
    live_key,
    live_first,
    live_last,
    chunk_record,
    last,
    sequences,
    seqlen_q,
    seqlen_k,
    length,
    chunks,
    segments,
    rows,
    capacity,
    total,
    LIVE_CHUNK: tl.constexpr,
    ENTRIES: tl.constexpr,
    CHUNK: tl.constexpr,
    SORT_CHUNK: tl.constexpr,
    BUCKETS: tl.constexpr,
):
    """The keys that the rows of one segment see, in the order of their slots; grid planes *
    segments.
    """
    plane = (tl.program_id(0) // segments).to(tl.int64)
    place, n_q, n_k, segment, exists = place_segment(
        sequences, seqlen_q, seqlen_k, tl.program_id(0) % segments, rows, capacity
    )
    if tl.program_id(0) % segments == 0:
        tl.store(count + tl.num_programs(0) + plane, 0)
    if not exists:
        tl.store(count + tl.program_id(0), 0)
        return
    low = segment.row
    high = tl.minimum(low + rows, n_q) - 1
    rows = tl.minimum(rows, n_q)
    slot = plane * total + segment.slot
    capacity = segment.capacity
    record = plane * length + place.key_record
    first_chunk = plane * chunks + place.key // LIVE_CHUNK + sequence_of(place)
    chunks = tl.cdiv(n_k, LIVE_CHUNK)
    start = n_k
    end = 0
    for nth_chunk in range(0, chunks, ENTRIES):
        chunk = nth_chunk + tl.arange(0, ENTRIES)
        entry = chunk_record + (first_chunk + chunk) * 4
        some = tl.load(entry + 2, mask=chunk < chunks, other=NEVER) <= high
        some = some & (tl.load(entry + 3, mask=chunk < chunks, other=ALWAYS) >= low)
        chunk_start = tl.load(entry, mask=chunk < chunks, other=n_k)
        chunk_end = tl.load(entry + 1, mask=chunk < chunks, other=0)
        start = tl.minimum(start, tl.min(tl.where(some, chunk_start, n_k), 0))
        end = tl.maximum(end, tl.max(tl.where(some, chunk_end, 0), 0))

    # Scratch: keys that stay from the front, leaving ones from the back. Both are counted at once,
    # 16 bits each.
    n_staying = 0
    n_leaving = 0
    staying_at = unsorted + slot
    leaving_at = unsorted + slot + capacity - 1
    for live_at in range(start, end, CHUNK):
        nth = live_at + tl.arange(0, CHUNK)
        j = tl.load(live_key + record + nth, mask=nth < end, other=0)
        enters = tl.load(live_first + record + nth, mask=nth < end, other=NEVER)
        leaves = tl.load(live_last + record + nth, mask=nth < end, other=ALWAYS)
        seen = (enters <= high) & (leaves >= low)
        leaving = (enters <= low) & (leaves < high)
        kept = tl.where(seen, tl.where(leaving, 1 << 16, 1), 0)
        before = tl.cumsum(kept, 0) - kept
        at = n_staying + (before & 0xFFFF)
        tl.store(staying_at + at, j, mask=seen & ~leaving & (at < capacity))
        at = n_leaving + (before >> 16)
        tl.store(leaving_at - at, j, mask=seen & leaving & (at < capacity))
        kept = tl.sum(kept, 0)
        n_staying += kept & 0xFFFF
        n_leaving += kept >> 16
    tl.debug_barrier()  # what one thread has written, others read

    n_sort = tl.minimum(n_leaving, capacity)
    bucket = tl.arange(0, BUCKETS)
    sizes = tl.zeros([BUCKETS], tl.int32)
    for start in range(0, n_sort, SORT_CHUNK):
        nth = start + tl.arange(0, SORT_CHUNK)
        j = tl.load(leaving_at - nth, mask=nth < n_sort, other=0)
        sizes += tl.sum(_member(last + record + j, nth < n_sort, low, rows, bucket), 0)
    at = tl.cumsum(sizes, 0) - sizes
    for start in range(0, n_sort, SORT_CHUNK):
        nth = start + tl.arange(0, SORT_CHUNK)
        j = tl.load(leaving_at - nth, mask=nth < n_sort, other=0)
        member = _member(last + record + j, nth < n_sort, low, rows, bucket)
        target = tl.sum(member * (at[None, :] + tl.cumsum(member, 0) - 1), 1)
        tl.store(key + slot + target, j, mask=nth < n_sort)
        at += tl.sum(member, 0)
    for start in range(0, tl.minimum(n_staying, capacity), CHUNK):
        nth = start + tl.arange(0, CHUNK)
        fits = (nth < n_staying) & (n_leaving + nth < capacity)
        j = tl.load(staying_at + nth, mask=fits, other=0)
        tl.store(key + slot + n_leaving + nth, j, mask=fits)
    tl.store(count + tl.program_id(0), n_leaving + n_staying)


@triton.jit
def _member(last, exists, low, rows, bucket):
    """1 where a leaving key belongs to a bucket, [keys, buckets]: those with near last rows are
    near each other.
    """
    row = tl.load(last, mask=exists, other=0) - low
    # 64-bit, as rows times buckets may exceed 2^31
    nth = (row.to(tl.int64) * bucket.shape[0] // rows).to(tl.int32)
    return ((nth[:, None] == bucket[None, :]) & exists[:, None]).to(tl.int32)


def live_slots(
    problem: AttentionProblem, terms: Terms, live: Tensor, rows: int, most: int | None
) -> Slots:
    """The keys that rows see, by segment.

    Args:
        problem: one that is compacted.
        terms: of the call, with ranges.
        live: int32 `[.., blocks]`, how many keys of each block any row sees.
        rows: of a segment, a multiple of every tile's.
        most: keys that a row sees, as `keys_per_row` has it; where it is unknown one segment, or
            where no sequence is longer one of each, holds all rows.
    """
    batch, heads, length = terms.ranges.first.shape
    planes = batch * heads
    sequences = 1 if terms.sequences is None else terms.sequences.count
    chunks = arguments.rows_of_tiles(problem, problem.seqlen_k, LIVE_CHUNK)
    n = planes * length
    sizes = (n, n, n, planes * (sequences + 1), planes * chunks * 4)
    *live_records, count, chunk_record = terms.ranges.first.new_empty(sum(sizes)).split(sizes)
    live_keys_kernel[(planes * chunks,)](
        *live_records,
        count,
        chunk_record,
        terms.ranges.first,
        terms.ranges.last,
        live,
        terms.sequences,
        problem.seqlen_q,
        problem.seqlen_k,
        length,
        chunks,
        SUB=terms.block,
        CHUNK=LIVE_CHUNK,
        ENTRIES=ENTRIES,
    )
    if most is None or (terms.sequences is not None and problem.max_seqlen_q <= rows):
        rows = arguments.padded(problem.seqlen_q)
    segments = segment_count(problem, rows)
    shared = segments == 1 and terms.sequences is None
    slots = Slots(
        live_records[0],
        count,
        live_records[0],
        count,
        terms.ranges.first,
        terms.ranges.last,
        length,
        rows,
        segments,
        length,
        heads if batch > 1 else 0,
        int(heads > 1),
        arguments.flag(shared),
        tuning.parts(problem, live.device) if shared else 0,
        arguments.flag(most is not None),
    )
    if most is None:
        return slots
    return _cut(problem, slots, terms.sequences, most, live_records, chunk_record, chunks)


def _cut(
    problem: AttentionProblem,
    live: Slots,
    sequences: Sequences | None,
    most: int,
    live_records: list[Tensor],
    chunk_record: Tensor,
    chunks: int,
) -> Slots:
    """Cut the slots of live keys into segments, of rows that see `most` keys each."""
    longest_q, longest_k = longest(problem)
    capacity = arguments.padded(min(longest_k, most + min(live.rows, longest_q) - 1))
    total = slot_count(problem, live.rows, capacity)
    planes = live.first[..., 0].numel()
    n = planes * total
    sizes = (n, planes * (live.segments + 1), n)
    key, count, unsorted = live.key.new_empty(sum(sizes)).split(sizes)
    segment_keys_kernel[(planes * live.segments,)](
        key,
        count,
        unsorted,
        *live_records,
        chunk_record,
        live.last,
        sequences,
        problem.seqlen_q,
        problem.seqlen_k,
        live.capacity,
        chunks,
        live.segments,
        live.rows,
        capacity,
        total,
        LIVE_CHUNK=LIVE_CHUNK,
        ENTRIES=ENTRIES,
        CHUNK=CHUNK,
        SORT_CHUNK=SORT_CHUNK,
        BUCKETS=BUCKETS,
        num_warps=SEGMENT_WARPS,
    )
    return live._replace(key=key, count=count, capacity=capacity, total=total)
