"""What each row has seen, what each layer keeps of it and where the next token stands: integers only, no tensors.

A slot is one cached key with its value. Rows are left-padded: what a row holds are the last slots of each layer, so
that new tokens of all rows are appended in the same columns. The number of slots is never a position by accident:
positions are either true ones (tokens seen) or compact ones, decided here and nowhere else.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

from beacon.budget import Budget, room, spread


@dataclass(frozen=True)
class Step:
    """One forward pass, decided before it runs."""

    columns: int
    """tokens of the call, padding and probe included"""
    probes: tuple[int, ...]
    """lengths of the questions at the end of the columns that attend and are forgotten"""
    new: tuple[int, ...]
    """[row] real tokens, probe not counted: the last ones before the probe"""
    first: tuple[int, ...]
    """[row] position of the first real token"""
    held: tuple[tuple[int, ...], ...]
    """[full layer][row] slots before"""
    keep: tuple[tuple[int, ...], ...]
    """[full layer][row] slots after"""
    limits: tuple[tuple[int, ...], ...]
    """[full layer][row] most slots that may be held after"""
    shift: tuple[int, ...]
    """[row] how far the next position moves at the end; 0 unless positions are compact"""

    # Every layer asks these for every token: computed once.
    @cached_property
    def probe(self) -> int:
        """Return how many of the last columns are such questions."""
        return sum(self.probes)

    @cached_property
    def joins(self) -> bool:
        """Say whether this step's slots are held beside the buffers until attention has run, then cut down."""
        if self.evicts or self.probe:
            return True
        # Columns that are padding in every row are cut off too.
        return any(max(held) + self.columns > max(keep) for held, keep in zip(self.held, self.keep, strict=True))

    @cached_property
    def evicts(self) -> bool:
        """Say whether some layer of some row drops something."""
        return any(
            kept < held + new
            for held_row, keep_row in zip(self.held, self.keep, strict=True)
            for held, kept, new in zip(held_row, keep_row, self.new, strict=True)
        )


