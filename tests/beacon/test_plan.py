"""The window plan of Activation Beacon against a second writing of it that goes token by token."""

import json
from itertools import cycle

import numpy as np
import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from beacon.config import BeaconConfig, MemoryOptions
from beacon.plan import RowPlan

#: tokens of each call
CALLS = st.lists(st.sampled_from([1, 1, 1, 2, 3, 5, 8, 13, 30]), min_size=1, max_size=12)


class Naive:
    """One row by the definitions: the number i is raw token i, -1 - j is beacon j (from 0)."""

    def __init__(self, config, options, skip_first=0, skip_last=None):
        self.config, self.options, self.skip_first, self.skip_last = config, options, skip_first, skip_last
        self.sink, self.memory, self.tail, self.window = [], [], [], []
        #: tokens seen, first token of the open window, beacons made, raw tokens since the last one
        self.seen = self.begin = self.beacons = self.carried = 0
        #: beacon -> the token it stands for
        self.last_token = {}
        self.ratio = self.turns = None
        self.kept_one, self.rng = False, np.random.default_rng(42)

    @property
    def held(self):
        return self.sink + self.memory + self.tail + self.window

    def read(self, count, training=False):
        """Read tokens; return for each pass labels, positions and flags of its slots, and all that is held after it."""
        end, passes = self.seen + count, []
        while self.seen < end:
            border = self.begin + (self.skip_first if self.seen < self.skip_first else self.config.window)
            stop = min(end, border)
            last = training and stop == end
            passes.append(self.forward(stop, stop == border and not last, last, end if training else None))
        return passes

    def forward(self, stop, complete, last, length):
        """Read up to token ``stop``; ``last`` = the window in which a training text ends."""
        interleave = self.config.pos == "interleave"
        plain = self.options.lossless_short and self.begin == self.skip_first
        if self.seen < self.skip_first or (self.skip_last is not None and self.seen >= self.skip_last):
            self.ratio = 0
        elif self.ratio is None and not last and (complete or (interleave and not plain)):
            self.ratio = self.next_ratio(length)
        if plain and complete and interleave and self.ratio:
            self.window, self.seen = [], self.begin  # what was read without beacons is read again
        old, places = len(self.window), []
        for token in range(self.seen, stop):
            places.append(self.add(token))
            self.carried += bool(self.ratio)
            if interleave and self.ratio and self.carried == self.ratio:
                places.append(self.add_beacon())
        if not interleave and complete and self.ratio:
            places += [self.add_beacon(count) for count in range(1, self.config.window // self.ratio + 1)]
        new, self.seen = self.window[old:], stop
        flags = [int(label < 0) - (complete and self.ratio == 0) for label in new]
        if complete:
            self.settle()
        return new, places, flags, self.held

    def add(self, label):
        self.window.append(label)
        return len(self.held) - 1

    def add_beacon(self, count=0):
        """Add a beacon and return its position; ``count`` = its number in a window that ends with its beacons."""
        self.beacons, self.carried = self.beacons + 1, 0
        last = self.begin + count * self.ratio - 1 if count else self.window[-1]
        place = self.add(-self.beacons)
        self.last_token[-self.beacons] = last
        if self.config.attn != "step-expansion":
            return place
        return self.held.index(last) + (count if self.config.attend_prev else 1)

    def settle(self):
        """Let go of the completed window."""
        size, beacons = self.config.sink_size, [label for label in self.window if label < 0]
        size = size if self.begin == 0 else 0
        if self.seen == self.skip_first:
            size = self.skip_first
        self.sink += self.window[:size]
        raw = [label for label in self.window if label >= 0]
        recent = raw[max(0, len(raw) - self.options.keep_recent) :]
        self.tail = [label for label in recent if label not in self.sink] if self.ratio else []
        self.memory += beacons if self.ratio else self.window[size:]
        self.window, self.begin, self.ratio = [], self.seen, None

    def next_ratio(self, length):
        """Return a window's ratio; ``length`` = tokens of a training text."""
        given, window = self.config.ratio, self.config.window
        if len(given) == 1:
            return given[0]
        whole_one = length is None or (not self.kept_one and self.begin + 2 * window <= length)
        valid = [ratio for ratio in given if (window % ratio == 0 if ratio else whole_one)]
        if self.config.ratio_mix == "sequence":
            self.turns = self.turns or cycle(valid)
            return next(self.turns)
        ratio = valid[self.rng.integers(len(valid))]
        self.kept_one = self.kept_one or ratio == 0
        return ratio


class Replay:
    """A list of labels on which the plan's steps are carried out, as a cache would."""

    def __init__(self, row):
        self.row, self.held, self.beacons = row, [], 0

    def read(self, count, training=False):
        """Read tokens; return what ``Naive.read`` does."""
        passes, end = [], self.row.seen + count
        while self.row.seen < end:
            step = self.row.plan(end - self.row.seen, training)
            passes.append((self.carry_out(step), step.positions, step.flags, list(self.held)))
        return passes

    def carry_out(self, step):
        """Write the new slots, enter the step and keep what survives; return the new labels."""
        row, memory = self.row, self.row.sink + self.row.memory
        assert (row.held, row.window, row.held - step.again) == (len(self.held), step.window, step.start)
        assert (memory, row.open_beacons) == (step.border, step.open_beacons)
        del self.held[step.start :]
        first = row.seen - step.again
        new = dict(zip(step.raw_slots, range(first, first + step.raw), strict=True))
        new |= {slot: -1 - self.beacons - count for count, slot in enumerate(step.beacon_slots)}
        self.beacons += step.beacons
        self.held += [new[slot] for slot in range(step.slots)]
        row.commit(step)
        kept, window = step.survivors, self.held[step.window :]
        if kept:
            beacons = [window[kept.first + number * kept.period] for number in range(kept.beacons)]
            self.held = self.held[:memory] + window[: kept.sink]
            assert kept.at == len(self.held)
            self.held += beacons + [window[place] for place in kept.raw]
        return [new[slot] for slot in range(step.slots)]


#: fields for where beacons stand and what they see
KINDS = [{"pos": "interleave"}] * 3 + [{"pos": "append"}]
KINDS += [{"pos": "append", "attn": "step-expansion", "attend_prev": previous} for previous in (True, False)]


@st.composite
def setups(draw, skips=True):
    """Draw a config, options and skip arguments."""
    window = draw(st.integers(1, 12))
    lists = st.lists(st.sampled_from([0, 0, 1, 2, 3, 4, 5, 6, 12, 99]), min_size=2, max_size=4)
    lists = lists.filter(lambda ratios: any(ratio == 0 or window % ratio == 0 for ratio in ratios))
    single = st.sampled_from([0, 1, 2, 3, 4, 5, 7, window, window + 1, 2 * window + 1])
    skip_first, skip_last, sink = 0, None, draw(st.integers(0, window - 1))
    if skips and draw(st.booleans()):
        skip_first, sink = draw(st.integers(0, 7)), 0
        skip_last = draw(st.none() | st.integers(0, 4).map(lambda count: skip_first + count * window))
    config = BeaconConfig(
        window=window,
        stride=window,
        ratio=draw(single.map(lambda ratio: [ratio]) | lists),
        ratio_mix=draw(st.sampled_from(["sequence", "step-random"])),
        sink_size=sink,
        **draw(st.sampled_from(KINDS)),
    )
    options = MemoryOptions(lossless_short=draw(st.booleans()), keep_recent=draw(st.integers(0, window)))
    return config, options, {"skip_first": skip_first, "skip_last": skip_last}


def begun(setup, calls=()):
    """Return a row that has read these calls."""
    config, options, skips = setup
    replay = Replay(RowPlan(config, options, **skips))
    for count in calls:
        replay.read(count)
    return replay


@settings(max_examples=200, deadline=None)
@given(setups(), CALLS)
def test_every_pass_is_as_counted_token_by_token(setup, calls):
    config, options, skips = setup
    naive, replay = Naive(config, options, **skips), begun(setup)
    for count in calls:
        assert replay.read(count) == naive.read(count)
        row = replay.row
        assert (row.sink, row.memory, row.tail) == (len(naive.sink), len(naive.memory), len(naive.tail))
        assert row.tokens() == [naive.last_token.get(label, label) for label in naive.held]
        assert (row.seen, row.open_beacons) == (naive.seen, sum(label < 0 for label in naive.window))


@settings(max_examples=150, deadline=None)
@given(setups(), st.integers(0, 5), st.integers(1, 12))
def test_a_training_text_is_as_counted_token_by_token(setup, windows, more):
    config, options, skips = setup
    length = skips["skip_first"] + windows * config.window + min(more, config.window)
    # That several ratios may leave none for a short text is tested with the ratios.
    assume(len(config.ratio) == 1 or any(config.valid_ratios))
    naive, replay = Naive(config, options, **skips), begun(setup)
    assert replay.read(length, training=True) == naive.read(length, training=True)
    # The last window stays open without beacons, even when it is full.
    assert (replay.row.open_beacons, replay.row.ratio or 0) == (0, 0)
    assert replay.row.open_raw > 0
    if replay.row.open_raw == config.window:
        with pytest.raises(ValueError, match="ended in training mode cannot go on"):
            replay.row.plan(1)


@settings(max_examples=100, deadline=None)
@given(setups(), CALLS)
def test_pieces_make_no_difference(setup, calls):
    whole, pieces = begun(setup, [sum(calls)]), begun(setup, calls)
    assert (pieces.held, pieces.row.state) == (whole.held, whole.row.state)
    assert pieces.read(30) == whole.read(30)


@settings(deadline=None)
@given(setups(skips=False), CALLS)
def test_after_its_first_window_a_lossless_text_is_as_any_other(setup, calls):
    config, options, _ = setup
    lossless = begun((config, MemoryOptions(True, options.keep_recent), {}))
    other = begun((config, MemoryOptions(False, options.keep_recent), {}))
    for count in calls:
        passes = lossless.read(count)
        other.read(count)
        if lossless.row.seen < config.window:
            # Nothing but the text, at the base model's positions.
            assert lossless.held == list(range(lossless.row.seen))
            assert all(flag == 0 for _, _, flags, _ in passes for flag in flags)
        else:
            assert (lossless.held, lossless.row.state) == (other.held, other.row.state)


@settings(deadline=None)
@given(setups(), CALLS, st.booleans())
def test_the_most_slots_are_those_of_the_fullest_moment(setup, calls, training):
    *before, count = calls
    assume(len(setup[0].ratio) == 1 or any(setup[0].valid_ratios))
    row = begun(setup, before).row
    state, fullest = row.state, row.held
    promised, end = row.most_slots(count, training), row.seen + count
    assert row.state == state
    while row.seen < end:
        step = row.plan(end - row.seen, training)
        fullest = max(fullest, step.start + step.slots)
        row.commit(step)
    assert promised == fullest


@settings(deadline=None)
@given(setups(), CALLS, CALLS, st.booleans())
@example((BeaconConfig(window=8, stride=8, ratio=(2, 4, 8)), MemoryOptions(), {}), [5], [30], True)
def test_a_copy_goes_its_own_way(setup, before, after, stored):
    original, untouched = begun(setup, before), begun(setup, before)
    state, other = original.row.state, begun(setup)
    if stored:
        other.row.unpack(json.loads(json.dumps(original.row.pack())))
    else:
        other.row = original.row.copy()
    other.held, other.beacons = list(original.held), original.beacons
    got = [other.read(count) for count in after]
    assert original.row.state == state
    # Draws of the copy have not moved those of the original either.
    assert got == [original.read(count) for count in after] == [untouched.read(count) for count in after]


@settings(deadline=None)
@given(st.integers(1, 9), st.sampled_from(["interleave", "append"]), st.integers(0, 8), CALLS)
def test_ratio_0_keeps_every_token_at_its_place(window, pos, sink, calls):
    config = BeaconConfig(window=window, stride=window, ratio=(0,), pos=pos, sink_size=min(sink, window - 1))
    replay = begun((config, MemoryOptions(), {}))
    for count in calls:
        positions = [place for _, places, _, _ in replay.read(count) for place in places]
        assert positions == list(range(replay.row.seen - count, replay.row.seen))
        assert replay.held == list(range(replay.row.seen))


#: tokens of the calls, then for each pass: its slots | position of the first | what is held after it
EXAMPLES = {
    "prompt and decoding": ({}, {}, {}, [10, 1, 1, 1], """
        x1 x2 B1 x3 x4 B2 | 0 | B1 B2
        x5 x6 B3 x7 x8 B4 | 2 | B1 B2 B3 B4
        x9 x10 B5 | 4 | B1 B2 B3 B4 x9 x10 B5
        x11 | 7 | B1 B2 B3 B4 x9 x10 B5 x11
        x12 B6 | 8 | B1 B2 B3 B4 B5 B6
        x13 | 6 | B1 B2 B3 B4 B5 B6 x13"""),
    "training": ({}, {}, {}, [10], """
        x1 x2 B1 x3 x4 B2 | 0 | B1 B2
        x5 x6 B3 x7 x8 B4 | 2 | B1 B2 B3 B4
        x9 x10 | 4 | B1 B2 B3 B4 x9 x10"""),
    "append": ({"pos": "append"}, {}, {}, [9], """
        x1 x2 x3 x4 B1 B2 | 0 | B1 B2
        x5 x6 x7 x8 B3 B4 | 2 | B1 B2 B3 B4
        x9 | 4 | B1 B2 B3 B4 x9"""),
    "append, ratio 3": ({"pos": "append", "ratio": (3,)}, {}, {}, [8], """
        x1 x2 x3 x4 B1 | 0 | B1
        x5 x6 x7 x8 B2 | 1 | B1 B2"""),
    "ratio 3": ({"ratio": (3,)}, {}, {}, [12], """
        x1 x2 x3 B1 x4 | 0 | B1
        x5 x6 B2 x7 x8 | 1 | B1 B2
        x9 B3 x10 x11 x12 B4 | 2 | B1 B2 B3 B4"""),
    "ratio 6": ({"ratio": (6,)}, {}, {}, [9], """
        x1 x2 x3 x4 | 0 |
        x5 x6 B1 x7 x8 | 0 | B1
        x9 | 1 | B1 x9"""),
    "sink": ({"sink_size": 1}, {}, {}, [9], """
        x1 x2 B1 x3 x4 B2 | 0 | x1 B1 B2
        x5 x6 B3 x7 x8 B4 | 3 | x1 B1 B2 B3 B4
        x9 | 5 | x1 B1 B2 B3 B4 x9"""),
    "skip_first": ({}, {}, {"skip_first": 3}, [16], """
        x1 x2 x3 | 0 | x1 x2 x3
        x4 x5 B1 x6 x7 B2 | 3 | x1 x2 x3 B1 B2
        x8 x9 B3 x10 x11 B4 | 5 | x1 x2 x3 B1 B2 B3 B4
        x12 x13 B5 x14 x15 B6 | 7 | x1 x2 x3 B1 B2 B3 B4 B5 B6
        x16 | 9 | x1 x2 x3 B1 B2 B3 B4 B5 B6 x16"""),
    "skip_last": ({}, {}, {"skip_last": 4}, [6, 4], """
        x1 x2 B1 x3 x4 B2 | 0 | B1 B2
        x5 x6 | 2 | B1 B2 x5 x6
        x7 x8 | 4 | B1 B2 x5 x6 x7 x8
        x9 x10 | 6 | B1 B2 x5 x6 x7 x8 x9 x10"""),
    "lossless_short": ({}, {"lossless_short": True}, {}, [3, 2], """
        x1 x2 x3 | 0 | x1 x2 x3
        x1 x2 B1 x3 x4 B2 | 0 | B1 B2
        x5 | 2 | B1 B2 x5"""),
    "keep_recent": ({}, {"keep_recent": 1}, {}, [9], """
        x1 x2 B1 x3 x4 B2 | 0 | B1 B2 x4
        x5 x6 B3 x7 x8 B4 | 3 | B1 B2 B3 B4 x8
        x9 | 5 | B1 B2 B3 B4 x8 x9"""),
}  # fmt: skip


def words(labels):
    return " ".join(f"x{label + 1}" if label >= 0 else f"B{-label}" for label in labels)


@pytest.mark.parametrize("name", EXAMPLES)
def test_the_worked_example_and_its_variants(name):
    changes, options, skips, calls, table = EXAMPLES[name]
    config = BeaconConfig(**{"window": 4, "stride": 4, "ratio": (2,)} | changes)
    replay, lines = begun((config, MemoryOptions(**options), skips)), []
    for new, places, _, held in (one for count in calls for one in replay.read(count, training=name == "training")):
        assert places == list(range(places[0], places[0] + len(new)))
        lines.append([words(new), str(places[0]), words(held)])
    assert lines == [[column.strip() for column in line.split("|")] for line in table.strip().splitlines()]


@pytest.mark.parametrize(("attend_prev", "places"), [(True, [0, 1, 2, 3, 2, 5]), (False, [0, 1, 2, 3, 2, 4])])
def test_positions_of_step_expansion(attend_prev, places):
    config = BeaconConfig(window=4, stride=4, ratio=(2,), pos="append", attn="step-expansion", attend_prev=attend_prev)
    for calls in ([8], [3, 3, 2]):
        row = begun((config, MemoryOptions(), {}))
        got = [place for count in calls for _, positions, _, _ in row.read(count) for place in positions]
        assert got == places + [2 + place for place in places]
