"""How fast raw records become tables: `python -m benchmarks normalize [MESSAGES]`; prints a table. Wants two quiet cores.

Made messages of today's shape, 80 % order book changes, 12 % tickers, 8 % trades over 5,000 markets, in segments as the archiver
writes them. The normaliser (every field typed, trades united, sorted, written as Parquet) runs in a process of its own, whose
peak memory is shown. Beside it, on the very same files: DuckDB's and Polars' own JSON readers, which only read, untyped.
"""

from __future__ import annotations

import random
import resource
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path

import duckdb
import msgspec
import polars
import zstandard

from ssmd_dagster.archive.batch import Batch, read_last
from ssmd_dagster.archive.normalize_job import NormalizeJob, NormalizeResult, RawSegment
from ssmd_dagster.archive.segment import SegmentWriter
from ssmd_dagster.capture.recorder import Flush, Origin, Recorder, seal
from ssmd_dagster.exchange import Envelope
from ssmd_dagster.kalshi.rows import KalshiRows
from ssmd_dagster.kalshi.wire import CHANNEL_OF_TYPE

MESSAGES = 2_000_000
MARKETS = 5_000
REPEATS = 3
OPEN_MS = 1_765_670_400_000
CHANNELS = ("orderbook_delta", "ticker", "trade")


def row(name: str, value: str, note: str = "") -> None:
    """Print one line of the table."""
    print(f"| {name} | {value} | {note} |", flush=True)


def messages(count: int) -> Iterator[tuple[str, bytes]]:
    """Yield types and frames; a few seconds of a busy exchange for every 100,000."""
    draw = random.Random(5)
    markets = [
        (
            f"KXBTCD-26NOV2217-T{draw.randrange(80_000, 120_000)}.{n % 100:02d}",
            str(uuid.UUID(int=draw.getrandbits(128))),
        )
        for n in range(MARKETS)
    ]
    kinds = draw.choices(CHANNELS, [80, 12, 8], k=count)
    for n, kind in enumerate(kinds):
        ticker, market_id = markets[min(int(draw.paretovariate(0.8)), MARKETS) - 1]
        ms = OPEN_MS + n // 20
        iso = f"{datetime.fromtimestamp(ms // 1000, UTC):%Y-%m-%dT%H:%M:%S}.{ms % 1000:03d}Z"
        cents, size = draw.randrange(2, 98), draw.randrange(1, 100_000)
        if kind == "orderbook_delta":
            side = draw.choice(("yes", "no"))
            text = (
                f'{{"type":"orderbook_delta","sid":2,"seq":{n},"msg":{{"market_ticker":"{ticker}","market_id":"{market_id}",'
                f'"clock":{n * 3},"price_dollars":"0.{cents:02d}00","delta_fp":"{size // 100 - 500}.00","side":"{side}",'
                f'"ts":"{iso}","ts_ms":{ms}}},"sending_ts_ms":{ms + 4}}}'
            )
        elif kind == "ticker":
            text = (
                f'{{"type":"ticker","sid":1,"msg":{{"market_id":"{market_id}","market_ticker":"{ticker}",'
                f'"price_dollars":"0.{cents:02d}00","yes_bid_dollars":"0.{cents - 1:02d}00",'
                f'"yes_ask_dollars":"0.{cents + 1:02d}00",'
                f'"volume_fp":"{n}.00","open_interest_fp":"{size}.00","dollar_volume":{n},"dollar_open_interest":{size},'
                f'"yes_bid_size_fp":"{size % 997}.00","yes_ask_size_fp":"{size % 991}.00","last_trade_size_fp":"{size % 97}.00",'
                f'"ts":{ms // 1000},"ts_ms":{ms},"time":"{iso}"}},"sending_ts_ms":{ms + 4}}}'
            )
        else:
            text = (
                f'{{"type":"trade","sid":3,"seq":{n},"msg":{{"trade_id":"{uuid.UUID(int=draw.getrandbits(128))}",'
                f'"market_ticker":"{ticker}","yes_price_dollars":"0.{cents:02d}00","no_price_dollars":"0.{100 - cents:02d}00",'
                f'"count_fp":"{size // 100}.{size % 100:02d}","taker_side":"yes","taker_outcome_side":"yes",'
                f'"taker_book_side":"bid","is_block_trade":false,"ts":{ms // 1000},"ts_ms":{ms}}},"sending_ts_ms":{ms + 4}}}'
            )
        yield kind, text.encode()


