"""What the kernels are given: the call's tensors and options as named tuples, built from metadata
alone.

A field wrapped in `tl.constexpr`, and a tuple or field that is None, is known when a kernel is
compiled: kernels branch on those without cost.
"""

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple

import torch
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from flash_sparse_attn.problem import AttentionProblem, Form
from flash_sparse_attn.tensors import AttentionTensors

from .sizes import ceil_div, power_of_2
from .tuning import Tile

LOG2E = math.log2(math.e)
LARGEST_TILE = 256
"""No tile has more rows or columns."""
_TRUE, _FALSE = tl.constexpr(True), tl.constexpr(False)
COPY_ENGINE_ALIGNMENT = 16
"""Bytes on whose multiples the copy engine wants data and all strides but that of D."""
RECORD_BLOCK = 128
"""Records of rows or keys are padded to a multiple of this, which every tile divides."""


class Operand(NamedTuple):
    """A `[B, S, H, D]` tensor: data and strides in elements."""

    pointer: Tensor
    batch: int
    row: int
    head: int
    column: int
    wide: Any
    """Whether offsets inside one tile need 64 bits."""


class Bounds(NamedTuple):
    """Lengths and the rules that they and four integers decide (V1, V2). None = unbounded."""

    seqlen_q: int
    seqlen_k: int
    left: int | None
    right: int | None
    left_sinks: int
    """Keys below this one are exempt from the left bound."""
    right_sinks: int
    """Keys below this one are exempt from the right bound: those of a window, none under V1."""


class Sequences(NamedTuple):
    """Packed sequences (V6): sequence b owns the rows and keys from `cu_q[b]` and `cu_k[b]` on.

    A tensor of one number a row (a record), and whatever counts tiles, is laid out on an axis on
    which every sequence starts on a whole tile: tile cu[b] // size + b, so that no sum over
    sequences is needed to find it.
    """

    cu_q: Tensor
    cu_k: Tensor
    count: int
    largest: Any
    """A power of two above `count`."""
    places: Tensor
    """What `place_tile` finds, int32 `[tiles, 8]`, for tiles of one size."""
    placed: Any
    """Whether `places` was filled in; without, each program searches for its sequence."""
    gathered: Any
    """Whether rows look at gathered keys, which lie on the one axis of slots."""


class Place(NamedTuple):
    """Where a program's sequence lies: added to what is counted inside the sequence."""

    batch: int
    """Index into batch dims; 0 when packed."""
    row: int
    key: int
    row_record: int
    """Where its record of rows starts, as `key_record` of keys."""
    key_record: int
    row_block: int
    """Its first block of rows of `Blocks`."""


class Score(NamedTuple):
    """S1 and S2 for a raw product x, in base 2 or e: s = outer * x, or outer * tanh(inner * x)
    with softcap.
    """

    outer: Any
    inner: Any
    positive: Any
    """Whether s rises with x, so that a maximum may be taken before scaling."""
    fine: Any
    """Whether tanh must be exact to float32, not only to a 16-bit result."""
    natural: Any
    """Whether s is in base e."""


class Gates(NamedTuple):
    """S3 and V7: alpha, in the base of scores, and delta as records, strides 0 where broadcast."""

    alpha: Tensor
    alpha_batch: int
    alpha_head: int
    delta: Tensor
    delta_batch: int
    delta_head: int
    heads_per_delta: Any
    scale: Any
    """c."""
    logsigmoid: Any
    """Whether g is ln sigma, rather than the identity."""
    fine: Any
    """Whether g must be exact to float32, not only to a 16-bit result."""
    coarse: Any
    """Whether c is so small that an error of g of 1e-3 is within a 16-bit result's."""
    floor: Tensor
    """V7: the least c g_ij, in the base of scores, that row i keeps; a record as alpha."""
    limits: Tensor
    """V7 for `KEPT_BLOCK` rows at once, `[B, Hq, blocks, 4]`: some row keeps a key of delta >= the
    first or <= the second; all keep one of delta >= the third and <= the fourth.
    """
    extrema: Tensor
    """Least and greatest delta per block of keys, `[B, Hkv, blocks, 2]`; NaN if one is."""
    extrema_batch: int
    extrema_head: int
    pruned: Any
    """Whether V7 hides anything; without it `floor`, `limits` and `extrema` mean nothing."""


