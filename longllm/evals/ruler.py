"""RULER's thirteen kinds of long-context questions (arXiv 2404.06654), made from offline text at any length.

The kinds, their settings and their scoring are the paper's. The wording is our own, there is no worked example in the
prompts and no beginning of the answer, and the text is any haystack: figures compare models here, not with the paper's.
"""

from __future__ import annotations

import itertools
import random
import string
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from longllm.evals.cells import by_length
from longllm.evals.filling import fitting, most, planted, running
from longllm.evals.haystack import Haystack
from longllm.evals.passkey import NOISE
from longllm.evals.task import Example, Row, mean_scores
from longllm.evals.topic import sentences
from longllm.prompts import chat_frame, encode


@dataclass
class Making:
    """What one question is made from."""

    tokenizer: Any
    budget: int
    """tokens of the prompt, chat frame not counted"""
    draws: random.Random
    text: Sequence[Sequence[int]]
    """the haystack's sentences as ids"""
    words: Sequence[str]
    """the haystack's different words"""
    rows: Sequence[Mapping[str, Any]] = ()
    """questions with ``question``, ``answers`` and the ``documents`` that hold the answer"""
    number: int = 0
    """of this question"""
    _known: dict[str, list[int]] = field(default_factory=dict)

    def ids(self, text: str) -> list[int]:
        """Return the tokens of a piece of the prompt; lists of words ask for the same pieces again and again."""
        if text not in self._known:
            self._known[text] = encode(self.tokenizer, text)
        return self._known[text]

    def room(self, *pieces: Sequence[int], least: int = 1) -> int:
        """Return how many tokens are left beside some pieces.

        Raises:
            ValueError: fewer than ``least``.
        """
        left = self.budget - sum(map(len, pieces))
        if left < least:
            raise ValueError(f"the length is {least - left} tokens too small for this kind of question")
        return left

    def between(self, before: str, units: Sequence[str], after: str, noise: bool = False) -> list[int]:
        """Return a prompt of exactly the budget: running text with units at drawn places, between two pieces."""
        head, tail, own = self.ids(before), self.ids(after), [self.ids(f" {unit}") for unit in units]
        text = [self.ids(f" {part}.") for part in NOISE.split(". ") if part.strip(". ")] if noise else self.text
        left = self.room(head, tail, *own)
        begin = 0 if noise else self.draws.randrange(len(text))
        return [*head, *planted(running(text, left, begin), own, self.draws), *tail]


#: ids of the prompt and the answers it has
Made = tuple[list[int], list[str]]

_ADJECTIVES = (
    "amber", "brave", "calm", "clever", "crimson", "curious", "dusty", "eager", "faint", "gentle", "golden", "grand",
    "hollow", "humble", "icy", "jolly", "keen", "lively", "lonely", "lucky", "mellow", "misty", "noble", "odd", "pale",
    "patient", "plain", "proud", "quick", "quiet", "rapid", "rough", "rustic", "salty", "sharp", "shy", "silent",
    "silver", "sleepy", "slim", "smooth", "sober", "solid", "stern", "sturdy", "sunny", "swift", "tender", "thirsty",
    "tidy", "tiny", "urban", "velvet", "vivid", "warm", "weary", "wild", "windy", "wise", "witty", "wooden", "young",
)  # fmt: skip
_NOUNS = (
    "anchor", "apple", "arrow", "badger", "basket", "beacon", "bell", "bottle", "bridge", "bucket", "button", "cabin",
    "camel", "candle", "carpet", "castle", "cloud", "compass", "copper", "cousin", "cradle", "dragon", "drum", "engine",
    "falcon", "feather", "fiddle", "forest", "garden", "ginger", "glove", "hammer", "harbor", "helmet", "island",
    "jacket", "kettle", "ladder", "lantern", "lemon", "marble", "meadow", "mirror", "needle", "orchard", "otter",
    "paddle", "pepper", "pigeon", "pillow", "planet", "pocket", "ribbon", "rocket", "saddle", "shovel", "spoon",
    "squirrel", "stone", "sugar", "temple", "thunder", "ticket", "tower", "tunnel", "turnip", "valley", "violin",
    "wagon", "walnut", "whistle", "window",
)  # fmt: skip


