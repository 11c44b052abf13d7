"""Rows D1 to D5, D8, D9, D11, D12 and W2: the day's own machinery, its cache and its host."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import signal
import time
from collections import Counter

import yaml

from ssmd_dagster.day.events import TradingDay
from ssmd_dagster.day.folding import StaleEpochError
from ssmd_dagster.day.payloads import Completed, EndRequested, Started
from ssmd_dagster.day.states import DayState, EventName
from ssmd_dagster.errors import RefusedError
from ssmd_dagster.stores.connect import Stores
from ssmd_dagster.workflows.attempt import Attempt, Step
from ssmd_dagster.workflows.desk import Desk, open_desk
from ssmd_dagster.workflows.end import END
from ssmd_dagster.workflows.recover import RECOVER
from ssmd_dagster.workflows.start import START
from ssmd_dagster_tests.faults.rows_archiver import ARCHIVER, roll_over_midnight
from ssmd_dagster_tests.faults.rows_nats import _raw_store
from ssmd_dagster_tests.faults.scenario import scenario
from ssmd_dagster_tests.faults.stage import DONE, ENV, Stage
from ssmd_dagster_tests.faults.verdict import judge_journal

RACERS = 8
CONNECTOR = "capture.connector"


def points(verb: str, steps: list[str]) -> list[str]:
    """Return every named point of a verb."""
    return [f"{verb}.{step}.{when}" for step in ("take", *steps, "finish") for when in ("before", "after")]


POINTS = {verb.name: points(verb.name, [step.name for step in verb.steps]) for verb in (START, END, RECOVER)}


@scenario("D1", "concurrent `day start`", "exactly one wins, the others say so", started=False, ends=False)
def starts_race(stage: Stage) -> None:
    """Commands started at once, three times, each time for a day that was ended before."""
    for attempt in range(3):
        racing = [stage.house.spawn("day", "start", ENV) for _ in range(RACERS)]
        codes = []
        for process in racing:
            process.communicate(timeout=120)
            codes.append(process.returncode)
        assert set(codes) <= {0, 5}, codes
        stage.wait(lambda: stage.house.ssmd("day", "start", ENV, check=None).returncode == 0, "an ACTIVE day")
        if not stage.dates:
            stage.dates.append(stage.today())
        stage.flows()
        assert sum(1 for _ in _started(stage)) == attempt + 1, "started more than once"
        stage.end()
        stage.notes[f"race {attempt}"] = codes
    assert stage.shown()["state"] == "COMPLETE"


def _started(stage: Stage) -> list[int]:
    async def read(stores: Stores) -> list[int]:
        stored = await stores.journal.read()
        return [entry.seq for entry in stored if entry.event.event == "started"]

    return list(stage.with_stores(read))


async def _nothing(_attempt: Attempt) -> str:
    return ""


async def _leave(_attempt: Attempt) -> None:
    """Nothing was brought up, so there is nothing to stop."""


async def _say_started(attempt: Attempt) -> TradingDay:
    return await attempt.journal(EventName.STARTED, Started())


BARE_START = START._replace(
    steps=(Step("noop", "Nothing to bring up", _nothing),), finish=_say_started, clean_up=_leave
)
"""A start that takes the day, and says that it is ACTIVE, through the real journal and lease; no process is brought up."""
ROUNDS, STARTERS = 10, 10


@scenario(
    "D1",
    "a hundred racing starts, ten at once, half of them without a lease",
    "one `started` a round; the others are told so",
    started=False,
    ends=False,
)
def starts_race_for_the_journal(stage: Stage) -> None:
    """Command lines and schedules with connections of their own; in every other round the cache is emptied all the time."""
    said = Counter(asyncio.run(_race(stage)))
    stage.notes["outcomes"] = dict(said)
    assert said["started"] == ROUNDS
    assert sum(said.values()) == ROUNDS * STARTERS
    events, states = stage.journal()
    judge_journal(events, states, stage.verdict)
    assert stage.verdict.faults() == {}, stage.verdict.examples
    assert len(_started(stage)) == ROUNDS


async def _race(stage: Stage) -> list[str]:
    setting = stage.setting()
    outcomes: list[str] = []
    async with contextlib.AsyncExitStack() as stack:
        actors = [f"{'cli:operator' if number % 2 else 'dagster:run'}@{number}" for number in range(STARTERS)]
        desks = [await stack.enter_async_context(open_desk(setting, actor)) for actor in actors]
        for number in range(ROUNDS):
            flushing = asyncio.create_task(_flush_all_the_time(stage)) if number % 2 else None
            stage.random.shuffle(desks)
            outcomes += await asyncio.gather(*(_start(desk) for desk in desks))
            if flushing is not None:
                flushing.cancel()
                await asyncio.wait([flushing])
            book = desks[0].book
            day = (await book.refresh()).days[desks[0].today()]
            assert day.state is DayState.ACTIVE, f"round {number}: {day.state}"
            await book.append(day.date, EventName.END_REQUESTED, epoch=day.epoch, data=EndRequested())
            done = Completed(condition="pending", messages=0, gaps=0, archive_url="file:///")
            await book.append(day.date, EventName.COMPLETED, epoch=day.epoch, data=done)
    return outcomes


async def _start(desk: Desk) -> str:
    """Start today, again where the holder of the lease is at work, and say what came of it."""
    attempt = Attempt(desk, desk.today(), BARE_START)
    try:
        await attempt.go()
    except StaleEpochError:
        return "taken over"
    except RefusedError:
        return "refused"
    return "already" if attempt.already else "started"


async def _flush_all_the_time(stage: Stage) -> None:
    with contextlib.closing(stage.redis) as client:
        while True:
            client.flushall()
            await asyncio.sleep(stage.random.uniform(0.0, 0.02))


@scenario(
    "D11",
    "after the seal: a segment cut, and trades that the exchange lists and the day lacks",
    "named, journaled, degraded; a replay brings the trades as revision 2; revision 1 is as it was",
    simulator={"trades_per_day": 30_000},
    ends=False,
)
def losses_found_after_the_seal(stage: Stage) -> None:
    """The exchange's list is empty while the day is ended, so that nothing tells that a crash took trades."""
    before = stage.beat("connector-a")["conn"]
    stage.kill(CONNECTOR)
    stage.wait(lambda: stage.beat("connector-a").get("conn") not in (None, before), "a new connection")
    stage.flows()
    stage.fault("http_short", path="/markets/trades", count=10_000, size=1_000)
    stage.end()
    assert stage.shown()["condition"] == "pending"
    stage.exchange("faults", method="DELETE")
    sealed = {path.name: path.read_bytes() for path in stage.archive_folder().iterdir()}

    segment = stage.random.choice(sorted(stage.archive_folder().glob("trades-*.jsonl.zst")))
    segment.write_bytes(sealed[segment.name][: -stage.random.randrange(1, 2_000)])
    found = stage.house.json("day", "verify", ENV, stage.date, check=6)
    assert any(segment.name in fault for fault in found["faults"]), found["faults"]
    segment.write_bytes(sealed[segment.name])

    found = stage.house.json("day", "verify", ENV, stage.date, check=6)
    assert any("the exchange lists trades that the day does not have" in fault for fault in found["faults"])
    assert any("--mode replay" in step for step in found["mend"])
    lacking = found["ledger"]["trades"]["missing"]
    shown = stage.shown()
    assert (shown["state"], shown["condition"]) == ("COMPLETE", "degraded")
    assert any("later verification" in reason for reason in shown["condition_reasons"])
    again = stage.house.json("day", "verify", ENV, stage.date, check=6)
    assert not again["changed"], "the same finding is journaled as a change twice"

    stage.exchange("clock", {"advance_s": 86_400})
    stage.house.ssmd("day", "start", ENV, "--date", stage.date, "--mode", "replay")
    stage.end()
    shown = stage.shown()
    assert shown["revision"] == 2
    assert shown["ledger"]["trades"]["missing"] == 0
    assert not any("later verification" in reason for reason in shown["condition_reasons"])
    after = {path.name: path.read_bytes() for path in stage.archive_folder().iterdir()}
    assert {name: after[name] for name in sealed} == sealed
    assert stage.house.json("day", "verify", ENV, stage.date, check=3)["faults"] == []
    stage.notes["missing"] = lacking


