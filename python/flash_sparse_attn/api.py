"""The public functions: arguments as users write them become tensors and options."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from . import ops
from .dispatch import require_available
from .kept import kept_blocks
from .masks import BlockMap, IntervalMask, from_block_mask
from .packed_mask import PackedMask
from .problem import AttentionOptions, Form, Gate
from .tensors import TENSOR_NAMES, AttentionTensors
from .validation import message, require_bool, require_kinds, require_tensor

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask

    Mask = Tensor | PackedMask | IntervalMask | BlockMap | BlockMask
    Masks = Mask | tuple[Mask, ...] | None
    Window = tuple[int | None, int | None]
    Gates = tuple[Tensor, Tensor] | None
    Output = Tensor | tuple[Tensor | BlockMap, ...]

UNBOUNDED = (None, None)


def flash_sparse_attn_func(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Masks = None,
    attn_bias: Tensor | None = None,
    softmax_scale: float | None = None,
    is_causal: bool = False,
    softcap: float = 0.0,
    deterministic: bool = False,
    *,
    window: Window = UNBOUNDED,
    sinks: int = 0,
    gates: Gates = None,
    gate: str = Gate.LOGSIGMOID,
    gate_threshold: float = 0.0,
    softmax_threshold: float = 0.0,
    return_lse: bool = False,
    return_kept: bool = False,
    backend: str | None = None,
) -> Output:
    """Sparse attention over a batch, differentiable in query, key, value, bias and gates.

    Implements every rule of `spec/attention.md` on sequences of one length. Sizes: B batch, Sq
    rows, Sk keys, Hq query heads, Hkv key-value heads (Hq a multiple of Hkv), D head dim.

    Args:
        query: `[B, Sq, Hq, D]`, float16, bfloat16, float32 or float64; any strides.
        key: `[B, Sk, Hkv, D]`, dtype of query.
        value: `[B, Sk, Hkv, Dv]`, dtype of query.
        attn_mask: which pairs may attend: a bool tensor `[{B,1}, {Hq,Hkv,1}, {Sq,1}, {Sk,1}]`, true
            = attend, or its bits as a `PackedMask` (V3); an `IntervalMask` (V4); a `BlockMap` or
            FlexAttention's `BlockMask` (V5), whose `mask_mod` is evaluated once and then is a dense
            mask; or a tuple of these, at most one of a kind, all of which must hold.
        attn_bias: added to the scores (S4), same broadcasting, dtype of query or float32. Its
            gradient is summed in float32.
        softmax_scale: c of S1; default D ** -0.5.
        is_causal: row i sees keys j <= i + Sk - Sq (V1).
        softcap: t > 0 bounds scores as t * tanh(s / t) (S2); 0 = none.
        deterministic: the same bits from every backward pass (G2); also on under
            `torch.use_deterministic_algorithms(True)`.
        window: keys kept left and right of the aligned one, None = unbounded (V2).
        sinks: first keys exempt from the window (V2).
        gates: `(alpha [B, Sq, Hq], delta [B, Sk, Hkv])`, adds c * g(alpha_i * delta_j) (S3).
        gate: g, "logsigmoid" or "identity".
        gate_threshold: in [0, 1], drops keys by their gate (V7); 0 = none.
        softmax_threshold: in [0, 1], lets blocks of negligible probability be dropped (T1); 0 =
            none.
        return_lse: return the log-sum-exp too.
        return_kept: return the blocks kept under the softmax threshold too.
        backend: "cuda", "cute", "triton" or "reference"; None takes the first that serves the
            call, on CPU tensors the reference.

    Returns:
        o `[B, Sq, Hq, Dv]` in the dtype of query, 0 in rows that see nothing (O2); with
        `return_lse` also lse `[B, Hq, Sq]`, natural logarithm, float32 (float64 for float64); with
        `return_kept` also a `BlockMap` `[B, Hq, ceil(Sq / 16), ceil(Sk / 32)]`, true = kept (T1).
        What it says of blocks in which nothing is visible means nothing.

    Raises:
        TypeError: a kind or dtype is wrong (E1, E3).
        ValueError: a shape, device, size or combination is wrong (E2, E4 to E8).
        NotImplementedError: the backend does not serve the call (E9); every reason is given.
        ImportError: the named backend is not installed or not built (E9).
    """
    masks = _split_masks(attn_mask)
    options = _options(
        query, Form.BATCHED, masks, softmax_scale, is_causal, softcap, deterministic, window, sinks,
        gates, gate, gate_threshold, softmax_threshold,
    )  # fmt: skip
    tensors = _tensors(query, key, value, masks, attn_bias, gates)
    return _call(tensors, options, backend, return_lse, return_kept)


def flash_sparse_attn_varlen_func(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    attn_mask: IntervalMask | None = None,
    attn_bias: Tensor | None = None,
    softmax_scale: float | None = None,
    is_causal: bool = False,
    softcap: float = 0.0,
    deterministic: bool = False,
    *,
    window: Window = UNBOUNDED,
    sinks: int = 0,
    gates: Gates = None,
    gate: str = Gate.LOGSIGMOID,
    gate_threshold: float = 0.0,
    softmax_threshold: float = 0.0,
    return_lse: bool = False,
    return_kept: bool = False,
    backend: str | None = None,
) -> Output:
    """`flash_sparse_attn_func` over sequences packed end to end (V6).

    Args:
        query: `[Tq, Hq, D]`, Tq rows of all sequences.
        key: `[Tk, Hkv, D]`.
        value: `[Tk, Hkv, Dv]`.
        cu_seqlens_q: int32 `[sequences + 1]`, first row of every sequence, then Tq.
        cu_seqlens_k: int32 `[sequences + 1]`, likewise for keys.
        max_seqlen_q: rows of the longest sequence, at least.
        max_seqlen_k: keys of the longest sequence, at least.
        attn_mask: `IntervalMask` `[1, {Hkv,1}, Tk]`; rows are counted inside the own sequence.
        attn_bias: key bias `[1, {Hq,Hkv,1}, 1, {Tk,1}]`.
        gates: `(alpha [Tq, Hq], delta [Tk, Hkv])`.
        softmax_scale, is_causal, softcap, deterministic, window, sinks, gate, gate_threshold,
            softmax_threshold, return_lse, return_kept, backend: as in `flash_sparse_attn_func`.

    Returns:
        o `[Tq, Hq, Dv]`; with `return_lse` also lse `[Hq, Tq]`; with `return_kept` also a
        `BlockMap` `[sequences, Hq, ceil(max_seqlen_q / 16), ceil(max_seqlen_k / 32)]`, blocks
        counted inside each sequence.

    Raises:
        TypeError, ValueError, NotImplementedError, ImportError: as in `flash_sparse_attn_func`.
    """
    require_tensor("cu_seqlens_q", cu_seqlens_q)
    require_tensor("cu_seqlens_k", cu_seqlens_k)
    masks = _split_masks(attn_mask)
    options = _options(
        query, Form.PACKED, masks, softmax_scale, is_causal, softcap, deterministic, window, sinks,
        gates, gate, gate_threshold, softmax_threshold, max_seqlen_q, max_seqlen_k,
    )  # fmt: skip
    lengths = {"cu_seqlens_q": cu_seqlens_q, "cu_seqlens_k": cu_seqlens_k}
    tensors = _tensors(query, key, value, masks, attn_bias, gates, **lengths)
    return _call(tensors, options, backend, return_lse, return_kept)


def flash_sparse_attn_with_kvcache_func(
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    *,
    cache_seqlens: Tensor | None = None,
    page_table: Tensor | None = None,
    attn_indices: Tensor | None = None,
    attn_mask: Masks = None,
    attn_bias: Tensor | None = None,
    softmax_scale: float | None = None,
    is_causal: bool = True,
    softcap: float = 0.0,
    window: Window = UNBOUNDED,
    sinks: int = 0,
    gates: Gates = None,
    gate: str = Gate.LOGSIGMOID,
    gate_threshold: float = 0.0,
    softmax_threshold: float = 0.0,
    return_lse: bool = False,
    return_kept: bool = False,
    backend: str | None = None,
) -> Output:
    """Attention of a few new rows over a key-value cache (V6); no gradients.

    Args:
        query: `[B, Sq, Hq, D]`; the last row is aligned to the last key in use. One row may leave
            out its dim, `[B, Hq, D]`.
        key_cache: `[B, Sc, Hkv, D]`, or with a page table `[pages, page, Hkv, D]`.
        value_cache: `[B, Sc, Hkv, Dv]`, or `[pages, page, Hkv, Dv]`.
        cache_seqlens: int32 `[B]`, keys in use per sequence, the new ones included; default Sc.
        page_table: int32 `[B, pages per sequence]`.
        attn_indices: int32 `[B, Hkv, n]`, the keys that may be attended; -1 pads.
        attn_mask: as in `flash_sparse_attn_func`, over the logical key axis: Sc keys, or pages per
            sequence times page size.
        attn_bias: likewise.
        gates: `(alpha [B, Sq, Hq], delta [B, logical keys, Hkv])`.
        softmax_scale, is_causal, softcap, window, sinks, gate, gate_threshold, softmax_threshold,
            return_lse, return_kept, backend: as in `flash_sparse_attn_func`; causal by default.

    Returns:
        o `[B, Sq, Hq, Dv]`; with `return_lse` also lse `[B, Hq, Sq]`; with `return_kept` also a
        `BlockMap` over the logical key axis. Of a query `[B, Hq, D]`, o `[B, Hq, Dv]` and lse
        `[B, Hq]`.

    Raises:
        TypeError, ValueError, NotImplementedError, ImportError: as in `flash_sparse_attn_func`.
    """
    require_tensor("query", query)
    if query.dim() not in (3, 4):
        got = f"{query.dim()} (shape {tuple(query.shape)})"
        raise ValueError(message("E2", "rank of query", got, "3 or 4"))
    one_row = query.dim() == 3
    query = query.unsqueeze(1) if one_row else query
    cache = {"cache_seqlens": cache_seqlens, "page_table": page_table, "key_indices": attn_indices}
    for name, tensor in cache.items():
        require_tensor(name, tensor, optional=True)
    masks = _split_masks(attn_mask)
    options = _options(
        query, Form.CACHE, masks, softmax_scale, is_causal, softcap, False, window, sinks,
        gates, gate, gate_threshold, softmax_threshold,
    )  # fmt: skip
    tensors = _tensors(query, key_cache, value_cache, masks, attn_bias, gates, **cache)
    return _call(tensors, options, backend, return_lse, return_kept, one_row)


def flash_sparse_attn_func_auto(backend: str | None = None) -> Callable[..., Output]:
    """`flash_sparse_attn_func` with the backend settled; hold the result and call it.

    Args:
        backend: "cuda", "cute", "triton" or "reference": that one, with no fallback. None: per
            call the first of cuda, cute, triton that serves it; on CPU tensors the reference, and
            on CUDA tensors that no backend serves the reference with one warning.

    Raises:
        ValueError: no backend has this name (E9).
        ImportError: the backend is unavailable; every reason and the install line are given (E9).
    """
    if backend is not None:
        require_available(backend)
    return functools.partial(flash_sparse_attn_func, backend=backend)


def _call(
    tensors: AttentionTensors,
    options: AttentionOptions,
    backend: str | None,
    return_lse: bool,
    return_kept: bool,
    one_row: bool = False,
) -> Output:
    require_bool("return_lse", return_lse)
    require_bool("return_kept", return_kept)
    o, lse, kept = ops.attention(tensors, options, backend)
    if one_row:
        o, lse = o.squeeze(1), lse.squeeze(2)
    wanted = [o]
    if return_lse:
        wanted.append(lse)
    if return_kept:
        wanted.append(kept_blocks(kept, tensors, options))
    return wanted[0] if len(wanted) == 1 else tuple(wanted)


def _options(
    query: Tensor,
    form: Form,
    masks: dict[str, Any],
    softmax_scale: float | None,
    causal: bool,
    softcap: float,
    deterministic: bool,
    window: Window,
    sinks: int,
    gates: Gates,
    gate: str,
    gate_threshold: float,
    softmax_threshold: float,
    max_seqlen_q: int = 0,
    max_seqlen_k: int = 0,
) -> AttentionOptions:
    require_tensor("query", query)
    if not isinstance(window, tuple | list) or len(window) != 2:
        raise TypeError(message("E1", "window", repr(window), "a pair (left, right)"))
    if query.dim() == 0 or (softmax_scale is None and query.shape[-1] == 0):
        raise ValueError(message("E2", "shape of query", tuple(query.shape), "a last dim of D"))
    rows, keys = masks.get("block_size", (0, 0))
    options = AttentionOptions(
        form=str(form),
        softmax_scale=query.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale,
        softcap=softcap,
        causal=causal,
        window_left=window[0],
        window_right=window[1],
        sinks=sinks,
        mask_keys=masks.get("mask_keys"),
        keys_per_row=masks.get("keys_per_row") or 0,
        block_size_q=rows,
        block_size_k=keys,
        gate=None if gates is None else gate,
        gate_threshold=gate_threshold,
        softmax_threshold=softmax_threshold,
        max_seqlen_q=max_seqlen_q,
        max_seqlen_k=max_seqlen_k,
        deterministic=deterministic,
    )
    require_kinds(options)
    if torch.are_deterministic_algorithms_enabled():
        options = replace(options, deterministic=True)
    return options


def _tensors(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    masks: dict[str, Any],
    bias: Tensor | None,
    gates: Gates,
    **lengths: Tensor | None,
) -> AttentionTensors:
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        require_tensor(name, tensor)
    require_tensor("attn_bias", bias, optional=True)
    if gates is not None and (not isinstance(gates, tuple | list) or len(gates) != 2):
        raise TypeError(message("E1", "gates", type(gates).__name__, "a pair (alpha, delta)"))
    gate_q, gate_k = (None, None) if gates is None else gates
    for name, tensor in (("alpha", gate_q), ("delta", gate_k)):
        require_tensor(name, tensor, optional=gates is None)
    query, key, value = _autocast(query, key, value)
    terms = {name: term for name, term in masks.items() if name in TENSOR_NAMES}
    return AttentionTensors(
        query, key, value, bias=bias, gate_q=gate_q, gate_k=gate_k, **terms, **lengths
    )


def _autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Query, key and value in the dtype of an enclosing `torch.autocast`, float64 aside."""
    device = tensors[0].device.type
    if device == "meta" or not torch.is_autocast_enabled(device):
        return tensors
    dtype = torch.get_autocast_dtype(device)
    wide = torch.float64
    return tuple(x.to(dtype) if x.is_floating_point() and x.dtype != wide else x for x in tensors)


