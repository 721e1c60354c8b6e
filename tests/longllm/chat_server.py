"""A real chat-completions server on this machine, with whatever faults a test asks for."""

import json
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


@dataclass(frozen=True)
class Fault:
    """What is sent instead of a completion."""

    status: int = 200
    body: bytes = b""
    headers: Mapping[str, str] = field(default_factory=dict)
    drop: bool = False
    """cut the connection in the middle of the answer"""


def refusal(status: int, message: str, **details: Any) -> Fault:
    """An error as the protocol has it."""
    return Fault(status, json.dumps({"error": {"message": message, **details}}).encode())


#: (request body, how often the same body came before) -> the answer's text, or a fault
Reply = Callable[[dict[str, Any], int], str | Fault]


class ChatServer:
    """Answers /v1/chat/completions on a free port while its ``with`` block runs; ``bodies`` keeps what was asked."""

    def __init__(self, reply: Reply, *, delay: float = 0.0) -> None:
        self.reply, self.delay = reply, delay
        self.bodies: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.paths: list[str] = []
        self.times: list[float] = []
        self.answered: Counter[str] = Counter()
        self.busiest = self._busy = 0
        self._lock = threading.Lock()

    def __enter__(self) -> "ChatServer":
        handler = type("Handler", (_Handler,), {"owner": self})
        self._http = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self._http.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._http.server_address[1]}/v1"
        threading.Thread(target=self._http.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._http.shutdown()
        self._http.server_close()

    def decide(self, path: str, headers: dict[str, str], body: dict[str, Any]) -> str | Fault:
        with self._lock:
            before = self.bodies.count(body)
            self.bodies.append(body)
            self.paths.append(path)
            self.headers.append(headers)
            self.times.append(time.monotonic())
            self._busy += 1
            self.busiest = max(self.busiest, self._busy)
        time.sleep(self.delay)
        reply = self.reply(body, before)
        with self._lock:
            self._busy -= 1
            self.answered[body["messages"][-1]["content"]] += isinstance(reply, str)
        return reply


class _Handler(BaseHTTPRequestHandler):
    owner: ChatServer
    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        reply = self.owner.decide(self.path, {name.lower(): value for name, value in self.headers.items()}, body)
        if isinstance(reply, str):
            message = {"role": "assistant", "content": reply}
            usage = {"prompt_tokens": 10, "completion_tokens": 5, "total_tokens": 15}
            choice = {"index": 0, "message": message, "finish_reason": "stop"}
            reply = Fault(200, json.dumps({"object": "chat.completion", "choices": [choice], "usage": usage}).encode())
        self.send_response(reply.status)
        for name, value in {"content-type": "application/json", **reply.headers}.items():
            self.send_header(name, value)
        self.send_header("content-length", str(len(reply.body) + 100 * reply.drop))
        self.end_headers()
        self.wfile.write(reply.body)
        if reply.drop:
            self.connection.shutdown(socket.SHUT_RDWR)
            self.close_connection = True

    def log_message(self, *_: Any) -> None:
        pass
