"""``longscope train beacon``: train the compressor of Activation Beacon."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from beacon.recipe import Beacons, Objective, Texts
from commands.trained import trained
from longllm.recipe import Base
from training.settings import Keeping, Optimisation


def train_beacon(
    *,
    out: str,
    base: Base = Base(),  # noqa: B008
    beacons: Beacons = Beacons(),  # noqa: B008
    data: Texts = Texts(),  # noqa: B008
    objective: Objective = Objective(),  # noqa: B008
    optimisation: Optimisation = Optimisation(),  # noqa: B008
    keeping: Keeping = Keeping(),  # noqa: B008
) -> Iterator[str | dict[str, Any]]:
    """Train beacons to hold what a model has read: first on plain text, then on long conversations.

    The settings come from a YAML file, and the command line overrides them:

        longscope train beacon --config beacon/recipes/smollm2-135m.yaml --out out/beacon
        longscope train beacon --config beacon/recipes/qwen2-7b-pretrain.yaml --out out/pretrained
        longscope train beacon --config beacon/recipes/qwen2-7b-finetune.yaml --beacons.start out/pretrained/beacons \\
            --out out/finetuned

    The result is out/beacons. A run that was interrupted goes on when the same command is given again.

    Args:
        out: folder of the run: beacons, metrics, checkpoints, record
        base: the model, which stays as it is, and how it is held in memory
        beacons: what learns
        data: what it learns from
        objective: which windows count, and how much is learned from the model's own reading without beacons
        optimisation: learning rate, schedule, size and number of steps
        keeping: when to log, evaluate and save, when to stop early
    """
    folder = Path(out).expanduser()
    from beacon.recipe import Recipe
    from beacon.train import train_beacons

    recipe = Recipe(base, beacons, data, objective, optimisation, keeping)
    what = f"beacons for {base.model} in {folder}"
    yield from trained(what, lambda: train_beacons(recipe, folder, progress=True), "beacons")
