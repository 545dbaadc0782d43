"""The server of `residscope explore`: who is let in, what is taken, and that answers come in order."""

import http.client
import json
import re
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from analysis.explore.server import MOST, MOST_BYTES, MOST_LATENTS, MOST_WAITING
from residscope.errors import ResidscopeError, UsageError
from tests.support.explored import TOKEN, Served, Stub, serving

ABLATE = {"kind": "ablate", "latent": 3, "layers": "all"}


@pytest.fixture(scope="module")
def served() -> Iterator[Served]:
    with serving(Stub()) as one:
        yield one


def test_every_answer_of_the_api_needs_the_token(served: Served) -> None:
    asked: list[tuple[str, Any]] = [("/api/about", None), ("/api/model", None)]
    asked += [(f"/api/{name}", {}) for name in ("card", "search", "prompt", "intervene", "nothing")]
    for path, body in asked:
        for given in (None, "", "wrong", TOKEN[:-1], TOKEN + "x", "\u00fc"):
            found = served.ask(path, body, X_Token=given)
            assert found.status == 403
            assert list(found.body) == ["error", "n"]
        assert served.ask(f"{path}?token={TOKEN}", body, X_Token=None).status == 403  # a header, not an address
        assert served.ask(path, body).status != 403
    assert served.ask("/", X_Token=None).status == 403
    assert served.ask("/?token=wrong").status == 403
    assert served.ask(f"/?token={TOKEN}", X_Token=None).status == 200


@pytest.mark.parametrize("host", ["evil.example", "evil.example:80", "127.0.0.1.evil.example:1", "0.0.0.0:1", ""])
def test_a_name_that_was_made_to_point_here_is_refused(served: Served, host: str) -> None:
    for path in ("/api/about", f"/?token={TOKEN}", "/assets/app.js"):
        assert served.ask(path, Host=host).status in (400, 403)


@pytest.mark.parametrize("host", ["127.0.0.1:1/assets/app.js?", "127.0.0.1/assets/", "localhost:80/?token=x"])
def test_a_host_with_a_path_opens_nothing(served: Served, host: str) -> None:
    """Of which a server might take the path for that of the request, and let it in without a token."""
    assert served.ask("/api/about", Host=host, X_Token=None).status in (400, 403)


def test_localhost_is_this_machine(served: Served) -> None:
    assert served.ask("/api/about", Host=f"localhost:{served.port}").status == 200


def test_the_page_runs_its_own_files_alone(served: Served) -> None:
    page = served.ask(f"/?token={TOKEN}")
    for found in (
        page,
        served.ask("/api/about"),
        served.ask("/api/about", X_Token=None),
        served.ask("/assets/core.js"),
    ):
        policy = found.headers["content-security-policy"]
        assert policy.startswith("default-src 'self';")
        assert "unsafe" not in policy
        assert "http" not in policy
        assert found.headers["referrer-policy"] == "no-referrer"
        assert found.headers["cache-control"] == "no-store"
    assert not re.search(r"<script(?![^>]*src=)|\son\w+=|\sstyle=|<style", page.body)
    for name in re.findall(r'(?:src|href)="(/[^"]*)"', page.body):
        kind = "javascript" if name.endswith(".js") else "css"
        found = served.ask(name, X_Token=None)
        assert found.status == 200
        assert kind in found.headers["content-type"]
        for other in re.findall(r'from "\./([\w.]+)"', found.body):
            assert served.ask(f"/assets/{other}").status == 200
    assert TOKEN not in page.body


@pytest.mark.parametrize(
    "name", ["server.py", "__init__.py", "..%2freport%2fpage.py", "%2e%2e/cli.py", "", "page", "a" * 9999]
)
def test_no_other_file_is_given(served: Served, name: str) -> None:
    assert served.ask(f"/assets/{name}").status == 404


def test_what_is_asked_reaches_the_analysis(served: Served) -> None:
    assert served.ask("/api/card", {"latent": 3, "n": 7}).body == {"n": 7, "found": {"asked": "card", "latent": 3}}
    assert served.ask("/api/card", {"latent": 3, "n": 1e308}).body["n"] is None
    search = {"tokens": "a b", "promotes": "", "from_layer": 2.5, "to_layer": None, "profile": "late"}
    expected = {"asked": "search", "tokens": "a b", "from_layer": 2.5, "profile": "late"}
    assert served.ask("/api/search", search).body["found"] == [expected]
    assert served.ask("/api/prompt", {"text": "a"}).body["found"] == {
        "asked": "prompt",
        "text": "a",
        "most": MOST_LATENTS,
    }
    steer = {"kind": "steer", "latent": 0, "layers": [1, 2], "coefficient": -2.5}
    asked = {"text": "a", "changes": [ABLATE, steer], "continue_tokens": 5}
    assert served.ask("/api/intervene", asked).body["found"] == {"asked": "intervene", **asked}


