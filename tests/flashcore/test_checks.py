"""What attention refuses, and what the CPU path must not need."""

import subprocess
import sys

import pytest
import torch

from flashcore import AttentionSpec, attention, cpu_dtype
from flashcore.dtype import gemm_seconds, has_fast_bf16


def zeros(batch=1, heads=2, seq=3, d=4, **options):
    return torch.zeros(batch, heads, seq, d, **options)


@pytest.mark.parametrize(
    ("q", "k", "v", "spec", "error", "words"),
    [
        ([1], zeros(), zeros(), None, TypeError, "q must be a tensor"),
        (zeros()[0], zeros(), zeros(), None, ValueError, "batch, heads, seq, head_dim"),
        (zeros(), zeros(dtype=torch.float64), zeros(), None, TypeError, "one dtype"),
        (*(zeros().int() for _ in range(3)), None, TypeError, "floating-point"),
        (zeros(), zeros(), zeros(seq=4), None, ValueError, "k and v must agree"),
        (zeros(), zeros(d=5), zeros(d=5), None, ValueError, "batch and head_dim"),
        (zeros(heads=3), zeros(), zeros(), None, ValueError, "multiple of kv_heads"),
        (zeros(), zeros(device="meta"), zeros(), None, ValueError, "one device"),
        (zeros(), zeros(), zeros(), {"lengths": torch.tensor([4])}, ValueError, "0..3"),
        (zeros(), zeros(), zeros(), {"lengths": torch.tensor([1, 2])}, ValueError, r"integers \[1\]"),
        (zeros(), zeros(), zeros(), {"cu_seqlens": torch.tensor([0, 2])}, ValueError, "rise from 0 to 3"),
        (zeros(2), zeros(2), zeros(2), {"cu_seqlens": torch.tensor([0, 3])}, ValueError, "packed row"),
    ],
)
def test_tensors_that_do_not_fit_are_refused(q, k, v, spec, error, words):
    with pytest.raises(error, match=words):
        attention(q, k, v, AttentionSpec(**spec) if spec else None)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"window": 0}, "window"),
        ({"window": (-1, 2)}, "window"),
        ({"softcap": 0.0}, "softcap"),
        ({"scale": float("nan")}, "scale"),
        ({"lengths": torch.ones(1), "cu_seqlens": torch.ones(2)}, "not both"),
        ({"left_padded": True}, "give lengths"),
    ],
)
def test_senseless_specs_are_refused(options, words):
    with pytest.raises(ValueError, match=words):
        AttentionSpec(**options)


def test_unknown_backend_lists_the_valid_ones():
    with pytest.raises(ValueError, match=r"'quick'.*reference.*sdpa"):
        attention(zeros(), zeros(), zeros(), backend="quick")


def test_empty_sides_give_empty_or_zero_results():
    assert attention(zeros(seq=0), zeros(), zeros()).shape == (1, 2, 0, 4)
    assert not attention(zeros(), zeros(seq=0), zeros(seq=0)).any()


def test_extreme_scores_stay_finite():
    q, k, v = (torch.randn(1, 2, 300, 16) for _ in range(3))
    spec = AttentionSpec(causal=True, window=100)
    out = attention(q * 1e4, k * 1e4, v, spec, "sdpa")
    torch.testing.assert_close(out, attention(q * 1e4, k * 1e4, v, spec, "reference"))


MEMORY_RUN = """
import sys, torch
def peak():  # not ru_maxrss: that one is inherited from the parent process
    return int(next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1]) * 1024
from flashcore import AttentionSpec, attention
n, backend = int(sys.argv[1]), sys.argv[2]
torch.set_num_threads(1)
q, k, v = (torch.randn(1, 1, n, 8, requires_grad=backend == "sdpa") for _ in range(3))
specs = [AttentionSpec(causal=True, softcap=5.0), AttentionSpec(causal=True, window=n // 2),
         AttentionSpec(causal=True, lengths=torch.tensor([n - 5]), left_padded=True)]
warm = attention(q[:, :, :64], k[:, :, :64], v[:, :, :64], specs[0], backend).sum()
if backend == "sdpa": warm.backward()
before = peak()
for spec in specs:
    out = attention(q, k, v, spec, backend)
    if backend == "sdpa": out.sum().backward()
print(peak() - before)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads the peak memory from /proc")
@pytest.mark.parametrize("backend", ["sdpa", "auto"])
def test_cpu_memory_never_holds_a_score_matrix(backend):
    n = 8192
    run = subprocess.run(
        [sys.executable, "-c", MEMORY_RUN, str(n), backend], capture_output=True, text=True, check=True
    )
    # One fp32 n x n matrix would be 268 MB and a bool one 67 MB; tiles and their gradients need a few MB.
    assert int(run.stdout) < 60e6


def test_cpu_dtype_never_is_fp16_and_follows_the_measured_products():
    seconds = gemm_seconds()
    assert set(seconds) == {torch.float32, torch.bfloat16}
    assert cpu_dtype() is (torch.bfloat16 if has_fast_bf16() else torch.float32)
    assert cpu_dtype("fp16") is cpu_dtype(torch.float16) is cpu_dtype("auto") is cpu_dtype()
    assert cpu_dtype("bf16") is torch.bfloat16
    with pytest.raises(ValueError, match="choose auto"):
        cpu_dtype("int4")
