"""Scores of InfiniteBench (arXiv 2402.13718): pure functions of an answer and a row's labels, each 0 to 1.

Labels are as the released rows have them, a list of strings; of the multiple-choice tasks, an option's text and letter.
"""

from __future__ import annotations

import re
import string
from collections.abc import Sequence

from longllm.evals.scorers import CHINESE_PUNCTUATION, bag_f1, best, qa_f1, rouge_l

Labels = Sequence[str]
#: marks that separate words where a name or a value is looked for
_MARKS = re.compile(r"[\n:\"'.,?!{}]")
#: a minus sign counts only where it is no operator or hyphen between two digits
_NUMBER = re.compile(r"(?<!\d)-?\d+\.\d+|(?<!\d)-?\d+|\d+")


def first_integer(answer: str, labels: Labels) -> float:
    """Return 1 if the first run of digits is the label.

    >>> first_integer("It is 71432, I think (1).", ["71432"])
    1.0
    """
    run = re.search(r"[0-9]+", answer)
    return float(run is not None and run.group() == labels[0])


def word(answer: str, labels: Labels) -> float:
    """Return 1 if the label is one of the words, punctuation aside.

    >>> word('{"key": "6ab6-77"}', ["6ab6-77"]), word("6ab6-778", ["6ab6-77"])
    (1.0, 0.0)
    """
    return float(labels[0] in _MARKS.sub(" ", answer).split())


def name(answer: str, labels: Labels) -> float:
    """Return 1 if the (first) name is one of the words in upper case.

    >>> name("I guess Ahab.", ["AHAB"])
    1.0
    """
    return float(labels[0].upper() in _MARKS.sub(" ", answer).upper().split())


def qa_f1_best(answer: str, labels: Labels) -> float:
    """Return the best word F1 over the labels."""
    return best(qa_f1, answer, labels)


def character_f1(answer: str, labels: Labels) -> float:
    """Return the best F1 of single characters over the labels, in lower case, without punctuation and spaces.

    >>> character_f1("北京。", ["北京"])
    1.0
    """
    return best(lambda one, other: bag_f1(_characters(one), _characters(other)), answer, labels)


def summary(answer: str, labels: Labels) -> float:
    """Return ROUGE-L F against the first label; an empty answer scores 0."""
    return rouge_l(answer, labels[0])


def choice(answer: str, labels: Labels) -> float:
    """Return 1 if the option chosen is the right one.

    That is the first letter if it is A to D; else what follows "answer is" or "option is"; else the first A to D that
    stands alone.

    Args:
        answer: of the model.
        labels: the right option's text and letter.

    >>> [choice(text, ["Ahab", "B"]) for text in ("B", "Well, the answer is B.", "So (B), not (A)", "C", "")]
    [1.0, 1.0, 1.0, 0.0, 0.0]
    """
    answer = answer.strip()
    if not answer:
        return 0.0
    if answer[0] in "ABCD":
        return float(answer[0] in labels)
    if answer in labels:
        return 1.0
    plain = " ".join(re.sub(r"[\n\"'.,?!{}]", " ", answer).split())
    for prefix in ("answer is:", "answer:", "answer is", "option is"):
        _, found, after = plain.partition(prefix)
        if found:
            return float(any(after.strip().startswith(label) for label in labels))
    alone = next((mark for mark in re.sub(r"[()\[\]:;*]", " ", plain).split() if mark in tuple("ABCD")), "")
    return float(alone in labels)


def faulty_function(answer: str, labels: Labels) -> float:
    """Return 1 if the answer begins with the right option's letter, or names letter or function after "answer is".

    Args:
        answer: of the model.
        labels: the function's name and the option's letter.

    >>> [faulty_function(text, ["parse", "C"]) for text in ("C. parse", "The answer is: parse", "parse", "A.")]
    [1.0, 1.0, 0.0, 0.0]
    """
    function, letter = labels[0], labels[1]
    if answer[:2] in (f"{letter}.", f"{letter}:"):
        return 1.0
    plain = " ".join(re.sub(r"[\n`'\"*-]|[Oo]ption", " ", answer).split())
    for prefix in ("answer is:", "is:", "answer:"):
        _, found, after = plain.partition(prefix)
        if found:
            return float(after.strip().startswith((letter, function)))
    return 0.0


def last_integer(answer: str, labels: Labels) -> float:
    """Return 1 if the last word is the label, as a whole number.

    >>> last_integer("The value is: -7.", ["-7"]), last_integer("seven", ["7"])
    (1.0, 0.0)
    """
    words = re.sub(r"[\n.`'\":]", " ", answer).split()
    whole = bool(words) and re.fullmatch(r"[+-]?\d+", words[-1]) is not None
    return float(whole and int(words[-1]) == int(labels[0]))


def first_number(answer: str, labels: Labels) -> float:
    """Return 1 if the first number equals the label.

    >>> first_number("It is 3.50", ["3.5"]), first_number("3", ["-3"]), first_number("-3", ["-3"])
    (1.0, 0.0, 1.0)
    """
    found = _NUMBER.search(answer)
    return float(found is not None and float(found.group()) == float(labels[0]))


def leading_values(answer: str, labels: Labels) -> float:
    """Return the share of the labels' values that the answer gives, right from the start up to the first error.

    The reference drops the answer's minus signs, so that no negative value can be right; here they count.

    >>> leading_values("[8, 5, 6, 3]", ["8", "5", "7", "3"]), leading_values("8, -1", ["8", "-1"])
    (0.5, 1.0)
    """
    given = [int(run) for run in re.findall(r"(?<!\d)-?\d+|\d+", answer)]
    right = 0
    for value, label in zip(given, labels, strict=False):
        if value != int(label):
            break
        right += 1
    return right / len(labels)


def _characters(text: str) -> list[str]:
    """Return the characters of a text in lower case, without punctuation and spaces."""
    left_out = set(string.punctuation + CHINESE_PUNCTUATION)
    return [letter for letter in text.lower() if letter not in left_out and not letter.isspace()]
