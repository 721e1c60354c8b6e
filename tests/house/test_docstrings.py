"""Rule 22: every public function and class says what it does, with an example that runs."""

import ast
import doctest
import importlib
import inspect
import re
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import pytest

#: public names ("package.name") whose example would need a downloaded model; another test file must name each
NEEDS_MODEL: set[str] = set()
#: packages that offer names to others; commands, demos and bench are entrances, not libraries
LIBRARIES = {"flashcore", "catalog", "training", "longllm", "beacon", "bge", "icl_embed", "visual_bge"}
OPTIONS = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE


def public(package: ModuleType) -> Iterator[tuple[str, Any]]:
    """Yield the functions and classes that a package exports, lazily exported ones included."""
    for name in getattr(package, "__all__", ()):
        thing = getattr(package, name)
        if inspect.isroutine(thing) or inspect.isclass(thing):
            yield f"{package.__name__}.{name}", thing


def docstring_faults(name: str, thing: Any, exempt: set[str]) -> Iterator[str]:
    """Yield what is missing from the docstring of one public function or class."""
    text = inspect.getdoc(thing) if "__doc__" in vars(thing) or inspect.isroutine(thing) else None
    if not text or text.startswith(f"{name.rpartition('.')[2]}("):  # a dataclass without one gets its signature
        yield f"{name}: no docstring"
        return
    if not re.match(r"\S[^\n]*[.:!?]`*$", text.partition("\n")[0]):
        yield f"{name}: the first line of the docstring is not one sentence"
    error = inspect.isclass(thing) and issubclass(thing, BaseException)
    examples = any(test.examples for test in doctest.DocTestFinder().find(thing, name))
    if not examples and not error and name not in exempt:
        yield f"{name}: no example (>>>), and it is not listed as needing a model"
    if examples and name in exempt:
        yield f"{name}: has an example, so it need not be listed as needing a model"


def unproven(exempt: set[str], sources: dict[str, str]) -> Iterator[str]:
    """Yield the exempt names that no other test file mentions."""
    for name in sorted(exempt):
        word = re.compile(rf"\b{name.rpartition('.')[2]}\b")
        tests = (
            source for path, source in sources.items() if path.startswith("tests/") and __name__ not in source
        )
        if not any(word.search(source) for source in tests if "NEEDS_MODEL" not in source):
            yield f"{name}: excused from an example, but no test names it"


def modules_with_examples(sources: dict[str, str]) -> list[str]:
    """Return the modules (outside tests) that have a doctest."""
    paths = [path for path, source in sources.items() if ">>> " in source and not path.startswith("tests/")]
    return [path.removesuffix(".py").removesuffix("/__init__").replace("/", ".") for path in paths]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "module_name" in metafunc.fixturenames:
        from_conftest = metafunc.config.pluginmanager.getplugin(str(metafunc.config.rootpath / "tests/house/conftest.py"))
        metafunc.parametrize("module_name", modules_with_examples(from_conftest.python_files(from_conftest.ROOT)))