@scenario(
    "D2",
    "kill -9 of whoever starts the day, at a named point",
    "recover finishes it; nothing starts twice",
    started=False,
)
def start_killed(stage: Stage) -> None:
    """Three points drawn by lot, one death after the other."""
    drawn = stage.random.sample([p for p in POINTS["start"] if p != "start.take.before"], 3)
    drawn.sort(key=POINTS["start"].index)
    for point in drawn:
        done = stage.house.ssmd("day", "start", ENV, check=None, SSMD_CRASH_AT=point)
        stage.notes[point] = done.returncode
        stage.wait(
            lambda: stage.house.ssmd("day", "status", ENV, check=None).returncode == 0, "a day that somebody took"
        )
        if not stage.dates:
            stage.dates.append(stage.today())
        if point == drawn[-1]:
            break
        time.sleep(2.5)  # the dead one's lease runs out
    stage.recover()
    stage.flows()


@scenario("D2", "kill -9 of whoever ends the day, at a named point", "recover finishes it; every frame once")
def end_killed(stage: Stage) -> None:
    """Three points drawn by lot, one death after the other."""
    drawn = stage.random.sample(POINTS["end"][1:-2], 3)
    drawn.sort(key=POINTS["end"].index)
    for point in drawn:
        done = stage.wait(
            lambda point=point: (
                (  # type: ignore[misc]
                    tried := stage.try_to_end(SSMD_CRASH_AT=point)
                ).returncode
                != 5
                and tried
            ),
            "the lease of the dead one to be gone",
        )
        stage.notes[point] = done.returncode
    stage.wait(lambda: stage.try_to_end().returncode in DONE, "the day to be ended", 90)


