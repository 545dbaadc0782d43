"""Hub ids: pinned to a commit, with or without a network, and one line for what the hub answers."""

import logging
import warnings
from typing import Any

import pytest

from harvest.model import hub
from harvest.model.names import resolve_model
from residscope.errors import ResidscopeError, UsageError


class FakeApi:
    """Stands for the hub: raises what a test puts in, or answers with a commit."""

    error: Exception | None = None
    asked: tuple[Any, ...] = ()

    def repo_info(self, repo_id: str, *, repo_type: str, revision: str | None, timeout: float) -> Any:
        FakeApi.asked = repo_id, repo_type, revision
        assert timeout <= 10
        if FakeApi.error:
            raise FakeApi.error
        return type("Info", (), {"sha": "c0ffee"})


@pytest.fixture
def api(monkeypatch: pytest.MonkeyPatch) -> type[FakeApi]:
    import huggingface_hub

    FakeApi.error, FakeApi.asked = None, ()
    monkeypatch.setattr(huggingface_hub, "HfApi", FakeApi)
    return FakeApi


def test_a_hub_id_is_pinned_to_its_commit(api: type[FakeApi]) -> None:
    spec = resolve_model("pythia-1b", revision="step1000")
    assert api.asked == ("EleutherAI/pythia-1b", "model", "step1000")
    assert (spec.source, spec.location, spec.revision) == ("hub", "EleutherAI/pythia-1b", "c0ffee")
    assert spec.load_arguments == {"revision": "c0ffee", "local_files_only": False, "trust_remote_code": False}


def test_what_the_hub_answers_becomes_one_line(api: type[FakeApi]) -> None:
    from huggingface_hub import errors

    def answer(kind: type[Exception]) -> Exception:
        return kind.__new__(kind)  # Their constructors want a response.

    cases: list[tuple[Exception, type[ResidscopeError], str]] = [
        (answer(errors.RepositoryNotFoundError), UsageError, "not found on the hub"),
        (answer(errors.GatedRepoError), ResidscopeError, "is gated: accept its terms"),
        (answer(errors.RevisionNotFoundError), UsageError, "has no revision 'v9'"),
        (
            ConnectionError("no route\nto host"),
            ResidscopeError,
            r"cannot be reached \(no route to host\) .* local folder or a GGUF",
        ),
    ]
    for error, kind, message in cases:
        api.error = error
        with pytest.raises(kind, match=message) as raised:
            resolve_model("someone/some-model", revision="v9")
        assert "\n" not in str(raised.value)


def test_without_a_network_the_cache_is_used(api: type[FakeApi], monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    cached = "/cache/models--a--b/snapshots/abc123/config.json"
    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda *args, **options: cached)
    api.error = ConnectionError("gone")
    spec = resolve_model("a/b")
    assert spec.load_arguments == {"revision": "abc123", "local_files_only": True, "trust_remote_code": False}
    deep = cached.replace("config.json", "lens/a/b/config.json")
    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda *args, **options: deep)
    assert hub.pin("a/b", "space", probes=("lens/a/b/config.json",)).commit == "abc123"


def test_what_libraries_warn_of_the_users_files_is_passed_on_once(capsys: pytest.CaptureFixture[str]) -> None:
    logger = logging.getLogger("transformers.tokenization_utils_base")
    hub.quiet()
    for _ in range(2):
        with hub.passing_on("a model"):
            logger.warning("The tokenizer has an incorrect regex;\n  see there")
            logger.warning("X LOAD REPORT from: there")
            logger.warning("The following generation flags are not valid: temperature")
            logger.info("Nothing to see")
            for text, kind, library in (
                ("the vocabulary has a hole", UserWarning, "tokenizers"),
                ("call another function", FutureWarning, "transformers"),
                ("this is slow", UserWarning, "torch"),
            ):
                warnings.warn_explicit(text, kind, f"/site-packages/{library}/module.py", 1)
    logger.warning("not while something is loaded")
    out, err = capsys.readouterr()
    assert out == ""
    assert err.splitlines() == [
        "warning: a model: The tokenizer has an incorrect regex; see there",
        "warning: a model: the vocabulary has a hole",
    ]
