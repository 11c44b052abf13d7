"""`ssmd day`: the verbs of a trading day. Parsing and printing only; what they do is in `workflows/`."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import click
import msgspec

from ssmd_dagster.capture.setting import load_setting
from ssmd_dagster.cli.backfill import backfill_command
from ssmd_dagster.cli.desk import default_env, env_argument, json_option, with_desk
from ssmd_dagster.cli.events import events_command
from ssmd_dagster.cli.output import (
    duration,
    mark,
    message,
    paused_text,
    plain_pause,
    print_json,
    rfc3339,
    thousands,
    time_of_day,
    to_the_minute,
)
from ssmd_dagster.cli.report import report_command
from ssmd_dagster.day.calendar import parse_date
from ssmd_dagster.day.checks import drift_words
from ssmd_dagster.day.events import Paused, TradingDay
from ssmd_dagster.day.health import unknown_words
from ssmd_dagster.day.ledger import Ledger
from ssmd_dagster.day.maintenance import described
from ssmd_dagster.day.payloads import DriftFound
from ssmd_dagster.day.states import DayState
from ssmd_dagster.errors import ExitCode, RefusedError, UnreachableError, UsageError
from ssmd_dagster.stores.objects import open_object_stores
from ssmd_dagster.workflows.attempt import Attempt, Options
from ssmd_dagster.workflows.desk import Desk, Progress
from ssmd_dagster.workflows.drift import newest_drift
from ssmd_dagster.workflows.end import END
from ssmd_dagster.workflows.play import play, stop_playing
from ssmd_dagster.workflows.rebuild import rebuild
from ssmd_dagster.workflows.recover import recovery_of
from ssmd_dagster.workflows.roll import dates_to_roll, roll
from ssmd_dagster.workflows.start import START
from ssmd_dagster.workflows.verify_sealed import Verification, verify_sealed, verify_store
from ssmd_dagster.workflows.views import DayView, history, ledger_of, show, status

if TYPE_CHECKING:
    from ssmd_dagster.workflows.normalize import Normalised

_date_option = click.option(
    "--date", metavar="YYYY-MM-DD", help="Trading day, in the environment's timezone. Default: the current one."
)
_reason_option = click.option("--reason", help="Why; kept in the journal.")

MOST_SPEED = 10_000
GAPS_SHOWN = 20
FAULTS_SHOWN = 20
HISTORY_COLUMNS = (("DATE", 12), ("STATE", 10), ("START", 19), ("END", 20), ("MSGS", 11), ("GAPS", 0))


@click.group("day")
def day_group() -> None:
    """Start, end, roll and look at trading days."""


day_group.add_command(backfill_command)
day_group.add_command(events_command)
day_group.add_command(report_command)


@day_group.command("status")
@env_argument
@_date_option
@json_option
def status_command(env: str, date: str | None, as_json: bool) -> None:
    """Show the current trading day and how its processes fare."""

    async def body(desk: Desk) -> tuple[DayView, Paused | None]:
        return await status(desk, _checked_date(date)), desk.book.book.paused

    view, paused = with_desk(env, body)
    if as_json:
        print_json({**view.to_json(env), "paused": plain_pause(paused)})
        return
    click.echo(f"Environment: {env}")
    click.echo(f"Trading Day: {view.day.date}")
    click.echo(f"State: {view.state}")
    if view.day.started_ns is not None:
        ago = duration(view.at_ns - view.day.started_ns)
        click.echo(f"Started: {rfc3339(view.day.started_ns)} ({ago} ago)")
    click.echo(f"Messages: {thousands(view.messages)}")
    click.echo(f"Gaps: {view.gaps}")
    _print_maintenance(env, view)
    if view.error:
        click.echo(f"Error: {view.error}")
        _print_next_command(env, view)
    if paused is not None:
        click.echo(f"Schedules: {paused_text(paused)}; ssmd env resume {env}")


@day_group.command("start")
@env_argument
@_date_option
@click.option("--mode", type=click.Choice(["live", "replay"]), help="Default: live while the day's window is open.")
@click.option(
    "--from",
    "source",
    type=click.Choice(["exchange", "archive"]),
    default="exchange",
    show_default=True,
    help="Of a replay: fetch the day from the exchange's history, or make the tables of a recorded day again.",
)
@click.option(
    "--speed",
    type=click.FloatRange(0, MOST_SPEED, min_open=True),
    help="With --from archive: play the recorded day to clients, so many times as fast as it went.",
)
@_reason_option
@json_option
def start_command(
    env: str, date: str | None, mode: str | None, source: str, speed: float | None, reason: str | None, as_json: bool
) -> int:
    """Start a trading day: sync, connect, and see that data flows. A day that is over is replayed."""
    if speed is not None and source != "archive":
        raise UsageError("--speed plays a recorded day", do="It wants --from archive and --date.")
    if source == "archive":
        if date is None or mode == "live":
            raise UsageError("--from archive is about a recorded day", do="It wants --date, not live.")
        wanted = str(_checked_date(date))
        return _normalize(env, wanted, as_json) if speed is None else _play(env, wanted, speed, as_json)
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
        if await stop_playing(desk, wanted):
            message(f"Trading day {wanted} is no longer played")
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
@click.option("--all", "every_gap", is_flag=True, help="List every gap, however many there are.")
@json_option
def show_command(ctx: click.Context, words: tuple[str, ...], every_gap: bool, as_json: bool) -> None:
    """Show one trading day: times, counts, gaps, condition, ledger, and where its files are."""
    env, date = _env_and_date(ctx, words)

    async def body(desk: Desk) -> tuple[DayView, DriftFound | None]:
        view = await show(desk, date)
        sampled = view.state is DayState.ACTIVE and not as_json
        return view, await newest_drift(desk, date) if sampled else None

    view, newest = with_desk(env, body)
    if as_json:
        print_json(view.to_json(env))
        return
    print_day(env, view, None if every_gap else GAPS_SHOWN, newest)


@day_group.command("verify")
@click.argument("words", metavar="[ENV] DATE", nargs=-1, required=True)
@click.pass_context
@click.option("--store-only", is_flag=True, help="Ask neither NATS nor Redis: the manifest and the files alone.")
@json_option
def verify_command(ctx: click.Context, words: tuple[str, ...], store_only: bool, as_json: bool) -> int:
    """Prove again that a COMPLETE day's files are what was sealed; a forced day is verified and sealed by it."""
    env, date = _env_and_date(ctx, words)
    printer = _Printer(as_json)
    printer.line(f"Verifying trading day {date}...")

    def tell(text: str) -> None:
        message(f"    {text}")

    found = None
    if not store_only:
        try:
            found = with_desk(env, lambda desk: verify_sealed(desk, date, tell))
        except UnreachableError as error:
            message(f"{error.what} ({error.where}): verifying from the store alone")
    if found is None:
        found = asyncio.run(_verify_store(env, date, tell))
    if as_json:
        print_json(msgspec.to_builtins(found))
    else:
        print_verification(found)
    if found.faults:
        return int(ExitCode.UNEXPLAINED)
    return int(ExitCode.DEGRADED if found.condition in ("degraded", "missing") else ExitCode.OK)