class Bias(NamedTuple):
    """S4. A bias of one dim is a float32 record, padded and contiguous; one of both is the user's
    tensor. Strides are 0 where broadcast; `heads_per_head` counts query heads a bias head.
    """

    pointer: Tensor
    batch: int
    head: int
    row: int
    key: int
    heads_per_head: int
    has_rows: Any
    has_keys: Any
    even: Any
    """Whether no tile reaches past the tensor, so that loads need no test and are wide."""


class PackedMask(NamedTuple):
    """V3 where it depends on the row: bits, int32 words of 32 keys, padded with 0 to whole tiles,
    and one class byte per block. Strides are 0 where broadcast.
    """

    words: Tensor
    batch: int
    head: int
    row: int
    word: int
    heads_per_head: int
    classes: Tensor
    class_batch: int
    class_head: int
    class_row: int
    class_column: int


class Blocks(NamedTuple):
    """V5, or the set kept under T1: one bit for every `KEPT_BLOCK` of rows and keys. Strides are 0
    where broadcast.
    """

    words: Tensor
    batch: int
    head: int
    row: int
    heads_per_head: int


class Ranges(NamedTuple):
    """The run of rows, first to last, that sees each key under every rule but a packed mask: rows
    that exist.

    int32 `[{B,1}, {Hq,Hkv,1}, padded Sk]`, keys that do not exist hidden, and the extrema of both
    per block of keys, `[.., blocks, 4]`. Strides are 0 where broadcast.
    """

    first: Tensor
    last: Tensor
    batch: int
    head: int
    heads_per_head: int
    extrema: Tensor
    extrema_batch: int
    extrema_head: int
    binding: Any
    """Whether they hide anything that a packed mask does not."""


class Segment(NamedTuple):
    """Rows that have their keys gathered together, and the slots in which these lie."""

    nth: int
    """Its number among those of a plane."""
    row: int
    """Its first row, counted inside its sequence."""
    slot: int
    capacity: int
    """How many slots it owns, from `slot` on."""


class Slots(NamedTuple):
    """The compacted key axis: the keys that each segment of rows sees, by segment.

    A segment owns slots, of which the first `count` hold keys. Records of slots are int32
    `[planes, total]`; a plane is a batch element and a key-value head, where they have masks of
    their own. Keys are counted inside their sequence, their records laid out as `Ranges` are.
    """

    key: Tensor
    """The key that a slot holds."""
    count: Tensor
    """int32 `[planes, segments]`, keys that the segment sees; then a zero for each plane."""
    live: Tensor
    """A record of keys: of each sequence those that any segment sees, in their own order."""
    live_count: Tensor
    """int32 `[planes, sequences]`, how many they are; one sequence where they are not packed."""
    first: Tensor
    last: Tensor
    """Rows that see each key, as in `Ranges`, of all keys."""
    capacity: int
    """Slots of a segment; packed, of one of a sequence that has as many keys."""
    rows: int
    """Rows of a segment."""
    segments: int
    total: int
    plane_batch: int
    plane_head: int
    shared: Any
    """Whether the rows of a tile of keys are shared out; several segments are parts enough."""
    parts: int
    """Into how many parts the work on the keys of a plane is then cut at least."""
    ordered: Any
    """Whether a segment's keys are in the order in which its rows see them."""


class TileLists(NamedTuple):
    """The key tiles that each query tile visits, int32 `[.., query tiles, length]`.

    Full tiles from the front of a list and partial ones from its back, with `[.., query tiles, 3]`
    in `counts`: full ones, partial ones, and 1 where blocks are missing (V5, T1). Or, where
    `spans`, four numbers: first tile, first full tile, end of the full tiles, end.
    """

    index: Tensor
    counts: Tensor
    length: int
    batch: int
    """In query tiles, as `head`."""
    head: int
    heads_per_head: int
    spans: Any
    apart: Any
    """Whether neighbouring query tiles ask for other keys: `spans.scheduled`."""


