"""A model is after ``installed`` what it was before, whatever happened inside."""

import copy
import importlib.util
import threading
from pathlib import Path
from typing import Any

import pytest
import torch

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


def test_calls_of_two_threads_on_one_model_do_not_mix(engine):
    ids, whole, steps = text(20), [], {name: threading.Event() for name in ("begun", "other", "done")}

    def wait(model, args, kwargs):
        # After the call has said how many logits it wants: the first one waits until the second has done so too.
        steps["other" if kwargs.get("logits_to_keep") else "begun"].set()
        steps["done" if kwargs.get("logits_to_keep") else "other"].wait(10)

    def read_all():
        with torch.no_grad():
            whole.append(engine.model(ids).logits)
        steps["done"].set()

    expected, first = engine.read(ids), threading.Thread(target=read_all)
    with engine.installed(), torch.no_grad():
        hook = engine.model.register_forward_pre_hook(wait, with_kwargs=True)
        first.start()
        steps["begun"].wait(10)
        last = engine.model(ids, logits_to_keep=1).logits
        first.join()
        hook.remove()
    torch.testing.assert_close(last, expected[:, -1:], rtol=0, atol=1e-9)
    torch.testing.assert_close(whole[0], expected, rtol=0, atol=1e-9)


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
        base = model.get_parameter(name.replace("beacon_", ""))
        engine.tensors[name] = base if "proj" in name else base[1:2]
    with beacon.installed(model, config), torch.no_grad():
        got = model(ids).logits[0]
    torch.testing.assert_close(got, engine.naive().read(ids[0]), rtol=0, atol=1e-9)
    with pytest.raises(ValueError, match="names no eos token"), beacon.installed(model, slow.settings()):
        pass
