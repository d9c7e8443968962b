"""The Triton backend: every rule of the specification, forward and backward, on NVIDIA GPUs.

Importing this module needs torch alone; the kernels, and Triton with them, are imported by the
first call.
"""

from __future__ import annotations

import os
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from importlib import metadata, util
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from flash_sparse_attn import capability
from flash_sparse_attn.problem import AttentionProblem, Form
from flash_sparse_attn.tensors import AttentionTensors

CAPABILITY = capability.load(Path(__file__).with_name("capability.toml"))
OLDEST_TRITON = (3, 5)
NUMPY_TOO_NEW = (2, 4)


def interpreted() -> bool:
    """Whether Triton runs its kernels in its interpreter, on the CPU (`TRITON_INTERPRET=1` before
    the first call).
    """
    return os.environ.get("TRITON_INTERPRET") == "1"


def availability() -> list[str]:
    """Triton missing or too old; no CUDA device, unless kernels are interpreted."""
    found = []
    version = _version("triton")
    if version is None:
        found.append("the package 'triton' is not installed: pip install 'triton>=3.5'")
    elif _release(version) < OLDEST_TRITON:
        found.append(
            f"triton {version} is installed, 3.5 or later is needed: pip install -U triton"
        )
    if interpreted():
        # Under numpy 2.4 the interpreter of Triton up to 3.6 can no longer turn its scalars into
        # loop bounds.
        numpy = _version("numpy")
        if numpy is None or _release(numpy) >= NUMPY_TOO_NEW:
            found.append(
                f"Triton's interpreter needs numpy below 2.4, got {numpy}: pip install 'numpy<2.4'"
            )
    elif not torch.cuda.is_available():
        found.append("torch sees no CUDA device")
    return found


def unsupported(problem: AttentionProblem) -> list[str]:
    """Every reason in `capability.toml` against the problem.

    The interpreter serves CPU tensors, float16 and float32 ones.
    """
    found = []
    if problem.grads and problem.form == Form.CACHE:
        found.append(f"gradients of {', '.join(problem.grads)} are not defined in the cache form")
    if not interpreted():
        return found + capability.reasons(CAPABILITY, problem)
    found += capability.reasons(CAPABILITY, replace(problem, device="cuda", arch=None))
    if problem.device != "cpu":
        found.append(f"tensors are on {problem.device!r} and Triton's interpreter runs on the CPU")
    if problem.dtype == torch.bfloat16:
        found.append("Triton's interpreter does not round to bfloat16")
    return found


def forward(
    problem: AttentionProblem, tensors: AttentionTensors
) -> tuple[Tensor, Tensor, Tensor | None]:
    """`(o, lse, kept)` by O1, O2 and T1."""
    if problem.form == Form.CACHE:
        from .kernels.decode import decode as attend
    else:
        from .kernels import forward as kernels

        attend = kernels.forward
    with _on_device_of(tensors.q):
        return attend(problem, tensors)


def backward(
    problem: AttentionProblem,
    tensors: AttentionTensors,
    o: Tensor,
    lse: Tensor,
    kept: Tensor | None,
    do: Tensor,
    dlse: Tensor | None,
) -> dict[str, Tensor]:
    """The gradients named in `problem.grads` by G1, always bitwise repeatable (G2)."""
    from .kernels import backward as kernels

    with _on_device_of(tensors.q):
        return kernels.backward(problem, tensors, o, lse, kept, do, dlse)


def topk_intervals(
    scores: Tensor,
    seqlen_q: int,
    window_size: int,
    causal: bool,
    key_padding_mask: Tensor | None,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """`(start, end)` by M5 for float16, bfloat16 and float32 scores `[{B,1}, {Hkv,1}, Sk]`."""
    from .kernels import selection as kernels

    with _on_device_of(scores):
        return kernels.topk_intervals(
            scores, seqlen_q, window_size, causal, key_padding_mask, cu_seqlens
        )


def admit(
    key_cache: Tensor,
    value_cache: Tensor,
    score_cache: Tensor,
    position: Tensor,
    held: Tensor,
    seqlen: Tensor,
    key: Tensor,
    value: Tensor,
    scores: Tensor,
    key_padding_mask: Tensor | None,
) -> None:
    """One token for a cache of the w best keys (M5), in place; scores are float32."""
    from .kernels import admission as kernels

    with _on_device_of(key):
        kernels.admit(
            key_cache, value_cache, score_cache, position, held, seqlen, key, value, scores,
            key_padding_mask,
        )  # fmt: skip


def info() -> dict[str, Any]:
    """Version of Triton, None where it is missing, and where it keeps compiled kernels."""
    return {
        "triton": _version("triton"),
        "interpreted": interpreted(),
        "cache": os.environ.get("TRITON_CACHE_DIR", str(Path.home() / ".triton" / "cache")),
    }


def _version(package: str) -> str | None:
    return metadata.version(package) if util.find_spec(package) else None


def _release(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split(".")[:2])


def _on_device_of(tensor: Tensor) -> AbstractContextManager[Any]:
    index = tensor.get_device()  # -1 on the CPU
    if index < 0 or index == torch.cuda.current_device():
        return nullcontext()
    return torch.cuda.device(index)
