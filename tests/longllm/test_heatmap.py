"""Heat maps: the files, and that each cell has the colour of its value."""

import re
from collections.abc import Sequence
from pathlib import Path

import pytest

from longllm.evals.heatmap import COLOURS, Panel, draw_cells, heatmap

LENGTHS, DEPTHS = (1024, 2048), (0, 50, 100)


def fills(svg: Path) -> list[str]:
    """The fill colours of the cells of a picture, in the order of drawing."""
    return re.findall(r'style="fill: (#[0-9a-f]{6}); stroke: #ffffff', svg.read_text(encoding="utf-8"))


def drawn(values: dict[tuple[int, float], float], file: Path, bounds: tuple[float, float] = (0.0, 1.0)) -> list[str]:
    pytest.importorskip("matplotlib")
    _, svg = heatmap([[Panel("values", LENGTHS, DEPTHS, values)]], file, bounds=bounds)
    return fills(svg)


def near(colour: str, other: str) -> bool:
    def channels(text: str) -> Sequence[int]:
        return [int(text[place : place + 2], 16) for place in (1, 3, 5)]

    return max(abs(a - b) for a, b in zip(channels(colour), channels(other), strict=True)) <= 3


def test_bad_middling_and_good_cells_have_the_published_colours(tmp_path: Path) -> None:
    bounds = low, high = 1.0, 10.0
    middle = 5.5
    values = {(1024, 0): low, (1024, 50): middle, (1024, 100): high, (2048, 0): high, (2048, 50): low}
    found = drawn(values, tmp_path / "map", bounds)
    expected = [COLOURS[0], COLOURS[2], COLOURS[1], COLOURS[0], COLOURS[2], "#e4e4e4"]  # row by row from depth 0
    assert len(found) == 6
    assert all(near(colour, other) for colour, other in zip(found, expected, strict=True)), found


def test_both_files_are_written_under_the_whole_name(tmp_path: Path) -> None:
    drawn({(1024, 0): 1.0}, tmp_path / "new" / "yarn-2.5")
    png, svg = (tmp_path / "new" / f"yarn-2.5.{ending}" for ending in ("png", "svg"))
    assert png.read_bytes().startswith(b"\x89PNG")
    assert b"<dc:date>" not in svg.read_bytes()


def test_runs_stand_side_by_side(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    cells = [
        {"kind": kind, "length": length, "depth": depth, "accuracy": float(kind == "needle")}
        for kind in ("needle", "passkey")
        for length in LENGTHS
        for depth in DEPTHS
    ]
    runs = [{"label": name, "depths": DEPTHS, "cells": cells} for name in ("before", "after")]
    _, svg = draw_cells(runs, tmp_path / "both")
    found = fills(svg)
    assert len(found) == 2 * 2 * 6
    assert sum(near(colour, COLOURS[2]) for colour in found) == 12
    assert sum(near(colour, COLOURS[0]) for colour in found) == 12


@pytest.mark.parametrize("rows", [[], [[]]])
def test_nothing_is_refused(rows: list[list[Panel]], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="at least one panel"):
        heatmap(rows, tmp_path / "map")
