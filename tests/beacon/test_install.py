"""What ``compressing`` changes, it puts back; inside, other caches work as before."""

import copy

import pytest
import torch
from transformers import BertConfig, BertModel, DynamicCache, T5Config, T5ForConditionalGeneration

import beacon
from flashcore.hf import GrowingCache, register

KINDS = ["llama", "gemma3_text"]


def hooks(model):
    """Return every hook of every module by name."""
    return {
        (name, kind): list(getattr(module, kind).values())
        for name, module in model.named_modules()
        for kind in vars(module)
        if kind.endswith("_hooks") and getattr(module, kind)
    }


def whole(model):
    """Return everything about a model that could have been changed, as comparable values."""
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    configs = {
        name: copy.deepcopy(vars(part.config)) for name, part in model.named_modules() if hasattr(part, "config")
    }
    attributes = {name: sorted(vars(part)) for name, part in model.named_modules()}
    return weights, configs, attributes, hooks(model), model.training


def check_same(before, after):
    assert before[0].keys() == after[0].keys()
    assert all(torch.equal(before[0][name], after[0][name]) for name in before[0])
    assert before[1:] == after[1:]


@pytest.mark.parametrize("attention", ["eager", "sdpa", "flashcore"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_model_is_as_before_when_the_block_ends(kind, attention, build, compressed):
    register()
    model, ids = build(kind), torch.randint(1, 200, (2, 30))
    model.set_attn_implementation(attention)
    before, output = whole(model), model(ids).logits
    with beacon.compressing(model) as inside:
        assert inside is model
        assert model.config._attn_implementation not in ("eager", "sdpa", "flashcore")
        model.generate(ids, past_key_values=compressed(model, "snapkv", slots=12), max_new_tokens=4)
    check_same(before, whole(model))
    assert model.config._attn_implementation == attention
    assert torch.equal(model(ids).logits, output)


@pytest.mark.parametrize("kind", KINDS)
def test_an_error_inside_the_block_puts_the_model_back_too(kind, build, compressed):
    model, ids = build(kind), torch.randint(1, 200, (1, 30))
    before = whole(model)
    with pytest.raises(ZeroDivisionError), beacon.compressing(model):
        assert 1 / (model(ids, past_key_values=compressed(model, slots=12)).logits.shape[0] - 1)
    check_same(before, whole(model))
    with pytest.raises(ValueError, match="true position"), beacon.compressing(model):
        model(ids, past_key_values=compressed(model, slots=12), position_ids=torch.arange(1, 31)[None])
    check_same(before, whole(model))


def test_blocks_may_be_nested(build, compressed):
    model, ids = build("llama"), torch.randint(1, 200, (1, 30))
    before, cache, other = whole(model), compressed(model, slots=12), compressed(model, slots=12)
    with torch.no_grad(), beacon.compressing(model):
        outer = whole(model)
        with beacon.compressing(model):
            model(ids[:, :20], past_key_values=cache)
        check_same(outer, whole(model))
        inner = model(ids[:, 20:], past_key_values=cache).logits
        model(ids[:, :20], past_key_values=other)
        assert torch.equal(model(ids[:, 20:], past_key_values=other).logits, inner)
        with pytest.raises(ZeroDivisionError), beacon.compressing(model):
            raise ZeroDivisionError
        assert cache.seen == [30]
    check_same(before, whole(model))


@pytest.mark.parametrize("make", [None, DynamicCache, GrowingCache])
@pytest.mark.parametrize("kind", KINDS)
def test_other_caches_and_none_work_inside_as_before(kind, make, tiny, compressed, padded):
    model, batch = tiny(kind), padded(20, 13)
    plain = model.generate(**batch, max_new_tokens=10)
    options = {} if make is None else {"past_key_values": make(config=model.config)}
    with torch.no_grad(), beacon.compressing(model):
        # A compressed pass before must leave nothing behind.
        model(batch["input_ids"][:1], past_key_values=compressed(model, slots=8))
        assert torch.equal(model.generate(**batch, max_new_tokens=10, **options), plain)
        inside = model(**batch, use_cache=False).logits
    real = batch["attention_mask"].bool()
    outside = model(**batch, use_cache=False).logits
    torch.testing.assert_close(inside[real], outside[real], atol=1e-4, rtol=1e-3)


def test_caches_of_two_texts_can_take_turns(tiny, compressed):
    model, texts = tiny("gemma3_text"), torch.randint(1, 200, (2, 1, 30))
    together = [compressed(model, "snapkv", slots=12, positions="compact") for _ in texts]
    alone = [compressed(model, "snapkv", slots=12, positions="compact") for _ in texts]
    with torch.no_grad(), beacon.compressing(model):
        for begin in range(0, 30, 10):
            pairs = zip(texts[:, :, begin : begin + 10], together, strict=True)
            turns = [model(part, past_key_values=cache).logits for part, cache in pairs]
        for text, cache, got in zip(texts, alone, turns, strict=True):
            for part in text.split(10, dim=1):
                wanted = model(part, past_key_values=cache).logits
            assert torch.equal(got, wanted)


def test_two_models_can_be_open_at_once(tiny, compressed):
    models, ids = [tiny("llama"), tiny("gemma3_text")], torch.randint(1, 200, (1, 20))
    caches = [compressed(model, slots=12) for model in models]
    with torch.no_grad(), beacon.compressing(models[0]), beacon.compressing(models[1]):
        for part in ids.split(5, dim=1):
            for model, cache in zip(models, caches, strict=True):
                model(part, past_key_values=cache)
    assert [cache.seen for cache in caches] == [[20], [20]]
    assert [model.config._attn_implementation for model in models] == ["eager", "eager"]


def test_the_decoder_may_be_called_itself_and_given_embeddings(tiny, compressed):
    model, ids = tiny("llama"), torch.randint(1, 200, (1, 20))
    with torch.no_grad(), beacon.compressing(model):
        states = []
        for inputs in ((ids,), (), ()):
            cache = compressed(model, slots=12)
            named = {} if inputs else {"inputs_embeds": model.model.embed_tokens(ids)}
            states.append(model.model(*inputs, past_key_values=cache, **named).last_hidden_state)
            assert cache.seen == [20]
            assert cache.schedule.slots[0][0] < 20
    assert torch.equal(states[0], states[1])


def test_what_is_no_decoder_is_refused():
    small = {"vocab_size": 10, "num_layers": 1, "num_hidden_layers": 1, "num_attention_heads": 2, "num_heads": 2}
    bert = BertModel(BertConfig(**small, hidden_size=8, intermediate_size=8))
    t5 = T5ForConditionalGeneration(T5Config(**small, d_model=8, d_kv=4, d_ff=8))
    for thing in (torch.nn.Linear(2, 2), bert, t5, None):
        with (
            pytest.raises(ValueError, match=f"{type(thing).__name__} is not a decoder"),
            beacon.compressing(thing),
        ):
            pytest.fail("was let in")


@pytest.mark.parametrize("kind", ["llama", "qwen2", "gemma3_text"])
@pytest.mark.parametrize("positions", ["original", "compact"])
def test_the_contract_holds_for_tiny_models(kind, positions, tiny, compressed):
    model = tiny(kind)

    def make(**limits):
        return compressed(model, "snapkv", positions=positions, **limits)

    names = beacon.verify(model, torch.randint(1, 200, (100,)).tolist(), make)
    assert len(set(names)) == len(names) >= 4
    assert "bytes fell on every sample" in names
    with pytest.raises(ValueError, match="at least 48 tokens of text, got 47"):
        beacon.verify(model, list(range(47)), make)
