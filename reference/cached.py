"""Rule V6, cache form: per sequence a length, perhaps pages, perhaps a list of keys."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from .forward import attend
from .layout import to_query_heads
from .terms import Terms


def paged(pages: Tensor, page_table: Tensor, length: int) -> Tensor:
    """V6: the first `length` keys of a sequence, [length, ...].

    pages [P, page, ...]; page_table int [n] of the sequence. Entries past the length are not read.
    """
    size = pages.shape[1]
    used = page_table[: -(-length // size)].long()
    return pages[used].flatten(0, 1)[:length]


def listed(key_indices: Tensor, length: int) -> Tensor:
    """V6: bool [Hkv, length], the keys that key_indices [Hkv, n] names; other indices name none."""
    j = torch.arange(length, device=key_indices.device)
    return (key_indices.unsqueeze(2) == j).any(1)


def sequence_terms(terms: Terms, b: int, length: int) -> Terms:
    """The terms of sequence `b`, their key axis cut to its length."""

    def own(x: Tensor) -> Tensor:
        return x if x.shape[0] == 1 else x[b : b + 1]

    def own_keys(x: Tensor) -> Tensor:
        return own(x) if x.shape[-1] == 1 else own(x)[..., :length]

    cuts = {
        "mask": own_keys,
        "bias": own_keys,
        "kept": own_keys,
        "interval_start": lambda x: own(x)[..., :length],
        "interval_end": lambda x: own(x)[..., :length],
        "block_map": own,
        "gate_q": own,
        "gate_k": lambda x: own(x)[:, :length],
    }
    given = {name: getattr(terms, name) for name in cuts}
    return replace(terms, **{name: cuts[name](x) for name, x in given.items() if x is not None})


def attention_cached(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    cache_seqlens: Tensor | None = None,
    page_table: Tensor | None = None,
    key_indices: Tensor | None = None,
    **terms: Any,
) -> tuple[Tensor, Tensor]:
    """V6: `attention` of every sequence over the keys its cache holds; Sk is the sequence's length.

    Args:
        q: [B, Sq, Hq, D].
        k: [B, Sc, Hkv, D], or with page_table [P, page, Hkv, D].
        v: as k, last dimension Dv.
        cache_seqlens: int32 [B], keys in use; None means Sc. Read on the host.
        page_table: int32 [B, n]: key j is entry j % page of page page_table[b, j // page]. Entries
            past the length may hold anything.
        key_indices: int32 [B, Hkv, n]: only the keys listed are visible; -1 pads.
        **terms: as for `attention`, their key axis being the logical one, Sc or n * page.

    Returns:
        o [B, Sq, Hq, Dv] and lse [B, Hq, Sq].

    Raises:
        ValueError: page_table without cache_seqlens (E8), and as `attention`.
    """
    if page_table is not None and cache_seqlens is None:
        raise ValueError("page_table: got no cache_seqlens, expected them beside it [rule E8]")
    terms = Terms(**terms)
    batch, heads_q = q.shape[0], q.shape[2]
    lengths = [k.shape[1]] * batch if cache_seqlens is None else cache_seqlens.tolist()
    parts = []
    for b, length in enumerate(lengths):
        if page_table is None:
            keys, values = k[b, :length], v[b, :length]
        else:
            keys, values = (paged(x, page_table[b], length) for x in (k, v))
        own = sequence_terms(terms, b, length)
        if key_indices is not None:
            mask = to_query_heads(listed(key_indices[b], length)[None, :, None], heads_q)
            mask = mask if own.mask is None else mask & to_query_heads(own.mask, heads_q)
            own = replace(own, mask=mask)
        parts.append(attend(q[b : b + 1], keys[None], values[None], own))
    o, lse = zip(*parts, strict=True)
    return torch.cat(o), torch.cat(lse)
