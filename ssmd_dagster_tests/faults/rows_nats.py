"""Rows N1 to N6: the NATS server and what lies on its disk."""

from __future__ import annotations

import shutil
import time
from pathlib import Path

from ssmd_dagster.stores.connect import Stores
from ssmd_dagster_tests.faults.scenario import scenario
from ssmd_dagster_tests.faults.stage import DONE, ENV, Stage


def _raw_store(stage: Stage) -> Path:
    """Return the folder in which the server keeps the raw stream."""
    return next(stage.nats.folder.glob(f"jetstream/**/streams/{ENV}-raw"))


@scenario("N1", "kill -9 nats-server, restart", "clients reconnect, what was not acknowledged is sent again")
def nats_killed(stage: Stage) -> None:
    """Killed twice, the second time soon after it is back."""
    for _ in range(2):
        stage.pause(0.1, 1.0)
        since = time.monotonic()
        stage.nats.kill()
        stage.pause(0.2, 3.0)
        stage.nats.start()
        stage.recovered(since)


@scenario("N1", "kill -9 nats-server while the day is ended", "the same command finishes the day")
def nats_killed_while_ending(stage: Stage) -> None:
    """At a random moment of `day end`; the operator asks again if it gave up."""
    ending = stage.house.spawn("day", "end", ENV, "--date", stage.date)
    stage.pause(0.5, 4.0)
    stage.nats.kill()
    stage.pause(0.2, 2.0)
    stage.nats.start()
    ending.communicate(timeout=90)
    if ending.returncode not in DONE:
        stage.wait(lambda: stage.try_to_end().returncode in DONE, "the day to be ended by the next command", 90)


@scenario(
    "N2", "the raw stream loses its last seconds of acknowledged batches", "republished from the spool", quick=True
)
def store_rolled_back(stage: Stage) -> None:
    """The stream's folder is put back to a copy, as if nothing behind it had reached the disk."""
    store = _raw_store(stage)
    copy = stage.folder / "copy"
    stage.nats.pause()
    shutil.copytree(store, copy)
    stage.nats.resume()
    stage.flows(300)
    since = time.monotonic()
    stage.nats.kill()
    shutil.rmtree(store)
    shutil.copytree(copy, store)
    stage.nats.start()
    stage.recovered(since)


@scenario(
    "N3", "bits flipped in the stream's block files", "what cannot be read any more is republished from the spool"
)
def blocks_damaged(stage: Stage) -> None:
    """One bit at three random places, while the server is down."""
    stage.flows(300)
    since = time.monotonic()
    stage.nats.kill()
    blocks = sorted(_raw_store(stage).glob("msgs/*.blk"))
    for _ in range(3):
        block = stage.random.choice(blocks)
        data = bytearray(block.read_bytes())
        data[stage.random.randrange(len(data))] ^= 1 << stage.random.randrange(8)
        block.write_bytes(data)
    stage.nats.start()
    stage.recovered(since)


@scenario("N3", "a block file of the stream cut short", "the same")
def blocks_cut(stage: Stage) -> None:
    """The last block loses a random part of its end, while the server is down."""
    stage.flows(300)
    since = time.monotonic()
    stage.nats.kill()
    block = max(_raw_store(stage).glob("msgs/*.blk"), key=lambda path: int(path.stem))
    size = block.stat().st_size
    with block.open("r+b") as file:
        file.truncate(stage.random.randrange(size // 2, size))
    stage.nats.start()
    stage.recovered(since)


@scenario("N4", "stream full (max_bytes)", "the spool takes everything, the lag shows; with more room it catches up")
def stream_full(stage: Stage) -> None:
    """The limit is put where the stream is now: new batches are refused, none is thrown away; then it is raised again."""

    async def limit(stores: Stores) -> None:
        raw = stores.raw_stream
        state = (await raw._js.stream_info(raw.stream)).state
        await raw.create(state.bytes + 50_000)

    async def more_room(stores: Stores) -> None:
        await stores.raw_stream.create(64 << 20)

    since = time.monotonic()
    stage.with_stores(limit)
    stage.wait(lambda: stage.beat("connector-a").get("unacked_batches", 0) > 40, "the lag to show", 90)
    stage.detected(since)
    assert "the raw stream is" in stage.house.ssmd("day", "status", ENV).stdout
    since = time.monotonic()
    stage.with_stores(more_room)
    stage.recovered(since)


@scenario("N5", "the raw stream is deleted", "ERROR with the cause; recover makes it anew, the spool fills it again")
def stream_deleted(stage: Stage) -> None:
    """By an administrator's mistake, while the day runs."""

    async def delete(stores: Stores) -> None:
        raw = stores.raw_stream
        await raw._js.delete_stream(raw.stream)

    since = time.monotonic()
    stage.with_stores(delete)
    stage.wait(lambda: stage.house.json("day", "status", ENV)["state"] == "ERROR", "the day to be in ERROR")
    stage.detected(since)
    assert "no such stream" in str(stage.house.json("day", "status", ENV)["error"])
    stage.recover()
    stage.recovered(since)


@scenario("N5", "a raw stream with other subjects", "start refuses, exit 8", started=False, ends=False)
def stream_with_other_subjects(stage: Stage) -> None:
    """Somebody else's stream has the name."""

    async def create(stores: Stores) -> None:
        raw = stores.raw_stream
        await raw._js.add_stream(name=raw.stream, subjects=["somebody.else.>"])

    stage.with_stores(create)
    done = stage.house.ssmd("day", "start", ENV, check=8)
    assert "subjects" in done.stderr
    assert stage.pid("capture.connector") is None


@scenario("N6", "archiver and NATS cut off from each other", "lag, then it catches up")
def archiver_partitioned(stage: Stage) -> None:
    """Nothing gets through in either direction and nobody is told; then the line is back."""
    assert "archiver" in stage.to_nats.clients()
    since = time.monotonic()
    stage.to_nats.hole("archiver")
    stage.pause(3.0, 8.0)
    stage.to_nats.heal()
    stage.recovered(since)


@scenario("N6", "every line to NATS clogged, cut and slowed in turn", "lag, then it catches up")
def lines_clogged(stage: Stage) -> None:
    """Whose line, how and how long is drawn by lot."""
    since = time.monotonic()
    for _ in range(12):
        name = stage.random.choice(("archiver", "connector-a", "gateway", ""))
        kind = stage.random.choice(("hole", "cut", "slow"))
        if kind == "hole":
            stage.to_nats.hole(name)
        elif kind == "cut":
            stage.to_nats.cut(name)
        else:
            stage.to_nats.slow(20_000, name)
        stage.pause(0.2, 2.5)
        if stage.random.random() < 0.6:
            stage.to_nats.heal()
    stage.to_nats.heal()
    stage.recovered(since)
