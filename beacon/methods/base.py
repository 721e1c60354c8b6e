"""What a compression method is: how it reads, and for most a ranking of slots and how layers share the budget."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch

import beacon
from beacon.schedule import Step
from flashcore import AttentionSpec, attention_mass
from flashcore.mass import Reduce

if TYPE_CHECKING:
    from beacon.budget import Budget
    from beacon.cache import Positions
    from beacon.request import RequestCache


@dataclass(frozen=True)
class LayerView:
    """What one full-attention layer holds and did in one forward pass, for ranking its slots."""

    keys: torch.Tensor
    """[batch, kv_heads, m, d] after RoPE: kept slots, new tokens, then the probe"""
    values: torch.Tensor
    """[batch, kv_heads, m, d]"""
    queries: torch.Tensor
    """[batch, heads, n, d] of the new tokens and the probe"""
    positions: torch.Tensor
    """[batch, kv_heads, slots] int32 true positions, -1 for padding"""
    spec: AttentionSpec
    """how the queries attended"""
    valid: tuple[int, ...]
    """[row] how many slots are real: the last ones"""
    step: Step
    layer: int
    """place among the full-attention layers, from 0"""
    layers: int
    """how many there are"""

    @property
    def slots(self) -> int:
        """Return how many slots are to be ranked: m without the probe."""
        return self.keys.shape[2] - self.step.probe

    def received(self, window: int) -> torch.Tensor:
        """Return the attention each slot receives from the observing queries, [batch, kv_heads, slots] float32.

        The observers are the probe, if there is one (each question counts for itself, a slot gets its best), else the
        last ``window`` tokens; the mean is taken over queries and the heads of a group.
        """
        return self._observed(window, "sum")

    def sharpest(self, window: int) -> torch.Tensor:
        """Return the most attention each slot receives from one observing query, [batch, kv_heads, slots] float32.

        Observers as in ``received``; the maximum is taken over queries and the heads of a group.
        """
        return self._observed(window, "max")

    def _observed(self, window: int, reduce: Reduce) -> torch.Tensor:
        """Return what the probe or the last ``window`` tokens give to the slots."""
        best, end = None, self.queries.shape[2]
        for size in reversed(self.step.probes):
            mass = self._mass(end - size, end, (size,) * len(self.valid), reduce)
            best, end = mass if best is None else torch.maximum(best, mass), end - size
        if best is not None:
            return best
        return self._mass(end - min(window, end), end, self.step.new, reduce)

    def _mass(self, begin: int, end: int, real: Sequence[int], reduce: Reduce) -> torch.Tensor:
        """Return what queries ``begin``…``end`` give to the slots; only the last ``real[row]`` of them count."""
        left_out = self.queries.shape[2] - end
        queries = self.queries[:, :, begin:end]
        keys = self.keys[:, :, : self.keys.shape[2] - left_out]
        probe = max(0, self.step.probe - left_out)
        lengths = torch.tensor([count + probe for count in self.valid])
        counts = torch.tensor([min(count, end - begin) for count in real])
        options: dict[str, Any] = {"scale": self.spec.scale, "softcap": self.spec.softcap, "causal": True}
        if min(self.valid) < self.slots or int(counts.min()) < end - begin:
            options |= {"lengths": lengths, "query_lengths": counts, "left_padded": True}
        mass = attention_mass(queries, keys, AttentionSpec(**options), reduce)[:, :, : self.slots]
        if reduce == "max":
            return mass
        heads = self.queries.shape[1] // self.keys.shape[1]
        return mass / (heads * counts.clamp(min=1)[:, None, None].to(mass))


@dataclass(frozen=True)
class Method:
    """Base of the methods. A subclass says how it ranks slots; what is protected is kept whatever the ranking says.

    Raises:
        ValueError: a whole-number setting below ``least``, or an even ``kernel``.
    """

    sink: int = 4
    """first tokens of the text that are always kept: models park attention there (StreamingLLM, arXiv 2309.17453)"""
    recent: int = 32
    """newest slots that are always kept"""

    #: name on command lines and in saved files
    name: ClassVar[str] = ""
    #: whether a question asked beforehand (a probe) changes what is kept
    steerable: ClassVar[bool] = False

    #: whether layers wait for one another, so that scores of all of them can be combined; a chunk is then held in
    #: every layer until the forward pass ends
    joint: ClassVar[bool] = False
    #: smallest value of each whole-number setting
    least: ClassVar[dict[str, int]] = {"sink": 0, "recent": 1, "looks": 1, "settle": 1}

    #: whether slots are ranked at all; else ``new_cache`` makes a cache of the method's own
    ranks: ClassVar[bool] = True

    #: whether slots have no place of their own in the text, so that positions can only be compact
    compact_only: ClassVar[bool] = False

    #: whether slots carry their scores along (4 bytes a slot and key head)
    remembers: ClassVar[bool] = False

    def __post_init__(self) -> None:
        """Refuse settings that no cache can follow."""
        kernel = vars(self).get("kernel", 1)
        if kernel < 1 or kernel % 2 == 0:
            raise ValueError(f"{self.name}: kernel must be a positive odd number, got {kernel}")
        for field, least in self.least.items():
            if (value := vars(self).get(field, least)) < least:
                raise ValueError(f"{self.name}: {field} must be at least {least}, got {value}")

    @property
    def minimum(self) -> int:
        """Return how many slots are protected at most: no budget may be smaller."""
        return self.sink + self.recent

    def running(self, model: Any) -> AbstractContextManager[Any]:
        """Return the context in which ``model`` can use this method's caches."""
        return beacon.compressing(model)

    def new_cache(
        self, model: Any, budget: Budget, *, positions: Positions = "original", expected: int = 0
    ) -> RequestCache:
        """Return an empty cache for a model; arguments as those of ``beacon.CompressedCache``."""
        return beacon.CompressedCache(model, self, budget, positions=positions, expected=expected)

    def verified(self, model: Any, ids: Sequence[int], positions: Positions) -> list[str]:
        """Check the contract on the first tokens of a text; return the invariants that held, none if it is too short.

        Raises:
            ContractError: one does not hold.
        """
        if len(ids) < 48 or self.minimum * 8 / 7 > min(len(ids), 128) // 3:
            return []
        return beacon.verify(
            model, ids, lambda **limit: self.new_cache(model, beacon.Budget(**limit), positions=positions)
        )

    def warning(self, model: Any) -> str | None:
        """Return what a user should know before this method reads something with ``model``."""
        return None

    def chunk(self, most: int) -> int:
        """Return how many tokens to read at once, of at most ``most``."""
        return most

    def shares(self, layers: int) -> list[float]:
        """Return each full-attention layer's share of the budget, 1 on average."""
        return [1.0] * layers

    def scores(self, view: LayerView) -> torch.Tensor:
        """Return how much each slot is worth, [batch, kv_heads, slots]; padding may have any score."""
        raise NotImplementedError

    def combine(self, scores: Sequence[torch.Tensor], remembered: Sequence[torch.Tensor]) -> Sequence[torch.Tensor]:
        """Return what the slots of each layer are worth, given those of all layers (``joint`` methods only).

        Args:
            scores: of each layer, [batch, kv_heads, slots].
            remembered: what ``memory`` kept of each layer's scores, minus infinity for slots that are new.
        """
        return scores

    def memory(self, scores: torch.Tensor) -> torch.Tensor:
        """Return what is remembered of the scores of one layer."""
        return scores

    def rank(self, scores: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """Return the scores [batch, kv_heads, slots] with protected slots at plus and padding at minus infinity."""
        scores = scores.clone()
        scores[:, :, positions.shape[2] - self.recent :] = float("inf")
        scores.masked_fill_(positions < self.sink, float("inf"))
        return scores.masked_fill_(positions < 0, float("-inf"))


def pooled(scores: torch.Tensor, kernel: int) -> torch.Tensor:
    """Return the maximum over each slot and its neighbours, ``kernel`` (odd) in all; [batch, kv_heads, slots].

    >>> pooled(torch.tensor([[[0.0, 2.0, 1.0, 0.0, 0.0]]]), 3).tolist()
    [[[2.0, 2.0, 2.0, 1.0, 0.0]]]
    """
    return torch.nn.functional.max_pool1d(scores, kernel, stride=1, padding=kernel // 2)


def select(ranks: torch.Tensor, valid: Sequence[int], keep: Sequence[int]) -> torch.Tensor:
    """Return which slots stay, in their order: [batch, kv_heads, max(keep)] indices, left-padded with -1.

    Args:
        ranks: [batch, kv_heads, slots], higher stays; minus infinity for padding.
        valid: [row] real slots, the last ones.
        keep: [row] how many stay.

    >>> select(torch.tensor([[[0.1, 0.9, 0.5]], [[float("-inf"), 0.2, 0.1]]]), [3, 2], [2, 1])
    tensor([[[ 1,  2]],
    <BLANKLINE>
            [[-1,  1]]])
    """
    most = max(keep)
    # Stable, so that equal ranks are settled by age, not by where padding happens to stand.
    best = ranks.sort(dim=2, descending=True, stable=True).indices[:, :, :most]
    counts = torch.tensor(keep, device=ranks.device)[:, None, None]
    beyond = torch.arange(most, device=ranks.device) >= counts
    return best.masked_fill(beyond, -1).sort(dim=2).values
