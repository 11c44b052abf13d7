"""One attempt of one actor at a verb: take the day, do the steps in order, and finish or fail.

The command line and Dagster's ops drive the same attempt: the one goes through all steps, the others do one each. A step that
finds the day not taken by this process (a run that was re-executed from its failure) takes it again under a new epoch and
does the earlier steps first: they make sure of what should be true, and do nothing where it is. Not here: what a step does.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypeVar

from ssmd_dagster.archive.readback import Readback
from ssmd_dagster.crash_points import reached
from ssmd_dagster.day.events import TradingDay
from ssmd_dagster.day.folding import StaleEpochError
from ssmd_dagster.day.ledger import Ledger
from ssmd_dagster.day.payloads import Failed, GaveUp, Payload
from ssmd_dagster.day.payloads import Step as StepData
from ssmd_dagster.day.states import EventName
from ssmd_dagster.errors import OutOfTimeError, RefusedError, SsmdError, UnreachableError
from ssmd_dagster.workflows.desk import Desk, Kind, Progress
from ssmd_dagster.workflows.lease import Lease

if TYPE_CHECKING:
    from ssmd_dagster.workflows.verify import Verdict

TRY_AGAIN_AFTER_S = 2.0
SKIPPED = "skipped"
"""With this begins the detail of a step that did not do what its title says."""
CLEAN_UP_TIMEOUT_S = 60.0
"""How long tidying up after a failure may take before the failure itself is what is told."""

_T = TypeVar("_T")
_log = logging.getLogger(__name__)


class Step(NamedTuple):
    """One step of a verb: its name in the journal, its line on the screen, and what it does (returns a short detail)."""

    name: str
    title: str
    run: Callable[[Attempt], Awaitable[str]]


class Verb(NamedTuple):
    """What distinguishes the verbs.

    `may_begin` returns False where the goal is reached already and raises where the state does not allow the verb, `take`
    appends the event that makes the day this attempt's, `finish` the one that says that it is done, `clean_up` undoes what a
    failed attempt has started, `failed` names the event of its failure; a step that fails for a transient cause is tried `tries`
    times.
    """

    name: str
    steps: Sequence[Step]
    may_begin: Callable[[Attempt], Awaitable[bool]]
    take: Callable[[Attempt], Awaitable[TradingDay]]
    finish: Callable[[Attempt], Awaitable[TradingDay]]
    clean_up: Callable[[Attempt], Awaitable[None]]
    failed: EventName
    tries: int = 1


@dataclass(frozen=True, kw_only=True)
class Options:
    """What an operator or a roll may ask of a verb.

    A roll starts the new day with `rolled_from`, ACTIVE not before `boundary_ns` (None: as soon as it is ready), and ends the old
    one `in_roll`.
    `unattended`: a schedule or a sensor asks, perhaps long before its run begins; nothing that has been up since is opened again.
    Of `share` replays side by side each has its part of the exchange's rate.
    """

    mode: Literal["live", "replay"] | None = None
    force: bool = False
    reason: str | None = None
    rolled_from: str | None = None
    boundary_ns: int | None = None
    in_roll: bool = False
    unattended: bool = False
    share: int = 1


@dataclass
class Attempt:
    """One attempt at `verb` for one day. `close` it whatever happens: it gives the lease back.

    An interruption is a person's, who wants it to stop, unless it comes after `limit_s` (monotonic): then its time is up.
    """

    desk: Desk
    date: str
    verb: Verb
    options: Options = field(default_factory=Options)
    limit_s: float = math.inf
    already: bool = False
    readback: Readback | None = None
    ledger: Ledger | None = None
    verdict: Verdict | None = None
    _day: TradingDay | None = None
    _lease: Lease | None = None
    _done: list[str] = field(default_factory=list)

    @property
    def day(self) -> TradingDay:
        """Return the day as this process last saw it; its epoch is this attempt's."""
        assert self._day is not None, "the day is taken before its steps are done"
        return self._day

    async def begin(self) -> bool:
        """Take the day; False (and `already`) where the goal is reached already.

        Raises `RefusedError` where the state does not allow the verb, or another actor is at work on the day.
        """
        if not await self.verb.may_begin(self):
            self.already = True
            self._day = self.desk.book.book.days[self.date]
            return False
        self._lease = Lease(self.desk, self.date)
        await self._lease.acquire()
        reached(f"{self.verb.name}.take.before")
        self._day = await self.verb.take(self)
        reached(f"{self.verb.name}.take.after")
        return True

    async def step(self, name: str) -> None:
        """Do one step; where it fails, clean up, append the failure, and raise on."""
        if self._day is None and not await self.begin():
            return
        if self.already or name in self._done:
            return
        names = [step.name for step in self.verb.steps]
        for step in self.verb.steps[: names.index(name) + 1]:
            if step.name not in self._done:
                await self._guarded(step.name, step.title, self._run(step))
                self._done.append(step.name)

    async def finish(self) -> TradingDay:
        """Say in the journal that the verb is done and return the day."""
        if not self.already:
            last = self.verb.steps[-1]
            reached(f"{self.verb.name}.finish.before")
            self._day = await self._guarded(last.name, last.title, self.verb.finish(self))
            reached(f"{self.verb.name}.finish.after")
        return self.day

    async def go(self) -> TradingDay:
        """Begin, do every step, finish, and close."""
        try:
            if await self.begin():
                for step in self.verb.steps:
                    await self.step(step.name)
            return await self.finish()
        finally:
            await self.close()

    async def abandon(self) -> None:
        """Fail between two steps, where nobody will do the next one; nothing happens where the day was not taken."""
        if self._day is None or self.already:
            return
        following = self.verb.steps[min(len(self._done), len(self.verb.steps) - 1)]
        error = self._interruption(f"before {following.name}")
        self.tell("failed", following.name, following.title, str(error))
        await self._fail(following.name, error)

    async def close(self) -> None:
        """Give the lease back."""
        if self._lease is not None:
            await self._lease.release()
            self._lease = None

    async def journal(self, event: EventName, data: Any = None) -> TradingDay:
        """Append an event in this attempt's epoch and return the day after it."""
        self._day = await self.desk.book.append(
            self.date, event, epoch=self.day.epoch, reason=self.options.reason, data=data
        )
        return self._day

    def tell(self, kind: Kind, step: str, title: str, detail: str = "") -> None:
        """Show progress to whoever watches."""
        self.desk.report(Progress(kind, self.verb.name, self.date, step, title, detail))

    async def _run(self, step: Step) -> None:
        self.tell("started", step.name, step.title)
        await self.journal(EventName.STEP_STARTED, StepData(step=step.name))
        reached(f"{self.verb.name}.{step.name}.before")
        detail = await self._tried(step)
        reached(f"{self.verb.name}.{step.name}.after")
        await self.journal(EventName.STEP_FINISHED, StepData(step=step.name, detail={"text": detail} if detail else {}))
        self.tell("skipped" if detail.startswith(SKIPPED) else "done", step.name, step.title, detail)

    async def _tried(self, step: Step) -> str:
        """Run a step; a transient failure is tried again `verb.tries` times in all."""
        for left in reversed(range(self.verb.tries)):
            try:
                return await step.run(self)
            except SsmdError as error:
                if not error.transient or not left:
                    raise
                self.tell("note", step.name, f"{error.what}; trying again")
                await asyncio.sleep(TRY_AGAIN_AFTER_S)
        raise AssertionError("a verb tries at least once")

    async def _guarded(self, step: str, title: str, work: Awaitable[_T]) -> _T:
        try:
            return await work
        except StaleEpochError:
            raise  # another attempt has the day: nothing here may be touched any more
        except (SsmdError, asyncio.CancelledError) as error:
            cause = error if isinstance(error, SsmdError) else self._interruption(f"during {step}")
            self.tell("failed", step, title, str(cause))
            await asyncio.shield(asyncio.ensure_future(self._fail(step, cause)))
            raise

    def _interruption(self, when: str) -> SsmdError:
        if time.monotonic() >= self.limit_s:
            return OutOfTimeError(f"out of time {when}")
        return SsmdError(f"interrupted {when}")

    async def _was_taken_over(self) -> bool:
        """Say whether the journal knows of a later epoch; one that cannot be read knows of none."""
        try:
            day = await self.desk.book.day(self.date)
        except UnreachableError:
            return False
        return day is None or day.epoch != self.day.epoch

    async def _fail(self, step: str, error: SsmdError) -> None:
        try:
            async with asyncio.timeout(CLEAN_UP_TIMEOUT_S):
                if await self._was_taken_over():
                    _log.warning("another attempt has %s, so nothing of it is stopped", self.desk.where(self.date))
                    return
                with _logged(f"not everything that this {self.verb.name} started is stopped"):
                    await self.verb.clean_up(self)
                data: Payload = Failed(
                    step=step, error=str(error), exit_code=int(error.exit_code), transient=error.transient
                )
                if self.verb.failed is EventName.GAVE_UP:
                    data = GaveUp(
                        error=f"{step}: {error}",
                        attempts=self.verb.tries,
                        exit_code=int(error.exit_code),
                        transient=error.transient,
                    )
                # Where the journal cannot be told, the day stays as it is and is taken over once the lease is gone.
                with _logged(f"the failure of {step} is not journaled"):
                    await self.journal(self.verb.failed, data)
        except TimeoutError:
            _log.warning("cleaning up after %s took longer than %.0f s", step, CLEAN_UP_TIMEOUT_S)


@contextlib.contextmanager
def _logged(what: str) -> Iterator[None]:
    """Log the failures that must not hide the one that is being told."""
    try:
        yield
    except (UnreachableError, RefusedError) as error:
        _log.warning("%s: %s", what, error)
