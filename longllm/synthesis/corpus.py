"""Texts to make questions of: where they come from, which are fit, and a draw that takes none twice."""

from __future__ import annotations

import hashlib
import os
import random
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

#: what files of a folder are read
_SUFFIXES = {".txt", ".md", ".markdown", ".html", ".htm", ".pdf"}
_CHAPTER = re.compile(r"(?m)^(?=(?:CHAPTER|Chapter|EPILOGUE|Epilogue)\b)")


@dataclass(frozen=True)
class SourceText:
    """A text with a name; ``facts`` are the other values of its row.

    >>> SourceText("a", "Call me Ishmael.").digest == SourceText("b", "Call  me\\nIshmael. ").digest
    True
    """

    name: str
    text: str
    facts: Mapping[str, Any] = field(default_factory=dict)

    @property
    def digest(self) -> str:
        """Return a mark that texts share which differ in white space and Unicode composition alone."""
        plain = " ".join(unicodedata.normalize("NFC", self.text).split())
        return hashlib.sha256(plain.encode("utf-8", "surrogatepass")).hexdigest()[:32]


@dataclass(frozen=True)
class Fitness:
    """Which texts are fit; what they are dropped for is counted.

    Raises:
        ValueError: naming the field, what it got and its range.

    >>> Fitness(least=64_000, most=80_000).language
    ''
    """

    least: int = 0
    """tokens of a text: at least so many"""
    most: int = 0
    """tokens of a text: at most so many; 0 = any number"""
    language: str = ""
    """code of the language that a text must be in, such as en; needs the package langdetect"""

    def __post_init__(self) -> None:
        """Refuse bounds that nothing satisfies."""
        if self.least < 0 or self.most < 0 or 0 < self.most < self.least:
            raise ValueError(f"least and most must be 0 or more and in order, got {self.least} and {self.most}")

    def fault(self, text: SourceText, count: Callable[[str], int]) -> str:
        """Return why a text is not fit, "" if it is. Cheap questions are asked first."""
        if not text.text.strip():
            return "empty"
        try:
            text.text.encode()
        except UnicodeEncodeError:
            return "not encodable"
        meta = text.facts.get("meta")
        told = text.facts.get("language") or (meta.get("language") if isinstance(meta, dict) else None)
        if self.language and isinstance(told, str) and told != self.language:
            return "another language"
        if self.least or self.most:
            tokens = count(text.text)
            if tokens < self.least:
                return "too short"
            if self.most and tokens > self.most:
                return "too long"
        if self.language and language_of(text.text) != self.language:
            return "another language"
        return ""


def read_corpus(source: str | os.PathLike[str]) -> Iterator[SourceText]:
    """Yield the texts of a source, one after the other.

    A source is a JSON Lines file (``{"text": …}``, and ``name``, ``id`` or ``title`` if there), another file, a folder
    of such files, or a name of the catalog: ``sotu`` (each address), ``moby-dick``, ``moby-dick/chapters``.

    Raises:
        ValueError: a row without text, naming file and line; unknown name; a file that cannot be read.
        OSError: no such file, or the data cannot be fetched.

    >>> import pathlib, tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     file = pathlib.Path(folder, "texts.jsonl")
    ...     _ = file.write_text('{"text": "Call me Ishmael.", "id": 7}\\n')
    ...     [(text.name, text.text) for text in read_corpus(file)]
    [('7', 'Call me Ishmael.')]
    """
    import catalog

    path = Path(source).expanduser()
    name = os.fspath(source)
    if path.suffix in (".jsonl", ".json") and path.is_file():
        yield from _rows(path)
    elif path.is_dir():
        files = sorted(file for file in path.rglob("*") if file.suffix.lower() in (*_SUFFIXES, ".jsonl"))
        if not files:
            raise ValueError(f"{name} holds no texts ({', '.join(sorted(_SUFFIXES))} or .jsonl)")
        for file in files:
            yield from read_corpus(file)
    elif not path.exists() and any(row.name == name and row.documents for row in catalog.rows()):
        for member in catalog.documents(name):
            yield SourceText(member, catalog.read_document(member).text)
    elif not path.exists() and name.endswith("/chapters"):
        whole = catalog.read_document(name.removesuffix("/chapters"))
        for number, chapter in enumerate(chapters(whole.text), 1):
            yield SourceText(f"{whole.name}/{number}", chapter)
    else:
        document = catalog.read_document(source)
        yield SourceText(document.name, document.text)


