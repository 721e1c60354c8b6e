"""``longscope fetch``: get models and data sets before they are needed, or check those that are here."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import catalog


def fetch(names: list[str], *, verify: bool = False, force: bool = False) -> Iterator[str | dict[str, Any]]:
    """Download models and data sets of the catalog, check them and convert them where needed.

    What is here already is not fetched again. If fetching fails, what was here before stays as it was.

    Args:
        names: names from ``longscope models``, or ``defaults`` for the ones that the other commands use unasked
        verify: compare every file with its sha256 and fetch anew what is damaged
        force: fetch anew also what is here and complete
    """
    wanted: list[str] = []
    for name in names:
        chosen = [row.name for row in catalog.rows() if row.default] if name == "defaults" else [name]
        # Every name is looked up before the first download.
        wanted += [row for row in map(_name, chosen) if row not in wanted]
    fetched = []
    for name in wanted:
        path = catalog.fetch(name, force=force)
        checked = None
        if verify:
            try:
                checked = catalog.verify(name)
            except OSError as damage:
                yield f"{damage}\n"
                path = catalog.fetch(name)
                checked = catalog.verify(name)
        proof = "" if checked is None else f" ({checked} files verified)"
        yield f"{name}: {path}{proof}\n"
        fetched.append({"name": name, "path": str(path), "verified": checked})
    yield {"fetched": fetched}


def _name(name: str) -> str:
    """Return the row's own name for a name or hub repository."""
    return catalog.row(name).name
