"""Safe extraction of chosen members from wheels (zip) and npm packages (tar)."""

from __future__ import annotations

import fnmatch
import hashlib
import shutil
import tarfile
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import IO


def sha256(path: Path) -> str:
    """Return the hexadecimal sha256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _members(path: Path) -> Iterator[tuple[str, IO[bytes]]]:
    """Yield (name, open file) for each regular file of a zip or tar archive; links are not files."""
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as zipped:
            for info in zipped.infolist():
                # The attributes' upper half holds the Unix mode; 0o12 in its top bits is a symbolic link.
                if not info.is_dir() and info.external_attr >> 28 != 0o12:
                    with zipped.open(info) as file:
                        yield info.filename, file
        return
    with tarfile.open(path) as tar:
        for member in tar:
            content = tar.extractfile(member) if member.isreg() else None
            if content is not None:
                with content:
                    yield member.name, content


def _target(folder: Path, name: str, strip: Sequence[str]) -> Path:
    """Return where member ``name`` goes; refuse names that lead out of ``folder``.

    Names decide alone: ``folder`` is new and no links are ever extracted into it.
    """
    prefix = next((prefix for prefix in strip if name.startswith(prefix)), "")
    inside = PurePosixPath(name[len(prefix) :])
    names = (*PurePosixPath(name).parts, *inside.parts)
    if not inside.parts or ".." in names or "/" in names or any(sign in name for sign in "\\:\0"):
        raise OSError(f"archive member {name!r} would be written outside the target folder: refused")
    return folder / inside


def extract(path: Path, folder: Path, take: Sequence[str] = ("*",), strip: Sequence[str] = ()) -> list[str]:
    """Extract the members of an archive that match a pattern of ``take``; return the patterns that matched.

    Every member name is checked, also of members not taken: an archive with one bad name is not trusted.

    Raises:
        OSError: the archive is damaged, or a member name leads out of ``folder``.
    """
    matched: set[str] = set()
    try:
        for name, file in _members(path):
            target = _target(folder, name, strip)
            hits = [pattern for pattern in take if fnmatch.fnmatchcase(name, pattern)]
            matched.update(hits)
            if hits:
                target.parent.mkdir(parents=True, exist_ok=True)
                with target.open("wb") as out:
                    shutil.copyfileobj(file, out, 1 << 20)
    except (zipfile.BadZipFile, tarfile.TarError, zlib.error, EOFError, RuntimeError) as error:
        raise OSError(f"{path.name} is not a readable archive ({error})") from error
    return [pattern for pattern in take if pattern in matched]


def join_parts(folder: Path, name: str) -> None:
    """Concatenate the ``*.partNN`` files of ``folder``, in name order, into ``name`` and delete them."""
    parts = sorted(folder.rglob("*.part[0-9]*"), key=lambda part: part.name)
    if not parts:
        raise OSError(f"no *.partNN files to join into {name}")
    with (folder / name).open("wb") as out:
        for part in parts:
            with part.open("rb") as file:
                shutil.copyfileobj(file, out, 1 << 20)
            part.unlink()
