"""Load a chat model, with an adapter or not, and refuse at once what would fail or go wrong silently later."""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, get_args

import torch
import transformers
from safetensors import SafetensorError
from transformers.utils import logging as transformers_logging

from longllm.adapter import Adapter, attach, find, is_adapter, no_context, other_base, read_adapter
from longllm.config import Attention, Device, DType
from longllm.context import LOG_ORIGIN, Context, parse_rope
from longllm.prompts import chat_frame
from training.adapters import nf4

log = logging.getLogger(__name__)

_DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32, "fp16": torch.float16}
# With these kinds of RoPE scaling the released weights were trained at the full max_position_embeddings;
# with the others the scaling was put on afterwards.
_TRAINED_WITH_SCALING = {"default", "llama3", "longrope"}
#: our own entry in a configuration, kept through saving and loading
NOTED = "trained_length"


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
    adapter: Adapter | None = None
    """the adapter that is in the weights or beside them"""
    quantised: bool = False
    """whether the weights are held in 4 bits"""

    def __iter__(self) -> Iterator[Any]:
        """Yield the model and the tokeniser, for ``model, tokenizer = longllm.load(...)``."""
        yield self.model
        yield self.tokenizer

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
    context: Context | None = None,
    adapter: str | os.PathLike[str] = "",
    quantised: bool = False,
    merge: bool | None = None,
) -> LoadedModel:
    """Load a chat model: from the catalog, from a folder in Hugging Face layout, or an adapter with its base model.

    An adapter (a folder in PEFT layout, or the name of a shipped one) brings the context it was trained for, and the
    RoPE frequencies really in force are compared with it. ``dtype="auto"`` is bf16 where the hardware has it, else
    fp32; fp16 on a CPU means the same as auto.

    Args:
        model: the model, or an adapter that names its base model.
        dtype: of the weights and of what is computed with them.
        attention: flashcore, or transformers' own sdpa or eager.
        device: cpu, cuda, or the GPU if there is one.
        context: RoPE settings and length to use instead of the model's (or the adapter's) own. Without an adapter
            nothing was trained for them, so they leave ``trained_length`` as it is.
        adapter: an adapter to put on ``model``, for one whose base has another name or place here.
        quantised: hold the weights in 4 bits (NF4, double quantisation); computing stays in ``dtype``.
        merge: add the adapter to the weights, which costs nothing when generating; the default is to do so unless they
            are quantised, where rounding would lose it.

    Raises:
        ValueError: unknown name or option, no weights, weights that do not fill the model, a tokeniser that
            does not fit, no chat template, no end-of-answer token, an adapter that does not fit, or merging into
            quantised weights.
        OSError: the files cannot be fetched or read.
        ImportError: peft or bitsandbytes is needed and not installed.
    """
    for option, value, allowed in (("dtype", dtype, DType), ("attention", attention, Attention)):
        if value not in get_args(allowed):
            raise ValueError(f"{option} must be one of {', '.join(get_args(allowed))}, got {value!r}")
    place = _place(device)
    chosen = _dtype(dtype, place)
    if quantised and merge:
        raise ValueError("merging into 4-bit weights would round the adapter away: load with merge off or unquantised")
    name, folder, tuning = parts(model, adapter)
    tokenizer = tokenizer_of(folder, tuning)
    network = assemble(name, folder, tuning, context, chosen, place, attention, quantised, merge is not False)
    rows = network.get_input_embeddings().weight.shape[0]
    if len(tokenizer) > rows:
        raise ValueError(
            f"{name!r}: the tokeniser has {len(tokenizer):,} tokens but the model only {rows:,}: "
            "the two do not belong together"
        )
    stops = stop_ids(network, tokenizer)
    if not stops:
        raise ValueError(f"{name!r} names no end-of-answer token (eos_token_id): it would never stop")
    with torch.inference_mode():
        # What is made on first use, such as a compiled kernel, must not count as reading time later.
        network(input_ids=torch.zeros(1, 2, dtype=torch.long, device=place))
    length = trained_length(network.config)
    title = tuning.name if tuning is not None else name
    return LoadedModel(network, tokenizer, title, chosen, attention, length, stops, tuning, quantised)


def parts(model: str | os.PathLike[str], adapter: str | os.PathLike[str] = "") -> tuple[str, Path, Adapter | None]:
    """Return the name and folder of the base model and the adapter that goes on it, if there is one.

    Raises:
        ValueError: an adapter on an adapter, one that names no base model, or a folder that holds no model.
        OSError: as ``catalog.path``.
    """
    name, folder = os.fspath(model), find(model)
    tuning = read_adapter(adapter) if os.fspath(adapter) else None
    if is_adapter(folder):
        if tuning is not None:
            raise ValueError(f"{name!r} is an adapter itself: give a whole model as the base of {tuning.name!r}")
        tuning = read_adapter(model)
        if not tuning.base:
            raise ValueError(f"the adapter {name!r} names no base model: give the model, and this as its adapter")
        try:
            name, folder = tuning.base, find(tuning.base)
        except (ValueError, OSError) as error:
            kind = OSError if isinstance(error, OSError) else ValueError
            raise kind(
                f"the base model {tuning.base!r} of the adapter {tuning.name!r} is not here ({error}); "
                "give a model and the adapter apart"
            ) from error
    elif tuning is not None and (warning := other_base(tuning, name)):
        log.warning("longscope: %s", warning)
    if not (folder / "config.json").is_file():
        raise ValueError(f"{name!r} is not a language model: {folder} has no config.json")
    return name, folder, tuning


