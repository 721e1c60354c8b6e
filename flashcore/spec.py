"""What one attention call computes, apart from the tensors: a frozen description every backend reads the same way."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

#: Index function: broadcastable integer tensors (batch, head, query, key) -> bool tensor, True = may attend.
MaskFunction = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


@dataclass(frozen=True, eq=False)
class AttentionSpec:
    """Describe which keys a query may attend and how scores are formed.

    Query ``i`` of ``n`` and key ``j`` of ``m`` stand at the positions ``i + m - n`` and ``j``: the last query is
    aligned with the last key (bottom-right), so a chunk that continues a cache needs no offset. All limits below
    are intersected. A query that may attend nothing gets a row of zeros.

    Raises:
        ValueError: for a window, scale, softcap or length that makes no sense, or for ``lengths`` together with
            ``cu_seqlens``.

    >>> AttentionSpec(causal=True, window=4096, softcap=50.0).window
    (4095, 0)
    """

    causal: bool = False
    """Hide keys after the query's position."""
    window: int | tuple[int | None, int | None] | None = None
    """(left, right): how many keys before and after its own position a query sees (None = no limit). An int ``w``
    is short for the causal window of ``w`` keys including the query's own, ``(w - 1, 0)``."""
    scale: float | None = None
    """Factor on q·k; None = 1 / sqrt(head_dim)."""
    softcap: float | None = None
    """Scores become ``softcap * tanh(score / softcap)`` (Gemma 2)."""
    lengths: torch.Tensor | None = None
    """[batch] valid keys of each row of a padded batch; the rest is padding that nobody sees."""
    query_lengths: torch.Tensor | None = None
    """[batch] valid queries of each row; None = ``lengths`` where n == m, else all n. Padding rows come out zero.
    Within a row, the last valid query is aligned with the last valid key."""
    left_padded: bool = False
    """Padding stands before the valid tokens of a row instead of after them."""
    cu_seqlens: torch.Tensor | tuple[torch.Tensor, torch.Tensor] | None = None
    """[sequences + 1] cumulative lengths of sequences packed into one row (batch must be 1), as flash-attn's
    varlen calls take them; a pair gives queries and keys separately. Sequences do not see each other."""
    mask: MaskFunction | None = None
    """Further limit as an index function (see ``flashcore.masks``); indices are those of the tensors given."""

    def __post_init__(self) -> None:
        window = self.window
        if isinstance(window, int):
            if window < 1:
                raise ValueError(f"window must be at least 1 (the query's own key), received {window}")
            window = (window - 1, 0)
        if window is not None:
            if len(window) != 2 or any(side is not None and side < 0 for side in window):
                raise ValueError(f"window must be (left, right) of counts >= 0 or None, received {window}")
            object.__setattr__(self, "window", None if window == (None, None) else tuple(window))
        if self.softcap is not None and not self.softcap > 0:
            raise ValueError(f"softcap must be positive or None, received {self.softcap}")
        if self.scale is not None and not (self.scale == self.scale and abs(self.scale) != float("inf")):
            raise ValueError(f"scale must be a finite number or None, received {self.scale}")
        if self.lengths is not None and self.cu_seqlens is not None:
            raise ValueError("give lengths (padded batch) or cu_seqlens (packed row), not both")
        if self.lengths is None and (self.query_lengths is not None or self.left_padded):
            raise ValueError("query_lengths and left_padded describe a padded batch: give lengths as well")

    def limits(self) -> tuple[int | None, int | None]:
        """Return (left, right) reach of a query around its own position, causality included.

        >>> AttentionSpec(causal=True).limits(), AttentionSpec(window=(3, 5)).limits()
        ((None, 0), (3, 5))
        """
        left, right = self.window if isinstance(self.window, tuple) else (None, None)
        return left, 0 if self.causal else right

    def is_bare(self) -> bool:
        """Say whether the call has no window, softcap or mask: what torch's own kernels know.

        >>> AttentionSpec(causal=True).is_bare(), AttentionSpec(window=4).is_bare()
        (True, False)
        """
        return self.window is None and self.softcap is None and self.mask is None

    def resolved_scale(self, head_dim: int) -> float:
        """Return the factor on q·k for heads of ``head_dim``."""
        return head_dim**-0.5 if self.scale is None else self.scale
