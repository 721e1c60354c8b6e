"""LongBench v1 (arXiv 2308.14508): 21 tasks, their prompts, and scores comparable with published tables."""

from __future__ import annotations

import functools
import tomllib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import resources
from typing import Any

from longllm.evals import scorers
from longllm.evals.rows import field as value_of
from longllm.evals.task import Example, Row, mean_scores
from longllm.evals.truncation import Keep, shortened

#: longest prompt before the chat template, in tokens, as the published tables have it
MAX_LENGTH = 31_500
#: metric -> score of an answer against one reference
METRICS: dict[str, Callable[[str, str], float]] = {
    name: getattr(scorers, name)
    for name in (
        "qa_f1", "qa_f1_zh", "rouge_l", "rouge_l_zh", "count", "retrieval", "retrieval_zh", "code_similarity",
    )
}  # fmt: skip
#: fields that a row of the data must have
NEEDS = ("input|question", "context", "answers")


@dataclass(frozen=True)
class Kind:
    """One of the 21 tasks.

    >>> kinds()["trec"].chat, kinds()["hotpotqa"].newline_stop
    (False, True)
    """

    name: str
    category: str
    language: str
    metric: str
    new_tokens: int
    prompt: str
    chat: bool = True
    """whether the prompt is a user's turn; few-shot and code tasks are texts to be continued"""
    newline_stop: bool = False
    """whether an answer ends with its line. The reference stops at the newline token alone; here, as the text is what
    is looked at, at a newline inside a longer token (".\\n\\n") too. No model's settings are touched either way."""
    first_line: bool = False
    """whether only the first line of an answer is scored"""


@functools.cache
def _table() -> dict[str, Any]:
    """Return the data file of the tasks."""
    return tomllib.loads(resources.files(__package__).joinpath("longbench.toml").read_text(encoding="utf-8"))


def kinds() -> dict[str, Kind]:
    """Return the 21 tasks by name.

    >>> len(kinds()), kinds()["gov_report"].new_tokens
    (21, 512)
    """
    return {name: Kind(name, **settings) for name, settings in _table()["tasks"].items()}


def chosen(names: str) -> list[str]:
    """Return the tasks that words such as ``default``, ``published``, ``all`` or ``qasper,trec`` mean, in order.

    Raises:
        ValueError: a name that is none.

    >>> chosen("trec, qasper"), len(chosen("default")), len(chosen("published")), len(chosen("all"))
    (['qasper', 'trec'], 14, 16, 21)
    """
    wanted: set[str] = set()
    for name in filter(None, (part.strip() for part in names.split(","))):
        if name == "all":
            wanted |= kinds().keys()
        elif name in ("default", "published"):
            wanted |= set(_table()[name])
        elif name in kinds():
            wanted.add(name)
        else:
            raise ValueError(f"LongBench has no task {name!r}: name default, published, all or of {', '.join(kinds())}")
    if not wanted:
        raise ValueError("no task was named")
    return [name for name in kinds() if name in wanted]


@dataclass(frozen=True)
class LongBench:
    """One task of LongBench over its rows; with a tokeniser, prompts are cut to size before the chat template.

    >>> row = {"input": "Who?", "context": "Ahab is the captain.", "answers": ["Ahab"], "_id": "x"}
    >>> task = LongBench(kinds()["hotpotqa"], [row])
    >>> next(task.examples(None)).prompt[-22:], task.score(next(task.examples(None)), "The Ahab.")
    ('Question: Who?\\nAnswer:', {'score': 1.0})
    """

    kind: Kind
    rows: Sequence[Mapping[str, Any]]
    max_length: int = MAX_LENGTH
    """tokens of a prompt without the chat template; 0 = all"""
    leave_out: Keep = "middle"
    name: str = field(init=False)

    def __post_init__(self) -> None:
        """Name the task and its results file."""
        if self.max_length < 0:
            raise ValueError(f"max_length must be 0 (no limit) or a number of tokens, got {self.max_length}")
        object.__setattr__(self, "name", f"longbench-{self.kind.name}")

    def examples(self, tokenizer: Any) -> Iterator[Example]:
        """Yield one example per row."""
        for number, row in enumerate(self.rows):
            texts = {"context": str(row["context"]), "input": str(value_of(row, "input", "question"))}
            prompt, left_out = self.kind.prompt.format(**texts), 0
            if tokenizer is not None:
                prompt, left_out = shortened(tokenizer, prompt, self.max_length, self.leave_out)
            answers = row["answers"]
            facts = {"left_out": left_out, "length": row.get("length")}
            if self.kind.metric == "classification":
                facts["classes"] = list(row.get("all_classes") or ())
            yield Example(
                f"{number}", prompt, (answers,) if isinstance(answers, str) else tuple(map(str, answers)),
                self.kind.new_tokens, chat=self.kind.chat, stop_at_newline=self.kind.newline_stop,
                truncate="middle" if tokenizer is None else "never", facts=facts,
            )  # fmt: skip

    def score(self, example: Example, answer: str) -> dict[str, float]:
        """Return the best score over the references."""
        if self.kind.first_line:
            answer = answer.lstrip("\n").partition("\n")[0]
        if self.kind.metric == "classification":
            # The classes of this row, not those of the first one.
            metric: scorers.Scorer = functools.partial(scorers.classification, classes=example.facts["classes"])
        else:
            metric = METRICS[self.kind.metric]
        return {"score": scorers.best(metric, answer, example.references)}

    def summarise(self, rows: Sequence[Row]) -> dict[str, Any]:
        """Return the task's score, the mean times 100 with two decimals, and how many prompts had to be cut."""
        mean = mean_scores(rows).get("score", 0.0)
        cut = sum(1 for row in rows if row.facts.get("left_out") or row.facts.get("tokens_cut"))
        metric, category = self.kind.metric, self.kind.category
        return {"score": round(100 * mean, 2), "metric": metric, "category": category, "cut": cut}


def table(scores: Mapping[str, float]) -> dict[str, Any]:
    """Return what a table shows of task scores: means of each category, of all tasks, and of the published 16.

    All are plain means of task scores; the published average is None unless all of its tasks were run.

    >>> table({"qasper": 20.0, "narrativeqa": 10.0, "trec": 60.0})["categories"]
    {'Single-Doc QA': 15.0, 'Few-shot': 60.0}
    """
    groups: dict[str, list[float]] = {}
    for name, kind in kinds().items():
        if name in scores:
            groups.setdefault(kind.category, []).append(scores[name])
    published = [scores[name] for name in _table()["published"] if name in scores]
    whole = len(published) == len(_table()["published"])
    return {
        "tasks": {name: scores[name] for name in kinds() if name in scores},
        "categories": {name: _mean(group) for name, group in groups.items()},
        "average": _mean(list(scores.values())),
        "published_average": _mean(published) if whole else None,
    }


def _mean(values: Sequence[float]) -> float:
    """Return a mean with two decimals."""
    return round(sum(values) / len(values), 2)
