"""However often archivers are killed, raced or lied to by the store, each batch is archived exactly once."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import errno
import os
import random
from collections.abc import AsyncIterator, Callable, Sequence
from pathlib import Path
from typing import Any

import msgspec
import pytest

from ssmd_dagster.archive.batch import Footer, encode_batch, read_last
from ssmd_dagster.archive.layout import day_prefix, parse_segment_key, segment_key
from ssmd_dagster.archive.readback import Readback
from ssmd_dagster.archive.segment import covered
from ssmd_dagster.capture import archiver as archiver_module
from ssmd_dagster.capture.archiver import Archiver, read_footer, sha256_of
from ssmd_dagster.capture.control import control_subject, request
from ssmd_dagster.capture.process import cancel
from ssmd_dagster.capture.setting import Setting
from ssmd_dagster.day.states import EventName
from ssmd_dagster.environments.home import segments_dir
from ssmd_dagster.errors import RefusedError, SsmdError, UnreachableError
from ssmd_dagster.stores.connect import Stores
from ssmd_dagster.stores.daybook import DayBook
from ssmd_dagster.stores.objects import ObjectStore, StorageError
from ssmd_dagster_tests.capture.conftest import MakeSetting
from ssmd_dagster_tests.capture.recordings import (
    DATE,
    FEED,
    Recording,
    Segments,
    a_recording,
    eventually,
    header_of,
    read_segments,
)


class Killed(BaseException):
    """Stands for SIGKILL: no handler of ours catches it."""


class Shop:
    """An object store whose `create` a test can disturb; everything else goes through."""

    def __init__(self, store: ObjectStore, disturb: Callable[[str, str], None]) -> None:
        self._store = store
        self._disturb = disturb
        self.created: list[str] = []

    async def create(self, key: str, content: bytes | Path) -> None:
        """Create an object, disturbed before or after."""
        self._disturb("before", key)
        await self._store.create(key, content)
        self.created.append(key)
        self._disturb("after", key)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._store, name)


def disturbed(stores: Stores, disturb: Callable[[str, str], None]) -> Stores:
    """Return stores whose object store is disturbed."""
    return dataclasses.replace(stores, raw=Shop(stores.raw, disturb))  # type: ignore[arg-type]


async def publish(stores: Stores, batches: Sequence[bytes], repair_round: int = 0) -> None:
    """Publish batches in this order."""
    for data in batches:
        header = header_of(data).header
        acknowledged = await stores.raw_stream.publish(
            data,
            date=DATE,
            channel=header.channel,
            conn=header.conn,
            batch=header.batch,
            records=header.records,
            repair_round=repair_round,
        )
    await acknowledged


async def archived(stores: Stores) -> Segments:
    """Return the day's segments as they are in the store."""
    segments: Segments = {}
    for info in await stores.raw.list(day_prefix(FEED, DATE)):
        parsed = parse_segment_key(info.key)
        assert parsed is not None
        segments[info.key] = (*parsed, await stores.raw.get(info.key))
    return segments


async def read_back(stores: Stores, env: str) -> Readback:
    """Read the whole archive back."""
    return read_segments(await archived(stores), env=env)


async def flush(stores: Stores, env: str, timeout_s: float = 30.0) -> dict[str, Any]:
    """Have the archiver store everything, as the end of a day does."""
    subject = control_subject(env, "archiver", DATE)
    await request(stores.nc, subject, "flush")
    async with asyncio.timeout(timeout_s):
        while (status := await request(stores.nc, subject, "status"))["flushing"]:
            await asyncio.sleep(0.01)
    return status


@contextlib.asynccontextmanager
async def running(setting: Setting, stores: Stores, epoch: int) -> AsyncIterator[Archiver]:
    """Run an archiver until the end of the block; what it raises is raised there."""
    archiver, stop = Archiver(setting, stores, DATE, epoch), asyncio.Event()
    task = asyncio.create_task(archiver.run(stop))
    try:
        await eventually(lambda: archiver._state == "archiving" or task.done())
        yield archiver
        stop.set()
        await asyncio.wait_for(task, 20)
    finally:
        await cancel(task)


