"""`ssmd up` and `ssmd down`: parsing and printing. What they do is in `capture/stack.py`.

`ssmd up` stays in the foreground with a live screen until Ctrl-C, which takes everything down and exits with 0, since
that is how it is meant to end; interrupted before all is ready it takes everything down as well, and exits with 130.
With `--detach` an interruption ends only the waiting (130). A part that fails leaves the others running in both modes.
Without a terminal, as a service, it also ends once supervisord is gone, with an error: who runs it starts it again then.
"""

from __future__ import annotations

import asyncio
import contextlib
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ssmd_dagster.capture import stack
from ssmd_dagster.capture.supervisor import ProcessState
from ssmd_dagster.capture.supervisord import supervisor_is_gone
from ssmd_dagster.cli import output
from ssmd_dagster.environments.home import dagster_dir, exchanges_dir, project_dir, ssmd_home
from ssmd_dagster.environments.loader import load_registry
from ssmd_dagster.environments.models import Environment
from ssmd_dagster.errors import ConfigurationError, ExitCode, UnreachableError

if TYPE_CHECKING:
    from rich.console import RenderableType

_REFRESH_S = 1.0
_LOOK_S = 5.0
_MISSED_LOOKS = 3
_STATE_STYLES = {"RUNNING": "green", "STARTING": "yellow", "STOPPING": "yellow", "BACKOFF": "red", "FATAL": "red"}


@click.command("up")
@click.argument("names", nargs=-1, metavar="[ENV]...")
@click.option("--detach", is_flag=True, help="Return as soon as everything is ready.")
@click.option("--no-dagster", is_flag=True, help="Leave Dagster to the user.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON once everything is ready.")
@click.pass_context
def up(ctx: click.Context, names: tuple[str, ...], detach: bool, no_dagster: bool, as_json: bool) -> None:
    """Start what the environments need: servers, simulated exchange, Dagster. Without ENV: all enabled environments.

    In the foreground until Ctrl-C, which stops everything again (exit code 0). What runs already is left as it is.
    """
    environments = _chosen(names)
    ctx.exit(asyncio.run(_up(environments, ssmd_home(), detach=detach, dagster=not no_dagster, as_json=as_json)))


@click.command("down")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def down(as_json: bool) -> None:
    """Stop everything that runs in this home, day captures first, servers last. Nothing running is a success."""
    result = asyncio.run(stack.down(ssmd_home(), report=_report(quiet=as_json)))
    if as_json:
        output.print_json({"stopped": result.stopped, "ended": result.ended})
    elif result.stopped or result.ended:
        click.echo("Everything is stopped.")
    else:
        click.echo("Nothing was running.")


def _chosen(names: Sequence[str]) -> list[Environment]:
    registry = load_registry()
    if names:
        return [registry.get(name) for name in dict.fromkeys(names)]
    for name in sorted(registry.broken):
        output.message(f"Left out: {name}, whose configuration has faults; see: ssmd env validate {name}")
    enabled = [environment for _, environment in sorted(registry.environments.items()) if environment.enabled]
    if not enabled:
        raise ConfigurationError(
            "no usable environment is enabled", where=str(exchanges_dir()), do="Name one: ssmd up ENV"
        )
    return enabled


async def _up(environments: list[Environment], home: Path, *, detach: bool, dagster: bool, as_json: bool) -> int:
    with _interruption() as interrupted:
        coming_up = asyncio.ensure_future(
            stack.up(environments, home, exchanges_dir(), dagster=dagster, report=_report(quiet=as_json))
        )
        waiting = asyncio.ensure_future(interrupted.wait())
        try:
            await asyncio.wait({coming_up, waiting}, return_when=asyncio.FIRST_COMPLETED)
            if not coming_up.done():
                coming_up.cancel()
                await asyncio.gather(coming_up, return_exceptions=True)
                if detach:
                    output.message("Interrupted. What was started goes on; stop it with `ssmd down`.")
                else:
                    output.message("Interrupted. Stopping everything.")
                    await stack.down(home, report=_report(quiet=as_json))
                return ExitCode.INTERRUPTED
            result = await coming_up
        finally:
            waiting.cancel()
        if as_json:
            output.print_json(_as_json(environments, home, result))
        else:
            _print_up(environments, home, result, detach=detach)
        if detach:
            return ExitCode.OK
        await _stay(environments, home, result, interrupted, as_json=as_json)
        output.message("Stopping everything.")
        await stack.down(home, report=_report(quiet=as_json))
    return ExitCode.OK


@contextlib.contextmanager
def _interruption() -> Iterator[asyncio.Event]:
    """Give an event that SIGINT, SIGTERM or SIGHUP (a closed terminal) sets; a second one is the usual end."""
    interrupted = asyncio.Event()
    loop = asyncio.get_running_loop()
    signals = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

    def interrupt() -> None:
        interrupted.set()
        restore()

    def restore() -> None:
        for number in signals:
            loop.remove_signal_handler(number)

    for number in signals:
        loop.add_signal_handler(number, interrupt)
    try:
        yield interrupted
    finally:
        restore()


