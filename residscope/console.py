"""What all commands share at the terminal: exit codes, one-line errors, signals, progress bars, and human units.

Progress and messages go to stderr, results to stdout, so that `--json` can be piped.
"""

import errno
import io
import os
import re
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from residscope.errors import Interrupted, ResidscopeError, UsageError, is_out_of_memory, said
from residscope.escape import printable_streams

if TYPE_CHECKING:
    from tqdm import tqdm


def run_command(
    name: str, command: Callable[[], int | None], *, interrupted: str = "interrupted; run the same command again"
) -> int:
    """Run `command`; a user's error becomes one line on stderr and its exit code, never a traceback.

    Both streams accept any text, whatever the terminal's encoding: what it cannot show is escaped (`\\u65e5`). Also
    handles an interrupt (Ctrl-C or SIGTERM), out-of-memory errors, and the operating system's errors about the disk
    (no space, no permission, read-only, no such path). interrupted: the message after an interrupt.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    # Read when torch loads: its idle threads should sleep, not spin on cores that our other threads need.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    with printable_streams():
        return _run(name, command, interrupted)


def _run(name: str, command: Callable[[], int | None], interrupted: str) -> int:
    try:
        Path.cwd()
    except OSError:  # Without this check, libraries would fail in their own ways.
        return _fail(name, "the working folder is gone or cannot be read: change to another", UsageError.exit_code)
    try:
        with terminate_as_interrupt():
            code = command() or 0
            sys.stdout.flush()
            return code
    except ResidscopeError as error:
        return _fail(name, str(error), error.exit_code)
    except KeyboardInterrupt:
        return _fail(name, interrupted, Interrupted.exit_code)
    except Exception as error:
        if getattr(error, "filename", None) and error.filename == getattr(sys.stdout, "name", None):  # type: ignore[attr-defined]
            # Redirect stdout, so that the interpreter's last flush does not fail too.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            if isinstance(error, BrokenPipeError):  # The reader closed the pipe (`| head`).
                return 0
        if isinstance(error, RuntimeError) and str(error).startswith("Symlink loop from "):  # pathlib before 3.13
            error = OSError(errno.ELOOP, os.strerror(errno.ELOOP), str(error)[19:-1])
        if isinstance(error.__cause__, KeyboardInterrupt):  # Python wraps what is raised in `__set_name__`.
            return _fail(name, interrupted, Interrupted.exit_code)
        if is_out_of_memory(error):
            first = said(error)
            return _fail(name, f"not enough memory ({first}). Use smaller settings or a machine with more memory", 1)
        if not isinstance(error, OSError) or error.errno not in DISK_ERRORS:
            raise
        # If the folder of temporary files is full, the error names no file, or is Python's FileNotFoundError.
        full = error.errno in (errno.ENOSPC, errno.EDQUOT) or "temporary directory" in str(error.strerror)
        if full and error.filename is None:
            where = f"{error.strerror}, perhaps in {os.environ.get('TMPDIR', '/tmp')}, the folder for temporary files"
            return _fail(name, f"{where}. Free some space, or set TMPDIR to a folder with room, then {_AGAIN}", 1)
        if error.errno == errno.ENOENT and error.filename is None:
            raise
        where = f": {error.filename}" if error.filename else ""
        return _fail(name, f"{error.strerror}{where}. {DISK_ERRORS[error.errno]}", 1)


_AGAIN = "run the same command again: `harvest` and `train --resume` continue where they stopped"

DISK_ERRORS = {
    errno.ENOSPC: f"Free some space, then {_AGAIN}",
    errno.EDQUOT: f"Free some of the quota, then {_AGAIN}",
    errno.EROFS: "The file system is read-only: choose another place to write to",
    errno.EACCES: "Check the permissions, or choose another place to write to",
    errno.EPERM: "Check the permissions, or choose another place to write to",
    errno.ENOENT: "It cannot be made there, or was removed meanwhile: check the path, or choose another place",
    errno.ENOTDIR: "A part of this path is a file, not a folder: choose another place",
    errno.EEXIST: "A file already exists where a folder should be: choose another place",
    errno.ELOOP: "A link leads back to itself: choose another place, or correct the link",
    errno.EISDIR: "A file should be there, not a folder: choose another name",
    errno.ENAMETOOLONG: "Choose a shorter name",
    errno.EFBIG: "The file system or a limit (`ulimit -f`) allows no larger file: choose another place to write to",
    errno.EMFILE: "Raise the limit of open files (`ulimit -n`), then run the same command again",
    errno.EPIPE: f"The process that reads it has ended: {_AGAIN}",
    errno.EIO: "The disk reports a fault: check it before you trust what is on it",
}


def _fail(name: str, message: str, exit_code: int) -> int:
    print(f"{name}: error: {message}".replace("\n", "\\n"), file=sys.stderr)
    return exit_code


@contextmanager
def terminate_as_interrupt() -> Iterator[None]:
    """Let SIGTERM end a command like Ctrl-C, with the same message and exit code."""
    try:
        previous = signal.signal(signal.SIGTERM, signal.default_int_handler)
    except ValueError:  # Only the main thread may set handlers.
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)


@contextmanager
def stop_on_signals() -> Iterator[Callable[[], bool]]:
    """Yield a function that tells whether SIGINT or SIGTERM was received, so that a loop can stop between two steps.

    A second signal of the same kind acts at once. Outside the main thread the function always returns False.
    """
    received: list[int] = []
    previous: dict[int, object] = {}

    def note(signum: int, frame: object) -> None:
        received.append(signum)
        signal.signal(signum, previous[signum])  # type: ignore[arg-type]

    try:
        for signum in (signal.SIGINT, signal.SIGTERM):
            previous[signum] = signal.getsignal(signum)  # First, because a signal may arrive as soon as `note` is set.
            signal.signal(signum, note)
    except ValueError:
        previous.clear()
    try:
        yield lambda: bool(received)
    finally:
        for signum, handler in previous.items():
            signal.signal(signum, handler)  # type: ignore[arg-type]


def progress(name: str, unit: str, total: int, *, done: int = 0) -> "tqdm[Any]":
    """A progress bar on a terminal; elsewhere (in a log) a plain line every half minute."""
    from tqdm import tqdm

    if sys.stderr.isatty():
        how: dict[str, Any] = {"mininterval": 0.5, "dynamic_ncols": True}
    else:
        form = "{desc}: {percentage:.0f} %, {n_fmt} of {total_fmt} {unit}, {remaining} left, {rate_fmt}{postfix}"
        how = {"mininterval": _LOG_SECONDS, "delay": _LOG_SECONDS, "bar_format": form, "file": _Lines()}
    return tqdm(total=total, initial=done, desc=name, unit=unit, unit_scale=True, **how)


_LOG_SECONDS = 30.0


class _Lines:
    """Stderr for a progress bar that redraws itself: each state becomes a line."""

    def write(self, text: str) -> None:
        if text := text.strip():
            print(text, file=sys.stderr, flush=True)

    def flush(self) -> None:
        """Does nothing: `write` flushes every line."""


def human_bytes(n: float) -> str:
    """`n` bytes in decimal units, as disks are sold: 34.6 kB, 655 GB."""
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if abs(n) < 1000:
            return f"{n:.0f} B" if unit == "B" else f"{n:.3g} {unit}"
        n /= 1000
    return f"{n:.3g} PB"


def parse_bytes(text: str) -> int | None:
    """The bytes of a size in decimal units, as `human_bytes` writes them (50GB, 1.5 TB); None if it is not a size."""
    match = re.fullmatch(r"(\d{1,18}(?:\.\d+)?) ?([kMGTP]?)B", text.strip())
    return None if match is None else int(float(match[1]) * 1000 ** " kMGTP".index(match[2] or " "))


def human_seconds(seconds: float) -> str:
    """A readable duration: 0.5 s, 42 s, 3 min 20 s, 2 h 05 min."""
    if seconds < 60:
        return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    return f"{minutes // 60} h {minutes % 60:02d} min"


def counted(n: int, noun: str) -> str:
    """A number with its noun: 1 document, 2,000 documents."""
    return f"{n:,} {noun}" + ("" if n == 1 else "s")


def ranges(numbers: Sequence[int], separator: str = ",") -> str:
    """Ascending integers as ranges: 0-5,11."""
    starts = [0, *(i for i, (a, b) in enumerate(pairwise(numbers), 1) if b != a + 1), len(numbers)]
    parts = [numbers[a:b] for a, b in pairwise(starts)]
    return separator.join(str(part[0]) if len(part) == 1 else f"{part[0]}-{part[-1]}" for part in parts)


def aligned(lines: Sequence[Sequence[str]]) -> list[str]:
    """Lines of words as a table, right-aligned, each column as wide as its longest word."""
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    return ["  ".join(word.rjust(width) for word, width in zip(line, widths, strict=True)) for line in lines]
