"""``longscope eval mmlu``: short-context knowledge by the likelihood of the four letters."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from commands.eval_answerer import AnswererChoice


def mmlu(
    *,
    data: str = "",
    dev: str = "",
    few_shot: int = 0,
    chat: bool = True,
    sample: int = 0,
    limit: int = 0,
    part: int = 0,
    parts: int = 1,
    out: str = "out/mmlu",
    seed: int = 42,
    **answerer: Any,
) -> Iterator[str | dict[str, Any]]:
    """Evaluate on MMLU (arXiv 2009.03300): is the letter of the right choice the likeliest one?

    Each question is read once. Without --data, questions for the definitions of words are made from the catalog's
    WordNet. A run that was interrupted goes on when the command is given again.

        longscope eval mmlu --data mmlu/test.jsonl
        longscope eval mmlu --data hub:cais/mmlu --few_shot 5 --no_chat
        longscope eval mmlu --sample 200

    Args:
        data: a file of rows (query or question, subject, choices, answer), or hub:OWNER/DATASET; empty = WordNet
        dev: such rows for worked examples; of a data set on the hub its split dev unless named
        few_shot: worked examples of the same subject before each question
        chat: put the question into the chat template; off, it is a text that goes on with the letter
        sample: draw so many questions at random; 0 = all, and 200 of WordNet
        limit: take only the first questions; 0 = all
        part: which of --parts this process does, from 0
        parts: shares that the questions are divided into, for several machines; the last to finish joins them
        out: folder of the results
        seed: of the drawing
        answerer: who answers
    """
    from commands import tour_plot
    from commands.eval_runs import Share, prepared, run_task
    from longllm.evals import offline
    from longllm.evals.mmlu import NEEDS, Mmlu
    from longllm.evals.mmlu import sample as drawn
    from longllm.evals.rows import HUB, read_rows
    from longllm.evals.run import written

    choice, share = AnswererChoice(**answerer), Share(out, part, parts, limit)
    if choice.endpoint:
        raise ValueError("an endpoint shows no likelihoods of given letters: MMLU needs a model on this machine")
    if data:
        rows, worked = read_rows(data, "all" if data.startswith(HUB) else "", NEEDS), []
        if few_shot:
            if not dev and not data.startswith(HUB):
                raise ValueError("few_shot needs rows for worked examples: give --dev")
            worked = read_rows(dev or data, "" if dev else "all", NEEDS, "dev")
        rows = drawn(rows, sample, seed)  # type: ignore[assignment]
    else:
        rows, worked = offline.definitions(sample or 200, seed)
    task = Mmlu(rows, worked, few_shot, chat)
    tour_plot.require()
    answers = prepared(choice, chat=chat)
    source = {"data": data or "wordnet", "sample": sample, "seed": seed, "few_shot": few_shot, "chat": chat}
    summary = run_task(task, answers, share, {**choice.settings, **source})
    if summary is None:
        yield f"part {part} of {parts} is done, others are missing\n"
        yield {"benchmark": "mmlu", "answerer": answers.name, "missing_parts": True, "out": out}
        return
    groups = summary["groups"]
    yield "".join(f"{name:<18} {value:6.2f}\n" for name, value in groups.items())
    record = {"benchmark": "mmlu", **summary, "out": out}
    written(Path(out) / "mmlu.json", record)
    tour_plot.bars(list(groups), {"accuracy (%)": list(groups.values())}, Path(out) / "mmlu.png")
    yield f"{summary['n']} questions; chance is 25\nwritten: {Path(out) / 'mmlu'}.json, .png, .svg\n"
    yield record
