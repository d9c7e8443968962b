"""A case as a call of the public API, and as the problem that a backend is asked about."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from flash_sparse_attn.spec.schema import Case, Reject
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask

import flash_sparse_attn as fsa
from flash_sparse_attn.masks import from_block_mask
from flash_sparse_attn.problem import AttentionOptions, AttentionProblem
from flash_sparse_attn.tensors import AttentionTensors
from flash_sparse_attn.validation import describe

from .inputs import Inputs

FUNCTIONS: dict[str, Callable[..., Any]] = {
    "batched": fsa.flash_sparse_attn_func,
    "packed": fsa.flash_sparse_attn_varlen_func,
    "cache": fsa.flash_sparse_attn_with_kvcache_func,
}


@dataclass
class Call:
    """The arguments of a call, still by the names of the specification.

    Attributes:
        case: the case.
        inputs: its inputs.
        tensors: tensors by their names in `AttentionTensors`, or what takes their place.
        options: scalar arguments by the names of `AttentionOptions`, and `backend`.
        twice: masks that are given twice.
    """

    case: Case
    inputs: Inputs
    tensors: dict[str, Any]
    backend: str | None
    options: dict[str, Any] = field(init=False)
    twice: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        options, packed = self.case.options, self.case.packed
        self.options = {
            "softmax_scale": options.softmax_scale,
            "softcap": options.softcap,
            "causal": options.causal,
            "window": (options.window_left, options.window_right),
            "sinks": options.sinks,
            "gate_threshold": options.gate_threshold,
            "softmax_threshold": options.softmax_threshold,
            "deterministic": options.deterministic,
            "backend": self.backend,
        }
        if self.case.gates:
            self.options["gate"] = self.case.gates.gate
        if self.case.block_map:
            self.options["block_size"] = self.case.block_map.block_size
        if packed:
            self.options["max_seqlen_q"] = max(packed.lengths_q, default=0)
            self.options["max_seqlen_k"] = max(packed.lengths_k, default=0)

    def spoil(self, reject: Reject) -> None:
        """Make an invalid call of a valid one."""
        for name, dtype in reject.recast.items():
            self.tensors[name] = self.tensors[name].to(getattr(torch, dtype))
        for name, shape in reject.resize.items():
            self.tensors[name] = self.tensors[name].new_zeros(shape)
        for name, device in reject.move.items():
            self.tensors[name] = self.tensors[name].to(device)
        self.tensors |= reject.replace
        for name in reject.drop:
            del self.tensors[name]
        self.options |= reject.set
        self.twice = reject.twice

    def run(self) -> tuple[Tensor, Tensor, fsa.BlockMap]:
        """Call the public function of the case's form."""
        tensors, options = self.tensors, dict(self.options)
        keywords: dict[str, Any] = {"attn_mask": self.masks(), "attn_bias": tensors.get("bias")}
        options.pop("block_size", None)
        keywords["is_causal"] = options.pop("causal")
        if "gate_q" in tensors:
            keywords["gates"] = (tensors["gate_q"], tensors["gate_k"])
        cached = {"cache_seqlens": "cache_seqlens", "page_table": "page_table"}
        cached |= {"key_indices": "attn_indices"}
        if self.case.cache:
            del options["deterministic"]
            keywords |= {new: tensors[old] for old, new in cached.items() if old in tensors}
        if self.case.packed:
            keywords |= {name: tensors[f"{name}"] for name in ("cu_seqlens_q", "cu_seqlens_k")}
        function = FUNCTIONS[self.case.form]
        qkv = (tensors[name] for name in "qkv")
        keywords |= {"return_lse": True, "return_kept": True} | options
        return function(*qkv, **keywords)

    def masks(self) -> Any:
        """`attn_mask`: None, one mask, or a tuple of them."""
        given: list[Any] = []
        for name in ("mask", "interval_start", "block_map"):
            if name in self.tensors:
                given += [self.mask(name)] * (1 + (name in self.twice))
        interval_mask = None
        for part in self.inputs.structured:
            made = getattr(fsa.IntervalMask, part.constructor)(**part.arguments)
            interval_mask = made if interval_mask is None else interval_mask & made
        if interval_mask is not None:
            given.append(interval_mask)
        if self.inputs.flex is not None:
            given.append(self.block_mask())
        return None if not given else given[0] if len(given) == 1 else tuple(given)

    def mask(self, name: str) -> Any:
        """One mask as its public type."""
        if name == "mask":
            return self.tensors["mask"]
        if name == "block_map":
            return fsa.BlockMap(self.tensors["block_map"], tuple(self.options["block_size"]))
        return fsa.IntervalMask(self.tensors["interval_start"], self.tensors["interval_end"])

    def block_mask(self) -> BlockMask:
        """V5 as FlexAttention has it."""
        sizes = self.case.sizes
        return create_block_mask(
            self.inputs.flex,
            None,
            None,
            sizes.seqlen_q,
            sizes.seqlen_k,
            device=str(self.inputs.do.device),
            BLOCK_SIZE=tuple(self.case.block_map.block_size),
        )

    def attention_tensors(self) -> AttentionTensors:
        """The tensors that a backend gets."""
        tensors = dict(self.tensors)
        for mask in self.masks_alone():
            if isinstance(mask, fsa.IntervalMask):
                tensors |= {"interval_start": mask.start, "interval_end": mask.end}
            if isinstance(mask, BlockMask):
                block_map, elements = from_block_mask(mask)
                dense = None if elements is None else elements.to_dense()
                tensors |= {"block_map": block_map.active, "mask": dense}
        return AttentionTensors(**tensors)

    def problem(self) -> AttentionProblem:
        """The problem that a backend is asked about, described by the E rules alone."""
        options = dict(self.options)
        rows, keys = options.pop("block_size", (0, 0))
        left, right = options.pop("window")
        del options["backend"]
        if options["softmax_scale"] is None:
            options["softmax_scale"] = self.case.sizes.head_dim**-0.5
        interval_masks = (x for x in self.masks_alone() if isinstance(x, fsa.IntervalMask))
        described = AttentionOptions(
            **options,
            keys_per_row=max((mask.keys_per_row or 0 for mask in interval_masks), default=0),
            form=self.case.form,
            window_left=left,
            window_right=right,
            block_size_q=rows,
            block_size_k=keys,
        )
        return describe(self.attention_tensors(), described, self.case.grads)

    def masks_alone(self) -> tuple[Any, ...]:
        """`masks` as a tuple."""
        masks = self.masks()
        return masks if isinstance(masks, tuple) else () if masks is None else (masks,)
