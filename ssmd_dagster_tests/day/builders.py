"""Short ways to write journals in tests."""

from __future__ import annotations

from typing import Any

from ssmd_dagster.day.events import EMPTY_BOOK, Book, DayEvent, TradingDay
from ssmd_dagster.day.folding import fold, new_event
from ssmd_dagster.day.states import OPENS_EPOCH, EventName

ENV = "kalshi-test"
DATE = "2025-12-14"

DATA: dict[EventName, dict[str, Any]] = {
    EventName.START_REQUESTED: {"mode": "live"},
    EventName.START_FAILED: {"step": "connector", "error": "no answer", "exit_code": 7, "transient": True},
    EventName.END_FAILED: {"step": "verify", "error": "3 records missing", "exit_code": 6},
    EventName.ERROR_RAISED: {"error": "no heartbeat", "component": "connector"},
    EventName.GAVE_UP: {"error": "connector dies at once", "attempts": 3},
    EventName.COMPLETED: {"condition": "pending", "messages": 12, "gaps": 0, "archive_url": "s3://raw/kalshi/"},
    EventName.STEP_STARTED: {"step": "connector"},
    EventName.STEP_FINISHED: {"step": "connector"},
    EventName.STEP_FAILED: {"step": "connector", "error": "no answer"},
    EventName.GAP_OPENED: {"gap_id": "g1", "cause": "connection_lost", "from_ns": 5},
    EventName.GAP_CLOSED: {"gap_id": "g1", "to_ns": 9, "outcome": "healed"},
    EventName.CHECKPOINT: {"component": "connector", "messages": 7},
    EventName.VERIFIED: {"ledger": {}, "examined": 12, "differences": 0},
    EventName.CONDITION_CHANGED: {"condition": "degraded", "condition_reasons": ["late rows"]},
    EventName.SEALED: {"manifest_sha256": "00", "root_hash": "11", "revision": 1},
}
"""A valid `data` for every event that needs one."""


class Log:
    """A journal in memory that appends through the same gate as the real one."""

    def __init__(self) -> None:
        self.events: list[tuple[int, DayEvent]] = []
        self.book: Book = EMPTY_BOOK

    def add(self, event: EventName, *, date: str = DATE, **fields: Any) -> TradingDay | None:
        """Append an event in the day's own epoch (None where it opens one); raise what the gate raises."""
        day = self.book.days.get(date)
        epoch = fields.pop("epoch", None if event in OPENS_EPOCH or day is None else day.epoch)
        seq = len(self.events) + 1
        made = new_event(
            day,
            event,
            id=f"id-{seq}",
            env=ENV,
            date=date,
            epoch=epoch,
            at_ns=fields.pop("at_ns", seq * 1_000),
            actor=fields.pop("actor", "cli:test@host"),
            reason=fields.pop("reason", None),
            data=DATA.get(event, {}) | fields.pop("data", {}),
        )
        assert not fields
        self.book = fold([(seq, made)], self.book)
        self.events.append((seq, made))
        return self.book.days.get(date)

    def day(self, date: str = DATE) -> TradingDay:
        """Return a day that has events."""
        return self.book.days[date]


def started() -> Log:
    """Return the log of an ACTIVE day."""
    log = Log()
    for event in (EventName.DEFINED, EventName.START_REQUESTED, EventName.STARTED):
        log.add(event)
    return log
