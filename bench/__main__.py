"""`python -m bench COMMAND`, from the root of the repository."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from . import calls, cases, results


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command. Returns the exit status, also for a bad argument."""
    arguments = _parser().parse_args(argv)
    try:
        return arguments.action(arguments)
    except ValueError as error:
        print(f"bench {arguments.command}: {error}", file=sys.stderr)
        return 2


def _run(arguments: argparse.Namespace) -> int:
    """Run a suite; 1 if a backend of ours failed or was wrong, whatever the peers did."""
    from . import runner, scores

    device = torch.device(arguments.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device: got 'cuda', but torch sees no CUDA device")
    if arguments.graph and device.type != "cuda":
        raise ValueError("--graph: CUDA graphs need --device cuda")
    suite = cases.load(arguments.suite, arguments.command)
    graph = suite.graph and device.type == "cuda" if arguments.graph is None else arguments.graph
    settings = runner.Settings(
        command=arguments.command,
        seconds=suite.seconds if arguments.seconds is None else arguments.seconds,
        graph=graph,
        only=arguments.only,
        contenders=arguments.peers,
        scores=scores.load(arguments.scores) if arguments.scores else None,
    )
    result = runner.run(suite, settings, device, arguments.out, arguments.commit)
    bad = (results.WRONG, results.FAILED)
    rows = [row for record in result["cases"] for row in record["rows"]]
    return int(any(row["ours"] and row["status"] in bad for row in rows))


def _report(arguments: argparse.Namespace) -> int:
    """Refresh the tables of Markdown files, or print those of results."""
    from . import report

    stale = 0
    for file in arguments.files:
        if file.suffix != ".md":
            print(report.table(results.load(file)), end="\n\n")
            continue
        old = file.read_text(encoding="utf-8")
        new = report.refresh(old, arguments.results)
        if new != old and arguments.check:
            print(f"{file}: tables differ from the results")
            stale = 1
        elif new != old:
            file.write_text(new, encoding="utf-8")
    return stale


def _plot(arguments: argparse.Namespace) -> int:
    """Draw each result beside itself, or into `--to`; prints the files."""
    from . import plot

    for file in arguments.files:
        folder = arguments.to or file.parent
        folder.mkdir(parents=True, exist_ok=True)
        target = folder / f"{file.stem}.png"
        for written in plot.draw(results.load(file), target):
            print(written)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    for name, suite in cases.DEFAULT_SUITES.items():
        command = commands.add_parser(name, help=f"time {', '.join(calls.QUANTITIES[name])}")
        command.set_defaults(action=_run)
        command.add_argument("--suite", default=suite, choices=cases.names(name))
        command.add_argument("--only", default="", metavar="REGEX", help="cases whose name matches")
        command.add_argument("--peers", default="", metavar="REGEX", help="contenders that match")
        command.add_argument("--out", type=Path, default=results.FOLDER, metavar="DIR")
        command.add_argument(
            "--seconds", type=float, help="for each contender and quantity; default: the suite's"
        )
        command.add_argument(
            "--graph",
            action=argparse.BooleanOptionalAction,
            help="time CUDA-graph replays; default: the suite's",
        )
        command.set_defaults(scores=None)
        if "selection" in calls.QUANTITIES[name]:
            command.add_argument(
                "--scores", type=Path, metavar="FILE", help="key scores, of a model say (.npy, .pt)"
            )
        command.add_argument("--commit", help="of a tree without its history")
        default = "cuda" if torch.cuda.is_available() else "cpu"
        command.add_argument("--device", default=default, choices=("cpu", "cuda"))
    report = commands.add_parser("report", help="tables of results, into Markdown or printed")
    report.set_defaults(action=_report)
    report.add_argument("files", nargs="+", type=Path, metavar="README.md|RESULT.json")
    report.add_argument("--results", type=Path, default=results.FOLDER, metavar="DIR")
    report.add_argument("--check", action="store_true", help="fail if a table is stale; write none")
    plot = commands.add_parser("plot", help="a PNG of each result")
    plot.set_defaults(action=_plot)
    plot.add_argument("files", nargs="+", type=Path, metavar="RESULT.json")
    plot.add_argument("--to", type=Path, metavar="DIR", help="default: beside the result")
    return parser


if __name__ == "__main__":
    sys.exit(main())
