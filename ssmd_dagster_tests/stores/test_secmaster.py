"""The security master against a real Valkey and a real NATS server."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

import msgspec
import pytest
from msgspec.structs import replace

from ssmd_dagster.errors import ConfigurationError, NotFoundError, UnreachableError
from ssmd_dagster.exchange import Market
from ssmd_dagster.stores.connect import connect_nats, connect_redis
from ssmd_dagster.stores.secmaster import MarketChange, SecurityMaster, SyncResult
from ssmd_dagster_tests import servers

if TYPE_CHECKING:
    from pathlib import Path

    import redis.asyncio
    from nats.js import JetStreamContext

NOW_NS = 1_765_670_400_000_000_000
HOUR_NS = 3_600_000_000_000


def a_market(ticker: str, **changes: object) -> Market:
    """Make an open market."""
    fields: dict[str, object] = {
        "ticker": ticker,
        "event_ticker": ticker.rpartition("-")[0],
        "series_ticker": "KXBTCD",
        "category": "Crypto",
        "title": f"Will {ticker} happen?",
        "status": "active",
        "open_ns": NOW_NS - HOUR_NS,
        "close_ns": NOW_NS + HOUR_NS,
        "detail": {"strike_type": "greater", "floor_strike": 98249.99, "price_ranges": [{"start": "0.0000"}]},
    }
    return Market(**{**fields, **changes})  # type: ignore[arg-type]


@pytest.fixture
async def secmaster(redis_client: redis.asyncio.Redis, js: JetStreamContext, env_name: str) -> SecurityMaster:
    """A security master whose stream exists and whose keys do not."""
    secmaster = SecurityMaster(redis_client, js, env_name)
    await secmaster.create()
    return secmaster


async def changes(js: JetStreamContext, secmaster: SecurityMaster, *, whole: bool = False) -> list[MarketChange]:
    """Return every change that was published, in order, or every telling of the whole list."""
    last_seq = (await js.stream_info(secmaster.stream)).state.last_seq
    raw = [(await js.get_msg(secmaster.stream, seq)).data or b"" for seq in range(1, last_seq + 1)]
    told = [msgspec.json.decode(data, type=MarketChange) for data in raw]
    return [change for change in told if (change.event == "markets_listed") == whole]


async def test_added_updated_and_settled_markets_are_told_with_old_and_new(
    js: JetStreamContext, secmaster: SecurityMaster
) -> None:
    """Each difference between two lists is one change on the journal's subject."""
    one, two, three = a_market("A-1"), a_market("B-2.5"), a_market("C-3")
    assert await secmaster.apply([one, two], NOW_NS) == SyncResult(added=2, updated=0, settled=0, total=2)
    changed = replace(two, title="another")
    result = await secmaster.apply([changed, three], NOW_NS + 1)
    assert result == SyncResult(added=1, updated=1, settled=1, total=2)
    assert await changes(js, secmaster) == [
        MarketChange(event="market_added", ticker="A-1", at_ns=NOW_NS, new=one),
        MarketChange(event="market_added", ticker="B-2.5", at_ns=NOW_NS, new=two),
        MarketChange(event="market_updated", ticker="B-2.5", at_ns=NOW_NS + 1, old=two, new=changed),
        MarketChange(event="market_added", ticker="C-3", at_ns=NOW_NS + 1, new=three),
        MarketChange(event="market_settled", ticker="A-1", at_ns=NOW_NS + 1, old=one),
    ]
    assert await secmaster.markets() == [changed, three]
    assert sorted([market.ticker async for market in secmaster.each()]) == ["B-2.5", "C-3"]
    assert await secmaster.get("C-3") == three
    with pytest.raises(NotFoundError, match="no open market A-1"):
        await secmaster.get("A-1")


async def test_an_unchanged_list_publishes_nothing(js: JetStreamContext, secmaster: SecurityMaster) -> None:
    """A sync that finds nothing new only notes when it was."""
    markets = [a_market(f"A-{number}") for number in range(20)]
    await secmaster.apply(markets, NOW_NS)
    assert await secmaster.last_sync() == "2025-12-14T00:00:00Z"
    result = await secmaster.apply(reversed(markets), NOW_NS + HOUR_NS)
    assert result == SyncResult(added=0, updated=0, settled=0, total=20)
    assert len(await changes(js, secmaster)) == 20
    assert await secmaster.last_sync() == "2025-12-14T01:00:00Z"


async def test_settled_markets_leave_every_set(
    redis_client: redis.asyncio.Redis, secmaster: SecurityMaster, env_name: str
) -> None:
    """A market that is gone, or is listed as settled, is in no category and does not expire."""
    await secmaster.apply([a_market("A"), a_market("B"), a_market("C", category="Politics")], NOW_NS)
    settled = a_market("B", status="finalized")
    assert (await secmaster.apply([a_market("A"), settled], NOW_NS + 1)).settled == 2
    assert await secmaster.in_category("Crypto") == ["A"]
    assert await secmaster.in_category("Politics") == []
    assert await secmaster.expiring(NOW_NS + 2 * HOUR_NS) == ["A"]
    assert (await secmaster.apply([a_market("A"), settled], NOW_NS + 2)).settled == 0
    assert (await secmaster.apply([], NOW_NS + 3)).settled == 1
    assert await secmaster.markets() == []
    keys = [key async for key in redis_client.scan_iter(match=f"{env_name}:*")]
    assert sorted(keys) == [f"{env_name}:secmaster:{name}".encode() for name in ("last_sync", "whole")]


