"""A model on this machine as an answerer; how it reads a prompt is a parameter, so that any compressed memory fits."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch

from flashcore.hf import GrowingCache
from longllm.config import Decoding
from longllm.evals.steady import steady
from longllm.evals.task import Answer, Example
from longllm.evals.truncation import begin_ids
from longllm.generate import Prefix, prefill, stream
from longllm.loading import LoadedModel
from longllm.prompts import chat_frame, encode

#: reads the beginning of a prompt into a cache: (ids, how many tokens the whole prompt has) -> what has been read
Reader = Callable[[Sequence[int], int], Prefix]
#: makes an empty cache for a text of so many tokens, and says how many of them to read at once
Memory = Callable[[int], tuple[Any, int]]


def cut(ids: Sequence[int], room: int, how: str) -> list[int]:
    """Return ids within ``room``: without their middle, without their beginning, or refused ("never": as they are).

    Raises:
        ValueError: too long, and nothing may be left out.

    >>> cut(range(10), 4, "middle"), cut(range(10), 4, "left"), cut(range(3), 4, "error")
    ([0, 1, 8, 9], [6, 7, 8, 9], [0, 1, 2])
    """
    if len(ids) <= room or how == "never":
        return list(ids)
    if how == "error":
        raise ValueError(f"the prompt has {len(ids):,} tokens, {room:,} are allowed: allow more, or truncate")
    if how == "left":
        return list(ids[len(ids) - room :])
    head = room // 2
    return [*ids[:head], *ids[len(ids) - (room - head) :]]


@dataclass
class LocalAnswerer:
    """Answers with a model of this machine.

    Raises:
        ValueError: a chat prompt for a model without a chat template.
    """

    loaded: LoadedModel
    max_length: int = 0
    """longest prompt in tokens, the chat frame included; 0 = what the model was trained for"""
    reader: Reader | None = None
    """how all but the last token of a prompt are read; None = full attention"""
    running: Callable[[], AbstractContextManager[Any]] = nullcontext
    """the context in which the reader's caches work"""
    label: str = "full"
    memory: Memory | None = None
    """what losses of a text are taken through; None = full attention"""
    name: str = field(init=False)
    tokenizer: Any = field(init=False)
    _kept: tuple[int, Prefix] | None = field(default=None, init=False, repr=False)
    """the beginning that was read last for several prompts, and how far they reach"""

    def __post_init__(self) -> None:
        """Take the name and the tokeniser from the model."""
        self.name, self.tokenizer = f"{self.loaded.name}, {self.label}", self.loaded.tokenizer

    def prompt_ids(self, example: Example) -> tuple[list[int], int]:
        """Return the ids of an example's prompt, framed and cut to size, and how many were left out."""
        head, tail = chat_frame(self.tokenizer) if example.chat else (begin_ids(self.tokenizer), [])
        body = list(example.ids) if example.ids is not None else encode(self.tokenizer, example.prompt)
        room = (self.max_length or self.loaded.trained_length) - len(head) - len(tail)
        kept = cut(body, room, example.truncate)
        return [*head, *kept, *tail], len(body) - len(kept)

    def generate(self, example: Example) -> Answer:
        """Return the greedy answer to one example."""
        ids, left_out = self.prompt_ids(example)
        begun = time.perf_counter()
        shared = example.shared if left_out == 0 else None
        body = len(example.ids) if shared and example.ids is not None else len(ids)
        reach = len(ids) - body + shared.reach if shared else len(ids) + example.max_new_tokens
        with self.running(), steady(self.loaded.model, reach):
            prefix = self._read(ids, self._before(example) + shared.tokens if shared else 0, reach)
            read = time.perf_counter() - begun
            pieces, text = stream(self.loaded, ids, Decoding(example.max_new_tokens), prefix=prefix), ""
            for piece in pieces:
                text += piece
                if example.stop_at_newline and "\n" in text:
                    text = text[: text.index("\n")]
                    break
                if example.enough and re.search(example.enough, text):
                    break
        facts = {"read_seconds": read} if shared else {}
        return Answer(text, len(ids), left_out, time.perf_counter() - begun, facts)

    def _before(self, example: Example) -> int:
        """Return how many tokens stand before an example's own."""
        return len(chat_frame(self.tokenizer)[0] if example.chat else begin_ids(self.tokenizer))

    def _read(self, ids: Sequence[int], shared: int, reach: int) -> Prefix | None:
        """Return what is read ahead of a prompt: what the last one shared with it, all but its end, or nothing."""
        if not shared:
            return self.reader(ids[:-1], reach) if self.reader and len(ids) > 1 else None
        if self._kept is None or self._kept[0] != reach or self._kept[1].ids != tuple(ids[:shared]):
            self._kept = None  # let go of one cache before the next is made
            begin = ids[:shared]
            self._kept = reach, self.reader(begin, reach) if self.reader else prefill(self.loaded, begin)
        return self._kept[1]

    def option_scores(self, example: Example, options: Sequence[str]) -> list[float]:
        """Return the log-likelihood of each option after the prompt, which is read once (as ``reader`` reads it).

        Options of one token cost nothing more; longer ones go on from a fork of what was read.

        Raises:
            ValueError: an option without tokens, or an empty prompt.
        """
        ids, _ = self.prompt_ids(example)
        words = [encode(self.tokenizer, option) for option in options]
        if not all(words) or not ids:
            raise ValueError(f"{example.name}: the prompt or one of the options {list(options)} has no tokens")
        longest = max(map(len, words))
        with self.running(), steady(self.loaded.model, len(ids) + longest), torch.inference_mode():
            prefix = None
            if len(ids) > 1:
                prefix = self.reader(ids[:-1], len(ids) + longest) if self.reader else prefill(self.loaded, ids[:-1])
            done = len(prefix.ids) if prefix else 0
            cache = prefix.cache if prefix else GrowingCache(self.loaded.model.config)
            cache = cache.fork(len(ids) + longest)
            first = self._logits(ids[done:], cache, done)[-1].float().log_softmax(-1)
            scores = first[[tokens[0] for tokens in words]].tolist()
            for index, tokens in enumerate(words):
                if len(tokens) > 1:
                    rows = self._logits(tokens[:-1], cache.fork(len(ids) + longest), len(ids)).float().log_softmax(-1)
                    scores[index] += float(rows.gather(1, self._column(tokens[1:])).sum())
        return [float(score) for score in scores]

    def token_losses(self, ids: Sequence[int], first: int) -> list[float]:
        """Return the negative log-likelihood of each token from index ``first`` on, given all before it.

        Through a compressed memory, tokens of one chunk see each other as they are and what came before as it was kept.

        Raises:
            ValueError: ``first`` is below 1 or beyond the text.
            NotImplementedError: prompts are read by a ``reader``, but there is no ``memory`` that says how texts are.
        """
        if not 1 <= first < len(ids):
            raise ValueError(f"first must lie between 1 and {len(ids) - 1}, got {first}")
        if self.reader is not None and self.memory is None:
            raise NotImplementedError(
                f"{self.name}: how prompts are read is known, how losses of a text are taken is not"
            )
        with self.running(), steady(self.loaded.model, len(ids)), torch.inference_mode():
            plain = GrowingCache(self.loaded.model.config, capacity=len(ids)), _CHUNK
            cache, chunk = self.memory(len(ids)) if self.memory else plain
            losses: list[float] = []
            for begin in range(0, len(ids) - 1, chunk):
                part = list(ids[begin : begin + chunk])
                logits = self._logits(part, cache, begin)
                targets = list(ids[max(first, begin + 1) : begin + len(part) + 1])
                if targets:  # of the last token of a text nothing is known
                    end = min(len(part), len(ids) - 1 - begin)
                    rows = logits[end - len(targets) : end].float()
                    target = self._column(targets)[:, 0]
                    losses += torch.nn.functional.cross_entropy(rows, target, reduction="none").tolist()
        return losses

    def _logits(self, ids: Sequence[int], cache: Any, start: int) -> torch.Tensor:
        """Return the logits [n, vocabulary] after each of ``ids``, which stand at ``start`` …"""
        tokens = torch.tensor([list(ids)], device=self.loaded.device)
        at = torch.arange(start, start + len(ids), device=self.loaded.device)[None]
        network = self.loaded.model
        return network(input_ids=tokens, position_ids=at, past_key_values=cache, use_cache=True).logits[0]

    def _column(self, ids: Sequence[int]) -> torch.Tensor:
        """Return ids as a column [n, 1] where the model is."""
        return torch.tensor(list(ids), device=self.loaded.device)[:, None]


#: tokens whose logits exist at once while losses are taken
_CHUNK = 512
