"""How fast a day is verified: `python -m benchmarks verify`; prints a table. Wants two quiet cores.

A folder of segments as an archiver leaves them, mostly order book deltas with a snapshot of every market now and then, is read
back as `ssmd day verify` does: hashes, notes, numbers and trades in one pass, the books folded beside it by a process of its own.
"""

from __future__ import annotations

import asyncio
import json
import random
import tempfile
import time
from pathlib import Path

import msgspec

from ssmd_dagster.archive.batch import Batch, read_last
from ssmd_dagster.archive.layout import segment_key
from ssmd_dagster.archive.proofs import BookProofs
from ssmd_dagster.archive.segment import SegmentWriter
from ssmd_dagster.capture.recorder import Flush, Origin, Recorder, seal
from ssmd_dagster.day.calendar import Window
from ssmd_dagster.exchange import Envelope
from ssmd_dagster.kalshi.wire import CHANNEL_OF_TYPE
from ssmd_dagster.stores.objects import LocalObjectStore
from ssmd_dagster.workflows import reading
from ssmd_dagster.workflows.reading import DayReading

ENV, FEED, DATE = "bench", "kalshi", "2025-12-14"
OPEN_NS = 1_765_670_400_000_000_000
DELTAS, MARKETS = 1_200_000, 400
SNAPSHOTS_EVERY = 300_000
TRADES_EVERY = 40


def write_day(folder: Path) -> int:
    """Write the segments of a day below `folder` and return how many records they hold."""
    draw = random.Random(5)
    tickers = [f"KXBTCD-26NOV2217-T{80_000 + 25 * number}.99" for number in range(MARKETS)]
    books: dict[str, dict[tuple[str, int], int]] = {ticker: {} for ticker in tickers}
    origin = Origin(env=ENV, day=DATE, epoch=1, conn="1-a-0")
    flushes: list[Flush] = []
    recorder = Recorder(
        origin, channel_of_type=CHANNEL_OF_TYPE, clock=lambda: OPEN_NS, on_flush=flushes.append, on_end=lambda _: None
    )
    writers: dict[str, SegmentWriter] = {}
    decode = msgspec.json.Decoder(Envelope).decode
    seqs = {1: 0, 2: 0}

    def put(sid: int, kind: str, msg: bytes) -> None:
        seqs[sid] += 1
        payload = b'{"type":"%b","sid":%d,"seq":%d,"msg":%b,"sending_ts_ms":1765670400123}' % (
            kind.encode(), sid, seqs[sid], msg,
        )  # fmt: skip
        recorder.on_frame(OPEN_NS + seqs[2] * 1_000, payload, decode(payload))

    def snapshots() -> None:
        for ticker, book in books.items():
            sides = {
                f"{side}_dollars_fp": [[f"0.{p:02d}00", f"{z}.00"] for (s, p), z in sorted(book.items()) if s == side]
                for side in ("yes", "no")
            }
            put(
                2,
                "orderbook_snapshot",
                json.dumps({"market_ticker": ticker, **{k: v for k, v in sides.items() if v}}).encode(),
            )

    def drain() -> None:
        for flush in flushes:
            for unsealed in flush:
                data = seal(origin, unsealed)
                if unsealed.channel not in writers:
                    path = folder / segment_key(FEED, DATE, unsealed.channel, 0)
                    path.parent.mkdir(parents=True, exist_ok=True)
                    writers[unsealed.channel] = SegmentWriter(
                        path, env=ENV, day=DATE, channel=unsealed.channel, number=0, prev_sha256=None
                    )
                batch = read_last(data)
                assert isinstance(batch, Batch)
                writers[unsealed.channel].append(data, batch)
        flushes.clear()

    recorder.note({"event": "subscribed", "sids": {"trade": 1, "orderbook_delta": 2}})
    snapshots()
    for number in range(1, DELTAS + 1):
        ticker = tickers[min(int(draw.paretovariate(0.8)), MARKETS) - 1]
        level = (draw.choice(("yes", "no")), draw.randrange(1, 99))
        change = max(draw.randrange(-500, 500), -books[ticker].get(level, 0))
        size = books[ticker].get(level, 0) + change
        if size:
            books[ticker][level] = size
        else:
            books[ticker].pop(level, None)
        put(
            2,
            "orderbook_delta",
            b'{"market_ticker":"%b","market_id":"5b156c71-a417-4227-be60-42604fb8a380","clock":%d,"price_dollars":"0.%02d00",'
            b'"delta_fp":"%d.00","side":"%b","ts_ms":%d}'
            % (ticker.encode(), number * 3, level[1], change, level[0].encode(), 1765670400000 + number // 30),
        )
        if number % TRADES_EVERY == 0:
            put(
                1,
                "trade",
                b'{"trade_id":"00000000-0000-4000-8000-%012x","market_ticker":"%b","ts_ms":%d}'
                % (number, ticker.encode(), 1765670400000 + number // 30),
            )
        if number % SNAPSHOTS_EVERY == 0:
            snapshots()
            drain()
    recorder.on_closed(1, "done")
    drain()
    for writer in writers.values():
        writer.close(epoch=1)
    return recorder.n


async def _read(folder: Path) -> tuple[float, int, int, int]:
    window = Window(open_ns=OPEN_NS, close_ns=OPEN_NS + 86_400_000_000_000)
    began = time.perf_counter()
    async with DayReading(LocalObjectStore(folder), ENV, FEED, DATE, window, lambda _key: None) as day:
        await day.read_new()
        readback, books = await day.finish()
    return time.perf_counter() - began, readback.records, len(readback.faults) + books.differing, books.points


def main() -> None:
    """Print the table."""
    reading.OWN_PROCESS_BYTES = 1
    print("| what | result | |\n|---|---|---|", flush=True)
    with tempfile.TemporaryDirectory(prefix="ssmd-bench-") as name:
        folder = Path(name)
        write_day(folder)
        seconds, records, faults, points = asyncio.run(_read(folder))
        print(
            f"| verify, both passes | {records / seconds:,.0f} records/s | {faults} faults, {points:,} books proved |"
        )
        data = (folder / segment_key(FEED, DATE, "orderbook_delta", 0)).read_bytes()
        proofs = BookProofs(FEED)
        began = time.perf_counter()
        proofs.feed("orderbook_delta", data)
        found = proofs.finish()
        rate = found.records / (time.perf_counter() - began)
        print(f"| folding the books by itself | {rate:,.0f} records/s | one core |", flush=True)


if __name__ == "__main__":
    main()
