"""The tour's chapter on extended context: needles in twice as much text as the model was trained for."""

from __future__ import annotations

from collections.abc import Generator
from pathlib import Path
from typing import Any

from commands.tour_page import Chapter, Table
from longllm import DType

ADAPTER = "smollm2-135m-32k"
#: tokens of the text; the model itself was trained on 8,192
LENGTH = 16384
#: per cent of the text before each needle
DEPTHS = (10.0, 50.0, 90.0)
#: the half of the novel that the adapter's training data takes nothing from begins after this share of it
HELD_OUT = 0.6


def extended(
    folder: Path, dtype: DType, length: int = LENGTH, adapter: str = ADAPTER
) -> Generator[str, None, tuple[list[Chapter], list[dict[str, Any]]]]:
    """Read one long text with the extended model, ask for what was hidden in it; return the chapter and the run."""
    import longllm
    from longllm.evals.answerers import LocalAnswerer
    from longllm.evals.grid import Grid, GridPlan
    from longllm.evals.haystack import read_haystack
    from longllm.evals.run import evaluate

    yield f"\nA longer context\n  {adapter}: {length:,} tokens of Moby-Dick with three invented facts and a pass key\n"
    loaded = longllm.load(adapter, dtype=dtype)
    task = Grid(GridPlan((length,), DEPTHS, (1,)), read_haystack("moby-dick", HELD_OUT))
    results = folder / "extended"
    for old in results.glob("grid.*"):  # a tour shows what this machine does now, not what an earlier one did
        old.unlink()
    summary = evaluate(task, LocalAnswerer(loaded, max_length=length), results, progress=True)
    rows = []
    for example in task.examples(loaded.tokenizer):
        run = _row(results / "grid.jsonl", example.name)
        verdict = "found" if run["scores"]["right"] else "not found"
        depth = f"{example.facts['depth']:g} %"
        rows.append((example.facts["question"], depth, verdict, " ".join(run["answer"].split())))
        yield f"  {depth:>5}  {verdict:<10} {example.facts['question']} {rows[-1][3]}\n"
    lead = (
        f"SmolLM2 was trained on texts of up to 8,192 tokens. An adapter of a few megabytes, trained on this kind of "
        f"machine under a raised RoPE base, lets it read {loaded.trained_length:,}. Here it reads {length:,} tokens of "
        "the part of Moby-Dick that its training data takes nothing from, once, and is asked for each of the sentences "
        "that were hidden there."
    )
    table = Table(f"Hidden in {length:,} tokens", ("question", "depth", "verdict", "answer"), rows, prose="answer")
    return [Chapter("A longer context", lead, [table])], [{"run": "extended context", **summary}]


def _row(path: Path, name: str) -> dict[str, Any]:
    """Return the line of a results file that belongs to one question."""
    import json

    lines = path.read_text(encoding="utf-8").splitlines()[1:]
    return next(row for row in map(json.loads, lines) if row["name"] == name)
