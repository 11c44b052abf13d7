"""Order books: whole ones over REST, and one subscription's folded from its frames, to be held against later snapshots.

Not for reading messages in full: see `wire`. Not for answering what a book was at a time.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from typing import Any

import msgspec

from ssmd_dagster.kalshi.errors import ExchangeAnswerError
from ssmd_dagster.kalshi.rest import RestClient
from ssmd_dagster.kalshi.scaled import count_centis, price_micros
from ssmd_dagster.kalshi.wire import Delta, Snapshot, WireError, read, read_book

_TICKERS_PER_REQUEST = 100
_CACHED_NUMBERS = 1 << 16


class _Book(msgspec.Struct):
    ticker: str
    orderbook_fp: msgspec.Raw


class _Books(msgspec.Struct):
    orderbooks: list[_Book] = []


async def read_books(rest: RestClient, tickers: Sequence[str]) -> AsyncIterator[Snapshot]:
    """Yield the whole books of `tickers`, 100 a request, in the exchange's order; prices of the no side at no price.

    A market that Kalshi leaves out is left out here too. Raises what `RestClient.get` raises.
    """
    unique = list(dict.fromkeys(tickers))
    for start in range(0, len(unique), _TICKERS_PER_REQUEST):
        params = [("tickers", ticker) for ticker in unique[start : start + _TICKERS_PER_REQUEST]]
        answer = await rest.get("/markets/orderbooks", params, answer=_Books)
        for one in answer.orderbooks:
            try:
                yield read_book(one.ticker, one.orderbook_fp)
            except WireError as error:
                raise ExchangeAnswerError(f"the book of {one.ticker}: {error}", where="/markets/orderbooks") from error


class _DeltaMessage(msgspec.Struct, gc=False):
    market_ticker: str
    side: str = ""
    price_dollars: str = ""
    delta_fp: str = ""


class _SnapshotMessage(msgspec.Struct, gc=False):
    market_ticker: str
    yes_dollars_fp: list[tuple[str, str]] | None = None
    no_dollars_fp: list[tuple[str, str]] | None = None
    yes: Any = None
    no: Any = None
    yes_dollars: Any = None
    no_dollars: Any = None


class DeltaFrame(msgspec.Struct, gc=False, tag_field="type", tag="orderbook_delta"):
    """What folding needs of a delta."""

    sid: int
    seq: int
    msg: _DeltaMessage


class SnapshotFrame(msgspec.Struct, gc=False, tag_field="type", tag="orderbook_snapshot"):
    """What folding needs of a snapshot."""

    sid: int
    seq: int
    msg: _SnapshotMessage


BookFrame = DeltaFrame | SnapshotFrame


class _RawFrame(msgspec.Struct):
    type: str
    msg: msgspec.Raw


class _Markets(msgspec.Struct):
    market_tickers: list[str] | None = None


class _Answer(msgspec.Struct):
    type: str
    msg: _Markets | None = None


_decode_raw_frame = msgspec.json.Decoder(_RawFrame).decode
_decode_answer = msgspec.json.Decoder(_Answer).decode

_Levels = dict[int, int]
"""Size in hundredths by price in micro-dollars; prices of the no side as `~price`, so that both fit one map."""


def markets_after(answer: bytes | msgspec.Raw) -> frozenset[str] | None:
    """Return the markets that a subscription has after an `ok` that lists them, None for any other message."""
    try:
        read_answer = _decode_answer(answer)
    except msgspec.DecodeError:  # an `ok` that lists subscriptions, or something else
        return None
    tickers = read_answer.msg.market_tickers if read_answer.msg is not None else None
    return frozenset(tickers) if read_answer.type == "ok" and tickers is not None else None


class FoldedBooks:
    """The books of one subscription as its frames make them, in the order of their numbers.

    A book is unknown before its first snapshot and after anything that may have been missed, until its next one. Each
    snapshot of a known book is a proof point.
    """

    def __init__(self) -> None:
        self.points = 0
        self.proved: set[str] = set()
        self._books: dict[str, _Levels] = {}
        self._old_books: dict[str, _Levels] = {}
        """Those of messages of the older shape, which round: what one shape says does not add to what the other says."""

    def forget(self) -> None:
        """All books are unknown: something of the subscription was missed."""
        self._books.clear()
        self._old_books.clear()

    def keep_only(self, tickers: Iterable[str]) -> None:
        """Other markets' books are unknown: they left the subscription."""
        kept = set(tickers)
        for books in (self._books, self._old_books):
            for ticker in books.keys() - kept:
                del books[ticker]

    def take_deltas(self, frames: Sequence[BookFrame], start: int) -> int:
        """Fold frames from `start` on, which follow on one another; return the index of the first that wants `take`.

        That is a snapshot, and whatever is out of the ordinary.
        """
        books, old_books = self._books, self._old_books
        for index in range(start, len(frames)):
            frame = frames[index]
            if type(frame) is not DeltaFrame:
                return index
            message = frame.msg
            book = books.get(message.market_ticker)
            if book is None:
                if message.market_ticker in old_books:
                    return index
                continue
            try:
                key = (_YES_KEYS if message.side == "yes" else _NO_KEYS)[message.price_dollars]
                size = book.get(key, 0) + _SIZES[message.delta_fp]
            except ValueError:
                return index
            if size > 0:
                book[key] = size
            elif size == 0:
                book.pop(key, None)
            else:
                return index
        return len(frames)

    def take(self, frame: BookFrame, wire: bytes | msgspec.Raw | None = None) -> str | None:
        """Fold one frame; return what is wrong where a snapshot is not the book that was folded.

        `wire` is the whole frame, needed for messages of an older shape; without it they raise `LookupError`. Raises
        `ValueError` where it cannot be read.
        """
        message = frame.msg
        ticker = message.market_ticker
        if isinstance(message, _SnapshotMessage):
            is_old = _is_old(message)
            books, others = (self._old_books, self._books) if is_old else (self._books, self._old_books)
            levels = _old_levels(wire) if is_old else _levels(message)
            others.pop(ticker, None)
            return self._compare(books, ticker, levels)
        is_old = not (message.price_dollars and message.delta_fp)
        books, others = (self._old_books, self._books) if is_old else (self._books, self._old_books)
        others.pop(ticker, None)
        book = books.get(ticker)
        if book is None:
            return None
        if is_old:
            key, change = _old_delta(wire)
        else:
            key, change = price_micros(message.price_dollars), count_centis(message.delta_fp)
        if message.side == "no":
            key = ~key
        size = book.get(key, 0) + change
        if size < 0:
            del books[ticker]
            return f"{ticker}: the level {_level(key)} falls to {_size(size)}"
        if size:
            book[key] = size
        else:
            book.pop(key, None)
        return None

    def _compare(self, books: dict[str, _Levels], ticker: str, levels: _Levels) -> str | None:
        folded = books.get(ticker)
        books[ticker] = levels
        if folded is None:
            return None
        self.points += 1
        self.proved.add(ticker)
        if folded == levels:
            return None
        key = min(key for key in folded.keys() | levels.keys() if folded.get(key) != levels.get(key))
        return f"{ticker}: {_level(key)} is {_size(folded.get(key, 0))} folded and {_size(levels.get(key, 0))} in the snapshot"


