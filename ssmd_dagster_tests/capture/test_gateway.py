"""Clients get what they subscribed, as JSON and in order; nobody slows anybody down; the end of a day is told."""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any

import aiohttp
import pytest

from ssmd_dagster.archive.records import parse_record
from ssmd_dagster.capture import gateway as gateway_module
from ssmd_dagster.capture.control import ANSWER_TIMEOUT_S, control_subject, request
from ssmd_dagster.capture.gateway import CLOSE_TIMEOUT_S, DRAIN_TIMEOUT_S, Client, Gateway, Request
from ssmd_dagster.capture.setting import Setting
from ssmd_dagster.environments.home import gateway_file
from ssmd_dagster.errors import SsmdError
from ssmd_dagster.stores.connect import Stores
from ssmd_dagster_tests.capture.recordings import DATE, Recording, eventually, header_of

Socket = aiohttp.ClientWebSocketResponse


@contextlib.asynccontextmanager
async def serving(setting: Setting, stores: Stores) -> AsyncIterator[Gateway]:
    """Run a gateway until the end of the block."""
    gateway, stop = Gateway(setting, stores), asyncio.Event()
    task = asyncio.create_task(gateway.run(stop))
    try:
        await eventually(lambda: gateway.tailing or task.done())
        yield gateway
        stop.set()
        await asyncio.wait_for(task, 20)
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


@pytest.fixture
async def gateway(setting: Setting, stores: Stores) -> AsyncIterator[Gateway]:
    """A running gateway."""
    async with serving(setting, stores) as gateway:
        yield gateway


Connect = Callable[[], Any]


@pytest.fixture
async def connect(gateway: Gateway) -> AsyncIterator[Connect]:
    """Opens WebSockets to the gateway, and closes them behind the test."""
    sockets: list[Socket] = []
    async with aiohttp.ClientSession() as session:

        async def open_socket() -> Socket:
            sockets.append(await session.ws_connect(f"http://127.0.0.1:{gateway.port}/v1/stream", max_msg_size=1 << 26))
            return sockets[-1]

        yield open_socket
        await asyncio.gather(*(socket.close() for socket in sockets))


async def next_message(socket: Socket, timeout_s: float = 10.0) -> dict[str, Any]:
    """Return the next message, which is JSON in a text frame."""
    message = await socket.receive(timeout_s)
    assert message.type is aiohttp.WSMsgType.TEXT, message
    decoded: dict[str, Any] = json.loads(message.data)
    return decoded


async def ask(socket: Socket, **words: Any) -> dict[str, Any]:
    """Send a request and return the next message."""
    await socket.send_str(json.dumps(words))
    return await next_message(socket)


async def events(socket: Socket, count: int) -> list[dict[str, Any]]:
    """Return the next `count` messages."""
    return [await next_message(socket) for _ in range(count)]


async def publish(stores: Stores, recording: Recording) -> None:
    """Publish what a recording has flushed and forget it."""
    for data in recording.batches():
        header = header_of(data).header
        acknowledged = await stores.raw_stream.publish(
            data,
            date=DATE,
            channel=header.channel,
            conn=header.conn,
            batch=header.batch,
            records=header.records,
        )
        await acknowledged
    recording.flushes.clear()


async def publish_at_once(stores: Stores, recording: Recording) -> None:
    """Publish what a recording of trades has flushed without waiting in between."""
    futures = [
        await stores.raw_stream.publish(data, date=DATE, channel="trade", conn="3-a-0", batch=number, records=1)
        for number, data in enumerate(recording.batches())
    ]
    await asyncio.gather(*futures)


@pytest.fixture
def recording(setting: Setting) -> Recording:
    """A recording of this test's environment."""
    return Recording("3-a-0", env=setting.env.name)


async def test_events_are_what_was_recorded_in_order(stores: Stores, connect: Connect, recording: Recording) -> None:
    """Every event carries day, channel, ticker and connection, and the record's own keys as they were recorded."""
    socket = await connect()
    assert await ask(socket, op="subscribe") == {"type": "subscribed", "tickers": None, "channels": None}
    frames = [recording.frame("trade", seq=seq, ticker=f"KX-{seq % 2}") for seq in range(50)]
    frames.append(recording.raw(b'{"type":"trade","msg":{"market_ticker":"KX\xc3\xa4.1"}}\n'))
    recording.recorder.flush()
    lines = [line for unsealed in recording.flushes[0] for line in unsealed.block.splitlines()]
    await publish(stores, recording)
    got = await events(socket, len(frames))
    for event, line, frame in zip(got, lines, frames, strict=True):
        record = parse_record(line)
        ticker = json.loads(frame)["msg"]["market_ticker"]
        assert {key: event[key] for key in ("type", "day", "channel", "ticker", "conn")} == {
            "type": "event",
            "day": DATE,
            "channel": "trade",
            "ticker": ticker,
            "conn": "3-a-0",
        }
        assert (event["n"], event["recv_ns"], event["wire"]) == (record.n, record.recv_ns, json.loads(frame))
    assert got[-1]["pad"] == ["", "\n"]