@scenario("D2", "kill -9 of whoever recovers the day, at a named point", "the next recover finishes it")
def recover_killed(stage: Stage) -> None:
    """The day's processes are stopped, so that there is something to recover."""
    since = time.monotonic()
    stage.kill(CONNECTOR, signal.SIGSTOP)
    stage.kill(ARCHIVER, signal.SIGSTOP)
    stage.wait(lambda: stage.house.json("day", "status", ENV)["state"] == "ERROR", "the day to be in ERROR", 60)
    stage.detected(since)
    stage.kill(CONNECTOR)
    stage.kill(ARCHIVER)
    point = stage.random.choice(POINTS["recover"])
    done = stage.house.ssmd("day", "recover", ENV, check=None, SSMD_CRASH_AT=point)
    stage.notes[point] = done.returncode
    stage.recover()
    stage.recovered(since)


@scenario(
    "D3",
    "the holder of the lease stopped past its time, then continued",
    "its writes are refused; the day was started once",
    started=False,
)
def stale_starter(stage: Stage) -> None:
    """Another start takes the day meanwhile; the first one wakes up and may change nothing."""
    first = stage.house.spawn("day", "start", ENV)
    try:
        stage.wait(lambda: "STARTING" in stage.states(), "STARTING")
        os.kill(first.pid, signal.SIGSTOP)
        stage.dates.append(stage.today())
        stopped_in = stage.shown()["epoch"]
        stage.wait(
            lambda: stage.house.ssmd("day", "start", ENV, check=None).returncode == 0, "another start to take the day"
        )
        epoch = stage.shown()["epoch"]
        assert epoch > stopped_in
    finally:
        os.kill(first.pid, signal.SIGCONT)
    first.communicate(timeout=60)
    assert first.returncode != 0
    assert (stage.shown()["state"], stage.shown()["epoch"]) == ("ACTIVE", epoch)
    stage.flows()


