"""The page over the planted analysis, in a tab of a real browser."""

from collections.abc import Iterator

import pytest

from tests.support.browser import PlantedTab
from tests.support.chromium import Page, find_chromium
from tests.support.explored import Planted, serving


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[PlantedTab]:
    if (binary := find_chromium()) is None:
        pytest.skip("no chromium or google-chrome on PATH")
    planted = Planted()
    with serving(planted) as served, Page(binary, 1200, 900) as page:
        yield PlantedTab(page, served, tmp_path_factory.mktemp("saved"), planted)


@pytest.fixture
def tab(browser: PlantedTab) -> Iterator[PlantedTab]:
    """Nothing may be said on its console, or asked of another place."""
    browser.page.console.clear()
    browser.planted.asked.clear()
    yield browser
    assert [line for line in browser.page.console if "status of 40" not in line] == []  # the browser's own words
    assert all(
        at.startswith((f"http://127.0.0.1:{browser.served.port}/", "data:", "blob:", "about:"))
        for at in browser.page.requests
    )
    assert browser.run("return document.documentElement.scrollWidth <= innerWidth;")
