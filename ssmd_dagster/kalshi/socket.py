"""One WebSocket to Kalshi: everything that comes off it goes to the sink at once, commands wait for their answers.

The read path takes the time, copies the payload, decodes the envelope and calls the sink; nothing else belongs there.
Not for reconnecting, ordering or interpreting: a connection that ends is over, and its sink is told why.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Sequence

import msgspec
import yarl
from picows import (
    WSCloseCode,
    WSFrame,
    WSHandshakeError,
    WSListener,
    WSMsgType,
    WSProtocolError,
    WSTransport,
    ws_connect,
)

from ssmd_dagster.clock import Clock
from ssmd_dagster.errors import ConfigurationError, SsmdError, UnreachableError
from ssmd_dagster.exchange import Envelope, ExchangeSettings, FrameSink, Subscription, SubscriptionLost
from ssmd_dagster.kalshi.auth import Signer, where_the_key_is
from ssmd_dagster.kalshi.commands import Commands, read_error_body, read_sid
from ssmd_dagster.kalshi.errors import (
    TERMINAL_CODES,
    TOO_MANY_COMMANDS,
    UNKNOWN_SUBSCRIPTION,
    ExchangeAnswerError,
    ExchangeRefusedError,
    RateLimitedError,
    read_rest_error,
)
from ssmd_dagster.kalshi.news import NEWS_TYPES, read_news
from ssmd_dagster.kalshi.pacing import Backoff, Sleep

MAX_MESSAGE_BYTES = 64 * 1024 * 1024
"""Kalshi's own limit since 2026-09-24; a larger message ends the connection."""
TICKERS_PER_COMMAND = 1000
COMMAND_TIMEOUT_S = 10.0
CONNECT_TIMEOUT_S = 10.0
_CLOSE_TIMEOUT_S = 2.0
# Kalshi pings every 10 s. After 15 s of silence it is asked, after 10 more the connection is dead.
_SILENCE_S = 15.0
_PONG_TIMEOUT_S = 10.0
_MAX_TRIES_OF_COMMAND = 5
MARKET_CHANNELS = frozenset({"orderbook_delta", "trade", "ticker"})
"""Channels that can be filtered by market."""
BOOK_CHANNELS = frozenset({"orderbook_delta"})
_NEEDS_TICKERS = BOOK_CHANNELS
_LOOKED_AT = NEWS_TYPES | {"error"}
_MAX_RETRY_AFTER_S = 300.0
_TEXT = WSMsgType.TEXT
"""Reading a member of an enum costs as much as copying the payload."""

_decode_envelope = msgspec.json.Decoder(Envelope).decode


def read_envelope(payload: bytes) -> Envelope | None:
    """Decode the outside of a message; None where it is not UTF-8, not JSON, or not such an object."""
    try:
        if not payload.isascii():
            # msgspec does not look into what it hands on raw.
            payload.decode()
        return _decode_envelope(payload)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return None


