"""Position ids of training samples: plain, restarting in packed rows, and spread over a longer range (PoSE)."""

from __future__ import annotations

import random
from dataclasses import dataclass


@dataclass(frozen=True)
class Spread:
    """Position-skipping training (PoSE, arXiv 2309.10400): short samples whose positions reach over a long range.

    A sample is cut into pieces, and before each piece positions are skipped. Relative distances of the whole range are
    met at the price of the short sample.

    Raises:
        ValueError: naming the field, what it got and its range.

    >>> Spread(length=32768, pieces=2).length
    32768
    """

    length: int = 0
    """positions to spread over; 0 = positions are left as they are"""
    pieces: int = 2
    """most pieces that a sample is cut into"""
    share: float = 1.0
    """share of the samples that are spread; the others keep their natural positions, as short texts have them"""

    def __post_init__(self) -> None:
        """Refuse values that mean nothing."""
        if self.length < 0:
            raise ValueError(f"length must be 0 (off) or a number of positions, got {self.length}")
        if self.pieces < 2:
            raise ValueError(f"pieces must be at least 2, got {self.pieces}")
        if not 0 <= self.share <= 1:
            raise ValueError(f"share must lie between 0 and 1, got {self.share}")

    def positions(self, tokens: int, draws: random.Random) -> list[int]:
        """Return increasing positions for ``tokens`` tokens, below ``length``; 0, 1 … if the sample is not spread.

        Where a sample is cut is drawn uniformly, and so is how the skipped positions are divided among the gaps; the
        first gap may come before the first token.

        >>> found = Spread(length=100, pieces=3).positions(10, random.Random(1))
        >>> len(found), found == sorted(set(found)), found[-1] < 100
        (10, True, True)
        """
        spare = self.length - tokens
        if spare <= 0 or tokens < 2 or draws.random() >= self.share:
            return list(range(tokens))
        pieces = min(draws.randint(2, self.pieces), tokens)
        cuts = [0, *sorted(draws.sample(range(1, tokens), pieces - 1)), tokens]
        # Skips before each piece: sorted uniform draws, so that their sum reaches any length up to all that is spare.
        skips = sorted(draws.randint(0, spare) for _ in range(pieces))
        return [
            place + skip for begin, end, skip in zip(cuts, cuts[1:], skips, strict=False) for place in range(begin, end)
        ]
