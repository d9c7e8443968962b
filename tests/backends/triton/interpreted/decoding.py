"""Random calls of the cache form, judged by the reference in float64.

What may not be read holds NaN, and table entries that lead to it hold numbers far out of range.
"""

from __future__ import annotations

import math
import random
from dataclasses import dataclass, field
from typing import Any

import torch
from flash_sparse_attn.backends.triton.kernels import decode as kernels
from flash_sparse_attn.reference.cached import sequence_terms
from torch import Tensor

from flash_sparse_attn import reference, reference_backend
from flash_sparse_attn.problem import KEPT_BLOCK, AttentionOptions, AttentionProblem, Form, Gate
from flash_sparse_attn.tensors import AttentionTensors
from flash_sparse_attn.validation import describe

TOLERANCE = {
    torch.float64: 1e-12,
    torch.float32: 2e-5,
    torch.float16: 3e-3,
    torch.bfloat16: 2e-2,
}
"""Largest error of o, as a share of one more than the largest magnitude."""
LSE_TOLERANCE = 2e-5
PROBABILITY = {torch.float64: 1e-9, torch.float32: 1e-4, torch.float16: 1e-3, torch.bfloat16: 1e-3}
"""Relative error of the probabilities that T1 compares."""
FAR = 2**30
"""A page that is not there."""


