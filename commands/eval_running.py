"""What the commands that run one task have in common: who answers, the run, its parts, its picture."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from commands.eval_answerer import AnswererChoice, build

if TYPE_CHECKING:
    from longllm.evals.task import Answerer, Task


@dataclass(frozen=True)
class Share:
    """Which part of a run this machine does.

    Raises:
        ValueError: there is no such part.

    >>> Share("out", 1, 4).parts
    4
    """

    out: str
    """folder of the results"""
    part: int = 0
    """number of this part, from 0"""
    parts: int = 1
    """parts that the examples are dealt out to"""

    def __post_init__(self) -> None:
        """Refuse a part that does not exist."""
        if not 0 <= self.part < self.parts:
            raise ValueError(f"part must be one of 0 … {self.parts - 1}, got {self.part}")

    @property
    def folder(self) -> Path:
        """Return the folder of the results."""
        return Path(self.out)


def answerer_of(choice: AnswererChoice, longest: int, reaching: int = 0) -> tuple[Answerer, list[str]]:
    """Return who answers, and warnings about what will make answers worse.

    Args:
        choice: of the command line.
        longest: tokens of the longest prompt.
        reaching: tokens beyond it that chat frame and answer may take.

    Raises:
        ValueError: what spoils an evaluation silently (``longllm.evals.checks``), or as ``longllm.load``.
    """
    from longllm.evals.answerers import LocalAnswerer
    from longllm.evals.checks import check_model
    from longllm.prompts import length_warning

    answerer = build(choice)
    if not isinstance(answerer, LocalAnswerer):
        return answerer, []
    # Lengths beyond the trained one are what such a task is there to try: a warning, no refusal.
    found = check_model(answerer.loaded, compressed=choice.method != "full")
    beyond = length_warning(longest + reaching, answerer.loaded.trained_length) if choice.method == "full" else None
    return answerer, [*found, *([beyond] if beyond else [])]


def run_task(
    task: Task,
    choice: AnswererChoice,
    share: Share,
    *,
    longest: int,
    settings: Mapping[str, Any],
    figure: Callable[[Mapping[str, Any], Path], Any] | None = None,
    answerer: Answerer | None = None,
) -> Iterator[str | dict[str, Any]]:
    """Run one task and yield what it found; the last part of a run in parts puts them together.

    Args:
        task: what is asked.
        choice: who answers.
        share: where results go, and which part of them is made here.
        longest: tokens of the longest prompt.
        settings: what must be the same when a run goes on.
        figure: draws a summary into a file (named without its ending).
        answerer: who answers, if it has been made already.
    """
    from longllm.evals.heatmap import figure as drawing
    from longllm.evals.run import evaluate, joined

    if figure is not None:
        drawing()  # refuse early, before minutes of work, if pictures cannot be drawn
    if answerer is None:
        answerer, warnings = answerer_of(choice, longest)
        yield "".join(f"note: {line}\n" for line in warnings)
    out, part, parts = share.folder, share.part, share.parts
    fixed = {**choice.settings, **settings}
    summary = evaluate(task, answerer, out, settings=fixed, part=part, parts=parts, progress=True)
    name = task.name
    if parts > 1:
        name = f"{task.name}.{part}-of-{parts}"
        if all((out / f"{task.name}.{other}-of-{parts}.json").is_file() for other in range(parts)):
            summary, name = joined(task, out, parts), task.name
    if figure is not None and name == task.name:
        figure(summary, out / name)
    yield {**summary, "out": str(out), "written": f"{name}.json"}


def shown(lengths: Mapping[str, Mapping[str, Any]], score: str) -> str:
    """Return a score by length as lines of text.

    >>> shown({"8192": {"n": 4, "rouge_l": 0.5}}, "rouge_l")
    '    8,192 tokens: rouge_l 0.50 (n = 4)\\n'
    """
    lines = []
    for length, found in lengths.items():
        value = found[score] if score in found else found["accuracy"]
        low_high = "" if "interval" not in found else " [{:.2f}, {:.2f}]".format(*found["interval"])
        lines.append(f"{int(length):>9,} tokens: {score} {value:.2f}{low_high} (n = {found['n']})\n")
    return "".join(lines)


def heat(label: str, score: str, legend: str, bounds: tuple[float, float] = (0.0, 1.0)) -> Callable[..., Any]:
    """Return what draws the cells of a summary as one heat map."""

    def draw(summary: Mapping[str, Any], file: Path) -> Sequence[Path]:
        from longllm.evals.cells import panel
        from longllm.evals.heatmap import heatmap

        title = f"{label}: {summary['answerer']}"
        return heatmap([[panel(title, summary["cells"], score)]], file, label=legend, bounds=bounds)

    return draw
