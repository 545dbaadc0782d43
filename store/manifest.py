"""Which shards are present: the lines of the manifest, and the lock that keeps a second writer out.

How: `manifest/0.jsonl` begins with a header line (the hash of every file that is made with the store), followed by one
line for each complete shard. Every line ends in its own checksum. A shard exists only once its line does, and the
line is written last. A last line that is not intact was cut by a crash: readers ignore it (so its shard is missing),
and the next writer removes it. Any other bad line is damage, and is reported.
"""

import errno
import fcntl
import json
import os
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import xxhash

from residscope.errors import IncompatibleError, ResidscopeError
from residscope.reading import read_whole
from store.files import atomic_write, write_all

FOLDER = "manifest"
FILE = f"{FOLDER}/0.jsonl"
LOCK = f"{FOLDER}/.lock"

_CHECK_LENGTH = len(',"check":"0123456789abcdef"}')
_SHARD_PREFIX = b'{"shard":'
_MOST_BYTES = 1 << 30
"""The largest manifest file that is read: a million shards."""


class ShardRecord(NamedTuple):
    """What the manifest says of one complete shard; the fields of its line, in order."""

    shard: int
    tokens: int
    """Valid tokens."""
    kept: int
    """Valid tokens that are kept."""
    bytes: int
    """Size of the shard's file."""
    xxh3_128: str
    """Hash of the shard's file."""
    moments_xxh3_128: str
    """Hash of the shard's chunk of `shard_moments`."""
    norm_sums: list[float]
    """Sum over the kept tokens of the vectors' L2 norms, for each stored layer."""
    config_hash: str
    """The store's config hash."""


@dataclass
class Manifest:
    checksums: dict[str, str] = field(default_factory=dict)
    """xxh3-128 of each file that was made with the store, by its path in it; empty when the header is damaged."""
    lines: dict[int, bytes] = field(default_factory=dict)
    """The line of each complete shard; `record` parses one."""
    problems: list[str] = field(default_factory=list)
    """Damaged and repeated lines, in words; empty in an intact store."""
    intact_bytes: int = 0
    """Length of the intact part of `0.jsonl`; anything after it is a torn last line."""
    torn: bool = False
    """Whether the last line is torn."""

    def record(self, shard: int) -> ShardRecord:
        """The parsed line of a complete shard."""
        fields = json.loads(self.lines[shard])
        return ShardRecord(**{name: fields[name] for name in ShardRecord._fields})


def sealed(fields: Mapping[str, Any]) -> bytes:
    """`fields` as one manifest line, ending in its own checksum and a newline."""
    body = json.dumps(fields, separators=(",", ":"), allow_nan=False).encode()[:-1]
    return body + b',"check":"%s"}\n' % xxhash.xxh3_64_hexdigest(body).encode()


def is_intact(line: bytes) -> bool:
    """Whether a line (without its newline) has the checksum that `sealed` gave it."""
    body, check = line[:-_CHECK_LENGTH], line[-_CHECK_LENGTH:]
    return check == b',"check":"%s"}' % xxhash.xxh3_64_hexdigest(body).encode()


def read_manifest(store: Path) -> Manifest:
    """Read and check every line of every manifest file; damage is listed in `problems`, not raised."""
    manifest = Manifest()
    for path in sorted((store / FOLDER).glob("*.jsonl")):
        name = f"{FOLDER}/{path.name}"
        try:
            data = read_whole(path, _MOST_BYTES)
        except ValueError as error:
            manifest.problems.append(f"{name} {error}")
            continue
        data = data.rstrip(b"\n") + b"\n" * data.endswith(b"\n")  # without the blank lines that `ObjectLock` adds
        *lines, rest = data.split(b"\n")
        intact_bytes = len(data) - len(rest)
        if lines and not is_intact(lines[-1]):
            intact_bytes -= len(lines.pop()) + 1
        manifest.torn |= intact_bytes < len(data)
        if name == FILE:
            manifest.intact_bytes = intact_bytes
            if lines and is_intact(lines[0]):
                manifest.checksums = json.loads(lines[0]).get("checksums", {})
                lines[0] = b""
        for number, line in enumerate(lines, start=1):
            _read_line(manifest, line, f"{name} line {number}")
    if not manifest.checksums:  # Damaged, or the whole file is gone.
        manifest.problems.insert(0, f"{FILE} line 1: the header is damaged")
    return manifest


def _read_line(manifest: Manifest, line: bytes, where: str) -> None:
    if not line:
        return
    if not is_intact(line):
        manifest.problems.append(f"{where}: its checksum does not match")
    elif (shard := shard_of(line)) is None:
        manifest.problems.append(f"{where}: it is not a shard's line")
    else:
        if shard in manifest.lines:
            manifest.problems.append(f"{where}: shard {shard} is listed twice")
        manifest.lines[shard] = line


