"""How fast and how small recording is: `python -m benchmarks capture`; prints a table with its targets, writes nothing else.

First the parts that need no server and the archiver by itself against a real NATS server, then whole processes: the simulated
exchange, a NATS server with `sync_interval: always` and a connector share the machine, and what the stream has acknowledged is
counted; beside it a bare read loop with picows and one with the `websockets` library. At full speed the exchange sends what
the connector's socket takes, and no more: one that is told a rate beyond that spends the connector's share of the machine on
frames that it then throws away. Wants two quiet cores and about seven minutes; what is given per second of CPU hardly depends
on who else is at work.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
import signal
import statistics
import subprocess
import tempfile
import time
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import aiohttp
import msgspec
import psutil
import redis
import uvloop
import websockets
from nats.aio.msg import Msg
from picows import WSFrame, WSListener, WSMsgType, WSTransport, ws_connect

from ssmd_dagster.archive.batch import Batch, decode_records, read_last
from ssmd_dagster.archive.readback import DayReadback
from ssmd_dagster.archive.records import parse_record
from ssmd_dagster.archive.segment import SegmentWriter
from ssmd_dagster.capture.archiver import Archiver
from ssmd_dagster.capture.control import control_subject, request
from ssmd_dagster.capture.recorder import Flush, Origin, Recorder, seal
from ssmd_dagster.capture.setting import Setting
from ssmd_dagster.clock import system_clock
from ssmd_dagster.day.states import EventName
from ssmd_dagster.environments.loader import load_registry
from ssmd_dagster.environments.secrets import load_secrets
from ssmd_dagster.exchange import Envelope
from ssmd_dagster.kalshi.wire import CHANNEL_OF_TYPE
from ssmd_dagster.simulator.main import command as simulator_command
from ssmd_dagster.stores.connect import connect, read_stack
from ssmd_dagster.stores.daybook import DayBook
from ssmd_dagster_tests.house import House, until

ENV = "bench"
DATE = "2025-12-14"
SECONDS = 8.0
END_TIMEOUT_S = 1800.0
MARKETS = 500
SUBSCRIBE = {"channels": ["orderbook_delta", "trade"]}
FRAMES = 300_000
QUIET_PER_S, BUSY_PER_S = 5, 5_000
CALM_PER_S = 1_000
LINGER_NS = 50_000_000


def row(name: str, value: str, target: str = "", met: bool | None = None, note: str = "") -> None:
    """Print one line of the table."""
    print(f"| {name} | {value} | {target} | {'' if met is None else 'yes' if met else '**no**'} | {note} |", flush=True)


class Stack:
    """A house whose simulated exchange sends so many messages a second, and its processes' own words."""

    def __init__(self, house: House) -> None:
        self.house = house
        addresses = read_stack(house.home)
        url, self._exchange = addresses.cache, addresses.simulators[ENV].rest_endpoint
        assert url is not None
        self._redis = redis.Redis.from_url(url, password=load_secrets(house.home)["SSMD_REDIS_PASSWORD"], protocol=2)

    def beat(self, component: str) -> dict[str, Any]:
        """Return a component's heartbeat, read straight from the cache."""
        raw = self._redis.get(f"{ENV}:capture:{self.house.today()}:{component}")
        return {} if raw is None else dict(msgspec.json.decode(raw))

    def process(self, component: str) -> psutil.Process:
        """Return a component's process."""
        return psutil.Process(int(self.beat(component)["pid"]))

    def server(self, words: str) -> psutil.Process:
        """Return a server of this house by words of its command line."""
        home = str(self.house.home)
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                if words in (line := " ".join(process.cmdline())) and home in line:
                    return process
        raise LookupError(words)

    def full_speed(self) -> None:
        """Let the exchange send as fast as the connector reads."""
        told = urllib.request.Request(f"{self._exchange.split('/trade-api')[0]}/sim/rate", data=b'{"rate":0}')
        with urllib.request.urlopen(told, timeout=10):
            pass

    def gateway(self) -> psutil.Process:
        """Return the gateway's process."""
        raw = self._redis.get(f"{ENV}:capture:live:gateway")
        assert raw is not None
        return psutil.Process(int(msgspec.json.decode(raw)["pid"]))