async def test_clients_get_only_the_tickers_and_channels_that_they_named(
    stores: Stores, connect: Connect, recording: Recording
) -> None:
    """Each client has its own wishes; events about no market go to those who want all; `session` goes to nobody."""
    one, by_channel, everything, nothing = [await connect() for _ in range(4)]
    assert await ask(one, op="subscribe", tickers=["KX-1"]) == {
        "type": "subscribed",
        "tickers": ["KX-1"],
        "channels": None,
    }
    await ask(by_channel, op="subscribe", channels=["ticker"])
    await ask(everything, op="subscribe")
    recording.begin()
    for ticker in ("KX-0", "KX-1"):
        recording.frame("trade", ticker=ticker)
        recording.frame("ticker", ticker=ticker)
    recording.raw(b"no json")
    recording.recorder.flush()
    await publish(stores, recording)
    recording.frame("trade", ticker="KX-1")
    recording.frame("ticker", ticker="KX-2")
    recording.recorder.flush()
    await publish(stores, recording)
    assert [(e["channel"], e["ticker"]) for e in await events(one, 3)] == [
        ("trade", "KX-1"),
        ("ticker", "KX-1"),
        ("trade", "KX-1"),
    ]
    assert [e["ticker"] for e in await events(by_channel, 3)] == ["KX-0", "KX-1", "KX-2"]
    got = await events(everything, 7)
    assert [(e["channel"], e["ticker"]) for e in got if e["channel"] == "other"] == [("other", None)]
    assert next(e for e in got if e["channel"] == "other")["wire_text"] == "no json"
    with pytest.raises(TimeoutError):
        await nothing.receive(0.05)


def wishes(*requests: dict[str, Any]) -> Client:
    """Return a client after some requests."""
    client = Client(None)  # type: ignore[arg-type]
    for each in requests:
        client.apply(Request(**each))
    return client


def test_subscriptions_add_up_and_are_taken_away() -> None:
    """Left out means all, on the way in and on the way out."""
    both = wishes({"op": "subscribe", "tickers": ["A"], "channels": ["trade"]}, {"op": "subscribe", "tickers": ["B"]})
    assert both.wanted() == {"tickers": ["A", "B"], "channels": None}
    assert both.wants("ticker", "A")
    assert not both.wants("trade", "C")
    assert not both.wants("trade", None)
    widened = wishes({"op": "subscribe", "channels": ["trade"]}, {"op": "subscribe"})
    assert widened.wanted() == {"tickers": None, "channels": None}
    narrowed = wishes({"op": "subscribe"}, {"op": "unsubscribe", "channels": ["trade", "ticker"]})
    assert not narrowed.wants("trade", "A")
    assert narrowed.wants("orderbook_delta", None)
    no_channel = wishes({"op": "subscribe", "channels": ["trade"]}, {"op": "unsubscribe", "channels": ["trade"]})
    assert no_channel.wanted() == {"tickers": None, "channels": []}
    assert not no_channel.wants("trade", "A")
    fewer = wishes({"op": "subscribe", "tickers": ["A", "B"]}, {"op": "unsubscribe", "tickers": ["A"]})
    assert fewer.wanted() == {"tickers": ["B"], "channels": None}
    assert wishes({"op": "subscribe"}, {"op": "unsubscribe"}).wanted() == {"tickers": [], "channels": []}


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("no json", "malformed"),
        ("[]", "Expected `object`"),
        ('{"op":"dance"}', "unknown op 'dance'; known: subscribe, unsubscribe"),
        ('{"tickers":["A"]}', "missing required field `op`"),
        ('{"op":"subscribe","symbols":["A"]}', "unknown field `symbols`"),
        ('{"op":"subscribe","tickers":"A"}', "Expected `array | null`"),
        ('{"op":"subscribe","channels":["trades"]}', "unknown channels ['trades']; known: ['market_lifecycle_v2'"),
        ('{"op":"subscribe","channels":["session"]}', "unknown channels ['session']"),
        ('{"op":"unsubscribe","tickers":["A"],"channels":["trade"]}', "tickers or channels, not both"),
        ('{"op":"subscribe","tickers":["A","B","C","D"]}', "more than 3 tickers"),
    ],
)
async def test_a_bad_request_is_answered_and_changes_nothing(
    connect: Connect, monkeypatch: pytest.MonkeyPatch, text: str, said: str
) -> None:
    """The answer says what was wrong, and the connection stays."""
    monkeypatch.setattr(gateway_module, "MAX_TICKERS", 3)
    socket = await connect()
    before = await ask(socket, op="subscribe", tickers=[])
    await socket.send_str(text)
    answer = await next_message(socket)
    assert answer["type"] == "error"
    assert said in answer["error"]
    await socket.send_bytes(b'{"op":"subscribe"}')
    assert "text message" in (await next_message(socket))["error"]
    assert await ask(socket, op="unsubscribe", tickers=["X"]) == before


