"""How long and how fast to learn, and what to keep on the way. Standard library only: command lines name these."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

Schedule = Literal["linear", "cosine", "constant"]


@dataclass(frozen=True)
class Optimisation:
    """AdamW, its learning rate over time, and the size of a step.

    Raises:
        ValueError: naming the field, what it got and its range.

    >>> Optimisation(learning_rate=1e-3, max_steps=100).rate(0.5)
    0.0005
    """

    learning_rate: float = 5e-5
    """highest learning rate"""
    schedule: Schedule = "linear"
    """how the rate falls after the warm-up: linear or cosine to zero, or constant"""
    warmup: float = 0.0
    """share of all steps in which the rate rises from zero"""
    weight_decay: float = 0.0
    """AdamW's decay of weight matrices"""
    clip: float = 1.0
    """largest norm of the gradient; 0 = no limit"""
    batch_size: int = 1
    """rows in one forward pass, per process"""
    accumulation: int = 1
    """forward passes in one step"""
    epochs: float = 1.0
    """passes over the rows"""
    max_steps: int = 0
    """steps in all, instead of epochs; 0 = epochs decide"""
    seed: int = 0
    """of the order of rows, of dropout and of whatever a recipe draws"""
    group_by_length: bool = False
    """put rows of like length into one step, so that less padding is computed"""

    def __post_init__(self) -> None:
        """Refuse values that mean nothing."""
        for name in ("learning_rate", "epochs"):
            if not 0 < getattr(self, name) < float("inf"):
                raise ValueError(f"{name} must be a positive number, got {getattr(self, name)}")
        for name in ("weight_decay", "clip"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise ValueError(f"{name} must be 0 or a positive number, got {getattr(self, name)}")
        for name in ("batch_size", "accumulation"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.schedule not in ("linear", "cosine", "constant"):
            raise ValueError(f"schedule must be linear, cosine or constant, got {self.schedule!r}")
        if not 0 <= self.warmup < 1:
            raise ValueError(f"warmup must lie between 0 and 1 (a share of all steps), got {self.warmup}")
        if self.max_steps < 0:
            raise ValueError(f"max_steps must be 0 or a number of steps, got {self.max_steps}")

    def steps(self, per_epoch: int) -> int:
        """Return the number of steps in all, where an epoch has ``per_epoch``."""
        return self.max_steps or math.ceil(self.epochs * per_epoch)

    def rate(self, share: float) -> float:
        """Return the learning rate after ``share`` of all steps."""
        if share < self.warmup:
            return self.learning_rate * share / self.warmup
        if self.schedule == "constant":
            return self.learning_rate
        left = max(0.0, (1 - share) / (1 - self.warmup))
        return self.learning_rate * (left if self.schedule == "linear" else (1 - math.cos(math.pi * left)) / 2)


@dataclass(frozen=True)
class Keeping:
    """When to log, evaluate and save, when to stop early, and whether to go on from what is there.

    Raises:
        ValueError: naming the field, what it got and its range.

    >>> Keeping(save_every=50).resume
    'auto'
    """

    log_every: int = 5
    """steps between two lines of metrics.jsonl"""
    eval_every: int = 0
    """steps between two evaluations; 0 = only at the end"""
    save_every: int = 100
    """steps between two checkpoints; 0 = only at the end"""
    keep: int = 2
    """latest checkpoints that stay on disk, besides the best one"""
    patience: int = 0
    """stop after so many evaluations without a better one; 0 = never"""
    metric: str = "loss"
    """figure of the evaluation that decides which checkpoint is best"""
    higher_is_better: bool = False
    """whether a larger figure is the better one"""
    resume: Literal["auto", "never"] = "auto"
    """auto goes on from the last checkpoint of the same run; never refuses a folder that holds one"""
    minutes: float = 0.0
    """save and stop after so many minutes, to be resumed; 0 = no limit"""

    def __post_init__(self) -> None:
        """Refuse values that mean nothing."""
        for name in ("eval_every", "save_every", "patience", "minutes"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name} must be 0 or more, got {getattr(self, name)}")
        for name in ("log_every", "keep"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.patience and not self.eval_every:
            raise ValueError(f"patience ({self.patience}) needs evaluations on the way: set eval_every")
        if self.resume not in ("auto", "never"):
            raise ValueError(f"resume must be auto or never, got {self.resume!r}")

    def check(self, evaluate: Sequence[str]) -> None:
        """Compare with the files that are evaluated on.

        Raises:
            ValueError: evaluations on the way without a file for them.
        """
        if self.eval_every and not evaluate:
            raise ValueError(f"keeping.eval_every ({self.eval_every}) needs data.evaluate: name a file")

    def better(self, new: float, old: float | None) -> bool:
        """Say whether a figure beats the best one so far; what is no number never does."""
        if new != new:
            return False
        return old is None or (new > old if self.higher_is_better else new < old)
