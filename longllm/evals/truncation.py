"""Cutting a filled-in prompt to size as text, as LongBench does, before any chat template is put around it."""

from __future__ import annotations

from typing import Any, Literal

from longllm.prompts import encode

Keep = Literal["middle", "left"]


def begin_ids(tokenizer: Any) -> list[int]:
    """Return the token that the tokeniser puts before every text, if it does: one id or none.

    >>> class Plain:
    ...     bos_token_id = 1
    ...     def __call__(self, text):
    ...         return {"input_ids": [1, *map(ord, text)]}
    >>> begin_ids(Plain())
    [1]
    """
    begin = tokenizer.bos_token_id
    return [begin] if begin is not None and begin in list(tokenizer("")["input_ids"]) else []


def shortened(tokenizer: Any, prompt: str, most: int, leave_out: Keep = "middle") -> tuple[str, int]:
    """Return a prompt cut to ``most`` tokens, as text, and how many tokens were left out.

    The first and the last half are decoded one by one and joined, then tokenised again by whoever reads the prompt:
    token boundaries may shift at the seam. That is how published figures were computed, so it is done here and not on
    the ids (``answerers.cut``), which keeps exactly ``most`` of them. A begin-of-text token counts as one of the first
    half.

    Args:
        tokenizer: of the model that will read it.
        prompt: without a chat template.
        most: tokens that may stay; 0 = all.
        leave_out: the middle, or what is on the left.
    """
    ids = encode(tokenizer, prompt) if most else []
    begin = len(begin_ids(tokenizer)) if most else 0
    if len(ids) + begin <= most:
        return prompt, 0
    half = most // 2
    parts = [ids[-most:]] if leave_out == "left" else [ids[: max(0, half - begin)], ids[len(ids) - half :]]
    options = {"skip_special_tokens": True, "clean_up_tokenization_spaces": False}
    return "".join(tokenizer.decode(part, **options) for part in parts), len(ids) - sum(map(len, parts))
