"""The WebSocket side: what a recorder sees, and whether the truth log says the same."""

from __future__ import annotations

import asyncio
import hashlib
import random
import time
from functools import partial
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from ssmd_dagster.simulator.main import WS_PATH
from ssmd_dagster.simulator.truth import Frame, Note, read_truth
from ssmd_dagster_tests.simulator.conftest import DEADLINE_S, Client, Running, running, sign

ALL = ("orderbook_delta", "trade", "ticker", "market_lifecycle_v2")


class Books:
    """Rebuilds books from frames, as a recorder would, and complains about anything impossible."""

    def __init__(self) -> None:
        self.levels: dict[str, dict[tuple[str, str], int]] = {}
        self.clocks: dict[str, int] = {}

    def apply(self, frame: dict[str, Any]) -> None:
        """Take a snapshot or a delta."""
        if frame["type"] not in ("orderbook_snapshot", "orderbook_delta"):
            return
        msg = frame["msg"]
        ticker = msg["market_ticker"]
        if frame["type"] == "orderbook_snapshot":
            assert msg["clock"] >= self.clocks.get(ticker, 0)
            levels: dict[tuple[str, str], int] = {}
            for side in ("yes", "no"):
                rows = msg.get(f"{side}_dollars_fp")
                assert rows != [], "an empty side is absent"
                assert rows is None or rows == sorted(rows)
                levels |= {(side, price): hundredths(count) for price, count in rows or []}
            self.levels[ticker] = levels
        else:
            assert msg["clock"] > 0
            assert msg["clock"] >= self.clocks[ticker], "a delta before its snapshot, or a clock that goes down"
            key = msg["side"], msg["price_dollars"]
            count = self.levels[ticker].get(key, 0) + hundredths(msg["delta_fp"])
            assert count >= 0, "a level below zero"
            if count:
                self.levels[ticker][key] = count
            else:
                del self.levels[ticker][key]
        self.clocks[ticker] = msg["clock"]

    def rest(self, ticker: str) -> dict[str, list[list[str]]]:
        """Return a book as `/sim/book` writes it."""
        rows: dict[str, list[list[str]]] = {"yes_dollars": [], "no_dollars": []}
        for (side, price), count in sorted(self.levels[ticker].items()):
            rows[f"{side}_dollars"].append([price, f"{count // 100}.{count % 100:02d}"])
        return rows


def hundredths(text: str) -> int:
    """Read a count of contracts."""
    whole, fraction = text.split(".")
    assert len(fraction) == 2
    return int(whole + fraction)


def check_sequences(frames: list[dict[str, Any]]) -> None:
    """Every sid counts its frames from 1 without a hole."""
    last: dict[int, int] = {}
    for frame in frames:
        if "seq" in frame:
            assert frame["seq"] == last.get(frame["sid"], 0) + 1, frame
            last[frame["sid"]] = frame["seq"]


def has_deltas(client: Client, count: int) -> bool:
    """Return True once a client has more than some deltas."""
    return len(client.of("orderbook_delta")) > count


async def drain(client: Client) -> None:
    """Read until the exchange has closed the socket."""
    deadline_s = time.monotonic() + DEADLINE_S
    while not client.ended and time.monotonic() < deadline_s:
        await asyncio.sleep(0.005)
    assert client.ended


async def test_a_book_from_the_socket_equals_the_exchange(exchange: Running) -> None:
    """Snapshots and deltas give the exchange's own book, without a gap, a dip below zero or a clock that goes down."""
    client = await exchange.connect()
    tickers = await exchange.open_tickers("KXBTCD")
    await client.subscribe("orderbook_delta", market_tickers=tickers)
    await client.wait(lambda: len(client.of("orderbook_delta")) > 500)
    await exchange.simulator.stop_moving()
    last = await exchange.get(f"/sim/book/{tickers[0]}")
    await client.until(lambda frame: frame["type"] == "orderbook_delta" and frame["msg"]["clock"] == last["clock"])
    await asyncio.sleep(0.05)
    books = Books()
    for frame in client.frames:
        books.apply(frame)
    check_sequences(client.frames)
    for ticker in tickers:
        truth = await exchange.get(f"/sim/book/{ticker}")
        assert books.rest(ticker) == {key: truth[key] for key in ("yes_dollars", "no_dollars")}


