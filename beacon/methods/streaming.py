"""StreamingLLM (Xiao et al., arXiv 2309.17453, section 3.2): the first tokens and a window of the newest."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from beacon.methods.base import LayerView, Method


@dataclass(frozen=True)
class Streaming(Method):
    """Keep the ``sink`` first tokens and the newest that fit the budget; looks at no content.

    The paper numbers positions inside the cache: that is ``positions="compact"``.
    """

    recent: int = 1
    """newest slots that are always kept; the rest of the window comes from the budget"""

    name: ClassVar[str] = "streaming"

    def scores(self, view: LayerView) -> torch.Tensor:
        """Score a slot by its true position: newer is better."""
        return view.positions
