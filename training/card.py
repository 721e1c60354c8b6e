"""The model card: what was trained on what, by which command, for how long, with which figures and licence."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any


def model_card(
    title: str,
    summary: str,
    *,
    facts: Mapping[str, str],
    figures: Sequence[Mapping[str, Any]] = (),
    notes: Sequence[str] = (),
    metadata: Mapping[str, str] | None = None,
) -> str:
    """Return a model card in Markdown, with the metadata block that hubs read.

    Args:
        title: name of the model.
        summary: what it is, in a paragraph.
        facts: base model, data, command, time, licence …, one line each.
        figures: rows of a table; the keys of the first are its columns.
        notes: what is weak or was not measured, one line each.
        metadata: such as license and base_model.

    >>> print(model_card("tiny", "A test.", facts={"base": "none"}))
    # tiny
    <BLANKLINE>
    A test.
    <BLANKLINE>
    - **base**: none
    <BLANKLINE>
    """
    blocks = []
    if metadata:
        blocks.append("\n".join(["---", *(f"{name}: {value}" for name, value in metadata.items()), "---"]))
    blocks += [f"# {title}", summary, "\n".join(f"- **{name}**: {fact}" for name, fact in facts.items())]
    if figures:
        columns = list(figures[0])
        lines = [f"| {' | '.join(columns)} |", f"|{'---|' * len(columns)}"]
        lines += [f"| {' | '.join(str(row.get(name, '–')) for name in columns)} |" for row in figures]
        blocks.append("\n".join(lines))
    if notes:
        blocks.append("\n".join(f"- {note}" for note in notes))
    return "\n\n".join(blocks) + "\n"
