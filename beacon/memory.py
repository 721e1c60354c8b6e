"""What one layer holds of Activation Beacon's slots: preallocated buffers, written in place.

Slots lie in the order of ``beacon.plan``, keys after RoPE. A completed window is settled at once: its beacons' keys,
kept unrotated until then, are rotated to their final place, and raw tokens go. Nothing is rotated or copied per token.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from transformers.cache_utils import CacheLayerMixin

from beacon.grid import merge
from beacon.plan import RowPlan, Survivors, WindowStep
from flashcore import rope
from flashcore.hf.cache import GROWTH, writable

Pair = tuple[torch.Tensor, torch.Tensor]


@dataclass(frozen=True)
class Pass:
    """One forward pass of some rows of the batch, as every layer needs it."""

    rows: slice
    steps: tuple[WindowStep, ...]
    """[row] of the slice; all alike unless ``ragged``"""
    ragged: bool
    """rows of different lengths, each with one raw token: it is followed by the row's beacons, then by padding"""

    @property
    def step(self) -> WindowStep:
        """Return the step with the most beacons; where rows are alike, theirs."""
        return max(self.steps, key=lambda step: step.beacons)

    @cached_property
    def targets(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return which columns [b, n + k] of a ragged pass are no padding, and for these the row and the slot."""
        slots = torch.tensor([step.slots for step in self.steps])[:, None]
        real = torch.arange(self.step.slots) < slots
        places = torch.tensor([step.start for step in self.steps])[:, None] + torch.arange(self.step.slots)
        rows = torch.arange(len(self.steps))[:, None] + self.rows.start
        return real, rows.expand_as(real)[real], places[real]

    @property
    def ends(self) -> list[int]:
        """Return the slots of each row, new ones included."""
        return [step.start + step.slots for step in self.steps]


@dataclass(frozen=True)
class Settling:
    """How the slots of a completed window move, for rows that are alike."""

    rows: slice
    step: WindowStep
    kept: Survivors
    turn: Pair
    """cos and sin [1, 1, beacons, d] of the beacons' final positions"""
    inv_freq: torch.Tensor
    """[d/2] speeds, for raw slots that move"""

    def sources(self, origin: int = 0) -> slice:
        """Return where the beacons stand before, in tensors that begin with slot ``origin``."""
        kept = self.kept
        first = self.step.window - origin + kept.first
        return slice(first, first + (kept.beacons - 1) * kept.period + 1, kept.period)


class Slots(CacheLayerMixin):
    """Keys and values [rows, kv_heads, room, d] of one layer; how many are in use is for the plan to say."""

    def __init__(self) -> None:
        super().__init__()
        #: [rows, kv_heads, beacons, d] keys of the open windows' beacons before RoPE
        self.fresh: torch.Tensor | None = None

    @property
    def buffers(self) -> tuple[torch.Tensor, ...]:
        """Return every tensor that is held."""
        return tuple(tensor for tensor in (self.keys, self.values, self.fresh) if tensor is not None)

    def append(self, run: Pass, raw: Pair, beacons: Pair | None, rows: int, room: int) -> Pair:
        """Write new keys (after RoPE) and values; return all that may be attended, [b, kv_heads, slots, d].

        Args:
            run: the rows and their steps.
            raw: keys and values [b, kv_heads, n, d] of raw tokens.
            beacons: the same of beacons, or None.
            rows: of the whole batch.
            room: slots that will be needed, if more than there are.
        """
        keys, values = self._ready(raw, rows, max(room, *(one.most for one in run.steps)))
        step = run.step
        end = max(run.ends)
        if run.ragged:
            real, index, places = (where.to(keys.device) for where in run.targets)
            for buffer, own, other in zip((keys, values), raw, beacons or (None, None), strict=True):
                new = own if other is None else torch.cat((own, other), dim=2)
                buffer[index, :, places] = new.transpose(1, 2)[real]
        else:
            for buffer, own, other in zip((keys, values), raw, beacons or (None, None), strict=True):
                merge(buffer[run.rows, :, step.start : end], own, other, step.lead, step.period)
        return keys[run.rows, :, :end], values[run.rows, :, :end]

    def hold(self, run: Pass, plain: torch.Tensor, rows: int) -> None:
        """Keep unrotated beacon keys [b, kv_heads, k, d] until their window is complete."""
        need = max(step.open_beacons + step.beacons for step in run.steps)
        have = 0 if self.fresh is None else self.fresh.shape[2]
        if self.fresh is None or have < need or not writable(self.fresh):
            grown = plain.new_empty(rows, plain.shape[1], max(need, 2 * have), plain.shape[3])
            if self.fresh is not None:
                grown[:, :, :have] = self.fresh
            self.fresh = grown
        if not run.ragged:
            at = run.step.open_beacons
            self.fresh[run.rows, :, at : at + run.step.beacons] = plain
            return
        for row, step in enumerate(run.steps):
            end = step.open_beacons + step.beacons
            self.fresh[run.rows.start + row, :, step.open_beacons : end] = plain[row, :, : step.beacons]

    def settle(self, move: Settling, plain: torch.Tensor | None) -> None:
        """Let go of a completed window.

        Args:
            move: where its slots go.
            plain: unrotated keys [b, kv_heads, k, d] of the beacons of the step itself, or None.
        """
        kept = move.kept
        keys, values = (buffer[move.rows] for buffer in self.held())
        after = kept.at + kept.beacons
        raw = self.moved_raw(move, keys, values, after)
        if kept.beacons:
            # Copied first: source and target overlap.
            values[:, :, kept.at : after] = values[:, :, move.sources()].clone()
            keys[:, :, kept.at : after] = rope.rotate(self.plain(move, plain), *move.turn)
        for buffer, moved in zip((keys, values), raw or (), strict=False):
            buffer[:, :, after : after + len(kept.raw)] = moved

    def plain(self, move: Settling, new: torch.Tensor | None) -> torch.Tensor:
        """Return the unrotated keys of all beacons of a window, [b, kv_heads, k, d]."""
        known = move.step.open_beacons
        parts = [] if not known or self.fresh is None else [self.fresh[move.rows, :, :known]]
        parts += [] if new is None else [new]
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=2)

    def moved_raw(self, move: Settling, keys: torch.Tensor, values: torch.Tensor, at: int) -> Pair | None:
        """Return the raw slots that stay of a window, turned to ``at`` and after; None if they stay where they are."""
        kept = move.kept
        before = [move.step.window + place for place in kept.raw]
        if before == list(range(at, at + len(before))):
            return None
        old = torch.tensor(before)
        places = old.to(keys.device)
        turned = rope.rerotate(keys[:, :, places], old, torch.arange(at, at + len(old)), move.inv_freq)
        return turned, values[:, :, places]

    def retune(self, slots: int, old: torch.Tensor, new: torch.Tensor) -> None:
        """Turn ``slots`` keys from angular speeds ``old`` to ``new`` (RoPE whose speeds depend on the length)."""
        if self.keys is not None and slots:
            at = torch.arange(slots)
            turned = rope.rerotate(self.keys[:, :, :slots], at, at, old, new)
            self.keys = torch.cat((turned, self.keys[:, :, slots:]), dim=2)

    def held(self) -> Pair:
        """Return the buffers.

        Raises:
            ValueError: nothing has been written.
        """
        if self.keys is None or self.values is None:
            raise ValueError("the layer holds nothing yet")
        return self.keys, self.values

    def view(self, row: int, plan: RowPlan) -> Pair:
        """Return what a row holds, [1, kv_heads, held, d] each."""
        keys, values = self.held()
        return keys[row : row + 1, :, : plan.held], values[row : row + 1, :, : plan.held]

    def sizes(self) -> Iterator[tuple[str, int, int, int]]:
        """Yield name, rows, slots and spare slots of what is held, to be compared with the plans."""
        for name in ("keys", "values"):
            tensor = getattr(self, name)
            if tensor is not None:
                yield name, tensor.shape[0], tensor.shape[2], GROWTH

    def pack(self, plan: RowPlan) -> dict[str, torch.Tensor]:
        """Return what is to be saved of a cache of one row."""
        slots = plan.held
        tensors = {"keys": self.keys, "values": self.values}
        held = {name: tensor[:, :, :slots] for name, tensor in tensors.items() if tensor is not None and slots}
        return held | ({} if self.fresh is None else {"fresh": self.fresh})

    def unpack(self, tensors: dict[str, torch.Tensor]) -> None:
        """Take over what ``pack`` returned."""
        for name, tensor in tensors.items():
            setattr(self, name, tensor)
        self.is_initialized = bool(tensors)

    def copy_to(self, other: Slots) -> None:
        """Give another layer a copy of the content."""
        for name in ("keys", "values", "fresh"):
            tensor = getattr(self, name)
            setattr(other, name, None if tensor is None else tensor.clone())
        other.is_initialized = self.is_initialized

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Take these rows, in this order."""
        for name in ("keys", "values", "fresh"):
            tensor = getattr(self, name)
            if tensor is not None:
                setattr(self, name, tensor.index_select(0, indices.to(tensor.device)))

    def reset(self) -> None:
        """Forget everything and free the buffers."""
        self.keys = self.values = self.fresh = None
        self.is_initialized = False

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Do nothing: room is made when slots are written."""

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        """Refuse: only the window loop writes here.

        Raises:
            ValueError: always.
        """
        raise ValueError("a beacon cache works only inside beacon.installed(model, config): open it first")

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Return what transformers asks for its own masks, which are not used here."""
        return query_length, 0

    def get_seq_length(self) -> int:
        """Return the room in slots; 0 while there is none."""
        return 0 if self.keys is None else self.keys.shape[2]

    def get_max_length(self) -> int:
        """Return -1: there is no limit."""
        return -1

    def _ready(self, like: Sequence[torch.Tensor], rows: int, room: int) -> Pair:
        """Return buffers with room for ``room`` slots that may be written here."""
        old = (self.keys, self.values)
        if self.keys is not None and self.keys.shape[2] >= room and writable(self.keys):
            return self.held()
        if self.keys is not None:
            room = max(self.keys.shape[2], room + GROWTH) if self.keys.shape[2] < room else self.keys.shape[2]
        fresh = [new.new_empty(rows, new.shape[1], room, new.shape[3]) for new in like]
        for buffer, held in zip(fresh, old, strict=True):
            if held is not None:
                buffer[:, :, : held.shape[2]] = held
        self.keys, self.values = fresh
        self.is_initialized = True
        return self.keys, self.values


class GradientSlots(Slots):
    """The same, out of place, so that gradients flow through every window; rows must be alike."""

    def append(self, run: Pass, raw: Pair, beacons: Pair | None, rows: int, room: int) -> Pair:
        """Return kept and new slots, joined."""
        step = run.step
        if run.ragged or len(run.steps) < rows:
            raise ValueError("with gradients, rows must be of equal length: pass one row at a time, or use no_grad")
        joined = []
        for held, own, other in zip((self.keys, self.values), raw, beacons or (None, None), strict=True):
            new = own.new_empty(*own.shape[:2], step.slots, own.shape[3])
            new = merge(new, own, other, step.lead, step.period)
            joined.append(new if held is None else torch.cat((held[:, :, : step.start], new), dim=2))
        self.keys, self.values = joined
        self.is_initialized = True
        return self.keys, self.values

    def hold(self, run: Pass, plain: torch.Tensor, rows: int) -> None:
        """Keep unrotated beacon keys."""
        known = run.step.open_beacons
        self.fresh = plain if not known or self.fresh is None else torch.cat((self.fresh[:, :, :known], plain), dim=2)

    def settle(self, move: Settling, plain: torch.Tensor | None) -> None:
        """Let go of a completed window."""
        kept = move.kept
        keys, values = self.held()
        after = kept.at + kept.beacons
        pieces: list[Sequence[torch.Tensor]] = [(keys[:, :, : kept.at], values[:, :, : kept.at])]
        raw = self.moved_raw(move, keys, values, after)
        if kept.beacons:
            pieces.append((rope.rotate(self.plain(move, plain), *move.turn), values[:, :, move.sources()]))
        if raw is not None:
            pieces.append(raw)
        elif kept.raw:
            stays = slice(after, after + len(kept.raw))
            pieces.append((keys[:, :, stays], values[:, :, stays]))
        self.keys, self.values = (torch.cat(parts, dim=2) for parts in zip(*pieces, strict=True))
