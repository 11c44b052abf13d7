"""`ssmd day events`: the audit trail of the journal, its chain of hashes checked. Reads the journal alone, never the cache."""

from __future__ import annotations

from typing import Any

import click
import msgspec

from ssmd_dagster.cli.desk import env_argument, json_option, with_desk
from ssmd_dagster.cli.output import message, rfc3339
from ssmd_dagster.day.calendar import parse_date
from ssmd_dagster.errors import ExitCode
from ssmd_dagster.stores.journal import StoredEvent
from ssmd_dagster.workflows.desk import Desk
from ssmd_dagster.workflows.trail import Trail, follow, read_trail

MAX_DATA = 160


@click.command("events")
@env_argument
@click.option("--date", metavar="YYYY-MM-DD", help="Only the events of one trading day.")
@click.option("--follow", "following", is_flag=True, help="Go on with every event that comes, until interrupted.")
@json_option
def events_command(env: str, date: str | None, following: bool, as_json: bool) -> int:
    """Print the journal of trading days: who did what, when and why; and check its chain of hashes.

    With --json one event a line. A broken chain is named with its first wrong sequence, exit code 1.
    """
    day = None if date is None else parse_date(date).isoformat()

    async def body(desk: Desk) -> Trail:
        trail = await read_trail(desk, lambda stored: _show(stored, day, as_json))
        _tell(trail)
        if following and trail.broken is None:
            await follow(desk, trail.last_seq, lambda stored: _show(stored, day, as_json))
        return trail

    trail = with_desk(env, body, needs_cache=False)
    return int(ExitCode.OK if trail.broken is None else ExitCode.FAILURE)


def _tell(trail: Trail) -> None:
    if trail.broken is None:
        message(f"{trail.events} events, the chain of hashes is whole up to sequence {trail.last_seq}")
    else:
        message(f"{trail.broken.what}. {trail.broken.do}")


def _show(stored: StoredEvent, date: str | None, as_json: bool) -> None:
    event = stored.event
    if date is not None and event.date != date:
        return
    if as_json:
        built: dict[str, Any] = msgspec.to_builtins(event)
        click.echo(msgspec.json.encode({"seq": stored.seq, "sha256": stored.sha256, **built}).decode())
        return
    states = f" {event.from_ or '-'} → {event.to}" if event.to is not None else ""
    epoch = "" if event.epoch is None else f" epoch {event.epoch}"
    data = msgspec.json.encode(event.data).decode() if event.data else ""
    data = data if len(data) <= MAX_DATA else f"{data[: MAX_DATA - 1]}…"
    reason = f" ({event.reason})" if event.reason else ""
    line = f"{stored.seq:>6}  {rfc3339(event.at_ns)}  {event.date}  {event.event}{states}{epoch}  {event.actor}{reason}"
    click.echo(f"{line}  {data}".rstrip())
