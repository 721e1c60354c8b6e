"""A model is after ``installed`` what it was before, whatever happened inside; what does not fit is refused by name."""

import copy
import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import DynamicCache

import beacon

spec = importlib.util.spec_from_file_location("naive_beacon", Path(__file__).with_name("naive_beacon.py"))
slow = importlib.util.module_from_spec(spec)
spec.loader.exec_module(slow)


def text(length, rows=1):
    return torch.randint(1, 97, (rows, length))


def portrait(value: Any) -> Any:
    """Write down all there is to see of a model: modules, attributes, hooks, configs, tensors bit by bit."""
    if isinstance(value, torch.Tensor):
        return id(value), value.requires_grad, value.detach().numpy().tobytes()
    if isinstance(value, torch.nn.Module):
        return id(value), type(value), type(value).forward, portrait(vars(value))
    if isinstance(value, dict):
        return {key: portrait(item) for key, item in value.items()}
    if hasattr(value, "to_dict"):
        return id(value), portrait(value.to_dict())
    return value if isinstance(value, (str, int, float, bool, type(None))) else repr(value)


@pytest.fixture(params=["llama", "mistral", "qwen2", "qwen3"])
def kind(request):
    return request.param


@pytest.fixture
def engine():
    return slow.Engine(slow.stock("llama"), slow.settings())


def test_the_model_is_bit_identical_afterwards(kind):
    engine, ids = slow.Engine(slow.fresh(kind), slow.settings(), lossless_short=True), text(30, rows=2)
    model, begun = engine.model, torch.random.get_rng_state()
    logits, before = model(ids).logits, portrait(model)
    torch.random.set_rng_state(begun)
    with engine.installed() as inside, torch.no_grad():
        assert inside is model
        assert portrait(model) != before
        assert not torch.equal(model(ids, logits_to_keep=5).logits, logits[:, -5:])
        model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=9, do_sample=False)
    assert portrait(model) == before
    assert torch.equal(model(ids).logits, logits)


def test_the_portrait_sees_what_could_be_left_behind():
    model = slow.fresh("llama")
    changes = [
        lambda: setattr(model.model, "forward", model.model.forward),
        lambda: model.register_forward_pre_hook(lambda *_: None),
        lambda: setattr(model.config, "use_cache", False),
        lambda: model.model.layers[1].self_attn.q_proj.weight.add_(1e-9),
        lambda: setattr(model.model.layers[0], "extra", 1),
        lambda: model.model.rotary_emb.inv_freq.mul_(1.5),
        lambda: model.model.layers[0].train(),
    ]
    for change in changes:
        before = portrait(model)
        change()
        assert portrait(model) != before


def test_a_forward_that_was_put_on_the_decoder_before_is_put_back():
    engine = slow.Engine(slow.fresh("llama"), slow.settings(ratio=(0,)))
    calls, stock = [], engine.model.model.forward

    def wrapped(*args, **kwargs):
        calls.append(1)
        return stock(*args, **kwargs)

    engine.model.model.forward = wrapped
    engine.read(text(9))
    assert not calls
    engine.model(text(9))
    assert calls
    assert engine.model.model.forward is wrapped


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("begun", [0, 20])
def test_after_an_error_in_a_layer_the_model_is_whole_and_the_cache_is_not(error, begun):
    engine, ids = slow.Engine(slow.fresh("llama"), slow.settings()), text(20)
    cache, before, calls = engine.cache(), portrait(engine.model), []
    if begun:
        engine.read(text(begun), cache=cache)

    def fail(*_):
        calls.append(1)
        if len(calls) == 2:  # in the second window
            raise error("stop")

    hook = engine.model.model.layers[1].mlp.register_forward_hook(fail)
    with pytest.raises(error, match="stop"):
        engine.read(ids, cache=cache)
    hook.remove()
    assert portrait(engine.model) == before
    assert cache.columns == -1
    for other in (cache, cache.fork()):
        with pytest.raises(ValueError, match="an earlier forward pass on this cache failed"):
            engine.read(ids, cache=other)
        with pytest.raises(ValueError, match="an earlier forward pass on this cache failed"), engine.installed():
            engine.model.generate(ids, past_key_values=other, max_new_tokens=2)
    # The model itself goes on, and so does the cache once it has been emptied.
    cache.reset()
    torch.testing.assert_close(engine.read(ids, cache=cache), engine.read(ids), rtol=0, atol=1e-9)


def test_an_error_in_the_block_leaves_the_model_as_it_was():
    engine = slow.Engine(slow.fresh("llama"), slow.settings())
    before = portrait(engine.model)
    with pytest.raises(KeyError, match="mine"), engine.installed():
        raise KeyError("mine")
    assert portrait(engine.model) == before


def test_a_second_installation_is_refused_and_the_first_goes_on(engine):
    before, ids = portrait(engine.model), text(20)
    expected = engine.read(ids)
    with engine.installed(), torch.no_grad():
        with pytest.raises(ValueError, match="beacons are installed on this model already"), engine.installed():
            pass
        assert torch.equal(engine.model(ids).logits, expected)
    assert portrait(engine.model) == before
    with engine.installed():  # one after the other is fine
        pass


@pytest.mark.parametrize("kind", ["gemma3_text", "gemma2"])
def test_another_architecture_is_refused(kind, tiny):
    model = tiny(kind)
    for use in (lambda: beacon.BeaconCache(model, slow.settings()), lambda: beacon.BeaconWeights(model, slow.settings())):
        with pytest.raises(ValueError, match=f"runs on llama, mistral, qwen2, qwen3, not on {kind}"):
            use()
    with pytest.raises(ValueError, match=f"not on {kind}"), beacon.installed(model, slow.settings()):
        pass


