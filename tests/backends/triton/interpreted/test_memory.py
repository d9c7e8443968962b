"""The check of memory accesses fails what it should fail, and nothing else."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.runtime.errors import InterpreterError

from .memory import checked_memory, last_program_first

OUTSIDE, STALE, OTHER, TWO = (
    "inside no one tensor",
    "reads what another program wrote",
    "writes other than another program wrote",
    "writes two values to one element",
)


class Nested(NamedTuple):
    x: Tensor
    offset: int


@triton.jit
def shift_kernel(nested, out, n, N: tl.constexpr):
    i = tl.arange(0, N)
    x = tl.load(nested.x + i + nested.offset, mask=i < n, other=0)
    tl.store(out + i, x, mask=i < n)


@triton.jit
def broadcast_kernel(out, step, N: tl.constexpr):
    value = tl.program_id(0) * step + tl.arange(0, N)
    tl.store(out + tl.arange(0, N), value)


@triton.jit
def running_kernel(out):
    program = tl.program_id(0)
    before = tl.load(out + program)
    tl.store(out + program + 1, before + 1)


@triton.jit
def fold_kernel(out, N: tl.constexpr):
    tl.store(out + tl.arange(0, N) % 2, tl.arange(0, N))


@triton.jit
def ticket_kernel(counter, out):
    tl.store(out + tl.program_id(0), tl.atomic_add(counter, 1))


@pytest.mark.parametrize(("offset", "n"), [(-1, 8), (1, 8), (9, 1), (-3, 4)])
def test_reads_outside(offset, n):
    x = torch.arange(10, dtype=torch.int32)[1:9]
    out = torch.zeros(8, dtype=torch.int32)
    with checked_memory(), pytest.raises(InterpreterError, match=OUTSIDE):
        shift_kernel[(1,)](Nested(x, offset), out, n, N=8)


def test_writes_outside():
    x, out = torch.arange(8, dtype=torch.int32), torch.zeros(7, dtype=torch.int32)
    with checked_memory(), pytest.raises(InterpreterError, match=OUTSIDE):
        shift_kernel[(1,)](Nested(x, 0), out, 8, N=8)


def test_accesses_inside():
    x, out = torch.arange(8, dtype=torch.int32), torch.zeros(8, dtype=torch.int32)
    with checked_memory():
        shift_kernel[(1,)](Nested(x, 3), out, 5, N=8)
    assert out.tolist() == [3, 4, 5, 6, 7, 0, 0, 0]


def test_programs_that_write_the_same():
    out = torch.zeros(8, dtype=torch.int32)
    with checked_memory():
        broadcast_kernel[(3,)](out, 0, N=8)
        broadcast_kernel[(1,)](out, 1, N=8)
        with pytest.raises(InterpreterError, match=OTHER):
            broadcast_kernel[(3,)](out, 1, N=8)


def test_reads_of_what_another_program_wrote():
    out = torch.zeros(5, dtype=torch.int32)
    with checked_memory(), pytest.raises(InterpreterError, match=STALE):
        running_kernel[(4,)](out)


def test_two_values_at_once():
    with checked_memory(), pytest.raises(InterpreterError, match=TWO):
        fold_kernel[(1,)](torch.zeros(8, dtype=torch.int32), N=8)


def test_order_of_programs():
    counter, out = torch.zeros(1, dtype=torch.int32), torch.zeros(4, dtype=torch.int32)
    with checked_memory():
        ticket_kernel[(4,)](counter, out)
        assert out.tolist() == [0, 1, 2, 3]
        with last_program_first():
            ticket_kernel[(4,)](counter, out)
    assert out.tolist() == [7, 6, 5, 4]
