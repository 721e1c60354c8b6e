"""Fair timing on a shared, noisy machine: both sides in one process, alternating, medians and quartiles."""

from __future__ import annotations

import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple


class Duel(NamedTuple):
    """Seconds of two sides over alternated runs; every ratio compares two neighbouring runs."""

    ours: float
    theirs: float
    ratio: float
    quartiles: tuple[float, float]
    runs: int

    def row(self) -> dict[str, Any]:
        """Return the figures as a result row; ``ratio`` is ours / theirs, below 1 means faster."""
        low, high = self.quartiles
        return {
            "ours_ms": round(self.ours * 1e3, 3),
            "theirs_ms": round(self.theirs * 1e3, 3),
            "ratio": round(self.ratio, 3),
            "ratio_quartiles": [round(low, 3), round(high, 3)],
            "speedup": round(1 / self.ratio, 2),
            "runs": self.runs,
        }


def duel(ours: Callable[[], Any], theirs: Callable[[], Any], runs: int = 20, warmup: int = 2) -> Duel:
    """Time two functions in alternation (the first one takes turns) and compare each pair of runs.

    A short call is repeated inside one run until it lasts about two milliseconds, so that the clock and a passing
    interrupt do not decide.
    """
    for _ in range(warmup):
        seconds(ours, 1), seconds(theirs, 1)
    repeats = max(1, round(2e-3 / max(seconds(ours, 1), 1e-6)))
    pairs = []
    for turn in range(runs):
        sides = (ours, theirs) if turn % 2 else (theirs, ours)
        measured = [seconds(side, repeats) for side in sides]
        pairs.append(measured if turn % 2 else measured[::-1])
    ratios = sorted(own / other for own, other in pairs)
    quarters = statistics.quantiles(ratios, n=4) if runs > 1 else [ratios[0]] * 3
    medians = [statistics.median(side) for side in zip(*pairs, strict=True)]
    return Duel(medians[0], medians[1], statistics.median(ratios), (quarters[0], quarters[2]), runs)


def seconds(function: Callable[[], Any], repeats: int) -> float:
    """Return the seconds of one call, averaged over ``repeats``."""
    start = time.perf_counter()
    for _ in range(repeats):
        function()
    return (time.perf_counter() - start) / repeats


def peak_bytes(code: str) -> int:
    """Run Python ``code`` in a fresh process and return by how much its peak memory rose while it ran.

    The code must set up what is not to be counted and then call ``mark()``.
    """
    prologue = (
        "def _peak():\n"
        "    line = next(line for line in open('/proc/self/status') if line.startswith('VmHWM'))\n"
        "    return int(line.split()[1]) * 1024\n"
        "_start = []\n"
        "def mark():\n"
        "    _start.append(_peak())\n"
    )
    epilogue = "\nprint('PEAK', _peak() - _start[0])\n"
    run = subprocess.run(
        [sys.executable, "-c", prologue + code + epilogue], capture_output=True, text=True, cwd=Path.cwd(), check=False
    )
    found = [line for line in run.stdout.splitlines() if line.startswith("PEAK")]
    if run.returncode or not found:
        # -9: the kernel ended it for want of memory, which is a result too.
        raise MemoryError(f"the measured process ended with code {run.returncode}: {run.stderr.strip()[-300:]}")
    return int(found[-1].split()[1])


def environment() -> dict[str, str]:
    """Return the versions and the processor that figures depend on."""
    import torch
    import transformers

    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "processor": processor_name(),
        "threads": str(torch.get_num_threads()),
    }


def processor_name() -> str:
    """Return the processor's name as the system gives it."""
    info = Path("/proc/cpuinfo")
    names = [line for line in info.read_text().splitlines() if line.startswith("model name")] if info.exists() else []
    return names[0].partition(":")[2].strip() if names else platform.processor() or platform.machine()
