"""What the kernels of decoding are given: the cache, and every optional term as the user holds it.

A decoding call reads each key once, so nothing is packed or transposed beforehand: terms are read
in place, at the rows and keys of a tile.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import triton.language as tl
from torch import Tensor

from flash_sparse_attn.problem import AttentionProblem, Gate
from flash_sparse_attn.tensors import AttentionTensors

from .arguments import Bounds, bounds, flag, number
from .sizes import power_of_2

SLACK = {4: 2.0**-20, 8: 2.0**-48}
"""By the size of an accumulator: what two evaluations of a gate may differ by, as a share."""


class Rows(NamedTuple):
    """A `[B, S, H, D]` tensor that is read by rows: data and strides in elements. An `Operand` less
    `wide`, as decoding counts in 64 bits throughout.
    """

    pointer: Tensor
    batch: int
    row: int
    head: int
    column: int


class Lengths(NamedTuple):
    """Keys in use of every sequence (V6), int32 `[B]`."""

    pointer: Tensor
    stride: int


class Pages(NamedTuple):
    """Where the pages of a sequence lie (V6), int32 `[B, pages]`."""

    pointer: Tensor
    batch: int
    column: int
    size: int
    """Keys of a page."""


class Listed(NamedTuple):
    """Key lists (V6), int32 `[B, Hkv, count]`. What is no key of the sequence hides nothing."""

    pointer: Tensor
    batch: int
    head: int
    column: int
    count: int
    tested: Any
    """Where a key may be listed twice, a power of two that is no less than `count`; else 0."""


class Term(NamedTuple):
    """A term `[{B,1}, {Hq,Hkv,1}, {Sq,1}, {Sk,1}]` in place; strides are 0 where broadcast."""

    pointer: Tensor
    batch: int
    head: int
    row: int
    key: int
    heads_per_head: int
    """Query heads that share a head of the term."""
    has_rows: Any
    """Whether the rows of a tile, (i, query head), differ."""
    has_keys: Any


class Blocks(NamedTuple):
    """V5: a `Term` counted in blocks of `rows` and `keys`."""

    pointer: Tensor
    batch: int
    head: int
    row: int
    key: int
    heads_per_head: int
    has_rows: Any
    has_keys: Any
    rows: int
    keys: int


class Gating(NamedTuple):
    """S3 and V7 beside alpha and delta."""

    scale: Any
    """c."""
    logsigmoid: Any
    """Whether g is ln sigma, rather than the identity."""
    fine: Any
    """Whether g must be exact to float32, not only to a 16-bit result."""
    coarse: Any
    """Whether g may be less exact still; decoding has the time."""
    reach: Any
    """V7: log2 gamma; without a threshold it means nothing."""
    slack: Any


class Terms(NamedTuple):
    """The optional terms, None where absent, in the order in which kernels take them.

    Kernels build it in place, as an argument: assigned to a name, it would lose its constants.
    """

    mask: Term | None
    start: Term | None
    end: Term | None
    blocks: Blocks | None
    bias: Term | None
    alpha: Term | None
    delta: Term | None
    gating: Gating | None


class Sizes(NamedTuple):
    """Sizes that a kernel needs, and how a launch is cut."""

    heads_kv: int
    group: int
    tiles_i: int
    tiles_g: int
    splits: int


PLAIN_INTEGERS = [*Bounds._fields, *Sizes._fields]
"""Arguments whose values do not change the code of a kernel."""


def rows(tensor: Tensor) -> Rows:
    """Describe a `[B, S, H, D]` tensor of any strides."""
    return Rows(tensor, *tensor.stride())


def lengths(tensors: AttentionTensors) -> Lengths | None:
    """`cache_seqlens`, None where every sequence is full."""
    seqlens = tensors.cache_seqlens
    return None if seqlens is None else Lengths(seqlens, seqlens.stride(0))


def pages(tensors: AttentionTensors) -> Pages | None:
    """The page table, if there is one."""
    table = tensors.page_table
    return None if table is None else Pages(table, *table.stride(), tensors.k.shape[1])


def listed(key_indices: Tensor | None, repeats: bool) -> Listed | None:
    """The key lists, if there are any; `repeats` says that a key may stand in one twice."""
    if key_indices is None:
        return None
    count = key_indices.shape[2]
    tested = power_of_2(count) if repeats else 0
    return Listed(key_indices, *key_indices.stride(), count, tl.constexpr(tested))


def decode_bounds(problem: AttentionProblem) -> Bounds:
    """V1 and V2. The only row of a sequence is aligned to its last key, and all are left of it."""
    found = bounds(problem)
    return found._replace(right=None) if problem.seqlen_q == 1 else found


def terms(problem: AttentionProblem, tensors: AttentionTensors, gating: Gating | None) -> Terms:
    """Every optional term of the call; `gating` is that of the problem."""
    start, end = (
        None if x is None else _term(problem, x.unsqueeze(2))
        for x in (tensors.interval_start, tensors.interval_end)
    )
    blocks = None
    if tensors.block_map is not None:
        term = _term(problem, tensors.block_map)
        blocks = Blocks(*term, problem.block_size_q, problem.block_size_k)
    alpha = delta = None
    if gating is not None:
        alpha = _term(problem, tensors.gate_q.transpose(1, 2).unsqueeze(3))
        delta = _term(problem, tensors.gate_k.transpose(1, 2).unsqueeze(2))
    mask, bias = (None if x is None else _term(problem, x) for x in (tensors.mask, tensors.bias))
    return Terms(mask, start, end, blocks, bias, alpha, delta, gating)


def _term(problem: AttentionProblem, x: Tensor) -> Term:
    if x.dtype == torch.bool and problem.dtype == torch.float64:
        # Triton 3.6 fails to compile float64 products of what loads of bytes decide.
        x = x.to(torch.int32)
    shape = x.shape
    strides = [0 if size == 1 else stride for size, stride in zip(shape, x.stride(), strict=True)]
    heads = shape[1]
    of_query_heads = heads == problem.heads_q and heads != problem.heads_kv
    return Term(
        x,
        *strides,
        1 if heads == problem.heads_q else problem.group,
        flag(shape[2] != 1 or of_query_heads),
        flag(shape[3] != 1),
    )


def gating(problem: AttentionProblem) -> Gating | None:
    """What gates are, beside their values."""
    if problem.gate is None:
        return None
    wide = max(problem.dtype.itemsize, 4)
    reach = math.log2(problem.gate_threshold) if problem.gate_threshold > 0 else 0.0
    return Gating(
        number(problem, problem.softmax_scale),
        flag(problem.gate == Gate.LOGSIGMOID),
        flag(problem.dtype.itemsize >= 4),
        flag(False),
        number(problem, reach),
        tl.constexpr(SLACK[wide]),
    )
