"""The control surface of the simulated exchange, `/sim`: what it did, what it shall break, and what time it is.

No exchange has it; tests and operators ask it over HTTP. Not for what Kalshi itself answers: that is in `rest`.
"""

from __future__ import annotations

from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import msgspec
from aiohttp import web

from ssmd_dagster.errors import ConfigurationError
from ssmd_dagster.simulator.answers import WrongRequestError, json_answer
from ssmd_dagster.simulator.catalog import DAY_S, SECOND_NS
from ssmd_dagster.simulator.faults import Order
from ssmd_dagster.simulator.frames import compact
from ssmd_dagster.simulator.limits import ReadLimit
from ssmd_dagster.simulator.maintenance import MaintenanceOrder
from ssmd_dagster.simulator.tapes import contracts, dollars
from ssmd_dagster.simulator.world import rfc3339

if TYPE_CHECKING:
    from ssmd_dagster.simulator.rest import Rest


class Control:
    """Serves the control surface of one exchange."""

    def __init__(self, rest: Rest) -> None:
        self._rest = rest

    def add_routes(self, app: web.Application) -> None:
        """Add the routes below `/sim`."""
        app.router.add_get("/sim/status", self._status)
        app.router.add_get("/sim/book/{ticker}", self._book)
        app.router.add_get("/sim/truth", self._truth)
        app.router.add_get("/sim/faults", self._faults)
        app.router.add_post("/sim/faults", self._inject)
        app.router.add_delete("/sim/faults", self._clear)
        app.router.add_post("/sim/clock", self._clock)
        app.router.add_post("/sim/keys", self._keys)
        app.router.add_post("/sim/rate", self._rate)
        app.router.add_post("/sim/cutoff", self._cutoff)
        app.router.add_post("/sim/limits", self._limits)
        app.router.add_post("/sim/maintenance", self._maintenance)

    async def _status(self, request: web.Request) -> web.Response:
        engine = self._rest.engine
        return json_answer(
            compact(
                {
                    **self._rest.about,
                    "offset_ns": engine.clock.offset_ns,
                    "now_ns": engine.clock(),
                    "rate": engine.rate,
                    "messages": engine.messages,
                    "trades": len(engine.trades),
                    "frames": engine.truth.frames,
                    "rest_requests": self._rest.pages,
                    "rest_refused": self._rest.limit.refused,
                    "cutoff": rfc3339(self._rest.cutoff_s()),
                    "history": {"trades_per_day": self._rest.history.trades_per_day, "spans": self._rest.history.spans},
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

    async def _book(self, request: web.Request) -> web.Response:
        market = self._rest.find(request)
        yes, no = market.book()
        book = {
            "market_ticker": market.ticker,
            "status": market.status,
            "clock": market.clock,
            "yes_dollars": [[dollars(price), contracts(yes[price])] for price in sorted(yes)],
            "no_dollars": [[dollars(price), contracts(no[price])] for price in sorted(no)],
        }
        return json_answer(compact(book))

    async def _truth(self, request: web.Request) -> web.StreamResponse:
        """Say where the log lies, or, with `date` (UTC) or `from` and `to` in seconds, list every trade of that time."""
        query = request.query
        if query.get("date") or query.get("from"):
            try:
                if on := query.get("date"):
                    start_s = int(datetime.fromisoformat(f"{on}T00:00:00+00:00").timestamp())
                    end_s = start_s + DAY_S
                else:
                    start_s, end_s = int(query["from"]), int(query["to"])
            except (ValueError, KeyError):
                raise WrongRequestError(400, "bad_request", "date is YYYY-MM-DD, from and to are seconds") from None
            return await self._true_trades(request, start_s * 1_000_000, end_s * 1_000_000 - 1)
        return json_answer(compact({"directory": self._rest.about["truth"], "frames": self._rest.engine.truth.frames}))

    async def _true_trades(self, request: web.Request, low: int, high: int) -> web.StreamResponse:
        """Send the rows of all trades, newest first, one a line."""
        response = web.StreamResponse(headers={"Content-Type": "application/x-ndjson"})
        await response.prepare(request)
        below: tuple[tuple[int, int] | None, tuple[int, int] | None] = None, None
        while True:
            rows, following = self._rest.trades.tape(low, high, None, None, below, 10_000)
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

    async def _clock(self, request: web.Request) -> web.Response:
        told = await self._told(request)
        engine = self._rest.engine
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
        before_s = self._rest.now_s()
        engine.shift(offset_ns)
        self._rest.history.leapt(before_s, self._rest.now_s())
        return json_answer(compact({"offset_ns": offset_ns, "now_ns": engine.clock()}))

    async def _keys(self, request: web.Request) -> web.Response:
        told = await self._told(request)
        if self._rest.keys is None:
            raise WrongRequestError(409, "no_auth", "this exchange asks for no keys")
        try:
            self._rest.keys.register(str(told.get("key_id", "")), str(told.get("public_key_pem", "")).encode())
        except ConfigurationError as error:
            raise WrongRequestError(400, "bad_request", str(error)) from None
        return json_answer(b"{}")

    async def _faults(self, request: web.Request) -> web.Response:
        return json_answer(compact({"faults": self._rest.engine.faults.log}))

    async def _inject(self, request: web.Request) -> web.Response:
        try:
            order = msgspec.json.decode(await request.read(), type=Order)
        except msgspec.DecodeError as error:
            raise WrongRequestError(400, "bad_request", str(error)) from None
        number = self._rest.engine.faults.inject(order)
        if not number:
            raise WrongRequestError(409, "no_connection", "there is no such connection")
        return json_answer(compact({"number": number}))

    async def _clear(self, request: web.Request) -> web.Response:
        self._rest.engine.faults.clear()
        return json_answer(b"{}")

    async def _cutoff(self, request: web.Request) -> web.Response:
        told = await self._told(request)
        days = told.get("days")
        if not isinstance(days, int | float) or days < 0:
            raise WrongRequestError(400, "bad_request", "days is how many of the last days the live lists hold")
        self._rest.cutoff_days = float(days)
        return json_answer(compact({"cutoff": rfc3339(self._rest.cutoff_s())}))

    async def _limits(self, request: web.Request) -> web.Response:
        told = await self._told(request)
        rate = told.get("reads_per_second")
        if not isinstance(rate, int | float) or rate < 0:
            raise WrongRequestError(400, "bad_request", "reads_per_second is a number of requests, 0 for no limit")
        self._rest.limit = ReadLimit(float(rate))
        return json_answer(compact({"reads_per_second": self._rest.limit.per_second}))

    async def _maintenance(self, request: web.Request) -> web.Response:
        try:
            order = msgspec.json.decode(await request.read(), type=MaintenanceOrder)
        except msgspec.DecodeError as error:
            raise WrongRequestError(400, "bad_request", str(error)) from None
        window = self._rest.engine.maintenance.order(order, self._rest.now_s())
        self._rest.engine.truth.note("maintenance", self._rest.engine.clock(), **msgspec.structs.asdict(window))
        return json_answer(compact(msgspec.structs.asdict(window)))

    async def _rate(self, request: web.Request) -> web.Response:
        told = await self._told(request)
        rate = told.get("rate")
        if not isinstance(rate, int | float) or rate < 0:
            raise WrongRequestError(400, "bad_request", "rate is a number of messages a second, 0 for full speed")
        self._rest.engine.rate = float(rate)
        return json_answer(compact({"rate": self._rest.engine.rate}))
