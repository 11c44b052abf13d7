"""What the adapters of JetStream streams share: errors in our words, creation of a stream, and a reader that survives.

Not for what the messages mean: that belongs to `journal`, `stream` and `secmaster`.
"""

from __future__ import annotations

import asyncio
import functools
import json
import re
from collections import deque
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import TracebackType
from typing import NamedTuple, Self
from urllib.parse import unquote

import nats.errors
import nats.js.errors
from nats.aio.client import Client
from nats.aio.msg import Msg
from nats.aio.subscription import Subscription
from nats.js import JetStreamContext, api

from ssmd_dagster.errors import ConfigurationError, NotFoundError, SsmdError, UnreachableError

STREAM_NOT_FOUND = 10059
_STREAM_NAME_IN_USE = 10058  # this and all below: nats-server's errors.json
_STREAM_REFUSED = frozenset({10023, 10047, 10052, 10065})
"""Insufficient resources, insufficient storage, invalid configuration, subjects overlap with another stream."""

_STREAM_FULL = frozenset({10023, 10077})
"""Insufficient resources of the server; the stream's store failed or its own limit is reached."""

_COMPARED_SETTINGS = (
    "subjects",
    "retention",
    "storage",
    "discard",
    "max_msgs",
    "max_bytes",
    "max_age",
    "duplicate_window",
    "deny_delete",
    "deny_purge",
)
"""Settings whose change would break a promise of ours. The rest (replicas, placement) is the operator's."""

_HEARTBEAT_S = 1.0
_SILENCE_S = 2.5
_PULL_EXPIRES_S = 30.0
_INACTIVE_S = 300.0
_PAUSE_S = 0.05
_PULL_BYTES = 32 * 1024 * 1024

_HARMLESS = re.compile(r"[A-Za-z0-9_-]+")


def encode_token(text: str) -> str:
    """Percent-encode every character outside `[A-Za-z0-9_-]`: one harmless token of a subject, however odd the name."""
    if _HARMLESS.fullmatch(text):
        return text
    return "".join(chr(b) if _HARMLESS.fullmatch(chr(b)) else f"%{b:02X}" for b in text.encode())


@functools.lru_cache(4096)  # a day has millions of batches of few connections: their names are kept once
def decode_token(token: str) -> str:
    """Undo `encode_token`."""
    return unquote(token) if "%" in token else token


def client_of(js: JetStreamContext) -> Client:
    """Return the connection behind a JetStream context, for which nats-py has no public name."""
    return js._nc


def address_of(js: JetStreamContext) -> str:
    """Return `NATS at host:port`, for errors."""
    return f"NATS at {client_of(js).servers[0].netloc.rpartition('@')[2]}"


def unreachable(js: JetStreamContext, what: str, answer: str = "no answer") -> UnreachableError:
    """Make the error for a NATS server that did not do what was asked; `what` says what that was."""
    return UnreachableError(
        f"{what}: {answer}", where=address_of(js), do="Check that NATS runs (`ssmd up` where it is embedded)"
    )


@contextmanager
def nats_errors(js: JetStreamContext, what: str) -> Iterator[None]:
    """Turn errors of nats-py into ours.

    Raises:
        UnreachableError: No answer in time, not connected, or JetStream is not up.
        NotFoundError: There is no such stream.
        ConfigurationError: The server refuses the stream's settings.
        SsmdError: Any other answer of JetStream.
    """
    try:
        yield
    except nats.js.errors.APIError as error:
        if error.err_code == STREAM_NOT_FOUND:
            raise NotFoundError(
                f"{what}: there is no such stream", where=address_of(js), do="`ssmd day start` creates it"
            ) from error
        if error.code in (500, 503):
            raise unreachable(js, what, f"{error.description} ({error.err_code})") from error
        kind = ConfigurationError if error.err_code in _STREAM_REFUSED else SsmdError
        raise kind(f"{what}: {error.description} ({error.err_code})", where=address_of(js)) from error
    except (nats.errors.Error, TimeoutError, OSError) as error:
        raise unreachable(js, what) from error


