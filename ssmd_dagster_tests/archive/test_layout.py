"""Names of objects lead there and back, sort as they should, and nothing that a ticker holds leaves its place in them."""

from __future__ import annotations

import re
from urllib.parse import unquote

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ssmd_dagster.archive.layout import (
    CHANNEL_OF_FILE,
    FILE_OF_CHANNEL,
    day_prefix,
    encode_ticker,
    manifest_key,
    parse_segment_key,
    segment_key,
)


def test_a_day_lies_under_its_feed_year_month_and_day() -> None:
    """The design's paths, letter by letter."""
    assert day_prefix("kalshi", "2025-12-14") == "kalshi/2025/12/14/"
    assert segment_key("kalshi", "2025-12-14", "trade", 0) == "kalshi/2025/12/14/trades-00.jsonl.zst"
    assert segment_key("kalshi", "2025-12-14", "orderbook_delta", 7) == "kalshi/2025/12/14/orderbook-07.jsonl.zst"
    assert segment_key("kalshi", "2025-12-14", "market_lifecycle_v2", 123).endswith("/lifecycle-123.jsonl.zst")
    assert manifest_key("kalshi", "2025-12-14") == "kalshi/2025/12/14/manifest.json"
    assert manifest_key("kalshi", "2025-12-14", 3) == "kalshi/2025/12/14/manifest.r3.json"


@settings(deadline=None)
@given(st.sampled_from(sorted(FILE_OF_CHANNEL)), st.integers(0, 10**6))
def test_a_segments_key_names_its_channel_and_number(channel: str, number: int) -> None:
    """What was written into the key is read out of it."""
    assert parse_segment_key(segment_key("kalshi", "2025-12-14", channel, number)) == (channel, number)


@pytest.mark.parametrize(
    "name",
    [
        "manifest.json",
        "manifest.r2.json",
        "trades-0.jsonl.zst",
        "trades-007.jsonl.zst",
        "trades-٠٠.jsonl.zst",
        "trades--1.jsonl.zst",
        "trades-00.jsonl.zst.part",
        "trade-00.jsonl.zst",
        "Trades-00.jsonl.zst",
        "trades-00.jsonl.zst\n",
        "",
    ],
)
def test_no_other_object_is_taken_for_a_segment(name: str) -> None:
    """Only the one spelling that is written is read."""
    assert parse_segment_key(f"kalshi/2025/12/14/{name}") is None


def test_no_two_channels_share_a_file() -> None:
    """Every channel has a file name of its own."""
    assert {CHANNEL_OF_FILE[file]: file for file in CHANNEL_OF_FILE} == FILE_OF_CHANNEL


@settings(deadline=None)
@given(st.text(st.characters(exclude_categories=["Cs"])))
def test_a_ticker_becomes_one_harmless_token_and_comes_back(ticker: str) -> None:
    """Letters, digits, `_`, `-` and percent escapes only, and nothing is lost."""
    encoded = encode_ticker(ticker)
    assert re.fullmatch(r"([A-Za-z0-9_-]|%[0-9A-F]{2})*", encoded)
    assert unquote(encoded) == ticker


def test_dots_and_slashes_of_a_ticker_are_escaped() -> None:
    """Kalshi's own tickers hold dots; `..` and `/` would leave the folder."""
    assert encode_ticker("KXBTCD-26FEB07-T98249.99") == "KXBTCD-26FEB07-T98249%2E99"
    assert encode_ticker("../x~") == "%2E%2E%2Fx%7E"
