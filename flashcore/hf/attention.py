"""``flashcore.attention`` in the shape transformers wants, and its registration."""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any

import torch
from transformers import AttentionInterface, AttentionMaskInterface, modeling_utils

from .. import backends, masks
from ..api import attention
from ..spec import AttentionSpec
from .masks import CallMask, call_mask

#: names registered so far
REGISTERED: set[str] = set()

#: arguments some models pass whose effect flashcore does not have: refused, never ignored
UNSUPPORTED = ("position_bias", "s_aux", "head_mask", "cache")

#: entry of a model's configuration: keys beyond which attention is sharpened (see ``log_scaled``); absent or 0 = never
LOG_ORIGIN = "attention_log_origin"


def register(name: str = "flashcore", backend: str = "auto") -> None:
    """Offer flashcore to transformers under ``name``; calling it again changes nothing.

    Args:
        name: what to pass as ``attn_implementation``.
        backend: a backend of ``flashcore.attention``; "auto" chooses per call.

    Raises:
        ValueError: for an unknown backend.

    >>> register()
    >>> from transformers import LlamaConfig, LlamaModel
    >>> config = LlamaConfig(vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=1,
    ...                      num_attention_heads=2, attn_implementation="flashcore")
    >>> LlamaModel(config)(torch.tensor([[1, 2, 3]])).last_hidden_state.shape
    torch.Size([1, 3, 8])
    """
    if backend != "auto" and backend not in backends.NAMES:
        raise ValueError(f"unknown attention backend {backend!r}; choose auto or one of {', '.join(backends.NAMES)}")
    REGISTERED.add(name)
    skip_kernel_lookup()
    AttentionInterface.register(name, functools.partial(attention_layer, backend=backend))
    AttentionMaskInterface.register(name, call_mask)


def skip_kernel_lookup() -> None:
    """Keep transformers from looking for an installed or downloadable kernel called like one of our names.

    It takes every attention name that contains "flash" for a build of flash-attn and refuses to construct a model
    when it finds none. Other names still go through its own loader.
    """
    loader = getattr(modeling_utils, "lazy_import_flash_attention", None)
    if loader is None or getattr(loader, "knows_flashcore", False):
        return

    @functools.wraps(loader)
    def load_unless_ours(implementation: str | None, *args: Any, **kwargs: Any) -> Any:
        return None if implementation in REGISTERED else loader(implementation, *args, **kwargs)

    load_unless_ours.knows_flashcore = True  # type: ignore[attr-defined]
    modeling_utils.lazy_import_flash_attention = load_unless_ours


def attention_layer(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: CallMask | torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    softcap: float | None = None,
    sliding_window: int | None = None,
    is_causal: bool | None = None,
    backend: str = "auto",
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Run one attention layer of a transformers model.

    Args:
        query: [batch, heads, n, d]. key, value: [batch, kv_heads, m, d], the cache included.
        attention_mask: what ``call_mask`` built; a bool or additive 4-D tensor that the caller made; or None.

    Returns:
        (output [batch, n, heads, d], None): attention weights are never formed.

    Raises:
        ValueError: for attention dropout.
        NotImplementedError: for inputs whose effect flashcore does not have.
    """
    refused = [name for name in UNSUPPORTED if kwargs.get(name) is not None]
    if refused or kwargs.get("output_attentions"):
        raise NotImplementedError(
            f"flashcore does not support {refused or 'output_attentions'}; use 'eager' for this model"
        )
    if dropout:
        raise ValueError(
            f"flashcore has no attention dropout, received {dropout}: "
            "set the config's attention dropout to 0 or call model.eval()"
        )
    if isinstance(attention_mask, CallMask):
        spec, keys = attention_mask.spec, attention_mask.keys
        if key.shape[2] > keys:
            key, value = key[:, :, :keys], value[:, :, :keys]
    else:
        causal = bool(getattr(module, "is_causal", True)) if is_causal is None else is_causal
        spec = AttentionSpec(causal=causal, window=sliding_window if causal else None)
        if attention_mask is not None:
            spec = AttentionSpec(mask=masks.from_dense(allowed_pairs(attention_mask, key.shape[2])))
    if torch.is_autocast_enabled(query.device.type):
        # Under autocast RoPE leaves queries and keys in fp32 beside half-precision values.
        query, key, value = (x.to(torch.get_autocast_dtype(query.device.type)) for x in (query, key, value))
    if origin := getattr(getattr(module, "config", None), LOG_ORIGIN, 0):
        query = log_scaled(query, key.shape[2], origin, spec)
    spec = dataclasses.replace(spec, scale=scaling, softcap=softcap)
    out = attention(query, key, value, spec, backend)
    return out.transpose(1, 2).contiguous(), None


def log_scaled(query: torch.Tensor, keys: int, origin: int, spec: AttentionSpec | None = None) -> torch.Tensor:
    """Scale each query by ``max(1, ln(keys it sees) / ln(origin))``.

    The softmax over more keys than a model was trained on is flatter than what it learned, and what should stand out
    drowns. Logits that grow with the logarithm of their number keep its entropy (Chiang and Cholak, arXiv 2202.12172,
    section 5; YaRN, arXiv 2309.00071, takes one factor for a whole text).

    Args:
        query: [batch, heads, n, d]; the last one stands at the last of the keys.
        keys: how many there are.
        origin: keys that the model was trained on, above 1.
        spec: of the call: padding before a row is not seen.

    >>> queries = torch.ones(1, 1, 2, 1)
    >>> [round(value, 3) for value in log_scaled(queries, 16, 4).flatten().tolist()]
    [1.953, 2.0]
    """
    n = query.shape[2]
    if keys <= origin:
        return query
    if n == 1 and (spec is None or not spec.left_padded):
        return query * (math.log(keys) / math.log(origin))
    seen = torch.arange(keys - n + 1, keys + 1, device=query.device, dtype=torch.float32)[None]
    if spec is not None and spec.left_padded and spec.lengths is not None:
        seen = seen - (keys - spec.lengths.to(seen))[:, None]
    factor = (seen.clamp(min=1).log() / math.log(origin)).clamp(min=1)
    return query * factor[:, None, :, None].to(query.dtype)


def allowed_pairs(mask: torch.Tensor, keys: int) -> torch.Tensor:
    """Read a 4-D mask [batch, heads or 1, n, >= keys] as bool: True, or an additive 0, may attend.

    Raises:
        NotImplementedError: for an additive mask that holds more than 0 and a large negative number, a bias.
    """
    mask = mask[..., :keys]
    if mask.dtype == torch.bool:
        return mask
    allowed = mask == 0
    if not bool((allowed | (mask <= -1e4)).all()):
        raise NotImplementedError("flashcore has no additive attention bias: give a mask of 0 and -inf, or use 'eager'")
    return allowed
