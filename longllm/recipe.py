"""The settings of a context-extension run, as a command line or a YAML file gives them. Standard library only."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Literal

from longllm.config import Attention, DType
from longllm.positions import Spread

Recompute = Literal["off", "on", "offload"]
Rope = Literal["default", "linear", "dynamic", "yarn", "longrope", "llama3"]


@dataclass(frozen=True)
class Base:
    """The model that learns, and how it is held in memory.

    Raises:
        ValueError: naming the field, what it got and its range.

    >>> Base("smollm2-135m-instruct").nf4
    False
    """

    model: str = "smollm2-135m-instruct"
    """a name from ``longscope models``, or a folder in Hugging Face layout"""
    dtype: DType = "auto"
    """dtype of the frozen weights and of the computation"""
    nf4: bool = False
    """hold the frozen weights in 4 bits (NF4, double quantisation): QLoRA"""
    attention: Attention = "flashcore"
    """the attention path; sdpa and eager are transformers' own"""
    recompute: Recompute = "off"
    """activation checkpointing: on recomputes each layer in the backward pass, offload also moves the layers' inputs to
    the host's memory (CUDA)"""
    recompute_every: int = 1
    """recompute one layer in so many"""
    head_chunk: int = 512
    """rows of logits that exist at once"""

    def __post_init__(self) -> None:
        """Refuse values that mean nothing."""
        if self.dtype == "fp16":
            raise ValueError("base.dtype must be bf16 or fp32 in training, got fp16: its gradients overflow")
        if not self.model:
            raise ValueError("model must name a model of the catalog or a folder, got nothing")
        for name in ("recompute_every", "head_chunk"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")


@dataclass(frozen=True)
class Extension:
    """The RoPE settings that the model is trained under.

    Raises:
        ValueError: naming the field, what it got and its range.

    >>> Extension(length=81920, theta=200e6).rope
    'default'
    """

    length: int = 0
    """tokens that the model is to reach; 0 = its own length"""
    rope: Rope = "default"
    """default changes the base alone; linear, dynamic, yarn, longrope and llama3 scale"""
    theta: float = 0.0
    """the base (theta); 0 = the model's own"""
    factor: float = 0.0
    """how far the scaling kinds stretch; 0 = length / the model's own length"""
    log_origin: int = 0
    """keys beyond which attention is sharpened by the logarithm of their number, for samples shorter than the texts
    that are to be read; 0 = never. It needs flashcore's attention, in training and afterwards"""

    def __post_init__(self) -> None:
        """Refuse values that mean nothing."""
        if self.length < 0:
            raise ValueError(f"length must be 0 or a number of tokens, got {self.length}")
        if self.theta and not self.theta > 1:
            raise ValueError(f"theta must be above 1 (or 0 for the model's own), got {self.theta}")
        if self.factor and not self.factor >= 1:
            raise ValueError(f"factor must be at least 1 (or 0), got {self.factor}")
        if self.log_origin and self.log_origin < 2:
            raise ValueError(f"log_origin must be 0 (off) or at least 2 keys, got {self.log_origin}")
        if self.factor and self.rope == "default":
            raise ValueError(f"factor ({self.factor}) is for the kinds that scale: rope default changes theta alone")


@dataclass(frozen=True)
class Data:
    """What is learned from.

    Raises:
        ValueError: naming the field, what it got and its range.

    >>> Data(train=("redpajama.jsonl[5000]",)).sources
    (('redpajama.jsonl', 5000),)
    """

    train: tuple[str, ...] = ()
    """JSON Lines of ``conversations`` or ``text``; FILE[N] takes N rows of it at random"""
    evaluate: tuple[str, ...] = ()
    """files of the same kind, for the evaluations on the way"""
    max_length: int = 4096
    """tokens; longer conversations are left out, longer texts are cut"""
    min_length: int = 0
    """tokens; shorter rows are left out"""
    pack: bool = False
    """put several rows into one of max_length tokens; they do not see each other"""
    seed: int = 42
    """of the rows that FILE[N] takes"""
    spread: Spread = field(default_factory=Spread)
    """position-skipping training (PoSE): positions of short samples spread over a long range"""

    def __post_init__(self) -> None:
        """Refuse values that mean nothing."""
        if self.max_length < 2:
            raise ValueError(f"max_length must be at least 2, got {self.max_length}")
        if not 0 <= self.min_length <= self.max_length:
            raise ValueError(f"min_length must lie between 0 and max_length ({self.max_length}), got {self.min_length}")
        if self.pack and self.spread.length:
            raise ValueError("pack and spread exclude each other: gaps in positions mark where packed rows begin")
        if self.spread.length and self.spread.length < self.max_length:
            raise ValueError(f"spread.length must be at least max_length ({self.max_length}), got {self.spread.length}")

    @property
    def sources(self) -> tuple[tuple[str, int], ...]:
        """The training files, each with the rows to take of it (0 = all)."""
        return tuple(source(words) for words in self.train)


def source(words: str) -> tuple[str, int]:
    """Return the file and the number of rows that ``FILE[N]`` means; 0 = all.

    Raises:
        ValueError: N is no positive number.

    >>> source("a.jsonl[20]"), source("b.jsonl")
    (('a.jsonl', 20), ('b.jsonl', 0))
    """
    found = re.fullmatch(r"(.+)\[([^\[\]]*)\]", words)
    if found is None:
        return words, 0
    if not found[2].isdigit() or int(found[2]) < 1:
        raise ValueError(f"the number of rows in {words!r} must be a positive integer, got {found[2]!r}")
    return found[1], int(found[2])