@pytest.mark.parametrize(
    "changes", [{"sliding_window": 6}, {"kind": "qwen2", "use_sliding_window": True, "sliding_window": 6, "max_window_layers": 1}]
)
def test_sliding_window_attention_is_refused_or_followed(changes):
    # Ignoring it would silently be another model.
    model, ids = slow.fresh(**{"kind": "mistral", **changes}), text(20)
    try:
        got = slow.Engine(model, slow.settings(ratio=(0,))).read(ids)
    except (ValueError, NotImplementedError) as refused:
        assert "sliding" in str(refused)
    else:
        torch.testing.assert_close(got, model(ids).logits, rtol=0, atol=1e-9)


def test_a_sliding_window_that_no_text_reaches_is_no_hindrance():
    # Stock Mistral configs say 4096 by default.
    model = slow.fresh("mistral", sliding_window=512)
    torch.testing.assert_close(slow.Engine(model, slow.settings(ratio=(0,))).read(text(20)).isnan().sum(), torch.tensor(0))


def weights_of(config=None, **changes):
    model = slow.stock("llama", **changes)
    return beacon.BeaconWeights(model, config or slow.settings())


@pytest.mark.parametrize(
    ("weights", "words"),
    [
        (lambda: weights_of(slow.settings(param=("q", "k"))), r"projections \('q', 'k'\), the config asks for"),
        (lambda: weights_of(num_hidden_layers=3), "layers"),
        (lambda: weights_of(num_hidden_layers=1), "layers"),
        (lambda: weights_of(hidden_size=48), "hidden|shape|size"),
        (lambda: weights_of(num_key_value_heads=4), "hidden|shape|size"),
        (lambda: weights_of(attention_bias=True), "bias|shape"),
    ],
    ids=["projections", "more-layers", "fewer-layers", "hidden", "key-heads", "bias"],
)
def test_weights_of_another_model_or_config_are_refused(engine, weights, words):
    before = portrait(engine.model)
    with pytest.raises(ValueError, match=words), beacon.installed(engine.model, engine.config, weights()):
        pass
    assert portrait(engine.model) == before


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


def test_options_of_cache_and_installation_agree_or_are_refused(engine):
    other = slow.Engine(engine.model, engine.config, lossless_short=True)
    ids, mask = text(20, rows=2), torch.ones(2, 20, dtype=torch.long)
    mask[1, :3] = 0
    expected = other.read(ids, mask=mask, pieces=[6] + [1] * 14)
    try:
        got = engine.read(ids, mask=mask, pieces=[6] + [1] * 14, cache=other.cache())
    except ValueError as refused:
        assert "option" in str(refused).lower()
    else:
        torch.testing.assert_close(got[mask.bool()], expected[mask.bool()], rtol=0, atol=1e-9)


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
    with torch.no_grad(), beacon.compressing(engine.model), pytest.raises(ValueError, match=r"only inside beacon.inst"):
        engine.model(text(5), past_key_values=engine.cache())


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
        with pytest.raises(ValueError, match="row 0 was given position 14 .* true position is 20"):
            engine.model(text(1), position_ids=torch.tensor([[cache.held[0]]]), past_key_values=cache)
        engine.model(text(1), position_ids=torch.tensor([[20]]), past_key_values=cache)
    assert cache.seen == [21]


@pytest.mark.parametrize("name", ["output_attentions", "output_hidden_states"])
def test_outputs_that_do_not_exist_are_refused(engine, name):
    with engine.installed(), torch.no_grad(), pytest.raises(ValueError, match=f"does not support {name}"):
        engine.model(text(5), **{name: True})


def test_attention_dropout_in_training_is_refused(engine):
    model = slow.fresh("llama", attention_dropout=0.1).train()
    with pytest.raises(ValueError, match=r"attention dropout is not supported, the model has 0.1"):
        with beacon.installed(model, engine.config, engine.weights):
            pass
    with beacon.installed(model.eval(), engine.config, engine.weights), torch.no_grad():
        model(text(5))


def test_a_copied_model_can_be_used_beside_the_first(engine):
    twin, ids = copy.deepcopy(engine.model), text(20)
    expected = engine.read(ids)
    with engine.installed(), torch.no_grad():
        stock = twin(ids).logits
        with beacon.installed(twin, engine.config, engine.weights):
            assert torch.equal(twin(ids).logits, expected)
        assert torch.equal(twin(ids).logits, stock)
        assert torch.equal(engine.model(ids).logits, expected)


def test_a_model_without_beacon_weights_gets_untrained_ones():
    # Extra BOS tokens with the base model's projections.
    model, ids = slow.fresh("qwen2"), text(29)
    config = slow.settings(embed_init="bos")
    engine = slow.Engine(model, config)
    for name in engine.tensors:
        own = name.replace("beacon_", "") if "proj" in name else "model.embed_tokens.weight"
        engine.tensors[name] = model.get_parameter(own)[1:2] if "proj" not in name else model.get_parameter(own)
    with beacon.installed(model, config), torch.no_grad():
        got = model(ids).logits[0]
    torch.testing.assert_close(got, engine.naive().read(ids[0]), rtol=0, atol=1e-9)
    with pytest.raises(ValueError, match="names no eos token"), beacon.installed(model, slow.settings()):
        pass
