"""From what transformers knows about a mask to an ``AttentionSpec``, once per forward pass and without an n x m tensor.

transformers describes masks as composed index functions. The plain ones (causal, sliding window, both directions)
are recognised by their code objects and become fields of the spec, which backends run fastest; anything else is
kept as an index function, which is slower and just as exact.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from transformers import masking_utils as hf_masks

from .. import masks
from ..spec import AttentionSpec
from ..varlen import valid_tokens

AND_CODE = hf_masks.and_masks(hf_masks.causal_mask_function).__code__
WINDOW_CODE = hf_masks.sliding_window_overlay(1).__code__
TWO_SIDED_CODE = hf_masks.sliding_window_bidirectional_overlay(1).__code__


@dataclass(frozen=True)
class CallMask:
    """What a model hands to its attention layers as ``attention_mask`` under ``attn_implementation="flashcore"``."""

    spec: AttentionSpec
    keys: int
    """Keys of the cache that are filled; the rest of a static cache is cut off before attention."""


def call_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | torch.Tensor = 0,
    kv_offset: int | torch.Tensor = 0,
    mask_function: Callable[..., Any] = hf_masks.causal_mask_function,
    attention_mask: torch.Tensor | None = None,
    **kwargs: Any,
) -> CallMask:
    """Build the mask of one forward pass; the signature is that of transformers' mask interface.

    Args:
        batch_size, q_length, kv_length: sizes of the call.
        q_offset, kv_offset: positions of the first query and key.
        mask_function: transformers' index function over absolute positions.
        attention_mask: [batch, seen + q_length] bool, True = real token, or None.
    """
    first_q, first_k = int(q_offset), int(kv_offset)
    bidirectional = mask_function is hf_masks.bidirectional_mask_function
    # A causal query stands at the end of the filled keys; an encoder attends them all.
    filled = kv_length if bidirectional else min(kv_length, first_q + q_length - first_k)
    options = recognised(mask_function)
    if options is None:
        options = {"mask": shifted(mask_function, first_q, first_k)}
    valid = None if attention_mask is None else key_validity(attention_mask, first_k, filled)
    options = with_padding(options, valid, q_length, filled)
    return CallMask(AttentionSpec(**options), filled)


def recognised(function: Callable[..., Any]) -> dict[str, Any] | None:
    """Return the spec fields that say the same as ``function``, or None if it is not one of the plain masks."""
    if function is hf_masks.causal_mask_function:
        return {"causal": True}
    if function is hf_masks.bidirectional_mask_function:
        return {}
    code = getattr(function, "__code__", None)
    if code is None or function.__closure__ is None:
        return None
    inside = dict(zip(code.co_freevars, (cell.cell_contents for cell in function.__closure__), strict=True))
    if code is WINDOW_CODE:
        return {"window": (inside["sliding_window"] - 1, None)}
    if code is TWO_SIDED_CODE:
        return {"window": (inside["sliding_window"], inside["sliding_window"])}
    if code is not AND_CODE:
        return None
    combined: dict[str, Any] = {}
    for part in inside["mask_functions"]:
        fields = recognised(part)
        if fields is None or combined.keys() & fields.keys():
            return None
        combined |= fields
    return combined


def shifted(function: Callable[..., Any], first_q: int, first_k: int) -> masks.MaskFunction:
    """Turn a function of absolute positions into one of tensor indices."""
    return lambda batch, head, query, key: function(batch, head, query + first_q, key + first_k)


def key_validity(attention_mask: torch.Tensor, first_key: int, keys: int) -> torch.Tensor:
    """Return [batch, keys] bool from a 2-D padding mask that may be longer or shorter than the keys."""
    valid = attention_mask[:, first_key : first_key + keys].bool()
    return torch.nn.functional.pad(valid, (0, keys - valid.shape[1]), value=False)


def with_padding(options: dict[str, Any], valid: torch.Tensor | None, n: int, m: int) -> dict[str, Any]:
    """Add padding to the spec fields: as lengths where it stands at one end of the rows, else as a key mask."""
    if valid is None or bool(valid.all()):
        return options
    lengths = valid.sum(1)
    if "mask" not in options:
        for left_padded in (True, False):
            if bool((valid == valid_tokens(lengths, m, left_padded)).all()):
                queries = lengths.clamp(max=n) if left_padded else (lengths - (m - n)).clamp(0, n)
                padding = {"lengths": lengths, "left_padded": left_padded}
                return options | padding | ({} if n == m else {"query_lengths": queries})
    holes = masks.valid_keys(valid)
    return options | {"mask": masks.both(options["mask"], holes) if "mask" in options else holes}