@pytest.fixture
async def epoch(book: DayBook) -> int:
    """The epoch that holds the day."""
    day = await book.day(DATE)
    assert day is not None
    assert day.epoch is not None
    return day.epoch


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Wait little for the stream and between attempts, and close segments early, so that a small day has many."""
    monkeypatch.setattr(archiver_module, "FETCH_TIMEOUT_S", 0.02)
    monkeypatch.setattr(archiver_module, "RETRY_MIN_S", 0.01)
    monkeypatch.setattr(archiver_module, "CLOSE_AT_BYTES", 6_000)


def two_connections(env: str, frames: int = 150) -> list[Recording]:
    """Return recordings of two connections of the day."""
    return [a_recording(f"3-a-{i}", env=env, frames=frames, seed=i) for i in range(2)]


def batches_of(recordings: Sequence[Recording]) -> list[bytes]:
    """Return all batches of recordings, one connection after the other."""
    return [data for recording in recordings for data in recording.batches()]


async def assert_whole(stores: Stores, env: str, recordings: Sequence[Recording]) -> None:
    """Check that the archive holds each record of the recordings exactly once."""
    readback = await read_back(stores, env)
    assert readback.faults == ()
    assert readback.records == sum(recording.recorder.n for recording in recordings)
    assert readback.by_connection == {recording.origin.conn: recording.recorder.by_channel for recording in recordings}


async def test_a_day_is_archived_in_segments_that_follow_one_another(
    setting: Setting, stores: Stores, epoch: int
) -> None:
    """Segments are numbered from 0, chained by hash, and together hold each batch once; the local files are gone."""
    env = setting.env.name
    recordings = two_connections(env)
    async with running(setting, stores, epoch) as archiver:
        await publish(stores, batches_of(recordings))
        status = await flush(stores, env)
        assert (status["backlog"], status["open_batches"], status["error"]) == (0, 0, None)
        assert status["messages"] == sum(len(recording.payloads) for recording in recordings)
        folder = segments_dir(setting.home, env, DATE)
        assert [path.name.split("-")[0] for path in folder.iterdir()] == [str(os.getpid())]
        assert list(archiver._local.iterdir()) == []
    assert list(folder.iterdir()) == []
    await assert_whole(stores, env, recordings)
    segments = await archived(stores)
    numbers: dict[str, list[int]] = {}
    for channel, number, data in segments.values():
        numbers.setdefault(channel, []).append(number)
        footer = read_last(data)
        assert isinstance(footer, Footer)
        assert footer.footer.epoch == epoch
    assert max(map(len, numbers.values())) > 2
    assert all(sorted(found) == list(range(len(found))) for found in numbers.values())


async def test_a_flush_stores_everything_that_was_published_before_it(
    setting: Setting, stores: Stores, epoch: int
) -> None:
    """Also where far more waits in the stream than is fetched at once, and the archiver has only just begun."""
    env = setting.env.name
    recording = Recording("3-a-0", env=env)
    for seq in range(400):
        recording.frame("trade", seq=seq)
        recording.recorder.flush()
    recording.end()
    await publish(stores, recording.batches())
    archiver, stop = Archiver(setting, stores, DATE, epoch), asyncio.Event()
    archiver._flush_wanted.set()
    task = asyncio.create_task(archiver.run(stop))
    await eventually(lambda: not archiver._status()["flushing"] or task.done())
    stop.set()
    await task
    await assert_whole(stores, env, [recording])


async def test_a_flush_does_not_wait_for_what_is_published_behind_it(
    setting: Setting, stores: Stores, epoch: int
) -> None:
    """While a connector goes on publishing, a flush comes to its end."""
    env = setting.env.name
    recording = a_recording("3-a-0", env=env, frames=60)
    batches = recording.batches()
    more = asyncio.Event()

    async def keep_publishing() -> None:
        number = 0
        while not more.is_set():
            number += 1
            other = a_recording(f"3-a-{number}", env=env, frames=3)
            await publish(stores, other.batches())

    async with running(setting, stores, epoch):
        await publish(stores, batches)
        publishing = asyncio.create_task(keep_publishing())
        try:
            await flush(stores, env, timeout_s=10)
        finally:
            more.set()
            await publishing
        kept = {
            (conn, number)
            for _, _, data in (await archived(stores)).values()
            for footer in (read_last(data),)
            if isinstance(footer, Footer)
            for conn, first, last in covered([footer.footer])
            for number in range(first, last + 1)
        }
        assert {(header_of(data).header.conn, header_of(data).header.batch) for data in batches} <= kept


@pytest.mark.parametrize("seed", range(8))
async def test_archivers_killed_at_random_points_leave_each_batch_once(
    make_setting: MakeSetting, stores: Stores, epoch: int, seed: int
) -> None:
    """Killed before a put, behind it with its answer lost, or anywhere in between, the next one goes on from the footers."""
    setting, rng = make_setting(), random.Random(seed)
    env = setting.env.name
    recordings = two_connections(env)
    batches = batches_of(recordings)
    chance = 0.4

    def disturb(when: str, key: str) -> None:
        if rng.random() < chance:
            raise Killed(when, key)

    done = False
    lives = 0
    while not done:
        lives += 1
        assert lives < 200
        if lives > 20:
            chance = 0.1
        shop = disturbed(stores, disturb)
        cut = rng.randrange(len(batches) + 1)
        await publish(stores, batches[: max(cut, 1)])  # what is there already is not stored again
        batches = batches[cut:] or batches[-1:]
        archiver, stop = Archiver(setting, shop, DATE, epoch), asyncio.Event()
        task = asyncio.create_task(archiver.run(stop))
        if rng.random() < 0.3:
            for _ in range(rng.randrange(60)):
                await asyncio.sleep(0)
        else:
            archiver._flush_wanted.set()
            await eventually(lambda task=task, archiver=archiver: task.done() or not archiver._status()["flushing"])  # type: ignore[misc]
            done = not task.done() and len(batches) == 1
        await cancel(task)
        with contextlib.suppress(asyncio.CancelledError):
            assert task.cancelled() or isinstance(task.exception(), Killed), task.exception()
    await assert_whole(stores, env, recordings)


@pytest.mark.parametrize("seed", range(4))
async def test_two_archivers_of_one_day_neither_lose_nor_repeat_a_batch(
    make_setting: MakeSetting, stores: Stores, epoch: int, seed: int
) -> None:
    """Both create segments as they like; whoever comes second adopts the other's and works out again what is missing."""
    settings = [make_setting("left"), make_setting("right")]
    env = settings[0].env.name
    recordings = two_connections(env)
    batches = batches_of(recordings)
    rng = random.Random(seed)
    shops = [disturbed(stores, lambda _when, _key: None) for _ in settings]
    archivers = [Archiver(each, shop, DATE, epoch) for each, shop in zip(settings, shops, strict=True)]
    stop = asyncio.Event()
    tasks = [asyncio.create_task(archiver.run(stop)) for archiver in archivers]
    while batches:
        count = rng.randrange(5, 30)
        await publish(stores, batches[:count])
        batches = batches[count:]
        asked = archivers if rng.random() < 0.3 else [rng.choice(archivers)]
        for archiver in asked if batches else archivers:
            archiver._flush_wanted.set()
        await eventually(
            lambda asked=asked: (
                any(task.done() for task in tasks)  # type: ignore[misc]
                or not any(archiver._status()["flushing"] for archiver in asked)
            )
        )
    await eventually(lambda: not any(archiver._status()["flushing"] for archiver in archivers))
    stop.set()
    await asyncio.gather(*tasks)
    created = [shop.raw.created for shop in shops]  # type: ignore[attr-defined]
    assert all(created), "one of them did everything: nothing was raced"
    await assert_whole(stores, env, recordings)


