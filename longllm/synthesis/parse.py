"""What a model wrote, read as a list of pairs, however it went about JSON. Nothing here raises on any text."""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

#: other names that models give the two parts of a pair
_ALSO = {
    "question": ("question", "q", "query", "prompt"),
    "answer": ("answer", "a", "response", "reply"),
    "character": ("character", "name", "person", "main_character"),
    "summary": ("summary", "biography", "bio", "description"),
}
_FENCE = re.compile(r"```(?:\w+)?[ \t]*\n?(.*?)(?:```|\Z)", re.S)
#: what a reasoning model wrote before its answer
_THOUGHT = re.compile(r"\A\s*<think>.*?(?:</think>|\Z)", re.S)
#: brackets nested deeper than any answer is: junk that recursive readers choke on
_DEEPEST = 150


@dataclass(frozen=True)
class Parsed:
    """The pairs of an answer, and what was wrong with the rest of it.

    >>> Parsed((("Who?", "Ahab"),), ()).pairs[0][1]
    'Ahab'
    """

    pairs: tuple[tuple[str, str], ...]
    problems: tuple[str, ...]
    """one word or two for each pair that was dropped, or for the whole answer"""


def parse_pairs(text: str, first: str, second: str, *, cut_off: bool = False) -> Parsed:
    r"""Return the pairs that an answer holds under the keys ``first`` and ``second``.

    Reads JSON within fences and prose, with single quotes, missing commas or a missing end (where the last pair is
    dropped, as its text may be cut off), a list or an object around it, and keys by their usual other names.

    Args:
        text: the answer.
        first, second: the keys.
        cut_off: the server says that the answer reached its greatest length.

    Raises:
        ImportError: ``json-repair`` (``longscope[synth]``) is not installed.

    >>> parse_pairs("Sure!\n```json\n[{'question': 'Who?', 'answer': 'Ahab'}]\n``` Enjoy.", "question", "answer").pairs
    (('Who?', 'Ahab'),)
    >>> parse_pairs('{"items": [{"question": "Who?"}, {"question": "Wh', "question", "answer").problems
    ('cut off', 'no answer')
    >>> parse_pairs("I cannot help with that.", "question", "answer").problems
    ('no JSON',)
    """
    text = _THOUGHT.sub("", text)
    if not text.strip():
        return Parsed((), ("empty",))
    for candidate in _candidates(text):
        items = _items(_loaded(candidate), first, second)
        if items:
            break
    else:
        return Parsed((), ("no JSON",))
    problems = []
    if items and _unfinished(candidate, cut_off):
        items, problems = items[:-1], ["cut off"]
    pairs: list[tuple[str, str]] = []
    for item in items:
        one, two = _value(item, first), _value(item, second)
        fault = _fault(one, two, first, second, pairs)
        if fault:
            problems.append(fault)
        else:
            pairs.append((one, two))
    return Parsed(tuple(pairs), tuple(problems))


def _candidates(text: str) -> Iterator[str]:
    """Yield the parts of a text that may be the JSON meant, likeliest first."""
    for fenced in _FENCE.findall(text):
        if re.search(r"[\[{]", fenced):
            yield fenced[min(place for place in (fenced.find("["), fenced.find("{")) if place >= 0) :]
    # A bracket with an object or a quotation mark behind it; "[1]" in the prose before it is none.
    opening = re.search(r"\[\s*[\[{]|\{\s*[\"'“\w]", text)
    if opening:
        yield text[opening.start() :]


def _loaded(text: str) -> Any:
    """Return the value of a text that is JSON or nearly so; None if it cannot be told."""
    if _depth(text) > _DEEPEST:
        return None
    with contextlib.suppress(ValueError):
        return _values(text)
    try:
        import json_repair
    except ImportError as error:
        raise ImportError("reading faulty JSON needs json-repair: pip install 'longscope[synth]'") from error
    try:
        return json_repair.loads(text, skip_json_loads=True)
    except (ValueError, TypeError, KeyError, IndexError, AttributeError, RecursionError):
        return None


def _values(text: str) -> Any:
    """Return the JSON value that a text begins with, or the list of those that follow one another.

    Raises:
        ValueError: it does not begin with one, or another one begins that is none.
    """
    decoder = json.JSONDecoder(strict=False)
    values, end = [], 0
    while re.match(r"[\[{]", text[end : end + 1]):
        value, end = decoder.raw_decode(text, end)
        values.append(value)
        end += len(text) - end - len(text[end:].lstrip(" \t\r\n,;"))
    return values[0] if len(values) == 1 else values


def _depth(text: str) -> int:
    """Return how deep the brackets of a text are nested, whatever stands in quotes."""
    depth = deepest = 0
    for bracket in re.findall(r"[\[\]{}]", text):
        depth = depth + 1 if bracket in "[{" else max(0, depth - 1)
        deepest = max(deepest, depth)
    return deepest


def _items(value: Any, first: str, second: str) -> list[dict[str, Any]]:
    """Return the objects of a value that look like pairs, however they are wrapped."""
    if isinstance(value, dict):
        keys = {_plain(key) for key in value}
        parts = [bool(keys & set(_ALSO.get(key, (key,)))) for key in (first, second)]
        if all(parts):
            return [value]
        lists = [inner for inner in value.values() if isinstance(inner, list)]
        if lists:
            return _items(max(lists, key=len), first, second)
        # {"Q1": {…}, "Q2": {…}}
        return [inner for inner in value.values() if isinstance(inner, dict)] or ([value] if any(parts) else [])
    if isinstance(value, list):
        flat = [inner for item in value for inner in (item if isinstance(item, list) else [item])]
        found = [item for item in flat if isinstance(item, dict)]
        return _items(found[0], first, second) or found if len(found) == 1 else found
    return []


def _value(item: dict[str, Any], key: str) -> str:
    """Return the text under a key or one of its other names, "" if there is none."""
    named = {_plain(name): value for name, value in item.items()}
    value = next((named[name] for name in _ALSO.get(key, (key,)) if name in named), "")
    if isinstance(value, list) and all(isinstance(part, str) for part in value):
        value = " ".join(value)
    return str(value).strip() if isinstance(value, str | int | float) else ""


def _plain(key: Any) -> str:
    """Return a key without case, numbers and punctuation: "Question 1" is question."""
    return re.sub(r"[^a-z]+", "_", str(key).lower()).strip("_")


def _fault(one: str, two: str, first: str, second: str, pairs: list[tuple[str, str]]) -> str:
    """Return what is wrong with a pair, "" if nothing is."""
    if not one or not two:
        return f"no {second if one else first}"
    if {"…", "..."} & {one, two}:
        return "copy of the form"
    if any(one.casefold() == known.casefold() for known, _ in pairs):
        return f"{first} repeated"
    return ""


def _unfinished(text: str, cut_off: bool) -> bool:
    """Tell whether the last object of a text was not brought to its end."""
    begun, ended = text.rfind("{"), text.rfind("}")
    return begun > ended or (cut_off and re.search(r"\w", text[ended + 1 :]) is not None)
