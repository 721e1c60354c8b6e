"""What the benchmark commands share: checks before a run, one task after another, the table and its picture."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from commands.eval_answerer import AnswererChoice, build

if TYPE_CHECKING:
    from longllm.evals.task import Answerer, Task

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Share:
    """Where results go, and which share of the examples is this process's.

    Raises:
        ValueError: no such part, or a negative limit.

    >>> Share("out", part=1, parts=4).whole
    False
    """

    out: str
    part: int = 0
    parts: int = 1
    limit: int = 0

    def __post_init__(self) -> None:
        """Refuse a share that is none before a model is loaded."""
        if not 0 <= self.part < self.parts:
            raise ValueError(f"part must be one of 0 to {self.parts - 1} (parts - 1), got {self.part}")
        if self.limit < 0:
            raise ValueError(f"limit must be 0 (all) or more, got {self.limit}")

    @property
    def whole(self) -> bool:
        """Say whether this process does everything."""
        return self.parts == 1


def prepared(choice: AnswererChoice, *, reach: int = 0, chat: bool = True) -> Answerer:
    """Return the answerer, after the checks that spare a worthless run; what only lowers quality goes to stderr.

    Args:
        choice: who answers.
        reach: longest text that will be read, in tokens; 0 = what the model was trained for.
        chat: whether prompts will be put into the chat template.

    Raises:
        ValueError: as ``longllm.evals.checks.check_model``.
    """
    from longllm.evals.answerers import LocalAnswerer
    from longllm.evals.checks import check_model

    answerer = build(choice, reach)
    if isinstance(answerer, LocalAnswerer):
        longest = reach or choice.max_length
        for warning in check_model(answerer.loaded, max_length=longest, chat=chat, compressed=choice.method != "full"):
            log.warning("longscope: %s", warning)
    return answerer


def prompt_room(answerer: Any, choice: AnswererChoice, usual: int, new_tokens: int) -> int:
    """Return how long a prompt may be before the chat template: as asked for, else as usual and as the model can.

    A model that reads everything keeps room for the template and the answer within its trained length, but never gives
    more than half of it to the answer. Without a tokeniser nothing can be counted, which 0 stands for.
    """
    from longllm.prompts import chat_frame

    if answerer.tokenizer is None:
        return 0
    if choice.max_length or choice.endpoint or choice.method != "full":
        return choice.max_length or usual
    trained = answerer.loaded.trained_length
    frame = sum(map(len, chat_frame(answerer.tokenizer))) if answerer.tokenizer.chat_template else 0
    return min(usual, max(trained - frame - new_tokens, trained // 2))


def run_task(task: Task, answerer: Answerer, share: Share, settings: Mapping[str, Any]) -> dict[str, Any] | None:
    """Run this process's share of a task; return the summary of the whole, None while other parts are missing."""
    from longllm.evals.run import evaluate, joined

    summary = evaluate(
        task, answerer, share.out, settings={**settings, **({"limit": share.limit} if share.limit else {})},
        part=share.part, parts=share.parts, limit=share.limit, progress=True,
    )  # fmt: skip
    if share.whole:
        return summary
    done = [Path(share.out) / f"{task.name}.{part}-of-{share.parts}.json" for part in range(share.parts)]
    return joined(task, share.out, share.parts) if all(path.is_file() for path in done) else None


def run_benchmark(
    name: str,
    tasks: Sequence[tuple[str, Task, dict[str, Any]]],
    answerer: Answerer,
    share: Share,
    table: Callable[[Mapping[str, float]], dict[str, Any]],
    label: str,
) -> Iterator[str | dict[str, Any]]:
    """Run tasks one by one, saying each score as it comes; yield the record of the whole, with table and picture.

    Args:
        name: of the benchmark, and of its files.
        tasks: (name, task, settings of its run).
        answerer: who answers.
        share: where to, and which part.
        table: makes the table from the scores.
        label: of the scores in the picture.
    """
    from commands.tour_plot import bars
    from longllm.evals.run import written

    scores: dict[str, float] = {}
    counts: dict[str, int] = {}
    cut: dict[str, int] = {}
    for short, task, settings in tasks:
        summary = run_task(task, answerer, share, settings)
        if summary is None:
            yield f"{short}: part {share.part} of {share.parts} is done, others are missing\n"
            continue
        scores[short], counts[short], cut[short] = summary["score"], summary["n"], summary["cut"]
        shortened = f", {summary['cut']} cut" if summary["cut"] else ""
        yield f"{short:<22} {summary['score']:>8}  ({summary['n']} questions{shortened})\n"
    record: dict[str, Any] = {"benchmark": name, "answerer": answerer.name, "out": share.out}
    if len(scores) < len(tasks):
        yield {**record, "missing_parts": True}
        return
    record |= {**table(scores), "n": counts, "cut": cut}
    folder = Path(share.out)
    written(folder / f"{name}.json", record)
    bars(list(record["tasks"]), {label: list(record["tasks"].values())}, folder / f"{name}.png")
    yield f"{'average':<22} {record['average']:>8}\nwritten: {folder / name}.json, .png, .svg\n"
    yield record
