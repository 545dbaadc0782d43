"""Text sources: a hub data set, local files, or Python's own documentation, each as one stream of documents.

How: `open_source` looks at the name and gives a `TextSource`, which iterates lazily in a fixed order and says what it
is. One .txt file is one document; each line of a .jsonl and each row of a .parquet is one; `pydoc` has one per help
topic and one per standard library module (its docstrings). What it does not do: shuffle, filter, deduplicate, or
apply chat templates.
"""

import ast
import glob
import io
import json
import platform
import sysconfig
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import xxhash

from harvest.config import DEFAULT_SPLIT, HarvestConfig
from harvest.hub import first_line, pin
from store.errors import ResidscopeError, UsageError

PYDOC = "pydoc"
_SUFFIXES = (".txt", ".jsonl", ".jsonl.zst", ".parquet")
_HEAD_BYTES = 1 << 20
_NOT_DOCUMENTED = {"test", "tests", "idlelib", "lib2to3", "site-packages", "dist-packages", "__pycache__", "pydoc_data"}
_DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
_BLOCKS = ("body", "orelse", "finalbody", "handlers", "cases")


@dataclass(frozen=True, kw_only=True)
class TextSource:
    """A stream of documents and its name."""

    dataset: str
    """Hub id, name of a local file or folder (no path), or pydoc."""
    revision: str | None
    """Commit on the hub, hash of local files (names, sizes and the first MiB of each), or the Python version of
    pydoc."""
    is_local: bool
    """Whether it lies on this machine."""
    documents: Callable[[], Iterator[str]]
    """Starts the stream anew; raises `ResidscopeError` or `UsageError` where it cannot be read."""
    characters: Callable[[], int | None] = lambda: None
    """About how many characters it has, or None; may read all of it where that takes seconds."""


def open_source(config: HarvestConfig, *, contents: bool = True) -> TextSource:
    """The text that a configuration asks for.

    contents: it will be read; without it, only the name is needed, and a hub data set is not looked up. Raises
    `UsageError` for a source that is not there.
    """
    if config.dataset == PYDOC:
        _refuse_hub_options(config, "pydoc")
        version = f"python {platform.python_version()}"
        return TextSource(
            dataset=PYDOC,
            revision=version,
            is_local=True,
            documents=pydoc_documents,
            characters=lambda: sum(map(len, pydoc_documents())),
        )
    local = _local_files(config.dataset)
    if local is None:
        return _hub_source(config, contents)
    _refuse_hub_options(config, "local files")
    plain = all(_suffix(path) in (".txt", ".jsonl") for path in local)
    return TextSource(
        dataset=Path(config.dataset).resolve().name,
        revision=_files_hash(local),
        is_local=True,
        documents=lambda: _file_documents(local, config.text_column),
        characters=lambda: sum(path.stat().st_size for path in local) if plain else None,
    )


# Python's own documentation


def pydoc_documents() -> Iterator[str]:
    """The help topics of `pydoc`, then the docstrings of each standard library module, in sorted order; the same for
    one Python version everywhere."""
    from pydoc_data import topics

    for name in sorted(topics.topics):
        yield topics.topics[name]
    library = Path(sysconfig.get_paths()["stdlib"])
    for path in sorted(library.rglob("*.py"), key=lambda path: path.relative_to(library).parts):
        if _NOT_DOCUMENTED.isdisjoint(path.relative_to(library).parts) and (text := _docstrings(path)):
            yield text


def _docstrings(path: Path) -> str:
    """The docstrings of a source file, in order, with a blank line between them; empty where there are none."""
    try:
        tree = ast.parse(path.read_bytes())
    except (SyntaxError, ValueError):
        return ""
    found: list[tuple[int, str]] = []
    left: list[ast.AST] = [tree]
    while left:  # Statements only: nothing else has a docstring, and a walk over all of the tree takes twice the time.
        node = left.pop()
        if isinstance(node, _DOCUMENTED) and (text := ast.get_docstring(node)):
            found.append((getattr(node, "lineno", 0), text))
        for field in _BLOCKS:
            left.extend(getattr(node, field, ()))
    return "\n\n".join(text for _, text in sorted(found, key=lambda place: place[0]))


# Local files


def _local_files(dataset: str) -> list[Path] | None:
    """The files of a local data set, in order; None where the name is not a local one. `UsageError` where it is, and
    there is nothing."""
    path = Path(dataset).expanduser()
    if path.is_file():
        if _suffix(path) is None:
            raise UsageError(f"--dataset {dataset}: unknown kind of file; known are {', '.join(_SUFFIXES)}")
        return [path]
    if path.is_dir():
        found = sorted(file for file in path.rglob("*") if file.is_file() and _suffix(file))
    elif any(sign in dataset for sign in "*?["):
        matches = glob.glob(str(path), recursive=True)  # noqa: PTH207 (Path.glob takes no absolute pattern)
        found = sorted(file for file in map(Path, matches) if file.is_file() and _suffix(file))
    elif dataset.startswith((".", "/", "~")) or _suffix(path):
        raise UsageError(f"--dataset {dataset}: there is no such file or folder")
    else:
        return None
    if not found:
        raise UsageError(f"--dataset {dataset}: no {', '.join(_SUFFIXES)} file there")
    return found


