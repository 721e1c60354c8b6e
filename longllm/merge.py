"""Put an adapter into the weights of its base model and save the whole as an ordinary model folder."""

from __future__ import annotations

import errno
import math
import os
import shutil
import tempfile
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import torch
import transformers
from safetensors import SafetensorError, safe_open

from catalog.space import room
from longllm.adapter import WEIGHTS
from longllm.context import Context
from longllm.loading import assemble, parts, quiet, stop_ids, tokenizer_of, trained_length

MergeDType = Literal["base", "bf16", "fp32", "fp16"]
_DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32, "fp16": torch.float16}
_STORED = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}
#: room for configuration and tokeniser beside the weights
_BESIDE = 64 << 20


@dataclass(frozen=True)
class Merged:
    """A model folder that ``merge`` wrote."""

    folder: Path
    base: str
    adapter: str
    dtype: str
    parameters: int
    bytes: int
    files: tuple[str, ...]
    rope_parameters: dict[str, Any]
    max_position_embeddings: int
    trained_length: int
    seconds: float


def merge(
    adapter: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    base: str | os.PathLike[str] = "",
    context: Context | None = None,
    dtype: MergeDType = "base",
    max_shard_size: str = "4GB",
    force: bool = False,
) -> Merged:
    """Merge an adapter into its base model and save a folder that any library loads, its context included.

    The base is loaded unquantised, on the CPU. The folder appears under its name only when it is complete and its
    configuration has been read back; until then everything is in a folder beside it, which an error removes.

    Args:
        adapter: an adapter's folder, catalog name or shipped name.
        out: the folder to write.
        base: the model to merge into, if not the one that the adapter names.
        context: RoPE settings and length, for an adapter that does not bring them.
        dtype: of the weights; base = as the base model is stored.
        max_shard_size: weights are split into files of at most this size.
        force: replace a folder that is there and not empty.

    Raises:
        ValueError: as ``load``; the adapter does not fit, or ``out`` exists, is not empty and ``force`` is off.
        OSError: not enough disk space, or files that cannot be read or written.
        ImportError: peft is not installed.
    """
    begun = time.perf_counter()
    if dtype not in get_args(MergeDType):
        raise ValueError(f"dtype must be one of {', '.join(get_args(MergeDType))}, got {dtype!r}")
    target = Path(out).expanduser().absolute()
    if target.exists() and not target.is_dir():
        raise ValueError(f"{out} is a file; name a folder to write the model into")
    if target.is_dir() and any(target.iterdir()) and not force:
        raise ValueError(f"the folder {out} is not empty; name another one, or say force to replace it")
    name, folder, tuning = parts(base or adapter, adapter if os.fspath(base) else "")
    if tuning is None:
        raise ValueError(f"{os.fspath(adapter)!r} is a whole model, not an adapter: there is nothing to merge")
    if target.resolve() in (folder.resolve(), tuning.folder.resolve()):
        raise ValueError(f"{out} holds the base model or the adapter: merge into another folder")
    tokenizer = tokenizer_of(folder, tuning)
    values, stored = _stored(folder)
    chosen = _DTYPES.get(dtype, stored)
    size = values * chosen.itemsize + (tuning.folder / WEIGHTS).stat().st_size + _BESIDE
    target.parent.mkdir(parents=True, exist_ok=True)
    with room(target.parent, size, f"the merged model {target.name}", "write it to a folder on another disk"):
        network = assemble(name, folder, tuning, context, chosen, torch.device("cpu"), "flashcore")
        stops = sorted(stop_ids(network, tokenizer))
        if not stops:
            raise ValueError(f"{name!r} names no end-of-answer token (eos_token_id): merged, it would never stop")
        # Engines read their stops here alone; Llama-3's own list lacks the end of a turn in some copies.
        network.generation_config.eos_token_id = stops if len(stops) > 1 else stops[0]
        _write(network, tokenizer, target, max_shard_size)
    text = network.config.get_text_config(decoder=True)
    return Merged(
        folder=target,
        base=name,
        adapter=tuning.name,
        dtype=str(chosen).removeprefix("torch."),
        parameters=sum(weight.numel() for weight in network.parameters()),
        bytes=sum(file.stat().st_size for file in target.iterdir()),
        files=tuple(sorted(file.name for file in target.iterdir())),
        rope_parameters=dict(text.rope_parameters),
        max_position_embeddings=text.max_position_embeddings,
        trained_length=trained_length(network.config),
        seconds=time.perf_counter() - begun,
    )


def _stored(folder: Path) -> tuple[int, torch.dtype]:
    """Return how many values a model's weight files hold, and the type most of them have."""
    counts: Counter[torch.dtype] = Counter()
    for file in folder.glob("*.safetensors"):
        with safe_open(file, framework="pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118 (not a mapping)
                place = tensors.get_slice(name)
                counts[_STORED.get(place.get_dtype(), torch.float32)] += math.prod(place.get_shape())
    for file in folder.glob("*.bin"):
        counts[torch.float32] += file.stat().st_size // torch.float32.itemsize
    return counts.total(), counts.most_common(1)[0][0] if counts else torch.float32


def _write(network: Any, tokenizer: Any, target: Path, max_shard_size: str) -> None:
    """Save everything beside ``target``, check it, and put it in its place."""
    staging = Path(tempfile.mkdtemp(prefix=f".{target.name}.new-", dir=target.parent))
    try:
        with quiet():
            network.save_pretrained(staging, max_shard_size=max_shard_size)
        tokenizer.save_pretrained(staging)
        _read_back(network.config, staging)
        staging.chmod(0o755)
        _swap(staging, target)
    except SafetensorError as error:
        # Its messages are texts of the operating system; a full disk is explained further up.
        code = errno.ENOSPC if "No space left" in str(error) else errno.EIO
        raise OSError(code, f"the merged weights cannot be written: {error}") from error
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _swap(ready: Path, target: Path) -> None:
    """Put a finished folder in the place of ``target``; if that fails, the old one stays."""
    old = target.with_name(f".{target.name}.old-{os.getpid()}")
    there = target.exists()
    if there:
        target.rename(old)
    try:
        ready.rename(target)
    except OSError:
        if there:
            old.rename(target)
        raise
    shutil.rmtree(old, ignore_errors=True)


def _read_back(config: Any, folder: Path) -> None:
    """Compare the RoPE settings and the length in a saved configuration with those in force."""
    saved = transformers.AutoConfig.from_pretrained(folder).get_text_config(decoder=True)
    own = config.get_text_config(decoder=True)
    for field in ("rope_parameters", "max_position_embeddings"):
        if getattr(saved, field) != getattr(own, field):
            raise ValueError(f"{field} was lost in saving: {getattr(own, field)} became {getattr(saved, field)}")
