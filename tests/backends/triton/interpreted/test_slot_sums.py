"""Gradients of keys from those of slots: who does which part, where a key's slots are noted, and
their sums.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import pytest
import torch
import triton
import triton.language as tl
from flash_sparse_attn.backends.triton.kernels import slot_sums
from flash_sparse_attn.backends.triton.kernels.sizes import ceil_div
from flash_sparse_attn.backends.triton.kernels.slot_sums import part_of_plane

from tests.conformance.poison import poisoned_memory

from .calls import Draw, same_bits
from .compacted import CALLS, compacted
from .memory import checked_memory

BLOCK_N = 32
COUNT_CHUNK = 32


@triton.jit
def parts_kernel(out, slots, heads_kv, n_parts, BLOCK_N: tl.constexpr):
    part = tl.program_id(0) % n_parts
    plane = tl.program_id(0) // n_parts
    _place, _n_q, _start_q, tile, share, shares = part_of_plane(
        slots, None, plane // heads_kv, plane % heads_kv, part, 0, 0, BLOCK_N
    )
    tl.store(out + tl.program_id(0) * 3, tile)
    tl.store(out + tl.program_id(0) * 3 + 1, share)
    tl.store(out + tl.program_id(0) * 3 + 2, shares)


def parts_of(found):
    """(tile, share, shares) of every part, [B, Hkv, parts, 3]."""
    problem, slots = found.call.problem, found.slots
    n_parts = slot_sums.parts_of_plane(slots, BLOCK_N)
    parts = torch.full((problem.batch, problem.heads_kv, n_parts, 3), -1, dtype=torch.int32)
    with checked_memory():
        parts_kernel[(math.prod(parts.shape[:3]),)](
            parts, slots, problem.heads_kv, n_parts, BLOCK_N=BLOCK_N
        )
    return parts


@pytest.mark.parametrize("case", CALLS)
def test_parts(case):
    """Every share of every tile that holds a key is one part; no other part has work. With one
    segment there are as many as are wanted, if that is possible with equal shares.
    """
    found = compacted(case)
    parts = parts_of(found)
    tiles = (found.keys >= 0).unflatten(-1, (-1, BLOCK_N)).any(-1)
    for b, n in itertools.product(*map(range, parts.shape[:2])):
        work = [tuple(part) for part in parts[b, n].tolist() if part[2]]
        used = tiles[b % found.planes[0], n % found.planes[1]].nonzero().flatten().tolist()
        shares = max(found.slots.parts // max(len(used), 1), 1)
        assert work == [(tile, share, shares) for tile in used for share in range(shares)]


def index_of(found):
    """(offset, index) of each plane."""
    problem, slots = found.call.problem, found.slots
    planes, length = math.prod(found.planes), slots.first.shape[-1]
    total = slots.total
    slots = slots._replace(count=slots.count.clone())  # which the kernel adds to
    offset, index = torch.full((planes, length), -1), torch.full((planes, total), -1)
    offset, index = offset.int(), index.int()
    with checked_memory():
        slot_sums.count_slots_kernel[(planes * ceil_div(length, COUNT_CHUNK),)](
            offset, slots, length, CHUNK=COUNT_CHUNK
        )
        slot_sums.index_slots_kernel[(planes * total // slot_sums.INDEX_CHUNK,)](
            index,
            offset,
            slots,
            None,
            problem.seqlen_q,
            problem.seqlen_k,
            length,
            CHUNK=slot_sums.INDEX_CHUNK,
        )
    return offset, index


@pytest.mark.parametrize("case", CALLS)
def test_index(case):
    """Under each key are its slots, one a segment that sees it, by segment; nothing is noted twice
    and nothing else is noted.
    """
    found = compacted(case)
    offset, index = index_of(found)
    for plane, keys in enumerate(found.keys.flatten(0, 1)):
        noted = []
        for key in range(found.call.problem.seqlen_k):
            of_key = (keys == key).nonzero().flatten().tolist()
            start = int(offset[plane, key])
            assert index[plane, start : start + len(of_key)].tolist() == of_key
            noted += range(start, start + len(of_key))
        assert sorted(noted) == list(range(int((keys >= 0).sum())))
        assert (index[plane, len(noted) :] == -1).all()


@pytest.mark.parametrize("case", CALLS)
def test_sums(case):
    """A key's gradient is the sum over the shares of its slots, 0 where it has none, and the same
    to the bit each time (G2); what no part wrote is not read.
    """
    found = compacted(case)
    draw, slots = Draw.seeded(3), found.slots
    problem = replace(found.call.problem, head_dim=12, head_dim_v=12)
    n_parts = slot_sums.parts_of_plane(slots, BLOCK_N)
    batch, heads_kv = problem.batch, problem.heads_kv
    work = parts_of(found)[..., 2].bool().repeat_interleave(BLOCK_N, 2)
    dk, dv = (draw.normal(batch, n_parts * BLOCK_N, heads_kv, 12) for _ in range(2))
    dbias = draw.normal(batch, heads_kv, n_parts * BLOCK_N, problem.group)
    for x in (dk, dv):
        x.masked_fill_(~work.mT[..., None], math.nan)
    dbias.masked_fill_(~work[..., None], math.nan)
    ddelta = draw.normal(batch, heads_kv, n_parts * BLOCK_N).masked_fill_(~work, math.nan)

    runs = []
    for _ in range(2):
        fresh = slots._replace(count=slots.count.clone())
        with poisoned_memory("cpu"), checked_memory():
            runs.append(slot_sums.add_up(problem, fresh, None, BLOCK_N, dk, dv, dbias, ddelta))
    for x, y in zip(*runs, strict=True):
        assert same_bits(x, y)

    want = [torch.zeros_like(x, dtype=torch.float64) for x in runs[0]]
    parts = parts_of(found).tolist()
    for b, n in itertools.product(range(batch), range(heads_kv)):
        keys = found.keys[b % found.planes[0], n % found.planes[1]].tolist()
        group = slice(n * problem.group, (n + 1) * problem.group)
        for part, (tile, _share, shares) in enumerate(parts[b][n]):
            for column, key in enumerate(keys[tile * BLOCK_N : (tile + 1) * BLOCK_N]):
                if shares and key >= 0:
                    at = part * BLOCK_N + column
                    want[0][b, key, n] += dk[b, at, n]
                    want[1][b, key, n] += dv[b, at, n]
                    want[2][b, group, key] += dbias[b, n, at]
                    want[3][b, n, key] += ddelta[b, n, at]
    for x, y in zip(runs[0], want, strict=True):
        torch.testing.assert_close(x.double(), y, rtol=1e-6, atol=2e-6)


def test_sums_that_are_not_wanted():
    found = compacted("top keys")
    problem = found.call.problem
    slots = found.slots._replace(count=found.slots.count.clone())
    targets = slot_sums.parts_of_plane(slots, BLOCK_N) * BLOCK_N
    dbias = torch.ones(problem.batch, problem.heads_kv, targets, problem.group)
    unwanted = (None, None)
    *others, sums, ddelta = slot_sums.add_up(problem, slots, None, BLOCK_N, *unwanted, dbias, None)
    assert (*others, ddelta) == (None, None, None)
    times = (found.keys[..., None] == torch.arange(problem.seqlen_k)).sum(2)
    assert torch.equal(sums, times.repeat_interleave(problem.group, 1).float())
