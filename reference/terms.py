"""The optional terms of the operator, documented once for every form."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

GATES = ("logsigmoid", "identity")


@dataclass(frozen=True, eq=False)
class Terms:
    """Keyword arguments shared by every function of the reference.

    `B Sq Sk Hq Hkv D` are the sizes of q [B, Sq, Hq, D] and k [B, Sk, Hkv, D]. A dimension written
    `{Hq, Hkv, 1}` may have any of these sizes; of size Hkv, the G = Hq / Hkv query heads of a
    group share it.

    Attributes:
        softmax_scale: c of S1 and S3; None means D**-0.5.
        softcap: t of S2; 0 means no cap.
        causal: V1.
        window: V2, (left, right) in keys; None is unbounded.
        sinks: V2, the number of first keys that the window does not hide.
        mask: V3, bool [{B, 1}, {Hq, Hkv, 1}, {Sq, 1}, {Sk, 1}]; True = attend.
        bias: S4, floating, sizes as the mask's.
        interval_start: V4, int32 [{B, 1}, {Hkv, 1}, Sk], first row that sees the key.
        interval_end: V4, as `interval_start`, one past the last row that sees the key.
        block_map: V5, bool [{B, 1}, {Hq, Hkv, 1}, ceil(Sq / bq), ceil(Sk / bk)]; True = attend.
        block_size: V5, (bq, bk).
        gate_q: S3, alpha [B, Sq, Hq].
        gate_k: S3, delta [B, Sk, Hkv].
        gate: S3, g: "logsigmoid" or "identity".
        gate_threshold: gamma of V7, in [0, 1]; 0 means no threshold.
        kept: T1, the elements kept, bool, sizes as the mask's; see `expand_kept`.

    Raises:
        ValueError: an argument without the one that it needs (E5, E8); an unknown `gate` (E6).
    """

    softmax_scale: float | None = None
    softcap: float = 0.0
    causal: bool = False
    window: tuple[int | None, int | None] = (None, None)
    sinks: int = 0
    mask: Tensor | None = None
    bias: Tensor | None = None
    interval_start: Tensor | None = None
    interval_end: Tensor | None = None
    block_map: Tensor | None = None
    block_size: tuple[int, int] | None = None
    gate_q: Tensor | None = None
    gate_k: Tensor | None = None
    gate: str = "logsigmoid"
    gate_threshold: float = 0.0
    kept: Tensor | None = None

    def __post_init__(self) -> None:
        pairs = (
            ("interval_start", "interval_end", "E5"),
            ("block_map", "block_size", "E5"),
            ("gate_q", "gate_k", "E8"),
        )
        for one, other, rule in pairs:
            given = [name for name in (one, other) if getattr(self, name) is not None]
            if len(given) == 1:
                raise ValueError(
                    f"{one} and {other}: got {given[0]} alone, expected both [rule {rule}]"
                )
        if self.gate not in GATES:
            raise ValueError(f"gate: got {self.gate!r}, expected one of {GATES} [rule E6]")
        if self.gate_threshold > 0 and self.gate_q is None:
            raise ValueError(
                f"gate_threshold: got {self.gate_threshold}, expected 0 without gates [rule E8]"
            )

    def scale(self, head_dim: int) -> float:
        """c, with its default filled in."""
        return head_dim**-0.5 if self.softmax_scale is None else self.softmax_scale
