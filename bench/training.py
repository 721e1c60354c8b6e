"""One step of training on a long text: our LoRA step beside transformers' Trainer, or beside that of beacons.

Both sides train the same adapter on the same weights and tokens, every token a target, with activation checkpointing;
ours runs on flashcore and takes the loss without logits, the peer is the Trainer as it stands, on SDPA. Peaks are those
of processes of their own, counted from when the model has been loaded, with an allocator that gives back what is freed
(``cells.HONEST_MALLOC``; --malloc default leaves it as it is); times alternate in one process, under the default one.

    python -m bench.training --lengths 4096 8192
    python -m bench.training --lengths 2048 4096 --sides beacon lora --recompute off

A step of beacons (windows of 512 tokens, ratio 4, rank 32) reads the same tokens window by window.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

import catalog
from bench.cells import HONEST_MALLOC, append_row, from_process, peak_memory, read_rows
from bench.timing import environment
from longllm.batches import Collator, headless
from longllm.config import Attention
from longllm.context import context_from
from longllm.loading import load
from longllm.samples import Samples
from training import LoraSettings, add_lora

MODEL = "smollm2-135m-instruct"
LORA = LoraSettings(rank=16, alpha=32)
Step = Callable[[], float]


def text_ids(length: int) -> list[int]:
    """Return the first tokens of the novel."""
    from transformers import AutoTokenizer

    text = catalog.read_document("moby-dick").text[: 8 * length]
    return list(AutoTokenizer.from_pretrained(catalog.path(MODEL))(text, verbose=False)["input_ids"][:length])


def loaded(attention: Attention, length: int) -> Any:
    """Return the base model with its context extended to ``length`` tokens."""
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(catalog.path(MODEL))
    context = context_from(config, length=max(8192, length), theta=2.5e6, base=MODEL)
    return load(MODEL, dtype="fp32", attention=attention, device="cpu", context=context).model


def recompute(model: Any) -> None:
    """Switch activation checkpointing on, under the name that this transformers has for it."""
    if hasattr(model, "activation_checkpointing_enable"):
        model.activation_checkpointing_enable({"use_reentrant": False})
    else:
        model.gradient_checkpointing_enable({"use_reentrant": False})


def lora(ids: Sequence[int], checkpointing: bool) -> tuple[Step, Any]:
    """Return a step as ``longscope train longllm`` makes it, and the model."""
    import numpy as np

    model: Any = loaded("flashcore", len(ids))
    if checkpointing:
        recompute(model)
    model = add_lora(model, LORA, checkpointing=checkpointing).train()
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=1e-4, foreach=False)
    samples = Samples(np.array(ids, np.int32), np.ones(len(ids), bool), np.array([0, len(ids)]), {})
    collate = Collator(samples)

    def step() -> float:
        batch = collate([0], "0")
        with headless(model) as loss:
            value = loss(model, batch) / batch["weight"]
            value.backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return float(value.detach())

    return step, model


def trainer(ids: Sequence[int], checkpointing: bool) -> tuple[Step, Any]:
    """Return a step of transformers' Trainer with its own loss, and the model."""
    from transformers import Trainer, TrainingArguments

    base = loaded("sdpa", len(ids))
    if checkpointing:
        recompute(base)
    model = add_lora(base, LORA, checkpointing=checkpointing)
    arguments = TrainingArguments(
        output_dir=tempfile.mkdtemp(),
        per_device_train_batch_size=1,
        use_cpu=True,
        report_to="none",
        learning_rate=1e-4,
        optim="adamw_torch",
        max_steps=100,
    )
    peer: Any = Trainer(model=model, args=arguments)
    peer.current_gradient_accumulation_steps = 1  # which its loop would set
    peer.create_optimizer_and_scheduler(100)
    tokens = torch.tensor([list(ids)])
    inputs = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens), "labels": tokens.clone()}
    weights = [weight for weight in model.parameters() if weight.requires_grad]

    def step() -> float:
        value = peer.training_step(model, dict(inputs))
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        peer.optimizer.step()
        peer.optimizer.zero_grad(set_to_none=True)
        return float(value)

    return step, model


