"""The window plan of Activation Beacon: where windows end, where beacons stand, which slots survive. Integers only.

A slot is one cached key with its value; within a row, slots lie in the order

    sink | beacons of earlier windows | raw tokens kept beside them | the open window, raw tokens and beacons

and a slot's place in that order is its RoPE position. So positions shrink when a window is completed: its beacons move
to the end of the memory and its raw tokens go.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

from beacon.config import BeaconConfig, MemoryOptions
from beacon.ratios import Ratios

_STATE = (
    *("skip_first", "skip_last", "seen", "sink", "memory", "tail", "open_raw", "open_beacons"),
    *("windows", "ratio", "remainder", "window_lead", "ended", "spans"),
)
_CHOSEN = ("fixed", "taken", "kept_one", "turn", "given")


@dataclass(frozen=True)
class Survivors:
    """What stays of a completed window, by places in it."""

    sink: int
    """slots that become sink: the first ones, which stay where they are"""
    beacons: int
    first: int
    """place of the first beacon; the others follow every ``period`` places"""
    period: int
    raw: tuple[int, ...]
    """places of raw slots that stay behind the beacons"""
    memory: int
    """slots that count as memory from now on; the raw slots beyond them stay only until the next window is complete"""
    at: int
    """position of the first surviving beacon, or raw slot if there is none"""


@dataclass(frozen=True)
class WindowStep:
    """One forward pass of one row: raw tokens of one window and the beacons that fall among them."""

    raw: int
    """raw tokens"""
    again: int
    """how many of them, at the front, were read before without beacons (``lossless_short``)"""
    beacons: int
    lead: int
    """raw tokens before the first beacon"""
    period: int
    """slots from one beacon to the next"""
    start: int
    """position of the first new slot: slots held before"""
    window: int
    """position of the first slot of the window"""
    border: int
    """slots of sink and memory, which come first"""
    ratio: int | None
    """of the window; None where it has not been chosen, 0 where every slot stays"""
    open_beacons: int
    """beacons of the window before this step"""
    remainder: int
    """raw tokens since the last beacon, after this step"""
    survivors: Survivors | None
    """what stays, if the step completes the window"""
    expansion: int | None = None
    """step-expansion: 1 = a beacon sees the earlier ones of its window, 0 = it does not; None = full coverage"""
    last: bool = False
    """whether it ends a text in training"""

    @property
    def slots(self) -> int:
        """Return how many slots the step adds."""
        return self.raw + self.beacons

    @property
    def most(self) -> int:
        """Return the most slots that the row holds in this step: what stays may be more than the window had."""
        kept = self.survivors
        after = kept.at + kept.beacons + len(kept.raw) if kept is not None else 0
        return max(self.start + self.slots, after)

    @cached_property
    def beacon_slots(self) -> range:
        """Return the places of the beacons among the new slots."""
        return range(self.lead, self.lead + self.beacons * self.period, self.period)

    def beacons_until(self, place: int, first: int) -> int:
        """Return how many beacons stand at or before a place of a window whose first beacon is at ``first``."""
        return 0 if place < first or not self.ratio else (place - first) // self.period + 1

    @cached_property
    def raw_slots(self) -> list[int]:
        """Return the places of the raw tokens among the new slots.

        >>> RowPlan(BeaconConfig(window=4, stride=4, ratio=(2,))).plan(10).raw_slots
        [0, 1, 3, 4]
        """
        beacons = set(self.beacon_slots)
        return [slot for slot in range(self.slots) if slot not in beacons]

    @cached_property
    def positions(self) -> list[int]:
        """Return the position of each new slot, which its query and key are rotated by."""
        places = list(range(self.start, self.start + self.slots))
        if self.expansion is not None and self.ratio:
            for count, slot in enumerate(self.beacon_slots, 1):
                places[slot] = self.window + count * self.ratio - 1 + (count if self.expansion else 1)
        return places

    @property
    def flags(self) -> list[int]:
        """Return each new slot's kind as the reference notes it: 0 raw, 1 beacon, -1 raw of a window kept whole."""
        if self.survivors is not None and self.ratio == 0:
            return [-1] * self.slots
        beacons = set(self.beacon_slots)
        return [int(slot in beacons) for slot in range(self.slots)]


