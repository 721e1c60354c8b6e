"""Conversations and needle tests behind the page, with the tiny model: read once, stopped, taken back."""

from pathlib import Path
from typing import Any

import pytest

import longllm
from commands import chatting
from commands.chatting import Parlour, chat_model
from longllm import Decoding
from longllm.evals.haystack import Haystack

SPEECH = "The whale is white and the sea is wide. Who is the captain? " * 6


@pytest.fixture
def parlour(tiny_folder: Path) -> Any:
    made = Parlour(str(tiny_folder), "fp32", Decoding(6))
    yield made
    made.close()


@pytest.fixture
def speech(tmp_path: Path) -> str:
    file = tmp_path / "speech.txt"
    file.write_text(SPEECH)
    return str(file)


def test_a_document_is_read_once_and_later_turns_read_only_what_is_new(parlour: Parlour, speech: str) -> None:
    first = list(parlour.say(speech, "Who is the captain?"))[-1]
    assert [entry["role"] for entry in first[0]] == ["user", "user", "assistant"]
    assert first[0][0]["content"].startswith("[speech: ")
    assert SPEECH[:20] not in first[0][0]["content"]
    second = list(parlour.say(speech, "And the sky?"))[-1]
    assert [entry["role"] for entry in second[0]] == ["user", "user", "assistant", "user", "assistant"]
    # The second turn adds a message and an answer, not the document again.
    assert second[1]["tokens"] - first[1]["tokens"] < first[1]["tokens"] / 2
    assert second[1]["turns"] == 2
    assert parlour.answers == 2
    # What the session has read is what the stock template makes of its messages.
    session = parlour._session
    said = [entry["content"] for entry in second[0] if entry["role"] == "assistant"]
    assert [entry["content"] for entry in session.messages if entry["role"] == "assistant"] == said
    assert session.messages[0]["content"].startswith(SPEECH.strip())


def test_the_answer_is_that_of_the_session(parlour: Parlour, tiny_folder: Path) -> None:
    told = list(parlour.say("", "The grass is green."))[-1][0][-1]["content"]
    fresh = longllm.ChatSession(longllm.load(tiny_folder, dtype="fp32"), decoding=Decoding(6))
    assert told == "".join(fresh.ask("The grass is green."))
    assert told


def test_a_new_conversation_forgets_and_reads_the_document_anew(parlour: Parlour, speech: str) -> None:
    list(parlour.say(speech, "Who?"))
    assert parlour.reset() == parlour.history == []
    told, figures = list(parlour.say(speech, "Who?"))[-1]
    assert told[0]["content"].startswith("[speech: ")
    assert figures["turns"] == 1


@pytest.mark.parametrize(
    ("document", "message", "problem"),
    [
        ("", "  ", "Type a message first"),
        ("nowhere.txt", "Who?", "no file 'nowhere.txt'"),
        ("", "word " * 900, "the context ends at 512"),
    ],
)
def test_what_cannot_be_said_is_refused_and_the_conversation_stays(
    parlour: Parlour, document: str, message: str, problem: str
) -> None:
    before = list(parlour.say("", "The sky is blue."))[-1][0]
    with pytest.raises((ValueError, OSError), match=problem):
        list(parlour.say(document, message))
    assert parlour.history == before
    assert len(list(parlour.say("", "And now?"))[-1][0]) == len(before) + 2


def test_stop_ends_an_answer_and_keeps_what_was_said(tiny_folder: Path) -> None:
    parlour = Parlour(str(tiny_folder), "fp32", Decoding(400))
    steps = parlour.say("", "The sea is wide.")
    for told, _ in steps:
        if told[-1]["role"] == "assistant":
            break
    parlour.stop()
    told, figures = list(steps)[-1]
    assert told[-1]["role"] == "assistant"
    assert figures["tokens"] < 300
    assert parlour.history == told
    parlour.close()


def test_stop_while_a_document_is_read_takes_everything_back(
    parlour: Parlour, speech: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    parlour.load()
    session = parlour._session

    def slow(document: str) -> int:
        while not session._halt.wait(0.01):
            pass
        raise InterruptedError("stopped while reading")

    monkeypatch.setattr(session, "read", slow)
    monkeypatch.setattr(chatting, "_BEAT", 0.01)
    steps = parlour.say(speech, "Who?")
    told, figures = next(steps)
    assert "[speech …]" in told[-1]["content"]
    assert "tokens_read" in figures
    parlour.stop()
    assert list(steps)[-1] == ([], {"note": "Stopped."})
    monkeypatch.undo()
    assert len(list(parlour.say(speech, "Who?"))[-1][0]) == 3


def test_whoever_leaves_stops_the_answer(tiny_folder: Path) -> None:
    parlour = Parlour(str(tiny_folder), "fp32", Decoding(400))
    steps = parlour.say("", "The sea is wide.")
    for told, _ in steps:
        if told[-1]["role"] == "assistant":
            break
    steps.close()
    # The next one does not wait for 400 tokens, and what was said is a part of the conversation.
    told = list(parlour.say("", "And now?"))
    assert len(told[-1][0]) == 4
    assert parlour._session.figures()["tokens"] < 512
    parlour.close()


def test_long_messages_are_shown_in_short(parlour: Parlour) -> None:
    told = list(parlour.say("", "sea " * 200))[-1][0]
    assert told[0]["content"].endswith("… (800 characters)")
    assert len(told[0]["content"]) < 650


def test_needles_come_one_by_one_until_every_place_is_asked(parlour: Parlour, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("longllm.evals.haystack.read_haystack", lambda *_: Haystack("sea", SPEECH * 20))
    records = list(parlour.needles([1500, 1200], 2))
    counts = [len(record["cells"]) for record in records]
    assert counts == sorted(counts)
    last = records[-1]
    assert last["lengths"] == (1200, 1500)
    asked = {(cell["kind"], cell["length"], cell["depth"]) for cell in last["cells"]}
    assert {place for place in asked if place[0] == "needle"} == {
        ("needle", length, depth) for length in (1200, 1500) for depth in (0, 100)
    }
    assert len(last["cells"]) == 6
    assert last["now"] == {}
    assert any(record["now"].get("question") for record in records)
    with pytest.raises(ValueError, match="at least one length"):
        list(parlour.needles([], 2))
    with pytest.raises(ValueError, match="needs at least"):
        list(parlour.needles([100], 2))


def test_a_needle_test_is_stopped_and_keeps_what_it_found(parlour: Parlour, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("longllm.evals.haystack.read_haystack", lambda *_: Haystack("sea", SPEECH * 20))
    records = []
    for record in parlour.needles([1200, 1500], 5):
        records.append(record)
        if len(record["cells"]) == 1:
            parlour.stop()
    assert 1 <= len(records[-1]["cells"]) <= 3
    assert records[-1]["now"] == {}


def test_the_default_is_a_shipped_adapter_if_there_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("longllm.shipped.names", lambda: ("other-7b", "smollm2-135m-32k"))
    assert chat_model() == "smollm2-135m-32k"
    monkeypatch.setattr("longllm.shipped.names", lambda: ())
    assert chat_model() == "smollm2-135m-instruct"
