"""`python -m flash_sparse_attn demo`: dynamic-mask attention, forward and backward.

Each row attends to the w keys with the largest bias among those it can see (M5), and the bias is
added to the scores and gets a gradient (dynamic mask attention, arXiv 2508.02124). The demo says
which backend ran and why the others did not, checks the result by rule N1, and sets time and memory
beside those of the same function on a dense mask, `scaled_dot_product_attention`.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from . import dispatch, reference, registry, spec
from .api import flash_sparse_attn_func
from .masks import IntervalMask
from .problem import AttentionOptions, AttentionProblem
from .tensors import AttentionTensors
from .validation import describe

INPUTS = ("q", "k", "v", "bias")
REPEATS = {"cpu": 3, "cuda": 20}
"""Timed passes."""

CHECK_SEQLEN = 1024
"""Longest sequence on which the float64 reference, O(N²), is run."""


@dataclass(frozen=True)
class Setting:
    """Sizes of the demonstration; B = 1, Sq = Sk = seqlen, key bias `[1, heads_kv, 1, seqlen]`."""

    device: str
    dtype: str
    seqlen: int
    heads_q: int
    heads_kv: int
    head_dim: int
    window_size: int

    def __str__(self) -> str:
        heads = f"H{self.heads_q}/{self.heads_kv}"
        return (
            f"B1 S{self.seqlen} {heads} D{self.head_dim} {self.dtype} on {self.device}, "
            f"the best {self.window_size} keys of each row"
        )


SETTINGS = {
    "cpu": Setting("cpu", "float32", 512, 4, 2, 64, 64),
    "cuda": Setting("cuda", "bfloat16", 8192, 16, 4, 128, 512),
}


def run(setting: Setting, backend: str | None) -> dict[str, Any]:
    """Everything that the demo tells, as plain data.

    Args:
        setting: the sizes.
        backend: a backend's name, or None for the first that serves the call.

    Raises:
        ImportError, NotImplementedError: as `dispatch.select` (E9).
    """
    inputs = make_inputs(setting)
    problem = _problem(inputs, keep_best(inputs, setting))
    chosen = dispatch.select(problem, backend)
    return {
        "setting": asdict(setting),
        "backend": chosen.__name__.removesuffix("_backend").rpartition(".")[2],
        "not_run": {name: _against(name, problem) for name in registry.names()},
        "check": check(replace(setting, seqlen=min(setting.seqlen, CHECK_SEQLEN)), backend),
        "mask_bytes": {
            "intervals": 2 * 4 * setting.heads_kv * setting.seqlen,
            "dense": setting.heads_kv * setting.seqlen**2,
        },
        "sparse": measure(
            lambda: keep_best(inputs, setting), lambda mask: sparse(inputs, mask, backend), inputs
        ),
        "dense": measure(
            lambda: dense_bias(inputs, keep_best(inputs, setting)),
            lambda bias: dense(inputs, bias),
            inputs,
        ),
    }


def make_inputs(setting: Setting) -> dict[str, Tensor]:
    """Normal q, k, v and a key bias, all with gradients."""
    generator = torch.Generator(setting.device).manual_seed(0)
    shapes = {
        "q": (1, setting.seqlen, setting.heads_q, setting.head_dim),
        "k": (1, setting.seqlen, setting.heads_kv, setting.head_dim),
        "v": (1, setting.seqlen, setting.heads_kv, setting.head_dim),
        "bias": (1, setting.heads_kv, 1, setting.seqlen),
    }
    return {
        name: torch.randn(
            shape,
            generator=generator,
            device=setting.device,
            dtype=getattr(torch, setting.dtype),
            requires_grad=True,
        )
        for name, shape in shapes.items()
    }


def keep_best(inputs: dict[str, Tensor], setting: Setting) -> IntervalMask:
    """The mask: each row's best keys among those it can see, in two integers a key (M5)."""
    return IntervalMask.topk(inputs["bias"].squeeze(2), setting.window_size)


def sparse(inputs: dict[str, Tensor], mask: IntervalMask, backend: str | None) -> Tensor:
    """The library's way; the mask is causal by construction."""
    q, k, v, bias = inputs.values()
    return flash_sparse_attn_func(q, k, v, attn_mask=mask, attn_bias=bias, backend=backend)


