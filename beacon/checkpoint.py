"""Beacon checkpoints on disk: the released layout (base and beacon tensors together), or the beacons alone."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from beacon.backbones import backbone
from beacon.config import BeaconConfig
from beacon.weights import BeaconWeights

_BEACONS = "beacons.safetensors"


def load_beacons(folder: str | os.PathLike[str], model: Any) -> BeaconWeights:
    """Read the beacons of a model from a folder in released layout, or from one that ``save_beacons`` wrote.

    The base tensors of a released folder are for ``longllm.load`` (or transformers), which leaves the beacons alone.

    Args:
        folder: with config.json and safetensors files.
        model: the stock model that the beacons belong to.

    Raises:
        ValueError: no beacon checkpoint, tensors missing or left over, or made for a model of another shape.
        OSError: files that cannot be read.
    """
    place = Path(folder)
    settings = json.loads((place / "config.json").read_text(encoding="utf-8"))
    rank = int(settings.pop("beacon_rank", 0))
    tensors: dict[str, torch.Tensor] = {}
    for path in sorted(place.glob("*.safetensors")):
        try:
            with safe_open(path, framework="pt") as file:
                names = [name for name in file.keys() if "beacon_" in name]  # noqa: SIM118
                tensors |= {name: file.get_tensor(name) for name in names}
        except SafetensorError as error:
            raise ValueError(f"{path} is damaged ({error}); fetch or make it again") from error
    weights = BeaconWeights(model, BeaconConfig.from_hf(settings), rank)
    try:
        weights.load_released(tensors)
    except ValueError as error:
        raise ValueError(f"the beacons in {place} do not fit this {model.config.model_type} model: {error}") from error
    return weights.requires_grad_(False)


def save_beacons(folder: str | os.PathLike[str], model: Any, weights: BeaconWeights, **card: Any) -> Path:
    """Write the beacons alone: ``beacons.safetensors`` and the config.json of the model with its beacon fields.

    Args:
        folder: made if it is not there.
        model: the model they belong to.
        weights: full or low-rank.
        card: further facts for the file's header.

    Raises:
        OSError: the files cannot be written.
    """
    place = Path(folder)
    place.mkdir(parents=True, exist_ok=True)
    tensors = {name: tensor.contiguous().cpu() for name, tensor in weights.released().items()}
    partial = place / f".{_BEACONS}.partial"
    save_file(tensors, partial, metadata={"format": "pt", **{name: str(value) for name, value in card.items()}})
    partial.replace(place / _BEACONS)
    _write_config(place, model, weights)
    return place


def save_released(folder: str | os.PathLike[str], model: Any, weights: BeaconWeights, **options: Any) -> Path:
    """Write model and beacons together in the released layout, which the reference code reads too.

    Args:
        folder: made if it is not there.
        model: the stock model.
        weights: with full projections.
        options: of transformers' ``save_pretrained``, such as ``max_shard_size``.

    Raises:
        ValueError: low-rank beacons, which the layout has no place for.
    """
    if weights.rank:
        raise ValueError("the released layout has no low-rank beacons: use save_beacons, or widened() first")
    place = Path(folder)
    tensors = dict(model.state_dict())
    if not model.config.tie_word_embeddings:
        tensors["lm_head.weight"] = model.get_output_embeddings().weight
    model.save_pretrained(place, state_dict={**tensors, **weights.released()}, **options)
    _write_config(place, model, weights)
    return place


def beacons_of(model: Any, window: int) -> tuple[BeaconWeights, bool]:
    """Return the beacons of a model's own folder and True, or untrained ones for this window and False."""
    folder = Path(str(getattr(model, "name_or_path", "") or ""))
    settings = folder / "config.json"
    if settings.is_file() and '"beacon_window"' in settings.read_text(encoding="utf-8"):
        return load_beacons(folder, model), True
    param = ("q", "k", "v")
    config = BeaconConfig(window=window, stride=window, ratio=(8,), param=param)
    return BeaconWeights.initialised(model, config).requires_grad_(False), False


def _write_config(place: Path, model: Any, weights: BeaconWeights) -> None:
    """Write config.json with the beacon fields."""
    backbone(model)
    settings = {**model.config.to_dict(), **weights.config.to_hf()}
    if weights.rank:
        settings["beacon_rank"] = weights.rank
    settings.pop("_name_or_path", None)  # a place on this machine
    settings["architectures"] = [type(model).__name__]
    partial = place / ".config.json.partial"
    partial.write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    partial.replace(place / "config.json")