def _word(draws: random.Random) -> str:
    return f"{draws.choice(_ADJECTIVES)}-{draws.choice(_NOUNS)}"


def _words(draws: random.Random) -> str:
    return f"{draws.choice(_ADJECTIVES)}-{_word(draws)}"


def _number(draws: random.Random) -> str:
    return str(draws.randrange(1_000_000, 10_000_000))


def _uuid(draws: random.Random) -> str:
    return str(uuid.UUID(int=draws.getrandbits(128), version=4))


def _different(make: Callable[[random.Random], str], draws: random.Random) -> Iterator[str]:
    """Yield values that are all different, until a thousand in a row are old ones."""
    seen: set[str] = set()
    missed = 0
    while missed < 1000:
        value = make(draws)
        missed = missed + 1 if value in seen else 0
        if not missed:
            seen.add(value)
            yield value


def needles(
    making: Making, *, noise: bool = False, lines: bool = False, keys: int = 1, values: int = 1, asked: int = 1,
    key: Callable[[random.Random], str] = _word, value: Callable[[random.Random], str] = _number,
) -> Made:  # fmt: skip
    """Return a question about values that are stated under keys.

    Args:
        making: text and budget.
        noise: hide them among noise sentences instead of the haystack's.
        lines: hide them among other such statements.
        keys: keys that are stated.
        values: values of each key.
        asked: keys that are asked for.
        key, value: what they are made of.
    """
    draws, names, contents = making.draws, _different(key, making.draws), _different(value, making.draws)
    what = "identifier" if value is _uuid else "number"
    stated = [(next(names), [next(contents) for _ in range(values)]) for _ in range(keys)]
    wanted = stated[:asked]
    lists = ", ".join(name for name, _ in wanted)
    many = asked * values > 1
    before = f"Some special magic {what}s are hidden in the text below. Remember them: you will be asked for them.\n\n"
    after = (
        f"\n\nWhat {'are all the' if many else 'is the'} special magic {what}{'s' if many else ''} for {lists} "
        "that the text mentions?"
    )

    def statement(name: str, content: str) -> str:
        return f"One of the special magic {what}s for {name} is: {content}."

    units = [statement(name, content) for name, all_of_it in stated for content in all_of_it]
    references = [content for _, all_of_it in wanted for content in all_of_it]
    draws.shuffle(units)
    if not lines:
        return making.between(before, units, after, noise), references
    head, tail, own = making.ids(before), making.ids(after), [making.ids(f"{unit}\n") for unit in units]
    others = (making.ids(f"{statement(name, next(contents))}\n") for name in names)
    found = [list(unit) for unit in fitting(others, making.room(head, tail, *own))]
    return [*head, *planted(found, own, draws), *tail], references


def variables(making: Making, *, chains: int = 1, hops: int = 4) -> Made:
    """Return a question for all variables that a value is passed on to."""
    names = _different(lambda draws: "".join(draws.choices(string.ascii_uppercase, k=5)), making.draws)
    values = _different(lambda draws: str(draws.randrange(10_000, 100_000)), making.draws)
    told: list[tuple[str, list[str]]] = [(next(values), [next(names) for _ in range(hops + 1)]) for _ in range(chains)]
    units = []
    for value, chain in told:
        units.append(f"VAR {chain[0]} = {value}.")
        units += [f"VAR {new} = VAR {old}." for old, new in itertools.pairwise(chain)]
    before = "Assignments of variables are hidden in the text below. Follow which value each variable gets.\n\n"
    after = f"\n\nFind all variables that have the value {told[0][0]} according to the text, and list their names."
    return making.between(before, units, after, noise=True), told[0][1]


