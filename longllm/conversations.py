"""Training rows as token ids and targets: what the assistant says is learned, what it is told is not.

A conversation is put together from pieces, each tokenised by itself: the template's own text (with its special tokens)
and the messages (as plain characters). So a target belongs to an answer by construction. The usual way, rendering all
to one string and counting the tokens of parts of it, shifts when a turn begins with a newline that its tokeniser melts
into the template's.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from longllm.prompts import encode

IGNORED = -100
ROLES = ("system", "user", "assistant")
# Stand for the messages while a template is rendered; no template changes them.
_MARK = "LONGSCOPE-{}-MESSAGE"
# Stands around them (mirrored behind): what is left of it -> what a template strips off messages, as an argument of
# str.strip. No template has a tab of its own, or as many newlines.
_PAD = "\n\n\n\n\n \t"
_STRIPPED: dict[str, str | None] = {_PAD: "", " \t": "\n", "\t": "\n ", "": None}


@dataclass(frozen=True)
class Tokens:
    """One row, ready to be learned.

    >>> Tokens((1, 5, 6, 2), (-100, -100, 6, 2)).targets
    2
    """

    ids: tuple[int, ...]
    labels: tuple[int, ...]
    """the id itself where it is to be learned, else -100"""

    @property
    def targets(self) -> int:
        """Count the ids that are learned. The first of a row never is: nothing comes before it."""
        return sum(label != IGNORED for label in self.labels[1:])


def row_fault(row: Mapping[str, Any]) -> str | None:
    """Return what is wrong with a training row, or None.

    >>> row_fault({"conversations": [{"role": "user", "content": "Hi"}]})
    'conversations must hold an answer of the assistant, got none'
    """
    if "text" in row:
        text = row["text"]
        if not isinstance(text, str):
            return f"text must be str, got {type(text).__name__}"
        return None if text.strip() else "text is empty"
    turns = row.get("conversations")
    if turns is None:
        return f"a row must have text or conversations, got {', '.join(row) or 'nothing'}"
    if not isinstance(turns, list):
        return f"conversations must be a list, got {type(turns).__name__}"
    for place, turn in enumerate(turns):
        where = f"conversations[{place}]"
        if not isinstance(turn, dict):
            return f"{where} must be an object with role and content, got {type(turn).__name__}"
        if turn.get("role") not in ROLES:
            return f"{where}.role must be one of {', '.join(ROLES)}, got {turn.get('role')!r}"
        content = turn.get("content")
        if not isinstance(content, str):
            return f"{where}.content must be str, got {type(content).__name__}"
        if not content.strip():
            return f"{where}.content is empty"
    spoken = [turn["role"] for turn in turns if turn["role"] != "system"]
    while spoken and spoken[0] == "assistant":
        spoken.pop(0)
    if "assistant" not in spoken:
        return "conversations must hold an answer of the assistant, got none"
    wrong = next((place for place, role in enumerate(spoken) if role != ("user", "assistant")[place % 2]), None)
    return None if wrong is None else "user and assistant must take turns, beginning with the user"


def row_tokens(tokenizer: Any, row: Mapping[str, Any], max_length: int) -> Tokens | None:
    """Return ids and targets of a row, or None for a conversation longer than ``max_length`` (never cut: the answers
    stand at its end).

    A text is learned whole: beyond ``max_length`` it is cut, within it the end-of-text token is added.

    Raises:
        ValueError: as ``conversation_tokens``, or a text where the tokeniser has no end-of-text token.
    """
    if "text" in row:
        if tokenizer.eos_token_id is None:
            raise ValueError("the tokeniser has no end-of-text token (eos_token): the model would never stop")
        ids = [*begin(tokenizer), *encode(tokenizer, row["text"])]
        ids = [*ids, tokenizer.eos_token_id][:max_length]
        return Tokens(tuple(ids), tuple(ids))
    tokens = conversation_tokens(tokenizer, row["conversations"])
    return tokens if len(tokens.ids) <= max_length else None


def begin(tokenizer: Any) -> list[int]:
    """Return the begin-of-text token, as a list, if the tokeniser itself puts it before a text."""
    first = tokenizer.bos_token_id
    return [first] if first is not None and list(tokenizer("a")["input_ids"])[:1] == [first] else []


def conversation_tokens(tokenizer: Any, turns: Sequence[Mapping[str, str]]) -> Tokens:
    """Return ids and targets of a chat: targets are each answer and the token that ends the assistant's turn.

    A leading assistant message is dropped. Texts that spell a special token are read as those characters. What a
    template strips off a message (Llama-3: white space at both ends) is stripped off.

    Raises:
        ValueError: the tokeniser has no chat template, one that does not carry the messages, or one without a token
            that ends a turn (a model trained so would never stop).
    """
    turns = list(turns)
    start = next((place for place, turn in enumerate(turns) if turn["role"] != "system"), 0)
    while start < len(turns) and turns[start]["role"] == "assistant":
        del turns[start]
    roles = tuple(turn["role"] for turn in turns)
    frames, strips = _frames(tokenizer, roles)
    special = set(tokenizer.all_special_ids) | set(tokenizer.added_tokens_decoder)
    ids, labels = list(frames[0]), [IGNORED] * len(frames[0])
    for turn, after, (left, right) in zip(turns, frames[1:], strips, strict=True):
        words = encode(tokenizer, turn["content"].lstrip(left).rstrip(right))
        ids += [*words, *after]
        if turn["role"] != "assistant":
            labels += [IGNORED] * (len(words) + len(after))
            continue
        # A turn ends with the first special token after the answer; Llama-2 has a space between them.
        ending = next((place + 1 for place, token in enumerate(after) if token in special), 0)
        if not ending or tokenizer.decode(after[: ending - 1]).strip(" "):
            raise ValueError("the chat template puts no end-of-turn token behind an answer: the model would never stop")
        labels += [*words, *after[:ending], *[IGNORED] * (len(after) - ending)]
    return Tokens(tuple(ids), tuple(labels))


def _frames(
    tokenizer: Any, roles: tuple[str, ...]
) -> tuple[list[tuple[int, ...]], list[tuple[str | None, str | None]]]:
    """Return the ids before, between and after the messages of a chat, and what is stripped off each message."""
    template = tokenizer.chat_template
    if not template:
        name = tokenizer.name_or_path or "the tokeniser"
        raise ValueError(f"{name} has no chat template: train on text rows, or choose an instruct or chat model")
    pieces, strips = _rendered(tokenizer, str(template), roles)
    bos = tuple(begin(tokenizer))
    if bos and pieces[0][:1] != bos:
        return [bos + pieces[0], *pieces[1:]], strips
    return list(pieces), strips


@functools.lru_cache(maxsize=256)
def _rendered(
    tokenizer: Any, template: str, roles: tuple[str, ...]
) -> tuple[list[tuple[int, ...]], list[tuple[str | None, str | None]]]:
    """Render a chat of marks; tokenise what stands around them, and see what is stripped off them."""
    from jinja2 import TemplateError

    marks = [_MARK.format(place) for place in range(len(roles))]
    turns = [{"role": role, "content": f"{_PAD}{mark}{_PAD[::-1]}"} for role, mark in zip(roles, marks, strict=True)]
    try:
        rest = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=False)
    except TemplateError as error:
        raise ValueError(f"the chat template refuses the roles {', '.join(roles)}: {error}") from error
    texts: list[str] = []
    strips: list[tuple[str | None, str | None]] = []
    for mark in marks:
        head, found, rest = rest.partition(mark)
        if not found:
            raise ValueError("the chat template does not carry every message, in order and unchanged")
        left = next(kept for kept in _STRIPPED if head.endswith(kept))
        right = next(kept for kept in _STRIPPED if rest.startswith(kept[::-1]))
        texts.append(head[: len(head) - len(left)])
        rest = rest[len(right) :]
        strips.append((_STRIPPED[left], _STRIPPED[right]))
    texts.append(rest)
    if any(mark in text for mark in marks for text in texts):
        raise ValueError("the chat template repeats a message")
    return [tuple(encode(tokenizer, text, special=True)) for text in texts], strips
