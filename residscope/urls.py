"""Objects in a bucket as files: `as_path` makes of s3://, gs:// and az:// URLs a `URL`, a `Path` whose reads and writes
are requests (obstore), and of file:// and all else a path of the disk.

How: what asks a path for bytes, size or names below it works for both. What hands one to the operating system (a folder
to make, a lock, a library that opens files) gets `UsageError`, which says that it has to be local. An object is whole
or absent. A request that gets no answer is made again for `RETRY_SECONDS`, then it is one line. Credentials come from
the environment and the usual files, never from the URL, and are in no message.
"""

import configparser
import contextlib
import errno
import functools
import os
import re
import stat
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from pathlib import Path, PosixPath
from typing import Any, NamedTuple, TypeVar
from urllib.parse import unquote

from residscope.errors import IncompatibleError, ResidscopeError, UsageError, said
from residscope.reading import reading

SCHEMES = ("s3", "gs", "az", "memory")
RETRY_SECONDS = 60.0
_T = TypeVar("_T")


class ConflictError(ResidscopeError):
    """An object is not in the state that a conditional request named."""


class _NoAnswerError(ResidscopeError):
    """A request that may work a moment later."""


class Got(NamedTuple):
    """An object, or a range of one, as it was at one moment."""

    data: Any
    """A buffer of bytes; None where only the rest was asked for."""
    size: int
    """Bytes of the whole object."""
    tag: dict[str, Any]
    """Changes with every change of the object; names its state in a conditional request."""
    xxh3: str | None
    """XXH3-128 of the whole object as its writer noted it beside the bytes."""


def as_path(place: str | os.PathLike[str]) -> Path:
    """The path that a word names; `UsageError` for a URL of another scheme, and for one that holds a secret."""
    if isinstance(place, Path):
        return place
    word = os.fspath(place)
    match = re.fullmatch(r"(\w+)://([^/]*)(/.*)?", word, re.DOTALL)
    if match is None:
        return Path(word)
    scheme, bucket, rest = match.groups()
    if scheme == "file" and bucket in ("", "localhost") and rest:
        return Path(unquote(rest))
    if "@" in bucket or re.search(r"[?#]", word):
        way_out = "give credentials in the environment, such as AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"
        raise UsageError(f"{scheme}://...: a URL should hold no user, password or signature (@ ? #); {way_out}")
    if scheme not in SCHEMES or not bucket:
        raise UsageError(f"{word}: should be a path, s3://BUCKET/NAME, gs://BUCKET/NAME or az://CONTAINER/NAME")
    return URL(word)


