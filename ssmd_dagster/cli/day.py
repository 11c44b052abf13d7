"""`ssmd day`: the verbs of a trading day. Parsing and printing only; what they do is in `workflows/`."""

from __future__ import annotations

import sys
from typing import Any

import click

from ssmd_dagster.capture.setting import load_setting
from ssmd_dagster.cli.desk import default_env, env_argument, json_option, with_desk
from ssmd_dagster.cli.output import (
    duration,
    mark,
    message,
    print_json,
    rfc3339,
    thousands,
    time_of_day,
    to_the_minute,
)
from ssmd_dagster.day.calendar import parse_date
from ssmd_dagster.day.events import TradingDay
from ssmd_dagster.day.states import DayState
from ssmd_dagster.errors import ExitCode, RefusedError
from ssmd_dagster.workflows.attempt import Attempt, Options
from ssmd_dagster.workflows.desk import Desk, Progress
from ssmd_dagster.workflows.end import END
from ssmd_dagster.workflows.rebuild import rebuild
from ssmd_dagster.workflows.recover import recovery_of
from ssmd_dagster.workflows.roll import dates_to_roll, roll
from ssmd_dagster.workflows.start import START
from ssmd_dagster.workflows.views import DayView, history, ledger_of, show, status

_date_option = click.option(
    "--date", metavar="YYYY-MM-DD", help="Trading day, in the environment's timezone. Default: the current one."
)
_reason_option = click.option("--reason", help="Why; kept in the journal.")

HISTORY_COLUMNS = (("DATE", 12), ("STATE", 10), ("START", 19), ("END", 20), ("MSGS", 11), ("GAPS", 0))


@click.group("day")
def day_group() -> None:
    """Start, end, roll and look at trading days."""


@day_group.command("status")
@env_argument
@_date_option
@json_option
def status_command(env: str, date: str | None, as_json: bool) -> None:
    """Show the current trading day and how its processes fare."""
    view = with_desk(env, lambda desk: status(desk, _checked_date(date)))
    if as_json:
        print_json(view.to_json(env))
        return
    click.echo(f"Environment: {env}")
    click.echo(f"Trading Day: {view.day.date}")
    click.echo(f"State: {view.state}")
    if view.day.started_ns is not None:
        ago = duration(view.at_ns - view.day.started_ns)
        click.echo(f"Started: {rfc3339(view.day.started_ns)} ({ago} ago)")
    click.echo(f"Messages: {thousands(view.messages)}")
    click.echo(f"Gaps: {view.gaps}")
    if view.error:
        click.echo(f"Error: {view.error}")
        _print_next_command(env, view)


@day_group.command("start")
@env_argument
@_date_option
@click.option("--mode", type=click.Choice(["live", "replay"]), help="Default: live while the day's window is open.")
@_reason_option
@json_option
def start_command(env: str, date: str | None, mode: str | None, reason: str | None, as_json: bool) -> int:
    """Start a trading day: sync, connect, and see that data flows."""
    printer = _Printer(as_json)

    async def body(desk: Desk) -> tuple[Attempt, TradingDay]:
        wanted = _checked_date(date) or desk.today()
        attempt = Attempt(desk, wanted, START, Options(mode=mode, reason=reason))  # type: ignore[arg-type] # click checks the choice
        printer.head(f"Starting trading day {wanted}...")
        return attempt, await attempt.go()

    attempt, day = with_desk(env, body, printer)
    if attempt.already:
        printer.line(f"Trading day {day.date} is ACTIVE already")
    else:
        printer.line(f"Trading day {day.date} is {day.state}")
    return _finish(env, day, as_json, already=attempt.already)


@day_group.command("end")
@env_argument
@_date_option
@click.option("--force", is_flag=True, help="Skip the waiting and the verification; the day is then degraded.")
@_reason_option
@json_option
def end_command(env: str, date: str | None, force: bool, reason: str | None, as_json: bool) -> int:
    """End a trading day: drain, flush, stop, verify, and record its completion."""
    printer = _Printer(as_json)

    async def body(desk: Desk) -> tuple[Attempt, TradingDay]:
        wanted = _checked_date(date) or (await desk.book.refresh()).current
        if wanted is None:
            raise RefusedError("there is no trading day to end", where=env, do=f"Start one: `ssmd day start {env}`.")
        attempt = Attempt(desk, wanted, END, Options(force=force, reason=reason))
        printer.head(f"Ending trading day {wanted}...")
        return attempt, await attempt.go()

    attempt, day = with_desk(env, body, printer)
    printer.line(f"Trading day {day.date} is COMPLETE{' already' if attempt.already else ''}")
    return _finish(env, day, as_json, already=attempt.already)