def _suffix(path: Path) -> str | None:
    return next(
        (suffix for suffix in sorted(_SUFFIXES, key=len, reverse=True) if path.name.lower().endswith(suffix)), None
    )


def _files_hash(files: list[Path]) -> str:
    digest = xxhash.xxh3_128()
    for path in files:
        with path.open("rb") as stream:
            digest.update(f"{path.name}:{path.stat().st_size}:".encode() + stream.read(_HEAD_BYTES))
    return digest.hexdigest()


def _file_documents(files: list[Path], column: str) -> Iterator[str]:
    for path in files:
        try:
            suffix = _suffix(path)
            if suffix == ".txt":
                yield path.read_text(encoding="utf-8")
            elif suffix == ".parquet":
                yield from _parquet_documents(path, column)
            else:
                yield from _json_documents(path, column, compressed=suffix == ".jsonl.zst")
        except UnicodeDecodeError as error:
            raise ResidscopeError(f"{path}: not UTF-8 text (byte {error.start}); convert it to UTF-8") from None


def _json_documents(path: Path, column: str, *, compressed: bool) -> Iterator[str]:
    import zstandard

    try:
        with path.open("rb") as raw:
            stream = (
                io.BufferedReader(zstandard.ZstdDecompressor().stream_reader(raw, read_across_frames=True))
                if compressed
                else raw
            )
            for number, line in enumerate(stream, start=1):
                if line.strip():
                    try:
                        row = json.loads(line)
                    except json.JSONDecodeError as error:
                        raise ResidscopeError(f"{path} line {number}: not valid JSON ({error.msg})") from None
                    yield _text_of(row, column, f"{path} line {number}")
    except zstandard.ZstdError as error:
        raise ResidscopeError(f"{path}: not valid zstd data ({error}); download it again") from None


def _parquet_documents(path: Path, column: str) -> Iterator[str]:
    import pyarrow
    from pyarrow import parquet

    try:
        with parquet.ParquetFile(path) as file:
            names = file.schema_arrow.names
            if column not in names:
                raise _no_column(path.name, column, names)
            row = 0
            for batch in file.iter_batches(batch_size=256, columns=[column]):
                for text in batch.column(0).to_pylist():
                    row += 1
                    yield _text_of({column: text}, column, f"{path} row {row}")
    except pyarrow.ArrowInvalid as error:
        raise ResidscopeError(f"{path}: not a valid parquet file ({first_line(error)})") from None


def _text_of(row: Any, column: str, where: str) -> str:
    """The text of a row; empty where it is null."""
    if not isinstance(row, dict):
        raise ResidscopeError(f"{where}: should be an object with a {column!r} field, found {type(row).__name__}")
    if column not in row:
        raise _no_column(where, column, list(row))
    text = row[column]
    if text is None:
        return ""
    if not isinstance(text, str):
        raise UsageError(
            f"{where}: column {column!r} holds {type(text).__name__}, not text; choose another with --text-column"
        )
    return text


def _no_column(where: str, column: str, names: list[str]) -> UsageError:
    return UsageError(
        f"{where}: no column {column!r}; its columns are {', '.join(map(str, names))}. Choose one with --text-column"
    )


# Hub data sets


def _hub_source(config: HarvestConfig, contents: bool) -> TextSource:
    revision = config.dataset_revision
    if contents:
        revision = pin(config.dataset, "dataset", revision, probes=("README.md",)).commit
    return TextSource(
        dataset=config.dataset,
        revision=revision,
        is_local=False,
        documents=lambda: _hub_documents(config, revision),
    )


def _hub_documents(config: HarvestConfig, commit: str | None) -> Iterator[str]:
    """Stream a data set's split. The library raises nearly everything, so that nothing narrower will do."""
    import datasets

    datasets.logging.set_verbosity_error()
    datasets.disable_progress_bars()
    name = f"data set {config.dataset!r}"
    try:
        rows = datasets.load_dataset(
            config.dataset, config.dataset_config, split=config.split, revision=commit, streaming=True
        )
        for number, row in enumerate(rows, start=1):
            yield _text_of(row, config.text_column, f"{name} row {number}")
    except ResidscopeError:
        raise
    except ValueError as error:
        message = " ".join(str(error).split())
        if "Config name is missing" in message or "BuilderConfig" in message:
            raise UsageError(f"{name}: choose a configuration with --dataset-config ({message})") from error
        if "split" in message.lower():
            raise UsageError(f"{name} has no split {config.split!r}: {message}. Choose one with --split") from error
        raise ResidscopeError(f"{name} cannot be read: {message}") from error
    except Exception as error:
        raise ResidscopeError(
            f"{name} cannot be read ({type(error).__name__}: {first_line(error)}). Run the same command again if the"
            " network failed"
        ) from error


def _refuse_hub_options(config: HarvestConfig, what: str) -> None:
    given = {
        "--split": config.split != DEFAULT_SPLIT,
        "--dataset-config": config.dataset_config,
        "--dataset-revision": config.dataset_revision,
    }
    for flag, value in given.items():
        if value:
            raise UsageError(f"{flag}: {what} have no splits, configurations or revisions; leave it out")
