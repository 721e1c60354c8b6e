"""How much a training step computes and moves, and how long that takes at a machine's speed."""

from __future__ import annotations

from dataclasses import dataclass

from longllm.planning.memory import Setting
from longllm.planning.sizes import MLP, Sizes

#: operations that a processor makes while it moves one byte of its memory, or one byte to the host and back: what makes
#: unpacking, small chunks and offloading comparable with computing. Orders of magnitude, not measurements.
PER_BYTE = {"cpu": 10.0, "cuda": 300.0}
PER_HOST_BYTE = 20_000.0
#: multiplications of an attention layer forward, and backward (where scores are computed again)
FORWARD, BACKWARD = 2, 5


@dataclass(frozen=True)
class Work:
    """Floating-point operations of one training step, and memory traffic in the operations that fit into its time.

    >>> Work(1e12, 2e12, 0.0, 0.0).total
    3000000000000.0
    """

    forward: float
    backward: float
    recomputed: float
    moved: float
    """traffic of unpacking NF4, of reading the head once a chunk, and of offloading"""

    @property
    def operations(self) -> float:
        """Floating-point operations alone."""
        return self.forward + self.backward + self.recomputed

    @property
    def total(self) -> float:
        """All of it."""
        return self.operations + self.moved


@dataclass(frozen=True)
class Speed:
    """How fast a machine works.

    Raises:
        ValueError: naming the field, what it got and its range.

    >>> Speed(1e12).seconds(Work(1e12, 2e12, 0.0, 0.0))
    3.0
    """

    per_second: float
    """floating-point operations a second, as training reaches them"""
    overhead: float = 0.0
    """seconds of a step that do not depend on its length"""
    source: str = "given"
    """where the figures come from"""

    def __post_init__(self) -> None:
        """Refuse values that mean nothing."""
        if not 0 < self.per_second < float("inf"):
            raise ValueError(f"per_second must be a positive number, got {self.per_second}")
        if not 0 <= self.overhead < float("inf"):
            raise ValueError(f"overhead must be 0 or a positive number, got {self.overhead}")

    def seconds(self, work: Work) -> float:
        """Return the seconds that a step takes."""
        return self.overhead + work.total / self.per_second

    @classmethod
    def fitted(cls, short: tuple[Work, float], long: tuple[Work, float]) -> Speed:
        """Return the speed that two measured steps (work, seconds) show.

        >>> one, two = Work(1e9, 2e9, 0.0, 0.0), Work(2e9, 4e9, 0.0, 0.0)
        >>> Speed.fitted((one, 2.0), (two, 3.0))
        Speed(per_second=3000000000.0, overhead=1.0, source='two probe steps')
        """
        (less, quick), (more, slow) = short, long
        speed = (more.total - less.total) / (slow - quick) if slow > quick and more.total > less.total else 0.0
        # On a busy machine the shorter step may come out slower: then the longer one alone counts.
        speed = max(speed, more.total / slow)
        return cls(speed, max(0.0, quick - less.total / speed), "two probe steps")


def step_work(sizes: Sizes, setting: Setting) -> Work:
    """Return the work of one training step.

    >>> from longllm.recipe import Base
    >>> tiny = Sizes("llama", 8, 16, 2, 2, 1, 4, 10)
    >>> plain, again = (step_work(tiny, Setting(64, Base(recompute=how))) for how in ("off", "on"))
    >>> plain.recomputed, again.recomputed > 0.5 * again.forward, plain.backward == again.backward
    (0.0, True, True)
    """
    tokens, lora, base = setting.tokens, setting.lora, setting.base
    queries = sizes.heads * sizes.head_dim
    seen = 0.0
    for layer in range(sizes.layers):
        window = min(sizes.window(layer) or setting.length, setting.length)
        # Of causal attention, half the square; of a window, the band.
        seen += window * (setting.length - window / 2) / setting.length
    adapters = sizes.trainable(lora) - sum(map(sizes.module, set(lora.whole))) if lora.rank else 0
    head = sizes.embedding
    layers = tokens * (2 * (sizes.matrices + adapters) + 2 * FORWARD * queries * seen)
    # What is frozen passes gradients on; what learns takes its own as well.
    learning = 2 * sizes.matrices if not lora.rank else 2 * adapters
    learned_head = 2 * head if not lora.rank or "lm_head" in lora.whole else 0
    forward = layers + tokens * 2 * head
    backward = tokens * (2 * (sizes.matrices + adapters) + learning + 2 * BACKWARD * queries * seen + 2 * head)
    backward += tokens * learned_head
    share = sum(setting.recomputed(layer) for layer in range(sizes.layers)) / sizes.layers
    skipped = 0
    if lora.rank and "down_proj" not in lora.targets:
        # Recomputation stops at the last tensor that is needed, which is the input of this projection.
        inputs, outputs = sizes.linear[MLP[2]]
        skipped = 2 * tokens * sizes.layers * inputs * outputs
    recomputed = share * (layers - skipped)
    moved = PER_BYTE[setting.device] * sizes.embedding * 2 * setting.number * -(-tokens // base.head_chunk)
    if base.nf4:
        passes = 2 + share
        moved += PER_BYTE[setting.device] * passes * sizes.matrices * (0.5 + 2 * setting.number)
    if base.recompute == "offload":
        moved += PER_HOST_BYTE * tokens * share * sizes.layers * sizes.hidden * setting.number
    passes = setting.accumulation
    return Work(passes * forward, passes * backward, passes * recomputed, passes * moved)