@day_group.command("roll")
@env_argument
@json_option
def roll_command(env: str, as_json: bool) -> int:
    """End the current trading day and start the next one."""
    printer = _RollPrinter(as_json)

    async def body(desk: Desk) -> Any:
        ending, starting = await dates_to_roll(desk)
        printer.head(f"Rolling from {ending} to {starting}...")
        return await roll(desk)

    rolled = with_desk(env, body, printer)
    if rolled.already:
        printer.line(f"Day {rolled.started.date} is ACTIVE already")
    else:
        printer.day_line(rolled.ended.date, rolled.ended.state)
    printer.line("Roll complete")
    if as_json:
        print_json(
            {
                "environment": env,
                "already": rolled.already,
                "ended": {
                    "date": rolled.ended.date,
                    "state": rolled.ended.state.value,
                    "condition": rolled.ended.condition,
                },
                "started": {"date": rolled.started.date, "state": rolled.started.state.value},
            }
        )
    return _exit_code(rolled.ended)


@day_group.command("recover")
@env_argument
@_date_option
@_reason_option
@json_option
def recover_command(env: str, date: str | None, reason: str | None, as_json: bool) -> int:
    """Bring a trading day back from whatever was killed: to ACTIVE, or on to COMPLETE."""
    printer = _Printer(as_json)

    async def body(desk: Desk) -> tuple[Attempt, TradingDay]:
        attempt = await recovery_of(desk, _checked_date(date), reason)
        printer.head(f"Recovering trading day {attempt.date}...")
        return attempt, await attempt.go()

    attempt, day = with_desk(env, body, printer)
    printer.line(f"Trading day {day.date} is {day.state}{' already' if attempt.already else ''}")
    return _finish(env, day, as_json, already=attempt.already)


@day_group.command("history")
@env_argument
@click.option("--limit", type=click.IntRange(min=1), default=7, show_default=True, help="How many days.")
@json_option
def history_command(env: str, limit: int, as_json: bool) -> None:
    """List trading days from the journal, newest first."""
    views = with_desk(env, lambda desk: history(desk, limit))
    if as_json:
        print_json({"environment": env, "days": [view.to_json(env) for view in views]})
        return
    print_history(views)


@day_group.command("show")
@click.argument("words", metavar="[ENV] DATE", nargs=-1, required=True)
@click.pass_context
@json_option
def show_command(ctx: click.Context, words: tuple[str, ...], as_json: bool) -> None:
    """Show one trading day: times, counts, gaps, condition, ledger, and where its files are."""
    if len(words) > 2:
        raise click.UsageError("expected [ENV] DATE", ctx)
    date = parse_date(words[-1]).isoformat()
    env = words[0] if len(words) == 2 else default_env()
    view = with_desk(env, lambda desk: show(desk, date))
    if as_json:
        print_json(view.to_json(env))
        return
    print_day(env, view)


@day_group.command("rebuild")
@env_argument
@json_option
def rebuild_command(env: str, as_json: bool) -> None:
    """Empty the cache's keys of all days and write them again from the journal."""
    book = with_desk(env, rebuild)
    if as_json:
        print_json({"environment": env, "days": len(book.days), "journal_seq": book.tip_seq})
    else:
        click.echo(f"Rebuilt {len(book.days)} days of {env} from the journal (sequence {book.tip_seq})")


def print_history(views: list[DayView]) -> None:
    """Print days as a table, in the order given."""
    click.echo(_row([title for title, _ in HISTORY_COLUMNS]))
    for view in views:
        day = view.day
        cells = [
            day.date,
            view.state.value,
            to_the_minute(day.started_ns) if day.started_ns is not None else "-",
            to_the_minute(day.ended_ns) if day.ended_ns is not None else "-",
            thousands(view.messages),
            str(view.gaps),
        ]
        click.echo(_row(cells))


