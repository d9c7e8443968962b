"""Every backend passes every case that its table claims, and declines every other (E9).

Run with `--backend NAME` (repeatable; default: every backend that is available here), `--size` and
`--device`. The session ends in a count per backend; it fails if one that was asked for ran nothing.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from flash_sparse_attn.spec import cases, tolerances
from flash_sparse_attn.spec.schema import Case

from flash_sparse_attn import BlockMap, registry

from . import eager, inputs, oracle, threshold
from .calls import Call
from .compare import Results, failures
from .leaves import Leaves
from .poison import poisoned_memory

Record = Callable[[str, object], None]


@dataclass(frozen=True)
class Expected:
    """What does not depend on the backend."""

    inputs: inputs.Inputs
    exact: Results
    eager: Results


@functools.lru_cache(maxsize=1)
def expected(case_id: str, device: str) -> Expected:
    """Inputs, x64 and x_eager; cached because backends take turns at a case."""
    case = cases()[case_id]
    data = inputs.materialise(case, device)
    return Expected(data, oracle.run(case, data), eager.run(case, data))


def run(case: Case, data: inputs.Inputs, backend: str) -> tuple[Results, BlockMap]:
    """The results of a backend, through the public API, and what it kept (T1)."""
    leaves = Leaves(case, data)
    with poisoned_memory(data.do.device.type):
        o, lse, kept = Call(case, data, dict(leaves.tensors), backend).run()
        return leaves.results(o, lse), kept


def test_case(backend: str, case: Case, device: str, record_property: Record) -> None:
    """One backend, one case."""
    record_property("backend", backend)
    absent = registry.availability(backend)
    if absent:
        record_property("outcome", "unavailable")
        pytest.skip(f"backend {backend!r} is unavailable: {'; '.join(absent)}")
    if case.reject:
        _must_reject(backend, case, device)
        return
    data = inputs.materialise(case, device)
    against = registry.load(backend).unsupported(Call(case, data, data.tensors, backend).problem())
    if against:
        record_property("outcome", "declared unsupported")
        _must_decline(backend, case, data, against)
        return
    _must_pass(backend, case, device)


def _must_reject(backend: str, case: Case, device: str) -> None:
    """An invalid call raises exactly the exception documented, and names the rule."""
    data = inputs.materialise(case, device)
    call = Call(case, data, dict(data.tensors), backend)
    call.spoil(case.reject)
    with pytest.raises((Exception,)) as caught:
        call.run()
    name, message = type(caught.value).__name__, str(caught.value)
    assert name == case.reject.exception, f"{name}: {message}"
    assert f"[rule {case.rule}]" in message, message


def _must_decline(backend: str, case: Case, data: inputs.Inputs, against: list[str]) -> None:
    """A call outside the table raises with every reason, and falls back to nobody."""
    with pytest.raises(NotImplementedError) as caught:
        run(case, data, backend)
    missing = [reason for reason in against if reason not in str(caught.value)]
    assert not missing, f"reasons not given: {missing}; message: {caught.value}"


def _must_pass(backend: str, case: Case, device: str) -> None:
    """N1 for every output and gradient; G2 where asked for; T1 where claimed."""
    want = expected(case.id, device)
    exact, yardstick = want.exact, want.eager
    got, kept = run(case, want.inputs, backend)
    if case.options.softmax_threshold:
        pairs = threshold.judge(backend, case, want.inputs, kept)
        exact, yardstick = threshold.replay(case, want.inputs, pairs)
    broken = failures(got, exact, yardstick, tolerances()[case.dtype])
    if broken:
        pytest.fail("N1: " + "; ".join(broken), pytrace=False)
    if case.options.deterministic:
        again, _ = run(case, want.inputs, backend)
        different = [name for name, x in got.items() if not _same_bits(x, again[name])]
        assert not different, f"G2: {different} differ between two runs"


def _same_bits(x: torch.Tensor, y: torch.Tensor) -> bool:
    kind = {2: torch.int16, 4: torch.int32, 8: torch.int64}[x.element_size()]
    return torch.equal(x.contiguous().view(kind), y.contiguous().view(kind))