@scenario("D4", "Redis: FLUSHALL, kill -9, torn file, an old copy", "rebuilt from the journal, and equal to it")
def cache_lost(stage: Stage) -> None:
    """One after the other, in an order drawn by lot; capture goes on throughout."""
    folder = stage.valkey.folder
    copy = stage.folder / "old"
    shutil.copytree(folder, copy)
    stage.flows(200)
    since = time.monotonic()
    for trouble in stage.random.sample(("flush", "kill", "torn", "old"), 4):
        if trouble == "flush":
            with contextlib.closing(stage.redis) as client:
                client.flushall()
        else:
            stage.valkey.kill()
            if trouble == "torn":
                newest = max((folder / "appendonlydir").glob("*.incr.aof"), key=lambda path: path.stat().st_mtime_ns)
                with newest.open("r+b") as file:
                    file.truncate(max(0, newest.stat().st_size - stage.random.randrange(1, 4000)))
            elif trouble == "old":
                shutil.rmtree(folder / "appendonlydir")
                shutil.copytree(copy / "appendonlydir", folder / "appendonlydir")
            stage.pause(0.1, 1.0)
            stage.valkey.start()
        stage.wait(
            lambda: stage.house.ssmd("day", "rebuild", ENV, check=None).returncode == 0, "the cache to be rebuilt"
        )
        assert stage.house.json("day", "status", ENV)["state"] in ("ACTIVE", "ERROR")
    stage.recovered(since)
    stage.wait(lambda: stage.house.json("day", "status", ENV)["state"] == "ACTIVE", "the heartbeats to be back")


@scenario("D5", "the journal's answer to an append is lost", "the retry changes nothing", ends=False)
def answers_lost(stage: Stage) -> None:
    """The command's line to NATS goes dead at random moments of `end`, and comes back after its time-out."""
    for _ in range(3):
        ending = stage.house.spawn("day", "end", ENV, "--date", stage.date)
        stage.pause(0.6, 3.0)
        names = [name for name in stage.to_nats.clients() if name.startswith("cli:")]
        for name in names:
            stage.to_nats.hole(name)
        stage.pause(5.5, 7.0)
        stage.to_nats.heal()
        ending.communicate(timeout=120)
        stage.notes[f"end {len(stage.notes)}"] = ending.returncode
    stage.wait(lambda: stage.try_to_end().returncode in DONE, "the day to be ended", 90)
    assert stage.shown()["state"] == "COMPLETE"


ROLL = {"timezone": "UTC", "day_start": "00:10", "day_end": "00:00", "auto_roll": True}


@scenario(
    "D8",
    "messages up to and from midnight on, at 2,000 a second",
    "none lost, none in the wrong day, both days whole",
    started=False,
    ends=False,
    schedule=ROLL,
    simulator={"rate_per_second": 2000},
)
def roll_at_midnight(stage: Stage) -> None:
    """A roll over the boundary on the exchange's own clock."""
    roll_over_midnight(stage, stop_archiver=False)


@scenario(
    "D8",
    "the same at 20,000 a second",
    "the same",
    started=False,
    ends=False,
    schedule=ROLL,
    simulator={"rate_per_second": 20_000, "markets": 200},
    capture={"spool_limit_mb": 1024, "stream_limit_mb": 1024},
)
def roll_at_midnight_under_load(stage: Stage) -> None:
    """Under the load that the design names."""
    roll_over_midnight(stage, stop_archiver=False, messages=20_000)


@scenario("D9", "end while the archiver lags behind", "ENDING, with progress; then COMPLETE")
def end_with_a_lagging_archiver(stage: Stage) -> None:
    """The archiver's line to NATS is slow; the end waits for it and says so."""
    stage.to_nats.slow(4_000, "archiver")
    stage.to_nats.hole("archiver")
    stage.pause(2.0, 3.0)
    stage.to_nats._mode.pop("archiver", None)
    ending = stage.house.spawn("day", "end", ENV, "--date", stage.date)
    stage.wait(lambda: stage.shown()["state"] == "ENDING", "ENDING")
    stage.pause(1.0, 2.0)
    assert stage.shown()["state"] == "ENDING"
    stage.to_nats.heal()
    _, errors = ending.communicate(timeout=120)
    if ending.returncode not in DONE:  # it waits half a minute for an archiver that does not answer
        stage.notes["first end"] = errors[-300:]


