"""Which RoPE base to train under: the loss of an untrained model at spread and at natural positions, base by base.

python -m bench.theta --rows out/smollm2-32k/data/eval.jsonl --times 1 5 25 100
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from transformers import AutoConfig

import catalog
from longllm.batches import NATURAL, Collator, batch_loss, headless
from longllm.context import context_from
from longllm.loading import load
from longllm.positions import Spread
from longllm.samples import load_samples


def measure(model: str, rows: str, length: int, times: float, limit: int) -> dict[str, float]:
    """Return the mean loss per target on the first rows of a file, under a base ``times`` the model's own."""
    config = AutoConfig.from_pretrained(catalog.path(model))
    theta = times * float(config.rope_parameters["rope_theta"])
    loaded = load(model, dtype="fp32", context=context_from(config, length=length, theta=theta, base=model))
    samples = load_samples(loaded.tokenizer, [rows], max_length=length)
    found = {"times": times, "theta": theta}
    with headless(loaded.model) as loss:
        for name, spread in (("natural", NATURAL), ("spread", Spread(length, pieces=4))):
            collate = Collator(samples, spread)
            batches = (collate([row], [f"theta/{row}"]) for row in range(min(limit, len(samples))))
            found[name] = batch_loss(loss, loaded.model, batches)
    return found


def main() -> None:
    """Print a table, or one line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--rows", type=str, required=True, help="JSON Lines of training rows")
    parser.add_argument("--length", type=int, default=32768, help="positions to spread over")
    parser.add_argument("--times", type=float, nargs="+", default=[1, 5, 25, 100])
    parser.add_argument("--limit", type=int, default=10, help="rows")
    parser.add_argument("--json", action="store_true")
    wish = parser.parse_args()
    if not Path(wish.rows).is_file():
        parser.error(f"there is no file {wish.rows} (longscope synth offline makes rows)")
    rows = [measure(wish.model, wish.rows, wish.length, times, wish.limit) for times in wish.times]
    if wish.json:
        print(json.dumps({"rows": rows}))
        return
    print("| base | natural positions | spread positions |\n|---|---|---|")
    for row in rows:
        print(f"| {row['theta']:,.0f} | {row['natural']:.3f} | {row['spread']:.3f} |")


if __name__ == "__main__":
    main()
