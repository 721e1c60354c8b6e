"""What the memory can do beyond the reference: lossless short texts, recent tokens, forks, skipped tokens."""

import importlib.util
from pathlib import Path

import pytest
import torch

import beacon

spec = importlib.util.spec_from_file_location("naive_beacon", Path(__file__).with_name("naive_beacon.py"))
slow = importlib.util.module_from_spec(spec)
spec.loader.exec_module(slow)

EXACT = {"rtol": 0, "atol": 1e-9}
#: raw keys that stay are rotated once more, in fp32
MOVED = {"rtol": 0, "atol": 2e-5}
SCHEMES = {
    "interleave": {},
    "carry": {"ratio": (3,), "sink_size": 1},
    "append": {"pos": "append", "ratio": (4, 2)},
    "expansion": {"pos": "append", "attn": "step-expansion"},
}


def text(length, rows=1):
    return torch.randint(1, 97, (rows, length))


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("pieces", [7, 1, [3, 4]], ids=str)
def test_lossless_a_short_text_is_the_stock_model(scheme, pieces):
    engine = slow.Engine(slow.stock("qwen2"), slow.settings(**SCHEMES[scheme]), lossless_short=True)
    ids = text(7, rows=2)
    torch.testing.assert_close(engine.read(ids, pieces=pieces), engine.model(ids).logits, **EXACT)


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("pieces", [21, [1] * 9 + [12], [3, 2, 9, 7], [7, 1, 13]], ids=str)
def test_lossless_after_the_first_window_all_is_as_without(scheme, pieces):
    config, ids = slow.settings(**SCHEMES[scheme]), text(21)
    engine = slow.Engine(slow.stock("llama"), config, lossless_short=True)
    cache, plain = engine.cache(), slow.Engine(engine.model, config)
    got, expected = engine.read(ids, pieces=pieces, cache=cache), plain.read(ids)
    torch.testing.assert_close(got[:, 8:], expected[:, 8:], **EXACT)
    torch.testing.assert_close(got[0], cat_calls(engine.naive(lossless=True), ids, pieces), **EXACT)
    assert not cache.unmarked


def cat_calls(naive, ids, pieces):
    return torch.cat([naive.read(part) for part in ids[0].split(pieces)])


@pytest.mark.parametrize("recent", [1, 3, 8])
@pytest.mark.parametrize("changes", [*SCHEMES.values(), {"ratio": (2, 0, 4)}, {"sink_size": 3}], ids=str)
def test_recent_tokens_stay_until_the_next_window_is_complete(changes, recent):
    engine = slow.Engine(slow.stock("qwen3"), slow.settings(**changes), keep_recent=recent)
    ids, naive, cache = text(29), engine.naive(keep_recent=recent), engine.cache()
    torch.testing.assert_close(engine.read(ids, pieces=[18, 1, 10], cache=cache)[0], naive.read(ids[0]), **MOVED)
    assert cache.held == [len(naive.slots)]
    assert naive.slots.count("t") == recent
    torch.testing.assert_close(cache.layers[1].keys[0, :, : cache.held[0]], naive.memory(1)[0], **MOVED)


@pytest.mark.parametrize("length", [8, 11])
def test_a_window_may_leave_more_slots_than_it_had(length):
    # A beacon among the first three slots is sink and memory: 3 + 8 + 6 of 16 slots stay.
    engine = slow.Engine(slow.stock("llama"), slow.settings(ratio=(1,), sink_size=3), keep_recent=8)
    ids, naive, cache = text(length), engine.naive(keep_recent=8), engine.cache()
    pieces = [8] + [1] * (length - 8)
    torch.testing.assert_close(engine.read(ids, pieces=pieces, cache=cache)[0], naive.read(ids[0]), **MOVED)
    assert cache.held == [len(naive.slots)] == [17 + 2 * (length - 8)]


@pytest.mark.parametrize("recent", [0, 3])
def test_recent_tokens_are_all_that_is_left_of_a_window_without_beacons(recent):
    engine = slow.Engine(slow.stock("llama"), slow.settings(ratio=(9,)), keep_recent=recent)
    ids = text(11)
    changed = ids.clone()
    changed[0, 5] = (ids[0, 5] + 1) % 97
    difference = engine.read(changed)[:, 8:10] - engine.read(ids)[:, 8:10]
    assert bool(difference.abs().max() > 1e-3) == bool(recent)


def test_a_fork_and_its_origin_do_not_touch_each_other():
    engine = slow.Engine(slow.stock("llama"), slow.settings(ratio=(2, 4)), lossless_short=True, keep_recent=2)
    for begun in (3, 13):
        ids, cache = text(begun), engine.cache()
        engine.read(ids, cache=cache)
        ways = [text(12) for _ in range(3)]
        caches = [cache.fork(), cache, cache.fork()]
        got = [[] for _ in ways]
        for step in range(0, 12, 4):  # in turns
            for way, own, logits in zip(ways, caches, got, strict=True):
                logits.append(engine.read(way[:, step : step + 4], cache=own))
        for way, own, logits in zip(ways, caches, got, strict=True):
            expected = engine.read(torch.cat((ids, way), dim=1), pieces=[begun, 4, 4, 4])[:, begun:]
            torch.testing.assert_close(torch.cat(logits, dim=1), expected, **MOVED)
            assert own.seen == [begun + 12]


