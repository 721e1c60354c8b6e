"""Training that every recipe shares: one loop, checkpoints and resume, run records, row validation, LoRA and NF4."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from training.settings import Keeping, Optimisation

if TYPE_CHECKING:
    from training.adapters import LoraSettings as LoraSettings
    from training.adapters import add_lora as add_lora
    from training.adapters import nf4 as nf4
    from training.card import model_card as model_card
    from training.loop import Outcome as Outcome
    from training.loop import train as train
    from training.order import Order as Order
    from training.processes import Processes as Processes
    from training.record import run_record as run_record
    from training.rows import Field as Field
    from training.rows import read_rows as read_rows

# Public name -> its module. Modules that need torch are imported when a name is first used.
_HOME = {
    "Field": "rows",
    "LoraSettings": "adapters",
    "Order": "order",
    "Outcome": "loop",
    "Processes": "processes",
    "add_lora": "adapters",
    "model_card": "card",
    "nf4": "adapters",
    "read_rows": "rows",
    "run_record": "record",
    "train": "loop",
}
__all__ = ["Keeping", "Optimisation", *_HOME]


def __getattr__(name: str) -> Any:
    """Import the module that holds a public name (PEP 562)."""
    if name not in _HOME:
        raise AttributeError(f"module 'training' has no attribute {name!r}")
    return getattr(importlib.import_module(f"training.{_HOME[name]}"), name)
