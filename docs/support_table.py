"""The support table of the READMEs, generated from the backends' capability tables.

    python docs/support_table.py            # write it into the READMEs
    python docs/support_table.py --check    # fail if one is out of date

It stands between `<!-- support -->` and `<!-- /support -->`.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from flash_sparse_attn import capability
from flash_sparse_attn.capability import Capability

ROOT = Path(__file__).resolve().parents[1]
BLOCK = re.compile(r"(<!-- support -->\n).*?(<!-- /support -->)", re.S)
READMES = {"README.md": 0, "README_zh.md": 1}
"""File -> index of its language in `LABELS`."""

YES, NO = "✓", "–"


def terms(*names: str) -> Callable[[Capability], str]:
    """Served if every named term is."""
    return lambda table: YES if set(names) <= set(table.terms) else NO


def form(name: str) -> Callable[[Capability], str]:
    """Served if the layout is."""
    return lambda table: YES if name in table.forms else NO


def dtypes(table: Capability) -> str:
    """Short names, widest last."""
    bits = {"float16": "fp16", "bfloat16": "bf16", "float32": "fp32", "float64": "fp64"}
    return " ".join(bits[name] for name in table.dtypes) or NO


def head_dims(table: Capability) -> str:
    """Range of D, and of Dv where it may differ."""
    if not table.head_dim_max:
        return NO
    dims = "D, Dv" if table.head_dim_v_differs else "D = Dv"
    return f"{dims} ≤ {table.head_dim_max}"


def devices(table: Capability) -> str:
    """Where it runs."""
    if not table.devices:
        return NO
    newest = f" – sm_{table.arch_max}" if table.arch_max else "+"
    arches = f" sm_{table.arch_min}{newest}" if table.arch_min else ""
    shown = {"cpu": "CPU", "cuda": f"CUDA{arches}"}
    return ", ".join(shown.get(name, name) for name in table.devices)


CELLS: dict[str, Callable[[Capability], str]] = {
    "devices": devices,
    "dtypes": dtypes,
    "dims": head_dims,
    "backward": lambda table: YES if table.backward else NO,
    "S2": terms("softcap"),
    "S3": terms("gate"),
    "S4": terms("bias"),
    "V1": terms("causal"),
    "V2": terms("window", "sinks"),
    "V3": terms("mask"),
    "V4": terms("intervals"),
    "V5": terms("block_map"),
    "V6 packed": form("packed"),
    "V6 cache": form("cache"),
    "V6 pages": terms("pages"),
    "V6 indices": terms("indices"),
    "V7": terms("gate_threshold"),
    "T1": terms("softmax_threshold"),
}
"""Row -> its cell for one backend."""

LABELS = {
    "head": ("", ""),
    "devices": ("devices", "设备"),
    "dtypes": ("dtypes", "数据类型"),
    "dims": ("head dims", "头维度"),
    "backward": ("gradients", "梯度"),
    "S2": ("softcap (S2)", "softcap（S2）"),
    "S3": ("gates (S3)", "门控（S3）"),
    "S4": ("bias and its gradient (S4)", "偏置及其梯度（S4）"),
    "V1": ("causal (V1)", "因果（V1）"),
    "V2": ("window with sinks (V2)", "窗口与 sink（V2）"),
    "V3": ("dense mask (V3)", "稠密掩码（V3）"),
    "V4": ("`IntervalMask` (V4)", "`IntervalMask`（V4）"),
    "V5": ("block map, `BlockMask` (V5)", "块掩码、`BlockMask`（V5）"),
    "V6 packed": ("packed sequences (V6)", "变长打包序列（V6）"),
    "V6 cache": ("key-value cache, forward (V6)", "KV 缓存，仅前向（V6）"),
    "V6 pages": ("… paged (V6)", "……分页（V6）"),
    "V6 indices": ("… chosen keys (V6)", "……选定的键（V6）"),
    "V7": ("gate threshold (V7)", "门控阈值（V7）"),
    "T1": ("softmax threshold (T1)", "softmax 阈值（T1）"),
    "reference": ("reference", "参考实现"),
    "any": ("any", "任意"),
}
"""Word -> (English, Chinese)."""

# The reference serves every valid call: its table is the specification.
REFERENCE = Capability(
    forms=("batched", "packed", "cache"),
    terms=(
        "softcap", "gate", "bias", "causal", "window", "sinks", "mask", "intervals", "block_map",
        "gate_threshold", "softmax_threshold", "pages", "indices",
    ),
    dtypes=("float16", "bfloat16", "float32", "float64"),
    head_dim_max=256,
    head_dim_v_differs=True,
    devices=("any",),
    arch_min=0,
    arch_max=0,
    backward=True,
)  # fmt: skip


def backends() -> dict[str, Capability]:
    """Name -> capability table of each backend, the preferred one first, as in the tree."""
    order = (ROOT / "backends" / "order.txt").read_text(encoding="utf-8").splitlines()
    names = [name for name in order if name and not name.startswith("#")]
    return {name: capability.load(ROOT / "backends" / name / "capability.toml") for name in names}


def table(language: int) -> str:
    """The table in Markdown; `language` is an index into the labels."""
    word = {name: label[language] for name, label in LABELS.items()}
    columns = backends() | {word["reference"]: REFERENCE}
    lines = [
        f"| {' | '.join([word['head'], *columns])} |",
        f"| --- |{' :---: |' * len(columns)}",
    ]
    for row, cell in CELLS.items():
        cells = [cell(column) for column in columns.values()]
        lines.append(f"| {word[row]} | {' | '.join(word.get(x, x) for x in cells)} |")
    return "\n".join(lines) + "\n"


def refresh(text: str, language: int) -> str:
    """The text with its table generated anew.

    Raises:
        ValueError: it has not one place for the table.
    """
    new, places = BLOCK.subn(lambda match: match[1] + table(language) + match[2], text)
    if places != 1:
        raise ValueError(f"support table: got {places} marked places, expected 1")
    return new


def main(argv: Sequence[str] | None = None) -> int:
    """Write the tables, or with `--check` compare them; returns 1 if one was out of date."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing")
    check = parser.parse_args(argv).check
    stale = 0
    for name, language in READMES.items():
        path = ROOT / name
        old = path.read_text(encoding="utf-8")
        new = refresh(old, language)
        if new != old and check:
            print(f"{name}: out of date; python docs/support_table.py writes it")
            stale = 1
        elif new != old:
            path.write_text(new, encoding="utf-8")
    return stale


if __name__ == "__main__":
    sys.exit(main())