class KalshiConnection(WSListener):
    """One socket's life; made by `open_connection`. Implements `exchange.Connection`."""

    def __init__(
        self,
        address: str,
        sink: FrameSink,
        clock: Clock,
        rng: random.Random,
        *,
        use_yes_price: bool,
        tickers_per_command: int,
        command_timeout_s: float,
        sleep: Sleep,
    ) -> None:
        self.use_yes_price = use_yes_price
        self._address = address
        self._sink = sink
        self._clock = clock
        self._rng = rng
        self._sleep = sleep
        self._tickers_per_command = tickers_per_command
        self._commands = Commands(self._send, address, command_timeout_s)
        self._fragments: list[bytes] = []
        self._fragments_bytes = 0
        self._transport: WSTransport | None = None
        self._watcher: asyncio.Task[None] | None = None
        self._reason: str | None = None
        self._abandoned = False
        self._reading_paused = False

    # What picows calls.

    def on_ws_connected(self, transport: WSTransport) -> None:
        """Begin; frames may follow before `ws_connect` returns."""
        if self._abandoned:
            transport.disconnect(graceful=False)
            return
        self._transport = transport
        self._watcher = asyncio.get_running_loop().create_task(self._watch(transport))

    def on_ws_frame(self, transport: WSTransport, frame: WSFrame) -> None:
        """Take a frame off the socket."""
        recv_ns = self._clock()
        kind = frame.msg_type
        if kind is _TEXT and frame.fin and not self._fragments:
            payload = frame.get_payload_as_bytes()
            envelope = read_envelope(payload)
            self._sink.on_frame(recv_ns, payload, envelope)
            if envelope is not None and (envelope.id is not None or envelope.type in _LOOKED_AT):
                self._look_at(recv_ns, envelope)
        else:
            self._on_other_frame(recv_ns, transport, frame, kind)

    def is_user_specific_pong(self, frame: WSFrame) -> bool:
        """See the pong that picows asked for after a silence."""
        if frame.msg_type is not WSMsgType.PONG:
            return False
        self._sink.on_ping(self._clock())
        return True

    def pause_writing(self) -> None:
        """Ignore: commands are few."""

    def resume_writing(self) -> None:
        """Ignore: commands are few."""

    def _on_other_frame(self, recv_ns: int, transport: WSTransport, frame: WSFrame, kind: WSMsgType) -> None:
        if kind is WSMsgType.PING:
            transport.send_pong(frame.get_payload_as_bytes())
            self._sink.on_ping(recv_ns)
        elif kind is WSMsgType.PONG:
            self._sink.on_ping(recv_ns)
        elif kind is WSMsgType.CLOSE:
            if not transport.is_close_frame_sent:
                self._note_reason(_said(frame.get_close_code(), frame.get_close_reason(), "closed by the exchange"))
                transport.send_close(frame.get_close_code())
            transport.disconnect()
        else:
            self._join(recv_ns, frame)

    def _join(self, recv_ns: int, frame: WSFrame) -> None:
        """Join the fragments of a message; the receive time is that of the last."""
        self._fragments.append(frame.get_payload_as_bytes())
        self._fragments_bytes += frame.payload_size
        if self._fragments_bytes > MAX_MESSAGE_BYTES:
            self._fragments.clear()
            raise WSProtocolError(WSCloseCode.MESSAGE_TOO_BIG, f"message larger than {MAX_MESSAGE_BYTES} bytes")
        if frame.fin:
            payload = b"".join(self._fragments)
            self._fragments.clear()
            self._fragments_bytes = 0
            envelope = read_envelope(payload)
            self._sink.on_frame(recv_ns, payload, envelope)
            if envelope is not None:
                self._look_at(recv_ns, envelope)

    def _look_at(self, recv_ns: int, envelope: Envelope) -> None:
        """See what a frame that the sink has means for commands and subscriptions."""
        if envelope.type == "error" and envelope.sid is not None:
            body = read_error_body(envelope.msg)
            if body.code in TERMINAL_CODES:
                # The subscription is dead and would stay silent for ever; the socket lives on.
                lost = SubscriptionLost(sid=envelope.sid, reason=f"{body.code} {body.msg}".rstrip())
                self._sink.on_event(recv_ns, lost)
        elif (news := read_news(envelope)) is not None:
            self._sink.on_event(recv_ns, news)
        if envelope.id is not None:
            self._commands.take(envelope)

    # What the end of a connection needs.

    def _note_reason(self, reason: str) -> None:
        if self._reason is None:
            self._reason = reason

    async def _watch(self, transport: WSTransport) -> None:
        """Wait for the end and tell it, once and last, to the sink and to the commands under way."""
        waiter = asyncio.ensure_future(transport.wait_disconnected())
        await asyncio.wait([waiter])
        closed_ns = self._clock()
        error = waiter.exception()
        if error is not None:
            self._note_reason(_said_of_error(error))
        handshake = transport.close_handshake
        if self._reason is None and handshake is not None and handshake.sent is not None:
            self._note_reason(_said(handshake.sent.code, handshake.sent.reason, "closed by this side"))
        self._note_reason("connection lost without a close frame (1006)")
        reason = self._reason or ""
        self._commands.close(reason)
        self._sink.on_closed(closed_ns, reason)

    def pause_reading(self, *, paused: bool) -> None:
        """Leave what comes in the socket for a moment, or read on. Pings wait too: the exchange gives up after a while."""
        if self._transport is None or self._transport.is_disconnected or paused is self._reading_paused:
            return
        self._reading_paused = paused
        socket = self._transport.underlying_transport
        if paused:
            socket.pause_reading()
        else:
            socket.resume_reading()

    async def close(self) -> None:
        """Close the socket and wait until the sink has been told, at most some seconds."""
        self.pause_reading(paused=False)
        transport, watcher = self._transport, self._watcher
        if transport is None or watcher is None:
            return
        self._note_reason("closed by this side")
        if not transport.is_disconnected and not transport.is_close_frame_sent:
            transport.send_close(WSCloseCode.OK)
        done, _ = await asyncio.wait([watcher], timeout=_CLOSE_TIMEOUT_S)
        if not done:
            transport.disconnect(graceful=False)
            await watcher

    def abandon(self) -> None:
        """Nobody wants this connection any more, should it still come up."""
        self._abandoned = True
        if self._transport is not None:
            self._transport.disconnect(graceful=False)

    @property
    def is_open(self) -> bool:
        """Whether the handshake is done and the socket is not gone."""
        return self._transport is not None and not self._transport.is_disconnected

    # Commands.

    def _send(self, command: bytes) -> None:
        if self._transport is None or self._transport.is_disconnected:
            raise UnreachableError("the connection is gone", where=self._address, do="Reconnect")
        self._transport.send(WSMsgType.TEXT, command)

    async def subscribe(self, channels: Sequence[str], tickers: Sequence[str] | None) -> list[Subscription]:
        """Subscribe `channels`, for `tickers` or (None) for everything; return once all are acknowledged.

        Channels already open on this connection get the markets added and keep their sid (the exchange answers `ok`).
        One command per channel and at most `tickers_per_command` tickers. Channels that know no tickers
        (the lifecycles) are subscribed as a whole; with no tickers at all only these are. Raises
        `ExchangeRefusedError`, `UnreachableError`, and `ConfigurationError` for everything of a channel that needs
        tickers.
        """
        subscriptions = []
        for channel in channels:
            if channel not in MARKET_CHANNELS:
                subscriptions.append(await self._subscribe_channel(channel, None))
            elif tickers is None or tickers:
                subscriptions.append(await self._subscribe_channel(channel, tickers))
        return subscriptions

    async def _subscribe_channel(self, channel: str, tickers: Sequence[str] | None) -> Subscription:
        about = f"subscribe {channel}"
        if tickers is None and channel in _NEEDS_TICKERS:
            do = "Name markets, or leave the channel out of capture.channels"
            raise ConfigurationError(f"{about}: not to be had for all markets at once", where=self._address, do=do)
        sid = 0
        for chunk in self._chunks(tickers) if tickers is not None else [None]:
            params: dict[str, object] = {"channels": [channel]}
            if chunk is not None:
                params["market_tickers"] = chunk
                # Else every answer lists all markets of the subscription again.
                params["skip_ticker_ack"] = True
            if channel in _NEEDS_TICKERS:
                # Always said, so that archived prices of the no side stay readable when the default flips.
                params["use_yes_price"] = self.use_yes_price
            sid = read_sid(await self._call("subscribe", params, about), about, self._address)
        return Subscription(channel=channel, sid=sid)

    async def unsubscribe(self, sids: Sequence[int]) -> None:
        """End whole subscriptions, one command each. Raises `ExchangeRefusedError`, `UnreachableError`."""
        for sid in sids:
            await self._call("unsubscribe", {"sids": [sid]}, f"unsubscribe sid {sid}")

    async def add_markets(self, sid: int, tickers: Sequence[str]) -> None:
        """Add markets to a subscription. Raises `ExchangeRefusedError`, `UnreachableError`."""
        await self._update(sid, "add_markets", tickers)

    async def delete_markets(self, sid: int, tickers: Sequence[str]) -> None:
        """Take markets out of a subscription. Raises `ExchangeRefusedError`, `UnreachableError`."""
        await self._update(sid, "delete_markets", tickers)

    async def request_snapshots(self, sid: int, tickers: Sequence[str]) -> None:
        """Ask for fresh order book snapshots and return when all have come (as frames, which the sink has seen).

        Raises `ExchangeRefusedError`, `UnreachableError`.
        """
        await self._update(sid, "get_snapshot", tickers)

    async def list_subscriptions(self) -> list[Subscription]:
        """Ask the exchange which subscriptions it keeps for this connection."""
        about = "list_subscriptions"
        answer = await self._call("list_subscriptions", None, about)
        try:
            return msgspec.json.decode(answer.msg, type=list[Subscription])
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            raise ExchangeAnswerError(f"the exchange answered {about} with no list", where=self._address) from error

    async def _update(self, sid: int, action: str, tickers: Sequence[str]) -> None:
        for chunk in self._chunks(tickers):
            params: dict[str, object] = {"sids": [sid], "action": action, "market_tickers": chunk}
            snapshots = len(chunk) if action == "get_snapshot" else 0
            try:
                await self._call("update_subscription", params, f"{action} on sid {sid}", snapshots=snapshots)
            except ExchangeRefusedError as error:
                if error.code == UNKNOWN_SUBSCRIPTION:
                    lost = SubscriptionLost(sid=sid, reason=f"{error.code} {error.msg}".rstrip(), forgotten=True)
                    self._sink.on_event(self._clock(), lost)
                raise

    async def _call(self, cmd: str, params: dict[str, object] | None, about: str, *, snapshots: int = 0) -> Envelope:
        """Send a command; one that came too fast for the exchange (code 27) is sent again, some times."""
        backoff = Backoff(self._rng)
        for _ in range(_MAX_TRIES_OF_COMMAND - 1):
            try:
                return await self._commands.call(cmd, params, about=about, snapshots=snapshots)
            except ExchangeRefusedError as error:
                if error.code != TOO_MANY_COMMANDS:
                    raise
                await self._sleep(backoff.next_s())
        return await self._commands.call(cmd, params, about=about, snapshots=snapshots)

    def _chunks(self, tickers: Sequence[str]) -> list[list[str]]:
        unique = list(dict.fromkeys(tickers))
        size = self._tickers_per_command
        return [unique[start : start + size] for start in range(0, len(unique), size)]


