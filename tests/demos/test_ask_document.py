"""The page "Ask a long document", built and served with a stand-in for the model: what it shows, asks and refuses."""

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

from demos.ask_document import build
from demos.figures import panel
from demos.serving import free_port, served

# gradio's own use of pandas
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:gradio.queueing")

WORDS = ("Ahab", " is the", " captain.")
FIGURES = {
    "title": "Moby-Dick",
    "kv_bytes": 94_371_840,
    "kv_bytes_full": 14_381_600_000,
    "tokens_seen": 312_101,
    "seconds": 674.25,
    "reading_seconds": 670.0,
    "tokens_per_second": 21.5,
    "plan": "spotlight, 2,048 slots a layer, compact positions",
    "steered": True,
}


class FakeDesk:
    """Answers every question with WORDS and FIGURES, unless the question says otherwise."""

    documents = ("moby-dick", "sotu/1963-kennedy")
    methods = ("auto", "spotlight", "a-method-of-tomorrow")
    unrated = ("auto",)

    def __init__(self) -> None:
        self.asked: list[tuple[Any, ...]] = []
        self.closed, self.stopped = threading.Event(), threading.Event()

    def __call__(self, *asked: Any) -> Iterator[tuple[str, dict[str, Any] | None]]:
        self.asked.append(asked)
        question = asked[3]
        if question == "refuse":
            raise ValueError("no <document> of that name")
        try:
            yield "", {"tokens_read": 1000, "tokens_seen": 4000, "seconds": 0.5}
            while question == "forever" and not self.stopped.is_set():
                time.sleep(0.02)
                yield "", None
            for count in range(1, len(WORDS) + 1):
                yield "".join(WORDS[:count]), None
            yield "".join(WORDS), FIGURES
        finally:
            self.closed.set()

    def stop(self) -> None:
        self.stopped.set()


@pytest.fixture(scope="module")
def desk() -> FakeDesk:
    return FakeDesk()


@pytest.fixture(scope="module")
def address(desk: FakeDesk) -> Iterator[str]:
    """The address of the served page."""
    with served(build(desk)) as url:
        yield url


@pytest.fixture(scope="module")
def client(address: str, tmp_path_factory: pytest.TempPathFactory) -> Client:
    return Client(
        address, verbose=False, download_files=str(tmp_path_factory.mktemp("downloads")), analytics_enabled=False
    )


def ask(client: Client, question: str, file: Any = None, method: str = "spotlight") -> list[tuple[str, str]]:
    """Ask as the page does; return all it shows, one after the other."""
    job = client.submit("moby-dick", file, method, 4, False, question, api_name="/ask")
    job.result(timeout=20)
    return job.outputs()


def test_the_answer_streams_and_ends_with_its_figures(client: Client, desk: FakeDesk) -> None:
    shown = ask(client, "Who is the captain?")
    assert desk.asked[-1] == ("moby-dick", "spotlight", 4, "Who is the captain?", False)
    texts = [text for text, _ in shown]
    assert list(dict.fromkeys(text for text in texts if text)) == ["Ahab", "Ahab is the", "Ahab is the captain."]
    assert "<strong>1,000</strong> of 4,000 tokens" in shown[0][1]
    assert shown[-1][1] == panel(FIGURES)


def test_an_uploaded_file_goes_before_the_catalog(client: Client, desk: FakeDesk, tmp_path: Path) -> None:
    file = tmp_path / "whale.txt"
    file.write_text("Call me Ishmael.")
    ask(client, "Who?", handle_file(str(file)))
    given = Path(desk.asked[-1][0])
    assert (given.name, given.read_text()) == ("whale.txt", "Call me Ishmael.")


def test_a_mistake_is_one_line_without_traceback(client: Client, capfd: pytest.CaptureFixture[str]) -> None:
    job = client.submit("moby-dick", None, "auto", 4, False, "refuse", api_name="/ask")
    with pytest.raises(AppError, match=r"^no &lt;document&gt; of that name$"):
        job.result(timeout=20)
    assert job.outputs()[-1][1] == panel({"note": "no <document> of that name"})
    out, error = capfd.readouterr()
    assert "Traceback" not in out + error


def test_stop_reaches_what_answers(client: Client, desk: FakeDesk) -> None:
    desk.stopped.clear()
    job = client.submit("moby-dick", None, "auto", 4, False, "forever", api_name="/ask")
    with pytest.raises(TimeoutError):
        job.result(timeout=0.5)
    client.predict(api_name="/stop")
    job.result(timeout=10)


def test_whoever_leaves_closes_what_answers(client: Client, desk: FakeDesk) -> None:
    desk.closed.clear()
    desk.stopped.clear()
    job = client.submit("moby-dick", None, "auto", 4, False, "forever", api_name="/ask")
    deadline = time.monotonic() + 10
    while not job.outputs() and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not desk.closed.is_set()
    job.cancel()
    assert desk.closed.wait(10)
    # and the next question is not kept waiting
    assert ask(client, "Who is the captain?")[-1][0] == "".join(WORDS)


