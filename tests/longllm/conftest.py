"""The tiny chat model, on disk and loaded."""

import importlib.util
import shutil
from pathlib import Path
from types import ModuleType

import pytest

import longllm


@pytest.fixture(scope="session")
def tiny_chat() -> ModuleType:
    """The module that builds the tiny model."""
    spec = importlib.util.spec_from_file_location("tiny_chat", Path(__file__).with_name("tiny_chat.py"))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def tiny_folder(tiny_chat: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny chat model as a folder; not to be changed."""
    return tiny_chat.build(tmp_path_factory.mktemp("tiny-chat"))


@pytest.fixture
def spoiled(tiny_folder: Path, tmp_path: Path) -> Path:
    """A copy of the tiny chat model's folder, to be spoiled."""
    return Path(shutil.copytree(tiny_folder, tmp_path / "spoiled"))


@pytest.fixture(scope="session")
def tiny(tiny_folder: Path) -> longllm.LoadedModel:
    """The tiny chat model, loaded in fp32 on transformers' own attention."""
    return longllm.load(tiny_folder, dtype="fp32", attention="sdpa", device="cpu")


@pytest.fixture
def prompt_ids(tiny: longllm.LoadedModel) -> list[int]:
    """A chat prompt of some 90 tokens."""
    return longllm.chat_prompt(tiny.tokenizer, "The sky is blue. Größe and 海と空. What is the pass key? " * 3)
