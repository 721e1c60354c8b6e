"""Activation Beacon written out a second time, slowly and in fp64: what the package's window loop is compared with.

One row. Every cached key is kept before RoPE and rotated anew in every forward pass, masks are dense, every token goes
through both projections and takes the one it needs. Below it: tiny models and beacons with random weights.
"""

import copy
import functools
import itertools
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

import beacon

SHAPE = {"hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 2, "max_position_embeddings": 512}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "sliding_window": None}
TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": None, "vocab_size": 97}


class NaiveBeacon:
    """The memory of one row, and the model that reads into it.

    Args:
        model: a stock model; its modules are used one by one.
        config: windows and ratios (one, or several to be taken in turn).
        tensors: the beacons' own, under the names of released checkpoints.
        keep_recent: raw tokens of the last complete window that stay.
        lossless: no beacons in the first window before it is complete.
        skip: tokens kept whole before the first window, and index of the token from which on all are.
        training: the window that ends a call gets no beacons and stays open.
    """

    def __init__(
        self,
        model: Any,
        config: beacon.BeaconConfig,
        tensors: dict[str, torch.Tensor],
        *,
        keep_recent: int = 0,
        lossless: bool = False,
        skip: tuple[int, int | None] = (0, None),
        training: bool = False,
    ) -> None:
        self.model, self.config, self.tensors = model, config, tensors
        # A copy, because some kinds of RoPE remember the longest text they have seen.
        self.rotary = copy.deepcopy(model.model.rotary_emb)
        self.keep_recent, self.lossless, self.skip, self.training = keep_recent, lossless, skip, training
        self.ratios = itertools.cycle(config.ratio)
        self.seen = self.carry = self.windows = 0
        self.ratio: int | None = None
        #: embeddings of the open window
        self.open: list[torch.Tensor] = []
        #: a letter per slot: sink, memory, tail (raw, for one window more), raw and beacon of the open window
        self.slots: list[str] = []
        self.keys: list[Any] = [None] * len(model.model.layers)
        self.values: list[Any] = [None] * len(model.model.layers)

    def read(self, ids: torch.Tensor) -> torch.Tensor:
        """Return the logits [n, vocab] of the tokens [n] of one call."""
        embeds, rows = self.model.model.embed_tokens.weight[ids], []
        while len(embeds):
            first = self.seen < self.skip[0]
            size = self.skip[0] if first else self.config.window
            part, embeds = embeds[: size - len(self.open)], embeds[size - len(self.open) :]
            full = len(self.open) + len(part) == size and not (self.training and not len(embeds))
            self.choose(full, last=not len(embeds))
            self.open += list(part)
            again = self.lossless and not self.windows and full and self.ratio and self.config.pos == "interleave"
            if again:
                kept = [slot not in "rb" for slot in self.slots]
                self.keep([index for index, stays in enumerate(kept) if stays])
                self.carry = 0
            rows.append(self.forward(torch.stack(self.open) if again else part, full)[-len(part) :])
            self.seen += len(part)
            if full:
                self.complete(first)
        return self.model.lm_head(self.model.model.norm(torch.cat(rows)))

    def choose(self, full: bool, last: bool) -> None:
        """Settle the open window's ratio, if this is the time."""
        if self.seen < self.skip[0] or (self.skip[1] is not None and self.seen >= self.skip[1]):
            self.ratio = 0
        elif self.ratio is None and not (self.training and last):
            early = self.config.pos == "interleave" and not (self.lossless and not self.windows)
            self.ratio = next(self.ratios) if full or early else None

    def forward(self, part: torch.Tensor, full: bool) -> torch.Tensor:
        """Run raw tokens [n, hidden] and the beacons due among them; return the states of the raw ones."""
        config, ratio, before = self.config, self.ratio or 0, len(self.slots)
        window = before - sum(slot in "rb" for slot in self.slots)
        if not ratio:
            kinds = [False] * len(part)
        elif config.pos == "append":
            kinds = [False] * len(part) + [True] * (config.window // ratio if full else 0)
        else:
            total = len(part) + (len(part) + self.carry) // ratio
            kinds = [index % (ratio + 1) == ratio - self.carry for index in range(total)]
            self.carry = (len(part) + self.carry) % ratio
        is_beacon = torch.tensor(kinds)
        places = torch.arange(before + len(kinds))
        mask = places <= places[before:, None]
        if config.attn == "step-expansion":
            for number, slot in enumerate(is_beacon.nonzero().flatten().tolist(), 1):
                mask[slot, window + number * ratio : window + config.window] = False
                if not config.attend_prev:
                    mask[slot, window + config.window : before + slot] = False
                places[before + slot] = window + number * ratio - 1 + (number if config.attend_prev else 1)
        states = part.new_empty(len(kinds), part.shape[1])
        states[~is_beacon] = part
        states[is_beacon] = self.tensors["model.beacon_embed_tokens.weight"]
        self.slots += ["b" if kind else "r" for kind in kinds]
        waves = self.waves(places)
        for index, layer in enumerate(self.model.model.layers):
            states = self.layer(index, layer, states, is_beacon, mask, waves)
        return states[~is_beacon]

    def layer(self, index: int, layer: Any, states: Any, is_beacon: Any, mask: Any, waves: Any) -> torch.Tensor:
        """Run one decoder layer on states [n, hidden], and join its keys and values to the cached ones."""
        own, normed = layer.self_attn, layer.input_layernorm(states)
        query, key, value = (self.projected(index, name, own, normed, is_beacon) for name in "qkv")
        query, key, value = (x.unflatten(1, (-1, own.head_dim)) for x in (query, key, value))
        if hasattr(own, "q_norm"):
            query, key = own.q_norm(query), own.k_norm(key)
        if self.keys[index] is not None:
            key, value = torch.cat((self.keys[index], key)), torch.cat((self.values[index], value))
        self.keys[index], self.values[index] = key, value
        cos, sin = waves
        query = turned(query, cos[-len(states) :], sin[-len(states) :])
        group = query.shape[1] // key.shape[1]
        key, value = (x.repeat_interleave(group, dim=1) for x in (turned(key, cos, sin), value))
        scores = torch.einsum("nhd,mhd->hnm", query, key) / own.head_dim**0.5
        weights = scores.masked_fill(~mask, float("-inf")).softmax(-1)
        mixed = torch.einsum("hnm,mhd->nhd", weights, value).flatten(1)
        states = states + self.projected(index, "o", own, mixed, is_beacon)
        return states + layer.mlp(layer.post_attention_layernorm(states))

    def projected(self, index: int, name: str, own: Any, x: torch.Tensor, is_beacon: torch.Tensor) -> torch.Tensor:
        """Return a projection of x [n, inputs]: the base model's for raw tokens, its own for a beacon."""
        base, place = getattr(own, f"{name}_proj")(x), f"model.layers.{index}.self_attn.beacon_{name}_proj"
        if f"{place}.weight" not in self.tensors:
            return base
        other = x @ self.tensors[f"{place}.weight"].T + self.tensors.get(f"{place}.bias", 0)
        return torch.where(is_beacon[:, None], other, base)

    def waves(self, places: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return cos and sin [m, 1, d/2] of all positions [m] of a forward pass."""
        cos, sin = (wave[0, :, None] for wave in self.rotary(self.model.lm_head.weight, places[None]))
        return cos.chunk(2, dim=-1)[0], sin.chunk(2, dim=-1)[0]

    def complete(self, first: bool) -> None:
        """Let go of the window: first slots may become sink, beacons become memory, last raw tokens stay a while."""
        old = [index for index, slot in enumerate(self.slots) if slot in "sm"]
        window = [index for index, slot in enumerate(self.slots) if slot in "rb"]
        sink = window if first else window[: self.config.sink_size * (not self.windows)]
        raw = [index for index in window if self.slots[index] == "r"]
        memory, tail = [index for index in window if self.slots[index] == "b"], []
        if first or not self.ratio:
            memory = [index for index in window if index not in sink]
        elif self.keep_recent:
            tail = [index for index in raw[-self.keep_recent :] if index not in sink]
        letters = [self.slots[index] for index in old]
        self.keep([*old, *sink, *memory, *tail])
        self.slots = [*letters, *("s" * len(sink)), *("m" * len(memory)), *("t" * len(tail))]
        self.open, self.ratio, self.windows = [], None, self.windows + (not first)

    def keep(self, chosen: list[int]) -> None:
        """Keep these slots of every layer, in this order."""
        self.slots = [self.slots[index] for index in chosen]
        for held in (self.keys, self.values):
            held[:] = [None if tensor is None else tensor[chosen] for tensor in held]

    def memory(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return a layer's keys after RoPE and values, [kv_heads, slots, d], in the order of the slots."""
        keys = turned(self.keys[index], *self.waves(torch.arange(len(self.slots))))
        return keys.transpose(0, 1), self.values[index].transpose(0, 1)


def turned(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotate x [n, heads, d]: channel i and i + d/2 are the two sides of one angle."""
    left, right = x.chunk(2, dim=-1)
    return torch.cat((left * cos - right * sin, right * cos + left * sin), dim=-1)


@functools.cache
def stock(kind: str, dtype: torch.dtype = torch.float64, **changes: Any) -> Any:
    """Return a tiny model with strong, uneven attention, built once; not to be changed."""
    return fresh(kind, dtype, **changes)


def fresh(kind: str, dtype: torch.dtype = torch.float64, **changes: Any) -> Any:
    """Return such a model that may be changed."""
    config = AutoConfig.for_model(kind, **{**SHAPE, **HEADS, **TOKENS, "initializer_range": 0.3, **changes})
    with torch.random.fork_rng():
        torch.manual_seed(7)
        model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa")
        for weight in model.parameters():
            # Norms and biases start as constants.
            if weight.ndim == 1:
                weight.data += 0.3 * torch.randn_like(weight)
    return model.eval().to(dtype).requires_grad_(False)


def beacons(model: Any, param: tuple[str, ...], seed: int = 3) -> dict[str, torch.Tensor]:
    """Return random beacon tensors under the names of released checkpoints, unlike any of the model's."""
    generator = torch.Generator().manual_seed(seed)
    shapes = {"model.beacon_embed_tokens.weight": (1, model.config.hidden_size)}
    for index, name in itertools.product(range(len(model.model.layers)), param):
        base = getattr(model.model.layers[index].self_attn, f"{name}_proj")
        place = f"model.layers.{index}.self_attn.beacon_{name}_proj"
        shapes |= {f"{place}.{suffix}": tensor.shape for suffix, tensor in base.named_parameters()}
    made = {name: torch.randn(shape, generator=generator) * 0.35 for name, shape in shapes.items()}
    return {name: tensor.to(model.dtype) for name, tensor in made.items()}


def settings(**changes: Any) -> beacon.BeaconConfig:
    """Return a config of small windows."""
    small = {"window": 8, "stride": 8, "ratio": (2,), "ratio_mix": "sequence", "param": ("q", "k", "v")}
    return beacon.BeaconConfig(**{**small, **changes})


class Engine:
    """A model with random beacons, as the package runs it, and the slow writing of the same."""

    def __init__(self, model: Any, config: beacon.BeaconConfig, **options: Any) -> None:
        self.model, self.config, self.options = model, config, beacon.MemoryOptions(**options)
        self.tensors, self.weights = beacons(model, config.param), beacon.BeaconWeights(model, config)
        self.weights.load_released(self.tensors)
        self.weights.requires_grad_(False)

    def installed(self, **extras: Any) -> Any:
        """Open ``beacon.installed``."""
        return beacon.installed(self.model, self.config, self.weights, self.options, **extras)

    def cache(self, **extras: Any) -> beacon.BeaconCache:
        """Return an empty cache."""
        return beacon.BeaconCache(self.model, self.config, self.options, **extras)

    def naive(self, **extras: Any) -> NaiveBeacon:
        """Return an empty slow memory."""
        return NaiveBeacon(self.model, self.config, self.tensors, **extras)

    @torch.no_grad()
    def read(self, ids: torch.Tensor, *, pieces: Any = None, cache: Any = None, mask: Any = None) -> torch.Tensor:
        """Return the logits [rows, n, vocab] of ids [rows, n] given in pieces of these lengths."""
        logits, cache = [], self.cache() if cache is None else cache
        with self.installed():
            for part in ids.split(pieces or ids.shape[1], dim=1):
                now = None if mask is None else mask[:, : cache.columns + part.shape[1]]
                logits.append(self.model(part, attention_mask=now, past_key_values=cache).logits)
        return torch.cat(logits, dim=1)
