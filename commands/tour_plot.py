"""The tour's plots: how long each run waited and what it kept, as PNG, SVG and SVG for inside a page."""

from __future__ import annotations

import io
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

# Drawn in this colour, replaced by the page's own text colour, so that the plot follows light and dark.
_INK = "#010203"
_COLOURS = ("#3f7fdc", "#d9822b", "#3f9b5f")


def bars(labels: Sequence[str], panels: Mapping[str, Sequence[float]], file: Path) -> str:
    """Draw one panel of horizontal bars per entry of ``panels``; write ``file`` as .png and .svg.

    Returns:
        The SVG for use inside HTML: no size of its own, text in the surrounding colour.

    Raises:
        ImportError: matplotlib (``longscope[eval]``) is not installed.
    """
    figure_type = _matplotlib()
    figure = figure_type(figsize=(9, 0.9 + 0.3 * len(labels)), layout="constrained")
    axes = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    for axis, (title, values) in zip(axes, panels.items(), strict=True):
        drawn = axis.barh(range(len(labels)), values, color="#3f7fdc", height=0.65)
        axis.bar_label(drawn, fmt="%.1f", padding=3, color=_INK, fontsize=8)
        axis.set_title(title, fontsize=10, color=_INK)
        axis.set_yticks(range(len(labels)), labels)
        axis.tick_params(colors=_INK, labelsize=9, length=0)
        axis.set_xticks([])
        axis.margins(x=0.14)
        axis.spines[:].set_visible(False)
    # The axes share their rows: turned once, the first label stands on top in all of them.
    axes[0].invert_yaxis()
    return _written(figure, file, ", ".join(panels))


def curves(panels: Mapping[str, Mapping[str, Sequence[tuple[float, float]]]], across: str, file: Path) -> str:
    """Draw one panel of curves per entry of ``panels``, both axes logarithmic; write ``file`` as .png and .svg.

    A curve whose name ends in "computed" is drawn dashed, in the colour of the curve of the same first words.

    Returns:
        The SVG for use inside HTML: no size of its own, text in the surrounding colour.

    Raises:
        ImportError: matplotlib (``longscope[eval]``) is not installed.
    """
    figure = _matplotlib()(figsize=(9, 3.6), layout="constrained")
    axes = figure.subplots(1, len(panels), squeeze=False)[0]
    for axis, (title, lines) in zip(axes, panels.items(), strict=True):
        colours = dict(zip(dict.fromkeys(name.partition(",")[0] for name in lines), _COLOURS, strict=False))
        for name, points in lines.items():
            style = "--" if name.endswith("computed") else "-"
            axis.plot(*zip(*points, strict=True), style, color=colours[name.partition(",")[0]], label=name, linewidth=2)
        axis.set(xscale="log", yscale="log")
        axis.set_title(title, fontsize=10, color=_INK)
        axis.set_xlabel(across, fontsize=9, color=_INK)
        axis.tick_params(which="both", colors=_INK, labelsize=8)
        axis.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
        axis.yaxis.set_major_formatter(lambda value, _: f"{value:,g}")
        axis.spines[:].set_color(_INK)
        axis.spines[["top", "right"]].set_visible(False)
        axis.legend(fontsize=8, labelcolor=_INK, frameon=False)
    return _written(figure, file, ", ".join(panels))


def _written(figure: Any, file: Path, title: str) -> str:
    """Write a figure as .png and .svg; return it as SVG for inside a page."""
    figure.savefig(file.with_suffix(".png"), dpi=150, facecolor="white")
    figure.savefig(file.with_suffix(".svg"), facecolor="white", metadata={"Date": None})
    inline = io.StringIO()
    figure.savefig(inline, format="svg", transparent=True, metadata={"Date": None})
    return _inline(inline.getvalue(), title)


def require() -> None:
    """Refuse early, before minutes of work, if plots cannot be drawn.

    Raises:
        ImportError: matplotlib (``longscope[eval]``) is not installed.
    """
    _matplotlib()


def _matplotlib() -> Any:
    """Return matplotlib's Figure class, which needs no display and no global state."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("plots need matplotlib: pip install 'longscope[eval]'") from error
    return Figure


def _inline(svg: str, title: str) -> str:
    """Strip what only a file needs and let the page decide size and text colour.

    >>> _inline('<?xml version="1.0"?><svg width="9pt" height="3pt" viewBox="0 0 9 3">#010203</svg>', "t")
    '<svg role="img" aria-label="t" viewBox="0 0 9 3">currentColor</svg>'
    """
    svg = svg[svg.index("<svg") :].replace(_INK, "currentColor")
    head, rest = svg.split(">", 1)
    head = re.sub(r'\s(width|height)="[^"]*"', "", head)
    return head.replace("<svg", f'<svg role="img" aria-label="{title}"', 1) + ">" + rest
