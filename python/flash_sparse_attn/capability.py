"""Capability tables: what a backend serves, as data, and the reasons against a problem."""

from __future__ import annotations

import tomllib
from dataclasses import dataclass
from pathlib import Path

from .problem import AttentionProblem


@dataclass(frozen=True)
class Capability:
    """A backend's `capability.toml`.

    Attributes:
        forms: layouts served, of "batched", "packed", "cache".
        terms: optional terms served, names as in `AttentionProblem.terms`.
        dtypes: dtype names, as in "bfloat16".
        head_dim_max: largest D and Dv.
        head_dim_v_differs: whether Dv may differ from D.
        devices: device types.
        arch_min: smallest compute capability (major * 10 + minor); 0 = any.
        arch_max: largest one; 0 = any.
        backward: whether gradients are served.
    """

    forms: tuple[str, ...]
    terms: tuple[str, ...]
    dtypes: tuple[str, ...]
    head_dim_max: int
    head_dim_v_differs: bool
    devices: tuple[str, ...]
    arch_min: int
    arch_max: int
    backward: bool


def load(path: Path) -> Capability:
    """Read a capability table; every field is required and no other is allowed.

    Raises:
        TypeError: a field is missing or unknown.
    """
    table = tomllib.loads(path.read_text(encoding="utf-8"))
    return Capability(
        **{key: tuple(value) if isinstance(value, list) else value for key, value in table.items()}
    )


def reasons(capability: Capability, problem: AttentionProblem) -> list[str]:
    """Every reason in the table against the problem (E9); empty means that it is served."""
    found = []
    dtype = str(problem.dtype).removeprefix("torch.")
    if problem.form not in capability.forms:
        found.append(f"the {problem.form} form is not among {list(capability.forms)}")
    for term in sorted(problem.terms() - set(capability.terms)):
        found.append(f"the term {term!r} is not served")
    if dtype not in capability.dtypes:
        found.append(f"dtype {dtype} is not among {list(capability.dtypes)}")
    if max(problem.head_dim, problem.head_dim_v) > capability.head_dim_max:
        found.append(
            f"head dim {max(problem.head_dim, problem.head_dim_v)} is above "
            f"{capability.head_dim_max}"
        )
    if problem.head_dim_v != problem.head_dim and not capability.head_dim_v_differs:
        found.append(
            f"head dim of v {problem.head_dim_v} differs from that of q {problem.head_dim}"
        )
    if problem.device not in capability.devices:
        found.append(f"tensors are on {problem.device!r}, served are {list(capability.devices)}")
    if problem.arch is not None:
        if problem.arch < capability.arch_min:
            found.append(f"compute capability {problem.arch} is below {capability.arch_min}")
        if capability.arch_max and problem.arch > capability.arch_max:
            found.append(f"compute capability {problem.arch} is above {capability.arch_max}")
    if problem.grads and not capability.backward:
        found.append(f"gradients of {', '.join(problem.grads)} are not served")
    return found
