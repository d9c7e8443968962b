"""Decoding: attention of a few rows over a cache (V6), by splits of the keys.

Memory bounds it: every key and value is read once, by programs that share it out among all
multiprocessors, whatever the batch. How many splits there are follows from sizes alone, what each
of them reads from lengths, pages and lists on the device, so that a captured graph stays valid.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from flash_sparse_attn.packed_mask import with_dense_mask
from flash_sparse_attn.problem import KEPT_BLOCK, AttentionProblem
from flash_sparse_attn.tensors import AttentionTensors

from . import arguments, decode_arguments, tuning
from .arguments import Bounds, Score
from .decode_arguments import Gating, Sizes
from .decode_kernels import attend_kernel, highest_gates_kernel, merge_kernel
from .decode_lists import ascending
from .decode_threshold import WORD_KEYS, kept_kernel, scores_kernel
from .sizes import ceil_div, power_of_2
from .tuning import Tile

FEWEST_ROWS = 16
"""Of a tile: what the matrix units take."""
FEWEST_KEYS = 32
"""Of a tile cut down so that pages are made of whole ones."""
EVEN = 0.95
"""Share of the best use of the multiprocessors that is good enough for fewer splits."""
REPEATS_TESTED = 1024
ENTRIES_TESTED = 2**16
"""Entries of a list, and of all lists of a call, up to which a tile compares its keys with those
before them, which starts sooner than sorting lists first, but grows with their square.
"""
FAST_FLOAT64 = (80, 90, 100)
"""Compute capabilities whose matrix units take float64 at a rate that decoding does not notice."""
FEWEST_COLUMNS = 16
MERGED_ELEMENTS = 4096
"""Columns of a program that merges splits, and elements that it loads at a time."""
WORTHWHILE_TILES = 16
"""Tiles that splits keep where sequences fill the GPU without them: to even out waves of fewer
would gain less than to merge costs.
"""
OVERLAPPING = 90
"""Least compute capability that launches a kernel before the one before it has ended."""


@dataclass(frozen=True)
class Plan:
    """How a call is cut into programs.

    Attributes:
        tile: launch parameters; `block_m` is the most rows, (i, g), of a tile, and `block_n` keys
            are whole blocks of T1, where that drops.
        splits: shares of the keys of a sequence.
        repeats_tested: whether tiles look for repeated keys of a list themselves; otherwise lists
            are sorted first.
    """

    tile: Tile
    splits: int
    repeats_tested: bool

    def rows(self, problem: AttentionProblem) -> tuple[int, int]:
        """Rows and query heads of a tile, powers of two; rows in whole blocks of T1, if they fill
        one.
        """
        heads = min(power_of_2(problem.group), self.tile.block_m)
        rows = max(self.tile.block_m // heads, KEPT_BLOCK[0])
        rows = min(rows, power_of_2(problem.seqlen_q))
        heads = min(heads, max(1, self.tile.block_m // rows))
        return rows, max(heads, FEWEST_ROWS // rows)

    def sizes(self, problem: AttentionProblem) -> Sizes:
        """What kernels are told of the cut."""
        rows, heads = self.rows(problem)
        tiles = ceil_div(problem.seqlen_q, rows), ceil_div(problem.group, heads)
        return Sizes(problem.heads_kv, problem.group, *tiles, self.splits)

    def programs(self, problem: AttentionProblem) -> int:
        """Programs of a kernel that works on splits."""
        sizes = self.sizes(problem)
        return problem.batch * sizes.heads_kv * sizes.tiles_i * sizes.tiles_g * sizes.splits


@functools.lru_cache(maxsize=1024)
def plan(problem: AttentionProblem, multiprocessors: int) -> Plan:
    """The cut of calls of a problem, on so many multiprocessors (0 in the interpreter)."""
    page, entries = problem.page_size, problem.entries
    tile = tuning.decode_tile(problem, scattered=False)
    if page is not None:
        piece = page & -page  # the greatest power of two in it
        if piece >= FEWEST_KEYS:
            tile = replace(tile, block_n=min(tile.block_n, piece))
    if scattered(problem, tile.block_n):
        tile = tuning.decode_tile(problem, scattered=True)
    tested = entries is not None and entries <= REPEATS_TESTED
    tested = tested and problem.batch * problem.heads_kv * entries <= ENTRIES_TESTED
    whole = Plan(tile, 1, tested)
    keys = problem.seqlen_k if entries is None else entries
    slots = tuning.decode_slots(problem, tile, multiprocessors)
    programs = whole.programs(problem)
    while entries is not None and tile.block_n > 16 and programs * keys < slots * tile.block_n:
        tile = replace(tile, block_n=tile.block_n // 2)  # a short list, on more programs
    tiles = ceil_div(keys, tile.block_n)
    splits = _splits(programs, slots, tiles if programs < slots else tiles // WORTHWHILE_TILES)
    if splits < tiles < 2 * splits and programs * tiles <= slots:
        splits = tiles  # one tile each, rather than two for some
    if entries is not None and splits >= tiles:
        tile = replace(tile, warps=8, stages=1)  # nothing to pipeline: one tile a program
    return replace(whole, tile=tile, splits=splits)


def scattered(problem: AttentionProblem, keys: int) -> bool:
    """Whether tiles of `keys` keys are not one piece of the cache."""
    page = problem.page_size
    return problem.entries is not None or (page is not None and page % keys != 0)


def _splits(programs: int, slots: int, most: int) -> int:
    """The fewest splits that use the slots about as evenly as the best number of them does.

    Programs come in waves of `slots`; the last wave leaves slots idle.
    """
    most = max(1, min(most, slots))

    def use(splits: int) -> float:
        waves = programs * splits / slots
        return waves / -(-waves // 1)

    best = max(use(splits) for splits in range(1, most + 1))
    return next(splits for splits in range(1, most + 1) if use(splits) >= EVEN * best)


def decode(
    problem: AttentionProblem, tensors: AttentionTensors, cut: Plan | None = None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """`(o, lse, kept)` by O1, O2 and T1 in the cache form.

    Args:
        problem: in the cache form.
        tensors: of the call.
        cut: how to cut it into programs; default: as `plan` says.

    Returns:
        o `[B, Sq, Hq, Dv]` in the dtype of q, lse `[B, Hq, Sq]` in float32 (float64 for float64),
        both contiguous; kept int32 of `problem.kept_shape`, None without a softmax threshold. With
        key lists nothing is dropped, as T1 allows.
    """
    problem, tensors = with_dense_mask(problem, tensors)
    q = tensors.q
    wide = arguments.sum_dtype(problem)
    rows = (problem.batch, problem.heads_q, problem.seqlen_q)
    o = q.new_empty((problem.batch, problem.seqlen_q, problem.heads_q, problem.head_dim_v))
    lse = q.new_empty(rows, dtype=wide)
    drops = problem.softmax_threshold > 0 and tensors.key_indices is None
    kept = None
    if drops:
        kept = q.new_empty(problem.kept_shape, dtype=torch.int32)
    elif problem.softmax_threshold > 0:
        kept = q.new_full(problem.kept_shape, -1, dtype=torch.int32)
    if lse.numel() == 0:
        return o, lse, kept

    cut = cut or plan(problem, tuning.multiprocessors(problem, q.device))
    parts, part_lse = o, lse
    if cut.splits > 1:
        parts = q.new_empty((*o.shape[:3], cut.splits, problem.head_dim_v), dtype=wide)
        part_lse = q.new_empty((*rows, cut.splits), dtype=wide)
    call = _Call(problem, tensors, cut)
    highest = call.highest_gates() if problem.gate_threshold > 0 else None
    if drops:
        call.attend_to_kept(parts, part_lse, kept, highest)
    else:
        call.attend(parts, part_lse, highest)
    if cut.splits > 1:
        call.merge(parts, part_lse, o, lse)
    return o, lse, kept


class _Fixed(NamedTuple):
    """What the launches of a call are given that follows from its problem and plan alone, worked
    out once for calls that are alike.

    Attributes:
        grid: of the kernels that work on splits.
        bounds, sizes, score, gating, precision: as kernels take them.
        tile: keywords of all kernels that work on splits.
        of_keys, of_values: further ones of those that read keys, and values.
        merge_grid, merge: of the merge, likewise.
        overlaps: keywords of the first launch of a call, and of those that follow.
    """

    grid: tuple[int]
    bounds: Bounds
    sizes: Sizes
    score: Score
    gating: Gating | None
    precision: str
    tile: dict[str, Any]
    of_keys: dict[str, Any]
    of_values: dict[str, Any]
    merge_grid: tuple[int]
    merge: dict[str, Any]
    overlaps: tuple[dict[str, bool], dict[str, bool]]


@functools.lru_cache(maxsize=1024)
def _fixed(problem: AttentionProblem, cut: Plan) -> _Fixed:
    rows, heads = cut.rows(problem)
    most = power_of_2(cut.splits)
    columns = max(MERGED_ELEMENTS // most, FEWEST_COLUMNS)
    columns = min(power_of_2(problem.head_dim_v), columns)
    every_row = problem.batch * problem.heads_q * problem.seqlen_q
    overlapping = problem.arch is not None and problem.arch >= OVERLAPPING
    following = {"OVERLAP": True, "launch_pdl": True} if overlapping else {"OVERLAP": False}
    return _Fixed(
        grid=(cut.programs(problem),),
        bounds=decode_arguments.decode_bounds(problem),
        sizes=cut.sizes(problem),
        score=arguments.score(problem),
        gating=decode_arguments.gating(problem),
        precision=arguments.precision(problem),
        tile={
            "BLOCK_I": rows,
            "BLOCK_G": heads,
            "BLOCK_N": cut.tile.block_n,
            "ACC": arguments.accumulator(problem),
            "num_warps": cut.tile.warps,
            "num_stages": cut.tile.stages,
        },
        of_keys={
            "D": problem.head_dim,
            "BLOCK_D": arguments.block_width(problem.head_dim),
            "WIDE": problem.arch is None or problem.arch in FAST_FLOAT64,
        },
        of_values={
            "DV": problem.head_dim_v,
            "BLOCK_DV": arguments.block_width(problem.head_dim_v),
            "FINAL": cut.splits == 1,
        },
        merge_grid=(every_row * ceil_div(problem.head_dim_v, columns),),
        merge={
            "DV": problem.head_dim_v,
            "BLOCK_C": columns,
            "BLOCK_S": min(most, MERGED_ELEMENTS // columns),
            "MOST_SPLITS": most,
        },
        overlaps=({"OVERLAP": overlapping}, following),
    )


class _Call:
    """The launches of one call; splits are those of its plan throughout.

    Each overlaps with the one before it (programmatic dependent launch), but for the first, which
    follows what is not ours.
    """

    def __init__(self, problem: AttentionProblem, tensors: AttentionTensors, cut: Plan) -> None:
        self.problem, self.tensors, self.cut = problem, tensors, cut
        self.launched = False
        self.fixed = _fixed(problem, cut)
        self.terms = decode_arguments.terms(problem, tensors, self.fixed.gating)
        self.lengths = decode_arguments.lengths(tensors)
        self.pages = decode_arguments.pages(tensors)
        lists = tensors.key_indices
        if lists is not None and not cut.repeats_tested:
            lists = ascending(problem, tensors, **self._overlap())
        self.listed = decode_arguments.listed(lists, cut.repeats_tested)

    def attend(self, o: Tensor, lse: Tensor, highest: Tensor | None) -> None:
        """O1 of every split."""
        k, v = self._cache()
        fixed = self.fixed
        attend_kernel[fixed.grid](
            decode_arguments.rows(self.tensors.q), k, v, o, lse, highest, self.lengths, self.pages,
            self.listed, fixed.score, *fixed.bounds, *self.terms, *fixed.sizes,
            PRECISION=fixed.precision, TMA=isinstance(k, TensorDescriptor),
            **fixed.tile, **fixed.of_keys, **fixed.of_values, **self._overlap(),
        )  # fmt: skip

    def highest_gates(self) -> Tensor:
        """V7: the largest gate of each row in each split."""
        rows = (self.problem.batch, self.problem.heads_q, self.problem.seqlen_q, self.cut.splits)
        highest = self.tensors.q.new_empty(rows, dtype=arguments.sum_dtype(self.problem))
        fixed = self.fixed
        highest_gates_kernel[fixed.grid](
            highest, self.lengths, self.listed, *fixed.bounds, *self.terms, *fixed.sizes,
            **fixed.tile, **self._overlap(),
        )  # fmt: skip
        return highest

    def attend_to_kept(self, o: Tensor, lse: Tensor, kept: Tensor, highest: Tensor | None) -> None:
        """T1: O1 of every split over the blocks kept, and which they are."""
        problem, q, fixed = self.problem, self.tensors.q, self.fixed
        wide = arguments.sum_dtype(problem)
        rows = (problem.batch, problem.heads_q, problem.seqlen_q)
        pairs = q.new_empty((*rows, problem.seqlen_k), dtype=wide)
        score_lse = q.new_empty((*rows, self.cut.splits), dtype=wide)
        counts = q.new_empty((*rows, self.cut.splits), dtype=torch.int32)
        k, v = self._cache()
        read = {"PRECISION": fixed.precision, "TMA": isinstance(k, TensorDescriptor)}
        scores_kernel[fixed.grid](
            decode_arguments.rows(q), k, pairs, score_lse, counts, highest, self.lengths,
            self.pages, fixed.score, *fixed.bounds, *self.terms, *fixed.sizes,
            **read, **fixed.tile, **fixed.of_keys, **self._overlap(),
        )  # fmt: skip
        kept_kernel[fixed.grid](
            pairs, v, o, lse, kept, score_lse, counts, self.lengths, self.pages,
            arguments.number(problem, problem.softmax_threshold), kept.shape[3], *fixed.bounds,
            *fixed.sizes, TILES=WORD_KEYS // self.cut.tile.block_n,
            **read, **fixed.tile, **fixed.of_values, **self._overlap(),
        )  # fmt: skip

    def merge(self, parts: Tensor, part_lse: Tensor, o: Tensor, lse: Tensor) -> None:
        """o and lse from those of the splits."""
        problem, fixed = self.problem, self.fixed
        merge_kernel[fixed.merge_grid](
            parts, part_lse, o, lse, lse.numel(), problem.heads_q, problem.seqlen_q,
            self.cut.splits, **fixed.merge, **self._overlap(),
        )  # fmt: skip

    def _overlap(self) -> dict[str, bool]:
        """Keywords of the next launch."""
        follows, self.launched = self.launched, True
        return self.fixed.overlaps[follows]

    def _cache(self) -> tuple:
        """k and v as tiles of keys are read from them: by the copy engine, or by pointers."""
        k, v, tile = self.tensors.k, self.tensors.v, self.cut.tile
        if tile.tma and not scattered(self.problem, tile.block_n):
            found = (
                arguments.source(k, tile.block_n, self.fixed.of_keys["BLOCK_D"], True),
                arguments.source(v, tile.block_n, self.fixed.of_values["BLOCK_DV"], True),
            )
            if all(isinstance(x, TensorDescriptor) for x in found):
                return found
        return decode_arguments.rows(k), decode_arguments.rows(v)
