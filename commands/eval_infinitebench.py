"""``longscope eval infinitebench``: the 12 tasks of InfiniteBench, from its data or made offline."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from commands.eval_answerer import AnswererChoice


def infinitebench(
    *,
    data: str = "",
    tasks: str = "default",
    rows: int = 10,
    words: int = 2000,
    limit: int = 0,
    part: int = 0,
    parts: int = 1,
    out: str = "out/infinitebench",
    seed: int = 42,
    **answerer: Any,
) -> Iterator[str | dict[str, Any]]:
    """Evaluate on InfiniteBench (arXiv 2402.13718) with the prompts of its family "mistral".

    Without --data, rows in the released format are made for five of the tasks: passkey, number_string, kv_retrieval,
    math_find and code_run. A run that was interrupted goes on when the command is given again.

        longscope eval infinitebench --data InfiniteBench --tasks all --max_length 80000 --model Llama-3-8B-80K
        longscope eval infinitebench --tasks passkey,kv_retrieval --words 3000

    Args:
        data: folder with a file per task (passkey.jsonl, .json or .parquet), or hub:OWNER/DATASET; empty = made offline
        tasks: default (longbook_qa_eng and longbook_sum_eng; offline, all that can be made), all (12), or names
        rows: rows per task that are made offline
        words: words of a context that is made offline
        limit: take only the first rows of each task; 0 = all
        part: which of --parts this process does, from 0
        parts: shares that the rows are divided into, for several machines; the last to finish joins them
        out: folder of the results
        seed: of rows that are made offline
        answerer: who answers
    """
    from commands import tour_plot
    from commands.eval_runs import Share, prepared, prompt_room, run_benchmark
    from longllm.evals import infinitebench as bench
    from longllm.evals import offline
    from longllm.evals.rows import read_rows

    choice, share = AnswererChoice(**answerer), Share(out, part, parts, limit)
    if data:
        names = bench.chosen(tasks)
        found = {name: read_rows(data, name, bench.NEEDS) for name in names}
    else:
        names = list(offline.INFINITEBENCH) if tasks in ("default", "all") else bench.chosen(tasks)
        found = {name: offline.rows(offline.INFINITEBENCH, name, rows, words, seed) for name in names}
    tour_plot.require()
    answers, kinds = prepared(choice), bench.kinds()
    source = {"data": data} if data else {"rows": rows, "words": words, "seed": seed}
    made = []
    for name in names:
        room = prompt_room(answers, choice, bench.MAX_LENGTH, kinds[name].new_tokens)
        made.append(
            (name, bench.InfiniteBench(kinds[name], found[name], room), {**choice.settings, **source, "prompt": room})
        )
    yield from run_benchmark("infinitebench", made, answers, share, bench.table, "score")
