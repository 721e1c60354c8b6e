"""The long texts that needles are hidden in: a document of the catalog, a file, or a folder of .txt files."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import catalog
from longllm.prompts import encode

#: a whole novel, 312,012 tokens of SmolLM2
DEFAULT = "moby-dick"


@dataclass(frozen=True)
class Haystack:
    """A long text, from a given place on.

    Raises:
        ValueError: there is no text, or ``start`` lies outside 0 to 1.

    >>> Haystack("notes", "abcdefgh", start=0.5).used
    'efgh'
    """

    name: str
    text: str
    start: float = 0.0
    """share of the text that is left out at its beginning, so that what a model was trained on can be kept out"""

    def __post_init__(self) -> None:
        """Refuse what has no text."""
        if not 0 <= self.start < 1:
            raise ValueError(f"start must be at least 0 and below 1, got {self.start}")
        if not self.used.strip():
            raise ValueError(f"the haystack {self.name} has no text from {self.start} of its length on")

    @property
    def used(self) -> str:
        """Return the text from ``start`` on."""
        return self.text[int(len(self.text) * self.start) :]

    @property
    def facts(self) -> dict[str, Any]:
        """Return what identifies the text in the settings of a run."""
        digest = hashlib.sha256(self.used.encode()).hexdigest()[:16]
        return {"haystack": self.name, "start": self.start, "haystack_sha256": digest}

    def ids(self, tokenizer: Any) -> list[int]:
        """Return the tokens of the text from ``start`` on."""
        return encode(tokenizer, self.used)


def read_haystack(reference: str | os.PathLike[str] = DEFAULT, start: float = 0.0) -> Haystack:
    """Read a document or collection of the catalog, a file, or the ``.txt`` files below a folder, ordered by name.

    Raises:
        ValueError: as ``Haystack``, or a folder without such files.
        OSError: the text cannot be read or fetched.
    """
    folder = Path(reference).expanduser()
    if not folder.is_dir():
        collection = next((row for row in catalog.rows() if row.name == os.fspath(reference) and row.documents), None)
        if collection is not None and len(names := catalog.documents(collection.name)) > 1:
            texts = (catalog.read_document(name).text.strip() for name in names)
            return Haystack(collection.name, "\n\n".join(texts), start)
        document = catalog.read_document(reference)
        return Haystack(document.name, document.text, start)
    files = sorted(folder.rglob("*.txt"))
    if not files:
        raise ValueError(f"the folder {reference} holds no .txt file: name one that does, or a single file")
    text = "\n\n".join(file.read_text(encoding="utf-8").strip() for file in files)
    return Haystack(folder.name, text, start)


def stretch(hay: Sequence[int], count: int, place: float = 0.0) -> tuple[list[int], int]:
    """Return ``count`` tokens of a haystack and where they begin; a haystack that is too short is repeated.

    ``place`` (0 to 1) chooses among all the stretches that fit.

    Raises:
        ValueError: no tokens, or a place outside 0 to 1.

    >>> stretch([1, 2, 3, 4, 5], 3, 0.5), stretch([1, 2], 5)
    (([2, 3, 4], 1), ([1, 2, 1, 2, 1], 0))
    """
    if not hay or not 0 <= place <= 1:
        raise ValueError(f"need tokens and a place between 0 and 1, got {len(hay)} tokens and {place}")
    if len(hay) < count:
        return (list(hay) * (count // len(hay) + 1))[:count], 0
    begin = int((len(hay) - count) * place)
    return list(hay[begin : begin + count]), begin
