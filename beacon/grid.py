"""Raw tokens and beacons in one sequence: a regular grid, filled and read through views, without index tensors.

In layout order the beacons stand at ``lead, lead + period, lead + 2 * period, …``; everything else is raw. Each side is
kept contiguous on its own, so that each goes through its own projection, and only attention sees them merged.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch


def merge(out: torch.Tensor, raw: torch.Tensor, beacons: torch.Tensor | None, lead: int, period: int) -> torch.Tensor:
    """Fill ``out`` [batch, heads, n + k, d] from ``raw`` [batch, heads, n, d] and ``beacons`` [batch, heads, k, d].

    >>> raw, beacons = torch.arange(5.0).view(1, 1, 5, 1), -torch.ones(1, 1, 2, 1)
    >>> merge(torch.empty(1, 1, 7, 1), raw, beacons, lead=2, period=3).flatten().tolist()
    [0.0, 1.0, -1.0, 2.0, 3.0, -1.0, 4.0]
    """
    if beacons is None:
        return out.copy_(raw)
    count = beacons.shape[2]
    for inside, part in _raw_views(out, raw, count, lead, period):
        inside.copy_(part)
    _beacon_view(out, count, lead, period).copy_(beacons)
    return out


def split(merged: torch.Tensor, count: int, lead: int, period: int) -> torch.Tensor:
    """Return [batch, n + count, heads, d] with the raw tokens first, of ``merged`` [batch, heads, n + count, d].

    >>> merged = torch.tensor([0.0, 1.0, -1.0, 2.0, 3.0, -1.0, 4.0]).view(1, 1, 7, 1)
    >>> split(merged, 2, lead=2, period=3).flatten().tolist()
    [0.0, 1.0, 2.0, 3.0, 4.0, -1.0, -1.0]
    """
    rows = merged.transpose(1, 2)
    if not count:
        return rows.contiguous()
    out = torch.empty_like(rows, memory_format=torch.contiguous_format)
    turned = out.transpose(1, 2)
    raw = merged.shape[2] - count
    for inside, part in _raw_views(merged, turned[:, :, :raw], count, lead, period):
        part.copy_(inside)
    turned[:, :, raw:].copy_(_beacon_view(merged, count, lead, period))
    return out


def _beacon_view(merged: torch.Tensor, count: int, lead: int, period: int) -> torch.Tensor:
    """Return the beacons of a merged sequence, as a view."""
    return merged[:, :, lead : lead + (count - 1) * period + 1 : period]


def _raw_views(
    merged: torch.Tensor, raw: torch.Tensor, count: int, lead: int, period: int
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yield equal pieces of a merged sequence and of its raw tokens: before, between and after the beacons."""
    group = period - 1
    inner = (count - 1) * group
    if lead:
        yield merged[:, :, :lead], raw[:, :, :lead]
    if inner:
        between = merged[:, :, lead + 1 : lead + 1 + (count - 1) * period].unflatten(2, (count - 1, period))
        yield between[:, :, :, :group], raw[:, :, lead : lead + inner].unflatten(2, (count - 1, group))
    if raw.shape[2] > lead + inner:
        yield merged[:, :, lead + (count - 1) * period + 1 :], raw[:, :, lead + inner :]
