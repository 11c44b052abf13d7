"""What becomes of markets that the exchange does not take at once, and of a security master that cannot be read."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from ssmd_dagster.capture.follower import Follower
from ssmd_dagster.capture.gaps import GapLog
from ssmd_dagster.capture.listing import Listing
from ssmd_dagster.capture.subscriptions import Roster
from ssmd_dagster.errors import ConfigurationError, SsmdError, UnreachableError
from ssmd_dagster.exchange import (
    Connection,
    Exchange,
    Market,
    MarketLimitError,
    MarketNews,
    MarketSelection,
    Subscription,
    unlisted_market,
)
from ssmd_dagster.stores.connect import Stores
from ssmd_dagster_tests.capture.recordings import START_NS, Recording

S = 1_000_000_000


class Socket:
    """Takes what it is told to subscribe unless `refusal` is set."""

    def __init__(self) -> None:
        self.refusal: SsmdError | None = None

    async def subscribe(self, channels: Sequence[str], tickers: Sequence[str] | None) -> list[Subscription]:
        """Acknowledge."""
        return [Subscription(channel=channel, sid=1) for channel in channels]

    async def add_markets(self, sid: int, tickers: Sequence[str]) -> None:
        """Take them, or refuse."""
        if self.refusal is not None:
            raise self.refusal

    async def delete_markets(self, sid: int, tickers: Sequence[str]) -> None:
        """Let them go."""


class Bench:
    """A follower of one market, subscribed, and the gaps that it has told of."""

    def __init__(self, folder: Path) -> None:
        self.recording = Recording("812-a-0")
        self.clock = self.recording.clock
        self.roster = Roster(most=100)
        self.roster.take([unlisted_market("A")], START_NS)
        self.gaps = GapLog(folder, "connector-a")
        self.gaps.connection_up(START_NS)
        self.socket = Socket()
        exchange = SimpleNamespace(market_channels=frozenset({"trade"}), book_channels=frozenset())
        self.follower = Follower(
            cast("Connection", self.socket),
            self.recording.recorder,
            cast("Exchange", exchange),
            self.roster,
            self.gaps,
            self.clock,
            component="connector-a",
            channels=["trade"],
        )

    def told(self) -> list[tuple[str, Any, str]]:
        """Return the gap events so far: what, its markets, its id."""
        opened: dict[str, Any] = {}
        found = []
        for event, data in self.gaps._waiting:
            if event == "gap_opened":
                opened[data.gap_id] = data.scope["markets"]  # type: ignore[union-attr]  # it is a GapOpened
            found.append((str(event), opened[data.gap_id], data.gap_id))
        return found

    async def step(self) -> None:
        """Look at the roster a second later."""
        self.clock.now_ns += S
        await self.follower._step()


async def test_a_market_that_is_refused_again_and_again_is_one_gap_until_it_is_taken(tmp_path: Path) -> None:
    """Not one for every attempt, open to the connection's end."""
    bench = Bench(tmp_path)
    await bench.follower.begin()
    bench.clock.now_ns += S
    bench.roster.hear(MarketNews(ticker="B", event="listed", open_ns=1), bench.clock())
    bench.socket.refusal = UnreachableError("no answer")
    for _ in range(3):
        with pytest.raises(UnreachableError):
            await bench.step()
    bench.socket.refusal = None
    await bench.step()
    gap = "gap-812-a-0-sub-1"
    assert bench.told() == [("gap_opened", ["B"], gap), ("gap_closed", ["B"], gap)]


async def test_a_market_for_which_there_is_no_room_is_one_gap_until_it_has_settled(tmp_path: Path) -> None:
    """Each market that goes makes room for another attempt; only one that is not wanted any more lacks nothing."""
    bench = Bench(tmp_path)
    bench.roster.take([unlisted_market("C")], START_NS)
    await bench.follower.begin()
    bench.socket.refusal = MarketLimitError("full")
    bench.roster.hear(MarketNews(ticker="B", event="listed"), bench.clock())
    await bench.step()
    for ticker in ("C", "B"):
        bench.roster.hear(MarketNews(ticker=ticker, event="settled"), bench.clock())
        bench.clock.now_ns += 1_000 * S
        assert bench.roster.let_go(bench.clock()) == [ticker]
        await bench.step()
    gap = "gap-812-a-0-sub-1"
    assert bench.told() == [("gap_opened", ["B"], gap), ("gap_closed", ["B"], gap)]
    assert bench.follower.refused == 0


@pytest.mark.parametrize("error", [ConfigurationError("access refused"), SsmdError("unexpected answer")])
async def test_whatever_is_wrong_with_the_cache_the_exchange_has_the_list_too(error: SsmdError) -> None:
    """A Redis whose password was changed must not end the recording."""

    class Master:
        async def last_sync(self) -> str | None:
            raise error

    class Listed:
        async def listings(self, selection: MarketSelection) -> AsyncIterator[Market]:
            yield unlisted_market("A")

    stores = cast("Stores", SimpleNamespace(secmaster=Master()))
    roster = Roster(most=10)
    listing = Listing(cast("Exchange", Listed()), MarketSelection(), roster, lambda: START_NS, lambda: stores)
    await listing.first()
    assert "A" in roster
