"""Errors that an operator sees: what went wrong, where, and what to do next, with the exit code of the CLI.

Every room raises these; only the doors (`cli/`, `defs/`) turn them into text and exit codes.
"""

from __future__ import annotations

from enum import IntEnum


class ExitCode(IntEnum):
    """Exit codes of every `ssmd` command."""

    OK = 0
    FAILURE = 1
    USAGE = 2
    DEGRADED = 3
    NOT_FOUND = 4
    REFUSED = 5
    UNEXPLAINED = 6
    UNREACHABLE = 7
    CONFIGURATION = 8
    INTERRUPTED = 130


class SsmdError(Exception):
    """A failure that says what, where and what to do.

    `transient` is True where trying the same thing again later can succeed without anyone changing anything.
    """

    exit_code: ExitCode = ExitCode.FAILURE
    transient: bool = False

    def __init__(self, what: str, *, where: str = "", do: str = "") -> None:
        self.what = what
        self.where = where
        self.do = do
        super().__init__(what)

    def __str__(self) -> str:
        text = f"{self.what} ({self.where})" if self.where else self.what
        return f"{text}. {self.do}" if self.do else text


class UsageError(SsmdError):
    """The command's words are off."""

    exit_code = ExitCode.USAGE


class NotFoundError(SsmdError):
    """No such environment, day, market or object."""

    exit_code = ExitCode.NOT_FOUND


class RefusedError(SsmdError):
    """The state does not allow it, or another actor holds the day under a live lease."""

    exit_code = ExitCode.REFUSED


class UnexplainedDifferenceError(SsmdError):
    """Verification found a difference that no gap explains."""

    exit_code = ExitCode.UNEXPLAINED


class UnreachableError(SsmdError):
    """A server (NATS, Redis, object store, exchange, supervisor) did not answer."""

    exit_code = ExitCode.UNREACHABLE
    transient = True


class OutOfTimeError(SsmdError):
    """A run was stopped because it took longer than it may, not because somebody wanted it to stop."""

    transient = True


class ConfigurationError(SsmdError):
    """A file, key or credential is missing, wrong or refused; a person has to change it."""

    exit_code = ExitCode.CONFIGURATION