class RowTerms(NamedTuple):
    """What the backward needs of each row, records `[B, Hq, padded]` in the dtype of lse."""

    shift: Tensor
    """lse in base 2, or the peak of `forward.peaks`; +inf for rows that are empty (O2) or do not
    exist.
    """
    delta: Tensor
    """<do, o> - dlse (G1)."""
    padded: int


class Terms(NamedTuple):
    """Everything a call consists of but its operands."""

    bounds: Bounds
    score: Score
    gates: Gates | None
    bias: Bias | None
    mask: PackedMask | None
    blocks: Blocks | None
    ranges: Ranges | None
    """None where bounds alone decide."""
    sequences: Sequences | None
    block: int
    """Rows and keys of one block of the mask's classes and of the ranges' extrema."""

    def flat(self) -> tuple:
        """Bounds one by one, then the other fields but the last, as every attention kernel takes
        them.
        """
        return (*self.bounds, *self[1:-1])


def flag(value: bool) -> tl.constexpr:
    """A bool known when a kernel is compiled; the same object every time, as a launch that compares
    it with what was compiled finds it equal at once.
    """
    return _TRUE if value else _FALSE


def broadcast_strides(tensor: Tensor) -> list[int]:
    """Strides with 0 for dims of size 1."""
    return [
        0 if size == 1 else stride
        for size, stride in zip(tensor.shape, tensor.stride(), strict=True)
    ]


def padded(length: int) -> int:
    """Length of a record that every tile of rows or keys divides."""
    return ceil_div(length, RECORD_BLOCK) * RECORD_BLOCK


def operand(tensor: Tensor) -> Operand:
    """Describe a `[B, S, H, D]` tensor of any strides."""
    strides = tensor.stride()
    wide = max(strides) * LARGEST_TILE >= 2**31
    return Operand(tensor, *strides, flag(wide))


def source(tensor: Tensor, rows: int, width: int, tma: bool) -> Operand | TensorDescriptor:
    """A `[B, S, H, D]` tensor that is read in tiles of `[rows, width]`: a descriptor for the copy
    engine if `tma` and the layout allow it.
    """
    if tma and tensor.data_ptr() % COPY_ENGINE_ALIGNMENT == 0:
        steps = _copy_engine_steps(tensor.shape, tensor.stride(), tensor.element_size())
        if steps is not None:
            sizes, strides = map(list, steps)  # a descriptor's own: what is kept is shared
            return TensorDescriptor(tensor, sizes, strides, [1, 1, rows, width])
    return operand(tensor)


def sources(
    problem: AttentionProblem, tensors: AttentionTensors, do: Tensor, tile: Tile
) -> tuple[Operand | TensorDescriptor, ...]:
    """q, k, v and do as every kernel of the backward reads them."""
    return (
        source(tensors.q, tile.block_m, block_width(problem.head_dim), tile.tma),
        source(tensors.k, tile.block_n, block_width(problem.head_dim), tile.tma),
        source(tensors.v, tile.block_n, block_width(problem.head_dim_v), tile.tma),
        source(do, tile.block_m, block_width(problem.head_dim_v), tile.tma),
    )


@functools.lru_cache(maxsize=1024)
def _copy_engine_steps(
    shape: torch.Size, strides: tuple[int, ...], itemsize: int
) -> tuple[tuple[int, ...], tuple[int, ...]] | None:
    """Sizes and strides of a `[B, S, H, D]` tensor as `[B, H, S, D]`, None where the copy engine
    does not read it: contiguous in D, everything else on its boundaries, nothing empty or expanded.

    The stride of a dim of size 1 is never used but must be valid.
    """
    if 0 in shape or strides[3] != 1:
        return None
    valid = COPY_ENGINE_ALIGNMENT // itemsize
    outer = [
        valid if size == 1 else step for size, step in zip(shape[:3], strides[:3], strict=True)
    ]
    if not all(0 < step * itemsize < 2**40 and step % valid == 0 for step in outer):
        return None
    batch, row, head = outer
    return (shape[0], shape[2], shape[1], shape[3]), (batch, head, row, 1)


