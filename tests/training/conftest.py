"""A regression with dropout that trains in milliseconds, and a disk that is full."""

import importlib.util
import json
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from training import Keeping, Optimisation, Order, Outcome, train

ROWS = 10
INPUTS = torch.randn(ROWS, 4, generator=torch.Generator().manual_seed(5))
WANTED = INPUTS @ torch.tensor([1.0, -2.0, 0.5, 3.0])


class Toy(torch.nn.Module):
    """A frozen layer, dropout and a head that learns."""

    def __init__(self, dropout: float = 0.0, width: int = 8) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.frozen = torch.nn.Linear(4, width).requires_grad_(False)
        self.dropout = torch.nn.Dropout(dropout)
        self.head = torch.nn.Linear(width, 1)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return self.head(self.dropout(torch.tanh(self.frozen(inputs))))[:, 0]


def collate(rows: list[int], seeds: list[str]) -> dict[str, Any]:
    assert len(rows) == len(seeds)
    return {"inputs": INPUTS[rows], "wanted": WANTED[rows], "weight": len(rows)}


def squared(model: torch.nn.Module, batch: dict[str, Any]) -> torch.Tensor:
    return ((model(batch["inputs"]) - batch["wanted"]) ** 2).sum()


def run(
    out: Path,
    model: Any = None,
    loss: Any = squared,
    evaluate: Any = None,
    identity: Any = None,
    rows: int = ROWS,
    **changes: Any,
) -> tuple[torch.nn.Module, Outcome]:
    """Train a toy; ``changes`` are settings of Optimisation and Keeping, told apart by name."""
    model = Toy() if model is None else model
    keeping = {name: changes.pop(name) for name in list(changes) if name in Keeping.__dataclass_fields__}
    optimisation = Optimisation(**{"learning_rate": 0.05, "max_steps": 12, **changes})
    order = Order(rows, optimisation.batch_size, optimisation.accumulation, optimisation.seed)
    outcome = train(
        model,
        collate,
        loss,
        order,
        out=out,
        optimisation=optimisation,
        keeping=Keeping(**keeping),
        evaluate=evaluate,
        identity=identity,
    )
    return model, outcome


def metrics(out: Path) -> list[dict[str, Any]]:
    """Return the lines of a run, without how long they took."""
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name != "seconds_per_step"} for line in lines]


@pytest.fixture
def toy() -> SimpleNamespace:
    """The toy and what trains it."""
    disk = module(Path(__file__).with_name("hardship.py")).full_disk
    return SimpleNamespace(
        Toy=Toy, collate=collate, squared=squared, run=run, metrics=metrics, full_disk=disk, rows=ROWS
    )


@pytest.fixture(scope="session")
def tiny_chat() -> ModuleType:
    """The module that builds the tiny chat model of the longllm tests."""
    return module(Path(__file__).parents[1] / "longllm" / "tiny_chat.py")


@pytest.fixture(scope="session")
def hardship() -> ModuleType:
    """A full disk, and two processes."""
    return module(Path(__file__).with_name("hardship.py"))


def module(file: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(file.stem, file)
    found = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(found)
    return found
