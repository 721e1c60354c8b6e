"""Training beacons: pre-training on plain text, fine-tuning on conversations (arXiv 2401.03462 v3, section 3.3).

The base model stays as it is. Gradients flow through all windows of a text, since a window's beacons are read by every
later one.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from beacon.beacon_cache import BeaconCache
from beacon.checkpoint import load_beacons, save_beacons
from beacon.config import BeaconConfig
from beacon.install import installed
from beacon.recipe import Beacons, Objective, Recipe
from beacon.scoring import row_losses, shifted
from beacon.weights import BeaconWeights
from longllm.linear_cross_entropy import CHUNK, IGNORED
from longllm.loading import load
from longllm.recipe import source
from longllm.samples import Samples, load_samples
from training import Order, Outcome, Processes, checkpoint, model_card, run_record, train
from training.loop import claim
from training.record import plain, write_record


class Learner(torch.nn.Module):
    """A frozen model with beacons that learn, as one module, so that processes can share the work."""

    def __init__(
        self, model: Any, weights: BeaconWeights, config: BeaconConfig, objective: Objective, chunk: int = CHUNK
    ) -> None:
        super().__init__()
        self.model, self.weights = model, weights
        self.config, self.objective, self.chunk = config, objective, chunk

    def forward(self, groups: Sequence[Mapping[str, torch.Tensor]], seed: int) -> torch.Tensor:
        """Return the summed loss of rows: ``ids`` and ``targets`` [rows, tokens] of each group of equal length."""
        total = []
        for group in groups:
            cache = BeaconCache(self.model, self.config, seed=seed)
            total.append(row_losses(self.model, group["ids"], group["targets"], cache, self.objective, self.chunk))
        return torch.cat(total).sum()


@dataclasses.dataclass(frozen=True)
class Collator:
    """Makes the batch of some rows: groups of equal length, whose ratios are drawn from the first row's seed."""

    samples: Samples
    config: BeaconConfig
    objective: Objective
    device: torch.device | str = "cpu"

    def __call__(self, rows: Sequence[int], seeds: Sequence[str]) -> dict[str, Any]:
        """Return ``groups``, ``seed`` and ``weight``, the number of targets."""
        groups = []
        for _, same in itertools.groupby(sorted((self.samples[row] for row in rows), key=_length), key=_length):
            ids, labels = (torch.tensor(part, device=self.device) for part in zip(*same, strict=True))
            groups.append({"ids": ids, "targets": shifted(labels, self.config, self.objective, training=True)})
        seed = int.from_bytes(hashlib.sha256(seeds[0].encode()).digest()[:6], "big")
        return {"groups": groups, "seed": seed, "weight": sum(int((x["targets"] != IGNORED).sum()) for x in groups)}

    @property
    def windows(self) -> list[int]:
        """Windows of each row."""
        return [-(-length // self.config.window) for length in self.samples.lengths]


def _length(row: tuple[list[int], list[int]]) -> int:
    return len(row[0])


def train_beacons(recipe: Recipe, out: Path, *, progress: bool = False) -> dict[str, Any]:
    """Train as the recipe says; write the beacons to ``out/beacons``; return what was done, as JSON values.

    ``out`` also gets run.json (resolved settings, versions, data hashes), metrics.jsonl and checkpoints. The same call
    goes on from the last checkpoint if it was interrupted.

    Raises:
        ValueError: a setting, a row or a model that does not fit, or another run's folder.
        ImportError: accelerate or bitsandbytes is missing.
        OSError: something cannot be read or written.
    """
    data = recipe.data
    if not data.train:
        raise ValueError("data.train must name at least one file of training rows (see longscope synth --help)")
    processes = Processes.started()
    if processes.sharing > 1:
        raise ValueError("windows are read one after the other: context parallelism does not apply to beacons")
    # In turn: the first process downloads, tokenises and writes what the others then find.
    with processes.in_turn():
        loaded = load(
            recipe.base.model,
            dtype=recipe.base.dtype,
            attention=recipe.base.attention,
            device=processes.place,  # type: ignore[arg-type]
            quantised=recipe.base.nf4,
        )
        shown = progress and processes.leads
        samples = _samples(loaded.tokenizer, recipe, data.train, out, shown)
        held_out = _samples(loaded.tokenizer, recipe, data.evaluate, out, shown) if data.evaluate else None
    model: Any = loaded.model.requires_grad_(False)
    weights, config = beacons_to_train(model, recipe.beacons, recipe.optimisation.seed)
    short = sum(length <= config.window for length in samples.lengths)
    if short and recipe.objective.text_ends(training=True):
        raise ValueError(
            f"{short:,} of {len(samples):,} rows fill no more than a window of {config.window:,} tokens and have no "
            f"beacons to learn: set data.min_length to {config.window + 1:,}, or objective.last_window to beacons"
        )
    collate = Collator(samples, config, recipe.objective, loaded.device)
    order = _order(recipe, collate.windows, processes)
    files = [source(words)[0] for words in (*data.train, *data.evaluate)]
    record = run_record({**plain(recipe), "config": plain(config)}, files) | {"rows": samples.report}
    # Anything may change but how often something is logged or kept.
    own = {name: value for name, value in plain(recipe).items() if name != "keeping"}
    identity = {"recipe": own, "config": plain(config), "data": record["data"]}
    claim(out, recipe.keeping, identity, recipe.optimisation.steps(order.steps_per_epoch), processes.readers)
    if processes.leads:
        write_record(out / "run.json", record)
    judge = evaluation(held_out, config, data.ratios, recipe.base.head_chunk) if held_out else None
    with installed(model, config, weights, recompute=recipe.base.recompute == "on"):
        outcome = train(
            Learner(model, weights, config, recipe.objective, recipe.base.head_chunk),
            collate,
            lambda learner, batch: learner(batch["groups"], batch["seed"]),
            order,
            out=out,
            optimisation=recipe.optimisation,
            keeping=recipe.keeping,
            evaluate=judge,
            identity=identity,
            processes=processes,
            progress=shown,
        )
    facts = _facts(recipe, config, weights, samples, outcome)
    if processes.leads:
        facts["beacons"] = str(out / "beacons")
        with checkpoint.whole_folder(out / "beacons", "the beacons") as folder:
            save_beacons(folder, model, weights, base=recipe.base.model)
            (folder / "README.md").write_text(_card(facts), encoding="utf-8")
            (folder / "facts.json").write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
        write_record(out / "run.json", {**record, "outcome": facts})
    processes.wait()
    return facts


def beacons_to_train(model: Any, wish: Beacons, seed: int = 0) -> tuple[BeaconWeights, BeaconConfig]:
    """Return the beacons that will learn, in fp32, with gradients where the wish says so, and their config.

    Args:
        model: whose beacons they are.
        wish: what they start from and what of them learns.
        seed: of new low-rank projections.

    Raises:
        ValueError: a wish that those it starts from cannot fulfil, or nothing of them that would learn.
    """
    if wish.start:
        weights = load_beacons(wish.start, model)
        for name, mine, theirs in (
            ("window", wish.window, weights.config.window),
            ("param", wish.param, weights.config.param),
            ("rank", wish.rank, weights.rank),
        ):
            if mine and mine != theirs:
                raise ValueError(f"the beacons in {wish.start} have {name} {theirs}: beacons.{name} asks for {mine}")
        config = dataclasses.replace(weights.config, ratio=wish.ratio, ratio_mix=wish.ratio_mix)
        weights.config = config
    else:
        config = wish.config()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            weights = BeaconWeights.initialised(model, config, wish.rank)
    weights.float()
    weights.requires_grad_(False)
    for name, parameter in weights.released_parameters().items():
        kind = "embedding" if "embed" in name else name.partition("self_attn.beacon_")[2][0]
        parameter.requires_grad_(kind in wish.learn)
    if not any(each.requires_grad for each in weights.parameters()):
        raise ValueError(f"beacons.learn ({', '.join(wish.learn)}) names nothing that these beacons have")
    return weights, config


def evaluation(
    samples: Samples, config: BeaconConfig, ratios: Sequence[int] = (), chunk: int = CHUNK
) -> Callable[[Learner], dict[str, float]]:
    """Return an evaluation by held-out rows, read as in use: the loss of what follows their first window.

    Args:
        samples: the rows.
        config: of the beacons.
        ratios: each is used for all windows; empty = those of the config.
        chunk: rows of logits that exist at once.

    Raises:
        ValueError: no row is longer than a window.
    """
    rule = Objective(first_window="skip", last_window="beacons")
    rows = []
    for ids, labels in (samples[row] for row in range(len(samples))):
        targets = shifted(torch.tensor([labels]), config, rule, training=False)
        if count := int((targets != IGNORED).sum()):
            rows.append((torch.tensor([ids]), targets, count))
    if not rows:
        raise ValueError(f"no row of data.evaluate has targets after its first window of {config.window} tokens")

    def evaluate(learner: Learner) -> dict[str, float]:
        model, figures = learner.model, {}
        place = next(learner.weights.parameters()).device
        for ratio in ratios or config.valid_ratios:
            fixed = dataclasses.replace(config, ratio=(ratio,))
            total = sum(
                float(row_losses(model, ids.to(place), targets.to(place), BeaconCache(model, fixed), rule, chunk).sum())
                for ids, targets, _ in rows
            )
            figures[f"loss_x{ratio}"] = total / sum(count for *_, count in rows)
        return {"loss": sum(figures.values()) / len(figures), **figures}

    return evaluate


def _samples(tokenizer: Any, recipe: Recipe, files: tuple[str, ...], out: Path, progress: bool) -> Samples:
    """Tokenise the rows of some files, or map what an earlier run has tokenised."""
    data = recipe.data
    limits = {"max_length": data.max_length, "min_length": data.min_length, "seed": data.seed}
    return load_samples(tokenizer, files, cache=out / "tokens", progress=progress, **limits)


def _order(recipe: Recipe, windows: list[int], processes: Processes) -> Order:
    """Return which rows make up which step; rows of like length have equally many windows."""
    wish, strict = recipe.optimisation, recipe.data.strict
    grouped = windows if wish.group_by_length or strict else None
    return Order(len(windows), wish.batch_size, wish.accumulation, wish.seed, processes.readers, grouped, strict)


def _facts(
    recipe: Recipe, config: BeaconConfig, weights: BeaconWeights, samples: Samples, outcome: Outcome
) -> dict[str, Any]:
    """Return what a run did, as JSON values."""
    return {
        "base": recipe.base.model,
        "window": config.window,
        "ratios": list(config.ratio),
        "rank": weights.rank,
        "trainable": sum(each.numel() for each in weights.parameters() if each.requires_grad),
        "rows": len(samples),
        "tokens": int(samples.offsets[-1]),
        **{name: getattr(outcome, name) for name in ("steps", "planned", "resumed", "best", "stopped", "seconds")},
        "finished": outcome.finished,
        "loss": outcome.loss if math.isfinite(outcome.loss) else None,
    }


def _card(facts: Mapping[str, Any]) -> str:
    """Return the card of the beacons."""
    best, loss = facts["best"], facts["loss"]
    told = {
        "base model": f"`{facts['base']}`",
        "beacons": f"windows of {facts['window']:,} tokens, ratios {', '.join(map(str, facts['ratios']))}; "
        f"{facts['trainable']:,} parameters" + (f" (rank {facts['rank']})" if facts["rank"] else ""),
        "data": f"{facts['rows']:,} rows, {facts['tokens']:,} tokens",
        "training": f"{facts['steps']:,} of {facts['planned']:,} steps"
        + (f"; loss {loss:.4f}" if loss is not None else "")
        + (f"; best held-out {best}" if best else ""),
        "use": "`beacon.load_beacons(FOLDER, model)`, then `beacon.installed(model, weights.config, weights)`",
    }
    summary = "Activation Beacon's compressor, trained by `longscope train beacon`."
    return model_card(f"Beacons for {facts['base']}", summary, facts=told)
