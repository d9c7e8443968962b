"""Which backend answers a problem (E9)."""

from __future__ import annotations

import functools
import warnings
from types import ModuleType

from . import registry
from .problem import AttentionProblem


def require_available(name: str) -> None:
    """Check that a named backend can run in this process.

    Raises:
        ValueError: no backend has this name.
        ImportError: it is not installed, not built, or has no device; the message holds every
            reason and the install line.
    """
    against = registry.availability(name)
    if against:
        raise ImportError(f"backend {name!r} is unavailable: {'; '.join(against)} [rule E9]")


@functools.lru_cache(maxsize=1024)
def select(problem: AttentionProblem, name: str | None) -> ModuleType:
    """The backend that runs `problem`: the named one, or the first that serves it.

    Without a name: the reference for tensors on the CPU; elsewhere the first of `registry.names()`
    that is available and has no reason against the problem, and the reference, with one warning
    that gives every reason, when there is none.

    Raises:
        ValueError, ImportError: as `require_available`.
        NotImplementedError: the named backend does not serve the problem; the message holds every
            reason.
    """
    if name is not None:
        require_available(name)
        backend = registry.load(name)
        against = backend.unsupported(problem)
        if against:
            raise NotImplementedError(
                f"backend {name!r} does not serve {problem}: {'; '.join(against)} [rule E9]"
            )
        return backend
    if problem.device != "cpu":
        found: dict[str, list[str]] = {}
        for candidate in registry.names():
            found[candidate] = registry.availability(candidate) or registry.load(
                candidate
            ).unsupported(problem)
            if not found[candidate]:
                return registry.load(candidate)
        every = "; ".join(
            f"{candidate}: {', '.join(against)}" for candidate, against in found.items()
        )
        warnings.warn(
            f"no GPU backend serves {problem}; the O(N^2) reference runs instead ({every})",
            stacklevel=2,
        )
    reference = registry.load(registry.REFERENCE)
    against = reference.unsupported(problem)
    if against:
        raise NotImplementedError(f"no backend serves {problem}: {'; '.join(against)} [rule E9]")
    return reference
