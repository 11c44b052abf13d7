"""The stream of raw batches of an environment: `{env}-raw`, one message per batch.

Not for the bytes of a batch, which are passed on as they are. A batch is known by connection, channel and number; the
stream's sequences are no checkpoints, and a batch may be in the stream more than once.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncIterator, Collection, Sequence
from typing import NamedTuple, Self

import nats.js.errors
from nats.js import JetStreamContext, api

from ssmd_dagster.errors import ConfigurationError, NotFoundError, SsmdError, UnreachableError
from ssmd_dagster.stores.jetstream import (
    Publisher,
    StreamMessage,
    StreamReader,
    address_of,
    client_of,
    decode_token,
    encode_token,
    ensure_stream,
    nats_errors,
    read_up_to,
)

RECORDS_HEADER = "Ssmd-Records"
_DUPLICATE_WINDOW_S = 120
_READ_TIMEOUT_S = 5.0
_LIST_BATCH = 2000
_CONSUME_BATCH = 64
_MAX_LAG = 2000
_HEADERS_BYTES = 1024
MAX_PAYLOAD_BYTES = 8 << 20
"""What the server's `max_payload` must be at least; NATS's own default is an eighth of it."""
_RAISE_IT = (
    "Raise max_payload of the NATS server: 8 MiB is what the recorder needs (`max_payload: 8388608`), then reload it"
)
NO_BATCH = -1


class BatchTooLargeError(SsmdError):
    """The server's `max_payload` is too small for a batch."""


class BatchId(NamedTuple):
    """What makes a batch the same batch wherever it is met."""

    conn: str
    channel: str
    batch: int


class RawBatch(NamedTuple):
    """One message of the stream: a batch's identity, its bytes, and how many messages stand behind it.

    A message that no recorder of ours published, without the headers of one, has the number `NO_BATCH`.
    """

    seq: int
    id: BatchId
    date: str
    records: int
    data: bytes
    pending: int


class Usage(NamedTuple):
    """Bytes that a stream holds, and how many it takes; a `limit` below 1 is none."""

    size: int
    limit: int

    @property
    def free(self) -> int:
        """Return how many more bytes it takes."""
        return max(0, self.limit - self.size) if self.limit > 0 else sys.maxsize

    @property
    def share(self) -> float:
        """Return how full it is, 0 to 1."""
        return self.size / self.limit if self.limit > 0 else 0.0


