"""Reading a text into a compressed cache as planned: checked before, saved on the way, taken up again."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import beacon
import longllm
from commands.ask_plan import Plan

if TYPE_CHECKING:
    from beacon import SavedCache
    from beacon.request import RequestCache

#: seconds between two saves of a reading in progress
_SAVE_EVERY = 60.0


@dataclass(frozen=True)
class Reading:
    """A text that has been read, and what is noted about the reading."""

    prefix: longllm.Prefix
    notes: dict[str, Any]
    """the caller's facts; ``questions`` as token ids; ``progress`` as [tokens, seconds, KV bytes] after each
    chunk"""
    resumed: int
    """tokens that an earlier run had read"""


class Keep:
    """Saves a reading now and then, and finds one that was interrupted."""

    def __init__(self, path: str, every: float = _SAVE_EVERY) -> None:
        self.path, self.every = Path(path).expanduser(), every
        self.last = time.monotonic()

    def earlier(self, loaded: longllm.LoadedModel, ids: tuple[int, ...], fresh: RequestCache) -> SavedCache | None:
        """Return what the file holds of the same reading, or None if there is no file.

        Raises:
            ValueError: the file holds something else.
        """
        if not self.path.exists():
            return None
        saved = beacon.load_cache(self.path, loaded)
        old, new = saved.cache, fresh
        same = (old.method, old.budget, old.positions) == (new.method, new.budget, new.positions)
        if saved.ids != ids or not same:
            held, by = saved.notes.get("document", "another text"), old.method.name if old.method else "another method"
            raise ValueError(
                f"{self.path} holds a reading of {held} by {by}, {old.budget}, {old.positions} positions: "
                "choose another file, or delete it"
            )
        return saved

    def save(self, loaded: longllm.LoadedModel, ids: tuple[int, ...], cache: RequestCache, notes: Any) -> None:
        """Save if it is time, or if everything has been read."""
        if cache.seen == [len(ids)] or time.monotonic() - self.last > self.every:
            beacon.save_cache(self.path, loaded, ids, cache, **notes)
            self.last = time.monotonic()


def read_text(
    loaded: longllm.LoadedModel,
    ids: tuple[int, ...],
    plan: Plan,
    questions: Sequence[Sequence[int]],
    keep: Keep | None,
    facts: dict[str, Any],
    tokens: int,
) -> Reading:
    """Read ``ids`` into a compressed cache, or take up what ``keep`` holds of them.

    Args:
        loaded: the model.
        ids: the text.
        plan: method, budget and positions.
        questions: what may choose what is kept, as token ids; ignored by methods that look at no question, and by a
            reading that was begun with other questions: those go on choosing.
        keep: where to save, or None.
        facts: to be noted in the file.
        tokens: of the text and what will follow it.

    Raises:
        ValueError: the file holds another reading.
    """
    from flashcore.hf import cache_bytes

    method = beacon.method(plan.method)
    cache = method.new_cache(loaded.model, plan.limit, positions=plan.positions, expected=tokens)
    asked = [list(question) for question in questions] if method.steerable else []
    notes = {**facts, "questions": asked, "progress": []}
    saved = keep.earlier(loaded, ids, cache) if keep else None
    if saved is not None:
        cache, notes = saved.cache, saved.notes
    resumed = cache.seen[0] if cache.seen else 0
    if resumed == len(ids):
        return Reading(longllm.Prefix(ids, cache, 0.0), notes, resumed)
    spent = notes["progress"][-1][1] if notes["progress"] else 0.0
    begun = time.perf_counter()

    def after_chunk(state: RequestCache) -> None:
        notes["progress"].append([state.seen[0], round(spent + time.perf_counter() - begun, 3), cache_bytes(state)])
        if keep:
            keep.save(loaded, ids, state, notes)

    chunk = method.chunk(min(beacon.CHUNK, max(1, loaded.trained_length // 4)))
    prefix = beacon.read(
        loaded, ids, cache, questions=notes["questions"], chunk=chunk, progress=True, after_chunk=after_chunk
    )
    return Reading(prefix, notes, resumed)
