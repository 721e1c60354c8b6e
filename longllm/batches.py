"""From samples to batches: positions, targets shifted once, padding; and the loss of a causal model on them."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from longllm.linear_cross_entropy import CHUNK, IGNORED, linear_cross_entropy
from longllm.positions import Spread
from longllm.samples import Samples, packed

#: positions as they are
NATURAL = Spread()


@dataclass(frozen=True)
class Collator:
    """Makes the batch of some rows (of packs of rows, if ``packs`` is given).

    A batch holds input_ids, position_ids and targets [rows, length] (targets already shifted: that of a token is the
    next one), attention_mask [rows, length] unless rows are packed, and ``weight``, the number of targets.

    Raises:
        ValueError: packed rows that are to be split among processes.
    """

    samples: Samples
    spread: Spread = NATURAL
    packs: tuple[tuple[int, ...], ...] | None = None
    pad_id: int = 0
    device: torch.device | str = "cpu"
    multiple: int = 1
    """the length of a batch is a multiple of this, as context parallelism wants it; above 1 there is no mask, for which
    it has no use: padding stands behind, where a causal model does not see it"""

    def __post_init__(self) -> None:
        """Refuse what cannot be."""
        if self.packs is not None and self.multiple > 1:
            raise ValueError("packed rows cannot be split among processes: set pack off, or cp_size to 1")

    @classmethod
    def of(cls, samples: Samples, *, room: int = 0, **options: Any) -> Collator:
        """Return a collator; with ``room`` (tokens), rows are packed into it."""
        packs = tuple(map(tuple, packed(samples.lengths, room))) if room else None
        return cls(samples, packs=packs, **options)

    @property
    def lengths(self) -> list[int]:
        """Tokens of each row (or pack)."""
        lengths = self.samples.lengths
        return lengths if self.packs is None else [sum(lengths[row] for row in pack) for pack in self.packs]

    def __call__(self, rows: Sequence[int], seeds: Sequence[str]) -> dict[str, Any]:
        """Return the batch of ``rows``; the spread positions of each are drawn from its own seed."""
        lines = [
            self._line([row] if self.packs is None else self.packs[row], random.Random(seed))
            for row, seed in zip(rows, seeds, strict=True)
        ]
        width = -(-max(len(line[0]) for line in lines) // self.multiple) * self.multiple
        if self.packs is not None and len(lines) > 1:
            raise ValueError("packed rows are batches by themselves: set batch_size to 1")
        ids, positions, targets = (
            torch.tensor([line[part] + [fill] * (width - len(line[part])) for line in lines], device=self.device)
            for part, fill in ((0, self.pad_id), (1, 0), (2, IGNORED))
        )
        batch = {"input_ids": ids, "position_ids": positions, "targets": targets}
        if self.packs is None and self.multiple == 1:
            # Without a mask transformers takes every jump of the positions for the beginning of a packed row.
            real = torch.tensor([[len(line[0])] for line in lines], device=self.device)
            batch["attention_mask"] = (torch.arange(width, device=self.device) < real).long()
        return {**batch, "weight": int((targets != IGNORED).sum())}

    def _line(self, rows: Sequence[int], draws: random.Random) -> tuple[list[int], list[int], list[int]]:
        """Return ids, positions and targets of rows one behind the other."""
        ids: list[int] = []
        positions: list[int] = []
        targets: list[int] = []
        for row in rows:
            own, labels = self.samples[row]
            ids += own
            positions += self.spread.positions(len(own), draws)
            targets += [*labels[1:], IGNORED]
        return ids, positions, targets


@dataclass(frozen=True)
class CausalLoss:
    """The summed cross-entropy of a batch under a causal model, whose logits never exist as a whole.

    The model must be ``headless`` while this is in use.
    """

    head: torch.nn.Module
    """the linear layer from hidden states to logits"""
    softcap: float | None = None
    chunk: int = CHUNK

    def __call__(self, model: Any, batch: Mapping[str, Any]) -> torch.Tensor:
        """Return the sum of the loss over the batch's targets."""
        inputs = {name: batch[name] for name in ("input_ids", "position_ids", "attention_mask") if name in batch}
        hidden = model(**inputs, use_cache=False).logits
        weight: Any = self.head.weight
        bias: Any = getattr(self.head, "bias", None)
        if hasattr(weight, "full_tensor"):  # sharded by FSDP
            weight = weight.full_tensor()
            bias = None if bias is None else bias.full_tensor()
        return linear_cross_entropy(hidden, weight, batch["targets"], bias, softcap=self.softcap, chunk=self.chunk)


@contextlib.contextmanager
def headless(model: Any, chunk: int = CHUNK) -> Iterator[CausalLoss]:
    """Let a causal model return its last hidden states in place of logits, and yield the loss that adds the head.

    Whatever wraps the model (peft, DDP, FSDP) is called as always, so that its hooks run.

    Raises:
        ValueError: the head is no plain linear layer.
    """
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    head = base.get_output_embeddings()
    own = _plain_head(head)
    text = base.config.get_text_config(decoder=True)
    softcap = getattr(text, "final_logit_softcapping", None)
    # accelerate, too, puts a forward of its own on the module.
    before = vars(head).get("forward")
    head.forward = _same
    if softcap is not None:
        text.final_logit_softcapping = None
    try:
        # A factor that a model puts on its logits (Granite, Cohere) falls on the hidden states instead: the same thing.
        yield CausalLoss(own, softcap, chunk)
    finally:
        del head.forward
        if before is not None:
            head.forward = before
        if softcap is not None:
            text.final_logit_softcapping = softcap


def _plain_head(head: Any) -> torch.nn.Module:
    """Return the module whose weight and bias are the head in force, seen through what peft has wrapped it in.

    Raises:
        ValueError: it is no linear layer, or has an adapter.
    """
    whole, tied = getattr(head, "modules_to_save", None), getattr(head, "token_adapter", None)
    own = head if whole is None else whole[head.active_adapters[0]]
    plain = own if tied is None else tied.base_layer
    # Of a head that follows single learned embeddings, the wrapper itself has the weight as it stands.
    if not isinstance(plain, torch.nn.Linear) or (tied is not None and plain.bias is not None):
        raise ValueError(f"the model's head must be a linear layer without an adapter, got {type(plain).__name__}")
    return own


def _same(hidden: torch.Tensor) -> torch.Tensor:
    """Stand in for the head."""
    return hidden


def batch_loss(loss: CausalLoss, model: Any, batches: Iterable[Mapping[str, Any]]) -> float:
    """Return the mean loss per target over some batches, in nats."""
    total = targets = 0.0
    with torch.no_grad():
        for batch in batches:
            total += float(loss(model, batch))
            targets += batch["weight"]
    return total / targets if targets else float("nan")
