"""The tiny chat model of the longllm tests, and the front door as another process sees it."""

import importlib.util
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[2]
Door = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="session")
def tiny_chat() -> ModuleType:
    """The module that builds the tiny model and adapters for it."""
    spec = importlib.util.spec_from_file_location("tiny_chat", ROOT / "tests" / "longllm" / "tiny_chat.py")
    tiny_chat = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tiny_chat)
    return tiny_chat


@pytest.fixture(scope="session")
def tiny_folder(tiny_chat: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny chat model as a folder."""
    return tiny_chat.build(tmp_path_factory.mktemp("tiny-chat"))


@pytest.fixture
def door() -> Door:
    """Run ``longscope`` as a user would, in a process of its own."""

    def run(*words: str | Path, **environment: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "longscope", *map(str, words)]
        variables = {**os.environ, **environment}
        return subprocess.run(
            command, cwd=ROOT, env=variables, capture_output=True, text=True, timeout=300, check=False
        )

    return run
