"""``longscope synth texts``: plain text to learn from, cut from the catalog's texts."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from longllm.synthesis.texts import Cut


def synth_texts(
    *,
    out: str,
    model: str = "smollm2-135m-instruct",
    cut: Cut = Cut(),  # noqa: B008
) -> Iterator[str | dict[str, Any]]:
    """Cut real texts into rows of about equal length, to pre-train on.

    The texts are State of the Union addresses and the first part of Moby-Dick. The rest of the novel and some
    addresses are held out for evaluation. Validation rows come from texts of their own:

        longscope synth texts --out out/text.jsonl
        longscope synth texts --out out/held-out.jsonl --cut.part validation --cut.rows 16 --cut.tokens 4096

    Args:
        out: file of rows (JSON Lines); one that exists is replaced
        model: whose tokens are counted: a folder or a name of the catalog
        cut: lengths and number of rows
    """
    import catalog
    from longllm.loading import tokenizer_of
    from longllm.synthesis.texts import write_texts

    facts = write_texts(tokenizer_of(catalog.path(model), None), cut, out)
    yield f"{facts['file']}: {facts['rows']:,} rows, {facts['tokens']:,} tokens, at most {facts['longest']:,} a row\n"
    yield facts