@dataclass
class Schedule:
    """The integer state of a compressed cache.

    >>> schedule = Schedule(Budget(slots=8), shares=[1.0], minimum=2, row_slot_bytes=1, fixed_bytes=0)
    >>> step = schedule.plan([10], columns=10)
    >>> step.keep, step.first
    (((7,),), (0,))
    >>> schedule.commit(step)
    >>> schedule.seen, schedule.plan([1], columns=1).first
    ([10], (10,))
    """

    budget: Budget
    shares: Sequence[float]
    """[full layer] share of the budget, 1 on average"""
    minimum: int
    """slots that the method never drops"""
    row_slot_bytes: int
    fixed_bytes: int
    compact: bool = False
    """number the kept slots 0, 1, 2, …, instead of keeping true positions"""
    expected: int = 0
    """tokens that a row will hold in the end, if known: a ratio then counts them from the start"""
    columns: int = 0
    """columns seen, padding included"""
    seen: list[int] = field(default_factory=list)
    """[row] real tokens seen"""
    slots: list[list[int]] = field(default_factory=list)
    """[full layer][row] slots held"""
    next_position: list[int] = field(default_factory=list)
    """[row] position of the next token"""

    def start(self, rows: int) -> None:
        """Make room for the books of ``rows`` rows that have seen nothing.

        Raises:
            ValueError: a fixed budget is below what the method never drops.
        """
        self.seen = [0] * rows
        given = 0 if self.budget.ratio is not None else self._capacity(0)
        if self.budget.ratio is None and given - room(given) < self.minimum:
            self.seen = []
            raise ValueError(
                f"a budget of {self.budget} gives each of {rows} rows {given:,} slots a layer, but the method never "
                f"drops {self.minimum:,} and needs {math.ceil(self.minimum * 8 / 7):,} to work with: give more, or "
                "choose a method with a smaller window"
            )
        self.next_position, self.columns = [0] * rows, 0
        self.slots = [[0] * rows for _ in self.shares]

    def plan(self, new: Sequence[int], columns: int, probes: Sequence[int] = ()) -> Step:
        """Decide a forward pass of ``columns`` columns that brings row b ``new[b]`` real tokens."""
        if not self.seen:
            self.start(len(new))
        held = tuple(map(tuple, self.slots))
        limits = [self._limits(seen + count) for seen, count in zip(self.seen, new, strict=True)]
        rows = [self._keep(row, count, limits[row]) for row, count in enumerate(new)]
        shift = [0] * len(new)
        if self.compact:
            after = [position + count for position, count in zip(self.next_position, new, strict=True)]
            shift = [max(kept) - position for kept, position in zip(rows, after, strict=True)]
        keep, most = (tuple(zip(*table, strict=True)) for table in (rows, limits))
        return Step(columns, tuple(probes), tuple(new), tuple(self.next_position), held, keep, most, tuple(shift))

    def commit(self, step: Step) -> None:
        """Enter a forward pass that has run."""
        self.columns += step.columns - step.probe
        self.slots = [list(row) for row in step.keep]
        self.seen = [seen + new for seen, new in zip(self.seen, step.new, strict=True)]
        moved = zip(self.next_position, step.new, step.shift, strict=True)
        self.next_position = [position + new + shift for position, new, shift in moved]

    def forget(self) -> None:
        """Enter that every slot was dropped: the tokens stay seen."""
        self.slots = [[0] * len(self.seen) for _ in self.shares]
        if self.compact:
            self.next_position = [0] * len(self.seen)

    def copy(self) -> Schedule:
        """Return independent books with the same entries.

        >>> books = Schedule(Budget(ratio=1), [1.0], 1, 1, 0)
        >>> books.copy() == books and books.copy() is not books
        True
        """
        slots = [list(layer) for layer in self.slots]
        return replace(self, seen=list(self.seen), next_position=list(self.next_position), slots=slots)

    def select(self, rows: Sequence[int]) -> None:
        """Keep these rows in this order (beams, repeats)."""
        self.seen = [self.seen[row] for row in rows]
        self.next_position = [self.next_position[row] for row in rows]
        self.slots = [[layer[row] for row in rows] for layer in self.slots]

    def _keep(self, row: int, new: int, limits: Sequence[int]) -> list[int]:
        """Return the slots that each layer holds of a row after ``new`` more tokens."""
        after = [layer[row] + new for layer in self.slots]
        if all(slots <= limit for slots, limit in zip(after, limits, strict=True)):
            return after
        seen = self.seen[row] + new
        capacity = self._capacity(seen)
        kept = self._divided(capacity - self._spare(capacity), seen)
        return [min(pair) for pair in zip(after, kept, strict=True)]

    def _limits(self, seen: int) -> list[int]:
        """Return the most slots each layer may hold of a row that has seen ``seen`` tokens."""
        capacity = self._capacity(seen)
        if seen <= max(capacity, self.minimum) and self.budget.nbytes is None:
            return [seen] * len(self.shares)
        # The room is the same for every layer: one without room would make all of them evict at every token.
        spare = self._spare(capacity)
        return [min(seen, slots + spare) for slots in self._divided(capacity - spare, seen)]

    def _spare(self, capacity: int) -> int:
        """Return the room an eviction leaves in each layer."""
        return min(room(capacity), max(0, capacity - self.minimum))

    def _divided(self, average: int, seen: int) -> list[int]:
        """Give every layer what the method never drops, and the rest of the budget by shares.

        What a layer cannot use, others get; but not of a byte budget, which rows of unequal length share: the memory
        of a layer is as long as its longest row, so each layer's part must be the same for all rows.
        """
        base = min(self.minimum, seen)
        if self.budget.nbytes is not None:
            parts = spread(max(0, average - self.minimum), self.shares, 2**62)
            return [min(seen, self.minimum + part) for part in parts]
        return [base + more for more in spread(max(0, average - base), self.shares, seen - base)]

    def _capacity(self, seen: int) -> int:
        """Return the slots a layer may hold on average."""
        sizes = {"row_slot_bytes": self.row_slot_bytes, "fixed_bytes": self.fixed_bytes}
        return self.budget.capacity(max(seen, self.expected), rows=max(1, len(self.seen)), **sizes)
