"""SnapKV (Li et al., arXiv 2404.14469, section 4): what the newest tokens attend to, smoothed over neighbours."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from beacon.methods.base import LayerView, Method, pooled


@dataclass(frozen=True)
class SnapKV(Method):
    """Rank slots by the attention of an observation window, per key head, pooled over neighbouring slots.

    The paper ranks once, after reading everything; read in one chunk, this does the same. In several chunks the full
    cache is never held: each chunk is ranked with the kept slots. With a probe the question itself observes, so that
    what it will need is kept from the beginning of the text on.

    Raises:
        ValueError: as ``Method``.
    """

    kernel: int = 7
    """slots that a maximum is taken over, so that the neighbours of a needed slot stay too"""

    name: ClassVar[str] = "snapkv"
    steerable: ClassVar[bool] = True

    def scores(self, view: LayerView) -> torch.Tensor:
        """Return the pooled attention mass of the last ``recent`` tokens, or of the probe."""
        return pooled(view.received(self.recent), self.kernel)
