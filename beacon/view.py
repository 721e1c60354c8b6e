"""What a forward pass needs to know of positions, masks and of where slots go, computed once for all layers."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch

from beacon.beacon_cache import BeaconCache
from beacon.memory import Pair, Pass, Settling
from flashcore import AttentionSpec
from flashcore.spec import MaskFunction


@dataclass(frozen=True)
class View:
    """What every layer of one pass needs to know of positions and masks, computed once."""

    run: Pass
    raw_turn: Pair
    """cos and sin [b or 1, 1, n, d] of the raw tokens"""
    beacon_turn: Pair | None
    last_turn: Pair
    """of the last raw token"""
    last_end: int
    """slots up to the last raw token, of the longest row"""
    device: torch.device
    specs: dict[tuple[float, bool], AttentionSpec] = field(default_factory=dict)

    @classmethod
    def of(cls, cache: BeaconCache, run: Pass, like: torch.Tensor) -> View:
        """Look at a pass."""
        step = run.step
        most = step.slots
        if run.ragged:
            # A row with fewer beacons has padding, whose position is of no account.
            rows = [one.positions + one.positions[-1:] * (most - one.slots) for one in run.steps]
        else:
            rows = [step.positions]
        turn = cache.turn(torch.tensor(rows), like)
        raw = torch.tensor(step.raw_slots, device=like.device)
        raw_turn = tuple(wave[:, :, raw] for wave in turn)
        beacons = slice(step.lead, step.lead + (step.beacons - 1) * step.period + 1, step.period)
        beacon_turn = tuple(wave[:, :, beacons] for wave in turn) if step.beacons else None
        last = step.raw_slots[-1]
        return cls(
            run,
            raw_turn,  # type: ignore[arg-type]
            beacon_turn,  # type: ignore[arg-type]
            tuple(wave[:, :, last : last + 1] for wave in turn),  # type: ignore[arg-type]
            max(one.start for one in run.steps) + last + 1,
            like.device,
        )

    def spec(self, scale: float, last: bool = False) -> AttentionSpec:
        """Return how queries attend; ``last`` = there is one, the last raw token's."""
        if (scale, last) not in self.specs:
            expands = not last and any(step.expansion is not None for step in self.run.steps)
            options: dict[str, Any] = {"mask": _expansion(self.run, self.device)} if expands else {}
            if self.run.ragged:
                ends = [step.start + 1 for step in self.run.steps] if last else self.run.ends
                options["lengths"] = torch.tensor(ends)
                options["query_lengths"] = torch.tensor([1 if last else step.slots for step in self.run.steps])
            self.specs[scale, last] = AttentionSpec(causal=True, scale=scale, **options)
        return self.specs[scale, last]


def moves(cache: BeaconCache, run: Pass, like: torch.Tensor) -> Iterator[Settling]:
    """Yield how the slots of completed windows move: at once for rows that are alike, else row by row."""
    rows = range(len(cache.plans))[run.rows]
    wholes = [(run.rows, run.step)] if not run.ragged else []
    single = [(slice(row, row + 1), step) for row, step in zip(rows, run.steps, strict=True)] if run.ragged else []
    for which, step in wholes + single:
        kept = step.survivors
        if kept is not None:
            yield Settling(which, step, kept, cache.final_turn(kept, like), cache.rotary.inv_freq)


def _expansion(run: Pass, device: torch.device) -> MaskFunction:
    """Return step-expansion's mask: beacon j sees what came before the window and its first j * ratio raw tokens."""
    columns = ("window", "start", "lead", "ratio", "expansion")
    table = {name: torch.tensor([getattr(step, name) or 0 for step in run.steps], device=device) for name in columns}

    def allowed(batch: torch.Tensor, head: torch.Tensor, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        window, start, lead, ratio, previous = (table[name][batch] for name in columns)
        number = query - lead + 1
        share = key < window + number * ratio
        beacons = (key >= start + lead) & ((previous > 0) | (key == start + query))
        return (number < 1) | share | beacons

    return allowed
