"""Checkpoints of a run: written whole or not at all, everything that is needed to go on as if nothing had happened."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import pickle
import random
import re
import shutil
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from training.processes import shard_like, whole

#: what a full disk is reported as: by the system, by torch's archive writer, by safetensors
UNWRITTEN = (OSError, RuntimeError, SafetensorError)
_WEIGHTS, _STATE, _OPTIMIZER = "trainable.safetensors", "state.json", "optimizer.pt"
#: better weights that no checkpoint knows of yet
_NEXT = ".next.safetensors"


@contextlib.contextmanager
def whole_folder(folder: Path, what: str) -> Iterator[Path]:
    """Yield an empty folder to write to, which takes the place of ``folder`` when the block ends without an error.

    Args:
        folder: to write; what is there is replaced.
        what: to be named if it cannot be written.

    Raises:
        OSError: it could not be written; what was there is as it was.
    """
    partial, old = folder.with_name(f".{folder.name}.partial"), folder.with_name(f".{folder.name}.old")
    try:
        for left in (partial, old):
            shutil.rmtree(left, ignore_errors=True)
        partial.mkdir(parents=True)
        yield partial
    except UNWRITTEN as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise OSError(
            f"{what} could not be written to {folder} ({reason(error)}); nothing is lost: make room and run the "
            "same command again, it goes on from the last checkpoint"
        ) from error
    if folder.exists():
        folder.replace(old)
    partial.replace(folder)
    shutil.rmtree(old, ignore_errors=True)


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
    root: Path,
    step: int,
    weights: Mapping[str, torch.Tensor],
    optimizer: Mapping[str, Any],
    facts: Mapping[str, Any],
    keep: int,
) -> Path:
    """Write the checkpoint ``root/step-N``; delete all but the latest ``keep``.

    Args:
        root: folder of the checkpoints.
        step: steps done.
        weights: as ``whole_weights`` returns them.
        optimizer: as ``whole_state`` returns it.
        facts: what the loop notes, as JSON values.
        keep: how many stay.

    Raises:
        OSError: it could not be written (a full disk, say); earlier checkpoints are as they were.
    """
    target, partial = root / f"step-{step:07d}", root / ".partial"
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        save_file(dict(weights), partial / _WEIGHTS)
        torch.save({"optimizer": optimizer, "random": random_state()}, partial / _OPTIMIZER)
        (partial / _STATE).write_text(json.dumps({"step": step, **facts}, indent=2) + "\n", encoding="utf-8")
        for file in (*partial.iterdir(), partial):
            _synced(file)
        shutil.rmtree(target, ignore_errors=True)
        partial.replace(target)
        _synced(root)
    except UNWRITTEN as error:
        shutil.rmtree(partial, ignore_errors=True)
        kept = [folder.name for folder in sorted(root.glob("step-*"))]
        raise OSError(
            f"the checkpoint of step {step} could not be written to {root} ({reason(error)}); "
            f"{f'{kept[-1]} is intact: run the same command again to go on from it' if kept else 'none is there yet'}"
        ) from error
    for old in sorted(root.glob("step-*"))[:-keep]:
        shutil.rmtree(old, ignore_errors=True)
    return target


def reason(error: Exception) -> str:
    """Return why something could not be written, in one line."""
    words = " ".join(str(error).split())
    full = getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    return (
        f"is the disk full? {words}"
        if full or re.search(r"os error (27|28|122)\b|write|unexpected pos", words.lower())
        else words
    )


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
        ValueError: the checkpoint is of another model or adapter, or damaged.
        OSError: it cannot be read.
    """
    load_weights(model, checkpoint.folder / _WEIGHTS)
    try:
        saved = torch.load(checkpoint.folder / _OPTIMIZER, map_location="cpu", weights_only=True)
        _put_state(optimizer, saved["optimizer"])
        set_random_state(saved["random"])
    except (RuntimeError, KeyError, ValueError, EOFError, pickle.UnpicklingError) as error:
        raise ValueError(
            f"{checkpoint.folder} does not hold the state of this optimizer, or is damaged "
            f"({' '.join(str(error).split())[:200]}): delete it to go on from another"
        ) from error


def whole_weights(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Return the parameters that learn, by name, whole and on the CPU; all processes must call this together."""
    return {name: whole(weight) for name, weight in trainable(model).items()}


def whole_state(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Return the state of an optimizer with whole tensors; all processes must call this together."""
    state = optimizer.state_dict()
    moments = {
        place: {name: whole(value) if isinstance(value, torch.Tensor) else value for name, value in own.items()}
        for place, own in state["state"].items()
    }
    return {**state, "state": moments}


def _put_state(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Give an optimizer a saved state, sharded as its parameters are."""
    weights = [weight for group in optimizer.param_groups for weight in group["params"]]
    for place, own in state["state"].items():
        for name, value in own.items():
            if isinstance(value, torch.Tensor) and value.shape == weights[place].shape:
                own[name] = shard_like(value, weights[place])
    optimizer.load_state_dict(state)


def load_weights(model: torch.nn.Module, path: Path) -> None:
    """Read the trainable parameters of a model back.

    Raises:
        ValueError: names or shapes are those of another model or adapter, or the file is damaged.
    """
    own = trainable(model)
    try:
        saved = load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged ({error}): delete {path.parent} to go on from another") from error
    for name in sorted(saved.keys() ^ own.keys()):
        raise ValueError(f"{path.parent} was saved from another model or adapter: {name} is in one of them only")
    with torch.no_grad():
        for name, weight in own.items():
            if weight.shape != saved[name].shape:
                raise ValueError(
                    f"{path.parent} was saved from another model or adapter: {name} has shape "
                    f"{list(saved[name].shape)} there and {list(weight.shape)} here"
                )
            weight.copy_(shard_like(saved[name], weight))


def keep_best(folder: Path, weights: Mapping[str, torch.Tensor], step: int) -> None:
    """Write the best weights so far beside those before them, to take their place as soon as a checkpoint knows.

    Raises:
        OSError: they could not be written; the last ones are as they were.
    """
    partial = folder / ".partial"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        save_file(dict(weights), partial, {"step": str(step)})
        _synced(partial)
        partial.replace(folder / _NEXT)
    except UNWRITTEN as error:
        partial.unlink(missing_ok=True)
        raise OSError(f"the best weights could not be written to {folder} ({reason(error)})") from error


def settle_best(folder: Path, step: int | None) -> None:
    """Let the best weights be those of ``step``, as a checkpoint has it; what was written later is dropped."""
    waiting = folder / _NEXT
    if not waiting.exists():
        return
    with safe_open(waiting, "pt") as file:
        known = file.metadata() == {"step": str(step)}
    if known:
        waiting.replace(folder / _WEIGHTS)
    else:
        waiting.unlink()


def load_best(folder: Path, model: torch.nn.Module) -> None:
    """Put the best weights into a model.

    Raises:
        ValueError: as ``load_weights``.
    """
    load_weights(model, folder / _WEIGHTS)


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


def _synced(path: Path) -> None:
    """Wait until a file, or the entries of a folder, are on the disk."""
    opened = os.open(path, os.O_RDONLY)
    try:
        os.fsync(opened)
    finally:
        os.close(opened)