async def open_connection(
    settings: ExchangeSettings,
    signer: Signer | None,
    sink: FrameSink,
    clock: Clock,
    rng: random.Random,
    *,
    use_yes_price: bool = False,
    tickers_per_command: int = TICKERS_PER_COMMAND,
    command_timeout_s: float = COMMAND_TIMEOUT_S,
    connect_timeout_s: float = CONNECT_TIMEOUT_S,
    sleep: Sleep = asyncio.sleep,
) -> KalshiConnection:
    """Open one socket. `use_yes_price` quotes both sides of the book on the yes scale; it is always sent.

    Raises `ConfigurationError` (401, 403, bad address), `RateLimitedError` (429), `UnreachableError` (all else).
    """
    address = settings.endpoint
    try:
        url = yarl.URL(address)
    except ValueError as error:
        raise _bad_address(settings) from error
    if url.scheme not in ("ws", "wss") or not url.host:
        raise _bad_address(settings)
    connection = KalshiConnection(
        address,
        sink,
        clock,
        rng,
        use_yes_price=use_yes_price,
        tickers_per_command=tickers_per_command,
        command_timeout_s=command_timeout_s,
        sleep=sleep,
    )
    headers = signer.headers("GET", url.raw_path, clock()) if signer is not None else {}
    try:
        async with asyncio.timeout(connect_timeout_s):
            await ws_connect(
                lambda: connection,
                address,
                websocket_handshake_timeout=connect_timeout_s,
                enable_auto_pong=False,
                enable_auto_ping=True,
                auto_ping_idle_timeout=_SILENCE_S,
                auto_ping_reply_timeout=_PONG_TIMEOUT_S,
                max_frame_size=MAX_MESSAGE_BYTES,
                max_redirects=0,
                extra_headers=headers,
            )
    except WSHandshakeError as error:
        raise _refused_handshake(error, settings, signed=signer is not None) from error
    except TimeoutError as error:
        connection.abandon()
        what = f"cannot connect to the exchange: no WebSocket handshake within {connect_timeout_s:g} s"
        raise _unreachable(what, address) from error
    except asyncio.CancelledError:
        connection.abandon()
        raise
    except OSError as error:
        raise _unreachable(f"cannot connect to the exchange: {error}", address) from error
    if not connection.is_open:
        raise _unreachable("cannot connect to the exchange: it closed the connection in the handshake", address)
    return connection


