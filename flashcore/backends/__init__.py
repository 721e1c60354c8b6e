"""The attention backends: one file each, one signature (``reference.attend``), loaded when first used."""

from __future__ import annotations

import importlib
from collections.abc import Callable

import torch

from ..spec import AttentionSpec

Backend = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, AttentionSpec], torch.Tensor]

#: backend name -> what it is
NAMES = {
    "reference": "fp32 by the definition, n x m memory: the oracle",
    "native": "compiled CPU kernel, built on first use with the C compiler",
    "sdpa": "torch's scaled_dot_product_attention, tiled for what it lacks",
    "flash": "flash-attn >= 2.6 (CUDA)",
    "flex": "torch FlexAttention (CUDA)",
}


def load(name: str) -> Backend:
    """Return the attention function of backend ``name``.

    Raises:
        ValueError: for a name that is not in the table.
    """
    if name not in NAMES:
        raise ValueError(f"unknown attention backend {name!r}; choose auto or one of {', '.join(NAMES)}")
    attend: Backend = importlib.import_module(f"{__name__}.{name}").attend
    return attend


def available() -> dict[str, str]:
    """Say for each backend whether it works on this machine: "ok", or the reason why not."""
    report = dict.fromkeys(NAMES, "ok")
    from . import flash, native

    report["native"] = native.available() or "ok"
    if not torch.cuda.is_available():
        report["flash"] = report["flex"] = "no CUDA device (flex runs unfused on CPU, for tests)"
        return report
    try:
        flash.load()
    except ImportError as error:
        report["flash"] = str(error)
    return report
