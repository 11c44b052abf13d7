"""The day journal of an environment: a JetStream stream with compare-and-append and a chain of hashes.

Not for what events mean or which may be appended: that is `day.folding`. Every event is stored as the bytes of
`DayEvent.encode`, and holds the SHA-256 of the bytes before it.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing
from hashlib import sha256

import msgspec
import nats.js.errors
from msgspec.structs import replace
from nats.js import JetStreamContext, api

from ssmd_dagster.day.events import BadEventError, DayEvent, JournalBrokenError, TradingDay
from ssmd_dagster.errors import NotFoundError, RefusedError
from ssmd_dagster.stores.jetstream import (
    StreamMessage,
    StreamReader,
    address_of,
    ensure_stream,
    nats_errors,
    read_up_to,
    wait_connected,
)

_WRONG_LAST_SEQUENCE = frozenset({10071, 10164})
"""Error codes of a failed comparison: alone and inside a cluster (nats-server's `errors.json`)."""
_READ_BATCH = 2000
_FOLLOW_WAIT_S = 1.0


class StoredEvent(msgspec.Struct, frozen=True):
    """An event of the journal with its sequence and the SHA-256 (hex) of its stored bytes."""

    seq: int
    event: DayEvent
    sha256: str


class AppendConflictError(RefusedError):
    """Someone else appended first; `newer` holds what came after the event that the actor had read last."""

    def __init__(self, newer: list[StoredEvent], *, where: str) -> None:
        self.newer = newer
        super().__init__(f"{len(newer)} newer events are in the journal", where=where, do="Read them and decide again")


class Journal:
    """The journal of one environment: stream `{env}-day`, subject `{env}.day.events`.

    Until somebody calls `create` it may be missing and reads as empty. All methods but `follow` raise UnreachableError
    when NATS does not answer within `timeout_s`.
    """

    def __init__(self, js: JetStreamContext, env: str, timeout_s: float = 5.0) -> None:
        self.stream = f"{env}-day"
        self.subject = f"{env}.day.events"
        self._js = js
        self._timeout_s = timeout_s

    async def create(self) -> None:
        """Create the stream unless it is there: on file, without limits, deletes and purges denied.

        Raises:
            ConfigurationError: A stream of that name has other settings.
        """
        await ensure_stream(
            self._js,
            api.StreamConfig(
                name=self.stream,
                subjects=[self.subject],
                retention=api.RetentionPolicy.LIMITS,
                storage=api.StorageType.FILE,
                discard=api.DiscardPolicy.NEW,
                max_msgs=-1,
                max_bytes=-1,
                max_age=0,
                duplicate_window=120,
                deny_delete=True,
                deny_purge=True,
            ),
        )

    async def tip_seq(self) -> int:
        """Return the sequence of the last event, 0 for an empty or missing journal.

        Raises:
            JournalBrokenError: The journal does not begin with sequence 1.
        """
        with nats_errors(self._js, f"reading journal {self.stream}"):
            try:
                state = (await self._js.stream_info(self.stream)).state
            except nats.js.errors.NotFoundError:
                return 0
        if state.last_seq and state.first_seq != 1:
            raise JournalBrokenError(1, f"it begins with sequence {state.first_seq}", where=self.stream)
        return state.last_seq

    async def pages(self, after_seq: int = 0, up_to: int | None = None) -> AsyncGenerator[list[StoredEvent], None]:
        """Yield the events after `after_seq` that were stored when this was called, page by page, the chain of hashes verified.

        `up_to` is the last sequence wanted; None is all there are. Close it (`contextlib.aclosing`), so that its consumer
        does not outlive the connection.

        Raises:
            JournalBrokenError: A hash, a sequence or an event is not what it must be, or the journal ends before
                `after_seq`.
        """
        tip = await self.tip_seq()
        if after_seq > tip:
            raise JournalBrokenError(after_seq, f"the journal ends with sequence {tip}", where=self.stream)
        last_seq = tip if up_to is None else min(tip, up_to)
        if after_seq >= last_seq:
            return
        # The event before the first is read too: its hash is what the first must hold.
        start_seq = max(after_seq, 1)
        before: StoredEvent | None = None
        async with StreamReader(
            self._js, self.stream, [self.subject], start_seq=start_seq, batch=_READ_BATCH
        ) as reader:
            async for messages in read_up_to(reader, last_seq, self._timeout_s):
                page: list[StoredEvent] = []
                for message in messages:
                    before = self._link(message, before, start_seq)
                    if before.seq > after_seq:
                        page.append(before)
                if page:
                    yield page
        if before is None or before.seq != last_seq:
            raise JournalBrokenError(last_seq, "it could not be read", where=self.stream)

    async def read(self, after_seq: int = 0, up_to: int | None = None) -> list[StoredEvent]:
        """Return what `pages` yields, at once: for a stretch of the journal, not for years of it."""
        async with aclosing(self.pages(after_seq, up_to)) as pages:
            return [stored async for page in pages for stored in page]

    async def read_day(self, day: TradingDay) -> list[StoredEvent]:
        """Return all events of a day, as far as `day` knows of them."""
        async with aclosing(self.pages(day.first_seq - 1, day.last_seq)) as pages:
            return [stored async for page in pages for stored in page if stored.event.date == day.date]

    async def holds(self, seq: int, sha256: str) -> StoredEvent | None:
        """Return the event of a sequence if it has this SHA-256 (hex), None if another or none is there."""
        if not 0 < seq <= await self.tip_seq():
            return None
        (stored,) = await self.read(seq - 1, seq)
        return stored if stored.sha256 == sha256 else None

    async def append(self, event: DayEvent, after: StoredEvent | None) -> StoredEvent:
        """Append an event right behind `after` (None: as the first), or not at all.

        Fills in `prev_sha256`. An append that had succeeded before under the same id is recognised and returned.

        Raises:
            AppendConflictError: Something else stands behind `after`.
            UnreachableError: No answer; whether the event got in must be asked of `find` once NATS answers again.
            NotFoundError: The journal was never created.
        """
        what = f"appending to journal {self.stream}"
        linked = replace(event, prev_sha256=None if after is None else after.sha256)
        raw = linked.encode()
        after_seq = 0 if after is None else after.seq
        headers = {
            api.Header.MSG_ID.value: event.id,
            api.Header.EXPECTED_LAST_SUBJECT_SEQUENCE.value: str(after_seq),
        }
        await wait_connected(self._js, self._timeout_s, what)
        with nats_errors(self._js, what):
            try:
                ack = await self._js.publish(
                    self.subject, raw, timeout=self._timeout_s, stream=self.stream, headers=headers
                )
                if not ack.duplicate:
                    return StoredEvent(ack.seq, linked, sha256(raw).hexdigest())
            except nats.js.errors.NoStreamResponseError:
                await self._js.stream_info(
                    self.stream
                )  # tells a journal that was never created from a server in trouble
                raise
            except nats.js.errors.APIError as error:
                if error.err_code not in _WRONG_LAST_SEQUENCE:
                    raise
        newer = await self.read(after_seq)
        for stored in newer:
            if stored.event.id == event.id:
                return stored
        raise AppendConflictError(newer, where=f"{self.stream} at {address_of(self._js)}")

    async def find(self, event_id: str, after_seq: int) -> StoredEvent | None:
        """Return the event with this id behind `after_seq`, None if it is not there: did an append get in?

        Ask only once nothing of that append can be under way any more, and append again under the same id.
        """
        return next((stored for stored in await self.read(after_seq) if stored.event.id == event_id), None)

    async def follow(self, after_seq: int = 0) -> AsyncIterator[StoredEvent]:
        """Yield all events after `after_seq`, then each new one as it comes; waits for a NATS that is away.

        Raises:
            JournalBrokenError: As in `read`; also when the stream lost what was read already.
            UnreachableError: The connection was closed for good.
        """
        start_seq = max(after_seq, 1)
        before: StoredEvent | None = None
        async with StreamReader(self._js, self.stream, [self.subject], start_seq=start_seq) as reader:
            while True:
                try:
                    messages = await reader.fetch(_FOLLOW_WAIT_S)
                except NotFoundError:
                    # Nobody has created the journal yet; the first start will.
                    await wait_connected(self._js, self._timeout_s, f"reading journal {self.stream}")
                    await asyncio.sleep(_FOLLOW_WAIT_S)
                    continue
                for message in messages:
                    before = self._link(message, before, start_seq)
                    if before.seq > after_seq:
                        yield before

    def _link(self, message: StreamMessage, before: StoredEvent | None, start_seq: int) -> StoredEvent:
        """Check that `message` continues the chain and decode it."""
        due = start_seq if before is None else before.seq + 1
        if message.seq != due:
            raise JournalBrokenError(due, f"sequence {message.seq} stands in its place", where=self.stream)
        try:
            event = DayEvent.decode(message.data)
        except BadEventError as error:
            raise JournalBrokenError(message.seq, error.what, where=self.stream) from error
        prev = None if before is None else before.sha256
        if (before is not None or start_seq == 1) and event.prev_sha256 != prev:
            raise JournalBrokenError(
                message.seq,
                f"it follows the hash {event.prev_sha256}, the event before it has {prev}",
                where=self.stream,
            )
        return StoredEvent(message.seq, event, sha256(message.data).hexdigest())
