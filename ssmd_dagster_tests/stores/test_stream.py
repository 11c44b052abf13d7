"""The raw stream against a real NATS server, killed and restarted."""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING

import pytest

from ssmd_dagster.errors import ConfigurationError, NotFoundError, UnreachableError
from ssmd_dagster.stores.connect import connect_nats
from ssmd_dagster.stores.jetstream import StreamFullError, client_of
from ssmd_dagster.stores.stream import BatchId, BatchTooLargeError, RawBatch, RawConsumer, RawStream
from ssmd_dagster_tests import servers

if TYPE_CHECKING:
    from pathlib import Path

    from nats.js import JetStreamContext

DATE = "2025-12-14"
MIB = 1024 * 1024


@pytest.fixture
async def raw(js: JetStreamContext, env_name: str) -> RawStream:
    """A created, empty stream."""
    raw = RawStream(js, env_name)
    await raw.create(64 * MIB)
    return raw


async def put(
    raw: RawStream, batch: int, *, conn: str = "7-a-1", channel: str = "trade", date: str = DATE, repair_round: int = 0
) -> int:
    """Publish one small batch whose bytes say which it is, and wait for its sequence."""
    data = f"{conn}/{channel}/{batch}".encode()
    ack = await raw.publish(
        data, date=date, channel=channel, conn=conn, batch=batch, records=batch + 1, repair_round=repair_round
    )
    return await ack


async def put_many(raw: RawStream, count: int, payload: bytes) -> list[int]:
    """Publish numbered batches, at most 256 of them under way, and return their sequences in the order of the calls."""
    seqs: list[int] = []
    for begin in range(0, count, 256):
        acks = [
            await raw.publish(payload, date=DATE, channel="trade", conn="c", batch=number, records=1)
            for number in range(begin, min(begin + 256, count))
        ]
        seqs += await asyncio.gather(*acks)
    return seqs


async def take(consumer: RawConsumer, count: int, timeout_s: float = 15) -> list[RawBatch]:
    """Fetch exactly `count` batches."""
    taken: list[RawBatch] = []
    async with asyncio.timeout(timeout_s):
        while len(taken) < count:
            taken += await consumer.fetch(1, count - len(taken))
    return taken


async def test_batches_are_consumed_in_order_with_all_that_is_known_of_them(raw: RawStream) -> None:
    """A consumer yields a day's batches from the first on: identity, records, bytes, and how many are behind."""
    seqs = [await put(raw, number) for number in range(5)]
    await put(raw, 0, date="2025-12-15")
    async with raw.consume(DATE) as consumer:
        batches = await take(consumer, 5)
        assert [batch.seq for batch in batches] == seqs
        assert batches[3] == RawBatch(seqs[3], BatchId("7-a-1", "trade", 3), DATE, 4, b"7-a-1/trade/3", 1)
        assert await consumer.fetch(0.1) == []
        assert await consumer.backlog() == 0
        await put(raw, 5)
        assert [batch.id.batch for batch in await take(consumer, 1)] == [5]


async def test_the_newest_batch_of_a_channel_can_be_looked_at(raw: RawStream) -> None:
    """Of a day and channel, whichever connection it came from; none is an error."""
    for number, conn in enumerate(("7-a-1", "7-b-1", "7-a-1")):
        await put(raw, number, conn=conn)
    await put(raw, 9, channel="ticker")
    assert await raw.newest(DATE, "trade") == b"7-a-1/trade/2"
    with pytest.raises(NotFoundError, match="no batch of orderbook_delta"):
        await raw.newest(DATE, "orderbook_delta")


async def test_publishing_the_same_batch_again_is_harmless(raw: RawStream) -> None:
    """A repeated batch is acknowledged with its sequence; a repair round puts it there once more."""
    seq = await put(raw, 0)
    assert await put(raw, 0) == seq
    assert await put(raw, 0, repair_round=1) == seq + 1
    assert await put(raw, 0, repair_round=1) == seq + 1
    assert await put(raw, 0, repair_round=2) == seq + 2
    assert await raw.batches(DATE) == {BatchId("7-a-1", "trade", 0): 1}


