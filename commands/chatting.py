"""A conversation and needle tests with one model, behind a page: one thing at a time, stopped at any time."""

from __future__ import annotations

import contextlib
import queue
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

from commands.answering import Run, Stopped, document_names, named_document, watched
from longllm import Decoding, DType

if TYPE_CHECKING:
    import catalog
    from longllm import LoadedModel
    from longllm.chat import ChatSession
    from longllm.evals.grid import GridPlan

#: seconds between two signs of life; whoever waits can leave at each of them
_BEAT = 0.25
#: so much of a long message is shown in the conversation
_SHOWN = 600
#: needles are hidden in the part of the novel that no shipped adapter was trained on
_HAYSTACK, _START = "moby-dick", 0.6


def chat_model() -> str:
    """Return the model to chat with by default: a shipped adapter with a longer context, else the small base model.

    >>> chat_model().startswith("smollm2-135m")
    True
    """
    from longllm import shipped

    return next((name for name in shipped.names() if name.startswith("smollm2-135m")), "smollm2-135m-instruct")


class Parlour:
    """A conversation on one growing cache, and needle tests, with one model.

    The conversation belongs to the machine: every window shows the same one. A document or a long message is read once;
    each turn after it reads only what is new.

    Args:
        model: a name from ``longscope models``, a folder, an adapter's folder or the name of a shipped adapter.
        dtype: what to compute in.
        decoding: how answer tokens are chosen.
    """

    #: lengths that the needle test offers, in tokens
    lengths: tuple[int, ...] = (1024, 2048, 4096, 8192, 16384, 32768)

    def __init__(self, model: str, dtype: DType = "auto", decoding: Decoding | None = None) -> None:
        self.model, self.dtype, self.decoding = model, dtype, decoding or Decoding(256)
        # One thread: what is asked waits until the thing before has ended or been stopped.
        self._worker = ThreadPoolExecutor(1, "chatting")
        self._loaded: LoadedModel | None = None
        self._session: ChatSession | None = None
        self._runs: set[Run] = set()
        self._past: list[dict[str, str]] = []
        #: documents in the conversation; and, with what is shown of them, those that await their first question
        self._held: set[str] = set()
        self._open: dict[str, str] = {}
        #: how many messages were answered
        self.answers = 0

    @property
    def documents(self) -> list[str]:
        """Return the names of the catalog's documents."""
        return document_names()

    @property
    def history(self) -> list[dict[str, str]]:
        """Return the conversation as it is shown: long messages and documents in short."""
        return list(self._past)

    @property
    def figures(self) -> dict[str, Any]:
        """Return how full the context is, or nothing before the first answer."""
        return self._session.figures() if self._session is not None and self._past else {}

    def load(self) -> LoadedModel:
        """Return the model, loading it on the first call.

        Raises:
            ValueError, OSError: as ``longllm.load``; the chat template cannot go on in one cache.
        """
        if self._loaded is None:
            import longllm

            self._loaded = longllm.load(self.model, dtype=self.dtype)
            self._session = longllm.ChatSession(self._loaded, decoding=self.decoding)
        return self._loaded

    def stop(self) -> None:
        """Stop what is under way: an answer at its next token, a reading at its next chunk, a test within a layer."""
        for run in list(self._runs):
            run.stop.set()
            if self._session is not None:
                self._session.stop()

    def close(self) -> None:
        """Stop what is under way, wait until it has ended, and do nothing more."""
        self.stop()
        self._worker.shutdown(cancel_futures=True)

    def reset(self) -> list[dict[str, str]]:
        """Stop what is under way and forget the conversation; return what is shown now: nothing."""
        self.stop()
        self._worker.submit(self._forget).result()
        return self.history

    def say(self, document: str, message: str) -> Iterator[tuple[list[dict[str, str]], dict[str, Any]]]:
        """Yield (conversation, figures) while a document that is new to the conversation and a message are answered.

        Closing the iterator stops the work, as ``stop`` does. What was answered until then stays; a message to which
        nothing was answered is taken back.

        Args:
            document: a document of the catalog or a file, read before the message unless it was before; "" for none.
            message: what to say.

        Raises:
            ValueError, OSError, ImportError: an empty message, no such document, or no room for it.
        """
        if not message.strip():
            raise ValueError("Type a message first.")
        text = named_document(document) if document else None
        figures: dict[str, Any] = {}
        for told, figures in self._followed(lambda run: self._answer(run, text, message)):
            yield told, figures
        if "limit" not in figures:
            yield self.history, {"note": "Stopped."}

    def needles(self, lengths: Sequence[int], depths: int) -> Iterator[dict[str, Any]]:
        """Hide facts and a pass key in texts of some lengths and ask for each; yield what is known so far.

        A text is read once for all its questions. The record has ``lengths``, ``depths`` (per cent), ``cells`` in the
        order they were asked (kind, length, depth, question, answer, right) and ``now``, what is being asked.

        Args:
            lengths: tokens of the longest prompt of each text.
            depths: how many, from 0 to 100 per cent of the text.

        Raises:
            ValueError: no length, one that is too short, or no such number of depths.
            OSError: the novel cannot be fetched.
        """
        from longllm.evals.grid import GridPlan

        if not lengths:
            raise ValueError("Choose at least one length first.")
        places = tuple(round(100 * step / (depths - 1)) for step in range(depths)) if depths > 1 else (50,)
        plan = GridPlan(tuple(sorted(lengths)), places, (1,))
        record: dict[str, Any] = {
            "lengths": plan.lengths,
            "depths": places,
            "cells": [],
            "now": {},
            "model": self.model,
        }
        for cell in self._followed(lambda run: self._hide_and_seek(run, plan)):
            if "answer" in cell:
                record = {**record, "cells": [*record["cells"], cell]}
            else:
                record = {**record, **cell}
            yield record
        yield {**record, "now": {}}

    def _followed(self, work_of: Callable[[Run], None]) -> Iterator[Any]:
        """Do something in the worker's thread and yield its news as they come, or how far it is meanwhile."""
        run = Run()
        self._runs.add(run)
        work = self._worker.submit(work_of, run)
        work.add_done_callback(lambda _: run.news.put(None))
        try:
            while True:
                try:
                    news: Any = run.news.get(timeout=_BEAT)
                except queue.Empty:
                    # Said again, since a session that was just about to begin has not heard it.
                    if run.stop.is_set() and work.running():
                        self._hush()
                    news = self._meanwhile(run)
                if news is None:
                    break
                if news:
                    yield news
            with contextlib.suppress(Stopped):
                work.result()  # raises what the worker raised
        finally:
            run.stop.set()
            if not work.cancel() and not work.done():
                self._hush()
            self._runs.discard(run)

    def _hush(self) -> None:
        """Stop what the session is doing."""
        if self._session is not None:
            self._session.stop()

    def _meanwhile(self, run: Run) -> Any:
        """Return news of a run that has none of its own: how far a reading has come, or how long a test takes."""
        seconds = time.perf_counter() - run.begun
        if "history" not in run.facts:
            return {"seconds": seconds}
        if run.facts.get("begun") or self._session is None:
            return ()
        read = {"tokens_read": self._session.held, "tokens_seen": len(self._session.ids), "seconds": seconds}
        return run.facts["history"], read

    def _answer(self, run: Run, document: catalog.Document | None, message: str) -> None:
        """Read and answer in the worker's thread; put (conversation, figures) into ``run.news``."""
        run.facts = {"history": self.history}
        if run.stop.is_set():
            raise Stopped
        self.load()
        session = self._session
        if session is None:
            raise Stopped
        shown = message if len(message) <= _SHOWN else f"{message[:_SHOWN]} … ({len(message):,} characters)"
        text = ""
        try:
            if document is not None and document.name not in self._held | self._open.keys():
                run.facts["history"] = [*self._past, _said("user", f"[{document.title or document.name} …]")]
                tokens = session.read(document.text)
                self._open[document.name] = f"[{document.title or document.name}: {tokens:,} tokens]"
            if run.stop.is_set():
                raise Stopped
            added = [_said("user", told) for told in (*self._open.values(), shown)]
            run.facts["history"] = [*self._past, *added]
            run.news.put((run.facts["history"], {}))
            for piece in session.ask(message):
                text += piece
                run.facts["begun"] = True
                run.news.put(([*self._past, *added, _said("assistant", text)], {}))
                if run.stop.is_set():
                    session.stop()
        except InterruptedError:
            # What was read for a question that got no answer is taken back with it.
            self._open.clear()
            raise Stopped from None
        self._past += [*added, _said("assistant", text)]
        self._held.update(self._open)
        self._open.clear()
        self.answers += 1
        run.news.put((self.history, session.figures()))

    def _forget(self) -> None:
        """Begin anew, in the worker's thread."""
        if self._session is not None:
            self._session.reset()
        self._past, self._held, self._open = [], set(), {}

    def _hide_and_seek(self, run: Run, plan: GridPlan) -> None:
        """Ask for all that is hidden, in the worker's thread; put what is asked and answered into ``run.news``."""
        from longllm.evals.answerers import LocalAnswerer
        from longllm.evals.grid import Grid
        from longllm.evals.haystack import read_haystack

        if run.stop.is_set():
            raise Stopped
        loaded = self.load()
        grid = Grid(plan, read_haystack(_HAYSTACK, _START))
        answerer = LocalAnswerer(loaded, max(plan.lengths))
        with watched(loaded.model, run):
            for example in grid.examples(loaded.tokenizer):
                asked = {key: example.facts[key] for key in ("kind", "length", "depth", "question")}
                run.news.put({"now": asked})
                answer = answerer.generate(example).text.strip()
                right = grid.score(example, answer)["right"] == 1
                run.news.put({**asked, "answer": answer, "right": right})


def _said(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}
