"""The window loop gives what the slow writing of Activation Beacon gives, however a text is handed over."""

import importlib.util
from pathlib import Path

import pytest
import torch

import beacon
import beacon.windows

spec = importlib.util.spec_from_file_location("naive_beacon", Path(__file__).with_name("naive_beacon.py"))
slow = importlib.util.module_from_spec(spec)
spec.loader.exec_module(slow)

KINDS = ["llama", "mistral", "qwen2", "qwen3"]
SCHEMES = {
    "interleave": {},
    "append": {"pos": "append"},
    "expansion": {"pos": "append", "attn": "step-expansion"},
    "expansion-alone": {"pos": "append", "attn": "step-expansion", "attend_prev": False},
}
#: dividing the window of 8, not dividing it (the remainder is carried on), above it, none, each token, in turn
RATIOS = [(2,), (3,), (11,), (0,), (1,), (2, 0, 4)]
PARAMS = [(), ("k", "v"), ("q", "k", "v"), ("q", "k", "v", "o")]
EXACT = {"rtol": 0, "atol": 1e-9}


def text(length, rows=1):
    return torch.randint(1, 97, (rows, length))


def check_against_naive(engine, length=29):
    """Compare logits of all tokens, and keys and values of all layers."""
    ids, naive, cache = text(length), engine.naive(), engine.cache()
    torch.testing.assert_close(engine.read(ids, cache=cache)[0], naive.read(ids[0]), **EXACT)
    assert (cache.seen, cache.held) == ([length], [len(naive.slots)])
    for index, layer in enumerate(cache.layers):
        for held, expected in zip((layer.keys, layer.values), naive.memory(index), strict=True):
            torch.testing.assert_close(held[0, :, : len(naive.slots)], expected, **EXACT)


@pytest.mark.parametrize("ratio", RATIOS, ids=str)
@pytest.mark.parametrize("scheme", SCHEMES)
def test_logits_and_memory_are_those_of_the_slow_writing(scheme, ratio):
    case = 6 * list(SCHEMES).index(scheme) + RATIOS.index(ratio)
    model = slow.stock(KINDS[case % 4])
    config = slow.settings(**SCHEMES[scheme], ratio=ratio, sink_size=(0, 1, 3)[case % 3])
    check_against_naive(slow.Engine(model, config))


@pytest.mark.parametrize("param", PARAMS, ids="".join)
@pytest.mark.parametrize("kind", KINDS)
def test_beacons_have_the_projections_they_name_and_share_the_others(kind, param):
    bias = {"attention_bias": True} if kind in ("llama", "qwen3") else {}
    scheme = list(SCHEMES.values())[PARAMS.index(param)]
    engine = slow.Engine(slow.stock(kind, **bias), slow.settings(**scheme, ratio=(4,), sink_size=1, param=param))
    assert any(name.endswith("bias") for name in engine.tensors) == (kind != "mistral" and bool(param))
    check_against_naive(engine, 21)


def test_the_slow_writing_keeps_the_slots_that_the_paper_describes():
    # Otherwise two wrong computations could agree on nothing.
    def slots(length, **changes):
        naive = slow.Engine(slow.stock("llama"), slow.settings(window=4, stride=4, **changes)).naive()
        naive.read(text(length)[0])
        return "".join(naive.slots)

    assert slots(10) == "mmmm" + "rrb"
    assert slots(11, ratio=(3,)) == "mm" + "rbrr"
    assert slots(10, pos="append", sink_size=1) == "s" + "mmmm" + "rr"
    assert slots(9, ratio=(0,), sink_size=2) == "ss" + "mmmmmm" + "r"


