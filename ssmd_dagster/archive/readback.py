"""Everything that can be said of a day's segments from their bytes alone.

Feed the segments of one day, `session` first, each channel's in order; then ask for the findings. Checked are every trailer,
frame checksum and SHA-256, the footers and their chain, the recorder's interval notes, and that `n` runs from 0 without a
hole or a repetition over all channels of each connection; what a killed connector's last flush lacks is no fault where a
`torn` note says so. Not here: fetching the bytes, and what follows from a finding.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable

import msgspec

from ssmd_dagster.archive.batch import Batch, BatchDamagedError, BatchHeader, Damage, decode_records, scan
from ssmd_dagster.archive.intervals import (
    Interval,
    IntervalCheck,
    Jump,
    Ordinals,
    Torn,
    ends_session,
    intervals_in,
    jumps_in,
    ordinals_of,
    oversized_in,
    sids_in,
    spoilt_ends_in,
    torn_in,
)
from ssmd_dagster.archive.losses import Batches, Loss
from ssmd_dagster.archive.numbering import Numberings, WireCount
from ssmd_dagster.archive.segment import Ranges, add_range
from ssmd_dagster.exchange import SESSION


class SegmentFinding(msgspec.Struct, frozen=True, kw_only=True):
    """One segment as it was read back."""

    key: str
    channel: str
    size: int
    sha256: str
    batches: int
    records: int


class Readback(msgspec.Struct, frozen=True, kw_only=True):
    """What the bytes of a day say.

    `archived` and `received` count records per channel; `received` is what the recorder's interval notes claim.
    `by_connection` counts the archived ones per connection and channel. `wire` counts the exchange's own numbers per connection
    and sid, `jumps` are what the recorder noted of them per connection, `unrecorded` how many frames of a connection it says
    were lost (torn) or not kept (oversized). `losses` are the batches that the segments do not give back. `faults` names
    everything that is not as it must be; empty means that every check passed over `records` records.
    """

    segments: tuple[SegmentFinding, ...]
    archived: dict[str, int]
    received: dict[str, int]
    by_connection: dict[str, dict[str, int]]
    epochs: dict[str, int]
    records: int
    intervals_confirmed: int
    wire: tuple[WireCount, ...]
    jumps: dict[str, tuple[Jump, ...]]
    unrecorded: dict[str, int]
    losses: tuple[Loss, ...]
    faults: tuple[str, ...]


See = Callable[[BatchHeader, bytes], None]
"""`see(header, records)` is shown every whole batch as it is read back."""


class DayReadback:
    """Collects the findings over a day's segments; `see` is shown the batches beside it."""

    def __init__(self, env: str, day: str, *, see: See | None = None) -> None:
        self._env, self._day, self._see = env, day, see
        self._segments: list[SegmentFinding] = []
        self._faults: list[str] = []
        self._archived: dict[str, int] = {}
        self._by_connection: dict[str, dict[str, int]] = {}
        self._epochs: dict[str, int] = {}
        self._ordinals: dict[str, Ordinals] = {}
        self._torn: dict[str, Torn] = {}
        self._spoilt_ends: dict[tuple[str, str], int] = {}
        self._session_end: dict[str, int] = {}
        self._stated: dict[str, list[Interval]] = {}
        self._checks: dict[tuple[str, str], IntervalCheck] = {}
        self._last_batch: dict[tuple[str, str], int] = {}
        self._unordered: set[tuple[str, str]] = set()
        self._places: dict[tuple[str, str], list[tuple[int, str, int, int]]] = {}
        self._previous: dict[str, str] = {}
        self._numbers = Numberings()
        self._jumps: dict[str, list[Jump]] = {}
        self._announced: set[tuple[str, int]] = set()
        self._oversized: dict[str, int] = {}
        self._batches = Batches()

    def feed(self, key: str, channel: str, number: int, data: bytes) -> None:
        """Take one whole segment: the `number`-th of `channel`."""
        batches = records = 0
        ranges: Ranges = {}
        ended = False
        for item in scan(data):
            if isinstance(item, Damage):
                self._faults.append(f"{key}: bytes {item.start}-{item.end} belong to no whole batch")
            elif isinstance(item, Batch):
                if ended:
                    self._faults.append(f"{key}: a batch behind the footer")
                batches += 1
                records += self._batch(key, channel, data, item)
                add_range(ranges, item.header.conn, *item.header.span)
            else:
                ended = True
                footer = item.footer
                if (footer.env, footer.day, footer.channel, footer.segment) != (self._env, self._day, channel, number):
                    self._faults.append(
                        f"{key}: its footer says {footer.env} {footer.day} {footer.channel}-{footer.segment}"
                    )
                if footer.prev_sha256 != self._previous.get(channel):
                    self._faults.append(f"{key}: its footer names another segment before it than the one that is there")
                if footer.records != records:
                    self._faults.append(f"{key}: {records} records, its footer says {footer.records}")
                if {conn: list(spans) for conn, spans in footer.ranges.items()} != ranges:
                    self._faults.append(f"{key}: its footer names other batches than are there")
        if not ended:
            self._faults.append(f"{key}: no footer")
        sha256 = hashlib.sha256(data).hexdigest()
        self._previous[channel] = sha256
        self._segments.append(
            SegmentFinding(key=key, channel=channel, size=len(data), sha256=sha256, batches=batches, records=records)
        )

    def _batch(self, key: str, channel: str, data: bytes, batch: Batch) -> int:
        """Check one batch and count its records; a damaged one counts none."""
        header = batch.header
        conn, place = header.conn, (header.conn, channel)
        if (header.env, header.day, header.channel) != (self._env, self._day, channel):
            self._faults.append(f"{key}: batch {conn}/{header.batch} is of {header.env} {header.day} {header.channel}")
        try:
            records = decode_records(data, batch)
        except BatchDamagedError as error:
            self._faults.append(f"{key}: {error.what}")
            self._batches.spoilt(header)
            return 0
        try:
            ordinals = ordinals_of(records)
        except ValueError as error:
            self._faults.append(f"{key}: batch {conn}/{channel}/{header.batch} holds no records: {error}")
            self._batches.spoilt(header)
            return 0
        self._batches.whole(header)
        self._ordinals.setdefault(conn, Ordinals()).add(ordinals)
        honest = ordinals == sorted(ordinals) and (ordinals[0], ordinals[-1]) == (header.n_first, header.n_last)
        if not honest:
            self._faults.append(
                f"{key}: batch {conn}/{channel}/{header.batch} does not hold the ordinals that it states"
            )
        self._epochs[conn] = header.epoch
        self._archived[channel] = self._archived.get(channel, 0) + len(ordinals)
        counts = self._by_connection.setdefault(conn, {})
        counts[channel] = counts.get(channel, 0) + len(ordinals)
        if channel == SESSION:
            self._session(conn, records, ordinals[-1])
        self._numbers.feed(header, records)
        if self._see is not None:
            self._see(header, records)
        if not honest:
            return len(ordinals)
        self._places.setdefault(place, []).append((header.span[0], key, batch.start, batch.end))
        if self._last_batch.get(place, -1) >= header.span[0]:
            self._unordered.add(place)
        self._last_batch[place] = header.span[1]
        if channel != SESSION and place not in self._unordered:
            self._check(place).feed(records, header.n_first, header.n_last)
        return len(ordinals)

    def _session(self, conn: str, records: bytes, last_n: int) -> None:
        self._stated.setdefault(conn, []).extend(intervals_in(records))
        self._torn.update((conn, torn) for torn in torn_in(records))
        self._spoilt_ends.update(((conn, channel), last) for channel, last in spoilt_ends_in(records))
        self._jumps.setdefault(conn, []).extend(jumps_in(records))
        self._announced.update((conn, sid) for sid in sids_in(records))
        self._oversized[conn] = self._oversized.get(conn, 0) + oversized_in(records)
        if ends_session(records.splitlines()[-1]):
            self._session_end[conn] = max(last_n, self._session_end.get(conn, -1))

    def _check(self, place: tuple[str, str]) -> IntervalCheck:
        conn, channel = place
        if place not in self._checks:
            self._checks[place] = IntervalCheck(channel, self._stated.get(conn, ()))
        return self._checks[place]

    def _feed_again(self, check: IntervalCheck, key: str, data: bytes) -> None:
        batch = next(scan(data), None)
        try:
            if not isinstance(batch, Batch):
                raise BatchDamagedError("a batch is not there any more")
            check.feed(decode_records(data, batch), batch.header.n_first, batch.header.n_last)
        except BatchDamagedError as error:
            self._faults.append(f"{key}: changed while it was read: {error.what}")

    def losses(self) -> tuple[Loss, ...]:
        """Return the batches that are missing in what was fed so far."""
        return self._batches.losses(self._stated, self._spoilt_ends)

    def finish(self, read_range: Callable[[str, int, int], bytes]) -> Readback:
        """Check what needs the whole day and return the findings.

        `read_range(key, start, length)` reads bytes again: of `session`, whose notes are only now all known, and of batches
        that a repair has put out of order.
        """
        session = {place for place in self._places if place[1] == SESSION}
        for place in sorted(self._unordered | session):
            self._checks.pop(place, None)
            check = self._check(place)
            for _first, key, start, end in sorted(self._places[place]):
                self._feed_again(check, key, read_range(key, start, end - start))
        received: dict[str, int] = {}
        confirmed = 0
        for (conn, channel), check in sorted(self._checks.items()):
            left = check.finish()
            confirmed += check.confirmed
            self._faults += [f"{conn}: {mismatch}" for mismatch in check.mismatches]
            claimed = sum(interval.records for interval in self._stated.get(conn, ()) if interval.channel == channel)
            if left is not None and (left.records, left.n_last) == (1, self._session_end.get(conn)):
                claimed += 1  # the note about `session` itself, the connection's last record
            elif left is not None:
                self._faults.append(
                    f"{conn}: no interval note covers {left.records} records of {channel} behind {left.n_first}"
                )
            received[channel] = received.get(channel, 0) + claimed
        for conn, ordinals in sorted(self._ordinals.items()):
            if ordinals.torn() != self._torn.get(conn) or ordinals.repeated:
                self._faults.append(f"{conn}: {ordinals.holes} ordinals are missing, {ordinals.repeated} come twice")
        for conn, stated in self._stated.items():
            for channel in {interval.channel for interval in stated} - set(self._by_connection.get(conn, ())):
                count = sum(interval.records for interval in stated if interval.channel == channel)
                received[channel] = received.get(channel, 0) + count
                self._faults.append(f"{conn}: {count} records of {channel} were noted and none is there")
        return Readback(
            segments=tuple(self._segments),
            archived=self._archived,
            received=received,
            by_connection=self._by_connection,
            epochs=self._epochs,
            records=sum(self._archived.values()),
            intervals_confirmed=confirmed,
            wire=self._numbers.counts(self._announced),
            jumps={conn: tuple(jumps) for conn, jumps in self._jumps.items() if jumps},
            unrecorded={
                conn: lost
                for conn in sorted(self._ordinals)
                if (lost := self._oversized.get(conn, 0) + (self._torn[conn].records if conn in self._torn else 0))
            },
            losses=self.losses(),
            faults=tuple(self._faults),
        )
