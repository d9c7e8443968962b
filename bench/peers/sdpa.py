"""PyTorch's `scaled_dot_product_attention`: its flash and cuDNN kernels, and what it picks itself.

It takes one mask argument and no `is_causal` beside it, so causality, mask and bias are merged
outside of the timed region into one additive mask (-inf = hidden), or into one bool mask where
there is no bias. The gradient of the bias is taken through that merge, whose backward is timed.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from ..cases import Case
from ..inputs import Inputs
from . import Prepared, heads_first


@dataclass(frozen=True)
class Sdpa:
    """One way to call it.

    Attributes:
        name: as in results.
        kernel: the kernel it is held to; None lets PyTorch pick.
        masked: whether it can be given a mask.
        cuda_only: whether the kernel exists on CUDA devices only.
    """

    name: str
    kernel: SDPBackend | None
    masked: bool
    cuda_only: bool = False
    ours: bool = False

    def unavailable(self, case: Case, device: torch.device) -> str | None:
        """Reasons that are known without trying; PyTorch's own come as errors."""
        has_mask = case.mask is not None or case.bias is not None
        if has_mask and not self.masked:
            return "takes no mask and no bias"
        if self.kernel is None and not has_mask:
            return "the case has no mask and no bias"
        if case.per_head:
            return "would be given a mask of pairs for every head"
        if self.cuda_only and device.type != "cuda":
            return f"needs a CUDA device, tensors are on {device.type}"
        return None

    def prepare(self, case: Case, inputs: Inputs) -> Prepared:
        """Merge the masks; choose how grouped heads go in."""
        merged = merge(inputs) if case.mask or case.bias else None
        grouped = case.heads_q != case.heads_kv
        expand = grouped and self.kernel is None
        notes = []
        if merged is not None:
            kind = "bool" if merged.dtype == torch.bool else "additive"
            notes.append(f"one {kind} mask {list(merged.shape)}, merged outside of the timing")
        if expand:
            notes.append("k and v expanded to all query heads")

        def arguments() -> tuple[Tensor, Tensor, Tensor]:
            q, k, v = (heads_first(x) for x in (inputs.q, inputs.k, inputs.v))
            return (q, _to_query_heads(k, case), _to_query_heads(v, case)) if expand else (q, k, v)

        def forward() -> Tensor:
            held = contextlib.nullcontext() if self.kernel is None else sdpa_kernel(self.kernel)
            with held:
                o = scaled_dot_product_attention(
                    *arguments(),
                    attn_mask=merged,
                    is_causal=merged is None and inputs.causal,
                    enable_gqa=grouped and not expand,
                )
            return heads_first(o)

        if self.kernel is None:
            picked = torch._fused_sdp_choice(*arguments(), merged, 0.0, False)
            notes.append(f"PyTorch picks {SDPBackend(picked).name}")
        return Prepared(forward, notes=tuple(notes))


def merge(inputs: Inputs) -> Tensor:
    """Causality, mask and bias, shared by all heads, as one argument `[1, 1, {S,1}, S]`;
    differentiable in the bias.
    """
    length = inputs.q.shape[1]
    per_row = inputs.causal or inputs.intervals is not None
    per_row = per_row or (inputs.mask is not None and inputs.mask.shape[2] > 1)
    rows = torch.arange(length if per_row else 1, device=inputs.q.device)
    # Without causality, row 0 stands for all rows of a mask of the keys.
    visible = inputs.visibility(rows)
    return visible if inputs.bias is None else torch.where(visible, inputs.bias, -torch.inf)


def _to_query_heads(x: Tensor, case: Case) -> Tensor:
    """`[B, Hkv, S, D]` -> `[B, Hq, S, D]`; a view for one key-value head."""
    return x[:, :, None].expand(-1, -1, case.heads_q // case.heads_kv, -1, -1).flatten(1, 2)


PEERS = (
    Sdpa("sdpa-flash", SDPBackend.FLASH_ATTENTION, masked=False),
    Sdpa("sdpa-cudnn", SDPBackend.CUDNN_ATTENTION, masked=True, cuda_only=True),
    Sdpa("sdpa-masked", None, masked=True),
)
