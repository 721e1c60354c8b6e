"""Which ratio a window gets: draws, turns and fits recomputed, and the rules of training."""

from fractions import Fraction
from itertools import accumulate, islice, pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LlamaConfig, MistralConfig, Qwen2Config

from beacon.config import BeaconConfig, MemoryOptions
from beacon.plan import RowPlan
from beacon.ratios import SEED, Ratios, positions_known

RATIOS = (2, 4, 8, 16, 32)
#: the first draws of the reference, as they were recorded
RECORDED = [2, 16, 16, 8, 8, 32, 2, 16, 4, 2, 8, 32]


def ratios(given=RATIOS, mix="step-random", window=64, trained=1e6, **options):
    """Return the ratios of one text."""
    config = BeaconConfig(window=window, stride=window, ratio=given, ratio_mix=mix)
    return Ratios(config, trained_length=trained, **options)


def windows(chooser, count, length=None):
    """Return the ratios of ``count`` windows; ``length`` = tokens of a training text."""
    width = chooser.config.window
    return [chooser.choose((index + 1) * width, index * width, length) for index in range(count)]


def draws(among, seed=SEED):
    """Yield uniform draws of the generator the reference uses."""
    rng = np.random.default_rng(seed)
    while True:
        yield among[rng.integers(len(among))]


def test_every_window_draws_anew():
    assert windows(ratios(), 12) == RECORDED == list(islice(draws(RATIOS), 12))
    assert windows(ratios(seed=7), 40) == list(islice(draws(RATIOS, seed=7), 40))
    # A text gives the same whenever it is read: nothing is shared between choosers.
    assert windows(ratios(), 12) == RECORDED


def test_draws_are_among_the_ratios_that_divide_the_window():
    among = (2, 3, 6, 0)
    assert windows(ratios((2, 5, 3, 12, 6, 4, 0), window=6), 60) == list(islice(draws(among), 60))


def test_draws_go_on_over_texts_as_with_one_generator():
    chooser = ratios()
    first = windows(chooser, 5)
    chooser.restart()
    assert first + windows(chooser, 7) == RECORDED


def test_one_draw_serves_a_whole_text():
    chooser, texts = ratios(mix="instance-random"), []
    for _ in range(12):
        chosen = windows(chooser, 4)
        assert len(set(chosen)) == 1
        texts.append(chosen[0])
        chooser.restart()
    assert texts == RECORDED


def test_a_sequence_is_gone_through_in_the_order_given():
    # 5 does not divide the window of 64, 128 is longer than it.
    chooser = ratios((8, 5, 2, 0, 128, 2), mix="sequence")
    assert windows(chooser, 9) == [8, 2, 0, 2, 8, 2, 0, 2, 8]
    chooser.restart()
    assert windows(chooser, 2) == [8, 2]


@pytest.mark.parametrize("mix", ["step-random", "instance-random", "sequence", "adapt-1"])
@pytest.mark.parametrize("only", [0, 2, 3, 99])
def test_a_single_ratio_is_taken_whatever_else_holds(only, mix):
    # 3 does not divide the window, 99 is longer, no text is short enough for adapt-1 and 0 ends a training text.
    assert windows(ratios((only,), mix, trained=1), 4, length=4 * 64) == [only] * 4
    assert windows(ratios((only,), mix, trained=1), 4) == [only] * 4


#: Qwen2: 32768 positions, windows of 2048, 1024 tokens to come; ratio -> the longest prompt that gets it
LIMITS = {0: 31_744, 2: 62_464, 4: 123_904, 8: 246_784, 16: 492_544}


@pytest.mark.parametrize("first", [0, 2])
def test_qwen2_adapts_at_the_lengths_published(first):
    among = [ratio for ratio in (0, *RATIOS) if ratio >= first]
    for fits, too_long in pairwise(among):
        for length, wanted in ((LIMITS[fits], fits), (LIMITS[fits] + 1, too_long)):
            assert ratios(among, "adapt-1024", 2048, 32768).choose(length, 0) == wanted
    assert ratios(among, "adapt-1024", 2048, 32768).choose(10**9, 0) == 32