class _Cache(dict[str, int]):
    """Numbers by their text, which come again and again; `read_text` raises `ValueError` for what is none."""

    def __init__(self, read_text: Callable[[str], int]) -> None:
        super().__init__()
        self._read = read_text

    def __missing__(self, text: str) -> int:
        if len(self) > _CACHED_NUMBERS:
            self.clear()
        number = self[text] = self._read(text)
        return number


_YES_KEYS = _Cache(price_micros)
_NO_KEYS = _Cache(lambda text: ~price_micros(text))
_SIZES = _Cache(count_centis)


def _is_old(snapshot: _SnapshotMessage) -> bool:
    old_keys = (snapshot.yes, snapshot.no, snapshot.yes_dollars, snapshot.no_dollars)
    return any(key is not None for key in old_keys)


def _levels(snapshot: _SnapshotMessage) -> _Levels:
    levels = {price_micros(price): count_centis(size) for price, size in snapshot.yes_dollars_fp or ()}
    levels |= {~price_micros(price): count_centis(size) for price, size in snapshot.no_dollars_fp or ()}
    return levels


def _old_levels(wire: bytes | msgspec.Raw | None) -> _Levels:
    snapshot = _patiently(wire)
    assert isinstance(snapshot, Snapshot)
    return dict(snapshot.yes) | {~price: size for price, size in snapshot.no}


def _old_delta(wire: bytes | msgspec.Raw | None) -> tuple[int, int]:
    delta = _patiently(wire)
    assert isinstance(delta, Delta)
    return delta.price_micros, delta.delta_centis


def _patiently(wire: bytes | msgspec.Raw | None) -> Any:
    if wire is None:
        raise LookupError("a frame of an older shape is needed as a whole")
    frame = _decode_raw_frame(wire)
    return read(frame.type, frame.msg)


def _level(key: int) -> str:
    side, price = ("yes", key) if key >= 0 else ("no", ~key)
    return f"{side} {price / 1_000_000:.4f}"


def _size(centis: int) -> str:
    return f"{centis / 100:.2f}"
