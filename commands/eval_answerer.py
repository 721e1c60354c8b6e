"""Who answers an evaluation, from the words of a command line: a model, one with compressed memory, or an endpoint."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from commands.ask_plan import DEFAULT_METHOD, MethodName, PositionsName, Wish, decide
from longllm.config import DType

if TYPE_CHECKING:
    from longllm import LoadedModel, Prefix
    from longllm.evals.answerers import LocalAnswerer
    from longllm.evals.task import Answerer

log = logging.getLogger(__name__)

#: last tokens of a prompt that are read uncompressed and choose what is kept
QUESTION_TOKENS = 64


@dataclass(frozen=True)
class AnswererChoice:
    """Who answers. A command takes these options as ``**answerer`` and passes them on: ``AnswererChoice(**answerer)``.

    Raises:
        ValueError: options that do not go together, or one out of range.

    >>> AnswererChoice(method="snapkv", ratio=8).label
    'snapkv, ratio 8'
    """

    model: str = "smollm2-135m-instruct"
    """a name from ``longscope models``, a folder in Hugging Face layout, or the folder of an adapter"""
    dtype: DType = "auto"
    """what to compute in; auto is bf16 where the hardware is fast at it, else fp32"""
    method: MethodName = "full"
    """how the KV cache is compressed; auto compresses only what is longer than the model was trained for"""
    ratio: float = 0.0
    """keep one slot per so many tokens (one of ratio, slots and budget)"""
    slots: int = 0
    """keep so many slots per layer"""
    budget: str = ""
    """keep so many bytes in all, such as 64MB"""
    positions: PositionsName = "auto"
    """places of the kept keys: original, or compact; auto is compact beyond the trained length"""
    beacons: str = ""
    """folder of trained beacons for method beacon; empty = those that come with the model"""
    rope: str = ""
    """stretch the positions without training: yarn:4, dynamic:4, linear:4, or theta:2500000 for another base"""
    max_length: int = 0
    """longest prompt in tokens; 0 = what the model was trained for"""
    endpoint: str = ""
    """address of an OpenAI-compatible server, such as http://127.0.0.1:8000/v1, that answers instead of a model here"""
    endpoint_model: str = ""
    """name of the model at the endpoint"""
    tokenizer: str = ""
    """a model (catalog name or folder) whose tokeniser counts lengths for an endpoint"""

    def __post_init__(self) -> None:
        """Refuse contradictions before a model is loaded."""
        limit = self.wish.limit
        if self.method == "retrieve":
            raise ValueError("method retrieve searches for the words of a question; prompts of an evaluation have none")
        if self.max_length < 0:
            raise ValueError(f"max_length must be 0 (what the model was trained for) or more, got {self.max_length}")
        if bool(self.endpoint) != bool(self.endpoint_model):
            raise ValueError("endpoint and endpoint_model go together: the server's address and its model's name")
        if self.endpoint and (self.method != "full" or limit is not None or self.rope):
            raise ValueError("an endpoint reads as its server does: leave method, ratio, slots, budget and rope out")
        if self.beacons and self.method != "beacon":
            raise ValueError(f"beacons ({self.beacons}) are for method beacon, got {self.method}")
        if self.tokenizer and not self.endpoint:
            raise ValueError("tokenizer is for an endpoint; a model on this machine brings its own")

    @property
    def wish(self) -> Wish:
        """Return how prompts are to be read."""
        return Wish(self.method, self.ratio, self.slots, self.budget, self.positions)

    @property
    def label(self) -> str:
        """Return how prompts are read, in words."""
        limit, positions = self.wish.limit, "" if self.positions == "auto" else self.positions
        how = [self.method] if self.method == "full" else [self.method, str(limit or ""), positions]
        return ", ".join(filter(None, [*how, self.rope]))

    @property
    def settings(self) -> dict[str, Any]:
        """Return what distinguishes runs beside the answerer's name, for the first line of a results file."""
        more = {name: getattr(self, name) for name in ("rope", "beacons") if getattr(self, name)}
        return {"dtype": self.dtype, "max_length": self.max_length, **more}


