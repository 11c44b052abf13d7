"""Missed days come back: replay through the command, killed in the middle, beside a live day; and what is refused."""

from __future__ import annotations

import json
import os
import signal
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from websockets.sync.client import connect

from ssmd_dagster.archive.batch import Batch, decode_records, scan
from ssmd_dagster.archive.records import parse_record
from ssmd_dagster.exchange import REST, SESSION
from ssmd_dagster_tests.house import House, until
from ssmd_dagster_tests.workflows.replaying import ago, archived_ids, sim, true_ids

ENV = "replayed"
TRADES = 30_000
SLOW = {"fault": "http_slow", "path": "/historical/trades", "delay_s": 4.0, "count": 10_000}


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Iterator[House]:
    """A house with one simulated environment that stays up for all tests of this module."""
    house = House.build(tmp_path_factory.mktemp("replay"))
    try:
        house.add(ENV, simulator={"seed": 7, "markets": 30, "rate_per_second": 20, "trades_per_day": TRADES})
        house.up(ENV)
        yield house
    finally:
        house.down()


def test_a_missed_day_is_built_from_the_exchange_while_the_live_day_goes_on(built: House) -> None:
    """Start and end print the design's lines, the archive has every trade, gaps say what cannot be had, today stays current."""
    built.ssmd("day", "start", ENV)
    day = ago(built, 3)
    started = built.ssmd("day", "start", ENV, "--date", day)
    assert started.stdout.splitlines() == [
        f"Starting trading day {day}...",
        "  ✓ Syncing security master",
        "  ✓ Starting connector",
        "  ✓ Starting archiver",
        "  ✓ Starting gateway",
        "  ✓ Health check passed",
        f"Trading day {day} is ACTIVE",
    ]
    assert built.ssmd("day", "start", ENV, "--date", day).stdout.splitlines() == [
        f"Trading day {day} is ACTIVE already"
    ]
    status = built.json("day", "status", ENV)
    assert (status["date"], status["state"]) == (built.today(), "ACTIVE")
    assert sorted(status["components"]) == ["archiver", "connector-a", "gateway"]
    assert built.day(ENV, day)["state"] == "ACTIVE"
    # When it is asked again, for the proof, the exchange lists fewer trades than it gave out.
    sim(built, ENV, "/sim/faults", {"fault": "http_short", "path": "/markets/trades", "count": 3, "size": 20})
    built.ssmd("day", "end", ENV, "--date", day, check=3)
    shown = built.day(ENV, day)
    assert (shown["state"], shown["mode"], shown["revision"]) == ("COMPLETE", "replay", 1)
    assert 0 < shown["ledger"]["trades"]["extra"] <= 60
    assert shown["ledger"]["trades"]["missing"] == 0
    assert "replayed source" in shown["condition_reasons"]
    assert {gap["scope"]["channel"] for gap in shown["gaps"] if gap["cause"] == "not_captured"} == {
        *("ticker", "orderbook_delta", "market_lifecycle_v2")
    }
    assert archived_ids(built, ENV, day) == Counter(true_ids(built, ENV, day))
    unplayable = built.ssmd("day", "start", ENV, "--date", day, "--from", "archive", "--speed", "2", check=5)
    assert "there are no messages to play" in unplayable.stderr
    status = built.json("day", "status", ENV)
    assert (status["date"], status["state"], status["error"], status["gaps"]) == (built.today(), "ACTIVE", None, [])
    assert status["messages"] > 100


def _beat(house: House, day: str) -> dict[str, Any]:
    done = house.ssmd("day", "status", ENV, "--date", day, "--json", check=None)
    return dict(json.loads(done.stdout)["components"].get("replayer", {})) if done.returncode == 0 else {}


