"""Scores of answers against second ways of computing them, and the published rules at their edges."""

import difflib
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from longllm.evals import scorers

WORDS = st.lists(st.sampled_from(["whale", "ship", "sea", "the", "a", "Ahab's", "white"]), max_size=8).map(" ".join)


def lcs(left: list[str], right: list[str]) -> int:
    """Return the length of the longest common subsequence, by recursion on prefixes."""
    table = [[0] * (len(right) + 1) for _ in range(len(left) + 1)]
    for i, one in enumerate(left):
        for j, other in enumerate(right):
            table[i + 1][j + 1] = table[i][j] + 1 if one == other else max(table[i][j + 1], table[i + 1][j])
    return table[-1][-1]


@given(WORDS, WORDS)
def test_qa_f1_counts_shared_words_once_each(answer: str, reference: str) -> None:
    mine, other = (re.sub(r"[^\w\s]", "", text).lower().split() for text in (answer, reference))
    mine, other = ([word for word in words if word not in ("a", "an", "the")] for words in (mine, other))
    left, shared = list(other), 0
    for word in mine:
        if word in left:
            left.remove(word)
            shared += 1
    expected = 2 * shared / (len(mine) + len(other)) if shared else 0.0
    assert scorers.qa_f1(answer, reference) == pytest.approx(expected)


@given(WORDS, WORDS)
def test_rouge_l_is_the_f_of_the_longest_common_subsequence(answer: str, reference: str) -> None:
    mine, other = answer.split(), reference.split()
    common = lcs(mine, other)
    expected = 2 * common / (len(mine) + len(other)) if common else 0.0
    if len(set(mine)) == len(mine) and len(set(other)) == len(other):  # the package counts repeated words once
        assert scorers.rouge_l(answer, reference) == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize(("answer", "reference"), [("", "word"), ("word", ""), ("...", "word"), (" ", " ")])
def test_texts_without_words_score_nothing(answer: str, reference: str) -> None:
    assert scorers.rouge_l(answer, reference) == 0.0
    assert scorers.qa_f1(answer, reference) == 0.0


def test_chinese_is_scored_by_words() -> None:
    same, other = "我爱北京天安门。", "天安门在北京"
    assert scorers.qa_f1_zh(same, same) == 1.0
    assert scorers.rouge_l_zh(same, same) == pytest.approx(1.0)
    # 我 爱 北京 天安门 and 天安门 在 北京 share two words.
    assert scorers.qa_f1_zh(same, other) == pytest.approx(2 * 2 / (4 + 3))
    assert scorers.qa_f1_zh("，。！", "北京") == 0.0


@pytest.mark.parametrize(
    ("answer", "reference", "expected"),
    [
        ("Date", "Date", 1.0),
        ("Date or City", "Date", 0.5),
        ("City", "Date", 0.0),
        # A class that is part of the right one is no other answer.
        ("Date of birth", "Date of birth", 1.0),
        ("a dat", "Date", 1.0),
        ("ctiy", "Date", 0.0),
        ("", "Date", 0.0),
    ],
)
def test_classes_are_found_by_name_or_by_likeness(answer: str, reference: str, expected: float) -> None:
    classes = ["City", "Date", "Date of birth"]
    assert scorers.classification(answer, reference, classes) == expected


@given(st.lists(st.integers(0, 40), max_size=5), st.integers(0, 40))
def test_counts_and_paragraphs_share_their_point_among_all_numbers_named(named: list[int], right: int) -> None:
    answer = ", ".join(f"no {number}" for number in named)
    expected = named.count(right) / len(named) if named else 0.0
    assert scorers.count(answer, str(right)) == expected
    assert scorers.retrieval(answer, f"Paragraph {right}") == expected
    assert scorers.retrieval_zh(answer, f"段落{right}") == expected


def test_a_reference_without_a_paragraph_is_refused() -> None:
    with pytest.raises(ValueError, match="names no paragraph"):
        scorers.retrieval("1", "Section 1")


@pytest.mark.parametrize(
    ("answer", "line"),
    [("\n\nx = 1\ny = 2", "x = 1"), ("```python\n# set\nx = 1", "x = 1"), ("// no\n", ""), ("", "")],
)
def test_code_is_compared_by_its_first_line(answer: str, line: str) -> None:
    # Indel likeness: twice the common subsequence over both lengths, which difflib gives for such short texts.
    reference = "x = 12"
    expected = 2 * lcs(list(line), list(reference)) / (len(line) + len(reference))
    assert scorers.code_similarity(answer, reference) == pytest.approx(expected, abs=0.005)
    assert difflib.SequenceMatcher(None, line, reference).ratio() == pytest.approx(expected)


def test_the_best_reference_counts() -> None:
    assert scorers.best(scorers.qa_f1, "whale", ["ship", "the whale", "whale song"]) == 1.0
    assert scorers.best(scorers.qa_f1, "whale", []) == 0.0
