"""Benchmark rows made from the catalog's real texts, in the released formats, for machines without the data sets.

They run through the same prompts, cutting and scorers as the released rows, and say whether those work and whether a
model retrieves at all; their figures are not comparable with published ones. Summaries are left out: the catalog has
texts, but no reference summaries of them.
"""

from __future__ import annotations

import functools
import random
import re
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import catalog

#: passages are whole sentences of at least so many words
_PASSAGE = 60


@dataclass(frozen=True)
class Passage:
    """Consecutive sentences of a State of the Union address.

    >>> Passage("We shall persist.", "State of the Union 1963, Lyndon Johnson").year
    '1963'
    """

    text: str
    title: str

    @property
    def year(self) -> str:
        """Return the year of the address."""
        return self.title.split(",")[0].rsplit(" ", 1)[1]

    @property
    def president(self) -> str:
        """Return who gave it."""
        return self.title.split(", ", 1)[1]


def passages(text: str, title: str) -> list[Passage]:
    """Return the passages of an address; the first and the last, which greet and thank, are left out.

    >>> len(passages("We shall persist and persevere. " * 60, "State of the Union 1963, Lyndon Johnson"))
    3
    """
    found: list[str] = []
    held: list[str] = []
    for sentence in re.split(r"(?<=[.!?]) (?=[A-Z])", text):
        held += sentence.split()
        if len(held) >= _PASSAGE:
            found.append(" ".join(held))
            held = []
    return [Passage(part, title) for part in found[1:-1]]


@functools.cache
def _addresses() -> list[list[Passage]]:
    """Return the passages of all addresses that have at least three."""
    read = (catalog.read_document(name) for name in catalog.documents("sotu"))
    return [own for own in (passages(document.text, document.title) for document in read) if len(own) >= 3]


def _row(task: str, number: int, context: str, asked: str, answers: Sequence[str], **more: Any) -> dict[str, Any]:
    """Return a row of LongBench; its length is counted in words, as in the released ones."""
    return {
        "input": asked, "context": context, "answers": list(answers), "length": len(context.split()), "dataset": task,
        "language": "en", "all_classes": None, "_id": f"offline-{task}-{number}", **more,
    }  # fmt: skip


