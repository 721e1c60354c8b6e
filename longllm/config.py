"""Settings of loading and decoding. Standard library only, so that command lines can name them cheaply."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

DType = Literal["auto", "bf16", "fp32", "fp16"]
Attention = Literal["flashcore", "sdpa", "eager"]
Device = Literal["auto", "cpu", "cuda"]


@dataclass(frozen=True)
class Decoding:
    """How answer tokens are chosen.

    Raises:
        ValueError: naming the field, what it got and its range.

    >>> Decoding(max_new_tokens=32).temperature
    0.0
    """

    max_new_tokens: int = 128
    """most tokens to generate"""
    temperature: float = 0.0
    """0 takes the likeliest token each time; above 0, tokens are drawn from the softmax of logits / temperature"""
    seed: int = 0
    """seed of the draws when the temperature is above 0"""

    def __post_init__(self) -> None:
        """Refuse values that decoding has no meaning for."""
        if self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens must be at least 1, got {self.max_new_tokens}")
        if not 0 <= self.temperature < float("inf"):
            raise ValueError(f"temperature must be 0 or a positive number, got {self.temperature}")
        if not 0 <= self.seed < 2**63:
            raise ValueError(f"seed must lie between 0 and 2**63 - 1, got {self.seed}")
