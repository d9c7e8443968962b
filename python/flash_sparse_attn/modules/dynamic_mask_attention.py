"""Dynamic mask attention (arXiv 2508.02124) as a layer: values score keys, rows keep the best.

    a_nj = exp(A_n softplus((v_j Δ)_n))     score of key j for kv head n; v_j, values of all heads
    row i keeps the w best keys j <= p_i    M5, one run of rows a key
    s_ij = c <q_i, k_j> + a_nj              S1 and S4 over the kept keys, then O1

The score is criterion and bias in one. The choice has no gradient; A and Δ learn through the bias
of the keys that are kept (G1).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..api import flash_sparse_attn_func
from ..masks import IntervalMask
from ..streaming import DynamicMaskCache, require_size
from ..validation import HEAD_DIM_MAX, message, require_tensor

Rotary = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class DynamicMaskAttentionConfig:
    """Sizes and options of a `DynamicMaskAttention`; every default is resolved on construction.

    Args:
        hidden_size: width of the layer's input and output.
        num_heads: Hq, query heads.
        num_kv_heads: Hkv, key-value heads; Hq is a multiple of it. Default Hq.
        head_dim: D of queries, keys and values, at most 256. Default hidden_size / num_heads.
        window_size: w >= 1, keys that a row keeps.
        qkv_bias: whether the projections to query, key and value have a bias.
        out_bias: whether the projection to the output has one.
        softmax_scale: c of S1. Default D ** -0.5.
        backend: as in `flash_sparse_attn_func`.

    Raises:
        TypeError: a field is of the wrong kind (E1).
        ValueError: a size is out of range or does not divide another (E2, E6, E7).
    """

    hidden_size: int
    num_heads: int
    num_kv_heads: int | None = None
    head_dim: int | None = None
    window_size: int = 1024
    qkv_bias: bool = False
    out_bias: bool = False
    softmax_scale: float | None = None
    backend: str | None = None

    def __post_init__(self) -> None:
        for name in ("hidden_size", "num_heads", "window_size"):
            require_size(name, getattr(self, name))
        if self.num_kv_heads is None:
            object.__setattr__(self, "num_kv_heads", self.num_heads)
        require_size("num_kv_heads", self.num_kv_heads)
        if self.num_heads % self.num_kv_heads:
            expected = f"a multiple of num_kv_heads {self.num_kv_heads}"
            raise ValueError(message("E2", "num_heads", self.num_heads, expected))
        if self.head_dim is None:
            if self.hidden_size % self.num_heads:
                expected = f"a multiple of num_heads {self.num_heads}, or head_dim"
                raise ValueError(message("E2", "hidden_size", self.hidden_size, expected))
            object.__setattr__(self, "head_dim", self.hidden_size // self.num_heads)
        require_size("head_dim", self.head_dim)
        if self.head_dim > HEAD_DIM_MAX:
            expected = f"at most {HEAD_DIM_MAX}"
            raise ValueError(message("E7", "head_dim", self.head_dim, expected))
        for name in ("qkv_bias", "out_bias"):
            if not isinstance(getattr(self, name), bool):
                raise TypeError(message("E1", name, repr(getattr(self, name)), "a bool"))
        if self.softmax_scale is None:
            object.__setattr__(self, "softmax_scale", self.head_dim**-0.5)
        scale = self.softmax_scale
        if isinstance(scale, bool) or not isinstance(scale, int | float):
            raise TypeError(message("E1", "softmax_scale", repr(scale), "a number or None"))
        if not math.isfinite(scale):
            raise ValueError(message("E6", "softmax_scale", scale, "a finite number"))
        if self.backend is not None and not isinstance(self.backend, str):
            raise TypeError(message("E1", "backend", repr(self.backend), "a name or None"))


class DynamicMaskAttention(nn.Module):
    """Causal self-attention in which every row keeps the w best-scored keys (arXiv 2508.02124).

    Parameters: `q_proj`, `k_proj`, `v_proj`, `o_proj`; `dt_proj`, the Δ that samples the values of
    all kv heads, `[Hkv, Hkv * D]`; and `A` `[Hkv]`, the coefficient of each kv head.

    Args:
        config: sizes and options.
        device: of the parameters; default: torch's.
        dtype: of the parameters; default: torch's.
    """

    def __init__(
        self,
        config: DynamicMaskAttentionConfig,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.config = config
        kind = {"device": device, "dtype": dtype}
        width_q = config.num_heads * config.head_dim
        width_kv = config.num_kv_heads * config.head_dim
        self.q_proj = nn.Linear(config.hidden_size, width_q, bias=config.qkv_bias, **kind)
        self.k_proj = nn.Linear(config.hidden_size, width_kv, bias=config.qkv_bias, **kind)
        self.v_proj = nn.Linear(config.hidden_size, width_kv, bias=config.qkv_bias, **kind)
        self.o_proj = nn.Linear(width_q, config.hidden_size, bias=config.out_bias, **kind)
        self.dt_proj = nn.Linear(width_kv, config.num_kv_heads, bias=False, **kind)
        self.A = nn.Parameter(torch.empty(config.num_kv_heads, **kind))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Fill every parameter anew."""
        for projection in (self.q_proj, self.k_proj, self.v_proj, self.o_proj, self.dt_proj):
            projection.reset_parameters()
        nn.init.constant_(self.A, -1.0)

    def key_scores(self, value: Tensor) -> Tensor:
        """exp(A softplus(vΔ)), in float32 or wider whatever autocast says.

        Args:
            value: `[B, S, Hkv, D]`.

        Returns:
            `[B, Hkv, S]`, float32 (float64 for float64), positive.
        """
        dtype = torch.promote_types(value.dtype, torch.float32)
        with torch.autocast(value.device.type, enabled=False):
            dt = F.linear(value.flatten(2).to(dtype), self.dt_proj.weight.to(dtype))
            dt = dt.transpose(
                1, 2
            ).contiguous()  # keys adjacent, as those who read scores want them
            return (self.A.to(dtype)[:, None] * F.softplus(dt)).exp()

    def allocate_cache(self, batch_size: int, dtype: torch.dtype | None = None) -> DynamicMaskCache:
        """An empty cache of this layer's sizes, on its device.

        Args:
            batch_size: B.
            dtype: of keys and values. Default: that in which the layer computes them here, the
                parameters' or that of an enclosing `torch.autocast`.

        Raises:
            TypeError, ValueError: as `DynamicMaskCache`.
        """
        config, weight = self.config, self.k_proj.weight
        if dtype is None:
            device, dtype = weight.device.type, weight.dtype
            if device != "meta" and torch.is_autocast_enabled(device):
                dtype = torch.get_autocast_dtype(device)
        return DynamicMaskCache(
            batch_size,
            config.window_size,
            config.num_kv_heads,
            config.head_dim,
            device=weight.device,
            dtype=dtype,
        )

    def forward(
        self,
        x: Tensor,
        key_padding_mask: Tensor | None = None,
        rotary: Rotary | None = None,
        cache: DynamicMaskCache | None = None,
    ) -> Tensor:
        """Attend.

        Args:
            x: `[B, S, hidden_size]`, the dtype of the parameters, or any under autocast.
            key_padding_mask: bool `[B, S]`, True = a token; the others are no keys. Their own rows
                of the output mean nothing.
            rotary: position embedding, `(query [B, S, Hq, D], key [B, S, Hkv, D]) -> (query, key)`;
                it knows the positions of x itself. None = none.
            cache: the best of the keys before x (`allocate_cache`), to which those of x are
                admitted. Row i of x chooses among the keys held and its own up to i, which is the
                choice among all tokens so far (M5). The memory of a cache, and the time of a token,
                do not grow with the tokens seen.

        Returns:
            `[B, S, hidden_size]`; without a cache differentiable in x and in every parameter.

        Raises:
            TypeError: x is not a tensor, the mask not a bool tensor, the cache not a cache or of
                another dtype (E1, E3).
            ValueError: x, the mask or the cache is of the wrong shape (E2, E5).
            NotImplementedError: a gradient is asked for through a cache, which takes none; and as
                `flash_sparse_attn_func` (E9).
            ImportError: as `flash_sparse_attn_func` (E9).
        """
        self._require_inputs(x, key_padding_mask, cache)
        query, key, value = (
            projection(x).unflatten(-1, (-1, self.config.head_dim))
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        if rotary is not None:
            query, key = rotary(query, key)
        scores = self.key_scores(value)
        options = {"softmax_scale": self.config.softmax_scale, "backend": self.config.backend}
        if cache is not None:
            o = cache.attend(query, key, value, scores, key_padding_mask, **options)
        else:
            o = flash_sparse_attn_func(
                query,
                key,
                value,
                attn_mask=IntervalMask.topk(  # M5
                    scores, self.config.window_size, key_padding_mask=key_padding_mask
                ),
                attn_bias=scores[:, :, None],  # S4
                is_causal=True,
                **options,
            )
        return self.o_proj(o.flatten(2))

    def extra_repr(self) -> str:
        """The part of the config that the parameters do not show."""
        return f"window_size={self.config.window_size}"

    def _require_inputs(
        self, x: Tensor, key_padding_mask: Tensor | None, cache: DynamicMaskCache | None
    ) -> None:
        require_tensor("x", x)
        hidden_size = self.config.hidden_size
        if x.dim() != 3 or x.shape[2] != hidden_size:
            expected = f"[B, S, hidden_size {hidden_size}]"
            raise ValueError(message("E2", "shape of x", tuple(x.shape), expected))
        if cache is not None and not isinstance(cache, DynamicMaskCache):
            expected = "a DynamicMaskCache or None"
            raise TypeError(message("E1", "cache", type(cache).__name__, expected))
        window_size = self.config.window_size
        if cache is not None and cache.window_size != window_size:
            expected = f"{window_size}, that of the layer"
            raise ValueError(message("E2", "window_size of cache", cache.window_size, expected))
        require_tensor("key_padding_mask", key_padding_mask, optional=True)
        if key_padding_mask is None:
            return
        if key_padding_mask.dtype != torch.bool:
            got = key_padding_mask.dtype
            raise TypeError(message("E3", "dtype of key_padding_mask", got, "torch.bool"))
        if key_padding_mask.shape != x.shape[:2]:
            got, expected = tuple(key_padding_mask.shape), f"{tuple(x.shape[:2])}, [B, S] of x"
            raise ValueError(message("E5", "shape of key_padding_mask", got, expected))
