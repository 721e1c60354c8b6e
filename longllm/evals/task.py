"""What an evaluation is: a task that makes examples and scores answers, and an answerer that gives them.

Tasks know no model and answerers know no task, so that a plain model, one with a compressed memory and a server behind
an OpenAI-compatible endpoint are all evaluated by the same code (``longllm.evals.run``).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, runtime_checkable

Truncate = Literal["middle", "left", "error", "never"]


@dataclass(frozen=True)
class Shared:
    """The beginning that a prompt has in common with others: whoever can reads it once and asks them all.

    >>> Shared(tokens=4000, reach=4096).reach
    4096
    """

    tokens: int
    """how many leading ids of ``Example.ids``"""
    reach: int
    """positions that the longest of these prompts takes, its answer included, the chat frame not counted"""


@dataclass(frozen=True)
class Example:
    """One question of a task, as text; how it is wrapped and cut to size is the answerer's business.

    >>> Example("qasper/3", "A paper …\\n\\nWhich data set is used?", ("SQuAD",), max_new_tokens=128).chat
    True
    """

    name: str
    """unique within the task, and the same in every run: results are resumed by it"""
    prompt: str
    references: tuple[str, ...]
    max_new_tokens: int
    chat: bool = True
    """whether the prompt is a user's turn; else the model continues it"""
    stop_at_newline: bool = False
    truncate: Truncate = "middle"
    """what to leave out of a prompt that is too long; never: the task has cut it to size itself"""
    ids: tuple[int, ...] | None = None
    """the prompt as ids of the tokeniser that the task was given, where a length must be exact"""
    facts: Mapping[str, Any] = field(default_factory=dict)
    """what scoring and tables need: depth, length, classes, language; JSON values"""
    shared: Shared | None = None
    """what an answerer may read once for this and its neighbours"""
    enough: str = ""
    """regular expression: nothing that follows its first match changes the scores, so the answer may end there"""


@dataclass(frozen=True)
class Answer:
    """What an answerer gave.

    >>> Answer("42").seconds
    0.0
    """

    text: str
    tokens_seen: int = 0
    """tokens of the prompt that were read, after cutting"""
    tokens_cut: int = 0
    """tokens that were left out"""
    seconds: float = 0.0
    facts: Mapping[str, Any] = field(default_factory=dict)
    """KV bytes, speed, cost: JSON values"""


class Task(Protocol):
    """Makes examples and scores answers; ``summarise`` makes the table from the rows of a run."""

    @property
    def name(self) -> str:
        """Return the name of the task and of its files."""
        ...

    def examples(self, tokenizer: Any) -> Iterable[Example]:
        """Yield the examples, always the same ones in the same order; ``tokenizer`` counts lengths, or is None."""
        ...

    def score(self, example: Example, answer: str) -> dict[str, float]:
        """Return the named scores of one answer, 0 to 1 unless the task says otherwise."""
        ...

    def summarise(self, rows: Sequence[Row]) -> dict[str, Any]:
        """Return the figures of a run as JSON values."""
        ...


@runtime_checkable
class Measuring(Protocol):
    """What a task is as well if it wants likelihoods instead of an answer in words."""

    def measure(self, answerer: Answerer, example: Example) -> tuple[Answer, dict[str, float]]:
        """Return what the answerer gives for one example, and its named scores."""
        ...


class Answerer(Protocol):
    """Gives answers. What it cannot do (an endpoint shows no likelihoods) it refuses with NotImplementedError."""

    name: str
    tokenizer: Any
    """None where it is not known"""

    def generate(self, example: Example) -> Answer:
        """Return the answer to one example, greedily decoded."""
        ...

    def option_scores(self, example: Example, options: Sequence[str]) -> list[float]:
        """Return the log-likelihood of each option as the continuation of the prompt, from one reading of it."""
        ...

    def token_losses(self, ids: Sequence[int], first: int) -> list[float]:
        """Return the negative log-likelihood of each token from index ``first`` (at least 1) on, given those before."""
        ...


@dataclass(frozen=True)
class Row:
    """One answered and scored example, as a line of the results file."""

    name: str
    answer: str
    scores: dict[str, float]
    references: tuple[str, ...]
    facts: dict[str, Any]

    def record(self) -> dict[str, Any]:
        """Return the row as JSON values.

        >>> Row("a", "42", {"f1": 1.0}, ("42",), {}).record()["scores"]
        {'f1': 1.0}
        """
        return {
            "name": self.name,
            "answer": self.answer,
            "scores": self.scores,
            "references": list(self.references),
            "facts": self.facts,
        }

    @classmethod
    def of(cls, record: Mapping[str, Any]) -> Row:
        """Return the row that a line of a results file holds."""
        return cls(
            record["name"], record["answer"], dict(record["scores"]), tuple(record["references"]), dict(record["facts"])
        )


def mean_scores(rows: Iterable[Row]) -> dict[str, float]:
    """Return the mean of every score over the rows that have it.

    >>> mean_scores([Row("a", "", {"f1": 1.0}, (), {}), Row("b", "", {"f1": 0.0, "em": 1.0}, (), {})])
    {'f1': 0.5, 'em': 1.0}
    """
    found: dict[str, list[float]] = {}
    for row in rows:
        for name, value in row.scores.items():
            found.setdefault(name, []).append(value)
    return {name: sum(values) / len(values) for name, values in found.items()}


def shard(examples: Iterable[Example], part: int, parts: int) -> Iterator[Example]:
    """Yield every ``parts``-th example, from ``part`` (0 …) on.

    Raises:
        ValueError: there is no such part.

    >>> [x.name for x in shard([Example(str(n), "", (), 1) for n in range(5)], 1, 2)]
    ['1', '3']
    """
    if not 0 <= part < parts:
        raise ValueError(f"part must be one of 0 … {parts - 1}, got {part}")
    for index, example in enumerate(examples):
        if index % parts == part:
            yield example
