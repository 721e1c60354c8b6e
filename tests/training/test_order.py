"""Which rows make up which step."""

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from training import Order

SIZES = {"rows": st.integers(1, 60), "batch_size": st.integers(1, 4), "accumulation": st.integers(1, 3)}


def epoch(order: Order, number: int = 0) -> list[int]:
    steps = range(number * order.steps_per_epoch, (number + 1) * order.steps_per_epoch)
    return [
        row
        for step in steps
        for process in range(order.processes)
        for rows in order.step(step, process)
        for row in rows
    ]


@settings(max_examples=60, deadline=None)
@given(**SIZES, processes=st.integers(1, 5), seed=st.integers(0, 3), grouped=st.booleans())
def test_every_row_comes_once_an_epoch_in_any_number_of_processes(
    rows: int, batch_size: int, accumulation: int, processes: int, seed: int, grouped: bool
) -> None:
    lengths = [(row * 7) % 13 + 1 for row in range(rows)] if grouped else None
    order = Order(rows, batch_size, accumulation, seed, processes, lengths)
    for number in range(2):
        assert Counter(epoch(order, number)) == dict.fromkeys(range(rows), 1)
    for step in range(order.steps_per_epoch):
        passes = [order.step(step, process) for process in range(processes)]
        assert len({len(own) for own in passes}) == 1, "all processes make the same number of passes"
        assert all(len(own) <= accumulation and max(map(len, own)) <= batch_size for own in passes)


@settings(max_examples=40, deadline=None)
@given(rows=st.integers(1, 40), half=st.integers(1, 3), accumulation=st.integers(1, 3))
def test_two_processes_take_the_rows_of_one_with_twice_the_batch(rows: int, half: int, accumulation: int) -> None:
    one, two = Order(rows, 2 * half, accumulation), Order(rows, half, accumulation, processes=2)
    assert one.steps_per_epoch == two.steps_per_epoch
    for step in range(2 * one.steps_per_epoch):
        apart = [row for process in range(2) for own in two.step(step, process) for row in own]
        assert sorted(apart) == sorted(row for own in one.step(step) for row in own)


def test_the_order_is_a_function_of_seed_and_step_alone() -> None:
    first, again = Order(20, 2, seed=4), Order(20, 2, seed=4)
    backwards = [again.step(step) for step in reversed(range(25))][::-1]
    assert [first.step(step) for step in range(25)] == backwards
    assert epoch(first) != epoch(first, 1)
    assert epoch(first) != epoch(Order(20, 2, seed=5))


def test_rows_of_like_length_share_a_step_and_the_longest_come_first() -> None:
    lengths = [(row * 37) % 101 for row in range(100)]
    order = Order(100, 4, lengths=lengths)
    steps = [[lengths[row] for row in order.step(step)[0]] for step in range(25)]
    assert max(steps[0]) == max(lengths)
    assert max(max(step) - min(step) for step in steps) <= 5
    firsts = [step[0] for step in steps[1:]]
    assert firsts != sorted(firsts) != firsts[::-1], "beyond the first, steps come in random order"


@settings(max_examples=60, deadline=None)
@given(rows=st.integers(4, 60), half=st.integers(1, 2), processes=st.integers(1, 3), kinds=st.integers(1, 4))
def test_strict_steps_hold_rows_of_one_length_and_leave_out_what_fills_none(
    rows: int, half: int, processes: int, kinds: int
) -> None:
    lengths = [row * row % kinds + 1 for row in range(rows)]
    per_step = half * processes
    full = sum(count // per_step for count in Counter(lengths).values())
    if not full:
        with pytest.raises(ValueError, match="have the same length: make a step smaller, or strict off"):
            Order(rows, half, 1, 0, processes, lengths, strict=True)
        return
    order = Order(rows, half, 1, 0, processes, lengths, strict=True)
    assert order.steps_per_epoch == full
    for step in range(2 * full):
        own = [row for process in range(processes) for part in order.step(step, process) for row in part]
        assert len(own) == per_step
        assert len({lengths[row] for row in own}) == 1
    assert len(set(epoch(order))) == full * per_step
    used = {lengths[row] for row in epoch(order)}
    assert lengths[order.step(0)[0][0]] == max(used)


def test_no_rows_and_foreign_lengths_are_refused() -> None:
    with pytest.raises(ValueError, match="there are no rows to train on"):
        Order(0)
    with pytest.raises(ValueError, match="lengths must be those of 3 rows, got 2"):
        Order(3, lengths=[1, 2])
    with pytest.raises(ValueError, match="strict steps need the lengths"):
        Order(rows=2, strict=True)
