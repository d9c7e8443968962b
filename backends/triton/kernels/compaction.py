"""Compaction: each segment of rows has the keys that it sees gathered side by side.

Where every rule on visibility is a run of rows per key (`Ranges`), the order of the keys means
nothing to the attention kernels; V7 is one as far as it drops a key from all rows. Rows are cut
into segments, each of one sequence; the keys that some row of a segment sees (`segment_keys`) are
copied into the segment's slots (`slots`), so that, however scattered they are among all keys, the
tiles that a query tile visits hold little else.
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

from . import arguments, segment_keys
from .arguments import Bias, Gates, Ranges, Slots, Terms, broadcast_strides
from .gates import store_delta_extrema
from .primitives import ALWAYS, NEVER, store_rows
from .ranges import store_extrema
from .slots import keys_of_segment, longest, place_slot, plane_of


class _KeyBias(NamedTuple):
    """S4 of one key each, as given, and as gathered: float32 `[{B,1}, Hkv * heads, slots]`."""

    pointer: Tensor
    batch: int
    head: int
    key: int
    heads_per_head: int
    gathered: Tensor
    gathered_batch: int


@triton.jit(do_not_specialize=["seqlen_q", "heads_kv", "tiles", "length"])
def gather_keys_kernel(
    k,
    v,
    bias,
    gates,
    gates_out,
    k_out,
    v_out,
    slots,
    sequences,
    first,
    last,
    first_out,
    last_out,
    extrema,
    seqlen_q,
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
    plane = plane_of(slots, b, n)
    start = tile * SUB
    place, _n_q, _n_k, segment, exists = place_slot(slots, sequences, seqlen_q, length, start)
    count = keys_of_segment(slots, plane, segment, exists)
    within = start - segment.slot + tl.arange(0, SUB)
    used = within < tl.minimum(count, segment.capacity)
    slot = start + tl.arange(0, SUB)
    record = plane * slots.total + slot
    key = tl.load(slots.key + record, mask=used, other=0)
    range_at = plane * length + place.key_record + key
    enters = tl.load(first + range_at, mask=used, other=NEVER)
    leaves = tl.load(last + range_at, mask=used, other=ALWAYS)
    if gates is not None:
        delta_at = tl.cast(b, tl.int64) * gates.delta_batch + n * gates.delta_head + key
        delta = tl.load(gates.delta + delta_at, mask=used, other=0.0)
        head = tl.cast(b, tl.int64) * gates_out.delta_batch + n * gates_out.delta_head
        tl.store(gates_out.delta + head + slot, delta)
        head = tl.cast(b, tl.int64) * gates_out.extrema_batch + n * gates_out.extrema_head
        store_delta_extrema(gates_out.extrema + head, tile, delta, used)
    key += place.key
    # Keys that keys_per_row left no slot for: every row of the segment sees the NaN below.
    lost = count > segment.capacity
    enters = tl.where(used & lost, ALWAYS, enters)
    leaves = tl.where(used & lost, NEVER, leaves)
    store_extrema(extrema, plane * tiles + tile, enters, leaves)
    if start // LARGEST * LARGEST - segment.slot < count:
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
    """Whether a call is compacted: a mask of keys, intervals or V7, no other rule that depends on
    the pair, and nothing that differs inside a group; packed, only where `keys_per_row` is known;
    with gates, neither packed nor with intervals.
    """
    if problem.intervals is None and problem.mask is None and problem.gate_threshold == 0:
        return False
    other = {"block_map", "softmax_threshold"}
    if problem.terms() & other or problem.form == Form.CACHE or problem.dtype.itemsize == 8:
        return False
    if problem.gate is not None and (problem.form == Form.PACKED or problem.intervals is not None):
        return False
    if problem.form == Form.PACKED and keys_per_row(problem) is None:
        return False
    pairs = [term for term in (problem.mask, problem.bias) if term is not None and term[2] != 1]
    if problem.mask in pairs or any(term[3] != 1 for term in pairs):
        return False
    heads = {1, problem.heads_kv}
    return 0 not in (problem.batch, problem.seqlen_q, problem.seqlen_k) and (
        problem.mask is None or problem.mask[1] in heads
    )


def keys_per_row(problem: AttentionProblem) -> int | None:
    """The least known w such that n consecutive rows see at most w + n - 1 keys; None under V7,
    where every row looks through all slots.
    """
    if problem.gate_threshold > 0:
        return None
    known = [problem.keys_per_row] if problem.keys_per_row else []
    left, right = problem.window_left, 0 if problem.causal else problem.window_right
    if left is not None and right is not None:
        known.append(left + right + 1 + problem.sinks)
    return min(*known, longest(problem)[1]) if known else None


def compact(
    problem: AttentionProblem, tensors: AttentionTensors, terms: Terms, live: Tensor, rows: int
) -> tuple[AttentionTensors, Terms, Slots]:
    """The call over gathered keys, and where they came from.

    Args:
        problem: one that `applies`.
        tensors: of the call.
        terms: of the call, with ranges; a bias of keys is not read yet.
        live: int32 `[.., blocks]`, how many keys of each block any row sees.
        rows: of a segment, a multiple of every tile's; where `keys_per_row` is unknown, or no
            sequence has more, one segment holds all rows.
    """
    slots = segment_keys.live_slots(problem, terms, live, rows, keys_per_row(problem))
    return _gather(problem, tensors, terms, slots)


def spans(problem: AttentionProblem, slots: Slots) -> bool:
    """Whether a query tile's keys are one span of slots, with little else in it."""
    if problem.gate_threshold > 0:
        return False
    return slots.ordered.value or (problem.intervals is None and problem.sinks == 0)


