"""``longscope ask``: a question about a document, answered by a model that reads all of it."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from typing import Any

import catalog
from longllm import Attention, Decoding, DType

log = logging.getLogger(__name__)


def ask(
    question: str,
    *,
    doc: str,
    model: str = "smollm2-135m-instruct",
    dtype: DType = "auto",
    attention: Attention = "flashcore",
    max_new_tokens: int = 128,
    temperature: float = 0.0,
    seed: int = 0,
) -> Iterator[str | dict[str, Any]]:
    """Answer a question about a document with a language model that reads the whole document.

    The answer streams as it is made; its speed and the memory of its cache follow:

        longscope ask --doc sotu/1963 "Who gave his life over the island of Cuba?"

    Args:
        question: what to ask
        doc: a file (.txt, .md, .html, .pdf) or a document of the catalog, such as sotu/1963 or moby-dick
        model: a name from ``longscope models``, or a folder in Hugging Face layout
        dtype: what to compute in; auto is bf16 where the hardware is fast at it, else fp32
        attention: the attention path; sdpa and eager are transformers' own, for comparison
        max_new_tokens: the longest answer, in tokens
        temperature: 0 always takes the likeliest token; higher values draw more freely
        seed: seed of the draws when the temperature is above 0
    """
    # Cheap checks first: nobody should wait for a model to learn that a file name was mistyped.
    decoding = Decoding(max_new_tokens, temperature, seed)
    if not question.strip():
        raise ValueError("the question is empty; write it in quotes after the options")
    document = catalog.read_document(doc)
    catalog.path(model)

    import longllm

    begun = time.perf_counter()
    loaded = longllm.load(model, dtype=dtype, attention=attention)
    load_seconds = time.perf_counter() - begun
    prompt = longllm.document_prompt(loaded.tokenizer, document.text, question)
    warning = longllm.length_warning(len(prompt.ids), loaded.trained_length)
    if warning:
        log.warning("longscope: %s", warning)
    answer = longllm.stream(loaded, prompt.ids, decoding, progress=True)
    yield from answer
    result = answer.result
    if not result.stopped:
        yield f" [cut off after {result.new_tokens} tokens; --max_new_tokens allows more]"
    yield f"\n\n{footer(result)}\n"
    yield {
        "answer": result.text,
        "tokens_seen": result.tokens_seen,
        "kv_bytes": result.kv_bytes,
        # Nothing is compressed here: what is kept is what full attention keeps.
        "kv_bytes_full": result.kv_bytes,
        "method": "full",
        "ratio": 1.0,
        "seconds": result.seconds,
        "time_to_first_token": result.time_to_first_token,
        "tokens_per_second": result.tokens_per_second,
        "new_tokens": result.new_tokens,
        "stopped": result.stopped,
        "load_seconds": load_seconds,
        "question": question,
        "document": document.name,
        "document_tokens": prompt.document_tokens,
        "truncated": False,
        "trained_length": loaded.trained_length,
        "tokens_beyond_training": max(0, len(prompt.ids) - loaded.trained_length),
        "warning": warning,
        "model": loaded.name,
        "dtype": str(loaded.dtype).removeprefix("torch."),
        "attention": loaded.attention,
        "device": str(loaded.device),
    }


def footer(result: Any) -> str:
    """Return the line of figures under an answer.

    >>> from types import SimpleNamespace
    >>> footer(SimpleNamespace(time_to_first_token=8.13, tokens_per_second=21.4, kv_bytes=148216320, tokens_seen=6433))
    'time to first token 8.1 s | 21.4 tokens/s | KV cache 148,216,320 bytes | 6,433 tokens read'
    """
    speed = "-" if result.tokens_per_second is None else f"{result.tokens_per_second:.1f}"
    return (
        f"time to first token {result.time_to_first_token:.1f} s | {speed} tokens/s | "
        f"KV cache {result.kv_bytes:,} bytes | {result.tokens_seen:,} tokens read"
    )
