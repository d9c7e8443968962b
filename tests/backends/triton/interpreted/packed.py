"""Packed calls of top-w keys, beside the reference in float64, sequence by sequence."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from flash_sparse_attn.backends import triton as backend
from torch import Tensor

from flash_sparse_attn import reference
from flash_sparse_attn.masks import IntervalMask
from flash_sparse_attn.problem import AttentionOptions, Form
from flash_sparse_attn.tensors import AttentionTensors
from flash_sparse_attn.validation import describe
from tests.conformance.poison import poisoned_memory

from .calls import LSE_TOLERANCE, TOLERANCE, Draw, Results
from .memory import checked_memory


class PackedCall:
    """A call whose sequences each keep the w best of their keys (M5).

    Attributes:
        lengths: (rows, keys) of every sequence.
        tensors, options: of the call.
    """

    def __init__(
        self,
        lengths: Sequence[tuple[int, int]],
        window: int,
        heads: tuple[int, int] = (2, 1),
        dims: tuple[int, int] = (16, 16),
        dtype: torch.dtype = torch.float32,
        spare: tuple[int, int] = (0, 0),
        bias: tuple[int, ...] | None = None,
        shared: bool = False,
        topk: dict[str, Any] | None = None,
        **options: Any,
    ) -> None:
        """
        Args:
            lengths: rows and keys of every sequence.
            window: w.
            heads: Hq, Hkv.
            dims: D, Dv.
            dtype: of q, k, v and the bias.
            spare: rows and keys that no sequence owns.
            bias: sizes of a bias of keys, 0 standing for Tk.
            shared: whether heads share the choice of keys.
            topk: options of `IntervalMask.topk`.
            options: of the call.
        """
        draw = Draw.seeded(1)
        self.lengths = tuple(lengths)
        rows, keys = (sum(column) for column in zip(*self.lengths, strict=True))
        total_q, total_k = rows + spare[0], keys + spare[1]
        n = 1 if shared else heads[1]
        masks = [
            IntervalMask.topk(draw.normal(1, n, each_k), window, seqlen_q=each_q, **(topk or {}))
            for each_q, each_k in self.lengths
        ]
        unowned = draw.integers(-5, 300, 1, n, spare[1])
        start, end = (
            torch.cat([*(getattr(mask, name) for mask in masks), unowned], 2)
            for name in ("start", "end")
        )
        cu_q, cu_k = (
            torch.tensor([0, *column], dtype=torch.int32).cumsum(0, dtype=torch.int32)
            for column in zip(*self.lengths, strict=True)
        )
        q = draw.normal(total_q, heads[0], dims[0], dtype=dtype)
        k = draw.normal(total_k, heads[1], dims[0], dtype=dtype)
        v = draw.normal(total_k, heads[1], dims[1], dtype=dtype)
        made = None
        if bias is not None:
            made = draw.normal(*(size or total_k for size in bias), dtype=dtype)
        self.tensors = AttentionTensors(
            q, k, v, bias=made, interval_start=start, interval_end=end, cu_seqlens_q=cu_q,
            cu_seqlens_k=cu_k,
        )  # fmt: skip
        longest = [max(column) for column in zip(*self.lengths, strict=True)]
        given = {"max_seqlen_q": longest[0], "max_seqlen_k": longest[1], "keys_per_row": window}
        self.options = AttentionOptions(form=Form.PACKED, **(given | options))

    @property
    def grads(self) -> tuple[str, ...]:
        return ("q", "k", "v") + (() if self.tensors.bias is None else ("bias",))

    def run(self, do: Tensor, dlse: Tensor) -> Results:
        """o, lse and d<name>, from memory that held garbage, every access to it checked."""
        problem = describe(self.tensors, self.options, self.grads)
        assert not backend.unsupported(problem)
        with poisoned_memory("cpu"), checked_memory():
            o, lse, kept = backend.forward(problem, self.tensors)
            gradients = backend.backward(problem, self.tensors, o, lse, kept, do, dlse)
        return {"o": o, "lse": lse} | {f"d{name}": x for name, x in gradients.items()}

    def exact(self, do: Tensor, dlse: Tensor) -> Results:
        """The same from the reference in float64."""
        tensors, options = self.tensors, self.options
        keywords: dict[str, Any] = {
            "softmax_scale": options.softmax_scale,
            "softcap": options.softcap,
            "causal": options.causal,
            "window": (options.window_left, options.window_right),
            "sinks": options.sinks,
            "interval_start": tensors.interval_start,
            "interval_end": tensors.interval_end,
            "cu_seqlens_q": tensors.cu_seqlens_q,
            "cu_seqlens_k": tensors.cu_seqlens_k,
        }
        if tensors.bias is not None:
            keywords["bias"] = tensors.bias.double()
        qkv = [x.double() for x in (tensors.q, tensors.k, tensors.v)]
        o, lse = reference.attention_packed(*qkv, **keywords)
        upstream = do.double(), dlse.double()
        gradients = reference.attention_packed_backward(*upstream, *qkv, **keywords)
        return {"o": o, "lse": lse} | {f"d{name}": x for name, x in gradients.items()}

    def check(self) -> Results:
        """Compare outputs and gradients with the reference; those of the backend are returned."""
        draw = Draw.seeded(0)
        q, v = self.tensors.q, self.tensors.v
        do = draw.normal(*q.shape[:2], v.shape[2], dtype=q.dtype)
        dlse = draw.normal(q.shape[1], q.shape[0])
        got, want = self.run(do, dlse), self.exact(do, dlse)
        for name, x in got.items():
            tolerance = LSE_TOLERANCE if name == "lse" else TOLERANCE[q.dtype]
            allowed = tolerance * (1 + float(want[name].nan_to_num(0, 0, 0).abs().max()))
            say = functools.partial("{}: {}".format, name)
            torch.testing.assert_close(x.double(), want[name], rtol=0, atol=allowed, msg=say)
        return got
