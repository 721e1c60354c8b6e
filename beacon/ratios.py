"""Which ratio a window gets (spec of ``beacon_ratio_mix``): drawn, taken in turn, or fitted to the length."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from beacon.config import BeaconConfig

#: the reference's seed
SEED = 42


@dataclass
class Ratios:
    """The ratios of the windows of one text.

    Draws depend on the seed alone, so that a request gives the same result whenever it is made. (The reference keeps
    one generator for all texts: ``restart`` does the same here.)

    >>> ratios = Ratios(BeaconConfig(), trained_length=32768)
    >>> [ratios.choose(received=9999, start=0) for _ in range(6)]
    [2, 16, 16, 8, 8, 32]
    """

    config: BeaconConfig
    trained_length: float
    """positions that the model was trained on, RoPE scaling included"""
    seed: int = SEED
    fixed: int | None = None
    """ratio chosen for the whole text"""
    taken: int = 0
    """windows that have chosen"""
    kept_one: bool = False
    """whether some window has had ratio 0"""
    turn: tuple[int, ...] = ()
    """sequence: what is cycled through"""
    given: tuple[int, ...] = ()
    """ratios of the first windows, which somebody else has chosen"""
    rng: Any = field(default=None)

    def __post_init__(self) -> None:
        """Start the generator."""
        self.rng = np.random.default_rng(self.seed) if self.rng is None else self.rng

    def choose(self, received: int, start: int, length: int | None = None) -> int:
        """Return the ratio of the next window.

        Args:
            received: tokens of the text known so far.
            start: tokens before the window.
            length: tokens of the whole text when training, else None.

        Raises:
            ValueError: no ratio may be used here.
        """
        if self.taken < len(self.given):
            ratio = self.given[self.taken]
        elif self.fixed is None:
            ratio = self._next(received, start, length)
        else:
            ratio = self.fixed
        self.taken += 1
        self.kept_one |= ratio == 0
        return ratio

    def restart(self) -> None:
        """Begin another text; draws go on where they are."""
        self.fixed, self.taken, self.kept_one, self.turn, self.given = None, 0, False, (), ()

    def copy(self) -> Ratios:
        """Return an independent copy in the same state."""
        other = copy.copy(self)
        other.rng = copy.deepcopy(self.rng)
        return other

    def _next(self, received: int, start: int, length: int | None) -> int:
        """Return the ratio that the mix gives now."""
        config = self.config
        if len(config.ratio) == 1:
            self.fixed = config.ratio[0]
            return self.fixed
        if config.ratio_mix == "sequence":
            # Filtered once, at the first window, as in the reference.
            self.turn = self.turn or self._allowed(start, length)
            return self.turn[self.taken % len(self.turn)]
        allowed = self._allowed(start, length)
        if config.adapt is not None:
            self.fixed = self._fitting(allowed, received + config.adapt)
            return self.fixed
        ratio = int(self.rng.choice(allowed))
        if config.ratio_mix == "instance-random":
            self.fixed = ratio
        return ratio

    def _allowed(self, start: int, length: int | None) -> tuple[int, ...]:
        """Return the ratios to choose from; in training at most one window is kept whole, and never the last."""
        ratios = self.config.valid_ratios
        if length is not None and (self.kept_one or start + self.config.stride + self.config.window > length):
            ratios = tuple(ratio for ratio in ratios if ratio)
        if not ratios:
            raise ValueError(f"beacon_ratio {list(self.config.ratio)} allows no ratio for the window at token {start}")
        return ratios

    def _fitting(self, ratios: tuple[int, ...], target: int) -> int:
        """Return the ratio of the least sufficient capacity, or the largest ratio."""
        window, positions = self.config.window, self.trained_length
        room = {ratio: (positions - window) * ratio + window if ratio else positions for ratio in ratios}
        enough = [ratio for ratio in ratios if room[ratio] >= target]
        return min(enough, key=lambda ratio: room[ratio]) if enough else max(ratios)


def positions_known(config: Any) -> float:
    """Return the positions a model's config allows, RoPE scaling included: the P of adapt-N.

    Llama 3.1 and YaRN state the original length too, and often the stretched one as ``max_position_embeddings``: the
    factor is then not counted twice.

    >>> from transformers import LlamaConfig
    >>> scaling = {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}
    >>> positions_known(LlamaConfig(max_position_embeddings=8192, rope_parameters=scaling))
    16384.0
    """
    length = float(config.max_position_embeddings)
    scaling = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    original, factor = scaling.get("original_max_position_embeddings"), float(scaling.get("factor") or 1.0)
    return max(length, original * factor) if original else length * factor
