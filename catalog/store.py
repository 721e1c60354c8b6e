"""The cache folder: what is installed, and installing it so that nobody ever sees half of it.

The folder is ``LONGSCOPE_HOME``, else ``longscope`` in ``XDG_CACHE_HOME``, else ``~/.cache/longscope``::

    models/NAME/             a model in Hugging Face layout, and catalog.json, its manifest
    data/NAME/               a data set's files, and catalog.json
    local/NAME/              yours: a folder, or a link to one, used as NAME before anything else, unchecked
    locks/NAME.lock          held while NAME is being fetched
    models/.NAME.new-*/      being built; the next fetch of NAME removes what an interrupted one left

A fetch builds and verifies everything in the ``.new-`` folder, writes the manifest last and renames. Whoever
looks sees the old folder, or none, or the new one.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from catalog import convert, table
from catalog.archive import sha256
from catalog.progress import note
from catalog.sources import SourceError, obtain
from catalog.space import room

MANIFEST = "catalog.json"


def home() -> Path:
    """Return the cache folder, which need not exist yet.

    >>> import catalog
    >>> catalog.home().is_absolute()
    True
    """
    chosen = os.environ.get("LONGSCOPE_HOME")
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(chosen or os.path.join(base, "longscope")).expanduser().absolute()


def path(name: str | os.PathLike[str]) -> Path:
    """Return the local folder of a model or data set, fetching it on first use.

    ``name`` is a name of the catalog (or the hub repository of one of its rows), or the path of an existing
    folder, which is returned as it is.

    Raises:
        ValueError: no such name; the valid ones are listed.
        OSError: it cannot be fetched; or ``name`` is a path and no folder is there.
    """
    name = os.fspath(name)
    given = Path(name).expanduser()
    if name and not table.has(name):
        if given.is_dir():
            return given
        if given.exists():
            raise NotADirectoryError(f"{name} is a file; give the folder it is in")
        if name.startswith((".", "~")) or given.is_absolute():
            raise FileNotFoundError(f"no folder {name}")
    return install(table.row(name))


def local(name: str) -> Path | None:
    """Return the folder of a catalog name if it is here and complete, or None; nothing is fetched.

    Raises:
        ValueError: no such name.

    >>> import catalog
    >>> catalog.local("sotu") in (None, catalog.home() / "data" / "sotu", catalog.home() / "local" / "sotu")
    True
    """
    row = table.row(name)
    own = _own(row)
    return own or (folder_of(row) if not fault(row) else None)


def fetch(name: str, force: bool = False) -> Path:
    """Fetch a model or data set and return its folder; with ``force`` also where it is already here.

    If fetching fails, the folder that was there stays.

    Raises:
        ValueError: no such name.
        OSError: no source could deliver it, or the disk is full.
    """
    return install(table.row(name), force)


def verify(name: str) -> int:
    """Compare every file of an installed model or data set with its sha256; return how many were compared.

    A damaged one is not handed out again: the next ``path`` or ``fetch`` replaces it.

    Raises:
        ValueError: no such name, or not installed by the catalog.
        OSError: a file is missing or damaged.
    """
    return verify_row(table.row(name))


def folder_of(row: table.Row) -> Path:
    """Return where a row is installed."""
    return home() / ("models" if row.kind == "model" else "data") / row.name


def _own(row: table.Row) -> Path | None:
    """Return the folder that the user put in place of a row, or None."""
    own = home() / "local" / row.name
    return own if own.is_dir() else None


def fault(row: table.Row) -> str:
    """Return why a row's installed folder cannot be used, or "" if it can; compares sizes, not contents."""
    folder = folder_of(row)
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        if manifest["pin"] not in {source.pin for source in row.sources}:
            return f"it is from another source ({manifest['source']}, version {manifest['version']})"
        if row.convert and manifest["converter"] != convert.VERSION:
            return "it was converted by an older version of this program"
        for name, entry in manifest["files"].items():
            size = (folder / name).stat().st_size
            if size != entry["size"]:
                return f"{name} has {size} bytes instead of {entry['size']}"
    except (FileNotFoundError, NotADirectoryError) as error:
        return f"{Path(error.filename).name} is missing" if folder.is_dir() else "not installed"
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        return f"its {MANIFEST} is damaged ({error})"
    return ""


def verify_row(row: table.Row) -> int:
    """Do the work of ``verify`` for a row."""
    if own := _own(row):
        raise ValueError(f"{row.name} is your own folder {own}; there is nothing to compare it with")
    folder = folder_of(row)
    reason = fault(row)
    if reason == "not installed":
        raise ValueError(f"{row.name} is not installed; fetch it with: longscope fetch {row.name}")
    manifest = {} if reason else json.loads((folder / MANIFEST).read_text(encoding="utf-8"))["files"]
    for name, entry in manifest.items():
        received = sha256(folder / name)
        if received != entry["sha256"]:
            reason = f"{name} has sha256 {received} instead of {entry['sha256']}"
            # Without its manifest the folder is not handed out again; the next use fetches it anew.
            (folder / MANIFEST).unlink()
            break
    if reason:
        raise OSError(f"{row.name} in {folder} is damaged: {reason}; fetch it again: longscope fetch {row.name}")
    return len(manifest)