def common_words(making: Making, *, count: int = 10) -> Made:
    """Return a question for the ten words that a numbered list has most often: 30 times, all others 3 times.

    Below 4,096 tokens it is 10 times and once.

    Raises:
        ValueError: the haystack has too few different words, or the length is too small.
    """
    often, seldom = (30, 3) if making.budget >= 4096 else (10, 1)
    words = list(making.words)
    making.draws.shuffle(words)
    before = "Below is a numbered list of words. Some of them are there more often than the others.\n\n"
    after = f"\n\nWhat are the {count} most common words of the list above?"
    edges = len(making.ids(before)) + len(making.ids(after))
    sizes = [len(making.ids(f" {word}")) for word in words]
    numbering = [0]

    def size(more: int) -> int:
        entries = often * count + seldom * more
        while len(numbering) <= entries:
            numbering.append(numbering[-1] + len(making.ids(f" {len(numbering)}.")))
        return often * sum(sizes[:count]) + seldom * sum(sizes[count : count + more]) + numbering[entries]

    more = most(lambda number: count + number <= len(words) and edges + size(number) <= making.budget, 1)
    if more < 1:
        raise ValueError(f"a list of words needs at least {edges + size(1)} tokens and {count + 1} different words")
    entries = words[:count] * often + words[count : count + more] * seldom
    making.draws.shuffle(entries)
    listed = (piece for place, word in enumerate(entries, 1) for piece in (f" {place}.", f" {word}"))
    return [*making.ids(before), *(i for piece in listed for i in making.ids(piece)), *making.ids(after)], words[:count]


def frequent_words(making: Making, *, alpha: float = 2.0, vocabulary: int = 2000) -> Made:
    """Return a question for the three most frequent words of a coded text whose frequencies follow a zeta law.

    The most frequent of all is "...", which the question excludes.
    """
    coded = _different(lambda draws: "".join(draws.choices(string.ascii_lowercase, k=6)), making.draws)
    words = ["...", *(next(coded) for _ in range(vocabulary - 1))]
    sizes = [len(making.ids(f" {word}")) for word in words]
    zeta = sum(rank**-alpha for rank in range(1, 100_000))
    before = "Read the coded text below and keep track of how often each word occurs in it. Ignore the dots (...).\n\n"
    after = "\n\nWhat are the three most frequent words of the coded text above?"
    room = making.room(making.ids(before), making.ids(after))

    def counts(total: int) -> list[int]:
        return [int(total * rank**-alpha / zeta) for rank in range(1, vocabulary + 1)]

    total = most(lambda n: sum(c * size for c, size in zip(counts(n), sizes, strict=True)) <= room)
    shown = counts(total)
    if len(set(shown[1:5])) < 4:
        raise ValueError(f"{room} tokens of coded text are too few for three words that stand out")
    text = [word for word, count in zip(words, shown, strict=True) for _ in range(count)]
    making.draws.shuffle(text)
    ids = (token for word in text for token in making.ids(f" {word}"))
    return [*making.ids(before), *ids, *making.ids(after)], words[1:4]


def questions(making: Making) -> Made:
    """Return a question about documents, those that hold the answer among as many others as fit.

    Raises:
        ValueError: there are no rows, or what holds the answer does not fit.
    """
    if not making.rows:
        raise ValueError("this kind needs rows with question, answers and documents")
    row = making.rows[making.number % len(making.rows)]
    held = list(row["documents"])
    # Rows may bring the other documents; else they are those of all other rows.
    rest = row.get("distractors") or [text for other in making.rows for text in other["documents"]]
    others = list(dict.fromkeys(text for text in rest if text not in held))
    making.draws.shuffle(others)
    ask = "Answer the question from the documents. Give the answer alone, without anything else."
    before, after = f"{ask}\n\nThese are the documents.\n", f"\n\n{ask}\n\nQuestion: {row['question']}"
    head, tail, label = making.ids(before), making.ids(after), making.ids("\nDocument:\n")
    own = [[*label, *making.ids(f"{text}\n")] for text in held]
    more = ([*label, *making.ids(f"{text}\n")] for text in others)
    found = [list(unit) for unit in fitting(more, making.room(head, tail, *own, least=0))]
    return [*head, *planted(found, own, making.draws), *tail], list(row["answers"])


