"""The sensors of the code location. Each looks at all environments side by side and decides nothing by itself.

* `journal`: every transition of every day goes into the asset catalog, and to the alerts where it is worth one.
* `health`: an ACTIVE day in trouble becomes ERROR, and its recovery is asked for.
* `reconcile`: the days that should exist against the journal: starts, rolls, ends and replays what is not as it should be.
* `failed_runs`, `cancelled_runs`: what a run that was killed could not say itself.
* `moved_clocks`: the schedules of simulated environments whose clock is not the host's; see `moved`.

A sensor's cursor is JSON by environment, so that trouble in one leaves the others' place alone. An environment that cannot be
looked at is named in the tick's message, and told to the alerts once.
"""

# No `from __future__ import annotations`: Dagster compares the annotation of `context` with its own class.

import json
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import dagster as dg
import msgspec

from ssmd_dagster.day.reconcile import Ask, Flag, Plan, Run, command_of, permission
from ssmd_dagster.defs.assets import is_judged, is_made, materialisations, observation
from ssmd_dagster.defs.checks import evaluations
from ssmd_dagster.defs.lost import fail_lost_runs
from ssmd_dagster.defs.moved import moved_clocks_sensor
from ssmd_dagster.defs.partitions import request_run
from ssmd_dagster.defs.watch import Found, Watch
from ssmd_dagster.environments.home import ssmd_home
from ssmd_dagster.environments.models import Environment
from ssmd_dagster.errors import SsmdError
from ssmd_dagster.workflows import alerts
from ssmd_dagster.workflows.alerts import Alert, Target
from ssmd_dagster.workflows.desk import Desk
from ssmd_dagster.workflows.drawing import draw
from ssmd_dagster.workflows.follow import Follower, Look, News, Place
from ssmd_dagster.workflows.health import Health, look_after
from ssmd_dagster.workflows.holdings import Holdings, holdings
from ssmd_dagster.workflows.reconcile import CANCELLED, FAILED, at_work, reconcile, run_ended

JOURNAL_EVERY_S, HEALTH_EVERY_S, RECONCILE_EVERY_S, RUNS_EVERY_S = 5, 15, 30, 15
OLD_NEWS_S = 3600
"""Nobody is alerted to older events that were in the journal before its reading began: a new Dagster reads all of it."""
MOST_RUNS = 250
JOURNAL = "sensor:journal"
BLIND_AFTER = 3
"""Looks in a row that must fail before somebody is told that an environment cannot be seen."""

_UNFINISHED = [status for status in dg.DagsterRunStatus if status not in (
    dg.DagsterRunStatus.SUCCESS, dg.DagsterRunStatus.FAILURE, dg.DagsterRunStatus.CANCELED,
)]  # fmt: skip

CatalogEvent = dg.AssetObservation | dg.AssetMaterialization | dg.AssetCheckEvaluation
Shown = tuple[Holdings, dict[str, str]]
"""What the store holds of a finished day, and its pictures."""

Environments = Mapping[str, Environment]
Targets = Mapping[str, Sequence[Target]]
"""Where the messages of each environment go."""


def sensors_of(
    environments: Environments, jobs: Mapping[str, Mapping[str, dg.JobDefinition]], watch: Watch, targets: Targets
) -> list[dg.SensorDefinition]:
    """Return all sensors; `jobs` are the jobs of each environment by verb."""
    acting = {name: environment for name, environment in environments.items() if environment.enabled}
    sensors: list[dg.SensorDefinition] = [_journal_sensor(environments, watch, targets)]
    if acting:
        sensors.append(_health_sensor(acting, jobs, watch))
        sensors.append(_reconcile_sensor(acting, jobs, watch, targets))
    if simulated := {name: environment for name, environment in acting.items() if environment.simulator is not None}:
        sensors.append(moved_clocks_sensor(simulated, jobs, watch))
    if environments:
        sensors += _run_sensors(environments, watch)
    return sensors


def broken_sensor(slug: str, faults: str) -> dg.SensorDefinition:
    """Return the sensor of an environment whose configuration is broken: it fails with what is wrong."""

    @dg.sensor(
        name=f"{slug}_configuration",
        minimum_interval_seconds=300,
        default_status=dg.DefaultSensorStatus.RUNNING,
        description=f"The configuration of this environment cannot be used, so it has no jobs:\n\n{faults}\n\nCorrect it, "
        "then reload the code location.",
    )
    def configuration() -> dg.SkipReason:
        raise dg.Failure(description=faults, allow_retries=False)

    return configuration


# journal -----------------------------------------------------------------------------------------------------------------


