"""What the retrieval commands share: who answers at any length, the run with its heat map, figures by length."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from commands.eval_answerer import AnswererChoice, build
from commands.eval_runs import Share, run_task

if TYPE_CHECKING:
    from longllm.evals.task import Answerer, Task


def answerer_of(choice: AnswererChoice, longest: int) -> tuple[Answerer, str]:
    """Return who answers prompts of up to ``longest`` tokens, and notes about what will make answers worse.

    Lengths beyond the trained one, and beyond the model's positions, are what these tasks are there to try: they are
    noted, not refused.

    Raises:
        ValueError: what spoils an evaluation silently (``longllm.evals.checks``), or as ``longllm.load``.
    """
    from longllm.evals.answerers import LocalAnswerer
    from longllm.evals.checks import check_model
    from longllm.prompts import length_warning

    answerer = build(choice, longest)
    if not isinstance(answerer, LocalAnswerer):
        return answerer, ""
    compressed = choice.method != "full"
    found = check_model(answerer.loaded, compressed=compressed)
    beyond = None if compressed else length_warning(longest, answerer.loaded.trained_length)
    return answerer, "".join(f"note: {line}\n" for line in [*found, *([beyond] if beyond else [])])


def run_figured(
    task: Task,
    answerer: Answerer,
    share: Share,
    settings: Mapping[str, Any],
    figure: Callable[[Mapping[str, Any], Path], Any] | None = None,
) -> Iterator[str | dict[str, Any]]:
    """Run this process's share of a task; where the whole is there, draw it and yield its summary.

    Args:
        task: what is asked.
        answerer: who answers.
        share: where results go, and which part of them is made here.
        settings: what must be the same when a run goes on.
        figure: draws a summary into a file (named without its ending).
    """
    if figure is not None:
        from longllm.evals.heatmap import figure as drawing

        drawing()  # refuse early, before minutes of work, if pictures cannot be drawn
    summary = run_task(task, answerer, share, settings)
    if summary is None:
        yield f"{task.name}: part {share.part} of {share.parts} is done, others are missing\n"
        yield {"task": task.name, "answerer": answerer.name, "out": share.out, "missing_parts": True}
        return
    if figure is not None:
        figure(summary, Path(share.out) / task.name)
    yield {**summary, "out": share.out}


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
