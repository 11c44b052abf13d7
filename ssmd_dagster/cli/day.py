"""`ssmd day`: the verbs of a trading day. Parsing and printing only; what they do is in `workflows/`."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import click
import msgspec

from ssmd_dagster.capture.setting import load_setting
from ssmd_dagster.cli.backfill import backfill_command
from ssmd_dagster.cli.day_lines import (
    Printer,
    RollPrinter,
    print_day,
    print_history,
    print_normalised,
    print_status,
    print_verification,
)
from ssmd_dagster.cli.desk import (
    date_option,
    day_argument,
    day_option,
    env_and_date,
    env_argument,
    json_option,
    with_desk,
)
from ssmd_dagster.cli.events import events_command
from ssmd_dagster.cli.output import (
    message,
    plain_pause,
    print_json,
)
from ssmd_dagster.cli.report import report_command
from ssmd_dagster.cli.watch import watch_command
from ssmd_dagster.day.calendar import parse_date
from ssmd_dagster.day.events import Paused, TradingDay
from ssmd_dagster.day.payloads import DriftFound
from ssmd_dagster.day.states import DayState
from ssmd_dagster.errors import ExitCode, RefusedError, UnreachableError, UsageError
from ssmd_dagster.stores.objects import open_object_stores
from ssmd_dagster.workflows.attempt import Attempt, Options
from ssmd_dagster.workflows.desk import Desk
from ssmd_dagster.workflows.drift import newest_drift
from ssmd_dagster.workflows.end import END
from ssmd_dagster.workflows.play import play, stop_playing
from ssmd_dagster.workflows.rebuild import rebuild
from ssmd_dagster.workflows.recover import recovery_of
from ssmd_dagster.workflows.roll import dates_to_roll, roll
from ssmd_dagster.workflows.start import START
from ssmd_dagster.workflows.verify_sealed import Verification, verify_sealed, verify_store
from ssmd_dagster.workflows.views import DayView, history, show, status

_reason_option = click.option("--reason", help="Why; kept in the journal.")

MOST_SPEED = 10_000
GAPS_SHOWN = 20
REASONS_TOLD = 4


@click.group("day")
def day_group() -> None:
    """Start, end, roll and look at trading days."""


day_group.add_command(backfill_command)
day_group.add_command(events_command)
day_group.add_command(report_command)
day_group.add_command(watch_command)


@day_group.command("status")
@env_argument
@date_option
@json_option
def status_command(env: str, date: str | None, as_json: bool) -> None:
    """Show the current trading day and how its processes fare."""

    async def body(desk: Desk) -> tuple[DayView, Paused | None]:
        return await status(desk, _checked_date(date)), desk.book.book.paused

    view, paused = with_desk(env, body, needs_cache=False)
    if as_json:
        print_json({**view.to_json(env), "paused": plain_pause(paused)})
        return
    print_status(env, view, paused)


@day_group.command("start")
@env_argument
@date_option
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
    printer = Printer(as_json)

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
@date_option
@click.option("--force", is_flag=True, help="Skip the waiting and the verification; the day is then degraded.")
@_reason_option
@json_option
def end_command(env: str, date: str | None, force: bool, reason: str | None, as_json: bool) -> int:
    """End a trading day: drain, flush, stop, verify, and record its completion."""
    printer = Printer(as_json)

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
    printer = RollPrinter(as_json)

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
@date_option
@_reason_option
@json_option
def recover_command(env: str, date: str | None, reason: str | None, as_json: bool) -> int:
    """Bring a trading day back from whatever was killed: to ACTIVE, or on to COMPLETE."""
    printer = Printer(as_json)

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
    views = with_desk(env, lambda desk: history(desk, limit), needs_cache=False)
    if as_json:
        print_json({"environment": env, "days": [view.to_json(env) for view in views]})
        return
    print_history(views)


@day_group.command("show")
@day_argument
@click.pass_context
@day_option
@click.option("--all", "every_gap", is_flag=True, help="List every gap, however many there are.")
@json_option
def show_command(ctx: click.Context, words: tuple[str, ...], date: str | None, every_gap: bool, as_json: bool) -> None:
    """Show one trading day: times, counts, gaps, condition, ledger, and where its files are."""
    env, date = env_and_date(ctx, words, date)

    async def body(desk: Desk) -> tuple[DayView, DriftFound | None]:
        view = await show(desk, date)
        sampled = view.state is DayState.ACTIVE and not as_json
        return view, await newest_drift(desk, date) if sampled else None

    view, newest = with_desk(env, body, needs_cache=False)
    if as_json:
        print_json(view.to_json(env))
        return
    print_day(env, view, None if every_gap else GAPS_SHOWN, newest)


@day_group.command("verify")
@day_argument
@click.pass_context
@day_option
@click.option("--store-only", is_flag=True, help="Ask neither NATS nor Redis: the manifest and the files alone.")
@json_option
def verify_command(
    ctx: click.Context, words: tuple[str, ...], date: str | None, store_only: bool, as_json: bool
) -> int:
    """Prove again that a COMPLETE day's files are what was sealed; a forced day is verified and sealed by it."""
    env, date = env_and_date(ctx, words, date)
    printer = Printer(as_json)
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


@day_group.command("normalize")
@day_argument
@click.pass_context
@day_option
@click.option("--despite-damage", is_flag=True, help="Of spoilt raw objects take what can be read; name the rest.")
@json_option
def normalize_command(
    ctx: click.Context, words: tuple[str, ...], date: str | None, despite_damage: bool, as_json: bool
) -> int:
    """Make a COMPLETE day's tables again; what differs from those there are becomes the next revision."""
    return _normalize(*env_and_date(ctx, words, date), as_json, despite_damage=despite_damage)


def _normalize(env: str, wanted: str, as_json: bool, *, despite_damage: bool = False) -> int:
    from ssmd_dagster.workflows.normalize import normalise_again  # loads pyarrow, which other commands have no use for

    def tell(text: str) -> None:
        message(f"    {text}")

    found = with_desk(env, lambda desk: normalise_again(desk, wanted, told=tell, despite_damage=despite_damage))
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
    code = _exit_code(day)
    if code == ExitCode.DEGRADED:
        reasons = list(day.condition_reasons)
        more = f" and {len(reasons) - REASONS_TOLD} more" if len(reasons) > REASONS_TOLD else ""
        message(f"Its condition is {day.condition}: {'; '.join(reasons[:REASONS_TOLD])}{more}")
    return code
