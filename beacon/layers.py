"""The layers of a compressed cache: what they hold, and how they let go of it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from transformers.cache_utils import DynamicSlidingWindowLayer

from beacon.methods.base import LayerView, Method, select
from beacon.schedule import Step
from beacon.turns import Turns
from flashcore import AttentionSpec
from flashcore.hf.cache import GrowingLayer, writable


def current(step: Step | None) -> Step:
    """Return the step in progress.

    Raises:
        ValueError: there is none, because the model runs without the hooks that begin one.
    """
    if step is None:
        raise ValueError("a compressed cache works only inside beacon.compressing(model): open it first")
    return step


class Found(NamedTuple):
    """What a layer knows about its joined slots between its attention and the cut."""

    scores: torch.Tensor | None
    """[batch, kv_heads, slots] float32; None if nothing has to go"""
    positions: torch.Tensor
    """[batch, kv_heads, slots] true positions, -1 for padding"""
    valid: tuple[int, ...]
    """[row] real slots"""


class CompressedLayer(GrowingLayer):
    """A full-attention layer that keeps some slots of each row: keys, values and the true position of each.

    Rows are left-padded. The buffers never hold more than the budget: a chunk that overflows it is joined to the kept
    slots for one attention call, ranked, and cut down before the next layer runs.
    """

    def __init__(self, index: int) -> None:
        super().__init__()
        #: place among the full-attention layers
        self.index = index
        #: [batch, kv_heads, slots] int32 true positions at the last eviction, -1 for padding; later slots follow on
        self.ranked = torch.empty(0, dtype=torch.int32)
        #: [batch, kv_heads, slots] their scores at that time; None if the method does not remember them
        self.scores: torch.Tensor | None = None
        self.joined: tuple[torch.Tensor, torch.Tensor] | None = None
        self.found: Found | None = None
        self.step: Step | None = None

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Append [batch, kv_heads, n, d], or join them for this call alone if slots will be dropped after it."""
        step = current(self.step)
        if not step.joins:
            return super().update(key_states, value_states)
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        held = self.get_seq_length()
        parts = ((self.keys, key_states), (self.values, value_states))
        keys, values = (torch.cat((old, new), dim=2) if held and old is not None else new for old, new in parts)
        self.joined = keys, values
        return keys, values

    def observe(self, queries: torch.Tensor, spec: AttentionSpec, seen: Sequence[int], method: Method) -> None:
        """Score the joined slots, now that this layer's attention has run; nothing is dropped yet.

        Args:
            queries: [batch, heads, n, d] of this forward pass, probe included.
            spec: how they attended.
            seen: [row] real tokens before this step.
            method: ranks the slots.
        """
        step, joined = self.step, self.joined
        if step is None or joined is None:
            self.step = None
            return
        keys, values = joined
        slots = keys.shape[2] - step.probe
        held, kept = step.held[self.index], step.keep[self.index]
        valid = tuple(old + new for old, new in zip(held, step.new, strict=True))
        positions = self.positions(seen, step.new, slots, keys.shape[1])
        scores = None
        if any(after < count for after, count in zip(kept, valid, strict=True)):
            view = LayerView(keys, values, queries, positions, spec, valid, step, self.index, len(step.keep))
            scores = method.scores(view).to(keys.device, torch.float32).expand(positions.shape)
        self.found = Found(scores, positions, valid)

    def settle(self, method: Method, turns: Turns | None) -> None:
        """Drop what the step decided to drop.

        Args:
            method: protects and ranks the slots by their scores.
            turns: moves keys to compact positions; None = positions stay true.
        """
        step, joined, found = self.step, self.joined, self.found
        self.step = self.joined = self.found = None
        if step is None or joined is None or found is None:
            return
        keys, values = joined
        after, slots = step.keep[self.index], found.positions.shape[2]
        if found.scores is not None:
            ranks = method.rank(found.scores, found.positions.to(keys.device))
            chosen = select(ranks, found.valid, after)
        else:
            # Columns that are padding in every row go too.
            chosen = torch.arange(slots - max(after), slots, device=keys.device).expand(*keys.shape[:2], -1)
        if method.remembers:
            scores = self.remembered(keys[:, :, :slots])
            if found.scores is not None:
                # A row that drops nothing learns nothing: what it keeps must not depend on the other rows.
                drops = [kept < count for kept, count in zip(after, found.valid, strict=True)]
                drop = torch.tensor(drops, device=keys.device)[:, None, None]
                scores = torch.where(drop, method.memory(found.scores), scores)
            self.scores = scores.gather(2, chosen.clamp(min=0))
        self.store(keys[:, :, :slots], values[:, :, :slots], found.positions, chosen, step, turns)

    def remembered(self, like: torch.Tensor) -> torch.Tensor:
        """Return what is remembered of slots [batch, kv_heads, slots, ...]: their scores, minus infinity if new."""
        held = like.new_empty(*like.shape[:2], 0, dtype=torch.float32) if self.scores is None else self.scores
        return torch.nn.functional.pad(held, (0, like.shape[2] - held.shape[2]), value=float("-inf"))

    def store(
        self,
        keys: torch.Tensor,
        values: torch.Tensor,
        positions: torch.Tensor,
        chosen: torch.Tensor,
        step: Step,
        turns: Turns | None,
    ) -> None:
        """Write the chosen slots [batch, kv_heads, kept] into the buffers; -1 chooses padding."""
        slots, places = keys.shape[2], chosen.clamp(min=0)
        wide = places[..., None].expand(-1, -1, -1, keys.shape[3])
        kept_keys, kept_values = keys.gather(2, wide), values.gather(2, wide)
        places = places.cpu()
        positions = positions.gather(2, places).masked_fill(chosen.cpu() < 0, -1)
        if turns is not None:
            # Slots stand right-aligned before the next position: the new place of each, less its old one.
            count = kept_keys.shape[2]
            shift = torch.tensor(step.shift)[:, None, None] + slots - count
            kept_keys = turns(kept_keys, torch.arange(count) - places + shift)
        self.keys, self.values, self.ranked = None, None, positions
        self.write(kept_keys, kept_values)

    def write(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Make these [batch, kv_heads, slots, d] the whole content of the buffers."""
        count = keys.shape[2]
        size = max(count, self.capacity)
        buffers = self.buffers
        fits = buffers is not None and buffers[0].shape[:3] == (*keys.shape[:2], size) and writable(buffers[0])
        if buffers is None or not fits:
            sizes = [(*new.shape[:2], size, new.shape[3]) for new in (keys, values)]
            buffers = keys.new_empty(sizes[0]), values.new_empty(sizes[1])
        for buffer, new in zip(buffers, (keys, values), strict=True):
            buffer[:, :, :count] = new
        self.buffers = buffers
        self.keys, self.values = (buffer[:, :, :count] for buffer in buffers)

    def positions(self, seen: Sequence[int], new: Sequence[int], slots: int, heads: int) -> torch.Tensor:
        """Return the true position of each of ``slots`` columns, [batch, kv_heads, slots] int32, -1 for padding.

        Args:
            seen: [row] real tokens before the current step.
            new: [row] real tokens of the current step.
            slots: columns held, those of the current step included.
        """
        tail = slots - (self.ranked.shape[2] if self.ranked.ndim == 3 else 0)
        last = torch.tensor([old + more for old, more in zip(seen, new, strict=True)], dtype=torch.int32)
        follow = (last[:, None] + torch.arange(-tail, 0, dtype=torch.int32)).clamp(min=-1)
        follow = follow[:, None].expand(-1, heads, -1)
        return follow if self.ranked.ndim != 3 else torch.cat((self.ranked, follow), dim=2)

    def copy_to(self, other: CompressedLayer) -> None:
        """Give another layer of the same shape a copy of the content."""
        if self.keys is not None and self.values is not None and self.keys.numel():
            other.lazy_initialization(self.keys, self.values)
            other.capacity = self.capacity
            other.write(self.keys, self.values)
        other.ranked = self.ranked.clone()
        other.scores = None if self.scores is None else self.scores.clone()

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """Take these rows, in this order."""
        self.batch_select_indices(beam_idx)

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Take these rows, in this order."""
        if self.keys is not None and self.values is not None and self.keys.numel():
            keys, values = (held.index_select(0, indices.to(held.device)) for held in (self.keys, self.values))
            self.keys, self.values = keys, values
            self.write(keys, values)
        if self.ranked.ndim == 3:
            self.ranked = self.ranked.index_select(0, indices.cpu())
        if self.scores is not None:
            self.scores = self.scores.index_select(0, indices.to(self.scores.device))

    def reset(self) -> None:
        """Forget all slots and free the buffers."""
        super().reset()
        self.ranked, self.scores = torch.empty(0, dtype=torch.int32), None
        self.joined = self.step = self.found = None


class WindowLayer(DynamicSlidingWindowLayer):
    """A sliding-window layer, which bounds itself: only a probe and moved positions need care here."""

    def __init__(self, sliding_window: int) -> None:
        super().__init__(sliding_window)
        self.step: Step | None = None

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Append [batch, kv_heads, n, d] and return what this call attends; a probe is not kept."""
        step = current(self.step)
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self.cumulative_length += key_states.shape[2] - step.probe
        if self.keys is not None and self.values is not None and self.keys.numel():
            key_states = torch.cat((self.keys, key_states), dim=2)
            value_states = torch.cat((self.values, value_states), dim=2)
        real = key_states.shape[2] - step.probe
        kept = slice(max(0, real - self.sliding_window + 1), real)
        # Copied: a view would keep the whole chunk in memory.
        self.keys, self.values = key_states[:, :, kept].clone(), value_states[:, :, kept].clone()
        return key_states, value_states

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Return key length and offset for the mask: of what is really held, which may have been forgotten."""
        held = 0 if self.keys is None or not self.keys.numel() else self.keys.shape[2]
        return held + query_length, self.cumulative_length - held

    def move(self, shift: Sequence[int], turns: Turns) -> None:
        """Turn the kept keys by ``shift[row]`` positions: the next token's position has moved by as much."""
        if self.keys is not None and self.keys.numel() and any(shift):
            moves = torch.tensor(shift)[:, None, None].expand(self.keys.shape[:3])
            self.keys = turns(self.keys, moves)

    def copy_to(self, other: WindowLayer) -> None:
        """Give another layer of the same window a copy of the content."""
        if self.keys is not None and self.values is not None:
            other.lazy_initialization(self.keys, self.values)
            other.keys, other.values = self.keys.clone(), self.values.clone()
        other.cumulative_length = self.cumulative_length
