"""The front door: what a person sees when a command line is right, wrong, interrupted or piped away."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import longscope

COMMANDS = '''
"""Commands for the tests."""
from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Width:
    """How wide."""

    left: int = 1
    """Columns on the left."""

    def __post_init__(self) -> None:
        if self.left < 0:
            raise ValueError(f"left must be 0 or more, got {self.left}")


def ask(
    question: str, *, doc: str, tokens_seen: int = 64, kind: Literal["a", "b"] = "a", stream: bool = True,
    width: Width = Width(),
) -> Iterator[str | dict]:
    """Answer a question.

    Streams it:

        longscope ask --doc sotu "who?"

    Args:
        question: what to ask.
        doc: where the answer stands.
        tokens_seen: how many tokens to read.
        stream: whether to stream.
    """
    yield "first "
    yield f"{question} {doc} {tokens_seen} {kind} {stream} {width.left}"
    yield {"answer": question, "ü": tokens_seen}


def fetch(names: list[str], *, force: bool = False) -> dict:
    """Fetch.

    Args:
        names: rows of the catalog.
        force: fetch again.
    """
    return {"names": names, "force": force}


def fail(kind: str) -> Iterator[str]:
    """Fail."""
    yield "begun"
    kinds = {"value": ValueError, "type": TypeError, "import": ImportError, "os": OSError}
    kinds |= {"pipe": BrokenPipeError, "key": KeyError, "interrupt": KeyboardInterrupt}
    raise kinds[kind](f"{kind} was\\n  wrong")


def silent() -> None:
    """Say nothing."""


def long() -> Iterator[str]:
    """Say much."""
    for number in range(100_000):
        yield f"line {number}\\n"
'''
NAMES = {
    "ask": "ask",
    "fetch": "fetch",
    "fail": "fail",
    "silent": "silent",
    "train long": "long",
    "train ask": "ask",
}
Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def door(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Return a function that runs a command line in this process: (exit code, stdout, stderr)."""
    (tmp_path / "door_commands.py").write_text(COMMANDS)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "door_commands", raising=False)
    table = {name: (f"door_commands:{function}", f"{name} something") for name, function in NAMES.items()}
    monkeypatch.setattr(longscope, "COMMANDS", table)
    monkeypatch.delenv("LONGSCOPE_DEBUG", raising=False)

    def run(*words: str) -> tuple[int, str, str]:
        code = longscope.main(words)
        return code, *capsys.readouterr()

    return run


def one_line_error(result: tuple[int, str, str]) -> str:
    """Check that a command line was refused with exit code 2 and one line on stderr; return that line."""
    code, _, error = result
    assert code == 2
    assert error.startswith("longscope: ")
    assert error.count("\n") == 1
    return error


def test_text_streams_to_stdout_and_ends_with_a_newline(door: Run) -> None:
    assert door("ask", "why", "--doc", "d") == (0, "first why d 64 a True 1\n", "")


def test_json_is_exactly_one_line_without_the_text(door: Run) -> None:
    code, out, error = door("ask", "why", "--doc", "d", "--json")
    assert (code, out.count("\n"), error) == (0, 1, "")
    assert json.loads(out) == {"answer": "why", "ü": 64}
    assert json.loads(door("silent", "--json")[1]) == {}


def test_a_command_without_json_shows_no_record(door: Run) -> None:
    assert door("fetch", "sotu") == (0, "", "")


def test_a_positional_list_takes_several_words(door: Run) -> None:
    _, out, _ = door("fetch", "sotu", "moby-dick", "--json")
    assert json.loads(out) == {"names": ["sotu", "moby-dick"], "force": False}


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--tokens_seen", "7"], "d 7 a True 1"),
        (["--tokens-seen=7"], "d 7 a True 1"),
        (["--no-stream"], "d 64 a False 1"),
        (["--no_stream", "--kind", "b"], "d 64 b False 1"),
        (["--width.left", "3"], "d 64 a True 3"),
    ],
)
def test_options_are_keyword_only_parameters(door: Run, words: list[str], expected: str) -> None:
    assert door("ask", "why", "--doc", "d", *words)[1] == f"first why {expected}\n"


def test_an_option_is_no_less_required_for_being_an_option(door: Run) -> None:
    assert "required: --doc (see longscope ask --help)" in one_line_error(door("ask", "why"))
    assert "required: question, --doc" in one_line_error(door("ask"))


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--tokens-seen", "many"], "--tokens_seen: expected int, got many"),
        (["--kind", "c"], "--kind: expected Literal['a', 'b'], got c"),
        (["--tokenz_seen", "3"], "unrecognized arguments: --tokenz_seen 3 (did you mean --tokens_seen?)"),
        (["extra"], "unrecognized arguments: extra"),
        (["--config", "/nowhere.yaml"], "/nowhere.yaml"),
        (["--width.left", "-1"], "left must be 0 or more, got -1"),
    ],
)
def test_a_wrong_option_is_named_in_one_line(door: Run, words: list[str], expected: str) -> None:
    assert expected in one_line_error(door("ask", "why", "--doc", "d", *words))


