"""``longscope tour``: from nothing to every system's main job done once on real input, with a page to read."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import catalog
from commands.doctor import machine
from commands.tour_beacons import beacons
from commands.tour_extended import LENGTH, extended
from commands.tour_long_document import SPEECH, long_document
from commands.tour_novel import novel
from commands.tour_page import render
from commands.tour_plot import require
from longllm import DType

TRY = (
    'longscope ask --doc sotu/1963 "Who was killed in Viet-Nam?"',
    'longscope ask --doc moby-dick --save-cache whale.kv "Who is the captain of the Pequod?"',
    'longscope ask --doc FILE.pdf "your question"',
    "longscope models",
    "longscope doctor --model smollm2-135m-instruct",
)


def tour(
    *,
    out: str = "out/tour",
    model: str = "smollm2-135m-instruct",
    dtype: DType = "auto",
    novel_tokens: int = 0,
    needle_tokens: int = LENGTH,
) -> Iterator[str | dict[str, Any]]:
    """Run every system's main job once on real input and write a page about it.

    Fetches the default models and data, asks three questions about a State of the Union address, looks for a passkey at
    three depths, reads the speech in beacons, looks for three facts in 16,384 tokens with the extended model, reads a
    whole novel into a compressed cache and asks about it, shows everything as it happens and writes index.html, the
    plots and tour.json. About twenty minutes on two cores; the novel's cache is kept, so the next time takes five.

    Args:
        out: folder for the page, the plot and the numbers
        model: a name from ``longscope models``, or a folder in Hugging Face layout
        dtype: what to compute in; auto is bf16 where the hardware is fast at it, else fp32
        novel_tokens: read only so many tokens of the novel; 0 reads all of it
        needle_tokens: length of the text that the extended model looks for facts in
    """
    if novel_tokens < 0:
        raise ValueError(f"novel_tokens must be 0 (all) or a number of tokens, got {novel_tokens}")
    begun = time.perf_counter()
    require()
    folder = Path(out).expanduser()
    folder.mkdir(parents=True, exist_ok=True)
    yield "A tour of longscope\n\nModels and data\n"
    for row in catalog.rows():
        if row.default:
            catalog.fetch(row.name)
            yield f"  {row.name:<24} {row.what} ({row.licence})\n"
    fetched = time.perf_counter()

    import longllm

    loaded = longllm.load(model, dtype=dtype)
    here = machine()
    facts = _facts(loaded, here)
    yield "\nSet-up\n" + "".join(f"  {name:<12} {fact}\n" for name, fact in facts.items())
    chapters, runs = yield from long_document(loaded, folder)
    for chapter in (beacons(loaded), extended(folder, dtype, needle_tokens), novel(loaded, folder, novel_tokens)):
        more_chapters, more_runs = yield from chapter
        chapters, runs = chapters + more_chapters, runs + more_runs
    seconds = time.perf_counter() - fetched
    facts["whole tour"] = f"{seconds:.0f} seconds after downloads"
    record = {
        "model": loaded.name,
        "dtype": str(loaded.dtype).removeprefix("torch."),
        "attention": loaded.attention,
        "document": SPEECH,
        "machine": here,
        "runs": runs,
        "download_seconds": fetched - begun,
        "seconds": seconds,
    }
    lead = "What this toolbox did a moment ago on this machine, with a small real model and real text."
    page = render("A tour of longscope", lead, facts, chapters, TRY)
    (folder / "tour.json").write_text(json.dumps(record, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    (folder / "index.html").write_text(page, encoding="utf-8")
    yield f"\nDone in {seconds:.0f} seconds (after downloads). The page with the plot: {folder / 'index.html'}\n"
    yield "Now try: " + TRY[0] + "\n"
    yield {**record, "page": str(folder / "index.html")}


def _facts(loaded: Any, here: dict[str, Any]) -> dict[str, str]:
    """Return what ran where, in words."""
    millions = sum(weight.numel() for weight in loaded.model.parameters()) / 1e6
    units = ", ".join(here["vector_units"]) or "no wide vector units"
    return {
        "model": f"{loaded.name}, {millions:,.0f} million parameters",
        "trained on": f"inputs of up to {loaded.trained_length:,} tokens",
        "computed in": f"{str(loaded.dtype).removeprefix('torch.')} on {loaded.device}, {loaded.attention} attention",
        "machine": f"{here['system']}, {here['threads']} threads, {units}",
        "date": time.strftime("%Y-%m-%d %H:%M"),
    }
