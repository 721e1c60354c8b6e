"""How much attention each key receives: what score-based KV compression (SnapKV, H2O, TOVA) ranks keys by."""

from __future__ import annotations

import torch

from . import blockwise
from .checks import check_call
from .spec import AttentionSpec
from .varlen import Segment, segments


def attention_mass(q: torch.Tensor, k: torch.Tensor, spec: AttentionSpec | None = None) -> torch.Tensor:
    """Sum the attention probabilities that every key receives from all queries and all heads of its group.

    The one other place beside ``attention`` that computes probabilities. Tiles, two passes (log-sum-exp, then
    column sums): memory linear in n and m. Not differentiable.

    Args:
        q: [batch, heads, n, d] queries, usually the last few (SnapKV's observation window).
        k: [batch, kv_heads, m, d] keys.
        spec: as for ``attention``; None = every query sees every key.

    Returns:
        [batch, kv_heads, m] float32; the masses of one row and kv head add up to (queries that see something) x
        (heads per group).

    Raises:
        TypeError, ValueError: as ``attention``.

    >>> attention_mass(torch.zeros(1, 2, 3, 8), torch.zeros(1, 1, 4, 8)).tolist()
    [[[1.5, 1.5, 1.5, 1.5]]]
    """
    spec = AttentionSpec() if spec is None else spec
    check_call(q, k, k, spec)
    mass = q.new_zeros(k.shape[:3], dtype=torch.float32)
    with torch.no_grad():
        whole = [Segment(0, 0, q.shape[2], 0, k.shape[2])]
        parts = segments(spec, q.shape[0], q.shape[2], k.shape[2])
        for part in whole if parts is None else parts:
            rows, queries, keys = part.slices()
            rows = slice(None) if parts is None else rows
            origin = (part.row, part.query_start, part.key_start)
            problem = blockwise.Problem.from_spec(spec, q.shape[3], origin)
            mass[rows, :, keys] = dense_mass(q[rows, :, queries], k[rows, :, keys], problem)
    return mass


def dense_mass(q: torch.Tensor, k: torch.Tensor, problem: blockwise.Problem) -> torch.Tensor:
    """Return the masses [batch, kv_heads, m] of one dense problem."""
    rows = blockwise.grouped(q, k.shape[1])
    mass = q.new_zeros(k.shape[:3], dtype=torch.float32)
    for queries in blockwise.query_blocks(q.shape[2]):
        level = torch.full((*rows.shape[:3], queries.stop - queries.start), float("-inf"), device=q.device)
        for tile in blockwise.tiles(rows, k, problem, queries):
            level = torch.logaddexp(level, tile.scores.logsumexp(-1).float())
        # Rows that see nothing have -inf - -inf = NaN; at level 0 their hidden scores give weight 0.
        level = level.masked_fill(level == float("-inf"), 0.0)[..., None]
        for tile in blockwise.tiles(rows, k, problem, queries):
            mass[:, :, tile.keys] += (tile.scores - level).exp_().sum((2, 3)).float()
    return mass
