"""The errors that a user sees: one line, an exit code, and the way out.

Everything else that is raised is a bug in this project and keeps its traceback. Messages name the thing, what was
expected, what was found, and what to do about it. Tested in tests/test_exit_codes.py.
"""

import errno
import resource


class ResidscopeError(Exception):
    """A run failed for a reason that the user can act on. If it is not one of the subclasses below: the request and its
    inputs are valid, but the machine, the network or the work itself failed."""

    exit_code = 1


class UsageError(ResidscopeError):
    """The command line or the configuration is invalid, or names something that does not exist."""

    exit_code = 2


class IncompatibleError(ResidscopeError):
    """Something that the user named exists but cannot be used here: a store, checkpoint, model, lens, text or analysis
    that is damaged, not one at all, or of the wrong kind, version, shape, configuration or content."""

    exit_code = 3


class Interrupted(ResidscopeError):
    """The run was stopped by a signal; the files on the disk are intact, and the same command continues it."""

    exit_code = 130


def stage_failed(name: str, code: int, way_out: str) -> ResidscopeError:
    """The error of a command whose stage `name`, a process of its own, ended with `code`; has the same exit code."""
    code = 128 - code if code < 0 else code  # for a signal, as a shell does
    error = ResidscopeError(f"{name} ended with exit code {code}; {way_out}")
    error.exit_code = code
    return error


_NO_MEMORY = ("allocate memory", "out of memory", "start new thread", "failed to map segment")
"""Messages of torch, safetensors, threads and the library loader, each of which has its own exception class."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether the system or a GPU has refused more memory or threads."""
    if isinstance(error, MemoryError) or (isinstance(error, OSError) and error.errno == errno.ENOMEM):
        return True
    # Under a memory limit, libraries that fail to load, or fail without a message, were refused memory.
    limited = resource.getrlimit(resource.RLIMIT_AS)[0] != resource.RLIM_INFINITY
    if limited and type(error) in (ImportError, SystemError):
        return True
    before = error.__cause__ or error.__context__
    return any(words in str(error).lower() for words in _NO_MEMORY) or (before is not None and is_out_of_memory(before))


def said(error: BaseException) -> str:
    """An exception's message on one line of at most 200 characters, or its class if the message is empty."""
    if isinstance(error, RecursionError):
        return "nested too deeply"
    text = " ".join(str(error).partition("; use sys.")[0].split())[:200].rstrip(".:")
    return f"no {text}" if isinstance(error, KeyError) else text or type(error).__name__