class URL(PosixPath):
    """An object, or the objects below a name, in a bucket. `as_path` makes it."""

    def __str__(self) -> str:
        return super().__str__().replace(":/", "://", 1)

    def __fspath__(self) -> str:
        raise UsageError(f"{self}: only stores are written to URLs: choose a path on a disk")

    @property
    def key(self) -> str:
        """Name in the bucket."""
        return "/".join(self.parts[2:])

    @property
    def parents(self) -> Sequence["URL"]:  # type: ignore[override]
        return [above for above in super().parents if len(above.parts) > 1]

    def resolve(self, strict: bool = False) -> "URL":
        return self

    def absolute(self) -> "URL":
        return self

    def is_symlink(self) -> bool:
        return False

    def get(self, start: int = 0, stop: int | None = None, tag: dict[str, Any] | None = None) -> Got:
        """The object, or its bytes from `start` to before `stop`, fewer where it ends sooner; as long as it has `tag`.

        Raises `FileNotFoundError`, `ConflictError` where it has another, `ResidscopeError`.
        """
        options: dict[str, Any] = {"if_match": tag["e_tag"]} if tag else {}
        options |= {} if stop is None else {"range": (start, stop)}

        def ask(obstore: Any, client: Any) -> Got:
            found = obstore.get(client, self.key, options=options)
            return _got(found, found.bytes())

        return self._asked(ask)

    def head(self) -> Got:
        """What is known of the object without its bytes; raises as `get`."""
        if not self.key:
            raise FileNotFoundError(errno.ENOENT, "No such object", str(self))
        return self._asked(lambda obstore, client: _got(obstore.get(client, self.key, options={"head": True}), None))

    def put(self, data: Any, mode: Any = "overwrite", xxh3: str | None = None) -> dict[str, Any]:
        """Make the object `data` (a buffer), and give its tag. mode: "create" where none should be there, or the tag of
        the one to replace: `ConflictError` where there is another, unless it has these bytes (an answer was lost)."""
        options = {"mode": mode, "attributes": {"xxh3": xxh3} if xxh3 else {}, "use_multipart": False}
        try:
            return _tag(self._asked(lambda obstore, client: obstore.put(client, self.key, data, **options)))
        except ConflictError:
            with contextlib.suppress(FileNotFoundError):
                found = self.head() if xxh3 else self.get()
                if found.xxh3 == xxh3 if xxh3 else bytes(found.data) == bytes(data):
                    return found.tag
            raise

    def objects(self) -> list["URL"]:
        """All objects below this name."""
        found = self._asked(lambda obstore, client: [*obstore.list(client, prefix=self.key or None)])
        return [type(self)(*self.parts[:2], one["path"]) for part in found for one in part]

    def stat(self, *, follow_symlinks: bool = True) -> os.stat_result:
        return os.stat_result((stat.S_IFREG, 0, 0, 1, 0, 0, self.head().size, 0, 0, 0))

    def is_file(self, **_: Any) -> bool:
        with contextlib.suppress(FileNotFoundError):
            return self.head().size >= 0
        return False

    def is_dir(self, **_: Any) -> bool:
        some = {"prefix": self.key or None, "chunk_size": 1}
        return self._asked(lambda obstore, client: any(len(part) for part in obstore.list(client, **some)))

    def exists(self, **_: Any) -> bool:
        return self.is_file() or self.is_dir()

    def iterdir(self) -> Iterator["URL"]:
        return iter(self.objects())

    def glob(self, pattern: str, **_: Any) -> Iterator["URL"]:  # type: ignore[override]
        return (found for found in self.objects() if found.match(pattern))

    def read_bytes(self) -> bytes:
        return bytes(self.get().data)

    def unlink(self, missing_ok: bool = False) -> None:
        self._asked(lambda obstore, client: obstore.delete(client, self.key))

    def _asked(self, ask: Callable[[Any, Any], _T]) -> _T:
        """What a request gives, which is made again while there is no answer."""
        client = _client(*self.parts[:2])
        import obstore

        end, pause = time.monotonic() + RETRY_SECONDS, 0.25
        while True:
            try:
                return ask(obstore, client)
            except Exception as error:
                told = self._told(error)
                if not isinstance(told, _NoAnswerError) or time.monotonic() + pause > end:
                    raise told from None
            time.sleep(pause)
            pause = min(2 * pause, 5)

    def _told(self, error: Exception) -> Exception:
        """The error that a user, or who handles files, knows."""
        import obstore.exceptions as raised

        text = str(error)
        code = (re.findall(r"<Code>(\w+)</Code>", text) or [type(error).__name__.removesuffix("Error")])[0]
        if code in ("NoSuchBucket", "ContainerNotFound") or "specified bucket does not exist" in text:
            return UsageError(f"{self}: there is no bucket {self.parts[1]!r}; make it, or correct the URL")
        if isinstance(error, FileNotFoundError):
            return FileNotFoundError(errno.ENOENT, "No such object", str(self))
        if isinstance(error, (raised.AlreadyExistsError, raised.PreconditionError)):
            return ConflictError(f"{self}: another process has changed it meanwhile; run the same command again")
        if isinstance(error, (raised.PermissionDeniedError, raised.UnauthenticatedError)):
            how = "check the credentials in the environment or ~/.aws, and what they may do in this bucket"
            return ResidscopeError(f"{self}: access denied ({code}); {how}")
        if "169.254.169.254" in text or "metadata.google" in text:
            how = "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY (or the provider's own variables), or fill ~/.aws"
            return ResidscopeError(f"{self}: no credentials were found; {how}")
        if code == "InvalidRange" or "416 " in text:
            return IncompatibleError(f"{self}: the object is smaller than it should be")
        if not isinstance(error, raised.BaseError):
            return error
        # Of the several lines, the last of the first part says what failed; a signature may stand behind a "?".
        reason = said(ValueError(re.sub(r"\?\S*", "", text.partition("Debug source")[0]).rpartition(" - ")[2]))
        way_out = "check the network and AWS_ENDPOINT_URL, then run the same command again"
        return _NoAnswerError(f"{self}: no answer for {RETRY_SECONDS:.0f} s ({reason}); {way_out}")


