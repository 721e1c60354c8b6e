"""Read a prompt in chunks, then generate token by token, streaming text and keeping exact figures."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from tqdm import tqdm

from flashcore.hf import GrowingCache, cache_bytes
from longllm.config import Decoding
from longllm.loading import LoadedModel

# Tokens per forward pass while a prompt is read: large enough to fill the matrix units, small enough that
# the activations of a chunk stay well below the weights.
CHUNK = 1024


@dataclass(frozen=True)
class Prefix:
    """The beginning of prompts, read once: its tokens, its cache, and how long reading took."""

    ids: tuple[int, ...]
    cache: Any
    """a transformers cache that can ``fork(capacity)``, so that each prompt goes on from a copy"""
    seconds: float


@dataclass(frozen=True)
class Result:
    """What one generation did."""

    text: str
    tokens_seen: int
    """tokens of the prompt"""
    new_tokens: int
    """tokens of the answer, the stop token not counted"""
    stopped: bool
    """whether the model ended the answer itself, rather than reaching max_new_tokens"""
    prefill_seconds: float
    """reading the prompt (or what came after a prefix that had been read before)"""
    time_to_first_token: float
    """seconds from the call to the first token"""
    tokens_per_second: float | None
    """speed after the first token; None if there was only one"""
    seconds: float
    """the whole generation"""
    kv_bytes: int
    """memory of the keys and values once the prompt had been read"""


class Stream(Iterator[str]):
    """An answer in the making: iterate over its pieces of text, then read ``result``."""

    def __init__(self, pieces: Generator[str, None, Result]) -> None:
        """Wrap a generator that yields text and returns the result."""
        self._pieces = pieces
        self._result: Result | None = None

    def __next__(self) -> str:
        """Return the next piece of text."""
        try:
            return next(self._pieces)
        except StopIteration as end:
            self._result = end.value or self._result
            raise StopIteration from None

    @property
    def result(self) -> Result:
        """Return the figures; what has not been generated yet is generated first."""
        for _ in self:
            pass
        if self._result is None:
            raise ValueError("the stream ended early, so it has no result")
        return self._result


def prefill(
    loaded: LoadedModel,
    ids: Sequence[int],
    *,
    chunk: int = CHUNK,
    progress: bool = False,
    after_chunk: Callable[[int], None] | None = None,
) -> Prefix:
    """Read the beginning of a prompt, for several prompts that share it (see ``stream``).

    ``after_chunk`` is told how many tokens have been read.

    Raises:
        ValueError: there is nothing to read, or ``chunk`` is below 1.
    """
    begun = time.perf_counter()
    cache = GrowingCache(loaded.model.config, capacity=len(ids))
    _read(loaded, ids, 0, cache, chunk, progress, after_chunk)
    return Prefix(tuple(ids), cache, time.perf_counter() - begun)


def stream(
    loaded: LoadedModel,
    prompt_ids: Sequence[int],
    decoding: Decoding | None = None,
    *,
    prefix: Prefix | None = None,
    chunk: int = CHUNK,
    progress: bool = False,
) -> Stream:
    """Generate an answer to a prompt as a stream of text pieces.

    The prompt is read ``chunk`` tokens at a time, with a progress bar on stderr if ``progress``. A ``prefix`` that
    was read before is copied, not changed, so that any number of prompts can follow it.

    Raises:
        ValueError: an empty prompt, one that does not begin with (and go beyond) the prefix, or a chunk below 1.
    """
    ids = tuple(prompt_ids)
    if prefix is not None and (ids[: len(prefix.ids)] != prefix.ids or len(ids) == len(prefix.ids)):
        raise ValueError(
            f"the prompt ({len(ids)} tokens) does not begin with the prefix ({len(prefix.ids)} tokens) and go on"
        )
    if not ids or chunk < 1:
        raise ValueError(f"need at least one token and a chunk of at least 1, got {len(ids)} and {chunk}")

    def opened() -> Any:
        return prefix.cache.fork(len(ids)) if prefix else GrowingCache(loaded.model.config, capacity=len(ids))

    done = len(prefix.ids) if prefix else 0
    return Stream(_generate(loaded, ids, done, opened, decoding or Decoding(), chunk, progress))


def resume(
    loaded: LoadedModel,
    ids: Sequence[int],
    cache: Any,
    done: int,
    decoding: Decoding | None = None,
    *,
    chosen: list[int] | None = None,
    halted: Callable[[], bool] = bool,
    chunk: int = CHUNK,
    progress: bool = False,
) -> Stream:
    """Generate after ``ids``, of which a cache holds the first ``done`` already; the cache itself grows.

    Args:
        loaded: the model.
        ids: everything so far.
        cache: a transformers cache.
        done: how many of ``ids`` it holds; at least the last one is still to be read.
        decoding: how tokens are chosen.
        chosen: gets the tokens of the answer as they are chosen, the stop token left out.
        halted: asked between chunks and between tokens; once it says True, an answer that has begun ends, and
            reading raises InterruptedError.
        chunk: tokens read at once.
        progress: show a bar on stderr while reading.

    Raises:
        ValueError: nothing is left to read, or a chunk below 1.
    """
    if not 0 <= done < len(ids) or chunk < 1:
        raise ValueError(
            f"need at least one unread token and a chunk of at least 1, got {done} of {len(ids)} and {chunk}"
        )
    settings = decoding or Decoding()
    return Stream(_generate(loaded, tuple(ids), done, lambda: cache, settings, chunk, progress, chosen, halted))


def read_on(
    loaded: LoadedModel,
    ids: Sequence[int],
    cache: Any,
    done: int,
    *,
    halted: Callable[[], bool] = bool,
    chunk: int = CHUNK,
    progress: bool = False,
) -> None:
    """Read what a cache does not hold yet of ``ids`` into it (see ``resume``)."""
    _read(loaded, ids[done:], done, cache, chunk, progress, _heeding(halted))


def text_pieces(decode: Callable[[list[int]], str], ids: Iterator[int]) -> Iterator[str]:
    """Yield the text of ``ids`` piece by piece, holding back characters whose bytes are not all there yet.

    The pieces joined are ``decode`` of all ids. Only the last few tokens are decoded again for each new one.

    >>> "".join(text_pieces(lambda ids: bytes(ids).decode(errors="replace"), iter("né".encode())))
    'né'
    """
    window: list[int] = []
    shown = ""
    fresh = 0  # where in the window the tokens begin that no piece has covered
    for token in ids:
        window.append(token)
        text = decode(window)
        if len(text) > len(shown) and not text.endswith("\ufffd"):
            yield text[len(shown) :]
            # The last shown tokens stay as context: some tokenisers drop the space before a first token.
            window = window[fresh:]
            shown = decode(window)
            fresh = len(window)
    if tail := decode(window)[len(shown) :]:
        yield tail


def _generate(
    loaded: LoadedModel,
    ids: tuple[int, ...],
    done: int,
    opened: Callable[[], Any],
    decoding: Decoding,
    chunk: int,
    progress: bool,
    chosen: list[int] | None = None,
    halted: Callable[[], bool] = bool,
) -> Generator[str, None, Result]:
    """Yield the pieces of an answer; return its figures. ``opened`` gives a cache of the first ``done`` tokens."""
    begun = time.perf_counter()
    with torch.inference_mode():
        cache = opened()
    logits = _read(loaded, ids[done:], done, cache, chunk, progress, _heeding(halted))
    held = cache_bytes(cache)
    prefilled = time.perf_counter()
    times: list[float] = []
    stopped = False

    def tokens() -> Iterator[int]:
        nonlocal stopped
        row = logits
        draws = torch.Generator(device=row.device).manual_seed(decoding.seed)
        for count in range(decoding.max_new_tokens):
            token = _choose(row, decoding.temperature, draws)
            times.append(time.perf_counter())
            if token in loaded.stop_ids:
                stopped = True
                return
            if chosen is not None:
                chosen.append(token)
            yield token
            if halted():
                return
            if count + 1 < decoding.max_new_tokens:
                row = _forward(loaded, [token], len(ids) + count, cache)

    text = ""
    for piece in text_pieces(lambda part: _decode(loaded, part), tokens()):
        text += piece
        yield piece
    span = times[-1] - times[0]
    return Result(
        text=text,
        tokens_seen=len(ids),
        new_tokens=len(times) - stopped,
        stopped=stopped,
        prefill_seconds=prefilled - begun,
        time_to_first_token=times[0] - begun,
        tokens_per_second=(len(times) - 1) / span if len(times) > 1 else None,
        seconds=times[-1] - begun,
        kv_bytes=held,
    )


def _heeding(halted: Callable[[], bool]) -> Callable[[int], None]:
    """Return what to call after each chunk so that reading stops when it is told to."""

    def heed(_: int) -> None:
        if halted():
            raise InterruptedError("stopped while reading")

    return heed


def _read(
    loaded: LoadedModel,
    ids: Sequence[int],
    start: int,
    cache: Any,
    chunk: int,
    progress: bool,
    after_chunk: Callable[[int], None] | None = None,
) -> torch.Tensor:
    """Run ``ids``, whose first position is ``start``, through the model; return the last logits [vocab]."""
    if not ids or chunk < 1:
        raise ValueError(f"need at least one token and a chunk of at least 1, got {len(ids)} and {chunk}")
    # disable=None: no bar where stderr is not a terminal.
    bar = tqdm(
        total=len(ids), desc="reading", unit="tok", disable=None if progress else True, file=sys.stderr, leave=False
    )
    with bar:
        for begin in range(0, len(ids), chunk):
            part = ids[begin : begin + chunk]
            logits = _forward(loaded, part, start + begin, cache)
            bar.update(len(part))
            if after_chunk is not None:
                after_chunk(begin + len(part))
    return logits


@torch.inference_mode()
def _forward(loaded: LoadedModel, ids: Sequence[int], start: int, cache: Any) -> torch.Tensor:
    """Run ``ids`` at positions ``start``…, adding to the cache; return the logits [vocab] after the last."""
    tokens = torch.tensor([list(ids)], device=loaded.device)
    # Explicit: transformers would otherwise take the cache's length, wrong as soon as a cache drops anything.
    positions = torch.arange(start, start + len(ids), device=loaded.device).unsqueeze(0)
    output = loaded.model(
        input_ids=tokens, position_ids=positions, past_key_values=cache, use_cache=True, logits_to_keep=1
    )
    return output.logits[0, -1].float()


def _choose(logits: torch.Tensor, temperature: float, draws: torch.Generator) -> int:
    """Return the likeliest token, or a drawn one if the temperature is above 0."""
    if temperature == 0:
        return int(logits.argmax())
    return int(torch.multinomial(torch.softmax(logits / temperature, dim=-1), 1, generator=draws))


def _decode(loaded: LoadedModel, ids: list[int]) -> str:
    """Return the text of ``ids`` as it is: no special tokens, no spaces tidied up."""
    decoded = loaded.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    return decoded if isinstance(decoded, str) else "".join(decoded)
