"""KV compression written out a second time, slowly and in fp64: what the package is compared with.

One plain forward pass over one whole text. Every full-attention layer is told where the passes of the compressed run
ended and what was kept after each; it attends accordingly, and checks that no better slots could have been kept.
"""

from itertools import pairwise
from typing import Any

import torch
from transformers import AttentionInterface, AttentionMaskInterface

NAME = "naive_compression"


class Naive:
    """A stock model that computes what it would with a compressed cache.

    Args:
        model: put back as it was after every call.
        method: its settings are read, its ranking is not used.
        compact: number kept slots and new tokens 0, 1, 2, … in every pass.
    """

    def __init__(self, model: Any, method: Any, compact: bool) -> None:
        self.model, self.method, self.compact = model, method, compact

    def __call__(self, ids: torch.Tensor, ends: list[int], kept: list[Any]) -> torch.Tensor:
        """Return the logits [n, vocab] of the text [n].

        Args:
            ends: tokens seen after each pass.
            kept: [pass][full layer][key head] true positions held after it.
        """
        self.ends, self.kept, self.layers = ends, kept, 0
        self.jointly: list[list[Any]] = [[] for _ in ends]
        AttentionInterface.register(NAME, self.layer)
        AttentionMaskInterface.register(NAME, lambda *_, **__: None)
        before = self.model.config._attn_implementation
        self.model.set_attn_implementation(NAME)
        try:
            with torch.no_grad():
                logits = self.model(ids[None], use_cache=False).logits[0]
        finally:
            self.model.set_attn_implementation(before)
        self.check_jointly()
        return logits

    def layer(self, module: Any, query: Any, key: Any, value: Any, mask: Any, scaling: float, **kwargs: Any) -> Any:
        """Run one attention layer on [1, heads, n, d]."""
        assert mask is None
        queries, keys, values = (x[0].double() for x in (query, key, value))
        if kwargs.get("sliding_window"):
            at = torch.arange(keys.shape[1])
            inside = (at[:, None] >= at) & (at[:, None] - at < kwargs["sliding_window"])
            group = queries.shape[0] // keys.shape[0]
            keys, values = (x.repeat_interleave(group, dim=0) for x in (keys, values))
            out = softmax(queries @ keys.mT * scaling, inside) @ values
        else:
            out = self.chunks(module, queries, keys, values, scaling)
            self.layers += 1
        return out.transpose(0, 1)[None].to(query.dtype), None

    def chunks(self, module: Any, queries: Any, keys: Any, values: Any, scaling: float) -> torch.Tensor:
        """Attend pass by pass: what was kept, then the new tokens up to the query's own."""
        heads, group = keys.shape[0], queries.shape[0] // keys.shape[0]
        speeds, out = self.speeds(module), torch.zeros_like(queries)
        held: list[list[int]] = [[] for _ in range(heads)]
        for (begin, end), after, together in zip(pairwise([0, *self.ends]), self.kept, self.jointly, strict=True):
            worth, columns = [], [[*slots, *range(begin, end)] for slots in held]
            for head, slots in enumerate(columns):
                own, at = slice(head * group, (head + 1) * group), torch.tensor(slots)
                moves = (torch.arange(len(at)) if self.compact else at) - at
                moved = turned(keys[head, at], moves, speeds)
                asking = turned(queries[own, begin:end], moves[begin - end :], speeds)
                weights = softmax(asking @ moved.T * scaling, torch.arange(begin, end)[:, None] >= at)
                out[own, begin:end] = weights @ values[head, at]
                worth.append(self.worth(weights, moved, at))
            held = after[self.layers]
            if self.method.name == "tova":
                worth = [sum(worth) / heads] * heads
            for head in range(heads):
                if self.method.name == "spotlight":
                    together.append((columns[head], held[head], worth[head]))
                else:
                    self.check(columns[head], held[head], worth[head])
        return out

    def speeds(self, module: Any) -> torch.Tensor:
        """Return the angular speeds of the layer's RoPE."""
        rotary = self.model.get_decoder().rotary_emb
        kinds = getattr(self.model.config, "layer_types", None)
        own = getattr(rotary, f"{kinds[module.layer_idx]}_inv_freq", None) if kinds else None
        return (rotary.inv_freq if own is None else own).double()

    def worth(self, weights: torch.Tensor, keys: torch.Tensor, at: torch.Tensor) -> torch.Tensor:
        """Return what each slot [m] is worth to the method; weights [group, n, m], keys [m, d]."""
        name = self.method.name
        if name == "streaming":
            return at.double()
        if name == "knorm":
            return -(keys**2).sum(1).sqrt()
        if name == "keydiff":
            unit = keys / (keys**2).sum(1, keepdim=True).sqrt()
            mean = unit.mean(0)
            return -(unit @ mean) / mean.norm()
        seen = weights[:, -(1 if name == "tova" else self.method.recent) :]
        mass = seen.amax((0, 1)) if name == "spotlight" else seen.mean((0, 1))
        if name == "tova":
            return mass
        reach = self.method.kernel // 2
        return torch.stack([mass[max(0, i - reach) : i + reach + 1].max() for i in range(len(mass))])

    def check_jointly(self) -> None:
        """Check what all heads of all layers decided together."""
        remembered: dict[int, float] = {}
        for heads in filter(None, self.jointly):
            columns, held, _ = heads[0]
            assert all((own, kept) == (columns, held) for own, kept, _ in heads)
            best = torch.stack([worth for _, _, worth in heads]).sort(dim=0, descending=True).values
            now = best[: self.method.looks].mean(0)
            worth = torch.tensor([max(float(x), remembered.get(at, 0.0)) for at, x in zip(columns, now, strict=True)])
            self.check(columns, held, worth)
            if len(held) < len(columns):
                old = columns[: max(0, len(columns) - self.method.settle)]
                remembered = {at: float(x) for at, x in zip(old, worth, strict=False) if at in held}

    def check(self, columns: list[int], held: list[int], worth: torch.Tensor) -> None:
        """Check that ``held`` are the protected slots and the worthiest others, in the order of the text."""
        if len(held) == len(columns):
            assert held == columns
            return
        sacred = {at for at in columns if at < self.method.sink} | set(columns[-self.method.recent :])
        assert held == sorted(held)
        assert sacred <= set(held) < set(columns)
        by_worth = dict(zip(columns, worth.tolist(), strict=True))
        stayed = [by_worth[at] for at in held if at not in sacred]
        went = [by_worth[at] for at in columns if at not in held]
        # Rounding may decide between slots of nearly equal worth.
        slack = 1e-5 * (1 + float(worth.abs().max()))
        assert not stayed or min(stayed) >= max(went) - slack, (min(stayed), max(went))


def softmax(scores: torch.Tensor, seen: torch.Tensor) -> torch.Tensor:
    """Return the attention weights of scores [heads, n, m] where ``seen`` [n, m]."""
    weights = (scores - scores.amax(-1, keepdim=True)).exp() * seen
    return weights / weights.sum(-1, keepdim=True)


def turned(vectors: torch.Tensor, moves: torch.Tensor, speeds: torch.Tensor) -> torch.Tensor:
    """Rotate [..., m, d] by positions [m]: channel i and i + d/2 are one complex number."""
    left, right = vectors.chunk(2, dim=-1)
    pairs = torch.complex(left, right) * torch.polar(torch.ones(1).double(), moves[:, None] * speeds)
    return torch.cat((pairs.real, pairs.imag), dim=-1)
