"""How many bytes a run takes at its most, part by part, at each moment that can be the worst.

What a layer saves for the backward pass is what autograd really keeps in transformers' Llama code, tensor by tensor;
a test counts it with saved-tensor hooks. On top come what is alive for a moment only: the logits of a chunk, a layer
that is computed again, the backward pass of its MLP.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from longllm.planning.activations import (
    backward_bytes,
    kept_bytes,
    layer_saved,
    position_bytes,
    saved_bytes,
)
from longllm.planning.sizes import Sizes
from longllm.recipe import Base
from training.adapters import LoraSettings

#: bytes of a number that learns, and of its gradient; of AdamW's two moments
LEARNING, MOMENTS = 4, 8
#: bytes of a logit: in fp32, its exponential beside it
LOGITS = 2 * 4
#: bytes of a token in a batch: id, position, target, mask
BATCH = 4 * 8
#: NF4 with double quantisation: weights to a constant of 8 bits, constants to one of 32
BLOCK, BLOCKS = 64, 256
Place = Literal["cpu", "cuda"]


@dataclass(frozen=True)
class Setting:
    """A training run as far as its memory and time depend on it.

    Raises:
        ValueError: naming the field, what it got and its range.

    >>> Setting(length=81920, base=Base(dtype="bf16")).number
    2
    """

    length: int
    """tokens of a row"""
    base: Base = field(default_factory=Base)
    """the frozen model: dtype, NF4, attention path, recomputation, chunk of logits"""
    lora: LoraSettings = field(default_factory=LoraSettings)
    """which weights learn"""
    batch: int = 1
    """rows in one forward pass"""
    accumulation: int = 1
    """forward passes in one step"""
    device: Place = "cpu"
    """where it is to run"""

    def __post_init__(self) -> None:
        """Refuse values that mean nothing."""
        for name in ("length", "batch", "accumulation"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.device not in ("cpu", "cuda"):
            raise ValueError(f"device must be cpu or cuda, got {self.device!r}")
        if self.base.recompute == "offload" and self.device == "cpu":
            raise ValueError("recompute offload moves activations to the host: it needs device cuda, got cpu")
        if self.base.nf4 and not self.lora.rank:
            raise ValueError("lora.rank 0 lets every weight learn, which base.nf4 cannot: choose a rank, or nf4 off")

    @property
    def number(self) -> int:
        """Bytes of a number in the frozen weights and the computation; auto is bf16 on CUDA and fp32 on a CPU."""
        auto = "fp32" if self.device == "cpu" or not self.lora.rank else "bf16"
        return 4 if (auto if self.base.dtype == "auto" else self.base.dtype) == "fp32" else 2

    @property
    def tokens(self) -> int:
        """Tokens in one forward pass."""
        return self.batch * self.length

    def recomputed(self, layer: int) -> bool:
        """Say whether a layer keeps its input only."""
        return self.base.recompute != "off" and layer % self.base.recompute_every == 0


@dataclass(frozen=True)
class Memory:
    """Bytes by part at each moment that can be the worst.

    >>> Memory({"loading": {"weights": 6}, "loss": {"weights": 4, "logits": 3}}).worst
    'loss'
    """

    moments: dict[str, dict[str, int]]
    """moment -> part -> bytes"""
    host: int = 0
    """bytes that offloading holds in the host's memory"""

    @property
    def worst(self) -> str:
        """The moment that takes most."""
        return max(self.moments, key=self.total)

    @property
    def parts(self) -> dict[str, int]:
        """Bytes by part at the worst moment; they add up to the peak."""
        return {part: size for part, size in self.moments[self.worst].items() if size}

    @property
    def peak(self) -> int:
        """Most bytes at any moment."""
        return self.total(self.worst)

    def total(self, moment: str) -> int:
        """Return the bytes of a moment."""
        return sum(self.moments[moment].values())