def test_a_killed_replay_goes_on_where_it_was(built: House) -> None:
    """The fetching process and then its caller are killed; the same command ends the day, and nothing is fetched twice."""
    day = ago(built, 70)  # before the cutoff
    sim(built, ENV, "/sim/faults", SLOW)
    caller = built.spawn("day", "start", ENV, "--date", day, "--mode", "replay")
    try:
        first = until(lambda: (beat := _beat(built, day)).get("pages", 0) >= 3 and beat)
        os.killpg(caller.pid, signal.SIGKILL)
        os.kill(first["pid"], signal.SIGKILL)
        # Nobody's child: the supervisor brings it back, and it goes on.
        until(lambda: (beat := _beat(built, day)).get("pid") not in (None, first["pid"]) and beat["pages"] >= 3)
    finally:
        caller.wait()
        for pipe in (caller.stdout, caller.stderr):
            if pipe is not None:
                pipe.close()
    sim(built, ENV, "/sim/faults", method="DELETE")
    until(lambda: built.ssmd("day", "start", ENV, "--date", day, check=None).returncode == 0)
    built.ssmd("day", "end", ENV, "--date", day, check=None)
    shown = built.day(ENV, day)
    assert (shown["state"], shown["revision"]) == ("COMPLETE", 1)
    assert shown["epoch"] > first["epoch"]
    ids = archived_ids(built, ENV, day)
    assert set(ids) == true_ids(built, ENV, day)
    # A second's trades may come again behind a page that was the last one.
    assert sum(ids.values()) - len(ids) < 20


@pytest.mark.long
@pytest.mark.timeout(600)
def test_a_range_is_backfilled_with_one_command(built: House) -> None:
    """Days that are complete are skipped, days side by side are whole, and the table says what became of each."""
    first, last = ago(built, 64), ago(built, 61)
    built.ssmd("day", "backfill", ENV, "--from", first, "--to", first)
    done = built.ssmd("day", "backfill", ENV, "--from", first, "--to", last, "--parallel", "2")
    lines = done.stdout.splitlines()
    assert lines[0].split() == ["DATE", "RESULT", "CONDITION", "TRADES", "TIME"]
    assert len(lines) == 6
    assert next(line for line in lines if "complete already" in line).startswith(first)
    assert lines[-1].startswith("3 days replayed with ")
    assert "4 of 4 days" in done.stderr
    for number in range(61, 65):
        day = ago(built, number)
        assert built.day(ENV, day)["state"] == "COMPLETE"
        assert archived_ids(built, ENV, day) == Counter(true_ids(built, ENV, day))
    again = built.json("day", "backfill", ENV, "--from", first, "--to", last)
    assert {one["outcome"] for one in again["days"]} == {"complete already"}


@pytest.mark.long
def test_one_bad_day_does_not_stop_the_others(built: House) -> None:
    """An exchange that refuses the credentials for one day: it is named, exit code 1, the next command mends it."""
    first, last = ago(built, 52), ago(built, 51)
    sim(built, ENV, "/sim/faults", {"fault": "http_5xx", "path": "/historical/cutoff", "status": 400, "count": 1})
    done = built.ssmd("day", "backfill", ENV, "--from", first, "--to", last, check=1)
    assert f"Failed: {first}" in done.stderr
    assert built.day(ENV, first)["state"] == "FAILED"
    assert built.day(ENV, last)["state"] == "COMPLETE"
    sim(built, ENV, "/sim/faults", method="DELETE")
    built.ssmd("day", "backfill", ENV, "--from", first, "--to", last)
    assert built.day(ENV, first)["state"] == "COMPLETE"


