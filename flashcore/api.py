"""The one place where attention is computed: check the call, choose a backend, run it."""

from __future__ import annotations

import functools
import logging

import torch

from . import backends
from .checks import check_call, wants_gradients
from .spec import AttentionSpec

logger = logging.getLogger("flashcore")


def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    spec: AttentionSpec | None = None,
    backend: str = "auto",
) -> torch.Tensor:
    """Compute softmax(scale · q kᵀ) v under the limits of ``spec``.

    Args:
        q: [batch, heads, n, d] queries.
        k: [batch, kv_heads, m, d] keys; heads must be a multiple of kv_heads, each group shares one key head.
        v: [batch, kv_heads, m, dv] values.
        spec: causality, window, scale, softcap, raggedness, mask; None = every query sees every key.
        backend: "auto" (the fastest that honours the call, logged once), or one of ``flashcore.backends.NAMES``.

    Returns:
        [batch, heads, n, dv] in the dtype of ``q``; softmax and sums are accumulated in fp32. Queries that see
        nothing, padding included, are zero.

    Raises:
        TypeError, ValueError: for tensors or a spec that do not fit together, or an unknown backend.
        NotImplementedError: if a named backend lacks an option of the call.
        ImportError: if a named backend is not installed.

    >>> q, k = torch.zeros(1, 4, 2, 8), torch.zeros(1, 2, 3, 8)
    >>> v = torch.arange(3.0).view(1, 1, 3, 1).expand(1, 2, 3, 8)
    >>> attention(q, k, v, AttentionSpec(causal=True))[0, 0, :, 0].tolist()
    [0.5, 1.0]
    """
    spec = AttentionSpec() if spec is None else spec
    check_call(q, k, v, spec)
    if backend != "auto":
        return backends.load(backend)(q, k, v, spec)
    for name in candidates(q, k, v, spec):
        try:
            return backends.load(name)(q, k, v, spec)
        except (NotImplementedError, ImportError) as reason:
            note_once(q.device.type, name, str(reason))
    raise NotImplementedError(f"no attention backend honours {spec}")


def candidates(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, spec: AttentionSpec) -> tuple[str, ...]:
    """Return what ``auto`` tries, fastest first; the last one honours every option."""
    if q.device.type == "cpu":
        learns = wants_gradients(q, k, v)
        # AMX tiles, which torch's bf16 kernel uses and ours does not, outrun our vector units on many queries.
        tiles = q.dtype is torch.bfloat16 and q.shape[2] > 32 and torch.cpu._is_amx_tile_supported()
        return ("sdpa",) if learns or (tiles and plain(q, k, spec)) else ("native", "sdpa")
    if q.device.type == "cuda":
        # torch's own CUDA kernel beats FlexAttention where it has every option of the call.
        return ("flash", "sdpa") if plain(q, k, spec) else ("flash", "flex", "sdpa")
    return ("sdpa",)


def plain(q: torch.Tensor, k: torch.Tensor, spec: AttentionSpec) -> bool:
    """Say whether torch's kernel has all options of the call: no raggedness, window, softcap, mask or offset."""
    square = not spec.causal or q.shape[2] in (1, k.shape[2])
    return spec.is_bare() and square and spec.lengths is None and spec.cu_seqlens is None


@functools.cache
def note_once(device: str, name: str, reason: str) -> None:
    """Log, once per reason, that ``auto`` passed a backend over."""
    logger.info("attention on %s: backend %r passed over (%s)", device, name, reason)
