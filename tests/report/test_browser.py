"""The report in a browser: what a reader does with it."""

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from runs import finished

from rsrlm.commands import report

CHROMIUM = next(
    (path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), ""
)

pytestmark = pytest.mark.skipif(not CHROMIUM, reason="no Chromium here (Debian: apt-get install chromium)")


@pytest.fixture(scope="module")
def page_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = finished(tmp_path_factory.mktemp("made"), heldout=5)
    report.write([folder], folder)
    return folder / "report.html"


@pytest.fixture(scope="module")
def browser(page_file: Path) -> Iterator[Any]:  # the page first: within Playwright no other event loop runs
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        quiet = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update"]
        started = playwright.chromium.launch(executable_path=CHROMIUM, args=quiet)
        yield started
        started.close()


@pytest.fixture
def open_page(browser: Any, page_file: Path) -> Iterator[Any]:
    """Opens the report; whatever the console says, and every request for anything else, fails the test."""
    said: list[str] = []

    def open_(width: int = 1280, scheme: str = "light") -> Any:
        page = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
        page.on("console", lambda message: said.append(message.text))
        page.on("pageerror", lambda error: said.append(str(error)))
        page.on("dialog", lambda dialog: said.append(dialog.message))
        page.on("request", lambda request: said.append(request.url) if request.url != page_file.as_uri() else None)
        page.goto(page_file.as_uri())
        return page

    yield open_
    assert said == []


def test_a_reader_goes_through_samples(open_page: Any) -> None:
    page = open_page()
    browser = page.locator(".browser").first
    assert browser.locator(".list button").count() == 12
    assert page.title() == "made: report", "no script of a model has run"
    browser.locator(".list button", has_text="Say 3").click()
    detail = browser.locator(".detail")
    assert detail.locator(".answer").count() == 3
    assert detail.locator(".answer.chosen .side").inner_text() == "✓ chosen"
    assert detail.locator(".answer.rejected .side").inner_text() == "✗ rejected"
    assert "<script>document.title" in detail.inner_text()
    assert detail.locator("script, img").count() == 0
    detail.locator(".answer.chosen summary", has_text="judgements (2)").click()
    assert "Because." in detail.locator(".answer.chosen").inner_text()


def test_a_reader_searches_and_sorts(open_page: Any) -> None:
    page = open_page()
    browser = page.locator(".browser").first
    browser.locator(".find").fill("unreadable")
    assert browser.locator(".count").inner_text() == "2 shown"
    browser.locator(".find").fill("p3 number")
    assert browser.locator(".list button").count() == 1
    browser.locator(".find").fill("there is no such thing")
    assert browser.locator(".detail").inner_text() == "Nothing is like that."
    browser.locator(".find").fill("")
    browser.locator(".order").select_option("unreadable")
    assert browser.locator(".list button").count() == 2
    assert "6 unreadable" in browser.locator(".list button").first.inner_text()
    browser.locator(".order").select_option("gap")
    assert "gap 2.00" in browser.locator(".list button").first.inner_text()
    browser.locator(".iteration").select_option("1")
    assert browser.locator(".list button").count() == 5


def test_held_out_answers_show_what_differs(open_page: Any) -> None:
    page = open_page()
    held = page.locator(".browser.heldout")
    assert held.locator(".list button").count() == 5
    assert [one.inner_text() for one in held.locator(".answer header strong").all()] == ["M0", "M2"]
    assert held.locator("del").inner_text() == "M0"
    assert held.locator("ins").inner_text().startswith("M0+")
    held.locator(".diff").uncheck()
    assert held.locator("ins").count() == 0
    held.locator(".model").select_option("M1")
    assert held.locator(".answer header strong").last.inner_text() == "M1"


def test_everything_is_reached_with_the_keyboard(open_page: Any) -> None:
    page = open_page()
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.textContent") == "Skip to the content"
    browser = page.locator(".browser").first
    browser.locator(".list button").first.focus()
    first = browser.locator(".detail .prompt").inner_text()
    page.keyboard.press("ArrowDown")
    assert browser.locator(".detail .prompt").inner_text() != first
    assert browser.locator(".list button").nth(1).get_attribute("aria-current") == "true"
    page.keyboard.press("ArrowUp")
    assert browser.locator(".detail .prompt").inner_text() == first
    summary = page.locator("summary", has_text="All signs").first
    summary.focus()
    page.keyboard.press("Enter")
    assert page.locator("#r0-signs table").is_visible()


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 400])
def test_it_fits_its_screen(open_page: Any, tmp_path: Path, width: int, scheme: str) -> None:
    """Nothing sticks out to the side, text stands out from its ground, and a picture can be taken."""
    page = open_page(width, scheme)
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert page.locator("figure svg").count() >= 8
    for selector in (
        ".verdict",
        "thead th >> nth=1",
        ".soft >> nth=0",
        ".status",
        ".answer .side >> nth=0",
        "nav a >> nth=0",
    ):
        assert contrast(page, selector) >= 4.5, (selector, contrast(page, selector))
    page.screenshot(path=tmp_path / "page.png", full_page=True)
    assert (tmp_path / "page.png").stat().st_size > 50_000


def contrast(page: Any, selector: str) -> float:
    """Of the text of an element and what is behind it, by the formula of WCAG 2."""
    colours = page.locator(selector).first.evaluate(
        """element => {
          let ground = element;
          while (getComputedStyle(ground).backgroundColor === "rgba(0, 0, 0, 0)") ground = ground.parentElement;
          return [getComputedStyle(element).color, getComputedStyle(ground).backgroundColor];
        }"""
    )
    lights = []
    for colour in colours:
        parts = [int(part) / 255 for part in colour[colour.index("(") + 1 : -1].split(",")[:3]]
        linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
        lights.append(0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2])
    return (max(lights) + 0.05) / (min(lights) + 0.05)


def test_a_mark_says_what_it_stands_for(open_page: Any) -> None:
    page = open_page()
    mark = page.locator("#r0-better svg [aria-label][role='graphics-symbol']").last
    mark.hover(force=True)
    tip = page.locator("#tip")
    assert tip.is_visible()
    assert tip.inner_text() == mark.get_attribute("aria-label")
