"""The spans of a document that share most words with a question: what is left when a model reads only a part of it."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from longllm.prompts import encode

#: words of a span: a paragraph or so
_WORDS = 100
#: stands where text was left out
_GAP = "\n[...]\n"


@dataclass(frozen=True)
class Excerpt:
    """Spans of a document, in its order.

    >>> Excerpt(text="a [...] c", spans=((0, 1), (2, 3)), tokens=5, document_tokens=9).spans
    ((0, 1), (2, 3))
    """

    text: str
    spans: tuple[tuple[int, int], ...]
    """(first, last + 1) character of each span in the document"""
    tokens: int
    """of ``text``"""
    document_tokens: int


def retrieve(tokenizer: Any, document: str, question: str, budget: int) -> Excerpt:
    """Return the spans with the highest BM25 score that fit into ``budget`` tokens.

    A search, not a reading: what shares no word with the question is not found.

    Args:
        tokenizer: counts the tokens.
        document: the whole text.
        question: whose words are looked for.
        budget: tokens of the excerpt, marks for left-out text included.

    Raises:
        ValueError: an empty document, or a budget that not even one span fits.
        ImportError: bm25s (``longscope[index]``) is not installed.

    >>> text = "The sea is wide. " * 40 + "The captain is called Ahab. " * 40 + "The sky is blue. " * 40
    >>> words = lambda text, **options: {"input_ids": text.split()}
    >>> excerpt = retrieve(words, text, "Who is the captain?", 120)
    >>> "Ahab" in excerpt.text, "sky" in excerpt.text, excerpt.document_tokens
    (True, False, 520)
    """
    spans = [match.span() for match in re.finditer(rf"(?:\S+\s*){{1,{_WORDS}}}", document)]
    if not spans:
        raise ValueError("the document is empty")
    scores = bm25_scores(question, [document[begin:end] for begin, end in spans])
    gap, left = len(encode(tokenizer, _GAP)), budget
    chosen = []
    for number in sorted(range(len(spans)), key=lambda span: -scores[span]):
        cost = len(encode(tokenizer, document[slice(*spans[number])])) + gap
        if cost > left:
            break
        chosen.append(number)
        left -= cost
    if not chosen:
        raise ValueError(f"no span of {_WORDS} words fits into {budget} tokens: give more")
    kept = tuple(spans[number] for number in sorted(chosen))
    text = _GAP.join(document[begin:end].strip() for begin, end in kept)
    return Excerpt(text, kept, len(encode(tokenizer, text)), len(encode(tokenizer, document)))


def bm25_scores(question: str, passages: Sequence[str]) -> list[float]:
    """Return how much each passage has to do with a question, by the words they share (BM25).

    Raises:
        ImportError: bm25s (``longscope[index]``) is not installed.

    >>> scores = bm25_scores("Who is the captain?", ["The sea is wide.", "The captain is called Ahab."])
    >>> scores[1] > scores[0] == 0
    True
    """
    try:
        import bm25s
    except ImportError as error:
        raise ImportError("scoring by words needs bm25s: pip install 'longscope[index]'") from error
    quiet = {"stopwords": "en", "show_progress": False}
    index = bm25s.BM25()
    index.index(bm25s.tokenize(list(passages), **quiet), show_progress=False)
    asked = bm25s.tokenize([question], return_ids=False, **quiet)[0]
    known = [word for word in asked if word in index.vocab_dict]
    return [float(score) for score in index.get_scores(known)] if known else [0.0] * len(passages)
