"""``longscope eval generation``: answers to the first turns of conversations, against the answers given there."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from commands.eval_answerer import AnswererChoice


def generation(
    data: str,
    *,
    max_new_tokens: int = 256,
    rouge: bool = True,
    limit: int = 0,
    part: int = 0,
    parts: int = 1,
    out: str = "out/generation",
    **answerer: Any,
) -> Iterator[str | dict[str, Any]]:
    """Let a model answer the first user turn of each conversation, and compare with the assistant's turn there.

    Writes generation.jsonl with scores, and predictions.jsonl with prediction, target and index.

    Args:
        data: rows of conversations, as in training (.jsonl, .json, .parquet, or hub:OWNER/DATASET)
        max_new_tokens: longest answer in tokens
        rouge: score by ROUGE-1, -2 and -L; off, answers are only saved
        limit: take only the first rows; 0 = all
        part: which of --parts this process does, from 0
        parts: shares that rows are divided into, for several machines; the last to finish joins them
        out: folder of the results
        answerer: who answers
    """
    from commands import tour_plot
    from commands.eval_runs import Share, prepared, run_task
    from longllm.evals.generation import NEEDS, Generation, write_predictions
    from longllm.evals.rows import read_rows
    from longllm.evals.run import rows_of, written

    choice, share = AnswererChoice(**answerer), Share(out, part, parts, limit)
    task = Generation(read_rows(data, needs=NEEDS), max_new_tokens, rouge)
    tour_plot.require()
    answers = prepared(choice)
    settings = {**choice.settings, "data": data, "max_new_tokens": max_new_tokens, "rouge": rouge}
    summary = run_task(task, answers, share, settings)
    if summary is None:
        yield f"part {part} of {parts} is done, others are missing\n"
        yield {"benchmark": "generation", "answerer": answers.name, "missing_parts": True, "out": out}
        return
    folder = Path(out)
    write_predictions(rows_of(task.name, out, parts)[1], folder / "predictions.jsonl")
    scores = {name: summary[name] for name in ("rouge_1", "rouge_2", "rouge_l") if name in summary}
    yield "".join(f"{name:<8} {value:.4f}\n" for name, value in scores.items())
    record = {"benchmark": "generation", **summary, "out": out}
    written(folder / "generation.json", record)
    if scores:
        tour_plot.bars(
            list(scores), {"F, times 100": [100 * value for value in scores.values()]}, folder / "generation.png"
        )
    yield f"{summary['n']} answers\nwritten: {folder / 'generation'}.json, predictions.jsonl\n"
    yield record
