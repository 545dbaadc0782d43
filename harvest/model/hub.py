"""Requests to the Hugging Face hub that fail fast and with a one-line error.

How: one request with a short timeout pins a repository to a commit before any library with long retries accesses it;
without a network the local cache is used instead. transformers downloads models, datasets data.
"""

import logging.handlers
import os
import re
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from residscope.errors import ResidscopeError, UsageError, said

_TIMEOUT_SECONDS = 10.0
_KINDS = {
    "model": ("model", "--model a local folder or a GGUF file"),
    "dataset": ("data set", "--dataset a local file or pydoc"),
    "space": ("space", "--lens a local folder"),
}
"""What each kind is called, and what can be given instead without a network."""

_LONGEST = 500
"""Maximum characters of a warning that is passed on."""
_DROPPED = re.compile(
    r"LOAD REPORT|weights of .* were not (used|initialized)|is deprecated|generation.(flags|config)|as a standalone",
    re.IGNORECASE,
)
_OF_FILES = re.compile("transformers|tokenizers|sentencepiece|peft|safetensors")
"""Libraries that read a model's files, in the paths of their modules; warnings of others are about how we call them."""
_said: set[str] = set()


class HubRepo(NamedTuple):
    """A repository of the hub at one commit."""

    commit: str
    cached_only: bool
    """Without a network: only files in the local cache are available."""
    files: tuple[str, ...] = ()
    """Names of the top-level files; without a network, of those in the cache."""


def pin(repo_id: str, kind: str, revision: str | None = None, probes: Sequence[str] = ("config.json",)) -> HubRepo:
    """The commit of `revision` (default: the newest) of a repository of `kind` (model, dataset, space).

    Without a network the commit comes from the local cache, if one of the files `probes` is in it. Raises
    `UsageError` if it does not exist, `ResidscopeError` if it may not be read or the hub cannot be reached.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import GatedRepoError, HFValidationError, RepositoryNotFoundError, RevisionNotFoundError
    from huggingface_hub.utils import validate_repo_id

    called, instead = _KINDS[kind]
    what = f"{called} {repo_id!r}"
    try:
        validate_repo_id(repo_id)
        # Any: the three kinds of info share `sha` and nothing else in their types.
        info: Any = HfApi().repo_info(repo_id, repo_type=kind, revision=revision, timeout=_TIMEOUT_SECONDS)
        names = (file.rfilename for file in getattr(info, "siblings", None) or ())
        files = tuple(name for name in names if "/" not in name)
        return HubRepo(info.sha, cached_only=False, files=files)
    except HFValidationError:
        raise UsageError(f"{what}: neither a path that exists nor a hub id (owner/name)") from None
    except GatedRepoError:
        way_out = (
            f"accept its terms on https://huggingface.co/{repo_id}, then log in with `hf auth login` or set HF_TOKEN"
        )
        raise ResidscopeError(f"{what} is gated: {way_out}") from None
    except RepositoryNotFoundError:
        raise UsageError(f"{what}: not found on the hub, or private (then set HF_TOKEN)") from None
    except RevisionNotFoundError:
        raise UsageError(f"{what} has no revision {revision!r}: give a branch, tag or commit that it has") from None
    except Exception as error:
        if found := _cached_snapshot(repo_id, kind, revision, probes):
            files = tuple(path.name for path in found.glob("*"))
            return HubRepo(found.name, cached_only=True, files=files)
        raise ResidscopeError(
            f"{what}: the hub cannot be reached ({said(error)}) and the local cache does not have it."
            f" Connect to the network, or give {instead}"
        ) from error


def _cached_snapshot(repo_id: str, kind: str, revision: str | None, probes: Sequence[str]) -> Path | None:
    """The folder of one commit that has one of `probes`: <cache>/models--owner--name/snapshots/<commit>."""
    from huggingface_hub import try_to_load_from_cache

    for probe in probes:
        found = try_to_load_from_cache(repo_id, probe, revision=revision or "main", repo_type=kind)
        if isinstance(found, str):
            return Path(found).parents[len(Path(probe).parts) - 1]
    return None


def quiet() -> None:
    """Keep the libraries' warnings, retries and bars (except for downloads) off the terminal; see also `passing_on`."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    import huggingface_hub
    import transformers

    huggingface_hub.logging.set_verbosity_error()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()


@contextmanager
def passing_on(model: str) -> Iterator[None]:
    """While something of `model` is loaded, turn libraries' warnings into `warning:` lines on stderr, each once.

    Dropped are warnings of other libraries, those about the calling code (deprecations) or text generation, and those
    that `harvest.model.sanity` reports itself.
    """
    logger, listener = logging.getLogger("transformers"), logging.handlers.BufferingHandler(1000)
    before, level = logger.handlers, logger.level
    with warnings.catch_warnings(record=True) as raised:
        warnings.simplefilter("always")
        logger.handlers = [listener]
        logger.setLevel(logging.WARNING)
        try:
            yield
        finally:
            logger.handlers = before
            logger.setLevel(level)
            heard = [record.getMessage() for record in listener.buffer]
            of_files = (w for w in raised if w.category is UserWarning and _OF_FILES.search(w.filename))
            for text in (*heard, *(str(w.message) for w in of_files)):
                if not _DROPPED.search(text):
                    warn(model, text)


def warn(model: str, text: str) -> None:
    """Print a `warning:` line on stderr, once per process."""
    line = f"warning: {model}: {' '.join(text.split())[:_LONGEST]}"
    if line not in _said:
        _said.add(line)
        print(line, file=sys.stderr)
