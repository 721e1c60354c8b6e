"""How sure a share of right answers is."""

from __future__ import annotations

import math
from collections.abc import Iterable
from statistics import NormalDist
from typing import Any


def wilson(right: int, n: int, confidence: float = 0.95) -> tuple[float, float]:
    """Return the Wilson interval of a share (Wilson 1927); 0 to 1 where nothing was asked.

    Raises:
        ValueError: more right answers than answers, or a confidence outside 0 to 1.

    >>> [round(bound, 3) for bound in wilson(9, 10)]
    [0.596, 0.982]
    """
    if not 0 <= right <= n:
        raise ValueError(f"right must lie between 0 and n = {n}, got {right}")
    if not 0 < confidence < 1:
        raise ValueError(f"confidence must lie between 0 and 1, got {confidence}")
    if n == 0:
        return 0.0, 1.0
    z = NormalDist().inv_cdf(0.5 + confidence / 2)
    share, scale = right / n, 1 + z * z / n
    middle = (share + z * z / (2 * n)) / scale
    half = z / scale * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    # At the ends the formula is exact only up to rounding.
    return (0.0 if right == 0 else max(0.0, middle - half)), (1.0 if right == n else min(1.0, middle + half))


def tally(marks: Iterable[float]) -> dict[str, Any]:
    """Return how many answers there are, how many are right (mark 1), their share and its 95 % Wilson interval.

    >>> tally([1.0, 1.0])["n"], tally([1.0, 0.0])["accuracy"]
    (2, 0.5)
    """
    values = list(marks)
    right = sum(value == 1 for value in values)
    share = right / len(values) if values else None
    return {"n": len(values), "right": right, "accuracy": share, "interval": list(wilson(right, len(values)))}
