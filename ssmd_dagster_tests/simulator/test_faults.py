"""What the exchange breaks on purpose, and that the truth log stays exact while it does."""

from __future__ import annotations

import asyncio
import hashlib
import itertools
import time
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from ssmd_dagster.simulator.faults import ALL_KINDS, FRAME_KINDS
from ssmd_dagster.simulator.truth import Frame, Note, read_truth
from ssmd_dagster.simulator.world import rfc3339
from ssmd_dagster_tests.simulator.conftest import Client, Running, running


async def _subscribed(exchange: Running) -> tuple[Client, list[str]]:
    client = await exchange.connect()
    tickers = await exchange.open_tickers("KXBTCD", 10)
    await client.subscribe("orderbook_delta", market_tickers=tickers)
    await client.subscribe("trade")
    await client.wait(lambda: len(client.of("orderbook_delta")) > 20)
    return client, tickers


async def _finish(exchange: Running, client: Client) -> None:
    """Stop the exchange's time, close from its side, and read to the end."""
    await exchange.simulator.stop_moving()
    for connection in list(exchange.simulator.engine.connections.values()):
        connection.close()
    await client.wait(lambda: client.ended)


def _frames(home: Path, *, fault: int | None = None) -> list[Frame]:
    logged = [entry for entry in read_truth(home / "truth") if isinstance(entry, Frame)]
    return [entry for entry in logged if fault is None or entry.fault == fault]


def _notes(home: Path, note: str) -> list[dict[str, Any]]:
    return [entry.data for entry in read_truth(home / "truth") if isinstance(entry, Note) and entry.note == note]


def _gaps(client: Client, sid: int) -> list[int]:
    """Return the sequence numbers of a sid that did not come."""
    seen = {frame["seq"] for frame in client.frames if frame.get("sid") == sid and isinstance(frame.get("seq"), int)}
    return sorted(set(range(1, max(seen) + 1)) - seen)


@pytest.mark.parametrize("kind", FRAME_KINDS)
async def test_the_log_is_exact_while_frames_are_altered(tmp_path: Path, kind: str) -> None:
    """Whatever is done to the frames, the log holds the hashes of what came, in its order, and marks what was altered."""
    async with running(tmp_path) as exchange:
        client, _ = await _subscribed(exchange)
        answer = await exchange.post("/sim/faults", fault=kind, count=7, delay_s=0.05, size=200_000)
        number = answer["number"]
        before = len(client.frames)
        await client.wait(lambda: len(client.frames) > before + 2_000)
        await _finish(exchange, client)
    hashes = [hashlib.sha256(raw).digest() for raw in client.raw]
    assert [entry.sha256 for entry in _frames(tmp_path)] == hashes
    (fault,) = _notes(tmp_path, "fault")
    assert fault["fault"] == kind
    assert fault["number"] == number
    altered = _frames(tmp_path, fault=number)
    assert len(altered) == {"sequence_jump": 0, "reorder": 14}.get(kind, 7)


async def test_a_sequence_jump_is_a_hole_of_exactly_so_many(tmp_path: Path) -> None:
    """The frames that never come are listed in the log, and nothing else is missing."""
    async with running(tmp_path) as exchange:
        client, _ = await _subscribed(exchange)
        await exchange.post("/sim/faults", fault="sequence_jump", count=12, channel="orderbook_delta")
        before = len(client.frames)
        await client.wait(lambda: len(client.frames) > before + 500)
        await _finish(exchange, client)
    withheld = [frame for note in _notes(tmp_path, "withheld") for frame in note["frames"]]
    assert [seq for sid, seq, _ in withheld] == _gaps(client, 1)
    assert len(withheld) == 12
    assert _gaps(client, 2) == []


