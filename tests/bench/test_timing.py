"""Medians, quartiles, budgets, a failing call that stops nobody else, and what replays keep."""

import gc
import time
import weakref
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch

from bench import timing

CPU = torch.device("cpu")


def test_summary():
    assert timing.summarise([5.0, 1.0, 3.0, 2.0, 4.0]) == timing.Timing(3.0, 2.0, 4.0, 5)
    assert timing.summarise([2.0]) == timing.Timing(2.0, 2.0, 2.0, 1)
    with pytest.raises(ValueError, match="got none"):
        timing.summarise([])


def test_a_failing_call_stops_nobody_else():
    def late():
        late.calls += 1
        if late.calls > timing.WARM_UP + 1:
            raise RuntimeError("too late")

    late.calls = 0
    calls = {"zero": lambda: 1 / 0, "late": late, "good": lambda: None}
    timings, raised = timing.measure(calls, CPU, seconds=0.01)
    assert set(timings) == {"good"}
    assert isinstance(raised["zero"], ZeroDivisionError)
    assert isinstance(raised["late"], RuntimeError)


def test_calls_take_turns_within_their_budget():
    order = []

    def call(name, seconds):
        order.append(name)
        time.sleep(seconds)

    calls = {"slow": lambda: call("slow", 0.01), "fast": lambda: call("fast", 0.001)}
    timings, _ = timing.measure(calls, CPU, seconds=0.08)
    assert timings["slow"].median_ms >= 10
    assert timing.FEWEST <= timings["slow"].repetitions <= 8
    assert timings["slow"].repetitions < timings["fast"].repetitions <= timing.MOST
    assert order[2 * timing.WARM_UP :][:4] == ["slow", "fast", "slow", "fast"]


def test_a_call_above_its_budget_is_warmed_up_once():
    calls = []
    timings, _ = timing.measure(
        {"slow": lambda: calls.append(time.sleep(0.02))}, CPU, seconds=0.001
    )
    assert timings["slow"].repetitions == timing.FEWEST
    assert len(calls) == timing.FEWEST + 1


def test_a_replay_keeps_what_its_call_holds(monkeypatch):
    """A captured backward reads the tensors that its forward saved, which the call alone holds."""

    class Saved:
        """Stands for them."""

    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: SimpleNamespace(replay=lambda: None))
    monkeypatch.setattr(torch.cuda, "graph", lambda graph, stream: nullcontext())
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(timing, "side_stream", nullcontext)
    monkeypatch.setattr(timing, "_side", lambda: None)

    def captured() -> tuple[timing.Call, weakref.ref]:
        saved = Saved()
        return timing.captured(lambda: str(saved)), weakref.ref(saved)

    replay, saved = captured()
    gc.collect()
    assert saved() is not None
    del replay
    gc.collect()
    assert saved() is None
