"""Benches whose figures take minutes each: a process for every cell, rows kept as they come and not measured again."""

from __future__ import annotations

import argparse
import contextlib
import gc
import hashlib
import json
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol

from tqdm import tqdm

from bench.timing import environment

Row = dict[str, Any]
#: method and length
Cell = tuple[str, int]


class Settings(Protocol):
    """What all cells of a run share: a dataclass of JSON values."""

    def fingerprint(self) -> str:
        """Return a hash of everything that a figure depends on besides method and length."""


Measure = Callable[[Any, str, int], Row]
#: Tokens read before the memory mark: enough to compress once, so that everything has been loaded that will be used.
WARM = 128
#: glibc's allocator gives back at once what is freed: its own threshold rises to 32 MB, and what lies between is kept
#: for reuse, not needed
HONEST_MALLOC = {"MALLOC_MMAP_THRESHOLD_": "262144", "MALLOC_TRIM_THRESHOLD_": "262144"}


def digest(*parts: Any) -> str:
    """Return a hash of JSON values."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]


def peak_memory(*, reset: bool = False) -> int:
    """Return this process's peak memory in bytes since it began, or since the last reset."""
    if reset:
        gc.collect()
        # Loading may have peaked above what stays, and hide what comes after it. Not every container allows this.
        with contextlib.suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024


def from_process(command: Sequence[str], variables: Mapping[str, str] | None = None) -> Row:
    """Run a command and return the JSON object in its last line of output; ``error`` says why there is none.

    Args:
        command: program and arguments.
        variables: of its environment, besides those of this process.
    """
    surroundings = {**os.environ, **(variables or {})}
    run = subprocess.run(command, capture_output=True, text=True, check=False, env=surroundings)
    if run.returncode < 0:
        return {"error": f"ended by {signal.Signals(-run.returncode).name} (SIGKILL: perhaps for want of memory)"}
    if run.returncode:
        return {"error": ([line for line in run.stderr.splitlines() if line.strip()] or ["no message"])[-1].strip()}
    return dict(json.loads(run.stdout.strip().splitlines()[-1]))


def measure_in(module: str, settings: Any, method: str, length: int) -> Row:
    """Measure one cell in a fresh process of a bench, so that its peak memory is its own."""
    cell = json.dumps({"settings": asdict(settings), "method": method, "length": length})
    return from_process([sys.executable, "-m", module, "--cell", cell])


def read_rows(file: Path) -> dict[str, Row]:
    """Return the rows of a JSONL file by their key, the last of each; a line cut off half-way does not count."""
    rows: dict[str, Row] = {}
    for line in file.read_text().splitlines() if file.exists() else ():
        with contextlib.suppress(json.JSONDecodeError):
            row = json.loads(line)
            rows[row["key"]] = row
    return rows


def append_row(file: Path, row: Row) -> None:
    """Add a row to a JSONL file in one write, which an interruption leaves whole or out."""
    # The newline comes first as well: the line before may have been cut off when a disk was full.
    with open(file, "ab", buffering=0) as handle:
        handle.write(b"\n" * bool(handle.tell()) + json.dumps(row).encode())
        os.fsync(handle.fileno())


def predicted_seconds(rows: Iterable[Row], method: str, length: int) -> float:
    """Predict how long a cell takes from those that are done; 0 if none is.

    Time grows with a power of the length: the one that the method's own two longest cells show, at least 1 and at
    most 2; before there are two, 2 for full attention and 1 for a cache that stays small.
    """
    done = [row for row in rows if not row.get("error")]
    own = [row for row in done if row["method"] == method]
    if not done:
        return 0.0
    seconds = {row["length"]: 0.01 for row in own or done}
    for row in own or done:
        seconds[row["length"]] = max(seconds[row["length"]], row["cell_seconds"])
    power = 2.0 if method == "full" or not own else 1.0
    if own and len(seconds) > 1:
        short, long = sorted(seconds)[-2:]
        power = min(2.0, max(1.0, math.log(seconds[long] / seconds[short]) / math.log(long / short)))
    nearest = min(seconds, key=lambda other: abs(math.log(other / length)))
    return seconds[nearest] * (length / nearest) ** (power if length > nearest else 1)


