"""The page in a real browser: nothing is asked of a network, nothing fails, everything is drawn and reachable."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from selenium.webdriver.support.ui import WebDriverWait

from mimscale.__main__ import main
from tests.report import folders

pytestmark = pytest.mark.slow
READY = "return document.documentElement.dataset.ready === 'yes' && Bokeh.index.roots.every((view) => view.is_idle)"
FIGURES = "Bokeh.documents.flatMap((each) => each.roots())"


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    missing = [name for name in ("chromium", "chromedriver") if shutil.which(name) is None]
    if missing:
        pytest.skip(f"{', '.join(missing)} not on this machine; tests/run.sh installs Chromium where it may")
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = str(shutil.which("chromium"))
    for word in ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"):
        options.add_argument(word)  # root has no sandbox
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options, webdriver.ChromeService(shutil.which("chromedriver")))
    yield driver
    driver.quit()


def opened(browser: Any, page: Path, width: int) -> None:
    """Wait until the page is drawn. No line of its console is an error, and it asked for nothing but itself."""
    metrics = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 500}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    browser.get(page.as_uri())
    WebDriverWait(browser, 120).until(lambda driver: driver.execute_script(READY))
    assert [line for line in browser.get_log("browser") if line["level"] not in ("INFO", "DEBUG")] == []
    messages = [json.loads(line["message"])["message"] for line in browser.get_log("performance")]
    asked = {m["params"]["request"]["url"] for m in messages if m["method"] == "Network.requestWillBeSent"}
    assert {url for url in asked if not url.startswith("data:")} == {page.as_uri()}


def test_two_runs_and_hostile_names(browser: Any, tmp_path: Path) -> None:
    good = folders.eventful(tmp_path / "good")
    folders.add_panels(good, 20, 60)
    bad = folders.Folder(tmp_path / "<img src=x onerror=window.broken=1>")
    (bad.path / "config.yaml").write_text(
        json.dumps({"method": {"name": folders.HOSTILE}, folders.HOSTILE: folders.HOSTILE})
    )
    bad.launch(step=0, host=folders.HOSTILE)
    for step in (1, 2, 3):
        bad.step(step, **{folders.HOSTILE: float(step)})
    bad.event(folders.HOSTILE, at=2, why=folders.HOSTILE)
    bad.event("skipped", at=2, why=folders.HOSTILE)
    page = tmp_path / "out.html"
    assert main(["report", str(good.path), str(bad.path), str(page)]) == 0

    opened(browser, page, 390)
    wide = "return document.documentElement.scrollWidth - document.documentElement.clientWidth"
    assert browser.execute_script(wide) == 0
    opened(browser, page, 1280)
    assert browser.execute_script("return window.broken") is None
    assert folders.HOSTILE in browser.find_element("tag name", "main").text
    images = browser.find_elements("tag name", "img")
    assert len(images) == 3 + 2 * 2  # input, mask and reconstruction do not change
    assert all(i.get_attribute("alt") and i.size["width"] > 100 for i in images)
    undrawn = f"return {FIGURES}.filter((f) => !(f.inner_width > 100 && f.inner_height > 30)).length"
    assert browser.execute_script(undrawn) == 0

    fields = f"return [...new Set({FIGURES}.flatMap((f) => f.renderers.map((r) => r.glyph.x.field)))]"
    assert browser.execute_script(fields) == ["step"]
    first = browser.find_element("css selector", "input[value=step]")
    first.send_keys("\ue014\ue014")  # the arrow key, twice: from steps to hours
    assert browser.execute_script(fields) == ["hours"]
    end = browser.execute_script(f"return {FIGURES}[1].x_range.end")
    browser.find_element("css selector", "input[name=to]").send_keys("\ue012")  # arrow left: one percent less
    assert browser.execute_script(f"return {FIGURES}[1].x_range.end") < end
    assert [line for line in browser.get_log("browser") if line["level"] not in ("INFO", "DEBUG")] == []

    axis = f"return [...{FIGURES}[1].references()].find((m) => m.type === 'LinearAxis').major_label_text_color"
    light = browser.execute_script(axis)
    features = [{"name": "prefers-color-scheme", "value": "dark"}]
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
    WebDriverWait(browser, 60).until(lambda driver: driver.execute_script(axis) != light)
