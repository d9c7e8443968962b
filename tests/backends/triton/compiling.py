"""Compiles the kernels of a call for a GPU that need not be present, through the backend's own
host code: what a launch would be given is what is compiled.
"""

from __future__ import annotations

import functools
import re
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import triton
from flash_sparse_attn.backends import triton as backend
from flash_sparse_attn.backends.triton.kernels import tuning
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from flash_sparse_attn.problem import AttentionOptions
from flash_sparse_attn.tensors import AttentionTensors
from flash_sparse_attn.validation import describe

DISASSEMBLER = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "nvdisasm"

SHARED_MEMORY = {80: 101376, 90: 232448, 100: 232448, 120: 101376}
"""Bytes that a block may have in every GPU of a family: 99 KiB or 227 KiB."""
MULTIPROCESSORS = 132
"""Of the absent GPU: grids depend on it, code does not."""


@dataclass(frozen=True)
class Loop:
    """An innermost loop of a kernel that has matrix products.

    Attributes:
        instructions: how many it has.
        spills: those of them that read or write registers spilled to local memory.
        waits: those that a warp group waits at, around its asynchronous products.
        barriers: those that all warps of a program wait at.
    """

    instructions: int
    spills: int
    waits: int
    barriers: int


@dataclass(frozen=True)
class Kernel:
    """A compiled kernel.

    Attributes:
        name: of its function.
        shared: bytes of shared memory of a block.
        sass: its instructions, one a line.
    """

    name: str
    shared: int
    sass: tuple[str, ...]

    @property
    def registers(self) -> int:
        """Registers that a thread uses."""
        return 1 + max(int(n) for line in self.sass for n in re.findall(r"\bR(\d+)\b", line))

    def count(self, mnemonic: str) -> int:
        """Instructions whose name starts so."""
        return len(self._matching(rf"\s{mnemonic}"))

    @property
    def hot_loops(self) -> list[Loop]:
        """Every innermost loop with matrix products."""
        product = r"\s(?:\w*HMMA|HGMMA|UTCHMMA|I\w*MMA|FFMA)"
        spans = [x for x in self._backward_jumps() if self._matching(product, *x)]
        inner = [
            x for x in spans if not any(x[0] <= y[0] and y[1] <= x[1] for y in spans if y != x)
        ]
        return [
            Loop(
                end - start,
                len(self._matching(r"\s(?:LDL|STL)\b", start, end)),
                len(self._matching(r"\sWARPGROUP\.", start, end)),
                len(self._matching(r"\sBAR\.SYNC\b", start, end)),
            )
            for start, end in inner
        ]

    def _matching(self, pattern: str, start: int = 0, end: int | None = None) -> list[str]:
        return [line for line in self.sass[start:end] if re.search(pattern, line)]

    def _backward_jumps(self) -> Iterator[tuple[int, int]]:
        labels = {}
        for at, line in enumerate(self.sass):
            if label := re.match(r"\s*(\.L_x_\d+):", line):
                labels[label[1]] = at
            jump = re.search(r"\bBRA\b.*`\((\.L_x_\d+)\)", line)
            if jump and jump[1] in labels:
                yield labels[jump[1]], at


class _AbsentGpu:
    """The part of Triton's driver that compilation asks."""

    def __init__(self, arch: int) -> None:
        self._target = GPUTarget("cuda", arch, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return self._target

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")


@contextmanager
def compiling_only(arch: int) -> Iterator[list[tuple[str, Any]]]:
    """Every launch compiles and runs nothing; yields what was compiled, in order."""
    compiled: list[tuple[str, Any]] = []
    launched: set[JITFunction] = set()
    launch = JITFunction.run

    def compile_launch(
        self: JITFunction, *arguments: Any, grid: Any, warmup: bool, **keywords: Any
    ):
        if self not in launched:  # compiled kernels are kept by device, and this one has no number
            self.device_caches.clear()
            launched.add(self)
        kernel = launch(self, *arguments, grid=grid, warmup=True, **keywords)
        compiled.append((self.__name__, kernel))
        return kernel

    # Patched, not set: a set driver is reset by looking for one, which fails without a GPU.
    absent = mock.patch.object(driver, "_active", _AbsentGpu(arch))
    try:
        with absent, mock.patch.object(JITFunction, "run", compile_launch):
            yield compiled
    finally:
        for function in launched:
            function.device_caches.clear()


def compile_call(
    arch: int, tensors: AttentionTensors, options: AttentionOptions, grads: tuple[str, ...]
) -> dict[str, Kernel]:
    """Kernels of a forward and a backward, by name.

    Args:
        arch: compute capability as major * 10 + minor.
        tensors: of the call, on the CPU; only their layouts matter.
        options: of the call.
        grads: gradients that the backward is asked for.
    """
    problem = replace(describe(tensors, options, grads), device="cuda", arch=arch)
    against = backend.unsupported(problem)
    assert not against, against
    alike = mock.patch.object(tuning, "_multiprocessors", return_value=MULTIPROCESSORS)
    with alike, compiling_only(arch) as compiled:
        o, lse, kept = backend.forward(problem, tensors)
        backend.backward(problem, tensors, o, lse, kept, tensors.q, lse)  # do in the layout of q
    return {
        name: Kernel(name, kernel.metadata.shared, _sass(kernel.asm["cubin"]))
        for name, kernel in compiled
    }


@functools.lru_cache(maxsize=64)
def _sass(cubin: bytes) -> tuple[str, ...]:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [DISASSEMBLER, "-c", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return tuple(text.splitlines())
