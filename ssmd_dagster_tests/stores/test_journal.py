"""The day journal against a real NATS server."""

from __future__ import annotations

import asyncio
import time
from hashlib import sha256
from types import SimpleNamespace
from typing import TYPE_CHECKING, cast

import pytest

from ssmd_dagster.day.events import DayEvent, JournalBrokenError
from ssmd_dagster.day.states import DayState, EventName
from ssmd_dagster.errors import ConfigurationError, NotFoundError, UnreachableError
from ssmd_dagster.stores.connect import connect_nats
from ssmd_dagster.stores.journal import AppendConflictError, Journal, StoredEvent
from ssmd_dagster_tests import servers

if TYPE_CHECKING:
    from pathlib import Path

    from nats.js import JetStreamContext

    from ssmd_dagster.day.events import TradingDay


def an_event(env: str, number: int = 0, **changes: object) -> DayEvent:
    """Make an event that no other test cares about."""
    fields: dict[str, object] = {
        "id": f"event-{number}",
        "env": env,
        "date": "2025-12-14",
        "event": EventName.STEP_STARTED,
        "from_": None,
        "to": None,
        "epoch": 1,
        "at_ns": 1_765_670_400_000_000_000 + number,
        "actor": "cli:test@host",
        "data": {"step": "secmaster"},
    }
    return DayEvent(**{**fields, **changes})  # type: ignore[arg-type]


@pytest.fixture
async def journal(js: JetStreamContext, env_name: str) -> Journal:
    """A created, empty journal."""
    journal = Journal(js, env_name)
    await journal.create()
    return journal


async def append_many(journal: Journal, env: str, count: int) -> list[StoredEvent]:
    """Append `count` events one behind the other."""
    stored: list[StoredEvent] = []
    for number in range(count):
        stored.append(await journal.append(an_event(env, number), stored[-1] if stored else None))
    return stored


async def test_appended_events_are_read_back_with_their_chain(journal: Journal, env_name: str) -> None:
    """What append returned is what read returns, each holding the hash of the one before."""
    stored = await append_many(journal, env_name, 5)
    assert await journal.read() == stored
    assert [s.seq for s in stored] == [1, 2, 3, 4, 5]
    assert [s.event.prev_sha256 for s in stored] == [None, *(s.sha256 for s in stored[:-1])]


async def test_read_after_a_sequence(journal: Journal, env_name: str) -> None:
    """read(after_seq) returns exactly the events behind it."""
    stored = await append_many(journal, env_name, 4)
    for after in range(5):
        assert await journal.read(after) == stored[after:]


async def test_a_missing_journal_reads_as_empty(js: JetStreamContext, env_name: str) -> None:
    """Before anybody created it, a journal is empty, and an append says that it does not exist."""
    journal = Journal(js, env_name)
    assert await journal.read() == []
    assert await journal.tip_seq() == 0
    with pytest.raises(NotFoundError, match="no such stream"):
        await journal.append(an_event(env_name), None)


async def test_create_is_idempotent_and_refuses_other_settings(js: JetStreamContext, env_name: str) -> None:
    """A second create changes nothing; a stream that may be purged is refused by name of the setting."""
    journal = Journal(js, env_name)
    await journal.create()
    await journal.create()
    await js.add_stream(name=f"{env_name}x-day", subjects=[f"{env_name}x.day.events"])
    with pytest.raises(ConfigurationError, match="deny_purge is False, not True"):
        await Journal(js, f"{env_name}x").create()


async def test_of_a_hundred_racing_appends_exactly_one_wins(journal: Journal, env_name: str) -> None:
    """Compare-and-append lets one of 100 actors in and tells the others what came first."""
    first = await journal.append(an_event(env_name), None)
    outcomes = await asyncio.gather(
        *(journal.append(an_event(env_name, number), first) for number in range(1, 101)), return_exceptions=True
    )
    winners = [o for o in outcomes if isinstance(o, StoredEvent)]
    losers = [o for o in outcomes if isinstance(o, AppendConflictError)]
    assert (len(winners), len(losers)) == (1, 99)
    assert all(loser.newer == winners for loser in losers)
    assert await journal.read() == [first, *winners]


async def test_a_repeated_append_of_the_same_id_is_a_success(journal: Journal, env_name: str) -> None:
    """An append whose answer was lost can be made again: it returns the event as it was stored."""
    first = await journal.append(an_event(env_name, 0), None)
    second = await journal.append(an_event(env_name, 1), first)
    await journal.append(an_event(env_name, 2), second)
    assert await journal.append(an_event(env_name, 1), first) == second
    assert await journal.find("event-1", first.seq) == second
    assert await journal.find("event-9", first.seq) is None
    assert await journal.tip_seq() == 3


async def test_a_broken_chain_is_named_by_its_sequence(js: JetStreamContext, journal: Journal, env_name: str) -> None:
    """An event that somebody put there by hand breaks the chain where it stands."""
    await append_many(journal, env_name, 2)
    await js.publish(journal.subject, an_event(env_name, 2, prev_sha256="00").encode())
    with pytest.raises(JournalBrokenError, match="sequence 3") as caught:
        await journal.read()
    assert caught.value.seq == 3


async def test_bytes_that_are_no_event_break_the_journal(js: JetStreamContext, journal: Journal, env_name: str) -> None:
    """Foreign bytes on the subject are reported with their sequence."""
    await append_many(journal, env_name, 1)
    await js.publish(journal.subject, b"{}")
    with pytest.raises(JournalBrokenError, match="sequence 2"):
        await journal.read()


