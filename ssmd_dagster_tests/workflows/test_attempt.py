"""What an attempt says of its own end."""

from __future__ import annotations

import asyncio
import math
from types import SimpleNamespace
from typing import Any

import pytest

from ssmd_dagster.day.payloads import Failed
from ssmd_dagster.day.states import EventName
from ssmd_dagster.workflows.attempt import Attempt
from ssmd_dagster.workflows.end import END
from ssmd_dagster_tests.day.builders import DATE, started


@pytest.mark.parametrize(
    ("limit_s", "error", "transient"),
    [(math.inf, "interrupted during verify", False), (0.0, "out of time during verify", True)],
)
async def test_who_stopped_it_decides_whether_it_is_asked_for_again(
    limit_s: float, error: str, transient: bool
) -> None:
    """A person who interrupts wants it to stop; a run whose time was up is asked for again by `reconcile`."""
    day = started().day()
    journaled: list[tuple[EventName, Failed]] = []

    async def append(_date: str, event: EventName, *, data: Failed, **_: object) -> object:
        journaled.append((event, data))
        return day

    async def known(_date: str) -> object:
        return day

    async def nothing(_attempt: Attempt) -> None:
        return None

    desk: Any = SimpleNamespace(
        book=SimpleNamespace(append=append, day=known), report=lambda _: None, where=lambda date: date
    )
    attempt = Attempt(desk, DATE, END._replace(clean_up=nothing), limit_s=limit_s)
    attempt._day = day
    task = asyncio.ensure_future(attempt._guarded("verify", "Verifying", asyncio.sleep(3600)))
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert journaled == [(EventName.END_FAILED, Failed(step="verify", error=error, exit_code=1, transient=transient))]