async def _verify_store(env: str, date: str, tell: Callable[[str], None]) -> Verification:
    setting = load_setting(env)
    raw, normalized = open_object_stores(setting.env, setting.home, setting.secrets)
    return await verify_store(setting.env, raw, normalized, date, tell)


def print_verification(found: Verification) -> None:
    """Print what was looked at and every fault, at most `FAULTS_SHOWN`."""
    for name, count in found.examined.items():
        click.echo(f"  {name:<12}{thousands(count):>14}")
    if not found.journal:
        click.echo("  The journal and the stream were not asked")
    for fault in found.faults[:FAULTS_SHOWN]:
        click.echo(f"  {mark(False, sys.stdout)} {fault}")
    if len(found.faults) > FAULTS_SHOWN:
        click.echo(f"  and {thousands(len(found.faults) - FAULTS_SHOWN)} more; --json has all of them")
    changed = " now" if found.changed else ""
    proved = "is not what was sealed" if found.faults else "is what was sealed"
    click.echo(f"Trading day {found.date} {proved}; its condition is{changed} {found.condition}")
    for reason in found.condition_reasons:
        click.echo(f"  - {reason}")
    for step in found.mend:
        click.echo(f"To mend it: {step}")


def _env_and_date(ctx: click.Context, words: tuple[str, ...]) -> tuple[str, str]:
    if len(words) > 2:
        raise click.UsageError("expected [ENV] DATE", ctx)
    return words[0] if len(words) == 2 else default_env(), parse_date(words[-1]).isoformat()


@day_group.command("normalize")
@env_argument
@click.option("--date", required=True, metavar="YYYY-MM-DD", help="Trading day, in the environment's timezone.")
@json_option
def normalize_command(env: str, date: str, as_json: bool) -> int:
    """Make a COMPLETE day's tables again; what differs from those there are becomes the next revision."""
    return _normalize(env, str(_checked_date(date)), as_json)


def _normalize(env: str, wanted: str, as_json: bool) -> int:
    from ssmd_dagster.workflows.normalize import normalise_again  # loads pyarrow, which other commands have no use for

    def tell(text: str) -> None:
        message(f"    {text}")

    found = with_desk(env, lambda desk: normalise_again(desk, wanted, told=tell))
    if as_json:
        print_json({"environment": env, "date": wanted, **msgspec.to_builtins(found), "rows": found.rows()})
    else:
        print_normalised(wanted, found)
    return int(ExitCode.DEGRADED if found.damaged else ExitCode.OK)


