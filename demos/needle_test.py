"""The tab "Needle test": what a model finds in long texts, as a heat map that fills in while it is asked."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import gradio as gr

from demos.chat_figures import heat
from demos.serving import toast

START = {"note": "Facts are hidden in a novel, at several depths, and asked for. What was found appears here."}


def needle_tab(fn: Any) -> None:
    """Put the test on the page that is being built.

    Args:
        fn: ``needles(lengths, depths)`` yields records of the test; it has the ``lengths`` on offer and ``stop()``.
    """

    def seek(lengths: list[int], depths: int) -> Iterator[str]:
        try:
            yield from map(heat, fn.needles(lengths, depths))
        except (ValueError, OSError, ImportError) as error:
            yield heat({"note": str(error)})
            raise toast(error) from error

    choices = [(f"{length // 1024}K" if length >= 1024 else str(length), length) for length in fn.lengths]
    with gr.Row():
        with gr.Column(scale=3, min_width=300):
            lengths = gr.CheckboxGroup(choices, value=list(fn.lengths[:2]), label="Lengths",
                                       info="in tokens; each text is read once for all its questions")  # fmt: skip
            depths = gr.Slider(2, 10, 5, step=1, label="Depths", info="places in each text")
            with gr.Row():
                go, stop = gr.Button("Start the test", variant="primary"), gr.Button("Stop the test")
        with gr.Column(scale=6, min_width=300):
            found = gr.HTML(heat(START), label="Found", js_on_load=None)
    go.click(seek, [lengths, depths], found, api_name="needles", show_progress="hidden")
    stop.click(fn.stop, queue=False, api_name="stop_test")
