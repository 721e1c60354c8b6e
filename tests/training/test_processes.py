"""One process among several: which rows it reads, what is refused."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from training import Processes
from training.processes import shard_like, whole


def accelerator(**changes: Any) -> Any:
    """What the loop reads of accelerate's object, which needs a process group to exist."""
    parallel = {"cp_size": 1, "tp_size": 1, "sp_size": 1, **changes.pop("parallel", {})}
    facts = {"num_processes": 8, "process_index": 5, "mixed_precision": "no", "is_fsdp2": True}
    kind = SimpleNamespace(name=changes.pop("kind", "FSDP"))
    return SimpleNamespace(
        **{**facts, **changes}, distributed_type=kind, parallelism_config=SimpleNamespace(**parallel)
    )


def test_alone_everything_is_one_s_own() -> None:
    alone = Processes.started()
    assert (alone.number, alone.index, alone.leads, alone.readers, alone.reader, alone.place) == (
        1,
        0,
        True,
        1,
        0,
        "auto",
    )
    assert (alone.total(1.5), alone.first({"a": 1})) == (1.5, {"a": 1})
    model, optimizer = torch.nn.Linear(1, 1), object()
    assert alone.prepare(model, optimizer) == (model, optimizer)
    with alone.in_turn(), alone.exchanging(model, False), alone.splitting({}):
        alone.wait()


def test_processes_that_share_a_text_read_the_same_rows() -> None:
    apart = Processes(accelerator())
    assert (apart.readers, apart.reader, apart.leads) == (8, 5, False)
    sharing = Processes(accelerator(parallel={"cp_size": 4}))
    assert (sharing.readers, sharing.reader, sharing.sharing) == (2, 1, 4)


def test_a_shared_batch_is_split_along_its_tokens() -> None:
    asked = {}
    other = accelerator(parallel={"cp_size": 4}, maybe_context_parallel=lambda **given: asked.update(given))
    batch = {"input_ids": torch.zeros(1, 8), "targets": torch.ones(1, 8), "weight": 3}
    Processes(other).splitting(batch)
    assert [tensor.data_ptr() for tensor in asked["buffers"]] == [
        batch["input_ids"].data_ptr(),
        batch["targets"].data_ptr(),
    ]
    assert asked["buffer_seq_dims"] == [1, 1]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kind": "DEEPSPEED"}, "configured for DEEPSPEED: choose data parallelism or FSDP"),
        ({"is_fsdp2": False}, "FSDP 1: set fsdp_version: 2"),
        ({"mixed_precision": "fp16"}, "mixed_precision must be no or bf16, got 'fp16'"),
        ({"parallel": {"tp_size": 2}}, "tp_size must be 1"),
        ({"parallel": {"sp_size": 2}}, "sp_size must be 1: .* set parallelism_config_cp_size"),
    ],
)
def test_a_configuration_that_would_train_wrongly_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Processes(accelerator(**changes))


def test_tensors_that_nobody_shards_stay_as_they_are() -> None:
    tensor = torch.randn(3, 2, requires_grad=True)
    assert torch.equal(whole(tensor), tensor.detach())
    assert shard_like(tensor, tensor) is tensor
