"""Key lists (V6) with every key once: a repeated key, and what is no key, becomes -1."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from flash_sparse_attn.problem import AttentionProblem
from flash_sparse_attn.tensors import AttentionTensors

from .decode_arguments import Lengths, Listed, lengths, listed

NONE: tl.constexpr = tl.constexpr(2**31 - 1)
CHUNK = 1024
"""Entries of a list that a program works on at a time."""
WARPS = 8


@triton.jit
def _entries(lists, b, n, length, start, CHUNK: tl.constexpr):
    """Positions of a chunk of a list, its keys, and whether they are keys."""
    t = start + tl.arange(0, CHUNK)
    at = lists.pointer + tl.cast(b, tl.int64) * lists.batch + tl.cast(n, tl.int64) * lists.head
    j = tl.load(at + t.to(tl.int64) * lists.column, mask=t < lists.count, other=-1)
    return t, j, (j >= 0) & (j < length)


@triton.jit(do_not_specialize=["seqlen_k", "heads_kv"])
def once_kernel(
    lists: Listed, lengths: Lengths, owner, once, seqlen_k, heads_kv, CHUNK: tl.constexpr
):
    """Of equal keys the first stays: `once` int32 `[B, Hkv, count]`. Grid batch * heads.

    `owner` `[B, Hkv, Sk]` holds garbage; only entries of listed keys are ever touched, so that the
    time depends on the list and not on the cache.
    """
    plane = tl.program_id(0)
    b = plane // heads_kv
    n = plane % heads_kv
    length = seqlen_k
    if lengths is not None:
        length = tl.load(lengths.pointer + tl.cast(b, tl.int64) * lengths.stride)
    own = owner + tl.cast(plane, tl.int64) * seqlen_k
    for start in range(0, lists.count, CHUNK):
        t, j, inside = _entries(lists, b, n, length, start, CHUNK)
        tl.store(own + j, NONE, mask=inside)
    tl.debug_barrier()  # other threads claim what this one clears
    for start in range(0, lists.count, CHUNK):
        t, j, inside = _entries(lists, b, n, length, start, CHUNK)
        tl.atomic_min(own + j, t, mask=inside)
    tl.debug_barrier()
    for start in range(0, lists.count, CHUNK):
        t, j, inside = _entries(lists, b, n, length, start, CHUNK)
        # Past the caches that atomics leave behind.
        first = tl.load(own + j, mask=inside, other=NONE, cache_modifier=".cg")
        out = once + tl.cast(plane, tl.int64) * lists.count + t
        tl.store(out, tl.where(first == t, j, -1), mask=t < lists.count)


def once(problem: AttentionProblem, tensors: AttentionTensors) -> Tensor:
    """The key lists with every key once, int32 `[B, Hkv, n]`, order kept.

    Takes 4 bytes for each key of the cache's capacity and head, uninitialised.
    """
    given = tensors.key_indices
    planes = (problem.batch, problem.heads_kv)
    owner = torch.empty((*planes, problem.seqlen_k), dtype=torch.int32, device=given.device)
    result = torch.empty(given.shape, dtype=torch.int32, device=given.device)
    once_kernel[(problem.batch * problem.heads_kv,)](
        listed(given, False),
        lengths(tensors),
        owner,
        result,
        problem.seqlen_k,
        problem.heads_kv,
        CHUNK=CHUNK,
        num_warps=WARPS,
        num_stages=1,  # nothing is read ahead across what other threads write
    )
    return result
