"""Low-rank adapters (LoRA, arXiv 2106.09685) and 4-bit bases (QLoRA, arXiv 2305.14314), by peft and bitsandbytes."""

from __future__ import annotations

import functools
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class LoraSettings:
    """Which weights learn, and how.

    Raises:
        ValueError: naming the field, what it got and its range.

    >>> LoraSettings(rank=16).targets
    ('q_proj', 'k_proj', 'v_proj', 'o_proj')
    """

    rank: int = 32
    """rank of the update of a weight matrix; 0 = no adapter, everything learns"""
    alpha: float = 16.0
    """the update is scaled by alpha / rank"""
    dropout: float = 0.0
    """share of an adapter's inputs that are dropped in training"""
    targets: tuple[str, ...] = ("q_proj", "k_proj", "v_proj", "o_proj")
    """names of the linear layers that get one"""
    whole: tuple[str, ...] = ()
    """modules that learn as a whole and are saved with the adapter, such as embed_tokens"""
    tokens: tuple[int, ...] = ()
    """embeddings of single tokens that learn, a cheap alternative to the whole matrix"""
    rslora: bool = False
    """scale by alpha / sqrt(rank) instead (arXiv 2312.03732)"""
    seed: int = 3407
    """of the random half of each adapter"""
    start: str = ""
    """folder of an adapter of the same shape to go on from; empty = a new one, which changes nothing yet"""

    def __post_init__(self) -> None:
        """Refuse values that mean nothing."""
        if self.rank < 0:
            raise ValueError(f"rank must be 0 or more, got {self.rank}")
        if not self.alpha > 0:
            raise ValueError(f"alpha must be a positive number, got {self.alpha}")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout must lie between 0 and 1, got {self.dropout}")
        if self.start and not self.rank:
            raise ValueError(f"start ({self.start}) is an adapter: set rank to its rank, not to 0")
        if self.rank and not self.targets:
            raise ValueError("targets must name at least one layer, got none")
        if self.tokens and "embed_tokens" in self.whole:
            raise ValueError("tokens and whole embed_tokens exclude each other: choose one")


def add_lora(model: Any, settings: LoraSettings, *, checkpointing: bool = False) -> Any:
    """Return the model wrapped by peft: what learns is in fp32, everything else frozen and as it was.

    A module that learns as a whole computes in fp32 too, and hands on the model's dtype. peft's own preparation of
    4-bit models is not used: it turns the whole residual stream into fp32, twice the activations.

    Args:
        model: of transformers.
        settings: rank, targets, whole modules.
        checkpointing: the model recomputes activations the reentrant way, for which its inputs must ask for gradients.

    Raises:
        ImportError: peft (``longscope[train]``) is not installed.
        ValueError: no layer has one of the names, a token is not in the vocabulary, or the adapter to start from is of
            another shape.
        OSError: there is no such adapter.

    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    >>> model = add_lora(LlamaForCausalLM(LlamaConfig(vocab_size=9, **sizes)), LoraSettings(rank=2))
    >>> sum(weight.numel() for weight in model.parameters() if weight.requires_grad)
    128
    """
    try:
        import peft
    except ImportError as error:
        raise ImportError("training an adapter needs peft: pip install 'longscope[train]'") from error
    import torch

    for name in (*settings.targets, *settings.whole):
        if not any(path.split(".")[-1] == name for path, _ in model.named_modules()):
            raise ValueError(f"the model has no layer called {name!r}: its layers are {', '.join(_linear(model))}")
    rows = model.get_input_embeddings().weight.shape[0]
    if outside := [token for token in settings.tokens if not 0 <= token < rows]:
        raise ValueError(f"tokens must lie between 0 and {rows - 1}, got {outside[0]}")
    config = peft.LoraConfig(
        task_type="CAUSAL_LM",
        r=settings.rank,
        lora_alpha=settings.alpha,  # type: ignore[arg-type]
        lora_dropout=settings.dropout,
        target_modules=list(settings.targets),
        modules_to_save=list(settings.whole) or None,
        trainable_token_indices=list(settings.tokens) or None,
        use_rslora=settings.rslora,
    )
    dtype, state = model.dtype, torch.get_rng_state()
    torch.manual_seed(settings.seed)
    with warnings.catch_warnings():
        # peft asks by a deprecated name, and warns that a tied head does not follow an embedding that learns: here the
        # head is frozen, as in the recipe of the 80K model.
        warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*")
        warnings.filterwarnings("ignore", message=".*tie_word_embeddings.*")
        wrapped = peft.get_peft_model(model, config)
    torch.set_rng_state(state)
    if settings.start:
        _go_on_from(wrapped, settings.start)
    if checkpointing:
        wrapped.enable_input_require_grads()
    for weight in wrapped.parameters():
        if weight.requires_grad:
            weight.data = weight.data.float()
    for part in wrapped.modules():
        if isinstance(part, peft.utils.ModulesToSaveWrapper) and dtype != torch.float32:
            part.register_forward_pre_hook(_in_fp32)
            part.register_forward_hook(functools.partial(_handed_on, dtype=dtype))
    return wrapped


