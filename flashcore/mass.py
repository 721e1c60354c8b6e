"""How much attention each key receives: what score-based KV compression (SnapKV, H2O, TOVA) ranks keys by."""

from __future__ import annotations

from typing import Literal

import torch

from . import blockwise
from .checks import check_call
from .spec import AttentionSpec
from .varlen import Segment, segments

#: scores of a block of queries that are held at once: 64 MiB of fp32, or one query if that is more
HELD_SCORES = 2**24


Reduce = Literal["sum", "max"]


def attention_mass(
    q: torch.Tensor, k: torch.Tensor, spec: AttentionSpec | None = None, reduce: Reduce = "sum"
) -> torch.Tensor:
    """Sum the attention probabilities that every key receives from all queries and all heads of its group.

    The one other place beside ``attention`` that computes probabilities. A block of queries at a time, whose scores
    are held until their sums are known: memory does not grow with n. Not differentiable.

    Args:
        q: [batch, heads, n, d] queries, usually the last few (SnapKV's observation window).
        k: [batch, kv_heads, m, d] keys.
        spec: as for ``attention``; None = every query sees every key.
        reduce: "sum" over queries and heads of the group, or the "max" of them: the sharpest look a key receives.

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
            mass[rows, :, keys] = dense_mass(q[rows, :, queries], k[rows, :, keys], problem, reduce)
    return mass


def dense_mass(q: torch.Tensor, k: torch.Tensor, problem: blockwise.Problem, reduce: Reduce) -> torch.Tensor:
    """Return the masses [batch, kv_heads, m] of one dense problem."""
    rows = blockwise.grouped(q, k.shape[1])
    mass = q.new_zeros(k.shape[:3], dtype=torch.float32)
    block = max(1, HELD_SCORES // max(1, q.shape[0] * q.shape[1] * k.shape[2]))
    for start in range(0, q.shape[2], block):
        queries = slice(start, min(start + block, q.shape[2]))
        tiles = list(blockwise.tiles(rows, k, problem, queries))
        if not tiles:
            continue
        peak = torch.stack([tile.scores.amax(-1) for tile in tiles]).amax(0)
        # Rows that see nothing have -inf - -inf = NaN; against peak 0 their hidden scores give weight 0.
        peak = peak.masked_fill(peak == float("-inf"), 0.0)[..., None]
        total = torch.stack([tile.scores.sub_(peak).exp_().sum(-1) for tile in tiles]).sum(0)
        share = total.reciprocal().masked_fill(total == 0, 0.0).flatten(2, 3)[:, :, None]
        for tile in tiles:
            if reduce == "sum":
                mass[:, :, tile.keys] += (share @ tile.scores.flatten(2, 3)).squeeze(2).float()
            else:
                weights = tile.scores.flatten(2, 3).mul_(share.transpose(2, 3))
                torch.maximum(mass[:, :, tile.keys], weights.amax(2).float(), out=mass[:, :, tile.keys])
    return mass
