"""The cache of days, leases and heartbeats against a real Valkey."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ssmd_dagster.day.events import Book, Gap, TradingDay
from ssmd_dagster.day.states import DayState
from ssmd_dagster.errors import ConfigurationError, UnreachableError
from ssmd_dagster.stores.cache import DayCache, DayStats, rfc3339, text
from ssmd_dagster.stores.connect import connect_redis
from ssmd_dagster_tests import servers

if TYPE_CHECKING:
    from pathlib import Path

    import redis.asyncio

DATE = "2025-12-14"
AT_NS = 1_765_670_400_000_000_000


def a_day(date: str = DATE, *, seq: int = 1, **changes: object) -> TradingDay:
    """Make a day of which only what the cache shows matters."""
    fields: dict[str, object] = {
        "env": "x",
        "date": date,
        "state": DayState.ACTIVE,
        "epoch": 2,
        "actor": "cli:test@host",
        "started_ns": AT_NS,
        "first_seq": 1,
        "last_seq": seq,
        "updated_ns": AT_NS,
    }
    return TradingDay(**{**fields, **changes})  # type: ignore[arg-type]


def a_book(*days: TradingDay, current: str | None = DATE) -> Book:
    """Make a book whose tip is its latest day's last event."""
    return Book(
        days={day.date: day for day in days}, current=current, tip_seq=max((day.last_seq for day in days), default=0)
    )


@pytest.fixture
def cache(redis_client: redis.asyncio.Redis, env_name: str) -> DayCache:
    """An empty cache."""
    return DayCache(redis_client, env_name)


async def content(client: redis.asyncio.Redis, env: str) -> dict[str, str]:
    """Return all plain keys of an environment."""
    keys = sorted([key async for key in client.scan_iter(match=f"{env}:*")])
    return {text(key).removeprefix(f"{env}:"): text(await client.get(key)) for key in keys}


async def test_the_keys_are_those_of_the_design(
    redis_client: redis.asyncio.Redis, cache: DayCache, env_name: str
) -> None:
    """State in upper case, times in RFC 3339 UTC, stats in JSON, and no key where there is no value."""
    running = a_day(seq=9, messages=1_234_567, started_ns=AT_NS + 600 * 10**9)
    ended = a_day(
        "2025-12-13",
        seq=7,
        state=DayState.COMPLETE,
        ended_ns=AT_NS,
        gap_by_id={"g": Gap(gap_id="g", cause="late_start", from_ns=1)},
    )
    assert await cache.apply(a_book(running, ended))
    stats = '{"messages":%d,"gaps":%d,"bytes":0,"by_channel":{},"last_message_ns":0,"lag_ms":0.0}'
    assert await content(redis_client, env_name) == {
        "day:current": "2025-12-14",
        "day:applied_seq": "9",
        "day:2025-12-14:state": "ACTIVE",
        "day:2025-12-14:epoch": "2",
        "day:2025-12-14:start_time": "2025-12-14T00:10:00Z",
        "day:2025-12-14:stats": stats % (1_234_567, 0),
        "day:2025-12-13:state": "COMPLETE",
        "day:2025-12-13:epoch": "2",
        "day:2025-12-13:start_time": "2025-12-14T00:00:00Z",
        "day:2025-12-13:end_time": "2025-12-14T00:00:00Z",
        "day:2025-12-13:stats": stats % (0, 1),
    }
    assert await cache.current() == DATE
    assert await cache.state(DATE) is DayState.ACTIVE
    assert await cache.epoch(DATE) == 2
    assert await cache.applied_seq() == 9
    assert await cache.state("2025-12-01") is None
    assert await cache.epoch("2025-12-01") is None


async def test_an_older_book_is_ignored(cache: DayCache) -> None:
    """What arrives late does not turn the state back."""
    assert await cache.apply(a_book(a_day(seq=5, state=DayState.ENDING)))
    assert not await cache.apply(a_book(a_day(seq=4)))
    assert not await cache.apply(a_book(a_day(seq=5)))
    assert await cache.state(DATE) is DayState.ENDING


