"""Rule 22: every public function and class says what it does, with an example that runs."""

import doctest
import importlib
import inspect
import re
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import pytest

#: public names ("package.name") whose example would need a download; another test file must name each
NEEDS_MODEL: set[str] = {
    *("catalog.documents", "catalog.fetch", "catalog.path", "catalog.verify"),
    "longllm.ChatSession",
    *("longllm.LoadedModel", "longllm.Prefix", "longllm.Result", "longllm.Stream", "longllm.chat_prompt"),
    *("longllm.document_prompt", "longllm.load", "longllm.prefill", "longllm.question_ids"),
    *("longllm.stop_ids", "longllm.stream", "longllm.extend_context"),
    *("longllm.planning.calibrated", "longllm.planning.probe"),
    *("longllm.synthesis.synthesise", "longllm.synthesis.text_rows", "longllm.synthesis.token_counter"),
    "longllm.synthesis.write_texts",
    *("beacon.CompressedCache", "beacon.SavedCache", "beacon.compressing", "beacon.load_cache", "beacon.read"),
    *("beacon.load_beacons", "beacon.losses", "beacon.save_beacons", "beacon.save_released", "beacon.train_beacons"),
    "beacon.use_beacons",
    *(
        "beacon.train_beacons",
        "beacon.save_cache",
        "beacon.verify",
        "beacon.methods.LayerView",
        "beacon.methods.Method",
    ),
}
HERE = "tests/house/test_docstrings.py"
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
        tests = [source for path, source in sources.items() if path.startswith("tests/") and path != HERE]
        if not any(word.search(source) for source in tests):
            yield f"{name}: excused from an example, but no test names it"


def test_every_public_name_is_explained_with_an_example(exporter: str) -> None:
    exported = public(importlib.import_module(exporter))
    found = [line for name, thing in exported for line in docstring_faults(name, thing, NEEDS_MODEL)]
    assert not found, "\n".join(found)


def test_every_example_in_a_docstring_runs(example_module: str) -> None:
    module = importlib.import_module(example_module)
    result = doctest.testmod(module, optionflags=OPTIONS)
    assert result.attempted > 0
    assert result.failed == 0, f"{result.failed} examples of {example_module} fail, see above"


def test_every_excused_name_is_exported_and_tested(sources: dict[str, str]) -> None:
    found = list(unproven(NEEDS_MODEL, sources))
    for name in NEEDS_MODEL:
        package, _, bare = name.rpartition(".")
        if bare not in importlib.import_module(package).__all__:
            found.append(f"{name}: not exported")
    assert not found, "\n".join(found)


def documented(text: str | None) -> Any:
    def thing() -> None: ...

    thing.__doc__ = text
    return thing


class Bare:
    pass


class OnlyMethod:
    """Count things."""

    def one(self) -> int:
        """Return one.

        >>> OnlyMethod().one()
        1
        """
        return 1


@pytest.mark.parametrize(
    "thing",
    [
        documented(None),
        documented("Do it."),
        documented("no sentence\n\n>>> 1\n1"),
        Bare,
        type("Sub", (OnlyMethod,), {}),
    ],
)
def test_a_faulty_docstring_is_caught(thing: Any) -> None:
    assert len(list(docstring_faults("bge.thing", thing, set()))) == 1


def test_a_needless_or_unproven_excuse_is_caught() -> None:
    good = documented("Do it.\n\n>>> 1 + 1\n2")
    assert len(list(docstring_faults("bge.thing", good, {"bge.thing"}))) == 1
    excused = {"bge.Embedder", "bge.Tested"}
    assert list(unproven(excused, {"tests/bge/test_a.py": "Tested()", "bge/a.py": "Embedder"})) == [
        "bge.Embedder: excused from an example, but no test names it"
    ]


@pytest.mark.parametrize("thing", [documented("Do it.\n\n>>> 1 + 1\n2"), OnlyMethod])
def test_a_good_docstring_is_let_through(thing: Any) -> None:
    assert list(docstring_faults("bge.thing", thing, set())) == []
