"""Where results may be written (not where another process writes, over another output's files, or on a full disk), and
how the files of a folder appear together.

How: files are made in the folder `.partial` of the output folder, which is locked, and renamed into place once all are
complete. `.partial/claim` names those that did not exist before: these may be removed if a killed run left them.
"""

import contextlib
import errno
import fcntl
import json
import os
import shutil
import tomllib
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path

from residscope.console import human_bytes
from residscope.errors import IncompatibleError, ResidscopeError, UsageError
from residscope.names import stem
from residscope.reading import CONFIG_BYTES, read_json, read_whole
from residscope.urls import URL


@contextlib.contextmanager
def held_alone(folder: Path, out: Path, flag: str = "--out", *, wait: bool = False) -> Iterator[None]:
    """Lock `folder`, in which results for `out` are made; `ResidscopeError` if another process has it, unless `wait`.

    The lock ends with the process, however it ends. A file system without locks, or a URL, keeps nobody out.
    """
    if isinstance(folder, URL):
        yield
        return
    with contextlib.ExitStack() as stack:
        try:
            descriptor = os.open(folder, os.O_RDONLY)
            stack.callback(os.close, descriptor)
            fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            # If another process has just ended and removed the folder, this locked a deleted folder.
            gone = not os.path.samestat(os.fstat(descriptor), folder.stat())
        except (BlockingIOError, FileNotFoundError):
            gone = True
        except OSError as error:
            if error.errno not in (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP):
                raise
            gone = False
        if gone:
            raise ResidscopeError(f"{flag} {out}: another process is writing there; wait for it, or choose another")
        yield


@contextlib.contextmanager
def partial_folder(out: Path, flag: str = "--out") -> Iterator[Path]:
    """An empty, locked folder inside `out` to make results in, removed at the end. It is made before the work begins,
    so that an unwritable folder stops the run at once."""
    require_folder(out, flag)
    folder, fresh = out.absolute() / ".partial", not out.exists()  # pyarrow would take a relative a:b for a URL
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        raise _below_a_file(out, flag) from None
    with held_alone(folder, out, flag):
        _clear(folder)
        try:
            yield folder
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            # Most of the libraries that write here do not name the file.
            raise OSError(error.errno, os.strerror(error.errno), error.filename or str(out)) from error
        finally:
            with contextlib.suppress(OSError):
                _clear(folder)
                folder.rmdir()
                if fresh:
                    out.rmdir()  # This fails, as it should, if there are results now.


def _clear(folder: Path) -> None:
    for path in folder.iterdir():
        if path.name != "claim":
            shutil.rmtree(path) if path.is_dir() else path.unlink()


@contextlib.contextmanager
def together(
    out: Path, names: Collection[str], last: Collection[str], *, replace: bool, flag: str = "--out", way_out: str = ""
) -> Iterator[Path]:
    """A folder in which to make the files `names` of the folder `out`; they are moved there together when it ends.

    last: files that make the others valid: old ones are removed first, new ones moved last. Files in `names` that are
    not made are removed from `out`, as are the leftovers of a killed run. replace: whether other existing files may be
    replaced; if not, they raise `UsageError`, whose message ends with `way_out`.
    """
    claim = out / ".partial" / "claim"
    refuse_taken(out, names, replace, way_out)  # before anything is made
    with partial_folder(out, flag) as folder:
        refuse_taken(out, names, replace, way_out)
        before = _claimed(claim)
        free = sorted(before | {name for name in names if not os.path.lexists(out / name)})
        claim.with_name("claim.tmp").write_text(json.dumps(free), encoding="utf-8")
        claim.with_name("claim.tmp").replace(claim)
        try:
            yield folder
        except BaseException:
            if not before:
                claim.unlink(missing_ok=True)
            raise
        made = sorted((name for name in names if (folder / name).exists()), key=lambda name: (name in last, name))
        for name in (*last, *sorted({*names, *before} - {*made})):
            (out / name).unlink(missing_ok=True)
        sync(out)
        for name in made:
            sync(folder / name)
            (out / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).replace(out / name)
        for parent in {(out / name).parent for name in made}:
            sync(parent)
        claim.unlink()


def refuse_taken(out: Path, names: Iterable[str], replace: bool, way_out: str = "") -> None:
    """`UsageError` if one of the files `names` exists in the folder `out`, unless `replace` or left by a killed run."""
    for name in () if replace else sorted({*names} - _claimed(out / ".partial" / "claim")):
        if os.path.lexists(out / name):
            raise UsageError(f"{out / name} exists already; choose another folder{way_out}")


