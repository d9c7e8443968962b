"""Calls that are compacted, and what their slots hold, read back."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Iterator

import torch
from flash_sparse_attn.backends.triton.kernels import preparation
from torch import Tensor

from flash_sparse_attn.masks import IntervalMask
from tests.conformance.poison import poisoned_memory

from .calls import Draw
from .memory import checked_memory
from .pairs import Call


def intervals(mask: IntervalMask) -> dict[str, Tensor]:
    return {"interval_start": mask.start, "interval_end": mask.end}


def top_keys(draw, seqlen_q, seqlen_k, window=20, heads=2, batch=1, **options):
    scores = draw.normal(batch, heads, seqlen_k)
    return intervals(IntervalMask.topk(scores, window, seqlen_q=seqlen_q, **options))


def documents(seqlen):
    boundaries = torch.tensor([0, 31, 65, 128, seqlen], dtype=torch.int32)  # beside those of tiles
    return intervals(IntervalMask.documents(boundaries, seqlen))


CALLS: dict[str, Callable[[Draw], Call]] = {
    "top keys": lambda draw: Call(
        200, 200, 2, (4, 2), top_keys(draw, 200, 200, batch=2), keys_per_row=20, causal=True
    ),
    "top keys, more rows": lambda draw: Call(
        200, 150, 2, (4, 2), top_keys(draw, 200, 150), keys_per_row=20, causal=True
    ),
    "top keys, more keys": lambda draw: Call(
        150, 300, 1, (2, 1), top_keys(draw, 150, 300, heads=1), keys_per_row=20
    ),
    "top keys of all rows": lambda draw: Call(
        150, 200, 1, (2, 2), top_keys(draw, 150, 200, causal=False), keys_per_row=20
    ),
    "top keys, few rows": lambda draw: Call(
        40, 300, 2, (2, 1), top_keys(draw, 40, 300, 70, 1), keys_per_row=70, causal=True
    ),
    "rising scores": lambda draw: Call(
        200,
        200,
        tensors=intervals(IntervalMask.topk(torch.arange(200.0)[None, None], 30)),
        keys_per_row=30,
    ),
    "top keys, number unknown": lambda draw: Call(
        200, 200, 2, (4, 2), top_keys(draw, 200, 200), causal=True
    ),
    "window, sinks, key mask": lambda draw: Call(
        200,
        250,
        2,
        (2, 2),
        {"mask": draw.coin(2, 2, 1, 250, share=0.7)},
        window_left=30,
        window_right=5,
        sinks=9,
    ),
    "window, top keys": lambda draw: Call(
        160, 160, 1, (2, 2), top_keys(draw, 160, 160, 50), window_left=19, causal=True
    ),
    "window to the left, key mask": lambda draw: Call(
        100, 200, 1, (1, 1), {"mask": draw.coin(1, 1, 1, 200)}, window_left=9
    ),
    "documents": lambda draw: Call(170, 170, tensors=documents(170), causal=True, keys_per_row=70),
    "documents, number unknown": lambda draw: Call(170, 170, tensors=documents(170)),
    "key mask": lambda draw: Call(150, 180, 2, (2, 1), {"mask": draw.coin(2, 1, 1, 180)}),
    "key mask, causal": lambda draw: Call(
        180, 180, 2, (4, 2), {"mask": draw.coin(1, 2, 1, 180, share=0.2)}, causal=True
    ),
    "top keys, key mask": lambda draw: Call(
        200,
        200,
        2,
        (2, 2),
        top_keys(draw, 200, 200) | {"mask": draw.coin(2, 1, 1, 200, share=0.6)},
        keys_per_row=20,
    ),
    "intervals beside the rows": lambda draw: Call(
        70,
        200,
        2,
        (2, 2),
        {
            "interval_start": draw.integers(-50, 100, 1, 2, 200),
            "interval_end": draw.integers(-50, 150, 1, 2, 200),
        },
    ),
    "no key for many rows": lambda draw: Call(
        200, 60, 1, (2, 2), top_keys(draw, 200, 60, 5), keys_per_row=5, causal=True
    ),
    "no key": lambda draw: Call(
        150, 100, 1, (1, 1), {"mask": torch.zeros(1, 1, 1, 100, dtype=torch.bool)}
    ),
}


class Compacted:
    """A call over gathered keys.

    Attributes:
        call: the call over all keys.
        tensors, terms, slots: of the call over slots.
        planes: shape of the planes, [{B,1}, {Hkv,1}].
        counts: keys of each segment, [.., segments].
        keys: key of each slot, -1 where there is none, [.., slots].
        visible: which pairs of rows and slots are visible, [B, Hq, Sq, slots].
    """

    def __init__(self, call: Call) -> None:
        self.call = call
        with poisoned_memory("cpu"), checked_memory():
            prepared = preparation.prepare(call.problem, call.tensors, "backward")
        _, self.tensors, self.terms, self.slots = prepared
        slots = self.slots
        self.planes = slots.first.shape[:2]
        n = math.prod(self.planes) * slots.segments
        self.counts = slots.count[:n].view(*self.planes, slots.segments)
        used = torch.arange(slots.capacity) < self.counts[..., None]
        keys = slots.key.view(*self.planes, slots.segments, slots.capacity)
        self.keys = keys.where(used, -1).flatten(2)
        problem = call.problem
        batch, heads = problem.batch // self.planes[0], problem.heads_q // self.planes[1]
        keys = self.keys.repeat_interleave(batch, 0).repeat_interleave(heads, 1)
        keys = keys[:, :, None].expand(-1, -1, problem.seqlen_q, -1).long()
        row, slot = torch.arange(problem.seqlen_q)[:, None], torch.arange(keys.shape[-1])
        own = (row // slots.rows == slot // slots.capacity) & (keys >= 0)
        self.visible = call.visible.gather(3, keys.clamp(min=0)) & own

    def segments(self) -> Iterator[tuple[Tensor, list[int]]]:
        """Of each segment, what its rows see, bool [rows, Sk], and the keys of its slots."""
        problem, slots = self.call.problem, self.slots
        heads = problem.heads_q // self.planes[1]
        keys = self.keys.unflatten(-1, (slots.segments, slots.capacity))
        for b, n, s in itertools.product(*map(range, (*self.planes, slots.segments))):
            count = int(self.counts[b, n, s])
            visible = self.call.visible[b, n * heads, s * slots.rows : (s + 1) * slots.rows]
            yield visible, keys[b, n, s, :count].tolist()


@functools.cache
def compacted(case: str) -> Compacted:
    """One of `CALLS`, compacted."""
    return Compacted(CALLS[case](Draw.seeded(1)))