@st.composite
def histories(draw: st.DrawFn) -> list[Book]:
    """Draw the books of a growing journal over three days, one per event."""
    days: dict[str, TradingDay] = {}
    books = []
    current: str | None = None
    for seq in range(1, draw(st.integers(2, 12))):
        date = draw(st.sampled_from(["2025-12-13", "2025-12-14", "2025-12-15"]))
        messages = (days[date].messages or 0) if date in days else 0
        days[date] = a_day(
            date,
            seq=seq,
            state=draw(st.sampled_from(DayState)),
            epoch=draw(st.none() | st.integers(1, seq)),
            started_ns=draw(st.none() | st.just(AT_NS + seq)),
            ended_ns=draw(st.none() | st.just(AT_NS + 2 * seq)),
            messages=messages + draw(st.integers(0, 2)),
        )
        current = draw(st.sampled_from([None, *days])) or current
        books.append(Book(env="x", days=dict(days), current=current, tip_seq=seq))
    return books


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data(), books=histories())
def test_books_in_any_order_lead_to_the_same_keys(
    valkey: servers.ValkeyServer, env_name: str, books: list[Book], data: st.DataObject
) -> None:
    """Books applied reordered, repeated or with some left out end as the last one alone, and as a rebuild."""
    arriving = [*data.draw(st.lists(st.sampled_from(books), max_size=10)), books[-1]]
    arriving = data.draw(st.permutations(arriving))

    async def check() -> None:
        async with connect_redis(valkey.url, valkey.password, name="test") as client:
            ends = []
            for case, sequence in {"ordered": books, "arriving": arriving, "last": books[-1:]}.items():
                cache = DayCache(client, f"{env_name}-{case}")
                await cache.rebuild(Book())
                for book in sequence:
                    await cache.apply(book)
                ends.append(await content(client, f"{env_name}-{case}"))
                await cache.rebuild(books[-1])
                ends.append(await content(client, f"{env_name}-{case}"))
            assert all(end == ends[0] for end in ends)

    asyncio.run(check())


async def test_racing_applies_end_with_the_latest(cache: DayCache, redis_client: redis.asyncio.Redis) -> None:
    """Fifty actors at once leave the latest book."""
    books = [a_book(a_day(seq=seq, epoch=seq), a_day("2025-12-13", seq=1)) for seq in range(2, 52)]
    await asyncio.gather(*(cache.apply(book) for book in reversed(books)))
    assert (await cache.applied_seq(), await cache.epoch(DATE)) == (51, 51)


async def test_the_counts_of_a_running_day_belong_to_the_capture(cache: DayCache) -> None:
    """A transition does not overwrite fresher counts; older counts and those of an ended day it does."""
    live = DayStats(messages=1000, bytes=5, by_channel={"trade": 1000}, last_message_ns=AT_NS + 1, lag_ms=1.5)
    await cache.put_stats(DATE, live)
    await cache.apply(a_book(a_day(seq=3, messages=900)))
    assert await cache.stats(DATE) == live
    await cache.apply(a_book(a_day(seq=4, messages=1100)))
    assert await cache.stats(DATE) == DayStats(messages=1100)
    await cache.put_stats(DATE, live)
    await cache.apply(a_book(a_day(seq=5, messages=950, state=DayState.COMPLETE)))
    assert await cache.stats(DATE) == DayStats(messages=950)
    assert await cache.stats("2025-12-01") is None


async def test_rebuild_empties_the_days_and_nothing_else(
    redis_client: redis.asyncio.Redis, cache: DayCache, env_name: str
) -> None:
    """Wrong and foreign keys of days go; leases, heartbeats, the security master and other environments stay."""
    other = DayCache(redis_client, f"{env_name}-other")
    await other.apply(a_book(a_day(seq=1)))
    await cache.apply(a_book(a_day(seq=99), a_day("2025-01-01", seq=98)))
    await redis_client.set(f"{env_name}:day:{DATE}:rubbish", "1")
    await redis_client.set(f"{env_name}:secmaster:last_sync", "x")
    await cache.acquire(DATE, "cli:alice@host")
    await cache.put_heartbeat(DATE, "connector", {"pid": 1})
    await cache.rebuild(a_book(a_day(seq=5, state=DayState.ENDING)))
    assert set(await content(redis_client, env_name)) == {
        "capture:2025-12-14:connector",
        "day:2025-12-14:epoch",
        "day:2025-12-14:lease",
        "day:2025-12-14:start_time",
        "day:2025-12-14:state",
        "day:2025-12-14:stats",
        "day:applied_seq",
        "day:current",
        "secmaster:last_sync",
    }
    assert (await cache.applied_seq(), await cache.state(DATE)) == (5, DayState.ENDING)
    assert await cache.holder(DATE) == "cli:alice@host"
    assert await other.state(DATE) is DayState.ACTIVE


