"""PyramidKV (Cai et al., arXiv 2406.02069, section 3.2): SnapKV with more slots in low layers, fewer in high ones."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from beacon.methods.snapkv import SnapKV


@dataclass(frozen=True)
class PyramidKV(SnapKV):
    """SnapKV's ranking under budgets that fall linearly from the first layer to the last.

    Raises:
        ValueError: as ``SnapKV``, or a steepness below 1.
    """

    steepness: float = 20.0
    """the last layer gets 1/steepness of the average, the first 2 - 1/steepness (the paper's beta); 1 is SnapKV"""

    name: ClassVar[str] = "pyramidkv"

    def __post_init__(self) -> None:
        """Refuse settings that no cache can follow."""
        super().__post_init__()
        if not 1 <= self.steepness < float("inf"):
            raise ValueError(f"{self.name}: steepness must be a number of at least 1, got {self.steepness}")

    def shares(self, layers: int) -> list[float]:
        """Return shares that fall in equal steps.

        >>> [round(share, 2) for share in PyramidKV(steepness=2).shares(3)]
        [1.5, 1.0, 0.5]
        """
        low = 1 / self.steepness
        return [2 - low - (2 - 2 * low) * layer / max(1, layers - 1) if layers > 1 else 1.0 for layer in range(layers)]
