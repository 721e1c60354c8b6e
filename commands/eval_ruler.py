"""``longscope eval ruler``: thirteen kinds of synthetic questions at any length."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from commands.eval_answerer import AnswererChoice
from commands.eval_numbers import numbers
from commands.eval_running import answerer_of, run_figured, shown
from commands.eval_runs import Share


def ruler(
    *,
    kinds: str = "all",
    lengths: str = "2K,4K",
    count: int = 5,
    haystack: str = "moby-dick",
    start: float = 0.0,
    qa: str = "",
    seed: int = 42,
    out: str = "out/ruler",
    part: int = 0,
    parts: int = 1,
    **answerer: Any,
) -> Iterator[str | dict[str, Any]]:
    """Ask RULER's kinds of questions: needles, chains of variables, word counts, questions about documents.

    Chat frame and answer are within the length. The paper has 500 questions per kind and length. The same command goes
    on with a run that was interrupted, or adds lengths to a finished one.

    Args:
        kinds: all, or some of niah_single_1 … _3, niah_multikey_1 … _3, niah_multivalue, niah_multiquery, vt, cwe, fwe,
            qa_1, qa_2, with commas between them
        lengths: tokens: a list, or evenly spaced FROM-TO:COUNT; K stands for 1,024
        count: questions per kind and length
        haystack: the running text: a document of the catalog, a file, or a folder of .txt files
        start: share of the haystack that is left out at its beginning, 0 to 1
        qa: rows for qa_1 and qa_2 (question, answers, documents or context) as JSON lines; by default questions about
            the State of the Union addresses
        seed: of everything that is drawn
        out: folder of the results, a file per kind
        part: number of this part, from 0, where several machines share the work
        parts: parts of the work; the last to end puts them together
    """
    from longllm.evals.haystack import read_haystack
    from longllm.evals.ruler import KINDS, Ruler
    from longllm.evals.run import written

    choice, share, wanted = AnswererChoice(**answerer), Share(out, part, parts), numbers(lengths, "lengths")
    chosen = list(KINDS) if kinds == "all" else [kind.strip() for kind in kinds.split(",")]
    hay = read_haystack(haystack, start)
    # All tasks are made before the model is loaded, so that an unknown kind is refused at once.
    tasks = [Ruler(kind, wanted, hay, count, seed) for kind in chosen]
    for task in tasks:
        task.rows = _rows(task.kind, qa, count, seed)
    who, notes = answerer_of(choice, max(wanted))
    yield notes
    settings = {**choice.settings, **hay.facts, "seed": seed, "qa": qa, "count": count}
    found: dict[str, Any] = {}
    for task in tasks:
        for piece in run_figured(task, who, share, settings):
            if isinstance(piece, str):
                yield piece
            elif "by_length" in piece:
                found[task.kind] = piece["by_length"]
                yield f"{task.kind}\n{shown(piece['by_length'], 'match')}"
    record: dict[str, Any] = {"answerer": who.name, "kinds": found, "average": _average(found), "out": out}
    if len(found) < len(tasks):
        yield {**record, "missing_parts": True}
        return
    written(Path(out) / "ruler.json", record)
    yield f"average of {len(found)} kinds\n{shown(record['average'], 'match')}written: {out}/ruler.json\n"
    yield record


def _rows(kind: str, qa: str, count: int, seed: int) -> Sequence[dict[str, Any]]:
    """Return the questions that a kind needs from outside."""
    if not kind.startswith("qa"):
        return ()
    from longllm.evals import ruler_qa

    if qa:
        return ruler_qa.read_questions(qa)
    make = ruler_qa.one_step if kind == "qa_1" else ruler_qa.two_steps
    return make(ruler_qa.addresses(), count, seed)


def _average(found: dict[str, dict[str, dict[str, Any]]]) -> dict[str, dict[str, Any]]:
    """Return the plain mean over the kinds at each length.

    >>> _average({"vt": {"8": {"n": 2, "match": 0.5}}, "fwe": {"8": {"n": 2, "match": 1.0}}})
    {'8': {'n': 4, 'match': 0.75}}
    """
    lengths = sorted({length for kind in found.values() for length in kind}, key=int)
    means: dict[str, dict[str, Any]] = {}
    for length in lengths:
        own = [kind[length] for kind in found.values() if length in kind]
        means[length] = {"n": sum(k["n"] for k in own), "match": sum(k["match"] for k in own) / len(own)}
    return means
