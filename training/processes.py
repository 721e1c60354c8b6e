"""This process among those that train together. Starting, wrapping and exchanging are accelerate's; torch shards."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Mapping
from typing import Any

import torch


class Processes:
    """One process that trains alone, or its part among several that accelerate or torchrun has started.

    How several share the work (data parallelism, FSDP, context parallelism) is accelerate's configuration.

    Args:
        accelerator: of the package accelerate; None = alone.

    Raises:
        ValueError: a configuration that the loop does not serve.

    >>> alone = Processes()
    >>> alone.leads, alone.readers, alone.total(2.5)
    (True, 1, 2.5)
    """

    def __init__(self, accelerator: Any = None) -> None:
        self.accelerator = accelerator
        self.number = 1 if accelerator is None else int(accelerator.num_processes)
        self.index = 0 if accelerator is None else int(accelerator.process_index)
        self.leads = self.index == 0
        """whether this one writes"""
        parallel = getattr(accelerator, "parallelism_config", None)
        self.sharing = 1 if parallel is None else int(parallel.cp_size)
        """processes in a row that hold parts of the same tokens (context parallelism)"""
        if accelerator is not None:
            _refuse(accelerator, parallel)

    @classmethod
    def started(cls) -> Processes:
        """Return this process as it was started: one of several if the environment says so, else alone.

        Raises:
            ImportError: several, and accelerate (``longscope[train]``) is not installed.
            ValueError: a configuration that the loop does not serve.
        """
        if int(os.environ.get("WORLD_SIZE", "1")) < 2:
            return cls()
        try:
            from accelerate import Accelerator
        except ImportError as error:
            raise ImportError(
                "training in several processes needs accelerate: pip install 'longscope[train]'"
            ) from error
        return cls(Accelerator())

    @property
    def readers(self) -> int:
        """Groups of processes that read different rows."""
        return self.number // self.sharing

    @property
    def reader(self) -> int:
        """This process's group among them."""
        return self.index // self.sharing

    @property
    def place(self) -> str:
        """The kind of device, ``cpu`` or ``cuda``; ``auto`` if alone."""
        return "auto" if self.accelerator is None else str(self.accelerator.device.type)

    def prepare(self, model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> tuple[Any, Any]:
        """Return model and optimizer as the configuration wraps them."""
        if self.accelerator is None:
            return model, optimizer
        wrapped, stepping = self.accelerator.prepare(model, optimizer)
        return wrapped, stepping

    def total(self, value: float) -> float:
        """Return the sum of a number over all processes."""
        if self.number == 1:
            return value
        number = torch.tensor([value], dtype=torch.float64, device=self.accelerator.device)
        return float(self.accelerator.reduce(number, reduction="sum")[0])

    def first(self, value: Any) -> Any:
        """Return what the first process has, on all of them."""
        if self.number == 1:
            return value
        from accelerate.utils import broadcast_object_list

        return broadcast_object_list([value])[0]

    def backward(self, loss: torch.Tensor) -> None:
        """Add the gradient of a loss to the parameters'; it is summed, not averaged, over processes."""
        if self.accelerator is None:
            loss.backward()
        else:
            self.accelerator.backward(loss * self.number)

    def exchanging(self, model: Any, last: bool) -> Any:
        """Return the context of one pass: gradients are exchanged in the last of a step only."""
        return contextlib.nullcontext() if last or self.accelerator is None else self.accelerator.no_sync(model)

    def splitting(self, batch: Mapping[str, Any]) -> Any:
        """Return the context in which a batch's [rows, tokens] tensors are this process's part of the tokens."""
        if self.sharing == 1:
            return contextlib.nullcontext()
        parts = [value for value in batch.values() if isinstance(value, torch.Tensor) and value.ndim == 2]
        return self.accelerator.maybe_context_parallel(
            buffers=parts, buffer_seq_dims=[1] * len(parts), no_restore_buffers=set(parts)
        )

    def settle(self, model: torch.nn.Module) -> None:
        """Let FSDP hold nothing but its shards: a forward pass alone leaves the outermost parameters whole."""
        if self.number > 1:
            from torch.distributed.fsdp import FSDPModule

            for part in model.modules():
                if isinstance(part, FSDPModule):
                    part.reshard()

    def wait(self) -> None:
        """Wait for the others."""
        if self.number > 1:
            self.accelerator.wait_for_everyone()

    def in_turn(self) -> Any:
        """Return a context that the first process passes before the others enter it."""
        return contextlib.nullcontext() if self.number == 1 else self.accelerator.main_process_first()


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """Return a tensor on the CPU; one that FSDP shards is put together, in which all processes must take part."""
    full = tensor.detach()
    if hasattr(full, "full_tensor"):
        full = full.full_tensor()
    return full.cpu().contiguous()


def shard_like(tensor: torch.Tensor, model: torch.Tensor) -> torch.Tensor:
    """Return a whole tensor sharded as ``model`` is; as it stands if that is whole too."""
    mesh = getattr(model, "device_mesh", None)
    if mesh is None:
        return tensor
    from torch.distributed.tensor import distribute_tensor

    placements: Any = getattr(model, "placements", None)
    return distribute_tensor(tensor.to(mesh.device_type), mesh, placements)


def _refuse(accelerator: Any, parallel: Any) -> None:
    """Refuse what would train wrongly or fail in the middle."""
    kind = accelerator.distributed_type.name
    if kind in ("DEEPSPEED", "MEGATRON_LM", "XLA"):
        raise ValueError(f"accelerate is configured for {kind}: choose data parallelism or FSDP (fsdp_version: 2)")
    if kind != "FSDP" and os.environ.get("ACCELERATE_USE_FSDP", "").lower() == "true":
        # It would go on with data parallelism, each process holding everything.
        raise ValueError(f"accelerate shards (FSDP) on accelerators only, and runs as {kind} here: switch use_fsdp off")
    if kind == "FSDP" and not accelerator.is_fsdp2:
        raise ValueError("accelerate is configured for FSDP 1: set fsdp_version: 2")
    if accelerator.mixed_precision not in ("no", "bf16"):
        raise ValueError(f"mixed_precision must be no or bf16, got {accelerator.mixed_precision!r}")
    for name in ("tp_size", "sp_size"):
        if parallel is not None and getattr(parallel, name) > 1:
            raise ValueError(f"{name} must be 1: to share long sequences among GPUs set parallelism_config_cp_size")
