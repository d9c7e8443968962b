"""What a result was measured on: GPU, clocks as read, versions, commit, date."""

from __future__ import annotations

import platform
import re
import shutil
import subprocess
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent
DISTRIBUTIONS = ("flash-sparse-attn", "triton", "flash-attn-4", "nvidia-cutlass-dsl")
READINGS = (
    "driver_version",
    "clocks.sm",
    "clocks.mem",
    "clocks.max.sm",
    "power.draw",
    "power.limit",
    "temperature.gpu",
)
"""What is asked of nvidia-smi: MHz, W, degrees Celsius."""


def collect(device: torch.device, commit: str | None = None) -> dict[str, Any]:
    """The header of a result; None stands for what cannot be known here.

    Args:
        device: where the benchmark runs.
        commit: of the tree, for a copy of it without its history; default: what git says.
    """
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "device": device_name(device),
        "gpu": gpu(device),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version() if device.type == "cuda" else None,
        "packages": {name: _version(name) for name in DISTRIBUTIONS},
        "commit": commit or _git("rev-parse", "HEAD"),
        "dirty": None if commit else _dirty(),
    }


def device_name(device: torch.device) -> str:
    """The GPU's name, or that of the processor's architecture."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type} {platform.machine()}"


def folder(device: torch.device) -> str:
    """`device_name` as a folder's name: "nvidia-h200", "cpu-x86-64"."""
    return re.sub(r"[^a-z0-9]+", "-", device_name(device).lower()).strip("-")


def gpu(device: torch.device) -> dict[str, Any] | None:
    """Properties of the GPU and what nvidia-smi reads now; None off the GPU."""
    if device.type != "cuda":
        return None
    properties = torch.cuda.get_device_properties(device)
    return {
        "capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "memory": properties.total_memory,
        "l2": properties.L2_cache_size,
    } | readings(device)


def readings(device: torch.device) -> dict[str, str]:
    """Driver, clocks, power and temperature as nvidia-smi reads them now; empty without it."""
    tool = shutil.which("nvidia-smi")
    if tool is None or device.type != "cuda":
        return {}
    index = str(torch.cuda.current_device() if device.index is None else device.index)
    query = [tool, "-i", index, f"--query-gpu={','.join(READINGS)}", "--format=csv,noheader"]
    line = _output(query)
    return (
        dict(zip(READINGS, (word.strip() for word in line.split(",")), strict=True)) if line else {}
    )


def _dirty() -> bool | None:
    """Whether tracked or untracked files, results apart, differ from the commit."""
    status = _git("status", "--porcelain", "--", ".", ":(exclude)bench/results")
    return None if status is None else bool(status)


def _git(*arguments: str) -> str | None:
    tool = shutil.which("git")
    return None if tool is None else _output([tool, "-C", str(ROOT), *arguments])


def _output(command: list[str]) -> str | None:
    """What a command prints; None if it fails or does not answer."""
    try:
        answer = subprocess.run(command, capture_output=True, text=True, check=False, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return answer.stdout.strip() if answer.returncode == 0 else None


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None
