"""Objects in a bucket as files: `URL` is a `Path` whose methods make requests (with obstore).

How: code that asks a path for bytes, size or names works with both. Passing a URL to the operating system raises
`UsageError`. An object is complete or absent. Unanswered requests are repeated for `RETRY_SECONDS`. Credentials come
from the environment and the usual files, never a URL, and are in no message. Why obstore: bench_object_libraries.py.
"""

import atexit
import configparser
import contextlib
import errno
import functools
import os
import re
import shutil
import stat
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from pathlib import Path, PosixPath
from typing import Any, NamedTuple
from urllib.parse import unquote

from residscope.errors import IncompatibleError, ResidscopeError, UsageError, said
from residscope.reading import reading

RETRY_SECONDS = 60.0


class Got(NamedTuple):
    """An object, or a range of one: bytes, the object's size, a tag of its version, the XXH3-128 its writer set."""

    data: Any
    size: int
    tag: dict[str, Any]
    xxh3: str | None


def as_path(place: str | os.PathLike[str]) -> Path:
    """The path or URL that a word names; `UsageError` for a URL with an unknown scheme or one that holds a secret."""
    match = re.fullmatch(
        r"([A-Za-z][\w+.-]*)://([^/]*)(/.*)?", "" if isinstance(place, Path) else os.fspath(place), re.DOTALL
    )
    if match is None:
        return place if isinstance(place, Path) else Path(place)
    scheme, bucket, rest = match.groups()
    if scheme == "file" and bucket in ("", "localhost") and rest:
        return Path(unquote(rest))
    if "@" in (bucket or rest or "") or re.search(r"[?#]", match[0]):
        raise UsageError(f"{scheme}://...: secrets (user:password@, ?key) belong in the environment, not in a URL")
    if scheme not in ("s3", "gs", "az") or not bucket or {".", ".."} & {*(rest or "").split("/")}:
        raise UsageError(f"{place}: should be a path, s3://BUCKET/NAME, gs://BUCKET/NAME or az://CONTAINER/NAME")
    return URL(match[0])


