"""Rule 8: importing a package needs nothing optional, and the two leaves of the import table stay light."""

import subprocess
import sys
from pathlib import Path

import pytest

#: modules of the extras; a name set to None in sys.modules cannot be imported nor found
OPTIONAL = [
    "peft",
    "bitsandbytes",
    "accelerate",
    "datasets",
    "PIL",
    "timm",
    "open_clip",
    "pypdf",
    "bs4",
    "faiss",
    "bm25s",
    "mteb",
    "rouge",
    "jieba",
    "rapidfuzz",
    "pytrec_eval",
    "matplotlib",
    "gradio",
    "openai",
    "json_repair",
    "semantic_text_splitter",
    "sklearn",
    "langdetect",
    "ray",
    "flash_attn",
    "selenium",
]
#: what a package may not even pull in indirectly; transformers and torch cost seconds
HEAVY = {"flashcore": {"transformers"}, "catalog": {"torch", "transformers", "numpy"}}
#: a command's signature is its help, which must not wait for a framework
COMMAND_HEAVY = {"transformers", "gradio", "matplotlib"}


def import_without(root: Path, module: str, absent: list[str]) -> subprocess.CompletedProcess[str]:
    """Import ``module`` in a fresh interpreter where ``absent`` cannot be imported; print what it loaded."""
    program = (
        f"import sys; sys.modules.update(dict.fromkeys({absent!r})); import {module}; "
        "print(*sorted(name for name, value in sys.modules.items() if value and '.' not in name))"
    )
    command = [sys.executable, "-c", program]
    return subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=120, check=False)


def test_a_package_imports_without_any_extra(package: str, root: Path) -> None:
    done = import_without(root, package, OPTIONAL)
    assert done.returncode == 0, done.stderr
    heavy = HEAVY.get(package, set()) & set(done.stdout.split())
    assert not heavy, f"import {package} loads {sorted(heavy)}"


def test_a_command_imports_without_any_extra_or_model_library(command_module: str, root: Path) -> None:
    done = import_without(root, command_module, OPTIONAL)
    assert done.returncode == 0, done.stderr
    heavy = COMMAND_HEAVY & set(done.stdout.split())
    assert not heavy, f"import {command_module} loads {sorted(heavy)}, so its --help waits for them"


@pytest.mark.parametrize("statement", ["import peft", "from PIL import Image", "import faiss.contrib"])
def test_the_check_notices_an_optional_import(statement: str, tmp_path: Path) -> None:
    (tmp_path / "greedy.py").write_text(statement)
    done = import_without(tmp_path, "greedy", OPTIONAL)
    assert done.returncode != 0
    assert "ModuleNotFoundError" in done.stderr
