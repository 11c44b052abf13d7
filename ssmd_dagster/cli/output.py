"""How the commands print: JSON, times, durations, numbers, step lines. Not what they print.

Data goes to stdout, messages to stderr. Colour only on a terminal and without `NO_COLOR`: click takes it out elsewhere.
"""

from __future__ import annotations

import json
import sys
from datetime import UTC, datetime
from typing import Any, TextIO

import click

from ssmd_dagster.day.events import Paused

_NS_PER_S = 1_000_000_000


def print_json(value: Any) -> None:
    """Print one JSON document to stdout, keys in the order given."""
    click.echo(json.dumps(value, ensure_ascii=False, indent=2))


def message(text: str) -> None:
    """Print a line to stderr."""
    click.echo(text, err=True)


def step(text: str, *, ok: bool = True, err: bool = False) -> None:
    """Print one step's line, `  ✓ Starting connector`, or `  ✗ …` where it failed."""
    click.echo(f"  {mark(ok, sys.stderr if err else sys.stdout)} {text}", err=err)


def mark(ok: bool, stream: TextIO) -> str:
    """Return the tick or the cross, coloured; plain letters where the stream's encoding has neither."""
    sign = "✓" if ok else "✗"
    try:
        sign.encode(stream.encoding or "ascii")
    except UnicodeEncodeError:
        sign = "+" if ok else "x"
    return click.style(sign, fg="green" if ok else "red")


def thousands(number: int) -> str:
    """Return `1,234,567`."""
    return f"{number:,}"


def duration(span_ns: int) -> str:
    """Return a span as `14h 30m`, below an hour as `12m 5s`, below a minute as `5s`; fractions are cut off."""
    seconds = max(0, span_ns) // _NS_PER_S
    hours, minutes = seconds // 3600, seconds % 3600 // 60
    if hours:
        return f"{hours}h {minutes}m"
    return f"{minutes}m {seconds % 60}s" if minutes else f"{seconds}s"


def rfc3339(at_ns: int) -> str:
    """Return a time as `2025-12-14T00:10:00Z`; fractions of a second are cut off."""
    return datetime.fromtimestamp(at_ns // _NS_PER_S, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def to_the_minute(at_ns: int) -> str:
    """Return a UTC time as a table's column has it, `2025-12-14T00:10`."""
    return datetime.fromtimestamp(at_ns // _NS_PER_S, UTC).strftime("%Y-%m-%dT%H:%M")


def paused_text(paused: Paused) -> str:
    """Return who has paused an environment, since when and why."""
    return f"paused by {paused.actor} since {rfc3339(paused.since_ns)}" + (
        f": {paused.reason}" if paused.reason else ""
    )


def plain_pause(paused: Paused | None) -> dict[str, Any] | None:
    """Return the same for JSON."""
    return None if paused is None else {"by": paused.actor, "since_ns": paused.since_ns, "reason": paused.reason}


def time_of_day(at_ns: int, after_ns: int | None = None) -> str:
    """Return a UTC time within a day, `14:30:00`; with its date where it is not on the day of `after_ns`."""
    at = datetime.fromtimestamp(at_ns // _NS_PER_S, UTC)
    same = after_ns is None or at.date() == datetime.fromtimestamp(after_ns // _NS_PER_S, UTC).date()
    return at.strftime("%H:%M:%S" if same else "%Y-%m-%dT%H:%M:%S")
