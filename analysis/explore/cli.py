"""The `residscope explore` command."""

import asyncio
import os
import secrets
import socket
import sys
import webbrowser
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import residscope
from analysis.config import AnalyzeConfig
from analysis.results.folder import SUMMARY
from residscope.console import run_command
from residscope.errors import IncompatibleError, ResidscopeError, UsageError
from residscope.options import parse_options
from residscope.reading import read_json, reading

DESCRIPTION = """Explore a finished analysis and its model on a page in the browser, served to this machine only:
type text, see its latents over layers and tokens, ablate, steer, search and compare them.

  residscope explore --store acts.zarr --sae ckpt.pt
"""


@dataclass(frozen=True, kw_only=True)
class ExploreConfig:
    """An analysis to explore."""

    store: Path
    """Folder of the activation store, as for `analyze`."""
    sae: Path
    """The autoencoder, as for `analyze`."""
    out: Path | None = None
    """Folder of the analysis. By default CHECKPOINT.analysis beside the checkpoint, as for `analyze`; else the
    checkpoint's own folder, if it holds an analysis of this checkpoint."""
    model: str | None = None
    """Where the store's model is, as for `analyze`."""
    port: int = 0
    """Port on 127.0.0.1; 0 for any free one."""
    browser: bool = True
    """Open the page in the default browser, if there is a screen."""

    def __post_init__(self) -> None:
        if not 0 <= self.port < 2**16:
            raise UsageError(f"--port should be from 0 to 65535, found {self.port}")


def explore(config: ExploreConfig) -> None:
    """Serve the page until Ctrl-C."""
    folder = AnalyzeConfig(store=config.store, sae=config.sae, out=config.out).out_dir
    if config.out is None and not (folder / SUMMARY).is_file() and _is_of(config.sae.parent, config.sae):
        folder = config.sae.parent  # where the demo puts it
    if not (folder / SUMMARY).is_file():
        way_out = f"run `analyze --store {config.store} --sae {config.sae}` first, or name its folder with --out"
        raise UsageError(f"{folder} holds no analysis; {way_out}")
    try:
        import uvicorn

        from analysis.explore.server import make_app
    except ModuleNotFoundError as error:
        if error.name not in ("uvicorn", "starlette"):
            raise
        what = f"the package {error.name} is missing: install the extra with pip install 'residscope[explore]'"
        raise ResidscopeError(what) from None
    analysis = residscope.open(folder, store=config.store, sae=config.sae, model=config.model)
    token = secrets.token_urlsafe(18)
    with _listening(config.port) as listening:
        address = f"http://127.0.0.1:{listening.getsockname()[1]}/?token={token}"
        print(f"Exploring {folder} at\n  {address}\nPress Ctrl-C to stop.", flush=True)
        settings: dict[str, Any] = {"log_level": "warning", "access_log": False, "ws": "none", "proxy_headers": False}
        options = uvicorn.Config(make_app(analysis, token), timeout_graceful_shutdown=1, **settings)
        screen = sys.platform == "darwin" or {"DISPLAY", "WAYLAND_DISPLAY"} & os.environ.keys()
        if config.browser and screen:  # without one, a text browser would take over the terminal
            webbrowser.open(address)
        with suppress(KeyboardInterrupt):  # the usual way to stop, unless SIGINT was ignored from the start
            asyncio.run(uvicorn.Server(options).serve(sockets=[listening]))
        print("\nStopped.", file=sys.stderr)


def _is_of(folder: Path, sae: Path) -> bool:
    """Whether the folder holds an analysis of a checkpoint with this name."""
    with suppress(OSError, IncompatibleError), reading(folder / SUMMARY):
        return read_json(folder / SUMMARY)["provenance"]["sae"]["name"] == sae.name
    return False


def _listening(port: int) -> socket.socket:
    try:
        return socket.create_server(("127.0.0.1", port))
    except OSError as error:
        reason = os.strerror(error.errno or 0)
        raise ResidscopeError(f"--port {port} cannot be used ({reason}); take another, or 0 for any") from None


def main(argv: Sequence[str] | None = None) -> int:
    name = "residscope explore"
    return run_command(name, lambda: explore(parse_options(ExploreConfig, argv, prog=name, description=DESCRIPTION)))
