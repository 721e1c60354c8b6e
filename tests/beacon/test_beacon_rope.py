"""Every kind of RoPE that transformers has for Llama works with beacons, beyond the trained length too."""

import importlib.util
from pathlib import Path

import pytest
import torch

spec = importlib.util.spec_from_file_location("naive_beacon", Path(__file__).with_name("naive_beacon.py"))
slow = importlib.util.module_from_spec(spec)
spec.loader.exec_module(slow)

STRETCHED = {"original_max_position_embeddings": 16, "factor": 4.0}
FIXED = {
    "default": {},
    "linear": {"factor": 2.0},
    "yarn": STRETCHED,
    "llama3": {**STRETCHED, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
    "proportional": {"partial_rotary_factor": 0.5},
}
#: with speeds that depend on the length
RESTLESS = {
    "dynamic": {"factor": 2.0},
    "longrope": {**STRETCHED, "short_factor": [1.0, 1.1, 1.2, 1.3], "long_factor": [1.5, 2.0, 3.0, 4.0]},
}


def model_of(kind):
    settings = {**FIXED, **RESTLESS}[kind]
    most = 64 if "original_max_position_embeddings" in settings else 16
    # A low base: on a text this short, all channels must turn.
    rope = {"rope_type": kind, "rope_theta": 100.0, **settings}
    return slow.fresh("llama", rope_parameters=rope, max_position_embeddings=most)


def state_of(module):
    parts = {**vars(module), **module._buffers}
    return {name: value.tolist() if isinstance(value, torch.Tensor) else str(value) for name, value in parts.items()}


@pytest.mark.parametrize("kind", FIXED)
def test_ratio_0_beyond_the_trained_length_is_the_stock_model(kind):
    model, ids = model_of(kind), torch.randint(1, 97, (1, 45))
    engine = slow.Engine(model, slow.settings(ratio=(0,)))
    torch.testing.assert_close(engine.read(ids, pieces=[29] + [1] * 16), model(ids).logits, rtol=0, atol=1e-9)


@pytest.mark.parametrize("ratio", [(3,), (4, 0)], ids=str)
@pytest.mark.parametrize("kind", [*FIXED, *RESTLESS])
def test_keys_have_the_speeds_of_the_length_held_now(kind, ratio):
    # The slow writing rotates every key anew with the stock module in every forward pass.
    engine, pieces = slow.Engine(model_of(kind), slow.settings(ratio=ratio)), [29] + [1] * 16
    ids, naive = torch.randint(1, 97, (1, 45)), engine.naive()
    before = state_of(engine.model.model.rotary_emb)
    expected = torch.cat([naive.read(part) for part in ids[0].split(pieces)])
    # Turning held keys to other speeds is one more rotation, in fp32.
    atol = 1e-9 if kind in FIXED else 2e-5
    torch.testing.assert_close(engine.read(ids, pieces=pieces)[0], expected, rtol=0, atol=atol)
    assert state_of(engine.model.model.rotary_emb) == before


@pytest.mark.parametrize("kind", RESTLESS)
@pytest.mark.parametrize("options", [{"keep_recent": 3}, {"lossless_short": True}], ids=str)
def test_speeds_follow_the_length_with_our_own_options_too(kind, options):
    engine, ids = slow.Engine(model_of(kind), slow.settings(ratio=(2,)), **options), torch.randint(1, 97, (1, 45))
    naive = engine.naive(keep_recent=options.get("keep_recent", 0), lossless="lossless_short" in options)
    expected = torch.cat([naive.read(part) for part in ids[0].split([29] + [1] * 16)])
    torch.testing.assert_close(engine.read(ids, pieces=[29] + [1] * 16)[0], expected, rtol=0, atol=2e-5)


@pytest.mark.parametrize("kind", RESTLESS)
def test_a_reset_or_forked_cache_does_not_remember_lengths_of_other_texts(kind):
    # With ratio 1 the first window is as long as the trained length: no shorter one would reveal what is remembered.
    engine, long, short = slow.Engine(model_of(kind), slow.settings(ratio=(1,))), *torch.randint(1, 97, (2, 1, 60))
    expected, cache = engine.read(short[:, :18]), engine.cache()
    engine.read(long[:, :10], cache=cache)
    other = cache.fork()
    engine.read(long[:, 10:], cache=cache)
    fresh = engine.cache()
    engine.read(long[:, :10], cache=fresh)
    after = engine.read(short[:, :8], cache=fresh)
    torch.testing.assert_close(engine.read(short[:, :8], cache=other), after, rtol=0, atol=2e-5)
    forgetful = cache.fork()
    forgetful.forget()
    torch.testing.assert_close(engine.read(short[:, :18], cache=forgetful), expected, rtol=0, atol=2e-5)
    cache.reset()
    torch.testing.assert_close(engine.read(short[:, :18], cache=cache), expected, rtol=0, atol=2e-5)
