"""What must hold for beacons, as ``beacon.contract`` says it for ranked slots."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch

from beacon.backbones import backbone, parts
from beacon.contract import ContractError, batch, dense, equal, longer, read
from flashcore import rope

if TYPE_CHECKING:
    from beacon.beacon_cache import BeaconCache
    from beacon.weights import BeaconWeights

Make = Callable[[int], "BeaconCache"]
#: fewest tokens of a text that say something
LEAST = 48
#: tokens per beacon in the checks
_RATIO = 4


def check_cache(cache: BeaconCache) -> None:
    """Compare what the layers hold with what the plans of the rows say; called by the cache after every call.

    Raises:
        ContractError: naming layer and figures.
    """
    held = max(cache.held)
    for index, layer in enumerate(cache.layers):
        for name, rows, slots, spare in layer.sizes():
            if rows != len(cache.plans) or slots < held:
                raise ContractError(
                    "bytes fell", f"layer {index} holds {name} of {rows} rows and {slots:,} slots, planned {held:,}"
                )
            if slots > max(cache.most, held) + spare:
                raise ContractError(
                    "bytes fell", f"layer {index} keeps room for {slots:,} slots of {name}, needed {cache.most:,}"
                )


def verify_beacons(model: Any, weights: BeaconWeights, ids: Sequence[int], make: Make) -> list[str]:
    """Run every invariant on a short text and return their names; about ten short forward passes.

    * **ratio 0 is the plain model**: nothing dropped, in two pieces, gives the logits of a ``DynamicCache``.
    * **bytes fell on every sample**: two rows of unequal length hold a beacon for every few tokens, and one window.
    * **a slot is the beacon it claims to be**: in the first layer, where nothing depends on the text, every kept key
      and value is the beacon projection of the beacon embedding, rotated to the slot's place.
    * **true positions**: the next token is rotated at the number of slots held, seen in the first layer.
    * **a dropped prefix is gone**: with every slot dropped, a suffix gives what it gives on its own.
    * **a row is itself in any batch**: the shorter of the two rows gives what it gives alone.

    Args:
        model: inside ``installed(model, config, weights)``, with windows that the text fills several times.
        weights: those installed.
        ids: at least 48 tokens of any text; the first 128 are used.
        make: builds a fresh cache of this ratio.

    Raises:
        ContractError: naming the invariant that does not hold.
        ValueError: too few tokens.
    """
    if len(ids) < LEAST:
        raise ValueError(f"the contract needs at least {LEAST} tokens of text, got {len(ids)}")
    text = torch.tensor([list(ids)[:128]], device=model.device)
    checks = (_plain, _bytes, _content, _next, _prefix, _rows)
    with torch.inference_mode():
        return [name for check in checks for name in check(model, weights, text, make)]


def _plain(model: Any, weights: BeaconWeights, text: torch.Tensor, make: Make) -> Iterator[str]:
    name, cache = "ratio 0 is the plain model", make(0)
    pieces = text.split(text.shape[1] // 2, dim=1)
    got = torch.cat([model(piece, past_key_values=cache).logits for piece in pieces], dim=1)
    equal(name, got, _stock(model, text).logits, "logits with nothing dropped", cache.rounding)
    yield name


def _bytes(model: Any, weights: BeaconWeights, text: torch.Tensor, make: Make) -> Iterator[str]:
    name, cache = "bytes fell on every sample", make(_RATIO)
    read(model, batch(text), cache, text.shape[1] // 2)
    window, extra = cache.config.window, cache.config.sink_size + cache.options.keep_recent
    for row, (seen, held) in enumerate(zip(cache.seen, cache.held, strict=True)):
        most = -(-seen // _RATIO) + window + -(-window // _RATIO) + extra
        if held > most:
            raise ContractError(name, f"row {row} holds {held:,} slots of {seen:,} tokens, {most:,} were allowed")
    check_cache(cache)
    yield name


def _content(model: Any, weights: BeaconWeights, text: torch.Tensor, make: Make) -> Iterator[str]:
    name, cache = "a slot is the beacon it claims to be", make(_RATIO)
    model(text, past_key_values=cache)
    plan, names = cache.plans[0], backbone(model)
    part = parts(model.get_decoder(), names)[0]
    keys, values = cache.layers[0].view(0, plan)
    own = part.attention_norm(weights.embed_tokens[None].to(model.dtype))
    plain = part.heads(weights.project(0, "k", part.attention.k_proj, own), 1)
    value = part.heads(weights.project(0, "v", part.attention.v_proj, own))
    beacons = slice(plan.sink, plan.sink + plan.memory)
    turn = cache.turn(torch.arange(plan.sink, plan.sink + plan.memory)[None], own)
    equal(name, keys[:, :, beacons], rope.rotate(plain, *turn), "keys of beacons in the first layer", cache.rounding)
    wanted = value.expand(-1, -1, plan.memory, -1)
    equal(name, values[:, :, beacons], wanted, "values of beacons in the first layer", cache.rounding)
    yield name


def _next(model: Any, weights: BeaconWeights, text: torch.Tensor, make: Make) -> Iterator[str]:
    name, cache = "true positions", make(_RATIO)
    model(text, past_key_values=cache)
    at, token = cache.held[0], text[:, :1]
    model(token, past_key_values=cache)
    plan, full = cache.plans[0], dense(model)
    _stock(model, token, position_ids=torch.tensor([[at]], device=text.device), past_key_values=full)
    if plan.held > at:  # unless that token completed its window and is gone
        got = cache.layers[0].view(0, plan)[0][:, :, at]
        equal(name, got, full.layers[0].keys[:, :, -1], f"the key of the next token, to stand at position {at},")
    yield name


def _prefix(model: Any, weights: BeaconWeights, text: torch.Tensor, make: Make) -> Iterator[str]:
    name, cache = "a dropped prefix is gone", make(_RATIO)
    cut = text.shape[1] // 2
    model(text[:, :cut], past_key_values=cache)
    cache.forget()
    got = model(text[:, cut:], past_key_values=cache).logits
    equal(name, got, model(text[:, cut:], past_key_values=make(_RATIO)).logits, "logits of a suffix")
    yield name


def _rows(model: Any, weights: BeaconWeights, text: torch.Tensor, make: Make) -> Iterator[str]:
    name, (both, alone) = "a row is itself in any batch", (make(_RATIO), make(_RATIO))
    inputs = batch(text)
    short = text[:, : int(inputs["attention_mask"][1].sum())]
    read(model, inputs, both, text.shape[1] // 2)
    model(short, past_key_values=alone)
    token = text[:, :1]
    got = model(token.expand(2, 1), past_key_values=both, attention_mask=longer(inputs)).logits[1]
    equal(name, got, model(token, past_key_values=alone).logits[0], "logits of a row in a batch", both.rounding)
    yield name


def _stock(model: Any, ids: torch.Tensor, **inputs: Any) -> Any:
    """Run the model without beacons, inside the block that installed them."""
    decoder = model.get_decoder()
    reader = decoder.__dict__.pop("forward")
    try:
        return model(ids, **inputs)
    finally:
        decoder.forward = reader
