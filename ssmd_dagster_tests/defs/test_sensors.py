"""The sensors in process, on real servers: what they put into the catalog, ask for, journal and tell."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Iterator
from datetime import UTC, date, datetime, timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import dagster as dg
import pytest

from ssmd_dagster.capture.programs import day_group
from ssmd_dagster.capture.setting import load_setting
from ssmd_dagster.capture.supervisord import connect_supervisor
from ssmd_dagster.day import health
from ssmd_dagster.day.calendar import Window
from ssmd_dagster.day.events import JournalBrokenError
from ssmd_dagster.day.payloads import ErrorRaised, Failed, StartRequested
from ssmd_dagster.day.reconcile import MOST_TRIES, Ask, Flag, Run
from ssmd_dagster.day.states import EventName
from ssmd_dagster.defs import sensors
from ssmd_dagster.defs.build import build_definitions
from ssmd_dagster.defs.watch import Watch
from ssmd_dagster.environments.loader import load_registry
from ssmd_dagster.workflows.desk import Desk, open_desk
from ssmd_dagster.workflows.follow import Follower, Look, News, Place
from ssmd_dagster.workflows.reconcile import CANCELLED, FAILED, run_ended
from ssmd_dagster_tests.day.builders import ENV, started
from ssmd_dagster_tests.environments.folders import changed
from ssmd_dagster_tests.house import House, until
from ssmd_dagster_tests.workflows.replaying import sim

MARKER = "ssmd_dagster.alerts"


@pytest.fixture
def in_house(house: House, monkeypatch: pytest.MonkeyPatch) -> House:
    """The house's folders for this process, in which the sensors look."""
    monkeypatch.setenv("SSMD_HOME", str(house.home))
    monkeypatch.setenv("SSMD_EXCHANGES", str(house.exchanges))
    return house


class Dagster:
    """A code location and an instance of its own, whose sensors are evaluated one tick at a time."""

    def __init__(self, instance: dg.DagsterInstance, *names: str) -> None:
        self.instance = instance
        self.watch = Watch()
        registry = load_registry()
        kept = {name: registry.environments[name] for name in names}
        self.defs = build_definitions(
            type(registry)(registry.directory, kept, registry.feeds, registry.schemas, ()), watch=self.watch
        )
        self.repository = self.defs.get_repository_def()
        self.cursors: dict[str, str | None] = {}

    def tick(self, sensor: str) -> Any:
        """Evaluate a sensor where its last tick left off."""
        context = dg.build_sensor_context(
            instance=self.instance, cursor=self.cursors.get(sensor), repository_def=self.repository
        )
        found = self.repository.get_sensor_def(sensor).evaluate_tick(context)
        self.cursors[sensor] = found.cursor
        return found


@pytest.fixture
def instance() -> Iterator[dg.DagsterInstance]:
    """An instance with storage of its own."""
    with dg.instance_for_test() as made:
        yield made


@pytest.fixture
def idle(in_house: House, env_name: str) -> str:
    """The name of an environment of its own with a journal and a cache, and no exchange."""
    in_house.add(env_name, keys=None, auth_method="none", endpoint="ws://127.0.0.1:9/ws")
    in_house.up(env_name)
    return env_name


@pytest.fixture
def looking_idly(in_house: House, idle: str, instance: dg.DagsterInstance) -> Iterator[Dagster]:
    """Sensors over one environment without an exchange, and one whose servers are away."""
    yield from _looking(in_house, idle, instance)


@pytest.fixture
def looking(in_house: House, simulated: str, instance: dg.DagsterInstance) -> Iterator[Dagster]:
    """Sensors over one simulated environment whose day was never started, and one whose servers are away."""
    yield from _looking(in_house, simulated, instance)


def _looking(in_house: House, simulated: str, instance: dg.DagsterInstance) -> Iterator[Dagster]:
    in_house.add("away", cache={"type": "redis", "url": "redis://127.0.0.1:9"}, keys=None, auth_method="none")
    made = Dagster(instance, "away", simulated)
    yield made
    made.watch.close()


