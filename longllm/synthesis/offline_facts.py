"""Questions about invented facts that stand here and there between the sentences of a real text."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

from longllm.synthesis.offline_draft import Turn
from longllm.synthesis.offline_texts import Piece
from longllm.synthesis.offline_words import Relation, Words

# How often the value alone is the answer, how often a fact stands in a paragraph of its own, and how often a relation
# is stated of one subject alone, with no other to mistake it for.
_BARE = 0.25
_APART = 0.4
_LONELY = 0.35


@dataclass(frozen=True)
class Fact:
    """An invented sentence with the question that it answers."""

    sentence: str
    question: str
    answer: str


def invented(rng: random.Random, words: Words, known: Sequence[Relation], count: int) -> list[Fact]:
    """Return ``count`` facts; several may be of one relation, of different subjects and with different values."""
    facts: list[Fact] = []
    for relation in rng.sample(known, min(count, len(known))):
        together = 1 if rng.random() < _LONELY else rng.randint(2, 4)
        subjects: set[str] = set()
        values: set[str] = set()
        for _ in range(min(together, count - len(facts))):
            who, value = (
                _new(rng, words, relation.subject, subjects),
                _new(rng, words, relation.value, values | subjects),
            )
            subjects.add(who)
            values.add(value)
            facts.append(_fact(rng, words, relation, who, value))
        if len(facts) == count:
            break
    rng.shuffle(facts)
    return facts


def _new(rng: random.Random, words: Words, kind: str, taken: set[str]) -> str:
    """Return a value that is not taken; after many draws from a short list, one that is."""
    value = words.draw(rng, kind)
    for _ in range(50):
        if value not in taken:
            break
        value = words.draw(rng, kind)
    return value


def _fact(rng: random.Random, words: Words, relation: Relation, who: str, value: str) -> Fact:
    fill = {"who": who, "value": value, "it": words.draw(rng, relation.it)}
    sentence = rng.choice(relation.states).format(**fill)
    question = rng.choice(relation.asks).format(**fill)
    if rng.random() < _BARE:
        answer = value + rng.choice((".", ""))
    else:
        answer = rng.choice(relation.tells).format(**fill)
    return Fact(sentence, question, answer[0].upper() + answer[1:])


def planted(rng: random.Random, facts: Sequence[Fact], base: Sequence[Piece]) -> tuple[list[str], list[int]]:
    """Put facts at random places between the pieces of a text; return the pieces and where each fact is among them."""
    # Drawn evenly over the length rather than over the sentences, which differ in length.
    depths = sorted(rng.random() for _ in facts)
    total = sum(piece.tokens for piece in base) or 1
    pieces: list[str] = []
    places: list[int] = []
    seen = 0
    gap = ""
    for piece in base:
        while len(places) < len(facts) and depths[len(places)] * total <= seen:
            gap = _put(rng, facts[len(places)].sentence, pieces, places)
        pieces.append(gap + piece.text.lstrip() if gap else piece.text)
        gap = ""
        seen += piece.tokens
    while len(places) < len(facts):
        gap = _put(rng, facts[len(places)].sentence, pieces, places)
    return pieces, places


def _put(rng: random.Random, sentence: str, pieces: list[str], places: list[int]) -> str:
    """Append a fact in the running text or in a paragraph of its own; return the gap that must follow it."""
    gap = "\n\n" if rng.random() < _APART else " "
    places.append(len(pieces))
    pieces.append(gap + sentence)
    return gap


def asked(rng: random.Random, facts: Sequence[Fact], places: Sequence[int], count: int) -> list[Turn]:
    """Return questions about ``count`` of the facts, in random order."""
    chosen = rng.sample(range(len(facts)), min(count, len(facts)))
    return [
        Turn(facts[at].question, facts[at].answer, (places[at],), (" ".join(facts[at].sentence.split()),))
        for at in chosen
    ]