def _play(env: str, wanted: str, speed: float, as_json: bool) -> int:
    address = with_desk(env, lambda desk: play(desk, wanted, speed))
    if as_json:
        print_json({"environment": env, "date": wanted, "speed": speed, "address": address})
        return int(ExitCode.OK)
    click.echo(f"Trading day {wanted} is played {speed:g} times as fast as it went, from the first subscription on:")
    click.echo(f"  {address}")
    click.echo(f"It ends by itself; `ssmd day end {env} --date {wanted}` stops it.")
    return int(ExitCode.OK)


def print_normalised(date: str, found: Normalised) -> None:
    """Print the rows of each table, what was not understood, and what is new against the revision before."""
    click.echo(f"Trading day {date}: tables of revision {found.revision}{', there already' if found.already else ''}")
    for table, rows in found.rows().items():
        change = found.differences.get(table)
        news = f"  +{change.added} -{change.removed} ~{change.changed}" if change is not None else ""
        click.echo(f"  {table:<16}{thousands(rows):>14}{news}")
    for channel, filing in found.filings.items():
        for reason, count in filing.rejected.items():
            click.echo(f"  rejected: {channel}: {thousands(count)} {reason}")
    for batch in found.damaged:
        click.echo(f"  damaged: {batch}")
    for one in found.drift:
        click.echo(f"  unknown {one.kind}: {one.name} {one.json_type} ({thousands(one.count)}), such as {one.example}")


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


def print_day(env: str, view: DayView, gaps_shown: int | None = None, newest: DriftFound | None = None) -> None:
    """Print everything that is known of one day, the first `gaps_shown` gaps one by one.

    `newest` is what a running day's newest messages have that is unknown.
    """
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
    for gap in day.gaps[:gaps_shown]:
        until = time_of_day(gap.to_ns) if gap.to_ns is not None else "now"
        outcome = f", {gap.outcome}" if gap.outcome in ("healed", "repaired") else ""
        detail = f", {gap.detail}" if gap.detail is not None else ""
        click.echo(f"  - {time_of_day(gap.from_ns)} - {until} ({gap.cause}{outcome}{detail})")
    if gaps_shown is not None and len(day.gaps) > gaps_shown:
        click.echo(f"  and {thousands(len(day.gaps) - gaps_shown)} more; --all lists them")
    _print_maintenance(env, view)
    if day.archive_url is not None:
        click.echo(f"Archive: {day.archive_url}")
    if day.condition is not None:
        click.echo(f"Condition: {day.condition}")
        for reason in day.condition_reasons:
            click.echo(f"  - {reason}")
    if day.late is not None and day.late.rows:
        todo = f"no table has them yet: ssmd day normalize {env} --date {day.date}"
        click.echo(f"Late Rows: {thousands(day.late.rows)}, {'in the table `late`' if day.late.filed else todo}")
    if view.unknown:
        click.echo(f"Drift: {unknown_words(view.unknown)}")
    if newest is not None and newest.fingerprints:
        click.echo(f"Drift: {drift_words(newest)} in the newest messages")
    if not view.unknown and view.drift is not None and view.drift.fingerprints:
        click.echo(f"Drift: {drift_words(view.drift)}; examples: ssmd day report {env} {day.date}")
    ledger = ledger_of(day)
    if ledger is not None:
        print_ledger(ledger)
        if missing := ledger.not_computed_briefly():
            click.echo(f"  not computed: {', '.join(missing)}")
    if view.error:
        click.echo(f"Error: {view.error}")
        if day.failed_step:
            click.echo(f"Failed Step: {day.failed_step}")
        _print_next_command(env, view)


def print_ledger(ledger: Ledger) -> None:
    """Print the balance sheet: the channels' lines as two tables, then what stands beside them."""
    click.echo("Ledger:")
    for names in (
        ("received", "spooled", "published", "archived"),
        ("normalised", "duplicates", "control", "rejected_total", "other_day", "opening_fold"),
    ):
        if all(getattr(sheet, name) is None for sheet in ledger.channels for name in names):
            continue
        click.echo(f"  {'':<20}" + "".join(f"{name.removesuffix('_total'):>13}" for name in names))
        for sheet in ledger.channels:
            counts = [getattr(sheet, name) for name in names]
            click.echo(f"  {sheet.channel:<20}" + "".join(f"{_count(count):>13}" for count in counts))
    for part, lines in (("wire", ledger.wire), ("trades", ledger.trades), ("books", ledger.books)):
        counts = [(name, getattr(lines, name)) for name in lines.__struct_fields__]
        if any(count is not None for _, count in counts):
            click.echo(f"  {part}: " + ", ".join(f"{name} {_count(count)}" for name, count in counts))
    for difference in ledger.differences():
        gaps = ", ".join(difference.explained_by[:FAULTS_SHOWN]) or "nothing"
        click.echo(f"  difference: {difference.name} {difference.size:+,}, explained by {gaps}")


def _count(count: int | None) -> str:
    return "not computed" if count is None else thousands(count)


def _print_maintenance(env: str, view: DayView) -> None:
    if view.maintenance:
        click.echo(f"Maintenance: {described(view.maintenance, load_setting(env).env.calendar())}, announced")


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