def dense_bias(inputs: dict[str, Tensor], mask: IntervalMask) -> Tensor:
    """Mask and bias in one, `[1, Hq, S, S]`: the bias where a row keeps the key, elsewhere -inf."""
    visible = mask.to_dense(inputs["q"].shape[1])
    return _per_query_head(torch.where(visible, inputs["bias"], -torch.inf), inputs)


def dense(inputs: dict[str, Tensor], bias: Tensor) -> Tensor:
    """The same function by torch's fused attention, which computes every pair."""
    q, k, v, _ = (x.transpose(1, 2) for x in inputs.values())
    k, v = (_per_query_head(x, inputs) for x in (k, v))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=bias).transpose(1, 2)


def eager(inputs: dict[str, Tensor], bias: Tensor) -> Tensor:
    """The textbook computation of N1: products in the dtype of the inputs, softmax in float32."""
    q, k, v, _ = (x.transpose(1, 2) for x in inputs.values())
    k, v = (_per_query_head(x, inputs) for x in (k, v))
    s = (q @ k.transpose(2, 3)).float() * q.shape[-1] ** -0.5 + bias.float()
    return (torch.softmax(s, 3).to(q.dtype) @ v).transpose(1, 2)


def check(setting: Setting, backend: str | None) -> dict[str, Any]:
    """N1: the largest error of o and of each gradient against float64, and its bound."""
    inputs = make_inputs(setting)
    mask = keep_best(inputs, setting)
    o = sparse(inputs, mask, backend)
    do = torch.randn_like(o)
    got = _with_gradients(o, inputs, do)
    textbook = _with_gradients(eager(inputs, dense_bias(inputs, mask)), inputs, do)

    exact = {name: x.detach().double() for name, x in inputs.items()}
    keywords = {"bias": exact["bias"], "interval_start": mask.start, "interval_end": mask.end}
    q, k, v = (exact[name] for name in "qkv")
    want = {"o": reference.attention(q, k, v, **keywords)[0]}
    gradients = reference.attention_backward(do.double(), None, q, k, v, **keywords)
    want |= {f"d{name}": gradients[name] for name in INPUTS}

    floor = spec.tolerances()[setting.dtype]
    errors = {}
    for name, x64 in want.items():
        error, error_eager = (float((x[name].double() - x64).abs().max()) for x in (got, textbook))
        errors[name] = {"error": error, "bound": 2 * error_eager + floor[name]}
    passed = all(found["error"] <= found["bound"] for found in errors.values())
    return {"seqlen": setting.seqlen, "errors": errors, "passed": passed}


def measure(
    make_mask: Callable[[], Any], forward: Callable[[Any], Tensor], inputs: dict[str, Tensor]
) -> dict[str, float | int | None]:
    """Median milliseconds of each step, and the peak memory of one pass in bytes.

    The peak is of what is allocated on top of the inputs. None everywhere: memory ran out.
    """
    device = inputs["q"].device
    steps = ("mask_ms", "forward_ms", "backward_ms")
    passes: list[list[float]] = []

    def one_pass() -> None:
        ticks = [_clock(device)]
        mask = make_mask()
        ticks.append(_clock(device))
        o = forward(mask)
        ticks.append(_clock(device))
        torch.autograd.grad(o, list(inputs.values()), torch.ones_like(o))
        ticks.append(_clock(device))
        passes.append([1e3 * (after - before) for before, after in itertools.pairwise(ticks)])

    try:
        peak = _peak_bytes(one_pass, device)
        passes.clear()  # the first pass warmed up
        for _ in range(REPEATS[device.type]):
            one_pass()
    except torch.OutOfMemoryError:
        return dict.fromkeys((*steps, "peak_bytes"))
    medians = (statistics.median(samples) for samples in zip(*passes, strict=True))
    return dict(zip(steps, medians, strict=True)) | {"peak_bytes": peak}