async def test_duplicates_and_late_frames_are_the_same_bytes(tmp_path: Path) -> None:
    """A duplicate is the same frame twice, a late one the same frame afterwards; no number is lost."""
    async with running(tmp_path) as exchange:
        client, _ = await _subscribed(exchange)
        await exchange.post("/sim/faults", fault="duplicate", count=5, channel="trade")
        await exchange.post("/sim/faults", fault="late", count=5, delay_s=0.2, channel="orderbook_delta")
        before = len(client.frames)
        await client.wait(lambda: len(client.frames) > before + 5_000)
        await _finish(exchange, client)
    assert len(client.raw) - len(set(client.raw)) == 5
    assert _gaps(client, 1) == []
    order = [frame["seq"] for frame in client.frames if frame.get("sid") == 1 and "seq" in frame]
    assert sum(later < earlier for earlier, later in itertools.pairwise(order)) >= 1


async def test_malformed_frames_and_unknown_types_are_logged_as_they_came(tmp_path: Path) -> None:
    """Nonsense is sent and logged byte for byte; an unknown type takes a number of its subscription."""
    async with running(tmp_path) as exchange:
        client, _ = await _subscribed(exchange)
        await exchange.post("/sim/faults", fault="malformed", count=30)
        await exchange.post("/sim/faults", fault="unknown_type", count=3, channel="orderbook_delta")
        await client.wait(lambda: len(client.of("market_weather")) == 3)
        await _finish(exchange, client)
    hashes = [hashlib.sha256(raw).digest() for raw in client.raw]
    assert [entry.sha256 for entry in _frames(tmp_path)] == hashes
    assert len(_frames(tmp_path, fault=1)) == 30
    assert [entry.type for entry in _frames(tmp_path, fault=2)] == ["unknown"] * 3
    assert _gaps(client, 1) == []


async def test_the_cents_era_has_integers_only(exchange: Running) -> None:
    """Frames look as they did before March 2026."""
    client, _ = await _subscribed(exchange)
    await exchange.post("/sim/faults", fault="cents", count=400)
    old = await client.until(lambda frame: frame["type"] == "trade" and "yes_price" in frame["msg"])
    assert isinstance(old["msg"]["yes_price"], int)
    assert isinstance(old["msg"]["count"], int)
    assert not any(key.endswith(("_dollars", "_fp")) for key in old["msg"])
    delta = await client.until(lambda frame: frame["type"] == "orderbook_delta" and "price" in frame["msg"])
    assert isinstance(delta["msg"]["delta"], int)
    assert "clock" not in delta["msg"]


async def test_half_a_snapshot_then_the_end(tmp_path: Path) -> None:
    """The connection closes when some of the snapshots have been sent, and the next one starts afresh at 1."""
    async with running(tmp_path) as exchange:
        tickers = await exchange.open_tickers("KXBTCD", 20)
        await exchange.post("/sim/faults", fault="half_snapshot", connection="next")
        client = await exchange.connect()
        await client.send("subscribe", channels=["orderbook_delta"], market_tickers=tickers)
        await client.wait(lambda: client.ended)
        shown = {frame["msg"]["market_ticker"] for frame in client.of("orderbook_snapshot")}
        assert 0 < len(shown) < len(tickers)
        again = await exchange.connect()
        await again.subscribe("orderbook_delta", market_tickers=tickers)
        await again.wait(lambda: len(again.of("orderbook_snapshot")) == len(tickers))
        assert again.of("orderbook_snapshot")[0]["seq"] == 1


@pytest.mark.parametrize("kind", ["disconnect", "torn_frame"])
async def test_a_cut_connection_is_noted_and_received_frames_are_a_prefix(tmp_path: Path, kind: str) -> None:
    """What a client got is the beginning of what the log says was sent; the note says when the connection ended."""
    async with running(tmp_path) as exchange:
        client, _ = await _subscribed(exchange)
        await exchange.post("/sim/faults", fault=kind)
        await client.wait(lambda: client.ended)
    hashes = [hashlib.sha256(raw).digest() for raw in client.raw]
    sent = [entry.sha256 for entry in _frames(tmp_path)]
    assert sent[: len(hashes)] == hashes
    (closed,) = _notes(tmp_path, "closed")
    assert closed["frames"] == len(sent)


