"""What becomes of subscriptions that the exchange refuses or ends, and of a security master that cannot be read."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Sequence
from itertools import count
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
    SubscriptionLost,
    unlisted_market,
)
from ssmd_dagster.stores.connect import Stores
from ssmd_dagster_tests.capture.recordings import START_NS, Recording

S = 1_000_000_000


class Socket:
    """Takes what it is told, each subscription under a sid of its own, unless `refused` has the command and its sid or channel.

    `on_command` is called before a command is answered.
    """

    def __init__(self) -> None:
        self.refused: dict[tuple[str, int | str], SsmdError] = {}
        self.commands: list[tuple[str, int | str, int]] = []
        self.on_command: Callable[[str, int], None] = lambda _command, _sid: None
        self._sids = count(1)

    def _take(self, command: str, about: int | str, tickers: Sequence[str] | None) -> None:
        self.commands.append((command, about, len(tickers or ())))
        if (refusal := self.refused.get((command, about))) is not None:
            raise refusal

    async def subscribe(self, channels: Sequence[str], tickers: Sequence[str] | None) -> list[Subscription]:
        """Acknowledge."""
        (channel,) = channels
        self._take("subscribe", channel, tickers)
        sid = next(self._sids)
        self.on_command("subscribe", sid)
        return [Subscription(channel=channel, sid=sid)]

    async def add_markets(self, sid: int, tickers: Sequence[str]) -> None:
        """Take them, or refuse."""
        self._take("add", sid, tickers)
        self.on_command("add", sid)

    async def delete_markets(self, sid: int, tickers: Sequence[str]) -> None:
        """Let them go, or not."""
        self._take("delete", sid, tickers)
        self.on_command("delete", sid)


class Bench:
    """A follower of some markets, and the gaps that it has told of."""

    def __init__(self, folder: Path, *tickers: str, channels: Sequence[str] = ("trade",)) -> None:
        self.recording = Recording("812-a-0")
        self.clock = self.recording.clock
        self.roster = Roster(most=10_000)
        self.roster.take([unlisted_market(ticker) for ticker in tickers or ("A",)], START_NS)
        self.gaps = GapLog(folder, "connector-a")
        self.gaps.connection_up(START_NS)
        self.socket = Socket()
        exchange = SimpleNamespace(market_channels=frozenset({"trade", "ticker"}), book_channels=frozenset())
        self.follower = Follower(
            cast("Connection", self.socket),
            self.recording.recorder,
            cast("Exchange", exchange),
            self.roster,
            self.gaps,
            self.clock,
            component="connector-a",
            channels=channels,
        )

    def lose(self, sid: int, *, forgotten: bool = False) -> None:
        """Say that the exchange has ended a subscription."""
        lost = SubscriptionLost(sid=sid, reason="25 overflow", forgotten=forgotten)
        self.follower.subscription_lost(self.clock(), lost)
        self.follower._again_at.clear()

    def listed(self, ticker: str) -> None:
        """Say that the exchange has a new market, which trades already."""
        self.roster.hear(MarketNews(ticker=ticker, event="listed", open_ns=1), self.clock())

    def settle(self, ticker: str) -> None:
        """Say that a market has settled long ago."""
        self.roster.hear(MarketNews(ticker=ticker, event="settled"), self.clock())
        self.clock.now_ns += 1_000 * S
        self.roster.let_go(self.clock())

    def told(self) -> list[tuple[str, Any, str]]:
        """Return the gap events so far: what, its markets, its id."""
        opened: dict[str, Any] = {}
        found = []
        for event, data in self.gaps._waiting:
            if event == "gap_opened":
                scope = data.scope  # type: ignore[union-attr]  # it is a GapOpened
                opened[data.gap_id] = scope.get("markets", scope.get("channel"))
            found.append((str(event), opened[data.gap_id], data.gap_id))
        return found

    async def step(self) -> None:
        """Look at the roster later, after every pause."""
        self.clock.now_ns += S
        self.follower._again_at.clear()
        await self.follower._step()


async def test_a_market_that_is_refused_again_and_again_is_one_gap_until_it_is_taken(tmp_path: Path) -> None:
    """Not one for every attempt, open to the connection's end."""
    bench = Bench(tmp_path)
    await bench.follower.begin()
    bench.clock.now_ns += S
    bench.roster.hear(MarketNews(ticker="B", event="listed", open_ns=1), bench.clock())
    bench.socket.refused["add", 1] = UnreachableError("no answer")
    for _ in range(3):
        with pytest.raises(UnreachableError):
            await bench.step()
    bench.socket.refused.clear()
    await bench.step()
    gap = "gap-812-a-0-sub-1"
    assert bench.told() == [("gap_opened", ["B"], gap), ("gap_closed", ["B"], gap)]


async def test_a_market_for_which_there_is_no_room_is_one_gap_until_it_has_settled(tmp_path: Path) -> None:
    """Each market that goes makes room for another attempt; only one that is not wanted any more lacks nothing."""
    bench = Bench(tmp_path)
    bench.roster.take([unlisted_market("C")], START_NS)
    await bench.follower.begin()
    bench.socket.refused["add", 1] = MarketLimitError("full")
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