def _journal_sensor(environments: Environments, watch: Watch, targets: Targets) -> dg.SensorDefinition:
    followers = {name: Follower() for name in environments}

    @dg.sensor(
        name="journal",
        minimum_interval_seconds=JOURNAL_EVERY_S,
        default_status=dg.DefaultSensorStatus.RUNNING,
        description="Puts what happens to trading days into the asset catalog, whoever did it: Dagster, the command line, a "
        "process. Its cursor is, per environment, the last event's sequence and hash.",
    )
    def journal(context: dg.SensorEvaluationContext) -> dg.SensorResult:
        # A number alone was the cursor before hashes were kept.
        cursor = msgspec.json.decode(context.cursor or "{}", type=dict[str, Place | int])
        places = {name: Place(seq=at) if isinstance(at, int) else at for name, at in cursor.items()}

        async def look(desk: Desk) -> tuple[list[CatalogEvent], list[Alert], Place]:
            seen = await followers[desk.env].look(desk, places.get(desk.env))
            shown: dict[str, Shown] = {}
            for entry in seen.news:
                if entry.day is not None and is_made(entry):
                    held = await holdings(desk, entry.event.date)
                    shown[entry.event.date] = held, await draw(desk, entry.day, held)
            # Whatever goes wrong with the events of one environment is found out here, where it stays its own trouble.
            told = _worth_telling(desk, seen)
            return _catalog(environments[desk.env], seen.news, shown), told, seen.place

        found = watch.look(environments, look, actor=JOURNAL)
        events: list[CatalogEvent] = []
        for name, answer in found.items():
            if answer.value is None:
                continue
            shown, told, places[name] = answer.value
            events += shown
            alerts.send(told, targets[name])
        return dg.SensorResult(
            asset_events=events,
            skip_reason=_said(
                f"{len(events)} events put into the catalog" if events else "nothing new", found, environments
            ),
            cursor=msgspec.json.encode(places, order="sorted").decode(),
        )

    return journal


def _catalog(environment: Environment, news: Iterable[News], held: Mapping[str, Shown]) -> list[CatalogEvent]:
    events: list[CatalogEvent] = []
    for entry in news:
        events.append(observation(environment, entry))
        day = entry.day
        if day is not None and is_made(entry):
            events += materialisations(environment, day, *held[day.date])
        if day is not None and is_judged(entry):
            events += evaluations(environment, day)
    return events


def _worth_telling(desk: Desk, seen: Look) -> list[Alert]:
    now_ns = desk.setting.clock()
    old_ns = now_ns - OLD_NEWS_S * 1_000_000_000
    fresh = [entry for entry in seen.news if entry.seq > seen.place.old_seq or entry.event.at_ns > old_ns]
    over = {entry.day.date: desk.window(entry.day).close_ns <= now_ns for entry in fresh if entry.day is not None}
    told = [alerts.of_event(entry.event, entry.day, over=over.get(entry.event.date, False)) for entry in fresh]
    if seen.lost is not None:
        told.insert(0, _begun_anew(desk.env, seen.lost))
    return [alert for alert in told if alert is not None]


def _begun_anew(name: str, lost: Place) -> Alert:
    cause = f"it is not the one that was read up to sequence {lost.seq}: restored, or made anew. It is read from its beginning"
    return alerts.blind(name, "the journal", cause, f"ssmd day history {name}")


# health ------------------------------------------------------------------------------------------------------------------


def _health_sensor(
    environments: Environments, jobs: Mapping[str, Mapping[str, dg.JobDefinition]], watch: Watch
) -> dg.SensorDefinition:
    @dg.sensor(
        name="health",
        minimum_interval_seconds=HEALTH_EVERY_S,
        default_status=dg.DefaultSensorStatus.RUNNING,
        jobs=[jobs[name]["recover"] for name in environments],
        description="Looks after ACTIVE days: heartbeats, last frame, lag, and whether the exchange says that it is open. A "
        "trouble seen twice makes the day an ERROR with its cause, and its recovery is asked for, with pauses.",
    )
    def health(context: dg.SensorEvaluationContext) -> dg.SensorResult:
        cursor: dict[str, dict[str, int]] = json.loads(context.cursor or "{}")

        async def look(desk: Desk) -> tuple[Health, bool]:
            done = await look_after(desk, cursor.get(desk.env, {}))
            return done, desk.book.book.paused is not None

        found = watch.look(environments, look, actor="sensor:health")
        if all(answer.value is None for answer in found.values()):
            # The one tick that shows a stack that is down: a skipped one looks in the UI as if all were well.
            raise dg.Failure(description=str(_said("", found, environments).skip_message), allow_retries=False)
        requests: list[dg.RunRequest] = []
        said: list[str] = []
        for name, answer in found.items():
            if answer.value is None:
                continue
            done, is_paused = answer.value
            cursor[name] = done.seen
            said += [f"{name} {warning}" for warning in done.warnings]
            for date, cause in done.recover.items():
                if is_paused:
                    said.append(f"{name} {date} is in ERROR and the environment is paused: {cause}")
                    continue
                ask = Ask(verb="recover", date=date, why=cause)
                requests += _requested(context.instance, environments[name], ask, said, [])
        return dg.SensorResult(
            run_requests=requests,
            skip_reason=None if requests else _said("; ".join(said) or "all well", found, environments),
            cursor=json.dumps(cursor, sort_keys=True),
        )

    return health


