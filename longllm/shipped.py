"""The adapters that come with this package: a name for each folder under ``longllm/weights``."""

from __future__ import annotations

from pathlib import Path

_WEIGHTS = Path(__file__).with_name("weights")


def names() -> tuple[str, ...]:
    """Return the names of the shipped adapters.

    >>> all(folder(name).is_dir() for name in names())
    True
    """
    if not _WEIGHTS.is_dir():
        return ()
    return tuple(sorted(place.name for place in _WEIGHTS.iterdir() if (place / "adapter_config.json").is_file()))


def folder(name: str) -> Path:
    """Return the folder of a shipped adapter; the name must be exact.

    Raises:
        ValueError: no such adapter; the valid names are listed.
    """
    if name not in names():
        raise ValueError(f"no shipped adapter {name!r}; there are: {', '.join(names()) or 'none'}")
    return _WEIGHTS / name
