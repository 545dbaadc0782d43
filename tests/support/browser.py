"""The page of `residscope explore` in a tab of a real browser."""

import time
from pathlib import Path
from typing import Any

from tests.support.chromium import Page
from tests.support.explored import Planted, Served

SCRIPT = """(async () => {
const find = (choice) => document.querySelector(choice), all = (choice) => [...document.querySelectorAll(choice)];
const text = (choice) => find(choice)?.textContent ?? "";
const until = async (test) => { const began = performance.now(); for (;;) { const found = test();
      if (found) return found;
if (performance.now() - began > 30000) throw new Error(`waited in vain for ${test}`); await new Promise((r) =>
      setTimeout(r, 5)); } };
const change = (choice, value, kind = "change") => { const at = find(choice); at.value = value;
      at.dispatchEvent(new Event(kind, { bubbles: true })); };
const named = (words, within = document) => [...within.querySelectorAll("button, a, [role=button]")].find((at) =>
      (at.getAttribute("aria-label") ?? at.textContent).startsWith(words));
const key = (at, name) => at.dispatchEvent(new KeyboardEvent("keydown", { key: name, bubbles: true,
      cancelable: true }));
%s })()"""


class Tab:
    """The page in a tab, with the helpers of `SCRIPT` in every script."""

    def __init__(self, page: Page, served: Served, folder: Path) -> None:
        """folder: for what is saved."""
        self.page, self.served, self._folder = page, served, folder
        page.call("Page.setDownloadBehavior", behavior="allow", downloadPath=str(folder))

    def open(self, state: str = "") -> None:
        self.page.open("about:blank")
        self.page.open(self.served.address + state)
        self.run("await until(() => text('#about').includes('layers'));")

    def run(self, script: str) -> Any:
        return self.page.run(SCRIPT % script)

    @property
    def state(self) -> str:
        return self.page.run("decodeURIComponent(location.hash.slice(1)).replaceAll('+', ' ')")

    def saved(self, name: str) -> bytes:
        """A file that the browser has saved, once it is whole."""
        path = self._folder / name
        for _ in range(3000):
            if path.is_file() and path.stat().st_size:
                data = path.read_bytes()
                path.unlink()
                return data
            time.sleep(0.01)
        raise AssertionError(f"no {name} was saved")


SENTENCE = "#text=all+is+going+up"


class PlantedTab(Tab):
    """A tab over the planted analysis."""

    def __init__(self, page: Page, served: Served, folder: Path, planted: Planted) -> None:
        super().__init__(page, served, folder)
        self.planted = planted
