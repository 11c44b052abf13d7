"""The verdict over a day: available, degraded, pending or missing, with every reason.

One pure function with a version, so that a verdict can be told from one under other rules. What the ledger means is in
`ledger`; what follows from a verdict (exit codes, events) belongs to the workflows.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence

import msgspec

from ssmd_dagster.day.calendar import Window
from ssmd_dagster.day.causes import NEVER_DEGRADE, GapCause
from ssmd_dagster.day.events import Gap
from ssmd_dagster.day.ledger import Ledger
from ssmd_dagster.day.payloads import ConditionValue, LateRows, Mode

RULES_VERSION = 1

_LATE = "rows arrived after the seal"

MAX_GAPS_NAMED = 20
"""Gaps that are named one by one among the reasons; the others are counted by cause."""


class Condition(msgspec.Struct, frozen=True, kw_only=True):
    """The verdict, why, and under which rules."""

    value: ConditionValue
    reasons: tuple[str, ...] = ()
    rules_version: int = RULES_VERSION


def gaps_within(gaps: Iterable[Gap], window: Window) -> tuple[Gap, ...]:
    """Return the gaps that touch a day's window: its connectors also record some seconds before and after it."""
    return tuple(
        gap for gap in gaps if gap.from_ns < window.close_ns and (gap.to_ns is None or gap.to_ns > window.open_ns)
    )


def condition(
    *,
    ledger: Ledger | None,
    gaps: Sequence[Gap],
    archived_records: int | None,
    source: Mode = "live",
    forced_by: str | None = None,
    late: LateRows | None = None,
    faults: int = 0,
) -> Condition:
    """Judge a day.

    A forced end is `degraded` though nothing was verified: somebody decided not to know. Otherwise a day whose ledger
    has a line that is not computed stays `pending`, and names beside it what already speaks against it.

    Args:
        ledger: None where no verification was done.
        gaps: The gaps within the day's window.
        archived_records: Records read back from the store, None if nobody looked.
        source: `replay` where the records are not those of the live socket.
        forced_by: Who skipped the verification.
        late: Rows that arrived after a seal of the day.
        faults: Of a finished day: what a later verification found wrong with its files.
    """
    if archived_records == 0:
        return Condition(value="missing", reasons=("nothing archived",))
    against = _against(ledger, gaps, source, late)
    if faults:
        against = (f"{faults} faults found by a later verification", *against)
    if forced_by is not None:
        return Condition(value="degraded", reasons=(f"forced by {forced_by}", *against))
    if faults:
        return Condition(value="degraded", reasons=against)
    if ledger is None:
        return Condition(value="pending", reasons=("not verified", *against))
    not_computed = ledger.not_computed_briefly()
    if not_computed or not ledger.channels:
        missing = f"not computed: {', '.join(not_computed)}" if ledger.channels else "the ledger has no channel"
        return Condition(value="pending", reasons=(missing, *against))
    return Condition(value="degraded" if against else "available", reasons=against)


def beyond_replay(reasons: Iterable[str], gaps: Iterable[Gap]) -> tuple[str, ...]:
    """Return a day's reasons without those that every replayed day has: its source, and what no replay brings back."""
    always = _against(None, [gap for gap in gaps if gap.cause == GapCause.NOT_CAPTURED], "replay", None)
    return tuple(reason for reason in reasons if reason not in always)


def with_late_rows(value: ConditionValue, reasons: Sequence[str], late: LateRows) -> Condition:
    """Judge a finished day of which nothing is new but its late rows; all that was found before still stands."""
    others = tuple(reason for reason in reasons if _LATE not in reason)
    against = (*others, *_late(late))
    if value in ("missing", "pending"):
        return Condition(value=value, reasons=against)
    return Condition(value="degraded" if against else "available", reasons=against)


def _late(late: LateRows | None) -> tuple[str, ...]:
    if late is None or not late.rows:
        return ()
    return (f"{late.rows} {_LATE}" + ("" if late.filed else ", and no table has them yet"),)


def _against(ledger: Ledger | None, gaps: Sequence[Gap], source: Mode, late: LateRows | None) -> tuple[str, ...]:
    standing = [gap for gap in gaps if gap.outcome in ("open", "stays") and gap.cause not in NEVER_DEGRADE]
    reasons = [
        f"gap {gap.gap_id} ({gap.cause}) {'is open' if gap.outcome == 'open' else 'stays'}"
        + (f": {gap.detail}" if gap.detail is not None else "")
        for gap in standing[:MAX_GAPS_NAMED]
    ]
    more = Counter(gap.cause for gap in standing[MAX_GAPS_NAMED:])
    reasons += [f"{count} more gaps ({cause})" for cause, count in sorted(more.items())]
    if ledger is not None:
        reasons += [
            f"{sheet.channel}: {count} rejected ({reason})"
            for sheet in ledger.channels
            for reason, count in sorted((sheet.rejected or {}).items())
            if count
        ]
        reasons += [f"unexplained difference: {entry.name} {entry.size:+d}" for entry in ledger.unexplained()]
        if ledger.trades.extra:
            reasons.append(f"{ledger.trades.extra} trades that the exchange does not list")
    if source == "replay":
        reasons.append("replayed source")
    return (*reasons, *_late(late))
