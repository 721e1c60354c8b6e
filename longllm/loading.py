"""Load a chat model and refuse at once what would fail or go wrong silently later."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import torch
import transformers
from safetensors import SafetensorError
from transformers.utils import logging as transformers_logging

import catalog
from longllm.config import Attention, Device, DType
from longllm.prompts import chat_frame

_DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32, "fp16": torch.float16}
# With these kinds of RoPE scaling the released weights were trained at the full max_position_embeddings;
# with the others the scaling was put on afterwards.
_TRAINED_WITH_SCALING = {"default", "llama3", "longrope"}


@dataclass(frozen=True)
class LoadedModel:
    """A model ready to generate, with the facts that callers report or check."""

    model: transformers.PreTrainedModel
    tokenizer: transformers.PreTrainedTokenizerBase
    name: str
    dtype: torch.dtype
    attention: str
    trained_length: int
    """the longest input, in tokens, that the weights were trained on, as far as the configuration tells"""
    stop_ids: frozenset[int]
    """every token that ends an answer"""

    @property
    def device(self) -> torch.device:
        """Return where the weights are."""
        return self.model.device


def load(
    model: str | os.PathLike[str],
    *,
    dtype: DType = "auto",
    attention: Attention = "flashcore",
    device: Device = "auto",
) -> LoadedModel:
    """Load a chat model from the catalog or from a local folder in Hugging Face layout.

    ``dtype="auto"`` is bf16 where the hardware has it, else fp32; fp16 on a CPU means the same as auto.

    Raises:
        ValueError: unknown name or option, no weights, weights that do not fill the model, a tokeniser that
            does not fit, no chat template, or no end-of-answer token.
        OSError: the files cannot be fetched or read.
    """
    for option, value, allowed in (("dtype", dtype, DType), ("attention", attention, Attention)):
        if value not in get_args(allowed):
            raise ValueError(f"{option} must be one of {', '.join(get_args(allowed))}, got {value!r}")
    name = os.fspath(model)
    folder = catalog.path(name)
    if not (folder / "config.json").is_file():
        raise ValueError(f"{name!r} is not a language model: {folder} has no config.json")
    place = _place(device)
    chosen = _dtype(dtype, place)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    chat_frame(tokenizer)
    # Any: the types that transformers declares for these methods do not describe them.
    network: Any = _network(name, folder, chosen, attention)
    network.to(device=place).eval()
    rows = network.get_input_embeddings().weight.shape[0]
    if len(tokenizer) > rows:
        raise ValueError(
            f"{name!r}: the tokeniser has {len(tokenizer):,} tokens but the model only {rows:,}: "
            "the two do not belong together"
        )
    stops = stop_ids(network, tokenizer)
    if not stops:
        raise ValueError(f"{name!r} names no end-of-answer token (eos_token_id): it would never stop")
    length = trained_length(network.config)
    with torch.inference_mode():
        # What is made on first use, such as a compiled kernel, must not count as reading time later.
        network(input_ids=torch.zeros(1, 2, dtype=torch.long, device=place))
    return LoadedModel(network, tokenizer, name, chosen, attention, length, stops)


def trained_length(config: Any) -> int:
    """Return the longest input the weights of a model with this configuration were trained on.

    A context length that RoPE scaling (linear, dynamic, YaRN) claims on top of training is not counted.

    >>> import transformers
    >>> trained_length(transformers.LlamaConfig(max_position_embeddings=8192))
    8192
    """
    config = config.get_text_config(decoder=True)
    length = int(config.max_position_embeddings)
    settings = getattr(config, "rope_parameters", None) or {}
    # Models with several kinds of layers (Gemma-3) keep one set of RoPE settings per kind.
    kinds = [value for value in settings.values() if isinstance(value, dict)] or [settings]
    for kind in kinds:
        original = kind.get("original_max_position_embeddings")
        if original and kind.get("rope_type", "default") not in _TRAINED_WITH_SCALING:
            length = min(length, int(original))
    return length


def stop_ids(model: Any, tokenizer: Any) -> frozenset[int]:
    """Return every token that ends an answer: those the model and tokeniser name, and the template's own.

    Llama-3's configuration names the end of the text, its tokeniser the end of the turn; generation that
    knows only the first runs on and on.
    """
    found: set[int] = set()
    for named in (model.generation_config.eos_token_id, model.config.eos_token_id, tokenizer.eos_token_id):
        if named is not None:
            found.update([named] if isinstance(named, int) else named)
    _, tail = chat_frame(tokenizer)
    # The user's turn ends as the assistant's does; the ids of ordinary text can never be a stop.
    special = set(tokenizer.all_special_ids) | set(tokenizer.added_tokens_decoder)
    if found and tail and tail[0] in special:
        found.add(tail[0])
    return frozenset(found)


def _place(device: Device) -> torch.device:
    """Return the device that ``auto``, ``cpu`` or ``cuda`` means here."""
    if device not in get_args(Device):
        raise ValueError(f"device must be one of {', '.join(get_args(Device))}, got {device!r}")
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("device cuda was asked for, but torch sees no CUDA device here; use device auto or cpu")
    return torch.device("cuda" if device != "cpu" and torch.cuda.is_available() else "cpu")


def _dtype(dtype: DType, place: torch.device) -> torch.dtype:
    """Return the dtype that a choice means on ``place``."""
    requested = _DTYPES.get(dtype)
    if place.type == "cpu":
        from flashcore import cpu_dtype

        return cpu_dtype(requested)
    return requested or (torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float16)


def _network(name: str, folder: Path, dtype: torch.dtype, attention: Attention) -> transformers.PreTrainedModel:
    """Load the weights; refuse missing files and weights that the files leave out."""
    if attention == "flashcore":
        from flashcore import hf

        hf.register()
    if not any(folder.glob("*.safetensors")) and not any(folder.glob("*.bin")):
        raise ValueError(f"{name!r} has no weights: {folder} holds no .safetensors file")
    build: Any = transformers.AutoModelForCausalLM.from_pretrained
    options = {"attn_implementation": attention, "output_loading_info": True, "ignore_mismatched_sizes": True}
    try:
        with _quiet():
            network, report = build(folder, dtype=dtype, **options)
    except SafetensorError as error:
        raise OSError(f"the weights of {name!r} in {folder} are damaged ({error}); fetch them again") from error
    # transformers would fill such weights with random numbers and go on.
    for problem in ("missing", "mismatched"):
        if unfilled := sorted(map(str, report[f"{problem}_keys"])):
            raise ValueError(
                f"the weights of {name!r} do not fill the model its config.json describes: "
                f"{len(unfilled)} {problem}, such as {unfilled[0]}"
            )
    return network


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep transformers' one-second progress bar and its report of problems off the terminal: ours is one line."""
    shown, verbosity = transformers_logging.is_progress_bar_enabled(), transformers_logging.get_verbosity()
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        if shown:
            transformers_logging.enable_progress_bar()
