"""Compaction: each segment of rows has the keys that it sees gathered side by side.

Where every rule on visibility is a run of rows per key (`Ranges`), the order of the keys means
nothing to the attention kernels. Rows are cut into segments; the keys that some row of a segment
sees are copied into the segment's slots, so that, however scattered they are among all keys, the
tiles that a query tile visits hold little else. First come the keys that only leave inside the
segment, by their last row; then those that stay or enter, in their own order, which is that of
their first rows for every mask that the project makes. A query tile needs an end of the first and a
beginning of the second: one span of slots.

How many keys a segment sees must be bounded without looking at the data. `keys_per_row` bounds it:
n rows see at most keys_per_row + n - 1 keys. Without it there is one segment, and all its keys keep
their order.
"""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from flash_sparse_attn.problem import AttentionProblem, Form
from flash_sparse_attn.tensors import AttentionTensors

from . import arguments, tuning
from .arguments import Bias, Ranges, Slots, Terms, broadcast_strides
from .primitives import ALWAYS, NEVER, store_rows
from .ranges import store_extrema
from .sizes import ceil_div

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


class _KeyBias(NamedTuple):
    """S4 of one key each, as given, and as gathered: float32 `[{B,1}, Hkv * heads, slots]`."""

    pointer: Tensor
    batch: int
    head: int
    key: int
    heads_per_head: int
    gathered: Tensor
    gathered_batch: int


