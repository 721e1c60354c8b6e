"""torch's own kernel where it has the option, tiles where it has not. Works everywhere; the fall-back of ``auto``."""

from __future__ import annotations

import torch
from torch.nn.functional import scaled_dot_product_attention

from .. import blockwise
from ..spec import AttentionSpec
from ..varlen import Segment, segments, valid_tokens

#: entries of one mask, and the fewest queries that share one
_MASK, _FEWEST_ROWS = 1 << 22, 64


def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, spec: AttentionSpec) -> torch.Tensor:
    """Compute attention with ``scaled_dot_product_attention`` or, for what it lacks, ``flashcore.blockwise``.

    Args and result as in ``backends.reference.attend``; every option is honoured.
    """
    n, m = q.shape[2], k.shape[2]
    if spec.lengths is not None and one_call_serves(spec, n, m):
        padding = ~valid_tokens(spec.lengths, n, spec.left_padded)
        valid_k = None if spec.causal else valid_tokens(spec.lengths, m, spec.left_padded)[:, None, None, :]
        return torch_kernel(q, k, v, spec, valid_k).masked_fill(padding[:, None, :, None], 0.0)
    parts = segments(spec, q.shape[0], n, m)
    if parts is None:
        return attend_dense(q, k, v, spec, (0, 0, 0))
    return run_segments(q, k, v, spec, parts)


def one_call_serves(spec: AttentionSpec, n: int, m: int) -> bool:
    """Say whether a padded batch needs no splitting: a key mask [batch, 1, 1, m] or plain causality does it.

    Right-padded causal rows hide their padding by causality alone. Rows that are wholly padding would give NaN in
    torch's kernel, so they are left to the tiles.
    """
    if not spec.is_bare() or n != m or spec.query_lengths is not None or spec.lengths is None:
        return False
    if spec.causal:
        return not spec.left_padded
    return bool((spec.lengths > 0).all())


def torch_kernel(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    spec: AttentionSpec,
    allowed: torch.Tensor | None = None,
) -> torch.Tensor:
    """Call torch's kernel, with one query packed so that its heads share the keys of their group."""
    n, group = q.shape[2], q.shape[1] // k.shape[1]
    if n == 1 and group > 1:
        packed = q.reshape(q.shape[0], k.shape[1], group, q.shape[3])
        out = scaled_dot_product_attention(packed, k, v, attn_mask=allowed, scale=spec.scale)
        return out.reshape(q.shape[0], q.shape[1], 1, v.shape[3])
    causal = spec.causal and n > 1 and allowed is None
    return scaled_dot_product_attention(
        q, k, v, attn_mask=allowed, is_causal=causal, scale=spec.scale, enable_gqa=group > 1
    )


def attend_dense(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, spec: AttentionSpec, origin: tuple[int, int, int]
) -> torch.Tensor:
    """Run a call that is not ragged; ``origin`` is where it lies in the whole call (row, query, key)."""
    n, m = q.shape[2], k.shape[2]
    if n == 0 or m == 0:
        return q.new_zeros(*q.shape[:3], v.shape[3])
    # torch aligns causality top-left; only a square call or a single query means the same as bottom-right.
    if spec.is_bare() and (not spec.causal or n in (1, m)):
        return torch_kernel(q, k, v, spec)
    if spec.is_bare() and n < m and q.device.type == "cpu" and q.shape[3] == v.shape[3]:
        return continued(q, k, v, spec)
    return blockwise.attend(q, k, v, blockwise.Problem.from_spec(spec, q.shape[3], origin))


def continued(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, spec: AttentionSpec) -> torch.Tensor:
    """Run causal queries that stand behind earlier keys (n < m) through torch's kernel, with masks of bounded size.

    On a CPU this takes less than half the time of the tiles, backward included.
    """
    n, m = q.shape[2], k.shape[2]
    outputs, begin = [], 0
    while begin < n:
        end = min(n, begin + max(_FEWEST_ROWS, _MASK // m))
        seen = m - n + end
        allowed = torch.ones(end - begin, seen, dtype=torch.bool).tril(m - n + begin)
        outputs.append(torch_kernel(q[:, :, begin:end], k[:, :, :seen], v[:, :, :seen], spec, allowed))
        begin = end
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=2)


def run_segments(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, spec: AttentionSpec, parts: list[Segment]
) -> torch.Tensor:
    """Run the dense problems of a ragged call one after the other; queries in none of them come out zero."""
    out = q.new_zeros(*q.shape[:3], v.shape[3])
    for part in parts:
        rows, queries, keys = part.slices()
        origin = (part.row, part.query_start, part.key_start)
        out[rows, :, queries] = attend_dense(q[rows, :, queries], k[rows, :, keys], v[rows, :, keys], spec, origin)
    return out
