"""Random arguments for the closed-form facts, in float64 unless a test says otherwise."""

from __future__ import annotations

import pytest
import torch


@pytest.fixture
def rand():
    """A function of sizes that returns standard normal numbers, from one seed a test."""
    generator = torch.Generator().manual_seed(20240913)

    def draw(*sizes: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
        return torch.randn(*sizes, generator=generator, dtype=torch.float64).to(dtype)

    return draw


@pytest.fixture
def coin(rand):
    """A function of sizes that returns True about two times in three."""
    return lambda *sizes: rand(*sizes) < 0.43


@pytest.fixture
def qkv(rand):
    """A function of sizes that returns q [B, Sq, Hq, D], k [B, Sk, Hkv, D], v [B, Sk, Hkv, Dv]."""

    def draw(batch=2, seqlen_q=5, seqlen_k=7, heads_q=4, heads_kv=2, dim=3, dim_v=6, **kwargs):
        q = rand(batch, seqlen_q, heads_q, dim, **kwargs)
        k = rand(batch, seqlen_k, heads_kv, dim, **kwargs)
        v = rand(batch, seqlen_k, heads_kv, dim_v, **kwargs)
        return q, k, v

    return draw
