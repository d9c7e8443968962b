"""The tensors of a case, made from its seed on the CPU in float64, then rounded and moved."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from flash_sparse_attn.spec.schema import Bias, BlockMap, Case, Gates, Intervals, Mask
from torch import Tensor
from torch.nn import functional as F

from . import pairs

FAR = 2**30
TILE = 64


@dataclass(frozen=True, eq=False)
class Structured:
    """One structured mask: arguments for a constructor of `IntervalMask`, and what it selects.

    Attributes:
        constructor: name of the constructor.
        arguments: its arguments.
        selected: bool `[B|1, Hkv|1, Sq, Sk]`; None where the call is invalid.
    """

    constructor: str
    arguments: Mapping[str, Any]
    selected: Tensor | None


@dataclass(frozen=True, eq=False)
class Inputs:
    """Everything a run of a case reads.

    Attributes:
        tensors: what the call gets, by the names of `AttentionTensors`; shared tensors are one
            object.
        clean: k and v on the logical key axis, without pages and with 0 for what may not be read;
            only in the cache form.
        structured: masks M1 to M5.
        flex: `mask_mod` of a FlexAttention mask.
        selected: pairs that `structured` and `flex` select, None without them.
        visible: pairs that all V rules leave, bool `[B, Hq, Sq, Sk]`, B = 1 when packed.
        do, dlse: gradients of the outputs; dlse None where the case has none.
    """

    tensors: dict[str, Tensor]
    clean: dict[str, Tensor]
    structured: tuple[Structured, ...]
    flex: Callable[..., Tensor] | None
    selected: Tensor | None
    visible: Tensor
    do: Tensor
    dlse: Tensor | None


def materialise(case: Case, device: str) -> Inputs:
    """The inputs of a case, the same on every device."""
    return _Maker(case, torch.device(device)).inputs()


@dataclass
class _Maker:
    case: Case
    device: torch.device
    tensors: dict[str, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.generator = torch.Generator().manual_seed(self.case.seed)
        self.dtype: torch.dtype = getattr(torch, self.case.dtype)

    def inputs(self) -> Inputs:
        case, sizes = self.case, self.case.sizes
        batch = () if case.packed else (sizes.batch,)
        do = self.normal(*batch, sizes.seqlen_q, sizes.heads_q, sizes.head_dim_v)
        dlse = self.normal(*batch, sizes.heads_q, sizes.seqlen_q)
        q, k, v = self.data(batch)
        clean: dict[str, Tensor] = {}
        if case.packed:
            self.boundaries()
        if case.cache:
            clean = self.lay_out(*(self.floating(x) for x in (q, k, v)))
            k, v = self.cache(k, v)
        self.tensors |= self.lay_out(*(self.floating(x) for x in (q, k, v)))
        for term, make in ((case.gates, self.gates), (case.mask, self.mask)):
            if term:
                make(term)
        structured = self.intervals(case.intervals)
        flex = self.block_map(case.block_map) if case.block_map else None
        selections = [part.selected for part in structured if part.selected is not None]
        if flex is not None:
            i = torch.arange(sizes.seqlen_q, device=self.device).view(-1, 1)
            j = torch.arange(sizes.seqlen_k, device=self.device)
            selections.append(flex(0, 0, i, j)[None, None])
        selected = None
        for part in selections:
            selected = part if selected is None else selected & part
        invalid = case.reject is not None
        visible = None if invalid else pairs.visible_pairs(case, self.tensors, selected)
        if case.bias:
            self.bias(case.bias, visible)
        precise = torch.float64 if case.dtype == "float64" else torch.float32
        return Inputs(
            tensors=self.tensors,
            clean={name: clean[name] for name in ("k", "v")} if clean else {},
            structured=structured,
            flex=flex,
            selected=selected,
            visible=visible,
            do=self.floating(do),
            dlse=dlse.to(self.device, precise) if case.dlse else None,
        )

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.generator, dtype=torch.float64)

    def uniform(self, *shape: int) -> Tensor:
        return torch.rand(shape, generator=self.generator, dtype=torch.float64)

    def integers(self, low: int, high: int, *shape: int) -> Tensor:
        return torch.randint(low, max(high, low + 1), shape, generator=self.generator)

    def floating(self, x: Tensor, dtype: str = "input") -> Tensor:
        return x.to(self.dtype if dtype == "input" else torch.float32).to(self.device)

    def extents(self, shape: str) -> tuple[int, ...]:
        return tuple(self.case.extent(symbol) for symbol in shape.split())

    def data(self, batch: tuple[int, ...]) -> tuple[Tensor, Tensor, Tensor]:
        """q, k, v by `Data.values`."""
        sizes, data = self.case.sizes, self.case.data
        q = self.normal(*batch, sizes.seqlen_q, sizes.heads_q, sizes.head_dim)
        k = self.normal(*batch, sizes.seqlen_k, sizes.heads_kv, sizes.head_dim)
        v = self.normal(*batch, sizes.seqlen_k, sizes.heads_kv, sizes.head_dim_v)
        scale = self.case.options.softmax_scale
        scale = sizes.head_dim**-0.5 if scale is None else scale
        j = torch.arange(sizes.seqlen_k).view(-1, 1)
        if data.values == "constant":
            q, k, v = (torch.full_like(x, 0.5) for x in (q, k, v))
        elif data.values == "orthogonal":
            half = -(-sizes.head_dim // 2)
            q[..., :half], k[..., half:] = 0, 0
        elif data.values == "wide":
            grow = (data.magnitude / (abs(scale) * sizes.head_dim**0.5)) ** 0.5
            q, k = q * grow, k * grow
        elif data.values == "wide_exact":
            q, k = torch.zeros_like(q), torch.zeros_like(k)
            q[..., 0] = 128.0 * (2 * self.integers(0, 2, *q.shape[:-1]) - 1)
            k[..., 0] = data.magnitude / 128 / scale * (self.integers(0, 3, *k.shape[:-1]) - 1)
        elif data.values in ("negative", "peaked", "sinks"):
            target = self.targets(data.values, j)
            q, k = q / 4, k / 4
            q[..., 0], k[..., 0] = 16.0, target / scale / 16
        return q, k, v

    def targets(self, values: str, j: Tensor) -> Tensor:
        """The score that each key has with every row, before small noise: `[Sk, 1]`."""
        seqlen_k = j.shape[0]
        if values == "negative":
            return torch.full((seqlen_k, 1), -self.case.data.magnitude, dtype=torch.float64)
        if values == "sinks":
            return torch.where(j < 4, 10.0, -10.0).double()
        early = torch.where(j < seqlen_k // 2, -20.0, -5.0).double()
        return torch.where(j == 3 * seqlen_k // 4, 20.0, early)

    def lay_out(self, q: Tensor, k: Tensor, v: Tensor) -> dict[str, Tensor]:
        """q, k, v in memory by `Data.layout`."""
        layout = self.case.data.layout
        if layout == "fused":
            whole = torch.cat((q, k, v), -2)
            return dict(zip("qkv", whole.split([x.shape[-2] for x in (q, k, v)], -2), strict=True))
        if layout == "all_one":
            return {"q": q, "k": q, "v": q}
        if layout == "q_is_k":
            return {"q": q, "k": q, "v": v}
        if layout == "k_is_v":
            return {"q": q, "k": k, "v": k}
        if layout == "expanded":
            k, v = (x[..., :1, :].expand(x.shape) for x in (k, v))
        place = {
            "heads_first": lambda x: x.transpose(-3, -2).contiguous().transpose(-3, -2),
            "padded": lambda x: F.pad(x, (0, 3))[..., : x.shape[-1]],
            "strided": lambda x: x.repeat_interleave(2, -1)[..., ::2],
            "offset": lambda x: F.pad(x.flatten(), (1, 0))[1:].view(x.shape),
        }.get(layout, lambda x: x)
        return {"q": place(q), "k": place(k), "v": place(v)}

    def boundaries(self) -> None:
        """V6: boundaries of packed sequences."""
        for side, lengths in (("q", self.case.packed.lengths_q), ("k", self.case.packed.lengths_k)):
            ends = torch.tensor([0, *lengths]).cumsum(0)
            self.tensors[f"cu_seqlens_{side}"] = ends.to(self.device, torch.int32)

    def cache(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """V6 and N2: lengths, key lists and pages; what may not be read is NaN."""
        case, sizes = self.case, self.case.sizes
        lengths = case.cache.lengths or (sizes.seqlen_k,) * sizes.batch
        read = torch.arange(sizes.seqlen_k) < torch.tensor(lengths).view(-1, 1)
        read = read.unsqueeze(2).expand(-1, -1, sizes.heads_kv)
        if case.cache.lengths:
            self.tensors["cache_seqlens"] = torch.tensor(
                lengths, dtype=torch.int32, device=self.device
            )
        if case.cache.indices:
            listed = self.key_lists(lengths)
            self.tensors["key_indices"] = listed.to(self.device, torch.int32)
            read = read & pairs.listed_keys(listed, sizes.seqlen_k).transpose(1, 2)
        k, v = (x.masked_fill(~read.unsqueeze(3), math.nan) for x in (k, v))
        if case.cache.page:
            count = sizes.seqlen_k // case.cache.page
            table = torch.randperm(sizes.batch * count + 2, generator=self.generator)
            table = table[: sizes.batch * count].view(sizes.batch, count)
            self.tensors["page_table"] = table.to(self.device, torch.int32)
            k, v = (self.pages(x, table) for x in (k, v))
        return k, v

    def pages(self, x: Tensor, table: Tensor) -> Tensor:
        """`[B, Sk, ..]` cut into pages, at the places that the table says; two hold NaN alone."""
        page = self.case.cache.page
        pages = x.new_full((table.numel() + 2, page, *x.shape[2:]), math.nan)
        pages[table.flatten()] = x.reshape(-1, page, *x.shape[2:])
        return pages

    def key_lists(self, lengths: tuple[int, ...]) -> Tensor:
        """V6: `key_indices` `[B, Hkv, n]` by `Cache.indices`."""
        kind, seqlen_k = self.case.cache.indices, self.case.sizes.seqlen_k
        lists = []
        for length in lengths:
            for _ in range(self.case.sizes.heads_kv):
                keys = torch.randperm(length, generator=self.generator).tolist()
                half = keys[: -(-length // 2)]
                lists.append(
                    {
                        "random": half,
                        "few": keys[:3],
                        "twice": half + half[::2],
                        "outside": [*half, *range(length, seqlen_k + 3, 3)],
                        "none": [],
                        "shuffled": torch.randperm(seqlen_k, generator=self.generator).tolist(),
                    }[kind]
                )
        width = max(map(len, lists)) + 2
        padded = [keys + [-1] * (width - len(keys)) for keys in lists]
        return torch.tensor(padded).view(len(lengths), self.case.sizes.heads_kv, width)

    def gates(self, gates: Gates) -> None:
        """S3: multiples of 1/4 between −2 and 2."""
        sizes = self.case.sizes
        batch = () if self.case.packed else (sizes.batch,)
        shapes = {"q": (sizes.seqlen_q, sizes.heads_q), "k": (sizes.seqlen_k, sizes.heads_kv)}
        for side, shape in shapes.items():
            gate = self.integers(-8, 9, *batch, *shape) / 4.0
            self.tensors[f"gate_{side}"] = self.floating(gate.double(), gates.dtype)

    def mask(self, mask: Mask) -> None:
        """V3, by `Mask.fill`."""
        b, h, rows, keys = shape = self.extents(mask.shape)
        i, j = torch.arange(rows).view(-1, 1), torch.arange(keys)
        tiles = self.uniform(b, h, -(-rows // TILE), -(-keys // TILE)) < mask.keep
        tiles = tiles.repeat_interleave(TILE, 2).repeat_interleave(TILE, 3)[..., :rows, :keys]
        dense = {
            "random": lambda: self.uniform(*shape) < mask.keep,
            "all": lambda: torch.ones(shape, dtype=torch.bool),
            "none": lambda: torch.zeros(shape, dtype=torch.bool),
            "rows": lambda: self.uniform(b, h, rows, 1) < mask.keep,
            "keys": lambda: self.uniform(b, h, 1, keys) < mask.keep,
            "tiles": lambda: tiles & (self.uniform(*shape) < 0.8),
            "late": lambda: (j >= keys // 2) & ((i < 3 * rows // 4) | (rows == 1)),
            "first": lambda: j == 0,
            "last": lambda: j == keys - 1,
            "diagonal": lambda: j == i % keys,
            "runs": lambda: (i // TILE + j // TILE) % 2 == 0,
        }[mask.fill]()
        dense = dense.expand(shape).contiguous().to(self.device)
        self.tensors["mask"] = self.expanded(dense) if mask.expanded else dense

    def bias(self, bias: Bias, visible: Tensor | None) -> None:
        """S4, by `Bias.fill`."""
        shape = self.extents(bias.shape)
        x = self.normal(*shape)
        if bias.fill == "zero":
            x = torch.zeros_like(x)
        elif bias.fill == "wide":
            x = 1000 * x
        elif bias.fill == "ramp":
            i, j = torch.arange(shape[2]).view(-1, 1), torch.arange(shape[3])
            x = (-0.05 * (i + shape[3] - shape[2] - j).abs().double()).expand(shape)
        elif bias.fill == "minus_inf":
            x = x.masked_fill(self.uniform(*shape) < 0.3, -math.inf)
        elif bias.fill == "minus_inf_rows":
            x[:, :, 1::2] = -math.inf
        elif bias.fill == "nan_hidden":
            seen = self.any_pair(visible.cpu(), shape)
            garbage = torch.tensor([math.nan, math.inf, -math.inf], dtype=x.dtype)
            x = torch.where(seen, x, garbage[self.integers(0, 3, *shape)])
        elif bias.fill == "nan_visible":
            places = visible.cpu().nonzero()
            x[tuple(places[len(places) // 2])] = math.nan
        x = self.floating(x, bias.dtype)
        if bias.transposed:
            x = x.transpose(2, 3).contiguous().transpose(2, 3)
        self.tensors["bias"] = self.expanded(x) if bias.expanded else x

    def expanded(self, x: Tensor) -> Tensor:
        """A term at full size by strides of 0; a head dim of Hkv stays."""
        batch, heads, rows, keys = self.extents("B Hq Sq Sk")
        return x.expand(batch, heads if x.shape[1] == 1 else -1, rows, keys)

    def any_pair(self, visible: Tensor, shape: tuple[int, ...]) -> Tensor:
        """Whether any pair that an element of a term of `shape` belongs to is visible."""
        sizes = self.case.sizes
        if shape[1] == sizes.heads_kv:
            visible = visible.unflatten(1, (sizes.heads_kv, -1)).any(2)
        for dim, size in enumerate(shape):
            if size == 1:
                visible = visible.any(dim, keepdim=True)
        return visible

    def intervals(self, intervals: tuple[Intervals, ...]) -> tuple[Structured, ...]:
        """V4 into `tensors`; M1 to M5 as structured masks."""
        given = [part for part in intervals if part.kind in ("random", "empty", "outside")]
        for part in given:
            start, end = self.rows_of_keys(part)
            self.tensors["interval_start"] = start.to(self.device, torch.int32)
            self.tensors["interval_end"] = end.to(self.device, torch.int32)
        return tuple(self.structured(part) for part in intervals if part not in given)

    def rows_of_keys(self, part: Intervals) -> tuple[Tensor, Tensor]:
        shape = (*self.extents(part.shape), self.case.sizes.seqlen_k)
        packed = self.case.packed
        rows = max(packed.lengths_q, default=0) if packed else self.case.sizes.seqlen_q
        one, other = self.integers(0, rows + 1, *shape), self.integers(0, rows + 1, *shape)
        if part.kind == "random":
            return torch.minimum(one, other), torch.maximum(one, other)
        lot = self.integers(0, 5, *shape)
        if part.kind == "empty":
            return torch.where(lot == 0, other, one), torch.where(lot == 1, one, other)
        start = torch.where(lot == 0, -FAR, torch.where(lot == 1, one - rows - 3, one - 2))
        end = torch.where(lot == 0, other - 5, torch.where(lot == 2, FAR, other + rows // 2))
        return start, end

    def structured(self, part: Intervals) -> Structured:
        sizes, device = self.case.sizes, self.device
        i = torch.arange(sizes.seqlen_q, device=device).view(-1, 1)
        j = torch.arange(sizes.seqlen_k, device=device)
        p = i + sizes.seqlen_k - sizes.seqlen_q
        shape = (*self.extents(part.shape), sizes.seqlen_k)
        lengths = {"seqlen_q": sizes.seqlen_q, "seqlen_k": sizes.seqlen_k, "device": device}
        keep = (self.uniform(*shape) < part.keep).to(device)
        if part.kind == "causal":
            return Structured("causal", lengths, (j <= p)[None, None])
        if part.kind == "window":
            left = part.left if part.left is not None else FAR
            right = part.right if part.right is not None else FAR
            selected = ((p - left <= j) & (j <= p + right)) | (j < part.sinks)
            bounds = {name: getattr(part, name) for name in ("left", "right", "sinks")}
            return Structured("window", lengths | bounds, selected[None, None])
        if part.kind == "documents":
            cu = torch.tensor((0, *part.boundaries), dtype=torch.int32, device=device)
            same = torch.zeros(sizes.seqlen_q, sizes.seqlen_k, dtype=torch.bool, device=device)
            for first, last in zip((0, *part.boundaries), part.boundaries, strict=False):
                same[first:last, first:last] = True
            arguments = {"cu_seqlens": cu, "seqlen": sizes.seqlen_k}
            return Structured("documents", arguments, same[None, None])
        if part.kind == "keys":
            selected = keep.unsqueeze(2).expand(-1, -1, sizes.seqlen_q, -1)
            return Structured("keys", {"keep": keep, "seqlen_q": sizes.seqlen_q}, selected)
        scores = self.scores(part, shape).to(device)
        arguments = {"scores": scores, "window_size": part.window_size, "causal": part.causal}
        arguments |= {"key_padding_mask": keep if part.keep < 1 else None}
        choice = part.window_size, part.causal
        if not self.case.packed:
            selected = pairs.best_keys(scores, ~keep, sizes.seqlen_q, *choice)
            return Structured("topk", arguments | {"seqlen_q": sizes.seqlen_q}, selected)
        selected = torch.zeros(*shape[:2], len(i), len(j), dtype=torch.bool, device=device)
        first = 0
        for length in self.case.packed.lengths_k:
            own = slice(first, first + length)
            best = pairs.best_keys(scores[..., own], ~keep[..., own], length, *choice)
            selected[..., own, own] = best
            first += length
        arguments |= {"cu_seqlens": self.tensors["cu_seqlens_k"]}
        return Structured("topk", arguments, selected)

    def scores(self, part: Intervals, shape: tuple[int, ...]) -> Tensor:
        """M5: scores of keys, float32, by `Intervals.scores`."""
        x = self.normal(*shape)
        if part.scores == "equal":
            x = torch.zeros_like(x)
        elif part.scores == "ties":
            x = self.integers(0, 3, *shape).double()
        elif part.scores == "nan":
            x = x.masked_fill(self.uniform(*shape) < 1 / 3, math.nan)
        elif part.scores in ("rising", "falling"):
            x = x.sort(-1, descending=part.scores == "falling").values
        elif part.scores == "infinite":
            lot = self.integers(0, 4, *shape)
            x = x.masked_fill(lot == 0, math.inf).masked_fill(lot == 1, -math.inf)
        return x.float()

    def block_map(self, block_map: BlockMap) -> Callable[..., Tensor] | None:
        """V5 into `tensors`, or the `mask_mod` of a FlexAttention mask."""
        if block_map.flex:
            return {"causal": _causal_mod, "checkered": _checkered_mod}[block_map.flex]
        (b, h), sizes = self.extents(block_map.shape), self.case.sizes
        rows = -(-sizes.seqlen_q // block_map.block_size[0])
        keys = -(-sizes.seqlen_k // block_map.block_size[1])
        i, j = torch.arange(rows).view(-1, 1), torch.arange(keys)
        active = {
            "random": lambda: self.uniform(b, h, rows, keys) < block_map.keep,
            "all": lambda: i + j >= 0,
            "none": lambda: i + j < 0,
            "diagonal": lambda: i == j,
            "band": lambda: (i - j).abs() <= 1,
        }[block_map.fill]()
        self.tensors["block_map"] = active.expand(b, h, rows, keys).contiguous().to(self.device)
        return None


def _causal_mod(b: Any, h: Any, i: Tensor, j: Tensor) -> Tensor:
    return i >= j


def _checkered_mod(b: Any, h: Any, i: Tensor, j: Tensor) -> Tensor:
    return (i // 8 + j // 24) % 2 == 0
