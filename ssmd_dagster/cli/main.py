"""`ssmd`: finds the command, and turns whatever it raises into a message and an exit code. No command lives here.

A command's module is imported when it is called, so that `ssmd --help` and `ssmd day status` stay quick.
"""

from __future__ import annotations

import errno
import importlib
import json
import os
import signal
import sys
import traceback
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

import click
from click.shell_completion import get_completion_class

from ssmd_dagster.environments.home import logs_dir, ssmd_home
from ssmd_dagster.errors import ExitCode, SsmdError
from ssmd_dagster.leaving import leave

PROGRAM = "ssmd"
COMPLETION_VARIABLE = "_SSMD_COMPLETE"
LOG_MAX_BYTES = 1_000_000
_DISK = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO})

_COMMANDS: dict[str, tuple[str, str]] = {
    "demo": ("ssmd_dagster.cli.demo:demo_command", "Run a whole trading day on this machine, in about a minute."),
    "up": ("ssmd_dagster.cli.stack:up", "Start the embedded servers, the simulated exchange and Dagster."),
    "down": ("ssmd_dagster.cli.stack:down", "Stop everything that runs in this home."),
    "day": ("ssmd_dagster.cli.day:day_group", "Start, end, roll and look at trading days."),
    "data": ("ssmd_dagster.cli.data:data_group", "Look at recorded days: inventory, gaps, coverage, books, exports."),
    "env": ("ssmd_dagster.cli.env:env_group", "Show and check the configured environments."),
    "sim": ("ssmd_dagster.simulator.main:sim_command", "Run a simulated exchange by itself, to test any recorder."),
    "secmaster": ("ssmd_dagster.cli.secmaster:secmaster_group", "Bring in and look at the list of markets."),
}
"""Where each command lives, and its line in the help: reading it must not import the command."""


class _LazyGroup(click.Group):
    """A group whose commands are imported when they are called."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return [*_COMMANDS, *sorted(self.commands)]

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in _COMMANDS:
            return super().get_command(ctx, cmd_name)
        module, _, attribute = _COMMANDS[cmd_name][0].partition(":")
        command: click.Command = getattr(importlib.import_module(module), attribute)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        rows = [(name, text) for name, (_, text) in _COMMANDS.items()]
        rows += [(name, command.get_short_help_str()) for name, command in sorted(self.commands.items())]
        with formatter.section("Commands"):
            formatter.write_dl(rows)


@click.group(PROGRAM, cls=_LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="ssmd-dagster", message="%(package)s %(version)s")
@click.pass_context
def cli(ctx: click.Context) -> None:
    """Record an exchange's market data day by day, and prove that each day is complete.

    Exit codes: 0 done or already so, 1 failure, 2 usage, 3 done but degraded, 4 no such day or environment, 5 refused,
    6 unexplained difference, 7 a server cannot be reached, 8 configuration, 130 interrupted.
    """
    ctx.color = False if os.environ.get("NO_COLOR") else None


@cli.command(short_help="Print a shell's completion script.")
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
def completion(shell: str) -> None:
    """Print a shell's completion script, for `eval "$(ssmd completion bash)"`."""
    found = get_completion_class(shell)
    assert found is not None, "click knows every shell that the argument allows"
    click.echo(found(cli, {}, PROGRAM, COMPLETION_VARIABLE).source())


def main() -> NoReturn:
    """Run the command line of this process and exit. To be told to end, or to lose the terminal, is to be interrupted."""
    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) is signal.SIG_DFL:  # `nohup` has it ignored
            signal.signal(number, _interrupt)
    leave(run(sys.argv[1:]))


def _interrupt(_number: int, _frame: FrameType | None) -> None:
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # a script's background job
        raise KeyboardInterrupt
    signal.raise_signal(signal.SIGINT)


