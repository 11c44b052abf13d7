"""Pages of the simulated exchange's trades, newest first: those since its first start and, before them, its past.

Not for how either keeps them: see `tradebook` and `history`.
"""

from __future__ import annotations

from aiohttp import web

from ssmd_dagster.simulator.answers import (
    PREFIX,
    WrongRequestError,
    cursor_of,
    integer,
    json_answer,
    page_limit,
    position,
    shortened,
)
from ssmd_dagster.simulator.engine import Engine
from ssmd_dagster.simulator.history import History

_TAIL_ROWS = 50
_TAILS_KEPT = 256
_EARLIEST_US, _LATEST_US = 0, 1 << 62


class TradeLists:
    """The lists `/markets/trades` and `/historical/trades` of one exchange."""

    def __init__(self, engine: Engine, history: History) -> None:
        self.engine, self.history = engine, history
        self._tails: dict[str, list[bytes]] = {}

    async def answer(self, request: web.Request, cutoff_s: int) -> web.Response:
        """Answer a request for a page of trades; the live part ends at `cutoff_s`."""
        limit = page_limit(request, 100, 1_000)
        low_s, high_s = integer(request, "min_ts"), integer(request, "max_ts")
        low = _EARLIEST_US if low_s is None else low_s * 1_000_000
        high = _LATEST_US if high_s is None else high_s * 1_000_000
        cutoff = cutoff_s * 1_000_000
        if request.path == f"{PREFIX}/historical/trades":
            high = min(high, cutoff - 1)
        else:
            low = max(low, cutoff)
        blocks = {"": None, "true": True, "false": False}.get(request.query.get("is_block_trade", ""))
        rows, following = self.tape(low, high, request.query.get("ticker") or None, blocks, _place(request), limit)
        path = request.path.removeprefix(PREFIX)
        came_by = request.query.get("cursor", "")
        if came_by in self._tails and (fault := self.engine.faults.over_http(("http_shift",), path)):
            # What a client sees when rows are pushed on while he pages: some that he had come again.
            rows = [*self._tails[came_by][-(fault.order.size or 5) :], *rows]
        rows = shortened(self.engine.faults, request, rows)
        cursor = cursor_of(following) if following else ""
        if cursor:
            self._tails[cursor] = rows[-_TAIL_ROWS:]
            if len(self._tails) > _TAILS_KEPT:
                self._tails.pop(next(iter(self._tails)))
        return json_answer(b'{"trades":[%b],"cursor":"%b"}' % (b",".join(rows), cursor.encode()))

    def tape(
        self,
        low: int,
        high: int,
        ticker: str | None,
        blocks: bool | None,
        below: tuple[tuple[int, int] | None, tuple[int, int] | None],
        limit: int,
    ) -> tuple[list[bytes], list[tuple[int, int] | None] | None]:
        """Return a page of all trades, newest first, and where the next one begins."""
        trades, history = self.engine.trades, self.history
        if blocks is None and not history.holds(low, high):
            rows, place = trades.page(ticker=ticker, min_us=low, max_us=high, limit=limit, cursor=below[0])
            return rows, [place, None] if place else None
        if blocks is None and ticker is None and not trades.holds(low, high):
            rows, past = history.page(low, high, below[1], limit)
            return rows, [None, past] if past else None
        return self._merged(low, high, ticker, blocks, below, limit)

    def _merged(
        self,
        low: int,
        high: int,
        ticker: str | None,
        blocks: bool | None,
        below: tuple[tuple[int, int] | None, tuple[int, int] | None],
        limit: int,
    ) -> tuple[list[bytes], list[tuple[int, int] | None] | None]:
        recent = self.engine.trades.newest_first(ticker, low, high, below[0])
        past = self.history.newest_first(low, high, below[1], ticker)
        one, other = next(recent, None), next(past, None)
        rows: list[bytes] = []
        places = list(below)
        while one is not None or other is not None:
            of_past = one is None or (other is not None and other[0] > one[0])
            found = other if of_past else one
            assert found is not None
            if blocks is None or (b'"is_block_trade":true' in found[1]) == blocks:
                if len(rows) == limit:
                    return rows, places
                rows.append(found[1])
            places[of_past] = found[2]
            if of_past:
                other = next(past, None)
            else:
                one = next(recent, None)
        return rows, None


def _place(request: web.Request) -> tuple[tuple[int, int] | None, tuple[int, int] | None]:
    """Return where a cursor of trades stands: in the list since the first start, and in the past before it."""
    place = position(request)
    if place is None:
        return None, None
    match place:
        case [[int(file), int(row)], None]:
            return (file, row), None
        case [None, [int(block), int(index)]]:
            return None, (block, index)
        case [[int(file), int(row)], [int(block), int(index)]]:
            return (file, row), (block, index)
        case _:
            raise WrongRequestError(400, "invalid_cursor", "invalid cursor")
