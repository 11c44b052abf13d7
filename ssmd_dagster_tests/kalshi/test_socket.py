"""The WebSocket: everything reaches the sink, commands meet their answers, every end has a reason."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import random
import struct
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
from picows import WSCloseCode, WSMsgType, WSTransport

from ssmd_dagster.errors import ConfigurationError, ExitCode, UnreachableError
from ssmd_dagster.exchange import MarketLimitError, MarketNews, SnapshotCame, Subscription, SubscriptionLost
from ssmd_dagster.kalshi.auth import open_signer
from ssmd_dagster.kalshi.errors import ExchangeAnswerError, ExchangeRefusedError, RateLimitedError
from ssmd_dagster.kalshi.socket import KalshiConnection, open_connection
from ssmd_dagster_tests.kalshi.fakes import (
    ED25519_KEY,
    NOW_NS,
    Sink,
    Sleeps,
    WsServer,
    acknowledge,
    eventually,
    pem,
    settings,
    ws_server,
)

SIGN = f"{NOW_NS // 1_000_000}GET/trade-api/ws/v2".encode()


@asynccontextmanager
async def connected(**options: Any) -> AsyncIterator[tuple[WsServer, KalshiConnection, Sink]]:
    """Run a server and one connection to it."""
    sink = Sink()
    async with ws_server() as server:
        connection = await open_connection(
            settings(endpoint=server.endpoint), None, sink, lambda: NOW_NS, random.Random(1), sleep=Sleeps(), **options
        )
        await eventually(lambda: server.transport is not None)
        yield server, connection, sink
        await connection.close()
    assert len(sink.closed) == 1


async def test_every_message_reaches_the_sink_as_it_came() -> None:
    """Known, unknown, malformed, not UTF-8, binary and empty messages come in order, byte for byte."""
    messages = [
        b'{"type":"trade","sid":1,"seq":7,"msg":{"a":1},"new":2}\n',
        b'{"type":"never_seen","sid":3}',
        b'{"type":"trade","sid":"one"}',
        b'{"type":"trade","msg":"\xff"}',
        b"not json",
        b"",
        b'{"type":"x","msg":' + b"[" * 200_000,
        '{"type":"trade","msg":"é"}'.encode(),
    ]
    async with connected() as (server, _, sink):
        server.send(*messages)
        assert server.transport is not None
        server.transport.send(WSMsgType.BINARY, b'{"type":"ticker","sid":2}')
        await eventually(lambda: len(sink.frames) == len(messages) + 1)
        assert [payload for _, payload, _ in sink.frames] == [*messages, b'{"type":"ticker","sid":2}']
        types = [envelope.type if envelope else None for _, _, envelope in sink.frames]
        assert types == ["trade", "never_seen", None, None, None, None, None, "trade", "ticker"]
        first = sink.frames[0][2]
        assert first is not None
        assert (first.sid, first.seq, bytes(first.msg)) == (1, 7, b'{"a":1}')
        assert {recv_ns for recv_ns, _, _ in sink.frames} == {NOW_NS}


async def test_fragments_are_joined_and_a_ping_between_them_is_answered() -> None:
    """A message may come in pieces with control frames in between."""
    async with connected() as (server, _, sink):
        transport = server.transport
        assert transport is not None
        transport.send(WSMsgType.TEXT, b'{"type":"tr', fin=False)
        transport.send_ping(b"heartbeat")
        transport.send(WSMsgType.CONTINUATION, b'ade","sid":', fin=False)
        transport.send(WSMsgType.CONTINUATION, b"4}", fin=True)
        transport.send(WSMsgType.TEXT, b'{"type":"ok"}')
        await eventually(lambda: len(sink.frames) == 2 and server.pongs == [b"heartbeat"])
        assert [payload for _, payload, _ in sink.frames] == [b'{"type":"trade","sid":4}', b'{"type":"ok"}']
        assert sink.pings == [NOW_NS]


async def test_frames_that_come_with_the_handshake_are_not_lost() -> None:
    """The server may speak before `open_connection` has returned."""

    def greet(transport: WSTransport) -> None:
        transport.send(WSMsgType.TEXT, b'{"type":"early"}')

    sink = Sink()
    async with ws_server() as server:
        server.greet = greet
        connection = await open_connection(
            settings(endpoint=server.endpoint), None, sink, lambda: NOW_NS, random.Random(1)
        )
        await eventually(lambda: len(sink.frames) == 1)
        await connection.close()


async def test_subscribe_says_use_yes_price_and_splits_the_tickers() -> None:
    """One command per channel and batch; the first is answered by `subscribed`, the next by `ok`, the sid is one."""
    async with connected(tickers_per_command=2) as (server, connection, sink):
        tickers = ["A", "B", "C", "A", "D.5", "E"]
        got = await connection.subscribe(["orderbook_delta", "trade", "market_lifecycle_v2"], tickers)
        assert got == [
            Subscription(channel="orderbook_delta", sid=1),
            Subscription(channel="trade", sid=2),
            Subscription(channel="market_lifecycle_v2", sid=3),
        ]
        assert [one["id"] for one in server.commands] == list(range(1, 8))
        params = [one["params"] for one in server.commands]
        assert [one.get("market_tickers") for one in params] == [["A", "B"], ["C", "D.5"], ["E"]] * 2 + [None]
        assert [one.get("use_yes_price") for one in params] == [False] * 3 + [None] * 4
        types = [envelope.type for _, _, envelope in sink.frames if envelope]
        assert types == ["subscribed", "ok", "ok", "subscribed", "ok", "ok", "subscribed"]


async def test_use_yes_price_is_sent_when_it_is_wanted() -> None:
    """What is asked for is on the wire either way."""
    async with connected(use_yes_price=True) as (server, connection, _):
        await connection.subscribe(["orderbook_delta"], ["A"])
        assert server.commands[0]["params"]["use_yes_price"] is True
        assert connection.use_yes_price


async def test_everything_is_subscribed_without_tickers() -> None:
    """None is the whole tape; the order book alone cannot be had so."""
    async with connected() as (server, connection, _):
        await connection.subscribe(["trade", "ticker"], None)
        assert all("market_tickers" not in one["params"] for one in server.commands)
        with pytest.raises(ConfigurationError, match="orderbook_delta"):
            await connection.subscribe(["orderbook_delta"], None)


async def test_no_markets_at_all_are_not_everything() -> None:
    """On a day without markets only what knows no tickers is subscribed."""
    async with connected() as (server, connection, _):
        got = await connection.subscribe(["trade", "orderbook_delta", "market_lifecycle_v2"], [])
        assert [one.channel for one in got] == ["market_lifecycle_v2"]
        assert len(server.commands) == 1


async def test_markets_are_added_deleted_and_asked_for() -> None:
    """Updates name exactly one sid; snapshots are awaited until the last has come."""
    async with connected(tickers_per_command=2) as (server, connection, sink):
        await connection.subscribe(["orderbook_delta"], ["A"])
        await connection.add_markets(1, ["B", "C", "D"])
        await connection.delete_markets(1, ["A"])
        await connection.request_snapshots(1, ["B", "C", "D"])
        updates = [one["params"] for one in server.commands[1:]]
        assert [one["action"] for one in updates] == ["add_markets"] * 2 + ["delete_markets"] + ["get_snapshot"] * 2
        assert all(one["sids"] == [1] for one in updates)
        snapshots = [envelope for _, _, envelope in sink.frames if envelope and envelope.type == "orderbook_snapshot"]
        assert len(snapshots) == 3


async def test_subscriptions_are_listed_and_ended() -> None:
    """`list_subscriptions` has no params; `unsubscribe` is one command a sid."""
    async with connected() as (server, connection, _):
        both = await connection.subscribe(["trade", "ticker"], None)
        assert await connection.list_subscriptions() == both
        await connection.unsubscribe([1, 2])
        assert "params" not in server.commands[2]
        assert [one["params"] for one in server.commands[3:]] == [{"sids": [1]}, {"sids": [2]}]


async def test_answers_are_matched_by_id_in_any_order() -> None:
    """Three commands under way, answered last first, with data and strangers' ids in between."""
    async with connected() as (server, connection, _):
        held: list[dict[str, Any]] = []
        answer = acknowledge()

        def hold(command: dict[str, Any]) -> list[dict[str, Any]]:
            held.extend(answer(command))
            return []

        server.answer = hold
        channels = ("trade", "ticker", "cfbenchmarks_value")
        calls = [asyncio.ensure_future(connection.subscribe([channel], None)) for channel in channels]
        await eventually(lambda: len(held) == 3)
        server.send({"type": "trade", "sid": 9, "seq": 1, "msg": {}}, {"type": "ok", "id": 77}, *reversed(held))
        got = await asyncio.gather(*calls)
        assert [one[0].channel for one in got] == list(channels)
        assert [one[0].sid for one in got] == [1, 2, 3]