def test_low_rank_projections_are_added_to_the_base_model_s():
    model, config = slow.stock("qwen2"), slow.settings(param=("q", "v"))
    engine, thin = slow.Engine(model, config), beacon.BeaconWeights(model, config, rank=2).requires_grad_(False)
    for index, (own, layer) in enumerate(zip(thin.layers, model.model.layers, strict=True)):
        for name, added in own.items():
            added.B.normal_()
            base, place = getattr(layer.self_attn, f"{name}_proj"), f"model.layers.{index}.self_attn.beacon_{name}_proj"
            engine.tensors[f"{place}.weight"] = base.weight + added.B @ added.A
            engine.tensors[f"{place}.bias"] = base.bias
    thin.embed_tokens.copy_(engine.tensors["model.beacon_embed_tokens.weight"])
    engine.weights = thin
    check_against_naive(engine)


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("pieces", [1, 3, 8, [5, 3, 8, 1, 12]], ids=str)
def test_a_prompt_in_pieces_gives_what_it_gives_at_once(scheme, pieces):
    engine = slow.Engine(slow.stock("llama"), slow.settings(**SCHEMES[scheme], ratio=(3,), sink_size=1))
    ids, whole, split = text(29), engine.cache(), engine.cache()
    expected = engine.read(ids, cache=whole)
    torch.testing.assert_close(engine.read(ids, pieces=pieces, cache=split), expected, **EXACT)
    assert whole.held == split.held
    for one, other in zip(whole.layers, split.layers, strict=True):
        used = whole.held[0]
        torch.testing.assert_close(one.keys[:, :, :used], other.keys[:, :, :used], **EXACT)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("scheme", ["interleave", "append"])
def test_ratio_0_is_the_stock_model(kind, scheme):
    model, ids = slow.stock(kind), text(37, rows=2)
    engine = slow.Engine(model, slow.settings(**SCHEMES[scheme], ratio=(0,), sink_size=2))
    expected = model(ids).logits
    torch.testing.assert_close(engine.read(ids), expected, **EXACT)
    torch.testing.assert_close(engine.read(ids, pieces=[10, 1, 1, 25]), expected, **EXACT)


@pytest.mark.parametrize("scheme", ["append", "expansion"])
def test_append_below_a_window_is_the_stock_model_and_interleave_is_not(scheme):
    model, ids = slow.stock("qwen3"), text(7)
    expected = model(ids).logits
    torch.testing.assert_close(slow.Engine(model, slow.settings(**SCHEMES[scheme])).read(ids), expected, **EXACT)
    # The reference's behaviour, which `lossless_short` is there to change.
    assert (slow.Engine(model, slow.settings()).read(ids) - expected).abs().max() > 0.01


@pytest.mark.parametrize("scheme", SCHEMES)
def test_rows_of_equal_length_are_each_as_alone(scheme):
    engine = slow.Engine(slow.stock("mistral"), slow.settings(**SCHEMES[scheme], ratio=(4, 0, 2)))
    ids = text(27, rows=3)
    together = engine.read(ids, pieces=[20, 1, 6])
    for row in range(3):
        torch.testing.assert_close(together[row], engine.naive().read(ids[row]), **EXACT)


def test_embeddings_can_be_given_in_place_of_ids():
    engine, ids = slow.Engine(slow.stock("llama"), slow.settings()), text(21, rows=2)
    with engine.installed(), torch.no_grad():
        given = engine.model(inputs_embeds=engine.model.get_input_embeddings()(ids)).logits
    assert torch.equal(given, engine.read(ids))
    with engine.installed(), pytest.raises(ValueError, match="either input_ids or inputs_embeds"):
        engine.model.model(ids, inputs_embeds=given)


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("keep", [1, 3, 11, torch.tensor([2, 20])], ids=str)
def test_last_logits_are_the_last_of_all_logits(scheme, keep):
    engine = slow.Engine(slow.stock("llama"), slow.settings(**SCHEMES[scheme], param=("q", "k", "v", "o")))
    for length in (24, 21):
        ids = text(length, rows=2)
        with engine.installed(), torch.no_grad():
            some = engine.model(ids, logits_to_keep=keep).logits
            every = engine.model(ids).logits
        expected = every[:, -keep:] if isinstance(keep, int) else every[:, keep]
        torch.testing.assert_close(some, expected, **EXACT)


def test_the_decoder_gives_all_states_after_a_call_that_wanted_few_logits():
    engine, ids = slow.Engine(slow.stock("llama"), slow.settings()), text(13)
    with engine.installed(), torch.no_grad():
        expected = engine.model(ids, logits_to_keep=0).logits
        engine.model(ids, logits_to_keep=1)
        states = engine.model.model(ids).last_hidden_state
    torch.testing.assert_close(engine.model.lm_head(states), expected, **EXACT)