async def test_a_journal_behind_what_was_read_is_broken(journal: Journal, env_name: str) -> None:
    """Reading on from a sequence that the journal does not reach is an error, not an empty answer."""
    await append_many(journal, env_name, 2)
    with pytest.raises(JournalBrokenError, match="ends with sequence 2"):
        await journal.read(5)


async def test_a_day_is_read_without_keeping_what_lies_between_its_events(
    journal: Journal, env_name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that is verified again after months has all of them between its first event and its last."""
    stored = await append_many(journal, env_name, 2)
    for number in range(2, 9):
        stored.append(await journal.append(an_event(env_name, number, date="2026-01-01"), stored[-1]))
    stored.append(await journal.append(an_event(env_name, 9), stored[-1]))
    monkeypatch.setattr("ssmd_dagster.stores.journal._READ_BATCH", 2)
    monkeypatch.setattr(journal, "read", None)
    day = SimpleNamespace(date="2025-12-14", first_seq=1, last_seq=10)
    assert await journal.read_day(cast("TradingDay", day)) == [*stored[:2], stored[9]]


async def test_deletes_are_refused(js: JetStreamContext, journal: Journal, env_name: str) -> None:
    """The server denies deleting and purging the journal's events."""
    await append_many(journal, env_name, 1)
    with pytest.raises(Exception, match="delete not permitted"):
        await js.delete_msg(journal.stream, 1)
    with pytest.raises(Exception, match="purge not permitted"):
        await js.purge_stream(journal.stream)


async def test_states_and_odd_texts_survive(journal: Journal, env_name: str) -> None:
    """All fields come back as they were given, non-ASCII reasons included."""
    event = an_event(
        env_name,
        event=EventName.STARTED,
        from_=DayState.STARTING,
        to=DayState.ACTIVE,
        reason="наконец \n \u2713",
        data={"markets": 3, "x": [1.5, None]},
    )
    stored = await journal.append(event, None)
    assert (await journal.read())[0] == stored
    assert stored.event == event


async def test_follow_yields_old_and_new_events_in_order(journal: Journal, env_name: str) -> None:
    """A watcher sees what is there and what comes, each once."""
    stored = await append_many(journal, env_name, 3)
    seen: list[StoredEvent] = []
    async with asyncio.timeout(10):
        async for event in journal.follow(after_seq=1):
            seen.append(event)
            if event.seq == 3:
                stored.append(await journal.append(an_event(env_name, 3), stored[-1]))
            if event.seq == 4:
                break
    assert seen == stored[1:]


async def test_follow_waits_for_a_journal_that_nobody_created_yet(js: JetStreamContext, env_name: str) -> None:
    """A watcher may be there before the first start."""
    journal = Journal(js, env_name)

    async def first() -> StoredEvent:
        async for event in journal.follow():
            return event
        raise AssertionError

    watcher = asyncio.create_task(first())
    await asyncio.sleep(0)
    await journal.create()
    stored = await journal.append(an_event(env_name), None)
    async with asyncio.timeout(10):
        assert await watcher == stored


async def test_reading_is_fast(js: JetStreamContext, journal: Journal, env_name: str) -> None:
    """A journal of 5,000 events is read and verified at some ten thousand events a second or more."""
    prev: str | None = None
    pending = []
    for number in range(5_000):
        event = an_event(env_name, number, prev_sha256=prev)
        raw = event.encode()
        prev = sha256(raw).hexdigest()
        pending.append(await js.publish_async(journal.subject, raw))
    await asyncio.gather(*pending)
    begun_s = time.perf_counter()
    assert len(await journal.read()) == 5_000
    rate = 5_000 / (time.perf_counter() - begun_s)
    assert rate > 15_000  # 50,000 on an idle machine; the bound is for a busy one


async def test_the_journal_survives_kill_9_and_a_silent_server(tmp_path: Path, env_name: str) -> None:
    """After SIGKILL and restart the same client appends, reads and follows; a server that hangs is named by address."""
    with servers.nats_server(tmp_path) as server:
        async with connect_nats(server.url, server.user, server.password, name="test") as nc:
            journal = Journal(nc.jetstream(timeout=1), env_name, timeout_s=1)
            await journal.create()
            first = await journal.append(an_event(env_name, 0), None)
            follower = journal.follow()
            assert await anext(follower) == first
            server.kill()
            with pytest.raises(UnreachableError, match=f"127.0.0.1:{server.port}"):
                await journal.append(an_event(env_name, 1), first)
            server.start()
            journal = Journal(nc.jetstream(), env_name)
            assert await journal.find("event-1", 1) is None
            second = await journal.append(an_event(env_name, 1), first)
            assert await journal.read() == [first, second]
            async with asyncio.timeout(15):
                assert await anext(follower) == second
            await follower.aclose()  # type: ignore[attr-defined]
            server.pause()
            try:
                journal = Journal(nc.jetstream(timeout=0.3), env_name, timeout_s=0.3)
                with pytest.raises(UnreachableError, match="no answer"):
                    await journal.append(an_event(env_name, 2), second)
            finally:
                server.resume()
            journal = Journal(nc.jetstream(), env_name)
            third = await journal.append(an_event(env_name, 2), second)
            assert [stored.seq for stored in await journal.read()] == [1, 2, 3]
            assert (await journal.find("event-2", 2)) == third
