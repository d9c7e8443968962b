"""Tile sizes, looked up in `tuning.toml`.

There is no autotuning: the first call of a problem compiles one variant of each kernel that it
needs.
"""

from __future__ import annotations

import functools
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from flash_sparse_attn.problem import AttentionProblem

from .sizes import ceil_div, power_of_2

TABLE = tomllib.loads(Path(__file__).with_name("tuning.toml").read_text(encoding="utf-8"))

MASK_BLOCK = 64
"""Rows and keys of a block of the mask's classes (V3) and keys of the intervals' summaries (V4)."""
INTERPRETED_MASK_BLOCK = 32

MOST_ROWS = 128
"""No tile has more query rows: a multiple of them is made of whole tiles."""

SEGMENT_SCALE = {"forward": 2, "backward": 4}
"""Rows of a segment for each key that a row sees, all heads of a group together: they share what a
copy of a key, and its gradient's parts, cost."""
FEWEST_SEGMENT_ROWS = 512
INTERPRETED_SEGMENT_ROWS = 64

PARTS_PER_MULTIPROCESSOR = 8
"""Programs of a kernel, for those too many to run at once to even out."""
INTERPRETED_PARTS = 5


@dataclass(frozen=True)
class Tile:
    """One kernel's launch parameters.

    Attributes:
        block_m: query rows of a tile.
        block_n: keys of a tile.
        warps: warps of a program.
        stages: depth of the software pipeline.
        tma: whether tiles are loaded by the copy engine where their layout allows it.
        registers: of a thread, at most, so that more programs run at a time; 0 = as many as it
            takes.
        fuses: whether a product and a sum may become one multiply-add; decoding does not ask.
    """

    block_m: int
    block_n: int
    warps: int
    stages: int
    tma: bool
    registers: int = 0
    fuses: bool = True

    def options(self) -> dict[str, Any]:
        """Keywords of a kernel launch."""
        options = {
            "BLOCK_M": self.block_m,
            "BLOCK_N": self.block_n,
            "num_warps": self.warps,
            "num_stages": self.stages,
        }
        options |= {"maxnreg": self.registers} if self.registers else {}
        return options | ({} if self.fuses else {"enable_fp_fusion": False})


@functools.lru_cache(maxsize=1024)
def tile(kernel: str, problem: AttentionProblem, gathered: bool = False) -> Tile:
    """The tile of a kernel for a problem, over all keys or over gathered ones."""
    gathered = gathered and problem.gate is None  # whose tiles are listed, not a short span
    unfit = set() if gathered else {"gathered"}
    light = {"causal", "window", "sinks", "softmax_threshold"}
    light |= {"mask", "intervals"} if gathered else set()
    if kernel == "forward":
        light |= {"gate", "gate_threshold"}
        light |= {"block_map"} if problem.block_size_q % MOST_ROWS == 0 else set()
    if not problem.terms() <= light:
        unfit.add("bare")
    if not problem.terms() <= {"causal"}:
        unfit.add("dense")
    if problem.bias is not None and 1 not in problem.bias[2:] and problem.bias_dtype.itemsize == 4:
        unfit.add("light")
    if problem.gate is None:
        unfit.add("gated")
    if problem.gate_threshold == 0:
        unfit.add("pruned")
    width = max(problem.head_dim, problem.head_dim_v)
    key = (problem.arch or 0, problem.dtype.itemsize, width, frozenset(unfit))
    return _lookup(kernel, *key)


def mask_block(problem: AttentionProblem) -> int:
    """Block size of the mask's classes.

    Smaller in the interpreter, so that small cases have several.
    """
    return INTERPRETED_MASK_BLOCK if problem.arch is None else MASK_BLOCK


def segment_rows(problem: AttentionProblem, direction: str, keys_per_row: int | None) -> int:
    """Rows of a segment: a power of two and a multiple of every tile's rows.

    More rows leave fewer copies of a key, and gradients of it to add up; fewer rows leave fewer
    keys that part of a segment's rows do not see.
    """
    if problem.arch is None:
        return INTERPRETED_SEGMENT_ROWS
    scale = max(1, SEGMENT_SCALE[direction] // problem.group)
    return max(FEWEST_SEGMENT_ROWS, scale * power_of_2(keys_per_row or 1))


@functools.cache
def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


def multiprocessors(problem: AttentionProblem, device: torch.device) -> int:
    """Of the device; 0 in the interpreter."""
    return 0 if problem.arch is None else _multiprocessors(device)


def parts(problem: AttentionProblem, device: torch.device) -> int:
    """Programs that a plane of keys should keep busy."""
    if problem.arch is None:
        return INTERPRETED_PARTS
    every = multiprocessors(problem, device) * PARTS_PER_MULTIPROCESSOR
    return ceil_div(every, problem.batch * problem.heads_kv)


@functools.cache
def _lookup(kernel: str, arch: int, itemsize: int, head_dim: int, unfit: frozenset[str]) -> Tile:
    rows = TABLE[kernel]
    family = max(number for row in rows for number in row["arch"] if number <= arch)
    row = next(
        row
        for row in rows
        if family in row["arch"]
        and row.get("bytes", itemsize) == itemsize
        and head_dim <= row["dim"]
        and not any(row.get(kind, False) for kind in unfit)
    )
    names = ("m", "n", "warps", "stages", "tma")
    # Float64 scores must round as the reference's do, product and sum each (N1).
    return Tile(*(row[name] for name in names), row.get("registers", 0), itemsize < 8)


DECODE_SHARED_MEMORY = {80: 101376, 90: 232448, 100: 232448, 120: 101376}
"""Bytes that the programs of a multiprocessor share for certain, by family."""
MOST_DECODE_PROGRAMS = {True: 3, False: 4}
"""On a multiprocessor, by whether the copy engine reads for them."""
INTERPRETED_DECODE_PROGRAMS = 12


def decode_tile(problem: AttentionProblem, scattered: bool) -> Tile:
    """The tile of decoding, of keys that lie side by side or that are scattered."""
    width = max(problem.head_dim, problem.head_dim_v)
    unfit = frozenset() if scattered else frozenset({"gathered"})
    return _lookup("decode", problem.arch or 0, problem.dtype.itemsize, width, unfit)


def decode_slots(problem: AttentionProblem, tile: Tile, count: int) -> int:
    """Programs of decoding that run at a time on `count` multiprocessors: as many as have their
    pipelines in shared memory.
    """
    if problem.arch is None:
        return INTERPRETED_DECODE_PROGRAMS
    memory = DECODE_SHARED_MEMORY[max(x for x in DECODE_SHARED_MEMORY if x <= problem.arch)]
    width = power_of_2(problem.head_dim) + power_of_2(problem.head_dim_v)
    tiles = tile.stages if tile.tma else max(1, tile.stages - 1)  # pointers need one buffer less
    pipeline = tiles * tile.block_n * width * problem.dtype.itemsize
    programs = max(1, min(MOST_DECODE_PROGRAMS[tile.tma], memory // pipeline))
    return count * programs
