"""The repository as the house tests see it: its Python files, parsed once."""

import ast
import os
import tomllib
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SKIPPED = {"build", "dist", "out", "node_modules", "golden"}


@cache
def python_files(root: Path) -> dict[str, str]:
    """Return relative path -> source for every Python file that is not generated or installed."""
    found = {}
    for place, folders, names in os.walk(root):
        folder = Path(place)
        # Pruned here: .venv alone has tens of thousands of files.
        folders[:] = sorted(name for name in folders if name[0] != "." and name not in SKIPPED)
        for name in sorted(names):
            if name.endswith(".py"):
                found[(folder / name).relative_to(root).as_posix()] = (folder / name).read_text(encoding="utf-8")
    return found


def module_name(path: str) -> str:
    """Return the import name of a Python file: flashcore/hf/__init__.py is flashcore.hf."""
    return path.removesuffix(".py").removesuffix("/__init__").replace("/", ".")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Make a case of each package, package with exports, module with a doctest, module of commands/."""
    files = {path: source for path, source in python_files(ROOT).items() if not path.startswith("tests/")}
    packages = {path: source for path, source in files.items() if path.endswith("/__init__.py")}
    cases = {
        "package": [path for path in packages if path.count("/") == 1],
        "exporter": [path for path, source in packages.items() if "__all__" in source],
        "example_module": [path for path, source in files.items() if ">>> " in source],
        "command_module": [path for path in files if path.startswith("commands/")],
    }
    for argument in cases.keys() & set(metafunc.fixturenames):
        metafunc.parametrize(argument, [module_name(path) for path in cases[argument]])


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
