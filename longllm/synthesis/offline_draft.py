"""A conversation about a text while it is being made: pieces, questions with their evidence, fitting to a length."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from longllm.prompts import AFTER_DOCUMENT, QUESTION
from longllm.synthesis.offline_texts import Piece, clean, joined

# Other ways to put the question after the text, besides the one of `longscope ask`.
ASIDE = (
    "{question}",
    "Question: {question}",
    "{question} Answer in a few words.",
    "Now a question about this text. {question}",
    "Look it up in the text above: {question}",
    "Using only what is written above, reply in one sentence. {question}",
)
#: what may stand before the text
OPENINGS = (
    "Here is a text. Read it with care; questions about it come at the end.\n\n",
    "Text:\n\n",
    "I will ask you about details of what follows.\n\n",
    "Please read this.\n\n",
    "Somewhere in the following pages is what I would like to know.\n\n",
)
# A last sentence of which so few tokens would be left is dropped.
_SHORTEST_CUT = 3


class Unfit(ValueError):
    """A draft that cannot become a row: too long, or a question with two answers. Another is drawn."""


@dataclass(frozen=True)
class Turn:
    """A question, its answer, and which pieces of the text hold the answer."""

    question: str
    answer: str
    evidence: tuple[int, ...] = ()
    once: tuple[str, ...] = ()
    """what the text must hold exactly once for the question to be fair"""


@dataclass
class Draft:
    """A text in pieces and questions about it; the text may grow by ``more``, in which no answer is sought."""

    source: str
    pieces: list[str]
    turns: list[Turn]
    tokens: int = 0
    """about how many tokens the pieces have"""
    more: Sequence[Piece] = ()
    opening: str = ""
    wording: str = QUESTION
    extra: list[str] = field(default_factory=list)

    def conversation(self) -> list[dict[str, str]]:
        """Return the turns as chat messages, the text before the first question."""
        document = joined([*self.pieces, *self.extra])
        lead = self.opening + document + AFTER_DOCUMENT if document else ""
        messages = []
        for turn in self.turns:
            asked = lead + self.wording.format(question=turn.question) if lead else turn.question
            messages += [{"role": "user", "content": asked}, {"role": "assistant", "content": turn.answer}]
            lead = ""
        return messages

    def positions(self) -> list[list[list[int]]]:
        """Return for each turn where its evidence stands in the first message: [start, end) in characters."""
        lost = len("".join(self.pieces)) - len(joined(self.pieces))
        ends = [len(self.opening) - lost]
        for piece in self.pieces:
            ends.append(ends[-1] + len(piece))
        spans = []
        for turn in self.turns:
            bare = [(ends[at + 1] - len(self.pieces[at].lstrip()), ends[at + 1]) for at in turn.evidence]
            spans.append([list(span) for span in bare])
        return spans

    def check(self) -> None:
        """Refuse a question that has two answers in the whole text.

        Raises:
            Unfit: there is one.
        """
        text = clean(joined([*self.pieces, *self.extra]))
        for turn in self.turns:
            for quote in turn.once:
                if text.count(quote) != 1:
                    raise Unfit(f"{quote!r} occurs {text.count(quote)} times")


def fitted(draft: Draft, tokenizer: Any, target: int) -> int:
    """Lengthen a draft's text until the rendered conversation has ``target`` tokens or a few less; return how many.

    A conversation without a text stays as it is.

    Raises:
        Unfit: it is too long already, or its text cannot grow far enough.
    """
    if not draft.pieces:
        return _rendered(draft.conversation(), tokenizer)
    bare = Draft(draft.source, ["-"], draft.turns, opening=draft.opening, wording=draft.wording)
    tokens = draft.tokens + _rendered(bare.conversation(), tokenizer)
    room, supply = target - tokens, sum(piece.tokens for piece in draft.more)
    if not 0 <= room <= supply:
        raise Unfit(f"{tokens} tokens cannot be made {target}")
    # The tokens of joined pieces may be fewer or more than theirs apart, so the sum is measured and mended.
    for _ in range(6):
        draft.extra = _cut(draft.more, max(0, room), tokenizer)
        tokens = _rendered(draft.conversation(), tokenizer)
        if tokens <= target:
            return tokens
        room -= tokens - target
    raise Unfit(f"{tokens} tokens could not be cut to {target}")


def _rendered(messages: list[dict[str, str]], tokenizer: Any) -> int:
    text = tokenizer.apply_chat_template(messages, tokenize=False)
    return len(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])


def _cut(pieces: Sequence[Piece], room: int, tokenizer: Any) -> list[str]:
    """Return pieces of ``room`` tokens; the last one is cut after a word."""
    found = []
    for piece in pieces:
        if piece.tokens > room:
            if room >= _SHORTEST_CUT:
                ids = tokenizer(piece.text, add_special_tokens=False)["input_ids"][:room]
                head = piece.text[: len(tokenizer.decode(ids))]
                # Back to the last white space, since a token may end within a word.
                kept = head[: max(head.rfind(" "), head.rfind("\n"), 0)]
                found.append(kept.rstrip())
            break
        found.append(piece.text)
        room -= piece.tokens
    return found


def dressed(draft: Draft, rng: random.Random, usual: float, opened: float) -> Draft:
    """Choose what stands before the text and how the first question is put.

    Args:
        draft: to be changed.
        rng: where chance comes from.
        usual: how often the wording is that of ``longscope ask``, 0 to 1.
        opened: how often something stands before the text.
    """
    draft.wording = QUESTION if rng.random() < usual else rng.choice(ASIDE)
    draft.opening = rng.choice(OPENINGS) if rng.random() < opened else ""
    return draft
