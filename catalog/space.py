"""Disk space: asking before a download, and one clear error when the disk fills up all the same."""

from __future__ import annotations

import contextlib
import errno
import shutil
from collections.abc import Iterator
from pathlib import Path

FULL = (errno.ENOSPC, errno.EDQUOT)


class DiskFullError(OSError):
    """The disk has no room; the message already says for what and how much."""


def human(size: int) -> str:
    """Return a size as people read it.

    >>> human(1489533), human(808), human(16_400_000_000)
    ('1.5 MB', '808 B', '16.4 GB')
    """
    value, unit = float(size), "B"
    for unit in ("B", "kB", "MB", "GB"):
        if value < 1000 or unit == "GB":
            break
        value /= 1000
    return f"{size} B" if unit == "B" else f"{value:.1f} {unit}"


def _full_disk(folder: Path, needed: int, what: str, remedy: str) -> DiskFullError:
    """Return the error for a disk that has no room for ``needed`` bytes in ``folder``."""
    free = shutil.disk_usage(folder).free
    return DiskFullError(
        errno.ENOSPC,
        f"not enough disk space in {folder} for {what}: about {needed} bytes ({human(needed)}) needed, "
        f"{free} bytes ({human(free)}) free; make room, or {remedy}",
    )


@contextlib.contextmanager
def room(folder: Path, needed: int, what: str, remedy: str) -> Iterator[None]:
    """Check that ``needed`` bytes are free in ``folder``, then explain a disk that fills during the block.

    Blocks may be nested, for different disks: the inner one's explanation stands.

    Raises:
        DiskFullError: with errno ENOSPC and the bytes needed and free.
    """
    if shutil.disk_usage(folder).free < needed:
        raise _full_disk(folder, needed, what, remedy)
    try:
        yield
    except DiskFullError:
        raise
    except OSError as error:
        if error.errno in FULL:
            raise _full_disk(folder, needed, what, remedy) from error
        raise
