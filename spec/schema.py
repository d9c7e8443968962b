"""What a conformance case may say: frozen dataclasses, one for each table of `cases/*.toml`.

Nothing here imports torch. Symbols of sizes are those of `attention.md`: B Sq Sk Hq Hkv.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Literal, get_args

Dtype = Literal["float16", "bfloat16", "float32", "float64"]
Exception_ = Literal["TypeError", "ValueError", "NotImplementedError", "ImportError"]
Argument = Literal["q", "k", "v", "bias", "gate_q", "gate_k"]
TensorName = Literal[
    "q", "k", "v", "mask", "bias", "interval_start", "interval_end", "block_map", "gate_q",
    "gate_k", "cu_seqlens_q", "cu_seqlens_k", "cache_seqlens", "page_table", "key_indices",
]  # fmt: skip
Keyword = Literal[
    "softmax_scale", "softcap", "causal", "window", "sinks", "deterministic", "gate",
    "gate_threshold", "softmax_threshold", "max_seqlen_q", "max_seqlen_k", "block_size", "gates",
    "return_lse", "return_kept", "backend",
]  # fmt: skip

ARGUMENTS = get_args(Argument)
DTYPES = get_args(Dtype)
QUANTITIES = ("o", "lse", "dq", "dk", "dv", "dbias", "dgate_q", "dgate_k")

AT_LEAST_ONE = Annotated[int, lambda x: x >= 1]
NOT_NEGATIVE = Annotated[int, lambda x: x >= 0]
SHARE = Annotated[float, lambda x: 0 <= x <= 1]


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """Sizes of q, k and v.

    The loader fills in what a case leaves out: seqlen_k, heads_kv and head_dim_v are then seqlen_q,
    heads_q and head_dim; in the packed form batch, seqlen_q and seqlen_k follow from the lengths.
    """

    batch: NOT_NEGATIVE
    seqlen_q: NOT_NEGATIVE
    seqlen_k: NOT_NEGATIVE
    heads_q: AT_LEAST_ONE
    heads_kv: AT_LEAST_ONE
    head_dim: AT_LEAST_ONE
    head_dim_v: AT_LEAST_ONE


@dataclass(frozen=True, kw_only=True)
class Options:
    """The scalar arguments, named as in `AttentionOptions`; an absent one has its default."""

    softmax_scale: float | None = None
    softcap: float = 0.0
    causal: bool = False
    window_left: NOT_NEGATIVE | None = None
    window_right: NOT_NEGATIVE | None = None
    sinks: NOT_NEGATIVE = 0
    gate_threshold: SHARE = 0.0
    softmax_threshold: SHARE = 0.0
    deterministic: bool = False


@dataclass(frozen=True, kw_only=True)
class Data:
    """What q, k and v hold and how they lie in memory.

    Attributes:
        values: "normal"; "constant": every element 0.5; "orthogonal": q ⊥ k, every score 0;
            "wide": normal, scores about ±`magnitude`; "wide_exact": scores of ±`magnitude` and 0
            that every dtype holds exactly; "negative": every score about −`magnitude`; "peaked":
            one late key has nearly all of the mass of every row, the first half nearly none;
            "sinks": the mass of every row lies in the first 4 keys.
        layout: "contiguous"; "heads_first": `[B, H, S, D]` transposed; "fused": views of one tensor
            `[.., Hq + 2 Hkv, D]`; "padded": rows longer than the head dim; "strided": every second
            element of the last dim; "offset": starts one element into its storage; "expanded":
            stride 0 along the heads of k and v; "q_is_k", "k_is_v", "all_one": the same tensor.
        magnitude: see `values`.
    """

    values: Literal[
        "normal", "constant", "orthogonal", "wide", "wide_exact", "negative", "peaked", "sinks"
    ] = "normal"
    layout: Literal[
        "contiguous", "heads_first", "fused", "padded", "strided", "offset", "expanded",
        "q_is_k", "k_is_v", "all_one",
    ] = "contiguous"  # fmt: skip
    magnitude: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Mask:
    """V3.

    Attributes:
        shape: four symbols, as in "B Hkv 1 Sk".
        fill: "random": each element true with probability `keep`; "all"; "none"; "rows", "keys":
            whole rows, whole keys; "tiles": whole 64 x 64 tiles, and 4 of 5 elements of the others;
            "late": the first half of the keys hidden from all rows, the last quarter of the rows
            seeing nothing; "first", "last": only that key; "diagonal": j ≡ i modulo Sk; "runs":
            rows see every other run of 64 keys, the next 64 rows the others.
        keep: see `fill`.
        expanded: the broadcast is made by stride 0 of a full-size view.
    """

    shape: str
    fill: Literal[
        "random", "all", "none", "rows", "keys", "tiles", "late", "first", "last", "diagonal",
        "runs",
    ] = "random"  # fmt: skip
    keep: SHARE = 0.5
    expanded: bool = False


@dataclass(frozen=True, kw_only=True)
class Bias:
    """S4.

    Attributes:
        shape: as in `Mask`.
        fill: "normal"; "zero"; "wide": normal times 1000; "ramp": −0.05 |p_i − j|, as far as the
            shape tells rows and keys apart; "minus_inf": normal with −∞ in 3 of 10 elements;
            "minus_inf_rows": −∞ in every other row; "nan_hidden": NaN and ±∞ wherever no pair that
            the element belongs to is visible; "nan_visible": one NaN, at a visible pair.
        dtype: "input" (that of q) or "float32".
        transposed: rows and keys are swapped in memory.
        expanded: as in `Mask`.
    """

    shape: str
    fill: Literal[
        "normal", "zero", "wide", "ramp", "minus_inf", "minus_inf_rows", "nan_hidden",
        "nan_visible",
    ] = "normal"  # fmt: skip
    dtype: Literal["input", "float32"] = "input"
    transposed: bool = False
    expanded: bool = False


@dataclass(frozen=True, kw_only=True)
class Intervals:
    """V4 and the constructors M1 to M5 of `IntervalMask`.

    Attributes:
        shape: two symbols, as in "B Hkv"; M1 to M3 take "1 1".
        kind: "random": any two rows; "empty": some keys with start ≥ end, some not; "outside": ends
            beyond Sq and starts below 0, by little and by 2³⁰; "causal" M1, "window" M2,
            "documents" M3, "keys" M4, "topk" M5.
        keep: M4, share of keys kept; M5, share of keys that the padding mask keeps.
        left, right, sinks: M2.
        boundaries: M3, u_1 … (u_0 = 0).
        window_size: M5.
        causal: M5.
        scores: M5, "normal", "equal", "ties" (three values), "nan" (a third of them NaN), "rising",
            "falling" or "infinite" (±∞ among them).
    """

    kind: Literal["random", "empty", "outside", "causal", "window", "documents", "keys", "topk"] = (
        "random"
    )
    shape: str = "1 1"
    keep: SHARE = 1.0
    left: int | None = None
    right: int | None = None
    sinks: int = 0
    boundaries: tuple[NOT_NEGATIVE, ...] = ()
    window_size: int = 1
    causal: bool = True
    scores: Literal["normal", "equal", "ties", "nan", "rising", "falling", "infinite"] = "normal"


@dataclass(frozen=True, kw_only=True)
class BlockMap:
    """V5.

    Attributes:
        block_size: (rows, keys) of a block.
        shape: two symbols, as in "B Hq".
        fill: "random", "all", "none", "diagonal" (the aligned block alone), "band".
        keep: share of active blocks of "random".
        flex: given as FlexAttention's `BlockMask`, whose `mask_mod` is "causal" or "checkered".
    """

    block_size: tuple[AT_LEAST_ONE, ...]
    shape: str = "1 1"
    fill: Literal["random", "all", "none", "diagonal", "band"] = "random"
    keep: SHARE = 0.5
    flex: Literal["causal", "checkered"] | None = None


@dataclass(frozen=True, kw_only=True)
class Gates:
    """S3. Both gates are multiples of 1/4, so that V7 is never decided by rounding.

    Attributes:
        gate: g.
        dtype: as in `Bias`.
    """

    gate: Literal["logsigmoid", "identity"] = "logsigmoid"
    dtype: Literal["input", "float32"] = "input"


@dataclass(frozen=True, kw_only=True)
class Packed:
    """V6, packed.

    Attributes:
        lengths_q, lengths_k: rows and keys of each sequence.
        spare_q, spare_k: rows and keys past the last boundary, of no sequence.
    """

    lengths_q: tuple[NOT_NEGATIVE, ...]
    lengths_k: tuple[NOT_NEGATIVE, ...]
    spare_q: NOT_NEGATIVE = 0
    spare_k: NOT_NEGATIVE = 0


@dataclass(frozen=True, kw_only=True)
class Cache:
    """V6, cache; keys past a length, in an unused page or in no key list hold NaN.

    Attributes:
        lengths: keys in use of each sequence; () = `cache_seqlens` is not given.
        page: keys of a page; 0 = no page table. Sizes.seqlen_k is a multiple of it.
        indices: "random": half of the keys; "few": three keys; "twice": some listed twice;
            "outside": some at or past the length; "none": all −1; "shuffled": every key in any
            order.
    """

    lengths: tuple[NOT_NEGATIVE, ...] = ()
    page: NOT_NEGATIVE = 0
    indices: Literal["random", "few", "twice", "outside", "none", "shuffled"] | None = None


@dataclass(frozen=True, kw_only=True)
class Reject:
    """An invalid call: what is changed in a valid one, and what must come of it.

    Attributes:
        exception: type raised; its message names the case's rule.
        set: keyword arguments replaced by a value, in the names of `Options`.
        recast: dtype of a tensor replaced.
        resize: shape of a tensor replaced.
        replace: a tensor replaced by this.
        move: device of a tensor replaced.
        drop: tensors left out.
        twice: tensors or masks given twice.
    """

    exception: Exception_
    set: Mapping[Keyword, bool | int | float | str | tuple[int | float | str, ...]] = field(
        default_factory=dict
    )
    recast: Mapping[TensorName, str] = field(default_factory=dict)
    resize: Mapping[TensorName, tuple[NOT_NEGATIVE, ...]] = field(default_factory=dict)
    replace: Mapping[TensorName, int | float | str | tuple[float, ...]] = field(
        default_factory=dict
    )
    move: Mapping[TensorName, str] = field(default_factory=dict)
    drop: tuple[TensorName, ...] = ()
    twice: tuple[Literal["mask", "interval_start", "block_map"], ...] = ()


@dataclass(frozen=True, kw_only=True)
class Case:
    """One conformance case; `id` is its address: `file/name[axis values]`.

    Attributes:
        rule: the rule that it witnesses, or the one that rejects it.
        also: further rules that it witnesses.
        dtype: dtype of q, k and v.
        grads: arguments whose gradient is asked for; absent: all that are given, none in the cache
            form.
        dlse: whether lse has a gradient too.
        seed: of the data.
        size: "small" where an interpreter may run it, "medium" where a CPU may, "large" where
            it takes a GPU; the loader holds each to its bound on `work`.
        reject: set in an invalid case.
    """

    id: str
    rule: str
    also: tuple[str, ...] = ()
    dtype: Dtype
    sizes: Sizes
    options: Options = Options()
    data: Data = Data()
    mask: Mask | None = None
    bias: Bias | None = None
    intervals: tuple[Intervals, ...] = ()
    block_map: BlockMap | None = None
    gates: Gates | None = None
    packed: Packed | None = None
    cache: Cache | None = None
    grads: tuple[Argument, ...]
    dlse: bool = True
    seed: int
    size: Literal["small", "medium", "large"] = "small"
    reject: Reject | None = None

    @property
    def form(self) -> str:
        """ "batched", "packed" or "cache"."""
        return "packed" if self.packed else "cache" if self.cache else "batched"

    @property
    def rules(self) -> tuple[str, ...]:
        """Every rule that it witnesses."""
        return (self.rule, *self.also)

    @property
    def work(self) -> int:
        """Pairs of a row and a key of one sequence, over sequences and heads: what a run costs."""
        sizes = self.sizes
        if self.packed:
            lengths = zip(self.packed.lengths_q, self.packed.lengths_k, strict=True)
            return sizes.heads_q * sum(rows * keys for rows, keys in lengths)
        return sizes.batch * sizes.heads_q * sizes.seqlen_q * sizes.seqlen_k

    def extent(self, symbol: str) -> int:
        """The size that a symbol of a `shape` stands for."""
        sizes = self.sizes
        packed = self.packed is not None
        return {
            "1": 1, "B": 1 if packed else sizes.batch, "Sq": sizes.seqlen_q, "Sk": sizes.seqlen_k,
            "Hq": sizes.heads_q, "Hkv": sizes.heads_kv,
        }[symbol]  # fmt: skip
