"""The page "Ask a long document": a document, a method, a question; the answer as it comes, beside what it cost."""

from __future__ import annotations

from collections.abc import Generator, Iterator, Sequence
from typing import Any, Protocol

import gradio as gr

from demos.figures import panel
from demos.serving import free_port, serve

TYPES = [".txt", ".md", ".html", ".pdf"]
EXAMPLE = "sotu/1963-kennedy"


class Desk(Protocol):
    """What answers: called with document, method, ratio, question and whether the question steers the reading."""

    documents: Sequence[str]
    methods: Sequence[str]
    unrated: Sequence[str]

    def __call__(self, *asked: Any) -> Iterator[tuple[str, dict[str, Any] | None]]: ...


def build(fn: Desk) -> gr.Blocks:
    """Return the page; ``fn`` answers."""

    def ask(name: str, file: str | None, method: str, ratio: float, aware: bool, question: str) -> Iterator[Any]:
        try:
            for text, figures in fn(file or name, method, ratio, question, aware):
                yield text, gr.skip() if figures is None else panel(figures)
        except (ValueError, OSError, ImportError) as error:
            raise gr.Error(str(error), title="That did not work", print_exception=False) from error

    names = list(fn.documents)
    with gr.Blocks(title="Ask a long document", analytics_enabled=False, delete_cache=(3600, 86400)) as page:
        gr.Markdown("# Ask a long document\nThe model reads all of it, however long, into a KV cache that stays small.")
        with gr.Row():
            with gr.Column(scale=4, min_width=300):
                chosen = EXAMPLE if EXAMPLE in names else next(iter(names), None)
                name = gr.Dropdown(names, value=chosen, label="Document", info="of the catalog; type to search")
                file = gr.File(label="or your own (.txt .md .html .pdf)", file_types=TYPES, height=120)
                method = gr.Dropdown(list(fn.methods), label="Method", info="how the KV cache is compressed")
                ratio = gr.Slider(1, 32, 8, step=1, label="Ratio", info="keep one token's worth in so many")
                aware = gr.Checkbox(True, label="Read with the question in mind", info="off: read once, ask often")
            with gr.Column(scale=7, min_width=300):
                question = gr.Textbox(label="Question", placeholder="Who gave his life over the island of Cuba?",
                                      max_lines=4, autofocus=True)  # fmt: skip
                with gr.Row():
                    go, stop = gr.Button("Ask", variant="primary"), gr.Button("Stop", variant="stop")
                with gr.Row():
                    answer = gr.Textbox(
                        label="Answer", lines=10, max_lines=30, interactive=False, scale=3, min_width=280
                    )
                    costs = gr.HTML(panel(None), label="What it cost")
        asked = gr.on([question.submit, go.click], ask, [name, file, method, ratio, aware, question],
                      [answer, costs], api_name="ask", show_progress="hidden")  # fmt: skip
        stop.click(lambda: panel(None, "Stopped."), outputs=costs, cancels=asked, queue=False, api_name="stop")
        method.change(lambda it: gr.Slider(interactive=it not in fn.unrated), method, ratio, api_name="rated")
    return page


def main(desk: Any, port: int = 7860, open_browser: bool = False) -> Generator[str, None, str]:
    """Load the model of ``desk`` and serve the page until Ctrl-C; yield what is to be said, return the address."""
    port = free_port(port)
    yield f"loading {desk.model} …\n"
    desk.load()
    return (yield from serve(build(desk), port, open_browser))