async def ensure_stream(js: JetStreamContext, config: api.StreamConfig, *, adjust_max_bytes: bool = False) -> None:
    """Create a stream unless it exists with these settings.

    Args:
        js: JetStream.
        config: The wanted settings; those in `_COMPARED_SETTINGS` must hold.
        adjust_max_bytes: Set `max_bytes` of an existing stream instead of refusing another value.

    Raises:
        ConfigurationError: A stream of this name has other settings (named), or the server refuses them.
        UnreachableError: No answer.
    """
    assert config.name is not None
    with nats_errors(js, f"creating stream {config.name}"):
        try:
            # Asked first: the server counts the room for an existing stream twice when it is asked to create it again.
            found = (await js.stream_info(config.name)).config
        except nats.js.errors.NotFoundError:
            try:
                await js.add_stream(config)
            except nats.js.errors.APIError as error:
                if error.err_code != _STREAM_NAME_IN_USE:
                    raise
                found = (await js.stream_info(config.name)).config
            else:
                return
        different = [name for name in _COMPARED_SETTINGS if getattr(found, name) != getattr(config, name)]
        if adjust_max_bytes and different == ["max_bytes"]:
            await js.update_stream(found, max_bytes=config.max_bytes)
            return
    if different:
        settings = ", ".join(f"{n} is {getattr(found, n)!r}, not {getattr(config, n)!r}" for n in different)
        raise ConfigurationError(
            f"stream {config.name} exists with other settings: {settings}",
            where=address_of(js),
            do="Change the stream with `nats stream edit`, or let the environment use another NATS account",
        )


class StreamFullError(SsmdError):
    """The stream or the server's disk takes no more messages until something is purged or the limit is raised."""

    transient = True


class Publisher:
    """Publishes to one stream with many messages under way, each with a future of its acknowledged sequence.

    Stands in for `JetStreamContext.publish_async` of nats-py 2.16, whose futures never end where the server refuses a
    message, nor where the answer is lost.
    """

    def __init__(self, js: JetStreamContext, stream: str, timeout_s: float) -> None:
        self._js = js
        self._nc = client_of(js)
        self._stream = stream
        self._what = f"publishing to {stream}"
        self._timeout_s = timeout_s
        self._inbox: str | None = None
        self._number = 0
        self._pending: dict[str, asyncio.Future[int]] = {}

    async def publish(self, subject: str, data: bytes, headers: Mapping[str, str]) -> asyncio.Future[int]:
        """Hand a message to NATS, in the order of the calls, and return a future of its sequence.

        The future ends within `timeout_s` and need not be awaited. It raises UnreachableError (no answer in time),
        StreamFullError or SsmdError (refused).

        Raises:
            UnreachableError: Not connected.
        """
        if not self._nc.is_connected:
            raise unreachable(self._js, self._what)
        with nats_errors(self._js, self._what):
            if self._inbox is None:
                self._inbox = self._nc.new_inbox()
                await self._nc.subscribe(f"{self._inbox}.*", cb=self._on_answer)
            loop = asyncio.get_running_loop()
            self._number += 1
            token = str(self._number)
            future: asyncio.Future[int] = loop.create_future()
            self._pending[token] = future
            deadline = loop.call_later(self._timeout_s, self._fail, future, unreachable(self._js, self._what))

            def on_end(done: asyncio.Future[int]) -> None:
                deadline.cancel()
                del self._pending[token]
                # After the first failure the caller lets go of the rest, whose errors then say nothing new.
                _ = done.cancelled() or done.exception()

            future.add_done_callback(on_end)
            await self._nc.publish(
                subject,
                data,
                reply=f"{self._inbox}.{token}",
                headers={**headers, api.Header.EXPECTED_STREAM.value: self._stream},
            )
        return future

    async def _on_answer(self, message: Msg) -> None:
        future = self._pending.get(message.subject.rpartition(".")[2])
        if future is None or future.done():
            return
        try:
            with nats_errors(self._js, self._what):
                future.set_result(self._sequence(message))
        except SsmdError as error:
            self._fail(future, error)

    def _sequence(self, message: Msg) -> int:
        if message.headers is not None and api.Header.STATUS in message.headers:
            raise nats.js.errors.NoStreamResponseError
        answer = json.loads(message.data)
        if "error" not in answer:
            seq: int = answer["seq"]
            return seq
        error = answer["error"]
        if error.get("err_code") in _STREAM_FULL:
            raise StreamFullError(
                f"stream {self._stream} takes no more messages: {error.get('description')}",
                where=address_of(self._js),
                do="Give it more `capture.stream_limit_mb`, then run `ssmd day recover`, which sets it",
            )
        raise nats.js.errors.APIError(error.get("code"), error.get("description"), error.get("err_code"))

    @staticmethod
    def _fail(future: asyncio.Future[int], error: SsmdError) -> None:
        if not future.done():
            future.set_exception(error)


