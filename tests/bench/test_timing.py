"""The stopwatch of the benches measures what it says."""

import time

import pytest

from bench.flashcore import kernel, options, plot, show
from bench.timing import duel, environment, peak_bytes


def test_a_duel_finds_the_ratio_of_two_waits():
    result = duel(lambda: time.sleep(0.004), lambda: time.sleep(0.012), runs=5, warmup=0)
    assert 0.2 < result.ratio < 0.6
    assert result.quartiles[0] <= result.ratio <= result.quartiles[1]
    assert result.row()["speedup"] == pytest.approx(1 / result.ratio, abs=0.01)


def test_peak_bytes_counts_what_comes_after_the_mark():
    code = "kept = bytearray(30 << 20)\nmark()\nmore = bytearray(50 << 20)\nmore[::4096] = b'x' * len(more[::4096])"
    assert 45 << 20 < peak_bytes(code) < 60 << 20


def test_a_process_that_dies_is_reported():
    with pytest.raises(MemoryError, match="no such thing"):
        peak_bytes("raise ValueError('no such thing')")


@pytest.mark.real  # measures memory in processes of its own, each of which imports torch: too slow for the unit suite
def test_rows_are_measured_shown_and_plotted(tmp_path):
    rows = [*kernel([64], 2), next(options([64], 2))]
    assert {row["kind"] for row in rows} == {"causal", "full", "one query", "softcap 50"}
    assert all(row["ratio"] > 0 and str(row["length"]) in show(row) for row in rows)
    assert rows[-1]["peak_mib"] >= 0
    plot(rows, tmp_path)
    assert (tmp_path / "flashcore.svg").stat().st_size > 1000
    assert environment()["threads"].isdigit()
