"""The errors that a user sees: one line, an exit code, and the way out.

Everything else that is raised is a bug in this project and keeps its traceback. Messages name the thing, what was
expected, what was found, and what to do about it. Tested in tests/test_exit_codes.py.
"""

import errno
import resource


class ResidscopeError(Exception):
    """A run failed for a reason that the user can act on. Where it is none of the kinds below: the request makes sense
    and what it names is good, but the machine, the network or the work itself failed."""

    exit_code = 1


class UsageError(ResidscopeError):
    """The command line or the configuration makes no sense, or names what is not there."""

    exit_code = 2


class IncompatibleError(ResidscopeError):
    """What is named is there and cannot be used for this: a store, checkpoint, model, lens, text or analysis that is
    damaged, or is not one at all, or has another kind, version, shape, configuration or content than is needed."""

    exit_code = 3


class Interrupted(ResidscopeError):
    """The run was stopped by a signal; what is on disk is whole, and the same command continues it."""

    exit_code = 130


_NO_MEMORY = ("allocate memory", "out of memory", "start new thread", "failed to map segment")
"""What torch, safetensors, threads and the loader of libraries say, each in a class of its own."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether it says that the system, or a GPU, gives no more memory or threads."""
    if isinstance(error, MemoryError) or (isinstance(error, OSError) and error.errno == errno.ENOMEM):
        return True
    # Under a limit, libraries that cannot be loaded or that fail without a word were refused memory.
    limited = resource.getrlimit(resource.RLIMIT_AS)[0] != resource.RLIM_INFINITY
    if limited and type(error) in (ImportError, SystemError):
        return True
    before = error.__cause__ or error.__context__
    return any(words in str(error).lower() for words in _NO_MEMORY) or (before is not None and is_out_of_memory(before))


def said(error: BaseException) -> str:
    """What an exception says, on one line of at most 200 characters, or its class where that says more."""
    if isinstance(error, RecursionError):
        return "nested too deeply"
    text = " ".join(str(error).partition("; use sys.")[0].split())[:200].rstrip(".:")
    return f"no {text}" if isinstance(error, KeyError) else text or type(error).__name__
