"""attention_mass against softmax written out, and its invariants."""

import torch

from flashcore import AttentionSpec, attention_mass


def naive(q, k, hidden, scale, softcap=None):
    groups = q.shape[1] // k.shape[1]
    scores = q.float() @ k.float().repeat_interleave(groups, 1).transpose(2, 3) * scale
    scores = scores if softcap is None else softcap * torch.tanh(scores / softcap)
    weights = scores.masked_fill(hidden, -1e30).softmax(-1).masked_fill(hidden, 0)
    return weights.unflatten(1, (k.shape[1], groups)).sum((2, 3))


def test_mass_equals_column_sums_of_the_softmax():
    q, k = torch.randn(2, 6, 7, 16), torch.randn(2, 2, 300, 16)
    position = torch.arange(7)[:, None] + 293
    distance = torch.arange(300)[None] - position
    cases = [
        (AttentionSpec(), torch.zeros(7, 300, dtype=torch.bool)),
        (AttentionSpec(causal=True), distance > 0),
        (AttentionSpec(causal=True, window=20, softcap=2.0), (distance > 0) | (distance < -19)),
    ]
    for spec, hidden in cases:
        expected = naive(q, k, hidden, 0.25, spec.softcap)
        torch.testing.assert_close(attention_mass(q, k, spec), expected, atol=1e-5, rtol=1e-4)


def test_mass_adds_up_to_the_queries_that_see_something():
    q, k = torch.randn(3, 4, 9, 8), torch.randn(3, 2, 9, 8)
    spec = AttentionSpec(causal=True, lengths=torch.tensor([9, 4, 0]), left_padded=True)
    mass = attention_mass(q, k, spec)
    torch.testing.assert_close(mass.sum(-1), torch.tensor([9.0, 4.0, 0.0])[:, None].expand(3, 2) * 2)
    assert not mass[1, :, :5].any()


def test_mass_is_blockwise(monkeypatch):
    from flashcore import blockwise, mass

    q, k = torch.randn(1, 2, 50, 8), torch.randn(1, 1, 70, 8)
    whole = attention_mass(q, k, AttentionSpec(causal=True))
    monkeypatch.setattr(mass, "HELD_SCORES", 2 * 70 * 16)
    monkeypatch.setattr(blockwise, "KEY_BLOCK", 16)
    torch.testing.assert_close(attention_mass(q, k, AttentionSpec(causal=True)), whole)