async def test_the_truth_log_has_every_received_frame_in_order(tmp_path: Path) -> None:
    """Hash for hash, with sid, seq, type and market; nothing more, since the client read to the end."""
    async with running(tmp_path) as exchange:
        client = await exchange.connect()
        tickers = await exchange.open_tickers("INXD", 20)
        await client.subscribe("orderbook_delta", "trade", "ticker", market_tickers=tickers)
        await client.subscribe("market_lifecycle_v2")
        await client.wait(lambda: len(client.frames) > 1_000)
        await exchange.simulator.stop_moving()
        exchange.simulator.engine.connections[next(iter(exchange.simulator.engine.connections))].close()
        await drain(client)
    logged = [entry for entry in read_truth(tmp_path / "truth") if isinstance(entry, Frame)]
    assert [entry.sha256 for entry in logged] == [hashlib.sha256(raw).digest() for raw in client.raw]
    for entry, frame in zip(logged, client.frames, strict=True):
        assert entry.type == frame["type"]
        assert entry.seq == frame.get("seq", 0)
        assert entry.sid == frame.get("sid", 0)
        msg = frame["msg"]
        assert entry.market == (msg.get("market_ticker", "") if isinstance(msg, dict) else "")
        if "ts_ms" in msg:
            assert entry.event_ns == msg["ts_ms"] * 1_000_000
    notes = [entry.note for entry in read_truth(tmp_path / "truth") if isinstance(entry, Note)]
    assert notes[0] == "started"
    assert {"opened", "closed"} <= set(notes)


async def test_every_trade_has_its_delta_and_is_listed(exchange: Running) -> None:
    """A trade comes with a delta of its market at the same millisecond, and REST lists it under the same id."""
    client = await exchange.connect()
    tickers = await exchange.open_tickers("KXBTCD", 10)
    await client.subscribe("orderbook_delta", market_tickers=tickers)
    await client.wait(lambda: len(client.of("orderbook_snapshot")) == len(tickers))
    await client.subscribe("trade", market_tickers=tickers)
    await client.wait(lambda: len(client.of("trade")) > 50)
    await exchange.simulator.stop_moving()
    await asyncio.sleep(0.05)
    deltas = {
        (frame["msg"]["market_ticker"], frame["msg"]["ts_ms"], frame["msg"]["price_dollars"], frame["msg"]["delta_fp"])
        for frame in client.of("orderbook_delta")
    }
    trades = client.of("trade")
    for frame in trades:
        msg = frame["msg"]
        price = msg["no_price_dollars"] if msg["taker_outcome_side"] == "yes" else msg["yes_price_dollars"]
        assert (msg["market_ticker"], msg["ts_ms"], price, f"-{msg['count_fp']}") in deltas
    listed: dict[str, dict[str, Any]] = {}
    cursor = ""
    while True:
        page = await exchange.get("/markets/trades", limit=100, cursor=cursor)
        listed |= {row["trade_id"]: row for row in page["trades"]}
        cursor = page["cursor"]
        if not cursor:
            break
    for frame in trades:
        row = listed[frame["msg"]["trade_id"]]
        assert row["ticker"] == frame["msg"]["market_ticker"]
        assert row["count_fp"] == frame["msg"]["count_fp"]
    assert len({frame["msg"]["trade_id"] for frame in trades}) == len(trades)


async def test_an_unsigned_handshake_is_refused_as_kalshi_does(exchange: Running) -> None:
    """No headers, a wrong signature, a wrong key and an old timestamp each give 401 and Kalshi's code."""
    good = sign(exchange.home, "GET", WS_PATH)
    old_ms = time.time_ns() // 1_000_000 - 3_600_000
    attempts = {
        "nothing": ({}, "token_authentication_failure"),
        "key": ({**good, "KALSHI-ACCESS-KEY": "someone-else"}, "token_authentication_failure"),
        "signature": ({**good, "KALSHI-ACCESS-SIGNATURE": "bm9wZQ=="}, "token_authentication_failure"),
        "garbage": ({**good, "KALSHI-ACCESS-SIGNATURE": "!"}, "token_authentication_failure"),
        "old": (sign(exchange.home, "GET", WS_PATH, stamp_ms=old_ms), "header_timestamp_expired"),
        "time": ({**good, "KALSHI-ACCESS-TIMESTAMP": "yesterday"}, "header_timestamp_invalid"),
    }
    for headers, code in attempts.values():
        with pytest.raises(aiohttp.WSServerHandshakeError) as refused:
            await exchange.connect(headers=headers)
        assert refused.value.status == 401
        url = exchange.simulator.endpoint.replace("ws://", "http://")
        async with exchange.http.get(url, headers=headers) as response:
            assert response.status == 401
            assert (await response.json())["code"] == code


