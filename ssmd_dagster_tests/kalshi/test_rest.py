"""REST calls: paging over moving rows, refusals told apart from trouble, patience with an end."""

from __future__ import annotations

import asyncio
import base64
import itertools
from typing import Any

import pytest
from aiohttp import web
from cryptography.hazmat.primitives.asymmetric import ed25519

from ssmd_dagster.errors import ConfigurationError, ExitCode, NotFoundError, UnreachableError
from ssmd_dagster.exchange import Market, MarketSelection
from ssmd_dagster.kalshi.errors import ExchangeAnswerError, ExchangeRefusedError, RateLimitedError, read_rest_error
from ssmd_dagster.kalshi.markets import MarketsPage
from ssmd_dagster.kalshi.pacing import TokenBucket
from ssmd_dagster_tests.kalshi.fakes import (
    ED25519_KEY,
    NOW_NS,
    Handler,
    RestServer,
    Sleeps,
    in_turn,
    opened,
    pem,
    rest_server,
    settings,
)

STATUS = {"exchange_active": True, "trading_active": True}
NESTED_429 = {"error": {"code": "too_many_requests", "message": "too many requests"}}
FLAT_429 = {"error": "too many requests"}
DAY_NS = 86_400_000_000_000


def market(number: int, **changes: Any) -> dict[str, Any]:
    """Return a market's row as Kalshi has it, as far as is looked at, and a key that nobody knows."""
    return {
        "ticker": f"KXA-26-T{number}.5",
        "event_ticker": "KXA-26",
        "title": f"Market {number}",
        "status": "active",
        "open_time": "2026-09-01T00:00:00Z",
        "close_time": "2026-09-30T12:00:00.000001Z",
        "yes_bid_dollars": "0.5000",
        "volume_fp": "17.00",
        "rules_primary": "If …",
        "brand_new_key": {"a": [1]},
    } | changes


def paged(pages: list[list[dict[str, Any]]], name: str) -> Handler:
    """Serve `pages` behind opaque cursors."""

    async def handler(request: web.Request) -> web.StreamResponse:
        number = int(request.query.get("cursor", "page-0").removeprefix("page-"))
        cursor = f"page-{number + 1}" if number + 1 < len(pages) else ""
        return web.json_response({name: pages[number], "cursor": cursor})

    return handler


async def markets_of(server: RestServer, selection: MarketSelection) -> list[Market]:
    """Read the selected markets from `server`."""
    async with opened(settings(rest_endpoint=server.endpoint)) as exchange:
        return [one async for one in exchange.markets(selection)]


async def test_markets_of_a_series_come_once_although_rows_move_between_pages() -> None:
    """A ticker that shows up again on a later page is dropped, none is lost, and combos are not asked for."""
    async with rest_server() as server:
        server.routes["/series/KXA"] = {"series": {"ticker": "KXA", "category": "Crypto"}}
        pages = [[market(1), market(2)], [market(2), market(3)], [market(3)], [market(4)]]
        server.routes["/markets"] = paged(pages, "markets")
        found = await markets_of(server, MarketSelection(series=("KXA",)))
        assert [one.ticker for one in found] == [f"KXA-26-T{number}.5" for number in (1, 2, 3, 4)]
        queries = [dict(one.query) for one in server.requests if one.path.endswith("/markets")]
        assert all(one["mve_filter"] == "exclude" and one["status"] == "open" for one in queries)
        assert all(one["series_ticker"] == "KXA" and one["limit"] == "1000" for one in queries)
        first = found[0]
        assert (first.series_ticker, first.category, first.event_ticker) == ("KXA", "Crypto", "KXA-26")
        assert first.close_ns == 1_790_769_600_000_001_000
        assert first.detail["brand_new_key"] == {"a": [1]}
        assert "yes_bid_dollars" not in first.detail
        assert "volume_fp" not in first.detail


async def test_series_and_category_come_from_the_event_never_from_the_ticker() -> None:
    """Named tickers are looked up whatever their status; their events name the series."""
    async with rest_server() as server:
        server.routes["/markets"] = {"markets": [market(1, status="finalized")], "cursor": None}
        event = {"event_ticker": "KXA-26", "series_ticker": "KXUNLIKELY", "category": "old"}
        server.routes["/events"] = {"events": [event], "cursor": ""}
        server.routes["/series/KXUNLIKELY"] = {"series": {"ticker": "KXUNLIKELY", "category": "Weather"}}
        (found,) = await markets_of(server, MarketSelection(tickers=("KXA-26-T1.5", "KXA-26-T1.5")))
        assert (found.series_ticker, found.category, found.status) == ("KXUNLIKELY", "Weather", "finalized")
        assert server.requests[0].query["tickers"] == "KXA-26-T1.5"
        assert "status" not in server.requests[0].query


