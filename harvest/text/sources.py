"""Text sources: hub data sets, local files, or texts that come with Python, each as one stream of documents.

How: `open_sources` turns each name into a `TextSource`, which iterates lazily in a fixed order and identifies itself.
A shuffle of local text writes the documents to a temporary file and reads them back in a random order, so that
memory holds only their positions. Text is used as it is: nothing is filtered, and no chat template is applied. Python's
own files are read and parsed in sorted order (the same everywhere for one version of Python); no module is run.
"""

import ast
import os
import platform
import sysconfig
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from harvest.model.hub import pin
from harvest.text.config import DEFAULT_SPLIT, TextChoice, TextConfig
from harvest.text.encode import Document
from harvest.text.local import document_of, file_documents, files_hash, find_files, suffix_of
from residscope.errors import ResidscopeError, UsageError, said
from store.shuffle import permutation

_LEFT_OUT = {"test", "tests", "idlelib", "lib2to3", "site-packages", "dist-packages", "__pycache__", "pydoc_data"}
_DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)


def pydoc_documents() -> Iterator[str]:
    """The help topics of `pydoc`, then the docstrings of each standard library module that has any."""
    from pydoc_data import topics

    for name in sorted(topics.topics):
        yield topics.topics[name]
    yield from filter(None, map(_docstrings, _modules()))


def stdlib_documents() -> Iterator[str]:
    """The source of each standard library module."""
    for path in _modules():
        yield path.read_text(encoding="utf-8", errors="replace")


def _modules() -> Iterator[Path]:
    library = sysconfig.get_paths()["stdlib"]
    found: list[Path] = []
    for folder, below, files in os.walk(library):
        below[:] = [name for name in below if name not in _LEFT_OUT]
        found += [Path(folder, name) for name in files if name.endswith(".py")]
    yield from sorted(found, key=lambda path: path.parts)


def _docstrings(path: Path) -> str:
    """The docstrings of a source file, in order, with a blank line between them; empty where there are none."""
    try:
        tree = ast.parse(path.read_bytes())
    except (SyntaxError, ValueError):
        return ""
    documented = sorted(
        (node for node in ast.walk(tree) if isinstance(node, _DOCUMENTED)), key=lambda node: getattr(node, "lineno", 0)
    )
    return "\n\n".join(filter(None, map(ast.get_docstring, documented)))


_PYTHON: dict[str, Callable[[], Iterator[str]]] = {"pydoc": pydoc_documents, "stdlib": stdlib_documents}
_HUB_BUFFER = 10_000
_SPOOL_BYTES = 64 << 20


@dataclass(frozen=True, kw_only=True)
class TextSource:
    """A stream of documents and its name."""

    dataset: str
    """Hub id, name of a local file or folder (without its path), pydoc or stdlib."""
    revision: str | None
    """Commit on the hub, hash of local files (names, sizes, first MiB of each), or Python's version (pydoc, stdlib)."""
    is_local: bool
    """Whether it is on this machine."""
    choice: TextChoice
    """The request."""
    documents: Callable[[], Iterator[Document]]
    """Starts the stream from the beginning; raises `ResidscopeError` or `UsageError` if it cannot be read."""
    check: Callable[[], object] = lambda: None
    """Reads one document, so that a missing column is found early; raises like `documents`."""
    characters: Callable[[], int | None] = lambda: None
    """About how many characters it has, or None; may read all of it if that takes only seconds."""


def open_sources(
    config: TextConfig, shuffle_seed: int | None = None, known: np.ndarray | None = None, *, contents: bool = True
) -> tuple[TextSource, ...]:
    """The texts that a configuration asks for, in its order.

    shuffle_seed: seed for shuffling each text's documents. known: which token ids exist, bool [ids], if there may be
    columns of them. contents: whether the texts will be read; if not, only their names are needed, and hub data sets
    are not looked up. Raises `UsageError` for a source that does not exist.
    """
    sources = tuple(_open(choice, shuffle_seed, known, contents) for choice in config.choices)
    # If one of several texts is a hub data set, an option that is given once is meant for it.
    if all(source.is_local for source in sources):
        for choice in config.choices:
            _refuse_hub_options(choice)
    return sources


def is_on_disk(name: str) -> bool:
    """Whether a text is in local files. `UsageError` if its name is a local one but nothing is there."""
    return name not in _PYTHON and find_files(name) is not None


