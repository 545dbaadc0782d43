"""The server of `residscope explore`: a page's files, and an analysis as JSON, for browsers on this machine only.

It answers with what the methods of `residscope.open`'s analysis return, and computes no numbers itself. The API
requires the token of the page's address in a header, which no page of another site knows or may send, and a Host that
names this machine, so that no other name can be made to point here (DNS rebinding). The page may load only this
server's files, and run only its scripts.

    GET  /?token=T                    the page
    GET  /assets/NAME                 its scripts and styles, which reveal nothing of the analysis
    GET  /api/about, /api/model       what is explored; why no model can be run, once that is known
    POST /api/{card,search,prompt,intervene}    a JSON object of the method's arguments, and "n", a number that
                                      comes back with the answer

Errors are {"error": one line, "n": ...}. Requests that run the model are served one at a time, in order of arrival; so
are, in a queue of their own, those that only read tables (`Turns`).
"""

import asyncio
import json
import re
import secrets
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from importlib.resources import files
from threading import Event
from typing import Any

from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from residscope.errors import ResidscopeError, is_out_of_memory, said

HEADERS = {
    "Content-Security-Policy": "default-src 'self'; img-src 'self' blob: data:; object-src 'none'; base-uri 'none'; "
    "form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",  # the address holds the token
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-store",
}
HOSTS = ("127.0.0.1", "localhost")

MOST_BYTES = 64 * 1024
"""Bytes in the body of a request."""

MOST_WAITING = 16
"""Unanswered requests that a queue may hold; one more is refused."""

LOOK = 0.2
"""Seconds between checks whether the browser still waits for an answer."""

MOST_LATENTS = 100_000
"""Latents of a text that are sent, the most specific first: all of them, unless the dictionary is very large."""

MOST = {"text": 4_000, "changes": 16, "continue_tokens": 64, "limit": 500}
"""Limits: characters of a text, changes of the residual stream at once, tokens of a continuation, latents found."""

SHOWN = ("provenance", "n_tokens", "n_layers", "n_latents", "layers", "profiles", "warnings", "downstream")
"""Keys of summary.json that the page gets; not `transformer`, whose reason may name folders of this machine."""

KINDS: dict[str, type | tuple[type, ...]] = {
    **dict.fromkeys(("latent", "continue_tokens", "limit", "effects_after"), int),
    **dict.fromkeys(("text", "tokens", "promotes", "on", "off", "profile", "explained", "effects_against"), str),
    **dict.fromkeys(("from_layer", "to_layer"), (int, float)),
    "changes": list,
}
ARGUMENTS = {
    "card": ("latent",),
    "search": ("tokens", "promotes", "on", "off", "from_layer", "to_layer", "profile", "explained", "limit"),
    "prompt": ("text", "effects_after", "effects_against"),
    "intervene": ("text", "changes", "continue_tokens"),
}
REQUIRED = {"latent", "text", "changes"}


class Refused(Exception):
    """A refused request: HTTP status and one line."""

    def __init__(self, status: int, reason: str) -> None:
        super().__init__(reason)
        self.status = status


class Turns:
    """Serves one request at a time, in order of arrival; only a few may wait."""

    def __init__(self, stop: Event) -> None:
        """stop: set to end the work in progress soon."""
        self._lock, self._stop = asyncio.Lock(), stop
        self.waiting = 0
        """Requests not answered yet, including the one in progress."""

    async def take(self, request: Request | None, work: Callable[[], Any]) -> Any:
        """Run `work` in a thread when its turn comes, and return what it returns. It is not begun if the browser has
        gone by then, and stopped if it goes later."""
        if self.waiting >= MOST_WAITING:
            raise Refused(429, f"{self.waiting} requests are waiting already; try again when they are answered")
        self.waiting += 1
        try:
            async with self._lock:
                if request is not None and await request.is_disconnected():
                    raise ClientDisconnect
                self._stop.clear()
                running = asyncio.ensure_future(run_in_threadpool(work))
                try:
                    while not (await asyncio.wait({running}, timeout=LOOK))[0]:
                        if request is not None and await request.is_disconnected():
                            self._stop.set()
                except asyncio.CancelledError:  # the server is stopping
                    self._stop.set()
                    raise
                return running.result()
        finally:
            self.waiting -= 1


class Guard:
    """Lets in only requests to this machine that have the token, and adds the headers to every answer."""

    def __init__(self, app: ASGIApp, token: str) -> None:
        self._app, self._token = app, token

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                named = [(name.lower().encode(), value.encode()) for name, value in HEADERS.items()]
                message = {**message, "headers": [*message["headers"], *named]}
            await send(message)

        refusal = self._refusal(Request(scope), scope["path"]) if scope["type"] == "http" else None
        await (refusal or self._app)(scope, receive, with_headers)

    def _refusal(self, request: Request, path: str) -> Response | None:
        """path: as requested; `request.url` is no guide, as it is built from the Host header, which may be anything."""
        host = request.headers.get("host", "")
        if not re.fullmatch(rf"({'|'.join(map(re.escape, HOSTS))})(:\d{{1,5}})?", host):
            return _error(403, f"this server answers to {' and '.join(HOSTS)} only, not to {host[:80]!r}")
        given = (request.query_params.get("token") if path == "/" else request.headers.get("x-token")) or ""
        if path.startswith("/assets/") or secrets.compare_digest(given.encode(), self._token.encode()):
            return None
        return _error(403, "open the address that `residscope explore` printed: it ends with a token")


