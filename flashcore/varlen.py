"""Ragged batches: where each row's valid tokens lie, and moving between padded and packed layouts."""

from __future__ import annotations

from typing import NamedTuple

import torch

from .spec import AttentionSpec


class Segment(NamedTuple):
    """One dense attention problem inside a ragged call: a run of queries and a run of keys of one row."""

    row: int
    query_start: int
    queries: int
    key_start: int
    keys: int

    def slices(self) -> tuple[slice, slice, slice]:
        """Return where the problem lies in rows, queries and keys of the call."""
        return (
            slice(self.row, self.row + 1),
            slice(self.query_start, self.query_start + self.queries),
            slice(self.key_start, self.key_start + self.keys),
        )


def segments(spec: AttentionSpec, batch: int, n: int, m: int) -> list[Segment] | None:
    """Split a ragged call into dense problems, or return None if the call is not ragged.

    Every backend that has no ragged kernel of its own runs these one after the other. Inside a segment the
    bottom-right alignment of ``AttentionSpec`` holds unchanged.

    Args:
        spec: the call; its ``lengths`` or ``cu_seqlens`` are read (one device-to-host copy on CUDA).
        batch: rows. n, m: padded (or packed) numbers of queries and keys.
    """
    if spec.lengths is not None:
        keys = spec.lengths.tolist()
        if spec.query_lengths is not None:
            queries = spec.query_lengths.tolist()
        else:
            queries = keys if n == m else [n] * batch
        shift = (n, m) if spec.left_padded else None
        return [
            Segment(row, shift[0] - q if shift else 0, q, shift[1] - k if shift else 0, k)
            for row, (q, k) in enumerate(zip(queries, keys, strict=True))
        ]
    if spec.cu_seqlens is not None:
        cu_q, cu_k = packed_boundaries(spec)
        q, k = cu_q.tolist(), cu_k.tolist()
        return [Segment(0, q[i], q[i + 1] - q[i], k[i], k[i + 1] - k[i]) for i in range(len(q) - 1)]
    return None


def packed_boundaries(spec: AttentionSpec) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the cumulative lengths of queries and of keys, each [sequences + 1]."""
    cu = spec.cu_seqlens
    if cu is None:
        raise ValueError("packed_boundaries needs a spec with cu_seqlens, received one without")
    return cu if isinstance(cu, tuple) else (cu, cu)


def cumulative(lengths: torch.Tensor) -> torch.Tensor:
    """Return cumulative boundaries [batch + 1] (int32, starting at 0) of ``lengths`` [batch].

    >>> cumulative(torch.tensor([2, 3])).tolist()
    [0, 2, 5]
    """
    return torch.nn.functional.pad(lengths.to(torch.int32).cumsum(0, dtype=torch.int32), (1, 0))


def valid_tokens(lengths: torch.Tensor, size: int, left_padded: bool = False) -> torch.Tensor:
    """Return a bool mask [batch, size] of the valid tokens of a padded batch.

    >>> valid_tokens(torch.tensor([1, 3]), 3, left_padded=True).int().tolist()
    [[0, 0, 1], [1, 1, 1]]
    """
    index = torch.arange(size, device=lengths.device)
    index = size - 1 - index if left_padded else index
    return index[None, :] < lengths[:, None]


def unpad(x: torch.Tensor, valid: torch.Tensor) -> torch.Tensor:
    """Gather the valid tokens of ``x`` [batch, heads, n, d] into one packed row [1, heads, tokens, d].

    >>> unpad(torch.ones(2, 1, 3, 4), torch.tensor([[True, False, False], [True, True, True]])).shape
    torch.Size([1, 1, 4, 4])
    """
    return x.transpose(1, 2)[valid].transpose(0, 1)[None]


def pad(packed: torch.Tensor, valid: torch.Tensor) -> torch.Tensor:
    """Scatter a packed row [1, heads, tokens, d] back to [batch, heads, n, d], zeros in the padding.

    >>> valid = torch.tensor([[True, False], [True, True]])
    >>> pad(unpad(torch.ones(2, 1, 2, 1), valid), valid).flatten().tolist()
    [1.0, 0.0, 1.0, 1.0]
    """
    out = packed.new_zeros(*valid.shape, packed.shape[1], packed.shape[3])
    out[valid] = packed[0].transpose(0, 1)
    return out.transpose(1, 2)
