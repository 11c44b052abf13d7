"""How days, ledgers, verifications and the steps of verbs are printed. Text only; JSON is `cli.output`'s."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

import click

from ssmd_dagster.capture.setting import load_setting
from ssmd_dagster.cli.output import (
    duration,
    mark,
    message,
    paused_text,
    rfc3339,
    thousands,
    time_of_day,
    to_the_minute,
)
from ssmd_dagster.day.checks import drift_words
from ssmd_dagster.day.events import Gap, Paused
from ssmd_dagster.day.health import unknown_words
from ssmd_dagster.day.ledger import Ledger
from ssmd_dagster.day.maintenance import described
from ssmd_dagster.day.payloads import DriftFound
from ssmd_dagster.day.reconcile import after_failure
from ssmd_dagster.day.retention import nearly_full_words
from ssmd_dagster.day.states import RECORDING, DayState
from ssmd_dagster.workflows.desk import Progress
from ssmd_dagster.workflows.end import END
from ssmd_dagster.workflows.start import START
from ssmd_dagster.workflows.verify_sealed import Verification
from ssmd_dagster.workflows.views import DayView, ledger_of

if TYPE_CHECKING:
    from ssmd_dagster.workflows.normalize import Normalised

EXAMPLE_CHARS = 160
FAULTS_SHOWN = 20
HISTORY_COLUMNS = (("DATE", 12), ("STATE", 10), ("START", 19), ("END", 20), ("MSGS", 11), ("GAPS", 0))


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
        example = one.example if len(one.example) <= EXAMPLE_CHARS else f"{one.example[:EXAMPLE_CHARS]}…"
        name = f"{one.name} {one.json_type}".rstrip()
        click.echo(f"  unknown {one.kind}: {name} ({thousands(one.count)}), such as {example}")


def print_history(views: list[DayView]) -> None:
    """Print days as a table, in the order given."""
    click.echo(_row([title for title, _ in HISTORY_COLUMNS]))
    for view in views:
        day = view.day
        cells = [
            day.date,
            view.state.value,
            *("-" if at_ns is None else to_the_minute(at_ns) for at_ns in day.span),
            "-" if view.messages is None else thousands(view.messages),
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
    started_ns, ended_ns = day.span
    for title, at_ns in (("Started", started_ns), ("Ended", ended_ns)):
        if at_ns is not None:
            local = zone.local(at_ns)
            here = "" if not local.utcoffset() else f" ({local.strftime('%Y-%m-%d %H:%M:%S %Z')})"
            click.echo(f"{title}: {rfc3339(at_ns)}{here}")
    if started_ns is not None:
        click.echo(f"Duration: {duration((ended_ns or view.at_ns) - started_ns)}")
    click.echo(f"Messages: {messages_text(view)}")
    click.echo(f"Gaps: {view.gaps}")
    several = len({str(gap.scope["component"]) for gap in day.gaps if "component" in gap.scope}) > 1
    for gap in day.gaps[:gaps_shown]:
        click.echo(f"  - {_gap_line(gap, named=several)}")
    if gaps_shown is not None and len(day.gaps) > gaps_shown:
        click.echo(f"  and {thousands(len(day.gaps) - gaps_shown)} more; --all lists them")
    print_maintenance(env, view)
    if day.archive_url is not None:
        click.echo(f"Archive: {day.archive_url}")
    if day.seals:
        sealed = ", ".join(f"r{revision} ({rfc3339(at_ns)})" for revision, at_ns in day.seals)
        click.echo(f"Sealed: {sealed}")
    if day.condition is not None:
        click.echo(f"Condition: {day.condition}")
        for reason in day.condition_reasons:
            click.echo(f"  - {reason}")
    if day.late is not None and day.late.rows:
        unfiled = f"no table has them yet: ssmd day normalize {env} --date {day.date}"
        click.echo(f"Late Rows: {thousands(day.late.rows)}, {'in the table `late`' if day.late.filed else unfiled}")
    _print_fill(view)
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
    if day.forced_by is not None and day.sealed is None:
        click.echo(f"Next: ssmd day verify {env} {day.date}")
    if view.error:
        click.echo(f"Error: {view.error}")
        if day.failed_step:
            click.echo(f"Failed Step: {day.failed_step}")
        print_next_command(env, view)


def _gap_line(gap: Gap, *, named: bool) -> str:
    """Return a gap's line; `named` with the connector that had it."""
    until = "now" if gap.to_ns is None else time_of_day(gap.to_ns, gap.from_ns)
    who = f", {gap.scope['component']}" if named and "component" in gap.scope else ""
    channel = f", {gap.scope['channel']}" if "channel" in gap.scope else ""
    outcome = f", {gap.outcome}" if gap.outcome in ("healed", "repaired") else ""
    detail = f", {gap.detail}" if gap.detail is not None else ""
    return f"{time_of_day(gap.from_ns)} - {until} ({gap.cause}{who}{channel}{outcome}{detail})"


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