def write(env: str, *events: tuple[str, EventName, Any]) -> None:
    """Append events to an environment's journal."""

    async def append() -> None:
        async with open_desk(load_setting(env), "cli:test@host") as desk:
            await desk.stores.journal.create()
            for day, event, data in events:
                await desk.book.append(day, event, data=data, reason="test" if event is EventName.MISSED else None)

    asyncio.run(append())


def test_what_the_command_line_does_is_in_the_catalog(
    looking: Dagster, in_house: House, simulated: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Transitions are observations, COMPLETE materialises every asset; each once, whatever else is away."""
    day = in_house.today()
    in_house.ssmd("day", "start", simulated)
    first = looking.tick("journal")
    assert [event.description for event in first.asset_events] == [
        "new → PENDING",
        "PENDING → STARTING",
        "STARTING → ACTIVE",
    ]
    assert "away cannot be looked at" in first.skip_message
    assert all(
        (event.asset_key.path, event.partition) == ([simulated, "trading_day"], day) for event in first.asset_events
    )
    assert looking.tick("journal").asset_events == []

    in_house.ssmd("day", "end", simulated, check=None)
    with caplog.at_level(logging.WARNING, MARKER):
        ended = looking.tick("journal").asset_events
    made = {event.asset_key.path[-1]: event for event in ended if isinstance(event, dg.AssetMaterialization)}
    assert made.keys() == {"trading_day", "security_master", "raw", "trades", "orderbook", "coverage"}
    shown = {name: {label: value.value for label, value in entry.metadata.items()} for name, entry in made.items()}
    assert all(int(str(shown["raw"][label])) > 0 for label in ("dagster/row_count", "size_bytes"))
    assert "data:image/svg+xml" in str(shown["trading_day"]["pictures"])
    table = made["trading_day"].metadata["ledger"]
    assert isinstance(table, dg.TableMetadataValue)
    ledger: dict[Any, Any] = {record.data["channel"]: record.data for record in table.records}
    assert ledger["trade"]["archived"] == ledger["trade"]["received"] > 0
    checks = {event.check_name: event for event in ended if isinstance(event, dg.AssetCheckEvaluation)}
    assert checks.keys() >= {"ledger_balance", "on_time", "book_proofs"}
    assert checks["drift"].passed, checks["drift"].description
    assert len([event for event in ended if isinstance(event, dg.AssetCheckEvaluation)]) == len(checks), "each once"
    assert str(checks["on_time"].description).startswith(day)

    # A code server that is loaded anew goes on where the cursor is; without one it reads the journal from its beginning.
    again = Dagster(looking.instance, simulated)
    again.cursors = dict(looking.cursors)
    assert again.tick("journal").asset_events == []
    sequences = {name: place["seq"] for name, place in json.loads(str(looking.cursors["journal"])).items()}
    again.cursors = {"journal": json.dumps(sequences)}  # as it was before hashes were kept
    assert again.tick("journal").asset_events == []
    again.cursors = {}
    assert len(again.tick("journal").asset_events) == len(first.asset_events) + len(ended)
    again.watch.close()
    # The checks can be executed by hand too, for the latest COMPLETE day.
    job = looking.defs.resolve_implicit_global_asset_job_def()
    keys = [dg.AssetCheckKey(dg.AssetKey([simulated, "raw"]), "ledger_balance")]
    run = job.get_subset(asset_check_selection=set(keys)).execute_in_process(instance=looking.instance)
    (evaluation,) = run.get_asset_check_evaluations()
    assert evaluation.description == checks["ledger_balance"].description


def test_a_day_whose_processes_are_gone_is_in_error_and_recovered(
    looking: Dagster, in_house: House, simulated: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Seen once it is no alarm, seen twice it is ERROR with the cause; paused, nobody recovers it."""
    day = in_house.today()
    in_house.ssmd("day", "start", simulated)
    assert "all well" in looking.tick("health").skip_message

    async def kill() -> None:
        await connect_supervisor(in_house.home).stop(day_group(simulated, day), "archiver")
        async with open_desk(load_setting(simulated), "cli:test@host") as desk:
            await desk.stores.cache.remove_heartbeat(day, "archiver")

    asyncio.run(kill())
    assert not looking.tick("health").run_requests
    monkeypatch.setattr(health, "CONFIRM_S", 0)
    (request,) = looking.tick("health").run_requests
    assert (request.job_name, request.partition_key) == (f"{simulated.replace('-', '_')}_recover_day", day)
    assert request.run_key == f"{simulated}:{day}:recover:first"
    assert request.tags["ssmd/why"] == "archiver gives no heartbeat"
    shown = in_house.day(simulated, day)
    assert (shown["state"], shown["error"]) == ("ERROR", "archiver gives no heartbeat")
    (again,) = looking.tick("health").run_requests
    assert again.run_key == request.run_key, "the same key until there is a run: Dagster asks once"

    in_house.ssmd("env", "pause", simulated, "--reason", "new disks")
    paused = looking.tick("health")
    assert not paused.run_requests
    assert "is paused" in paused.skip_message
    assert "paused by cli:" in looking.tick("reconcile").skip_message
    assert "new disks" in in_house.ssmd("env", "list").stdout
    schedule = looking.repository.get_schedule_def(f"{simulated.replace('-', '_')}_start_day_schedule")
    tick = schedule.evaluate_tick(
        dg.build_schedule_context(
            instance=looking.instance, repository_def=looking.repository, scheduled_execution_time=datetime.now(UTC)
        )
    )
    assert str(tick.skip_message).startswith(f"{simulated} is paused by cli:")
    in_house.ssmd("env", "resume", simulated)
    assert looking.tick("health").run_requests
    in_house.ssmd("day", "recover", simulated)
    in_house.ssmd("day", "end", simulated, check=None)


def test_days_that_nobody_started_are_journaled_and_told(
    looking_idly: Dagster, in_house: House, idle: str, caplog: pytest.LogCaptureFixture
) -> None:
    """The daemon comes back after two days: what is over is missed, today is asked for once, and both are told."""
    today = date.fromisoformat(in_house.today())
    before = [(today - timedelta(days=days)).isoformat() for days in (3, 2, 1)]
    write(
        idle,
        (before[0], EventName.DEFINED, None),
        (before[0], EventName.START_REQUESTED, StartRequested(mode="live")),
        (before[0], EventName.START_FAILED, Failed(error="no answer")),
    )
    with caplog.at_level(logging.WARNING, MARKER):
        asked = looking_idly.tick("reconcile")
        looking_idly.tick("journal")
    requests = {(request.job_name, request.partition_key) for request in asked.run_requests}
    assert (f"{idle.replace('-', '_')}_start_day", today.isoformat()) in requests
    assert [in_house.day(idle, day)["error"] for day in before[1:]] == ["nobody started it, and it is over"] * 2
    told = [record.getMessage() for record in caplog.records if record.name == MARKER]
    assert f"[LATE] {idle} {today}: " in " ".join(told)
    missed = f"[FAILED] {idle} {before[2]}: missed: nobody started it, and it is over | run: ssmd day "
    assert any(line.startswith(missed) for line in told), told
    caplog.clear()
    looking_idly.tick("reconcile")
    assert not [record for record in caplog.records if record.name == MARKER], "told once"


def test_an_end_that_was_killed_is_told_to_its_day_although_another_run_started_it(
    looking_idly: Dagster, in_house: House, idle: str
) -> None:
    """An end goes on in the epoch of the start; the day is still the one that this run was ending."""
    day = in_house.today()

    async def ending() -> list[str]:
        for actor, events in (
            ("dagster:start", (EventName.DEFINED, EventName.START_REQUESTED, EventName.STARTED)),
            ("dagster:end", (EventName.END_REQUESTED,)),
        ):
            async with open_desk(load_setting(idle), actor) as desk:
                await desk.stores.journal.create()
                for event in events:
                    data = StartRequested(mode="live") if event is EventName.START_REQUESTED else None
                    await desk.book.append(day, event, epoch=None if data else await _epoch(desk, day), data=data)
        async with open_desk(load_setting(idle), "sensor:runs") as desk:
            assert await run_ended(desk, "dagster:start", FAILED) == []
            return await run_ended(desk, "dagster:end", CANCELLED)

    assert asyncio.run(ending()) == [f"{day}: the run end was cancelled without a word"]
    assert in_house.day(idle, day)["state"] == "FAILED"


async def _epoch(desk: Desk, date: str) -> int | None:
    day = await desk.book.day(date)
    return None if day is None else day.epoch


def test_a_day_is_asked_for_under_a_key_that_no_run_has(
    instance: dg.DagsterInstance, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Dagster passes over the key of a run that there is: however many there are, and whichever of them were deleted."""

    @dg.op
    def nothing() -> None:
        """Do nothing."""

    @dg.job
    def quiet_recover_day() -> None:
        """Stand for a recovery."""
        nothing()

    monkeypatch.setattr(sensors, "MOST_RUNS", 3)
    monkeypatch.setattr(sensors, "time", SimpleNamespace(time=lambda: 9e9))
    environment: Any = SimpleNamespace(name="quiet", slug="quiet")
    ask = Ask(verb="recover", date="2026-01-01", why="it is in ERROR")
    said: list[str] = []
    (request,) = sensors._requested(instance, environment, ask, said, [])
    made: list[dg.DagsterRun] = []
    for deleted in (False, False, True, False, True):
        assert request.run_key not in [run.tags["dagster/run_key"] for run in made]
        tags = {"dagster/partition": "2026-01-01", "dagster/run_key": str(request.run_key)}
        run = instance.create_run_for_job(quiet_recover_day, tags=tags)
        made.append(run)
        said.clear()
        assert sensors._requested(instance, environment, ask, said, []) == []
        assert said == ["quiet 2026-01-01 needs recover (it is in ERROR): a run of it is queued or running"]
        instance.report_run_failed(run)
        if deleted:
            instance.delete_run(made.pop(0).run_id)
        (request,) = sensors._requested(instance, environment, ask, said, [])
        assert sensors._requested(instance, environment, ask, said, [])[0].run_key == request.run_key


def test_what_is_asked_for_no_more_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """Once its runs have failed so often, a person is told, with the command that does it."""
    monkeypatch.setattr(sensors, "runs_of", lambda *_: [Run(ended_s=0.0, succeeded=False)] * MOST_TRIES["replay"])
    environment: Any = SimpleNamespace(name="quiet", slug="quiet")
    flags: list[Flag] = []
    ask = Ask(verb="replay", date="2026-01-01", why="its end was cut off")
    assert sensors._requested(cast("dg.DagsterInstance", None), environment, ask, [], flags) == []
    assert [(flag.kind, flag.cause, flag.command) for flag in flags] == [
        (
            "stuck",
            "its end was cut off; 3 runs of it failed; a person is needed",
            "ssmd day backfill quiet --from 2026-01-01 --to 2026-01-01",
        )
    ]


def test_a_run_that_was_killed_is_told_to_its_day(looking_idly: Dagster, in_house: House, idle: str) -> None:
    """The day of a run that ended without a word is FAILED with what happened; somebody else's is left alone."""
    day = in_house.today()
    job = looking_idly.defs.resolve_job_def(f"{idle.replace('-', '_')}_start_day")
    run = looking_idly.instance.create_run_for_job(job, tags={"ssmd/environment": idle, "dagster/partition": day})

    async def taken() -> None:
        async with open_desk(load_setting(idle), f"dagster:{run.run_id}") as desk:
            await desk.stores.journal.create()
            await desk.book.append(day, EventName.DEFINED)
            await desk.book.append(day, EventName.START_REQUESTED, data=StartRequested(mode="live"))

    asyncio.run(taken())
    looking_idly.instance.report_run_failed(run)
    sensor = looking_idly.repository.get_sensor_def("failed_runs")
    assert isinstance(sensor, dg.RunStatusSensorDefinition)
    event = next(
        iter(looking_idly.instance.get_records_for_run(run.run_id).records[::-1])
    ).event_log_entry.dagster_event
    assert event is not None
    context = dg.build_run_status_sensor_context(
        "failed_runs", event, looking_idly.instance, run, repository_def=looking_idly.repository
    ).for_run_failure()
    told: Any = sensor(context)
    assert str(told.skip_message) == f"{day}: the run {run.run_id[:8]} failed without a word"
    assert in_house.day(idle, day)["state"] == "FAILED"
    told = sensor(context)
    assert str(told.skip_message) == "the run has said itself what came of it"


def test_a_run_that_was_cancelled_and_killed_is_not_asked_for_again(
    looking_idly: Dagster, in_house: House, idle: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its lease outlives it, and the sensor that is told of it; reconcile finds it later and leaves the day to a person."""
    day = in_house.today()
    job = looking_idly.defs.resolve_job_def(f"{idle.replace('-', '_')}_start_day")
    run = looking_idly.instance.create_run_for_job(job, tags={"ssmd/environment": idle, "dagster/partition": day})

    async def cut_off() -> list[str]:
        async with open_desk(load_setting(idle), f"dagster:{run.run_id}") as desk:
            await desk.stores.journal.create()
            await desk.book.append(day, EventName.DEFINED)
            await desk.book.append(day, EventName.START_REQUESTED, data=StartRequested(mode="live"))
            await desk.stores.cache.acquire(day, desk.owner)
            told = await run_ended(desk, f"dagster:{run.run_id}", CANCELLED)
            await desk.stores.cache.release(day, desk.owner)
        return told

    assert asyncio.run(cut_off()) == []
    looking_idly.instance.report_run_canceled(run)
    monkeypatch.setattr("ssmd_dagster.day.reconcile.STALE_S", -1)
    assert looking_idly.tick("reconcile").run_requests == []
    shown = in_house.day(idle, day)
    assert (shown["state"], shown["error"]) == ("FAILED", f"the run {run.run_id[:8]} was cancelled without a word")


def test_one_environment_in_trouble_is_told_once(
    looking_idly: Dagster, idle: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After three looks in vain the message says which environment cannot be seen; the other one is looked at each time."""
    with caplog.at_level(logging.ERROR, MARKER):
        for _ in range(4):
            tick = looking_idly.tick("reconcile")
            assert "away cannot be looked at" in tick.skip_message
            assert json.loads(tick.cursor)["blind"][idle] == 0
    told = [record.getMessage() for record in caplog.records if record.name == MARKER]
    assert len(told) == 1
    assert told[0].startswith("[BLIND] away: the sensors cannot look at it: ")
    caplog.clear()

    async def broken(*_: object) -> None:
        raise JournalBrokenError(7, "another hash", where=idle)

    monkeypatch.setattr(Follower, "look", broken)
    looking_idly.tick("journal")
    with caplog.at_level(logging.ERROR, MARKER):
        for _ in range(4):
            looking_idly.tick("reconcile")
    told = [record.getMessage() for record in caplog.records if record.name == MARKER]
    assert len(told) == 1
    assert told[0].startswith(f"[BLIND] {idle}: the sensor `journal` cannot look at it: the day journal is broken at")


def test_only_what_was_there_before_a_reading_began_may_be_old_news() -> None:
    """Dagster was away for hours: what failed in the meantime is told. One that is new to a journal tells the last hour's."""
    log = started()
    log.add(EventName.ERROR_RAISED, at_ns=1)
    log.add(EventName.GAVE_UP, at_ns=2)
    news = [News(seq, event, log.day()) for seq, event in log.events]
    window = Window(0, 9_000 * 1_000_000_000)
    fake = SimpleNamespace(env=ENV, setting=SimpleNamespace(clock=lambda: window.close_ns), window=lambda _: window)

    def told(old_seq: int, lost: Place | None = None) -> list[str]:
        place = Place(seq=5, sha256="aa", old_seq=old_seq)
        return [alert.text for alert in sensors._worth_telling(cast("Desk", fake), Look(news, place, lost))]

    assert [text.partition(" ")[0] for text in told(0)] == ["[ERROR]", "[FAILED]"]
    assert [text.partition(" ")[0] for text in told(4)] == ["[FAILED]"]
    assert told(5) == []
    (text,) = told(5, Place(seq=812))
    assert text.startswith(
        f"[BLIND] {ENV}: the journal: it is not the one that was read up to sequence 812: restored, "
    )


def test_a_fault_of_ours_in_one_environment_does_not_silence_the_others(looking_idly: Dagster, idle: str) -> None:
    """Whatever is raised at one desk, and however long it takes, the other answers."""

    async def work(desk: Desk) -> str:
        if desk.env == idle:
            raise ZeroDivisionError("a fault of ours")
        return "never"

    found = looking_idly.watch.look([idle], work, actor="sensor:test")[idle]
    assert str(found.error) == f"unexpected ZeroDivisionError: a fault of ours ({idle})"

    async def slow(desk: Desk) -> str:
        await asyncio.sleep(60)
        return "never"

    slept = looking_idly.watch.look([idle], slow, actor="sensor:test", timeout_s=0.2)[idle]
    assert "no answer within 0.2 s" in str(slept.error)


def test_a_day_that_is_no_partition_yet_is_looked_after(looking_idly: Dagster, in_house: House, idle: str) -> None:
    """Rolled by hand before midnight, tomorrow is under way: its recovery is asked for, and fails nobody's tick."""
    day = (date.fromisoformat(in_house.today()) + timedelta(days=1)).isoformat()
    write(
        idle,
        (day, EventName.DEFINED, None),
        (day, EventName.START_REQUESTED, StartRequested(mode="live")),
        (day, EventName.STARTED, None),
        (day, EventName.ERROR_RAISED, ErrorRaised(error="no heartbeat")),
    )
    (asked,) = looking_idly.tick("health").run_requests
    assert (asked.job_name, asked.tags["dagster/partition"]) == (f"{idle.replace('-', '_')}_recover_day", day)


def test_a_stack_that_is_down_fails_a_tick(looking_idly: Dagster, idle: str, instance: dg.DagsterInstance) -> None:
    """Where no environment can be looked at `health` fails and says why, so that the UI shows it; one that answers is enough."""
    assert "away cannot be looked at" in looking_idly.tick("health").skip_message
    alone = Dagster(instance, "away")
    with pytest.raises(dg.Failure) as caught:
        alone.tick("health")
    assert "away cannot be looked at: no answer" in str(caught.value.description)
    alone.watch.close()


def test_a_broken_environment_has_a_sensor_that_says_so(in_house: House, env_name: str, tmp_path: Path) -> None:
    """It fails with the faults; the others keep their sensors."""
    in_house.add(env_name, simulator={"seed": 1})
    path = in_house.exchanges / "environments" / f"{env_name}.yaml"
    changed(path, {"schedule.day_start": "25:10"})
    repository = build_definitions(load_registry()).get_repository_def()
    sensor = repository.get_sensor_def(f"{env_name.replace('-', '_')}_configuration")
    with pytest.raises(dg.Failure, match="got '25:10'"):
        sensor(dg.build_sensor_context())
    path.unlink()


def test_schedules_of_an_exchange_whose_clock_is_moved_fire_by_that_clock(
    looking: Dagster, in_house: House, simulated: str
) -> None:
    """While its clock is the host's the schedules fire; moved to another day, they say so and the sensor does."""
    slug = simulated.replace("-", "_")
    day = date.fromisoformat(in_house.today()) - timedelta(days=3)
    schedule = looking.repository.get_schedule_def(f"{slug}_start_day_schedule")
    due = datetime.combine(day, datetime.min.time(), in_house.timezone) + timedelta(minutes=10)

    def set_clock(at: datetime) -> None:
        sim(in_house, simulated, "/sim/clock", {"set": at.isoformat()})

    def scheduled() -> Any:
        return schedule.evaluate_tick(
            dg.build_schedule_context(scheduled_execution_time=due, repository_def=looking.repository)
        )

    assert "follows the host's clock" in looking.tick("moved_clocks").skip_message
    (request,) = scheduled().run_requests
    assert request.partition_key == day.isoformat()
    set_clock(due - timedelta(minutes=5))
    until(lambda: "is moved" in (scheduled().skip_message or ""))
    assert looking.tick("moved_clocks").run_requests == []
    set_clock(due)
    (request,) = until(lambda: looking.tick("moved_clocks").run_requests)
    assert (request.job_name, request.partition_key) == (f"{slug}_start_day", day.isoformat())
    assert looking.tick("moved_clocks").run_requests == []
