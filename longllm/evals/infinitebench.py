"""InfiniteBench (arXiv 2402.13718): 12 tasks beyond 100K tokens, with the prompts of the family "mistral"."""

from __future__ import annotations

import functools
import re
import tomllib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import resources
from typing import Any

from longllm.evals import infinite_scorers as scorers
from longllm.evals.task import Example, Row, mean_scores
from longllm.evals.truncation import shortened

#: longest prompt before the chat template, in tokens; the published runs used 80,000
MAX_LENGTH = 128_000
#: metric -> score of an answer against the labels of a row
METRICS: dict[str, Callable[[str, Sequence[str]], float]] = {
    "qa_f1": scorers.qa_f1_best,
    "rouge_l": scorers.summary,
    **{
        name: getattr(scorers, name)
        for name in (
            "first_integer", "word", "name", "choice", "character_f1", "first_number", "leading_values", "last_integer",
            "faulty_function",
        )
    },
}  # fmt: skip
#: fields that a row of the data must have
NEEDS = ("context", "input", "answer")
_LETTERS = "ABCD"


@dataclass(frozen=True)
class Kind:
    """One of the 12 tasks.

    >>> kinds()["kv_retrieval"].metric
    'word'
    """

    name: str
    new_tokens: int
    metric: str
    prompt: str


@functools.cache
def _table() -> dict[str, Any]:
    """Return the data file of the tasks."""
    return tomllib.loads(resources.files(__package__).joinpath("infinitebench.toml").read_text(encoding="utf-8"))


def kinds() -> dict[str, Kind]:
    """Return the 12 tasks by name.

    >>> len(kinds()), kinds()["math_calc"].new_tokens
    (12, 30000)
    """
    return {name: Kind(name, **settings) for name, settings in _table()["tasks"].items()}


def chosen(names: str) -> list[str]:
    """Return the tasks that words such as ``default``, ``all`` or ``passkey,code_run`` mean, in order.

    Raises:
        ValueError: a name that is none.

    >>> chosen("default"), len(chosen("all"))
    (['longbook_sum_eng', 'longbook_qa_eng'], 12)
    """
    known, wanted = kinds(), set[str]()
    for name in filter(None, (part.strip() for part in names.split(","))):
        if name not in ("all", "default", *known):
            raise ValueError(f"InfiniteBench has no task {name!r}: name default, all or of {', '.join(known)}")
        wanted |= set(known if name == "all" else _table()["default"] if name == "default" else [name])
    if not wanted:
        raise ValueError("no task was named")
    return [name for name in known if name in wanted]


@dataclass(frozen=True)
class InfiniteBench:
    """One task of InfiniteBench over its rows; with a tokeniser, prompts are cut to size before the chat template.

    >>> row = {"context": "The pass key is 71432.", "input": "What is the pass key?", "answer": ["71432"]}
    >>> task = InfiniteBench(kinds()["passkey"], [row])
    >>> next(task.examples(None)).prompt[-15:], task.score(next(task.examples(None)), " 71432.")
    ('The pass key is', {'score': 1.0})
    """

    kind: Kind
    rows: Sequence[Mapping[str, Any]]
    max_length: int = MAX_LENGTH
    """tokens of a prompt without the chat template; 0 = all"""
    name: str = field(init=False)

    def __post_init__(self) -> None:
        """Name the task and its results file."""
        if self.max_length < 0:
            raise ValueError(f"max_length must be 0 (no limit) or a number of tokens, got {self.max_length}")
        object.__setattr__(self, "name", f"infinitebench-{self.kind.name}")

    def examples(self, tokenizer: Any) -> Iterator[Example]:
        """Yield one example per row."""
        for number, row in enumerate(self.rows):
            prompt, left_out = self.kind.prompt.format(**fields(self.kind, row)), 0
            if tokenizer is not None:
                prompt, left_out = shortened(tokenizer, prompt, self.max_length)
            yield Example(
                f"{number}", prompt, labels(self.kind, row), self.kind.new_tokens,
                truncate="middle" if tokenizer is None else "never", facts={"left_out": left_out},
            )  # fmt: skip

    def score(self, example: Example, answer: str) -> dict[str, float]:
        """Return the score of an answer."""
        return {"score": METRICS[self.kind.metric](answer, example.references)}

    def summarise(self, rows: Sequence[Row]) -> dict[str, Any]:
        """Return the mean score with four decimals, and how many prompts had to be cut."""
        cut = sum(1 for row in rows if row.facts.get("left_out") or row.facts.get("tokens_cut"))
        return {"score": round(mean_scores(rows).get("score", 0.0), 4), "metric": self.kind.metric, "cut": cut}


def fields(kind: Kind, row: Mapping[str, Any]) -> dict[str, str]:
    """Return what fills in a prompt.

    Raises:
        ValueError: a row that names no function call, no number to find, or not four options.

    >>> row = {"context": "[1, 2]", "input": "The second largest number of the list is: "}
    >>> fields(kinds()["math_find"], row)["wanted"]
    'What is the second largest number in the following list?'
    """
    texts = {"context": str(row["context"]), "input": str(row["input"])}
    if "{A}" in kind.prompt:
        options = [str(option) for option in row.get("options") or ()]
        if len(options) != len(_LETTERS):
            raise ValueError(f"a row of {kind.name} has {len(options)} options, four are needed")
        texts |= dict(zip(_LETTERS, options, strict=True))
    if "{call}" in kind.prompt:
        call = re.search(r"(func_\d+)\(-?\d+\)", texts["input"])
        if call is None:
            raise ValueError(f"a row of {kind.name} calls no function: {texts['input']!r}")
        texts |= {"call": call.group(), "function": call.group(1)}
    if "{wanted}" in kind.prompt:
        wanted = re.search(r"[Tt]he (.+) of", texts["input"])
        if wanted is None:
            raise ValueError(f"a row of {kind.name} asks for no number: {texts['input']!r}")
        texts["wanted"] = f"What is the {wanted.group(1).lower()} in the following list?"
    return texts


def labels(kind: Kind, row: Mapping[str, Any]) -> tuple[str, ...]:
    """Return a row's labels; of a multiple choice, the option's text and letter.

    Raises:
        ValueError: the answer is none of the options.

    >>> labels(kinds()["code_debug"], {"answer": "parse", "options": ["read", "parse", "cut", "join"]})
    ('parse', 'B')
    """
    answer = row["answer"]
    found = tuple(map(str, answer)) if isinstance(answer, list | tuple) else (str(answer),)
    if kind.metric not in ("choice", "faulty_function"):
        return found
    if len(found) == 2 and found[1] in _LETTERS:
        return found
    options = [str(option) for option in row["options"]]
    if found[0] not in options:
        raise ValueError(f"a row of {kind.name} has the answer {found[0]!r}, which is none of its options")
    return found[0], _LETTERS[options.index(found[0])]


def table(scores: Mapping[str, float]) -> dict[str, Any]:
    """Return the scores in the order of the tasks, and their plain mean with four decimals.

    >>> table({"passkey": 1.0, "code_run": 0.5})["average"]
    0.75
    """
    ordered = {name: scores[name] for name in kinds() if name in scores}
    return {"tasks": ordered, "average": round(sum(ordered.values()) / len(ordered), 4)}
