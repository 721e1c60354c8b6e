"""One reading, many questions: a text that carries a needle at every depth and a pass key, read once for all of them.

Which fact stands at which depth turns from text to text, so that a hard fact is not taken for a hard depth. Every
question is a cell (length, text, kind, depth) with a name of its own; an interrupted run goes on with the missing ones.
"""

from __future__ import annotations

import hashlib
import math
import os
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from longllm.evals.facts import FACTS, Fact, holds, pattern
from longllm.evals.haystack import Haystack, stretch
from longllm.evals.interval import tally
from longllm.evals.passkey import KEY, passkey_score
from longllm.evals.passkey import QUESTION as KEY_QUESTION
from longllm.evals.task import Answerer, Example, Row, Shared
from longllm.prompts import AFTER_DOCUMENT, QUESTION, chat_frame, encode

KINDS = ("needle", "passkey")
#: multiples of it, modulo 1, lie as evenly as points that are added one by one can
_GOLDEN = (math.sqrt(5) - 1) / 2


@dataclass(frozen=True)
class GridPlan:
    """What is asked: lengths, depths, and how many texts of each length.

    Raises:
        ValueError: naming the field, what it got and its range.

    >>> GridPlan((4096, 8192), (0, 50, 100), (3,)).texts_of(8192)
    3
    """

    lengths: tuple[int, ...] = (4096, 8192, 16384, 32768)
    """tokens of the longest prompt of a text, chat frame and room for the answer included"""
    depths: tuple[float, ...] = (0, 11, 22, 33, 44, 55, 66, 77, 88, 100)
    """per cent of the haystack before each needle"""
    texts: tuple[int, ...] = (3,)
    """texts per length: one number for all lengths, or one for each"""
    seed: int = 123
    new_tokens: int = 32
    """most tokens of an answer"""

    def __post_init__(self) -> None:
        """Refuse an empty grid and more depths than there are facts."""
        if not self.lengths or min(self.lengths) < 1 or len(set(self.lengths)) < len(self.lengths):
            raise ValueError(f"lengths must be different numbers of at least 1, got {self.lengths}")
        if not 1 <= len(self.depths) <= len(FACTS) or not all(0 <= depth <= 100 for depth in self.depths):
            raise ValueError(f"depths must be 1 to {len(FACTS)} numbers between 0 and 100, got {self.depths}")
        if len(set(self.depths)) < len(self.depths):
            raise ValueError(f"depths must differ from each other, got {self.depths}")
        if len(self.texts) not in (1, len(self.lengths)) or min(self.texts) < 1:
            raise ValueError(
                f"texts must be one number of at least 1, or one for each of {len(self.lengths)} lengths, "
                f"got {self.texts}"
            )
        if self.new_tokens < 1:
            raise ValueError(f"new_tokens must be at least 1, got {self.new_tokens}")

    def texts_of(self, length: int) -> int:
        """Return how many texts of one length there are."""
        return self.texts[0] if len(self.texts) == 1 else self.texts[self.lengths.index(length)]


@dataclass(frozen=True)
class Planted:
    """Something hidden in a text: what, at which depth, and how it is asked for.

    >>> Planted("passkey", 50, " 48213 is the pass key. ", "What is it?", ("48213",), "key").references
    ('48213',)
    """

    kind: str
    depth: float
    sentence: str
    question: str
    references: tuple[str, ...]
    fact: str


@dataclass(frozen=True)
class Carrier:
    """A text with everything that was hidden in it, as ids between the two halves of the chat frame."""

    ids: tuple[int, ...]
    planted: tuple[Planted, ...]
    places: tuple[int, ...]
    """index in ``ids`` where each planted sentence begins"""
    questions: tuple[tuple[int, ...], ...]
    offset: int
    """token of the haystack that the text begins with"""


def spread(count: int) -> int:
    """Return a step that visits all of 0 … count-1 and lands far from where it was.

    >>> sorted(text * spread(10) % 10 for text in range(10)) == list(range(10))
    True
    """
    steps = [step for step in range(1, count + 1) if math.gcd(step, count) == 1]
    return min(steps, key=lambda step: abs(step - count * _GOLDEN))


def plant(plan: GridPlan, text: int) -> list[Planted]:
    """Return what is hidden in one text: a fact at every depth, and the pass key at one of them.

    Over as many texts as there are facts every fact stands once at every depth; over as many as there are depths
    the pass key stands once at each. A text of one number has the same facts and key at every length.
    """
    count = len(plan.depths)
    shift = plan.seed + text * spread(len(FACTS))
    facts: list[Fact] = [FACTS[(shift + place) % len(FACTS)] for place in range(count)]
    found = [
        Planted("needle", depth, f"\n\n{fact.sentence}\n\n", fact.question, fact.answers, fact.name)
        for depth, fact in zip(plan.depths, facts, strict=True)
    ]
    key = str(random.Random(f"{plan.seed}/{text}").randrange(10_000, 100_000))
    place = (plan.seed + text * spread(count)) % count
    hidden = Planted("passkey", plan.depths[place], KEY.format(key=key), KEY_QUESTION.strip(), (key,), "pass key")
    return [*found, hidden]