REFUSED = (
    (("day", "start", ENV, "--mode", "replay"), 5, "is ACTIVE: it is recorded, not replayed"),
    (("day", "start", ENV, "--date", "TOMORROW", "--mode", "replay"), 5, "has not begun"),
    (("day", "start", ENV, "--date", "2999-01-01", "--mode", "replay"), 4, "The calendar goes from"),
    (("day", "start", ENV, "--date", "2025-01-01"), 4, "The calendar goes from"),
    (
        ("day", "start", ENV, "--date", "2026-02-02", "--from", "archive", "--speed", "2"),
        4,
        "no trading day 2026-02-02",
    ),
    (
        ("day", "start", ENV, "--date", "TODAY", "--from", "archive", "--speed", "2"),
        5,
        "only a COMPLETE day can be played",
    ),
    (("day", "start", ENV, "--date", "2026-02-02", "--from", "archive", "--speed", "0"), 2, "--speed"),
    (("day", "start", ENV, "--date", "2026-02-02", "--speed", "2"), 2, "--from archive"),
    (("day", "start", ENV, "--date", "2026-02-02", "--mode", "replay", "--from", "archive"), 4, "2026-02-02"),
    (("day", "backfill", ENV, "--from", "2026-02-02", "--to", "2026-02-01"), 2, "backwards"),
    (("day", "backfill", ENV, "--from", "2026-02-02", "--to", "TODAY"), 5, "is not over"),
    (("day", "backfill", ENV, "--from", "2025-02-02", "--to", "2026-02-03"), 4, "The calendar goes from"),
    (("day", "backfill", ENV, "--from", "tuesday", "--to", "2026-02-03"), 2, "YYYY-MM-DD"),
    (("day", "backfill", ENV, "--from", "2026-02-03"), 2, "--to"),
)


def test_days_that_cannot_be_replayed_are_refused_before_anything_is_done(built: House) -> None:
    """Each with its exit code and its words, and no day comes into being."""
    built.ssmd("day", "start", ENV)
    before = [day["date"] for day in built.json("day", "history", ENV, "--limit", "1000")["days"]]
    dates = {"TODAY": built.today(), "TOMORROW": ago(built, -1)}
    for arguments, code, words in REFUSED:
        done = built.ssmd(*(dates.get(word, word) for word in arguments), check=code)
        assert words in done.stderr, arguments
    assert [day["date"] for day in built.json("day", "history", ENV, "--limit", "1000")["days"]] == before


@pytest.mark.long
@pytest.mark.timeout(600)
def test_a_recorded_day_with_a_gap_is_mended_by_its_next_revision(built: House) -> None:
    """What the live day lacks is fetched into revision 2, which says what changed; revision 1 stays as it was."""
    env = "mended"
    built.add(env, simulator={"seed": 7, "markets": 30, "rate_per_second": 200, "trades_per_day": TRADES})
    built.up(env)
    day = built.today()
    built.ssmd("day", "start", env)
    until(lambda: built.day(env, day)["messages"] > 300)
    beat = built.json("day", "status", env)["components"]["connector-a"]
    os.kill(beat["pid"], signal.SIGKILL)
    until(lambda: [gap for gap in built.day(env, day)["gaps"] if gap["to_ns"]])
    built.ssmd("day", "end", env, check=None)
    first = built.day(env, day)
    assert (first["state"], first["revision"]) == ("COMPLETE", 1)
    folder = Path(first["archive"])
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    sim(built, env, "/sim/clock", {"advance_s": 86_400})
    built.ssmd("day", "start", env, "--date", day, "--mode", "replay")
    ended = built.ssmd("day", "end", env, "--date", day, check=None)
    assert "Revision 2: " in ended.stderr
    second = built.day(env, day)
    assert (second["state"], second["mode"], second["revision"]) == ("COMPLETE", "replay", 2)
    assert "replayed source" not in second["condition_reasons"]
    assert not [gap for gap in second["gaps"] if gap["cause"] == "not_captured"]
    after = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert {name: after[name] for name in before} == before
    assert {"manifest.r2.json", "rest-00.jsonl.zst"} <= set(after)
    assert second["ledger"]["trades"]["missing"] == 0


@pytest.mark.long
@pytest.mark.timeout(600)
def test_a_replayed_day_can_be_replayed_again(built: House) -> None:
    """After a backfill, which empties stream and spool, a second replay asks for everything anew and becomes revision 2."""
    day = ago(built, 66)
    built.ssmd("day", "backfill", ENV, "--from", day, "--to", day)
    before = archived_ids(built, ENV, day)
    built.ssmd("day", "start", ENV, "--date", day, "--mode", "replay")
    built.ssmd("day", "end", ENV, "--date", day, check=None)
    assert (built.day(ENV, day)["state"], built.day(ENV, day)["revision"]) == ("COMPLETE", 2)
    assert archived_ids(built, ENV, day) == before + before


