"""The archiver: takes a day's batches from the stream and puts them into segments in the object store.

    python -m ssmd_dagster.capture.archiver ENV DATE

It keeps nothing of its own: what it still has to do is what the stream holds and the footers of the day's segments do not
name. Segments are created only, never overwritten; one that exists already with the same SHA-256 is a success, with another
one it is adopted and everything is worked out again. What was put is read back and compared.

A full disk, a store that refuses or does not answer, a log with a hole: the archiver stands still in state `error`, says why
in its heartbeat, and tries again with growing pauses until it can go on. Nothing is lost meanwhile: the stream and the spool
hold it. Not here: whether the day is whole (`workflows/verify`).
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import os
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil

from ssmd_dagster.archive.batch import (
    MAX_HEADER_BYTES,
    Batch,
    BatchDamagedError,
    Footer,
    SegmentFooter,
    read_last,
)
from ssmd_dagster.archive.layout import FILE_OF_CHANNEL, day_prefix, parse_segment_key, segment_key
from ssmd_dagster.archive.segment import (
    CLOSE_AFTER_S,
    CLOSE_AT_BYTES,
    Ranges,
    SegmentWriter,
    add_range,
    in_ranges,
)
from ssmd_dagster.capture.control import control_subject, serve
from ssmd_dagster.capture.process import Heartbeat, cancel, connected, current_epoch, run, wait_any
from ssmd_dagster.capture.setting import Setting, load_setting
from ssmd_dagster.crash_points import reached
from ssmd_dagster.environments.home import segments_dir
from ssmd_dagster.errors import ExitCode, RefusedError, SsmdError, UnreachableError
from ssmd_dagster.exchange import SESSION
from ssmd_dagster.stores.cache import DayStats
from ssmd_dagster.stores.connect import Stores
from ssmd_dagster.stores.daybook import DayBook
from ssmd_dagster.stores.objects import ObjectExistsError, ObjectStore, StorageError
from ssmd_dagster.stores.stream import RawBatch, RawConsumer

COMPONENT = "archiver"
STATS_EVERY_S = 2.0
FETCH_TIMEOUT_S = 0.2
RETRY_MIN_S, RETRY_MAX_S = 0.5, 30.0
SCAN_FOOTER_BYTES = 64 << 10
PROBE_BYTES = 1 << 20
"""What the local disk must take before the archiver relies on it (again)."""

_log = logging.getLogger(__name__)


class _WorkOutAgainError(Exception):
    """Another archiver has extended a channel: what is missing has to be worked out anew."""


class Channel:
    """One channel's log: what its segments in the store hold, and the segment that grows."""

    def __init__(self) -> None:
        self.next_number = 0
        self.last_key: str | None = None
        self.last_sha256: str | None = None
        self.stored: Ranges = {}
        self.writer: SegmentWriter | None = None
        self.opened = 0.0
        self.created = False
        """The store said that it has created the writer's object."""


