"""Spotlight, our own: whole passages that the sharpest looks of a few heads fall on, the same in every layer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch

from beacon.methods.base import LayerView, Method, pooled


@dataclass(frozen=True)
class Spotlight(Method):
    """Rank slots by the best attention any query gave them, averaged over the few heads that looked hardest.

    Made for reading texts far beyond the trained length with the question known. There, heads that rank for themselves
    (SnapKV) keep a fact in some layers and lose it in others, and means over queries drown the one look that finds it.
    So all layers wait for one another and keep the same slots; a look is the maximum over queries; ``looks`` heads out
    of all layers decide; passages of ``kernel`` slots stay whole; and a slot keeps the best score it ever had, so that
    the beginning of a novel competes with its end as if both had been read a moment ago.

    Raises:
        ValueError: as ``Method``.
    """

    kernel: int = 31
    """slots of a passage: a maximum is taken over so many neighbours"""
    looks: int = 9
    """heads, over all layers, whose sharpest looks are averaged"""
    settle: int = 64
    """newest slots whose score is not yet remembered: heads that look at neighbours would make them immortal"""

    name: ClassVar[str] = "spotlight"
    steerable: ClassVar[bool] = True
    joint: ClassVar[bool] = True
    remembers: ClassVar[bool] = True

    def scores(self, view: LayerView) -> torch.Tensor:
        """Return the sharpest attention that each passage receives in each head."""
        return pooled(view.sharpest(self.recent), self.kernel)

    def combine(self, scores: Sequence[torch.Tensor], remembered: Sequence[torch.Tensor]) -> Sequence[torch.Tensor]:
        """Return the mean of the highest scores over all heads of all layers, or what is remembered if that is more."""
        heads = torch.cat(list(scores), dim=1)
        shared = heads.topk(min(self.looks, heads.shape[1]), dim=1).values.mean(1, keepdim=True)
        shared = torch.maximum(shared, remembered[0][:, :1])
        return [shared.expand_as(score) for score in scores]

    def memory(self, scores: torch.Tensor) -> torch.Tensor:
        """Return the scores without those of the newest slots."""
        kept = scores.clone()
        kept[:, :, -self.settle :] = float("-inf")
        return kept
