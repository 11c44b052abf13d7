"""What a run works with: one desk in an event loop of its own, and the attempts at the days that it has taken.

The workflows are asynchronous and keep connections and a lease alive between the ops of a run, so the loop runs in a
thread from the run's first op to its end, and an op hands it one step at a time. Not here: what a step does.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import logging
import math
import threading
import time
from collections.abc import Callable, Coroutine, Iterator
from queue import SimpleQueue
from typing import Any, Literal, TypeVar

import dagster as dg
from pydantic import Field, PrivateAttr

from ssmd_dagster.capture.setting import Setting, load_setting
from ssmd_dagster.day.calendar import parse_date
from ssmd_dagster.day.reconcile import paused_words
from ssmd_dagster.defs.lost import hold
from ssmd_dagster.errors import RefusedError, SsmdError, UnreachableError, UsageError
from ssmd_dagster.workflows.attempt import CLEAN_UP_TIMEOUT_S, Attempt, Options, Verb
from ssmd_dagster.workflows.desk import Desk, Progress, Report, open_desk
from ssmd_dagster.workflows.end import END
from ssmd_dagster.workflows.recover import recovery_of
from ssmd_dagster.workflows.roll import dates_to_roll, starting_of
from ssmd_dagster.workflows.start import START

INTERRUPT_TIMEOUT_S = CLEAN_UP_TIMEOUT_S + 15.0
"""How long a cancelled run waits for its step to tidy up and to journal its failure."""
CANCEL_AGAIN_S = 2.0
TRIES = 2
"""How often a run tries a step that fails for a transient cause; reconcile asks for another run later."""
CONNECT_AGAIN_S = (1.0, 3.0)
"""Pauses before a run connects again to servers that did not answer."""
THREAD_TIMEOUT_S = 5.0
MAX_RUNTIME = "dagster/max_runtime"
"""The tag that says after how many seconds Dagster stops a run."""
LAUNCH_S = 60.0
"""How much later than Dagster, at the most, a run sees itself begin."""

_ASKED_BY_CLOCK = {"dagster/schedule_name", "dagster/sensor_name"}
"""Tags that Dagster gives to what its daemon launches, but to no backfill."""

VerbName = Literal["start", "end", "recover"]

_T = TypeVar("_T")
_log = logging.getLogger(__name__)


class Background:
    """An event loop in a thread: `run` hands it one piece of work and shows the progress that `report` was told."""

    def __init__(self, name: str) -> None:
        self._loop = asyncio.new_event_loop()
        # A daemon, so that work that cannot be cancelled never keeps a run's process from ending.
        self._thread = threading.Thread(target=self._loop.run_forever, name=name, daemon=True)
        self._thread.start()
        self._task: asyncio.Task[Any] | None = None
        self._news: SimpleQueue[Progress | None] = SimpleQueue()

    def report(self, progress: Progress) -> None:
        """Pass progress from the loop on to whoever waits in `run`."""
        self._news.put(progress)

    def run(self, work: Coroutine[Any, Any, _T], show: Report) -> _T:
        """Do the work and return its result; `show` is called in this thread.

        Where this thread is interrupted (a cancelled run), the work is cancelled and may take `INTERRUPT_TIMEOUT_S`.
        """
        news = self._news = SimpleQueue()

        async def kept() -> _T:
            self._task = asyncio.current_task()
            return await work

        future = asyncio.run_coroutine_threadsafe(kept(), self._loop)
        future.add_done_callback(lambda _: news.put(None))
        try:
            while (progress := news.get()) is not None:
                show(progress)
        finally:
            if not future.done():
                self._interrupt(future, show)
        return future.result()

    def _interrupt(self, future: concurrent.futures.Future[Any], show: Report) -> None:
        """Cancel the work under way and wait until it has tidied up, within `INTERRUPT_TIMEOUT_S`."""
        deadline = time.monotonic() + INTERRUPT_TIMEOUT_S
        is_tidying_up = False
        while not future.done() and time.monotonic() < deadline:
            # A cancellation can get lost in `asyncio.wait_for` (before Python 3.12), which the clients use: it is said
            # again until the work tells of its failure, and not while it cleans up.
            if not is_tidying_up:
                self._loop.call_soon_threadsafe(self._cancel)
            concurrent.futures.wait([future], CANCEL_AGAIN_S)
            while not self._news.empty() and (progress := self._news.get()) is not None:
                is_tidying_up |= progress.kind == "failed"
                show(progress)

    def close(self) -> None:
        """Stop the loop and its thread."""
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(THREAD_TIMEOUT_S)
        if self._thread.is_alive():
            _log.warning("the event loop of this run did not stop within %g s", THREAD_TIMEOUT_S)
        else:
            self._loop.close()

    def _cancel(self) -> None:
        if self._task is not None:
            self._task.cancel()


class DaySession:
    """One run at work: its desk, opened by the first step that needs it, and its attempts by verb.

    `unattended`: a schedule or a sensor has asked for the run, not a person. Dagster stops it after `most_s`.
    """

    def __init__(
        self, environment: str, run_id: str, *, rolls: bool, unattended: bool = False, most_s: float = math.inf
    ) -> None:
        self._environment = environment
        self._run_id = run_id
        self._actor = f"dagster:{run_id}"
        self._rolls = rolls
        self._unattended = unattended
        self.limit_s = time.monotonic() + most_s - LAUNCH_S
        self._background = Background(f"desk-{run_id[:8]}")
        self._stack = contextlib.AsyncExitStack()
        self._desk: Desk | None = None
        self._attempts: dict[VerbName, Attempt] = {}

    def begin(self, verb: VerbName, partition: str | None, show: Report) -> Attempt:
        """Take the day for `verb`; raises `SsmdError`."""
        return self._background.run(self._do(verb, partition, lambda attempt: attempt.begin(), ends=False), show)

    def go(self, verb: VerbName, partition: str | None, show: Report) -> Attempt:
        """Do all of `verb` at once; raises `SsmdError`."""
        return self._background.run(self._do(verb, partition, lambda attempt: attempt.go(), ends=True), show)

    def step(self, verb: VerbName, partition: str | None, step: str, show: Report) -> Attempt:
        """Do one step of `verb`, taking the day first where this run has not; raises `SsmdError`."""
        return self._background.run(self._do(verb, partition, lambda attempt: attempt.step(step), ends=False), show)

    def last_step(self, verb: VerbName, partition: str | None, step: str, show: Report) -> Attempt:
        """Do the last step of `verb`, say in the journal that it is done, give the lease back; raises `SsmdError`."""

        async def finish(attempt: Attempt) -> None:
            await attempt.step(step)
            await attempt.finish()

        return self._background.run(self._do(verb, partition, finish, ends=True), show)

    def call(self, partition: str | None, work: Callable[[Desk, str], Coroutine[Any, Any, _T]], show: Report) -> _T:
        """Do a workflow that is no verb of the day's machine, at this run's desk; raises `SsmdError`."""

        async def called() -> _T:
            setting, date = self._day(partition)
            return await work(await self._connected(setting), date)

        return self._background.run(called(), show)

    def close(self, show: Report) -> None:
        """Fail what this run has taken and not finished, give its leases back and disconnect."""
        try:
            self._background.run(self._close(), show)
        finally:
            self._background.close()

    async def _do(
        self,
        verb: VerbName,
        partition: str | None,
        work: Callable[[Attempt], Coroutine[Any, Any, Any]],
        *,
        ends: bool,
    ) -> Attempt:
        attempt = self._attempts.get(verb)
        if attempt is None:
            attempt = self._attempts[verb] = await self._new_attempt(verb, partition)
            attempt.limit_s = self.limit_s
        try:
            await work(attempt)
        except (SsmdError, asyncio.CancelledError):  # as an attempt fails: it is journaled
            await self._settle(verb)
            raise
        if ends:
            await self._settle(verb)
        return attempt

    async def _settle(self, verb: VerbName) -> None:
        """Let go of an attempt that is over, done or failed."""
        await self._attempts.pop(verb).close()

    async def _new_attempt(self, verb: VerbName, partition: str | None) -> Attempt:
        setting, partition = self._day(partition)
        desk = await self._connected(setting)
        if verb == "recover":
            return await recovery_of(desk, partition)
        if self._rolls and verb == "start":
            attempt = starting_of(desk, *await dates_to_roll(desk, partition))
            attempt.verb = _patient(attempt.verb)
            return attempt
        if verb == "end":
            return Attempt(desk, partition, _patient(END), Options(in_roll=self._rolls))
        return Attempt(desk, partition, _patient(START), Options(unattended=self._unattended))

    async def _connected(self, setting: Setting) -> Desk:
        """Return the run's desk; servers that do not answer are tried again, before anything is journaled.

        Raises `RefusedError` where a schedule or sensor has asked for the run, and the environment is paused by now.
        """
        if self._desk is not None:
            return self._desk
        for pause_s in (*CONNECT_AGAIN_S, None):
            if self._desk is not None:
                break
            try:
                self._desk = await self._stack.enter_async_context(
                    open_desk(setting, self._actor, self._background.report)
                )
            except UnreachableError as error:
                if pause_s is None:
                    raise
                _log.warning("%s; trying again in %g s", error, pause_s)
                await asyncio.sleep(pause_s)
        assert self._desk is not None, "it is connected or has raised"
        if self._unattended:
            await _check_pause(self._desk)
        return self._desk

    def _day(self, partition: str | None) -> tuple[Setting, str]:
        """Return the setting and the day, which Dagster does not check; raises `SsmdError`."""
        if partition is None:
            raise UsageError(
                "this run names no trading day", where=self._environment, do="Launch the job for one of its partitions"
            )
        setting = load_setting(self._environment)
        hold(setting.home, self._run_id)
        setting.env.calendar().check(parse_date(partition), setting.clock())
        return setting, partition

    async def _close(self) -> None:
        try:
            async with asyncio.timeout(INTERRUPT_TIMEOUT_S), self._stack:
                while self._attempts:
                    verb, attempt = next(iter(self._attempts.items()))
                    try:
                        await attempt.abandon()
                    finally:
                        await self._settle(verb)
        except TimeoutError:
            # The run's own outcome is what counts; the day is taken over once the lease has run out.
            _log.warning("letting go of %s took longer than %g s", self._environment, INTERRUPT_TIMEOUT_S)


class DayDesk(dg.ConfigurableResource):  # type: ignore[type-arg] # it is its own value
    """The desk of one environment for one run. It connects with the run's first step, not before."""

    environment: str = Field(description="The environment, by its name in exchanges/environments.")
    rolls: bool = Field(
        default=False, description="The next day is started beside the partition's, which is ended then."
    )

    _session: DaySession | None = PrivateAttr(default=None)

    @property
    def session(self) -> DaySession:
        """Return the run's session."""
        assert self._session is not None, "the resource lives as long as a run"
        return self._session

    @contextlib.contextmanager
    def yield_for_execution(self, context: dg.InitResourceContext) -> Iterator[DayDesk]:
        """Open the session of a run and close it, also where the run fails or is cancelled."""
        assert context.run is not None, "a run has an id"
        meant = context.run.tags.get("ssmd/environment", self.environment)
        if meant != self.environment:  # the launchpad lets anybody write another one; queue and sensors go by the tag
            raise dg.Failure(
                description=f"This is a job of {meant}, but its configuration names {self.environment}. Launch "
                f"the job of {self.environment} for that, or leave the configuration as it is.",
                allow_retries=False,
            )
        # A re-execution has its parent's tags, and somebody has clicked on it.
        unattended = (
            not _ASKED_BY_CLOCK.isdisjoint(context.run.tags) and "dagster/parent_run_id" not in context.run.tags
        )
        self._session = DaySession(
            self.environment,
            context.run.run_id,
            rolls=self.rolls,
            unattended=unattended,
            most_s=float(context.run.tags.get(MAX_RUNTIME, math.inf)),
        )
        try:
            yield self
        finally:
            self._session.close(_log_abandoned)
            self._session = None


async def _check_pause(desk: Desk) -> None:
    """Refuse what was asked for where the environment has been paused since, or could not be seen to be."""
    paused = (await desk.book.refresh()).paused
    if paused is not None:
        raise RefusedError(
            f"{desk.env} is {paused_words(desk.env, paused, desk.calendar)}",
            where=desk.env,
            do="Verbs by hand work; what is missing then is asked for again.",
        )


def _patient(verb: Verb) -> Verb:
    return verb._replace(tries=TRIES)


def _log_abandoned(progress: Progress) -> None:
    _log.error("%s %s: %s", progress.date, progress.title, progress.detail)
