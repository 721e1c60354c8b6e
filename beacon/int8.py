"""Slots whose memory lies in 8-bit integers: half the bytes of bf16, with an error that is measured."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from beacon.grid import merge
from beacon.memory import Pair, Pass, Settling, Slots
from beacon.plan import RowPlan
from flashcore import rope
from flashcore.hf.cache import GROWTH

_NAMES = ("keys", "values")


def quantised(x: torch.Tensor) -> Pair:
    """Return x [..., d] as int8 and the scale [..., 1] of each vector: its largest number becomes 127.

    >>> codes, scale = quantised(torch.tensor([[0.5, -1.0]]))
    >>> codes.tolist(), round(float(codes[0, 1] * scale), 4)
    ([[64, -127]], -1.0)
    """
    scale = x.float().abs().amax(-1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny) / 127
    return (x.float() / scale).round().to(torch.int8), scale


class Int8Slots(Slots):
    """Sink and memory as 8-bit integers, what follows them as computed.

    ``codes`` and ``scales`` hold [rows, kv_heads, slots, d] and [..., 1] of keys and of values; the buffers of the base
    class hold only the slots after the memory. A layer's memory is widened for one attention call at a time.
    """

    def __init__(self) -> None:
        super().__init__()
        self.codes: list[torch.Tensor] = []
        self.scales: list[torch.Tensor] = []
        #: squared error and squared size of all keys, and of all values, quantised so far
        self.errors = torch.zeros(2, 2, dtype=torch.float64)

    @property
    def buffers(self) -> tuple[torch.Tensor, ...]:
        """Return every tensor that is held."""
        return (*super().buffers, *self.codes, *self.scales)

    def append(self, run: Pass, raw: Pair, beacons: Pair | None, rows: int, room: int) -> Pair:
        """Write new slots behind the memory; return all that may be attended."""
        step, end = run.step, max(run.ends)
        most = max(one.start - one.border for one in run.steps) + step.slots
        self._ready(raw, rows, most)
        joined = [own.new_empty(*own.shape[:2], end, own.shape[3]) for own in raw]
        # Rows that are alike are one piece; others are joined one by one.
        pieces = [(slice(0, len(run.steps)), step)]
        if run.ragged:
            pieces = [(slice(row, row + 1), one) for row, one in enumerate(run.steps)]
        for which, one in pieces:
            rows_held = slice(run.rows.start + which.start, run.rows.start + which.stop)
            for index, (own, out) in enumerate(zip(raw, joined, strict=True)):
                local = self.held()[index][rows_held]
                target = out[which]
                target[:, :, : one.border] = self._widened(index, rows_held, one.border, out.dtype)
                known = one.start - one.border
                target[:, :, one.border : one.start] = local[:, :, :known]
                other = beacons[index][which, :, : one.beacons] if beacons and one.beacons else None
                new = target[:, :, one.start : one.start + one.slots]
                local[:, :, known : known + one.slots] = merge(new, own[which], other, one.lead, one.period)
        return joined[0], joined[1]

    def settle(self, move: Settling, plain: torch.Tensor | None) -> None:
        """Let go of a completed window: what becomes memory is quantised."""
        kept, step = move.kept, move.step
        old = [step.window + place for place in kept.raw]
        new = list(range(kept.at + kept.beacons, kept.at + kept.beacons + len(old)))
        places = torch.tensor([at - step.border for at in old], dtype=torch.long)
        beacons = move.sources(step.border)
        gained = kept.sink + kept.memory
        for index, buffer in enumerate(self.held()):
            local = buffer[move.rows]
            parts = [local[:, :, : kept.sink]] if kept.sink else []
            if kept.beacons:
                turned = rope.rotate(self.plain(move, plain), *move.turn) if index == 0 else local[:, :, beacons]
                parts.append(turned)
            if old:
                raw = local[:, :, places.to(local.device)]
                if index == 0 and old != new:
                    raw = rope.rerotate(raw, torch.tensor(old), torch.tensor(new), move.inv_freq)
                parts.append(raw)
            whole = torch.cat(parts, dim=2) if parts else local[:, :, :0].clone()
            self._add(index, move.rows, step.border, whole[:, :, :gained])
            local[:, :, : whole.shape[2] - gained] = whole[:, :, gained:]

    def view(self, row: int, plan: RowPlan) -> Pair:
        """Return what a row holds, widened."""
        border, which = plan.sink + plan.memory, slice(row, row + 1)
        keys, values = (
            torch.cat((self._widened(index, which, border, held.dtype), held[which, :, : plan.held - border]), dim=2)
            for index, held in enumerate(self.held())
        )
        return keys, values

    def sizes(self) -> Iterator[tuple[str, int, int, int]]:
        """Yield name, rows, slots and spare slots of what is held; an open window has room of its own."""
        for index, (name, held) in enumerate(zip(_NAMES, self.held(), strict=True)):
            coded = self.codes[index].shape[2] if self.codes else 0
            yield name, held.shape[0], held.shape[2] + coded, held.shape[2] + GROWTH

    def retune(self, slots: int, old: torch.Tensor, new: torch.Tensor) -> None:
        """Refuse: quantised keys cannot follow RoPE whose speeds change.

        Raises:
            ValueError: always.
        """
        raise ValueError("int8 memory does not go with RoPE whose speeds depend on the length: choose one of them")

    def pack(self, plan: RowPlan) -> dict[str, torch.Tensor]:
        """Return what is to be saved of a cache of one row."""
        own = {f"codes{index}": tensor for index, tensor in enumerate(self.codes)}
        own |= {f"scales{index}": tensor for index, tensor in enumerate(self.scales)}
        own |= {name: tensor for name in (*_NAMES, "fresh") if (tensor := getattr(self, name)) is not None}
        return {**own, "errors": self.errors}

    def unpack(self, tensors: dict[str, torch.Tensor]) -> None:
        """Take over what ``pack`` returned."""
        rest = dict(tensors)
        self.errors = rest.pop("errors").cpu()
        self.codes = [rest.pop(name) for name in ("codes0", "codes1") if name in rest]
        self.scales = [rest.pop(name) for name in ("scales0", "scales1") if name in rest]
        super().unpack(rest)

    def copy_to(self, other: Slots) -> None:
        """Give another layer a copy of the content."""
        super().copy_to(other)
        if isinstance(other, Int8Slots):
            other.codes = [codes.clone() for codes in self.codes]
            other.scales, other.errors = [scale.clone() for scale in self.scales], self.errors.clone()

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Take these rows, in this order."""
        super().batch_select_indices(indices)
        for name in ("codes", "scales"):
            setattr(self, name, [held.index_select(0, indices.to(held.device)) for held in getattr(self, name)])

    def reset(self) -> None:
        """Forget everything and free the buffers."""
        super().reset()
        self.codes, self.scales = [], []

    def _widened(self, index: int, rows: slice, slots: int, dtype: torch.dtype) -> torch.Tensor:
        """Return the first ``slots`` of memory as numbers, [b, kv_heads, slots, d]."""
        if not slots:
            held = self.held()[index]
            return held[rows, :, :0]
        return (self.codes[index][rows, :, :slots] * self.scales[index][rows, :, :slots]).to(dtype)

    def _add(self, index: int, rows: slice, at: int, new: torch.Tensor) -> None:
        """Quantise new memory [b, kv_heads, slots, d] and put it behind the ``at`` slots that there are."""
        if not new.shape[2]:
            return
        codes, scales = quantised(new)
        for place, numbers in enumerate((codes * scales - new, new)):
            self.errors[index, place] += float(numbers.float().square().sum())
        everything = self.held()[index].shape[0]
        for stored, part in ((self.codes, codes), (self.scales, scales)):
            have = stored[index].shape[2] if len(stored) > index else 0
            if have < at + part.shape[2]:
                grown = part.new_zeros(everything, part.shape[1], at + part.shape[2], part.shape[3])
                if have:
                    grown[:, :, :have] = stored[index]
                stored[index : index + 1] = [grown]
            stored[index][rows, :, at : at + part.shape[2]] = part
