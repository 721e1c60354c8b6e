"""Texts cut where they pause, into chunks of at most so many tokens that joined are the text again."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any


def token_counter(model: str | os.PathLike[str]) -> Any:
    """Return the tokeniser of a catalog model or of a folder, as the ``tokenizers`` library has it.

    Raises:
        ValueError: unknown name, or a folder without tokenizer.json.
        OSError: the files cannot be fetched.
    """
    from tokenizers import Tokenizer

    import catalog

    file = Path(catalog.path(model)) / "tokenizer.json"
    if not file.is_file():
        raise ValueError(f"{os.fspath(model)!r} has no tokenizer.json: name a model whose folder holds one")
    tokenizer = Tokenizer.from_file(str(file))
    # A tokeniser saved with a limit would count every long text as being of that length.
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def count_tokens(tokenizer: Any, text: str) -> int:
    """Return how many tokens a text has, for a tokeniser of ``token_counter`` or a function that counts.

    >>> count_tokens(lambda text: len(text.split()), "Call me Ishmael.")
    3
    """
    if callable(tokenizer):
        return int(tokenizer(text))
    return len(tokenizer.encode(text, add_special_tokens=False).ids)


def chunks(text: str, capacity: int, tokenizer: Any | Callable[[str], int]) -> list[str]:
    """Cut a text into chunks of at most ``capacity`` tokens, at the strongest pauses there are.

    Paragraphs stay whole where they fit, then sentences, then words; nothing is trimmed: ``"".join(chunks)`` is the
    text. (The splitter of the report arXiv 2404.19553, whose chunks have 4,096 tokens.)

    Args:
        text: any text.
        capacity: most tokens of a chunk; a single character may have more.
        tokenizer: of ``token_counter``, or a function that counts.

    Raises:
        ValueError: a capacity below 1.
        ImportError: ``semantic-text-splitter`` (``longscope[synth]``) is not installed.

    >>> chunks("The sea is wide. It is blue.\\n\\nAhab is the captain.", 7, lambda text: len(text.split()))
    ['The sea is wide. It is blue.\\n\\n', 'Ahab is the captain.']
    """
    if capacity < 1:
        raise ValueError(f"the capacity of a chunk must be at least 1 token, got {capacity}")
    try:
        from semantic_text_splitter import TextSplitter
    except ImportError as error:
        raise ImportError("cutting texts needs semantic-text-splitter: pip install 'longscope[synth]'") from error
    build = TextSplitter.from_callback if callable(tokenizer) else TextSplitter.from_huggingface_tokenizer
    return list(build(tokenizer, capacity, trim=False).chunks(text))
