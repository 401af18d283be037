"""Pages in headless Chromium. Test files import the fixtures `browser` and `tabs` from here."""

import os
import shutil

import pytest

WIDTHS = (1280, 390)
"""Of a desktop and of a phone, in pixels."""


def chromium() -> str:
    found = os.environ.get("CHROMIUM") or next(
        filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
    )
    if not found:
        pytest.skip("no Chromium: install it, or name it in the environment variable CHROMIUM")
    return found


@pytest.fixture(scope="module")
def browser():
    """A running Chromium. Not for the whole session: while Playwright runs, `asyncio.run` fails in other tests."""
    path = chromium()
    sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    arguments = [
        "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking",
        "--disable-component-update", "--disable-sync",
    ]  # fmt: skip
    with sync_api.sync_playwright() as playwright:
        running = playwright.chromium.launch(executable_path=path, args=arguments)
        yield running
        running.close()


@pytest.fixture
def tabs(browser):
    """`tabs(html_file, width)` opens a page offline; its attribute `complaints` lists errors and network requests."""
    contexts = []

    def open_file(file, width):
        context = browser.new_context(viewport={"width": width, "height": 900}, offline=True)
        contexts.append(context)
        tab = context.new_page()
        tab.complaints = []
        tab.on("console", lambda message: tab.complaints.append(message.text) if message.type == "error" else None)
        tab.on("pageerror", lambda error: tab.complaints.append(str(error)))
        tab.on(
            "request", lambda request: tab.complaints.append(request.url) if request.url.startswith("http") else None
        )
        tab.goto(file.as_uri())
        tab.wait_for_selector("body[data-figures]", state="attached", timeout=60_000)
        return tab

    yield open_file
    for context in contexts:
        context.close()


def assert_it_fits(tab, width):
    """The page has no complaints, every figure is drawn, and nothing is wider than the screen."""
    assert tab.complaints == []
    assert tab.locator("figure .main-svg").count() >= tab.locator("figure").count() > 0
    assert tab.evaluate("document.documentElement.scrollWidth") <= width
