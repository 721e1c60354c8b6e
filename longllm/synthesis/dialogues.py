"""Answers put together into conversations: a context, then question after question about it (report 2404.19553)."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from longllm.synthesis.prompts import Family

#: how a biography is asked for
_BIOGRAPHY = (
    "Write a biography of {name} as the text tells it.",
    "Who is {name}? Summarise everything the text tells about their life.",
    "Summarise the story of {name} from the text.",
    "Give an account of {name}: origin, deeds and fate, as far as the text goes.",
)


@dataclass(frozen=True)
class Assembly:
    """How conversations are put together.

    Raises:
        ValueError: naming the field, what it got and its range.

    >>> Assembly(target=16_000).shuffle
    True
    """

    target: int = 64_000
    """most tokens of a context of regrouped chunks (single)"""
    least: int = 0
    """tokens of a conversation: shorter ones are dropped"""
    most: int = 0
    """tokens of a conversation: longer ones are dropped; 0 = none is"""
    turns: int = 0
    """most questions of a conversation; 0 = all there are"""
    shuffle: bool = True
    """mix the questions, so that their order does not give away where the answers stand"""
    seed: int = 2024
    """of the mixing and of the wording of biographies"""

    def __post_init__(self) -> None:
        """Refuse values that have no meaning."""
        for name, least in (("target", 1), ("least", 0), ("most", 0), ("turns", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be at least {least}, got {getattr(self, name)}")


def regroup(lengths: Sequence[int], target: int) -> Iterator[range]:
    """Yield runs of consecutive chunks, each as long as fits into ``target`` tokens; together they are all chunks.

    A chunk beyond the target is a run of its own.

    >>> list(regroup([4, 4, 4, 9, 1], target=8))
    [range(0, 2), range(2, 3), range(3, 4), range(4, 5)]
    """
    begin = total = 0
    for number, length in enumerate(lengths):
        if number > begin and total + length > target:
            yield range(begin, number)
            begin, total = number, 0
        total += length
    if lengths:
        yield range(begin, len(lengths))


def conversation(context: str, pairs: Sequence[tuple[str, str]]) -> list[dict[str, str]]:
    """Return the turns of a dialogue: the context goes before the first question alone.

    >>> [turn["content"] for turn in conversation("Ahab sails.", [("Who?", "Ahab"), ("What?", "He sails.")])]
    ['Ahab sails.\\n\\nWho?', 'Ahab', 'What?', 'He sails.']
    """
    turns = []
    for number, (question, answer) in enumerate(pairs):
        asked = f"{context}\n\n{question}" if number == 0 else question
        turns += [{"role": "user", "content": asked}, {"role": "assistant", "content": answer}]
    return turns


def arranged(family: Family, pairs: Sequence[tuple[str, str]], settings: Assembly, name: str) -> list[tuple[str, str]]:
    """Return the questions and answers of a conversation, in their order and wording; ``name`` tells draws apart.

    Biographies are (character, summary) and become questions about each character.

    >>> arranged("biography", [("Ahab", "A captain.")], Assembly(), "x")[0][1]
    'A captain.'
    """
    draws = random.Random(f"{settings.seed} {name}")
    found = list(pairs)
    if settings.shuffle:
        draws.shuffle(found)
    if settings.turns:
        found = found[: settings.turns]
    if family == "biography":
        found = [(draws.choice(_BIOGRAPHY).format(name=character), summary) for character, summary in found]
    return found


def row(context: str, pairs: Sequence[tuple[str, str]], **facts: Any) -> dict[str, Any]:
    """Return a row of training data; ``facts`` are kept beside the conversation.

    >>> row("Ahab sails.", [("Who?", "Ahab")], family="single")["family"]
    'single'
    """
    return {"conversations": conversation(context, pairs), **facts}
