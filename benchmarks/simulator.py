"""How fast the simulated exchange is: `python benchmarks/simulator.py`; prints a table. Wants two quiet cores.

The deltas are counted by a client in this process that reads every frame; the truth log is written all the while.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import resource
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

import aiohttp
import uvloop
from picows import WSFrame, WSListener, WSMsgType, WSTransport, ws_connect

from ssmd_dagster.simulator.main import command
from ssmd_dagster.simulator.truth import Frame, read_truth

_START_DEADLINE_S = 30


class Counter(WSListener):
    """Counts frames and bytes."""

    def __init__(self) -> None:
        self.frames = 0
        self.bytes = 0

    def on_ws_frame(self, transport: WSTransport, frame: WSFrame) -> None:
        """Count one frame, answer a ping."""
        if frame.msg_type == WSMsgType.TEXT:
            self.frames += 1
            self.bytes += frame.payload_size


class Exchange:
    """A simulator in a process of its own."""

    def __init__(self, home: Path, *, markets: int, rate: float) -> None:
        line = command(home=home, ws_port=0, rest_port=0, seed=1, markets=markets, rate=rate, auth=False, pauses=False)
        begin_s = time.perf_counter()
        self.process = subprocess.Popen([*line, "--answer-delay", "0"], stdout=subprocess.PIPE)
        assert self.process.stdout is not None
        self.ready: dict[str, Any] = json.loads(self.process.stdout.readline())
        self.start_s = time.perf_counter() - begin_s

    def cpu_s(self) -> float:
        """Return the processor time that the process has used."""
        fields = Path(f"/proc/{self.process.pid}/stat").read_text().rsplit(")", 1)[1].split()
        return (int(fields[11]) + int(fields[12])) / 100

    def stop(self) -> None:
        """Stop the process and wait for it."""
        self.process.terminate()
        self.process.wait(_START_DEADLINE_S)


async def tickers(rest: str, limit: int) -> list[str]:
    """Return open markets."""
    found: list[str] = []
    cursor = ""
    async with aiohttp.ClientSession() as http:
        while len(found) < limit:
            query = {"status": "open", "limit": "1000", "mve_filter": "exclude", "cursor": cursor}
            async with http.get(f"{rest}/markets", params=query) as response:
                page = await response.json()
            found += [market["ticker"] for market in page["markets"]]
            cursor = page["cursor"]
            if not cursor:
                break
    return found[:limit]


async def deltas(markets: int, seconds: float, channels: list[str]) -> list[str]:
    """Measure frames a second on one connection at full speed."""
    with tempfile.TemporaryDirectory() as folder:
        exchange = Exchange(Path(folder), markets=markets, rate=0)
        names = await tickers(exchange.ready["rest_endpoint"], markets)
        transport, counter = await ws_connect(Counter, exchange.ready["endpoint"])
        assert isinstance(counter, Counter)
        params = {"channels": channels, "market_tickers": names, "skip_ticker_ack": True}
        told = {"id": 1, "cmd": "subscribe", "params": params}
        transport.send(WSMsgType.TEXT, json.dumps(told).encode())
        while counter.frames < len(names) + len(channels):
            await asyncio.sleep(0.01)
        await asyncio.sleep(0.5)
        frames, size, begin_s, cpu_s = counter.frames, counter.bytes, time.perf_counter(), exchange.cpu_s()
        own = resource.getrusage(resource.RUSAGE_SELF)
        await asyncio.sleep(seconds)
        spent_s = time.perf_counter() - begin_s
        frames, size, cpu_s = counter.frames - frames, counter.bytes - size, exchange.cpu_s() - cpu_s
        mine = resource.getrusage(resource.RUSAGE_SELF)
        transport.disconnect(False)
        exchange.stop()
        own_s = mine.ru_utime + mine.ru_stime - own.ru_utime - own.ru_stime
        name = "deltas" if len(channels) == 1 else "+".join(channels)
        return [
            f"{name} to one connection, {len(names)} markets",
            f"{frames / spent_s:,.0f}/s",
            f"{size / spent_s / 1e6:,.0f} MB/s",
            f"simulator {cpu_s / spent_s:.0%}, client {own_s / spent_s:.0%}",
        ]


async def pages(limit: int, seconds: float) -> list[str]:
    """Measure REST pages a second over 20,000 markets, walked with the cursor, several walks at once."""
    with tempfile.TemporaryDirectory() as folder:
        exchange = Exchange(Path(folder), markets=20_000, rate=100)
        count = 0
        rows = 0
        stop_s = time.perf_counter() + seconds

        async def walk(http: aiohttp.ClientSession) -> None:
            nonlocal count, rows
            cursor = ""
            while time.perf_counter() < stop_s:
                query = {"limit": str(limit), "mve_filter": "exclude", "cursor": cursor}
                async with http.get(f"{exchange.ready['rest_endpoint']}/markets", params=query) as response:
                    body = await response.read()
                count += 1
                rows += limit
                cursor = body[body.rfind(b'"cursor":"') + 10 : -2].decode()

        async with aiohttp.ClientSession() as http:
            begin_s = time.perf_counter()
            await asyncio.gather(*(walk(http) for _ in range(8)))
            spent_s = time.perf_counter() - begin_s
        exchange.stop()
        return [f"REST pages of {limit} markets", f"{count / spent_s:,.0f}/s", f"{rows / spent_s:,.0f} rows/s", ""]


def start(markets: int) -> list[str]:
    """Measure the time from nothing to ready, in a new home."""
    with tempfile.TemporaryDirectory() as folder:
        exchange = Exchange(Path(folder), markets=markets, rate=100)
        exchange.stop()
        return [f"start with {markets:,} markets", f"{exchange.start_s:.2f} s", "", ""]


def reading() -> list[str]:
    """Measure how fast the truth log is read."""
    with tempfile.TemporaryDirectory() as folder:
        exchange = Exchange(Path(folder), markets=100, rate=0)
        uvloop.run(_listen(exchange))
        exchange.stop()
        begin_s = time.perf_counter()
        count = sum(isinstance(entry, Frame) for entry in read_truth(Path(folder) / "truth"))
        spent_s = time.perf_counter() - begin_s
        return ["reading the truth log", f"{count / spent_s:,.0f}/s", "", ""]


async def _listen(exchange: Exchange) -> None:
    transport, _ = await ws_connect(Counter, exchange.ready["endpoint"])
    transport.send(WSMsgType.TEXT, b'{"id":1,"cmd":"subscribe","params":{"channels":["trade","ticker"]}}')
    await asyncio.sleep(2)
    transport.disconnect(False)


def main() -> None:
    """Run everything and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=5.0, help="length of each measurement")
    seconds = parser.parse_args().seconds
    lines = [
        start(20_000),
        start(100_000),
        uvloop.run(deltas(2_000, seconds, ["orderbook_delta"])),
        uvloop.run(deltas(20_000, seconds, ["orderbook_delta"])),
        uvloop.run(deltas(2_000, seconds, ["orderbook_delta", "trade", "ticker"])),
        uvloop.run(pages(100, seconds)),
        uvloop.run(pages(1_000, seconds)),
        reading(),
    ]
    widths = [max(len(line[column]) for line in lines) for column in range(4)]
    for line in lines:
        print("  ".join(text.ljust(width) for text, width in zip(line, widths, strict=True)).rstrip())


if __name__ == "__main__":
    main()