def nf4_bytes(matrices: int) -> int:
    """Return the bytes of weights held in NF4 with double quantisation.

    >>> nf4_bytes(64 * 256)
    8452
    """
    constants = -(-matrices // BLOCK)
    return matrices // 2 + constants + 4 * -(-constants // BLOCKS)


def logits_bytes(vocabulary: int, tokens: int, chunk: int) -> int:
    """Return the bytes of logits that are alive at once in ``linear_cross_entropy``.

    From the second chunk on, the gradient of the one before is still there while the next is computed.

    >>> logits_bytes(10, 64, 64), logits_bytes(10, 128, 64), logits_bytes(10, 4096, 64)
    (5120, 7680, 7680)
    """
    first = LOGITS * min(chunk, tokens)
    later = LOGITS * min(chunk, tokens - chunk) + LOGITS // 2 * chunk if tokens > chunk else 0
    return vocabulary * max(first, later)


def held_weights(sizes: Sizes, number: int, nf4: bool, device: Place) -> tuple[dict[str, int], int]:
    """Return the bytes of a loaded model by part, and the bytes of its files that are mapped only while it loads.

    On a CPU, weights whose files hold them in the dtype asked for stay in the mapped files: they take no second copy,
    and in NF4 the files' pages stay beside the 4-bit weights, until the kernel wants them back.
    """
    outer = sizes.embedding * (1 if sizes.tied else 2)
    layers = nf4_bytes(sizes.matrices) if nf4 else sizes.matrices * number
    parts = {"weights: layers": layers + sizes.vectors * number, "weights: embedding and head": outer * number}
    if device == "cuda":
        return parts, 0
    files = int(sizes.stored * sizes.parameters)
    if abs(sizes.stored - number) > 0.1:
        return parts, files
    return {**parts, "weights: mapped files": sizes.matrices * number if nf4 else 0}, 0


def training_memory(sizes: Sizes, setting: Setting) -> Memory:
    """Predict the memory of a training run.

    Counted is what the run itself holds. The interpreter with its libraries (about 0.8 GB of host memory), and on a GPU
    the CUDA context (about 0.5 GB) and what its allocator cannot use, come on top.

    Raises:
        ValueError: no layer has one of the names that are to learn.

    >>> llama = Sizes("llama", 4096, 14336, 32, 32, 8, 128, 128256)
    >>> recipe = Base(dtype="bf16", nf4=True, recompute="on", head_chunk=512)
    >>> memory = training_memory(llama, Setting(81920, recipe, LoraSettings(whole=("embed_tokens",)), device="cuda"))
    >>> memory.worst, round(memory.peak / 1e9)
    ('backward pass', 59)
    """
    learning = sizes.trainable(setting.lora)
    number, tokens = setting.number, setting.tokens
    held, mapped = held_weights(sizes, number, setting.base.nf4, setting.device)
    loading = {**held, "weights: mapped files": held.get("weights: mapped files", 0) + mapped}
    if not setting.lora.rank:
        held = dict.fromkeys(held, 0)
    held = {**held, "weights that learn": learning * LEARNING, "optimizer": learning * MOMENTS}
    gradients = learning * LEARNING
    head = sizes.embedding * LEARNING if not setting.lora.rank or "lm_head" in setting.lora.whole else 0
    before = gradients if setting.accumulation > 1 else 0
    kept = [kept_bytes(sizes, setting, layer) for layer in range(sizes.layers)]
    shared = tokens * (BATCH + position_bytes(sizes, number))
    loss = {
        **held,
        "gradients": before + head,
        "activations": saved_bytes(sizes, setting) + tokens * BATCH,
        "hidden states at the head": tokens * (3 * number * sizes.hidden + 8),
        "logits": logits_bytes(sizes.vocabulary, tokens, setting.base.head_chunk) + head,
    }
    largest = max(_largest(sizes, setting.lora), sizes.embedding if sizes.tied and not setting.lora.rank else 0)
    step = {**held, "gradients": gradients, "optimizer's own work": 2 * LEARNING * largest}
    moments = {"loading": loading, "loss": loss, "backward pass": {}, "optimizer step": step}
    moments["backward pass"] = _backward(sizes, setting, held, kept, shared, max(before, head))
    offloaded = sum(setting.recomputed(layer) for layer in range(sizes.layers))
    host = tokens * number * sizes.hidden * offloaded if setting.base.recompute == "offload" else 0
    return Memory(moments, host)


def _backward(
    sizes: Sizes, setting: Setting, held: dict[str, int], kept: list[int], shared: int, before: int
) -> dict[str, int]:
    """Return the parts at the layer whose backward pass takes most: gradients grow while activations go."""
    gradients = sizes.trainable(setting.lora) * LEARNING
    outer = sum(map(sizes.module, set(setting.lora.whole) & {"embed_tokens", "lm_head"})) * LEARNING
    inner = gradients - (outer if setting.lora.rank else sizes.embedding * LEARNING)
    stream = 2 * setting.tokens * setting.number * sizes.hidden
    worst: dict[str, int] = {}
    for layer in range(sizes.layers):
        own = layer_saved(sizes, setting, layer) if setting.recomputed(layer) else 0
        # In fp32 the input that was kept is the one that the computed layer saves.
        again = own - (kept[layer] if own and setting.number == 4 and kept[layer] else 0)
        done = before if setting.accumulation > 1 else before + inner * (sizes.layers - 1 - layer) // sizes.layers
        parts = {
            **held,
            "gradients": done,
            "activations": sum(kept[: layer + 1]) + shared,
            "layer computed again": again,
            "backward pass of a layer": stream + backward_bytes(sizes, setting),
        }
        worst = max(worst, parts, key=lambda found: sum(found.values()))
    return worst


def _largest(sizes: Sizes, lora: LoraSettings) -> int:
    """Return the weights of the largest single tensor that learns."""
    if not lora.rank:
        return max(sizes.embedding, *(inputs * outputs for inputs, outputs in sizes.linear.values()))
    low = max(lora.rank * max(sizes.linear[name]) for name in lora.targets)
    return max([low, *(sizes.module(name) for name in lora.whole if name in ("embed_tokens", "lm_head"))])


def inference_memory(
    sizes: Sizes,
    length: int,
    *,
    number: int = 2,
    nf4: bool = False,
    batch: int = 1,
    chunk: int = 1024,
    ratio: float = 1.0,
    device: Place = "cuda",
) -> Memory:
    """Predict the memory of reading a prompt and answering.

    Args:
        sizes: of the model.
        length: tokens of prompt and answer together.
        number: bytes of a number in weights, keys and values.
        nf4: the weights are held in 4 bits.
        batch: prompts read side by side.
        chunk: tokens of a prompt that are read at once.
        ratio: tokens to one slot of a compressed cache; the chunk being read is there in full beside it.
        device: where it is to run.

    Raises:
        ValueError: a number that makes no sense.

    >>> llama = Sizes("llama", 4096, 14336, 32, 32, 8, 128, 128256)
    >>> inference_memory(llama, 81920).parts["keys and values"]
    10737418240
    """
    for name, value in (("length", length), ("batch", batch), ("chunk", chunk), ("ratio", ratio)):
        if not value >= 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    held, mapped = held_weights(sizes, number, nf4, device)
    slots, chunk = 0, min(chunk, length)
    for layer in range(sizes.layers):
        seen = length if ratio == 1 else min(length, -(-length // ratio) + chunk)
        slots += int(min(seen, sizes.window(layer) + chunk) if sizes.window(layer) else seen)
    token = 2 * sizes.kv_heads * sizes.head_dim * number
    work = max(3 * sizes.intermediate * number, 2 * 4 * sizes.hidden) + 3 * sizes.hidden * number
    reading = {
        **held,
        "keys and values": batch * slots * token,
        "activations of a chunk": batch * chunk * (work + position_bytes(sizes, number)),
        "logits": batch * sizes.vocabulary * LOGITS,
    }
    loading = {**held, "weights: mapped files": held.get("weights: mapped files", 0) + mapped}
    return Memory({"loading": loading, "reading": reading})