async def test_a_refusal_is_raised_with_its_code() -> None:
    """The error names no channel, but the command does."""
    async with connected() as (server, connection, _):
        server.answer = lambda one: [
            {"type": "error", "id": one["id"], "msg": {"code": 8, "msg": "Unknown channel name", "x": 1}}
        ]
        with pytest.raises(ExchangeRefusedError, match="subscribe nonsense") as caught:
            await connection.subscribe(["nonsense"], None)
        assert caught.value.code == 8
        assert caught.value.msg == "Unknown channel name"
        assert "Unknown channel name" in str(caught.value)
        assert not caught.value.transient


async def test_a_subscription_that_the_exchange_has_forgotten_is_told() -> None:
    """Code 7 as the answer to a command about it: without that it would stay silent for ever."""
    async with connected() as (server, connection, sink):
        await connection.subscribe(["trade"], ["A"])
        refusal = {"type": "error", "msg": {"code": 7, "msg": "Unknown subscription ID"}}
        server.answer = lambda one: [refusal | {"id": one["id"]}]
        with pytest.raises(ExchangeRefusedError, match="7 Unknown"):
            await connection.add_markets(1, ["B"])
        assert sink.events == [SubscriptionLost(sid=1, reason="7 Unknown subscription ID", forgotten=True)]


