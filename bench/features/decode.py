"""Decoding: a few new rows over a cache of keys and values, bound by reading it (V6)."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.bias import causal_lower_right
from torch.nn.functional import scaled_dot_product_attention

from flash_sparse_attn import flash_sparse_attn_with_kvcache_func

from ..peers import Peer, Prepared, heads_first
from .contenders import Other, cuda_only, ours
from .question import FeatureCase, Normal, Question

QUANTITIES = ("forward",)


@dataclass(frozen=True, kw_only=True)
class Case(FeatureCase):
    """`batch` sequences of `seqlen` keys in use.

    Attributes:
        seqlen_q: Sq, new rows.
        page: keys of a page, in random order of pages; None = a contiguous cache.
        indices: n of key indices `[B, Hkv, n]`, distinct, in random order; None = all keys.
    """

    seqlen_q: int = 1
    page: int | None = None
    indices: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.page is not None and self.seqlen % self.page:
            raise ValueError(f"page: got {self.page} beside seqlen {self.seqlen}")
        if self.indices is not None and not 0 < self.indices <= self.seqlen:
            raise ValueError(f"indices: got {self.indices} beside seqlen {self.seqlen}")
        if not self.causal:
            raise ValueError("causal: got false, expected true: the new rows are the last")

    @property
    def name(self) -> str:
        """One line that tells cases apart."""
        words = [f"B{self.batch} Sq{self.seqlen_q} Sk{self.seqlen} {self.heads}"]
        words += [f"page={self.page}"] if self.page else []
        words += [f"indices={self.indices}"] if self.indices else []
        return " ".join(words)

    @property
    def scores(self) -> int:
        return self.batch * self.heads_q * self.seqlen_q * self.seqlen


@dataclass(frozen=True, eq=False, kw_only=True)
class Cache(Question):
    """`k` and `v` contiguous, `[B, Sk, Hkv, D]`.

    Attributes:
        lengths: int32 `[B]`, all Sk.
        indices: int32 `[B, Hkv, n]`, or None.
    """

    lengths: Tensor
    indices: Tensor | None

    def visibility(self, rows: Tensor) -> Tensor:
        """V1 and V6."""
        seen = super().visibility(rows)
        if self.indices is None:
            return seen
        batch, seqlen_k, heads_kv = self.k.shape[:3]
        listed = seen.new_zeros((batch, heads_kv, seqlen_k)).scatter_(2, self.indices.long(), True)
        return seen & listed[:, :, None]

    @property
    def traffic(self) -> int:
        """Keys and values that some row sees, each read once."""
        batch, seqlen_k, heads_kv, head_dim = self.k.shape
        kept = seqlen_k if self.indices is None else self.indices.shape[2]
        return 2 * batch * heads_kv * kept * head_dim * self.k.itemsize


def build(case: Case, device: torch.device, requires_grad: bool) -> Cache:
    """Random tensors; a cache has no gradient."""
    normal = Normal(case, device, requires_grad=False)
    indices = None
    if case.indices is not None:
        order = torch.rand(
            (case.batch, case.heads_kv, case.seqlen), generator=normal.generator, device=device
        )
        indices = order.topk(case.indices).indices.int()
    return Cache(
        **normal.qkv(case.batch, case.seqlen_q, case.seqlen),
        causal=case.causal,
        lengths=torch.full((case.batch,), case.seqlen, dtype=torch.int32, device=device),
        indices=indices,
    )


def paged(x: Tensor, page: int, table: Tensor) -> Tensor:
    """`[B, Sk, Hkv, D]` laid out as `[pages, page, Hkv, D]` by a table `[B, Sk / page]`."""
    pages = torch.empty_like(x).view(-1, page, *x.shape[2:])
    pages[table.flatten().long()] = x.reshape(pages.shape)
    return pages


def peers() -> tuple[Peer, ...]:
    """Ours, paged where the case is; SDPA; a reduction that reads as many bytes."""
    return (
        *ours(_paged, {"contiguous": (_contiguous, _only_of_pages)}),
        _sdpa("sdpa-flash", SDPBackend.FLASH_ATTENTION),
        _sdpa("sdpa-cudnn", SDPBackend.CUDNN_ATTENTION),
        _sdpa("sdpa-flash-dense", SDPBackend.FLASH_ATTENTION, "dense"),
        Other("read", _read, lambda case, device: None, question="read"),
    )


def _only_of_pages(case: Case) -> str | None:
    return None if case.page else "the case's own cache is contiguous"


def _paged(case: Case, cache: Cache, backend: str) -> Prepared:
    if case.page is None:
        return _ours(cache, backend, cache.k, cache.v, None)
    count, device = case.batch * case.seqlen // case.page, cache.k.device
    generator = torch.Generator(device).manual_seed(case.seed)
    order = torch.randperm(count, generator=generator, device=device)
    table = order.view(case.batch, -1).int()
    k, v = (paged(x, case.page, table) for x in (cache.k, cache.v))
    return _ours(cache, backend, k, v, table)


def _contiguous(case: Case, cache: Cache, backend: str) -> Prepared:
    ready = _ours(cache, backend, cache.k, cache.v, None)
    return replace(ready, answers=(replace(case, page=None), cache))


def _ours(cache: Cache, backend: str, k: Tensor, v: Tensor, table: Tensor | None) -> Prepared:
    def forward() -> Tensor:
        return flash_sparse_attn_with_kvcache_func(
            cache.q,
            k,
            v,
            cache_seqlens=cache.lengths,
            page_table=table,
            attn_indices=cache.indices,
            backend=backend,
        )

    return Prepared(forward)


def _sdpa(name: str, kernel: SDPBackend, question: str = "") -> Other:
    def missing(case: Case, device: torch.device) -> str | None:
        if case.page:
            return "takes no pages"
        if (case.indices is not None) != (question == "dense"):
            return "takes no key indices" if case.indices else "the case is dense"
        if case.seqlen_q > 1 and kernel is not SDPBackend.FLASH_ATTENTION:
            return "aligns several rows to the first keys"
        return cuda_only(device) if kernel is SDPBackend.CUDNN_ATTENTION else None

    def prepare(case: Case, cache: Cache) -> Prepared:
        grouped = case.heads_q != case.heads_kv
        # One row sees every key.
        mask = causal_lower_right(case.seqlen_q, case.seqlen) if case.seqlen_q > 1 else None

        def forward() -> Tensor:
            q, k, v = (heads_first(x) for x in (cache.q, cache.k, cache.v))
            held = sdpa_kernel(kernel) if mask is None else contextlib.nullcontext()
            with held:
                o = scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=grouped)
            return heads_first(o)

        dense = replace(case, indices=None), replace(cache, indices=None)
        return Prepared(forward, answers=dense if question else None)

    return Other(name, prepare, missing, question)


def _read(case: Case, cache: Cache) -> Prepared:
    # Of float32, whatever the dtype: the reduction is then bound by memory alone.
    buffer = torch.zeros(cache.traffic // 4, dtype=torch.float32, device=cache.k.device)
    return Prepared(buffer.sum, checked=False)
