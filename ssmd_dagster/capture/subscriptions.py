"""Which markets a shard records right now: what is listed, what has settled, how many it may be. Pure.

A market is wanted from when it is listed, so that its opening is not missed, until some time after it has settled. Not here:
asking the exchange for its list (`listing`) and the subscriptions themselves (`follower`).
"""

from __future__ import annotations

from collections.abc import Iterable, KeysView, Sequence
from zlib import crc32

from ssmd_dagster.exchange import Market, MarketNews

BATCH = 1_000
"""Markets that are added, deleted or asked for together."""
KEEP_SETTLED_NS = 120_000_000_000
"""How long a market that has settled is still listened to."""
ASK_AFTER_CLOSE_NS = 900_000_000_000
"""So long after its close, and again after as long, the exchange is asked whether a market has settled."""
_NEVER_NS = 2**63 - 1
_SETTLED = frozenset({"settled", "finalized"})


def shard_of_market(ticker: str, shards: int) -> int:
    """Return the shard, from 1 on, that records a market: the same one for as long as there are so many shards."""
    return 1 + crc32(ticker.encode()) % shards


def batches(tickers: Sequence[str], size: int = BATCH) -> list[list[str]]:
    """Cut tickers into batches."""
    return [list(tickers[at : at + size]) for at in range(0, len(tickers), size)]


class _Entry:
    __slots__ = ("ask_ns", "close_ns", "news_ns", "open_ns", "settled_ns")

    def __init__(self, open_ns: int, close_ns: int, news_ns: int | None) -> None:
        self.open_ns = open_ns
        self.close_ns = close_ns or _NEVER_NS
        self.news_ns = news_ns
        self.settled_ns: int | None = None
        self.ask_ns = 0


class Roster:
    """The markets of one shard.

    `number` of `shards` says which markets are its own; beyond `most` no market is taken up, and `left_out` counts them.
    """

    def __init__(self, *, most: int, number: int = 1, shards: int = 1) -> None:
        self.version = 0
        self._most, self._number, self._shards = most, number, shards
        self._entries: dict[str, _Entry] = {}
        self._left_out: set[str] = set()

    @property
    def left_out(self) -> int:
        """Return how many markets are listed and not recorded, for there is no room."""
        return len(self._left_out)

    def __contains__(self, ticker: str) -> bool:
        return ticker in self._entries

    def take(self, markets: Iterable[Market], now_ns: int) -> None:
        """Take rows of the exchange's list: new markets, new times, and which have settled."""
        for market in markets:
            entry = self._entries.get(market.ticker)
            if entry is None:
                if market.status not in _SETTLED and (market.close_ns or _NEVER_NS) > now_ns:
                    self._add(market.ticker, market.open_ns, market.close_ns, None)
                continue
            entry.open_ns, entry.close_ns = market.open_ns, market.close_ns or _NEVER_NS
            if market.status in _SETTLED:
                self._settle(entry, now_ns)

    def hear(self, news: MarketNews, recv_ns: int) -> None:
        """Take what the exchange has told of a market."""
        entry = self._entries.get(news.ticker)
        if news.event == "listed" and entry is None:
            self._add(news.ticker, news.open_ns or 0, news.close_ns or 0, recv_ns)
        elif entry is not None and news.event == "moved" and news.close_ns is not None:
            entry.close_ns = news.close_ns
        elif entry is not None and news.event == "settled":
            self._settle(entry, recv_ns)

    def _add(self, ticker: str, open_ns: int, close_ns: int, news_ns: int | None) -> None:
        if shard_of_market(ticker, self._shards) != self._number:
            return
        if len(self._entries) >= self._most:
            self._left_out.add(ticker)
            return
        self._left_out.discard(ticker)
        self._entries[ticker] = _Entry(open_ns, close_ns, news_ns)
        self.version += 1

    def _settle(self, entry: _Entry, at_ns: int) -> None:
        if entry.settled_ns is None:
            entry.settled_ns = at_ns

    def let_go(self, now_ns: int) -> list[str]:
        """Drop and return the markets that settled long enough ago."""
        gone = [
            ticker
            for ticker, entry in self._entries.items()
            if entry.settled_ns is not None and now_ns - entry.settled_ns > KEEP_SETTLED_NS
        ]
        for ticker in gone:
            del self._entries[ticker]
        self._left_out.difference_update(gone)
        self.version += bool(gone)
        return gone

    def to_ask(self, now_ns: int, most: int) -> list[str]:
        """Return up to `most` closed markets of which it is time to ask whether they have settled; counts as asked."""
        due = []
        for ticker, entry in self._entries.items():
            if entry.settled_ns is None and now_ns >= max(entry.close_ns + ASK_AFTER_CLOSE_NS, entry.ask_ns):
                entry.ask_ns = now_ns + ASK_AFTER_CLOSE_NS
                due.append(ticker)
                if len(due) >= most:
                    break
        return due

    def tickers(self) -> KeysView[str]:
        """Return the wanted markets."""
        return self._entries.keys()

    def is_open(self, ticker: str, now_ns: int) -> bool:
        """Tell whether a market trades by its times."""
        entry = self._entries.get(ticker)
        return entry is not None and entry.open_ns <= now_ns < entry.close_ns

    def missed_since(self, tickers: Iterable[str], up_ns: int, now_ns: int) -> int | None:
        """Return since when one of these, which are not subscribed, is missed on a connection that is up since `up_ns`.

        That is its opening, or its listing where that came later; None where all of them are yet to open.
        """
        since = [
            max(entry.open_ns, entry.news_ns or 0, up_ns)
            for ticker in tickers
            if (entry := self._entries.get(ticker)) is not None
        ]
        first = min(since, default=now_ns)
        return first if first < now_ns else None
