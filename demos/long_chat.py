"""The page "Chat with a long memory": a conversation that keeps what it has read, and a test of what is found in it."""

from __future__ import annotations

from collections.abc import Generator, Iterator
from typing import Any

import gradio as gr

from demos.chat_figures import fill
from demos.needle_test import needle_tab
from demos.serving import free_port, serve, toast

TYPES = [".txt", ".md", ".html", ".pdf"]
TITLE = "Chat with a long memory"
EMPTY = {"note": "How full the context is appears here."}
LEAD = f"""# {TITLE}
A document is read once; every message goes on from there. How well is it remembered? See the needle test.
"""


def build(fn: Any) -> gr.Blocks:
    """Return the page.

    Args:
        fn: who answers: ``say(document, message)`` yields the conversation and figures; it has ``history``,
            ``figures``, ``documents``, ``reset()``, ``stop()``, and what the needle test needs.
    """

    def say(name: str, file: str | None, message: str) -> Iterator[Any]:
        try:
            for told, figures in fn.say(file or name, message):
                # What was not answered is given back, to be sent again.
                yield told, message if "note" in figures else "", fill(figures) if figures else gr.skip()
        except (ValueError, OSError, ImportError) as error:
            yield fn.history, message, fill({"note": str(error)})
            raise toast(error) from error

    page = gr.Blocks(title=TITLE, analytics_enabled=False, fill_width=True, delete_cache=(3600, 86400))
    with page:
        gr.Markdown(LEAD)
        with gr.Tab("Chat"), gr.Row():
            with gr.Column(scale=7, min_width=300):
                talk = gr.Chatbot(label="Conversation", height=440, render_markdown=False, buttons=["copy"])
                message = gr.Textbox(label="Message", placeholder="Type, or paste a long text", max_lines=6,
                                     autofocus=True)  # fmt: skip
                with gr.Row():
                    go, stop = gr.Button("Send", variant="primary", scale=3), gr.Button("Stop", scale=1)
            with gr.Column(scale=4, min_width=300):
                name = gr.Dropdown([("none", ""), *((it, it) for it in fn.documents)], value="", label="Document",
                                   info="read before your message; type to search")  # fmt: skip
                file = gr.File(label=f"or your own ({' '.join(TYPES)}), which goes first", file_types=TYPES,
                               height=90, elem_classes="drop")  # fmt: skip
                memory = gr.HTML(fill(EMPTY), label="Memory", js_on_load=None)
                new = gr.Button("New conversation")
        with gr.Tab("Needle test"):
            needle_tab(fn)
        gr.on([message.submit, go.click], say, [name, file, message], [talk, message, memory], api_name="say",
              show_progress="hidden")  # fmt: skip
        # Not gradio's own cancelling: a step that is on its way then may arrive later, and stay.
        stop.click(fn.stop, queue=False, api_name="stop")
        gr.on([new.click, talk.clear], lambda: (fn.reset(), fill(EMPTY)), None, [talk, memory], queue=False,
              api_name="new")  # fmt: skip
        page.load(lambda: (fn.history, fill(fn.figures or EMPTY)), None, [talk, memory], queue=False,
                  api_name="history")  # fmt: skip
    return page


def main(parlour: Any, port: int = 7860, open_browser: bool = False) -> Generator[str, None, str]:
    """Load the model of ``parlour`` and serve the page until Ctrl-C; yield what is to be said, return the address."""
    port = free_port(port)
    yield f"loading {parlour.model} …\n"
    parlour.load()
    return (yield from serve(build(parlour), port, open_browser))