async def test_all_markets_read_the_series_and_events_first() -> None:
    """One list of series, the events page by page; an event that is listed meanwhile is asked for by itself."""
    async with rest_server() as server:
        server.routes["/series"] = {"series": [{"ticker": "KXA", "category": "Crypto", "tags": None}]}
        server.routes["/events"] = {"events": [{"event_ticker": "KXA-26", "series_ticker": "KXA"}], "cursor": ""}
        server.routes["/events/KXA-27"] = {"event": {"event_ticker": "KXA-27", "series_ticker": "KXA"}}
        rows = [market(1), market(2, event_ticker="KXA-27"), market(3, event_ticker="KXA-28")]
        server.routes["/markets"] = {"markets": rows, "cursor": ""}
        found = await markets_of(server, MarketSelection())
        assert [(one.series_ticker, one.category) for one in found] == [("KXA", "Crypto")] * 2 + [("", "")]


async def test_markets_yet_to_open_come_only_where_asked_for() -> None:
    """Open and unopened are two questions, and a market that opens between them comes once."""
    async with rest_server() as server:
        server.routes["/series/KXA"] = {"series": {"ticker": "KXA", "category": "Crypto"}}

        async def by_status(request: web.Request) -> web.StreamResponse:
            rows = {"open": [market(1)], "unopened": [market(1), market(2, status="initialized")]}
            return web.json_response({"markets": rows[request.query["status"]], "cursor": ""})

        server.routes["/markets"] = by_status
        assert len(await markets_of(server, MarketSelection(series=("KXA",)))) == 1
        found = await markets_of(server, MarketSelection(series=("KXA",), include_unopened=True))
        assert [one.status for one in found] == ["active", "initialized"]


async def test_no_more_markets_than_wanted_and_combos_only_where_asked_for() -> None:
    """`max_markets` stops the paging; `include_multivariate` drops the filter."""
    async with rest_server() as server:
        server.routes["/series/KXA"] = {"series": {"ticker": "KXA", "category": "Crypto"}}
        server.routes["/markets"] = paged([[market(1), market(2)], [market(3)]], "markets")
        selection = MarketSelection(series=("KXA",), max_markets=2, include_multivariate=True)
        assert len(await markets_of(server, selection)) == 2
        asked = [one for one in server.requests if one.path.endswith("/markets")]
        assert len(asked) == 1
        assert "mve_filter" not in asked[0].query


async def test_an_unknown_series_is_not_found() -> None:
    """A misspelt series in the environment's YAML does not pass for one without markets."""
    async with rest_server() as server:
        with pytest.raises(NotFoundError, match="KXNONE"):
            await markets_of(server, MarketSelection(series=("KXNONE",)))


async def test_a_cursor_that_repeats_is_an_error_not_a_loop() -> None:
    """The list says again where it has been."""
    async with rest_server() as server:
        server.routes["/series/KXA"] = {"series": {"ticker": "KXA"}}
        server.routes["/markets"] = {"markets": [market(1)], "cursor": "again"}
        with pytest.raises(ExchangeAnswerError, match="repeats a cursor"):
            await markets_of(server, MarketSelection(series=("KXA",)))
        assert len(server.requests) == 3


async def test_pages_that_never_end_are_an_error() -> None:
    """Ever new cursors stop at the bound."""
    numbers = itertools.count()

    async def endless(_: web.Request) -> web.StreamResponse:
        return web.json_response({"markets": [], "cursor": str(next(numbers))})

    async with rest_server() as server, opened(settings(rest_endpoint=server.endpoint)) as exchange:
        server.routes["/markets"] = endless
        with pytest.raises(ExchangeAnswerError, match="more than 3 pages"):
            async for _ in exchange.rest.pages("/markets", [], limit=1, max_pages=3, page=MarketsPage):
                pass


