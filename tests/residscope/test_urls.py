"""Objects at URLs as files, on a real S3 server: which words are URLs, and what a user is told when a request fails."""

import pickle
import threading
import time
from pathlib import Path

import pytest

from residscope import urls
from residscope.cli import main
from residscope.errors import ResidscopeError, UsageError
from residscope.urls import URL, as_path, local_copy
from tests.support.s3 import Server, keys


def at(url: str) -> URL:
    path = as_path(url)
    assert isinstance(path, URL)
    return path


@pytest.mark.parametrize("word", ["a.zarr", "/b/a.zarr", "file:///b/a.zarr", "file://localhost/b/a%20c.zarr", "a:b"])
def test_what_is_on_a_disk_is_a_path(word: str) -> None:
    path = as_path(word)
    assert not isinstance(path, URL)
    assert path == Path(word.removeprefix("file://").removeprefix("localhost").replace("%20", " "))


def test_a_url_is_a_path_with_names() -> None:
    url = as_path("s3://bucket/runs/acts.zarr")
    assert str(url) == "s3://bucket/runs/acts.zarr"
    assert str(url / "manifest" / "0.jsonl") == "s3://bucket/runs/acts.zarr/manifest/0.jsonl"
    assert str(url.with_name("acts.harvest.toml")) == "s3://bucket/runs/acts.harvest.toml"
    assert [str(above) for above in url.parents] == ["s3://bucket/runs", "s3://bucket"]
    assert (url.name, url.suffix, url.parent.name) == ("acts.zarr", ".zarr", "runs")
    assert as_path(url) is url
    assert pickle.loads(pickle.dumps(url)) == url
    with pytest.raises(UsageError, match="should be on a disk"):
        url.mkdir()


@pytest.mark.parametrize("word", ["s3://me:secret@bucket/a", "s3://bucket/a?X-Amz-Signature=secret", "az://c/a#secret"])
def test_a_secret_is_refused_and_not_repeated(word: str) -> None:
    with pytest.raises(UsageError, match="belong in the environment") as caught:
        as_path(word)
    assert "secret@" not in str(caught.value)
    assert "=secret" not in str(caught.value)


@pytest.mark.parametrize("word", ["http://host/a", "s3://", "s3:///a", "file://host/a", "s3://b/../a", "s3://b/."])
def test_other_urls_are_refused(word: str) -> None:
    with pytest.raises(UsageError, match="should be a path, s3://BUCKET/NAME"):
        as_path(word)


def test_objects_are_files(s3: str, tmp_path: Path) -> None:
    folder = at(s3)
    assert not folder.exists()
    tag = (folder / "a.bin").put(b"0123456789", "create", "hash")
    assert (folder / "a.bin").put(b"0123456789", "create", "hash") == tag  # an answer was lost
    with pytest.raises(FileExistsError):
        (folder / "a.bin").put(b"other", "create")
    assert folder.exists()
    assert not folder.is_file()
    assert (folder / "a.bin").stat().st_size == 10
    assert bytes((folder / "a.bin").get(3, 99, tag).data) == b"3456789"
    new = (folder / "a.bin").put(b"new", tag)
    with pytest.raises(FileExistsError):
        (folder / "a.bin").get(tag=tag)
    with pytest.raises(FileExistsError):
        (folder / "a.bin").put(b"newer", tag)
    assert (folder / "a.bin").get().tag == new
    (folder / "b" / "c.txt").put(b"c")
    assert sorted(path.name for path in folder.glob("*")) == ["a.bin", "c.txt"]
    copy = local_copy(folder)
    assert (copy / "b" / "c.txt").read_bytes() == b"c"
    assert local_copy(folder / "a.bin").read_bytes() == b"new"
    assert local_copy(tmp_path) == tmp_path
    (folder / "a.bin").unlink()
    with pytest.raises(FileNotFoundError):
        (folder / "a.bin").read_bytes()


def test_one_line_for_what_fails(
    s3: str, s3_server: Server, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    at(f"{s3}/a").put(b"1")
    monkeypatch.setattr(urls, "RETRY_SECONDS", 0.5)

    def told(url: str, **environment: str) -> tuple[int, str]:
        urls._client.cache_clear()
        with monkeypatch.context() as patch:
            for name, value in environment.items():
                patch.setenv(name, value)
            code = main(["info", url])
        (line,) = capsys.readouterr().err.splitlines()
        assert "writer-secret" not in line
        return code, line.removeprefix(f"residscope info: error: {url}: ")

    wrong = told(s3, AWS_SECRET_ACCESS_KEY="x"), told(s3, AWS_ACCESS_KEY_ID="x")
    assert {code for code, _ in wrong} == {1}
    assert all(line.startswith("access denied (PermissionDenied); check AWS_ACCESS_KEY_ID") for _, line in wrong)
    assert told("s3://other/a") == (2, "there is no bucket 'other'; make it, or correct the URL")
    assert told(f"{s3}/none")[0] == 2
    code, line = told(s3, AWS_ENDPOINT_URL="http://127.0.0.1:1")
    assert code == 1
    assert line.startswith("no answer in 0 s (HTTP error: error sending request); check the network and AWS_ENDPOINT")
    urls._client.cache_clear()
    for name, value in keys("reader").items():
        monkeypatch.setenv(name, value)
    assert at(f"{s3}/a").read_bytes() == b"1"
    with pytest.raises(ResidscopeError, match="access denied \\(AccessDenied\\)"):
        at(f"{s3}/a").put(b"2")


def test_keys_come_from_the_usual_file(s3: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    found = keys("writer")
    for name in found:
        monkeypatch.delenv(name)
    file = tmp_path / "credentials"
    file.write_text("[work]\n" + "".join(f"{name.lower()} = {value}\n" for name, value in found.items()))
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(file))
    monkeypatch.setenv("AWS_PROFILE", "work")
    at(f"{s3}/a").put(b"1")
    urls._client.cache_clear()
    file.write_text("no section\n")
    with pytest.raises(UsageError, match="not a readable INI file"):
        at(f"{s3}/a").read_bytes()


def test_a_server_that_pauses_costs_nothing(s3: str, s3_server: Server) -> None:
    at(f"{s3}/a").put(b"1")
    pause = threading.Thread(target=s3_server.pause, args=(1.0,))
    pause.start()
    end = time.monotonic() + 1.2
    while time.monotonic() < end:
        assert at(f"{s3}/a").read_bytes() == b"1"
        at(f"{s3}/b").put(b"2", xxh3="2")
    pause.join()


def test_without_obstore_a_line_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    urls._client.cache_clear()
    monkeypatch.setitem(__import__("sys").modules, "obstore", None)
    with pytest.raises(ResidscopeError, match=r"needs obstore; pip install 'residscope\[s3\]'"):
        at("s3://bucket/a").is_file()
