"""FlashAttention-4 (package flash-attn-4, module `flash_attn.cute`), where it is installed."""

from __future__ import annotations

import importlib

import torch
from torch import Tensor

from ..cases import Case
from ..inputs import Inputs
from . import Prepared

MODULE = "flash_attn.cute"


class FlashAttention4:
    """Its batched call, for cases without mask and bias."""

    name = "flash-attn-4"
    ours = False

    def unavailable(self, case: Case, device: torch.device) -> str | None:
        """Not installed, no CUDA device, or a mask or bias, which it takes as functions."""
        if case.mask or case.bias:
            return "measured without mask and bias only"
        if device.type != "cuda":
            return f"needs a CUDA device, tensors are on {device.type}"
        try:
            importlib.import_module(MODULE)
        except ImportError as error:
            return f"not importable: {error}; install: pip install flash-attn-4"
        return None

    def prepare(self, case: Case, inputs: Inputs) -> Prepared:
        """Its own layout is ours."""
        attention = importlib.import_module(MODULE).flash_attn_func

        def forward() -> Tensor:
            answer = attention(inputs.q, inputs.k, inputs.v, causal=inputs.causal)
            return answer[0] if isinstance(answer, tuple) else answer

        return Prepared(forward)


PEER = FlashAttention4()