async def test_categories_may_have_odd_characters(secmaster: SecurityMaster) -> None:
    """A category is kept as the exchange writes it, and follows a market that changes it."""
    names = ["Climate and Weather", "Science/Tech: *[?]", "", "Політика", "by_category:x", "a\nb"]
    await secmaster.apply([a_market(f"M{n}", category=name) for n, name in enumerate(names)], NOW_NS)
    for n, name in enumerate(names):
        assert await secmaster.in_category(name) == [f"M{n}"]
    await secmaster.apply([a_market(f"M{n}", category=names[0]) for n in range(len(names))], NOW_NS + 1)
    assert len(await secmaster.in_category(names[0])) == len(names)
    assert await secmaster.in_category(names[1]) == []


async def test_expiring_is_sorted_by_close_time(secmaster: SecurityMaster) -> None:
    """The earliest first; what closes at the asked instant is not before it."""
    hours = {"late": 3, "soon": 1, "middle": 2}
    await secmaster.apply([a_market(t, close_ns=NOW_NS + h * HOUR_NS) for t, h in hours.items()], NOW_NS)
    assert await secmaster.expiring(NOW_NS + 3 * HOUR_NS) == ["soon", "middle"]
    assert await secmaster.expiring(NOW_NS + 4 * HOUR_NS) == ["soon", "middle", "late"]


async def test_an_interrupted_sync_is_not_told_twice(
    redis_client: redis.asyncio.Redis, js: JetStreamContext, secmaster: SecurityMaster, env_name: str
) -> None:
    """Changes that were published before Redis was written are recognised when the sync is made again."""
    await secmaster.apply([a_market("A")], NOW_NS)
    before = await redis_client.dump(f"{env_name}:secmaster:markets")
    last_sync = await secmaster.last_sync()
    await secmaster.apply([a_market("A"), a_market("B")], NOW_NS + 1)
    await redis_client.restore(f"{env_name}:secmaster:markets", 0, before or b"", replace=True)
    await redis_client.set(f"{env_name}:secmaster:last_sync", last_sync or "")
    assert (await secmaster.apply([a_market("A"), a_market("B")], NOW_NS + 1)).added == 1
    assert [change.ticker for change in await changes(js, secmaster)] == ["A", "B"]


async def test_a_market_that_comes_and_goes_is_told_each_time(js: JetStreamContext, secmaster: SecurityMaster) -> None:
    """Equal changes of different syncs are different changes."""
    for sync in range(4):
        await secmaster.apply([a_market("A")] if sync % 2 == 0 else [], NOW_NS + sync * HOUR_NS)
    assert [change.event for change in await changes(js, secmaster)] == ["market_added", "market_settled"] * 2


async def test_two_syncs_at_once_end_with_one_list(secmaster: SecurityMaster) -> None:
    """Racing syncs do not mix their lists."""
    first, second = [a_market(f"A{n}") for n in range(50)], [a_market(f"B{n}") for n in range(50)]
    await asyncio.gather(secmaster.apply(first, NOW_NS), secmaster.apply(second, NOW_NS + 1))
    tickers = {market.ticker for market in await secmaster.markets()}
    assert tickers in ({m.ticker for m in first}, {m.ticker for m in second})
    assert set(await secmaster.in_category("Crypto")) == tickers


DAY_NS = 24 * HOUR_NS
PERIOD_NS = 8 * DAY_NS
"""A little more than the whole list is told in."""


