"""Real texts to make long questions of: pieces of one sentence each, and what is held out for evaluation."""

from __future__ import annotations

import itertools
import random
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from longllm.synthesis.offline_words import Words

Part = Literal["train", "validation"]

#: years whose addresses are evaluation material (and those our examples ask about): never in the data. That of 1897
#: quotes the one of 1875 and is quoted in that of 1898.
HELD_OUT_YEARS = frozenset((1790, 1837, 1875, 1897, 1898, 1953, 1961, 1963, 1999, *range(2017, 2022)))
#: the share of the novel that may be used; what follows it is held out
NOVEL_SHARE = 0.6
# Of what may be used, the addresses of years ending in 6 and the novel's pages from here on are for validation rows.
_NOVEL_TRAIN_SHARE = 0.55
_VALIDATION_DIGIT = 6

# A sentence ends at a full stop or the like, closing quotation marks included, unless the word is an abbreviation.
_END = re.compile(r"(?<=[.!?])[\"”’')]*(?=\s+[\"“‘'(]?[A-Z0-9])")
_ABBREVIATED = re.compile(r"(?:^|[\s(])(?:Mr|Mrs|Dr|St|No|Messrs|Hon|Gen|Col|Capt|vs|[A-Z])\.$|\b[A-Z]\.[A-Z]\.$")

# For texts of one phrase over and over, as some tests of long contexts have them.
DRONE = (
    ("Rain fell on the roof.", "Wind went through the trees.", "A dog barked far away.", "Then all was still."),
    ("The wheel turns.", "The bucket goes up, and the bucket comes down.", "Nobody hurries.", "Water runs by."),
    ("One wave comes.", "Another wave follows it.", "The sand is wet.", "Gulls cry over the pier.", "So it goes on."),
    ("Snow lies on the hill.", "Smoke rises from the chimney.", "Someone chops wood.", "Evening is near."),
)


@dataclass(frozen=True)
class Piece:
    """A sentence of a text with the white space before it."""

    text: str
    tokens: int


@dataclass
class Text:
    """A text in pieces of a sentence; joined they are the text."""

    name: str
    title: str
    sentences: list[str]
    counted: list[Piece] = field(default_factory=list, repr=False)

    @classmethod
    def of(cls, name: str, title: str, text: str) -> Text:
        """Cut a text into sentences."""
        return cls(name, title, list(sentences(text)))

    def pieces(self, tokenizer: Any) -> list[Piece]:
        """Return the pieces with their numbers of tokens, counted once."""
        if not self.counted:
            encoded = tokenizer(self.sentences, add_special_tokens=False, verbose=False)["input_ids"]
            self.counted = [Piece(text, len(ids)) for text, ids in zip(self.sentences, encoded, strict=True)]
        return self.counted


@dataclass
class Corpus:
    """What data is made of: addresses with year and president, a novel, and words."""

    speeches: list[Text]
    novel: Text | None
    words: Words

    @classmethod
    def of_catalog(cls, part: Part = "train") -> Corpus:
        """Return the State of the Union addresses but those held out, the first part of Moby-Dick, and WordNet.

        ``train`` and ``validation`` share no text.

        Raises:
            OSError: the data cannot be fetched.
        """
        import catalog

        wanted = [name for name in catalog.documents("sotu") if _part(int(name[5:9])) == part]
        speeches = [Text.of(name, *_titled(catalog.read_document(name))) for name in wanted]
        novel = catalog.read_document("moby-dick")
        middle, end = (int(len(novel.text) * share) for share in (_NOVEL_TRAIN_SHARE, NOVEL_SHARE))
        pages = novel.text[:middle] if part == "train" else novel.text[middle:end]
        return cls(speeches, Text.of("moby-dick", novel.title, pages), Words.of_catalog())

    def stretch(self, rng: random.Random, tokenizer: Any, tokens: int, novel_share: float) -> tuple[str, list[Piece]]:
        """Return the name of a text and so many tokens of it, or more, from a random sentence on.

        A text that is too short is followed by others.
        """
        if self.novel and rng.random() < novel_share:
            chosen = self.novel
        else:
            chosen = rng.choice(self.speeches)
        pieces = chosen.pieces(tokenizer)
        # A text that is hardly longer than what is wanted is taken from its beginning.
        short = sum(piece.tokens for piece in pieces) < 2 * tokens
        rest = iter(pieces[0 if short else rng.randrange(len(pieces)) :])
        found: list[Piece] = []
        lead = ""
        while tokens > 0:
            piece = next(rest, None)
            if piece is None:
                rest, lead = iter(rng.choice(self.speeches).pieces(tokenizer)), "\n\n"
                continue
            found.append(Piece(lead + piece.text, piece.tokens + len(lead)))
            tokens, lead = tokens - found[-1].tokens, ""
        return chosen.name, found


def drone(rng: random.Random, tokenizer: Any, tokens: int) -> list[Piece]:
    """Return at least so many tokens of a few plain sentences, over and over."""
    lines = [f" {line}" for line in rng.choice(DRONE)]
    round_of = [Piece(line, len(tokenizer(line, add_special_tokens=False)["input_ids"])) for line in lines]
    length = sum(piece.tokens for piece in round_of)
    return list(itertools.chain.from_iterable([round_of] * (tokens // length + 1)))


def sentences(text: str) -> Iterator[str]:
    r"""Yield a text sentence by sentence, each with the white space before it; joined they are the text.

    >>> list(sentences("It rained.  Mr. Starbuck slept.\n\nWe did not."))
    ['It rained.', '  Mr. Starbuck slept.', '\n\nWe did not.']
    """
    start = 0
    for match in _END.finditer(text):
        if not _ABBREVIATED.search(text[max(start, match.start() - 12) : match.start()]):
            yield text[start : match.end()]
            start = match.end()
    if text[start:].strip():
        yield text[start:]


def clean(text: str) -> str:
    """Return a text with single spaces."""
    return " ".join(text.split())


def joined(pieces: Sequence[str]) -> str:
    """Return pieces as one text that begins without white space."""
    return "".join(pieces).lstrip()


def _part(year: int) -> str:
    if year in HELD_OUT_YEARS:
        return "held out"
    return "validation" if year % 10 == _VALIDATION_DIGIT else "train"


def _titled(document: Any) -> tuple[str, str]:
    return document.title.removeprefix("State of the Union "), document.text