async def test_batches_lists_what_the_stream_holds(js: JetStreamContext, raw: RawStream) -> None:
    """Sets of batches can be compared by day and by connection, after losses too."""
    assert await raw.batches(DATE) == {}
    for number in range(4):
        await put(raw, number)
        await put(raw, number, conn="7-b.1 x", channel="orderbook_delta")
        await put(raw, number, date="2025-12-15")
    await js.delete_msg(raw.stream, 1)
    one = {BatchId("7-a-1", "trade", number): number + 1 for number in range(1, 4)}
    other = {BatchId("7-b.1 x", "orderbook_delta", number): number + 1 for number in range(4)}
    assert await raw.batches(DATE) == one | other
    assert await raw.batches(DATE, conn="7-b.1 x") == other
    assert await raw.batches("2025-12-16") == {}


async def test_batches_reads_many_headers(raw: RawStream) -> None:
    """Thousands of batches are listed without their bytes."""
    await put_many(raw, 4000, bytes(1000))
    assert len(await raw.batches(DATE)) == 4000


async def test_many_batches_under_way_keep_their_order_and_are_consumed_fast(raw: RawStream) -> None:
    """256 in flight arrive in the order of the calls; consuming keeps up with 2,000 batches/s of 10 kB."""
    seqs = await put_many(raw, 2000, bytes(10_000))
    assert seqs == sorted(seqs)
    begun_s = time.perf_counter()
    async with raw.consume(DATE) as consumer:
        batches = await take(consumer, 2000)
    rate = 2000 / (time.perf_counter() - begun_s)
    assert [batch.id.batch for batch in batches] == list(range(2000))
    assert rate > 1000  # 30,000 batches/s on an idle machine