def messages_text(view: DayView) -> str:
    """Return how many messages a day has, as far as that is known."""
    return "not known" if view.messages is None else thousands(view.messages)


def print_status(env: str, view: DayView, paused: Paused | None) -> None:
    """Print a day's status, and who has paused the environment."""
    click.echo(f"Environment: {env}")
    click.echo(f"Trading Day: {view.day.date}")
    click.echo(f"State: {view.state}")
    if view.day.started_ns is not None:
        ago = duration(view.at_ns - view.day.started_ns)
        click.echo(f"Started: {rfc3339(view.day.started_ns)} ({ago} ago)")
    click.echo(f"Messages: {messages_text(view)}")
    click.echo(f"Gaps: {view.gaps}")
    print_maintenance(env, view)
    _print_fill(view)
    if view.error:
        click.echo(f"Error: {view.error}")
        print_next_command(env, view)
    _print_unended(env, view)
    if paused is not None:
        click.echo(f"Schedules: {paused_text(paused)}; ssmd env resume {env}")


def _print_unended(env: str, view: DayView) -> None:
    """Print that the day is over and records on, or that an earlier one is not ended; in a roll both are so for a while."""
    if view.behind is not None:
        ending = f" still; ssmd day roll {env} ends it" if view.behind.state in RECORDING else ""
        click.echo(f"Behind: {view.behind.date} is {view.behind.state}{ending}")
    elif view.over and view.state in RECORDING and view.day.mode == "live":
        verb = "roll" if load_setting(env).env.schedule.auto_roll else "end"
        click.echo(f"Over: its window has closed, and it records on; ssmd day {verb} {env}")


def print_maintenance(env: str, view: DayView) -> None:
    """Print the windows of maintenance that the exchange has announced for the day, if any."""
    if view.maintenance:
        click.echo(f"Maintenance: {described(view.maintenance, load_setting(env).env.calendar())}, announced")


def _print_fill(view: DayView) -> None:
    if (full := nearly_full_words(view.stream_share)) is not None:
        click.echo(f"Warning: {full}")


def print_next_command(env: str, view: DayView) -> None:
    """Print which command brings a day on that failed or is in error."""
    if view.state is DayState.FAILED:
        click.echo(f"Next: {after_failure(env, view.day, over=view.over)}")
    elif view.state is DayState.ERROR:
        click.echo(f"Next: ssmd day recover {env} --date {view.day.date}")


def _row(cells: list[str]) -> str:
    text = "".join(cell.ljust(width) for cell, (_, width) in zip(cells, HISTORY_COLUMNS, strict=True))
    return text.rstrip()


class Printer:
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
        """Print what has happened, below the first line."""
        if not self._headed:
            self._headed = True
            self.line(self._head)
        self.progress(progress, "  ")

    def progress(self, progress: Progress, indent: str) -> None:
        """Print a step's line."""
        stream = sys.stderr if self._err else sys.stdout
        if progress.kind == "done":
            self.line(f"{indent}{mark(True, stream)} {progress.title}")
        elif progress.kind == "skipped":
            self.line(f"{indent}- {progress.title}: {progress.detail}")
        elif progress.kind == "failed":
            self.line(f"{indent}{mark(False, stream)} {progress.title}")
        elif progress.kind == "note":
            message(f"{indent}  {progress.title}")


class RollPrinter(Printer):
    """Prints both halves of a roll as they happen."""

    def __init__(self, as_json: bool) -> None:
        super().__init__(as_json)
        self._half: Progress | None = None

    def __call__(self, progress: Progress) -> None:
        """Print what has happened, below the first line."""
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
        self.line(f"  {mark(state is not DayState.FAILED, stream)} Day {date} {state}")