@contextlib.contextmanager
def stack(rate: float) -> Iterator[Stack]:
    """A house with servers, exchange and an ACTIVE day."""
    with tempfile.TemporaryDirectory(prefix="ssmd-bench-") as folder:
        house = House.build(Path(folder))
        house.add(
            ENV,
            simulator={"seed": 5, "markets": MARKETS, "rate_per_second": rate},
            capture={**SUBSCRIBE, "markets": {"all": True}, "spool_limit_mb": 4096, "stream_limit_mb": 8192},
            lease_ttl_s=30,
        )
        house.up(ENV)
        try:
            began = time.monotonic()
            house.ssmd("day", "start", ENV)
            if rate == BUSY_PER_S:
                took_s = time.monotonic() - began
                row("`ssmd day start` to ACTIVE", f"{took_s:.1f} s", "< 5 s", took_s < 5, "the whole command")
            yield Stack(house)
        finally:
            house.down()


def connector_at_full_speed() -> None:
    """Messages a second from the socket to the acknowledged batch, and what the processes weigh afterwards."""
    with stack(CALM_PER_S) as running:
        beat = running.beat
        running.full_speed()
        until(lambda: beat("connector-a").get("frames", 0) > 200_000)
        heaviest = {"connector-a": 0, "archiver": 0}

        def weigh(seconds: float) -> None:
            end = time.monotonic() + seconds
            while time.monotonic() < end:
                for name in heaviest:
                    heaviest[name] = max(heaviest[name], running.process(name).memory_info().rss)
                time.sleep(0.5)

        measured = {
            "connector": running.process("connector-a"),
            "exchange": running.server("ssmd_dagster.simulator"),
            "NATS": running.server("nats-server"),
        }
        readers = {"archiver": running.process("archiver"), "gateway": running.gateway()}
        for process in readers.values():
            process.suspend()
        try:
            speed = _speed(beat, measured, lambda: weigh(SECONDS))
        finally:
            for process in readers.values():
                process.resume()
        row(
            "connector, socket to acknowledged batch",
            f"{speed.per_s:,.0f} msg/s",
            "≥ 150,000",
            speed.per_s >= 150_000,
            f"beside exchange and NATS; {speed.behind} batches behind",
        )
        _cpu_row(speed)
        speed = _speed(beat, {**measured, **readers}, lambda: weigh(2 * SECONDS))
        note = f"{speed.behind} batches behind"
        row("the same, archiver and gateway at work too", f"{speed.per_s:,.0f} msg/s", "", None, note)
        _cpu_row(speed)
        row(
            "connector's memory",
            f"{heaviest['connector-a'] >> 20} MiB",
            "< 200",
            heaviest["connector-a"] >> 20 < 200,
            f"after {beat('connector-a')['frames']:,} messages",
        )
        _end(running.house)
        day = running.house.day(ENV, running.house.today())
        total = sum(sheet["archived"] for sheet in day["ledger"]["channels"])
        size = sum(path.stat().st_size for path in Path(day["archive"]).glob("*.zst"))
        row("archiver's memory", f"{heaviest['archiver'] >> 20} MiB", "< 300", heaviest["archiver"] >> 20 < 300)
        row("archived and verified", f"{total:,} records", "", None, f"{size / total:.1f} bytes a record")


def _end(house: House) -> None:
    """End the day, however long the proof of so much takes."""
    ending = house.spawn("day", "end", ENV)
    output, errors = ending.communicate(timeout=END_TIMEOUT_S)
    if ending.returncode not in (0, 3):
        raise SystemExit(f"the day could not be ended: {output}{errors}")


class Speed(NamedTuple):
    """Records a second that came off the socket and were acknowledged, batches that were not yet at the end, CPU µs a frame."""

    per_s: float
    behind: int
    cpu_us: dict[str, float]


def _speed(
    beat: Callable[[str], dict[str, Any]], processes: dict[str, psutil.Process], meanwhile: Callable[[], None]
) -> Speed:
    """Measure from one heartbeat of the connector to another, by its own count and clock."""
    first, before = _fresh(beat), {name: _cpu_s(process) for name, process in processes.items()}
    meanwhile()
    last, after = _fresh(beat), {name: _cpu_s(process) for name, process in processes.items()}
    if first["conn"] != last["conn"]:
        raise SystemExit(f"connection {first['conn']} broke while it was measured")
    frames, records = (last[key] - first[key] for key in ("frames", "acked_records"))
    cpu_us = {name: (after[name] - before[name]) / frames * 1e6 for name in processes}
    # Acknowledgements of what came before the measurement are no speed, nor are frames that only wait in the spool.
    return Speed(min(frames, records) / ((last["at_ns"] - first["at_ns"]) / 1e9), last["unacked_batches"], cpu_us)


