"""How fast recording is: `python -m benchmarks capture`; prints a table. Wants two quiet cores.

End to end: the simulated exchange sends as fast as the socket takes, to a connector that spools with fsync and publishes to a
real NATS server with `sync_interval: always`; counted is what the stream has acknowledged. Beside it a bare read loop with
picows and one with the `websockets` library on the same exchange. Then the parts by themselves, in this process.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
import subprocess
import tempfile
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import aiohttp
import msgspec
import uvloop
import websockets
from picows import WSFrame, WSListener, WSMsgType, WSTransport, ws_connect

from ssmd_dagster.archive.batch import Batch, read_last
from ssmd_dagster.archive.readback import DayReadback
from ssmd_dagster.archive.segment import SegmentWriter
from ssmd_dagster.capture.recorder import Flush, Origin, Recorder, seal
from ssmd_dagster.clock import system_clock
from ssmd_dagster.exchange import Envelope
from ssmd_dagster.kalshi.wire import CHANNEL_OF_TYPE
from ssmd_dagster.simulator.main import command as simulator_command
from ssmd_dagster_tests.house import House, until

SECONDS = 8.0
MARKETS = 500
SUBSCRIBE = {"channels": ["orderbook_delta", "trade"]}


def row(name: str, value: str, note: str = "") -> None:
    """Print one line of the table."""
    print(f"| {name} | {value} | {note} |", flush=True)


@contextlib.contextmanager
def fast_house() -> Iterator[tuple[House, str]]:
    """A house whose simulated exchange sends as fast as the socket takes."""
    with tempfile.TemporaryDirectory(prefix="ssmd-bench-") as folder:
        house = House.build(Path(folder))
        house.add(
            "bench",
            simulator={"seed": 5, "markets": MARKETS, "rate_per_second": 1_000_000},
            capture={**SUBSCRIBE, "markets": {"all": True}, "spool_limit_mb": 4096, "stream_limit_mb": 8192},
            lease_ttl_s=30,
        )
        house.up("bench")
        try:
            yield house, "bench"
        finally:
            house.down()


def connector_to_stream() -> None:
    """Messages a second from the socket to the acknowledged batch, while the archiver works beside it."""
    with fast_house() as (house, env):
        house.ssmd("day", "start", env)
        day = house.today()

        def messages() -> int:
            return int(house.json("day", "status", env)["components"]["connector-a"]["frames"])

        until(lambda: messages() > 100_000)
        first, began = messages(), time.monotonic()
        time.sleep(SECONDS)
        last, taken_s = messages(), time.monotonic() - began
        beat = house.json("day", "status", env)["components"]["connector-a"]
        row(
            "connector, socket to spool and stream",
            f"{(last - first) / taken_s:,.0f} msg/s",
            f"{beat['unacked_batches']} batches behind",
        )
        house.ssmd("day", "end", env)
        shown = house.day(env, day)
        total = sum(sheet["archived"] for sheet in shown["ledger"]["channels"])
        size = sum(path.stat().st_size for path in Path(shown["archive"]).glob("*.zst"))
        row("archived and verified", f"{total:,} records", f"{size / total:.1f} bytes a record")


async def _bare_picows(endpoint: str, tickers: list[str]) -> float:
    class Listener(WSListener):
        frames = 0

        def on_ws_connected(self, transport: WSTransport) -> None:
            command = {"id": 1, "cmd": "subscribe", "params": {**SUBSCRIBE, "market_tickers": tickers}}
            transport.send(WSMsgType.TEXT, json.dumps(command).encode())

        def on_ws_frame(self, transport: WSTransport, frame: WSFrame) -> None:
            self.frames += 1

    listener = Listener()
    transport, _ = await ws_connect(lambda: listener, endpoint)
    await asyncio.sleep(2)
    first, began = listener.frames, time.monotonic()
    await asyncio.sleep(SECONDS)
    rate = (listener.frames - first) / (time.monotonic() - began)
    transport.disconnect()
    return rate


async def _websockets(endpoint: str, tickers: list[str]) -> float:
    async with websockets.connect(endpoint, max_size=None, max_queue=None) as socket:
        command = {"id": 1, "cmd": "subscribe", "params": {**SUBSCRIBE, "market_tickers": tickers}}
        await socket.send(json.dumps(command))
        end, frames = time.monotonic() + SECONDS, 0
        async for _ in socket:
            frames += 1
            if time.monotonic() > end:
                return frames / SECONDS
    return 0.0


@contextlib.contextmanager
def _exchange() -> Iterator[dict[str, Any]]:
    with tempfile.TemporaryDirectory(prefix="ssmd-bench-") as folder:
        line = simulator_command(
            home=Path(folder) / "sim", ws_port=0, rest_port=0, seed=5, markets=MARKETS, rate=0, auth=False, pauses=False
        )
        with subprocess.Popen(line, stdout=subprocess.PIPE) as process:
            assert process.stdout is not None
            try:
                yield json.loads(process.stdout.readline())
            finally:
                process.terminate()


async def _read_loops() -> None:
    for name, loop in (("bare picows read loop", _bare_picows), ("websockets library, read loop", _websockets)):
        with _exchange() as ready:
            url = f"{ready['rest_endpoint']}/markets?limit=1000&status=open"
            async with aiohttp.ClientSession() as session, session.get(url) as answer:
                tickers = [market["ticker"] for market in (await answer.json())["markets"]][:MARKETS]
            row(name, f"{await loop(ready['endpoint'], tickers):,.0f} msg/s", "no parsing, nothing kept")


def parts() -> None:
    """The connector's work without a socket, and what the archiver and the verification make of its batches."""
    draw = random.Random(5)
    markets = [
        (f"KXBTCD-26NOV2217-T{draw.randrange(80_000, 120_000)}.99", str(uuid.UUID(int=draw.getrandbits(128))))
        for _ in range(400)
    ]
    count = 300_000
    frames = []
    for n in range(1, count + 1):
        ticker, market_id = markets[min(int(draw.paretovariate(0.8)), 400) - 1]
        ts_ms = 1765670400000 + n // 30
        frames.append(
            b'{"type":"orderbook_delta","sid":2,"seq":%d,"msg":{"market_ticker":"%b","market_id":"%b","clock":%d,'
            b'"price_dollars":"0.%02d00","delta_fp":"%d.00","side":"%b","ts_ms":%d},"sending_ts_ms":%d}'
            % (
                n,
                ticker.encode(),
                market_id.encode(),
                n * 3,
                draw.randrange(1, 99),
                draw.randrange(-500, 500),
                draw.choice((b"yes", b"no")),
                ts_ms,
                ts_ms + 4,
            )
        )
    origin = Origin(env="bench", day="2025-12-14", epoch=1, conn="1-a-0")
    flushes: list[Flush] = []
    recorder = Recorder(
        origin, channel_of_type=CHANNEL_OF_TYPE, clock=system_clock, on_flush=flushes.append, on_end=lambda _: None
    )
    decode = msgspec.json.Decoder(Envelope).decode
    began = time.perf_counter()
    for payload in frames:
        recorder.on_frame(1765670400123456789, payload, decode(payload))
    recorder.on_closed(1, "done")
    taken_s = time.perf_counter() - began
    row("decode and record", f"{count / taken_s:,.0f} msg/s", "one core")
    began = time.perf_counter()
    sealed = [(unsealed.channel, seal(origin, unsealed)) for flush in flushes for unsealed in flush]
    row("seal (zstd, sha256)", f"{count / (time.perf_counter() - began):,.0f} msg/s", "one core")
    size = sum(len(data) for _, data in sealed)
    row("batches of 1,000", f"{size / count:.1f} bytes/msg", f"{sum(map(len, frames)) / count:.0f}-byte frames")
    with tempfile.TemporaryDirectory(prefix="ssmd-bench-") as folder:
        segments: dict[str, Path] = {}
        began = time.perf_counter()
        for channel in dict(sealed):
            path = Path(folder) / f"{channel}.zst"
            writer = SegmentWriter(path, env="bench", day="2025-12-14", channel=channel, number=0, prev_sha256=None)
            for name, data in sealed:
                if name == channel:
                    batch = read_last(data)
                    assert isinstance(batch, Batch)
                    writer.append(data, batch)
            writer.close(epoch=1)
            segments[channel] = path
        row(
            "archiver, passing batches on",
            f"{count / (time.perf_counter() - began):,.0f} msg/s",
            "one core, no network",
        )
        contents = {channel: path.read_bytes() for channel, path in segments.items()}
        began = time.perf_counter()
        readback = DayReadback("bench", "2025-12-14")
        for channel in sorted(contents, key=lambda name: name != "session"):
            readback.feed(channel, channel, 0, contents[channel])
        found = readback.finish(lambda key, start, length: contents[key][start : start + length])
        row(
            "verify (read back)",
            f"{found.records / (time.perf_counter() - began):,.0f} records/s",
            f"{len(found.faults)} faults",
        )


def main() -> None:
    """Print the table."""
    print("| what | result | |\n|---|---|---|", flush=True)
    parts()
    uvloop.run(_read_loops())
    connector_to_stream()


if __name__ == "__main__":
    main()
