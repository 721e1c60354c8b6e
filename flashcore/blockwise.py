"""Attention tile by tile in plain torch: every option, memory linear in sequence length, forward and backward.

The algorithm of FlashAttention-2 (Dao 2023, algorithms 1 and 2) with torch matmuls as its inner step: scores exist
only as tiles of QUERY_BLOCK x KEY_BLOCK, the softmax is accumulated in fp32, and the backward pass recomputes the
tiles from the saved log-sum-exp. Query heads of a group share their keys without expansion.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch

from . import masks
from .spec import AttentionSpec, MaskFunction

QUERY_BLOCK = 256
KEY_BLOCK = 1024


class Problem(NamedTuple):
    """A dense attention call: no lengths, no packing, all rows alike."""

    scale: float
    softcap: float | None
    left: int | None
    right: int | None
    mask: MaskFunction | None
    origin: tuple[int, int, int] = (0, 0, 0)
    """Where this problem starts in the whole call (row, query, key): what the index function must be told."""

    @classmethod
    def from_spec(cls, spec: AttentionSpec, head_dim: int, origin: tuple[int, int, int] = (0, 0, 0)) -> Problem:
        """Read a spec whose raggedness has been resolved into the tensors given."""
        left, right = spec.limits()
        return cls(spec.resolved_scale(head_dim), spec.softcap, left, right, spec.mask, origin)


class Tile(NamedTuple):
    """Scores of one block of queries against one block of keys."""

    queries: slice
    keys: slice
    scores: torch.Tensor
    """[batch, kv_heads, group, queries, keys] fp32, scaled and capped, -inf where hidden."""


def accumulation_dtype(x: torch.Tensor) -> torch.dtype:
    """Return the dtype in which tiles of ``x`` are computed: fp64 for fp64, else fp32."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def grouped(x: torch.Tensor, kv_heads: int) -> torch.Tensor:
    """View [batch, heads, n, d] as [batch, kv_heads, group, n, d]."""
    return x.unflatten(1, (kv_heads, x.shape[1] // kv_heads))


def query_blocks(n: int) -> Iterator[slice]:
    """Yield the blocks of queries."""
    for start in range(0, n, QUERY_BLOCK):
        yield slice(start, min(start + QUERY_BLOCK, n))


def key_blocks(problem: Problem, queries: slice, n: int, m: int) -> Iterator[slice]:
    """Yield the blocks of keys that some query of the block can see; hidden ones cost nothing."""
    offset = m - n
    low = 0 if problem.left is None else max(0, queries.start + offset - problem.left)
    high = m if problem.right is None else min(m, queries.stop + offset + problem.right)
    for start in range(low, high, KEY_BLOCK):
        yield slice(start, min(start + KEY_BLOCK, high))


def hidden(problem: Problem, tile: tuple[slice, slice], q: torch.Tensor, n: int, m: int) -> torch.Tensor | None:
    """Return what a tile must hide, broadcastable to its scores, or None where it hides nothing."""
    queries, keys = tile
    offset = m - n
    first = queries.start + offset
    last = queries.stop - 1 + offset
    cut_left = problem.left is not None and keys.start < last - problem.left
    cut_right = problem.right is not None and keys.stop - 1 > first + problem.right
    covered: torch.Tensor | None = None
    if cut_left or cut_right:
        position = torch.arange(queries.start, queries.stop, device=q.device)[:, None] + offset
        distance = torch.arange(keys.start, keys.stop, device=q.device)[None, :] - position
        covered = torch.zeros_like(distance, dtype=torch.bool)
        if problem.left is not None:
            covered |= distance < -problem.left
        if problem.right is not None:
            covered |= distance > problem.right
    if problem.mask is not None:
        row, query, key = problem.origin
        allowed = masks.block(
            problem.mask,
            torch.arange(row, row + q.shape[0], device=q.device),
            torch.arange(q.shape[1] * q.shape[2], device=q.device),
            torch.arange(query + queries.start, query + queries.stop, device=q.device),
            torch.arange(key + keys.start, key + keys.stop, device=q.device),
        )
        closed = ~grouped(allowed, q.shape[1])
        covered = closed if covered is None else covered | closed
    return covered


def tiles(q: torch.Tensor, k: torch.Tensor, problem: Problem, queries: slice) -> Iterator[Tile]:
    """Yield the score tiles of one block of queries.

    Args:
        q: [batch, kv_heads, group, n, d]. k: [batch, kv_heads, m, d].
    """
    n, m, compute = q.shape[3], k.shape[2], accumulation_dtype(q)
    rows = (q[:, :, :, queries].to(compute) * problem.scale).flatten(2, 3)
    for keys in key_blocks(problem, queries, n, m):
        scores = rows @ k[:, :, keys].to(compute).transpose(2, 3)
        scores = scores.unflatten(2, (q.shape[2], queries.stop - queries.start))
        if problem.softcap is not None:
            scores = scores.div_(problem.softcap).tanh_().mul_(problem.softcap)
        cover = hidden(problem, (queries, keys), q, n, m)
        if cover is not None:
            scores = scores.masked_fill_(cover, float("-inf"))
        yield Tile(queries, keys, scores)


def forward(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, problem: Problem) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (out [batch, heads, n, dv], lse [batch, heads, n] fp32; -inf and zeros for rows that see nothing)."""
    rows = grouped(q, k.shape[1])
    compute = accumulation_dtype(q)
    out = q.new_empty(*q.shape[:3], v.shape[3])
    lse = q.new_empty(q.shape[:3], dtype=compute)
    for queries in query_blocks(q.shape[2]):
        shape = (*rows.shape[:3], queries.stop - queries.start)
        peak = q.new_full(shape, float("-inf"), dtype=compute)
        total = q.new_zeros(shape, dtype=compute)
        mixed = q.new_zeros(*shape, v.shape[3], dtype=compute)
        for tile in tiles(rows, k, problem, queries):
            new_peak = torch.maximum(peak, tile.scores.amax(-1))
            # A row that has seen nothing yet keeps peak -inf; subtracting 0 there avoids inf - inf.
            safe_peak = new_peak.masked_fill(new_peak == float("-inf"), 0.0)
            weights = tile.scores.sub_(safe_peak[..., None]).exp_()
            shrink = (peak - safe_peak).exp_()
            total = total * shrink + weights.sum(-1)
            part = weights.flatten(2, 3) @ v[:, :, tile.keys].to(compute)
            mixed = mixed * shrink[..., None] + part.view_as(mixed)
            peak = new_peak
        empty = total == 0
        mixed = mixed / total.masked_fill(empty, 1.0)[..., None]
        out[:, :, queries] = mixed.flatten(1, 2).to(q.dtype)
        lse[:, :, queries] = (peak + total.log()).flatten(1, 2)
    return out, lse


def backward(
    saved: tuple[torch.Tensor, ...], grad: torch.Tensor, problem: Problem
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return (dq, dk, dv) for ``grad`` [batch, heads, n, dv], recomputing the score tiles."""
    q, k, v, out, lse = saved
    compute, kv_heads = accumulation_dtype(q), k.shape[1]
    rows, grads, outs, lses = (
        grouped(q, kv_heads),
        grouped(grad, kv_heads),
        grouped(out, kv_heads),
        grouped(lse, kv_heads),
    )
    dq = torch.zeros_like(rows, dtype=compute)
    dk, dv = torch.zeros_like(k, dtype=compute), torch.zeros_like(v, dtype=compute)
    for queries in query_blocks(q.shape[2]):
        upstream = grads[:, :, :, queries].to(compute)
        # D of the paper: the softmax's own term in its gradient, one number per query.
        own = (upstream * outs[:, :, :, queries]).sum(-1, keepdim=True)
        upstream = upstream.flatten(2, 3)
        block_rows = rows[:, :, :, queries].to(compute).flatten(2, 3)
        level = lses[:, :, :, queries, None].to(compute)
        level = level.masked_fill(level == float("-inf"), 0.0)
        for tile in tiles(rows, k, problem, queries):
            weights = (tile.scores - level).exp_()
            dv[:, :, tile.keys] += weights.flatten(2, 3).transpose(2, 3) @ upstream
            slope = (upstream @ v[:, :, tile.keys].to(compute).transpose(2, 3)).view_as(weights)
            slope = slope.sub_(own).mul_(weights)
            if problem.softcap is not None:
                # d tanh: hidden scores are -inf here, but their weight, and so their slope, is already zero.
                capped = tile.scores.masked_fill(weights == 0, 0.0) / problem.softcap
                slope = slope * (1 - capped.square())
            slope = slope.flatten(2, 3).mul_(problem.scale)
            dq[:, :, :, queries] += (slope @ k[:, :, tile.keys].to(compute)).view_as(dq[:, :, :, queries])
            dk[:, :, tile.keys] += slope.transpose(2, 3) @ block_rows
    return dq.flatten(1, 2).to(q.dtype), dk.to(k.dtype), dv.to(v.dtype)


class TiledAttention(torch.autograd.Function):
    """Autograd node of a dense problem; saves q, k, v, out and the log-sum-exp, never scores."""

    @staticmethod
    def forward(ctx: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, problem: Problem) -> torch.Tensor:
        out, lse = forward(q, k, v, problem)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.problem = problem
        return out

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        return (*backward(ctx.saved_tensors, grads[0], ctx.problem), None)


def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, problem: Problem) -> torch.Tensor:
    """Run one dense problem tile by tile; differentiable.

    Args:
        q: [batch, heads, n, d]. k: [batch, kv_heads, m, d]. v: [batch, kv_heads, m, dv].

    Returns:
        [batch, heads, n, dv] in the dtype of ``q``.
    """
    out: torch.Tensor = TiledAttention.apply(q, k, v, problem)
    return out
