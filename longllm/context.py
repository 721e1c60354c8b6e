"""How far a model's positions reach: RoPE settings and their length, kept together, in one file beside an adapter.

An adapter trained under other RoPE speeds is worthless without them, and its own file does not name them. So they are
written as ``context.json``, put on the configuration before the model is built, and checked on the model's buffers.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

FILE = "context.json"
#: entry of a configuration that ``flashcore.hf`` looks at, and other programs do not
LOG_ORIGIN = "attention_log_origin"
#: kinds of RoPE that transformers computes; ``default`` is unscaled, with the base (theta) as its only setting
RopeType = Literal["default", "linear", "dynamic", "yarn", "longrope", "llama3"]


@dataclass(frozen=True)
class Context:
    """RoPE settings and the length in tokens that they are for.

    Raises:
        ValueError: an unknown kind of RoPE, or a length or base that makes no sense.

    >>> Context({"rope_type": "default", "rope_theta": 2e8}, 81920).theta
    200000000.0
    """

    rope_parameters: Mapping[str, Any]
    """as in a transformers configuration: ``rope_type``, ``rope_theta`` and what the kind needs"""
    max_position_embeddings: int
    """tokens that the model is for"""
    base: str = ""
    """the model that the settings are for; empty = any"""
    trained: bool = False
    """whether weights were trained under these settings; YaRN put on afterwards claims a length without that"""
    log_origin: int = 0
    """keys beyond which attention is sharpened by the logarithm of their number (``flashcore.hf``), for weights that
    were trained on shorter texts than they are to read; 0 = never"""

    def __post_init__(self) -> None:
        """Refuse what transformers would take silently or fail on later."""
        kind, theta = self.rope_parameters.get("rope_type"), self.rope_parameters.get("rope_theta")
        if kind not in get_args(RopeType):
            raise ValueError(f"rope_type must be one of {', '.join(get_args(RopeType))}, got {kind!r}")
        if not isinstance(theta, int | float) or isinstance(theta, bool) or not 1 < theta < float("inf"):
            raise ValueError(f"rope_theta must be a number above 1, got {theta!r}")
        if self.max_position_embeddings < 1:
            raise ValueError(f"max_position_embeddings must be at least 1, got {self.max_position_embeddings}")
        if self.log_origin and self.log_origin < 2:
            raise ValueError(f"log_origin must be 0 (off) or at least 2 keys, got {self.log_origin}")

    @property
    def theta(self) -> float:
        """The base of the rotary speeds."""
        return float(self.rope_parameters["rope_theta"])

    def apply(self, config: Any) -> None:
        """Put the settings on a transformers configuration, before a model is built from it.

        Raises:
            ValueError: the configuration has no RoPE, or one kind per layer (Gemma-3), or transformers refuses the
                settings.
        """
        text = config.get_text_config(decoder=True)
        own = getattr(text, "rope_parameters", None)
        if not own:
            raise ValueError(f"a {text.model_type} model has no rotary positions: its context cannot be extended so")
        if any(isinstance(value, Mapping) for value in own.values()):
            raise ValueError(f"a {text.model_type} model has RoPE settings per kind of layer, which is not supported")
        kept = {name: own[name] for name in ("partial_rotary_factor",) if name in own}
        length, text.max_position_embeddings = text.max_position_embeddings, self.max_position_embeddings
        text.rope_parameters = {**kept, **self.rope_parameters}
        try:
            text.standardize_rope_params()
            text.validate_rope()
        except (KeyError, TypeError, ValueError) as error:
            text.rope_parameters, text.max_position_embeddings = own, length
            raise ValueError(f"transformers refuses the RoPE settings {dict(self.rope_parameters)}: {error}") from error
        if self.log_origin or hasattr(text, LOG_ORIGIN):
            setattr(text, LOG_ORIGIN, self.log_origin)

    def check(self, model: Any) -> None:
        """Compare the speeds that a model really rotates with to those the settings mean.

        Raises:
            ValueError: they differ, or the model has none.
        """
        import torch

        expected, scaling = speeds(model.config), attention_factor(model.config)
        found = list(_inverse_frequencies(model))
        if not found:
            raise ValueError("the model has no rotary embedding (inv_freq) to check")
        settings = model.config.get_text_config(decoder=True).rope_parameters
        wrong = [name for name, value in self.rope_parameters.items() if settings.get(name) != value]
        if wrong:
            raise ValueError(f"{wrong[0]} should be {self.rope_parameters[wrong[0]]!r}, got {settings.get(wrong[0])!r}")
        text = model.config.get_text_config(decoder=True)
        if getattr(text, LOG_ORIGIN, 0) != self.log_origin:
            raise ValueError(f"log_origin should be {self.log_origin}, got {getattr(text, LOG_ORIGIN, 0)}")
        for name, buffer, factor in found:
            if abs(factor - scaling) > 1e-6:
                raise ValueError(f"{name} scales attention by {factor:g}, {dict(self.rope_parameters)} by {scaling:g}")
            actual = buffer.float().cpu()
            if actual.shape != expected.shape or not torch.allclose(actual, expected, rtol=1e-5, atol=0):
                raise ValueError(
                    f"{name} does not follow {dict(self.rope_parameters)}: its second speed is {float(actual[1]):.6g}, "
                    f"expected {float(expected[1]):.6g}; RoPE settings must be on the configuration before it is built"
                )

    def save(self, folder: str | os.PathLike[str]) -> Path:
        """Write ``context.json`` into a folder, whole or not at all; return its path."""
        path = Path(folder) / FILE
        partial = path.with_name(f".{FILE}.partial")
        record = {**dataclasses.asdict(self), "rope_parameters": dict(self.rope_parameters)}
        partial.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
        partial.replace(path)
        return path

    @classmethod
    def read(cls, folder: str | os.PathLike[str]) -> Context | None:
        """Return what ``context.json`` of a folder says, or None if there is no such file.

        Raises:
            ValueError: the file is damaged, or names settings that do not exist.
        """
        path = Path(folder) / FILE
        if not path.is_file():
            return None
        try:
            record = json.loads(path.read_text(encoding="utf-8"))
            unknown = sorted(record.keys() - {item.name for item in dataclasses.fields(cls)})
            if unknown:
                raise ValueError(f"unknown key {unknown[0]!r}")
            return cls(**record)
        except (AttributeError, TypeError, ValueError) as error:
            raise ValueError(f"{path} does not describe a context: {error}") from error


def context_from(
    config: Any,
    rope_type: RopeType = "default",
    *,
    length: int,
    theta: float = 0.0,
    factor: float = 0.0,
    base: str = "",
) -> Context:
    """Return the settings that take a model with this configuration to ``length`` tokens.

    Args:
        config: of the model as it is.
        rope_type: ``default`` changes the base alone (training follows); the others scale.
        length: tokens to reach.
        theta: the new base; 0 keeps the model's.
        factor: how far to stretch; 0 = length / the model's own length. Unused by ``default``.
        base: the model's name, noted.

    Raises:
        ValueError: a kind, base or factor that makes no sense, or a length below the model's own.

    >>> import transformers
    >>> model = transformers.LlamaConfig(max_position_embeddings=8192, rope_theta=1e5)
    >>> context_from(model, length=32768, theta=2.5e6).rope_parameters
    {'rope_type': 'default', 'rope_theta': 2500000.0}
    >>> context_from(model, "yarn", length=32768).rope_parameters["factor"]
    4.0
    """
    text = config.get_text_config(decoder=True)
    own = dict(getattr(text, "rope_parameters", None) or {})
    native = int(own.get("original_max_position_embeddings") or text.max_position_embeddings)
    if length < native and rope_type != "default":
        raise ValueError(f"length must be at least the model's own {native:,} tokens, got {length:,}")
    if factor and factor < 1:
        raise ValueError(f"factor must be at least 1, got {factor}")
    settings: dict[str, Any] = {"rope_type": rope_type, "rope_theta": float(theta or own.get("rope_theta", 0.0))}
    stretch = factor or length / native
    if rope_type in ("linear", "dynamic", "yarn", "llama3", "longrope"):
        settings["factor"] = float(stretch)
    if rope_type in ("yarn", "llama3", "longrope"):
        settings["original_max_position_embeddings"] = native
    if rope_type == "dynamic":
        # transformers stretches a dynamic base from max_position_embeddings on, so that stays the model's own.
        return Context(settings, native, base)
    if rope_type == "llama3":
        settings |= {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
    if rope_type == "longrope":
        half = (getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads) // 2
        # Without a search for factors of its own every channel is stretched alike beyond the native length.
        settings |= {"short_factor": [1.0] * half, "long_factor": [float(stretch)] * half}
    return Context(settings, length, base)


def parse_rope(words: str, config: Any, length: int = 0, base: str = "") -> Context:
    """Return the settings that words on a command line mean: ``theta:2.5e6``, ``yarn:4``, ``dynamic:4``, ``linear:4``.

    ``length`` is what ``theta:`` is for (0 = the model's own); the others reach factor x the model's length.

    Raises:
        ValueError: other words.

    >>> import transformers
    >>> model = transformers.LlamaConfig(max_position_embeddings=8192, rope_theta=1e5)
    >>> parse_rope("yarn:4", model).max_position_embeddings
    32768
    """
    kind, _, number = words.partition(":")
    kinds = ("theta", *(name for name in get_args(RopeType) if name != "default"))
    try:
        value = float(number)
    except ValueError:
        value = 0.0
    if kind not in kinds or not value > 0:
        raise ValueError(f"rope must be KIND:NUMBER with a kind of {', '.join(kinds)}, got {words!r}")
    native = int(config.get_text_config(decoder=True).max_position_embeddings)
    if kind == "theta":
        return context_from(config, length=length or native, theta=value, base=base)
    return context_from(config, kind, length=max(length, round(native * value)), factor=value, base=base)  # type: ignore[arg-type]


def speeds(config: Any) -> Any:
    """Return the d/2 rotary speeds, fp32, that a configuration means, computed apart from any model."""
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    from flashcore.rope import inverse_frequencies

    text = config.get_text_config(decoder=True)
    kind = text.rope_parameters.get("rope_type", "default")
    if kind != "default":
        return ROPE_INIT_FUNCTIONS[kind](text, "cpu")[0].float()
    head = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    turning = int(head * text.rope_parameters.get("partial_rotary_factor", 1.0))
    return inverse_frequencies(turning, float(text.rope_parameters["rope_theta"]))


def attention_factor(config: Any) -> float:
    """Return what rotary cosines and sines are multiplied by under a configuration: 1 but for YaRN and LongRoPE."""
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    text = config.get_text_config(decoder=True)
    kind = text.rope_parameters.get("rope_type", "default")
    return 1.0 if kind == "default" else float(ROPE_INIT_FUNCTIONS[kind](text, "cpu")[1])


def _inverse_frequencies(model: Any) -> Iterator[tuple[str, Any, float]]:
    """Yield name, tensor [d/2] and attention factor of every rotary embedding of a model."""
    for name, module in model.named_modules():
        found = getattr(module, "inv_freq", None)
        if found is not None and getattr(found, "ndim", 0) == 1:
            yield f"{name}.inv_freq", found, float(getattr(module, "attention_scaling", 1.0))
