"""``longscope demo``: the workbench in a browser, served on this machine alone."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Iterator
from typing import Any, Literal

from longllm import DType

Page = Literal["ask", "chat"]
#: the pages, named by string as the front door names commands: nobody imports them
PAGES: dict[Page, str] = {"ask": "demos.ask_document", "chat": "demos.long_chat"}


def demo(
    *,
    page: Page = "ask",
    port: int = 7860,
    open_browser: bool = False,
    model: str = "",
    dtype: DType = "auto",
) -> Iterator[str | dict[str, Any]]:
    """Open a page of the workbench in a browser.

    Ask questions about a long document and see what each answer costs (ask), or talk with a model of long context,
    about a document if you like, and test what it finds in long texts (chat). A page is served on 127.0.0.1, for this
    machine alone, until Ctrl-C. Nothing is loaded from elsewhere or sent there:

        longscope demo --open_browser
        longscope demo --page chat --open_browser

    Args:
        page: which page
        port: where to serve; 0 takes one that is free
        open_browser: open the page in the browser of this machine
        model: a name from ``longscope models``, a folder, or an adapter; by default smollm2-135m-instruct, for chat
            with its shipped long-context adapter
        dtype: what to compute in; auto is bf16 where the hardware is fast at it, else fp32
    """
    if not 0 <= port <= 65535:
        raise ValueError(f"port must lie between 0 and 65535, got {port}")
    if importlib.util.find_spec("gradio") is None:
        raise ImportError("the demo needs gradio: pip install 'longscope[demo]'")
    fn = _behind(page, model, dtype)
    try:
        address = yield from importlib.import_module(PAGES[page]).main(fn, port, open_browser)
    finally:
        fn.close()
    yield {"address": address, "page": page, "model": fn.model, "answers": fn.answers}


def _behind(page: Page, model: str, dtype: DType) -> Any:
    """Return what answers behind a page."""
    if page == "chat":
        from commands.chatting import Parlour, chat_model

        return Parlour(model or chat_model(), dtype)
    from commands.answering import Desk

    return Desk(model or "smollm2-135m-instruct", dtype)
