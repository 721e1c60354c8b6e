"""Question after question with one model: loaded once, stopped at any time, a reading kept for the next question."""

from __future__ import annotations

import contextlib
import logging
import math
import queue
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import catalog
from commands.ask_plan import MethodName, Plan, Wish, decide
from longllm import Decoding, DType

if TYPE_CHECKING:
    from commands.ask_reading import Source
    from longllm import LoadedModel, Prefix

log = logging.getLogger(__name__)

#: methods to which a ratio means nothing
UNRATED = ("auto", "full", "retrieve")
#: seconds between two signs of life while a document is read; whoever waits can leave at each of them
_BEAT = 0.25


class Stopped(Exception):
    """Nobody waits for the answer any more."""


@dataclass(eq=False)
class Run:
    """One question under way, as its worker and whoever waits for it see it."""

    begun: float = field(default_factory=time.perf_counter)
    news: queue.Queue[Any] = field(default_factory=queue.Queue)
    stop: threading.Event = field(default_factory=threading.Event)
    facts: dict[str, Any] = field(default_factory=dict)
    """what is known before the answer begins"""
    read: int = 0
    """tokens of the text read so far"""

    def so_far(self) -> dict[str, Any]:
        """Return the figures of a reading under way."""
        return {**self.facts, "tokens_read": self.read, "seconds": time.perf_counter() - self.begun}


class Desk:
    """Answers questions about documents, one at a time.

    What was read last stays in memory: a further question on the same document, read in the same way, goes on from a
    copy of it. Only a reading that a question has steered serves no other question.

    Args:
        model: a name from ``longscope models``, or a folder in Hugging Face layout.
        dtype: what to compute in.
        decoding: how answer tokens are chosen.
    """

    methods: tuple[str, ...] = get_args(MethodName)
    unrated: tuple[str, ...] = UNRATED

    def __init__(self, model: str, dtype: DType = "auto", decoding: Decoding | None = None) -> None:
        self.model, self.dtype, self.decoding = model, dtype, decoding or Decoding()
        # One thread: a question waits until the one before has ended or been stopped.
        self._worker = ThreadPoolExecutor(1, "answering")
        self._loaded: LoadedModel | None = None
        self._kept: tuple[Source, Prefix, bool] | None = None
        #: what has kept the compression contract with this model, and need not show it again
        self._verified: set[tuple[str, str]] = set()
        self._runs: set[Run] = set()
        #: how many questions were answered
        self.answers = 0

    @property
    def documents(self) -> list[str]:
        """Return the names of the catalog's documents."""
        return document_names()

    def load(self) -> LoadedModel:
        """Return the model, loading it on the first call.

        Raises:
            ValueError, OSError: as ``longllm.load``.
        """
        if self._loaded is None:
            import longllm

            self._loaded = longllm.load(self.model, dtype=self.dtype)
        return self._loaded

    def stop(self) -> None:
        """Stop what is under way, within one layer of the model; its iterator ends with a note that says so."""
        for run in list(self._runs):
            run.stop.set()

    def close(self) -> None:
        """Stop what is under way, wait until it has ended, and answer nothing more."""
        self.stop()
        self._worker.shutdown(cancel_futures=True)

    def __call__(
        self, document: str, method: str, ratio: float, question: str, question_aware: bool = True
    ) -> Iterator[tuple[str, dict[str, Any] | None]]:
        """Yield (the answer so far, figures): of the reading while it lasts, none while writing, all at the end.

        Closing the iterator stops the work, as ``stop`` does.

        Args:
            document: a document of the catalog, or a file.
            method: a name of ``methods``.
            ratio: keep one slot per so many tokens; ignored by the ``unrated`` methods.
            question: what to ask.
            question_aware: let the question choose what is kept, where the method can.

        Raises:
            ValueError, OSError, ImportError: nothing was asked or named; as ``catalog.read_document``, ``Wish``.
        """
        if not question.strip():
            raise ValueError("Type a question first.")
        if not document:
            raise ValueError("Choose a document or upload a file first.")
        if method not in self.methods:
            raise ValueError(f"unknown method {method!r}; the methods are {', '.join(self.methods)}")
        wish = Wish(method, 0.0 if method in self.unrated else ratio)  # type: ignore[arg-type]
        text = named_document(document)
        run = Run()
        self._runs.add(run)
        work = self._worker.submit(self._answer, run, text, wish, question, question_aware)
        work.add_done_callback(lambda _: run.news.put(None))
        try:
            yield "", run.so_far()
            answer = ""
            while True:
                try:
                    news = run.news.get(timeout=_BEAT)
                except queue.Empty:
                    news = (answer, None if answer else run.so_far())
                if run.stop.is_set():
                    yield answer, {"note": "Stopped."}
                    return
                if news is None:
                    break
                answer = news[0]
                yield news
            work.result()  # raises what the worker raised
        finally:
            run.stop.set()
            self._runs.discard(run)

    def _answer(self, run: Run, document: catalog.Document, wish: Wish, question: str, question_aware: bool) -> None:
        """Read and answer in the worker's thread; put what comes into ``run.news``."""
        import longllm
        from commands.ask_reading import figures

        if run.stop.is_set():
            raise Stopped
        loaded = self.load()
        text = ""
        with watched(loaded.model, run):
            source, prefix = self._source(run, loaded, document, wish, question, question_aware)
            reused = prefix is not None and source.reading_seconds == 0
            with source.running(loaded):
                stream = longllm.stream(loaded, source.ids, self.decoding, prefix=prefix)
                for piece in stream:
                    text += piece
                    run.news.put((text, None))
        record = figures(loaded, source, stream.result)
        record["warning"] = record["warning"] or run.facts.get("warning")
        self.answers += 1
        run.news.put((text, {**record, "reused": reused}))

    def _source(
        self,
        run: Run,
        loaded: LoadedModel,
        document: catalog.Document,
        wish: Wish,
        question: str,
        question_aware: bool,
    ) -> tuple[Source, Prefix | None]:
        """Return the prompt and what has been read of it: kept from the last question, or read now."""
        import longllm
        from commands import ask_reading

        run.facts = {"title": document.title, "plan": wish.method}
        if wish.method == "retrieve":
            return ask_reading.from_spans(loaded, document, question), None
        prompt = longllm.document_prompt(loaded.tokenizer, document.text, question)
        plan = decide(wish, len(prompt.ids), loaded.trained_length)
        warning = outlook(plan, len(prompt.ids), loaded.trained_length)
        run.facts |= {"plan": str(plan), "tokens_seen": len(prompt.ids), "warning": warning}
        shared = prompt.ids[: prompt.shared]
        wanted = (document.name, shared, str(plan), question_aware)
        if self._kept is not None:
            source, prefix, aware = self._kept
            if (source.document["document"], prefix.ids, source.plan, aware) == wanted:
                return replace(source, ids=prompt.ids, reading_seconds=0.0), prefix
        self._kept = None  # before reading: there may be no room for both
        check = (plan.method, plan.positions) not in self._verified
        source = ask_reading.from_document(loaded, document, question, wish, question_aware, "", check)
        self._verified.add((plan.method, plan.positions))
        held = source.prefix
        # Within the trained length a full cache is small enough to be there twice: kept, and copied for each question.
        if held is None and len(prompt.ids) <= loaded.trained_length:
            held = longllm.prefill(loaded, shared)
            source = replace(source, reading_seconds=held.seconds)
        if held is not None and not source.steered:
            self._kept = source, held, question_aware
        return source, held