def install(row: table.Row, force: bool = False) -> Path:
    """Return a row's folder, building it first where it is missing, damaged, outdated or ``force`` says so.

    Raises:
        OSError: no source could deliver it, or the disk is full; what was there before is untouched.
    """
    if own := _own(row):
        return own
    folder = folder_of(row)
    if not force and not fault(row):
        return folder
    with _lock(row):
        _tidy(folder)
        reason = fault(row)
        if not force and not reason:
            return folder
        if folder.is_dir() and reason:
            note(f"{row.name}: {reason}; fetching it again")
        with room(folder.parent, _needed(row), row.name, "set LONGSCOPE_HOME to a folder on another disk"):
            _replace(row, folder, force)
    return folder


def _needed(row: table.Row) -> int:
    """Return the bytes that fetching a row takes at its height; a hub row only adds links to a cache."""
    downloads = [sum(archive.size for archive in source.archives) for source in row.sources]
    # pip and npm hold a download twice for a moment; later it is unpacked or converted.
    return 2 * max(downloads) + row.disk if any(downloads) else 1 << 20


def _replace(row: table.Row, folder: Path, fresh: bool) -> None:
    """Build a row beside ``folder`` and put it in its place; on any error ``folder`` is as it was."""
    staging = Path(tempfile.mkdtemp(prefix=f".{row.name}.new-", dir=folder.parent))
    try:
        _swap(_build(row, staging, fresh), folder)
    except SourceError as error:
        raise OSError(
            f"cannot fetch {row.name}: {error}; without a network, copy {folder.parent.name}/{row.name} "
            f"from another machine's cache folder to {home() / 'local' / row.name}"
        ) from error
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _build(row: table.Row, staging: Path, fresh: bool) -> Path:
    """Download, convert and describe a row inside ``staging``; return the finished folder."""
    ready = staging / "content"
    origin = obtain(row, staging / "work", ready, fresh)
    shutil.rmtree(staging / "work", ignore_errors=True)
    if row.convert:
        note(f"converting {row.name} to safetensors, once")
        source, ready = ready, staging / "converted"
        convert.gguf_to_folder(source, ready)
        origin["converter"] = convert.VERSION
    _describe(row, ready, origin)
    return ready


def _describe(row: table.Row, folder: Path, origin: dict[str, Any]) -> None:
    """Write the manifest; when it is there, everything it names is on the disk."""
    files = {}
    readable = folder.stat().st_mode & 0o666
    for file in sorted(entry for entry in folder.rglob("*") if entry.is_file()):
        name = file.relative_to(folder).as_posix()
        files[name] = {"size": file.stat().st_size, "sha256": sha256(file)}
        if not file.is_symlink():
            # Some writers make private files; a cache may serve several users.
            file.chmod(readable)
    manifest = {"name": row.name, "version": row.version, "licence": row.licence, **origin, "files": files}
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")
    # After a power cut a renamed folder must not hold empty files; one call is far cheaper than one for each.
    os.sync()


def _swap(ready: Path, folder: Path) -> None:
    """Put ``ready`` in the place of ``folder``; ``_tidy`` repairs what a crash between the renames leaves."""
    old = folder.with_name(f".{folder.name}.old")
    if folder.exists():
        folder.rename(old)
    ready.rename(folder)
    shutil.rmtree(old, ignore_errors=True)


def _tidy(folder: Path) -> None:
    """Undo what an interrupted fetch left. Only called with the lock held."""
    old = folder.with_name(f".{folder.name}.old")
    if old.exists() and not folder.exists():
        old.rename(folder)
    for leftover in (old, *folder.parent.glob(f".{folder.name}.new-*")):
        shutil.rmtree(leftover, ignore_errors=True)


@contextlib.contextmanager
def _lock(row: table.Row) -> Iterator[None]:
    """Let one process at a time fetch a row; the others wait and say so."""
    file = home() / "locks" / f"{row.name}.lock"
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        folder_of(row).parent.mkdir(parents=True, exist_ok=True)
        handle = file.open("w")
    except OSError as error:
        if error.errno == errno.ENOSPC:
            raise
        raise OSError(
            f"cannot use the cache folder {home()} ({error}); set LONGSCOPE_HOME to a writable one"
        ) from error
    with handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            note(f"another process is fetching {row.name}; waiting for it")
            fcntl.flock(handle, fcntl.LOCK_EX)
        # Closing the file releases the lock, also when the process is killed; but pip or npm, which inherit it,
        # keep it until they end, so that no orphan writes into a folder that the next fetch is clearing.
        os.set_inheritable(handle.fileno(), True)
        yield
