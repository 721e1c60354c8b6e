"""The page "Ask a long document" in a real Chromium, with the small real model behind it."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from selenium.webdriver import Chrome
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys

from commands.answering import Desk
from demos.ask_document import build
from demos.serving import served

pytestmark = [
    pytest.mark.browser,
    pytest.mark.real,
    # gradio's own use of pandas
    pytest.mark.filterwarnings("ignore::DeprecationWarning:gradio.queueing"),
]

LANDMARK = "Question"


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    desk = Desk("smollm2-135m-instruct")
    desk.load()
    with served(build(desk)) as url:
        yield url
    desk.close()


def answer(visitor: Any) -> str:
    return visitor.field("Answer").get_attribute("value")


def ask(visitor: Any, question: str) -> None:
    visitor.field("Question").clear()
    visitor.field("Question").send_keys(question, Keys.ENTER)


def test_a_document_of_the_catalog_is_asked_by_keyboard_and_nothing_leaves_the_machine(
    visitor: Any, driver: Chrome
) -> None:
    visitor.arrive()
    visitor.choose("Document", "1790", "sotu/1790-washington")
    visitor.choose("Method", "streaming", "streaming")
    ask(visitor, "Who is the author of this speech?")
    visitor.wait(lambda: "Reading" in visitor.figures or "KV cache" in visitor.figures)
    visitor.wait(lambda: "KV cache" in visitor.figures)
    assert len(answer(visitor)) > 5
    for words in ("8.0 times smaller", "State of the Union 1790", "tokens/s", "streaming, ratio 8, original positions"):
        assert words in visitor.figures
    bar = driver.find_element(By.CSS_SELECTOR, ".figures .bar span").size["width"]
    assert bar == pytest.approx(driver.find_element(By.CSS_SELECTOR, ".figures .bar").size["width"] / 8, rel=0.05)
    visitor.keep("ask_light.png")
    # From the question on, the next stop of the keyboard is the button.
    visitor.field("Question").send_keys(Keys.TAB)
    assert driver.switch_to.active_element.text == "Ask"
    assert visitor.troubles == []
    sent = visitor.sent
    assert len(sent) > 10
    assert [url for url in sent if not url.startswith(visitor.address)] == []


def test_an_uploaded_file_is_read_once_for_two_questions(visitor: Any, driver: Chrome, ship: Path) -> None:
    visitor.arrive(dark=True)
    visitor.bring(ship)
    ask(visitor, "Who was the captain of the Union?")
    visitor.wait(lambda: "KV cache" in visitor.figures)
    assert "Webster" in answer(visitor)
    assert "The good ship Union" in visitor.figures
    assert "read before" not in visitor.figures
    ask(visitor, "Which goods did the ship carry?")
    visitor.wait(lambda: "read before" in visitor.figures)
    assert "tea" in answer(visitor)
    background = driver.execute_script("return getComputedStyle(document.body).backgroundColor")
    assert max(map(int, background.strip("rgb()").split(","))) < 80
    visitor.keep("ask_dark.png")


def test_an_empty_question_is_answered_with_a_hint(visitor: Any, driver: Chrome) -> None:
    visitor.arrive(width=420)
    visitor.press("Ask")
    visitor.wait(
        lambda: "Type a question first." in driver.find_element(By.CSS_SELECTOR, "[data-testid=toast-body]").text
    )
    assert visitor.figures == "Type a question first."
    assert answer(visitor) == ""
    # A narrow window shows everything without scrolling sideways.
    assert driver.execute_script("return document.documentElement.scrollWidth") <= 420
    visitor.keep("ask_hint.png")


def test_stop_ends_a_long_reading_and_the_next_question_is_answered(visitor: Any, ship: Path) -> None:
    visitor.arrive(width=420)
    visitor.choose("Document", "moby", "moby-dick")
    ask(visitor, "Who is the captain of the Pequod?")
    visitor.wait(lambda: "of 312," in visitor.figures)
    visitor.press("Stop")
    visitor.wait(lambda: visitor.figures == "Stopped.", 10)
    visitor.bring(ship)
    ask(visitor, "Who was the captain of the Union?")
    visitor.wait(lambda: "KV cache" in visitor.figures)
    assert "Webster" in answer(visitor)
    visitor.keep("ask_narrow.png")
