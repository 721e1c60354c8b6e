"""Which rows make up which step: a function of seed and step, so that resuming needs no state of a sampler."""

from __future__ import annotations

import random
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

#: steps' worth of rows within which rows are sorted by length when they are grouped
_POOL = 50


@dataclass(frozen=True)
class Order:
    """The rows of every step of every process.

    Each epoch is a new permutation. With ``lengths``, rows of like length share a step, and the longest come first in
    an epoch, so that a run which will not fit into memory fails at once. With ``strict``, only rows of equal length
    do, and those that fill no step are left out: every process then does the same work.

    Raises:
        ValueError: there are no rows, or (strict) not enough of any length for a step.

    >>> order = Order(rows=5, batch_size=1, accumulation=2, seed=0)
    >>> order.steps_per_epoch, sorted(sum((sum(order.step(n), []) for n in range(3)), []))
    (3, [0, 1, 2, 3, 4])
    """

    rows: int
    batch_size: int = 1
    accumulation: int = 1
    seed: int = 0
    processes: int = 1
    lengths: Sequence[int] | None = None
    strict: bool = False
    _known: dict[int, list[int]] = field(default_factory=dict, init=False, repr=False, compare=False)
    """the order of the epoch that was last asked for: shuffling a million rows takes a second"""

    def __post_init__(self) -> None:
        """Refuse an empty data set, and lengths of another one."""
        if self.rows < 1:
            raise ValueError("there are no rows to train on")
        if self.lengths is not None and len(self.lengths) != self.rows:
            raise ValueError(f"lengths must be those of {self.rows} rows, got {len(self.lengths)}")
        if self.strict and self.lengths is None:
            raise ValueError("strict steps need the lengths of the rows")
        if self.strict and not self.steps_per_epoch:
            raise ValueError(
                f"no {self.per_step} of the {self.rows} rows have the same length: make a step smaller, or strict off"
            )

    @property
    def per_step(self) -> int:
        """Rows that one step takes over all processes."""
        return self.batch_size * self.accumulation * self.processes

    @cached_property
    def steps_per_epoch(self) -> int:
        """Steps in which every row comes once (strict: every row that fills a step with others)."""
        if self.strict:
            return sum(count // self.per_step for count in Counter(self.lengths).values())
        return -(-self.rows // self.per_step)

    def step(self, number: int, process: int = 0) -> list[list[int]]:
        """Return the rows of step ``number`` (0 …) for one process, as one list for each forward pass.

        The last step of an epoch takes what is left. Where a process has no rows while another has, its list is empty:
        all make the same number of passes. Of the step's rows a process has every ``processes``-th.
        """
        epoch, place = divmod(number, self.steps_per_epoch)
        if epoch not in self._known:
            self._known.clear()
            self._known[epoch] = self._epoch(epoch)
        rows = self._known[epoch][place * self.per_step : (place + 1) * self.per_step]
        own = rows[process :: self.processes]
        most = -(-len(rows) // self.processes)
        return [own[at : at + self.batch_size] for at in range(0, most, self.batch_size)]

    def _epoch(self, epoch: int) -> list[int]:
        """Return the order of all rows in one epoch."""
        draws = random.Random(f"{self.seed}/{epoch}")
        order = list(range(self.rows))
        draws.shuffle(order)
        lengths = self.lengths
        if lengths is None:
            return order
        if self.strict:
            alike: dict[int, list[int]] = defaultdict(list)
            for row in order:
                alike[lengths[row]].append(row)
            groups = [
                rows[at : at + self.per_step]
                for rows in alike.values()
                for at in range(0, len(rows) - self.per_step + 1, self.per_step)
            ]
            return _shuffled(groups, [], lengths, draws)
        pool = self.per_step * _POOL
        groups = []
        for at in range(0, self.rows, pool):
            near = sorted(order[at : at + pool], key=lambda row: -lengths[row])
            groups += [near[start : start + self.per_step] for start in range(0, len(near), self.per_step)]
        # A short group can only be the last: every other step of the epoch must be full.
        tail = [groups.pop()] if len(groups[-1]) < self.per_step else []
        return _shuffled(groups, tail, lengths, draws)


def _shuffled(
    groups: list[list[int]], tail: list[list[int]], lengths: Sequence[int], draws: random.Random
) -> list[int]:
    """Return the rows of groups in a random order, but the longest first and the tail last."""
    longest = max(range(len(groups)), key=lambda group: lengths[groups[group][0]], default=None)
    first = [groups.pop(longest)] if longest is not None else []
    draws.shuffle(groups)
    return [row for group in first + groups + tail for row in group]
