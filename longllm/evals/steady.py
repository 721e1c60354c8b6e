"""RoPE whose frequencies depend on the length of the text, kept steady while a text is read in chunks.

transformers takes dynamic NTK's base, and longrope's factors, from the length read so far. Read in chunks, the first
keys are then rotated by other frequencies than the last, which no method intends: dynamic NTK as published rotates all
keys by the base that belongs to the whole text.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def steady(model: Any, reach: int) -> Iterator[None]:
    """Rotate every token by the frequencies that belong to a text of ``reach`` positions; models without such do not
    change.

    Raises:
        ValueError: the model keeps one such RoPE per kind of layer.
    """
    kept = []
    for module in model.modules():
        kind = getattr(module, "rope_type", None)
        if isinstance(kind, dict) and any(_moves(own) for own in kind.values()):
            raise ValueError(f"RoPE of several kinds that follow the length ({kind}) cannot be read in chunks")
        if isinstance(kind, str) and _moves(kind):
            kept.append((module, kind, module.inv_freq, module.attention_scaling))
    try:
        for module, kind, before, _ in kept:
            from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

            frequencies, module.attention_scaling = ROPE_INIT_FUNCTIONS[kind](
                module.config, before.device, seq_len=reach
            )
            module.inv_freq = frequencies
            module.rope_type = "default"  # what transformers looks at before each pass
        yield
    finally:
        for module, kind, before, scaling in kept:
            module.rope_type, module.inv_freq, module.attention_scaling = kind, before, scaling


def _moves(kind: str) -> bool:
    return "dynamic" in kind or kind == "longrope"