def run(arguments: Sequence[str]) -> int:
    """Run a command line and return its exit code. Errors go to stderr, as JSON if `--json` is among the arguments."""
    as_json = "--json" in arguments
    try:
        result = cli.main(list(arguments), PROGRAM, complete_var=COMPLETION_VARIABLE, standalone_mode=False)
    except click.exceptions.Abort:
        return _fail(ExitCode.INTERRUPTED, "interrupted", as_json=as_json)
    except click.UsageError as error:
        usage = f"Run `{error.ctx.command_path} --help`" if error.ctx is not None else ""
        return _fail(ExitCode.USAGE, error.format_message(), do=usage, as_json=as_json)
    except click.ClickException as error:
        return _fail(error.exit_code, error.format_message(), as_json=as_json)
    except OSError as error:
        if _can_print():
            if error.errno not in _DISK:
                return _fail_with(error, arguments, as_json=as_json)
            where = str(error.filename or os.environ.get("SSMD_HOME") or "the folder of local state")
            do = "Make room, or set SSMD_HOME to another disk; then the same command goes on"
            return _fail(ExitCode.FAILURE, f"the disk failed: {error.strerror}", where=where, do=do, as_json=as_json)
        # Who reads it (`| head`) has seen enough; a disk that is full wants to be known.
        if not isinstance(error, BrokenPipeError):
            return _fail(ExitCode.FAILURE, f"stdout cannot be written: {error.strerror}", as_json=as_json)
        return ExitCode.FAILURE
    except Exception as error:  # noqa: BLE001 - the one place where everything ends
        return _fail_with(error, arguments, as_json=as_json)
    return result if isinstance(result, int) else ExitCode.OK


def _can_print() -> bool:
    """Say whether stdout takes what was printed."""
    try:
        sys.stdout.flush()
    except OSError:
        return False
    return True


def _fail_with(error: Exception, arguments: Sequence[str], *, as_json: bool) -> int:
    known: BaseException = error
    while isinstance(known, BaseExceptionGroup) and len(known.exceptions) == 1:
        known = known.exceptions[0]
    if isinstance(known, SsmdError):
        return _fail(known.exit_code, known.what, where=known.where, do=known.do, as_json=as_json)
    text = f"{type(known).__name__}: {known}".strip().splitlines()[0]
    log = _keep_traceback(error, arguments)
    return _fail(ExitCode.FAILURE, f"unexpected {text}", do=f"The traceback is in {log}", as_json=as_json)


def _fail(code: int, what: str, *, where: str = "", do: str = "", as_json: bool) -> int:
    if as_json:
        error: dict[str, Any] = {"exit_code": int(code), "what": what, "where": where, "do": do}
        click.echo(json.dumps({"error": error}, ensure_ascii=False), err=True)
        return code
    head = click.style("Error:", fg="red")
    click.echo(f"{head} {what}{f' ({where})' if where else ''}", err=True, color=_color())
    if do:
        click.echo(f"  {do}", err=True)
    return code


def _color() -> bool | None:
    # Outside of a click context, which otherwise carries it.
    return False if os.environ.get("NO_COLOR") else None


def _keep_traceback(error: Exception, arguments: Sequence[str]) -> Path | str:
    """Append the traceback to `logs/cli.log` (two files of at most a megabyte) and return the file's path."""
    text = "".join(traceback.format_exception(error))
    try:
        log = logs_dir(ssmd_home()) / "cli.log"
        log.parent.mkdir(mode=0o700, exist_ok=True)
        if log.exists() and log.stat().st_size > LOG_MAX_BYTES:
            log.replace(log.with_suffix(".log.1"))
        with log.open("a", encoding="utf-8", errors="backslashreplace") as file:
            file.write(f"{datetime.now(UTC).isoformat()} {PROGRAM} {' '.join(arguments)}\n{text}\n")
    except (OSError, SsmdError):
        # Without a place to keep it the terminal has to do: a lost traceback helps nobody.
        click.echo(text, err=True)
        return "the lines above"
    return log


if __name__ == "__main__":
    main()
