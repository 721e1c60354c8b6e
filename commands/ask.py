"""``longscope ask``: a question about a document of any length, answered by a model that reads all of it."""

from __future__ import annotations

import logging
import time
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Any

import beacon
import catalog
import longllm
from commands.ask_plan import MethodName, PositionsName, Wish
from longllm import Attention, Decoding, DType

log = logging.getLogger(__name__)


def ask(
    question: str,
    *,
    doc: str = "",
    method: MethodName = "auto",
    ratio: float = 0.0,
    slots: int = 0,
    budget: str = "",
    positions: PositionsName = "auto",
    beacons: str = "",
    question_aware: bool = True,
    save_cache: str = "",
    cache: str = "",
    ledger: bool = False,
    check: bool = True,
    model: str = "smollm2-135m-instruct",
    dtype: DType = "auto",
    attention: Attention = "flashcore",
    max_new_tokens: int = 128,
    temperature: float = 0.0,
    seed: int = 0,
) -> Iterator[str | dict[str, Any]]:
    """Answer a question about a document with a language model that reads the whole document.

    A document within the length the model was trained for is read with full attention. A longer one is read chunk by
    chunk into a KV cache of fixed size: the question is held against every chunk, and what it attends to is kept:

        longscope ask --doc sotu/1963 "Who gave his life over the island of Cuba?"
        longscope ask --doc moby-dick --save-cache whale.kv "Who is the captain of the Pequod?"
        longscope ask --cache whale.kv "What is the captain looking for?"
        longscope ask --doc sotu/1963 --method snapkv --ratio 8 "Who was killed in Viet-Nam?"

    Args:
        question: what to ask
        doc: a file (.txt, .md, .html, .pdf) or a document of the catalog, such as sotu/1963 or moby-dick
        method: how the KV cache is compressed; auto is full where the document fits, else spotlight with a fixed number
            of slots; beacon needs trained beacons; retrieve reads only the spans that share words with the question
        ratio: keep one slot per so many tokens (one of ratio, slots and budget; 8 if none is given)
        slots: keep so many slots per layer
        budget: keep so many bytes in all, such as 64MB
        positions: original keeps keys at their places in the text; compact moves the kept ones together, within the
            trained positions; auto is compact beyond the trained length
        beacons: folder of trained beacons for method beacon, instead of those that come with the model
        question_aware: let the question choose what is kept (snapkv, pyramidkv, tova, spotlight); off, the text does
        save_cache: file to keep the compressed document in, for later questions; a reading that was interrupted goes on
        cache: such a file, instead of a document: only the question is read
        ledger: show what every layer holds and where it comes from
        check: verify on the first tokens of the document that the compressed cache does what it says
        model: a name from ``longscope models``, or a folder in Hugging Face layout
        dtype: what to compute in; auto is bf16 where the hardware is fast at it, else fp32
        attention: the attention path of a model that compresses nothing; sdpa and eager are transformers' own
        max_new_tokens: the longest answer, in tokens
        temperature: 0 always takes the likeliest token; higher values draw more freely
        seed: seed of the draws when the temperature is above 0
    """
    decoding = Decoding(max_new_tokens, temperature, seed)
    wish = Wish(method, ratio, slots, budget, positions)
    checked(question, doc, cache, save_cache, wish, beacons)
    document = catalog.read_document(doc) if doc else None
    from commands import ask_reading
    from longllm.adapter import find

    find(model)
    begun = time.perf_counter()
    loaded = longllm.load(model, dtype=dtype, attention=attention)
    facts: dict[str, Any] = {"load_seconds": time.perf_counter() - begun}
    if beacons:
        beacon.use_beacons(loaded.model, beacons)
    if document is None:
        source = ask_reading.from_file(loaded, cache, question)
    elif method == "retrieve":
        source = ask_reading.from_spans(loaded, document, question)
    else:
        source = ask_reading.from_document(loaded, document, question, wish, question_aware, save_cache, check)
    warn(source.warning)
    with source.running(loaded):
        answer = longllm.stream(loaded, source.ids, decoding, prefix=source.prefix, progress=True)
        yield from answer
    record = yield from closing(loaded, source, answer.result, ledger)
    yield {**facts, "question": question, **record}


def closing(loaded: Any, source: Any, result: Any, ledger: bool) -> Generator[str, None, dict[str, Any]]:
    """Yield what is said after an answer; return its figures."""
    from commands.ask_reading import figures

    if not result.stopped:
        yield f" [cut off after {result.new_tokens} tokens; --max_new_tokens allows more]"
    record = figures(loaded, source, result)
    yield f"\n\n{footer(record)}\n"
    if ledger and source.cache is not None:
        yield f"\n{source.cache.ledger()}\n"
    return record


def checked(question: str, doc: str, cache: str, save_cache: str, wish: Wish, beacons: str) -> None:
    """Refuse a command line that cannot be right; nobody should wait for a model to learn that.

    Raises:
        ValueError, OSError: saying which options do not go together, or which file is not there.
    """
    if not question.strip():
        raise ValueError("the question is empty; write it in quotes after the options")
    if bool(doc) == bool(cache):
        raise ValueError("give either --doc (a document to read) or --cache (a file that --save-cache wrote)")
    if cache and (wish != Wish() or save_cache):
        raise ValueError("with --cache the file decides method, budget and positions: leave those options out")
    if beacons and wish.method != "beacon" and not cache:
        raise ValueError(f"--beacons ({beacons}) are for --method beacon, got {wish.method}")
    if save_cache and wish.method == "retrieve":
        raise ValueError("--method retrieve keeps no cache, so there is nothing for --save-cache to save")
    if cache and not Path(cache).expanduser().is_file():
        raise FileNotFoundError(f"there is no cache file {cache}; --save-cache writes one")


def warn(warning: str | None) -> None:
    """Put a warning on stderr."""
    if warning:
        log.warning("longscope: %s", warning)


def footer(report: dict[str, Any]) -> str:
    """Return the lines of figures under an answer.

    >>> report = {"time_to_first_token": 8.13, "tokens_per_second": 21.4, "kv_bytes": 188_000_000, "steered": True,
    ...           "kv_bytes_full": 14_376_000_000, "tokens_seen": 312011, "plan": "snapkv, 4,096 slots a layer"}
    >>> print(footer(report))
    time to first token 8.1 s | 21.4 tokens/s | 312,011 tokens read
    KV cache 188.0 MB, 76 times smaller than 14,376.0 MB | snapkv, 4,096 slots a layer, kept with the question in mind
    """
    speed = "-" if report["tokens_per_second"] is None else f"{report['tokens_per_second']:.1f}"
    held, full = report["kv_bytes"], report["kv_bytes_full"]
    size = f"KV cache {held / 1e6:,.1f} MB"
    if full > held:
        size += f", {full / held:,.0f} times smaller than {full / 1e6:,.1f} MB"
    steered = ", kept with the question in mind" if report["steered"] else ""
    return (
        f"time to first token {report['time_to_first_token']:.1f} s | {speed} tokens/s | "
        f"{report['tokens_seen']:,} tokens read\n{size} | {report['plan']}{steered}"
    )
