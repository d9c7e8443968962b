"""Suites and cases: the benchmark's data, read from `cases.toml`."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from . import features

DEFAULT_SUITES = {
    "forward": "dense",
    "backward": "dense",
    "dynamic": "linear",
    "decode": "cache",
    "varlen": "packed",
    "threshold": "blocks-dropped",
    "gated": "gates",
    "block": "block-masks",
    "streaming": "constant-cost",
}
"""Command -> the suite that it runs unless told otherwise."""

COMMANDS = tuple(DEFAULT_SUITES)
USUAL_COMMANDS = ("forward", "backward")
"""What a case is run for, unless its `commands` says otherwise."""

MASKS = (None, "keys", "topk", "random")
BIASES = (None, "key", "pair")
FIGURES = ("speed", "time", "rate", "us")
DTYPES = {"float32": "fp32", "float16": "fp16", "bfloat16": "bf16"}


@dataclass(frozen=True, kw_only=True)
class Case:
    """One problem: B, Sq = Sk = S, Hq, Hkv, D, and which pairs are visible.

    Attributes:
        batch, seqlen, heads_q, heads_kv, head_dim: sizes.
        dtype: "float32", "float16" or "bfloat16".
        causal: V1.
        mask: None; "keys": `[1, 1, 1, S]`, the `window_size` best keys, for every row alike (M4);
            "topk": the `window_size` best keys a row can see (M5); "random": `[1, 1, S, S]`, each
            pair visible with probability `density`. Keys are chosen by the key bias, or by random
            scores where there is none.
        per_head: of "keys" and "topk", as in a layer of dynamic mask attention: every key-value
            head chooses by float32 scores of its own, `[1, Hkv, S]`, and a key bias is the scores.
        mask_form: "dense", a bool tensor; or, of "topk", "intervals" (V4) for those who take them.
        window_size: w of "keys" and "topk".
        density: of "random".
        bias: None; "key": `[1, 1, 1, S]`; "pair": `[1, 1, S, S]` (S4), in `dtype` if shared by
            all heads.
        bias_grad: whether the backward computes the gradient of the bias.
        sweep: the field that varies along a line of a plot, if any.
        seed: of the random inputs.

    Raises:
        ValueError: a field is unknown, missing, or has no meaning beside the others.
    """

    seqlen: int
    heads_q: int
    heads_kv: int
    head_dim: int
    batch: int = 1
    dtype: str = "bfloat16"
    causal: bool = False
    mask: str | None = None
    per_head: bool = False
    mask_form: str = "dense"
    window_size: int | None = None
    density: float | None = None
    bias: str | None = None
    bias_grad: bool = False
    sweep: str | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        for name, allowed in (("mask", MASKS), ("bias", BIASES), ("dtype", tuple(DTYPES))):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name}: got {getattr(self, name)!r}, expected one of {allowed}")
        if self.mask_form not in ("dense", "intervals"):
            raise ValueError(f"mask_form: got {self.mask_form!r}, expected 'dense' or 'intervals'")
        if self.mask_form == "intervals" and self.mask != "topk":
            raise ValueError(f"mask_form 'intervals': got mask {self.mask!r}, expected 'topk'")
        if (self.window_size is not None) != (self.mask in ("keys", "topk")):
            raise ValueError(f"window_size: got {self.window_size} with mask {self.mask!r}")
        if self.per_head and (self.mask not in ("keys", "topk") or self.bias == "pair"):
            raise ValueError(f"per_head: got mask {self.mask!r} with bias {self.bias!r}")
        if (self.density is not None) != (self.mask == "random"):
            raise ValueError(f"density: got {self.density} with mask {self.mask!r}")
        if self.mask == "topk" and not self.causal:
            raise ValueError("mask 'topk' is the causal one (M5): expected causal = true")
        if self.bias_grad and self.bias is None:
            raise ValueError("bias_grad: got true without a bias")

    @property
    def name(self) -> str:
        """One line that tells cases apart; `--only` matches it."""
        heads = f"{self.heads_q}" + (f"/{self.heads_kv}" if self.heads_kv != self.heads_q else "")
        words = [f"B{self.batch} S{self.seqlen} H{heads} D{self.head_dim} {DTYPES[self.dtype]}"]
        if self.causal:
            words.append("causal")
        if self.mask == "random":
            words.append(f"mask=random({self.density:g})")
        elif self.mask:
            words.append(f"mask={self.mask}({self.window_size})")
        if self.per_head:
            words.append("per-head")
        if self.mask_form == "intervals":
            words.append("as-intervals")
        if self.bias:
            words.append(f"bias={self.bias}")
        if self.bias_grad:
            words.append("dbias")
        return " ".join(words)

    @property
    def leaves(self) -> tuple[str, ...]:
        """Inputs whose gradients the backward computes."""
        return ("q", "k", "v", "bias") if self.bias_grad else ("q", "k", "v")

    @property
    def selects(self) -> bool:
        """Whether an `IntervalMask` is built from scores, which is then timed too."""
        return self.mask_form == "intervals"

    def asdict(self) -> dict[str, Any]:
        """The fields, as they are written to a result."""
        return asdict(self)


@dataclass(frozen=True, kw_only=True)
class Limit:
    """Contenders that a suite leaves out of its longer cases, and why.

    Attributes:
        peers: regular expression over names of contenders, matched anywhere as `--peers` is.
        cases: likewise over names of cases.
        seqlen: longest S of those cases that those contenders take part in; 0 = none.
        reason: why, for the row.
    """

    peers: str
    cases: str
    seqlen: int
    reason: str


@dataclass(frozen=True, kw_only=True)
class Asked:
    """A ratio of ours to others that a suite exists to show.

    Attributes:
        cases: regular expression over names of cases, matched anywhere as `--only` is.
        quantity: what is compared.
        figure: "speed", their time over ours; "time", our time over theirs; "rate", our TB/s where
            the suite counts bytes, else TFLOP/s, over theirs; "us", our own microseconds.
        against: regular expression over whole names of contenders, the fastest of which counts;
            "own-" and a question: the baseline of the same backend; none for "us".
        least, most: the bound, at most one; without, the figure is shown beside none.
    """

    cases: str
    quantity: str
    figure: str
    against: str = ""
    least: float | None = None
    most: float | None = None

    def __post_init__(self) -> None:
        if self.figure not in FIGURES:
            raise ValueError(f"figure: got {self.figure!r}, expected one of {FIGURES}")
        if self.least is not None and self.most is not None:
            raise ValueError(f"least and most: got {self.least} and {self.most}, expected one")
        if bool(self.against) == (self.figure == "us"):
            raise ValueError(f"against: got {self.against!r} with figure {self.figure!r}")


@dataclass(frozen=True)
class Suite:
    """Cases under one name.

    Attributes:
        name: as `--suite` takes it.
        about: a line that says what the cases have in common.
        cases: in the order in which they run.
        limits: who is left out of what.
        asked: what it exists to show.
        seconds: default of `--seconds`.
        graph: default of `--graph` on a CUDA device.
    """

    name: str
    about: str
    cases: tuple[Any, ...]
    limits: tuple[Limit, ...] = ()
    asked: tuple[Asked, ...] = ()
    seconds: float = 1.0
    graph: bool = False

    def asked_of(self, case: Any) -> list[dict[str, Any]]:
        """What is asked of a case, as a result holds it."""
        return [asdict(asked) for asked in self.asked if re.search(asked.cases, case.name)]

    def left_out(self, contender: str, case: Any) -> str | None:
        """Why the suite does not run a contender on a case; None = it does."""
        for limit in self.limits:
            named = re.search(limit.peers, contender) and re.search(limit.cases, case.name)
            if named and case.seqlen > limit.seqlen:
                where = f" above S {limit.seqlen}" if limit.seqlen else ""
                return f"left out by the suite{where}: {limit.reason}"
        return None


def names(command: str | None = None) -> tuple[str, ...]:
    """Names of the suites that have a case for a command; of all for None."""
    suites = _read()
    return tuple(name for name in suites if command is None or any(_rows(suites[name], command)))


def load(name: str, command: str) -> Suite:
    """The cases of suite `name` that `command` runs.

    Raises:
        ValueError: there is no such suite, or it is not well formed.
    """
    suites = _read()
    if name not in suites:
        raise ValueError(f"suite: got {name!r}, expected one of {sorted(names(command))}")
    table = suites[name]
    feature = features.of(command)
    kind = feature.Case if feature else Case
    cases = [case for fields in _rows(table, command) for case in _expand(fields, kind)]
    repeated = {case.name for case in cases if sum(case.name == c.name for c in cases) > 1}
    swept = {case.name for case in cases if case.sweep}
    if repeated - swept:
        raise ValueError(f"suite {name!r}: cases given twice: {sorted(repeated - swept)}")
    limits = tuple(Limit(**fields) for fields in table.get("limit", ()))
    asked = tuple(Asked(**fields) for fields in table.get("asked", ()))
    options = {key: table[key] for key in ("seconds", "graph") if key in table}
    return Suite(name, table["about"], tuple(cases), limits, asked, **options)


def _rows(table: dict[str, Any], command: str) -> Iterator[dict[str, Any]]:
    """Fields of a suite's cases that `command` runs; a sweep is still one."""
    for row in table["case"]:
        fields = table["common"] | row
        if command in fields.pop("commands", USUAL_COMMANDS):
            yield fields


def _expand(fields: dict[str, Any], kind: type) -> list[Any]:
    sweep = fields.get("sweep")
    values = [fields] if sweep is None else [fields | {sweep: x} for x in fields[sweep]]
    return [
        kind(**{name: tuple(x) if isinstance(x, list) else x for name, x in each.items()})
        for each in values
    ]


def _read() -> dict[str, Any]:
    return tomllib.loads(Path(__file__).with_name("cases.toml").read_text(encoding="utf-8"))
