"""Pages are recorded like frames: spooled, published, covered by interval notes, and at peace with the audit."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from ssmd_dagster.archive.records import parse_record
from ssmd_dagster.archive.trade_ids import TradeIds
from ssmd_dagster.capture.audit import COMPONENT, audit
from ssmd_dagster.capture.rest_pages import RestPages
from ssmd_dagster.capture.setting import Setting
from ssmd_dagster.capture.spool import read_spool, spool_path, spooled_connections, spooled_records
from ssmd_dagster.environments.home import spool_dir
from ssmd_dagster.errors import UnreachableError
from ssmd_dagster.exchange import REST
from ssmd_dagster.stores.connect import Stores
from ssmd_dagster.stores.daybook import DayBook
from ssmd_dagster_tests.capture.recordings import DATE, build_segments, read_segments, spooled_batches


def page(number: int) -> bytes:
    """A page of a list of trades."""
    return json.dumps({"endpoint": "/markets/trades", "params": {}, "trades": [{"trade_id": str(number)}]}).encode()


async def test_pages_are_a_connection_of_their_own(
    setting: Setting, stores: Stores, book: DayBook, tmp_path: Path
) -> None:
    """Everything put is in spool and stream, reads back without a fault, and the audit finds no gap and nothing to do."""
    day = await book.day(DATE)
    assert day is not None
    assert day.epoch is not None
    for k in range(2):
        async with RestPages(setting, stores, DATE, day.epoch) as pages:
            for number in range(3):
                await pages.put("rest_trades", page(number))
        assert pages.conn == f"{day.epoch}-rest-{k}"
        assert (await pages.counts())[REST].records == 3
    directory = spool_dir(setting.home, setting.env.name, DATE)
    paths = [spool_path(directory, conn) for conn in spooled_connections(directory)]
    readback = read_segments(
        build_segments(tmp_path, spooled_batches(*paths), env=setting.env.name), env=setting.env.name
    )
    assert readback.faults == ()
    assert readback.archived[REST] == readback.received[REST] == 6
    (batch, encoded), *_ = [item for item in read_spool(paths[0]) if item[0].header.channel == REST]
    record = parse_record(spooled_records(encoded, batch).splitlines()[0])
    assert json.loads(bytes(record.wire)) == {"type": "rest_trades", "msg": json.loads(page(0))}

    in_stream = await stores.raw_stream.batches(DATE)
    await audit(setting, stores, DATE)
    day = await book.day(DATE)
    assert day is not None
    assert day.gaps == ()
    assert day.checkpoints[COMPONENT].connections[pages.conn] == await pages.counts()
    assert await stores.raw_stream.batches(DATE) == in_stream


async def test_without_a_page_there_is_no_connection(setting: Setting, stores: Stores) -> None:
    """Nothing is written where nothing was put, and an unknown type of page is refused."""
    async with RestPages(setting, stores, DATE, 7) as pages:
        with pytest.raises(ValueError, match="rest_weather"):
            await pages.put("rest_weather", b"{}")
    assert await pages.counts() == {}
    assert spooled_connections(spool_dir(setting.home, setting.env.name, DATE)) == []


@pytest.mark.parametrize("asked", [None, ["KX-1", "KX-2"]])
async def test_what_was_asked_for_is_what_the_proof_asks_for(
    setting: Setting, stores: Stores, tmp_path: Path, asked: list[str] | None
) -> None:
    """A market of which no trade came is among those that the exchange's list is held against; None stands for all."""
    async with RestPages(setting, stores, DATE, 7) as pages:
        pages.note({"event": "asked", "channels": ["trade"], "tickers": asked})
        await pages.put("rest_trades", page(1))
    ids = TradeIds(setting.env.feed, 0, 1)
    spooled = spool_path(spool_dir(setting.home, setting.env.name, DATE), pages.conn)
    read_segments(
        build_segments(tmp_path, spooled_batches(spooled), env=setting.env.name), env=setting.env.name, see=ids.see
    )
    assert (ids.all_markets, sorted(ids.markets)) == (asked is None, asked or [])


async def test_a_stream_that_takes_nothing_is_told(setting: Setting, stores: Stores) -> None:
    """The pages stay in the spool for the audit."""
    await stores.js.delete_stream(stores.raw_stream.stream)
    with pytest.raises(UnreachableError, match="batches are not acknowledged"):
        async with RestPages(setting, stores, DATE, 7, timeout_s=0.3) as pages:
            await pages.put("rest_trades", page(1))
    assert (await pages.counts())[REST].records == 1
    await stores.raw_stream.create(64 << 20)