def _refused_handshake(error: WSHandshakeError, settings: ExchangeSettings, *, signed: bool) -> SsmdError:
    status = int(error.response.status) if error.response is not None else 0
    said = read_rest_error(status, error.raw_body or b"")
    if status in (401, 403):
        whose = "refused the credentials" if signed else "wants a key and the environment has none"
        do = where_the_key_is(settings.environment)
        return ConfigurationError(f"the exchange {whose}: HTTP {status} {said}", where=settings.endpoint, do=do)
    if status == 429:
        what = f"rate limited by the exchange: HTTP 429 {said}"
        retry_after_s = _retry_after_s(error)
        return RateLimitedError(what, where=settings.endpoint, do="Connect more rarely", retry_after_s=retry_after_s)
    what = f"HTTP {status} {said}" if status else str(error)
    return _unreachable(f"the exchange refused the WebSocket handshake: {what}", settings.endpoint)


def _retry_after_s(error: WSHandshakeError) -> float | None:
    """Read a `Retry-After` in seconds; Kalshi sends none, what stands before it may."""
    said = error.response.headers.get("Retry-After", "") if error.response is not None else ""
    return min(float(said), _MAX_RETRY_AFTER_S) if said.isdecimal() else None


def _unreachable(what: str, address: str) -> UnreachableError:
    return UnreachableError(what, where=address, do="Check the address, the network and the exchange's status")


def _bad_address(settings: ExchangeSettings) -> ConfigurationError:
    return ConfigurationError(
        f"endpoint: got {settings.endpoint!r}, expected ws(s)://host/path",
        where=f"environment {settings.environment}",
        do="Look at the environment's YAML and its feed's",
    )


def _said(code: WSCloseCode | int, text: str | None, who: str) -> str:
    number = code.value if isinstance(code, WSCloseCode) else code
    return f"{who}: {number} {text or ''}".rstrip()


def _said_of_error(error: BaseException) -> str:
    if isinstance(error, WSProtocolError):
        return _said(error.code, str(error), "closed by this side")
    return f"closed by this side: {type(error).__name__}: {error}"
