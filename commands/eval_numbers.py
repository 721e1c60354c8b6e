"""Lists of numbers on a command line."""

from __future__ import annotations


def numbers(words: str, name: str) -> tuple[int, ...]:
    """Return whole numbers from a list such as ``4K,8K,12000``, or evenly spaced ones from ``8K-128K:20``.

    K stands for 1,024. Of evenly spaced numbers both ends are among them, and fractions are cut off.

    Raises:
        ValueError: naming the option, if something else stands there.

    >>> numbers("4K, 8192", "lengths"), numbers("0-100:10", "depths")
    ((4096, 8192), (0, 11, 22, 33, 44, 55, 66, 77, 88, 100))
    """
    try:
        span, _, count = words.partition(":")
        if count:
            least, most = (_number(word) for word in span.split("-"))
            steps = int(count) - 1
            found = tuple(least + (most - least) * step // steps for step in range(steps + 1)) if steps else (least,)
        else:
            found = tuple(_number(word) for word in words.split(",") if word.strip())
    except ValueError:
        found = ()
    if not found:
        raise ValueError(
            f"{name} must be whole numbers such as 4K,8K, or evenly spaced as in 8K-128K:20, got {words!r}"
        )
    return found


def _number(word: str) -> int:
    """Return one number."""
    bare = word.strip().upper()
    return int(bare[:-1]) * 1024 if bare.endswith("K") else int(bare)
