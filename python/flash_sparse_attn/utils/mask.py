"""`create_mask`: a dense boolean mask (V3) from a bias, under both published argument orders.

The top-w here is over *all* keys, later ones included (M5, not causal), and the mask is a tensor as
large as the bias. `IntervalMask.topk` is the causal selection, in two integers a key.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..reference import selection
from ..validation import message, require_tensor

MASK_TYPES = ("topk", "relu")


def create_mask(*args: Any, **kwargs: Any) -> Tensor:
    """Which keys a row attends to, chosen by an attention bias.

    Either published order of arguments, told apart by what is given: the first has `batch_size` or
    `key_len`, or a mask (None too) in the second place.

        create_mask(attention_bias, attention_mask, batch_size, query_len, key_len, window_size,
                    min_dtype, block_size=None, type="topk")
        create_mask(attention_bias, query_len, type="topk", attention_mask=None, window_size=None,
                    min_dtype=None, block_size=None)

    A key is *hidden* where `attention_mask` is False or its bias is at most `min_dtype`; a hidden
    key is never attended to and takes no place. Of the others, "topk" keeps the `window_size` best
    (M5, not causal: ties are won by the more recent key, NaN is worst) and "relu" those with a
    positive bias. A row from which every key is hidden attends to nothing (O2).

    Args:
        attention_bias: floating `[{B,1}, {Hq,Hkv,1}, {Sq,1}, Sk]`. No gradient flows through the
            choice.
        attention_mask: bool, True = may attend: `[B, Sk]`; or `[B, Sq]` with Sq < Sk, for the
            last Sq keys, the earlier ones not being hidden; or 4-D, broadcastable with the bias.
        batch_size: B.
        query_len: Sq.
        key_len: Sk.
        window_size: w >= 1, keys a row keeps; from Sk on, all. Only "topk" reads it.
        min_dtype: bias of a key that is hidden; None = the least finite number of the bias's dtype.
        block_size: if above 1, each run of so many keys (the last may be shorter) is kept whole if
            more than half of it was chosen, and dropped if not; hidden keys stay hidden.
        type: "topk" or "relu".

    Returns:
        bool `[{B,1}, {Hq,Hkv,1}, {Sq,1}, Sk]`, the broadcast of bias and mask: for V3.

    Raises:
        TypeError: the arguments fit neither order, or one is of the wrong kind or dtype (E1, E3).
        ValueError: sizes disagree (E2, E4, E5); a number is out of range, `type` is unknown (E6).
    """
    order = _published_order(args, kwargs)
    try:
        call = inspect.signature(order).bind(*args, **kwargs)
    except TypeError as error:
        orders = " or ".join(f"create_mask{_names(each)}" for each in (_with_sizes, _without_sizes))
        raise TypeError(message("E1", "arguments of create_mask", error, orders)) from None
    return order(*call.args, **call.kwargs)


def _with_sizes(
    attention_bias: Tensor,
    attention_mask: Tensor | None,
    batch_size: int,
    query_len: int,
    key_len: int,
    window_size: int | None,
    min_dtype: float | None,
    block_size: int | None = None,
    type: str = "topk",
) -> Tensor:
    """The first published order: the sizes are checked against the bias."""
    _require_bias(attention_bias)
    sizes = {"batch_size": batch_size, "query_len": query_len, "key_len": key_len}
    for name, size in sizes.items():
        _require_int(name, size, least=0)
    allowed = ((1, batch_size), (1, query_len), (key_len,))
    got = (attention_bias.shape[0], attention_bias.shape[2], attention_bias.shape[3])
    if any(size not in want for size, want in zip(got, allowed, strict=True)):
        expected = f"[{{1,{batch_size}}}, heads, {{1,{query_len}}}, {key_len}]"
        raise ValueError(message("E5", "shape of attention_bias", _shape(attention_bias), expected))
    return _without_sizes(
        attention_bias, query_len, type, attention_mask, window_size, min_dtype, block_size
    )


def _without_sizes(
    attention_bias: Tensor,
    query_len: int,
    type: str = "topk",
    attention_mask: Tensor | None = None,
    window_size: int | None = None,
    min_dtype: float | None = None,
    block_size: int | None = None,
) -> Tensor:
    """The second published order."""
    _require_bias(attention_bias)
    _require_int("query_len", query_len, least=0)
    if type not in MASK_TYPES:
        raise ValueError(message("E6", "type", repr(type), MASK_TYPES))
    bias = attention_bias.detach()
    visible = bias > _lower_bound(min_dtype, bias.dtype)
    visible |= bias.isnan()  # NaN is a score, the worst (M5)
    if attention_mask is not None:
        mask = _four_dims(attention_mask, query_len, bias)
        try:
            bias, visible = torch.broadcast_tensors(bias, visible & mask)
        except RuntimeError:
            shapes = (_shape(attention_mask), _shape(attention_bias))
            what = "shapes of attention_mask and attention_bias"
            raise ValueError(message("E5", what, shapes, "shapes that broadcast")) from None
    if type == "topk":
        _require_int("window_size", window_size, least=1)
        # One row is all there is to choose for: its intervals are [0, 1) or empty.
        _, kept_until = selection.topk_intervals(bias, 1, window_size, False, visible)
        keep = kept_until > 0
    else:
        keep = (bias > 0) & visible
    if block_size is not None:
        _require_int("block_size", block_size, least=1)
        keep = _majority(keep, block_size) & visible
    return keep


def _published_order(args: tuple, kwargs: dict[str, Any]) -> Callable[..., Tensor]:
    """Which order a call follows; the call may still not fit it."""
    second_is_mask = len(args) > 1 and (args[1] is None or isinstance(args[1], Tensor))
    sizes_given = "batch_size" in kwargs or "key_len" in kwargs
    return _with_sizes if second_is_mask or sizes_given else _without_sizes


def _names(order: Callable[..., Tensor]) -> str:
    """The parameters of an order, without their types."""
    signature = inspect.signature(order)
    bare = [p.replace(annotation=inspect.Parameter.empty) for p in signature.parameters.values()]
    return str(inspect.Signature(bare))


def _four_dims(mask: Tensor, query_len: int, bias: Tensor) -> Tensor:
    """The mask as `[{B,1}, {H,1}, {Sq,1}, {Sk,1}]`."""
    require_tensor("attention_mask", mask)
    if mask.dtype != torch.bool:
        raise TypeError(message("E3", "dtype of attention_mask", mask.dtype, "torch.bool"))
    if mask.device != bias.device:
        what = "device of attention_mask"
        raise ValueError(
            message("E4", what, mask.device, f"{bias.device}, where attention_bias is")
        )
    if mask.dim() == 4:
        return mask
    key_len = bias.shape[-1]
    if mask.dim() == 2 and mask.shape[1] in (key_len, query_len) and mask.shape[1] <= key_len:
        earlier = mask.new_ones(mask.shape[0], key_len - mask.shape[1])
        return torch.cat([earlier, mask], dim=1)[:, None, None, :]
    expected = f"[B, {key_len}], [B, {query_len}] if that is shorter, or 4-D"
    raise ValueError(message("E2", "shape of attention_mask", _shape(mask), expected))


def _lower_bound(min_dtype: float | None, dtype: torch.dtype) -> float:
    """The largest bias that hides a key; a number that the dtype cannot hold stands for -inf."""
    least = torch.finfo(dtype).min
    if min_dtype is None:
        return least
    if isinstance(min_dtype, bool) or not isinstance(min_dtype, int | float):
        raise TypeError(message("E1", "min_dtype", repr(min_dtype), "a number or None"))
    if math.isnan(min_dtype):
        raise ValueError(message("E6", "min_dtype", min_dtype, "not NaN"))
    return min_dtype if min_dtype >= least else -math.inf


def _majority(keep: Tensor, block_size: int) -> Tensor:
    """Each block of keys as more than half of it is; a shorter last block by its own length."""
    key_len = keep.shape[-1]
    block = torch.arange(key_len, device=keep.device) // block_size
    blocks = -(-key_len // block_size)
    chosen = torch.zeros(*keep.shape[:-1], blocks, dtype=torch.int32, device=keep.device)
    chosen.index_add_(-1, block, keep.to(torch.int32))
    length = torch.full((blocks,), block_size, device=keep.device)
    length[-1:] = key_len - block_size * (blocks - 1)
    return (2 * chosen > length)[..., block]


def _require_bias(bias: Tensor) -> None:
    require_tensor("attention_bias", bias)
    if not bias.is_floating_point():
        raise TypeError(message("E3", "dtype of attention_bias", bias.dtype, "a floating dtype"))
    if bias.dim() != 4:
        raise ValueError(message("E2", "rank of attention_bias", bias.dim(), 4))


def _require_int(name: str, value: int | None, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int | torch.SymInt):
        raise TypeError(message("E1", name, repr(value), f"an int >= {least}"))
    if value < least:
        raise ValueError(message("E6", name, value, f"an int >= {least}"))


def _shape(tensor: Tensor) -> tuple[int, ...]:
    return tuple(tensor.shape)
