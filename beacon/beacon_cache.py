"""The cache of Activation Beacon: the plan of every row, and one layer of slots each."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import torch

from beacon.backbones import backbone
from beacon.config import BeaconConfig, MemoryOptions
from beacon.memory import GradientSlots, Pair, Pass, Slots
from beacon.plan import RowPlan
from beacon.ratios import SEED, Ratios, positions_known
from beacon.request import RequestCache
from flashcore.hf.cache import cache_bytes

if TYPE_CHECKING:
    from beacon.ledger import Ledger

#: kinds of RoPE whose speeds depend on the length read so far
_RESTLESS = ("dynamic", "longrope")


class BeaconCache(RequestCache):
    """What Activation Beacon has kept of the tokens seen so far, for a model inside ``beacon.installed``.

    Use it like any cache of transformers: in forward passes, with prompts in pieces, in ``generate``. Each row has its
    own windows, ratios and lengths, so that a row in a batch gives what it gives alone.

    Args:
        model: the model it is for.
        config: windows and ratios.
        options: what goes beyond the reference.
        expected: tokens of the whole text, if known: adapt-N then fits them rather than the first call's.
        skip_first: tokens kept whole before the first window.
        skip_last: index of the token from which on everything is kept whole.
        seed: of the ratios that are drawn.

    Raises:
        ValueError: an unknown architecture, or arguments that do not fit the windows.
    """

    layers: list[Any]

    def __init__(
        self,
        model: Any,
        config: BeaconConfig,
        options: MemoryOptions | None = None,
        *,
        expected: int = 0,
        skip_first: int = 0,
        skip_last: int | None = None,
        seed: int = SEED,
    ) -> None:
        names, decoder = backbone(model), model.get_decoder()
        super().__init__(layers=[Slots() for _ in getattr(decoder, names.layers)])
        self.config, self.options = config, options or MemoryOptions()
        # A copy: RoPE whose speeds change with the length must not change the model's.
        self.rotary = copy.deepcopy(getattr(decoder, names.rotary))
        self.restless = any(name in str(getattr(self.rotary, "rope_type", "")) for name in _RESTLESS)
        length = positions_known(model.config)
        self.first = RowPlan(
            config, self.options, Ratios(config, length, seed), expected, skip_first=skip_first, skip_last=skip_last
        )
        self.plans: list[RowPlan] = []
        #: row -> embeddings [n, hidden] of a first window that was read without beacons (``lossless_short``)
        self.unmarked: dict[int, torch.Tensor] = {}
        self._columns = 0
        self.peak = 0

    @property
    def columns(self) -> int:
        """Return the columns seen, padding included; -1 after a forward pass that failed."""
        return self._columns

    @property
    def seen(self) -> list[int]:
        """Return how many real tokens each row has seen."""
        return [plan.seen for plan in self.plans]

    @property
    def held(self) -> list[int]:
        """Return how many slots each row holds: the RoPE position of its next token."""
        return [plan.held for plan in self.plans]

    def begin(self, columns: int, mask: torch.Tensor | None, positions: torch.Tensor | None, rows: int) -> list[int]:
        """Return how many real tokens a call of ``columns`` columns brings each row.

        Args:
            columns: tokens given, padding included.
            mask: [rows, seen columns + columns], 0 = padding, or None.
            positions: true positions that the caller gave, to be checked, or None.

        Raises:
            ValueError: padding that is not on the left, or positions that are not the true ones.
        """
        new = self.new_tokens(columns, 0, mask, rows)
        self.offsets(new, columns, positions=positions)
        if not self.plans:
            self.plans = [self.first.copy() for _ in range(rows)]
        return new

    def differentiable(self) -> None:
        """Hold slots out of place from now on, so that gradients can flow through them.

        Raises:
            ValueError: memory that is quantised, or that was written in place.
        """
        if isinstance(self.layers[0], GradientSlots):
            return
        if self.options.int8:
            raise ValueError("gradients cannot flow through int8 memory: train without it")
        if any(self.seen):
            raise ValueError("gradients need a cache that was begun with gradients: start from a new one, or use no_grad")
        self.layers = [GradientSlots() for _ in self.layers]

    def turn(self, positions: torch.Tensor, like: torch.Tensor) -> Pair:
        """Return cos and sin [b, 1, n, d] of positions [b, n] in the dtype of ``like``.

        Held keys are turned along if the speeds of RoPE depend on the length.
        """
        before = self.rotary.inv_freq.clone() if self.restless else None
        cos, sin = self.rotary(like, positions.to(like.device))
        if before is not None and not torch.equal(before, self.rotary.inv_freq):
            for layer in self.layers:
                layer.retune(max(self.held), before, self.rotary.inv_freq)
        return cos.unsqueeze(1), sin.unsqueeze(1)

    def with_replay(self, run: Pass, embeds: torch.Tensor) -> torch.Tensor:
        """Return the raw tokens [b, n, hidden] to run: with those of a first window that is now read with beacons."""
        if not self.options.lossless_short:
            return embeds
        rows, texts = range(len(self.plans))[run.rows], []
        for row, step, own in zip(rows, run.steps, embeds, strict=True):
            known = self.unmarked.pop(row, own[:0])
            if self.plans[row].windows == 0 and step.survivors is None:
                self.unmarked[row] = torch.cat((known, own))
            texts.append(torch.cat((known, own)) if step.again else own)
        return torch.stack(texts)

    def finish(self, columns: int) -> None:
        """Enter a call that has run."""
        self._columns += columns
        self.peak = max(self.peak, cache_bytes(self))

    def abandon(self) -> None:
        """Forget a call that failed; the cache is then useless and says so."""
        self._columns = -1

    def fork(self, capacity: int = 0) -> BeaconCache:
        """Return an independent copy, so that several questions can follow the same text.

        Args:
            capacity: tokens that will be held in the end; not needed here, where the plan decides.
        """
        other = copy.copy(self)
        other.layers = [type(layer)() for layer in self.layers]
        for own, fresh in zip(self.layers, other.layers, strict=True):
            own.copy_to(fresh)
        other.plans, other.first = [plan.copy() for plan in self.plans], self.first.copy()
        other.rotary, other.unmarked = copy.deepcopy(self.rotary), dict(self.unmarked)
        return other

    def forget(self) -> None:
        """Drop every slot of every layer; the tokens stay seen. What follows begins a text of its own."""
        for plan in self.plans:
            plan.sink = plan.memory = plan.tail = plan.open_raw = plan.open_beacons = 0
            plan.window_lead = plan.remainder = plan.windows = 0
            plan.ratio = None
            plan.ratios.restart()
        self.unmarked = {}
        for layer in self.layers:
            layer.reset()

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Take these rows, in this order."""
        super().batch_select_indices(indices)
        chosen = indices.tolist()
        self.plans = [self.plans[row].copy() for row in chosen]
        self.unmarked = {new: self.unmarked[old] for new, old in enumerate(chosen) if old in self.unmarked}

    def reset(self) -> None:
        """Forget everything."""
        for layer in self.layers:
            layer.reset()
        self.plans, self.unmarked, self._columns, self.peak = [], {}, 0, 0

    def ledger(self) -> Ledger:
        """Return the account: tokens seen, bytes before and after, what was kept."""
        from beacon.ledger import take

        return take(self)
