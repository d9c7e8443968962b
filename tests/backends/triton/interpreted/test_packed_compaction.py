"""Gathered keys of packed sequences (V6): which slots a segment owns, what they hold, and calls
beside the reference.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import triton
import triton.language as tl
from flash_sparse_attn.backends.triton.kernels import (
    arguments,
    compaction,
    preparation,
    segment_keys,
)
from flash_sparse_attn.backends.triton.kernels.sequences import sequence_of
from flash_sparse_attn.backends.triton.kernels.sizes import ceil_div
from flash_sparse_attn.backends.triton.kernels.slots import place_slot

from flash_sparse_attn.validation import describe
from tests.conformance.poison import poisoned_memory

from .calls import same_bits
from .memory import checked_memory, last_program_first
from .packed import PackedCall

BLOCK = arguments.RECORD_BLOCK
WINDOW = 20
UNEVEN = ((200, 200), (70, 90), (0, 10), (150, 130), (5, 0), (33, 33))
SMALL = {"LIVE_CHUNK": 64, "ENTRIES": 2, "CHUNK": 32, "SORT_CHUNK": 16, "BUCKETS": 4}
"""Chunks of which even a small call has several."""

LENGTHS = {
    "uneven": UNEVEN,
    "one sequence": ((200, 260),),
    "empty ends": ((0, 0), (64, 64), (128, 128), (0, 0)),
    "none of two segments": ((30, 64), (64, 30), (1, 1), (64, 128)),
    "many short, one long": (*(((3, 3),) * 20), (300, 300)),
    "keys without rows": ((0, 130), (0, 5)),
    "rows without keys": ((70, 0), (5, 0), (1, 1)),
}


def prepared(call):
    """(terms, slots) of a call that must be gathered."""
    problem = describe(call.tensors, call.options, call.grads)
    assert compaction.applies(problem)
    with poisoned_memory("cpu"), checked_memory():
        _problem, _tensors, terms, slots = preparation.prepare(problem, call.tensors, "backward")
    return terms, slots


@triton.jit
def owners_kernel(out, slots, sequences, total, BLOCK: tl.constexpr):
    """Of a block of slots: sequence, number, first row, first slot and capacity of its segment, and
    whether there is one.
    """
    place, _n_q, _n_k, segment, exists = place_slot(
        slots, sequences, total, total, tl.program_id(0) * BLOCK
    )
    entry = out + tl.program_id(0) * 6
    tl.store(entry, sequence_of(place))
    tl.store(entry + 1, segment.nth)
    tl.store(entry + 2, segment.row)
    tl.store(entry + 3, segment.slot)
    tl.store(entry + 4, segment.capacity)
    tl.store(entry + 5, exists.to(tl.int32))


def owners(terms, slots):
    """(number, capacity, blocks) by (sequence, first row), blocks in ascending order."""
    found = torch.full((slots.total // BLOCK, 6), -1, dtype=torch.int32)
    with checked_memory():
        owners_kernel[(len(found),)](found, slots, terms.sequences, slots.total, BLOCK=BLOCK)
    by_segment = {}
    for block, (b, nth, row, slot, capacity, exists) in enumerate(found.tolist()):
        if exists:
            entry = by_segment.setdefault((b, row), (nth, slot, capacity, []))
            assert entry[:3] == (nth, slot, capacity)
            entry[3].append(block * BLOCK)
    return by_segment


@pytest.mark.parametrize("chunks", [{}, SMALL], ids=["large chunks", "small chunks"])
@pytest.mark.parametrize("case", LENGTHS)
def test_slots_of_segments(case, chunks, monkeypatch):
    """Every segment that has rows and keys owns slots of its own, enough of them, which hold the
    keys that its rows see, each once: those that only leave, in buckets, then the others by key.
    """
    for name, size in chunks.items():
        monkeypatch.setattr(segment_keys, name, size)
    call = PackedCall(LENGTHS[case], WINDOW, heads=(2, 2), causal=True, spare=(3, 40))
    terms, slots = prepared(call)
    owned = owners(terms, slots)
    wanted = {
        (b, row)
        for b, (rows, keys) in enumerate(call.lengths)
        for row in range(0, rows if keys else 0, slots.rows)
    }
    assert owned.keys() == wanted
    counts = slots.count[: 2 * slots.segments].view(2, -1)
    held = slots.key.view(2, -1)
    first_keys = call.tensors.cu_seqlens_k.tolist()
    for (b, row), (nth, slot, capacity, blocks) in owned.items():
        rows, keys = call.lengths[b]
        assert blocks == list(range(slot, slot + capacity, BLOCK))
        n_rows = min(slots.rows, rows)
        assert capacity >= min(keys, WINDOW + n_rows - 1)
        i = torch.arange(row, min(row + slots.rows, rows))[:, None]
        own = slice(first_keys[b], first_keys[b] + keys)
        for n in range(2):
            start = call.tensors.interval_start[0, n, own]
            end = call.tensors.interval_end[0, n, own]
            aligned = torch.arange(keys) <= i + keys - rows
            seen = (start <= i) & (i < end) & aligned
            got = held[n, slot : slot + int(counts[n, nth])].tolist()
            assert sorted(got) == seen.any(0).nonzero().flatten().tolist()
            start, end = (start.clamp(min=0), end.clamp(max=rows))
            leaving = (start[got] <= row) & (end[got] < int(i[-1]) + 1)
            bucket = (end[got] - 1 - row) * segment_keys.BUCKETS // n_rows
            bucket = torch.where(leaving, bucket, segment_keys.BUCKETS).tolist()
            assert list(zip(bucket, got, strict=True)) == sorted(zip(bucket, got, strict=True))


def test_memory_follows_the_tokens_that_exist():
    """However long the longest sequence may be, and however many there are."""
    for lengths in (UNEVEN, ((3, 3),) * 50, ((300, 300),) * 3, ((1, 1000),) * 4):
        call = PackedCall(lengths, WINDOW, causal=True)
        promised = replace(call.options, max_seqlen_q=10**6, max_seqlen_k=10**6)
        call.options = promised
        _terms, slots = prepared(call)
        total_q, total_k = call.tensors.q.shape[0], call.tensors.k.shape[0]
        of_rows = total_q // slots.rows * ceil_div(WINDOW + slots.rows - 1, BLOCK) * BLOCK
        assert slots.total <= of_rows + total_k + BLOCK * len(lengths)


def test_without_a_promise_keys_stay_where_they_are():
    call = PackedCall(UNEVEN, WINDOW, causal=True, keys_per_row=0)
    assert not compaction.applies(describe(call.tensors, call.options))
    with_window = replace(call.options, window_left=9)
    assert compaction.keys_per_row(describe(call.tensors, with_window)) == 10


HALF = {"dtype": torch.float16}
CALLS = {
    "causal": {"causal": True},
    "groups, bias of key-value heads": {**HALF, "heads": (4, 2), "bias": (1, 2, 1, 0)},
    "bias of heads, Dv, softcap, window": {
        "dims": (20, 12),
        "heads": (4, 2),
        "bias": (1, 4, 1, 0),
        "softcap": 2.0,
        "window_left": 9,
        "causal": True,
        "spare": (7, 11),
    },
    "one choice for all heads, one number of bias": {
        **HALF,
        "heads": (4, 2),
        "shared": True,
        "bias": (1, 1, 1, 1),
        "spare": (130, 0),
    },
    "all rows see the same keys": {"topk": {"causal": False}, "bias": (1, 1, 1, 0)},
    "longer than promised rows of a segment": {"causal": True, "max_seqlen_q": 64},
}


@pytest.mark.parametrize("case", CALLS)
def test_calls(case):
    """Outputs and gradients, of uneven and empty sequences with more rows or more keys."""
    PackedCall(UNEVEN, WINDOW, **CALLS[case]).check()


@pytest.mark.parametrize("case", ["many short, one long", "rows without keys", "empty ends"])
def test_lengths(case):
    PackedCall(LENGTHS[case], WINDOW, causal=True, bias=(1, 1, 1, 0)).check()


def test_repeatable():
    """G2, whatever the order of programs."""
    call = PackedCall(((130, 130), (40, 70)), WINDOW, causal=True, bias=(1, 1, 1, 0))
    one = call.check()
    with last_program_first():
        other = call.check()
    for name, x in one.items():
        assert same_bits(x, other[name]), name


def test_lost_keys():
    """A mask that breaks its promise shows as NaN in the rows of that segment alone."""
    call = PackedCall(((100, 300), (40, 40)), 200, causal=True, keys_per_row=5)
    do = torch.ones(140, 2, 16)
    o = call.run(do, torch.zeros(2, 140))["o"]
    assert o[:100].isnan().all()
    assert not o[100:].isnan().any()
