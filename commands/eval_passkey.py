"""``longscope eval passkey``: is a number that is stated once in a long text found again?"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from commands.eval_answerer import AnswererChoice
from commands.eval_numbers import numbers
from commands.eval_running import answerer_of, heat, run_figured, shown
from commands.eval_runs import Share


def passkey(
    *,
    lengths: str = "1K,2K,4K,8K",
    depths: str = "0-100:10",
    haystack: str = "",
    start: float = 0.0,
    digits: int = 5,
    seed: int = 123,
    out: str = "out/passkey",
    part: int = 0,
    parts: int = 1,
    **answerer: Any,
) -> Iterator[str | dict[str, Any]]:
    """Hide a number at each depth of texts of each length, ask for it, and draw the heat map.

    A prompt has exactly its length before the chat frame. The published runs are --lengths 8K-128K:20. The same command
    goes on with a run that was interrupted.

    Args:
        lengths: tokens of the prompts: a list, or evenly spaced FROM-TO:COUNT; K stands for 1,024
        depths: per cent of the text before the number, in the same way
        haystack: a document of the catalog, a file, or a folder of .txt files; by default the usual noise sentences
        start: share of the haystack that is left out at its beginning, 0 to 1
        digits: of the number
        seed: of the numbers
        out: folder of the results
        part: number of this part, from 0, where several machines share the work
        parts: parts of the work; the last to end puts them together
    """
    from longllm.evals.haystack import read_haystack
    from longllm.evals.passkey import Passkey

    choice, share = AnswererChoice(**answerer), Share(out, part, parts)
    hay = read_haystack(haystack, start) if haystack else None
    task = Passkey(numbers(lengths, "lengths"), numbers(depths, "depths"), hay, digits, seed)
    fixed = {"digits": digits, "seed": seed, "lengths": list(task.lengths), "depths": list(task.depths)}
    settings = {**fixed, **(hay.facts if hay else {"haystack": "noise"})}
    figure = heat("pass key", "right", "share of right answers")
    who, notes = answerer_of(choice, max(task.lengths))
    yield notes
    for piece in run_figured(task, who, share, {**choice.settings, **settings}, figure):
        if isinstance(piece, dict) and "by_length" in piece:
            yield shown(piece["by_length"], "right") + f"written: {out}/{task.name}.jsonl, .json, .png, .svg\n"
        yield piece
