"""Finished grids next to each other: one table and one figure."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from longllm.evals.grid import KINDS
from longllm.evals.heatmap import draw_cells, tokens


def read_summary(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Return the summary of a grid, from its file or from the folder of the run.

    Raises:
        ValueError: the file is no summary of a grid.
        OSError: there is no such file.
    """
    file = Path(path)
    file = file / "grid.json" if file.is_dir() else file
    try:
        summary = json.loads(file.read_text(encoding="utf-8"))
        complete = all(name in summary for name in ("label", "lengths", "cells", "depths"))
    except (TypeError, ValueError) as error:
        raise ValueError(f"{file} is no summary of a grid: {error}") from error
    if not complete:
        raise ValueError(f"{file} is no summary of a grid (longscope eval grid writes one)")
    return dict(summary)


def differences(summaries: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return the settings in which runs differ that should have been asked the same.

    >>> differences([{"seed": 1, "label": "a"}, {"seed": 2, "label": "b"}])
    ['seed']
    """
    names = ("haystack", "start", "haystack_sha256", "seed", "new_tokens", "depths", "bank")
    return [name for name in names if len({json.dumps(summary.get(name)) for summary in summaries}) > 1]


def table(summaries: Sequence[Mapping[str, Any]]) -> str:
    """Return a Markdown table: a row per run and kind, a column per length: share, right of n, 95 % interval.

    >>> cell = {"n": 10, "right": 9, "accuracy": 0.9, "interval": [0.596, 0.982]}
    >>> print(table([{"label": "base", "lengths": {"4096": {"needle": cell}}}]))
    | run | asked | 4K |
    |---|---|---|
    | base | needle | 0.90 (9/10, 0.60-0.98) |
    """
    lengths = sorted({int(length) for summary in summaries for length in summary["lengths"]})
    lines = [
        f"| run | asked | {' | '.join(tokens(length) for length in lengths)} |",
        "|---" * (len(lengths) + 2) + "|",
    ]
    for kind in KINDS:
        for summary in summaries:
            found = [summary["lengths"].get(str(length), {}).get(kind) for length in lengths]
            if any(found):
                lines.append(f"| {summary['label']} | {kind} | {' | '.join(map(_cell, found))} |")
    return "\n".join(lines)


def _cell(found: Mapping[str, Any] | None) -> str:
    """Return the figures of one run at one length."""
    if not found or not found["n"]:
        return "-"
    low, high = found["interval"]
    return f"{found['accuracy']:.2f} ({found['right']}/{found['n']}, {low:.2f}-{high:.2f})"


def compare(runs: Sequence[str | os.PathLike[str]], out: str | os.PathLike[str], title: str = "") -> dict[str, Any]:
    """Put finished runs next to each other: ``compare.md``, ``compare.json`` and a figure of heat maps in ``out``.

    Returns:
        The runs' summaries, the table, and the settings in which they differ although they should not.

    Raises:
        ValueError, OSError: as ``read_summary``; or no run was named.
        ImportError: matplotlib (``longscope[eval]``) is not installed.
    """
    from longllm.evals.run import written

    summaries = [read_summary(run) for run in runs]
    folder = Path(out)
    pictures = draw_cells(summaries, folder / "compare", title)
    shown = table(summaries)
    (folder / "compare.md").write_text(shown + "\n", encoding="utf-8")
    record = {"runs": summaries, "table": shown, "differ_in": differences(summaries)}
    written(folder / "compare.json", record)
    return {**record, "pictures": [str(path) for path in pictures]}
