"""``longscope eval longbench``: the 21 tasks of LongBench v1, from its data or made offline."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal

from commands.eval_answerer import AnswererChoice


def longbench(
    *,
    data: str = "",
    tasks: str = "default",
    rows: int = 20,
    words: int = 2000,
    leave_out: Literal["middle", "left"] = "middle",
    limit: int = 0,
    part: int = 0,
    parts: int = 1,
    out: str = "out/longbench",
    seed: int = 42,
    **answerer: Any,
) -> Iterator[str | dict[str, Any]]:
    """Evaluate on LongBench v1 (arXiv 2308.14508): prompts, cutting and scores as in published tables.

    Without --data, rows in the released format are made from the catalog's texts for four of the tasks; their figures
    are not comparable with published ones. A run that was interrupted goes on when the command is given again.

        longscope eval longbench --data LongBench/data --tasks published --model Llama-3-8B-Instruct-80K
        longscope eval longbench --tasks passage_retrieval_en,hotpotqa --words 4000
        longscope eval longbench --method snapkv --ratio 8

    Args:
        data: folder with a file per task (qasper.jsonl, .json or .parquet), or hub:OWNER/DATASET; empty = made offline
        tasks: default (14: English, not synthetic), published (the 16 of published averages), all (21), or names
        rows: rows per task that are made offline
        words: words of a context that is made offline
        leave_out: what a prompt that is too long loses: its middle, or its beginning
        limit: take only the first rows of each task; 0 = all
        part: which of --parts this process does, from 0
        parts: shares that the rows are divided into, for several machines; the last to finish joins them
        out: folder of the results
        seed: of rows that are made offline
        answerer: who answers
    """
    from commands import tour_plot
    from commands.eval_runs import Share, prepared, prompt_room, run_benchmark
    from longllm.evals import longbench as bench
    from longllm.evals import offline
    from longllm.evals.rows import read_rows

    choice, share = AnswererChoice(**answerer), Share(out, part, parts, limit)
    names = bench.chosen(tasks)
    if not data:
        names = [name for name in names if name in offline.LONGBENCH] if tasks in ("default", "all") else names
        found = {name: offline.rows(offline.LONGBENCH, name, rows, words, seed) for name in names}
    else:
        found = {name: read_rows(data, name, bench.NEEDS) for name in names}
    tour_plot.require()
    kinds = bench.kinds()
    answers = prepared(choice, chat=any(kinds[name].chat for name in names))
    source = {"data": data} if data else {"rows": rows, "words": words, "seed": seed}
    made = []
    for name in names:
        room = prompt_room(answers, choice, bench.MAX_LENGTH, kinds[name].new_tokens)
        task = bench.LongBench(kinds[name], found[name], room, leave_out)
        made.append((name, task, {**choice.settings, **source, "prompt": room, "leave_out": leave_out}))
    yield from run_benchmark("longbench", made, answers, share, bench.table, "score")
