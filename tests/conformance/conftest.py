"""Backend x case, and the rule that keeps large cases off small machines."""

from __future__ import annotations

import pytest
import torch
from flash_sparse_attn.spec import cases

from flash_sparse_attn import registry

SIZES = ("small", "medium", "large")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if not {"backend", "case"} <= set(metafunc.fixturenames):
        return
    known = (*registry.names(), registry.REFERENCE)
    asked = metafunc.config.getoption("--backend")
    unknown = sorted(set(asked) - set(known))
    if unknown:
        raise pytest.UsageError(f"--backend: got {unknown}, expected among {list(known)}")
    backends = [x for x in known if x in (asked or registry.get_available_backends())]
    points = [(backend, case) for case in cases().values() for backend in backends]
    ids = [f"{backend}:{case.id}" for backend, case in points]
    metafunc.parametrize(("backend", "case"), points, ids=ids)


@pytest.fixture
def device(request: pytest.FixtureRequest) -> str:
    """Device type of the run; skips what is too large for it."""
    config = request.config
    automatic = "cuda" if torch.cuda.is_available() else "cpu"
    device = config.getoption("--device") or automatic
    largest = config.getoption("--size") or ("large" if device == "cuda" else "small")
    case, backend = request.getfixturevalue("case"), request.getfixturevalue("backend")
    if SIZES.index(case.size) > SIZES.index(largest):
        request.node.user_properties += [("backend", backend), ("outcome", "too large here")]
        pytest.skip(f"a {case.size} case; the largest run here are {largest}")
    return device
