"""What does not fit beacons is refused by name: models, weights, caches, masks, positions."""

import importlib.util
from pathlib import Path

import pytest
import torch
from transformers import DynamicCache

import beacon

spec = importlib.util.spec_from_file_location("naive_beacon", Path(__file__).with_name("naive_beacon.py"))
slow = importlib.util.module_from_spec(spec)
spec.loader.exec_module(slow)


def text(length, rows=1):
    return torch.randint(1, 97, (rows, length))


@pytest.fixture
def engine():
    return slow.Engine(slow.stock("llama"), slow.settings())


@pytest.mark.parametrize("kind", ["gemma3_text", "gemma2"])
def test_another_architecture_is_refused(kind, tiny):
    model = tiny(kind)
    for use in (
        lambda: beacon.BeaconCache(model, slow.settings()),
        lambda: beacon.BeaconWeights(model, slow.settings()),
    ):
        with pytest.raises(ValueError, match=f"runs on llama, mistral, qwen2, qwen3, not on {kind}"):
            use()
    with pytest.raises(ValueError, match=f"not on {kind}"), beacon.installed(model, slow.settings()):
        pass


@pytest.mark.parametrize(
    ("kind", "changes"), [("mistral", {}), ("qwen2", {"use_sliding_window": True, "max_window_layers": 1})]
)
def test_sliding_window_attention_is_refused(kind, changes):
    # Ignoring it would silently be another model: ratio 0 would not be the stock one.
    engine = slow.Engine(slow.fresh(kind, sliding_window=6, **changes), slow.settings())
    with pytest.raises(ValueError, match="sliding"), engine.installed():
        pass


def test_a_sliding_window_as_long_as_the_trained_length_is_no_hindrance():
    model, ids = slow.fresh("mistral", sliding_window=512), text(20)
    engine = slow.Engine(model, slow.settings(ratio=(0,)))
    torch.testing.assert_close(engine.read(ids), model(ids).logits, rtol=0, atol=1e-9)


def weights_of(config=None, **changes):
    model = slow.stock("llama", **changes)
    return beacon.BeaconWeights(model, config or slow.settings())


@pytest.mark.parametrize(
    ("weights", "words"),
    [
        (lambda: weights_of(slow.settings(param=("q", "k"))), r"projections \('q', 'k'\), the config asks for"),
        (lambda: weights_of(num_hidden_layers=3), "weights"),
        (lambda: weights_of(num_hidden_layers=1), "weights"),
        (lambda: weights_of(hidden_size=48), "weights"),
        (lambda: weights_of(num_key_value_heads=4), "weights"),
        (lambda: weights_of(attention_bias=True), "weights"),
        (lambda: weights_of().bfloat16(), "weights"),
    ],
    ids=["projections", "more-layers", "fewer-layers", "hidden", "key-heads", "bias", "dtype"],
)
def test_weights_of_another_model_or_config_are_refused(engine, weights, words):
    with pytest.raises(ValueError, match=words), beacon.installed(engine.model, engine.config, weights()):
        pass
    assert "forward" not in vars(engine.model.model)


@pytest.mark.parametrize(
    ("cache", "words"),
    [
        (lambda: beacon.BeaconCache(slow.stock("llama", num_hidden_layers=1), slow.settings()), "layers|model"),
        (lambda: beacon.BeaconCache(slow.stock("llama", num_hidden_layers=3), slow.settings()), "layers|model"),
        (lambda: filled(DynamicCache()), "cannot go on from a DynamicCache that holds tokens"),
    ],
    ids=["fewer-layers", "more-layers", "stock"],
)
def test_caches_of_another_model_are_refused(engine, cache, words):
    given = cache()
    with engine.installed(), torch.no_grad(), pytest.raises(ValueError, match=words):
        engine.model(text(9), past_key_values=given)


def filled(cache):
    slow.stock("llama")(text(5), past_key_values=cache)
    return cache


def test_windows_and_ratios_are_those_of_the_cache(engine):
    # One model can serve requests of different ratios at a time.
    other, ids = slow.Engine(engine.model, slow.settings(window=4, stride=4, ratio=(4, 0), pos="append")), text(21)
    with engine.installed(), torch.no_grad():
        got = engine.model(ids, past_key_values=other.cache()).logits[0]
    torch.testing.assert_close(got, other.naive().read(ids[0]), rtol=0, atol=1e-9)


