"""A loaded model behind the OpenAI protocol, for this machine alone: chat completions, one at a time.

Small on purpose: for trying a pipeline or an evaluation of endpoints without a server engine. What it cannot do it
refuses with a 400 that names the setting, as the protocol has it.
"""

from __future__ import annotations

import itertools
import json
import logging
import threading
import time
import uuid
from collections.abc import Iterable, Iterator, Mapping, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from longllm.config import Decoding
from longllm.dialogue import dialogue
from longllm.generate import stream
from longllm.loading import LoadedModel
from longllm.prompts import encode

log = logging.getLogger(__name__)

#: settings that change nothing here whatever their value
_IDLE = {"model", "user", "metadata", "store", "stream_options", "custom_id"}
#: settings that are taken if they ask for nothing that is not done anyway
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "n": (None, 1),
    "presence_penalty": (None, 0),
    "frequency_penalty": (None, 0),
    "logprobs": (None, False),
    "response_format": (None, {"type": "text"}),
    "tools": (None, []),
}
_TAKEN = {"messages", "max_tokens", "max_completion_tokens", "temperature", "top_p", "seed", "stop", "stream"}
#: bytes of a request; a million tokens of text are about four million
_LARGEST = 64 * 2**20
_HOSTS = ("127.0.0.1", "localhost")


class Refused(ValueError):
    """A request that cannot be served: the setting at fault, and the status."""

    def __init__(self, message: str, setting: str = "", status: int = 400) -> None:
        super().__init__(message)
        self.setting, self.status = setting, status


