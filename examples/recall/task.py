"""Multi-query associative recall (Arora et al., 2023, arXiv 2312.04927): data made on the fly.

The first half of a sequence holds pairs, a key token and right after it a value token, scattered
among filler tokens. In the second half some fillers give way to key tokens, the queries; the answer
to a query is the value that came with its key. Nothing but recall answers it: keys and values are
paired anew in every sequence.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor


class Batch(NamedTuple):
    """Sequences and their questions.

    Attributes:
        tokens: int64 `[B, S]`.
        positions: int64 `[B, Q]`, where the queries are, in no order.
        answers: int64 `[B, Q]`, the value asked for, 0 <= answer < num_values.
    """

    tokens: Tensor
    positions: Tensor
    answers: Tensor


@dataclass(frozen=True)
class Recall:
    """The sizes of the task. Tokens are keys, then values, then fillers.

    Args:
        seqlen: S, a multiple of 4.
        pairs: pairs in a sequence, keys all different; at most S / 4 and `num_keys`.
        queries: Q, questions in a sequence, at most S / 2. Each asks for a pair drawn at random.
        num_keys: key tokens in the vocabulary.
        num_values: value tokens.
        num_fillers: filler tokens.

    Raises:
        ValueError: the pairs or the queries do not fit.
    """

    seqlen: int
    pairs: int
    queries: int
    num_keys: int
    num_values: int
    num_fillers: int

    def __post_init__(self) -> None:
        if self.seqlen < 4 or self.seqlen % 4:
            raise ValueError(f"seqlen: got {self.seqlen}, expected a multiple of 4")
        for name, most in (
            ("pairs", min(self.seqlen // 4, self.num_keys)),
            ("queries", self.seqlen // 2),
        ):
            if not 1 <= getattr(self, name) <= most:
                raise ValueError(f"{name}: got {getattr(self, name)}, expected 1 to {most}")

    @property
    def vocab_size(self) -> int:
        """Tokens of every kind."""
        return self.num_keys + self.num_values + self.num_fillers

    def batch(self, batch_size: int, generator: torch.Generator) -> Batch:
        """New sequences, on the generator's device."""
        device, half = generator.device, self.seqlen // 2

        def choose(count: int, among: int) -> Tensor:
            """`count` different numbers below `among` for each sequence, in random order."""
            noise = torch.rand(batch_size, among, generator=generator, device=device)
            return noise.argsort(1)[:, :count]

        def draw(high: int, count: int) -> Tensor:
            size = (batch_size, count)
            return torch.randint(high, size, generator=generator, device=device)

        keys, values = choose(self.pairs, self.num_keys), draw(self.num_values, self.pairs)
        first_filler = self.num_keys + self.num_values
        tokens = first_filler + draw(self.num_fillers, self.seqlen)
        slots = 2 * choose(self.pairs, half // 2)
        tokens.scatter_(1, slots, keys).scatter_(1, slots + 1, self.num_keys + values)
        asked = draw(self.pairs, self.queries)
        positions = half + choose(self.queries, half)
        tokens.scatter_(1, positions, keys.gather(1, asked))
        return Batch(tokens, positions, values.gather(1, asked))
