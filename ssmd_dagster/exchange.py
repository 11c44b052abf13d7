"""The small protocol that an exchange's room implements, so that a second exchange is one more folder.

Nothing here knows Kalshi, and nothing outside an exchange's room knows more of it than this.
"""

from __future__ import annotations

import importlib
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Protocol

import msgspec

from ssmd_dagster.clock import Clock
from ssmd_dagster.errors import SsmdError, UnreachableError

if TYPE_CHECKING:  # capture's processes have no use for them
    import numpy as np
    import numpy.typing as npt
    import pyarrow as pa

SESSION = "session"
"""Channel of what the recorder itself says and of answers to its commands."""
REST = "rest"
"""Channel of pages that were fetched over REST, and the shard in the id of a connection that fetched them."""
OTHER = "other"
"""Channel of every message type that the exchange's room does not know."""


_NEVER_NS = 2**63 - 1


class Envelope(msgspec.Struct, gc=False):
    """The outside of one message: enough to file and to count it, nothing of its meaning."""

    type: str = ""
    sid: int | None = None
    seq: int | None = None
    id: int | None = None
    msg: msgspec.Raw = msgspec.Raw(b"")


class Market(msgspec.Struct, frozen=True, kw_only=True):
    """One row of the security master. Times are nanoseconds since the epoch, UTC."""

    ticker: str
    event_ticker: str
    series_ticker: str
    category: str
    title: str
    status: str
    open_ns: int
    close_ns: int
    detail: dict[str, Any]


def unlisted_market(ticker: str) -> Market:
    """Return the row of a market of which nothing but its ticker is known; it never closes by itself."""
    return Market(
        ticker=ticker,
        event_ticker="",
        series_ticker="",
        category="",
        title="",
        status="unknown",
        open_ns=0,
        close_ns=_NEVER_NS,
        detail={},
    )


class ExchangeStatus(msgspec.Struct, frozen=True, kw_only=True):
    """Whether the exchange says that it is open. `resume_ns` is its own estimate, where it gives one."""

    exchange_active: bool
    trading_active: bool
    resume_ns: int | None = None


class ExchangeSettings(msgspec.Struct, frozen=True, kw_only=True):
    """What an adapter needs to reach an exchange. `key_id` and `private_key_pem` are None where nothing is signed."""

    environment: str
    endpoint: str
    rest_endpoint: str
    rate_limit_per_second: int
    max_symbols_per_connection: int
    key_id: str | None = None
    private_key_pem: bytes | None = None

    def __repr__(self) -> str:
        return f"ExchangeSettings({self.environment}, {self.endpoint}, {self.rest_endpoint})"


class MarketSelection(msgspec.Struct, frozen=True, kw_only=True):
    """Which markets to record: `series`, `tickers`, or (both None) all; at most `max_markets`.

    By series or all these are the open ones and, with `include_unopened`, those listed but yet to open.
    """

    series: tuple[str, ...] | None = None
    tickers: tuple[str, ...] | None = None
    include_multivariate: bool = False
    include_unopened: bool = False
    max_markets: int = 20_000


class Closed(msgspec.Struct, frozen=True, kw_only=True):
    """The exchange is closed: a gap's cause, and since and until when where that is known."""

    cause: Literal["exchange_maintenance", "closed_by_schedule"]
    since_ns: int | None = None
    until_ns: int | None = None


class RateLimitedError(UnreachableError):
    """The exchange wants fewer requests and went on saying so. `retry_after_s` is its own wish, where it has one."""

    def __init__(self, what: str, *, where: str = "", do: str = "", retry_after_s: float | None = None) -> None:
        super().__init__(what, where=where, do=do)
        self.retry_after_s = retry_after_s


class MarketLimitError(SsmdError):
    """A subscription takes no more markets."""


class SubscriptionLost(msgspec.Struct, frozen=True, kw_only=True):
    """The exchange ended one subscription and left the socket open.

    `forgotten`: it says so only because it was asked for something, so that the end was at any time behind the last frame.
    """

    sid: int
    reason: str
    forgotten: bool = False


class SnapshotCame(msgspec.Struct, frozen=True, kw_only=True):
    """A whole order book came."""

    sid: int | None
    ticker: str


class MarketNews(msgspec.Struct, frozen=True, kw_only=True):
    """What the exchange tells of a market's life: listed, moved (its close), or settled. Times are None where unsaid."""

    ticker: str
    event: Literal["listed", "moved", "settled"]
    open_ns: int | None = None
    close_ns: int | None = None


ExchangeEvent = SubscriptionLost | SnapshotCame | MarketNews


class FrameSink(Protocol):
    """Receives everything that comes off one socket, in order, on the event loop; must not block."""

    def on_frame(self, recv_ns: int, payload: bytes, envelope: Envelope | None) -> None:
        """Take one whole message as it came off the socket; `envelope` is None where it is not such JSON."""

    def on_ping(self, recv_ns: int) -> None:
        """Take note that the server showed a sign of life without data."""

    def on_event(self, recv_ns: int, event: ExchangeEvent) -> None:
        """Take note of what the frame before, already taken, means for the connection's subscriptions."""

    def on_closed(self, recv_ns: int, reason: str) -> None:
        """Take note that the socket is gone; called exactly once, last."""


