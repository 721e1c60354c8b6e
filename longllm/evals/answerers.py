"""A model on this machine as an answerer; how it reads a prompt is a parameter, so that any compressed memory fits."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch

from flashcore.hf import GrowingCache
from longllm.config import Decoding
from longllm.evals.task import Answer, Example
from longllm.generate import Prefix, stream
from longllm.loading import LoadedModel
from longllm.prompts import chat_frame, encode

#: reads the beginning of a prompt into a cache: (ids, how many tokens the whole prompt has) -> what has been read
Reader = Callable[[Sequence[int], int], Prefix]


def cut(ids: Sequence[int], room: int, how: str) -> list[int]:
    """Return ids within ``room``: without their middle, without their beginning, or refused.

    Raises:
        ValueError: too long, and nothing may be left out.

    >>> cut(range(10), 4, "middle"), cut(range(10), 4, "left"), cut(range(3), 4, "error")
    ([0, 1, 8, 9], [6, 7, 8, 9], [0, 1, 2])
    """
    if len(ids) <= room:
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
    name: str = field(init=False)
    tokenizer: Any = field(init=False)

    def __post_init__(self) -> None:
        """Take the name and the tokeniser from the model."""
        self.name, self.tokenizer = f"{self.loaded.name}, {self.label}", self.loaded.tokenizer

    def prompt_ids(self, example: Example) -> tuple[list[int], int]:
        """Return the ids of an example's prompt, framed and cut to size, and how many were left out."""
        head, tail = chat_frame(self.tokenizer) if example.chat else (self._begin(), [])
        body = list(example.ids) if example.ids is not None else encode(self.tokenizer, example.prompt)
        room = (self.max_length or self.loaded.trained_length) - len(head) - len(tail)
        kept = cut(body, room, example.truncate)
        return [*head, *kept, *tail], len(body) - len(kept)

    def generate(self, example: Example) -> Answer:
        """Return the greedy answer to one example."""
        ids, left_out = self.prompt_ids(example)
        begun = time.perf_counter()
        with self.running():
            prefix = self.reader(ids[:-1], len(ids) + example.max_new_tokens) if self.reader and len(ids) > 1 else None
            pieces, text = stream(self.loaded, ids, Decoding(example.max_new_tokens), prefix=prefix), ""
            for piece in pieces:
                text += piece
                if example.stop_at_newline and "\n" in text:
                    text = text[: text.index("\n")]
                    break
        return Answer(text, len(ids), left_out, time.perf_counter() - begun)

    def option_scores(self, example: Example, options: Sequence[str]) -> list[float]:
        """Return the log-likelihood of each option after the prompt, which is read once."""
        ids, _ = self.prompt_ids(example)
        scores = []
        with torch.inference_mode():
            cache = GrowingCache(self.loaded.model.config, capacity=len(ids))
            first = self._log_probabilities(ids, cache)[-1]
            for option in options:
                tokens = encode(self.tokenizer, option)
                if not tokens:
                    raise ValueError(f"the option {option!r} of {example.name} has no tokens")
                rows = [first]
                if len(tokens) > 1:
                    rows += self._log_probabilities(tokens[:-1], cache.fork(len(ids) + len(tokens)), len(ids)).unbind()
                scores.append(sum(float(row[token]) for row, token in zip(rows, tokens, strict=True)))
        return scores

    def token_losses(self, ids: Sequence[int], first: int) -> list[float]:
        """Return the negative log-likelihood of each token from index ``first`` on, given all before it.

        Raises:
            ValueError: ``first`` is below 1 or beyond the text.
        """
        if not 1 <= first < len(ids):
            raise ValueError(f"first must lie between 1 and {len(ids) - 1}, got {first}")
        with torch.inference_mode():
            cache, losses = GrowingCache(self.loaded.model.config, capacity=len(ids)), []
            for begin in range(0, len(ids) - 1, _CHUNK):
                part = list(ids[begin : begin + _CHUNK])
                rows = self._log_probabilities(part, cache, begin)
                for place, row in enumerate(rows, begin + 1):
                    if first <= place < len(ids):
                        losses.append(-float(row[ids[place]]))
        return losses

    def _log_probabilities(self, ids: Sequence[int], cache: Any, start: int = 0) -> torch.Tensor:
        """Return the log-probabilities [n, vocabulary] after each of ``ids``, which stand at ``start`` …"""
        tokens = torch.tensor([list(ids)], device=self.loaded.device)
        at = torch.arange(start, start + len(ids), device=self.loaded.device)[None]
        logits = self.loaded.model(input_ids=tokens, position_ids=at, past_key_values=cache, use_cache=True).logits[0]
        return torch.log_softmax(logits.float(), dim=-1)

    def _begin(self) -> list[int]:
        """Return the token that a text which is no chat begins with, if the model has one."""
        begin = self.tokenizer.bos_token_id
        adds = getattr(self.tokenizer, "add_bos_token", False)
        return [begin] if adds and begin is not None else []


#: tokens whose logits exist at once while losses are taken
_CHUNK = 512