def shard_of(line: bytes) -> int | None:
    """The shard number of an intact line; None for the header.

    The rest of a line is parsed only when it is needed, so that a store with many shards opens quickly.
    """
    return int(line[len(_SHARD_PREFIX) : line.index(b",")]) if line.startswith(_SHARD_PREFIX) else None


def forget_lines(store: Path, shards: Collection[int]) -> None:
    """Rewrite the manifest without the lines of `shards` and without damaged ones; the caller holds the lock."""
    for path in sorted((store / FOLDER).glob("*.jsonl")):
        data = path.read_bytes()
        intact = [line for line in data.splitlines(keepends=True) if line.endswith(b"\n") and is_intact(line[:-1])]
        # By shard, so that the last of two lines for a shard stays, as in `read_manifest`; the header's shard is None.
        kept = {shard_of(line): line for line in intact if shard_of(line) not in shards}
        if b"".join(kept.values()) != data:
            atomic_write(path, list(kept.values()))


def sort_lines(store: Path, order: Sequence[int] = ()) -> None:
    """Sort the manifest's lines: first the shards in `order`, then the rest; all by shard if `order` is ascending."""
    header, *lines = (store / FILE).read_bytes().splitlines(keepends=True)
    place = {} if list(order) == sorted(order) else {shard: i for i, shard in enumerate(order)}
    ordered = sorted(lines, key=lambda line: (place.get(shard_of(line) or 0, len(place)), shard_of(line)))
    if ordered != lines:
        atomic_write(store / FILE, [header, *ordered])


def write_header(store: Path, config_hash: str, checksums: Mapping[str, str]) -> None:
    """Start the manifest of a new store in the folder `store`."""
    (store / FILE).write_bytes(sealed({"config_hash": config_hash, "checksums": dict(checksums)}))


class ManifestWriter:
    """Appends lines to `manifest/0.jsonl`, each durable when `append` returns."""

    def __init__(self, store: Path, intact_bytes: int) -> None:
        """Open the file and cut off everything beyond `intact_bytes`."""
        self._path = store / FILE
        self._end = intact_bytes
        self._descriptor = os.open(self._path, os.O_WRONLY)
        try:
            self._cut()
        except BaseException:
            self.close()
            raise

    def append(self, record: ShardRecord) -> bytes:
        """Cut off what a failed append left, then append the record's line; returns the line without its newline."""
        line = sealed(record._asdict())
        self._cut()
        os.lseek(self._descriptor, self._end, os.SEEK_SET)
        write_all(self._descriptor, memoryview(line), self._path)
        os.fsync(self._descriptor)
        self._end += len(line)
        return line[:-1]

    def _cut(self) -> None:
        if os.fstat(self._descriptor).st_size != self._end:
            os.ftruncate(self._descriptor, self._end)
            os.fsync(self._descriptor)

    def close(self) -> None:
        os.close(self._descriptor)


class WriterLock:
    """The exclusive right to write into a folder; released when the process ends, in whatever way."""

    def __init__(self, folder: Path, name: Path) -> None:
        """Take the lock of `folder`; `ResidscopeError` when another process has it. name: the store, for messages."""
        path = folder / LOCK
        path.parent.mkdir(parents=True, exist_ok=True)
        self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # If the folder was renamed between the two lines above, this locks a folder that is now elsewhere.
            if not os.path.samestat(os.fstat(self._descriptor), path.stat()):
                raise FileNotFoundError
        except (BlockingIOError, FileNotFoundError):
            self.close()
            way_out = "wait until it ends, or stop it, then run the same command again"
            raise ResidscopeError(f"{name}: another process is writing this store; {way_out}") from None
        except OSError as error:
            self.close()
            if error.errno not in (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP):
                raise
            what = "so a second writer could not be kept out; write to a local disk and copy the store from there"
            raise ResidscopeError(f"{name}: its file system has no file locks ({error.strerror}), {what}") from None

    def require_here(self, store: Path) -> None:
        """`IncompatibleError` when the folder at `store` is no longer the locked one."""
        path = store / LOCK
        if not (path.exists() and os.path.samestat(os.fstat(self._descriptor), path.stat())):
            what = "another folder was put in this store's place" if store.exists() else "it was moved or removed"
            raise IncompatibleError(
                f"{store}: {what} while it was being written; put it back, and run the same command again"
            )

    def close(self) -> None:
        os.close(self._descriptor)
