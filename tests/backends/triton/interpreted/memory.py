"""What interpreted kernels read and write, checked.

Triton's interpreter follows any pointer and runs the programs of a launch one after another: by
itself it shows neither an access outside a tensor nor a result that depends on the order.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import Tensor
from triton.runtime.interpreter import GridExecutor, InterpreterBuilder, interpreter_builder
from triton.tools.tensor_descriptor import TensorDescriptor

_place = GridExecutor._init_args_hst
_load = InterpreterBuilder.create_masked_load
_store = InterpreterBuilder.create_masked_store
_update = InterpreterBuilder.create_atomic_rmw


@contextmanager
def checked_memory() -> Iterator[None]:
    """Inside, a kernel fails that touches what lies outside the tensors it was given, that reads
    what another program of its launch wrote, or that gives one element two values.
    """
    launch = _Launch(())

    def place(executor: GridExecutor, arguments: Any, keywords: Any) -> Any:
        nonlocal launch
        placed = _place(executor, arguments, keywords)
        launch = _Launch(placed[0])
        return placed

    def load(builder: Any, pointers: Any, mask: Any, *rest: Any, **keywords: Any) -> Any:
        launch.loads(pointers.data[np.asarray(mask.data, bool)], _size(pointers))
        return _load(builder, pointers, mask, *rest, **keywords)

    def store(builder: Any, pointers: Any, value: Any, mask: Any, *rest: Any) -> None:
        elements = (
            pointers.data[np.asarray(mask.data, bool)],
            value.data[np.asarray(mask.data, bool)],
        )
        launch.stores(*elements)
        _store(builder, pointers, value, mask, *rest)
        launch.stored(*elements)

    def update(builder: Any, kind: Any, pointers: Any, value: Any, mask: Any, *rest: Any) -> Any:
        launch.updates(pointers.data[np.asarray(mask.data, bool)], _size(pointers))
        return _update(builder, kind, pointers, value, mask, *rest)

    with (
        mock.patch.object(GridExecutor, "_init_args_hst", place),
        mock.patch.object(InterpreterBuilder, "create_masked_load", load),
        mock.patch.object(InterpreterBuilder, "create_masked_store", store),
        mock.patch.object(InterpreterBuilder, "create_atomic_rmw", update),
    ):
        yield


@contextmanager
def last_program_first() -> Iterator[None]:
    """Inside, the programs of a launch run in the reverse of their order."""
    place = InterpreterBuilder.set_grid_idx

    def reverse(builder: InterpreterBuilder, x: int, *rest: int) -> None:
        place(builder, builder.grid_dim[0] - 1 - x, *rest)

    with mock.patch.object(InterpreterBuilder, "set_grid_idx", reverse):
        yield


class _Allocation:
    """The bytes behind tensors and, at the first byte of an element, the program that wrote it."""

    def __init__(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        self.start = storage.data_ptr()
        self.bytes = torch.empty(0, dtype=torch.uint8).set_(storage).numpy()
        self.writers = np.zeros(len(self.bytes), np.int32)

    def holds(self, at: np.ndarray, values: np.ndarray) -> np.ndarray:
        """Whether the elements have these values, bit by bit."""
        size = values.itemsize
        expected = np.ascontiguousarray(values).view(np.uint8).reshape(-1, size)
        return (self.bytes[at[:, None] + np.arange(size)] == expected).all(1)


class _Launch:
    """The tensors of one launch, and what its programs have done so far."""

    def __init__(self, arguments: Any) -> None:
        allocations: dict[int, _Allocation] = {}
        self._tensors: list[tuple[int, int, _Allocation]] = []
        for x in _tensors(arguments):
            if x.numel():
                allocation = allocations.setdefault(x.untyped_storage().data_ptr(), _Allocation(x))
                self._tensors.append((x.data_ptr(), x.data_ptr() + _extent(x), allocation))

    def loads(self, pointers: np.ndarray, size: int) -> None:
        """Before a program reads elements."""
        if pointers.size:
            allocation, at = self._find(pointers, size)
            writers = allocation.writers[at]
            _require((writers == 0) | (writers == _program()), "reads what another program wrote")

    def stores(self, pointers: np.ndarray, values: np.ndarray) -> None:
        """Before a program writes elements."""
        if pointers.size:
            allocation, at = self._find(pointers, values.itemsize)
            writers = allocation.writers[at]
            free = (writers == 0) | (writers == _program()) | allocation.holds(at, values)
            _require(free, "writes other than another program wrote")
            allocation.writers[at] = _program()

    def stored(self, pointers: np.ndarray, values: np.ndarray) -> None:
        """After it."""
        if pointers.size:
            allocation, at = self._find(pointers, values.itemsize)
            _require(allocation.holds(at, values), "writes two values to one element")

    def updates(self, pointers: np.ndarray, size: int) -> None:
        """Before a program updates elements atomically."""
        if pointers.size:
            self._find(pointers, size)

    def _find(self, pointers: np.ndarray, size: int) -> tuple[_Allocation, np.ndarray]:
        """Where the elements are, by byte; all are of one tensor."""
        low, high = int(pointers.min()), int(pointers.max()) + size
        for start, end, allocation in self._tensors:
            if start <= low and high <= end:
                return allocation, (pointers - np.uint64(allocation.start)).astype(np.int64)
        raise AssertionError(f"program {_program() - 1} accesses what is inside no one tensor")


def _require(right: np.ndarray, fault: str) -> None:
    assert right.all(), f"program {_program() - 1} {fault}: {int((~right).sum())} elements"


def _program() -> int:
    """Number of the program that runs, from 1; grids here have one dim."""
    return 1 + interpreter_builder.grid_idx[0]


def _size(pointers: Any) -> int:
    """Bytes of an element."""
    return max(pointers.get_element_ty().primitive_bitwidth // 8, 1)


def _extent(tensor: Tensor) -> int:
    """Bytes from the first element to behind the last."""
    steps = zip(tensor.shape, tensor.stride(), strict=True)
    return (1 + sum((size - 1) * stride for size, stride in steps)) * tensor.element_size()


def _tensors(argument: Any) -> Iterator[Tensor]:
    """Every tensor of an argument of a kernel."""
    if isinstance(argument, Tensor):
        yield argument
    elif isinstance(argument, TensorDescriptor):
        yield argument.base
    elif isinstance(argument, tuple | list):
        for part in argument:
            yield from _tensors(part)