def require_local_texts(config: TextConfig) -> None:
    """`UsageError` for a local text that does not exist; called before the slow loading of a model or tokenizer."""
    for choice in config.choices:
        is_on_disk(choice.name)


def _open(choice: TextChoice, seed: int | None, known: np.ndarray | None, contents: bool) -> TextSource:
    documents: Callable[[], Iterator[Document]]
    column = choice.token_column or choice.column
    if not choice.token_column:
        known = None
    if choice.name in _PYTHON:
        if known is not None:
            raise UsageError(f"--token-column {column}: {choice.name} has no columns; leave it out")
        python = documents = _PYTHON[choice.name]
        return TextSource(
            dataset=choice.name,
            revision=f"python {platform.python_version()}",
            is_local=True,
            choice=choice,
            documents=documents if seed is None else lambda: shuffled(documents(), seed),
            characters=lambda: sum(map(len, python())),
        )
    if (files := find_files(choice.name)) is None:
        revision = choice.revision or None
        if contents:
            revision = pin(choice.name, "dataset", revision, probes=("README.md",)).commit
        return TextSource(
            dataset=choice.name,
            revision=revision,
            is_local=False,
            choice=choice,
            documents=lambda: _hub_documents(choice, revision, seed, known),
            check=lambda: next(_hub_documents(choice, revision, None, known), None),
        )
    documents = partial(file_documents, files, column, known)
    plain = known is None and all(suffix_of(path) in (".txt", ".jsonl") for path in files)
    return TextSource(
        dataset=Path(choice.name).resolve().name,
        revision=files_hash(files),
        is_local=True,
        choice=choice,
        documents=documents if seed is None else lambda: shuffled(documents(), seed),
        check=lambda: next(documents(), None),
        characters=lambda: sum(path.stat().st_size for path in files) if plain else None,
    )


def shuffled(documents: Iterator[Document], seed: int) -> Iterator[Document]:
    """All `documents` in an order that depends on `seed` and their number alone."""
    with tempfile.SpooledTemporaryFile(_SPOOL_BYTES) as spool:
        ends, is_text = [0], True
        for document in documents:
            is_text = isinstance(document, str)
            data = document.encode("utf-8", "surrogatepass") if isinstance(document, str) else document.tobytes()
            ends.append(ends[-1] + spool.write(data))
        for i in permutation(len(ends) - 1, seed).tolist():
            spool.seek(ends[i])
            data = spool.read(ends[i + 1] - ends[i])
            yield data.decode("utf-8", "surrogatepass") if is_text else np.frombuffer(data, np.int32)


def _hub_documents(choice: TextChoice, commit: str | None, seed: int | None, known: Any) -> Iterator[Document]:
    """Stream a data set's split. The library may raise nearly anything, so `except` clauses are broad."""
    import datasets

    datasets.logging.set_verbosity_error()
    datasets.disable_progress_bars()
    name = f"data set {choice.name!r}"
    try:
        subset, options = choice.config or None, {"split": choice.split, "revision": commit}
        rows: Any = datasets.load_dataset(choice.name, subset, streaming=True, **options)
        if seed is not None:
            rows = rows.shuffle(seed=seed, buffer_size=_HUB_BUFFER)
        for number, row in enumerate(rows, start=1):
            yield document_of(row, choice.token_column or choice.column, f"{name} row {number}", known)
    except ResidscopeError:
        raise
    except ValueError as error:
        message = " ".join(str(error).split())
        if "Config name is missing" in message or "BuilderConfig" in message:
            raise UsageError(f"{name}: choose a configuration with --dataset-config ({message})") from error
        if "split" in message.lower():
            raise UsageError(f"{name} has no split {choice.split!r}: {message}. Choose one with --split") from error
        raise ResidscopeError(f"{name} cannot be read: {message}") from error
    except Exception as error:
        way_out = "Run the same command again if the network failed"
        raise ResidscopeError(f"{name} cannot be read ({type(error).__name__}: {said(error)}). {way_out}") from error


def _refuse_hub_options(choice: TextChoice) -> None:
    what = choice.name if choice.name in _PYTHON else "local files"
    given = {
        "--split": choice.split != DEFAULT_SPLIT,
        "--dataset-config": choice.config,
        "--dataset-revision": choice.revision,
    }
    for flag, value in given.items():
        if value:
            raise UsageError(f"{flag}: {what} have no splits, configurations or revisions; leave it out")