# reconcile ---------------------------------------------------------------------------------------------------------------


def _reconcile_sensor(
    environments: Environments,
    jobs: Mapping[str, Mapping[str, dg.JobDefinition]],
    watch: Watch,
    targets: Targets,
) -> dg.SensorDefinition:
    @dg.sensor(
        name="reconcile",
        minimum_interval_seconds=RECONCILE_EVERY_S,
        default_status=dg.DefaultSensorStatus.RUNNING,
        jobs=[job for name in environments for job in jobs[name].values()],
        description="Holds the days that should exist against the journal, and asks for what is missing: a start, a roll, an "
        "end, a replay. A day that was cut off is finished, one that nobody started is marked, none is forgotten.",
    )
    def reconcile_days(context: dg.SensorEvaluationContext) -> dg.SensorResult:
        cursor: dict[str, Any] = json.loads(context.cursor or "{}")
        told: dict[str, list[str]] = cursor.get("told", {})
        blind: dict[str, int] = cursor.get("blind", {})
        said = _lost_runs(context.instance)

        async def look(desk: Desk) -> Plan:
            # Their sensor may have looked before the lease was gone; what was cancelled is not to be asked for again.
            for actor in await at_work(desk):
                if _is_cancelled(context.instance, actor):
                    await run_ended(desk, actor, CANCELLED)
            return await reconcile(desk)

        found = watch.look(environments, look, actor="sensor:reconcile")
        requests: list[dg.RunRequest] = []
        for name, answer in found.items():
            error = answer.error or watch.latest_error(name, JOURNAL)  # which nobody would hear of otherwise
            blind[name] = 0 if error is None else blind.get(name, 0) + 1
            if error is not None and blind[name] == BLIND_AFTER:
                who = (
                    "the sensors cannot look at it"
                    if answer.value is None
                    else "the sensor `journal` cannot look at it"
                )
                alerts.send([alerts.blind(name, who, str(error), f"ssmd day status {name}")], targets[name])
            if answer.value is None:
                continue
            made = answer.value
            if made.paused is not None:
                said.append(f"{name} is {made.paused}")
                continue
            said += [f"{name} {entry.date}: {entry.reason}" for entry in made.missed]
            said += [f"{name}: {text}" for text in made.waiting]
            said += [f"{name} {flag.date} is {flag.kind}: {flag.cause} ({flag.command})" for flag in made.flags]
            flags = list(made.flags)
            for ask in made.asks:
                if ask.verb in jobs[name]:
                    requests += _requested(context.instance, environments[name], ask, said, flags)
            _tell(name, flags, told, targets[name])
        return dg.SensorResult(
            run_requests=requests,
            skip_reason=None
            if requests
            else _said("; ".join(said) or "all days are as they should be", found, environments),
            cursor=json.dumps({"told": told, "blind": blind}, sort_keys=True),
        )

    return reconcile_days


def _lost_runs(instance: dg.DagsterInstance) -> list[str]:
    """Fail runs whose process is gone; a home that cannot be used is every environment's own trouble, and said there."""
    try:
        return fail_lost_runs(instance, ssmd_home())
    except (SsmdError, OSError) as error:
        return [f"runs cannot be looked after: {error}"]


def _tell(name: str, flags: Sequence[Flag], told: dict[str, list[str]], targets: Sequence[Target]) -> None:
    """Send what is flagged, each thing once for as long as it stays."""
    flagged = {f"{flag.date} {flag.kind}": flag for flag in flags}
    before = told.get(name, [])
    alerts.send([alerts.of_flag(name, flag) for mark, flag in flagged.items() if mark not in before], targets)
    told[name] = sorted(flagged)


def _is_cancelled(instance: dg.DagsterInstance, actor: str) -> bool:
    run = instance.get_run_by_id(actor.removeprefix("dagster:")) if actor.startswith("dagster:") else None
    return run is not None and run.status is dg.DagsterRunStatus.CANCELED


# runs --------------------------------------------------------------------------------------------------------------------


