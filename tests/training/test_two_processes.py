"""Two processes that train together, over gloo on this CPU."""

import json
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from training import Keeping, Optimisation, Order, Processes, train

pytest.importorskip("accelerate")
STEPS = {"learning_rate": 0.05, "max_steps": 8}


def together(toy: Any, out: Path, dropout: float, limits: tuple[float, ...], sharded: bool = False) -> list[float]:
    """Train in this process of several, interrupted where ``limits`` (in minutes) says so; return the weights."""
    for minutes in limits:
        processes, seen = Processes.started(), []
        if sharded:
            shard(processes.accelerator)
            processes = Processes(processes.accelerator)
        model = toy.Toy(dropout)

        def collate(rows: list[int], seeds: list[str], seen: list[int] = seen) -> dict[str, Any]:
            seen += rows
            return toy.collate(rows, seeds)

        train(
            model,
            collate,
            toy.squared,
            Order(9, accumulation=2, processes=processes.readers),
            out=out,
            optimisation=Optimisation(accumulation=2, **STEPS),
            keeping=Keeping(minutes=minutes, eval_every=3, log_every=1),
            evaluate=lambda model: {"loss": float(model(torch.ones(1, 4)))},
            processes=processes,
        )
    whole = [part.full_tensor() if sharded else part for part in model.head.parameters()]
    return [*torch.cat([part.detach().flatten() for part in whole]).tolist(), len(seen)]


def shard(accelerator: Any) -> None:
    """Let accelerate shard on this CPU, which its configuration allows on accelerators alone."""
    from accelerate import PartialState
    from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin

    PartialState().distributed_type = accelerator.state.distributed_type = DistributedType.FSDP
    accelerator.state.fsdp_plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2, auto_wrap_policy="no_wrap", cpu_ram_efficient_loading=False
    )


def single(toy: SimpleNamespace, out: Path) -> torch.Tensor:
    """Train the same in one process with twice the batch; return the weights."""
    evaluate = {"eval_every": 3, "log_every": 1, "evaluate": lambda model: {"loss": float(model(torch.ones(1, 4)))}}
    model, _ = toy.run(out, rows=9, batch_size=2, accumulation=2, **STEPS, **evaluate)
    return torch.cat([part.detach().flatten() for part in model.head.parameters()])


@pytest.mark.parametrize("sharded", [False, True], ids=["ddp", "fsdp"])
def test_two_processes_do_what_one_does_with_twice_the_batch(
    toy: SimpleNamespace, hardship: ModuleType, tmp_path: Path, sharded: bool
) -> None:
    wanted = single(toy, tmp_path / "one")
    # Interrupted after a step, so that the checkpoint of two is restored too.
    found = hardship.run_pair(together, toy, tmp_path / "two", 0.0, (1e-9, 0.0), sharded)
    for *weights, rows in found:
        assert torch.allclose(torch.tensor(weights), wanted, atol=1e-5)
        # Steps of an epoch have 4, 4 and 1 rows; for the last, the second process computes one for nothing.
        assert rows == 2 + 1 + 2 + 2 + 1 + 2 + 2
    told, apart = toy.metrics(tmp_path / "two"), toy.metrics(tmp_path / "one")
    assert len(told) == len(apart)
    assert all(mine == pytest.approx(theirs, abs=1e-5) for mine, theirs in zip(told, apart, strict=True))


def test_dropout_differs_between_processes_and_survives_an_interruption(
    toy: SimpleNamespace, hardship: ModuleType, tmp_path: Path
) -> None:
    straight, _ = hardship.run_pair(together, toy, tmp_path / "straight", 0.4, (0.0,))
    cut, _ = hardship.run_pair(together, toy, tmp_path / "cut", 0.4, (1e-9, 0.0))
    assert cut[:-1] == straight[:-1]
    plain, _ = hardship.run_pair(together, toy, tmp_path / "plain", 0.0, (0.0,))
    assert plain[:-1] != straight[:-1]
    with pytest.raises(ValueError, match="processes 2 there and 1 here"):
        toy.run(tmp_path / "cut", rows=9, accumulation=2, **STEPS)


def refused() -> str:
    try:
        Processes.started()
    except ValueError as error:
        return str(error)
    return json.dumps(None)


def test_sharding_where_accelerate_would_not_is_refused(hardship: ModuleType) -> None:
    for told in hardship.run_pair(refused, ACCELERATE_USE_FSDP="true", FSDP_VERSION="2"):
        assert told.startswith("accelerate shards (FSDP) on accelerators only, and runs as MULTI_CPU here")