def test_an_empty_fork_is_a_new_cache():
    engine, ids = slow.Engine(slow.stock("llama"), slow.settings()), text(20, rows=2)
    cache = engine.cache(skip_first=3)
    other = cache.fork()
    torch.testing.assert_close(engine.read(ids, cache=other), engine.read(ids, cache=cache), **EXACT)


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("before", [5, 8, 21])
def test_what_follows_a_forgotten_text_is_a_text_of_its_own(scheme, before):
    engine = slow.Engine(slow.stock("llama"), slow.settings(**SCHEMES[scheme]), lossless_short=True)
    cache, ids = engine.cache(), text(21, rows=2)
    engine.read(text(before, rows=2), cache=cache)
    cache.forget()
    assert (cache.seen, cache.held, cache.columns) == ([before] * 2, [0, 0], before)
    torch.testing.assert_close(engine.read(ids, pieces=[5, 16], cache=cache), engine.read(ids, pieces=[5, 16]), **EXACT)
    assert len(cache.true_positions(0)[0, 0]) == cache.held[0]


def test_a_reset_cache_is_a_new_one():
    engine = slow.Engine(slow.stock("llama"), slow.settings(ratio=(2, 4, 8), ratio_mix="step-random"))
    cache, ids = engine.cache(), text(40, rows=3)
    expected = engine.read(ids)
    engine.read(text(21, rows=2), cache=cache)
    cache.reset()
    assert (cache.seen, cache.held, cache.get_seq_length(), cache.peak) == ([], [], 0, 0)
    torch.testing.assert_close(engine.read(ids, cache=cache), expected, **EXACT)


def test_drawn_ratios_depend_on_the_seed_alone():
    engine = slow.Engine(slow.stock("llama"), slow.settings(ratio=(2, 4, 8), ratio_mix="step-random"))
    ids = text(48, rows=2)
    torch.testing.assert_close(engine.read(ids), engine.read(ids, pieces=11), **EXACT)
    held = []
    for seed in range(5):
        cache = engine.cache(seed=seed)
        engine.read(ids, cache=cache)
        assert cache.held[0] == cache.held[1]
        held.append(cache.held[0])
    assert len(set(held)) > 1


@pytest.mark.parametrize("pieces", [33, [2, 19] + [1] * 12], ids=["whole", "pieces"])
@pytest.mark.parametrize("skip", [(3, None), (3, 19), (0, 16), (5, 5), (8, 24)], ids=str)
@pytest.mark.parametrize("scheme", ["interleave", "append"])
def test_skipped_tokens_are_kept_whole(scheme, skip, pieces):
    engine = slow.Engine(slow.stock("qwen2"), slow.settings(**SCHEMES[scheme]))
    cache, naive, ids = engine.cache(skip_first=skip[0], skip_last=skip[1]), engine.naive(skip=skip), text(33)
    torch.testing.assert_close(engine.read(ids, pieces=pieces, cache=cache)[0], naive.read(ids[0]), **EXACT)
    assert cache.held == [len(naive.slots)]
    if skip[1] is not None:  # the end stays, however much is decoded
        assert cache.held[0] >= skip[0] + (33 - skip[1])


def test_what_is_skipped_is_the_stock_model():
    engine, ids = slow.Engine(slow.stock("llama"), slow.settings()), text(30)
    cache = engine.cache(skip_first=6, skip_last=6)
    torch.testing.assert_close(engine.read(ids, pieces=[4, 20, 6], cache=cache), engine.model(ids).logits, **EXACT)


def test_skipping_and_a_lossless_first_window_go_together():
    # Skipped tokens come before the first window: they are not it.
    engine = slow.Engine(slow.stock("llama"), slow.settings(), lossless_short=True)
    ids, naive, cache = text(40), engine.naive(skip=(3, None), lossless=True), engine.cache(skip_first=3)
    got = engine.read(ids, pieces=[2, 8, 30], cache=cache)
    torch.testing.assert_close(got[:, :10], engine.model(ids[:, :10]).logits, **EXACT)
    torch.testing.assert_close(got[0], cat_calls(naive, ids, [2, 8, 30]), **EXACT)


def test_skipping_and_recent_tokens_go_together():
    engine, ids = slow.Engine(slow.stock("llama"), slow.settings(), keep_recent=3), text(45)
    naive, cache = engine.naive(skip=(3, 19), keep_recent=3), engine.cache(skip_first=3, skip_last=19)
    torch.testing.assert_close(engine.read(ids, cache=cache)[0], naive.read(ids[0]), **MOVED)


@pytest.mark.parametrize(
    ("changes", "extras", "words"),
    [
        ({}, {"skip_first": -1}, "skip_first"),
        ({}, {"skip_first": 8, "skip_last": 4}, "skip_last"),
        ({}, {"skip_first": 3, "skip_last": 18}, "whole windows of 8"),
        ({"sink_size": 1}, {"skip_first": 3}, "beacon_sink_size 0"),
    ],
)
def test_skips_that_do_not_fit_are_refused(changes, extras, words):
    with pytest.raises(ValueError, match=words):
        beacon.BeaconCache(slow.stock("llama"), slow.settings(**changes), **extras)


def test_more_recent_tokens_than_a_window_has_are_refused():
    with pytest.raises(ValueError, match="keep_recent must not exceed beacon_window"):
        beacon.BeaconCache(slow.stock("llama"), slow.settings(), beacon.MemoryOptions(keep_recent=9))
