"""`python -m examples.recall`: train dense, sliding-window and dynamic-mask attention alike."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from bench import environment
from bench.results import save

from . import plot
from .model import DENSE, DYNAMIC, KINDS, SLIDING, Decoder, ModelConfig
from .task import Recall
from .training import Report, Settings, autocast, train

FOLDER = Path(__file__).with_name("results")

POINTS = 0.02
"""How much of the dense model's accuracy may be lost."""

PRESETS = {
    "small": Settings(
        task=Recall(seqlen=128, pairs=4, queries=32, num_keys=32, num_values=32, num_fillers=32),
        model=ModelConfig(
            hidden_size=64, num_layers=2, num_heads=1, num_kv_heads=1, window_size=16
        ),
        curriculum=(8, 4, 2),
        steps=160,
        batch_size=32,
        learning_rate=5e-3,
        selection_rate=1.0,
        warmup=10,
        eval_sequences=256,
        evaluations=8,
        bfloat16=False,
    ),
    "full": Settings(
        task=Recall(
            seqlen=2048, pairs=32, queries=512, num_keys=256, num_values=256, num_fillers=256
        ),
        model=ModelConfig(
            hidden_size=256, num_layers=2, num_heads=4, num_kv_heads=2, window_size=128
        ),
        curriculum=(16, 8, 4, 2),
        steps=1600,
        batch_size=16,
        learning_rate=1e-3,
        selection_rate=10.0,
        warmup=100,
        eval_sequences=256,
        evaluations=40,
        bfloat16=True,
    ),
}
"""Settings by name: "small" for a CPU, "full" for a GPU. Sequences start as long as the window."""


def run(
    settings: Settings,
    device: torch.device,
    backend: str | None,
    report: Report,
    commit: str | None = None,
) -> tuple[dict[str, Any], dict[str, Decoder]]:
    """Train every kind of model.

    Args:
        settings: of the run.
        device: where.
        backend: as in `flash_sparse_attn_func`.
        report: is given lines about the progress.
        commit: of a tree without its history.

    Returns:
        The result as plain data, {"settings", "backend", "environment", "runs": {kind: record}},
        and the trained models by kind.
    """
    result = {
        "settings": asdict(settings),
        "backend": backend,
        "environment": environment.collect(device, commit),
        "runs": {},
    }
    models = {}
    torch.set_flush_denormal(True)  # or sharp softmaxes make a CPU many times slower
    try:
        for kind in KINDS:
            models[kind], result["runs"][kind] = train(settings, kind, device, backend, report)
    finally:
        torch.set_flush_denormal(False)
    return result, models


def shown(result: dict[str, Any]) -> bool:
    """Whether the dynamic mask keeps the dense model's accuracy where the window does not."""
    final = {kind: record["final_accuracy"] for kind, record in result["runs"].items()}
    least = final[DENSE] - POINTS
    return final[DYNAMIC] >= least > final[SLIDING]


def long_sequence(settings: Settings, seqlen: int, device: torch.device) -> torch.Tensor:
    """Sequences of the task laid end to end, `[1, seqlen]`; none that a model was trained on.

    Raises:
        ValueError: `seqlen` is not a multiple of the task's.
    """
    if seqlen < 1 or seqlen % settings.task.seqlen:
        expected = f"a multiple of {settings.task.seqlen}"
        raise ValueError(f"--scores-seqlen: got {seqlen}, expected {expected}")
    generator = torch.Generator(device).manual_seed(settings.seed + 1_000_000)
    return settings.task.batch(seqlen // settings.task.seqlen, generator).tokens.view(1, seqlen)


def main(argv: Sequence[str] | None = None) -> int:
    """Train, compare, write. Returns 0, or 1 if the comparison does not come out as claimed."""
    arguments = _parser().parse_args(argv)
    device = torch.device(arguments.device)
    settings = replace(PRESETS[arguments.preset], seed=arguments.seed)
    result, models = run(settings, device, arguments.backend, _print, arguments.commit)

    target = arguments.out / environment.folder(device) / f"{arguments.preset}.json"
    save(result, target)
    print(f"wrote {target}")
    try:
        plot.draw(result, target.with_suffix(".png"))
        print(f"wrote {target.with_suffix('.png')}")
    except ModuleNotFoundError as error:
        print(f'no picture: {error}; pip install -e ".[bench]"')
    if arguments.scores is not None:
        tokens = long_sequence(settings, arguments.scores_seqlen, device)
        with autocast(settings, device):
            scores = models[DYNAMIC].selection_scores(tokens)[:, 0]
        torch.save(scores.cpu(), arguments.scores)
        print(f"wrote {arguments.scores}, float32 {list(scores.shape)}")

    verdict = shown(result)
    print(
        f"dynamic-mask within {100 * POINTS:.0f} points of dense, sliding-window not: "
        f"{'yes' if verdict else 'no'}"
    )
    return 0 if verdict else 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m examples.recall", description=__doc__)
    cuda = torch.cuda.is_available()
    parser.add_argument("--preset", choices=tuple(PRESETS), default="full" if cuda else "small")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if cuda else "cpu")
    parser.add_argument("--backend", help="of the attention; default: the first that serves it")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=FOLDER, metavar="DIR")
    parser.add_argument(
        "--scores",
        type=Path,
        metavar="FILE",
        help="also save the scores by which the trained dynamic-mask model chooses on a long "
        "sequence, float32 [layers, Hkv, S], with torch.save",
    )
    parser.add_argument("--scores-seqlen", type=int, default=32768, metavar="S")
    parser.add_argument("--commit", help="of a tree without its history")
    return parser


def _print(line: str, last: bool) -> None:
    """Print a line of progress; a terminal shows the latest of each run."""
    over = sys.stdout.isatty()
    print(f"\r{line}" if over else line, end="" if over and not last else "\n", flush=True)


if __name__ == "__main__":
    sys.exit(main())
