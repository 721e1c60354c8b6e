"""A module with the exact signatures of flash-attn 2.6-2.8 that computes on any device, by the definition.

It knows nothing of flashcore: tests put it in place of ``flash_attn`` to check what our call sites hand over.
"""

import torch


def by_definition(q, k, v, scale, causal, window_size, softcap):
    """One sequence, [n, heads, d] against [m, kv_heads, d], in fp32, bottom-right aligned."""
    n, m, group = q.shape[0], k.shape[0], q.shape[1] // k.shape[1]
    if n == 0 or m == 0:
        return torch.zeros(n, q.shape[1], v.shape[2], dtype=q.dtype)
    keys, values = (x.float().repeat_interleave(group, dim=1) for x in (k, v))
    scores = torch.einsum("nhd,mhd->hnm", q.float(), keys) * (scale or q.shape[-1] ** -0.5)
    if softcap > 0:
        scores = softcap * torch.tanh(scores / softcap)
    left, right = window_size
    if causal:
        right = 0
    distance = torch.arange(m)[None, :] - torch.arange(n)[:, None] - (m - n)
    seen = torch.ones(n, m, dtype=torch.bool)
    if left >= 0:
        seen &= distance >= -left
    if right >= 0:
        seen &= distance <= right
    weights = torch.where(seen, scores, -torch.inf).softmax(-1)
    weights = torch.where(seen.any(-1, keepdim=True), weights, 0.0)
    return torch.einsum("hnm,mhd->nhd", weights, values).to(q.dtype)


def flash_attn_func(
    q,
    k,
    v,
    dropout_p=0.0,
    softmax_scale=None,
    causal=False,
    window_size=(-1, -1),
    softcap=0.0,
    alibi_slopes=None,
    deterministic=False,
    return_attn_probs=False,
):
    rows = zip(q, k, v, strict=True)
    return torch.stack([by_definition(*row, softmax_scale, causal, window_size, softcap) for row in rows])


def flash_attn_varlen_func(
    q,
    k,
    v,
    cu_seqlens_q,
    cu_seqlens_k,
    max_seqlen_q,
    max_seqlen_k,
    dropout_p=0.0,
    softmax_scale=None,
    causal=False,
    window_size=(-1, -1),
    softcap=0.0,
    alibi_slopes=None,
    deterministic=False,
    return_attn_probs=False,
    block_table=None,
):
    assert cu_seqlens_q.dtype == cu_seqlens_k.dtype == torch.int32
    assert int(cu_seqlens_q.diff().max()) == max_seqlen_q
    assert int(cu_seqlens_k.diff().max()) == max_seqlen_k
    parts = []
    for i in range(len(cu_seqlens_q) - 1):
        own_q = slice(int(cu_seqlens_q[i]), int(cu_seqlens_q[i + 1]))
        own_k = slice(int(cu_seqlens_k[i]), int(cu_seqlens_k[i + 1]))
        parts.append(by_definition(q[own_q], k[own_k], v[own_k], softmax_scale, causal, window_size, softcap))
    return torch.cat(parts)


def flash_attn_with_kvcache(
    q,
    k_cache,
    v_cache,
    k=None,
    v=None,
    rotary_cos=None,
    rotary_sin=None,
    cache_seqlens=None,
    cache_batch_idx=None,
    cache_leftpad=None,
    block_table=None,
    softmax_scale=None,
    causal=False,
    window_size=(-1, -1),
    softcap=0.0,
    rotary_interleaved=True,
    alibi_slopes=None,
    num_splits=0,
    return_softmax_lse=False,
):
    assert cache_seqlens.dtype == torch.int32
    starts = torch.zeros_like(cache_seqlens) if cache_leftpad is None else cache_leftpad
    assert starts.dtype == torch.int32
    parts = []
    for row in range(q.shape[0]):
        own = slice(int(starts[row]), int(cache_seqlens[row]))
        keys, values = k_cache[row, own], v_cache[row, own]
        parts.append(by_definition(q[row], keys, values, softmax_scale, causal, window_size, softcap))
    return torch.stack(parts)
