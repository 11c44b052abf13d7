"""The trades that a day's archive holds, by id, so that the exchange's own list can be held against them.

Fed beside the reading back. An id takes 16 bytes and is sorted where it lies, so ten million trades stay below 300 MB. Not
here: asking the exchange, and what follows from a missing trade.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from uuid import UUID

import msgspec
import numpy as np
import numpy.typing as npt

from ssmd_dagster.archive.batch import BatchHeader
from ssmd_dagster.archive.records import parse_record, payload_of
from ssmd_dagster.exchange import REST, SESSION, room_part

TRADES = "trade"
_ID_BYTES = 16
_UUID_CHARS = 36
_SPREAD = np.uint64(0x9E3779B97F4A7C15)
_Ids = npt.NDArray[np.bytes_]
_Flags = npt.NDArray[np.bool_]


class Matched(msgspec.Struct, frozen=True, kw_only=True):
    """The comparison: `exchange = captured + repaired + missing`; `extra` are archived and not listed."""

    exchange: int
    captured: int
    repaired: int
    missing: int
    extra: int


class TradeIds:
    """Collects the ids of a day's trades and the markets that were subscribed; `see` is for `DayReadback`.

    `captured` counts trade records, repetitions included; `first_up_ns` is when a connection first had subscribed,
    `all_markets` says that one did so without naming markets.
    A trade counts as the day's, and may be `extra`, where the exchange's time lies in `[open_ns, close_ns)`.
    """

    def __init__(self, feed: str, open_ns: int, close_ns: int) -> None:
        self.markets: set[str] = set()
        self.all_markets = False
        self.first_up_ns: int | None = None
        self.channel_of_sid: dict[tuple[str, int], str] = {}
        self._open_ns, self._close_ns = open_ns, close_ns
        room = room_part(feed, "matching")
        self._trade_key, self._page_ids = room.trade_key, room.page_ids
        self._markets_after = room_part(feed, "books").markets_after
        self.captured = 0
        self._inside, self._outside, self._pages = bytearray(), bytearray(), bytearray()

    def see(self, header: BatchHeader, records: bytes) -> None:
        """Take note of a batch's trades."""
        if header.channel == TRADES:
            self._see_trades(records)
        elif header.channel == REST:
            for line in records.splitlines():
                ids, tickers = self._page_ids(parse_record(line).wire)
                self._pages += ids_bytes(ids)
                self.markets |= tickers
        elif header.channel == SESSION:
            self._see_session(header.conn, records)

    def _see_trades(self, records: bytes) -> None:
        for line in records.splitlines():
            record = parse_record(line)
            key = self._trade_key(payload_of(record) or b"", record.recv_ns)
            if key is not None:
                inside = self._open_ns <= key.event_ns < self._close_ns
                (self._inside if inside else self._outside).extend(id_bytes(key.trade_id))
                self.captured += 1
                self.markets.add(key.ticker)

    def _see_session(self, conn: str, records: bytes) -> None:
        for line in records.splitlines():
            if b'"tickers"' not in line and b'"sids"' not in line and b'"market_tickers"' not in line:
                continue
            record = parse_record(line)
            if record.note is None:
                self.markets.update(self._markets_after(record.wire) or ())
                continue
            for channel, sid in record.note.get("sids", {}).items():
                self.channel_of_sid[conn, sid] = channel
                if self.first_up_ns is None or record.recv_ns < self.first_up_ns:
                    self.first_up_ns = record.recv_ns
            if "tickers" in record.note and TRADES in record.note.get("channels", [TRADES]):
                tickers = record.note["tickers"]
                self.all_markets = self.all_markets or tickers is None
                self.markets.update(tickers or ())

    def matching(self) -> Matching:
        """Hand over what the exchange's list is held against; what is seen later is for `Matching.look_again`."""
        handed = Matching(self._inside, self._outside, self._pages)
        self._inside, self._outside, self._pages = bytearray(), bytearray(), bytearray()
        return handed

    def since(self) -> bytearray:
        """Return the ids that were seen since `matching`."""
        return self._inside + self._outside + self._pages


class _Known:
    """Ids, sorted in their own memory, and which of them were met; of a repeated one only the first is.

    They are kept scattered (`_scattered`), and so is what they are asked for. A directory by their leading bits leaves a few
    neighbours to compare, where a search of all of them would miss the processor's caches at every step.
    """

    def __init__(self, ids: bytearray) -> None:
        self.ids = _scattered(ids)
        self.ids.sort()
        self.met = np.zeros(len(self.ids), dtype=np.bool_)
        bits = max(1, len(self.ids).bit_length() - 2)
        self._shift = np.uint64(64 - bits)
        self._starts = np.zeros((1 << bits) + 1, dtype=np.int64)
        np.cumsum(np.bincount(self._places(self.ids), minlength=1 << bits), out=self._starts[1:])

    def meet(self, wanted: _Ids, which: _Flags) -> _Flags:
        """Take note of those of `wanted` that are looked for by `which`, and return which of them are known."""
        at, held = self._find(wanted)
        hit = held & which
        self.met[at[hit]] = True
        return hit

    def holds(self, wanted: _Ids) -> _Flags:
        """Return which of `wanted` are known, without taking note of it."""
        return self._find(wanted)[1]

    def firsts(self) -> _Flags:
        """Return which of the ids are not a repetition."""
        first = np.ones(len(self.ids), dtype=np.bool_)
        first[1:] = self.ids[1:] != self.ids[:-1]
        return first

    def _places(self, ids: _Ids) -> npt.NDArray[np.int64]:
        """Return where the directory begins with each id's leading bits."""
        leading = ids.view(">u8")[::2].astype(np.uint64)
        return (leading >> self._shift).astype(np.int64)

    def _find(self, wanted: _Ids) -> tuple[npt.NDArray[np.int64], _Flags]:
        """Return where each of `wanted` is, or would be, and whether it is there: a binary search of all at once."""
        if not len(self.ids):
            return np.zeros(len(wanted), dtype=np.int64), np.zeros(len(wanted), dtype=np.bool_)
        last = len(self.ids) - 1
        places = self._places(wanted)
        low, high = self._starts[places], self._starts[places + 1]
        while (searched := low < high).any():
            middle = (low + high) >> 1
            above = searched & (self.ids[np.minimum(middle, last)] < wanted)
            low, high = np.where(above, middle + 1, low), np.where(searched & ~above, middle, high)
        at = np.minimum(low, last)
        held: _Flags = self.ids[at] == wanted
        return at, held