def carrier(tokenizer: Any, plan: GridPlan, hay: Sequence[int], length: int, text: int) -> Carrier:
    """Build one text: haystack, everything hidden in it, and the questions.

    With a haystack of h tokens a needle at depth d stands before its token ``round((h - 1) * d / 100)``: depth 0 is
    the very beginning, depth 100 leaves one token. The longest question with its answer ends at ``length``.

    Raises:
        ValueError: the length is too small for what is to be hidden.
    """
    planted = plant(plan, text)
    after = encode(tokenizer, AFTER_DOCUMENT)
    questions = [tuple(encode(tokenizer, QUESTION.format(question=item.question))) for item in planted]
    sentences = [encode(tokenizer, item.sentence) for item in planted]
    frame = sum(map(len, chat_frame(tokenizer)))
    taken = frame + len(after) + max(map(len, questions)) + plan.new_tokens + sum(map(len, sentences))
    room = length - taken
    if room < len(plan.depths):
        raise ValueError(f"a text with {len(planted)} needles needs at least {length - room + len(plan.depths)} tokens")
    body, offset = stretch(hay, room, (text * _GOLDEN + plan.seed * math.sqrt(2)) % 1)
    ids: list[int] = []
    places, done = [0] * len(planted), 0
    # Sorted by place; at the same place in the order of planting, so that the pass key follows its neighbour.
    for before, index in sorted((round((room - 1) * item.depth / 100), n) for n, item in enumerate(planted)):
        ids += body[done:before]
        places[index], done = len(ids), before
        ids += sentences[index]
    return Carrier((*ids, *body[done:], *after), tuple(planted), tuple(places), tuple(questions), offset)


@dataclass
class Grid:
    """The task: every question about every text.

    >>> Grid(GridPlan((4096,)), Haystack("notes", "Call me Ishmael.")).name
    'grid'
    """

    plan: GridPlan
    haystack: Haystack
    name: str = field(default="grid", init=False)

    def examples(self, tokenizer: Any) -> Iterator[Example]:
        """Yield the questions text by text, so that those about one text follow each other.

        Raises:
            ValueError: there is no tokeniser to count with, or as ``carrier``.
        """
        if tokenizer is None:
            raise ValueError("the grid needs exact lengths, so it needs the model's tokeniser: name its folder")
        hay = self.haystack.ids(tokenizer)
        for length in self.plan.lengths:
            for text in range(self.plan.texts_of(length)):
                yield from self._of(tokenizer, carrier(tokenizer, self.plan, hay, length, text), length, text)

    def _of(self, tokenizer: Any, made: Carrier, length: int, number: int) -> Iterator[Example]:
        """Yield the questions about one text, whose words are decoded once."""
        text = tokenizer.decode(made.ids)
        reach = len(made.ids) + max(map(len, made.questions)) + self.plan.new_tokens
        for item, question in zip(made.planted, made.questions, strict=True):
            facts = {"kind": item.kind, "length": length, "text": number, "depth": item.depth, "fact": item.fact}
            words = r"\d+" if item.kind == "passkey" else "|".join(map(pattern, item.references))
            yield Example(
                f"{length}/{number}/{item.kind}@{item.depth:g}",
                text + QUESTION.format(question=item.question),
                item.references,
                self.plan.new_tokens,
                truncate="never",
                ids=made.ids + question,
                facts={**facts, "question": item.question, "offset": made.offset},
                shared=Shared(len(made.ids), reach),
                # Decided once something follows: the next token could still lengthen a number or a word.
                enough=rf"(?:{words})[\s\W]",
            )

    def score(self, example: Example, answer: str) -> dict[str, float]:
        """Return 1 for an answer that holds the fact, or whose first number is the key."""
        if example.facts["kind"] == "passkey":
            return {"right": float(passkey_score(answer, example.references[0]).correct)}
        return {"right": float(holds(answer, example.references))}

    def summarise(self, rows: Sequence[Row]) -> dict[str, Any]:
        """Return accuracy, n and interval per length, per cell of the heat map, and per fact."""
        lengths = sorted({row.facts["length"] for row in rows})

        def marks(**wanted: Any) -> list[float]:
            return [row.scores["right"] for row in rows if all(row.facts[k] == v for k, v in wanted.items())]

        cells = [
            {"kind": kind, "length": length, "depth": depth, **tally(found)}
            for kind in KINDS
            for length in lengths
            for depth in self.plan.depths
            if (found := marks(kind=kind, length=length, depth=depth))
        ]
        names = sorted({row.facts["fact"] for row in rows})
        return {
            "depths": list(self.plan.depths),
            "lengths": {str(n): {kind: tally(marks(kind=kind, length=n)) for kind in KINDS} for n in lengths},
            "cells": cells,
            "facts": {name: tally(marks(fact=name)) for name in names},
        }


def run_grid(
    answerer: Answerer,
    plan: GridPlan,
    haystack: Haystack,
    out: str | os.PathLike[str],
    *,
    label: str = "",
    settings: Mapping[str, Any] | None = None,
    progress: bool = False,
) -> dict[str, Any]:
    """Ask the whole grid; write ``grid.jsonl``, ``grid.json`` and the heat map into ``out``; return the summary.

    More lengths and more texts can be added to a finished run; anything else must stay as it was.

    Raises:
        ValueError: ``out`` belongs to another run, or a length is too small.
        ImportError: matplotlib (``longscope[eval]``) is not installed.
    """
    from longllm.evals.heatmap import draw_cells, figure
    from longllm.evals.run import evaluate

    figure()
    fixed = {name: value for name, value in asdict(plan).items() if name not in ("lengths", "texts")}
    bank = hashlib.sha256(repr(FACTS).encode()).hexdigest()[:16]
    facts = {"label": label or answerer.name, **haystack.facts, **fixed, "depths": list(plan.depths), "bank": bank}
    summary = evaluate(Grid(plan, haystack), answerer, out, settings={**facts, **(settings or {})}, progress=progress)
    draw_cells([summary], Path(out) / "grid")
    return summary
