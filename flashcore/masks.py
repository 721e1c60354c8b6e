"""Masks as index functions ``(batch, head, query, key) -> bool``: they compose, and nobody materialises them whole.

The four arguments are integer tensors that broadcast against each other; True means "may attend".
"""

from __future__ import annotations

import torch

from .spec import MaskFunction


def causal(offset: int = 0) -> MaskFunction:
    """See keys up to the query's own position, ``query + offset`` (offset = keys - queries for a continued cache).

    >>> dense(causal(offset=1), batch=1, heads=1, queries=2, keys=3)[0, 0].int().tolist()
    [[1, 1, 0], [1, 1, 1]]
    """
    return lambda batch, head, query, key: key <= query + offset


def window(left: int, right: int = 0, offset: int = 0) -> MaskFunction:
    """See at most ``left`` keys before and ``right`` keys after the query's own position.

    >>> dense(window(1), batch=1, heads=1, queries=3, keys=3)[0, 0].int().tolist()
    [[1, 0, 0], [1, 1, 0], [0, 1, 1]]
    """

    def within(batch: torch.Tensor, head: torch.Tensor, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        distance = key - (query + offset)
        return (distance >= -left) & (distance <= right)

    return within


def document(query_ids: torch.Tensor, key_ids: torch.Tensor | None = None) -> MaskFunction:
    """See only keys of the query's own document; ids are [batch, seq] (keys default to the queries' ids).

    >>> ids = torch.tensor([[7, 7, 8]])
    >>> dense(document(ids), batch=1, heads=1, queries=3, keys=3)[0, 0].int().tolist()
    [[1, 1, 0], [1, 1, 0], [0, 0, 1]]
    """
    keys = query_ids if key_ids is None else key_ids
    return lambda batch, head, query, key: query_ids[batch, query] == keys[batch, key]


def valid_keys(valid: torch.Tensor) -> MaskFunction:
    """See only keys marked in ``valid`` [batch, keys]: padding with holes in it.

    >>> dense(valid_keys(torch.tensor([[True, False]])), batch=1, heads=1, queries=1, keys=2).tolist()
    [[[[True, False]]]]
    """
    return lambda batch, head, query, key: valid[batch, key]


def from_dense(mask: torch.Tensor) -> MaskFunction:
    """Read a bool mask [batch or 1, heads or 1, queries, keys] that somebody has built already.

    >>> mask = torch.tensor([[[[True, False]]]])
    >>> bool((dense(from_dense(mask), batch=2, heads=3, queries=1, keys=2) == mask).all())
    True
    """
    rows, heads = mask.shape[0] > 1, mask.shape[1] > 1
    return lambda batch, head, query, key: mask[batch if rows else 0, head if heads else 0, query, key]


def both(first: MaskFunction, second: MaskFunction) -> MaskFunction:
    """See a key only if both masks allow it.

    >>> dense(both(causal(), window(0)), batch=1, heads=1, queries=2, keys=2)[0, 0].int().tolist()
    [[1, 0], [0, 1]]
    """
    return lambda batch, head, query, key: first(batch, head, query, key) & second(batch, head, query, key)


def either(first: MaskFunction, second: MaskFunction) -> MaskFunction:
    """See a key if one of the masks allows it (a bidirectional prefix on a causal model, image tokens).

    >>> prefix = lambda batch, head, query, key: key < 2
    >>> dense(either(causal(), prefix), batch=1, heads=1, queries=3, keys=3)[0, 0].int().tolist()
    [[1, 1, 0], [1, 1, 0], [1, 1, 1]]
    """
    return lambda batch, head, query, key: first(batch, head, query, key) | second(batch, head, query, key)


def block(
    mask: MaskFunction, rows: torch.Tensor, heads: torch.Tensor, queries: torch.Tensor, keys: torch.Tensor
) -> torch.Tensor:
    """Evaluate ``mask`` on index vectors; returns bool [rows, heads, queries, keys] (expanded, not copied)."""
    shape = (len(rows), len(heads), len(queries), len(keys))
    allowed = mask(rows[:, None, None, None], heads[:, None, None], queries[:, None], keys[None, :])
    return torch.broadcast_to(torch.as_tensor(allowed, device=queries.device), shape)


def dense(
    mask: MaskFunction, *, batch: int, heads: int, queries: int, keys: int, device: torch.device | str = "cpu"
) -> torch.Tensor:
    """Materialise ``mask`` as bool [batch, heads, queries, keys]: for tests, pictures and short inputs.

    >>> dense(causal(), batch=1, heads=1, queries=2, keys=2).shape
    torch.Size([1, 1, 2, 2])
    """
    sizes = (batch, heads, queries, keys)
    return block(mask, *(torch.arange(size, device=device) for size in sizes))
