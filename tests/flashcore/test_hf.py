"""Stock transformers models give the same outputs and gradients on flashcore as on transformers' eager attention."""

import copy

import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    DynamicCache,
    StaticCache,
    masking_utils,
)

from flashcore import AttentionSpec
from flashcore.hf import GrowingCache, cache_bytes, register
from flashcore.hf.attention import attention_layer
from flashcore.hf.masks import call_mask, recognised

SIZES = {
    "vocab_size": 40,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
}
DECODER = {**SIZES, "num_key_value_heads": 2, "head_dim": 8, "pad_token_id": 0, "attention_dropout": 0.0}
HYBRID = {"sliding_window": 5, "layer_types": ["sliding_attention", "full_attention"]}
DECODERS = {
    "llama": DECODER,
    "mistral": {**DECODER, "sliding_window": 5},
    "qwen2": {**DECODER, **HYBRID, "use_sliding_window": True},
    "qwen3": DECODER,
    "gemma": DECODER,
    "gemma2": {**DECODER, **HYBRID, "attn_logit_softcapping": 5.0, "query_pre_attn_scalar": 8},
    "gemma3_text": {**DECODER, **HYBRID, "query_pre_attn_scalar": 8},
}
ENCODER = {**SIZES, "pad_token_id": 0, "attention_probs_dropout_prob": 0.0, "hidden_dropout_prob": 0.0}
ENCODERS = {"bert": ENCODER, "xlm-roberta": ENCODER}
PADDINGS = ["none", "left", "right", "holes"]


@pytest.fixture(autouse=True)
def _registered():
    register()


def pair(kind: str, auto: type = AutoModelForCausalLM):
    """Return two models with the same weights: on eager attention and on flashcore."""
    config = AutoConfig.for_model(kind, **{**DECODERS, **ENCODERS}[kind])
    eager = auto.from_config(copy.deepcopy(config), attn_implementation="eager").eval()
    ours = auto.from_config(copy.deepcopy(config), attn_implementation="flashcore").eval()
    ours.load_state_dict(eager.state_dict())
    assert ours.config._attn_implementation == "flashcore"
    return eager, ours


def batch(padding: str, rows: int = 3, length: int = 12):
    """Return (input ids, 2-D mask or None, position ids) of one kind of padding."""
    ids = torch.randint(1, 40, (rows, length))
    if padding == "none":
        return ids, None, torch.arange(length).expand(rows, length)
    mask = torch.ones(rows, length, dtype=torch.long)
    if padding == "left":
        mask[0, :5] = mask[1, :1] = 0
    elif padding == "right":
        mask[0, -5:] = mask[1, -1:] = 0
    else:
        mask[0, 3:6] = mask[1, 0] = mask[1, 7] = 0
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    return ids * mask, mask, positions


def compare(ours, theirs, mask, atol=2e-5):
    valid = slice(None) if mask is None else mask.bool()
    torch.testing.assert_close(ours[valid], theirs[valid], atol=atol, rtol=1e-4)


@pytest.mark.parametrize("padding", PADDINGS)
@pytest.mark.parametrize("kind", [*DECODERS, *ENCODERS])
def test_outputs_and_gradients_equal_eager(kind, padding):
    auto = AutoModel if kind in ENCODERS else AutoModelForCausalLM
    ids, mask, positions = batch(padding)
    arguments = {"attention_mask": mask} | ({} if kind in ENCODERS else {"position_ids": positions})
    states, grads = [], []
    # Not the squared norm: behind a layer norm that is constant and its gradient nothing but rounding.
    direction = torch.randn(12, 40 if kind in DECODERS else 32)
    for model in pair(kind, auto):
        out = model(ids, **arguments)
        state = out.last_hidden_state if kind in ENCODERS else out.logits
        kept = torch.ones(3, 12) if mask is None else mask
        (state * direction * kept[..., None]).sum().backward()
        states.append(state.detach())
        grads.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    compare(states[1], states[0], mask)
    assert grads[0].keys() == grads[1].keys()
    for name, grad in grads[0].items():
        # Relative to the tensor's size: single entries near zero are sums of cancelling fp32 terms.
        assert (grads[1][name] - grad).norm() <= 1e-4 * grad.norm() + 1e-5, name