@triton.jit(do_not_specialize=["length"])
def live_keys_kernel(
    key,
    key_first,
    key_last,
    count,
    chunk_record,
    first,
    last,
    live,
    length,
    SUB: tl.constexpr,
    CHUNK: tl.constexpr,
    ENTRIES: tl.constexpr,
):
    """The keys of a chunk that any row sees, with their rows, behind those of all chunks before it;
    of each chunk its start and end among them, its least first and greatest last row; grid planes *
    chunks.
    """
    chunks = tl.cdiv(length, CHUNK)
    chunk = tl.program_id(0) % chunks
    plane = (tl.program_id(0) // chunks).to(tl.int64)
    before = 0
    for start in range(0, chunk * (CHUNK // SUB), ENTRIES):
        block = start + tl.arange(0, ENTRIES)
        earlier = block < chunk * (CHUNK // SUB)
        before += tl.sum(tl.load(live + plane * (length // SUB) + block, mask=earlier, other=0), 0)
    j = chunk * CHUNK + tl.arange(0, CHUNK)
    enters = tl.load(first + plane * length + j, mask=j < length, other=NEVER)
    leaves = tl.load(last + plane * length + j, mask=j < length, other=ALWAYS)
    kept = (enters != NEVER).to(tl.int32)
    at = before + tl.cumsum(kept, 0) - kept
    tl.store(key + plane * length + at, j, mask=kept != 0)
    tl.store(key_first + plane * length + at, enters, mask=kept != 0)
    tl.store(key_last + plane * length + at, leaves, mask=kept != 0)
    end = before + tl.sum(kept, 0)
    entry = chunk_record + tl.program_id(0).to(tl.int64) * 4
    tl.store(entry, before)
    tl.store(entry + 1, end)
    tl.store(entry + 2, tl.min(enters, 0))
    tl.store(entry + 3, tl.max(leaves, 0))
    if chunk == chunks - 1:
        tl.store(count + plane, end)
        tl.store(count + tl.num_programs(0) // chunks + plane, 0)


@triton.jit(do_not_specialize=["seqlen_q", "length", "capacity", "segments", "rows"])
def segment_keys_kernel(
    key,
    count,
    unsorted,
    live_key,
    live_first,
    live_last,
    chunk_record,
    last,
    seqlen_q,
    length,
    capacity,
    segments,
    rows,
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
    low = tl.program_id(0) % segments * rows
    high = tl.minimum(low + rows, seqlen_q) - 1
    slot = tl.program_id(0).to(tl.int64) * capacity
    chunks = tl.cdiv(length, LIVE_CHUNK)
    start = length
    end = 0
    for first_chunk in range(0, chunks, ENTRIES):
        chunk = first_chunk + tl.arange(0, ENTRIES)
        entry = chunk_record + (plane * chunks + chunk) * 4
        some = tl.load(entry + 2, mask=chunk < chunks, other=NEVER) <= high
        some = some & (tl.load(entry + 3, mask=chunk < chunks, other=ALWAYS) >= low)
        chunk_start = tl.load(entry, mask=chunk < chunks, other=length)
        chunk_end = tl.load(entry + 1, mask=chunk < chunks, other=0)
        start = tl.minimum(start, tl.min(tl.where(some, chunk_start, length), 0))
        end = tl.maximum(end, tl.max(tl.where(some, chunk_end, 0), 0))

    # Scratch: keys that stay from the front, leaving ones from the back. Both are counted at once,
    # 16 bits each.
    n_staying = 0
    n_leaving = 0
    staying_at = unsorted + slot
    leaving_at = unsorted + slot + capacity - 1
    for live_at in range(start, end, CHUNK):
        nth = live_at + tl.arange(0, CHUNK)
        j = tl.load(live_key + plane * length + nth, mask=nth < end, other=0)
        enters = tl.load(live_first + plane * length + nth, mask=nth < end, other=NEVER)
        leaves = tl.load(live_last + plane * length + nth, mask=nth < end, other=ALWAYS)
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
        sizes += tl.sum(_member(last + plane * length + j, nth < n_sort, low, rows, bucket), 0)
    at = tl.cumsum(sizes, 0) - sizes
    for start in range(0, n_sort, SORT_CHUNK):
        nth = start + tl.arange(0, SORT_CHUNK)
        j = tl.load(leaving_at - nth, mask=nth < n_sort, other=0)
        member = _member(last + plane * length + j, nth < n_sort, low, rows, bucket)
        place = tl.sum(member * (at[None, :] + tl.cumsum(member, 0) - 1), 1)
        tl.store(key + slot + place, j, mask=nth < n_sort)
        at += tl.sum(member, 0)
    for start in range(0, tl.minimum(n_staying, capacity), CHUNK):
        nth = start + tl.arange(0, CHUNK)
        fits = (nth < n_staying) & (n_leaving + nth < capacity)
        j = tl.load(staying_at + nth, mask=fits, other=0)
        tl.store(key + slot + n_leaving + nth, j, mask=fits)
    tl.store(count + tl.program_id(0), n_leaving + n_staying)
    if low == 0:
        planes = tl.num_programs(0) // segments
        tl.store(count + planes * segments + plane, 0)


@triton.jit
def _member(last, exists, low, rows, bucket):
    """1 where a leaving key belongs to a bucket, [keys, buckets]: those with near last rows are
    near each other.
    """
    row = tl.load(last, mask=exists, other=0) - low
    # 64-bit, as rows times buckets may exceed 2^31
    nth = (row.to(tl.int64) * bucket.shape[0] // rows).to(tl.int32)
    return ((nth[:, None] == bucket[None, :]) & exists[:, None]).to(tl.int32)


@triton.jit(do_not_specialize=["heads_kv", "tiles", "length"])
def gather_keys_kernel(
    k,
    v,
    bias,
    k_out,
    v_out,
    slots,
    first,
    last,
    first_out,
    last_out,
    extrema,
    length,
    heads_kv,
    tiles,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    DV: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    SUB: tl.constexpr,
    LARGEST: tl.constexpr,
    BIAS_HEADS: tl.constexpr,
):
    """Fill SUB slots; grid tiles * batch * kv heads. Of slots without a key those beside keys
    become 0; where no key is within the largest tile, slots are left as they are and never read.

    Where heads share a plane, all of them write the same ranges.
    """
    n = tl.program_id(0) % heads_kv
    tile = tl.program_id(0) // heads_kv % tiles
    b = tl.program_id(0) // (heads_kv * tiles)
    plane = tl.cast(b * slots.plane_batch + n * slots.plane_head, tl.int64)
    start = tile * SUB
    segment = start // slots.capacity
    count = tl.load(slots.count + plane * slots.segments + segment)
    within = start - segment * slots.capacity + tl.arange(0, SUB)
    used = within < tl.minimum(count, slots.capacity)
    slot = start + tl.arange(0, SUB)
    record = plane * slots.segments * slots.capacity + slot
    key = tl.load(slots.key + record, mask=used, other=0)
    enters = tl.load(first + plane * length + key, mask=used, other=NEVER)
    leaves = tl.load(last + plane * length + key, mask=used, other=ALWAYS)
    # Keys that keys_per_row left no slot for: every row of the segment sees the NaN below.
    lost = count > slots.capacity
    enters = tl.where(used & lost, ALWAYS, enters)
    leaves = tl.where(used & lost, NEVER, leaves)
    store_extrema(extrema, plane * tiles + tile, enters, leaves)
    if start // LARGEST * LARGEST - segment * slots.capacity < count:
        tl.store(first_out + record, enters)
        tl.store(last_out + record, leaves)
        _copy_rows(k, k_out, b, n, key, slot, used, False, D, BLOCK_D)
        _copy_rows(v, v_out, b, n, key, slot, used, lost, DV, BLOCK_DV)
        if bias is not None:
            for g in tl.static_range(BIAS_HEADS):
                h = n * BIAS_HEADS + g
                at = (
                    tl.cast(b, tl.int64) * bias.batch
                    + tl.cast(h // bias.heads_per_head, tl.int64) * bias.head
                    + key.to(tl.int64) * bias.key
                )
                value = tl.load(bias.pointer + at, mask=used, other=0.0).to(tl.float32)
                head = tl.cast(b, tl.int64) * bias.gathered_batch + h
                tl.store(bias.gathered + head * tiles * SUB + slot, value)


@triton.jit
def _copy_rows(x, out, b, n, source, target, used, lost, D: tl.constexpr, BLOCK_D: tl.constexpr):
    columns = tl.arange(0, BLOCK_D).to(tl.int64)
    base = x.pointer + tl.cast(b, tl.int64) * x.batch + tl.cast(n, tl.int64) * x.head
    pointers = base + (source.to(tl.int64)[:, None] * x.row + columns[None, :] * x.column)
    rows = tl.load(pointers, mask=used[:, None] & (columns < D)[None, :], other=0.0)
    rows = tl.where(lost, float("nan"), rows)
    store_rows(out, b, n, target, target >= 0, rows, D, BLOCK_D)


def applies(problem: AttentionProblem) -> bool:
    """Whether a call is compacted: a mask of keys or intervals, nothing that depends on the pair,
    and nothing that differs inside a group.
    """
    if problem.intervals is None and problem.mask is None:
        return False
    other = {"gate", "block_map", "softmax_threshold"}
    if problem.terms() & other or problem.form != Form.BATCHED or problem.dtype.itemsize == 8:
        return False
    pairs = [term for term in (problem.mask, problem.bias) if term is not None and term[2] != 1]
    if problem.mask in pairs or any(term[3] != 1 for term in pairs):
        return False
    heads = {1, problem.heads_kv}
    return 0 not in (problem.batch, problem.seqlen_q, problem.seqlen_k) and (
        problem.mask is None or problem.mask[1] in heads
    )


def keys_per_row(problem: AttentionProblem) -> int | None:
    """The least known w such that n consecutive rows see at most w + n - 1 keys."""
    known = [problem.keys_per_row] if problem.keys_per_row else []
    left, right = problem.window_left, 0 if problem.causal else problem.window_right
    if left is not None and right is not None:
        known.append(left + right + 1 + problem.sinks)
    return min(*known, problem.seqlen_k) if known else None


def compact(
    problem: AttentionProblem, tensors: AttentionTensors, terms: Terms, live: Tensor, rows: int
) -> tuple[AttentionTensors, Terms, Slots]:
    """The call over gathered keys, and where they came from.

    Args:
        problem: one that `applies`.
        tensors: of the call.
        terms: of the call, with ranges; a bias of keys is not read yet.
        live: int32 `[.., blocks]`, how many keys of each block any row sees.
        rows: of a segment, a multiple of every tile's; where `keys_per_row` is unknown, one segment
            holds all rows.
    """
    batch, heads, length = terms.ranges.first.shape
    planes = batch * heads
    chunks = planes * ceil_div(length, LIVE_CHUNK)
    n = planes * length
    record = terms.ranges.first.new_empty(3 * n + planes * 2 + chunks * 4)
    *live_records, count, chunk_record = record.split((n, n, n, planes * 2, chunks * 4))
    live_keys_kernel[(chunks,)](
        *live_records,
        count,
        chunk_record,
        terms.ranges.first,
        terms.ranges.last,
        live,
        length,
        SUB=terms.block,
        CHUNK=LIVE_CHUNK,
        ENTRIES=ENTRIES,
    )
    most = keys_per_row(problem)
    rows = arguments.padded(problem.seqlen_q) if most is None else rows
    segments = ceil_div(problem.seqlen_q, rows)
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
        heads if batch > 1 else 0,
        int(heads > 1),
        tl.constexpr(segments == 1),
        tuning.parts(problem, live.device) if segments == 1 else 0,
        tl.constexpr(most is not None),
    )
    if most is not None:
        slots = _segment(problem, slots, most, live_records, chunk_record)
    return _gather(problem, tensors, terms, slots)


def _segment(
    problem: AttentionProblem,
    live: Slots,
    most: int,
    live_records: list[Tensor],
    chunk_record: Tensor,
) -> Slots:
    """Cut the slots of live keys into segments, of rows that see `most` keys each."""
    length = live.capacity
    capacity = min(length, arguments.padded(most + live.rows - 1))
    planes = live.count.numel() // 2
    n = planes * live.segments
    record = live.key.new_empty(n * (2 * capacity + 1) + planes)
    key, count, unsorted = record.split((n * capacity, n + planes, n * capacity))
    segment_keys_kernel[(n,)](
        key,
        count,
        unsorted,
        *live_records,
        chunk_record,
        live.last,
        problem.seqlen_q,
        length,
        capacity,
        live.segments,
        live.rows,
        LIVE_CHUNK=LIVE_CHUNK,
        ENTRIES=ENTRIES,
        CHUNK=CHUNK,
        SORT_CHUNK=SORT_CHUNK,
        BUCKETS=BUCKETS,
        num_warps=SEGMENT_WARPS,
    )
    return live._replace(key=key, count=count, capacity=capacity)


def spans(problem: AttentionProblem, slots: Slots) -> bool:
    """Whether a query tile's keys are one span of slots, with little else in it."""
    return slots.ordered.value or (problem.intervals is None and problem.sinks == 0)


def _gather(
    problem: AttentionProblem, tensors: AttentionTensors, terms: Terms, slots: Slots
) -> tuple[AttentionTensors, Terms, Slots]:
    """k and v as `[B, slots, Hkv, D]` over memory that is contiguous per head, ranges and bias."""
    ranges = terms.ranges
    batch, heads, length = ranges.first.shape
    total = slots.segments * slots.capacity
    tiles = total // terms.block
    shape = (problem.batch, problem.heads_kv, total)
    k = tensors.k.new_empty((*shape, problem.head_dim)).transpose(1, 2)
    v = tensors.v.new_empty((*shape, problem.head_dim_v)).transpose(1, 2)
    first, last = (ranges.first.new_empty((batch, heads, total)) for _ in range(2))
    extrema = ranges.extrema.new_empty((batch, heads, tiles, 4))
    given, bias, bias_heads = _bias(problem, tensors.bias, batch, total)
    gather_keys_kernel[(tiles * problem.batch * problem.heads_kv,)](
        arguments.operand(tensors.k),
        arguments.operand(tensors.v),
        given,
        arguments.operand(k),
        arguments.operand(v),
        slots,
        ranges.first,
        ranges.last,
        first,
        last,
        extrema,
        length,
        problem.heads_kv,
        tiles,
        D=problem.head_dim,
        BLOCK_D=arguments.block_width(problem.head_dim),
        DV=problem.head_dim_v,
        BLOCK_DV=arguments.block_width(problem.head_dim_v),
        SUB=terms.block,
        LARGEST=arguments.RECORD_BLOCK,
        BIAS_HEADS=bias_heads,
    )
    ranges = Ranges(
        first,
        last,
        *broadcast_strides(first)[:2],
        problem.heads_q // heads,
        extrema,
        *broadcast_strides(extrema)[:2],
        ranges.binding,
    )
    bounds = terms.bounds._replace(seqlen_k=total)
    terms = terms._replace(bounds=bounds, ranges=ranges, bias=terms.bias if bias is None else bias)
    return replace(tensors, k=k, v=v), terms, slots


def _bias(
    problem: AttentionProblem, bias: Tensor | None, batch: int, total: int
) -> tuple[_KeyBias | None, Bias | None, int]:
    """How a bias of one key each is gathered, what it becomes, and its heads per kv head; None
    where there is none.
    """
    if bias is None or bias.shape[2] != 1:
        return None, None, 0
    heads = max(bias.shape[1], problem.heads_kv)
    batch = max(bias.shape[0], batch)
    gathered = bias.new_empty((batch, heads, total), dtype=torch.float32)
    strides = broadcast_strides(bias)
    given = _KeyBias(
        bias,
        *strides[:2],
        strides[3],
        heads // bias.shape[1],
        gathered,
        0 if batch == 1 else heads,
    )
    kind = (tl.constexpr(False), tl.constexpr(True), tl.constexpr(True))
    strides = (*broadcast_strides(gathered)[:2], 0, 1)
    return (
        given,
        Bias(gathered, *strides, problem.heads_q // heads, *kind),
        heads // problem.heads_kv,
    )