#: kind -> (what makes it, most tokens of the answer, whether all answers must be there or any)
KINDS: dict[str, tuple[Callable[[Making], Made], int, bool]] = {
    "niah_single_1": (partial(needles, noise=True), 128, True),
    "niah_single_2": (needles, 128, True),
    "niah_single_3": (partial(needles, value=_uuid), 128, True),
    "niah_multikey_1": (partial(needles, keys=4), 128, True),
    "niah_multikey_2": (partial(needles, lines=True, key=_words), 128, True),
    "niah_multikey_3": (partial(needles, lines=True, key=_uuid, value=_uuid), 128, True),
    "niah_multivalue": (partial(needles, values=4), 128, True),
    "niah_multiquery": (partial(needles, keys=4, asked=4), 128, True),
    "vt": (variables, 30, True),
    "cwe": (common_words, 120, True),
    "fwe": (frequent_words, 50, True),
    "qa_1": (questions, 32, False),
    "qa_2": (questions, 32, False),
}


@dataclass
class Ruler:
    """One kind of question at some lengths.

    Raises:
        ValueError: an unknown kind, or fewer than one question.

    >>> Ruler("vt", (4096,), Haystack("notes", "Call me Ishmael.")).name
    'ruler-vt'
    """

    kind: str
    lengths: Sequence[int]
    """tokens of prompt, chat frame and answer together"""
    haystack: Haystack
    count: int = 10
    """questions per length"""
    seed: int = 42
    rows: Sequence[Mapping[str, Any]] = ()
    """for the two QA kinds"""
    name: str = field(init=False)

    def __post_init__(self) -> None:
        """Name the task."""
        if self.kind not in KINDS:
            raise ValueError(f"kind must be one of {', '.join(KINDS)}, got {self.kind!r}")
        if self.count < 1:
            raise ValueError(f"count must be at least 1, got {self.count}")
        self.name = f"ruler-{self.kind}"

    def examples(self, tokenizer: Any) -> Iterator[Example]:
        """Yield the questions; prompt, chat frame and answer never exceed the length.

        Running text fills it to the token; lists and documents up to the last that fits.

        Raises:
            ValueError: there is no tokeniser to count with, or a length is too small.
        """
        if tokenizer is None:
            raise ValueError("RULER's prompts have a length in tokens, so they need the model's tokeniser")
        make, new_tokens, _ = KINDS[self.kind]
        frame = sum(map(len, chat_frame(tokenizer))) if tokenizer.chat_template else 0
        text = [encode(tokenizer, f" {sentence}") for sentence in sentences(self.haystack.used)]
        words = sorted({word for word in self.haystack.used.lower().split() if word.isalpha() and len(word) > 3})
        for length in self.lengths:
            for number in range(self.count):
                draws = random.Random(f"{self.seed}/{self.kind}/{length}/{number}")
                budget = length - frame - new_tokens
                making = Making(tokenizer, budget, draws, text, words, self.rows, number)
                ids, references = make(making)
                yield Example(
                    f"{length}/{number}",
                    tokenizer.decode(ids),
                    tuple(references),
                    new_tokens,
                    truncate="never",
                    ids=tuple(ids),
                    facts={"length": length},
                )

    def score(self, example: Example, answer: str) -> dict[str, float]:
        """Return the share of the references that the answer holds, in any case; for QA, whether it holds any."""
        return {"match": match(answer, example.references, KINDS[self.kind][2])}

    def summarise(self, rows: Sequence[Row]) -> dict[str, Any]:
        """Return the mean, over all and by length."""
        return {**mean_scores(rows), "by_length": by_length(rows, "match")}


def match(answer: str, references: Sequence[str], every: bool) -> float:
    """Return the share of references that are part of the answer or, unless ``every``, whether one is.

    >>> match("ABC and def", ("abc", "xyz"), True), match("ABC and def", ("abc", "xyz"), False)
    (0.5, 1.0)
    """
    found = [reference.lower() in answer.lower() for reference in references]
    return sum(found) / len(found) if every else float(any(found))