async def test_repeated_subscribes_share_one_sid(exchange: Running) -> None:
    """The first is answered by `subscribed`, the others by `ok` with the full list, which takes a seq."""
    client = await exchange.connect()
    tickers = await exchange.open_tickers("KXBTCD", 6)
    for ticker in tickers:
        await client.send("subscribe", channels=["orderbook_delta"], market_ticker=ticker)
    await client.wait(lambda: len(client.of("orderbook_snapshot")) == len(tickers))
    assert len(client.of("subscribed")) == 1
    assert "seq" not in client.of("subscribed")[0]
    oks = client.of("ok")
    assert len(oks) == len(tickers) - 1
    assert {frame["sid"] for frame in oks} == {1}
    assert set(oks[-1]["msg"]["market_tickers"]) == set(tickers)
    check_sequences(client.frames)


async def test_answers_come_out_of_order(tmp_path: Path) -> None:
    """Commands that follow each other closely are not answered in their order."""
    async with running(tmp_path, limits={"answer_delay_s": 0.02}) as exchange:
        client = await exchange.connect()
        sent = [await client.send("list_subscriptions") for _ in range(30)]
        await client.wait(lambda: len(client.of("ok")) == len(sent))
        got = [frame["id"] for frame in client.of("ok")]
        assert sorted(got) == sent
        assert got != sent


async def test_subscriptions_can_be_changed_and_ended(exchange: Running) -> None:
    """Markets are added, taken away, shown again on request; `unsubscribed` takes a seq and is the last of its sid."""
    client = await exchange.connect()
    tickers = await exchange.open_tickers("KXBTCD", 4)
    (sid,) = await client.subscribe("orderbook_delta", market_tickers=tickers[:2])
    added = await client.send("update_subscription", sids=[sid], action="add_markets", market_tickers=tickers[2:])
    assert (await client.answer(added))["msg"]["market_tickers"] == tickers
    shown = await client.send("update_subscription", sid=sid, action="get_snapshot", market_tickers=tickers[:2])
    await client.wait(lambda: len(client.answers(shown)) == 2)
    assert {frame["type"] for frame in client.answers(shown)} == {"orderbook_snapshot"}
    removed = await client.send("update_subscription", sid=sid, action="delete_markets", market_ticker=tickers[0])
    answer = await client.answer(removed)
    assert answer["msg"]["market_tickers"] == tickers[1:]
    await client.wait(lambda: client.frames[-1].get("seq", 0) > answer["seq"] + 100)
    later = [frame for frame in client.frames if frame.get("seq", 0) > answer["seq"]]
    assert tickers[0] not in {frame["msg"]["market_ticker"] for frame in later}
    listed = await client.send("list_subscriptions")
    assert (await client.answer(listed))["msg"] == [{"channel": "orderbook_delta", "sid": sid}]
    ended = await client.send("unsubscribe", sids=[sid, 99])
    await client.wait(lambda: len(client.answers(ended)) == 2)
    assert {frame["type"] for frame in client.answers(ended)} == {"unsubscribed", "error"}
    check_sequences(client.frames)
    assert [frame for frame in client.frames if frame.get("sid") == sid][-1]["type"] == "unsubscribed"


@pytest.mark.parametrize(
    ("raw", "code"),
    [
        ("nonsense", 1),
        ('{"id":77}', 5),
        ('{"id":77,"cmd":"dance","params":{}}', 5),
        ('{"id":77,"cmd":"subscribe"}', 2),
        ('{"id":77,"cmd":"subscribe","params":{}}', 3),
        ('{"id":77,"cmd":"subscribe","params":{"channels":["nope"]}}', 8),
        ('{"id":77,"cmd":"subscribe","params":{"channels":["orderbook_delta"]}}', 14),
        ('{"id":77,"cmd":"subscribe","params":{"channels":["trade"],"market_ticker":"A","market_tickers":["B"]}}', 11),
        ('{"id":77,"cmd":"subscribe","params":{"channels":["trade"],"market_tickers":[1]}}', 11),
        ('{"id":77,"cmd":"unsubscribe","params":{}}', 4),
        ('{"id":77,"cmd":"unsubscribe","params":{"sids":[5]}}', 7),
        ('{"id":77,"cmd":"update_subscription","params":{"action":"add_markets"}}', 12),
        ('{"id":77,"cmd":"update_subscription","params":{"sids":[1,2],"action":"add_markets"}}', 12),
        ('{"id":77,"cmd":"update_subscription","params":{"sid":9,"action":"add_markets"}}', 7),
    ],
)
async def test_wrong_commands_get_their_code(exchange: Running, raw: str, code: int) -> None:
    """Each wrong command is answered by one error, and the connection lives on."""
    client = await exchange.connect()
    await client.socket.send_str(raw)
    error = await client.until(lambda frame: frame["type"] == "error")
    assert error["msg"]["code"] == code
    assert isinstance(error["msg"]["msg"], str)
    await client.subscribe("trade")


