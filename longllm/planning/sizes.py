"""How many weights a model has, part by part, from its configuration. Standard library only."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import catalog
from training.adapters import LoraSettings

#: kinds of models whose layers are built as described here: two norms, attention with RoPE, gated MLP
KINDS = ("llama", "mistral", "qwen2", "qwen3")
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
MLP = ("gate_proj", "up_proj", "down_proj")
#: bytes of a number in files, by the name that configurations have for it
STORED = {"float32": 4, "bfloat16": 2, "float16": 2}


@dataclass(frozen=True)
class Sizes:
    """The measures of a decoder.

    Raises:
        ValueError: naming the field, what it got and its range.

    >>> llama = Sizes("llama", 4096, 14336, 32, 32, 8, 128, 128256)
    >>> llama.parameters
    8030261248
    """

    kind: str
    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int
    tied: bool = False
    """the head is the embedding"""
    biased: tuple[str, ...] = ()
    """linear layers that have a bias"""
    windows: tuple[int, ...] = ()
    """keys that each layer sees at most, 0 = all; empty = all layers see all"""
    stored: float = 2.0
    """bytes of a weight in the model's files"""

    def __post_init__(self) -> None:
        """Refuse what is no model of the kinds known."""
        if self.kind not in KINDS:
            raise ValueError(f"model_type must be one of {', '.join(KINDS)} to be planned for, got {self.kind!r}")
        for name in ("hidden", "intermediate", "layers", "heads", "kv_heads", "head_dim", "vocabulary"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.heads % self.kv_heads:
            raise ValueError(f"heads must be a multiple of kv_heads ({self.kv_heads}), got {self.heads}")

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> Sizes:
        """Return the sizes that a configuration (the content of config.json) describes.

        Raises:
            ValueError: an entry is missing, or the model is of no known kind.

        >>> config = {"model_type": "llama", "hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 2}
        >>> Sizes.of({**config, "num_attention_heads": 2, "vocab_size": 10}).linear["gate_proj"]
        (8, 16)
        """
        kind = str(config.get("model_type", ""))
        if kind not in KINDS:
            raise ValueError(f"model_type must be one of {', '.join(KINDS)} to be planned for, got {kind!r}")
        needed = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size")
        if missing := [name for name in needed if not isinstance(config.get(name), int)]:
            raise ValueError(
                f"the configuration must give {missing[0]} as a whole number, got {config.get(missing[0])}"
            )
        hidden, heads, layers = (config[name] for name in ("hidden_size", "num_attention_heads", "num_hidden_layers"))
        biased = (ATTENTION[:3] if kind == "qwen2" else ATTENTION) if _attention_bias(kind, config) else ()
        return cls(
            kind,
            hidden,
            config["intermediate_size"],
            layers,
            heads,
            config.get("num_key_value_heads") or heads,
            config.get("head_dim") or (128 if kind == "qwen3" else hidden // heads),
            config["vocab_size"],
            bool(config.get("tie_word_embeddings", False)),
            biased + (MLP if kind == "llama" and config.get("mlp_bias") else ()),
            _windows(kind, config, layers),
            STORED.get(str(config.get("dtype") or config.get("torch_dtype")), 2),
        )

    @property
    def linear(self) -> dict[str, tuple[int, int]]:
        """The linear layers of one decoder layer: name -> (inputs, outputs)."""
        queries, keys = self.heads * self.head_dim, self.kv_heads * self.head_dim
        hidden, inner = self.hidden, self.intermediate
        attention = [(hidden, queries), (hidden, keys), (hidden, keys), (queries, hidden)]
        shapes = [*attention, (hidden, inner), (hidden, inner), (inner, hidden)]
        return dict(zip((*ATTENTION, *MLP), shapes, strict=True))

    @property
    def matrices(self) -> int:
        """Weights in the linear layers of all decoder layers: what NF4 holds in 4 bits."""
        return self.layers * sum(inputs * outputs for inputs, outputs in self.linear.values())

    @property
    def vectors(self) -> int:
        """Weights of norms and biases."""
        own = 2 * self.hidden + (2 * self.head_dim if self.kind == "qwen3" else 0)
        return self.layers * (own + sum(self.linear[name][1] for name in self.biased)) + self.hidden

    @property
    def embedding(self) -> int:
        """Weights of the embedding; the head has as many."""
        return self.vocabulary * self.hidden

    @property
    def parameters(self) -> int:
        """All weights, a tied head counted once."""
        return self.matrices + self.vectors + self.embedding * (1 if self.tied else 2)

    def module(self, name: str) -> int:
        """Return the weights of all modules whose names end with ``name``, as peft finds them.

        Raises:
            ValueError: there is none.

        >>> Sizes("llama", 8, 16, 2, 2, 1, 4, 10).module("embed_tokens")
        80
        """
        found = [size for own, size in self._modules().items() if own.endswith(name)]
        if not name or not found:
            raise ValueError(f"no layer is called {name!r}: there are {', '.join(self._modules())}")
        return sum(found)

    def _modules(self) -> dict[str, int]:
        """Return the weights of each kind of module."""
        found = {
            name: self.layers * (inputs * outputs + (outputs if name in self.biased else 0))
            for name, (inputs, outputs) in self.linear.items()
        }
        found |= {"embed_tokens": self.embedding, "lm_head": self.embedding, "norm": self.hidden}
        found |= dict.fromkeys(("input_layernorm", "post_attention_layernorm"), self.hidden * self.layers)
        return found | (
            dict.fromkeys(("q_norm", "k_norm"), self.head_dim * self.layers) if self.kind == "qwen3" else {}
        )

    def trainable(self, lora: LoraSettings) -> int:
        """Return how many weights learn.

        Raises:
            ValueError: no layer has one of the names.

        >>> llama = Sizes("llama", 4096, 14336, 32, 32, 8, 128, 128256)
        >>> llama.trainable(LoraSettings(rank=32, whole=("embed_tokens",)))
        552599552
        """
        if not lora.rank:
            return self.parameters
        for name in lora.targets:
            if name not in self.linear:
                raise ValueError(f"lora.targets must be among {', '.join(self.linear)} to be planned for, got {name!r}")
        low = self.layers * lora.rank * sum(sum(self.linear[name]) for name in set(lora.targets))
        return low + sum(map(self.module, set(lora.whole))) + len(lora.tokens) * self.hidden

    def window(self, layer: int) -> int:
        """Return the keys that a layer sees at most; 0 = all."""
        return self.windows[layer] if self.windows else 0


def read_sizes(model: str | os.PathLike[str]) -> Sizes:
    """Return the sizes of a model given by catalog name, folder, config.json, or the JSON text of one.

    Nothing is downloaded but small catalog models that bring their own files.

    Raises:
        ValueError: no such model, one whose configuration is not here, or one of no known kind.
        OSError: its files cannot be read.

    >>> read_sizes('{"model_type": "llama", "hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 2,'
    ...            '"num_attention_heads": 2, "vocab_size": 10}').parameters
    1480
    """
    words = os.fspath(model).strip()
    if words.startswith("{"):
        return Sizes.of(_mapping(words, "the configuration"))
    path = Path(words).expanduser()
    if path.is_file():
        return Sizes.of(_mapping(path.read_text(encoding="utf-8"), str(path)))
    folder = path if path.is_dir() else _catalogued(words)
    if not (folder / "config.json").is_file():
        raise ValueError(f"{words!r} is not a language model: {folder} has no config.json")
    sizes = Sizes.of(_mapping((folder / "config.json").read_text(encoding="utf-8"), str(folder / "config.json")))
    on_disk = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    return replace(sizes, stored=on_disk / sizes.parameters) if on_disk else sizes


def _catalogued(name: str) -> Path:
    """Return the folder of a catalog model, without downloading a large one for its configuration alone."""
    row = catalog.row(name)
    here = catalog.local(name)
    if here is None and all(source.type == "hub" for source in row.sources):
        raise ValueError(
            f"the files of {name!r} are not here, and planning downloads no weights: give its config.json (a file, or "
            "its text) as the model"
        )
    return here or catalog.path(name)


def _mapping(text: str, where: str) -> dict[str, Any]:
    """Return the JSON object in a text."""
    try:
        found = json.loads(text)
    except ValueError as error:
        raise ValueError(f"{where} is not JSON: {error}") from error
    if not isinstance(found, dict):
        raise ValueError(f"{where} must be a JSON object, got {type(found).__name__}")
    return found


def _attention_bias(kind: str, config: Mapping[str, Any]) -> bool:
    """Say whether the attention projections have biases."""
    return kind == "qwen2" or bool(kind in ("llama", "qwen3") and config.get("attention_bias"))


def _windows(kind: str, config: Mapping[str, Any], layers: int) -> tuple[int, ...]:
    """Return the window of each layer, or nothing if all layers see everything."""
    width = config.get("sliding_window") or 0
    if not width or (kind.startswith("qwen") and not config.get("use_sliding_window")):
        return ()
    kinds = config.get("layer_types")
    if kinds is None:
        first = config.get("max_window_layers", 0) if kind.startswith("qwen") else 0
        return tuple(width if layer >= first else 0 for layer in range(layers))
    return tuple(width if layer == "sliding_attention" else 0 for layer in kinds)
