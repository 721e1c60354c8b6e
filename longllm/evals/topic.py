"""Topic retrieval (LongEval): a record of conversations on N topics; which topic was the first?

Released rows are read as they are. Without them, conversations of 400 to 600 tokens are put together from real text:
their words do not fit their topics, which makes no difference to a task that asks for the name of a topic alone.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from longllm.evals.haystack import Haystack
from longllm.evals.interval import tally
from longllm.evals.scorers import qa_f1
from longllm.evals.task import Example, Row, mean_scores
from longllm.prompts import encode

#: topics per record in the published curve
COUNTS = (5, 10, 15, 20, 25, 30, 40, 50, 60, 70)
QUESTION = "What was the first topic that we discussed? Answer with its name alone, without anything else."
_HEADER = (
    "What follows is the record of our earlier conversations on {count} different topics. You are the ASSISTANT, I am "
    "the USER. Each topic begins with the USER naming it. Remember the names of the topics: at the end you will be "
    "asked for the first of them. The record begins here."
)
_OPENING = "\n\nUSER: I would like to talk about {topic}.\nASSISTANT: Gladly. What would you like to say about it?"
_FOOTER = "\n\nThe record ends here."
#: tokens of one conversation
_LEAST, _MOST = 400, 600
TOPICS = tuple(
    f"{aspect} {thing}"
    for thing in (
        "bread", "volcanoes", "chess", "bicycles", "glass", "honey bees", "coral reefs", "tea", "bridges", "opera",
        "paper", "clocks", "deserts", "pottery", "comets", "railways", "cheese", "mirrors", "kites", "violins",
    )
    for aspect in ("the history of", "the chemistry of", "the future of", "children's books about", "museums of")
)  # fmt: skip


@dataclass
class TopicRetrieval:
    """The task over rows ``{context, question, topics, num_topics}``; the first topic is the answer.

    >>> TopicRetrieval([{"context": "…", "question": "Which?", "topics": ["tea"], "num_topics": 1}]).name
    'topic'
    """

    rows: Sequence[Mapping[str, Any]]
    new_tokens: int = 50
    name: str = field(default="topic", init=False)

    def examples(self, tokenizer: Any) -> Iterator[Example]:
        """Yield one question per row."""
        held: dict[int, int] = {}
        for row in self.rows:
            count = int(row["num_topics"])
            held[count] = held.get(count, -1) + 1
            yield Example(
                f"{count}/{held[count]}",
                f"{row['context']} {row['question']}",
                (row["topics"][0],),
                self.new_tokens,
                truncate="never",
                facts={"num_topics": count},
            )

    def score(self, example: Example, answer: str) -> dict[str, float]:
        """Return whether the answer names the topic, in any case of letters, and its word F1."""
        gold = example.references[0]
        return {"right": float(gold.lower() in answer.lower()), "qa_f1": qa_f1(answer, gold)}

    def summarise(self, rows: Sequence[Row]) -> dict[str, Any]:
        """Return the means, and for each number of topics, keyed by its mean tokens: accuracy, interval and F1."""
        by_tokens = {}
        for count in sorted({row.facts["num_topics"] for row in rows}):
            own = [row for row in rows if row.facts["num_topics"] == count]
            tokens = round(sum(row.facts["tokens_seen"] for row in own) / len(own))
            f1 = sum(row.scores["qa_f1"] for row in own) / len(own)
            by_tokens[str(tokens)] = {"num_topics": count, **tally(row.scores["right"] for row in own), "qa_f1": f1}
        return {**mean_scores(rows), "by_tokens": by_tokens}


def topic_rows(
    tokenizer: Any, haystack: Haystack, counts: Sequence[int] = COUNTS, cases: int = 50, seed: int = 42
) -> list[dict[str, Any]]:
    """Return offline rows in the released format: ``cases`` records for each number of topics.

    Args:
        tokenizer: counts the 400 to 600 tokens of a conversation; None takes 4 characters for a token.
        haystack: where the sentences of the conversations come from.
        counts: topics per record.
        cases: records per number of topics.
        seed: of topics and sentences.

    Raises:
        ValueError: more topics than there are names for, none, or a haystack of too few sentences.
    """
    if not counts or not all(1 <= count <= len(TOPICS) for count in counts) or cases < 1:
        raise ValueError(f"need cases, and 1 to {len(TOPICS)} topics per record, got {cases} cases of {tuple(counts)}")
    found = sentences(haystack.used)
    # To count as many conversations as are needed would take long; a hundred are shuffled instead.
    draws = random.Random(seed)
    enough = max(max(counts), min(100, sum(counts) * cases))
    bodies = [conversation(tokenizer, found, draws) for _ in range(enough)]
    rows = []
    for count in counts:
        for _ in range(cases):
            topics = draws.sample(TOPICS, count)
            said = draws.sample(bodies, count)
            parts = [_OPENING.format(topic=topic) + body for topic, body in zip(topics, said, strict=True)]
            context = _HEADER.format(count=count) + "".join(parts) + _FOOTER
            rows.append({"context": context, "question": QUESTION, "topics": topics, "num_topics": count})
    return rows


def conversation(tokenizer: Any, found: Sequence[str], draws: random.Random) -> str:
    """Return turns of user and assistant that, with the opening, have 400 to 600 tokens.

    Raises:
        ValueError: the sentences do not suffice.
    """

    def size(text: str) -> int:
        return len(encode(tokenizer, text)) if tokenizer is not None else len(text) // 4

    held = size(_OPENING.format(topic=max(TOPICS, key=len)))
    wanted = draws.randint(_LEAST, _MOST - 60)
    text, place, speaker = "", draws.randrange(max(1, len(found) // 2)), "USER"
    for start in range(place, len(found), 2):
        turn = f"\n{speaker}: {' '.join(found[start : start + 2])}"
        # Counted turn by turn: what two turns share at their seam is a token at most.
        if held + size(turn) > _MOST - 10:
            continue
        text, held = text + turn, held + size(turn)
        speaker = "ASSISTANT" if speaker == "USER" else "USER"
        if held >= wanted:
            return text
    raise ValueError(f"the text has {len(found)} sentences of 5 to 60 words, too few for a conversation")


def sentences(text: str) -> list[str]:
    """Return the sentences of 5 to 60 words of a text, each on one line.

    >>> sentences("It is so. The whale swam under the ship. Gone?")
    ['The whale swam under the ship.']
    """
    parts = re.split(r"(?<=[.!?])\s+(?=[A-Z])", " ".join(text.split()))
    return [part for part in parts if 5 <= len(part.split()) <= 60]