class Archiver:
    """Archives one day of one environment until told to stop."""

    def __init__(self, setting: Setting, stores: Stores, date: str, epoch: int) -> None:
        self._setting, self._stores, self._date, self._epoch = setting, stores, date, epoch
        self._env = setting.env.name
        self._feed = setting.env.feed
        self._folder = segments_dir(setting.home, self._env, date)
        self._local = self._folder / str(os.getpid())
        self._delay_s = RETRY_MIN_S
        self._channels: dict[str, Channel] = {}
        self._book = DayBook(self._env, stores.journal, stores.cache, setting.clock, f"capture:{COMPONENT}")
        self._consumer: RawConsumer | None = None
        self._untaken: list[RawBatch] = []
        self._flush_wanted = asyncio.Event()
        self._flush_to_go: int | None = None
        self._state = "starting"
        self._since_ns = setting.clock()
        self._passed_over = 0
        self._error: str | None = None
        self._exit_code: int | None = None
        self._messages, self._bytes, self._last_message_ns = 0, 0, 0
        self._by_channel: dict[str, int] = {}
        self._heartbeat = Heartbeat(stores.cache, date, COMPONENT, epoch, self._status)

    async def run(self, stop: asyncio.Event) -> None:
        """Archive until `stop`; what is in no segment by then is built again from the stream by the next archiver.

        Raises `RefusedError` once another attempt holds the day; whatever else is in the way is waited for.
        """
        subject = control_subject(self._env, COMPONENT, self._date)
        service = await serve(self._stores.nc, subject, self._answer)
        background = [asyncio.create_task(self._heartbeat.run()), asyncio.create_task(self._write_stats())]
        try:
            while not stop.is_set():
                try:
                    self._make_folder()
                    await self._work_out()
                    await self._archive(stop)
                except _WorkOutAgainError:
                    continue
                except RefusedError as error:
                    self._state, self._error = "failed", str(error)
                    raise
                except (SsmdError, OSError) as error:
                    await self._stand_still(error, stop)
            self._state = "stopped"
        finally:
            self._discard_all()
            await cancel(*background)
            await service.unsubscribe()
            await self._heartbeat.beat()

    async def _stand_still(self, error: SsmdError | OSError, stop: asyncio.Event) -> None:
        """Say what is in the way and wait; the next attempt begins after twice the time."""
        told = _of_disk(error, self._folder) if isinstance(error, OSError) else error
        self._state, self._error = "error", str(told)
        self._exit_code = None if told.transient else int(told.exit_code)
        _log.error("%s; trying again in %.1f s", told, self._delay_s)
        self._discard_all()
        await self._heartbeat.beat()
        await wait_any(stop.wait(), timeout_s=self._delay_s)
        self._delay_s = min(self._delay_s * 2, RETRY_MAX_S)

    def _go_on(self) -> None:
        self._state, self._error, self._exit_code = "archiving", None, None

    def _discard_all(self) -> None:
        """Remove every local file; a disk that fails here has been told of already, or is seen by the next attempt."""
        for channel in self._channels.values():
            if channel.writer is not None:
                channel.writer.discard()
                channel.writer = None
        shutil.rmtree(self._local, ignore_errors=True)

    def _make_folder(self) -> None:
        """Make a folder for this process alone and see that it takes something; remove what killed ones left.

        That is segments that are built again anyway.
        """
        self._discard_all()
        self._folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        for left in self._folder.glob("*-*/"):
            pid = left.name.split("-")[0]
            if not (pid.isdigit() and psutil.pid_exists(int(pid))):
                shutil.rmtree(left)
        self._local = Path(tempfile.mkdtemp(prefix=f"{os.getpid()}-", dir=self._folder))
        probe = self._local / "probe"
        probe.write_bytes(bytes(PROBE_BYTES))
        probe.unlink()

    async def _work_out(self) -> None:
        """Learn from the footers of the day's segments what is archived, and start from nothing else."""
        self._channels = {name: Channel() for name in FILE_OF_CHANNEL}
        self._messages, self._bytes, self._by_channel, self._passed_over = 0, 0, {}, 0
        segments = sorted(
            (*parsed, info.key)
            for info in await self._stores.raw.list(day_prefix(self._feed, self._date))
            if (parsed := parse_segment_key(info.key)) is not None
        )
        for name, number, key in segments:
            channel = self._channels[name]
            if number != channel.next_number:
                raise SsmdError(
                    f"the segments of `{name}` have a hole: number {channel.next_number} is missing",
                    where=self._stores.raw.url(key),
                    do="Put that object back, or move the later ones of its channel away too, and all are made again from the "
                    "stream; nothing is archived until then.",
                )
            footer = await read_footer(self._stores.raw, key)
            channel.next_number, channel.last_key = number + 1, key
            for conn, ranges in footer.ranges.items():
                for first, last in ranges:
                    add_range(channel.stored, conn, first, last)
            self._count(name, footer.records, 0, 0)

    async def _archive(self, stop: asyncio.Event) -> None:
        if self._flush_to_go is not None:  # it was being carried out when another archiver came in between
            self._flush_to_go = None
            self._flush_wanted.set()
        async with self._stores.raw_stream.consume(self._date) as consumer:
            self._consumer = consumer
            self._go_on()
            await self._heartbeat.beat()
            try:
                while not stop.is_set():
                    await self._archive_some(consumer, stop)
            finally:
                self._consumer = None
                self._untaken = []

    async def _archive_some(self, consumer: RawConsumer, stop: asyncio.Event) -> None:
        """Take the next batches and store what is full; a flush stores all once everything published before it is taken."""
        self._untaken = await consumer.fetch(FETCH_TIMEOUT_S)
        if self._flush_wanted.is_set() or (self._flush_to_go is not None and not self._untaken):
            try:
                self._flush_to_go = await consumer.backlog() + len(self._untaken)
            except UnreachableError as error:
                _log.warning("%s; the flush waits", error)
            else:
                self._flush_wanted.clear()
        for batch in self._untaken:
            await self._take(batch)
            await self._store_full_segments(stop, flushing=False)
        if self._flush_to_go is not None:
            self._flush_to_go -= len(self._untaken)
        self._untaken = []
        flushing = self._flush_to_go is not None and self._flush_to_go <= 0
        await self._store_full_segments(stop, flushing=flushing)
        if flushing:
            self._flush_to_go = None

    async def _store_full_segments(self, stop: asyncio.Event, *, flushing: bool) -> None:
        for name, channel in self._channels.items():
            writer = channel.writer
            if writer is not None and (
                writer.size_bytes + writer.waiting_bytes >= CLOSE_AT_BYTES
                or time.monotonic() - channel.opened >= CLOSE_AFTER_S
                or flushing
            ):
                await self._store_segment(name, channel, stop)

    async def _take(self, message: RawBatch) -> None:
        """Put one batch into its channel's open segment, unless it is archived already."""
        batch = read_last(message.data)
        if not isinstance(batch, Batch) or batch.start != 0:
            self._pass_over(message, "is no batch")
            return
        header = batch.header
        if (header.env, header.day, header.channel) != (self._env, message.date, message.id.channel) or (
            header.channel not in self._channels or (header.conn, header.batch) != (message.id.conn, message.id.batch)
        ):
            self._pass_over(message, f"holds {header.env} {header.day} {header.conn}/{header.channel}/{header.batch}")
            return
        channel = self._channels[header.channel]
        if in_ranges(channel.stored, header.conn, header.batch):
            return
        if channel.writer is None:
            if channel.last_sha256 is None and channel.last_key is not None:
                channel.last_sha256 = await sha256_of(self._stores.raw, channel.last_key)
            path = (
                self._local
                / segment_key(self._feed, self._date, header.channel, channel.next_number).rsplit("/", 1)[-1]
            )
            channel.opened = time.monotonic()
            channel.writer = SegmentWriter(
                path,
                env=self._env,
                day=self._date,
                channel=header.channel,
                number=channel.next_number,
                prev_sha256=channel.last_sha256,
            )
        if in_ranges(channel.writer.ranges, header.conn, header.batch):
            return
        reached("archiver.append.before")
        try:
            channel.writer.append(message.data, batch)
        except BatchDamagedError as error:
            self._pass_over(message, error.what)
            return
        reached("archiver.append.after")
        self._count(header.channel, header.records, header.bytes, header.recv_last_ns)

    def _pass_over(self, message: RawBatch, reason: str) -> None:
        """Go on without what nobody can read: its place stays open for a repaired copy, and verification names it."""
        self._passed_over += 1
        _log.error("stream message %d, %s, is passed over: %s", message.seq, message.id, reason)

    def _count(self, channel: str, records: int, size: int, recv_ns: int) -> None:
        if channel == SESSION:
            return
        self._messages += records
        self._bytes += size
        self._by_channel[channel] = self._by_channel.get(channel, 0) + records
        self._last_message_ns = max(recv_ns, self._last_message_ns)

    async def _store_segment(self, name: str, channel: Channel, stop: asyncio.Event) -> None:
        """Close the open segment and create it in the store, for as long as it takes."""
        writer = channel.writer
        assert writer is not None
        reached("archiver.close.before")
        footer = await asyncio.to_thread(writer.close, self._epoch)
        reached("archiver.close.after")
        key = segment_key(self._feed, self._date, name, writer.number)
        while True:
            try:
                await self._check_epoch()
                await self._put(key, channel, writer)
                break
            except RefusedError:
                raise
            except SsmdError as error:
                # The file is whole: only the store is asked again, not everything.
                self._state, self._error = "error", str(error)
                self._exit_code = None if error.transient else int(error.exit_code)
                _log.error("%s; trying again in %.1f s", error, self._delay_s)
                await wait_any(stop.wait(), timeout_s=self._delay_s)
                if stop.is_set():
                    raise
                self._delay_s = min(self._delay_s * 2, RETRY_MAX_S)
        self._go_on()
        self._delay_s = RETRY_MIN_S
        reached("archiver.stored.before")
        for conn, ranges in footer.ranges.items():
            for first, last in ranges:
                add_range(channel.stored, conn, first, last)
        channel.next_number += 1
        channel.last_key, channel.last_sha256 = key, writer.sha256
        channel.writer, channel.created = None, False
        writer.path.unlink()
        reached("archiver.stored.after")
        _log.info("archived %s: %d records in %d bytes", key, footer.records, writer.size_bytes)

    async def _put(self, key: str, channel: Channel, writer: SegmentWriter) -> None:
        """Create a segment's object and read it back; return once the store is seen to hold exactly this segment."""
        try:
            await self._stores.raw.create(key, writer.path)
            channel.created = True
        except ObjectExistsError:
            pass  # whose it is, the comparison says; a put of ours whose answer was lost is as good as any
        reached("archiver.put.after")
        if await sha256_of(self._stores.raw, key) == writer.sha256:
            return
        if channel.created:
            raise StorageError(
                "the store does not give back what was put",
                where=self._stores.raw.url(key),
                do="Move that object away; the archiver then puts it again.",
            )
        _log.warning("%s was created by another archiver; working out again what is missing", key)
        raise _WorkOutAgainError

    async def _check_epoch(self) -> None:
        """Refuse to extend a channel in an epoch that is not, or no longer, the day's."""
        day = await self._book.day(self._date)
        if day is None or day.epoch != self._epoch:
            self._error = f"epoch {self._epoch} does not hold the day any more"
            raise RefusedError(self._error, where=f"{self._env} {self._date}")

    async def _answer(self, command: str, arguments: dict[str, Any]) -> dict[str, Any]:
        if command == "flush":
            self._flush_wanted.set()
        elif command != "status":
            raise SsmdError(f"unknown command `{command}`")
        backlog = await self._consumer.backlog() if self._consumer is not None else None
        return {**self._status(), "backlog": None if backlog is None else backlog + len(self._untaken)}

    async def _write_stats(self) -> None:
        while True:
            await asyncio.sleep(STATS_EVERY_S)
            try:
                await self._stores.cache.put_stats(self._date, self._stats_now())
            except SsmdError as error:
                _log.warning("stats not written: %s", error)

    def _stats_now(self) -> DayStats:
        day = self._book.book.days.get(self._date)
        lag_ns = self._setting.clock() - self._last_message_ns if self._last_message_ns else 0
        return DayStats(
            messages=self._messages,
            gaps=len(day.gaps) if day is not None else 0,
            bytes=self._bytes,
            by_channel=dict(self._by_channel),
            last_message_ns=self._last_message_ns,
            lag_ms=round(lag_ns / 1e6, 3),
        )

    def _status(self) -> dict[str, Any]:
        writers = [channel.writer for channel in self._channels.values() if channel.writer is not None]
        return {
            "state": self._state,
            "error": self._error,
            "exit_code": self._exit_code,
            "at_ns": self._setting.clock(),
            "since_ns": self._since_ns,
            "untaken": len(self._untaken),
            "open_batches": sum(writer.batches for writer in writers),
            "flushing": self._flush_wanted.is_set() or self._flush_to_go is not None,
            "passed_over": self._passed_over,
            "messages": self._messages,
        }


