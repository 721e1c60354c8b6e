"""Compressed documents on disk: read once, asked many times; a file fits only the model that made it."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from beacon.budget import Budget
from beacon.methods import method as method_by_name
from beacon.request import RequestCache
from longllm import LoadedModel

_FORMAT = "longscope compressed cache 1"
#: values of each weight that go into a model's fingerprint
_SAMPLE = 64


@dataclass(frozen=True)
class SavedCache:
    """A cache read from a file, with what it belongs to."""

    ids: tuple[int, ...]
    """the text, as token ids; the cache may have seen only its beginning if reading was interrupted"""
    cache: RequestCache
    notes: dict[str, Any]
    """what the writer noted: document, questions it was read for"""

    @property
    def complete(self) -> bool:
        """Say whether the whole text has been read."""
        return self.cache.seen == [len(self.ids)]


def fingerprint(model: Any) -> str:
    """Return a short name of a model's weights and shape: equal for equal models, whatever they are called.

    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> model = LlamaForCausalLM(LlamaConfig(vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=1,
    ...                                      num_attention_heads=2))
    >>> before = fingerprint(model)
    >>> _ = torch.nn.init.ones_(model.lm_head.weight)
    >>> len(before), before == fingerprint(model)
    (16, False)
    """
    config = model.config.get_text_config(decoder=True)
    return weights_name(model, f"{config.model_type} {getattr(config, 'rope_parameters', None)}")


def weights_name(module: torch.nn.Module, label: str) -> str:
    """Return a hash of a label and of samples of every parameter."""
    digest = hashlib.sha256(label.encode())
    for name, weight in sorted(module.named_parameters()):
        values = weight.detach().flatten()
        sample = values[:: max(1, len(values) // _SAMPLE)][:_SAMPLE].double().cpu()
        digest.update(f"{name} {list(weight.shape)}".encode() + sample.numpy().tobytes())
    return digest.hexdigest()[:16]


def save_cache(
    path: str | os.PathLike[str], loaded: LoadedModel, ids: tuple[int, ...], cache: RequestCache, **notes: Any
) -> None:
    """Write a cache of one row with the text it stands for; an old file is replaced only by a complete new one.

    Args:
        path: the file, in safetensors format.
        loaded: the model that made it.
        ids: the whole text, the unread rest included.
        cache: one row.
        notes: what a reader should know, as JSON values.

    Raises:
        ValueError: a cache that is empty or has several rows.
        OSError: the file cannot be written.
    """
    if len(cache.seen) != 1:
        raise ValueError(f"a cache to be saved has one row and has read something, this one has {len(cache.seen)} rows")
    held, own = cache.pack()
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in held.items()}
    tensors["ids"] = torch.tensor(ids, dtype=torch.int32)
    facts = {
        "model": {"name": loaded.name, "fingerprint": fingerprint(loaded.model), "dtype": str(loaded.dtype)},
        "method": {"name": cache.method.name, **asdict(cache.method)} if cache.method else None,
        "budget": asdict(cache.budget),
        "positions": cache.positions,
        "notes": notes,
        **own,
    }
    target = Path(path).expanduser()
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f".{target.name}.{os.getpid()}.partial")
    try:
        save_file(tensors, partial, metadata={"format": _FORMAT, "facts": json.dumps(facts)})
        with partial.open("rb") as file:
            os.fsync(file.fileno())
        partial.replace(target)
    except SafetensorError as error:
        raise OSError(f"{target} cannot be written: {error}") from error
    finally:
        with contextlib.suppress(FileNotFoundError):
            partial.unlink()


def load_cache(path: str | os.PathLike[str], loaded: LoadedModel) -> SavedCache:
    """Read a cache that ``save_cache`` wrote.

    Raises:
        ValueError: not such a file, a damaged one, or one made by another model or in another dtype.
        OSError: the file cannot be read.
    """
    source = Path(path).expanduser()
    if not source.is_file():
        raise FileNotFoundError(f"there is no cache file {source}; --save-cache writes one")
    try:
        with safe_open(source, framework="pt") as file:
            header = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(f"{source} is damaged or no cache file ({error}); read the document again") from error
    if header.get("format") != _FORMAT:
        raise ValueError(f"{source} is no {_FORMAT!r} file but {header.get('format', 'some other safetensors file')!r}")
    facts = json.loads(header["facts"])
    made_by, own = facts["model"], fingerprint(loaded.model)
    if made_by["fingerprint"] != own:
        raise ValueError(
            f"{source} was made by {made_by['name']} (fingerprint {made_by['fingerprint']}), not by {loaded.name} "
            f"({own}): a cache fits only the model that made it; choose --model {made_by['name']} or read again"
        )
    if made_by["dtype"] != str(loaded.dtype):
        made, now = (name.removeprefix("torch.") for name in (made_by["dtype"], str(loaded.dtype)))
        raise ValueError(f"{source} was made in {made}, the model computes in {now}: choose the same --dtype")
    try:
        return SavedCache(tuple(tensors["ids"].tolist()), _rebuilt(facts, tensors, loaded), facts["notes"])
    except KeyError as missing:
        raise ValueError(f"{source} is damaged or no cache file (it lacks {missing}); read again") from missing


def _rebuilt(facts: dict[str, Any], tensors: dict[str, torch.Tensor], loaded: LoadedModel) -> RequestCache:
    """Return the cache that a file describes."""
    method, budget = facts["method"], Budget(**facts["budget"])
    cache: RequestCache
    if method is None:
        from beacon.beacon_cache import BeaconCache
        from beacon.config import BeaconConfig, MemoryOptions

        cache = BeaconCache(loaded.model, BeaconConfig.from_hf(facts["config"]), MemoryOptions(**facts["options"]))
    else:
        made_by = method_by_name(method.pop("name"), **method)
        expected = facts["books"]["expected"]
        cache = made_by.new_cache(loaded.model, budget, positions=facts["positions"], expected=expected)
    ids = tensors.pop("ids")
    cache.unpack({name: tensor.to(loaded.device) for name, tensor in tensors.items()}, facts)
    tensors["ids"] = ids
    return cache
