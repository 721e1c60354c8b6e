"""Spotlight, our own: whole passages that the sharpest looks of a few heads fall on, the same in every layer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch

from beacon.methods.base import LayerView, Method


@dataclass(frozen=True)
class Spotlight(Method):
    """Rank slots by the best attention any query gave them, averaged over the few heads that looked hardest.

    Made for reading texts far beyond the trained length with the question known. There, heads that rank for themselves
    (SnapKV) keep a fact in some layers and lose it in others, and means over queries drown the one look that finds it.
    So all layers wait for one another and keep the same slots; a look is the maximum over queries; ``looks`` heads out
    of all layers decide; passages of ``kernel`` slots stay whole; and a slot keeps the best score it ever had, so that
    the beginning of a novel competes with its end as if both had been read a moment ago.

    Raises:
        ValueError: as ``Method``, an even or non-positive kernel, or fewer than one look.
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

    def __post_init__(self) -> None:
        """Refuse settings that no cache can follow."""
        super().__post_init__()
        if self.kernel < 1 or self.kernel % 2 == 0:
            raise ValueError(f"{self.name}: kernel must be a positive odd number, got {self.kernel}")
        for field in ("looks", "settle"):
            if getattr(self, field) < 1:
                raise ValueError(f"{self.name}: {field} must be at least 1, got {getattr(self, field)}")

    def scores(self, view: LayerView) -> torch.Tensor:
        """Return the sharpest attention that each passage receives in each head, and what is remembered of it."""
        look = view.sharpest(self.recent)
        return torch.nn.functional.max_pool1d(look, self.kernel, stride=1, padding=self.kernel // 2)

    def combine(
        self, scores: Sequence[torch.Tensor], remembered: Sequence[torch.Tensor | None]
    ) -> Sequence[torch.Tensor]:
        """Return the mean of the highest scores over all heads of all layers, or what is remembered if that is more."""
        heads = torch.cat(list(scores), dim=1)
        shared = heads.topk(min(self.looks, heads.shape[1]), dim=1).values.mean(1, keepdim=True)
        known = remembered[0]
        shared = shared if known is None else torch.maximum(shared, known[:, :1])
        return [shared.expand_as(score) for score in scores]

    def memory(self, scores: torch.Tensor) -> torch.Tensor:
        """Return the scores without those of the newest slots."""
        kept = scores.clone()
        kept[:, :, -self.settle :] = float("-inf")
        return kept
