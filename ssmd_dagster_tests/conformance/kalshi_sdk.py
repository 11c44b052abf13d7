"""The public SDK `kalshi-sdk` 22.4.0, unchanged, against a running simulator. Needs Python 3.12 or newer.

In an environment of its own: `python -m venv sdk && sdk/bin/pip install kalshi-sdk==22.4.0`, then
`sdk/bin/python ssmd_dagster_tests/conformance/kalshi_sdk.py READY.json`, where READY.json holds the line that
`ssmd sim` prints when it is ready. Prints what it did; ends with code 0 if all of it went as on Kalshi. This file imports
nothing of this project.
"""

from __future__ import annotations

import asyncio
import json
import sys
import urllib.request
from decimal import Decimal
from pathlib import Path
from typing import Any

from kalshi import AsyncKalshiClient, KalshiAuth, KalshiConfig
from kalshi.ws import KalshiWebSocket

DEADLINE_S = 20.0
SERIES = "KXBTCD"


def control(base: str, path: str, body: dict[str, Any] | None = None) -> Any:
    """Ask the simulator's own control surface."""
    data = None if body is None else json.dumps(body).encode()
    with urllib.request.urlopen(urllib.request.Request(base + path, data), timeout=DEADLINE_S) as answer:
        return json.loads(answer.read())


async def rest(client: AsyncKalshiClient) -> list[str]:
    """Sign in, ask for the status, and walk several pages of markets; return tickers of one series."""
    status = await client.exchange.status()
    assert status.exchange_active
    seen: list[str] = []
    async for market in client.markets.list_all(status="open", limit=20):
        seen.append(market.ticker)
    assert len(seen) == len(set(seen)) > 60, len(seen)
    page = await client.markets.list(series_ticker=SERIES, status="open", limit=6)
    tickers = [market.ticker for market in page]
    assert len(tickers) == 6
    book = await client.markets.orderbook(tickers[0])
    assert book.yes or book.no
    trades = await client.markets.list_trades(limit=50)
    assert trades.items
    print(f"REST: {len(seen)} markets over {len(seen) // 20 + 1} pages, {len(trades.items)} trades")
    return tickers


async def stream(config: KalshiConfig, auth: KalshiAuth, tickers: list[str], base: str) -> None:
    """Subscribe several markets and channels, add markets, and rebuild books that equal the exchange's."""
    socket = KalshiWebSocket(auth=auth, config=config)
    async with socket.connect() as session:
        trades = await session.subscribe_trade()
        prices = await session.subscribe_ticker(tickers=tickers)
        books = await session.subscribe_orderbook_delta(tickers=tickers[:3], maxsize=100_000)
        async with asyncio.timeout(DEADLINE_S):
            await anext(aiter(trades))
            await anext(aiter(prices))
            for _ in range(50):
                await anext(aiter(books))
        # The SDK has no public way to add markets while it reads; this is what its own subscribe does. It does not count
        # the answer's seq, so it takes the next message for a gap and subscribes again, with the list that it keeps.
        await session._pause_recv_loop()
        subscriptions = session._sub_mgr.active_subscriptions.values()
        mine = next(sub for sub in subscriptions if sub.channel == "orderbook_delta")
        mine.params["market_tickers"] = tickers
        await session._sub_mgr.update_subscription(mine.client_id, "add_markets", market_tickers=tickers[3:])
        session._ensure_recv_loop()
        async with asyncio.timeout(DEADLINE_S):
            for _ in range(100):
                await anext(aiter(books))
        control(base, "/sim/rate", {"rate": 0.0001})
        manager = session._orderbook_mgr
        assert manager is not None
        async with asyncio.timeout(DEADLINE_S):
            while not all(same(manager.get(ticker), control(base, f"/sim/book/{ticker}")) for ticker in tickers):
                await asyncio.sleep(0.1)
        print(f"WebSocket: {len(tickers)} books equal the exchange's, after adding {len(tickers) - 3} markets")


def same(book: Any, truth: dict[str, Any]) -> bool:
    """Compare the SDK's book with the exchange's, level by level."""
    if book is None:
        return False
    for levels, rows in ((book.yes, truth["yes_dollars"]), (book.no, truth["no_dollars"])):
        if [(level.price, level.quantity) for level in levels] != [(Decimal(p), Decimal(c)) for p, c in rows]:
            return False
    return True


async def main(ready: dict[str, str]) -> None:
    """Run everything."""
    home = Path(ready["home"])
    base = ready["rest_endpoint"].removesuffix("/trade-api/v2")
    config = KalshiConfig(base_url=ready["rest_endpoint"], ws_base_url=ready["endpoint"], allow_unknown_host=True)
    auth = KalshiAuth.from_key_path((home / "key_id").read_text(), str(home / "private_key.pem"))
    async with AsyncKalshiClient(auth=auth, config=config) as client:
        tickers = await rest(client)
    await stream(config, auth, tickers, base)


if __name__ == "__main__":
    asyncio.run(main(json.loads(Path(sys.argv[1]).read_text())))
