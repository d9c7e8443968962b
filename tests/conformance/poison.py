"""Fresh memory that holds garbage, so that an output element that nobody wrote shows."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor

POISONED_BLOCKS = (2**28, *[2**20] * 32)
"""Bytes: the caching allocator keeps small blocks apart from large ones."""


@contextmanager
def poisoned_memory(device: str) -> Iterator[None]:
    """Fill with NaN what `torch.empty` and its kin return, and the cached memory of the GPU.

    The first catches allocations made in Python, the second those made anywhere else.
    """
    if device == "cuda":
        blocks = [torch.full((n // 4,), math.nan, device=device) for n in POISONED_BLOCKS]
        del blocks  # back to the caching allocator, which does not clear them
    names = ("empty", "empty_like", "empty_strided")
    patches = [mock.patch.object(torch, name, _filled(getattr(torch, name))) for name in names]
    patches += [
        mock.patch.object(Tensor, name, _filled(getattr(Tensor, name)))
        for name in ("new_empty", "new_empty_strided")
    ]
    for patch in patches:
        patch.start()
    try:
        yield
    finally:
        for patch in patches:
            patch.stop()


def _filled(allocate: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def filled(*arguments: Any, **keywords: Any) -> Tensor:
        fresh = allocate(*arguments, **keywords)
        if fresh.device.type == "meta" or type(fresh) is not Tensor:
            return fresh
        if fresh.is_floating_point() or fresh.is_complex():
            return fresh.fill_(math.nan)
        return fresh.fill_(True if fresh.dtype == torch.bool else torch.iinfo(fresh.dtype).max)

    return filled
