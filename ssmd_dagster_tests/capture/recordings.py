"""Recordings for tests: frames through a real recorder, as flushes, as spool files and as the segments of a day."""

from __future__ import annotations

import asyncio
import json
import random
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import msgspec

from ssmd_dagster.archive.batch import Batch, read_last
from ssmd_dagster.archive.layout import segment_key
from ssmd_dagster.archive.readback import DayReadback, Readback, See
from ssmd_dagster.archive.segment import SegmentWriter
from ssmd_dagster.capture.recorder import Flush, Origin, Recorder, seal
from ssmd_dagster.capture.spool import read_spool
from ssmd_dagster.exchange import SESSION, Envelope

DATE = "2025-12-14"
FEED = "kalshi"
CHANNEL_OF_TYPE = {"trade": "trade", "ticker": "ticker", "orderbook_delta": "orderbook_delta", "subscribed": SESSION}
START_NS = 1_765_670_400_000_000_000


class TickingClock:
    """A clock that moves on by a millisecond whenever it is read."""

    def __init__(self, now_ns: int = START_NS) -> None:
        self.now_ns = now_ns

    def __call__(self) -> int:
        """Return nanoseconds since the epoch."""
        self.now_ns += 1_000_000
        return self.now_ns


class Recording:
    """One connection's recorder, whose flushes are kept."""

    def __init__(
        self,
        conn: str = "812-a-0",
        *,
        env: str = "kalshi-sim",
        date: str = DATE,
        on_flush: Callable[[Flush], None] | None = None,
        clock: TickingClock | None = None,
    ) -> None:
        self.origin = Origin(env=env, day=date, epoch=int(conn.split("-")[0]), conn=conn)
        self.clock = clock or TickingClock()
        self.flushes: list[Flush] = []
        self.payloads: list[bytes] = []
        self.ended: list[str] = []
        self.recorder = Recorder(
            self.origin,
            channel_of_type=CHANNEL_OF_TYPE,
            clock=self.clock,
            on_flush=on_flush or self.flushes.append,
            on_end=self.ended.append,
        )

    def frame(self, type: str, *, sid: int = 1, seq: int | None = None, ticker: str = "KX-1", pad: str = "") -> bytes:
        """Record a frame of a message type."""
        message: dict[str, Any] = {"type": type, "sid": sid, "msg": {"market_ticker": ticker, "pad": pad}}
        if seq is not None:
            message["seq"] = seq
        return self.raw(json.dumps(message).encode())

    def raw(self, payload: bytes) -> bytes:
        """Record a frame as the socket would hand it over."""
        try:
            payload.decode()
            envelope = msgspec.json.decode(payload, type=Envelope)
        except (msgspec.DecodeError, UnicodeDecodeError):
            envelope = None
        self.payloads.append(payload)
        self.recorder.on_frame(self.clock(), payload, envelope)
        return payload

    def begin(self) -> None:
        """Record what a connector notes once it has subscribed."""
        self.recorder.note({"event": "connected"})
        self.recorder.note({"event": "subscribed", "sids": {}})

    def end(self, *, told: bool = True) -> None:
        """Record the end: `told` to stop, or because the connection was lost."""
        if told:
            self.recorder.note({"event": "stopping"})
        self.recorder.on_closed(self.clock(), "closed by this side")

    def batches(self) -> list[bytes]:
        """Return every encoded batch, in the order of the spool."""
        return [seal(self.origin, unsealed) for flush in self.flushes for unsealed in flush]

    def write(self, directory: Path) -> Path:
        """Write the flushes as a spool file."""
        directory.mkdir(parents=True, exist_ok=True)
        path = directory / f"{self.origin.conn}.batches"
        path.write_bytes(b"".join(self.batches()))
        return path


def a_recording(
    conn: str = "812-a-0", *, seed: int = 0, frames: int = 120, end: bool = True, **where: Any
) -> Recording:
    """Return a recording of mixed frames with flushes and interval notes at random places."""
    rng = random.Random(f"{conn} {seed}")
    recording = Recording(conn, **where)
    recording.begin()
    numbers: Counter[str] = Counter()
    for _ in range(frames):
        kind = rng.choice(["trade", "trade", "ticker", "orderbook_delta", "unheard_of"])
        numbers[kind] += 1
        recording.frame(
            kind, sid=len(kind), seq=numbers[kind], ticker=f"KX-{rng.randrange(3)}", pad="x" * rng.randrange(60)
        )
        chance = rng.random()
        if chance < 0.1:
            recording.recorder.flush()
        elif chance < 0.13:
            recording.recorder.note_interval()
    recording.recorder.flush()
    if end:
        recording.end()
    return recording


def header_of(encoded: bytes) -> Batch:
    """Return an encoded batch as it is found at the end of its own bytes."""
    batch = read_last(encoded)
    assert isinstance(batch, Batch)
    return batch


Segments = dict[str, tuple[str, int, bytes]]
"""Per key: channel, number and bytes."""


def build_segments(
    folder: Path, encoded: Sequence[bytes], *, env: str = "kalshi-sim", date: str = DATE, per_segment: int = 10_000
) -> Segments:
    """Put batches, in this order, into segments of at most `per_segment` batches, as an archiver does."""
    by_channel: dict[str, list[bytes]] = {}
    for data in encoded:
        by_channel.setdefault(header_of(data).header.channel, []).append(data)
    segments: Segments = {}
    for channel, batches in by_channel.items():
        before = None
        for number, start in enumerate(range(0, len(batches), per_segment)):
            key = segment_key(FEED, date, channel, number)
            writer = SegmentWriter(
                folder / key.rsplit("/", 1)[-1], env=env, day=date, channel=channel, number=number, prev_sha256=before
            )
            for data in batches[start : start + per_segment]:
                writer.append(data, header_of(data))
            writer.close(epoch=812)
            before = writer.sha256
            segments[key] = (channel, number, writer.path.read_bytes())
    return segments


def read_segments(segments: Segments, *, env: str = "kalshi-sim", date: str = DATE, see: See | None = None) -> Readback:
    """Read a day back as `workflows.reading` does."""
    readback = DayReadback(env, date, see=see)
    for key, (channel, number, data) in sorted(segments.items(), key=lambda item: (item[1][0] != SESSION, item[0])):
        readback.feed(key, channel, number, data)
    return readback.finish(lambda key, start, length: segments[key][2][start : start + length])


def spooled_batches(*paths: Path) -> list[bytes]:
    """Return every whole batch of spool files."""
    return [encoded for path in paths for _, encoded in read_spool(path)]


async def eventually(condition: Callable[[], Any], timeout_s: float = 20.0) -> None:
    """Return once `condition` holds; fail after `timeout_s`."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, f"not so within {timeout_s} s: {condition}"
        await asyncio.sleep(0.01)
