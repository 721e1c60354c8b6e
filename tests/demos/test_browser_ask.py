"""The page "Ask a long document" in a real Chromium, with the small real model behind it."""

import base64
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from selenium.webdriver import Chrome, ChromeOptions
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.ui import WebDriverWait

from commands.answering import Desk
from demos.ask_document import build
from demos.serving import served

pytestmark = [
    pytest.mark.browser,
    pytest.mark.real,
    # gradio's own use of pandas
    pytest.mark.filterwarnings("ignore::DeprecationWarning:gradio.queueing"),
]

CHROMIUM = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
SCREENSHOTS = Path(__file__).parents[2] / "out" / "screenshots"
SHIP = (
    "# The good ship Union\n\nThe good ship Union left Boston on 3 May 1921 under Captain Mary Webster. "
    "She carried tea and silk, and reached London after nineteen days.\n"
)


class Visitor:
    """Somebody at the page: types, presses, reads."""

    def __init__(self, driver: Chrome, address: str) -> None:
        self.driver, self.address = driver, address

    def arrive(self, width: int = 1280, dark: bool = False) -> None:
        """Open the page in a window of some width, by day or by night."""
        scheme = [{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]
        self.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": scheme})
        window = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False}
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", window)
        self.driver.get(self.address)
        self.wait(lambda: self.field("Question").is_displayed())

    def wait(self, condition: Any, seconds: float = 60) -> None:
        ignored = [Exception]  # while the page is being drawn, elements come and go
        WebDriverWait(self.driver, seconds, 0.1, ignored).until(lambda _: condition())

    def field(self, label: str) -> Any:
        path = f"//*[normalize-space(text())='{label}']/following::*[self::input or self::textarea][1]"
        return self.driver.find_element(By.XPATH, path)

    def choose(self, label: str, text: str, expected: str) -> None:
        """Type into a drop-down list and take what it then offers first."""
        self.field(label).click()
        self.field(label).send_keys(Keys.CONTROL, "a")
        self.field(label).send_keys(text)
        self.wait(lambda: self.driver.find_element(By.CSS_SELECTOR, "[role=option]").text.endswith(expected))
        self.field(label).send_keys(Keys.ENTER)
        self.wait(lambda: self.field(label).get_attribute("value") == expected)

    def bring(self, file: Path) -> None:
        """Upload a file."""
        self.driver.find_element(By.CSS_SELECTOR, "input[type=file]").send_keys(str(file))
        self.wait(lambda: file.stem in self.driver.find_element(By.CSS_SELECTOR, ".drop").text)

    def ask(self, question: str) -> None:
        self.field("Question").clear()
        self.field("Question").send_keys(question, Keys.ENTER)

    def press(self, name: str) -> None:
        self.driver.find_element(By.XPATH, f"//button[normalize-space()='{name}']").click()

    @property
    def figures(self) -> str:
        return self.driver.find_element(By.CSS_SELECTOR, ".figures").text

    @property
    def answer(self) -> str:
        return self.field("Answer").get_attribute("value")

    def keep(self, name: str) -> None:
        """Save a picture of the whole page."""
        size = self.driver.execute_cdp_cmd("Page.getLayoutMetrics", {})["cssContentSize"]
        options = {"captureBeyondViewport": True, "clip": {**size, "scale": 1}}
        picture = self.driver.execute_cdp_cmd("Page.captureScreenshot", options)
        SCREENSHOTS.mkdir(parents=True, exist_ok=True)
        (SCREENSHOTS / name).write_bytes(base64.b64decode(picture["data"]))


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    desk = Desk("smollm2-135m-instruct")
    desk.load()
    with served(build(desk)) as url:
        yield url
    desk.close()


@pytest.fixture(scope="module")
def driver(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Chrome]:
    program, helper = next(filter(None, map(shutil.which, CHROMIUM)), None), shutil.which("chromedriver")
    if not program or not helper:
        pytest.skip("needs Chromium and chromedriver: apt-get install chromium chromium-driver")
    options = ChromeOptions()
    options.binary_location = program
    profile = tmp_path_factory.mktemp("profile")
    for word in ("headless=new", "no-sandbox", "disable-dev-shm-usage", f"user-data-dir={profile}", "hide-scrollbars"):
        options.add_argument(f"--{word}")
    options.set_capability("goog:loggingPrefs", {"performance": "ALL", "browser": "SEVERE"})
    # The driver's path is given, and its own downloads are forbidden all the same.
    os.environ["SE_OFFLINE"] = "true"
    started = Chrome(options=options, service=Service(helper))
    yield started
    started.quit()


