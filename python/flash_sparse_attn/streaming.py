"""The cache of dynamic mask attention: the w best keys of a stream, at a cost that does not grow.

A key evicted from a causal top-w never returns (M5). The keys that any row to come can see are
therefore among the w best so far, and a decoder needs no others: memory, and the time of a token,
do not depend on how many tokens came before.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from . import registry
from .api import flash_sparse_attn_func, flash_sparse_attn_with_kvcache_func
from .masks import IntervalMask
from .selection import topk_intervals
from .validation import FLOAT_DTYPES, HEAD_DIM_MAX, message, require_tensor

UNUSED = -1
"""Position of a slot without a key."""

_library = torch.library.Library("flash_sparse_attn", "FRAGMENT")
_library.define(
    "admit(Tensor(a!) key_cache, Tensor(b!) value_cache, Tensor(c!) score_cache, "
    "Tensor(d!) position, Tensor(e!) held, Tensor(f!) seqlen, Tensor key, Tensor value, "
    "Tensor scores, Tensor? key_padding_mask) -> ()"
)


class DynamicMaskCache:
    """The w best keys of each sequence and kv head, with their values and scores; at first none.

    Best as in M5: by score, of equal scores the more recent, NaN last. All state is on the device,
    of a fixed size, and changed in place, so that a step can be captured in a CUDA graph and
    replayed. Tokens cannot be taken back: before a draft that may be rejected, `copy.deepcopy` it.

    Args:
        batch_size: B.
        window_size: w >= 1, slots of each sequence and kv head.
        num_kv_heads: Hkv.
        head_dim: D, 1 to 256.
        head_dim_v: Dv, 1 to 256. Default D.
        device: of all tensors; default: torch's.
        dtype: of keys and values; default: torch's. Scores are float32 (float64 for float64).

    Attributes:
        key: `[B, w, Hkv, D]`. Slots are in no order; the first `held` of them are used.
        value: `[B, w, Hkv, Dv]`.
        scores: `[B, Hkv, w]`.
        position: int32 `[B, Hkv, w]`, the token that the key is of, -1 in an unused slot.

    Raises:
        TypeError: a size is not an int, or the dtype not a floating one (E1, E3).
        ValueError: a size is out of range (E6, E7).
    """

    def __init__(
        self,
        batch_size: int,
        window_size: int,
        num_kv_heads: int,
        head_dim: int,
        head_dim_v: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        head_dim_v = head_dim if head_dim_v is None else head_dim_v
        dtype = torch.get_default_dtype() if dtype is None else dtype
        require_size("batch_size", batch_size, least=0)
        for name, size in (("window_size", window_size), ("num_kv_heads", num_kv_heads)):
            require_size(name, size)
        for name, size in (("head_dim", head_dim), ("head_dim_v", head_dim_v)):
            require_size(name, size)
            if size > HEAD_DIM_MAX:
                raise ValueError(message("E7", name, size, f"at most {HEAD_DIM_MAX}"))
        if dtype not in FLOAT_DTYPES:
            raise TypeError(message("E3", "dtype", dtype, f"one of {list(FLOAT_DTYPES)}"))
        slots, planes = (batch_size, window_size), (batch_size, num_kv_heads, window_size)
        wide = torch.promote_types(dtype, torch.float32)
        # Zeros, as a chunk's attention reads unused slots before it hides them.
        self.key = torch.zeros(*slots, num_kv_heads, head_dim, device=device, dtype=dtype)
        self.value = torch.zeros(*slots, num_kv_heads, head_dim_v, device=device, dtype=dtype)
        self.scores = torch.zeros(planes, device=device, dtype=wide)
        self.position = torch.full(planes, UNUSED, device=device, dtype=torch.int32)
        # A copy for every kv head, all equal: each head is updated by a program of its own, which
        # must not meet what another has written already.
        lengths = (num_kv_heads, batch_size)
        self._held = torch.zeros(lengths, device=device, dtype=torch.int32)
        self._seqlen = torch.zeros(lengths, device=device, dtype=torch.int32)

    @property
    def window_size(self) -> int:
        """w."""
        return self.key.shape[1]

    @property
    def held(self) -> Tensor:
        """int32 `[B]`, keys held: the smaller of w and the tokens so far that are no padding."""
        return self._held[0]

    @property
    def seqlen(self) -> Tensor:
        """int32 `[B]`, tokens so far, padding included: the position of the next one."""
        return self._seqlen[0]

    def reset(self) -> None:
        """Hold nothing, as a new cache does, in the same memory."""
        self.position.fill_(UNUSED)
        self._held.zero_()
        self._seqlen.zero_()

    def admit(
        self,
        key: Tensor,
        value: Tensor,
        scores: Tensor,
        key_padding_mask: Tensor | None = None,
    ) -> None:
        """Take n tokens: hold the w best keys of those held and these.

        One token is one kernel where a backend has it; nothing waits for the device.

        Args:
            key: `[B, n, Hkv, D]`, dtype of the cache, any strides.
            value: `[B, n, Hkv, Dv]`, likewise.
            scores: `[B, Hkv, n]`, dtype of the cache's.
            key_padding_mask: bool `[B, n]`, True = a token; the others are never held, but count
                as positions.

        Raises:
            TypeError: a kind or dtype is wrong (E1, E3).
            ValueError: a shape or device is wrong (E2, E4, E5).
            NotImplementedError: a gradient is asked for (E9). A cache takes none.
        """
        given = {"key": key, "value": value, "scores": scores}
        self._require(given, key_padding_mask)
        self._admit(key, value, scores, key_padding_mask)

    def attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        scores: Tensor,
        key_padding_mask: Tensor | None = None,
        softmax_scale: float | None = None,
        backend: str | None = None,
    ) -> Tensor:
        """Take n tokens and attend from their rows: what attention over all tokens so far gives.

        Row i sees the w best among the keys held and the first i + 1 of the new ones (M5), with
        their scores as bias (S4). A single token attends over the cache itself; several, a prompt
        say, over the w slots and their own keys.

        Args:
            query: `[B, n, Hq, D]`, dtype of the cache; Hq is a multiple of Hkv.
            key, value, scores, key_padding_mask: as in `admit`. Rows of padding mean nothing.
            softmax_scale: c of S1. Default D ** -0.5.
            backend: as in `flash_sparse_attn_func`.

        Returns:
            o `[B, n, Hq, Dv]`.

        Raises:
            TypeError, ValueError: as in `admit`, for query too, before the cache changes; then as
                `flash_sparse_attn_func`.
            NotImplementedError, ImportError: as in `admit`, and as `flash_sparse_attn_func` (E9).
        """
        given = {"query": query, "key": key, "value": value, "scores": scores}
        self._require(given, key_padding_mask)
        if query.shape[1] == 1:
            self._admit(key, value, scores, key_padding_mask)
            return flash_sparse_attn_with_kvcache_func(
                query,
                self.key,
                self.value,
                cache_seqlens=self.held,
                attn_bias=self.scores[:, :, None],
                softmax_scale=softmax_scale,
                is_causal=False,  # all that is held is visible, in whatever order
                backend=backend,
            )
        stream = self._stream(key, value, scores, key_padding_mask)
        o = flash_sparse_attn_func(
            query,
            stream.key,
            stream.value,
            attn_mask=IntervalMask.topk(
                stream.scores,
                self.window_size,
                key_padding_mask=stream.keep,
                seqlen_q=query.shape[1],
            ),
            attn_bias=stream.scores[:, :, None],
            softmax_scale=softmax_scale,
            is_causal=True,
            backend=backend,
        )
        self._hold(stream)
        return o

    def _admit(
        self, key: Tensor, value: Tensor, scores: Tensor, key_padding_mask: Tensor | None
    ) -> None:
        if key.shape[1] != 1:
            self._hold(self._stream(key, value, scores, key_padding_mask))
            return
        state = self.key, self.value, self.scores, self.position, self._held, self._seqlen
        torch.ops.flash_sparse_attn.admit(*state, key, value, scores, key_padding_mask)

    def _stream(
        self, key: Tensor, value: Tensor, scores: Tensor, key_padding_mask: Tensor | None
    ) -> _Stream:
        """What is held, in order of position, unused slots first, then the new tokens."""
        order = self.position.argsort(-1)
        held, n = self.position.gather(2, order), key.shape[1]
        keep = torch.ones_like(scores, dtype=torch.bool)
        if key_padding_mask is not None:
            keep = keep & key_padding_mask[:, None]
        new = self._seqlen.T[..., None] + torch.arange(n, device=key.device, dtype=torch.int32)
        return _Stream(
            torch.cat((_pick(self.key, order), key), 1),
            torch.cat((_pick(self.value, order), value), 1),
            torch.cat((self.scores.gather(2, order), scores), 2),
            torch.cat((held, new), 2),
            torch.cat((held != UNUSED, keep), 2),
        )

    def _hold(self, stream: _Stream) -> None:
        """Hold the w best of a stream that begins with the w slots."""
        start, end = topk_intervals(
            stream.scores, 1, self.window_size, causal=False, key_padding_mask=stream.keep
        )  # the choice of one row that sees every key
        best = start < end
        # Where fewer are held the rest are unused slots, the first of a stream.
        order = best.to(torch.int8).argsort(dim=-1, descending=True, stable=True)
        order = order[..., : self.window_size]
        self.key.copy_(_pick(stream.key, order))
        self.value.copy_(_pick(stream.value, order))
        self.scores.copy_(stream.scores.gather(2, order))
        self.position.copy_(stream.position.gather(2, order))
        self._held.copy_(best.sum(-1).T)
        self._seqlen.add_(stream.scores.shape[2] - self.window_size)

    def _require(self, given: dict[str, Tensor], key_padding_mask: Tensor | None) -> None:
        """E1 to E5 and E9 for new tokens."""
        for name, tensor in given.items():
            require_tensor(name, tensor)
        require_tensor("key_padding_mask", key_padding_mask, optional=True)
        key, query = given["key"], given.get("query")
        batch, _, heads, head_dim = self.key.shape
        n = key.shape[1] if key.dim() == 4 else "n"
        shapes = {
            "key": (batch, n, heads, head_dim),
            "value": (batch, n, heads, self.value.shape[3]),
            "scores": (batch, heads, n),
        }
        if query is not None:
            heads_q = query.shape[2] if query.dim() == 4 else heads
            if heads_q < 1 or heads_q % heads:
                expected = f"a positive multiple of the {heads} heads of the cache"
                raise ValueError(message("E2", "heads of query", heads_q, expected))
            shapes["query"] = (batch, n, heads_q, head_dim)
        for name, shape in shapes.items():
            tensor, dtype = given[name], self.key.dtype
            if tensor.shape != shape:
                expected = f"({', '.join(map(str, shape))})"
                raise ValueError(message("E2", f"shape of {name}", tuple(tensor.shape), expected))
            if name == "scores":
                dtype = self.scores.dtype
            if tensor.dtype != dtype:
                expected = f"{dtype}, that of the cache"
                raise TypeError(message("E3", f"dtype of {name}", tensor.dtype, expected))
        if key_padding_mask is not None:
            got, name = key_padding_mask, "key_padding_mask"
            if got.dtype != torch.bool:
                raise TypeError(message("E3", f"dtype of {name}", got.dtype, "torch.bool"))
            if got.shape != (batch, n):
                raise ValueError(message("E5", f"shape of {name}", tuple(got.shape), (batch, n)))
        for name, tensor in (*given.items(), ("key_padding_mask", key_padding_mask)):
            if tensor is not None and tensor.device != self.key.device:
                expected = f"{self.key.device}, where the cache is"
                raise ValueError(message("E4", f"device of {name}", tensor.device, expected))
        asking = [name for name, tensor in given.items() if tensor.requires_grad]
        if asking and torch.is_grad_enabled():
            got = f"{', '.join(asking)} that require one"
            expected = "none, as under torch.no_grad(): a cache takes no gradient"
            raise NotImplementedError(message("E9", "gradients", got, expected))


class _Stream(NamedTuple):
    """Keys in order of position.

    Attributes:
        key: `[B, S, Hkv, D]`.
        value: `[B, S, Hkv, Dv]`.
        scores: `[B, Hkv, S]`.
        position: int32 `[B, Hkv, S]`.
        keep: bool `[B, Hkv, S]`; the others are no keys.
    """

    key: Tensor
    value: Tensor
    scores: Tensor
    position: Tensor
    keep: Tensor


def _pick(rows: Tensor, order: Tensor) -> Tensor:
    """rows `[B, S, Hkv, D]` by index `[B, Hkv, n]`: `[B, n, Hkv, D]`."""
    index = order.transpose(1, 2)[..., None]
    return rows.gather(1, index.expand(-1, -1, -1, rows.shape[3]))


def _admit(
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
    """One token for every sequence, in place (M5).

    It takes the first unused slot; with none, that of the worst key, if it is not worse itself.
    Shapes are those of `DynamicMaskCache` with n = 1; held and seqlen are `[Hkv, B]`.
    """
    implementation = admit_by_operations
    if key.is_cuda and score_cache.dtype == torch.float32:
        implementation = registry.first_with("admit") or admit_by_operations
    implementation(
        key_cache, value_cache, score_cache, position, held, seqlen, key, value, scores,
        key_padding_mask,
    )  # fmt: skip


def admit_by_operations(
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
    """The operator `admit` on any device, for scores of any dtype: what backends are tested by."""
    used, window = held.T, score_cache.shape[2]
    free = used < window
    slot = torch.where(free, used, _worst(score_cache, position))[..., None].long()
    worst = score_cache.gather(2, slot)
    # As the more recent, the new key wins ties; with NaN too.
    enters = free[..., None] | (scores >= worst) | worst.isnan()
    if key_padding_mask is not None:
        enters = enters & key_padding_mask[:, None]
    new_position = seqlen.T[..., None]
    for rows, new in ((score_cache, scores), (position, new_position)):
        rows.scatter_(2, slot, torch.where(enters, new, rows.gather(2, slot)))
    for rows, new in ((key_cache, key), (value_cache, value)):
        index = slot.transpose(1, 2)[..., None].expand_as(new)
        kept = rows.gather(1, index)
        rows.scatter_(1, index, torch.where(enters.transpose(1, 2)[..., None], new, kept))
    held += (enters[..., 0] & free).T
    seqlen += 1


def _worst(scores: Tensor, position: Tensor) -> Tensor:
    """M5: the worst of w keys, [B, Hkv, w] to a slot [B, Hkv]: NaN, or the lowest; the oldest."""
    nan = scores.isnan()
    value = torch.where(nan, -torch.inf, scores)
    lowest = value == value.amin(-1, keepdim=True)
    lowest = torch.where(nan.any(-1, keepdim=True), nan, lowest)  # NaN is below -inf
    return position.masked_fill(~lowest, torch.iinfo(torch.int32).max).argmin(-1)


def _admit_fake(*_: Tensor | None) -> None:
    """Returns nothing; what it changes is in its schema."""


def require_size(name: str, value: object, least: int = 1) -> None:
    """E1 and E6 for a size of the cache."""
    expected = f"an int >= {least}"
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(message("E1", name, repr(value), expected))
    if value < least:
        raise ValueError(message("E6", name, value, expected))


_library.impl("admit", _admit, "CompositeExplicitAutograd")
torch.library.register_fake("flash_sparse_attn::admit", _admit_fake, lib=_library)