async def test_a_refusal_of_unknown_shape_is_still_a_refusal() -> None:
    """The exchange may change its errors too."""
    async with connected() as (server, connection, _):
        server.answer = lambda one: [{"type": "error", "id": one["id"], "msg": {"code": "eight"}}]
        with pytest.raises(ExchangeRefusedError, match="eight"):
            await connection.subscribe(["trade"], None)


async def test_too_many_commands_are_waited_out() -> None:
    """Code 27 is a matter of time; five times in a row it is a refusal."""
    async with connected() as (server, connection, _):
        answer = acknowledge()
        too_many = {"type": "error", "msg": {"code": 27, "msg": "Too many requests"}}
        server.answer = lambda one: [too_many | {"id": one["id"]}] if len(server.commands) < 3 else answer(one)
        assert await connection.subscribe(["trade"], None) == [Subscription(channel="trade", sid=1)]
        assert len(server.commands) == 3
        server.answer = lambda one: [too_many | {"id": one["id"]}]
        with pytest.raises(ExchangeRefusedError) as caught:
            await connection.subscribe(["ticker"], None)
        assert caught.value.transient
        assert len(server.commands) == 8


async def test_no_answer_meets_the_deadline() -> None:
    """A command is not waited for for ever, and a late answer does no harm."""
    async with connected(command_timeout_s=0.05) as (server, connection, sink):
        server.answer = lambda _: []
        with pytest.raises(UnreachableError, match="subscribe trade within"):
            await connection.subscribe(["trade"], None)
        server.send({"type": "subscribed", "id": 1, "msg": {"channel": "trade", "sid": 1}})
        await eventually(lambda: len(sink.frames) == 1)


async def test_an_answer_without_a_sid_is_an_error() -> None:
    """What cannot be used is named, not guessed."""
    async with connected() as (server, connection, _):
        server.answer = lambda one: [{"type": "subscribed", "id": one["id"], "msg": {}}]
        with pytest.raises(ExchangeAnswerError, match="no sid"):
            await connection.subscribe(["trade"], None)


