"""A KV cache that stays within a budget: one per request, for a stock transformers model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, get_args

import torch
from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

from beacon.budget import Budget
from beacon.layers import CompressedLayer, WindowLayer, current
from beacon.methods.base import Method
from beacon.request import RequestCache, token_bytes
from beacon.schedule import Schedule, Step
from beacon.turns import Turns
from flashcore import AttentionSpec
from flashcore.hf.cache import GROWTH, cache_bytes

Positions = Literal["original", "compact"]


class CompressedCache(RequestCache):
    """What a compression method has kept of the tokens seen so far.

    Works with a stock model inside ``beacon.compressing(model)``, for any number of forward passes or ``generate``
    calls. ``get_seq_length()`` is the number of columns seen, not of slots held, so that code which derives a position
    from it is right all the same; positions handed to the model are checked against the true ones.

    Args:
        model: the model it is for; only its shape and RoPE speeds are read.
        method: how slots are ranked.
        budget: how many may stay; None = all.
        positions: "original" = keys stay at their true positions; "compact" = kept keys are re-rotated to 0, 1, 2, …
            at every eviction, so that a text of any length stays within the trained positions.
        expected: tokens that each row will hold in the end, if known; a ratio then counts them from the start.

    Raises:
        ValueError: a model without full-attention layers, RoPE that cannot be re-rotated, or full with a real budget.
    """

    method: Method

    def __init__(
        self,
        model: Any,
        method: Method,
        budget: Budget | None = None,
        *,
        positions: Positions = "original",
        expected: int = 0,
    ) -> None:
        budget = budget or Budget(ratio=1)
        if positions not in get_args(Positions):
            raise ValueError(f"positions must be one of {', '.join(get_args(Positions))}, got {positions!r}")
        if expected < 0:
            raise ValueError(f"expected counts tokens and cannot be negative, got {expected}")
        if not method.ranks:
            raise ValueError(f"the method {method.name} ranks no slots: make its cache with method.new_cache")
        if method.name == "full" and not budget.keeps_all:
            raise ValueError(f"the method full keeps everything; with a budget of {budget} choose another method")
        config = model.config.get_text_config(decoder=True)
        layers: list[Any] = []
        self.full: list[int] = []
        for index, layer in enumerate(DynamicCache(config=config).layers):
            if type(layer) is DynamicLayer:
                layers.append(CompressedLayer(len(self.full)))
                self.full.append(index)
            elif type(layer) is DynamicSlidingWindowLayer:
                layers.append(WindowLayer(layer.sliding_window))
            else:
                raise ValueError(
                    f"layer {index} of {config.model_type} keeps {type(layer).__name__}, not keys and values"
                )
        if not self.full:
            raise ValueError(f"{config.model_type}: every layer has a sliding window, so there is nothing to compress")
        super().__init__(layers=layers)
        self.method, self.budget, self.positions = method, budget, positions
        self.turns = _turns(model, config, layers) if positions == "compact" and not budget.keeps_all else {}
        self.token_bytes = token_bytes(model)
        heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        index = (8 if method.remembers else 4) * heads  # a slot's position, and its score if remembered
        fixed = sum((layer.sliding_window - 1) * self.token_bytes for layer in layers if isinstance(layer, WindowLayer))
        slot = len(self.full) * (self.token_bytes + index)
        shares = method.shares(len(self.full))
        self.schedule = Schedule(budget, shares, method.minimum, slot, fixed, bool(self.turns), expected)
        self.probes = ()
        self.step: Step | None = None
        self.peak = 0

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        """Return key length and offset for transformers' mask; compressed layers make their own (see ``spec``)."""
        layer = self.layers[layer_idx] if layer_idx < len(self.layers) else None
        if isinstance(layer, WindowLayer):
            length: tuple[int, int] = layer.get_mask_sizes(query_length)
            return length
        return self.schedule.columns + query_length, 0

    @property
    def columns(self) -> int:
        """Return the columns seen, padding included."""
        return self.schedule.columns

    @property
    def seen(self) -> list[int]:
        """Return how many real tokens each row has seen: the true position of its next token."""
        return list(self.schedule.seen)

    def begin(self, columns: int, mask: torch.Tensor | None, positions: torch.Tensor | None, rows: int) -> torch.Tensor:
        """Plan a forward pass; return the positions [rows, columns] that the model is to rotate with.

        Args:
            columns: tokens given, padding and probe included.
            mask: [rows, seen columns + columns], 0 = padding, or None.
            positions: true positions that the caller gave, to be checked, or None.

        Raises:
            ValueError: padding that is not on the left, or positions that are not the true ones.
        """
        probes, self.probes = self.probes, ()
        if self.step is not None:
            self.abandon()  # an interrupt does not come by end()
        new = self.new_tokens(columns, sum(probes), mask, rows)
        offsets = self.offsets(new, columns, sum(probes), positions)
        step = self.schedule.plan(new, columns, probes)
        self.step = step
        for layer in self.layers:
            layer.step = step
        for index, layer_index in enumerate(self.full):
            self.layers[layer_index].capacity = self._room(step, index)
        return (torch.tensor(step.first)[:, None] + offsets).clamp(min=0)

    def spec(self, layer_idx: int, keys: int) -> AttentionSpec:
        """Return how the current queries attend the ``keys`` columns of a compressed layer."""
        step = current(self.step)
        held = step.held[self.layers[layer_idx].index]
        lengths = [old + new + step.probe for old, new in zip(held, step.new, strict=True)]
        queries = [new + step.probe for new in step.new]
        if min(lengths) == keys and min(queries) == step.columns:
            return AttentionSpec(causal=True)
        return AttentionSpec(
            causal=True, lengths=torch.tensor(lengths), query_lengths=torch.tensor(queries), left_padded=True
        )

    def attended(self, layer_idx: int, queries: torch.Tensor, spec: AttentionSpec) -> None:
        """Let a compressed layer drop what the plan says, now that its attention has run."""
        layer = self.layers[layer_idx]
        layer.observe(queries, spec, self.schedule.seen, self.method)
        if not self.method.joint:
            if layer.joined is not None:
                self._note_peak()
            layer.settle(self.method, self.turns.get(layer_idx))

    def end(self) -> None:
        """Enter the forward pass into the books and check that they are true.

        Raises:
            ContractError: a layer does not hold what the plan says.
        """
        from beacon.contract import ContractError, check_step

        step = current(self.step)
        if self.method.joint:
            self._note_peak()
            self._settle_together()
        for index, layer in enumerate(self.layers):
            if isinstance(layer, WindowLayer) and index in self.turns:
                layer.move(step.shift, self.turns[index])
            layer.step = None
        self.schedule.commit(step)
        self.step = None
        self._note_peak()
        try:
            check_step(self, step)
        except ContractError:
            self.abandon()
            raise

    def abandon(self) -> None:
        """Forget a forward pass that failed; the cache is then useless and says so."""
        self.step = None
        self.schedule.columns = -1

    def fork(self, capacity: int = 0) -> CompressedCache:
        """Return an independent copy, so that several questions can follow the same text.

        Args:
            capacity: tokens that will be held in the end; not needed here, where the budget decides.
        """
        other = object.__new__(type(self))
        other.__dict__.update(self.__dict__)
        other.layers = []
        for layer in self.layers:
            fresh = type(layer)(layer.index if isinstance(layer, CompressedLayer) else layer.sliding_window)
            layer.copy_to(fresh)
            other.layers.append(fresh)
        other.schedule = self.schedule.copy()
        return other

    def forget(self) -> None:
        """Drop every slot of every layer; the tokens stay seen, so the next one keeps its true position."""
        for layer in self.layers:
            columns = getattr(layer, "cumulative_length", 0)
            layer.reset()
            if isinstance(layer, WindowLayer):
                layer.cumulative_length = columns
        self.schedule.forget()

    def slots_of(self, layer_idx: int) -> tuple[int, ...]:
        """Return how many slots each row holds in a compressed layer."""
        return tuple(self.schedule.slots[self.layers[layer_idx].index]) if self.seen else ()

    def index_bytes(self, layer_idx: int) -> int:
        """Return the bytes of a layer's true positions, and of its scores if the method remembers them."""
        layer = self.layers[layer_idx]
        return int(layer.ranked.nbytes + (0 if layer.scores is None else layer.scores.nbytes))

    def true_positions(self, layer_idx: int) -> torch.Tensor:
        """Return the true position of every slot of a compressed layer, [batch, kv_heads, slots], -1 for padding."""
        layer = self.layers[layer_idx]
        empty = layer.keys is None or not layer.keys.numel()
        heads, held = (1, 0) if empty else layer.keys.shape[1:3]
        positions: torch.Tensor = layer.positions(self.schedule.seen, [0] * len(self.schedule.seen), held, heads)
        return positions

    def pack(self) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
        """Return the tensors and the facts that a file of this cache holds."""
        tensors = {}
        for index, layer in enumerate(self.layers):
            for name in ("keys", "values", "ranked", "scores"):
                tensor = getattr(layer, name, None)
                if tensor is not None and tensor.ndim > 1:
                    tensors[f"{name}.{index}"] = tensor
        books = ("expected", "columns", "seen", "slots", "next_position")
        windows = {index: x.cumulative_length for index, x in enumerate(self.layers) if isinstance(x, WindowLayer)}
        return tensors, {
            "books": {name: getattr(self.schedule, name) for name in books},
            "windows": windows,
            "peak": self.peak,
        }

    def unpack(self, tensors: dict[str, torch.Tensor], facts: dict[str, Any]) -> None:
        """Take over what ``pack`` returned."""
        vars(self.schedule).update(facts["books"])
        self.peak = facts["peak"]
        for index, layer in enumerate(self.layers):
            if isinstance(layer, WindowLayer):
                layer.cumulative_length = facts["windows"][str(index)]
            if not any(held[0] for held in self.schedule.slots):
                continue  # everything was forgotten
            keys, values = (tensors[f"{name}.{index}"] for name in ("keys", "values"))
            layer.lazy_initialization(keys, values)
            if isinstance(layer, CompressedLayer):
                layer.write(keys, values)
            else:
                layer.keys, layer.values = keys, values
            for name in ("ranked", "scores"):
                if f"{name}.{index}" in tensors:
                    setattr(
                        layer,
                        name,
                        tensors[f"{name}.{index}"].cpu() if name == "ranked" else tensors[f"{name}.{index}"],
                    )

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Take these rows, in this order."""
        super().batch_select_indices(indices)
        self.schedule.select(indices.tolist())

    def reset(self) -> None:
        """Forget everything."""
        super().reset()
        self.schedule.seen, self.schedule.slots, self.schedule.next_position = [], [], []
        self.schedule.columns, self.step, self.peak, self.probes = 0, None, 0, ()

    def _settle_together(self) -> None:
        """Let the method see the scores of all layers before any of them drops something."""
        layers = [self.layers[index] for index in self.full]
        found = [layer.found for layer in layers]
        if all(each is not None and each.scores is not None for each in found):
            known = [layer.remembered(layer.found.scores) for layer in layers]
            worth = self.method.combine([each.scores for each in found], known)
            for layer, scores in zip(layers, worth, strict=True):
                layer.found = layer.found._replace(scores=scores)
        for index, layer in zip(self.full, layers, strict=True):
            layer.settle(self.method, self.turns.get(index))

    def _note_peak(self) -> None:
        """Remember the most bytes ever held, joined chunks included."""
        joined = sum(tensor.nbytes for index in self.full for tensor in self.layers[index].joined or ())
        self.peak = max(self.peak, cache_bytes(self) + joined)

    def _room(self, step: Step, index: int) -> int:
        """Return the slots that buffers of a layer should have room for: never more than the budget."""
        after = max(step.keep[index])
        grown = after + GROWTH - 1 if max(step.held[index]) else after
        if self.budget.keeps_all:
            return grown
        limit = max(step.limits[index])
        return max(after, limit if step.evicts else min(limit, grown))


def _head_dim(config: Any) -> int:
    """Return the width of a head."""
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def _turns(model: Any, config: Any, layers: Sequence[Any]) -> dict[int, Turns]:
    """Return what moves the keys of each layer to other positions."""
    rotary = getattr(model.get_decoder(), "rotary_emb", None)
    kinds = getattr(config, "layer_types", None) or ["full_attention"] * len(layers)
    shared: dict[str, Turns] = {}
    found = {}
    for index, kind in enumerate(kinds[: len(layers)]):
        speeds = getattr(rotary, f"{kind}_inv_freq", getattr(rotary, "inv_freq", None))
        kept = getattr(rotary, "rope_type", "default")
        rope_type = kept.get(kind, "default") if isinstance(kept, dict) else kept
        width = _head_dim(config)
        if speeds is None or 2 * len(speeds) != width or rope_type in ("dynamic", "longrope"):
            raise ValueError(
                f"compact positions need one fixed RoPE over whole heads; {config.model_type} has {rope_type!r} over "
                f"{0 if speeds is None else 2 * len(speeds)} of {width} channels: use positions='original'"
            )
        found[index] = shared.setdefault(kind, Turns(speeds))
    return found
