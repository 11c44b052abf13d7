"""Which markets are recorded: from their listing until some time after they settled, never more than may be."""

from __future__ import annotations

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ssmd_dagster.capture.programs import (
    connector_names,
    markets_per_shard,
    markets_subscribed,
    shard_count,
    shard_number,
)
from ssmd_dagster.capture.subscriptions import ASK_AFTER_CLOSE_NS, KEEP_SETTLED_NS, Roster, batches, shard_of_market
from ssmd_dagster.exchange import Market, MarketNews, unlisted_market
from ssmd_dagster_tests.capture.conftest import MakeSetting

S = 1_000_000_000


def market(ticker: str, open_s: int = 0, close_s: int = 1_000, status: str = "active") -> Market:
    """Return a row of the list, times in seconds."""
    return msgspec.structs.replace(unlisted_market(ticker), open_ns=open_s * S, close_ns=close_s * S, status=status)


def test_a_market_comes_with_the_list_and_goes_after_it_has_settled() -> None:
    """A close is no end: the exchange is asked, again and again, and what it says is waited out."""
    roster = Roster(most=10)
    roster.take([market("A"), market("OVER", close_s=5), market("DONE", status="finalized")], 10 * S)
    assert sorted(roster.tickers()) == ["A"]
    assert roster.is_open("A", 999 * S)
    closed_ns = 1_000 * S + ASK_AFTER_CLOSE_NS
    assert not roster.is_open("A", 1_000 * S)
    assert roster.to_ask(closed_ns - 1, 100) == []
    assert roster.to_ask(closed_ns, 100) == ["A"]
    assert roster.to_ask(closed_ns + 1, 100) == []
    assert roster.to_ask(closed_ns + ASK_AFTER_CLOSE_NS, 100) == ["A"]
    roster.take([market("A", status="finalized")], closed_ns)
    assert roster.let_go(closed_ns + KEEP_SETTLED_NS) == []
    assert roster.let_go(closed_ns + KEEP_SETTLED_NS + 1) == ["A"]
    assert not roster.tickers()


def test_news_come_before_the_list() -> None:
    """Listed, moved and settled by the exchange's own word."""
    roster = Roster(most=10)
    roster.hear(MarketNews(ticker="A", event="listed", open_ns=5 * S, close_ns=9 * S), 4 * S)
    assert not roster.is_open("A", 4 * S)
    roster.hear(MarketNews(ticker="A", event="moved", close_ns=20 * S), 6 * S)
    assert roster.is_open("A", 19 * S)
    roster.hear(MarketNews(ticker="A", event="settled"), 21 * S)
    roster.hear(MarketNews(ticker="B", event="settled"), 21 * S)
    assert roster.let_go(22 * S + KEEP_SETTLED_NS) == ["A"]


def test_what_has_no_room_is_counted_and_taken_up_later() -> None:
    """Those that are recorded stay; a place that becomes free is for the next list to fill."""
    roster = Roster(most=2)
    rows = [market(ticker) for ticker in "ABCD"]
    roster.take(rows, 0)
    assert (sorted(roster.tickers()), roster.left_out) == (["A", "B"], 2)
    roster.hear(MarketNews(ticker="A", event="settled"), 0)
    roster.let_go(KEEP_SETTLED_NS + 1)
    roster.take(rows[1:], 0)
    assert (sorted(roster.tickers()), roster.left_out) == (["B", "C"], 1)


@pytest.mark.parametrize(
    ("open_s", "news_s", "up_s", "since"), [(50, 20, 0, 50), (0, 20, 0, 20), (0, 20, 30, 30), (200, 20, 0, None)]
)
def test_a_market_is_missed_from_its_opening_or_listing_on(open_s: int, news_s: int, up_s: int, since: int) -> None:
    """But not from before the connection was up, nor where it has yet to open."""
    roster = Roster(most=2)
    roster.hear(MarketNews(ticker="A", event="listed", open_ns=open_s * S), news_s * S)
    assert roster.missed_since(["A", "?"], up_s * S, 100 * S) == (None if since is None else since * S)


@given(st.sets(st.text("ABC-0123456789.T", min_size=1), max_size=60), st.integers(1, 5))
def test_shards_share_all_markets(tickers: set[str], shards: int) -> None:
    """Each market has one home, the same for whoever asks, and keeps it."""
    rows = [market(ticker) for ticker in sorted(tickers)]
    rosters = [Roster(most=1_000, number=number, shards=shards) for number in range(1, shards + 1)]
    for roster in rosters:
        roster.take(rows, 0)
    assert sorted(ticker for roster in rosters for ticker in roster.tickers()) == sorted(tickers)
    assert all(1 <= shard_of_market(ticker, shards) <= shards for ticker in tickers)


@given(st.lists(st.text(), max_size=40), st.integers(1, 9))
def test_batches_hold_everything_in_order(tickers: list[str], size: int) -> None:
    """None is empty or too large."""
    cut = batches(tickers, size)
    assert [ticker for batch in cut for ticker in batch] == tickers
    assert all(1 <= len(batch) <= size for batch in cut)


def test_more_markets_than_a_connection_takes_are_several_connectors(make_setting: MakeSetting) -> None:
    """By configuration alone; what two replicas record counts once."""
    one = make_setting().env
    assert connector_names(one) == ("connector-a",)
    assert markets_per_shard(one) == 20_000
    many = make_setting(markets={"all": True, "max": 50_000}, connections=2).env
    assert shard_count(many) == 3
    assert connector_names(many) == (
        *("connector-a", "connector-a2", "connector-a3"),
        *("connector-b", "connector-b2", "connector-b3"),
    )
    assert [shard_number(shard) for shard in ("a", "b2", "a13")] == [1, 2, 13]
    beats = {name: {"markets": 10} for name in connector_names(many)} | {"connector-b2": {"markets": 8}}
    assert markets_subscribed(many, beats) == 30
