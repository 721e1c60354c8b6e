"""RoPE tools against transformers' own rotary embeddings, and the relativity they rest on."""

import pytest
import torch
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

from flashcore import rope

LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}


def theirs(parameters):
    config = LlamaConfig(hidden_size=64, num_attention_heads=2, max_position_embeddings=512, rope_parameters=parameters)
    return LlamaRotaryEmbedding(config)


def test_tables_and_rotation_equal_transformers():
    x, positions = torch.randn(2, 4, 9, 32), torch.arange(100, 109)
    embedding = theirs({"rope_type": "default", "rope_theta": 10000.0})
    cos, sin = embedding(x, positions[None])
    expected, _ = apply_rotary_pos_emb(x, x, cos, sin)
    ours = rope.rotate(x, *rope.tables(positions, rope.inverse_frequencies(32)))
    torch.testing.assert_close(ours, expected)


def test_scaled_frequencies_equal_transformers():
    linear = theirs({"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}).inv_freq
    torch.testing.assert_close(rope.interpolated(rope.inverse_frequencies(32), 4.0), linear)
    ours = rope.llama3_scaled(rope.inverse_frequencies(32, 500000.0), original_max_position=64)
    torch.testing.assert_close(ours, theirs(LLAMA3).inv_freq)


def test_stretched_base_slows_the_slowest_channel_by_the_factor():
    before = rope.inverse_frequencies(64, 10000.0)
    after = rope.inverse_frequencies(64, rope.stretched_base(10000.0, 8.0, 64))
    assert after[0] == before[0]
    torch.testing.assert_close(before[-1] / after[-1], torch.tensor(8.0))


def test_rerotated_keys_equal_keys_rotated_there_first():
    plain, speeds = torch.randn(2, 3, 6, 32), rope.inverse_frequencies(32)
    old = torch.randint(0, 200_000, (2, 6))
    new = torch.randint(0, 200_000, (2, 6))
    keys = rope.rotate(plain.double(), *(t[:, None] for t in rope.from_angles(old[..., None] * speeds.double())))
    keys = keys.float()
    expected = rope.rotate(plain.double(), *(t[:, None] for t in rope.from_angles(new[..., None] * speeds.double())))
    torch.testing.assert_close(rope.rerotate(keys, old, new, speeds), expected.float(), atol=1e-4, rtol=1e-4)


def test_a_change_of_base_is_undone_by_its_inverse():
    keys, positions = torch.randn(1, 2, 8, 16), torch.arange(8) * 1000
    slow, fast = rope.inverse_frequencies(16, 1e6), rope.inverse_frequencies(16, 1e4)
    there = rope.rerotate(keys, positions, positions, fast, slow)
    assert (there - keys).abs().max() > 0.1
    torch.testing.assert_close(rope.rerotate(there, positions, positions, slow, fast), keys, atol=1e-5, rtol=1e-4)


def test_a_common_shift_keeps_all_scores():
    q, k, speeds = torch.randn(1, 1, 4, 16), torch.randn(1, 1, 4, 16), rope.inverse_frequencies(16)
    here, there = torch.arange(4), torch.arange(4) + 5000
    scores = q @ k.transpose(2, 3)
    moved = [rope.rerotate(x, here, there, speeds) for x in (q, k)]
    torch.testing.assert_close(moved[0] @ moved[1].transpose(2, 3), scores, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    "call",
    [
        lambda: rope.inverse_frequencies(7),
        lambda: rope.inverse_frequencies(8, base=1.0),
        lambda: rope.interpolated(torch.ones(2), 0.5),
        lambda: rope.stretched_base(1e4, 0.5, 64),
        lambda: rope.rerotate(torch.ones(1, 1, 3, 4), torch.arange(2), torch.arange(3), torch.ones(2)),
    ],
)
def test_senseless_arguments_are_refused(call):
    with pytest.raises(ValueError, match="received"):
        call()
