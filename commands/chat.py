"""``longscope chat``: a conversation in the terminal, or with lines from a pipe."""

from __future__ import annotations

import contextlib
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from longllm import Attention, Decoding, DType

if TYPE_CHECKING:
    from longllm.chat import ChatSession

HELP = """\
/doc FILE   read a document (a file, or one of the catalog such as sotu/1963); then ask about it
/undo       take the last message and its answer back
/again      answer the last message once more
/reset      forget the conversation
/save FILE  write the conversation as JSON
/load FILE  go on from a saved one
/stats      tokens, memory, speed
/quit       end the chat (so does Ctrl-D); Ctrl-C ends an answer
"""


def chat(
    *,
    model: str = "smollm2-135m-instruct",
    adapter: str = "",
    doc: str = "",
    system: str = "",
    rope: str = "",
    length: int = 0,
    quantised: bool = False,
    dtype: DType = "auto",
    attention: Attention = "flashcore",
    max_new_tokens: int = 512,
    temperature: float = 0.0,
    seed: int = 0,
) -> Iterator[str | dict[str, Any]]:
    """Chat with a model, with an adapter or not; a document can be read first.

    Every turn reads only what is new. Without a terminal, each line of stdin is a message:

        longscope chat --doc sotu/1963
        printf 'Who gave his life over Cuba?\\n/stats\\n' | longscope chat --doc sotu/1963

    Args:
        model: a name from ``longscope models``, a folder, an adapter's folder or the name of a shipped adapter
        adapter: an adapter to put on the model, if it does not name its base itself
        doc: a document to read first: a file, or one of the catalog
        system: a system message, instead of the chat template's own
        rope: other RoPE settings than the model's, such as yarn:4 or theta:2e8
        length: tokens that these settings are for
        quantised: hold the weights in 4 bits; an adapter stays beside them
        dtype: what to compute in; auto is bf16 where the hardware is fast at it, else fp32
        attention: the attention path; sdpa and eager are transformers' own
        max_new_tokens: the longest answer, in tokens
        temperature: 0 always takes the likeliest token; higher values draw more freely
        seed: seed of the draws when the temperature is above 0
    """
    # Cheap checks first.
    import catalog

    decoding = Decoding(max_new_tokens, temperature, seed)
    if doc:
        catalog.read_document(doc)

    import longllm
    from longllm.loading import worded_context

    context = worded_context(rope, length, model, adapter)
    loaded = longllm.load(
        model, dtype=dtype, attention=attention, context=context, adapter=adapter, quantised=quantised
    )
    talk = Talk(longllm.ChatSession(loaded, system=system, decoding=decoding))
    if talk.interactive:
        yield f"{loaded.name}: {talk.session.limit:,} tokens of context. /help lists the commands.\n"
    if doc:
        yield from talk.answered(f"/doc {doc}")
    for line in talk.lines():
        yield from talk.answered(line)
        if talk.over:
            break
    yield {**talk.session.figures(), "messages": talk.session.messages, "errors": talk.errors}


class Talk:
    """A session and the person (or the pipe) that talks to it."""

    def __init__(self, session: ChatSession) -> None:
        """Wrap a session; stdin decides whether somebody sits there."""
        self.session = session
        self.interactive = sys.stdin.isatty()
        self.over = False
        self.errors: list[str] = []
        self.warned = ""

    def lines(self) -> Iterator[str]:
        """Yield what is typed or piped in, without empty lines."""
        if not self.interactive:
            yield from filter(None, map(str.strip, sys.stdin))
            return
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401 (gives input() a history and editing)
        interrupted = False
        while True:
            try:
                line = input("\n> ").strip()
            except EOFError:
                return
            except KeyboardInterrupt:
                if interrupted:
                    return
                interrupted = True
                continue
            interrupted = False
            if line:
                yield line

    def answered(self, line: str) -> Iterator[str]:
        """Yield what a line is answered with; an error ends the line, not the chat."""
        word, _, rest = line.partition(" ")
        try:
            if word in self.commands():
                yield from self.commands()[word](rest.strip())
            elif word.startswith("/"):
                raise ValueError(f"unknown command {word}; /help lists them")
            else:
                yield from self._said(self.session.ask(line, progress=True))
        except InterruptedError:
            yield "[stopped while reading: nothing of it was kept]\n"
        except (ValueError, OSError) as error:
            reason = " ".join(str(error).split())
            self.errors.append(reason)
            yield f"! {reason}\n"

    def commands(self) -> dict[str, Callable[[str], Iterator[str]]]:
        """Return what each command does with the rest of its line."""
        return {
            "/help": lambda rest: iter([HELP]),
            "/doc": self._document,
            "/undo": self._undo,
            "/again": lambda rest: self._said(self.session.again(progress=True)),
            "/reset": self._reset,
            "/save": self._save,
            "/load": self._load,
            "/stats": self._stats,
            "/quit": self._quit,
        }

    def _said(self, answer: Iterator[str]) -> Iterator[str]:
        """Yield an answer as it comes, and why it ended if the model did not end it."""
        with self._stoppable():
            yield from answer
        turn = self.session.turns[-1]
        if turn.result is not None and not turn.result.stopped:
            yield f" [ended after {turn.result.new_tokens} tokens]"
        yield "\n"
        warning = self.session.figures()["warning"]
        if warning and not self.warned:
            yield f"! {warning.replace('the prompt', 'the conversation')}\n"
        self.warned = warning or ""

    def _document(self, rest: str) -> Iterator[str]:
        import catalog

        document = catalog.read_document(_named(rest, "/doc"))
        begun = time.perf_counter()
        with self._stoppable():
            tokens = self.session.read(document.text, progress=True)
        seconds = time.perf_counter() - begun
        yield f"[read {document.title or document.name}: {tokens:,} tokens in {seconds:.1f} s]\n"

    def _undo(self, rest: str) -> Iterator[str]:
        message = self.session.undo()
        yield f"[taken back: {message if len(message) <= 60 else message[:57] + '...'}]\n"

    def _reset(self, rest: str) -> Iterator[str]:
        self.session.reset()
        yield "[forgotten]\n"

    def _save(self, rest: str) -> Iterator[str]:
        self.session.save(_named(rest, "/save"))
        yield f"[saved {len(self.session.turns)} turns in {rest}]\n"

    def _load(self, rest: str) -> Iterator[str]:
        self.session.load(_named(rest, "/load"))
        yield f"[{len(self.session.turns)} turns, {len(self.session.ids):,} tokens: read with the next message]\n"

    def _stats(self, rest: str) -> Iterator[str]:
        found = self.session.figures()
        speed = f", {found['tokens_per_second']:.1f} tokens/s" if found["tokens_per_second"] else ""
        yield (
            f"[{found['turns']} turns, {found['tokens']:,} of {found['limit']:,} tokens "
            f"(trained on {found['trained_length']:,}), {found['kv_bytes'] / 1e6:.1f} MB of keys and values{speed}]\n"
        )

    def _quit(self, rest: str) -> Iterator[str]:
        self.over = True
        yield from ()

    @contextlib.contextmanager
    def _stoppable(self) -> Iterator[None]:
        """Let Ctrl-C end what is under way instead of the program; the second one is meant for the program."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return

        def pressed(number: int, frame: Any) -> None:
            self.session.stop()
            signal.signal(signal.SIGINT, usual)

        usual = signal.signal(signal.SIGINT, pressed)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, usual)


def _named(rest: str, command: str) -> str:
    """Return the file that a command was given."""
    if not rest:
        raise ValueError(f"{command} needs a file: {command} FILE")
    return rest
