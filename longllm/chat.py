"""A conversation on one growing KV cache: each turn reads only what is new, and the last turn can be taken back."""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Generator, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from flashcore.hf import GrowingCache, cache_bytes
from flashcore.hf.cache import GrowingLayer
from longllm.config import Decoding
from longllm.dialogue import dialogue
from longllm.generate import Result, Stream, read_on, resume
from longllm.loading import LoadedModel, claimed_length
from longllm.prompts import AFTER_DOCUMENT, QUESTION, encode, length_warning

_FORMAT = "longscope chat 1"


@dataclass
class Turn:
    """A message and its answer, and where they stand in the ids of the conversation."""

    begin: int
    message: str = ""
    document: str = ""
    """what the message begins with, read before the rest was known"""
    read_to: int = 0
    """where that ends"""
    asked: int = 0
    """where the answer begins; 0 while the message is not complete"""
    answer: str | None = None
    result: Result | None = None


class ChatSession:
    """A chat with a loaded model.

    Ids are built from pieces (template, message, answer as it was generated) and never made again from joined text, so
    that the cache is always that of the conversation. An earlier answer that is still under way is ended by the next
    call.
    """

    def __init__(
        self, loaded: LoadedModel, *, system: str = "", decoding: Decoding | None = None, limit: int = 0
    ) -> None:
        """Begin an empty conversation.

        Args:
            loaded: the model.
            system: a system message; empty means what the chat template does by itself.
            decoding: how answers are chosen.
            limit: tokens that conversation and answer may have together; 0 = what the model claims.

        Raises:
            ValueError: a chat template that cannot go on in one cache or takes no system message, or a negative limit.
        """
        if limit < 0:
            raise ValueError(f"limit must be 0 (what the model claims) or a number of tokens, got {limit}")
        self.loaded, self.system, self.decoding = loaded, system, decoding or Decoding()
        self.frame = dialogue(loaded.tokenizer, system)
        self.limit = limit or max(claimed_length(loaded.model.config), loaded.trained_length)
        self.turns: list[Turn] = []
        self._ids: list[int] = []
        self._cache: Any = None
        self._running: Generator[str, None, Result] | None = None
        self._halt = threading.Event()

    def reset(self) -> None:
        """Forget the conversation, the system message excepted."""
        self._settle()
        self.turns, self._ids, self._cache = [], [], None

    @property
    def ids(self) -> tuple[int, ...]:
        """Return the tokens of the conversation so far."""
        return tuple(self._ids)

    @property
    def messages(self) -> list[dict[str, str]]:
        """Return the conversation as a chat template takes it."""
        told = [{"role": "system", "content": self.system}] if self.system else []
        for turn in self.turns:
            told.append({"role": "user", "content": turn.message})
            if turn.answer is not None:
                told.append({"role": "assistant", "content": turn.answer})
        return told

    def ask(self, message: str, *, progress: bool = False) -> Stream:
        """Return the answer to a message as a stream of text pieces; the turn ends when the stream does.

        After a document, the message is worded as ``longllm.document_prompt`` words a question.

        Raises:
            ValueError: an empty message, or no room for it.
        """
        self._settle()
        if not message.strip():
            raise ValueError("the message is empty")
        document = self.turns[-1].document if self._is_open() else ""
        added = QUESTION.format(question=message.strip()) if document else self._trimmed(message)
        pieces = [*([] if document else self._opening()), *encode(self.loaded.tokenizer, added), *self.frame.ask]
        self._check_room(len(pieces) + 1)
        if not document:
            self.turns.append(Turn(len(self._ids)))
        self._ids += pieces
        turn = self.turns[-1]
        turn.message, turn.asked = document + added, len(self._ids)
        return self._stream(turn, self.decoding, progress)

    def again(self, *, progress: bool = False) -> Stream:
        """Answer the last message once more; with a temperature above 0 other tokens are drawn.

        Raises:
            ValueError: nothing has been asked.
        """
        self._settle()
        if not self.turns or self._is_open():
            raise ValueError("nothing has been asked yet, so nothing can be answered again")
        turn = self.turns[-1]
        self._truncate(turn.asked)
        turn.answer = turn.result = None
        self.decoding = replace(self.decoding, seed=self.decoding.seed + 1)
        return self._stream(turn, self.decoding, progress)

    def read(self, document: str, *, progress: bool = False) -> int:
        """Read a document now, as the beginning of the next message; return its tokens.

        Raises:
            ValueError: an empty document, or no room for it.
            InterruptedError: ``stop`` was called meanwhile; the conversation is as before.
        """
        self._settle()
        document = document.strip()
        if not document:
            raise ValueError("the document is empty")
        body = encode(self.loaded.tokenizer, document)
        fresh = not self._is_open()
        pieces = [*(self._opening() if fresh else []), *body, *encode(self.loaded.tokenizer, AFTER_DOCUMENT)]
        self._check_room(len(pieces) + len(self.frame.ask) + 1)
        begin = len(self._ids)
        self._ids += pieces
        complete = False
        try:
            read_on(self.loaded, self._ids, self._opened(), self.held, halted=self._halt.is_set, progress=progress)
            complete = True
        finally:
            if not complete:
                self._truncate(begin)
        if fresh:
            self.turns.append(Turn(begin))
        turn = self.turns[-1]
        turn.document += document + AFTER_DOCUMENT
        turn.message, turn.read_to = turn.document, len(self._ids)
        return len(body)

    def undo(self) -> str:
        """Take back the last message and its answer; return the message.

        A document that the message began with stays read and awaits another question; undo once more takes it back.

        Raises:
            ValueError: there is nothing to take back.
        """
        self._settle()
        if not self.turns:
            raise ValueError("there is no message to take back")
        return self._drop_last()

    def stop(self) -> None:
        """End the answer or the reading under way at its next token or chunk; may be called from a signal handler."""
        self._halt.set()

    @property
    def held(self) -> int:
        """Return how many tokens of the conversation the cache holds in every layer."""
        if self._cache is None:
            return 0
        return min(min(_lengths(layer)) for layer in self._cache.layers)

    def figures(self) -> dict[str, Any]:
        """Return what a report shows: turns, tokens, limits, memory, and a warning beyond the trained length."""
        last = next((turn.result for turn in reversed(self.turns) if turn.result is not None), None)
        return {
            "model": self.loaded.name,
            "turns": len(self.turns),
            "tokens": len(self._ids),
            "limit": self.limit,
            "trained_length": self.loaded.trained_length,
            "kv_bytes": cache_bytes(self._cache) if self._cache is not None else 0,
            "tokens_per_second": last.tokens_per_second if last else None,
            "seconds": last.seconds if last else None,
            "warning": length_warning(len(self._ids), self.loaded.trained_length),
        }

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the conversation as JSON; its ``conversations`` are a row of training data."""
        told = [message for message in self.messages if message["role"] != "system"]
        record = {"format": _FORMAT, "model": self.loaded.name, "system": self.system, "conversations": told}
        target = Path(path).expanduser()
        partial = target.with_name(f".{target.name}.partial")
        partial.write_text(json.dumps(record, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
        partial.replace(target)

    def load(self, path: str | os.PathLike[str]) -> None:
        """Go on from a saved conversation, with its system message; the next answer reads it.

        Raises:
            ValueError: the file is no saved chat, or has no room here.
            OSError: it cannot be read.
        """
        self._settle()
        file = Path(path).expanduser()
        try:
            record = json.loads(file.read_text(encoding="utf-8"))
            told = [(entry["role"], entry["content"]) for entry in record["conversations"]]
            system = record["system"]
            roles = ["user", "assistant"] * (len(told) // 2)
            if record["format"] != _FORMAT or [role for role, _ in told] != roles:
                raise ValueError("its turns do not alternate or it has another format")
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path} is no chat that /save wrote ({type(error).__name__}: {error})") from error
        other = ChatSession(self.loaded, system=system, decoding=self.decoding, limit=self.limit)
        for (_, message), (_, answer) in zip(told[::2], told[1::2], strict=True):
            other.append(message, answer)
        self.system, self.frame, self.turns = other.system, other.frame, other.turns
        self._ids, self._cache = other._ids, None

    def append(self, message: str, answer: str) -> None:
        """Add a turn that took place elsewhere; it is read with the next one.

        Raises:
            ValueError: there is no room for it.
        """
        self._settle()
        if self._is_open():
            raise ValueError("a document awaits its question: ask it first, or take the document back")
        tokens = self.loaded.tokenizer
        asked = [*self._opening(), *encode(tokens, message), *self.frame.ask]
        said = encode(tokens, answer)
        self._check_room(len(asked) + len(said))
        turn = Turn(len(self._ids), message, asked=len(self._ids) + len(asked), answer=answer)
        self._ids += asked + said
        self.turns.append(turn)

    def _stream(self, turn: Turn, decoding: Decoding, progress: bool) -> Stream:
        """Start answering a turn."""
        room = self.limit - len(self._ids)
        decoding = replace(decoding, max_new_tokens=min(decoding.max_new_tokens, room))
        self._running = self._answer(turn, decoding, progress)
        return Stream(self._running)

    def _answer(self, turn: Turn, decoding: Decoding, progress: bool) -> Generator[str, None, Result]:
        """Yield the pieces of a turn's answer; whatever happens, leave ids and cache in step."""
        chosen: list[int] = []
        pieces: list[str] = []
        try:
            cache = self._opened()
            halted = self._halt.is_set
            answer = resume(
                self.loaded, self._ids, cache, self.held, decoding, chosen=chosen, halted=halted, progress=progress
            )
            for piece in answer:
                pieces.append(piece)
                yield piece
            turn.result = answer.result
        finally:
            if chosen or turn.result is not None:
                turn.answer = "".join(pieces)
                self._ids += chosen
            else:
                self._drop_last()
        return turn.result

    def _settle(self) -> None:
        """End an answer under way; take back a message that nothing was answered to."""
        if self._running is not None:
            self._running.close()
            self._running = None
        self._halt.clear()
        if self.turns and self.turns[-1].asked and self.turns[-1].answer is None:
            self._drop_last()

    def _is_open(self) -> bool:
        """Say whether a document has been read and awaits its question."""
        return bool(self.turns) and not self.turns[-1].asked

    def _opening(self) -> tuple[int, ...]:
        """Return the ids before the next user's message."""
        return self.frame.between if self.turns else self.frame.head

    def _trimmed(self, text: str) -> str:
        return text.strip() if self.frame.trims else text

    def _check_room(self, more: int) -> None:
        """Refuse what does not fit, before anything has changed."""
        if len(self._ids) + more > self.limit:
            raise ValueError(
                f"the conversation has {len(self._ids):,} tokens and this adds {more:,}, but the context ends at "
                f"{self.limit:,}: take turns back, begin anew, or load a model with a longer context"
            )

    def _opened(self) -> Any:
        """Return the cache, its layers in step, with room for the conversation so far."""
        # A pass that broke off in the middle has left some layers longer than others. The last token is always read
        # (again): its logits are not kept.
        self._crop(min(self.held, len(self._ids) - 1))
        if self._cache is None:
            self._cache = GrowingCache(self.loaded.model.config)
        self._cache.reserve(len(self._ids))
        return self._cache

    def _drop_last(self) -> str:
        """Take the last message out of the conversation, but not a document it is about; return it."""
        turn = self.turns[-1]
        if turn.document and turn.asked:
            message = turn.message.removeprefix(turn.document)
            self._truncate(turn.read_to)
            turn.message, turn.asked, turn.answer, turn.result = turn.document, 0, None, None
            return message
        self._truncate(self.turns.pop().begin)
        return turn.message

    def _truncate(self, tokens: int) -> None:
        """Shorten the conversation to its first ``tokens`` tokens."""
        del self._ids[tokens:]
        self._crop(tokens)

    def _crop(self, tokens: int) -> None:
        """Shorten the cache to at most so many tokens; where a layer cannot go back, read everything anew."""
        if self._cache is None:
            return
        try:
            for layer in self._cache.layers:
                _shorten(layer, tokens)
        except RuntimeError:  # a sliding window has let go of what would be needed
            self._cache = None


def _lengths(layer: Any) -> Iterator[int]:
    """Yield how many tokens of keys, and of values, a layer holds: an interrupted pass may leave one longer."""
    if not layer.is_initialized:
        yield 0
    elif isinstance(layer, GrowingLayer) and layer.keys is not None and layer.values is not None:
        yield layer.keys.shape[2]
        yield layer.values.shape[2]
    else:
        yield layer.get_seq_length()


def _shorten(layer: Any, tokens: int) -> None:
    """Keep a layer's first ``tokens`` tokens.

    Raises:
        RuntimeError: the layer cannot go back.
    """
    if isinstance(layer, GrowingLayer):
        if layer.is_initialized and layer.keys is not None and layer.values is not None:
            layer.keys, layer.values = layer.keys[:, :, :tokens], layer.values[:, :, :tokens]
    elif (excess := layer.get_seq_length() - tokens) > 0:
        layer.crop(-excess)
