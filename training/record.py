"""What a run was: settings, seed, versions, data, machine and command, in one file beside its result."""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.metadata
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

_PACKAGES = ("longscope", "torch", "transformers", "peft", "bitsandbytes", "accelerate", "numpy")


def run_record(settings: Mapping[str, Any], data: Iterable[str | os.PathLike[str]] = ()) -> dict[str, Any]:
    """Return what distinguishes a run from others, as JSON values.

    Args:
        settings: by name; frozen dataclasses are written out.
        data: files whose contents are noted by size and sha256.

    Raises:
        OSError: a data file cannot be read.

    >>> from training import Optimisation
    >>> run_record({"optimisation": Optimisation(seed=3)})["settings"]["optimisation"]["seed"]
    3
    """
    versions = {}
    for name in _PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return {
        "settings": plain(settings),
        "data": {os.fspath(path): fingerprint(path) for path in data},
        "versions": {"python": platform.python_version(), **versions},
        "commit": _commit(),
        "machine": {"system": platform.system(), "processor": platform.machine(), "cores": os.cpu_count()},
        "begun": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "command": " ".join(Path(word).name if place == 0 else word for place, word in enumerate(sys.argv)),
    }


def plain(value: Any) -> Any:
    """Return dataclasses, tuples and paths as JSON values.

    >>> plain({"a": (1, 2)})
    {'a': [1, 2]}
    """
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {item.name: plain(getattr(value, item.name)) for item in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    return os.fspath(value) if isinstance(value, os.PathLike) else value


def fingerprint(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Return size and sha256 of a file."""
    digest, size = hashlib.sha256(), 0
    with Path(path).open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
            size += len(block)
    return {"bytes": size, "sha256": digest.hexdigest()}


def write_record(path: Path, record: Mapping[str, Any]) -> None:
    """Write a record as a whole file or not at all.

    Raises:
        OSError: it could not be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    try:
        partial.write_text(json.dumps(record, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise OSError(f"{path} could not be written ({error}): make room and run the same command again") from error
    partial.replace(path)


def _commit() -> str | None:
    """Return the commit of the checkout the code comes from, if it is one."""
    here = Path(__file__).resolve().parent.parent
    command = ["git", "-C", str(here), "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None
