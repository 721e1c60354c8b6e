"""Cross-entropy of a linear head without its logits."""

from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from longllm.linear_cross_entropy import linear_cross_entropy

N, WIDTH, WORDS = 37, 12, 50


def dense(hidden: Any, weight: Any, targets: Any, bias: Any, softcap: float | None) -> torch.Tensor:
    logits = torch.nn.functional.linear(hidden.float(), weight.float(), None if bias is None else bias.float())
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    return torch.nn.functional.cross_entropy(logits.flatten(0, -2), targets.flatten(), reduction="sum")


def parts(*shape: int, **options: Any) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    hidden, weight, bias = (
        torch.randn(*size, **options).requires_grad_() for size in ((*shape, WIDTH), (WORDS, WIDTH), (WORDS,))
    )
    targets = torch.randint(WORDS, shape)
    targets[torch.rand(shape) < 0.3] = -100
    return hidden, weight, bias, targets


class Largest(TorchDispatchMode):
    """Notes the most numbers that any one tensor made inside has."""

    numbers = 0

    def __torch_dispatch__(self, function: Any, types: Any, arguments: Any = (), options: Any = None) -> Any:
        made = function(*arguments, **(options or {}))
        for tensor in made if isinstance(made, tuple | list) else [made]:
            if isinstance(tensor, torch.Tensor):
                self.numbers = max(self.numbers, tensor.numel())
        return made


@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("chunk", [1, 5, N, 1000])
def test_loss_and_gradients_are_those_of_the_dense_loss(chunk: int, with_bias: bool, softcap: float | None) -> None:
    hidden, weight, own, targets = parts(N)
    bias = own if with_bias else None
    wanted = [tensor for tensor in (hidden, weight, bias) if tensor is not None]
    expected = dense(hidden, weight, targets, bias, softcap)
    slopes = torch.autograd.grad(expected * 0.37, wanted)
    found = linear_cross_entropy(hidden, weight, targets, bias, softcap=softcap, chunk=chunk)
    assert float(found) == pytest.approx(float(expected), rel=1e-5)
    for mine, theirs in zip(torch.autograd.grad(found * 0.37, wanted), slopes, strict=True):
        assert torch.allclose(mine, theirs, atol=1e-5)


def test_rows_may_have_any_leading_shape_and_may_all_be_ignored() -> None:
    hidden, weight, bias, targets = parts(3, 7)
    expected = dense(hidden, weight, targets, bias, None)
    assert float(linear_cross_entropy(hidden, weight, targets, bias, chunk=4)) == pytest.approx(
        float(expected), rel=1e-5
    )
    nothing = linear_cross_entropy(hidden, weight, torch.full_like(targets, -100), bias)
    nothing.backward()
    assert float(nothing) == 0
    assert all(float(tensor.grad.abs().max()) == 0 for tensor in (hidden, weight, bias))


@pytest.mark.parametrize("learns", ["hidden", "weight", "bias"])
def test_what_asks_for_no_gradient_costs_none(learns: str) -> None:
    hidden, weight, bias, targets = parts(N)
    named = {"hidden": hidden, "weight": weight, "bias": bias}
    for name, tensor in named.items():
        tensor.requires_grad_(name == learns)
    expected = torch.autograd.grad(dense(hidden, weight, targets, bias, None), named[learns])[0]
    linear_cross_entropy(hidden, weight, targets, bias, chunk=7).backward()
    assert {name for name, tensor in named.items() if tensor.grad is not None} == {learns}
    assert torch.allclose(named[learns].grad, expected, atol=1e-5)


def test_logits_never_exist_as_a_whole() -> None:
    hidden = torch.randn(2048, 8, requires_grad=True)
    weight, targets = torch.randn(512, 8, requires_grad=True), torch.randint(512, (2048,))
    with Largest() as ours:
        linear_cross_entropy(hidden, weight, targets, chunk=64).backward()
    with Largest() as theirs:
        dense(hidden, weight, targets, None, None).backward()
    assert theirs.numbers == 2048 * 512
    assert ours.numbers == 64 * 512


@pytest.mark.parametrize(
    ("above", "below"), [("bfloat16", "float32"), ("float32", "bfloat16"), ("bfloat16", "bfloat16")]
)
def test_precisions_may_differ(above: str, below: str) -> None:
    hidden, weight, bias, targets = parts(N)
    low, head = hidden.detach().to(getattr(torch, above)).requires_grad_(), weight.detach().to(getattr(torch, below))
    head.requires_grad_()
    expected = dense(low, head, targets, bias, None)
    slopes = torch.autograd.grad(expected, (low, head, bias))
    found = linear_cross_entropy(low, head, targets, bias, chunk=9)
    assert float(found) == pytest.approx(float(expected), rel=2e-2)
    for mine, theirs, tensor in zip(
        torch.autograd.grad(found, (low, head, bias)), slopes, (low, head, bias), strict=True
    ):
        assert mine.dtype == tensor.dtype
        assert float((mine - theirs).norm()) < 0.03 * float(theirs.norm())


def test_autocast_does_not_round_an_fp32_head() -> None:
    hidden, weight, bias, targets = parts(N)
    plain = linear_cross_entropy(hidden, weight, targets, bias)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(linear_cross_entropy(hidden, weight, targets, bias), plain)


@pytest.mark.parametrize("wrong", [WORDS, -1])
def test_what_does_not_fit_is_refused(wrong: int) -> None:
    hidden, weight, _, targets = parts(N)
    with pytest.raises(ValueError, match=r"hidden \[37, 12\], weight \[50, 11\] and targets \[37\] do not fit"):
        linear_cross_entropy(hidden, weight[:, :11], targets)
    with pytest.raises(ValueError, match="do not fit"):
        linear_cross_entropy(hidden, weight, targets[:5])
    with pytest.raises(ValueError, match="chunk must be at least 1, got 0"):
        linear_cross_entropy(hidden, weight, targets, chunk=0)
    targets[3] = wrong
    with pytest.raises(ValueError, match=rf"targets must lie between 0 and 49 \(or be -100\), got {wrong}"):
        linear_cross_entropy(hidden, weight, targets)


def test_a_second_backward_pass_is_refused() -> None:
    hidden, weight, _, targets = parts(N)
    loss = linear_cross_entropy(hidden, weight, targets)
    loss.backward(retain_graph=True)
    with pytest.raises(ValueError, match="differentiable once"):
        loss.backward()
