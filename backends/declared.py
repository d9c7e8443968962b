"""A declared backend: its name and place are taken, its kernels do not exist yet."""

from __future__ import annotations

from importlib import metadata, util
from typing import Any, NoReturn

from flash_sparse_attn.problem import AttentionProblem


class Declared:
    """The backend contract of a backend that has nothing to run.

    Args:
        reason: why it cannot run, whatever is installed.
        packages: import name -> distribution name of what its kernels will need.
    """

    def __init__(self, reason: str, packages: dict[str, str]) -> None:
        self._reason = reason
        self._packages = packages

    def availability(self) -> list[str]:
        """The reason, then each package that is missing with the line that installs it."""
        missing = [name for name in self._packages if util.find_spec(name) is None]
        return [self._reason] + [
            f"the package {name!r} is not installed: pip install {self._packages[name]}"
            for name in missing
        ]

    def unsupported(self, problem: AttentionProblem) -> list[str]:
        """The same reason against every problem (E9)."""
        return [self._reason]

    def forward(self, problem: AttentionProblem, *_: object) -> NoReturn:
        """Raise `NotImplementedError` with every reason (E9)."""
        raise NotImplementedError("; ".join(self.availability()) + " [rule E9]")

    backward = forward

    def info(self) -> dict[str, Any]:
        """Version of each package that the kernels will need, None where it is missing."""
        return {name: _version(name) for name in self._packages.values()}


def _version(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None
