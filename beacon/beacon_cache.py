"""The cache of Activation Beacon: the plan of every row, and one layer of slots each."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import torch

from beacon.backbones import backbone
from beacon.budget import Budget
from beacon.config import BeaconConfig, MemoryOptions
from beacon.int8 import Int8Slots
from beacon.memory import GradientSlots, Pair, Pass, Slots
from beacon.plan import RowPlan, Survivors
from beacon.ratios import SEED, Ratios, positions_known
from beacon.request import RequestCache, token_bytes
from flashcore import rope
from flashcore.hf.cache import cache_bytes

#: kinds of RoPE whose speeds depend on the length read so far
_RESTLESS = ("dynamic", "longrope")


class BeaconCache(RequestCache):
    """What Activation Beacon has kept of the tokens seen so far, for a model inside ``beacon.installed``.

    Use it like any cache of transformers: in forward passes, with prompts in pieces, in ``generate``. Each row has its
    own windows, ratios and lengths, so that a row in a batch gives what it gives alone. RoPE whose speeds depend on the
    length (dynamic, longrope) is the exception: all rows have the speeds of the longest, as in transformers.

    Args:
        model: the model it is for.
        config: windows and ratios.
        options: what goes beyond the reference.
        expected: tokens of the whole text, if known: adapt-N then fits them rather than the first call's.
        skip_first: tokens kept whole before the first window.
        skip_last: index of the token from which on everything is kept whole.
        seed: of the ratios that are drawn.
        ratios: of the first windows, as ``beacon.steer`` chooses them; those that follow get theirs by the config.

    Raises:
        ValueError: an unknown architecture, or arguments that do not fit the windows.

    >>> import beacon
    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> model = LlamaForCausalLM(LlamaConfig(vocab_size=9, hidden_size=8, intermediate_size=8, num_hidden_layers=1,
    ...                                      num_attention_heads=2, eos_token_id=2)).eval()
    >>> config = BeaconConfig(window=8, stride=8, ratio=(4,))
    >>> cache = BeaconCache(model, config)
    >>> with beacon.installed(model, config), torch.no_grad():
    ...     _ = model(torch.ones(1, 19, dtype=torch.long), past_key_values=cache)
    >>> cache.get_seq_length(), cache.held, cache.true_positions(0).tolist()
    (19, [7], [[[3, 7, 11, 15, 16, 17, 18]]])
    """

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
        ratios: Sequence[int] = (),
    ) -> None:
        names, decoder = backbone(model), model.get_decoder()
        options = options or MemoryOptions()
        kind = Int8Slots if options.int8 else Slots
        super().__init__(layers=[kind() for _ in getattr(decoder, names.layers)])
        self.config, self.options = config, options
        # Copies: RoPE whose speeds change with the length must not change the model's, nor outlive the text.
        self.rest = copy.deepcopy(getattr(decoder, names.rotary))
        self.rotary = copy.deepcopy(self.rest)
        self.restless = any(name in str(getattr(self.rotary, "rope_type", "")) for name in _RESTLESS)
        length = positions_known(model.config)
        if any(not isinstance(ratio, int) or not 0 <= ratio <= config.window for ratio in ratios):
            raise ValueError(f"ratios must lie between 0 and the window of {config.window}, got {list(ratios)}")
        chosen = Ratios(config, length, seed, given=tuple(ratios))
        self.first = RowPlan(config, self.options, chosen, expected, skip_first=skip_first, skip_last=skip_last)
        self.plans: list[RowPlan] = []
        #: row -> embeddings [n, hidden] of a first window that was read without beacons (``lossless_short``)
        self.unmarked: dict[int, torch.Tensor] = {}
        self.token_bytes = token_bytes(model)
        self.full = list(range(len(self.layers)))
        self.method, self.budget, self.positions, self.probes = None, Budget(ratio=1), "compact", ()
        #: fingerprint of the beacons that made what is held
        self.made_by = ""
        #: most slots that any row needed so far
        self.most = 0
        self._columns = self.peak = 0

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
        if self.probes:
            self.probes = ()
            raise ValueError("beacons are made without a question in mind: read the text without questions")
        new = self.new_tokens(columns, 0, mask, rows)
        self.offsets(new, columns, positions=positions)
        if not self.plans:
            self.plans = [self.first.copy() for _ in range(rows)]
        return new

    def expect(self, tokens: int) -> None:
        """Take note of the length of the text: buffers are made for all of it, and adapt-N fits it."""
        for plan in (self.first, *self.plans):
            plan.expected = max(plan.expected, tokens)

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
            raise ValueError(
                "gradients need a cache that was begun with gradients: start from a new one, or use no_grad"
            )
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

    def final_turn(self, kept: Survivors, like: torch.Tensor) -> Pair:
        """Return cos and sin [1, 1, beacons, d] of the places that beacons of a completed window go to.

        With the speeds that the other slots are turned by now: should the next pass change them, all follow together.
        """
        places = torch.arange(kept.at, kept.at + kept.beacons, device=like.device)[None, None]
        cos, sin = rope.tables(places, self.rotary.inv_freq)
        scaling = self.rotary.attention_scaling
        return (cos * scaling).to(like.dtype), (sin * scaling).to(like.dtype)

    def with_replay(self, run: Pass, embeds: torch.Tensor) -> torch.Tensor:
        """Return the raw tokens [b, n, hidden] to run: with those of a first window that is now read with beacons."""
        if not self.options.lossless_short or self.config.pos != "interleave":
            return embeds
        rows, texts = range(len(self.plans))[run.rows], []
        for row, step, own in zip(rows, run.steps, embeds, strict=True):
            known = self.unmarked.pop(row, own[:0])
            # A window without a ratio is the first, unless it ends a text in training.
            if step.ratio is None and not step.last:
                self.unmarked[row] = torch.cat((known, own))
            texts.append(torch.cat((known, own)) if step.again else own)
        return torch.stack(texts)

    def finish(self, columns: int) -> None:
        """Enter a call that has run, and check that the layers hold what the plans say.

        Raises:
            ContractError: a layer does not.
        """
        from beacon.beacon_contract import check_cache

        self._columns += columns
        self.peak = max(self.peak, cache_bytes(self))
        check_cache(self)

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
        """Drop every slot; the tokens stay seen. What follows begins a text of its own, in which nothing is skipped."""
        for plan in self.plans:
            plan.skip_first, plan.skip_last, plan.ended = 0, None, False
            plan.sink = plan.memory = plan.tail = plan.open_raw = plan.open_beacons = 0
            plan.window_lead = plan.remainder = plan.windows = 0
            plan.ratio, plan.spans = None, ()
            plan.ratios.restart()
        self.unmarked, self.rotary = {}, copy.deepcopy(self.rest)
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
        self.rotary, self.made_by, self.most = copy.deepcopy(self.rest), "", 0

    @property
    def rounding(self) -> float:
        """Return by how much, relative to the largest number, kept slots may differ from what was computed."""
        return 0.05 if self.options.int8 else 0.0

    def quantisation_error(self) -> tuple[float, float] | None:
        """Return the relative root-mean-square error of int8 keys and values so far; None if nothing is."""
        if not self.options.int8 or not any(float(layer.errors[0, 1]) for layer in self.layers):
            return None
        off, size = torch.stack([layer.errors for layer in self.layers]).sum(0).unbind(1)
        keys, values = (off / size).sqrt().tolist()
        return keys, values

    def slots_of(self, layer_idx: int) -> tuple[int, ...]:
        """Return how many slots each row holds; every layer holds the same."""
        return tuple(self.held)

    def true_positions(self, layer_idx: int) -> torch.Tensor:
        """Return the true position of every slot, [rows, 1, slots], -1 for padding; a beacon has its last token's."""
        rows = [torch.tensor(plan.tokens(), dtype=torch.int32) for plan in self.plans]
        return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=-1)[:, None]

    def pack(self) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
        """Return the tensors and the facts that a file of this cache holds."""
        tensors = {f"unmarked.{row}": text for row, text in self.unmarked.items()}
        for index, layer in enumerate(self.layers):
            tensors |= {f"{name}.{index}": tensor for name, tensor in layer.pack(self.plans[0]).items()}
        return tensors, {
            "config": self.config.to_hf(),
            "options": asdict(self.options),
            "books": {
                "expected": self.first.expected,
                "columns": self._columns,
                "rows": [x.pack() for x in self.plans],
            },
            "beacons": self.made_by,
            "most": self.most,
            "peak": self.peak,
        }

    def unpack(self, tensors: dict[str, torch.Tensor], facts: dict[str, Any]) -> None:
        """Take over what ``pack`` returned."""
        books = facts["books"]
        self.made_by, self.most, self.peak, self._columns = (
            facts["beacons"], facts["most"], facts["peak"], books["columns"],
        )  # fmt: skip
        self.plans = [self.first.copy() for _ in books["rows"]]
        for plan, row in zip(self.plans, books["rows"], strict=True):
            plan.unpack(row)
        for name, tensor in tensors.items():
            if name.startswith("unmarked."):
                self.unmarked[int(name.removeprefix("unmarked."))] = tensor
        for index, layer in enumerate(self.layers):
            own = {name.split(".")[0]: tensor for name, tensor in tensors.items() if name.endswith(f".{index}")}
            own.pop("unmarked", None)
            layer.unpack(own)