async def listed_by_periods(secmaster: SecurityMaster, periods: int) -> dict[int, list[str]]:
    """Sync twice a period: one market for ever, one that changes in the second, one each that settles in the next."""
    listed: dict[int, list[str]] = {}
    for half in range(2 * periods):
        period = half // 2
        changing = a_market("CHANGING", title="before" if period < 1 else "after")
        await secmaster.apply([a_market("EVER"), changing, a_market(f"N-{period}")], NOW_NS + half * PERIOD_NS // 2)
        listed[period] = ["CHANGING", "EVER", *(f"N-{n}" for n in (period - 1, period) if n >= 0)]
    return listed


async def test_a_days_markets_are_found_without_reading_the_years_before_it(
    redis_client: redis.asyncio.Redis, js: JetStreamContext, secmaster: SecurityMaster, env_name: str
) -> None:
    """The whole list is told once a week; from there on the answer is what all changes from the beginning give."""
    listed = await listed_by_periods(secmaster, 6)
    told = [change.listed for change in await changes(js, secmaster, whole=True)]
    assert [[market.ticker for market in whole] for whole in told] == [["EVER", "CHANGING", f"N-{n}"] for n in listed]

    async def known() -> dict[int, list[Market]]:
        opens = {period: NOW_NS + period * PERIOD_NS - HOUR_NS // 2 for period in listed}
        return {period: await secmaster.known(at_ns, at_ns + PERIOD_NS) for period, at_ns in opens.items()}

    found = await known()
    assert {period: [market.ticker for market in markets] for period, markets in found.items()} == listed
    assert [found[period][0].title for period in listed] == ["before"] + ["after"] * 5
    await redis_client.delete(f"{env_name}:secmaster:whole")
    assert await known() == found

    await secmaster.apply([a_market("EVER")], NOW_NS + 10 * PERIOD_NS)
    last = (await js.stream_info(secmaster.stream)).state.last_seq
    await js.purge_stream(secmaster.stream, seq=last - 1)  # as age does
    at_ns = NOW_NS + 12 * PERIOD_NS
    assert [market.ticker for market in await secmaster.known(at_ns, at_ns + DAY_NS)] == ["EVER"]


async def test_a_stream_that_was_lost_is_told_the_whole_list_again(
    js: JetStreamContext, secmaster: SecurityMaster
) -> None:
    """A stream that was made anew has other messages under the same numbers, or none, whatever Redis says of it."""
    await listed_by_periods(secmaster, 3)
    await js.delete_stream(secmaster.stream)
    await secmaster.create()
    at_ns = NOW_NS + 3 * PERIOD_NS
    for number in range(12):
        await secmaster.apply([a_market("EVER"), a_market(f"NEW-{number}")], at_ns + number)
    known = await secmaster.known(at_ns + DAY_NS, at_ns + 2 * DAY_NS)
    assert [market.ticker for market in known] == ["EVER", "NEW-11"]


async def test_a_market_that_came_while_another_sync_told_the_whole_list_is_known(
    redis_client: redis.asyncio.Redis, js: JetStreamContext, env_name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The sync that came second has told of it before that list, and tells the whole list once more."""
    slow, quick = SecurityMaster(redis_client, js, env_name), SecurityMaster(redis_client, js, env_name)
    await slow.create()
    await slow.apply([a_market("EVER")], NOW_NS)
    slow_has_read, quick_has_written, slow_is_done = asyncio.Event(), asyncio.Event(), asyncio.Event()
    publish, put = slow._publish, quick._put

    async def publish_late(*args: Any) -> None:
        slow_has_read.set()
        await quick_has_written.wait()
        await publish(*args)

    async def put_and_wait(*args: Any) -> None:
        await put(*args)
        quick_has_written.set()
        await slow_is_done.wait()

    monkeypatch.setattr(slow, "_publish", publish_late)
    monkeypatch.setattr(quick, "_put", put_and_wait)
    at_ns = NOW_NS + PERIOD_NS

    async def sync_slowly() -> None:
        await slow.apply([a_market("EVER")], at_ns)
        slow_is_done.set()

    async def sync_quickly() -> None:
        await slow_has_read.wait()
        await quick.apply([a_market("EVER"), a_market("NEW")], at_ns + 1)

    async with asyncio.timeout(20):
        await asyncio.gather(sync_slowly(), sync_quickly())
    known = await slow.known(at_ns + DAY_NS, at_ns + 2 * DAY_NS)
    assert [market.ticker for market in known] == ["EVER", "NEW"]


async def test_create_refuses_a_stream_with_other_settings(js: JetStreamContext, env_name: str) -> None:
    """A stream that somebody made on other subjects is not used."""
    await js.add_stream(name=f"{env_name}-secmaster", subjects=[f"{env_name}.other"])
    with pytest.raises(ConfigurationError, match="subjects"):
        await SecurityMaster(None, js, env_name).create()  # type: ignore[arg-type]


async def test_twenty_thousand_markets_are_read_and_compared(
    redis_client: redis.asyncio.Redis, secmaster: SecurityMaster, env_name: str
) -> None:
    """A list of 20,000 markets is found unchanged, and read whole."""
    markets = [a_market(f"KXBTCD-26FEB07-T{number:05d}.99") for number in range(20_000)]
    rows: list[str | bytes] = []
    for market in markets:
        rows += (market.ticker, msgspec.json.encode(market))
    await redis_client.hset(f"{env_name}:secmaster:markets", items=rows)
    assert await secmaster.apply(markets, NOW_NS) == SyncResult(added=0, updated=0, settled=0, total=20_000)
    assert len(await secmaster.markets()) == 20_000


async def test_servers_that_are_away_are_named(tmp_path: Path, nats: servers.NatsServer, env_name: str) -> None:
    """Nothing is published while Redis is away, and the error names its address."""
    with servers.valkey_server(tmp_path) as server:
        async with (
            connect_redis(server.url, server.password, name="test") as client,
            connect_nats(nats.url, nats.user, nats.password, name="test") as nc,
        ):
            js = nc.jetstream()
            secmaster = SecurityMaster(client, js, env_name)
            await secmaster.create()
            server.kill()
            with pytest.raises(UnreachableError, match=f"127.0.0.1:{server.port}"):
                await secmaster.apply([a_market("A")], NOW_NS)
            assert await changes(js, secmaster) == []