def longest(ratio, window, positions):
    """Return the longest text that fits: one open window beside the beacons of all that came before it."""
    return max(
        length
        for length in range(window, positions * max(ratio, 1) + 1)
        if window + Fraction(length - window, ratio or 1) <= positions
    )


@settings(deadline=None)
@given(st.data())
def test_adapting_takes_the_least_ratio_whose_slots_fit(data):
    window = data.draw(st.sampled_from([4, 6, 12]))
    positions = data.draw(st.integers(window + 1, 5 * window))
    among = data.draw(st.permutations([0, 2, 3, 4, 6]).map(lambda order: order[: len(order) - 1]))
    chooser = ratios(among, f"adapt-{data.draw(st.integers(0, 9))}", window, positions)
    received = data.draw(st.integers(1, 7 * positions))
    fitting = [
        ratio
        for ratio in sorted(chooser.config.valid_ratios)
        if received + chooser.config.adapt <= longest(ratio, window, positions)
    ]
    wanted = (fitting or [max(chooser.config.valid_ratios)])[0]
    assert chooser.choose(received, 0) == wanted
    # It stays, however long the text becomes, until another one begins.
    assert chooser.choose(10**9, window) == wanted
    chooser.restart()
    assert chooser.choose(10**9, 0) == max(chooser.config.valid_ratios)


def test_an_adapted_ratio_may_be_one_among_other_words():
    assert ratios((2, 4), "my-adapt-10-tokens", 4, 10).choose(6, 0) == 2
    assert ratios((2, 4), "my-adapt-11-tokens", 4, 10).choose(6, 0) == 4