async def test_no_nonsense_ends_a_connection(tmp_path: Path) -> None:
    """Whatever a client sends, it gets answers or silence, and the exchange lives on."""
    rng = random.Random(1)
    values: list[Any] = [
        None,
        True,
        -1,
        0,
        1,
        2.5,
        10**30,
        "",
        "trade",
        "KXBTCD",
        [],
        ["trade"],
        [1],
        [None],
        {},
        {"a": 1},
    ]
    keys = ["id", "cmd", "params"]
    names = ["channels", "market_tickers", "market_ticker", "market_ids", "sids", "sid", "action", "index_ids"]
    actions = ["subscribe", "unsubscribe", "update_subscription", "list_subscriptions"]
    async with running(tmp_path, limits={"answer_delay_s": 0.0}) as exchange:
        client = await exchange.connect()
        for raw in ("[" * 100_000, '{"a":' * 100_000, "\ud800", "{}", "[]", "1e999", "\x00"):
            await client.socket.send_str(raw.encode("utf-8", "replace").decode())
        await client.socket.send_bytes(b"\xff\xfe")
        for _ in range(400):
            told: dict[str, Any] = {key: rng.choice(values) for key in rng.sample(keys, rng.randint(0, 3))}
            if rng.random() < 0.8:
                told["cmd"] = rng.choice(actions)
                told["params"] = {name: rng.choice(values) for name in rng.sample(names, rng.randint(0, 5))}
                if rng.random() < 0.3:
                    told["params"]["channels"] = [rng.choice(["trade", "orderbook_delta", "ticker", 7, "pyth_value"])]
            await client.socket.send_json(told)
        last = await client.send("list_subscriptions")
        assert last == 1
        await client.socket.send_json({"id": 987_654, "cmd": "list_subscriptions"})
        assert (await client.answer(987_654))["type"] == "ok"
        assert not client.ended


async def test_wrong_updates_are_scoped_and_take_a_seq(exchange: Running) -> None:
    """An error about a subscription names its sid and takes a number of its sequence."""
    client = await exchange.connect()
    (sid,) = await client.subscribe("market_lifecycle_v2")
    for params in ({}, {"action": "fly"}, {"action": "add_markets"}):
        command_id = await client.send("update_subscription", sid=sid, **params)
        answer = await client.answer(command_id)
        assert answer["type"] == "error"
        assert answer["sid"] == sid
    (sid,) = await client.subscribe("trade", market_ticker="A-B")
    codes = []
    add = {"action": "add_markets"}
    for params in ({}, {"action": "get_snapshot"}, add, {**add, "market_id": "x"}):
        answer = await client.answer(await client.send("update_subscription", sid=sid, **params))
        codes.append(answer["msg"]["code"])
    assert codes == [15, 13, 14, 11]
    check_sequences(client.frames)


async def test_clocks_are_equal_on_every_connection(exchange: Running) -> None:
    """Two connections see the same changes of a market with the same clocks, in the same order."""
    ticker = (await exchange.open_tickers("KXBTCD", 1))[0]
    first, second = await exchange.connect(), await exchange.connect()
    for client in (first, second):
        await client.subscribe("orderbook_delta", market_ticker=ticker, use_yes_price=client is second)
        await client.wait(partial(has_deltas, client, 30))
    await exchange.simulator.stop_moving()
    await asyncio.sleep(0.05)
    from_clock = second.of("orderbook_snapshot")[0]["msg"]["clock"]
    seen = [
        [
            (frame["msg"]["clock"], frame["msg"]["side"], frame["msg"]["delta_fp"])
            for frame in client.of("orderbook_delta")
            if frame["msg"]["clock"] > from_clock
        ]
        for client in (first, second)
    ]
    assert seen[0] == seen[1]
    assert len(seen[0]) > 10


