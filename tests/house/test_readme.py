"""The README: its commands exist with the options shown, and its file map names what is there."""

import ast
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest

import longscope


def code_lines(text: str) -> Iterator[str]:
    """Yield the lines of the ``sh`` code blocks, without comments and continuation marks."""
    for block in re.findall(r"^```sh\n(.*?)^```", text, re.MULTILINE | re.DOTALL):
        for line in block.replace("\\\n", " ").splitlines():
            if words := shlex.split(line, comments=True):
                yield shlex.join(words)


def fault(line: str, targets: set[str], root: Path) -> str | None:
    """Return what is wrong with one command line of a document, or None."""
    program, *words = shlex.split(line)
    program = program.removeprefix(".venv/bin/")
    if program == "make":
        unknown = [word for word in words if "=" not in word and word not in targets]
        return f"no such make target: {unknown[0]}" if unknown else None
    if program == "longscope":
        try:
            longscope.parse(*longscope.resolve(words))
        except (ValueError, ImportError) as error:
            return str(error)
        return None
    if program == "python" and words[:1] == ["-m"]:
        module = root / words[1].replace(".", "/")
        there = module.with_suffix(".py").is_file() or (module / "__main__.py").is_file()
        return None if there else f"no such module: {words[1]}"
    return None if program in ("git", "cd") else f"what is {program}?"


@pytest.fixture(scope="module")
def targets(root: Path) -> set[str]:
    return set(re.findall(r"^([a-z]+):", (root / "Makefile").read_text(), re.MULTILINE))


@pytest.fixture(scope="module", params=["README.md", "CONTRIBUTING.md"])
def document(request: pytest.FixtureRequest, root: Path) -> str:
    return (root / request.param).read_text(encoding="utf-8")


def test_every_command_shown_exists(document: str, targets: set[str], root: Path) -> None:
    lines = list(code_lines(document))
    assert lines
    found = [f"{line}: {problem}" for line in lines if (problem := fault(line, targets, root))]
    assert not found, "\n".join(found)


def test_the_readme_shows_how_to_begin(root: Path) -> None:
    lines = list(code_lines((root / "README.md").read_text()))
    assert {"make tour", "make test"} <= set(lines)
    assert any(" ask " in line for line in lines)


def test_the_file_map_names_every_package_and_nothing_else(root: Path, trees: dict[str, ast.Module]) -> None:
    (block,) = re.findall(r"^```text\n(.*?)^```", (root / "README.md").read_text(), re.MULTILINE | re.DOTALL)
    named = {line.split()[0] for line in block.splitlines() if line and line[0] != " "}
    folders = {path.split("/")[0] + "/" for path in trees if "/" in path}
    assert folders <= named, f"not in the file map: {sorted(folders - named)}"
    missing = sorted(name for name in named if not (root / name).exists())
    assert not missing, f"in the file map, but not there: {missing}"


@pytest.mark.parametrize(
    "line",
    ["make nonsense", "longscope nonsense", "python -m bench.nonsense", "curl example.org", "longscope fetch"],
)
def test_a_command_that_does_not_exist_is_caught(line: str, targets: set[str], root: Path) -> None:
    assert fault(line, targets, root)


def test_the_python_shown_runs(root: Path) -> None:
    blocks = re.findall(r"^```python\n(.*?)^```", (root / "README.md").read_text(), re.MULTILINE | re.DOTALL)
    assert blocks
    for block in blocks:
        exec(compile(block, "README.md", "exec"), {})
