"""torch FlexAttention: index-function masks, windows and softcap in one fused kernel on CUDA.

On a CPU torch runs it unfused and forward only; that is for tests, so ``auto`` never picks it there.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch

from .. import masks
from ..checks import wants_gradients
from ..spec import AttentionSpec, MaskFunction
from ..varlen import segments


def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, spec: AttentionSpec) -> torch.Tensor:
    """Compute attention with FlexAttention; arguments and result as in ``backends.reference.attend``.

    Raises:
        NotImplementedError: for gradients on CPU and for torch builds without FlexAttention.
    """
    if q.device.type == "cpu":
        if wants_gradients(q, k, v):
            raise NotImplementedError("FlexAttention has no backward pass on CPU")
        q, k, v = q.detach(), k.detach(), v.detach()
    try:
        from torch.nn.attention.flex_attention import create_block_mask, flex_attention
    except ImportError as error:
        raise NotImplementedError(f"this torch ({torch.__version__}) has no FlexAttention") from error
    n, m = q.shape[2], k.shape[2]
    mask = whole_mask(spec, q.shape[0], n, m, q.device)
    block_mask = None
    if mask is not None:
        block_mask = create_block_mask(mask, q.shape[0], q.shape[1] if spec.mask else None, n, m, device=str(q.device))
    run: Any = flex_attention
    out: torch.Tensor = (compiled(run) if q.device.type == "cuda" else run)(
        q,
        k,
        v,
        score_mod=None if spec.softcap is None else soft_capped(spec.softcap, q.device),
        block_mask=block_mask,
        scale=spec.resolved_scale(q.shape[3]),
        enable_gqa=q.shape[1] != k.shape[1],
    )
    return out


@functools.cache
def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """Compile once per process; shapes stay dynamic so that a growing cache does not recompile every step."""
    return torch.compile(function, dynamic=True)


@functools.cache
def soft_capped(softcap: float, device: torch.device) -> Callable[..., torch.Tensor]:
    """Return the score modification of a soft cap, one object per value so that compiled kernels are reused."""
    # A tensor: a Python float in the closure would become a symbol of the dynamic-shape trace, which torch refuses.
    cap = torch.tensor(softcap, device=device)
    return lambda score, batch, head, query, key: cap * torch.tanh(score / cap)


def whole_mask(spec: AttentionSpec, batch: int, n: int, m: int, device: torch.device) -> MaskFunction | None:
    """Fold causality, window, raggedness and the spec's own mask into one index function, or None if all see all."""
    functions: list[MaskFunction] = []
    offset_table = ragged_tables(spec, batch, n, m, device)
    left, right = spec.limits()
    if offset_table is not None:
        owner_q, owner_k, offset = offset_table
        functions.append(lambda b, h, i, j: (owner_q[b, i] == owner_k[b, j]) & (owner_q[b, i] >= 0))
        distance = lambda b, i, j: j - i - offset[b, i]  # noqa: E731
    else:
        distance = lambda b, i, j: j - i - (m - n)  # noqa: E731
    if left is not None:
        functions.append(lambda b, h, i, j: distance(b, i, j) >= -left)
    if right is not None:
        functions.append(lambda b, h, i, j: distance(b, i, j) <= right)
    if spec.mask is not None:
        functions.append(spec.mask)
    return functools.reduce(masks.both, functions) if functions else None


def ragged_tables(
    spec: AttentionSpec, batch: int, n: int, m: int, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None:
    """Return which segment owns each query [batch, n] and key [batch, m] (-1 and -2: none), and key - query offsets."""
    parts = segments(spec, batch, n, m)
    if parts is None:
        return None
    owner_q = torch.full((batch, n), -1)
    owner_k = torch.full((batch, m), -2)
    offset = torch.zeros(batch, n, dtype=torch.long)
    for index, part in enumerate(parts):
        queries = slice(part.query_start, part.query_start + part.queries)
        owner_q[part.row, queries] = index
        owner_k[part.row, part.key_start : part.key_start + part.keys] = index
        offset[part.row, queries] = part.key_start - part.query_start + part.keys - part.queries
    return owner_q.to(device), owner_k.to(device), offset.to(device)
