"""The page of fast-shm dashboard in a real browser: headless Chromium.

`make test-dashboard`, in a venv of its own; Chromium and its driver come from the system.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from typing import Any

import pytest
from selenium import webdriver
from selenium.common.exceptions import NoSuchElementException
from selenium.webdriver.common.keys import Keys
from support.dashboard import Dashboard
from support.puppets import Puppet
from support.waiters import waiters
from support.waiting import wait_until

from fast_litellm_shm import Budget, ConcurrencyLimiter, Limit, RateLimiter, Segment, Window
from fast_litellm_shm._shared.wait_queue import ALIKE

HOSTILE = [
    "<script>window.hacked=1</script>",
    "<img src=x onerror=window.hacked=1>",
    "'\"><svg onload=window.hacked=1>",
    "javascript:window.hacked=1",
    "&lt;b&gt;",
    "\u202eevil",
]
READ = """
return [...document.querySelectorAll(`#${arguments[0]} tbody tr[data-id]`)]
  .map((row) => [...row.children].map((cell) => cell.textContent));
"""

CUT = """
return [...document.querySelectorAll("#keys :is(th, td):not(.text)")]
  .filter((cell) => cell.offsetParent && cell.scrollWidth > cell.clientWidth)
  .map((cell) => cell.textContent);
