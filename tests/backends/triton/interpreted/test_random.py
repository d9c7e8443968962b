"""Random calls: options, sizes, broadcasts and strides drawn from a seed, against float64."""

from __future__ import annotations

import math
import random
from typing import Any

import pytest
import torch
from flash_sparse_attn.backends.triton.kernels import compaction
from flash_sparse_attn.backends.triton.kernels.tuning import INTERPRETED_SEGMENT_ROWS
from torch import Tensor

from flash_sparse_attn.masks import IntervalMask
from flash_sparse_attn.problem import AttentionOptions
from flash_sparse_attn.tensors import DIFFERENTIABLE, AttentionTensors
from flash_sparse_attn.validation import describe

from .calls import Draw, check, run, same_bits
from .memory import last_program_first

SEEDS = range(20)


class RandomCall:
    """Sizes, q, k, v and options of a call of the batched form; tests add the terms that they want.

    Args:
        rng: every choice.
        seqlens_q: lengths to choose from.
        seqlens_k: lengths to choose from.
    """

    def __init__(self, rng: random.Random, seqlens_q: list[int], seqlens_k: list[int]) -> None:
        self.rng, self.draw = rng, Draw.seeded(rng.randrange(2**30))
        self.batch, self.heads_kv, group = (
            rng.choice([1, 2]),
            rng.choice([1, 2]),
            rng.choice([1, 2, 3]),
        )
        self.heads_q = self.heads_kv * group
        self.seqlen_q, self.seqlen_k = rng.choice(seqlens_q), rng.choice(seqlens_k)
        dim = rng.choice([1, 8, 16, 20, 33])
        self.dtype = rng.choice([torch.float32, torch.float16])
        heads = (self.heads_q, self.heads_kv)
        sizes = (self.batch, self.seqlen_q, self.seqlen_k, heads, dim, self.dtype)
        self.qkv = [_some_layout(rng, x) for x in self.draw.qkv(*sizes)]
        self.tensors: dict[str, Tensor] = {}
        self.options: dict[str, Any] = {
            "softmax_scale": rng.choice([dim**-0.5, dim**-0.5, -0.3, 0.7, 0.0]),
            "softcap": rng.choice([0.0, 0.0, 2.5]),
            "causal": rng.random() < 0.5,
        }

    def chance(self, share: float) -> bool:
        """True in a share of cases."""
        return self.rng.random() < share

    def some_heads(self) -> tuple[int, int]:
        """Sizes of the batch and head dims of a term with key-value heads."""
        return self.rng.choice([1, self.batch]), self.rng.choice([1, self.heads_kv])

    def pair_sizes(self) -> tuple[int, ...]:
        """Sizes of a mask or bias."""
        heads = self.rng.choice([1, self.heads_kv, self.heads_q])
        rows = self.rng.choice([1, self.seqlen_q])
        keys = self.rng.choice([1, self.seqlen_k, self.seqlen_k])
        return self.rng.choice([1, self.batch]), heads, rows, keys

    def add_window(self) -> None:
        """V2, with sinks or without."""
        self.options["window_left"] = self.rng.choice([None, 0, 3, 50, 200])
        self.options["window_right"] = self.rng.choice([None, 0, 4, 40, 300])
        self.options["sinks"] = self.rng.choice([0, 0, 3, 40, 500])

    def add_mask(self, *sizes: int) -> None:
        """V3."""
        mask = self.draw.coin(*sizes, share=self.rng.choice([0.02, 0.5, 0.98]))
        if self.chance(0.5) and mask.shape[2] > 1 and mask.shape[3] > 1:
            mask[:, :, : mask.shape[2] // 2, : mask.shape[3] // 2] = self.chance(0.5)
        self.tensors["mask"] = mask

    def add_bias(self, *sizes: int) -> None:
        """S4, with -inf here and there or without."""
        bias = self.draw.normal(*sizes, dtype=self.rng.choice([self.dtype, torch.float32]))
        if self.chance(0.3):
            bias[self.draw.coin(*bias.shape, share=0.1)] = -math.inf
        self.tensors["bias"] = bias

    def add_intervals(self) -> None:
        """V4, any."""
        sizes = (*self.some_heads(), self.seqlen_k)
        start = self.draw.integers(-5, max(self.seqlen_q // 2, 1), *sizes)
        self.tensors["interval_start"] = start
        self.tensors["interval_end"] = self.draw.integers(0, self.seqlen_q + 10, *sizes)

    def add_top_keys(self) -> None:
        """M5, with the number of keys of a row known."""
        window = self.rng.choice([1, 3, 20, 60, 200])
        scores = self.draw.normal(*self.some_heads(), self.seqlen_k)
        slope = self.rng.choice([0.0, 0.0, 0.02, -0.02])
        scores = scores + slope * torch.arange(self.seqlen_k)
        mask = IntervalMask.topk(scores, window, causal=self.chance(0.7), seqlen_q=self.seqlen_q)
        self.tensors |= {"interval_start": mask.start, "interval_end": mask.end}
        self.options["keys_per_row"] = window

    def call(self) -> tuple[AttentionTensors, AttentionOptions]:
        return AttentionTensors(*self.qkv, **self.tensors), AttentionOptions(**self.options)


def _some_layout(rng: random.Random, x: Tensor) -> Tensor:
    """The same values, contiguous in [B, S, H, D], in [B, H, S, D] or in S."""
    order = rng.choice([(0, 1, 2, 3), (0, 2, 1, 3), (0, 2, 3, 1)])
    inverse = sorted(range(4), key=order.__getitem__)
    return x.permute(order).contiguous().permute(inverse)


def any_call(rng: random.Random) -> RandomCall:
    """Any terms."""
    made = RandomCall(rng, [1, 5, 33, 64, 70, 100], [1, 7, 40, 64, 96, 130, 150])
    if made.chance(0.5):
        made.add_window()
    if made.chance(0.4):
        made.add_mask(*made.pair_sizes())
    if made.chance(0.4):
        made.add_bias(*made.pair_sizes())
    if made.chance(0.4):
        made.add_intervals()
    return made


def gathered_call(rng: random.Random) -> RandomCall:
    """Terms over which keys are gathered, for several segments of rows if there are enough."""
    made = RandomCall(rng, [1, 40, 65, 130, 200], [1, 40, 128, 150, 200, 260])
    made.add_top_keys()
    if made.chance(0.3):
        made.add_window()
    if made.chance(0.3):
        made.add_mask(*made.some_heads(), 1, made.seqlen_k)
    if made.chance(0.7):
        batch, heads, rows, keys = made.pair_sizes()
        of_keys = made.chance(0.7)
        made.add_bias(batch, heads, 1 if of_keys else rows, keys if of_keys else 1)
    return made


def some_gradients(rng: random.Random, tensors: AttentionTensors) -> tuple[str, ...]:
    """All gradients that there are or, in a third of calls, some."""
    present = [name for name in DIFFERENTIABLE if getattr(tensors, name) is not None]
    if rng.random() < 0.3:
        present = rng.sample(present, rng.randint(1, len(present)))
    return tuple(present)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("make", [any_call, gathered_call])
def test_random_call(make, seed):
    rng = random.Random(seed)
    tensors, options = make(rng).call()
    grads = some_gradients(rng, tensors)
    check(tensors, options, seed=seed, with_dlse=rng.random() < 0.5, grads=grads)


def test_gathered_calls_are_gathered():
    """And a share of them in several segments."""
    calls = [gathered_call(random.Random(seed)).call() for seed in SEEDS]
    problems = [describe(*call) for call in calls]
    assert all(compaction.applies(problem) for problem in problems)
    assert sum(problem.seqlen_q > INTERPRETED_SEGMENT_ROWS for problem in problems) > 8


@pytest.mark.parametrize("seed", range(100, 106))
def test_order_of_programs(seed):
    """G2: programs may run in any order, and nothing changes by a bit."""
    rng = random.Random(seed)
    tensors, options = gathered_call(rng).call()
    grads = tuple(name for name in DIFFERENTIABLE if getattr(tensors, name) is not None)
    do = torch.randn_like(tensors.q)
    first = run(tensors, options, do, None, grads)
    with last_program_first():
        second = run(tensors, options, do, None, grads)
    for name, x in first.items():
        assert same_bits(x, second[name]), name
