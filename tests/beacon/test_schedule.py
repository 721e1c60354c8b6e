"""The integer books of a compressed cache: what budgets allow, how layers share, and where the next token stands."""

import copy
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from beacon import Budget, parse_bytes
from beacon.budget import room, spread
from beacon.methods.pyramidkv import PyramidKV
from beacon.schedule import Schedule

SHARES = st.one_of(
    st.integers(1, 6).map(lambda layers: [1.0] * layers),
    st.tuples(st.floats(1, 50), st.integers(1, 6)).map(lambda pair: PyramidKV(steepness=pair[0]).shares(pair[1])),
    st.lists(st.floats(0.01, 3.0), min_size=1, max_size=6),
)
BUDGETS = st.one_of(
    st.floats(1.01, 40).map(lambda ratio: Budget(ratio=ratio)),
    st.integers(16, 90).map(lambda slots: Budget(slots=slots)),
    st.integers(16, 90).map(lambda slots: Budget(nbytes=(slots * SLOT + FIXED) * ROWS + 13)),
)
SLOT, FIXED, ROWS, MINIMUM = 24, 100, 2, 9
#: tokens of each pass for each row; the rows start with some padding
PASSES = st.tuples(st.integers(0, 40), st.lists(st.sampled_from([1, 1, 1, 2, 5, 30, 100]), min_size=1, max_size=40))


def books(budget, shares, **options):
    """Return the books of a cache that protects nine slots."""
    return Schedule(budget, shares, MINIMUM, SLOT, FIXED, **options)


def passes(padding, sizes):
    """Yield the real tokens of two rows, pass by pass; the second one begins with padding."""
    for columns in sizes:
        hidden = min(padding, columns)
        padding -= hidden
        yield columns, [columns, columns - hidden]