"""


class Page:
    """The page, as a person sees it."""

    def __init__(self, browser: webdriver.Chrome) -> None:
        self.browser = browser

    def rows(self, table: str = "keys") -> list[list[str]]:
        """The text of each cell."""
        found: list[list[str]] = self.browser.execute_script(READ, table)
        return found

    def names(self) -> list[str]:
        """Of the keys, in order."""
        return [row[0] for row in self.rows()]

    def text(self, where: str) -> str:
        """Of an element, by its id."""
        return str(
            self.browser.execute_script(f"return document.getElementById('{where}').textContent")
        )

    def until(self, true: Any) -> Any:
        """Once it is so."""

        def look() -> Any:
            try:
                return true()
            except NoSuchElementException:
                return None

        return wait_until(lambda: f"what is waited for; the page: {self.text('state')}", look)

    def type(self, *keys: str) -> None:
        """To whatever has the focus."""
        webdriver.ActionChains(self.browser).send_keys(*keys).perform()

    def click(self, selector: str) -> None:
        """The first that fits."""
        self.browser.find_element("css selector", selector).click()


@pytest.fixture
def puppets(segment: Segment) -> Iterator[list[Puppet]]:
    """Two workers: busy was denied 4 times, a and b have 5 and 3 calls; each holds a permit."""
    made = [Puppet(segment.name) for _ in range(2)]
    for puppet in made:
        puppet("acquire", "chat", ["busy"], 7)
        puppet("hold", "model")
    made[0]("acquire", "wide", ["a"], 5)
    made[1]("acquire", "wide", ["b"], 3)
    yield made
    for puppet in made:
        puppet.end()


@pytest.fixture
def page(browser: webdriver.Chrome, segment: Segment) -> Iterator[Page]:
    with Dashboard(segment.name) as dashboard:
        for kind in ("browser", "performance"):
            browser.get_log(kind)  # of the test before
        browser.get(dashboard.url)
        made = Page(browser)
        made.until(lambda: made.text("state") == "live")
        yield made
        errors = browser.get_log("browser")
        asked = {
            message["params"]["request"]["url"]
            for entry in browser.get_log("performance")
            if (message := json.loads(entry["message"])["message"])["method"]
            == "Network.requestWillBeSent"
            and message["params"]["documentURL"].startswith(dashboard.url)  # not the empty tab's
        }
        browser.get("about:blank")
    assert errors == [], "the console has errors"
    assert asked and {url for url in asked if not url.startswith(dashboard.url)} == set()


def test_real_counts(puppets: list[Puppet], page: Page) -> None:
    page.until(lambda: len(page.rows()) == 3)
    rows = {row[0]: row for row in page.rows()}
    assert rows["busy"][1] == "chat" and rows["busy"][4:7] == ["10", "4", "0 / 10"]
    assert rows["a"][4:7] == ["5", "0", "1.0M / 1.0M"]
    assert rows["busy"][7].startswith(("1h", "59m")), "it has to wait"
    workers = {row[0]: row for row in page.rows("workers")}
    assert set(workers) == {str(puppet.pid) for puppet in puppets}
    assert sum(int(row[3]) for row in workers.values()) == 18
    (permit,) = page.rows("permits")
    assert permit[:3] == ["model", "gpu", "2 / 3"]
    assert page.text("in-flight") == "2" and "18" in page.text("admitted-total")
    puppets[0]("acquire", "wide", ["b"], 400)
    page.until(lambda: page.names()[0] == "b" and float(page.rows()[0][2].replace(",", "")) > 0)
    page.until(
        lambda: page.browser.execute_script(
            "return document.querySelector('#keys tbody .spark .a').getAttribute('d').length > 0"
        )
    )


def test_callers_that_wait(segment: Segment, page: Page) -> None:
    gpu = ConcurrencyLimiter(1, name="gpu", segment=segment)
    with gpu.acquire("model"):
        page.until(lambda: len(page.rows("permits")) == 1)
        assert not page.rows("waiting") and "wait" not in page.text("pooled")
        with waiters(gpu, "model", ALIKE, ALIKE):
            page.until(lambda: len(page.rows("waiting")) == 1)
            (row,) = page.rows("waiting")
            assert row[:5] == ["model", "gpu", "–", "0", "2"] and row[7] == str(os.getpid())
            assert page.text("pooled").endswith(", 2 callers wait")
        page.until(lambda: not page.rows("waiting"))


def test_budgets(segment: Segment, page: Page) -> None:
    page.until(lambda: page.text("state") == "live")
    assert not page.rows("budgets")
    team = Budget(50, name="team", segment=segment, warn_at=0.8, on_warn=lambda key, usage: None)
    team.charge("a", "41.000000001")
    Budget(1, None, name="keys", segment=segment).charge("a", "0.0134")
    with team.reserve("a", usd=2):
        page.until(lambda: len(page.rows("budgets")) == 2)
        first, second = page.rows("budgets")
        assert first[:7] == ["a", "team", "$41.000000001", "$2", "$50", "86.0%", "yes"]
        assert second == ["a", "keys", "$0.0134", "–", "$1", "1.3%", "–", "never"]
        left = {row[1]: row[6] for row in page.rows()}
        assert left == {"team": "$6.99 / $50", "keys": "$0.9866 / $1"}
        width = "return document.querySelector('#budgets .bar div').style.width"
        assert page.browser.execute_script(width) == "86%"
    team.charge("a", 9)
    page.until(lambda: page.rows("budgets")[0][5] == "100.0%")
    assert (
        page.browser.execute_script("return document.querySelector('#budgets .bar div').className")
        == "bad"
    )


def test_keys_that_look_alike_have_a_row_each(segment: Segment, page: Page) -> None:
    limiter = ConcurrencyLimiter(2, name="gpu", segment=segment)
    held = [limiter.acquire("k" * 300 + last) for last in "abc"]
    page.until(lambda: len(page.rows("permits")) == 3)
    clock = page.text("clock")
    page.until(lambda: page.text("clock") > clock)  # it was filled again, and has no more rows
    assert len(page.rows("permits")) == 3
    for permit in held:
        permit.release()
    page.until(lambda: not page.rows("permits"))


def test_sort(puppets: list[Puppet], page: Page) -> None:
    for column, names in (("key", ["a", "b", "busy"]), ("admitted", ["busy", "a", "b"])):
        page.click(f"th[data-sort={column}] button")
        page.until(lambda names=names: page.names() == names)
    page.click("th[data-sort=admitted] button")
    page.until(lambda: page.names() == ["b", "a", "busy"])
    head = page.browser.find_element("css selector", "th[data-sort=admitted]")
    page.until(lambda: head.get_attribute("aria-sort") == "ascending")


def test_filter(puppets: list[Puppet], page: Page) -> None:
    page.type("/", *"BUS")
    page.until(lambda: page.names() == ["busy"])
    assert "1 of 3 match" in page.text("keys-count")
    page.type("q")
    page.until(lambda: page.names() == [] and "No key matches" in page.text("keys"))
    page.type(Keys.ESCAPE)
    page.until(lambda: len(page.names()) == 3)
    page.type("/", *"[ab]")
    page.until(lambda: sorted(page.names()) == ["a", "b"])


def test_freeze(puppets: list[Puppet], page: Page) -> None:
    page.until(lambda: len(page.names()) == 3)
    page.type(" ")
    page.until(lambda: page.text("state") == "frozen")
    clock = page.text("clock")
    puppets[0]("acquire", "wide", ["new"], 1)
    looks = "return performance.getEntriesByType('resource').length"
    before = page.browser.execute_script(looks)
    # Two rounds of the browser's own loop that are longer than a look: it asks for none.
    page.browser.execute_async_script("setTimeout(arguments[0], 400)")
    assert page.browser.execute_script(looks) == before
    assert "new" not in page.names() and page.text("clock") == clock
    page.click("#freeze")
    page.until(lambda: "new" in page.names() and page.text("state") == "live")


def test_hostile_names_are_inert(page: Page, segment: Segment) -> None:
    limiter = RateLimiter(
        Limit(5, 3600), name="<img src=x onerror=window.hacked=1>", segment=segment
    )
    for key in HOSTILE:
        limiter.acquire(key)
    page.until(lambda: len(page.names()) == len(HOSTILE))
    assert {*HOSTILE[:-1], "\\u202eevil"} == set(page.names())
    page.until(lambda: len(page.rows("limiters")) == 1)
    script = (
        "return [window.hacked, document.querySelectorAll('main :is(img, script, b b)').length]"
    )
    assert page.browser.execute_script(script) == [None, 0]
    page.browser.execute_script(
        "const made = document.createElement('script'); made.textContent = 'window.hacked = 1';"
        "document.body.append(made);"
    )
    assert page.browser.execute_script("return window.hacked") is None
    (refusal,) = page.browser.get_log("browser")
    assert "Content Security Policy" in refusal["message"]


def test_the_segment_goes_and_comes(page: Page, segment: Segment) -> None:
    segment.remove()
    page.until(lambda: page.text("state") == "waiting")
    assert "was removed. Waiting for a new one" in page.text("messages")
    again = Segment(segment.name, capacity=100)
    RateLimiter(Limit(5, 3600), name="t", segment=again).acquire("second")
    page.until(lambda: page.names() == ["second"] and page.text("state") == "live")


def test_the_server_ends(browser: webdriver.Chrome, segment: Segment) -> None:
    with Dashboard(segment.name) as dashboard:
        browser.get(dashboard.url)
        page = Page(browser)
        page.until(lambda: page.text("state") == "live")
    page.until(lambda: "does not answer" in page.text("state"))
    assert "start it again" in page.text("messages")
    browser.get("about:blank")


@pytest.mark.parametrize("width", [360, 390, 768, 1000, 1280])
def test_what_is_shown_fits(
    browser: webdriver.Chrome, puppets: list[Puppet], page: Page, segment: Segment, width: int
) -> None:
    """The page its window, and numbers and heads their columns, with waits of days among them."""
    RateLimiter(Window(1, per=30 * 86400), name="month", segment=segment).acquire("slow")
    size = {"width": width, "height": 800, "deviceScaleFactor": 1, "mobile": False}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    try:
        page.until(lambda: len(page.names()) == 4)
        assert browser.execute_script("return document.documentElement.scrollWidth") <= width
        assert browser.execute_script(CUT) == []
    finally:
        browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
