"""A KV cache for plain ``generate`` that is written in place instead of being copied on every token."""

from __future__ import annotations

import copy
from typing import Any

import torch
from transformers import DynamicCache, PreTrainedConfig
from transformers.cache_utils import Cache, DynamicLayer

from ..checks import wants_gradients

#: Tokens of room added when a buffer is full. Copying the cache once in 128 tokens costs far less than attending to
#: it 128 times, and at most 127 tokens stand empty.
GROWTH = 128


class GrowingLayer(DynamicLayer):
    """A full-attention layer whose keys and values are views of buffers with room to grow.

    The stock layer concatenates: with 8K tokens in the cache each new token copies them all, which on a CPU costs
    more than attending to them. Under autograd it falls back to concatenation.
    """

    def __init__(self, capacity: int = 0) -> None:
        super().__init__()
        self.capacity = capacity
        self.buffers: tuple[torch.Tensor, torch.Tensor] | None = None

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Append [batch, kv_heads, n, d] keys and values; return all of them, [batch, kv_heads, m, d]."""
        if wants_gradients(key_states, value_states):
            return super().update(key_states, value_states, *args, **kwargs)
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        held = self.get_seq_length()
        total = held + key_states.shape[2]
        keys, values = self.room_for(total, held, key_states, value_states)
        keys[:, :, held:total] = key_states
        values[:, :, held:total] = value_states
        self.keys, self.values = keys[:, :, :total], values[:, :, :total]
        return self.keys, self.values

    def room_for(
        self, total: int, held: int, key_states: torch.Tensor, value_states: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return buffers that hold the first ``held`` tokens and have room for ``total``."""
        own = self.buffers
        if own is not None and own[0].shape[2] >= total and self.owns_keys(own[0]) and writable(own[0]):
            return own
        room = total + GROWTH - 1 if held else total
        size = self.capacity if self.capacity >= total else room
        buffers = tuple(new.new_empty(*new.shape[:2], size, new.shape[3]) for new in (key_states, value_states))
        for buffer, old in zip(buffers, (self.keys, self.values), strict=True):
            if held and old is not None:
                buffer[:, :, :held] = old
        self.buffers = buffers[0], buffers[1]
        return self.buffers

    def owns_keys(self, buffer: torch.Tensor) -> bool:
        """Say whether ``keys`` still is the start of the buffer: reordering beams replaces it by a copy."""
        held = self.keys
        return held is not None and held.data_ptr() == buffer.data_ptr() and held.shape[:2] == buffer.shape[:2]

    def reset(self) -> None:
        """Forget all tokens and free the buffers."""
        super().reset()
        self.buffers = None

    def offload(self) -> None:
        """Move the tokens to the CPU; the buffers are built anew on the next update."""
        super().offload()
        self.buffers = None


class GrowingCache(DynamicCache):
    """``DynamicCache`` with in-place growth in its full-attention layers; sliding layers stay as they are.

    Args:
        config: the model's config: layer kinds (full, sliding) are read from it.
        capacity: tokens to reserve at once, prompt and answer together; 0 = grow as needed.

    Raises:
        ValueError: for a negative capacity.

    >>> from transformers import LlamaConfig
    >>> config = LlamaConfig(num_hidden_layers=2, num_key_value_heads=1, head_dim=4)
    >>> cache = GrowingCache(config, capacity=10)
    >>> keys, values = cache.update(torch.ones(1, 1, 3, 4), torch.ones(1, 1, 3, 4), layer_idx=0)
    >>> keys.shape, cache.get_seq_length()
    (torch.Size([1, 1, 3, 4]), 3)
    """

    def __init__(self, config: PreTrainedConfig, capacity: int = 0) -> None:
        if capacity < 0:
            raise ValueError(f"capacity counts tokens and cannot be negative, received {capacity}")
        super().__init__(config=config)
        self.layer_class_to_replicate = None
        self.layers = [GrowingLayer(capacity) if type(layer) is DynamicLayer else layer for layer in self.layers]

    def reserve(self, tokens: int) -> None:
        """Let each full-attention layer make room for ``tokens`` in all the next time it has to grow."""
        for layer in self.layers:
            if isinstance(layer, GrowingLayer):
                layer.capacity = max(layer.capacity, tokens)

    def fork(self, capacity: int = 0) -> GrowingCache:
        """Return an independent copy with room for ``capacity`` tokens, so that several texts can go on from one."""
        other = copy.copy(self)
        other.layers = []
        for layer in self.layers:
            if isinstance(layer, GrowingLayer):
                fresh = GrowingLayer(capacity)
                if layer.keys is not None and layer.values is not None and layer.get_seq_length():
                    fresh.update(layer.keys, layer.values)
                other.layers.append(fresh)
            else:
                other.layers.append(copy.deepcopy(layer))
        return other


def writable(buffer: torch.Tensor) -> bool:
    """Say whether a buffer may be written here: one made under ``inference_mode`` may not be outside of it."""
    return torch.is_inference_mode_enabled() or not buffer.is_inference()


def cache_bytes(cache: Cache) -> int:
    """Return the physical bytes a cache holds in keys and values, reserved room included.

    >>> cache = DynamicCache()
    >>> _ = cache.update(torch.ones(1, 2, 3, 4), torch.ones(1, 2, 3, 4), layer_idx=0)
    >>> cache_bytes(cache) == 2 * (2 * 3 * 4) * 4
    True
    """
    total = 0
    for layer in cache.layers:
        tensors = getattr(layer, "buffers", None) or (getattr(layer, "keys", None), getattr(layer, "values", None))
        for tensor in tensors:
            if tensor is not None:
                # A sliding layer keeps a slice of a longer tensor: what is held is the storage behind it.
                total += tensor.untyped_storage().nbytes()
    return total
