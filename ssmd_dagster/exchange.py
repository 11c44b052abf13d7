"""The small protocol that an exchange's room implements, so that a second exchange is one more folder.

Nothing here knows Kalshi, and nothing outside an exchange's room knows more of it than this.
"""

from __future__ import annotations

import importlib
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from typing import Any, Protocol

import msgspec

from ssmd_dagster.clock import Clock

SESSION = "session"
"""Channel of what the recorder itself says and of answers to its commands."""
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


class FrameSink(Protocol):
    """Receives everything that comes off one socket, in order, on the event loop; must not block."""

    def on_frame(self, recv_ns: int, payload: bytes, envelope: Envelope | None) -> None:
        """Take one whole message as it came off the socket; `envelope` is None where it is not such JSON."""

    def on_ping(self, recv_ns: int) -> None:
        """Take note that the server showed a sign of life without data."""

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

    async def close(self) -> None:
        """Close the socket and wait until the sink has been told."""


class Trade(msgspec.Struct, frozen=True, kw_only=True):
    """One trade as the exchange's own list has it; `row` is the exchange's JSON object as it came."""

    trade_id: str
    ticker: str
    event_ns: int
    row: msgspec.Raw


class Exchange(Protocol):
    """One exchange, opened for one environment. Methods raise `errors.SsmdError` with the address and what to do."""

    channel_of_type: Mapping[str, str]
    """Channel of every known message type; answers to commands map to `session`, unknown types are `other`."""

    def markets(self, selection: MarketSelection) -> AsyncIterator[Market]:
        """Yield the selected open markets, each ticker once."""

    async def status(self) -> ExchangeStatus:
        """Ask the exchange whether it is open."""

    def trades(self, from_ns: int, to_ns: int, ticker: str | None = None) -> AsyncIterator[Trade]:
        """Yield the exchange's own list of trades in `[from_ns, to_ns]`, newest first, each trade id once."""

    async def connect(self, sink: FrameSink, *, use_yes_price: bool = False) -> Connection:
        """Open one socket; `use_yes_price` goes with every order book subscription.

        A refused credential is a `ConfigurationError`, no answer an `UnreachableError`.
        """

    async def close(self) -> None:
        """Close the REST client."""


_ADAPTERS = {"kalshi": "ssmd_dagster.kalshi"}


def adapter_names() -> tuple[str, ...]:
    """Return the feeds for which this installation has an exchange's room."""
    return tuple(sorted(_ADAPTERS))


def market_reader(feed_name: str) -> Callable[[msgspec.Raw], str | None]:
    """Return the function of a feed that tells which market a frame is about; None for frames about no single one."""
    reader: Callable[[msgspec.Raw], str | None] = importlib.import_module(_ADAPTERS[feed_name]).market_of
    return reader


def open_exchange(feed_name: str, settings: ExchangeSettings, clock: Clock) -> Exchange:
    """Open the exchange of a feed. Call inside a running event loop; no request is made yet."""
    room = importlib.import_module(_ADAPTERS[feed_name])
    exchange: Exchange = room.open_exchange(settings, clock)
    return exchange