def build(choice: AnswererChoice, reach: int = 0) -> Answerer:
    """Return the answerer that a command line asks for; a local model is loaded.

    Args:
        choice: the options.
        reach: longest text that will be read, which positions stretched by ``rope`` are to hold; 0 = max_length.

    Raises:
        ValueError, OSError: as ``longllm.load``.
    """
    import longllm

    if choice.endpoint:
        from longllm.endpoint import Endpoint
        from longllm.evals.endpoint import EndpointAnswerer

        counting = _counting(choice.tokenizer) if choice.tokenizer else None
        return EndpointAnswerer(Endpoint(choice.endpoint, choice.endpoint_model), counting, choice.max_length)
    from longllm.loading import worded_context

    length = max(reach, choice.max_length) if choice.rope else 0
    context = worded_context(choice.rope, length, choice.model)
    return local(longllm.load(choice.model, dtype=choice.dtype, context=context), choice)


def local(loaded: LoadedModel, choice: AnswererChoice) -> LocalAnswerer:
    """Return the answerer of a loaded model, which may serve several choices."""
    from longllm.evals.answerers import LocalAnswerer

    if choice.method == "full":
        return LocalAnswerer(loaded, choice.max_length, label=choice.label)
    if choice.beacons:
        from beacon import use_beacons

        use_beacons(loaded.model, choice.beacons)
    reading = CompressedReading(loaded, choice)
    return LocalAnswerer(loaded, choice.max_length, reading, reading.running, label=choice.label, memory=reading.memory)


def _counting(name: str) -> Any:
    """Return the tokeniser of a model of the catalog, of a folder or of an adapter."""
    from longllm.loading import parts, tokenizer_of

    _, folder, adapter = parts(name)
    return tokenizer_of(folder, adapter)


class CompressedReading:
    """Reads prompts into a compressed cache; their last tokens, the question among them, stay as they are.

    Where the question begins is the task's knowledge, not the answerer's: a fixed number of last tokens stands for it.
    They choose what is kept (methods that look at a question) and are read after the rest.
    """

    def __init__(self, loaded: LoadedModel, choice: AnswererChoice) -> None:
        self.loaded, self.choice = loaded, choice
        #: what has kept the compression contract with this model, and need not show it again
        self.verified: set[tuple[str, str]] = set()

    def __call__(self, ids: Sequence[int], expected: int) -> Prefix:
        """Read the beginning of a prompt, all but its last token, as planned for ``expected`` tokens."""
        import longllm
        from commands.reading import read_text

        plan = decide(self.choice.wish, expected, self.loaded.trained_length)
        if plan.method == "full":
            return longllm.prefill(self.loaded, ids)
        self._examine(plan.method, plan.positions, ids)
        # The prompt's last token is not among ``ids``. A prompt that is all question is read as a text.
        asked = QUESTION_TOKENS - 1 if len(ids) >= 2 * QUESTION_TOKENS else 0
        body, question = tuple(ids[: len(ids) - asked]), list(ids[len(ids) - asked :])
        return read_text(self.loaded, body, plan, [question] if question else [], None, {}, expected).prefix

    def running(self) -> AbstractContextManager[Any]:
        """Return the context in which the model can use the caches."""
        import beacon

        method = DEFAULT_METHOD if self.choice.method == "auto" else self.choice.method
        return beacon.method(method).running(self.loaded.model)

    def memory(self, tokens: int) -> tuple[Any, int]:
        """Return an empty cache for a text of so many tokens, and how many of them to read at once."""
        import beacon
        from flashcore.hf import GrowingCache

        plan = decide(self.choice.wish, tokens, self.loaded.trained_length)
        most = min(_LOSSES, max(1, self.loaded.trained_length // 4))
        if plan.method == "full":
            return GrowingCache(self.loaded.model.config, capacity=tokens), most
        method = beacon.method(plan.method)
        cache = method.new_cache(self.loaded.model, plan.limit, positions=plan.positions, expected=tokens)
        return cache, method.chunk(most)

    def _examine(self, name: str, positions: Any, ids: Sequence[int]) -> None:
        """Before a method's first reading, check its contract and say what should be known about it."""
        import beacon

        if (name, positions) in self.verified:
            return
        method = beacon.method(name)
        if warning := method.warning(self.loaded.model):
            log.warning("longscope: %s", warning)
        if method.verified(self.loaded.model, ids, positions):
            self.verified.add((name, positions))


#: tokens whose logits exist at once while losses are taken through a compressed memory
_LOSSES = 512
