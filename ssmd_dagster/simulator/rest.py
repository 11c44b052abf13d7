"""The REST side of the simulated exchange, `/trade-api/v2`, and the control surface, `/sim`.

Shapes and rules follow Kalshi's OpenAPI file; answers to market lists may be a second old, as behind Kalshi's CDN.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import json
from collections.abc import Awaitable, Callable, Iterable
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
from ssmd_dagster.simulator.keys import KeyRing, RefusedSignatureError
from ssmd_dagster.simulator.tapes import contracts, dollars
from ssmd_dagster.simulator.world import STATUS_OF_FILTER, Event, Market, rfc3339

PREFIX = "/trade-api/v2"
_CUTOFF_AGE_S = 60 * 86_400
_CACHE_S = 1.0
_CACHE_BYTES = 64 << 20
_CACHED = ("/markets", "/events", "/events/multivariate", "/series")
_SIGNED = ("KALSHI-ACCESS-KEY", "KALSHI-ACCESS-SIGNATURE", "KALSHI-ACCESS-TIMESTAMP")
_HTTP_FAULTS = tuple(kind for kind in HTTP_KINDS if kind.startswith("http_"))
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


class Rest:
    """Serves one engine's world over HTTP."""

    def __init__(self, engine: Engine, keys: KeyRing | None, about: dict[str, Any]) -> None:
        self.engine = engine
        self.keys = keys
        self.about = about
        self.pages = 0
        self._cache: dict[str, tuple[float, bytes]] = {}
        self._cache_bytes = 0
        self._cache_world = -1, 0

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
        return app

    @web.middleware
    async def _guard(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        path = request.path
        if path.startswith(PREFIX):
            self.pages += 1
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
    async def _faulty(request: web.Request, order: Order) -> web.StreamResponse | None:
        """Answer as a fault wants it, or return None where the answer is only slow."""
        match order.fault:
            case "http_429":
                flat = {"error": "too many requests"}
                nested = {"error": {"code": "too_many_requests", "message": "too many requests"}}
                return web.json_response(flat if order.body == "flat" else nested, status=429)
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
        return _json(self._market_page(request, self._candidates(request), limit))

    def _candidates(self, request: web.Request) -> Iterable[Market]:
        """Markets that may match, newest first; the narrowest index there is."""
        world = self.engine.world
        below = self._position(request)
        if below is not None and not isinstance(below, int):
            raise WrongRequestError(400, "invalid_cursor", "invalid cursor")
        tickers = request.query.get("tickers")
        event = world.events.get(request.query.get("event_ticker", ""))
        found: Iterable[Market]
        if tickers:
            named = (world.markets.get(ticker) for ticker in dict.fromkeys(tickers.split(",")))
            found = sorted((market for market in named if market), key=lambda market: -market.index)
        elif event is not None:
            found = sorted(event.markets, key=lambda market: -market.index)
        else:
            found = world.newest_first(below)
        return (market for market in found if below is None or market.index < below)

    def _market_page(self, request: web.Request, candidates: Iterable[Market], limit: int) -> bytes:
        rows: list[bytes] = []
        cursor = ""
        last = 0
        for market in self._wanted(request, candidates):
            if len(rows) == limit:
                cursor = _cursor(last)
                break
            rows.append(market.row())
            last = market.index
        return b'{"markets":[%b],"cursor":"%b"}' % (b",".join(rows), cursor.encode())

    def _find(self, request: web.Request) -> Market:
        market = self.engine.world.markets.get(request.match_info["ticker"])
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
        position = self._position(request)
        if position is not None and not (isinstance(position, list) and len(position) == 2):
            raise WrongRequestError(400, "invalid_cursor", "invalid cursor")
        low, high = self._integer(request, "min_ts"), self._integer(request, "max_ts")
        cutoff_s = self._cutoff_s()
        if request.path == f"{PREFIX}/historical/trades":
            high = min(cutoff_s - 1, high if high is not None else cutoff_s)
        else:
            low = max(cutoff_s, low or 0)
        if request.query.get("is_block_trade") == "true":
            return _json(b'{"trades":[],"cursor":""}')
        rows, following = self.engine.trades.page(
            ticker=request.query.get("ticker") or None,
            min_us=None if low is None else low * 1_000_000,
            max_us=None if high is None else high * 1_000_000,
            limit=limit,
            cursor=None if position is None else (int(position[0]), int(position[1])),
        )
        cursor = _cursor(following) if following else ""
        return _json(b'{"trades":[%b],"cursor":"%b"}' % (b",".join(rows), cursor.encode()))

    async def _historical_markets(self, request: web.Request) -> web.Response:
        self._limit(request, 100, 1_000)
        return _json(b'{"markets":[],"cursor":""}')

    async def _historical_market(self, request: web.Request) -> web.Response:
        raise WrongRequestError(404, "not_found", "market not found")

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
        for event in self.engine.world.events_newest_first():
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

    async def _event(self, request: web.Request) -> web.Response:
        event = self.engine.world.events.get(request.match_info["ticker"])
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
        return (self._now_s() - _CUTOFF_AGE_S) // 86_400 * 86_400

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

    async def _sim_truth(self, request: web.Request) -> web.Response:
        return _json(compact({"directory": self.about["truth"], "frames": self.engine.truth.frames}))

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
        engine.shift(offset_ns)
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

    async def _sim_rate(self, request: web.Request) -> web.Response:
        told = await self._told(request)
        rate = told.get("rate")
        if not isinstance(rate, int | float) or rate < 0:
            raise WrongRequestError(400, "bad_request", "rate is a number of messages a second, 0 for full speed")
        self.engine.rate = float(rate)
        return _json(compact({"rate": self.engine.rate}))


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
