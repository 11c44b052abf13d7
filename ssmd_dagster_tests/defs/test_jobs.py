"""The jobs in process, on real servers and a simulated exchange: what they do to a day, and what they say when they fail."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from datetime import date, timedelta
from pathlib import Path
from typing import Any

import dagster as dg
import pytest

from ssmd_dagster.capture.archiver import COMPONENT as ARCHIVER
from ssmd_dagster.day.folding import StaleEpochError
from ssmd_dagster.defs.build import build_definitions
from ssmd_dagster.defs.resources import DaySession
from ssmd_dagster.environments.home import segments_dir
from ssmd_dagster.environments.loader import load_registry
from ssmd_dagster.workflows import roll, start
from ssmd_dagster.workflows.desk import Desk, report_nothing
from ssmd_dagster_tests.house import House, until

START_STEPS = ["secmaster", "connector", "archiver", "gateway", "health"]


@pytest.fixture
def in_house(house: House, monkeypatch: pytest.MonkeyPatch) -> House:
    """The house's folders for this process, in which the jobs run."""
    monkeypatch.setenv("SSMD_HOME", str(house.home))
    monkeypatch.setenv("SSMD_EXCHANGES", str(house.exchanges))
    return house


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Starts give an archiver that keeps dying five seconds in place of a minute."""
    patient = start.wait_for_heartbeat

    async def wait(desk: Desk, date: str, name: str, ready: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
        return await patient(desk, date, name, ready, 5.0 if name == ARCHIVER else start.UP_TIMEOUT_S)

    monkeypatch.setattr(start, "wait_for_heartbeat", wait)


@pytest.fixture
def instance() -> Iterator[dg.DagsterInstance]:
    """An instance with storage of its own on disk."""
    with dg.instance_for_test() as instance:
        yield instance


def job_of(env: str, verb: str) -> dg.JobDefinition:
    """Return a job as Dagster loads it."""
    return build_definitions(load_registry()).resolve_job_def(f"{env.replace('-', '_')}_{verb}_day")


def run(env: str, verb: str, day: str | None, **options: Any) -> dg.ExecuteInProcessResult:
    """Run a job for a day the way the UI launches it: by tag, which Dagster does not check."""
    tags = {} if day is None else {"dagster/partition": day}
    return job_of(env, verb).execute_in_process(tags=tags, raise_on_error=False, **options)


def failures(result: dg.ExecuteInProcessResult | dg.JobExecutionResult) -> dict[str, tuple[str, dict[str, Any]]]:
    """Return description and metadata of each op's failure."""
    found = {}
    for event in result.all_events:
        if event.is_step_failure and (data := event.step_failure_data.user_failure_data) is not None:
            metadata = {label: value.value for label, value in data.metadata.items()}
            found[str(event.step_key)] = (str(data.description), metadata)
    return found


def outputs(result: dg.ExecuteInProcessResult | dg.JobExecutionResult) -> dict[str, dict[str, Any]]:
    """Return the metadata of each op's output."""
    return {
        str(event.step_key): {label: value.value for label, value in event.step_output_data.metadata.items()}
        for event in result.all_events
        if event.is_successful_output
    }


def break_archiver(house: House, env: str) -> Path:
    """Put a file where the archiver wants its folder; without it the archiver runs again."""
    folder = segments_dir(house.home, env, house.today()).parent
    folder.parent.mkdir(mode=0o700, exist_ok=True)
    folder.write_text("in the way")
    return folder


def test_a_day_is_started_and_ended(in_house: House, simulated: str) -> None:
    """Each op does its step; the outputs show state, epoch, counts and the ledger; doing it again changes nothing."""
    day = in_house.today()
    started = run(simulated, "start", day)
    assert started.success
    shown = outputs(started)
    assert list(shown) == ["take_day", "sync", "capture", "archive", "gateway", "health"]
    assert (shown["take_day"]["state"], shown["health"]["state"]) == ("STARTING", "ACTIVE")
    assert "markets" in shown["sync"]["Syncing security master"]
    epoch = shown["health"]["epoch"]

    again = run(simulated, "start", day)
    assert again.success
    assert outputs(again)["health"] == {"day": day, "state": "ACTIVE", "epoch": epoch, "already": True}

    until(lambda: in_house.day(simulated, day)["messages"] > 200)
    ended = run(simulated, "end", day)
    assert ended.success
    shown = outputs(ended)
    assert list(shown) == ["drain", "flush", "stop_capture", "verify", "complete"]
    complete = shown["complete"]
    assert (complete["state"], complete["condition"], complete["gaps"]) == ("COMPLETE", "available", 0)
    assert complete["archive"].endswith("/".join(["kalshi", *day.split("-"), ""]))
    ledger = {record.data["channel"]: record.data for record in complete["ledger"].records}
    assert {"trade", "ticker", "orderbook_delta", "session"} <= ledger.keys()
    assert all(sheet["received"] == sheet["archived"] > 0 for sheet in ledger.values())
    assert outputs(run(simulated, "end", day))["complete"]["already"] is True

    seen = in_house.day(simulated, day)
    assert (seen["state"], seen["messages"], str(seen["epoch"])) == ("COMPLETE", complete["messages"], epoch)
    assert [step["step"] for step in seen["steps"]][: len(START_STEPS)] == START_STEPS


