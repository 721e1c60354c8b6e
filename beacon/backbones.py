"""Where stock transformers models keep what the window loop needs: one row per architecture."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class Backbone:
    """The names of a pre-norm decoder's parts; the defaults are Llama's."""

    embedding: str = "embed_tokens"
    layers: str = "layers"
    final_norm: str = "norm"
    rotary: str = "rotary_emb"
    attention_norm: str = "input_layernorm"
    attention: str = "self_attn"
    mlp_norm: str = "post_attention_layernorm"
    mlp: str = "mlp"
    head_norms: bool = False
    """``q_norm`` and ``k_norm`` on each head before RoPE"""


#: config.model_type -> its parts
BACKBONES = {
    "llama": Backbone(),
    "mistral": Backbone(),
    "qwen2": Backbone(),
    "qwen3": Backbone(head_norms=True),
}


def backbone(model: Any) -> Backbone:
    """Return the row of a model.

    Raises:
        ValueError: the architecture is not in the table.

    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> tiny = LlamaConfig(vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2)
    >>> backbone(LlamaForCausalLM(tiny)).attention
    'self_attn'
    """
    kind = getattr(getattr(model, "config", None), "model_type", type(model).__name__)
    if kind not in BACKBONES:
        raise ValueError(
            f"Activation Beacon runs on {', '.join(BACKBONES)}, not on {kind}: its table has no row for it"
        )
    return BACKBONES[kind]


@dataclass(frozen=True)
class Part:
    """The modules of one decoder layer."""

    attention_norm: Any
    attention: Any
    mlp_norm: Any
    mlp: Any
    norms: tuple[Any, Any] | None
    """of query and key heads"""

    def heads(self, projected: torch.Tensor, norm: int | None = None) -> torch.Tensor:
        """Return a projection [batch, n, heads * d] as [batch, heads, n, d]; ``norm`` 0 = a query's, 1 = a key's."""
        split = projected.unflatten(2, (-1, self.attention.head_dim))
        if norm is not None and self.norms is not None:
            split = self.norms[norm](split)
        return split.transpose(1, 2)


def parts(decoder: Any, names: Backbone) -> list[Part]:
    """Return the layers of a decoder."""
    found = []
    for layer in getattr(decoder, names.layers):
        attention, mlp = getattr(layer, names.attention), getattr(layer, names.mlp)
        norms = (attention.q_norm, attention.k_norm) if names.head_norms else None
        before = getattr(layer, names.attention_norm), getattr(layer, names.mlp_norm)
        found.append(Part(before[0], attention, before[1], mlp, norms))
    return found