@pytest.mark.parametrize("make_cache", [DynamicCache, GrowingCache, StaticCache], ids=lambda c: c.__name__)
@pytest.mark.parametrize("padding", PADDINGS)
@pytest.mark.parametrize("kind", DECODERS)
def test_chunks_and_single_tokens_through_a_cache_equal_one_eager_pass(kind, padding, make_cache):
    eager, ours = pair(kind)
    ids, mask, positions = batch(padding)
    with torch.no_grad():
        expected = eager(ids, attention_mask=mask, position_ids=positions).logits
        cache = make_cache(config=ours.config, **({"max_cache_len": 16} if make_cache is StaticCache else {}))
        parts = []
        for start, stop in ((0, 4), (4, 9), (9, 10), (10, 11), (11, 12)):
            seen = None if mask is None else mask[:, :stop]
            out = ours(
                ids[:, start:stop],
                attention_mask=seen,
                position_ids=positions[:, start:stop],
                past_key_values=cache,
            )
            parts.append(out.logits)
    compare(torch.cat(parts, 1), expected, mask)


@pytest.mark.parametrize("kind", DECODERS)
def test_generate_gives_the_tokens_of_eager(kind):
    eager, ours = pair(kind)
    ids, mask, _ = batch("left")
    options = {"attention_mask": mask, "max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    expected = eager.generate(ids, **options)
    assert torch.equal(ours.generate(ids, **options), expected)
    cache = GrowingCache(ours.config, capacity=16)
    assert torch.equal(ours.generate(ids, past_key_values=cache, **options), expected)


def test_beam_search_reorders_a_growing_cache():
    eager, ours = pair("llama")
    ids, _, _ = batch("none")
    options = {"max_new_tokens": 9, "num_beams": 3, "do_sample": False, "pad_token_id": 0}
    grown = ours.generate(ids, past_key_values=GrowingCache(ours.config), **options)
    assert torch.equal(grown, eager.generate(ids, **options))


def test_a_growing_cache_writes_in_place_crops_and_counts_its_bytes():
    _, ours = pair("llama")
    ids, _, _ = batch("none", rows=1)
    cache = GrowingCache(ours.config, capacity=12)
    with torch.no_grad():
        ours(ids[:, :6], past_key_values=cache)
        address = cache.layers[0].keys.data_ptr()
        expected = ours(ids[:, 6:], past_key_values=cache).logits
        assert cache.layers[0].keys.data_ptr() == address
        assert cache_bytes(cache) == 2 * 2 * 2 * 12 * 8 * 4  # layers, k and v, kv heads, tokens, head_dim, fp32
        cache.crop(-6)
        assert cache.get_seq_length() == 6
        again = ours(ids[:, 6:], past_key_values=cache, position_ids=torch.arange(6, 12)[None]).logits
        torch.testing.assert_close(again, expected)
        cache.reset()
        assert cache.get_seq_length() == cache_bytes(cache) == 0


def test_a_growing_cache_grows_past_its_capacity_and_copies_apart():
    _, ours = pair("llama")
    ids, _, _ = batch("none", rows=2)
    cache = GrowingCache(ours.config)
    with torch.no_grad():
        expected = ours(ids).logits[:, -1]
        for token in ids.T[:-1]:
            ours(token[:, None], past_key_values=cache)
        fork = copy.deepcopy(cache)
        ours(torch.ones_like(ids[:, :3]), past_key_values=fork)
        last = ours(ids[:, -1:], past_key_values=cache).logits[:, -1]
    torch.testing.assert_close(last, expected, atol=2e-5, rtol=1e-4)
    assert (cache.get_seq_length(), fork.get_seq_length()) == (12, 14)


def test_a_growing_cache_lets_gradients_through():
    _, ours = pair("llama")
    ids, _, _ = batch("none", rows=1)
    cache = GrowingCache(ours.config)
    ours(ids[:, :6], past_key_values=cache)
    ours(ids[:, 6:], past_key_values=cache).logits.sum().backward()
    assert all(p.grad is not None for p in ours.parameters())
    with pytest.raises(ValueError, match="negative"):
        GrowingCache(ours.config, capacity=-1)


def test_plain_masks_become_spec_fields_and_others_stay_functions():
    assert recognised(masking_utils.causal_mask_function) == {"causal": True}
    assert recognised(masking_utils.bidirectional_mask_function) == {}
    assert recognised(masking_utils.sliding_window_causal_mask_function(7)) == {"causal": True, "window": (6, None)}
    assert recognised(masking_utils.sliding_window_bidirectional_mask_function(7)) == {"window": (7, 7)}
    assert recognised(masking_utils.chunked_causal_mask_function(4, torch.zeros(1))) is None
    assert recognised(lambda batch, head, query, key: key < 3) is None


def test_padding_becomes_lengths_unless_it_has_holes():
    def spec(mask):
        return call_mask(1, 4, 4, attention_mask=torch.tensor([mask], dtype=torch.bool)).spec

    assert spec([1, 1, 1, 1]).lengths is None
    assert spec([0, 1, 1, 1]).left_padded
    assert spec([1, 1, 0, 0]).lengths.tolist() == [2]
    assert spec([1, 0, 1, 1]).mask is not None


@pytest.mark.parametrize("kind", ["llama", "gemma2"])
def test_packed_position_ids_separate_documents(kind):
    eager, ours = pair(kind)
    ids, _, _ = batch("none", rows=1)
    positions = torch.cat((torch.arange(5), torch.arange(7)))[None]
    with torch.no_grad():
        torch.testing.assert_close(
            ours(ids, position_ids=positions).logits,
            eager(ids, position_ids=positions).logits,
            atol=2e-5,
            rtol=1e-4,
        )


def test_a_mask_made_by_the_caller_is_honoured():
    eager, ours = pair("llama")
    ids, _, _ = batch("none")
    allowed = torch.ones(12, 12, dtype=torch.bool).tril()
    allowed[8:, 2:5] = False
    additive = torch.zeros(3, 1, 12, 12).masked_fill(~allowed, torch.finfo(torch.float32).min)
    with torch.no_grad():
        expected = eager(ids, attention_mask=additive).logits
        torch.testing.assert_close(ours(ids, attention_mask=additive).logits, expected, atol=2e-5, rtol=1e-4)
        boolean = allowed.expand(3, 1, 12, 12)
        torch.testing.assert_close(ours(ids, attention_mask=boolean).logits, expected, atol=2e-5, rtol=1e-4)
    with pytest.raises(NotImplementedError, match="bias"):
        ours(ids, attention_mask=additive + torch.rand(3, 1, 12, 12))


def test_what_flashcore_lacks_is_refused():
    _, ours = pair("llama")
    layer, q = ours.model.layers[0].self_attn, torch.zeros(1, 4, 2, 8)
    with pytest.raises(ValueError, match="dropout"):
        attention_layer(layer, q, q, q, None, dropout=0.1)
    with pytest.raises(NotImplementedError, match="s_aux"):
        attention_layer(layer, q, q, q, None, s_aux=q)
    with pytest.raises(ValueError, match="unknown attention backend"):
        register("broken", backend="quick")


def test_autocast_and_a_bare_call_work():
    _, ours = pair("llama")
    ids, _, _ = batch("none")
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        assert ours(ids).logits.isfinite().all()
    layer, q = ours.model.layers[0].self_attn, torch.randn(1, 4, 6, 8)
    from flashcore import attention

    out, weights = attention_layer(layer, q, q[:, :2], q[:, :2], None, sliding_window=3)
    expected = attention(q, q[:, :2], q[:, :2], AttentionSpec(causal=True, window=3), "reference")
    torch.testing.assert_close(out, expected.transpose(1, 2))
    assert weights is None


def test_a_growing_cache_keeps_the_gradient_of_values_alone():
    _, ours = pair("llama")
    cache = GrowingCache(ours.config)
    keys, first, second = torch.ones(1, 2, 3, 8), *(torch.ones(1, 2, 3, 8, requires_grad=True) for _ in range(2))
    cache.update(keys, first, layer_idx=0)
    _, values = cache.update(keys, second, layer_idx=0)
    values.square().sum().backward()
    assert first.grad.any()
    assert second.grad.any()
