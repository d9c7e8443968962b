"""The runner: wrong backends fail, and a session says what it did not run."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from flash_sparse_attn.spec import cases
from flash_sparse_attn.spec.schema import Case

from flash_sparse_attn import dispatch, reference, reference_backend, registry
from flash_sparse_attn.problem import KEPT_BLOCK

from ..conformance.poison import poisoned_memory
from ..conformance.test_cases import test_case as run_case

TESTS = Path(__file__).parent.parent
forward, backward = reference_backend.forward, reference_backend.backward


def _run(case_id: str) -> dict[str, object]:
    said: dict[str, object] = {}
    run_case(registry.REFERENCE, cases()[case_id], "cpu", said.__setitem__)
    return said


def test_unwritten_output_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fresh memory holds NaN, so a row that nobody wrote shows."""

    def lazy(problem, tensors):
        o, lse, kept = forward(problem, tensors)
        fresh = torch.empty_like(o)
        fresh[:, 1:] = o[:, 1:]
        return fresh, lse, kept

    monkeypatch.setattr(reference_backend, "forward", lazy)
    with pytest.raises(pytest.fail.Exception, match=r"o: .* inf or nan"):
        _run("output/constant[float32]")


@pytest.mark.parametrize(
    "allocate",
    [
        lambda: torch.empty(3, 2),
        lambda: torch.empty_like(torch.zeros(2)),
        lambda: torch.empty_strided((2, 2), (2, 1)),
        lambda: torch.zeros(2).new_empty(3),
        lambda: torch.zeros(2).new_empty_strided((2,), (1,)),
        lambda: torch.empty(4, dtype=torch.bfloat16),
    ],
)
def test_fresh_memory_is_poisoned(allocate: Callable[[], torch.Tensor]) -> None:
    with poisoned_memory("cpu"):
        assert allocate().isnan().all()
    assert torch.empty.__name__ == "empty"


def test_unrepeatable_backward_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    """G2: by less than any tolerance."""
    calls = []

    def noisy(*arguments):
        calls.append(arguments)
        found = backward(*arguments)
        return found | {"k": found["k"] * (1 + 1e-7 * len(calls))}

    monkeypatch.setattr(reference_backend, "backward", noisy)
    assert _run("gradient/everything[float32]") == {"backend": registry.REFERENCE}
    with pytest.raises(AssertionError, match=r"G2.*dk"):
        _run("gradient/deterministic[float32]")


def test_case_outside_the_table(monkeypatch: pytest.MonkeyPatch) -> None:
    """It counts as declared unsupported if every reason is given, and fails if one is missing."""
    case_id = "cache/gradients[float32]"
    assert _run(case_id)["outcome"] == "declared unsupported"
    monkeypatch.setattr(reference_backend, "unsupported", _one_reason_more())
    with pytest.raises(AssertionError, match="reasons not given"):
        _run(case_id)


def _one_reason_more() -> Callable[..., list[str]]:
    """A table that tells the suite one reason more than it tells the call."""
    told = []

    def unsupported(problem):
        told.append(problem)
        return ["first"] if len(told) > 1 else ["first", "second"]

    return unsupported


def test_silent_fallback_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    """A call outside the table that returns a result."""
    told = []

    def unsupported(problem):
        told.append(problem)
        return ["never"] if len(told) == 1 else []

    monkeypatch.setattr(reference_backend, "unsupported", unsupported)
    with pytest.raises(pytest.fail.Exception, match="DID NOT RAISE"):
        _run("score/batch[float32,3]")


def test_invalid_call_must_name_its_rule(monkeypatch: pytest.MonkeyPatch) -> None:
    case = cases()["error/threshold-without-gates"]
    run_case(registry.REFERENCE, case, "cpu", lambda *_: None)
    for wrong in (
        replace(case, rule="E6"),
        replace(case, reject=replace(case.reject, exception="TypeError")),
    ):
        with pytest.raises(AssertionError):
            run_case(registry.REFERENCE, wrong, "cpu", lambda *_: None)


def test_valid_call_given_as_invalid_fails() -> None:
    case = cases()["error/threshold-without-gates"]
    harmless = replace(case, reject=replace(case.reject, set={"softcap": 1.0}))
    with pytest.raises(pytest.fail.Exception, match="DID NOT RAISE"):
        run_case(registry.REFERENCE, harmless, "cpu", lambda *_: None)


T1_CASES = [
    case
    for case in cases().values()
    if case.rule == "T1" and case.form == "batched" and case.dtype == "float32"
    and case.size == "small"
]  # fmt: skip


DROPPING = "dropping"
"""Name of the backend that `_Dropping` is."""