async def test_use_yes_price_mirrors_the_no_side_only(exchange: Running) -> None:
    """On the yes scale a no price is one dollar less the no-leg price, in snapshots and in deltas."""
    ticker = (await exchange.open_tickers("INXD", 1))[0]
    plain, mirrored = await exchange.connect(), await exchange.connect()
    await exchange.simulator.stop_moving()
    await plain.subscribe("orderbook_delta", market_ticker=ticker)
    await mirrored.subscribe("orderbook_delta", market_ticker=ticker, use_yes_price=True)
    one = (await plain.until(lambda frame: frame["type"] == "orderbook_snapshot"))["msg"]
    two = (await mirrored.until(lambda frame: frame["type"] == "orderbook_snapshot"))["msg"]
    assert one.get("yes_dollars_fp") == two.get("yes_dollars_fp")
    flipped = sorted([f"{1 - float(price):.4f}", count] for price, count in one.get("no_dollars_fp", []))
    assert flipped == two.get("no_dollars_fp", [])


async def test_pings_say_heartbeat_and_a_missing_pong_drops_the_connection(tmp_path: Path) -> None:
    """A client that does not answer is cut; one that does stays."""
    async with running(tmp_path, limits={"ping_interval_s": 0.1, "pong_timeout_s": 0.2}) as exchange:
        good = await exchange.connect()
        socket = await exchange.http.ws_connect(
            exchange.simulator.endpoint, headers=sign(exchange.home, "GET", WS_PATH), autoping=False
        )
        message = await socket.receive(timeout=DEADLINE_S)
        assert message.type is aiohttp.WSMsgType.PING
        assert bytes(message.data) == b"heartbeat"
        kinds: list[aiohttp.WSMsgType] = [message.type]
        while kinds[-1] is aiohttp.WSMsgType.PING:
            kinds.append((await socket.receive(timeout=DEADLINE_S)).type)
        assert kinds[-1] in (aiohttp.WSMsgType.CLOSED, aiohttp.WSMsgType.ERROR, aiohttp.WSMsgType.CLOSE)
        assert not good.ended
        await socket.close()


async def test_limits_of_markets_and_commands_have_their_codes(tmp_path: Path) -> None:
    """Too many markets give code 26, too many commands code 27; the subscription lives on."""
    limits = {"markets_per_subscription": 3, "commands_per_second": 5, "answer_delay_s": 0.0}
    async with running(tmp_path, limits=limits) as exchange:
        client = await exchange.connect()
        tickers = await exchange.open_tickers("KXBTCD", 5)
        (sid,) = await client.subscribe("orderbook_delta", market_tickers=tickers[:2])
        command_id = await client.send("update_subscription", sid=sid, action="add_markets", market_tickers=tickers[2:])
        assert (await client.answer(command_id))["msg"]["code"] == 26
        for _ in range(8):
            await client.send("update_subscription", sid=sid, action="get_snapshot", market_tickers=tickers[:1])
        await client.until(lambda frame: frame["type"] == "error" and frame["msg"]["code"] == 27)
        await client.until(lambda frame: frame["type"] == "orderbook_delta")
        check_sequences(client.frames)


async def test_a_slow_reader_loses_its_subscription(tmp_path: Path) -> None:
    """Once too much lies unread the busiest subscription ends with code 25; the socket lives on."""
    async with running(tmp_path, rate=100_000.0, limits={"buffer_bytes": 100_000}) as exchange:
        client = await exchange.connect()
        tickers = await exchange.open_tickers("KXBTCD", 100)
        await client.subscribe("orderbook_delta", market_tickers=tickers)
        assert client.socket._conn is not None
        transport = client.socket._conn.transport
        assert transport is not None
        transport.pause_reading()
        connection = next(iter(exchange.simulator.engine.connections.values()))
        deadline_s = time.monotonic() + DEADLINE_S
        while connection.subscriptions and time.monotonic() < deadline_s:
            await asyncio.sleep(0.01)
        assert not connection.subscriptions
        transport.resume_reading()
        error = await client.until(lambda frame: frame["type"] == "error")
        assert error["msg"]["code"] == 25
        check_sequences(client.frames)
        await client.subscribe("trade")


async def test_everything_can_be_had_without_a_filter(exchange: Running) -> None:
    """Trades and tickers without a filter cover all series; tickers carry no seq."""
    client = await exchange.connect()
    await client.subscribe("trade", "ticker")
    await client.wait(lambda: len(client.of("trade")) > 100 and len(client.of("ticker")) > 100)
    assert all("seq" not in frame for frame in client.of("ticker"))
    series = {frame["msg"]["market_ticker"].split("-")[0] for frame in client.of("trade")}
    assert len(series) >= 3
