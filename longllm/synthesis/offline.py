"""Long questions and answers from real texts, made without a language model: "look up what is stated, answer briefly".

Kinds of rows: ``fact``, invented facts planted in a text; ``speech``, who said what in several addresses; ``cloze``, a
word left out; ``order``, which of two passages comes first; ``recall``, a sentence by its words or its neighbour;
``short``, any of these on a short text; ``meaning``, what a word means. The texts are State of the Union addresses and
the beginning of Moby-Dick; some addresses and the novel's last 40 per cent are held out (``offline_texts``).

The evaluations must not be learnt by heart: none of the sentences, questions or things asked for in
``longllm.evals`` (pass keys, needles, banks of facts) occurs here, and a test compares the wordings.
"""

from __future__ import annotations

import bisect
import itertools
import random
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

from longllm.synthesis import offline_passages as passages
from longllm.synthesis.offline_draft import Draft, Turn, Unfit, dressed, fitted
from longllm.synthesis.offline_facts import asked, invented, planted
from longllm.synthesis.offline_texts import Corpus, Part, Piece, Text, drone
from longllm.synthesis.offline_words import relations
from longllm.synthesis.requests import write_rows

SHARES = {"fact": 0.56, "speech": 0.1, "cloze": 0.07, "order": 0.02, "recall": 0.09, "short": 0.1, "meaning": 0.06}
_SHORT_LENGTHS = (100, 500)
_MEANING_LENGTHS = (60, 400)
# Draws of a row before the lengths are said to be too small for its kind.
_DRAWS = 60
# Tokens that are left free for a question about the text and its answer, which are drawn after the text.
_TURN_TOKENS = 90
# About what the chat template, the announcement and the wording of the question take, and the heading of an address.
_FRAME_TOKENS = 60
_HEADING_TOKENS = 16
_RELATIONS = relations()


@dataclass(frozen=True)
class Mixture:
    """How many rows of what kinds and lengths are made.

    >>> Mixture(rows=10).range_of("fact")
    (1700, 2000)
    """

    rows: int = 2500
    """how many rows"""
    shares: Mapping[str, float] = field(default_factory=lambda: dict(SHARES))
    """share of each kind: fact, speech, cloze, order, recall, short, meaning; they need not add up to 1"""
    low: int = 1700
    """tokens of a row, chat template included: at least so many"""
    high: int = 2000
    """at most so many"""
    lengths: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    """other lengths (least, most) of a kind, such as short: [100, 500], its default"""
    questions: int = 6
    """at most so many questions about a text; a short one gets at most 2"""
    novel: float = 0.4
    """share of the texts that is the novel's; the rest are addresses"""
    droning: float = 0.1
    """share of the fact rows whose text is a few plain sentences over and over"""
    usual: float = 0.7
    """share of the first questions in the wording of longscope ask; the others are worded otherwise"""
    opened: float = 0.2
    """share of the texts with an announcement before them"""
    part: Part = "train"
    """whose texts: train or validation, which share none"""
    seed: int = 0
    """the same seed gives the same rows"""

    def __post_init__(self) -> None:
        """Refuse what cannot be."""
        for name, value in (("rows", self.rows), ("questions", self.questions)):
            if value < 1:
                _refuse(name, value, "at least 1")
        for name in ("novel", "droning", "usual", "opened"):
            if not 0 <= getattr(self, name) <= 1:
                _refuse(name, getattr(self, name), "between 0 and 1")
        for kind in (*self.shares, *self.lengths):
            if kind not in SHARES:
                raise ValueError(f"unknown kind {kind!r}; the kinds are {', '.join(SHARES)}")
        if min(self.shares.values(), default=0) < 0 or sum(self.shares.values()) <= 0:
            _refuse("shares", dict(self.shares), "0 or more, and not all 0")
        for kind in self.shares:
            least, most = self.range_of(kind)
            if not 40 <= least <= most:
                _refuse(f"length of {kind}", (least, most), "least and most tokens, 40 ≤ least ≤ most")

    def range_of(self, kind: str) -> tuple[int, int]:
        """Return least and most tokens of a row of a kind."""
        own = {"short": _SHORT_LENGTHS, "meaning": _MEANING_LENGTHS}.get(kind, (self.low, self.high))
        least, most = self.lengths.get(kind, own)
        return least, most

    def counts(self) -> dict[str, int]:
        """Return how many rows of each kind there are; the largest remainders are rounded up.

        >>> Mixture(rows=3, shares={"fact": 2, "cloze": 1}).counts()
        {'fact': 2, 'cloze': 1}
        """
        total = sum(self.shares.values())
        exact = {kind: self.rows * share / total for kind, share in self.shares.items()}
        found = {kind: int(share) for kind, share in exact.items()}
        late = sorted(exact, key=lambda kind: found[kind] - exact[kind])
        for kind in late[: self.rows - sum(found.values())]:
            found[kind] += 1
        return found


