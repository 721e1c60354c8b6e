"""A file of requests sent to an endpoint; every answer is on disk at once, and a later run sends only what is missing.

Requests are JSON Lines, a chat-completions body with a ``custom_id`` on each; the layout of batch services
(``{"custom_id", "method", "url", "body"}``) is read as well. Results are ``{"custom_id", "request", "response"}`` or,
after the last failed attempt, ``{"custom_id", "request", "errors"}``, in the order of arrival.
"""

from __future__ import annotations

import asyncio
import fcntl
import hashlib
import json
import os
import sys
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, BinaryIO

from tqdm import tqdm

from longllm.endpoint import Endpoint
from longllm.replies import EndpointError, Failure, checked


def read_requests(path: str | os.PathLike[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield (id, body) for each line of a file of requests.

    Raises:
        ValueError: a line is no request or repeats an id, naming file and line.
        OSError: the file cannot be read.
    """
    seen: set[str] = set()
    with open(path, encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            try:
                request = json.loads(line)
                name = request.pop("custom_id")
                body = request.get("body", request)
                usable = isinstance(name, str) and isinstance(body["messages"], list)
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise ValueError(f"{path}, line {number}: no request ({type(error).__name__}: {error})") from error
            if not usable or name in seen:
                problem = "is used twice" if usable else "is no text, or messages is no list"
                raise ValueError(f"{path}, line {number}: custom_id {name!r} {problem}")
            seen.add(name)
            yield name, body


def read_results(path: str | os.PathLike[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield (id, record) for each line of a results file, of this module or of a batch service.

    A record has ``response`` (a chat completion) or ``errors``; an id that failed in one run and was answered in
    another comes more than once, the answer last.

    Raises:
        ValueError: a line is no result, naming file and line.
        OSError: the file cannot be read.
    """
    with open(path, encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            try:
                record = json.loads(line)
                name = record["custom_id"]
                if "status_code" in (record.get("response") or {}) or record.get("error"):
                    record = _from_service(record)
                if "errors" not in record:
                    checked(record["response"])
            except (ValueError, KeyError, TypeError, AttributeError, Failure) as error:
                raise ValueError(f"{path}, line {number}: no result ({type(error).__name__}: {error})") from error
            yield name, record


def run(
    endpoint: Endpoint, requests: str | os.PathLike[str], out: str | os.PathLike[str], *, progress: bool = False
) -> dict[str, Any]:
    """Send the requests of a file that ``out`` holds no answer to; return what was done.

    An answer is appended to ``out`` as it comes, so that a run that was killed has lost only what was under way. A
    request that failed is noted with its errors and sent again by the next run.

    Raises:
        EndpointError: no key, no money, no such model, or too many failures in a row: the rest was not sent.
        ValueError: a file is damaged, or ``out`` answers other requests.
        OSError: a file cannot be read or written, or another run is writing ``out``.
    """
    path = Path(out)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+b") as file:
        _alone(file, path)
        _mend(file)
        answered = {name: record.get("request") for name, record in read_results(path) if "response" in record}
        # All requests are looked at before the first is sent, but not kept: they may be gigabytes.
        total = left = 0
        for name, body in read_requests(requests):
            total, left = total + 1, left + (name not in answered)
            if answered.get(name) not in (None, digest(body)):
                raise ValueError(f"{path} answers another request {name!r} than {requests} asks: choose another file")
        # disable=None: no bar where stderr is not a terminal.
        hidden = None if progress else True
        with tqdm(total=total, initial=total - left, desc="requests", file=sys.stderr, disable=hidden) as bar:
            wanted = (request for request in read_requests(requests) if request[0] not in answered)
            failed = endpoint.wait(_send(endpoint, wanted, file, bar))
    done = {"requests": total, "before": total - left, "answered": left - failed, "failed": failed}
    # Last: the endpoint counts the requests that it was sent, those of other runs not among them.
    return {**asdict(endpoint.usage), **done}


def digest(body: Mapping[str, Any]) -> str:
    """Return a mark of what a request asks.

    >>> digest({"a": 1, "b": 2}) == digest({"b": 2, "a": 1})
    True
    """
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()[:16]


async def _send(endpoint: Endpoint, wanted: Iterator[tuple[str, dict[str, Any]]], file: BinaryIO, bar: tqdm) -> int:
    """Send requests, as many at once as the endpoint allows; return how many failed.

    Raises:
        EndpointError: the others would fail as well.
    """
    failed = in_a_row = 0

    async def sender() -> None:
        nonlocal failed, in_a_row
        for name, body in wanted:
            record: dict[str, Any] = {"custom_id": name, "request": digest(body)}
            try:
                record["response"] = await endpoint.complete(body, name)
                in_a_row = 0
            except (EndpointError, ValueError) as error:
                if getattr(error, "hopeless", False):
                    raise
                failed, in_a_row = failed + 1, in_a_row + 1
                record["errors"] = list(getattr(error, "errors", ())) or [str(error)]
                _write(file, record)
                if in_a_row == endpoint.limits.give_up:
                    raise EndpointError(f"{in_a_row} requests in a row have failed, the last one: {error}") from error
            else:
                _write(file, record)
            bar.update()

    # One iterator feeds all senders: a request is read when somebody is free to send it.
    try:
        async with asyncio.TaskGroup() as group:
            for _ in range(endpoint.limits.concurrency):
                group.create_task(sender())
    except* (OSError, ValueError) as errors:
        raise errors.exceptions[0] from None
    return failed


def _write(file: BinaryIO, record: Mapping[str, Any]) -> None:
    """Append a line; it is on disk when this returns."""
    # ASCII: a server may send half a surrogate pair, which no encoding can write.
    file.write(json.dumps(record).encode() + b"\n")
    file.flush()
    os.fsync(file.fileno())


def _alone(file: BinaryIO, path: Path) -> None:
    """Make sure that nobody else writes the file until it is closed.

    Raises:
        OSError: somebody does.
    """
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise OSError(f"another run is writing {path}: wait for it, or choose another file") from error


def _mend(file: BinaryIO) -> None:
    """Drop a last line that a killed run left unfinished."""
    file.seek(0)
    whole = 0
    for line in file:
        if not line.endswith(b"\n"):
            file.truncate(whole)
        whole += len(line)


def _from_service(record: Mapping[str, Any]) -> dict[str, Any]:
    """Return the record that a batch service's line amounts to."""
    response = record.get("response") or {"status_code": "no answer", "body": record.get("error")}
    if response["status_code"] == 200:
        return {"custom_id": record["custom_id"], "response": response["body"]}
    return {"custom_id": record["custom_id"], "errors": [f"{response['status_code']} {response.get('body')}"]}