class RawStream:
    """The raw stream of one environment."""

    def __init__(self, js: JetStreamContext, env: str, timeout_s: float = 5.0) -> None:
        self.stream = f"{env}-raw"
        self._js = js
        self._prefix = f"{env}.raw"
        self._publisher = Publisher(js, self.stream, timeout_s)

    async def create(self, max_bytes: int) -> None:
        """Create the stream unless it is there; a full stream refuses new batches. Sets another `max_bytes` if asked.

        Raises:
            ConfigurationError: A stream of that name has other settings, or the server has no room for `max_bytes`.
            UnreachableError: No answer.
        """
        await ensure_stream(
            self._js,
            api.StreamConfig(
                name=self.stream,
                subjects=[f"{self._prefix}.*.*.*"],
                retention=api.RetentionPolicy.LIMITS,
                storage=api.StorageType.FILE,
                discard=api.DiscardPolicy.NEW,
                max_msgs=-1,
                max_bytes=max_bytes,
                max_age=0,
                duplicate_window=_DUPLICATE_WINDOW_S,
            ),
            adjust_max_bytes=True,
        )

    def check_payload(self) -> None:
        """Raise `ConfigurationError` where the server takes no messages of `MAX_PAYLOAD_BYTES`."""
        max_payload = client_of(self._js).max_payload
        if max_payload < MAX_PAYLOAD_BYTES:
            raise ConfigurationError(
                f"the server takes messages of {max_payload} bytes at most; larger batches would never leave the spool",
                where=address_of(self._js),
                do=_RAISE_IT,
            )

    def subject(self, date: str = "*", channel: str = "*", conn: str = "*") -> str:
        """Return the subject of a day's, channel's or connection's batches; `*` stands for all."""
        parts = (part if part == "*" else encode_token(part) for part in (date, channel, conn))
        return ".".join((self._prefix, *parts))

    async def publish(
        self, data: bytes, *, date: str, channel: str, conn: str, batch: int, records: int, repair_round: int = 0
    ) -> asyncio.Future[int]:
        """Hand a batch to NATS and return a future of its acknowledged sequence.

        Batches are sent in the order of the calls, so the caller can keep several under way; it sends everything from
        the first one that fails again (those behind it may have got in before). A batch that is there already is
        acknowledged with the sequence that it has. The future ends within `timeout_s`; it need not be awaited.

        Args:
            data: The batch.
            date: Trading day.
            channel: Channel of its records.
            conn: Connection that received them.
            batch: Number of the batch in its connection and channel.
            records: How many records it holds.
            repair_round: From 1 on, publishes a batch anew whose message was lost inside the duplicate window.

        Raises:
            UnreachableError: Not connected (here), no acknowledgement in time (from the future).
            StreamFullError: From the future: `max_bytes` is reached; see `jetstream`.
            BatchTooLargeError: The server does not take messages of this size.
        """
        max_payload = client_of(self._js).max_payload
        if len(data) + _HEADERS_BYTES > max_payload:
            raise BatchTooLargeError(
                f"a batch of {len(data)} bytes does not fit into a message of {max_payload} bytes",
                where=address_of(self._js),
                do=_RAISE_IT,
            )
        suffix = f"/r{repair_round}" if repair_round else ""
        headers = {
            api.Header.MSG_ID.value: f"{encode_token(conn)}/{encode_token(channel)}/{batch}{suffix}",
            RECORDS_HEADER: str(records),
        }
        return await self._publisher.publish(self.subject(date, channel, conn), data, headers)

    async def batches(self, date: str, conn: str | None = None) -> dict[BatchId, int]:
        """Return how many records each batch of a day (of one connection) holds that is in the stream now.

        Raises:
            UnreachableError: NATS does not answer, or the stream changed under the reading.
            NotFoundError: The stream does not exist.
        """
        with nats_errors(self._js, f"reading stream {self.stream}"):
            last_seq = (await self._js.stream_info(self.stream)).state.last_seq
        subject = self.subject(date, conn="*" if conn is None else conn)
        found: dict[BatchId, int] = {}
        async with StreamReader(self._js, self.stream, [subject], headers_only=True, batch=_LIST_BATCH) as reader:
            async for messages in read_up_to(reader, last_seq, _READ_TIMEOUT_S):
                read = map(_raw_batch, messages)
                found.update((batch.id, batch.records) for batch in read if batch.id.batch != NO_BATCH)
        return found

    async def copies(self, date: str, wanted: Collection[BatchId]) -> AsyncIterator[tuple[BatchId, bytes]]:
        """Yield what the stream holds of some batches of a day, each as often as it is there. Reads their connections' channels.

        Raises:
            UnreachableError: NATS does not answer, or the stream changed under the reading.
            NotFoundError: The stream does not exist.
        """
        subjects = sorted({self.subject(date, batch.channel, batch.conn) for batch in wanted})
        if not subjects:
            return
        with nats_errors(self._js, f"reading stream {self.stream}"):
            last_seq = (await self._js.stream_info(self.stream)).state.last_seq
        async with StreamReader(self._js, self.stream, subjects, batch=_CONSUME_BATCH) as reader:
            async for messages in read_up_to(reader, last_seq, _READ_TIMEOUT_S):
                for batch in map(_raw_batch, messages):
                    if batch.id in wanted:
                        yield batch.id, batch.data

    async def connections(self, date: str) -> set[str]:
        """Return the connections of which the stream holds batches of a day; none where there is no stream.

        Raises:
            UnreachableError: NATS does not answer.
        """
        with nats_errors(self._js, f"reading stream {self.stream}"):
            try:
                info = await self._js.stream_info(self.stream, subjects_filter=self.subject(date))
            except nats.js.errors.NotFoundError:
                return set()
        return {decode_token(subject.rpartition(".")[2]) for subject in info.state.subjects or ()}

    async def newest(self, date: str, channel: str) -> bytes:
        """Return the batch of a day's channel that was stored last.

        Raises:
            UnreachableError: NATS does not answer.
            NotFoundError: There is none, or no stream.
        """
        with nats_errors(self._js, f"reading stream {self.stream}"):
            try:
                message = await self._js.get_last_msg(self.stream, self.subject(date, channel))
            except nats.js.errors.NotFoundError as error:
                raise NotFoundError(f"no batch of {channel} on {date}", where=self.stream) from error
        return message.data or b""

    def consume(self, date: str, channel: str = "*") -> RawConsumer:
        """Return a consumer of all batches of a day (of one channel) from the first one on, in stream order."""
        return RawConsumer(StreamReader(self._js, self.stream, [self.subject(date, channel)], batch=_CONSUME_BATCH))

    async def tail(self, channels: Sequence[str]) -> RawTail:
        """Return a consumer of the batches of some channels, of all days, that are stored from now on.

        Raises:
            UnreachableError: NATS does not answer.
            NotFoundError: The stream does not exist.
        """
        reader = StreamReader(
            self._js, self.stream, [self.subject(channel=channel) for channel in channels], batch=_CONSUME_BATCH
        )
        await reader.skip_to_end()
        return RawTail(reader)

    async def usage(self) -> Usage:
        """Return how full the stream is.

        Raises:
            UnreachableError: NATS does not answer.
            NotFoundError: The stream does not exist.
        """
        with nats_errors(self._js, f"looking at stream {self.stream}"):
            info = await self._js.stream_info(self.stream)
        return Usage(info.state.bytes, info.config.max_bytes or -1)

    async def purge(self, date: str) -> None:
        """Remove all batches of a day from the stream; they are gone for good.

        Raises:
            UnreachableError: NATS does not answer.
            NotFoundError: The stream does not exist.
        """
        with nats_errors(self._js, f"purging {date} from stream {self.stream}"):
            await self._js.purge_stream(self.stream, subject=self.subject(date))


