"""Host side of the preparation: packs the mask, summarises the intervals, lists the tiles.

Nothing here reads device data.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from flash_sparse_attn.problem import AttentionProblem
from flash_sparse_attn.tensors import AttentionTensors

from . import arguments, tiles
from .arguments import IntervalRanges, PackedMask, TileLists, Visibility
from .tuning import Tile

PACK_CHUNK = 256
"""Keys that one program packs."""
LIST_CHUNK = 128
"""Tiles that one program classifies at a time."""


def prepare(problem: AttentionProblem, tensors: AttentionTensors, block: int) -> Visibility:
    """Read each mask once (V3, V4)."""
    mask = None if tensors.mask is None else pack_mask(problem, tensors.mask, block)
    intervals = None
    if tensors.interval_start is not None:
        intervals = summarise_intervals(
            problem, tensors.interval_start, tensors.interval_end, block
        )
    return Visibility(arguments.bounds(problem), mask, intervals, block)


def pack_mask(problem: AttentionProblem, mask: Tensor, block: int) -> PackedMask:
    """Bits and block classes of a boolean `[{B,1}, {Hq,Hkv,1}, {Sq,1}, {Sk,1}]` mask.

    Dims of size 1 stay so.
    """
    batch, heads, rows, keys = mask.shape
    words = mask.new_empty((batch, heads, rows, triton.cdiv(keys, 32)), dtype=torch.int32)
    classes = mask.new_empty(
        (batch, heads, triton.cdiv(rows, block), triton.cdiv(keys, block)), dtype=torch.int8
    )
    grid = (batch * heads * triton.cdiv(rows, block) * triton.cdiv(keys, PACK_CHUNK),)
    tiles.pack_mask_kernel[grid](
        mask.view(torch.int8),
        *mask.stride(),
        words,
        classes,
        rows,
        keys,
        heads,
        SUB=block,
        CHUNK=PACK_CHUNK,
        ONE_KEY=keys == 1,
    )
    strides, class_strides = (
        [
            0 if size == 1 else stride
            for size, stride in zip(mask.shape, tensor.stride(), strict=True)
        ]
        for tensor in (words, classes)
    )
    return PackedMask(
        words, *strides, problem.heads_q // heads, tl.constexpr(rows > 1), classes, *class_strides
    )


def summarise_intervals(
    problem: AttentionProblem, start: Tensor, end: Tensor, block: int
) -> IntervalRanges:
    """Extrema of start and end per block of keys; both are `[{B,1}, {Hkv,1}, Sk]`."""
    if start.stride() != end.stride():
        start, end = start.contiguous(), end.contiguous()
    batch, heads, keys = start.shape
    blocks = triton.cdiv(keys, block)
    summary = start.new_empty((batch, heads, blocks, 4))
    strides = arguments.broadcast_strides(start)[:2]
    tiles.summarise_intervals_kernel[(batch * heads * blocks,)](
        start, end, *start.stride(), summary, keys, heads, SUB=block
    )
    return IntervalRanges(
        start,
        end,
        *strides,
        start.stride(2),
        problem.heads_q // heads,
        summary,
        *arguments.broadcast_strides(summary)[:2],
    )


def list_tiles(
    problem: AttentionProblem, visibility: Visibility, tile: Tile, *, transposed: bool = False
) -> TileLists | None:
    """The tiles to visit for each query tile, or (transposed) for each key tile.

    None where bounds alone decide.
    """
    sizes = [sizes[:2] for sizes in (problem.mask, problem.intervals) if sizes is not None]
    if not sizes:
        return None
    batch, heads = (max(column) for column in zip(*sizes, strict=True))
    own, other = (
        triton.cdiv(problem.seqlen_q, tile.block_m),
        triton.cdiv(problem.seqlen_k, tile.block_n),
    )
    if transposed:
        own, other = other, own
    device = (visibility.mask or visibility.intervals)[0].device
    index = torch.empty((batch, heads, own, other), dtype=torch.int32, device=device)
    counts = torch.empty((batch, heads, own, 2), dtype=torch.int32, device=device)
    heads_per_list = problem.heads_q // heads
    tiles.list_tiles_kernel[(batch * heads * own,)](
        index,
        counts,
        *visibility.bounds,
        visibility.mask,
        visibility.intervals,
        heads,
        heads_per_list,
        BLOCK_M=tile.block_m,
        BLOCK_N=tile.block_n,
        SUB=visibility.block,
        TRANSPOSED=transposed,
        CHUNK=LIST_CHUNK,
    )
    return TileLists(
        index, counts, 0 if batch == 1 else heads * own, 0 if heads == 1 else own, heads_per_list
    )