def most(budget, seen):
    """Return the slots a layer may hold on average, by the definition of each budget."""
    if budget.ratio is not None:
        return math.ceil(seen / budget.ratio)
    return budget.slots or (budget.nbytes // ROWS - FIXED) // SLOT


@given(st.integers(0, 300), SHARES, st.integers(1, 200))
def test_spread_hands_out_every_slot_and_none_twice(average, shares, limit):
    given_out = spread(average, shares, limit)
    assert sum(given_out) == len(shares) * min(average, limit)
    assert all(0 <= slots <= limit for slots in given_out)
    for share, slots in zip(shares, given_out, strict=True):
        # A layer that is entitled to more than another has no fewer slots.
        assert all(slots >= other for less, other in zip(shares, given_out, strict=True) if less < share)
        # Nobody is below its own share, save for the part of a slot that rounding takes.
        assert slots >= min(limit, math.floor(len(shares) * min(average, limit) * share / sum(shares)) - 1)


@given(SHARES, PASSES, st.booleans())
def test_ratio_1_never_drops_anything(shares, rows, compact):
    schedule = books(Budget(ratio=1), shares, compact=compact)
    for columns, new in passes(*rows):
        step = schedule.plan(new, columns)
        assert not step.evicts
        assert set(step.shift) == {0}
        schedule.commit(step)
        assert schedule.slots == [schedule.seen] * len(shares)
        assert schedule.next_position == schedule.seen


@settings(deadline=None)
@given(BUDGETS, SHARES, PASSES, st.booleans(), st.integers(0, 400))
def test_no_row_is_ever_above_its_limits_and_the_next_position_is_right(budget, shares, rows, compact, expected):
    schedule = books(budget, shares, compact=compact, expected=expected)
    seen = [0, 0]
    for columns, new in passes(*rows):
        before = copy.deepcopy(schedule)
        step = schedule.plan(new, columns)
        # Planning changes nothing but the size of the books.
        assert (before.seen or [0, 0], before.columns) == (schedule.seen, schedule.columns)
        assert step.first == tuple(schedule.next_position)
        schedule.commit(step)
        seen = [old + more for old, more in zip(seen, new, strict=True)]
        assert schedule.seen == seen
        assert schedule.next_position == ([max(row) for row in zip(*schedule.slots, strict=True)] if compact else seen)
        for row, tokens in enumerate(seen):
            own = [layer[row] for layer in schedule.slots]
            allowed = max(most(budget, max(tokens, expected)), min(MINIMUM, tokens))
            assert sum(own) <= len(shares) * min(allowed, tokens)
            for layer, slots in enumerate(own):
                assert min(MINIMUM, tokens) <= slots <= step.limits[layer][row] <= tokens
                assert slots <= before_slots(before, layer, row) + new[row]
    assert schedule.columns == sum(rows[1])


def before_slots(schedule, layer, row):
    """Return the slots held, in books that may not have been begun."""
    return schedule.slots[layer][row] if schedule.slots else 0


@given(st.integers(30, 60), SHARES, st.lists(st.integers(0, 120), min_size=2, max_size=4))
def test_a_byte_budget_holds_for_unequal_rows_kept_in_one_tensor(slots, shares, lengths):
    columns, count = max(lengths), len(lengths)
    budget = Budget(nbytes=(slots * SLOT * len(shares) + FIXED) * count)
    schedule = Schedule(budget, shares, MINIMUM, SLOT * len(shares), FIXED)
    for new in (lengths, *[[1] * count] * 30):
        schedule.commit(schedule.plan(new, max(new)))
        # Every row takes the memory of the longest one, layer by layer.
        assert count * (sum(map(max, schedule.slots)) * SLOT + FIXED) <= budget.nbytes
    assert schedule.columns == columns + 30


@settings(deadline=None)
@given(BUDGETS.filter(lambda budget: budget.nbytes is None), SHARES, PASSES, st.booleans())
def test_a_row_does_not_depend_on_the_others(budget, shares, rows, compact):
    both, alone = (books(budget, shares, compact=compact) for _ in range(2))
    for columns, new in passes(*rows):
        both.commit(both.plan(new, columns))
        if new[1]:
            alone.commit(alone.plan(new[1:], new[1]))
        mine = (both.seen[1], [layer[1] for layer in both.slots], both.next_position[1])
        assert not alone.seen or mine == (alone.seen[0], [layer[0] for layer in alone.slots], alone.next_position[0])


@given(st.integers(24, 900), st.integers(1, 4))
def test_an_eviction_leaves_room_for_the_tokens_that_follow(slots, layers):
    schedule = books(Budget(slots=slots), [1.0] * layers)
    schedule.commit(schedule.plan([slots + 50], slots + 50))
    assert schedule.slots == [[slots - room(slots)]] * layers
    dropped = []
    for _ in range(room(slots) + 1):
        step = schedule.plan([1], 1)
        dropped.append(step.evicts)
        schedule.commit(step)
    assert dropped == [False] * room(slots) + [True]


@given(BUDGETS, SHARES, PASSES, PASSES)
def test_a_copy_is_independent_and_rows_can_be_chosen(budget, shares, first, then):
    schedule = books(budget, shares)
    for columns, new in passes(*first):
        schedule.commit(schedule.plan(new, columns))
    before, fork = copy.deepcopy(schedule), schedule.copy()
    assert fork == schedule
    for columns in then[1]:
        fork.commit(fork.plan([columns, columns], columns))
    fork.forget()
    assert schedule == before
    schedule.select([1, 0, 1])
    assert schedule.seen == [before.seen[row] for row in (1, 0, 1)]
    assert schedule.next_position == [before.next_position[row] for row in (1, 0, 1)]
    assert schedule.slots == [[layer[row] for row in (1, 0, 1)] for layer in before.slots]


@pytest.mark.parametrize("compact", [False, True])
def test_what_is_forgotten_stays_seen(compact):
    schedule = books(Budget(slots=40), [1.0, 1.0], compact=compact)
    schedule.commit(schedule.plan([100, 80], 100))
    schedule.forget()
    assert (schedule.seen, schedule.slots) == ([100, 80], [[0, 0], [0, 0]])
    assert schedule.plan([1, 1], 1).first == ((0, 0) if compact else (100, 80))


def test_a_probe_is_read_and_leaves_no_trace_in_the_books():
    schedule = books(Budget(slots=40), [1.0])
    step = schedule.plan([30], 37, probes=(4, 3))
    assert (step.probe, step.keep, step.evicts) == (7, ((30,),), False)
    schedule.commit(step)
    assert (schedule.columns, schedule.seen, schedule.next_position) == (30, [30], [30])


@pytest.mark.parametrize(
    ("limits", "words"),
    [
        ({}, "one of ratio, slots or nbytes, got none"),
        ({"ratio": 2, "slots": 5}, "got {'ratio': 2, 'slots': 5}"),
        ({"ratio": 0.5}, "ratio must be a number of at least 1 .* got 0.5"),
        ({"ratio": float("nan")}, "got nan"),
        ({"ratio": float("inf")}, "got inf"),
        ({"slots": 0}, "slots must be a whole number of at least 1, got 0"),
        ({"nbytes": -4}, "nbytes must be a whole number of at least 1, got -4"),
        ({"slots": 16.5}, "slots must be a whole number of at least 1, got 16.5"),
    ],
)
def test_what_is_no_budget_is_refused(limits, words):
    with pytest.raises(ValueError, match=words):
        Budget(**limits)


@pytest.mark.parametrize("budget", [Budget(slots=9), Budget(nbytes=2 * (FIXED + 9 * SLOT)), Budget(nbytes=50)])
def test_a_budget_below_what_the_method_protects_is_refused_every_time(budget):
    for schedule in (books(budget, [1.0]), books(budget, [1.0], compact=True)):
        # Trying again must not succeed.
        for _ in range(2):
            with pytest.raises(ValueError, match=r"gives each of 2 rows .* never drops 9 and needs 11 to work with"):
                schedule.plan([5, 5], 5)


def test_the_smallest_budget_that_the_message_names_is_accepted():
    for minimum in range(1, 600):
        enough = math.ceil(minimum * 8 / 7)
        schedule = Schedule(Budget(slots=enough), [1.0], minimum, 1, 0)
        schedule.commit(schedule.plan([2 * enough], 2 * enough))
        assert minimum <= schedule.slots[0][0] <= enough


def test_room_is_a_small_part_of_any_capacity():
    assert all(0 <= room(capacity) <= min(64, capacity / 8) for capacity in range(2000))


@pytest.mark.parametrize(
    ("text", "size"),
    [("64MB", 64_000_000), ("1.5 GiB", 3 * 2**29), ("900000", 900_000), (" 2 kb ", 2000), ("1KiB", 1024), ("3b", 3)],
)
def test_sizes_are_read(text, size):
    assert parse_bytes(text) == size


@pytest.mark.parametrize("text", ["", "MB", "64 M", "-3MB", "1e6", "0.2", "0MB", "many", "64MB!", "٣ MB x"])
def test_what_is_no_size_is_refused(text):
    with pytest.raises(ValueError, match="a size is a number with B, KB"):
        parse_bytes(text)
