"""Beacon caches on disk, as copies, in the ledger, in 8 bits, and read through the method's door."""

from pathlib import Path
from typing import Any

import pytest
import torch

import beacon
import longllm
from beacon.contract import ContractError
from beacon.int8 import quantised
from beacon.plan import RowPlan

CONFIG = beacon.BeaconConfig(window=8, stride=8, ratio=(2, 4), param=("q", "k", "v"), sink_size=1)
TEXT = tuple(torch.randint(1, 200, (61,), generator=torch.Generator().manual_seed(4)).tolist())
OPTIONS = {
    "plain": beacon.MemoryOptions(),
    "int8": beacon.MemoryOptions(int8=True, keep_recent=3),
    "short": beacon.MemoryOptions(lossless_short=True),
}


@pytest.fixture(scope="module")
def model(build: Any) -> Any:
    return build("qwen3", eos_token_id=2)


@pytest.fixture(scope="module")
def weights(model: Any) -> beacon.BeaconWeights:
    """Beacons unlike the base model's."""
    made = beacon.BeaconWeights.initialised(model, CONFIG).requires_grad_(False)
    for parameter in made.parameters():
        parameter += 0.2 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1))
    return made


def forward(model: Any, cache: Any, ids: tuple[int, ...]) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.tensor([ids]), past_key_values=cache).logits


@pytest.mark.parametrize("length", [5, 8, 43])
@pytest.mark.parametrize("name", OPTIONS)
def test_a_saved_cache_goes_on_as_the_one_it_was(
    name: str, length: int, model: Any, weights: Any, loaded: Any, tmp_path: Path
) -> None:
    options, file = OPTIONS[name], tmp_path / "text.kv"
    with beacon.installed(model, CONFIG, weights):
        cache = beacon.BeaconCache(model, CONFIG, options)
        forward(model, cache, TEXT[:length])
        cache.save(file, loaded("qwen3", model), TEXT, document="a text")
        saved = beacon.BeaconCache.load(file, loaded("qwen3", model))
        assert (saved.ids, saved.notes, saved.complete) == (TEXT, {"document": "a text"}, False)
        assert saved.cache.seen == cache.seen
        # Room beyond the slots in use is not saved.
        accounts = [each.ledger() for each in (saved.cache, cache)]
        assert accounts[0].coverage == accounts[1].coverage
        assert [(x.slots, x.span) for x in accounts[0].layers] == [(x.slots, x.span) for x in accounts[1].layers]
        # Ratios go on being drawn where they were, one token at a time and in pieces.
        for part in (TEXT[length : length + 1], TEXT[length + 1 :]):
            assert torch.equal(forward(model, saved.cache, part), forward(model, cache, part))
        assert saved.cache.plans[0].state == cache.plans[0].state


def test_a_cache_of_other_beacons_is_refused_by_name(model: Any, weights: Any, loaded: Any, tmp_path: Path) -> None:
    with beacon.installed(model, CONFIG, weights):
        cache = beacon.BeaconCache(model, CONFIG)
        forward(model, cache, TEXT)
        cache.save(tmp_path / "text.kv", loaded("qwen3", model), TEXT)
    other = beacon.BeaconWeights.initialised(model, CONFIG).requires_grad_(False)
    back = beacon.load_cache(tmp_path / "text.kv", loaded("qwen3", model)).cache
    names = f"{weights.fingerprint()}.*{other.fingerprint()}"
    with beacon.installed(model, CONFIG, other), pytest.raises(ValueError, match=f"made by other beacons.*{names}"):
        forward(model, back, TEXT[:1])


def test_copies_of_a_cache_do_not_know_of_each_other(model: Any, weights: Any) -> None:
    with beacon.installed(model, CONFIG, weights):
        for options in OPTIONS.values():
            cache = beacon.BeaconCache(model, CONFIG, options)
            forward(model, cache, TEXT[:20])
            copies = [cache.fork() for _ in range(2)]
            answers = [forward(model, copy, TEXT[20 + number :]) for number, copy in enumerate(copies)]
            assert cache.seen == [20]
            fresh = beacon.BeaconCache(model, CONFIG, options)
            forward(model, fresh, TEXT[:20])
            assert torch.equal(forward(model, fresh, TEXT[21:]), answers[1])


def test_eight_bits_hold_the_memory_in_a_quarter_and_say_how_well(model: Any, weights: Any, in_memory: Any) -> None:
    long = TEXT * 6
    with beacon.installed(model, CONFIG, weights):
        plain, small = (beacon.BeaconCache(model, CONFIG, beacon.MemoryOptions(int8=int8)) for int8 in (False, True))
        wanted, got = forward(model, plain, long), forward(model, small, long)
    assert plain.quantisation_error() is None
    errors = small.quantisation_error()
    assert errors is not None
    assert small.ledger().error == errors
    assert f"8-bit error  keys {errors[0]:.2%}" in str(small.ledger())
    assert "8-bit" not in str(plain.ledger())
    # Rounding to 127 steps of a vector's largest number.
    assert all(0.001 < error < 0.01 for error in errors)
    assert (got - wanted).abs().max() < 0.1 * wanted.abs().max()
    assert not torch.equal(got, wanted)
    row = small.plans[0]
    coded = (row.sink + row.memory) * 2 * 2 * (8 + 4) * len(small.layers)
    assert sum(held.nbytes for layer in small.layers for held in (*layer.codes, *layer.scales)) >= coded
    assert sum(held.nbytes for layer in small.layers for held in layer.codes) <= in_memory(plain) / 4
    for layer, other in zip(small.layers, plain.layers, strict=True):
        mine, own = layer.view(0, row), other.view(0, row)
        memory = slice(0, row.sink + row.memory)
        # The first layer's memory depends on no other slot, so that only its own rounding shows.
        if layer is small.layers[0]:
            for left, right in zip(mine, own, strict=True):
                steps = right[:, :, memory].abs().amax(-1, keepdim=True) / 127
                assert ((left - right)[:, :, memory].abs() <= 0.51 * steps).all()


