"""The tour: a page that stands alone, plots that follow the page's colours, and the whole of it on real data."""

import json
import re
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

import catalog
import longllm
import longscope
from commands.tour_long_document import QUESTIONS, SPEECH, holds
from commands.tour_novel import NOVEL, PLANTED, PLOT, novel
from commands.tour_page import Answer, Chapter, Plot, Table, render
from commands.tour_plot import bars, curves

VOID = {"meta", "br", "hr", "img", "link"}


class Page(HTMLParser):
    """Reads a page; remembers its texts, what it refers to, and tags that do not match."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.wrong: list[str] = []
        self.links: list[str] = []
        self.texts: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.links += [value or "" for name, value in attrs if name in ("href", "src", "xlink:href")]
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if not self.open or self.open.pop() != tag:
            self.wrong.append(tag)

    def handle_data(self, data: str) -> None:
        self.texts.append(data)


@pytest.fixture
def page_text(tmp_path: Path) -> str:
    """A page with a block of each kind, and texts that would break it if they were not escaped."""
    svg = bars(["read & wait", "ask"], {"seconds": [3.0, 0.25], "MB": [9.0, 9.5]}, tmp_path / "runs")
    blocks = [
        Answer("Who <b>?", 'It\'s "she" & <script>alert(1)</script>', "passage", False, "0.3 s"),
        Table("All", ("run", "verdict", "answer"), [("one", "found", "<i>"), ("two", "not found", "")], prose="answer"),
        Plot("The same", svg, ("runs.png",)),
    ]
    return render("A <tour>", "lead", {"model": "a & b"}, [Chapter("One & all", "lead", blocks)], ["longscope models"])


def test_the_page_is_well_formed_and_loads_nothing(page_text: str) -> None:
    page = Page(page_text)
    assert (page.wrong, page.open) == ([], [])
    assert {"main", "header", "footer", "section", "article", "table", "caption", "figure"} <= set(page.tags)
    assert "script" not in page.tags
    assert {link for link in page.links if not link.startswith("#")} == {"runs.png", "tour.json"}
    assert not re.search(r"url\(\s*['\"]?https?:|@import", page_text)
    for wanted in ("width=device-width", "prefers-color-scheme: dark", 'lang="en"'):
        assert wanted in page_text


def test_the_page_shows_texts_as_they_are(page_text: str) -> None:
    shown = " ".join(Page(page_text).texts)
    for text in ("Who <b>?", 'It\'s "she" & <script>alert(1)</script>', "A <tour>", "One & all", "a & b", "not found"):
        assert text in shown


LINES = {"ours, measured": [(1, 2.0), (8, 3.0)], "full, measured": [(1, 1.0)], "full, computed": [(8, 9.0)]}


@pytest.mark.parametrize(
    "draw",
    [
        lambda file: bars(["one", "two"], {"seconds": [3.0, 0.25]}, file),
        lambda file: curves({"seconds": LINES, "MB": LINES}, "tokens", file),
    ],
    ids=["bars", "curves"],
)
def test_plots_are_written_and_follow_the_pages_colours(tmp_path: Path, draw: Any) -> None:
    inline = draw(tmp_path / "runs")
    assert (tmp_path / "runs.png").read_bytes().startswith(b"\x89PNG")
    ElementTree.parse(tmp_path / "runs.svg")
    root = ElementTree.fromstring(inline)
    assert "viewBox" in root.attrib
    assert "width" not in root.attrib
    assert "currentColor" in inline
    assert "currentColor" not in (tmp_path / "runs.svg").read_text()


def test_without_matplotlib_the_tour_says_what_to_install_before_it_begins(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert longscope.main(["tour", "--out", str(tmp_path / "tour")]) == 2
    out, error = capsys.readouterr()
    assert (out, error.count("\n")) == ("", 1)
    assert "longscope[eval]" in error
    assert not (tmp_path / "tour").exists()


@pytest.mark.real
def test_the_speech_says_what_the_tour_claims_it_says() -> None:
    text = catalog.read_document(SPEECH).text
    for question in QUESTIONS:
        assert question.passage in text
        assert holds(question.passage, question.fact)
        assert not holds(question.text, question.fact)


@pytest.mark.real
def test_the_novel_says_what_the_tour_claims_and_nothing_of_what_is_planted() -> None:
    text = " ".join(catalog.read_document(NOVEL).text.split())
    for question in PLOT:
        assert question.passage in text
    for planted in PLANTED:
        assert planted.sentence not in text
        assert planted.fact in planted.sentence


@pytest.mark.real
def test_the_whole_tour_on_real_data_and_a_tiny_model(tiny_folder: Path, tmp_path: Path, door: Any) -> None:
    out = tmp_path / "tour"
    given = ("--out", out, "--model", tiny_folder, "--dtype", "fp32", "--novel_tokens", "3000")
    given += ("--needle_tokens", "1500")
    done = door("tour", *given, "--json")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("\n") == 1
    record = json.loads(done.stdout)
    kept = json.loads((out / "tour.json").read_text())
    assert kept.items() <= record.items()
    plots = {f"{name}.{ending}" for name in ("runs", "novel") for ending in ("png", "svg")}
    assert {file.name for file in out.iterdir()} == {"index.html", "tour.json", "novel.kv", "extended", *plots}
    short = 1 + len(QUESTIONS) + 6
    runs, memories = kept["runs"][:short], kept["runs"][short : short + 5]
    needles, reading, *asked = kept["runs"][short + 5 :]
    assert (needles["run"], needles["n"]) == ("extended context", 4)
    assert needles["lengths"]["1500"]["passkey"]["right"] == 1
    shape = 2 * 2 * 2 * 8 * 4
    assert all(run["kv_bytes"] == run["tokens_seen"] * shape for run in runs)
    assert [run["slots"] for run in memories] == [0, 3072, 3072 // 2, 3072 // 4, 3072 // 8]
    assert [run["kv_bytes"] for run in memories] == [run["slots"] * shape for run in memories]
    assert all(run["loss"] > 0 for run in memories)
    # The novel: all of it seen, a quarter of the 512 trained tokens kept, six questions on copies of one cache.
    assert reading["ledger"]["tokens_seen"] == [reading["tokens_seen"]]
    assert reading["tokens_seen"] > 3000 > 128 >= reading["ledger"]["layers"][0]["slots"][0]
    assert len(asked) == len(PLANTED) + len(PLOT)
    assert all(run["kv_bytes"] <= 128 * shape for run in asked)
    assert [point[0] for point in reading["progress"]][-1] == reading["tokens_seen"] == reading["full_attention"][-1][0]
    told = list(novel(longllm.load(tiny_folder, dtype="fp32"), out, 3000))
    assert any("read in an earlier run" in piece for piece in told)
    # Read once: each question read only its own tokens.
    assert all(run["tokens_read_now"] < 400 for run in runs[1 : 1 + len(QUESTIONS)])
    page = Page((out / "index.html").read_text(encoding="utf-8"))
    assert (page.wrong, page.open) == ([], [])
    shown = " ".join(page.texts)
    assert all(question.text in shown for question in QUESTIONS)
