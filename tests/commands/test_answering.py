"""The desk behind the page: what it answers, keeps, stops and refuses, compared with ``longscope ask``."""

import itertools
import shutil
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import pytest
import torch

from commands.answering import Desk
from commands.ask import ask
from commands.ask_plan import MethodName
from longllm import Decoding

SENTENCE = "The captain is Ahab. The whale is white and the sea is wide.\n"


@pytest.fixture
def desk(tiny_folder: Path) -> Iterator[Desk]:
    """A desk with the tiny model."""
    made = Desk(str(tiny_folder), "fp32", Decoding(max_new_tokens=8))
    yield made
    made.close()


@pytest.fixture
def short(tmp_path: Path) -> str:
    """A document of some 300 tokens: fits into the 512 the tiny model was made for."""
    file = tmp_path / "short.txt"
    file.write_text("".join(f"Chapter {number}. {SENTENCE}" for number in range(10)))
    return str(file)


@pytest.fixture
def novel(tmp_path: Path) -> str:
    """A document of some 5,000 tokens."""
    file = tmp_path / "novel.txt"
    file.write_text("".join(f"Chapter {number}. {SENTENCE}" for number in range(200)))
    return str(file)


def answered(desk: Desk, *asked: Any) -> dict[str, Any]:
    """Ask to the end; return the figures, having checked that text only grows and ends with the answer."""
    shown = list(desk(*asked))
    texts = [text for text, _ in shown]
    assert all(later.startswith(earlier) for earlier, later in itertools.pairwise(texts))
    figures = shown[-1][1]
    assert figures is not None
    assert figures["answer"] == texts[-1]
    return figures


@pytest.mark.parametrize("method", ["auto", "full", "streaming", "snapkv", "retrieve"])
def test_it_answers_as_the_command_does(desk: Desk, short: str, tiny_folder: Path, method: Any) -> None:
    figures = answered(desk, short, method, 4, "who is the captain?")
    ratio = 0.0 if method in Desk.unrated else 4.0
    *_, record = ask("who is the captain?", doc=short, method=method, ratio=ratio, model=str(tiny_folder),
                     dtype="fp32", max_new_tokens=8)  # fmt: skip
    assert isinstance(record, dict)
    same = ("answer", "tokens_seen", "kv_bytes", "kv_bytes_full", "plan", "method", "steered", "stopped", "title")
    assert [figures[key] for key in same] == [record[key] for key in same]
    assert figures["seconds"] > 0


@pytest.mark.parametrize(
    ("method", "aware", "again"),
    [("full", True, True), ("streaming", True, True), ("snapkv", True, False), ("snapkv", False, True)],
)
def test_a_second_question_reads_the_document_again_only_if_the_first_one_steered(
    desk: Desk, short: str, method: str, aware: bool, again: bool
) -> None:
    asked = (short, method, 4, "who is the captain?", aware)
    first = answered(desk, *asked)
    other = answered(desk, short, method, 4, "is the whale white or is it as wide as the sea?", aware)
    third = answered(desk, *asked)
    assert (first["reused"], other["reused"], third["reused"]) == (False, again, again)
    assert (third["reading_seconds"] == 0, first["reading_seconds"] > 0) == (again, True)
    assert [third[key] for key in ("answer", "kv_bytes")] == [first[key] for key in ("answer", "kv_bytes")]
    assert other["tokens_seen"] > first["tokens_seen"] == third["tokens_seen"]


def test_another_document_method_ratio_or_way_of_reading_is_read_anew(desk: Desk, short: str, tmp_path: Path) -> None:
    question = "who is the captain?"
    answered(desk, short, "streaming", 4, question, False)
    assert answered(desk, short, "streaming", 4, question, False)["reused"]
    assert not answered(desk, short, "streaming", 2, question, False)["reused"]
    assert not answered(desk, short, "knorm", 2, question, False)["reused"]
    assert not answered(desk, short, "knorm", 2, question, True)["reused"]
    copy = shutil.copy(short, tmp_path / "copy.txt")
    assert answered(desk, str(copy), "knorm", 2, question, True)["title"] == "copy"
    assert not answered(desk, short, "knorm", 2, question, True)["reused"]
    Path(short).write_text(Path(short).read_text().replace("Ahab", "Starbuck"))
    assert not answered(desk, short, "knorm", 2, question, True)["reused"]


