"""The REST side of the simulated exchange, `/trade-api/v2`: markets, events and what the exchange says of itself.

Shapes and rules follow Kalshi's OpenAPI file; answers to market lists may be a second old, as behind Kalshi's CDN.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterable, Iterator
from typing import Any

from aiohttp import web

from ssmd_dagster.simulator import catalog
from ssmd_dagster.simulator.answers import (
    PREFIX,
    WrongRequestError,
    cursor_of,
    error_response,
    integer,
    json_answer,
    page_limit,
    position,
    shortened,
)
from ssmd_dagster.simulator.catalog import SECOND_NS, Series
from ssmd_dagster.simulator.control import Control
from ssmd_dagster.simulator.engine import Engine
from ssmd_dagster.simulator.faults import HTTP_KINDS, Order
from ssmd_dagster.simulator.frames import compact
from ssmd_dagster.simulator.history import History, PastMarket
from ssmd_dagster.simulator.keys import KeyRing, RefusedSignatureError
from ssmd_dagster.simulator.limits import ReadLimit
from ssmd_dagster.simulator.tapes import contracts, dollars
from ssmd_dagster.simulator.trade_lists import TradeLists
from ssmd_dagster.simulator.world import STATUS_OF_FILTER, Event, Market, rfc3339

_DAY_S = 86_400
_CACHE_S = 1.0
_CACHE_BYTES = 64 << 20
_CACHED = ("/markets", "/events", "/events/multivariate", "/series")
_SIGNED = ("KALSHI-ACCESS-KEY", "KALSHI-ACCESS-SIGNATURE", "KALSHI-ACCESS-TIMESTAMP")
_HTTP_FAULTS = tuple(kind for kind in HTTP_KINDS if kind in ("http_429", "http_5xx", "http_slow", "http_cut"))
_TIME_FAMILIES = ("created", "updated", "close", "settled")

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


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
        self.trades = TradeLists(engine, history)

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
        Control(self).add_routes(app)
        return app

    @web.middleware
    async def _guard(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        path = request.path
        if path.startswith(PREFIX):
            self.pages += 1
            account = request.headers.get("KALSHI-ACCESS-KEY") or request.remote or ""
            if not self.limit.take(account, asyncio.get_running_loop().time()):
                return self._too_many("flat" if self.limit.refused % 2 else "nested")
            if self.engine.maintenance.at(self.now_s()) is not None and not path.endswith("/exchange/status"):
                return error_response(503, "unavailable", "the exchange is in maintenance")
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
            return json_answer(hit[1])
        response = await handler(request)
        assert isinstance(response, web.Response)
        assert isinstance(response.body, bytes)
        self._cache_bytes += len(response.body) - (len(hit[1]) if hit else 0)
        self._cache[key] = now_s, response.body
        return response

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
            low, high = integer(request, f"min_{families[0]}_ts"), integer(request, f"max_{families[0]}_ts")
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
        limit = page_limit(request, 100, 1_000)
        query = request.query
        if query.get("tickers") or query.get("event_ticker"):
            return json_answer(self._named_page(request, limit))
        rows: list[bytes] = []
        last: Any = None
        cursor = ""
        for row, place in self._listed(request):
            if len(rows) == limit:
                cursor = cursor_of(last)
                break
            rows.append(row)
            last = place
        rows = shortened(self.engine.faults, request, rows)
        return json_answer(b'{"markets":[%b],"cursor":"%b"}' % (b",".join(rows), cursor.encode()))

    def _named_page(self, request: web.Request, limit: int) -> bytes:
        """Return a page of the markets that a request names; settled ones are found until the cutoff passes over them."""
        world, after = self.engine.world, position(request) or 0
        if not isinstance(after, int):
            raise WrongRequestError(400, "invalid_cursor", "invalid cursor")
        if tickers := request.query.get("tickers"):
            named = [world.markets.get(ticker) for ticker in dict.fromkeys(tickers.split(","))]
        else:
            event = world.events.get(request.query["event_ticker"])
            named = list(event.markets) if event is not None else []
        listed = sorted((market for market in named if market), key=lambda market: -market.index)
        past = (past.market for past in self._past_named(request) if past.settled_s >= self.cutoff_s())
        listed += [market for market in past if market.ticker not in world.markets]
        wanted = list(self._wanted(request, listed))
        cursor = cursor_of(after + limit) if after + limit < len(wanted) else ""
        page = b",".join(market.row() for market in wanted[after : after + limit])
        return b'{"markets":[%b],"cursor":"%b"}' % (page, cursor.encode())

    def _listed(self, request: web.Request) -> Iterator[tuple[bytes, Any]]:
        """Yield rows of the live list and their places: what is listed now, then, where asked for, what was settled lately."""
        world, query, below = self.engine.world, request.query, position(request)
        past = _past_place(below)
        if past is None:
            if below is not None and not isinstance(below, int):
                raise WrongRequestError(400, "invalid_cursor", "invalid cursor")
            for market in self._wanted(request, world.newest_first(below)):
                yield market.row(), market.index
        # Without such a filter the list would be that of the last two months.
        if query.get("status") == "settled" or (query.get("series_ticker") and not query.get("status")):
            for found, place in self._past_listed(query.get("series_ticker"), past, self.cutoff_s(), self.now_s()):
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

    def find(self, request: web.Request) -> Market:
        """Return the market that a path names."""
        ticker = request.match_info["ticker"]
        market = self.engine.world.markets.get(ticker)
        if market is None and (past := self.history.market(ticker)) and past.settled_s >= self.cutoff_s():
            market = past.market
        if market is None:
            raise WrongRequestError(404, "not_found", "market not found")
        return market

    async def _market(self, request: web.Request) -> web.Response:
        return json_answer(b'{"market":%b}' % self.find(request).row())

    async def _orderbook(self, request: web.Request) -> web.Response:
        depth = integer(request, "depth") or 0
        if depth > 100:
            raise WrongRequestError(400, "bad_request", "depth must be at most 100")
        return json_answer(b'{"orderbook_fp":%b}' % _book_json(self.find(request), depth))

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
        return json_answer(b'{"orderbooks":[%b]}' % b",".join(books))

    async def _trades(self, request: web.Request) -> web.Response:
        return await self.trades.answer(request, self.cutoff_s())

    async def _historical_markets(self, request: web.Request) -> web.Response:
        limit = page_limit(request, 100, 1_000)
        query = request.query
        asked = [name for name in ("tickers", "event_ticker", "series_ticker", "mve_filter") if query.get(name)]
        if len(asked) > 1:
            raise WrongRequestError(400, "bad_request", "filters are mutually exclusive")
        if asked and asked[0] in ("tickers", "event_ticker"):
            past = [found for found in self._past_named(request) if found.settled_s < self.cutoff_s()]
            page = b",".join(found.market.row() for found in past[:limit])
            return json_answer(b'{"markets":[%b],"cursor":""}' % page)
        below = position(request)
        place = _past_place(below)
        if below is not None and place is None:
            raise WrongRequestError(400, "invalid_cursor", "invalid cursor")
        rows: list[bytes] = []
        for market, at in self._past_listed(query.get("series_ticker"), place, self.history.first_s, self.cutoff_s()):
            if not any(self._wanted(request, [market])):
                continue
            if len(rows) == limit:
                return json_answer(b'{"markets":[%b],"cursor":"%b"}' % (b",".join(rows), cursor_of(place).encode()))
            rows.append(market.row())
            place = at
        return json_answer(b'{"markets":[%b],"cursor":""}' % b",".join(rows))

    async def _historical_market(self, request: web.Request) -> web.Response:
        past = self.history.market(request.match_info["ticker"])
        if past is None or past.settled_s >= self.cutoff_s():
            raise WrongRequestError(404, "not_found", "market not found")
        return json_answer(b'{"market":%b}' % past.market.row())

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
        limit = page_limit(request, 100 if combos else 200, 200)
        status, series = query.get("status", ""), query.get("series_ticker")
        tickers = set(query["tickers"].split(",")) if query.get("tickers") else None
        min_close, min_updated = integer(request, "min_close_ts"), integer(request, "min_updated_ts")
        below = position(request)
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
                cursor = cursor_of(last)
                break
            rows.append(self._event_row(event, nested=nested))
            last = key
        return json_answer(b'{"events":[%b],"cursor":"%b"}' % (b",".join(rows), cursor.encode()))

    def _event_of(self, ticker: str) -> Event | None:
        event = self.engine.world.events.get(ticker)
        past = self.history.event(ticker) if event is None else None
        return past[0] if past is not None else event

    async def _event(self, request: web.Request) -> web.Response:
        event = self._event_of(request.match_info["ticker"])
        if event is None:
            raise WrongRequestError(404, "not_found", "event not found")
        if request.query.get("with_nested_markets") == "true":
            return json_answer(b'{"event":%b,"markets":[]}' % self._event_row(event, nested=True))
        markets = b"" if request.query.get("exclude_markets") == "true" else b",".join(m.row() for m in event.markets)
        return json_answer(b'{"event":%b,"markets":[%b]}' % (self._event_row(event, nested=False), markets))

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
        return json_answer(compact({"series": rows}))

    async def _series(self, request: web.Request) -> web.Response:
        ticker = request.match_info["ticker"]
        for series in self.engine.world.allotted:
            if series.ticker == ticker:
                row = self._series_row(series, volume=request.query.get("include_volume") == "true")
                return json_answer(compact({"series": row}))
        raise WrongRequestError(404, "not_found", "series not found")

    # -- the exchange ----------------------------------------------------------------------------------------------

    def now_s(self) -> int:
        """Return the exchange's time in whole seconds."""
        return self.engine.clock() // SECOND_NS

    def cutoff_s(self) -> int:
        """Return where the live lists end, in seconds since the epoch."""
        return int(self.now_s() - self.cutoff_days * _DAY_S) // _DAY_S * _DAY_S

    async def _status(self, request: web.Request) -> web.Response:
        resume_s = catalog.paused_until_s(self.now_s()) if self.engine.pauses else None
        maintenance = self.engine.maintenance.at(self.now_s())
        if maintenance is not None:
            resume_s = maintenance.to_s
        fields: dict[str, Any] = {
            "exchange_active": maintenance is None,
            "trading_active": resume_s is None,
            "intra_exchange_transfers_active": True,
            "exchange_estimated_resume_time": rfc3339(resume_s) if resume_s else None,
        }
        return web.Response(
            status=200 if maintenance is None else 503, body=compact(fields), content_type="application/json"
        )

    async def _schedule(self, request: web.Request) -> web.Response:
        whole = [{"open_time": "00:00", "close_time": "00:00"}]
        thursday = [{"open_time": "00:00", "close_time": "03:00"}, {"open_time": "05:00", "close_time": "00:00"}]
        days = ("monday", "tuesday", "wednesday", "thursday", "friday", "saturday", "sunday")
        week: dict[str, Any] = {day: thursday if day == "thursday" and self.engine.pauses else whole for day in days}
        week |= {"start_time": "2025-01-01T00:00:00Z", "end_time": "2030-01-01T00:00:00Z"}
        windows = self.engine.maintenance.announced()
        return json_answer(compact({"schedule": {"standard_hours": [week], "maintenance_windows": windows}}))

    async def _cutoff(self, request: web.Request) -> web.Response:
        at = rfc3339(self.cutoff_s())
        names = ("market_settled_ts", "trades_created_ts", "orders_updated_ts", "market_positions_last_updated_ts")
        return json_answer(compact(dict.fromkeys(names, at)))

    async def _user_data(self, request: web.Request) -> web.Response:
        return json_answer(compact({"as_of_time": rfc3339(self.now_s())}))


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
