"""Key lists (V6) in ascending order with every key once.

The keys that are listed are marked, and the marks read in order. Neighbours share pages of virtual
memory and rows of memory banks, so that keys in their order also are read faster.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from flash_sparse_attn.problem import AttentionProblem
from flash_sparse_attn.tensors import AttentionTensors

from .decode_arguments import Lengths, Listed, lengths, listed
from .decode_tiles import overlap
from .sizes import ceil_div, power_of_2

KEYS = 4096
"""Neighbouring keys of the cache that a program looks for in a list."""
FEWEST_KEYS = 1024
MOST_ENTRIES = 1024
"""Entries of a list that a program works on at a time."""
WARPS = 8


@triton.jit(do_not_specialize=["seqlen_k", "heads_kv", "ranges"])
def sort_kernel(
    lists: Listed, lengths: Lengths, marks, out, seqlen_k, heads_kv, ranges,
    KEYS: tl.constexpr, ENTRIES: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """`out` int32 `[B, Hkv, count]`: every key of a list once, ascending, among as many -1 as there
    were repeats and entries that are no keys. Grid batch * heads * ranges of KEYS keys.

    A program owns as many places as entries fall into its range, behind those of lower ranges, and
    KEYS bytes of `marks`, which may hold garbage.
    """
    overlap(OVERLAP)
    plane = tl.program_id(0) // ranges
    nth = tl.program_id(0) % ranges
    b = plane // heads_kv
    low = nth * KEYS
    length = seqlen_k
    if lengths is not None:
        length = tl.load(lengths.pointer + tl.cast(b, tl.int64) * lengths.stride)
    entries = lists.pointer + tl.cast(b, tl.int64) * lists.batch
    entries = entries + tl.cast(plane % heads_kv, tl.int64) * lists.head
    out = out + tl.cast(plane, tl.int64) * lists.count
    marks = marks + tl.cast(tl.program_id(0), tl.int64) * KEYS
    tl.store(marks + tl.arange(0, KEYS), tl.zeros([KEYS], tl.int8))
    tl.debug_barrier()  # other threads mark what this one clears
    lower = tl.zeros([ENTRIES], tl.int32)
    own = tl.zeros([ENTRIES], tl.int32)
    for start in range(0, lists.count, ENTRIES):
        t = start + tl.arange(0, ENTRIES)
        j = tl.load(entries + t.to(tl.int64) * lists.column, mask=t < lists.count, other=-1)
        inside = (j >= 0) & (j < length)
        here = inside & (j >= low) & (j - low < KEYS)
        tl.store(marks + (j - low), tl.full([ENTRIES], 1, tl.int8), mask=here)
        lower += (inside & (j < low)).to(tl.int32)
        own += here.to(tl.int32)
    first = tl.sum(lower, 0)
    end = first + tl.sum(own, 0)
    end = tl.where(nth == ranges - 1, lists.count, end)  # what is no key comes last
    tl.debug_barrier()
    found = tl.load(marks + tl.arange(0, KEYS), cache_modifier=".cg").to(tl.int32)
    rank = tl.cumsum(found, 0)
    tl.store(out + first + rank - 1, low + tl.arange(0, KEYS), mask=found != 0)
    first += tl.sum(found, 0)
    for start in range(first, end, ENTRIES):
        t = start + tl.arange(0, ENTRIES)
        tl.store(out + t, tl.full([ENTRIES], -1, tl.int32), mask=t < end)


def ascending(problem: AttentionProblem, tensors: AttentionTensors, **options: Any) -> Tensor:
    """The key lists in ascending order with every key once, int32 `[B, Hkv, n]`, -1 in between.

    Takes a byte for each key of the cache's capacity and head, uninitialised.

    Args:
        problem: in the cache form.
        tensors: of the call.
        options: how this launch overlaps with those around it.
    """
    given = tensors.key_indices
    planes, count = problem.batch * problem.heads_kv, given.shape[2]
    keys = min(KEYS, max(FEWEST_KEYS, power_of_2(problem.seqlen_k)))
    ranges = ceil_div(problem.seqlen_k, keys)
    marks = torch.empty(planes * ranges * keys, dtype=torch.int8, device=given.device)
    result = torch.empty(given.shape, dtype=torch.int32, device=given.device)
    sort_kernel[(planes * ranges,)](
        listed(given, False), lengths(tensors), marks, result,
        problem.seqlen_k, problem.heads_kv, ranges,
        KEYS=keys, ENTRIES=min(MOST_ENTRIES, power_of_2(count)),
        num_warps=WARPS, num_stages=1,  # nothing is read ahead across what other threads write
        **options,
    )  # fmt: skip
    return result