def synthesise(tokenizer: Any, mixture: Mixture, out: str | Path, *, corpus: Corpus | None = None) -> dict[str, Any]:
    """Write the rows of a mixture to ``out`` as JSON Lines, all or nothing, and return what was made.

    Args:
        tokenizer: with a chat template; it counts the tokens.
        mixture: what to make.
        out: the file; one that exists is replaced.
        corpus: the texts, or None for those of the catalog.

    Raises:
        ValueError: the tokeniser has no chat template, or rows of the wanted lengths cannot be made.
        OSError: the file cannot be written, or the data not be fetched.
    """
    from tqdm import tqdm

    begun, out = time.perf_counter(), Path(out).expanduser()
    made: list[tuple[str, str, int, int]] = []

    def noted() -> Iterator[dict[str, Any]]:
        for row in tqdm(rows(tokenizer, mixture, corpus), total=mixture.rows, desc="rows", unit="row"):
            made.append((row["kind"], row["source"].partition("/")[0], row["tokens"], len(row["conversations"]) // 2))
            yield row

    out.parent.mkdir(parents=True, exist_ok=True)
    write_rows(out, noted())
    kinds, sources, lengths, questions = zip(*made, strict=True)
    return {
        "file": str(out),
        "rows": len(lengths),
        "kinds": dict(sorted(Counter(kinds).items())),
        "sources": dict(sorted(Counter(sources).items())),
        "questions": sum(questions),
        "tokens": sum(lengths),
        "shortest": min(lengths),
        "longest": max(lengths),
        "seconds": round(time.perf_counter() - begun, 1),
    }


def rows(tokenizer: Any, mixture: Mixture, corpus: Corpus | None = None) -> Iterator[dict[str, Any]]:
    """Yield the rows of a mixture, kinds mixed.

    A row has ``conversations``, ``source``, ``kind``, ``tokens`` (of the rendered chat) and ``positions``: for each
    question the spans [start, end) of the first message, in characters, that hold its answer.

    Raises:
        ValueError: as ``synthesise``.
    """
    if not tokenizer.chat_template:
        raise ValueError(f"{tokenizer.name_or_path or 'the tokeniser'} has no chat template: take that of a chat model")
    corpus = corpus or Corpus.of_catalog(mixture.part)
    order = [kind for kind, count in mixture.counts().items() for _ in range(count)]
    random.Random(f"order {mixture.seed}").shuffle(order)
    maker = _Maker(tokenizer, mixture, corpus)
    for number, kind in enumerate(order):
        yield maker.row(kind, random.Random(f"row {mixture.part} {mixture.seed} {number}"))


# Makes a question about one sentence of a text.
AskAt = Callable[[random.Random, list[str], int], Turn]


class _Maker:
    """Makes rows one by one; each depends on its own random numbers alone."""

    def __init__(self, tokenizer: Any, mixture: Mixture, corpus: Corpus) -> None:
        self.tokenizer, self.mixture, self.corpus = tokenizer, mixture, corpus
        self.makers: dict[str, Callable[[random.Random, int, int, float], Draft]] = {
            "fact": self.fact,
            "speech": self.speech,
            "cloze": partial(self.passage, passages.cloze),
            "order": partial(self.passage, passages.order),
            "recall": partial(self.passage, passages.recall),
            "meaning": self.meaning,
        }

    def row(self, kind: str, rng: random.Random) -> dict[str, Any]:
        """Return a row of a kind."""
        least, most = self.mixture.range_of(kind)
        reason: Unfit | None = None
        for draw in range(_DRAWS):
            # Where questions take more tokens than was thought, later draws leave more of them free.
            spare = max(0, draw - _DRAWS // 3) / _DRAWS
            target = rng.randint(least, most)
            count = rng.randint(1, 2 if kind == "short" else self.mixture.questions)
            form = kind if kind != "short" else rng.choice(("fact", "fact", "cloze", "recall"))
            try:
                draft = dressed(
                    self.makers[form](rng, target, count, spare), rng, self.mixture.usual, self.mixture.opened
                )
                tokens = fitted(draft, self.tokenizer, target)
                if not least <= tokens <= most:
                    raise Unfit(f"{tokens} tokens")
                draft.check()
            except Unfit as error:
                reason = error
                continue
            return {
                "conversations": draft.conversation(),
                "source": draft.source,
                "kind": kind,
                "tokens": tokens,
                "positions": draft.positions(),
            }
        raise ValueError(
            f"no {kind} row of {least} to {most} tokens in {_DRAWS} draws (the last: {reason}); "
            "allow greater lengths or fewer questions"
        )

    def fact(self, rng: random.Random, target: int, count: int, spare: float) -> Draft:
        """Plant facts in a text and ask about some of them."""
        # About one fact more than is asked for every 300 tokens, so that not every oddity in the text is asked for.
        facts = invented(rng, self.corpus.words, _RELATIONS, count + rng.randint(0, 1 + target // 300))
        turns = asked(rng, facts, range(len(facts)), count)
        inserted = self.count("\n\n".join(fact.sentence for fact in facts))
        talk = self.count(" ".join(f"{turn.question} {turn.answer}" for turn in turns))
        if rng.random() < self.mixture.droning:
            name, text = "drone", drone(rng, self.tokenizer, target + 200)
        else:
            name, text = self.stretch(rng, target)
        base, more = _split(text, int(target * (1 - spare)) - inserted - talk - _FRAME_TOKENS - 12 * count)
        pieces, places = planted(rng, facts, base)
        turns = [
            Turn(turn.question, turn.answer, tuple(places[at] for at in turn.evidence), turn.once) for turn in turns
        ]
        return Draft(name, pieces, turns, _tokens(base) + inserted, more)

    def speech(self, rng: random.Random, target: int, count: int, spare: float) -> Draft:
        """Put excerpts of several addresses one after the other, each under its heading, and ask whose is what."""
        chosen: list[Text] = []
        for text in rng.sample(self.corpus.speeches, min(len(self.corpus.speeches), 12)):
            if _year(text) not in map(_year, chosen) and _president(text) not in map(_president, chosen):
                chosen.append(text)
        chosen = chosen[: rng.randint(2, min(5, max(2, target // 300)))]
        budget = (int(target * (1 - spare)) - count * _TURN_TOKENS) // len(chosen)
        headed = rng.choice(
            ("The address of {year}, given by {president}", "{president}, {year}", "# {year}: {president}")
        )
        pieces: list[str] = []
        headings: list[int] = []
        spoken: list[tuple[int, int]] = []
        more: list[Piece] = []
        tokens = 0
        for which, text in enumerate(chosen):
            headings.append(len(pieces))
            pieces.append("\n\n" + headed.format(year=_year(text), president=_president(text)))
            own = text.pieces(self.tokenizer)
            part, more = _split(own[rng.randrange(max(1, len(own) // 2)) :], budget - _HEADING_TOKENS)
            tokens += _tokens(part) + _HEADING_TOKENS
            if len(part) < 2:
                raise Unfit("an address too short")
            spoken += [(which, len(pieces) + i) for i in range(len(part))]
            pieces += ["\n\n" + part[0].text.lstrip(), *(piece.text for piece in part[1:])]

        def ask(number: int) -> Turn:
            which, at = spoken[number]
            known = [(headings[i], _president(text), _year(text)) for i, text in enumerate(chosen)]
            if rng.random() < 0.15:
                return passages.earlier(rng, *rng.sample(known, 2))
            heading, president, year = known[which]
            return passages.quoted_from(rng, pieces, at, heading, president, year)

        # The last sentence of an excerpt may be cut off, and is followed by another's heading.
        turns = passages.several(rng, range(len(spoken)), count, ask)
        return Draft("sotu", pieces, turns, tokens, more)

    def passage(self, make: AskAt, rng: random.Random, target: int, count: int, spare: float) -> Draft:
        """Ask about sentences of a text."""
        name, text = self.stretch(rng, target)
        base, more = _split(text, int(target * (1 - spare)) - count * _TURN_TOKENS - _FRAME_TOKENS)
        pieces = [piece.text for piece in base]
        # The neighbours of a sentence may be asked for, so the first and the last are left out.
        turns = passages.several(rng, range(1, len(pieces) - 1), count, lambda at: make(rng, pieces, at))
        return Draft(name, pieces, turns, _tokens(base), more)

    def meaning(self, rng: random.Random, target: int, count: int, spare: float) -> Draft:
        """Ask what words mean, without a text."""
        meanings = self.corpus.words.meanings
        if not meanings:
            raise Unfit("the words have no definitions")
        words = rng.sample(list(meanings), min(count, len(meanings)))
        return Draft("wordnet", [], [passages.meaning(rng, word, meanings[word]) for word in words])

    def stretch(self, rng: random.Random, target: int) -> tuple[str, list[Piece]]:
        """Return a text of more tokens than a row will have."""
        return self.corpus.stretch(rng, self.tokenizer, target + 100, self.mixture.novel)

    def count(self, text: str) -> int:
        """Return how many tokens a text has."""
        return len(self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])


def _split(pieces: list[Piece], tokens: int) -> tuple[list[Piece], list[Piece]]:
    """Return the pieces that fit in so many tokens, and the rest."""
    sums = list(itertools.accumulate(piece.tokens for piece in pieces))
    count = bisect.bisect_right(sums, tokens)
    if count == 0:
        raise Unfit("no room for a text")
    return pieces[:count], pieces[count:]


def _tokens(pieces: list[Piece]) -> int:
    return sum(piece.tokens for piece in pieces)


def _year(text: Text) -> str:
    return text.title.partition(", ")[0]


def _president(text: Text) -> str:
    return text.title.partition(", ")[2]


def _refuse(name: str, value: object, wanted: str) -> NoReturn:
    raise ValueError(f"{name} must be {wanted}, got {value}")
