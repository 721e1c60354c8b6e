"""TOVA (Oren et al., arXiv 2401.06104, section 3.2): what the last token attends to, the same for all heads."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from beacon.methods.base import LayerView, Method


@dataclass(frozen=True)
class Tova(Method):
    """Rank slots by the newest token's attention, averaged over the heads of the layer; no slot is sacred.

    The paper drops one slot per token, which is what happens here while decoding without room; a chunk is ranked by
    its last token.
    """

    sink: int = 0
    """first tokens that are always kept; the paper protects none"""
    recent: int = 1
    """newest slots that are always kept"""

    name: ClassVar[str] = "tova"
    steerable: ClassVar[bool] = True

    def scores(self, view: LayerView) -> torch.Tensor:
        """Return the mean over heads of the last token's (or the probe's) attention."""
        return view.received(1).mean(dim=1, keepdim=True)
