"""KeyDiff (Park et al., arXiv 2504.15364, section 3): keys unlike the average key matter."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from beacon.methods.base import LayerView, Method


@dataclass(frozen=True)
class KeyDiff(Method):
    """Keep the keys least similar (cosine) to the mean direction of their head; needs no attention weights."""

    name: ClassVar[str] = "keydiff"

    def scores(self, view: LayerView) -> torch.Tensor:
        """Return the negative cosine of each key with the mean of the row's normalised keys."""
        keys = torch.nn.functional.normalize(view.keys[:, :, : view.slots].float(), dim=3)
        real = (view.positions >= 0).to(keys.device)[..., None]
        # Not multiplied by a mask: padding may hold anything, NaN included.
        anchor = torch.where(real, keys, 0).sum(dim=2, keepdim=True)
        return -torch.nn.functional.cosine_similarity(keys, anchor, dim=3)
