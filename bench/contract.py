"""The compression contract against injected faults: which invariant catches which bug.

    python -m bench.contract                      a tiny random model, seconds
    python -m bench.contract --model smollm2-135m-instruct

Each fault is one that a KV-compression library has had, or could have, without anyone noticing from its output. Writes
``out/bench/contract.json``; the exit code is 1 if a fault passes, or if the sound cache does not.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from beacon import Budget, CompressedCache, ContractError, method, verify

Row = dict[str, str]


class SilentNoOp(CompressedCache):
    """Claims to compress and keeps everything."""

    def attended(self, layer_idx: int, queries: torch.Tensor, spec: Any) -> None:
        layer = self.layers[layer_idx]
        if layer.joined is not None:
            layer.keys, layer.values = layer.joined
            layer.step = layer.joined = None


class PositionDrift(CompressedCache):
    """Takes the number of slots held for the position of the next token."""

    def begin(self, columns: int, mask: Any, positions: Any, rows: int) -> torch.Tensor:
        true = super().begin(columns, mask, positions, rows)
        held = max(max(layer, default=0) for layer in self.schedule.slots)
        return true - (self.schedule.next_position[0] - held)


class FirstSampleOnly(CompressedCache):
    """Compresses the first row of a batch and leaves the others as they are."""

    def attended(self, layer_idx: int, queries: torch.Tensor, spec: Any) -> None:
        layer = self.layers[layer_idx]
        if layer.joined is None or queries.shape[0] == 1:
            return super().attended(layer_idx, queries, spec)
        keys, values = layer.joined
        gone = keys.shape[2] - layer.step.keep[layer.index][0]
        keys[0, :, :gone], values[0, :, :gone] = 0, 0
        layer.keys, layer.values, layer.step, layer.joined = keys, values, None, None
        return None


class FirstSampleRanks(CompressedCache):
    """Keeps of every row the places that the first row's ranking chose."""

    def attended(self, layer_idx: int, queries: torch.Tensor, spec: Any) -> None:
        own = self.method
        first = SimpleNamespace(
            remembers=False,
            joint=False,
            scores=own.scores,
            rank=lambda *known: own.rank(*known)[:1].expand(known[0].shape),
        )
        self.method = first  # type: ignore[assignment]
        super().attended(layer_idx, queries, spec)
        self.method = own


class MemoryKept(CompressedCache):
    """Shows fewer slots but holds on to the memory of all of them."""

    def attended(self, layer_idx: int, queries: torch.Tensor, spec: Any) -> None:
        layer = self.layers[layer_idx]
        whole = layer.joined
        super().attended(layer_idx, queries, spec)
        if whole is not None:
            count = layer.keys.shape[2]
            for name, tensor in zip(("keys", "values"), whole, strict=True):
                view = tensor[:, :, :count]
                view.copy_(getattr(layer, name))
                setattr(layer, name, view)


class DropsAtRatioOne(CompressedCache):
    """Drops the oldest slot even where nothing may be dropped."""

    def attended(self, layer_idx: int, queries: torch.Tensor, spec: Any) -> None:
        super().attended(layer_idx, queries, spec)
        layer = self.layers[layer_idx]
        if self.budget.keeps_all:
            layer.keys[:, :, 0], layer.values[:, :, 0] = 0, 0


class ValuesMoved(CompressedCache):
    """Keeps the right keys beside the values of their neighbours."""

    def attended(self, layer_idx: int, queries: torch.Tensor, spec: Any) -> None:
        layer = self.layers[layer_idx]
        dropped = layer.joined is not None
        super().attended(layer_idx, queries, spec)
        if dropped:
            layer.values.copy_(layer.values.roll(1, dims=2))


class KeysNotTurned(CompressedCache):
    """Renumbers positions without rotating the keys to them."""

    def attended(self, layer_idx: int, queries: torch.Tensor, spec: Any) -> None:
        turns, self.turns = self.turns, {}
        super().attended(layer_idx, queries, spec)
        self.turns = turns


