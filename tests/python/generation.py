"""A decoder of one dynamic-mask layer whose scores do not depend on how tokens are grouped in
calls: greedy generation through a cache can be held to full recomputation token by token.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from flash_sparse_attn.modules import (
    DynamicMaskAttention,
    DynamicMaskAttentionConfig,
    DynamicMaskCache,
)

VOCAB = 61
STEP = 1 / 8
"""Embeddings and the weights behind scores are multiples of it, small enough that every sum of
their products is exact in float32: the choice of keys has no rounding to depend on.
"""


class Generator(nn.Module):
    """Tokens to logits, by one layer over embeddings of token and position.

    Args:
        tokens: longest sequence.
        window_size: w.
        device, dtype: of the parameters.
    """

    def __init__(
        self,
        tokens: int,
        window_size: int,
        device: str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        config = DynamicMaskAttentionConfig(
            64, num_heads=4, num_kv_heads=2, window_size=window_size
        )
        random = torch.Generator().manual_seed(0)
        self.layer = DynamicMaskAttention(config, dtype=dtype)
        self.token = nn.Embedding(VOCAB, 64, dtype=dtype)
        self.position = nn.Embedding(tokens, 64, dtype=dtype)
        self.head = nn.Linear(64, VOCAB, bias=False, dtype=dtype)
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=random) / 4)
            for weight in (
                self.token.weight, self.position.weight, self.layer.v_proj.weight,
                self.layer.dt_proj.weight,
            ):  # fmt: skip
                weight.copy_((weight / STEP).round() * STEP)
            self.layer.A.copy_(torch.tensor([-1.0, -0.25]))
        self.to(device)

    def forward(self, tokens: Tensor, positions: Tensor, cache: DynamicMaskCache | None) -> Tensor:
        """Logits `[B, n, VOCAB]` of tokens `[B, n]` at positions that broadcast with them."""
        x = self.token(tokens) + self.position(positions)
        return self.head(x + self.layer(x, cache=cache))

    def choose(self, tokens: Tensor) -> Tensor:
        """The token that follows each, all computed in one call: `[B, S]`."""
        positions = torch.arange(tokens.shape[1], device=tokens.device)
        return self(tokens, positions, None).argmax(-1)
