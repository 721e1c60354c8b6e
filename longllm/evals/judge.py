"""A language model that marks answers from 1 to 10 against a reference."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

#: what the marks mean (the scale of the published needle figures, arXiv 2404.19553)
ANCHORS = {
    1: "the answer has nothing to do with the reference",
    3: "the answer is slightly related, but does not agree with the reference",
    5: "the answer is related to the reference, but parts of it are wrong",
    7: "the answer agrees with the reference, with small omissions",
    10: "the answer says exactly what the reference says",
}
_SYSTEM = "You mark answers fairly and look at nothing but the reference."
_ASK = (
    "An assistant was asked a question about a text. Mark its answer against the reference on a scale from 1 to 10:\n"
    "{anchors}\n\n[Question]\n{question}\n\n[Reference]\n{reference}\n\n[Answer]\n{answer}\n\n"
    "Explain your mark in one or two sentences. Then end with the mark in double brackets, such as: Rating: [[5]]"
)


@dataclass(frozen=True)
class Judge:
    """Marks answers by asking a language model.

    >>> Judge(lambda messages: "It is all there. Rating: [[10]]")("Where?", "in the park", "In the park.")
    10.0
    """

    ask: Callable[[Sequence[dict[str, str]]], str]
    """gives the model's reply to a list of messages, with temperature 0 (``longllm.endpoint.Endpoint.ask``)"""

    def __call__(self, question: str, reference: str, answer: str) -> float:
        """Return the mark of an answer, 1 to 10.

        Raises:
            ValueError: the reply holds no mark in that range.
        """
        anchors = "\n".join(f"{mark}: {meaning}" for mark, meaning in ANCHORS.items())
        asked = _ASK.format(anchors=anchors, question=question, reference=reference, answer=answer)
        reply = self.ask([{"role": "system", "content": _SYSTEM}, {"role": "user", "content": asked}])
        return mark(reply)


def mark(reply: str) -> float:
    """Return the last mark in double brackets of a judge's reply.

    Raises:
        ValueError: there is none from 1 to 10.

    >>> mark("I was between [[7]] and more. Rating: [[ 8.5 ]]")
    8.5
    """
    found = re.findall(r"\[\[\s*(\d+(?:\.\d+)?)\s*\]\]", reply)
    if not found or not 1 <= float(found[-1]) <= 10:
        raise ValueError(f"the judge gave no mark from 1 to 10 in double brackets, but: {reply[-200:]!r}")
    return float(found[-1])