def bounds(problem: AttentionProblem) -> Bounds:
    """V1 and V2 as one bound on each side.

    Both are clamped to where they stop mattering, so that no sum of them overflows.
    """
    reach = problem.seqlen_q + problem.seqlen_k
    left, right = (None if side is None else min(side, reach) for side in problem.window)
    sinks = min(problem.sinks, problem.seqlen_k)
    if problem.causal:
        right = 0
    return Bounds(
        problem.seqlen_q, problem.seqlen_k, left, right, sinks, 0 if problem.causal else sinks
    )


def score(problem: AttentionProblem, *, natural: bool = False) -> Score:
    """S1 and S2 of the problem, in base e if `natural`."""
    unit = 1.0 if natural else LOG2E
    kind = (flag(problem.dtype.itemsize == 4), flag(natural))
    if problem.softcap > 0:
        inner = number(problem, problem.softmax_scale / problem.softcap)
        return Score(number(problem, problem.softcap * unit), inner, flag(True), *kind)
    outer = number(problem, problem.softmax_scale * unit)
    return Score(outer, None, flag(problem.softmax_scale > 0), *kind)


def number(problem: AttentionProblem, value: float) -> Any:
    """A number as a kernel takes it: a constant if it must keep float64, as arguments are
    float32.
    """
    return tl.constexpr(value) if problem.dtype.itemsize == 8 else value


def accumulator(problem: AttentionProblem) -> tl.dtype:
    """The dtype of scores, softmax and sums (S1)."""
    return tl.float64 if problem.dtype.itemsize == 8 else tl.float32


def sum_dtype(problem: AttentionProblem) -> torch.dtype:
    """`accumulator`, as tensors have it."""
    return torch.float64 if problem.dtype.itemsize == 8 else torch.float32


def precision(problem: AttentionProblem) -> str:
    """Arithmetic of matrix products: float32 inputs are not rounded to tf32 (N1)."""
    return "tf32" if problem.dtype.itemsize == 2 else "ieee"


def block_width(head_dim: int) -> int:
    """Width of a tile: the power of two that holds D, 16 at least for the matrix units."""
    return max(16, power_of_2(head_dim))


def batched(tensor: Tensor) -> Tensor:
    """A packed `[T, H, D]` tensor as a batch of one; others as they are."""
    return tensor.unsqueeze(0) if tensor.dim() == 3 else tensor


def sequences(problem: AttentionProblem, tensors: AttentionTensors) -> Sequences | None:
    """V6 of a packed call."""
    if problem.form != Form.PACKED:
        return None
    largest = tl.constexpr(power_of_2(problem.batch + 1))
    cu_q, cu_k = tensors.cu_seqlens_q.contiguous(), tensors.cu_seqlens_k.contiguous()
    return Sequences(cu_q, cu_k, problem.batch, largest, cu_q, flag(False), flag(False))


def tile_count(problem: AttentionProblem, length: int, size: int) -> int:
    """Tiles of `size` rows or keys of all sequences, `length` being that of one, or packed that of
    all; packed, some hold none.
    """
    if problem.form == Form.PACKED:
        return length // size + problem.batch if problem.batch else 0
    return ceil_div(length, size) * problem.batch


def rows_of_tiles(problem: AttentionProblem, length: int, size: int) -> int:
    """As `tile_count`, of one batch element."""
    if problem.form == Form.PACKED:
        return tile_count(problem, length, size)
    return ceil_div(length, size)


def record_length(problem: AttentionProblem, length: int) -> int:
    """Length of a record, of `length` as in `tile_count`, of one batch element."""
    if problem.form == Form.PACKED:
        return tile_count(problem, length, RECORD_BLOCK) * RECORD_BLOCK
    return padded(length)


def records(problem: AttentionProblem) -> int:
    """Batch elements of a record."""
    return 1 if problem.form == Form.PACKED else problem.batch
