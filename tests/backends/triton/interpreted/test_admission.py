"""The kernel that admits a token against PyTorch's operations, slot by slot."""

from __future__ import annotations

import math
import random

import pytest
import torch
from flash_sparse_attn.backends.triton.kernels import admission
from torch import Tensor

from flash_sparse_attn.streaming import DynamicMaskCache, admit_by_operations

from .calls import Draw

NAN, INF = math.nan, math.inf
SEEDS = range(24)
TOKENS = 14


def state(cache: DynamicMaskCache) -> tuple[Tensor, ...]:
    """What the operator changes, in the order of its arguments."""
    return cache.key, cache.value, cache.scores, cache.position, cache._held, cache._seqlen


def assert_same(got: DynamicMaskCache, want: DynamicMaskCache) -> None:
    for x, y in zip(state(got), state(want), strict=True):
        torch.testing.assert_close(x, y, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("seed", SEEDS)
def test_random(seed, monkeypatch):
    """Sizes, layouts, ties, NaN and padding drawn from a seed; windows of several chunks too."""
    monkeypatch.setattr(admission, "LARGEST_CHUNK", 4)
    rng, draw = random.Random(seed), Draw.seeded(seed)
    batch, heads = rng.choice([(1, 1), (2, 1), (1, 3), (2, 2)])
    window, dim, dim_v = rng.choice([1, 2, 3, 4, 5, 7, 11, 20]), rng.choice([1, 4, 5]), 3
    dtype = rng.choice([torch.float32, torch.float16])
    sizes = batch, window, heads, dim, dim_v
    got, want = (DynamicMaskCache(*sizes, dtype=dtype) for _ in range(2))
    special = rng.choice([None, NAN, INF, -INF, -0.0])
    for _ in range(TOKENS):
        k = draw.normal(batch, heads, 1, dim, dtype=dtype).transpose(1, 2)
        v = draw.normal(batch, 1, heads, 2 * dim_v, dtype=dtype)[..., ::2]
        scores = draw.normal(batch, 1, heads).transpose(1, 2).round()
        if special is not None:
            scores[draw.coin(*scores.shape, share=0.3)] = special
        keep = draw.coin(batch, 2, share=0.6)[:, 1:] if seed % 2 else None
        for function, cache in ((admission.admit, got), (admit_by_operations, want)):
            function(*state(cache), k, v, scores, keep)
        assert_same(got, want)
    assert want.seqlen.tolist() == [TOKENS] * batch


def test_no_sequence():
    cache = DynamicMaskCache(0, 4, 2, 8)
    new = torch.zeros(0, 1, 2, 8)
    admission.admit(*state(cache), new, new, torch.zeros(0, 2, 1), None)
    assert cache.seqlen.shape == (0,)