class _Dropping:
    """The reference as a backend that drops blocks (T1).

    Args:
        keep: which blocks it keeps, from those it may drop.
        says: which blocks it says that it keeps, default the truth.
    """

    def __init__(self, patch: pytest.MonkeyPatch, keep, says=None) -> None:
        self._keep, self._says = keep, says or keep
        patch.setattr(reference_backend, "forward", self.forward)
        patch.setattr(reference_backend, "backward", self.backward)
        known = {name: getattr(registry, name) for name in ("load", "availability")}
        for name, function in known.items():
            patch.setattr(registry, name, lambda x, f=function: f(self._behind(x)))
        dispatch.select.cache_clear()

    @staticmethod
    def _behind(name: str) -> str:
        return registry.REFERENCE if name == DROPPING else name

    def _droppable(self, problem, tensors) -> torch.Tensor:
        keywords = reference_backend._keywords(problem, tensors)
        p, visible = reference.final_probability(tensors.q, tensors.k, **keywords)
        return reference.droppable(p, visible, problem.softmax_threshold, KEPT_BLOCK)

    def _terms(self, problem, tensors):
        blocks = self._keep(self._droppable(problem, tensors))
        kept = reference.expand_kept(blocks, KEPT_BLOCK, problem.seqlen_q, problem.seqlen_k)
        return reference_backend._keywords(problem, tensors) | {"kept": kept}

    def forward(self, problem, tensors):
        qkv = (tensors.q, tensors.k, tensors.v)
        said = self._says(self._droppable(problem, tensors))
        said = torch.nn.functional.pad(said, (0, -said.shape[3] % 32)).unflatten(3, (-1, 32))
        bits = (said.long() << torch.arange(32)).sum(4).to(torch.int32)
        return *reference.attention(*qkv, **self._terms(problem, tensors)), bits

    def backward(self, problem, tensors, o, lse, kept, do, dlse):
        qkv = (tensors.q, tensors.k, tensors.v)
        return reference.attention_backward(do, dlse, *qkv, **self._terms(problem, tensors))


def _run_dropping(case: Case) -> None:
    run_case(DROPPING, case, "cpu", lambda *_: None)


@pytest.mark.parametrize("case", T1_CASES, ids=lambda case: case.id)
def test_t1_passes_what_drops_all_that_it_may(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reference_backend, "unsupported", lambda problem: [])
    _Dropping(monkeypatch, keep=lambda droppable: ~droppable)
    _run_dropping(case)


def test_t1_cases_have_blocks_to_drop_and_blocks_to_keep(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def keep(droppable):
        seen.append(droppable)
        return ~droppable

    _Dropping(monkeypatch, keep=keep)
    _run_dropping(cases()["threshold/sinks[float32,0.5]"])
    assert any(droppable.any() for droppable in seen)
    assert any((~droppable).any() for droppable in seen)


def test_t1_fails_what_drops_too_much(monkeypatch: pytest.MonkeyPatch) -> None:
    def keep(droppable):
        kept = ~droppable
        kept[..., 0, 0] = False
        return kept

    _Dropping(monkeypatch, keep=keep)
    with pytest.raises(AssertionError, match=r"T1: .*lost elements"):
        _run_dropping(cases()["threshold/sinks[float32,0.5]"])


def test_t1_fails_what_drops_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    _Dropping(monkeypatch, keep=torch.ones_like)
    with pytest.raises(AssertionError, match=r"T1: .*droppable pairs kept"):
        _run_dropping(cases()["threshold/sinks[float32,0.5]"])


def test_t1_fails_what_says_otherwise_than_it_does(monkeypatch: pytest.MonkeyPatch) -> None:
    """It replays what was said: a backend that computes with other blocks is out of tolerance."""
    _Dropping(monkeypatch, keep=lambda x: x, says=lambda x: ~x)
    with pytest.raises(pytest.fail.Exception, match="N1"):
        _run_dropping(cases()["threshold/sinks[float32,0.5]"])


def _session(folder: Path, body: str, *options: str) -> subprocess.CompletedProcess[str]:
    """A session of its own with the options and the count of the suite."""
    shutil.copy(TESTS / "conftest.py", folder)
    lines = [
        "import pytest",
        "@pytest.mark.parametrize('n', range(3))",
        "def test_x(n, record_property):",
    ]
    lines += [f"    {line}" for line in ["record_property('backend', 'one')", *body.split("\n")]]
    (folder / "test_x.py").write_text("\n".join(lines), encoding="utf-8")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *options]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)


UNAVAILABLE = "record_property('outcome', 'unavailable')\npytest.skip('no device of its kind')"


@pytest.mark.parametrize(
    ("body", "options", "code", "line"),
    [
        ("assert True", (), 0, "one: 3 passed"),
        ("assert True", ("--backend", "one"), 0, "one: 3 passed"),
        ("assert True", ("--backend", "two"), 1, "was asked for and ran nothing"),
        (
            "assert n",
            (),
            1,
            "one: 2 passed, 0 declared unsupported, 0 unavailable, 0 too large here, 1 failed",
        ),
        (UNAVAILABLE, (), 0, "3 unavailable"),
        (UNAVAILABLE, ("--backend", "one"), 1, "no device of its kind"),
        (
            "record_property('outcome', 'declared unsupported')",
            ("--backend", "one"),
            1,
            "3 declared unsupported",
        ),
    ],
)
def test_sessions_end_in_a_count(
    tmp_path: Path, body: str, options: tuple[str, ...], code: int, line: str
) -> None:
    """A backend that was asked for and ran nothing fails the session."""
    done = _session(tmp_path, body, *options)
    assert (done.returncode, line in done.stdout) == (code, True), done.stdout + done.stderr


def test_unknown_backend_is_a_usage_error() -> None:
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        str(TESTS / "conformance"),
        "--backend",
        "nonesuch",
    ]
    done = subprocess.run(command, cwd=TESTS.parent, capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert "--backend: got ['nonesuch']" in done.stdout + done.stderr


def test_suite_knows_no_backend_by_its_name() -> None:
    names = set(registry.names())
    for path in (TESTS / "conformance").glob("*.py"):
        words = set(path.read_text(encoding="utf-8").replace("`", " ").replace('"', " ").split())
        # "cuda" is a device type too; the suite says it as one alone.
        assert not words & (names - {"cuda"}), path.name
