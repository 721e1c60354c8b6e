"""Cross-entropy of a linear head without its logits: the head and the loss, a few hundred rows at a time.

With a vocabulary of 128,256 the logits of 81,920 tokens are 42 GB in fp32, and their gradient as much again. Here a
chunk's logits live only until its loss and its gradient with respect to the hidden states are taken, both in the
forward pass; the backward pass merely scales what is there. Plain torch.
"""

from __future__ import annotations

from typing import Any

import torch

#: rows of logits that exist at once
CHUNK = 512
IGNORED = -100


def linear_cross_entropy(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    softcap: float | None = None,
    chunk: int = CHUNK,
) -> torch.Tensor:
    """Return the summed cross-entropy (nats, fp32 scalar) of ``hidden @ weight.T`` against ``targets``.

    Differentiable once with respect to hidden, weight and bias; gradients of what asks for none are never computed.
    Where hidden and weight differ in precision, matrices are multiplied in the lower one, and summed up in fp32.

    Args:
        hidden: [n, d], or any shape that ends so.
        weight: [vocabulary, d].
        targets: [n] or the leading shape of ``hidden``; rows with -100 count nothing and cost nothing.
        bias: [vocabulary] or None.
        softcap: logits become ``softcap * tanh(logits / softcap)`` (Gemma 2).
        chunk: rows whose logits exist at once: chunk x vocabulary fp32 numbers.

    Raises:
        ValueError: shapes that do not fit, targets outside the vocabulary, or a chunk below 1.

    >>> hidden, weight = torch.randn(6, 4), torch.randn(10, 4)
    >>> targets = torch.tensor([1, 2, 3, -100, 9, 0])
    >>> dense = torch.nn.functional.cross_entropy(hidden @ weight.T, targets, reduction="sum")
    >>> torch.allclose(linear_cross_entropy(hidden, weight, targets, chunk=2), dense, atol=1e-5)
    True
    """
    rows, wanted = hidden.reshape(-1, hidden.shape[-1]), targets.reshape(-1)
    if len(rows) != len(wanted) or rows.shape[1] != weight.shape[1]:
        raise ValueError(
            f"hidden {list(hidden.shape)}, weight {list(weight.shape)} and targets {list(targets.shape)} do not fit"
        )
    if chunk < 1:
        raise ValueError(f"chunk must be at least 1, got {chunk}")
    labelled = wanted != IGNORED
    if not bool(labelled.all()):
        rows, wanted = rows[labelled], wanted[labelled]
    if len(wanted):
        lowest, highest = (int(end) for end in torch.stack((wanted.min(), wanted.max())).tolist())
        if lowest < 0 or highest >= len(weight):
            wrong = lowest if lowest < 0 else highest
            raise ValueError(f"targets must lie between 0 and {len(weight) - 1} (or be -100), got {wrong}")
    if weight.element_size() < rows.element_size():
        rows = rows.to(weight.dtype)
    # Autocast has no say: every precision here is chosen.
    with torch.autocast(hidden.device.type, enabled=False):
        return _LinearCrossEntropy.apply(rows, weight, bias, wanted, softcap, chunk)


class _LinearCrossEntropy(torch.autograd.Function):
    """Forward takes the gradients along with the loss; backward scales them."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        targets: torch.Tensor,
        softcap: float | None,
        chunk: int,
    ) -> torch.Tensor:
        """Return the summed loss of [n, d] rows."""
        wants_hidden, wants_weight, wants_bias = ctx.needs_input_grad[:3]
        # Only a weight that learns may be in a higher precision than the hidden states.
        used = weight.to(hidden.dtype)
        to_hidden = torch.empty_like(hidden) if wants_hidden else None
        # Summed over chunks, so in fp32 whatever the weights are in.
        to_weight = torch.zeros_like(weight, dtype=torch.float32) if wants_weight else None
        to_bias = torch.zeros_like(bias, dtype=torch.float32) if wants_bias and bias is not None else None
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        for begin in range(0, len(targets), chunk):
            part, wanted = hidden[begin : begin + chunk], targets[begin : begin + chunk]
            logits = (part @ used.T).float()
            if bias is not None:
                logits += bias.float()
            slope = None
            if softcap is not None:
                capped = torch.tanh(logits / softcap)
                slope = 1 - capped.square()
                logits = capped.mul_(softcap)
            # In place, with one exponential: the logits become probabilities, then the gradient.
            highest = logits.amax(-1, keepdim=True)
            total -= (logits.gather(1, wanted[:, None]) - highest).sum()
            sums = logits.sub_(highest).exp_().sum(-1, keepdim=True)
            total += sums.log().sum()
            if not (wants_hidden or wants_weight or wants_bias):
                continue
            slopes = logits.div_(sums)
            slopes.scatter_add_(1, wanted[:, None], torch.full_like(wanted[:, None], -1, dtype=slopes.dtype))
            if slope is not None:
                slopes *= slope
            if to_bias is not None:
                to_bias += slopes.sum(0)
            slopes = slopes.to(hidden.dtype)
            if to_hidden is not None:
                torch.mm(slopes, used, out=to_hidden[begin : begin + chunk])
            if to_weight is not None:
                to_weight += slopes.T @ part
        ctx.gradients = (to_hidden, to_weight, to_bias)
        ctx.weight_dtypes = (weight.dtype, None if bias is None else bias.dtype)
        return total

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *above: Any) -> Any:
        """Scale the gradients by that of the loss, in place: they are there for one backward pass."""
        if ctx.gradients is None:
            raise ValueError("the gradients of linear_cross_entropy are gone: it is differentiable once")
        to_hidden, to_weight, to_bias = ctx.gradients
        ctx.gradients = None
        factor = above[0]
        kinds = ctx.weight_dtypes
        return (
            None if to_hidden is None else to_hidden.mul_(factor.to(to_hidden.dtype)),
            None if to_weight is None else to_weight.mul_(factor).to(kinds[0]),
            None if to_bias is None else to_bias.mul_(factor).to(kinds[1]),
            *(None,) * 3,
        )
