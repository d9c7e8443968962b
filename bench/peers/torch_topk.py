"""`torch.topk` beside our selection: keys of the last row alone, where ours has those of every."""

from __future__ import annotations

import torch

from ..cases import Case
from ..inputs import Inputs
from . import Prepared


class TorchTopk:
    """`torch.topk(scores, w)` of every head."""

    name = "torch-topk"
    ours = False

    def unavailable(self, case: Case, device: torch.device) -> str | None:
        """Where nothing is selected."""
        return None if case.selects else "the case selects nothing"

    def prepare(self, case: Case, inputs: Inputs) -> Prepared:
        """It takes at most S keys."""
        width = min(case.window_size, case.seqlen)
        return Prepared(
            selection=lambda: torch.topk(inputs.scores, width),
            notes=("it chooses for the last row only",),
        )


PEER = TorchTopk()
