"""Events of the day journal, and the trading days that they make.

Shapes of `data` are in `payloads`, the arrows in `states`. Not here: which events a day takes, and what they change (`folding`).
"""

from __future__ import annotations

from typing import Any, Literal

import msgspec

from ssmd_dagster.day import payloads
from ssmd_dagster.day.states import RECORDING, DayState, EventName
from ssmd_dagster.errors import SsmdError


class BadEventError(SsmdError):
    """The bytes or the `data` of an event do not have the shape that the journal requires."""


class JournalBrokenError(SsmdError):
    """The journal holds what it can not hold; `seq` is the first offending sequence."""

    def __init__(self, seq: int, what: str, *, where: str = "") -> None:
        self.seq = seq
        super().__init__(
            f"the day journal is broken at sequence {seq}: {what}",
            where=where,
            do="Restore the journal's stream from its backup; nothing may be appended until then",
        )


class DayEvent(msgspec.Struct, kw_only=True, frozen=True, rename={"from_": "from"}):
    """One message of `{env}.day.events`; the fields are in the order of the bytes.

    `from_` and `to` are None for events that change no state. `epoch` is None for an event that opens one and for a day
    that has none yet. `date` of `paused` and `resumed` is the environment's date at that time. `prev_sha256` is filled
    in by the journal when it appends.
    """

    v: int = 1
    id: str
    env: str
    date: str
    event: EventName
    from_: DayState | None = None
    to: DayState | None = None
    epoch: int | None = None
    at_ns: int
    actor: str
    reason: str | None = None
    data: dict[str, Any] = {}
    prev_sha256: str | None = None

    def encode(self) -> bytes:
        """Return the event's bytes: compact JSON, keys in the contract's order."""
        return _ENCODER.encode(self)

    @classmethod
    def decode(cls, raw: bytes) -> DayEvent:
        """Read an event's bytes; unknown keys are ignored.

        Raises:
            BadEventError: Not JSON, a key is missing, or the event or a state is unknown.
        """
        try:
            return _DECODER.decode(raw)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            raise BadEventError(f"not an event of the day journal: {error}") from error


_ENCODER = msgspec.json.Encoder()
_DECODER = msgspec.json.Decoder(DayEvent)

GapOutcome = Literal["open", "healed", "repaired", "stays"]


class Gap(msgspec.Struct, frozen=True, kw_only=True):
    """An interval of missing or suspected records; `to_ns` is None while it lasts. `scope`: `payloads.GapOpened`."""

    gap_id: str
    cause: str
    from_ns: int
    to_ns: int | None = None
    scope: dict[str, Any] = {}
    outcome: GapOutcome = "open"
    detail: str | None = None


class Step(msgspec.Struct, frozen=True, kw_only=True):
    """One step of the current attempt. `finished_ns` is None while it runs, `error` is None unless it failed."""

    step: str
    started_ns: int
    finished_ns: int | None = None
    error: str | None = None


class Failure(msgspec.Struct, frozen=True, kw_only=True):
    """Why a day is in ERROR or FAILED."""

    error: str
    step: str | None
    exit_code: int
    transient: bool


