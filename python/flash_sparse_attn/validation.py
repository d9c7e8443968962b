"""The E rules: a call is checked from metadata alone and becomes an `AttentionProblem`.

Nothing here reads data, so nothing waits for a device. Messages say what is wrong, what was given,
what is expected, and the rule.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor

from .problem import WORD_BITS, AttentionOptions, AttentionProblem, Form, Gate
from .tensors import AttentionTensors

HEAD_DIM_MAX = 256
FLOAT_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
INT32_TENSORS = (
    "interval_start",
    "interval_end",
    "cu_seqlens_q",
    "cu_seqlens_k",
    "cache_seqlens",
    "page_table",
    "key_indices",
)
BOOL_TENSORS = ("mask", "block_map")

_LENGTHS = ("sinks", "keys_per_row", "max_seqlen_q", "max_seqlen_k")
_KINDS: dict[str, tuple[tuple[type, ...], str]] = {
    **dict.fromkeys(("causal", "deterministic"), ((bool,), "a bool")),
    **dict.fromkeys(
        ("softmax_scale", "softcap", "gate_threshold", "softmax_threshold"),
        ((int, float), "a number"),
    ),
    **dict.fromkeys(
        ("window_left", "window_right", "mask_keys"), ((int, type(None)), "None or an int")
    ),
    **dict.fromkeys(_LENGTHS, ((int,), "an int")),
    "gate": ((str, type(None)), "a string"),
}


def message(rule: str, what: str, got: object, expected: object) -> str:
    """The one form of an error message: what, got, expected, rule."""
    return f"{what}: got {got}, expected {expected} [rule {rule}]"


def require_tensor(name: str, value: object, optional: bool = False) -> None:
    """E1 for one tensor argument.

    Raises:
        TypeError: `value` is neither a tensor nor, where optional, None.
    """
    if not isinstance(value, Tensor) and not (optional and value is None):
        raise TypeError(
            message(
                "E1",
                name,
                type(value).__name__,
                "a torch.Tensor" + (" or None" if optional else ""),
            )
        )


def require_bool(name: str, value: object) -> None:
    """E1 for a flag that is no option of the operators.

    Raises:
        TypeError: `value` is not a bool.
    """
    if not isinstance(value, bool):
        raise TypeError(message("E1", name, repr(value), "a bool"))


def require_int(name: str, value: object, least: int, words: str) -> None:
    """E1 and E6 for a count that is no option of the operators.

    Raises:
        TypeError: `value` is not an int.
        ValueError: `value` is below `least`.
    """
    if isinstance(value, bool) or not isinstance(value, (int, torch.SymInt)):
        raise TypeError(message("E1", name, repr(value), words))
    if value < least:
        raise ValueError(message("E6", name, value, words))


def require_kinds(options: AttentionOptions) -> None:
    """E1 for the scalar arguments.

    Raises:
        TypeError: an option is of the wrong kind.
    """
    for name, (kinds, words) in _KINDS.items():
        value = getattr(options, name)
        if type(value) in kinds:  # nearly always
            continue
        # A bool is an int to isinstance, but True is no length and no scale.
        if not isinstance(value, kinds) or isinstance(value, bool):
            public = "is_causal" if name == "causal" else name
            raise TypeError(message("E1", public, repr(value), words))


def require_ranges(options: AttentionOptions) -> None:
    """E6 for the scalar arguments, whose kinds are right.

    Raises:
        ValueError: an option is out of its range.
    """
    for name in ("softmax_scale", "softcap", "gate_threshold", "softmax_threshold"):
        if not math.isfinite(getattr(options, name)):
            raise ValueError(message("E6", name, getattr(options, name), "a finite number"))
    for name in ("gate_threshold", "softmax_threshold"):
        if not 0 <= getattr(options, name) <= 1:
            raise ValueError(message("E6", name, getattr(options, name), "a number in [0, 1]"))
    for name in ("softcap", "window_left", "window_right", "mask_keys", *_LENGTHS):
        value = getattr(options, name)
        if value is not None and value < 0:
            raise ValueError(message("E6", name, value, f"{_KINDS[name][1]} >= 0"))
    if options.gate is not None and options.gate not in tuple(Gate):
        names = [str(gate) for gate in Gate]
        raise ValueError(message("E6", "gate", repr(options.gate), f"one of {names}"))


def describe(
    tensors: AttentionTensors, options: AttentionOptions, grads: Iterable[str] = ()
) -> AttentionProblem:
    """Check a call against E1 to E8 and return its problem.

    Args:
        tensors: the tensor arguments, or their layouts.
        options: the scalar arguments.
        grads: names of the inputs whose gradient is needed.

    Raises:
        TypeError: E1, E3.
        ValueError: E2, E4, E5, E6, E7, E8.
    """
    require_ranges(options)
    _require_ranks(tensors, options)
    _require_dtypes(tensors, options)
    _require_one_device(tensors)
    problem = _sizes(tensors, options).with_grads(tuple(grads))
    _require_broadcasts(tensors, problem)
    _require_combination(tensors, problem)
    return problem


def _require_ranks(tensors: AttentionTensors, options: AttentionOptions) -> None:
    packed = options.form == Form.PACKED
    ranks = {
        "q": 3 if packed else 4,
        "gate_q": 2 if packed else 3,
        "mask": 4,
        "bias": 4,
        "block_map": 4,
    }
    ranks |= {
        "k": ranks["q"],
        "v": ranks["q"],
        "gate_k": ranks["gate_q"],
        "interval_start": 3,
        "interval_end": 3,
    }
    ranks |= {
        "cu_seqlens_q": 1,
        "cu_seqlens_k": 1,
        "cache_seqlens": 1,
        "page_table": 2,
        "key_indices": 3,
    }
    for name, tensor in tensors.present():
        if tensor.dim() != ranks[name]:
            raise ValueError(
                message(
                    "E2",
                    f"rank of {name}",
                    f"{tensor.dim()} (shape {tuple(tensor.shape)})",
                    ranks[name],
                )
            )


def _require_dtypes(tensors: AttentionTensors, options: AttentionOptions) -> None:
    dtype = tensors.q.dtype
    if dtype not in FLOAT_DTYPES:
        raise TypeError(message("E3", "dtype of q", dtype, f"one of {list(FLOAT_DTYPES)}"))
    for name, tensor in tensors.present():
        if name in ("q", "k", "v"):
            allowed = (dtype,)
        elif name == "mask" and options.mask_keys is not None:
            allowed = (torch.int32,)
        elif name in BOOL_TENSORS:
            allowed = (torch.bool,)
        elif name in INT32_TENSORS:
            allowed = (torch.int32,)
        else:  # bias and gates
            allowed = tuple(dict.fromkeys((dtype, torch.float32)))
        if tensor.dtype not in allowed:
            raise TypeError(
                message("E3", f"dtype of {name}", tensor.dtype, " or ".join(map(str, allowed)))
            )


def _require_one_device(tensors: AttentionTensors) -> None:
    for name, tensor in tensors.present():
        if tensor.device != tensors.q.device:
            raise ValueError(
                message("E4", f"device of {name}", tensor.device, f"{tensors.q.device}, where q is")
            )


def _sizes(tensors: AttentionTensors, options: AttentionOptions) -> AttentionProblem:
    """E2 and E7: read the sizes and check that they agree."""
    q, k, v = tensors.q, tensors.k, tensors.v
    (heads_q, head_dim), (heads_kv, head_dim_k), (heads_v, head_dim_v) = (
        tuple(x.shape[-2:]) for x in (q, k, v)
    )
    if options.form == Form.PACKED:
        batch, seqlen_q, seqlen_k = _packed_sizes(tensors)
    else:
        batch, seqlen_q = q.shape[:2]
        seqlen_k = (
            k.shape[1] if tensors.page_table is None else tensors.page_table.shape[1] * k.shape[1]
        )
        if tensors.page_table is None and k.shape[0] != batch:
            raise ValueError(message("E2", "batch of k", k.shape[0], f"{batch}, that of q"))
    if k.shape[:-2] != v.shape[:-2]:
        raise ValueError(
            message("E2", "shape of v", tuple(v.shape), f"{tuple(k.shape[:-2])} first, as in k")
        )
    if heads_kv != heads_v:
        raise ValueError(message("E2", "heads of v", heads_v, f"{heads_kv}, those of k"))
    if heads_q < 1 or heads_kv < 1 or heads_q % heads_kv:
        raise ValueError(
            message(
                "E2",
                "heads of q",
                heads_q,
                f"a positive multiple of the {heads_kv} heads of k and v",
            )
        )
    if head_dim != head_dim_k:
        raise ValueError(message("E2", "head dim of k", head_dim_k, f"{head_dim}, that of q"))
    for name, size in (("q and k", head_dim), ("v", head_dim_v)):
        if not 1 <= size <= HEAD_DIM_MAX:
            raise ValueError(message("E7", f"head dim of {name}", size, f"1 to {HEAD_DIM_MAX}"))
    lengths_k = (batch, seqlen_k) if options.form != Form.PACKED else (seqlen_k,)
    lengths_q = (batch, seqlen_q) if options.form != Form.PACKED else (seqlen_q,)
    expected = {
        "gate_q": (*lengths_q, heads_q),
        "gate_k": (*lengths_k, heads_kv),
        "cache_seqlens": (batch,),
        "page_table": (batch, -1),
        "key_indices": (batch, heads_kv, -1),
    }
    for name, shape in expected.items():
        tensor = getattr(tensors, name)
        if tensor is not None and any(
            want not in (-1, got) for got, want in zip(tensor.shape, shape, strict=True)
        ):
            raise ValueError(message("E2", f"shape of {name}", tuple(tensor.shape), shape))
    sizes = {name: getattr(options, name) for name in options.__dataclass_fields__}
    mask, bias, intervals = tensors.mask, tensors.bias, tensors.interval_start
    mask_sizes = None if mask is None else tuple(mask.shape)
    if mask_sizes is not None and options.mask_keys is not None:
        mask_sizes = (*mask_sizes[:3], options.mask_keys)
    return AttentionProblem(
        **sizes,
        batch=batch,
        seqlen_q=seqlen_q,
        seqlen_k=seqlen_k,
        heads_q=heads_q,
        heads_kv=heads_kv,
        head_dim=head_dim,
        head_dim_v=head_dim_v,
        dtype=q.dtype,
        device=q.device.type,
        arch=_arch(q.device),
        mask=mask_sizes,
        bias=None if bias is None else tuple(bias.shape),
        bias_dtype=None if bias is None else bias.dtype,
        intervals=None if intervals is None else (intervals.shape[0], intervals.shape[1]),
        block_map=None if tensors.block_map is None else tuple(tensors.block_map.shape),
        page_size=None if tensors.page_table is None else k.shape[1],
        entries=None if tensors.key_indices is None else tensors.key_indices.shape[2],
    )


def _packed_sizes(tensors: AttentionTensors) -> tuple[int, int, int]:
    """Number of sequences, of rows, of keys in the packed form (V6, E2)."""
    cu_q, cu_k = tensors.cu_seqlens_q, tensors.cu_seqlens_k
    for name, cu in (("cu_seqlens_q", cu_q), ("cu_seqlens_k", cu_k)):
        if cu is None or cu.shape[0] < 1:
            raise ValueError(
                message(
                    "E2", name, None if cu is None else tuple(cu.shape), "sequences + 1 boundaries"
                )
            )
    if cu_q.shape != cu_k.shape:
        raise ValueError(
            message(
                "E2",
                "shape of cu_seqlens_k",
                tuple(cu_k.shape),
                f"{tuple(cu_q.shape)}, that of cu_seqlens_q",
            )
        )
    return cu_q.shape[0] - 1, tensors.q.shape[0], tensors.k.shape[0]


def _arch(device: torch.device) -> int | None:
    if device.type != "cuda":
        return None
    major, minor = torch.cuda.get_device_capability(device)
    return major * 10 + minor


def _require_broadcasts(tensors: AttentionTensors, problem: AttentionProblem) -> None:
    """E5: sizes of mask, bias, intervals, block map."""
    batch = 1 if problem.form == Form.PACKED else problem.batch
    heads = (1, problem.heads_kv, problem.heads_q)
    per_pair = ((1, batch), heads, (1, problem.seqlen_q), (1, problem.seqlen_k))
    per_key = ((1, batch), (1, problem.heads_kv), (problem.seqlen_k,))
    allowed = {
        "mask": per_pair,
        "bias": per_pair,
        "interval_start": per_key,
        "interval_end": per_key,
    }
    if tensors.block_map is not None:
        if problem.block_size_q < 1 or problem.block_size_k < 1:
            raise ValueError(
                message(
                    "E5",
                    "block size",
                    (problem.block_size_q, problem.block_size_k),
                    "two ints >= 1",
                )
            )
        rows = -(-problem.seqlen_q // problem.block_size_q)
        keys = -(-problem.seqlen_k // problem.block_size_k)
        allowed["block_map"] = ((1, batch), heads, (rows,), (keys,))
    if problem.mask_keys is not None:
        if problem.mask_keys != problem.seqlen_k:
            raise ValueError(message("E5", "keys of mask", problem.mask_keys, problem.seqlen_k))
        allowed["mask"] = (*per_pair[:3], (-(-problem.seqlen_k // WORD_BITS),))
    for name, sizes in allowed.items():
        tensor = getattr(tensors, name)
        if tensor is None:
            continue
        if any(got not in want for got, want in zip(tensor.shape, sizes, strict=True)):
            words = " x ".join(
                "{" + ",".join(map(str, dict.fromkeys(want))) + "}" for want in sizes
            )
            raise ValueError(message("E5", f"shape of {name}", tuple(tensor.shape), words))
    start, end = tensors.interval_start, tensors.interval_end
    if (start is None) != (end is None) or (start is not None and start.shape != end.shape):
        shapes = tuple(None if x is None else tuple(x.shape) for x in (start, end))
        raise ValueError(
            message("E5", "interval start and end", shapes, "two tensors of one shape")
        )


def _require_combination(tensors: AttentionTensors, problem: AttentionProblem) -> None:
    """E8: arguments that exclude or need one another."""
    gates = (tensors.gate_q is not None, tensors.gate_k is not None)
    if gates[0] != gates[1] or gates[0] != (problem.gate is not None):
        raise ValueError(
            message(
                "E8",
                "gates",
                f"gate_q {gates[0]}, gate_k {gates[1]}, gate {problem.gate!r}",
                "all or none",
            )
        )
    if problem.gate_threshold > 0 and problem.gate is None:
        raise ValueError(message("E8", "gate_threshold", problem.gate_threshold, "0 without gates"))
    if problem.form == Form.PACKED:
        for name in ("mask", "block_map"):
            if getattr(tensors, name) is not None:
                raise ValueError(message("E8", name, "a tensor", "None in the packed form"))
        if problem.bias is not None and problem.bias[2] != 1:
            raise ValueError(
                message("E8", "bias", problem.bias, "a key bias (row dim 1) in the packed form")
            )
    if tensors.page_table is not None and tensors.cache_seqlens is None:
        raise ValueError(message("E8", "page_table", "no cache_seqlens", "cache_seqlens beside it"))
    cache_only = [
        name
        for name in ("cache_seqlens", "page_table", "key_indices")
        if getattr(tensors, name) is not None
    ]
    if problem.form != Form.CACHE and cache_only:
        raise ValueError(
            message(
                "E8", ", ".join(cache_only), f"given in the {problem.form} form", "the cache form"
            )
        )
