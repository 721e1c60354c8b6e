"""Means of scores over lengths, and over the cells of length and depth that a heat map shows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from longllm.evals.heatmap import Panel
from longllm.evals.interval import tally
from longllm.evals.task import Row


def by_length(rows: Sequence[Row], score: str) -> dict[str, dict[str, Any]]:
    """Return number and mean of a score for each length; of ``right``, which is 0 or 1, a tally.

    >>> rows = [Row("a", "", {"f1": 0.5}, (), {"length": 8}), Row("b", "", {"f1": 1.0}, (), {"length": 8})]
    >>> by_length(rows, "f1")
    {'8': {'n': 2, 'f1': 0.75}}
    """
    found: dict[str, dict[str, Any]] = {}
    for length in sorted({row.facts["length"] for row in rows}):
        values = [row.scores[score] for row in rows if row.facts["length"] == length]
        mean = {"n": len(values), score: sum(values) / len(values)}
        found[str(length)] = tally(values) if score == "right" else mean
    return found


def by_cell(rows: Sequence[Row], score: str) -> list[dict[str, Any]]:
    """Return number and mean of a score for each length and depth, in that order.

    >>> by_cell([Row("a", "", {"f1": 0.5}, (), {"length": 8, "depth": 50})], "f1")
    [{'length': 8, 'depth': 50, 'n': 1, 'f1': 0.5}]
    """
    held: dict[tuple[int, float], list[float]] = {}
    for row in rows:
        held.setdefault((row.facts["length"], row.facts["depth"]), []).append(row.scores[score])
    return [
        {"length": length, "depth": depth, "n": len(values), score: sum(values) / len(values)}
        for (length, depth), values in sorted(held.items())
    ]


def panel(title: str, cells: Sequence[dict[str, Any]], score: str) -> Panel:
    """Return the heat map of the cells of a summary.

    >>> panel("needle", [{"length": 8, "depth": 50, "n": 1, "f1": 0.5}], "f1").values
    {(8, 50): 0.5}
    """
    lengths, depths = (sorted({cell[name] for cell in cells}) for name in ("length", "depth"))
    return Panel(title, lengths, depths, {(cell["length"], cell["depth"]): cell[score] for cell in cells})
