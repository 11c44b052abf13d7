"""Why records are missing: every cause that a gap of a trading day can have. What to do about each is in `docs/operations.md`.

A journal may name causes that are not here, those of an older or newer version: whoever reads one takes it as it is.
"""

from __future__ import annotations

from enum import StrEnum


class GapCause(StrEnum):
    """The word that stands in the journal, in the table `coverage` and in what a person reads."""

    CONNECTION_LOST = "connection_lost"
    PROCESS_CRASH = "process_crash"
    HOST_SUSPENDED = "host_suspended"
    SEQUENCE_JUMP = "sequence_jump"
    BUFFER_OVERFLOW = "buffer_overflow"
    OVERSIZED = "oversized"
    RATE_LIMITED = "rate_limited"
    NOT_SUBSCRIBED = "not_subscribed"
    LATE_START = "late_start"
    OPERATOR_STOP = "operator_stop"
    ARCHIVE_DAMAGED = "archive_damaged"
    NOT_CAPTURED = "not_captured"
    EXCHANGE_MAINTENANCE = "exchange_maintenance"
    CLOSED_BY_SCHEDULE = "closed_by_schedule"


NEVER_DEGRADE = frozenset({GapCause.EXCHANGE_MAINTENANCE, GapCause.CLOSED_BY_SCHEDULE})
"""Causes of gaps in which there was nothing to record."""