@pytest.mark.parametrize("code", [10, 25])
async def test_a_terminal_error_is_told_and_leaves_the_socket_open(code: int) -> None:
    """The sink sees the error, then what it means; the channel can be subscribed again on the same socket."""
    async with connected() as (server, connection, sink):
        await connection.subscribe(["trade"], None)
        server.send({"type": "error", "sid": 1, "seq": 5, "msg": {"code": code, "msg": "it is over"}})
        await eventually(lambda: bool(sink.events))
        assert sink.events == [SubscriptionLost(sid=1, reason=f"{code} it is over")]
        envelope = sink.frames[-1][2]
        assert envelope is not None
        assert (envelope.type, envelope.seq) == ("error", 5)
        assert [one.channel for one in await connection.subscribe(["ticker"], None)] == ["ticker"]


async def test_frames_are_news_of_books_and_markets() -> None:
    """Snapshots name their market, lifecycle messages what became of one; what cannot be read is no news."""
    lifecycle = {"type": "market_lifecycle_v2", "sid": 2}
    async with connected() as (server, _, sink):
        server.send(
            {"type": "orderbook_snapshot", "sid": 1, "seq": 1, "msg": {"market_ticker": "A"}},
            {**lifecycle, "msg": {"market_ticker": "B", "event_type": "created", "open_ts": 5, "close_ts": 9}},
            {**lifecycle, "msg": {"market_ticker": "B", "event_type": "close_date_updated", "close_ts": 7}},
            {**lifecycle, "msg": {"market_ticker": "B", "event_type": "determined"}},
            {**lifecycle, "msg": {"market_ticker": 5}},
            {**lifecycle, "msg": {"market_ticker": "B", "event_type": "settled", "settled_ts": 11}},
        )
        await eventually(lambda: len(sink.frames) == 6)
        assert sink.events == [
            SnapshotCame(sid=1, ticker="A"),
            MarketNews(ticker="B", event="listed", open_ns=5_000_000_000, close_ns=9_000_000_000),
            MarketNews(ticker="B", event="moved", close_ns=7_000_000_000),
            MarketNews(ticker="B", event="settled"),
        ]


async def test_a_socket_that_is_not_read_keeps_what_comes() -> None:
    """Nothing reaches the sink while reading is paused, and everything once it goes on."""
    async with connected() as (server, connection, sink):
        connection.pause_reading(paused=True)
        connection.pause_reading(paused=True)
        server.send({"type": "trade", "sid": 1, "seq": 1, "msg": {}})
        await asyncio.sleep(0.05)
        assert sink.frames == []
        connection.pause_reading(paused=False)
        await eventually(lambda: len(sink.frames) == 1)


async def test_a_full_subscription_says_so_in_the_exchanges_own_error() -> None:
    """Code 26 can be told from every other refusal without knowing the exchange."""
    async with connected() as (server, connection, _):
        server.answer = lambda one: [{"type": "error", "id": one["id"], "sid": 1, "seq": 2, "msg": {"code": 26}}]
        with pytest.raises(MarketLimitError):
            await connection.add_markets(1, ["A"])


async def test_the_exchanges_close_gives_code_and_reason() -> None:
    """Commands under way fail with it; later ones fail at once."""
    async with connected() as (server, connection, sink):
        server.answer = lambda _: []
        call = asyncio.ensure_future(connection.subscribe(["trade"], None))
        await eventually(lambda: len(server.commands) == 1)
        assert server.transport is not None
        server.transport.send_close(WSCloseCode.GOING_AWAY, b"maintenance")
        with pytest.raises(UnreachableError, match="1001 maintenance"):
            await call
        await eventually(lambda: bool(sink.closed))
        assert sink.closed[0][1] == "closed by the exchange: 1001 maintenance"
        with pytest.raises(UnreachableError, match="connection is gone"):
            await connection.unsubscribe([1])


async def test_a_lost_connection_is_told() -> None:
    """A socket that is cut without a close frame."""
    async with connected() as (server, _, sink):
        assert server.transport is not None
        server.transport.disconnect(graceful=False)
        await eventually(lambda: bool(sink.closed))
        assert "1006" in sink.closed[0][1]


