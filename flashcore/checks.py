"""Checks of one attention call, each with a message that names what came and what is wanted."""

from __future__ import annotations

import torch

from .spec import AttentionSpec
from .varlen import packed_boundaries


def check_call(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, spec: AttentionSpec) -> None:
    """Refuse tensors or a spec that do not fit together.

    Raises:
        TypeError: for something that is not a tensor, or mixed dtypes.
        ValueError: for wrong shapes, devices or lengths.
    """
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        if not isinstance(tensor, torch.Tensor):
            raise TypeError(f"{name} must be a tensor [batch, heads, seq, head_dim], received {type(tensor).__name__}")
        if tensor.ndim != 4:
            raise ValueError(f"{name} must be [batch, heads, seq, head_dim], received shape {list(tensor.shape)}")
        if tensor.dtype != q.dtype:
            raise TypeError(f"q, k and v must share one dtype, received q {q.dtype} and {name} {tensor.dtype}")
        if tensor.device != q.device:
            raise ValueError(
                f"q, k and v must be on one device, received q on {q.device} and {name} on {tensor.device}"
            )
    if not q.is_floating_point():
        raise TypeError(f"attention needs floating-point tensors, received {q.dtype}")
    if k.shape != v.shape and k.shape[:3] != v.shape[:3]:
        raise ValueError(f"k and v must agree but for head_dim, received {list(k.shape)} and {list(v.shape)}")
    if q.shape[0] != k.shape[0] or q.shape[3] != k.shape[3]:
        raise ValueError(f"q and k must agree in batch and head_dim, received {list(q.shape)} and {list(k.shape)}")
    if k.shape[1] == 0 or q.shape[1] % k.shape[1]:
        raise ValueError(f"heads must be a multiple of kv_heads, received {q.shape[1]} and {k.shape[1]}")
    if spec.lengths is not None:
        check_lengths("lengths", spec.lengths, q.shape[0], k.shape[2])
    if spec.query_lengths is not None:
        check_lengths("query_lengths", spec.query_lengths, q.shape[0], q.shape[2])
    if spec.cu_seqlens is not None:
        check_packed(q, k, spec)


def wants_gradients(*tensors: torch.Tensor) -> bool:
    """Say whether autograd will ask for the gradient of any of the tensors: forward-only paths must then refuse."""
    return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)


def check_lengths(name: str, lengths: torch.Tensor, batch: int, size: int) -> None:
    """Refuse per-row lengths of the wrong shape, dtype or (on CPU, where looking is free) range."""
    if lengths.shape != (batch,) or lengths.is_floating_point():
        raise ValueError(f"{name} must be integers [{batch}], received {lengths.dtype} {list(lengths.shape)}")
    if lengths.device.type == "cpu" and batch and not (int(lengths.min()) >= 0 and int(lengths.max()) <= size):
        raise ValueError(f"{name} must lie in 0..{size}, received {lengths.tolist()}")


def check_packed(q: torch.Tensor, k: torch.Tensor, spec: AttentionSpec) -> None:
    """Refuse cumulative lengths that do not describe the packed row."""
    if q.shape[0] != 1:
        raise ValueError(f"cu_seqlens describes one packed row (batch 1), received batch {q.shape[0]}")
    cu_q, cu_k = packed_boundaries(spec)
    if cu_q.ndim != 1 or cu_q.shape != cu_k.shape or cu_q.is_floating_point() or cu_k.is_floating_point():
        raise ValueError(
            f"cu_seqlens must be integer tensors [sequences + 1] of one length, "
            f"received {cu_q.dtype} {list(cu_q.shape)} and {cu_k.dtype} {list(cu_k.shape)}"
        )
    for name, cu, size in (("queries", cu_q, q.shape[2]), ("keys", cu_k, k.shape[2])):
        if cu.device.type == "cpu":
            values = cu.tolist()
            if values[0] != 0 or values[-1] != size or values != sorted(values):
                raise ValueError(f"cu_seqlens of {name} must rise from 0 to {size}, received {values}")
