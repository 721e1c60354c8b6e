"""Attention sharpened by the number of keys equals eager attention with scaled queries, padded, chunked and cached."""

import copy
import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from flashcore import AttentionSpec
from flashcore.hf import GrowingCache, register
from flashcore.hf.attention import LOG_ORIGIN, log_scaled

ORIGIN = 4


@pytest.fixture(scope="module")
def models() -> tuple[Any, Any]:
    """The same weights on eager attention, and on flashcore with an origin of four keys."""
    register()
    sizes = {"vocab_size": 40, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    config = LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2, initializer_range=0.6)
    torch.manual_seed(0)
    eager = LlamaForCausalLM._from_config(copy.deepcopy(config), attn_implementation="eager").eval()
    ours = LlamaForCausalLM._from_config(copy.deepcopy(config), attn_implementation="flashcore").eval()
    ours.load_state_dict(eager.state_dict())
    setattr(ours.config, LOG_ORIGIN, ORIGIN)
    return eager, ours


@contextmanager
def scaled(model: Any, positions: torch.Tensor) -> Iterator[None]:
    """Multiply the queries of every layer by max(1, ln(position + 1) / ln(origin)), before they are rotated."""
    factor = (positions + 1).float().log().div(math.log(ORIGIN)).clamp(min=1)[..., None]
    hooks = [
        layer.self_attn.q_proj.register_forward_hook(lambda module, given, out: out * factor)
        for layer in model.model.layers
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


@pytest.mark.parametrize("padding", ["none", "left", "right"])
def test_queries_are_scaled_by_the_keys_they_see(models: tuple[Any, Any], padding: str) -> None:
    eager, ours = models
    ids, mask = torch.randint(1, 40, (2, 14)), torch.ones(2, 14, dtype=torch.long)
    if padding != "none":
        mask[0, slice(0, 5) if padding == "left" else slice(9, 14)] = 0
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    inputs = {"input_ids": ids, "attention_mask": mask, "position_ids": positions}
    with torch.no_grad(), scaled(eager, positions):
        wanted = eager(**inputs).logits
    with torch.no_grad():
        got, plain = ours(**inputs).logits, eager(**inputs).logits
    torch.testing.assert_close(got[mask.bool()], wanted[mask.bool()], atol=2e-5, rtol=1e-4)
    assert (got - plain)[mask.bool()].abs().max() > 0.01


def test_chunks_and_single_tokens_are_scaled_as_one_pass(models: tuple[Any, Any]) -> None:
    _, ours = models
    ids = torch.randint(1, 40, (1, 17))
    with torch.no_grad():
        wanted, cache = ours(ids).logits, GrowingCache(ours.config)
        parts = [ours(part, past_key_values=cache).logits for part in ids.split([3, 8, 1, 1, 4], dim=1)]
    torch.testing.assert_close(torch.cat(parts, 1), wanted, atol=2e-5, rtol=1e-4)


def test_few_keys_change_nothing_and_gradients_pass() -> None:
    query = torch.randn(1, 2, 3, 8, requires_grad=True)
    assert log_scaled(query, ORIGIN, ORIGIN) is query
    log_scaled(query, 16, ORIGIN).sum().backward()
    assert query.grad is not None
    assert query.grad[0, 0, :, 0].tolist() == pytest.approx([math.log(n) / math.log(4) for n in (14, 15, 16)])


def test_padding_before_a_row_is_not_counted() -> None:
    spec = AttentionSpec(
        causal=True, lengths=torch.tensor([16, 4]), query_lengths=torch.tensor([1, 1]), left_padded=True
    )
    found = log_scaled(torch.ones(2, 1, 1, 1), 16, ORIGIN, spec).flatten().tolist()
    assert found == pytest.approx([2.0, 1.0])