def _tag(of: Any) -> dict[str, Any]:
    return {name: of[name] for name in ("e_tag", "version") if of[name] is not None}


def _got(found: Any, data: Any) -> Got:
    return Got(data, found.meta["size"], _tag(found.meta), found.attributes.get("xxh3"))


@functools.cache
def _client(scheme: str, bucket: str) -> Any:
    """The connection to a bucket, one in a process."""
    try:
        from obstore.store import MemoryStore, from_url
    except ImportError:
        raise UsageError(f"{scheme}//{bucket}: needs obstore; pip install 'residscope[s3]'") from None
    if scheme == "memory:":
        return MemoryStore()
    options: Any = {"allow_http": True, "connect_timeout": "5s", "timeout": "120s"}
    retry: Any = {"max_retries": 2, "retry_timeout": timedelta(seconds=5)}
    more = _aws_files() if scheme == "s3:" else {}
    try:
        return from_url(f"{scheme}//{bucket}", client_options=options, retry_config=retry, **more)
    except Exception as error:
        raise UsageError(f"{scheme}//{bucket}: the settings of its provider are wrong ({said(error)})") from None


def _aws_files() -> dict[str, str]:
    """What ~/.aws says, where the environment does not: obstore reads the environment alone."""
    profile, found = os.environ.get("AWS_PROFILE", "default"), dict[str, str]()
    for name, section in ("config", f"profile {profile}"), ("config", profile), ("credentials", profile):
        variable = "AWS_CONFIG_FILE" if name == "config" else "AWS_SHARED_CREDENTIALS_FILE"
        parser = configparser.RawConfigParser()
        with reading(f"~/.aws/{name}: not a readable INI file", f"correct it, or set {variable}", UsageError):
            parser.read(os.environ.get(variable) or Path.home() / ".aws" / name)
        found |= dict(parser[section]) if parser.has_section(section) else {}
    variables = {name: f"AWS_{name.removeprefix('aws_')}".upper() for name in found}
    keys = (
        () if "AWS_ACCESS_KEY_ID" in os.environ else ("aws_access_key_id", "aws_secret_access_key", "aws_session_token")
    )
    return {n: found[n] for n in (*keys, "region", "endpoint_url") if n in found and variables[n] not in os.environ}


@functools.cache
def _downloads() -> "tempfile.TemporaryDirectory[str]":
    return tempfile.TemporaryDirectory(prefix="residscope-")


@functools.cache
def local_copy(path: Path) -> Path:
    """`path`, or for a URL a copy of the object, or of all below it, which lasts as long as the process."""
    if not isinstance(path, URL):
        return path
    copy = Path(_downloads().name) / str(len(list(Path(_downloads().name).iterdir()))) / path.name
    for found in [path] if path.is_file() else path.objects():
        target = copy / found.relative_to(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(found.get().data)
    if not copy.exists():
        raise UsageError(f"{path}: there is no such object")
    return copy