async def test_tickers_cannot_be_taken_out_of_all(connect: Connect) -> None:
    """Who wants all but some is told how to say it."""
    socket = await connect()
    await ask(socket, op="subscribe")
    answer = await ask(socket, op="unsubscribe", tickers=["A"])
    assert "all tickers are subscribed" in answer["error"]


async def test_a_request_that_is_too_large_ends_only_its_own_connection(connect: Connect) -> None:
    """A message beyond the limit is answered with close code 1009."""
    large, other = await connect(), await connect()
    await large.send_str(" " * (gateway_module.MAX_REQUEST_BYTES + 1))
    message = await large.receive(10)
    assert (message.type, large.close_code) == (aiohttp.WSMsgType.CLOSE, 1009)
    assert (await ask(other, op="subscribe"))["type"] == "subscribed"


async def test_a_client_that_does_not_read_loses_events_and_delays_nobody(
    stores: Stores, gateway: Gateway, connect: Connect, recording: Recording, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The slow one is told how many it lost, in their place; the fast one gets everything meanwhile."""
    monkeypatch.setattr(gateway_module, "MAX_QUEUED", 100)
    slow, fast = await connect(), await connect()
    for socket in (slow, fast):
        await ask(socket, op="subscribe")
    total, per_batch = 0, 50
    while gateway._status()["dropped"] < 200:
        for seq in range(per_batch):
            recording.frame("trade", seq=total + seq, pad="x" * 20_000)
        total += per_batch
        recording.recorder.flush()
        await publish(stores, recording)
        got = await events(fast, per_batch)
        assert [event["wire"]["seq"] for event in got] == list(range(total - per_batch, total))
        assert total < 20_000
    dropped = gateway._status()["dropped"]
    received: list[int | None] = []
    while len(received) < total:
        message = await next_message(slow)
        if message["type"] == "dropped":
            assert message["count"] > 0
            received += [None] * message["count"]
        else:
            assert message["wire"]["seq"] == len(received)
            received.append(message["wire"]["seq"])
    assert received.count(None) == dropped
    recording.frame("trade", seq=total)
    recording.recorder.flush()
    await publish(stores, recording)
    for socket in (slow, fast):
        assert (await next_message(socket))["wire"]["seq"] == total


def test_what_waits_for_a_client_is_bounded_in_bytes_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """Large events are dropped before there are many of them; a single one is kept however large it is."""
    monkeypatch.setattr(gateway_module, "MAX_QUEUED_BYTES", 1_000)
    client = wishes()
    for _ in range(10):
        client.put("x" * 300)
    assert (len(client._queue), client.dropped) == (3, 7)
    client.put("x" * 5_000)
    assert (len(client._queue), client.dropped) == (1, 10)


async def test_a_burst_is_passed_on_whole_to_a_client_that_reads(
    stores: Stores, connect: Connect, recording: Recording, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Batches that wait in the stream are read in large steps; the senders get their turn in between."""
    monkeypatch.setattr(gateway_module, "MAX_QUEUED", 300)
    socket = await connect()
    await ask(socket, op="subscribe")
    for seq in range(5_000):
        recording.frame("trade", seq=seq)
        if seq % 100 == 99:
            recording.recorder.flush()
    await publish_at_once(stores, recording)
    assert [event["wire"]["seq"] for event in await events(socket, 5_000)] == list(range(5_000))


async def test_what_the_gateway_passed_over_is_told_to_all(
    stores: Stores, connect: Connect, recording: Recording, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A gateway that lags skips to what is new and says how many batches that cost."""
    monkeypatch.setattr("ssmd_dagster.stores.stream._MAX_LAG", 20)
    monkeypatch.setattr("ssmd_dagster.stores.stream._CONSUME_BATCH", 10)
    socket = await connect()
    await ask(socket, op="subscribe")
    for seq in range(400):
        recording.frame("trade", seq=seq)
        recording.recorder.flush()
    await publish_at_once(stores, recording)
    seen = 0
    while seen < 400:
        message = await next_message(socket)
        seen += message["batches"] if message["type"] == "dropped" else 1
        if message["type"] == "dropped":
            break
    else:
        pytest.skip("this host was too quick to lag")
    assert message["batches"] > 20


async def test_what_is_no_batch_is_counted_and_stops_nothing(
    stores: Stores, gateway: Gateway, connect: Connect, recording: Recording
) -> None:
    """Junk in the stream costs clients nothing but the junk."""
    socket = await connect()
    await ask(socket, op="subscribe")
    recording.frame("trade")
    recording.recorder.flush()
    (encoded,) = recording.batches()
    spoilt = bytearray(encoded)
    spoilt[20] ^= 1
    for number, junk in enumerate((b"", b"junk", bytes(spoilt))):
        await (await stores.raw_stream.publish(junk, date=DATE, channel="trade", conn="junk", batch=number, records=1))
    await publish(stores, recording)
    assert (await next_message(socket))["n"] == 0
    assert gateway._status()["damaged_batches"] == 3


async def test_what_nobody_wants_is_not_unpacked(
    stores: Stores, gateway: Gateway, connect: Connect, recording: Recording
) -> None:
    """A batch of a channel that no client has subscribed is passed over unread: spoilt records in it go unnoticed."""
    socket = await connect()
    await ask(socket, op="subscribe", channels=["ticker"])
    for name in ("trade", "ticker"):
        recording.frame(name)
    recording.recorder.flush()
    spoilt, whole = (bytearray(encoded) for encoded in recording.batches())
    spoilt[20] ^= 1
    for channel, data in (("trade", spoilt), ("ticker", whole)):
        taken = await stores.raw_stream.publish(bytes(data), date=DATE, channel=channel, conn="c", batch=0, records=1)
        await taken
    assert (await next_message(socket))["channel"] == "ticker"
    assert gateway._status()["damaged_batches"] == 0


async def test_health_says_how_the_gateway_fares(
    setting: Setting, stores: Stores, gateway: Gateway, connect: Connect, recording: Recording
) -> None:
    """`GET /v1/health` is JSON with environment, clients, events and drops."""
    socket = await connect()
    await ask(socket, op="subscribe")
    recording.frame("trade")
    recording.recorder.flush()
    await publish(stores, recording)
    await next_message(socket)
    async with aiohttp.ClientSession() as session:
        async with session.get(f"http://127.0.0.1:{gateway.port}/v1/health") as answer:
            health = await answer.json()
        async with session.get(f"http://127.0.0.1:{gateway.port}/v1/stream") as answer:
            assert answer.status == 400
        async with session.get(f"http://127.0.0.1:{gateway.port}/v1/nothing") as answer:
            assert answer.status == 404
    assert {key: health[key] for key in ("status", "environment", "clients", "events", "dropped", "last_event_ns")} == {
        "status": "ok",
        "environment": setting.env.name,
        "clients": 1,
        "events": 1,
        "dropped": 0,
        "last_event_ns": recording.recorder.last_frame_ns,
    }


async def drain(stores: Stores, env: str, **arguments: Any) -> dict[str, Any]:
    """Ask for a drain as the end of a day does."""
    return await request(stores.nc, control_subject(env, "gateway"), "drain", date=DATE, **arguments)


async def closed_with(socket: Socket) -> tuple[list[dict[str, Any]], int | None, str]:
    """Read to the end and return the messages, the close code and its reason."""
    messages = []
    while (message := await socket.receive(10)).type is aiohttp.WSMsgType.TEXT:
        messages.append(json.loads(message.data))
    assert message.type is aiohttp.WSMsgType.CLOSE
    return messages, socket.close_code, str(message.extra)


async def test_a_drain_gives_clients_what_is_queued_and_closes_them_with_1001(
    setting: Setting, stores: Stores, connect: Connect, recording: Recording
) -> None:
    """Every event, then the end of the day, then a close frame with the reason."""
    socket = await connect()
    await ask(socket, op="subscribe")
    for seq in range(200):
        recording.frame("trade", seq=seq, pad="x" * 2_000)
    recording.recorder.flush()
    await publish(stores, recording)
    first = await next_message(socket)
    draining = asyncio.create_task(drain(stores, setting.env.name, close=True))
    messages, code, reason = await closed_with(socket)
    assert (await draining)["clients"] == 0
    assert [message.get("n") for message in [first, *messages]] == [*range(200), None]
    assert messages[-1] == {"type": "day_ended", "reason": f"trading day {DATE} ended"}
    assert (code, reason) == (1001, f"trading day {DATE} ended")


async def test_a_drain_before_a_roll_leaves_clients_connected(
    setting: Setting, stores: Stores, connect: Connect, recording: Recording
) -> None:
    """They are told, and get the next day's events on the same connection."""
    socket = await connect()
    await ask(socket, op="subscribe")
    assert (await drain(stores, setting.env.name))["clients"] == 1
    assert (await next_message(socket))["type"] == "day_ended"
    recording.frame("trade")
    recording.recorder.flush()
    await publish(stores, recording)
    assert (await next_message(socket))["type"] == "event"


async def test_a_client_that_does_not_read_does_not_hold_up_the_end_of_a_day(
    setting: Setting,
    stores: Stores,
    gateway: Gateway,
    connect: Connect,
    recording: Recording,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The drain is answered before whoever asked gives up, and a client that reads has everything by then."""
    assert DRAIN_TIMEOUT_S + CLOSE_TIMEOUT_S < ANSWER_TIMEOUT_S
    monkeypatch.setattr(gateway_module, "MAX_QUEUED", 50)
    slow, fast = await connect(), await connect()
    for socket in (slow, fast):
        await ask(socket, op="subscribe")
    while gateway._status()["dropped"] == 0:
        for _ in range(20):
            recording.frame("trade", pad="x" * 50_000)
        recording.recorder.flush()
        await publish(stores, recording)
        await events(fast, 20)
    began = time.monotonic()
    draining = asyncio.create_task(drain(stores, setting.env.name, close=True))
    messages, code, _ = await closed_with(fast)
    await draining
    assert DRAIN_TIMEOUT_S < time.monotonic() - began < ANSWER_TIMEOUT_S
    assert ([message["type"] for message in messages], code) == (["day_ended"], 1001)


async def test_a_gateway_that_stops_says_goodbye_and_comes_back_on_its_port(setting: Setting, stores: Stores) -> None:
    """Clients are closed with 1001; the next gateway listens where the last one did, or elsewhere if that is taken."""
    async with aiohttp.ClientSession() as session:
        async with serving(setting, stores) as first:
            socket = await session.ws_connect(f"http://127.0.0.1:{first.port}/v1/stream")
            await ask(socket, op="subscribe")
            reading = asyncio.create_task(closed_with(socket))
        messages, code, _ = await reading
        assert ([message["type"] for message in messages], code) == (["day_ended"], 1001)
        path = gateway_file(setting.home, setting.env.name)
        assert path.read_text() == str(first.port)
        async with serving(setting, stores) as second:
            assert second.port == first.port
            async with serving(setting, stores) as third:
                assert third.port not in (0, second.port)
        path.write_text("")  # cut off while it was written
        async with serving(setting, stores) as fourth:
            assert fourth.port > 0


async def test_the_gateway_answers_what_it_is_asked(setting: Setting, stores: Stores, gateway: Gateway) -> None:
    """`status` carries the status, anything else is refused in words."""
    subject = control_subject(setting.env.name, "gateway")
    assert (await request(stores.nc, subject, "status"))["port"] == gateway.port
    with pytest.raises(SsmdError, match="unknown command `dance`"):
        await request(stores.nc, subject, "dance")


async def test_too_many_clients_are_turned_away(connect: Connect, monkeypatch: pytest.MonkeyPatch) -> None:
    """Beyond the limit the answer is 503."""
    monkeypatch.setattr(gateway_module, "MAX_CLIENTS", 2)
    sockets: Sequence[Socket] = [await connect(), await connect()]
    with pytest.raises(aiohttp.WSServerHandshakeError) as caught:
        await connect()
    assert caught.value.status == 503
    assert not any(socket.closed for socket in sockets)
