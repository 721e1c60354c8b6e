"""A training run from the command line: what it begins, what it did."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from typing import Any


def trained(what: str, run: Callable[[], dict[str, Any]], result: str) -> Iterator[str | dict[str, Any]]:
    """Run a training; yield what it does and did, and its facts. Of several processes the first alone speaks.

    Args:
        what: is trained and where.
        run: trains, and returns the facts.
        result: the fact that names the folder of what was made.
    """
    leads = os.environ.get("RANK", "0") == "0"
    if leads:
        yield f"training {what} …\n"
    facts = run()
    if leads:
        yield from _told(facts, result)
        yield facts


def _told(facts: dict[str, Any], result: str) -> Iterator[str]:
    """Yield what a run did."""
    if facts["resumed"]:
        yield f"went on from step {facts['resumed']:,}\n"
    yield f"{facts['steps']:,} of {facts['planned']:,} steps"
    yield f", loss {facts['loss']:.4f}" if facts["loss"] is not None else ""
    yield f", held-out {facts['best']}\n" if facts["best"] else "\n"
    if facts["stopped"] == "patience":
        yield "stopped early: no better evaluation within keeping.patience\n"
    elif not facts["finished"]:
        yield "stopped before the end: give the same command again to go on\n"
    yield f"{result}: {facts[result]}\n"