def test_the_command_line_overrides_the_config_file_wherever_it_stands(door: Run, tmp_path: Path) -> None:
    config = tmp_path / "ask.yaml"
    config.write_text("question: filed\ndoc: filed\ntokens_seen: 5\nwidth:\n  left: 4\n")
    assert door("ask", "--config", str(config))[1] == "first filed filed 5 a True 4\n"
    assert door("ask", "typed", "--tokens-seen", "6", "--config", str(config))[1] == "first typed filed 6 a True 4\n"
    config.write_text("dok: filed\n")
    assert "dok" in one_line_error(door("ask", "why", "--doc", "d", "--config", str(config)))


def test_printed_config_can_be_read_back(door: Run, tmp_path: Path) -> None:
    config = tmp_path / "ask.yaml"
    config.write_text(door("ask", "why", "--doc", "d", "--tokens_seen", "9", "--print_config")[1])
    assert door("ask", "--config", str(config))[1] == "first why d 9 a True 1\n"


def test_help_of_a_command_teaches_its_arguments(door: Run) -> None:
    code, out, _ = door("ask", "--help")
    assert code == 0
    for line in (
        "Answer a question.",
        '    longscope ask --doc sotu "who?"',
        "where the answer stands.",
        "--json",
    ):
        assert line in out
    assert "Args:" not in out
    assert door("help", "ask")[1] == out


def test_a_verb_alone_lists_its_kinds(door: Run) -> None:
    code, out, _ = door("train")
    assert code == 0
    assert "longscope train ask" in out
    assert "longscope fetch" not in out
    assert door("train", "ask", "why", "--doc", "d")[0] == 0


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["fetsh", "sotu"], "unknown command 'fetsh' (did you mean fetch?); the commands are: ask, fetch, "),
        (["train", "lon"], "unknown command 'train lon' (did you mean train long"),
        (["zzz"], "unknown command 'zzz'; the commands are: ask, fetch, "),
        (["--json", "ask"], "options come after the command"),
    ],
)
def test_an_unknown_command_is_answered_with_the_known_ones(door: Run, words: list[str], expected: str) -> None:
    assert expected in one_line_error(door(*words))


@pytest.mark.parametrize("kind", ["value", "type", "import", "os", "pipe"])
def test_an_expected_error_is_one_line_and_exit_code_2(door: Run, kind: str) -> None:
    result = door("fail", kind)
    assert one_line_error(result) == f"longscope: {kind} was wrong\n"
    assert result[1] == "begun\n"


def test_a_bug_and_a_debug_run_keep_their_traceback(door: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(KeyError):
        door("fail", "key")
    monkeypatch.setenv("LONGSCOPE_DEBUG", "1")
    with pytest.raises(ValueError, match="wrong"):
        door("fail", "value")


def test_an_interrupt_is_exit_code_130(door: Run) -> None:
    assert door("fail", "interrupt") == (130, "begun\n", "longscope: interrupted\n")


def front_door(root: Path, *words: str, **options: Any) -> subprocess.CompletedProcess[str]:
    """Run the front door in its own process."""
    command = [sys.executable, "longscope.py", *words]
    return subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=60, check=False, **options)


def test_help_answers_within_one_second(root: Path) -> None:
    times = []
    for _ in range(5):
        start = time.monotonic()
        done = front_door(root, "--help")
        times.append(time.monotonic() - start)
    assert done.returncode == 0
    for name in longscope.COMMANDS:
        assert f"longscope {name} " in done.stdout
    assert min(times) < 1.0


def test_no_command_is_the_same_as_help(root: Path) -> None:
    assert front_door(root).stdout == front_door(root, "--help").stdout


@pytest.mark.parametrize("words", ["--help", "train long"])
def test_a_reader_that_leaves_early_is_no_error(words: str, root: Path, tmp_path: Path) -> None:
    (tmp_path / "door_commands.py").write_text(COMMANDS)
    program = (
        "import longscope, sys; longscope.COMMANDS['train long'] = ('door_commands:long', ''); "
        f"sys.exit(longscope.main({words.split()!r}))"
    )
    path = os.pathsep.join([str(tmp_path), str(root)])
    process = subprocess.Popen(
        [sys.executable, "-c", program],
        env={**os.environ, "PYTHONPATH": path},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout
    assert process.stderr
    process.stdout.close()
    with process.stderr as stream:
        error = stream.read()
    assert (process.wait(timeout=60), error) == (0, "")


@pytest.mark.parametrize("name", longscope.COMMANDS)
def test_every_command_of_the_table_explains_itself(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert longscope.main([*name.split(), "--help"]) == 0
    out, _ = capsys.readouterr()
    assert f"usage: longscope {name}" in " ".join(out.split())
