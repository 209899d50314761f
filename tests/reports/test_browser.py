"""The page in headless Chromium, opened from disk: its behaviour, without requests and errors."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from reports.read.cited import load_published
from reports.read.collect import collect
from reports.report import Options, write_report
from tests.support.made_runs import end_run, make_run, make_runs, make_spec

pytest.importorskip("selenium", reason="selenium is not installed; `pip install selenium`")
from selenium import webdriver
from selenium.webdriver import ActionChains
from selenium.webdriver.chrome.webdriver import WebDriver
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.remote.webelement import WebElement
from selenium.webdriver.support.select import Select
from selenium.webdriver.support.wait import WebDriverWait

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
DRIVER = shutil.which("chromedriver")
pytestmark = pytest.mark.skipif(
    CHROMIUM is None or DRIVER is None, reason="no Chromium here; `apt-get install chromium chromium-driver`"
)
FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-dev-shm-usage",
    "--disable-background-networking", "--disable-component-update", "--disable-sync", "--window-size=1280,900",
)  # fmt: skip
HOSTILE = "<script>alert(1)</script>"


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three methods with two seeds, one of them without a result; a class and a reason that would be markup."""
    root = tmp_path_factory.mktemp("report")
    make_runs(root / "runs", ["linear", "spm", "full"], classes=[HOSTILE, "sky", "road", "tree"])
    make_run(root / "runs", make_spec("lora", dataset="town"))
    end_run(root / "runs", make_spec("vpt_deep"), "unsupported", HOSTILE)
    write_report(collect(root / "runs"), load_published(), root / "out", Options())
    return root / "out" / "index.html"


@pytest.fixture(scope="module")
def chromium(tmp_path_factory: pytest.TempPathFactory) -> Iterator[WebDriver]:
    options = webdriver.ChromeOptions()
    options.binary_location = str(CHROMIUM)
    for flag in (*FLAGS, f"--user-data-dir={tmp_path_factory.mktemp('profile')}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(executable_path=DRIVER))
    yield driver
    driver.quit()


@pytest.fixture
def page(report: Path, chromium: WebDriver) -> Iterator[WebDriver]:
    """The report, just opened, with an empty profile. At the end of a test, its requests and errors are checked."""
    chromium.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
    scheme(chromium, "light")
    chromium.get("about:blank")
    chromium.get_log("performance"), chromium.get_log("browser")
    chromium.get(report.as_uri())
    until(chromium, lambda: find(chromium, "#scatter a") and find(chromium, "#table a"))  # drawn after the load event
    yield chromium
    chromium.execute_script("localStorage.clear()")
    sent = [json.loads(entry["message"])["message"] for entry in chromium.get_log("performance")]
    requested = [event["params"]["request"]["url"] for event in sent if event["method"] == "Network.requestWillBeSent"]
    assert [url for url in requested if not url.startswith(("data:", report.as_uri()))] == []
    assert [entry["message"] for entry in chromium.get_log("browser")] == []


def scheme(driver: WebDriver, name: str) -> None:
    features = [{"name": "prefers-color-scheme", "value": name}]
    driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})


def find(driver: WebDriver, selector: str) -> list[WebElement]:
    return driver.find_elements(By.CSS_SELECTOR, selector)


def one(driver: WebDriver, selector: str) -> WebElement:
    return driver.find_element(By.CSS_SELECTOR, selector)


def column(driver: WebDriver, name: str) -> list[str]:
    """The visible cells of a column of the table of runs."""
    place = [cell.text for cell in find(driver, "#table thead th")].index(name) + 1
    return [cell.text for cell in find(driver, f"#table tbody tr:not([hidden]) td:nth-child({place})")]


def heading(driver: WebDriver, name: str) -> WebElement:
    (found,) = (cell for cell in find(driver, "#table thead th") if cell.text == name)
    return found


def press(driver: WebDriver, *keys: str) -> None:
    ActionChains(driver).send_keys(*keys).perform()


def until(driver: WebDriver, happened: Callable[[], Any]) -> Any:
    """What follows a link or a resize comes when the browser gets to it."""
    return WebDriverWait(driver, 60).until(lambda _: happened())


def opened(driver: WebDriver) -> WebElement:
    (dialog,) = until(driver, lambda: find(driver, "#run[open]"))
    return dialog


def background(driver: WebDriver) -> str:
    return driver.execute_script("return getComputedStyle(document.body).backgroundColor")


def point(driver: WebDriver, label: str) -> WebElement:
    (found,) = (link for link in find(driver, "#scatter a") if link.get_attribute("aria-label").startswith(f"{label},"))
    return found


def test_page_opens_from_disk_with_every_run(page: WebDriver) -> None:
    assert one(page, "#shown").text == "8 of 8 runs"
    assert len(find(page, "#scatter a")) == 3


def test_names_stay_text(page: WebDriver) -> None:
    assert len(find(page, "script")) == 2
    assert HOSTILE in one(page, "#absent").text


def test_heading_sorts_in_both_directions(page: WebDriver) -> None:
    name = "trained parameters"
    heading(page, name).find_element(By.TAG_NAME, "button").click()
    assert heading(page, name).get_attribute("aria-sort") == "descending"
    assert column(page, name) == ["1,000,000"] * 2 + ["120,000"] + ["35,494"] * 2 + ["0"] * 2 + ["–"]
    heading(page, name).find_element(By.TAG_NAME, "button").click()
    assert heading(page, name).get_attribute("aria-sort") == "ascending"
    assert column(page, name) == ["0"] * 2 + ["35,494"] * 2 + ["120,000"] + ["1,000,000"] * 2 + ["–"]


