"""Are the order books what their deltas make of them? Each connection's are folded and held against every later snapshot.

Feed `session` and `other` first, then the order book channel, each as whole segments. Where numbers of a subscription are
missing, its books are unknown until their next snapshots: that is no fault here. Not here: which numbers are missing and why.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import msgspec

from ssmd_dagster.archive.batch import Batch, BatchDamagedError, decode_records, scan
from ssmd_dagster.archive.records import parse_record, sequences_in
from ssmd_dagster.exchange import OTHER, SESSION, room_part

BOOKS = "orderbook_delta"
MAX_FAULTS = 100
MAX_WAITING_BYTES = 64 << 20
"""Batches that came before their predecessors, kept until those come."""


class BookFindings(msgspec.Struct, frozen=True):
    """`points` comparisons over `markets`, `differing` not equal; `faults` names the first of these. `records` were folded."""

    points: int
    differing: int
    markets: int
    records: int
    faults: tuple[str, ...]


class _Subscription:
    """One (connection, sid): its books, the last number, and what other channels hold of its numbers."""

    __slots__ = ("books", "elsewhere", "last", "members")

    def __init__(self, books: Any) -> None:
        self.books = books
        self.last = 0
        self.elsewhere: set[int] = set()
        self.members: dict[int, frozenset[str]] = {}

    def move_to(self, seq: int) -> bool:
        """Go on to a number; False where it has passed. Numbers that are nowhere make the books unknown."""
        if seq <= self.last:
            return False
        if seq != self.last + 1:
            # One by one: a jump is as long as what an `add_markets` takes, or it is a hole and the first look ends it.
            for number in range(self.last + 1, seq):
                if number not in self.elsewhere:
                    self.books.forget()
                    break
                if number in self.members:
                    self.books.keep_only(self.members[number])
        self.last = seq
        return True


class BookProofs:
    """Collects the proof points of a day."""

    def __init__(self, feed: str) -> None:
        room = room_part(feed, "books")
        self._new_books: Callable[[], Any] = room.FoldedBooks
        self._markets_after = room.markets_after
        line = msgspec.defstruct("Line", [("wire", room.BookFrame)], gc=False)
        self._decode: Callable[[bytes], Any] = msgspec.json.Decoder(line).decode
        self._subscriptions: dict[tuple[str, int], _Subscription] = {}
        self._next: dict[str, int] = {}
        self._waiting: dict[str, dict[int, tuple[int, bytes]]] = {}
        self._waiting_bytes = 0
        self._faults: list[str] = []
        self._differing = 0
        self._records = 0

    def feed(self, channel: str, data: bytes) -> None:
        """Take one whole segment of `session`, `other` or the order book channel; damaged batches are passed over."""
        for item in scan(data):
            if not isinstance(item, Batch):
                continue
            if channel == BOOKS:
                self._in_order(item.header.conn, item.header.span, data[item.start : item.end])
            elif channel in (SESSION, OTHER):
                self._elsewhere(item.header.conn, data, item)

    def finish(self) -> BookFindings:
        """Fold what still waits for a predecessor and return the findings."""
        for conn in list(self._waiting):
            self._flush(conn)
        markets = {market for subscription in self._subscriptions.values() for market in subscription.books.proved}
        return BookFindings(
            points=sum(subscription.books.points for subscription in self._subscriptions.values()),
            differing=self._differing,
            markets=len(markets),
            records=self._records,
            faults=tuple(self._faults),
        )

    def _subscription(self, conn: str, sid: int) -> _Subscription:
        place = (conn, sid)
        found = self._subscriptions.get(place)
        if found is None:
            found = self._subscriptions[place] = _Subscription(self._new_books())
        return found

    def _elsewhere(self, conn: str, data: bytes, batch: Batch) -> None:
        if not batch.header.seq:
            return
        try:
            records = decode_records(data, batch)
        except BatchDamagedError:  # named by the reading back; its numbers are a hole here
            return
        for sid, numbers in sequences_in(records).items():
            self._subscription(conn, sid).elsewhere.update(numbers)
        for line in records.splitlines():
            if b'"market_tickers"' in line and (members := self._markets_after(parse_record(line).wire)) is not None:
                for sid, (number, *_) in sequences_in(line + b"\n").items():
                    self._subscription(conn, sid).members[number] = members

    def _in_order(self, conn: str, span: tuple[int, int], encoded: bytes) -> None:
        """Fold batches of a connection in their order, which a repair may have changed in the archive."""
        if span[0] == self._next.get(conn, 0):
            self._fold(conn, encoded)
            self._next[conn] = span[1] + 1
            waiting = self._waiting.get(conn)
            while waiting and (following := waiting.pop(self._next[conn], None)) is not None:
                self._waiting_bytes -= len(following[1])
                self._fold(conn, following[1])
                self._next[conn] = following[0] + 1
        elif span[0] > self._next.get(conn, 0):
            self._waiting.setdefault(conn, {})[span[0]] = (span[1], encoded)
            self._waiting_bytes += len(encoded)
            if self._waiting_bytes > MAX_WAITING_BYTES:
                for name in list(self._waiting):
                    self._flush(name)

    def _flush(self, conn: str) -> None:
        """Fold what waits without its predecessors: what is missing between them is a hole."""
        for _first, (last, encoded) in sorted(self._waiting.pop(conn, {}).items()):
            self._waiting_bytes -= len(encoded)
            self._fold(conn, encoded)
            self._next[conn] = last + 1

    def _fold(self, conn: str, encoded: bytes) -> None:
        batch = next(scan(encoded))
        assert isinstance(batch, Batch)
        try:
            lines = decode_records(encoded, batch).split(b"\n")
        except BatchDamagedError:  # named by the reading back; its numbers are a hole here
            return
        lines.pop()
        self._records += len(lines)
        try:
            frames = [self._decode(line).wire for line in lines]
        except (msgspec.DecodeError, UnicodeDecodeError):
            frames, lines = self._readable(lines)
        if not frames:
            return
        sid, first = frames[0].sid, frames[0].seq
        numbers = [frame.seq for frame in frames]
        one_sid = all(frame.sid == sid for frame in frames)
        if one_sid and numbers == list(range(first, first + len(numbers))):
            subscription = self._subscription(conn, sid)
            if subscription.last == first - 1:
                self._fold_run(conn, subscription, frames, lines)
                return
        if not one_sid or not all(map(operator.lt, numbers, numbers[1:])):
            order = sorted(range(len(frames)), key=lambda i: (frames[i].sid, frames[i].seq))
            frames, lines = [frames[i] for i in order], [lines[i] for i in order]
        self._fold_frames(conn, frames, lines)

    def _fold_run(self, conn: str, subscription: _Subscription, frames: list[Any], lines: list[bytes]) -> None:
        """Fold frames that follow on one another and on what was folded before: nearly all there are."""
        take_deltas, at = subscription.books.take_deltas, 0
        while (at := take_deltas(frames, at)) < len(frames):
            self._take(conn, subscription, frames[at], lines[at])
            at += 1
        subscription.last = frames[-1].seq

    def _readable(self, lines: list[bytes]) -> tuple[list[Any], list[bytes]]:
        """Leave out what is no such message: where it has a number, that is a hole for the books."""
        frames, kept = [], []
        for line in lines:
            try:
                frames.append(self._decode(line).wire)
                kept.append(line)
            except (msgspec.DecodeError, UnicodeDecodeError):
                continue
        return frames, kept

    def _fold_frames(self, conn: str, frames: list[Any], lines: list[bytes]) -> None:
        sid, subscription = None, None
        for frame, line in zip(frames, lines, strict=True):
            if frame.sid != sid or subscription is None:
                sid = frame.sid
                subscription = self._subscription(conn, frame.sid)
            seq = frame.seq
            if seq == subscription.last + 1:
                subscription.last = seq
            elif not subscription.move_to(seq):
                continue
            self._take(conn, subscription, frame, line)

    def _take(self, conn: str, subscription: _Subscription, frame: Any, line: bytes) -> None:
        try:
            fault = subscription.books.take(frame)
        except LookupError:
            fault = self._take_old(subscription, frame, line)
        except ValueError:
            subscription.books.forget()
            return
        if fault is not None:
            self._differing += 1
            if len(self._faults) < MAX_FAULTS:
                self._faults.append(f"{conn}: order book at sid {frame.sid} seq {frame.seq}: {fault}")

    def _take_old(self, subscription: _Subscription, frame: Any, line: bytes) -> str | None:
        try:
            fault: str | None = subscription.books.take(frame, parse_record(line).wire)
        except ValueError:
            subscription.books.forget()
            return None
        return fault
