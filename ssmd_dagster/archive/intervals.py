"""Interval notes and ordinals: what the recorder said came in, against what is there.

Every minute the recorder notes per channel which records came since the last note, how many, and the SHA-256 of their
bytes. However batches were joined since, the same records must give the same hash: this is what proves that an archive is
what came in. Used on the spool (to write the notes that a killed connector owes) and on the archive (to verify).
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from typing import Any

import msgspec
import numpy as np

from ssmd_dagster.archive.records import parse_record
from ssmd_dagster.exchange import SESSION

_BEGINNING = b'{"n":'


class Interval(msgspec.Struct, frozen=True):
    """The records of one channel of one connection between two notes; `n` inclusive."""

    channel: str
    n_first: int
    n_last: int
    records: int
    sha256: str

    def note(self) -> dict[str, Any]:
        """Return the note that the recorder writes into its `session` channel."""
        return {
            "event": "interval",
            "channel": self.channel,
            "n": [self.n_first, self.n_last],
            "records": self.records,
            "sha256": self.sha256,
        }


def interval_of(note: dict[str, Any] | None) -> Interval | None:
    """Return the interval that a record's note states, None for any other note."""
    if note is None or note.get("event") != "interval":
        return None
    first, last = note["n"]
    return Interval(note["channel"], first, last, note["records"], note["sha256"])


def intervals_in(session_records: bytes) -> Iterable[Interval]:
    """Yield the intervals that a block of `session` records states, in order."""
    for line in session_records.splitlines():
        if b'"interval"' in line and (interval := interval_of(parse_record(line).note)) is not None:
            yield interval


def ends_session(line: bytes) -> bool:
    """Tell whether a record is the interval note about `session` itself, which is a connection's last record."""
    interval = interval_of(parse_record(line).note)
    return interval is not None and interval.channel == SESSION


class Torn(msgspec.Struct, frozen=True):
    """Ordinals that a killed process had given out and not written, or that its disk has spoilt; both ends inclusive.

    `records` of those from `n_first` to `n_last`.
    """

    n_first: int
    n_last: int
    records: int

    def note(self) -> dict[str, Any]:
        """Return the note that the audit writes into the connection's `session` channel."""
        return {"event": "torn", "n": [self.n_first, self.n_last], "records": self.records}


def torn_in(session_records: bytes) -> Iterable[Torn]:
    """Yield what a block of `session` records says of a torn last flush."""
    for line in session_records.splitlines():
        if b'"torn"' in line and (note := parse_record(line).note) is not None and note.get("event") == "torn":
            first, last = note["n"]
            yield Torn(first, last, note["records"])


def spoilt_ends_in(session_records: bytes) -> Iterable[tuple[str, int]]:
    """Yield the channels whose last batch was spoilt before a note covered it, each with its last ordinal."""
    for line in session_records.splitlines():
        if b'"torn"' in line and (note := parse_record(line).note) is not None and note.get("event") == "torn":
            yield from note.get("last", {}).items()


def oversized_in(session_records: bytes) -> int:
    """Return how many frames a block of `session` records says were too large to be kept."""
    return sum(
        (note := parse_record(line).note) is not None and note.get("event") == "oversized"
        for line in session_records.splitlines()
        if b'"oversized"' in line
    )


class Jump(msgspec.Struct, frozen=True):
    """Numbers of a subscription that did not come, as the recorder noted them; both ends inclusive.

    `numbering`: how often its numbers had begun anew.
    """

    sid: int
    first: int
    last: int
    numbering: int = 0


def jumps_in(session_records: bytes) -> Iterable[Jump]:
    """Yield what a block of `session` records says of jumps in the exchange's numbers."""
    for line in session_records.splitlines():
        note = parse_record(line).note if b'"sequence_jump"' in line else None
        if note is not None and note.get("event") == "sequence_jump":
            before, after = note["seq"]
            yield Jump(note["sid"], before + 1, after - 1, note.get("numbering", 0))


def sids_in(session_records: bytes) -> Iterable[int]:
    """Yield the subscriptions that a block of `session` records says have begun."""
    for line in session_records.splitlines():
        if b'"sids"' in line and (note := parse_record(line).note) is not None:
            yield from note.get("sids", {}).values()