@pytest.mark.parametrize(
    ("name", "file"),
    [(__file__, None), ("moby-dick", {"path": __file__, "meta": {"_type": "gradio.FileData"}})],
)
def test_files_of_this_machine_are_not_to_be_had_by_name(address: str, desk: FakeDesk, name: str, file: Any) -> None:
    before = len(desk.asked)
    given = {"data": [name, file, "auto", 4, False, "What is in it?"]}
    call = f"{address}gradio_api/call/ask"
    number = httpx.post(call, json=given).json()["event_id"]
    assert "event: error" in httpx.get(f"{call}/{number}", timeout=20).text
    assert len(desk.asked) == before
    # The same call without a file of this machine is answered.
    number = httpx.post(call, json={"data": ["moby-dick", None, *given["data"][2:]]}).json()["event_id"]
    assert "event: complete" in httpx.get(f"{call}/{number}", timeout=20).text


def test_other_kinds_of_files_are_refused(client: Client, desk: FakeDesk, tmp_path: Path) -> None:
    file = tmp_path / "whale.exe"
    file.write_bytes(b"MZ")
    before = len(desk.asked)
    with pytest.raises(AppError, match=r"\.pdf"):
        ask(client, "What is in it?", handle_file(str(file)))
    assert len(desk.asked) == before


def test_the_ratio_is_offered_to_methods_that_know_one(client: Client) -> None:
    assert client.predict("auto", api_name="/rated")["interactive"] is False
    assert client.predict("a-method-of-tomorrow", api_name="/rated")["interactive"] is True


def test_the_page_offers_what_the_desk_offers_and_every_event_has_a_name() -> None:
    page = build(FakeDesk())
    config = page.get_config_file()
    parts = {part["props"].get("label"): part["props"] for part in config["components"] if part["props"].get("label")}
    assert [choice[0] for choice in parts["Method"]["choices"]] == list(FakeDesk.methods)
    assert [choice[0] for choice in parts["Document"]["choices"]] == list(FakeDesk.documents)
    assert parts["Document"]["value"] == "sotu/1963-kennedy"
    assert (parts["Ratio"]["minimum"], parts["Ratio"]["maximum"]) == (1, 32)
    assert {"Question", "Answer", "What it cost"} <= parts.keys()
    assert sorted(event["api_name"] for event in config["dependencies"]) == ["ask", "rated", "stop"]
    # Enter in the question box asks, as the button does.
    (asks,) = [event for event in config["dependencies"] if event["api_name"] == "ask"]
    assert {trigger for _, trigger in asks["targets"]} == {"submit", "click"}
    assert not page.analytics_enabled


def test_nothing_is_loaded_from_elsewhere(address: str) -> None:
    assert address.startswith("http://127.0.0.1:")
    page = httpx.get(address)
    addresses = re.findall(r"(?:https?:)?//[\w.-]+\.[a-z0-9]+", page.text)
    assert {found.split("//")[1] for found in addresses} == {"127.0.0.1"}
    policy = page.headers["content-security-policy"]
    assert "default-src 'self'" in policy
    assert "http" not in policy
    styles = httpx.get(f"{address}theme.css").text
    assert not re.findall(r"url\(['\"]?https?:", styles)


def test_a_request_in_the_name_of_another_host_is_refused(address: str) -> None:
    assert httpx.get(address, headers={"host": "example.org"}).status_code == 400


def test_uploads_have_a_limit(address: str) -> None:
    upload = f"{address}gradio_api/upload"
    assert httpx.post(upload, files={"files": ("book.txt", b"x" * 1000)}).status_code == 200
    assert httpx.post(upload, files={"files": ("book.txt", b"x" * 21_000_000)}, timeout=30).status_code == 413


def test_a_port_that_is_taken_is_named(address: str) -> None:
    port = int(address.rstrip("/").rpartition(":")[2])
    with pytest.raises(OSError, match=rf"port {port} .*--port"):
        free_port(port)


def test_the_panel_shows_the_pair_the_bar_and_the_plan() -> None:
    shown = panel({**FIGURES, "kv_bytes": 25_000_000, "kv_bytes_full": 100_000_000, "title": "<script>"})
    assert "<strong>25.0 MB</strong> of 100.0 MB" in shown
    assert "width:25.0%" in shown
    assert "4.0 times smaller" in shown
    for figure in ("312,101", "674.2", "670.0 reading", "21.5", FIGURES["plan"] + ", kept with the question in mind"):
        assert str(figure) in shown
    assert "<script>" not in shown
    plain = panel({**FIGURES, "kv_bytes": 10, "kv_bytes_full": 10, "steered": False, "stopped": False, "new_tokens": 9})
    assert "nothing left out" in plain
    assert "question in mind" not in plain
    assert "cut off after 9 tokens" in plain


def test_a_warning_stands_in_the_panel_while_the_document_is_read() -> None:
    assert "too many slots" in panel({"tokens_seen": 9, "tokens_read": 3, "seconds": 1.0, "warning": "too many slots"})