async def test_a_put_whose_answer_was_lost_is_no_second_segment(setting: Setting, stores: Stores, epoch: int) -> None:
    """The retry meets the object with the same hash and takes it for its own success."""
    lost: list[str] = []

    def disturb(when: str, key: str) -> None:
        if when == "after" and key not in lost:
            lost.append(key)
            raise UnreachableError("the answer is lost")

    env = setting.env.name
    recordings = two_connections(env)
    async with running(setting, disturbed(stores, disturb), epoch):
        await publish(stores, batches_of(recordings))
        await flush(stores, env)
    await assert_whole(stores, env, recordings)
    assert sorted(lost) == sorted(await archived(stores))


@pytest.mark.parametrize("error", [UnreachableError("no answer"), StorageError("No space left on device")])
async def test_a_store_that_fails_for_a_while_is_tried_again(
    setting: Setting, stores: Stores, epoch: int, error: SsmdError
) -> None:
    """The archiver says what it waits for, and goes on when the store does."""
    away = True

    def disturb(when: str, key: str) -> None:
        if when == "before" and away:
            raise error

    env = setting.env.name
    recordings = two_connections(env, frames=40)
    async with running(setting, disturbed(stores, disturb), epoch) as archiver:
        await publish(stores, batches_of(recordings))
        archiver._flush_wanted.set()
        await eventually(lambda: archiver._status()["error"])
        assert error.what in str(archiver._status()["error"])
        away = False
        await flush(stores, env)
        assert archiver._status()["error"] is None
    await assert_whole(stores, env, recordings)


