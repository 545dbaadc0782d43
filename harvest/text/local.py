"""Documents in local files: .txt, .jsonl (.gz, .zst) and .parquet, one after another in a fixed order.

How: one .txt file is one document; each line of a .jsonl and each row of a .parquet is one. Files are read lazily.
Tested in tests/harvest/text/test_sources.py.
"""

import glob
import gzip
import io
import json
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import xxhash

from harvest.model.hub import first_line
from residscope.console import human_bytes
from residscope.errors import IncompatibleError, UsageError
from store.files import read_whole

_SUFFIXES = (".txt", ".jsonl", ".jsonl.gz", ".jsonl.zst", ".parquet")
_HEAD_BYTES = 1 << 20
_BLOCK_BYTES = 1 << 17
_ZSTD_BYTES = 1 << 10
"""Taken in at once: 32 MiB come out of it at most."""

LONGEST = 32 << 20
"""Bytes of the longest document that is a line or a row; so that no small file can take all memory."""

LARGEST_TEXT = 1 << 30
"""Bytes of the largest .txt, which is one document."""

_RATIO = 64
"""How many times a .parquet's own size a column of a row group may be unpacked, if it is more than 256 MiB."""


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


def file_documents(files: list[Path], column: str) -> Iterator[str]:
    """All documents of some files; column: with the text, where files have columns."""
    for path in files:
        try:
            suffix = suffix_of(path)
            if suffix == ".txt":
                # As it is, line ends too; a byte order mark is no text.
                yield _whole(path).decode("utf-8-sig")
            elif suffix == ".parquet":
                yield from _parquet_documents(path, column)
            else:
                yield from _json_documents(path, column, suffix)
        except UnicodeDecodeError as error:
            raise IncompatibleError(f"{path}: not UTF-8 text (byte {error.start}); convert it to UTF-8") from None


def _json_documents(path: Path, column: str, suffix: str | None) -> Iterator[str]:
    for number, line in enumerate(_lines(path, suffix), start=1):
        if line.strip():
            where = f"{path} line {number}"
            if len(line) > LONGEST:
                raise _too_long(where)
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise IncompatibleError(f"{where}: not valid JSON ({error.msg})") from None
            except UnicodeDecodeError as error:
                found = f"not UTF-8 text (byte {error.start} of the line)"
                raise IncompatibleError(f"{where}: {found}; convert it to UTF-8") from None
            except (ValueError, RecursionError) as error:  # a number of thousands of digits, endless brackets
                raise IncompatibleError(f"{where}: not readable JSON ({error})") from None
            yield text_of(row, column, where)


def _lines(path: Path, suffix: str | None) -> Iterator[bytes]:
    """The lines of a file, plain or compressed, none of them longer than `LONGEST` and a byte."""
    kind = {".jsonl.gz": "gzip", ".jsonl.zst": "zstd"}.get(suffix or "", "")
    with path.open("rb") as raw:
        stream: Any = {"gzip": gzip.open, "zstd": _open_zstd}.get(kind, lambda file: file)(raw)
        try:
            while line := stream.readline(LONGEST + 1):
                yield line
        except (gzip.BadGzipFile, zlib.error) as error:
            raise IncompatibleError(f"{path}: not valid {kind} data ({error}); download it again") from None
        except EOFError:
            raise IncompatibleError(f"{path}: cut short: it ends within its {kind} data; download it again") from None


def _open_zstd(raw: BinaryIO) -> BinaryIO:
    return io.BufferedReader(_Unpacked(raw), _BLOCK_BYTES)


