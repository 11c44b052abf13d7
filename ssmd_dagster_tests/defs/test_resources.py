"""The event loop beside a run: results, progress, failures, and what becomes of work that is interrupted."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator

import pytest

from ssmd_dagster.defs import resources
from ssmd_dagster.defs.resources import Background
from ssmd_dagster.errors import RefusedError
from ssmd_dagster.workflows.desk import Progress, report_nothing

NOTE = Progress("note", "start", "2026-01-01", "connector", "Starting connector")


class InterruptedRun(BaseException):
    """As Dagster's own, which is no `Exception` either."""


@pytest.fixture
def background() -> Iterator[Background]:
    """A loop in its thread, which is gone after the test."""
    background = Background("desk-of-a-test")
    yield background
    background.close()
    assert all(thread.name != "desk-of-a-test" for thread in threading.enumerate())


def test_progress_is_shown_in_the_calling_thread_before_the_result(background: Background) -> None:
    """What the work reports reaches `show` in order, in the thread that waits."""
    seen: list[tuple[str, int]] = []

    async def work() -> int:
        background.report(NOTE)
        await asyncio.sleep(0)
        background.report(NOTE)
        return threading.get_ident()

    there = background.run(work(), lambda progress: seen.append((progress.title, threading.get_ident())))
    assert seen == [("Starting connector", threading.get_ident())] * 2
    assert there != threading.get_ident()


def test_what_one_step_opens_the_next_one_finds(background: Background) -> None:
    """All work of a run shares one loop: a task that one piece starts lives on while the next is done."""
    ticks: list[int] = []

    async def start() -> asyncio.Task[None]:
        async def renew() -> None:
            while True:
                ticks.append(1)
                await asyncio.sleep(0.001)

        return asyncio.ensure_future(renew())

    async def stop(task: asyncio.Task[None]) -> int:
        task.cancel()
        await asyncio.wait({task})
        return len(ticks)

    task = background.run(start(), report_nothing)
    assert background.run(asyncio.sleep(0.05, "slept"), report_nothing) == "slept"
    assert background.run(stop(task), report_nothing) > 1


def test_a_failure_is_raised_where_it_was_asked_for(background: Background) -> None:
    """The caller gets the very error of the work."""
    error = RefusedError("no")

    async def work() -> None:
        raise error

    with pytest.raises(RefusedError) as caught:
        background.run(work(), report_nothing)
    assert caught.value is error


def test_interrupted_work_is_cancelled_and_may_tidy_up(background: Background) -> None:
    """An interruption of the waiting thread cancels the work, waits until it has tidied up, and shows what it said."""
    seen: list[str] = []

    async def work() -> None:
        background.report(NOTE)
        try:
            await asyncio.sleep(60)
        finally:
            await asyncio.sleep(0.05)
            background.report(Progress("failed", "start", "2026-01-01", "connector", "tidied up"))

    def show(progress: Progress) -> None:
        seen.append(progress.title)
        if progress.kind == "note":
            raise InterruptedRun

    with pytest.raises(InterruptedRun):
        background.run(work(), show)
    assert seen == ["Starting connector", "tidied up"]


def test_a_cancellation_that_got_lost_is_said_again(background: Background, monkeypatch: pytest.MonkeyPatch) -> None:
    """Work that swallows a cancellation, as `asyncio.wait_for` can, is cancelled again."""
    monkeypatch.setattr(resources, "CANCEL_AGAIN_S", 0.05)
    swallowed: list[str] = []

    async def work() -> None:
        background.report(NOTE)
        try:
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            swallowed.append("once")
        await asyncio.sleep(60)

    def show(_progress: Progress) -> None:
        raise InterruptedRun

    with pytest.raises(InterruptedRun):
        background.run(work(), show)
    assert swallowed == ["once"]