async def test_an_archiver_whose_epoch_has_passed_stops_before_it_creates_anything(
    setting: Setting, stores: Stores, book: DayBook, epoch: int
) -> None:
    """Another attempt at the day holds it now: the old archiver ends, refused, and its segments are nowhere."""
    env = setting.env.name
    archiver, stop = Archiver(setting, stores, DATE, epoch), asyncio.Event()
    task = asyncio.create_task(archiver.run(stop))
    await publish(stores, a_recording("3-a-0", env=env, frames=10).batches())
    await book.append(DATE, EventName.ERROR_RAISED, data={"error": "no heartbeat"})
    await book.append(DATE, EventName.RECOVERED)
    archiver._flush_wanted.set()
    with pytest.raises(RefusedError, match=f"epoch {epoch} does not hold the day"):
        await asyncio.wait_for(task, 20)
    assert await archived(stores) == {}
    assert archiver._status()["state"] == "failed"
    assert list(segments_dir(setting.home, env, DATE).iterdir()) == []


async def test_what_is_no_batch_is_passed_over_and_a_repaired_copy_is_taken(
    setting: Setting, stores: Stores, epoch: int
) -> None:
    """Junk and a damaged batch stop nothing; the repaired batch, out of order, verifies."""
    env = setting.env.name
    recording = a_recording("3-a-0", env=env, frames=60)
    batches = recording.batches()
    victim = next(i for i, data in enumerate(batches) if header_of(data).header.channel == "trade") + 4
    spoilt = msgspec.structs.replace(header_of(batches[victim]).header, sha256="0" * 64)
    damaged = encode_batch(spoilt, b'{"n":0}\n' * spoilt.records)
    async with running(setting, stores, epoch) as archiver:
        await publish(stores, batches[:victim])
        for number, junk in enumerate((damaged, b"junk", b"", batches[victim][:-1], b"x" + batches[victim])):
            acknowledged = await stores.raw_stream.publish(
                junk, date=DATE, channel="trade", conn=f"junk-{number}", batch=0, records=1
            )
            await acknowledged
        await publish(stores, batches[victim + 1 :])
        status = await flush(stores, env)
        assert (status["passed_over"], status["state"]) == (5, "archiving")
        assert any("ordinals are missing" in fault for fault in (await read_back(stores, env)).faults)
        await publish(stores, batches[victim : victim + 1], repair_round=1)
        await flush(stores, env)
        assert archiver._status()["messages"] == len(recording.payloads)
    await assert_whole(stores, env, [recording])


async def test_a_hole_among_the_segments_stops_the_archiver_until_it_is_mended(
    setting: Setting, stores: Stores, epoch: int
) -> None:
    """Nothing is built on a log whose beginning is gone; the error names the object, and its return is enough."""
    env = setting.env.name
    recordings = two_connections(env)
    batches = batches_of(recordings)
    async with running(setting, stores, epoch):
        await publish(stores, batches[:-5])
        await flush(stores, env)
    segment = Path(stores.raw.url(segment_key(FEED, DATE, "trade", 0)))
    kept = segment.read_bytes()
    segment.unlink()
    archiver, stop = Archiver(setting, stores, DATE, epoch), asyncio.Event()
    task = asyncio.create_task(archiver.run(stop))
    await eventually(lambda: archiver._status()["state"] == "error")
    assert "number 0 is missing" in archiver._status()["error"]
    assert archiver._status()["exit_code"] == 1
    segment.write_bytes(kept)
    await publish(stores, batches[-5:])
    await flush(stores, env)
    assert (archiver._status()["state"], archiver._status()["error"]) == ("archiving", None)
    stop.set()
    await task
    await assert_whole(stores, env, recordings)


