"""The REST side of the simulated exchange, `/trade-api/v2`, and the control surface, `/sim`.

Shapes and rules follow Kalshi's OpenAPI file; answers to market lists may be a second old, as behind Kalshi's CDN.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import json
from collections.abc import Awaitable, Callable, Iterable, Iterator
from datetime import UTC, datetime
from typing import Any

import msgspec
from aiohttp import web

from ssmd_dagster.errors import ConfigurationError
from ssmd_dagster.simulator import catalog
from ssmd_dagster.simulator.catalog import SECOND_NS, Series
from ssmd_dagster.simulator.engine import Engine
from ssmd_dagster.simulator.faults import HTTP_KINDS, Order
from ssmd_dagster.simulator.frames import compact
from ssmd_dagster.simulator.history import History, PastMarket
from ssmd_dagster.simulator.keys import KeyRing, RefusedSignatureError
from ssmd_dagster.simulator.tapes import contracts, dollars
from ssmd_dagster.simulator.world import STATUS_OF_FILTER, Event, Market, rfc3339

PREFIX = "/trade-api/v2"
_DAY_S = 86_400
_READ_BURST_S = 2.0
_TAIL_ROWS = 50
_TAILS_KEPT = 256
_CACHE_S = 1.0
_CACHE_BYTES = 64 << 20
_CACHED = ("/markets", "/events", "/events/multivariate", "/series")
_SIGNED = ("KALSHI-ACCESS-KEY", "KALSHI-ACCESS-SIGNATURE", "KALSHI-ACCESS-TIMESTAMP")
_HTTP_FAULTS = tuple(kind for kind in HTTP_KINDS if kind in ("http_429", "http_5xx", "http_slow", "http_cut"))
_EARLIEST_US, _LATEST_US = 0, 1 << 62
_TIME_FAMILIES = ("created", "updated", "close", "settled")

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


class WrongRequestError(Exception):
    """A request that is answered with an error."""

    def __init__(self, status: int, code: str, message: str) -> None:
        self.status = status
        self.code = code
        self.message = message
        super().__init__(message)


def error_response(status: int, code: str, message: str, details: str = "") -> web.Response:
    """Return an error as Kalshi's REST writes it."""
    error = {"code": code, "message": message, **({"details": details} if details else {}), "service": "api"}
    return web.Response(status=status, body=compact({"error": error}), content_type="application/json")


def _json(body: bytes) -> web.Response:
    return web.Response(body=body, content_type="application/json")


def _cursor(value: Any) -> str:
    return base64.urlsafe_b64encode(json.dumps(value).encode()).decode().rstrip("=")


class ReadLimit:
    """Kalshi's bucket for reads: ten tokens a request, two seconds' worth of them at most, one bucket an account.

    Who does not sign shares the bucket of his address. `per_second` is in requests; 0 is no limit.
    """

    def __init__(self, per_second: float) -> None:
        self.per_second = per_second
        self.refused = 0
        self._buckets: dict[str, tuple[float, float]] = {}

    def take(self, account: str, now_s: float) -> bool:
        """Take one request's tokens; False where there are none."""
        if not self.per_second:
            return True
        full = self.per_second * _READ_BURST_S
        left, at_s = self._buckets.get(account, (full, now_s))
        left = min(full, left + (now_s - at_s) * self.per_second)
        taken = left >= 1
        self._buckets[account] = left - taken, now_s
        self.refused += not taken
        return taken


