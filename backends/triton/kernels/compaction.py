"""Compaction: keys that some row sees come first, gathered, so that tiles hold nothing else.

Where every rule on visibility is a run of rows per key (`Ranges`), the order of the keys means
nothing to the kernels. Sorting keys by the first row that sees them, hidden ones last, keeps causal
tiles triangular and leaves the tiles of hidden keys empty: however scattered the kept keys of a
mask are, no tile is wasted on the others. Costs one sort of a record of keys and one copy of the
live keys and values; gradients are written straight to where the user's keys are.
"""

from __future__ import annotations

from dataclasses import replace

import torch
import triton
import triton.language as tl
from torch import Tensor

from flash_sparse_attn.problem import AttentionProblem
from flash_sparse_attn.tensors import AttentionTensors

from . import arguments
from .arguments import Operand, Order, Ranges, Terms
from .primitives import ALWAYS, NEVER, store_rows
from .tiles import store_extrema


@triton.jit(do_not_specialize=["blocks"])
def reorder_ranges_kernel(
    key, first, last, first_row, last_row, extrema, blocks, SUB: tl.constexpr
):
    """`Ranges` of SUB keys in their new order; grid planes * blocks, first already sorted."""
    plane = (tl.program_id(0) // blocks).to(tl.int64)
    block = tl.program_id(0) % blocks
    at = (plane * blocks + block) * SUB + tl.arange(0, SUB)
    sorted_first = tl.load(first + at)
    source = tl.load(key + at)
    sorted_last = tl.load(last + plane * blocks * SUB + source)
    sorted_last = tl.where(sorted_first == NEVER, ALWAYS, sorted_last)
    tl.store(first_row + at, sorted_first)
    tl.store(last_row + at, sorted_last)
    store_extrema(extrema, plane * blocks + block, sorted_first, sorted_last)


@triton.jit(do_not_specialize=["heads_kv", "tiles"])
def gather_keys_kernel(
    k, v, k_out, v_out, order, first, heads_kv, tiles, D: tl.constexpr, BLOCK_D: tl.constexpr,
    ROWS: tl.constexpr,
):  # fmt: skip
    """Copy the live keys of a tile; grid tiles * batch * kv heads. A tile without any is left as it
    is, since no kernel reads it; hidden keys beside live ones become 0.
    """
    n = tl.program_id(0) % heads_kv
    tile = tl.program_id(0) // heads_kv % tiles
    b = tl.program_id(0) // (heads_kv * tiles)
    j = tile * ROWS + tl.arange(0, ROWS)
    record = tl.cast(b, tl.int64) * order.batch + n * order.head + j
    live = tl.load(first + record) != NEVER
    if tl.max(live.to(tl.int32), 0) != 0:
        source = tl.load(order.key + record)
        _copy_rows(k, k_out, b, n, source, j, live, D, BLOCK_D)
        _copy_rows(v, v_out, b, n, source, j, live, D, BLOCK_D)


@triton.jit
def _copy_rows(x, out, b, n, source, j, live, D: tl.constexpr, BLOCK_D: tl.constexpr):
    columns = tl.arange(0, BLOCK_D).to(tl.int64)
    base = x.pointer + tl.cast(b, tl.int64) * x.batch + tl.cast(n, tl.int64) * x.head
    pointers = base + (source.to(tl.int64)[:, None] * x.row + columns[None, :] * x.column)
    rows = tl.load(pointers, mask=live[:, None] & (columns < D)[None, :], other=0.0)
    store_rows(out, b, n, j, j >= 0, rows, D, BLOCK_D)


def compact(
    problem: AttentionProblem, tensors: AttentionTensors, terms: Terms
) -> tuple[AttentionTensors, Terms, Order | None]:
    """The call over compacted keys, and where they came from; unchanged (None) where it does not
    apply: without ranges, with a mask or bias of pairs, or with ranges that differ inside a group.
    """
    ranges, bias = terms.ranges, terms.bias
    if ranges is None or terms.mask is not None or problem.seqlen_k == 0 or problem.batch == 0:
        return tensors, terms, None
    if bias is not None and bias.has_rows.value and bias.has_keys.value:
        return tensors, terms, None
    if ranges.first.shape[1] not in (1, problem.heads_kv):
        return tensors, terms, None
    first, key = ranges.first.sort(dim=-1, stable=True)
    key = key.to(torch.int32)
    order = Order(key, ranges.batch, ranges.head)
    terms = terms._replace(ranges=_reorder(ranges, first, key, terms.block))
    if bias is not None and bias.has_keys.value:
        record = _reorder_record(bias.pointer, key)
        batch, head = arguments.broadcast_strides(record)[:2]
        heads_per_head = problem.heads_q // record.shape[1]
        terms = terms._replace(
            bias=bias._replace(
                pointer=record, batch=batch, head=head, heads_per_head=heads_per_head
            )
        )
    k, v = _gather(problem, tensors, order, first)
    return replace(tensors, k=k, v=v), terms, order


def _reorder(ranges: Ranges, first: Tensor, key: Tensor, block: int) -> Ranges:
    batch, heads, length = first.shape
    first_row, last_row, extrema = (torch.empty_like(x) for x in (first, first, ranges.extrema))
    blocks = length // block
    reorder_ranges_kernel[(batch * heads * blocks,)](
        key, first, ranges.last, first_row, last_row, extrema, blocks, SUB=block
    )
    return ranges._replace(first=first_row, last=last_row, extrema=extrema)


def _reorder_record(record: Tensor, key: Tensor) -> Tensor:
    """A float32 `[{B,1}, {Hq,Hkv,1}, padded]` record in the order of its keys."""
    heads = max(record.shape[1], key.shape[1])
    batch = max(record.shape[0], key.shape[0])
    index = key.repeat_interleave(heads // key.shape[1], 1).expand(batch, heads, -1)
    record = record.repeat_interleave(heads // record.shape[1], 1).expand(batch, heads, -1)
    return record.gather(-1, index.long())


def _gather(
    problem: AttentionProblem, tensors: AttentionTensors, order: Order, first: Tensor
) -> tuple[Tensor, Tensor]:
    """k and v, `[B, Sk, Hkv, D]` over memory that is contiguous per head."""
    length = first.shape[-1]
    shape = (problem.batch, problem.heads_kv, length, problem.head_dim)
    outs = [tensors.k.new_empty(shape).transpose(1, 2) for _ in range(2)]
    tiles = length // arguments.RECORD_BLOCK
    operands: list[Operand] = [arguments.operand(x) for x in (tensors.k, tensors.v, *outs)]
    gather_keys_kernel[(tiles * problem.batch * problem.heads_kv,)](
        *operands,
        order,
        first,
        problem.heads_kv,
        tiles,
        D=problem.head_dim,
        BLOCK_D=arguments.block_d(problem),
        ROWS=arguments.RECORD_BLOCK,
    )
    k, v = (out[:, : problem.seqlen_k] for out in outs)
    return k, v