def _report(*, quiet: bool) -> stack.Report:
    def report(progress: stack.Progress) -> None:
        if quiet or progress.state == "starting":
            return
        if progress.state == "note":
            output.message(f"  {progress.part}: {progress.detail}")
            return
        words = {"running": "runs already", "ready": "ready", "stopped": "stopped"}
        detail = f" {progress.detail}" if progress.detail else ""
        output.step(f"{progress.part} {words[progress.state]}{detail}", err=True)

    return report


def _print_up(environments: Sequence[Environment], home: Path, result: stack.Up, *, detach: bool) -> None:
    names = ", ".join(environment.name for environment in environments)
    click.echo(f"{'Up' if result.started else 'Already up'}: {names}")
    click.echo(f"Home: {home}")
    if "dagster-webserver" in (*result.started, *result.already):
        click.echo(f"Dagster: {result.stack.dagster}")
    else:
        workspace = project_dir() / "workspace.yaml"
        click.echo(f"Dagster: not started; DAGSTER_HOME={dagster_dir(home)} dagster dev -w {workspace}")
    click.echo(f"Next: ssmd day start {environments[0].name}")
    click.echo(f"Stop: {'ssmd down' if detach else 'Ctrl-C'}")


def _as_json(environments: Sequence[Environment], home: Path, result: stack.Up) -> dict[str, Any]:
    names = (*result.started, *result.already)
    return {
        "home": str(home),
        "environments": [environment.name for environment in environments],
        "started": result.started,
        "already": result.already,
        "nats": result.stack.nats if "nats" in names else None,
        "cache": result.stack.cache if "cache" in names else None,
        "simulators": {
            name: {"endpoint": address.endpoint, "rest_endpoint": address.rest_endpoint}
            for name, address in result.stack.simulators.items()
            if f"simulator-{name}" in names
        },
        "dagster": result.stack.dagster if "dagster-webserver" in names else None,
    }


async def _stay(
    environments: Sequence[Environment], home: Path, result: stack.Up, interrupted: asyncio.Event, *, as_json: bool
) -> None:
    """Show what runs until interrupted; where stdout is no terminal, only wait while there is a supervisord."""
    if as_json or not sys.stdout.isatty():
        await _wait(home, interrupted, as_json=as_json)
        return
    from rich.live import Live

    watch = stack.Watch(environments, home)
    async with watch:
        with Live(screen=True, auto_refresh=False) as live:
            while not interrupted.is_set():
                live.update(_screen(environments, result, await _look(watch), watch.days), refresh=True)
                await _pause(interrupted, _REFRESH_S)


async def _wait(home: Path, interrupted: asyncio.Event, *, as_json: bool) -> None:
    """Wait until interrupted. Raises `UnreachableError`, with nothing left running, once supervisord is gone."""
    missed = 0
    while missed < _MISSED_LOOKS:
        await _pause(interrupted, _LOOK_S)
        if interrupted.is_set():
            return
        missed = missed + 1 if await supervisor_is_gone(home) else 0
    # Whoever runs this as a service kills what is left of it; told to end, a connector loses nothing.
    await stack.down(home, report=_report(quiet=as_json))
    raise UnreachableError(
        "supervisord is gone, so nothing that dies would be started again; stopped what it left behind",
        where=str(home),
        do="Run `ssmd up` again (a service does so by itself); the day comes back with `ssmd day recover`",
    )


async def _pause(interrupted: asyncio.Event, length_s: float) -> None:
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(length_s):
            await interrupted.wait()


async def _look(watch: stack.Watch) -> list[ProcessState] | str:
    try:
        return await watch.processes()
    except UnreachableError as error:
        # Shown in place of the table: `ssmd down` elsewhere, or a killed supervisord.
        return str(error)


def _screen(
    environments: Sequence[Environment],
    result: stack.Up,
    processes: list[ProcessState] | str,
    days: dict[str, stack.DayNow],
) -> RenderableType:
    from rich.box import SIMPLE_HEAD
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    day_table = Table("Environment", "Day", "State", title="Days", title_justify="left", box=SIMPLE_HEAD)
    for environment in environments:
        now = days.get(environment.name, stack.DayNow())
        day_table.add_row(environment.name, now.date or "-", now.state or "-")
    if isinstance(processes, str):
        body: RenderableType = Text(processes, style="red")
    else:
        body = Table(
            "Group", "Process", "State", "Pid", "For", title="Processes", title_justify="left", box=SIMPLE_HEAD
        )
        for state in processes:
            style = _STATE_STYLES.get(state.state, "dim")
            pid = "-" if state.pid is None else str(state.pid)
            since = output.duration(time.time_ns() - state.since_ns) if state.since_ns else "-"
            body.add_row(state.group, state.name, Text(state.state, style=style), pid, since)
    last = Text.assemble(
        ("Dagster ", "bold"),
        result.stack.dagster or "-",
        "   ",
        ("Next ", "bold"),
        f"ssmd day start {environments[0].name}",
    )
    return Group(day_table, body, last, Text("Ctrl-C stops everything.", style="dim"))
