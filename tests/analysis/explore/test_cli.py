"""The command `residscope explore`: what it says when it cannot begin, and that Ctrl-C is how it ends."""

import http.client
import json
import os
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import residscope
from analysis.explore.cli import main
from residscope.errors import UsageError

STUBBED = """
import sys, residscope
from tests.support.explored import Stub
residscope.open = lambda folder, **given: Stub()
from residscope.cli import main
raise SystemExit(main(sys.argv[1:]))
"""


@pytest.fixture
def flags(tmp_path: Path) -> list[str]:
    """Of a folder where an analysis is."""
    (tmp_path / "ckpt.analysis").mkdir()
    (tmp_path / "ckpt.analysis/summary.json").write_text("{}")
    (tmp_path / "ckpt.pt").write_bytes(b"")
    return ["--store", str(tmp_path / "acts.zarr"), "--sae", str(tmp_path / "ckpt.pt"), "--no-browser"]


def test_without_an_analysis_the_way_out_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "ckpt.pt").write_bytes(b"")
    for out, folder in ((None, "ckpt.analysis"), ("other", "other")):
        words = [
            "--store",
            "acts.zarr",
            "--sae",
            str(tmp_path / "ckpt.pt"),
            *(["--out", str(tmp_path / out)] if out else []),
        ]
        assert main(words) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert f"{tmp_path / folder} holds no analysis; run `analyze --store acts.zarr --sae" in line


def test_an_analysis_beside_its_checkpoint_is_found(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "ckpt.pt").write_bytes(b"")
    opened: list[Path] = []

    def stop(folder: Path, **_: Any) -> None:
        opened.append(folder)
        raise UsageError("far enough")

    monkeypatch.setattr(residscope, "open", stop)
    words = ["--store", "acts.zarr", "--sae", str(tmp_path / "ckpt.pt")]
    for provenance in ({"sae": {"name": "other.pt"}}, {}, {"sae": {"name": "ckpt.pt"}}):
        (tmp_path / "summary.json").write_text(json.dumps({"provenance": provenance}))
        assert main(words) == 2
    assert opened == [tmp_path]
    assert capsys.readouterr().err.count("holds no analysis") == 2


@pytest.mark.parametrize("missing", ["uvicorn", "starlette"])
def test_a_missing_package_names_its_extra(
    flags: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, missing: str
) -> None:
    for name in [*sys.modules]:
        if name.partition(".")[0] == missing or name == "analysis.explore.server":
            monkeypatch.delitem(sys.modules, name)
    finder: Any = ModuleType("finder")

    def find_spec(name: str, path: Any = None, target: Any = None) -> None:
        if name.partition(".")[0] == missing:
            raise ModuleNotFoundError(f"No module named {missing!r}", name=missing)

    finder.find_spec = find_spec
    monkeypatch.setattr(sys, "meta_path", [finder, *sys.meta_path])
    assert main(flags) == 1
    assert (
        f"package {missing} is missing: install the extra with pip install 'residscope[explore]'"
        in capsys.readouterr().err
    )


def test_a_port_that_is_no_port_or_taken(
    flags: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert main([*flags, "--port", "70000"]) == 2
    assert "--port should be from 0 to 65535, found 70000" in capsys.readouterr().err
    monkeypatch.setattr(residscope, "open", lambda *given, **named: None)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        assert main([*flags, "--port", port]) == 1
        assert f"--port {port} cannot be used (Address already in use); take another" in capsys.readouterr().err


@pytest.mark.parametrize(("stop", "screen"), [(signal.SIGINT, True), (signal.SIGTERM, False)])
def test_it_serves_this_machine_until_it_is_stopped(
    flags: list[str], tmp_path: Path, stop: signal.Signals, screen: bool
) -> None:
    """And opens a browser where there is a screen."""
    opened, browser = tmp_path / "opened", tmp_path / "browser"
    browser.write_text(f'#!/bin/sh\necho "$1" > {opened}\n')
    browser.chmod(0o755)
    environment = {name: value for name, value in os.environ.items() if not name.endswith("DISPLAY")}
    environment |= {"BROWSER": f"{browser} %s", **({"DISPLAY": ":99"} if screen else {})}
    command = [sys.executable, "-c", STUBBED, "explore", *flags[:-1]]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, env=environment) as process:
        assert process.stdout
        assert process.stderr
        process.stdout.readline()
        address = process.stdout.readline().strip()
        found = re.fullmatch(r"http://127\.0\.0\.1:(\d+)/\?token=([\w-]{24})", address)
        assert found
        connection = http.client.HTTPConnection("127.0.0.1", int(found[1]), timeout=60)
        connection.request("GET", "/api/about", headers={"X-Token": found[2]})
        assert connection.getresponse().status == 200
        process.send_signal(stop)  # with the connection open
        assert process.wait(60) == 0
        assert process.stderr.read() == "\nStopped.\n"
    assert opened.is_file() == screen
    assert not screen or opened.read_text().strip() == address
