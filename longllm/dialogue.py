"""What a chat template puts around messages, as token ids, so that a conversation can grow by its new part alone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from longllm.prompts import encode

# Stand for the messages while the template is rendered; no template changes them.
_SYSTEM = "LONGSCOPE-SYSTEM"
_TURNS = [f"LONGSCOPE-TURN-{letter}" for letter in "ABCDE"]


@dataclass(frozen=True)
class Dialogue:
    """The ids around messages.

    A conversation is ``head``, message, ``ask``, answer, ``between``, message, ``ask``, answer, …

    >>> Dialogue(head=(1, 4), ask=(2, 5), between=(2, 4), trims=False).ask
    (2, 5)
    """

    head: tuple[int, ...]
    """before the first message, the system message included"""
    ask: tuple[int, ...]
    """from a message to its answer"""
    between: tuple[int, ...]
    """from an answer to the next message"""
    trims: bool
    """whether the template strips white space around messages"""


def dialogue(tokenizer: Any, system: str = "") -> Dialogue:
    """Return what the tokeniser's chat template puts around the messages of a conversation.

    Raises:
        ValueError: there is no template, it takes no system message, or it writes the same kind of turn differently
            from turn to turn, so that a later turn would change what has been read.
    """
    if not tokenizer.chat_template:
        raise ValueError(f"{tokenizer.name_or_path or 'the tokeniser'} has no chat template: it is a base model")
    roles = ("user", "assistant", "user", "assistant", "user")
    messages = [{"role": role, "content": text} for role, text in zip(roles, _TURNS, strict=True)]
    if system:
        messages.insert(0, {"role": "system", "content": _SYSTEM})
    rendered = _rendered(tokenizer, messages)
    pieces: list[str] = []
    rest = rendered
    for text in _TURNS:
        before, found, rest = rest.partition(text)
        if not found or text in rest:
            raise ValueError("the chat template of the model does not carry every message exactly once")
        pieces.append(before)
    head, asked, between, asked_again, between_again = pieces
    # Some templates (Mistral's) put a space before an answer in the past that the model writes itself.
    same = asked == asked_again and asked.rstrip(" ") == rest.rstrip(" ") and asked.startswith(rest)
    if not same or between != between_again:
        raise ValueError(
            "the chat template of the model writes later turns differently from earlier ones: a chat in one cache "
            "would not be what the template gives"
        )
    ids = encode(tokenizer, head, special=True)
    if system:
        before, found, after = head.partition(_SYSTEM)
        if not found:
            raise ValueError("the chat template of the model leaves the system message out")
        ids = [*encode(tokenizer, before, special=True), *encode(tokenizer, system)]
        ids += encode(tokenizer, after, special=True)
    padded = f" {_TURNS[0]} "
    trims = padded not in _rendered(tokenizer, [{"role": "user", "content": padded}])
    ask, later = (tuple(encode(tokenizer, text, special=True)) for text in (rest, between))
    return Dialogue(tuple(ids), ask, later, trims)


def _rendered(tokenizer: Any, messages: list[dict[str, str]]) -> str:
    """Render messages up to where an answer begins."""
    from jinja2 import TemplateError

    try:
        return str(tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False))
    except TemplateError as error:
        raise ValueError(f"the chat template of the model refuses these messages: {error}") from error
