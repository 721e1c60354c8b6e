"""Moving rotated keys by whole positions, fast: the angles of all moves come from one table."""

from __future__ import annotations

import torch


class Turns:
    """Rotates keys [batch, kv_heads, m, d] by integer moves [batch, kv_heads, m] of their positions.

    A key that was rotated at position p and is moved by k equals one rotated at p + k (the rotations of RoPE add up).
    The table of cos and sin is computed in fp64 for moves up to the largest asked for, and kept. Each move rounds to
    the dtype of the keys, so that keys kept over hundreds of evictions drift in bf16, most in large caches, whose slow
    channels turn by less than the rounding; in fp32 the drift is negligible.

    >>> from flashcore import rope
    >>> speeds, plain = rope.inverse_frequencies(8), torch.randn(1, 1, 3, 8)
    >>> at = torch.tensor([5, 6, 9])
    >>> moved = Turns(speeds)(rope.rotate(plain, *rope.tables(at, speeds)), torch.tensor([[[-5, -5, -7]]]))
    >>> torch.allclose(moved, rope.rotate(plain, *rope.tables(at - torch.tensor([5, 5, 7]), speeds)), atol=1e-5)
    True
    """

    def __init__(self, inv_freq: torch.Tensor) -> None:
        self.inv_freq = inv_freq.detach().double().cpu()
        self.reach = -1
        self.cos = self.sin = torch.empty(0)

    def __call__(self, keys: torch.Tensor, moves: torch.Tensor) -> torch.Tensor:
        """Return the moved keys, computed in fp32, in the dtype of ``keys``."""
        reach = int(moves.abs().max()) if moves.numel() else 0
        if reach == 0:
            return keys
        if reach > self.reach or self.cos.device != keys.device:
            self.reach = max(2 * reach, self.reach)
            angles = torch.arange(-self.reach, self.reach + 1).double()[:, None] * self.inv_freq
            self.cos, self.sin = (wave(angles).float().to(keys.device) for wave in (torch.cos, torch.sin))
        rows = (moves + self.reach).to(keys.device)
        cos, sin = self.cos[rows], self.sin[rows]
        half = keys.shape[3] // 2
        left, right = keys[..., :half].float(), keys[..., half:].float()
        return torch.cat((left * cos - right * sin, right * cos + left * sin), dim=3).to(keys.dtype)