def _some(draws: random.Random, words: int, least: int = 4) -> list[Passage]:
    """Return one passage each of different addresses, so many that they have about ``words`` words."""
    addresses = _addresses()
    count = min(len(addresses), max(least, words // (_PASSAGE + 10)))
    return [draws.choice(own) for own in draws.sample(addresses, count)]


def who_said(draws: random.Random, number: int, words: int) -> dict[str, Any]:
    """Return a row for hotpotqa: passages under president and year; who said a sentence of one of them?"""
    shown = _some(draws, words)
    wanted = draws.choice(shown)
    sentence = max(re.split(r"(?<=[.!?]) ", wanted.text), key=len)
    context = "\n\n".join(
        f"Passage {place}:\nPresident {passage.president}, {passage.year}\n{passage.text}"
        for place, passage in enumerate(shown, 1)
    )
    if draws.random() < 0.5:
        return _row("hotpotqa", number, context, f'In which year did a president say: "{sentence}"', [wanted.year])
    full = wanted.president
    return _row("hotpotqa", number, context, f'Which president said: "{sentence}"', [full, full.split()[-1]])


def classify(draws: random.Random, number: int, words: int) -> dict[str, Any]:
    """Return a row for trec: worked examples of passages and the century they are from; the last is to be named."""
    shown = _some(draws, words, least=6)
    *worked, asked = shown
    classes = ["18th century", "19th century", "20th century", "21st century"]

    def century(passage: Passage) -> str:
        return classes[int(passage.year[:2]) - 17]

    context = "\n".join(f"Question: {passage.text}\nType: {century(passage)}" for passage in worked)
    return _row("trec", number, context, f"Question: {asked.text}\nType:", [century(asked)], all_classes=classes)


def find_paragraph(draws: random.Random, number: int, words: int) -> dict[str, Any]:
    """Return a row for passage_retrieval_en: which paragraph do the words of a gapped extract come from?

    The released rows ask with a written abstract. Here every other sentence of the paragraph stands for one.
    """
    shown = _some(draws, words)
    place = draws.randrange(len(shown))
    sentences = re.split(r"(?<=[.!?]) ", shown[place].text)
    extract = " ".join(sentences[::2])
    context = "\n\n".join(f"Paragraph {index}: {passage.text}" for index, passage in enumerate(shown, 1))
    return _row("passage_retrieval_en", number, context, extract, [f"Paragraph {place + 1}"])


def count_paragraphs(draws: random.Random, number: int, words: int) -> dict[str, Any]:
    """Return a row for passage_count: how many different paragraphs are there among repeated ones?"""
    shown = _some(draws, words)
    different = shown[: draws.randint(2, len(shown))]
    mixed = different + [draws.choice(different) for _ in range(len(shown) - len(different))]
    draws.shuffle(mixed)
    context = "\n\n".join(f"Paragraph {place}: {passage.text}" for place, passage in enumerate(mixed, 1))
    return _row("passage_count", number, context, "", [str(len(different))])


def pass_key(draws: random.Random, number: int, words: int) -> dict[str, Any]:
    """Return a row for InfiniteBench's passkey, hidden in real passages."""
    key = str(draws.randrange(10_000, 100_000))
    shown = [passage.text for passage in _some(draws, words)]
    shown.insert(draws.randrange(len(shown) + 1), f"The pass key is {key}. Remember it. {key} is the pass key.")
    return _answered(number, "\n\n".join(shown), "What is the pass key?", [key])


def number_string(draws: random.Random, number: int, words: int) -> dict[str, Any]:
    """Return a row for number_string: ten digits, each of them repeated, hidden in real passages."""
    digits = "".join(draws.choice("123456789") * draws.randint(1, 3) for _ in range(6))[:10]
    shown = [passage.text for passage in _some(draws, words)]
    told = f"The sequence of digits is {digits}. Remember it. {digits} is the sequence of digits."
    shown.insert(draws.randrange(len(shown) + 1), told)
    return _answered(number, "\n\n".join(shown), "What is the sequence of digits?", [digits])


def key_values(draws: random.Random, number: int, words: int) -> dict[str, Any]:
    """Return a row for kv_retrieval: one value of a JSON object of random keys and values."""
    pairs = [(_uuid(draws), _uuid(draws)) for _ in range(max(4, words // 12))]
    key, value = draws.choice(pairs)
    context = "JSON data:\n{" + ", ".join(f'"{left}": "{right}"' for left, right in pairs) + "}"
    return _answered(number, context, f'Key: "{key}"\nThe value associated with the specified key is: ', [value])


def find_number(draws: random.Random, number: int, words: int) -> dict[str, Any]:
    """Return a row for math_find: the largest or smallest of a list of numbers."""
    values = [draws.randrange(1, 100) for _ in range(max(8, words // 2))]
    what, answer = draws.choice([("largest", max(values)), ("smallest", min(values))])
    asked = f"You should answer with only one number, no other words. The {what} number of the list is: "
    return _answered(number, str(values), asked, [str(answer)])


def call_function(draws: random.Random, number: int, words: int) -> dict[str, Any]:
    """Return a row for code_run: functions that add or subtract and call one another, and a call to work out."""
    count = max(4, words // 12)
    changes = [draws.randrange(-9, 10) for _ in range(count)]
    # A call goes three functions down, to later ones only.
    lines = []
    for index, change in enumerate(changes):
        inner = f"func_{index + 1}(x + {change})" if index % 3 < 2 and index + 1 < count else f"x + {change}"
        lines.append(f"def func_{index}(x):\n    return {inner}\n".replace("+ -", "- "))
    start, value = draws.randrange(count), draws.randrange(10)
    end = start
    while end % 3 < 2 and end + 1 < count:
        end += 1
    result = value + sum(changes[start : end + 1])
    asked = f"Please give me the exact number of the return value of func_{start}({value})."
    return _answered(number, "\n".join(lines), asked, [str(result)])


def _answered(number: int, context: str, asked: str, answer: Sequence[str]) -> dict[str, Any]:
    """Return a row of InfiniteBench."""
    return {"id": number, "context": context, "input": asked, "answer": list(answer), "options": []}


def _uuid(draws: random.Random) -> str:
    """Return a random key in the form that the released rows have."""
    return str(uuid.UUID(int=draws.getrandbits(128), version=4))


Maker = Callable[[random.Random, int, int], dict[str, Any]]
#: tasks of LongBench that the catalog has texts for
LONGBENCH: dict[str, Maker] = {
    "hotpotqa": who_said,
    "trec": classify,
    "passage_count": count_paragraphs,
    "passage_retrieval_en": find_paragraph,
}
#: tasks of InfiniteBench that need no texts, or only such as the catalog has
INFINITEBENCH: dict[str, Maker] = {
    "passkey": pass_key,
    "number_string": number_string,
    "kv_retrieval": key_values,
    "math_find": find_number,
    "code_run": call_function,
}


def rows(makers: dict[str, Maker], task: str, count: int, words: int, seed: int = 42) -> list[dict[str, Any]]:
    """Return ``count`` rows of a task, each with a context of about ``words`` words; the same for the same seed.

    Raises:
        ValueError: the catalog has no data for the task, or numbers out of range.
        OSError: the catalog's data cannot be fetched.

    >>> made = rows(INFINITEBENCH, "kv_retrieval", 1, 100)[0]
    >>> made["answer"][0] in made["context"]
    True
    """
    if task not in makers:
        raise ValueError(f"there is no offline data for {task!r}, only for {', '.join(makers)}: give --data")
    if count < 1 or words < 1:
        raise ValueError(f"count and words must be at least 1, got {count} and {words}")
    draws = random.Random(f"{seed}/{task}")
    return [makers[task](draws, number, words) for number in range(count)]


def definitions(count: int, seed: int = 42) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Return rows for MMLU, and as many for worked examples as a prompt may want: which word has a definition?

    Wrong choices are words of the same part of speech and field (animal, food, motion, …) of WordNet.

    Raises:
        ValueError: ``count`` is below 1.
        OSError: the catalog's WordNet cannot be fetched.
    """
    if count < 1:
        raise ValueError(f"count must be at least 1, got {count}")
    draws = random.Random(seed)
    fields: dict[tuple[str, str], list[tuple[str, str]]] = {}
    for kind in ("noun", "verb"):
        text = (catalog.path("wordnet") / "dict" / f"data.{kind}").read_text(encoding="utf-8")
        for line in text.splitlines():
            if not line.startswith(" "):
                _, field, _, _, word, *_ = line.split(" ", 5)
                gloss = line.partition("| ")[2].partition(";")[0].strip()
                # Names and phrases, and definitions that hold the word, give the answer away.
                if word.isalpha() and word.islower() and len(gloss.split()) > 4 and word not in gloss:
                    fields.setdefault((kind, field), []).append((word, gloss))
    sorts = [own for own in fields.values() if len(own) >= 100]
    made = []
    for _ in range(count + _WORKED):
        four = draws.sample(draws.choice(sorts), 4)
        right = draws.randrange(4)
        asked = f'Which word is defined as "{four[right][1]}"?'
        choices = [word for word, _ in four]
        made.append({"query": asked, "subject": "word_definitions", "choices": choices, "answer": right})
    numbered = [{"query_id": number, **row} for number, row in enumerate(made[:count])]
    return numbered, made[count:]


#: rows for worked examples
_WORKED = 5