class ModelServer:
    """Serves one model on 127.0.0.1; requests wait for one another.

    As a ``with`` block it serves from a thread of its own until the block ends.

    Raises:
        OSError: the port is taken.
    """

    def __init__(self, loaded: LoadedModel, *, port: int = 0, max_new_tokens: int = 512) -> None:
        """Take a port (0 = any free one); answers have ``max_new_tokens`` unless a request says otherwise."""
        self.loaded, self.max_new_tokens, self.answers = loaded, max_new_tokens, 0
        claimed = int(loaded.model.config.get_text_config(decoder=True).max_position_embeddings)
        self.longest = max(claimed, loaded.trained_length)
        self._one = threading.Lock()
        handler = type("Handler", (_Handler,), {"owner": self})
        try:
            self._http = ThreadingHTTPServer(("127.0.0.1", port), handler)
        except OSError as error:
            raise OSError(f"cannot serve on port {port} ({error.strerror}): choose another, or 0 for any") from error
        self._http.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._http.server_address[1]}/v1"

    def __enter__(self) -> ModelServer:
        """Serve from a thread."""
        threading.Thread(target=self.serve, name="serve", daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        """Stop serving."""
        self._http.shutdown()
        self.close()

    def serve(self) -> None:
        """Serve until the server is shut down or Ctrl-C."""
        self._http.serve_forever(poll_interval=0.1)

    def close(self) -> None:
        """Give the port back."""
        self._http.server_close()

    def completion(self, body: Mapping[str, Any]) -> dict[str, Any]:
        """Return the chat completion that a request body asks for.

        Raises:
            Refused: saying which setting cannot be served.
        """
        *_, last = events = list(self.events(body))
        text = "".join(event["choices"][0]["delta"].get("content", "") for event in events)
        choice = {"index": 0, "message": {"role": "assistant", "content": text}}
        choice["finish_reason"] = last["choices"][0]["finish_reason"]
        return {**last, "object": "chat.completion", "choices": [choice]}

    def events(self, body: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
        """Yield the completion in pieces; the last says how it ended and what it used.

        Raises:
            Refused: before anything is yielded.
        """
        ids, decoding, stops = self.request(body)
        head = {"id": f"chatcmpl-{uuid.uuid4().hex}", "object": "chat.completion.chunk", "created": int(time.time())}
        head["model"] = self.loaded.name
        yield {**head, "choices": [_delta({"role": "assistant", "content": ""})]}
        with self._one:
            pieces, made = stream(self.loaded, ids, decoding), 0
            for text in until(pieces, stops):
                made += len(encode(self.loaded.tokenizer, text))
                yield {**head, "choices": [_delta({"content": text})]}
            # An answer that a stop text ended has no figures of its own: its tokens are those of its text.
            ended = next(pieces, None) is not None or any(stop in pieces.result.text for stop in stops)
            if not ended:
                made, ended = pieces.result.new_tokens, pieces.result.stopped
        self.answers += 1
        used = {"prompt_tokens": len(ids), "completion_tokens": made, "total_tokens": len(ids) + made}
        finish = "stop" if ended else "length"
        yield {**head, "choices": [_delta({}, finish)], "usage": used}

    def request(self, body: Mapping[str, Any]) -> tuple[list[int], Decoding, tuple[str, ...]]:
        """Return prompt ids, decoding and stop texts of a request body.

        Raises:
            Refused: saying which setting cannot be served.
        """
        for name, value in body.items():
            if name in _NEUTRAL and value not in _NEUTRAL[name]:
                raise Refused(f"{name}={json.dumps(value)[:60]} is not supported by this server", name)
            if name not in _TAKEN | _IDLE | set(_NEUTRAL):
                raise Refused(f"unknown setting {name!r}", name)
        temperature = body.get("temperature")
        temperature = 0.0 if temperature is None else temperature
        if temperature != 0 and body.get("top_p") not in (None, 1):
            raise Refused("top_p other than 1 is not supported by this server", "top_p")
        told = [body[key] for key in ("max_completion_tokens", "max_tokens") if body.get(key) is not None]
        stops = body.get("stop") or []
        stops = [stops] if isinstance(stops, str) else stops
        if not isinstance(stops, list) or not all(isinstance(text, str) and text for text in stops):
            raise Refused("stop must be a text or a list of texts", "stop")
        ids = conversation_ids(self.loaded.tokenizer, body.get("messages"))
        room = self.longest - len(ids)
        if room < 1:
            limit = f"the messages have {len(ids):,} tokens, the model takes {self.longest:,} with the answer"
            raise Refused(limit, "messages")
        try:
            wanted = int(told[0]) if told else self.max_new_tokens
            decoding = Decoding(min(wanted, room), float(temperature), int(body.get("seed") or 0))
        except (ValueError, TypeError, OverflowError) as error:
            raise Refused(str(error)) from error
        return ids, decoding, tuple(stops)


def until(pieces: Iterable[str], stops: Sequence[str]) -> Iterator[str]:
    """Yield pieces of text up to the first of the stop texts, holding back what may be the beginning of one.

    >>> list(until(["one ", "two E", "N", "D three"], ["END"]))
    ['one ', 'two ']
    >>> list(until(["one E", "N"], ["END"]))
    ['one ', 'EN']
    """
    held = ""
    for piece in pieces:
        held += piece
        places = [held.index(stop) for stop in stops if stop in held]
        if places:
            held = held[: min(places)]
            break
        most = min(len(held), max(map(len, stops), default=1) - 1)
        maybe = next((n for n in range(most, 0, -1) if any(stop.startswith(held[-n:]) for stop in stops)), 0)
        ready = held[: len(held) - maybe]
        if ready:
            yield ready
        held = held[len(ready) :]
    if held:
        yield held


def conversation_ids(tokenizer: Any, messages: Any) -> list[int]:
    """Return the ids of a conversation that the assistant is to go on with.

    Raises:
        Refused: messages that are not: a system message or none, then the user and the assistant in turn.
    """
    texts = []
    for place, message in enumerate(messages if isinstance(messages, list) else []):
        content = message.get("content") if isinstance(message, dict) else None
        if isinstance(content, list) and all(isinstance(part, dict) and part.get("type") == "text" for part in content):
            content = "".join(str(part.get("text", "")) for part in content)
        if not isinstance(content, str):
            raise Refused(f"messages[{place}] must have a role and a content of text", "messages")
        texts.append((message.get("role"), content))
    system = texts.pop(0)[1] if texts and texts[0][0] in ("system", "developer") else ""
    wrong = [role for place, (role, _) in enumerate(texts) if role != ("user", "assistant")[place % 2]]
    if wrong or len(texts) % 2 == 0:
        raise Refused("user and assistant must take turns, and the user have the last word", "messages")
    try:
        frame = dialogue(tokenizer, system)
    except ValueError as error:
        raise Refused(str(error), "messages") from error
    ids = list(frame.head)
    for place, (_, text) in enumerate(texts):
        ids += encode(tokenizer, text.strip() if frame.trims else text)
        ids += frame.between if place % 2 else frame.ask
    return ids


def _delta(delta: Mapping[str, Any], finish: str | None = None) -> dict[str, Any]:
    """Return the only choice of an event."""
    return {"index": 0, "delta": dict(delta), "finish_reason": finish}


class _Handler(BaseHTTPRequestHandler):
    """The protocol: paths, statuses, JSON or a stream of events."""

    owner: ModelServer
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        """List the model."""
        if self._admitted() and self._path_is("/v1/models"):
            model = {"id": self.owner.loaded.name, "object": "model", "owned_by": "longscope"}
            self._send(200, {"object": "list", "data": [model]})

    def do_POST(self) -> None:
        """Answer a chat."""
        length = self.headers.get("content-length", "")
        if not length.isdigit() or int(length) > _LARGEST:
            self.close_connection = True
            self._refuse(Refused(f"a request needs a content-length of at most {_LARGEST}", status=413))
            return
        data = self.rfile.read(int(length))
        if not self._admitted() or not self._path_is("/v1/chat/completions"):
            return
        try:
            body = json.loads(data)
            if not isinstance(body, dict):
                raise Refused("the request must be a JSON object")
            events = self.owner.events(body) if body.get("stream") else None
            if events is None:
                self._send(200, self.owner.completion(body))
            else:
                self._stream(next(events), events)
        except Refused as refusal:
            self._refuse(refusal)
        except (BrokenPipeError, ConnectionResetError):
            # The client left; a stream ends with it, so that the model is free for the next.
            self.close_connection = True
        except (ValueError, RecursionError) as error:
            self._refuse(Refused(f"the request is not JSON: {error}"))

    def _admitted(self) -> bool:
        """Refuse what a web page of another site sends through the browser of this machine."""
        host = self.headers.get("host", "").rpartition(":")[0] or self.headers.get("host", "")
        if host in _HOSTS and "origin" not in self.headers:
            return True
        self._refuse(Refused("only programs of this machine are served", status=403))
        return False

    def _path_is(self, path: str) -> bool:
        if self.path.partition("?")[0] == path:
            return True
        self._refuse(Refused(f"there is no {self.path}, only /v1/chat/completions and /v1/models", status=404))
        return False

    def _refuse(self, refusal: Refused) -> None:
        error = {"message": str(refusal), "type": "invalid_request_error", "param": refusal.setting or None}
        self._send(refusal.status, {"error": error})

    def _send(self, status: int, value: Any) -> None:
        data = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def _stream(self, first: Any, events: Iterator[Any]) -> None:
        self.send_response(200)
        self.send_header("content-type", "text/event-stream")
        self.send_header("connection", "close")
        self.end_headers()
        self.close_connection = True
        for event in itertools.chain([first], events):
            self.wfile.write(b"data: " + json.dumps(event).encode() + b"\n\n")
        self.wfile.write(b"data: [DONE]\n\n")

    def log_message(self, form: str, *values: Any) -> None:
        """Log quietly instead of writing to stderr."""
        log.info(form, *values)
