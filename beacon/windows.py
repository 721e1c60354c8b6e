"""The window loop of Activation Beacon: a stock decoder's own modules, run window by window over a ``BeaconCache``.

It computes what the reference computes (FlagEmbedding, research/Long_LLM/activation_beacon), but for these deliberate
deviations, where the reference is broken or depends on circumstances:

* **Batches of unequal length.** Every row has its own windows, ratios and lengths: padding is no token.
* **Sink.** It is taken once, when the first window is complete, and duplicates nothing: ratio 0 is the base model.
* **Tokens kept whole at the end** (``skip_last``) stay while decoding goes on; so do those of ``skip_first``, with or
  without the other, for every backbone, in ``generate`` too.
* **Beam search** reorders the memory; ``inputs_embeds`` and models built from a config work.
* **Masks under generate** grow by one column a token, and left padding is never read as a token.
* **Random ratios** depend on the seed of the request, not on what the process has read before.
* **Joint windows** (``parallel_window``) run one by one: the same numbers for every choice of projections and sink.
* **Evaluation mode** is the model's own: nothing has to be called after loading.
* **Refused by name** instead of undefined: overlapping windows, segmentation, interleaved step-expansion, unknown
  placements, assisted decoding (a cache cannot be cropped).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextvars import ContextVar
from itertools import groupby
from typing import Any
from weakref import WeakSet

import torch
from transformers.cache_utils import Cache
from transformers.modeling_outputs import BaseModelOutputWithPast

from beacon.backbones import Backbone, Part, parts
from beacon.beacon_cache import BeaconCache
from beacon.config import BeaconConfig, MemoryOptions
from beacon.grid import merge, split
from beacon.memory import GradientSlots, Pair, Pass, Settling, Slots
from beacon.plan import RowPlan
from beacon.recompute import Recomputation
from beacon.request import token_bytes
from beacon.view import View, moves
from beacon.weights import BeaconWeights
from flashcore import attention, rope

#: how many of the last hidden states the call under way will use; 0 = all. Each thread has its own.
NEEDED: ContextVar[int] = ContextVar("needed", default=0)
_REFUSED = ("output_attentions", "output_hidden_states", "token_type_ids")


class WindowReader:
    """Takes the place of a decoder's ``forward``."""

    def __init__(
        self,
        model: Any,
        names: Backbone,
        config: BeaconConfig,
        weights: BeaconWeights,
        options: MemoryOptions,
        recompute: bool = False,
    ) -> None:
        self.model, self.decoder = model, model.get_decoder()
        self.config, self.options, self.weights, self.recompute = config, options, weights, recompute
        #: the decoder's own forward: reading without beacons
        self.plain = self.decoder.forward
        self.embedding, self.final_norm = (getattr(self.decoder, name) for name in (names.embedding, names.final_norm))
        self.parts = parts(self.decoder, names)
        #: fingerprint of the beacons; none while they are trained
        self.name = "" if any(each.requires_grad for each in weights.parameters()) else weights.fingerprint()
        self.token_bytes = token_bytes(model)
        #: empty caches of transformers that a BeaconCache took the place of
        self.replaced: WeakSet[Cache] = WeakSet()

    def __call__(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        use_cache: bool | None = None,
        text_ends: bool | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """Read tokens; return the hidden states [rows, columns (or ``NEEDED``), hidden] of raw tokens.

        Args:
            input_ids, attention_mask, position_ids, past_key_values, inputs_embeds, use_cache: as in transformers.
            text_ends: whether the text ends here and its last window gets no beacons; None = in training mode.
            kwargs: further options of transformers, which mean nothing here or are refused.

        Raises:
            ValueError: a cache of another kind that holds something, options without meaning here, or what
                ``BeaconCache.begin`` refuses.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give either input_ids or inputs_embeds")
        if refused := [name for name in _REFUSED if kwargs.get(name) is not None and kwargs[name] is not False]:
            raise ValueError(f"a model with beacons installed does not support {', '.join(refused)}")
        if self.decoder.training and (dropout := getattr(self.model.config, "attention_dropout", 0)):
            raise ValueError(f"no attention dropout here: set it to 0 in the config, it is {dropout}")
        if inputs_embeds is None:
            inputs_embeds = self.embedding(input_ids)
        cache = self._cache(past_key_values)
        returned = None if use_cache is False and past_key_values is None else cache
        rows, columns = inputs_embeds.shape[:2]
        new = cache.begin(columns, attention_mask, position_ids, rows)
        if torch.is_grad_enabled() and any(each.requires_grad for each in (inputs_embeds, *self._parameters())):
            cache.differentiable()
        try:
            hidden = self._read(cache, inputs_embeds, new, self.decoder.training if text_ends is None else text_ends)
        except BaseException:
            cache.abandon()
            raise
        cache.finish(columns)
        return BaseModelOutputWithPast(last_hidden_state=hidden, past_key_values=returned)

    def _parameters(self) -> Iterator[torch.nn.Parameter]:
        """Yield every parameter that gradients could be wanted for."""
        yield from self.weights.parameters()
        yield from self.decoder.parameters()

    def _cache(self, given: Cache | None) -> BeaconCache:
        """Return the cache to use: the one given, or a new one in place of none or of an empty stock cache."""
        if isinstance(given, BeaconCache):
            if len(given.layers) != len(self.parts) or given.token_bytes != self.token_bytes:
                raise ValueError(
                    f"the cache was made for a model of {len(given.layers)} layers of {given.token_bytes:,} bytes a "
                    f"token, this one has {len(self.parts)} of {self.token_bytes:,}: make it for this model"
                )
            if given.made_by and self.name and given.made_by != self.name:
                raise ValueError(
                    f"the cache was made by other beacons ({given.made_by}) than those installed ({self.name}): "
                    "install those, or read the text again"
                )
            given.made_by = self.name
            return given
        if given is not None and given.get_seq_length() > 0:
            raise ValueError(
                f"beacons cannot go on from a {type(given).__name__} that holds tokens: give a BeaconCache"
            )
        if given in self.replaced:
            raise ValueError(
                f"this {type(given).__name__} stayed empty, a BeaconCache took its place: go on with the output's "
                "past_key_values"
            )
        if given is not None:
            self.replaced.add(given)
        return BeaconCache(self.model, self.config, self.options)

    def _read(self, cache: BeaconCache, embeds: torch.Tensor, new: Sequence[int], ends: bool) -> torch.Tensor:
        """Run all rows; return the hidden states asked for, zero where there is padding."""
        columns = embeds.shape[1]
        # Said for one call: a caller of the decoder itself wants everything.
        wanted = NEEDED.get()
        NEEDED.set(0)
        needed = min(wanted, columns) or columns
        outputs = []
        for group in self._groups(cache.plans, new):
            count = new[group.start]
            hidden = self._read_group(cache, group, embeds[group, columns - count :], min(count, needed), ends)
            outputs.append(torch.nn.functional.pad(hidden, (0, 0, needed - hidden.shape[1], 0)))
        return self.final_norm(torch.cat(outputs) if len(outputs) > 1 else outputs[0])

    def _groups(self, plans: Sequence[RowPlan], new: Sequence[int]) -> Iterator[slice]:
        """Yield runs of rows that can share their forward passes: equal ones, or any that decode one token."""

        def kind(row: int) -> tuple[object, ...]:
            alike = (new[row], *plans[row].state)
            replays = plans[row].options.lossless_short and plans[row].windows == 0
            return ("one",) if new[row] == 1 and not replays else alike

        for _, run in groupby(range(len(plans)), key=kind):
            members = list(run)
            yield slice(members[0], members[-1] + 1)

    def _read_group(
        self, cache: BeaconCache, rows: slice, embeds: torch.Tensor, needed: int, ends: bool
    ) -> torch.Tensor:
        """Run the tokens ``embeds`` [b, n, hidden] of rows that go together; return the last ``needed`` states."""
        plans = cache.plans[rows]
        total = embeds.shape[1]
        if not total:  # nothing but padding
            return embeds
        alike = all(plan.state == plans[0].state for plan in plans)
        room = 0
        if alike and total > 1:
            # What is known to follow counts too, so that buffers are made once.
            room = plans[0].most_slots(max(total, plans[0].expected - plans[0].seen), ends)
        outputs, done = [], 0
        cache.most = max(cache.most, room)
        again = Recomputation.of(cache) if self.recompute and isinstance(cache.layers[0], GradientSlots) else None
        while done < total:
            steps = tuple(plan.plan(total - done, ends) for plan in plans)
            fresh = steps[0].raw - steps[0].again
            part = embeds[:, done : done + fresh]
            done += fresh
            run = Pass(rows, steps, ragged=not alike)
            cache.most = max(cache.most, *(step.most for step in steps))
            wanted = max(0, min(fresh, needed - (total - done)))
            hidden = self._run(cache, run, cache.with_replay(run, part), wanted, room, again)
            if hidden is not None:
                outputs.append(hidden)
            for plan, step in zip(plans, steps, strict=True):
                plan.commit(step)
        if again:
            again.join()
        return torch.cat(outputs, dim=1) if len(outputs) > 1 else outputs[0]

    def _run(
        self,
        cache: BeaconCache,
        run: Pass,
        raw: torch.Tensor,
        wanted: int,
        room: int,
        again: Recomputation | None,
    ) -> torch.Tensor | None:
        """Run one step through all layers; return the last ``wanted`` states [b, wanted, hidden] of raw tokens."""
        view, settling = View.of(cache, run, raw), list(moves(cache, run, raw))
        rows, step = len(cache.plans), run.step
        if again is None:
            return self._through(cache.layers, raw, view, settling, rows, wanted, room)
        first = step.start if step.survivors is None else min(step.window, step.survivors.at)
        return again.run(lambda layers, raw: self._through(layers, raw, view, settling, rows, wanted, room), raw, first)

    def _through(
        self,
        layers: Sequence[Slots],
        raw: torch.Tensor,
        view: View,
        settling: Sequence[Settling],
        rows: int,
        wanted: int,
        room: int,
    ) -> torch.Tensor | None:
        """Run one step through layers of the cache; ``rows`` are those of the whole batch."""
        run = view.run
        step, states = run.step, raw
        if step.beacons:
            beacons = self.weights.embed_tokens.to(raw.dtype).expand(len(run.steps), step.beacons, -1)
            states = torch.cat((raw, beacons), dim=1)
        for index, part in enumerate(self.parts):
            slots = layers[index]
            normed = part.attention_norm(states)
            mine, others = normed[:, : step.raw], normed[:, step.raw :]
            keys = part.heads(part.attention.k_proj(mine), 1)
            values = part.heads(part.attention.v_proj(mine))
            plain = pair = None
            if view.beacon_turn is not None:
                plain = part.heads(self.weights.project(index, "k", part.attention.k_proj, others), 1)
                pair = (
                    rope.rotate(plain, *view.beacon_turn),
                    part.heads(self.weights.project(index, "v", part.attention.v_proj, others)),
                )
            held = slots.append(run, (rope.rotate(keys, *view.raw_turn), values), pair, rows, room)
            if index < len(self.parts) - 1:
                states = self._attended(index, part, states, mine, others, view, held)
            elif wanted:
                states = self._last(part, states, mine, others, view, held, wanted)
            if plain is not None and any(one.survivors is None for one in run.steps):
                slots.hold(run, plain, rows)
            for move in settling:
                own = slice(move.rows.start - run.rows.start, move.rows.stop - run.rows.start)
                slots.settle(move, None if plain is None else plain[own, :, : move.step.beacons])
        return states if wanted else None

    def _attended(
        self,
        index: int,
        part: Part,
        states: torch.Tensor,
        mine: torch.Tensor,
        others: torch.Tensor,
        view: View,
        held: Pair,
    ) -> torch.Tensor:
        """Return the states [b, n + k, hidden] after a layer's attention and MLP, raw tokens first."""
        mixed = self._mixed(index, part, mine, others, view, held)
        out_proj, count = part.attention.o_proj, mine.shape[1]
        if others.shape[1] and "o" in self.weights.config.param:
            own = self.weights.project(index, "o", out_proj, mixed[:, count:])
            states = states + torch.cat((out_proj(mixed[:, :count]), own), dim=1)
        else:
            states = states + out_proj(mixed)
        return states + part.mlp(part.mlp_norm(states))

    def _last(
        self,
        part: Part,
        states: torch.Tensor,
        mine: torch.Tensor,
        others: torch.Tensor,
        view: View,
        held: Pair,
        wanted: int,
    ) -> torch.Tensor:
        """Return the last layer's states of the last ``wanted`` raw tokens: nothing reads those of its beacons."""
        count = mine.shape[1]
        if wanted == 1:
            queries = rope.rotate(part.heads(part.attention.q_proj(mine[:, -1:]), 0), *view.last_turn)
            keys, values = (tensor[:, :, : view.last_end] for tensor in held)
            mixed = attention(queries, keys, values, view.spec(part.attention.scaling, last=True))
            mixed = mixed.transpose(1, 2).flatten(2)
        else:
            mixed = self._mixed(len(self.parts) - 1, part, mine, others, view, held)[:, count - wanted : count]
        states = states[:, count - wanted : count] + part.attention.o_proj(mixed)
        return states + part.mlp(part.mlp_norm(states))

    def _mixed(
        self, index: int, part: Part, mine: torch.Tensor, others: torch.Tensor, view: View, held: Pair
    ) -> torch.Tensor:
        """Return what attention gives every token, [b, n + k, heads * d], raw tokens first."""
        step = view.run.step
        queries = rope.rotate(part.heads(part.attention.q_proj(mine), 0), *view.raw_turn)
        if view.beacon_turn is not None:
            own = part.heads(self.weights.project(index, "q", part.attention.q_proj, others), 0)
            own = rope.rotate(own, *view.beacon_turn)
            merged = queries.new_empty(*queries.shape[:2], step.slots, queries.shape[3])
            queries = merge(merged, queries, own, step.lead, step.period)
        out = attention(queries, *held, view.spec(part.attention.scaling))
        return split(out, step.beacons, step.lead, step.period).flatten(2)