def _go_on_from(wrapped: Any, folder: str) -> None:
    """Give a new adapter the weights of one that is there."""
    from peft import set_peft_model_state_dict
    from safetensors.torch import load_file

    file = Path(folder).expanduser() / "adapter_model.safetensors"
    if not file.is_file():
        raise FileNotFoundError(f"there is no adapter to start from: {file}")
    own = {name for name, weight in wrapped.named_parameters() if weight.requires_grad}
    try:
        found: Any = set_peft_model_state_dict(wrapped, load_file(file))
    except RuntimeError as error:
        raise ValueError(f"the adapter in {folder} is of another rank than that which is to learn: {error}") from error
    if other := sorted([*found.unexpected_keys, *(own & set(found.missing_keys))]):
        raise ValueError(f"the adapter in {folder} has other targets than the one that is to learn: {other[0]}")


def _in_fp32(part: Any, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    """Give a module that learns as a whole its inputs in its own precision."""
    return tuple(value.float() if getattr(value, "is_floating_point", bool)() else value for value in inputs)


def _handed_on(part: Any, inputs: Any, output: Any, dtype: Any) -> Any:
    """Hand on what such a module returns in the precision of the model."""
    return output.to(dtype)


def recompute(model: Any, *, offload: bool = False, every: int = 1) -> None:
    """Switch activation checkpointing on: layers keep their inputs only, and are computed again in the backward pass.

    Args:
        model: of transformers, or one that peft has wrapped.
        offload: keep these inputs in the host's memory.
        every: recompute one layer in so many.

    Raises:
        ValueError: the model does not support it, or this transformers or machine has no such option.
    """
    import torch

    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    if offload and not torch.accelerator.is_available():
        raise ValueError("offload moves activations from an accelerator to the host: without one, set recompute to on")
    enable = getattr(base, "activation_checkpointing_enable", None)
    if enable is not None:
        enable({"use_reentrant": False}, every_n_layers=every, offload=offload)
    elif offload or every > 1:
        raise ValueError("offload, and recomputing some layers only, need transformers 5.16 or newer")
    else:
        base.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})


def nf4(compute: Any) -> Any:
    """Return transformers' settings of a 4-bit base: NF4, double quantisation, computed in ``compute`` (a torch dtype).

    Raises:
        ImportError: bitsandbytes (``longscope[train]``) is not installed.

    >>> import torch
    >>> nf4(torch.bfloat16).bnb_4bit_quant_type
    'nf4'
    """
    import importlib.util

    from transformers import BitsAndBytesConfig

    if importlib.util.find_spec("bitsandbytes") is None:
        raise ImportError("4-bit weights need bitsandbytes: pip install 'longscope[train]'")
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=compute,
    )


def _linear(model: Any) -> list[str]:
    """Return the names that linear layers of a model end with."""
    import torch

    return sorted({path.split(".")[-1] for path, part in model.named_modules() if isinstance(part, torch.nn.Linear)})
