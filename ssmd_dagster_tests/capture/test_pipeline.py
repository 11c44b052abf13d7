"""Flushes reach spool and stream whole and in order, whatever disk and stream do meanwhile, and memory stays bounded."""

from __future__ import annotations

import asyncio
import errno
import os
import random
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from ssmd_dagster.archive.batch import read_whole
from ssmd_dagster.capture import pipeline as pipeline_module
from ssmd_dagster.capture.pipeline import IN_FLIGHT, Pipeline
from ssmd_dagster.errors import SsmdError, UnreachableError
from ssmd_dagster.stores.stream import BatchTooLargeError
from ssmd_dagster_tests.capture.recordings import Recording, eventually, header_of, spooled_batches

Known = tuple[str, int]


class Stream:
    """A stream that a test can take away, make refuse, or make lose answers. It keeps what it took, repetitions included."""

    def __init__(self) -> None:
        self.taken: list[Known] = []
        self.data: dict[Known, bytes] = {}
        self.calls = 0
        self.under_way = 0
        self.most_under_way = 0
        self.away = False
        self.silent = False
        self.fate: Callable[[Known], str] = lambda _known: "taken"

    async def publish(self, conn: str, channel: str, batch: int, records: int, data: bytes) -> asyncio.Future[int]:
        """Stand in for `RawStream.publish`."""
        self.calls += 1
        known = (channel, batch)
        fate = "away" if self.away else self.fate(known)
        if fate == "away":
            raise UnreachableError("not connected")
        if fate == "too large":
            raise BatchTooLargeError("a batch does not fit into a message")
        future: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        self.under_way += 1
        self.most_under_way = max(self.most_under_way, self.under_way)
        future.add_done_callback(self._ended)
        if fate in ("taken", "answer lost"):
            self.taken.append(known)
            self.data[known] = data
        if not self.silent:
            asyncio.get_running_loop().call_soon(self._answer, future, fate)
        return future

    def _ended(self, future: asyncio.Future[int]) -> None:
        self.under_way -= 1

    def _answer(self, future: asyncio.Future[int], fate: str) -> None:
        if future.done():
            return
        if fate == "taken":
            future.set_result(len(self.taken))
        else:
            future.set_exception(UnreachableError(fate))

    def firsts(self) -> list[Known]:
        """Return what was taken, each batch once, where it came first."""
        return list(dict.fromkeys(self.taken))