@pytest.mark.parametrize("code", [10, 25])
async def test_a_terminal_error_ends_one_subscription(exchange: Running, code: int) -> None:
    """The error takes the last number of its sid; other subscriptions go on; a new subscription has a new sid."""
    client, tickers = await _subscribed(exchange)
    await exchange.post("/sim/faults", fault="channel_error", code=code, channel="orderbook_delta")
    error = await client.until(lambda frame: frame["type"] == "error")
    assert error["msg"]["code"] == code
    assert error["sid"] == 1
    trades = len(client.of("trade"))
    await client.wait(lambda: len(client.of("trade")) > trades + 20)
    assert max(frame["seq"] for frame in client.frames if frame.get("sid") == 1 and "seq" in frame) == error["seq"]
    assert await client.subscribe("orderbook_delta", market_tickers=tickers) == [3]


@pytest.mark.parametrize("then", ["cut", "resume"])
async def test_a_black_hole_is_silent(tmp_path: Path, then: str) -> None:
    """Nothing comes and nothing is answered; afterwards all of it comes, or the connection is gone."""
    async with running(tmp_path, rate=2_000.0) as exchange:
        client, _ = await _subscribed(exchange)
        await exchange.post("/sim/faults", fault="black_hole", for_s=0.5, then=then)
        await asyncio.sleep(0.1)
        before = len(client.raw)
        await client.send("list_subscriptions")
        await asyncio.sleep(0.2)
        assert len(client.raw) == before
        if then == "cut":
            await client.wait(lambda: client.ended)
            assert _notes(tmp_path, "withheld")
        else:
            await client.wait(lambda: len(client.raw) > before + 100)
            assert _gaps(client, 1) == []
            await _finish(exchange, client)
    hashes = [hashlib.sha256(raw).digest() for raw in client.raw]
    assert [entry.sha256 for entry in _frames(tmp_path)][: len(hashes)] == hashes


async def test_exchange_clocks_can_go_back(exchange: Running) -> None:
    """As over a maintenance: the clock of every market goes down, the sequence goes on."""
    client, tickers = await _subscribed(exchange)
    before = await exchange.get(f"/sim/book/{tickers[0]}")
    await exchange.post("/sim/faults", fault="clock_back", size=1_000_000)
    await client.until(
        lambda frame: (
            frame["type"] == "orderbook_delta"
            and frame["msg"]["market_ticker"] == tickers[0]
            and frame["msg"]["clock"] < before["clock"] - 500_000
        )
    )
    assert _gaps(client, 1) == []


async def test_http_faults_are_met_so_many_times(exchange: Running) -> None:
    """Both bodies of 429, a 5xx, a slow and a cut answer, each as often as asked for and on its path only."""
    for body in ("flat", "nested"):
        await exchange.post("/sim/faults", fault="http_429", count=2, body=body, path="/markets")
        assert (await exchange.get("/exchange/status"))["exchange_active"]
        said = (await exchange.get("/markets", expect=429))["error"]
        assert said == "too many requests" if body == "flat" else said["code"] == "too_many_requests"
        await exchange.get("/markets", expect=429)
        await exchange.get("/markets")
    await exchange.post("/sim/faults", fault="http_5xx", status=502)
    url = f"{exchange.simulator.rest_endpoint}/markets"
    async with exchange.http.get(url) as response:
        assert response.status == 502
    await exchange.post("/sim/faults", fault="http_slow", delay_s=0.3)
    begin_s = time.monotonic()
    await exchange.get("/series")
    assert time.monotonic() - begin_s >= 0.3
    await exchange.post("/sim/faults", fault="http_cut")
    with pytest.raises(aiohttp.ClientError):
        await exchange.get("/markets")
    await exchange.get("/markets")


async def test_a_refused_handshake_and_wrong_orders(exchange: Running) -> None:
    """The handshake is refused as often as asked for; an order that makes no sense is refused with its reason."""
    await exchange.post("/sim/faults", fault="refuse_handshake", status=429)
    with pytest.raises(aiohttp.WSServerHandshakeError) as refused:
        await exchange.connect()
    assert refused.value.status == 429
    await exchange.connect()
    await exchange.post("/sim/faults", expect=400, fault="earthquake")
    await exchange.post("/sim/faults", expect=400, fault="late", colour="red")
    await exchange.post("/sim/faults", expect=409, fault="late", connection=999)
    assert [fault["fault"] for fault in (await exchange.get("/sim/faults"))["faults"]] == ["refuse_handshake"]


