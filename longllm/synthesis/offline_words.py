"""Words for invented facts, and definitions: lists of this package, WordNet and the emoji names of the catalog."""

from __future__ import annotations

import json
import random
import re
import tomllib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

from longllm.evals.facts import FACTS

# WordNet's files of nouns that name things one can see, and what a fact calls them.
_NOUNS = {"05": "animal", "06": "artifact", "13": "food", "20": "plant"}
# How often a noun must have been met in the texts that WordNet's makers tagged, not to be an oddity.
_TAGGED = 2


@dataclass(frozen=True)
class Words:
    """Lists of words by kind, and nouns with their definitions.

    >>> Words.shipped().draw(random.Random(1), "weekday") in Words.shipped().lists["weekday"]
    True
    """

    lists: Mapping[str, tuple[str, ...]]
    meanings: Mapping[str, str]

    @classmethod
    def shipped(cls) -> Words:
        """Return the lists that come with this package; there are no definitions."""
        return cls(_lists(), {})

    @classmethod
    def of_catalog(cls) -> Words:
        """Return the lists of this package, lengthened by WordNet's nouns that have an emoji, with definitions.

        Raises:
            OSError: the data cannot be fetched.
        """
        import catalog

        # What the evaluations ask for is not to be known by heart.
        asked = {answer.lower() for fact in FACTS for answer in fact.answers}
        lists, pictured = dict(_lists()), _emoji_names(catalog.path("emoji-keywords") / "emoji-en-US.json")
        found: dict[str, list[str]] = {kind: [] for kind in _NOUNS.values()}
        meanings = {}
        for noun, kind, gloss in _nouns(catalog.path("wordnet") / "dict"):
            meanings[noun] = gloss
            if noun in pictured - asked and kind in found:
                found[kind].append(noun)
        lists.update({kind: tuple(dict.fromkeys((*lists[kind], *found[kind]))) for kind in found})
        return cls(lists, meanings)

    def draw(self, rng: random.Random, kind: str) -> str:
        """Return a value of a kind that facts speak of: a number, a code, a name, a word of a list.

        Raises:
            ValueError: there is no such kind.
        """
        maker = _MAKERS.get(kind)
        if maker:
            return maker(self, rng)
        if kind not in self.lists:
            raise ValueError(f"unknown kind of word {kind!r}; the kinds are {', '.join((*_MAKERS, *self.lists))}")
        return rng.choice(self.lists[kind])

    def pair(self, rng: random.Random, kind: str, join: str = "") -> str:
        """Return a word of ``<kind>_starts`` joined to one of ``<kind>_ends``."""
        return rng.choice(self.lists[f"{kind}_starts"]) + join + rng.choice(self.lists[f"{kind}_ends"])


@dataclass(frozen=True)
class Relation:
    """One thing that can be stated of an invented subject: its sentences, questions and answers.

    In each, ``{who}`` stands for the subject, ``{value}`` for what is asked for, ``{it}`` for a third word.
    """

    name: str
    subject: str
    value: str
    states: tuple[str, ...]
    asks: tuple[str, ...]
    tells: tuple[str, ...]
    it: str = "word"


def relations() -> tuple[Relation, ...]:
    """Return the relations of ``facts.toml``.

    >>> len(relations()) > 24
    True
    """
    table = tomllib.loads(files("longllm.synthesis").joinpath("facts.toml").read_text("utf-8"))["relation"]
    return tuple(Relation(**_hashable(row)) for row in table)


def _hashable(row: dict[str, Any]) -> dict[str, Any]:
    return {key: tuple(value) if isinstance(value, list) else value for key, value in row.items()}


def _lists() -> dict[str, tuple[str, ...]]:
    table = tomllib.loads(files("longllm.synthesis").joinpath("words.toml").read_text("utf-8"))
    return {key: tuple(text.split()) for key, text in table.items()}


def _emoji_names(file: Path) -> set[str]:
    """Return the names of emoji that are one word."""
    table: dict[str, Any] = json.loads(file.read_text("utf-8"))
    return {words[0] for words in table.values() if words and words[0].isalpha()}


def _nouns(folder: Path) -> list[tuple[str, str, str]]:
    """Return (noun, kind, definition) for WordNet's common one-word nouns, by their first sense, in order."""
    offsets = {}
    for line in (folder / "index.noun").read_text("utf-8").splitlines():
        word, _, senses, pointers, *rest = line.split(" ") if line[0] != " " else ("", "", "0", "0")
        if re.fullmatch(r"[a-z]{3,12}", word):
            _, tagged, first, *_ = rest[int(pointers) :]
            if int(tagged) >= _TAGGED and int(senses) <= 4:
                offsets[word] = first
    synsets = {}
    for line in (folder / "data.noun").read_text("utf-8").splitlines():
        head, _, gloss = line.partition(" | ")
        fields = head.split(" ", 3)
        # After a semicolon come other definitions and examples.
        definition = gloss.split(";")[0].strip().removesuffix(" etc.").rstrip(".")
        synsets[fields[0]] = (_NOUNS.get(fields[1], ""), definition)
    kept = ((word, *synsets[offset]) for word, offset in offsets.items())
    return [(word, kind, gloss) for word, kind, gloss in kept if '"' not in gloss and 3 <= len(gloss.split()) <= 20]


def _person(words: Words, rng: random.Random) -> str:
    return f"{words.draw(rng, 'first')} {words.pair(rng, 'last')}"


def _figure(words: Words, rng: random.Random) -> str:
    return str(rng.randint(12, 989))


def _number(words: Words, rng: random.Random) -> str:
    digits = rng.randint(4, 7)
    return str(rng.randrange(10 ** (digits - 1), 10**digits))


def _code(words: Words, rng: random.Random) -> str:
    letters = "".join(rng.choice("ABCDEFGHJKLMNPRSTUVWXYZ") for _ in range(rng.randint(1, 3)))
    return f"{letters}{rng.choice(('-', '', ' '))}{rng.randint(10, 9999)}"


def _date(words: Words, rng: random.Random) -> str:
    return f"{words.draw(rng, 'month')} {rng.randint(1, 28)}"


def _address(words: Words, rng: random.Random) -> str:
    return f"{rng.randint(2, 199)} {words.draw(rng, 'street')} Street"


def _doctor(words: Words, rng: random.Random) -> str:
    return f"Dr. {words.pair(rng, 'last')}"


def _thing(words: Words, rng: random.Random) -> str:
    return f"{words.draw(rng, 'adjective')} {rng.choice(words.lists['artifact'])}"


def _phrase(words: Words, rng: random.Random) -> str:
    adjective, noun = words.draw(rng, "adjective"), rng.choice(words.lists["word"])
    return rng.choice(
        ("no {noun} without {other}", "the {noun} is {adjective}", "more {noun} and less {other}")
    ).format(noun=noun, adjective=adjective, other=rng.choice([word for word in words.lists["word"] if word != noun]))


_MAKERS: dict[str, Callable[[Words, random.Random], str]] = {
    "person": _person,
    "figure": _figure,
    "number": _number,
    "code": _code,
    "date": _date,
    "address": _address,
    "doctor": _doctor,
    "artifact": _thing,
    "words": _phrase,
    "place": lambda words, rng: words.pair(rng, "place"),
    "ship": lambda words, rng: words.pair(rng, "ship", " "),
    "office": lambda words, rng: words.pair(rng, "office", " "),
}