def _fresh(beat: Callable[[str], dict[str, Any]]) -> dict[str, Any]:
    """Return the connector's next heartbeat, at once when it comes."""
    old = beat("connector-a")["at_ns"]
    return dict(until(lambda: new if (new := beat("connector-a"))["at_ns"] != old else None))


def _cpu_s(process: psutil.Process) -> float:
    times = process.cpu_times()
    return float(times.user + times.system)


def _cpu_row(speed: Speed) -> None:
    words = ", ".join(f"{name} {us:.1f} µs" for name, us in speed.cpu_us.items())
    note = f"two cores of their own would carry {2e6 / sum(speed.cpu_us.values()):,.0f} msg/s"
    row("CPU of that, a message", words, "", None, note)


def latency() -> None:
    """From the socket to the acknowledgement at 5,000 messages a second: the acknowledgements are listened to."""
    with stack(BUSY_PER_S) as running:
        until(lambda: running.beat("connector-a").get("frames", 0) > 20_000)
        age_ms = sorted(uvloop.run(_ages(running.house)))
        p50, p99 = statistics.median(age_ms), age_ms[int(0.99 * len(age_ms))]
        row("receive to acknowledged, p99", f"{p99:.0f} ms", "< 150 ms", p99 < 150, f"median {p50:.0f} ms, 5,000 msg/s")
        _end(running.house)


async def _ages(house: House) -> list[float]:
    """Return how old each record was when its batch was acknowledged, in ms."""
    secrets = load_secrets(house.home)
    env = load_registry(house.exchanges).get(ENV)
    acknowledged: dict[int, int] = {}
    answer = re.compile(rb'"stream":\s*"%b-raw".*"seq":\s*(\d+)' % ENV.encode())

    async def hear(message: Msg) -> None:
        if (found := answer.search(message.data)) is not None:
            acknowledged.setdefault(int(found[1]), time.time_ns())

    async with connect(env, house.home, secrets, name="bench") as stores:
        await stores.nc.subscribe("_INBOX.>", cb=hear)
        await asyncio.sleep(SECONDS)
        ages: list[float] = []
        async with stores.raw_stream.consume(house.today()) as consumer:
            while batches := await consumer.fetch(1.0):
                for message in batches:
                    at_ns = acknowledged.get(message.seq)
                    batch = read_last(message.data)
                    if at_ns is not None and isinstance(batch, Batch) and batch.header.channel != "session":
                        for line in decode_records(message.data, batch).splitlines():
                            ages.append((at_ns - parse_record(line).recv_ns) / 1e6)
                if batches[-1].seq > max(acknowledged):
                    break
        return ages


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
                process.send_signal(signal.SIGTERM)


async def _tickers(ready: dict[str, Any]) -> list[str]:
    url = f"{ready['rest_endpoint']}/markets?limit=1000&status=open"
    async with aiohttp.ClientSession() as session, session.get(url) as answer:
        return [market["ticker"] for market in (await answer.json())["markets"]][:MARKETS]


class _Listener(WSListener):
    """Counts frames, and keeps the first `wanted`."""

    def __init__(self, tickers: list[str], wanted: int = 0) -> None:
        self.frames = 0
        self.kept: list[bytes] = []
        self.wanted = wanted
        self._tickers = tickers

    def on_ws_connected(self, transport: WSTransport) -> None:
        """Subscribe."""
        command = {"id": 1, "cmd": "subscribe", "params": {**SUBSCRIBE, "market_tickers": self._tickers}}
        transport.send(WSMsgType.TEXT, json.dumps(command).encode())

    def on_ws_frame(self, transport: WSTransport, frame: WSFrame) -> None:
        """Count."""
        self.frames += 1
        if len(self.kept) < self.wanted:
            self.kept.append(frame.get_payload_as_bytes())


async def _bare_picows(ready: dict[str, Any]) -> float:
    listener = _Listener(await _tickers(ready))
    transport, _ = await ws_connect(lambda: listener, ready["endpoint"])
    await asyncio.sleep(2)
    first, began = listener.frames, time.monotonic()
    await asyncio.sleep(SECONDS)
    rate = (listener.frames - first) / (time.monotonic() - began)
    transport.disconnect()
    return rate


