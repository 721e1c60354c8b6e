"""Passkey retrieval: a number stated once in a long text, asked for at the end. Functions on a tokeniser; a task."""

from __future__ import annotations

import importlib.util
import random
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from longllm.evals.cells import by_cell, by_length
from longllm.evals.haystack import Haystack, stretch
from longllm.evals.task import Example, Row, mean_scores
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
    noise = None if haystack is not None else _repeated(tokenizer, cell.length)
    return _built(tokenizer, cell, noise, None if haystack is None else encode(tokenizer, haystack))


def hide(
    length: int, depth: float, instruction: Sequence[int], sentence: Sequence[int], question: Sequence[int]
) -> tuple[int, int]:
    """Return how many tokens of other text a prompt of ``length`` has room for, and how many of them go first.

    With d, p and k tokens of instruction, question and sentence, and depth in per cent, the sentence begins at token
    ``d + round((length - p - k - 1 - d) * depth / 100)`` of the prompt.

    Raises:
        ValueError: a depth outside 0 to 100, or a length too small.

    >>> hide(100, 50, [1] * 10, [2] * 5, [3] * 4)
    (81, 40)
    """
    if not 0 <= depth <= 100:
        raise ValueError(f"depth must lie between 0 and 100 per cent, got {depth}")
    room = length - len(instruction) - len(sentence) - len(question)
    if room < 1:
        raise ValueError(f"such a prompt needs at least {length - room + 1} tokens, got {length}")
    return room, round((room - 1) * depth / 100)


def _built(tokenizer: Any, cell: Cell, noise: Sequence[int] | None, hay: Sequence[int] | None) -> PasskeyPrompt:
    """Build a prompt from the tokens of the repeated noise, or of a haystack."""
    instruction, question = encode(tokenizer, INSTRUCTION), encode(tokenizer, QUESTION)
    sentence = encode(tokenizer, KEY.format(key=cell.key))
    room, before = hide(cell.length, cell.depth, instruction, sentence, question)
    if noise is not None:
        prefix, suffix = noise[:before], noise[: room - before]
    else:
        text = hay or ()
        if len(text) < room:
            raise ValueError(f"the haystack has {len(text):,} tokens, {room:,} are needed")
        prefix, suffix = text[:before], text[before:room]
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


@dataclass
class Passkey:
    """The task: one question per length and depth.

    >>> Passkey((8192,), (0, 50, 100)).name
    'passkey'
    """

    lengths: Sequence[int]
    depths: Sequence[float]
    haystack: Haystack | None = None
    """what the key is hidden in; None = the usual noise sentences"""
    digits: int = 5
    seed: int = 123
    new_tokens: int = 50
    name: str = field(default="passkey", init=False)

    def examples(self, tokenizer: Any) -> Iterator[Example]:
        """Yield the cells, lengths outermost.

        Raises:
            ValueError: there is no tokeniser to count with, or a length is too small.
        """
        if tokenizer is None:
            raise ValueError("a passkey prompt has an exact length, so it needs the model's tokeniser: name its folder")
        longest = max(self.lengths)
        noise = _repeated(tokenizer, longest) if self.haystack is None else None
        hay = stretch(self.haystack.ids(tokenizer), longest)[0] if self.haystack else None
        for cell in passkey_cells(self.lengths, self.depths, digits=self.digits, seed=self.seed):
            prompt = _built(tokenizer, cell, noise, hay)
            yield Example(
                f"{cell.length}@{cell.depth:g}",
                prompt.text,
                (cell.key,),
                self.new_tokens,
                truncate="never",
                ids=prompt.ids,
                facts={"length": cell.length, "depth": cell.depth, "key_start": prompt.key_start},
                enough=r"\d+\D",
            )

    def score(self, example: Example, answer: str) -> dict[str, float]:
        """Return whether the first run of digits is the key, and how similar they are (with ``longscope[eval]``)."""
        found = passkey_score(answer, example.references[0])
        alike = {} if found.similarity is None else {"similarity": found.similarity}
        return {"right": float(found.correct), **alike}

    def summarise(self, rows: Sequence[Row]) -> dict[str, Any]:
        """Return the means, and accuracy by length and by cell."""
        return {**mean_scores(rows), "by_length": by_length(rows, "right"), "cells": by_cell(rows, "right")}
