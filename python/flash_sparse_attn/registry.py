"""The backends of this installation, in order of preference: which were built in, which can run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from importlib import import_module, resources, util
from typing import TYPE_CHECKING, Any, Protocol, cast

if TYPE_CHECKING:
    from torch import Tensor

    from .problem import AttentionProblem
    from .tensors import AttentionTensors

REFERENCE = "reference"
"""The name by which `load` and `availability` know the reference; it is not among `names()`."""

_BACKENDS = f"{__package__}.backends"
_RECORD = f"{__package__}.build_record"

REFERENCE = "reference"
"""Name of the backend that is always there and serves whatever no other does."""


class Backend(Protocol):
    """The contract of a backend: what the module `backends/<name>/__init__.py` defines.

    Importing it needs nothing but torch. `forward` and `backward` are called only for a problem
    that `unsupported` has nothing against, in a process that `availability` has nothing against. A
    backend may also define `topk_intervals`, as `selection.topk_intervals` takes and returns it,
    and `admit`, as `streaming.admit_by_operations`.
    """

    def availability(self) -> list[str]:
        """Every reason why it cannot run in this process; empty = it can."""

    def unsupported(self, problem: AttentionProblem) -> list[str]:
        """Every reason why it does not serve `problem` (E9); empty = it does."""

    def forward(
        self, problem: AttentionProblem, tensors: AttentionTensors
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """`(o, lse, kept)` by O1, O2 and T1: o contiguous in the dtype of q, lse float32, and the
        set kept, int32 of shape `problem.kept_shape`, None without a threshold.
        """

    def backward(
        self,
        problem: AttentionProblem,
        tensors: AttentionTensors,
        o: Tensor,
        lse: Tensor,
        kept: Tensor | None,
        do: Tensor,
        dlse: Tensor | None,
    ) -> dict[str, Tensor]:
        """One gradient for each name in `problem.grads` (G1), of its argument's own shape."""

    def info(self) -> dict[str, Any]:
        """Versions and settings, for `python -m flash_sparse_attn info`; plain data."""


@dataclass(frozen=True)
class BuildOption:
    """How a backend's CMake option was set, and what came of it.

    Attributes:
        setting: "AUTO", "ON" or "OFF"; "ON" where there is no build record (a source tree).
        left_out: every reason why the backend is not in this build; empty = it is.
    """

    setting: str
    left_out: tuple[str, ...]


@cache
def names() -> tuple[str, ...]:
    """Names of all backends, the preferred one first (`backends/order.txt`)."""
    lines = resources.files(_BACKENDS).joinpath("order.txt").read_text(encoding="utf-8")
    return tuple(line for line in lines.split("\n") if line and not line.startswith("#"))


@cache
def build_options() -> dict[str, BuildOption]:
    """The build option of every backend, in order of preference.

    CMake records them when it builds the package. A backend that the record does not know, as in
    a source tree without a record, counts as on.
    """
    record = import_module(_RECORD).BACKENDS if util.find_spec(_RECORD) else {}
    return {name: BuildOption(*record.get(name, ("ON", ()))) for name in names()}


def load(name: str) -> Backend:
    """Import a backend, or the reference; kernels and their dependencies are not imported yet.

    Raises:
        ValueError: there is no backend of that name (E9).
        ImportError: it was left out of this build; the message holds every reason (E9).
    """
    reasons = _left_out(name)
    if reasons:
        raise ImportError(f"backend {name!r} is unavailable: {'; '.join(reasons)} [rule E9]")
    module = f"{__package__}.reference_backend" if name == REFERENCE else f"{_BACKENDS}.{name}"
    return cast(Backend, import_module(module))


def availability(name: str) -> list[str]:
    """Every reason why a backend cannot be used in this process; empty = it can.

    Raises:
        ValueError: there is no backend of that name (E9).
    """
    return _left_out(name) or load(name).availability()


def get_available_backends() -> list[str]:
    """Names of the backends that can be used in this process, the preferred one first.

    The reference can be used everywhere and comes last.
    """
    return [name for name in (*names(), REFERENCE) if not availability(name)]


@cache
def first_with(function: str) -> Callable[..., Any] | None:
    """The function of that name of the first available backend that has one; None if none has."""
    for name in names():
        if not availability(name):
            found = getattr(load(name), function, None)
            if found is not None:
                return found
    return None


def option_name(name: str) -> str:
    """The CMake option that puts a backend into a build."""
    return f"FSA_BUILD_{name.upper()}"


def _left_out(name: str) -> list[str]:
    if name == REFERENCE:
        return []
    if name not in names():
        expected = [*names(), REFERENCE]
        raise ValueError(f"backend: got {name!r}, expected one of {expected} [rule E9]")
    option = build_options()[name]
    given = f"{option_name(name)}={option.setting}"
    if option.setting == "OFF":
        switch_on = f"pip install -C cmake.define.{option_name(name)}=ON ."
        return [f"it is not in this build, {given}; with it: {switch_on}"]
    return [f"it is not in this build, {given}: {reason}" for reason in option.left_out]