async def _websockets(ready: dict[str, Any]) -> float:
    tickers = await _tickers(ready)
    async with websockets.connect(ready["endpoint"], max_size=None, max_queue=None) as socket:
        command = {"id": 1, "cmd": "subscribe", "params": {**SUBSCRIBE, "market_tickers": tickers}}
        await socket.send(json.dumps(command))
        end, frames = time.monotonic() + SECONDS, 0
        async for _ in socket:
            frames += 1
            if time.monotonic() > end:
                return frames / SECONDS
    return 0.0


def read_loops() -> None:
    """What the same exchange gives to whoever only reads."""
    for name, loop in (("bare picows read loop", _bare_picows), ("`websockets` library, read loop", _websockets)):
        with _exchange() as ready:
            row(name, f"{uvloop.run(loop(ready)):,.0f} msg/s", "", None, "no parsing, nothing kept")


def real_shaped_frames(count: int) -> list[bytes]:
    """Return frames as the exchange sends them."""

    async def read(ready: dict[str, Any]) -> list[bytes]:
        listener = _Listener(await _tickers(ready), count)
        transport, _ = await ws_connect(lambda: listener, ready["endpoint"])
        while len(listener.kept) < count:
            await asyncio.sleep(0.05)
        transport.disconnect()
        return listener.kept

    with _exchange() as ready:
        return uvloop.run(read(ready))


def recorded(frames: list[bytes], per_s: float | None) -> tuple[Origin, list[Flush]]:
    """Put frames through a recorder; `per_s` None: as fast as it goes, else flushed every 50 ms at that rate."""
    origin = Origin(env=ENV, day=DATE, epoch=2, conn="2-a-0")
    flushes: list[Flush] = []
    recorder = Recorder(
        origin, channel_of_type=CHANNEL_OF_TYPE, clock=system_clock, on_flush=flushes.append, on_end=lambda _: None
    )
    decode = msgspec.json.Decoder(Envelope).decode
    now_ns = flushed_ns = 1_765_670_400_123_456_789
    for payload in frames:
        recorder.on_frame(now_ns, payload, decode(payload))
        if per_s is not None:
            now_ns += int(1e9 / per_s)
            if now_ns - flushed_ns >= LINGER_NS:
                recorder.flush()
                flushed_ns = now_ns
    recorder.on_closed(now_ns, "done")
    return origin, flushes


def sealed(frames: list[bytes], per_s: float | None) -> list[bytes]:
    """Return the encoded batches of frames."""
    origin, flushes = recorded(frames, per_s)
    return [seal(origin, unsealed) for flush in flushes for unsealed in flush]


def parts(frames: list[bytes]) -> None:
    """The connector's work without a socket, the size of what is archived, and the verification's reading."""
    count = len(frames)
    mean = sum(map(len, frames)) / count
    kinds = Counter(json.loads(payload)["type"] for payload in frames)
    shares = ", ".join(
        f"{number / count:.1%} {kind}" for kind, number in kinds.most_common() if number / count > 0.0005
    )
    row("frames", f"{mean:.0f} bytes on average", "", None, shares)
    began = time.process_time()
    origin, flushes = recorded(frames, None)
    row("decode and record", f"{count / (time.process_time() - began):,.0f} msg/s", "", None, "a second of one core")
    began = time.process_time()
    batches = [seal(origin, unsealed) for flush in flushes for unsealed in flush]
    row("seal (zstd, sha256)", f"{count / (time.process_time() - began):,.0f} msg/s", "", None, "a second of one core")
    for name, per_s, limit in (("quiet", QUIET_PER_S, 60), ("busy", BUSY_PER_S, 30)):
        part = frames[: 18_000 if per_s == QUIET_PER_S else count]
        with tempfile.TemporaryDirectory(prefix="ssmd-bench-") as folder:
            size = sum(path.stat().st_size for path in _segments(Path(folder), sealed(part, per_s)).values())
        each = size / len(part)
        row(f"{name} channel, {per_s:,} msg/s", f"{each:.1f} bytes/msg", f"≤ {limit}", each <= limit, f"of {mean:.0f}")
    with tempfile.TemporaryDirectory(prefix="ssmd-bench-") as folder:
        contents = {channel: path.read_bytes() for channel, path in _segments(Path(folder), batches).items()}
    began = time.process_time()
    readback = DayReadback(ENV, DATE)
    for channel in sorted(contents, key=lambda name: name != "session"):
        readback.feed(channel, channel, 0, contents[channel])
    found = readback.finish(lambda key, start, length: contents[key][start : start + length])
    rate = found.records / (time.process_time() - began)
    note = f"a second of one core; {len(found.faults)} faults"
    row("verify (read back)", f"{rate:,.0f} records/s", "≥ 500,000", rate >= 500_000, note)