@pytest.mark.parametrize("body", [NESTED_429, FLAT_429])
async def test_429_of_either_body_is_waited_out(body: dict[str, Any]) -> None:
    """The pauses grow, are jittered between half and whole, and end with the answer."""
    sleeps = Sleeps()
    async with rest_server() as server, opened(settings(rest_endpoint=server.endpoint), sleeps) as exchange:
        server.routes["/exchange/status"] = in_turn((429, body), (429, body), (429, body), (200, STATUS))
        assert (await exchange.status()).trading_active
    pauses = [one for one in sleeps.seconds if one > 0.01]
    assert len(pauses) == 3
    assert all(0.5 * whole <= pause <= whole for pause, whole in zip(pauses, (0.25, 0.5, 1.0), strict=True))


async def test_429_to_the_end_is_a_rate_limit_error_with_the_exchanges_words() -> None:
    """It stays an `UnreachableError` (exit 7) that names the URL."""
    async with rest_server() as server, opened(settings(rest_endpoint=server.endpoint)) as exchange:
        server.routes["/exchange/status"] = in_turn((429, NESTED_429))
        with pytest.raises(RateLimitedError, match="too_many_requests") as caught:
            await exchange.status()
        assert caught.value.exit_code == ExitCode.UNREACHABLE
        assert f"{server.endpoint}/exchange/status" in str(caught.value)
        assert len(server.requests) == 10


@pytest.mark.parametrize("status", [401, 403])
async def test_refused_credentials_are_not_tried_again(status: int) -> None:
    """One request, exit 8, and where to look."""
    config = settings(key_id="id", private_key_pem=pem(ED25519_KEY))
    async with rest_server() as server:
        server.routes["/exchange/status"] = in_turn(
            (status, {"code": "token_authentication_failure", "message": "token authentication failure"})
        )
        changed = settings(rest_endpoint=server.endpoint, key_id="id", private_key_pem=config.private_key_pem)
        async with opened(changed) as exchange:
            with pytest.raises(ConfigurationError, match="token_authentication_failure") as caught:
                await exchange.status()
        assert "KALSHI_API_KEY" in str(caught.value)
        assert len(server.requests) == 1


async def test_requests_are_signed_where_there_is_a_key() -> None:
    """The signature covers the path with the endpoint's prefix and without the query."""
    config = {"key_id": "id-9", "private_key_pem": pem(ED25519_KEY)}
    async with rest_server() as server:
        server.routes["/markets/trades"] = {"trades": [], "cursor": ""}
        async with opened(settings(rest_endpoint=server.endpoint, **config)) as exchange:
            assert [one async for one in exchange.trades(NOW_NS - DAY_NS, NOW_NS)] == []
        headers = server.requests[0].headers
        signature = base64.b64decode(headers["KALSHI-ACCESS-SIGNATURE"])
        public: ed25519.Ed25519PublicKey = ED25519_KEY.public_key()
        public.verify(signature, f"{NOW_NS // 1_000_000}GET/trade-api/v2/markets/trades".encode())
        assert headers["KALSHI-ACCESS-KEY"] == "id-9"


async def test_5xx_is_tried_again_and_then_unreachable() -> None:
    """Five attempts, then exit 7 with the URL and what was last said."""
    async with rest_server() as server, opened(settings(rest_endpoint=server.endpoint)) as exchange:
        server.routes["/series"] = in_turn((502, "<html>bad gateway</html>"))
        with pytest.raises(UnreachableError, match="bad gateway") as caught:
            [one async for one in exchange.markets(MarketSelection())]
        assert caught.value.transient
        assert len(server.requests) == 5


async def test_nobody_listening_is_unreachable_and_names_the_address() -> None:
    """A refused connection is tried again some times, then exit 7."""
    async with opened(settings()) as exchange:
        with pytest.raises(UnreachableError, match=r"http://127\.0\.0\.1:1/trade-api/v2/exchange/status"):
            await exchange.status()


async def test_a_server_that_is_silent_meets_the_deadline() -> None:
    """Every call ends, whatever the exchange does."""
    release = asyncio.Event()

    async def silent(_: web.Request) -> web.StreamResponse:
        await release.wait()
        return web.json_response(STATUS)

    async with rest_server() as server, opened(settings(rest_endpoint=server.endpoint)) as exchange:
        server.routes["/exchange/status"] = silent
        exchange.rest._call_timeout_s = 0.2
        with pytest.raises(UnreachableError, match=r"within 0\.2 s"):
            await exchange.status()
        release.set()


