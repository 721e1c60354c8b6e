"""Plain text to learn from, as rows of about equal length: pre-training data from the catalog's real texts."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from longllm.synthesis.offline_texts import Corpus, Part, joined
from longllm.synthesis.requests import write_rows


@dataclass(frozen=True)
class Cut:
    """How texts are cut into rows.

    Raises:
        ValueError: naming the field, what it got and its range.

    >>> Cut(tokens=4096).part
    'train'
    """

    tokens: int = 2048
    """tokens of a row, up to the end of a sentence; a text that ends earlier is followed by the next"""
    rows: int = 0
    """at most so many rows; 0 = all that there are"""
    part: Part = "train"
    """train, or validation: texts of its own. What evaluations are made of is in neither"""
    seed: int = 42
    """of the order of the texts"""

    def __post_init__(self) -> None:
        """Refuse values that mean nothing."""
        if self.tokens < 2 or self.rows < 0:
            raise ValueError(f"tokens must be at least 2 and rows 0 or more, got {self.tokens} and {self.rows}")
        if self.part not in ("train", "validation"):
            raise ValueError(f"part must be train or validation, got {self.part!r}")


def text_rows(tokenizer: Any, cut: Cut, corpus: Corpus | None = None) -> Iterator[dict[str, Any]]:
    """Yield rows of ``text``, ``source`` (name of the text it begins with) and ``tokens``; no sentence comes twice.

    Raises:
        ValueError: the texts do not fill one row.
        OSError: the data cannot be fetched.
    """
    corpus = corpus or Corpus.of_catalog(cut.part)
    texts = [*corpus.speeches, *([corpus.novel] if corpus.novel else [])]
    random.Random(cut.seed).shuffle(texts)
    held: list[str] = []
    tokens = made = 0
    source = ""
    for text in texts:
        lead = "\n\n"
        for piece in text.pieces(tokenizer):
            source = source if held else text.name
            held.append(lead + piece.text.lstrip() if lead and held else piece.text)
            tokens, lead = tokens + piece.tokens, ""
            if tokens >= cut.tokens:
                yield {"text": joined(held), "source": source, "tokens": tokens}
                held, tokens, made = [], 0, made + 1
                if made == cut.rows:
                    return
    if not made:
        raise ValueError(f"all texts together have {tokens:,} tokens, fewer than a row of {cut.tokens:,}: lower tokens")


def write_texts(tokenizer: Any, cut: Cut, out: str | Path, *, corpus: Corpus | None = None) -> dict[str, Any]:
    """Write such rows to ``out`` as JSON Lines, all or nothing, and return what was made.

    Raises:
        ValueError: the texts do not fill one row.
        OSError: the file cannot be written, or the data not be fetched.
    """
    out, counts = Path(out).expanduser(), []

    def noted() -> Iterator[dict[str, Any]]:
        for row in text_rows(tokenizer, cut, corpus):
            counts.append(row["tokens"])
            yield row

    out.parent.mkdir(parents=True, exist_ok=True)
    write_rows(out, noted())
    return {"file": str(out), "rows": len(counts), "tokens": sum(counts), "longest": max(counts)}
