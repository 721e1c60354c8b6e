"""Activation checkpointing by windows: of each window only its input and what it leaves in memory are kept."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch.utils.checkpoint import checkpoint

from beacon.beacon_cache import BeaconCache
from beacon.memory import GradientSlots, Pair

#: (layers to read from and write to, raw tokens [b, n, hidden]) -> their states, or None
Through = Callable[[Sequence[GradientSlots], torch.Tensor], "torch.Tensor | None"]
#: states, the pieces of every layer, and its unrotated keys
_Left = tuple["torch.Tensor | None", list[Pair], "list[torch.Tensor | None]"]


class Recomputation:
    """Runs the windows of a text so that the backward pass computes each of them once more.

    What windows leave is held in pieces, which are joined only while a window runs: a joined copy for every window
    would take memory with the square of their number.
    """

    def __init__(self, layers: Sequence[GradientSlots]) -> None:
        self.layers = layers
        #: [layer][piece] keys and values [b, kv_heads, slots, d], one behind the other
        self.pieces: list[list[Pair]] = [[layer.held()] if layer.keys is not None else [] for layer in layers]

    @classmethod
    def of(cls, cache: BeaconCache) -> Recomputation:
        """Return the recomputation of what a cache will read.

        Raises:
            ValueError: RoPE whose speeds depend on the length: held keys would have to turn in between.
        """
        if cache.restless:
            raise ValueError("windows cannot be recomputed under dynamic or longrope RoPE: set recompute to off")
        return cls(cache.layers)

    def run(self, through: Through, raw: torch.Tensor, first: int) -> torch.Tensor | None:
        """Return what ``through`` makes of a window.

        Args:
            through: runs it on layers that hold all slots so far.
            raw: [b, n, hidden] its raw tokens.
            first: slots before this one are as they were.
        """
        counts = [len(pieces) for pieces in self.pieces]
        before = [tensor for pieces in self.pieces for pair in pieces for tensor in pair]

        def window(raw: torch.Tensor, fresh: Sequence[torch.Tensor | None], *held: torch.Tensor) -> _Left:
            scratch, tensors = [], iter(held)
            for count, plain in zip(counts, fresh, strict=True):
                layer = GradientSlots()
                pairs = [(next(tensors), next(tensors)) for _ in range(count)]
                if pairs:
                    layer.keys, layer.values = (torch.cat(parts, dim=2) for parts in zip(*pairs, strict=True))
                layer.fresh = plain
                scratch.append(layer)
            states = through(scratch, raw)
            # Copied: a view would keep all that it is part of.
            held_now = (layer.held() for layer in scratch)
            left = [(keys[:, :, first:].clone(), values[:, :, first:].clone()) for keys, values in held_now]
            return states, left, [layer.fresh for layer in scratch]

        fresh = [layer.fresh for layer in self.layers]
        done: _Left = checkpoint(window, raw, fresh, *before, use_reentrant=False, preserve_rng_state=False)
        states, left, plain = done
        for pieces, pair, layer, unrotated in zip(self.pieces, left, self.layers, plain, strict=True):
            pieces[:] = _cut(pieces, first)
            if pair[0].shape[2]:
                pieces.append(pair)
            layer.fresh = unrotated
        return states

    def join(self) -> None:
        """Give the layers what has been left."""
        for pieces, layer in zip(self.pieces, self.layers, strict=True):
            if pieces:
                layer.keys, layer.values = (torch.cat(parts, dim=2) for parts in zip(*pieces, strict=True))
                layer.is_initialized = True


def _cut(pieces: Sequence[Pair], slots: int) -> list[Pair]:
    """Return the first ``slots`` slots of pieces."""
    kept: list[Pair] = []
    for keys, values in pieces:
        if slots <= 0:
            break
        kept.append((keys, values) if keys.shape[2] <= slots else (keys[:, :, :slots], values[:, :, :slots]))
        slots -= keys.shape[2]
    return kept