class Subscription(msgspec.Struct, frozen=True, kw_only=True):
    """One acknowledged subscription of a connection."""

    channel: str
    sid: int


class Connection(Protocol):
    """One socket's life. Commands wait for their answers with a deadline and raise on the exchange's errors."""

    async def subscribe(self, channels: Sequence[str], tickers: Sequence[str] | None) -> list[Subscription]:
        """Subscribe `channels`, for `tickers` or (None) for everything; return once all are acknowledged."""

    async def unsubscribe(self, sids: Sequence[int]) -> None:
        """End whole subscriptions."""

    async def add_markets(self, sid: int, tickers: Sequence[str]) -> None:
        """Add markets to a subscription."""

    async def delete_markets(self, sid: int, tickers: Sequence[str]) -> None:
        """Take markets out of a subscription."""

    async def request_snapshots(self, sid: int, tickers: Sequence[str]) -> None:
        """Ask for fresh order book snapshots; they arrive as frames."""

    def pause_reading(self, *, paused: bool) -> None:
        """Leave what comes in the socket for a moment, or (not `paused`) read on; twice is no more than once."""

    async def close(self) -> None:
        """Close the socket and wait until the sink has been told."""


class Trade(msgspec.Struct, frozen=True, kw_only=True):
    """One trade as the exchange's own list has it; `row` is the exchange's JSON object as it came."""

    trade_id: str
    ticker: str
    event_ns: int
    row: msgspec.Raw


class Covered(msgspec.Struct, frozen=True, kw_only=True):
    """A stretch of time, `[from_ns, to_ns)`, of which every trade has come from `endpoint`; of one market or (None) of all.

    `selection` names which markets were kept; `cutoff_ns` is where the exchange's live list began at that time.
    """

    endpoint: str
    ticker: str | None
    selection: str
    from_ns: int
    to_ns: int
    cutoff_ns: int


class TradePage(msgspec.Struct, frozen=True, kw_only=True):
    """One page of the exchange's list of trades: `rows` is a JSON array of its rows as they came, on one line.

    `ids` are the rows' in their order, `first_ns` and `last_ns` the times of the earliest and the latest of them.
    """

    endpoint: str
    params: dict[str, str]
    covered: Covered
    rows: bytes
    ids: list[str]
    first_ns: int
    last_ns: int
    tickers: frozenset[str]

    @property
    def count(self) -> int:
        """Return how many rows there are."""
        return len(self.ids)


class TradeQuery(msgspec.Struct, frozen=True, kw_only=True):
    """Which trades are wanted: of `[from_ns, to_ns)`, of `tickers` or (None) of all markets.

    `known` is what came before, `per_ticker` asks for each market by itself.
    """

    from_ns: int
    to_ns: int
    tickers: frozenset[str] | None = None
    include_multivariate: bool = False
    per_ticker: bool = False
    known: tuple[Covered, ...] = ()


class TradesRead(msgspec.Struct, frozen=True, kw_only=True):
    """What a reading of the list of trades came to; `cutoff_ns` as it was at its end."""

    trades: int
    pages: int
    requests: int
    cutoff_ns: int


class MarketPage(msgspec.Struct, frozen=True, kw_only=True):
    """One page of the exchange's list of markets: `rows` is a JSON array as it came, with the rows' tickers and events."""

    endpoint: str
    params: dict[str, str]
    rows: bytes
    tickers: frozenset[str]
    events: frozenset[str] = frozenset()


class Place(NamedTuple):
    """Where an event belongs: its series, and the category of that; `""` where the exchange does not say."""

    series_ticker: str
    category: str


