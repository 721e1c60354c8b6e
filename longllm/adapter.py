"""Adapter folders in PEFT layout: read, checked against the model they are put on, attached or merged."""

from __future__ import annotations

import json
import os
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import catalog
from longllm import shipped
from longllm.context import FILE as CONTEXT
from longllm.context import Context

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
_INSTALL = "adapters need peft: pip install 'longscope[train]'"


@dataclass(frozen=True)
class Adapter:
    """An adapter folder whose configuration has been read, its weights not yet."""

    name: str
    folder: Path
    base: str
    """the model it was trained on: a folder, a catalog name or a hub repository; empty if the files do not say"""
    context: Context | None
    """the context it was trained for; None if the folder has no context.json, as in adapters made elsewhere"""
    rank: int
    alpha: float
    targets: tuple[str, ...]
    whole: tuple[str, ...]
    """modules that it replaces as a whole, such as embed_tokens"""

    def record(self) -> dict[str, Any]:
        """Return the facts for reports."""
        return {
            "name": self.name,
            "base": self.base,
            "rank": self.rank,
            "alpha": self.alpha,
            "targets": list(self.targets),
            "whole_modules": list(self.whole),
            "context": "yes" if self.context is not None else f"no {CONTEXT}",
        }


def find(model: str | os.PathLike[str]) -> Path:
    """Return the folder of a model or an adapter: a shipped adapter's name, a catalog name, or a path.

    Raises:
        ValueError, OSError: as ``catalog.path``; the names of shipped adapters are listed too.
    """
    name = os.fspath(model)
    if name in shipped.names():
        return shipped.folder(name)
    try:
        return catalog.path(name)
    except ValueError as error:
        known = ", ".join(shipped.names()) or "none yet"
        raise ValueError(f"{error}; shipped adapters: {known}") from error


def is_adapter(folder: Path) -> bool:
    """Say whether a folder holds an adapter rather than a whole model."""
    return (folder / CONFIG).is_file()


def read_adapter(model: str | os.PathLike[str]) -> Adapter:
    """Read and check an adapter's configuration: LoRA in PEFT layout, with ``context.json`` if it was trained here.

    Raises:
        ValueError: not an adapter, not LoRA, no weights, or a damaged or unknown configuration.
        OSError: no such folder, or it cannot be read.
    """
    name, folder = os.fspath(model), find(model)
    file = folder / CONFIG
    if not file.is_file():
        raise ValueError(f"{name!r} is not an adapter: {folder} has no {CONFIG}")
    try:
        settings = json.loads(file.read_text(encoding="utf-8"))
        kind, rank, alpha = settings["peft_type"], int(settings["r"]), float(settings["lora_alpha"])
        targets = settings["target_modules"]
        whole = tuple(settings.get("modules_to_save") or ())
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{file} is no configuration of a LoRA adapter ({type(error).__name__}: {error})") from error
    if kind != "LORA":
        raise ValueError(f"{name!r} is a PEFT adapter of type {kind}; only LORA is supported")
    if not (folder / WEIGHTS).is_file():
        raise ValueError(f"{name!r} has no weights: {folder} holds no {WEIGHTS}")
    context = Context.read(folder)
    base = (context.base if context is not None else "") or str(settings.get("base_model_name_or_path") or "")
    named = (targets,) if isinstance(targets, str) else tuple(sorted(targets or ()))
    return Adapter(name, folder, base, context, rank, alpha, named, whole)


def attach(network: Any, adapter: Adapter, *, merge: bool) -> Any:
    """Put an adapter on a model and return the model, a stock class still.

    Merged, its weights are ordinary ones again; otherwise every adapted layer computes base and adapter apart, in
    the adapter's own precision.

    Raises:
        ValueError: the adapter does not fit: it is for a model of other layers or shapes.
        OSError: its weights are damaged.
        ImportError: peft is not installed.
    """
    try:
        import peft
    except ImportError as error:
        raise ImportError(_INSTALL) from error
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        tensors = load_file(adapter.folder / WEIGHTS)
    except SafetensorError as error:
        raise OSError(f"the weights of {adapter.name!r} in {adapter.folder} are damaged ({error})") from error
    settings = peft.PeftConfig.from_pretrained(str(adapter.folder))
    settings.inference_mode = True
    with warnings.catch_warnings():
        # About tied embeddings: they are untied where the adapter has only one of the two (see below).
        warnings.simplefilter("ignore")
        try:
            tuned: Any = peft.get_peft_model(network, settings)
        except ValueError as error:
            raise ValueError(f"{_misfit(adapter, network)}: {error}") from error
        _fit(tuned, adapter, tensors)
        peft.set_peft_model_state_dict(tuned, tensors)
        # Merging unties a model whose input embedding alone was trained: saved as tied, it would lose its output.
        plain = tuned.merge_and_unload() if merge else tuned.get_base_model()
    if merge:
        # Parameters alone: ``plain.to(dtype)`` would round the rotary speeds too.
        for weight in plain.parameters():
            weight.data = weight.data.to(network.dtype)
    return plain


def other_base(adapter: Adapter, base: str) -> str | None:
    """Say that an adapter is put on a model of another name than it was trained on, or return None.

    Only names are compared: the same model may be a folder here and a catalog name there.
    """
    trained, given = (Path(name).name.lower() for name in (adapter.base, base))
    if not trained or trained == given:
        return None
    return f"the adapter {adapter.name!r} was trained on {adapter.base}, and is put on {base}: is that the same model?"


def no_context(adapter: Adapter, config: Any) -> str:
    """Say that an adapter names no context, so that the base model's own is in force."""
    config = config.get_text_config(decoder=True)
    return (
        f"the adapter {adapter.name!r} has no {CONTEXT}: RoPE stays as in the base model ({config.rope_parameters}, "
        f"{config.max_position_embeddings:,} tokens). If it was trained with another theta, its answers will be "
        "poor: give that context (longllm.load(..., context=...))"
    )


def _fit(tuned: Any, adapter: Adapter, tensors: dict[str, Any]) -> None:
    """Compare the adapter's tensors with the places made for them; refuse by name what does not fit."""
    import peft

    wanted = peft.get_peft_model_state_dict(tuned, save_embedding_layers=False)
    reasons = {
        "lacks": sorted(wanted.keys() - tensors.keys()),
        "has no place for": sorted(tensors.keys() - wanted.keys()),
        "has other shapes for": sorted(
            name for name in wanted.keys() & tensors.keys() if wanted[name].shape != tensors[name].shape
        ),
    }
    for reason, found in reasons.items():
        if not found:
            continue
        first = found[0].removeprefix("base_model.model.")
        detail = ""
        if reason.endswith("shapes for"):
            shapes = [list(place[found[0]].shape) for place in (tensors, wanted)]
            detail = f" ({shapes[0]} in the adapter, {shapes[1]} in the model)"
        who = "the model" if reason == "has no place for" else "the adapter"
        raise ValueError(f"{_misfit(adapter, tuned)}: {who} {reason} {len(found)} tensors, such as {first}{detail}")


def _misfit(adapter: Adapter, network: Any) -> str:
    """Return how the refusals of an adapter that does not fit begin."""
    on = getattr(network.config, "_name_or_path", "") or type(network).__name__
    return f"the adapter {adapter.name!r}, trained on {adapter.base or 'an unnamed model'}, does not fit {on}"
