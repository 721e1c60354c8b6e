"""Letting a stock transformers model run on compressed caches, and putting it back as it was."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel

from beacon.backbones import backbone
from beacon.cache import CompressedCache
from beacon.config import BeaconConfig, MemoryOptions
from beacon.layers import CompressedLayer
from beacon.weights import BeaconWeights
from beacon.windows import NEEDED, WindowReader
from flashcore.hf.attention import LOG_ORIGIN, REGISTERED, attention_layer, skip_kernel_lookup
from flashcore.hf.masks import CallMask, call_mask

NAME = "longscope_compressed"
#: the cache of the forward pass that is running, if it is one of ours
_ACTIVE: ContextVar[CompressedCache | None] = ContextVar("active_cache", default=None)


@contextmanager
def compressing(model: Any) -> Iterator[Any]:
    """Let ``model`` use a ``CompressedCache`` as ``past_key_values``, in ``forward`` and in ``generate``.

    Any other cache works as before. On leaving, attention implementation and hooks are as they were; weights are
    never touched. Blocks may be nested.

    Raises:
        ValueError: the model is no decoder of transformers with a choice of attention implementation.
    """
    if not isinstance(model, PreTrainedModel) or not model.can_generate() or model.config.is_encoder_decoder:
        raise ValueError(f"{type(model).__name__} is not a decoder of transformers: KV compression does not apply")
    decoder: Any = model.get_decoder()
    REGISTERED.add(NAME)
    skip_kernel_lookup()
    AttentionInterface.register(NAME, _attention)
    AttentionMaskInterface.register(NAME, call_mask)
    before = model.config._attn_implementation
    hooks = []
    try:
        model.set_attn_implementation(NAME)
        if before != NAME:  # an outer block has placed its hooks already
            hooks.append(decoder.register_forward_pre_hook(_begin, with_kwargs=True))
            hooks.append(decoder.register_forward_hook(_end, always_call=True))
        yield model
    finally:
        for hook in hooks:
            hook.remove()
        model.set_attn_implementation(before)


@contextmanager
def installed(
    model: Any,
    config: BeaconConfig,
    weights: BeaconWeights | None = None,
    options: MemoryOptions | None = None,
    recompute: bool = False,
) -> Iterator[Any]:
    """Let ``model`` compress what it reads into beacons, in ``forward`` and in ``generate``; yield the model.

    A ``BeaconCache`` is made for every call that is given none. On leaving, the model is as it was.

    Args:
        model: a stock Llama, Mistral, Qwen2 or Qwen3 of transformers.
        config: windows and ratios.
        weights: the beacons' parameters; None = untrained ones, which start from the base model's.
        options: what goes beyond the reference.
        recompute: activation checkpointing, in training: windows are computed once more in the backward pass.

    Raises:
        ValueError: another architecture, a sliding window, weights made for another model or config, or beacons
            installed already.

    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> model = LlamaForCausalLM(LlamaConfig(vocab_size=9, hidden_size=8, intermediate_size=8, num_hidden_layers=1,
    ...                                      num_attention_heads=2, eos_token_id=2)).eval()
    >>> with installed(model, BeaconConfig(window=8, stride=8, ratio=(4,))), torch.no_grad():
    ...     cache = model(torch.ones(1, 20, dtype=torch.long)).past_key_values
    >>> cache.seen, cache.held  # two windows of two beacons each, then four raw tokens and a beacon
    ([20], [9])
    """
    names = backbone(model)
    decoder = model.get_decoder()
    weights = BeaconWeights.initialised(model, config) if weights is None else weights
    if weights.config.param != config.param:
        raise ValueError(
            f"the beacon weights have projections {weights.config.param}, the config asks for {config.param}"
        )
    weights.check(model)
    window = getattr(model.config, "sliding_window", None)
    sliding = "sliding_attention" in (getattr(model.config, "layer_types", None) or ["sliding_attention"])
    if window and sliding and window < model.config.max_position_embeddings:
        raise ValueError(
            f"the model attends through a sliding window of {window:,} tokens, beacons attend everything: set its "
            "config's sliding_window to None if it can do without"
        )
    if getattr(model.config, LOG_ORIGIN, 0):
        raise ValueError(
            f"the model sharpens attention by the number of keys ({LOG_ORIGIN} of its config), which beacons do not: "
            "set it to 0 if it can do without"
        )
    if has_beacons(model):
        raise ValueError("beacons are installed on this model already: leave the other block first")
    reader = WindowReader(model, names, config, weights, options or MemoryOptions(), recompute)
    before = vars(decoder).get("forward")

    def note_needed(module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        keep = kwargs.get("logits_to_keep", 0)
        NEEDED.set(keep if isinstance(keep, int) and kwargs.get("labels") is None else 0)

    hook = model.register_forward_pre_hook(note_needed, with_kwargs=True)
    decoder.forward = reader
    try:
        yield model
    finally:
        hook.remove()
        if before is None:
            del decoder.forward
        else:
            decoder.forward = before


def has_beacons(model: Any) -> bool:
    """Say whether beacons are installed on a model."""
    return isinstance(vars(model.get_decoder()).get("forward"), WindowReader)


def _begin(decoder: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """Before the decoder runs: plan the step and give it its positions."""
    cache = kwargs.get("past_key_values")
    if not isinstance(cache, CompressedCache):
        _ACTIVE.set(None)
        return args, kwargs
    tokens = kwargs.get("inputs_embeds")
    if tokens is None:
        tokens = kwargs["input_ids"] if "input_ids" in kwargs else args[0]
    rows, columns = tokens.shape[:2]
    positions = cache.begin(columns, kwargs.get("attention_mask"), kwargs.get("position_ids"), rows)
    _ACTIVE.set(cache)
    return args, {**kwargs, "position_ids": positions.to(tokens.device), "use_cache": True}


def _end(decoder: torch.nn.Module, args: Any, output: Any) -> None:
    """After the decoder has run, or failed: close the step."""
    cache = _ACTIVE.get()
    _ACTIVE.set(None)
    if cache is None or cache.step is None:
        return
    if output is None:
        cache.abandon()
    else:
        cache.end()


def _attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: Any,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Run one attention layer; shapes as ``flashcore.hf.attention.attention_layer``."""
    cache = _ACTIVE.get()
    index = int(getattr(module, "layer_idx", -1))
    if cache is None or not isinstance(cache.layers[index], CompressedLayer):
        return attention_layer(module, query, key, value, attention_mask, **kwargs)
    spec = cache.spec(index, key.shape[2])
    output = attention_layer(module, query, key, value, CallMask(spec, key.shape[2]), **kwargs)
    scored = dataclasses.replace(spec, scale=kwargs.get("scaling"), softcap=kwargs.get("softcap"))
    cache.attended(index, query, scored)
    return output
