"""The shapes of the `data` of every event of the day journal, in one table (`SHAPES`).

An event's `data` is checked against its shape before it is appended and again when it is folded; keys that a shape does
not know are kept in the journal and ignored. Times are nanoseconds since the epoch, UTC. What the day does with an
event belongs to `folding`.
"""

from __future__ import annotations

from typing import Any, Literal

import msgspec

from ssmd_dagster.day.states import EventName

Mode = Literal["live", "replay"]
ConditionValue = Literal["available", "degraded", "pending", "missing"]


class Payload(msgspec.Struct, frozen=True, kw_only=True):
    """Base of all shapes; itself the shape of events without data."""


class StartRequested(Payload, frozen=True, kw_only=True):
    """An attempt to start. `open_ns` is None where the calendar's window holds; `revision` never goes back."""

    mode: Mode
    open_ns: int | None = None
    revision: int = 1


class Started(Payload, frozen=True, kw_only=True):
    """The day is ACTIVE. `open_ns` begins its window: the schedule's boundary, or when a manual verb took effect."""

    open_ns: int | None = None
    markets: int | None = None
    connections: int | None = None


class Failed(Payload, frozen=True, kw_only=True):
    """A verb's or a step's final failure. `transient`: trying again may succeed without anyone changing anything."""

    error: str
    step: str | None = None
    exit_code: int = 1
    transient: bool = False


class Missed(Payload, frozen=True, kw_only=True):
    """A day that is over and was never started; `recorded_with` is the day whose recording went on through all of it."""

    recorded_with: str | None = None


class ErrorRaised(Payload, frozen=True, kw_only=True):
    """An ACTIVE day in trouble; `component` names the process concerned."""

    error: str
    component: str | None = None


class GaveUp(Payload, frozen=True, kw_only=True):
    """Recovery ended without success after `attempts`."""

    error: str
    attempts: int
    exit_code: int = 1
    transient: bool = False


class LateRows(Payload, frozen=True, kw_only=True):
    """Rows that came off a socket after a seal of the day, up to `until_ns`; `filed`: the newest revision's tables have them."""

    rows: int
    until_ns: int | None = None
    filed: bool = False


class DriftCount(Payload, frozen=True, kw_only=True):
    """One thing that no reader knows: a key (`json_type`: of its value), a message type or a shape, and how often it came."""

    kind: str
    name: str
    json_type: str = ""
    count: int


class DriftFound(Payload, frozen=True, kw_only=True):
    """What a normaliser did not know: how many `fingerprints` there are, and the most frequent ones of each kind."""

    fingerprints: int
    most: tuple[DriftCount, ...] = ()


class EndRequested(Payload, frozen=True, kw_only=True):
    """An attempt to end. `close_ns` ends the window: the schedule's boundary, or when a manual verb closed it.

    `forced_by` names who skips proof.
    """

    close_ns: int | None = None
    forced_by: str | None = None


class Completed(Payload, frozen=True, kw_only=True):
    """The day is COMPLETE. `ledger` is `Ledger.to_json()`; None where a forced end skipped the verification.

    `late` None: nothing new is known of late rows.
    """

    condition: ConditionValue
    condition_reasons: tuple[str, ...] = ()
    rules_version: int = 1
    ledger: dict[str, Any] | None = None
    messages: int
    gaps: int
    archive_url: str
    forced_by: str | None = None
    late: LateRows | None = None


class Step(Payload, frozen=True, kw_only=True):
    """A step began or finished; `detail` holds what it found (counts, names), small."""

    step: str
    detail: dict[str, Any] = {}


class GapOpened(Payload, frozen=True, kw_only=True):
    """An interval began in which records are missing or suspected to be.

    `scope` narrows it: any of `conn`, `sid`, `channel`, `market`, `markets`, `component`; empty means the whole day's capture.
    Of batches that the archive lost it has `batches` (first, last) and `seq` (per sid first and last number), too.
    `cause` is one of `causes.GapCause`, or whatever another version wrote.
    """

    gap_id: str
    cause: str
    from_ns: int
    scope: dict[str, Any] = {}


class GapClosed(Payload, frozen=True, kw_only=True):
    """The interval ended; may be repeated when the outcome changes (a gap that stayed is repaired later).

    `detail` says what of it is not as the outcome says, such as "trades repaired" of a gap that stays.
    """

    gap_id: str
    to_ns: int
    outcome: Literal["healed", "repaired", "stays"]
    detail: str | None = None


class ChannelCount(Payload, frozen=True, kw_only=True):
    """What one component has counted of one channel of one connection; `last_n` is the last record's ordinal."""

    records: int
    batches: int
    bytes: int
    last_n: int


class Checkpoint(Payload, frozen=True, kw_only=True):
    """A component's counts so far: connection → channel → count. `final` says that the component wrote its last.

    A component that was restarted need not name its predecessor's connections again. `messages` and `bytes` are the
    day's totals where the component knows them.
    """

    component: str
    final: bool = False
    connections: dict[str, dict[str, ChannelCount]] = {}
    messages: int | None = None
    bytes: int | None = None


class Verified(Payload, frozen=True, kw_only=True):
    """A verification was done over `examined` records; `differences` counts the unexplained ones, `faults` are the first."""

    ledger: dict[str, Any]
    examined: int
    differences: int
    faults: tuple[str, ...] = ()


class ConditionChanged(Payload, frozen=True, kw_only=True):
    """A finished day is judged anew. `late` None: nothing new is known of late rows."""

    condition: ConditionValue
    condition_reasons: tuple[str, ...] = ()
    rules_version: int = 1
    late: LateRows | None = None


class Sealed(Payload, frozen=True, kw_only=True):
    """The manifest of a revision was written; `drift` is what the normaliser of its tables did not know."""

    manifest_sha256: str
    root_hash: str
    revision: int
    manifest_key: str | None = None
    drift: DriftFound | None = None


SHAPES: dict[EventName, type[Payload]] = {
    EventName.DEFINED: Payload,
    EventName.START_REQUESTED: StartRequested,
    EventName.MISSED: Missed,
    EventName.STARTED: Started,
    EventName.START_FAILED: Failed,
    EventName.ERROR_RAISED: ErrorRaised,
    EventName.RECOVERED: Payload,
    EventName.GAVE_UP: GaveUp,
    EventName.END_REQUESTED: EndRequested,
    EventName.COMPLETED: Completed,
    EventName.END_FAILED: Failed,
    EventName.STEP_STARTED: Step,
    EventName.STEP_FINISHED: Step,
    EventName.STEP_FAILED: Failed,
    EventName.GAP_OPENED: GapOpened,
    EventName.GAP_CLOSED: GapClosed,
    EventName.CHECKPOINT: Checkpoint,
    EventName.VERIFIED: Verified,
    EventName.CONDITION_CHANGED: ConditionChanged,
    EventName.SEALED: Sealed,
    EventName.PAUSED: Payload,
    EventName.RESUMED: Payload,
}
"""The shape of each event's `data`."""
