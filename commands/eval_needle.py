"""``longscope eval needle``: the needle in a haystack, at a grid of lengths and depths."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from commands.eval_answerer import AnswererChoice
from commands.eval_numbers import numbers
from commands.eval_running import answerer_of, heat, run_figured, shown
from commands.eval_runs import Share


def needle(
    *,
    lengths: str = "1K,2K,4K,8K",
    depths: str = "0-100:10",
    haystack: str = "moby-dick",
    start: float = 0.0,
    needle: str = "",
    question: str = "",
    judge: str = "",
    judge_model: str = "gpt-3.5-turbo-0125",
    out: str = "out/needle",
    part: int = 0,
    parts: int = 1,
    **answerer: Any,
) -> Iterator[str | dict[str, Any]]:
    """Hide a sentence at each depth of texts of each length, ask for it, and draw the heat map.

    A prompt has exactly its length before the chat frame; a haystack that is too short is repeated. Answers are scored
    with ROUGE-L against the sentence and, with --judge, marked from 1 to 10 by a language model. The published run is
    --lengths 8000-128000:20 on Paul Graham's essays with a judge. The same command goes on with an interrupted run.

    Args:
        lengths: tokens of the prompts: a list, or evenly spaced FROM-TO:COUNT; K stands for 1,024
        depths: per cent of the text before the sentence, in the same way
        haystack: a document of the catalog, a file, or a folder of .txt files, read in the order of their names
        start: share of the haystack that is left out at its beginning, 0 to 1
        needle: the sentence; by default the one about San Francisco
        question: what is asked; needed if the sentence is another one
        judge: address of an OpenAI-compatible server that marks the answers, such as https://api.openai.com/v1
        judge_model: name of the model there; its key is taken from OPENAI_API_KEY
        out: folder of the results
        part: number of this part, from 0, where several machines share the work
        parts: parts of the work; the last to end puts them together
    """
    from longllm.evals.haystack import read_haystack
    from longllm.evals.judge import Judge
    from longllm.evals.needle import NEEDLE, QUESTION, Needle

    if bool(needle.strip()) != bool(question.strip()):
        raise ValueError("needle and question go together: a sentence of your own needs the question it answers")
    choice, share = AnswererChoice(**answerer), Share(out, part, parts)
    marks = None
    if judge:
        from longllm.endpoint import Endpoint

        marks = Judge(Endpoint(judge, judge_model).ask)
    hay = read_haystack(haystack, start)
    where = numbers(lengths, "lengths"), numbers(depths, "depths")
    task = Needle(*where, hay, needle or NEEDLE, question or QUESTION, marks)
    settings = {"needle": task.needle, "question": task.question, **hay.facts, "judge": judge_model if judge else ""}
    figure = heat("needle", task.main_score, *(("judge's mark, 1 to 10", (1, 10)) if judge else ("ROUGE-L",)))
    who, notes = answerer_of(choice, max(where[0]))
    yield notes
    for piece in run_figured(task, who, share, {**choice.settings, **settings}, figure):
        if isinstance(piece, dict) and "by_length" in piece:
            yield shown(piece["by_length"], task.main_score) + f"written: {out}/{task.name}.jsonl, .json, .png, .svg\n"
        yield piece
