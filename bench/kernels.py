"""Device time by kernel, from torch's profiler, and what kernels of ours are for, by their names.

A result stores times by name; what they are for is looked up when it is read.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity

from .timing import synchronize

CALLS = 3
"""Calls that are profiled, one after the other: L2 is as the last one left it."""

NAME_LENGTH = 160

ATTENTION, PREPARATION, OTHER = KINDS = ("attention", "preparation", "other")

PATTERNS = (
    (r"^(forward|(key|query)_gradients?|row_terms|bias_gradient|sum_\w+)_kernel", ATTENTION),
    (r"^(attend|scores|kept|merge)_kernel", ATTENTION),  # of a cache
    (r"^(key_ranges|pack_mask|\w+_tiles|block_words|record|clear_rest)_kernel", PREPARATION),
    (r"^(delta_extrema|gate_floor|gate_reach|highest_gates|sort|admit)_kernel", PREPARATION),
    (r"^(key_bounds|screen)_kernel", PREPARATION),
    (r"^(live|segment|gather|count|index)_\w+_kernel", PREPARATION),
    (r"\b(at|at_cuda_detail|cub)::|^Mem(set|cpy)", PREPARATION),  # torch's own
)
"""Regular expression over a kernel's name -> its kind; the first that matches."""


def kind(name: str) -> str:
    """One of `KINDS`."""
    return next((kind for pattern, kind in PATTERNS if re.search(pattern, name)), OTHER)


def by_kind(table: dict[str, dict[str, float]]) -> dict[str, float]:
    """Microseconds of one call by kind, from `Row.kernels` of one quantity."""
    total = dict.fromkeys(KINDS, 0.0)
    for name, entry in table.items():
        total[kind(name)] += entry["us"]
    return total


def profile(call: Callable[[], object], device: torch.device) -> dict[str, dict[str, float]]:
    """What one call runs on the device: kernel -> {"us", "launches"}, both a call.

    Raises:
        RuntimeError: the profiler cannot be used here, or saw nothing.
    """
    call()
    synchronize(device)
    with torch.profiler.profile(activities=[ProfilerActivity.CUDA]) as profiler:
        for _ in range(CALLS):
            call()
        synchronize(device)
    found = per_call(profiler.key_averages(), CALLS)
    if not found:
        raise RuntimeError("the profiler saw no kernel")
    return found


def per_call(events: Iterable[Any], calls: int) -> dict[str, dict[str, float]]:
    """Averages of a profiler's events on the device over so many calls, longest first."""
    found: dict[str, dict[str, float]] = {}
    for event in events:
        if event.device_type != DeviceType.CUDA or not event.self_device_time_total:
            continue
        entry = found.setdefault(event.key[:NAME_LENGTH], {"us": 0.0, "launches": 0.0})
        entry["us"] += event.self_device_time_total / calls
        entry["launches"] += event.count / calls
    return dict(sorted(found.items(), key=lambda item: -item[1]["us"]))