@pytest.mark.parametrize(
    ("refused", "error"),
    [
        (("delete", 1), UnreachableError("no answer")),
        (("subscribe", "trade"), MarketLimitError("full")),
        (("add", 1), UnreachableError("no answer")),
    ],
    ids=["delete", "subscribe", "add"],
)
async def test_whatever_fails_keeps_new_markets_from_no_other_channel(
    tmp_path: Path, refused: tuple[str, int | str], error: SsmdError
) -> None:
    """And that they are missed is known before anything is asked of the exchange."""
    bench = Bench(tmp_path, "A", "B", channels=("trade", "ticker"))
    await bench.follower.begin()
    if refused[0] == "subscribe":
        bench.lose(1)
    bench.settle("B")
    bench.listed("NEW")
    bench.socket.refused[refused] = error
    for _ in range(2):
        with pytest.raises(type(error)):
            await bench.step()
    assert ("add", 2, 1) in bench.socket.commands
    assert ("gap_opened", ["NEW"]) in [(event, about) for event, about, _ in bench.told()]
    assert ("gap_closed" in [event for event, about, _ in bench.told() if about == ["NEW"]]) == (refused[0] != "add")
    bench.socket.refused.clear()
    await bench.step()
    assert bench.follower.markets == 2
    assert bench.gaps._opened == {}


async def test_the_end_of_a_subscription_may_come_with_its_acknowledgement(tmp_path: Path) -> None:
    """In one reading of the socket, before whoever subscribes knows the sid."""
    bench = Bench(tmp_path, channels=("trade", "lifecycle"))
    bench.socket.on_command = lambda _command, sid: bench.lose(sid) if sid in (1, 2) else None
    await bench.follower.begin()
    assert bench.follower.sids == {}
    assert [about for event, about, _ in bench.told() if event == "gap_opened"] == ["lifecycle", "trade"]
    await bench.step()
    assert bench.follower.sids == {"trade": 3, "lifecycle": 4}
    assert bench.gaps._opened == {}
    bench.lose(99)
    await bench.step()
    assert bench.follower.sids == {"trade": 3, "lifecycle": 4}


async def test_a_subscription_is_made_anew_until_all_of_it_is_there(tmp_path: Path) -> None:
    """Its later batches are asked for again where they fail; ended once more in between, it begins again in the same gap."""
    bench = Bench(tmp_path, *(f"T{number}" for number in range(2_500)))
    await bench.follower.begin()
    bench.lose(1)
    bench.socket.refused["add", 2] = UnreachableError("no answer")
    with pytest.raises(UnreachableError):
        await bench.step()
    assert list(bench.gaps._opened) == ["gap-812-a-0-sub-1"]
    bench.socket.refused.clear()
    bench.socket.on_command = lambda command, sid: bench.lose(sid) if (command, sid) == ("add", 2) else None
    await bench.step()
    assert list(bench.gaps._opened) == ["gap-812-a-0-sub-1"]
    bench.socket.commands.clear()
    await bench.step()
    assert bench.socket.commands == [("subscribe", "trade", 1_000), ("add", 3, 1_000), ("add", 3, 500)]
    assert bench.gaps._opened == {}


async def test_what_keeps_failing_is_asked_for_after_pauses(tmp_path: Path) -> None:
    """Also a subscription that was taken, and of which a later batch is refused."""
    bench = Bench(tmp_path, *(f"T{number}" for number in range(1_500)))
    await bench.follower.begin()
    bench.lose(1)
    bench.socket.refused["add", 2] = MarketLimitError("full")
    for _ in range(2):  # at once, and then not before half a second
        with pytest.raises(MarketLimitError):
            await bench.follower._step()
    bench.socket.commands.clear()
    await bench.follower._step()
    assert bench.socket.commands == []


async def test_a_market_that_comes_up_while_another_is_waited_for_is_a_gap_too(tmp_path: Path) -> None:
    """It was not there when the step began, and is subscribed late at its end."""
    bench = Bench(tmp_path, "A", "B")
    await bench.follower.begin()
    bench.settle("B")

    def slow(command: str, _sid: int) -> None:
        if command == "delete":
            bench.listed("NEW")
            bench.clock.now_ns += 30 * S

    bench.socket.on_command = slow
    await bench.step()
    assert [(event, about) for event, about, _ in bench.told()] == [("gap_opened", ["NEW"]), ("gap_closed", ["NEW"])]


async def test_what_the_exchange_has_forgotten_is_missed_since_its_last_frame(tmp_path: Path) -> None:
    """Nobody knows when it forgot it: it says so only when it is asked for something."""
    bench = Bench(tmp_path)
    await bench.follower.begin()
    bench.recording.frame("trade", seq=1)
    heard_ns = bench.clock.now_ns
    bench.clock.now_ns += 60 * S
    bench.lose(1, forgotten=True)
    (gap,) = bench.gaps._opened.values()
    assert gap.from_ns == heard_ns


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
