"""Mutants of the reference: each replaces one or two of its small functions by a wrong one.

A `Change` makes the wrong function from the right one. It takes the place of the function wherever
the reference has it, or, for a name such as "visibility:to_query_heads", in that module.
"""

from __future__ import annotations

import math

import torch

from . import changes
from .changes import instead, on_arguments, on_result
from .mutant import Mutant
from .mutants_of_lengths import OF_LENGTHS

MUTANTS = (
    # S
    Mutant(
        "scale 0 is the default",
        {"terms:Terms.scale": instead(lambda self, d: self.softmax_scale or d**-0.5)},
        "score/scale-zero-bias[float32]",
    ),
    Mutant(
        "scale loses its sign",
        {"terms:Terms.scale": on_result(lambda scale, *_: abs(scale))},
        "score/scale-negative[float32]",
    ),
    Mutant(
        "softcap left out", {"softcap": instead(lambda s, cap: s)}, "score/softcap[float32,5.0]"
    ),
    Mutant(
        "softcap not divided by t",
        {"softcap": instead(lambda s, cap: cap * torch.tanh(s) if cap > 0 else s)},
        "score/softcap[float32,5.0]",
    ),
    Mutant(
        "softcap after bias",
        {"score": instead(changes.score_cap_last)},
        "score/softcap-bias[float32]",
    ),
    Mutant(
        "gate not scaled",
        {"gate_term": on_result(lambda term, terms, scale, *_: term / scale)},
        "gate/function[float32,identity]",
    ),
    Mutant(
        "gate with its sign turned",
        {"gate_value": on_arguments(lambda x, gate: (-x, gate))},
        "gate/function[float32,logsigmoid]",
    ),
    Mutant(
        "bias scaled",
        {"bias_term": on_result(lambda term, *_: term / 4)},
        "bias/broadcast[float32,BxHqxSqxSk]",
    ),
    Mutant(
        "bias head h % Hkv",
        {"score:to_query_heads": instead(changes.modulo)},
        "bias/broadcast[float32,1xHkvx1xSk]",
    ),
    Mutant(
        "kv head h % Hkv",
        {"forward:to_query_heads": instead(changes.modulo)},
        "score/heads[float32,heads_q=6+heads_kv=3]",
    ),
    # V
    Mutant(
        "causal sees one key more",
        {"causal": instead(lambda p, j: j <= p + 1)},
        "visibility/causal[float32]",
    ),
    Mutant(
        "causal sees one key less",
        {"causal": instead(lambda p, j: j < p)},
        "visibility/causal[float32]",
    ),
    Mutant(
        "aligned to the top left",
        {"indices": on_result(lambda found, *_: (found[0], found[1], found[0]))},
        "visibility/causal-lengths[float32,seqlen_q=64+seqlen_k=65]",
    ),
    Mutant(
        "window aligned to the top left",
        {"window": on_arguments(lambda p, j, *rest: (p - p.min(), j, *rest))},
        "visibility/window-offset[float32,seqlen_q=40+seqlen_k=120]",
    ),
    Mutant(
        "window reaches one key too far left",
        {"window": changes.wrong_window(left=1)},
        "visibility/window[float32,window_left=16+window_right=16]",
    ),
    Mutant(
        "right side of the window ignored",
        {"window": changes.wrong_window(right_ignored=True)},
        "visibility/window[float32,window_left=0+window_right=1]",
    ),
    Mutant(
        "sinks ignored",
        {"window": on_arguments(lambda p, j, bounds, sinks: (p, j, bounds, 0))},
        "visibility/sinks-causal[float32,1]",
    ),
    Mutant(
        "sinks exempt from the left bound alone",
        {"window": changes.wrong_window(sinks_left_only=True)},
        "visibility/sinks-right[float32]",
    ),
    Mutant(
        "sinks seen against causality",
        {"visible_pairs": on_result(changes.sinks_beat_causal)},
        "visibility/sinks-causal[float32,40]",
    ),
    Mutant(
        "mask ignored",
        {"visible_pairs": changes.terms_without(mask=None)},
        "mask/broadcast[float32,1x1x1xSk]",
    ),
    Mutant(
        "mask head h % Hkv",
        {"visibility:to_query_heads": instead(changes.modulo)},
        "mask/broadcast[float32,1xHkvx1xSk]",
    ),
    Mutant(
        "intervals include their end",
        {"intervals": changes.intervals(0, 1)},
        "intervals/random[float32,1x1]",
    ),
    Mutant(
        "intervals start late",
        {"intervals": changes.intervals(1, 0)},
        "intervals/random[float32,1x1]",
    ),
    Mutant(
        "ends beyond Sq hide the key",
        {"intervals": on_arguments(lambda s, e, n: (s, torch.where(e > n, 0, e), n))},
        "intervals/outside[float32]",
    ),
    Mutant(
        "block map ignored",
        {"visible_pairs": changes.terms_without(block_map=None, block_size=None)},
        "block-map/random[float32,1x1]",
    ),
    Mutant(
        "block map transposed",
        {"blocks": on_arguments(lambda x, size, *n: (x.transpose(2, 3), size, *n))},
        "block-map/square[float32]",
    ),
    Mutant(
        "sides of a block swapped",
        {"blocks": instead(changes.blocks_of_swapped_sides)},
        "block-map/tiles[float32,32x64]",
    ),
    Mutant(
        "last block cut off where it is ragged",
        {"blocks": on_result(changes.without_ragged_blocks)},
        "block-map/tiles[float32,128x128]",
    ),
    Mutant(
        "blocks counted from row 1",
        {"blocks": on_result(lambda seen, *_: seen.roll(-1, 2))},
        "block-map/random[float32,1x1]",
    ),
    *OF_LENGTHS,  # V6
    Mutant(
        "gate threshold over invisible keys",
        {
            "visibility:gate_term": on_arguments(
                lambda t, c, x, d: (t, c, changes.everywhere(x), d)
            ),
            "gate_threshold": on_arguments(
                lambda gate, x, gamma: (gate, changes.everywhere(x), gamma)
            ),
        },
        "gate/threshold-mask[float32]",
    ),
    Mutant(
        "gate threshold over hidden keys of a packed window",
        {
            "visibility:gate_term": on_arguments(
                lambda t, c, x, d: (t, c, changes.everywhere(x), d)
            ),
            "gate_threshold": on_arguments(
                lambda gate, x, gamma: (gate, changes.everywhere(x), gamma)
            ),
        },
        "packed/gate-threshold-intervals[float32]",
    ),
    Mutant(
        "gate threshold over keys that are not listed",
        {
            "visibility:gate_term": on_arguments(
                lambda t, c, x, d: (t, c, changes.everywhere(x), d)
            ),
            "gate_threshold": on_arguments(
                lambda gate, x, gamma: (gate, changes.everywhere(x), gamma)
            ),
        },
        "cache/gate-threshold-indices[float32]",
    ),
    Mutant(
        "gate threshold drops the row's own maximum",
        {"gate_threshold": on_result(changes.without_maximum)},
        "gate/threshold-one[float32]",
    ),
    Mutant(
        "gate threshold over all rows at once",
        {"gate_threshold": instead(changes.one_threshold)},
        "gate/threshold-causal-window[float32,identity]",
    ),
    Mutant(
        "gate threshold by the size of the scale",
        {"visibility:gate_term": on_arguments(lambda t, c, x, d: (t, abs(c), x, d))},
        "gate/threshold-negative-causal[float32]",
    ),
    Mutant(
        "gate threshold without its scale",
        {"visibility:gate_term": on_result(lambda term, terms, scale, *_: term / scale)},
        "gate/threshold-scaled[float32]",
    ),
    Mutant(
        "gate threshold without its logarithm",
        {"gate_threshold": on_arguments(lambda g, x, gamma: (g, x, math.exp(gamma)))},
        "gate/threshold[float32,0.3]",
    ),
    # M
    Mutant(
        "M1 without alignment",
        {"to_rows": on_arguments(lambda start, end, n, m: (start, end, n, n))},
        "structured/causal[float32,seqlen_q=33+seqlen_k=97]",
    ),
    Mutant(
        "M2 keeps one key more",
        {"window_intervals": changes.wider},
        "structured/window[float32,kind=window+left=10+right=0]",
    ),
    Mutant(
        "M3 ends a document one key late",
        {"document_intervals": on_arguments(changes.late_boundaries)},
        "structured/documents[float32,16x17x40x65,documents]",
    ),
    Mutant(
        "M4 keeps the others",
        {"key_intervals": on_arguments(lambda keep, n: (~keep, n))},
        "structured/keys[float32,1x1]",
    ),
    Mutant(
        "M5 gives ties to the older key",
        {"rank_order": instead(changes.older_first)},
        "structured/topk-scores[float32,equal]",
    ),
    Mutant(
        "M5 chooses among later keys too",
        {"topk_intervals": on_arguments(lambda s, n, w, causal, mask: (s, n, w, False, mask))},
        "structured/topk[float32,7]",
    ),
    Mutant(
        "M5 puts NaN first",
        {"rank_order": on_arguments(lambda s, *m: (torch.where(s.isnan(), math.inf, s), *m))},
        "structured/topk-scores[float32,nan]",
    ),
    Mutant(
        "M5 keeps one key more",
        {"topk_intervals": on_arguments(lambda s, n, w, *rest: (s, n, w + 1, *rest))},
        "structured/topk[float32,16]",
    ),
    Mutant(
        "M5 lets padded keys take part",
        {"topk_intervals": on_arguments(lambda s, n, w, causal, mask: (s, n, w, causal, None))},
        "structured/topk-padding[float32]",
    ),
    Mutant(
        "M5 chooses across the boundaries of packed sequences",
        {"topk_intervals": lambda f: lambda *arguments, **_packed: f(*arguments)},
        "packed/topk[float32,kind=topk+shape=1xHkv+window_size=8]",
    ),
    # O
    Mutant(
        "an empty row is NaN", {"softmax": instead(changes.unguarded_softmax)}, "mask/rows[float32]"
    ),
    Mutant(
        "an empty row averages all values",
        {"softmax": instead(changes.uniform_softmax)},
        "mask/none[float32,1x1x1x1]",
    ),
    Mutant(
        "lse to base 2",
        {"softmax": on_result(lambda found, *_: (found[0], found[1] / math.log(2)))},
        "score/dot-product[float32]",
    ),
    Mutant(
        "lse rounded to half precision",
        {
            "softmax": on_result(
                lambda found, *_: (found[0], changes.squeezed(found[1], torch.float16))
            )
        },
        "score/dot-product[float32]",
    ),
    Mutant(
        "probabilities rounded to half precision",
        {
            "softmax": on_result(
                lambda found, *_: (changes.squeezed(found[0], torch.bfloat16), found[1])
            )
        },
        "score/dot-product[float32]",
    ),
    Mutant(
        "float64 computed in float32",
        {"compute_dtype": instead(lambda dtype: torch.float32)},
        "score/double[float64]",
    ),
    # G
    Mutant(
        "dq without the scale", {"gradients": changes.scaled("q")}, "score/dot-product[float32]"
    ),
    Mutant(
        "dk without the scale", {"gradients": changes.scaled("k")}, "score/dot-product[float32]"
    ),
    Mutant(
        "dk and dv of the first head of a group",
        {"backward:from_query_heads": instead(changes.first_heads)},
        "score/heads[float32,heads_q=4+heads_kv=1]",
    ),
    Mutant(
        "Δ left out",
        {"score_gradient": instead(lambda p, dp, dlse: p * (dp + dlse.unsqueeze(3)))},
        "score/dot-product[float32]",
    ),
    Mutant(
        "gradient of lse ignored",
        {"score_gradient": on_arguments(lambda p, dp, dlse: (p, dp, None))},
        "score/dot-product[float32]",
    ),
    Mutant(
        "gradient of lse subtracted",
        {"score_gradient": on_arguments(lambda p, dp, dlse: (p, dp, -dlse))},
        "score/dot-product[float32]",
    ),
    Mutant(
        "derivative of the softcap left out",
        {"softcap_gradient": instead(lambda ds, r, cap: ds)},
        "score/softcap[float32,0.5]",
    ),
    Mutant(
        "bias gradient not reduced",
        {"reduce_to": instead(changes.not_reduced)},
        "gradient/bias-alone[float32,1x1x1x1]",
    ),
    Mutant(
        "bias gradient averaged",
        {"reduce_to": on_result(changes.mean_reduced)},
        "gradient/bias-alone[float32,BxHkvx1xSk]",
    ),
    Mutant(
        "bias gradient of the first head of a group",
        {"layout:from_query_heads": instead(changes.first_heads)},
        "gradient/bias-alone[float32,BxHkvx1xSk]",
    ),
    Mutant(
        "gate gradients without the scale",
        {"gate_gradients": on_arguments(lambda ds, terms, c, x: (ds, terms, 1.0, x))},
        "gate/function[float32,identity]",
    ),
    Mutant(
        "gradient of alpha of the first head of a group",
        {"gate_gradients": on_result(changes.first_alpha)},
        "gate/threshold-heads[float32,heads_q=6+heads_kv=3]",
    ),
    Mutant(
        "gate gradients rounded to half precision",
        {
            "gate_gradients": on_result(
                lambda found, *_: {
                    name: changes.squeezed(x, torch.float16) for name, x in found.items()
                }
            )
        },
        "packed/gates-alone[float32]",
    ),
    Mutant(
        "gate gradients swapped",
        {"gate_gradients": instead(changes.swapped_gates)},
        "gate/alone[float32,gate_q]",
    ),
    Mutant(
        "derivative of logsigmoid with its sign turned",
        {"gate_derivative": on_arguments(lambda x, gate: (-x, gate))},
        "gate/function[float32,logsigmoid]",
    ),
    # N
    Mutant(
        "hidden pairs multiplied by 0",
        {"softmax": instead(changes.leaky_softmax)},
        "numerics/nan-causal[float32]",
    ),
    Mutant(
        "no maximum subtracted",
        {"softmax": instead(changes.unshifted_softmax)},
        "numerics/wide[float32]",
    ),
)