class StreamMessage(NamedTuple):
    """One stored message. `pending` counts those of the same subjects that the server had behind it."""

    seq: int
    subject: str
    data: bytes
    headers: Mapping[str, str]
    pending: int


class StreamReader:
    """Reads the messages of some subjects in stream order, through restarts of the server and lost connections.

    It pulls through an ephemeral consumer without acknowledgements, at most `2 * batch` messages ahead of its user.
    When anything is odd (a hole in the consumer's count, silence, a consumer that is gone) it opens another one at the
    last message that it took and goes on from there. If that message is not there any more as it was, the server has
    lost or purged part of the stream: the reader begins again at `start_seq` and counts that in `rewinds`, since
    sequences can have been given anew. Its user must therefore recognise messages by their own identity.
    """

    def __init__(
        self,
        js: JetStreamContext,
        stream: str,
        subjects: Sequence[str],
        *,
        start_seq: int = 1,
        headers_only: bool = False,
        batch: int = 256,
    ) -> None:
        self.rewinds = 0
        self._js = js
        self._nc = client_of(js)
        self._stream = stream
        self._subjects = list(subjects)
        self._start_seq = start_seq
        self._headers_only = headers_only
        self._batch = batch
        self._buffer: deque[StreamMessage] = deque()
        self._arrived = asyncio.Event()
        self._last: StreamMessage | None = None
        self._expected_first: StreamMessage | None = None
        self._consumer: str | None = None
        self._inbox = ""
        self._subscription: Subscription | None = None
        self._generation = 0
        self._consumer_seq = 0
        self._requested = 0
        self._pulls = 0
        self._heard_s = 0.0
        self._left_s = 0.0

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def fetch(self, timeout_s: float, max_messages: int = 1000) -> list[StreamMessage]:
        """Return the next messages, at least one; an empty list if none came within `timeout_s`.

        A server that is down is waited for in the same way. A cancelled call loses nothing.

        Raises:
            NotFoundError: The stream does not exist.
            UnreachableError: The connection was closed for good.
        """
        loop = asyncio.get_running_loop()
        deadline_s = loop.time() + timeout_s
        # Silence counts only while somebody listens: a user may have been busy for longer than the pull lived.
        self._heard_s = min(loop.time(), self._heard_s + loop.time() - self._left_s)
        try:
            return await self._next(deadline_s, max_messages)
        finally:
            self._left_s = loop.time()

    async def _next(self, deadline_s: float, max_messages: int) -> list[StreamMessage]:
        loop = asyncio.get_running_loop()
        while True:
            remaining_s = deadline_s - loop.time()
            if self._consumer is None and not self._buffer:
                if remaining_s <= 0:
                    return []
                if not await self._try_open(remaining_s):
                    continue
            if self._consumer is not None:
                await self._request_more()
            if self._buffer:
                count = min(max_messages, len(self._buffer))
                return [self._buffer.popleft() for _ in range(count)]
            if self._consumer is not None:
                silent_at_s = self._heard_s + _SILENCE_S
                self._arrived.clear()
                try:
                    async with asyncio.timeout_at(min(deadline_s, silent_at_s)):
                        await self._arrived.wait()
                except TimeoutError:
                    if loop.time() >= self._heard_s + _SILENCE_S:
                        await self._drop_consumer()
                    elif loop.time() >= deadline_s:
                        return []

    async def backlog(self) -> int:
        """Return how many stored messages have not been returned by `fetch` yet, as the server sees it now.

        Raises:
            NotFoundError: The stream does not exist.
            UnreachableError: No answer.
        """
        with nats_errors(self._js, f"reading stream {self._stream}"):
            if self._consumer is None:
                await self._open()
            assert self._consumer is not None
            try:
                info = await self._js.consumer_info(self._stream, self._consumer)
            except nats.js.errors.NotFoundError:
                await self._drop_consumer()
                await self._open()
                info = await self._js.consumer_info(self._stream, self._consumer)
        delivered = info.delivered.consumer_seq if info.delivered is not None else 0
        stored_for_consumer = delivered + (info.num_pending or 0)
        returned_by_fetch = self._consumer_seq - len(self._buffer)
        known = 1 if self._expected_first is not None else 0
        return stored_for_consumer - returned_by_fetch - known

    async def skip_to_end(self) -> None:
        """Pass over everything stored so far; `fetch` goes on with what is stored from now on."""
        with nats_errors(self._js, f"reading stream {self._stream}"):
            last_seq = (await self._js.stream_info(self._stream)).state.last_seq
            await self._drop_consumer()
        self._buffer.clear()
        self._last = None
        self._start_seq = last_seq + 1

    async def close(self) -> None:
        """Let go of the consumer; the server forgets it."""
        consumer = self._consumer
        await self._drop_consumer()
        if consumer is not None and self._nc.is_connected:
            # No answer is waited for: a consumer that stays behind is forgotten by the server after its idle time.
            await self._nc.publish(f"$JS.API.CONSUMER.DELETE.{self._stream}.{consumer}")

    async def _try_open(self, remaining_s: float) -> bool:
        try:
            with nats_errors(self._js, f"reading stream {self._stream}"):
                async with asyncio.timeout(remaining_s):
                    await self._open()
        except UnreachableError:
            if self._nc.is_closed:
                raise
            # A server that is away is this reader's daily bread: it tries again until its caller's time is over.
            await asyncio.sleep(min(_PAUSE_S, remaining_s))
            return False
        return True

    async def _open(self) -> None:
        if not self._nc.is_connected:
            raise nats.errors.ConnectionReconnectingError
        await self._drop_consumer()
        state = (await self._js.stream_info(self._stream)).state
        if self._last is not None and self._last.seq > state.last_seq:
            self._rewind()
        generation = self._generation
        self._inbox = self._nc.new_inbox()

        async def on_message(message: Msg) -> None:
            if generation == self._generation:
                self._take(message)

        self._subscription = await self._nc.subscribe(f"{self._inbox}.*", cb=on_message)
        info = await self._js.add_consumer(
            self._stream,
            api.ConsumerConfig(
                deliver_policy=api.DeliverPolicy.BY_START_SEQUENCE,
                opt_start_seq=self._start_seq if self._last is None else self._last.seq,
                ack_policy=api.AckPolicy.NONE,
                filter_subjects=self._subjects,
                headers_only=self._headers_only,
                inactive_threshold=_INACTIVE_S,
                mem_storage=True,
                num_replicas=1,
            ),
        )
        self._expected_first = self._last
        self._consumer_seq = 0
        self._requested = 0
        self._heard_s = asyncio.get_running_loop().time()
        self._consumer = info.name

    async def _drop_consumer(self) -> None:
        self._generation += 1
        self._consumer = None
        subscription, self._subscription = self._subscription, None
        if subscription is not None and not self._nc.is_closed:
            await subscription.unsubscribe()

    async def _request_more(self) -> None:
        if len(self._buffer) + self._requested > self._batch or not self._nc.is_connected:
            return
        self._requested += self._batch
        self._pulls += 1
        request = {
            "batch": self._batch,
            "max_bytes": max(_PULL_BYTES, 2 * self._nc.max_payload),
            "expires": int(_PULL_EXPIRES_S * 1e9),
            "idle_heartbeat": int(_HEARTBEAT_S * 1e9),
        }
        try:
            await self._nc.publish(
                f"$JS.API.CONSUMER.MSG.NEXT.{self._stream}.{self._consumer}",
                json.dumps(request).encode(),
                reply=f"{self._inbox}.{self._pulls}",
            )
        except (nats.errors.Error, OSError):
            # The connection went away in between; silence will tell, and another consumer will be opened.
            self._requested = 0

    def _take(self, message: Msg) -> None:
        self._heard_s = asyncio.get_running_loop().time()
        headers = message.headers or {}
        if not message.reply.startswith("$JS.ACK."):
            self._take_status(headers)
            return
        # $JS.ACK.[domain.account.]stream.consumer.deliveries.stream_seq.consumer_seq.time.pending[.random]
        tokens = message.reply.split(".")
        stream_seq, consumer_seq, _, pending = map(int, tokens[5:9] if len(tokens) == 9 else tokens[7:11])
        self._consumer_seq += 1
        self._requested -= 1
        if consumer_seq != self._consumer_seq:
            self._abandon_consumer()
            return
        taken = StreamMessage(stream_seq, message.subject, message.data, headers, pending)
        expected, self._expected_first = self._expected_first, None
        if expected is not None:
            if taken[:4] != expected[:4]:
                self._rewind()
                self._abandon_consumer()
            return
        self._last = taken
        self._buffer.append(taken)
        self._arrived.set()

    def _take_status(self, headers: Mapping[str, str]) -> None:
        status = headers.get(api.Header.STATUS)
        if status == api.StatusCode.CONTROL_MESSAGE:
            return
        unserved = headers.get("Nats-Pending-Messages")
        if unserved is None:
            self._abandon_consumer()
            return
        self._requested -= int(unserved)
        self._arrived.set()

    def _abandon_consumer(self) -> None:
        self._generation += 1
        self._consumer = None
        self._arrived.set()

    def _rewind(self) -> None:
        self.rewinds += 1
        self._last = None