def render(found: dict[str, Any]) -> str:
    """The text form of `run`'s answer."""
    lines = [
        f"dynamic-mask attention: {Setting(**found['setting'])}",
        f"ran on    {found['backend']}",
    ]
    if found["backend"] == registry.REFERENCE:
        lines.append("          the O(N^2) definition in plain PyTorch, not a kernel: it saves")
        lines.append("          neither time nor memory, and shows that the result is right")
    for name, reasons in found["not_run"].items():
        if name != found["backend"]:
            reasons = reasons or ["a backend that comes before it, or was named, ran"]
            lines += [f"not on    {name}: {reason}" for reason in reasons]
    checked = found["check"]
    lines.append(f"checked   against float64 at S {checked['seqlen']}, largest errors (rule N1):")
    for name, error in checked["errors"].items():
        verdict = "ok" if error["error"] <= error["bound"] else "TOO LARGE"
        lines.append(
            f"          {name:<6}{error['error']:.1e}, allowed {error['bound']:.1e}  {verdict}"
        )
    heads = ("making mask", "forward", "backward", "peak memory")
    lines.append("median    " + "".join(f"{head:>15}" for head in heads))
    for name in ("sparse", "dense"):
        *times, peak = found[name].values()
        cells = [*(f"{x:.2f} ms" for x in times), _mebibytes(peak)] if peak else ["out of memory"]
        lines.append(f"{name:<10}" + "".join(f"{cell:>15}" for cell in cells))
    intervals, tensor = (_mebibytes(found["mask_bytes"][x]) for x in ("intervals", "dense"))
    lines.append(f"mask      {intervals} as intervals, {tensor} as a boolean tensor")
    lines.append("dense     torch's scaled_dot_product_attention, mask and bias in one tensor")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the demo. Returns 0, or 1 if the check fails, or 2 if the backend cannot run it."""
    parser = argparse.ArgumentParser(
        prog="python -m flash_sparse_attn demo",
        description="Dynamic-mask attention, forward and backward, checked against the reference.",
    )
    default = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", choices=tuple(SETTINGS), default=default)
    parser.add_argument("--seqlen", type=_positive, help="S; default fit for the device")
    parser.add_argument(
        "--backend",
        choices=(*registry.names(), registry.REFERENCE),
        help="run this one; default: the first that serves the call",
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    options = parser.parse_args(argv)
    setting = SETTINGS[options.device]
    if options.seqlen is not None:
        setting = replace(setting, seqlen=options.seqlen)
    try:
        found = run(setting, options.backend)
    except (ImportError, NotImplementedError) as error:
        print(f"{parser.prog}: {error}", file=sys.stderr)
        return 2
    print(json.dumps(found, indent=2) if options.json else render(found))
    return 0 if found["check"]["passed"] else 1


def _problem(inputs: dict[str, Tensor], mask: IntervalMask) -> AttentionProblem:
    q, k, v, bias = inputs.values()
    tensors = AttentionTensors(q, k, v, bias=bias, interval_start=mask.start, interval_end=mask.end)
    return describe(tensors, AttentionOptions(softmax_scale=q.shape[-1] ** -0.5), INPUTS)


def _against(name: str, problem: AttentionProblem) -> list[str]:
    """Every reason against a backend, in this process and for this problem."""
    return registry.availability(name) or registry.load(name).unsupported(problem)


def _per_query_head(x: Tensor, inputs: dict[str, Tensor]) -> Tensor:
    """A tensor with a dim 1 of Hkv heads, repeated for the query heads of each group."""
    return x.repeat_interleave(inputs["q"].shape[2] // x.shape[1], dim=1)


def _with_gradients(o: Tensor, inputs: dict[str, Tensor], do: Tensor) -> dict[str, Tensor]:
    gradients = torch.autograd.grad(o, list(inputs.values()), do)
    return {"o": o.detach()} | dict(zip((f"d{x}" for x in INPUTS), gradients, strict=True))


def _clock(device: torch.device) -> float:
    """Seconds, once the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def _peak_bytes(call: Callable[[], None], device: torch.device) -> int:
    """The most bytes of tensors that were alive at once during a call, above those before it."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        call()
        return torch.cuda.max_memory_allocated(device) - before
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler's start and stop lines
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        call()
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    live = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    return peak


def _mebibytes(size: int) -> str:
    return f"{size / 2**20:.2f} MiB"


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"got {value}, expected an int >= 1")
    return value
