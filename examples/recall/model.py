"""A small decoder whose attention is dense, over a sliding window, or over a dynamic mask.

Without position embeddings: each block adds to a token a projection of the one before it, which is
all the order that recall needs, and costs every kind of attention the same.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from flash_sparse_attn import flash_sparse_attn_func
from flash_sparse_attn.modules import DynamicMaskAttention, DynamicMaskAttentionConfig

DENSE, SLIDING, DYNAMIC = KINDS = ("dense", "sliding-window", "dynamic-mask")
EMBEDDING_STD = 0.3


@dataclass(frozen=True)
class ModelConfig:
    """Sizes of the decoder.

    Attributes:
        hidden_size: width of the residual stream; the MLP is twice as wide.
        num_layers: blocks.
        num_heads: query heads, which share the width.
        num_kv_heads: key-value heads.
        window_size: w, keys that a row keeps, for sliding-window and dynamic-mask attention.
    """

    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    window_size: int


class CausalAttention(nn.Module):
    """Attention to every key so far, or to the last w of them."""

    def __init__(self, config: ModelConfig, kind: str, backend: str | None) -> None:
        super().__init__()
        self.head_dim = config.hidden_size // config.num_heads
        self.window = (config.window_size - 1 if kind == SLIDING else None, None)
        self.backend = backend
        width_kv = config.num_kv_heads * self.head_dim
        self.q_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=False)
        self.k_proj = nn.Linear(config.hidden_size, width_kv, bias=False)
        self.v_proj = nn.Linear(config.hidden_size, width_kv, bias=False)
        self.o_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """`[B, S, hidden_size]` to the same."""
        q, k, v = (
            projection(x).unflatten(-1, (-1, self.head_dim))
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        o = flash_sparse_attn_func(
            q, k, v, is_causal=True, window=self.window, backend=self.backend
        )
        return self.o_proj(o.flatten(2))


class Block(nn.Module):
    """The token before, attention, MLP; each after a norm and added to the stream."""

    def __init__(self, config: ModelConfig, kind: str, backend: str | None) -> None:
        super().__init__()
        width = config.hidden_size
        self.shift_norm, self.attention_norm, self.mlp_norm = (nn.RMSNorm(width) for _ in range(3))
        self.shift = nn.Linear(width, width, bias=False)
        if kind == DYNAMIC:
            self.attention = DynamicMaskAttention(
                DynamicMaskAttentionConfig(
                    width,
                    config.num_heads,
                    config.num_kv_heads,
                    window_size=config.window_size,
                    backend=backend,
                )
            )
        else:
            self.attention = CausalAttention(config, kind, backend)
        self.mlp = nn.Sequential(
            nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width)
        )

    def forward(self, x: Tensor) -> Tensor:
        """`[B, S, hidden_size]` to the same."""
        x = self._shifted(x)
        x = x + self.attention(self.attention_norm(x))
        return x + self.mlp(self.mlp_norm(x))

    def selection_scores(self, x: Tensor) -> Tensor:
        """`[B, S, hidden_size]` to the scores `[B, Hkv, S]` by which the attention chooses."""
        attention = self.attention
        value = attention.v_proj(self.attention_norm(self._shifted(x)))
        return attention.key_scores(value.unflatten(-1, (-1, attention.config.head_dim)))

    def _shifted(self, x: Tensor) -> Tensor:
        return x + self.shift(F.pad(self.shift_norm(x), (0, 0, 1, 0))[:, :-1])


class Decoder(nn.Module):
    """Tokens to logits over the values.

    Args:
        config: sizes.
        kind: one of `KINDS`.
        vocab_size: tokens.
        num_values: logits.
        backend: as in `flash_sparse_attn_func`.

    Raises:
        ValueError: no attention is of this kind.
    """

    def __init__(
        self,
        config: ModelConfig,
        kind: str,
        vocab_size: int,
        num_values: int,
        backend: str | None = None,
    ) -> None:
        super().__init__()
        if kind not in KINDS:
            raise ValueError(f"kind: got {kind!r}, expected one of {KINDS}")
        self.embedding = nn.Embedding(vocab_size, config.hidden_size)
        # Small enough that what tokens of a kind learn in common soon outweighs what tells them
        # apart, large enough to tell them apart from the first step.
        nn.init.normal_(self.embedding.weight, std=EMBEDDING_STD)
        self.blocks = nn.ModuleList(Block(config, kind, backend) for _ in range(config.num_layers))
        self.norm = nn.RMSNorm(config.hidden_size)
        self.head = nn.Linear(config.hidden_size, num_values, bias=False)

    def forward(self, tokens: Tensor, positions: Tensor) -> Tensor:
        """Logits `[B, Q, num_values]` at positions `[B, Q]` of tokens `[B, S]`."""
        x = self.embedding(tokens)
        for block in self.blocks:
            x = block(x)
        index = positions[..., None].expand(-1, -1, x.shape[2])
        return self.head(self.norm(x.gather(1, index)))

    @torch.no_grad()
    def selection_scores(self, tokens: Tensor) -> Tensor:
        """By which scores each layer chooses among tokens `[B, S]`: float32 `[layers, B, Hkv, S]`.

        For dynamic-mask attention alone.
        """
        x, scores = self.embedding(tokens), []
        for block in self.blocks:
            scores.append(block.selection_scores(x))
            x = block(x)
        return torch.stack(scores)
