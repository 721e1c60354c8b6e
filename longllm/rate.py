"""How fast requests are sent to a server and what they cost: limits, a budget per minute, prices."""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass


@dataclass(frozen=True)
class Limits:
    """How fast requests are sent and how stubbornly.

    Raises:
        ValueError: naming the field, what it got and its range.

    >>> Limits(requests_per_minute=60).attempts
    6
    """

    concurrency: int = 8
    """requests under way at once"""
    requests_per_minute: int = 0
    """most requests sent within any minute; 0 = no limit"""
    tokens_per_minute: int = 0
    """most tokens (prompt as estimated, plus max_tokens) sent for within any minute; 0 = no limit"""
    attempts: int = 6
    """how often a request is tried"""
    timeout: float = 600.0
    """seconds that one attempt may take"""
    pause: float = 1.0
    """seconds before the second attempt; doubled each time, and varied by up to a half"""
    patience: float = 300.0
    """longest pause in seconds; a server that asks for a longer one has its request given up"""
    give_up: int = 50
    """end a run after so many failed requests in a row; 0 = never"""

    def __post_init__(self) -> None:
        """Refuse values that have no meaning."""
        for name, least in (("concurrency", 1), ("attempts", 1), ("requests_per_minute", 0), ("give_up", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be at least {least}, got {getattr(self, name)}")
        if self.tokens_per_minute < 0:
            raise ValueError(f"tokens_per_minute must be at least 0, got {self.tokens_per_minute}")
        for name in ("timeout", "pause", "patience"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be a positive number of seconds, got {getattr(self, name)}")


@dataclass(frozen=True)
class Price:
    """What a million tokens cost, in any one currency.

    Raises:
        ValueError: a negative price.

    >>> Price(prompt=0.5, completion=1.5).of(1_000_000, 2_000_000)
    3.5
    """

    prompt: float = 0.0
    """of a million prompt tokens"""
    completion: float = 0.0
    """of a million tokens of answers"""

    def __post_init__(self) -> None:
        """Refuse negative prices."""
        for name in ("prompt", "completion"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be a price of 0 or more, got {getattr(self, name)}")

    def of(self, prompt_tokens: int, completion_tokens: int) -> float:
        """Return the cost of so many tokens."""
        return (prompt_tokens * self.prompt + completion_tokens * self.completion) / 1e6


@dataclass(frozen=True)
class Usage:
    """What an endpoint's answers have used so far.

    >>> Usage(requests=2, prompt_tokens=30).cost
    0.0
    """

    requests: int = 0
    """answered ones"""
    attempts: int = 0
    """sent ones, failures included"""
    prompt_tokens: int = 0
    completion_tokens: int = 0
    cost: float = 0.0


class Window:
    """What was spent within the last ``span`` seconds, and how long the next spending has to wait.

    A request larger than the whole budget cannot be made smaller by waiting: it waits for an empty window and then
    takes all of it, instead of waiting for ever. Times are seconds on any one clock.

    Raises:
        ValueError: the budget is negative.

    >>> window = Window(budget=10)
    >>> window.delay(6, now=0.0), window.take(6, now=0.0), window.delay(6, now=15.0)
    (0.0, None, 45.0)
    >>> window.delay(1000, now=15.0), window.delay(1000, now=60.0)
    (45.0, 0.0)
    """

    def __init__(self, budget: int, span: float = 60.0) -> None:
        """Begin with nothing spent; a budget of 0 is no limit."""
        if budget < 0:
            raise ValueError(f"a budget must be 0 (no limit) or more, got {budget}")
        self.budget, self.span = budget, span
        self._spent: deque[tuple[float, int]] = deque()
        self._total = 0

    def delay(self, cost: int, now: float) -> float:
        """Return the seconds from ``now`` until ``cost`` may be spent; 0.0 if at once."""
        while self._spent and self._spent[0][0] + self.span <= now:
            self._total -= self._spent.popleft()[1]
        free, ready = self.budget - self._total, now
        for time, spent in self._spent:
            if min(cost, self.budget) <= free:
                break
            free += spent
            ready = time + self.span
        return ready - now

    def take(self, cost: int, now: float) -> None:
        """Spend ``cost`` at ``now``, which ``delay`` has allowed."""
        if self.budget:
            self._spent.append((now, min(cost, self.budget)))
            self._total += min(cost, self.budget)
