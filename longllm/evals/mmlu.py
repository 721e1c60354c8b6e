"""MMLU (arXiv 2009.03300) by option likelihood: one reading of a question gives the likelihoods of all four letters."""

from __future__ import annotations

import functools
import random
import time
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from typing import Any

from longllm.evals.rows import field
from longllm.evals.task import Answer, Answerer, Example, Row

LETTERS = "ABCD"
#: fields that a row of the data must have
NEEDS = ("query|question", "subject", "choices", "answer")
HEADER = "The following are multiple choice questions (with answers) about {subject}.\n\n"
#: where subjects go that are not among the 57
OTHER = "Own subjects"


@functools.cache
def groups() -> dict[str, str]:
    """Return the group of each of the 57 subjects.

    >>> len(groups()), groups()["anatomy"]
    (57, 'Others')
    """
    text = resources.files(__package__).joinpath("mmlu.toml").read_text(encoding="utf-8")
    return {subject: group for group, subjects in tomllib.loads(text).items() for subject in subjects}


@dataclass(frozen=True)
class Mmlu:
    """Questions of MMLU, answered by the letter that is likeliest after "Answer:".

    >>> row = {"query": "What is white?", "subject": "sea", "choices": ["whale", "ink", "coal", "tar"], "answer": 0}
    >>> print(next(Mmlu([row]).examples(None)).prompt)
    The following are multiple choice questions (with answers) about sea.
    <BLANKLINE>
    What is white?
    A. whale
    B. ink
    C. coal
    D. tar
    Answer:
    """

    rows: Sequence[Mapping[str, Any]]
    dev: Sequence[Mapping[str, Any]] = ()
    """rows that worked examples are taken from, of the same subject"""
    few_shot: int = 0
    chat: bool = True
    """whether the question is a user's turn; else a text that goes on with the letter"""
    name: str = "mmlu"

    def __post_init__(self) -> None:
        """Refuse rows out of order and examples that are not there.

        Raises:
            ValueError: a ``query_id`` that is not the row's number, four choices that are not four, an answer that is
                none of them, or a subject with fewer worked examples than asked for.
        """
        if self.few_shot < 0:
            raise ValueError(f"few_shot must be 0 or more, got {self.few_shot}")
        for number, row in enumerate(self.rows):
            if int(row.get("query_id", number)) != number:
                raise ValueError(f"row {number} has the query_id {row['query_id']}: rows must be whole and in order")
        for number, row in enumerate([*self.rows, *self.dev]):
            if len(row["choices"]) != len(LETTERS) or row["answer"] not in range(len(LETTERS)):
                raise ValueError(f"row {number} needs four choices and an answer from 0 to 3, got {row['answer']!r}")
        for subject in dict.fromkeys(str(row["subject"]) for row in self.rows):
            if (known := len(self._worked(subject))) < self.few_shot:
                raise ValueError(f"{subject} has {known} dev rows, few_shot asks for {self.few_shot}")

    def examples(self, tokenizer: Any) -> Iterator[Example]:
        """Yield one example per row; nothing is ever left out of a question."""
        for number, row in enumerate(self.rows):
            subject = str(row["subject"])
            worked = "".join(f"{question(own)} {LETTERS[own['answer']]}\n\n" for own in self._worked(subject))
            prompt = HEADER.format(subject=subject.replace("_", " ").strip()) + worked + question(row)
            facts = {"subject": subject}
            yield Example(
                f"{number}", prompt, (LETTERS[row["answer"]],), 1, chat=self.chat, truncate="error", facts=facts
            )

    def measure(self, answerer: Answerer, example: Example) -> tuple[Answer, dict[str, float]]:
        """Return the likeliest letter, and whether it is right."""
        begun = time.perf_counter()
        # After a template's assistant header the letter begins the turn; a text goes on with a space.
        scores = answerer.option_scores(example, [letter if example.chat else f" {letter}" for letter in LETTERS])
        best = LETTERS[max(range(len(LETTERS)), key=scores.__getitem__)]
        facts = {"log_likelihoods": [round(score, 5) for score in scores]}
        return Answer(best, seconds=time.perf_counter() - begun, facts=facts), self.score(example, best)

    def score(self, example: Example, answer: str) -> dict[str, float]:
        """Return whether a letter is the right one."""
        return {"accuracy": float(answer == example.references[0])}

    def summarise(self, rows: Sequence[Row]) -> dict[str, Any]:
        """Return the accuracy (per cent, two decimals) of each subject, and means of subjects by group and of all."""
        found: dict[str, list[float]] = {}
        for row in rows:
            found.setdefault(row.facts["subject"], []).append(row.scores["accuracy"])
        subjects = {subject: 100 * sum(right) / len(right) for subject, right in sorted(found.items())}
        means: dict[str, float] = {}
        for group in [*dict.fromkeys(groups().values()), OTHER]:
            own = [value for subject, value in subjects.items() if groups().get(subject, OTHER) == group]
            if own:
                means[group] = round(sum(own) / len(own), 2)
        if subjects:
            means["All"] = round(sum(subjects.values()) / len(subjects), 2)
        return {"groups": means, "subjects": {name: round(value, 2) for name, value in subjects.items()}}

    def _worked(self, subject: str) -> list[Mapping[str, Any]]:
        """Return the worked examples of a subject."""
        return [row for row in self.dev if row["subject"] == subject][: self.few_shot]


def question(row: Mapping[str, Any]) -> str:
    """Return a question with its options, up to where the letter is to come."""
    options = "\n".join(f"{letter}. {text}" for letter, text in zip(LETTERS, row["choices"], strict=True))
    return f"{field(row, 'query', 'question')}\n{options}\nAnswer:"


def sample(rows: Sequence[Mapping[str, Any]], count: int, seed: int = 42) -> list[Mapping[str, Any]]:
    """Return ``count`` rows drawn without replacement, in their order and numbered anew; 0 = all as they are.

    >>> [row["query_id"] for row in sample([{"query_id": n} for n in range(9)], 3)]
    [0, 1, 2]
    """
    if not count or count >= len(rows):
        return list(rows)
    drawn = sorted(random.Random(seed).sample(range(len(rows)), count))
    return [{**rows[index], "query_id": number} for number, index in enumerate(drawn)]
