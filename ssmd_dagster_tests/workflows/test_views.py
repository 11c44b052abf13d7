"""What a day's view says beside the journal."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

from ssmd_dagster.capture.programs import day_components
from ssmd_dagster.day.calendar import Window
from ssmd_dagster.day.states import DayState, EventName
from ssmd_dagster.environments.loader import load_registry
from ssmd_dagster.errors import UnreachableError
from ssmd_dagster.stores.stream import Usage
from ssmd_dagster.workflows.desk import Desk
from ssmd_dagster.workflows.views import view
from ssmd_dagster_tests.day.builders import ENV, started


class Cache:
    """A cache that has heartbeats and nothing else, or, with None, does not answer."""

    def __init__(self, beats: dict[str, dict[str, Any]] | None) -> None:
        self.beats = beats

    async def maintenance(self) -> tuple[Window, ...]:
        """Return that nothing is announced."""
        await self.heartbeats("")
        return ()

    async def stats(self, _date: str) -> None:
        """Return that nothing is counted."""

    async def heartbeats(self, _date: str) -> dict[str, dict[str, Any]]:
        """Return the heartbeats."""
        if self.beats is None:
            raise UnreachableError("no answer", where="Redis at localhost:1")
        return self.beats


def desk_with(beats: dict[str, dict[str, Any]] | None) -> Desk:
    """A desk of the simulated environment over such a cache."""
    return cast(
        "Desk",
        SimpleNamespace(
            env=ENV,
            window=lambda _day: Window(open_ns=0, close_ns=1),
            setting=SimpleNamespace(env=load_registry().environments["kalshi-sim"], clock=lambda: 9),
            stores=SimpleNamespace(cache=Cache(beats), raw_stream=SimpleNamespace(usage=_usage)),
        ),
    )


async def _usage() -> Usage:
    return Usage(80, 100)


async def test_an_end_that_is_held_up_says_by_what() -> None:
    """A full disk under the archiver is seen in the day's status, not only by whoever asked for the end."""
    log = started()
    log.add(EventName.END_REQUESTED, epoch=log.day().epoch)
    beat = {"error": "cannot be written: No space left on device"}
    desk = desk_with({"archiver": beat, "connector-a": {"error": None}})
    seen = await view(desk, log.day())
    assert (seen.state, seen.error) == (DayState.ENDING, f"archiver: {beat['error']}")
    assert seen.stream_share == 0.8
    beat.clear()
    assert (await view(desk, log.day())).error is None


async def test_a_day_whose_cache_is_away_is_what_the_journal_says() -> None:
    """Its processes may be well: it is not called an ERROR, and what is not known is said."""
    seen = await view(desk_with(None), started().day())
    assert seen.state is DayState.ACTIVE
    assert seen.error is not None
    assert seen.error.startswith("how it fares is not known: no answer")
    assert seen.messages is None, "nobody knows how many: not 0"


async def test_a_process_that_has_ended_for_good_makes_the_day_an_error() -> None:
    """Its last words stay behind it for a day: they are no sign of life."""
    names = day_components(load_registry().environments["kalshi-sim"], "live")
    beats: dict[str, dict[str, Any]] = {name: {"state": "well", "error": None, "exit_code": None} for name in names}
    desk = desk_with(beats)
    assert (await view(desk, started().day())).state is DayState.ACTIVE
    beats["connector-a"] = {"state": "refused", "error": "the exchange refused the credentials", "exit_code": 8}
    seen = await view(desk, started().day())
    assert (seen.state, seen.error) == (DayState.ERROR, "connector-a: the exchange refused the credentials")
