"""Perplexity of long texts: sliding windows that score every token once, and the loss of the same tokens by context."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import catalog
from longllm.evals.rows import HUB, read_rows
from longllm.evals.task import Answer, Answerer, Example, Row
from longllm.evals.truncation import begin_ids
from longllm.prompts import encode


@dataclass(frozen=True)
class Window:
    """Tokens ``begin`` to ``end`` of a text, of which those from ``first`` on are scored.

    >>> Window(begin=4, end=12, first=8).first
    8
    """

    begin: int
    end: int
    first: int


def windows(tokens: int, max_length: int, stride: int, lead: int) -> Iterator[Window]:
    """Yield the windows over a text; together they score every token that has something before it exactly once.

    A window begins every ``stride`` tokens and holds ``max_length`` less ``lead`` of them. With a stride of what a
    window holds, windows are disjoint. (The reference lets the stride be ``max_length``: with a begin-of-text token in
    every window, it then skips one token between two of them.)

    Args:
        tokens: of the text.
        max_length: of a window, what leads it included.
        stride: between two windows; 0 = one window, and what is beyond it is not scored.
        lead: 1 if a begin-of-text token stands before the tokens of every window, else 0; the text's first token is
            then not scored.

    Raises:
        ValueError: a window too short, or a stride that would skip tokens.

    >>> [(w.begin, w.end, w.first) for w in windows(10, 5, 2, 1)]
    [(0, 4, 0), (2, 6, 4), (4, 8, 6), (6, 10, 8)]
    """
    size = max_length - lead
    if size < 2:
        raise ValueError(f"max_length must be at least {lead + 2}, got {max_length}")
    # Without a token before it, the first one of a window cannot be scored there.
    most = size - 1 + lead
    if not 0 <= stride <= most:
        why = "one slot of each window is the begin-of-text token's" if lead else "a window's first token is not scored"
        raise ValueError(f"stride must lie between 0 and {most:,} ({why}), got {stride:,}")
    scored = 1 - lead
    for begin in range(0, tokens, stride or tokens):
        end = min(begin + size, tokens)
        if end > scored:
            yield Window(begin, end, scored)
            scored = end
        if end == tokens:
            return


@dataclass(frozen=True)
class Perplexity:
    """Token-weighted loss of each text by sliding windows; the perplexity of a run is exp of their mean.

    >>> Perplexity([("whale", "The whale is white.")], max_length=8, stride=4).name
    'perplexity-8'
    """

    texts: Sequence[tuple[str, str]]
    """(name, text)"""
    max_length: int = 4096
    stride: int = 2048
    min_tokens: int = 2
    """shorter texts are left out"""

    def __post_init__(self) -> None:
        """Refuse windows that cannot be.

        Raises:
            ValueError: as ``windows``, or fewer than two tokens.
        """
        if self.min_tokens < 2:
            raise ValueError(f"min_tokens must be at least 2, got {self.min_tokens}")
        list(windows(1, self.max_length, self.stride, 1))

    @property
    def name(self) -> str:
        """Return the name, which tells runs with different windows apart."""
        return f"perplexity-{self.max_length}"

    def examples(self, tokenizer: Any) -> Iterator[Example]:
        """Yield one example per text that is long enough.

        Raises:
            NotImplementedError: there is no tokeniser.
        """
        for name, text in self.texts:
            if len(encode(_known(tokenizer), text)) >= self.min_tokens:
                yield Example(name, text, (), 0, chat=False, truncate="error")

    def measure(self, answerer: Answerer, example: Example) -> tuple[Answer, dict[str, float]]:
        """Return the loss of a text: the sum over all its windows by the number of tokens scored."""
        begun = time.perf_counter()
        ids, begin = encode(_known(answerer.tokenizer), example.prompt), begin_ids(answerer.tokenizer)
        total, scored, count = 0.0, 0, 0
        for window in windows(len(ids), self.max_length, self.stride, len(begin)):
            part = [*begin, *ids[window.begin : window.end]]
            losses = answerer.token_losses(part, window.first - window.begin + len(begin))
            total, scored, count = total + math.fsum(losses), scored + len(losses), count + 1
        seconds = time.perf_counter() - begun
        facts = {"tokens": scored, "windows": count, "window_seconds": seconds / count, "peak_bytes": peak_bytes()}
        return Answer("", len(ids), 0, seconds, facts), {"nll": total / scored}

    def score(self, example: Example, answer: str) -> dict[str, float]:
        """Refuse: no answer in words can be scored.

        Raises:
            NotImplementedError: always.
        """
        raise NotImplementedError("perplexity is measured, not answered")

    def summarise(self, rows: Sequence[Row]) -> dict[str, Any]:
        """Return the mean loss over texts, the perplexity, seconds per window and the peak of memory."""
        return {
            **_means(rows),
            "max_length": self.max_length,
            "stride": self.stride,
            "window_seconds": _mean([row.facts["window_seconds"] for row in rows]),
            "peak_bytes": max((row.facts["peak_bytes"] for row in rows), default=0),
        }


@dataclass(frozen=True)
class LastTokens:
    """Loss of the same tokens after contexts of several lengths: does a model use, or stand, what lies far back?

    At ``places`` of each text, spread evenly, the ``last`` tokens are scored with each of ``lengths`` tokens in all.

    >>> LastTokens([("whale", "The whale is white.")], (8, 16), last=4, places=1).name
    'context'
    """

    texts: Sequence[tuple[str, str]]
    lengths: Sequence[int] = (2048, 4096, 8192)
    last: int = 512
    places: int = 4
    name: str = "context"

    def __post_init__(self) -> None:
        """Refuse lengths that leave no context.

        Raises:
            ValueError: no lengths, or numbers out of range.
        """
        if not self.lengths or self.places < 1 or not 1 <= self.last < min(self.lengths):
            raise ValueError(
                f"need lengths above last and at least one place, got lengths {list(self.lengths)}, last {self.last}, "
                f"places {self.places}"
            )

    def examples(self, tokenizer: Any) -> Iterator[Example]:
        """Yield an example per text, place and length; texts shorter than the longest length are left out.

        Raises:
            ValueError: all are.
            NotImplementedError: there is no tokeniser.
        """
        longest, found = max(self.lengths), False
        begin = begin_ids(_known(tokenizer))
        for name, text in self.texts:
            ids = encode(tokenizer, text)
            if len(ids) < longest:
                continue
            found = True
            for place in range(self.places):
                end = longest + (len(ids) - longest) * place // max(1, self.places - 1)
                for length in sorted(self.lengths):
                    part = (*begin, *ids[end - length + len(begin) : end])
                    facts = {"length": length, "end": end}
                    yield Example(f"{name}@{end}/{length}", "", (), 0, chat=False, ids=part, facts=facts)
        if not found:
            raise ValueError(f"no text has the {longest:,} tokens of the longest length")

    def measure(self, answerer: Answerer, example: Example) -> tuple[Answer, dict[str, float]]:
        """Return the mean loss of the last tokens."""
        begun = time.perf_counter()
        ids = example.ids or ()
        losses = answerer.token_losses(ids, len(ids) - self.last)
        facts = {"tokens": len(losses), "peak_bytes": peak_bytes()}
        answer = Answer("", len(ids), 0, time.perf_counter() - begun, facts)
        return answer, {"nll": math.fsum(losses) / len(losses)}

    def score(self, example: Example, answer: str) -> dict[str, float]:
        """Refuse: no answer in words can be scored.

        Raises:
            NotImplementedError: always.
        """
        raise NotImplementedError("losses are measured, not answered")

    def summarise(self, rows: Sequence[Row]) -> dict[str, Any]:
        """Return loss and perplexity by length of the context."""
        lengths = sorted({row.facts["length"] for row in rows})
        by_length = {str(length): _means([row for row in rows if row.facts["length"] == length]) for length in lengths}
        return {"last": self.last, "lengths": by_length}


def read_texts(source: str, begin: float = 0.0, end: float = 1.0) -> list[tuple[str, str]]:
    """Return names and texts: rows with a field ``text``, or one document of the catalog or a file.

    Args:
        source: JSON lines, Parquet or ``hub:…`` with rows of ``text``; else what ``catalog.read_document`` reads.
        begin, end: which part of each text, as fractions of its characters; cut at white space. Training on another
            part of a text leaves this one unseen.

    Raises:
        ValueError: a range that is none, or as ``read_rows`` and ``read_document``.

    >>> import pathlib, tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     file = pathlib.Path(folder, "a.txt")
    ...     _ = file.write_text("one two three four")
    ...     read_texts(str(file), 0.5)[0][1]
    'four'
    """
    if not 0 <= begin < end <= 1:
        raise ValueError(f"a part of a text lies between 0 and 1 and begins before it ends, got {begin} to {end}")
    if source.startswith(HUB) or Path(source).suffix in (".jsonl", ".json", ".parquet"):
        texts = [(f"{number}", str(row["text"])) for number, row in enumerate(read_rows(source, needs=("text",)))]
    else:
        document = catalog.read_document(source)
        texts = [(document.name, document.text)]
    return [(name, _part(text, begin, end)) for name, text in texts]


def peak_bytes() -> int:
    """Return the most memory that was in use so far: of the GPU if there is one, else of the process; 0 = not known.

    >>> peak_bytes() >= 0
    True
    """
    import torch

    if torch.cuda.is_available():
        return int(torch.cuda.max_memory_allocated())
    if sys.platform == "win32":
        return 0
    import resource

    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else most * 1024


def _part(text: str, begin: float, end: float) -> str:
    """Return a part of a text that begins and ends with a whole word."""
    places = []
    for share in (begin, end):
        place = round(share * len(text))
        while 0 < place < len(text) and not text[place - 1].isspace():
            place += 1
        places.append(place)
    return text[places[0] : places[1]].strip() if (begin, end) != (0.0, 1.0) else text


def _known(tokenizer: Any) -> Any:
    """Return the tokeniser.

    Raises:
        NotImplementedError: there is none.
    """
    if tokenizer is None:
        raise NotImplementedError("losses of tokens need the model's tokeniser: an endpoint shows no likelihoods")
    return tokenizer


def _means(rows: Sequence[Row]) -> dict[str, Any]:
    """Return the mean loss over rows, its perplexity, and how many tokens were scored."""
    nll = _mean([row.scores["nll"] for row in rows])
    return {"nll": nll, "perplexity": math.exp(nll), "tokens": sum(row.facts["tokens"] for row in rows)}


def _mean(values: Sequence[float]) -> float:
    """Return a mean, not a number if there is nothing."""
    return math.fsum(values) / len(values) if values else math.nan
