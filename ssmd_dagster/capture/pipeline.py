"""From a flush to a durable acknowledgement: seal, fsync to the spool, publish in order, wait for the stream.

One pipeline belongs to one connection. When the stream is away, batches stay in the spool and are read from it again once
the stream is back, so memory is bounded by `HELD_BYTES` whatever the outage. Not here: what is in a batch.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import msgspec

from ssmd_dagster.capture.recorder import Flush, Origin, seal
from ssmd_dagster.capture.spool import SpoolWriter
from ssmd_dagster.errors import SsmdError

IN_FLIGHT = 32
"""Batches published and not acknowledged yet, at most."""
HELD_BYTES = 32 << 20
"""Encoded batches kept in memory while they wait for their acknowledgement; the rest is read from the spool again."""
RETRY_AFTER_S = 0.5

_log = logging.getLogger(__name__)


class SealedBatch(msgspec.Struct):
    """One batch in the spool: where it lies, and its bytes while they are held."""

    channel: str
    batch: int
    records: int
    offset: int
    size: int
    data: bytes | None


Publish = Callable[[str, str, int, int, bytes], Awaitable["asyncio.Future[int]"]]
"""`publish(conn, channel, batch, records, data)`: hands a batch over, in the order of the calls, and returns the future
acknowledgement. Both raise an `SsmdError` where the stream does not answer."""


class Pipeline:
    """Carries the flushes of one connection to the spool and to the stream, in order."""

    def __init__(
        self,
        origin: Origin,
        spool_directory: Path,
        publish: Publish,
        executor: ThreadPoolExecutor,
        *,
        on_disk_error: Callable[[OSError], None],
    ) -> None:
        self.origin = origin
        self.acked_batches = 0
        self.unacked_bytes = 0
        self._directory = spool_directory
        self._publish = publish
        self._executor = executor
        self._on_disk_error = on_disk_error
        self._spool: SpoolWriter | None = None
        self._flushes: asyncio.Queue[Flush | None] = asyncio.Queue()
        self._unacked: deque[SealedBatch] = deque()
        self._held_bytes = 0
        self._more = asyncio.Event()
        self._sealed_all = False
        self._sealer = asyncio.create_task(self._seal_all())
        self._publisher = asyncio.create_task(self._publish_all())

    @property
    def unacked_batches(self) -> int:
        """Return how many batches are in the spool and not acknowledged by the stream."""
        return len(self._unacked)

    def submit(self, flush: Flush) -> None:
        """Take a flush; returns at once. The queue is short-lived: sealing outruns any socket."""
        self._flushes.put_nowait(flush)

    async def close(self, timeout_s: float) -> bool:
        """Seal what was submitted, then wait up to `timeout_s` for the acknowledgements; tell whether all came.

        What is not acknowledged by then stays in the spool, and the day's audit publishes it.
        """
        self._flushes.put_nowait(None)
        await self._sealer
        try:
            await asyncio.wait_for(asyncio.shield(self._publisher), timeout_s)
        except TimeoutError:
            self._publisher.cancel()
            await asyncio.gather(self._publisher, return_exceptions=True)
        if self._spool is not None:
            self._spool.close()
        return not self._unacked

    async def _seal_all(self) -> None:
        loop = asyncio.get_running_loop()
        while (flush := await self._flushes.get()) is not None:
            while True:
                try:
                    sealed = await loop.run_in_executor(self._executor, self._seal, flush)
                    break
                except OSError as error:
                    self._on_disk_error(error)
                    await asyncio.sleep(RETRY_AFTER_S)
            for batch in sealed:
                self.unacked_bytes += batch.size
                if self._held_bytes + batch.size <= HELD_BYTES:
                    self._held_bytes += batch.size
                else:
                    batch.data = None
                self._unacked.append(batch)
            self._more.set()
        self._sealed_all = True
        self._more.set()

    def _seal(self, flush: Flush) -> list[SealedBatch]:
        """Compress and write one flush with one fsync; runs in the executor's thread."""
        if self._spool is None:
            self._spool = SpoolWriter(self._directory, self.origin.conn)
        encoded = [seal(self.origin, unsealed) for unsealed in flush]
        offsets = self._spool.append(encoded)
        return [
            SealedBatch(unsealed.channel, unsealed.batch, unsealed.records, offset, len(data), data)
            for unsealed, offset, data in zip(flush, offsets, encoded, strict=True)
        ]

    async def _publish_all(self) -> None:
        """Keep up to `IN_FLIGHT` batches under way; after a failure everything from the failed one on is sent again."""
        window: deque[asyncio.Future[int]] = deque()
        while True:
            try:
                while len(window) < min(IN_FLIGHT, len(self._unacked)):
                    batch = self._unacked[len(window)]
                    data = batch.data if batch.data is not None else await asyncio.to_thread(self._read, batch)
                    window.append(
                        await self._publish(self.origin.conn, batch.channel, batch.batch, batch.records, data)
                    )
                if not window:
                    if self._sealed_all:
                        return
                    self._more.clear()
                    if not self._unacked and not self._sealed_all:
                        await self._more.wait()
                    continue
                await window[0]
            except SsmdError as error:
                _log.warning("stream does not take batches of %s: %s", self.origin.conn, error)
                await _abandon(window)
                await asyncio.sleep(RETRY_AFTER_S)
                continue
            except asyncio.CancelledError:
                await _abandon(window)
                raise
            window.popleft()
            done = self._unacked.popleft()
            self.acked_batches += 1
            self.unacked_bytes -= done.size
            if done.data is not None:
                self._held_bytes -= done.size

    def _read(self, batch: SealedBatch) -> bytes:
        with (self._directory / f"{self.origin.conn}.batches").open("rb") as file:
            file.seek(batch.offset)
            return file.read(batch.size)


async def _abandon(window: deque[asyncio.Future[int]]) -> None:
    for future in window:
        future.cancel()
    await asyncio.gather(*window, return_exceptions=True)
    window.clear()
