"""The compiled CPU kernel against a float64 computation written out here, over all it claims to do."""

import itertools
import os
import stat
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch

from flashcore.backends import native
from flashcore.spec import AttentionSpec

SIZES = [(1, 1), (1, 77), (5, 5), (64, 64), (33, 130), (130, 130), (300, 300), (257, 1000)]
HEADS = [(4, 4), (6, 2), (9, 3)]
DIMS = [8, 16, 64, 80, 128, 256]
OPTIONS = {
    "full": {},
    "causal": {"causal": True},
    "window": {"causal": True, "window": 40},
    "two-sided window": {"window": (7, 20)},
    "softcap": {"causal": True, "softcap": 3.0},
    "negative scale": {"scale": -0.1},
    "zero scale": {"causal": True, "scale": 0.0},
}
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 2.0**-8}


@pytest.fixture(scope="module", autouse=True)
def _usable() -> None:
    """These tests ask whether the kernel is right, so a machine on which it cannot be built must fail, not pass."""
    if os.environ.get("LONGSCOPE_NATIVE") == "0":
        pytest.skip("switched off by LONGSCOPE_NATIVE=0")


@pytest.fixture
def fresh(monkeypatch: pytest.MonkeyPatch, longscope_home: Path):
    """Forget what is loaded, before and after."""
    native._load.cache_clear()
    yield longscope_home
    monkeypatch.undo()
    native._load.cache_clear()


@pytest.fixture(params=["fma", "bf16"])
def dot(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch):
    """Both ways to multiply bf16, the second where the processor has it."""
    assert native.available() is None
    if request.param == "bf16" and not native._load().flashcore_pairs_speedup():
        pytest.skip("no AVX512-BF16 here")
    monkeypatch.setenv("LONGSCOPE_NATIVE_DOT", request.param)
    native._half_kind.cache_clear()
    yield request.param
    native._half_kind.cache_clear()


def tensors(batch: int, heads: int, kv_heads: int, n: int, m: int, d: int, dtype=torch.float32):
    return tuple(torch.randn(batch, h, s, d).to(dtype) for h, s in ((heads, n), (kv_heads, m), (kv_heads, m)))


def dense(q, k, v, spec: AttentionSpec):
    """Return (out, lse) in float64 of a call that is not ragged."""
    n, m, group = q.shape[2], k.shape[2], q.shape[1] // k.shape[1]
    keys, values = (x.double().repeat_interleave(group, dim=1) for x in (k, v))
    scale = q.shape[3] ** -0.5 if spec.scale is None else spec.scale
    scores = torch.einsum("bhid,bhjd->bhij", q.double(), keys) * scale
    if spec.softcap:
        scores = torch.tanh(scores / spec.softcap) * spec.softcap
    distance = torch.arange(m)[None] - torch.arange(m - n, m)[:, None]
    left, right = spec.window or (None, None)
    seen = torch.ones_like(distance, dtype=torch.bool)
    if spec.causal:
        seen &= distance <= 0
    if left is not None:
        seen &= distance >= -left
    if right is not None:
        seen &= distance <= right
    scores = scores.masked_fill(~seen, float("-inf"))
    weights = torch.nan_to_num(torch.softmax(scores, -1))
    return weights @ values, torch.logsumexp(scores, -1)


def error(out: torch.Tensor, expected: torch.Tensor, v: torch.Tensor) -> float:
    """Return the largest error relative to the largest value; NaN where there is a NaN."""
    return float((out.double() - expected).abs().max() / v.double().abs().max())


