"""``longscope demo``: the workbench in a browser, served on this machine alone."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Iterator
from typing import Any

from longllm import DType

#: named by string, as the front door names commands: nobody imports the pages
PAGE = "demos.ask_document"


def demo(
    *,
    port: int = 7860,
    open_browser: bool = False,
    model: str = "smollm2-135m-instruct",
    dtype: DType = "auto",
) -> Iterator[str | dict[str, Any]]:
    """Open the workbench: ask questions about a long document in a browser, and see what each answer costs.

    It is served on 127.0.0.1, for this machine alone, until Ctrl-C. Nothing is loaded from elsewhere or sent there:

        longscope demo --open_browser

    Args:
        port: where to serve; 0 takes one that is free
        open_browser: open the page in the browser of this machine
        model: a name from ``longscope models``, or a folder in Hugging Face layout
        dtype: what to compute in; auto is bf16 where the hardware is fast at it, else fp32
    """
    if not 0 <= port <= 65535:
        raise ValueError(f"port must lie between 0 and 65535, got {port}")
    if importlib.util.find_spec("gradio") is None:
        raise ImportError("the demo needs gradio: pip install 'longscope[demo]'")
    from commands.answering import Desk

    desk = Desk(model, dtype)
    try:
        address = yield from importlib.import_module(PAGE).main(desk, port, open_browser)
    finally:
        desk.close()
    yield {"address": address, "model": model, "answers": desk.answers}
