"""Position-skipping training: positions of short samples over a long range."""

import itertools
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from longllm.positions import Spread


@settings(max_examples=200, deadline=None)
@given(tokens=st.integers(1, 60), spare=st.integers(0, 200), pieces=st.integers(2, 6), seed=st.integers(0, 10**6))
def test_positions_rise_by_one_but_for_the_gaps_and_stay_in_range(
    tokens: int, spare: int, pieces: int, seed: int
) -> None:
    spread = Spread(length=tokens + spare, pieces=pieces)
    found = spread.positions(tokens, random.Random(seed))
    assert len(found) == tokens
    assert found[0] >= 0
    assert found[-1] < spread.length
    steps = [after - before for before, after in itertools.pairwise(found)]
    assert all(step >= 1 for step in steps)
    assert sum(step > 1 for step in steps) <= pieces - 1
    assert found == spread.positions(tokens, random.Random(seed)), "the same draws give the same positions"


def test_without_room_or_length_positions_are_natural() -> None:
    for spread, tokens in ((Spread(), 9), (Spread(length=9), 9), (Spread(length=9), 12), (Spread(length=9), 1)):
        assert spread.positions(tokens, random.Random(0)) == list(range(tokens))


def test_the_whole_range_is_met() -> None:
    draws = random.Random(0)
    found = [Spread(length=1000, pieces=2).positions(10, draws) for _ in range(2000)]
    reach = [positions[-1] - positions[0] for positions in found]
    assert min(positions[0] for positions in found) < 10
    assert max(positions[-1] for positions in found) > 990
    for low in range(0, 900, 100):
        assert any(low <= distance < low + 100 for distance in reach), "every distance between near and far occurs"


def test_a_share_of_the_samples_stays_natural() -> None:
    draws = random.Random(0)
    spread = Spread(length=1000, share=0.75)
    natural = sum(spread.positions(10, draws) == list(range(10)) for _ in range(2000))
    assert 400 < natural < 600


@pytest.mark.parametrize(
    ("given_", "message"),
    [
        ({"length": -1}, r"length must be 0 \(off\) or a number of positions"),
        ({"pieces": 1}, "pieces must be at least 2"),
        ({"share": 1.5}, "share must lie between 0 and 1"),
    ],
)
def test_settings_that_mean_nothing_are_refused(given_: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Spread(**given_)