async def test_closing_waits_until_the_sink_has_been_told() -> None:
    """Twice is no more than once."""
    async with connected() as (_, connection, sink):
        await connection.close()
        assert sink.closed == [(NOW_NS, "closed by this side")]
        await connection.close()
        assert not connection.is_open


async def test_a_server_that_ignores_the_close_is_left_after_some_seconds() -> None:
    """The end does not depend on the other side."""
    sink = Sink()
    stuck = asyncio.Event()

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        request = await reader.readuntil(b"\r\n\r\n")
        key = next(line for line in request.split(b"\r\n") if line.lower().startswith(b"sec-websocket-key"))
        writer.write(_switching_protocols(key.partition(b":")[2].strip()))
        await stuck.wait()
        writer.close()

    server = await asyncio.start_server(handle, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    connection = await open_connection(
        settings(endpoint=f"ws://127.0.0.1:{port}/x"), None, sink, lambda: NOW_NS, random.Random(1)
    )
    async with asyncio.timeout(4):
        await connection.close()
    assert sink.closed == [(NOW_NS, "closed by this side")]
    stuck.set()
    server.close()
    await server.wait_closed()


async def test_a_message_above_the_limit_ends_the_connection() -> None:
    """64 MiB is Kalshi's own bound; the header alone is enough to refuse."""
    async with connected() as (server, _, sink):
        assert server.transport is not None
        header = struct.pack("!BBQ", 0x81, 127, 64 * 1024 * 1024 + 1)
        server.transport.underlying_transport.write(header)
        await eventually(lambda: bool(sink.closed))
        assert "1009" in sink.closed[0][1]
        assert "exceeding max allowed size" in sink.closed[0][1]


async def test_fragments_above_the_limit_end_the_connection(monkeypatch: pytest.MonkeyPatch) -> None:
    """A message cannot grow beyond it in pieces either."""
    monkeypatch.setattr("ssmd_dagster.kalshi.socket.MAX_MESSAGE_BYTES", 1000)
    async with connected() as (server, _, sink):
        assert server.transport is not None
        server.transport.send(WSMsgType.TEXT, b"x" * 600, fin=False)
        server.transport.send(WSMsgType.CONTINUATION, b"x" * 600, fin=False)
        await eventually(lambda: bool(sink.closed))
        assert sink.closed[0][1] == "closed by this side: 1009 message larger than 1000 bytes"


async def test_an_error_of_the_sink_is_the_reason_of_the_end() -> None:
    """A recorder that cannot record does not go on as if it did."""

    class Broken(Sink):
        def on_frame(self, *_: Any) -> None:
            """Fail."""
            raise OSError("disk full")

    sink = Broken()
    async with ws_server() as server:
        connection = await open_connection(
            settings(endpoint=server.endpoint), None, sink, lambda: NOW_NS, random.Random(1)
        )
        await eventually(lambda: server.transport is not None)
        server.send({"type": "x"})
        await eventually(lambda: bool(sink.closed))
        assert sink.closed[0][1] == "closed by this side: OSError: disk full"
        await connection.close()


@pytest.mark.parametrize("status", [401, 403])
async def test_refused_credentials_are_a_configuration_error(status: int) -> None:
    """Exit 8 with the exchange's words and where to look; nothing is tried again."""
    async with ws_server() as server:
        server.refuse = (status, b'{"code":"token_authentication_failure","message":"token authentication failure"}')
        with pytest.raises(ConfigurationError, match="token_authentication_failure") as caught:
            await open_connection(settings(endpoint=server.endpoint), None, Sink(), lambda: NOW_NS, random.Random(1))
        assert caught.value.exit_code == ExitCode.CONFIGURATION
        assert server.endpoint in str(caught.value)
        assert "the environment has none" in str(caught.value)
        assert len(server.handshakes) == 1


async def test_429_in_the_handshake_is_a_rate_limit() -> None:
    """It can be told apart, and is transient."""
    async with ws_server() as server:
        server.refuse = (429, b'{"error":"too many requests"}')
        with pytest.raises(RateLimitedError, match="too many requests") as caught:
            await open_connection(settings(endpoint=server.endpoint), None, Sink(), lambda: NOW_NS, random.Random(1))
        assert caught.value.transient


@pytest.mark.parametrize("status", [404, 500, 503])
async def test_other_refusals_of_the_handshake_are_unreachable(status: int) -> None:
    """Exit 7 with status and address."""
    async with ws_server() as server:
        server.refuse = (status, b"sorry")
        with pytest.raises(UnreachableError, match=f"HTTP {status}.*sorry"):
            await open_connection(settings(endpoint=server.endpoint), None, Sink(), lambda: NOW_NS, random.Random(1))


async def test_nobody_listening_is_unreachable() -> None:
    """The address is named."""
    with pytest.raises(UnreachableError, match=r"ws://127\.0\.0\.1:1/trade-api/ws/v2"):
        await open_connection(settings(), None, Sink(), lambda: NOW_NS, random.Random(1))


@pytest.mark.parametrize("behaviour", ["silent", "hangs up", "speaks no http"])
async def test_a_server_that_is_none_is_unreachable(behaviour: str) -> None:
    """Silence, a slammed door and a foreign protocol all end before the deadline, and the sink hears nothing."""
    sink = Sink()
    done = asyncio.Event()

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        if behaviour == "speaks no http":
            writer.write(b"220 smtp ready\r\n\r\n")
        if behaviour == "silent":
            await done.wait()
        writer.close()

    server = await asyncio.start_server(handle, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    config = settings(endpoint=f"ws://127.0.0.1:{port}/x")
    with pytest.raises(UnreachableError, match=f"127.0.0.1:{port}"):
        await open_connection(config, None, sink, lambda: NOW_NS, random.Random(1), connect_timeout_s=0.2)
    done.set()
    server.close()
    await server.wait_closed()
    assert sink.closed == []


@pytest.mark.parametrize("endpoint", ["", "http://host/x", "ws://", "127.0.0.1"])
async def test_a_bad_endpoint_is_a_configuration_error(endpoint: str) -> None:
    """It is named with its key."""
    with pytest.raises(ConfigurationError, match="endpoint"):
        await open_connection(settings(endpoint=endpoint), None, Sink(), lambda: NOW_NS, random.Random(1))


async def test_the_handshake_is_signed_where_there_is_a_key() -> None:
    """The path of the endpoint is signed."""
    config = settings(key_id="id-7", private_key_pem=pem(ED25519_KEY))
    async with ws_server() as server:
        connection = await open_connection(
            settings(endpoint=server.endpoint), open_signer(config), Sink(), lambda: NOW_NS, random.Random(1)
        )
        headers = server.handshakes[0].headers
        ED25519_KEY.public_key().verify(base64.b64decode(headers["KALSHI-ACCESS-SIGNATURE"]), SIGN)
        assert headers["KALSHI-ACCESS-KEY"] == "id-7"
        await connection.close()


async def test_silence_is_asked_and_then_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    """A connection that only looks alive is pinged after a while, and closed when nothing comes back."""
    monkeypatch.setattr("ssmd_dagster.kalshi.socket._SILENCE_S", 0.1)
    monkeypatch.setattr("ssmd_dagster.kalshi.socket._PONG_TIMEOUT_S", 0.1)
    async with connected() as (server, connection, sink):
        await eventually(lambda: len(sink.pings) >= 2)
        assert connection.is_open
        assert server.transport is not None
        server.transport.underlying_transport.pause_reading()
        await eventually(lambda: bool(sink.closed))
        assert "ping" in sink.closed[0][1]


def _switching_protocols(key: bytes) -> bytes:
    accept = base64.b64encode(hashlib.sha1(key + b"258EAFA5-E914-47DA-95CA-C5AB0DC85B11").digest())
    lines = [b"HTTP/1.1 101 Switching Protocols", b"Upgrade: websocket", b"Connection: Upgrade"]
    return b"\r\n".join([*lines, b"Sec-WebSocket-Accept: " + accept, b"", b""])
