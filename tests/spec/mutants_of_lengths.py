"""Mutants of V6: packed sequences, caches, pages and key lists."""

from __future__ import annotations

from dataclasses import replace

import torch

from . import changes
from .changes import instead, on_arguments, on_result
from .mutant import Mutant

OF_LENGTHS = (
    Mutant(
        "sequences not kept apart",
        {"sequences": instead(changes.one_sequence)},
        "packed/ragged-causal[float32]",
    ),
    Mutant(
        "rows of packed intervals counted from the first sequence",
        {"packed:sequence_terms": changes.sequences_shift},
        "packed/intervals[float32,random]",
    ),
    Mutant(
        "keys of packed sequences bounded as their rows",
        {"sequences": on_arguments(lambda cu_q, cu_k: (cu_q, cu_q))},
        "packed/more-keys[float32]",
    ),
    Mutant(
        "key bias of packed sequences counted from the first",
        {"key_slice": on_arguments(lambda x, keys: (x, slice(0, keys.stop - keys.start)))},
        "packed/key-bias[float32,1x1x1xSk]",
    ),
    Mutant(
        "gates of packed rows counted from the first",
        {"packed:sequence_terms": changes.first_gates},
        "packed/gates[float32,identity]",
    ),
    Mutant(
        "packed sinks and window before causality",
        {"packed:sequence_terms": on_result(lambda own, *_: replace(own, causal=False))},
        "packed/window-sinks-rows[float32,True]",
    ),
    Mutant(
        "page table ignored",
        {"paged": on_arguments(lambda x, table, n: (x, torch.arange(len(table)), n))},
        "cache/pages[float32,16]",
    ),
    Mutant(
        "pages read one key late",
        {"paged": on_result(lambda keys, *_: keys.roll(-1, 0))},
        "cache/rows-pages[float32,3]",
    ),
    Mutant(
        "entries of the page table one late",
        {"paged": on_arguments(lambda x, table, n: (x, table.roll(-1), n))},
        "cache/page-ends[float32]",
    ),
    Mutant(
        "cache aligned by its capacity",
        {"cached:attend": instead(changes.aligned_by_capacity(128))},
        "cache/rows[float32,17]",
    ),
    Mutant(
        "cache aligned by its first row",
        {
            "visibility:indices": on_result(
                lambda found, *_: (*found[:2], found[2] + len(found[0]) - 1)
            )
        },
        "cache/rows[float32,17]",
    ),
    Mutant(
        "sequences of a cache take the block map of the first",
        {"cached:sequence_terms": on_arguments(changes.first_block_map)},
        "cache/block-map-sizes[float32,16x64]",
    ),
    Mutant(
        "cache one key short",
        {"cached:sequence_terms": on_result(changes.without_last_key)},
        "cache/lengths[float32]",
    ),
    Mutant(
        "keys listed twice counted twice",
        {"listed": changes.counted.listed, "cached:attend": changes.counted.attend},
        "cache/indices[float32,twice]",
    ),
    Mutant(
        "indices past the length wrap around",
        {"listed": on_arguments(lambda x, n: (torch.where(x >= n, x % max(n, 1), x), n))},
        "cache/indices[float32,outside]",
    ),
    Mutant(
        "−1 lists the last key",
        {"listed": on_arguments(lambda x, n: (torch.where(x < 0, n - 1, x), n))},
        "cache/indices[float32,none]",
    ),
    Mutant(
        "every head reads the keys listed for the first",
        {"listed": on_result(lambda found, *_: found[:1].expand(found.shape))},
        "cache/indices-rows-pages[float32,few]",
    ),
    Mutant(
        "key list in place of the mask",
        {"cached:sequence_terms": on_result(lambda own, *_: replace(own, mask=None))},
        "cache/indices-mask[float32]",
    ),
    Mutant(
        "key list ignored",
        {"listed": on_result(lambda found, *_: changes.everywhere(found))},
        "cache/indices[float32,few]",
    ),
)