def assemble(
    name: str,
    folder: Path,
    adapter: Adapter | None,
    context: Context | None,
    dtype: torch.dtype,
    place: torch.device,
    attention: Attention,
    quantised: bool = False,
    merge: bool = True,
) -> Any:
    """Build the network: configuration, context, weights, adapter; check the RoPE frequencies in force.

    Raises:
        ValueError, OSError, ImportError: as ``load``.
    """
    config: Any = transformers.AutoConfig.from_pretrained(folder)
    own = adapter.context if adapter is not None else None
    wanted = context or own
    if wanted is not None:
        # What an adapter was trained for counts; one that does not say is believed to be for the given context.
        learnt = own or (replace(wanted, trained=True) if adapter is not None else wanted)
        trained = learnt.max_position_embeddings if learnt.trained else trained_length(config)
        wanted.apply(config)
        setattr(config.get_text_config(decoder=True), NOTED, trained)
    elif adapter is not None:
        log.warning("longscope: %s", no_context(adapter, config))
    if getattr(config.get_text_config(decoder=True), LOG_ORIGIN, 0) and attention != "flashcore":
        raise ValueError(
            f"{name!r} sharpens attention by the number of keys (log_origin of its context), which only flashcore "
            f"does: load it with attention flashcore, got {attention}"
        )
    # Any: the types that transformers declares for these methods do not describe them.
    network: Any = _network(name, folder, config, dtype, place, attention, quantised)
    if not quantised:
        network.to(device=place)
    if adapter is not None:
        network = attach(network, adapter, merge=merge and not quantised)
    if wanted is not None:
        wanted.check(network)
    return network.eval()


def worded_context(
    words: str, length: int, model: str | os.PathLike[str], adapter: str | os.PathLike[str] = ""
) -> Context | None:
    """Return the context that words on a command line mean for a model (see ``parse_rope``), or None for no words.

    Raises:
        ValueError: other words, a length without them, or as ``parts``.
        OSError: as ``parts``.

    >>> worded_context("", 0, "smollm2-135m-instruct") is None
    True
    """
    if not words:
        if length:
            raise ValueError(f"a length ({length}) needs the RoPE settings it is for, such as theta:2e8 or yarn:4")
        return None
    name, folder, _ = parts(model, adapter)
    return parse_rope(words, transformers.AutoConfig.from_pretrained(folder), length, name)


def trained_length(config: Any) -> int:
    """Return the longest input the weights of a model with this configuration were trained on.

    A context length that RoPE scaling (linear, dynamic, YaRN) claims on top of training is not counted. What was
    trained afterwards (an adapter with its context) is noted in the configuration as ``trained_length``.

    >>> import transformers
    >>> trained_length(transformers.LlamaConfig(max_position_embeddings=8192))
    8192
    """
    config = config.get_text_config(decoder=True)
    length = int(config.max_position_embeddings)
    if noted := getattr(config, NOTED, None):
        return min(length, int(noted))
    settings = getattr(config, "rope_parameters", None) or {}
    # Models with several kinds of layers (Gemma-3) keep one set of RoPE settings per kind.
    kinds = [value for value in settings.values() if isinstance(value, dict)] or [settings]
    for kind in kinds:
        original = kind.get("original_max_position_embeddings")
        if original and kind.get("rope_type", "default") not in _TRAINED_WITH_SCALING:
            length = min(length, int(original))
    return length


def claimed_length(config: Any) -> int:
    """Return the longest input that a configuration says the model is for, trained or not.

    >>> import transformers
    >>> config = transformers.LlamaConfig(max_position_embeddings=8192)
    >>> config.rope_parameters = {"rope_type": "dynamic", "rope_theta": 1e5, "factor": 4.0}
    >>> claimed_length(config)
    32768
    """
    config = config.get_text_config(decoder=True)
    settings = getattr(config, "rope_parameters", None) or {}
    # transformers stretches a dynamic base from max_position_embeddings on, so that stays the model's own.
    stretch = settings["factor"] if settings.get("rope_type") == "dynamic" else 1
    return round(config.max_position_embeddings * stretch)


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
    if device == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    # With its number: accelerate refuses 4-bit weights on a device that has none.
    return torch.device("cuda", torch.cuda.current_device())


def _dtype(dtype: DType, place: torch.device) -> torch.dtype:
    """Return the dtype that a choice means on ``place``."""
    requested = _DTYPES.get(dtype)
    if place.type == "cpu":
        from flashcore import cpu_dtype

        return cpu_dtype(requested)
    return requested or (torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float16)


def tokenizer_of(folder: Path, adapter: Adapter | None) -> Any:
    """Load the adapter's tokeniser if it brings one, else the base model's.

    Raises:
        ValueError: it has no chat template.
    """
    own = adapter is not None and (adapter.folder / "tokenizer_config.json").is_file()
    tokenizer = transformers.AutoTokenizer.from_pretrained(adapter.folder if own and adapter else folder)
    chat_frame(tokenizer)
    return tokenizer


def _network(
    name: str, folder: Path, config: Any, dtype: torch.dtype, place: torch.device, attention: Attention, quantised: bool
) -> transformers.PreTrainedModel:
    """Load the weights; refuse missing files and weights that the files leave out."""
    if attention == "flashcore":
        from flashcore import hf

        hf.register()
    if not any(folder.glob("*.safetensors")) and not any(folder.glob("*.bin")):
        raise ValueError(f"{name!r} has no weights: {folder} holds no .safetensors file")
    build: Any = transformers.AutoModelForCausalLM.from_pretrained
    options: dict[str, Any] = {
        "attn_implementation": attention,
        "output_loading_info": True,
        "ignore_mismatched_sizes": True,
    }
    if quantised:
        options |= {"quantization_config": nf4(dtype), "device_map": {"": place}}
    try:
        with quiet():
            network, report = build(folder, config=config, dtype=dtype, **options)
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
def quiet() -> Iterator[None]:
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
