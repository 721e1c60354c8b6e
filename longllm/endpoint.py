"""A client of any OpenAI-compatible endpoint: limits, retries and a log of what was used and paid.

``longllm.batch`` sends a file of requests through it and goes on where an interrupted run stopped.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import random
import threading
import time
from collections.abc import Callable, Coroutine, Mapping, Sequence, Set
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import parse_qsl, urlsplit, urlunsplit

from longllm.rate import Limits, Price, Usage, Window
from longllm.replies import EndpointError, Failure, checked, reason, reply_text, status_failure

log = logging.getLogger(__name__)
T = TypeVar("T")

#: settings that some servers or models refuse, and what is sent in their place (None: nothing)
_REPLACED = {"max_tokens": "max_completion_tokens", "response_format": None, "temperature": None, "top_p": None}


def about_tokens(text: str) -> int:
    """Estimate the tokens of a text from its size, rather too high: UTF-8 bytes / 3.

    >>> about_tokens("Call me Ishmael.")
    6
    """
    return -(-len(text.encode()) // 3)


class Endpoint:
    """An OpenAI-compatible server and one of its models.

    All requests of one ``Endpoint`` share its limits, whatever thread or event loop they come from: they run on a
    loop of its own. Close it, or use it in a ``with`` block, when it is no longer needed.

    Args:
        base_url: http or https, with the path before ``/chat/completions`` (which may be there too) and any query.
        model: the name that the server knows the model by.
        api_key: the key; "" takes the environment variable ``key_variable``; servers without keys need neither.
        key_variable: see ``api_key``.
        limits: of speed and patience.
        price: of the tokens, for the log.
        usage_log: file to append a line of JSON to for every answer: time, id, tokens, cost, seconds, attempts.
        count: counts the tokens of a text; ``about_tokens`` unless given.

    Raises:
        ValueError: the address is none, or no model is named.
        ImportError: the package ``openai`` (``longscope[synth]``) is not installed.
    """

    def __init__(
        self,
        base_url: str,
        model: str,
        api_key: str = "",
        *,
        key_variable: str = "OPENAI_API_KEY",
        limits: Limits | None = None,
        price: Price | None = None,
        usage_log: str | os.PathLike[str] = "",
        count: Callable[[str], int] = about_tokens,
    ) -> None:
        """Check the address; nothing is sent yet."""
        parts = urlsplit(base_url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError(f"an endpoint is an http or https address such as http://host:8000/v1, got {base_url!r}")
        if not model:
            raise ValueError("name the model that the endpoint is to use")
        try:
            import openai
        except ImportError as error:
            raise ImportError("calling an endpoint needs the package openai: pip install 'longscope[synth]'") from error
        self._openai = openai
        path = parts.path.rstrip("/").removesuffix("/chat/completions")
        self.url, self.model = urlunsplit((parts.scheme, parts.netloc, path, "", "")), model
        self.limits, self.price, self.usage = limits or Limits(), price or Price(), Usage()
        self._count, self._log = count, Path(usage_log) if usage_log else None
        self._key, self._variable = api_key or os.environ.get(key_variable, ""), key_variable
        self._query = dict(parse_qsl(parts.query))
        self._requests = Window(self.limits.requests_per_minute)
        self._tokens = Window(self.limits.tokens_per_minute)
        self._not_before = 0.0
        self._refused: set[str] = set()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._starting = threading.Lock()

    def __enter__(self) -> Endpoint:
        """Return the endpoint itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close it."""
        self.close()

    async def complete(self, body: Mapping[str, Any], name: str = "") -> dict[str, Any]:
        """Return the chat completion for a request body, tried as often as the limits allow.

        Args:
            body: ``messages`` and settings as the protocol has them; ``model`` is filled in.
            name: id of the request, for the usage log.

        Raises:
            EndpointError: it failed for good; ``errors`` says what each attempt met.
            ValueError: no messages, or a stream was asked for.
        """
        if not body.get("messages") or body.get("stream"):
            raise ValueError("a request needs a list of messages, and no stream")
        return await asyncio.wrap_future(self._submit(self._tried({"model": self.model, **body}, name)))

    def ask(self, messages: str | Sequence[Mapping[str, Any]], **options: Any) -> str:
        """Return the answer to one user message or a list of messages, and wait for it.

        ``options`` are further settings of the request; the temperature is 0 unless given.

        Raises:
            EndpointError: as ``complete``.
        """
        turns = [{"role": "user", "content": messages}] if isinstance(messages, str) else list(messages)
        return reply_text(self.wait(self.complete({"messages": turns, "temperature": 0, **options})))

    def wait(self, work: Coroutine[Any, Any, T]) -> T:
        """Run a coroutine on the endpoint's loop and return its result; Ctrl-C cancels it."""
        future = self._submit(work)
        try:
            return future.result()
        except KeyboardInterrupt:
            future.cancel()
            raise

    def close(self) -> None:
        """End the connections and the loop; the endpoint can be used again, with new ones."""
        with self._starting:
            loop, self._loop = self._loop, None
        if loop is not None:
            asyncio.run_coroutine_threadsafe(self._client.close(), loop).result()
            loop.call_soon_threadsafe(loop.stop)

    def _submit(self, work: Coroutine[Any, Any, T]) -> Any:
        """Start ``work`` on the endpoint's own loop, which is begun on first use; return its future."""
        with self._starting:
            if self._loop is None:
                self._places = asyncio.Semaphore(self.limits.concurrency)
                self._order = asyncio.Lock()
                self._client = self._new_client()
                self._loop = asyncio.new_event_loop()
                threading.Thread(target=_turning, args=(self._loop,), name="endpoint", daemon=True).start()
            return asyncio.run_coroutine_threadsafe(work, self._loop)

    def _new_client(self) -> Any:
        """Return a client of the library; retries are ours, because its own know no budget."""
        host = urlsplit(self.url).hostname or ""
        # A proxy of the environment cannot reach a server on this machine; without https there is nothing to verify
        # (and redirects, which could lead to https elsewhere, are not followed).
        local = self.url.startswith("http:") and (host in ("localhost", "::1") or host.startswith("127."))
        plain: dict[str, Any] = {"trust_env": False, "verify": False, "follow_redirects": False}
        http = self._openai.DefaultAsyncHttpxClient(**plain) if local else None
        # Azure's deployments read the key from a header of another name.
        headers = {"api-key": self._key} if "/deployments" in self.url and self._key else None
        return self._openai.AsyncOpenAI(
            base_url=self.url, api_key=self._key or "none", max_retries=0, timeout=self.limits.timeout,
            default_query=self._query or None, default_headers=headers, http_client=http,
        )  # fmt: skip

    async def _tried(self, body: dict[str, Any], name: str) -> dict[str, Any]:
        """Return the completion for a body after as many attempts as it takes and the limits allow."""
        errors: list[str] = []
        refused: set[str] = set()
        begun = time.monotonic()
        async with self._places:
            while True:
                await self._turn(self._tokens_of(body))
                self.usage = replace(self.usage, attempts=self.usage.attempts + 1)
                sent = _without(body, self._refused | refused)
                try:
                    response = await self._post(sent)
                except Failure as failure:
                    errors.append(str(failure))
                    if setting := _refused_setting(sent, failure):
                        refused.add(setting)
                    else:
                        await self._pause(failure, errors)
                else:
                    # Remembered only now: a request may be refused for other reasons than the guessed one.
                    if refused - self._refused:
                        log.warning("longscope: %s takes no %s: %s", self.url, ", ".join(sorted(refused)), errors[0])
                    self._refused |= refused
                    self._note(name, response, len(errors) + 1, time.monotonic() - begun)
                    return response

    async def _turn(self, tokens: int) -> None:
        """Wait until the budgets allow a request; requests get their turn in order."""
        async with self._order:
            while True:
                now = time.monotonic()
                delays = self._requests.delay(1, now), self._tokens.delay(tokens, now), self._not_before - now
                if max(delays) <= 0:
                    break
                await asyncio.sleep(max(delays))
            self._requests.take(1, now)
            self._tokens.take(tokens, now)

    async def _post(self, body: dict[str, Any]) -> dict[str, Any]:
        """Send a body once; return the completion.

        Raises:
            Failure: whatever went wrong.
        """
        library = self._openai
        try:
            async with asyncio.timeout(self.limits.timeout):
                text = await self._client.post("/chat/completions", cast_to=str, body=body)
        except library.APIStatusError as error:
            raise status_failure(error, self._variable) from error
        except (library.APITimeoutError, TimeoutError) as error:
            raise Failure(f"no answer within {self.limits.timeout:g} s") from error
        except library.APIConnectionError as error:
            raise Failure(f"the connection failed: {reason(error)}") from error
        try:
            response = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise Failure(f"the answer is not JSON: {text[:80]!r}") from error
        return checked(response)

    async def _pause(self, failure: Failure, errors: Sequence[str]) -> None:
        """Wait before the next attempt, if there is one.

        Raises:
            EndpointError: there is none.
        """
        limits, tried = self.limits, len(errors)
        where = f"{self.url}, model {self.model}"
        if not failure.again or tried >= limits.attempts:
            times = f" after {tried} attempts" if tried > 1 else ""
            raise EndpointError(f"{where}: request failed{times}: {failure}", errors, failure.hopeless) from failure
        if failure.wait > limits.patience:
            raise EndpointError(
                f"{where}: the server asks for a pause of {failure.wait:.0f} s, more than the {limits.patience:g} s "
                f"allowed: {failure}", errors, hopeless=True,
            ) from failure  # fmt: skip
        wait = max(failure.wait, min(limits.pause * 2 ** (tried - 1), limits.patience) * random.uniform(0.5, 1.0))
        if failure.status == 429:  # it concerns every request, not only this one
            self._not_before = max(self._not_before, time.monotonic() + wait)
        await asyncio.sleep(wait)

    def _tokens_of(self, body: Mapping[str, Any]) -> int:
        """Return what a request counts against the tokens per minute: its messages and the longest answers."""
        texts = [value for message in body["messages"] for value in message.values() if isinstance(value, str)]
        answer = body.get("max_tokens") or body.get("max_completion_tokens") or 0
        framing = 4 * len(body["messages"]) + 2
        return sum(map(self._count, texts)) + framing + (body.get("n") or 1) * answer

    def _note(self, name: str, response: Mapping[str, Any], attempts: int, seconds: float) -> None:
        """Add an answer to the usage, and to the log."""
        told = response.get("usage") or {}
        prompt, answer = int(told.get("prompt_tokens") or 0), int(told.get("completion_tokens") or 0)
        cost = self.price.of(prompt, answer)
        old = self.usage
        self.usage = replace(
            old, requests=old.requests + 1, prompt_tokens=old.prompt_tokens + prompt,
            completion_tokens=old.completion_tokens + answer, cost=old.cost + cost,
        )  # fmt: skip
        if self._log is not None:
            line = {
                "time": datetime.now(UTC).isoformat(timespec="seconds"), "id": name, "model": self.model,
                "prompt_tokens": prompt, "completion_tokens": answer, "cost": round(cost, 8),
                "seconds": round(seconds, 3), "attempts": attempts,
            }  # fmt: skip
            with self._log.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line, ensure_ascii=False) + "\n")


def _turning(loop: asyncio.AbstractEventLoop) -> None:
    """Run a loop until it is stopped, cancel what is still under way, and close it."""
    loop.run_forever()
    tasks = asyncio.all_tasks(loop)
    for task in tasks:
        task.cancel()
    if tasks:
        loop.run_until_complete(asyncio.wait(tasks))
    loop.close()


def _without(body: Mapping[str, Any], refused: Set[str]) -> dict[str, Any]:
    """Return a body without the settings that the server has refused, or with what stands for them.

    >>> _without({"messages": [], "max_tokens": 9, "top_p": 1}, {"max_tokens", "top_p", "temperature"})
    {'messages': [], 'max_completion_tokens': 9}
    """
    sent = {key: value for key, value in body.items() if key not in refused}
    for key in refused & body.keys():
        if other := _REPLACED[key]:
            sent[other] = body[key]
    return sent


def _refused_setting(sent: Mapping[str, Any], failure: Failure) -> str:
    """Return which of the settings sent a 400 or 422 is about; "" if none.

    The server may name it; else it is taken to be the response format, the setting that is most often unknown.
    """
    setting = failure.field or "response_format"
    return setting if failure.status in (400, 422) and setting in _REPLACED and setting in sent else ""
