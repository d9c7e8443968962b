"""Runs a suite: every contender on every case, checked, then timed in turns.

Kernels are profiled after everything has been timed, since a profiler may stay attached.
"""

from __future__ import annotations

import gc
import re
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from flash_sparse_attn import IntervalMask

from . import calls, check, environment, features, kernels, peers, report, results, timing
from .calls import QUANTITIES
from .cases import Case, Suite
from .features.question import FeatureCase, Question
from .inputs import Inputs, build, flops
from .peers import Peer, Prepared
from .results import Row
from .scores import Scores

REASON_LENGTH = 600

AnyCase = Case | FeatureCase
AnyInputs = Inputs | Question


@dataclass(frozen=True)
class Settings:
    """How a suite is run.

    Attributes:
        command: a key of `QUANTITIES`.
        seconds: measuring time of each contender and quantity.
        graph: time replays of CUDA graphs.
        only: regular expression that a case's name must match somewhere.
        contenders: likewise for names of peers.
        scores: the file that key scores come from; None = normal ones.
    """

    command: str
    seconds: float = 1.0
    graph: bool = False
    only: str = ""
    contenders: str = ""
    scores: Scores | None = None

    @property
    def backward(self) -> bool:
        """Whether gradients are computed."""
        return "backward" in QUANTITIES[self.command]

    def asdict(self) -> dict[str, Any]:
        """As a result holds them."""
        fields = asdict(replace(self, scores=None))
        return fields | {"scores": self.scores and self.scores.asdict()}


def run(
    suite: Suite,
    settings: Settings,
    device: torch.device,
    out: Path,
    commit: str | None = None,
) -> dict[str, Any]:
    """Run a suite, print what is known when it is, write the result after each case.

    Returns:
        The result, as `results` describes it.

    Raises:
        ValueError: no case matches `settings.only`, or no peer `settings.contenders`; or scores are
            given and no case can take them.
    """
    cases, contenders = _selected(suite, settings)
    words = [settings.command, suite.name]
    words += ["graph"] if settings.graph else []
    words += ["scores"] if settings.scores else []
    where = results.path(out, environment.folder(device), *words)
    result: dict[str, Any] = {
        "schema": results.SCHEMA,
        "command": settings.command,
        "suite": suite.name,
        "about": suite.about,
        "settings": settings.asdict(),
        "environment": environment.collect(device, commit),
        "readings_after": {},
        "cases": [],
    }
    print(report.header(result), flush=True)
    done: dict[AnyCase, dict[str, Any]] = {}
    for case in cases:
        key = replace(case, sweep=None)  # two sweeps may cross in one case
        if key not in done:
            done[key] = _run_case(case, contenders, suite, settings, device)
        result["cases"].append(done[key] | {"case": case.asdict()})
        result["readings_after"] = environment.readings(device)
        results.save(result, where)
    if settings.command in calls.PROFILED and device.type == "cuda":
        for key, record in done.items():
            _profile(key, record["rows"], contenders, settings, device)
            results.save(result, where)
    print(f"\n{report.table(result)}\n\nwritten to {where}", flush=True)
    return result


def _selected(suite: Suite, settings: Settings) -> tuple[list[AnyCase], list[Peer]]:
    """The cases and the contenders that take part."""
    cases = [case for case in suite.cases if re.search(settings.only, case.name)]
    feature = features.of(settings.command)
    entered = feature.peers() if feature else peers.all_peers()
    if "selection" in QUANTITIES[settings.command]:
        entered += peers.selectors()
    contenders = [peer for peer in entered if re.search(settings.contenders, peer.name)]
    for what, pattern, found in (
        ("--only", settings.only, cases),
        ("--peers", settings.contenders, contenders),
    ):
        if not found:
            raise ValueError(f"{what}: nothing in suite {suite.name!r} matches {pattern!r}")
    if settings.scores is not None:
        long = [case.name for case in cases if not settings.scores.serve(case)]
        cases = [case for case in cases if settings.scores.serve(case)]
        if not any(case.per_head for case in cases):
            shape = settings.scores.shape
            raise ValueError(f"--scores: no case takes any, or shape {shape} is too short for all")
        if long:
            print(f"left out, longer than the scores: {', '.join(long)}", flush=True)
    return cases, contenders


@dataclass(frozen=True, eq=False)
class _Problem:
    """A case with its tensors, what the reference says of them, and how it is run."""

    case: AnyCase
    inputs: AnyInputs
    expected: check.Expected
    settings: Settings

    @property
    def device(self) -> torch.device:
        return self.inputs.q.device

    def answered(self, ready: Prepared) -> _Problem:
        """The problem that a contender answers, if it is another."""
        if ready.answers is None:
            return self
        return _pose(*ready.answers, self.settings)

    def results(self, forward: Callable[[], Tensor]) -> dict[str, Tensor]:
        do, backward = self.expected.do, self.settings.backward
        return calls.results(forward, self.case, self.inputs, do, backward)