def test_the_buffers_hold_what_the_longest_window_needs():
    engine = slow.Engine(slow.stock("llama"), slow.settings())
    for length, most in ((5, 7), (8, 12), (20, 4 + 12), (45, 16 + 12), (42, 16 + 12), (48, 20 + 12)):
        cache = engine.cache()
        engine.read(text(length), cache=cache)
        assert cache.first.copy().most_slots(length) == most
        assert [layer.keys.shape[2] for layer in cache.layers] == [most, most]
        assert [layer.values.shape[2] for layer in cache.layers] == [most, most]


def test_decoding_takes_new_room_only_when_there_is_none_left():
    engine, rooms = slow.Engine(slow.stock("llama"), slow.settings(ratio=(4,))), []
    cache = engine.cache()
    engine.read(text(200), cache=cache)
    for _ in range(140):
        before, need = cache.layers[0].keys.data_ptr(), cache.held[0] + 2
        room = cache.layers[0].keys.shape[2]
        engine.read(text(1), cache=cache)
        assert cache.layers[0].keys.data_ptr() == before or need > room
        rooms.append(cache.layers[0].keys.shape[2])
    assert len(set(rooms)) == 2
    assert cache.held[0] == 84 + 5
    assert rooms[-1] <= 84 + 10 + 128


def test_a_cache_begun_in_inference_mode_goes_on_outside_of_it():
    engine, ids = slow.Engine(slow.stock("llama"), slow.settings(ratio=(3,))), text(40)
    cache = engine.cache()
    with torch.inference_mode():
        engine.read(ids[:, :18], pieces=[10] + [1] * 8, cache=cache)
    other = cache.fork()
    expected = engine.read(ids)[:, 18:]
    torch.testing.assert_close(engine.read(ids[:, 18:], cache=cache, pieces=[1, 2, 19]), expected, **EXACT)
    with torch.inference_mode():
        torch.testing.assert_close(engine.read(ids[:, 18:], cache=other), expected, **EXACT)


def test_everything_is_held_in_the_model_s_dtype():
    config, ids = slow.settings(ratio=(3,), param=("q", "k", "v", "o")), text(29)
    exact, engine = (slow.Engine(slow.stock("qwen3", kind), config) for kind in (torch.float64, torch.bfloat16))
    cache = engine.cache()
    logits = engine.read(ids, cache=cache)
    assert {logits.dtype, *(tensor.dtype for layer in cache.layers for tensor in layer.buffers)} == {torch.bfloat16}
    error = (logits.double() - exact.read(ids)).square().mean().sqrt() / exact.read(ids).std()
    assert error < 0.15


@pytest.fixture
def calls(monkeypatch):
    """Every call of attention: the number of its queries, and its spec."""
    calls, attention = [], beacon.windows.attention

    def noted(query, key, value, spec):
        calls.append((query.shape[2], spec))
        return attention(query, key, value, spec)

    monkeypatch.setattr(beacon.windows, "attention", noted)
    return calls


@pytest.mark.parametrize("scheme", SCHEMES)
def test_no_mask_is_made_for_full_coverage(scheme, calls):
    engine = slow.Engine(slow.stock("llama"), slow.settings(**SCHEMES[scheme]))
    ids, mask = text(29, rows=3), torch.ones(3, 29, dtype=torch.long)
    mask[1, :5], mask[2, :10] = 0, 0
    engine.read(ids, mask=mask, pieces=[20] + [1] * 9)
    assert len(calls) > 20
    assert all(spec.causal for _, spec in calls)
    masked = sum(spec.mask is not None for _, spec in calls)
    # With step-expansion, only passes that place beacons need one.
    assert masked == 0 if "expansion" not in scheme else 0 < masked < len(calls) / 2


def test_the_last_layer_attends_for_the_tokens_that_are_wanted(calls):
    engine = slow.Engine(slow.stock("llama"), slow.settings())
    for keep, last in ((1, [1]), (3, [7])):
        calls.clear()
        with engine.installed(), torch.no_grad():
            engine.model(text(29), logits_to_keep=keep)
        # Three windows of 8 + 4 and one of 5 + 2; the last layer has nothing to do for the first three.
        assert [queries for queries, _ in calls] == [12, 12, 12, 7, *last]
