"""The page "Chat with a long memory", built and served with a stand-in for the model: what it shows and refuses."""

import re
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from gradio_client import Client, handle_file
from gradio_client.exceptions import AppError

from demos.chat_figures import fill, heat
from demos.long_chat import build
from demos.serving import served

# gradio's own use of pandas
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:gradio.queueing")

FIGURES = {
    "model": "smollm2-<b>",
    "tokens": 8192,
    "limit": 32768,
    "kv_bytes": 94_371_840,
    "tokens_per_second": 21.5,
    "seconds": 3.25,
    "warning": None,
}
CELLS = [
    {"kind": "needle", "length": 1024, "depth": 0, "question": "Who?", "answer": "<i>Ahab", "right": True},
    {"kind": "needle", "length": 1024, "depth": 100, "question": "What?", "answer": "No idea.", "right": False},
    {"kind": "passkey", "length": 1024, "depth": 100, "question": "Which digits?", "answer": "12345", "right": True},
]
RECORD = {"lengths": (1024, 2048), "depths": (0, 100), "cells": CELLS, "now": {}}


class FakeParlour:
    """Answers every message by repeating it, and every needle as CELLS do."""

    documents = ("moby-dick", "sotu/1963-kennedy")
    lengths = (1024, 2048, 4096)

    def __init__(self) -> None:
        self.history: list[dict[str, str]] = []
        self.said: list[tuple[str, str]] = []
        self.tested: list[tuple[list[int], int]] = []
        self.stopped = threading.Event()

    def say(self, document: str, message: str) -> Iterator[tuple[list[dict[str, str]], dict[str, Any]]]:
        self.said.append((document, message))
        if message == "refuse":
            raise ValueError("no <room> for it")
        asked = [*self.history, {"role": "user", "content": message}]
        yield asked, {"tokens_read": 100, "tokens_seen": 400, "seconds": 1.0}
        while message == "forever":
            time.sleep(0.02)
            if self.stopped.is_set():
                yield self.history, {"note": "Stopped."}
                return
            yield asked, {}
        self.history = [*asked, {"role": "assistant", "content": f"You said: {message}"}]
        yield self.history, FIGURES

    def needles(self, lengths: list[int], depths: int) -> Iterator[dict[str, Any]]:
        self.tested.append((lengths, depths))
        if not lengths:
            raise ValueError("Choose at least one length first.")
        for count in range(len(CELLS) + 1):
            now = {key: CELLS[count][key] for key in ("kind", "length", "depth", "question")} if count < 3 else {}
            yield {**RECORD, "cells": CELLS[:count], "now": now}

    @property
    def figures(self) -> dict[str, Any]:
        return FIGURES if self.history else {}

    def reset(self) -> list[dict[str, str]]:
        self.history = []
        return []

    def stop(self) -> None:
        self.stopped.set()


@pytest.fixture(scope="module")
def parlour() -> FakeParlour:
    return FakeParlour()


@pytest.fixture(scope="module")
def client(parlour: FakeParlour, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Client]:
    """A client of the served page."""
    folder = str(tmp_path_factory.mktemp("downloads"))
    with served(build(parlour)) as url:
        yield Client(url, verbose=False, download_files=folder, analytics_enabled=False)


@pytest.fixture(autouse=True)
def fresh(parlour: FakeParlour) -> None:
    parlour.history = []
    parlour.stopped.clear()


def texts(talk: list[dict[str, Any]]) -> list[tuple[str, str]]:
    """Return who said what; gradio may send a text as a part of a message."""

    def text(content: Any) -> str:
        return content if isinstance(content, str) else content[0]["text"]

    return [(entry["role"], text(entry["content"])) for entry in talk]


def test_a_message_is_answered_the_box_emptied_and_the_context_shown(client: Client, parlour: FakeParlour) -> None:
    job = client.submit("moby-dick", None, "Who is the captain?", api_name="/say")
    talk, box, memory = job.result(timeout=20)
    assert parlour.said[-1] == ("moby-dick", "Who is the captain?")
    assert texts(talk) == [("user", "Who is the captain?"), ("assistant", "You said: Who is the captain?")]
    assert box == ""
    assert memory == fill(FIGURES)
    assert "<strong>100</strong> of 400 tokens" in job.outputs()[0][2]
    # The conversation goes on, and is there again after the page was loaded anew.
    client.predict("moby-dick", None, "And then?", api_name="/say")
    assert [who for who, _ in texts(client.predict(api_name="/history")[0])] == ["user", "assistant"] * 2
    assert client.predict(api_name="/history")[1] == fill(FIGURES)
    assert client.predict(api_name="/new")[0] == []
    assert client.predict(api_name="/history")[0] == []


