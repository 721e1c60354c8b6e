"""Activation Beacon (arXiv 2401.03462): trained tokens that take up what their window says, instead of a ranking."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar
from weakref import WeakKeyDictionary

import torch

from beacon.config import BeaconConfig, MemoryOptions
from beacon.methods.base import LayerView, Method
from beacon.plan import RowPlan

if TYPE_CHECKING:
    from beacon.beacon_cache import BeaconCache
    from beacon.budget import Budget
    from beacon.cache import Positions
    from beacon.weights import BeaconWeights

#: window of beacons that no checkpoint brings, and the smallest that a budget may make of any
_WINDOW, _SMALLEST = 1024, 16
#: model -> its beacons, and whether they are trained
_WEIGHTS: WeakKeyDictionary[Any, tuple[Any, bool]] = WeakKeyDictionary()


@dataclass(frozen=True)
class ActivationBeacon(Method):
    """Condense every window into beacons; what a document is asked later plays no part in it."""

    sink: int = 0
    """first slots of the text that are always kept"""
    recent: int = 0
    """raw tokens of a completed window that stay beside its beacons until the next one is complete"""
    window: int = 0
    """raw tokens per window; 0 = what the beacons were trained with, or 1,024"""
    lossless_short: bool = False
    int8: bool = False

    name: ClassVar[str] = "beacon"
    ranks: ClassVar[bool] = False
    compact_only: ClassVar[bool] = True
    least: ClassVar[dict[str, int]] = {"sink": 0, "recent": 0, "window": 0}

    def weights(self, model: Any) -> tuple[BeaconWeights, bool]:
        """Return a model's beacons, and whether they are trained: those of its folder, else new ones."""
        from beacon.checkpoint import beacons_of

        if model not in _WEIGHTS:
            _WEIGHTS[model] = beacons_of(model, _WINDOW)
        found: tuple[BeaconWeights, bool] = _WEIGHTS[model]
        return found

    def running(self, model: Any) -> AbstractContextManager[Any]:
        """Return the context in which ``model`` has beacons; within another such context, one that does nothing."""
        from beacon.install import has_beacons, installed

        weights, _ = self.weights(model)
        return nullcontext(model) if has_beacons(model) else installed(model, weights.config, weights)

    def new_cache(
        self, model: Any, budget: Budget, *, positions: Positions = "compact", expected: int = 0
    ) -> BeaconCache:
        """Return an empty cache whose ratio keeps ``expected`` tokens within the budget.

        Raises:
            ValueError: a budget that no whole ratio meets, or positions other than compact.
        """
        from beacon.beacon_cache import BeaconCache

        if positions != "compact":
            raise ValueError("beacons stand at compact positions: choose --positions compact (or auto)")
        weights, _ = self.weights(model)
        options = MemoryOptions(self.lossless_short, self.recent, self.int8)
        config = self._config(model, weights.config, options, budget, expected)
        cache = BeaconCache(model, config, options, expected=expected)
        cache.method, cache.budget = self, budget
        return cache

    def verified(self, model: Any, ids: Sequence[int], positions: Positions) -> list[str]:
        """Check the contract of beacons on the first tokens of a text, in windows of 16.

        Raises:
            ContractError: an invariant does not hold.
        """
        from beacon.beacon_cache import BeaconCache
        from beacon.beacon_contract import LEAST, verify_beacons

        if len(ids) < LEAST:
            return []
        weights, _ = self.weights(model)
        options = MemoryOptions(self.lossless_short, min(self.recent, 4), self.int8)

        def make(ratio: int) -> BeaconCache:
            return BeaconCache(model, _with(weights.config, 16, ratio, min(self.sink, 4)), options)

        with self.running(model):
            return verify_beacons(model, weights, ids, make)

    def warning(self, model: Any) -> str | None:
        """Say that beacons are untrained, if they are."""
        if self.weights(model)[1]:
            return None
        return "no trained beacons are known for this model: untrained ones lose most of what they replace"

    def chunk(self, most: int) -> int:
        """Return whole windows of the usual sizes, so that none is read in two pieces."""
        window = self.window or _WINDOW
        return max(window, most // window * window)

    def scores(self, view: LayerView) -> torch.Tensor:
        """Refuse: beacons rank nothing.

        Raises:
            ValueError: always.
        """
        raise ValueError("the method beacon ranks no slots: make its cache with new_cache, not as a CompressedCache")

    def _config(
        self, model: Any, known: BeaconConfig, options: MemoryOptions, budget: Budget, expected: int
    ) -> BeaconConfig:
        """Return windows and the ratio that the budget means; 0 keeps all."""
        window, sink = self.window or known.window, self.sink or known.sink_size
        if budget.keeps_all:
            return _with(known, window, 0, sink)
        if budget.ratio is not None:
            if budget.ratio != int(budget.ratio):
                raise ValueError(f"beacons need a whole ratio, got {budget.ratio}")
            return _with(known, window, int(budget.ratio), sink)
        if not expected:
            raise ValueError(f"a budget of {budget} becomes a ratio only for a text of known length: give a ratio")
        from beacon.request import token_bytes

        slot = token_bytes(model) * model.config.num_hidden_layers
        slots = budget.capacity(expected, rows=1, row_slot_bytes=slot, fixed_bytes=0)
        while window >= _SMALLEST:
            for ratio in (0, *(2**power for power in range(1, window.bit_length()))):
                config = _with(known, window, ratio, sink)
                # Keys of an open window's beacons are held twice, before and after RoPE.
                twice = -(-window // ratio) // 2 + 1 if ratio else 0
                if RowPlan(config, options).most_slots(expected) + twice <= slots:
                    return config
            if self.window:
                break
            window //= 2
        raise ValueError(
            f"a budget of {budget} leaves {slots:,} slots a layer: too few for the beacons of {expected:,} tokens and "
            f"one window of {max(window, _SMALLEST):,}: give more, or a smaller window"
        )


def use_beacons(model: Any, folder: str | os.PathLike[str]) -> BeaconWeights:
    """Let the method ``beacon`` use a folder of beacons with this model, not those it would find; return them.

    Raises:
        ValueError, OSError: as ``beacon.load_beacons``.
    """
    from beacon.checkpoint import load_beacons

    place = Path(folder).expanduser()
    if not (place / "config.json").is_file():
        raise FileNotFoundError(f"there are no beacons in {place}: longscope train beacon writes OUT/beacons")
    weights = load_beacons(place, model)
    _WEIGHTS[model] = weights, True
    return weights


def _with(known: BeaconConfig, window: int, ratio: int, sink: int) -> BeaconConfig:
    """Return a config with another window, one ratio and another sink."""
    return dataclasses.replace(known, window=window, stride=window, ratio=(ratio,), sink_size=sink)
