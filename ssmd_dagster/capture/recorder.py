"""What becomes of the frames of one connection: ordinals, lines, channels and flushes. No I/O here.

The recorder is the connection's `FrameSink`. It numbers every record over all channels without a hole, gathers lines by
channel, and hands all channels over together, as a `Flush`, when one is full or the connector's linger timer asks.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import msgspec

from ssmd_dagster.archive.batch import BatchHeader, encode_batch, seq_spans
from ssmd_dagster.archive.intervals import Interval
from ssmd_dagster.archive.records import note_line, parse_record, payload_of, wire_line
from ssmd_dagster.capture.sequence import Arrival, Hole, Sequences
from ssmd_dagster.clock import Clock
from ssmd_dagster.day.payloads import ChannelCount
from ssmd_dagster.exchange import OTHER, SESSION, Envelope, ExchangeEvent

MAX_BATCH_RECORDS = 1_000
MAX_BATCH_BYTES = 4 << 20
MAX_FRAME_BYTES = 64 << 20
"""A larger frame is not recorded; a note with its size and SHA-256 stands in its place."""


_decode_envelope = msgspec.json.Decoder(Envelope).decode


class Unsealed(msgspec.Struct, frozen=True):
    """One batch before it is compressed: everything of its header but what needs the bytes."""

    channel: str
    batch: int
    records: int
    n_first: int
    n_last: int
    recv_first_ns: int
    recv_last_ns: int
    seqs: dict[int, list[int]]
    block: bytes


Flush = list[Unsealed]
"""The batches of all channels that had records, flushed together."""


class Origin(msgspec.Struct, frozen=True, kw_only=True):
    """Whose records these are; the same for every batch of a connection."""

    env: str
    day: str
    epoch: int
    conn: str


def seal(origin: Origin, unsealed: Unsealed) -> bytes:
    """Return the encoded batch; pure, for the thread that also writes it."""
    header = BatchHeader(
        v=1,
        env=origin.env,
        day=origin.day,
        epoch=origin.epoch,
        conn=origin.conn,
        channel=unsealed.channel,
        batch=unsealed.batch,
        records=unsealed.records,
        n_first=unsealed.n_first,
        n_last=unsealed.n_last,
        recv_first_ns=unsealed.recv_first_ns,
        recv_last_ns=unsealed.recv_last_ns,
        bytes=len(unsealed.block),
        sha256=hashlib.sha256(unsealed.block).hexdigest(),
        seq=seq_spans(unsealed.seqs),
    )
    return encode_batch(header, unsealed.block)


class _Buffer:
    """The lines of one channel since the last flush, and the running interval."""

    __slots__ = (
        "batch",
        "bytes_out",
        "channel",
        "interval",
        "interval_first",
        "interval_records",
        "lines",
        "n_first",
        "n_last",
        "n_out",
        "records_out",
        "recv_first_ns",
        "recv_last_ns",
        "seqs",
        "size",
    )

    def __init__(self, channel: str) -> None:
        self.channel = channel
        self.batch = 0
        self.lines: list[bytes] = []
        self.size = 0
        self.n_first = self.n_last = 0
        self.recv_first_ns = self.recv_last_ns = 0
        self.seqs: dict[int, list[int]] = {}
        self.interval = hashlib.sha256()
        self.interval_first: int | None = None
        self.interval_records = 0
        self.records_out = self.bytes_out = 0
        self.n_out = 0


class Recorder:
    """The `FrameSink` of one connection's life.

    `on_flush` is called on the event loop with every flush, in order, and `on_end` once, when the socket is gone and the
    last flush has been handed over. `on_event` is told what frames mean for the subscriptions, `on_hole` of numbers that did
    not come (and again, should they all have come late), `on_oversized` of the time and channel of a frame that was not kept.
    Counters are plain attributes for the heartbeat.
    """

    def __init__(
        self,
        origin: Origin,
        *,
        channel_of_type: Mapping[str, str],
        clock: Clock,
        on_flush: Callable[[Flush], None],
        on_end: Callable[[str], None],
        on_event: Callable[[int, ExchangeEvent], None] | None = None,
        on_hole: Callable[[Hole], None] | None = None,
        on_oversized: Callable[[int, str], None] | None = None,
    ) -> None:
        self.origin = origin
        self.n = 0
        self.frames = 0
        self.bytes = 0
        self.odd_frames = 0
        self.by_channel: dict[str, int] = {}
        self.last_frame_ns: int | None = None
        self.signs_of_life = 0
        self.ended: str | None = None
        self._channel_of_type = channel_of_type
        self._clock = clock
        self._on_flush = on_flush
        self._on_end = on_end
        self._on_event = on_event
        self._on_hole = on_hole
        self._on_oversized = on_oversized
        self.sequences = Sequences()
        self._buffers: dict[str, _Buffer] = {}

    def on_frame(self, recv_ns: int, payload: bytes, envelope: Envelope | None) -> None:
        """Record one frame as it came."""
        self.frames += 1
        self.bytes += len(payload)
        self.last_frame_ns = recv_ns
        if envelope is None:
            self.odd_frames += 1
            channel, sid, seq = OTHER, None, None
        else:
            channel, sid, seq = self._channel_of_type.get(envelope.type, OTHER), envelope.sid, envelope.seq
        if len(payload) > MAX_FRAME_BYTES:
            sha256 = hashlib.sha256(payload).hexdigest()
            self.note({"event": "oversized", "channel": channel, "bytes": len(payload), "sha256": sha256})
            if self._on_oversized is not None:
                self._on_oversized(recv_ns, channel)
            return
        line = wire_line(self.n, recv_ns, payload, checked=envelope is not None)
        self._add(channel, recv_ns, line, sid, seq)

    def on_ping(self, recv_ns: int) -> None:
        """Take note of a sign of life; it is no record."""
        self.signs_of_life += 1

    def on_event(self, recv_ns: int, event: ExchangeEvent) -> None:
        """Hand on what a frame means for the connection's subscriptions."""
        if self._on_event is not None:
            self._on_event(recv_ns, event)

    def on_closed(self, recv_ns: int, reason: str) -> None:
        """Record that the socket is gone, with the last interval notes, and hand over what is left."""
        self.flush()
        self._tell_holes(at_once=True)
        self.note({"event": "disconnected", "reason": reason})
        self.note_interval()
        self.ended = reason
        self._on_end(reason)

    def note(self, note: dict[str, Any]) -> None:
        """Record something that the recorder itself has to say, in the channel `session`.

        Not once the connection has ended: its last record is the interval note about `session`.
        """
        assert self.ended is None, f"{self.origin.conn} has ended: {note}"
        now_ns = self._clock()
        self._add(SESSION, now_ns, note_line(self.n, now_ns, note), None, None)

    def note_if_open(self, note: dict[str, Any]) -> bool:
        """Record a note unless the connection has ended; tell whether it was recorded."""
        if self.ended is None:
            self.note(note)
        return self.ended is None

    def note_interval(self) -> None:
        """Flush, and record per channel what came since the last such note: `[n_first, n_last]`, count and SHA-256.

        The note about `session` itself is the last, so that of a connection's records only that one note is in no
        interval. Nothing happens once the connection has ended.
        """
        if self.ended is not None:
            return
        self.flush()
        channels = sorted(self._buffers, key=lambda name: (name == SESSION, name))
        for channel in channels:
            if channel == SESSION:
                self.flush()
            buffer = self._buffers[channel]
            if buffer.interval_first is None:
                continue
            interval = Interval(
                channel,
                buffer.interval_first,
                buffer.n_last,
                buffer.interval_records,
                buffer.interval.hexdigest(),
            )
            buffer.interval, buffer.interval_first, buffer.interval_records = hashlib.sha256(), None, 0
            self.note(interval.note())
        self.flush()

    def tick(self) -> None:
        """Flush, and tell of what is missing in the sequences by now."""
        self.flush()
        self._tell_holes()

    def expect(self, sid: int, now_ns: int) -> None:
        """Say that a subscription has begun, asked for at `now_ns`: its first number is 1."""
        self.sequences.expect(sid, now_ns)

    def forget(self, sid: int, channel: str) -> int | None:
        """Count a subscription's sequence as over; the exchange may use its number again. Return when it was heard last.

        Frames without a number are heard too: whatever came in its `channel`.
        """
        self.flush()
        self._tell_holes(at_once=True)
        heard_ns = self.sequences.forget(sid)
        buffer = self._buffers.get(channel)
        return heard_ns if heard_ns is None or buffer is None else max(heard_ns, buffer.recv_last_ns)

    def counts(self) -> dict[str, ChannelCount]:
        """Return what has been handed over so far, by channel."""
        return {
            channel: ChannelCount(
                records=buffer.records_out, batches=buffer.batch, bytes=buffer.bytes_out, last_n=buffer.n_out
            )
            for channel, buffer in self._buffers.items()
            if buffer.batch
        }

    def _track(self, flush: Flush) -> None:
        """Follow the sequences. A sid's numbers can lie in several channels; mostly they lie in one and follow each other."""
        of_sid: dict[int, list[Unsealed]] = {}
        for unsealed in flush:
            for sid in unsealed.seqs:
                of_sid.setdefault(sid, []).append(unsealed)
        for sid, parts in of_sid.items():
            only = parts[0]
            # With two sids in one batch its last frame may be the other's: a hole begins rather too early than too late.
            last_ns = only.recv_last_ns if len(only.seqs) == 1 else only.recv_first_ns
            if len(parts) > 1 or not self.sequences.in_order(sid, only.seqs[sid], last_ns):
                self.sequences.feed(sid, arrivals(sid, parts))

    def _tell_holes(self, *, at_once: bool = False) -> None:
        for hole in (*self.sequences.due(at_once=at_once), *self.sequences.healed_holes()):
            if self._on_hole is not None:
                self._on_hole(hole)

    def _add(self, channel: str, recv_ns: int, line: bytes, sid: int | None, seq: int | None) -> None:
        buffer = self._buffers.get(channel)
        if buffer is None:
            buffer = self._buffers[channel] = _Buffer(channel)
        size = buffer.size + len(line)
        if size > MAX_BATCH_BYTES and buffer.lines:
            self.flush()
            size = len(line)
        n = self.n
        self.n = n + 1
        lines = buffer.lines
        if not lines:
            buffer.n_first, buffer.recv_first_ns = n, recv_ns
        lines.append(line)
        buffer.size = size
        buffer.n_last, buffer.recv_last_ns = n, recv_ns
        if seq is not None and sid is not None:
            seqs = buffer.seqs.get(sid)
            if seqs is None:
                buffer.seqs[sid] = [seq]
            else:
                seqs.append(seq)
        if len(lines) >= MAX_BATCH_RECORDS or size >= MAX_BATCH_BYTES:
            self.flush()

    def flush(self) -> None:
        """Hand over what all channels hold; nothing happens where there is nothing."""
        flush: Flush = []
        for channel, buffer in self._buffers.items():
            if not buffer.lines:
                continue
            block = b"".join(buffer.lines)
            records = len(buffer.lines)
            flush.append(
                Unsealed(
                    channel,
                    buffer.batch,
                    records,
                    buffer.n_first,
                    buffer.n_last,
                    buffer.recv_first_ns,
                    buffer.recv_last_ns,
                    buffer.seqs,
                    block,
                )
            )
            buffer.interval.update(block)
            if buffer.interval_first is None:
                buffer.interval_first = buffer.n_first
            buffer.interval_records += records
            buffer.records_out += records
            buffer.bytes_out += len(block)
            buffer.n_out = buffer.n_last
            self.by_channel[channel] = self.by_channel.get(channel, 0) + records
            buffer.batch += 1
            buffer.lines, buffer.size, buffer.seqs = [], 0, {}
        if flush:
            self._on_flush(flush)
            self._track(flush)


def arrivals(sid: int, parts: Iterable[Unsealed]) -> Iterator[Arrival]:
    """Yield the numbers of a sid in the order in which they came, read back from the records."""
    found: list[tuple[int, Arrival]] = []
    for part in parts:
        for line in part.block.splitlines():
            record = parse_record(line)
            payload = payload_of(record)
            if payload is None:
                continue
            try:
                envelope = _decode_envelope(payload)
            except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
                continue
            if envelope.sid == sid and envelope.seq is not None:
                found.append((record.n, Arrival(envelope.seq, record.recv_ns)))
    found.sort(key=lambda item: item[0])
    return (arrival for _, arrival in found)