class Ordinals:
    """Which ordinals of one connection have been seen: one byte each."""

    def __init__(self) -> None:
        self.highest = -1
        self.count = 0
        self.repeated = 0
        self._seen = np.zeros(1 << 10, dtype=np.bool_)

    def add(self, ordinals: Sequence[int]) -> None:
        """Take note of some ordinals, at least one."""
        numbers = np.array(ordinals, dtype=np.int64)
        self.reach(int(numbers.max()))
        new = len(np.unique(numbers[~self._seen[numbers]]))
        self.count += new
        self.repeated += len(numbers) - new
        self._seen[numbers] = True

    def reach(self, top: int) -> None:
        """Take note that ordinals up to `top` were given out."""
        if top >= len(self._seen):
            grown = np.zeros(max(2 * len(self._seen), top + 1), dtype=np.bool_)
            grown[: len(self._seen)] = self._seen
            self._seen = grown
        self.highest = max(self.highest, top)

    @property
    def holes(self) -> int:
        """Return how many ordinals from 0 to the highest have not been seen."""
        return self.highest + 1 - self.count

    def torn(self) -> Torn | None:
        """Return what is missing, None where nothing is."""
        if self.holes == 0:
            return None
        missing = np.flatnonzero(~self._seen[: self.highest + 1])
        return Torn(int(missing[0]), int(missing[-1]), len(missing))


def ordinals_of(records: bytes) -> list[int]:
    """Return the ordinals of a block of whole lines; raise `ValueError` where a line does not begin with one."""
    lines = records.split(b"\n")
    if lines.pop() or not lines or not all(line.startswith(_BEGINNING) for line in lines):
        raise ValueError("a line does not begin with its ordinal, or is not whole")
    return [int(line[len(_BEGINNING) : line.index(b",")]) for line in lines]


class IntervalCheck:
    """Recomputes the intervals of one channel of one connection from its records, fed in order.

    `mismatches` names every stated interval that the records do not bear out.
    """

    def __init__(self, channel: str, stated: Iterable[Interval]) -> None:
        self.channel = channel
        self.mismatches: list[str] = []
        self.confirmed = 0
        # A repair may have put batches of `session` out of order, and with them the notes.
        own = (interval for interval in stated if interval.channel == channel)
        self._stated = sorted(own, key=lambda interval: interval.n_first)
        self._next = 0
        self._restart()

    def _restart(self) -> None:
        self._hash = hashlib.sha256()
        self._records = 0
        self._first: int | None = None
        self._last = -1

    def feed(self, records: bytes, n_first: int, n_last: int) -> None:
        """Take the next block of whole lines, whose ordinals go from `n_first` to `n_last`."""
        while self._next < len(self._stated) and n_last > self._stated[self._next].n_last:
            end = self._stated[self._next].n_last
            if n_first > end:
                self._close()
                continue
            split, last_inside = _offset_behind(records, end)
            self._add(records[:split], n_first, last_inside)
            records, n_first = records[split:], parse_record(records[split : records.index(b"\n", split)]).n
            self._close()
        self._add(records, n_first, n_last)

    def _add(self, records: bytes, n_first: int, n_last: int) -> None:
        self._hash.update(records)
        self._records += records.count(b"\n")
        self._first = n_first if self._first is None else self._first
        self._last = n_last

    def _close(self) -> None:
        stated = self._stated[self._next]
        found = self.open_interval()
        if found == stated:
            self.confirmed += 1
        else:
            self.mismatches.append(
                f"{self.channel} {stated.n_first}-{stated.n_last}: the recorder noted {stated.records} records "
                f"({stated.sha256[:12]}…), there are {found.records if found else 0} ({found.sha256[:12] if found else '-'}…)"
            )
        self._next += 1
        self._restart()

    def open_interval(self) -> Interval | None:
        """Return what was fed since the last confirmed note, None where nothing was."""
        if self._first is None:
            return None
        return Interval(self.channel, self._first, self._last, self._records, self._hash.hexdigest())

    def finish(self) -> Interval | None:
        """Close the stated intervals that are left and return what no note covers."""
        while self._next < len(self._stated):
            self._close()
        return self.open_interval()


def _offset_behind(records: bytes, n_last: int) -> tuple[int, int]:
    """Return where the first line with an ordinal above `n_last` begins, and the ordinal of the line before it."""
    offset, before = 0, -1
    while offset < len(records):
        end = records.index(b"\n", offset) + 1
        n = parse_record(records[offset:end]).n
        if n > n_last:
            break
        offset, before = end, n
    return offset, before