def print_day(env: str, view: DayView) -> None:
    """Print everything that is known of one day."""
    day = view.day
    click.echo(f"Trading Day: {day.date}")
    click.echo(f"Environment: {env}")
    click.echo(f"State: {view.state}")
    zone = load_setting(env).env.calendar()
    for title, at_ns in (("Started", day.started_ns), ("Ended", day.ended_ns)):
        if at_ns is not None:
            local = zone.local(at_ns)
            here = "" if not local.utcoffset() else f" ({local.strftime('%Y-%m-%d %H:%M:%S %Z')})"
            click.echo(f"{title}: {rfc3339(at_ns)}{here}")
    if day.started_ns is not None:
        click.echo(f"Duration: {duration((day.ended_ns or view.at_ns) - day.started_ns)}")
    click.echo(f"Messages: {thousands(view.messages)}")
    click.echo(f"Gaps: {view.gaps}")
    for gap in day.gaps:
        until = time_of_day(gap.to_ns) if gap.to_ns is not None else "now"
        outcome = f", {gap.outcome}" if gap.outcome in ("healed", "repaired") else ""
        click.echo(f"  - {time_of_day(gap.from_ns)} - {until} ({gap.cause}{outcome})")
    if day.archive_url is not None:
        click.echo(f"Archive: {day.archive_url}")
    if day.condition is not None:
        click.echo(f"Condition: {day.condition}")
        for reason in day.condition_reasons:
            click.echo(f"  - {reason}")
    ledger = ledger_of(day)
    if ledger is not None:
        click.echo("Ledger:")
        names = ("received", "spooled", "published", "archived")
        click.echo(f"  {'':<20}" + "".join(f"{name:>12}" for name in names))
        for sheet in ledger.channels:
            counts = [getattr(sheet, name) for name in names]
            click.echo(f"  {sheet.channel:<20}" + "".join(f"{_count(count):>12}" for count in counts))
        if missing := ledger.not_computed_briefly():
            click.echo(f"  not computed: {', '.join(missing)}")
    if view.error:
        click.echo(f"Error: {view.error}")
        if day.failed_step:
            click.echo(f"Failed Step: {day.failed_step}")
        _print_next_command(env, view)


def _count(count: int | None) -> str:
    return "not computed" if count is None else thousands(count)


def _print_next_command(env: str, view: DayView) -> None:
    if view.state is DayState.FAILED:
        verb = "end" if view.day.ever_active else "start"
        click.echo(f"Next: ssmd day {verb} {env} --date {view.day.date}")
    elif view.state is DayState.ERROR:
        click.echo(f"Next: ssmd day recover {env} --date {view.day.date}")


def _row(cells: list[str]) -> str:
    text = "".join(cell.ljust(width) for cell, (_, width) in zip(cells, HISTORY_COLUMNS, strict=True))
    return text.rstrip()


def _checked_date(text: str | None) -> str | None:
    return None if text is None else parse_date(text).isoformat()


def _exit_code(day: TradingDay) -> int:
    degraded = day.state is DayState.COMPLETE and day.condition in ("degraded", "missing")
    return int(ExitCode.DEGRADED if degraded else ExitCode.OK)


def _finish(env: str, day: TradingDay, as_json: bool, *, already: bool) -> int:
    if as_json:
        print_json(
            {
                "environment": env,
                "date": day.date,
                "state": day.state.value,
                "already": already,
                "condition": day.condition,
                "epoch": day.epoch,
            }
        )
    return _exit_code(day)


class _Printer:
    """Prints a verb's steps as they are done: to stdout as the command's output, to stderr beside `--json`."""

    def __init__(self, as_json: bool) -> None:
        self._err = as_json
        self._headed = False

    def head(self, text: str) -> None:
        """Keep the first line; it is printed once there is something to do."""
        self._head = text

    def line(self, text: str) -> None:
        """Print one line."""
        click.echo(text, err=self._err)

    def __call__(self, progress: Progress) -> None:
        if not self._headed:
            self._headed = True
            self.line(self._head)
        self.progress(progress, "  ")

    def progress(self, progress: Progress, indent: str) -> None:
        """Print a step's line."""
        stream = sys.stderr if self._err else sys.stdout
        if progress.kind == "done":
            self.line(f"{indent}{mark(True, stream)} {progress.title}")
        elif progress.kind == "failed":
            self.line(f"{indent}{mark(False, stream)} {progress.title}")
        elif progress.kind == "note":
            message(f"{indent}  {progress.title}")


class _RollPrinter(_Printer):
    """Prints both halves of a roll as they happen."""

    def __init__(self, as_json: bool) -> None:
        super().__init__(as_json)
        self._half: Progress | None = None

    def __call__(self, progress: Progress) -> None:
        if not self._headed:
            self._headed = True
            self.line(self._head)
        if self._half is None or progress.verb != self._half.verb:
            if self._half is not None and self._half.verb == START.name:
                self.day_line(self._half.date, DayState.ACTIVE)
            self._half = progress
            self.line(f"  {'Ending' if progress.verb == END.name else 'Starting'} {progress.date}...")
        self.progress(progress, "    ")

    def day_line(self, date: str, state: DayState) -> None:
        """Print the line that ends a half."""
        stream = sys.stderr if self._err else sys.stdout
        self.line(f"  {mark(True, stream)} Day {date} {state}")
