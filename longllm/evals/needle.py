"""Needle in a haystack: a sentence hidden in a long text at a grid of lengths and depths, asked for at the end."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from longllm.evals.cells import by_cell, by_length
from longllm.evals.haystack import Haystack, stretch
from longllm.evals.judge import Judge
from longllm.evals.passkey import hide
from longllm.evals.scorers import rouge_l
from longllm.evals.task import Example, Row, mean_scores
from longllm.prompts import encode

INSTRUCTION = "A piece of information is hidden in the text below. Read it: you will be asked for it afterwards.\n\n"
#: Greg Kamradt's needle as the report (arXiv 2404.19553) words it, and its question
NEEDLE = "The best thing to do in San Francisco is to sit in Dolores Park with a hamburger on a sunny day."
QUESTION = "What is the best thing to do in San Francisco?"


@dataclass
class Needle:
    """The task: one question per length and depth.

    >>> Needle((8192,), (0, 50, 100), Haystack("notes", "Call me Ishmael.")).main_score
    'rouge_l'
    """

    lengths: Sequence[int]
    depths: Sequence[float]
    haystack: Haystack
    """as long as the longest prompt, or it is repeated"""
    needle: str = NEEDLE
    question: str = QUESTION
    judge: Judge | None = None
    """marks answers from 1 to 10; None leaves only ROUGE-L"""
    new_tokens: int = 50
    name: str = field(default="needle", init=False)

    def __post_init__(self) -> None:
        """Refuse an empty needle or question."""
        if not self.needle.strip() or not self.question.strip():
            raise ValueError("needle and question must not be empty")

    @property
    def main_score(self) -> str:
        """Return the score that tables and the heat map show."""
        return "judge" if self.judge else "rouge_l"

    def examples(self, tokenizer: Any) -> Iterator[Example]:
        """Yield the cells, lengths outermost; every prompt has exactly its length before the chat frame.

        Raises:
            ValueError: there is no tokeniser to count with, a length is too small, or a depth outside 0 to 100.
        """
        if tokenizer is None:
            raise ValueError("a needle prompt has an exact length, so it needs the model's tokeniser: name its folder")
        instruction, question = encode(tokenizer, INSTRUCTION), encode(tokenizer, f"\n\n{self.question.strip()}")
        sentence = encode(tokenizer, f"\n\n{self.needle.strip()}\n\n")
        hay, _ = stretch(self.haystack.ids(tokenizer), max(self.lengths))
        for length in self.lengths:
            for depth in self.depths:
                room, before = hide(length, depth, instruction, sentence, question)
                ids = (*instruction, *hay[:before], *sentence, *hay[before:room], *question)
                yield Example(
                    f"{length}@{depth:g}",
                    tokenizer.decode(ids),
                    (self.needle.strip(),),
                    self.new_tokens,
                    truncate="never",
                    ids=ids,
                    facts={"length": length, "depth": depth, "needle_start": len(instruction) + before},
                )

    def score(self, example: Example, answer: str) -> dict[str, float]:
        """Return ROUGE-L F of answer and needle and, with a judge, its mark from 1 to 10.

        Raises:
            ImportError: the package ``rouge`` (``longscope[eval]``) is not installed.
        """
        needle = example.references[0]
        marks = {"judge": self.judge(self.question, needle, answer)} if self.judge else {}
        return {"rouge_l": rouge_l(answer, needle), **marks}

    def summarise(self, rows: Sequence[Row]) -> dict[str, Any]:
        """Return the means, and the shown score by length and by cell."""
        shown = self.main_score
        return {**mean_scores(rows), "by_length": by_length(rows, shown), "cells": by_cell(rows, shown)}
