"""Passkey retrieval: a number stated once in a long text, asked for at the end. Pure functions on a tokeniser."""

from __future__ import annotations

import importlib.util
import random
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from longllm.prompts import encode

INSTRUCTION = "An important number is hidden in the text below. Find it and remember it: you will be asked for it.\n\n"
NOISE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again. "
KEY = "\n\nThe pass key is {key}. Remember it. {key} is the pass key.\n\n"
# Asked simply for the pass key, SmolLM2-135M sometimes explains what a pass key is.
QUESTION = "\n\nWhat are the digits of the pass key?"


@dataclass(frozen=True)
class Cell:
    """One trial: prompt length in tokens, depth of the key in per cent, and the key itself.

    >>> Cell(length=4096, depth=50, key="48213").key
    '48213'
    """

    length: int
    depth: float
    key: str


@dataclass(frozen=True)
class PasskeyPrompt:
    """A prompt of exactly the requested length, as ids (before any chat template) and as text.

    >>> PasskeyPrompt(ids=(5, 6, 7), text="a b c", key_start=1).ids[1]
    6
    """

    ids: tuple[int, ...]
    text: str
    key_start: int
    """index in ``ids`` of the first token of the sentence that states the key"""


@dataclass(frozen=True)
class Score:
    """How well an answer names the key.

    >>> Score(correct=True, similarity=1.0).correct
    True
    """

    correct: bool
    """the first run of digits is the key"""
    similarity: float | None
    """Levenshtein ratio of that run and the key, 0 to 1 in steps of 0.01; None without ``longscope[eval]``"""


def passkey_cells(
    lengths: Sequence[int], depths: Sequence[float], *, digits: int = 5, seed: int = 123
) -> Iterator[Cell]:
    """Yield the grid of trials, lengths outermost; one generator draws one number per cell.

    Raises:
        ValueError: fewer than one digit.

    >>> [cell.depth for cell in passkey_cells([100], [0, 50])]
    [0, 50]
    """
    if digits < 1:
        raise ValueError(f"digits must be at least 1, got {digits}")
    draws = random.Random(seed)
    for length in lengths:
        for depth in depths:
            yield Cell(length, depth, str(draws.randrange(10 ** (digits - 1), 10**digits)))


def passkey_prompt(tokenizer: Any, cell: Cell, haystack: str | None = None) -> PasskeyPrompt:
    """Hide the key of ``cell`` among noise sentences, or in the ``haystack``, in exactly ``cell.length`` tokens.

    With an instruction of d tokens, a question of p and a key sentence of k, the key starts at token
    ``d + round((length - p - k - 1 - d) * depth / 100)``: depth 0 is right after the instruction, depth 100 leaves one
    token before the question. Noise starts anew after the key; a haystack goes on where it was interrupted.
    (The protocol of the report arXiv 2404.19553, after landmark attention, arXiv 2305.16300.)

    Raises:
        ValueError: a depth outside 0 to 100, a length too small, or a haystack with too few tokens.

    >>> class Letters:
    ...     def __call__(self, text, **options):
    ...         return {"input_ids": list(text)}
    ...     def decode(self, ids):
    ...         return "".join(ids)
    >>> prompt = passkey_prompt(Letters(), Cell(300, 0, "48213"))
    >>> len(prompt.ids), prompt.text[prompt.key_start :].split(".")[0].strip()
    (300, 'The pass key is 48213')
    """
    if not 0 <= cell.depth <= 100:
        raise ValueError(f"depth must lie between 0 and 100 per cent, got {cell.depth}")
    instruction, question = encode(tokenizer, INSTRUCTION), encode(tokenizer, QUESTION)
    sentence = encode(tokenizer, KEY.format(key=cell.key))
    room = cell.length - len(instruction) - len(sentence) - len(question)
    if room < 1:
        raise ValueError(f"a passkey prompt needs at least {cell.length - room + 1} tokens, got {cell.length}")
    before = round((room - 1) * cell.depth / 100)
    if haystack is None:
        noise = _repeated(tokenizer, max(before, room - before))
        prefix, suffix = noise[:before], noise[: room - before]
    else:
        hay = encode(tokenizer, haystack)
        if len(hay) < room:
            raise ValueError(f"the haystack has {len(hay):,} tokens, {room:,} are needed")
        prefix, suffix = hay[:before], hay[before:room]
    ids = (*instruction, *prefix, *sentence, *suffix, *question)
    return PasskeyPrompt(ids, tokenizer.decode(ids), len(instruction) + before)


def passkey_score(answer: str, key: str) -> Score:
    """Score an answer: is its first run of digits the key, and how similar are the two?

    >>> passkey_score("The pass key is 48213.", "48213").correct
    True
    >>> passkey_score("I saw 1 key: 48213", "48213").correct
    False
    """
    run = re.search(r"\d+", answer)
    found = run.group() if run else ""
    similarity = None
    if importlib.util.find_spec("rapidfuzz"):
        from rapidfuzz import fuzz

        # Rounded, as the older library did that published figures were computed with.
        similarity = round(fuzz.ratio(found, key)) / 100
    return Score(found == key, similarity)


def _repeated(tokenizer: Any, count: int) -> list[int]:
    """Return the first ``count`` tokens of the noise sentences repeated without end."""
    repeats = 1
    while len(ids := encode(tokenizer, NOISE * repeats)) < count:
        repeats = repeats * count // len(ids) + 1
    return ids[:count]