class TradingDay(msgspec.Struct, frozen=True, kw_only=True):
    """A trading day as the journal tells it. Made by `fold_day` only.

    Attributes:
        epoch: Sequence of the event that opened the current attempt; `epochs` has all of them, oldest first.
        actor: Who opened the current epoch, or asked for the end within it.
        started_ns: When the day first became ACTIVE (a replay: when that replay did).
        ended_ns: When the end that holds was first asked for; None while the day runs.
        recorded_from_ns: The same of live recording alone, which no replay changes; `recorded_until_ns` likewise.
        open_ns: Start of the window as journaled when it was first ACTIVE, or by a start by hand; None: not yet, the calendar's
            holds. `close_ns` likewise, journaled by its end.
        ever_active: The day was ACTIVE at least once, in any revision; `recorded`: it was so live.
        recorded_with: The day whose recording went on through all of this one, which never was ACTIVE.
        messages: Records of the day, from `completed` or the latest checkpoint that gave a total.
        checkpoints: Latest counts per component, connections accumulated.
        steps: Steps of the current attempt, in order.
        late: Rows that came after a seal, as far as is known.
        completed: The data of the latest `completed`, kept through a later revision's attempt.
        seals: Each of its sealed revisions, and when it was sealed.
        first_seq: Sequence of its first event; `last_seq` that of the last one folded, `updated_ns` the last one's time.
        acted_ns: Time of the last event that is a verb's work; what processes tell of themselves does not count.
    """

    env: str
    date: str
    state: DayState
    epoch: int | None = None
    epochs: tuple[int, ...] = ()
    actor: str
    mode: payloads.Mode = "live"
    revision: int = 1
    started_ns: int | None = None
    ended_ns: int | None = None
    recorded_from_ns: int | None = None
    recorded_until_ns: int | None = None
    open_ns: int | None = None
    close_ns: int | None = None
    ever_active: bool = False
    recorded: bool = False
    recorded_with: str | None = None
    failure: Failure | None = None
    condition: payloads.ConditionValue | None = None
    condition_reasons: tuple[str, ...] = ()
    rules_version: int = 1
    messages: int | None = None
    gap_by_id: dict[str, Gap] = {}
    checkpoints: dict[str, payloads.Checkpoint] = {}
    steps: tuple[Step, ...] = ()
    ledger: dict[str, Any] | None = None
    late: payloads.LateRows | None = None
    completed: payloads.Completed | None = None
    sealed: payloads.Sealed | None = None
    seals: tuple[tuple[int, int], ...] = ()
    first_seq: int
    last_seq: int
    updated_ns: int
    acted_ns: int = 0

    @property
    def source(self) -> payloads.Mode:
        """Return `live` where its records are those of a live socket, its own or that of the day that it was recorded with."""
        return "live" if self.recorded or self.recorded_with is not None else self.mode

    @property
    def span(self) -> tuple[int | None, int | None]:
        """Return when it was started and ended; of a recorded day that was replayed too, when its recording was."""
        if self.mode == "replay" and self.recorded_from_ns is not None:
            return self.recorded_from_ns, self.recorded_until_ns
        return self.started_ns, self.ended_ns

    @property
    def error(self) -> str | None:
        """Return the text of the failure that the day is in."""
        return None if self.failure is None else self.failure.error

    @property
    def failed_step(self) -> str | None:
        """Return the step at which the day failed."""
        return None if self.failure is None else self.failure.step

    @property
    def archive_url(self) -> str | None:
        """Return where the day's files are, once it was COMPLETE."""
        return None if self.completed is None else self.completed.archive_url

    @property
    def forced_by(self) -> str | None:
        """Return who forced the end of the completed day."""
        return None if self.completed is None else self.completed.forced_by

    @property
    def sealed_ns(self) -> tuple[int, ...]:
        """Return when each of its revisions was sealed."""
        return tuple(at_ns for _, at_ns in self.seals)

    @property
    def is_unsealed(self) -> bool:
        """Tell whether it was proved and then cut off before the seal of its revision; a forced day has none to wait for."""
        sealed = 0 if self.sealed is None else self.sealed.revision
        return self.state is DayState.COMPLETE and self.forced_by is None and sealed < self.revision

    @property
    def gaps(self) -> tuple[Gap, ...]:
        """Return all gaps in the order in which they were opened."""
        return tuple(self.gap_by_id.values())


class Paused(msgspec.Struct, frozen=True, kw_only=True):
    """Who paused the environment's schedules, since when and why."""

    actor: str
    since_ns: int
    reason: str | None


class Book(msgspec.Struct, frozen=True, kw_only=True):
    """All days of one environment.

    `current` is the live day that runs or was started last: in a roll it moves when the new day becomes ACTIVE. Replays
    do not move it. `tip_seq` is 0 for an empty journal.
    """

    env: str | None = None
    days: dict[str, TradingDay] = {}
    current: str | None = None
    paused: Paused | None = None
    tip_seq: int = 0

    def successor(self, date: str) -> TradingDay | None:
        """Return the live day that took over from `date`: the first later one that was ever ACTIVE."""
        later = [day for day in self.days.values() if day.date > date and day.mode == "live" and day.ever_active]
        return min(later, key=lambda day: day.date, default=None)

    @property
    def left_behind(self) -> TradingDay | None:
        """Return the first live day before the current one that is not ended yet; in a roll there is one for a while."""
        unended = (*RECORDING, DayState.ENDING)
        before = [
            day
            for day in self.days.values()
            if day.date < (self.current or "") and day.mode == "live" and day.state in unended
        ]
        return min(before, key=lambda day: day.date, default=None)


EMPTY_BOOK = Book()