@scenario("D9", "`end --force` while the archiver hangs", "COMPLETE, degraded, with the reason; exit 3", ends=False)
def forced_end(stage: Stage) -> None:
    """Whoever cannot wait gets a degraded day that says who forced it; it holds what was stored."""
    stopped = stage.kill(ARCHIVER, signal.SIGSTOP)
    try:
        done = stage.house.ssmd(
            "day", "end", ENV, "--date", stage.date, "--force", "--reason", "power is going", check=None
        )
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.kill(stopped, signal.SIGCONT)
    assert done.returncode == 3, done.stderr
    day = stage.shown()
    assert (day["state"], day["condition"]) == ("COMPLETE", "degraded")
    assert any("forced by" in reason for reason in day["condition_reasons"])
    stage.dates.clear()  # nothing is claimed of it, so there is nothing to judge


@scenario(
    "D12",
    "typing errors, a missing secret, a wrong feed",
    "exit 8 before anything runs",
    started=False,
    ends=False,
    quick=True,
)
def wrong_configuration(stage: Stage) -> None:
    """Each is named, and no process of the day is started."""
    path = stage.house.exchanges / "environments" / f"{ENV}.yaml"
    good = yaml.safe_load(path.read_text())
    wrong: list[tuple[dict[str, object], str]] = [
        ({"feed": "kalshy"}, "kalshy"),
        ({"captur": {}}, "captur"),
        ({"schedule": {**good["schedule"], "day_end": "25:00"}}, "25:00"),
        ({"capture": {**good["capture"], "channels": ["trades"]}}, "trades"),
        ({"storage": {"type": "tape"}}, "storage"),
    ]
    for change, words in stage.random.sample(wrong, len(wrong)):
        path.write_text(yaml.safe_dump({**good, **change}, sort_keys=False))
        done = stage.house.ssmd("day", "start", ENV, check=8)
        assert words in done.stderr
    path.write_text(yaml.safe_dump(good, sort_keys=False))
    fields = good["keys"]["kalshi"]["fields"]
    unset = {**good["keys"]["kalshi"], "fields": {**fields, "key_id": "NOBODY_HAS_SET"}}
    path.write_text(yaml.safe_dump({**good, "keys": {**good["keys"], "kalshi": unset}}, sort_keys=False))
    done = stage.house.ssmd("day", "start", ENV, check=8)
    assert "NOBODY_HAS_SET" in done.stderr
    path.write_text(yaml.safe_dump(good, sort_keys=False))
    assert stage.pid(CONNECTOR) is None
    assert stage.pid(ARCHIVER) is None


@scenario("W2", "power cut of the whole host", "recover; only what no socket was up for is missing, and declared")
def power_cut(stage: Stage) -> None:
    """Everything is killed at once; the stream, the spool's end and the cache's file lose what was not on the disk."""
    store = _raw_store(stage)
    copy = stage.folder / "copy"
    stage.nats.pause()
    shutil.copytree(store, copy)
    stage.nats.resume()
    stage.flows(300)
    since = time.monotonic()
    supervisor = int(stage.wait(lambda: stage.pid("supervisor.supervisord"), "the supervisor"))
    os.kill(supervisor, signal.SIGKILL)
    for words in (CONNECTOR, ARCHIVER, "capture.gateway", "ssmd_dagster.simulator"):
        with contextlib.suppress(AssertionError, ProcessLookupError):
            if (pid := stage.pid(words)) is not None:
                os.kill(pid, signal.SIGKILL)
    stage.nats.kill()
    stage.valkey.kill()
    shutil.rmtree(store)
    shutil.copytree(copy, store)
    newest = max(stage.spool_folder().glob("*.batches"), key=lambda path: path.stat().st_mtime_ns)
    data = newest.read_bytes()
    with newest.open("ab") as file:
        file.write(data[: stage.random.randrange(1, 400)])
    aof = max((stage.valkey.folder / "appendonlydir").glob("*.incr.aof"), key=lambda path: path.stat().st_mtime_ns)
    with aof.open("r+b") as file:
        file.truncate(max(0, aof.stat().st_size - stage.random.randrange(1, 4000)))
    stage.pause(0.5, 2.0)
    stage.nats.start()
    stage.valkey.start()
    stage.house.up(ENV)
    stage.wait(lambda: stage.house.json("day", "status", ENV)["state"] == "ERROR", "the last heartbeats to expire", 60)
    stage.recover()
    stage.recovered(since)
    assert "process_crash" in {gap["cause"] for gap in stage.shown()["gaps"]}
