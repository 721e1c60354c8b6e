"""Rotary position embedding (Su et al. 2021): tables, changed bases, and moving cached keys to other positions.

Half-split layout as in transformers: channel ``i`` is paired with channel ``i + d/2``. Angles are computed in fp32.
"""

from __future__ import annotations

import math

import torch


def inverse_frequencies(head_dim: int, base: float = 10000.0) -> torch.Tensor:
    """Return the d/2 angular speeds (radians per position) of a rotary embedding, float32.

    Raises:
        ValueError: for an odd ``head_dim`` or a base that is not above 1.

    >>> inverse_frequencies(4, base=100.0).tolist()
    [1.0, 0.10000000149011612]
    """
    if head_dim < 2 or head_dim % 2:
        raise ValueError(f"head_dim must be a positive even number, received {head_dim}")
    if not base > 1:
        raise ValueError(f"the rotary base must be above 1, received {base}")
    return 1.0 / base ** (torch.arange(0, head_dim, 2, dtype=torch.int64).float() / head_dim)


def stretched_base(base: float, factor: float, head_dim: int) -> float:
    """Return the base that slows the slowest channel by ``factor`` and leaves the fastest alone (NTK-aware).

    >>> round(stretched_base(10000.0, 1.0, 64))
    10000
    """
    if factor < 1:
        raise ValueError(f"the stretch factor must be at least 1, received {factor}")
    return base * factor ** (head_dim / (head_dim - 2))


def interpolated(inv_freq: torch.Tensor, factor: float) -> torch.Tensor:
    """Slow every channel by ``factor``: linear position interpolation (Chen et al. 2023).

    >>> interpolated(torch.tensor([1.0, 0.5]), 2.0).tolist()
    [0.5, 0.25]
    """
    if not factor >= 1:
        raise ValueError(f"the interpolation factor must be at least 1, received {factor}")
    return inv_freq / factor


def llama3_scaled(
    inv_freq: torch.Tensor,
    factor: float = 8.0,
    low_freq_factor: float = 1.0,
    high_freq_factor: float = 4.0,
    original_max_position: int = 8192,
) -> torch.Tensor:
    """Slow only the channels whose wave is long against the trained length (Llama 3.1's ``rope_type: llama3``).

    Args:
        inv_freq: [d/2] base speeds. The other names are those of the model's ``rope_parameters``.

    >>> llama3_scaled(torch.tensor([1.0, 1e-5])).tolist() == [1.0, torch.tensor(1e-5).item() / 8]
    True
    """
    turns = original_max_position * inv_freq / (2 * math.pi)
    share = ((turns - low_freq_factor) / (high_freq_factor - low_freq_factor)).clamp(0, 1)
    return torch.lerp(inv_freq / factor, inv_freq, share)


def tables(
    positions: torch.Tensor, inv_freq: torch.Tensor, dtype: torch.dtype = torch.float32
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return cos and sin, each [..., d], for integer or float ``positions`` [...].

    >>> cos, sin = tables(torch.tensor([0, 1]), inverse_frequencies(4))
    >>> cos.shape, float(sin[0].sum())
    (torch.Size([2, 4]), 0.0)
    """
    return from_angles(positions[..., None].float() * inv_freq.float().to(positions.device), dtype)


def from_angles(angles: torch.Tensor, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
    """Return cos and sin [..., d] of angles [..., d/2]."""
    both_halves = torch.cat((angles, angles), dim=-1)
    return both_halves.cos().to(dtype), both_halves.sin().to(dtype)


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotate ``x`` [..., d] by the angles of ``cos`` and ``sin`` (broadcast against it).

    >>> x = torch.tensor([1.0, 0.0])
    >>> [round(value, 4) for value in rotate(x, *from_angles(torch.tensor([math.pi / 2]))).tolist()]
    [-0.0, 1.0]
    """
    half = x.shape[-1] // 2
    out = x * cos
    # In place: a rotated copy of x would be written and read once more.
    out[..., :half].addcmul_(x[..., half:], sin[..., :half], value=-1)
    out[..., half:].addcmul_(x[..., :half], sin[..., half:])
    return out


def rerotate(
    keys: torch.Tensor,
    old_positions: torch.Tensor,
    new_positions: torch.Tensor,
    inv_freq: torch.Tensor,
    new_inv_freq: torch.Tensor | None = None,
) -> torch.Tensor:
    """Move keys that were rotated at ``old_positions`` to ``new_positions``, and to another base if asked.

    One rotation by the difference of the angles, computed in fp32: for equal bases the angle is
    ``(new - old) · inv_freq``, so a shift by the same amount for all keys keeps every relative position.

    Args:
        keys: [batch, kv_heads, m, d] after RoPE.
        old_positions, new_positions: [m] or [batch, m].
        inv_freq: [d/2] speeds the keys were rotated with. new_inv_freq: speeds they shall have (None = the same).

    Returns:
        Keys [batch, kv_heads, m, d] in the dtype of ``keys``.

    Raises:
        ValueError: if positions and keys differ in number.

    >>> speeds = inverse_frequencies(8)
    >>> plain, old, new = torch.randn(1, 1, 5, 8), torch.arange(5), torch.arange(5) + 7
    >>> moved = rerotate(rotate(plain, *tables(old, speeds)), old, new, speeds)
    >>> torch.allclose(moved, rotate(plain, *tables(new, speeds)), atol=1e-6)
    True
    """
    for name, positions in (("old_positions", old_positions), ("new_positions", new_positions)):
        if positions.ndim not in (1, 2) or positions.shape[-1] != keys.shape[2]:
            raise ValueError(f"{name} must give {keys.shape[2]} positions, received shape {list(positions.shape)}")
    speeds = inv_freq.double()
    target = speeds if new_inv_freq is None else new_inv_freq.double()
    # In fp64: the difference of two large angles loses its small digits in fp32.
    angles = new_positions[..., None].double() * target - old_positions[..., None].double() * speeds
    cos, sin = from_angles(angles.to(keys.device), torch.promote_types(keys.dtype, torch.float32))
    if angles.ndim == 3:
        cos, sin = cos[:, None], sin[:, None]
    return rotate(keys if keys.dtype == torch.float64 else keys.float(), cos, sin).to(keys.dtype)
