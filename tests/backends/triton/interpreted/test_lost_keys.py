"""Masks that break the promise of `keys_per_row`: rows of a segment that has no slot for some of
its keys come out as NaN, and nothing outside the tensors of a launch is touched.
"""

from __future__ import annotations

import pytest
import torch

from flash_sparse_attn.masks import IntervalMask

from .calls import TOLERANCE, Draw, exact, run
from .compacted import Compacted, intervals
from .pairs import Call

DTYPES = tuple(dtype for dtype in TOLERANCE if dtype.itemsize < 8)
"""Their tiles differ. Keys of float64 are not gathered."""


def own_keys(seqlen_q, each):
    """`each` keys for every row, seen by no other: all enter inside a segment."""
    start = torch.arange(seqlen_q, dtype=torch.int32).repeat_interleave(each)[None, None]
    return intervals(IntervalMask(start, start + 1))


def top_keys(seqlen_q, seqlen_k, window, **options):
    scores = Draw.seeded(1).normal(1, 1, seqlen_k)
    return intervals(IntervalMask.topk(scores, window, seqlen_q=seqlen_q, **options))


def first_key_outlives(seqlen_q, each):
    """As `own_keys`, and key 0 for every row."""
    terms = own_keys(seqlen_q, each)
    terms["interval_start"][..., 0], terms["interval_end"][..., 0] = 0, seqlen_q
    return terms


BROKEN = {
    "entering keys": (100, 300, lambda: own_keys(100, 3), 1),
    "whole tiles of entering keys": (100, 500, lambda: own_keys(100, 5), 1),
    "entering keys, and one for all rows": (100, 300, lambda: first_key_outlives(100, 3), 1),
    "leaving keys": (100, 300, lambda: top_keys(100, 300, 200), 5),
    "keys of all rows": (100, 250, lambda: top_keys(100, 250, 200, causal=False), 3),
    "later segments": (200, 200, lambda: top_keys(200, 200, 170), 10),
    "one segment": (60, 400, lambda: top_keys(60, 400, 300), 1),
    "one segment, entering keys": (64, 256, lambda: own_keys(64, 4), 1),
    "one segment, a tile too many": (64, 290, lambda: top_keys(64, 290, 290, causal=False), 1),
}


def run_broken(case, dtype, grads):
    """(results, float64 results, rows, keys): rows [B, Hq, Sq] that are in a segment without room
    for its keys and see any, keys [B, Hq, Sk] that such rows see. Other segments are right.
    """
    seqlen_q, seqlen_k, make, promised = BROKEN[case]
    draw = Draw.seeded(2)
    terms = make() | {"bias": draw.normal(1, 2, 1, seqlen_k, dtype=dtype)}
    call = Call(seqlen_q, seqlen_k, 1, (2, 1), terms, 8, dtype, keys_per_row=promised)
    do = draw.normal(*call.tensors.q.shape, dtype=dtype)
    dlse = draw.normal(1, 2, seqlen_q)
    got = run(call.tensors, call.options, do, dlse, grads)
    found = Compacted(call)
    lost = (found.counts > found.slots.capacity).repeat_interleave(found.slots.rows, 2)
    lost = lost.repeat_interleave(2 // lost.shape[1], 1)[..., :seqlen_q]
    seen = call.visible & lost[..., None]
    assert seen.any()
    assert not got["o"][:, ~lost[0, 0]].isnan().any()
    return got, exact(call.tensors, call.options, do, dlse), seen.any(3), seen.any(2)


def require_nan(got, want, where, dtype):
    """NaN where it is due, and no wrong number elsewhere."""
    assert got[where.expand(got.shape)].isnan().all()
    sound = ~got.isnan()
    error = (got[sound].double() - want[sound]).abs()
    assert (error <= 4 * TOLERANCE[dtype] * (1 + want[sound].abs())).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", BROKEN)
def test_outputs_of_lost_keys(case, dtype):
    """NaN in every row that sees something."""
    got, want, rows, _ = run_broken(case, dtype, ())
    require_nan(got["o"], want["o"], rows.mT[..., None], dtype)