async def test_a_full_stream_refuses_and_keeps_what_it_has(raw: RawStream) -> None:
    """At `max_bytes` new batches are refused by name; after a purge of another day there is room again."""
    await raw.create(2 * MIB)  # sets the smaller limit
    payload = bytes(MIB // 2)

    async def publish(batch: int, date: str = DATE) -> int:
        return await (await raw.publish(payload, date=date, channel="trade", conn="c", batch=batch, records=1))

    await publish(0, "2025-12-13")
    for number in range(2):
        await publish(number)
    with pytest.raises(StreamFullError, match="no more messages: maximum bytes exceeded"):
        await asyncio.gather(*(publish(number) for number in range(2, 5)))
    held = len(await raw.batches(DATE))
    assert held < 5
    usage = await raw.usage()
    assert (usage.limit, usage.free < len(payload), 0.75 < usage.share <= 1) == (2 * MIB, True, True)
    await raw.purge("2025-12-13")
    await publish(5)
    assert len(await raw.batches(DATE)) == held + 1
    assert await raw.batches("2025-12-13") == {}


async def test_a_batch_beyond_max_payload_is_refused_here(raw: RawStream) -> None:
    """The server would close the connection; the error names the limit and what to do."""
    with pytest.raises(BatchTooLargeError, match="Raise max_payload"):
        await raw.publish(bytes(8 * MIB), date=DATE, channel="trade", conn="c", batch=0, records=1)
    ack = await raw.publish(bytes(8 * MIB - 1024), date=DATE, channel="trade", conn="c", batch=0, records=1)
    assert await ack > 0
    async with raw.consume(DATE) as consumer:
        assert len((await take(consumer, 1))[0].data) == 8 * MIB - 1024


async def test_a_server_that_takes_small_messages_only_is_refused(
    js: JetStreamContext, env_name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """NATS's own default is too small for a busy channel's batches: said at a day's start, and in no way of its end."""
    monkeypatch.setattr(client_of(js), "_max_payload", MIB)
    raw = RawStream(js, env_name)
    await raw.create(64 * MIB)
    with pytest.raises(ConfigurationError, match=r"1048576 bytes at most.*max_payload: 8388608"):
        raw.check_payload()


async def test_create_refuses_other_settings(js: JetStreamContext, env_name: str) -> None:
    """A stream that throws old batches away is not what the recorder may write to."""
    await js.add_stream(name=f"{env_name}-raw", subjects=[f"{env_name}.raw.*.*.*"], max_bytes=MIB)
    with pytest.raises(ConfigurationError, match="discard"):
        await RawStream(js, env_name).create(MIB)


async def test_a_missing_stream_says_so(js: JetStreamContext, env_name: str) -> None:
    """Reading is refused at once, publishing fails in its future."""
    raw = RawStream(js, env_name, timeout_s=1)
    with pytest.raises(NotFoundError):
        await raw.batches(DATE)
    with pytest.raises(NotFoundError):
        await raw.consume(DATE).fetch(1)
    with pytest.raises(UnreachableError):
        await put(raw, 0)


async def test_tail_delivers_what_is_new_of_its_channels(raw: RawStream) -> None:
    """Old batches and other channels are left out, days are not told apart."""
    await put(raw, 0)
    async with await raw.tail(["trade", "ticker"]) as tail:
        await put(raw, 1)
        await put(raw, 1, channel="orderbook_delta")
        await put(raw, 0, channel="ticker", date="2025-12-15")
        assert [batch.id[1:] for batch in await take(tail, 2)] == [("trade", 1), ("ticker", 0)]
        assert await tail.fetch(0.1) == []


async def test_a_slow_tail_loses_the_oldest_and_says_how_many(raw: RawStream) -> None:
    """Whoever is thousands of batches behind goes on with what is new."""
    async with await raw.tail(["trade"]) as tail:
        await put_many(raw, 2500, b"x")
        seen = await take(tail, 1)
        assert seen[0].id.batch == 0
        assert tail.dropped == 2499
        await put(raw, 9999)
        assert [batch.id.batch for batch in await take(tail, 1)] == [9999]


async def test_nothing_is_lost_or_skipped_when_nats_is_killed_under_load(tmp_path: Path, env_name: str) -> None:
    """A publisher that sends again from the first failure on, and a consumer, go on through two SIGKILLs."""
    total = 600
    with servers.nats_server(tmp_path) as server:
        async with connect_nats(server.url, server.user, server.password, name="test") as nc:
            raw = RawStream(nc.jetstream(), env_name, timeout_s=1)
            await raw.create(64 * MIB)

            async def publish_all() -> None:
                done = 0
                while done < total:
                    acks: list[asyncio.Future[int]] = []
                    try:
                        for number in range(done, min(done + 16, total)):
                            acks.append(
                                await raw.publish(
                                    b"%d" % number, date=DATE, channel="trade", conn="c", batch=number, records=1
                                )
                            )
                        for ack in acks:
                            await ack
                            done += 1
                    except UnreachableError:
                        await asyncio.sleep(0.05)

            async def consume_all() -> list[int]:
                seen: dict[int, None] = {}
                async with raw.consume(DATE) as consumer:
                    while len(seen) < total:
                        for batch in await consumer.fetch(0.5):
                            assert batch.data == b"%d" % batch.id.batch
                            seen[batch.id.batch] = None
                return list(seen)

            async def kill_twice() -> None:
                for _ in range(2):
                    begun = (await raw._js.stream_info(raw.stream)).state.messages
                    while (await raw._js.stream_info(raw.stream)).state.messages < begun + 100:
                        await asyncio.sleep(0.005)
                    server.kill()
                    await asyncio.to_thread(server.start)
                    async with asyncio.timeout(10):
                        while not nc.is_connected:
                            await asyncio.sleep(0.01)

            async with asyncio.timeout(50):
                _, seen, _ = await asyncio.gather(publish_all(), consume_all(), kill_twice())
            assert sorted(seen) == list(range(total))
            assert set(await raw.batches(DATE)) == {BatchId("c", "trade", number) for number in range(total)}
            assert nc.stats["reconnects"] == 2


async def test_a_future_that_nobody_awaits_ends_quietly(tmp_path: Path, env_name: str) -> None:
    """Publishing to a server that died fails within the deadline, and at once when that is known."""
    with servers.nats_server(tmp_path) as server:
        async with connect_nats(server.url, server.user, server.password, name="test") as nc:
            raw = RawStream(nc.jetstream(), env_name, timeout_s=0.3)
            await raw.create(MIB)
            server.pause()
            acks = [await raw.publish(b"x", date=DATE, channel="trade", conn="c", batch=n, records=1) for n in range(3)]
            with pytest.raises(UnreachableError, match=f"127.0.0.1:{server.port}"):
                await acks[0]
            await asyncio.wait(acks, timeout=5)
            assert all(ack.done() for ack in acks)
            server.kill()
            async with asyncio.timeout(5):
                while nc.is_connected:
                    await asyncio.sleep(0.01)
            with pytest.raises(UnreachableError):
                await raw.publish(b"x", date=DATE, channel="trade", conn="c", batch=3, records=1)
