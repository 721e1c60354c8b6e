"""What a language model is asked to write about a text: the roles of the report arXiv 2404.19553, in our words.

Single-detail questions hang on one place of a text, multi-detail ones on several places of it or of several texts;
papers are asked six set questions; books get a biography of each main character.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal, get_args

Family = Literal["single", "multi", "paper", "cluster", "biography"]
FAMILIES: tuple[Family, ...] = get_args(Family)

#: the set questions about a paper
PAPER_QUESTIONS = (
    "Which problem does the paper address?",
    "What is the paper's main contribution?",
    "Which related work does the paper cite, and how does it differ from it?",
    "How does the paper's method work?",
    "Which experiments does the paper report, and what do they show?",
    "What is the paper about? Summarise its content.",
)

_RULE = "-" * 40
_CONFINED = "Use only the text between the two lines, nothing you know from elsewhere."

_ROLES: dict[Family, str] = {
    "single": (
        "You are a teacher preparing a quiz for students who have read this text. Set {questions} questions of "
        "different kinds, taken from places spread over the whole text, and answer each. A question must be "
        "answerable from the text alone, must name what it is about instead of saying “the text” or “the passage”, "
        "and must have one short and definite answer."
    ),
    "multi": (
        "You are a professor setting an examination on this text. Go about it in two steps. First find the main "
        "characters or subjects and the course of events or of the argument. Then set {questions} questions, each of "
        "them about a few of these that belong together, so that nobody can answer it from a single place: several "
        "details must be compared, combined or reasoned from. Vary the wording of the questions. Answer each in full."
    ),
    "paper": (
        "You are a researcher who has studied this paper. Answer the following questions about it, each in a few "
        "complete sentences and in this order, and repeat each question as it stands:\n{listed}"
    ),
    "cluster": (
        "There are several texts above, each under its number, all on related matters. You are a professor who wants "
        "students to read them side by side. Set {questions} questions, each of them about at least two of the texts: "
        "what they have in common, where they differ, how what one says bears on another. Name the subjects in the "
        "questions, not the numbers of the texts. Answer each in full."
    ),
    "biography": (
        "You write summaries of books. Go about it in two steps. First find the main characters of this book. Then "
        "write the biography of each as the book tells it: origin, what happens to them, what they do and why, how "
        "they change, and how they end."
    ),
}


@dataclass(frozen=True)
class Asked:
    """What a family's answers consist of: a JSON list of objects with these two keys.

    >>> Asked("question", "answer").demand
    'Answer with JSON and nothing else, in this form: {"items": [{"question": "…", "answer": "…"}, …]}'
    """

    first: str
    second: str

    @property
    def demand(self) -> str:
        """Return the sentence that ends a request."""
        item = f'{{"{self.first}": "…", "{self.second}": "…"}}'
        return f'Answer with JSON and nothing else, in this form: {{"items": [{item}, …]}}'

    @property
    def response_format(self) -> dict[str, Any]:
        """Return the form as a JSON schema, for servers that can hold a model to it."""
        text = {"type": "string"}
        item = {"type": "object", "properties": {self.first: text, self.second: text}}
        closed = {"additionalProperties": False}
        items = {"type": "array", "items": {**item, "required": [self.first, self.second], **closed}}
        schema = {
            "type": "object",
            "properties": {"items": items},
            "required": ["items"],
            "additionalProperties": False,
        }
        return {"type": "json_schema", "json_schema": {"name": "items", "strict": True, "schema": schema}}


def asked(family: Family) -> Asked:
    """Return what is asked of a family: pairs of question and answer, or of character and summary.

    >>> asked("biography").first
    'character'
    """
    return Asked("character", "summary") if family == "biography" else Asked("question", "answer")


def prompt(family: Family, context: str, questions: int) -> str:
    """Return the message that asks for a family's questions and answers about a context.

    Raises:
        ValueError: there is no such family, or fewer than one question.

    >>> message = prompt("single", "Call me Ishmael.", 4)
    >>> message.splitlines()[1], "Set 4 questions" in message, message.endswith("…]}")
    ('Call me Ishmael.', True, True)
    """
    if family not in _ROLES:
        raise ValueError(f"unknown family {family!r}; the families are {', '.join(FAMILIES)}")
    if questions < 1:
        raise ValueError(f"questions must be at least 1, got {questions}")
    listed = "\n".join(f"{number}. {question}" for number, question in enumerate(PAPER_QUESTIONS, 1))
    role = _ROLES[family].format(questions=questions, listed=listed)
    return f"{_RULE}\n{context}\n{_RULE}\n\n{_CONFINED}\n\n{role}\n\n{asked(family).demand}"


def side_by_side(texts: Iterable[tuple[str, str]]) -> str:
    """Return several texts (name, text) as one context, each under its number and name.

    >>> print(side_by_side([("1953-truman", "To the Congress"), ("1961-kennedy", "Mr. Speaker")]))
    Text 1: 1953-truman
    <BLANKLINE>
    To the Congress
    <BLANKLINE>
    Text 2: 1961-kennedy
    <BLANKLINE>
    Mr. Speaker
    """
    return "\n\n".join(f"Text {number}: {name}\n\n{text.strip()}" for number, (name, text) in enumerate(texts, 1))
