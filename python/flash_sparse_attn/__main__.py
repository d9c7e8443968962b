"""`python -m flash_sparse_attn COMMAND`: what works here, and a demonstration."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from importlib import import_module

COMMANDS = {
    "info": "versions, devices, and for each backend whether it works here or every reason why not",
    "demo": "dynamic-mask attention, forward and backward, checked against the reference",
}
"""Command -> what it does. Each is a module of this package with `main(argv) -> int`."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command with the arguments that follow its name; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m flash_sparse_attn",
        description="Trainable sparse attention.",
        epilog="COMMAND --help tells a command's own options.",
    )
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name, text in COMMANDS.items():
        # A command parses its own options, --help among them.
        commands.add_parser(name, help=text, add_help=False)
    chosen, rest = parser.parse_known_args(argv)
    return import_module(f"{__package__}.{chosen.command}").main(rest)


if __name__ == "__main__":
    sys.exit(main())
