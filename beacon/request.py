"""What every cache of ours is to transformers: the state of one request, which counts tokens seen, not slots held."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any, Literal

import torch
from transformers.cache_utils import Cache

if TYPE_CHECKING:
    from beacon.budget import Budget
    from beacon.ledger import Ledger
    from beacon.methods.base import Method
    from beacon.saved import SavedCache
    from longllm import LoadedModel


class RequestCache(Cache):
    """Base of the caches that hold fewer slots than they have seen tokens.

    ``get_seq_length()`` is the number of columns seen (padding included), so that code which derives a position from it
    is right all the same; positions handed to the model are checked against the true ones.
    """

    layers: list[Any]
    #: indices of the layers that are compressed
    full: list[int]
    #: None: made by hand, under no name
    method: Method | None
    budget: Budget
    positions: Literal["original", "compact"]
    #: bytes of one token's keys and values in one layer
    token_bytes: int
    #: lengths of the questions at the end of the next forward pass's tokens; set by ``beacon.read``
    probes: tuple[int, ...]
    #: largest number of bytes held at any moment
    peak: int

    @property
    def columns(self) -> int:
        """Return the columns seen, padding included; -1 after a forward pass that failed."""
        raise NotImplementedError

    @property
    def seen(self) -> list[int]:
        """Return how many real tokens each row has seen: the true position of its next token."""
        raise NotImplementedError

    def expect(self, tokens: int) -> None:
        """Take note that each row will hold so many tokens in the end; here it changes nothing."""

    def slots_of(self, layer_idx: int) -> tuple[int, ...]:
        """Return how many slots each row holds in a compressed layer."""
        raise NotImplementedError

    def true_positions(self, layer_idx: int) -> torch.Tensor:
        """Return the true position of every slot of a compressed layer, [rows, kv_heads or 1, slots], -1 = padding."""
        raise NotImplementedError

    def index_bytes(self, layer_idx: int) -> int:
        """Return the bytes of what a layer notes of its slots beside keys and values."""
        return 0

    def quantisation_error(self) -> tuple[float, float] | None:
        """Return the relative root-mean-square error of quantised keys and values so far; None if nothing is."""
        return None

    def pack(self) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
        """Return the tensors and the facts (JSON values) that a file of this cache holds."""
        raise NotImplementedError

    def unpack(self, tensors: dict[str, torch.Tensor], facts: dict[str, Any]) -> None:
        """Take over what ``pack`` returned, in a cache made with the same settings."""
        raise NotImplementedError

    def ledger(self) -> Ledger:
        """Return the account: tokens seen, bytes before and after, what was kept."""
        from beacon.ledger import take

        return take(self)

    def save(self, path: str | os.PathLike[str], loaded: LoadedModel, ids: tuple[int, ...], **notes: Any) -> None:
        """Write this cache of one row to a file; arguments and errors as ``beacon.save_cache``."""
        from beacon.saved import save_cache

        save_cache(path, loaded, ids, self, **notes)

    @staticmethod
    def load(path: str | os.PathLike[str], loaded: LoadedModel) -> SavedCache:
        """Read a cache that ``save`` wrote, with the text it stands for; errors as ``beacon.load_cache``."""
        from beacon.saved import load_cache

        return load_cache(path, loaded)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Return the columns seen (padding included): what ``generate`` cuts its input by. Not a number of slots."""
        return self.columns

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """Take these rows, in this order (beam search)."""
        self.batch_select_indices(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row (several answers to one prompt)."""
        if self.seen:
            self.batch_select_indices(torch.arange(len(self.seen)).repeat_interleave(repeats))

    def crop(self, tokens_to_remove: int) -> None:
        """Refuse: what was dropped for the removed tokens cannot be brought back.

        Raises:
            ValueError: always.
        """
        raise ValueError("a compressed cache cannot be cropped; fork() it before what may have to be undone")

    def new_tokens(self, columns: int, probe: int, mask: torch.Tensor | None, rows: int) -> list[int]:
        """Return how many of the columns before the probe are real tokens, per row.

        Args:
            columns: of the call, probe included.
            probe: last columns that attend and are forgotten.
            mask: [rows, seen columns + columns], 0 = padding, or None.

        Raises:
            ValueError: the cache failed before, has other rows, or the mask is not one of left padding.
        """
        if self.columns < 0:
            raise ValueError("an earlier forward pass on this cache failed half-way: start from a new cache or a fork")
        if self.seen and len(self.seen) != rows:
            raise ValueError(f"the cache holds {len(self.seen)} rows, the model was given {rows}")
        if mask is None:
            return [columns - probe] * rows
        before = self.columns
        if mask.ndim != 2 or mask.shape != (rows, before + columns):
            raise ValueError(
                f"the attention mask must be [rows, tokens seen and new], got {list(mask.shape)} "
                f"for [{rows}, {before} + {columns}]"
            )
        seen = self.seen or [0] * rows
        real = mask.cpu().bool()
        if real[:, :before].sum(1).tolist() != seen:
            raise ValueError("the attention mask hides tokens that the cache holds, or shows padding: it cannot change")
        real = real[:, before:]
        counts: list[int] = (real.sum(1) - probe).tolist()
        left = (torch.arange(columns) >= columns - real.sum(1, keepdim=True)) == real
        started = torch.tensor(seen) > 0
        if not bool(left.all()) or bool((started & ~real.all(1)).any()) or min(counts) < 0:
            raise ValueError("rows must be padded on the left only: set tokenizer.padding_side = 'left'")
        return counts

    def offsets(
        self, new: list[int], columns: int, probe: int = 0, positions: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Return each column's place among its row's new tokens, [rows, columns], negative for padding.

        Args:
            new: real tokens of each row.
            columns: of the call, probe included.
            probe: last columns that attend and are forgotten.
            positions: true positions that the caller gave, to be checked, or None.

        Raises:
            ValueError: positions that are not the true ones.
        """
        rows = len(new)
        seen = torch.tensor(self.seen or [0] * rows)
        offsets = torch.arange(columns)[None] - torch.tensor([columns - probe - count for count in new])[:, None]
        if positions is not None:
            true, given = seen[:, None] + offsets, positions.cpu().expand(rows, -1)
            wrong = (given != true) & (offsets >= 0)
            if wrong.any():
                row, column = (int(index) for index in wrong.nonzero()[0])
                raise ValueError(
                    f"row {row} was given position {int(given[row, column])} for a token whose true position is "
                    f"{int(true[row, column])}: positions count tokens seen, not slots kept"
                )
        return offsets


def token_bytes(model: Any) -> int:
    """Return the bytes of one token's keys and values in one layer of a model."""
    config = model.config.get_text_config(decoder=True)
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    return int(2 * heads * head * model.dtype.itemsize)