def _pose(case: AnyCase, inputs: AnyInputs, settings: Settings) -> _Problem:
    return _Problem(case, inputs, check.expect(case, inputs, settings.backward), settings)


def _run_case(
    case: AnyCase, contenders: list[Peer], suite: Suite, settings: Settings, device: torch.device
) -> dict[str, Any]:
    rows = [
        Row(peer.name, peer.ours, question=getattr(peer, "question", "")) for peer in contenders
    ]
    record: dict[str, Any] = {
        "name": case.name,
        "case": case.asdict(),
        "asked": suite.asked_of(case),
        "pairs": None,
        "flops": {},
        "memory": {},
    }
    try:
        inputs = _build(case, settings, device)
        of_results = inputs.nbytes_of_results(case.leaves if settings.backward else ())
        record |= {
            "pairs": inputs.pairs,
            "flops": flops(case, inputs.pairs),
            "memory": {"inputs": inputs.nbytes, "results": of_results},
        }
        print(report.heading(record), flush=True)
        problem = _pose(case, inputs, settings)
        prepared = {
            row.contender: (row, ready)
            for peer, row in zip(contenders, rows, strict=True)
            if (ready := _admit(peer, row, problem, suite))
        }
        for quantity in QUANTITIES[settings.command]:
            _race(quantity, prepared, problem)
    except Exception as error:  # no room for the inputs, or a kernel that broke the device
        print(f"{case.name}: {_words(error)}", flush=True)
        for row in rows:
            if row.status == results.OK:
                _blame(row, error, ["nobody can be timed further on this case"])
    record["rows"] = [row.asdict() for row in rows]
    _free()
    return record


def _build(case: AnyCase, settings: Settings, device: torch.device) -> AnyInputs:
    feature = features.of(settings.command)
    if feature:
        return feature.build(case, device, settings.backward)
    scores = settings.scores and settings.scores.of(case)
    return build(case, device, requires_grad=settings.backward, scores=scores)


def _admit(peer: Peer, row: Row, problem: _Problem, suite: Suite) -> Prepared | None:
    """The peer's calls, checked; None, and the reason in its row, if it cannot be timed."""
    ready = None
    with _reported(row):
        reason = suite.left_out(peer.name, problem.case)
        reason = reason or peer.unavailable(problem.case, problem.device)
        if reason is not None:
            row.refuse(results.UNAVAILABLE, reason)
        else:
            ready = _prepare(peer, row, problem)
    print(report.admitted(row), flush=True)
    return ready if row.status == results.OK else None


def _prepare(peer: Peer, row: Row, problem: _Problem) -> Prepared:
    """Prepare a peer and check it; its first call compiles, its second is weighed."""
    device = problem.device
    _free()
    before = _allocated(device)
    with torch.set_grad_enabled(problem.settings.backward):
        ready = peer.prepare(problem.case, problem.inputs)
    row.setup_ms, row.notes = ready.setup_ms, list(ready.notes)
    row.errors, row.figures = dict(ready.errors), dict(ready.figures)
    if before is not None:
        row.memory_setup = _allocated(device) - before
    checked = ready.forward is not None and ready.checked
    problem = problem.answered(ready)
    start = time.perf_counter()
    got = problem.results(ready.forward) if checked else {}
    chosen = ready.selection() if ready.selection else None
    timing.synchronize(device)
    row.first_call_ms = 1e3 * (time.perf_counter() - start)
    if got:
        row.errors |= check.errors(problem.expected, got)
        if not torch.isfinite(got["o"]).all():
            row.notes.append("o is not finite in rows that see no key")
    if isinstance(chosen, IntervalMask):
        row.errors["selection"] = check.selection_error(problem.expected, chosen)
    wrong = check.wrong(problem.case, row.errors)
    if wrong is not None:
        row.refuse(results.WRONG, wrong)
    del got, chosen
    if before is not None and checked:
        _free()
        base = _allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        problem.results(ready.forward)
        row.memory_call = torch.cuda.max_memory_allocated(device) - base
    return ready