class _Unpacked(io.RawIOBase):
    """What zstd frames hold; `EOFError` where they were cut short, which the library's own stream does not notice."""

    def __init__(self, raw: BinaryIO) -> None:
        import zstandard

        self._raw, self._new, self._error = raw, zstandard.ZstdDecompressor().decompressobj, zstandard.ZstdError
        self._frame, self._begun = self._new(), False
        self._packed, self._ready = memoryview(b""), memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, out: Any, /) -> int:
        while not self._ready:
            self._packed = self._packed or memoryview(self._raw.read(_BLOCK_BYTES))
            if not self._packed:
                if self._begun:
                    raise EOFError
                return 0
            part, self._packed, self._begun = self._packed[:_ZSTD_BYTES], self._packed[_ZSTD_BYTES:], True
            try:
                self._ready = memoryview(self._frame.decompress(part))
            except self._error as error:
                raise zlib.error(str(error)) from None
            if self._frame.eof:
                rest = self._frame.unused_data
                self._packed = memoryview(rest + self._packed) if rest else self._packed
                self._frame, self._begun = self._new(), False
        size = min(len(out), len(self._ready))
        out[:size], self._ready = self._ready[:size], self._ready[size:]
        return size


def _parquet_documents(path: Path, column: str) -> Iterator[str]:
    import pyarrow
    from pyarrow import parquet

    try:
        with parquet.ParquetFile(path) as file:
            names, metadata = file.schema_arrow.names, file.metadata
        if column not in names:
            raise _no_column(path.name, column, names)
        parts = [metadata.schema.column(i).path for i in range(metadata.num_columns)]
        _check_sizes(path, column, metadata)
        # As a dictionary, where it is no list: a value that a thousand rows have is in memory once.
        with parquet.ParquetFile(path, read_dictionary=[column] if column in parts else []) as file:
            row = 0
            for batch in file.iter_batches(batch_size=256, columns=[column]):
                for text in batch.column(0):
                    row += 1
                    yield text_of({column: text.as_py()}, column, f"{path} row {row}")
    except (pyarrow.ArrowException, OSError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise  # of the disk; pyarrow's own for damaged pages has none
        raise IncompatibleError(f"{path}: not a valid parquet file ({first_line(error)})") from None


def _check_sizes(path: Path, column: str, metadata: Any) -> None:
    """Refuse a column that claims to be larger, unpacked, than any real text in a file of this size."""
    n_bytes = path.stat().st_size
    most = max(LARGEST_TEXT // 4, _RATIO * n_bytes)
    for group in map(metadata.row_group, range(metadata.num_row_groups)):
        for part in (group.column(i) for i in range(group.num_columns)):
            claimed = part.total_uncompressed_size
            if part.path_in_schema.split(".")[0] == column and claimed > most:
                raise IncompatibleError(
                    f"{path}: a row group's column {column!r} is {human_bytes(claimed)} unpacked, in a file of "
                    f"{human_bytes(n_bytes)}: more than {_RATIO} times as much; write it with smaller row groups"
                )


def _whole(path: Path) -> bytes:
    try:
        return read_whole(path, LARGEST_TEXT)
    except ValueError as error:
        raise IncompatibleError(f"{path}: {error}: split it into several") from None


def _too_long(where: str) -> IncompatibleError:
    return IncompatibleError(
        f"{where}: a document should have at most {human_bytes(LONGEST)}, this one has more: split it into several"
    )


def text_of(row: Any, column: str, where: str) -> str:
    """The text of a row; empty where it is null, with U+FFFD for what is not a character."""
    if not isinstance(row, dict):
        raise IncompatibleError(f"{where}: should be an object with a {column!r} field, found {type(row).__name__}")
    if column not in row:
        raise _no_column(where, column, list(row))
    text = row[column]
    if text is None:
        return ""
    if not isinstance(text, str):
        raise UsageError(
            f"{where}: column {column!r} holds {type(text).__name__}, not text; choose another with --text-column"
        )
    if len(text) > LONGEST:
        raise _too_long(where)
    try:
        text.encode()
    except UnicodeEncodeError:
        # JSON can spell half of a surrogate pair, which is not a character; no tokenizer takes it.
        text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text


def _no_column(where: str, column: str, names: list[str]) -> UsageError:
    return UsageError(
        f"{where}: no column {column!r}; its columns are {', '.join(map(str, names))}. Choose one with --text-column"
    )
