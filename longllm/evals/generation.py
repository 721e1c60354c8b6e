"""Generation on conversations: the first user turn is asked, the first assistant turn is the reference."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from longllm.evals.task import Example, Row, mean_scores

#: field that a row of the data must have
NEEDS = ("conversations",)


@dataclass(frozen=True)
class Generation:
    """Answers to the first turns of conversations, scored by ROUGE where that is asked for.

    >>> turns = [{"role": "user", "content": "Who?"}, {"role": "assistant", "content": "Ahab."}]
    >>> next(Generation([{"conversations": turns}]).examples(None)).references
    ('Ahab.',)
    """

    rows: Sequence[Mapping[str, Any]]
    max_new_tokens: int = 256
    rouge: bool = True
    name: str = "generation"

    def __post_init__(self) -> None:
        """Refuse a length that is none.

        Raises:
            ValueError: as said.
        """
        if self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens must be at least 1, got {self.max_new_tokens}")

    def examples(self, tokenizer: Any) -> Iterator[Example]:
        """Yield one example per conversation.

        Raises:
            ValueError: one without a user turn, or without an answer to it.
        """
        for number, row in enumerate(self.rows):
            turns = list(row["conversations"])
            # As in training, what comes before the user's first turn is left out.
            while turns and turns[0].get("role") != "user":
                turns.pop(0)
            if len(turns) < 2 or turns[1].get("role") != "assistant":
                raise ValueError(f"row {number} has no user turn that is followed by an assistant's")
            yield Example(f"{number}", turns[0]["content"], (turns[1]["content"],), self.max_new_tokens)

    def score(self, example: Example, answer: str) -> dict[str, float]:
        """Return ROUGE-1, -2 and -L F, each under its own name; 0 where an answer has no words.

        Raises:
            ImportError: the package ``rouge`` is not installed.
        """
        if not self.rouge:
            return {}
        from longllm.evals.extras import rouge

        found: dict[str, float] = {"rouge_1": 0.0, "rouge_2": 0.0, "rouge_l": 0.0}
        # The package raises on texts that it finds no words in.
        if all(text.strip(" .\n\t") for text in (answer, example.references[0])):
            scores = rouge().get_scores([answer], [example.references[0]], avg=True)
            found = {name: float(scores[name.replace("_", "-")]["f"]) for name in found}
        return found

    def summarise(self, rows: Sequence[Row]) -> dict[str, Any]:
        """Return the mean of every score."""
        return mean_scores(rows)


def write_predictions(rows: Sequence[Row], path: str | os.PathLike[str]) -> None:
    """Write answers and references as JSON lines of ``prediction``, ``target``, ``index``, in the data's order.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     write_predictions([Row("0", "Ahab", {}, ("Ahab.",), {})], Path(folder, "p.jsonl"))
    ...     Path(folder, "p.jsonl").read_text()
    '{"prediction": "Ahab", "target": "Ahab.", "index": 0}\\n'
    """
    ordered = sorted(rows, key=lambda row: int(row.name))
    lines = [{"prediction": row.answer, "target": row.references[0], "index": int(row.name)} for row in ordered]
    text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
    Path(path).write_text(text, encoding="utf-8")
