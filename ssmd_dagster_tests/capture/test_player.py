"""A recorded day is played to clients: every record once, in the order and at the pace in which they were received."""

from __future__ import annotations

import asyncio
import json
import time
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from ssmd_dagster.archive.layout import segment_key
from ssmd_dagster.archive.records import parse_record
from ssmd_dagster.capture.player import Player
from ssmd_dagster.capture.setting import Setting
from ssmd_dagster.capture.spool import spooled_records
from ssmd_dagster.errors import NotFoundError
from ssmd_dagster.exchange import REST, SESSION
from ssmd_dagster.stores.connect import Stores
from ssmd_dagster_tests.capture.recordings import DATE, a_recording, build_segments, eventually, header_of

SPEED = 0.25


async def listen(port: int, request: dict[str, Any]) -> list[dict[str, Any]]:
    """Return every message of a client until the gateway closes it."""
    got = []
    async with (
        aiohttp.ClientSession() as session,
        session.ws_connect(f"http://127.0.0.1:{port}/v1/stream") as socket,
    ):
        await socket.send_str(json.dumps(request))
        async for message in socket:
            got.append(json.loads(message.data))
    return got


async def test_a_day_is_played_once_in_order_and_in_its_own_time(
    setting: Setting, stores: Stores, tmp_path: Path
) -> None:
    """Connections and channels whose batches overlap come back as one stream; a client may ask for a part; then it ends."""
    env = setting.env.name
    recordings = [a_recording(f"812-{shard}-0", frames=60, seed=seed, env=env) for seed, shard in enumerate("ab")]
    encoded = [data for recording in recordings for data in recording.batches()]
    for key, (_, _, data) in build_segments(tmp_path, encoded, env=env).items():
        await stores.raw.create(key, data)
    before = {info.key: info.size for info in await stores.raw.list("")}
    true = [
        (record.recv_ns, batch.header.conn, record.n, batch.header.channel)
        for data in encoded
        for batch in [header_of(data)]
        if batch.header.channel != SESSION
        for line in spooled_records(data, batch).splitlines()
        for record in [parse_record(line)]
    ]
    player, stop = Player(setting, stores, DATE, SPEED), asyncio.Event()
    playing = asyncio.create_task(player.run(stop))
    await eventually(lambda: player.port or playing.done())
    began = time.monotonic()
    everything, trades = await asyncio.gather(
        listen(player.port, {"op": "subscribe"}), listen(player.port, {"op": "subscribe", "channels": ["trade"]})
    )
    took_s = time.monotonic() - began
    await asyncio.wait_for(playing, 10)
    events = [one for one in everything if one["type"] == "event"]
    assert [one["recv_ns"] for one in events] == sorted(one[0] for one in true)
    assert sorted((one["recv_ns"], one["conn"], one["n"], one["channel"]) for one in events) == sorted(true)
    for conn in ("812-a-0", "812-b-0"):
        numbers = [one["n"] for one in events if one["conn"] == conn]
        assert numbers == sorted(numbers)
    assert everything[-1] == {"type": "day_ended", "reason": f"trading day {DATE} is played"}
    span_s = (max(true)[0] - min(true)[0]) / 1e9 / SPEED
    assert span_s <= took_s < span_s + 5
    assert {one["channel"] for one in trades if one["type"] == "event"} == {"trade"}
    assert {info.key: info.size for info in await stores.raw.list("")} == before


async def test_a_day_without_records_is_not_played(setting: Setting, stores: Stores) -> None:
    """There is nothing to wait for."""
    with pytest.raises(NotFoundError, match="no record of"):
        await Player(setting, stores, DATE, 1.0).run(asyncio.Event())


async def test_pages_of_rest_are_no_part_of_a_played_day(setting: Setting, stores: Stores, tmp_path: Path) -> None:
    """They were fetched hours or months after the day, and were never a message to anybody."""
    env = setting.env.name
    encoded = a_recording("812-a-0", frames=5, seed=1, env=env).batches()
    data = next(iter(build_segments(tmp_path, encoded, env=env).values()))[2]
    await stores.raw.create(segment_key(setting.env.feed, DATE, REST, 0), data)
    with pytest.raises(NotFoundError, match="that a client could get"):
        await asyncio.wait_for(Player(setting, stores, DATE, SPEED).run(asyncio.Event()), 20)


async def test_a_player_that_is_told_to_stop_stops(setting: Setting, stores: Stores, tmp_path: Path) -> None:
    """In the middle of the day, with its clients told."""
    env = setting.env.name
    for key, (_, _, data) in build_segments(tmp_path, a_recording(frames=60, env=env).batches(), env=env).items():
        await stores.raw.create(key, data)
    player, stop = Player(setting, stores, DATE, 0.0001), asyncio.Event()
    playing = asyncio.create_task(player.run(stop))
    await eventually(lambda: player.port or playing.done())
    client = asyncio.create_task(listen(player.port, {"op": "subscribe"}))
    await eventually(lambda: player._status()["events"] > 0)
    stop.set()
    await asyncio.wait_for(playing, 10)
    assert (await client)[-1] == {"type": "day_ended", "reason": "gateway stops"}
