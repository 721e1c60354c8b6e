"""Ratios steered by a question: the solver against trying everything, and memories that follow it."""

import importlib.util
import itertools
import math
import random
from pathlib import Path

import pytest
import torch

import beacon
from longllm.spans import bm25_scores

spec = importlib.util.spec_from_file_location("naive_beacon", Path(__file__).with_name("naive_beacon.py"))
slow = importlib.util.module_from_spec(spec)
spec.loader.exec_module(slow)


def worth(weights, ratios, window):
    kept = [window // ratio if ratio else window for ratio in ratios]
    return sum(weight * math.log(size) for weight, size in zip(weights, kept, strict=True)), sum(kept)


@pytest.mark.parametrize("seed", range(12))
def test_no_other_choice_of_ratios_is_worth_more(seed):
    draws = random.Random(seed)
    ratios = draws.sample([0, 2, 3, 4, 8, 16], draws.randint(1, 4))
    windows = draws.randint(1, 5)
    weights = [draws.random() for _ in range(windows)]
    least = windows * min(48 // ratio if ratio else 48 for ratio in ratios)
    slots = least + draws.randint(0, 60)
    chosen = beacon.steer(weights, ratios, 48, slots)
    value, taken = worth(weights, chosen, 48)
    assert taken <= slots
    assert set(chosen) <= set(ratios)
    everything = (worth(weights, other, 48) for other in itertools.product(ratios, repeat=windows))
    assert value == pytest.approx(max(value for value, taken in everything if taken <= slots))


def test_equal_weights_share_equally_and_nothing_is_left_unused():
    assert beacon.steer([1.0] * 6, (2, 4, 8), 64, 6 * 16) == (4,) * 6
    assert beacon.steer([0.0, 5.0, 0.0], (2, 4, 8), 64, 8 + 32 + 8) == (8, 2, 8)


def test_weights_do_not_depend_on_the_scale_of_the_scores():
    scores = [[0.1, 0.5, 0.2], [3.0, 1.0, 2.0]]
    scaled = [[10 * score + 7 for score in scores[0]], scores[1]]
    assert beacon.window_weights(scores) == pytest.approx(beacon.window_weights(scaled))
    first, second, third = beacon.window_weights(scores)
    assert first == pytest.approx(second, rel=0.3)
    assert third < min(first, second)
    assert beacon.window_weights([[1.0, 1.0]]) == [0.5, 0.5]
    assert beacon.window_weights([[0.0, 9.0]], sharpness=0) == [0.5, 0.5]


class Letters:
    """A tokeniser of letters."""

    def decode(self, ids):
        return "".join(map(chr, ids))


def test_a_text_s_windows_are_scored_by_its_words():
    text = "the sea is wide " * 4 + "the captain is called ahab  " * 2 + "the sky is blue " * 8
    ids, config = [ord(letter) for letter in text], beacon.BeaconConfig(window=64, stride=64, ratio=(2, 8))
    slots = 3 * 8 + 24
    asked = ["who is the captain?"]
    chosen = beacon.steered_ratios(Letters(), ids, asked, bm25_scores, config, slots)
    assert len(chosen) == len(ids) // 64 == 3
    assert chosen == (8, 2, 8)
    assert beacon.steered_ratios(Letters(), ids[:60], asked, bm25_scores, config, slots) == ()


@pytest.mark.parametrize("pos", ["interleave", "append"])
def test_a_memory_follows_the_ratios_it_is_given_and_then_its_config(pos):
    engine = slow.Engine(slow.fresh("llama"), slow.settings(ratio=(8,), pos=pos))
    alike = slow.Engine(slow.fresh("llama"), slow.settings(ratio=(2, 4, 0, 8, 8, 8), ratio_mix="sequence", pos=pos))
    ids = torch.randint(1, 97, (1, 43))
    with torch.no_grad():
        with engine.installed():
            cache = engine.cache(ratios=(2, 4, 0))
            mine = torch.cat([engine.model(part, past_key_values=cache).logits for part in ids.split(11, 1)], 1)
        with alike.installed():
            other = alike.cache()
            theirs = torch.cat([alike.model(part, past_key_values=other).logits for part in ids.split(11, 1)], 1)
    assert cache.held == other.held
    torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-9)


def test_given_ratios_survive_being_saved_in_the_middle(tmp_path):
    engine = slow.Engine(slow.fresh("llama"), slow.settings(ratio=(8,)))
    ids = torch.randint(1, 97, (1, 40))
    cache, again = (engine.cache(ratios=(2, 4, 2, 4)) for _ in range(2))
    with engine.installed(), torch.no_grad():
        engine.model(ids[:, :12], past_key_values=cache)
        again.unpack(*cache.pack())
        expected = engine.model(ids[:, 12:], past_key_values=cache).logits
        found = engine.model(ids[:, 12:], past_key_values=again).logits
    assert torch.equal(found, expected)
    assert cache.held == again.held


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: beacon.steer([], (2,), 8, 9), "at least one window"),
        (lambda: beacon.steer([-1.0], (2,), 8, 9), "be 0 or more"),
        (lambda: beacon.steer([1.0] * 3, (2, 4), 64, 40), "at the largest ratio, 4: they take 48"),
        (
            lambda: beacon.steered_ratios(Letters(), [65] * 64, [], bm25_scores, slow.settings(), 9),
            "at least one question",
        ),
        (
            lambda: beacon.steered_ratios(Letters(), [65] * 64, ["q"], lambda q, p: [1.0], slow.settings(), 99),
            "gave 1 scores for 8 windows",
        ),
        (lambda: slow.Engine(slow.fresh("llama"), slow.settings()).cache(ratios=(99,)), "between 0 and the window"),
    ],
)
def test_what_cannot_be_steered_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()
