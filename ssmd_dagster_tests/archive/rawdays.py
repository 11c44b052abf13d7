"""Days of raw segments made of frames, for the tests of the tables."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import msgspec
import pyarrow as pa
import pyarrow.parquet as pq

from ssmd_dagster.archive.batch import Batch, read_last
from ssmd_dagster.archive.normalize import normalize_day
from ssmd_dagster.archive.normalize_job import Neighbour, NormalizeJob, NormalizeResult, RawSegment
from ssmd_dagster.archive.segment import SegmentWriter
from ssmd_dagster.capture.recorder import Flush, Origin, Recorder, seal
from ssmd_dagster.capture.rest_pages import CHANNEL_OF_PAGE
from ssmd_dagster.exchange import Envelope
from ssmd_dagster.kalshi.socket import read_envelope
from ssmd_dagster.kalshi.wire import CHANNEL_OF_TYPE

DATE = "2026-11-10"
OPEN_NS = 1_794_268_800_000_000_000
CLOSE_NS = OPEN_NS + 86_400_000_000_000
NS_NOON = OPEN_NS + 43_200_000_000_000
MS = 1_000_000
S = 1_000 * MS

Frame = tuple[int, bytes]
"""Receive time and payload."""


def frame(type_: str, msg: dict[str, Any], *, sid: int = 1, seq: int | None = None, **more: Any) -> bytes:
    """Return a frame's text."""
    envelope = {"type": type_, "sid": sid} | ({} if seq is None else {"seq": seq}) | {"msg": msg} | more
    return json.dumps(envelope, separators=(",", ":")).encode()


def delta(ticker: str, seq: int, event_ns: int, size: int, **more: Any) -> bytes:
    """Return a change of the yes side's level at 50 cents by `size` hundredths; `more` goes into `msg`."""
    msg = {
        "market_ticker": ticker, "market_id": f"id-{ticker}", "price_dollars": "0.5000",
        "delta_fp": f"{'-' if size < 0 else ''}{abs(size) // 100}.{abs(size) % 100:02d}", "side": "yes",
        "ts_ms": event_ns // MS,
    }  # fmt: skip
    return frame("orderbook_delta", msg | more, seq=seq)


def snapshot(ticker: str, seq: int, size: int, **more: Any) -> bytes:
    """Return a book with `size` hundredths at 50 cents on the yes side, or none."""
    levels = {"yes_dollars_fp": [["0.5000", f"{size // 100}.{size % 100:02d}"]]} if size else {}
    return frame(
        "orderbook_snapshot", {"market_ticker": ticker, "market_id": f"id-{ticker}", **levels, **more}, seq=seq
    )


def trade(ticker: str, number: int, event_ns: int, *, seq: int | None = None, **more: Any) -> bytes:
    """Return a trade with an id made of `number`."""
    return frame("trade", trade_msg(ticker, number, event_ns) | more, sid=3, seq=number if seq is None else seq)


def trade_msg(ticker: str, number: int, event_ns: int) -> dict[str, Any]:
    """Return the `msg` of a trade."""
    return {
        "trade_id": f"00000000-0000-0000-0000-{number:012d}", "market_ticker": ticker, "yes_price_dollars": "0.3500",
        "no_price_dollars": "0.6500", "count_fp": "2.50", "taker_side": "yes", "taker_outcome_side": "yes",
        "taker_book_side": "bid", "is_block_trade": False, "ts": event_ns // S, "ts_ms": event_ns // MS,
    }  # fmt: skip


def ticker_message(ticker: str, event_ns: int, volume: int, **more: Any) -> bytes:
    """Return a ticker message told apart by its volume."""
    msg = {
        "market_ticker": ticker, "market_id": f"id-{ticker}", "price_dollars": "0.5000", "yes_bid_dollars": "0.4900",
        "yes_ask_dollars": "0.5100", "volume_fp": f"{volume}.00", "open_interest_fp": "7.00", "dollar_volume": 3,
        "dollar_open_interest": -3, "yes_bid_size_fp": "1.00", "yes_ask_size_fp": "2.00", "last_trade_size_fp": "3.00",
        "ts": event_ns // S, "ts_ms": event_ns // MS, "time": "2026-11-10T00:00:00.123Z",
    }  # fmt: skip
    return frame("ticker", msg | more, sid=2)


def rest_page(trades: Sequence[dict[str, Any]]) -> bytes:
    """Return a page of REST trades as it is recorded; `trades` are WebSocket `msg`s."""
    rows = []
    for one in trades:
        row = {key: value for key, value in one.items() if key not in ("ts", "ts_ms", "market_ticker")}
        created = f"{_iso(one['ts_ms'])}"
        rows.append(row | {"ticker": one["market_ticker"], "created_time": created})
    page = {"endpoint": "/markets/trades", "params": {}, "trades": rows}
    return json.dumps({"type": "rest_trades", "msg": page}, separators=(",", ":")).encode()


