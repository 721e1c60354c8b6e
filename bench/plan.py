"""How well a plan foresees the memory of training: predicted beside measured peaks, one process for every case.

A case is a real run of ``longllm.train.extend_context``: load, adapter, forward, backward, optimizer, save. Its peak is
VmHWM above what interpreter and libraries take. Blocks beyond 256 KB are given back to the system when they are freed
(``cells.HONEST_MALLOC``); --malloc default leaves that as it is.

    python -m bench.plan --lengths 512 1024 2048 4096
"""

from __future__ import annotations

import json
import os
import time
from dataclasses import asdict, dataclass, replace
from typing import Any

import bench.cells as cells
from longllm.planning import Setting, read_sizes, step_work, training_memory
from longllm.recipe import Base
from training.adapters import LoraSettings
from training.settings import Optimisation

MODEL = "smollm2-135m-instruct"
WHOLE = 1 << 30
#: name -> what differs from LoRA on frozen fp32 weights with a chunked loss
CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "recompute": {"recompute": "on"},
    "recompute 1 in 2": {"recompute": "on", "recompute_every": 2},
    "full logits": {"head_chunk": WHOLE},
    "full logits, recompute": {"head_chunk": WHOLE, "recompute": "on"},
    "nf4": {"nf4": True},
    "nf4, recompute": {"nf4": True, "recompute": "on"},
}


@dataclass(frozen=True)
class Settings:
    """What all cases of a run share."""

    model: str = MODEL
    dtype: str = "fp32"
    rank: int = 16
    malloc: str = "honest"

    def fingerprint(self) -> str:
        """Return a hash of all that."""
        return cells.digest(asdict(self), CASES)

    def base(self, case: str) -> Base:
        """Return the model's settings in a case."""
        return replace(Base(self.model, self.dtype), **CASES[case])  # type: ignore[arg-type]

    def setting(self, case: str, length: int) -> Setting:
        """Return what is planned."""
        return Setting(length, self.base(case), LoraSettings(rank=self.rank, alpha=2 * self.rank or 1))


def measure(settings: Settings, case: str, length: int) -> cells.Row:
    """Run a case in this process."""
    import bitsandbytes  # noqa: F401
    import peft  # noqa: F401
    import torch
    from transformers.models.llama import modeling_llama  # noqa: F401

    from longllm.planning.probe import probe
    from longllm.train import Recipe

    torch.ones(512, 512).mm(torch.ones(512, 512))
    recipe = Recipe(settings.base(case), lora=settings.setting(case, length).lora, optimisation=Optimisation())
    before = cells.peak_memory(reset=True)
    begun = time.perf_counter()
    # AdamW's moments are there from the second step on; those of an adapter are too small to wait for.
    seconds = probe(recipe, length, 1 if settings.rank else 2)
    peak = cells.peak_memory()
    return {
        "peak_bytes": peak - before,
        "baseline_bytes": before,
        "step_seconds": seconds,
        "seconds": time.perf_counter() - begun,
        "threads": torch.get_num_threads(),
    }


def compared(settings: Settings, row: cells.Row) -> cells.Row:
    """Return a row with what the plan says, and the ratio of the two."""
    setting = settings.setting(row["method"], row["length"])
    sizes = read_sizes(settings.model)
    memory = training_memory(sizes, setting)
    found = {"predicted_bytes": memory.peak, "moment": memory.worst, "parts": memory.parts}
    if row.get("error"):
        return {**row, **found}
    return {
        **row,
        **found,
        "ratio": memory.peak / row["peak_bytes"],
        "operations": step_work(sizes, setting).operations,
    }


def table(rows: list[cells.Row]) -> str:
    """Return the results as a Markdown table."""
    lines = ["| tokens | case | predicted MB | measured MB | ratio | worst moment |", "|---|---|---|---|---|---|"]
    for row in sorted(rows, key=lambda row: row["length"]):
        found = f"{row['peak_bytes'] / 1e6:,.0f} | **{row['ratio']:.2f}**" if "ratio" in row else f"{row['error']} | –"
        foreseen = f"{row['predicted_bytes'] / 1e6:,.0f}"
        lines.append(f"| {row['length']:,} | {row['method']} | {foreseen} | {found} | {row['moment']} |")
    return "\n".join(lines)


def main() -> None:
    """Measure what is asked for, print the table, keep the rows."""
    parser = cells.command_line(__doc__, MODEL, [512, 1024, 2048, 4096])
    parser.add_argument("--cases", nargs="+", choices=list(CASES), default=list(CASES))
    parser.add_argument("--rank", type=int, default=Settings.rank, help="0: everything learns")
    parser.add_argument("--malloc", choices=["honest", "default"], default="honest")
    chosen = parser.parse_args()
    if chosen.cell:
        cell = json.loads(chosen.cell)
        print(json.dumps(measure(Settings(**cell["settings"]), cell["method"], cell["length"])))
        return
    settings = Settings(chosen.model, "fp32" if chosen.dtype == "auto" else chosen.dtype, chosen.rank, chosen.malloc)
    if chosen.malloc == "honest":
        os.environ.update(cells.HONEST_MALLOC)
    wanted = [(case, length) for length in ([1024] if chosen.quick else chosen.lengths) for case in chosen.cases]

    def measured(one: Any, case: str, length: int) -> cells.Row:
        return cells.measure_in("bench.plan", one, case, length)

    file, report = cells.run("plan", chosen, wanted, settings, measured)
    report["rows"] = [compared(settings, row) for row in report["rows"]]
    file.with_suffix(".json").write_text(json.dumps(report, indent=2) + "\n")
    print(table(report["rows"]), *cells.left_out_lines(report), sep="\n")


if __name__ == "__main__":
    main()
