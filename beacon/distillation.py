"""Learning from the same model's reading of the whole text: cross-entropy mixed with the divergence from a teacher.

The teacher is the model without beacons, on the same tokens. Its logits and the student's exist a few hundred rows at a
time and share one head; loss and gradient are taken together (Hinton et al., arXiv 1503.02531, with the true targets).
"""

from __future__ import annotations

from typing import Any

import torch

from longllm.linear_cross_entropy import CHUNK, IGNORED


def distilled_cross_entropy(
    hidden: torch.Tensor,
    teacher: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    *,
    share: float,
    temperature: float = 1.0,
    chunk: int = CHUNK,
) -> torch.Tensor:
    """Return the sum over targets of ``(1 - share) * cross-entropy + share * T² * KL(teacher || student)``, in nats.

    Both distributions of the divergence are softened by the temperature T. Differentiable once, with respect to
    ``hidden`` alone.

    Args:
        hidden: [n, d] the student's last hidden states.
        teacher: [n, d] the teacher's.
        weight: [vocabulary, d] the frozen head of both.
        targets: [n]; rows with -100 count nothing.
        share: of the divergence, 0 to 1.
        temperature: above 0.
        chunk: rows whose logits exist at once.

    Raises:
        ValueError: shapes that differ, a share or temperature out of range, or a head that learns.

    >>> hidden, weight, targets = torch.randn(5, 4), torch.randn(9, 4), torch.arange(5)
    >>> same = distilled_cross_entropy(hidden, hidden, weight, targets, share=1.0)
    >>> round(abs(float(same)), 4)
    0.0
    """
    if hidden.shape != teacher.shape or hidden.shape[:-1] != targets.shape:
        raise ValueError(
            f"hidden {list(hidden.shape)}, teacher {list(teacher.shape)} and targets {list(targets.shape)} do not fit"
        )
    if not 0 <= share <= 1 or not temperature > 0:
        raise ValueError(f"share must lie between 0 and 1 and temperature above 0, got {share} and {temperature}")
    if weight.requires_grad:
        raise ValueError("teacher and student share a frozen head: set requires_grad of its weight to False")
    counts = targets != IGNORED
    # Autocast has no say: every precision here is chosen.
    with torch.autocast(hidden.device.type, enabled=False):
        rows = (hidden[counts], teacher[counts].detach(), weight, targets[counts])
        return _Distilled.apply(*rows, share, temperature, chunk)


class _Distilled(torch.autograd.Function):
    """Forward takes the gradient along with the loss; backward scales it."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        teacher: torch.Tensor,
        weight: torch.Tensor,
        targets: torch.Tensor,
        share: float,
        temperature: float,
        chunk: int,
    ) -> torch.Tensor:
        """Return the summed loss of [n, d] rows."""
        slopes = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        for begin in range(0, len(targets), chunk):
            part = slice(begin, begin + chunk)
            wanted = targets[part, None]
            logits = (hidden[part] @ weight.T).float()
            soft = torch.log_softmax(logits / temperature, -1)
            sure = soft if temperature == 1 else torch.log_softmax(logits, -1)
            taught = torch.log_softmax((teacher[part] @ weight.T).float() / temperature, -1)
            total -= (1 - share) * sure.gather(1, wanted).sum()
            total += share * temperature**2 * torch.nn.functional.kl_div(soft, taught, reduction="sum", log_target=True)
            if slopes is None:
                continue
            slope = (1 - share) * sure.exp()
            slope.scatter_add_(1, wanted, torch.full_like(wanted, share - 1, dtype=slope.dtype))
            slope += share * temperature * (soft.exp() - taught.exp())
            torch.mm(slope.to(hidden.dtype), weight, out=slopes[part])
        ctx.slopes = slopes
        return total

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *above: Any) -> Any:
        """Scale the gradient by that of the loss."""
        slopes, ctx.slopes = ctx.slopes, None
        if slopes is None:
            raise ValueError("the gradient of distilled_cross_entropy is gone: it is differentiable once")
        return slopes.mul_(above[0].to(slopes.dtype)), *(None,) * 6
