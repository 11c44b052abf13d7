"""What every capture process does alike: connecting, cancelling, answering."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from ssmd_dagster.capture import process as process_module
from ssmd_dagster.capture.control import control_subject, request, serve
from ssmd_dagster.capture.process import Heartbeat, cancel, connected, current_epoch, unless_stopped, wait_any
from ssmd_dagster.capture.setting import Setting
from ssmd_dagster.errors import RefusedError, SsmdError, UnreachableError
from ssmd_dagster.stores.connect import Stores
from ssmd_dagster.stores.daybook import DayBook
from ssmd_dagster_tests.capture.recordings import DATE, eventually


async def test_an_error_of_the_work_is_not_taken_for_one_of_connecting(setting: Setting, stores: Stores) -> None:
    """A server that is away later on ends the process with its own error; nothing is connected a second time."""
    seen = []

    async def work() -> None:
        async with connected(setting, "test") as opened:
            seen.append(opened)
            raise UnreachableError("in the middle of it")

    with pytest.raises(UnreachableError, match="in the middle of it"):
        await work()
    assert len(seen) == 1
    assert seen[0].nc.is_closed


async def test_a_task_that_loses_a_cancellation_is_cancelled_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """Python 3.11's `wait_for` can drop one: a process that is told to stop must not wait for such a task for ever."""
    monkeypatch.setattr(process_module, "CANCEL_AGAIN_AFTER_S", 0.01)
    lost = 0

    async def loses_two() -> None:
        nonlocal lost
        while True:
            try:
                await asyncio.sleep(60)
            except asyncio.CancelledError:
                lost += 1
                if lost > 2:
                    raise

    async def fails() -> None:
        raise ValueError("whatever")

    tasks = [asyncio.create_task(loses_two()), asyncio.create_task(fails())]
    await asyncio.sleep(0)
    await asyncio.wait_for(cancel(*tasks), 10)
    assert lost == 3
    await cancel()


async def test_waiting_for_any_of_several_leaves_none_behind() -> None:
    """The first one ends the wait, the others are gone; so does the time."""
    ended = asyncio.Event()

    async def long() -> None:
        try:
            await asyncio.sleep(60)
        finally:
            ended.set()

    await asyncio.wait_for(wait_any(asyncio.sleep(0), long()), 10)
    assert ended.is_set()
    await asyncio.wait_for(wait_any(long(), timeout_s=0.01), 10)


async def test_no_process_runs_for_a_day_that_nobody_started(setting: Setting, stores: Stores) -> None:
    """It is refused, with what to do."""
    with pytest.raises(RefusedError, match="was never started") as caught:
        await current_epoch(setting, stores, DATE, "archiver")
    assert f"ssmd day start {setting.env.name}" in str(caught.value)


async def test_a_process_speaks_in_the_epoch_that_holds_the_day(
    setting: Setting, stores: Stores, book: DayBook
) -> None:
    """It is read from the journal."""
    day = await book.day(DATE)
    assert day is not None
    assert await current_epoch(setting, stores, DATE, "archiver") == day.epoch


async def test_a_component_in_trouble_answers_and_a_refusal_is_an_error(setting: Setting, stores: Stores) -> None:
    """`error` in a status is what troubles the component, and no refusal of the request; words that are no JSON are one."""

    async def answer(command: str, arguments: dict[str, Any]) -> dict[str, Any]:
        if command != "status":
            raise SsmdError(f"unknown command `{command}`")
        return {"state": "archiving", "error": "the store does not answer", **arguments}

    subject = control_subject(setting.env.name, "archiver", DATE)
    service = await serve(stores.nc, subject, answer)
    assert await request(stores.nc, subject, "status", more=1) == {
        "state": "archiving",
        "error": "the store does not answer",
        "more": 1,
    }
    with pytest.raises(SsmdError, match="archiver: unknown command `dance`"):
        await request(stores.nc, subject, "dance")
    raw = await stores.nc.request(subject, b"no json", timeout=5)
    assert b'"refused"' in raw.data
    await service.unsubscribe()
    with pytest.raises(UnreachableError, match="archiver does not answer `status`"):
        await request(stores.nc, subject, "status")
    with pytest.raises(UnreachableError, match="archiver does not answer `status`"):
        await request(stores.nc, subject, "status", coming_up_s=0.3)
    asking = asyncio.create_task(request(stores.nc, subject, "status", coming_up_s=15))
    await asyncio.sleep(0)
    service = await serve(stores.nc, subject, answer)
    assert (await asking)["state"] == "archiving"
    await service.unsubscribe()


async def test_heartbeats_go_on_when_the_cache_does_not_answer(
    setting: Setting, stores: Stores, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Each beat carries who and how; one that cannot be written is logged."""
    monkeypatch.setattr(process_module, "HEARTBEAT_EVERY_S", 0.01)
    beats = 0

    def status() -> dict[str, Any]:
        nonlocal beats
        beats += 1
        return {"state": "recording", "beats": beats}

    heartbeat = Heartbeat(stores.cache, DATE, "connector-a", 7, status)
    await heartbeat.beat()
    beat = await stores.cache.heartbeat(DATE, "connector-a")
    assert beat is not None
    assert (beat["component"], beat["epoch"], beat["state"]) == ("connector-a", 7, "recording")

    async def away(*_: object) -> None:
        raise UnreachableError("the cache does not answer")

    with monkeypatch.context() as patch:
        patch.setattr(stores.cache, "put_heartbeat", away)
        task = asyncio.create_task(heartbeat.run())
        await eventually(lambda: beats > 4)
    assert "heartbeat not written" in caplog.text
    await cancel(task)


async def test_work_goes_on_unless_it_is_told_to_stop() -> None:
    """Its result or error is passed on; a stop cancels it, however long it would have taken."""
    stop = asyncio.Event()

    async def fail() -> str:
        raise UnreachableError("refused")

    assert await unless_stopped(stop, asyncio.sleep(0, "done")) == "done"
    with pytest.raises(UnreachableError, match="refused"):
        await unless_stopped(stop, fail())
    asyncio.get_running_loop().call_later(0.02, stop.set)
    assert await asyncio.wait_for(unless_stopped(stop, asyncio.sleep(3_600, "late")), 5) is None
