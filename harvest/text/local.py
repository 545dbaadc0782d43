"""Documents in local files: .txt, .jsonl (.gz, .zst) and .parquet, one after another in a fixed order.

How: a .txt file is one document, as is each line of a .jsonl and each row of a .parquet. Files are read lazily.
Tested in tests/harvest/text/test_sources.py.
"""

import glob
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from harvest.text.encode import Document
from residscope.console import human_bytes
from residscope.errors import IncompatibleError, UsageError, said
from residscope.reading import read_whole

_SUFFIXES = (".txt", ".jsonl", ".jsonl.gz", ".jsonl.zst", ".parquet")
_HEAD_BYTES = 1 << 20
_BLOCK_BYTES = 1 << 17

LONGEST = 32 << 20
"""Maximum bytes of a document that is a line or a row, so that no small file can fill the memory."""

LARGEST = 1 << 30
"""Maximum bytes of a .txt, which is one document."""

_RATIO = 64
"""A row group's column above 256 MiB unpacked may be at most this many times as large as the .parquet file."""


def find_files(dataset: str) -> list[Path] | None:
    """The files of a local data set, in order; None if the name is not a local one. `UsageError` if nothing is there,
    `IncompatibleError` if no file there is of a known type."""
    path = Path(dataset).expanduser()
    if path.is_file():
        if suffix_of(path) is None:
            raise IncompatibleError(f"--dataset {dataset}: unknown file type; supported: {', '.join(_SUFFIXES)}")
        return [path]
    if path.is_dir():
        found = sorted(file for file in path.rglob("*") if file.is_file() and suffix_of(file))
    elif any(sign in dataset for sign in "*?["):
        matches = glob.glob(str(path), recursive=True)  # noqa: PTH207 (Path.glob takes no absolute pattern)
        found = sorted(file for file in map(Path, matches) if file.is_file() and suffix_of(file))
        if not matches:
            raise UsageError(f"--dataset {dataset}: no file has a matching name")
    elif path.exists():
        raise IncompatibleError(f"--dataset {dataset} is a pipe or device: give a file or a folder")
    elif dataset.startswith((".", "/", "~")) or suffix_of(path) or path.suffix.lower() in (".csv", ".json", ".tsv"):
        raise UsageError(f"--dataset {dataset}: there is no such file or folder")
    else:
        return None
    if not found:
        raise IncompatibleError(f"--dataset {dataset}: no {', '.join(_SUFFIXES)} file there")
    return found


def suffix_of(path: Path) -> str | None:
    """The known ending of a file's name; None if it has another."""
    return next((suffix for suffix in _SUFFIXES if path.name.lower().endswith(suffix)), None)


def files_hash(files: list[Path]) -> str:
    """A hash of the files' names, sizes and first MiB."""
    digest = xxhash.xxh3_128()
    for path in files:
        with path.open("rb") as stream:
            digest.update(f"{path.name}:{path.stat().st_size}:".encode() + stream.read(_HEAD_BYTES))
    return digest.hexdigest()


def file_documents(files: list[Path], column: str, known: np.ndarray | None = None) -> Iterator[Document]:
    """All documents of some files. column: of the text (not for .txt), or of token ids if `known` says which exist."""
    for path in files:
        try:
            suffix = suffix_of(path)
            if suffix == ".txt":
                if known is not None:
                    raise UsageError(f"--token-column {column}: {path} has no columns; leave it out")
                # Unchanged, including line ends, but without a byte order mark.
                text = read_whole(path, LARGEST).decode("utf-8-sig")
                if text.count("\0") * 100 > len(text):  # This is valid UTF-8, too.
                    what = "NUL characters: UTF-16 without a byte order mark, or not text"
                    raise IncompatibleError(f"{path}: {what}; convert it to UTF-8, or leave it out")
                yield text
            elif suffix == ".parquet":
                yield from _parquet_documents(path, column, known)
            else:
                yield from _json_documents(path, column, known, suffix)
        except UnicodeDecodeError as error:
            raise IncompatibleError(f"{path}: not UTF-8 text (byte {error.start}); convert it to UTF-8") from None
        except ValueError as error:
            raise IncompatibleError(f"{path}: {error}: split it into several") from None


def _json_documents(path: Path, column: str, known: np.ndarray | None, suffix: str | None) -> Iterator[Document]:
    for number, line in enumerate(_lines(path, suffix), start=1):
        if line.strip():
            where = f"{path} line {number}"
            if len(line) > LONGEST:
                raise _too_long(where)
            try:
                row = json.loads(line)
            except UnicodeDecodeError as error:
                found = f"not UTF-8 text (byte {error.start} of the line)"
                raise IncompatibleError(f"{where}: {found}; convert it to UTF-8") from None
            except (ValueError, RecursionError) as error:  # such as a number with thousands of digits, endless brackets
                what = "valid" if isinstance(error, json.JSONDecodeError) else "readable"
                raise IncompatibleError(f"{where}: not {what} JSON ({getattr(error, 'msg', error)})") from None
            yield document_of(row, column, where, known)