def test_an_uploaded_file_goes_before_the_catalog(client: Client, parlour: FakeParlour, tmp_path: Path) -> None:
    file = tmp_path / "whale.txt"
    file.write_text("Call me Ishmael.")
    client.predict("moby-dick", handle_file(str(file)), "Who?", api_name="/say")
    given = Path(parlour.said[-1][0])
    assert (given.name, given.read_text()) == ("whale.txt", "Call me Ishmael.")


def test_a_mistake_is_one_line_and_the_message_stays_in_the_box(
    client: Client, capfd: pytest.CaptureFixture[str]
) -> None:
    job = client.submit("", None, "refuse", api_name="/say")
    with pytest.raises(AppError, match=r"^no &lt;room&gt; for it$"):
        job.result(timeout=20)
    assert job.outputs()[-1] == ([], "refuse", fill({"note": "no <room> for it"}))
    out, error = capfd.readouterr()
    assert "Traceback" not in out + error


def test_stop_reaches_who_answers_and_gives_the_message_back(client: Client) -> None:
    job = client.submit("", None, "forever", api_name="/say")
    with pytest.raises(TimeoutError):
        job.result(timeout=0.5)
    client.predict(api_name="/stop")
    assert job.result(timeout=10) == ([], "forever", fill({"note": "Stopped."}))


def test_the_heat_map_fills_in_while_the_test_runs(client: Client, parlour: FakeParlour) -> None:
    job = client.submit([1024, 2048], 2, api_name="/needles")
    job.result(timeout=20)
    assert parlour.tested[-1] == ([1024, 2048], 2)
    shown = job.outputs()
    marks = [(it.count("✓"), it.count("✗"), it.count("…")) for it in shown]
    assert marks[0] == (0, 0, 1)
    assert marks[-1] == (2, 1, 0)
    assert marks == sorted(marks, key=lambda mark: mark[0] + mark[1])
    with pytest.raises(AppError, match="at least one length"):
        client.predict([], 2, api_name="/needles")


def test_the_page_offers_what_there_is_and_every_event_has_a_name() -> None:
    config = build(FakeParlour()).get_config_file()
    parts = {part["props"].get("label"): part["props"] for part in config["components"] if part["props"].get("label")}
    assert [choice[1] for choice in parts["Document"]["choices"]] == ["", *FakeParlour.documents]
    assert parts["Document"]["value"] == ""
    assert [tuple(choice) for choice in parts["Lengths"]["choices"]] == [("1K", 1024), ("2K", 2048), ("4K", 4096)]
    # What is chosen beforehand is small enough for a laptop.
    assert parts["Lengths"]["value"] == [1024, 2048]
    assert {"Conversation", "Message", "Memory", "Found"} <= parts.keys()
    names = sorted(event["api_name"] for event in config["dependencies"])
    assert names == ["history", "needles", "new", "say", "stop", "stop_test"]
    (says,) = [event for event in config["dependencies"] if event["api_name"] == "say"]
    assert {trigger for _, trigger in says["targets"]} == {"submit", "click"}
    # The bin of the conversation forgets it too, rather than only hiding it.
    (new,) = [event for event in config["dependencies"] if event["api_name"] == "new"]
    assert {trigger for _, trigger in new["targets"]} == {"click", "clear"}


def test_nothing_is_loaded_from_elsewhere(client: Client) -> None:
    page = httpx.get(client.src)
    addresses = re.findall(r"(?:https?:)?//[\w.-]+\.[a-z0-9]+", page.text)
    assert {found.split("//")[1] for found in addresses} == {"127.0.0.1"}
    assert "default-src 'self'" in page.headers["content-security-policy"]


def test_the_panel_shows_how_full_the_context_is() -> None:
    shown = fill(FIGURES)
    for part in ("<strong>8,192</strong> of 32,768 tokens", "width:25.0%", "94.4 MB", "21.5", "smollm2-&lt;b&gt;"):
        assert part in shown
    assert "warning" not in shown
    warned = fill({**FIGURES, "warning": "the prompt has 9,000 tokens"})
    assert 'role="alert">the conversation has 9,000 tokens' in warned


def test_the_heat_map_marks_each_place_and_escapes_what_models_say() -> None:
    shown = heat(RECORD)
    rows = re.findall(r"<tr>.*?</tr>", shown)
    assert len(rows) == 4
    assert "1,024" in rows[0]
    assert [("✓" in row, "✗" in row) for row in rows[1:]] == [(True, False), (False, True), (True, False)]
    assert "2 of 3 found" in shown
    assert "<i>" not in shown
    asked = heat({**RECORD, "now": {"kind": "passkey", "length": 2048, "depth": 0, "question": "?"}, "seconds": 7.2})
    assert asked.count('class="asked"') == 1
    assert asked.index('class="asked"') > asked.index("pass key")
    assert "7 s so far" in asked