async def test_a_cache_emptied_in_the_middle_is_whole_after_the_next_apply(
    redis_client: redis.asyncio.Redis, cache: DayCache, env_name: str
) -> None:
    """After a FLUSHALL an apply brings back every day, not only the one that changed."""
    old = a_day("2025-12-13", seq=3, state=DayState.COMPLETE)
    await cache.apply(a_book(old, a_day(seq=4)))
    await redis_client.delete(*[key async for key in redis_client.scan_iter(match=f"{env_name}:*")])
    assert await cache.apply(a_book(old, a_day(seq=5)))
    assert await cache.state("2025-12-13") is DayState.COMPLETE


async def test_a_lease_has_one_owner_until_it_ends(cache: DayCache) -> None:
    """Others cannot take, renew or release it; its owner can take it again; after its TTL anyone can."""
    assert await cache.holder(DATE) is None
    assert await cache.acquire(DATE, "alice", ttl_s=30)
    assert await cache.acquire(DATE, "alice", ttl_s=30)
    assert not await cache.acquire(DATE, "bob", ttl_s=30)
    assert not await cache.renew(DATE, "bob", ttl_s=30)
    assert not await cache.release(DATE, "bob")
    assert await cache.acquire("2025-12-15", "bob", ttl_s=30)
    assert await cache.holder(DATE) == "alice"
    assert await cache.renew(DATE, "alice", ttl_s=0.05)
    async with asyncio.timeout(5):
        while not await cache.acquire(DATE, "bob", ttl_s=30):
            await asyncio.sleep(0.01)
    assert not await cache.renew(DATE, "alice")
    assert await cache.release(DATE, "bob")
    assert await cache.holder(DATE) is None


async def test_of_racing_owners_one_gets_the_lease(cache: DayCache) -> None:
    """Fifty actors ask at once, one gets it."""
    answers = await asyncio.gather(*(cache.acquire(DATE, f"actor-{number}") for number in range(50)))
    assert answers.count(True) == 1


async def test_heartbeats_are_listed_by_day_and_expire(
    redis_client: redis.asyncio.Redis, cache: DayCache, env_name: str
) -> None:
    """Each component has its own, with a TTL of 15 s; what one that ended for good said last can be read for a day."""
    await cache.put_heartbeat(DATE, "connector-a", {"epoch": 7, "connected": True})
    await cache.put_heartbeat(DATE, "archiver", {"epoch": 7})
    await cache.put_heartbeat("2025-12-15", "archiver", {"epoch": 8})
    assert await cache.heartbeats(DATE) == {"archiver": {"epoch": 7}, "connector-a": {"epoch": 7, "connected": True}}
    assert await cache.heartbeat(DATE, "archiver") == {"epoch": 7}
    assert 10 < await redis_client.ttl(f"{env_name}:capture:{DATE}:archiver") <= 15
    await cache.put_heartbeat(DATE, "connector-a", {"epoch": 7, "error": "refused", "exit_code": 8})
    assert await redis_client.ttl(f"{env_name}:capture:{DATE}:connector-a") > 86_000
    await cache.remove_heartbeat(DATE, "archiver")
    assert await cache.heartbeat(DATE, "archiver") is None
    assert await cache.heartbeats("2025-12-16") == {}


def test_times_are_rfc_3339() -> None:
    """Whole seconds have no fraction; nanoseconds are kept."""
    assert rfc3339(AT_NS) == "2025-12-14T00:00:00Z"
    assert rfc3339(AT_NS + 1) == "2025-12-14T00:00:00.000000001Z"
    assert rfc3339(AT_NS + 500_000_000) == "2025-12-14T00:00:00.5Z"


async def test_a_redis_that_is_away_is_named_and_comes_back(tmp_path: Path) -> None:
    """Errors name host and port; after kill -9 and restart the same client goes on with what was written."""
    with servers.valkey_server(tmp_path) as server:
        async with connect_redis(server.url, server.password, name="test") as client:
            cache = DayCache(client, "x")
            assert await cache.apply(a_book(a_day(seq=1)))
            server.kill()
            for attempt in (cache.apply(a_book(a_day(seq=2))), cache.acquire(DATE, "me"), cache.heartbeats(DATE)):
                with pytest.raises(UnreachableError, match=f"127.0.0.1:{server.port}"):
                    await attempt
            server.start()
            assert await cache.apply(a_book(a_day(seq=3)))
            assert await cache.acquire(DATE, "me")


async def test_a_wrong_password_is_a_matter_of_configuration(valkey: servers.ValkeyServer) -> None:
    """Nobody should retry with a password that was refused."""
    for password in ("wrong", None):
        with pytest.raises(ConfigurationError, match="Check the password"):
            async with connect_redis(valkey.url, password, name="test"):
                pass
