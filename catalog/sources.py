"""Getting a row's files: wheels with pip, npm packages with npm, hub repositories with huggingface_hub.

pip and npm are called as programs and asked for a package by name and version only, so that the user's own
settings (index, mirror, proxy, credentials) decide where it comes from. ``HF_HUB_OFFLINE=1`` keeps hub rows to
the Hugging Face cache; ``PIP_NO_INDEX=1`` and ``npm_config_offline=true`` are the others' own such switches.
"""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from catalog.archive import extract, join_parts, sha256
from catalog.progress import watch
from catalog.table import Archive, Row, Source

# What pip and npm say when the disk is full; either may come without an exit code of its own.
_FULL = ("No space left on device", "ENOSPC", "[Errno 28]", "Disk quota exceeded", "EDQUOT")


class SourceError(OSError):
    """One source could not deliver; the next one may."""


def obtain(row: Row, work: Path, content: Path, fresh: bool) -> dict[str, Any]:
    """Fill ``content`` from the first source that can deliver; ``work`` is scratch space on the same disk.

    ``fresh`` asks the hub even where its cache has the files. Returns what the manifest should say about the
    files' origin.

    Raises:
        OSError: no source delivered; the message says what each one answered. A full disk ends it at once.
    """
    failures = []
    for source in row.sources:
        for folder in (work, content):
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
        try:
            if source.type == "hub":
                from catalog.hub import link_snapshot

                origin = link_snapshot(row.name, source, content, fresh)
            else:
                origin = _from_archives(row, source, work, content)
        except (SourceError, ImportError) as error:
            failures.append(str(error))
            continue
        return {"source": source.type, "pin": source.pin, **origin}
    raise SourceError("; then ".join(failures))


def _from_archives(row: Row, source: Source, work: Path, content: Path) -> dict[str, Any]:
    """Download, check and unpack the archives of a wheel or npm source."""
    missing = set(source.take)
    with watch(work, sum(archive.size for archive in source.archives), f"fetching {row.name}"):
        for number, archive in enumerate(source.archives):
            path = _download(source.type, archive, work / str(number))
            missing -= set(_unpack(path, content, source))
        if source.join:
            join_parts(content, source.join)
    if missing:
        raise SourceError(f"{source.archives[0].spec} holds nothing that matches {', '.join(sorted(missing))}")
    return {"archives": [{"spec": a.spec, "size": a.size, "sha256": a.sha256} for a in source.archives]}


def _unpack(path: Path, content: Path, source: Source) -> list[str]:
    """Extract what the source takes; a damaged archive is a failure of the source, a full disk is not."""
    try:
        return extract(path, content, source.take, source.strip)
    except OSError as error:
        if error.errno is not None:
            raise
        raise SourceError(str(error)) from error


def _download(tool: str, archive: Archive, work: Path) -> Path:
    """Download one archive below ``work`` and check its sha256."""
    target, scratch = work / "archive", work / "scratch"
    target.mkdir(parents=True)
    scratch.mkdir()
    if tool == "wheel":
        _pip(archive.spec, target, scratch)
    else:
        _npm(archive.spec, target, scratch)
    shutil.rmtree(scratch, ignore_errors=True)
    found = [path for path in target.iterdir() if path.is_file()]
    if len(found) != 1:
        raise SourceError(f"{archive.spec} gave {len(found)} files instead of one archive")
    received = sha256(found[0])
    if received != archive.sha256:
        raise SourceError(
            f"{archive.spec} has the wrong checksum: expected sha256 {archive.sha256} "
            f"({archive.size} bytes), received {received} ({found[0].stat().st_size} bytes)"
        )
    return found[0]


def _pip(spec: str, target: Path, scratch: Path) -> None:
    """Download the wheel ``spec`` into ``target``; pip keeps its half-done files in ``scratch``."""
    options = ["download", "--no-deps", "--only-binary=:all:", "--no-cache-dir", "--progress-bar=off"]
    options += ["--disable-pip-version-check", "--no-input", "--retries=2", f"--dest={target}", spec]
    programs = [[sys.executable, "-m", "pip"]]
    # Environments made by other tools may lack the pip module while a pip program is at hand.
    programs += [[found] for found in map(shutil.which, ("pip3", "pip")) if found]
    for program in programs:
        failure = _run([*program, *options], {"TMPDIR": str(scratch)})
        if "No module named pip" not in failure:
            break
    if "No module named pip" in failure:
        raise SourceError(f"pip is missing, so {spec} cannot be downloaded; run: {sys.executable} -m ensurepip")
    if failure:
        raise SourceError(f"tried `pip download {spec}`: {failure}")


def _npm(spec: str, target: Path, scratch: Path) -> None:
    """Download the npm package ``spec`` into ``target``; npm's cache and logs go to ``scratch``."""
    program = shutil.which("npm")
    if program is None:
        raise SourceError(f"npm is missing, so {spec} cannot be downloaded; install Node.js, which brings npm")
    options = ["pack", "--ignore-scripts", "--no-update-notifier", "--loglevel=error", "--fetch-retries=1"]
    options += [f"--pack-destination={target}", f"--cache={scratch}", "--", spec]
    failure = _run([program, *options], {})
    if failure:
        raise SourceError(f"tried `npm pack {spec}`: {failure}")


def _run(command: Sequence[str], extra: dict[str, str]) -> str:
    """Run a program to its end; return "" or, on failure, what it said in one line.

    Raises:
        OSError: with errno ENOSPC, if it failed because the disk is full.
    """
    result = subprocess.run(
        command,
        env={**os.environ, **extra},
        # The lock of the fetch is passed on, see store; nothing else is inheritable.
        close_fds=False,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        errors="replace",
    )
    if result.returncode == 0:
        return ""
    said = f"{result.stderr}\n{result.stdout}"
    if any(sign in said for sign in _FULL):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    lines = [line.strip() for line in said.splitlines() if line.strip()]
    faults = [line for line in lines if "ERROR" in line or "npm error" in line or "No module named pip" in line]
    return " | ".join((faults or lines)[-3:]) or f"exit code {result.returncode}"
