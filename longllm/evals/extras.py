"""The packages that scores need and that are not always installed, each with the command that installs it."""

from __future__ import annotations

import functools
import logging
from typing import Any


def missing(package: str) -> ImportError:
    """Return the error that names a missing package and how to get it."""
    return ImportError(f"this score needs the package {package}; install it: pip install 'longscope[eval]'")


@functools.cache
def rouge() -> Any:
    """Return the scorer of the package ``rouge``.

    Raises:
        ImportError: it is not installed.
    """
    try:
        from rouge import Rouge
    except ImportError as error:
        raise missing("rouge") from error
    return Rouge()


@functools.cache
def jieba() -> Any:
    """Return the Chinese word cutter, without its chatter.

    Raises:
        ImportError: it is not installed.
    """
    try:
        import jieba as cutter
    except ImportError as error:
        raise missing("jieba") from error
    cutter.setLogLevel(logging.WARNING)
    return cutter


def fuzz_ratio(left: str, right: str) -> float:
    """Return the Levenshtein ratio of two texts, 0 to 1 in steps of 0.01 as the older library has it.

    Raises:
        ImportError: the package ``rapidfuzz`` is not installed.
    """
    try:
        from rapidfuzz import fuzz
    except ImportError as error:
        raise missing("rapidfuzz") from error
    return round(fuzz.ratio(left, right)) / 100
