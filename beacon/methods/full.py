"""Full attention: everything is kept. What every other method is compared with."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from beacon.methods.base import LayerView, Method


@dataclass(frozen=True)
class Full(Method):
    """Keep everything; the only budget it accepts is ratio 1."""

    name: ClassVar[str] = "full"

    def scores(self, view: LayerView) -> torch.Tensor:
        """Refuse: there is nothing to rank when nothing may go.

        Raises:
            ValueError: always.
        """
        raise ValueError("the method full keeps everything: use it with Budget(ratio=1), or choose another method")