def _run_sensors(environments: Environments, watch: Watch) -> list[dg.SensorDefinition]:
    def tell(run: dg.DagsterRun, outcome: str) -> dg.SkipReason:
        name = run.tags.get("ssmd/environment", "")
        if name not in environments:
            return dg.SkipReason(f"{run.job_name} is no job of an environment")
        found = watch.look([name], lambda desk: run_ended(desk, f"dagster:{run.run_id}", outcome), actor="sensor:runs")[
            name
        ]
        if found.value is None:
            return dg.SkipReason(f"{name} cannot be told: {found.error}; reconcile finds the day later")
        return dg.SkipReason("; ".join(found.value) or "the run has said itself what came of it")

    @dg.run_failure_sensor(
        name="failed_runs",
        minimum_interval_seconds=RUNS_EVERY_S,
        default_status=dg.DefaultSensorStatus.RUNNING,
        description="Tells the days' machine of runs that failed without a word: killed, or out of time.",
    )
    def failed_runs(context: dg.RunFailureSensorContext) -> dg.SkipReason:
        return tell(context.dagster_run, FAILED)

    @dg.run_status_sensor(
        run_status=dg.DagsterRunStatus.CANCELED,
        name="cancelled_runs",
        minimum_interval_seconds=RUNS_EVERY_S,
        default_status=dg.DefaultSensorStatus.RUNNING,
        description="Tells the days' machine of runs that were cancelled and could not say so. They are not asked for again.",
    )
    def cancelled_runs(context: dg.RunStatusSensorContext) -> dg.SkipReason:
        return tell(context.dagster_run, CANCELLED)

    return [failed_runs, cancelled_runs]


# asking for runs ---------------------------------------------------------------------------------------------------------


def _requested(
    instance: dg.DagsterInstance, environment: Environment, ask: Ask, said: list[str], flags: list[Flag]
) -> list[dg.RunRequest]:
    """Return the request that an ask becomes now, or say why it becomes none; one that is given up is flagged, too."""
    job = f"{environment.slug}_{ask.verb}_day"
    runs = runs_of(instance, job, ask.date)
    allowed = permission(ask.verb, runs, time.time())
    if allowed.given_up:
        cause, command = f"{ask.why}; {allowed.why_not}", command_of(ask.verb, environment.name, ask.date)
        flags.append(Flag(date=ask.date, kind="stuck", cause=cause, command=command))
    why_not = allowed.why_not or _in_the_way(instance, environment, ask)
    if why_not:
        said.append(f"{environment.name} {ask.date} needs {ask.verb} ({ask.why}): {why_not}")
        return []
    # Dagster passes over the key of any run that there is. A run of this one would be newer than the newest.
    newest = next((run.run_id for run in runs), "first")
    run_key = f"{environment.name}:{ask.date}:{ask.verb}:{newest}"
    return [request_run(ask.date, run_key, job, {"ssmd/why": ask.why[:250], "ssmd/attempt": str(allowed.attempt)})]


def runs_of(instance: dg.DagsterInstance, job: str, date: str) -> list[Run]:
    """Return the runs of a job for a partition, newest first."""
    runs = dg.RunsFilter(job_name=job, tags={"dagster/partition": date})
    records = instance.get_run_records(runs, limit=MOST_RUNS)
    return [
        Run(
            run_id=record.dagster_run.run_id,
            ended_s=None
            if record.dagster_run.status in _UNFINISHED
            else record.end_time or record.update_timestamp.timestamp(),
            succeeded=record.dagster_run.status is dg.DagsterRunStatus.SUCCESS,
        )
        for record in records
    ]


def _in_the_way(instance: dg.DagsterInstance, environment: Environment, ask: Ask) -> str:
    """Say which unfinished run makes an ask pointless: one of that very day, or a roll, which starts the next day."""
    unfinished = instance.get_runs(
        dg.RunsFilter(tags={"ssmd/environment": environment.name}, statuses=_UNFINISHED), limit=MOST_RUNS
    )
    for run in unfinished:
        if run.job_name == f"{environment.slug}_sync_markets":
            continue
        if run.tags.get("dagster/partition") == ask.date:
            return f"{run.job_name} of that day is under way"
        if ask.verb == "start" and run.job_name == f"{environment.slug}_roll_day":
            return f"{run.job_name} is under way"
    return ""


def _said(text: str, found: Mapping[str, Found[Any]], environments: Environments) -> dg.SkipReason:
    """Return the tick's message: which environments could not be looked at, and what was found in the others."""
    troubles = [
        f"{name} cannot be looked at: {answer.error}"
        for name, answer in found.items()
        if answer.error is not None and environments[name].enabled
    ]
    if any(answer.error is None for answer in found.values()):
        troubles.append(text)
    return dg.SkipReason("; ".join(troubles) or text)