def test_a_roll_starts_the_next_day_and_ends_the_partition(in_house: House, simulated: str) -> None:
    """The partition is the day that ends, once the next one is up; a second roll of it finds everything done."""
    day = in_house.today()
    following = (date.fromisoformat(day) + timedelta(days=1)).isoformat()
    assert run(simulated, "start", day).success
    rolled = run(simulated, "roll", day)
    assert rolled.success
    shown = outputs(rolled)
    assert list(shown)[5:7] == ["health", "drain"]
    assert (shown["health"]["day"], shown["health"]["state"]) == (following, "ACTIVE")
    assert (shown["complete"]["day"], shown["complete"]["state"]) == (day, "COMPLETE")
    again = outputs(run(simulated, "roll", day))
    assert again["complete"]["already"] is again["health"]["already"] is True
    in_house.ssmd("day", "end", simulated, "--date", following)


def test_a_recovery_finishes_what_was_cut_off_and_leaves_alone_what_runs(in_house: House, simulated: str) -> None:
    """The job brings a killed start to ACTIVE; a second one finds nothing to do."""
    day = in_house.today()
    in_house.ssmd("day", "start", simulated, check=-9, SSMD_CRASH_AT="start.connector.after")
    until(lambda: run(simulated, "recover", day).success)
    assert in_house.day(simulated, day)["state"] == "ACTIVE"
    again = outputs(run(simulated, "recover", day))
    assert again["recover"]["already"] is True
    in_house.ssmd("day", "end", simulated)