class URL(PosixPath):
    """An object, or the objects below a name, in a bucket; made by `as_path`."""

    def __str__(self) -> str:
        return super().__str__().replace(":/", "://", 1)

    def __fspath__(self) -> str:
        raise UsageError(f"{self}: should be on a disk: URLs work only for stores, and for reading autoencoders")

    @property
    def parents(self) -> Sequence["URL"]:  # type: ignore[override]
        return [above for above in super().parents if len(above.parts) > 1]

    def absolute(self, **_: Any) -> "URL":
        return self

    resolve = absolute  # type: ignore[assignment]

    def get(self, start: int = 0, stop: int | None = None, tag: Any = None, *, head: bool = False) -> Got:
        """The object, or its bytes from `start` up to `stop`, fewer if it ends sooner; with `head`, without the bytes.

        Raises `FileNotFoundError`, `FileExistsError` if its tag is not `tag`, and `ResidscopeError`.
        """
        options: dict[str, Any] = {"head": True} if head else {}
        options |= ({"if_match": tag["e_tag"]} if tag else {}) | ({} if stop is None else {"range": (start, stop)})

        def ask(obstore: Any, client: Any) -> Got:
            found = obstore.get(client, self._key, options=options)
            tag = {name: found.meta[name] for name in ("e_tag", "version")}
            return Got(None if head else found.bytes(), found.meta["size"], tag, found.attributes.get("xxh3"))

        if not self._key:
            raise FileNotFoundError(errno.ENOENT, "No such object", str(self))
        if stop is not None and stop <= start and not head:  # Servers refuse empty ranges.
            return self.get(tag=tag, head=True)._replace(data=b"")
        return self._asked(ask)

    def put(self, data: bytes, mode: Any = "overwrite", xxh3: str | None = None) -> dict[str, Any]:
        """Write the object and return its tag. mode: "create" if none may exist, or the tag of the one to replace;
        `FileExistsError` if there is another, unless it has the same bytes: then only the answer was lost."""
        mode = mode if isinstance(mode, str) else {name: mode[name] for name in mode if mode[name] is not None}
        options = {"mode": mode, "attributes": {"xxh3": xxh3} if xxh3 else {}, "use_multipart": False}
        try:
            return dict(self._asked(lambda obstore, client: obstore.put(client, self._key, data, **options)))
        except FileExistsError:
            with contextlib.suppress(FileNotFoundError):
                found = self.get(head=True) if xxh3 else self.get()
                if found.xxh3 == xxh3 if xxh3 else found.data == data:
                    return found.tag
            raise

    def glob(self, pattern: str, **_: Any) -> Iterator["URL"]:  # type: ignore[override]
        """The objects below this name whose paths match `pattern`."""
        pages = self._asked(lambda obstore, client: [*obstore.list(client, prefix=self._key or None)])
        paths = (type(self)(*self.parts[:2], entry["path"]) for page in pages for entry in page)
        return (path for path in paths if path.match(pattern))

    def stat(self, **_: Any) -> os.stat_result:
        return os.stat_result((stat.S_IFREG, 0, 0, 1, 0, 0, self.get(head=True).size, 0, 0, 0))

    def is_file(self, **_: Any) -> bool:
        with contextlib.suppress(FileNotFoundError):
            return self.get(head=True).size >= 0
        return False

    def exists(self, **_: Any) -> bool:
        some = {"prefix": self._key or None, "chunk_size": 1}
        return self.is_file() or self._asked(lambda obstore, client: any(map(len, obstore.list(client, **some))))

    is_dir = exists

    def read_bytes(self) -> bytes:
        return bytes(self.get().data)

    def unlink(self, missing_ok: bool = False) -> None:
        self._asked(lambda obstore, client: obstore.delete(client, self._key))

    @property
    def _key(self) -> str:
        return "/".join(self.parts[2:])

    def _asked(self, ask: Callable[[Any, Any], Any]) -> Any:
        """The result of a request, which is repeated while there is no answer."""
        obstore, client = _client(*self.parts[:2])
        end, pause = time.monotonic() + RETRY_SECONDS, 0.25
        while True:
            try:
                return ask(obstore, client)
            except (obstore.exceptions.BaseError, FileNotFoundError) as error:
                told = self._told(error, obstore.exceptions, last=time.monotonic() + pause > end)
            if told:
                raise told
            time.sleep(pause := min(2 * pause, 5))

    def _told(self, error: Exception, raised: Any, last: bool) -> Exception | None:
        """The error to raise: a file system's or one for the user; None if a retry may help, unless `last`."""
        text = str(error)
        code = (re.findall(r"<Code>(\w+)</Code>", text) or [type(error).__name__.removesuffix("Error")])[0]
        if code in ("NoSuchBucket", "ContainerNotFound") or "specified bucket does not exist" in text:
            return UsageError(f"{self}: there is no bucket {self.parts[1]!r}; make it, or correct the URL")
        if isinstance(error, FileNotFoundError):
            return FileNotFoundError(errno.ENOENT, "No such object", str(self))
        if isinstance(error, (raised.AlreadyExistsError, raised.PreconditionError)):
            return FileExistsError(errno.EEXIST, "Another process has changed it meanwhile", str(self))
        keys = "check AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY (or the provider's equivalents), or ~/.aws"
        if isinstance(error, (raised.PermissionDeniedError, raised.UnauthenticatedError)):
            return ResidscopeError(f"{self}: access denied ({code}); {keys}, and the key's permissions for this bucket")
        if "169.254.169.254" in text or "metadata.google" in text:
            return ResidscopeError(f"{self}: no credentials were found; {keys}")
        if code == "InvalidRange" or "416 " in text:
            return IncompatibleError(f"{self}: the object is smaller than it should be")
        # The cause is at the end of the first part; a signature may follow a "?".
        reason = said(ValueError(re.sub(r"\?\S*", "", text.partition("Debug source")[0]).rpartition(" - ")[2]))
        way_out = "check the network and AWS_ENDPOINT_URL, then run it again"
        return ResidscopeError(f"{self}: no answer in {RETRY_SECONDS:.0f} s ({reason}); {way_out}") if last else None


@functools.cache
def _client(scheme: str, bucket: str) -> tuple[Any, Any]:
    """The library and the connection to a bucket; one connection per process."""
    try:
        import obstore.store
    except ImportError:
        raise ResidscopeError(f"{scheme}//{bucket}: needs obstore; pip install 'residscope[s3]'") from None
    options: Any = {"allow_http": True, "connect_timeout": "5s", "timeout": "120s"}
    options = {"client_options": options, "retry_config": {"max_retries": 2, "retry_timeout": timedelta(seconds=5)}}
    if scheme == "s3:" and "AWS_ACCESS_KEY_ID" not in os.environ:  # obstore does not read AWS' own files.
        parser, profile = configparser.RawConfigParser(), os.environ.get("AWS_PROFILE", "default")
        with reading("~/.aws/credentials: not a readable INI file", "correct it", UsageError):
            parser.read(os.environ.get("AWS_SHARED_CREDENTIALS_FILE") or Path.home() / ".aws" / "credentials")
        keys = ("aws_access_key_id", "aws_secret_access_key", "aws_session_token")
        options |= {key: parser[profile][key] for key in keys if parser.has_option(profile, key)}
    with reading(f"{scheme}//{bucket}: the provider's settings are wrong", "correct the environment", UsageError):
        return obstore, obstore.store.from_url(f"{scheme}//{bucket}", **options)


@functools.cache
def local_copy(path: Path) -> Path:
    """`path`, or for a URL a copy of the object (or of all below it) that lasts as long as the process."""
    if not isinstance(path, URL):
        return path
    folder = Path(tempfile.mkdtemp(prefix="residscope-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    for found in [path] if path.is_file() else path.glob("*"):
        target = folder / found.relative_to(path.parent)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(found.read_bytes())
    return folder / path.name