def beacon(ids: Sequence[int], checkpointing: bool) -> tuple[Step, Any]:
    """Return a step as ``longscope train beacon`` makes it, and the model with its beacons."""
    from beacon import installed
    from beacon.recipe import Beacons, Objective
    from beacon.train import Learner, beacons_to_train

    model: Any = loaded("flashcore", len(ids)).requires_grad_(False)
    weights, config = beacons_to_train(model, Beacons(window=512, ratio=(4,), rank=32))
    learner = Learner(model, weights, config, Objective()).train()
    optimizer = torch.optim.AdamW(weights.parameters(), lr=1e-4, foreach=False)
    tokens = torch.tensor([list(ids)])
    targets = torch.nn.functional.pad(tokens[:, 1:], (0, 1), value=-100)

    def step() -> float:
        # Another model of this process may learn in between, so nothing stays installed.
        with installed(model, config, weights, recompute=checkpointing):
            value = learner([{"ids": tokens, "targets": targets}], 0) / (len(ids) - 1)
            value.backward()
        torch.nn.utils.clip_grad_norm_(weights.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return float(value.detach())

    return step, learner


BUILD = {"lora": lora, "trainer": trainer, "beacon": beacon}
#: what a side is called in the tables and keys of rows
TITLES = {"lora": "ours", "trainer": "Trainer", "beacon": "beacons"}


def peak_cell(side: str, length: int, checkpointing: bool) -> dict[str, Any]:
    """Measure the peak of one step in this process, above what the loaded model takes."""
    step, model = BUILD[side](text_ids(length), checkpointing)
    gc.collect()
    held = peak_memory(reset=True)
    loss = step()
    peak = peak_memory()
    weights = sum(weight.nbytes for weight in model.parameters())
    return {"peak_bytes": peak - held, "held_bytes": held, "weights_bytes": weights, "loss": loss}


def time_cell(sides: Sequence[str], length: int, checkpointing: bool, rounds: int) -> dict[str, Any]:
    """Measure the seconds of a step of both sides, alternating, after one warm-up each if there are several rounds."""
    ids = text_ids(length)
    steps = {side: BUILD[side](ids, checkpointing)[0] for side in sides}
    if rounds > 1:
        for step in steps.values():
            step()
    taken: dict[str, list[float]] = {side: [] for side in sides}
    for turn in range(rounds):
        for side in sides if turn % 2 else sides[::-1]:
            begun = time.perf_counter()
            steps[side]()
            taken[side].append(time.perf_counter() - begun)
    ratios = [theirs / own for own, theirs in zip(*taken.values(), strict=True)]
    medians = [statistics.median(seconds) for seconds in taken.values()]
    return {"seconds": medians, "times_as_fast": statistics.median(ratios), "rounds": rounds, "all_seconds": taken}


def measured(
    file: Path, key: str, arguments: Sequence[str], variables: Mapping[str, str] | None = None
) -> dict[str, Any]:
    """Return a cell's row: from the file, or measured in a process of its own and added to it."""
    known = read_rows(file)
    if key in known and "error" not in known[key]:
        return known[key]
    row = {"key": key, **from_process([sys.executable, "-m", "bench.training", *arguments], variables)}
    append_row(file, row)
    return row


def table(rows: Sequence[dict[str, Any]], sides: Sequence[str]) -> str:
    """Return the results as a Markdown table."""
    both = " / ".join(TITLES[side] for side in sides)
    lines = [
        f"| tokens | recompute | peak MB: {both} | ratio | seconds a step: {both} | times as fast |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        peaks = " / ".join(f"{peak / 1e6:,.0f}" if peak else "–" for peak in row["peaks"])
        ratio = f"**{row['peak_ratio']:.2f}**" if row["peak_ratio"] else "–"
        times = " / ".join(f"{seconds:.1f}" for seconds in row["seconds"]) if row["times_as_fast"] else "–"
        fast = f"**{row['times_as_fast']:.2f}**" if row["times_as_fast"] else "–"
        recompute = "on" if row["recompute"] else "off"
        lines.append(f"| {row['length']:,} | {recompute} | {peaks} | {ratio} | {times} | {fast} |")
    return "\n".join(lines)


def main() -> None:
    """Measure what is asked for, print the table, keep the rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=int, nargs="+", default=[4096, 8192])
    parser.add_argument("--sides", nargs=2, choices=list(BUILD), default=["lora", "trainer"])
    parser.add_argument("--recompute", choices=["on", "off", "both"], default="on")
    parser.add_argument("--rounds", type=int, default=2, help="alternated pairs of steps; 0 measures memory alone")
    parser.add_argument("--malloc", choices=["honest", "default"], default="honest")
    parser.add_argument("--out", type=Path, default=Path("out/bench"))
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--peak", nargs=3, metavar=("SIDE", "LENGTH", "RECOMPUTE"), help=argparse.SUPPRESS)
    timed = ("SIDE", "SIDE", "LENGTH", "RECOMPUTE", "ROUNDS")
    parser.add_argument("--time", nargs=5, metavar=timed, help=argparse.SUPPRESS)
    wish = parser.parse_args()
    if wish.peak:
        print(json.dumps(peak_cell(wish.peak[0], int(wish.peak[1]), wish.peak[2] == "on")))
        return
    if wish.time:
        *sides, length, recompute, rounds = wish.time
        print(json.dumps(time_cell(sides, int(length), recompute == "on", int(rounds))))
        return
    wish.out.mkdir(parents=True, exist_ok=True)
    file, rows = wish.out / "training.jsonl", []
    variables = HONEST_MALLOC if wish.malloc == "honest" else {}
    for recompute in ["on", "off"] if wish.recompute == "both" else [wish.recompute]:
        for length in wish.lengths:
            peaks: list[Any] = []
            for side in wish.sides:
                key, cell = f"peak {side} {length} {recompute} {wish.malloc}", ["--peak", side, str(length), recompute]
                peaks.append(measured(file, key, cell, variables).get("peak_bytes"))
            times: dict[str, Any] = {}
            if wish.rounds:
                words = [*wish.sides, str(length), recompute]
                times = measured(file, f"time {' '.join(words)} x{wish.rounds}", ["--time", *words, str(wish.rounds)])
            rows.append(
                {
                    "length": length,
                    "recompute": recompute == "on",
                    "peaks": peaks,
                    "peak_ratio": peaks[0] / peaks[1] if all(peaks) else None,
                    **{name: times.get(name) for name in ("seconds", "times_as_fast")},
                }
            )
    if wish.json:
        print(json.dumps({"rows": rows, "sides": wish.sides, "environment": environment()}))
    else:
        print(table(rows, wish.sides), "\n\n" + ", ".join(f"{name} {value}" for name, value in environment().items()))


if __name__ == "__main__":
    main()