def _iso(ms: int) -> str:
    return f"{datetime.fromtimestamp(ms // 1000, UTC):%Y-%m-%dT%H:%M:%S}.{ms % 1000:03d}000Z"


def record(
    folder: Path, connections: dict[str, Iterable[Frame]], *, date: str = DATE, every: int = 50
) -> tuple[RawSegment, ...]:
    """Record frames as connectors and archiver would; `every` so many records all channels are flushed.

    Returns one segment per channel.
    """
    folder.mkdir(parents=True, exist_ok=True)
    writers: dict[str, SegmentWriter] = {}
    for conn, frames in connections.items():
        origin = Origin(env="test", day=date, epoch=int(conn.split("-")[0]), conn=conn)
        for flush in _flushes(origin, frames, every):
            for unsealed in flush:
                channel = unsealed.channel
                if channel not in writers:
                    writers[channel] = SegmentWriter(
                        folder / f"{channel}-00.jsonl.zst",
                        env="test",
                        day=date,
                        channel=channel,
                        number=0,
                        prev_sha256=None,
                    )
                encoded = seal(origin, unsealed)
                batch = read_last(encoded)
                assert isinstance(batch, Batch)
                writers[channel].append(encoded, batch)
    for writer in writers.values():
        writer.close(1)
    return tuple(RawSegment(channel=name, path=str(writer.path)) for name, writer in sorted(writers.items()))


def _flushes(origin: Origin, frames: Iterable[Frame], every: int) -> Iterator[Flush]:
    flushes: list[Flush] = []
    now_ns = 0
    recorder = Recorder(
        origin,
        channel_of_type=dict(CHANNEL_OF_TYPE) | CHANNEL_OF_PAGE,
        clock=lambda: now_ns,
        on_flush=flushes.append,
        on_end=lambda _reason: None,
    )
    for at, (recv_ns, payload) in enumerate(frames):
        if at == 0:
            now_ns = recv_ns
            recorder.note({"event": "connected"})
        now_ns = recv_ns
        recorder.on_frame(recv_ns, payload, _envelope(payload))
        if at % every == every - 1:
            recorder.flush()
    recorder.on_closed(now_ns, "done")
    yield from flushes


def _envelope(payload: bytes) -> Envelope | None:
    try:
        envelope: Envelope | None = read_envelope(payload)
    except (msgspec.DecodeError, UnicodeDecodeError):
        return None
    return envelope


class Day:
    """A normalised day: its result, and its tables as lists of rows or as Arrow."""

    def __init__(self, result: NormalizeResult) -> None:
        self.result = result
        self.files = {file.table: file for file in result.files if file.ticker is None}

    def arrow(self, table: str) -> pa.Table:
        """Return a table."""
        return pq.read_table(self.files[table].path)

    def rows(self, table: str) -> list[dict[str, Any]]:
        """Return a table's rows."""
        rows: list[dict[str, Any]] = self.arrow(table).to_pylist()
        return rows


def normalized(
    folder: Path,
    segments: tuple[RawSegment, ...],
    *,
    neighbours: tuple[Neighbour, ...] = (),
    run_rows: int = 400_000,
    unit_rows: int = 500_000,
    **settings: Any,
) -> Day:
    """Normalise segments into `folder`."""
    settings = dict[str, Any]() | {"date": DATE, "open_ns": OPEN_NS, "close_ns": CLOSE_NS} | settings
    job = NormalizeJob(
        feed="kalshi", env="test", output=str(folder), segments=segments, neighbours=neighbours, **settings
    )
    result = normalize_day(job, run_rows=run_rows, unit_rows=unit_rows)
    for channel, filing in result.filings.items():
        assert filing.balances, (channel, filing)
    return Day(result)


def books(rows: list[dict[str, Any]]) -> dict[str, dict[tuple[str, int], int]]:
    """Replay an order book table in the order of its rows; fail at a level below nothing."""
    found: dict[str, dict[tuple[str, int], int]] = {}
    for row in rows:
        if row["kind"] == "snapshot":
            if row["msg"] == 0:
                found[row["ticker"]] = {}
            if row["side"] is not None:
                found[row["ticker"]][row["side"], row["price"]] = row["size"]
        elif row["ticker"] in found:
            book, level = found[row["ticker"]], (row["side"], row["price"])
            book[level] = book.get(level, 0) + row["size"]
            assert book[level] >= 0, row
    return {ticker: {level: size for level, size in book.items() if size} for ticker, book in found.items()}
