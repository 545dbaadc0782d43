"""Documents in local files: .txt, .jsonl (.gz, .zst) and .parquet, one after another in a fixed order.

How: one .txt file is one document; each line of a .jsonl and each row of a .parquet is one. Files are read lazily.
Tested in tests/harvest/text/test_sources.py.
"""

import glob
import gzip
import json
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import xxhash

from harvest.model.hub import first_line
from harvest.text.encode import Document
from residscope.errors import IncompatibleError, UsageError

_SUFFIXES = (".txt", ".jsonl", ".jsonl.gz", ".jsonl.zst", ".parquet")
_HEAD_BYTES = 1 << 20
_BLOCK_BYTES = 1 << 17


def find_files(dataset: str) -> list[Path] | None:
    """The files of a local data set, in order; None where the name is not a local one. `UsageError` where nothing is
    there, `IncompatibleError` where no file there is of a known kind."""
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
            raise UsageError(f"--dataset {dataset}: no file has such a name")
    elif dataset.startswith((".", "/", "~")) or suffix_of(path):
        raise UsageError(f"--dataset {dataset}: there is no such file or folder")
    else:
        return None
    if not found:
        raise IncompatibleError(f"--dataset {dataset}: no {', '.join(_SUFFIXES)} file there")
    return found


def suffix_of(path: Path) -> str | None:
    """Which of the known endings a file's name has; None for another one."""
    return next((suffix for suffix in _SUFFIXES if path.name.lower().endswith(suffix)), None)


def files_hash(files: list[Path]) -> str:
    """Of names, sizes and the first MiB of each."""
    digest = xxhash.xxh3_128()
    for path in files:
        with path.open("rb") as stream:
            digest.update(f"{path.name}:{path.stat().st_size}:".encode() + stream.read(_HEAD_BYTES))
    return digest.hexdigest()


def file_documents(files: list[Path], column: str, known: np.ndarray | None = None) -> Iterator[Document]:
    """All documents of some files; column: with the text, where files have columns, or with token ids if `known` says
    which there are."""
    for path in files:
        try:
            suffix = suffix_of(path)
            if suffix == ".txt":
                if known is not None:
                    raise UsageError(f"--token-column {column}: {path} has no columns; leave it out")
                yield path.read_bytes().decode("utf-8-sig")  # as it is, line ends too; a byte order mark is no text
            elif suffix == ".parquet":
                yield from _parquet_documents(path, column, known)
            else:
                yield from _json_documents(path, column, known, _UNPACK.get(suffix or ""))
        except UnicodeDecodeError as error:
            raise IncompatibleError(f"{path}: not UTF-8 text (byte {error.start}); convert it to UTF-8") from None


def _json_documents(
    path: Path, column: str, known: np.ndarray | None, unpack: Callable[[Path, BinaryIO], Iterator[bytes]] | None
) -> Iterator[Document]:
    with path.open("rb") as raw:
        for number, line in enumerate(unpack(path, raw) if unpack else raw, start=1):
            if line.strip():
                where = f"{path} line {number}"
                try:
                    row = json.loads(line)
                except json.JSONDecodeError as error:
                    raise IncompatibleError(f"{where}: not valid JSON ({error.msg})") from None
                except UnicodeDecodeError as error:
                    found = f"not UTF-8 text (byte {error.start} of the line)"
                    raise IncompatibleError(f"{where}: {found}; convert it to UTF-8") from None
                except (ValueError, RecursionError) as error:  # a number of thousands of digits, endless brackets
                    raise IncompatibleError(f"{where}: not readable JSON ({error})") from None
                yield document_of(row, column, where, known)


def _gunzipped_lines(path: Path, raw: BinaryIO) -> Iterator[bytes]:
    """The lines in gzip members."""
    try:
        with gzip.open(raw) as stream:
            yield from stream
    except (gzip.BadGzipFile, zlib.error) as error:
        raise IncompatibleError(f"{path}: not valid gzip data ({error}); download it again") from None
    except EOFError:
        raise IncompatibleError(f"{path}: cut short: it ends within its gzip data; download it again") from None


def _decompressed_lines(path: Path, raw: BinaryIO) -> Iterator[bytes]:
    """The lines in zstd frames. The library's own stream does not notice that a file was cut short."""
    import zstandard

    frame, line = zstandard.ZstdDecompressor().decompressobj(), b""
    begun = False  # whether the frame has any bytes yet
    try:
        while block := raw.read(_BLOCK_BYTES):
            while block:
                begun = True
                *lines, line = (line + frame.decompress(block)).split(b"\n")
                yield from lines
                block = b""
                if frame.eof:
                    block = frame.unused_data
                    frame, begun = zstandard.ZstdDecompressor().decompressobj(), False
    except zstandard.ZstdError as error:
        raise IncompatibleError(f"{path}: not valid zstd data ({error}); download it again") from None
    if begun:
        raise IncompatibleError(f"{path}: cut short: it ends within its zstd data; download it again")
    yield line


_UNPACK = {".jsonl.gz": _gunzipped_lines, ".jsonl.zst": _decompressed_lines}


def _parquet_documents(path: Path, column: str, known: np.ndarray | None) -> Iterator[Document]:
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
                    yield document_of({column: text}, column, f"{path} row {row}", known)
    except (pyarrow.ArrowException, OSError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise  # of the disk; pyarrow's own for damaged pages has none
        raise IncompatibleError(f"{path}: not a valid parquet file ({first_line(error)})") from None


def document_of(row: Any, column: str, where: str, known: np.ndarray | None = None) -> Document:
    """The text of a row; empty where it is null, with U+FFFD for what is not a character. known: of token ids instead,
    which there are, bool [ids]."""
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
    try:
        text.encode()
    except UnicodeEncodeError:
        # JSON can spell half of a surrogate pair, which is not a character; no tokenizer takes it.
        text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text


def _tokens_of(found: Any, what: str, known: np.ndarray) -> np.ndarray:
    """Token ids (int32), each of which is known."""
    if not isinstance(found, list) or not all(type(i) is int for i in found):
        raise UsageError(f"{what} should hold lists of token ids, found {type(found).__name__}")
    if wrong := [i for i in found if not (0 <= i < len(known) and known[i])]:
        raise IncompatibleError(
            f"{what} holds token {wrong[0]}, none of the {known.sum()} of this model; give its ids, or the text"
        )
    return np.array(found, np.int32)


def _no_column(where: str, column: str, names: list[str]) -> UsageError:
    return UsageError(
        f"{where}: no column {column!r}; its columns are {', '.join(map(str, names))}. Choose one with --text-column,"
        " or one of token ids with --token-column"
    )