def _split_masks(attn_mask: Masks) -> dict[str, Any]:
    """The fields of `AttentionTensors` that `attn_mask` gives, with the options of them."""
    given: dict[str, Any] = {}
    several = attn_mask if isinstance(attn_mask, tuple | list) else (attn_mask,)
    for mask in several:
        terms = _mask_terms(mask)
        twice = given.keys() & terms.keys()
        if twice:
            raise ValueError(
                message(
                    "E8",
                    "attn_mask",
                    f"{', '.join(sorted(twice))} twice",
                    "at most one mask of a kind",
                )
            )
        given |= terms
    return given


def _mask_terms(mask: Mask | None) -> dict[str, Any]:
    if mask is None:
        return {}
    if isinstance(mask, Tensor):
        return {"mask": mask}
    if isinstance(mask, PackedMask):
        return {"mask": mask.words, "mask_keys": mask.seqlen_k}
    if isinstance(mask, IntervalMask):
        intervals = {"interval_start": mask.start, "interval_end": mask.end}
        return intervals | {"keys_per_row": mask.keys_per_row}
    if isinstance(mask, BlockMap):
        return {"block_map": mask.active, "block_size": mask.block_size}
    if type(mask).__module__.startswith("torch.nn.attention.flex_attention"):
        block_map, elements = from_block_mask(mask)
        return _mask_terms(block_map) | _mask_terms(elements)
    raise TypeError(
        message(
            "E1",
            "attn_mask",
            type(mask).__name__,
            "a bool tensor, PackedMask, IntervalMask, BlockMap, BlockMask, or a tuple of these",
        )
    )
