"""Progress on stderr: notes, and a bar for silent programs that watches their folder grow."""

from __future__ import annotations

import contextlib
import os
import sys
import threading
from collections.abc import Iterator
from pathlib import Path


def note(text: str) -> None:
    """Write one line to stderr without tearing a progress bar that is being drawn."""
    from tqdm import tqdm

    tqdm.write(f"longscope: {text}", file=sys.stderr)


def folder_bytes(folder: Path) -> int:
    """Return the bytes of all files below ``folder``; files that vanish meanwhile count as nothing."""
    total = 0
    for parent, _, names in os.walk(folder):
        for name in names:
            with contextlib.suppress(OSError):
                total += os.lstat(os.path.join(parent, name)).st_size
    return total


@contextlib.contextmanager
def watch(folder: Path, total: int, title: str) -> Iterator[None]:
    """Show, while the block runs, how much of ``total`` bytes has arrived in ``folder``.

    A terminal gets a bar; a log file gets the title once.
    """
    from tqdm import tqdm

    if not sys.stderr.isatty():
        note(title)
        yield
        return
    stop = threading.Event()
    bar = tqdm(total=total, desc=title, unit="B", unit_scale=True, file=sys.stderr)

    def follow() -> None:
        while not stop.wait(0.1):
            bar.update(min(folder_bytes(folder), total) - bar.n)

    thread = threading.Thread(target=follow, daemon=True)
    thread.start()
    try:
        yield
        stop.set()
        thread.join()
        bar.update(total - bar.n)
    finally:
        stop.set()
        thread.join()
        bar.close()
