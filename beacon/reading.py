"""Reading a long text into a compressed cache, chunk by chunk, with the questions in mind if they are known."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Sequence

import torch
from tqdm import tqdm

from beacon.request import RequestCache
from longllm import LoadedModel, Prefix

#: Large, because every chunk is read with all questions and ends with an eviction; the activations of 2,048 tokens
#: are still far smaller than the weights of any model.
CHUNK = 2048


def read(
    loaded: LoadedModel,
    ids: Sequence[int],
    cache: RequestCache,
    *,
    questions: Sequence[Sequence[int]] = (),
    chunk: int = CHUNK,
    progress: bool = False,
    after_chunk: Callable[[RequestCache], None] | None = None,
) -> Prefix:
    """Read ``ids`` into ``cache`` and return both as a prefix that ``longllm.stream`` can go on from.

    A cache that has seen the beginning of ``ids`` already (an interrupted reading) goes on where it stopped. With
    ``questions`` (token ids as they will follow the text), each chunk is read together with them: they attend, a
    steerable method ranks slots by what they attend to, and nothing of them stays. What is kept then serves these
    questions first.

    Args:
        loaded: the model.
        ids: the whole text, as token ids.
        cache: made for this model; one row.
        questions: empty = rank by the text alone.
        chunk: tokens per forward pass; the only part of the text that is ever held beside the budget.
        progress: show a bar on stderr.
        after_chunk: called with the cache after each chunk, for saving on the way.

    Raises:
        ValueError: nothing to read, a chunk below 1, or a cache that has seen more than ``ids``.
    """
    if not ids or chunk < 1:
        raise ValueError(f"need at least one token and a chunk of at least 1, got {len(ids)} and {chunk}")
    start = cache.seen[0] if cache.seen else 0
    if start > len(ids) or len(cache.seen) > 1:
        raise ValueError(
            f"the cache has seen {cache.seen} tokens, the text has {len(ids):,}: they do not belong together"
        )
    cache.expect(len(ids))
    questions = [question for question in questions if question]
    asked = [token for question in questions for token in question]
    begun = time.perf_counter()
    # disable=None: no bar where stderr is not a terminal.
    bar = tqdm(total=len(ids), initial=start, desc="reading", unit="tok", disable=None if progress else True,
               file=sys.stderr, leave=False)  # fmt: skip
    running = cache.method.running(loaded.model) if cache.method else contextlib.nullcontext()
    with bar, running, torch.inference_mode():
        for begin in range(start, len(ids), chunk):
            part = ids[begin : begin + chunk]
            cache.probes = tuple(map(len, questions))
            tokens = torch.tensor([[*part, *asked]], device=loaded.device)
            loaded.model(input_ids=tokens, past_key_values=cache, logits_to_keep=1)
            bar.update(len(part))
            if after_chunk is not None:
                after_chunk(cache)
    return Prefix(tuple(ids), cache, time.perf_counter() - begun)
