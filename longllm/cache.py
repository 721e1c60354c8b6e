"""The full key-value cache: preallocated buffers inside a stock transformers cache."""

from __future__ import annotations

from typing import Any

import torch
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

# Slots added when a buffer is full: the copy is paid once in 64 tokens and at most 63 slots lie empty.
GROWTH = 64


class BufferedLayer(DynamicLayer):
    """One layer's keys and values [batch, kv_heads, tokens, head_dim] as views of the filled slots of a buffer.

    Transformers' own layer concatenates, which copies the whole cache for every generated token.
    """

    def __init__(self) -> None:
        """Start empty; buffers are allocated when the first keys show their shape."""
        super().__init__()
        self.reserved = 0
        self._buffers: tuple[torch.Tensor, torch.Tensor] | None = None

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Append keys and values [batch, kv_heads, new, head_dim]; return views of everything held."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        start = self.get_seq_length()
        end = start + key_states.shape[-2]
        self._buffers = (
            self._with_room(0, self.keys, key_states, start, end),
            self._with_room(1, self.values, value_states, start, end),
        )
        for buffer, new in zip(self._buffers, (key_states, value_states), strict=True):
            buffer[:, :, start:end] = new
        self.keys, self.values = (buffer[:, :, :end] for buffer in self._buffers)
        return self.keys, self.values

    def _with_room(
        self, index: int, held: torch.Tensor, new: torch.Tensor, start: int, end: int
    ) -> torch.Tensor:
        """Return a buffer of at least ``end`` slots that begins with the ``start`` slots of ``held``."""
        old = self._buffers[index] if self._buffers else None
        # The base class may put other tensors in place of the views (a batch reordered, say): then copy those.
        if old is not None and old.shape[-2] >= end and old.data_ptr() == held.data_ptr():
            return old
        room = self.reserved if self.reserved >= end else end + GROWTH - 1
        buffer = new.new_empty(*new.shape[:-2], room, new.shape[-1])
        if start:
            buffer[:, :, :start] = held
        return buffer

    def reset(self) -> None:
        """Drop everything held."""
        super().reset()
        self._buffers = None


def new_cache(config: Any) -> DynamicCache:
    """Return an empty cache for a model with this ``config``: full-attention layers get buffers, others stay.

    Layers that keep less than everything, such as sliding windows, are those that transformers chooses.
    """
    cache = DynamicCache(config=config)
    cache.layers = [BufferedLayer() if type(layer) is DynamicLayer else layer for layer in cache.layers]
    return cache


def reserve(cache: DynamicCache, tokens: int) -> None:
    """Let each buffered layer allocate exactly ``tokens`` slots the next time it has to grow."""
    for layer in cache.layers:
        if isinstance(layer, BufferedLayer):
            layer.reserved = tokens


def kv_bytes(cache: DynamicCache) -> int:
    """Return the bytes of memory behind a cache's keys and values, empty slots of their buffers included."""
    held: dict[int, int] = {}
    for layer in cache.layers:
        for tensor in (getattr(layer, "keys", None), getattr(layer, "values", None)):
            if tensor is not None:
                storage = tensor.untyped_storage()
                held[storage.data_ptr()] = storage.nbytes()
    return sum(held.values())
