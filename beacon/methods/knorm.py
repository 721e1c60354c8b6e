"""Knorm (Devoto et al., arXiv 2406.11430): keys of small norm matter."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from beacon.methods.base import LayerView, Method


@dataclass(frozen=True)
class Knorm(Method):
    """Keep the keys of smallest L2 norm, per key head; needs no attention weights."""

    name: ClassVar[str] = "knorm"

    def scores(self, view: LayerView) -> torch.Tensor:
        """Return the negative norm of each key; RoPE does not change it."""
        return -view.keys[:, :, : view.slots].float().norm(dim=3)
