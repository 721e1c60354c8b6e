"""flash-attn >= 2.6 on CUDA: dense, varlen and kv-cache calls. The package is imported here, and only when chosen.

flash-attn wants [batch, seq, heads, d] (or packed [tokens, heads, d]) in fp16 or bf16, means "no limit" by -1 and
"no softcap" by 0, and aligns causality bottom-right as we do.
"""

from __future__ import annotations

import importlib
from types import ModuleType
from typing import Any

import torch

from ..checks import wants_gradients
from ..spec import AttentionSpec
from ..varlen import cumulative, packed_boundaries, pad, unpad, valid_tokens

INSTALL = "pip install torch && pip install --no-build-isolation 'longscope[cuda]'"


def load() -> ModuleType:
    """Import flash-attn.

    Raises:
        ImportError: if it is missing, with the install command.
    """
    try:
        return importlib.import_module("flash_attn")
    except ImportError as error:
        raise ImportError(f"backend 'flash' needs flash-attn (CUDA only, built on install): {INSTALL}") from error


def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, spec: AttentionSpec) -> torch.Tensor:
    """Compute attention with flash-attn's kernels; arguments and result as in ``backends.reference.attend``.

    Raises:
        ImportError: if flash-attn is not installed.
        NotImplementedError: for fp32, heads wider than 256, v of another width, and index-function masks.
    """
    refuse_unsupported(q, v, spec)
    kernels = load()
    left, right = spec.limits()
    options: dict[str, Any] = {
        "softmax_scale": spec.scale,
        "causal": spec.causal,
        "window_size": (-1 if left is None else left, -1 if right is None else right),
        "softcap": spec.softcap or 0.0,
    }
    if spec.cu_seqlens is not None:
        return packed_call(kernels, q, k, v, packed_boundaries(spec), options)
    if spec.lengths is None:
        out = kernels.flash_attn_func(*(x.transpose(1, 2) for x in (q, k, v)), **options)
        return out.transpose(1, 2)
    if spec.query_lengths is None and q.shape[2] != k.shape[2] and not wants_gradients(q, k, v):
        return cache_call(kernels, q, k, v, spec, options)
    return padded_call(kernels, q, k, v, spec, options)


def refuse_unsupported(q: torch.Tensor, v: torch.Tensor, spec: AttentionSpec) -> None:
    """Raise NotImplementedError for what the kernels do not have."""
    if q.dtype not in (torch.float16, torch.bfloat16):
        raise NotImplementedError(f"flash-attn computes in fp16 and bf16 only, received {q.dtype}")
    if q.shape[3] > 256 or v.shape[3] != q.shape[3]:
        raise NotImplementedError(f"flash-attn needs equal head_dim <= 256, received {q.shape[3]} and {v.shape[3]}")
    if spec.mask is not None:
        raise NotImplementedError("flash-attn has no index-function masks")


def cache_call(
    kernels: ModuleType,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    spec: AttentionSpec,
    options: dict[str, Any],
) -> torch.Tensor:
    """Attend a few new queries to a padded cache in place: no copy, no unpadding. Forward only."""
    lengths = spec.lengths.to(q.device, torch.int32) if spec.lengths is not None else None
    if spec.left_padded and lengths is not None:
        options["cache_leftpad"] = k.shape[2] - lengths
        lengths = torch.full_like(lengths, k.shape[2])
    out = kernels.flash_attn_with_kvcache(*(x.transpose(1, 2) for x in (q, k, v)), cache_seqlens=lengths, **options)
    return out.transpose(1, 2)


def padded_call(
    kernels: ModuleType,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    spec: AttentionSpec,
    options: dict[str, Any],
) -> torch.Tensor:
    """Unpad, run the varlen kernel, pad again."""
    n, m = q.shape[2], k.shape[2]
    key_lengths = torch.as_tensor(spec.lengths, device=q.device)
    same = spec.query_lengths is None and n == m
    everyone = torch.full_like(key_lengths, n)
    given = spec.query_lengths.to(q.device) if spec.query_lengths is not None else everyone
    query_lengths = key_lengths if same else given
    valid_q = valid_tokens(query_lengths, n, spec.left_padded)
    valid_k = valid_tokens(key_lengths, m, spec.left_padded)
    boundaries = cumulative(query_lengths), cumulative(key_lengths)
    out = packed_call(kernels, unpad(q, valid_q), unpad(k, valid_k), unpad(v, valid_k), boundaries, options)
    return pad(out, valid_q)


def packed_call(
    kernels: ModuleType,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    boundaries: tuple[torch.Tensor, torch.Tensor],
    options: dict[str, Any],
) -> torch.Tensor:
    """Run the varlen kernel on packed rows [1, heads, tokens, d]."""
    cu_q, cu_k = (boundary.to(q.device, torch.int32) for boundary in boundaries)
    longest = [int(boundary.diff().max()) if len(boundary) > 1 else 0 for boundary in (cu_q, cu_k)]
    rows = [x[0].transpose(0, 1) for x in (q, k, v)]
    out = kernels.flash_attn_varlen_func(*rows, cu_q, cu_k, *longest, **options)
    return out.transpose(0, 1)[None]
