"""Runs a suite: every contender on every case, checked, then timed in turns."""

from __future__ import annotations

import gc
import re
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from . import check, environment, peers, report, results, timing
from .cases import Case, Suite
from .inputs import Inputs, build, flops
from .results import Row

QUANTITIES = {"forward": ("forward",), "backward": ("backward", "forward+backward")}
"""What each command times. "backward" is the backward alone, through a retained graph."""

REASON_LENGTH = 600


@dataclass(frozen=True)
class Settings:
    """How a suite is run.

    Attributes:
        command: a key of `QUANTITIES`.
        seconds: measuring time of each contender and quantity.
        graph: time replays of CUDA graphs.
        only: regular expression that a case's name must match somewhere.
        contenders: likewise for names of peers.
    """

    command: str
    seconds: float = 1.0
    graph: bool = False
    only: str = ""
    contenders: str = ""

    @property
    def backward(self) -> bool:
        """Whether gradients are computed."""
        return "backward" in QUANTITIES[self.command]


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
        ValueError: no case matches `settings.only`, or no peer `settings.contenders`.
    """
    cases = [case for case in suite.cases if re.search(settings.only, case.name)]
    contenders = [p for p in peers.all_peers() if re.search(settings.contenders, p.name)]
    for what, pattern, found in (
        ("--only", settings.only, cases),
        ("--peers", settings.contenders, contenders),
    ):
        if not found:
            raise ValueError(f"{what}: nothing in suite {suite.name!r} matches {pattern!r}")
    where = results.path(
        out, environment.folder(device), settings.command, suite.name, settings.graph
    )
    result: dict[str, Any] = {
        "schema": results.SCHEMA,
        "command": settings.command,
        "suite": suite.name,
        "about": suite.about,
        "settings": asdict(settings),
        "environment": environment.collect(device, commit),
        "readings_after": {},
        "cases": [],
    }
    print(report.header(result), flush=True)
    done: dict[Case, dict[str, Any]] = {}
    for case in cases:
        key = replace(case, sweep=None)  # two sweeps may cross in one case
        if key not in done:
            done[key] = _run_case(case, contenders, settings, device)
        result["cases"].append(done[key] | {"case": case.asdict()})
        result["readings_after"] = environment.readings(device)
        results.save(result, where)
    print(f"\n{report.table(result)}\n\nwritten to {where}", flush=True)
    return result


def _run_case(
    case: Case, contenders: list[peers.Peer], settings: Settings, device: torch.device
) -> dict[str, Any]:
    rows = [Row(peer.name, peer.ours) for peer in contenders]
    record: dict[str, Any] = {"name": case.name, "case": case.asdict(), "pairs": None, "flops": {}}
    try:
        inputs = build(case, device, requires_grad=settings.backward)
        record |= {"pairs": inputs.pairs, "flops": flops(case, inputs.pairs)}
        print(report.heading(record), flush=True)
        expected = check.expect(case, inputs, settings.backward)
        prepared = {
            row.contender: (row, forward)
            for peer, row in zip(contenders, rows, strict=True)
            if (forward := _admit(peer, row, case, inputs, expected, settings.backward))
        }
        for quantity in QUANTITIES[settings.command]:
            _race(quantity, prepared, case, inputs, record["flops"][quantity], settings)
    except Exception as error:  # no room for the inputs, or a kernel that broke the device
        print(f"{case.name}: {_words(error)}", flush=True)
        for row in rows:
            if row.status == results.OK:
                _blame(row, error, ["nobody can be timed further on this case"])
    record["rows"] = [row.asdict() for row in rows]
    _free()
    return record


def _admit(
    peer: peers.Peer,
    row: Row,
    case: Case,
    inputs: Inputs,
    expected: check.Expected,
    backward: bool,
) -> Callable[[], Tensor] | None:
    """The peer's call, checked; None, and the reason in its row, if it cannot be timed."""
    _free()
    forward = None
    with _reported(row):
        reason = peer.unavailable(case, inputs.q.device)
        if reason is not None:
            row.refuse(results.UNAVAILABLE, reason)
        else:
            forward = _prepare(peer, row, case, inputs, expected, backward)
    print(report.admitted(row), flush=True)
    return forward if row.status == results.OK else None


