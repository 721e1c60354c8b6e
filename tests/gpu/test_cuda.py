"""The same checks on a real CUDA device: every backend against the reference. Skipped where there is none."""

import pytest
import torch

from flashcore import AttentionSpec, attention, attention_mass
from flashcore.backends import available

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
SPECS = {
    "full": {},
    "causal": {"causal": True},
    "window": {"causal": True, "window": 33},
    "two-sided window": {"window": (20, 7)},
    "softcap": {"causal": True, "softcap": 20.0},
    "right padded": {"causal": True, "lengths": [200, 77]},
    "left padded": {"causal": True, "lengths": [200, 77], "left_padded": True},
    "mask": {"causal": True, "mask": lambda batch, head, query, key: (query + key) % 3 != 0},
}


def call(name: str, n: int, m: int, dtype: torch.dtype):
    options = dict(SPECS[name])
    if "lengths" in options:
        options["lengths"] = torch.tensor([min(length, m) for length in options["lengths"]], device="cuda")
    q = torch.randn(2, 8, n, 64, dtype=dtype, device="cuda", requires_grad=True)
    k, v = (torch.randn(2, 2, m, 64, dtype=dtype, device="cuda", requires_grad=True) for _ in range(2))
    return (q, k, v), AttentionSpec(**options)


@pytest.mark.parametrize("backend", ["auto", "sdpa", "flex", "flash"])
@pytest.mark.parametrize("shape", [(200, 200), (50, 200), (1, 200)], ids=str)
@pytest.mark.parametrize("name", SPECS)
def test_backends_equal_the_reference_with_gradients(name, shape, backend):
    if backend != "auto" and available()[backend] != "ok":
        pytest.skip(available()[backend])
    tensors, spec = call(name, *shape, torch.bfloat16)
    try:
        ours = attention(*tensors, spec, backend)
    except NotImplementedError as reason:
        pytest.skip(str(reason))
    truth = attention(*tensors, spec, "reference")
    torch.testing.assert_close(ours, truth, atol=2e-2, rtol=2e-2)
    weights = torch.randn_like(ours)
    grads = torch.autograd.grad((ours * weights).sum(), tensors)
    for grad, true in zip(grads, torch.autograd.grad((truth * weights).sum(), tensors), strict=True):
        assert (grad - true).float().norm() <= 3e-2 * true.float().norm() + 1e-3


def test_decoding_from_a_padded_cache_equals_the_reference():
    tensors, spec = call("right padded", 1, 300, torch.bfloat16)
    with torch.no_grad():
        torch.testing.assert_close(
            attention(*tensors, spec), attention(*tensors, spec, "reference"), atol=2e-2, rtol=2e-2
        )


def test_mass_equals_the_cpu():
    (q, k, _), spec = call("window", 50, 200, torch.float32)
    torch.testing.assert_close(
        attention_mass(q, k, spec).cpu(), attention_mass(q.cpu(), k.cpu(), spec), atol=1e-4, rtol=1e-4
    )


def test_memory_stays_linear():
    n = 32768
    q, k, v = (torch.randn(1, 2, n, 64, dtype=torch.bfloat16, device="cuda") for _ in range(3))
    for spec in (AttentionSpec(causal=True, softcap=30.0), AttentionSpec(causal=True, window=4096)):
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        attention(q, k, v, spec)
        assert torch.cuda.max_memory_allocated() - before < 300e6  # one n x n bf16 matrix is 2.1 GB