@pytest.fixture
def visitor(driver: Chrome, address: str) -> Visitor:
    # The browser needs a core too, and threads that wait for one another all wait for the one it takes.
    torch.set_num_threads(1)
    return Visitor(driver, address)


@pytest.fixture
def ship(tmp_path: Path) -> Path:
    """A short text to upload."""
    file = tmp_path / "ship.md"
    file.write_text(SHIP)
    return file


def test_a_document_of_the_catalog_is_asked_by_keyboard_and_nothing_leaves_the_machine(
    visitor: Visitor, driver: Chrome
) -> None:
    visitor.arrive()
    visitor.choose("Document", "1790", "sotu/1790-washington")
    visitor.choose("Method", "streaming", "streaming")
    visitor.ask("Who is the author of this speech?")
    visitor.wait(lambda: "Reading" in visitor.figures or "KV cache" in visitor.figures)
    visitor.wait(lambda: "KV cache" in visitor.figures)
    assert len(visitor.answer) > 5
    for words in ("8.0 times smaller", "State of the Union 1790", "tokens/s", "streaming, ratio 8, original positions"):
        assert words in visitor.figures
    bar = driver.find_element(By.CSS_SELECTOR, ".figures .bar span").size["width"]
    assert bar == pytest.approx(driver.find_element(By.CSS_SELECTOR, ".figures .bar").size["width"] / 8, rel=0.05)
    visitor.keep("ask_light.png")
    # From the question on, the next stop of the keyboard is the button.
    visitor.field("Question").send_keys(Keys.TAB)
    assert driver.switch_to.active_element.text == "Ask"
    assert driver.get_log("browser") == []
    events = [json.loads(entry["message"])["message"] for entry in driver.get_log("performance")]
    sent = [event["params"]["request"]["url"] for event in events if event["method"] == "Network.requestWillBeSent"]
    sent = [url for url in sent if url.startswith(("http", "ws", "//"))]
    assert len(sent) > 10
    assert [url for url in sent if not url.startswith(visitor.address)] == []


def test_an_uploaded_file_is_read_once_for_two_questions(visitor: Visitor, driver: Chrome, ship: Path) -> None:
    visitor.arrive(dark=True)
    visitor.bring(ship)
    visitor.ask("Who was the captain of the Union?")
    visitor.wait(lambda: "KV cache" in visitor.figures)
    assert "Webster" in visitor.answer
    assert "The good ship Union" in visitor.figures
    assert "read before" not in visitor.figures
    visitor.ask("Which goods did the ship carry?")
    visitor.wait(lambda: "read before" in visitor.figures)
    assert "tea" in visitor.answer
    background = driver.execute_script("return getComputedStyle(document.body).backgroundColor")
    assert max(map(int, background.strip("rgb()").split(","))) < 80
    visitor.keep("ask_dark.png")


def test_an_empty_question_is_answered_with_a_hint(visitor: Visitor, driver: Chrome) -> None:
    visitor.arrive(width=420)
    visitor.press("Ask")
    visitor.wait(
        lambda: "Type a question first." in driver.find_element(By.CSS_SELECTOR, "[data-testid=toast-body]").text
    )
    assert visitor.figures == "Type a question first."
    assert visitor.answer == ""
    # A narrow window shows everything without scrolling sideways.
    assert driver.execute_script("return document.documentElement.scrollWidth") <= 420
    visitor.keep("ask_hint.png")


def test_stop_ends_a_long_reading_and_the_next_question_is_answered(visitor: Visitor, ship: Path) -> None:
    visitor.arrive(width=420)
    visitor.choose("Document", "moby", "moby-dick")
    visitor.ask("Who is the captain of the Pequod?")
    visitor.wait(lambda: "of 312," in visitor.figures)
    visitor.press("Stop")
    visitor.wait(lambda: visitor.figures == "Stopped.", 10)
    visitor.bring(ship)
    visitor.ask("Who was the captain of the Union?")
    visitor.wait(lambda: "KV cache" in visitor.figures)
    assert "Webster" in visitor.answer
    visitor.keep("ask_narrow.png")