def told(row: Row) -> str:
    """Return one finished cell as a line."""
    return f"{row['method']}, {row['length']:,} tokens: {row.get('error') or 'done'} ({row['cell_seconds']:.0f} s)"


def collect(
    cells: Sequence[Cell],
    settings: Settings,
    file: Path,
    minutes: float = math.inf,
    *,
    measure: Measure,
    tell: Callable[[Row], str] = told,
    fresh: bool = False,
) -> tuple[list[Row], list[Cell]]:
    """Measure the cells that ``file`` does not have yet; return all rows, and the cells that time did not allow.

    With ``fresh`` all are measured again; a row stays until its successor has been measured without error.

    A cell that failed is tried again. The first cell, with none to predict from, is started in any case. What ``tell``
    says of a finished cell goes to stderr.
    """
    begun, shared = time.monotonic(), settings.fingerprint()
    done = {key: row for key, row in read_rows(file).items() if row.get("settings") == shared}
    keys = {cell: f"{shared}/{cell[0]}/{cell[1]}" for cell in cells}
    left_out: list[Cell] = []
    for method, length in tqdm(cells, desc="cells", unit="cell"):
        key = keys[method, length]
        known = key in done and not done[key].get("error")
        if known and not fresh:
            continue
        if time.monotonic() - begun + predicted_seconds(done.values(), method, length) > 60 * minutes:
            left_out.append((method, length))
            continue
        start = time.monotonic()
        row = {"key": key, "settings": shared, "method": method, "length": length, **measure(settings, method, length)}
        row = {"cell_seconds": round(time.monotonic() - start, 2), **row}
        if not (known and row.get("error")):
            done[key] = row
            append_row(file, row)
        tqdm.write(tell(row), file=sys.stderr)
    return [done[key] for key in keys.values() if key in done], left_out


def command_line(doc: str | None, model: str, lengths: Sequence[int]) -> argparse.ArgumentParser:
    """Return the options that these benches share; ``doc`` is the help."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=model, help="a name of the catalog, or a folder")
    parser.add_argument("--dtype", default="auto", choices=["auto", "bf16", "fp32"])
    parser.add_argument("--lengths", nargs="+", type=int, default=list(lengths))
    parser.add_argument(
        "--budget-minutes", type=float, default=math.inf, help="start no cell that would end after so many minutes"
    )
    parser.add_argument("--fresh", action="store_true", help="measure these cells again")
    parser.add_argument("--quick", action="store_true", help="1K tokens and few rows, into files named -quick")
    parser.add_argument("--out", type=Path, default=Path("out/bench"))
    parser.add_argument("--cell", help=argparse.SUPPRESS)
    return parser


def run(
    name: str, chosen: argparse.Namespace, cells: Sequence[Cell], settings: Any, measure: Measure, tell: Any = told
) -> tuple[Path, Row]:
    """Measure the cells that are missing of those ``chosen``; return the file of rows and what is known."""
    file = chosen.out / (f"{name}-quick.jsonl" if chosen.quick else f"{name}.jsonl")
    chosen.out.mkdir(parents=True, exist_ok=True)
    how: dict[str, Any] = {"measure": measure, "tell": tell, "fresh": chosen.fresh}
    rows, left_out = collect(cells, settings, file, chosen.budget_minutes, **how)
    return file, {"environment": environment(), "settings": asdict(settings), "rows": rows, "left_out": left_out}


def left_out_lines(report: Row) -> list[str]:
    """Return a line for each cell that time did not allow."""
    return [f"left out for want of time: {method} at {length:,} tokens" for method, length in report["left_out"]]