def test_a_stopped_reading_ends_soon_and_leaves_the_model_as_it_was(desk: Desk, novel: str, short: str) -> None:
    expected = answered(desk, short, "full", 1, "who?")["answer"]
    model: Any = desk.load().model
    hooks = sum(len(part._forward_pre_hooks) + len(part._forward_hooks) for part in model.modules())
    attention = model.config._attn_implementation
    slow = threading.Event()
    block = model.get_decoder().layers[-1].register_forward_pre_hook(lambda *_: (slow.set(), time.sleep(0.1))[1])
    try:
        reading = desk(novel, "streaming", 8, "who?")
        next(reading)
        assert slow.wait(30)
        begun = time.monotonic()
        reading.close()
        desk._worker.submit(int).result(timeout=10)  # behind the stopped question
        # Far less than the forty chunks that were left take.
        assert time.monotonic() - begun < 1.5
    finally:
        block.remove()
    assert sum(len(part._forward_pre_hooks) + len(part._forward_hooks) for part in model.modules()) == hooks
    assert model.config._attn_implementation == attention
    assert answered(desk, short, "full", 1, "who?")["answer"] == expected
    assert desk.answers == 2


def test_stop_ends_the_iteration_with_a_note_and_the_next_question_is_answered(
    desk: Desk, novel: str, short: str
) -> None:
    reading = desk(novel, "streaming", 8, "who?")
    next(reading)
    desk.stop()
    begun = time.monotonic()
    assert list(reading)[-1] == ("", {"note": "Stopped."})
    assert time.monotonic() - begun < 1.5
    assert answered(desk, short, "full", 1, "who?")
    assert desk.answers == 1


def test_a_reading_says_how_far_it_is_and_what_is_wrong_with_the_ratio(
    desk: Desk, novel: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("commands.answering._BEAT", 0.001)
    steps = [figures for _, figures in desk(novel, "streaming", 2, "who?") if figures and "kv_bytes" not in figures]
    read = [figures["tokens_read"] for figures in steps]
    assert read == sorted(read)
    assert 0 < read[-1] <= steps[-1]["tokens_seen"]
    assert len(set(read)) > 5
    assert "ratio 2 keeps" in steps[-1]["warning"]
    assert steps[-1]["plan"] == "streaming, ratio 2, compact positions"


def test_two_askers_are_served_one_after_the_other(desk: Desk, short: str) -> None:
    one, two = desk(short, "full", 1, "who is the captain?"), desk(short, "auto", 1, "who?")
    next(two)
    next(one)
    assert list(one)[-1][1] is not None
    assert list(two)[-1][1] is not None
    assert desk.answers == 2


@pytest.mark.parametrize(
    ("document", "method", "question", "said"),
    [
        ("{folder}/whale.txt", "auto", "  ", "Type a question first"),
        ("", "auto", "who?", "Choose a document"),
        ("no-such-document", "auto", "who?", "no-such-document"),
        ("{folder}/whale.txt", "zip", "who?", "snapkv"),
        ("{folder}/whale.txt", "auto", "who?", "^whale.txt is not a text file"),
    ],
)
def test_a_mistake_is_named_before_a_model_is_loaded(
    desk: Desk, tmp_path: Path, document: str, method: str, question: str, said: str
) -> None:
    (tmp_path / "whale.txt").write_bytes(bytes(range(256)) * 20)
    with pytest.raises((ValueError, OSError), match=said):
        next(desk(document.replace("{folder}", str(tmp_path)), method, 4, question))
    assert desk._loaded is None


def test_what_goes_wrong_while_reading_reaches_the_one_who_asked(desk: Desk, short: str) -> None:
    with pytest.raises(ValueError, match="ratio must be"):
        list(desk(short, "streaming", 0.5, "who?"))
    desk.model = short  # no model
    with pytest.raises((ValueError, OSError), match=r"short\.txt"):
        list(desk(short, "full", 1, "who?"))


def test_a_closed_desk_has_stopped(tiny_folder: Path, novel: str) -> None:
    desk = Desk(str(tiny_folder), "fp32")
    reading = desk(novel, "streaming", 8, "who?")
    next(reading)
    desk.close()
    assert all(figures is None or "kv_bytes" not in figures for _, figures in reading)


def test_the_methods_are_those_of_the_command() -> None:
    assert Desk.methods == get_args(MethodName)
    assert set(Desk.unrated) < set(Desk.methods)


def test_the_figures_hold_for_the_model(desk: Desk, short: str) -> None:
    figures = answered(desk, short, "streaming", 4, "who is the captain?")
    config: Any = desk.load().model.config
    token = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * torch.float32.itemsize
    assert figures["kv_bytes_full"] == figures["tokens_seen"] * token
    assert 3.5 < figures["kv_bytes_full"] / figures["kv_bytes"] <= 4.5