class RawConsumer:
    """Reads batches in stream order, at most 128 messages ahead of its user, through restarts of NATS.

    A batch comes more than once if the stream holds it so, and all of them come again if NATS lost part of the stream.
    Closed by `close` or as a context manager.
    """

    def __init__(self, reader: StreamReader) -> None:
        self._reader = reader

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def fetch(self, timeout_s: float, max_batches: int = 64) -> list[RawBatch]:
        """Return the next batches; an empty list if none came within `timeout_s`, be it that NATS is away.

        Raises:
            NotFoundError: The stream does not exist.
            UnreachableError: The connection was closed for good.
        """
        return [_raw_batch(message) for message in await self._reader.fetch(timeout_s, max_batches)]

    async def backlog(self) -> int:
        """Return how many batches are stored that `fetch` has not returned: 0 means that all have been.

        Raises:
            UnreachableError: NATS does not answer.
            NotFoundError: The stream does not exist.
        """
        return await self._reader.backlog()

    async def close(self) -> None:
        """Let go of the server's consumer."""
        await self._reader.close()


class RawTail(RawConsumer):
    """Reads what is new. Whoever is too slow loses the oldest, counted in `dropped`, and slows nobody down."""

    def __init__(self, reader: StreamReader) -> None:
        super().__init__(reader)
        self.dropped = 0

    async def fetch(self, timeout_s: float, max_batches: int = 64) -> list[RawBatch]:
        """Return the next batches; an empty list if none came within `timeout_s`.

        If more than 2,000 wait behind them, those are passed over and reading goes on with what is new.

        Raises:
            NotFoundError: The stream does not exist.
            UnreachableError: The connection was closed for good.
        """
        batches = await super().fetch(timeout_s, max_batches)
        if batches and batches[-1].pending > _MAX_LAG:
            try:
                await self._reader.skip_to_end()
            except UnreachableError:
                return batches  # the lag is found again with the next batch
            self.dropped += batches[-1].pending
        return batches


def _raw_batch(message: StreamMessage) -> RawBatch:
    _, _, date, channel, conn = message.subject.split(".")
    try:
        number = int(message.headers[api.Header.MSG_ID].split("/")[2])
        records = int(message.headers[RECORDS_HEADER])
    except (KeyError, IndexError, ValueError):
        number, records = NO_BATCH, 0
    identity = BatchId(decode_token(conn), decode_token(channel), number)
    return RawBatch(message.seq, identity, decode_token(date), records, message.data, message.pending)