@pytest.mark.parametrize(
    ("changes", "options", "expected", "calls", "ratio"),
    [
        ({}, {}, 0, [16], 2),
        ({}, {}, 0, [17], 4),
        # The first window chooses when it gets its first beacons, by the tokens that are known then.
        ({}, {}, 0, [3, 14], 2),
        ({}, {}, 17, [3, 14], 4),
        ({}, {}, 16, [3, 13], 2),
        ({}, {}, 9, [17], 4),
        ({"pos": "append"}, {}, 0, [3, 14], 4),
        ({"pos": "append"}, {}, 0, [3, 13], 2),
        ({}, {"lossless_short": True}, 0, [3, 14], 4),
        ({}, {"lossless_short": True}, 0, [3, 13], 2),
    ],
)
def test_adapting_goes_by_the_tokens_received_or_expected(changes, options, expected, calls, ratio):
    # Of 10 positions ratio 2 makes room for (10 - 4) * 2 + 4 = 16 tokens.
    config = BeaconConfig(window=4, stride=4, ratio=(2, 4), ratio_mix="adapt-0", **changes)
    row = RowPlan(config, MemoryOptions(**options), Ratios(config, trained_length=10), expected)
    for end in accumulate(calls):
        while row.seen < end:
            row.commit(row.plan(end - row.seen))
    assert row.memory == (row.seen // 4) * (4 // ratio)


def test_training_keeps_one_window_whole_at_most_and_none_that_is_followed_by_less_than_one():
    kept = []
    for seed in range(60):
        length = 5 * 64 + 10
        chosen = windows(ratios((0, 2, 4), seed=seed), 5, length)
        kept += [index for index, ratio in enumerate(chosen) if ratio == 0]
        assert chosen.count(0) <= 1
    assert set(kept) == {0, 1, 2, 3}
    # Two whole windows are enough; one token less is not.
    assert 0 in {ratios((0, 2), seed=seed).choose(64, 0, length=128) for seed in range(20)}
    assert {ratios((0, 2), seed=seed).choose(64, 0, length=127) for seed in range(20)} == {2}


def test_a_training_text_is_as_long_as_its_call():
    config, kept = BeaconConfig(window=4, stride=4, ratio=(0, 2)), set()
    for seed in range(30):
        row = RowPlan(config, ratios=Ratios(config, 1e6, seed))
        while row.seen < 15:
            step = row.plan(15 - row.seen, training=True)
            kept |= {row.windows} if step.ratio == 0 else set()
            row.commit(step)
    # Of the windows that begin at 0, 4, 8 and 12 two are followed by a whole one.
    assert kept == {0, 1}


def test_training_draws_among_what_is_left():
    chooser, rng = ratios((0, 2, 4)), np.random.default_rng(SEED)
    kept = False
    for ratio in windows(chooser, 30, length=10_000):
        among = (2, 4) if kept else (0, 2, 4)
        assert ratio == among[rng.integers(len(among))]
        kept |= ratio == 0
    assert kept
    chooser.restart()
    assert 0 in windows(chooser, 30, length=10_000)


def test_a_sequence_is_filtered_once_when_training_begins():
    assert windows(ratios((0, 2), mix="sequence"), 5, length=5 * 64) == [0, 2, 0, 2, 0]
    assert windows(ratios((0, 2), mix="sequence"), 3, length=2 * 64 - 1) == [2, 2, 2]


@pytest.mark.parametrize("mix", ["step-random", "instance-random", "sequence", "adapt-8"])
def test_training_does_not_adapt_or_draw_0_where_it_may_not(mix):
    assert ratios((0, 2), mix).choose(10, 0, length=100) == 2
    with pytest.raises(ValueError, match=r"beacon_ratio \[0, 63\] allows no ratio for the window at token 192"):
        ratios((0, 63), mix).choose(10, 192, length=200)


@settings(deadline=None)
@given(st.sampled_from(["step-random", "instance-random", "sequence", "adapt-8"]), st.integers(0, 6), st.booleans())
def test_a_copy_goes_its_own_way(mix, before, training):
    length = 2000 if training else None
    original, untouched = ratios((0, 2, 4, 8), mix), ratios((0, 2, 4, 8), mix)
    windows(original, before, length)
    windows(untouched, before, length)
    copied = original.copy()
    got = windows(copied, 8, length)
    copied.restart()
    assert got == windows(original, 8, length) == windows(untouched, 8, length)


def test_the_books_count_windows():
    chooser = ratios((0, 2), mix="sequence")
    windows(chooser, 3)
    assert (chooser.taken, chooser.kept_one) == (3, True)
    chooser.restart()
    assert (chooser.taken, chooser.kept_one, chooser.fixed, chooser.turn) == (0, False, None, ())


ROPE = {"rope_theta": 10000.0}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}


@pytest.mark.parametrize(
    ("kind", "length", "scaling", "wanted"),
    [
        (LlamaConfig, 8192, None, 8192),
        (MistralConfig, 32768, {"rope_type": "default"}, 32768),
        (LlamaConfig, 4096, {"rope_type": "linear", "factor": 2.5}, 10240),
        (LlamaConfig, 4096, {"rope_type": "dynamic", "factor": 4.0}, 16384),
        (Qwen2Config, 32768, {"rope_type": "yarn", "factor": 4.0}, 131072),
        (Qwen2Config, 32768, {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}, 131072),
        (Qwen2Config, 131072, {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}, 131072),
        (LlamaConfig, 131072, {**LLAMA3, "original_max_position_embeddings": 8192}, 131072),
    ],
)
def test_positions_are_those_trained_on_times_the_stretch(kind, length, scaling, wanted):
    # Both spellings of a config.json.
    for name in ("rope_parameters", "rope_scaling"):
        given = {} if scaling is None else {name: scaling | ROPE}
        assert positions_known(kind(max_position_embeddings=length, **given)) == wanted


def test_positions_of_a_config_that_keeps_the_old_spelling():
    class Old:
        max_position_embeddings, rope_scaling = 4096, {"type": "linear", "factor": 2.0}

    assert positions_known(Old()) == 8192
    Old.rope_scaling = None
    assert positions_known(Old()) == 4096
