"""Where a day's objects lie in the store. Pure names; nothing is read or written here."""

from __future__ import annotations

import re
from collections.abc import Container, Iterable
from typing import Literal
from urllib.parse import quote

FILE_OF_CHANNEL = {
    "trade": "trades",
    "orderbook_delta": "orderbook",
    "ticker": "ticker",
    "market_lifecycle_v2": "lifecycle",
    "rest": "rest",
    "other": "other",
    "session": "session",
}
"""Raw channels and the file names of their segments. A channel that is not here is a bug, not data."""

EDGE_SEGMENTS = 2
"""How many segments of a channel hold the minute around a day's boundary: the one at the edge, and the one beside it."""

Edge = Literal["first", "last"]

CHANNEL_OF_FILE = {file: channel for channel, file in FILE_OF_CHANNEL.items()}

_MANIFEST = re.compile(r"manifest(?:\.r(?P<revision>[2-9]|[1-9][0-9]+))?\.json")
_REVISION = re.compile(r"\.r(?P<revision>[2-9]|[1-9][0-9]+)\.")
_SEGMENT = re.compile(r"(?P<file>[a-z]+)-(?P<number>[0-9]{2}|[1-9][0-9]{2,})\.jsonl\.zst")


def day_prefix(feed: str, date: str) -> str:
    """Return the folder of a trading day, `kalshi/2025/12/14/`; `date` is `YYYY-MM-DD`."""
    year, month, day = date.split("-")
    return f"{feed}/{year}/{month}/{day}/"


def segment_key(feed: str, date: str, channel: str, number: int) -> str:
    """Return the key of a channel's segment, `kalshi/2025/12/14/trades-00.jsonl.zst`."""
    return f"{day_prefix(feed, date)}{FILE_OF_CHANNEL[channel]}-{number:02d}.jsonl.zst"


def parse_segment_key(key: str) -> tuple[str, int] | None:
    """Return `(channel, number)` of a segment's key, None for any other object."""
    match = _SEGMENT.fullmatch(key.rsplit("/", 1)[-1])
    if match is None or match["file"] not in CHANNEL_OF_FILE:
        return None
    return CHANNEL_OF_FILE[match["file"]], int(match["number"])


def ordered_segments(
    keys: Iterable[str], edge: Edge | None = None, channels: Container[str] | None = None
) -> list[str]:
    """Return the keys of segments by channel and number; with `edge` only each channel's `EDGE_SEGMENTS` there."""
    numbered: dict[str, list[tuple[int, str]]] = {}
    for key in keys:
        parsed = parse_segment_key(key)
        if parsed is not None and (channels is None or parsed[0] in channels):
            numbered.setdefault(parsed[0], []).append((parsed[1], key))
    chosen = {"first": slice(EDGE_SEGMENTS), "last": slice(-EDGE_SEGMENTS, None), None: slice(None)}[edge]
    return [key for _, found in sorted(numbered.items()) for _, key in sorted(found)[chosen]]


def manifest_key(feed: str, date: str, revision: int = 1) -> str:
    """Return the key of a day's manifest: `manifest.json`, from revision 2 on `manifest.r2.json`."""
    return f"{day_prefix(feed, date)}manifest{'' if revision == 1 else f'.r{revision}'}.json"


def manifest_revision(key: str) -> int | None:
    """Return the revision of a manifest's key, None for any other object."""
    match = _MANIFEST.fullmatch(key.rsplit("/", 1)[-1])
    return None if match is None else int(match["revision"] or 1)


def table_revision(key: str) -> int:
    """Return the revision of a table's key, `…/data.r2.parquet` or `…/data.r2.capnp.zst`."""
    match = _REVISION.search(key.rsplit("/", 1)[-1])
    return 1 if match is None else int(match["revision"])


def table_prefix(feed: str, table: str, date: str) -> str:
    """Return the folder of a day's table, `kalshi/v1/trade/2025/12/14/`, in the bucket of tables."""
    return day_prefix(f"{feed}/v1/{table}", date)


def table_key(feed: str, table: str, date: str, revision: int = 1) -> str:
    """Return the key of a day's table in Parquet: `…/data.parquet`, from revision 2 on `…/data.r2.parquet`."""
    return f"{table_prefix(feed, table, date)}data{'' if revision == 1 else f'.r{revision}'}.parquet"


def capnp_key(feed: str, date: str, ticker: str, revision: int = 1) -> str:
    """Return the key of one market's trades as Cap'n Proto: `…/v1/trade/2025/12/14/{ticker}/data.capnp.zst`."""
    name = f"data{'' if revision == 1 else f'.r{revision}'}.capnp.zst"
    return f"{table_prefix(feed, 'trade', date)}{encode_ticker(ticker)}/{name}"


def drift_key(feed: str, date: str, revision: int = 1) -> str:
    """Return the key of what the normaliser found that it did not know: `…/v1/drift/2025/12/14/data.json`."""
    return f"{table_prefix(feed, 'drift', date)}data{'' if revision == 1 else f'.r{revision}'}.json"


def encode_ticker(ticker: str) -> str:
    """Percent-encode every character outside `[A-Za-z0-9_-]`, so that a ticker is one harmless path or subject token."""
    return "".join(c if c in "_-" or (c.isascii() and c.isalnum()) else _escape(c) for c in ticker)


def _escape(character: str) -> str:
    encoded = quote(character, safe="")
    return encoded if encoded != character else f"%{ord(character):02X}"
