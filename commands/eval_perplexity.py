"""``longscope eval perplexity``: sliding perplexity of texts, and what longer contexts do to the same tokens."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from commands.eval_answerer import AnswererChoice

if TYPE_CHECKING:
    from longllm.evals.task import Task


def perplexity(
    *,
    text: str = "moby-dick",
    begin: float = 0.9,
    end: float = 1.0,
    window: int = 4096,
    stride: int = 2048,
    min_tokens: int = 2,
    contexts: str = "",
    last: int = 512,
    places: int = 4,
    limit: int = 100,
    part: int = 0,
    parts: int = 1,
    out: str = "out/perplexity",
    **answerer: Any,
) -> Iterator[str | dict[str, Any]]:
    """Measure how well a model predicts long texts: by sliding windows, every token scored exactly once.

    With --contexts, the same last tokens are also scored after contexts of several lengths: a model whose context was
    extended should lose nothing at the short ones and gain at the long ones.

        longscope eval perplexity --window 8192 --stride 4096
        longscope eval perplexity --contexts 2K,8K,16K,32K --window 0 --rope yarn:4
        longscope eval perplexity --text pg19/test.jsonl --begin 0 --window 4096 --method beacon --ratio 8

    Args:
        text: a document of the catalog, a file, rows with a field text (.jsonl, .json, .parquet), or hub:OWNER/DATASET
        begin: where each text is begun, as a share of its characters; what a model was trained on should lie before
        end: where each text is ended
        window: tokens of a window; 0 = no sliding windows
        stride: tokens between two windows, less than the window; 0 = one window per text
        min_tokens: leave shorter texts out
        contexts: lengths, such as 2K,8K,32K; K stands for 1,024
        last: tokens that are scored after each of them
        places: of each text where this is done
        limit: take only the first texts; 0 = all
        part: which of --parts this process does, from 0
        parts: shares that texts are divided into, for several machines; the last to finish joins them
        out: folder of the results
        answerer: who reads
    """
    from commands import tour_plot
    from commands.eval_numbers import numbers
    from commands.eval_runs import Share, prepared, run_task
    from longllm.evals.perplexity import LastTokens, Perplexity, read_texts
    from longllm.evals.run import written

    choice, share = AnswererChoice(**answerer), Share(out, part, parts)
    if choice.endpoint:
        raise ValueError("an endpoint shows no likelihoods of given texts: perplexity needs a model on this machine")
    if limit < 0:
        raise ValueError(f"limit must be 0 (all) or more, got {limit}")
    lengths = numbers(contexts, "contexts") if contexts else ()
    if not window and not lengths:
        raise ValueError("nothing to measure: give a --window, or --contexts")
    texts = read_texts(text, begin, end)[: limit or None]
    tasks: list[Task] = [Perplexity(texts, window, stride, min_tokens)] if window else []
    tasks += [LastTokens(texts, lengths, last, places)] if lengths else []
    tour_plot.require()
    answers = prepared(choice, reach=max(window, *lengths, 0), chat=False)
    settings = {**choice.settings, "text": text, "begin": begin, "end": end, "limit": limit}
    record: dict[str, Any] = {"benchmark": "perplexity", "answerer": answers.name, "out": out}
    for task in tasks:
        sliding = isinstance(task, Perplexity)
        own = {"stride": stride} if sliding else {"lengths": contexts, "last": last, "places": places}
        summary = run_task(task, answers, share, {**settings, **own})
        if summary is None:
            yield f"{task.name}: part {part} of {parts} is done, others are missing\n"
            record["missing_parts"] = True
        else:
            record["windows" if sliding else "contexts"] = summary
            yield _windows(summary) if sliding else _contexts(summary)
    if "missing_parts" not in record:
        _draw(record, Path(out) / "perplexity.png")
        written(Path(out) / "perplexity.json", record)
        yield f"written: {Path(out) / 'perplexity'}.json, .png, .svg\n"
    yield record


def _windows(summary: dict[str, Any]) -> str:
    """Return the line of the sliding windows."""
    found = f"{summary['perplexity']:.3f} on {summary['tokens']:,} tokens of {summary['n']} texts"
    windows = f"window {summary['max_length']:,}, stride {summary['stride']:,}"
    return f"{windows}: perplexity {found}, {summary['window_seconds']:.1f} s a window\n"


def _contexts(summary: dict[str, Any]) -> str:
    """Return a line for each length of the context."""
    lines = [
        f"  context {int(length):>9,}   perplexity {own['perplexity']:8.3f}"
        for length, own in summary["lengths"].items()
    ]
    return "\n".join([f"the same {summary['last']:,} last tokens after each context:", *lines, ""])


def _draw(record: dict[str, Any], file: Path) -> None:
    """Draw perplexity over the length of the context, or of the whole as a bar."""
    from commands.tour_plot import bars, curves

    if "contexts" in record:
        points = [(int(length), found["perplexity"]) for length, found in record["contexts"]["lengths"].items()]
        curves({"perplexity of the same tokens": {record["answerer"]: points}}, "tokens of context", file)
    else:
        bars([record["answerer"]], {"perplexity": [record["windows"]["perplexity"]]}, file)