@pytest.mark.long
def test_what_the_exchange_left_out_at_first_is_found_by_the_proof(built: House) -> None:
    """Trades that the list lacked while the day was fetched are in the archive in the end, of markets unheard of too."""
    day = ago(built, 30)
    short = {"fault": "http_short", "path": "/markets/trades", "count": 6, "size": 900}
    sim(built, ENV, "/sim/faults", short)
    built.ssmd("day", "start", ENV, "--date", day)
    sim(built, ENV, "/sim/faults", method="DELETE")
    built.ssmd("day", "end", ENV, "--date", day, check=3)
    assert built.day(ENV, day)["ledger"]["trades"]["missing"] == 0
    assert archived_ids(built, ENV, day) == Counter(true_ids(built, ENV, day))


@pytest.mark.long
def test_an_exchange_that_lists_nothing_when_it_is_asked_again_proves_nothing(built: House) -> None:
    """The day keeps what it has; its line of trades is not computed, and it is `pending`."""
    day = ago(built, 31)
    built.ssmd("day", "start", ENV, "--date", day)
    sim(built, ENV, "/sim/faults", {"fault": "http_short", "path": "/markets/trades", "count": 1_000, "size": 1_000})
    built.ssmd("day", "end", ENV, "--date", day)
    sim(built, ENV, "/sim/faults", method="DELETE")
    shown = built.day(ENV, day)
    assert (shown["condition"], shown["ledger"]["trades"]["exchange"]) == ("pending", None)
    assert archived_ids(built, ENV, day) == Counter(true_ids(built, ENV, day))


@pytest.mark.long
def test_a_recorded_day_is_played_to_clients(built: House) -> None:
    """Every record once, through an address of its own; neither journal nor archive hear of it; it ends, or is ended."""
    env, day = "played", built.today()
    built.add(env, simulator={"seed": 8, "markets": 30, "rate_per_second": 100})
    built.up(env)
    built.ssmd("day", "start", env)
    until(lambda: built.json("day", "status", env)["messages"] > 500)
    built.ssmd("day", "end", env)
    before = built.ssmd("day", "events", env, "--date", day, "--json").stdout
    folder = Path(built.day(env, day)["archive"])
    files = {path.name: path.read_bytes() for path in folder.iterdir()}
    recorded = Counter(
        (item.header.conn, parse_record(line).n)
        for name, data in files.items()
        if name.endswith(".jsonl.zst")
        for item in scan(data)
        if isinstance(item, Batch) and item.header.channel not in (SESSION, REST)
        for line in decode_records(data, item).splitlines()
    )
    words = ("day", "start", env, "--date", day, "--mode", "replay", "--from", "archive", "--speed")
    with connect(built.json(*words, "10")["address"], max_size=1 << 26) as client:
        client.send('{"op":"subscribe"}')
        messages = [json.loads(text) for text in client]
    assert messages[-1]["type"] == "day_ended"
    assert Counter((one["conn"], one["n"]) for one in messages if one["type"] == "event") == recorded
    assert len(recorded) > 500
    with connect(built.json(*words, "0.001")["address"], max_size=1 << 26) as client:
        client.send('{"op":"subscribe","channels":["trade"]}')
        assert "is no longer played" in built.ssmd("day", "end", env, "--date", day).stderr
        last = [json.loads(text)["type"] for text in client]
    assert (last[0], last[-1]) == ("subscribed", "day_ended")
    assert len(last) < 100
    assert built.ssmd("day", "events", env, "--date", day, "--json").stdout == before
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == files


def test_a_day_without_a_single_trade_is_never_complete(built: House) -> None:
    """A day before the exchange's first one fails with what to think of, and cannot be ended."""
    built.add("young", simulator={"seed": 7, "markets": 30, "rate_per_second": 20, "trades_per_day": 0})
    built.up("young")
    day = ago(built, 5)
    done = built.ssmd("day", "start", "young", "--date", day, check=4)
    assert "lists no trade" in done.stderr
    assert built.day("young", day)["state"] == "FAILED"
    built.ssmd("day", "end", "young", "--date", day, "--force", check=5)
