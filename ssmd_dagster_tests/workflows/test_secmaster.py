"""The security master through its commands, against a simulated exchange."""

from __future__ import annotations

from ssmd_dagster_tests.house import House


def test_markets_are_synced_listed_and_shown_without_a_day(house: House, simulated: str) -> None:
    """The first sync brings all markets in, the next one finds few changes; list and show read them; unknown is exit 4."""
    assert house.ssmd("secmaster", "show", simulated, "KXNOPE", check=4).stdout == ""
    first = house.json("secmaster", "sync", simulated)
    assert first["added"] == first["total"] > 10
    again = house.json("secmaster", "sync", simulated)
    assert again["added"] < first["added"]
    listed = house.json("secmaster", "list", simulated, "--limit", "1000")
    assert listed["total"] == len(listed["markets"]) > 10
    market = listed["markets"][0]
    assert house.json("secmaster", "show", simulated, market["ticker"])["ticker"] == market["ticker"]
    of_series = house.json("secmaster", "list", simulated, "--series", market["series_ticker"], "--limit", "1000")
    assert {row["series_ticker"] for row in of_series["markets"]} == {market["series_ticker"]}
    header, *rows = house.ssmd("secmaster", "list", simulated, "--category", market["category"]).stdout.splitlines()
    assert header.split() == ["TICKER", "SERIES", "CATEGORY", "STATUS", "CLOSES"]
    assert rows
    assert f"Ticker: {market['ticker']}" in house.ssmd("secmaster", "show", simulated, market["ticker"]).stdout


def test_a_series_that_the_exchange_does_not_know_is_a_fault_of_the_configuration(house: House, env_name: str) -> None:
    """Nobody has to guess from an HTTP 404 which file to mend."""
    capture = {"channels": ["trade"], "markets": {"series": ["KXNOSUCH"]}}
    house.add(env_name, simulator={"markets": 20, "rate_per_second": 50}, capture=capture)
    house.up(env_name)
    told = house.ssmd("secmaster", "sync", env_name, check=8).stderr
    assert "KXNOSUCH" in told
    assert f"Correct `capture.markets` of {env_name}" in told
