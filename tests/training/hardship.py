"""What training has to endure: a full disk, and being one of two processes."""

import contextlib
import multiprocessing
import os
import resource
import signal
import socket
import sys
import traceback
from collections.abc import Callable, Iterator
from typing import Any


@contextlib.contextmanager
def full_disk(room: int) -> Iterator[None]:
    """Let no file grow beyond ``room`` bytes, which programs see as they see a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def forked(function: Callable[..., int], *given: Any) -> int:
    """Call a function in a process of its own, without importing everything anew; return the process's id.

    Its exit code is what the function returns.
    """
    pid = os.fork()
    if pid:
        return pid
    signal.signal(signal.SIGINT, signal.default_int_handler)
    code = 1
    try:
        code = function(*given)
    finally:
        sys.stderr.flush()
        os._exit(code)


def run_pair(function: Callable[..., Any], *given: Any, **environment: str) -> list[Any]:
    """Call a function in two processes that find each other as torchrun's do; return what each returned."""
    context = multiprocessing.get_context("fork")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
    answers = context.Queue()
    ranks = [{"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"} for rank in range(2)]
    settings = [{**place, "ACCELERATE_USE_CPU": "true", **environment, **rank} for rank in ranks]
    started = [context.Process(target=_rank, args=(answers, own, function, given)) for own in settings]
    for process in started:
        process.start()
    found = dict(answers.get(timeout=240) for _ in started)
    for process in started:
        process.join()
    failed = [answer for answer in found.values() if isinstance(answer, str) and answer.startswith("Traceback")]
    if failed:
        raise RuntimeError("\n".join(failed))
    return [found["0"], found["1"]]


def _rank(answers: Any, environment: dict[str, str], function: Callable[..., Any], given: tuple[Any, ...]) -> None:
    """Be one of the two."""
    from accelerate.state import AcceleratorState

    os.environ.update(environment)
    AcceleratorState._reset_state(reset_partial_state=True)
    try:
        answer = function(*given)
    except BaseException:
        answer = traceback.format_exc()
    answers.put((environment["RANK"], answer))