async def test_clearing_ends_every_fault(exchange: Running) -> None:
    """After a clear nothing more is altered."""
    client, _ = await _subscribed(exchange)
    await exchange.post("/sim/faults", fault="duplicate", count=1_000_000)
    await exchange.post("/sim/faults", fault="http_5xx", count=1_000_000, path="/markets")
    async with exchange.http.delete(f"http://127.0.0.1:{exchange.simulator.rest_port}/sim/faults") as response:
        assert response.status == 200
    await exchange.get("/markets")
    await asyncio.sleep(0.05)
    mark = len(client.raw)
    await client.wait(lambda: len(client.raw) > mark + 500)
    assert len(set(client.raw[mark:])) == len(client.raw) - mark


async def test_a_seeded_schedule_breaks_things_and_the_log_stays_exact(tmp_path: Path) -> None:
    """Random faults over many connections: what each client got is a prefix of what the log says it was sent."""
    kinds = tuple(kind for kind in ALL_KINDS if kind not in ("huge", "http_slow"))
    received: list[list[bytes]] = []
    async with running(tmp_path, faults_per_minute=1_200.0, faults=kinds, fault_seed=3) as exchange:
        deadline_s = time.monotonic() + 2.5
        while time.monotonic() < deadline_s:
            try:
                client = await exchange.connect()
                await client.socket.send_json(
                    {"id": 1, "cmd": "subscribe", "params": {"channels": ["trade", "ticker", "market_lifecycle_v2"]}}
                )
            except (aiohttp.ClientError, ConnectionError):
                continue
            while not client.ended and time.monotonic() < deadline_s:
                await asyncio.sleep(0.01)
            received.append(client.raw)
        faults = (await exchange.get("/sim/faults"))["faults"]
    assert len({fault["fault"] for fault in faults}) >= 8
    by_connection: dict[int, list[bytes]] = {}
    for entry in _frames(tmp_path):
        by_connection.setdefault(entry.connection, []).append(entry.sha256)
    sent = list(by_connection.values())
    got = [[hashlib.sha256(raw).digest() for raw in frames] for frames in received if frames]
    assert len(got) >= 2
    for hashes in got:
        assert any(frames[: len(hashes)] == hashes for frames in sent)


def test_every_kind_of_fault_is_documented() -> None:
    """The page for people who test recorders names them all."""
    page = (Path(__file__).parents[2] / "docs" / "simulator.md").read_text()
    assert [kind for kind in ALL_KINDS if f"`{kind}`" not in page] == []


async def test_maintenance_is_announced_and_then_nothing_answers(exchange: Running) -> None:
    """Listed before it begins; then sockets are closed, the status says until when, and all else is 503; then it is over."""
    client, _ = await _subscribed(exchange)
    told = await exchange.post("/sim/maintenance", in_s=60, for_s=60)
    hidden = await exchange.post("/sim/maintenance", in_s=3_600, for_s=60, announced=False)
    listed = (await exchange.get("/exchange/schedule"))["schedule"]["maintenance_windows"]
    assert [one["start_datetime"] for one in listed] == [rfc3339(told["from_s"])]
    assert hidden["announced"] is False
    await exchange.post("/sim/clock", advance_s=60)
    await client.wait(lambda: client.ended)
    status = await exchange.get("/exchange/status", expect=503)
    assert (status["exchange_active"], status["trading_active"]) == (False, False)
    assert status["exchange_estimated_resume_time"] == rfc3339(told["to_s"])
    assert (await exchange.get("/markets", expect=503))["error"]["code"] == "unavailable"
    with pytest.raises(aiohttp.WSServerHandshakeError) as refused:
        await exchange.connect()
    assert refused.value.status == 503
    await exchange.post("/sim/clock", advance_s=60)
    assert (await exchange.get("/exchange/status"))["exchange_active"]
    await _subscribed(exchange)
    noted = _notes(exchange.simulator.settings.home, "maintenance")
    assert [note["from_s"] for note in noted] == [told["from_s"], hidden["from_s"]]
    await exchange.post("/sim/maintenance", expect=400, for_s="a while")