def document_names() -> list[str]:
    """Return the names of the catalog's documents, fetching the collections on first use."""
    names: list[str] = []
    for row in catalog.rows():
        if row.documents:
            try:
                names += reversed(catalog.documents(row.name))
            except OSError as error:
                log.warning("longscope: the documents of %s are not offered: %s", row.name, error)
    return names


def outlook(plan: Plan, tokens: int, trained_length: int) -> str | None:
    """Say what is wrong with a plan for a prompt of ``tokens`` tokens before it is carried out, or return None.

    >>> from beacon import Budget
    >>> outlook(Plan("snapkv", Budget(ratio=8), "compact"), 312_000, 8192)
    'ratio 8 keeps 39,000 slots a layer, too many for a model trained on 8,192 tokens: choose at least 51, or auto'
    >>> outlook(Plan("snapkv", Budget(ratio=8), "original"), 7_000, 8192) is None
    True
    """
    if plan.method == "full":
        from longllm import length_warning

        return length_warning(tokens, trained_length)
    # A quarter of the length is for the chunk being read, the questions and the answer.
    room = trained_length * 3 // 4
    kept = math.ceil(tokens / plan.limit.ratio) if plan.limit.ratio else 0
    if kept <= room:
        return None
    return (
        f"ratio {plan.limit.ratio:g} keeps {kept:,} slots a layer, too many for a model trained on "
        f"{trained_length:,} tokens: choose at least {math.ceil(tokens / room)}, or auto"
    )


def named_document(reference: str) -> catalog.Document:
    """Read a document; messages call a file by its name, not by the folder an upload happens to lie in."""
    try:
        return catalog.read_document(reference)
    except ValueError as error:
        raise ValueError(str(error).replace(reference, Path(reference).name)) from error


@contextlib.contextmanager
def watched(model: Any, run: Run) -> Iterator[None]:
    """Note how far a model has read, and raise ``Stopped`` inside it once ``run`` is to stop."""
    import torch

    def before_pass(module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        cache = kwargs.get("past_key_values")
        if cache is not None:
            run.read = max(run.read, cache.get_seq_length())

    def before_product(module: Any, args: Any) -> None:
        if run.stop.is_set():
            raise Stopped

    # Linear layers, for every way of reading runs through them, whatever it makes of the blocks above.
    hooks = [model.register_forward_pre_hook(before_pass, with_kwargs=True)]
    hooks += [
        part.register_forward_pre_hook(before_product) for part in model.modules() if isinstance(part, torch.nn.Linear)
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