class Line:
    """A recorder, a pipeline and a stream, put together as the connector does."""

    def __init__(self, folder: Path, executor: ThreadPoolExecutor) -> None:
        self.folder = folder
        self.stream = Stream()
        self.disk: list[OSError | None] = []
        self.recording = Recording(on_flush=self._submit)
        self.pipeline = Pipeline(self.recording.origin, folder, self.stream.publish, executor, on_disk=self.disk.append)
        self.submitted: list[Known] = []

    def _submit(self, flush: Any) -> None:
        self.submitted += [(unsealed.channel, unsealed.batch) for unsealed in flush]
        self.pipeline.submit(flush)

    def flush(self, count: int, size: int = 0) -> None:
        """Submit `count` flushes of two channels, with about `size` bytes each that cannot be compressed."""
        rng = random.Random(count)
        for _ in range(count):
            self.recording.frame("trade", pad=rng.randbytes(size // 2).hex())
            self.recording.frame("ticker")
            self.recording.recorder.flush()

    def spooled(self) -> list[Known]:
        """Return the batches in the spool file, in its order."""
        headers = [header_of(data).header for data in spooled_batches(self.folder / "812-a-0.batches")]
        return [(header.channel, header.batch) for header in headers]


@pytest.fixture(autouse=True)
def no_patience(monkeypatch: pytest.MonkeyPatch) -> None:
    """Try again at once."""
    monkeypatch.setattr(pipeline_module, "RETRY_AFTER_S", 0.001)


@pytest.fixture
async def line(tmp_path: Path) -> AsyncIterator[Line]:
    """A line whose stream takes everything."""
    with ThreadPoolExecutor(1) as executor:
        line = Line(tmp_path / "spool", executor)
        yield line
        for task in (line.pipeline._sealer, line.pipeline._publisher):
            task.cancel()
        await asyncio.gather(line.pipeline._sealer, line.pipeline._publisher, return_exceptions=True)


async def test_batches_reach_spool_and_stream_in_the_order_of_the_flushes(line: Line) -> None:
    """Every batch is spooled and published once, in order, with the same bytes."""
    line.flush(100)
    assert await line.pipeline.close(10)
    assert line.stream.taken == line.spooled() == line.submitted
    assert list(line.stream.data.values()) == spooled_batches(line.folder / "812-a-0.batches")
    assert (line.pipeline.unacked_batches, line.pipeline.unacked_bytes, line.pipeline.unsealed_bytes) == (0, 0, 0)
    assert (line.pipeline.acked_batches, line.pipeline.acked_records) == (200, 200)


async def test_nothing_is_published_before_it_is_in_the_spool(line: Line) -> None:
    """When the stream sees a batch, the spool file already holds it."""
    early = []
    take = line.stream.publish

    async def publish(conn: str, channel: str, batch: int, records: int, data: bytes) -> asyncio.Future[int]:
        if (channel, batch) not in line.spooled():
            early.append((channel, batch))
        return await take(conn, channel, batch, records, data)

    line.pipeline._publish = publish
    line.flush(20)
    assert await line.pipeline.close(10)
    assert early == []
    assert len(line.stream.taken) == 40


async def test_after_a_failure_everything_from_the_failed_batch_on_is_sent_again(line: Line) -> None:
    """The batches behind a refused one are repeated behind it, so that the first copies stand in order."""
    failing = {("trade", 3)}

    def fate(known: Known) -> str:
        if known in failing:
            failing.discard(known)
            return "refused"
        return "taken"

    line.stream.fate = fate
    line.flush(10)
    assert await line.pipeline.close(10)
    refused = line.submitted.index(("trade", 3))
    assert line.stream.taken[:refused] == line.submitted[:refused]
    again = line.stream.taken.index(("trade", 3))
    assert line.stream.taken[again:] == line.submitted[refused:]


@pytest.mark.parametrize("seed", range(12))
async def test_a_stream_that_fails_at_random_gets_every_batch_in_the_end(
    line: Line, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Refusals, lost answers and outages, with most batches read from the spool again: none is lost, no order broken."""
    monkeypatch.setattr(pipeline_module, "HELD_BYTES", 3_000)
    monkeypatch.setattr(pipeline_module, "READ_BYTES", 1_500)
    rng = random.Random(seed)
    last_try: dict[Known, str] = {}

    def fate(known: Known) -> str:
        last_try[known] = rng.choices(["taken", "refused", "answer lost", "away"], [30, 1, 1, 1])[0]
        return last_try[known]

    line.stream.fate = fate
    for _ in range(30):
        line.flush(rng.randrange(1, 8), rng.choice([0, 100, 2_000]))
        line.stream.away = rng.random() < 0.3
        for _ in range(rng.randrange(20)):
            await asyncio.sleep(0)
    line.stream.away = False
    assert await line.pipeline.close(20)
    assert set(line.stream.taken) == set(line.submitted)
    assert line.spooled() == line.submitted
    # The last copy of each stands behind the last copy of every one before it: what a reader keeps of a fresh stream.
    lasts = {known: i for i, known in enumerate(line.stream.taken)}
    assert [lasts[known] for known in line.submitted] == sorted(lasts.values())
    assert {known: line.stream.data[known] for known in line.submitted} == dict(
        zip(line.submitted, spooled_batches(line.folder / "812-a-0.batches"), strict=True)
    )


async def test_memory_is_bounded_while_the_stream_is_away(line: Line, monkeypatch: pytest.MonkeyPatch) -> None:
    """Beyond `HELD_BYTES` batches are kept in the spool only, and come from there once the stream is back."""
    monkeypatch.setattr(pipeline_module, "HELD_BYTES", 20_000)
    monkeypatch.setattr(pipeline_module, "READ_BYTES", 5_000)
    line.stream.away = True
    line.flush(200, 1_000)
    await eventually(lambda: line.pipeline.unsealed_bytes == 0)
    assert line.pipeline.unacked_bytes > 200_000
    assert line.pipeline.unacked_batches == 400
    assert sum(len(batch.data) for batch in line.pipeline._held) <= 20_000
    assert len(line.pipeline._held) < 100
    line.stream.away = False
    line.flush(50, 1_000)
    assert await line.pipeline.close(20)
    assert line.stream.taken == line.submitted
    assert (line.pipeline.unacked_bytes, line.pipeline._held_bytes) == (0, 0)


async def test_no_more_than_so_many_batches_are_under_way(line: Line) -> None:
    """A stream that does not answer is sent `IN_FLIGHT` batches and no more."""
    line.stream.away = line.stream.silent = True
    line.flush(100)
    await eventually(lambda: line.pipeline.unsealed_bytes == 0)
    line.stream.away = False
    await eventually(lambda: line.stream.under_way == IN_FLIGHT)
    assert line.stream.most_under_way == IN_FLIGHT
    assert not await line.pipeline.close(0.01)
    assert line.stream.under_way == 0


@pytest.mark.parametrize("call", ["fsync", "pwrite", "open"])
async def test_a_disk_that_refuses_is_tried_again_and_nothing_is_lost(
    line: Line, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    """While the disk is full flushes wait in memory, the connector is told, and then everything is written in order."""
    refusals = 5
    real = getattr(os, call)

    def refusing(*arguments: Any) -> Any:
        nonlocal refusals
        if refusals > 0:
            refusals -= 1
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(*arguments)

    monkeypatch.setattr(os, call, refusing)
    line.flush(10)
    assert line.pipeline.unsealed_bytes > 0
    assert await line.pipeline.close(10)
    assert [error and error.errno for error in line.disk] == [errno.ENOSPC] * 5 + [None]
    assert line.spooled() == line.stream.taken == line.submitted
    assert line.pipeline.unsealed_bytes == 0


async def test_close_leaves_in_the_spool_what_the_stream_did_not_take(line: Line) -> None:
    """With the stream away, closing gives up in time and says so; the file holds everything."""
    line.stream.away = True
    line.flush(50)
    assert not await line.pipeline.close(0.05)
    assert line.pipeline.unacked_batches == 100
    assert line.spooled() == line.submitted
    assert line.stream.taken == []


async def test_a_closed_line_waits_for_the_stream_without_holding_its_batches(line: Line) -> None:
    """Closing without a deadline lets go of the memory, and publishes everything once the stream is back."""
    line.stream.away = True
    line.flush(100, 500)
    await eventually(lambda: line.pipeline.unsealed_bytes == 0)
    assert len(line.pipeline._held) > IN_FLIGHT
    closing = asyncio.create_task(line.pipeline.close(None))
    await eventually(lambda: len(line.pipeline._held) <= IN_FLIGHT)
    line.stream.away = False
    assert await asyncio.wait_for(closing, 10)
    assert line.stream.taken == line.submitted


async def test_a_closing_that_is_cancelled_leaves_no_task_behind(line: Line) -> None:
    """At the end of the process the wait for the stream is given up; what was submitted is in the spool."""
    line.stream.away = True
    line.flush(10)
    closing = asyncio.create_task(line.pipeline.close(None))
    await eventually(lambda: line.pipeline.unsealed_bytes == 0)
    closing.cancel()
    await asyncio.wait([closing])
    assert line.pipeline._publisher.done()
    assert line.spooled() == line.submitted


async def test_a_batch_that_no_message_takes_does_not_hold_up_the_others(line: Line) -> None:
    """It stays in the spool, unacknowledged, and everything behind it is published in order."""
    line.stream.fate = lambda known: "too large" if known in (("trade", 2), ("ticker", 9)) else "taken"
    line.flush(10)
    assert not await line.pipeline.close(10)
    assert line.stream.taken == [known for known in line.submitted if known not in (("trade", 2), ("ticker", 9))]
    assert line.pipeline.unacked_batches == 2
    assert line.spooled() == line.submitted


async def test_a_connection_id_that_has_a_file_ends_the_line_and_says_so(line: Line) -> None:
    """Two processes must not record under one id: `failed` raises instead of retrying for ever."""
    line.folder.mkdir()
    (line.folder / "812-a-0.batches").write_bytes(b"another's")
    line.flush(1)
    with pytest.raises(FileExistsError):
        await asyncio.wait_for(line.pipeline.failed(), 10)
    with pytest.raises(FileExistsError):
        await line.pipeline.close(0)
    assert (line.folder / "812-a-0.batches").read_bytes() == b"another's"


async def test_a_spool_that_is_damaged_under_the_pipeline_costs_only_what_was_hit(
    line: Line, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Batches that cannot be read back are passed over, the others are published in order; closing says that not all came."""
    monkeypatch.setattr(pipeline_module, "HELD_BYTES", 500)
    monkeypatch.setattr(pipeline_module, "READ_BYTES", 4_000)
    line.stream.away = True
    line.flush(20, 1_000)
    await eventually(lambda: line.pipeline.unsealed_bytes == 0)
    path = line.folder / "812-a-0.batches"
    size = path.stat().st_size
    with path.open("r+b") as file:
        file.seek(size // 4)
        file.write(bytes(size // 4))
    line.stream.away = False
    assert not await line.pipeline.close(10)
    taken = line.stream.taken
    assert taken == [known for known in line.submitted if known in taken]
    assert 10 < len(line.submitted) - line.pipeline.unacked_batches == len(taken) < 40
    assert taken[-1] == line.submitted[-1]
    assert all(read_whole(data) is not None for data in line.stream.data.values())


async def test_an_unforeseen_error_is_raised_and_not_waited_out(line: Line) -> None:
    """A bug in sealing or publishing ends the connector, and does not let records pile up behind a dead task."""

    async def publish(*_: Any) -> asyncio.Future[int]:
        raise ValueError("a bug")

    line.pipeline._publish = publish
    line.flush(1)
    with pytest.raises(ValueError, match="a bug"):
        await asyncio.wait_for(line.pipeline.failed(), 10)
    with pytest.raises(ValueError, match="a bug"):
        await line.pipeline.close(1)


def test_the_stand_in_stream_raises_what_the_real_one_does() -> None:
    """The pipeline relies on both errors being an `SsmdError`."""
    assert issubclass(BatchTooLargeError, SsmdError)
    assert issubclass(UnreachableError, SsmdError)
