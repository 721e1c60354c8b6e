"""Gradients flow through every window, and are those of the slow writing."""

import importlib.util
from pathlib import Path

import pytest
import torch

spec = importlib.util.spec_from_file_location("naive_beacon", Path(__file__).with_name("naive_beacon.py"))
slow = importlib.util.module_from_spec(spec)
spec.loader.exec_module(slow)

SCHEMES = {
    "interleave": {"ratio": (3,), "sink_size": 1},
    "in-turn": {"ratio": (2, 0, 4)},
    "append": {"pos": "append", "ratio": (4,)},
    "expansion": {"pos": "append", "attn": "step-expansion", "param": ("q", "k", "v", "o")},
}


def text(length, rows=1):
    return torch.randint(1, 97, (rows, length))


def trainable(scheme, kind="qwen2", **options):
    """Return an engine whose beacon tensors want gradients, on both sides, and the pairs of them."""
    engine = slow.Engine(slow.fresh(kind), slow.settings(**{**SCHEMES, "plain": {}}[scheme]), **options)
    engine.weights.requires_grad_(True)
    for tensor in engine.tensors.values():
        tensor.requires_grad_(True)
    pairs = dict(zip(engine.weights.released(), engine.weights.parameters(), strict=True))
    return engine, [(name, pairs[name], engine.tensors[name]) for name in engine.tensors]


def loss_of(logits):
    weight = torch.randn(logits.shape, generator=torch.Generator().manual_seed(5), dtype=logits.dtype)
    return (logits * weight).sum()


def check_gradients(pairs, loss, expected):
    mine = torch.autograd.grad(loss, [own for _, own, _ in pairs], allow_unused=True)
    theirs = torch.autograd.grad(expected, [other for _, _, other in pairs], allow_unused=True)
    unused = set()
    for (name, *_), got, wanted in zip(pairs, mine, theirs, strict=True):
        if wanted is None or not wanted.any():
            unused.add(name)
            assert got is None or not got.any()
        else:
            torch.testing.assert_close(got, wanted, rtol=1e-6, atol=1e-6 * float(wanted.abs().max()), msg=name)
    return unused


@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_gradients_are_those_of_the_slow_writing(scheme, train):
    engine, pairs = trainable(scheme)
    ids = text(29)
    engine.model.train(train)
    with engine.installed():
        logits = engine.model(ids).logits[0]
    expected = engine.naive(training=train).read(ids[0])
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-9)
    unused = check_gradients(pairs, loss_of(logits), loss_of(expected))
    # Nothing reads what a beacon is after the last layer's attention.
    last = {f"model.layers.1.self_attn.beacon_{name}_proj.{suffix}" for name in "qo" for suffix in ("weight", "bias")}
    assert unused == last & {name for name, *_ in pairs}


