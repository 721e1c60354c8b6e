"""Checkpoints: whole or not there, and refused by name where they do not fit."""

import random
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from training import checkpoint


def optimizer_of(model: torch.nn.Module, steps: int = 0) -> torch.optim.Optimizer:
    optimizer = torch.optim.AdamW(checkpoint.trainable(model).values(), lr=0.1)
    for _ in range(steps):
        model(torch.randn(3, 4)).sum().backward()
        optimizer.step()
    return optimizer


def save(root: Path, step: int, model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> Path:
    weights, state = checkpoint.whole_weights(model), checkpoint.whole_state(optimizer)
    return checkpoint.save(root, step, weights, state, {"best": {}}, keep=2)


def test_weights_optimizer_and_every_random_state_come_back(toy: SimpleNamespace, tmp_path: Path) -> None:
    model = toy.Toy()
    optimizer = optimizer_of(model, 3)
    save(tmp_path, 3, model, optimizer)
    drawn = [random.random(), random.gauss(), np.random.randn(), float(torch.rand(1))]  # noqa: NPY002
    other = toy.Toy()
    fresh = optimizer_of(other, 1)
    (found,) = checkpoint.checkpoints(tmp_path)
    checkpoint.restore(found, other, fresh)
    assert (found.step, found.facts) == (3, {"best": {}})
    assert [random.random(), random.gauss(), np.random.randn(), float(torch.rand(1))] == drawn  # noqa: NPY002
    for mine, theirs in zip(other.parameters(), model.parameters(), strict=True):
        assert torch.equal(mine, theirs)
    for mine, theirs in zip(fresh.state.values(), optimizer.state.values(), strict=True):
        assert all(torch.equal(mine[name], theirs[name]) for name in ("step", "exp_avg", "exp_avg_sq"))


@pytest.mark.parametrize("room", [100, 700])
def test_a_full_disk_leaves_the_earlier_checkpoint(toy: SimpleNamespace, tmp_path: Path, room: int) -> None:
    """``room``: too little for the weights, or enough for them but not for the optimizer."""
    model = toy.Toy(width=64)
    optimizer = optimizer_of(model, 1)
    save(tmp_path, 1, model, optimizer)
    sizes = {file.name: file.stat().st_size for file in tmp_path.rglob("*") if file.is_file()}
    assert 100 < sizes["trainable.safetensors"] < 700 < sizes["optimizer.pt"]
    with toy.full_disk(room), pytest.raises(OSError, match=r"step 2 .*is the disk full\?.*step-0000001 is intact"):
        save(tmp_path, 2, model, optimizer)
    assert [folder.name for folder in tmp_path.iterdir()] == ["step-0000001"]
    checkpoint.restore(checkpoint.checkpoints(tmp_path)[0], model, optimizer)
    save(tmp_path, 2, model, optimizer)
    assert len(checkpoint.checkpoints(tmp_path)) == 2


def test_a_first_checkpoint_on_a_full_disk_says_that_none_is_there(toy: SimpleNamespace, tmp_path: Path) -> None:
    model = toy.Toy()
    with toy.full_disk(50), pytest.raises(OSError, match="none is there yet"):
        save(tmp_path, 1, model, optimizer_of(model))
    assert checkpoint.checkpoints(tmp_path) == []


def test_the_best_weights_stay_if_better_ones_cannot_be_written(toy: SimpleNamespace, tmp_path: Path) -> None:
    model = toy.Toy()
    checkpoint.keep_best(tmp_path, checkpoint.whole_weights(model), 1)
    checkpoint.settle_best(tmp_path, 1)
    with torch.no_grad():
        model.head.bias.fill_(7)
    with toy.full_disk(50), pytest.raises(OSError, match="the best weights could not be written"):
        checkpoint.keep_best(tmp_path, checkpoint.whole_weights(model), 2)
    checkpoint.load_best(tmp_path, model)
    assert model.head.bias.item() != 7


def test_better_weights_count_from_the_checkpoint_that_knows_of_them(toy: SimpleNamespace, tmp_path: Path) -> None:
    model = toy.Toy()
    for step in (1, 2):
        with torch.no_grad():
            model.head.bias.fill_(step)
        checkpoint.keep_best(tmp_path, checkpoint.whole_weights(model), step)
        checkpoint.settle_best(tmp_path, 1)  # the second was written by a run that was killed before its checkpoint
    checkpoint.load_best(tmp_path, model)
    assert model.head.bias.item() == 1
    assert [file.name for file in tmp_path.iterdir()] == ["trainable.safetensors"]


@pytest.mark.parametrize("name", ["state.json", "trainable.safetensors", "optimizer.pt"])
def test_a_damaged_checkpoint_is_named(toy: SimpleNamespace, tmp_path: Path, name: str) -> None:
    model = toy.Toy()
    optimizer = optimizer_of(model, 1)
    folder = save(tmp_path, 5, model, optimizer)
    (folder / name).write_bytes((folder / name).read_bytes()[:9])
    with pytest.raises(ValueError, match=r"step-0000005.*(damaged|does not hold).*delete"):
        checkpoint.restore(checkpoint.checkpoints(tmp_path)[0], model, optimizer)


def test_a_checkpoint_of_another_model_is_refused_by_name(toy: SimpleNamespace, tmp_path: Path) -> None:
    model = toy.Toy()
    save(tmp_path, 1, model, optimizer_of(model))
    (found,) = checkpoint.checkpoints(tmp_path)
    wider = toy.Toy(width=16)
    with pytest.raises(ValueError, match=r"head.weight has shape \[1, 8\] there and \[1, 16\] here"):
        checkpoint.restore(found, wider, optimizer_of(wider))
    model.frozen.requires_grad_(True)
    with pytest.raises(ValueError, match=r"another model or adapter: frozen.bias is in one of them only"):
        checkpoint.restore(found, model, optimizer_of(model))
