"""The curves of a results file as a picture."""

from __future__ import annotations

from pathlib import Path
from typing import Any

SMOOTHING = 0.02
"""Share of the steps over which the drawn loss is a running mean."""


def draw(result: dict[str, Any], target: Path) -> None:
    """Write a PNG: loss, and accuracy on held-out sequences, over the updates.

    Raises:
        ModuleNotFoundError: matplotlib is not installed.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    for kind, run in result["runs"].items():
        left.plot(*_running_mean(run["loss"]), label=kind)
        done, accuracy = zip(*run["accuracy"], strict=True)
        right.plot(done, accuracy, marker="o", markersize=3, label=kind)
    settings, environment = result["settings"], result["environment"]
    left.set_ylabel("loss, nats")
    left.set_yscale("log")
    right.set_ylabel(f"accuracy at S {settings['task']['seqlen']}")
    right.set_ylim(-0.03, 1.03)
    for axes in (left, right):
        axes.set_xlabel("updates")
        axes.grid(True, alpha=0.2)
        axes.legend()
    figure.suptitle(f"{title(settings)}\n{environment['device']}", fontsize="small")
    figure.savefig(target, dpi=150)


def title(settings: dict[str, Any]) -> str:
    """One line on what was learned by what."""
    task, model = settings["task"], settings["model"]
    return (
        f"associative recall: S {task['seqlen']}, {task['pairs']} pairs, w {model['window_size']}; "
        f"{model['num_layers']} layers of width {model['hidden_size']}, "
        f"heads {model['num_heads']}/{model['num_kv_heads']}; seed {settings['seed']}"
    )


def _running_mean(losses: list[float]) -> tuple[list[int], list[float]]:
    span = max(1, round(SMOOTHING * len(losses)))
    ends = range(span, len(losses) + 1)
    return list(ends), [sum(losses[end - span : end]) / span for end in ends]