def _of_disk(error: OSError, folder: Path) -> StorageError:
    return StorageError(
        f"the local disk takes nothing: {error.strerror or error}",
        where=str(error.filename or folder),
        do="Make room; the archiver goes on by itself.",
    )


async def sha256_of(store: ObjectStore, key: str) -> str:
    """Read an object and return the SHA-256 (hex) of its bytes."""
    digest = hashlib.sha256()
    async for chunk in store.stream(key):
        digest.update(chunk)
    return digest.hexdigest()


async def read_footer(store: ObjectStore, key: str) -> SegmentFooter:
    """Read a segment's footer from the end of its object; an object without one was not written by an archiver."""
    size = await store.head(key)
    for tail in (SCAN_FOOTER_BYTES, MAX_HEADER_BYTES + SCAN_FOOTER_BYTES):
        start = max(0, size - tail)
        data = await store.get_range(key, start, size - start) if size else b""
        last = read_last(data)
        if isinstance(last, Footer):
            return last.footer
    raise SsmdError(
        "a segment without a footer",
        where=store.url(key),
        do="It was cut or is not ours: move it away, or restore it, before the day is archived.",
    )


async def main(env_name: str, date: str, stop: asyncio.Event) -> None:
    """Run one archiver, in the epoch that holds the day now, until `stop` is set."""
    setting = load_setting(env_name)
    async with connected(setting, COMPONENT) as stores:
        epoch = await current_epoch(setting, stores, date, COMPONENT)
        await Archiver(setting, stores, date, epoch).run(stop)


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(int(ExitCode.USAGE))
    run(lambda stop: main(sys.argv[1], sys.argv[2], stop))