def _gather(
    problem: AttentionProblem, tensors: AttentionTensors, terms: Terms, slots: Slots
) -> tuple[AttentionTensors, Terms, Slots]:
    """k and v as `[B, slots, Hkv, D]` over memory that is contiguous per head, ranges and bias."""
    ranges = terms.ranges
    batch, heads, length = ranges.first.shape
    total = slots.total
    tiles = total // terms.block
    shape = (arguments.records(problem), problem.heads_kv, total)
    k = tensors.k.new_empty((*shape, problem.head_dim)).transpose(1, 2)
    v = tensors.v.new_empty((*shape, problem.head_dim_v)).transpose(1, 2)
    first, last = (ranges.first.new_empty((batch, heads, total)) for _ in range(2))
    extrema = ranges.extrema.new_empty((batch, heads, tiles, 4))
    given, bias, bias_heads = _bias(problem, tensors.bias, batch, total)
    gates = None if terms.gates is None else _gates(problem, terms.gates, total, tiles)
    gather_keys_kernel[(tiles * shape[0] * problem.heads_kv,)](
        arguments.operand(tensors.k),
        arguments.operand(tensors.v),
        given,
        terms.gates,
        gates,
        arguments.operand(k),
        arguments.operand(v),
        slots,
        terms.sequences,
        ranges.first,
        ranges.last,
        first,
        last,
        extrema,
        problem.seqlen_q,
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
    terms = terms._replace(
        bounds=bounds, ranges=ranges, gates=gates, bias=terms.bias if bias is None else bias
    )
    if terms.sequences is not None:
        sequences = terms.sequences._replace(gathered=arguments.flag(True))
        terms = terms._replace(sequences=sequences)
    return replace(tensors, k=k, v=v), terms, slots


def _gates(problem: AttentionProblem, given: Gates, total: int, tiles: int) -> Gates:
    """The gates of the call over slots, not yet gathered."""
    delta = given.delta.new_empty((problem.batch, problem.heads_kv, total))
    extrema = given.delta.new_empty((problem.batch, problem.heads_kv, tiles, 2))
    strides, extrema_strides = (broadcast_strides(x)[:2] for x in (delta, extrema))
    return given._replace(
        delta=delta,
        delta_batch=strides[0],
        delta_head=strides[1],
        extrema=extrema,
        extrema_batch=extrema_strides[0],
        extrema_head=extrema_strides[1],
    )


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
    kind = (arguments.flag(False), arguments.flag(True), arguments.flag(True))
    strides = (*broadcast_strides(gathered)[:2], 0, 1)
    return (
        given,
        Bias(gathered, *strides, problem.heads_q // heads, *kind),
        heads // problem.heads_kv,
    )
