"""The oracle: attention written out in full, in fp32 (fp64 for fp64 inputs), with an n x m mask. For short inputs."""

from __future__ import annotations

import torch

from .. import masks
from ..spec import AttentionSpec
from ..varlen import packed_boundaries


def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, spec: AttentionSpec) -> torch.Tensor:
    """Compute attention by its definition.

    Args:
        q: [batch, heads, n, d]. k: [batch, kv_heads, m, d]. v: [batch, kv_heads, m, dv].
        spec: honoured completely.

    Returns:
        [batch, heads, n, dv] in the dtype of ``q``; rows that may attend nothing are zero.
    """
    compute = torch.float64 if q.dtype == torch.float64 else torch.float32
    groups = q.shape[1] // k.shape[1]
    keys = k.to(compute).repeat_interleave(groups, dim=1)
    values = v.to(compute).repeat_interleave(groups, dim=1)
    scores = q.to(compute) @ keys.transpose(2, 3) * spec.resolved_scale(q.shape[3])
    if spec.softcap is not None:
        scores = spec.softcap * torch.tanh(scores / spec.softcap)
    hidden = ~visible(spec, q.shape[0], q.shape[1], q.shape[2], k.shape[2], q.device)
    scores = scores.masked_fill(hidden, float("-inf"))
    # A row of -inf would give NaN in softmax and in its gradient: such rows are computed on zeros, then zeroed.
    empty = hidden.all(-1, keepdim=True)
    weights = torch.softmax(scores.masked_fill(empty, 0.0), dim=-1).masked_fill(empty, 0.0)
    return (weights @ values).to(q.dtype)


def visible(spec: AttentionSpec, batch: int, heads: int, n: int, m: int, device: torch.device) -> torch.Tensor:
    """Return who sees whom, bool [batch, heads or 1, n, m]."""
    query = torch.arange(n, device=device)
    key = torch.arange(m, device=device)
    position_q, position_k, allowed = query[None] + m - n, key[None], torch.ones(1, 1, n, m, dtype=torch.bool)
    allowed = allowed.to(device)
    if spec.lengths is not None:
        lengths = spec.lengths.to(device)
        queries = spec.query_lengths.to(device) if spec.query_lengths is not None else None
        queries = queries if queries is not None else (lengths if n == m else torch.full_like(lengths, n))
        first_q = n - queries if spec.left_padded else torch.zeros_like(queries)
        first_k = m - lengths if spec.left_padded else torch.zeros_like(lengths)
        position_q = query[None] - first_q[:, None] + (lengths - queries)[:, None]
        position_k = key[None] - first_k[:, None]
        real_q = (query[None] >= first_q[:, None]) & (query[None] < (first_q + queries)[:, None])
        real_k = (position_k >= 0) & (position_k < lengths[:, None])
        allowed = (real_q[:, :, None] & real_k[:, None, :])[:, None]
    elif spec.cu_seqlens is not None:
        cu_q, cu_k = (boundary.to(device) for boundary in packed_boundaries(spec))
        owner_q = torch.searchsorted(cu_q[1:].contiguous(), query, right=True)
        owner_k = torch.searchsorted(cu_k[1:].contiguous(), key, right=True)
        size_q, size_k = cu_q.diff()[owner_q], cu_k.diff()[owner_q]
        position_q = (query - cu_q[owner_q] + size_k - size_q)[None]
        position_k = (key - cu_k[owner_k])[None]
        allowed = (owner_q[:, None] == owner_k[None, :])[None, None]
    left, right = spec.limits()
    distance = (position_k[:, None, :] - position_q[:, :, None])[:, None]
    if left is not None:
        allowed = allowed & (distance >= -left)
    if right is not None:
        allowed = allowed & (distance <= right)
    if spec.mask is not None:
        allowed = allowed & masks.dense(spec.mask, batch=batch, heads=heads, queries=n, keys=m, device=device)
    return allowed
