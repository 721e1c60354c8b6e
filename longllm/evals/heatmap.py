"""Heat maps over length and depth, as PNG and SVG."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

#: bad, middling, good: the colours of the published figure (arXiv 2404.19553)
COLOURS = ("#F0496E", "#EBB839", "#0CD79F")
_MISSING, _INK = "#e4e4e4", "#1c1c1c"
#: up to so many columns and rows the cells carry their numbers
_NUMBERED = 12


@dataclass(frozen=True)
class Panel:
    """One heat map: values by length (columns) and depth (rows).

    >>> Panel("needles", (4096,), (0, 50), {(4096, 0): 1.0}).values[4096, 0]
    1.0
    """

    title: str
    lengths: Sequence[int]
    depths: Sequence[float]
    values: Mapping[tuple[int, float], float]
    """what is missing stays grey"""


def figure() -> tuple[Any, Any]:
    """Return matplotlib's Figure class, which needs no display, and its module of colours.

    Raises:
        ImportError: it is not installed.
    """
    try:
        import matplotlib.colors
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("heat maps need matplotlib: pip install 'longscope[eval]'") from error
    return Figure, matplotlib.colors


def tokens(length: int) -> str:
    """Return a length as people write it.

    >>> tokens(32768), tokens(8000), tokens(777)
    ('32K', '8,000', '777')
    """
    return f"{length // 1024}K" if length % 1024 == 0 else f"{length:,}"


def names(lengths: Sequence[int]) -> list[str]:
    """Return lengths as people write them, all in the same way.

    >>> names([4096, 8192]), names([8000, 128000])
    (['4K', '8K'], ['8,000', '128,000'])
    """
    alike = all(length % 1024 == 0 for length in lengths)
    return [tokens(length) if alike else f"{length:,}" for length in lengths]


def heatmap(
    rows: Sequence[Sequence[Panel]],
    file: str | os.PathLike[str],
    *,
    title: str = "",
    label: str = "share of right answers",
    bounds: tuple[float, float] = (0.0, 1.0),
) -> list[Path]:
    """Draw a table of heat maps with one colour bar; write ``file`` as .png and .svg and return both paths.

    Raises:
        ValueError: there is nothing to draw.
        ImportError: matplotlib (``longscope[eval]``) is not installed.
    """
    if not rows or not all(rows):
        raise ValueError("a heat map needs at least one panel in every row")
    figure_type, colours = figure()
    ramp = colours.LinearSegmentedColormap.from_list("retrieval", COLOURS).with_extremes(bad=_MISSING)
    across = max(map(len, rows))
    widest = max(len(panel.lengths) for row in rows for panel in row)
    tallest = max(len(panel.depths) for row in rows for panel in row)
    width, height = max(3.2, 0.62 * widest + 0.9), max(2.6, 0.34 * tallest + 1.0)
    drawing = figure_type(figsize=(1.6 + width * across, 0.6 + height * len(rows)), layout="constrained")
    grid = drawing.subplots(len(rows), across, squeeze=False)
    for axes, panels in zip(grid, rows, strict=True):
        for axis in axes[len(panels) :]:
            axis.set_visible(False)
        for axis, panel in zip(axes, panels, strict=False):
            image = _panel(axis, panel, ramp, bounds)
    bar = drawing.colorbar(image, ax=grid, shrink=0.9, aspect=30, pad=0.02)
    bar.set_label(label, color=_INK)
    bar.outline.set_visible(False)
    if title:
        drawing.suptitle(title, fontsize=12, color=_INK)
    drawing.get_layout_engine().execute(drawing)
    drawing.set_layout_engine("none")  # once is enough for both files
    base = Path(file)
    base.parent.mkdir(parents=True, exist_ok=True)
    # The name is kept whole: with_suffix would take what follows a dot in it for an ending.
    paths = [base.with_name(base.name + ending) for ending in (".png", ".svg")]
    drawing.savefig(paths[0], dpi=150, facecolor="white")
    drawing.savefig(paths[1], facecolor="white", metadata={"Date": None})
    return paths


def _panel(axis: Any, panel: Panel, ramp: Any, bounds: tuple[float, float]) -> Any:
    """Draw one heat map into its axes; return the image that the colour bar explains."""
    nothing = float("nan")
    matrix = [[panel.values.get((length, depth), nothing) for length in panel.lengths] for depth in panel.depths]
    image = axis.pcolormesh(matrix, cmap=ramp, vmin=bounds[0], vmax=bounds[1], edgecolors="white", linewidth=1.5)
    axis.invert_yaxis()
    axis.set_title(panel.title, fontsize=10, color=_INK)
    axis.set_xlabel("tokens", fontsize=9, color=_INK)
    axis.set_ylabel("depth, %", fontsize=9, color=_INK)
    slant = {"rotation": 45, "ha": "right", "rotation_mode": "anchor"} if len(panel.lengths) > 6 else {}
    axis.set_xticks([place + 0.5 for place in range(len(panel.lengths))], names(panel.lengths), **slant)
    axis.set_yticks([place + 0.5 for place in range(len(panel.depths))], [f"{depth:g}" for depth in panel.depths])
    axis.tick_params(length=0, labelsize=8, colors=_INK)
    axis.spines[:].set_visible(False)
    if max(len(panel.lengths), len(panel.depths)) <= _NUMBERED:
        places = "2g" if bounds[1] > 1 else ".2f"
        for row, values in enumerate(matrix):
            for column, value in enumerate(values):
                if value == value:
                    axis.text(
                        column + 0.5, row + 0.5, f"{value:{places}}", ha="center", va="center", fontsize=7.5, color=_INK
                    )
    return image


def draw_cells(summaries: Sequence[Mapping[str, Any]], file: str | os.PathLike[str], title: str = "") -> list[Path]:
    """Draw the needles and the pass keys of grid summaries side by side, one column of panels per run.

    >>> draw_cells([], "nowhere")
    Traceback (most recent call last):
    ...
    ValueError: a heat map needs at least one panel in every row
    """
    named = {"needle": "needles", "passkey": "pass key"}
    rows = []
    for kind, name in named.items():
        panels = []
        for summary in summaries:
            cells = [cell for cell in summary["cells"] if cell["kind"] == kind]
            lengths = sorted({cell["length"] for cell in summary["cells"]})
            values = {(cell["length"], cell["depth"]): cell["accuracy"] for cell in cells}
            panels.append(Panel(f"{summary['label']}: {name}", lengths, summary["depths"], values))
        rows.append(panels)
    return heatmap(rows, file, title=title)
