"""What a person must be told, and in which words: environment, day, cause, and the command to run.

One shape for every message. Where messages go is for the targets: the log, and whatever else is configured. A target that
cannot be reached never stops what the message is about.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Literal, Protocol

import msgspec

from ssmd_dagster.day.condition import beyond_replay
from ssmd_dagster.day.events import DayEvent, TradingDay
from ssmd_dagster.day.reconcile import Flag, after_failure
from ssmd_dagster.day.states import DayState, EventName

Kind = Literal["failed", "error", "degraded", "late", "stuck", "blind"]

_log = logging.getLogger("ssmd_dagster.alerts")


class Alert(msgspec.Struct, frozen=True, kw_only=True):
    """One message. `date` is None where it concerns the whole environment; `blind`: a sensor cannot look, or not go on."""

    env: str
    date: str | None
    kind: Kind
    cause: str
    command: str

    @property
    def text(self) -> str:
        """Return the message as one line."""
        day = f" {self.date}" if self.date is not None else ""
        return f"[{self.kind.upper()}] {self.env}{day}: {self.cause} | run: {self.command}"


class Target(Protocol):
    """Somewhere that messages go."""

    def send(self, alert: Alert) -> None:
        """Pass one message on; raises nothing that a caller must handle."""


class LogTarget:
    """The default: a line of the log `ssmd_dagster.alerts`, at level ERROR, or WARNING for what does not stop a day."""

    def send(self, alert: Alert) -> None:
        """Log the message."""
        _log.log(logging.WARNING if alert.kind in ("degraded", "late") else logging.ERROR, "%s", alert.text)


def send(alerts: Sequence[Alert], targets: Sequence[Target]) -> None:
    """Send every message to every target."""
    for alert in alerts:
        for target in targets:
            target.send(alert)


def of_event(event: DayEvent, day: TradingDay | None, *, over: bool) -> Alert | None:
    """Return the message that an event of the journal is worth, `day` being the day after it; None for most events.

    `over`: the day's window has closed.
    """
    if day is None:
        return None
    env, date = event.env, event.date
    if event.to is DayState.FAILED:
        cause = f"{event.event} at {day.failed_step}: {day.error}" if day.failed_step else f"{event.event}: {day.error}"
        return Alert(env=env, date=date, kind="failed", cause=cause, command=after_failure(env, day, over=over))
    if event.to is DayState.ERROR:
        command = f"ssmd day recover {env} --date {date}"
        return Alert(env=env, date=date, kind="error", cause=day.error or "ERROR", command=command)
    finished = event.event is EventName.COMPLETED or event.event is EventName.CONDITION_CHANGED
    reasons = day.condition_reasons
    as_any_replay = day.condition == "degraded" and reasons and not beyond_replay(reasons, day.gaps)
    if finished and day.condition in ("degraded", "missing") and not as_any_replay:
        cause = f"{day.condition}: {'; '.join(reasons) or 'no reason given'}"
        return Alert(env=env, date=date, kind="degraded", cause=cause, command=f"ssmd day show {env} {date}")
    return None


def of_flag(env: str, flag: Flag) -> Alert:
    """Return the message of something that reconcile flags."""
    return Alert(env=env, date=flag.date, kind=flag.kind, cause=flag.cause, command=flag.command)


def blind(env: str, sensor: str, cause: str, command: str) -> Alert:
    """Return the message that a sensor cannot look at an environment, or not go on where it was."""
    return Alert(env=env, date=None, kind="blind", cause=f"{sensor}: {cause}", command=command)
