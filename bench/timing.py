"""Timing: interleaved repetitions, cold L2, CUDA events, medians.

The contenders take turns, so drift of clocks and temperature meets all alike. Before each
repetition a buffer larger than the L2 is overwritten; the time that takes also lets the host queue
the call, so that a call's launch shows only where it is longer than that. For tiny calls `captured`
takes the host out altogether.
"""

from __future__ import annotations

import functools
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

Call = Callable[[], object]

WARM_UP = 3
FEWEST, MOST = 5, 200
FLUSH_FACTOR = 8
"""Size of the flushed buffer in L2 sizes."""


@dataclass(frozen=True)
class Timing:
    """Milliseconds of one call: median and quartiles over its repetitions."""

    median_ms: float
    q1_ms: float
    q3_ms: float
    repetitions: int


def summarise(samples: list[float]) -> Timing:
    """Median and quartiles of samples in milliseconds.

    Raises:
        ValueError: there is no sample.
    """
    if not samples:
        raise ValueError("samples: got none, expected at least one")
    if len(samples) == 1:
        return Timing(samples[0], samples[0], samples[0], 1)
    q1, median, q3 = statistics.quantiles(samples, n=4, method="inclusive")
    return Timing(median, q1, q3, len(samples))


def synchronize(device: torch.device) -> None:
    """Wait for the device, if it is one that runs ahead of the host."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def captured(call: Call) -> Call:
    """The call as a CUDA graph; calling it replays.

    Warm-up and capture run on one side stream. A backward runs on the stream of its forward, so
    `call` builds its own autograd graph or holds one that was built under `side_stream`.

    Raises:
        RuntimeError: the call does what a graph cannot hold, waiting for the device say.
    """
    with side_stream():
        for _ in range(WARM_UP):
            call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph, stream=_side()):
            held = call()
    except RuntimeError as error:
        raise RuntimeError(f"not captured as a CUDA graph: {error}") from error

    def replay() -> object:
        graph.replay()
        return alive[1]

    # What the graph reads and writes at every replay must stay allocated: what the call holds, an
    # autograd graph with its saved tensors say, and what it returned.
    alive = call, held
    return replay


def side_stream() -> torch.cuda.StreamContext:
    """Run on the stream that `captured` captures on."""
    _side().wait_stream(torch.cuda.current_stream())
    return torch.cuda.stream(_side())


class Stopwatch:
    """Times calls on one device; times are known after `read`."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._pending: list[tuple[str, torch.cuda.Event, torch.cuda.Event]] = []
        self._done: list[tuple[str, float]] = []
        self._buffer = None
        if device.type == "cuda":
            size = FLUSH_FACTOR * torch.cuda.get_device_properties(device).L2_cache_size
            self._buffer = torch.empty(size, dtype=torch.uint8, device=device)

    def time(self, name: str, call: Call) -> None:
        """Run `call` once, from a cold L2, and remember its time under `name`."""
        if self._buffer is None:
            start = time.perf_counter()
            call()
            self._done.append((name, 1e3 * (time.perf_counter() - start)))
            return
        self._buffer.zero_()
        start_event, end_event = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start_event.record()
        call()
        end_event.record()
        self._pending.append((name, start_event, end_event))

    def read(self) -> list[tuple[str, float]]:
        """Wait for the device; `(name, milliseconds)` of the calls since the last `read`."""
        synchronize(self.device)
        done = self._done + [(name, start.elapsed_time(end)) for name, start, end in self._pending]
        self._pending, self._done = [], []
        return done


def measure(
    calls: dict[str, Call], device: torch.device, seconds: float
) -> tuple[dict[str, Timing], dict[str, Exception]]:
    """Time calls in turns, each for about `seconds`, `FEWEST` to `MOST` times.

    Args:
        calls: name -> call.
        device: where they run.
        seconds: measuring time of each call.

    Returns:
        Timings by name, and what a call raised by the name of the call that raised it.
    """
    watch = Stopwatch(device)
    samples: dict[str, list[float]] = {}
    raised: dict[str, Exception] = {}
    target: dict[str, int] = {}

    def attempt(name: str) -> None:
        try:
            watch.time(name, calls[name])
        except Exception as error:  # one contender's failure is its own row
            raised[name] = error

    for name in calls:
        once = 0.0
        for _ in range(WARM_UP):
            if name not in raised and once < 1e3 * seconds:
                attempt(name)
                once = max((milliseconds for _, milliseconds in watch.read()), default=once)
        if name in raised:
            continue
        target[name] = max(FEWEST, min(MOST, int(1e3 * seconds / max(once, 1e-3))))
        samples[name] = []
    for turn in range(max(target.values(), default=0)):
        for name, turns in target.items():
            if turn < turns and name not in raised:
                attempt(name)
        for name, milliseconds in watch.read():
            samples[name].append(milliseconds)
    timings = {name: summarise(got) for name, got in samples.items() if name not in raised}
    return timings, raised


@functools.cache
def _side() -> torch.cuda.Stream:
    return torch.cuda.Stream()
