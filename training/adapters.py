"""Low-rank adapters (LoRA, arXiv 2106.09685) and 4-bit bases (QLoRA, arXiv 2305.14314), by peft and bitsandbytes."""

from __future__ import annotations

from dataclasses import dataclass
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

    def __post_init__(self) -> None:
        """Refuse values that mean nothing."""
        if self.rank < 0:
            raise ValueError(f"rank must be 0 or more, got {self.rank}")
        if not self.alpha > 0:
            raise ValueError(f"alpha must be a positive number, got {self.alpha}")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout must lie between 0 and 1, got {self.dropout}")
        if self.rank and not self.targets:
            raise ValueError("targets must name at least one layer, got none")
        if self.tokens and "embed_tokens" in self.whole:
            raise ValueError("tokens and whole embed_tokens exclude each other: choose one")


def add_lora(model: Any, settings: LoraSettings, *, checkpointing: bool = False) -> Any:
    """Return the model wrapped by peft, with adapters in fp32 and everything else frozen.

    Args:
        model: of transformers; a 4-bit one is prepared (norms in fp32).
        settings: rank, targets, whole modules.
        checkpointing: the model recomputes activations, for which its inputs must ask for gradients.

    Raises:
        ImportError: peft (``longscope[train]``) is not installed.
        ValueError: no layer has one of the names.
    """
    try:
        import peft
    except ImportError as error:
        raise ImportError("training an adapter needs peft: pip install 'longscope[train]'") from error
    import torch

    for name in (*settings.targets, *settings.whole):
        if not any(path.split(".")[-1] == name for path, _ in model.named_modules()):
            raise ValueError(f"the model has no layer called {name!r}: its layers are {', '.join(_linear(model))}")
    if getattr(model, "is_loaded_in_4bit", False):
        model = peft.prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
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
    state = torch.get_rng_state()
    torch.manual_seed(settings.seed)
    wrapped = peft.get_peft_model(model, config)
    torch.set_rng_state(state)
    if checkpointing:
        wrapped.enable_input_require_grads()
    for weight in wrapped.parameters():
        if weight.requires_grad:
            weight.data = weight.data.float()
    return wrapped


def nf4(compute: Any) -> Any:
    """Return transformers' settings of a 4-bit base: NF4, double quantisation, computed in ``compute`` (a torch dtype).

    Raises:
        ImportError: bitsandbytes (``longscope[train]``) is not installed.
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
