"""What an answer cost, as a panel of HTML beside it: the KV cache against the full one, tokens, seconds, speed."""

from __future__ import annotations

from collections.abc import Iterator
from html import escape
from typing import Any


def panel(figures: dict[str, Any]) -> str:
    """Return the panel for the figures of a reading under way or of an answer, or for a note in their place.

    Text that comes from documents and models is escaped.

    >>> panel({"note": "Stopped."})
    '<section class="figures"><p class="dim">Stopped.</p></section>'
    >>> "8.0 times smaller" in panel({"kv_bytes": 1e6, "kv_bytes_full": 8e6, "tokens_seen": 7, "seconds": 1.0})
    True
    """
    if "note" in figures:
        return f'<section class="figures"><p class="dim">{escape(figures["note"])}</p></section>'
    parts = list(_cache(figures) if "kv_bytes" in figures else _progress(figures))
    parts.append(f"<dl>{''.join(_facts(figures))}</dl>")
    parts += [f'<p class="dim">{escape(str(line))}</p>' for line in _plan(figures)]
    if figures.get("warning"):
        parts.append(f'<p class="warning" role="alert">{escape(str(figures["warning"]))}</p>')
    return f'<section class="figures">{"".join(parts)}</section>'


def _cache(figures: dict[str, Any]) -> Iterator[str]:
    """Yield the size of the KV cache, that of the full one, and a bar of both."""
    held, full = figures["kv_bytes"], figures["kv_bytes_full"]
    yield f'<h3>KV cache</h3><p class="pair"><strong>{size(held)}</strong> of {size(full)}</p>'
    yield bar(held / full, "KV cache held, as a share of the full one")
    times = f"{full / held:.1f} times smaller than the full cache" if full > held else "nothing left out"
    yield f'<p class="dim">{times}</p>'


def _progress(figures: dict[str, Any]) -> Iterator[str]:
    """Yield how far a reading has come."""
    read, planned = figures.get("tokens_read", 0), figures.get("tokens_seen", 0)
    if not planned:
        yield '<h3>Getting ready</h3><p class="pair">…</p>'
        return
    yield f'<h3>Reading</h3><p class="pair"><strong>{read:,}</strong> of {planned:,} tokens</p>'
    yield bar(read / planned, "share of the text that has been read")


def _facts(figures: dict[str, Any]) -> Iterator[str]:
    """Yield the rows of the list: tokens read, seconds, speed."""
    rows = {"document": str(figures.get("title") or "")}
    if "kv_bytes" in figures:
        rows["tokens read"] = f"{figures['tokens_seen']:,}" + (" (read before)" if figures.get("reused") else "")
    rows["seconds"] = f"{figures['seconds']:.1f}"
    if figures.get("reading_seconds"):
        rows["seconds"] += f" ({figures['reading_seconds']:.1f} reading)"
    if figures.get("tokens_per_second"):
        rows["tokens/s"] = f"{figures['tokens_per_second']:.1f}"
    for name, fact in rows.items():
        if fact:
            yield f"<div><dt>{name}</dt><dd>{escape(fact)}</dd></div>"


def _plan(figures: dict[str, Any]) -> Iterator[str]:
    """Yield how the text was read, and whether the answer was cut off."""
    steered = ", kept with the question in mind" if figures.get("steered") else ""
    if figures.get("plan"):
        yield f"{figures['plan']}{steered}"
    if figures.get("stopped") is False:
        yield f"cut off after {figures['new_tokens']} tokens"


def bar(share: float, label: str) -> str:
    """Return a bar that is filled to ``share`` of its length."""
    percent = 100 * min(1.0, share)
    meter = f'role="meter" aria-label="{label}" aria-valuemin="0" aria-valuemax="100" aria-valuenow="{percent:.0f}"'
    return f'<div class="bar" {meter}><span style="width:{percent:.1f}%"></span></div>'


def size(nbytes: float) -> str:
    """Return a number of bytes as people read it.

    >>> size(94_371_840), size(14_381_600_000), size(500)
    ('94.4 MB', '14.4 GB', '0.5 kB')
    """
    for unit, whole in (("GB", 1e9), ("MB", 1e6)):
        if nbytes >= whole:
            return f"{nbytes / whole:.1f} {unit}"
    return f"{nbytes / 1e3:.1f} kB"
