"""What spoils an evaluation silently, looked for before it starts: stops, chat template, lengths, padding.

The commonest failure that users of the reference met: Llama-3 has a second end token (``<|eot_id|>``, 128009), and
generation that does not stop there runs on until F1 collapses.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from longllm.prompts import encode

if TYPE_CHECKING:
    from longllm.loading import LoadedModel

#: stand for the messages while a template is examined; no template changes them
_ASKED, _ANSWERED = "LONGSCOPE-ASKED", "LONGSCOPE-ANSWERED"


def check_model(loaded: LoadedModel, *, max_length: int = 0, chat: bool = True, compressed: bool = False) -> list[str]:
    """Refuse what makes results worthless; return warnings about what only makes them worse.

    Args:
        loaded: the model.
        max_length: the longest prompt that will be read; 0 = what the model was trained for.
        chat: whether prompts will be put into the chat template.
        compressed: whether a compressed memory keeps positions within the trained length.

    Raises:
        ValueError: naming the trap, what was found, and what to do.
    """
    tokenizer, found = loaded.tokenizer, list[str]()
    if chat:
        check_template(tokenizer, loaded.name)
        check_stops(tokenizer, loaded.stop_ids, loaded.name)
        found += _template_warnings(tokenizer, loaded.name)
    found += _length_problems(loaded, max_length, compressed)
    found += _padding_problems(loaded)
    return found


def check_template(tokenizer: Any, name: str = "the model") -> None:
    """Refuse a chat template that is missing, changes the message, or does not ask for an answer.

    Raises:
        ValueError: saying which.
    """
    if not tokenizer.chat_template:
        raise ValueError(
            f"{name} has no chat template, so prompts would be read as a text to go on with: choose an instruct or "
            "chat model, or set the template of its tokeniser"
        )
    message = [{"role": "user", "content": _ASKED}]
    asked = tokenizer.apply_chat_template(message, add_generation_prompt=True, tokenize=False)
    if asked.count(_ASKED) != 1:
        raise ValueError(
            f"the chat template of {name} carries the user's message {asked.count(_ASKED)} times: it must do so once"
        )
    if asked == tokenizer.apply_chat_template(message, add_generation_prompt=False, tokenize=False):
        # Templates that end the user's turn with a marker, as Mistral's [/INST], need no header of the assistant.
        tail = encode(tokenizer, asked.partition(_ASKED)[2].strip(), special=True)
        if not tail or _is_end_of_turn(tokenizer, tail[-1]):
            raise ValueError(
                f"the chat template of {name} has no generation prompt: after the user's turn nothing says that the "
                "assistant is to answer, and the model would go on with a turn of its own choice"
            )


def check_stops(tokenizer: Any, stops: frozenset[int], name: str = "the model") -> None:
    """Refuse stop tokens that leave out the one that ends the assistant's turn in the chat template.

    Raises:
        ValueError: naming the token.
    """
    ends = turn_end(tokenizer)
    if ends is not None and ends not in stops:
        token = tokenizer.convert_ids_to_tokens(ends)
        raise ValueError(
            f"{name} ends its answers with {token!r} (id {ends}), which is not among its stop tokens {sorted(stops)}: "
            "answers would run on and scores collapse; add it to eos_token_id of generation_config.json"
        )


def turn_end(tokenizer: Any) -> int | None:
    """Return the special token that follows the assistant's answer in the chat template, or None if none does."""
    turns = [{"role": "user", "content": _ASKED}, {"role": "assistant", "content": _ANSWERED}]
    after = tokenizer.apply_chat_template(turns, tokenize=False).partition(_ANSWERED)[2]
    ids = encode(tokenizer, after, special=True)
    special = set(tokenizer.all_special_ids) | set(tokenizer.added_tokens_decoder)
    return ids[0] if ids and ids[0] in special else None


def _is_end_of_turn(tokenizer: Any, token: int) -> bool:
    """Say whether a token ends turns of the assistant too, so that it announces no answer."""
    return token in (turn_end(tokenizer), tokenizer.eos_token_id)


def _template_warnings(tokenizer: Any, name: str) -> Iterator[str]:
    """Yield what a template leaves to the tokeniser, which never sees the rendered text."""
    begin = tokenizer.bos_token_id
    text = tokenizer.apply_chat_template([{"role": "user", "content": _ASKED}], tokenize=False)
    ids = encode(tokenizer, text.partition(_ASKED)[0], special=True)
    adds = begin is not None and begin in list(tokenizer("")["input_ids"])
    if adds and begin not in ids[:1]:
        token = tokenizer.convert_ids_to_tokens(begin)
        yield (
            f"the chat template of {name} does not begin with {token!r}, which its tokeniser puts before every text: "
            "prompts will lack it"
        )


def _length_problems(loaded: LoadedModel, max_length: int, compressed: bool) -> Iterator[str]:
    """Refuse prompts beyond the model's positions; warn of those beyond its training."""
    config = loaded.model.config.get_text_config(decoder=True)
    rope = getattr(config, "rope_parameters", None) or {}
    # Dynamic scaling states the positions that it begins to stretch at, the other kinds those they reach.
    stretch = float(rope.get("factor") or 1) if rope.get("rope_type") == "dynamic" else 1.0
    positions = int(config.max_position_embeddings * stretch)
    if compressed or max_length <= loaded.trained_length:
        return
    if max_length > positions:
        raise ValueError(
            f"max_length {max_length:,} is beyond the {positions:,} positions of {loaded.name}: extend its context "
            "(longscope train longllm, or an adapter that brings one), compress (--method), or ask for less"
        )
    yield (
        f"max_length {max_length:,} is within the positions of {loaded.name}, but beyond the {loaded.trained_length:,} "
        "tokens it was trained on: expect worse answers there"
    )


def _padding_problems(loaded: LoadedModel) -> Iterator[str]:
    """Refuse ids that the model has no row for; warn of ends that two files disagree about."""
    network: Any = loaded.model
    rows = network.get_input_embeddings().weight.shape[0]
    tokenizer, generation = loaded.tokenizer, loaded.model.generation_config
    named = {"pad": tokenizer.pad_token_id, "eos": tokenizer.eos_token_id, "bos": tokenizer.bos_token_id}
    for kind, token in named.items():
        if token is not None and not 0 <= token < rows:
            raise ValueError(f"the {kind} token of {loaded.name} has id {token}, the model has {rows:,} rows")
    for token in sorted(loaded.stop_ids):
        if not 0 <= token < rows:
            raise ValueError(f"{loaded.name} stops at id {token}, the model has {rows:,} rows: it would never stop")
    ends = generation.eos_token_id
    ends = [ends] if isinstance(ends, int) else list(ends or ())
    if named["eos"] is not None and ends and named["eos"] not in ends:
        yield (
            f"the tokeniser of {loaded.name} ends texts with id {named['eos']}, its generation_config with {ends}: "
            "both are taken as stops here, other programs may take one"
        )
