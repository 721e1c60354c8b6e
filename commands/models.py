"""``longscope models``: what the catalog knows, under which licence, and what is here already."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal

import catalog


def models(*, kind: Literal["all", "model", "data"] = "all") -> Iterator[str | dict[str, Any]]:
    """List the models and data sets that ``longscope fetch`` can get and the other commands take by name.

    Args:
        kind: list only models or only data sets

    >>> from commands.models import models
    >>> "sotu" in [row["name"] for row in list(models(kind="data"))[-1]["models"]]
    True
    """
    rows = [row for row in catalog.rows() if kind in ("all", row.kind)]
    records = [_record(row) for row in rows]
    cells = [("NAME", "KIND", "SIZE", "HERE", "LICENCE", "WHAT")]
    for record in records:
        here = "yes" if record["local"] else "-"
        size = _size(record["size"])
        cells.append((record["name"], record["kind"], size, here, record["licence"], record["what"]))
    widths = [max(len(line[column]) for line in cells) for column in range(5)]
    for name, sort, size, here, licence, what in cells:
        line = f"{name:<{widths[0]}}  {sort:<{widths[1]}}  {size:>{widths[2]}}  {here:<{widths[3]}}  "
        yield f"{line}{licence:<{widths[4]}}  {what}\n"
    for record in records:
        if record["note"]:
            yield f"note on {record['name']}: {record['note']}\n"
    yield {"models": records}


def _record(row: catalog.Row) -> dict[str, Any]:
    """Return a row as the JSON record has it; ``size`` is the download in bytes, ``local`` a path or null."""
    local = catalog.local(row.name)
    record = {key: getattr(row, key) for key in ("name", "kind", "what", "licence", "version", "size", "note")}
    sources = [source.repo or ", ".join(part.spec for part in source.archives) for source in row.sources]
    return {**record, "default": row.default, "sources": sources, "local": str(local) if local else None}


def _size(size: int) -> str:
    """Return a size in megabytes or gigabytes.

    >>> _size(1489533), _size(16_160_000_000)
    ('1.5 MB', '16.2 GB')
    """
    return f"{size / 1e9:.1f} GB" if size >= 1e9 else f"{size / 1e6:.1f} MB"
