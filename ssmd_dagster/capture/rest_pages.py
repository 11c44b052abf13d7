"""Pages of an exchange's REST lists, recorded like frames: a connection of their own in spool, stream and archive.

Used by the repair of trades and by the replay of a missed day. Not here: which pages are asked for, and what they mean.
"""

from __future__ import annotations

import asyncio
from concurrent.futures import ThreadPoolExecutor
from types import TracebackType
from typing import Any, Self

from ssmd_dagster.capture.audit import count_connection
from ssmd_dagster.capture.pipeline import Pipeline
from ssmd_dagster.capture.recorder import Origin, Recorder
from ssmd_dagster.capture.setting import Setting
from ssmd_dagster.capture.spool import next_connection, spool_path
from ssmd_dagster.day.payloads import ChannelCount
from ssmd_dagster.environments.home import spool_dir
from ssmd_dagster.errors import UnreachableError
from ssmd_dagster.exchange import REST, Envelope
from ssmd_dagster.stores.connect import Stores

CHANNEL_OF_PAGE = {"rest_trades": REST, "rest_markets": REST}
"""Channel of every type of page."""
ROOM_BYTES = 32 << 20
"""Pages in memory that the disk has not taken, at most; `put` waits for room."""
TIMEOUT_S = 60.0
"""How long the disk may take nothing, and how long the stream may take over the last batches."""
_POLL_S = 0.05


class RestPages:
    """Records pages under a connection `{epoch}-rest-{k}` of a day; leaving the context waits until all is published.

    Where no page is put, nothing is recorded. Raises `UnreachableError` where the disk or the stream takes nothing for
    `timeout_s`; what is in the spool by then is published by the day's audit.
    """

    def __init__(
        self, setting: Setting, stores: Stores, date: str, epoch: int, *, timeout_s: float = TIMEOUT_S
    ) -> None:
        self._stores, self._date, self._clock, self._timeout_s = stores, date, setting.clock, timeout_s
        self._spool = spool_dir(setting.home, setting.env.name, date)
        self._origin = Origin(
            env=setting.env.name, day=date, epoch=epoch, conn=next_connection(self._spool, epoch, REST)
        )
        self._disk_error: OSError | None = None

    @property
    def conn(self) -> str:
        """Return the id of the connection that the pages are recorded under."""
        return self._origin.conn

    async def __aenter__(self) -> Self:
        """Begin; nothing is written before the first page."""
        self._executor = ThreadPoolExecutor(1, thread_name_prefix=REST)
        self._pipeline = Pipeline(self._origin, self._spool, self._publish, self._executor, on_disk=self._note_disk)
        self._recorder = Recorder(
            self._origin,
            channel_of_type=CHANNEL_OF_PAGE,
            clock=self._clock,
            on_flush=self._pipeline.submit,
            on_end=lambda _reason: None,
        )
        return self

    def note(self, note: dict[str, Any]) -> None:
        """Record something about the pages, in the channel `session`."""
        if self._recorder.n == 0:
            self._recorder.note({"event": "connected", "conn": self.conn})
        self._recorder.note(note)

    async def put(self, type_: str, msg: bytes) -> None:
        """Record one page: `type_` of `CHANNEL_OF_PAGE`, `msg` a JSON object on one line."""
        if type_ not in CHANNEL_OF_PAGE:
            raise ValueError(f"not a type of page: {type_}")
        await self._wait_for_room()
        if self._recorder.n == 0:
            self._recorder.note({"event": "connected", "conn": self.conn})
        self._recorder.on_frame(self._clock(), b'{"type":"%b","msg":%b}' % (type_.encode(), msg), Envelope(type=type_))
        self._recorder.flush()

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Write the interval notes, close the file, and wait until everything is acknowledged."""
        if self._recorder.n:
            self._recorder.on_closed(self._clock(), "done" if error is None else f"cut off: {error}")
        whole = False
        try:
            async with asyncio.timeout(2 * self._timeout_s):
                whole = await self._pipeline.close(self._timeout_s)
        except TimeoutError:
            pass  # told below
        finally:
            self._executor.shutdown(wait=False)
        if not whole and error is None:
            raise self._stuck(f"{self._pipeline.unacked_batches} batches are not acknowledged")

    async def counts(self) -> dict[str, ChannelCount]:
        """Return what the connection's spool file holds, by channel; after the end."""
        path = spool_path(self._spool, self.conn)
        return await asyncio.to_thread(count_connection, path) if path.exists() else {}

    async def _wait_for_room(self) -> None:
        try:
            async with asyncio.timeout(self._timeout_s):
                while self._pipeline.unsealed_bytes > ROOM_BYTES:
                    await asyncio.sleep(_POLL_S)
        except TimeoutError as error:
            raise self._stuck("the disk takes nothing") from error

    def _stuck(self, what: str) -> UnreachableError:
        cause = f": {self._disk_error}" if self._disk_error is not None else ""
        return UnreachableError(
            f"pages of the exchange's lists cannot be recorded: {what}{cause}",
            where=self.conn,
            do="See the disk and the NATS server; the same command does it again.",
        )

    def _note_disk(self, error: OSError | None) -> None:
        self._disk_error = error

    async def _publish(self, conn: str, channel: str, batch: int, records: int, data: bytes) -> asyncio.Future[int]:
        return await self._stores.raw_stream.publish(
            data, date=self._date, channel=channel, conn=conn, batch=batch, records=records
        )
