"""The site of the docs in a real browser: does the search find the page that a reader looks for?

`make test-docs`, which builds the site first.
"""

from __future__ import annotations

import functools
import http.server
import pathlib
import threading
from collections.abc import Iterator

import pytest
from selenium import webdriver
from selenium.webdriver.common.keys import Keys
from support.waiting import wait_until

BUILT = pathlib.Path(__file__).parents[2] / "build" / "docs"
MOST = 3  # a reader looks at so many results
RESULTS = """
return [...document.querySelectorAll("#search-results > li > a")]
  .map((link) => link.getAttribute("href"));
"""
FOUND = {
    "gunicorn": "tutorial.html",
    "retry after": "cookbook.html",
    "redis": "cluster.html",
    "429": "web.html",
    "budget": "budgets.html",
    "kill -9": "reliability.html",
    "django": "django.html",
    "tokens per minute": "guide.html",
    "concurrency": "guide.html",
    "plans": "plans.html",
    "docker": "operations.html",
    "RateLimiter": "reference/limiters.html",
}


class Quiet(http.server.SimpleHTTPRequestHandler):
    """Logs nothing."""

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture(scope="module")
def site() -> Iterator[str]:
    assert (BUILT / "index.html").exists(), "there is no site: make docs"
    handler = functools.partial(Quiet, directory=str(BUILT))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def results(browser: webdriver.Chrome, words: str) -> list[str]:
    """The pages that are found, once the page says that it has looked."""

    def state() -> str:
        found = browser.find_elements("id", "search-state")  # none: the page is not there yet
        return str(found[0].text) if found else ""

    wait_until(lambda: f"results for {words}, not {state()!r}", lambda: f"“{words}”" in state())
    found: list[str] = browser.execute_script(RESULTS)
    return found


@pytest.mark.parametrize("words", FOUND)
def test_the_page_is_found(browser: webdriver.Chrome, site: str, words: str) -> None:
    """As a reader does it: words into the box of the landing page, and Return."""
    browser.get(f"{site}/index.html")
    browser.find_element("css selector", ".sidebar-search").send_keys(words, Keys.RETURN)
    assert FOUND[words] in results(browser, words)[:MOST]


def test_a_result_leads_to_its_page(browser: webdriver.Chrome, site: str) -> None:
    browser.get(f"{site}/search.html?q=token+bucket")
    results(browser, "token bucket")
    link = browser.find_element("css selector", "#search-results ul a")  # to a heading of it
    target = link.get_attribute("href")
    assert target and "#" in target
    link.click()
    wait_until("the page", lambda: browser.current_url == target)
    anchor = target.partition("#")[2]
    assert browser.find_element("id", anchor).is_displayed()


def test_what_is_typed_is_text(browser: webdriver.Chrome, site: str) -> None:
    words = "<img src=x onerror=window.hacked=1>"
    browser.get(f"{site}/search.html")
    browser.find_element("id", "search-input").send_keys(words)
    results(browser, words)
    assert browser.execute_script("return [window.hacked, document.images.length]") == [None, 0]


def test_pages_are_whole(browser: webdriver.Chrome, site: str) -> None:
    """No error in the console, no picture that is missing, nothing wider than a narrow window."""
    pages = sorted(path.relative_to(BUILT).as_posix() for path in BUILT.rglob("*.html"))
    assert len(pages) > 40
    wrong = []
    browser.get_log("browser")
    try:
        browser.set_window_size(500, 900)
        for page in pages:
            browser.get(f"{site}/{page}")
            wide, missing = browser.execute_script(
                "const all = document.documentElement;"
                "return [all.scrollWidth - all.clientWidth,"
                " [...document.images].filter((image) => image.complete && !image.naturalWidth)"
                ".map((image) => image.src)]"
            )
            errors = [entry["message"] for entry in browser.get_log("browser")]
            if wide > 0 or missing or errors:
                wrong.append((page, wide, missing, errors))
    finally:
        browser.set_window_size(1280, 900)
    assert wrong == []