@pytest.mark.parametrize("lossless", [True, False])
def test_options_are_those_of_the_cache(engine, lossless):
    engine.options = beacon.MemoryOptions(lossless_short=not lossless)
    other = slow.Engine(engine.model, engine.config, lossless_short=lossless)
    ids, mask = text(20, rows=2), torch.ones(2, 20, dtype=torch.long)
    mask[1, :3] = 0
    expected = other.read(ids, mask=mask, pieces=[6] + [1] * 14)
    got = engine.read(ids, mask=mask, pieces=[6] + [1] * 14, cache=other.cache())
    torch.testing.assert_close(got[mask.bool()], expected[mask.bool()], rtol=0, atol=1e-9)


def test_a_cache_made_by_other_beacons_is_refused_until_it_is_reset(engine):
    ids, cache, other = text(20), engine.cache(), slow.Engine(engine.model, engine.config)
    other.weights.embed_tokens.add_(1)
    engine.read(ids, cache=cache)
    for filled_cache in (cache, cache.fork()):
        with pytest.raises(ValueError, match="made by other beacons"):
            other.read(ids, cache=filled_cache)
    cache.reset()
    assert torch.equal(other.read(ids, cache=cache), other.read(ids))


def test_an_empty_stock_cache_stands_for_a_new_one(engine):
    ids = text(20)
    with engine.installed(), torch.no_grad():
        output = engine.model(ids, past_key_values=DynamicCache())
    assert isinstance(output.past_key_values, beacon.BeaconCache)
    assert torch.equal(output.logits, engine.read(ids))


def test_an_empty_stock_cache_that_stays_empty_is_not_taken_for_a_new_text_again(engine):
    # The caller holds on to it and believes that it has been filled.
    mine, ids = DynamicCache(), text(20)
    with engine.installed(), torch.no_grad():
        engine.model(ids, past_key_values=mine)
        with pytest.raises(ValueError, match="BeaconCache"):
            engine.model(ids, past_key_values=mine)


def test_a_beacon_cache_works_only_inside_installed(engine):
    cache = engine.cache()
    with torch.no_grad(), pytest.raises(ValueError, match=r"only inside beacon.installed"):
        engine.model(text(5), past_key_values=cache)
    with beacon.compressing(engine.model), torch.no_grad(), pytest.raises(ValueError, match=r"beacon.installed"):
        engine.model(text(5), past_key_values=cache)


@pytest.mark.parametrize("mask", [[1, 1, 1, 1, 0], [0, 1, 0, 1, 1], [1, 0, 1, 1, 1]])
def test_padding_on_the_right_and_holes_are_refused(engine, mask):
    cache = engine.cache()
    with engine.installed(), torch.no_grad(), pytest.raises(ValueError, match="padded on the left only"):
        engine.model(text(5, rows=2), attention_mask=torch.tensor([mask, [1] * 5]), past_key_values=cache)
    # Refused before anything ran: the cache is as new.
    ids = text(12, rows=2)
    torch.testing.assert_close(engine.read(ids, cache=cache), engine.read(ids), rtol=0, atol=1e-9)


def test_positions_that_count_slots_are_refused(engine):
    cache, ids = engine.cache(), text(20)
    engine.read(ids, cache=cache)
    with engine.installed(), torch.no_grad():
        with pytest.raises(ValueError, match=r"row 0 was given position 14 .* true position is 20"):
            engine.model(text(1), position_ids=torch.tensor([[cache.held[0]]]), past_key_values=cache)
        engine.model(text(1), position_ids=torch.tensor([[20]]), past_key_values=cache)
    assert cache.seen == [21]


@pytest.mark.parametrize("name", ["output_attentions", "output_hidden_states"])
def test_outputs_that_do_not_exist_are_refused(engine, name):
    with engine.installed(), torch.no_grad(), pytest.raises(ValueError, match=f"does not support {name}"):
        engine.model(text(5), **{name: True})


def test_attention_dropout_in_training_is_refused(engine):
    model = slow.fresh("llama", attention_dropout=0.1)
    with beacon.installed(model, engine.config, engine.weights), torch.no_grad():
        model(text(5))
        model.train()
        with pytest.raises(ValueError, match=r"no attention dropout here.*0\.1"):
            model(text(5))
