"""Random calls: options, sizes, broadcasts and strides drawn from a seed, against float64."""

from __future__ import annotations

import math
import random

import pytest
import torch

from flash_sparse_attn.problem import AttentionOptions
from flash_sparse_attn.tensors import DIFFERENTIABLE, AttentionTensors

from .calls import Draw, check

SEEDS = range(20)


def random_call(rng: random.Random) -> tuple[AttentionTensors, AttentionOptions]:
    """A call of the batched form with a random choice of terms."""
    draw = Draw.seeded(rng.randrange(2**30))
    batch, heads_kv, group = rng.choice([1, 2]), rng.choice([1, 2]), rng.choice([1, 2, 3])
    heads_q = heads_kv * group
    seqlen_q = rng.choice([1, 5, 33, 64, 70, 100])
    seqlen_k = rng.choice([1, 7, 40, 64, 96, 130, 150])
    dim = rng.choice([1, 8, 16, 20, 33])
    dtype = rng.choice([torch.float32, torch.float16])
    sizes = (batch, seqlen_q, seqlen_k, (heads_q, heads_kv), dim, dtype)
    q, k, v = (_some_layout(rng, x) for x in draw.qkv(*sizes))

    options = {
        "softmax_scale": rng.choice([dim**-0.5, dim**-0.5, -0.3, 0.7, 0.0]),
        "softcap": rng.choice([0.0, 0.0, 2.5]),
        "causal": rng.random() < 0.5,
    }
    if rng.random() < 0.5:
        options["window_left"] = rng.choice([None, 0, 3, 50, 200])
        options["window_right"] = rng.choice([None, 0, 4, 40, 300])
        options["sinks"] = rng.choice([0, 0, 3, 40, 500])

    def pair_sizes() -> tuple[int, ...]:
        heads = rng.choice([1, heads_kv, heads_q])
        rows, keys = rng.choice([1, seqlen_q]), rng.choice([1, seqlen_k, seqlen_k])
        return rng.choice([1, batch]), heads, rows, keys

    tensors = {}
    if rng.random() < 0.4:
        mask = draw.coin(*pair_sizes(), share=rng.choice([0.02, 0.5, 0.98]))
        if rng.random() < 0.5 and mask.shape[2] > 1 and mask.shape[3] > 1:
            corner = mask[:, :, : mask.shape[2] // 2, : mask.shape[3] // 2]
            corner[:] = rng.random() < 0.5
        tensors["mask"] = mask
    if rng.random() < 0.4:
        bias = draw.normal(*pair_sizes(), dtype=rng.choice([dtype, torch.float32]))
        if rng.random() < 0.3:
            bias[draw.coin(*bias.shape, share=0.1)] = -math.inf
        tensors["bias"] = bias
    if rng.random() < 0.4:
        per_key = rng.choice([1, batch]), rng.choice([1, heads_kv]), seqlen_k
        tensors["interval_start"] = draw.integers(-5, max(seqlen_q // 2, 1), *per_key)
        tensors["interval_end"] = draw.integers(0, seqlen_q + 10, *per_key)
    return AttentionTensors(q, k, v, **tensors), AttentionOptions(**options)


def _some_layout(rng: random.Random, x: torch.Tensor) -> torch.Tensor:
    """The same values, contiguous in [B, S, H, D], in [B, H, S, D] or in S."""
    order = rng.choice([(0, 1, 2, 3), (0, 2, 1, 3), (0, 2, 3, 1)])
    inverse = sorted(range(4), key=order.__getitem__)
    return x.permute(order).contiguous().permute(inverse)


@pytest.mark.parametrize("seed", SEEDS)
def test_random_call(seed):
    rng = random.Random(seed)
    tensors, options = random_call(rng)
    present = [name for name in DIFFERENTIABLE if getattr(tensors, name) is not None]
    if rng.random() < 0.3:
        present = rng.sample(present, rng.randint(1, len(present)))
    check(tensors, options, seed=seed, with_dlse=rng.random() < 0.5, grads=tuple(present))