def assert_right(q, k, v, spec: AttentionSpec) -> None:
    out, lse = native.forward(q, k, v, spec)
    expected, expected_lse = dense(q, k, v, spec)
    assert out.dtype == q.dtype
    assert out.shape == q.shape
    assert error(out, expected, v) <= TOLERANCE[q.dtype]
    torch.testing.assert_close(lse.double(), expected_lse, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_fp32_agrees_with_float64(size, options):
    batch, dims = (1, [64]) if max(size) > 256 else (2, DIMS)
    for (heads, kv_heads), d in zip(itertools.cycle(HEADS), dims, strict=False):
        assert_right(*tensors(batch, heads, kv_heads, *size, d), AttentionSpec(**options))


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_bf16_agrees_with_float64_to_one_rounding(dot, options):
    for (n, m), (heads, kv_heads), d in zip(SIZES[:-1], itertools.cycle(HEADS), itertools.cycle(DIMS), strict=False):
        assert_right(*tensors(1, heads, kv_heads, n, m, d, torch.bfloat16), AttentionSpec(**options))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("d", [*DIMS, 1, 20, 33, 96, 320])
def test_any_head_size_and_few_queries_on_many_keys(d, dtype):
    for n, options in ((1, {"causal": True}), (3, {"causal": True, "window": 900}), (40, {"softcap": 5.0})):
        assert_right(*tensors(1, 2, 1, n, 1500, d, dtype), AttentionSpec(scale=0.1, **options))


def test_every_instruction_set_computes_the_same(fresh, monkeypatch):
    """The narrow vectors of other processors run here too: they are the same source with other widths."""
    targets = ["-march=x86-64"] if "avx" in Path("/proc/cpuinfo").read_text() else []
    for target in targets:
        monkeypatch.setattr(native, "TARGETS", (target,))
        native._load.cache_clear()
        assert native.available() is None
        for dtype, options in itertools.product(TOLERANCE, OPTIONS.values()):
            assert_right(*tensors(1, 6, 2, 33, 130, 64, dtype), AttentionSpec(**options))
            assert_right(*tensors(1, 6, 2, 3, 1200, 64, dtype), AttentionSpec(**options))


RAGGED = {
    "right": AttentionSpec(causal=True, lengths=torch.tensor([50, 0, 7])),
    "left": AttentionSpec(causal=True, lengths=torch.tensor([50, 1, 33]), left_padded=True),
    "fewer queries": AttentionSpec(
        causal=True, window=20, lengths=torch.tensor([50, 30, 7]), query_lengths=torch.tensor([3, 0, 7])
    ),
    "left, fewer queries": AttentionSpec(
        lengths=torch.tensor([50, 30, 0]), query_lengths=torch.tensor([3, 50, 7]), left_padded=True
    ),
}


@pytest.mark.parametrize("spec", RAGGED.values(), ids=RAGGED)
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_padding_is_neither_read_nor_written(spec, dtype):
    q, k, v = tensors(3, 6, 2, 50, 50, 64, dtype)
    plain = AttentionSpec(causal=spec.causal, window=spec.window)
    expected = torch.zeros(q.shape, dtype=torch.float64)
    expected_lse = torch.full(q.shape[:3], float("-inf"), dtype=torch.float64)
    for row in range(3):
        keys = int(spec.lengths[row])
        queries = keys if spec.query_lengths is None else int(spec.query_lengths[row])
        at_q = slice(50 - queries, 50) if spec.left_padded else slice(queries)
        at_k = slice(50 - keys, 50) if spec.left_padded else slice(keys)
        part = slice(row, row + 1)
        expected[part, :, at_q], expected_lse[part, :, at_q] = dense(
            q[part, :, at_q], k[part, :, at_k], v[part, :, at_k], plain
        )
        unseen = torch.ones(50, dtype=torch.bool)
        unseen[at_k] = False
        k[row, :, unseen] = v[row, :, unseen] = float("nan")
    out, lse = native.forward(q, k, v, spec)
    assert error(out, expected, torch.nan_to_num(v)) <= TOLERANCE[dtype]
    torch.testing.assert_close(lse.double(), expected_lse, rtol=1e-5, atol=1e-5)


def test_packed_sequences_do_not_see_each_other():
    cu_q, cu_k = torch.tensor([0, 5, 5, 70]), torch.tensor([0, 90, 95, 160])
    q, k, v = tensors(1, 9, 3, 70, 160, 64)
    out = native.attend(q, k, v, AttentionSpec(causal=True, cu_seqlens=(cu_q, cu_k)))
    for i in range(3):
        at_q, at_k = slice(cu_q[i], cu_q[i + 1]), slice(cu_k[i], cu_k[i + 1])
        if at_q.stop > at_q.start:
            expected, _ = dense(q[:, :, at_q], k[:, :, at_k], v[:, :, at_k], AttentionSpec(causal=True))
            assert error(out[:, :, at_q], expected, v) <= 2e-6


@pytest.mark.parametrize("n", [1, 70])
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_views_are_read_in_place(n, dtype):
    """Transposed views and slices of larger buffers, surrounded by NaN, give what their copies give."""
    q = torch.full((2, n, 7, 64), float("nan"), dtype=dtype)[:, :, 1:].transpose(1, 2)
    buffers = [torch.full((2, 3, 200, 72), float("nan"), dtype=dtype) for _ in range(2)]
    k, v = (buffer[:, 1:, 3:133, 5:69] for buffer in buffers)
    copies = tensors(2, 6, 2, n, 130, 64, dtype)
    for view, copy in zip((q, k, v), copies, strict=True):
        view.copy_(copy)
    spec = AttentionSpec(causal=True)
    out = native.attend(q, k, v, spec)
    assert torch.equal(out, native.attend(*copies, spec))
    columns = [x.transpose(2, 3).contiguous().transpose(2, 3) for x in copies]
    assert torch.equal(native.attend(*columns, spec), out)


def test_the_layout_of_the_queries_is_kept():
    q, k, v = tensors(2, 4, 4, 9, 9, 16)
    q = q.transpose(1, 2).contiguous().transpose(1, 2)
    assert native.attend(q, k, v, AttentionSpec()).transpose(1, 2).is_contiguous()


def test_rows_that_see_nothing_are_zero():
    q, k, v = tensors(1, 2, 2, 80, 70, 64)
    out, lse = native.forward(q, k, v, AttentionSpec(causal=True))
    assert not out[:, :, :10].any()
    assert (lse[:, :, :10] == float("-inf")).all()
    assert torch.isfinite(lse[:, :, 10:]).all()
    for shape in ((1, 2, 0, 64), (0, 2, 3, 64)):
        assert native.attend(torch.ones(shape), k[: shape[0]], v[: shape[0]], AttentionSpec()).shape == shape
    assert not native.attend(q, k[:, :, :0], v[:, :, :0], AttentionSpec()).any()


@pytest.mark.parametrize("n", [1, 100])
def test_huge_scores_stay_finite(n):
    q, k, v = tensors(1, 2, 1, n, 700, 64)
    # The last scores are the highest by far, so every sum made before must shrink to nothing.
    k *= torch.linspace(0, 40, 700)[:, None]
    spec = AttentionSpec(scale=0.5)
    # Scores of 100 are themselves known to no better than 1e-5 in fp32.
    assert error(native.attend(q * 0.1, k, v, spec), dense(q * 0.1, k, v, spec)[0], v) <= 1e-5
    out, lse = native.forward(q * 100, k, v, AttentionSpec(causal=True))
    assert torch.isfinite(out).all()
    assert torch.isfinite(lse).all()


def test_a_nan_is_not_hidden():
    q, k, v = tensors(1, 1, 1, 40, 100, 64)
    k[0, 0, 50, 3] = float("nan")
    out = native.attend(q, k, v, AttentionSpec(causal=True))
    # Query i stands at position i + 60, so all see key 50.
    assert out.isnan().all()
    q, k, v = tensors(1, 1, 1, 40, 100, 64)
    q[0, 0, 7] = float("nan")
    assert native.attend(q, k, v, AttentionSpec()).isnan().any(-1)[0, 0].nonzero().tolist() == [[7]]


@pytest.mark.parametrize("size", [(1, 5000), (700, 700)], ids=str)
def test_the_number_of_threads_changes_nothing(size):
    q, k, v = tensors(1, 6, 2, *size, 64)
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(native.attend(q, k, v, AttentionSpec(causal=True)))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


def test_calls_from_several_threads_do_not_meet():
    calls = [tensors(1, 4, 2, n, 600, 64) for n in (600, 1, 300, 64)]
    spec = AttentionSpec(causal=True)
    expected = [native.attend(*call, spec) for call in calls]
    wrong = []

    def work(which: int) -> None:
        for _ in range(20):
            if not torch.equal(native.attend(*calls[which], spec), expected[which]):
                wrong.append(which)

    threads = [threading.Thread(target=work, args=(which,)) for which in range(len(calls))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_torch_and_the_kernel_share_one_openmp_runtime():
    assert native.available() is None
    runtimes = {line.split()[-1] for line in Path("/proc/self/maps").read_text().splitlines() if "libgomp" in line}
    ours = {path for path in runtimes if "scikit_learn" not in path}
    assert len(ours) == 1


REFUSED = {
    "mask": ({"mask": lambda batch, head, query, key: key <= query}, {}, "index-function masks"),
    "dtype": ({}, {"dtype": torch.float64}, "float64"),
    "device": ({}, {"device": "meta"}, "meta"),
}


@pytest.mark.parametrize(("options", "changes", "message"), REFUSED.values(), ids=REFUSED)
def test_what_it_lacks_is_refused(options, changes, message):
    q = torch.ones(1, 1, 2, 8, **changes)
    with pytest.raises(NotImplementedError, match=message):
        native.attend(q, q, q, AttentionSpec(**options))


def test_what_does_not_fit_is_refused_before_it_is_read():
    q = torch.ones(1, 2, 4, 8)
    with pytest.raises(NotImplementedError, match="values of 8"):
        native.attend(q, q, q[..., :4], AttentionSpec())
    with pytest.raises(ValueError, match="fit together"):
        native.attend(q, q[:, :, :3], q, AttentionSpec())
    with pytest.raises(TypeError, match="bfloat16"):
        native.attend(q, q.bfloat16(), q.bfloat16(), AttentionSpec())
    with pytest.raises(ValueError, match="outside"):
        native.attend(q, q, q, AttentionSpec(lengths=torch.tensor([5])))


def test_it_can_be_switched_off(fresh, monkeypatch):
    monkeypatch.setenv("LONGSCOPE_NATIVE", "0")
    assert "LONGSCOPE_NATIVE" in native.available()
    q = torch.ones(1, 1, 1, 8)
    with pytest.raises(ImportError, match="LONGSCOPE_NATIVE"):
        native.attend(q, q, q, AttentionSpec())
    assert not list(fresh.iterdir())


def test_without_a_compiler_it_says_how_to_get_one(fresh, monkeypatch):
    monkeypatch.setenv("PATH", str(fresh))
    assert "compiler" in native.available()
    q = torch.ones(1, 1, 1, 8)
    with pytest.raises(ImportError, match="apt install gcc"):
        native.attend(q, q, q, AttentionSpec())


def test_a_failing_compiler_is_a_reason_not_a_crash(fresh, monkeypatch):
    compiler = fresh / "cc"
    compiler.write_text("#!/bin/sh\n[ $1 = --version ] && exit 0\necho 'x.c:1: error: no headers' >&2\nexit 1\n")
    compiler.chmod(compiler.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{fresh}:/bin:/usr/bin")
    assert "no headers" in native.available()
    assert not list((fresh / "native").glob("*")) if (fresh / "native").exists() else True


def test_a_build_is_made_once_and_found_again(fresh, monkeypatch):
    """Two processes that build at the same time both end with a working library and leave one file."""
    script = (
        "import torch; from flashcore.backends import native; from flashcore.spec import AttentionSpec as S;"
        "q = torch.ones(1, 1, 2, 8); raise SystemExit(not torch.equal(native.attend(q, q, q, S()), q))"
    )
    root = Path(native.__file__).parents[2]
    processes = [subprocess.Popen([sys.executable, "-c", script], cwd=root) for _ in range(2)]
    assert [process.wait() for process in processes] == [0, 0]
    files = list((fresh / "native").iterdir())
    assert len(files) == 1
    made = files[0].stat().st_mtime_ns
    assert native.available() is None
    assert [file.stat().st_mtime_ns for file in (fresh / "native").iterdir()] == [made]


def test_another_processor_gets_a_build_of_its_own(monkeypatch):
    compiler = "cc"
    here = native._fingerprint(compiler)
    monkeypatch.setattr(native, "_processor", lambda: "another")
    assert native._fingerprint(compiler) != here
