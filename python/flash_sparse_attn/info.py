"""`python -m flash_sparse_attn info [--json]`: what works here, and why the rest does not."""

from __future__ import annotations

import argparse
import json
import platform
import shutil
import subprocess
from collections.abc import Sequence
from importlib import metadata
from typing import Any

import torch

from . import registry

DISTRIBUTIONS = ("flash-sparse-attn", "torch", "triton", "nvidia-cutlass-dsl")
"""Distributions whose versions are told."""


def collect() -> dict[str, Any]:
    """Everything that `info` tells, as plain data (dicts, lists, strings, numbers, None)."""
    return {
        "versions": versions(),
        "devices": devices(),
        "backends": backends(),
        "available_backends": registry.get_available_backends(),
    }


def versions() -> dict[str, str | None]:
    """Version of Python and of each of `DISTRIBUTIONS`, of torch's CUDA and of the GPU driver.

    None stands for what is not there.
    """
    found: dict[str, str | None] = {"python": platform.python_version()}
    for name in DISTRIBUTIONS:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = None
    return found | {"cuda (torch)": torch.version.cuda, "nvidia driver": _driver_version()}


def devices() -> list[dict[str, Any]]:
    """The CUDA devices that torch sees: name, compute capability ("9.0"), memory in bytes."""
    found = []
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        found.append(
            {
                "device": f"cuda:{index}",
                "name": properties.name,
                "capability": f"{properties.major}.{properties.minor}",
                "memory": properties.total_memory,
            }
        )
    return found


def backends() -> dict[str, dict[str, Any]]:
    """Each backend in order of preference, the reference last.

    `reasons`: why it cannot be used here, empty if it can; `build_option`: its CMake option and
    setting, None for the reference; `info`: what it tells of itself, None if not in this build.
    """
    found: dict[str, dict[str, Any]] = {}
    options = registry.build_options()
    for name in (*options, registry.REFERENCE):
        option = options.get(name)
        found[name] = {
            "reasons": registry.availability(name),
            "build_option": option and {registry.option_name(name): option.setting},
            "info": None if option and option.left_out else registry.load(name).info(),
        }
    return found


def render(found: dict[str, Any]) -> str:
    """The text form of `collect`'s answer."""
    lines = ["versions"]
    for name, version in found["versions"].items():
        lines.append(f"  {name:<22}{version or 'none'}")
    lines.append("devices")
    for device in found["devices"]:
        memory = f"{device['memory'] / 2**30:.1f} GiB"
        lines.append(
            f"  {device['device']:<22}{device['name']}, capability {device['capability']}, {memory}"
        )
    if not found["devices"]:
        lines.append(f"  {'cpu':<22}no CUDA device")
    lines.append("backends, in order of preference")
    for name, backend in found["backends"].items():
        lines.append(f"  {name:<22}{'no' if backend['reasons'] else 'available'}")
        lines += [f"    {'because':<20}{reason}" for reason in backend["reasons"]]
        for key, value in {**(backend["build_option"] or {}), **(backend["info"] or {})}.items():
            lines.append(f"    {key:<20}{_line(value)}")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    """Print what works here; `--json` prints `collect`'s answer. Returns the exit status, 0."""
    parser = argparse.ArgumentParser(prog="python -m flash_sparse_attn info", description=__doc__)
    parser.add_argument("--json", action="store_true", help="print JSON")
    found = collect()
    print(json.dumps(found, indent=2) if parser.parse_args(argv).json else render(found))
    return 0


def _driver_version() -> str | None:
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return None
    query = [tool, "--query-gpu=driver_version", "--format=csv,noheader"]
    answer = subprocess.run(query, capture_output=True, text=True, check=False, timeout=30)
    return answer.stdout.split("\n")[0].strip() or None if answer.returncode == 0 else None


def _line(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} {_line(item)}" for key, item in value.items())
    if isinstance(value, list | tuple):
        return ", ".join(_line(item) for item in value)
    return "none" if value is None else str(value)
