"""The quick start of the README as a script: `python examples/quick_start.py`.

A mask that `create_mask` chooses by an attention bias, then the causal choice in an interval mask;
both forward and backward, the bias included, on a GPU if there is one.
"""

import math

import torch

from flash_sparse_attn import IntervalMask, flash_sparse_attn_func_auto
from flash_sparse_attn.utils.mask import create_mask

batch_size, seq_len, num_heads, num_kv_heads, head_dim, window_size = 1, 256, 2, 1, 64, 128
device, dtype = torch.device("cuda" if torch.cuda.is_available() else "cpu"), torch.bfloat16
query = torch.randn(
    batch_size, seq_len, num_heads, head_dim, device=device, dtype=dtype, requires_grad=True
)
key = torch.randn(
    batch_size, seq_len, num_kv_heads, head_dim, device=device, dtype=dtype, requires_grad=True
)
value = torch.randn(
    batch_size, seq_len, num_kv_heads, head_dim, device=device, dtype=dtype, requires_grad=True
)
attn_bias = torch.randn(
    batch_size, num_kv_heads, 1, seq_len, device=device, dtype=dtype, requires_grad=True
)
attn_mask = create_mask(
    attention_bias=attn_bias,
    attention_mask=None,
    batch_size=batch_size,
    query_len=seq_len,
    key_len=seq_len,
    window_size=window_size,
    min_dtype=torch.finfo(dtype).min,
)
fn = flash_sparse_attn_func_auto(backend=None)  # or "cuda", "cute", "triton"
out = fn(
    query=query,
    key=key,
    value=value,
    attn_mask=attn_mask,
    attn_bias=attn_bias,
    is_causal=True,
    softmax_scale=1.0 / math.sqrt(head_dim),
)
out.sum().backward()

best_so_far = IntervalMask.topk(attn_bias[:, :, 0], window_size)
out = fn(query, key, value, attn_mask=best_so_far, attn_bias=attn_bias)
out.sum().backward()

print(f"out {tuple(out.shape)} {out.dtype} on {out.device}")
print(f"largest gradient of the bias: {attn_bias.grad.abs().max():.3f}")