def test_sorting_from_the_keyboard_with_visible_focus(page: WebDriver) -> None:
    page.execute_script("document.getElementById('filter').focus()")
    while page.switch_to.active_element.text != "method":
        press(page, Keys.TAB)
    outline = page.execute_script("return getComputedStyle(document.activeElement).outlineStyle")
    assert outline == "solid"
    press(page, Keys.ENTER)
    assert column(page, "method") == ["full", "full", "head only", "head only", "lora", "spm", "spm", "vpt_deep"]
    assert page.switch_to.active_element.text == "method"


def test_filter_by_words_and_lists(page: WebDriver) -> None:
    one(page, "#filter").send_keys("meadow 0 ")
    Select(one(page, "#filter-state")).select_by_visible_text("done")
    assert one(page, "#shown").text == f"{len(column(page, 'method'))} of 8 runs"
    assert set(column(page, "dataset")) == {"meadow"} and "vpt_deep" not in column(page, "method")
    one(page, "#filter").send_keys("nothing like it")
    assert one(page, "#shown").text == "0 of 8 runs"


def test_point_opens_its_run_and_escape_closes_it(page: WebDriver) -> None:
    point(page, "spm").send_keys(Keys.ENTER)
    dialog = opened(page)
    assert "#run=" in page.current_url
    assert one(page, "#run-title").text == "spm"
    text = dialog.text
    for expected in ("harness run --from", "spec.yaml", "Spec", "Provenance", "weight_decay", HOSTILE, "truth"):
        assert expected in text
    assert len(find(page, "#run polyline")) == 2
    press(page, Keys.ESCAPE)
    until(page, lambda: not find(page, "#run[open]") and "#run=" not in page.current_url)
    assert page.switch_to.active_element.get_dom_attribute("href") == point(page, "spm").get_dom_attribute("href")


def test_address_of_a_run_opens_it(page: WebDriver, report: Path) -> None:
    run = point(page, "full").get_dom_attribute("href")
    page.get("about:blank")
    page.get(f"{report.as_uri()}{run}")
    assert "seed 0" in opened(page).text and one(page, "#run-title").text == "full"
    one(page, "#run .seeds a:not([aria-current])").click()
    until(page, lambda: "seed 1" in opened(page).text)


def test_samples_are_shown(page: WebDriver) -> None:
    loaded = "return [...document.querySelectorAll('#gallery img')].map(i => i.complete && i.naturalWidth > 0)"
    assert page.execute_script(loaded) == [True] * 2 * 5  # two samples; image, ground truth and three methods


def test_method_without_parameters_is_at_zero(page: WebDriver) -> None:
    places = {link.get_attribute("aria-label").split(",")[0]: link.rect["x"] for link in find(page, "#scatter a")}
    assert places["head only"] < places["spm"] < places["full"]
    assert "0" in [text.text for text in find(page, "#scatter text")]


def test_cost_and_metric_can_be_chosen_and_a_method_hidden(page: WebDriver) -> None:
    Select(one(page, "#at-cost")).select_by_visible_text("peak memory")
    Select(one(page, "#at-metric")).select_by_visible_text("mDice")
    assert one(page, "#scatter svg").get_attribute("aria-label") == "mDice by peak memory"
    (button,) = (one for one in find(page, "#legend button") if one.text == "full")
    button.send_keys(Keys.SPACE)
    assert button.get_attribute("aria-pressed") == "false" and len(find(page, "#scatter a")) == 2


def test_theme_is_the_systems_until_switched(page: WebDriver) -> None:
    light = background(page)
    scheme(page, "dark")
    dark = background(page)
    assert dark != light
    one(page, "#theme").click()
    assert background(page) == light
    page.refresh()
    assert background(page) == light


@pytest.mark.parametrize("name", ["light", "dark"])
def test_text_has_the_contrast_that_wcag_requires(page: WebDriver, name: str) -> None:
    scheme(page, name)
    colours = page.execute_script(
        "const s = getComputedStyle(document.documentElement);"
        "return ['--ink', '--muted', '--paper'].map(v => s.getPropertyValue(v).trim())"
    )
    shares = [np.array([int(colour[at : at + 2], 16) for at in (1, 3, 5)]) / 255 for colour in colours]
    linear = [np.where(share <= 0.04045, share / 12.92, ((share + 0.055) / 1.055) ** 2.4) for share in shares]
    ink, muted, paper = (float(rgb @ [0.2126, 0.7152, 0.0722]) + 0.05 for rgb in linear)
    assert min(max(ink / paper, paper / ink), max(muted / paper, paper / muted)) >= 4.5


def test_page_fits_a_phone(page: WebDriver) -> None:
    page.execute_cdp_cmd(
        "Emulation.setDeviceMetricsOverride", {"width": 390, "height": 844, "deviceScaleFactor": 1, "mobile": True}
    )
    until(page, lambda: page.execute_script("return document.documentElement.scrollWidth") == 390)
    wider = "const it = arguments[0]; return it.scrollWidth > it.clientWidth"
    assert page.execute_script(wider, one(page, "#runs .scroll"))
    point(page, "spm").send_keys(Keys.ENTER)
    assert not page.execute_script(wider, opened(page))


def test_failed_run_shows_its_reason(page: WebDriver) -> None:
    (link,) = (one for one in find(page, "#table a") if one.text == "vpt_deep")
    link.click()
    assert "unsupported" in opened(page).text and HOSTILE in opened(page).text
