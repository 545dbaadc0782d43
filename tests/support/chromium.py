"""Chromium without a window, spoken to over its DevTools socket: open a page, run script in it, keep what it says.

Uses tornado, which comes with dask.distributed, and the browser of the machine: nothing else is needed. What is kept:
console messages, errors and the address of every request of the page. Not here: what a page should do.
"""

import asyncio
import json
import os
import shutil
import subprocess
import tempfile
import time
from base64 import b64decode
from pathlib import Path
from typing import Any

NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")
FLAGS = (
    *("--headless", "--disable-gpu", "--disable-background-networking", "--no-first-run", "--hide-scrollbars"),
    *("--disable-component-update", "--remote-debugging-port=0"),
    "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",
)
"""No name resolves but this machine's address, so that a request that gets past the page's policy fails, and is still
recorded."""


def find_chromium() -> str | None:
    """The browser's path, or None where there is none."""
    return next(filter(None, map(shutil.which, NAMES)), None)


class Page:
    """A tab of a browser with a profile of its own; close it after use (`with`)."""

    def __init__(self, binary: str, width: int, height: int) -> None:
        self.console: list[str] = []
        """Errors and warnings, one text each."""

        self.requests: list[str] = []
        """Addresses asked for, in order; of `data:` the first characters."""

        self._folder = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
        sandbox = ["--no-sandbox"] if os.geteuid() == 0 else []  # root has no other way
        self._browser = subprocess.Popen(
            [binary, *FLAGS, *sandbox, f"--user-data-dir={self._folder.name}", "about:blank"],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            env={**os.environ, "TMPDIR": self._folder.name},
        )
        self._loop = asyncio.new_event_loop()
        self._number = 0
        self._socket: Any = self._loop.run_until_complete(_connected(*self._address()))
        self._session: str | None = None
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Network", "Log"):
            self.call(f"{domain}.enable")
        phone = width < 500
        size = {"width": width, "height": height, "deviceScaleFactor": 2 if phone else 1, "mobile": phone}
        self.call("Emulation.setDeviceMetricsOverride", **size)

    def __enter__(self) -> "Page":
        return self

    def __exit__(self, *_: object) -> None:
        self._socket.close()
        self._browser.terminate()
        self._browser.wait()
        self._loop.close()
        self._folder.cleanup()

    def open(self, address: str) -> None:
        """Go to an address and wait until its load event."""
        self.call("Page.navigate", url=address)
        self.run("document.readyState === 'complete' || new Promise((done) => addEventListener('load', done))")

    def run(self, script: str) -> Any:
        """The value of a script, its promise awaited. Raises RuntimeError where it throws."""
        answer = self.call(
            "Runtime.evaluate", expression=script, awaitPromise=True, returnByValue=True, userGesture=True
        )
        if "exceptionDetails" in answer:
            raise RuntimeError(json.dumps(answer["exceptionDetails"])[:800])
        return answer["result"].get("value")

    def screenshot(self, path: Path) -> None:
        """What is seen, as PNG."""
        path.write_bytes(b64decode(self.call("Page.captureScreenshot")["data"]))

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        """One command of the DevTools protocol and its answer; events meanwhile are kept."""
        self._number += 1
        message = {"id": self._number, "method": method, "params": params}
        if self._session:
            message["sessionId"] = self._session
        return self._loop.run_until_complete(self._answer(message))

    async def _answer(self, message: dict[str, Any]) -> dict[str, Any]:
        await self._socket.write_message(json.dumps(message))
        while True:
            text = await self._socket.read_message()
            if text is None:
                raise RuntimeError("the browser went away")
            said = json.loads(text)
            if said.get("id") == message["id"]:
                if "error" in said:
                    raise RuntimeError(f"{message['method']}: {said['error']}")
                return said["result"]
            self._keep(said.get("method", ""), said.get("params", {}))

    def _keep(self, event: str, params: dict[str, Any]) -> None:
        if event == "Network.requestWillBeSent":
            self.requests.append(params["request"]["url"][:200])
        elif event == "Runtime.exceptionThrown":
            self.console.append(json.dumps(params["exceptionDetails"])[:400])
        elif event == "Runtime.consoleAPICalled" and params["type"] in ("error", "warning", "assert"):
            self.console.append(json.dumps(params["args"])[:400])
        elif event == "Log.entryAdded" and params["entry"]["level"] in ("error", "warning"):
            self.console.append(params["entry"]["text"])

    def _address(self) -> list[str]:
        """Port and path of the socket, which the browser writes into its profile."""
        file, began = Path(self._folder.name) / "DevToolsActivePort", time.monotonic()
        while not (file.is_file() and len(file.read_text().split()) == 2):
            if time.monotonic() - began > 60 or self._browser.poll() is not None:
                raise RuntimeError("the browser did not start")
            time.sleep(0.05)
        return file.read_text().split()


async def _connected(port: str, path: str) -> Any:
    from tornado.websocket import websocket_connect

    return await websocket_connect(f"ws://127.0.0.1:{port}{path}", max_message_size=2**28)