@pytest.mark.long
@pytest.mark.usefixtures("impatient")
def test_a_day_that_failed_to_start_does_not_keep_the_next_one_from_being_recorded(
    in_house: House, simulated: str, instance: dg.DagsterInstance, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At its boundary the roll leads on from it: the next day is ACTIVE, and of the FAILED one there is nothing to end."""
    monkeypatch.setattr(roll, "_nearly_over", lambda _desk, _date: True)
    day = in_house.today()
    following = (date.fromisoformat(day) + timedelta(days=1)).isoformat()
    obstacle = break_archiver(in_house, simulated)
    assert not run(simulated, "start", day).success
    obstacle.unlink()
    rolled = run(simulated, "roll", day, instance=instance)
    assert rolled.success
    assert outputs(rolled)["health"]["day"] == following
    assert (outputs(rolled)["complete"]["state"], outputs(rolled)["complete"]["already"]) == ("FAILED", True)
    by_hand = run(simulated, "end", day)
    assert f"trading day {day} is FAILED and never was ACTIVE" in failures(by_hand)["drain"][0]
    in_house.ssmd("day", "end", simulated, "--date", following)


def rebuilt_job(env: str, verb: str) -> dg.JobDefinition:
    """Return a job in whichever process runs it; named by `re_executed`."""
    return job_of(env, verb)


def re_executed(env: str, verb: str, day: str, run_id: str, instance: dg.DagsterInstance) -> dg.JobExecutionResult:
    """Re-execute a run from its failure, as the UI's button does."""
    job = dg.build_reconstructable_job(__name__, rebuilt_job.__name__, (env, verb))  # type: ignore[arg-type] # any tuple
    options = dg.ReexecutionOptions.from_failure(run_id, instance)
    with dg.execute_job(job, instance, tags={"dagster/partition": day}, reexecution_options=options) as result:
        return result


@pytest.mark.usefixtures("impatient")
@pytest.mark.long
def test_a_re_execution_from_failure_takes_the_day_under_a_new_epoch(
    in_house: House, simulated: str, instance: dg.DagsterInstance
) -> None:
    """A run that fails in `archive` leaves the day FAILED; re-executed, it redoes what came before and ends ACTIVE."""
    day = in_house.today()
    obstacle = break_archiver(in_house, simulated)
    failed = run(simulated, "start", day, instance=instance)
    ((step, (text, metadata)),) = failures(failed).items()
    assert step == "archive"
    assert "archiver is not ready" in text
    assert metadata["exit_code"] == 7
    assert metadata["command"] == f"ssmd day start {simulated} --date {day}"
    before = in_house.day(simulated, day)
    assert (before["state"], before["failed_step"]) == ("FAILED", "archiver")
    obstacle.unlink()

    again = re_executed(simulated, "start", day, failed.run_id, instance)
    assert again.success
    assert list(outputs(again)) == ["archive", "gateway", "health"]
    after = in_house.day(simulated, day)
    assert (after["state"], after["epoch"] > before["epoch"]) == ("ACTIVE", True)
    assert [step["step"] for step in after["steps"]] == START_STEPS
    assert all(str(after["epoch"]) == shown["epoch"] for shown in outputs(again).values())
    in_house.ssmd("day", "end", simulated)


def test_a_run_that_stops_between_two_steps_fails_its_day(in_house: House, simulated: str) -> None:
    """A run of the first op alone takes the day and leaves it FAILED, without a lease, free for the next start."""
    day = in_house.today()
    assert run(simulated, "start", day, op_selection=["take_day"]).success
    left = in_house.day(simulated, day)
    assert (left["state"], left["error"]) == ("FAILED", "interrupted before secmaster")
    assert run(simulated, "start", day).success
    in_house.ssmd("day", "end", simulated)


def test_a_run_of_a_schedule_is_refused_where_somebody_has_paused_since(in_house: House, simulated: str) -> None:
    """It was launched before, or the schedule could not look; a person's run works all the same."""
    day = in_house.today()
    in_house.ssmd("env", "pause", simulated, "--reason", "moving house")
    by_schedule = {"dagster/partition": day, "dagster/schedule_name": f"{simulated}_start_day_schedule"}
    refused = job_of(simulated, "start").execute_in_process(tags=by_schedule, raise_on_error=False)
    assert list(failures(refused)) == ["take_day"]
    text, metadata = failures(refused)["take_day"]
    assert "paused by" in text
    assert "moving house" in text
    assert (metadata["exit_code"], metadata["command"]) == (5, f"ssmd day status {simulated}")
    assert run(simulated, "start", day).success
    in_house.ssmd("day", "end", simulated)


@pytest.mark.parametrize("ending", ["it goes on", pytest.param("it stops", marks=pytest.mark.long)])
def test_a_run_whose_day_was_taken_by_another_leaves_it_alone(in_house: House, simulated: str, ending: str) -> None:
    """A run that has lost its lease neither goes on nor stops anything once another attempt has the day."""
    day = in_house.today()
    late = DaySession(simulated, "late", rolls=False)
    attempt = late.begin("start", day, report_nothing)
    late._background.run(attempt.close(), report_nothing)  # as if its lease had run out
    assert run(simulated, "start", day).success
    active = in_house.day(simulated, day)
    if ending == "it goes on":
        with pytest.raises(StaleEpochError):
            late.step("start", day, "connector", report_nothing)
    late.close(report_nothing)
    after = in_house.day(simulated, day)
    assert (after["state"], after["epoch"]) == ("ACTIVE", active["epoch"])
    assert after["components"].keys() >= {"archiver"}
    in_house.ssmd("day", "end", simulated)


@pytest.mark.parametrize(
    ("day", "exit_code", "said"),
    [
        (None, 2, "this run names no trading day"),
        ("yesterday", 2, "not a date: 'yesterday'"),
        ("2020-01-01", 4, "there is no trading day 2020-01-01. The calendar goes from 2025-12-01 to "),
        ("2031-01-01", 4, "there is no trading day 2031-01-01"),
    ],
)
@pytest.mark.parametrize(("verb", "first"), [("start", "take_day"), ("end", "drain")])
def test_a_partition_that_is_no_day_fails_in_the_first_op(
    in_house: House, env_name: str, verb: str, first: str, day: str | None, exit_code: int, said: str
) -> None:
    """Dagster launches any partition, or none; the first op says what is wrong, and nothing else is done."""
    in_house.add(env_name, simulator={"seed": 1})
    result = run(env_name, verb, day)
    ((step, (text, metadata)),) = failures(result).items()
    assert (step, metadata["exit_code"]) == (first, exit_code)
    assert said in text
    assert not outputs(result)


def test_servers_that_do_not_run_are_a_failure_of_the_first_op(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without `ssmd up` the first op says so; it is no error of the resource."""
    house = House.build(tmp_path)
    house.add("quiet", simulator={"seed": 1})
    monkeypatch.setenv("SSMD_HOME", str(house.home))
    monkeypatch.setenv("SSMD_EXCHANGES", str(house.exchanges))
    for verb, first in (("start", ["take_day"]), ("roll", ["take_day"])):
        failed = failures(run("quiet", verb, house.today()))
        assert list(failed) == first
        for text, metadata in failed.values():
            assert "Run `ssmd up`" in text
            assert metadata["exit_code"] == 7


def test_a_configuration_that_broke_since_loading_is_a_failure_of_the_first_op(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run reads the YAML again: its faults are the op's failure, with the command that lists them."""
    house = House.build(tmp_path)
    house.add("quiet", simulator={"seed": 1})
    monkeypatch.setenv("SSMD_HOME", str(house.home))
    monkeypatch.setenv("SSMD_EXCHANGES", str(house.exchanges))
    job = job_of("quiet", "start")
    house.add("quiet", simulator={"seed": -1})
    with dg.instance_for_test() as instance:
        result = job.execute_in_process(partition_key=house.today(), raise_on_error=False, instance=instance)
        record = instance.get_run_by_id(result.run_id)
    text, metadata = failures(result)["take_day"]
    assert "simulator.seed: got -1" in text
    assert record is not None
    assert record.tags["ssmd/result"].startswith("failed: 1 fault in the configuration")
    assert (metadata["exit_code"], metadata["command"]) == (8, "ssmd env validate quiet")