def _segments(folder: Path, batches: list[bytes]) -> dict[str, Path]:
    writers: dict[str, SegmentWriter] = {}
    for data in batches:
        batch = read_last(data)
        assert isinstance(batch, Batch)
        channel = batch.header.channel
        if channel not in writers:
            path = folder / f"{channel}.zst"
            writers[channel] = SegmentWriter(path, env=ENV, day=DATE, channel=channel, number=0, prev_sha256=None)
        writers[channel].append(data, batch)
    for writer in writers.values():
        writer.close(epoch=2)
    return {channel: writer.path for channel, writer in writers.items()}


def archiver(frames: list[bytes]) -> None:
    """The archiver with a real NATS server and a local store, from the first batch in the stream to the last one stored."""
    for name, per_s, target in (
        ("archiver, passing batches on", None, 500_000),
        ("archiver, joining the batches of 5,000 msg/s", 5_000, 120_000),
        ("archiver, joining the batches of 400 msg/s", 400, 0),
    ):
        many = frames * 3 if per_s is None else frames
        rate, note = uvloop.run(_archive(sealed(many, per_s), len(many)))
        row(name, f"{rate:,.0f} msg/s", f"≥ {target:,}" if target else "", rate >= target if target else None, note)


async def _archive(batches: list[bytes], records: int) -> tuple[float, str]:
    with tempfile.TemporaryDirectory(prefix="ssmd-bench-") as folder:
        house = House.build(Path(folder))
        house.add(
            ENV,
            simulator={"seed": 5, "markets": 1, "rate_per_second": 1},
            capture={**SUBSCRIBE, "markets": {"all": True}, "stream_limit_mb": 8192},
        )
        await asyncio.to_thread(house.up, ENV)
        try:
            env = load_registry(house.exchanges).get(ENV)
            setting = Setting(env, house.home, load_secrets(house.home), system_clock)
            async with connect(env, house.home, setting.secrets, name="bench") as stores:
                await stores.journal.create()
                await stores.raw_stream.create(8 << 30)
                book = DayBook(ENV, stores.journal, stores.cache, system_clock, "bench")
                await book.append(DATE, EventName.DEFINED)
                day = await book.append(DATE, EventName.START_REQUESTED, data={"mode": "live"})
                assert day.epoch is not None
                expected = 0
                for data in batches:
                    batch = read_last(data)
                    assert isinstance(batch, Batch)
                    h = batch.header
                    expected += h.records if h.channel != "session" else 0
                    published = await stores.raw_stream.publish(
                        data, date=DATE, channel=h.channel, conn=h.conn, batch=h.batch, records=h.records
                    )
                    if h.batch % 64 == 0:
                        await published
                await published
                stop = asyncio.Event()
                began, cpu_began = time.perf_counter(), time.process_time()
                running = asyncio.create_task(Archiver(setting, stores, DATE, day.epoch).run(stop))
                subject = control_subject(ENV, "archiver", DATE)
                await asyncio.sleep(0.05)
                await request(stores.nc, subject, "flush")
                while (status := await request(stores.nc, subject, "status"))["flushing"]:
                    await asyncio.sleep(0.02)
                taken_s, cpu_s = time.perf_counter() - began, time.process_time() - cpu_began
                stop.set()
                await running
                assert status["messages"] == expected, (status, expected)
                return records / taken_s, f"{len(batches):,} batches; {records / cpu_s:,.0f} a second of its CPU"
        finally:
            await asyncio.to_thread(house.down)


def main() -> None:
    """Print the table."""
    print(f"{os.cpu_count()} cores, load {os.getloadavg()[0]:.1f} at the beginning\n")
    print("| what | result | target | met | |\n|---|---|---|---|---|", flush=True)
    frames = real_shaped_frames(FRAMES)
    parts(frames)
    archiver(frames)
    read_loops()
    latency()
    connector_at_full_speed()


if __name__ == "__main__":
    main()
