"""The page "Chat with a long memory" in a real Chromium, with the small real model behind it."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from selenium.webdriver import Chrome
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys

from commands.chatting import Parlour
from demos.long_chat import build
from demos.serving import served

pytestmark = [
    pytest.mark.browser,
    pytest.mark.real,
    # gradio's own use of pandas
    pytest.mark.filterwarnings("ignore::DeprecationWarning:gradio.queueing"),
]

LANDMARK = "Message"


class SmallParlour(Parlour):
    """Offers texts that a test has time for."""

    lengths = (512, 1024)


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    parlour = SmallParlour("smollm2-135m-instruct")
    parlour.load()
    with served(build(parlour)) as url:
        yield url
    parlour.close()


def say(visitor: Any, message: str) -> None:
    visitor.field("Message").clear()
    visitor.field("Message").send_keys(message, Keys.ENTER)


def conversation(driver: Chrome) -> list[str]:
    """Return what both sides have said."""
    return [entry.text for entry in driver.find_elements(By.CSS_SELECTOR, "[data-testid=user], [data-testid=bot]")]


def test_a_document_is_talked_about_and_stays_when_the_page_is_loaded_anew(
    visitor: Any, driver: Chrome, ship: Path
) -> None:
    visitor.arrive()
    visitor.press("New conversation")
    visitor.bring(ship)
    say(visitor, "Who was the captain of the Union?")
    visitor.wait(lambda: "Conversation" in visitor.figures)
    told = conversation(driver)
    assert len(told) == 3
    assert "The good ship Union" in told[0]
    assert "Webster" in told[2]
    assert visitor.field("Message").get_attribute("value") == ""
    tokens = int(visitor.figures.split("\n")[1].split()[0].replace(",", ""))
    visitor.keep("chat_light.png")
    say(visitor, "Which goods did the ship carry?")
    visitor.wait(lambda: len(conversation(driver)) == 5 and "tea" in conversation(driver)[-1])
    visitor.wait(lambda: int(visitor.figures.split("\n")[1].split()[0].replace(",", "")) > tokens)
    # From the message on, the next stop of the keyboard is the button.
    visitor.field("Message").send_keys(Keys.TAB)
    assert driver.switch_to.active_element.text == "Send"
    visitor.arrive(dark=True)
    visitor.wait(lambda: len(conversation(driver)) == 5 and "of 8,192 tokens" in visitor.figures)
    visitor.keep("chat_dark.png")
    assert visitor.troubles == []
    sent = visitor.sent
    assert len(sent) > 10
    assert [url for url in sent if not url.startswith(visitor.address)] == []


def test_a_mistake_is_told_and_stop_gives_the_message_back(visitor: Any, driver: Chrome) -> None:
    visitor.arrive(width=420)
    visitor.press("New conversation")
    visitor.press("Send")
    visitor.wait(
        lambda: "Type a message first." in driver.find_element(By.CSS_SELECTOR, "[data-testid=toast-body]").text
    )
    visitor.choose("Document", "moby", "moby-dick")
    say(visitor, "Who is the captain of the Pequod?")
    # The whole novel does not fit into the context.
    visitor.wait(lambda: "the context ends at" in visitor.figures)
    assert visitor.field("Message").get_attribute("value") == "Who is the captain of the Pequod?"
    assert driver.execute_script("return document.documentElement.scrollWidth") <= 420
    visitor.keep("chat_narrow.png")
    visitor.choose("Document", "1963-k", "sotu/1963-kennedy")
    say(visitor, "Who gave his life over Cuba?")
    visitor.wait(lambda: "Reading" in visitor.figures)
    visitor.press("Stop")
    visitor.wait(lambda: visitor.figures == "Stopped.", 30)
    assert conversation(driver) == []
    assert visitor.field("Message").get_attribute("value") == "Who gave his life over Cuba?"


def test_the_heat_map_fills_in(visitor: Any, driver: Chrome) -> None:
    visitor.arrive()
    driver.find_element(By.XPATH, "//button[@role='tab'][normalize-space()='Needle test']").click()
    visitor.wait(lambda: driver.find_element(By.XPATH, "//button[normalize-space()='Start the test']").is_displayed())
    visitor.press("Start the test")

    def cells(kind: str) -> int:
        return len(driver.find_elements(By.CSS_SELECTOR, f".heat td.{kind}"))

    visitor.wait(lambda: 0 < cells("found") + cells("missed") < 12)
    visitor.keep("needles_running.png")
    visitor.wait(lambda: cells("found") + cells("missed") == 12, 240)
    # The small model finds most facts in texts of one or two pages.
    assert cells("found") >= 8
    assert "12 found" in driver.find_element(By.CSS_SELECTOR, ".heat").text
    visitor.keep("needles_light.png")
