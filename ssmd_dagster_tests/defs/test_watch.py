"""Looks at environments beside each other: whose turn it is, and whose trouble a look that came to nothing is."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Awaitable, Callable, Iterator
from typing import Any

import pytest

from ssmd_dagster.defs.watch import Watch
from ssmd_dagster.errors import SsmdError


@pytest.fixture
def watch(monkeypatch: pytest.MonkeyPatch) -> Iterator[Watch]:
    """A watch whose desks need no servers."""

    async def at(_watch: Watch, _name: str, _place: Any, work: Callable[[Any], Awaitable[Any]], _actor: str) -> Any:
        return await work(None)

    monkeypatch.setattr(Watch, "_at_desk", at)
    made = Watch()
    yield made
    made.close()


def test_waiting_for_another_look_is_nobodys_trouble(watch: Watch) -> None:
    """Who waits too long is told that it is busy; the next look is made at once, and is given all of its own time."""
    begun, go_on = threading.Event(), threading.Event()

    async def slow(_: Any) -> str:
        begun.set()
        await asyncio.to_thread(go_on.wait, 20)
        return "done"

    async def quick(_: Any) -> str:
        await asyncio.sleep(0.01)
        return "paused"

    answers: list[Any] = []
    slowly = threading.Thread(target=lambda: answers.append(watch.look(["e"], slow, actor="journal")))
    slowly.start()
    assert begun.wait(20)
    waited = watch.look(["e"], quick, actor="schedule", timeout_s=0.1)["e"]
    assert str(waited.error) == "busy: another look at it takes longer than 0.1 s (e)"
    go_on.set()
    slowly.join()
    assert answers[0]["e"].value == "done"
    assert watch.look(["e"], quick, actor="schedule")["e"].value == "paused"


def test_what_an_actors_latest_look_failed_of_is_known(watch: Watch) -> None:
    """One sensor that alone cannot look at an environment is not hidden by those that can."""

    async def fails(_: Any) -> None:
        raise SsmdError("a broken chain", where="e")

    async def works(_: Any) -> str:
        return "well"

    watch.look(["e"], fails, actor="journal")
    assert watch.look(["e"], works, actor="health")["e"].value == "well"
    assert (str(watch.latest_error("e", "journal")), watch.latest_error("e", "health")) == ("a broken chain (e)", None)
    watch.look(["e"], works, actor="journal")
    assert watch.latest_error("e", "journal") is None