async def read_up_to(reader: StreamReader, last_seq: int, timeout_s: float) -> AsyncIterator[list[StreamMessage]]:
    """Yield all messages of a reader that were stored up to `last_seq`, in order.

    Raises:
        UnreachableError: Nothing came for `timeout_s`, or the stream lost messages while it was read.
        NotFoundError: The stream does not exist.
    """
    if await reader.backlog() == 0:
        return
    while True:
        messages = await reader.fetch(timeout_s)
        if not messages or reader.rewinds:
            raise UnreachableError(
                "the stream could not be read to its end", do="Try again; check NATS if it happens again"
            )
        if messages[-1].seq > last_seq:
            yield [message for message in messages if message.seq <= last_seq]
            return
        yield messages
        if messages[-1].seq == last_seq or messages[-1].pending == 0:
            return


async def wait_connected(js: JetStreamContext, timeout_s: float, what: str) -> None:
    """Return once the client is connected, so that nothing is left in its buffer to be sent after we have given up.

    Raises:
        UnreachableError: Not connected within `timeout_s`.
    """
    nc = client_of(js)
    loop = asyncio.get_running_loop()
    deadline_s = loop.time() + timeout_s
    while not nc.is_connected:
        if nc.is_closed or loop.time() > deadline_s:
            raise unreachable(js, what)
        await asyncio.sleep(_PAUSE_S)