def _race(
    quantity: str,
    prepared: dict[str, tuple[Row, Prepared]],
    problem: _Problem,
) -> None:
    """Time a quantity of all that offer it and are still in the race, in turns."""
    entered = {name: entry for name, entry in prepared.items() if entry[1].offers(quantity)}
    started = {}
    for name, (row, ready) in entered.items():
        if row.status == results.OK:
            with _reported(row):
                case, inputs = ready.answers or (problem.case, problem.inputs)
                started[name] = calls.of(quantity, ready, case, inputs, problem.settings.graph)
    timings, raised = timing.measure(started, problem.device, problem.settings.seconds)
    for name, error in raised.items():
        _blame(entered[name][0], error)
    for name, timed in timings.items():
        row, ready = entered[name]
        rates = _rates(quantity, ready, problem, timed.median_ms)
        row.times[quantity] = asdict(timed) | rates
    if problem.settings.graph and features.of(problem.settings.command):
        _time_host(quantity, entered, problem)
    for row, _ in entered.values():
        shown = quantity in row.times
        print(report.timed(row, quantity) if shown else report.refusal(row), flush=True)


def _time_host(quantity: str, entered: dict[str, tuple[Row, Prepared]], problem: _Problem) -> None:
    """Our calls without a graph, baselines apart: a figure that shows what the host costs."""
    device, seconds = problem.device, problem.settings.seconds
    for name, (row, ready) in entered.items():
        if row.ours and not row.question and quantity in row.times:
            case, inputs = ready.answers or (problem.case, problem.inputs)
            call = calls.of(quantity, ready, case, inputs, graph=False)
            timings, raised = timing.measure({name: call}, device, seconds)
            if raised:
                _blame(row, raised[name])
            else:
                row.figures[f"{quantity} without a graph (ms)"] = timings[name].median_ms


def _rates(
    quantity: str, ready: Prepared, problem: _Problem, median_ms: float
) -> dict[str, float | None]:
    """TFLOP/s on the visible pairs of what a contender answers; TB/s where reading is the bound."""
    case, inputs = ready.answers or (problem.case, problem.inputs)
    operations = flops(case, inputs.pairs).get(quantity) if ready.checked else None
    rates = {"tflops": operations and operations / median_ms / 1e9}
    if inputs.traffic is not None:
        rates["tb_s"] = inputs.traffic / median_ms / 1e9
    return rates


def _profile(
    case: AnyCase,
    rows: list[dict[str, Any]],
    contenders: list[Peer],
    settings: Settings,
    device: torch.device,
) -> None:
    """Add the kernels of our contenders to their rows; if that fails, the rows say so."""
    ours = {row["contender"]: row for row in rows if row["ours"] and row["times"]}
    if not ours:
        return
    print(f"\nkernels: {case.name}", flush=True)
    try:
        inputs = _build(case, settings, device)
        for peer in contenders:
            if peer.name in ours:
                row = ours[peer.name]
                ready = peer.prepare(case, inputs)
                for quantity in calls.PROFILED[settings.command]:
                    if quantity in row["times"]:
                        call = calls.of(quantity, ready, case, inputs, graph=False)
                        row["kernels"][quantity] = kernels.profile(call, device)
                        print(report.profiled(row, quantity), flush=True)
    except Exception as error:
        print(f"  not profiled: {_words(error)}", flush=True)
        for row in ours.values():
            row["notes"].append(f"not every quantity was profiled: {_words(error)}")
        traceback.clear_frames(error.__traceback__)
    _free()


@contextmanager
def _reported(row: Row) -> Iterator[None]:
    """Turn what is raised inside into the row's reason, with the warnings that came before it."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            yield
        except Exception as error:
            _blame(row, error, _warned(caught))
        else:
            row.notes += _warned(caught)


def _blame(row: Row, error: Exception, hints: list[str] | None = None) -> None:
    status = results.UNSUPPORTED if isinstance(error, NotImplementedError) else results.FAILED
    row.refuse(status, "; ".join([_words(error), *(hints or [])])[:REASON_LENGTH])
    # The frames hold the contender's tensors.
    traceback.clear_frames(error.__traceback__)


def _warned(caught: list[warnings.WarningMessage]) -> list[str]:
    """First lines of warnings, each once."""
    lines = (f"{w.category.__name__}: {w.message}".split("\n")[0][:REASON_LENGTH] for w in caught)
    return list(dict.fromkeys(lines))


def _words(error: Exception) -> str:
    """An exception in one line."""
    lines = [line.strip() for line in str(error).split("\n") if line.strip()]
    return f"{type(error).__name__}: {' '.join(lines)}"[:REASON_LENGTH]


def _allocated(device: torch.device) -> int | None:
    if device.type != "cuda":
        return None
    timing.synchronize(device)
    return torch.cuda.memory_allocated(device)


def _free() -> None:
    """Give what the last contender left behind back to the GPU."""
    if torch.cuda.is_available():
        gc.collect()
        torch.cuda.empty_cache()
