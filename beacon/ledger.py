"""The account of a compressed run: tokens seen, bytes before and after, what was kept and where it stood."""

from __future__ import annotations

import itertools
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

import torch

from flashcore.hf.cache import cache_bytes

if TYPE_CHECKING:
    from beacon.request import RequestCache

_BARS = "▁▂▃▄▅▆▇█"
_PARTS = 10


@dataclass(frozen=True)
class LayerEntry:
    """One layer's account.

    >>> LayerEntry(layer=0, kind="full", slots=(512,), nbytes=786_432, full_bytes=6_291_456, span=(0, 4095)).slots
    (512,)
    """

    layer: int
    kind: str
    """full, or sliding: bounded by itself, never compressed"""
    slots: tuple[int, ...]
    """[row] slots held per key head"""
    nbytes: int
    """bytes of keys and values, reserved room included"""
    full_bytes: int
    """bytes that full attention (or the sliding window) would hold for the same tokens"""
    span: tuple[int, int] | None
    """lowest and highest true position that some head of some row holds; None if nothing is held"""


@dataclass(frozen=True)
class Ledger:
    """What a compressed cache has seen and kept; ``str()`` is the table for people, ``record()`` for programs.

    >>> import beacon
    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> model = LlamaForCausalLM(LlamaConfig(vocab_size=9, hidden_size=8, intermediate_size=8, num_hidden_layers=1,
    ...                                      num_attention_heads=2)).eval()
    >>> cache = beacon.CompressedCache(model, beacon.method("streaming", sink=1), beacon.Budget(ratio=4))
    >>> with beacon.compressing(model), torch.no_grad():
    ...     _ = model(torch.ones(1, 40, dtype=torch.long), past_key_values=cache)
    >>> cache.ledger().layers[0].slots, cache.ledger().layers[0].span
    ((9,), (0, 39))
    """

    method: str
    budget: str
    positions: str
    tokens_seen: tuple[int, ...]
    """[row] every one of them went through the model"""
    nbytes: int
    """bytes of keys and values of all layers, as they lie in memory"""
    index_bytes: int
    """bytes of the slots' true positions, and of their scores if the method remembers them"""
    full_bytes: int
    """bytes of keys and values that an uncompressed cache would hold"""
    peak_bytes: int
    """most bytes of keys and values at any moment, the chunk being read included"""
    coverage: tuple[float, ...]
    """part of all held slots that comes from each tenth of the text"""
    layers: tuple[LayerEntry, ...]
    error: tuple[float, float] | None = None
    """relative root-mean-square error of quantised keys and of quantised values; None if nothing is quantised"""

    @property
    def ratio(self) -> float:
        """Return how many times smaller than the full cache this one is."""
        return self.full_bytes / self.nbytes if self.nbytes else 1.0

    def record(self) -> dict[str, Any]:
        """Return everything as plain numbers, for JSON."""
        return {**asdict(self), "ratio": self.ratio}

    def __str__(self) -> str:
        """Return the account as aligned lines."""
        seen = ", ".join(f"{count:,}" for count in self.tokens_seen)
        lines = [
            f"method       {self.method}, {self.budget}, {self.positions} positions",
            f"tokens seen  {seen}",
            f"KV bytes     {self.nbytes:,} of {self.full_bytes:,}: {self.ratio:.1f} times smaller "
            f"(at most {self.peak_bytes:,} while reading; the slots' positions and scores {self.index_bytes:,} more)",
            f"kept from    {_bars(self.coverage)}  each tenth of the text, beginning to end",
            *([] if self.error is None else [f"8-bit error  keys {self.error[0]:.2%}, values {self.error[1]:.2%}"]),
            f"{'layer':>7}  {'kind':<7} {'slots':>9} {'bytes':>13} {'full bytes':>15}  true positions",
        ]
        for _, equal in itertools.groupby(self.layers, key=lambda entry: replace(entry, layer=0)):
            entries = list(equal)
            entry, last = entries[0], entries[-1].layer
            name = f"{entry.layer}" if entry.layer == last else f"{entry.layer}-{last}"
            slots = "-" if not entry.slots else f"{max(entry.slots):,}"
            span = "-" if entry.span is None else f"{entry.span[0]:,} to {entry.span[1]:,}"
            lines.append(f"{name:>7}  {entry.kind:<7} {slots:>9} {entry.nbytes:>13,} {entry.full_bytes:>15,}  {span}")
        return "\n".join(lines)


def take(cache: RequestCache) -> Ledger:
    """Return the account of a cache as it stands (``cache.ledger()``)."""
    seen = cache.seen
    token = cache.token_bytes
    entries, index_bytes = [], 0
    histogram = torch.zeros(_PARTS, dtype=torch.float64)
    for number, layer in enumerate(cache.layers):
        held = sum(_held(tensor) for tensor in (getattr(layer, "buffers", None) or (layer.keys, layer.values)))
        if number not in cache.full:
            window = min(max(seen, default=0), layer.sliding_window - 1)
            entries.append(LayerEntry(number, "sliding", (), held, len(seen) * window * token, None))
            continue
        slots, positions = cache.slots_of(number), cache.true_positions(number)
        index_bytes += cache.index_bytes(number)
        for row, count in enumerate(seen):
            real = positions[row][positions[row] >= 0]
            histogram += torch.bincount(real.long() * _PARTS // max(1, count), minlength=_PARTS)[:_PARTS]
        real = positions[positions >= 0]
        span = (int(real.min()), int(real.max())) if real.numel() else None
        entries.append(LayerEntry(number, "full", slots, held, sum(seen) * token, span))
    total = float(histogram.sum())
    return Ledger(
        method=cache.method.name if cache.method else "beacon",
        budget=str(cache.budget),
        positions=cache.positions,
        tokens_seen=tuple(seen),
        nbytes=cache_bytes(cache),
        index_bytes=index_bytes,
        full_bytes=sum(entry.full_bytes for entry in entries),
        peak_bytes=cache.peak,
        coverage=tuple(round(float(part) / total, 4) if total else 0.0 for part in histogram),
        layers=tuple(entries),
        error=cache.quantisation_error(),
    )


def _held(tensor: torch.Tensor | None) -> int:
    """Return the memory behind a tensor, which may be more than the tensor shows."""
    return 0 if tensor is None else tensor.untyped_storage().nbytes()


def _bars(parts: tuple[float, ...]) -> str:
    """Return a row of bars.

    >>> _bars((0.0, 0.5, 1.0))
    '▁▅█'
    """
    most = max(parts, default=0) or 1
    return "".join(_BARS[round(part / most * (len(_BARS) - 1))] for part in parts)
