"""Key scores from a file, those of a trained model say, in place of normal ones (`--scores`)."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .cases import Case


@dataclass(frozen=True, eq=False)
class Scores:
    """Scores of several heads, of one layer or of many.

    Attributes:
        name: of the file, without its folder.
        shape: as it is in the file.
        heads: float32 `[heads of all layers, S]`, on the CPU.
    """

    name: str
    shape: tuple[int, ...]
    heads: Tensor

    def serve(self, case: Case) -> bool:
        """Whether there are scores for all keys of the case."""
        return case.seqlen <= self.heads.shape[1]

    def of(self, case: Case) -> Tensor | None:
        """`[1, Hkv, S]`: the first S keys of Hkv heads spread evenly over the layers' heads, some
        of them more than once if there are fewer; None for a case without scores of heads.
        """
        if not case.per_head:
            return None
        last = self.heads.shape[0] - 1
        chosen = torch.linspace(0, last, case.heads_kv).round().long()
        return self.heads[chosen, : case.seqlen][None].contiguous()

    def asdict(self) -> dict[str, Any]:
        """What a result records."""
        return {"file": self.name, "shape": list(self.shape)}


def load(where: Path) -> Scores:
    """Read `[layers, Hkv, S]` or `[Hkv, S]`, an array in .npy or a tensor that torch saved.

    Raises:
        ValueError: the file is neither, or not a finite float32 tensor of such a shape.
    """
    try:
        if where.suffix == ".npy":
            import numpy

            tensor = torch.from_numpy(numpy.load(where))
        else:
            tensor = torch.load(where, map_location="cpu", weights_only=True)
    except Exception as error:
        raise ValueError(f"--scores: cannot read {where}: {error}") from error
    if not isinstance(tensor, Tensor) or tensor.dtype != torch.float32:
        got = tensor.dtype if isinstance(tensor, Tensor) else type(tensor).__name__
        raise ValueError(f"--scores: got {got} in {where}, expected a float32 tensor")
    if tensor.dim() not in (2, 3) or tensor.numel() == 0:
        expected = "[layers, Hkv, S] or [Hkv, S]"
        raise ValueError(f"--scores: got shape {tuple(tensor.shape)}, expected {expected}")
    if not tensor.isfinite().all():
        raise ValueError(f"--scores: not every score in {where} is finite")
    return Scores(where.name, tuple(tensor.shape), tensor.detach().flatten(0, -2))