class Exchange(Protocol):
    """One exchange, opened for one environment. Methods raise `errors.SsmdError` with the address and what to do."""

    channel_of_type: Mapping[str, str]
    """Channel of every known message type; answers to commands map to `session`, unknown types are `other`."""
    market_channels: frozenset[str]
    """Channels whose subscriptions name their markets; the others are subscribed as a whole."""
    book_channels: frozenset[str]
    """Those of them that begin with a snapshot of every market and answer `request_snapshots`."""

    def markets(self, selection: MarketSelection) -> AsyncIterator[Market]:
        """Yield the selected open markets, each ticker once."""

    def listings(self, selection: MarketSelection, created_after_ns: int | None = None) -> AsyncIterator[Market]:
        """Yield the selected markets, open and yet to open, as the bare list has them: series and category may be empty.

        With `created_after_ns` only those listed since then, in few requests; by tickers whatever their status.
        """

    async def status(self) -> ExchangeStatus:
        """Ask the exchange whether it is open."""

    async def closed(self, at_ns: int) -> Closed | None:
        """Ask the exchange whether it says, now, that it is closed at `at_ns`; None where it does not say so."""

    async def maintenance(self) -> Sequence[tuple[int, int]]:
        """Ask the exchange for the maintenance that it has announced: from and to, the end not part of it."""

    def trades(self, from_ns: int, to_ns: int, ticker: str | None = None) -> AsyncIterator[Trade]:
        """Yield the exchange's own list of trades in `[from_ns, to_ns]`, newest first, each trade id once."""

    async def trade_pages(self, query: TradeQuery, take: Callable[[TradePage], Awaitable[None]]) -> TradesRead:
        """Hand the pages of the exchange's list of trades to `take`, several at once, in no order, each trade once."""

    async def pages_of_tape(self, from_ns: int, to_ns: int) -> int:
        """Estimate how many pages the list of all trades of an interval has."""

    def market_pages(
        self, *, tickers: Sequence[str] | None = None, series: str | None = None, around: tuple[int, int] | None = None
    ) -> AsyncIterator[MarketPage]:
        """Yield markets, past ones too, by `tickers` or of one `series`; with `around` only those open in that interval."""

    async def places(self, events: Collection[str]) -> dict[str, Place]:
        """Return where events belong, past ones too; what the exchange does not know is left out."""

    async def connect(self, sink: FrameSink, *, use_yes_price: bool = False) -> Connection:
        """Open one socket; `use_yes_price` goes with every order book subscription.

        A refused credential is a `ConfigurationError`, no answer an `UnreachableError`.
        """

    async def close(self) -> None:
        """Close the REST client."""


Row = dict[str, Any]
"""One row of a table by column; a column that is not there is null."""


class UnknownKey(NamedTuple):
    """Something on the wire that no reader knows: `trade.msg.new_key` and its JSON type, or a whole message type."""

    name: str
    kind: str


class Columns(NamedTuple):
    """Messages read as a whole: the columns of `table` (without connection, ordinal and receive time).

    False in `readable`: `RowReader.rows` has to read that message. `unknown` names the messages that have each such key.
    """

    table: str
    columns: dict[str, pa.Array]
    readable: npt.NDArray[np.bool_]
    unknown: tuple[tuple[UnknownKey, npt.NDArray[np.bool_]], ...]


class ReadMessage(NamedTuple):
    """One message read by itself: rows of `table`, or no rows since it is an answer to a command, or cannot be read.

    A rejected page of many rows may hold those that could be read.
    """

    type: str
    outcome: Literal["rows", "control", "rejected"]
    table: str = ""
    rows: Sequence[Row] = ()
    reason: str = ""
    unknown: tuple[UnknownKey, ...] = ()


class RowReader(Protocol):
    """What an exchange's messages are as rows of the tables: scaled integers, `event_ns` null where it gives no time."""

    def wire_type(self, channel: str) -> pa.StructType | None:
        """Return the type of a channel's messages of today's shape; None where there is no reading them as a whole."""

    def columns(self, channel: str, messages: pa.StructArray) -> Columns:
        """Read a block of messages that parsed as `wire_type(channel)`, further fields behind the known ones.

        Says of a message that it is readable only if `rows` would say the same of it.
        """

    def pages(self, messages: Sequence[bytes]) -> tuple[Columns, list[int]] | None:
        """Read recorded pages of today's shape as a whole, with how many rows each has.

        None where one of them is something else or has a row or a key that `rows` has to look at.
        """

    def rows(self, message: bytes) -> ReadMessage:
        """Read one message of any type and age. Never raises for what the exchange sends."""


_ADAPTERS = {"kalshi": "ssmd_dagster.kalshi"}


def adapter_names() -> tuple[str, ...]:
    """Return the feeds for which this installation has an exchange's room."""
    return tuple(sorted(_ADAPTERS))


def market_reader(feed_name: str) -> Callable[[msgspec.Raw], str | None]:
    """Return the function of a feed that tells which market a frame is about; None for frames about no single one."""
    reader: Callable[[msgspec.Raw], str | None] = importlib.import_module(_ADAPTERS[feed_name]).market_of
    return reader


def row_reader(feed_name: str) -> RowReader:
    """Return what reads a feed's messages as rows of the tables."""
    reader: RowReader = importlib.import_module(f"{_ADAPTERS[feed_name]}.rows").reader()
    return reader


def room_part(feed_name: str, part: str) -> Any:
    """Return a module of a feed's room: `books` folds order books, `matching` reads what identifies a trade."""
    return importlib.import_module(f"{_ADAPTERS[feed_name]}.{part}")


def open_exchange(feed_name: str, settings: ExchangeSettings, clock: Clock) -> Exchange:
    """Open the exchange of a feed. Call inside a running event loop; no request is made yet."""
    room = importlib.import_module(_ADAPTERS[feed_name])
    exchange: Exchange = room.open_exchange(settings, clock)
    return exchange
