"""The page "Ask a long document": a document, a method, a question; the answer as it comes, beside what it cost."""

from __future__ import annotations

from collections.abc import Generator, Iterator
from typing import Any

import gradio as gr

from demos.figures import panel
from demos.serving import free_port, serve, toast

TYPES = [".txt", ".md", ".html", ".pdf"]
EXAMPLE = "sotu/1963-kennedy"
EMPTY = {"note": "The figures of an answer appear here."}
LEAD = """# Ask a long document
The model reads the whole document. What it remembers of it, the KV cache, can be compressed: see by how much.
"""


def build(fn: Any) -> gr.Blocks:
    """Return the page.

    Args:
        fn: what answers. Called with document, method, ratio, question and whether the question steers the reading, it
            yields pairs of text and figures; it has ``documents``, ``methods``, ``unrated`` methods and ``stop()``.
    """

    def ask(name: str, file: str | None, method: str, ratio: float, aware: bool, question: str) -> Iterator[Any]:
        try:
            for text, figures in fn(file or name, method, ratio, question, aware):
                yield text, gr.skip() if figures is None else panel(figures)
        except (ValueError, OSError, ImportError) as error:
            yield gr.skip(), panel({"note": str(error)})
            raise toast(error) from error

    names, methods = list(fn.documents), list(fn.methods)
    chosen = EXAMPLE if EXAMPLE in names else None
    page = gr.Blocks(title="Ask a long document", analytics_enabled=False, fill_width=True, delete_cache=(3600, 86400))
    with page:
        gr.Markdown(LEAD)
        with gr.Row():
            with gr.Column(scale=4, min_width=300):
                name = gr.Dropdown(names, value=chosen, label="Document", info="of the catalog; type to search")
                file = gr.File(label=f"or your own ({' '.join(TYPES)}), which goes first", file_types=TYPES,
                               height=90, elem_classes="drop")  # fmt: skip
                method = gr.Dropdown(methods, label="Method", info="how the KV cache is compressed")
                ratio = gr.Slider(1, 32, 8, step=1, label="Ratio", info="of so many tokens one is kept",
                                  interactive=methods[0] not in fn.unrated)  # fmt: skip
                aware = gr.Checkbox(True, label="Read with the question in mind",
                                    info="off: one reading serves every question")  # fmt: skip
            with gr.Column(scale=7, min_width=300):
                question = gr.Textbox(label="Question", placeholder="Who gave his life over the island of Cuba?",
                                      max_lines=4, autofocus=True)  # fmt: skip
                with gr.Row():
                    go, stop = gr.Button("Ask", variant="primary", scale=3), gr.Button("Stop", scale=1)
                with gr.Row():
                    with gr.Column(scale=3, min_width=280):
                        answer = gr.Textbox(label="Answer", lines=9, max_lines=30, interactive=False)
                    with gr.Column(scale=2, min_width=280):
                        costs = gr.HTML(panel(EMPTY), label="What it cost", js_on_load=None)
        gr.on([question.submit, go.click], ask, [name, file, method, ratio, aware, question], [answer, costs],
              api_name="ask", show_progress="hidden")  # fmt: skip
        # Not gradio's own cancelling: a step that is on its way then may arrive later, and stay.
        stop.click(fn.stop, queue=False, api_name="stop")
        method.change(lambda it: gr.Slider(interactive=it not in fn.unrated), method, ratio, api_name="rated")
    return page


def main(desk: Any, port: int = 7860, open_browser: bool = False) -> Generator[str, None, str]:
    """Load the model of ``desk`` and serve the page until Ctrl-C; yield what is to be said, return the address."""
    port = free_port(port)
    yield f"loading {desk.model} …\n"
    desk.load()
    return (yield from serve(build(desk), port, open_browser))
