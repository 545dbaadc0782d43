"""The errors that a user sees: one line, an exit code, and the way out.

A command turns a `ResidscopeError` into a single line on stderr and its exit code (see `store.console.run_command`).
Everything else that is raised is a bug in this project and keeps its traceback. Messages name the thing, what was
expected, what was found, and what to do about it.
"""


class ResidscopeError(Exception):
    """A run failed for a reason that the user can act on."""

    exit_code = 1


class UsageError(ResidscopeError):
    """The command line or the configuration makes no sense."""

    exit_code = 2


class IncompatibleError(ResidscopeError):
    """A store or checkpoint is of another kind, version, shape or configuration than what was asked of it."""

    exit_code = 3


class Interrupted(ResidscopeError):
    """The run was stopped by a signal; what is on disk is whole, and the same command continues it."""

    exit_code = 130
