"""How much of a KV cache may stay: a ratio, a number of slots, or bytes; and how layers share it. Integers only."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

_UNITS = {"": 1, "b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "kib": 2**10, "mib": 2**20, "gib": 2**30}
#: Tokens a decoder may write before it has to evict again, at most; and the part of the budget they may take.
ROOM, ROOM_SHARE = 64, 8


@dataclass(frozen=True)
class Budget:
    """One limit on the cache of full-attention layers: ``ratio``, ``slots`` or ``nbytes``.

    A ratio and slots count the full-attention layers alone (sliding layers are bounded by themselves); bytes count
    everything the cache holds for all rows of the batch together, sliding layers and slot positions included.

    Raises:
        ValueError: not exactly one limit, or one out of range.

    >>> Budget(ratio=8).capacity(8000, row_slot_bytes=1, fixed_bytes=0, rows=1)
    1000
    >>> Budget(nbytes=64_000_000).capacity(8000, row_slot_bytes=46_080, fixed_bytes=0, rows=2)
    694
    """

    ratio: float | None = None
    """tokens seen per slot kept, per layer on average; 1 keeps everything"""
    slots: int | None = None
    """slots per layer on average and row, however long the text"""
    nbytes: int | None = None
    """bytes for keys, values and positions, all layers and rows together"""

    def __post_init__(self) -> None:
        """Refuse what is no limit."""
        given = {key: value for key, value in vars(self).items() if value is not None}
        if len(given) != 1:
            raise ValueError(f"a budget is one of ratio, slots or nbytes, got {given or 'none of them'}")
        if self.ratio is not None and not 1 <= self.ratio < float("inf"):
            raise ValueError(f"ratio must be a number of at least 1 (1 keeps everything), got {self.ratio}")
        for name in ("slots", "nbytes"):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
                raise ValueError(f"{name} must be a whole number of at least 1, got {value!r}")

    def __str__(self) -> str:
        """Return the limit in words.

        >>> str(Budget(ratio=8)), str(Budget(slots=4096)), str(Budget(nbytes=64_000_000))
        ('ratio 8', '4,096 slots a layer', '64.0 MB')
        """
        if self.ratio is not None:
            return f"ratio {self.ratio:g}"
        return f"{self.slots:,} slots a layer" if self.slots is not None else f"{(self.nbytes or 0) / 1e6:.1f} MB"

    @property
    def keeps_all(self) -> bool:
        """Say whether nothing may ever be dropped."""
        return self.ratio == 1

    def capacity(self, tokens: int, *, row_slot_bytes: int, fixed_bytes: int, rows: int) -> int:
        """Return the slots per full-attention layer, on average, that one row may hold after ``tokens`` tokens.

        Args:
            tokens: seen by the row so far, or expected of it.
            row_slot_bytes: of one slot in every full-attention layer of one row.
            fixed_bytes: what the sliding layers of one row hold at most.
            rows: of the batch, which share a byte budget.
        """
        if self.ratio is not None:
            return math.ceil(tokens / self.ratio)
        if self.slots is not None:
            return self.slots
        return max(0, (self.nbytes or 0) // rows - fixed_bytes) // row_slot_bytes


def parse_bytes(text: str) -> int:
    """Read a size such as ``64MB``, ``1.5 GiB`` or ``900000``.

    Raises:
        ValueError: anything else.

    >>> parse_bytes("64MB"), parse_bytes("1.5 GiB")
    (64000000, 1610612736)
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-z]*)\s*", text.lower())
    if not match or match[2] not in _UNITS or float(match[1]) * _UNITS[match[2]] < 1:
        raise ValueError(f"a size is a number with B, KB, MB, GB, KiB, MiB or GiB, such as 64MB; got {text!r}")
    return int(float(match[1]) * _UNITS[match[2]])


def room(capacity: int) -> int:
    """Return how many of ``capacity`` slots an eviction leaves free, so that decoding does not evict every token.

    >>> room(4096), room(100), room(4)
    (64, 12, 0)
    """
    return min(ROOM, capacity // ROOM_SHARE)


def spread(average: int, shares: Sequence[float], most: int) -> list[int]:
    """Divide ``average`` slots a layer over layers by ``shares``, none above ``most``; what one cannot use, others get.

    The result adds up to ``len(shares) * min(average, most)``: at ratio 1 every layer keeps everything.

    >>> spread(10, [1.0, 1.0], 100), spread(10, [1.5, 0.5], 100), spread(10, [1.5, 0.5], 12), spread(12, [1.5, 0.5], 12)
    ([10, 10], [15, 5], [12, 8], [12, 12])
    """
    total = len(shares) * min(average, most)
    given = [0] * len(shares)
    while (left := total - sum(given)) > 0:
        open_layers = [index for index, slots in enumerate(given) if slots < most]
        weight = sum(shares[index] for index in open_layers)
        for index in open_layers:
            given[index] = min(most, given[index] + int(left * shares[index] / weight))
        if left == total - sum(given):  # less than one slot each: one by one, most entitled first
            for index in sorted(open_layers, key=lambda layer: -shares[layer])[:left]:
                given[index] += 1
    return given