def comparison(out: Path) -> contextlib.AbstractContextManager[Path]:
    """`together` for the files of a comparison."""
    names = [f"compare.{kind}" for kind in ("json", "parquet", "png", "svg")]
    return together(out, names, names[:1], replace=(out / names[0]).exists())


def _claimed(claim: Path) -> set[str]:
    """The names in a claim, without paths that leave its folder: these files may be removed, and a claim be forged."""
    try:
        names = map(Path, read_json(claim))
        return {str(name) for name in names if not name.is_absolute() and ".." not in name.parts}
    except (OSError, IncompatibleError, TypeError):
        return set()


def sync(path: Path) -> None:
    """Make a file's content, or the names in a folder, durable."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


RESERVED = (".tmp", ".planning", ".harvest.toml", ".config.toml", ".metrics.jsonl", ".loss.png")


def require_name(out: Path) -> None:
    """`UsageError` if `out` has no name, a too long or reserved one, or is below a file."""
    if out.name in ("", ".."):
        raise UsageError(f"--out {out}: give the name of what is to be made, such as {out / 'out'}")
    if len(os.fsencode(out.name)) > 220:
        raise UsageError(f"--out {out.name}: the name should have at most 220 bytes, since related files add to it")
    if out.name.endswith(RESERVED):
        raise UsageError(f"--out {out}: such names are reserved for files next to other outputs: choose another")
    if any(above.exists() and not above.is_dir() for above in out.parents):
        raise _below_a_file(out, "--out")


def _below_a_file(out: Path, flag: str) -> UsageError:
    link = next((path for path in (out, *out.parents) if path.is_symlink() and not path.exists()), None)
    what = f"{link} is a broken link" if link else "a part of this path is a file, not a folder"
    return UsageError(f"{flag} {out}: {what}: choose another")


def refuse_shared(
    out: Path, record: Path, others: Collection[Path] = (), flag: str = "--out", way_out: str = "choose another name"
) -> None:
    """`UsageError` if the files that go with `out`, `record` and `others`, belong to another output: those of a.pt and
    a have the same names. record: a file of options, in which the value of `flag` names the owner.
    """
    taken = None
    try:
        owner = tomllib.loads(read_whole(record, CONFIG_BYTES).decode())[flag.removeprefix("--")]
        other = out.with_name(Path(owner).name or "_")
        # An owner with another stem was renamed along with its files; .pt and .safetensors are one autoencoder.
        same = other.name == out.name or {other.suffix, out.suffix} == {".pt", ".safetensors"}
        on_hub = flag == "--sae" and not out.exists() and str(out) != owner
        if on_hub or (not same and stem(other) == stem(out) and other.exists()):
            raise UsageError(f"{flag} {out}: {record} and the files next to it belong to {owner}: {way_out}")
    except (FileNotFoundError, NotADirectoryError):
        # An empty file was just begun by a concurrent run, or is no loss.
        taken = next((path for path in others if os.path.lexists(path) and path.lstat().st_size), None)
    except (OSError, ValueError, RecursionError, KeyError, TypeError):
        taken = record
    if taken is not None and not out.exists():
        raise UsageError(
            f"{flag} {out}: {taken}, which would be replaced, already exists and is not from a run with this {flag}: "
            "choose another name, or remove it"
        )


def require_folder(out: Path, flag: str = "--out") -> None:
    """`UsageError` if `out` exists and is not a folder."""
    if out.exists() and not out.is_dir():
        raise UsageError(f"{flag} {out} should be a folder, found a file: choose another name")


def refuse_comparison_of(command: str, out: Path, member: str) -> None:
    """`UsageError` if the folder `out` holds the compare.json of `command`, recognised by `member`: two commands make
    comparisons, and give their files the same names."""
    with contextlib.suppress(OSError, IncompatibleError, TypeError):
        if member in read_json(out / "compare.json"):
            raise UsageError(f"--out {out} already contains a comparison by `{command}`: choose another folder")


def nearest_folder(path: Path) -> Path:
    """The first existing folder among an absolute path and its parents."""
    return next(folder for folder in (path, *path.parents) if folder.is_dir())


def require_space(path: str | os.PathLike[str], n_bytes: int) -> None:
    """Raise `ResidscopeError` when the disk of `path`, which need not exist yet, has less than `n_bytes` free."""
    free = shutil.disk_usage(nearest_folder(Path(path).absolute())).free
    if free < n_bytes:
        raise ResidscopeError(
            f"{path}: needs {human_bytes(n_bytes)}, but its disk has {human_bytes(free)} free. Use fewer tokens "
            "(--max-tokens), fewer layers (--layers), --codec zstd, or another disk"
        )
