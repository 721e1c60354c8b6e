"""Questions for RULER's two QA kinds: from rows in a file, or from the State of the Union addresses."""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from typing import Any

import catalog
from longllm.evals.offline import Passage, passages
from longllm.evals.rows import field, read_rows

#: passages that others are drawn from; 128K tokens take about 1,300
_POOL = 4000


def read_questions(source: str) -> list[dict[str, Any]]:
    """Return the rows of a file: ``question``, ``answers`` and what holds the answer, ``documents`` or ``context``.

    Raises:
        ValueError, OSError: as ``longllm.evals.rows.read_rows``.
    """
    rows = []
    for row in read_rows(source, "qa", ["question", "answers|answer", "documents|context"]):
        answers, documents = field(row, "answers", "answer"), field(row, "documents", "context")
        if isinstance(answers, dict):  # as SQuAD has them
            answers = answers["text"]
        rows.append(
            {
                "question": row["question"],
                "answers": [answers] if isinstance(answers, str) else list(answers),
                "documents": [documents] if isinstance(documents, str) else list(documents),
            }
        )
    return rows


def addresses() -> list[Passage]:
    """Return the passages of all State of the Union addresses of the catalog."""
    read = (catalog.read_document(name) for name in catalog.documents("sotu"))
    return [passage for document in read for passage in passages(document.text, document.title)]


def one_step(found: Sequence[Passage], count: int, seed: int = 42) -> list[dict[str, Any]]:
    """Return questions for qa_1: which president said a sentence of one of the documents?

    >>> said = [Passage("The union is strong today.", f"State of the Union {year}, A. Man") for year in (1800, 1801)]
    >>> one_step(said, 1)[0]["answers"]
    ['A. Man', 'Man']
    """
    draws = random.Random(f"{seed}/qa_1")
    pool = [shown(passage) for passage in draws.sample(found, min(_POOL, len(found)))]
    rows = []
    for passage in draws.sample(found, min(count, len(found))):
        names = [passage.president, passage.president.split()[-1]]
        ask = f'Which president said: "{striking(passage.text)}"'
        rows.append({"question": ask, "answers": names, "documents": [shown(passage)], "distractors": pool})
    return rows


def two_steps(found: Sequence[Passage], count: int, seed: int = 42) -> list[dict[str, Any]]:
    """Return questions for qa_2: of which other year is an address by the president who said a sentence?

    Two documents are by that president, of different years, and none of the others.

    >>> said = [Passage("The union is strong today.", f"State of the Union {year}, A. Man") for year in (1800, 1801)]
    >>> sorted(row["answers"][0] for row in two_steps(said, 2))
    ['1800', '1801']
    """
    draws = random.Random(f"{seed}/qa_2")
    years: dict[str, set[str]] = {}
    for passage in found:
        years.setdefault(passage.president, set()).add(passage.year)
    several = [passage for passage in found if len(years[passage.president]) > 1]
    pool = draws.sample(found, min(_POOL, len(found)))
    rows = []
    for first in draws.sample(several, min(count, len(several))):
        second = draws.choice([p for p in several if p.president == first.president and p.year != first.year])
        ask = (
            f'The president who said "{striking(first.text)}" gave another address that is among the documents. '
            "Of which year is that other one?"
        )
        rest = [shown(passage) for passage in pool if passage.president != first.president]
        documents = [shown(first), shown(second)]
        rows.append({"question": ask, "answers": [second.year], "documents": documents, "distractors": rest})
    return rows


def shown(passage: Passage) -> str:
    """Return a passage under its year and president.

    >>> shown(Passage("We shall persist.", "State of the Union 1963, Lyndon Johnson"))
    'President Lyndon Johnson, address of 1963: We shall persist.'
    """
    return f"President {passage.president}, address of {passage.year}: {passage.text}"


def striking(text: str) -> str:
    """Return the longest sentence of a text, without quotation marks that would end a quotation.

    >>> striking('So. We shall "persist" here.')
    'We shall persist here.'
    """
    return max(re.split(r"(?<=[.!?]) ", text), key=len).replace('"', "")
