"""Topic retrieval: records put together from text, released rows, and both scores computed again."""

import itertools
import random
import re
from collections import Counter
from typing import Any

import pytest

import longllm
from longllm.evals.haystack import Haystack
from longllm.evals.interval import wilson
from longllm.evals.task import Row
from longllm.evals.topic import COUNTS, TOPICS, TopicRetrieval, conversation, sentences, topic_rows

HAY = Haystack(
    "log",
    " ".join(
        f"On day {number} the log speaks of the sea, of whale {number * 7} and of ships." for number in range(400)
    ),
)
RELEASED = [
    {"context": "USER: tea. USER: glass.", "question": "Which was first?", "topics": ["The History of Tea", "glass"],
     "num_topics": 2},
    {"context": "USER: chess.", "question": "Which was first?", "topics": ["chess"], "num_topics": 1},
    {"context": "USER: opera. USER: tea.", "question": "Which?", "topics": ["opera", "tea"], "num_topics": 2},
]  # fmt: skip


def test_offline_records_name_each_topic_once_in_conversations_of_400_to_600_tokens(tiny: longllm.LoadedModel) -> None:
    rows = topic_rows(tiny.tokenizer, HAY, (2, 5), 2, seed=1)
    assert [row["num_topics"] for row in rows] == [2, 2, 5, 5]
    for row in rows:
        assert len(set(row["topics"])) == row["num_topics"]
        named = re.findall(r"USER: I would like to talk about (.+)\.\n", row["context"])
        assert named == row["topics"]
        body = row["context"].split("The record begins here.")[1].rsplit("\n\nThe record ends", 1)[0]
        parts = re.split(r"(?=\n\nUSER: I would like to talk about)", body)[1:]
        for part in parts:
            assert 390 <= len(tiny.tokenizer(part)["input_ids"]) <= 600
            speakers = re.findall(r"^(USER|ASSISTANT): ", part, re.M)
            assert all(a != b for a, b in itertools.pairwise(speakers))
    assert len({row["topics"][0] for row in rows}) > 1
    assert topic_rows(tiny.tokenizer, HAY, (2, 5), 2, seed=1) == rows
    assert topic_rows(tiny.tokenizer, HAY, (2, 5), 2, seed=2) != rows


def test_what_is_said_is_the_haystacks_own(tiny: longllm.LoadedModel) -> None:
    own = set(sentences(HAY.text))
    said = re.sub(r"\n(USER|ASSISTANT): ", " ", conversation(None, sorted(own), random.Random(3)))
    assert set(sentences(said)) <= own
    assert len(said) // 4 >= 300


def test_released_rows_are_asked_as_they_are() -> None:
    examples = list(TopicRetrieval(RELEASED).examples(None))
    assert [example.name for example in examples] == ["2/0", "1/0", "2/1"]
    assert examples[0].prompt == "USER: tea. USER: glass. Which was first?"
    assert [example.references[0] for example in examples] == ["The History of Tea", "chess", "opera"]
    assert {example.max_new_tokens for example in examples} == {50}


@pytest.mark.parametrize(
    ("answer", "right"),
    [
        ("It was THE HISTORY OF TEA!", 1.0),
        ("history of tea", 0.0),
        ("glass, then the history of teapots", 1.0),
        ("", 0.0),
    ],
)
def test_scores_are_those_of_words_counted_again(answer: str, right: float) -> None:
    task = TopicRetrieval(RELEASED)
    example = next(task.examples(None))
    scores = task.score(example, answer)
    assert scores["right"] == right
    ours, gold = (
        Counter(w for w in re.sub(r"[^\w\s]", "", text.lower()).split() if w not in ("a", "an", "the"))
        for text in (answer, "The History of Tea")
    )
    shared = sum(min(ours[word], gold[word]) for word in gold)
    expected = 2 * shared / (ours.total() + gold.total())
    assert scores["qa_f1"] == pytest.approx(expected)


def test_figures_are_keyed_by_mean_tokens() -> None:
    def row(count: int, tokens: int, right: float) -> Row:
        return Row(
            f"{count}/{tokens}",
            "",
            {"right": right, "qa_f1": right / 2},
            (),
            {"num_topics": count, "tokens_seen": tokens},
        )

    summary = TopicRetrieval(RELEASED).summarise([row(5, 100, 1), row(10, 300, 0), row(5, 105, 0), row(5, 103, 1)])
    assert list(summary["by_tokens"]) == ["103", "300"]
    assert summary["by_tokens"]["103"] == {
        "num_topics": 5, "n": 3, "right": 2, "accuracy": 2 / 3, "interval": list(wilson(2, 3)),
        "qa_f1": pytest.approx(1 / 3),
    }  # fmt: skip
    assert summary["right"] == 0.5


@pytest.mark.parametrize(
    ("counts", "cases", "hay", "reason"),
    [
        ((0,), 1, HAY, "1 to 100 topics"),
        ((101,), 1, HAY, "1 to 100 topics"),
        ((), 1, HAY, "topics per record"),
        ((2,), 0, HAY, "0 cases"),
        ((2,), 1, Haystack("x", "Too short to be of use here."), "too few for a conversation"),
    ],
)
def test_what_cannot_be_made_is_refused(counts: Any, cases: int, hay: Haystack, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        topic_rows(None, hay, counts, cases)


def test_there_are_names_for_the_longest_published_record() -> None:
    assert max(COUNTS) <= len(set(TOPICS)) == len(TOPICS)
    assert not [name for name in TOPICS for other in TOPICS if name != other and name in other]