def _prepare(
    peer: peers.Peer,
    row: Row,
    case: Case,
    inputs: Inputs,
    expected: check.Expected,
    backward: bool,
) -> Callable[[], Tensor]:
    """Prepare a peer and check it; its first call compiles, its second is weighed."""
    device = inputs.q.device
    before = _allocated(device)
    with torch.set_grad_enabled(backward):
        ready = peer.prepare(case, inputs)
    row.setup_ms, row.notes = ready.setup_ms, list(ready.notes)
    if before is not None:
        row.memory_setup = _allocated(device) - before
    start = time.perf_counter()
    got = _results(ready.forward, case, inputs, expected.do, backward)
    timing.synchronize(device)
    row.first_call_ms = 1e3 * (time.perf_counter() - start)
    row.errors = check.errors(expected, got)
    if not torch.isfinite(got["o"]).all():
        row.notes.append("o is not finite in rows that see no key")
    wrong = check.wrong(case, row.errors)
    if wrong is not None:
        row.refuse(results.WRONG, wrong)
    del got
    if before is not None:
        _free()
        base = _allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        _results(ready.forward, case, inputs, expected.do, backward)
        row.memory_call = torch.cuda.max_memory_allocated(device) - base
    return ready.forward


def _race(
    quantity: str,
    prepared: dict[str, tuple[Row, Callable[[], Tensor]]],
    case: Case,
    inputs: Inputs,
    operations: float,
    settings: Settings,
) -> None:
    """Time a quantity of all that are still in the race, in turns."""
    calls = {}
    for name, (row, forward) in prepared.items():
        if row.status == results.OK:
            with _reported(row):
                calls[name] = _call(quantity, forward, case, inputs, settings.graph)
    timings, raised = timing.measure(calls, inputs.q.device, settings.seconds)
    for name, error in raised.items():
        _blame(prepared[name][0], error)
    for name, timed in timings.items():
        rate = operations / timed.median_ms / 1e9
        prepared[name][0].times[quantity] = asdict(timed) | {"tflops": rate}
    for row, _ in prepared.values():
        shown = quantity in row.times
        print(report.timed(row, quantity) if shown else report.refusal(row), flush=True)


def _results(
    forward: Callable[[], Tensor], case: Case, inputs: Inputs, do: Tensor, backward: bool
) -> dict[str, Tensor]:
    """One call: o and, with `backward`, the gradient of each leaf."""
    with torch.set_grad_enabled(backward):
        o = forward()
    if not backward:
        return {"o": o}
    return {"o": o} | dict(zip(case.leaves, _differentiate(o, case, inputs, do), strict=True))


def _call(
    quantity: str, forward: Callable[[], Tensor], case: Case, inputs: Inputs, graph: bool
) -> timing.Call:
    """What is timed for a quantity."""

    def forward_only() -> Tensor:
        with torch.no_grad():
            return forward()

    def both() -> tuple[Tensor, ...]:
        return _differentiate(forward(), case, inputs, inputs.do)

    if quantity == "backward":
        # A captured backward runs where its forward ran.
        with timing.side_stream() if graph else nullcontext():
            o = forward()

        def call() -> tuple[Tensor, ...]:
            return _differentiate(o, case, inputs, inputs.do)
    else:
        call = forward_only if quantity == "forward" else both
    return timing.captured(call) if graph else call


def _differentiate(o: Tensor, case: Case, inputs: Inputs, do: Tensor) -> tuple[Tensor, ...]:
    """Gradients of the leaves; the graph stays, for the next repetition."""
    return torch.autograd.grad(o, inputs.leaves(case.leaves), do, retain_graph=True)


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