class Rest:
    """Serves one engine's world, and what was before it, over HTTP."""

    def __init__(
        self,
        engine: Engine,
        history: History,
        keys: KeyRing | None,
        about: dict[str, Any],
        *,
        cutoff_days: float,
        reads_per_second: float,
    ) -> None:
        self.engine = engine
        self.history = history
        self.keys = keys
        self.about = about
        self.cutoff_days = cutoff_days
        self.limit = ReadLimit(reads_per_second)
        self.pages = 0
        self._cache: dict[str, tuple[float, bytes]] = {}
        self._cache_bytes = 0
        self._cache_world = -1, 0
        self._tails: dict[str, list[bytes]] = {}

    def application(self) -> web.Application:
        """Return the aiohttp application."""
        app = web.Application(middlewares=[self._guard], client_max_size=64 << 20)
        get = app.router.add_get
        get(f"{PREFIX}/markets", self._markets)
        get(f"{PREFIX}/markets/trades", self._trades)
        get(f"{PREFIX}/markets/orderbooks", self._orderbooks)
        get(f"{PREFIX}/markets/{{ticker}}", self._market)
        get(f"{PREFIX}/markets/{{ticker}}/orderbook", self._orderbook)
        get(f"{PREFIX}/events", self._events)
        get(f"{PREFIX}/events/multivariate", self._events)
        get(f"{PREFIX}/events/{{ticker}}", self._event)
        get(f"{PREFIX}/series", self._series_list)
        get(f"{PREFIX}/series/{{ticker}}", self._series)
        get(f"{PREFIX}/exchange/status", self._status)
        get(f"{PREFIX}/exchange/schedule", self._schedule)
        get(f"{PREFIX}/exchange/user_data_timestamp", self._user_data)
        get(f"{PREFIX}/historical/cutoff", self._cutoff)
        get(f"{PREFIX}/historical/trades", self._trades)
        get(f"{PREFIX}/historical/markets", self._historical_markets)
        get(f"{PREFIX}/historical/markets/{{ticker}}", self._historical_market)
        get("/sim/status", self._sim_status)
        get("/sim/book/{ticker}", self._sim_book)
        get("/sim/truth", self._sim_truth)
        get("/sim/faults", self._sim_faults)
        app.router.add_post("/sim/faults", self._sim_inject)
        app.router.add_delete("/sim/faults", self._sim_clear)
        app.router.add_post("/sim/clock", self._sim_clock)
        app.router.add_post("/sim/keys", self._sim_keys)
        app.router.add_post("/sim/rate", self._sim_rate)
        app.router.add_post("/sim/cutoff", self._sim_cutoff)
        app.router.add_post("/sim/limits", self._sim_limits)
        return app

    @web.middleware
    async def _guard(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        path = request.path
        if path.startswith(PREFIX):
            self.pages += 1
            account = request.headers.get("KALSHI-ACCESS-KEY") or request.remote or ""
            if not self.limit.take(account, asyncio.get_running_loop().time()):
                return self._too_many("flat" if self.limit.refused % 2 else "nested")
            fault = self.engine.faults.over_http(_HTTP_FAULTS, path.removeprefix(PREFIX))
            if fault is not None:
                answer = await self._faulty(request, fault.order)
                if answer is not None:
                    return answer
            if self.keys is not None and any(name in request.headers for name in _SIGNED):
                try:
                    self.keys.check(request.headers, request.method, path)
                except RefusedSignatureError as refused:
                    return error_response(401, refused.code, refused.code.replace("_", " "), refused.details)
        try:
            if path.removeprefix(PREFIX) in _CACHED:
                return await self._from_cache(request, handler)
            return await handler(request)
        except WrongRequestError as wrong:
            return error_response(wrong.status, wrong.code, wrong.message)
        except web.HTTPNotFound:
            return error_response(404, "not_found", "not found")
        except web.HTTPMethodNotAllowed:
            return error_response(405, "method_not_allowed", "method not allowed")

    @staticmethod
    def _too_many(body: str) -> web.Response:
        """Refuse a request as documented (flat) or as observed (nested)."""
        flat = {"error": "too many requests"}
        nested = {"error": {"code": "too_many_requests", "message": "too many requests"}}
        return web.json_response(flat if body == "flat" else nested, status=429)

    @staticmethod
    async def _faulty(request: web.Request, order: Order) -> web.StreamResponse | None:
        """Answer as a fault wants it, or return None where the answer is only slow."""
        match order.fault:
            case "http_429":
                return Rest._too_many(order.body)
            case "http_5xx":
                if order.status == 503 and order.body == "flat":
                    return web.json_response({"code": "unavailable", "message": "service unavailable"}, status=503)
                page = "<html><head><title>Bad gateway</title></head></html>"
                return web.Response(status=order.status, text=page, content_type="text/html")
            case "http_cut":
                response = web.StreamResponse(headers={"Content-Type": "application/json", "Content-Length": "100000"})
                await response.prepare(request)
                await response.write(b'{"markets":[{"ticker":')
                assert request.transport is not None
                request.transport.abort()
                return response
            case _:
                await asyncio.sleep(order.delay_s)
                return None

    async def _from_cache(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        now_s = self.engine.clock() / SECOND_NS
        world = self.engine.world
        if (world.version, self.engine.clock.offset_ns) != self._cache_world or self._cache_bytes > _CACHE_BYTES:
            self._cache.clear()
            self._cache_bytes = 0
            self._cache_world = world.version, self.engine.clock.offset_ns
        key = request.raw_path
        hit = self._cache.get(key)
        if hit is not None and 0 <= now_s - hit[0] < _CACHE_S:
            return _json(hit[1])
        response = await handler(request)
        assert isinstance(response, web.Response)
        assert isinstance(response.body, bytes)
        self._cache_bytes += len(response.body) - (len(hit[1]) if hit else 0)
        self._cache[key] = now_s, response.body
        return response

    # -- parameters ------------------------------------------------------------------------------------------------

    @staticmethod
    def _integer(request: web.Request, name: str) -> int | None:
        text = request.query.get(name)
        if not text:
            return None
        try:
            return int(text)
        except ValueError:
            raise WrongRequestError(400, "bad_request", f"{name} is not an integer") from None

    def _limit(self, request: web.Request, default: int, most: int) -> int:
        limit = self._integer(request, "limit")
        if limit is None or limit == 0:
            return default
        if not 0 < limit <= most:
            raise WrongRequestError(400, "bad_request", f"limit must be between 1 and {most}")
        return limit

    @staticmethod
    def _position(request: web.Request) -> Any:
        text = request.query.get("cursor")
        if not text:
            return None
        try:
            return json.loads(base64.urlsafe_b64decode(text + "=" * (-len(text) % 4)))
        except (binascii.Error, ValueError):
            raise WrongRequestError(400, "invalid_cursor", "invalid cursor") from None

    # -- markets ---------------------------------------------------------------------------------------------------

    def _wanted(self, request: web.Request, markets: Iterable[Market]) -> Iterable[Market]:
        query = request.query
        families = [name for name in _TIME_FAMILIES if query.get(f"min_{name}_ts") or query.get(f"max_{name}_ts")]
        if len(families) > 1:
            raise WrongRequestError(400, "bad_request", "timestamp filters are mutually exclusive")
        status = query.get("status", "")
        if status and status not in ("unopened", "open", "paused", "closed", "settled"):
            raise WrongRequestError(400, "bad_request", f"invalid status {status}")
        mve = query.get("mve_filter", "")
        if mve not in ("", "only", "exclude"):
            raise WrongRequestError(400, "bad_request", f"invalid mve_filter {mve}")
        event_ticker, series_ticker = query.get("event_ticker"), query.get("series_ticker")
        bounds = None
        if families:
            low, high = self._integer(request, f"min_{families[0]}_ts"), self._integer(request, f"max_{families[0]}_ts")
            bounds = families[0], -1 if low is None else low, 1 << 62 if high is None else high
        for market in markets:
            plan = market.event.plan
            if event_ticker and plan.ticker != event_ticker:
                continue
            if series_ticker and plan.series.ticker != series_ticker:
                continue
            if mve and plan.series.combo != (mve == "only"):
                continue
            if status and not _has_status(market, status):
                continue
            if bounds and not bounds[1] <= _time_of(market, bounds[0]) <= bounds[2]:
                continue
            yield market

    async def _markets(self, request: web.Request) -> web.Response:
        limit = self._limit(request, 100, 1_000)
        query = request.query
        if query.get("tickers") or query.get("event_ticker"):
            return _json(self._named_page(request, limit))
        rows: list[bytes] = []
        last: Any = None
        for row, place in self._listed(request):
            if len(rows) == limit:
                return _json(b'{"markets":[%b],"cursor":"%b"}' % (b",".join(rows), _cursor(last).encode()))
            rows.append(row)
            last = place
        return _json(b'{"markets":[%b],"cursor":""}' % b",".join(rows))

    def _named_page(self, request: web.Request, limit: int) -> bytes:
        """Return a page of the markets that a request names; settled ones are found until the cutoff passes over them."""
        world, after = self.engine.world, self._position(request) or 0
        if not isinstance(after, int):
            raise WrongRequestError(400, "invalid_cursor", "invalid cursor")
        if tickers := request.query.get("tickers"):
            named = [world.markets.get(ticker) for ticker in dict.fromkeys(tickers.split(","))]
        else:
            event = world.events.get(request.query["event_ticker"])
            named = list(event.markets) if event is not None else []
        listed = sorted((market for market in named if market), key=lambda market: -market.index)
        past = (past.market for past in self._past_named(request) if past.settled_s >= self._cutoff_s())
        listed += [market for market in past if market.ticker not in world.markets]
        wanted = list(self._wanted(request, listed))
        cursor = _cursor(after + limit) if after + limit < len(wanted) else ""
        page = b",".join(market.row() for market in wanted[after : after + limit])
        return b'{"markets":[%b],"cursor":"%b"}' % (page, cursor.encode())

    def _listed(self, request: web.Request) -> Iterator[tuple[bytes, Any]]:
        """Yield rows of the live list and their places: what is listed now, then, where asked for, what was settled lately."""
        world, query, below = self.engine.world, request.query, self._position(request)
        past = _past_place(below)
        if past is None:
            if below is not None and not isinstance(below, int):
                raise WrongRequestError(400, "invalid_cursor", "invalid cursor")
            for market in self._wanted(request, world.newest_first(below)):
                yield market.row(), market.index
        # Without such a filter the list would be that of the last two months.
        if query.get("status") == "settled" or (query.get("series_ticker") and not query.get("status")):
            for found, place in self._past_listed(query.get("series_ticker"), past, self._cutoff_s(), self._now_s()):
                if found.ticker not in world.markets and any(self._wanted(request, [found])):
                    yield found.row(), place

    def _past_named(self, request: web.Request) -> list[PastMarket]:
        """Return the past markets that a request names, the last settled first."""
        if tickers := request.query.get("tickers"):
            found = [past for ticker in dict.fromkeys(tickers.split(",")) if (past := self.history.market(ticker))]
        else:
            event = self.history.event(request.query["event_ticker"])
            found = [PastMarket(market, event[1]) for market in event[0].markets] if event else []
        return sorted(found, key=lambda past: (past.settled_s, past.market.ticker), reverse=True)

    def _past_listed(
        self, series: str | None, below: tuple[int, int] | None, from_s: int, to_s: int
    ) -> Iterator[tuple[Market, tuple[int, int]]]:
        """Yield the past markets (of a series) settled in `[from_s, to_s)`, the last first, and their places (day, index)."""
        last_day = (to_s - 1) // _DAY_S
        for day in range(last_day if below is None else min(below[0], last_day), from_s // _DAY_S - 1, -1):
            for index, past in enumerate(self.history.settled_on(day, series)):
                if from_s <= past.settled_s < to_s and (below is None or day < below[0] or index > below[1]):
                    yield past.market, (day, index)

    def _find(self, request: web.Request) -> Market:
        ticker = request.match_info["ticker"]
        market = self.engine.world.markets.get(ticker)
        if market is None and (past := self.history.market(ticker)) and past.settled_s >= self._cutoff_s():
            market = past.market
        if market is None:
            raise WrongRequestError(404, "not_found", "market not found")
        return market

    async def _market(self, request: web.Request) -> web.Response:
        return _json(b'{"market":%b}' % self._find(request).row())

    async def _orderbook(self, request: web.Request) -> web.Response:
        depth = self._integer(request, "depth") or 0
        if depth > 100:
            raise WrongRequestError(400, "bad_request", "depth must be at most 100")
        return _json(b'{"orderbook_fp":%b}' % _book_json(self._find(request), depth))

    async def _orderbooks(self, request: web.Request) -> web.Response:
        tickers = [ticker for text in request.query.getall("tickers", []) for ticker in text.split(",")]
        if not 0 < len(tickers) <= 100:
            raise WrongRequestError(400, "bad_request", "between 1 and 100 tickers are required")
        markets = self.engine.world.markets
        books = [
            b'{"ticker":"%b","orderbook_fp":%b}' % (ticker.encode(), _book_json(markets[ticker], 0))
            for ticker in tickers
            if ticker in markets
        ]
        return _json(b'{"orderbooks":[%b]}' % b",".join(books))

    async def _trades(self, request: web.Request) -> web.Response:
        limit = self._limit(request, 100, 1_000)
        low_s, high_s = self._integer(request, "min_ts"), self._integer(request, "max_ts")
        low = _EARLIEST_US if low_s is None else low_s * 1_000_000
        high = _LATEST_US if high_s is None else high_s * 1_000_000
        cutoff = self._cutoff_s() * 1_000_000
        if request.path == f"{PREFIX}/historical/trades":
            high = min(high, cutoff - 1)
        else:
            low = max(low, cutoff)
        blocks = {"": None, "true": True, "false": False}.get(request.query.get("is_block_trade", ""))
        rows, following = self._tape(
            low, high, request.query.get("ticker") or None, blocks, self._place(request), limit
        )
        path = request.path.removeprefix(PREFIX)
        came_by = request.query.get("cursor", "")
        if came_by in self._tails and (fault := self.engine.faults.over_http(("http_shift",), path)):
            # What a client sees when rows are pushed on while he pages: some that he had come again.
            rows = [*self._tails[came_by][-(fault.order.size or 5) :], *rows]
        if rows and (fault := self.engine.faults.over_http(("http_short",), path)):
            rows = rows[: max(0, len(rows) - (fault.order.size or 1))]
        cursor = _cursor(following) if following else ""
        if cursor:
            self._tails[cursor] = rows[-_TAIL_ROWS:]
            if len(self._tails) > _TAILS_KEPT:
                self._tails.pop(next(iter(self._tails)))
        return _json(b'{"trades":[%b],"cursor":"%b"}' % (b",".join(rows), cursor.encode()))

    def _place(self, request: web.Request) -> tuple[tuple[int, int] | None, tuple[int, int] | None]:
        """Return where a cursor of trades stands: in the list since the first start, and in the past before it."""
        position = self._position(request)
        if position is None:
            return None, None
        match position:
            case [[int(file), int(place)], None]:
                return (file, place), None
            case [None, [int(block), int(index)]]:
                return None, (block, index)
            case [[int(file), int(place)], [int(block), int(index)]]:
                return (file, place), (block, index)
            case _:
                raise WrongRequestError(400, "invalid_cursor", "invalid cursor")

    def _tape(
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

    async def _historical_markets(self, request: web.Request) -> web.Response:
        limit = self._limit(request, 100, 1_000)
        query = request.query
        asked = [name for name in ("tickers", "event_ticker", "series_ticker", "mve_filter") if query.get(name)]
        if len(asked) > 1:
            raise WrongRequestError(400, "bad_request", "filters are mutually exclusive")
        if asked and asked[0] in ("tickers", "event_ticker"):
            past = [found for found in self._past_named(request) if found.settled_s < self._cutoff_s()]
            page = b",".join(found.market.row() for found in past[:limit])
            return _json(b'{"markets":[%b],"cursor":""}' % page)
        below = self._position(request)
        place = _past_place(below)
        if below is not None and place is None:
            raise WrongRequestError(400, "invalid_cursor", "invalid cursor")
        rows: list[bytes] = []
        for market, at in self._past_listed(query.get("series_ticker"), place, self.history.first_s, self._cutoff_s()):
            if not any(self._wanted(request, [market])):
                continue
            if len(rows) == limit:
                return _json(b'{"markets":[%b],"cursor":"%b"}' % (b",".join(rows), _cursor(place).encode()))
            rows.append(market.row())
            place = at
        return _json(b'{"markets":[%b],"cursor":""}' % b",".join(rows))

    async def _historical_market(self, request: web.Request) -> web.Response:
        past = self.history.market(request.match_info["ticker"])
        if past is None or past.settled_s >= self._cutoff_s():
            raise WrongRequestError(404, "not_found", "market not found")
        return _json(b'{"market":%b}' % past.market.row())

    # -- events and series -----------------------------------------------------------------------------------------

    def _event_row(self, event: Event, *, nested: bool) -> bytes:
        plan = event.plan
        collateral = "MECNET" if plan.series.strike == "between" else ""
        fields: dict[str, Any] = {
            "event_ticker": plan.ticker,
            "series_ticker": plan.series.ticker,
            "sub_title": plan.sub_title,
            "title": plan.title,
            "collateral_return_type": collateral,
            "mutually_exclusive": collateral == "MECNET",
            "category": plan.series.category,
            "strike_date": rfc3339(plan.close_s),
            "settlement_sources": [{"name": "Simulator", "url": "https://example.com"}],
            "last_updated_ts": f"{rfc3339(plan.created_s)[:-1]}.000000Z",
            "exchange_index": plan.series.shard,
        }
        row = compact(fields)
        if nested:
            markets = b",".join(market.row() for market in event.markets)
            row = b'%b,"markets":[%b]}' % (row[:-1], markets)
        return row

    def _events_of(self, tickers: set[str] | None) -> list[Event]:
        """Return the listed events, the newest first; past ones only where they are named."""
        if tickers is None:
            return self.engine.world.events_newest_first()
        named = [event for ticker in tickers if (event := self._event_of(ticker)) is not None]
        return sorted(named, key=lambda event: (event.plan.created_s, event.ticker), reverse=True)

    async def _events(self, request: web.Request) -> web.Response:
        query = request.query
        combos = request.path.endswith("/multivariate")
        limit = self._limit(request, 100 if combos else 200, 200)
        status, series = query.get("status", ""), query.get("series_ticker")
        tickers = set(query["tickers"].split(",")) if query.get("tickers") else None
        min_close, min_updated = self._integer(request, "min_close_ts"), self._integer(request, "min_updated_ts")
        below = self._position(request)
        nested = query.get("with_nested_markets") == "true"
        rows: list[bytes] = []
        cursor = ""
        last: Any = None
        for event in self._events_of(tickers):
            plan = event.plan
            key = [plan.created_s, plan.ticker]
            if (
                plan.series.combo != combos
                or (below is not None and key >= below)
                or (status and event.status() != status)
                or (series and plan.series.ticker != series)
                or (tickers is not None and plan.ticker not in tickers)
                or (min_close is not None and all(market.close_s <= min_close for market in event.markets))
                or (min_updated is not None and plan.created_s <= min_updated)
            ):
                continue
            if len(rows) == limit:
                cursor = _cursor(last)
                break
            rows.append(self._event_row(event, nested=nested))
            last = key
        return _json(b'{"events":[%b],"cursor":"%b"}' % (b",".join(rows), cursor.encode()))

    def _event_of(self, ticker: str) -> Event | None:
        event = self.engine.world.events.get(ticker)
        past = self.history.event(ticker) if event is None else None
        return past[0] if past is not None else event

    async def _event(self, request: web.Request) -> web.Response:
        event = self._event_of(request.match_info["ticker"])
        if event is None:
            raise WrongRequestError(404, "not_found", "event not found")
        if request.query.get("with_nested_markets") == "true":
            return _json(b'{"event":%b,"markets":[]}' % self._event_row(event, nested=True))
        markets = b"" if request.query.get("exclude_markets") == "true" else b",".join(m.row() for m in event.markets)
        return _json(b'{"event":%b,"markets":[%b]}' % (self._event_row(event, nested=False), markets))

    def _series_row(self, series: Series, *, volume: bool) -> dict[str, Any]:
        row: dict[str, Any] = {
            "ticker": series.ticker,
            "frequency": series.rhythm.value,
            "title": series.title,
            "category": series.category,
            "categories": [series.category],
            "tags": list(series.tags),
            "settlement_sources": [{"name": "Simulator", "url": "https://example.com"}],
            "contract_url": f"https://example.com/contracts/{series.ticker}.pdf",
            "contract_terms_url": f"https://example.com/contracts/{series.ticker}-terms.pdf",
            "fee_type": "quadratic",
            "fee_multiplier": 1,
            "additional_prohibitions": [],
            "last_updated_ts": "2026-01-01T00:00:00Z",
            "exchange_index": series.shard,
        }
        if volume:
            markets = self.engine.world.markets.values()
            row["volume_fp"] = contracts(sum(m.volume() for m in markets if m.event.plan.series is series))
        return row

    async def _series_list(self, request: web.Request) -> web.Response:
        query = request.query
        category, tags = query.get("category"), query.get("tags")
        rows = [
            self._series_row(series, volume=query.get("include_volume") == "true")
            for series in self.engine.world.allotted
            if (not category or series.category == category) and (not tags or set(tags.split(",")) & set(series.tags))
        ]
        return _json(compact({"series": rows}))

    async def _series(self, request: web.Request) -> web.Response:
        ticker = request.match_info["ticker"]
        for series in self.engine.world.allotted:
            if series.ticker == ticker:
                row = self._series_row(series, volume=request.query.get("include_volume") == "true")
                return _json(compact({"series": row}))
        raise WrongRequestError(404, "not_found", "series not found")

    # -- the exchange ----------------------------------------------------------------------------------------------

    def _now_s(self) -> int:
        return self.engine.clock() // SECOND_NS

    def _cutoff_s(self) -> int:
        return int(self._now_s() - self.cutoff_days * _DAY_S) // _DAY_S * _DAY_S

    async def _status(self, request: web.Request) -> web.Response:
        resume_s = catalog.paused_until_s(self._now_s()) if self.engine.pauses else None
        trading = resume_s is None
        fields: dict[str, Any] = {
            "exchange_active": True,
            "trading_active": trading,
            "intra_exchange_transfers_active": True,
            "exchange_estimated_resume_time": rfc3339(resume_s) if resume_s else None,
        }
        return _json(compact(fields))

    async def _schedule(self, request: web.Request) -> web.Response:
        whole = [{"open_time": "00:00", "close_time": "00:00"}]
        thursday = [{"open_time": "00:00", "close_time": "03:00"}, {"open_time": "05:00", "close_time": "00:00"}]
        days = ("monday", "tuesday", "wednesday", "thursday", "friday", "saturday", "sunday")
        week: dict[str, Any] = {day: thursday if day == "thursday" and self.engine.pauses else whole for day in days}
        week |= {"start_time": "2025-01-01T00:00:00Z", "end_time": "2030-01-01T00:00:00Z"}
        return _json(compact({"schedule": {"standard_hours": [week], "maintenance_windows": []}}))

    async def _cutoff(self, request: web.Request) -> web.Response:
        at = rfc3339(self._cutoff_s())
        names = ("market_settled_ts", "trades_created_ts", "orders_updated_ts", "market_positions_last_updated_ts")
        return _json(compact(dict.fromkeys(names, at)))

    async def _user_data(self, request: web.Request) -> web.Response:
        return _json(compact({"as_of_time": rfc3339(self._now_s())}))

    # -- the control surface ---------------------------------------------------------------------------------------

    async def _sim_status(self, request: web.Request) -> web.Response:
        engine = self.engine
        return _json(
            compact(
                {
                    **self.about,
                    "offset_ns": engine.clock.offset_ns,
                    "now_ns": engine.clock(),
                    "rate": engine.rate,
                    "messages": engine.messages,
                    "trades": len(engine.trades),
                    "frames": engine.truth.frames,
                    "rest_requests": self.pages,
                    "rest_refused": self.limit.refused,
                    "cutoff": rfc3339(self._cutoff_s()),
                    "history": {"trades_per_day": self.history.trades_per_day, "spans": self.history.spans},
                    "trading_paused": engine.paused,
                    "markets": {
                        "listed": len(engine.world.markets),
                        "open": sum(market.status == "active" for market in engine.world.markets.values()),
                    },
                    "connections": [
                        {
                            "connection": connection.number,
                            "remote": connection.remote,
                            "frames": connection.frames,
                            "subscriptions": [
                                {
                                    "sid": sub.sid,
                                    "channel": sub.channel,
                                    "seq": sub.seq,
                                    "markets": None if sub.markets is None else len(sub.markets),
                                }
                                for sub in connection.subscriptions.values()
                            ],
                        }
                        for connection in engine.connections.values()
                    ],
                }
            )
        )

    async def _sim_book(self, request: web.Request) -> web.Response:
        market = self._find(request)
        yes, no = market.book()
        book = {
            "market_ticker": market.ticker,
            "status": market.status,
            "clock": market.clock,
            "yes_dollars": [[dollars(price), contracts(yes[price])] for price in sorted(yes)],
            "no_dollars": [[dollars(price), contracts(no[price])] for price in sorted(no)],
        }
        return _json(compact(book))

    async def _sim_truth(self, request: web.Request) -> web.StreamResponse:
        """Say where the log lies, or, with `date` (UTC) or `from` and `to` in seconds, list every trade of that time."""
        query = request.query
        if query.get("date") or query.get("from"):
            try:
                if on := query.get("date"):
                    start_s = int(datetime.fromisoformat(f"{on}T00:00:00+00:00").timestamp())
                    end_s = start_s + _DAY_S
                else:
                    start_s, end_s = int(query["from"]), int(query["to"])
            except (ValueError, KeyError):
                raise WrongRequestError(400, "bad_request", "date is YYYY-MM-DD, from and to are seconds") from None
            return await self._true_trades(request, start_s * 1_000_000, end_s * 1_000_000 - 1)
        return _json(compact({"directory": self.about["truth"], "frames": self.engine.truth.frames}))

    async def _true_trades(self, request: web.Request, low: int, high: int) -> web.StreamResponse:
        """Send the rows of all trades, newest first, one a line."""
        response = web.StreamResponse(headers={"Content-Type": "application/x-ndjson"})
        await response.prepare(request)
        below: tuple[tuple[int, int] | None, tuple[int, int] | None] = None, None
        while True:
            rows, following = self._tape(low, high, None, None, below, 10_000)
            if rows:
                await response.write(b"\n".join(rows) + b"\n")
            if following is None:
                return response
            below = following[0], following[1]

    @staticmethod
    async def _told(request: web.Request) -> dict[str, Any]:
        try:
            told = await request.json()
        except ValueError:
            told = None
        if not isinstance(told, dict):
            raise WrongRequestError(400, "bad_request", "the body is not a JSON object")
        return told

    async def _sim_clock(self, request: web.Request) -> web.Response:
        told = await self._told(request)
        engine = self.engine
        real_ns = engine.clock() - engine.clock.offset_ns
        match told:
            case {"offset_ns": int(offset_ns)}:
                pass
            case {"advance_s": int() | float() as advance_s}:
                offset_ns = engine.clock.offset_ns + round(advance_s * SECOND_NS)
            case {"set": str(text)}:
                try:
                    when = datetime.fromisoformat(text)
                except ValueError:
                    raise WrongRequestError(400, "bad_request", "set is not an RFC 3339 time") from None
                when = when if when.tzinfo else when.replace(tzinfo=UTC)
                offset_ns = round(when.timestamp() * 1_000_000) * 1_000 - real_ns
            case _:
                raise WrongRequestError(400, "bad_request", "one of offset_ns, advance_s, set is required")
        before_s = self._now_s()
        engine.shift(offset_ns)
        self.history.leapt(before_s, self._now_s())
        return _json(compact({"offset_ns": offset_ns, "now_ns": engine.clock()}))

    async def _sim_keys(self, request: web.Request) -> web.Response:
        told = await self._told(request)
        if self.keys is None:
            raise WrongRequestError(409, "no_auth", "this exchange asks for no keys")
        try:
            self.keys.register(str(told.get("key_id", "")), str(told.get("public_key_pem", "")).encode())
        except ConfigurationError as error:
            raise WrongRequestError(400, "bad_request", str(error)) from None
        return _json(b"{}")

    async def _sim_faults(self, request: web.Request) -> web.Response:
        return _json(compact({"faults": self.engine.faults.log}))

    async def _sim_inject(self, request: web.Request) -> web.Response:
        try:
            order = msgspec.json.decode(await request.read(), type=Order)
        except msgspec.DecodeError as error:
            raise WrongRequestError(400, "bad_request", str(error)) from None
        number = self.engine.faults.inject(order)
        if not number:
            raise WrongRequestError(409, "no_connection", "there is no such connection")
        return _json(compact({"number": number}))

    async def _sim_clear(self, request: web.Request) -> web.Response:
        self.engine.faults.clear()
        return _json(b"{}")

    async def _sim_cutoff(self, request: web.Request) -> web.Response:
        told = await self._told(request)
        days = told.get("days")
        if not isinstance(days, int | float) or days < 0:
            raise WrongRequestError(400, "bad_request", "days is how many of the last days the live lists hold")
        self.cutoff_days = float(days)
        return _json(compact({"cutoff": rfc3339(self._cutoff_s())}))

    async def _sim_limits(self, request: web.Request) -> web.Response:
        told = await self._told(request)
        rate = told.get("reads_per_second")
        if not isinstance(rate, int | float) or rate < 0:
            raise WrongRequestError(400, "bad_request", "reads_per_second is a number of requests, 0 for no limit")
        self.limit = ReadLimit(float(rate))
        return _json(compact({"reads_per_second": self.limit.per_second}))

    async def _sim_rate(self, request: web.Request) -> web.Response:
        told = await self._told(request)
        rate = told.get("rate")
        if not isinstance(rate, int | float) or rate < 0:
            raise WrongRequestError(400, "bad_request", "rate is a number of messages a second, 0 for full speed")
        self.engine.rate = float(rate)
        return _json(compact({"rate": self.engine.rate}))


def _past_place(cursor: Any) -> tuple[int, int] | None:
    """Return the place in the past that a cursor of a list of markets names, None where it names none."""
    match cursor:
        case [int(day), int(index)]:
            return day, index
        case _:
            return None


def _has_status(market: Market, status: str) -> bool:
    if status == "closed":
        return market.status in ("closed", "determined")
    return market.status == STATUS_OF_FILTER[status]


def _time_of(market: Market, family: str) -> int:
    if family == "created":
        return market.event.plan.created_s
    if family == "updated":
        return market.updated_s
    return market.close_s if family == "close" else market.settled_s or -1


def _book_json(market: Market, depth: int) -> bytes:
    sides = [
        [[dollars(price), contracts(levels[price])] for price in sorted(levels)[-depth:]] for levels in market.book()
    ]
    return compact({"yes_dollars": sides[0], "no_dollars": sides[1]})
