"""Tiny models with strong, uneven attention; batches; and what a compressed cache holds, counted from outside."""

import contextlib
import importlib.util
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

import beacon
from longllm import LoadedModel

SHAPE = {"hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 3, "max_position_embeddings": 512}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}
TOKENS = {"pad_token_id": 0, "bos_token_id": None, "eos_token_id": None}
KINDS = {
    "llama": {},
    "mistral": {},
    "qwen2": {"num_hidden_layers": 2},
    "qwen3": {},
    "gemma3_text": {
        "sliding_window": 9,
        "layer_types": ["sliding_attention", "full_attention", "full_attention"],
        "query_pre_attn_scalar": 16,
    },
    "gemma2": {
        "sliding_window": 9,
        "layer_types": ["sliding_attention", "full_attention", "full_attention"],
        "attn_logit_softcapping": 2.0,
        "query_pre_attn_scalar": 4,
    },
}


def module_at(path: Path) -> ModuleType:
    """Return a Python file of the tests as a module."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def words() -> Any:
    """The tokeniser of the tiny chat model."""
    return module_at(Path(__file__).parents[1] / "longllm" / "tiny_chat.py").tokenizer()


@pytest.fixture(scope="session")
def naive() -> ModuleType:
    """The second writing of compression that the package is compared with."""
    return module_at(Path(__file__).with_name("naive.py"))


@pytest.fixture(scope="session")
def build(words: Any) -> Callable[..., Any]:
    """Make a tiny model: ``build(kind, seed, dtype=..., **config)``, on eager attention."""

    def made(kind: str, seed: int = 0, dtype: torch.dtype = torch.float32, **changes: Any) -> Any:
        sizes = {**SHAPE, **HEADS, **TOKENS, **KINDS[kind], "vocab_size": len(words), "initializer_range": 0.3}
        config = AutoConfig.for_model(kind, **{**sizes, **changes})
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            model = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
            for name, weight in model.named_parameters():
                # Norms and biases start as constants, which would make key norms all alike.
                if weight.ndim == 1:
                    weight.data += 0.3 * torch.randn_like(weight)
                assert weight.std() > 0, name
        return model.eval().to(dtype).requires_grad_(False)

    return made


@pytest.fixture(scope="session")
def tiny(build: Callable[..., Any]) -> Callable[[str], Any]:
    """Return the tiny model of a kind, built once; not to be changed."""
    models: dict[str, Any] = {}

    def of(kind: str) -> Any:
        if kind not in models:
            models[kind] = build(kind)
        return models[kind]

    return of


@pytest.fixture(scope="session")
def loaded(tiny: Callable[[str], Any], words: Any) -> Callable[..., LoadedModel]:
    """Return a model with its tokeniser, as ``longllm.load`` would: the tiny one of a kind, or the one given."""

    def of(kind: str, model: Any = None, name: str = "tiny") -> LoadedModel:
        model = model or tiny(kind)
        return LoadedModel(model, words, name, model.dtype, "eager", 512, frozenset())

    return of


@pytest.fixture(scope="session")
def padded() -> Callable[..., dict[str, torch.Tensor]]:
    """Make random rows of these lengths, padded on the left to the longest or to ``columns``."""

    def rows(*lengths: int, columns: int = 0, seed: int = 0) -> dict[str, torch.Tensor]:
        columns = columns or max(lengths)
        ids = torch.randint(1, 200, (len(lengths), columns), generator=torch.Generator().manual_seed(seed))
        mask = (torch.arange(columns) >= columns - torch.tensor(lengths)[:, None]).long()
        return {"input_ids": ids * mask, "attention_mask": mask}

    return rows


def settings(name: str) -> dict[str, int]:
    """Return protections small enough for tiny texts."""
    small = {"full": {}, "streaming": {"sink": 2}, "tova": {}}
    small["spotlight"] = {"sink": 2, "recent": 5, "kernel": 3, "looks": 3, "settle": 4}
    return small.get(name, {"sink": 2, "recent": 5} | ({"kernel": 3} if name in ("snapkv", "pyramidkv") else {}))


@pytest.fixture(scope="session")
def compressed() -> Callable[..., beacon.CompressedCache]:
    """Make a cache: ``compressed(model, method name, slots=16, positions="compact")``."""

    def cache(model: Any, name: str = "streaming", **options: Any) -> beacon.CompressedCache:
        limits = {key: options.pop(key) for key in ("ratio", "slots", "nbytes") if key in options}
        return beacon.CompressedCache(model, beacon.method(name, **settings(name)), beacon.Budget(**limits), **options)

    return cache


def kept_positions(cache: beacon.CompressedCache) -> list[list[list[list[int]]]]:
    """Return the true positions held, [row][full layer][key head], in the order of the slots."""
    layers = [cache.true_positions(index).tolist() for index in cache.full]
    rows = range(len(cache.seen))
    return [[[[at for at in head if at >= 0] for head in layer[row]] for layer in layers] for row in rows]


def bytes_in_memory(cache: beacon.CompressedCache) -> int:
    """Return the memory behind every tensor that the layers hold on to, each storage once."""
    storages = {}
    for layer in cache.layers:
        for held in vars(layer).values():
            for tensor in held if isinstance(held, tuple) else [held]:
                if isinstance(tensor, torch.Tensor) and tensor.ndim:
                    storage = tensor.untyped_storage()
                    storages[storage.data_ptr() or -len(storages)] = storage.nbytes()
    return sum(storages.values())


@pytest.fixture(scope="session")
def kept() -> Callable[[beacon.CompressedCache], list[list[list[list[int]]]]]:
    """Return the true positions that a cache holds, [row][full layer][key head]."""
    return kept_positions


@pytest.fixture(scope="session")
def in_memory() -> Callable[[beacon.CompressedCache], int]:
    """Return the bytes that the layers of a cache keep alive, positions of slots included."""
    return bytes_in_memory


@pytest.fixture(scope="session")
def watched() -> Callable[..., Any]:
    """Call something with the cache after every forward pass of the model, inside ``compressing``."""

    @contextlib.contextmanager
    def watching(model: Any, cache: Any, look: Callable[[Any], object]) -> Iterator[list[Any]]:
        seen: list[Any] = []
        with beacon.compressing(model):
            # Placed after the hooks of compressing, so that it sees the books closed.
            hook = model.get_decoder().register_forward_hook(lambda *_: seen.append(look(cache)))
            try:
                yield seen
            finally:
                hook.remove()

    return watching