@pytest.mark.parametrize(
    ("name", "body", "status", "words"),
    [
        ("prompt", b"", 400, "JSON object"),
        ("prompt", b"[]", 400, "JSON object"),
        ("prompt", b"\xff\xfe", 400, "JSON object"),
        ("prompt", b"[" * 50_000, 400, "JSON object"),
        ("prompt", b" " * (MOST_BYTES + 1), 413, "65,536 bytes"),
        ("prompt", {}, 400, "needs text"),
        ("prompt", {"text": ""}, 400, "needs text"),
        ("prompt", {"text": 3}, 400, "text has a value of the wrong type"),
        (
            "prompt",
            {"text": "a" * (MOST["text"] + 1)},
            400,
            "the length of text should be from 0 to 4,000, found 4,001",
        ),
        ("prompt", {"text": "a", "most": 10**9}, 400, "takes text, effects_after, effects_against, found 'most'"),
        ("card", {"latent": -1}, 400, "found -1"),
        ("card", {"latent": 10**40}, 400, "latent should be"),
        ("card", {"latent": True}, 400, "the wrong type"),
        ("card", {"latent": 1.5}, 400, "the wrong type"),
        ("search", b'{"from_layer": NaN}', 400, "should be a JSON object"),
        ("search", {"tokens": ["a"]}, 400, "the wrong type"),
        ("search", {"limit": 10**6}, 400, "limit should be"),
        (
            "intervene",
            {"text": "a", "changes": [ABLATE] * 17},
            400,
            "the length of changes should be from 0 to 16, found 17",
        ),
        ("intervene", {"text": "a", "changes": [ABLATE], "continue_tokens": 65}, 400, "from 0 to 64, found 65"),
        ("intervene", {"text": "a", "changes": [ABLATE, 3]}, 400, "a list of objects"),
        ("live", {"text": "a"}, 404, "no /api/live"),
        ("__class__", {}, 404, "no /api/__class__"),
    ],
)
def test_bad_input_is_one_line(served: Served, name: str, body: Any, status: int, words: str) -> None:
    found = served.ask(f"/api/{name}", body)
    assert found.status == status
    assert words in found.body["error"]
    assert "\n" not in found.body["error"]
    assert len(found.body["error"]) < 300
    assert served.ask("/api/about").status == 200


def test_what_goes_wrong_is_told_with_the_number_of_the_request() -> None:
    def work(name: str, given: dict[str, Any]) -> None:
        if name == "card":
            raise UsageError("two\nlines")
        raise {"memory": MemoryError("no more"), "fault": ZeroDivisionError("a fault")}[given["text"]]

    with serving(Stub(work)) as served:
        found = served.ask("/api/card", {"latent": 3, "n": 4})
        assert (found.status, found.body) == (400, {"error": "two lines", "n": 4})
        found = served.ask("/api/prompt", {"text": "memory", "n": 5})
        assert (found.status, found.body["n"]) == (500, 5)
        assert "not enough memory" in found.body["error"]
        found = served.ask("/api/prompt", {"text": "fault", "n": 6})
        assert (found.status, found.body["n"]) == (500, 6)
        assert "a fault" in found.body["error"]
        assert served.ask("/api/search", {"tokens": "x"}).status == 500
        assert served.ask("/api/about").status == 200


class Gate:
    """Work that waits until it is let through, one at a time."""

    def __init__(self) -> None:
        self.began: list[str] = []
        self.inside, self.most = 0, 0
        self.open = threading.Event()

    def __call__(self, name: str, given: dict[str, Any]) -> None:
        if name == "card":
            return
        self.began.append(str(given.get("text", given.get("on"))))
        self.inside += 1
        self.most = max(self.most, self.inside)
        assert self.open.wait(60)
        self.inside -= 1


def until_waiting(served: Served, n: int) -> None:
    """Until so many requests of the model have come."""
    for _ in range(6000):
        if served.ask("/api/about").body["waiting"] == n:
            return
        time.sleep(0.01)
    raise AssertionError("waited in vain")


def test_ten_sentences_of_two_tabs_are_answered_one_at_a_time_and_in_order_while_tables_answer() -> None:
    gate = Gate()
    with serving(Stub(gate)) as served, ThreadPoolExecutor(10) as pool:
        asked = []
        for i in range(10):  # the next is sent when this one is known to wait
            body = {"on": str(i)} if i % 2 else {"text": str(i)}
            asked.append(pool.submit(served.ask, "/api/search" if i % 2 else "/api/prompt", {**body, "n": i}))
            until_waiting(served, i + 1)
        assert served.ask("/api/card", {"latent": 1}).status == 200
        gate.open.set()
        assert [one.result().body["n"] for one in asked] == list(range(10))
    assert gate.began == [str(i) for i in range(10)]
    assert gate.most == 1


def test_a_long_queue_is_refused_and_a_killed_tab_takes_no_turn() -> None:
    gate = Gate()
    with serving(Stub(gate)) as served, ThreadPoolExecutor(MOST_WAITING) as pool:
        first = pool.submit(served.ask, "/api/prompt", {"text": "first"})
        until_waiting(served, 1)
        gone = http.client.HTTPConnection("127.0.0.1", served.port)
        gone.request("POST", "/api/prompt", json.dumps({"text": "gone"}), {"X-Token": TOKEN})
        until_waiting(served, 2)
        gone.close()
        rest = [pool.submit(served.ask, "/api/prompt", {"text": f"rest {i}"}) for i in range(MOST_WAITING - 2)]
        until_waiting(served, MOST_WAITING)
        refused = served.ask("/api/prompt", {"text": "late", "n": 3})
        assert (refused.status, refused.body["n"]) == (429, 3)
        gate.open.set()
        assert first.result().status == 200
        assert {one.result().status for one in rest} == {200}
        assert served.ask("/api/prompt", {"text": "again"}).status == 200
    assert "gone" not in gate.began
    assert len(gate.began) == MOST_WAITING


def test_work_for_a_browser_that_has_gone_is_stopped() -> None:
    ended: list[str] = []

    def work(name: str, given: dict[str, Any]) -> None:
        if given["text"] == "long":
            assert stub.stop.wait(60)
            ended.append("stopped")
            raise ResidscopeError("stopped")

    stub = Stub(work)
    with serving(stub) as served:
        gone = http.client.HTTPConnection("127.0.0.1", served.port)
        gone.request("POST", "/api/prompt", json.dumps({"text": "long"}), {"X-Token": TOKEN})
        until_waiting(served, 1)
        gone.close()
        assert served.ask("/api/prompt", {"text": "next"}).status == 200
        assert ended == ["stopped"]
        assert not stub.stop.is_set()