def test_quantisation_survives_zeros_and_is_its_own_inverse_on_its_grid() -> None:
    codes, scale = quantised(torch.zeros(2, 3))
    assert not (codes * scale).any()
    grid = torch.randint(-127, 128, (5, 16)).float()
    grid[:, 0] = 127
    assert torch.equal(torch.mul(*quantised(grid * 0.25)), grid * 0.25)


def test_the_ledger_counts_beacons_and_says_which_tokens_they_stand_for(model: Any, weights: Any) -> None:
    config = beacon.BeaconConfig(window=8, stride=8, ratio=(4,), param=("q", "k", "v"))
    with beacon.installed(model, config, weights):
        cache = beacon.BeaconCache(model, config)
        forward(model, cache, TEXT[:43])
    account = cache.ledger()
    assert account.tokens_seen == (43,)
    assert [entry.slots for entry in account.layers] == [(10 + 3,)] * len(cache.layers)
    assert cache.true_positions(0)[0, 0].tolist() == [*range(3, 40, 4), 40, 41, 42]
    token = 2 * 2 * 8 * 4
    assert account.full_bytes == 43 * token * len(cache.layers)
    assert account.nbytes == sum(held.nbytes for layer in cache.layers for held in layer.buffers)
    assert "ratio" in str(account)


def test_the_cache_notices_layers_that_do_not_hold_what_was_planned(model: Any, weights: Any) -> None:
    with beacon.installed(model, CONFIG, weights):
        cache = beacon.BeaconCache(model, CONFIG)
        forward(model, cache, TEXT[:40])
        layer = cache.layers[1]
        layer.values = torch.cat([layer.values] * 40, dim=2)
        with pytest.raises(ContractError, match=r"bytes fell.*layer 1 keeps room"):
            forward(model, cache, TEXT[40:41])


@pytest.mark.parametrize(("limit", "ratio"), [({"ratio": 1}, 0), ({"ratio": 16}, 16), ({"slots": 40}, None)])
def test_a_budget_becomes_a_ratio_and_is_kept(limit: dict[str, int], ratio: int | None, model: Any) -> None:
    method, budget = beacon.method("beacon"), beacon.Budget(**limit)
    cache = method.new_cache(model, budget, positions="compact", expected=300)
    if ratio is not None:
        assert cache.config.ratio == (ratio,)
    with method.running(model):
        forward(model, cache, (TEXT * 5)[:300])
    if budget.slots:
        assert RowPlan(cache.config).most_slots(300) <= 40
        assert max(layer.keys.shape[2] for layer in cache.layers) <= 40


@pytest.mark.parametrize(
    ("limit", "options", "message"),
    [
        ({"ratio": 2.5}, {}, "a whole ratio, got 2.5"),
        ({"slots": 40}, {}, "a text of known length"),
        ({"slots": 10}, {"expected": 5000}, "too few for the beacons of 5,000 tokens"),
        ({"ratio": 4}, {"positions": "original"}, "compact positions"),
    ],
)
def test_a_budget_that_beacons_cannot_keep_is_refused(limit: Any, options: Any, message: str, model: Any) -> None:
    with pytest.raises(ValueError, match=message):
        beacon.method("beacon").new_cache(model, beacon.Budget(**limit), **options)


def test_reading_goes_through_the_method_and_takes_no_question(model: Any, loaded: Any) -> None:
    method, given = beacon.method("beacon", window=16), loaded("qwen3", model)
    cache = method.new_cache(model, beacon.Budget(ratio=4), expected=len(TEXT))
    prefix = beacon.read(given, TEXT, cache, chunk=method.chunk(40))
    assert (prefix.ids, cache.seen) == (TEXT, [len(TEXT)])
    assert method.chunk(40) == 32
    with method.running(model):
        result = longllm.stream(given, (*TEXT, 9), longllm.Decoding(3), prefix=prefix).result
    assert (result.tokens_seen, cache.seen) == (len(TEXT) + 1, [len(TEXT)])
    with pytest.raises(ValueError, match="without a question"):
        beacon.read(given, TEXT, method.new_cache(model, beacon.Budget(ratio=4)), questions=[[5, 6]])
    with pytest.raises(ValueError, match="ranks no slots"):
        beacon.CompressedCache(model, method, beacon.Budget(ratio=4))


def test_the_method_checks_the_contract_on_its_own_windows(model: Any) -> None:
    for settings in ({}, {"int8": True}, {"lossless_short": True, "recent": 3, "sink": 2}):
        method = beacon.method("beacon", **settings)
        assert len(method.verified(model, TEXT, "compact")) == 6
        assert method.verified(model, TEXT[:40], "compact") == []
