"""The operators as PyTorch sees them: fakes, autograd, compile, autocast, strides, FLOPs."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from flash_sparse_attn import (
    IntervalMask,
    dispatch,
    flash_sparse_attn_func,
    flash_sparse_attn_varlen_func,
)
from flash_sparse_attn.ops import _read
from flash_sparse_attn.problem import OPTION_NAMES, AttentionOptions, Form
from flash_sparse_attn.tensors import TENSOR_NAMES, AttentionTensors
from flash_sparse_attn.validation import describe


def make(sq=12, sk=16, hq=4, hkv=2, d=8, dtype=torch.float32, grad=True):
    """q, k, v on the CPU."""
    torch.manual_seed(0)
    shapes = ((2, sq, hq, d), (2, sk, hkv, d), (2, sk, hkv, d))
    return [torch.randn(shape, dtype=dtype, requires_grad=grad) for shape in shapes]


def flat(tensors, options, grads):
    """The flat argument list of the operators."""
    given = [getattr(tensors, name) for name in TENSOR_NAMES]
    return [*given, *(getattr(options, name) for name in OPTION_NAMES), None, grads]


@pytest.mark.parametrize("terms", ["plain", "bias", "intervals", "gates"])
def test_opcheck(terms):
    q, k, v = make()
    fields, grads, more = {}, "q,k,v", {}
    if terms == "bias":
        fields["bias"], grads = torch.randn(1, 2, 1, 16, requires_grad=True), "q,k,v,bias"
    if terms == "intervals":
        mask = IntervalMask.topk(torch.randn(2, 2, 16), 5, seqlen_q=12)
        fields |= {"interval_start": mask.start, "interval_end": mask.end}
        more["keys_per_row"] = mask.keys_per_row
    if terms == "gates":
        fields["gate_q"] = torch.randn(2, 12, 4, requires_grad=True)
        fields["gate_k"] = torch.randn(2, 16, 2, requires_grad=True)
        more["gate"], grads = "logsigmoid", "q,k,v,gate_q,gate_k"
    options = AttentionOptions(softmax_scale=0.3, causal=True, **more)
    arguments = flat(AttentionTensors(q, k, v, **fields), options, grads)
    results = torch.library.opcheck(torch.ops.flash_sparse_attn.forward.default, arguments)
    assert set(results.values()) == {"SUCCESS"}


def test_compile_is_one_graph_and_equal():
    q, k, v = make()
    bias = torch.randn(2, 2, 1, 16, requires_grad=True)
    scores = torch.randn(2, 2, 16)

    def step(q, k, v, bias):
        mask = IntervalMask.topk(scores, 5, seqlen_q=12)
        return flash_sparse_attn_func(q, k, v, mask, bias, is_causal=True, window=(8, None))

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    eager = step(q, k, v, bias)
    torch.testing.assert_close(compiled(q, k, v, bias), eager, rtol=0, atol=0)
    inputs = (q, k, v, bias)
    got = torch.autograd.grad(compiled(*inputs).square().sum(), inputs)
    want = torch.autograd.grad(step(*inputs).square().sum(), inputs)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


def test_compile_with_dynamic_lengths():
    step = torch.compile(
        lambda q, k, v: flash_sparse_attn_func(q, k, v, is_causal=True),
        fullgraph=True,
        backend="aot_eager",
        dynamic=True,
    )
    for length in (8, 11, 17):
        q, k, v = make(length, length)
        torch.testing.assert_close(step(q, k, v), flash_sparse_attn_func(q, k, v, is_causal=True))


@pytest.mark.parametrize("window_size", [5, 12, 100])
def test_compile_of_top_keys_with_dynamic_lengths(window_size):
    """The number of keys that a row sees is the smaller of two, one of which is dynamic."""

    def step(q, k, v, scores):
        return flash_sparse_attn_func(q, k, v, IntervalMask.topk(scores, window_size))

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager", dynamic=True)
    for length in (8, 11, 17):
        inputs = (*make(length, length), torch.randn(2, 2, length))
        torch.testing.assert_close(compiled(*inputs), step(*inputs), rtol=0, atol=0)


def test_bias_alone_requires_grad():
    q, k, v = make(grad=False)
    bias = torch.randn(1, 1, 12, 16, requires_grad=True)
    flash_sparse_attn_func(q, k, v, attn_bias=bias).sum().backward()
    assert bias.grad.shape == bias.shape
    assert q.grad is None


def test_bias_gradient_has_the_dtype_and_shape_of_the_bias():
    q, k, v = make(dtype=torch.bfloat16)
    bias = torch.randn(1, 4, 1, 16, dtype=torch.bfloat16, requires_grad=True)
    flash_sparse_attn_func(q, k, v, attn_bias=bias).float().square().sum().backward()
    assert bias.grad.dtype == torch.bfloat16
    assert bias.grad.shape == bias.shape


def test_no_gradient_is_recorded_without_need():
    q, k, v = make()
    with torch.no_grad():
        assert not flash_sparse_attn_func(q, k, v).requires_grad
    assert flash_sparse_attn_func(q, k, v).requires_grad


def test_gradient_through_lse_alone():
    q, k, v = make()
    _, lse = flash_sparse_attn_func(q, k, v, return_lse=True)
    lse.sum().backward()
    assert q.grad.abs().sum() > 0
    assert v.grad.abs().sum() == 0


def test_a_second_derivative_is_refused():
    """Rather than taken to be zero."""
    q, k, v = make()
    (dq,) = torch.autograd.grad(
        flash_sparse_attn_func(q, k, v).square().sum(), q, create_graph=True
    )
    with pytest.raises(RuntimeError, match="differentiate twice"):
        dq.sum().backward()


def test_query_may_be_key_and_value():
    q = torch.randn(1, 9, 2, 8, dtype=torch.float64, requires_grad=True)
    flash_sparse_attn_func(q, q, q, is_causal=True).square().sum().backward()
    parts = [q.detach().clone().requires_grad_() for _ in range(3)]
    flash_sparse_attn_func(*parts, is_causal=True).square().sum().backward()
    torch.testing.assert_close(q.grad, sum(part.grad for part in parts))


def test_transposed_and_expanded_inputs():
    q, k, v = make(grad=False)
    transposed = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v)]
    torch.testing.assert_close(flash_sparse_attn_func(*transposed), flash_sparse_attn_func(q, k, v))
    shared = k[:1].expand(2, -1, -1, -1)
    want = flash_sparse_attn_func(q, shared.contiguous(), v)
    torch.testing.assert_close(flash_sparse_attn_func(q, shared, v), want)


def test_autocast_takes_its_dtype():
    q, k, v = make()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = flash_sparse_attn_func(q, k, v)
    assert out.dtype == torch.bfloat16
    out.float().sum().backward()
    assert q.grad.dtype == torch.float32


@pytest.fixture
def problems(monkeypatch):
    """Problems of the calls so far."""
    seen = []
    select = dispatch.select
    monkeypatch.setattr(dispatch, "select", lambda p, name: seen.append(p) or select(p, name))
    return seen


def test_deterministic_flag_of_torch_reaches_the_problem(problems):
    q, k, v = make(grad=False)
    flash_sparse_attn_func(q, k, v)
    torch.use_deterministic_algorithms(True)
    try:
        flash_sparse_attn_func(q, k, v)
    finally:
        torch.use_deterministic_algorithms(False)
    assert [p.deterministic for p in problems] == [False, True]


def test_keys_of_a_row_reach_the_problem(problems):
    """0 where a mask does not say, and where there is none."""
    q, k, v = make(grad=False)
    top = IntervalMask.topk(torch.randn(1, 1, 16), 5, seqlen_q=12)
    window = IntervalMask.window(12, 16, 2, 0)
    unknown = IntervalMask.causal(12, 16)
    padding = torch.ones(2, 1, 1, 16, dtype=torch.bool)
    for mask in (top, window, top & window, top & unknown, (padding, top), unknown, padding, None):
        flash_sparse_attn_func(q, k, v, mask)
    assert [p.keys_per_row for p in problems] == [5, 3, 3, 5, 5, 0, 0, 0]


def test_packed_form_through_the_operators():
    q, k, v = (x[0].detach().requires_grad_() for x in make(16, 16))
    cu = torch.tensor([0, 5, 16], dtype=torch.int32)
    out = flash_sparse_attn_varlen_func(q, k, v, cu, cu, 11, 11, is_causal=True)
    out.square().sum().backward()
    head = flash_sparse_attn_func(q[None, :5], k[None, :5], v[None, :5], is_causal=True)[0]
    torch.testing.assert_close(out[:5], head)
    assert q.grad.shape == q.shape


def test_flops_are_counted_on_causal_pairs():
    q, k, v = make(16, 16)
    with FlopCounterMode(display=False) as counter:
        flash_sparse_attn_func(q, k, v, is_causal=True).sum().backward()
    pairs = 16 * 17 // 2
    forward = 2 * 2 * 2 * 4 * pairs * 8  # two products, two FLOPs, B 2, Hq 4, D 8
    assert counter.get_total_flops() == forward + forward * 5 // 2


def variants():
    """(tensors, options, grads) of calls no two of which are the same problem."""
    q, k, v = make(4, 16, grad=False)
    plain = AttentionOptions(softmax_scale=1.0)
    cached = AttentionOptions(form=Form.CACHE, softmax_scale=1.0)
    table, lengths, lists = (
        torch.zeros(shape, dtype=torch.int32) for shape in ((2, 1), (2,), (2, 2, 3))
    )
    half, far = ([x.to(to) for x in (q, k, v)] for to in (torch.float16, "meta"))
    yield AttentionTensors(q, k, v), plain, ()
    yield AttentionTensors(q, k, v), plain, ("q",)
    yield AttentionTensors(q, k, v), AttentionOptions(softmax_scale=2.0), ()
    yield AttentionTensors(q, k, v), AttentionOptions(softmax_scale=1.0, causal=True), ()
    yield AttentionTensors(q, k, v), AttentionOptions(softmax_scale=1.0, window_left=0), ()
    yield AttentionTensors(*half), plain, ()
    yield AttentionTensors(*far), plain, ()
    yield AttentionTensors(q[:, :3], k, v), plain, ()
    yield AttentionTensors(q, k, v[..., :5]), plain, ()
    yield AttentionTensors(q, k, v, bias=torch.zeros(1, 1, 1, 16)), plain, ()
    yield AttentionTensors(q, k, v, mask=torch.ones(1, 1, 1, 16, dtype=torch.bool)), plain, ()
    yield AttentionTensors(q, k, v), cached, ()
    yield AttentionTensors(q, k, v, key_indices=lists), cached, ()
    yield AttentionTensors(q, k, v, key_indices=lists[..., :2]), cached, ()
    records = [x.flatten(0, 1) for x in (q, k, v)]
    cu = {"cu_seqlens_q": torch.tensor([0, 8]), "cu_seqlens_k": torch.tensor([0, 32])}
    cu = {name: x.int() for name, x in cu.items()}
    for longest in (8, 9):
        form = AttentionOptions(
            form=Form.PACKED, softmax_scale=1.0, max_seqlen_q=longest, max_seqlen_k=32
        )
        yield AttentionTensors(*records, **cu), form, ()
    bias = torch.zeros(1, 1, 1, 16)
    yield AttentionTensors(*half, bias=bias), plain, ()
    yield AttentionTensors(*half, bias=bias.half()), plain, ()
    intervals = torch.zeros(1, 2, 16, dtype=torch.int32)
    yield AttentionTensors(q, k, v, interval_start=intervals, interval_end=intervals), plain, ()
    for kind in ("logsigmoid", "identity"):
        gates = {"gate_q": torch.zeros(2, 4, 4), "gate_k": torch.zeros(2, 16, 2)}
        gated = AttentionOptions(softmax_scale=1.0, gate=kind)
        yield AttentionTensors(q, k, v, **gates), gated, ()
    for page in (16, 8):
        pages = {"cache_seqlens": lengths, "page_table": table}
        yield AttentionTensors(q, k[:, :page], v[:, :page], **pages), cached, ()


def test_what_is_kept_of_a_call_serves_none_that_differs():
    """The operators describe calls that are alike once: before, between and after others, and of
    any strides, each is what it is.
    """
    calls = list(variants())
    found = set()
    for _ in range(2):
        for tensors, options, grads in calls:
            problem = _read(flat(tensors, options, ",".join(grads)))[1]
            assert problem == describe(tensors, options, grads)
            found.add(problem)
    assert len(found) == len(calls)


def test_a_call_that_breaks_a_rule_raises_every_time():
    """After one that does not, too: 1, 1.0 and True are equal, but only one of them is a bool."""
    q, k, v = make()
    flash_sparse_attn_func(q, k, v, is_causal=True, softmax_scale=1.0)
    for _ in range(2):
        with pytest.raises(TypeError, match="is_causal"):
            flash_sparse_attn_func(q, k, v, is_causal=1, softmax_scale=1.0)
        with pytest.raises(TypeError, match="softmax_scale"):
            flash_sparse_attn_func(q, k, v, is_causal=True, softmax_scale=True)
        with pytest.raises(ValueError, match="head dim of k"):
            flash_sparse_attn_func(q, k[..., :4], v, is_causal=True, softmax_scale=1.0)
        with pytest.raises(TypeError, match="dtype of k"):
            flash_sparse_attn_func(q, k.half(), v, is_causal=True, softmax_scale=1.0)