@dataclass
class CacheCall:
    """A call of the cache form.

    Attributes:
        tensors: what the call gets.
        options: of the call.
        clean: k and v `[B, Sk, Hkv, D]` on the logical key axis, finite everywhere.
    """

    tensors: AttentionTensors
    options: AttentionOptions
    clean: tuple[Tensor, Tensor]
    problem: AttentionProblem = field(init=False)

    def __post_init__(self) -> None:
        self.problem = describe(self.tensors, self.options)

    def failures(self, cut: kernels.Plan | None = None) -> list[str]:
        """Every way in which the kernels break O1, O2 or T1 on this call."""
        o, lse, kept = kernels.decode(self.problem, self.tensors, cut)
        return self.judge(o, lse, kept)

    def judge(self, o: Tensor, lse: Tensor, kept: Tensor | None) -> list[str]:
        """Every way in which results break O1, O2 or T1."""
        found = []
        elements = None
        if kept is not None:
            elements = self.kept_pairs(kept)
            found += self.wrong_drops(elements)
        want_o, want_lse = self.exact(elements)
        dtype = self.tensors.q.dtype
        found += _difference("o", o, want_o, TOLERANCE[dtype])
        found += _difference("lse", lse, want_lse, min(LSE_TOLERANCE, TOLERANCE[dtype]))
        if not (o.is_contiguous() and lse.is_contiguous()):
            found.append("outputs are not contiguous")
        if o.dtype != dtype or (lse.dtype != want_lse.dtype and dtype == torch.float64):
            found.append(f"dtypes {o.dtype}, {lse.dtype}")
        return found

    def exact(self, kept: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """(o, lse) of the reference in float64."""
        qkv, keywords = self._reference()
        return reference.attention_cached(*qkv, **keywords, kept=kept)

    def kept_pairs(self, kept: Tensor) -> Tensor:
        """Bits to elements, bool `[B, Hq, Sq, Sk]`."""
        n = torch.arange(-(-self.problem.seqlen_k // KEPT_BLOCK[1]), device=kept.device)
        blocks = (kept[..., n // 32] >> n % 32) & 1 != 0
        sizes = self.problem.seqlen_q, self.problem.seqlen_k
        return reference.expand_kept(blocks, KEPT_BLOCK, *sizes)

    def probabilities(self) -> list[tuple[Tensor, Tensor]]:
        """Of each sequence (P of the full softmax, visible pairs), `[1, Hq, Sq, length]`."""
        (q, _, _), keywords = self._reference()
        cache = {name: keywords.pop(name, None) for name in ("cache_seqlens", "key_indices")}
        lengths = [self.problem.seqlen_k] * self.problem.batch
        if cache["cache_seqlens"] is not None:
            lengths = cache["cache_seqlens"].tolist()
        found = []
        for b, length in enumerate(lengths):
            terms = sequence_terms(reference.Terms(**keywords), b, length)
            given = {name: getattr(terms, name) for name in terms.__dataclass_fields__}
            keys = self.clean[0][b : b + 1, :length].double()
            found.append(reference.final_probability(q[b : b + 1], keys, **given))
        return found

    def wrong_drops(self, kept: Tensor) -> list[str]:
        """T1: what was dropped that may not be, or, without key lists, kept that could be."""
        share, found = self.options.softmax_threshold, []
        slack = PROBABILITY[self.tensors.q.dtype]
        if self.tensors.key_indices is not None:
            return [] if kept.all() else ["a block of a call with key lists was dropped"]
        for b, (p, visible) in enumerate(self.probabilities()):
            own = kept[b : b + 1, ..., : p.shape[3]]
            if not reference.check_kept(own, p, visible, share, slack).all():
                found.append(f"sequence {b} lost what it may not")
            certain = reference.droppable(p, visible, share * (1 - slack), KEPT_BLOCK)
            spare = reference.expand_kept(certain, KEPT_BLOCK, *p.shape[2:]) & visible
            if (spare & own).any():
                found.append(f"sequence {b} kept what may be dropped")
        return found

    def _reference(self) -> tuple[list[Tensor], dict[str, Any]]:
        keywords = reference_backend._keywords(self.problem, self.tensors)
        keywords.pop("page_table", None)
        wide = ("bias", "gate_q", "gate_k")
        keywords |= {name: keywords[name].double() for name in wide if name in keywords}
        return [x.double() for x in (self.tensors.q, *self.clean)], keywords


def random_call(
    seed: int,
    dtype: torch.dtype,
    device: str = "cpu",
    seqlens_q: tuple[int, ...] = (1, 1, 1, 2, 5, 17, 33),
    seqlens_k: tuple[int, ...] = (1, 40, 100, 200, 1100),
    dims: tuple[int, ...] = (1, 8, 16, 33),
    terms: tuple[str, ...] | None = None,
) -> CacheCall:
    """A call drawn from a seed; with `terms`, exactly these of `TERMS`."""
    rng = random.Random(seed)
    generator = torch.Generator().manual_seed(seed)

    def normal(*sizes: int) -> Tensor:
        return torch.randn(sizes, generator=generator)

    def integers(low: int, high: int, *sizes: int) -> Tensor:
        return torch.randint(low, high, sizes, generator=generator, dtype=torch.int32)

    def has(name: str, share: float) -> bool:
        drawn = rng.random() < share
        return drawn if terms is None else name in terms

    batch, heads_kv, group = rng.choice([1, 2, 3]), rng.choice([1, 2]), rng.choice([1, 2, 3, 4, 20])
    heads = heads_kv * group
    seqlen_q, seqlen_k = rng.choice(seqlens_q), rng.choice(seqlens_k)
    dim = rng.choice(dims)
    dim_v = rng.choice([dim, dim, *dims])
    page = 0
    if has("pages", 0.4):
        page = rng.choice([1, 3, 16, 32, 64, 100])
        seqlen_k = -(-seqlen_k // page) * page
    lengths = None
    if page or has("lengths", 0.7):
        lengths = integers(0, seqlen_k + 1, batch)
        lengths[rng.randrange(batch)] = rng.choice([0, 1, seqlen_k])
    q = normal(batch, seqlen_q, heads, dim) * rng.choice([1, 1, 3])
    clean = [normal(batch, seqlen_k, heads_kv, x) for x in (dim, dim_v)]
    given: dict[str, Tensor] = {}
    options: dict[str, Any] = {
        "softmax_scale": rng.choice([dim**-0.5, dim**-0.5, 0.5, -0.3]),
        "causal": has("causal", 0.6),
    }

    def some(*sizes: int) -> tuple[int, ...]:
        b, h, *rest = sizes
        return (
            rng.choice([1, b]),
            rng.choice([1, heads_kv, h]),
            *(rng.choice([1, size, size]) for size in rest),
        )

    full = (batch, heads, seqlen_q, seqlen_k)
    if has("softcap", 0.2):
        options["softcap"] = 2.0
    if has("window", 0.3):
        options["window_left"] = rng.choice([None, 0, 10, 70, 5000])
        options["window_right"] = rng.choice([None, 0, 3])
        options["sinks"] = rng.choice([0, 0, 3, 70])
    if has("mask", 0.25):
        given["mask"] = torch.rand(some(*full), generator=generator) < 0.6
    if has("bias", 0.25):
        bias = normal(*some(*full)).to(dtype if rng.random() < 0.5 else torch.float32)
        given["bias"] = bias
    if has("intervals", 0.2):
        shape = (rng.choice([1, batch]), rng.choice([1, heads_kv]), seqlen_k)
        given["interval_start"] = integers(-3, seqlen_q + 1, *shape)
        given["interval_end"] = integers(0, seqlen_q + 3, *shape)
    if has("block_map", 0.2):
        rows, keys = rng.choice([(1, 16), (4, 7), (64, 128)])
        options |= {"block_size_q": rows, "block_size_k": keys}
        shape = (rng.choice([1, batch]), rng.choice([1, heads_kv, heads]))
        shape += (-(-seqlen_q // rows), -(-seqlen_k // keys))
        given["block_map"] = torch.rand(shape, generator=generator) < 0.6
    if has("gates", 0.3):
        options["gate"] = rng.choice(list(Gate))
        options["gate_threshold"] = rng.choice([0.0, 0.3, 1.0])
        given["gate_q"] = normal(batch, seqlen_q, heads).to(dtype)
        given["gate_k"] = normal(batch, seqlen_k, heads_kv).to(dtype)
    if has("threshold", 0.25):
        options["softmax_threshold"] = rng.choice([0.05, 0.5, 1.0])
        q = q * 3
    read = torch.ones(batch, seqlen_k, heads_kv, dtype=torch.bool)
    if lengths is not None:
        given["cache_seqlens"] = lengths
        read &= (torch.arange(seqlen_k) < lengths[:, None])[..., None]
    if has("indices", 0.3):
        count = rng.choice([1, 7, 64, 200])
        listed = integers(-1, seqlen_k + 5, batch, heads_kv, count)
        given["key_indices"] = listed
        j = torch.arange(seqlen_k)
        read &= (listed[..., None] == j).any(2).transpose(1, 2)
    clean = [x.to(dtype) for x in clean]
    k, v = (x.masked_fill(~read[..., None], math.nan) for x in clean)
    if page:
        k, v, given["page_table"] = _in_pages(k, v, page, lengths, generator)
    q, k, v = (_placed(rng, x.to(dtype)) for x in (q, k, v))
    tensors = {name: x.to(device) for name, x in {"q": q, "k": k, "v": v, **given}.items()}
    return CacheCall(
        AttentionTensors(**tensors),
        AttentionOptions(form=Form.CACHE, **options),
        tuple(x.to(device) for x in clean),
    )


def _in_pages(
    k: Tensor, v: Tensor, page: int, lengths: Tensor, generator: torch.Generator
) -> tuple[Tensor, Tensor, Tensor]:
    """k, v cut into pages in some order, and the table; entries past a length lead nowhere."""
    batch, count = k.shape[0], k.shape[1] // page
    table = torch.randperm(batch * count + 1, generator=generator)[: batch * count]
    table = table.view(batch, count)
    pages = [x.new_full((batch * count + 1, page, *x.shape[2:]), math.nan) for x in (k, v)]
    for whole, x in zip(pages, (k, v), strict=True):
        whole[table.flatten()] = x.reshape(-1, page, *x.shape[2:])
    used = torch.arange(count) * page < lengths[:, None]
    table = torch.where(used, table, torch.where(torch.arange(count) % 2 == 0, FAR, -FAR))
    return *pages, table.int()


def _placed(rng: random.Random, x: Tensor) -> Tensor:
    """x in some memory layout."""
    kind = rng.choice(["plain", "plain", "heads first", "padded", "strided"])
    if kind == "heads first":
        return x.transpose(1, 2).contiguous().transpose(1, 2)
    if kind == "padded":
        return torch.nn.functional.pad(x, (0, 3))[..., : x.shape[3]]
    if kind == "strided":
        return x.repeat_interleave(2, -1)[..., ::2]
    return x


def _difference(name: str, x: Tensor, y: Tensor, tolerance: float) -> list[str]:
    x, y = x.double(), y.double()
    finite = y.isfinite()
    if not torch.equal(x.isfinite(), finite):
        wrong = int((x.isfinite() != finite).sum())
        return [f"{name}: {wrong} of {x.numel()} elements inf or nan where not due"]
    if not torch.equal(x[~finite].nan_to_num(math.pi), y[~finite].nan_to_num(math.pi)):
        return [f"{name}: inf and nan are not those of the reference"]
    if not finite.any():
        return []
    error = float((x - y)[finite].abs().max())
    allowed = tolerance * (1 + float(y[finite].abs().max()))
    return [] if error <= allowed else [f"{name}: error {error:.2e} > {allowed:.2e}"]