def _lines(path: Path, suffix: str | None) -> Iterator[bytes]:
    """The lines of a file, plain or compressed; a line longer than `LONGEST` is cut to one byte more than that."""
    kind = {".jsonl.gz": "gzip", ".jsonl.zst": "zstd"}.get(suffix or "")
    with path.open("rb") as raw:
        stream = raw
        if kind:
            import pyarrow  # Its streams unpack a bounded part at a time, and notice if a file was cut short.

            stream = io.BufferedReader(pyarrow.CompressedInputStream(raw, kind), _BLOCK_BYTES)  # type: ignore[type-var]
        try:
            while line := stream.readline(LONGEST + 1):
                yield line
        except OSError as error:
            if error.errno is not None:
                raise  # an error of the disk
            what = "cut short: it ends within its" if "Truncated" in str(error) else "not valid"
            raise IncompatibleError(f"{path}: {what} {kind} data; download it again") from None


def _parquet_documents(path: Path, column: str, known: np.ndarray | None) -> Iterator[Document]:
    import pyarrow
    from pyarrow import parquet

    try:
        with parquet.ParquetFile(path) as file:
            names, metadata = file.schema_arrow.names, file.metadata
        if column not in names:
            raise _no_column(path.name, column, names)
        columns = [i for i in range(metadata.num_columns) if metadata.schema.column(i).path == column]
        groups = [metadata.row_group(g).column(i) for g in range(metadata.num_row_groups) for i in columns]
        claimed, n_bytes = max((part.total_uncompressed_size for part in groups), default=0), path.stat().st_size
        if claimed > max(LARGEST // 4, _RATIO * n_bytes):
            raise IncompatibleError(
                f"{path}: a row group's column {column!r} is {human_bytes(claimed)} unpacked, in a file of "
                f"{human_bytes(n_bytes)}: more than {_RATIO} times as much; write it with smaller row groups"
            )
        # Read as a dictionary, if not a list, so that a value that a thousand rows share is in memory once.
        with parquet.ParquetFile(path, read_dictionary=[column] if columns else []) as file:
            row = 0
            for batch in file.iter_batches(batch_size=256, columns=[column]):
                for text in batch.column(0):
                    row += 1
                    yield document_of({column: text.as_py()}, column, f"{path} row {row}", known)
    except (pyarrow.ArrowException, OSError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise  # an error of the disk; pyarrow's errors about damaged pages have no errno
        raise IncompatibleError(f"{path}: not a valid parquet file ({said(error)})") from None


def _too_long(where: str) -> IncompatibleError:
    wanted = f"a document should have at most {human_bytes(LONGEST)}"
    return IncompatibleError(f"{where}: {wanted}, this one has more: split it into several")


def document_of(row: Any, column: str, where: str, known: np.ndarray | None = None) -> Document:
    """A row's text: "" for null, U+FFFD for invalid characters. known: bool [ids], if it holds token ids instead."""
    if not isinstance(row, dict):
        raise IncompatibleError(f"{where}: should be an object with a {column!r} field, found {type(row).__name__}")
    if column not in row:
        raise _no_column(where, column, list(row))
    text = row[column]
    if known is not None:
        return _tokens_of([] if text is None else text, f"{where}: column {column!r}", known)
    if text is None:
        return ""
    if not isinstance(text, str):
        is_ids = isinstance(text, list) and all(type(i) is int for i in text)
        way_out = f"if they are token ids, give --token-column {column}" if is_ids else "--text-column names another"
        found = "a list of numbers" if is_ids else type(text).__name__
        raise UsageError(f"{where}: column {column!r} holds {found}, not text; {way_out}")
    if len(text) > LONGEST:
        raise _too_long(where)
    try:
        text.encode()
    except UnicodeEncodeError:
        # JSON can contain half of a surrogate pair, which is not a character; no tokenizer accepts it.
        text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text


def _tokens_of(found: Any, what: str, known: np.ndarray) -> np.ndarray:
    """Token ids (int32), all of which must be known."""
    if not isinstance(found, list) or not all(type(i) is int for i in found):
        wrong = next((i for i in found if type(i) is not int), None) if isinstance(found, list) else found
        inside = " within a list" if isinstance(found, list) else ""
        raise UsageError(f"{what} should hold lists of token ids, found {type(wrong).__name__}{inside}")
    if wrong := [i for i in found if not (0 <= i < len(known) and known[i])]:
        which = f"token {wrong[0]}, which is not among the {known.sum()} of this model"
        raise IncompatibleError(f"{what} holds {which}; give its ids, or the text")
    return np.array(found, np.int32)


def _no_column(where: str, column: str, names: list[str]) -> UsageError:
    way_out = "Choose one with --text-column, or one of token ids with --token-column"
    return UsageError(f"{where}: no column {column!r}; its columns are {', '.join(map(str, names))}. {way_out}")
