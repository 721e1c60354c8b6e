"""A real Chromium, and somebody who uses a page in it."""

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

CHROMIUM = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
SCREENSHOTS = Path(__file__).parents[2] / "out" / "screenshots"
SHIP = (
    "# The good ship Union\n\nThe good ship Union left Boston on 3 May 1921 under Captain Mary Webster. "
    "She carried tea and silk, and reached London after nineteen days.\n"
)


class Visitor:
    """Somebody at the page: types, presses, reads."""

    def __init__(self, driver: Chrome, address: str, landmark: str) -> None:
        self.driver, self.address, self.landmark = driver, address, landmark

    def arrive(self, width: int = 1280, dark: bool = False) -> None:
        """Open the page in a window of some width, by day or by night."""
        scheme = [{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]
        self.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": scheme})
        window = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False}
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", window)
        self.driver.get(self.address)
        self.wait(lambda: self.field(self.landmark).is_displayed())

    def wait(self, condition: Any, seconds: float = 120) -> None:
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

    def press(self, name: str) -> None:
        self.driver.find_element(By.XPATH, f"//button[normalize-space()='{name}']").click()

    @property
    def figures(self) -> str:
        return self.driver.find_element(By.CSS_SELECTOR, ".figures").text

    @property
    def sent(self) -> list[str]:
        """Return the addresses that the browser has asked for since it was asked last."""
        events = [json.loads(entry["message"])["message"] for entry in self.driver.get_log("performance")]
        sent = [event["params"]["request"]["url"] for event in events if event["method"] == "Network.requestWillBeSent"]
        return [url for url in sent if url.startswith(("http", "ws", "//"))]

    @property
    def troubles(self) -> list[str]:
        """Return what the page has complained of; leaving it breaks off the stream of events that it listens to."""
        told = [entry["message"] for entry in self.driver.get_log("browser")]
        return [message for message in told if "AbortError: signal is aborted" not in message]

    def keep(self, name: str) -> None:
        """Save a picture of the whole page."""
        size = self.driver.execute_cdp_cmd("Page.getLayoutMetrics", {})["cssContentSize"]
        options = {"captureBeyondViewport": True, "clip": {**size, "scale": 1}}
        picture = self.driver.execute_cdp_cmd("Page.captureScreenshot", options)
        SCREENSHOTS.mkdir(parents=True, exist_ok=True)
        (SCREENSHOTS / name).write_bytes(base64.b64decode(picture["data"]))


@pytest.fixture
def visitor(request: pytest.FixtureRequest, driver: Chrome, address: str) -> Visitor:
    """Somebody at the module's ``address``; the page is there once its field LANDMARK is."""
    # The browser needs a core too, and threads that wait for one another all wait for the one it takes.
    torch.set_num_threads(1)
    return Visitor(driver, address, request.module.LANDMARK)


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
def ship(tmp_path: Path) -> Path:
    """A short text to upload."""
    file = tmp_path / "ship.md"
    file.write_text(SHIP)
    return file