class Matching:
    """One comparison with the exchange's list. `listed` counts what it has of the day's window."""

    def __init__(self, inside: bytearray, outside: bytearray, pages: bytearray) -> None:
        self._inside, self._outside, self._pages = _Known(inside), _Known(outside), _Known(pages)
        self._missing = bytearray()
        self._repaired = 0
        self.listed = 0

    @property
    def archived(self) -> int:
        """Return how many trades the archive holds, repetitions included."""
        return len(self._inside.ids) + len(self._outside.ids) + len(self._pages.ids)

    def take(self, ids: Sequence[str], of_window: Sequence[bool]) -> list[int]:
        """Take ids of the exchange's list and return the indices of those that the archive lacks.

        `of_window` says which are of the day's window; one that is not can prove a captured trade, and is never missing.
        """
        if not ids:
            return []
        listed = ids_bytes(ids)
        wanted = _scattered(listed)
        inside = np.array(of_window)
        self.listed += int(inside.sum())
        left = ~self._inside.meet(wanted, np.ones(len(wanted), dtype=np.bool_)) & inside
        for known in (self._outside, self._pages):
            left &= ~known.meet(wanted, left)
        self._missing += _as_ids(listed)[left].tobytes()
        return [int(i) for i in np.flatnonzero(left)]

    def look_again(self, ids: TradeIds) -> None:
        """Count what was missing and has been seen since as repaired."""
        missing = np.unique(_as_ids(self._missing))
        hit = _Known(ids.since()).holds(_scattered(missing.tobytes()))
        self._repaired += int(hit.sum())
        self._missing = bytearray(missing[~hit].tobytes())

    def missing_ids(self, most: int) -> list[str]:
        """Return the first of the ids that the exchange lists and the archive lacks, written as UUIDs."""
        missing = np.unique(_as_ids(self._missing))
        return [str(UUID(bytes=bytes(raw).ljust(_ID_BYTES, b"\0"))) for raw in missing[:most]]

    def result(self) -> Matched:
        """Return the comparison with everything that was taken."""
        captured = int(self._inside.met.sum()) + int(self._outside.met.sum())
        repaired = int(self._pages.met.sum()) + self._repaired
        missing = len(np.unique(_as_ids(self._missing)))
        return Matched(
            exchange=captured + repaired + missing,
            captured=captured,
            repaired=repaired,
            missing=missing,
            extra=int(self._inside.firsts().sum()) - int(self._inside.met.sum()) + self._pages_alone(),
        )

    def _pages_alone(self) -> int:
        """Return how many trades only pages have: the exchange listed them when they were fetched, and does not any more."""
        alone = self._pages.ids[self._pages.firsts() & ~self._pages.met]
        for known in (self._inside, self._outside):
            alone = alone[~known.holds(alone)]
        return len(alone)


def _as_ids(raw: bytes | bytearray) -> _Ids:
    return np.frombuffer(bytes(raw), dtype=f"S{_ID_BYTES}")


def _scattered(raw: bytes | bytearray) -> _Ids:
    """Return ids in a form of which the leading bits are evenly spread, whatever the exchange's ids begin with.

    Equal ids stay equal, and different ones different. A bytearray is changed in its own memory.
    """
    halves = np.frombuffer(raw if isinstance(raw, bytearray) else bytearray(raw), dtype="<u8").reshape(-1, 2)
    halves[:, 0] ^= halves[:, 1] * _SPREAD
    return halves.byteswap(inplace=True).reshape(-1).view(f"S{_ID_BYTES}")


def ids_bytes(ids: Sequence[str]) -> bytes:
    """Return ids as 16 bytes each: a UUID's own, else a hash."""
    digits = [text.replace("-", "") for text in ids]
    if {*map(len, ids)} == {_UUID_CHARS} and {*map(len, digits)} == {2 * _ID_BYTES}:
        try:
            found = bytes.fromhex("".join(digits))
        except ValueError:
            found = b""
        if len(found) == _ID_BYTES * len(ids):
            return found
    return b"".join([id_bytes(text) for text in ids])


def id_bytes(trade_id: str) -> bytes:
    """Return one id as 16 bytes."""
    try:
        found = bytes.fromhex(trade_id.replace("-", "")) if len(trade_id) == _UUID_CHARS else b""
    except ValueError:
        found = b""
    return found if len(found) == _ID_BYTES else _hashed(trade_id)


def _hashed(text: str) -> bytes:
    return hashlib.blake2b(text.encode(), digest_size=_ID_BYTES).digest()