@pytest.mark.parametrize("length", [8, 24])
def test_in_training_the_window_that_ends_the_text_has_no_beacons(length):
    engine, _ = trainable("plain")
    engine.model.train()
    ids, cache = text(length), engine.cache()
    with engine.installed():
        logits = engine.model(ids, past_key_values=cache).logits[0]
    naive = engine.naive(training=True)
    torch.testing.assert_close(logits, naive.read(ids[0]), rtol=0, atol=1e-9)
    assert cache.held == [len(naive.slots)] == [4 * (length // 8 - 1) + 8]


def test_rows_of_equal_length_train_together():
    engine, pairs = trainable("interleave")
    ids = text(29, rows=2)
    engine.model.train()
    with engine.installed():
        logits = engine.model(ids).logits
    expected = torch.stack([engine.naive(training=True).read(row) for row in ids])
    check_gradients(pairs, loss_of(logits), loss_of(expected))


def test_a_text_in_pieces_has_the_same_gradients():
    engine, pairs = trainable("interleave")
    ids, cache, parts = text(29), engine.cache(), []
    with engine.installed():
        for part in ids.split([5, 1, 14, 9], dim=1):
            parts.append(engine.model(part, past_key_values=cache).logits[0])
    check_gradients(pairs, loss_of(torch.cat(parts)), loss_of(engine.naive().read(ids[0])))


@pytest.mark.parametrize(
    ("scheme", "options"),
    [
        ("interleave", {"keep_recent": 3}),
        ("in-turn", {"keep_recent": 8}),
        # The recent tokens of the first window stay where they are, behind its two beacons.
        ("append", {"keep_recent": 6}),
        ("interleave", {"lossless_short": True}),
    ],
    ids=str,
)
def test_gradients_with_our_own_options(scheme, options):
    engine, pairs = trainable(scheme, **options)
    naive = engine.naive(keep_recent=options.get("keep_recent", 0), lossless="lossless_short" in options)
    ids = text(29)
    with engine.installed():
        logits = engine.model(ids).logits[0]
    expected = naive.read(ids[0])
    torch.testing.assert_close(logits, expected, rtol=0, atol=2e-5)
    mine, theirs = (torch.autograd.grad(loss_of(x), y) for x, y in ((logits, pairs[0][1]), (expected, pairs[0][2])))
    torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("beacons", [True, False])
def test_base_parameters_can_be_trained_with_or_without_the_beacons(beacons):
    engine, _ = trainable("interleave")
    engine.weights.requires_grad_(beacons)
    engine.model.requires_grad_(True)
    ids, wanted = text(29), list(engine.model.parameters())
    with engine.installed():
        loss = loss_of(engine.model(ids).logits[0])
    mine = torch.autograd.grad(loss, wanted, allow_unused=True)
    theirs = torch.autograd.grad(loss_of(engine.naive().read(ids[0])), wanted, allow_unused=True)
    for got, expected in zip(mine, theirs, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-6 * float(expected.abs().max()))


def test_gradients_reach_embeddings_that_are_given():
    engine, _ = trainable("plain")
    engine.weights.requires_grad_(False)
    ids = text(21)
    given = engine.model.get_input_embeddings()(ids).requires_grad_(True)
    with engine.installed():
        loss = engine.model(inputs_embeds=given).logits[0, -1].sum()
    (gradient,) = torch.autograd.grad(loss, given)
    assert gradient[0, 0].abs().max() > 0
    step = torch.zeros_like(given)
    step[0, 2, 5] = 1e-3
    with engine.installed(), torch.no_grad():
        up, down = (engine.model(inputs_embeds=given + sign * step).logits[0, -1].sum() for sign in (1, -1))
    # The norms of stock models compute in fp32.
    torch.testing.assert_close((up - down) / 2e-3, gradient[0, 2, 5], rtol=1e-2, atol=1e-3)


def test_frozen_base_parameters_stay_without_gradients():
    engine, _ = trainable("plain")
    engine.model.train()
    with engine.installed():
        engine.model(text(20), labels=text(20)).loss.backward()
    assert all(weight.grad is None for weight in engine.model.parameters())
    assert engine.weights.embed_tokens.grad.abs().max() > 0


def test_a_step_down_the_gradient_lowers_the_loss():
    engine, _ = trainable("plain")
    engine.model.train()
    ids, losses = text(40), []
    optimiser = torch.optim.SGD(engine.weights.parameters(), lr=1e-3)
    with engine.installed():
        for _ in range(3):
            loss = engine.model(ids, labels=ids).loss
            losses.append(loss.item())
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
    assert losses[0] > losses[1] > losses[2]


def test_rows_of_unequal_length_with_gradients_are_refused():
    engine, _ = trainable("plain")
    ids, mask = text(20, rows=2), torch.ones(2, 20, dtype=torch.long)
    mask[0, :5] = 0
    with engine.installed():
        with pytest.raises(ValueError, match="with gradients, rows must be of equal length"):
            engine.model(ids, attention_mask=mask)
        with torch.no_grad():
            engine.model(ids, attention_mask=mask)


def test_a_cache_begun_without_gradients_cannot_go_on_with_them():
    engine, _ = trainable("plain")
    cache, ids = engine.cache(), text(20)
    engine.read(ids, cache=cache)
    with engine.installed(), pytest.raises(ValueError, match="gradients need a cache that was begun with gradients"):
        engine.model(ids, past_key_values=cache)
    # Refused before anything ran.
    torch.testing.assert_close(
        engine.read(ids, cache=cache), engine.read(torch.cat((ids, ids), dim=1))[:, 20:], rtol=0, atol=1e-9
    )


@pytest.mark.parametrize("train", [True, False])
def test_a_full_window_that_training_left_open_is_not_continued(train):
    engine, _ = trainable("plain")
    engine.model.train()
    cache, ids = engine.cache(), text(16)
    with engine.installed(), torch.no_grad():
        engine.model(ids[:, :8], past_key_values=cache)
        engine.model.train(train)
        with pytest.raises(ValueError, match="training"):
            engine.model(ids[:, 8:], past_key_values=cache)


def test_a_text_begun_with_gradients_goes_on_without():
    engine, _ = trainable("interleave")
    ids, cache = text(40), engine.cache()
    with engine.installed():
        engine.model(ids[:, :21], past_key_values=cache)
    got = engine.read(ids[:, 21:], cache=cache, pieces=[1, 1, 17])
    torch.testing.assert_close(got, engine.read(ids)[:, 21:], rtol=0, atol=1e-9)


@pytest.mark.parametrize("options", [{}, {"keep_recent": 3}, {"lossless_short": True}], ids=str)
@pytest.mark.parametrize("scheme", SCHEMES)
def test_recomputing_windows_changes_neither_result_nor_gradients(scheme, options):
    ids, results = text(29), []
    for recompute in (False, True):
        engine, pairs = trainable(scheme, **options)
        cache, parts = engine.cache(), []
        with engine.installed(recompute=recompute):
            for part in ids.split([13, 16], dim=1):
                parts.append(engine.model(part, past_key_values=cache).logits[0])
        logits = torch.cat(parts)
        gradients = torch.autograd.grad(loss_of(logits), [own for _, own, _ in pairs], allow_unused=True)
        results.append((logits, gradients, [layer.keys for layer in cache.layers], cache.held))
    (logits, gradients, keys, held), (again, recomputed, same, kept) = results
    torch.testing.assert_close(again, logits, rtol=0, atol=0)
    assert held == kept
    torch.testing.assert_close(same, keys, rtol=0, atol=0)
    for one, other in zip(gradients, recomputed, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-12)


def test_recomputed_windows_hold_less_for_the_backward_pass():
    def saved(recompute):
        engine, _ = trainable("interleave")
        sizes = {}

        def pack(tensor):
            sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with engine.installed(recompute=recompute), torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            states = engine.model.get_decoder()(input_ids=text(80)).last_hidden_state
        assert states.requires_grad
        return sum(sizes.values())

    assert saved(True) < saved(False) / 4


def test_recomputing_is_refused_where_held_keys_turn_with_the_length():
    engine = slow.Engine(
        slow.fresh("llama", rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}), slow.settings()
    )
    engine.weights.requires_grad_(True)
    with engine.installed(recompute=True), pytest.raises(ValueError, match="set recompute to off"):
        engine.model(text(29))
