"""Where an answer of ``longscope ask`` comes from: a document read now, a cache file, or spans found by a search."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import beacon
import longllm
from catalog import Document
from commands.ask_plan import Plan, Wish, decide
from commands.reading import Keep, read_text

if TYPE_CHECKING:
    from beacon.request import RequestCache

#: tokens of an excerpt (``--method retrieve``), at most; never more than half the trained length
_EXCERPT = 2048


@dataclass(frozen=True)
class Source:
    """A prompt, and what has been read of it already."""

    ids: tuple[int, ...]
    plan: str
    method: str
    document: dict[str, Any]
    prefix: longllm.Prefix | None = None
    steered: bool = False
    """whether the question chose what was kept"""
    reading_seconds: float = 0.0
    warning: str | None = None
    figures: dict[str, Any] = field(default_factory=dict)

    @property
    def cache(self) -> RequestCache | None:
        """Return the compressed cache, if one was used."""
        return self.prefix.cache if self.prefix is not None else None

    @contextlib.contextmanager
    def running(self, loaded: longllm.LoadedModel) -> Iterator[None]:
        """Let the model run on the compressed cache, if there is one."""
        method = self.cache.method if self.cache is not None else None
        with method.running(loaded.model) if method is not None else contextlib.nullcontext():
            yield


def from_document(
    loaded: longllm.LoadedModel,
    document: Document,
    question: str,
    wish: Wish,
    question_aware: bool,
    save_cache: str,
    check: bool,
) -> Source:
    """Read a document as planned; without compression or saving, leave that to the answer."""
    prompt = longllm.document_prompt(loaded.tokenizer, document.text, question)
    plan = decide(wish, len(prompt.ids), loaded.trained_length)
    facts = {"document": document.name, "title": document.title, "document_tokens": prompt.document_tokens}
    warning = longllm.length_warning(len(prompt.ids), loaded.trained_length) if plan.method == "full" else None
    if plan.method == "full" and not save_cache:
        return Source(prompt.ids, str(plan), "full", facts, warning=warning)
    method = beacon.method(plan.method)
    warning = warning or method.warning(loaded.model)
    held = method.verified(loaded.model, prompt.ids, plan.positions) if check and plan.method != "full" else []
    ids, asked = prompt.ids[: prompt.shared], list(prompt.ids[prompt.shared :])
    keep = Keep(save_cache) if save_cache else None
    reading = read_text(loaded, ids, plan, [asked] if question_aware else [], keep, facts, len(prompt.ids))
    steered = asked in reading.notes["questions"]
    seconds, found = reading.prefix.seconds, {"verified": held}
    return Source(prompt.ids, str(plan), plan.method, facts, reading.prefix, steered, seconds, warning, found)


def from_file(loaded: longllm.LoadedModel, path: str, question: str) -> Source:
    """Go on from a cache file.

    Raises:
        ValueError: as ``beacon.load_cache``, or the reading was not finished.
    """
    saved = beacon.load_cache(path, loaded)
    if not saved.complete:
        raise ValueError(
            f"the reading in {path} stopped after {saved.cache.seen[0]:,} of {len(saved.ids):,} tokens: "
            "finish it with the --doc and --save-cache it was begun with"
        )
    own = longllm.question_ids(loaded.tokenizer, question)
    facts = {key: saved.notes.get(key) for key in ("document", "title", "document_tokens")}
    cache = saved.cache
    if cache.method is None:
        raise ValueError(f"the cache in {path} was made by no named method: it can be used from Python only")
    plan = Plan(cache.method.name, cache.budget, cache.positions)
    prefix = longllm.Prefix(saved.ids, cache, 0.0)
    steered = own in saved.notes.get("questions", [])
    return Source((*saved.ids, *own), f"{plan}, from {path}", plan.method, facts, prefix, steered)


def from_spans(loaded: longllm.LoadedModel, document: Document, question: str) -> Source:
    """Search the document for spans and read only those."""
    budget = min(_EXCERPT, loaded.trained_length // 2)
    excerpt = longllm.retrieve(loaded.tokenizer, document.text, question, budget)
    prompt = longllm.document_prompt(loaded.tokenizer, excerpt.text, question)
    facts = {"document": document.name, "title": document.title, "document_tokens": excerpt.document_tokens}
    words = f"retrieve: {len(excerpt.spans)} spans, {excerpt.tokens:,} of {excerpt.document_tokens:,} tokens were read"
    return Source(prompt.ids, words, "retrieve", facts, figures={"spans": list(excerpt.spans)})


def figures(loaded: longllm.LoadedModel, source: Source, result: longllm.Result) -> dict[str, Any]:
    """Return what is reported about one answer."""
    tokens = len(source.ids)
    if source.cache is None:
        held = full = result.kv_bytes
        account = None
    else:
        account = source.cache.ledger()
        held, full = result.kv_bytes, account.full_bytes // max(1, sum(account.tokens_seen)) * tokens
    beyond = max(0, tokens - loaded.trained_length)
    return {
        "answer": result.text,
        "stopped": result.stopped,
        "new_tokens": result.new_tokens,
        "model": loaded.name,
        "dtype": str(loaded.dtype).removeprefix("torch."),
        "attention": loaded.attention,
        "device": str(loaded.device),
        "tokens_seen": result.tokens_seen,
        "kv_bytes": held,
        "kv_bytes_full": full,
        "ratio": full / held,
        "method": source.method,
        "plan": source.plan,
        "steered": source.steered,
        "seconds": source.reading_seconds + result.seconds,
        "reading_seconds": source.reading_seconds,
        "time_to_first_token": source.reading_seconds + result.time_to_first_token,
        "tokens_per_second": result.tokens_per_second,
        "truncated": source.method == "retrieve",
        "trained_length": loaded.trained_length,
        "tokens_beyond_training": beyond,
        "warning": source.warning,
        "ledger": account.record() if account else None,
        **source.document,
        **source.figures,
    }