def chapters(text: str) -> list[str]:
    """Cut a book where a line begins with CHAPTER; joined, the pieces are the book.

    >>> chapters("CHAPTER 1. Loomings.\\n\\nCall me Ishmael.\\n\\nCHAPTER 2. The Carpet-Bag.\\n")[1]
    'CHAPTER 2. The Carpet-Bag.\\n'
    """
    return [piece for piece in _CHAPTER.split(text) if piece]


def abstract_first(text: str, marker: str = "Abstract: ") -> str:
    """Move the abstract of a paper to its front: what follows the last marker, a blank line, then the rest.

    A text without a marker stays as it is.

    >>> abstract_first("1 Introduction …\\n\\nAbstract: We show …")
    'Abstract: We show …\\n\\n1 Introduction …\\n\\n'
    >>> abstract_first("no abstract here")
    'no abstract here'
    """
    before, found, after = text.rpartition(marker)
    return f"{found}{after}\n\n{before}" if found and before else text


def language_of(text: str) -> str:
    """Return the code of the language that a text is in, "" if none is recognised.

    Raises:
        ImportError: the package ``langdetect`` (``longscope[synth]``) is not installed.
    """
    try:
        from langdetect import PROFILES_DIRECTORY, DetectorFactory, LangDetectException
    except ImportError as error:
        raise ImportError("telling languages apart needs langdetect: pip install 'longscope[synth]'") from error
    global _detectors
    if _detectors is None:
        # A factory of our own: the package's is shared, and unseeded it answers differently from call to call.
        _detectors = DetectorFactory()
        _detectors.load_profile(PROFILES_DIRECTORY)
        _detectors.seed = 2024
    detector = _detectors.create()
    detector.append(text[:10_000])
    try:
        return str(detector.detect())
    except LangDetectException:
        return ""


_detectors: Any = None


def sift(
    source: Callable[[], Iterator[SourceText]],
    count: Callable[[str], int],
    fitness: Fitness | None = None,
    *,
    take: int = 0,
    seed: int = 2024,
    exclude: Collection[str] = (),
) -> tuple[list[SourceText], Counter[str]]:
    """Draw texts that are fit, different and not excluded; return them, and what became of all others.

    The draw depends on the texts and the seed, not on their order. The source is read twice, and only what is drawn
    is kept, so that a corpus may be larger than memory.

    Args:
        source: gives the texts, the same ones each time.
        count: counts the tokens of a text.
        fitness: of the texts; None takes any.
        take: how many to draw; 0 = all.
        seed: of the draw.
        exclude: digests of texts that other stages have used.

    Raises:
        ValueError: fewer texts are left than are to be drawn.

    >>> texts = [SourceText(name, f"text {name}") for name in "abcd"] + [SourceText("e", "text  a")]
    >>> drawn, others = sift(lambda: iter(texts), len, take=2, exclude={texts[1].digest})
    >>> len(drawn), dict(others)
    (2, {'used by another stage': 1, 'repeated': 1, 'not drawn': 1})
    """
    fitness, others, fit = fitness or Fitness(), Counter[str](), dict[str, None]()
    for text in source():
        digest = text.digest
        if digest in exclude:
            others["used by another stage"] += 1
        elif digest in fit:
            others["repeated"] += 1
        elif fault := fitness.fault(text, count):
            others[fault] += 1
        else:
            fit[digest] = None
    if len(fit) < max(take, 1):
        why = ", ".join(f"{number:,} {reason}" for reason, number in others.items()) or "the source is empty"
        wanted = f"{take or 'some'} texts were asked for, {len(fit):,} are fit"
        raise ValueError(f"{wanted} ({why}): relax the limits or take fewer")
    drawn = sorted(fit)
    random.Random(seed).shuffle(drawn)
    places = {digest: place for place, digest in enumerate(drawn[: take or None])}
    others["not drawn"] += len(fit) - len(places)
    kept: dict[int, SourceText] = {}
    for text in source():
        place = places.get(text.digest)
        if place is not None:
            kept.setdefault(place, text)
    return [kept[place] for place in sorted(kept)], +others


def _rows(path: Path) -> Iterator[SourceText]:
    """Yield the texts of a JSON Lines file."""
    from training import Field, read_rows

    for number, row in read_rows(path, (Field("text", str),)):
        facts = {key: value for key, value in row.items() if key != "text"}
        name = next((str(row[key]) for key in ("name", "id", "title") if row.get(key) not in (None, "")), "")
        yield SourceText(name or f"{path.stem}/{number}", row["text"], facts)