class LeavesPrefix(CompressedCache):
    """Forgets every layer but one."""

    def forget(self) -> None:
        last = self.layers[self.full[-1]]
        kept, ranked = (last.keys, last.values), last.ranked
        super().forget()
        last.lazy_initialization(kept[0], kept[1])
        last.write(*kept)
        last.ranked = ranked
        self.schedule.slots[-1] = [kept[0].shape[2]] * len(self.seen)


class SeesPadding(CompressedCache):
    """Attends to the padding of the shorter rows of a batch."""

    def spec(self, layer_idx: int, keys: int) -> Any:
        from flashcore import AttentionSpec

        return AttentionSpec(causal=True)


#: name -> (faulty cache, positions it is run with)
FAULTS: dict[str, tuple[type[CompressedCache], str]] = {
    "silent no-op": (SilentNoOp, "original"),
    "position drift": (PositionDrift, "original"),
    "first sample only": (FirstSampleOnly, "original"),
    "first sample's ranking for all": (FirstSampleRanks, "original"),
    "memory kept behind a view": (MemoryKept, "original"),
    "drops at ratio 1": (DropsAtRatioOne, "original"),
    "values beside wrong keys": (ValuesMoved, "original"),
    "compact positions, keys not turned": (KeysNotTurned, "compact"),
    "dropped prefix stays in one layer": (LeavesPrefix, "original"),
    "padding attended": (SeesPadding, "original"),
}
SOUND = {f"none ({positions})": (CompressedCache, positions) for positions in ("original", "compact")}


def verdict(model: Any, ids: list[int], kind: type[CompressedCache], positions: str) -> tuple[str, str]:
    """Return the invariant that catches a cache class, or "-", and what it says."""

    def make(**limit: Any) -> CompressedCache:
        return kind(model, method("snapkv", recent=8), Budget(**limit), positions=positions)  # type: ignore[arg-type]

    try:
        verify(model, ids, make)
    except ContractError as caught:
        return caught.invariant, str(caught)
    return "-", "passed"


def table(model: Any, ids: list[int], report: Callable[[Row], None] = lambda row: None) -> list[Row]:
    """Run every fault and the sound cache; return a row for each."""
    rows = []
    for name, (kind, positions) in {**SOUND, **FAULTS}.items():
        invariant, said = verdict(model, ids, kind, positions)
        rows.append({"fault": name, "caught by": invariant, "message": said})
        report(rows[-1])
    return rows


def tiny_model() -> Any:
    """Return a random Llama of three layers."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes: Any = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "initializer_range": 0.3}
    heads: Any = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "vocab_size": 64}
    return LlamaForCausalLM(LlamaConfig(**sizes, **heads, max_position_embeddings=512)).eval()


def main() -> None:
    """Print the table and write it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="", help="a name of the catalog or a folder; default: a tiny random model")
    parser.add_argument("--out", type=Path, default=Path("out/bench"))
    chosen = parser.parse_args()
    if chosen.model:
        import catalog
        import longllm

        loaded = longllm.load(chosen.model)
        model: Any = loaded.model
        text = catalog.read_document("sotu/1963").text
        ids = longllm.document_prompt(loaded.tokenizer, text, "?").ids[:128]
    else:
        model, ids = tiny_model(), tuple(torch.randint(1, 64, (128,)).tolist())
    print("| injected fault | caught by |\n|---|---|")
    rows = table(model, list(ids), lambda row: print(f"| {row['fault']} | {row['caught by']} |"))
    chosen.out.mkdir(parents=True, exist_ok=True)
    (chosen.out / "contract.json").write_text(json.dumps({"model": chosen.model or "tiny", "rows": rows}, indent=1))
    escaped = [row["fault"] for row in rows if (row["caught by"] == "-") != (row["fault"] in SOUND)]
    sys.exit(1 if escaped else 0)


if __name__ == "__main__":
    main()
