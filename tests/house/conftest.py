"""The repository as the house tests see it: its Python files, parsed once."""

import ast
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SKIPPED = {"build", "dist", "out", "node_modules", "golden"}


def python_files(root: Path) -> dict[str, str]:
    """Return relative path -> source for every Python file that is not generated or installed."""
    found = {}
    for file in sorted(root.rglob("*.py")):
        parts = file.relative_to(root).parts
        if not any(part.startswith(".") or part in SKIPPED or part.endswith(".egg-info") for part in parts):
            found["/".join(parts)] = file.read_text(encoding="utf-8")
    return found


@pytest.fixture(scope="session")
def root() -> Path:
    """The checkout."""
    return ROOT


@pytest.fixture(scope="session")
def sources() -> dict[str, str]:
    """Every Python file of the checkout: relative path -> source."""
    return python_files(ROOT)


@pytest.fixture(scope="session")
def trees(sources: dict[str, str]) -> dict[str, ast.Module]:
    """Every Python file of the checkout: relative path -> syntax tree."""
    return {path: ast.parse(source, path) for path, source in sources.items()}


@pytest.fixture(scope="session")
def project() -> dict:
    """The parsed pyproject.toml."""
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