async def test_a_full_local_disk_stops_the_archiver_until_there_is_room(
    setting: Setting, stores: Stores, epoch: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever write fails, no part of a batch gets into the store; the next attempts begin from the store alone."""
    env = setting.env.name
    recordings = two_connections(env)
    room, write, chance = False, os.write, random.Random(3)

    def no_room(fd: int, data: Any) -> int:
        if room or chance.random() < 0.5:
            return write(fd, data)
        raise OSError(errno.ENOSPC, "No space left on device")

    async with running(setting, stores, epoch) as archiver:
        monkeypatch.setattr(os, "write", no_room)
        await publish(stores, batches_of(recordings))
        archiver._flush_wanted.set()
        await eventually(lambda: archiver._status()["state"] == "error")
        assert "No space left on device" in archiver._status()["error"]
        room = True
        await flush(stores, env)
        assert (archiver._status()["state"], archiver._status()["error"]) == ("archiving", None)
    await assert_whole(stores, env, recordings)


async def test_what_the_store_gives_back_differently_is_no_success(
    setting: Setting, stores: Stores, epoch: int
) -> None:
    """A put is believed once the object has been read back; the spoilt one is named, and put again when it is moved away."""
    spoilt: list[Path] = []

    def disturb(when: str, key: str) -> None:
        if when == "after" and not spoilt:
            path = Path(stores.raw.url(key))
            data = bytearray(path.read_bytes())
            data[len(data) // 2] ^= 1
            path.chmod(0o600)
            path.write_bytes(data)
            spoilt.append(path)

    env = setting.env.name
    recordings = two_connections(env, frames=40)
    async with running(setting, disturbed(stores, disturb), epoch) as archiver:
        await publish(stores, batches_of(recordings))
        archiver._flush_wanted.set()
        await eventually(lambda: archiver._status()["error"])
        assert str(spoilt[0]) in archiver._status()["error"]
        await asyncio.sleep(0.1)  # tried again some times, and not taken for another archiver's
        assert str(spoilt[0]) in archiver._status()["error"]
        spoilt[0].unlink()
        await flush(stores, env)
    await assert_whole(stores, env, recordings)


@pytest.mark.parametrize("content", [b"", b"cut", b"x" * 200_000])
async def test_a_segment_without_a_footer_is_named(stores: Stores, content: bytes) -> None:
    """An object that no archiver wrote stops the archiver with its address."""
    key = segment_key(FEED, DATE, "trade", 0)
    await stores.raw.create(key, content)
    with pytest.raises(SsmdError, match="without a footer") as caught:
        await read_footer(stores.raw, key)
    assert key in caught.value.where
    assert len(await sha256_of(stores.raw, key)) == 64


async def test_what_killed_archivers_left_on_the_disk_is_removed(setting: Setting, stores: Stores, epoch: int) -> None:
    """Folders of processes that live no more go; that of another archiver that lives stays."""
    folder = segments_dir(setting.home, setting.env.name, DATE)
    dead, living = folder / "99999999-abc", folder / f"{os.getppid()}-abc"
    for left in (dead, living):
        left.mkdir(parents=True)
        (left / "trades-00.jsonl.zst").write_bytes(b"half")
    async with running(setting, stores, epoch):
        assert not dead.exists()
        assert living.exists()


async def test_the_archiver_answers_what_it_is_asked(setting: Setting, stores: Stores, epoch: int) -> None:
    """`status` and `flush` carry the status; anything else is refused in words."""
    subject = control_subject(setting.env.name, "archiver", DATE)
    async with running(setting, stores, epoch):
        status = await request(stores.nc, subject, "status")
        assert (status["state"], status["flushing"], status["backlog"]) == ("archiving", False, 0)
        with pytest.raises(SsmdError, match="unknown command `dance`"):
            await request(stores.nc, subject, "dance")
    with pytest.raises(UnreachableError):
        await request(stores.nc, subject, "status")