def make(folder: Path, count: int) -> tuple[RawSegment, ...]:
    """Record made messages as a connector and the archiver would."""
    writers = {
        channel: SegmentWriter(
            folder / f"{channel}.jsonl.zst", env="bench", day="2025-12-14", channel=channel, number=0, prev_sha256=None
        )
        for channel in (*CHANNELS, "session")
    }
    origin = Origin(env="bench", day="2025-12-14", epoch=1, conn="1-a-0")

    def take(flush: Flush) -> None:
        for unsealed in flush:
            data = seal(origin, unsealed)
            batch = read_last(data)
            assert isinstance(batch, Batch)
            writers[unsealed.channel].append(data, batch)

    recorder = Recorder(
        origin, channel_of_type=CHANNEL_OF_TYPE, clock=lambda: OPEN_MS * 10**6, on_flush=take, on_end=lambda _: None
    )
    for n, (kind, frame) in enumerate(messages(count)):
        recorder.on_frame(
            (OPEN_MS + n // 20) * 1_000_000 + 5_000_000 + n % 1000, frame, Envelope(type=kind, sid=1, seq=n)
        )
    recorder.on_closed(OPEN_MS * 10**6, "done")
    for writer in writers.values():
        writer.close(1)
    return tuple(RawSegment(channel=name, path=str(writer.path)) for name, writer in writers.items())


def normalise(folder: Path, segments: tuple[RawSegment, ...]) -> tuple[float, NormalizeResult]:
    """Run the normaliser in a process of its own; return its seconds, the start of Python among them, and its result."""
    open_ns = OPEN_MS * 1_000_000
    job = NormalizeJob(
        feed="kalshi", env="bench", date="2025-12-14", open_ns=open_ns, close_ns=open_ns + 86_400 * 10**9,
        output=str(folder / "out"), segments=segments,
    )  # fmt: skip
    (folder / "job").write_bytes(msgspec.json.encode(job))
    began = time.perf_counter()
    line = [sys.executable, "-m", "ssmd_dagster.archive.normalize", str(folder / "job"), str(folder / "result")]
    subprocess.run(line, check=True)
    taken_s = time.perf_counter() - began
    return taken_s, msgspec.json.decode((folder / "result").read_bytes(), type=NormalizeResult)


def read_with_duckdb(path: Path) -> None:
    """Read a file into a table in memory."""
    with duckdb.connect() as connection:
        connection.execute("SET threads = 2")
        connection.execute(f"CREATE TABLE t AS SELECT * FROM read_json('{path}', format = 'newline_delimited')")


def read_with_polars(path: Path) -> None:
    """Read a file into a frame in memory."""
    polars.read_ndjson(path)


def one_by_one(path: Path, limit: int = 100_000) -> tuple[int, float]:
    """Read records with the patient reader alone; return how many and the seconds."""
    reader = KalshiRows()
    decode = msgspec.json.Decoder(dict[str, msgspec.Raw]).decode
    with path.open("rb") as file:
        text = zstandard.ZstdDecompressor().stream_reader(file, read_across_frames=True).read(limit * 330)
    lines = text.splitlines()[:-1]
    began = time.perf_counter()
    for line in lines:
        reader.rows(bytes(decode(line)["wire"]))
    return len(lines), time.perf_counter() - began


def rates(name: str, work: Callable[[Path], None], paths: list[Path], count: int) -> None:
    """Print how fast a reader reads all files, best of some times."""
    best_s = min(sum(_timed(work, path) for path in paths) for _ in range(REPEATS))
    row(name, f"{count / best_s:,.0f} msg/s", "reads only, untyped, in memory")


def _timed(work: Callable[[Path], None], path: Path) -> float:
    began = time.perf_counter()
    work(path)
    return time.perf_counter() - began


def main() -> None:
    """Print the table."""
    count = int(sys.argv[1]) if len(sys.argv) > 1 else MESSAGES
    with tempfile.TemporaryDirectory(prefix="ssmd-bench-") as name:
        folder = Path(name)
        segments = make(folder, count)
        paths = [Path(segment.path) for segment in segments if segment.channel in CHANNELS]
        raw_bytes = sum(path.stat().st_size for path in paths)
        print("| what | result | |\n|---|---|---|", flush=True)
        row("messages", f"{count:,}", f"{raw_bytes / count:.1f} bytes a message in raw")
        best_s, result = min((normalise(folder, segments) for _ in range(REPEATS)), key=lambda run: run[0])
        used = resource.getrusage(resource.RUSAGE_CHILDREN)
        cpu_us = (used.ru_utime + used.ru_stime) / REPEATS / count * 1e6
        tables = {file.table: file for file in result.files}
        rows = sum(tables[table].rows for table in ("trade", "ticker", "orderbook"))
        size = sum(tables[table].size for table in ("trade", "ticker", "orderbook"))
        row(
            "normalise: typed, sorted, Parquet",
            f"{count / best_s:,.0f} msg/s",
            f"{rows:,} rows, {size / count:.1f} bytes each",
        )
        row("normalise, CPU", f"{cpu_us:.2f} µs a message", "user and system, both cores together")
        row("normalise, peak memory", f"{used.ru_maxrss / 1024:,.0f} MiB", "of one process, two threads")
        rates("DuckDB read_json", read_with_duckdb, paths, count)
        rates("Polars read_ndjson", read_with_polars, paths, count)
        lines, taken_s = one_by_one(paths[0])
        row("one message at a time (what is not of today's shape)", f"{lines / taken_s:,.0f} msg/s", "one core")


if __name__ == "__main__":
    main()
