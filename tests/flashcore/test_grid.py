"""Every backend against the reference, over all combinations of options; the reference against a naive loop."""

import importlib.util
import itertools
import math
import sys
from pathlib import Path

import pytest
import torch

from flashcore import AttentionSpec, attention, masks
from flashcore.backends import NAMES, available, flash, sdpa

SHAPES = {"square": (9, 9), "chunk": (5, 12), "decode": (1, 11), "more queries": (8, 5)}
WINDOWS = [None, 3, (2, 1)]
SOFTCAPS = [None, 4.0]
RAGGED = ["no", "right", "left", "right with queries", "left with queries", "packed"]
MASKS = [None, lambda batch, head, query, key: (batch + head + query * key) % 3 != 1]
HEADS = [(4, 2), (3, 3), (6, 1)]


def spec_of(ragged: str, n: int, m: int, **options) -> tuple[int, AttentionSpec]:
    """Return (batch, spec) of one raggedness; row lengths include an empty and a full one."""
    if ragged == "no":
        return 2, AttentionSpec(**options)
    if ragged == "packed":
        cu_q = torch.tensor([0, 0, n // 2, n], dtype=torch.int32)
        cu_k = torch.tensor([0, 1, 1 + (m - 1) // 2, m], dtype=torch.int32)
        return 1, AttentionSpec(cu_seqlens=(cu_q, cu_k), **options)
    lengths = torch.tensor([m, max(m // 2, 1), 0])
    queries = torch.tensor([max(n - 1, 0), min(n, 2), 0]) if "with queries" in ragged else None
    return 3, AttentionSpec(lengths=lengths, query_lengths=queries, left_padded=ragged.startswith("left"), **options)


def cases(names=tuple(SHAPES)):
    """Yield all combinations of options for each shape; the head counts take turns."""
    heads = itertools.cycle(HEADS)
    for shape in map(SHAPES.get, names):
        for causal, window, softcap, ragged, mask in itertools.product((False, True), WINDOWS, SOFTCAPS, RAGGED, MASKS):
            options = {"causal": causal, "window": window, "softcap": softcap, "mask": mask, "scale": 0.4}
            yield *shape, *next(heads), *spec_of(ragged, *shape, **options)


def tensors(batch: int, heads: int, kv_heads: int, n: int, m: int, dtype=torch.float64, d: int = 8):
    sizes = ((heads, n), (kv_heads, m), (kv_heads, m))
    return tuple(torch.randn(batch, h, s, d, dtype=dtype) for h, s in sizes)


def test_the_reference_agrees_with_a_loop_over_pairs():
    checked = 0
    for n, m, heads, kv_heads, batch, spec in list(cases())[::25]:
        q, k, v = tensors(batch, heads, kv_heads, n, m)
        expected = torch.zeros_like(q)
        for row, head, i in itertools.product(range(batch), range(heads), range(n)):
            terms = [
                (math.exp(score), v[row, head * kv_heads // heads, j])
                for j in range(m)
                if (score := pair_score(q, k, spec, row, head, i, j)) is not None
            ]
            if terms:
                expected[row, head, i] = sum(w * value for w, value in terms) / sum(w for w, _ in terms)
        torch.testing.assert_close(attention(q, k, v, spec, "reference"), expected)
        checked += 1
    assert checked > 20


def pair_score(q, k, spec, row, head, i, j):
    """Score of one (query, key) pair in plain Python, or None where hidden."""
    n, m, kv_head = q.shape[2], k.shape[2], head * k.shape[1] // q.shape[1]
    spans = [(0, n, 0, m)]
    if spec.lengths is not None:
        keys = int(spec.lengths[row])
        queries = keys if n == m else n
        queries = int(spec.query_lengths[row]) if spec.query_lengths is not None else queries
        spans = [(n - queries, n, m - keys, m) if spec.left_padded else (0, queries, 0, keys)]
    elif spec.cu_seqlens is not None:
        cu_q, cu_k = (c.tolist() for c in spec.cu_seqlens)
        spans = [
            (*pair_q, *pair_k)
            for pair_q, pair_k in zip(itertools.pairwise(cu_q), itertools.pairwise(cu_k), strict=True)
        ]
    inside = [s for s in spans if s[0] <= i < s[1] and s[2] <= j < s[3]]
    if not inside:
        return None
    _, stop_q, _, stop_k = inside[0]
    distance = (j - stop_k) - (i - stop_q)
    left, right = spec.limits()
    if (left is not None and distance < -left) or (right is not None and distance > right):
        return None
    if spec.mask is not None and not bool(spec.mask(*(torch.tensor(x) for x in (row, head, i, j)))):
        return None
    score = float(q[row, head, i] @ k[row, kv_head, j]) * spec.scale
    return score if spec.softcap is None else spec.softcap * math.tanh(score / spec.softcap)


@pytest.mark.parametrize("shape", SHAPES)
def test_sdpa_honours_every_combination_with_gradients(shape):
    for n, m, heads, kv_heads, batch, spec in cases([shape]):
        q, k, v = (x.requires_grad_() for x in tensors(batch, heads, kv_heads, n, m))
        weights = torch.randn_like(q)
        ours, truth = attention(q, k, v, spec, "sdpa"), attention(q, k, v, spec, "reference")
        torch.testing.assert_close(ours, truth, msg=lambda text: f"{n}x{m} {spec}: {text}")  # noqa: B023
        grads = torch.autograd.grad((ours * weights).sum(), (q, k, v))
        for grad, true_grad in zip(grads, torch.autograd.grad((truth * weights).sum(), (q, k, v)), strict=True):
            torch.testing.assert_close(grad, true_grad, msg=lambda text: f"{n}x{m} {spec}: {text}")  # noqa: B023


def test_tiles_of_any_size_give_the_same(monkeypatch):
    from flashcore import blockwise

    spec = AttentionSpec(causal=True, window=(40, 0), softcap=3.0)
    q, k, v = (x.requires_grad_() for x in tensors(1, 4, 2, 70, 90))
    truth = attention(q, k, v, spec, "reference")
    true_grads = torch.autograd.grad(truth.square().sum(), (q, k, v))
    for query_block, key_block in ((1, 7), (16, 16), (64, 128)):
        monkeypatch.setattr(blockwise, "QUERY_BLOCK", query_block)
        monkeypatch.setattr(blockwise, "KEY_BLOCK", key_block)
        ours = attention(q, k, v, spec, "sdpa")
        torch.testing.assert_close(ours, truth)
        torch.testing.assert_close(torch.autograd.grad(ours.square().sum(), (q, k, v)), true_grads)


def test_queries_behind_earlier_keys_may_be_cut_anywhere(monkeypatch):
    for n, m, heads, kv_heads in ((10, 23, 4, 2), (7, 8, 3, 3), (22, 23, 6, 1)):
        inputs = [tensor.requires_grad_() for tensor in tensors(2, heads, kv_heads, n, m)]
        spec = AttentionSpec(causal=True, scale=0.4)
        results = []
        for rows, backend in ((1, "sdpa"), (3, "sdpa"), (64, "sdpa"), (0, "reference")):
            monkeypatch.setattr(sdpa, "_FEWEST_ROWS", rows)
            monkeypatch.setattr(sdpa, "_MASK", 1)
            out = attention(*inputs, spec, backend=backend)
            gradients = torch.autograd.grad((out * torch.arange(out.numel()).view(out.shape).cos()).sum(), inputs)
            results.append((out, *gradients))
        for found in results[:-1]:
            torch.testing.assert_close(found, results[-1], rtol=1e-5, atol=1e-5)


def test_flex_honours_combinations_forward():
    pytest.importorskip("torch.nn.attention.flex_attention")
    torch._dynamo.reset()
    for n, m, heads, kv_heads, batch, spec in list(cases())[5::83]:
        q, k, v = tensors(batch, heads, kv_heads, n, m, torch.float32)
        ours, truth = attention(q, k, v, spec, "flex"), attention(q, k, v, spec, "reference")
        torch.testing.assert_close(ours, truth, atol=1e-5, rtol=1e-4)


@pytest.fixture
def stand_in(monkeypatch):
    """Put the stand-in where ``import flash_attn`` finds it."""
    path = Path(__file__).with_name("flash_attn_stand_in.py")
    module_spec = importlib.util.spec_from_file_location("flash_attn", path)
    module = importlib.util.module_from_spec(module_spec)
    module_spec.loader.exec_module(module)
    monkeypatch.setitem(sys.modules, "flash_attn", module)
    return module


def test_flash_hands_over_every_combination(stand_in, monkeypatch):
    called = set()
    for name in ("flash_attn_func", "flash_attn_varlen_func", "flash_attn_with_kvcache"):
        monkeypatch.setattr(stand_in, name, recording(getattr(stand_in, name), called))
    for n, m, heads, kv_heads, batch, spec in cases():
        q, k, v = tensors(batch, heads, kv_heads, n, m, torch.bfloat16)
        if spec.mask is not None:
            with pytest.raises(NotImplementedError, match="index-function"):
                attention(q, k, v, spec, "flash")
            continue
        ours, truth = attention(q, k, v, spec, "flash"), attention(q, k, v, spec, "reference")
        torch.testing.assert_close(ours, truth, atol=2e-2, rtol=2e-2)
    assert called == {"flash_attn_func", "flash_attn_varlen_func", "flash_attn_with_kvcache"}


def recording(function, names: set):
    def call(*args, **kwargs):
        names.add(function.__name__)
        return function(*args, **kwargs)

    return call


def test_flash_gradients_pass_through_padding(stand_in):
    spec = AttentionSpec(causal=True, lengths=torch.tensor([5, 3]), softcap=4.0)
    q, k, v = (x.requires_grad_() for x in tensors(2, 4, 2, 5, 5, torch.bfloat16))
    grads = torch.autograd.grad(attention(q, k, v, spec, "flash").float().square().sum(), (q, k, v))
    truth = torch.autograd.grad(attention(q, k, v, spec, "reference").float().square().sum(), (q, k, v))
    for grad, true_grad in zip(grads, truth, strict=True):
        torch.testing.assert_close(grad, true_grad, atol=6e-2, rtol=6e-2)


def test_flash_refuses_fp32_and_names_the_install_command_when_missing(monkeypatch):
    q, k, v = tensors(1, 2, 2, 3, 3, torch.float32)
    with pytest.raises(NotImplementedError, match="float32"):
        attention(q, k, v, backend="flash")
    monkeypatch.setitem(sys.modules, "flash_attn", None)
    with pytest.raises(ImportError, match="pip install"):
        attention(q.bfloat16(), k.bfloat16(), v.bfloat16(), backend="flash")
    with pytest.raises(ImportError, match="CUDA"):
        flash.load()


def test_auto_matches_the_reference_in_every_combination():
    for n, m, heads, kv_heads, batch, spec in list(cases())[::2]:
        q, k, v = tensors(batch, heads, kv_heads, n, m, torch.float32)
        torch.testing.assert_close(
            attention(q, k, v, spec), attention(q, k, v, spec, "reference"), atol=2e-6, rtol=1e-4
        )


def test_auto_says_once_why_it_passed_a_backend_over(caplog):
    from flashcore.api import note_once

    note_once.cache_clear()
    q, k, v = tensors(1, 2, 2, 4, 4, torch.float64)
    with caplog.at_level("INFO", logger="flashcore"):
        attention(q, k, v)
        attention(q, k, v)
    assert [record for record in caplog.records if "native" in record.message][1:] == []
    assert len(caplog.records) == 1


def test_every_backend_is_reported():
    report = available()
    assert set(report) == set(NAMES)
    assert report["reference"] == report["sdpa"] == "ok"


def test_masks_of_a_padded_batch_need_one_call_only():
    lengths = torch.tensor([4, 2])
    assert sdpa.one_call_serves(AttentionSpec(lengths=lengths), 4, 4)
    assert sdpa.one_call_serves(AttentionSpec(causal=True, lengths=lengths), 4, 4)
    assert not sdpa.one_call_serves(AttentionSpec(causal=True, lengths=lengths, left_padded=True), 4, 4)


def test_a_row_alone_equals_the_row_in_a_batch_and_packed():
    q, k, v = tensors(2, 4, 2, 6, 6)
    alone = attention(q[1:, :, :4], k[1:, :, :4], v[1:, :, :4], AttentionSpec(causal=True))
    batch = attention(q, k, v, AttentionSpec(causal=True, lengths=torch.tensor([6, 4])))
    torch.testing.assert_close(batch[1:, :, :4], alone)
    assert not batch[1, :, 4:].any()
    packed = [torch.cat((x[:1], x[1:, :, :4]), dim=2) for x in (q, k, v)]
    together = attention(*packed, AttentionSpec(causal=True, cu_seqlens=torch.tensor([0, 6, 10])))
    torch.testing.assert_close(together[:, :, 6:], alone)


def test_document_masks_equal_packed_sequences():
    q, k, v = tensors(1, 2, 2, 7, 7)
    ids = torch.tensor([[0, 0, 0, 1, 1, 1, 1]])
    by_mask = attention(q, k, v, AttentionSpec(causal=True, mask=masks.document(ids)))
    packed = attention(q, k, v, AttentionSpec(causal=True, cu_seqlens=torch.tensor([0, 3, 7])))
    torch.testing.assert_close(by_mask, packed)


@pytest.mark.parametrize("learner", ["q", "k", "v"])
def test_no_forward_only_path_drops_a_gradient(learner, stand_in, monkeypatch):
    spec = AttentionSpec(causal=True, lengths=torch.tensor([7, 4]))
    tensors_by_name = dict(zip("qkv", tensors(2, 4, 2, 3, 7, torch.bfloat16), strict=True))
    tensors_by_name[learner].requires_grad_()
    with pytest.raises(NotImplementedError, match="backward"):
        attention(**tensors_by_name, spec=spec, backend="native")
    monkeypatch.delattr(stand_in, "flash_attn_with_kvcache")  # forward only in the real package
    for backend in ("flash", "sdpa", "auto"):
        (grad,) = torch.autograd.grad(
            attention(**tensors_by_name, spec=spec, backend=backend).float().square().sum(), tensors_by_name[learner]
        )
        assert grad.any()
