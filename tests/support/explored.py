"""`residscope explore`'s server in a thread, over any object with the methods of an `Analysis`; and a stand-in for one."""

import http.client
import json
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any, NamedTuple

import uvicorn

from analysis.explore.server import make_app

TOKEN = "token-of-the-tests"


class Answer(NamedTuple):
    status: int
    headers: dict[str, str]
    body: Any
    """JSON as objects, all else as text."""


class Served(NamedTuple):
    port: int

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.port}/?token={TOKEN}"

    def ask(self, path: str, body: Any = None, **changes: str | None) -> Answer:
        """GET, or POST of a body: bytes, or an object as JSON. changes: of the headers, None for none."""
        given = {"Host": f"127.0.0.1:{self.port}", "X-Token": TOKEN, **{k.replace("_", "-"): v for k, v in changes.items()}}
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        data = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
        headers = {name: value for name, value in given.items() if value is not None}
        connection.request("GET" if body is None else "POST", path, data, headers)
        response = connection.getresponse()
        text = response.read().decode()
        connection.close()
        found = {name.lower(): value for name, value in response.getheaders()}
        return Answer(response.status, found, json.loads(text) if "json" in found.get("content-type", "") else text)


@contextmanager
def serving(analysis: Any) -> Iterator[Served]:
    """The server, until the block ends."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        server = uvicorn.Server(uvicorn.Config(make_app(analysis, TOKEN), log_level="critical", ws="none"))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]}, daemon=True)
        thread.start()
        try:
            yield Served(listening.getsockname()[1])
        finally:
            server.should_exit = True
            thread.join(timeout=60)


class Stub:
    """Answers with what it was asked; `work` is called, with the name of the method, before each answer."""

    def __init__(self, work: Callable[[str, dict[str, Any]], None] = lambda name, given: None) -> None:
        self._work = work
        self.summary: dict[str, Any] = {
            "provenance": {"store": {"model": "m", "dataset": "d"}, "sae": {"name": "s"}},
            **dict.fromkeys(("n_tokens", "n_layers", "n_latents"), 4),
            "layers": [],
        }
        self.live = None

    def _answer(self, name: str, given: dict[str, Any]) -> dict[str, Any]:
        self._work(name, given)
        return {"asked": name, **given}

    def card(self, **given: Any) -> Any:
        return self._answer("card", given)

    def search(self, **given: Any) -> Any:
        return self._answer("search", given)

    def prompt(self, **given: Any) -> Any:
        return SimpleNamespace(data=self._answer("prompt", given))

    def intervene(self, **given: Any) -> Any:
        return self._answer("intervene", given)