@pytest.mark.parametrize("body", ["", "{", "[]", '{"exchange_active": "maybe"}'])
async def test_an_answer_that_is_no_answer_is_named(body: str) -> None:
    """Broken JSON and wrong shapes are errors of the exchange, not crashes of ours."""
    async with rest_server() as server, opened(settings(rest_endpoint=server.endpoint)) as exchange:
        server.routes["/exchange/status"] = in_turn((200, body))
        with pytest.raises(ExchangeAnswerError, match="exchange/status"):
            await exchange.status()


@pytest.mark.parametrize(
    ("resume", "resume_ns"), [("2026-09-24T09:00:00Z", 1_790_240_400_000_000_000), (None, None), ("soon", None)]
)
async def test_the_status_in_maintenance_is_an_answer(resume: str | None, resume_ns: int | None) -> None:
    """Kalshi sends it with 503; the resume time is the exchange's own estimate, and what it says there is no error."""
    body = {"exchange_active": False, "trading_active": False, "exchange_estimated_resume_time": resume}
    async with rest_server() as server, opened(settings(rest_endpoint=server.endpoint)) as exchange:
        server.routes["/exchange/status"] = in_turn((503, body))
        status = await exchange.status()
        assert (status.exchange_active, status.trading_active) == (False, False)
        assert status.resume_ns == resume_ns


async def test_a_refusal_keeps_the_exchanges_code_and_words() -> None:
    """400 is not tried again: the request is wrong, and stays so."""
    body = {"error": {"code": "bad_request", "message": "bad request", "details": "invalid status filter"}}
    async with rest_server() as server, opened(settings(rest_endpoint=server.endpoint)) as exchange:
        server.routes["/exchange/status"] = in_turn((400, body))
        with pytest.raises(ExchangeRefusedError, match="invalid status filter") as caught:
            await exchange.status()
        assert caught.value.code == "bad_request"
        assert len(server.requests) == 1


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        (
            b'{"error":{"code":"too_many_requests","message":"too many requests"}}',
            "too_many_requests: too many requests",
        ),
        (b'{"error":"too many requests"}', "429: too many requests"),
        (b'{"code":"x","message":"y","details":"z"}', "x: y (z)"),
        (b"<html>", "429: <html>"),
        (b"", "429"),
        (b"[1]", "429: [1]"),
        (b'{"error":[1]}', '429: {"error":[1]}'),
        (b"\xff", "429: \ufffd"),
    ],
)
def test_error_bodies_of_every_shape_are_read(body: bytes, expected: str) -> None:
    """Nested, flat, a bare word, or no JSON at all."""
    assert str(read_rest_error(429, body)) == expected


@pytest.mark.parametrize("endpoint", ["", "ftp://host/x", "http://", "http://[::1", "127.0.0.1:80/x"])
async def test_a_bad_rest_endpoint_is_a_configuration_error(endpoint: str) -> None:
    """It is named with its key, before anything is asked."""
    with pytest.raises(ConfigurationError, match="rest_endpoint"):
        async with opened(settings(rest_endpoint=endpoint)):
            pass


async def test_the_bucket_lets_a_second_s_worth_pass_and_then_paces() -> None:
    """Twenty at once, then one every fiftieth of a second, in order."""
    now_s = 100.0
    slept: list[float] = []

    async def sleep(seconds: float) -> None:
        slept.append(seconds)

    bucket = TokenBucket(20, lambda: now_s, sleep)
    for _ in range(20):
        await bucket.take()
    assert slept == []
    for _ in range(3):
        await bucket.take()
    assert slept == pytest.approx([0.05, 0.10, 0.15])
    now_s += 60
    for _ in range(20):
        await bucket.take()
    assert len(slept) == 3


async def test_a_refusal_slows_the_bucket_for_a_while() -> None:
    """Who shares a key with another process takes less for a while; calls refused together count once."""
    now_s = 100.0

    async def sleep(seconds: float) -> None:
        nonlocal now_s
        now_s += seconds

    async def pace(calls: int) -> float:
        before_s = now_s
        for _ in range(calls):
            await bucket.take()
        return calls / (now_s - before_s)

    bucket = TokenBucket(20, lambda: now_s, sleep)
    for _ in range(20):
        await bucket.take()
    assert await pace(20) == pytest.approx(20)
    for _ in range(12):
        bucket.refused()
    assert 13 <= await pace(10) <= 15
    for _ in range(5):
        now_s += 1.0
        bucket.refused()
    assert await pace(3) < 5
    now_s += 60.0
    await pace(25)
    assert await pace(20) == pytest.approx(20)
