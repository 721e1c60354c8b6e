"""Pictures beside a chat, as HTML: how full the context is, and a heat map of needles found and missed."""

from __future__ import annotations

from collections.abc import Iterator
from html import escape
from typing import Any

from demos.figures import bar, size


def fill(figures: dict[str, Any]) -> str:
    """Return the panel of a conversation, of a reading under way, or of a note in their place.

    Text that comes from models and documents is escaped.

    >>> fill({"note": "Stopped."})
    '<section class="figures"><p class="dim">Stopped.</p></section>'
    >>> "of 32,768 tokens" in fill({"tokens": 900, "limit": 32768, "kv_bytes": 1e6, "model": "m"})
    True
    """
    return f'<section class="figures">{"".join(_fill(figures))}</section>'


def _fill(figures: dict[str, Any]) -> Iterator[str]:
    if "note" in figures:
        yield f'<p class="dim">{escape(figures["note"])}</p>'
    elif "tokens_read" in figures:
        read, planned = figures["tokens_read"], figures["tokens_seen"]
        yield f'<h3>Reading</h3><p class="pair"><strong>{read:,}</strong> of {planned:,} tokens</p>'
        yield bar(read / max(1, planned), "share of the conversation that has been read")
        yield f'<p class="dim">{figures["seconds"]:.0f} s</p>'
    else:
        held, limit = figures["tokens"], figures["limit"]
        yield f'<h3>Conversation</h3><p class="pair"><strong>{held:,}</strong> of {limit:,} tokens</p>'
        yield bar(held / limit, "share of the context that is used")
        rows = {"model": figures["model"], "KV cache": size(figures["kv_bytes"])}
        for name in ("seconds", "tokens_per_second"):
            if figures.get(name):
                rows[name.replace("tokens_per_second", "tokens/s")] = f"{figures[name]:.1f}"
        told = "".join(f"<div><dt>{name}</dt><dd>{escape(fact)}</dd></div>" for name, fact in rows.items())
        yield f"<dl>{told}</dl>"
        if figures.get("warning"):
            warning = str(figures["warning"]).replace("the prompt", "the conversation")
            yield f'<p class="warning" role="alert">{escape(warning)}</p>'


def heat(record: dict[str, Any]) -> str:
    """Return the heat map of a needle test as far as it has come: a column per length, a row per depth.

    >>> cell = {"kind": "needle", "length": 1024, "depth": 0, "question": "Who?", "answer": "Me.", "right": True}
    >>> "1 of 1 found" in heat({"lengths": [1024], "depths": [0, 100], "cells": [cell], "now": {}})
    True
    """
    if "note" in record:
        return fill(record)
    lengths, cells = record["lengths"], record["cells"]
    found = {(cell["kind"], cell["length"], cell["depth"]): cell for cell in cells}
    head = "".join(f'<th scope="col">{length:,}</th>' for length in lengths)
    body = []
    for depth in record["depths"]:
        row = "".join(_cell(found.get(("needle", length, depth)), record["now"], length, depth) for length in lengths)
        body.append(f'<tr><th scope="row">{depth} %</th>{row}</tr>')
    keys = [next((cell for cell in cells if (cell["kind"], cell["length"]) == ("passkey", it)), None) for it in lengths]
    row = "".join(_cell(cell, record["now"], length, None) for cell, length in zip(keys, lengths, strict=True))
    body.append(f'<tr><th scope="row">pass key</th>{row}</tr>')
    title = "Facts found in a novel, by the length of the text (tokens) and how far into it they stand"
    return (
        f'<section class="figures heat"><table><caption>{title}</caption><thead><tr><th></th>{head}</tr></thead>'
        f"<tbody>{''.join(body)}</tbody></table>{_score(record)}</section>"
    )


def _cell(cell: dict[str, Any] | None, now: dict[str, Any], length: int, depth: float | None) -> str:
    """Return one field: found, missed, being asked, or not asked yet."""
    if cell is not None:
        told = escape(f"{cell['question']} {cell['answer']}", quote=True)
        kind, mark = ("found", "✓") if cell["right"] else ("missed", "✗")
        return f'<td class="{kind}" title="{told}" aria-label="{kind}">{mark}</td>'
    kind = "passkey" if depth is None else "needle"
    asked = now.get("kind") == kind and now.get("length") == length and depth in (None, now.get("depth"))
    return '<td class="asked" aria-label="being asked">…</td>' if asked else '<td aria-label="not asked yet"></td>'


def _score(record: dict[str, Any]) -> str:
    """Return how many were found, and what is being asked or was answered last."""
    cells = record["cells"]
    lines = [f"<strong>{sum(cell['right'] for cell in cells)} of {len(cells)} found</strong>"] if cells else []
    if record["now"]:
        waited = f" ({record['seconds']:.0f} s so far)" if "seconds" in record else ""
        lines.append(f"asking at {record['now']['length']:,} tokens: {escape(record['now']['question'])}{waited}")
    if cells:
        lines.append(f"last answer: {escape(cells[-1]['answer'])}")
    return "".join(f'<p class="dim">{line}</p>' for line in lines)
