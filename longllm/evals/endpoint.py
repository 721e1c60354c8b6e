"""An OpenAI-compatible server as an answerer: any model behind one is evaluated by the same tasks."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NoReturn

from longllm.evals.answerers import cut
from longllm.evals.task import Answer, Example
from longllm.prompts import encode
from longllm.replies import reply_text

if TYPE_CHECKING:
    from longllm.endpoint import Endpoint


class EndpointAnswerer:
    """Answers with a model behind an endpoint; the server puts on the chat template, and stops as it does.

    Every prompt is sent as a user's turn, those of few-shot and code tasks too: the protocol of chat completions knows
    no other. Prompts are cut where a tokeniser and a longest length are given, else the server says what it thinks of
    a prompt that is too long.

    Args:
        endpoint: the server.
        tokenizer: counts lengths; None = tasks that need exact lengths cannot be run.
        max_length: longest prompt in tokens, without the server's chat template; 0 = no limit here.

    Raises:
        ValueError: a longest length without a tokeniser to count it.
    """

    def __init__(self, endpoint: Endpoint, tokenizer: Any = None, max_length: int = 0) -> None:
        if max_length and tokenizer is None:
            raise ValueError("max_length counts tokens: name the model's tokeniser as well (--tokenizer)")
        self.endpoint, self.tokenizer, self.max_length = endpoint, tokenizer, max_length
        self.name = f"{endpoint.model} at {endpoint.url}"

    def generate(self, example: Example) -> Answer:
        """Return the answer to one example, at temperature 0.

        Raises:
            ValueError: a prompt that is too long and may not be cut, or one given as ids without a tokeniser.
            EndpointError: the server failed for good.
        """
        prompt, left_out = self._prompt(example)
        body: dict[str, Any] = {
            "messages": [{"role": "user", "content": prompt}],
            "max_tokens": example.max_new_tokens,
            "temperature": 0,
        }
        if example.stop_at_newline:
            body["stop"] = ["\n"]
        begun = time.perf_counter()
        reply = self.endpoint.wait(self.endpoint.complete(body, example.name))
        text = reply_text(reply)
        if example.stop_at_newline:  # a server may keep the stop, or not know the setting
            text = text.partition("\n")[0]
        used = reply.get("usage") or {}
        facts = {"new_tokens": used["completion_tokens"]} if "completion_tokens" in used else {}
        seen = int(used.get("prompt_tokens") or 0)
        return Answer(text, seen, left_out, time.perf_counter() - begun, facts)

    def option_scores(self, example: Example, options: Sequence[str]) -> NoReturn:
        """Refuse.

        Raises:
            NotImplementedError: always: the protocol shows the likelihoods of what the model wrote, not of options.
        """
        raise NotImplementedError(f"{self.name} shows no likelihoods of given options: use a model on this machine")

    def token_losses(self, ids: Sequence[int], first: int) -> NoReturn:
        """Refuse.

        Raises:
            NotImplementedError: always: the protocol shows no likelihoods of a prompt.
        """
        raise NotImplementedError(f"{self.name} shows no likelihoods of a given text: use a model on this machine")

    def _prompt(self, example: Example) -> tuple[str, int]:
        """Return the text to send, and how many tokens were left out of it."""
        if self.tokenizer is None:
            if example.ids is not None and not example.prompt:
                raise ValueError(f"{example.name} is given as token ids: name the model's tokeniser (--tokenizer)")
            return example.prompt, 0
        ids = list(example.ids) if example.ids is not None else encode(self.tokenizer, example.prompt)
        kept = cut(ids, self.max_length or len(ids), example.truncate)
        if len(kept) == len(ids) and example.prompt:
            return example.prompt, 0
        return self.tokenizer.decode(kept, clean_up_tokenization_spaces=False), len(ids) - len(kept)
