"""``longscope eval topic``: which topic came first in a long record of conversations?"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from commands.eval_answerer import AnswererChoice
from commands.eval_numbers import numbers
from commands.eval_running import answerer_of, run_figured
from commands.eval_runs import Share


def topic(
    *,
    data: str = "",
    counts: str = "5,10,15",
    cases: int = 10,
    haystack: str = "sotu",
    seed: int = 42,
    out: str = "out/topic",
    part: int = 0,
    parts: int = 1,
    **answerer: Any,
) -> Iterator[str | dict[str, Any]]:
    """Ask for the first of N topics of a record of conversations (LongEval); 5 topics are about 2,700 tokens.

    Without --data, the conversations are put together from sentences of the haystack. The published curve has 50 cases
    each of --counts 5,10,15,20,25,30,40,50,60,70. The same command goes on with a run that was interrupted.

    Args:
        data: released rows (context, question, topics, num_topics) as a JSON-lines file
        counts: numbers of topics per record
        cases: records per number of topics
        haystack: whose sentences are talked about: a document or collection of the catalog, a file or a folder
        seed: of the records
        out: folder of the results
        part: number of this part, from 0, where several machines share the work
        parts: parts of the work; the last to end puts them together
    """
    from longllm.evals.haystack import read_haystack
    from longllm.evals.rows import read_rows
    from longllm.evals.topic import TopicRetrieval, topic_rows

    choice, share, wanted = AnswererChoice(**answerer), Share(out, part, parts), numbers(counts, "counts")
    # A record of N topics has about N x 530 tokens.
    who, notes = answerer_of(choice, 530 * max(wanted))
    yield notes
    if data:
        rows = read_rows(data, "topics", ["context", "question", "topics", "num_topics"])
        rows = [row for row in rows if int(row["num_topics"]) in wanted]
        if not rows:
            raise ValueError(f"{data} has no rows with {counts} topics")
        settings: dict[str, Any] = {"data": data}
    else:
        hay = read_haystack(haystack)
        rows = topic_rows(who.tokenizer, hay, wanted, cases, seed)
        settings = {**hay.facts, "cases": cases, "seed": seed}
    settings["counts"] = list(wanted)
    for piece in run_figured(TopicRetrieval(rows), who, share, {**choice.settings, **settings}):
        if isinstance(piece, dict) and "by_tokens" in piece:
            for tokens, found in piece["by_tokens"].items():
                low, high = found["interval"]
                yield f"{int(tokens):>9,} tokens ({found['num_topics']} topics): right {found['accuracy']:.2f} "
                yield f"[{low:.2f}, {high:.2f}], F1 {found['qa_f1']:.2f} (n = {found['n']})\n"
            yield f"written: {out}/topic.jsonl, .json\n"
        yield piece
