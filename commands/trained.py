"""What a training run did, for people."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any


def told(facts: dict[str, Any], result: str) -> Iterator[str]:
    """Yield what a run did; ``result`` is the fact that names the folder of what it made."""
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
