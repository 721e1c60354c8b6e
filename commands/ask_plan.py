"""How ``longscope ask`` reads: which method, which budget, which positions, decided from options and lengths."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import beacon
from beacon import Budget, parse_bytes

MethodName = Literal[
    "auto", "full", "streaming", "snapkv", "pyramidkv", "tova", "knorm", "keydiff", "spotlight", "beacon", "retrieve"
]
PositionsName = Literal["auto", "compact", "original"]
#: what a text beyond the trained length is read with unless another method is named (compared in bench/methods.py)
DEFAULT_METHOD = "spotlight"
#: slots of a layer for such a text, at most; never more than a quarter of the trained length, so that a chunk of
#: another quarter, questions and answer stay within it too
DEFAULT_SLOTS = 8192
DEFAULT_RATIO = 8.0


@dataclass(frozen=True)
class Wish:
    """What the command line asks for; what was left open is decided when lengths are known.

    Raises:
        ValueError: options that contradict each other.

    >>> Wish(budget="64MB").limit
    Budget(ratio=None, slots=None, nbytes=64000000)
    """

    method: MethodName = "auto"
    ratio: float = 0.0
    slots: int = 0
    budget: str = ""
    positions: PositionsName = "auto"

    def __post_init__(self) -> None:
        """Refuse contradictions before a model is loaded."""
        if self.limit is not None and self.method in ("full", "retrieve") and not self.limit.keeps_all:
            raise ValueError(f"--method {self.method} compresses nothing, so --ratio, --slots or --budget do not apply")

    @property
    def limit(self) -> Budget | None:
        """Return the budget asked for, or None."""
        limits = {
            "ratio": self.ratio or None,
            "slots": self.slots or None,
            "nbytes": parse_bytes(self.budget) if self.budget else None,
        }
        return Budget(**limits) if any(limits.values()) else None  # type: ignore[arg-type]


@dataclass(frozen=True)
class Plan:
    """How a prompt is read."""

    method: str
    limit: Budget
    positions: Literal["compact", "original"]

    def __str__(self) -> str:
        """Return the plan in words.

        >>> str(Plan("snapkv", Budget(slots=4096), "compact"))
        'snapkv, 4,096 slots a layer, compact positions'
        """
        return "full attention" if self.method == "full" else f"{self.method}, {self.limit}, {self.positions} positions"


def decide(wish: Wish, tokens: int, trained_length: int) -> Plan:
    """Return how to read a prompt of ``tokens`` tokens with a model trained up to ``trained_length``.

    What fits is read in full unless something else is asked for. What does not fit is compressed into a number of
    slots within the trained length, with positions inside it too.

    >>> str(decide(Wish(), 6000, 8192))
    'full attention'
    >>> str(decide(Wish(), 312_000, 8192))
    'spotlight, 2,048 slots a layer, compact positions'
    >>> str(decide(Wish(method="streaming"), 6000, 8192))
    'streaming, ratio 8, original positions'
    >>> str(decide(Wish(method="beacon"), 6000, 8192))
    'beacon, ratio 8, compact positions'
    """
    beyond = tokens > trained_length
    method: str = wish.method
    if method == "auto":
        limited = wish.limit is not None and not wish.limit.keeps_all
        method = DEFAULT_METHOD if beyond or limited else "full"
    if method in ("full", "retrieve"):
        return Plan(method, Budget(ratio=1), "original")
    # What thins a text out evenly has no number of slots that serves every length.
    fixed = beyond and beacon.method(method).ranks
    default = Budget(slots=min(DEFAULT_SLOTS, trained_length // 4)) if fixed else Budget(ratio=DEFAULT_RATIO)
    moves = beyond or beacon.method(method).compact_only
    positions = wish.positions if wish.positions != "auto" else "compact" if moves else "original"
    return Plan(method, wish.limit or default, positions)
