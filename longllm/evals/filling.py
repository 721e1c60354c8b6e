"""Filling a prompt to a budget of tokens, with running text to the token or with whole units to the last that fits."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import cycle, islice

Ids = Sequence[int]


def running(sentences: Sequence[Ids], count: int, begin: int = 0) -> list[list[int]]:
    """Return sentences from number ``begin`` on, over and over, that have ``count`` tokens; the last one is cut.

    Raises:
        ValueError: there are no sentences, or less than one token is wanted.

    >>> running([[1, 2], [3]], 4, 1)
    [[3], [1, 2], [3]]
    """
    if count < 1 or not any(sentences):
        raise ValueError(f"need sentences and at least 1 token of them, got {len(sentences)} and {count}")
    filled: list[list[int]] = []
    for sentence in islice(cycle(sentences), begin % len(sentences), None):
        filled.append(list(sentence[:count]))
        count -= len(filled[-1])
        if not count:
            break
    return [sentence for sentence in filled if sentence]


def planted(filled: Sequence[Ids], units: Sequence[Ids], draws: random.Random) -> list[int]:
    """Return running text with ``units`` between its sentences, at drawn places but in their order.

    >>> planted([[1, 2], [3]], [[7], [8]], random.Random(1))
    [7, 1, 2, 3, 8]
    """
    gaps = range(len(filled) + 1)
    places = draws.sample(gaps, len(units)) if len(units) <= len(gaps) else draws.choices(gaps, k=len(units))
    held: dict[int, list[int]] = {}
    for place, unit in zip(sorted(places), units, strict=True):
        held.setdefault(place, []).extend(unit)
    return [token for gap in gaps for token in (*held.get(gap, ()), *(filled[gap] if gap < len(filled) else ()))]


def fitting(units: Iterable[Ids], room: int) -> Iterator[Ids]:
    """Yield units as long as they fit into ``room`` tokens together.

    >>> list(fitting([[1, 2], [3], [4, 5]], 4))
    [[1, 2], [3]]
    """
    for unit in units:
        room -= len(unit)
        if room < 0:
            return
        yield unit


def most(fits: Callable[[int], bool], least: int = 0) -> int:
    """Return the largest number that fits, if all smaller ones from ``least`` on do; ``least - 1`` if none does.

    >>> most(lambda number: number * number <= 50)
    7
    """
    step = 1
    while fits(least + step - 1):
        step *= 2
    low, high = least - 1, least + step - 1
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low
