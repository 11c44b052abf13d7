"""The player: a gateway of its own that plays a recorded day to its clients, in the order and at the pace of its records.

    python -m ssmd_dagster.capture.player ENV DATE SPEED

Reads the day's raw segments from the store and writes nothing. It has a free port of its own, so that whoever listens to the
live gateway never gets a played message; clients speak to it as to that one. It begins when the first of them has subscribed,
plays SPEED times as fast as the day went, tells its clients that the day has ended, and ends.
"""

from __future__ import annotations

import asyncio
import heapq
import itertools
import sys
import time
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from aiohttp import web

from ssmd_dagster.archive.batch import Batch, BatchHeader, decode_records, scan
from ssmd_dagster.archive.layout import day_prefix, parse_segment_key
from ssmd_dagster.archive.records import Record, parse_record
from ssmd_dagster.capture.control import control_subject
from ssmd_dagster.capture.gateway import Gateway
from ssmd_dagster.capture.process import connected, run
from ssmd_dagster.capture.programs import PLAYER as COMPONENT
from ssmd_dagster.capture.programs import played
from ssmd_dagster.capture.setting import Setting, load_setting
from ssmd_dagster.errors import ExitCode, NotFoundError
from ssmd_dagster.exchange import REST, SESSION
from ssmd_dagster.stores.connect import Stores

NO_CLIENT_AFTER_S = 600.0
"""How long the player waits for its first subscription."""
LAST_WORDS_S = 30.0
"""How long a client may take over what is left for it when the day has been played, and again over its goodbye."""
POLL_S = 0.05
AT_ONCE = 256
"""Records that are passed on before the senders get a turn."""


class Placed(NamedTuple):
    """A batch, and where it lies in the store."""

    header: BatchHeader
    key: str
    start: int
    length: int


class Order:
    """Gives the records of batches in the order of their receive times, each connection's as it received them.

    Batches of several connections and channels overlap in time: one is opened when its first record is due, so memory holds
    those that overlap.
    """

    def __init__(self, batches: Sequence[Placed]) -> None:
        self._waiting = sorted(batches, key=lambda placed: placed.header.recv_first_ns, reverse=True)
        self._open: list[tuple[int, int, BatchHeader, Record, bytes, Iterator[bytes]]] = []
        self._count = itertools.count()

    def due(self) -> Placed | None:
        """Return the batch that has to be opened before the next record can be given, None where there is none."""
        if self._waiting and (not self._open or self._waiting[-1].header.recv_first_ns <= self._open[0][0]):
            return self._waiting.pop()
        return None

    def open(self, header: BatchHeader, records: bytes) -> None:
        """Take the records of the batch that was due."""
        self._push(header, iter(records.splitlines()))

    def next(self) -> tuple[BatchHeader, Record, bytes] | None:
        """Return the next record with its line; None at the end."""
        if not self._open:
            return None
        _, _, header, record, line, lines = heapq.heappop(self._open)
        self._push(header, lines)
        return header, record, line

    def _push(self, header: BatchHeader, lines: Iterator[bytes]) -> None:
        line = next(lines, None)
        if line is not None:
            record = parse_record(line)
            heapq.heappush(self._open, (record.recv_ns, next(self._count), header, record, line, lines))


class Player(Gateway):
    """Plays one recorded day of an environment."""

    def __init__(self, setting: Setting, stores: Stores, date: str, speed: float) -> None:
        super().__init__(setting, stores)
        self._date, self._speed = date, speed
        self._state = "reading"
        self._control = control_subject(setting.env.name, COMPONENT, date)
        self._beats_as = played(date), COMPONENT
        self._close_s = LAST_WORDS_S
        self.lag_s = 0.0

    async def _listen(self, runner: web.AppRunner) -> int:
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        return int(runner.addresses[0][1])

    async def _feed(self) -> None:
        """Play the day once. Raises `NotFoundError` where the store holds nothing of it."""
        order = Order(await self._batches())
        self._state = "serving"
        if not await self._has_listener():
            return
        self._state = "playing"
        began, first_ns, since = time.monotonic(), None, 0
        while True:
            while (placed := order.due()) is not None:
                data = await self._stores.raw.get_range(placed.key, placed.start, placed.length)
                for item in scan(data):
                    if isinstance(item, Batch):
                        order.open(item.header, await asyncio.to_thread(decode_records, data, item))
            if (found := order.next()) is None:
                break
            header, record, line = found
            first_ns = record.recv_ns if first_ns is None else first_ns
            self.lag_s = time.monotonic() - began - (record.recv_ns - first_ns) / 1e9 / self._speed
            if self.lag_s < 0:
                await asyncio.sleep(-self.lag_s)
            self._pass_record_on(header, record, line)
            since += 1
            if since % AT_ONCE == 0:
                await asyncio.sleep(0)
        self._state = "played"
        told = f"trading day {self._date} is played"
        await self._drain(told, close=True, drain_s=LAST_WORDS_S, close_s=LAST_WORDS_S)

    async def _batches(self) -> list[Placed]:
        """Return the batches of all channels that clients get, from the segments' trailers."""
        raw, feed = self._stores.raw, self._setting.env.feed
        found: list[Placed] = []
        for info in await raw.list(day_prefix(feed, self._date)):
            parsed = parse_segment_key(info.key)
            # Pages of REST were fetched after the day, hours or months, and no client ever heard of them.
            if parsed is None or parsed[0] in (SESSION, REST):
                continue
            data = await raw.get(info.key)
            found += [
                Placed(item.header, info.key, item.start, item.end - item.start)
                for item in await asyncio.to_thread(list, scan(data))
                if isinstance(item, Batch)
            ]
        if not found:
            raise NotFoundError(f"the store holds no record of {self._date} that a client could get", where=self._env)
        return found

    async def _has_listener(self) -> bool:
        deadline = time.monotonic() + NO_CLIENT_AFTER_S
        while time.monotonic() < deadline:
            if any(client.channels for client in self._clients):
                return True
            await asyncio.sleep(POLL_S)
        return False

    def _status(self) -> dict[str, Any]:
        return super()._status() | {"state": self._state, "speed": self._speed, "lag_s": round(max(0.0, self.lag_s), 3)}


async def main(env_name: str, date: str, speed: float, stop: asyncio.Event) -> None:
    """Play one day until its end or until `stop` is set."""
    setting = load_setting(env_name)
    async with connected(setting, COMPONENT) as stores:
        await Player(setting, stores, date, speed).run(stop)


if __name__ == "__main__":
    if len(sys.argv) != 4:
        sys.exit(int(ExitCode.USAGE))
    run(lambda stop: main(sys.argv[1], sys.argv[2], float(sys.argv[3]), stop))
