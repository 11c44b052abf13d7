"""Order books over REST: whole books of one or many markets, without clock or event time.

Not for following a book: that is what the WebSocket's snapshots and deltas are for.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence

import msgspec

from ssmd_dagster.kalshi.errors import ExchangeAnswerError
from ssmd_dagster.kalshi.rest import RestClient
from ssmd_dagster.kalshi.wire import Snapshot, WireError, read_book

_TICKERS_PER_REQUEST = 100


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