@dataclass
class RowPlan:
    """The books of one row: what it has seen, what it holds, what its next forward pass is.

    >>> row = RowPlan(BeaconConfig(window=4, stride=4, ratio=(2,)))
    >>> pending = 10
    >>> while pending:
    ...     step = row.plan(pending)
    ...     pending -= step.raw
    ...     row.commit(step)
    ...     print(step.flags, step.positions, row.held)
    [0, 0, 1, 0, 0, 1] [0, 1, 2, 3, 4, 5] 2
    [0, 0, 1, 0, 0, 1] [2, 3, 4, 5, 6, 7] 4
    [0, 0, 1] [4, 5, 6] 7
    """

    config: BeaconConfig
    options: MemoryOptions = field(default_factory=MemoryOptions)
    ratios: Ratios = None  # type: ignore[assignment]
    expected: int = 0
    """tokens of the whole text if known, for adapt-N; else what was received when the first window chooses"""
    skip_first: int = 0
    """tokens kept whole as sink before the first window"""
    skip_last: int | None = None
    """index of the token from which on everything is kept whole"""
    seen: int = 0
    """raw tokens"""
    sink: int = 0
    memory: int = 0
    tail: int = 0
    """raw slots that stay until the next window is complete"""
    open_raw: int = 0
    open_beacons: int = 0
    windows: int = 0
    """completed; the tokens of ``skip_first`` are none"""
    ratio: int | None = None
    """of the open window"""
    remainder: int = 0
    window_lead: int = 0
    """place of the open window's first beacon"""
    ended: bool = False
    """whether training has read the end of the text, whose last window has no beacons"""
    spans: tuple[tuple[int, int, int], ...] = ()
    """(first token, tokens apart, slots): where sink and memory come from; a beacon counts as the token before it"""

    def __post_init__(self) -> None:
        """Check what depends on several fields.

        Raises:
            ValueError: skip arguments that do not fit the windows.
        """
        if self.ratios is None:
            self.ratios = Ratios(self.config, float("inf"))
        for name in ("skip_first", "skip_last"):
            if (value := getattr(self, name)) is not None and not isinstance(value, int):
                raise ValueError(f"{name} counts tokens and must be a whole number, got {value!r}")
        if self.skip_first < 0 or (self.skip_last is not None and self.skip_last < self.skip_first):
            raise ValueError(f"skip_first {self.skip_first} and skip_last {self.skip_last} must be 0 <= first <= last")
        if (self.skip_first or self.skip_last is not None) and self.config.sink_size:
            raise ValueError(f"skip_first and skip_last need beacon_sink_size 0, it is {self.config.sink_size}")
        if self.skip_last is not None and (self.skip_last - self.skip_first) % self.config.window:
            raise ValueError(
                f"skip_last must come whole windows of {self.config.window} after skip_first ({self.skip_first}), "
                f"got {self.skip_last}"
            )
        if self.options.keep_recent > self.config.window:
            raise ValueError(
                f"keep_recent must not exceed beacon_window ({self.config.window}), got {self.options.keep_recent}"
            )

    @property
    def held(self) -> int:
        """Return the slots held: the position of the next token."""
        return self.window + self.open_raw + self.open_beacons

    @property
    def window(self) -> int:
        """Return where the open window begins."""
        return self.sink + self.memory + self.tail

    @property
    def state(self) -> tuple[int | None, ...]:
        """Return what the shapes of the next forward pass depend on: rows of equal state run together."""
        own = (self.seen, self.sink, self.memory, self.tail, self.open_raw, self.open_beacons, self.ratio)
        return (*own, self.remainder, self.window_lead, self.windows, self.ratios.taken, self.ratios.fixed)

    def plan(self, pending: int, training: bool = False) -> WindowStep:
        """Return the next forward pass when ``pending`` raw tokens (at least 1) are waiting.

        Args:
            pending: tokens of this call that have not run.
            training: the window that reaches the end of the call gets no beacons and stays open, even when full.

        Raises:
            ValueError: the text has ended, in training.
        """
        size = self.skip_first if self.seen < self.skip_first else self.config.window
        if self.ended:
            raise ValueError("a text that ended in training mode cannot go on: its last window was left open")
        new = min(pending, size - self.open_raw)
        full = self.open_raw + new == size
        last = training and new == pending
        if last:
            full, ratio, chosen = False, None, False
        else:
            ratio, chosen = self._ratio(pending, full, training)
        begun = self.open_raw if chosen and self.config.pos == "interleave" else 0
        raw = new + begun
        beacons, lead, remainder = self._beacons(raw, full, ratio)
        append = self.config.pos == "append"
        start = self.held - (self.open_raw if begun else 0)
        expand = self.config.attn == "step-expansion" and beacons
        step = WindowStep(
            raw=raw,
            again=begun,
            beacons=beacons,
            lead=lead,
            period=1 if append else (ratio or 0) + 1,
            start=start,
            window=self.window,
            border=self.sink + self.memory,
            ratio=ratio,
            open_beacons=self.open_beacons,
            remainder=remainder,
            survivors=None,
            expansion=int(self.config.attend_prev) if expand else None,
            last=last,
        )
        return replace(step, survivors=self._survivors(step, size)) if full else step

    def commit(self, step: WindowStep) -> None:
        """Enter a forward pass that has run."""
        self.open_raw += step.raw - step.again
        self.seen += step.raw - step.again
        begun = self.seen - self.open_raw
        if step.beacons and not self.open_beacons:
            self.window_lead = step.start - step.window + step.lead
        self.open_beacons += step.beacons
        self.ratio, self.remainder, self.ended = step.ratio, step.remainder, step.last
        kept = step.survivors
        if kept is not None:
            sink = [(begun + place - step.beacons_until(place, kept.first), 1, 1) for place in range(kept.sink)]
            whole = (begun + kept.sink, 1, 0 if step.ratio else kept.memory)
            # Up to the first interleaved beacon there are as many raw tokens as slots; appended ones follow them all.
            before = step.ratio if self.config.pos == "append" else kept.first
            beacons = (begun + (before or 0) - 1, step.ratio or 1, kept.beacons)
            self.spans += tuple(span for span in (*sink, whole, beacons) if span[2])
            self.sink += kept.sink
            self.memory += kept.memory
            self.tail = kept.beacons + len(kept.raw) - kept.memory
            self.open_raw = self.open_beacons = self.window_lead = 0
            self.ratio, self.windows = None, self.windows + (begun >= self.skip_first)

    def most_slots(self, pending: int, training: bool = False) -> int:
        """Return the most slots held at any moment while ``pending`` more tokens are read."""
        row, most = self.copy(), self.held
        while pending:
            step = row.plan(pending, training)
            most, pending = max(most, step.most), pending - (step.raw - step.again)
            row.commit(step)
        return most

    def tokens(self) -> list[int]:
        """Return the true position of each slot held; a beacon's is that of the raw token before it.

        >>> row = RowPlan(BeaconConfig(window=4, stride=4, ratio=(2,)))
        >>> for pending in (10, 6, 2):
        ...     row.commit(row.plan(pending))
        >>> row.tokens()
        [1, 3, 5, 7, 8, 9, 9]
        """
        held = [token for first, apart, slots in self.spans for token in range(first, first + apart * slots, apart)]
        begun = self.seen - self.open_raw
        held += range(begun - self.tail, begun)
        beacons = set(range(self.window_lead, self.window_lead + self.open_beacons * self.period, self.period))
        token = begun - 1
        for place in range(self.open_raw + self.open_beacons):
            token += place not in beacons
            held.append(token)
        return held

    @property
    def period(self) -> int:
        """Return the slots from one beacon of the open window to the next."""
        return 1 if self.config.pos == "append" else (self.ratio or 0) + 1

    def pack(self) -> dict[str, Any]:
        """Return the state as JSON values."""
        own = {name: getattr(self, name) for name in _STATE}
        chosen = {name: getattr(self.ratios, name) for name in _CHOSEN}
        return {**own, "ratios": {**chosen, "rng": self.ratios.rng.bit_generator.state}}

    def unpack(self, state: dict[str, Any]) -> None:
        """Take over what ``pack`` returned."""
        for name in _STATE:
            setattr(self, name, state[name])
        self.spans = tuple((first, apart, slots) for first, apart, slots in state["spans"])
        for name in _CHOSEN:
            setattr(self.ratios, name, state["ratios"].get(name, ()))
        self.ratios.turn, self.ratios.given = tuple(self.ratios.turn), tuple(self.ratios.given)
        self.ratios.rng.bit_generator.state = state["ratios"]["rng"]

    def copy(self) -> RowPlan:
        """Return independent books with the same entries."""
        return replace(self, ratios=self.ratios.copy())

    def _ratio(self, pending: int, full: bool, training: bool) -> tuple[int | None, bool]:
        """Return the open window's ratio, and whether it is chosen for raw tokens that ran before."""
        if self.seen < self.skip_first or (self.skip_last is not None and self.seen >= self.skip_last):
            return 0, False
        interleave = self.config.pos == "interleave"
        if self.ratio is not None:
            return self.ratio, False
        if not full and (not interleave or (self.options.lossless_short and self.windows == 0)):
            return None, False
        received = max(self.seen + pending, self.expected)
        length = self.seen + pending if training else None
        ratio = self.ratios.choose(received, self.seen - self.open_raw, length)
        return ratio, bool(self.open_raw and interleave and ratio)

    def _beacons(self, raw: int, full: bool, ratio: int | None) -> tuple[int, int, int]:
        """Return beacons among ``raw`` new tokens, raw tokens before the first, and the remainder after them."""
        if not ratio:
            return 0, raw, self.remainder
        if self.config.pos == "append":
            return (self.config.stride // ratio if full else 0), raw, 0
        count, remainder = divmod(raw + self.remainder, ratio)
        return count, ratio - self.remainder, remainder

    def _survivors(self, step: WindowStep, size: int) -> Survivors:
        """Return what stays of the window that ``step`` completes."""
        begun = step.start - step.window
        total, beacons = begun + step.slots, self.open_beacons + step.beacons
        first = self.window_lead if self.open_beacons else begun + step.lead
        if self.seen < self.skip_first:
            return Survivors(size, 0, 0, 1, (), 0, size)
        # The sink is the first slots of the text, whatever they are.
        sink = min(self.config.sink_size, total) if self.windows == 0 and not self.skip_first else 0
        at = self.sink + self.memory + sink
        if not step.ratio:
            return Survivors(sink, 0, 0, 1, tuple(range(sink, total)), total - sink, at)
        own = set(range(first, first + beacons * step.period, step.period))
        raw = [place for place in range(total) if place not in own]
        recent = raw[len(raw) - self.options.keep_recent :] if self.options.keep_recent else []
        recent = [place for place in recent if place >= sink]
        return Survivors(sink, beacons, first, step.period, tuple(recent), beacons, at)
