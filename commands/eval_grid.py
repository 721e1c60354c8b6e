"""``longscope eval grid``: needles at every depth and a pass key in one text, read once for all questions."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from commands.eval_answerer import AnswererChoice, build
from commands.eval_numbers import numbers


def grid(
    *,
    label: str = "",
    lengths: str = "4K,8K,16K,32K",
    depths: str = "0,11,22,33,44,55,66,77,88,100",
    texts: str = "3",
    haystack: str = "moby-dick",
    start: float = 0.0,
    out: str = "out/grid",
    seed: int = 123,
    new_tokens: int = 32,
    **answerer: Any,
) -> Iterator[str | dict[str, Any]]:
    """Ask a model for facts and a pass key that are hidden in long texts, each text read once for all its questions.

    Every text carries an invented fact at each depth and a pass key at one of them; which fact stands where turns from
    text to text. What is written is one line per answer, a summary with a 95 % interval per length, and a heat map.
    The same command goes on with a run that was interrupted, or adds lengths and texts to a finished one.

    Args:
        label: what tables and pictures call this run; by default the model's name and what is done with it
        lengths: tokens of the longest prompt of each text, chat frame and answer included; K stands for 1,024
        depths: per cent of the text before each fact
        texts: texts per length, one number for all lengths or one for each
        haystack: what the facts are hidden in: a document of the catalog, a file, or a folder of .txt files
        start: share of the haystack that is left out at its beginning, 0 to 1
        out: folder of the results
        seed: decides keys, facts and stretches of the haystack
        new_tokens: most tokens of an answer
    """
    from longllm.evals.grid import GridPlan, run_grid
    from longllm.evals.haystack import read_haystack

    plan = GridPlan(numbers(lengths, "lengths"), numbers(depths, "depths"), numbers(texts, "texts"), seed, new_tokens)
    hay = read_haystack(haystack, start)
    choice = AnswererChoice(**answerer)
    if choice.max_length:
        raise ValueError("the prompts of the grid are as long as its lengths: leave max_length out")
    choice = replace(choice, max_length=max(plan.lengths))
    if choice.endpoint:
        raise ValueError("the grid reads a text once for all questions, which an endpoint does not: use eval needle")
    who, facts = _answerer(choice)
    name = label or who.name
    asked = sum(plan.texts_of(length) for length in plan.lengths)
    yield f"{name}: {asked} texts of {lengths} tokens, {len(plan.depths) + 1} questions each\n"
    summary = run_grid(who, plan, hay, out, label=name, settings=facts, progress=True)
    from longllm.evals.compare import table

    yield f"{table([summary])}\n\nwritten: {out}/grid.jsonl, grid.json, grid.png, grid.svg\n"
    yield {**summary, "out": out}


def _answerer(choice: AnswererChoice) -> tuple[Any, dict[str, Any]]:
    """Return who answers, and what identifies the model in the settings of a run."""
    who: Any = build(choice)
    config = who.loaded.model.config.get_text_config(decoder=True)
    dtype = str(who.loaded.dtype).removeprefix("torch.")
    beacons = {"beacons": choice.beacons} if choice.beacons else {}
    return who, {"rope_parameters": dict(config.rope_parameters), "dtype": dtype, **beacons}


def compare(runs: list[str], *, out: str = "out/grids", title: str = "") -> Iterator[str | dict[str, Any]]:
    """Put finished runs of ``longscope eval grid`` next to each other: a table and a figure of heat maps.

    Args:
        runs: folders of the runs, in the order they are shown
        out: folder of compare.md, compare.json, compare.png and compare.svg
        title: what stands above the figure
    """
    from longllm.evals.compare import compare as put_together

    record = put_together(runs, out, title)
    if record["differ_in"]:
        yield f"note: the runs differ in {', '.join(record['differ_in'])}, so they were not asked the same\n"
    yield f"{record['table']}\n\nwritten: {out}/compare.md, compare.json, compare.png, compare.svg\n"
    yield record
