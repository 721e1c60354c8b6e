"""Checkpoints of a run: written whole or not at all, everything that is needed to go on as if nothing had happened."""

from __future__ import annotations

import errno
import json
import os
import random
import shutil
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

_WEIGHTS, _STATE, _OPTIMIZER = "trainable.safetensors", "state.json", "optimizer.pt"


@dataclass(frozen=True)
class Checkpoint:
    """One saved moment of a run."""

    folder: Path
    step: int
    """steps done"""
    facts: Mapping[str, Any]
    """what the loop noted: best figure, evaluations without a better one, settings"""


def trainable(model: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
    """Return the parameters that learn, by name, each once although two modules may share it.

    Raises:
        ValueError: nothing learns.
    """
    found = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
    if not found:
        raise ValueError("no parameter of the model is trainable: unfreeze some, or add an adapter")
    return found


def save(
    root: Path, step: int, model: torch.nn.Module, optimizer: torch.optim.Optimizer, facts: Mapping[str, Any], keep: int
) -> Path:
    """Write the checkpoint ``root/step-N``; delete all but the latest ``keep``.

    Raises:
        OSError: it could not be written (a full disk, say); earlier checkpoints are as they were.
    """
    root.mkdir(parents=True, exist_ok=True)
    target, partial = root / f"step-{step:07d}", root / ".partial"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    try:
        save_weights(model, partial / _WEIGHTS)
        torch.save({"optimizer": optimizer.state_dict(), "random": random_state()}, partial / _OPTIMIZER)
        (partial / _STATE).write_text(json.dumps({"step": step, **facts}, indent=2) + "\n", encoding="utf-8")
        for file in partial.iterdir():
            _synced(file)
        shutil.rmtree(target, ignore_errors=True)
        partial.replace(target)
    except (OSError, RuntimeError) as error:
        # torch.save reports a full disk as a RuntimeError of its archive writer.
        shutil.rmtree(partial, ignore_errors=True)
        kept = [found.folder.name for found in checkpoints(root)]
        full = getattr(error, "errno", None) == errno.ENOSPC or "write" in str(error).lower()
        raise OSError(
            f"the checkpoint of step {step} could not be written to {root}"
            f"{' (is the disk full?)' if full else ''}: {error}; "
            f"{f'{kept[-1]} is intact: run the same command again to go on from it' if kept else 'none is there yet'}"
        ) from error
    for old in checkpoints(root)[:-keep]:
        shutil.rmtree(old.folder, ignore_errors=True)
    return target


def checkpoints(root: Path) -> list[Checkpoint]:
    """Return the complete checkpoints under ``root``, oldest first.

    Raises:
        ValueError: one of them is damaged.
    """
    found = []
    for folder in sorted(root.glob("step-*")):
        try:
            facts = json.loads((folder / _STATE).read_text(encoding="utf-8"))
            found.append(Checkpoint(folder, int(facts.pop("step")), facts))
        except (OSError, KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{folder} is a damaged checkpoint ({error}): delete it to go on from another") from error
    return found


def restore(checkpoint: Checkpoint, model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Put weights, optimizer and random states back as they were.

    Raises:
        ValueError: the checkpoint is of another model or adapter.
        OSError: it cannot be read.
    """
    load_weights(model, checkpoint.folder / _WEIGHTS)
    try:
        saved = torch.load(checkpoint.folder / _OPTIMIZER, map_location="cpu", weights_only=True)
        optimizer.load_state_dict(saved["optimizer"])
        set_random_state(saved["random"])
    except (RuntimeError, KeyError, ValueError) as error:
        raise ValueError(f"{checkpoint.folder} does not hold the state of this optimizer: {error}") from error


def save_weights(model: torch.nn.Module, path: Path) -> None:
    """Write the trainable parameters of a model as one file of tensors."""
    save_file({name: weight.detach().cpu().contiguous() for name, weight in trainable(model).items()}, path)


def load_weights(model: torch.nn.Module, path: Path) -> None:
    """Read the trainable parameters of a model back.

    Raises:
        ValueError: names or shapes are those of another model or adapter.
    """
    saved, own = load_file(path), trainable(model)
    for name in sorted(saved.keys() ^ own.keys()):
        raise ValueError(f"{path.parent} was saved from another model or adapter: {name} is in one of them only")
    with torch.no_grad():
        for name, weight in own.items():
            if weight.shape != saved[name].shape:
                raise ValueError(
                    f"{path.parent} was saved from another model or adapter: {name} has shape "
                    f"{list(saved[name].shape)} there and {list(weight.shape)} here"
                )
            weight.copy_(saved[name])


def random_state() -> dict[str, Any]:
    """Return the state of every source of random numbers, as tensors and plain values."""
    version, words, gauss = random.getstate()
    state: dict[str, Any] = {"torch": torch.get_rng_state(), "python": [version, list(words), gauss]}
    if "numpy" in sys.modules:
        name, keys, place, has_gauss, cached = sys.modules["numpy"].random.get_state()
        state["numpy"] = [name, torch.from_numpy(keys.astype("int64")), int(place), int(has_gauss), float(cached)]
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state_all()
    return state


def set_random_state(state: Mapping[str, Any]) -> None:
    """Continue every source of random numbers from a saved state."""
    torch.set_rng_state(state["torch"])
    version, words, gauss = state["python"]
    random.setstate((version, tuple(words), gauss))
    if "numpy" in state and "numpy" in sys.modules:
        name, keys, *rest = state["numpy"]
        sys.modules["numpy"].random.set_state((name, keys.numpy().astype("uint32"), *rest))
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state_all(state["cuda"])


def _synced(file: Path) -> None:
    """Wait until a file is on the disk."""
    with file.open("rb") as opened:
        os.fsync(opened.fileno())
