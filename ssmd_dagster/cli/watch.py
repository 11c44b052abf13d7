"""`ssmd day watch`: the status of a trading day again and again, with how its processes fare."""

from __future__ import annotations

import asyncio
import contextlib
import io
import sys
from typing import Any, NoReturn

import click
import msgspec

from ssmd_dagster.capture.setting import load_setting
from ssmd_dagster.cli.day_lines import messages_text, print_status
from ssmd_dagster.cli.desk import actor, date_option, env_argument, json_option
from ssmd_dagster.cli.output import duration, message, plain_pause, thousands, time_of_day
from ssmd_dagster.day.calendar import parse_date
from ssmd_dagster.day.events import Paused
from ssmd_dagster.errors import ExitCode, UnreachableError
from ssmd_dagster.workflows.desk import open_desk
from ssmd_dagster.workflows.views import DayView, status

_NS_PER_S = 1e9
# Written over what stands there, in one go, so that nothing flickers.
_HOME, _TO_END_OF_LINE, _TO_END_OF_SCREEN = "\x1b[H", "\x1b[K", "\x1b[J"


@click.command("watch")
@env_argument
@date_option
@click.option(
    "--every",
    "every_s",
    type=click.FloatRange(0.5, 3_600),
    default=2.0,
    show_default=True,
    help="Seconds between looks.",
)
@json_option
def watch_command(env: str, date: str | None, every_s: float, as_json: bool) -> int:
    """Show the current trading day again and again, until Ctrl-C.

    Where the output is no terminal, and with --json, one line a look.
    """
    wanted = None if date is None else parse_date(date).isoformat()
    try:
        asyncio.run(_watch(env, wanted, every_s, as_json))
    except KeyboardInterrupt:  # that is how it is meant to end
        return int(ExitCode.INTERRUPTED)


async def _watch(env: str, date: str | None, every_s: float, as_json: bool) -> NoReturn:
    setting = load_setting(env)
    before: DayView | None = None
    while True:
        try:
            async with open_desk(setting, actor(), needs_cache=False) as desk:
                while True:
                    view = await status(desk, date)
                    _show(env, view, before, desk.book.book.paused, as_json)
                    before = view
                    await asyncio.sleep(every_s)
        except UnreachableError as error:
            message(f"{error}; looking again in {every_s:g} s")
            await asyncio.sleep(every_s)


def _show(env: str, view: DayView, before: DayView | None, paused: Paused | None, as_json: bool) -> None:
    if as_json:
        shown: dict[str, Any] = {**view.to_json(env), "paused": plain_pause(paused)}
        click.echo(msgspec.json.encode(shown).decode())
        return
    per_s = _per_second(view, before)
    if not sys.stdout.isatty():
        trouble = f"  {view.error}" if view.error else ""
        click.echo(
            f"{time_of_day(view.at_ns)}  {view.day.date}  {view.state}  {messages_text(view)} messages  "
            f"{per_s}  {view.gaps} gaps{trouble}"
        )
        return
    with contextlib.redirect_stdout(io.StringIO()) as screen:
        print_status(env, view, paused)
    lines = [*screen.getvalue().splitlines(), "", f"At {time_of_day(view.at_ns)} UTC: {per_s}"]
    lines += [f"  {name:<13} {_fares(view, beat)}" for name, beat in view.components.items()]
    click.echo(_HOME + "".join(f"{line}{_TO_END_OF_LINE}\n" for line in lines) + _TO_END_OF_SCREEN, nl=False)


def _per_second(view: DayView, before: DayView | None) -> str:
    if before is None or before.day.date != view.day.date or view.at_ns <= before.at_ns:
        return "-/s"
    if view.messages is None or before.messages is None:
        return "-/s"
    return f"{thousands(round((view.messages - before.messages) / ((view.at_ns - before.at_ns) / _NS_PER_S)))}/s"


def _fares(view: DayView, beat: dict[str, Any]) -> str:
    """Say in a line what a process tells of itself."""
    words = [str(beat.get("state", "-"))]
    last_ns = beat.get("last_frame_ns") or beat.get("last_event_ns")
    if last_ns:
        words.append(f"last frame {duration(view.at_ns - last_ns)} ago")
    for field, text in (("markets", "markets"), ("unacked_batches", "batches under way"), ("clients", "clients")):
        if beat.get(field):
            words.append(f"{thousands(beat[field])} {text}")
    if beat.get("error"):
        words.append(str(beat["error"]))
    return ", ".join(words)
