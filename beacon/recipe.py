"""The settings of a beacon training run, as a command line or a YAML file gives them. Standard library only."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from beacon.config import BeaconConfig, Placement, Scheme
from longllm.recipe import Base
from training.settings import Keeping, Optimisation

WINDOW, PARAM = 1024, ("q", "k", "v")
LEARNABLE = ("embedding", "q", "k", "v", "o")


@dataclass(frozen=True)
class Beacons:
    """The beacons that learn.

    Raises:
        ValueError: naming the field, what it got and its range.

    >>> Beacons(window=512, ratio=(4,)).config().stride
    512
    """

    start: str = ""
    """folder of beacons to go on from, as fine-tuning does from pre-training; its window, placement and projections
    stay; empty = untrained ones"""
    window: int = 0
    """raw tokens that are read together; 0 = those of start, else 1,024"""
    ratio: tuple[int, ...] = (2, 4, 8, 16, 32)
    """raw tokens per beacon, to choose from for each window (fine-tuning: 2, 4, 8)"""
    ratio_mix: str = "step-random"
    """how a window's ratio is chosen: step-random, instance-random, sequence or adapt-N"""
    param: tuple[str, ...] = ()
    """projections that beacons have of their own, of q, k, v and o; empty = those of start, else q, k and v"""
    rank: int = 0
    """0 = full projections, as in released checkpoints; above, low-rank additions to the base model's"""
    learn: tuple[str, ...] = LEARNABLE
    """what of the beacons learns: embedding, q, k, v, o"""
    pos: Placement = "interleave"
    """of new beacons: interleave, or append at the end of a window"""
    attn: Scheme = "full-coverage"
    """of new beacons: full-coverage, or step-expansion (with append)"""
    attend_prev: bool = True
    """step-expansion: whether a new beacon sees the earlier ones of its window"""
    sink_size: int = 0
    """of new beacons: first slots of a text that are always kept"""
    embed_init: Literal["eos", "bos"] = "eos"
    """token whose embedding new beacons start from"""

    def __post_init__(self) -> None:
        """Refuse values that mean nothing."""
        if self.window < 0 or self.rank < 0:
            raise ValueError(f"window and rank must be 0 or more, got {self.window} and {self.rank}")
        if unknown := sorted(set(self.learn) - set(LEARNABLE)):
            raise ValueError(f"learn must name some of {', '.join(LEARNABLE)}, got {unknown[0]!r}")
        if not self.learn:
            raise ValueError("learn is empty: nothing would be trained")
        if not self.start:
            self.config()

    def config(self) -> BeaconConfig:
        """Return what new beacons are."""
        size = self.window or WINDOW
        return BeaconConfig(
            window=size,
            stride=size,
            attn=self.attn,
            ratio=self.ratio,
            ratio_mix=self.ratio_mix,
            param=self.param or PARAM,
            embed_init=self.embed_init,
            sink_size=self.sink_size,
            attend_prev=self.attend_prev,
            pos=self.pos,
        )


@dataclass(frozen=True)
class Texts:
    """What is learned from.

    Raises:
        ValueError: naming the field, what it got and its range.

    >>> Texts(train=("redpajama.jsonl",)).max_length
    20000
    """

    train: tuple[str, ...] = ()
    """JSON Lines of ``text`` (pre-training) or ``conversations`` (fine-tuning); FILE[N] takes N rows of it at random"""
    evaluate: tuple[str, ...] = ()
    """files of the same kind, for the evaluations on the way"""
    max_length: int = 20000
    """tokens; longer conversations are left out, longer texts are cut"""
    min_length: int = 0
    """tokens; shorter rows are left out. Below two windows there is little to learn (the paper: 2,400 and 7,200)"""
    seed: int = 42
    """of the rows that FILE[N] takes"""
    ratios: tuple[int, ...] = ()
    """ratios at which the rows of evaluate are read, one after the other; empty = those that are learned"""
    strict: bool = False
    """several processes: only rows with equally many windows share a step, others are left out, so that no process
    waits for another (FSDP needs it)"""

    def __post_init__(self) -> None:
        """Refuse values that mean nothing."""
        if self.max_length < 2 or not 0 <= self.min_length <= self.max_length:
            raise ValueError(
                f"lengths must be 0 <= min_length <= max_length, at least 2; got {self.min_length}, {self.max_length}"
            )
        if any(ratio < 0 for ratio in self.ratios):
            raise ValueError(f"ratios must be 0 or more, got {list(self.ratios)}")


@dataclass(frozen=True)
class Objective:
    """What is minimised.

    Raises:
        ValueError: naming the field, what it got and its range.

    >>> Objective(distil=0.5).temperature
    1.0
    """

    first_window: Literal["auto", "count", "skip"] = "auto"
    """whether targets of the first window count; auto is the reference's rule: in training they do where its beacons
    learn from them, interleaved with full coverage"""
    last_window: Literal["auto", "plain", "beacons"] = "auto"
    """plain = the window that ends a text gets no beacons; beacons = as when the model is used; auto = the reference's
    rule, plain in training"""
    distil: float = 0.0
    """share of the divergence from the model's own reading without beacons; the rest is the plain loss"""
    temperature: float = 1.0
    """softens both distributions of that divergence"""

    def __post_init__(self) -> None:
        """Refuse values that mean nothing."""
        if not 0 <= self.distil <= 1 or not self.temperature > 0:
            raise ValueError(
                f"distil must lie between 0 and 1 and temperature above 0, got {self.distil} and {self.temperature}"
            )
        for name, known in (("first_window", ("auto", "count", "skip")), ("last_window", ("auto", "plain", "beacons"))):
            if getattr(self, name) not in known:
                raise ValueError(f"{name} must be one of {', '.join(known)}, got {getattr(self, name)!r}")

    def skips_first(self, config: BeaconConfig, training: bool) -> bool:
        """Say whether targets of the first window are left out.

        >>> Objective().skips_first(BeaconConfig(pos="append"), training=True)
        True
        """
        if self.first_window == "auto":
            return training and (config.pos, config.attn) != ("interleave", "full-coverage")
        return self.first_window == "skip"

    def text_ends(self, training: bool) -> bool:
        """Say whether the last window of a text gets no beacons."""
        return training if self.last_window == "auto" else self.last_window == "plain"


@dataclass(frozen=True)
class Recipe:
    """Everything that a run is made of.

    Raises:
        ValueError: settings that contradict each other.

    >>> Recipe().beacons.ratio
    (2, 4, 8, 16, 32)
    """

    base: Base = field(default_factory=Base)
    beacons: Beacons = field(default_factory=Beacons)
    data: Texts = field(default_factory=Texts)
    objective: Objective = field(default_factory=Objective)
    optimisation: Optimisation = field(default_factory=Optimisation)
    keeping: Keeping = field(default_factory=Keeping)

    def __post_init__(self) -> None:
        """Refuse settings that contradict each other, before anything is loaded."""
        base = self.base
        if base.recompute == "offload" or base.recompute_every != 1:
            raise ValueError(
                "beacons recompute whole windows: base.recompute must be off or on, and base.recompute_every 1; got "
                f"{base.recompute} and {base.recompute_every}"
            )
        if base.nf4 and not self.beacons.start and not self.beacons.rank:
            raise ValueError("base.nf4 leaves no full projections to start from: set beacons.rank, or nf4 off")
        self.keeping.check(self.data.evaluate)