def make_app(analysis: Any, token: str) -> Starlette:
    """The server's application over an `Analysis`, whose model is loaded once the server runs."""
    tables, live = Turns(Event()), Turns(analysis.stop)

    @asynccontextmanager
    async def warm(_: Starlette) -> AsyncIterator[None]:
        async def load() -> None:
            await live.take(None, lambda: _missing(analysis))
            with suppress(ResidscopeError):  # a search will report it
                await run_in_threadpool(lambda: getattr(analysis, "contexts", None))

        loading = asyncio.create_task(load())
        yield
        loading.cancel()

    async def about(_: Request) -> Response:
        return _json({**{name: analysis.summary.get(name) for name in SHOWN}, "most": MOST, "waiting": live.waiting})

    async def model(request: Request) -> Response:
        return _json({"missing": await live.take(request, lambda: _missing(analysis))})

    async def call(request: Request) -> Response:
        if (name := request.path_params["name"]) not in ARGUMENTS:
            raise Refused(404, f"there is no /api/{name[:40]}")
        body = await _body(request)
        n = body.pop("n", None)
        request.state.n = n = n if isinstance(n, int) else None
        given = _checked(name, body)
        turns = live if "text" in given or {"on", "off"} & given.keys() else tables
        return _json({"n": n, "found": await turns.take(request, lambda: _call(analysis, name, given))})

    routes = [
        Route("/", lambda _: _file("page.html")),
        Route("/assets/{name}", lambda request: _file(request.path_params["name"])),
        Route("/api/about", about),
        Route("/api/model", model),
        Route("/api/{name}", call, methods=["POST"]),
    ]
    kinds = (Refused, ResidscopeError, ClientDisconnect, Exception)  # Exception is raised again, for the terminal
    app = Starlette(routes=routes, lifespan=warm, exception_handlers=dict.fromkeys(kinds, _failed))
    app.add_middleware(Guard, token=token)
    return app


def _call(analysis: Any, name: str, given: dict[str, Any]) -> Any:
    if name == "prompt":
        return analysis.prompt(**given, most=MOST_LATENTS).data
    found = getattr(analysis, name)(**given)
    if name == "search":
        return found.astype(object).where(found.notna(), None).to_dict("records")
    return found


def _missing(analysis: Any) -> str | None:
    """Load the model; returns why there is none, or None."""
    try:
        analysis.live  # noqa: B018
    except ResidscopeError as error:
        return str(error)
    return None


async def _body(request: Request) -> dict[str, Any]:
    data = b""
    async for part in request.stream():
        data += part
        if len(data) > MOST_BYTES:
            raise Refused(413, f"a request may have at most {MOST_BYTES:,} bytes")
    try:
        body = json.loads(data, parse_constant=int)  # which refuses NaN and Infinity
    except (ValueError, RecursionError):
        body = None
    if not isinstance(body, dict):
        raise Refused(400, "the request should be a JSON object")
    return body


def _checked(name: str, body: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a request, without those that are null or empty."""
    given = {key: value for key, value in body.items() if value not in (None, "")}
    if unknown := sorted(given.keys() - set(ARGUMENTS[name])):
        raise Refused(400, f"/api/{name} takes {', '.join(ARGUMENTS[name])}, found {unknown[0][:40]!r}")
    if missing := sorted((REQUIRED & set(ARGUMENTS[name])) - given.keys()):
        raise Refused(400, f"/api/{name} needs {missing[0]}")
    for key, value in given.items():
        if not isinstance(value, KINDS[key]) or isinstance(value, bool):
            raise Refused(400, f"{key} has a value of the wrong type, {type(value).__name__}")
        size: float = value if isinstance(value, (int, float)) else len(value)
        most: float = MOST["text"] if isinstance(value, str) else MOST.get(key) or 2**31
        if not 0 <= size <= most:  # NaN too
            what = key if isinstance(value, int | float) else f"the length of {key}"
            raise Refused(400, f"{what} should be from 0 to {most:,}, found {size:,}")
    if not all(isinstance(change, dict) for change in given.get("changes", [])):
        raise Refused(400, "changes should be a list of objects, one for each change")
    return given


async def _failed(request: Request, error: Exception) -> Response:
    n = getattr(request.state, "n", None)
    if isinstance(error, ClientDisconnect):
        return Response(status_code=499)  # nobody will read it
    if isinstance(error, Refused | ResidscopeError):
        return _error(error.status if isinstance(error, Refused) else 400, str(error), n)
    if is_out_of_memory(error):
        return _error(500, f"not enough memory ({said(error)}); give a shorter text", n)
    return _error(500, f"a bug in this program (the traceback is in its terminal): {said(error)}", n)


def _json(content: Any, status: int = 200) -> Response:
    return Response(json.dumps(content, allow_nan=False), status, media_type="application/json")


def _error(status: int, reason: str, n: Any = None) -> Response:
    return _json({"error": " ".join(reason.split()), "n": n}, status)


_TYPES = {".html": "text/html", ".js": "text/javascript", ".css": "text/css"}
_FILES = {path.name: path for path in files("analysis.explore").iterdir()} | {
    name: files("analysis.report").joinpath("assets", name) for name in ("report.css", "report.js")
}


def _file(name: str) -> Response:
    kind = _TYPES.get(name[name.rfind(".") :])
    if kind is None or name not in _FILES:
        raise Refused(404, f"there is no file {name[:40]!r}")
    return Response(_FILES[name].read_bytes(), media_type=kind)
