"""Frames as they came off the real exchange's socket, through a whole day and back, byte for byte."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest

from ssmd_dagster.environments.home import project_dir
from ssmd_dagster_tests.exchanges import plain_exchange
from ssmd_dagster_tests.house import House, until
from ssmd_dagster_tests.judge import archived_payloads

DATA = project_dir().parent / "shared" / "kalshi" / "data"
FILES = (
    "ws-sports-2026-08",
    pytest.param("ws-kxbtc-2026-04", marks=pytest.mark.long),
    pytest.param("ws-kxbtc15m-2026-05", marks=pytest.mark.long),
)
ODD_FRAMES = [
    b"not json at all",
    b'{"type":"trade","sid":1,"seq":1,"msg":{"market_ticker":"KX-A.B","price":}}',
    b'{"type":"brand_new_type","sid":9,"seq":1,"msg":{"x":1}}',
    b'{"type":"trade","sid":"one","msg":{}}',
    b'{"type":"trade","sid":1,"seq":2,"msg":{"market_ticker":"\xff\xfe"}}',
    b'{"type":"trade","sid":1,\n"seq":3,"msg":{}}\n',
    b'  {"type":"trade","sid":1,"seq":4,"msg":{"market_ticker":"KX \\ud800"}}  ',
    b"",
    "{'type':'trädé'}".encode(),
]


def record(house: House, env: str, frames: list[bytes]) -> tuple[list[bytes], dict[str, int]]:
    """Record `frames` as a day of an environment of its own; return what is archived and the counts per channel."""
    capture = {"channels": ["trade", "orderbook_delta"], "markets": {"tickers": ["KXMLBGAME-X.1", "KXBTC-2"]}}
    with plain_exchange(frames, channels=2) as exchange:
        house.add(env, **{**exchange.settings(), "capture": capture})
        house.up(env)
        house.ssmd("day", "start", env)
        until(exchange.sent.is_set)
        house.ssmd("day", "end", env)
    day = house.day(env, house.today())
    assert day["state"] == "COMPLETE"
    return archived_payloads(Path(day["archive"])), {
        sheet["channel"]: sheet["archived"] for sheet in day["ledger"]["channels"]
    }


@pytest.mark.skipif(not DATA.is_dir(), reason="the folder with real captures is not there")
@pytest.mark.parametrize("name", FILES)
def test_real_frames_come_back_byte_for_byte(house: House, env_name: str, name: str) -> None:
    """What the exchange sent in 2026 is archived as it came, its own answers to commands included."""
    frames = [json.loads(line)["raw"].encode() for line in (DATA / f"{name}.frames.jsonl").read_text().splitlines()]
    archived, _ = record(house, env_name, frames)
    answers = len(archived) - len(frames)
    assert archived[answers:] == frames
    assert all(json.loads(answer)["type"] == "subscribed" for answer in archived[:answers])


def test_malformed_frames_are_kept_and_stop_nothing(house: House, env_name: str) -> None:
    """Frames that are no JSON, of no known type or no text at all are archived as they came and counted as `other`."""
    good = [b'{"type":"trade","sid":1,"seq":%d,"msg":{"market_ticker":"KXBTC-2"}}' % n for n in range(10, 60)]
    frames = [*good[:25], *ODD_FRAMES, *good[25:]]
    archived, counts = record(house, env_name, frames)
    assert archived[-len(frames) :] == frames
    assert Counter(counts)["trade"] >= len(good)
    assert counts["other"] >= 5
