"""The tour's chapter on Activation Beacon: what a text costs in beacons, and what the model still knows of it."""

from __future__ import annotations

import time
from collections.abc import Generator
from typing import Any

import catalog
from commands.tour_long_document import SPEECH
from commands.tour_page import Chapter, Table

RATIOS = (2, 4, 8)
#: tokens read before the ones that are predicted; both are whole windows
READ, PREDICTED = 3072, 1024


def beacons(loaded: Any) -> Generator[str, None, tuple[list[Chapter], list[dict[str, Any]]]]:
    """Read the beginning of the speech at several ratios and predict what follows; return the chapter and all runs."""
    import beacon

    method = beacon.method("beacon")
    ids = tuple(loaded.tokenizer(catalog.read_document(SPEECH).text)["input_ids"][: READ + PREDICTED])
    yield f"\nThe speech in beacons\n  {READ:,} tokens read, the next {PREDICTED:,} predicted\n"
    warning = method.warning(loaded.model)
    held = method.verified(loaded.model, ids, "compact")
    yield f"  the contract holds: {', '.join(held)}\n" + (f"  note: {warning}\n" if warning else "")
    yield f"  {'memory':<22} {'slots':>6} {'KV MB':>7} {'reading':>9} {'loss':>7}\n"
    runs = [_nothing(loaded, ids), _full(loaded, ids), *(_beacons(loaded, ids, ratio) for ratio in RATIOS)]
    rows = []
    for run in runs:
        megabytes = f"{run['kv_bytes'] / 1e6:.1f}"
        row = (run["run"], f"{run['slots']:,}", megabytes, f"{run['seconds']:.1f} s", f"{run['loss']:.3f}")
        yield f"  {row[0]:<22} {row[1]:>6} {row[2]:>7} {row[3]:>9} {row[4]:>7}\n"
        rows.append(row)
    lead = (
        f"Activation Beacon puts a token of its own after every few tokens of the text; once a window of "
        f"{READ // 3:,} tokens is complete, only these beacons stay. The table says how well the model predicts "
        f"{PREDICTED:,} tokens of the speech (mean loss, lower is better) when it has read the {READ:,} before them in "
        "full, in beacons, or not at all. "
    )
    lead += (
        "The beacons of this model are untrained: they begin as copies of its end-of-text token, and the loss shows "
        "that they then harm more than they hold. Only training makes them a memory."
        if warning
        else "The beacons of this model are trained."
    )
    head = ("memory", "slots", "KV MB", "reading", "loss")
    return [Chapter("A speech in beacons", lead, [Table("Next-token loss", head, rows)])], runs


def _nothing(loaded: Any, ids: tuple[int, ...]) -> dict[str, Any]:
    """Predict without having read."""
    from flashcore.hf import GrowingCache

    return _run(loaded, "nothing read", ids, GrowingCache(loaded.model.config), 0, 0.0)


def _full(loaded: Any, ids: tuple[int, ...]) -> dict[str, Any]:
    """Predict with everything kept."""
    import longllm

    prefix = longllm.prefill(loaded, ids[:READ])
    return _run(loaded, "full attention", ids, prefix.cache, READ, prefix.seconds)


def _beacons(loaded: Any, ids: tuple[int, ...], ratio: int) -> dict[str, Any]:
    """Predict from beacons."""
    import beacon

    method = beacon.method("beacon", window=READ // 3)
    cache = method.new_cache(loaded.model, beacon.Budget(ratio=ratio), expected=len(ids))
    prefix = beacon.read(loaded, ids[:READ], cache, chunk=READ)
    with method.running(loaded.model):
        return _run(loaded, f"beacons, ratio {ratio}", ids, cache, cache.slots_of(0)[0], prefix.seconds)


def _run(loaded: Any, name: str, ids: tuple[int, ...], cache: Any, slots: int, seconds: float) -> dict[str, Any]:
    """Return the figures of one memory: its bytes as the slots in use take them, and the loss of what follows."""
    import torch

    from beacon.request import token_bytes

    begun = time.perf_counter()
    first = READ if slots else 0
    tokens = torch.tensor([ids[READ:]], device=loaded.device)
    at = torch.arange(first, first + tokens.shape[1], device=loaded.device)[None]
    with torch.inference_mode():
        logits = loaded.model(tokens, position_ids=at, past_key_values=cache).logits[0, :-1].float()
        loss = torch.nn.functional.cross_entropy(logits, tokens[0, 1:])
    slot = token_bytes(loaded.model) * loaded.model.config.num_hidden_layers
    return {
        "run": name,
        "slots": slots,
        "kv_bytes": slots * slot,
        "seconds": seconds,
        "predicting_seconds": time.perf_counter() - begun,
        "loss": float(loss),
    }
