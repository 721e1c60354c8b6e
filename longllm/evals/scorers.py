"""Scores of an answer against a reference, as LongBench (arXiv 2308.14508) and its users compute them. Pure functions.

All return a number from 0 to 1; of several references the best counts (``best``).
"""

from __future__ import annotations

import difflib
import re
import string
from collections import Counter
from collections.abc import Callable, Iterable, Sequence

Scorer = Callable[[str, str], float]
#: Chinese punctuation that LongBench strips
CHINESE_PUNCTUATION = (
    "！？｡。＂＃＄％＆＇（）＊＋，－／：；＜＝＞＠［＼"
    "］＾＿｀｛｜｝～｟｠｢｣､、〃》「」『』【】〔〕〖"
    "〗〘〙〚〛〜〝〞〟〰〾〿–—‘’‛“”„‟…‧﹏."
)


def best(score: Scorer, answer: str, references: Iterable[str]) -> float:
    """Return the best score over the references, 0 if there are none.

    >>> best(qa_f1, "a blue whale", ["shark", "the whale"])
    0.6666666666666666
    """
    return max((score(answer, reference) for reference in references), default=0.0)


def normalised(text: str) -> str:
    """Return English text in lower case, without punctuation and articles, spaces collapsed.

    >>> normalised("The  cat's hat.")
    'cats hat'
    """
    bare = "".join(letter for letter in text.lower() if letter not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", bare).split())


def bag_f1(answer: Sequence[str], reference: Sequence[str]) -> float:
    """Return the F1 of two bags of words.

    >>> bag_f1(["a", "b", "b"], ["b", "c"])
    0.4
    """
    shared = sum((Counter(answer) & Counter(reference)).values())
    if not shared:
        return 0.0
    precision, recall = shared / len(answer), shared / len(reference)
    return 2 * precision * recall / (precision + recall)


def qa_f1(answer: str, reference: str) -> float:
    """Return the word F1 of two normalised English texts (SQuAD)."""
    return bag_f1(normalised(answer).split(), normalised(reference).split())


def qa_f1_zh(answer: str, reference: str) -> float:
    """Return the word F1 of two Chinese texts, cut into words by jieba."""
    return bag_f1(_words_zh(answer), _words_zh(reference))


def rouge_l(answer: str, reference: str) -> float:
    """Return ROUGE-L F of two texts; 0 where one of them has no words (package ``rouge``, as published figures use).

    Raises:
        ImportError: the package is not installed.
    """
    from longllm.evals.extras import rouge

    if not answer.strip() or not reference.strip():
        return 0.0
    try:
        return float(rouge().get_scores([answer], [reference], avg=True)["rouge-l"]["f"])
    except (ValueError, RecursionError):
        return 0.0


def rouge_l_zh(answer: str, reference: str) -> float:
    """Return ROUGE-L F of two Chinese texts, cut into words by jieba."""
    from longllm.evals.extras import jieba

    cut = jieba().cut
    return rouge_l(" ".join(cut(answer, cut_all=False)), " ".join(cut(reference, cut_all=False)))


def classification(answer: str, reference: str, classes: Sequence[str]) -> float:
    """Return 1 / n if the right class is among the n that the answer names, else 0.

    A named class that is part of the right one does not count. Where none is named, the class most like the answer
    does.

    >>> classification("It is a Number, other or a Date", "Number", ["Number", "Date", "City"])
    0.5
    """
    named = [name for name in classes if name in answer]
    named = [name for name in named if not (name in reference and name != reference)]
    if named:
        return 1 / len(named) if reference in named else 0.0
    if any(name in answer for name in classes):
        return 0.0
    # The measure is not symmetric: the class comes first, as in the reference. What is like no class is none of them.
    alike = {name: difflib.SequenceMatcher(None, name, answer).ratio() for name in classes}
    return float(max(alike.values(), default=0.0) > 0 and max(alike, key=alike.__getitem__) == reference)


def count(answer: str, reference: str) -> float:
    """Return the share of the answer's whole numbers that are the right one.

    >>> count("3 or 4, no: 4", "4")
    0.6666666666666666
    """
    return _share(re.findall(r"\d+", answer), reference)


def retrieval(answer: str, reference: str) -> float:
    """Return the share of the answer's whole numbers that are the paragraph's ("Paragraph 7").

    >>> retrieval("Paragraph 7", "Paragraph 7"), retrieval("7 or 8", "Paragraph 7")
    (1.0, 0.5)
    """
    return _share(re.findall(r"\d+", answer), _number(r"Paragraph (\d+)", reference))


def retrieval_zh(answer: str, reference: str) -> float:
    """Return the share of the answer's whole numbers that are the paragraph's ("段落7").

    >>> retrieval_zh("段落7", "段落7")
    1.0
    """
    return _share(re.findall(r"\d+", answer), _number(r"段落(\d+)", reference))


def code_similarity(answer: str, reference: str) -> float:
    """Return how alike the answer's first line of code and the reference are (package ``rapidfuzz``, rounded).

    Raises:
        ImportError: the package is not installed.
    """
    from longllm.evals.extras import fuzz_ratio

    lines = answer.lstrip("\n").split("\n")
    line = next((line for line in lines if "`" not in line and "#" not in line and "//" not in line), "")
    return fuzz_ratio(line, reference)


def _share(numbers: Sequence[str], right: str) -> float:
    """Return the share of numbers that equal the right one, 0 if there are none."""
    return sum(number == right for number in numbers) / len(numbers) if numbers else 0.0


def _number(pattern: str, reference: str) -> str:
    """Return the number that a reference names.

    Raises:
        ValueError: it names none.
    """
    found = re.search(pattern, reference)
    if found is None:
        raise ValueError(f"the reference {reference!r} names no paragraph")
    return found.group(1)


def _words_zh(text: str) -> list[str]:
    """Return the words of a Chinese text in lower case, without punctuation and spaces."""
    from longllm.evals.extras import jieba

    left_out = set(string.punctuation + CHINESE_PUNCTUATION)
    words = ("".join(letter for letter in word.lower() if letter not in left_out) for word in jieba().cut(text))
    return ["".join(word.split()) for word in words if "".join(word.split())]
