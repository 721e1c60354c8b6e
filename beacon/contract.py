"""What must hold for every compressed cache, checked live: the field's commonest bugs are silent."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from transformers import DynamicCache

from beacon.install import compressing
from flashcore import rope

if TYPE_CHECKING:
    from beacon.cache import CompressedCache
    from beacon.schedule import Step

Make = Callable[..., Any]
#: largest difference, relative to the largest number, that rounding explains
_TOLERANCE = {torch.float32: 2e-3, torch.float64: 1e-6}
#: part of the kept slots that near-ties, decided by rounding, may change
_TIES = 0.1


class ContractError(ValueError):
    """A compressed cache broke an invariant: its results must not be used."""

    def __init__(self, invariant: str, fault: str) -> None:
        super().__init__(f"compression contract broken ({invariant}): {fault}")
        self.invariant = invariant


def check_step(cache: CompressedCache, step: Step) -> None:
    """Compare what the layers hold after a forward pass with what was planned; called by the cache itself.

    Raises:
        ContractError: naming layer, row and figures.
    """
    rows = range(len(step.new))
    for index, layer_index in enumerate(cache.full):
        layer, where = cache.layers[layer_index], f"layer {layer_index}"
        keep = step.keep[index]
        for name, tensor in (("keys", layer.keys), ("values", layer.values)):
            if tensor.shape[0] != len(step.new) or tensor.shape[2] != max(keep):
                raise ContractError(
                    "bytes fell", f"{where} holds {name} of shape {list(tensor.shape)}, planned {max(keep):,} slots"
                )
            room = tensor.untyped_storage().nbytes() // max(1, tensor.nbytes // max(1, tensor.shape[2]))
            most = max(*keep, *step.limits[index])
            if not cache.budget.keeps_all and room > most:
                raise ContractError(
                    "bytes fell", f"{where} keeps memory for {room:,} slots of {name} alive, allowed {most:,}"
                )
        if not step.evicts:
            continue
        positions = cache.true_positions(layer_index)
        real = positions >= 0
        for row in rows:
            counts, seen = real[row].sum(-1), cache.seen[row]
            if (counts != keep[row]).any():
                raise ContractError(
                    "bytes fell on every sample",
                    f"{where}, row {row} holds {int(counts.max()):,} slots, planned {keep[row]:,} of {seen:,} tokens",
                )
            own = positions[row][:, positions.shape[2] - keep[row] :]
            if (own.diff(dim=-1) <= 0).any() or (own >= seen).any():
                raise ContractError("true positions", f"{where}, row {row}: positions are not rising or not yet seen")


def verify(model: Any, ids: Sequence[int], make: Make) -> list[str]:
    """Run every invariant on a short text and return their names; about ten short forward passes.

    * **ratio 1 is the plain model**: nothing dropped, in chunks, gives the logits of a ``DynamicCache``.
    * **bytes fell on every sample**: two rows of unequal length, half their slots dropped.
    * **a slot is the token it claims to be**: keys and values of what stays of one chunk are the plain model's at the
      true positions given, moved by RoPE if positions are compact.
    * **true positions**: after slots were dropped, the next token is rotated at its true position (the number of slots
      held, if positions are compact), seen in the first layer, where keys depend on nothing else.
    * **a dropped prefix is gone**: with every slot dropped, a suffix gives the logits of the suffix alone at its true
      positions (at 0, 1, 2, … if positions are compact).
    * **a row is itself in any batch**: the shorter of the two rows gives what it gives alone.

    Args:
        model: inside ``compressing(model)`` or not.
        ids: at least 48 tokens of any text; the first 128 are used.
        make: ``make(**changes)`` builds a fresh cache; ``changes`` are ``ratio`` or ``slots``.

    Raises:
        ContractError: naming the invariant that does not hold.
        ValueError: too few tokens.
    """
    if len(ids) < 48:
        raise ValueError(f"the contract needs at least 48 tokens of text, got {len(ids)}")
    text = torch.tensor([list(ids)[:128]], device=model.device)
    with torch.inference_mode(), compressing(model):
        return [
            name for check in (_plain, _bytes, _content, _next, _prefix, _rows) for name in check(model, text, make)
        ]


def _plain(model: Any, text: torch.Tensor, make: Make) -> Iterator[str]:
    name = "ratio 1 is the plain model"
    half = text.shape[1] // 2
    wanted = model(text, past_key_values=dense(model)).logits
    cache = make(ratio=1)
    got = torch.cat([model(part, past_key_values=cache).logits for part in text.split(half, dim=1)], dim=1)
    equal(name, got, wanted, "logits with nothing dropped")
    yield name


def _bytes(model: Any, text: torch.Tensor, make: Make) -> Iterator[str]:
    name = "bytes fell on every sample"
    half = text.shape[1] // 2
    cache = make(slots=half)
    read(model, batch(text), cache, half)
    full = dense(model)
    model(**batch(text), past_key_values=full)
    held, whole = (sum(_layer_bytes(x.layers[index]) for index in cache.full) for x in (cache, full))
    if held > whole * 3 / 4:
        raise ContractError(name, f"the cache holds {held:,} bytes, the full one {whole:,}; half was allowed")
    for row, seen in enumerate(cache.seen):
        slots = sum(int((cache.true_positions(index)[row] >= 0).sum(-1).max()) for index in cache.full)
        if slots > len(cache.full) * half:
            raise ContractError(name, f"row {row} still holds {slots:,} slots of {len(cache.full)} x {seen:,} tokens")
    yield name


def _content(model: Any, text: torch.Tensor, make: Make) -> Iterator[str]:
    name = "a slot is the token it claims to be"
    cache, full = make(slots=text.shape[1] // 2), dense(model)
    model(text, past_key_values=cache)
    model(text, past_key_values=full)
    for index in cache.full:
        got, whole = cache.layers[index], full.layers[index]
        at = cache.true_positions(index)[0].long()
        for head, positions in enumerate(at):
            places = positions.to(text.device)
            keys, values = (plain[:1, head : head + 1].index_select(2, places) for plain in (whole.keys, whole.values))
            if cache.positions == "compact":
                count, after = len(positions), cache.schedule.next_position[0]
                keys = rope.rerotate(keys, places, torch.arange(after - count, after), cache.turns[index].inv_freq)
            for what, mine, own in (("keys", got.keys, keys), ("values", got.values, values)):
                equal(name, mine[:1, head : head + 1], own, f"{what} of layer {index}, head {head}")
    yield name


def _next(model: Any, text: torch.Tensor, make: Make) -> Iterator[str]:
    name = "true positions"
    cache, full = make(slots=text.shape[1] // 2), dense(model)
    model(text, past_key_values=cache)
    held = max(cache.layers[index].keys.shape[2] for index in cache.full)
    at = held if cache.positions == "compact" else text.shape[1]
    token = text[:, :1]
    model(token, past_key_values=cache)
    model(token, position_ids=torch.tensor([[at]], device=text.device), past_key_values=full)
    got, wanted = cache.layers[0].keys[:, :, -1], full.layers[0].keys[:, :, -1]
    equal(name, got, wanted, f"the key of the next token, to stand at position {at},")
    yield name


def _prefix(model: Any, text: torch.Tensor, make: Make) -> Iterator[str]:
    name = "a dropped prefix is gone"
    cut = text.shape[1] // 2
    prefix, suffix = text[:, :cut], text[:, cut:]
    cache = make(slots=cut)
    model(prefix, past_key_values=cache)
    cache.forget()
    got = model(suffix, past_key_values=cache).logits
    first = 0 if cache.positions == "compact" else cut
    at = torch.arange(first, first + suffix.shape[1], device=text.device)[None]
    wanted = model(suffix, position_ids=at, past_key_values=dense(model)).logits
    equal(name, got, wanted, f"logits of a suffix at positions {first}…{first + suffix.shape[1] - 1}")
    yield name


def _rows(model: Any, text: torch.Tensor, make: Make) -> Iterator[str]:
    name = "a row is itself in any batch"
    padded = batch(text)
    short = text[:, : int(padded["attention_mask"][1].sum())]
    both, alone = (make(slots=text.shape[1] // 3) for _ in range(2))
    next_token, first = text[:, :1], text.shape[1] // 2
    read(model, padded, both, first)
    # The same chunks for the row alone: what is dropped depends on where chunks end.
    read(model, {"input_ids": short}, alone, first - (text.shape[1] - short.shape[1]))
    got = model(next_token.expand(2, 1), past_key_values=both, attention_mask=longer(padded)).logits[1]
    wanted = model(next_token, past_key_values=alone).logits[0]
    others = 0
    for index in both.full:
        mine, own = (_pairs(cache.true_positions(index)[row]) for cache, row in ((both, 1), (alone, 0)))
        others += len(mine ^ own)
        if len(mine ^ own) > _TIES * len(own):
            raise ContractError(name, f"layer {index} keeps other tokens of a row in a batch than of the row alone")
    if not others:
        equal(name, got, wanted, "logits of a row in a batch")
    yield name


def dense(model: Any) -> Any:
    """Return a fresh uncompressed cache."""
    return DynamicCache(config=model.config)


def batch(text: torch.Tensor) -> dict[str, torch.Tensor]:
    """Return the text and its first three quarters as a left-padded batch."""
    pad = text.shape[1] // 4
    ids = text.repeat(2, 1)
    ids[1] = torch.cat((text[0, :1].repeat(pad), text[0, : text.shape[1] - pad]))
    mask = torch.ones_like(ids)
    mask[1, :pad] = 0
    return {"input_ids": ids, "attention_mask": mask}


def longer(inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """Return the mask of a batch after one more token."""
    return torch.nn.functional.pad(inputs["attention_mask"], (0, 1), value=1)


def read(model: Any, inputs: dict[str, torch.Tensor], cache: Any, first: int) -> None:
    """Run a batch through the model in two chunks, the first of ``first`` columns."""
    columns = inputs["input_ids"].shape[1]
    for begin, end in ((0, first), (first, columns)):
        part = {"input_ids": inputs["input_ids"][:, begin:end]}
        if "attention_mask" in inputs:
            part["attention_mask"] = inputs["attention_mask"][:, :end]
        model(**part, past_key_values=cache)


def _pairs(positions: torch.Tensor) -> set[tuple[int, int]]:
    """Return the (head, true position) pairs of one row's slots."""
    return {(head, at) for head, row in enumerate(positions.tolist()) for at in row if at >= 0}


def _layer_bytes(layer: Any) -> int:
    """Return the memory behind a layer's keys and values."""
    return int(layer.keys.untyped_storage().nbytes() + layer.values.untyped_storage().nbytes())


def equal(name: str, got: torch.Tensor, wanted: torch.Tensor, what: str, rounding: float = 0.0) -> None:
    """Raise unless two tensors differ by rounding only, ``rounding`` of the largest number included."""
    difference = float((got.float() - wanted.float()).abs().max())
    scale = float(wanted.float().abs().max())
    # Written so that NaN does not pass.
    if not difference <= max(rounding, _TOLERANCE.get(wanted.dtype, 6e-2)) * scale:
        raise ContractError(name, f"{what} differ from what they must be by {difference:.3g} of {scale:.3g}")
